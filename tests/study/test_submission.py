"""Submissions: conventions of displacements, writing, reading, what the validator names, and scores."""

import gzip
import json
import re
import shutil
import zipfile
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from lumirlib import cli, spatial
from lumirlib.data import field_formats, load_cohort
from lumirlib.evaluation import evaluate_method, zero_displacement
from lumirlib.provenance import project_root
from lumirlib.study import submission

SHAPE = (5, 6, 7)
#: Voxels of 2, 3 and 1.5 mm, axes permuted and turned: i runs to the left, j upwards, k to the front.
AFFINE = np.array([[-2.0, 0, 0, 10], [0, 0, 1.5, -20], [0, 3.0, 0, 5], [0, 0, 0, 1]])


def random_displacement(shape=SHAPE, seed=0):
    return 2 * torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(seed)) - 1


def for_grid_sample(displacement, align_corners=True):
    """A displacement in voxels as what is added to the normalized grid of torch's `grid_sample`."""
    sides = torch.tensor(displacement.shape[2:]).view(3, 1, 1, 1)
    return (displacement * 2 / (sides - 1 if align_corners else sides)).movedim(1, -1).flip(-1)


# conventions ---------------------------------------------------------------------------------------------------------


def test_layouts_keep_each_component_and_voxel():
    ours = random_displacement()
    last = field_formats.voxel_to_channels_last(ours)
    assert last.shape == (*SHAPE, 3) and last[1, 2, 3, 0] == ours[0, 0, 1, 2, 3]
    for back in (
        field_formats.channels_last_to_voxel(last),
        field_formats.channels_first_to_voxel(ours[0].numpy()),
    ):
        assert torch.equal(back, ours)


@pytest.mark.parametrize("align_corners", [True, False])
def test_grid_sample_units_give_what_grid_sample_warps(align_corners):
    ours, image = random_displacement(), torch.rand(1, 1, *SHAPE, generator=torch.Generator().manual_seed(1))
    flow = for_grid_sample(ours, align_corners)
    assert flow.shape == (1, *SHAPE, 3)
    identity = torch.nn.functional.affine_grid(torch.eye(3, 4)[None], [1, 1, *SHAPE], align_corners=align_corners)
    warped = torch.nn.functional.grid_sample(image, identity + flow, align_corners=align_corners)
    assert torch.allclose(warped, spatial.warp(image, ours), atol=1e-5)
    assert torch.allclose(field_formats.grid_sample_to_voxel(flow, align_corners), ours, atol=1e-6)


def test_an_itk_field_moves_points_in_the_world_as_ours_moves_voxels():
    ours = random_displacement()
    field = field_formats.voxel_to_itk(ours, AFFINE)
    assert field.shape == (*SHAPE, 1, 3)
    voxel = np.array([1, 2, 3])
    moved = voxel + ours[0, :, 1, 2, 3].numpy()
    before, after = (AFFINE @ [*place, 1] for place in (voxel, moved))
    lps = (after - before)[:3] * [-1, -1, 1]
    assert field[1, 2, 3, 0] == pytest.approx(lps, abs=1e-5)
    assert torch.allclose(field_formats.itk_to_voxel(field, AFFINE), ours, atol=1e-5)
    assert torch.allclose(field_formats.itk_to_voxel(field[:, :, :, 0], AFFINE), ours, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: field_formats.channels_last_to_voxel(np.zeros((3, 5, 6, 7))),
            r"array must be \(D, H, W, 3\), got \(3, ",
        ),
        (
            lambda: field_formats.channels_first_to_voxel(np.zeros((5, 6, 7, 3))),
            r"array must be \(3, D, H, W\), got \(5",
        ),
        (lambda: field_formats.grid_sample_to_voxel(torch.zeros(1, 3, 5, 6, 7)), r"flow must be \(1, D, H, W, 3\)"),
        (lambda: field_formats.itk_to_voxel(np.zeros((5, 6, 7)), AFFINE), r"field must be \(D, H, W, 3\)"),
        (lambda: field_formats.voxel_to_itk(random_displacement(), np.zeros((4, 4))), "affine must be an invertible"),
        (lambda: field_formats.voxel_to_channels_last(torch.zeros(2, 3, 5, 6, 7)), r"displacement must be \(1, 3, D"),
    ],
)
def test_other_layouts_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# names ---------------------------------------------------------------------------------------------------------------


