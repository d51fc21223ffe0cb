"""Two scans registered in the fixed scan's own space."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from lumirlib import cli, metrics, spatial
from lumirlib.data.frame import frame_affine, template_in_frame
from lumirlib.data.nifti import read_label_volume, read_nifti, read_volume, write_nifti
from lumirlib.methods.presets import PRESETS
from lumirlib.methods.variants import parse_variant
from lumirlib.metrics.labels import LUMIR_LABELS
from lumirlib.scans import folder, maps, register
from lumirlib.scans.prepare import STEPS, prepare_scan
from lumirlib.scans.scan import as_scanned, read_scan, transform, world_slabs
from lumirlib.training.checkpoints import save_checkpoint
from lumirlib.training.config import RunConfig
from lumirlib.training.registrar import choose_registrar

TO_FIXED = np.array([[1.05, 0.1, 0.0, 4], [-0.1, 0.95, 0.05, -3], [0.0, -0.05, 1.1, 2], [0, 0, 0, 1.0]])
TO_MOVING = np.array([[0.9, -0.2, 0.1, -6], [0.2, 1.0, 0.0, 5], [-0.1, 0.0, 1.05, 1], [0, 0, 0, 1.0]])


def noise_scan(path, affine, shape=(12, 14, 10), seed=0):
    write_nifti(path, np.random.default_rng(seed).random(shape, np.float32) * 100, affine)
    return read_scan(path)


def wavy(shape=(40, 56, 48), size=1.5):
    generator = torch.Generator().manual_seed(1)
    return spatial.resize(torch.randn(1, 3, 4, 5, 6, generator=generator) * size, shape)


def written(whole, fixed, moving, folder):
    """Files of a map between two scans, displacements among them."""
    names = {kind: folder / name for kind, name in (register.FILES | register.DISPLACEMENTS).items()}
    determinant = metrics.jacobian_determinant(whole.displacement_1mm())
    register.write_both(whole, fixed, moving, names, determinant)
    return names


def some_points(count=50):
    generator = torch.Generator().manual_seed(2)
    return (torch.rand(1, 3, count, 1, 1, generator=generator, dtype=torch.float64) - 0.5) * 100


def test_without_displacement_the_map_is_the_two_affines():
    whole = maps.ScanMap(np.linalg.inv(TO_FIXED), torch.zeros(1, 3, 40, 56, 48), 4, TO_MOVING)
    points = some_points()
    expected = transform(TO_MOVING @ np.linalg.inv(TO_FIXED), points)
    torch.testing.assert_close(whole(points), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("resolution", [2, 4])
def test_displacement_in_voxels_of_its_grid_stands_between_the_affines_in_mm(resolution):
    shape = tuple(side // resolution for side in (160, 224, 192))
    voxels = torch.tensor([1.5, -2.0, 0.25]).view(1, 3, 1, 1, 1).expand(1, 3, *shape).contiguous()
    whole = maps.ScanMap(np.linalg.inv(TO_FIXED), voxels, resolution, TO_MOVING)
    points = some_points() * 3  # some lie outside the frame: there the border's displacement goes on
    moved = transform(np.linalg.inv(TO_FIXED), points) + voxels[:, :, :1, :1, :1].double() * resolution
    torch.testing.assert_close(whole(points), transform(TO_MOVING, moved), atol=1e-4, rtol=0)


def test_displacement_is_the_grids_own_at_its_voxels():
    field = wavy()
    whole = maps.ScanMap(np.eye(4), field, 4, np.eye(4))
    points = transform(frame_affine(4), spatial.identity_grid(field.shape[2:]))
    expected = points + field.double() * 4  # its axes are the world's
    torch.testing.assert_close(whole(points), expected, atol=1e-3, rtol=0)


def test_moving_image_is_interpolated_once(tmp_path):
    """Noise that is shifted by whole voxels keeps its values; through the frame, half a voxel off, it would not."""
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    fixed = noise_scan(tmp_path / "fixed.nii", affine)
    moving = noise_scan(tmp_path / "moving.nii", affine, seed=1)
    shift = torch.tensor([0.5, -0.25, 0.25]).view(1, 3, 1, 1, 1).expand(1, 3, 40, 56, 48).contiguous()  # 2, -1, 1 mm
    found = written(maps.ScanMap(np.eye(4), shift, 4, np.eye(4)), fixed, moving, tmp_path)
    warped = read_scan(found["warped"]).values
    displacement = torch.from_numpy(np.moveaxis(read_nifti(found["displacement"])[0], -1, 0))[None]
    torch.testing.assert_close(warped[:, :, :-2, 1:, :-1], moving.values[:, :, 2:, :-1, 1:], atol=2e-3, rtol=0)
    assert warped[:, :, -2:].abs().max() < 2e-3
    expected = torch.tensor([2.0, -1, 1]).view(1, 3, 1, 1, 1).expand_as(displacement)
    torch.testing.assert_close(displacement, expected, atol=1e-4, rtol=0)


def test_outside_a_signed_moving_scan_lies_its_background_and_not_zero(tmp_path):
    fixed = noise_scan(tmp_path / "fixed.nii", np.eye(4))
    values = np.full((12, 14, 10), -2.5, np.float32)
    values[4:8, 5:9, 3:7] = np.linspace(-1, 3, 64).reshape(4, 4, 4)
    write_nifti(tmp_path / "moving.nii", values, np.eye(4))
    shift = torch.tensor([1.5, 0.0, 0.0]).view(1, 3, 1, 1, 1).expand(1, 3, 40, 56, 48).contiguous()  # 6 mm along x
    whole = maps.ScanMap(np.eye(4), shift, 4, np.eye(4))
    warped = read_scan(written(whole, fixed, read_scan(tmp_path / "moving.nii"), tmp_path)["warped"]).values
    expected = np.full_like(values, -2.5)
    expected[:6] = values[6:]
    np.testing.assert_allclose(warped[0, 0].numpy(), expected, atol=1e-4)


def test_files_carry_the_fixed_scans_space_and_itk_reads_the_same_map(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    empty = torch.zeros(1, 1, 12, 13, 14)
    scans = []
    for name, turn, codes in (("fixed", (10, -20, 15), "LIA"), ("moving", (-5, 8, -12), "PSR")):
        array, affine, _ = as_scanned(empty, np.diag([2.0, 2, 2, 1]), turn, (5, -4, 3), codes, (1.8, 2.4, 2.0))
        scans.append(noise_scan(tmp_path / f"{name}.nii.gz", affine, array.shape, seed=len(scans)))
    whole = maps.ScanMap(np.eye(4), wavy(size=0.4), 4, np.eye(4))
    files = written(whole, *scans, tmp_path)
    warped, affine = read_volume(files["warped"])
    np.testing.assert_allclose(affine, scans[0].affine, atol=1e-5)

    image = sitk.ReadImage(str(files["transform"]), sitk.sitkVectorFloat64)
    assert image.GetNumberOfComponentsPerPixel() == 3
    by_itk = sitk.Resample(
        sitk.ReadImage(str(scans[1].path), sitk.sitkFloat32),
        sitk.ReadImage(str(scans[0].path), sitk.sitkFloat32),
        sitk.DisplacementFieldTransform(image),
        sitk.sitkLinear,
        0.0,
    )
    theirs = sitk.GetArrayFromImage(by_itk).T

    array, affine = read_nifti(files["displacement"])
    assert array.shape == (*scans[0].shape, 3)
    displacement = torch.from_numpy(np.moveaxis(array, -1, 0).copy())[None]
    grid = spatial.identity_grid(scans[0].shape)
    places = transform(np.linalg.inv(scans[1].affine) @ affine, grid + displacement)
    last = torch.tensor(scans[1].shape).view(1, 3, 1, 1, 1) - 1
    inside = ((places > 0) & (places < last)).all(1)[0].numpy()
    assert inside.mean() > 0.2
    # of 100; headers are float32, displacements are rounded to 1/1024
    np.testing.assert_allclose(theirs[inside], warped[inside], atol=0.2)
    sampled = spatial.sample(scans[1].values, places)[0, 0].numpy()  # fades to zero beyond the border, as ITK does not
    np.testing.assert_allclose(sampled[inside], warped[inside], atol=0.2)


@pytest.mark.parametrize("shear", [(0.15, -0.1), (0.0, 2e-4), (0.0, 0.0)])
def test_itk_reads_the_transform_of_a_scan_whose_axes_are_not_at_right_angles(tmp_path, shear):
    sitk = pytest.importorskip("SimpleITK")
    sheared = np.eye(4)
    sheared[0, 1], sheared[1, 2] = shear
    affine = sheared @ as_scanned(torch.zeros(1, 1, 9, 9, 9), np.diag([2.0, 2, 2, 1]), (10, -20, 15), (5, -4, 3))[1]
    fixed = noise_scan(tmp_path / "fixed.nii.gz", affine, (12, 13, 14))
    moving = noise_scan(tmp_path / "moving.nii.gz", np.eye(4), seed=1)
    whole = maps.ScanMap(TO_FIXED, wavy(size=0.4), 4, TO_MOVING)
    files = written(whole, fixed, moving, tmp_path)
    field = sitk.DisplacementFieldTransform(sitk.ReadImage(str(files["transform"]), sitk.sitkVectorFloat64))
    to_lps = np.array([-1, -1, 1])
    for planes, points in world_slabs(fixed.shape, fixed.affine):
        assert planes.start == 0  # all at once
        places = whole(points).reshape(3, -1).T.numpy()
        points = points.reshape(3, -1).T.numpy()
    inside = np.random.default_rng(0).choice(len(points), 100, replace=False)
    # where the grid is another one, it is interpolated between its voxels
    found = np.array([field.TransformPoint((points[at] * to_lps).tolist()) for at in inside]) * to_lps
    np.testing.assert_allclose(found, places[inside], atol=0.02)
    np.testing.assert_allclose(read_volume(files["warped"])[1], fixed.affine, atol=1e-5)


def test_a_grid_of_right_angles_covers_a_sheared_one():
    sheared = np.array([[2.0, 0.6, 0, 5], [0, 3.0, -0.4, -7], [0, 0, 1.5, 2], [0, 0, 0, 1]])
    shape, affine = register.orthogonal_grid((5, 6, 7), sheared)
    assert maps.is_orthogonal(affine) and not maps.is_orthogonal(sheared)
    corners = np.array(np.meshgrid(*[(0, side - 1) for side in (5, 6, 7)])).reshape(3, -1)
    there = np.linalg.inv(affine) @ sheared @ np.vstack([corners, np.ones(8)])
    assert there[:3].min() > -1e-6 and (there[:3].max(1) <= np.array(shape) - 1 + 1e-6).all()
    assert register.orthogonal_grid((5, 6, 7), affine)[0] == (5, 6, 7)


def test_jacobian_determinant_of_known_maps():
    grid = spatial.identity_grid((5, 6, 7))
    matrix = torch.tensor([[1.2, 0.1, 0.0], [0.0, 0.9, 0.2], [0.1, 0.0, 1.1]])
    linear = torch.einsum("ab,nbdhw->nadhw", matrix, grid) - grid
    torch.testing.assert_close(
        metrics.jacobian_determinant(linear), torch.linalg.det(matrix).expand(1, 1, 5, 6, 7), atol=1e-5, rtol=0
    )
    mirrored = torch.zeros(1, 3, 5, 6, 7)
    mirrored[:, 1] = -2 * grid[:, 1]
    assert (metrics.jacobian_determinant(mirrored) == -1).all()
    assert (metrics.jacobian_determinant(torch.zeros(1, 3, 5, 6, 7)) == 1).all()
    with pytest.raises(ValueError, match=r"displacement must be \(B, 3, D, H, W\)"):
        metrics.jacobian_determinant(torch.zeros(1, 5, 6, 7, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"give one of weights, run, method and pretrained; train a network first, \"lumirlib run"),
        ({"run": "a", "method": "affine"}, "give one of weights, run, method and pretrained"),
        ({"method": "backbone"}, "backbone is a network, which needs weights.*Not trained are: affine, deedsBCV"),
        ({"method": "nothing"}, "unknown variant 'nothing'.*nor a method"),
        ({"method": "affine", "resolution_mm": 3}, r"resolution_mm must be one of \(1, 2, 4\), got 3"),
    ],
)
def test_choice_of_what_registers_is_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_registrar(**arguments)


def test_run_that_is_not_there_is_named_with_those_that_are(tmp_path):
    (tmp_path / "checkpoints" / "LK_1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "LK_1" / "best.pt").touch()
    with pytest.raises(FileNotFoundError, match=r"no trained run 'LK_2' in .*, which has LK_1; train a network first"):
        choose_registrar(run="LK_2", results=tmp_path)


def test_network_of_a_checkpoint_registers_two_scans_from_the_command_line(tmp_path, capsys):
    preset = PRESETS["smoke"]
    config = RunConfig(preset.apply(parse_variant("backbone")), preset, "embedded", "0" * 16, 0)
    torch.manual_seed(0)
    model = config.row.build()
    save_checkpoint(tmp_path / "run" / "best.pt", {"config": config.as_dict(), "model": model.state_dict()})
    template = template_in_frame(4)
    for name, turn in (("fixed", 0), ("moving", 3)):
        array, affine, _ = as_scanned(template, frame_affine(4), (turn, 0, 0), spacing_mm=(4, 5, 4))
        write_nifti(tmp_path / f"{name}.nii.gz", array, affine)
    paths = [str(tmp_path / f"{name}.nii.gz") for name in ("fixed", "moving")]
    arguments = [*paths, "--out", str(tmp_path / "out"), "--weights", str(tmp_path / "run" / "best.pt"), "--quiet"]
    assert cli.main(["register", *arguments, "--skip", *STEPS]) == 0
    assert "ncc_affine" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "warped.nii.gz",
        "warped_fixed.nii.gz",
        "transform.nii.gz",
        "inverse_transform.nii.gz",
        "jacobian.nii.gz",
        "qc.png",
        "qc.pdf",
        "registration.json",
    }
    report = json.loads((tmp_path / "out" / "registration.json").read_text())
    assert (report["run"], report["resolution_mm"], report["fixed"]["file"]) == ("run", 4, "fixed.nii.gz")
    assert report["remarks"] == [] and report["seconds"]["bias_fixed"] == 0 and report["measures"]["ncc_affine"] > 0.5

    scans = [prepare_scan(path, STEPS) for path in paths]
    images = [torch.nn.functional.avg_pool3d(scan.in_frame, 4) / 255 for scan in scans]
    with torch.no_grad():
        field = model.eval()(*images)
    whole = maps.ScanMap(np.eye(4), field, 4, np.eye(4))
    warped = read_volume(written(whole, scans[0].scan, scans[1].scan, tmp_path)["warped"])[0]
    found, affine = read_volume(tmp_path / "out" / "warped.nii.gz")
    np.testing.assert_allclose(found, warped, atol=1e-3)
    np.testing.assert_allclose(affine, scans[0].scan.affine, atol=1e-4)
    assert cli.main(["register", paths[0], str(tmp_path / "no.nii.gz"), "--out", "x", "--method", "affine"]) == 2
    assert "no such NIfTI file" in capsys.readouterr().err


@pytest.fixture
def no_pages(monkeypatch):
    """Without the QC page, which takes most of the time of so small scans."""
    monkeypatch.setattr("lumirlib.plots.save_figure", lambda figure, path, data: None)


def test_scans_in_microns_and_in_mm_register_to_each_other(tmp_path, no_pages):
    template = template_in_frame(4)[0, 0].numpy()
    write_nifti(tmp_path / "mm.nii.gz", template, frame_affine(4))
    image = nib.Nifti1Image(template, np.diag([1e3, 1e3, 1e3, 1]) @ frame_affine(4))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "micron.nii.gz")
    found = register.register(
        tmp_path / "mm.nii.gz",
        tmp_path / "micron.nii.gz",
        tmp_path / "out",
        method="affine",
        resolution_mm=4,
        skip=STEPS,
        progress=False,
    )
    assert found.measures["ncc"] == pytest.approx(1, abs=1e-4)
    assert found.remarks == ["both scans have the same voxels in the same place: are they one file?"]


def test_what_is_hardly_a_t1_brain_is_told_and_reported(tmp_path, no_pages, capsys):
    template = template_in_frame(4)[0, 0].numpy()
    write_nifti(tmp_path / "brain.nii.gz", template, frame_affine(4))
    map_ = ((template - 0.4) * 3).clip(0, 1) * (template < 0.78)
    write_nifti(tmp_path / "map.nii.gz", map_, frame_affine(4))
    paths = [str(tmp_path / f"{name}.nii.gz") for name in ("brain", "map")]
    arguments = ["--out", str(tmp_path / "out"), "--method", "affine", "--resolution", "4", "--quiet"]
    assert cli.main(["register", *paths, *arguments, "--skip", *STEPS]) == 0
    told = capsys.readouterr().err
    assert "remark: map.nii.gz: hardly a T1 brain; it correlates" in told and "remark: brain" not in told
    report = json.loads((tmp_path / "out" / "registration.json").read_text())
    assert report["remarks"][0].startswith("map.nii.gz: hardly a T1 brain")
    assert report["moving"]["template_correlation"] < 0.45 < report["fixed"]["template_correlation"]


def test_what_is_wrong_with_the_moving_file_is_told_before_the_work_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(register, "prepare_scan", lambda *arguments: pytest.fail("it began to work"))
    noise_scan(tmp_path / "fixed.nii.gz", np.eye(4))
    values = np.random.default_rng(1).random((12, 14, 10), np.float32)
    broken = values.copy()
    broken[3, 4, 5] = np.nan
    for moving, affine, message in (
        (np.zeros_like(values), np.eye(4), "expected an image, got the constant 0"),
        (broken, np.eye(4), "expected finite voxels, got 1 NaN or infinite of 1680"),
        (np.stack([values] * 3, -1), np.eye(4), "expected a 3-D volume, got shape (12, 14, 10, 3)"),
        (values[:4], np.eye(4), "expected at least 8 voxels along each axis, got shape (4, 14, 10)"),
        (values, np.diag([1e3, 1e3, 1e3, 1]), "expected voxels of 0.01 to 100 mm, got 1000 x 1000 x 1000 mm"),
        (values + 1, np.eye(4), "expected a stripped brain on zero background, as step 'strip' is skipped"),
    ):
        write_nifti(tmp_path / "moving.nii.gz", moving, affine)
        paths = [str(tmp_path / f"{name}.nii.gz") for name in ("fixed", "moving")]
        arguments = ["--out", str(tmp_path / "out" / "deep"), "--method", "affine", "--skip-moving", "strip"]
        assert cli.main(["register", *paths, *arguments]) == 2
        assert f"{paths[1]}: {message}" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_ctrl_c_before_the_first_result_leaves_no_folder(tmp_path, monkeypatch):
    def interrupted(*arguments, **more):
        raise KeyboardInterrupt

    values = np.random.default_rng(0).random((12, 14, 10), np.float32)
    values[:4] = 0
    scan = write_nifti(tmp_path / "scans" / "fixed.nii.gz", values, np.eye(4))
    moving = write_nifti(tmp_path / "scans" / "moving.nii.gz", values * 2, np.eye(4))
    monkeypatch.setattr(register, "prepare_scan", interrupted)
    monkeypatch.setattr(folder, "prepare_scan", interrupted)
    arguments = ["--out", str(tmp_path / "out" / "deep"), "--quiet", "--skip", "strip"]
    assert cli.main(["register", str(scan), str(moving), "--method", "affine", *arguments]) == 130
    assert cli.main(["prepare", str(scan.parent), *arguments]) == 130
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("obstacle", ["out", "out/warped.nii.gz/", "out/registration.json/"])
def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch, capsys, obstacle):
    monkeypatch.setattr(register, "prepare_scan", lambda *arguments: pytest.fail("it began to work"))
    for name in ("fixed", "moving"):
        noise_scan(tmp_path / f"{name}.nii.gz", np.eye(4))
    if obstacle.endswith("/"):
        (tmp_path / obstacle).mkdir(parents=True)
    else:
        (tmp_path / obstacle).write_text("a file")
    paths = [str(tmp_path / f"{name}.nii.gz") for name in ("fixed", "moving")]
    assert cli.main(["register", *paths, "--out", str(tmp_path / "out"), "--method", "affine"]) == 2
    assert "cannot write: expected a f" in capsys.readouterr().err


@pytest.mark.data
@pytest.mark.skipif("LUMIR_BRAINS" not in os.environ, reason="needs the real brains, in the folder named LUMIR_BRAINS")
def test_real_scan_that_is_turned_and_on_another_grid_registers_as_well_as_the_original(tmp_path):
    pytest.importorskip("SimpleITK")
    root = Path(os.environ["LUMIR_BRAINS"])
    names = [f"BRAIN_{number}_0000.nii.gz" for number in (1000, 1007)]
    labels = [
        torch.from_numpy(np.ascontiguousarray(read_label_volume(root / "labelsVal" / name)[0]))[None, None]
        for name in names
    ]
    originals = [read_scan(root / "imagesVal" / name) for name in names]
    grid = originals[0].affine
    registrar = choose_registrar(method="deedsBCV", resolution_mm=4)
    turned, poses = [], []
    for scan, turn, shift in zip(originals, ((9, -12, 14), (-13, 8, 10)), ((15, -9, 12), (-14, 20, 6)), strict=True):
        array, affine, pose = as_scanned(scan.values, scan.affine, turn, shift, "LIA", (0.9, 1.2, 1.0))
        write_nifti(tmp_path / scan.path.name, np.rint(array).astype(np.int16), affine)
        turned.append(tmp_path / scan.path.name)
        poses.append(pose)

    def dice(paths, skip, poses):
        scans = [prepare_scan(path, skip) for path in paths]
        field = registrar.displacement(*(scan.in_frame for scan in scans), "cpu")
        whole = maps.ScanMap(np.linalg.inv(scans[0].to_scan), field, 4, scans[1].to_scan)
        warped = torch.zeros_like(labels[0])
        to_moving = np.linalg.inv(poses[1] @ grid)
        for planes, points in world_slabs(labels[0].shape[2:], grid):
            places = whole(transform(poses[0], points))
            warped[:, :, planes] = spatial.sample_nearest(labels[1], transform(to_moving, places))
        return metrics.dice(warped, labels[0], labels[1], LUMIR_LABELS)

    as_they_are = dice([scan.path for scan in originals], STEPS, [np.eye(4)] * 2)
    from_scanner = dice(turned, ["strip"], poses)
    assert as_they_are > 0.55 and from_scanner > as_they_are - 0.01


def test_registering_scans_loads_nothing_of_the_study():
    code = """import sys, lumirlib.scans.folder, lumirlib.scans.prepare, lumirlib.scans.qc, lumirlib.scans.register
print(*(name for name in sys.modules if name.startswith('lumirlib.study')))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
