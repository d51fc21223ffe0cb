"""Several passes of each level (REC): the cascade, the loss, and that they go with the other options."""

from dataclasses import replace

import pytest
import torch
from known_fields import ConstantVelocity, known_velocity
from torch import nn

from lumirlib import build_model, losses, parse_variant, spatial
from lumirlib.methods.instance_optimization import InstanceOptimization
from lumirlib.methods.presets import get_preset, split_options
from lumirlib.models import RegistrationNetwork
from lumirlib.models.backbone import join_levels, join_velocities
from lumirlib.study import costs
from lumirlib.training.divergence import first_non_finite

SHAPE = (9, 8, 7)


def images(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [losses.gaussian_smooth(torch.rand(1, 1, *SHAPE, generator=generator)) for _ in range(2)]


def small(passes, name="COMP", **options):
    torch.manual_seed(0)
    model = build_model(name, start_channels=4, head_channels=5, levels=2, passes=passes, **options)
    for estimator in model.estimators:
        nn.init.normal_(estimator.conv3.weight, std=0.05)
    return model.eval()


@pytest.mark.parametrize("cascade", ["additive", "compositional"])
def test_each_pass_is_joined_to_what_was_found_before_it(cascade):
    model = RegistrationNetwork(4, 5, cascade, levels=1, passes=3)
    model.estimators = nn.ModuleList([ConstantVelocity(known_velocity(1.5))])
    own = expected = spatial.integrate(known_velocity(1.5)(SHAPE), 7)
    found = model.fields(*images()).displacements
    for displacement in reversed(found):
        assert torch.allclose(displacement, expected, atol=1e-6)
        expected = own + expected if cascade == "additive" else own + spatial.warp(expected, own)
    assert len(found) == 3


def test_a_later_pass_reads_the_features_as_warped_by_the_former_ones():
    model, (fixed, moving) = small(2), images()
    fields = model.fields(fixed, moving)
    assert [tuple(field.shape[2:]) for field in fields.velocities] == [SHAPE, SHAPE, (5, 4, 4), (5, 4, 4)]
    fixed_features, moving_features = model.encode(fixed, moving)
    for entry in (0, 1):
        before = fields.displacements[entry + 1]
        if entry == 1:
            before = spatial.resize_displacement(before, SHAPE, [9 / 5, 8 / 4, 7 / 4])
        expected = model.estimators[0](fixed_features, spatial.warp(moving_features, before))
        assert torch.allclose(fields.velocities[entry], expected, atol=1e-5)
    assert (fields.velocities[0] - fields.velocities[1]).abs().max() > 1e-3  # the second sees something else
    assert torch.allclose(join_velocities(fields.velocities, "compositional")[0], fields.displacements[0], atol=1e-6)


def test_one_pass_is_the_network_without_the_option():
    once, plain = small(1), small(1, "LC-2")
    assert torch.equal(once(*images()), plain(*images()))
    assert parse_variant("COMP+REC").passes == 2 and parse_variant("COMP").cascade == "compositional"
    assert "2 passes" in parse_variant("REC").describe() and "passes" not in parse_variant("COMP").describe()


def test_the_loss_compares_each_levels_last_pass_and_smooths_all():
    fields, (fixed, moving) = small(2).fields(*images()), images()
    found = losses.registration_loss(moving, fixed, *fields, 1.0, 2.0, 3, passes=2)
    last = losses.registration_loss(moving, fixed, fields.displacements[::2], fields.velocities[::2], 1.0, 2.0, 3)
    smoothness = sum(
        weight * losses.diffusion_loss(velocity)
        for weight, velocity in zip((1, 1, 0.5, 0.5), fields.velocities, strict=True)
    )
    assert torch.allclose(found["similarity"], last["similarity"])
    assert torch.allclose(found["smoothness"], smoothness) and smoothness > 1.01 * last["smoothness"]
    assert torch.allclose(found["total"], found["similarity"] + 2 * smoothness)
    row, preset = parse_variant("COMP+REC"), get_preset("smoke", window=3, smoothness_weight=2.0)
    assert torch.allclose(row.objective(fields, fixed, moving, preset)["total"], found["total"])


@pytest.mark.parametrize("name", ["BF", "CA", "ANTI", "FORCE", "LK"])
def test_it_goes_with_other_schemes_and_recomputation_changes_nothing(name):
    model = small(2, name).train()
    gradients = []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        model.zero_grad()
        model.fields(*images()).displacements[0].square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_passes_share_the_rate_of_instance_optimization():
    """Adam's first step is the rate, whatever the gradient."""
    row, preset = parse_variant("COMP+REC"), get_preset("smoke", window=3)
    lengths = {}
    for passes in (1, 2):
        model, (fixed, moving), own = small(passes), images(), replace(row, passes=passes)
        seen = []

        def objective(predicted, *rest, seen=seen, own=own):
            seen.append([velocity.detach().clone() for velocity in predicted.velocities])
            return own.objective(predicted, *rest, preset)

        InstanceOptimization(model, objective, steps=1, learning_rate=0.08)(fixed, moving)
        lengths[passes] = [float((after - before).abs().max()) for before, after in zip(*seen, strict=True)]
    assert lengths[1] == pytest.approx([0.08] * 2, rel=1e-3) and lengths[2] == pytest.approx([0.04] * 4, rel=1e-3)


def test_instance_optimization_descends_on_the_velocities_of_all_passes():
    row, preset = parse_variant("COMP+REC"), get_preset("smoke", window=3)
    method = InstanceOptimization(small(2), lambda *given: row.objective(*given, preset), steps=5, learning_rate=0.05)
    method(*images())
    assert method.last_run["optimization_loss_after"] < method.last_run["optimization_loss_before"]


def test_a_broken_velocity_is_told_with_its_level():
    model = small(2)
    nn.init.constant_(model.estimators[1].conv3.bias, float("inf"))
    row = parse_variant("COMP+REC", start_channels=4, head_channels=5, levels=2)
    assert first_non_finite(row, model, *images(), get_preset("smoke", window=3)) == "the velocity of level 1"


def test_estimators_are_paid_for_in_each_pass_and_the_encoder_once():
    once, twice, thrice = (
        costs.multiply_adds(parse_variant("COMP", start_channels=4, levels=2, passes=passes), (12, 16, 20))
        for passes in (1, 2, 3)
    )
    assert thrice - twice == twice - once > 0 and once > twice - once
    assert costs.count_parameters(parse_variant("REC")) == costs.count_parameters(parse_variant("backbone"))


@pytest.mark.parametrize("name", ["COMP", "COMP+BF", "backbone"])
def test_a_refinement_is_a_further_pass_of_the_finest_level_in_registration_alone(name):
    model, (fixed, moving) = small(2, name), images()
    plain, trained_on = model(fixed, moving), model.fields(fixed, moving)
    model.refinements = 2
    assert all(
        torch.equal(a, b) for a, b in zip(model.fields(fixed, moving).velocities, trained_on.velocities, strict=True)
    )
    once = small(2, name, refinements=1)(fixed, moving)
    assert (once - plain).abs().max() > 1e-3 and (model(fixed, moving) - once).abs().max() > 1e-3
    # by hand: the result without the filter, one velocity more, joined, and then the filter
    bare = small(2, name)
    bare.bilateral_filter = None
    before = bare(fixed, moving)
    velocity = bare.estimators[0](
        *(
            features if k == 0 else spatial.warp(features, before)
            for k, features in enumerate(bare.encode(fixed, moving))
        ),
    )
    expected = join_levels(spatial.integrate(velocity, 7), before, bare.cascade)
    if model.bilateral_filter is not None:
        expected = model.bilateral_filter(expected, fixed)
    assert torch.allclose(once, expected, atol=1e-5)


def test_a_refinement_changes_neither_training_nor_instance_optimization():
    row, preset, (fixed, moving) = parse_variant("COMP+REC+REF"), get_preset("smoke", window=3), images()
    assert row.passes == 2 and row.refinements == 4 and "4 further passes" in row.describe()
    assert "1 further pass of" in replace(row, refinements=1).describe()
    models = small(2), small(2, refinements=1)
    terms = [row.loss_terms(model, fixed, moving, preset, torch.Generator())["total"] for model in models]
    assert torch.equal(*terms)
    optimized = [InstanceOptimization(model, lambda *given: row.objective(*given, preset), steps=2) for model in models]
    assert torch.equal(*(method(fixed, moving) for method in optimized))


def test_a_refinement_costs_an_estimation_at_full_resolution():
    two, three, refined = (
        costs.multiply_adds(
            parse_variant("COMP", start_channels=4, levels=2, passes=passes, refinements=refinements), (12, 16, 20)
        )
        for passes, refinements in ((2, 0), (3, 0), (2, 1))
    )
    assert two < refined < three and (refined - two) / (three - two) > 0.8


def test_a_variant_may_have_its_own_learning_rate_as_baselines_have():
    preset = get_preset("demo")
    assert parse_variant("backbone").training_preset(preset) == preset
    assert parse_variant("LC-2+LR4").training_preset(preset).learning_rate == pytest.approx(4 * preset.learning_rate)
    chosen, own = split_options("demo", parse_variant("LR4"), {"learning_rate": 0.005})
    assert chosen.learning_rate == 0.005 and own == {}  # what is asked for by name holds
    with pytest.raises(ValueError, match="learning_rate_factor must be above 0, got 0"):
        parse_variant("backbone", learning_rate_factor=0.0)


def test_our_recipe_is_its_parts_and_reads_as_one_name():
    assert replace(parse_variant("COMP+REC+REF+ANTI+NDV+LR4+MUON"), name="ours") == parse_variant("ours")
    assert parse_variant("IO+ours").name == "ours+IO" and parse_variant("ours+IO").base_row() == parse_variant("ours")
    with pytest.raises(ValueError, match="cascade would be"):
        parse_variant("LC-1+ours")


def test_no_passes_are_refused():
    with pytest.raises(ValueError, match="passes must be a whole number from 1, got 0"):
        build_model("backbone", passes=0)
