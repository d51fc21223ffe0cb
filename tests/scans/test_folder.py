"""A folder of scans made into a cohort."""

import json
import shutil

import numpy as np
import pytest
import torch

from lumirlib import cli, load_cohort
from lumirlib.data.frame import frame_affine, template_in_frame
from lumirlib.data.nifti import read_volume, write_nifti
from lumirlib.scans.folder import prepare_folder
from lumirlib.scans.prepare import STEPS
from lumirlib.scans.scan import as_scanned


def small_brain():
    """The template as a scan of 4 mm voxels, (image, affine), a brain of the true size in few voxels."""
    return template_in_frame(4) * 900, frame_affine(4)


@pytest.fixture
def folder(tmp_path):
    """Three brains that are prepared but for their grid, two of one file name, and a torn file."""
    image, affine = small_brain()
    for number, place in enumerate(("one/t1", "two/t1", "third_0000")):
        array, seen, _ = as_scanned(image * (1 + number), affine, orientation="LIA", spacing_mm=(4, 5, 4))
        write_nifti(tmp_path / "scans" / f"{place}.nii.gz", array, seen)
    (tmp_path / "scans" / "torn.nii.gz").write_bytes((tmp_path / "scans" / "third_0000.nii.gz").read_bytes()[:5000])
    return tmp_path / "scans"


def test_folder_becomes_a_cohort_goes_on_where_it_stopped_and_names_what_it_left_out(folder, tmp_path, capsys):
    arguments = [
        str(folder),
        "--out",
        str(tmp_path / "cohort"),
        "--skip",
        *STEPS,
        "--jobs",
        "2",
        "--quiet",
        "--validation",
        "2",
    ]
    assert cli.main(["prepare", *arguments]) == 1
    assert "left out: torn: ValueError" in capsys.readouterr().err
    cohort = load_cohort(tmp_path / "cohort" / "dataset.json", 4)
    assert [subject.name for subject in cohort.train] == ["one-t1"]
    assert {pair.name for pair in cohort.validation_pairs} == {"two-t1_third", "third_two-t1"}
    apart = (cohort.image(cohort.train[0]) - template_in_frame(4)).abs().mean()
    assert cohort.shape == (40, 56, 48) and apart < 0.04
    content = json.loads((tmp_path / "cohort" / "dataset.json").read_text())
    assert list(content["left_out"]) == ["torn"]
    assert {"qc_1.png", "qc_1.pdf", "qc.csv"} <= {path.name for path in (tmp_path / "cohort").iterdir()}

    images = sorted((tmp_path / "cohort" / "imagesTr").iterdir())
    before = [path.stat().st_mtime_ns for path in images]
    write_nifti(folder / "two" / "t1.nii.gz", *read_volume(folder / "one" / "t1.nii.gz"))  # other bytes, same name
    (folder / "torn.nii.gz").unlink()
    arguments[arguments.index("--jobs") + 1] = "1"
    assert cli.main(["prepare", *arguments]) == 0
    after = [path.stat().st_mtime_ns for path in images]
    assert [path.name for path, a, b in zip(images, before, after, strict=True) if a != b] == ["two-t1_0000.nii.gz"]


def test_folder_without_scans_and_numbers_that_do_not_fit_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        prepare_folder(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ValueError, match="validation must be 0, or from 2 to the number of people, 4; got 1"):
        prepare_folder(folder, tmp_path / "out", STEPS, validation=1)
    with pytest.raises(ValueError, match="jobs must be a whole number from 1, got 0"):
        prepare_folder(folder, tmp_path / "out", STEPS, jobs=0)


def write_people(folder, names):
    """The template for each name, a little brighter from one to the next."""
    template, affine = small_brain()
    for number, name in enumerate(names):
        write_nifti(folder / f"{name}.nii.gz", ((1 + number / 10) * template)[0, 0].numpy(), affine)


@pytest.fixture
def no_pages(monkeypatch):
    """Without the QC sheet, which takes most of the time of so few scans."""
    monkeypatch.setattr("lumirlib.scans.qc.prepared_figures", lambda scans, out, title: [])


@pytest.fixture
def visits(tmp_path):
    """Folder of three people, one of them scanned twice, a probability map and a mask."""
    folder = tmp_path / "visits"
    write_people(
        folder,
        ["sub-01/sub-01_T1w", "sub-02/ses-1/sub-02_ses-1_T1w", "sub-02/ses-2/sub-02_ses-2_T1w", "sub-03/sub-03_T1w"],
    )
    image, affine = small_brain()
    map_ = ((image / 900 - 0.4) * 3).clip(0, 1) * (image < 0.78 * 900)
    write_nifti(folder / "sub-04" / "sub-04_T1w.nii.gz", map_[0, 0].numpy(), affine)
    write_nifti(folder / "sub-04" / "sub-04_mask.nii.gz", (image > 0)[0, 0].numpy().astype(np.uint8), affine)
    return folder


def call_prepare(folder, out, *more):
    return cli.main(["prepare", str(folder), "--out", str(out), "--skip", *STEPS, "--quiet", *more])


