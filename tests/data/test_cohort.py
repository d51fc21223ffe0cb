"""Cohorts: every dialect of the JSON, downsampling, the embedded cohort, and files that are broken."""

import gzip
import json
import multiprocessing
import os
import shutil
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from small_cohorts import SMALL_SHAPE, smooth_blob, write_small_cohort

from lumirlib import evaluation, load_cohort, metrics, spatial
from lumirlib.data import embedded, frame
from lumirlib.data.nifti import read_nifti, read_volume, write_nifti
from lumirlib.metrics.labels import LUMIR_LABELS
from lumirlib.study import results
from lumirlib.study.run import Run


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


# reading -------------------------------------------------------------------------------------------------------------


def test_a_plain_cohort_is_read(small_cohort_json):
    cohort = load_cohort(small_cohort_json)
    assert [subject.name for subject in cohort.train] == [f"SMALL_{n:04d}" for n in range(4)]
    assert len(cohort.validation_pairs) == 6
    assert cohort.has_labels and not cohort.simulated
    assert cohort.shape == SMALL_SHAPE and cohort.resolution_mm == 1
    pair = cohort.validation_pairs[0]
    assert pair.name == "SMALL_0100_SMALL_0101"
    image = cohort.image(pair.fixed)
    assert image.shape == (1, 1, *SMALL_SHAPE) and image.dtype == torch.float32
    assert torch.equal(image[0, 0], torch.from_numpy(smooth_blob(100)).float() / 255)
    assert set(cohort.label_volume(pair.fixed).unique().tolist()) == {0, 4, 11, 23}
    assert cohort.landmark_points(pair.fixed)["second"] == (9, 6, 8)
    assert cohort.true_displacement(pair) is None


def drop_dots(content):
    for entry in content["training"]:
        entry["image"] = entry["image"].removeprefix(".")
    for entry in content["validation"]:
        entry["fixed"], entry["moving"] = (entry[side].removeprefix(".") for side in ("fixed", "moving"))


def bare_paths(content):
    content["training"] = [entry["image"].removeprefix("./") for entry in content["training"]]


def registration_val(content):
    content["registration_val"] = content.pop("validation")


def no_labelled_list(content):
    del content["labelled"]  # labels are then found beside the images, in labelsVal/


def labels_in_pairs(content):
    people = {entry["image"]: entry for entry in content.pop("labelled")}
    for entry in content["validation"]:
        for side in ("fixed", "moving"):
            entry[side] = {"image": entry[side], "label": people[entry[side]]["seg"]}


@pytest.mark.parametrize("dialect", [drop_dots, bare_paths, registration_val, no_labelled_list, labels_in_pairs])
def test_every_dialect_of_the_json_gives_the_same_cohort(small_cohort_json, dialect):
    expected = load_cohort(small_cohort_json)
    found = load_cohort(rewrite(small_cohort_json, dialect))
    assert found.train == expected.train
    assert found.validation_pairs == expected.validation_pairs


def test_labelled_training_scans_become_the_validation_where_the_official_pairs_have_no_labels(tmp_path):
    def official(content):
        people = content.pop("labelled")
        content["training"] += [{"image": entry["image"], "seg": entry["seg"]} for entry in people]
        content["validation"] = [{"fixed": content["training"][1]["image"], "moving": content["training"][0]["image"]}]

    path = rewrite(write_small_cohort(tmp_path), official)
    shutil.rmtree(tmp_path / "labelsTr")
    cohort = load_cohort(path)
    assert len(cohort.validation_pairs) == 6 and cohort.has_labels
    # the people of the official pairs, here the first two, are not trained on either
    assert {subject.name for subject in cohort.train} == {"SMALL_0002", "SMALL_0003"}


def test_training_scans_that_all_carry_labels_are_trained_on(tmp_path):
    def without_labelled(content):
        del content["labelled"]

    path = rewrite(write_small_cohort(tmp_path), without_labelled)  # labelsTr/ lies beside imagesTr/
    shutil.rmtree(tmp_path / "labelsVal")
    cohort = load_cohort(path)
    assert len(cohort.train) == 4 and len(cohort.validation_pairs) == 6 and not cohort.has_labels


