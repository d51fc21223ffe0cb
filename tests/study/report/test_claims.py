"""Verdicts follow from the CSVs by stated rules, and change if the CSVs do."""

import itertools
import json
import math
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from lumirlib import cli
from lumirlib.methods.presets import get_preset
from lumirlib.metrics import jacobian_determinant
from lumirlib.provenance import project_root
from lumirlib.study.paper import rows_of_table
from lumirlib.study.report import claims, figures, tables
from lumirlib.study.report.claims import (
    FAILS,
    HOLDS,
    NOT_SUPPORTED,
    OPEN,
    SUPPORTED,
    Check,
    Evidence,
    judge,
    load_study,
)
from lumirlib.study.report.runs import Runs, late_rises
from lumirlib.study.results import Measured

PAIRS = list(itertools.permutations([f"P{number}" for number in range(6)], 2))
PAPER = {"dice": 0.76, "hd95_mm": 3.5, "tre_mm": 2.4, "ndv_percent": 0.2}
NOISE = {"dice": 0.002, "hd95_mm": 0.02, "tre_mm": 0.02, "ndv_percent": 0.002}


@cache
def drawn(*seeds):
    """A standard normal number, the same for the same seeds; to start a generator takes longest in making a study."""
    return np.random.default_rng(seeds).standard_normal()


def study(
    changes=None,
    seeds=(0, 1, 2),
    landmark_people=6,
    history=None,
    folding=None,
    mse=0.70,
    ndv=0.2,
    preset="full",
    mse_dice={1.0: 0.4, 0.1: 0.5, 0.01: 0.4},  # noqa: B006
    steps=claims.PAPER_EPOCH_STEPS,
):
    """A study in which all rows are alike but for `changes`: {(row, metric): difference}."""
    lines = []
    names = list(dict.fromkeys([*rows_of_table(2), "BF-post", *rows_of_table(1)]))
    for name, seed, (fixed, moving) in itertools.product([*names, claims.WITH_MSE], seeds, PAIRS):
        for metric, value in {**PAPER, "ndv_percent": ndv}.items():
            if metric == "tre_mm" and max(int(fixed[1]), int(moving[1])) >= landmark_people:
                value = math.nan
            noise = drawn(int(fixed[1]), int(moving[1]), seed, len(name), ord(name[-1]))
            value += (changes or {}).get((name, metric), 0.0) + NOISE[metric] * noise
            if metric == "dice" and name == claims.WITH_MSE:
                value = value - PAPER["dice"] + mse
            lines.append((name, seed, f"{fixed}_{moving}", fixed, moving, metric, value))
    values = pd.DataFrame(lines, columns=["variant", "seed", "pair", "fixed", "moving", "metric", "value"])
    other = values["variant"] == claims.WITH_MSE
    facts = pd.DataFrame([{"variant": name, "seed": seed, "scored_mm": 1.0} for name in names for seed in seeds])

    flat = [(name, seed, epoch, 0.5) for name in names for seed in seeds for epoch in range(9)]

    def runs(table, val_dice=0.5):
        logs = pd.DataFrame(flat if history is None else history, columns=["variant", "seed", "epoch", "val_dice"])
        logs["steps"] = np.where(logs["epoch"] > 0, steps, 0)
        return Runs(tuple(names), get_preset(preset), {}, table, facts.assign(val_dice=val_dice), (), "", logs)

    of_mse = values[other].assign(variant="backbone")
    with_mse = {weight: runs(of_mse, dice) for weight, dice in mse_dice.items()}
    return Evidence(runs(values[~other]), with_mse, Measured(folding, {}, "not measured"))


def verdicts(given):
    return {finding.key: finding.verdict for finding in judge(given)}


def test_rows_that_are_alike_support_only_that_they_match():
    found = verdicts(study())
    assert found["comparable"] == SUPPORTED and found["ncc"] == SUPPORTED
    for key in ("transmorph", "transmorph-hd95-ndv", "bf", "bf-post", "lk", "channels", "table1", "lc"):
        assert found[key] == NOT_SUPPORTED, key
    for key in ("leaderboard", "cascade"):
        assert found[key] == OPEN, key


def test_a_small_claim_that_the_runs_can_neither_show_nor_exclude_cannot_be_told():
    """BF gains 0.03 points in the paper: rows that match within 0.25 are no contradiction to that."""
    given = study()
    line = Check("BF", "backbone", "dice").judge(given)
    assert line["verdict"] == "matches" and line["low"] < 0.03 < line["high"]
    assert (line["outcome"], line["why"]) == (OPEN, "does not exclude the claimed 0.03")
    assert Check("LC-2", "TransMorph", "dice").judge(given)["outcome"] == FAILS, "a claimed 1.4 is excluded"


