"""Ranks by significance, the snapshot score, and what makes pairs hard."""

import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lumirlib import cli
from lumirlib.evaluation import evaluate_method, zero_displacement
from lumirlib.study import paper
from lumirlib.study.report import difficulty, figures, statistics


def table(dice, tre=2.0, ndv=0.0, hd95=3.0, pairs=12):
    values = {"dice": dice, "tre_mm": tre, "ndv_percent": ndv, "hd95_mm": hd95}
    rows = [
        {"pair": f"p{number}", "fixed": f"P{number}", "moving": f"P{number + 1}", "metric": metric, "value": value}
        for metric, given in values.items()
        for number, value in enumerate(np.broadcast_to(given, pairs))
    ]
    return pd.DataFrame(rows)


STEPS = np.linspace(0, 0.1, 12)


def test_holm_multiplies_the_smallest_by_their_number_and_keeps_the_order():
    # by hand: 0.01 * 4, 0.02 * 3, 0.03 * 2 -> 0.06 (not below the one before), 0.5 * 1
    assert statistics.holm([0.03, 0.01, 0.5, 0.02]).tolist() == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert statistics.holm([0.9, 0.8]).tolist() == [1.0, 1.0]


def test_a_method_that_is_better_on_every_pair_is_found_so_and_one_that_is_alike_is_not():
    good, alike, bad = table(0.70 + STEPS), table(0.70 + STEPS[::-1]), table(0.60 + STEPS**2, tre=3 + STEPS)
    tests = statistics.compare({"good": good, "alike": alike, "bad": bad}).set_index(["metric", "first", "second"])
    first = tests.loc[("dice", "good", "bad")]
    assert first["better"] == "good" and first["difference"] == pytest.approx(0.1 + np.mean(STEPS - STEPS**2))
    assert tests.loc[("dice", "good", "alike"), "better"] == ""
    assert tests.loc[("tre_mm", "good", "bad"), "better"] == "good"  # less is better
    assert tests.loc[("ndv_percent", "good", "bad"), "p"] == 1  # no difference at all
    ranks = statistics.rank({"bad": bad, "good": good, "alike": alike})
    assert ranks.loc["good", ["dice", "tre_mm", "ndv_percent"]].tolist() == [1, 1, 1]
    assert ranks.loc["bad", ["dice", "tre_mm", "ndv_percent"]].tolist() == [3, 3, 1]
    assert ranks.index[-1] == "bad"
    assert ranks.loc["bad", "weighted"] == pytest.approx(3 * 1 / 5 + 3 * 2 / 5 + 1 / 5 + 1 / 5)


def test_a_lost_label_is_infinitely_bad_and_two_are_alike():
    lost = table(0.7, hd95=[math.inf] + [3.0] * 11)
    tests = statistics.compare({"a": lost, "b": lost}).set_index("metric")
    assert tests.loc["hd95_mm", "difference"] == 0
    worse = statistics.compare({"a": table(0.7), "b": table(0.7, hd95=math.inf)}).set_index("metric")
    assert worse.loc["hd95_mm", "better"] == "a"


def test_ranks_and_scores_leave_out_what_rests_on_nothing():
    """TRE of three people, and NDV that differs by less than the metric's resolution."""
    good = table(0.8, tre=[2.0, 2.0] + [math.nan] * 10, ndv=2e-5 + STEPS * 1e-6)
    bad = table(0.7, tre=[1.0, 1.0] + [math.nan] * 10, ndv=0.0)
    ranks = statistics.rank({"bad": bad, "good": good})
    assert "tre_mm" not in ranks and ranks["ndv_percent"].tolist() == [1, 1]
    assert ranks.loc["bad", "weighted"] == pytest.approx((2 * 1 / 5 + 1 / 5 + 1 / 5) / (3 / 5))
    scores = statistics.snapshot_scores({"bad": bad, "good": good})
    assert "tre_mm" not in scores
    assert scores["score"].to_dict() == pytest.approx({"good": 1, "bad": (1 / 3 + 1 / 6) / (2 / 3)})


def test_methods_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="two methods or more, got 1"):
        statistics.compare({"a": table(0.7)})
    with pytest.raises(ValueError, match="a has several values of dice for one pair"):
        statistics.compare({"a": pd.concat([table(0.7)] * 2), "b": table(0.7)})
    with pytest.raises(ValueError, match=r"b lacks the column\(s\) fixed, which say whom pairs share"):
        statistics.compare({"a": table(0.7), "b": table(0.7).drop(columns="fixed")})
    other = table(0.7).assign(fixed="elsewhere")
    with pytest.raises(ValueError, match="a, b have no pairs of 5 people in common"):
        statistics.compare({"a": table(0.7), "b": other})


