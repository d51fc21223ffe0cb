"""Labels and landmarks that are there are found, whatever they are called; what is not understood is named."""

import json
import os
import shutil
import warnings

import numpy as np
import pytest
from small_cohorts import smooth_blob, write_small_cohort

from lumirlib import load_cohort
from lumirlib.data.nifti import read_volume, write_nifti
from lumirlib.evaluation import zero_displacement
from lumirlib.study import submission


def write_pair(root, images="imagesVal", labels="labelsVal", ending=".nii.gz", name="{}_0000", label_name=None):
    """A cohort of two training scans and one pair, whose labels have a folder and names of their own."""
    path = write_small_cohort(root, training=2, validation=2)
    content = json.loads(path.read_text())
    del content["labelled"], content["validation"][1]
    for side, number in (("fixed", 100), ("moving", 101)):
        for folder, target, pattern in (
            ("imagesVal", images, name),
            ("labelsVal", labels, label_name or name),
        ):
            source = root / folder / f"SMALL_{number:04d}_0000.nii.gz"
            place = (
                root / target / f"{pattern.format(f'SMALL_{number:04d}')}{ending if 'labels' in folder else '.nii.gz'}"
            )
            array, affine = read_volume(source)
            source.unlink()
            write_nifti(place, array, affine)
            if folder == "imagesVal":
                content["validation"][0][side] = f"{images}/{place.name}"
    path.write_text(json.dumps(content))
    for folder in ("imagesVal", "labelsVal", "landmarksVal", "labelsTr", "landmarksTr"):
        if folder not in (images, labels) or not any((root / folder).iterdir()):
            shutil.rmtree(root / folder)
    return path


@pytest.mark.parametrize(
    "layout",
    [
        {"ending": ".nii"},
        {"label_name": "{}"},  # nnU-Net
        {"label_name": "{}", "ending": ".nii"},
        {"label_name": "{}_seg"},
        {"label_name": "{}_0000_label"},
        {"labels": "LabelsVal"},
        {"labels": "labels_val"},
        {"labels": "segsVal"},
        {"labels": "SegmentationsVal"},
        {"labels": "labels"},
        {"labels": "segmentations"},
        {"images": "images", "labels": "labels"},
        {"images": "ImagesVal", "labels": "LabelsVal"},
        {"labels": "SanityCheckLabelsVal"},
        {"images": "images/val", "labels": "labels/val"},
        {"images": "scans", "labels": "scans", "label_name": "{}_seg"},
    ],
)
def test_labels_beside_the_images_are_found_in_every_spelling(tmp_path, layout):
    cohort = load_cohort(write_pair(tmp_path, **layout))
    assert len(cohort.labelled_pairs) == 1
    assert set(cohort.label_volume(cohort.validation_pairs[0].fixed).unique().tolist()) == {0, 4, 11, 23}
    assert cohort.validation_pairs[0].fixed.labels.stem.startswith("SMALL_0100")


def test_a_folder_that_is_a_link_is_a_folder(tmp_path):
    path = write_pair(tmp_path / "data", labels="elsewhere")
    os.symlink(tmp_path / "data" / "elsewhere", tmp_path / "data" / "labelsVal")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*the folder 'elsewhere'")
        assert load_cohort(path).has_labels


def test_labels_of_the_images_own_name_are_taken_before_others(tmp_path):
    path = write_pair(tmp_path)
    for other in ("labelsVal/SMALL_0100.nii.gz", "segsVal/SMALL_0100_0000.nii.gz", "labels/SMALL_0100_0000.nii.gz"):
        write_nifti(tmp_path / other, np.full((16, 20, 24), 4, np.uint8), np.eye(4))
    with pytest.warns(UserWarning, match="the folder 'labels' .*the folder 'segsVal'"):
        cohort = load_cohort(path)
    assert cohort.validation_pairs[0].fixed.labels == tmp_path.resolve() / "labelsVal/SMALL_0100_0000.nii.gz"


@pytest.mark.parametrize("key", ["seg", "Label", "LABELS", "segs", "Segmentation", "label_map", "Label-Map"])
@pytest.mark.parametrize("nested", [True, False])
def test_keys_of_labels_are_understood_in_every_spelling(tmp_path, key, nested):
    path = write_pair(tmp_path, labels="anything")
    content = json.loads(path.read_text())
    entry = content["validation"][0]
    for side in ("fixed", "moving"):
        image = entry[side]
        label = image.replace("imagesVal", "anything")
        if nested:
            entry[side] = {"Image": image, key: label}
        else:
            entry[f"{side}_{key}"] = label
    path.write_text(json.dumps(content))
    cohort = load_cohort(path)
    assert cohort.has_labels and cohort.validation_pairs[0].moving.labels.parent.name == "anything"