def test_a_verdict_turns_when_the_figures_do():
    better = {("BF", "dice"): 0.01, ("BF", "hd95_mm"): -0.2, ("BF", "ndv_percent"): -0.05}
    found = verdicts(study(better))
    assert found["bf"] == SUPPORTED and found["bf-post"] == NOT_SUPPORTED, "NDV of 0.03 % less is excluded"
    assert found["comparable"] == NOT_SUPPORTED, "a scheme that is a point better does not merely match"
    assert verdicts(study({**better, ("BF", "hd95_mm"): 0.2}))["bf"] == NOT_SUPPORTED
    assert verdicts(study(mse=0.80))["ncc"] == NOT_SUPPORTED
    cascade = {("LC-2", "ndv_percent"): -0.2}
    assert verdicts(study(cascade))["lc"] == SUPPORTED
    assert verdicts(study({**cascade, ("LC-2", "dice"): -0.01}))["lc"] == NOT_SUPPORTED


def test_a_gain_of_a_stated_size_must_lie_below_the_whole_interval():
    def found(gain):
        line = Check("LC-2", "TransMorph", "dice", at_least=1.4).judge(study({("TransMorph", "dice"): -gain}))
        return line["outcome"], line["why"]

    assert found(0.02) == (HOLDS, "")
    assert found(0.014) == (OPEN, "interval reaches from below to above 1.4")
    assert found(0.010) == found(-0.01) == (FAILS, "excludes a gain of 1.40")


def test_an_unconverged_reference_decides_nothing_and_an_unconverged_row_does_not_fail():
    flat = [(name, seed, epoch, 0.5) for name in study().rows[:-1] for seed in (0, 1, 2) for epoch in range(9)]
    rising = [
        (name, seed, epoch, 0.5 + 0.01 * (epoch == 8 and name in ("TransMorph", "LK"))) for name, seed, epoch, _ in flat
    ]
    given = study({("TransMorph", "dice"): -0.05, ("LK", "dice"): -0.05, ("CA", "dice"): -0.05}, history=rising)
    assert set(given.not_converged) == {"TransMorph", "LK"}
    line = Check("LC-2", "TransMorph", "dice").judge(given)
    assert (line["outcome"], line["why"]) == (OPEN, "not converged: TransMorph") and line["verdict"] == "better"
    assert Check("LK", "backbone", "dice").judge(given)["why"] == "not converged: LK"
    assert Check("CA", "backbone", "dice").judge(given)["outcome"] == FAILS
    better = study({("LK", "dice"): 0.05}, history=rising)
    assert Check("LK", "backbone", "dice").judge(better)["outcome"] == HOLDS, "an unconverged row can be better already"
    assert set(study(history=[]).not_converged) == set(study().rows) - {"deedsBCV"}, "without logs none is known to be"


def test_mse_at_the_edge_of_the_tried_smoothness_decides_nothing():
    edge = study(mse_dice={1.0: 0.4, 0.1: 0.45, 0.01: 0.5})
    line = Check("backbone", claims.WITH_MSE, "dice").judge(edge)
    assert (line["outcome"], line["why"]) == (OPEN, "MSE serves best at λ1 = 0.01, at the edge of those tried")
    assert verdicts(edge)["ncc"] == OPEN and verdicts(study())["ncc"] == SUPPORTED


def test_width_is_not_told_apart_where_a_preset_narrows_the_encoder_and_not_the_head():
    wide = {("LC-1", "dice"): 0.01}
    assert verdicts(study(wide))["channels-dice"] == SUPPORTED
    line = Check("LC-1", "backbone", "dice").judge(study(wide, preset="demo"))
    assert line["outcome"] == OPEN and "width is not told apart from K" in line["why"]
    assert Check("LC-2", "LC-1", "dice", "kept").judge(study(preset="demo"))["outcome"] == HOLDS, "of one width both"


def test_the_smallest_effect_that_could_be_told_stands_beside_the_papers():
    given = study(landmark_people=3)
    found = claims.detectable(given).set_index("metric")
    assert "tre_mm" not in found.index, "of three people"
    assert found.loc["dice", ["paper_low", "paper_high"]].tolist() == pytest.approx([-0.06, 0.03])
    smallest = found.loc["dice", "smallest"]
    lines = [given.compare(row, "backbone", "dice") for row in given.families["backbone"]]
    assert 2 * 100 * np.median([line["error"] for line in lines]) < smallest
    shifted = study({("LK", "dice"): 2 * smallest / 100})
    assert shifted.compare("LK", "backbone", "dice")["verdict"] == "better"
    text = claims.what_could_be_told(given)
    assert "With 6 people and 3 seeds" in text and f"{smallest:.2f} points of Dice (the paper's schemes: −0.06" in text
    assert "Too few people, or one seed a row" in claims.what_could_be_told(study(seeds=(0,)))