def test_files_are_named_by_case_numbers(embedded_cohort):
    assert submission.case_number("LUMIRMRI_3455") == "3455" and submission.case_number("SIM_0024") == "0024"
    names = submission.files_of(embedded_cohort.validation_pairs[:2])
    assert list(names) == ["disp_0024_0025.nii.gz", "disp_0024_0026.nii.gz"]
    with pytest.raises(ValueError, match="'brain' has no case number of up to four digits"):
        submission.case_number("brain")
    pair = embedded_cohort.validation_pairs[0]
    other = replace(pair, fixed=replace(pair.fixed, name="OTHER_0024"))
    with pytest.raises(ValueError, match=r"would both be disp_0024_0025\.nii\.gz"):
        submission.files_of((pair, other))


# writing and scoring -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(embedded_cohort):
    return embedded_cohort.validation_pairs[:2]


@pytest.fixture(scope="module")
def true_method(embedded_cohort, pairs):
    """A method that knows the truth of two simulated pairs, so that every mistake shows on the images."""
    known = {
        float(embedded_cohort.image(p.fixed).sum() - embedded_cohort.image(p.moving).sum()): (
            embedded_cohort.true_displacement(p)
        )
        for p in pairs
    }
    return lambda fixed, moving: known[float(fixed.sum() - moving.sum())]


@pytest.fixture(scope="module")
def good(embedded_cohort, pairs, true_method, tmp_path_factory):
    path = tmp_path_factory.mktemp("submission") / "good.zip"
    return submission.write_submission(true_method, embedded_cohort, path, pairs, progress=False)


def test_a_written_submission_validates_and_scores_as_in_memory(embedded_cohort, pairs, true_method, good):
    assert not good.with_suffix(".parts").exists()
    assert submission.validate_submission(good, embedded_cohort, pairs, progress=False) == []
    columns = ["pair", "metric"]
    scored, direct = (
        table[table["metric"] != "seconds"].set_index(columns)["value"]
        for table in (
            submission.score_submission(good, embedded_cohort, pairs, progress=False),
            evaluate_method(true_method, embedded_cohort, pairs, progress=False),
        )
    )
    assert scored.to_numpy() == pytest.approx(direct.to_numpy(), abs=1e-4)


def test_a_method_that_works_on_coarse_voxels_submits_on_the_files_own(small_cohort_json, tmp_path):
    coarse, fine = load_cohort(small_cohort_json, resolution_mm=2), load_cohort(small_cohort_json)
    field = random_displacement(coarse.shape)
    path = submission.write_submission(lambda fixed, moving: field, coarse, tmp_path / "s.zip", progress=False)
    read = dict(submission.read_submission(path, fine))
    assert len(read) == 6
    for displacement in read.values():
        assert torch.equal(displacement, spatial.to_finer_grid(field, 2))
    with zipfile.ZipFile(path) as archive:
        file = nib.Nifti1Image.from_bytes(gzip.decompress(archive.read("disp_0100_0101.nii.gz")))
    assert np.array_equal(file.affine, fine.affine)
    scored, direct = (
        table[~table["metric"].isin(["seconds", "ndv_working_percent"])].set_index(["pair", "metric"])["value"]
        for table in (
            submission.score_submission(path, fine, progress=False),
            evaluate_method(lambda fixed, moving: field, coarse, coarse.validation_pairs, progress=False),
        )
    )
    assert scored.equals(direct)


