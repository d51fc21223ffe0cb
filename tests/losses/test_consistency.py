"""Both directions in one pass, losses on their agreement, and rows trained with them."""

import math

import pandas as pd
import pytest
import torch
from small_runs import small_run

from lumirlib import build_model, cli, metrics, parse_variant, spatial
from lumirlib.losses.consistency import group_consistency_loss, inverse_consistency_loss
from lumirlib.methods.presets import get_preset

SHAPE = (9, 12, 15)
PRESET = get_preset("smoke", window=3)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair():
    return random(1, 1, *SHAPE, seed=1), random(1, 1, *SHAPE, seed=2)


def smooth(seed, scale=1.0, dtype=torch.float32):
    return spatial.resize(scale * (2 * random(1, 3, 3, 3, 3, seed=seed, dtype=dtype) - 1), SHAPE)


def narrow(name="backbone", **options):
    torch.manual_seed(0)
    model = build_model(name, **{"start_channels": 4, "head_channels": 5, "levels": 3, **options})
    for estimator in model.estimators:
        torch.nn.init.normal_(estimator.conv3.weight, std=0.02)
    return model


@pytest.mark.parametrize("name", ["backbone", "LC-2+CA", "BF"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_directions_in_one_pass_are_those_of_two_passes(name, checkpointing):
    model, (fixed, moving) = narrow(name), pair()
    model.checkpointing = checkpointing
    encoded = []
    model.encoder.register_forward_hook(lambda _, images, features: encoded.append(len(features)))
    both = model.fields(fixed, moving, both_directions=True)
    assert encoded == [2]  # each image once
    for found, expected in ((0, model.fields(fixed, moving)), (1, model.fields(moving, fixed))):
        for own, others in zip(both, expected, strict=True):
            assert all(torch.allclose(a[found : found + 1], b, atol=1e-5) for a, b in zip(own, others, strict=True))


def test_loss_of_both_directions_is_the_mean_of_both_with_their_inconsistency_added():
    variant, (fixed, moving), model = parse_variant("SYM", inverse_consistency_weight=0.3), pair(), narrow()
    terms = variant.loss_terms(model, fixed, moving, PRESET, torch.Generator())
    plain = [
        parse_variant("backbone").loss_terms(model, *both, PRESET, torch.Generator())
        for both in ((fixed, moving), (moving, fixed))
    ]
    for name in ("similarity", "smoothness"):
        assert float(terms[name]) == pytest.approx(sum(float(one[name]) for one in plain) / 2, abs=1e-5)
    with torch.no_grad():
        error = inverse_consistency_loss(model(fixed, moving), model(moving, fixed))
    assert float(terms["inverse_consistency"]) == pytest.approx(float(error), rel=1e-4)
    expected = sum(float(one["total"]) for one in plain) / 2 + 0.3 * float(error)
    assert float(terms["total"]) == pytest.approx(expected, rel=1e-5)
    terms["total"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_without_the_option_the_loss_is_that_of_the_paper_alone():
    terms = parse_variant("backbone").loss_terms(narrow(), *pair(), PRESET, torch.Generator())
    assert list(terms) == ["total", "similarity", "smoothness"]


def test_inverse_consistency_loss_is_zero_for_a_shift_and_its_inverse_and_the_mean_square_else():
    shift = torch.tensor([1.5, -2.0, 0.25]).view(1, 3, 1, 1, 1).expand(1, 3, *SHAPE)
    assert float(inverse_consistency_loss(shift, -shift)) == pytest.approx(0, abs=1e-9)
    assert float(inverse_consistency_loss(shift, shift * 0)) == pytest.approx(1.5**2 + 2**2 + 0.25**2)


def test_inverse_consistency_loss_agrees_with_the_measure_that_is_reported():
    forward, backward = smooth(3), smooth(4)
    forward, backward = (field * spatial.stays_inside(5 * field) for field in (forward, backward))  # none leaves
    squares = [spatial.compose(*both).square().sum(dim=1).mean() for both in ((forward, backward), (backward, forward))]
    assert float(inverse_consistency_loss(forward, backward)) == pytest.approx(float(sum(squares)) / 2, rel=1e-5)
    mean = metrics.inverse_consistency_error(forward, backward, torch.ones(1, 1, *SHAPE))
    assert 0.1 < mean < float(squares[0]) ** 0.5  # a mean of lengths is below the root of their mean square


def test_gradients_of_both_losses_equal_finite_differences():
    fields = [smooth(seed, 0.4, torch.float64)[..., :3, :4, :3].contiguous().requires_grad_() for seed in (5, 6, 7)]
    assert torch.autograd.gradcheck(inverse_consistency_loss, fields[:2])
    assert torch.autograd.gradcheck(group_consistency_loss, fields)


def test_group_consistency_loss_is_zero_where_the_direct_way_is_the_composition():
    first, second = smooth(8), smooth(9)
    direct = spatial.compose(first, second)
    assert float(group_consistency_loss(first, second, direct)) == 0
    assert float(group_consistency_loss(first, second, direct + 0.5)) == pytest.approx(0.75, rel=1e-5)


def test_voxels_that_leave_the_grid_do_not_count():
    outer = torch.full((1, 3, *SHAPE), 0.0)
    inner = torch.zeros(1, 3, *SHAPE)
    inner[:, 0, -1] = 100.0  # the last plane leaves
    assert spatial.stays_inside(inner).sum() == math.prod(SHAPE) - math.prod(SHAPE[1:])
    assert float(group_consistency_loss(outer, inner, torch.zeros_like(inner))) == 0


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="forward and backward must share"):
        inverse_consistency_loss(smooth(1), smooth(1)[..., :-1])
    with pytest.raises(ValueError, match="second and direct must share"):
        group_consistency_loss(smooth(1), smooth(1)[..., :-1], smooth(1))
    with pytest.raises(ValueError, match="inverse_consistency_weight needs both directions: set symmetric=true"):
        parse_variant("backbone", inverse_consistency_weight=1)
    with pytest.raises(ValueError, match="inverse_consistency_weight must be 0 or more, got -1"):
        parse_variant("SYM", inverse_consistency_weight=-1)


def test_a_symmetric_row_trains_logs_and_reports_its_inconsistency(small_cohort_json, tmp_path):
    run = small_run(small_cohort_json, tmp_path, variant="SYM")
    result = run.train(progress=False)
    trained = result.history.iloc[1:]
    expected = (
        trained["similarity"]
        + run.config.preset.smoothness_weight * trained["smoothness"]
        + run.config.row.inverse_consistency_weight * trained["inverse_consistency"]
    )
    assert trained["loss"].to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-5)
    run.evaluate(result, progress=False)
    written = pd.read_csv(run.metrics_path).set_index(["metric", "pair"])["value"]
    pair_of_run = run.pairs[0]
    fixed, moving = run.cohort.image(pair_of_run.fixed), run.cohort.image(pair_of_run.moving)
    with torch.no_grad():
        error = metrics.inverse_consistency_error(result.model(fixed, moving), result.model(moving, fixed), moving)
    assert written["inverse_consistency_mm", pair_of_run.name] == pytest.approx(error, rel=1e-4)  # voxels of 1 mm


def test_inverse_consistency_of_any_row_is_measured_where_it_is_asked_for(small_cohort_json, tmp_path):
    arguments = [
        "--preset",
        "smoke",
        "--cohort",
        str(small_cohort_json),
        "--out",
        str(tmp_path),
        "--quiet",
        "--set",
        "resolution_mm=1",
        "channel_divisor=16",
        "levels=2",
        "epochs=1",
        "steps_per_epoch=1",
    ]
    assert cli.main(["run", "backbone", "--no-notebook", *arguments]) == 0
    (written,) = (tmp_path / "metrics").glob("*.csv")
    assert "inverse_consistency_mm" not in set(pd.read_csv(written)["metric"])
    assert cli.main(["run", "backbone", "--no-notebook", *arguments[:7], "--consistency", *arguments[7:]]) == 0
    assert "inverse_consistency_mm" in set(pd.read_csv(written)["metric"])
