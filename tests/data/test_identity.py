"""What names a cohort's files: other content, other digest, and figures that follow the files."""

import gzip
import os
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from small_cohorts import smooth_blob, write_small_cohort

from lumirlib import load_cohort
from lumirlib.data import identity
from lumirlib.data.dataset_json import EARLIER_DIGESTS
from lumirlib.data.nifti import write_nifti
from lumirlib.files import read_json
from lumirlib.provenance import project_root
from lumirlib.study.run import Run

IMAGE = np.arange(210, dtype=np.uint8).reshape(5, 6, 7)


def replaced(path, array):
    """Other voxels in a file of the same name, size and times."""
    before = path.stat()
    raw = nib.Nifti1Image(array, np.eye(4)).to_bytes()
    if path.name.endswith(".gz"):
        raw = gzip.compress(raw, 0)
    path.write_bytes(raw.ljust(before.st_size, b"\0") if path.suffix == ".nii" else raw)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return path


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_other_voxels_in_a_file_of_one_name_size_and_time_have_another_checksum(tmp_path, ending):
    path = write_nifti(tmp_path / f"image{ending}", IMAGE, np.eye(4))
    replaced(path, IMAGE)
    before = identity.checksum(path)
    size = path.stat().st_size
    assert identity.checksum(replaced(path, IMAGE)) == before
    changed = IMAGE.copy()
    changed[2, 3, 4] += 1
    assert identity.checksum(replaced(path, changed)) != before
    assert path.stat().st_size == size


def test_the_checksum_of_a_gzip_is_of_its_header_too(tmp_path):
    path = write_nifti(tmp_path / "image.nii.gz", IMAGE, np.eye(4))
    before = identity.checksum(path)
    assert before.startswith("crc32")
    assert identity.checksum(write_nifti(path, IMAGE, np.diag([2.0, 1, 1, 1]))) != before


@pytest.mark.parametrize(
    "pack",
    [
        lambda raw: gzip.compress(raw[:400]) + gzip.compress(raw[400:]),  # as bgzip writes
        lambda raw: gzip.compress(raw) + gzip.compress(b""),
        lambda raw: gzip.compress(raw) + b"more than eight bytes",
        lambda raw: gzip.compress(raw + bytes(14)),
        lambda raw: raw,
        lambda raw: b"",
    ],
)
def test_where_the_end_of_a_file_is_not_of_all_its_content_all_bytes_count(tmp_path, pack):
    path, found = tmp_path / "image.nii.gz", []
    for voxels in (IMAGE, IMAGE[::-1]):
        path.write_bytes(pack(nib.Nifti1Image(voxels, np.eye(4)).to_bytes()))
        found.append(identity.checksum(path))
    assert all(one.startswith("sha256") for one in found)
    assert found[0] != found[1] or not path.stat().st_size


