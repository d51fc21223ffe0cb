"""Losses of the paper against slow direct computations."""

import pytest
import torch

from lumirlib import losses

SHAPE = (11, 12, 13)


def random_pair(seed=0, shape=SHAPE):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 1, *shape, generator=generator), torch.rand(1, 1, *shape, generator=generator)


def direct_ncc_loss(first, second, window):
    """Every window cut out and its deviations from the mean summed, in float64."""
    half = window // 2
    cut = []
    for image in (first, second):
        padded = torch.nn.functional.pad(image.double(), [half] * 6)
        windows = padded.unfold(2, window, 1).unfold(3, window, 1).unfold(4, window, 1).flatten(5)
        cut.append(windows - windows.mean(-1, keepdim=True))
    a, b = cut
    squared = (a * b).sum(-1) ** 2 / ((a * a).sum(-1) * (b * b).sum(-1) + 1e-5)
    return 1 - squared.mean()


def flat_with_an_edge():
    first = torch.full((1, 1, *SHAPE), 0.7)
    second = torch.full((1, 1, *SHAPE), 0.3)
    second[..., 6:] = 0
    return first, second


@pytest.mark.parametrize("window", [3, 5, 9])
@pytest.mark.parametrize("pair", [random_pair(), flat_with_an_edge(), tuple(255 * i for i in random_pair(1))])
def test_ncc_loss_equals_the_direct_float64_computation(pair, window):
    assert float(losses.ncc_loss(*pair, window)) == pytest.approx(float(direct_ncc_loss(*pair, window)), abs=1e-5)


def test_ncc_loss_gradient_equals_finite_differences():
    warped, fixed = (image.double() for image in random_pair(2, (4, 5, 6)))
    assert torch.autograd.gradcheck(lambda image: losses.ncc_loss(image, fixed, 3), warped.requires_grad_())


def test_ncc_loss_ignores_an_affine_map_of_intensities():
    warped, _ = random_pair()
    assert float(losses.ncc_loss(warped, warped * 0.5)) < 1e-3
    assert float(losses.ncc_loss(warped, -warped)) < 1e-3  # the correlation is squared


@pytest.mark.parametrize("value", [0.0, 0.7, 1e6])
def test_ncc_loss_of_constant_images_is_finite_with_finite_gradient(value):
    warped = torch.full((1, 1, *SHAPE), value, requires_grad=True)
    loss = losses.ncc_loss(warped, torch.full((1, 1, *SHAPE), value))
    loss.backward()
    assert 0 <= loss.item() <= 1
    assert torch.isfinite(warped.grad).all()


def test_ncc_loss_is_float32_under_autocast():
    warped, fixed = random_pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = losses.ncc_loss(warped, fixed)
    assert loss.dtype == torch.float32
    assert float(loss) == float(losses.ncc_loss(warped, fixed))


def test_ncc_loss_takes_images_smaller_than_the_window():
    small = random_pair(3, (3, 4, 5))
    assert float(losses.ncc_loss(*small, 9)) == pytest.approx(float(direct_ncc_loss(*small, 9)), abs=1e-5)


def test_diffusion_loss_of_a_stretch_is_the_mean_over_axes_of_its_squared_rates():
    field = torch.zeros(1, 3, *SHAPE)
    field[0, 0] = 0.5 * torch.arange(SHAPE[0]).view(-1, 1, 1)
    field[0, 1] = 0.2 * torch.arange(SHAPE[2]).view(1, 1, -1)
    # along i one of three components changes by 0.5, along k one by 0.2, along j none
    assert float(losses.diffusion_loss(field)) == pytest.approx((0.5**2 / 3 + 0.2**2 / 3) / 3, rel=1e-5)


def test_diffusion_loss_of_a_translation_is_zero():
    assert float(losses.diffusion_loss(torch.full((1, 3, *SHAPE), 4.0))) == 0