def test_a_claim_says_what_it_rests_on():
    (finding,) = (one for one in judge(study(landmark_people=3)) if one.key == "lk")
    assert finding.rests_on == "3 to 6 people, 6 to 30 pairs, 3 seeds, 1 mm; all converged"
    (finding,) = (one for one in judge(study(history=[])) if one.key == "channels-dice")
    assert finding.rests_on.endswith("not converged: LC-1, backbone")


def test_what_the_runs_cannot_show_is_left_open_with_its_reason():
    lk = {("LK", "tre_mm"): -0.2, ("LK", "ndv_percent"): -0.05}
    assert verdicts(study(lk))["lk"] == SUPPORTED
    few = Check("LK", "backbone", "tre_mm").judge(study(lk, landmark_people=3))
    assert (few["outcome"], few["why"]) == (OPEN, "landmarks on 3 people only")
    assert few["difference"] == pytest.approx(-0.2, abs=0.02), "it is shown all the same"
    unfolded = Check("LK", "backbone", "ndv_percent").judge(study(lk, ndv=0.0))
    assert unfolded["outcome"] == OPEN and "folds in less than 0.01 %" in unfolded["why"]
    once = Check("LK", "backbone", "tre_mm").judge(study(lk, seeds=(0,)))
    assert (once["outcome"], once["why"]) == (OPEN, "one seed")
    absent = study(lk)
    absent = Evidence(absent.runs, {}, absent.folding)
    line = Check("backbone", claims.WITH_MSE, "dice").judge(absent)
    assert line["outcome"] == OPEN and line["why"] == f"not run: {claims.WITH_MSE}"
    assert absent.mse_at_edge
    assert verdicts(absent)["ncc"] == OPEN


def test_one_run_of_a_method_without_random_numbers_is_enough():
    given = study({("deedsBCV", "dice"): -0.05})
    values = given.runs.values
    once = values[(values["variant"] != "deedsBCV") | (values["seed"] == 0)]
    given.runs.__dict__["values"] = once  # a frozen dataclass
    line = Check("LC-2", "deedsBCV", "dice").judge(given)
    assert line["outcome"] == HOLDS and line["difference"] == pytest.approx(5, abs=0.3)
    assert line["low"] < line["difference"] < line["high"] and line["paper"] == pytest.approx(7.57)
    once = values[(values["variant"] != "TransMorph") | (values["seed"] == 0)]
    given = study({("TransMorph", "dice"): -0.05})
    given.runs.__dict__["values"] = once
    assert Check("LC-2", "TransMorph", "dice").judge(given)["why"] == "one seed"


def test_differences_are_of_the_row_minus_the_reference_whichever_is_the_family_s():
    given = study({("TransMorph", "dice"): -0.03})
    forth, back = given.compare("LC-2", "TransMorph", "dice"), given.compare("TransMorph", "LC-2", "dice")
    assert forth["difference"] == -back["difference"] == pytest.approx(0.03, abs=0.002)
    assert (forth["low"], forth["high"]) == (-back["high"], -back["low"])
    assert (forth["verdict"], back["verdict"]) == ("better", "worse")
    assert Check("TransMorph", "LC-2", "dice").judge(given)["outcome"] == FAILS


def history(rise, name="backbone", seeds=(0, 1)):
    curve = [0.5, *([0.58] * 5), 0.58, 0.58 + rise / 2, 0.58 + rise]
    return [(name, seed, epoch, dice) for seed in seeds for epoch, dice in enumerate(curve)]


