"""What counts as a difference: tests over pairs, intervals over people, verdicts."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import wilcoxon

from lumirlib.study.report.statistics import (
    bootstrap_over_people,
    compare_rows,
    mean_over_people,
    verdict,
)

PEOPLE = [f"P{number}" for number in range(8)]
PAIRS = list(itertools.permutations(PEOPLE, 2))


def table(rows, metric="dice", pairs=PAIRS, seeds=(0, 1, 2)):
    """Values by row, a function of fixed, moving and seed."""
    lines = [
        {
            "variant": row,
            "seed": seed,
            "fixed": fixed,
            "moving": moving,
            "metric": metric,
            "value": value(fixed, moving, seed),
        }
        for row, value in rows.items()
        for seed in seeds
        for fixed, moving in pairs
    ]
    return pd.DataFrame(lines)


def noisy(mean, seed_noise=0.0005, pair_noise=0.01, offset=0):
    def value(fixed, moving, seed):
        pair = np.random.default_rng([PEOPLE.index(fixed), PEOPLE.index(moving)]).normal(0, pair_noise)
        own = np.random.default_rng([offset, PEOPLE.index(fixed), PEOPLE.index(moving), seed]).normal(0, 0.002)
        return mean + pair + own + seed_noise * (seed - 1)

    return value


def test_a_clear_gain_on_every_pair_is_better_and_the_other_way_round_worse():
    found = table({"a": noisy(0.70), "b": noisy(0.69, offset=1)})
    line = compare_rows(found, ["a"], "b", "dice").iloc[0]
    assert line.verdict == "better" and line.difference == pytest.approx(0.01, abs=1e-3)
    assert 0.008 < line.low < line.difference < line.high < 0.012
    assert (line.pairs, line.people, line.seeds) == (56, 8, 3) and line.p_holm < 1e-6
    assert compare_rows(found, ["b"], "a", "dice").iloc[0].verdict == "worse"
    found["metric"] = "hd95_mm"  # where less is better
    assert compare_rows(found, ["a"], "b", "hd95_mm").iloc[0].verdict == "worse"


def test_equal_rows_match_and_a_difference_within_the_noise_of_seeds_cannot_be_told():
    found = table({"a": noisy(0.70), "b": noisy(0.70, offset=1)})
    assert compare_rows(found, ["a"], "b", "dice").iloc[0].verdict == "matches"
    found = table({"a": noisy(0.704, seed_noise=0.004), "b": noisy(0.70, seed_noise=0.004, offset=1)})
    line = compare_rows(found, ["a"], "b", "dice").iloc[0]
    assert line.seeds_sd == pytest.approx(0.004, rel=0.2) and line.p_holm > 0.05
    assert line.verdict == "cannot be told"


def test_one_seed_proves_nothing_better():
    found = table({"a": noisy(0.70), "b": noisy(0.60, offset=1)}, seeds=(0,))
    assert compare_rows(found, ["a"], "b", "dice").iloc[0].verdict == "cannot be told"
    assert verdict(0.1, 0.09, 0.11, 1e-6, np.nan, "dice") == "cannot be told"


def test_a_gain_that_hangs_on_one_person_has_a_wide_interval():
    def lucky(fixed, moving, seed):
        return noisy(0.70)(fixed, moving, seed) + 0.05 * (fixed == "P3")

    even, odd = noisy(0.70 + 0.05 / 8, offset=2), noisy(0.70, offset=1)
    found = table({"lucky": lucky, "even": even, "plain": odd})
    lines = compare_rows(found, ["lucky", "even"], "plain", "dice").set_index("row")
    widths = lines["high"] - lines["low"]
    assert lines.loc["lucky", "difference"] == pytest.approx(lines.loc["even", "difference"], abs=2e-3)
    assert widths["lucky"] > 4 * widths["even"]
    assert lines.loc["even", "verdict"] == "better" and lines.loc["lucky", "low"] <= 0.001


def test_the_interval_over_people_is_that_of_a_direct_bootstrap():
    found = table({"a": noisy(0.7), "b": noisy(0.69, offset=1)}, seeds=(0,))
    values = [found[found["variant"] == row].pivot_table("value", ["fixed", "moving"], "seed") for row in "ab"]
    low, high, *errors = bootstrap_over_people(*values)
    difference = (values[0][0] - values[1][0]).to_dict()
    generator, means = np.random.default_rng(1), []
    for _ in range(3000):
        drawn = [PEOPLE[place] for place in generator.integers(8, size=8)]
        kept = [difference[pair] for pair in itertools.product(drawn, drawn) if pair in difference]
        means.append(np.mean(kept) if kept else np.nan)
    assert np.allclose([low, high], np.nanpercentile(means, [2.5, 97.5]), atol=1.5e-4)
    assert bootstrap_over_people(*values, draws=50) == bootstrap_over_people(*values, draws=50)
    others = np.array([bootstrap_over_people(*values, seed=seed)[:2] for seed in range(1, 21)])
    assert (np.abs(others - [low, high]) < 2 * np.array(errors)).mean() > 0.9


def test_the_test_over_people_leaves_each_person_out_in_turn():
    # the mean without A is 3, without B 2, without C 1: a variance of 2 / 3 * (1 + 0 + 1)
    pairs = {("A", "B"): 1.0, ("B", "A"): 1.0, ("A", "C"): 2.0, ("C", "A"): 2.0, ("B", "C"): 3.0, ("C", "B"): 3.0}
    found = mean_over_people(pd.Series(pairs))
    assert (found.difference, found.error, found.freedom) == pytest.approx((2, np.sqrt(4 / 3), 2))
    assert found.p_value() == pytest.approx(0.22540333)
    assert found.p_below(2.0) == 0.5 and found.p_below(4.0) == pytest.approx(0.22540333 / 2)
    seeds = mean_over_people(pd.Series(pairs), [(0.5, 3)])  # and Satterthwaite's degrees of freedom
    assert seeds.error**2 == pytest.approx(4 / 3 + 0.5 / 3)
    assert seeds.freedom == pytest.approx(1.5**2 / ((4 / 3) ** 2 / 2 + (0.5 / 3) ** 2 / 2))


def test_a_difference_that_nothing_varies_is_told_and_one_of_two_people_is_not():
    pairs = [(fixed, moving) for fixed, moving in PAIRS if fixed < "P4" and moving < "P4"]
    same = pd.Series(0.01, index=pd.MultiIndex.from_tuples(pairs))
    assert mean_over_people(same).p_value() == 0 and mean_over_people(same * 0).p_value() == 1
    assert np.isnan(mean_over_people(same[:2]).p_value())


def test_pairs_that_share_people_are_not_taken_for_independent():
    """Rows whose differences are one person's: a test over pairs finds them, a test over people does not."""
    found = {pair: 0.001 * (2 if "P3" in pair else 0.1) for pair in PAIRS}
    noise = np.random.default_rng(0).normal(0, 1e-4, len(PAIRS))
    differences = pd.Series(found) + noise
    assert wilcoxon(differences).pvalue < 0.05 < mean_over_people(differences).p_value()