def test_hashes_of_large_files_are_remembered_until_the_files_change(tmp_path, monkeypatch):
    monkeypatch.setenv("LUMIRLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "REMEMBERED_BYTES", 100)
    monkeypatch.setattr(identity, "RECENT_SECONDS", 0.0)
    path = write_nifti(tmp_path / "image.nii", IMAGE, np.eye(4))
    small = tmp_path / "points.json"
    small.write_text("{}")
    hashed, real = [], identity.hash_file
    monkeypatch.setattr(identity, "hash_file", lambda path: hashed.append(path.name) or real(path))
    first = identity.checksums([path, small], "cohort")
    assert identity.checksums([path, small], "cohort") == first
    assert sorted(hashed) == ["image.nii", "points.json", "points.json"]
    replaced(path, IMAGE[::-1])  # its time of change is another, whatever else it says
    assert identity.checksums([path], "cohort")[path] == identity.checksum(path) != first[path]


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_two_cohorts_alike_in_names_and_sizes_have_other_digests_and_runs(tmp_path, ending):
    paths = [write_small_cohort(tmp_path / site / "cohort", training=2, validation=2) for site in "ab"]
    for seed, path in zip((0, 50), paths, strict=True):
        for number, file in enumerate(sorted(path.parent.glob("images*/*.nii.gz"))):
            image = smooth_blob(seed + number)
            file.unlink()
            target = file.with_suffix("") if ending == ".nii" else file
            target.touch()
            replaced(target, image)
        path.write_text(path.read_text().replace(".nii.gz", ending))
        for file in path.parent.glob("labels*/*.nii.gz"):
            volume = np.asarray(nib.load(file).dataobj)
            write_nifti(file.with_name(file.name.removesuffix(".nii.gz") + ending), volume, np.eye(4))
    first, second = (load_cohort(path) for path in paths)
    assert [one.image.stat().st_size for one in first.train] == [one.image.stat().st_size for one in second.train]
    assert first.short_name == second.short_name
    assert first.digest != second.digest and first.content_digest != second.content_digest
    runs = [
        Run.prepare("backbone", "smoke", str(path), engine="cpu", options={"resolution_mm": 1, "levels": 2}).config.run
        for path in paths
    ]
    assert runs[0] != runs[1]
    shutil.copytree(paths[0].parent, tmp_path / "copy" / "cohort")
    assert load_cohort(tmp_path / "copy" / "cohort" / "dataset.json").digest == first.digest


@pytest.mark.parametrize("simulated", [False, True])
def test_figures_before_registration_follow_labels_and_landmarks_that_are_corrected_in_place(tmp_path, simulated):
    path = write_small_cohort(tmp_path / "small", simulated=simulated, population={})
    for file in (tmp_path / "small/labelsVal").iterdir():
        replaced(file, np.asarray(nib.load(file).dataobj))

    def figures():
        options = {"resolution_mm": 1, "levels": 2}
        run = Run.prepare("backbone", "smoke", str(path), engine="cpu", out=str(tmp_path / "out"), options=options)
        table = replace(run, commit="a" * 40).before_registration(progress=False)
        return table.groupby("metric")["value"].mean()

    first = figures()
    assert figures()["seconds"] == first["seconds"]  # the same table: nothing was computed
    labels = tmp_path / "small/labelsVal/SMALL_0100_0000.nii.gz"
    volume = np.asarray(nib.load(labels).dataobj).copy()
    volume[volume == 11] = 4
    replaced(labels, volume)
    corrected = figures()
    assert corrected["dice"] != first["dice"]
    for landmarks in (tmp_path / "small/landmarksVal").iterdir():
        landmarks.write_text(landmarks.read_text().replace("[9.0, 6.0, 8.0]", f"[9.0, {landmarks.stem[9]}.0, 8.0]"))
    assert figures()["tre_points_mm"] != corrected["tre_points_mm"]


def test_a_volume_is_cached_anew_where_other_voxels_have_the_size_and_time_of_the_old_ones(tmp_path):
    path = write_small_cohort(tmp_path / "small", training=2, validation=2)
    scan = load_cohort(path).train[0].image
    replaced(scan, smooth_blob(0))
    load_cohort(path).with_cache(tmp_path / "cache", progress=False)
    replaced(scan, smooth_blob(60))
    cohort = load_cohort(path)
    cached = cohort.with_cache(tmp_path / "cache", progress=False)
    assert cached.cache.made == 1
    assert cached.image(cached.train[0]).equal(cohort.image(cohort.train[0]))


def test_committed_runs_are_of_the_embedded_cohort_or_of_one_that_keeps_its_digest(embedded_cohort):
    of_cohort = {}
    for path in (project_root() / "results" / "metrics").glob("*.json"):
        about = read_json(path)
        of_cohort.setdefault(about["cohort"], set()).add((about["cohort_digest"], about["resolution_mm"]))
    assert {digest for digest, _ in of_cohort["brains"]} == set(EARLIER_DIGESTS.values())
    assert (embedded_cohort.digest, 4.0) in of_cohort["embedded"]


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("LUMIR_BRAINS"), reason="needs the folder of real brains in LUMIR_BRAINS")
def test_the_real_brains_have_the_digest_that_their_committed_runs_have():
    cohort = load_cohort("brains", 4)
    assert cohort.digest in EARLIER_DIGESTS.values()
