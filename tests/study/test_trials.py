from pathlib import Path

import pandas as pd
import pytest
import trials

from lumirlib.methods import parse_row
from lumirlib.methods.presets import TUNED, split_options

EQUAL = Path(__file__).parents[2] / "results" / "trials" / "equal.csv"


def test_what_a_row_is_trained_with_is_the_best_of_its_four_trials():
    table = pd.read_csv(EQUAL)
    for name, lines in table.groupby("row"):
        assert not lines.duplicated(["rate", "smoothness"]).any()
        if len(lines) < len(trials.SETTINGS):
            continue
        best = lines.loc[lines["dice"].idxmax()]
        preset, _ = split_options(trials.PRESET, parse_row(name), {})
        assert (preset.learning_rate, preset.smoothness_weight) == (best["learning_rate"], best["smoothness_weight"])
    assert set(TUNED[trials.PRESET]) <= set(table["row"])


def test_settings_are_factors_of_the_rows_own():
    own, _ = split_options(trials.PRESET, parse_row("VoxelMorph"), {}, tuned=False)
    assert own.learning_rate == 4e-3
    lines = pd.read_csv(EQUAL)
    for line in lines.itertuples():
        own, _ = split_options(trials.PRESET, parse_row(line.row), {}, tuned=False)
        assert line.learning_rate == pytest.approx(own.learning_rate * line.rate)
        assert line.smoothness_weight == pytest.approx(own.smoothness_weight * line.smoothness)


def test_given_options_go_before_tuned_ones_and_filters_share_their_base_rows():
    assert split_options("real-2mm", parse_row("LC-2"), {"learning_rate": 5e-4})[0].learning_rate == 5e-4
    assert split_options("real-2mm", parse_row("LC-2+IO"), {})[0].learning_rate == 2e-3
    assert split_options("half", parse_row("LC-2"), {})[0].learning_rate == 4e-4