def test_validation_people_are_never_trained_on(small_cohort_json):
    def list_twice(content):
        content["training"] += [{"image": entry["image"]} for entry in content["labelled"]]

    cohort = load_cohort(rewrite(small_cohort_json, list_twice))
    held_out = {subject.image for pair in cohort.validation_pairs for subject in (pair.fixed, pair.moving)}
    assert len(cohort.train) == 4 and not held_out & {subject.image for subject in cohort.train}


def write_joinable(root, finer=False):
    """Two cohorts with one grid at 1 mm; the files of the first may be of 0.5 mm."""
    paths = [write_small_cohort(root / name, training=count, name=name) for name, count in (("one", 3), ("two", 2))]
    for file in (root / "one").rglob("*.nii.gz") if finer else ():
        array, _ = read_nifti(file)
        affine = np.diag([0.5, 0.5, 0.5, 1.0])
        affine[:3, 3] = -0.25
        write_nifti(file, array.repeat(2, 0).repeat(2, 1).repeat(2, 2), affine)
    return paths


def test_joined_cohorts_train_on_all_and_are_validated_on_the_last(tmp_path):
    one, two = write_joinable(tmp_path, finer=True)
    joined, parts = load_cohort(f"{one}+{two}", 1), [load_cohort(path, 1) for path in (one, two)]
    assert joined.train == parts[0].train + parts[1].train and len(joined.train) == 5
    assert joined.validation_pairs == parts[1].validation_pairs
    assert {subject.image.parent.parent.name for subject in joined.train} == {"one", "two"}
    for subject, image in zip(joined.train, (0, 1, 2, 0, 1), strict=True):
        assert torch.equal(joined.image(subject)[0, 0], torch.from_numpy(smooth_blob(image)).float() / 255)
        assert torch.equal(joined.stored_image(subject).decode(), joined.image(subject))
        assert joined.label_volume(subject).shape == (1, 1, *SMALL_SHAPE)
    for pair in joined.validation_pairs:
        assert torch.equal(joined.image(pair.fixed), parts[1].image(pair.fixed))
        assert joined.landmark_pair(pair) == parts[1].landmark_pair(pair)
    assert joined.short_name == "one+two" and joined.name == "two"
    assert [part.digest for part in joined.parts] == [part.digest for part in parts]
    assert len({joined.digest, load_cohort(f"{two}+{one}", 1).digest, *(part.digest for part in parts)}) == 4


def test_joined_cohorts_read_the_caches_of_their_parts(tmp_path):
    one, two = write_joinable(tmp_path)
    plain = load_cohort(f"{one}+{two}")
    cached = plain.with_cache(tmp_path / "cache", progress=False)
    assert cached.describe_cache().count("6 images in uint8") == 1 and "5 images" in cached.describe_cache()
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"one_1mm_auto", "two_1mm_auto"}
    people = [*cached.train, cached.validation_pairs[0].fixed]
    assert all(torch.equal(cached.image(subject), plain.image(subject)) for subject in people)
    assert all(torch.equal(cached.label_volume(subject), plain.label_volume(subject)) for subject in people)
    assert cached.digest == plain.digest and cached.short_name == "one+two"


def test_figures_of_joined_cohorts_say_what_was_trained_on(tmp_path):
    one, two = write_joinable(tmp_path)
    path = rewrite(two, lambda content: content.update(simulated=True))
    run = Run.prepare(
        "backbone", "smoke", f"{one}+{path}", engine="cpu", out=str(tmp_path), options={"resolution_mm": 1, "levels": 2}
    )
    assert "simulated people, 1 mm: not a LUMIR result; trained on one and embedded" in run.title
    assert "3 training scans of 'one' and 2 training scans of 'two', 3 pairs" in run.describe()
    assert run.config.run.startswith("backbone_one-embedded_smoke_seed0_")
    assert (
        run.trained_on().startswith("images of 3 people, one, ") and "; images of 2 people, two, " in run.trained_on()
    )
    assert results.data_title("lumir+brains", "B", False, 1) == "B, 1 mm: not LUMIR; trained on lumir and brains"