@pytest.mark.parametrize("keys", [("Training", "Validation"), ("train", "val"), ("training", "registration_val")])
def test_lists_are_understood_in_every_spelling(tmp_path, keys):
    path = write_pair(tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({keys[0]: content["training"], keys[1]: content["validation"]}))
    cohort = load_cohort(path)
    assert len(cohort.train) == 2 and len(cohort.labelled_pairs) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["training"][0].update(mask="m.nii.gz"), r"'mask' in training\[0\], 'm\.nii\.gz'"),
        (lambda c: c["validation"][0].update(fixed_atlas="a.nii"), r"'atlas' in fixed of validation\[0\]"),
        (lambda c: c["validation"][0].update(points="p.fcsv"), r"'points' in validation\[0\], 'p\.fcsv'"),
        (lambda c: c.update(trainings=c["training"]), "'trainings' .is it 'training'"),
        (lambda c: c.update(intensity_maximun=255), "'intensity_maximun' .is it 'intensitymaximum'"),
        (
            lambda c: c["training"][0].update(seg=c["training"][0]["image"], label="other.nii.gz"),
            r"'label' in training\[0\], 'other\.nii\.gz', beside 'seg'",
        ),
        (lambda c: c.update(label_numbers=[2, 3]), "left out: 'label_numbers'"),
        (lambda c: c.update(max_intensity=300), "left out: 'max_intensity'"),
        (lambda c: c.update(more=[{"image": "x.nii.gz"}]), "left out: 'more'"),
    ],
)
def test_keys_that_are_not_understood_are_named_once(tmp_path, change, message):
    path = write_pair(tmp_path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=message) as told:
        cohort = load_cohort(path)
    assert len(told) == 1 and str(path) in str(told[0].message)
    assert len(cohort.train) == 2 and cohort.has_labels


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"labels": "manualVal"}, "the folder 'manualVal' with 'SMALL_0100_0000.nii.gz'"),
        ({"labels": "manual", "label_name": "{}"}, "the folder 'manual' with 'SMALL_0100.nii.gz'"),
        ({"labels": "derivatives/manual"}, "the folder 'derivatives/manual' with 'SMALL_0100_0000.nii.gz'"),
        ({"labels": "imagesVal/manual"}, "the folder 'imagesVal/manual' with 'SMALL_0100_0000.nii.gz'"),
        ({"label_name": "labels-of-{}"}, "the folder 'labelsVal' with 'labels-of-SMALL_0100.nii.gz'"),
    ],
)
def test_folders_that_are_not_understood_are_named(tmp_path, layout, message):
    path = write_pair(tmp_path, **layout)
    (tmp_path / "circle").symlink_to("circle")
    with pytest.warns(UserWarning, match=message):
        assert not load_cohort(path).has_labels


def test_what_has_nothing_to_do_with_the_scans_is_not_named(tmp_path):
    path = write_pair(tmp_path)
    content = json.loads(path.read_text()) | {"numTraining": 2, "author": "me", "modality": {"0": "MR"}}
    content["training"][0]["person"] = 3
    path.write_text(json.dumps(content))
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "SMALL_0000.json").write_text("{}")
    write_nifti(tmp_path / "masks" / "other.nii.gz", smooth_blob(0), np.eye(4))
    write_nifti(tmp_path / "imagesTs" / "SMALL_0000_0000.nii.gz", smooth_blob(0), np.eye(4))
    load_cohort(path)


@pytest.mark.parametrize(
    "name", ["landmarksVal/{}_0000.json", "LandmarksVal/{}.json", "keypoints/{}_0000_landmarks.json"]
)
def test_landmarks_beside_the_images_are_found_in_every_spelling(tmp_path, name):
    path = write_pair(tmp_path)
    for number in (100, 101):
        file = tmp_path / name.format(f"SMALL_{number:04d}")
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"names": ["a"], "points": [[1, 2, 3]]}))
    cohort = load_cohort(path)
    assert cohort.landmark_pair(cohort.validation_pairs[0]) == ({"a": (1, 2, 3)}, {"a": (1, 2, 3)})


# the challenge's data as people have it ------------------------------------------------------------------------------


