"""Training: seeds, resuming, interruption, checkpoints, presets; and the run from parameters to files."""

import json
import math
import os
import resource
import shutil
import signal
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from small_cohorts import SMALL_SHAPE, write_small_cohort
from small_runs import CPU, TINY, small_run

from lumirlib import cli, load_cohort, losses, parse_variant, provenance
from lumirlib.data.loader import Batch
from lumirlib.losses import multilevel
from lumirlib.methods import row_from_options
from lumirlib.methods.base import PAPER, Preset
from lumirlib.methods.presets import get_preset
from lumirlib.models.bilateral_filter import joint_bilateral_filter
from lumirlib.provenance import project_root
from lumirlib.study import run as run_module
from lumirlib.study.run import Run, evaluate_method
from lumirlib.training import interrupts
from lumirlib.training.checkpoints import load_checkpoint
from lumirlib.training.config import RunConfig, make_config
from lumirlib.training.divergence import NonFiniteLossError
from lumirlib.training.launch import train
from lumirlib.training.pairs import epoch_pairs, evenly_spaced
from lumirlib.training.trainer import Trainer
from lumirlib.training.weights import load_model

PAPERS_ROWS = ("backbone", "BF", "BF-post", "CA", "CA+BF", "LK", "LC-1", "LC-2")


def config_for(cohort, seed=0, **changes):
    return make_config(parse_variant("backbone"), replace(TINY, **changes), cohort, seed, head_channels=4)


def weights(path):
    return load_checkpoint(path)["model"]


