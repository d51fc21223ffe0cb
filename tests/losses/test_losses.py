"""Losses of the paper against slow direct computations."""

import math

import pytest
import torch
import torch.nn.functional as F

from lumirlib import losses, spatial
from lumirlib.losses import similarity
from lumirlib.losses.similarity import ncc_in_parts

SHAPE = (11, 12, 13)


def random_pair(seed=0, shape=SHAPE):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 1, *shape, generator=generator), torch.rand(1, 1, *shape, generator=generator)


def direct_ncc_loss(first, second, window):
    """Every window cut out and its deviations from the mean summed, in float64."""
    half = window // 2
    cut = []
    for image in (first, second):
        padded = F.pad(image.double(), [half] * 6)
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
    warped.requires_grad_()
    assert torch.autograd.gradcheck(lambda image: losses.ncc_loss(image, fixed, 3), warped, fast_mode=True)


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


def by_direct_sums(first, second, window):
    """Loss and both gradients of the direct float64 computation."""
    first, second = (image.double().detach().requires_grad_() for image in (first, second))
    loss = direct_ncc_loss(first, second, window)
    return (float(loss.detach()), *torch.autograd.grad(loss, (first, second)))


def zero_background(seed, shape=SHAPE):
    inside = torch.zeros(shape)
    inside[2:-3, 3:-2, 3:-3] = 1
    return tuple(image * inside for image in random_pair(seed, shape))


def in_parts(first, second, window):
    """What the other devices compute, here on the CPU."""
    loss, by_first = ncc_in_parts(first, second, window, True)
    return loss, by_first, ncc_in_parts(second, first, window, True)[1]


def compiled(first, second, window):
    first, second = (image.detach().requires_grad_() for image in (first, second))
    loss = losses.ncc_loss(first, second, window)
    return (loss.detach(), *torch.autograd.grad(loss, (first, second)))


@pytest.mark.parametrize("compute", [compiled, in_parts])
def test_ncc_loss_of_two_images_of_eight_voxels_is_what_the_hand_computes(compute):
    # window 3 at 2x2x2 voxels: every window holds all eight voxels and nineteen zeros
    first = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]).view(1, 1, 2, 2, 2)
    second = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0]).view(1, 1, 2, 2, 2)
    covariance, variances = 1 - 1 * 2 / 27, (1 - 1 / 27) * (2 - 4 / 27)
    assert float(compute(first, second, 3)[0]) == pytest.approx(1 - covariance**2 / (variances + 1e-5), abs=1e-7)


@pytest.mark.parametrize("compute", [compiled, in_parts])
@pytest.mark.parametrize("window", [3, 9])
@pytest.mark.parametrize("scale", [1, 255, 1e6])
@pytest.mark.parametrize("make", [random_pair, zero_background])
def test_ncc_gradients_equal_those_of_the_direct_float64_computation(make, scale, window, compute):
    pair = tuple(scale * image for image in make(1))
    expected, *gradients = by_direct_sums(*pair, window)
    loss, *found = compute(*pair, window)
    assert float(loss) == pytest.approx(expected, abs=1e-6)
    for gradient, right in zip(found, gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert float((gradient - right).abs().max() / right.abs().max()) < 1e-5


@pytest.mark.parametrize("compute", [compiled, in_parts])
def test_ncc_of_a_bright_image_leaves_no_trace_in_the_dim_voxels_beside_it(compute):
    # a running sum of squares of 1e6 would leave a variance there
    bright = torch.zeros(1, 1, 24, 7, 25)
    bright[:, :, :10, :, :9] = 1e6 * random_pair(4, (10, 7, 9))[0]
    bright[:, :, -3:, :, -3:] = 1e-1 * random_pair(5, (3, 7, 3))[0]
    expected, by_first, _ = by_direct_sums(bright, bright.flip(3), 5)
    loss, gradient, _ = compute(bright, bright.flip(3), 5)
    assert float(loss) == pytest.approx(expected, abs=1e-7)
    assert (gradient[:, :, 14:17] == 0).all() and (gradient[..., 13:18] == 0).all()
    corner = (..., slice(-3, None), slice(None), slice(-3, None))
    assert float((gradient - by_first)[corner].abs().max() / by_first[corner].abs().max()) < 1e-5


@pytest.mark.parametrize("compute", [compiled, in_parts])
@pytest.mark.parametrize("window", [1, 3, 5, 7, 9, 11])
def test_ncc_takes_every_window_on_unequal_sides_and_a_batch(window, compute):
    pair = tuple(torch.cat([image, image.flip(3) ** 2]) for image in random_pair(6, (5, 6, 7)))
    expected, *gradients = by_direct_sums(*pair, window)
    loss, *found = compute(*pair, window)
    assert float(loss) == pytest.approx(expected, abs=1e-6)
    for gradient, right in zip(found, gradients, strict=True):
        assert float((gradient - right).abs().max()) <= 1e-5 * float(right.abs().max())


def test_ncc_in_parts_does_not_depend_on_where_the_parts_begin(monkeypatch):
    pair = random_pair(7, (23, 6, 7))
    whole = in_parts(*pair, 5)
    for planes in (1, 4):
        monkeypatch.setattr(similarity, "PLANES", planes)
        for found, expected in zip(in_parts(*pair, 5), whole, strict=True):
            assert torch.allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_losses_are_the_same_to_the_bit_for_any_number_of_threads():
    pair = tuple(image.requires_grad_() for image in random_pair(8, (13, 12, 11)))
    field = (10 * torch.rand(2, 3, 13, 6, 7, generator=torch.Generator().manual_seed(9))).requires_grad_()
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 20):
            torch.set_num_threads(count)
            loss, smooth = losses.ncc_loss(*pair, 5), losses.gaussian_smooth(pair[0])
            roughness = losses.diffusion_loss(field)
            gradients = torch.autograd.grad(loss + roughness, (*pair, field))
            found.append([loss, smooth, roughness, *gradients])
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(first, other) for first, other in zip(found[0], others, strict=True))


