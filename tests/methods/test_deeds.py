"""deedsBCV: its parts against brute force, SciPy and exhaustive search, and the whole on known displacements."""

from __future__ import annotations

import itertools

import numba
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import minimum_spanning_tree

from lumirlib import spatial
from lumirlib._numba import compiled
from lumirlib.methods import _deeds_kernels as kernels
from lumirlib.methods.deeds import Deeds, make_consistent, resample

SHAPE = (9, 10, 12)


def random(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def popcount(words: np.ndarray) -> np.ndarray:
    return np.unpackbits(np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 8), axis=-1).sum(-1)


def vectors(radius: int) -> np.ndarray:
    """(labels, 3)"""
    return np.array(list(itertools.product(range(-radius, radius + 1), repeat=3)), dtype=np.float64)


# MIND-SSC ------------------------------------------------------------------------------------------------------------


def brute_force_word(image: np.ndarray, point: tuple[int, int, int], step: int) -> list[int]:
    """The twelve entries' levels at a point far from the border, sorted, from the definition."""
    neighbours = [np.array(sign) * step for sign in np.vstack([np.eye(3, dtype=int), -np.eye(3, dtype=int)])]

    def patch(centre):
        return image[tuple(slice(c - step, c + step + 1) for c in centre)].astype(np.float64)

    distances = [
        ((patch(point + first) - patch(point + second)) ** 2).sum()
        for first, second in itertools.combinations(neighbours, 2)
        if not np.array_equal(first, -second)
    ]
    distances = np.array(distances) - min(distances)
    likeness = np.exp(-distances / distances.mean())
    return sorted(int(sum(value > (level + 1.5) / 6 for level in range(5))) for value in likeness)


@pytest.mark.parametrize("step", [1, 2])
def test_descriptor_holds_the_pairs_of_neighbours_that_do_not_face_each_other(step):
    image = random((13, 14, 15))
    words = kernels.mind_ssc(image, step)
    for point in ((6, 6, 7), (5, 8, 6), (7, 7, 9)):
        word = int(words[point])
        entries = [(word >> (5 * entry)) & 31 for entry in range(12)]
        assert all(entry in (0, 1, 3, 7, 15, 31) for entry in entries)  # unary
        assert sorted(entry.bit_count() for entry in entries) == brute_force_word(image, point, step)


def test_descriptor_has_sixty_bits_and_all_are_used():
    words = kernels.mind_ssc(random((15, 16, 17)), 1)
    assert words.dtype == np.uint64
    assert np.bitwise_or.reduce(words, axis=None) == 2**60 - 1


def test_descriptor_does_not_change_with_contrast_or_brightness():
    image = random(SHAPE)
    # powers of two are exact in floating point
    assert np.array_equal(kernels.mind_ssc(image, 1), kernels.mind_ssc(image / 4, 1))
    shifted = popcount(kernels.mind_ssc(image, 2) ^ kernels.mind_ssc(0.5 - 0.3 * image, 2))
    assert shifted.mean() < 0.01 < popcount(kernels.mind_ssc(image, 2) ^ kernels.mind_ssc(random(SHAPE, 1), 2)).mean()


def test_descriptor_of_a_flat_region_has_all_bits_set():
    image = random((16, 17, 18))
    image[:8] = 0.3
    assert (kernels.mind_ssc(image, 1)[:4] == 2**60 - 1).all()


def test_descriptor_moves_with_the_image():
    image = random((14, 15, 16))
    words = kernels.mind_ssc(image, 1)
    moved = kernels.mind_ssc(np.roll(image, (1, 2, -1), (0, 1, 2)), 1)
    core = (slice(4, -4),) * 3
    assert np.array_equal(np.roll(words, (1, 2, -1), (0, 1, 2))[core], moved[core])