def write_lumir(root, **changes):
    """Scans 0, 1, 2 and the sanity-check scans 3364, 3365, 3366 with labels, and a pair of 3455 and 3454 without."""
    root.mkdir(exist_ok=True)
    for number in (0, 1, 2, 3364, 3365, 3366, 3454, 3455):
        part = "Val" if number > 3400 else "Tr"
        write_nifti(root / f"images{part}/LUMIRMRI_{number:04d}_0000.nii.gz", smooth_blob(number), np.eye(4))
    for number in (3364, 3365, 3366):
        labels = np.array([0, 4, 11, 23], np.uint8)[np.digitize(smooth_blob(number), [40, 90, 130])]
        write_nifti(root / f"SanityCheckLabelsTr/LUMIRMRI_{number:04d}_0000.nii.gz", labels, np.eye(4))
    path = root / "LUMIR_dataset.json"
    path.write_text(json.dumps({"name": "LUMIR", **changes}))
    return path


IMAGE = "/imagesTr/LUMIRMRI_{:04d}_0000.nii.gz".format
PAIR = {side: f"./imagesVal/LUMIRMRI_{number}_0000.nii.gz" for side, number in (("fixed", 3455), ("moving", 3454))}
TRAINING = [{"image": IMAGE(number)} for number in (0, 1, 2)]
AUTHORS = {
    "training": TRAINING,
    "validation": [
        {"image": IMAGE(number), "seg": IMAGE(number).replace("imagesTr", "SanityCheckLabelsTr")}
        for number in (3364, 3365, 3366)
    ],
    "test": [PAIR],
}
CHALLENGE = {
    "training": [*TRAINING, *({"image": IMAGE(number)} for number in (3364, 3365, 3366))],
    "validation": [PAIR],
}


@pytest.mark.parametrize("listed", [CHALLENGE, AUTHORS], ids=["challenge", "authors"])
def test_the_sanity_check_people_are_held_out_and_the_challenges_pair_stays_for_submissions(tmp_path, listed):
    cohort = load_cohort(write_lumir(tmp_path, **listed))
    assert [subject.name for subject in cohort.train] == [f"LUMIRMRI_{number:04d}" for number in (0, 1, 2)]
    people = {one.name for pair in cohort.validation_pairs for one in (pair.fixed, pair.moving)}
    assert people == {"LUMIRMRI_3364", "LUMIRMRI_3365", "LUMIRMRI_3366"}
    assert len(cohort.validation_pairs) == len(cohort.labelled_pairs) == 6
    assert [pair.name for pair in cohort.submission_pairs] == ["LUMIRMRI_3455_LUMIRMRI_3454"]
    path = submission.write_submission(zero_displacement, cohort, tmp_path / "out.zip", progress=False)
    assert [pair.name for pair, _ in submission.read_submission(path, cohort)] == ["LUMIRMRI_3455_LUMIRMRI_3454"]


def test_nobody_of_the_pairs_that_a_list_has_is_trained_on(tmp_path):
    training = [*AUTHORS["training"], {"image": PAIR["fixed"]}, {"image": IMAGE(3364)}]
    cohort = load_cohort(write_lumir(tmp_path, **AUTHORS | {"training": training}))
    assert [subject.name for subject in cohort.train] == [f"LUMIRMRI_{number:04d}" for number in (0, 1, 2)]


def test_a_link_to_a_validation_scan_is_not_trained_on(tmp_path):
    training = [*AUTHORS["training"], {"image": "imagesTr/LUMIRMRI_0009_0000.nii.gz"}]
    path = write_lumir(tmp_path, **AUTHORS | {"training": training})
    os.symlink(tmp_path / "imagesTr/LUMIRMRI_3364_0000.nii.gz", tmp_path / "imagesTr/LUMIRMRI_0009_0000.nii.gz")
    assert "LUMIRMRI_0009" not in [subject.name for subject in load_cohort(path).train]


def test_people_without_labels_under_validation_are_evaluated_on_all_their_pairs(tmp_path):
    people = [IMAGE(number) for number in (3364, 3365, 3366)]
    path = write_lumir(tmp_path, training=TRAINING, validation=people)
    shutil.rmtree(tmp_path / "SanityCheckLabelsTr")
    cohort = load_cohort(path)
    assert len(cohort.train) == 3 and len(cohort.validation_pairs) == 6 and not cohort.has_labels


def test_test_pairs_whose_files_are_not_here_are_left_out_and_told_where_some_are(tmp_path):
    gone = {"fixed": IMAGE(9998), "moving": IMAGE(9999)}
    path = write_lumir(tmp_path, **AUTHORS | {"test": [gone, "./imagesTs/x.nii.gz"]})
    cohort = load_cohort(path)
    assert cohort.submission_pairs == cohort.validation_pairs
    path = write_lumir(tmp_path, **AUTHORS | {"test": [gone, PAIR]})
    with pytest.warns(UserWarning, match="1 of 2 'test' pairs, whose files are not all here"):
        assert len(load_cohort(path).submission_pairs) == 1