def same_weights(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# presets -------------------------------------------------------------------------------------------------------------


def test_the_paper_preset_is_the_papers_training():
    assert (PAPER.epochs, PAPER.learning_rate, PAPER.similarity_weight, PAPER.smoothness_weight) == (200, 4e-4, 1, 6)
    assert PAPER.apply(parse_variant("LC-2")) == parse_variant("LC-2")
    assert PAPER.differences_from_paper() == []


def test_demo_says_what_it_reduces():
    demo = get_preset("demo")
    assert demo.apply(parse_variant("backbone")).start_channels == 8
    assert demo.apply(parse_variant("LC-1")).start_channels == 16
    said = "; ".join(demo.differences_from_paper())
    assert "widths divided by 4" in said and "lambda1 = 1 instead of 6" in said and "4 mm" in said


def test_a_misspelt_preset_lists_the_choices():
    with pytest.raises(ValueError, match=r"preset must be one of smoke, demo, .*paper; got 'dmeo'"):
        get_preset("dmeo")
    with pytest.raises(ValueError, match="unknown option of preset 'demo'"):
        get_preset("demo", epoch=3)


def test_every_option_that_differs_from_the_paper_is_said():
    changed = get_preset("paper", similarity="mse", amsgrad=False, decay_power=0.5, similarity_weight=2.0)
    said = "; ".join(changed.differences_from_paper())
    for words in ("mse instead of ncc", "amsgrad False", "power 0.5", "lambda0 = 2"):
        assert words in said
    with pytest.raises(ValueError, match="epochs of preset 'demo' must be 1 or more, got 0"):
        get_preset("demo", epochs=0)


# pairs ---------------------------------------------------------------------------------------------------------------


def test_an_epoch_takes_each_scan_as_moving_once_and_never_itself_as_fixed(cohort):
    for epoch in range(5):
        pairs = list(epoch_pairs(cohort.train, 0, epoch))
        assert sorted(pair.moving.name for pair in pairs) == [subject.name for subject in cohort.train]
        assert all(pair.fixed != pair.moving for pair in pairs)


def test_pairs_depend_on_seed_and_epoch_alone(cohort):
    assert list(epoch_pairs(cohort.train, 3, 2)) == list(epoch_pairs(cohort.train, 3, 2))
    names = {tuple(p.name for p in epoch_pairs(cohort.train, s, e)) for s in range(3) for e in range(3)}
    assert len(names) > 6


def test_pairs_to_validate_are_spread_over_the_list():
    assert evenly_spaced(tuple(range(30)), 4) == (0, 10, 19, 29)
    assert evenly_spaced((1, 2), None) == evenly_spaced((1, 2), 5) == (1, 2)


# training ------------------------------------------------------------------------------------------------------------


def test_training_writes_a_log_and_the_best_epochs_weights(cohort, tmp_path):
    result = train(config_for(cohort, epochs=3), cohort, tmp_path, "cpu", progress=False)
    log = pd.read_csv(result.log)
    assert log["epoch"].tolist() == [0, 1, 2, 3]
    assert log["steps"].tolist() == [0, 4, 4, 4]
    assert np.isfinite(log.loc[1:, ["loss", "similarity", "smoothness", "val_dice", "val_ndv_percent"]]).all(axis=None)
    assert result.best_epoch == log.loc[1:, "val_dice"].idxmax()
    rates = log.loc[1:, "learning_rate"].to_numpy()
    assert rates == pytest.approx(TINY.learning_rate * (1 - np.arange(3) / 3) ** 0.9)
    fixed, moving = (cohort.image(subject) for subject in cohort.train[:2])
    reloaded = load_model(result.checkpoint, "cpu")
    assert torch.equal(result.model(fixed, moving), reloaded(fixed, moving))


def test_training_lowers_the_loss(cohort, tmp_path):
    config = config_for(cohort, epochs=10, learning_rate=3e-3)
    history = train(config, cohort, tmp_path, "cpu", progress=False).history
    assert history["loss"].iloc[-3:].mean() < history["loss"].iloc[1] - 0.02


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(cohort, tmp_path):
    found = [
        weights(train(config_for(cohort, seed), cohort, tmp_path / name, "cpu", progress=False).checkpoint)
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    ]
    assert same_weights(found[0], found[1])
    assert not same_weights(found[0], found[2])


@pytest.mark.parametrize("said", ["stopped after saving a checkpoint; the same call goes on from here", ""])
def test_ctrl_c_ends_the_command_with_a_sentence(said, small_cohort_json, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt(said) if said else KeyboardInterrupt

    monkeypatch.setattr(Trainer, "run", interrupted)
    given = ["--preset", "smoke", "--cohort", str(small_cohort_json), "--out", str(tmp_path), "--quiet"]
    assert cli.main(["run", "backbone", "--no-notebook", *given]) == 130
    error = capsys.readouterr().err
    assert error.startswith("lumirlib run: stopped") and "goes on from here" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_training_goes_on_to_the_same_weights(cohort, tmp_path, monkeypatch, number):
    config = config_for(cohort)
    whole = train(config, cohort, tmp_path / "whole", "cpu", progress=False)
    step, taken = Trainer.step, []

    def step_then_signal(self, batch, stop):
        taken.append(batch)
        if len(taken) == 6:  # in the middle of the second epoch
            os.kill(os.getpid(), number)
        return step(self, batch, stop)

    monkeypatch.setattr(Trainer, "step", step_then_signal)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        train(config, cohort, tmp_path / "cut", "cpu", progress=False)
    assert len(taken) == 6
    resumed = train(config, cohort, tmp_path / "cut", "cpu", progress=False)
    assert len(taken) == 8
    assert resumed.best_epoch == whole.best_epoch
    assert same_weights(weights(resumed.checkpoint), weights(whole.checkpoint))
    last = [weights(result.checkpoint.with_name("last.pt")) for result in (resumed, whole)]
    assert same_weights(*last)
    columns = ["epoch", "steps", "loss", "val_dice"]
    pd.testing.assert_frame_equal(resumed.history[columns], whole.history[columns])


def test_a_finished_run_is_not_trained_again_unless_asked(cohort, tmp_path, monkeypatch):
    config = config_for(cohort)
    train(config, cohort, tmp_path, "cpu", progress=False)
    step, taken = Trainer.step, []
    monkeypatch.setattr(Trainer, "step", lambda self, *given: taken.append(given) or step(self, *given))
    train(config, cohort, tmp_path, "cpu", progress=False)
    assert not taken
    train(config, cohort, tmp_path, "cpu", resume=False, progress=False)
    assert len(taken) == 8


def test_a_restart_forgets_the_finished_run_even_if_it_is_killed_at_once(cohort, tmp_path, monkeypatch):
    config = config_for(cohort)
    train(config, cohort, tmp_path, "cpu", progress=False)
    step, taken = Trainer.step, []

    def killed(self, batch, stop):
        raise KeyError("as if the power went")

    monkeypatch.setattr(Trainer, "step", killed)
    with pytest.raises(KeyError):
        train(config, cohort, tmp_path, "cpu", resume=False, progress=False)
    monkeypatch.setattr(Trainer, "step", lambda self, *given: taken.append(given) or step(self, *given))
    train(config, cohort, tmp_path, "cpu", progress=False)
    assert len(taken) == 8


def test_killed_between_log_and_checkpoint_nothing_is_lost(cohort, tmp_path, monkeypatch):
    config = config_for(cohort)
    whole = train(config, cohort, tmp_path / "whole", "cpu", progress=False)
    save = Trainer.save

    def killed_after_the_last_epoch(self):
        if self.state.epoch == 2:
            raise KeyError("as if the power went")
        save(self)

    monkeypatch.setattr(Trainer, "save", killed_after_the_last_epoch)
    with pytest.raises(KeyError):
        train(config, cohort, tmp_path / "cut", "cpu", progress=False)
    monkeypatch.setattr(Trainer, "save", save)
    resumed = train(config, cohort, tmp_path / "cut", "cpu", progress=False)
    assert pd.read_csv(resumed.log)["epoch"].tolist() == [0, 1, 2]
    assert same_weights(weights(resumed.checkpoint), weights(whole.checkpoint))


def test_pairs_without_common_labels_do_not_stop_the_choice_of_the_best_epoch(tmp_path):
    path = write_small_cohort(tmp_path / "small")
    (path.parent / "labelsVal" / "SMALL_0102_0000.nii.gz").unlink()
    content = json.loads(path.read_text())
    del content["labelled"]
    path.write_text(json.dumps(content))
    cohort = load_cohort(path)
    result = train(config_for(cohort, validation_pairs=None), cohort, tmp_path, "cpu", progress=False)
    assert result.history["val_dice"].notna().all()


def test_a_non_finite_loss_stops_names_step_pair_and_level_and_saves_the_batch(cohort, tmp_path, monkeypatch):
    config = config_for(cohort)
    ncc, calls = losses.ncc_loss, []

    def nan_at_level_1(warped, fixed, *others):
        broken = warped.requires_grad and len(calls) >= 6  # the third step
        calls.extend([1] if warped.requires_grad else [])
        small = warped.shape[2] == SMALL_SHAPE[0] // 2
        return ncc(warped, fixed, *others) * (math.nan if small and (broken or len(calls) > 6) else 1)

    monkeypatch.setattr(multilevel, "ncc_loss", nan_at_level_1)
    trainer = Trainer(config, cohort, tmp_path, CPU, progress=False)
    message = r"became nan \(first in the similarity of level 1\) in epoch 1, step 3, fixed .*SMALL_.* moving .*SMALL_"
    with pytest.raises(NonFiniteLossError, match=message):
        trainer.run()
    saved = load_checkpoint(next(trainer.folder.glob("nonfinite_epoch1_step3_*.pt")))
    pair = list(epoch_pairs(cohort.train, 0, 0))[2]
    assert saved["names"] == [pair.name]
    assert torch.equal(saved["fixed"], cohort.image(pair.fixed))
    assert torch.equal(saved["moving"], cohort.image(pair.moving))
    assert same_weights(saved["model"], trainer.model.state_dict())
    assert all(torch.isfinite(weight).all() for weight in saved["model"].values())


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(cohort, tmp_path):
    trainer = Trainer(config_for(cohort), cohort, tmp_path, CPU, progress=False)
    trainer.model.estimators[1].conv2.bias.register_hook(lambda gradient: gradient * math.inf)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    message = r"the gradient of estimators\.1\.conv2\.bias is not finite in epoch 1, step 1, fixed .*SMALL_"
    with pytest.raises(NonFiniteLossError, match=message):
        trainer.run()
    assert same_weights(before, trainer.model.state_dict())


def test_a_cohort_without_labels_is_judged_by_similarity(tmp_path):
    path = write_small_cohort(tmp_path / "small", labelled=[])
    for part in ("labelsTr", "labelsVal"):
        shutil.rmtree(path.parent / part)
    cohort = load_cohort(path)
    result = train(config_for(cohort), cohort, tmp_path, "cpu", progress=False)
    assert result.history["val_dice"].isna().all()
    assert result.best_epoch == result.history.loc[1:, "val_similarity"].idxmax()


def test_torn_and_foreign_checkpoints_are_refused_by_name(cohort, tmp_path):
    config = config_for(cohort)
    result = train(config, cohort, tmp_path, "cpu", progress=False)
    last = result.checkpoint.with_name("last.pt")
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read .*last\.pt as a checkpoint"):
        train(config, cohort, tmp_path, "cpu", progress=False)
    torch.save({"weights": torch.zeros(1)}, last)
    with pytest.raises(ValueError, match=r"last\.pt is not a checkpoint of this package"):
        train(config, cohort, tmp_path, "cpu", progress=False)
    last.write_bytes(whole)
    other = Trainer(config_for(cohort, seed=1), cohort, tmp_path, CPU, progress=False)
    other.folder = last.parent
    with pytest.raises(ValueError, match=r"last\.pt belongs to another configuration"):
        other.resume()


def test_a_full_disk_leaves_the_previous_checkpoint(cohort, tmp_path, monkeypatch):
    trainer = Trainer(config_for(cohort), cohort, tmp_path, CPU, progress=False)
    trainer.save()
    before = trainer.last_path.read_bytes()

    def disk_full(content, to):
        to.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*last\.pt .*No space left.* before it is kept"):
        trainer.save()
    assert trainer.last_path.read_bytes() == before
    assert [file.name for file in trainer.folder.iterdir()] == ["last.pt"]


def test_a_disk_that_is_really_full_leaves_the_previous_checkpoint(cohort, tmp_path):
    trainer = Trainer(config_for(cohort), cohort, tmp_path, CPU, progress=False)
    trainer.save()
    before = trainer.last_path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        with pytest.raises(OSError, match=r"cannot write the checkpoint .*last\.pt"):
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert trainer.last_path.read_bytes() == before
    assert [file.name for file in trainer.folder.iterdir()] == ["last.pt"]
    trainer.save()


def test_a_batch_of_two_pairs_takes_the_mean_of_their_gradients(cohort, tmp_path, monkeypatch):
    def gradients(batch_size, steps):
        trainer = Trainer(config_for(cohort, batch_size=batch_size), cohort, tmp_path, CPU, progress=False)
        found, zero_grad = [], trainer.optimizer.zero_grad

        def keep_gradients(optimizer):
            found.append(torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()]))

        monkeypatch.setattr(torch.optim.Adam, "step", keep_gradients)
        stop, batches = interrupts.StopRequest(), trainer.batches()
        for _ in range(steps):
            batch = next(batches)
            images = (torch.cat([cohort.image(getattr(pair, end)) for pair in batch]) for end in ("fixed", "moving"))
            trainer.step(Batch(batch, *images), stop)
            zero_grad()
        return found

    first, second = gradients(1, 2)
    (both,) = gradients(2, 1)
    assert torch.allclose(both, (first + second) / 2, atol=1e-7)