def test_convergence_is_judged_by_when_the_gain_is_there_and_left_open_while_dice_rises():
    assert verdicts(study(history=history(0.0)))["convergence"] == SUPPORTED
    assert verdicts(study(history=history(0.02)))["convergence"] == OPEN
    late = [("LK", seed, epoch, 0.5 + 0.08 * (epoch >= 5)) for seed in (0, 1) for epoch in range(9)]
    assert verdicts(study(history=late))["convergence"] == NOT_SUPPORTED
    short = study(history=late, steps=claims.PAPER_EPOCH_STEPS // 10)
    assert verdicts(short)["convergence"] == OPEN, "eight tenths of the paper's first epoch say nothing of its others"
    rises = late_rises(study(history=history(0.02)).runs)
    assert list(rises["rise"].round(6)) == [2.0, 2.0] and not rises["converged"].any()
    assert late_rises(study(history=history(0.002)).runs)["converged"].all()


def test_wide_differences_between_pairs_support_that_pairs_differ():
    assert verdicts(study())["pairs"] == NOT_SUPPORTED
    given = study()
    values = given.runs.values
    hard = values["pair"].eq("P0_P1") & values["metric"].eq("dice")
    given.runs.__dict__["values"] = values.assign(value=values["value"] - 0.2 * hard)
    assert verdicts(given)["pairs"] == SUPPORTED


def test_the_cascade_that_folds_less_wherever_the_other_folds_is_smoother():
    def found(additive, compositional, shorter=1.0):
        noise = np.random.default_rng(0)
        lines = [
            {
                "variant": "LC-1",
                "seed": seed,
                "pair": f"{fixed}_{moving}",
                "cascade": cascade,
                "factor": factor,
                "ndv_percent": ndv * factor**4 / 16 * noise.uniform(0.99, 1.01),
                "displacement_mm": factor * length,
            }
            for seed in (0, 1)
            for fixed, moving in PAIRS
            for factor in (1.0, 2.0)
            for cascade, ndv, length in (("additive", additive, 1.0), ("compositional", compositional, shorter))
        ]
        return verdicts(study(folding=pd.DataFrame(lines)))["cascade"]

    assert (found(0.2, 0.0), found(0.2, 0.3), found(0.0, 0.0)) == (SUPPORTED, NOT_SUPPORTED, OPEN)
    # 0.16 % of fields that are a tenth shorter: the additive cascade would have 0.2 * 0.9**4 = 0.13 % there
    assert found(0.2, 0.16, shorter=0.9) == NOT_SUPPORTED and found(0.2, 0.12, shorter=0.9) == SUPPORTED


def test_committed_runs_give_a_finding_for_every_claim_and_files_with_provenance(tmp_path):
    given = load_study(project_root() / "results", "embedded", "demo")
    findings = judge(given)
    assert len(findings) == len(claims.CLAIMS) == len({finding.key for finding in findings})
    text = claims.publish_claims(given, findings, tmp_path / "claims")
    assert "simulated" in text and all(finding.claim in text for finding in findings)
    about = json.loads((tmp_path / "claims.json").read_text())
    assert about["runs"] and about["commits"]
    numbers = pd.read_csv(tmp_path / "claims.csv")
    line = numbers[(numbers["claim"] == "channels-dice")].iloc[0]
    effects = tables.effects(given.runs).set_index(["variant", "metric"])
    assert line["difference"] == pytest.approx(effects.loc[("LC-1", "dice"), "ours"])
    assert line["paper"] == pytest.approx(effects.loc[("LC-1", "dice"), "paper"])
    summary = claims.summary(given, findings)
    assert summary.count("\n| ") == len(given.rows) + 2, "every row, and zero displacement"
    assert all(finding.claim in summary for finding in findings)
    plt.close(figures.claim_figure(findings[0]))
    plt.close(figures.histories_figure(given.runs, "simulated"))


def test_runs_that_are_not_there_are_named_with_the_command_that_makes_them(tmp_path, capsys):
    assert cli.main(["report", "claims", "--results", str(tmp_path), "--cohort", "embedded", "--preset", "demo"]) == 2
    assert "lumirlib sweep --rows" in capsys.readouterr().err
    with pytest.raises(ValueError, match="metric must be one of"):
        Check("LK", "backbone", "seconds")
    with pytest.raises(ValueError, match="expect must be one of"):
        Check("LK", "backbone", "dice", "worse")


def test_readme_shows_the_verdicts_of_the_committed_runs():
    readme = (project_root() / "README.md").read_text(encoding="utf-8")
    given = load_study(project_root() / "results")
    _, start, rest = readme.partition(claims.MARKERS[0])
    text, end, _ = rest.partition(claims.MARKERS[1])
    assert start and end
    assert text.strip() == claims.summary(given, judge(given)), "lumirlib report claims --write"


def test_the_jacobian_determinant_of_a_linear_map_is_its_determinant():
    matrix = torch.eye(3) + 0.2 * torch.tensor([[1.0, 0.5, 0], [0, -1, 0.3], [0.2, 0, 0.5]])
    points = torch.stack(torch.meshgrid(*(torch.arange(float(side)) for side in (5, 6, 7)), indexing="ij"))
    moved = torch.einsum("ij,jdhw->idhw", matrix, points)
    determinant = jacobian_determinant((moved - points)[None])
    assert determinant.shape == (1, 1, 5, 6, 7)
    torch.testing.assert_close(determinant, torch.linalg.det(matrix).expand_as(determinant))
    flipped = torch.zeros(1, 3, 5, 6, 7)
    flipped[:, 0] = -2 * points[0]
    assert (jacobian_determinant(flipped) < 0).all()
    with pytest.raises(ValueError, match="at least 2 voxels"):
        jacobian_determinant(torch.zeros(1, 3, 1, 4, 4))
