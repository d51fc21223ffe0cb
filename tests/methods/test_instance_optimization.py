"""Instance optimization: that it descends from the network's prediction, when it ends, and that a row of it runs."""

import json
import math
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch
from small_runs import small_run

from lumirlib import build_model, parse_variant
from lumirlib.methods import parse_row
from lumirlib.methods.instance_optimization import InstanceOptimization
from lumirlib.methods.presets import get_preset
from lumirlib.study import costs
from lumirlib.study.jobs import plan
from lumirlib.study.paper import uses_other_weights
from lumirlib.training import trainer

SHAPE = (9, 12, 15)
PRESET = get_preset("smoke", window=3)
OBJECTIVE = partial(parse_variant("backbone").objective, preset=PRESET)


def images():
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, side) for side in SHAPE], indexing="ij"))
    shift = torch.tensor([0.2, -0.1, 0.15]).view(3, 1, 1, 1)
    return [(1 - by.square().sum(0)).clamp_min(0)[None, None] for by in (grid, grid + shift)]


def small_model(name="LC-2", **options):
    torch.manual_seed(0)
    model = build_model(name, start_channels=4, head_channels=5, levels=3, **options)
    for estimator in model.estimators:
        torch.nn.init.normal_(estimator.conv3.weight, std=0.01)
    return model.eval()


@pytest.mark.parametrize("name", ["backbone", "LC-2", "BF"])
def test_the_objective_falls_and_the_weights_stay(name):
    model, (fixed, moving) = small_model(name), images()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    method = InstanceOptimization(model, OBJECTIVE, steps=8, learning_rate=0.1, tolerance=0.0)
    with torch.no_grad():
        displacement = method(fixed, moving)
    found = method.last_run
    assert displacement.shape == (1, 3, *SHAPE) and not displacement.requires_grad
    assert found["optimization_steps"] == 8 and found["optimization_seconds"] > 0
    assert found["optimization_loss_after"] < 0.98 * found["optimization_loss_before"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.inference_mode():
        assert torch.allclose(method(fixed, moving), displacement, atol=1e-6)


def test_it_starts_at_the_networks_prediction_and_keeps_it_where_nothing_is_better():
    model, (fixed, moving) = small_model(), images()
    method = InstanceOptimization(model, OBJECTIVE, steps=2, learning_rate=1e4)  # leaves the image at once
    with torch.no_grad():
        assert torch.equal(method(fixed, moving), model(fixed, moving))
        expected = OBJECTIVE(model.fields(fixed, moving), fixed, moving)["total"]
    assert method.last_run["optimization_loss_before"] == method.last_run["optimization_loss_after"] == float(expected)


def test_it_ends_when_the_loss_has_fallen_too_little_within_the_patience():
    model, (fixed, moving) = small_model(), images()
    method = InstanceOptimization(model, OBJECTIVE, steps=50, learning_rate=1e-6, tolerance=0.01, patience=3)
    method(fixed, moving)
    assert method.last_run["optimization_steps"] == 3


def test_a_loss_that_is_not_finite_ends_it_with_the_best_so_far_or_fails_at_the_start():
    model, (fixed, moving) = small_model(), images()

    def breaking(after):
        losses = iter([1.0] * after + [math.nan] * 9)
        return lambda predicted, *_: {"total": next(losses) + 0 * predicted.displacements[0].sum()}

    with torch.no_grad():
        assert torch.equal(InstanceOptimization(model, breaking(1), 5)(fixed, moving), model(fixed, moving))
    with pytest.raises(FloatingPointError, match="objective of the network's prediction must be finite, got nan"):
        InstanceOptimization(model, breaking(0), 5)(fixed, moving)
    with pytest.raises(ValueError, match="moving must hold finite values only"):
        InstanceOptimization(model, OBJECTIVE, 5)(fixed, moving * math.nan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instance_steps": -1}, "instance_steps must be a whole number from 1, got -1"),
        ({"instance_patience": 0}, "instance_patience must be a whole number from 1, got 0"),
        ({"instance_learning_rate": 0}, "instance_learning_rate must be above 0, got 0"),
        ({"instance_tolerance": 1.5}, "instance_tolerance must be from 0 to below 1, got 1.5"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        parse_variant("IO", **options)


def test_a_row_with_it_uses_the_weights_of_the_row_without(tmp_path):
    assert parse_variant("backbone+io").name == "IO"
    assert parse_variant("BF-post+IO").base_row() == parse_variant("backbone")
    assert parse_variant("CA+BF+IO", instance_learning_rate=0.3).base_row() == parse_variant("CA+BF")
    assert uses_other_weights("LC-2+IO") and not uses_other_weights("LC-2")
    planned = plan(["IO", "backbone"], [0], "demo", "embedded", "", str(tmp_path))
    assert [run.row for run in planned] == ["backbone", "IO"]


def test_a_row_with_it_is_evaluated_behind_the_trained_checkpoint_and_states_its_time(
    small_cohort_json, tmp_path, monkeypatch
):
    plain = small_run(small_cohort_json, tmp_path).train(progress=False)
    run = small_run(small_cohort_json, tmp_path, variant="IO", instance_steps=3, instance_tolerance=0)
    monkeypatch.setattr(trainer.Trainer, "step", lambda *_: pytest.fail("trained again"))
    result = run.train(progress=False)
    assert result.checkpoint == plain.checkpoint and result.val_dice != plain.val_dice
    run.evaluate(result, progress=False)
    written = pd.read_csv(run.metrics_path).pivot_table(index="pair", columns="metric", values="value")
    assert (written["optimization_steps"] == 3).all()
    assert (written["optimization_loss_after"] < written["optimization_loss_before"]).all()
    assert ((written["optimization_seconds"] > 0) & (written["optimization_seconds"] < written["seconds"])).all()
    facts = json.loads(run.metrics_path.with_suffix(".json").read_text())
    assert facts["method"] == "IO" and facts["weights"] == plain.checkpoint.parent.name
    assert facts["options"]["instance_steps"] == 3 and "instance optimization" in run.describe()
    assert facts["parameters"] == sum(p.numel() for p in plain.model.parameters())


def test_it_is_counted_in_what_a_registration_costs(monkeypatch):
    optimized, forward = [], InstanceOptimization.forward
    monkeypatch.setattr(InstanceOptimization, "forward", lambda *given: optimized.append(1) or forward(*given))
    preset = get_preset("smoke")
    row = replace(preset.apply(parse_row("IO")), instance_steps=2, instance_tolerance=0.0)
    found = costs.measure(row, preset, "cpu", 1)
    assert optimized and found["seconds_per_pair"] > 0
    assert math.isnan(found["seconds_per_step"])