def test_landmarks_that_the_warping_loses_are_named_once(small_cohort_json, tmp_path):
    cohort = load_cohort(small_cohort_json)
    pairs = cohort.validation_pairs[:2]
    field = torch.zeros(1, 3, *cohort.shape)
    field[:, 2] = 100  # reads outside the image
    field[:, 2, :, :, :6] = 4  # reads k = 4 to 9: the second landmark, at k = 8, lands 4 mm off; the first is higher up
    path = submission.write_submission(lambda fixed, moving: field, cohort, tmp_path / "s.zip", pairs, progress=False)
    with pytest.warns(UserWarning, match="the warping loses") as told:
        table = submission.score_submission(path, cohort, pairs, progress=False)
    first, second = (pair.name for pair in pairs)
    assert len(told) == 1 and f"loses 2 landmark(s): first of {first}, first of {second}. The" in str(told[0].message)
    tre = table[table["metric"] == "tre_mm"]["value"]
    assert tre.tolist() == pytest.approx([4.0, 4.0])


def test_an_interrupted_submission_goes_on_and_leaves_no_half_zip(embedded_cohort, pairs, true_method, tmp_path):
    calls = []

    def dies(fixed, moving):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return true_method(fixed, moving)

    path = tmp_path / "s.zip"
    with pytest.raises(KeyboardInterrupt):
        submission.write_submission(dies, embedded_cohort, path, pairs, progress=False)
    assert not path.exists() and len(list(path.with_suffix(".parts").iterdir())) == 1
    submission.write_submission(dies, embedded_cohort, path, pairs, progress=False)
    assert len(calls) == 3 and path.is_file()


class Constant(torch.nn.Module):
    """Displaces everything alike."""

    def __init__(self, weight, scale=1.0):
        super().__init__()
        self.weight, self._scale = torch.nn.Parameter(torch.tensor(weight)), scale

    def forward(self, fixed, moving):
        return (self.weight * self._scale).expand(1, 3, *fixed.shape[2:])


def interrupt_second_pair(method, cohort, path, pairs):
    """Leave the part of one pair behind, as after Ctrl-C."""
    calls = []

    def stop(module, inputs):
        calls.append(module)
        if len(calls) == 2:
            raise KeyboardInterrupt

    hook = method.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        submission.write_submission(method, cohort, path, pairs, progress=False)
    hook.remove()


@pytest.mark.parametrize(
    ("first", "second", "taken_over"),
    [
        (Constant(1.0), Constant(1.0), 1),
        (Constant(1.0), Constant(2.0), 0),
        (Constant(1.0), Constant(1.0, scale=2.0), 0),
        (Constant(1.0), lambda fixed, moving: torch.full((1, 3, *fixed.shape[2:]), 2.0), 0),
    ],
    ids=["the same", "other weights", "another option", "another kind"],
)
def test_a_submission_holds_the_fields_of_one_method(
    embedded_cohort, pairs, tmp_path, capsys, first, second, taken_over
):
    path = tmp_path / "s.zip"
    interrupt_second_pair(first, embedded_cohort, path, pairs)
    calls = []
    if isinstance(second, torch.nn.Module):
        second.register_forward_hook(lambda module, inputs, output: calls.append(module))
    submission.write_submission(second, embedded_cohort, path, pairs, progress=False)
    told = "1 of the displacements there, disp_0024_0025.nii.gz for one, are another method's"
    assert (told in capsys.readouterr().err) == (not taken_over)
    assert not calls or len(calls) == len(pairs) - taken_over
    fields = [field for _, field in submission.read_submission(path, embedded_cohort, pairs)]
    assert all((field == (1 if taken_over else 2)).all() for field in fields)


def test_parts_of_other_images_or_of_another_program_are_made_anew(embedded_cohort, pairs, tmp_path, capsys):
    path = tmp_path / "s.zip"
    interrupt_second_pair(Constant(1.0), embedded_cohort, path, pairs)
    submission.write_submission(Constant(1.0), replace(embedded_cohort, digest="0" * 16), path, pairs, progress=False)
    assert "or of other images; they are made anew" in capsys.readouterr().err
    path.with_suffix(".parts").mkdir()
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4)), path.with_suffix(".parts") / FIRST)
    submission.write_submission(Constant(3.0), embedded_cohort, path, pairs, progress=False)
    assert all((field == 3).all() for _, field in submission.read_submission(path, embedded_cohort, pairs))