def test_a_map_is_left_out_and_named_and_people_are_on_one_side_of_the_split(visits, tmp_path, capsys, no_pages):
    out = tmp_path / "cohort"
    assert call_prepare(visits, out, "--validation", "2") == 3
    told = capsys.readouterr().err
    assert "left out: sub-04_T1w: hardly a T1 brain; it correlates" in told
    assert "skipped: sub-04/sub-04_mask.nii.gz: a mask, a map or a transform by its name" in told
    content = json.loads((out / "dataset.json").read_text())
    assert list(content["implausible"]) == ["sub-04_T1w"] and content["left_out"] == {}
    assert list(content["skipped_files"]) == ["sub-04/sub-04_mask.nii.gz"]
    cohort = load_cohort(out / "dataset.json", 4)
    assert [subject.name for subject in cohort.train] == ["sub-01_T1w"]
    visits_of_2 = ("sub-02_ses-1_T1w", "sub-02_ses-2_T1w")
    expected = {("sub-03_T1w", visit) for visit in visits_of_2} | {(visit, "sub-03_T1w") for visit in visits_of_2}
    assert {(pair.fixed.name, pair.moving.name) for pair in cohort.validation_pairs} == expected
    assert (out / "qc.csv").read_text().count("sub-0") > 4

    assert call_prepare(visits, out, "--validation", "2", "--keep-implausible") == 0
    assert "kept: sub-04_T1w: hardly a T1 brain" in capsys.readouterr().err
    people = {subject.name[:6] for subject in load_cohort(out / "dataset.json", 4).train}
    assert people == {"sub-01", "sub-02"}  # the last two by name are held out, of which the map is one


def test_a_cohort_of_another_folder_is_not_overwritten(tmp_path, capsys, no_pages):
    out = tmp_path / "cohort"
    write_people(tmp_path / "A", ["sub-01", "sub-02"])
    write_people(tmp_path / "B", ["sub-00", "sub-01"])
    assert call_prepare(tmp_path / "A", out) == 0
    before = (out / "dataset.json").read_bytes()
    assert call_prepare(tmp_path / "B", out) == 2
    told = capsys.readouterr().err
    assert "prepared from another folder" in told and "sub-01, sub-02" in told and "Choose another --out" in told
    assert (out / "dataset.json").read_bytes() == before
    assert str(tmp_path) not in (out / "source.json").read_text()

    shutil.move(tmp_path / "A", tmp_path / "C")  # the same scans in another place, one of them new
    write_people(tmp_path / "C", ["sub-03"])
    stamps = {path: path.stat().st_mtime_ns for path in (out / "imagesTr").iterdir()}
    assert call_prepare(tmp_path / "C", out) == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert len(list((out / "imagesTr").iterdir())) == 3


@pytest.mark.parametrize("there", ["a file", "dataset.json", "imagesTr/sub-01_0000.nii.gz"])
def test_a_place_that_cannot_be_written_or_has_other_files_is_told_before_the_work(tmp_path, capsys, there):
    write_people(tmp_path / "A", ["sub-01"])
    out = tmp_path / "out"
    (out if there == "a file" else out / there).parent.mkdir(parents=True, exist_ok=True)
    (out if there == "a file" else out / there).write_text("kept")
    assert call_prepare(tmp_path / "A", out) == 2
    told = capsys.readouterr().err
    assert "cannot write: expected a folder, got a file" in told or "that lumirlib did not prepare" in told
    assert (out if there == "a file" else out / there).read_text() == "kept"


def test_an_image_that_was_changed_since_is_prepared_anew(tmp_path, no_pages):
    write_people(tmp_path / "A", ["sub-01"])
    prepare_folder(tmp_path / "A", tmp_path / "out", STEPS, progress=False)
    image = tmp_path / "out" / "imagesTr" / "sub-01_0000.nii.gz"
    whole = image.read_bytes()
    image.write_bytes(whole[:1000])
    prepare_folder(tmp_path / "A", tmp_path / "out", STEPS, progress=False)
    assert len(image.read_bytes()) == len(whole)


def test_what_was_told_of_a_scan_stands_in_its_record(tmp_path, capsys, no_pages):
    image, affine = small_brain()
    signed = torch.where(image > 0, image - 400, 0.0)
    write_nifti(tmp_path / "A" / "sub-01.nii.gz", signed[0, 0].numpy(), affine)
    assert call_prepare(tmp_path / "A", tmp_path / "out") == 0
    assert "remark: sub-01.nii.gz: values in the brain go from -" in capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "prepared" / "sub-01.json").read_text())
    assert len(record["remarks"]) == 1 and str(tmp_path) not in json.dumps(record)


def test_none_left_is_told_with_the_reasons(tmp_path):
    image, affine = small_brain()
    write_nifti(tmp_path / "A" / "sub-01.nii.gz", (image > 0)[0, 0].numpy().astype(np.uint8), affine)
    with pytest.raises(ValueError, match=r"none of the 1 scans in .* is left for a cohort:\n  sub-01: .*as a mask has"):
        prepare_folder(tmp_path / "A", tmp_path / "out", STEPS, progress=False)
