"""Which labels are scored: LUMIR's, where people have those, or the ones that the JSON gives."""

import json

import numpy as np
import pytest
import torch
from small_cohorts import SMALL_SHAPE, write_small_cohort

from lumirlib import load_cohort, metrics
from lumirlib.data.nifti import write_nifti
from lumirlib.evaluation import score_displacement
from lumirlib.metrics.labels import LEAST_SHARE, LUMIR_LABELS, other_protocol
from lumirlib.study.run import Run

ASEG = [2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 24, 26, 28, 41, 42, 43, 44, 46, 47, 49, 50, 51, 52, 53]
ASEG += [54, 58, 60]


def label(subject, numbers, mislabelled=()):
    """Columns of 2 x 2 voxels of the given numbers along the last axis; pairs (number, instead) change some."""
    columns = np.arange(SMALL_SHAPE[0] // 2 * (SMALL_SHAPE[1] // 2)).reshape(SMALL_SHAPE[0] // 2, -1)
    volume = np.asarray(numbers, dtype=np.int16)[columns % len(numbers)].repeat(2, 0).repeat(2, 1)
    for number, instead in mislabelled:
        volume[volume == number] = instead
    write_nifti(subject.labels, np.repeat(volume[..., None], SMALL_SHAPE[2], 2), np.eye(4))


def cohort_with(folder, numbers, **changes):
    """A cohort whose two validation people have labels of these numbers, alike but for number 4, which is 5 in one."""
    path = write_small_cohort(folder, training=2, validation=2, **changes)
    pair = load_cohort(path).validation_pairs[0]
    label(pair.fixed, numbers)
    label(pair.moving, numbers, [(4, 5)] if 5 in numbers else [])
    return path


@pytest.mark.parametrize(
    "numbers",
    [
        ASEG,
        [*ASEG, *range(1001, 1036), *range(2001, 2036)],  # aparc+aseg
        [1, 2, 3],  # tissues
        [1, 2, 3, 4],
        range(1, 117),  # AAL
        range(1, 171),  # AAL 3
        range(1, 201),  # Schaefer's 200 parcels
        range(1, 36),  # Learn2Reg's OASIS
        [4, 43],  # FreeSurfer's lateral ventricles
        [1],
        [0],
    ],
)
def test_labels_of_another_protocol_are_named_whatever_numbers_they_share(numbers):
    told = other_protocol({"someone": [0, *numbers], "other": LUMIR_LABELS})
    others = [n for n in numbers if n and n not in LUMIR_LABELS]
    total = len([n for n in numbers if n])
    assert told.startswith(f"someone: {len(others)} of {total} label numbers are not LUMIR's")
    assert told.count("\n") == 0 and ", ".join(map(str, others[:40])) in told


@pytest.mark.parametrize(
    "numbers",
    [
        LUMIR_LABELS,
        sorted({*LUMIR_LABELS, 15, 42, 43, 46, 63, 64, 69}),  # manual BrainCOLOR labels
        LUMIR_LABELS[:59],
        [n for n in LUMIR_LABELS if n not in (49, 50)],
        [4, 11, 23],
        [11, 23, 31_000],
    ],
)
def test_labels_of_lumirs_protocol_are_taken_with_some_lacking_or_more(numbers):
    assert other_protocol({"someone": numbers}) == ""


def test_the_share_that_decides_lies_far_from_both_kinds():
    manual, parcels = len(LUMIR_LABELS[1:]) / (len(LUMIR_LABELS[1:]) + 7), 132 / 207
    assert parcels + 0.1 < LEAST_SHARE < manual - 0.1


def test_everybody_with_labels_of_another_protocol_is_told_before_anything_is_trained(tmp_path):
    path = cohort_with(tmp_path, ASEG)
    with pytest.raises(ValueError, match="21 of 32 label numbers") as caught:
        Run.prepare("backbone", "smoke", str(path), engine="cpu", options={"resolution_mm": 1, "levels": 2})
    for name, total in (("SMALL_0100_0000.nii.gz", 32), ("SMALL_0101_0000.nii.gz", 31)):
        assert f"{name}: 21 of {total} label numbers are not LUMIR's: 2, 3, 5, 7" in str(caught.value)
    assert "as 'labels' in the JSON" in str(caught.value)


def test_one_person_of_another_protocol_is_told(tmp_path):
    path = cohort_with(tmp_path, LUMIR_LABELS)
    label(load_cohort(path).validation_pairs[0].moving, ASEG)
    with pytest.raises(ValueError, match=r"SMALL_0101_0000\.nii\.gz: 21 of 32") as caught:
        _ = load_cohort(path).labels
    assert "SMALL_0100" not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        ASEG,
        ASEG[::-1],
        {str(number): f"structure {number}" for number in ASEG},
        {"0": "background", **{str(number): f"structure {number}" for number in ASEG}},
        {"background": 0, **{f"structure {number}": number for number in ASEG}},
        {"0": {"0": "background", **{str(number): f"structure {number}" for number in ASEG}}},
        {"all": ASEG},
    ],
)
def test_the_labels_that_the_json_gives_are_scored(tmp_path, given):
    cohort = load_cohort(cohort_with(tmp_path, ASEG, labels=given))
    assert cohort.labels == (0, *sorted(ASEG))
    pair = cohort.validation_pairs[0]
    fixed, moving = (cohort.label_volume(one) for one in (pair.fixed, pair.moving))
    found = score_displacement(cohort, pair, torch.zeros(1, 3, *SMALL_SHAPE))
    assert found["dice"] == pytest.approx(metrics.dice(moving, fixed, moving, (0, *ASEG)))
    assert found["dice"] != pytest.approx(metrics.dice(moving, fixed, moving))


def test_a_run_says_which_labels_are_scored(tmp_path):
    path = cohort_with(tmp_path, ASEG, labels=[*ASEG, 900])
    options = {"resolution_mm": 1, "levels": 2}
    run = Run.prepare("backbone", "smoke", str(path), engine="cpu", options=options)
    assert "- 32 of the JSON's 33 labels are in the label volumes" in run.describe()
    path = cohort_with(tmp_path / "few", [4, 11, 23])
    run = Run.prepare("backbone", "smoke", str(path), engine="cpu", options=options)
    assert "- 3 of LUMIR's 132 labels are in the label volumes" in run.describe()


@pytest.mark.parametrize("empty", [None, [], {}, "", {"0": "background"}, {"background": 0}, [0]])
def test_no_labels_in_the_json_are_lumirs(tmp_path, empty):
    assert load_cohort(write_small_cohort(tmp_path, labels=empty)).labels == LUMIR_LABELS


@pytest.mark.parametrize("given", [["left"], {"2": "x", "left": 3}, [1.5], [-1], [40000], "2, 3", 7, [True]])
def test_labels_that_are_no_numbers_are_refused(tmp_path, given):
    path = write_small_cohort(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "labels": given}))
    with pytest.raises(ValueError, match=r"dataset\.json: expected label numbers from 0 to 32767 as 'labels'"):
        load_cohort(path)


def test_given_labels_that_nobody_has_are_refused(tmp_path):
    cohort = load_cohort(write_small_cohort(tmp_path, labels=[17, 53]))
    with pytest.raises(ValueError, match=r"none of its 'labels', \[17, 53\], is in .* there are \[4, 11, 23\]"):
        _ = cohort.labels