def test_the_last_batch_of_an_epoch_is_filled_up(cohort, tmp_path):
    trainer = Trainer(config_for(cohort, batch_size=3), cohort, tmp_path, CPU, progress=False)
    batches = list(trainer.batches())
    assert [len(batch) for batch in batches] == [3, 3]
    assert {pair.moving.name for batch in batches for pair in batch[:4]} == {subject.name for subject in cohort.train}


def test_training_needs_scans_validation_pairs_and_the_presets_resolution(tmp_path):
    lonely = load_cohort(write_small_cohort(tmp_path / "lonely", training=1))
    with pytest.raises(ValueError, match="training needs at least 2 scans, the cohort has 1"):
        train(config_for(lonely), lonely, tmp_path, "cpu", progress=False)
    path = write_small_cohort(tmp_path / "blind", validation=0)
    shutil.rmtree(path.parent / "labelsTr")
    blind = load_cohort(path)
    with pytest.raises(ValueError, match="names no validation pairs"):
        train(config_for(blind), blind, tmp_path, "cpu", progress=False)
    with pytest.raises(ValueError, match="was loaded at 1 mm, preset 'tiny' works at 2 mm"):
        config_for(lonely, resolution_mm=2)


# from parameters to files --------------------------------------------------------------------------------------------


def test_a_run_writes_one_row_per_pair_and_metric_with_provenance(small_cohort_json, tmp_path):
    run = small_run(small_cohort_json, tmp_path)
    table = run.evaluate(run.train(progress=False), progress=False)
    written = pd.read_csv(run.metrics_path)
    assert len(written) == len(table) == 3 * 7  # three pairs; four metrics, textbook TRE, mean displacement, seconds
    assert not written.duplicated(["pair", "metric"]).any()
    facts = json.loads(run.metrics_path.with_suffix(".json").read_text())
    assert facts["trained_by"] == [f"{run.commit}, {facts['device']}"]
    for key in ("commit", "command", "seed", "cohort", "preset", "device", "versions", "written", "parameters"):
        assert facts[key] not in (None, ""), key
    assert facts["command"].startswith("papermill notebooks/run_ablation.ipynb")
    assert str(tmp_path) not in run.metrics_path.with_suffix(".json").read_text()  # no path of this machine


