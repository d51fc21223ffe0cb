"""Rows of Table 1 in the engine: names, presets, training, resuming, methods that nothing is trained for."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch

from lumirlib import load_cohort, methods, plots
from lumirlib.methods.base import PAPER, Baseline, Tool
from lumirlib.methods.external import MethodUnavailableError
from lumirlib.methods.presets import PRESETS, split_options
from lumirlib.study import costs, paper
from lumirlib.study.report import figures, publish, tables
from lumirlib.study.report.runs import load_runs
from lumirlib.study.run import Run
from lumirlib.training import launch, pairs, trainer
from lumirlib.training.checkpoints import load_checkpoint
from lumirlib.training.config import make_config
from lumirlib.training.engine import Engine
from lumirlib.training.trainer import Trainer

RETRAINED = ("TransMorph", "uniGradICON", "SynthMorph", "VoxelMorph")
CPU = Engine("cpu")
TINY = replace(
    PRESETS["smoke"], name="tiny", resolution_mm=1, epochs=2, steps_per_epoch=None, channel_divisor=16, levels=3
)


def config_for(name, cohort, seed=0):
    row = methods.parse_row(name)
    return make_config(row, row.training_preset(TINY), cohort, seed)


def prepare(name, small_cohort_json, out, **options):
    return Run.prepare(
        name,
        "smoke",
        str(small_cohort_json),
        out=str(out),
        engine="cpu",
        options={"resolution_mm": 1, "channel_divisor": 16, **options},
    )


def test_every_row_of_table_1_has_a_method():
    table = paper.paper_table(1)["method"].tolist()
    assert paper.rows_of_table(1) == ["TransMorph", "uniGradICON", "SynthMorph", "VoxelMorph", "deedsBCV", "LC-2"]
    assert len(table) == len(paper.rows_of_table(1)) + 1 and "Zero Displacement" in table
    for name in paper.rows_of_table(1):
        assert methods.parse_row(name).name == name


def test_names_are_found_whatever_their_case_and_unknown_ones_are_refused_with_the_choices():
    assert methods.parse_row("voxelmorph") == methods.parse_row(" VoxelMorph ")
    assert methods.parse_row("lc-2+bf").name == "LC-2+BF"
    assert methods.parse_row("VoxelMorph", squarings=7).squarings == 7
    with pytest.raises(ValueError, match=r"'VoxelMorf' is not one of backbone.*nor a method: TransMorph, uniGradICON"):
        methods.parse_row("VoxelMorf")
    with pytest.raises(ValueError, match="unknown option width of 'VoxelMorph': choose from encoder"):
        methods.parse_row("VoxelMorph", width=3)
    with pytest.raises(ValueError, match="grid_spacings must be a list of int, got 'wide'"):
        methods.parse_row("deedsBCV", grid_spacings="wide")


@pytest.mark.parametrize("name", methods.BASELINES)
def test_a_row_is_rebuilt_from_its_options_as_json_keeps_them(name):
    row = PRESETS["demo"].apply(methods.parse_row(name))
    assert methods.row_from_options(json.loads(json.dumps(asdict(row)))) == row
    assert isinstance(row, Baseline if name in RETRAINED else Tool)
    assert row.describe()


@pytest.mark.parametrize("name", RETRAINED)
def test_a_method_keeps_the_presets_number_of_steps_and_has_its_own_weights_of_the_loss(name):
    row = methods.parse_row(name)
    for preset in PRESETS.values():
        own = row.training_preset(preset)
        assert (own.epochs, own.steps_per_epoch, own.window) == (preset.epochs, preset.steps_per_epoch, preset.window)
        assert own.similarity_weight == 1
    assert row.training_preset(PAPER).learning_rate == pytest.approx(PAPER.learning_rate * row.learning_rate_factor)
    assert PAPER.apply(row) == row
    assert row.training_preset(PAPER).differences_from_paper(row) == []
    preset, for_row = split_options("paper", row, {"smoothness_weight": 3, "epochs": 7})
    assert (preset.smoothness_weight, preset.epochs, for_row) == (3, 7, {"smoothness_weight": 3})


@pytest.mark.parametrize("name", RETRAINED)
def test_every_network_trains_and_a_stopped_run_ends_in_the_same_weights(name, cohort, tmp_path, monkeypatch):
    config = config_for(name, cohort)
    whole = launch.train(config, cohort, tmp_path / "whole", "cpu", progress=False)
    assert len(whole.history) == 3 and np.isfinite(whole.history["val_dice"]).all()
    again = Trainer(config, cohort, tmp_path / "stopped", CPU, progress=False)
    step, taken = again.step, []

    def stop_after_three(batch, stop):
        if len(taken) == 3:
            again.save()
            raise KeyboardInterrupt
        taken.append(batch)
        return step(batch, stop)

    monkeypatch.setattr(again, "step", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        again.run()
    launch.train(config, cohort, tmp_path / "stopped", "cpu", progress=False)
    first, second = (
        load_checkpoint(tmp_path / where / "checkpoints" / config.run / "last.pt")["model"]
        for where in ("whole", "stopped")
    )
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_method_that_trains_on_labels_takes_simulated_ones_where_scans_have_none(small_cohort_json, embedded_cohort):
    row = methods.parse_row("SynthMorph")
    cohort = load_cohort(small_cohort_json)
    assert pairs.training_source(row, cohort) is cohort  # its training scans have labels
    bare = replace(embedded_cohort, train=tuple(replace(subject, labels=None) for subject in embedded_cohort.train))
    source = pairs.training_source(row, bare)
    assert source is not bare and source.simulated and all(subject.labels for subject in source.train)
    assert pairs.training_source(methods.parse_row("VoxelMorph"), bare) is bare
    assert not {subject.name for subject in source.train} & {
        subject.name for pair in source.validation_pairs for subject in (pair.fixed, pair.moving)
    }
    small = replace(cohort, train=tuple(replace(subject, labels=None) for subject in cohort.train), resolution_mm=4)
    with pytest.raises(ValueError, match=r"SynthMorph trains on label volumes, which the training scans of .* lack"):
        pairs.training_source(row, small)


def test_a_run_of_deeds_trains_nothing_and_is_scored_like_any_other(small_cohort_json, tmp_path):
    options = {"grid_spacings": [4, 3, 2, 2, 2], "radii": [1, 1, 1, 1, 1], "evaluation_pairs": 1, "validation_pairs": 1}
    run = prepare("deedsBCV", small_cohort_json, tmp_path, **options)
    assert "retrained" not in run.title and "training**" not in run.describe()
    result = run.train(progress=False)
    assert result.log is None and not (tmp_path / "checkpoints").exists()
    table = run.evaluate(result, progress=False)
    assert np.isfinite(table.query("metric == 'dice'")["value"]).all()
    facts = json.loads(run.metrics_path.with_suffix(".json").read_text())
    assert (facts["parameters"], facts["trained_on"], facts["weights"]) == (0, "nothing", None)
    assert plots.pairs_figure(result.model, run.cohort, [run.pairs[0].name], run.title).axes
    assert figures.finer_pair_figure(run, run.pairs[0].name) is None  # it can be made of simulated people alone
    assert run.inverse_consistency(result, 1)["when"].tolist() == ["as run"]
    with pytest.raises(ValueError, match="deedsBCV is not trained"):
        Trainer(run.config, run.cohort, tmp_path, CPU)


def test_a_retrained_row_says_so_and_what_it_learned_from(small_cohort_json, tmp_path):
    run = prepare("SynthMorph", small_cohort_json, tmp_path, evaluation_pairs=1)
    assert run.title.startswith("SynthMorph (retrained here)")
    assert "trained on the label volumes of 4 people of 'Small blobs', on no image" in " ".join(run.describe().split())
    assert "not the method's own training" in run.describe()
    assert run.training_labels().dtype == torch.int16
    result = run.train(progress=False)
    consistency = run.inverse_consistency(result, 1)
    assert consistency["when"].tolist() == ["before training", "after"] and (consistency["error_voxels"] >= 0).all()
    run.evaluate(result, progress=False)
    facts = json.loads(run.metrics_path.with_suffix(".json").read_text())
    assert facts["trained_on"].startswith("labels of 4 people, Small blobs")
    assert "-p variant SynthMorph" in facts["command"]


def test_what_is_not_installed_says_how_to_install_it_and_does_not_run(small_cohort_json, tmp_path, monkeypatch):
    monkeypatch.delenv("DEEDS_BIN", raising=False)
    run = prepare("deedsBCV (released)", small_cohort_json, tmp_path)
    assert run.missing.startswith("not installed: ") and run.missing in run.describe()
    assert run.config.run.startswith("deedsBCV-released_small_smoke_seed0_")
    with pytest.raises(MethodUnavailableError, match="DEEDS_BIN"):
        run.train(progress=False)
    states = methods.availability().set_index("row")["state"]
    assert states["deedsBCV (released)"] == run.missing and len(states) == len(methods.RELEASED) + len(
        methods.CLASSICAL
    )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("TransMorph", 17_448_285),
        ("uniGradICON", 4 * 301_411),
        ("SynthMorph", 1_336_387),
        ("VoxelMorph", 301_411),
        ("deedsBCV", 0),
        ("LC-2", 4_567_370),
    ],
)
def test_costs_are_counted_for_every_row(name, parameters):
    row = methods.parse_row(name)
    assert costs.count_parameters(row) == parameters
    counted = costs.multiply_adds(PRESETS["demo"].apply(row), (16, 20, 24))
    assert math.isnan(counted) if name == "deedsBCV" else counted > 1e6


def test_training_costs_are_measured_by_a_rows_own_loss():
    preset = replace(PRESETS["smoke"], resolution_mm=8)
    for name in ("SynthMorph", "VoxelMorph"):
        row = methods.parse_row(name)
        found = costs.measure(preset.apply(row), row.training_preset(preset), "cpu", repeats=1)
        assert found["seconds_per_step"] > 0 and found["seconds_per_pair"] > 0


def test_more_pairs_than_scans_are_drawn_in_another_order(cohort):
    few = list(pairs.epoch_pairs(cohort.train, 0, 0))
    many = list(pairs.epoch_pairs(cohort.train, 0, 0, limit=10))
    assert len(few) == 4 and many[:4] == few and len(many) == 10
    assert sorted(pair.moving.name for pair in many[4:8]) == sorted(pair.moving.name for pair in few)
    assert all(pair.fixed != pair.moving for pair in many)


def test_table_1_sets_our_rows_beside_the_papers_under_its_names(tmp_path):
    values = {"dice": 0.7, "tre_mm": 3.0, "ndv_percent": 0.0, "hd95_mm": 4.0, "seconds": 0.1}
    facts = {
        "cohort": "embedded",
        "cohort_name": "Embedded cohort (simulated)",
        "cohort_digest": "d" * 16,
        "simulated": True,
        "resolution_mm": 4.0,
        "evaluated_pairs": 6,
        "commit": "c" * 40,
        "device": "x",
    }
    for number, name in enumerate(("Zero Displacement", "VoxelMorph", "deedsBCV", "LC-2")):
        table = pd.DataFrame(
            [
                {
                    "pair": f"P{pair}",
                    "fixed": f"F{pair}",
                    "moving": f"M{pair}",
                    "metric": metric,
                    "value": value * (1 + 0.1 * number + 0.001 * pair),
                }
                for metric, value in values.items()
                for pair in range(6)
            ]
        )
        about = {**facts, "run": name.replace(" ", ""), "method": name, "seed": 0}
        if number:
            preset, _ = split_options("demo", methods.parse_row(name), {})
            about |= {
                "options": asdict(preset.apply(methods.parse_row(name))),
                "preset": asdict(preset),
                "val_dice": 0.7,
                "val_dice_before": 0.5,
            }
        trainer.write_atomically(
            tmp_path / "metrics" / f"{about['run']}.csv", lambda to, rows=table: rows.to_csv(to, index=False)
        )
        (tmp_path / "metrics" / f"{about['run']}.json").write_text(json.dumps(about))
    runs = load_runs(tmp_path, paper.table_rows(["table1"]))
    assert runs.variants == ("VoxelMorph", "deedsBCV", "LC-2")
    assert runs.missing == ("TransMorph", "uniGradICON", "SynthMorph")
    table = tables.table1(runs).set_index(["method", "metric"])
    assert table.loc[("next-gen-nn", "dice"), "paper"] == 77.34
    assert table.loc[("next-gen-nn", "dice"), "ours"] == pytest.approx(70 * 1.3025, abs=1e-6)
    assert table.loc[("Zero Displacement", "dice"), "paper"] == 56.57
    assert table.loc[("VoxelMorph", "tre_mm"), "difference"] == pytest.approx(3 * 1.1025 - 3.1545)
    text = publish.publish_table(1, runs, tmp_path / "tables" / "table1")
    assert "next-gen-nn (LC-2) (sc:16)" in text and "not a LUMIR result" in text and "Val Dice" not in text
    assert (tmp_path / "tables" / "table1.tex").read_text().count("VoxelMorph") == 1
    publish.publish_ranks(runs, tmp_path / "tables" / "ranks")
    ranks = pd.read_csv(tmp_path / "tables" / "ranks.csv", index_col="method")
    assert "other teams' published figures are of LUMIR's own pairs" in (tmp_path / "tables" / "ranks.md").read_text()
    publish.publish_ranks(replace(runs, facts=runs.facts.assign(cohort="lumir")), tmp_path / "tables" / "lumir")
    among = pd.read_csv(tmp_path / "tables" / "lumir.csv", index_col="method")
    assert math.isnan(among.loc["SITReg-v2 (published)", "weighted"]) and len(among) == 3 + 7 + 7
    # the differences are nearly the same for all twelve people, so each of them is told
    assert list(ranks.loc[["LC-2", "deedsBCV", "VoxelMorph"], "dice"]) == [1, 2, 3]
    assert list(ranks.loc[["LC-2", "deedsBCV", "VoxelMorph"], "tre_mm"]) == [3, 2, 1]
    assert ranks.loc["LC-2", "snapshot score"] == pytest.approx(
        1 / 6 + 1 / 3
    )  # best Dice, worst TRE and HD95, equal NDV