def test_gaussian_smoothing_keeps_a_constant_inside_and_the_sum_of_an_impulse():
    impulse = torch.zeros(1, 1, *SHAPE)
    impulse[0, 0, 5, 6, 7] = 1
    smooth = losses.gaussian_smooth(impulse)
    assert float(smooth.sum()) == pytest.approx(1, abs=1e-6)
    ratio = float(smooth[0, 0, 5, 6, 8] / smooth[0, 0, 5, 6, 7])
    assert ratio == pytest.approx(float(torch.exp(torch.tensor(-0.5))), rel=1e-5)  # one sigma away
    assert torch.allclose(losses.gaussian_smooth(torch.ones(1, 2, *SHAPE))[..., 3:-3, 3:-3, 3:-3], torch.ones(1))


def test_registration_loss_adds_the_levels_with_halving_weights():
    moving, fixed = random_pair(4, (8, 12, 16))
    shapes = [(8, 12, 16), (4, 6, 8)]
    generator = torch.Generator().manual_seed(5)
    displacements = [torch.randn(1, 3, *shape, generator=generator) * 0.1 for shape in shapes]
    velocities = [torch.randn(1, 3, *shape, generator=generator) * 0.1 for shape in shapes]
    terms = losses.registration_loss(moving, fixed, displacements, velocities, 1.0, 6.0, window=5)
    similarity = smoothness = 0.0
    for level, (m, f) in enumerate(
        zip(losses.gaussian_pyramid(moving, shapes), losses.gaussian_pyramid(fixed, shapes), strict=True)
    ):
        warped = losses.spatial.warp(m, displacements[level])
        similarity += float(losses.ncc_loss(warped, f, 5)) / 2**level
        smoothness += float(losses.diffusion_loss(velocities[level])) / 2**level
    assert float(terms["similarity"]) == pytest.approx(similarity, rel=1e-6)
    assert float(terms["smoothness"]) == pytest.approx(smoothness, rel=1e-6)
    assert float(terms["total"]) == pytest.approx(similarity + 6 * smoothness, rel=1e-6)


def test_a_call_in_inference_mode_does_not_spoil_a_later_training():
    shape = (9, 10, 14)  # of no other test, so that nothing is cached yet
    image = torch.rand(1, 1, *shape, dtype=torch.float64)
    with torch.inference_mode():
        losses.gaussian_pyramid(image, [shape, (5, 5, 7)])
        losses.spatial.warp(image, torch.zeros(1, 3, *shape, dtype=torch.float64))
    field = torch.zeros(1, 3, *shape, dtype=torch.float64, requires_grad=True)
    terms = losses.registration_loss(image, image.flip(2), [field], [field], window=3)
    smooth = losses.gaussian_smooth(losses.spatial.warp(image, field))
    (terms["total"] + smooth.mean()).backward()
    assert field.grad.abs().max() > 0


def test_mse_is_an_alternative_similarity_and_others_are_refused():
    moving, fixed = random_pair()
    zero = [torch.zeros(1, 3, *SHAPE)]
    terms = losses.registration_loss(moving, fixed, zero, zero, similarity="mse")
    assert float(terms["similarity"]) == pytest.approx(float((moving - fixed).square().mean()), rel=1e-5)
    with pytest.raises(ValueError, match="similarity must be one of ncc, mse; got 'mi'"):
        losses.registration_loss(moving, fixed, zero, zero, similarity="mi")


def test_losses_name_what_does_not_fit():
    warped, fixed = random_pair()
    with pytest.raises(ValueError, match="warped and fixed must have one shape"):
        losses.ncc_loss(warped, fixed[..., :-1])
    with pytest.raises(ValueError, match="window must be odd and positive, got 4"):
        losses.ncc_loss(warped, fixed, 4)
    with pytest.raises(ValueError, match=r"field must be \(B, 3, D, H, W\)"):
        losses.diffusion_loss(warped)