def test_a_method_that_fails_is_named(embedded_cohort, pairs, tmp_path):
    with pytest.raises(ValueError, match=r"got \(1, 3, 4, 4, 4\) for SIM_0024_SIM_0025"):
        submission.write_submission(
            lambda f, m: torch.zeros(1, 3, 4, 4, 4), embedded_cohort, tmp_path / "a.zip", pairs, progress=False
        )
    with pytest.raises(ValueError, match=r"path must end in \.zip, got a\.tar"):
        submission.write_submission(zero_displacement, embedded_cohort, tmp_path / "a.tar", pairs)


@pytest.mark.parametrize("obstacle", ["s.zip/", "s.parts", "folder"])
def test_a_zip_that_cannot_be_written_is_told_before_the_work(embedded_cohort, pairs, tmp_path, obstacle):
    path = tmp_path / ("folder/s.zip" if obstacle == "folder" else "s.zip")
    if obstacle.endswith("/"):
        path.mkdir()
    else:
        (tmp_path / obstacle).write_text("a file")
    with pytest.raises(OSError, match=r"cannot write: expected a (file, got a folder|folder, got a file)"):
        submission.write_submission(lambda fixed, moving: 1 / 0, embedded_cohort, path, pairs, progress=False)


# validating ----------------------------------------------------------------------------------------------------------


def packed(array, dtype=np.float32):
    return gzip.compress(nib.Nifti1Image(np.asarray(array).astype(dtype), np.eye(4)).to_bytes(), 1)


def repack(good, path, changes):
    """A zip as `good` with members replaced, added (bytes) or left out (None)."""
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w") as target:
        members = {name: source.read(name) for name in source.namelist()} | changes
        for name, content in members.items():
            if content is not None:
                target.writestr(name, content)
    return path


FIRST = "disp_0024_0025.nii.gz"


@pytest.fixture(scope="module")
def field(embedded_cohort, pairs):
    return embedded_cohort.true_displacement(pairs[0])


def findings(good, tmp_path, cohort, pairs, changes):
    path = repack(good, tmp_path / "changed.zip", changes)
    return submission.validate_submission(path, cohort, pairs, progress=False)


@pytest.mark.parametrize(
    ("kind", "words", "mistake"),
    [
        ("normalized", "grid_sample's normalized units", lambda u, c: for_grid_sample(u)[0]),
        ("normalized", "-1 to 1 across the volume", lambda u, c: for_grid_sample(u)[0].flip(-1)),
        ("transposed", "in the order k, j, i instead of i, j, k", lambda u, c: u[0].flip(0).movedim(0, -1)),
        ("transposed", "in the order j, k, i instead of i, j, k", lambda u, c: u[0][[1, 2, 0]].movedim(0, -1)),
        ("millimetres", "in mm along LPS axes", lambda u, c: field_formats.voxel_to_itk(u, c.affine)[:, :, :, 0]),
        ("millimetres", "in mm instead of voxels", lambda u, c: u[0].movedim(0, -1) * c.resolution_mm),
        ("direction", "points the other way", lambda u, c: -u[0].movedim(0, -1)),
    ],
)
def test_a_misread_field_is_named_by_its_effect(embedded_cohort, pairs, good, field, tmp_path, kind, words, mistake):
    found = findings(good, tmp_path, embedded_cohort, pairs, {FIRST: packed(mistake(field, embedded_cohort))})
    assert [(finding.file, finding.kind) for finding in found] == [(FIRST, kind)]
    assert words in found[0].message and found[0].fatal