@pytest.mark.parametrize(
    ("names", "resolution", "message"),
    [
        ("{0}+{0}", 1, "joined cohorts must not share scans: .*SMALL_0"),
        ("{0}+brain", 1, "cohort must be one of embedded, lumir, brains"),
        ("embedded+{0}", 4, r"joined cohorts must have one grid .*\(40, 56, 48\) voxels of 4 mm in RAS, .*\(4, 5, 6\)"),
        ("{0}+none.json", 1, "none.json"),
    ],
)
def test_cohorts_that_cannot_be_joined_are_told(tmp_path, names, resolution, message):
    one, _ = write_joinable(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_cohort(names.format(one), resolution)


def test_a_file_whose_name_has_a_plus_is_one_cohort(tmp_path):
    path = write_small_cohort(tmp_path / "a.json+b")
    assert len(load_cohort(path).train) == 4 and not load_cohort(path).joined


@pytest.mark.data
@pytest.mark.skipif("LUMIR_BRAINS" not in os.environ, reason="needs the real brains, in the folder named LUMIR_BRAINS")
def test_real_and_simulated_people_are_joined_without_the_real_validation_people(embedded_cohort):
    joined, brains = load_cohort("brains+embedded", 4), load_cohort("brains", 4)
    assert joined.validation_pairs == embedded_cohort.validation_pairs and joined.simulated
    assert joined.train == brains.train + embedded_cohort.train
    assert not {person for pair in brains.validation_pairs for person in (pair.fixed, pair.moving)} & set(joined.train)


def test_lumir_is_found_in_its_data_root(tmp_path):
    write_small_cohort(tmp_path).rename(tmp_path / "LUMIR_dataset.json")
    cohort = load_cohort("lumir", data_root=tmp_path)
    assert cohort.short_name == "lumir" and len(cohort.train) == 4
    write_nifti(cohort.train[0].image, smooth_blob(0), np.diag([-1.0, -1, 1, 1]))
    assert cohort.image(cohort.train[0]).shape == (1, 1, *SMALL_SHAPE)  # the challenge ignores affines


def test_json_elsewhere_is_read_relative_to_the_data_root(small_cohort_json, tmp_path):
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(small_cohort_json.read_text())
    assert len(load_cohort(elsewhere, data_root=small_cohort_json.parent).train) == 4


def test_coarser_resolution_averages_images_takes_majority_labels_and_moves_landmarks(small_cohort_json):
    fine, coarse = load_cohort(small_cohort_json), load_cohort(small_cohort_json, resolution_mm=2)
    subject = coarse.validation_pairs[0].fixed
    image = fine.image(subject)[0, 0]
    assert coarse.shape == tuple(side // 2 for side in SMALL_SHAPE)
    assert torch.isclose(coarse.image(subject)[0, 0, 3, 4, 5], image[6:8, 8:10, 10:12].mean())
    labels = fine.label_volume(subject)[0, 0, 6:8, 8:10, 10:12].flatten().tolist()
    most = max(set(labels), key=lambda label: (labels.count(label), -label))
    assert coarse.label_volume(subject)[0, 0, 3, 4, 5] == most
    # voxel 9 of 1 mm has its centre a quarter of a voxel below that of voxel 4 + 1/2
    assert coarse.landmark_points(subject)["second"] == (4.25, 2.75, 3.75)
    world = coarse.affine @ np.array([3, 4, 5, 1.0])
    assert np.allclose(world[:3], [6.5, 8.5, 10.5])


@pytest.mark.parametrize("factor", [2, 4])
def test_a_downsampled_cohort_knows_the_voxels_of_its_files(small_cohort_json, factor):
    coarse, files = load_cohort(small_cohort_json, resolution_mm=factor), load_cohort(small_cohort_json)
    own = coarse.at_own_resolution
    assert (own.resolution_mm, own.downsampling, own.shape) == (1, 1, SMALL_SHAPE)
    assert np.allclose(own.affine, files.affine, atol=1e-12) and own.labels == LUMIR_LABELS
    assert own.validation_pairs == coarse.validation_pairs and own.digest == coarse.digest
    subject = own.validation_pairs[0].moving
    assert torch.equal(own.image(subject), files.image(subject))
    assert torch.equal(own.label_volume(subject), files.label_volume(subject))
    assert own.landmark_points(subject) == files.landmark_points(subject)
    assert coarse.image(subject).shape == (1, 1, *coarse.shape)  # the coarse one is left as it was
    assert coarse.at_own_resolution is own and files.at_own_resolution is files


def test_joined_cohorts_are_scored_on_the_files_of_the_last(tmp_path):
    first, last = write_small_cohort(tmp_path / "first"), write_small_cohort(tmp_path / "last")
    joined = load_cohort(f"{first}+{last}", resolution_mm=2)
    own = joined.at_own_resolution
    assert own.resolution_mm == 1 and own.path == last and own.validation_pairs == joined.validation_pairs
    assert own.image(own.validation_pairs[0].fixed).shape == (1, 1, *SMALL_SHAPE)


def test_labels_too_small_for_a_coarse_grid_are_not_scored(small_cohort_json):
    assert load_cohort(small_cohort_json).labels == LUMIR_LABELS
    coarse = load_cohort(small_cohort_json, resolution_mm=4)
    people = {subject for pair in coarse.validation_pairs for subject in (pair.fixed, pair.moving)}
    counts = {}
    for subject in people:
        for label, voxels in zip(*coarse.label_volume(subject).unique(return_counts=True), strict=True):
            counts.setdefault(int(label), []).append(int(voxels))
    small = {label for label, voxels in counts.items() if min(voxels) < 8}
    assert small  # the blobs' cores
    assert set(coarse.labels) == set(LUMIR_LABELS) - small


def test_majority_label_breaks_ties_towards_the_smaller_number():
    labels = torch.tensor([9, 9, 9, 9, 4, 4, 4, 4], dtype=torch.int16).reshape(1, 1, 2, 2, 2)
    assert spatial.majority_label(labels, 2).tolist() == [[[[[4]]]]]


def test_landmarks_come_from_a_label_volume_too(tmp_path):
    points = {"1": (2.0, 3.0, 4.0), "2": (7.0, 8.0, 9.0)}
    volume = metrics.landmark_volume(points, SMALL_SHAPE)[0, 0].numpy()

    def volumes_for_points(content):
        for entry in content["labelled"]:
            entry["landmarks"] = entry["landmarks"].replace(".json", ".nii.gz")
            write_nifti(tmp_path / entry["landmarks"], volume, np.eye(4))

    path = rewrite(write_small_cohort(tmp_path), volumes_for_points)
    cohort = load_cohort(path)
    pair = cohort.validation_pairs[0]
    assert cohort.landmark_points(pair.fixed) == points
    assert torch.equal(cohort.landmark_volumes(pair)[1][0, 0], torch.from_numpy(volume))  # as they are on disk
    write_nifti(pair.fixed.landmarks, volume[:-1], np.eye(4))
    with pytest.raises(ValueError, match=r"landmarksVal.*expected shape \(16, 20, 24\)"):
        cohort.landmark_pair(pair)


def test_intensities_from_0_to_1_may_overshoot(small_cohort_json):
    cohort = load_cohort(small_cohort_json)
    subject = cohort.train[0]
    image = smooth_blob(0).astype(np.float32)
    write_nifti(subject.image, image / image.max() * 1.01, np.eye(4))
    assert cohort.image(subject).max() == 1


def test_landmarks_of_a_pair_are_matched_by_name_not_by_order(small_cohort_json):
    cohort = load_cohort(small_cohort_json)
    pair = cohort.validation_pairs[0]
    content = json.loads(pair.moving.landmarks.read_text())
    zero = torch.zeros(1, 3, *cohort.shape)
    before = evaluation.score_displacement(cohort, pair, zero)["tre_mm"]
    pair.moving.landmarks.write_text(json.dumps({key: value[::-1] for key, value in content.items()}))
    assert evaluation.score_displacement(cohort, pair, zero)["tre_mm"] == before < 2


@pytest.mark.parametrize(
    ("landmarks", "message"),
    [
        ({"names": ["first", "other"], "points": [[1, 2, 3], [4, 5, 6]]}, "must name the same landmarks, but only 1"),
        ({"names": ["first", "first"], "points": [[1, 2, 3], [4, 5, 6]]}, "landmark 'first' is named twice"),
        (
            {"names": ["first"], "points": [[1, 2]]},
            r"three finite voxel coordinates .* got \[1, 2\]",
        ),
        ({"names": ["first"], "points": [[1, 2, "x"]]}, "three finite voxel coordinates"),
        ({"names": ["first"], "points": [[1, 2, 300]]}, "landmark 'first' at .* lies outside"),
        ({"names": ["first"]}, "expected lists 'names' and 'points' of one length"),
    ],
)
def test_landmarks_that_do_not_fit_are_named_before_anything_is_trained(small_cohort_json, landmarks, message):
    cohort = load_cohort(small_cohort_json)
    cohort.validation_pairs[0].moving.landmarks.write_text(json.dumps(landmarks))
    with pytest.raises(ValueError, match=message) as caught:
        Run.prepare(preset="smoke", cohort=str(small_cohort_json), options={"resolution_mm": 1})
    assert "SMALL_0101" in str(caught.value)


def test_pairs_that_lack_labels_stay_and_their_people_are_not_trained_on(small_cohort_json):
    def one_without(content):
        unlabelled = content["labelled"].pop()
        content["training"].append({"image": unlabelled["image"]})

    path = rewrite(small_cohort_json, one_without)
    (path.parent / "labelsVal" / "SMALL_0102_0000.nii.gz").unlink()
    cohort = load_cohort(path)
    assert len(cohort.validation_pairs) == 6 and len(cohort.labelled_pairs) == 2
    assert len(cohort.train) == 4
    found = evaluation.score_displacement(cohort, cohort.validation_pairs[1], torch.zeros(1, 3, *cohort.shape))
    assert np.isnan(found["dice"]) and found["ndv_percent"] == 0


def test_labels_numbered_otherwise_are_refused(small_cohort_json):
    cohort = load_cohort(small_cohort_json)
    for subject in {pair.fixed for pair in cohort.validation_pairs}:
        labels, affine = read_volume(subject.labels)
        write_nifti(subject.labels, np.digitize(labels, [4, 11, 23]).astype(np.uint8), affine)
    with pytest.raises(
        ValueError, match=r"expected label numbers of LUMIR [^\0]*SMALL_0100[^\n]*: 3 of 3 .* not LUMIR's: 1, 2, 3"
    ):
        _ = cohort.labels


def test_digest_changes_with_the_json_and_with_the_files(small_cohort_json):
    before = load_cohort(small_cohort_json).digest
    assert load_cohort(small_cohort_json).digest == before
    write_nifti(load_cohort(small_cohort_json).train[0].image, smooth_blob(50), np.eye(4))
    after = load_cohort(small_cohort_json).digest
    assert after != before
    assert load_cohort(rewrite(small_cohort_json, lambda content: content.update(name="other"))).digest != after


def test_memory_is_bounded(small_cohort_json, monkeypatch):
    cohort = load_cohort(small_cohort_json)
    one = cohort.image(cohort.train[0]).nbytes
    monkeypatch.setattr("lumirlib.data.cohort.MEMORY_BUDGET", 2 * one)
    for subject in cohort.train:
        cohort.image(subject)
    assert sum(volume.nbytes for volume in cohort.memory.values()) <= 2 * one


# broken files --------------------------------------------------------------------------------------------------------


def break_truncated(path):
    path.write_bytes(path.read_bytes()[:200])


def break_magic(path):
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[344:348] = b"nope"
    path.write_bytes(gzip.compress(bytes(raw)))


def break_not_gzip(path):
    path.write_text("this is not an image")


def break_nan(path):
    image = smooth_blob(0).astype(np.float32)
    image[3, 4, 5] = np.nan
    write_nifti(path, image, np.eye(4))


def break_constant(path):
    write_nifti(path, np.full(SMALL_SHAPE, 7, np.uint8), np.eye(4))


def break_range(path):
    write_nifti(path, smooth_blob(0).astype(np.int16) * 10, np.eye(4))


def break_shape(path):
    write_nifti(path, smooth_blob(0)[:-2], np.eye(4))


def break_orientation(path):
    write_nifti(path, smooth_blob(0)[::-1].copy(), np.diag([-1.0, 1, 1, 1]))


def break_spacing(path):
    write_nifti(path, smooth_blob(0), np.diag([2.0, 2, 2, 1]))


def break_dimensions(path):
    write_nifti(path, np.stack([smooth_blob(0)] * 2, -1), np.eye(4))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_truncated, "as NIfTI \\(truncated or corrupt"),
        (break_magic, "as NIfTI \\(truncated or corrupt"),
        (break_not_gzip, "as NIfTI \\(truncated or corrupt"),
        (break_nan, "expected finite voxels, got 1 NaN or infinite"),
        (break_constant, "expected an image, got the constant 7"),
        (break_range, "expected intensities from 0 to 255"),
        (break_shape, "expected shape \\(16, 20, 24\\), like the cohort's other images, got \\(14, 20, 24\\)"),
        (break_orientation, "expected voxels of 1 mm in orientation RAS, .* got 1x1x1 mm in LAS"),
        (break_spacing, "expected voxels of 1 mm in orientation RAS, .* got 2x2x2 mm in RAS"),
        (break_dimensions, "expected a 3-D volume, got shape \\(16, 20, 24, 2\\)"),
    ],
)
def test_a_broken_image_is_named_with_what_is_wrong(small_cohort_json, damage, message):
    cohort = load_cohort(small_cohort_json)
    subject = cohort.train[2]
    damage(subject.image)
    with pytest.raises(ValueError, match=message) as caught:
        cohort.image(subject)
    assert subject.image.name in str(caught.value)


