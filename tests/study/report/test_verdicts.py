"""How often the rules are wrong: a small version of benchmarks/verdicts.py."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lumirlib.study.report.claims import NOT_SUPPORTED, OPEN, SUPPORTED

#: As the committed runs of Table 2 have them, of NDV in percent of the paper's level.
SPREAD = {
    "dice": (0.0001, 0.0010, 0.0013, 0.0026),
    "tre_mm": (0.0, 0.028, 0.057, 0.138),
    "ndv_percent": (0.055, 0.048, 0.0, 0.19),
    "hd95_mm": (0.003, 0.004, 0.033, 0.069),
}
SMALLEST = {"dice": 0.007, "tre_mm": 0.23, "ndv_percent": 0.25, "hd95_mm": 0.1}


@pytest.fixture
def simulation(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[3] / "benchmarks"))
    import verdicts

    return verdicts, {metric: verdicts.Components(*spread) for metric, spread in SPREAD.items()}


def test_rows_that_do_not_differ_are_not_told_to(simulation):
    verdicts, parts = simulation
    found = [verdicts.judged(parts, {}, 0, number) for number in range(3)]
    measured = verdicts.errors(pd.concat([lines for _, lines in found]))
    assert measured["families"] == 39 and measured["families_with_one_told_to_differ"] <= 0.05
    assert {one["transmorph"] for one, _ in found} == {NOT_SUPPORTED}, "a claimed 1.4 that is absent is found out"


def test_where_the_paper_is_exactly_right_its_claims_are_not_refused(simulation):
    verdicts, parts = simulation
    found = [verdicts.judged(parts, verdicts.papers_effects(), 1, number)[0] for number in range(3)]
    assert sum(list(one.values()).count(NOT_SUPPORTED) for one in found) <= 1
    assert {one["table1"] for one in found} == {SUPPORTED} and {one["bf"] for one in found} == {OPEN}


def test_clear_effects_are_supported(simulation):
    verdicts, parts = simulation
    found, _ = verdicts.judged(parts, verdicts.clear_effects(SMALLEST), 2, 0)
    supported = {key for key, verdict in found.items() if verdict == SUPPORTED}
    assert supported >= {"transmorph", "table1", "ncc", "channels-dice", "ca-bf", "lk", "channels"}
    assert found["comparable"] == NOT_SUPPORTED, "schemes that are clearly better do not merely match"


def test_variances_are_found_again_in_what_was_simulated_with_them(simulation):
    verdicts, _ = simulation
    given = verdicts.Components(0.02, 0.03, 0.02, 0.02)
    found = [
        verdicts.components(verdicts.simulate({"dice": given}, {}, np.random.default_rng(seed)).runs, "dice")
        for seed in range(3)
    ]
    for name, value in vars(given).items():
        assert np.mean([vars(one)[name] for one in found]) == pytest.approx(value, rel=0.25), name
