"""The conventions of lumirlib.spatial, on unequal sides and against analytic fields and SciPy."""

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from lumirlib import spatial

SHAPE = (5, 6, 7)


def translation(*voxels: float, shape=SHAPE) -> torch.Tensor:
    return torch.tensor(voxels, dtype=torch.float32).view(1, 3, 1, 1, 1).expand(1, 3, *shape).clone()


def random_image(shape=SHAPE, channels=2, seed=0) -> torch.Tensor:
    return torch.rand(1, channels, *shape, generator=torch.Generator().manual_seed(seed))


def smooth_field(shape, size: float, seed=0) -> torch.Tensor:
    noise = torch.randn(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return spatial.resize(noise, shape) * size


def test_identity_grid_holds_each_voxels_own_index():
    grid = spatial.identity_grid(SHAPE)
    assert grid.shape == (1, 3, *SHAPE)
    assert grid[0, :, 4, 2, 6].tolist() == [4, 2, 6]


def test_identity_grid_is_a_fresh_tensor_each_time():
    spatial.identity_grid(SHAPE).zero_()
    assert spatial.identity_grid(SHAPE)[0, 0, 4, 0, 0] == 4


@pytest.mark.parametrize("mode", spatial.WARP_MODES)
def test_zero_displacement_changes_nothing(mode):
    image = random_image()
    assert torch.allclose(spatial.warp(image, translation(0, 0, 0), mode), image, atol=1e-6)


@pytest.mark.parametrize("mode", spatial.WARP_MODES)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_unit_displacement_reads_next_voxel_along_its_own_axis(axis, mode):
    image = random_image()
    displacement = translation(*(1.0 if axis == other else 0.0 for other in range(3)))
    warped = spatial.warp(image, displacement, mode)
    expected = torch.zeros_like(image)
    kept = image.shape[2 + axis] - 1
    expected.narrow(2 + axis, 0, kept).copy_(image.narrow(2 + axis, 1, kept))  # zero outside the image
    assert torch.allclose(warped, expected, atol=1e-5)


def test_half_voxel_displacement_averages_neighbours_along_its_axis():
    image = random_image()
    warped = spatial.warp(image, translation(0, 0.5, 0))
    expected = (image[:, :, :, :-1] + image[:, :, :, 1:]) / 2
    assert torch.allclose(warped[:, :, :, :-1], expected, atol=1e-5)


def test_warp_samples_a_linear_ramp_exactly():
    grid = spatial.identity_grid(SHAPE).double()
    ramp = 2 * grid[:, :1] - 3 * grid[:, 1:2] + 0.5 * grid[:, 2:]
    displacement = torch.rand(1, 3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inner = (slice(None), slice(None), slice(0, -1), slice(0, -1), slice(0, -1))
    expected = ramp + 2 * displacement[:, :1] - 3 * displacement[:, 1:2] + 0.5 * displacement[:, 2:]
    assert torch.allclose(spatial.warp(ramp, displacement)[inner], expected[inner], atol=1e-10)


def test_nearest_warp_equals_scipy_voxel_for_voxel_ties_and_borders_included():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 200, SHAPE).astype(np.int16)
    # multiples of a half put every other point on a tie; the range leaves the image on all sides
    displacement = generator.integers(-8, 9, (3, *SHAPE)) / 2
    points = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij")) + displacement
    expected = map_coordinates(labels, points, order=0, mode="constant", cval=0)
    warped = spatial.warp(
        torch.from_numpy(labels)[None, None], torch.from_numpy(displacement.astype(np.float32))[None], "nearest"
    )
    assert warped.dtype == torch.int16
    assert np.array_equal(warped[0, 0].numpy(), expected)


def test_nearest_warp_equals_scipy_where_a_point_misses_a_tie_by_less_than_float32_resolves():
    labels = np.arange(200, dtype=np.int16).reshape(200, 1, 1).repeat(2, 1).repeat(3, 2)
    displacement = np.zeros((3, 200, 2, 3), dtype=np.float32)
    displacement[0] = np.nextafter(np.float32(0.5), np.float32(0))  # in float32 its sum with 100 is 100.5
    points = np.indices((200, 2, 3)) + displacement
    expected = map_coordinates(labels, points, order=0, mode="constant", cval=0)
    warped = spatial.warp(torch.from_numpy(labels)[None, None], torch.from_numpy(displacement)[None], "nearest")
    assert np.array_equal(warped[0, 0].numpy(), expected)
    assert np.array_equal(expected[:199, 0, 0], np.arange(199))


def test_nearest_warp_on_a_gpu_gathers_the_same_voxels():
    # what a GPU runs, here on the CPU
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 200, (1, 2, *SHAPE), generator=generator)
    displacement = torch.randint(-8, 9, (1, 3, *SHAPE), generator=generator) / 2
    gathered = spatial.sample_nearest(labels, spatial.identity_grid(SHAPE).double() + displacement)
    assert torch.equal(gathered, spatial.warp(labels, displacement, "nearest"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_nearest_warp_takes_a_point_that_is_not_finite_as_outside(axis, value):
    displacement = translation(0, 0, 0)
    displacement[0, axis, 1, 2, 3] = value
    labels = torch.ones(1, 1, *SHAPE, dtype=torch.int16)
    warped = spatial.warp(labels, displacement, "nearest")
    assert warped[0, 0, 1, 2, 3] == 0 and warped.sum() == labels.sum() - 1


def test_bilinear_warp_equals_scipy_inside_the_image():
    generator = np.random.default_rng(1)
    image = generator.random(SHAPE)
    displacement = generator.uniform(-0.9, 0.9, (3, *SHAPE))
    points = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij")) + displacement
    inside = np.all([(p >= 0) & (p <= s - 1) for p, s in zip(points, SHAPE, strict=True)], axis=0)
    expected = map_coordinates(image, points, order=1)
    warped = spatial.warp(torch.from_numpy(image)[None, None], torch.from_numpy(displacement)[None])[0, 0].numpy()
    assert np.allclose(warped[inside], expected[inside], atol=1e-12)


def test_batch_entries_are_warped_by_their_own_displacement():
    image = random_image().expand(2, -1, -1, -1, -1)
    displacement = torch.cat([translation(0, 0, 0), translation(1, 0, 0)])
    for mode in spatial.WARP_MODES:
        warped = spatial.warp(image, displacement, mode)
        for entry in range(2):
            alone = spatial.warp(image[entry : entry + 1], displacement[entry : entry + 1], mode)
            assert torch.equal(warped[entry : entry + 1], alone)


def test_warp_of_bfloat16_keeps_the_dtype_and_samples_in_float32():
    image = torch.ones(1, 1, 4, 5, 300, dtype=torch.bfloat16)
    displacement = translation(0, 0, 0.25, shape=(4, 5, 300))
    warped = spatial.warp(image, displacement)
    assert warped.dtype == torch.bfloat16
    assert torch.equal(warped[..., :-1], image[..., :-1])  # a bfloat16 coordinate could not tell 290.25 from 292


def test_normalized_coordinates_run_from_minus_one_to_one_with_axes_reversed():
    corners = torch.tensor([[0.0, 0, 0], [4, 5, 6], [4, 0, 3]])
    normalized = spatial.voxel_to_normalized(corners, SHAPE)
    assert torch.allclose(normalized, torch.tensor([[-1.0, -1, -1], [1, 1, 1], [0, -1, 1]]))


def test_composition_of_translations_adds_them():
    composed = spatial.compose(translation(1, 0, -1), translation(0.5, 2, 0))
    assert torch.allclose(composed[0, :, 0, 0, 2], torch.tensor([1.5, 2, -1]))


def test_composition_warps_like_one_warp_after_the_other():
    shape = (14, 15, 16)
    grid = spatial.identity_grid(shape).double()
    image = torch.sin(grid[:, :1] / 5) + torch.cos(grid[:, 1:2] / 4) * grid[:, 2:] / 10
    outer, inner = smooth_field(shape, 0.4, 1), smooth_field(shape, 0.4, 2)
    together = spatial.warp(image, spatial.compose(outer, inner))
    one_after_the_other = spatial.warp(spatial.warp(image, outer), inner)
    core = (..., slice(3, -3), slice(3, -3), slice(3, -3))
    assert torch.allclose(together[core], one_after_the_other[core], atol=0.02)
    swapped = spatial.warp(image, spatial.compose(inner, outer))
    assert (swapped[core] - one_after_the_other[core]).abs().max() > 0.03  # the order matters


def test_integration_of_a_constant_velocity_is_that_translation():
    integrated = spatial.integrate(translation(0.5, -0.25, 1.0, shape=(12, 13, 14)))
    assert torch.allclose(integrated[0, :, 6, 6, 6], torch.tensor([0.5, -0.25, 1.0]), atol=1e-5)


def test_integration_of_a_linear_velocity_is_the_matrix_exponential():
    shape = (17, 19, 21)
    grid = spatial.identity_grid(shape, dtype=torch.float64)
    centre = torch.tensor([8.0, 9.0, 10.0], dtype=torch.float64).view(1, 3, 1, 1, 1)
    rates = torch.tensor([[0.1, -0.2, 0.0], [0.2, -0.05, 0.0], [0.0, 0.0, -0.1]], dtype=torch.float64)
    velocity = torch.einsum("ab,nbdhw->nadhw", rates, grid - centre)
    expected = torch.einsum("ab,nbdhw->nadhw", torch.matrix_exp(rates) - torch.eye(3), grid - centre)
    core = (..., slice(5, -5), slice(5, -5), slice(5, -5))
    # squarings start from a first-order step: the error falls with their number
    assert torch.allclose(spatial.integrate(velocity, 7)[core], expected[core], atol=2e-3 * 10)
    fine = (spatial.integrate(velocity, 12) - expected)[core].abs().max()
    assert fine < 1e-3 < (spatial.integrate(velocity, 3) - expected)[core].abs().max()


def test_integration_of_opposite_velocities_gives_inverse_displacements():
    velocity = smooth_field((16, 18, 20), 0.5)
    there, back = spatial.integrate(velocity), spatial.integrate(-velocity)
    residual = spatial.compose(there, back)[..., 4:-4, 4:-4, 4:-4]
    assert 0.001 < residual.abs().max() < 0.2
    corrected = spatial.compose(there, spatial.invert(there, initial=back))[..., 4:-4, 4:-4, 4:-4]
    assert corrected.abs().max() < 1e-3


def test_resizing_a_displacement_converts_its_voxels_exactly_on_unequal_sides():
    small, large = (5, 6, 7), (13, 11, 25)

    # a field that is linear in position is resampled without error: u = a (p - c), a the same on both grids
    def stretch(shape):
        grid = spatial.identity_grid(shape, dtype=torch.float64)
        centre = (torch.tensor(shape, dtype=torch.float64) - 1).view(1, 3, 1, 1, 1) / 2
        return torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64).view(1, 3, 1, 1, 1) * (grid - centre)

    assert torch.allclose(spatial.resize_displacement(stretch(small), large), stretch(large), atol=1e-10)
    assert torch.allclose(spatial.resize_displacement(stretch(large), small), stretch(small), atol=1e-10)


def test_resizing_with_given_factors_multiplies_by_them():
    resized = spatial.resize_displacement(translation(1, 1, 1), (10, 12, 14), factors=(2, 3, 4))
    assert resized[0, :, 3, 3, 3].tolist() == [2, 3, 4]


# from block averages to the voxels that were averaged ----------------------------------------------------------------


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_an_affine_field_found_on_block_averages_is_the_same_field_on_the_finer_grid(factor):
    matrix = torch.tensor([[0.1, -0.2, 0.3], [0.05, 0.4, -0.1], [-0.3, 0.2, 0.1]], dtype=torch.float64)
    shift = torch.tensor([1.5, -2.0, 0.25], dtype=torch.float64).view(1, 3, 1, 1, 1)

    def field(points):  # in fine voxels, at places in fine voxels
        return torch.einsum("ab,nbijk->naijk", matrix, points) + shift

    shape = (5, 6, 7)
    centres = factor * spatial.identity_grid(shape, dtype=torch.float64) + (factor - 1) / 2
    found = spatial.to_finer_grid(field(centres) / factor, factor)
    expected = field(spatial.identity_grid([factor * side for side in shape], dtype=torch.float64))
    assert found.shape == (1, 3, 5 * factor, 6 * factor, 7 * factor)
    inner = (..., *[slice(factor // 2, factor * side - factor // 2) for side in shape])
    assert torch.allclose(found[inner], expected[inner], atol=1e-12)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_carrying_a_field_to_finer_voxels_is_linear_interpolation_between_block_centres(factor):
    displacement = torch.randn(1, 3, 5, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    axes = [(np.arange(factor * side) - (factor - 1) / 2) / factor for side in (5, 6, 7)]
    places = np.meshgrid(*axes, indexing="ij")
    found = spatial.to_finer_grid(displacement, factor)
    for channel in range(3):  # mode "nearest": outside the outermost centres the value of the border
        expected = factor * map_coordinates(displacement[0, channel].numpy(), places, order=1, mode="nearest")
        assert found[0, channel].numpy() == pytest.approx(expected, abs=1e-12)


def test_a_quadratic_field_is_off_by_what_linear_interpolation_is_off():
    i = torch.arange(5, dtype=torch.float64).view(5, 1, 1).expand(5, 6, 7)
    displacement = torch.stack([i**2, 0 * i, 0 * i])[None]
    found = spatial.to_finer_grid(displacement, 2)[0, 0, :, 3, 3] / 2
    # coarse places 0 (border), 0.25, 0.75, 1.25 ...: the parabola, and above it t (1 - t) = 3/16 between centres
    assert found.tolist() == [0, 0.25, 0.75, 1.75, 3.25, 5.25, 7.75, 10.75, 14.25, 16]


def test_by_a_factor_of_1_a_field_stays_as_it_is():
    displacement = torch.randn(1, 3, 5, 6, 7)
    assert spatial.to_finer_grid(displacement, 1) is displacement


@pytest.mark.parametrize("factor", [0, -2, 1.5])
def test_a_factor_that_is_no_whole_number_of_voxels_is_refused(factor):
    with pytest.raises(ValueError, match=f"factor must be a whole number from 1, got {factor}"):
        spatial.to_finer_grid(torch.zeros(1, 3, 5, 6, 7), factor)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: spatial.warp(torch.rand(1, 1, 5, 6, 7), torch.zeros(1, 5, 6, 7, 3)),
            r"displacement must be \(B, 3, D, H, W\), got \(1, 5, 6, 7, 3\)",
        ),
        (lambda: spatial.warp(torch.rand(1, 5, 6, 7), torch.zeros(1, 3, 5, 6, 7)), r"image must be \(B, C, D, H, W\)"),
        (lambda: spatial.warp(torch.rand(1, 1, 5, 6, 8), torch.zeros(1, 3, 5, 6, 7)), "image and displacement must sh"),
        (
            lambda: spatial.warp(torch.rand(1, 1, 5, 6, 7), torch.zeros(1, 3, 5, 6, 7), "cubic"),
            "mode must be one of bilinear, nearest; got 'cubic'",
        ),
        (lambda: spatial.integrate(torch.zeros(1, 3, 5, 6, 7), steps=-1), "steps must be 0 or more, got -1"),
        (lambda: spatial.identity_grid((5, 1, 7)), "at least 2 voxels"),
        (lambda: spatial.compose(torch.zeros(1, 2, 5, 6, 7), torch.zeros(1, 3, 5, 6, 7)), "outer must be"),
    ],
)
def test_shapes_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_warping_integers_bilinearly_is_refused():
    with pytest.raises(TypeError, match=r"image must have a floating-point dtype, got torch\.int16"):
        spatial.warp(torch.ones(1, 1, 5, 6, 7, dtype=torch.int16), torch.zeros(1, 3, 5, 6, 7))