def test_labels_with_fractions_are_refused(small_cohort_json):
    cohort = load_cohort(small_cohort_json)
    subject = cohort.validation_pairs[0].fixed
    write_nifti(subject.labels, smooth_blob(0).astype(np.float32) / 7, np.eye(4))
    with pytest.raises(ValueError, match=r"SMALL_0100.* expected whole label numbers"):
        cohort.label_volume(subject)


def test_paths_that_leave_the_root_are_refused_for_a_relative_json_too(small_cohort_json, monkeypatch):
    write_nifti(small_cohort_json.parent.parent / "outside.nii.gz", smooth_blob(0), np.eye(4))
    rewrite(small_cohort_json, lambda content: content["training"].append({"image": "../outside.nii.gz"}))
    monkeypatch.chdir(small_cohort_json.parent)
    with pytest.raises(ValueError, match="leaves the data root"):
        load_cohort("dataset.json")


def test_missing_file_named_in_the_json_is_named(small_cohort_json):
    (small_cohort_json.parent / "imagesTr" / "SMALL_0001_0000.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset\.json names .*SMALL_0001.* for training\[1\]"):
        load_cohort(small_cohort_json)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["training"].append({"image": "./../outside.nii.gz"}), "leaves the data root"),
        (lambda c: c["training"].append({"picture": "x"}), r"training\[4\] has no 'image', only \['picture'\]"),
        (lambda c: c["training"].append({"image": 3}), r"expected a path for training\[4\], got 3"),
        (lambda c: c["validation"].append({"fixed": "x"}), r"validation\[6\] must have 'fixed' and 'moving'"),
        (lambda c: c.update(training={"image": "x"}), "expected a list under 'training', got dict"),
        (lambda c: c.clear(), "names no 'training' scans and no 'validation' or 'registration_val' pairs"),
    ],
)
def test_a_malformed_json_is_named_with_the_entry(small_cohort_json, change, message):
    with pytest.raises(ValueError, match=message):
        load_cohort(rewrite(small_cohort_json, change))


