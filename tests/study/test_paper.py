"""The paper's numbers, and what is known of its metrics."""

import math

import pytest

from lumirlib.metrics.pair import MEASURES
from lumirlib.study.paper import CHALLENGE, COLUMNS, METRICS, paper_table, published


def test_every_column_of_the_papers_tables_is_a_metric():
    assert tuple(column for column in paper_table().columns if column not in ("table", "method", "sc")) == COLUMNS
    assert set(COLUMNS) <= set(METRICS) and set(CHALLENGE) == set(MEASURES) < set(COLUMNS)


def test_the_challenge_weighs_its_metrics_to_one_and_rows_are_compared_on_all_of_them():
    assert sum(METRICS[name].snapshot_weight for name in CHALLENGE) == pytest.approx(1)
    assert sum(METRICS[name].final_weight for name in CHALLENGE) == pytest.approx(1)
    assert [name for name, metric in METRICS.items() if not math.isnan(metric.margin)] == list(CHALLENGE)


def test_a_metric_is_shown_in_the_papers_unit():
    dice = METRICS["dice"]
    assert (dice.heading, dice.shown(0.7734), dice.shown_margin) == ("Dice (%)", pytest.approx(77.34), 0.25)
    assert METRICS["dice_std"].heading == "± std"
    assert published().loc["next-gen-nn", "dice"] == pytest.approx(0.7734)