def test_snapshot_score_is_normalized_from_the_worst_to_the_best():
    scores = statistics.snapshot_scores(
        {"best": table(0.8, 2, 0, 3), "middle": table(0.7, 2.5, 0.5, 3.5), "worst": table(0.6, 3, 1, 4)}
    )
    assert scores["score"].to_dict() == pytest.approx({"best": 1, "middle": 0.5, "worst": 0})
    mixed = statistics.snapshot_scores({"a": table(0.8, 3, 0, 3), "b": table(0.6, 2, 0, 4)})
    # NDV is alike: full marks for both
    assert mixed["score"].to_dict() == pytest.approx({"a": 1 / 6 + 1 / 6 + 1 / 3, "b": 1 / 3 + 1 / 3})
    with pytest.raises(ValueError, match="a lack a metric that the score needs"):
        statistics.snapshot_scores({"a": table(0.8).query("metric != 'tre_mm'"), "b": table(0.6)})


def test_published_rows_stand_beside_results_on_lumir_alone():
    assert paper.published().loc["SITReg-v2", ["dice", "tre_mm"]].tolist() == [0.7805, 2.3005]
    assert paper.published().loc["next-gen-nn", "dice"] == pytest.approx(0.7734)
    with pytest.raises(ValueError, match="ours are of the cohort 'embedded' and cannot be placed among them"):
        statistics.snapshot_scores({"ours": table(0.7)}, "embedded", with_published=True)
    scores = statistics.snapshot_scores({"ours": table(0.9, 2.0, 0.0, 3.0)}, "lumir", with_published=True)
    assert scores.index[0] == "ours" and not scores["published"].iloc[0] and scores["published"].iloc[1:].all()
    assert len(scores) == 1 + 7 + 7 and scores.index[-1] == "VoxelMorph"  # it folds most


def test_the_command_line_ranks_result_files_and_refuses_what_cannot_be_ranked(tmp_path, capsys):
    paths = []
    for name, dice, cohort in (("better", 0.8, "embedded"), ("worse", 0.7, "embedded"), ("foreign", 0.7, "brains")):
        paths.append(tmp_path / f"{name}.csv")
        table(dice).to_csv(paths[-1], index=False)
        paths[-1].with_suffix(".json").write_text(json.dumps({"run": name, "cohort": cohort}))
    better, worse, foreign = map(str, paths)
    assert cli.main(["report", "ranks", better, worse]) == 0
    printed = capsys.readouterr().out
    assert "cohort embedded" in printed and printed.index("better") < printed.index("worse")
    for arguments, message in (
        ([better, foreign], "the runs are on different cohorts: brains, embedded"),
        ([better, better], "the run better is given twice"),
        ([better, str(tmp_path / "none.csv")], "no such file"),
        ([better, worse, "--published"], "ours are of the cohort 'embedded' and cannot be placed among them"),
        ([better], "two methods or more"),
    ):
        assert cli.main(["report", "ranks", *arguments]) == 2
        assert message in capsys.readouterr().err
    paths[1].write_text("a,b\n1,2\n")
    assert (
        cli.main(["report", "ranks", better, worse]) == 2
        and "lacks the column(s) metric, pair, value" in capsys.readouterr().err
    )


# difficulty ----------------------------------------------------------------------------------------------------------


def test_pairs_are_described_and_ordered_from_the_hardest(embedded_cohort):
    pairs = embedded_cohort.validation_pairs[:4]
    before = evaluate_method(zero_displacement, embedded_cohort, pairs, progress=False)
    after = before.assign(value=before["value"] + 0.1)
    found = difficulty.pair_table(embedded_cohort, before, pd.concat([after, before]))
    assert found["dice"].is_monotonic_increasing and found["gain"].tolist() == pytest.approx([5] * 4)
    assert found["displacement_mm"].tolist() == pytest.approx([0.05] * 4)
    assert (found[["brain_ratio", "ventricle_ratio"]] >= 1).all().all()
    labels = [embedded_cohort.label_volume(subject) for subject in (pairs[0].fixed, pairs[0].moving)]
    volumes = [sum(int((volume == label).sum()) for label in (4, 11, 49, 50, 51, 52)) for volume in labels]
    row = found.set_index("pair").loc[pairs[0].name]
    assert row["ventricle_ratio"] == pytest.approx(max(volumes) / min(volumes))
    with pytest.raises(ValueError, match=f"displacement_mm for {pairs[3].name}, but lack one of them"):
        difficulty.pair_table(embedded_cohort, before.query(f"pair != '{pairs[3].name}'"), after)


def test_rank_correlations_are_those_of_ordered_columns():
    found = pd.DataFrame(
        {
            "dice": [60, 70, 80, 90],
            "gain": [4, 3, 2, 1],
            "dice_before": [1, 2, 3, 9],
            "brain_ratio": [4, 3, 2, 1],
            "ventricle_ratio": [1, 1, 1, 1],
            "displacement_mm": [1, 2, np.nan, np.inf],
        }
    )
    explained = difficulty.explain(found).set_index("feature")
    assert explained.loc["dice_before", ["dice", "gain", "pairs"]].tolist() == pytest.approx([1, -1, 4])
    assert explained.loc["brain_ratio", "dice"] == pytest.approx(-1)
    assert math.isnan(explained.loc["ventricle_ratio", "dice"]) and explained.loc["displacement_mm", "pairs"] == 2
    figure = figures.difficulty_figure(found, "t")
    assert figure.axes[0].get_title() == "rank correlation +1.00"
    plt.close("all")