def test_what_is_no_cohort_is_said_so(tmp_path, monkeypatch, small_cohort_json):
    (tmp_path / "bad.json").write_text("{")
    monkeypatch.delenv("LUMIR_BRAINS", raising=False)
    for call, error, message in [
        (lambda: load_cohort("embeded"), ValueError, "cohort must be one of embedded, lumir, brains or the path"),
        (lambda: load_cohort(tmp_path / "bad.json"), ValueError, r"bad\.json: not valid JSON"),
        (lambda: load_cohort(tmp_path / "none.json"), FileNotFoundError, r"no such JSON file: .*none\.json"),
        (lambda: load_cohort("lumir"), ValueError, "needs data_root, the folder with LUMIR_dataset"),
        (lambda: load_cohort("brains"), ValueError, "needs the environment variable LUMIR_BRAINS"),
        (lambda: load_cohort("embedded", 3), ValueError, r"resolution_mm must be one of \(1, 2, 4\)"),
        (lambda: load_cohort(small_cohort_json, 1.5), ValueError, "whole multiple of the files' 1 mm"),
        (lambda: load_cohort(small_cohort_json, 3), ValueError, "that divides their shape"),
        (lambda: load_cohort(small_cohort_json, float("nan")), ValueError, "resolution_mm must be a voxel size in mm"),
        (lambda: read_nifti(tmp_path / "none.nii.gz"), FileNotFoundError, "no such NIfTI file"),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_nifti_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_nifti(tmp_path / "image.nii.gz", smooth_blob(0), np.eye(4))

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_nifti(path, smooth_blob(1), np.eye(4))
    assert np.array_equal(read_volume(path)[0], smooth_blob(0))
    assert [file.name for file in tmp_path.iterdir()] == ["image.nii.gz"]


# the embedded cohort -------------------------------------------------------------------------------------------------


def test_embedded_cohort_says_that_it_is_simulated_and_has_all_it_promises(embedded_cohort):
    cohort = embedded_cohort
    assert cohort.simulated and cohort.short_name == "embedded"
    assert cohort.shape == (40, 56, 48)
    assert len(cohort.train) == 24 and len(cohort.validation_pairs) == 30
    numbers = set(cohort.label_volume(cohort.validation_pairs[0].fixed).unique().tolist())
    assert set(LUMIR_LABELS) - {49, 50} <= numbers <= set(LUMIR_LABELS)  # those two are about a voxel of 4 mm
    assert len(cohort.landmark_points(cohort.train[0])) >= 12
    image = cohort.image(cohort.train[0])
    assert image.min() == 0 and image.max() == 1 and 0.2 < float((image > 0).float().mean()) < 0.4


def test_a_person_is_made_anew_as_the_cohort_has_it_and_not_by_another_generator(embedded_cohort, monkeypatch):
    subject = embedded_cohort.validation_pairs[0].moving
    found = embedded.person_image(embedded_cohort.path, subject.image.name, 4)
    assert torch.equal(found, embedded_cohort.image(subject))
    monkeypatch.setattr(embedded, "GENERATOR_VERSION", 0)
    with pytest.raises(ValueError, match=r"dataset\.json: expected people of release 0, got"):
        embedded.person_image(embedded_cohort.path, subject.image.name, 4)


def test_embedded_people_overlap_before_registration_as_in_the_paper(embedded_cohort):
    dices, errors = [], []
    zero = torch.zeros(1, 3, *embedded_cohort.shape)
    for pair in embedded_cohort.validation_pairs:
        volumes = [embedded_cohort.label_volume(subject) for subject in (pair.fixed, pair.moving)]
        points = [embedded_cohort.landmark_points(subject) for subject in (pair.fixed, pair.moving)]
        dices.append(100 * metrics.dice(volumes[1], volumes[0]))
        errors.append(metrics.tre_points_mm(zero, *points, spacing_mm=4))
    assert np.mean(dices) == pytest.approx(56.6, abs=2.6)
    assert np.mean(errors) == pytest.approx(4.4, abs=0.3)


@pytest.mark.long
def test_embedded_people_at_1_mm_overlap_before_registration_as_in_the_paper():
    population = embedded.EmbeddedPopulation()
    made = [embedded.make_person(population, population.training + n, 1) for n in range(population.validation)]
    people = [(torch.from_numpy(labels)[None, None], points) for _, labels, points, _ in made]
    dices, errors = [], []
    for (fixed, fixed_points), (moving, moving_points) in combinations(people, 2):  # both are the same the other way
        dices.append(100 * metrics.dice(moving, fixed))
        distances = np.array(list(fixed_points.values())) - np.array(list(moving_points.values()))
        errors.append(np.linalg.norm(distances, axis=1).mean())
    assert np.mean(dices) == pytest.approx(56.6, abs=2.6)
    assert 1.3 < np.std(dices) < 2.6
    assert np.mean(errors) == pytest.approx(4.4, abs=0.2)


def test_true_displacement_carries_the_moving_person_onto_the_fixed_one(embedded_cohort):
    pair = embedded_cohort.validation_pairs[7]
    truth = embedded_cohort.true_displacement(pair)
    points = [embedded_cohort.landmark_points(subject) for subject in (pair.fixed, pair.moving)]
    # what is left is the 4 mm grid's own interpolation
    assert metrics.tre_points_mm(truth, *points, spacing_mm=4) < 0.5
    assert metrics.ndv_percent(truth) < 0.01
    volumes = [embedded_cohort.label_volume(subject) for subject in (pair.fixed, pair.moving)]
    before = metrics.dice(volumes[1], volumes[0])
    assert metrics.dice(spatial.warp(volumes[1], truth, "nearest"), volumes[0], volumes[1]) > before + 0.15


def test_true_displacement_solves_its_equation():
    population = embedded.EmbeddedPopulation()
    (fixed, _), (moving, back) = (
        embedded.person_transforms(embedded.control_velocity(population, person)) for person in (1, 2)
    )
    truth = embedded.true_displacement(fixed, moving, back, embedded.FIELD_SPACING_MM)
    there = spatial.identity_grid(truth.shape[2:]) + truth
    error = truth + spatial.sample(moving, there) - fixed
    assert error[..., 8:-8, 8:-8, 8:-8].norm(dim=1).max() * embedded.FIELD_SPACING_MM < 0.05


def test_a_persons_transforms_are_inverse_to_each_other_and_do_not_fold():
    population = embedded.EmbeddedPopulation()
    there, back = embedded.person_transforms(embedded.control_velocity(population, 3))
    residual = spatial.compose(there, back)[..., 8:-8, 8:-8, 8:-8].norm(dim=1) * embedded.FIELD_SPACING_MM
    assert residual.max() < 0.05
    assert metrics.ndv_percent(there) < 1e-3


def test_people_depend_on_their_seed_alone():
    population = embedded.EmbeddedPopulation()
    first, again = (embedded.make_person(population, 2, 4) for _ in range(2))
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    other = embedded.make_person(population, 3, 4)
    reseeded = embedded.make_person(replace(population, seed=1), 2, 4)
    assert not np.array_equal(first[0], other[0]) and not np.array_equal(first[0], reseeded[0])
    assert population.name() != replace(population, seed=1).name()


def test_a_person_is_the_same_at_every_resolution():
    population = embedded.EmbeddedPopulation()
    people = {mm: embedded.make_person(population, population.training, mm) for mm in frame.RESOLUTIONS_MM}
    for fine, coarse in pairwise(frame.RESOLUTIONS_MM):
        for label, place in people[fine][2].items():
            assert np.allclose((np.array(place) - 0.5) / 2, people[coarse][2][label], atol=1e-3)
        labels = torch.from_numpy(people[fine][1])[None, None]
        reduced = spatial.majority_label(labels, 2)[0, 0].numpy()
        assert (reduced == people[coarse][1]).mean() > 0.97
    assert people[1][0].shape == frame.FRAME_SHAPE


def test_an_interrupted_build_goes_on_where_it_stopped(tmp_path, monkeypatch):
    population = embedded.EmbeddedPopulation(training=2, validation=2)
    make, made = embedded.make_person, []

    def dies_at_the_third(population, person, resolution_mm):
        if person == 2:
            raise KeyboardInterrupt
        made.append(person)
        return make(population, person, resolution_mm)

    monkeypatch.setattr(embedded, "make_person", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        embedded.embedded_json(4, population, tmp_path, progress=False)
    assert not list(tmp_path.rglob("dataset.json"))
    done_before = set(made)
    made.clear()
    monkeypatch.setattr(embedded, "make_person", lambda *a: made.append(a[1]) or make(*a))
    path = embedded.embedded_json(4, population, tmp_path, progress=False)
    assert set(made) == {0, 1, 2, 3} - done_before and 2 in made
    assert len(load_cohort(path).validation_pairs) == 2


def test_jobs_that_make_the_embedded_cohort_at_once_leave_it_whole(tmp_path):
    population = embedded.EmbeddedPopulation(training=1, validation=2)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lumirlib.data.embedded"])  # imported once, and not used
    given = 4, population, tmp_path / "shared", False
    jobs = [context.Process(target=embedded.embedded_json, args=given) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0]
    paths = [embedded.embedded_json(4, population, tmp_path / name) for name in ("shared", "alone")]
    shared, alone = map(load_cohort, paths)
    assert shared.digest == alone.digest and not list(tmp_path.rglob(".partial-*"))
    people = [[*one.train, one.validation_pairs[0].fixed, one.validation_pairs[0].moving] for one in (shared, alone)]
    for one, other in zip(*people, strict=True):
        assert torch.equal(shared.image(one), alone.image(other))


# real brains ---------------------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("LUMIR_BRAINS"), reason="needs the folder of real brains in LUMIR_BRAINS")
def test_real_brains_load_at_4_mm_with_their_90_pairs():
    cohort = load_cohort("brains", 4)
    assert len(cohort.validation_pairs) == 90 and cohort.has_labels and not cohort.simulated
    assert len(cohort.train) > 50
    dices = [
        metrics.dice(*(cohort.label_volume(subject) for subject in (pair.moving, pair.fixed)))
        for pair in cohort.validation_pairs[::9]
    ]
    assert 0.40 < np.mean(dices) < 0.50
    assert sum(bool(pair.fixed.landmarks and pair.moving.landmarks) for pair in cohort.validation_pairs) == 6