def test_a_run_on_coarse_voxels_is_scored_on_the_files_own_and_says_so(small_cohort_json, tmp_path):
    run = small_run(small_cohort_json, tmp_path, resolution_mm=2, levels=2)
    assert "registered at 2 mm, scored at 1 mm" in run.title and "labels are scored" not in run.describe()
    table = run.evaluate(run.train(progress=False), progress=False)
    before = run.before_registration(progress=False)
    facts, before_facts = (
        json.loads(path.read_text())
        for path in (run.metrics_path.with_suffix(".json"), next((tmp_path / "metrics").glob("ZeroDisp*_1mm_*.json")))
    )
    assert (facts["resolution_mm"], facts["scored_mm"], facts["scored_labels"]) == (2, 1, 133)
    assert (before_facts["resolution_mm"], before_facts["scored_mm"]) == (1, 1)
    assert set(table["metric"]) - set(before["metric"]) == {"ndv_working_percent"}
    fine = small_run(small_cohort_json, tmp_path)
    assert set(fine.before_registration(progress=False)["run"]) == set(before["run"])  # one for all resolutions


def test_zero_displacement_is_evaluated_once_on_the_same_pairs(small_cohort_json, tmp_path, monkeypatch):
    run = small_run(small_cohort_json, tmp_path)
    run = replace(run, commit="a" * 40)
    first = run.before_registration(progress=False)
    assert first["pair"].nunique() == 3
    assert (first.loc[first["metric"] == "ndv_percent", "value"] == 0).all()
    evaluate, calls = evaluate_method, []
    monkeypatch.setattr(run_module, "evaluate_method", lambda *a, **k: calls.append(a) or evaluate(*a, **k))
    columns = ["pair", "metric"]
    pd.testing.assert_frame_equal(run.before_registration(progress=False)[columns], first[columns])
    assert not calls
    replace(run, commit="b" * 40).before_registration(progress=False)  # other code may score otherwise
    assert len(calls) == 1