# data costs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spacing", "radius", "step"), [(2, 1, 1), (3, 1, 2), (5, 2, 1)])
def test_data_cost_is_the_mean_number_of_differing_bits_scaled(spacing, radius, step):
    shape, alpha = (11, 12, 15), 1.25
    fixed, moving = kernels.mind_ssc(random(shape), 1), kernels.mind_ssc(random(shape, 1), 1)
    costs = kernels.data_costs(fixed, moving, spacing, radius, step, alpha)
    assert costs.shape == (11 // spacing, 12 // spacing, 15 // spacing, (2 * radius + 1) ** 3)
    every = 2 if spacing > 4 else 1
    block = itertools.product(range(spacing), range(0, spacing, every), range(0, spacing, every))
    inside = np.array(list(block))
    for control in itertools.product(*map(range, costs.shape[:3])):
        at = np.array(control) * spacing + inside
        for label, vector in enumerate(vectors(radius).astype(int)):
            beyond = np.clip(at + vector * step, 0, np.array(shape) - 1)  # the border goes on
            bits = popcount(fixed[tuple(at.T)] ^ moving[tuple(beyond.T)]).mean()
            assert costs[control][label] == pytest.approx(bits * 0.5 * spacing / (alpha * step), rel=1e-5)


def test_an_image_costs_nothing_at_zero_displacement_from_itself():
    words = kernels.mind_ssc(random(SHAPE), 1)
    costs = kernels.data_costs(words, words, 2, 1, 1, 1.6)
    assert (costs[..., 13] == 0).all() and (costs[..., :13].mean() > 1)


# spanning tree -------------------------------------------------------------------------------------------------------


def test_edge_weight_falls_with_the_mean_absolute_difference_of_two_blocks():
    image = random((7, 8, 11))  # a rest is left over along every axis
    ends, weights = kernels.grid_edges(image, 2)
    shape = (3, 4, 5)
    assert len(ends) == 2 * 4 * 5 + 3 * 3 * 5 + 3 * 4 * 4
    for (first, second), weight in zip(ends, weights, strict=True):
        corners = [np.array(np.unravel_index(node, shape)) * 2 for node in (first, second)]
        assert np.abs(corners[0] - corners[1]).sum() == 2
        blocks = [image[tuple(slice(c, c + 2) for c in corner)] for corner in corners]
        assert weight == pytest.approx(np.exp(-np.abs(blocks[0] - blocks[1]).mean() / (2 * image.std())), rel=1e-5)


@pytest.mark.parametrize("levels", [None, 4])
def test_the_tree_agrees_with_scipys(levels):
    image = random((15, 16, 21))
    if levels:  # many equal edges
        image = np.round(image * levels) / levels
    ends, weights = kernels.grid_edges(image, 3)
    nodes = 5 * 5 * 7
    tree = kernels.image_tree(image, 3)
    expected = -minimum_spanning_tree(coo_matrix((-weights, ends.T), (nodes, nodes))).sum()
    assert tree.weights[1:].sum() == pytest.approx(expected, rel=1e-6)
    assert sorted(tree.order) == list(range(nodes))


def test_tree_is_rooted_in_the_middle_and_parents_come_before_their_children():
    tree = kernels.image_tree(random((15, 16, 21)), 3)
    assert tree.order[0] == np.ravel_multi_index((2, 2, 3), (5, 5, 7))
    assert tree.parents[0] == -1 and (tree.parents[1:] < np.arange(1, len(tree.order))).all()
    for position in range(len(tree.order)):
        children = np.flatnonzero(tree.parents == position)
        assert list(children) == list(range(tree.children[position], tree.children[position + 1]))
    depth = np.zeros(len(tree.order), int)
    for position in range(1, len(tree.order)):
        depth[position] = depth[tree.parents[position]] + 1
    assert np.array_equal(tree.depths, np.searchsorted(depth, range(depth.max() + 2)))


# min-sum -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, 0.35])
def test_the_label_read_out_of_a_child_is_the_cheapest_for_its_parents_label(weight):
    side, previous = 5, np.array([[0.3, -0.6], [1.2, 0.1], [0.0, 2.4]], np.float32)  # parent and child
    tree = kernels.spanning_tree(np.array([[0, 1]]), np.array([weight], np.float32), 2, root=0)
    child = random((side, side, side), 3) * 6
    labels = vectors(2)
    for wanted in (0, 17, 62, 124):
        costs = np.stack([np.full(side**3, 1000, np.float32), child.ravel()])
        costs[0, wanted] = 0
        chosen = kernels.min_sum(costs, tree, previous)
        gap = labels[wanted] + previous[:, 0] - labels[chosen[1]] - previous[:, 1]
        value = weight * child.ravel()[chosen[1]] + (gap**2).sum()
        everything = weight * child.ravel() + ((labels[wanted] + previous[:, 0] - labels - previous[:, 1]) ** 2).sum(1)
        assert chosen[0] == wanted and value == pytest.approx(everything.min(), abs=1e-4)


def energy(chosen, costs, tree, previous) -> float:
    """What min-sum minimizes, written out: weights multiply up on the way to the root."""
    labels = vectors(1)
    total, carried = 0.0, np.ones(len(tree.order))
    for position, node in enumerate(tree.order):
        parent = tree.parents[position]
        if parent >= 0:
            carried[position] = carried[parent] * tree.weights[position]
            above = tree.order[parent]
            gap = labels[chosen[above]] + previous[:, above] - labels[chosen[node]] - previous[:, node]
            total += carried[parent] * (gap**2).sum()
        total += carried[position] * costs[node, chosen[node]]
    return total


@pytest.mark.parametrize("root", [0, 1, 2])
def test_messages_on_three_nodes_agree_with_exhaustive_search(root):
    tree = kernels.spanning_tree(np.array([[0, 1], [2, 1]]), np.array([0.8, 0.5], np.float32), 3, root)
    costs, previous = random((3, 27)) * 6, random((3, 3), 5) * 2
    chosen = kernels.min_sum(costs.copy(), tree, previous)
    # all of 27^3: one grid of labels per node, the energy as a sum of broadcast terms
    labels, carried, terms = vectors(1), np.ones(3), 0.0
    for position, node in enumerate(tree.order):
        own = [1, 1, 1]
        own[node] = 27
        parent = tree.parents[position]
        if parent >= 0:
            carried[position] = carried[parent] * tree.weights[position]
            above = tree.order[parent]
            gap = (labels[:, None] + previous[:, above]) - (labels + previous[:, node])[None]
            pairwise = (gap**2).sum(-1)  # parent, child
            both = [1, 1, 1]
            both[above] = both[node] = 27
            terms = terms + carried[parent] * (pairwise if above < node else pairwise.T).reshape(both)
        terms = terms + carried[position] * costs[node].reshape(own)
    assert energy(chosen, costs, tree, previous) == pytest.approx(terms.min(), abs=1e-4)
    assert tuple(chosen) == np.unravel_index(terms.argmin(), terms.shape)


def test_messages_on_seven_nodes_agree_with_exhaustive_search():
    edges = np.array([[3, 0], [3, 5], [0, 1], [0, 6], [5, 2], [2, 4]])  # not in the order of numbers, four deep
    tree = kernels.spanning_tree(edges, random(6, 2) * 0.9 + 0.1, 7, root=3)
    previous, generator = random((3, 7), 4) * 2, np.random.default_rng(3)
    costs = np.full((7, 27), 1000, np.float32)
    allowed = np.stack([generator.choice(27, 4, replace=False) for _ in range(7)])
    np.put_along_axis(costs, allowed, random((7, 4), 6) * 5, axis=1)
    chosen = kernels.min_sum(costs.copy(), tree, previous)
    best = min(itertools.product(*allowed), key=lambda labels: energy(labels, costs, tree, previous))
    assert energy(chosen, costs, tree, previous) == pytest.approx(energy(best, costs, tree, previous), abs=1e-4)
    assert tuple(chosen) == best


# fields --------------------------------------------------------------------------------------------------------------


def test_sampling_agrees_with_scipy_and_repeats_the_border():
    volumes, displacement = random((2, *SHAPE)), (random((3, *SHAPE), 1) - 0.5) * 12
    points = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij")) + displacement
    sampled = kernels.sample_at(volumes, displacement)
    for volume, found in zip(volumes, sampled, strict=True):
        assert np.allclose(found, map_coordinates(volume, points, order=1, mode="nearest"), atol=1e-5)


def test_resampling_puts_control_points_on_the_first_voxel_of_their_blocks():
    field = random((3, 3, 4, 5))
    dense = resample(field, (6, 12, 20))
    assert np.allclose(dense[:, ::2, ::3, ::4], field, atol=1e-6)
    assert np.allclose(dense[:, 1, 0, 0], field[:, :2, 0, 0].mean(1), atol=1e-6)
    assert np.allclose(dense[:, 5], dense[:, 4], atol=1e-6)  # beyond the last one


def test_consistent_fields_are_nearer_to_inverse_to_each_other():
    shape, spacing = (8, 9, 10), 2
    smooth = [gaussian_filter(random((3, *shape), seed) - 0.5, (0, 2, 2, 2)) * 30 for seed in (1, 2)]
    there, back = smooth[0], -smooth[0] + 0.4 * smooth[1]

    def residual(forward, backward):
        return np.abs(forward + kernels.sample_at(backward, forward / spacing)).mean()

    assert residual(*make_consistent(there, back, spacing)) < 0.1 * residual(there, back)


# the whole -----------------------------------------------------------------------------------------------------------


SMALL = Deeds(grid_spacings=(4, 3, 2), radii=(5, 3, 2), quantisations=(2, 1, 1))


def pair_with_known_displacement(shape=(40, 44, 48), size=8.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Texture, the same warped by a smooth displacement of `size` voxels at most, and that displacement."""
    moving = gaussian_filter(random(shape, 7), 1.2)
    moving = (moving - moving.min()) / (moving.max() - moving.min())
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    bump = np.prod([np.sin(np.pi * axis / (side - 1)) for axis, side in zip(grid, shape, strict=True)], axis=0)
    truth = (np.array([0.6, -0.5, 0.62]).reshape(3, 1, 1, 1) * bump * size).astype(np.float32)
    fixed = map_coordinates(moving, grid + truth, order=1, mode="nearest").astype(np.float32)
    return tuple(torch.from_numpy(array)[None] for array in (fixed[None], moving[None], truth))


@pytest.fixture(scope="module")
def registered():
    fixed, moving, truth = pair_with_known_displacement()
    return fixed, moving, truth, *SMALL.symmetric(fixed, moving)


def test_a_known_smooth_displacement_of_eight_voxels_is_found_to_less_than_one(registered):
    fixed, _, truth, displacement, _ = registered
    assert truth.norm(dim=1).max() > 7.9
    assert displacement.shape == (1, 3, *fixed.shape[2:]) and displacement.dtype == torch.float32
    error = (displacement - truth).norm(dim=1)
    assert error.mean() < 1
    assert error[truth.norm(dim=1) > 5].mean() < 1  # where there is much to find


def test_warping_by_the_result_makes_the_images_alike(registered):
    fixed, moving, _, displacement, _ = registered
    core = (..., slice(6, -6), slice(6, -6), slice(6, -6))  # outside the image warp gives zero
    before, after = moving - fixed, spatial.warp(moving, displacement) - fixed
    assert after[core].square().mean() < 0.1 * before[core].square().mean()


def test_the_two_directions_are_near_inverse_to_each_other(registered):
    *_, forward, backward = registered
    core = (..., slice(6, -6), slice(6, -6), slice(6, -6))
    for residual in (spatial.compose(forward, backward), spatial.compose(backward, forward)):
        assert residual[core].norm(dim=1).mean() < 0.05
        assert forward[core].norm(dim=1).mean() > 2


def test_an_image_onto_itself_gives_no_displacement():
    image = torch.from_numpy(gaussian_filter(random((24, 26, 28)), 1))[None, None]
    assert SMALL(image, image).abs().max() == 0


def test_results_are_the_same_for_every_number_of_threads(registered):
    fixed, moving, _, displacement, backward = registered
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("Numba was started with one thread only (NUMBA_NUM_THREADS)")
    torch.set_num_threads(1 if torch.get_num_threads() > 1 else 2)
    again = SMALL.symmetric(fixed, moving)
    assert numba.get_num_threads() == torch.get_num_threads()
    assert torch.equal(again[0], displacement) and torch.equal(again[1], backward)


def test_register_call_and_symmetric_agree_and_leave_their_arguments_alone():
    fixed, moving, _ = pair_with_known_displacement((16, 18, 20), 2)
    kept = fixed.clone(), moving.clone()
    quick = Deeds(grid_spacings=(3, 2), radii=(2, 1), quantisations=(1, 1))
    forward, backward = quick.symmetric(fixed.double(), moving.double())
    assert torch.equal(quick(fixed, moving), forward) and torch.equal(quick.register(fixed, moving), forward)
    swapped = quick.symmetric(moving, fixed)
    assert torch.equal(swapped[0], backward) and torch.equal(swapped[1], forward)
    assert torch.equal(fixed, kept[0]) and torch.equal(moving, kept[1])


def test_a_function_that_numba_cannot_cache_is_compiled_all_the_same():
    place: dict[str, object] = {}
    exec(compile("def double(value):\n    return 2 * value", "no such file", "exec"), place)
    with pytest.raises(RuntimeError, match="no locator"):
        numba.njit(cache=True)(place["double"])
    assert compiled(nogil=True)(place["double"])(21) == 42


# settings and bad inputs ---------------------------------------------------------------------------------------------


def test_settings_are_the_lumir_rows():
    row = Deeds()
    assert (row.name, row.alpha) == ("deedsBCV", 1.6)
    assert (row.grid_spacings, row.radii, row.quantisations) == ((6, 5, 4, 3, 2), (6, 5, 4, 3, 2), (5, 4, 3, 2, 1))


@pytest.mark.parametrize("resolution", [0.8, 1, 2, 3, 4, 5.5])
def test_settings_for_coarser_voxels_keep_the_reach_in_mm(resolution):
    row = Deeds.for_resolution(resolution)
    voxel = resolution / row.upsampling
    assert voxel <= 2 and row.grid_spacings[-1] * voxel <= 4
    assert 20 <= row.radii[0] * row.quantisations[0] * voxel <= 30
    assert row.quantisations[-1] == 1 and (row.upsampling == 1) == (resolution <= 2)


def test_at_one_mm_the_settings_are_the_rows_own_and_options_can_be_set():
    assert Deeds.for_resolution(1) == Deeds()
    assert Deeds.for_resolution(4, alpha=2.0, upsampling=1).alpha == 2
    with pytest.raises(ValueError, match="resolution_mm must be above 0, got -1"):
        Deeds.for_resolution(-1)


def test_upsampling_finds_displacements_between_voxels_and_returns_them_on_the_images_grid():
    fixed, moving, truth = pair_with_known_displacement()
    coarse = [spatial.resize(image, (20, 22, 24)) for image in (fixed, moving)]
    truth = spatial.resize_displacement(truth, (20, 22, 24))
    options = {"grid_spacings": (4, 3, 2), "radii": (5, 3, 2), "quantisations": (2, 1, 1)}
    fine = Deeds(**options, upsampling=2)(*coarse)
    assert fine.shape == truth.shape
    assert (fine - truth).norm(dim=1).mean() < 0.4


GOOD = torch.rand(1, 1, 12, 13, 14, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("fixed", "moving", "error", "message"),
    [
        (GOOD[0], GOOD, ValueError, r"fixed must be \(B, 1, D, H, W\), got \(1, 12, 13, 14\)"),
        (GOOD, GOOD.expand(2, -1, -1, -1, -1), ValueError, r"moving must be \(1, 1, D, H, W\), got \(2, 1, 12, 13"),
        (GOOD, GOOD[..., :12], ValueError, "fixed and moving must share batch size and spatial shape"),
        (GOOD.numpy(), GOOD, TypeError, "fixed must be a torch.Tensor, got ndarray"),
        (GOOD, (GOOD * 255).to(torch.uint8), TypeError, "moving must have a floating-point dtype, got torch.uint8"),
        (GOOD, GOOD.masked_fill(GOOD > 0.9, float("nan")), ValueError, "moving must hold finite values only"),
        (torch.zeros_like(GOOD), GOOD, ValueError, "fixed must have contrast, got 0 everywhere"),
        (GOOD[:, :, :9], GOOD[:, :, :9], ValueError, r"at least 12 voxels along each axis .* got \(9, 13, 14\)"),
    ],
)
def test_images_that_do_not_fit_are_refused(fixed, moving, error, message):
    with pytest.raises(error, match=message):
        Deeds()(fixed, moving)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radii": (3, 2)}, r"radii must be a tuple with one whole number per level \(5\), got \(3, 2\)"),
        ({"quantisations": [5, 4, 3, 2, 1]}, r"quantisations must be a tuple .*, got \[5, 4"),
        ({"grid_spacings": (6, 5, 4, 3, 0)}, r"grid_spacings must be whole numbers of 1 or more, got \(6"),
        ({"quantisations": (5, 4, 3, 2, 0.5)}, "quantisations must be whole numbers"),
        ({"alpha": 0.0}, "alpha must be above 0, got 0.0"),
        ({"upsampling": 0}, "upsampling must be a whole number of 1 or more, got 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Deeds(**options)


def test_pytorch_has_as_many_threads_afterwards_as_before():
    image = torch.rand(1, 1, 24, 26, 28, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(1)
    Deeds.for_resolution(4)(image, image)
    assert torch.get_num_threads() == 1
