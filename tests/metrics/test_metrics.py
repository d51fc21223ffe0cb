"""The challenge's metrics: golden numbers, hand-computed values, slow direct versions, and bad input."""

import itertools
import math

import numpy as np
import pytest
import surface_distance
import torch

from lumirlib import metrics, spatial
from lumirlib.metrics import jacobian, surface
from lumirlib.metrics.labels import LUMIR_LABELS

SHAPE = (5, 6, 7)


def volume(*boxes, shape=(12, 13, 14)) -> torch.Tensor:
    """A label volume (1, 1, D, H, W) with `(label, slices)` boxes painted in turn."""
    labels = torch.zeros(1, 1, *shape, dtype=torch.int16)
    for label, where in boxes:
        labels[(0, 0, *where)] = label
    return labels


def box(i, j, k):
    return slice(*i), slice(*j), slice(*k)


def random_labels(seed, shape=(12, 13, 14)):
    generator = np.random.default_rng(seed)
    coarse = generator.choice([0, 4, 11, 23, 30], size=tuple(-(-side // 3) for side in shape))
    fine = coarse.repeat(3, 0).repeat(3, 1).repeat(3, 2)[: shape[0], : shape[1], : shape[2]]
    fine = np.where(generator.random(shape) < 0.05, 31, fine)
    return torch.from_numpy(fine.astype(np.int16))[None, None]


def test_there_are_133_labels_with_background():
    assert len(LUMIR_LABELS) == 133 == len(set(LUMIR_LABELS))
    assert LUMIR_LABELS[0] == 0
    assert LUMIR_LABELS[-1] == 207


# Dice ----------------------------------------------------------------------------------------------------------------


def test_dice_of_equal_volumes_is_one():
    labels = random_labels(0)
    assert metrics.dice(labels, labels) == 1


def test_dice_of_half_overlapping_boxes_is_two_thirds():
    fixed = volume((4, box((0, 4), (0, 2), (0, 2))))
    warped = volume((4, box((2, 4), (0, 2), (0, 2))))
    assert metrics.dice_per_label(warped, fixed, labels=(4,))[0] == pytest.approx(2 * 8 / (16 + 8))


def test_dice_equals_a_counting_loop():
    warped, fixed, moving = random_labels(1), random_labels(2), random_labels(3)
    for value, label in zip(metrics.dice_per_label(warped, fixed, moving), LUMIR_LABELS, strict=True):
        both = in_warped = in_fixed = in_moving = 0
        for w, f, m in zip(*(labels.flatten().tolist() for labels in (warped, fixed, moving)), strict=True):
            in_warped, in_fixed, in_moving = in_warped + (w == label), in_fixed + (f == label), in_moving + (m == label)
            both += (w == label) and (f == label)
        if in_fixed and in_moving:
            assert value == pytest.approx(2 * both / (in_warped + in_fixed))
        else:
            assert math.isnan(value)


def test_label_absent_from_fixed_or_unwarped_moving_is_left_out_and_a_lost_one_counts_zero():
    fixed = volume((4, box((0, 2), (0, 2), (0, 2))), (11, box((4, 6), (0, 2), (0, 2))))
    moving = volume((4, box((0, 2), (0, 2), (0, 2))), (23, box((8, 9), (0, 2), (0, 2))))
    warped = volume()  # the warping lost everything
    per_label = metrics.dice_per_label(warped, fixed, moving, labels=(4, 11, 23))
    assert per_label[0] == 0
    assert np.isnan(per_label[1:]).all()
    assert metrics.dice(warped, fixed, moving, labels=(4, 11, 23)) == 0
    assert math.isnan(metrics.dice(warped, fixed, moving, labels=(11, 23)))


# HD95 ----------------------------------------------------------------------------------------------------------------


def test_hd95_of_equal_volumes_is_zero():
    labels = random_labels(0)
    assert metrics.hd95_mm(labels, labels) == 0


@pytest.mark.parametrize("spacing", [1.0, 4.0])
def test_hd95_of_a_shifted_box_is_the_shift_in_mm(spacing):
    fixed = volume((4, box((2, 6), (3, 9), (3, 10))))
    warped = volume((4, box((4, 8), (3, 9), (3, 10))))
    assert metrics.hd95_per_label_mm(warped, fixed, spacing_mm=spacing, labels=(4,))[0] == pytest.approx(2 * spacing)


def test_hd95_equals_the_reference_on_whole_volumes_borders_included():
    warped, fixed = random_labels(4), random_labels(5)
    ours = metrics.hd95_per_label_mm(warped, fixed, labels=(0, 4, 11, 23, 30, 31))
    for value, label in zip(ours, (0, 4, 11, 23, 30, 31), strict=True):
        masks = [labels[0, 0].numpy() == label for labels in (fixed, warped)]
        found = surface_distance.compute_surface_distances(*masks, [1, 1, 1])
        assert value == pytest.approx(surface_distance.compute_robust_hausdorff(found, 95), abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_hd95_equals_the_reference_on_blobs_of_odd_shapes_single_voxels_and_labels_at_the_border(seed):
    generator = np.random.default_rng(seed)
    shape = tuple(generator.integers(5, 19, 3))
    volumes = []
    for _ in range(2):
        coarse = generator.choice([0, 4, 11, 23, 300], size=tuple(-(-side // 4) for side in shape))
        fine = coarse.repeat(4, 0).repeat(4, 1).repeat(4, 2)[: shape[0], : shape[1], : shape[2]].astype(np.int16)
        fine[tuple(generator.integers(0, shape))] = 207  # one voxel
        fine[tuple(generator.integers(0, shape))] = 5  # a label that is not scored parts the others all the same
        volumes.append(torch.from_numpy(fine)[None, None])
    warped, fixed = volumes
    labels = (0, 4, 11, 23, 207, 300, 31)
    ours = metrics.hd95_per_label_mm(warped, fixed, spacing_mm=2.0, labels=labels)
    for value, label in zip(ours, labels, strict=True):
        masks = [labels[0, 0].numpy() == label for labels in (fixed, warped)]
        if not masks[0].any() or not masks[1].any():
            assert math.isnan(value)
            continue
        found = surface_distance.compute_surface_distances(*masks, [2.0] * 3)
        assert value == pytest.approx(surface_distance.compute_robust_hausdorff(found, 95), abs=1e-6)


def test_hd95_of_labels_far_apart_equals_the_reference():
    fixed = volume((4, box((0, 2), (1, 3), (0, 2))), shape=(40, 8, 9))
    warped = volume((4, box((1, 2), (2, 3), (0, 2))), (4, box((36, 40), (5, 8), (7, 9))), shape=(40, 8, 9))
    found = surface_distance.compute_surface_distances(*[v[0, 0].numpy() == 4 for v in (fixed, warped)], [1, 1, 1])
    expected = surface_distance.compute_robust_hausdorff(found, 95)
    assert expected > surface.REACH
    assert metrics.hd95_per_label_mm(warped, fixed, labels=(4,))[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("threads", [1, 3])
def test_metrics_do_not_depend_on_the_number_of_threads(threads):
    warped, fixed = random_labels(6), random_labels(7)
    displacement = torch.randn(1, 3, *fixed.shape[2:], generator=torch.Generator().manual_seed(8))
    expected = metrics.hd95_per_label_mm(warped, fixed), metrics.ndv_percent(displacement)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert np.array_equal(metrics.hd95_per_label_mm(warped, fixed), expected[0], equal_nan=True)
        assert metrics.ndv_percent(displacement) == expected[1]
    finally:
        torch.set_num_threads(before)


def test_hd95_of_a_lost_label_is_infinite_and_of_an_absent_one_nan():
    fixed = volume((4, box((0, 2), (0, 2), (0, 2))))
    moving = volume((4, box((5, 6), (5, 6), (5, 6))))
    per_label = metrics.hd95_per_label_mm(volume(), fixed, moving, labels=(4, 11))
    assert math.isinf(per_label[0])
    assert math.isnan(per_label[1])
    assert math.isinf(metrics.hd95_mm(volume(), fixed, moving, labels=(4, 11)))


# inverse consistency -------------------------------------------------------------------------------------------------


def test_inverse_consistency_error_is_the_length_that_is_left_inside_the_brain():
    forward = torch.tensor([2.0, 0, 0]).view(1, 3, 1, 1, 1).expand(1, 3, 12, 13, 14).clone()
    backward = torch.tensor([-1.0, 0, 0.5]).view(1, 3, 1, 1, 1).expand_as(forward).clone()
    backward[..., :5] = 50  # outside the brain
    moving = torch.zeros(1, 1, 12, 13, 14)
    moving[..., 3:9, 3:9, 6:9] = 0.5
    expected = math.hypot(1, 0.5)
    assert metrics.inverse_consistency_error(forward, backward, moving) == pytest.approx(expected, rel=1e-6)
    assert metrics.inverse_consistency_error(forward, -forward, moving) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="moving must have voxels above zero, got none"):
        metrics.inverse_consistency_error(forward, backward, moving * 0)


# TRE -----------------------------------------------------------------------------------------------------------------


def test_tre_is_the_distance_of_centroids_in_mm():
    fixed = metrics.landmark_volume({"a": (2, 3, 4), "b": (8, 8, 8)}, (12, 13, 14))
    warped = metrics.landmark_volume({"a": (2, 6, 8), "b": (8, 8, 9)}, (12, 13, 14))
    assert metrics.tre_mm(warped, fixed, spacing_mm=2.0) == pytest.approx(2 * (5 + 1) / 2)


def test_landmarks_that_overlap_go_into_layers_of_their_own():
    points = {"a": (4, 4, 4), "b": (4, 4, 5), "c": (9, 9, 9)}
    layers = metrics.landmark_volume(points, (12, 13, 14))
    assert layers.shape == (1, 2, 12, 13, 14)
    assert [int((layers == n).sum()) for n in (1, 2, 3)] == [7, 7, 7]
    assert metrics.tre_mm(layers, layers) == 0


def test_tre_of_a_vanished_landmark_is_nan_and_left_out_of_the_mean():
    fixed = metrics.landmark_volume({"a": (2, 3, 4), "b": (8, 8, 8)}, (12, 13, 14))
    warped = torch.where(fixed == 2, 0, fixed)
    assert np.isnan(metrics.tre_per_landmark_mm(warped, fixed)).tolist() == [False, True]
    assert metrics.tre_mm(warped, fixed) == 0


def test_both_forms_of_tre_agree_on_a_translation_by_whole_voxels():
    fixed_points, moving_points = {"a": (3, 4, 5), "b": (6, 7, 5)}, {"a": (4, 4, 7), "b": (8, 7, 7)}
    displacement = torch.tensor([1.0, 0, 2]).view(1, 3, 1, 1, 1).expand(1, 3, 12, 13, 14)
    moving = metrics.landmark_volume(moving_points, (12, 13, 14))
    fixed = metrics.landmark_volume(fixed_points, (12, 13, 14))
    challenge = metrics.tre_mm(spatial.warp(moving, displacement, "nearest"), fixed)
    textbook = metrics.tre_points_mm(displacement, fixed_points, moving_points)
    assert challenge == pytest.approx(0.5)
    assert textbook == pytest.approx(0.5)


def test_textbook_tre_is_sub_voxel():
    displacement = torch.tensor([0.25, 0, 0]).view(1, 3, 1, 1, 1).expand(1, 3, 12, 13, 14)
    points = {"a": (3.5, 4.2, 5.1)}
    assert metrics.tre_points_mm(displacement, points, points, spacing_mm=4.0) == pytest.approx(1.0, abs=1e-5)


# NDV -----------------------------------------------------------------------------------------------------------------


def direct_ndv(displacement):
    """The ten determinants of every interior voxel, one after the other."""
    points = displacement + np.stack(np.meshgrid(*map(np.arange, displacement.shape[1:]), indexing="ij"))
    volume = 0.0
    for place in itertools.product(*(range(1, side - 1) for side in displacement.shape[1:])):

        def at(offset, place=place):
            return points[(slice(None), *np.add(place, offset))]

        here, steps = at((0, 0, 0)), np.eye(3, dtype=int)
        determinants = [
            np.linalg.det(np.stack([s * (at(s * axis) - here) for s, axis in zip(signs, steps, strict=True)], 1))
            for signs in itertools.product((1, -1), repeat=3)
        ]
        for corners in (((-1, -1, 0), (-1, 0, -1), (0, -1, -1)), ((1, 1, 0), (0, 1, 1), (1, 0, 1))):
            determinants.append(np.linalg.det(np.stack([at(corner) - here for corner in corners], 1)))
        volume += sum(0.5 * max(-determinant, 0) for determinant in determinants) / 6
    return volume


def pushed(axis, voxels, shape=(7, 8, 9)):
    displacement = torch.zeros(1, 3, *shape, dtype=torch.float64)
    displacement[0, axis, 3, 4, 4] = voxels
    return displacement


def test_ndv_of_the_identity_is_zero():
    assert metrics.ndv_percent(torch.zeros(1, 3, *SHAPE)) == 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_ndv_of_a_flipped_axis_is_100_and_of_a_collapsed_one_0(axis):
    grid = spatial.identity_grid(SHAPE)
    displacement = torch.zeros_like(grid)
    displacement[:, axis] = SHAPE[axis] - 1 - 2 * grid[:, axis]
    assert metrics.ndv_percent(displacement) == pytest.approx(100)
    displacement[:, axis] = -grid[:, axis]
    assert metrics.ndv_percent(displacement) == 0


def test_ndv_of_the_golden_random_displacement():
    displacement = np.random.RandomState(0).uniform(-1, 1, (3, 8, 9, 10))
    tensor = torch.from_numpy(displacement)[None]
    volume, counted = metrics.ndv_volume(tensor)
    assert metrics.ndv_percent(tensor) == pytest.approx(25.09697, abs=1e-5)
    assert volume == pytest.approx(84.32583, abs=1e-5)
    assert counted == 336
    assert volume == pytest.approx(direct_ndv(displacement), rel=1e-12)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_ndv_volume_of_one_voxel_pushed_by_two_is_two_thirds(axis):
    assert metrics.ndv_volume(pushed(axis, 2.0))[0] == pytest.approx(2 / 3)


def test_ndv_volume_of_one_voxel_pushed_along_i_grows_with_the_push():
    assert metrics.ndv_volume(pushed(0, 1.5))[0] == pytest.approx(1 / 3)
    assert metrics.ndv_volume(pushed(0, 3.0))[0] == pytest.approx(5 / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ndv_equals_a_slow_direct_version(dtype):
    generator = np.random.default_rng(12)
    displacement = torch.from_numpy(generator.normal(0, 0.6, (1, 3, 6, 7, 8))).to(dtype)
    mask = torch.from_numpy(generator.random((1, 1, 6, 7, 8)) < 0.7)
    moved = displacement[0].double().numpy() + np.indices((6, 7, 8))
    volume = count = 0
    for place in itertools.product(range(1, 5), range(1, 6), range(1, 7)):
        if not mask[(0, 0, *place)]:
            continue
        count += 1

        def edge(*by, place=place):
            return moved[(slice(None), *np.add(place, by))] - moved[(slice(None), *place)]

        tetrahedra = [
            [sign * edge(*(sign * axis)) for sign, axis in zip(signs, np.eye(3, dtype=int), strict=True)]
            for signs in itertools.product((1, -1), repeat=3)
        ]
        tetrahedra.append([edge(-1, -1, 0), edge(-1, 0, -1), edge(0, -1, -1)])
        tetrahedra.append([edge(1, 1, 0), edge(0, 1, 1), edge(1, 0, 1)])
        volume += sum(0.5 * max(-np.linalg.det(np.stack(columns, 1)), 0) / 6 for columns in tetrahedra)
    assert volume > 1
    assert metrics.ndv_volume(displacement, mask) == pytest.approx((volume, count), rel=1e-10)


def test_ndv_of_whole_tensors_as_on_a_gpu_is_the_same_however_they_are_cut(monkeypatch):
    displacement = torch.from_numpy(np.random.RandomState(1).uniform(-1, 1, (1, 3, 19, 8, 9)))
    mask = torch.rand(1, 1, 19, 8, 9, generator=torch.Generator().manual_seed(2)) > 0.3
    compiled = metrics.ndv_volume(displacement, mask)
    monkeypatch.setattr(jacobian, "BLOCK", 3)
    assert jacobian.ndv_in_blocks(displacement, mask) == pytest.approx(compiled, rel=1e-12)


def test_ndv_counts_only_inside_the_mask_and_never_at_the_border():
    displacement = torch.from_numpy(np.random.RandomState(2).uniform(-1, 1, (1, 3, 8, 9, 10)))
    mask = torch.zeros(1, 1, 8, 9, 10)
    mask[..., :5] = 3.0
    _, counted = metrics.ndv_volume(displacement, mask)
    assert counted == 6 * 7 * 4
    halves = metrics.ndv_volume(displacement, mask)[0] + metrics.ndv_volume(displacement, 1 - mask.clamp(max=1))[0]
    assert halves == pytest.approx(metrics.ndv_volume(displacement)[0])


# bad input -----------------------------------------------------------------------------------------------------------

ZERO = torch.zeros(1, 3, *SHAPE)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: metrics.dice(random_labels(0).float(), random_labels(0)),
            TypeError,
            "warped_labels must have an integer dtype",
        ),
        (lambda: metrics.dice(random_labels(0)[0, 0], random_labels(0)), ValueError, r"warped_labels must be \(B, 1"),
        (lambda: metrics.dice(random_labels(0)[..., :-1], random_labels(0)), ValueError, "like fixed_labels"),
        (lambda: metrics.dice(random_labels(0) - 1, random_labels(0)), ValueError, "warped_labels must hold .* got -1"),
        (lambda: metrics.dice(random_labels(0), random_labels(0), random_labels(0) > 0), TypeError, "moving_labels mu"),
        (lambda: metrics.tre_mm(volume(), volume(shape=(5, 6, 7))), ValueError, "must be on the grid"),
        (lambda: metrics.tre_mm(volume().expand(2, -1, -1, -1, -1), volume()), ValueError, r"must be \(1, L, D, H, W"),
        (lambda: metrics.tre_mm(volume(), volume(), spacing_mm=-1), ValueError, "spacing_mm must be positive, got -1"),
        (lambda: metrics.ndv_percent(ZERO, np.ones(SHAPE)), TypeError, r"mask must be a torch\.Tensor, got ndarray"),
        (lambda: metrics.hd95_mm(random_labels(0), random_labels(0), spacing_mm=0), ValueError, "spacing_mm must be"),
        (lambda: metrics.tre_mm(volume(), volume()), ValueError, "fixed_landmarks must hold at least one landmark"),
        (lambda: metrics.landmark_volume({"a": (50, 1, 1)}, (12, 13, 14)), ValueError, "landmark 'a' at .* outside"),
        (lambda: metrics.tre_points_mm(ZERO, {"a": (1, 1, 1)}, {"b": (1, 1, 1)}), ValueError, "of which 0 are shared"),
        (lambda: metrics.ndv_percent(ZERO * math.nan), ValueError, "displacement must be finite"),
        (lambda: metrics.ndv_percent(ZERO, torch.zeros(1, 1, *SHAPE)), ValueError, "mask must hold at least one"),
        (lambda: metrics.ndv_percent(ZERO, torch.ones(SHAPE)), ValueError, r"mask must be \(1, 1, 5, 6, 7\)"),
        (lambda: metrics.ndv_percent(torch.zeros(1, *SHAPE, 3)), ValueError, r"displacement must be \(B, 3, D, H, W"),
    ],
)
def test_input_that_does_not_fit_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_scores_and_warps_labels_as_the_cpu_does():
    warped, fixed = random_labels(9), random_labels(10)
    displacement = torch.randn(1, 3, *fixed.shape[2:], generator=torch.Generator().manual_seed(11))
    assert metrics.dice(warped.cuda(), fixed.cuda()) == pytest.approx(metrics.dice(warped, fixed), abs=1e-12)
    assert metrics.ndv_percent(displacement.cuda()) == pytest.approx(metrics.ndv_percent(displacement), rel=1e-9)
    on_gpu = spatial.warp(warped.cuda(), displacement.cuda(), "nearest").cpu()
    assert torch.equal(on_gpu, spatial.warp(warped, displacement, "nearest"))
