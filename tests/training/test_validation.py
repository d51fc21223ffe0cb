import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lumirlib.data import Pair, Subject
from lumirlib.methods.presets import get_preset
from lumirlib.training.validation import validation_pairs


def people(count):
    """All ordered pairs of some people with labels, in the order of a dataset JSON that names the last one first."""
    found = [Subject(name=f"s{number}", image=Path(f"{number}.nii.gz")) for number in range(count)]
    pairs = tuple(Pair(fixed=one, moving=other) for one, other in itertools.permutations(reversed(found), 2))
    return SimpleNamespace(labelled_pairs=pairs, validation_pairs=pairs)


@pytest.mark.parametrize("count", [4, 5, 10])
def test_the_second_half_of_the_people_chooses_no_epoch(count):
    preset = replace(get_preset("demo"), validation_half=True, validation_pairs=None)
    chosen = validation_pairs(people(count), preset)
    half = count // 2
    assert {one.name for pair in chosen for one in (pair.fixed, pair.moving)} == {f"s{n}" for n in range(half)}
    assert len(chosen) == half * (half - 1)
    assert len(validation_pairs(people(count), replace(preset, validation_half=False))) == count * (count - 1)


def test_two_people_choose_by_all_their_pairs():
    assert len(validation_pairs(people(2), replace(get_preset("demo"), validation_half=True))) == 2


def test_the_study_at_2_mm_chooses_epochs_by_half_of_the_people():
    assert get_preset("real-2mm").validation_half
    assert len(validation_pairs(people(10), get_preset("real-2mm"))) == 10