def test_a_filter_is_put_behind_the_checkpoint_of_a_trained_backbone(small_cohort_json, tmp_path, monkeypatch):
    plain = small_run(small_cohort_json, tmp_path).train(progress=False)
    filtered = small_run(small_cohort_json, tmp_path, variant="BF-post", bilateral_sigma=0.7)
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("trained again"))
    result = filtered.train(progress=False)
    assert result.checkpoint == plain.checkpoint and result.best_epoch == plain.best_epoch
    fixed, moving = (filtered.cohort.image(subject) for subject in (filtered.pairs[0].fixed, filtered.pairs[0].moving))
    with torch.no_grad():
        expected = joint_bilateral_filter(plain.model(fixed, moving), fixed, torch.tensor([0.7, 0.7, 0.7, 0.1]), 5)
        assert torch.allclose(result.model(fixed, moving), expected, atol=1e-5)
    assert result.val_dice != plain.val_dice  # that of the filtered displacement, though the checkpoint is the same
    filtered.evaluate(result, progress=False)
    facts = json.loads(filtered.metrics_path.with_suffix(".json").read_text())
    assert facts["weights"] == plain.checkpoint.parent.name and facts["method"] == "BF-post"
    assert facts["parameters"] == sum(p.numel() for p in plain.model.parameters()) + 4


def test_a_filter_behind_a_network_that_has_one_and_other_changes_of_trained_weights_are_refused(
    small_cohort_json, tmp_path
):
    checkpoint = small_run(small_cohort_json, tmp_path, variant="BF").train(progress=False).checkpoint
    with pytest.raises(ValueError, match="BF was trained with a bilateral filter; none can be put behind it"):
        load_model(checkpoint, bilateral_window=5)
    with pytest.raises(ValueError, match="only a bilateral filter can be added to trained weights, got cascade"):
        load_model(checkpoint, cascade="compositional")
    run = small_run(small_cohort_json, tmp_path, variant="CA+BF-post")
    with pytest.raises(ValueError, match=r"CA\+BF-post is not trained: train CA"):
        Trainer(run.config, run.cohort, tmp_path, run.engine)


def test_a_filter_set_behind_by_option_takes_the_same_backbone():
    by_name, by_option = parse_variant("CA+BF-post"), parse_variant("CA+BF", bilateral_mode="post")
    assert by_name.base_row() == by_option.base_row() == parse_variant("CA")


