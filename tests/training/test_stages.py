"""Training from coarse to fine: presets with stages, weights that pass between them, interruption in each."""

import json
import math
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from small_runs import CPU

from lumirlib import load_cohort, parse_variant, plots, pretrained
from lumirlib.methods import parse_row
from lumirlib.methods.base import PAPER, Preset, Stage
from lumirlib.methods.presets import get_preset, split_options
from lumirlib.study.report.runs import late_rises
from lumirlib.study.run import Run
from lumirlib.training.checkpoints import load_checkpoint
from lumirlib.training.config import RunConfig
from lumirlib.training.launch import train
from lumirlib.training.registrar import choose_registrar
from lumirlib.training.trainer import Trainer
from lumirlib.training.weights import load_model, read_checkpoint, read_packaged, starting_weights, to_finer_levels

STAGES = [{"resolution_mm": 2, "epochs": 2, "window": 6}, {"resolution_mm": 1, "epochs": 2, "learning_rate": 5e-4}]


def staged(**changes):
    options = {"name": "tiny", "resolution_mm": 1, "epochs": 1, "levels": 3, "unit": "mm", "window": 5}
    return Preset(**{**options, "learning_rate": 1e-3, "stages": STAGES, **changes})


def staged_run(cohort_json, out, row="COMP", **changes):
    options = {"stages": STAGES, "levels": 3, "channel_divisor": 16, "evaluation_pairs": 2, **changes}
    return Run.prepare(row, "real-2mm", str(cohort_json), out=str(out), engine="cpu", options=options)


def weights(path):
    return load_checkpoint(path)["model"]


def same_weights(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# presets -------------------------------------------------------------------------------------------------------------


def test_a_preset_with_stages_has_the_length_of_all_and_the_resolution_of_the_last():
    preset = staged()
    assert (preset.epochs, preset.resolution_mm, preset.ends) == (4, 1.0, (2, 4))
    coarse, fine = preset.each_stage
    assert (coarse.resolution_mm, coarse.levels, coarse.learning_rate, coarse.window_voxels) == (2.0, 2, 1e-3, 3)
    assert (fine.resolution_mm, fine.levels, fine.learning_rate, fine.window_voxels) == (1.0, 3, 5e-4, 5)
    assert preset.at_stage(-1) == fine and fine.at_stage(-1) == fine and not fine.stages


def test_a_window_in_mm_is_the_nearest_odd_number_of_voxels_and_at_least_three():
    paper = replace(PAPER, unit="mm")
    voxels = {mm: replace(paper, resolution_mm=mm).window_voxels for mm in (1, 2, 4, 8)}
    assert voxels == {1: 9, 2: 5, 4: 3, 8: 3}
    assert replace(PAPER, resolution_mm=4).window_voxels == 9


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"resolution_mm": 2}], "a stage must have resolution_mm and epochs, and may have steps_per_epoch"),
        ([{"resolution_mm": 2, "epochs": 1, "rate": 1}], r"a stage must have .*got \{.*'rate': 1"),
        ([{"resolution_mm": "2", "epochs": 1}], "resolution_mm of a stage must be a number, got '2'"),
        ([{"resolution_mm": 2, "epochs": 1.5}], "epochs of a stage must be a whole number, got 1.5"),
        ([{"resolution_mm": 1, "epochs": 1}, {"resolution_mm": 2, "epochs": 1}], "coarse to fine, got 1 mm before 2"),
        ([{"resolution_mm": 3, "epochs": 1}, {"resolution_mm": 1, "epochs": 1}], "powers of two, got 3 mm and 1 mm"),
        ([{"resolution_mm": 8, "epochs": 1}, {"resolution_mm": 1, "epochs": 1}], "levels of preset 'tiny' must be 1"),
        ("4 mm", "stages of preset 'tiny' must be a list, got '4 mm'"),
    ],
)
def test_stages_that_cannot_be_trained_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        staged(stages=stages)


def test_an_option_that_a_stage_sets_is_not_set_beside_it():
    with pytest.raises(ValueError, match="epochs of preset 'real-2mm' is set by its stages: set stages"):
        get_preset("real-2mm", epochs=2)
    changed = get_preset("real-2mm", learning_rate=2e-3, stages=STAGES)
    assert [stage.learning_rate for stage in changed.each_stage] == [2e-3, 5e-4]