def test_ncc_loss_takes_images_that_are_not_contiguous():
    warped, fixed = (image[:, :, ::2] for image in random_pair(10, (2 * SHAPE[0], *SHAPE[1:])))
    expected = compiled(warped.contiguous(), fixed.contiguous(), 5)
    others = compiled(warped, fixed.contiguous(memory_format=torch.channels_last_3d), 5)
    turned = compiled(*(image.transpose(2, 4).contiguous().transpose(2, 4) for image in (warped, fixed)), 5)
    for a, b, c in zip(expected, others, turned, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_ncc_gradients_of_both_images_equal_finite_differences_and_fixed_gets_none_unasked():
    pair = tuple(image.double().requires_grad_() for image in random_pair(11, (4, 5, 6)))
    assert torch.autograd.gradcheck(lambda *images: losses.ncc_loss(*images, 3), pair)
    warped, fixed = random_pair(12)
    losses.ncc_loss(warped.requires_grad_(), fixed).backward()
    assert warped.grad is not None and fixed.grad is None
    with torch.no_grad():
        assert not losses.ncc_loss(warped, fixed).requires_grad


def test_gradients_of_ncc_and_diffusion_grow_with_their_weights_and_second_derivatives_are_refused():
    warped, fixed = random_pair(13)
    field = torch.randn(1, 3, *SHAPE, generator=torch.Generator().manual_seed(13))
    for image, loss in (
        (warped, lambda: losses.ncc_loss(warped, fixed)),
        (field, lambda: losses.diffusion_loss(field)),
    ):
        image.requires_grad_()
        (once,), (twice,) = torch.autograd.grad(loss(), image), torch.autograd.grad(2 * loss(), image)
        assert torch.equal(2 * once, twice)
        with pytest.raises(RuntimeError, match="_loss cannot be differentiated: call backward without create_graph"):
            torch.autograd.grad(loss(), image, create_graph=True)


def test_ncc_loss_of_an_image_that_is_not_finite_is_not_finite():
    warped, fixed = random_pair(14)
    warped[0, 0, 3, 4, 5] = math.nan
    assert math.isnan(float(losses.ncc_loss(warped, fixed))) and math.isnan(float(in_parts(warped, fixed, 9)[0]))


def test_ncc_loss_takes_half_precision_and_gives_its_gradient_in_it():
    warped, fixed = (image.bfloat16() for image in random_pair(15))
    loss = losses.ncc_loss(warped.requires_grad_(), fixed)
    loss.backward()
    assert loss.dtype == torch.float32 and warped.grad.dtype == torch.bfloat16
    assert loss.item() == float(losses.ncc_loss(warped.detach().float(), fixed.float()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_losses_on_the_gpu_equal_those_on_the_cpu():
    pair = zero_background(16, (40, 24, 22))
    field = torch.randn(1, 3, *SHAPE, generator=torch.Generator().manual_seed(17))
    found = []
    for device in ("cpu", "cuda"):
        warped, fixed = (image.to(device) for image in pair)
        velocity = field.to(device).requires_grad_()
        roughness = losses.diffusion_loss(velocity)
        (curvature,) = torch.autograd.grad(roughness, velocity)
        smooth = losses.gaussian_smooth(warped)
        found.append([each.cpu() for each in (*compiled(warped, fixed, 9), roughness.detach(), curvature, smooth)])
    for on_cpu, on_gpu in zip(*found, strict=True):
        assert torch.allclose(on_cpu, on_gpu, rtol=1e-4, atol=1e-6 * float(on_cpu.abs().max()))


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


@pytest.mark.parametrize("shape", [(5, 6, 7), (2, 3, 2)])
def test_diffusion_loss_and_its_gradient_equal_autograds(shape):
    field = torch.randn(2, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    expected = sum(field.diff(dim=axis).square().mean() for axis in (2, 3, 4)) / 3
    found = losses.diffusion_loss(field)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    (wanted,), (gradient,) = torch.autograd.grad(expected, field), torch.autograd.grad(3 * found, field)
    assert torch.allclose(3 * wanted, gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("sigma", "size"), [(1.0, 5), (2.5, 17), (0.5, 1)])
def test_gaussian_smoothing_equals_convolutions_and_is_its_own_adjoint(sigma, size):
    image = torch.rand(2, 3, 5, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    kernel = torch.exp(-((torch.arange(size).double() - size // 2) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, 1, -1)
    expected = image.flatten(0, 1)[:, None]
    for axes in ((0, 1, 2, 3, 4), (0, 1, 2, 4, 3), (0, 1, 4, 3, 2)):
        expected = F.conv3d(expected.permute(axes), kernel, padding=(0, 0, size // 2)).permute(axes)
    found = losses.gaussian_smooth(image, sigma, size)
    assert torch.allclose(found, expected.reshape(found.shape), rtol=1e-12, atol=1e-14)
    weights = torch.rand_like(found)
    (slope,) = torch.autograd.grad((found * weights).sum(), image)
    assert torch.allclose(slope, losses.gaussian_smooth(weights, sigma, size), rtol=1e-12)


def test_gaussian_smoothing_keeps_a_constant_inside_and_the_sum_of_an_impulse():
    impulse = torch.zeros(1, 1, *SHAPE)
    impulse[0, 0, 5, 6, 7] = 1
    smooth = losses.gaussian_smooth(impulse)
    assert float(smooth.sum()) == pytest.approx(1, abs=1e-6)
    ratio = float(smooth[0, 0, 5, 6, 8] / smooth[0, 0, 5, 6, 7])
    assert ratio == pytest.approx(float(torch.exp(torch.tensor(-0.5))), rel=1e-5)  # one sigma away
    assert torch.allclose(losses.gaussian_smooth(torch.ones(1, 2, *SHAPE))[..., 3:-3, 3:-3, 3:-3], torch.ones(1))


def test_the_authors_blur_is_a_box_along_j_and_too_narrow_along_k():
    i, _, k = torch.meshgrid(*[torch.arange(5.0) - 2] * 3, indexing="ij")
    kernel = torch.exp(-(i**2 + 2 * k**2) / 2)  # k twice, j not at all
    assert torch.equal(kernel[:, 0], kernel[:, 4]) and not torch.equal(kernel[0], kernel[4].T)
    image = torch.rand(1, 1, 6, 7, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
    blurred = F.conv3d(image, (kernel / kernel.sum())[None, None], padding=2)
    shapes = [(6, 7, 8), (3, 4, 4)]
    for blur, equal in (("authors", True), ("isotropic", False)):
        found = losses.gaussian_pyramid(image, shapes, blur)[1]
        expected = spatial.resize(blurred, shapes[1])
        slopes = [torch.autograd.grad(one.square().sum(), image, retain_graph=True)[0] for one in (found, expected)]
        assert torch.allclose(found, expected, atol=1e-6) is equal
        assert torch.allclose(*slopes, atol=1e-5) is equal
    with pytest.raises(ValueError, match="blur must be one of isotropic, authors; got 'box'"):
        losses.gaussian_pyramid(image, shapes, "box")


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
        warped = spatial.warp(m, displacements[level])
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
        spatial.warp(image, torch.zeros(1, 3, *shape, dtype=torch.float64))
    field = torch.zeros(1, 3, *shape, dtype=torch.float64, requires_grad=True)
    terms = losses.registration_loss(image, image.flip(2), [field], [field], window=3)
    smooth = losses.gaussian_smooth(spatial.warp(image, field))
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
