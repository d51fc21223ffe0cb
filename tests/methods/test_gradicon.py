"""GradICON: the Gaussian LNCC, the gradient inverse consistency, the composed network and its training."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, map_coordinates

from lumirlib import spatial
from lumirlib.losses import gaussian_smooth
from lumirlib.methods.base import PAPER
from lumirlib.methods.gradicon import GradICON, GradICONNetwork, gaussian_lncc_loss, gradicon_loss
from lumirlib.methods.presets import get_preset
from lumirlib.metrics import inverse_consistency_error

SHAPE = (9, 12, 15)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair(shape=SHAPE):
    return random(1, 1, *shape, seed=1), random(1, 1, *shape, seed=2)


def narrow(std=0.0, **options):
    """A narrow network; with `std` above 0 one that predicts something before any training."""
    torch.manual_seed(0)
    model = GradICON(encoder="2-3-4", decoder="4-3-3-2", **options).build()
    if std:
        for step in model.steps:
            torch.nn.init.normal_(step.flow.weight, std=std)
    return model


def translation(*offsets, shape=SHAPE):
    return torch.tensor(offsets, dtype=torch.float32).view(1, 3, 1, 1, 1).expand(1, 3, *shape).clone()


# similarity ----------------------------------------------------------------------------------------------------------


def test_lncc_equals_scipys_gaussian_moments():
    warped, fixed = pair((14, 15, 17))

    def mean(image):
        return gaussian_filter(image, 1.5, radius=3, mode="constant")

    w, f = warped[0, 0].double().numpy(), fixed[0, 0].double().numpy()
    spread = [mean(image * image) - mean(image) ** 2 + 1e-5 for image in (w, f)]
    expected = 1 - ((mean(w * f) - mean(w) * mean(f)) / np.sqrt(spread[0] * spread[1])).mean()
    assert float(gaussian_lncc_loss(warped, fixed, 1.5)) == pytest.approx(expected, abs=1e-6)


def test_lncc_is_0_for_equal_images_1_for_strangers_and_2_for_inverted_ones():
    image, other = (image - 0.5 for image in pair((14, 15, 17)))
    assert float(gaussian_lncc_loss(image, image)) < 0.01
    assert float(gaussian_lncc_loss(0.5 * image, image)) < 0.01
    assert float(gaussian_lncc_loss(-image, image)) > 1.99
    assert float(gaussian_lncc_loss(other, image)) == pytest.approx(1, abs=0.05)


def test_lncc_of_constant_regions_counts_as_no_correlation():
    empty = torch.zeros(1, 1, *SHAPE)
    assert float(gaussian_lncc_loss(empty, empty, 2.0)) == 1.0
    assert float(gaussian_lncc_loss(empty, pair()[0], 2.0)) == 1.0


def test_lncc_has_the_gradient_of_finite_differences():
    warped, fixed = random(1, 1, 3, 4, 2, dtype=torch.float64), random(1, 1, 3, 4, 2, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda image: gaussian_lncc_loss(image, fixed, 1.0), warped.requires_grad_())


# regularizer ---------------------------------------------------------------------------------------------------------


def test_inverse_translations_cost_nothing():
    there = translation(1.5, -2.25, 0.5)
    assert float(gradicon_loss(there, -there)) == pytest.approx(0, abs=1e-9)
    assert float(gradicon_loss(there, there)) == pytest.approx(0, abs=1e-9)  # an error, but a constant one


def test_inverse_maps_cost_next_to_nothing_and_others_do():
    velocity = gaussian_smooth(60 * (random(1, 3, 14, 15, 17) - 0.5), 2.0, 9)
    window = torch.zeros(14, 15, 17)
    window[3:-3, 3:-3, 3:-3] = 1
    velocity = velocity * gaussian_smooth(window[None, None], 1.0)
    forward, backward = spatial.integrate(velocity), spatial.integrate(-velocity)
    alone = float(gradicon_loss(forward, torch.zeros_like(backward)))
    assert alone > 0.01
    assert float(gradicon_loss(forward, backward)) < 0.05 * alone
    assert float(gradicon_loss(forward, forward)) > alone


def test_regularizer_equals_a_loop_over_voxels():
    shape = (5, 6, 7)
    forward = 3 * (random(2, 3, *shape, seed=1, dtype=torch.float64) - 0.5)
    backward = 3 * (random(2, 3, *shape, seed=2, dtype=torch.float64) - 0.5)
    sums, counts = np.zeros(3), np.zeros(3)
    for b in range(2):
        points = np.indices(shape) + backward[b].numpy()
        error = backward[b].numpy() + np.stack(
            [map_coordinates(channel, points, order=1, mode="constant") for channel in forward[b].numpy()]
        )
        last = np.array(shape).reshape(3, 1, 1, 1) - 1
        inside = ((points >= 0) & (points <= last)).all(0)
        for place in np.ndindex(shape):
            for axis in range(3):
                following = tuple(at + (axis == along) for along, at in enumerate(place))
                if following[axis] < shape[axis] and inside[place] and inside[following]:
                    sums[axis] += ((error[(slice(None), *following)] - error[(slice(None), *place)]) ** 2).mean()
                    counts[axis] += 1
    assert counts.min() > 20 and (counts < 2 * np.prod(shape)).all()
    assert float(gradicon_loss(forward, backward)) == pytest.approx((sums / counts).sum(), rel=1e-9)


def test_regularizer_of_a_stretch_is_its_squared_slope():
    forward = torch.zeros(1, 3, *SHAPE)
    forward[:, 1] = 0.1 * torch.arange(12.0).view(1, 12, 1)  # along j: slope 0.1 of one of three components
    assert float(gradicon_loss(forward, torch.zeros_like(forward))) == pytest.approx(0.01 / 3, rel=1e-4)


def test_regularizer_has_the_gradient_of_finite_differences():
    forward = (random(1, 3, 3, 2, 4, seed=1, dtype=torch.float64) - 0.5).requires_grad_()
    backward = (random(1, 3, 3, 2, 4, seed=2, dtype=torch.float64) - 0.5).requires_grad_()
    assert torch.autograd.gradcheck(gradicon_loss, (forward, backward))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian_lncc_loss(*pair(), sigma=0), "sigma must be above 0, got 0"),
        (lambda: gaussian_lncc_loss(pair()[0], pair((9, 12, 14))[0]), "warped and fixed must have one shape"),
        (lambda: gradicon_loss(translation(1, 0, 0)[:, :2], translation(1, 0, 0)), r"forward must be \(B, 3, D, H, W"),
        (lambda: gradicon_loss(translation(1, 0, 0), translation(1, 0, 0)[..., 1:]), "forward and backward must share"),
        (lambda: narrow()(*pair((4, 9, 9))), r"fixed must have sides of at least 5 voxels, got \(4, 9, 9\)"),
        (lambda: GradICONNetwork(fine_steps=0), "fine_steps must be a whole number from 1, got 0"),
        (lambda: GradICONNetwork(coarse_steps=-1), "coarse_steps must be a whole number from 0, got -1"),
        (lambda: GradICON().narrowed(0), "divisor must be 1 or more, got 0"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# network -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPE, (8, 11, 9), (16, 20, 24)])
def test_network_works_at_odd_sizes_and_every_parameter_gets_a_gradient(shape):
    model = narrow(std=0.05)
    displacement = model(*pair(shape))
    assert displacement.shape == (1, 3, *shape) and displacement.dtype == torch.float32
    displacement.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_parameters_are_those_of_a_hand_count():
    def conv(width_in, width_out):
        return 27 * width_in * width_out + width_out

    encoder = conv(2, 16) + conv(16, 32) + 2 * conv(32, 32)
    decoder = conv(32, 32) + 2 * conv(64, 32) + conv(48, 32) + conv(34, 32) + conv(32, 16) + conv(16, 16)
    unet = encoder + decoder + conv(16, 3)
    for coarse, fine in ((2, 2), (1, 1), (0, 3)):
        model = GradICON(coarse_steps=coarse, fine_steps=fine).build()
        assert sum(parameter.numel() for parameter in model.parameters()) == (coarse + fine) * unet
    assert unet == 301_411


def test_displacement_is_the_composition_of_the_steps_from_coarse_to_fine():
    model = narrow(std=0.2)
    fixed, moving = pair((16, 20, 24))
    halves = [torch.nn.functional.avg_pool3d(image, 2) for image in (fixed, moving)]
    quarters = [torch.nn.functional.avg_pool3d(image, 2) for image in halves]
    with torch.no_grad():
        expected = model.steps[0](*quarters)
        expected = spatial.resize_displacement(expected, (8, 10, 12))
        expected = spatial.compose(expected, model.steps[1](halves[0], spatial.warp(halves[1], expected)))
        expected = spatial.resize_displacement(expected, (16, 20, 24))
        for step in model.steps[2:]:
            expected = spatial.compose(expected, step(fixed, spatial.warp(moving, expected)))
        assert model.levels == (2, 1, 0, 0) and expected.abs().max() > 0.1
        assert torch.allclose(model(fixed, moving), expected, atol=1e-6)


def test_batch_entries_do_not_mix():
    model = narrow(std=0.1)
    fixed, moving = pair()
    with torch.no_grad():
        both = model(torch.cat([fixed, moving]), torch.cat([moving, fixed]))
        assert torch.allclose(both[:1], model(fixed, moving), atol=1e-5)
        assert torch.allclose(both[1:], model(moving, fixed), atol=1e-5)


# training ------------------------------------------------------------------------------------------------------------


def test_loss_counts_both_directions_and_weighs_as_the_preset_says():
    row = GradICON(encoder="2-3-4", decoder="4-3-3-2")
    model, preset = narrow(std=0.1), row.training_preset(get_preset("demo"))
    fixed, moving = pair()
    generator = torch.Generator().manual_seed(0)
    terms = row.loss_terms(model, fixed, moving, preset, generator)
    forward, backward = model(fixed, moving), model(moving, fixed)
    similarity = gaussian_lncc_loss(spatial.warp(moving, forward), fixed, 1.25)
    similarity = similarity + gaussian_lncc_loss(spatial.warp(fixed, backward), moving, 1.25)
    assert torch.allclose(terms["similarity"], similarity, atol=1e-5)
    assert torch.allclose(terms["smoothness"], gradicon_loss(forward, backward), atol=1e-5)
    expected = similarity + row.smoothness_weight * gradicon_loss(forward, backward)
    assert torch.allclose(terms["total"], expected, atol=1e-4)
    terms["total"].backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


@torch.no_grad()
def consistency(model, fixed, moving):
    return inverse_consistency_error(model(fixed, moving), model(moving, fixed), moving)


def test_training_on_a_pair_makes_it_more_alike_and_the_maps_more_inverse():
    row = GradICON(encoder="4-4", decoder="4-4-4", coarse_steps=1, fine_steps=1)
    shape = (12, 14, 16)
    grid = spatial.identity_grid(shape)

    def blob(*centre):
        squares = ((grid - torch.tensor(centre).view(1, 3, 1, 1, 1)) ** 2).sum(1, keepdim=True)
        return torch.exp(-squares / 18) * (squares < 30)

    fixed, moving = blob(5.0, 6.0, 7.0), blob(6.0, 7.5, 8.0)
    torch.manual_seed(0)
    model, preset = row.build(), row.training_preset(get_preset("demo"))
    for step in model.steps:  # a network that predicts nothing has no error to lose
        torch.nn.init.normal_(step.flow.weight, std=0.3)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator, history = torch.Generator(), []
    before = consistency(model, fixed, moving)
    for _ in range(30):
        optimizer.zero_grad()
        terms = row.loss_terms(model, fixed, moving, preset, generator)
        terms["total"].backward()
        optimizer.step()
        history.append({name: float(term.detach()) for name, term in terms.items()})
    assert consistency(model, fixed, moving) < 0.7 * before
    assert history[-1]["similarity"] < history[0]["similarity"]
    assert history[-1]["smoothness"] < 0.8 * history[0]["smoothness"]


def test_row_adapts_the_preset_and_narrows():
    row = GradICON()
    assert row.trains_on == "images"
    assert row.narrowed(4).encoder == "4-8-8-8" and row.narrowed(4).decoder == "8-8-8-8-8-4-4"
    assert row.narrowed(1) == row
    adapted = row.training_preset(PAPER)
    assert adapted.epochs == PAPER.epochs and adapted.similarity_weight == 1.0 and adapted.smoothness_weight == 1.5