def test_a_rows_own_rate_and_smoothness_count_in_every_stage():
    row, preset = parse_row("VoxelMorph"), staged(stages=[Stage(4, 1, smoothness_weight=3.0), Stage(1, 1, None, 1e-2)])
    adapted = row.training_preset(preset)
    factor = row.coarse_learning_rate_factor  # some of it is coarse
    assert [one.learning_rate for one in adapted.each_stage] == pytest.approx([1e-3 * factor, 1e-2 * factor])
    assert {one.smoothness_weight for one in adapted.each_stage} == {row.smoothness_weight}
    assert [one.learning_rate for one in parse_variant("LR4").training_preset(staged()).each_stage] == [4e-3, 2e-3]


def test_a_method_that_is_not_trained_has_its_natural_resolution_in_a_preset_with_stages():
    preset, _ = split_options("real-2mm", parse_row("deedsBCV"), {})
    assert (preset.resolution_mm, preset.stages) == (1.0, ())
    assert preset.apply(parse_row("deedsBCV")) == parse_row("deedsBCV").for_resolution(1.0)
    assert split_options("demo", parse_row("deedsBCV"), {})[0].resolution_mm == 4


def test_stages_are_part_of_a_runs_name_and_a_single_one_leaves_it_as_it_was():
    config = RunConfig(parse_variant("COMP"), staged(), "small", "0" * 16, 0)
    assert config.as_dict()["preset"]["stages"][0] == {"resolution_mm": 2.0, "epochs": 2, "window": 6}
    assert config.digest() != replace(config, preset=staged(stages=[*STAGES, STAGES[1]])).digest()
    plain = replace(config, preset=PAPER).as_dict()["preset"]
    assert not {"stages", "unit", "divide_heads", "pyramid_blur"} & plain.keys()
    assert Preset(**json.loads(json.dumps(config.as_dict()["preset"]))) == staged()


def test_head_channels_are_divided_with_the_start_channels_where_the_preset_says_so():
    row = parse_variant("LC-2")
    assert get_preset("demo").apply(row).head_channels == 108
    narrow = get_preset("real-2mm").apply(row)
    assert (narrow.start_channels, narrow.head_channels) == (16, 27)
    assert sum(one.numel() for one in narrow.build().parameters()) == 294_272  # the paper's network with N = 16


# lengths in mm -------------------------------------------------------------------------------------------------------


def test_a_bilateral_filter_in_mm_keeps_its_size_on_every_voxel():
    row = parse_variant("BF", start_channels=2, levels=3, bilateral_sigma=2.0, bilateral_window=9)
    for voxel, sigma, window in ((0.0, 2.0, 9), (1.0, 2.0, 9), (2.0, 1.0, 5), (0.5, 4.0, 19)):
        found = replace(row, voxel_mm=voxel).build().bilateral_filter
        assert found.log_sigma.exp()[:3].tolist() == pytest.approx([sigma] * 3) and found.window == window
        assert float(found.log_sigma[3].exp().detach()) == pytest.approx(0.1)


# weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["backbone", "ours", "LC-2+CA+BF", "LK"])
def test_a_level_keeps_its_millimetres_and_finer_ones_are_copies_of_the_finest(name):
    row = parse_variant(name, start_channels=2, head_channels=3, levels=3)
    coarse = row.build().state_dict()
    finer = row.on_finer_voxels(2)
    fine = to_finer_levels(coarse, row, 2)
    finer.build().load_state_dict(fine)  # names and shapes agree
    assert finer.levels == 5
    for level, old in enumerate((0, 0, 0, 1, 2)):
        for key in (key for key in coarse if key.startswith(f"estimators.{old}.")):
            assert torch.equal(fine[key.replace(f"estimators.{old}.", f"estimators.{level}.")], coarse[key])
    for key, tensor in coarse.items():
        if key.startswith("encoder."):
            assert torch.equal(fine[key], tensor)
        if key.startswith("co_attention."):
            assert torch.equal(fine[key.replace("co_attention.2.", "co_attention.4.")], tensor)
        if key == "bilateral_filter.log_sigma":
            assert (fine[key] - tensor).tolist() == pytest.approx([math.log(4)] * 3 + [0], abs=1e-6)
    back = to_finer_levels(fine, finer, -2)
    assert back.keys() == coarse.keys() and all(torch.allclose(back[key], coarse[key]) for key in coarse)