@pytest.mark.parametrize(
    ("kind", "message", "make"),
    [
        ("shape", r"expected shape .* got \(4, 5, 6, 3\)", lambda u: packed(np.zeros((4, 5, 6, 3)))),
        ("transposed", "the axes are in another order", lambda u: packed(u[0].permute(3, 2, 1, 0))),
        ("dtype", "expected floating-point displacements, got int16", lambda u: packed(u[0].round(), np.int16)),
        (
            "not finite",
            "1 displacements are NaN or infinite",
            lambda u: packed(np.where(np.arange(u.numel()).reshape(u[0].shape) == 5, np.nan, u[0])),
        ),
        ("unreadable", "cannot be unpacked", lambda u: packed(u[0])[:2000]),
        ("unreadable", "cannot be unpacked", lambda u: b"not gzip"),
        ("unreadable", "cannot be read as NIfTI", lambda u: gzip.compress(b"not NIfTI")),
        ("unreadable", "unpacks to more than", lambda u: gzip.compress(bytes(40_000_000), 1)),
        ("worse than nothing", "every displacement is zero", lambda u: packed(u[0] * 0)),
        ("too large", "more than the volume's side", lambda u: packed(u[0] * 0 + 1e4)),
    ],
)
def test_a_broken_field_is_named(embedded_cohort, pairs, good, field, tmp_path, kind, message, make):
    found = findings(good, tmp_path, embedded_cohort, pairs, {FIRST: make(field)})
    assert found[0].kind == kind and found[0].file == FIRST
    assert re.search(message, found[0].message), found[0].message


def test_channels_first_and_double_precision_are_accepted(embedded_cohort, pairs, good, field, tmp_path):
    changes = {FIRST: packed(field[0], np.float64)}
    assert findings(good, tmp_path, embedded_cohort, pairs, changes) == []


def test_names_are_checked(embedded_cohort, pairs, good, tmp_path):
    changes = {
        FIRST: None,
        "disp_0025_0024.nii.gz": b"",
        "disp_0001_0002.nii.gz": b"",
        "field.nii.gz": b"",
        "out/": b"",
        "out/disp_0024_0026.nii.gz": b"",
    }
    found = {finding.file: finding for finding in findings(good, tmp_path, embedded_cohort, pairs, changes)}
    assert found[FIRST].kind == "missing"
    assert "fixed and moving exchanged" in found["disp_0025_0024.nii.gz"].message
    assert "not asked for" in found["disp_0001_0002.nii.gz"].message
    assert "is not named disp_<fixed>_<moving>.nii.gz" in found["field.nii.gz"].message
    assert (
        "is a folder" in found["out/"].message and "at the top of the zip" in found["out/disp_0024_0026.nii.gz"].message
    )