def test_a_verdict_at_a_margin_says_whether_it_is_settled():
    found = table({"a": noisy(0.70, 0.0012, offset=3), "b": noisy(0.70, 0.0012, offset=1)})
    line = compare_rows(found, ["a"], "b", "dice").iloc[0]
    assert line.verdict == "matches" and line.settled
    shifted = found.assign(value=found["value"] + (found["variant"] == "a") * (0.0025 - line.high))
    assert not compare_rows(shifted, ["a"], "b", "dice").iloc[0].settled


def test_pairs_that_one_row_lacks_are_left_out_and_p_values_are_adjusted_over_rows():
    found = table({"a": noisy(0.7), "b": noisy(0.7, offset=1), "c": noisy(0.7, offset=2)})
    found = found[~((found["variant"] == "a") & (found["fixed"] == "P0"))]
    lines = compare_rows(found, ["a", "c"], "b", "dice")
    assert lines["pairs"].tolist() == [49, 56]
    assert (lines["p_holm"] >= lines["p"]).all()
    assert lines["p_holm"].min() == pytest.approx(min(1, 2 * lines["p"].min()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: compare_rows(t, ["d"], "b", "dice"), "no dice of d: the table has a, b"),
        (lambda t: compare_rows(t, ["a"], "b", "speed"), "metric must be one of dice, tre_mm"),
        (lambda t: compare_rows(pd.concat([t, t]), ["a"], "b", "dice"), "several values of dice for one pair and seed"),
        (lambda t: compare_rows(t.assign(value=np.inf), ["a"], "b", "dice"), "infinite on some pair"),
        (lambda t: compare_rows(t[(t["variant"] == "a") == (t["fixed"] == "P0")], ["a"], "b", "dice"), "no pair with"),
    ],
)
def test_tables_that_cannot_be_compared_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        change(table({"a": noisy(0.7), "b": noisy(0.7, offset=1)}))