def test_a_coarser_network_moves_as_far_in_mm_as_the_finer_one_made_of_it():
    row = parse_variant("COMP", start_channels=2, head_channels=3, levels=2)
    torch.manual_seed(0)
    coarse = row.build()
    with torch.no_grad():
        for name, weight in coarse.named_parameters():
            if ".conv3." in name:  # the finest level says nothing, the other one a translation
                weight.zero_()
        coarse.estimators[1].conv3.bias += torch.tensor([0.5, -0.25, 0.0])
    fine = row.on_finer_voxels(1).build()
    fine.load_state_dict(to_finer_levels(coarse.state_dict(), row))
    center = {}
    for edge, model in ((1, coarse), (2, fine)):
        shape = [edge * side for side in (16, 18, 20)]
        with torch.no_grad():
            found = model(*torch.rand(2, 1, 1, *shape))
        center[edge] = found[(0, slice(None), *(side // 2 for side in shape))]
    assert center[1].tolist() == pytest.approx([1.0, -0.5, 0.0], abs=1e-4)
    assert center[2].tolist() == pytest.approx([2.0, -1.0, 0.0], abs=1e-4)  # of voxels half the size


def test_other_teams_networks_pass_on_as_they_are():
    row = parse_row("VoxelMorph")
    coarse = row.narrowed(8).build().state_dict()
    assert same_weights(to_finer_levels(coarse, row), coarse) and row.on_finer_voxels(1) == row
    with pytest.raises(ValueError, match=r"levels of COMP must be above 2, one for each doubling of a voxel; got 2"):
        parse_variant("COMP", levels=2).on_finer_voxels(-2)


# runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["LC-2+CA+BF", "VoxelMorph", "ours"])
def test_a_run_trains_from_coarse_to_fine_and_chooses_among_the_last_stages_epochs(row, small_cohort_json, tmp_path):
    run = staged_run(small_cohort_json, tmp_path, row)
    assert "stage 1: 2 epochs at 2 mm, window 6" in run.describe()
    result = run.train(progress=False)
    log = pd.read_csv(result.log)
    assert log["epoch"].tolist() == [0, 1, 2, 3, 4]
    assert log["stage"].tolist() == [2, 1, 1, 2, 2] and log["resolution_mm"].tolist() == [1, 2, 2, 1, 1]
    rates = run.config.preset.each_stage
    fall = 0.5**0.9
    expected = [rates[0].learning_rate, rates[0].learning_rate * fall, rates[1].learning_rate]
    assert log["learning_rate"].tolist()[1:] == pytest.approx([*expected, rates[1].learning_rate * fall])
    assert result.best_epoch == log.loc[3:, "val_dice"].idxmax()
    assert len(result.trained_by) == 2 and result.trained_by[0].endswith(", stage 1 at 2 mm")
    fixed, moving = (run.cohort.image(subject) for subject in run.cohort.train[:2])
    with torch.no_grad():
        assert torch.equal(load_model(result.checkpoint, "cpu")(fixed, moving), result.model(fixed, moving))
    run.evaluate(result, progress=False)
    facts = json.loads(run.metrics_path.with_suffix(".json").read_text())
    assert [(one["resolution_mm"], one["epochs"], one["steps"]) for one in facts["stages"]] == [(2, 2, 8), (1, 2, 8)]
    assert facts["stages"][0]["cohort_digest"] == run.coarser[0].digest
    assert facts["resolution_mm"] == 1 and facts["trained_by"] == result.trained_by


def test_forces_that_come_late_are_learned_in_the_last_stage_alone(small_cohort_json, tmp_path):
    run = staged_run(small_cohort_json, tmp_path, "ANTI+FORCE-late")
    trainer = Trainer(run.config, run.cohort, tmp_path, CPU, progress=False, coarser=run.coarser)
    assert [stage.row.driven for stage in trainer.stages] == [False, True]
    assert not trainer.model.driven and not any("of_forces" in name for name in trainer.model.state_dict())
    train(run.config, run.cohort, tmp_path, CPU, progress=False, coarser=run.coarser)
    found = read_checkpoint(trainer.best_path)
    forces = [tensor for name, tensor in found.tensors.items() if "of_forces" in name]
    assert len(forces) == 3 and all(one.abs().max() > 0 for one in forces)
    assert "driven by forces, given in a training's last stage alone" in found.row.describe()


@pytest.mark.parametrize("taken_before", [3, 7, 8, 13])  # 8 steps a stage: within 1, at its end twice, within 2
def test_a_run_stopped_in_any_stage_goes_on_to_the_same_weights(small_cohort_json, tmp_path, monkeypatch, taken_before):
    whole = staged_run(small_cohort_json, tmp_path / "whole").train(progress=False)
    step, taken = Trainer.step, []

    def step_then_signal(self, batch, stop):
        taken.append(batch)
        if len(taken) == taken_before:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, stop)

    monkeypatch.setattr(Trainer, "step", step_then_signal)
    with pytest.raises(SystemExit):
        staged_run(small_cohort_json, tmp_path / "cut").train(progress=False)
    resumed = staged_run(small_cohort_json, tmp_path / "cut").train(progress=False)
    assert len(taken) == 16
    for name in ("best.pt", "last.pt"):
        assert same_weights(*(weights(one.checkpoint.with_name(name)) for one in (resumed, whole)))
    columns = ["epoch", "stage", "loss", "val_dice", "learning_rate"]
    pd.testing.assert_frame_equal(resumed.history[columns], whole.history[columns])


@pytest.mark.parametrize("epoch", [2, 3])
def test_killed_without_a_last_word_between_two_stages_nothing_is_lost(small_cohort_json, tmp_path, monkeypatch, epoch):
    whole = staged_run(small_cohort_json, tmp_path / "whole").train(progress=False)
    save = Trainer.save

    def killed(self):
        if self.state.epoch == epoch:  # before the end of stage 1 is saved; before the first epoch of stage 2 is
            raise KeyError("as if the power went")
        save(self)

    monkeypatch.setattr(Trainer, "save", killed)
    with pytest.raises(KeyError):
        staged_run(small_cohort_json, tmp_path / "cut").train(progress=False)
    monkeypatch.setattr(Trainer, "save", save)
    resumed = staged_run(small_cohort_json, tmp_path / "cut").train(progress=False)
    assert same_weights(weights(resumed.checkpoint), weights(whole.checkpoint))
    assert resumed.history["epoch"].tolist() == [0, 1, 2, 3, 4]


def test_a_checkpoint_of_a_stage_that_does_not_fit_its_epoch_is_refused(small_cohort_json, tmp_path):
    run = staged_run(small_cohort_json, tmp_path)
    last = run.train(progress=False).checkpoint.with_name("last.pt")
    for stage, message in (
        (0, "expected epochs 0 to 2 of 4 steps in stage 1, got epoch 4"),
        (2, "a stage from 0 to 1"),
    ):
        torch.save({**load_checkpoint(last), "stage": stage}, last)
        with pytest.raises(ValueError, match=message):
            run.train(progress=False)


def test_stages_need_the_cohort_at_each_resolution(small_cohort_json, tmp_path):
    run = staged_run(small_cohort_json, tmp_path)
    with pytest.raises(ValueError, match="stage 1 of preset 'real-2mm' works at 2 mm, the cohort was loaded at 1 mm"):
        train(run.config, run.cohort, tmp_path, CPU, progress=False)


def test_coarse_weights_start_and_register_on_finer_voxels(small_cohort_json, tmp_path):
    changes = {"stages": [{"resolution_mm": 2, "epochs": 1}], "levels": 2}
    coarse = staged_run(small_cohort_json, tmp_path, **changes).train(progress=False)
    fine = choose_registrar(weights=coarse.checkpoint, resolution_mm=1, device="cpu")
    assert fine.resolution_mm == 1 and fine.facts["trained_at_mm"] > 1
    expected = to_finer_levels(weights(coarse.checkpoint), read_checkpoint(coarse.checkpoint).row)
    assert same_weights(fine.method.state_dict(), expected)
    coarser = choose_registrar(weights=coarse.checkpoint, resolution_mm=4, device="cpu")
    assert coarser.resolution_mm == 4 and len(coarser.method.estimators) == 1
    run = staged_run(small_cohort_json, tmp_path, init=str(coarse.checkpoint))  # its first stage is at 2 mm
    assert same_weights(run.start.tensors, weights(coarse.checkpoint))
    row = replace(run.config.row, name="COMP")
    assert same_weights(starting_weights(str(coarse.checkpoint), row, 1.0).tensors, expected)
    assert load_cohort(small_cohort_json, 1).resolution_mm == run.cohort.resolution_mm


def test_figures_of_the_training_mark_where_a_stage_begins_and_convergence_is_judged_within_the_last():
    stages = [2, 1, 1, 1, 1, 2, 2, 2, 2]
    dice = [0.3, 0.5, 0.5, 0.5, 0.5, 0.58, 0.6, 0.62, 0.621]
    history = pd.DataFrame({"epoch": range(9), "stage": stages, "val_dice": dice, "val_ndv_percent": 0.1})
    history = history.assign(resolution_mm=4.0 / history["stage"], loss=1.0, similarity=0.5)
    for plot in (plots.plot_loss, plots.plot_validation_dice, plots.plot_validation_ndv):
        ax = plot(Figure().subplots(), history)
        marks = [text for text in ax.texts if text.get_text().endswith(" mm")]
        assert [(mark.get_text(), mark.get_position()[0]) for mark in marks] == [("4 mm", 2.5), ("2 mm", 6.5)]
        assert {0.5, 4.5} <= {line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == ":"}
    (line, _) = plots.plot_loss(Figure().subplots(), history).lines[:2]
    assert dict(zip(line.get_xdata(), np.isnan(line.get_ydata()), strict=True))[4.5], "no line joins two stages' losses"
    runs = SimpleNamespace(history=history.assign(variant="COMP", seed=0))
    assert late_rises(runs)["rise"].tolist() == pytest.approx([0.1])  # over one of the last four epochs
    plain = SimpleNamespace(history=runs.history.drop(columns="stage"))
    assert late_rises(plain)["rise"].tolist() == pytest.approx([2.1])  # over two of eight


def test_pretrained_weights_run_on_finer_voxels_by_name():
    given, fine = pretrained("ours-1mm", "cpu"), pretrained("ours-1mm", "cpu", resolution_mm=0.5)
    assert len(fine.estimators) == len(given.estimators) + 1 == 7
    for level, old in enumerate((0, 0, 1, 2, 3, 4, 5)):
        assert torch.equal(fine.estimators[level].conv1.weight, given.estimators[old].conv1.weight)
    coarse = pretrained("ours-1mm", "cpu", resolution_mm=4)
    assert len(coarse.estimators) == 4
    assert torch.equal(coarse.estimators[0].conv1.weight, given.estimators[2].conv1.weight)
    with pytest.raises(ValueError, match="resolutions must differ by powers of two, got 1 mm and 3 mm"):
        pretrained("ours-1mm", resolution_mm=3)
    with pytest.raises(ValueError, match=r"levels of .* must be above 6, one for each doubling of a voxel; got 6"):
        pretrained("ours-1mm", resolution_mm=64)


def test_a_name_without_the_voxel_size_gives_the_weights_that_were_trained_nearest():
    for wanted, trained in ((None, 1), (0.5, 1), (1, 1), (2, 2), (4, 2)):
        assert read_packaged("ours", wanted).name == f"ours-{trained}mm"
    assert len(pretrained("ours", "cpu", resolution_mm=4).estimators) == 4
    for wrong in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="a resolution must be the edge of a voxel in mm, above 0, got"):
            pretrained("ours", "cpu", resolution_mm=wrong)