def test_options_of_later_versions_leave_the_names_of_earlier_runs_as_they_were(embedded_cohort):
    config = make_config(parse_variant("backbone"), get_preset("demo"), embedded_cohort, 0)
    assert "bilateral_mode" not in config.as_dict()["variant"]
    assert (
        "bilateral_mode"
        in make_config(parse_variant("BF-post"), get_preset("demo"), embedded_cohort, 0).as_dict()["variant"]
    )
    content = replace(config, cohort_digest="2d96246082c21149")
    assert content.run == "backbone_embedded_demo_seed0_2120c5ad"  # as version 0.1.0 wrote it


def test_every_committed_run_of_the_papers_network_still_has_its_name():
    found = 0
    for path in sorted((project_root() / "results" / "metrics").glob("*.json")):
        about = json.loads(path.read_text())
        if "preset" not in about or about.get("options", {}).get("name") not in PAPERS_ROWS:
            continue
        row, preset = row_from_options(about["options"]), Preset(**about["preset"])
        config = RunConfig(row, preset, about["cohort"], about["cohort_digest"], about["seed"])
        config = replace(config, init_digest=(about.get("started_from") or "").rpartition(", ")[2])
        assert config.run == about["run"] == path.stem
        assert replace(config, row=row.base_row()).run == about["weights"]
        found += 1
    assert found >= 7


def test_a_run_is_described_with_what_it_is_not(small_cohort_json, tmp_path):
    run = small_run(small_cohort_json, tmp_path)
    assert "not LUMIR" in run.title and "not the paper's training" in run.describe()
    embedded = Run.prepare(preset="demo", out=str(tmp_path))
    assert "simulated" in embedded.title and "not a LUMIR result" in embedded.title
    assert "widths divided by 4" in embedded.describe()
    assert embedded.config.run != Run.prepare(preset="demo", out=str(tmp_path), seed=1).config.run


def test_options_are_set_after_the_presets(small_cohort_json, tmp_path):
    run = Run.prepare(
        preset="smoke",
        cohort=str(small_cohort_json),
        out=str(tmp_path),
        data_root=str(small_cohort_json.parent),
        options={"resolution_mm": 1, "levels": 2, "start_channels": 6, "smoothness_weight": 2, "epochs": None},
    )
    assert (run.config.row.levels, run.config.row.start_channels) == (2, 6)
    assert run.config.preset.smoothness_weight == 2.0 and run.config.preset.epochs == 2
    assert "smoothness_weight=2" in run.title and '-y \'{"options": {"resolution_mm": 1' in run.command
    assert provenance.redact_path("../elsewhere/dataset.json") == "<folder>/dataset.json"
    assert "-p data_root '<folder>/small'" in run.command and str(tmp_path) not in run.command


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"variant": "backbon"}, "unknown variant 'backbon'.* backbone, LK, LC-1, LC-2, CA, BF"),
        ({"preset": "dmeo"}, "preset must be one of smoke, demo"),
        ({"cohort": "embeded"}, "cohort must be one of embedded, lumir, brains"),
        ({"seed": -1}, "seed must be a whole number from 0, got -1"),
        ({"engine": "gpu"}, "device must be auto, cpu or a device of this machine, got 'gpu'"),
        ({"seed": "0"}, "seed must be a whole number from 0, got '0'"),
        ({"options": {"lambda1": 3}}, "unknown option lambda1: choose from start_channels, head_channels, cascade"),
        ({"options": {"epochs": 2.5}}, "epochs must be a whole number, got 2.5"),
        ({"options": {"smoothness_weight": "6"}}, "smoothness_weight must be a number, got '6'"),
        ({"options": {"smoothness_weight": -1}}, "smoothness_weight of preset 'demo' must be 0 or more, got -1"),
        ({"options": {"similarity": "lncc"}}, "similarity of preset 'demo' must be one of ncc, mse; got 'lncc'"),
        ({"options": {"window": 4}}, "window of preset 'demo' must be odd and positive, got 4"),
        ({"options": {"cascade": "sum"}}, "cascade must be one of additive, compositional; got 'sum'"),
        ({"variant": "BF+BF-post"}, "contradict each other: bilateral_mode would be 'joint' and 'post'"),
    ],
)
def test_misspelt_parameters_fail_with_the_choices(parameters, message):
    with pytest.raises(ValueError, match=message):
        Run.prepare(**parameters)
