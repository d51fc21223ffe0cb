"""Which files of a folder are taken for scans, and whose they are."""

from pathlib import Path

import numpy as np
import pytest

from lumirlib.data.nifti import write_nifti
from lumirlib.scans.find import find_scans, person_of


def put(folder, *names):
    """Small volumes of other content each."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name.lower().endswith((".nii", ".nii.gz")):
            lower = path.with_name(path.name.lower())
            write_nifti(lower, np.full((5, 6, 7), number, np.uint8), np.eye(4))
            lower.rename(path)
        else:
            path.write_bytes(b"x")


def test_capitals_and_linked_folders_are_found(tmp_path):
    scans = tmp_path / "scans"
    put(scans, "sub-01/anat/sub-01_T1w.nii.gz", "sub-02/anat/sub-02_T1w.NII.GZ", "old/sub-04_T1w.NII")
    put(tmp_path / "elsewhere", "anat/sub-03_T1w.nii.gz")
    (scans / "sub-03").symlink_to(tmp_path / "elsewhere")
    found = find_scans(scans, tmp_path / "out")
    assert list(found.files) == ["sub-04_T1w", "sub-01_T1w", "sub-02_T1w", "sub-03_T1w"]
    assert found.people == {name: name[:6] for name in found.files}
    assert found.skipped == {}


def test_links_in_a_circle_end_and_each_file_is_taken_once(tmp_path):
    scans = tmp_path / "scans"
    put(scans, "b/one.nii.gz", "c/two.nii.gz")
    (scans / "b" / "up").symlink_to(scans)
    (scans / "a").symlink_to(scans / "b")
    (scans / "again.nii.gz").symlink_to(scans / "c" / "two.nii.gz")
    (scans / "gone.nii.gz").symlink_to(tmp_path / "nothing.nii.gz")
    (scans / "sub-03").symlink_to(tmp_path / "nothing")
    found = find_scans(scans, tmp_path / "out")
    assert found.files == {"one": scans / "b" / "one.nii.gz", "two": scans / "c" / "two.nii.gz"}
    assert found.skipped == {
        "a": "leads to a folder that is searched already",
        "again.nii.gz": "the same file as c/two.nii.gz",
        "b/up": "leads to a folder that is searched already",
        "gone.nii.gz": "a link to a file that is not there",
        "sub-03": "a link, of a folder perhaps, to what is not there",
    }


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("sub-05_ses-1_desc-brain_mask.nii.gz", "a mask, a map or a transform"),
        ("sub-05_space-MNI152NLin2009cAsym_dseg.nii.gz", "a mask, a map or a transform"),
        ("sub-05_label-GM_probseg.nii.gz", "a mask, a map or a transform"),
        ("brain_mask.NII.GZ", "a mask, a map or a transform"),
        ("case1-seg.nii", "a mask, a map or a transform"),
        ("sub-05_T1map.nii.gz", "a mask, a map or a transform"),
        ("sub-05_stat-z_statmap.nii.gz", "a mask, a map or a transform"),
        ("sub-05_from-T1w_to-MNI_xfm.nii.gz", "a mask, a map or a transform"),
        ("sub-05_task-rest_bold.nii.gz", "not T1-weighted"),
        ("sub-05_FLAIR.nii.gz", "not T1-weighted"),
        ("sub-05_magnitude1.nii.gz", "not T1-weighted"),
        ("labelsTr/P_0001_0000.nii.gz", "in a folder of masks or labels"),
        ("._sub-05_T1w.nii.gz", "a hidden file"),
        ("sub-05_T1w.mgz", "neither .nii nor .nii.gz"),
        ("sub-05_T1w.nii.bz2", "neither .nii nor .nii.gz"),
        ("sub-05_T1w.nrrd", "neither .nii nor .nii.gz"),
        ("sub-05_T1w.hdr", "neither .nii nor .nii.gz"),
    ],
)
def test_what_is_no_t1_scan_by_its_name_is_listed_with_the_reason(tmp_path, name, why):
    put(tmp_path, "sub-01_T1w.nii.gz", name)
    found = find_scans(tmp_path, tmp_path / "out")
    assert list(found.files) == ["sub-01_T1w"]
    assert list(found.skipped) == [name] and found.skipped[name].startswith(why)


def test_dicom_and_hidden_folders_are_listed_once(tmp_path):
    put(tmp_path, "sub-01_T1w.nii.gz", "raw/1.dcm", "raw/2.dcm", ".git/annex/a.nii.gz", "notes.txt", "sub-01_T1w.json")
    found = find_scans(tmp_path, tmp_path / "out")
    assert list(found.skipped) == [".git", "raw/*.dcm"] and "dcm2niix" in found.skipped["raw/*.dcm"]


def test_processed_copies_give_way_to_the_scan_itself(tmp_path):
    put(
        tmp_path,
        "sub-01/ses-1/sub-01_ses-1_T1w.nii.gz",
        "sub-01/ses-2/sub-01_ses-2_T1w.nii.gz",
        "derivatives/sub-01/ses-1/sub-01_ses-1_desc-preproc_T1w.nii.gz",
        "derivatives/sub-01/ses-1/sub-01_ses-1_space-MNI_desc-preproc_T1w.nii.gz",
        "derivatives/sub-02/sub-02_desc-preproc_T1w.nii.gz",
        "derivatives/sub-02/sub-02_space-MNI_desc-preproc_T1w.nii.gz",
    )
    found = find_scans(tmp_path, tmp_path / "out")
    assert set(found.files) == {"sub-01_ses-1_T1w", "sub-01_ses-2_T1w", "sub-02_desc-preproc_T1w"}
    assert len(found.skipped) == 3
    reason = found.skipped["derivatives/sub-02/sub-02_space-MNI_desc-preproc_T1w.nii.gz"]
    assert reason == "a processed copy (space-, desc-) of derivatives/sub-02/sub-02_desc-preproc_T1w.nii.gz"


@pytest.mark.parametrize(
    ("path", "person"),
    [
        ("sub-01/anat/sub-02_ses-1_T1w.nii.gz", "sub-02"),
        ("sub-01/ses-1/anat/T1w.nii.gz", "sub-01"),
        ("P01_ses-1_T1w.nii.gz", "P01"),
        ("P01_run-2.nii.gz", "P01"),
        ("P01/ses-1/t1.nii.gz", "P01"),
        ("sub_15_ses_1_T1w.nii.gz", "sub_15"),
        ("P01-session2.nii.gz", "P01"),
        ("OAS1_0061_MR2.nii.gz", "OAS1_0061"),
        ("P01/Visit_2/t1.nii.gz", "P01"),
        ("P01/ses-2020_01/t1.nii.gz", "P01"),
        ("P01_MRI.nii.gz", ""),
        ("BRAIN_0001_0000.nii.gz", ""),
        ("study/t1.nii.gz", ""),
    ],
)
def test_people_are_told_by_bids_names(path, person):
    assert person_of(Path(path)) == person


def test_a_folder_without_scans_says_what_was_skipped(tmp_path):
    put(tmp_path, "brain_mask.nii.gz")
    with pytest.raises(FileNotFoundError, match=r"no scan .* skipped were\n  brain_mask\.nii\.gz: a mask"):
        find_scans(tmp_path, tmp_path / "out")
    put(tmp_path, "a.nii", "a.nii.gz")
    with pytest.raises(ValueError, match=r"would both be named a: rename one"):
        find_scans(tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_scans(tmp_path / "nothing", tmp_path / "out")
