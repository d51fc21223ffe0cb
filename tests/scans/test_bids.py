"""Datasets of BIDS: their scans prepared and registered, judged by BIDS's own validator."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lumirlib import cli, load_cohort
from lumirlib.data.frame import frame_affine, template_in_frame
from lumirlib.data.nifti import read_grid, write_nifti
from lumirlib.scans.bids import BidsName
from lumirlib.scans.find import find_t1w
from lumirlib.scans.prepare import STEPS
from lumirlib.scans.scan import as_scanned

SCANS = ("sub-01/anat/sub-01_T1w.nii.gz", "sub-02/ses-a/anat/sub-02_ses-a_acq-fast_run-1_T1w.nii.gz")
SCANS += ("sub-02/ses-b/anat/sub-02_ses-b_T1w.nii",)


@pytest.fixture
def no_pages(monkeypatch):
    monkeypatch.setattr("lumirlib.plots.save_figure", lambda figure, path, data=True: None)
    monkeypatch.setattr("lumirlib.scans.qc.prepared_figures", lambda scans, out, title: [])


@pytest.fixture
def raw(tmp_path):
    """A raw dataset of two people and three scans of brains of 4 mm, and other files that datasets have."""
    root = tmp_path / "raw"
    describe(root, Name="two", BIDSVersion="1.10.0")
    for number, name in enumerate(SCANS):
        array, affine, _ = as_scanned(template_in_frame(4), frame_affine(4), (0, 0, 3 * number), spacing_mm=(4, 5, 4))
        write_nifti(root / name, array + number / 50 * (array > 0), affine)
    write_nifti(root / "sub-01/anat/sub-01_T2w.nii.gz", array, affine)
    write_nifti(root / "derivatives/old/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz", array, affine)
    return root


def describe(root, **content):
    root.mkdir(exist_ok=True)
    (root / "dataset_description.json").write_text(json.dumps(content))


def prepare(root, out, *more):
    return cli.main(["prepare", str(root), "--out", str(out), "--skip", *STEPS, "--quiet", *more])


def errors_of(dataset):
    """What BIDS's validator finds wrong with a dataset."""
    validator = shutil.which("bids-validator-deno", path=Path(sys.executable).parent) or shutil.which("bids-validator")
    if validator is None:
        pytest.skip('needs bids-validator-deno (pip install "lumirlib[test]")')
    done = subprocess.run([validator, str(dataset), "--format", "json"], capture_output=True, text=True)
    issues = json.loads(done.stdout)["issues"]["issues"]
    return [issue for issue in issues if issue["severity"] == "error"]


def names_of(out):
    return {path.relative_to(out).as_posix() for path in out.rglob("*.nii.gz")}


def test_names_of_bids_are_taken_apart_and_put_in_order():
    name = BidsName.of("sub-01_ses-b_run-2_T1w.nii.gz")
    assert name.label == "sub01sesbrun2" and name.file().as_posix() == "sub-01/ses-b/anat/sub-01_ses-b_run-2_T1w.nii.gz"
    assert name.with_(desc="warped", space="x").stem == "sub-01_ses-b_run-2_space-x_desc-warped_T1w"
    for wrong in ("brain.nii.gz", "sub-01.nii.gz", "ses-1_T1w.nii.gz", "sub-01_thing-2_T1w.nii"):
        with pytest.raises(ValueError, match="expected a name of BIDS, such as"):
            BidsName.of(wrong)


def test_a_raw_dataset_becomes_a_derivative_that_is_valid_and_a_cohort(raw, tmp_path, capsys):
    out = raw / "derivatives" / "lumirlib"
    assert prepare(raw, out) == 0
    derived = "space-LUMIR_desc-preproc_T1w"
    expected = {
        f"sub-01/anat/sub-01_{derived}.nii.gz",
        f"sub-02/ses-a/anat/sub-02_ses-a_acq-fast_run-1_{derived}.nii.gz",
        f"sub-02/ses-b/anat/sub-02_ses-b_{derived}.nii.gz",
    }
    assert names_of(out) == expected
    for name in expected:
        assert read_grid(out / name)[0] == (160, 224, 192)
    sidecar = json.loads((out / f"sub-02/ses-b/anat/sub-02_ses-b_{derived}.json").read_text())
    assert sidecar["Sources"] == [f"bids:raw:{SCANS[2]}"] and sidecar["SkullStripped"] is True
    assert sidecar["skipped"] == list(STEPS) and len(sidecar["frame_to_scan_mm"]) == 4
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative" and description["GeneratedBy"][0]["Name"] == "lumirlib"
    assert description["SourceDatasets"] == [{"URL": "../.."}] and description["DatasetLinks"] == {"raw": "../.."}
    cohort = load_cohort(out / "dataset.json", 4)
    assert len(cohort.train) == 3 and cohort.image(cohort.train[0]).shape == (1, 1, 40, 56, 48)
    # an interrupted call goes on: a second one changes nothing but what has changed
    before = {name: (out / name).stat().st_mtime_ns for name in expected}
    write_nifti(raw / SCANS[0], template_in_frame(4)[0, 0].numpy() * 2, frame_affine(4))
    assert prepare(raw, out) == 0
    changed = [name for name in expected if (out / name).stat().st_mtime_ns != before[name]]
    assert changed == [f"sub-01/anat/sub-01_{derived}.nii.gz"]
    assert errors_of(out) == []