def test_a_missing_file_and_a_broken_zip_are_named_by_the_reader(embedded_cohort, pairs, good, tmp_path):
    without = repack(good, tmp_path / "without.zip", {FIRST: None})
    with pytest.raises(ValueError, match=rf"without.zip: {FIRST} is missing"):
        submission.score_submission(without, embedded_cohort, pairs, progress=False)
    (tmp_path / "torn.zip").write_bytes(good.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot read .*torn.zip as a zip"):
        submission.validate_submission(tmp_path / "torn.zip", embedded_cohort, pairs)
    with pytest.raises(FileNotFoundError, match="no such submission"):
        submission.validate_submission(tmp_path / "none.zip", embedded_cohort, pairs)


# the test phase ------------------------------------------------------------------------------------------------------


@pytest.fixture
def mounted(embedded_cohort, tmp_path):
    """The folders that the challenge's test phase mounts, with two pairs of simulated people: images alone.

    The JSON stands beside the folder of images, and names training scans that are not there.
    """
    root, people = tmp_path / "mounted", json.loads(embedded_cohort.path.read_text())
    pairs = []
    for pair in people["validation"][:2]:
        pairs.append({key: pair[key].replace("SIM_", "LUMIRMRI_") for key in ("fixed", "moving")})
        for key, name in pairs[-1].items():
            target = root / "input" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(embedded_cohort.path.parent / pair[key], target)
    content = {
        "name": "LUMIR",
        "tensorImageShape": people["tensorImageShape"],
        "training": [{"image": "./imagesTr/LUMIRMRI_0001_0000.nii.gz"}],
        "numTraining": 1,
        "validation": pairs,
        "numValidation": 2,
    }
    (root / "LUMIR_dataset.json").write_text(json.dumps(content))
    return root


def predict(mounted, *more):
    folders = ["--input", str(mounted / "input"), "--output", str(mounted / "output"), "--quiet"]
    return cli.main(["submission", "predict", *folders, *more])


def test_the_containers_command_writes_the_displacements_of_a_submission(mounted, embedded_cohort, capsys):
    assert predict(mounted, "--method", "deedsBCV", "--resolution", "4") == 0
    assert "2 displacements in" in capsys.readouterr().out
    names = sorted(path.name for path in (mounted / "output").iterdir())
    assert names == ["disp_0024_0025.nii.gz", "disp_0024_0026.nii.gz"]
    people = submission.load_test_pairs(mounted / "LUMIR_dataset.json", mounted / "input", 4)
    assert [pair.name for pair in people.submission_pairs] == [
        "LUMIRMRI_0024_LUMIRMRI_0025",
        "LUMIRMRI_0024_LUMIRMRI_0026",
    ]
    first = embedded_cohort.validation_pairs[0]
    array = nib.load(mounted / "output" / names[0]).get_fdata()
    assert array.shape == (*embedded_cohort.shape, 3)
    found = field_formats.channels_last_to_voxel(array)
    before, after = (
        evaluate_method(method, embedded_cohort, (first,), progress=False).set_index("metric")["value"]["dice"]
        for method in (zero_displacement, lambda fixed, moving: found)
    )
    assert after > before + 0.03


def test_the_dockerfile_calls_it_with_weights_that_the_package_has(mounted):
    text = (project_root() / "Dockerfile").read_text()
    entry, default = (json.loads(re.search(rf"^{word} (.*)$", text, re.M)[1]) for word in ("ENTRYPOINT", "CMD"))
    assert entry[0] == "lumirlib" and entry[entry.index("--input") + 1] == "/input"
    folders = {"/input": str(mounted / "input"), "/output": str(mounted / "output")}
    called = [*entry[1:], *default, "--resolution", "4"]  # the files are of 4 mm
    assert cli.main([folders.get(word, word) for word in called]) == 0
    assert len(list((mounted / "output").glob("disp_*.nii.gz"))) == 2
    copied = re.findall(r"^COPY (.*) \S+$", text, re.M)
    assert all((project_root() / name).exists() for line in copied for name in line.split())
    kept = (project_root() / ".dockerignore").read_text().split()
    assert {name for line in copied for name in line.split()} == {name[1:] for name in kept if name.startswith("!")}


def test_what_is_not_mounted_as_it_should_be_is_named(mounted, capsys):
    chosen = ["--method", "affine", "--resolution", "4"]
    json_path = mounted / "LUMIR_dataset.json"
    (mounted / "other_dataset.json").write_text("{}")
    assert predict(mounted, *chosen) == 2
    assert "several dataset JSONs: LUMIR_dataset.json, other_dataset.json; name one" in capsys.readouterr().err
    assert predict(mounted, *chosen, "--json", str(mounted / "other_dataset.json")) == 2
    assert "other_dataset.json: expected pairs of fixed and moving under validation or test" in capsys.readouterr().err
    (mounted / "other_dataset.json").unlink()
    content = json.loads(json_path.read_text())
    json_path.unlink()
    assert predict(mounted, *chosen) == 2
    assert "or beside it, expected LUMIR_dataset.json" in capsys.readouterr().err
    inside = mounted / "input" / "LUMIR_dataset.json"  # in the folder itself, and as the list of the test people
    inside.write_text(json.dumps({**content, "validation": [], "test": content["validation"]}))
    assert predict(mounted, *chosen) == 0
    next((mounted / "input" / "imagesVal").glob("*0026_0000.nii.gz")).unlink()
    assert predict(mounted, *chosen) == 2
    assert "LUMIRMRI_0026_0000.nii.gz" in capsys.readouterr().err
    shutil.rmtree(mounted / "input")
    assert predict(mounted, *chosen) == 2
    assert "no such folder of images" in capsys.readouterr().err