def test_the_validator_of_bids_finds_no_error_in_a_registration(raw, tmp_path, no_pages):
    describe(raw, Name="two", BIDSVersion="1.10.0", DatasetDOI="10.1/abc")
    out = tmp_path / "derivatives"
    scans = [str(raw / name) for name in (SCANS[0], SCANS[2])]
    settings = ["--method", "affine", "--resolution", "4", "--skip", *STEPS]
    assert cli.main(["register", *scans, "--out", str(out), *settings, "--bids", "--quiet"]) == 0
    assert names_of(out) == {
        "sub-02/ses-b/anat/sub-02_ses-b_space-sub01_desc-warped_T1w.nii.gz",
        "sub-01/anat/sub-01_space-sub02sesb_desc-warped_T1w.nii.gz",
        "sub-02/ses-b/anat/sub-02_ses-b_space-sub01_desc-jacobian_T1w.nii.gz",
        "sub-02/ses-b/anat/sub-02_ses-b_from-sub02sesb_to-sub01_mode-image_xfm.nii.gz",
        "sub-01/anat/sub-01_from-sub01_to-sub02sesb_mode-image_xfm.nii.gz",
    }
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["SourceDatasets"] == [{"DOI": "10.1/abc"}]
    assert errors_of(out) == []


def test_scans_that_are_not_where_or_named_as_bids_wants_are_skipped_and_named(raw):
    for name in ("sub-01/sub-01_T1w.nii.gz", "sub-01/anat/sub-02_T1w.nii.gz", "sub-01/anat/sub-01_x_T1w.nii.gz"):
        shutil.copy(raw / SCANS[0], raw / name)
    (raw / "sub-01/anat/sub-01_run-2_T1w.nii.gz").symlink_to(raw / "nowhere")  # as datalad has what is not fetched
    found = find_t1w(raw)
    assert [path.relative_to(raw).as_posix() for path in found.files.values()] == list(SCANS)
    assert list(found.people.values()) == ["sub-01", "sub-02", "sub-02"]
    assert found.skipped == {
        "sub-01/sub-01_T1w.nii.gz": "not where BIDS wants it, sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/anat/sub-02_T1w.nii.gz": "not where BIDS wants it, sub-02/anat/sub-02_T1w.nii.gz",
        "sub-01/anat/sub-01_x_T1w.nii.gz": "expected a name of BIDS, such as sub-01_ses-1_T1w.nii.gz, got "
        "sub-01_x_T1w.nii.gz",
        "sub-01/anat/sub-01_run-2_T1w.nii.gz": "a link to a file that is not there",
    }


def test_what_is_no_raw_dataset_or_would_overwrite_one_is_refused(raw, tmp_path, capsys):
    def told(root, out, *more):
        before = sorted(tmp_path.rglob("*"))
        assert prepare(root, out, *more) == 2
        assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().err

    out = tmp_path / "out"
    assert "no such folder" in told(tmp_path / "nothing", out)
    assert "raw has sub-01 that lumirlib did not prepare" in told(raw, raw)
    describe(tmp_path / "other", Name="other", BIDSVersion="1.10.0", DatasetType="derivative")
    assert "of another dataset than a derivative of lumirlib: choose another --out" in told(raw, tmp_path / "other")
    assert "expected a raw dataset, got DatasetType derivative" in told(tmp_path / "other", out)
    describe(tmp_path / "other", Name="other")
    assert "BIDS requires BIDSVersion, as text" in told(tmp_path / "other", out)
    describe(tmp_path / "other", Name="other", BIDSVersion="1.10.0")
    assert "no scan (sub-*/[ses-*/]anat/*_T1w.nii or .nii.gz)" in told(tmp_path / "other", out)
    shutil.copy(raw / SCANS[2], raw / SCANS[2].replace(".nii", ".nii.gz"))
    assert "have one name: remove one" in told(raw, out)


def test_a_derivative_of_another_dataset_is_not_overwritten(raw, tmp_path, capsys, no_pages):
    out = tmp_path / "out"
    assert prepare(raw, out) == 0
    other = tmp_path / "other"
    describe(other, Name="other", BIDSVersion="1.10.0")
    image = template_in_frame(4) * torch.linspace(0.9, 1.1, 48)
    write_nifti(other / SCANS[0], image[0, 0].numpy(), frame_affine(4))
    assert prepare(other, out) == 2
    assert "prepared from another folder" in capsys.readouterr().err
