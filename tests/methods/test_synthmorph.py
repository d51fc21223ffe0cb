"""SynthMorph: the generator's images and deformations, the Dice of all labels at once, the network and its training."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from lumirlib import metrics, spatial
from lumirlib.methods.base import PAPER
from lumirlib.methods.presets import get_preset
from lumirlib.methods.synthesis import (
    CORTEX_FROM,
    MIRRORED_PAIRS,
    SynthesisOptions,
    deform_labels,
    draw_contrast,
    random_deformation,
    synthesize,
)
from lumirlib.methods.synthmorph import SynthMorph, SynthMorphNetwork, soft_dice_loss
from lumirlib.metrics.labels import LUMIR_LABELS
from lumirlib.study.report.figures import synthesis_figure

SHAPE = (15, 18, 13)
#: Nothing but a value per label.
FLAT = SynthesisOptions(
    sigma_low=0,
    sigma_high=0,
    blur_voxels=0,
    bias_sigma=0,
    gamma_sigma=0,
    noise_sigma=0,
    zero_background=0,
    mirrored=0,
    shared_cortex=0,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def blocks(shape=SHAPE, numbers=(0, 44, 45, 100, 101, 106), seed=0, dtype=torch.int16):
    """A label map of blocks of 3^3 voxels inside a margin of background."""
    coarse = [-(-side // 3) for side in shape]
    place = torch.randint(len(numbers), (1, 1, *coarse), generator=seeded(seed)).float()
    place = torch.nn.functional.interpolate(place, scale_factor=3, mode="nearest")[(..., *map(slice, shape))]
    labels = torch.tensor(numbers)[place.long()]
    margin = torch.zeros_like(labels)
    margin[..., 2:-2, 2:-2, 2:-2] = 1
    return (labels * margin).to(dtype)


def narrow():
    torch.manual_seed(0)
    return SynthMorph(encoder="2-3-4", decoder="4-3-5-2")


# generator -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPE, (5, 6, 7)])
def test_images_fill_the_range_from_0_to_1_at_odd_sizes(shape):
    labels = blocks(shape)
    for seed in range(12):
        image = synthesize(labels, seeded(seed))
        assert image.shape == (1, 1, *shape) and image.dtype == torch.float32
        assert image.min() == 0 and image.max() == 1


def test_the_same_seed_gives_the_same_image_and_another_seed_another():
    labels = blocks()
    first, again, other = (synthesize(labels, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.02
    first, again, other = (random_deformation(SHAPE, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_the_label_map_is_left_as_it_is():
    labels = blocks(dtype=torch.int64)
    before = labels.clone()
    synthesize(deform_labels(labels, seeded()), seeded())
    synthesize(labels, seeded(), replace(FLAT, mirrored=1, shared_cortex=1))
    assert torch.equal(labels, before)


def test_voxels_of_one_label_share_one_value_and_labels_differ():
    labels = blocks()
    image = synthesize(labels, seeded(), FLAT)
    values = [image[labels == number] for number in labels.unique()]
    assert all(value.max() == value.min() for value in values)
    assert len({float(value[0]) for value in values}) == len(values)


def test_mean_and_spread_are_the_same_all_over_a_label():
    labels = blocks((30, 33, 27))
    image = synthesize(labels, seeded(1), replace(FLAT, sigma_low=0.05, sigma_high=0.05))
    half = torch.zeros_like(labels, dtype=torch.bool)
    half[:, :, :15] = True
    for number in labels.unique():
        one, two = image[(labels == number) & half], image[(labels == number) & ~half]
        error = one.std() * (1 / len(one) + 1 / len(two)) ** 0.5
        assert (one.mean() - two.mean()).abs() < 4 * error
        assert 0.8 < one.std() / two.std() < 1.25


def test_a_label_keeps_its_spread_as_others_do():
    labels = blocks((30, 33, 27))
    image = synthesize(labels, seeded(1), replace(FLAT, sigma_low=0.01, sigma_high=0.1))
    spreads = torch.stack([image[labels == number].std() for number in labels.unique()])
    assert spreads.max() / spreads.min() > 1.5


def test_a_stripped_background_is_exactly_zero_and_another_one_is_not():
    labels = blocks()
    noisy = {"sigma_low": 0.05, "noise_sigma": 0.05, "bias_sigma": 0.3, "sigma_high": 0.1}
    for seed in range(5):
        stripped = synthesize(labels, seeded(seed), replace(FLAT, **noisy, zero_background=1))
        assert (stripped[labels == 0] == 0).all() and stripped[labels > 0].mean() > 0.1
        bright = synthesize(labels, seeded(seed), replace(FLAT, **noisy))
        assert (bright[labels == 0] > 0).float().mean() > 0.9


def test_blur_does_not_darken_a_bright_background_at_the_border():
    labels = torch.zeros(1, 1, *SHAPE, dtype=torch.int16)
    labels[..., 6:9, 8:10, 5:8] = 44
    options = replace(FLAT, blur_voxels=1.0)
    images = [synthesize(labels, seeded(seed), options) for seed in range(6)]
    assert all(torch.allclose(image[..., 0, 0], image[0, 0, 0, 0, 0], atol=1e-4) for image in images)
    assert any(((image > 0.2) & (image < 0.8)).any() for image in images)  # it was blurred


def test_left_and_right_and_the_cortex_can_look_alike():
    labels = blocks()

    def value(options, number):
        return float(synthesize(labels, seeded(), options)[labels == number][0])

    mirrored, cortex = replace(FLAT, mirrored=1), replace(FLAT, shared_cortex=1)
    assert value(mirrored, 44) == value(mirrored, 45) and value(mirrored, 100) == value(mirrored, 101)
    assert len({value(mirrored, number) for number in (44, 100, 106, 0)}) == 4
    assert value(cortex, 100) == value(cortex, 101) == value(cortex, 106)
    assert len({value(cortex, number) for number in (44, 45, 106, 0)}) == 4


def test_images_of_one_contrast_share_the_values_of_labels_and_nothing_else():
    first, second = blocks(seed=1), blocks(seed=2)
    second[second == 106] = 45  # one label less
    for seed in range(4):
        contrast = draw_contrast((0, 44, 45, 100, 101, 106), seeded(seed), replace(FLAT, gamma_sigma=0.3))
        one, other = (synthesize(labels, seeded(9), FLAT, contrast) for labels in (first, second))
        ranges = [contrast.means[labels.unique().long()] for labels in (first, second)]
        for number in second.unique():
            for labels, image, means in ((first, one, ranges[0]), (second, other, ranges[1])):
                expected = (contrast.means[number] - means.min()) / (means.max() - means.min())
                found = image[labels == number]
                assert torch.allclose(found, expected**contrast.gamma, atol=1e-5)
    contrast = draw_contrast(range(107), seeded(), SynthesisOptions(zero_background=1))
    sharp = SynthesisOptions(blur_voxels=0)
    one, other = (synthesize(first, seeded(seed), sharp, contrast) for seed in (1, 2))
    inside = first > 0
    assert (one[~inside] == 0).all() and not torch.allclose(one[inside], other[inside], atol=0.02)
    with pytest.raises(ValueError, match="contrast must be of labels up to 106, got 45"):
        synthesize(first, seeded(), None, draw_contrast((0, 44, 45), seeded()))


def test_mirrored_pairs_lie_on_either_side_of_the_midline(embedded_cohort):
    labels = embedded_cohort.label_volume(embedded_cohort.train[0])[0, 0]
    cortex = [(number, number + 1) for number in LUMIR_LABELS if number >= CORTEX_FROM and number % 2 == 0]
    assert {number for pair in (*MIRRORED_PAIRS, *cortex) for number in pair} <= set(LUMIR_LABELS)
    for right, left in [(44, 45), (59, 60), (47, 48), (120, 121), (160, 161)]:
        assert (right, left) in (*MIRRORED_PAIRS, *cortex)
        ends = [torch.nonzero(labels == number).float().mean(0) for number in (right, left)]
        middle = (labels.shape[0] - 1) / 2
        assert (ends[0][0] - middle) * (ends[1][0] - middle) < 0
        assert torch.linalg.vector_norm((ends[0] - ends[1])[1:]) < 5  # voxels of 4 mm


def test_bias_field_and_gamma_change_the_picture_smoothly():
    labels = torch.ones(1, 1, 24, 30, 36, dtype=torch.int16)
    labels[..., 20:] = 2
    flat = synthesize(labels, seeded(), replace(FLAT, resolution_mm=4))
    biased = synthesize(labels, seeded(), replace(FLAT, resolution_mm=4, bias_sigma=0.5))
    inside = biased[..., :20]
    assert flat[..., :20].std() == 0 and inside.std() > 0.01
    assert inside.diff(dim=2).abs().max() < 0.25 * (inside.max() - inside.min())  # nodes are 10 voxels apart
    grey = synthesize(blocks(), seeded(), replace(FLAT, gamma_sigma=0.5))
    plain = synthesize(blocks(), seeded(), FLAT)
    between = (plain > 0) & (plain < 1)
    exponents = grey[between].log() / plain[between].log()
    assert torch.allclose(exponents, exponents[0], rtol=1e-3) and (exponents[0] - 1).abs() > 0.01


# deformation ---------------------------------------------------------------------------------------------------------


def test_deformation_makes_no_new_labels_and_moves_some():
    labels = blocks((30, 33, 27))
    moved = deform_labels(labels, seeded(), SynthesisOptions(warp_sigma_mm=8))
    assert moved.dtype == labels.dtype and moved.shape == labels.shape
    assert set(moved.unique().tolist()) <= set(labels.unique().tolist())
    assert 0.05 < (moved != labels).float().mean() < 0.9
    assert torch.equal(deform_labels(labels, seeded(), SynthesisOptions(warp_sigma_mm=0)), labels)


def test_deformations_do_not_fold():
    for seed in range(4):
        displacement = random_deformation((31, 40, 35), seeded(seed), SynthesisOptions(resolution_mm=4))
        assert displacement.shape == (1, 3, 31, 40, 35)
        assert metrics.ndv_percent(displacement) < 1e-6


def test_deformation_has_the_same_length_in_mm_at_any_resolution():
    fine = random_deformation((65, 81, 73), seeded(5), SynthesisOptions(resolution_mm=2)) * 2
    coarse = random_deformation((33, 41, 37), seeded(5), SynthesisOptions(resolution_mm=4)) * 4
    assert coarse.abs().max() > 1
    assert (spatial.resize(fine, (33, 41, 37)) - coarse).abs().mean() < 0.1 * coarse.abs().mean()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: synthesize(blocks().float(), seeded()), TypeError, "labels must have an integer dtype"),
        (lambda: synthesize(blocks()[0], seeded()), ValueError, r"labels must be \(B, 1, D, H, W\)"),
        (lambda: synthesize(blocks().repeat(2, 1, 1, 1, 1), seeded()), ValueError, r"labels must be \(1, 1, D, H, W"),
        (lambda: random_deformation((5, 2, 7), seeded()), ValueError, "shape must be three sides of at least 3"),
        (lambda: SynthesisOptions(resolution_mm=0), ValueError, "resolution_mm must be above 0, got 0"),
        (lambda: SynthesisOptions(mirrored=1.5), ValueError, "mirrored must be a probability from 0 to 1, got 1.5"),
        (lambda: SynthesisOptions(blur_voxels=-1), ValueError, "blur_voxels must be 0 or more, got -1"),
        (lambda: SynthesisOptions(mean_low=0.9, mean_high=0.1), ValueError, "mean_low must be from 0 to mean_high"),
        (lambda: synthesis_figure(blocks(), seeded(), 0), ValueError, "n must be 1 or more, got 0"),
    ],
)
def test_wrong_arguments_of_the_generator_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_figure_shows_the_label_map_and_as_many_images_as_asked_for():
    figure = synthesis_figure(blocks(), seeded(), 3)
    shown = [np.asarray(ax.images[0].get_array()) for ax in figure.axes]
    assert [ax.get_title() for ax in figure.axes] == ["label map", "synthetic 1", "synthetic 2", "synthetic 3"]
    assert all(picture.shape == (18, 15) for picture in shown)
    assert not np.array_equal(shown[1], shown[2])
    plt.close(figure)


# soft Dice -----------------------------------------------------------------------------------------------------------


def one_hot_dice(moving, fixed, displacement, between_voxels):
    terms = []
    for number in sorted((set(moving.unique().tolist()) & set(fixed.unique().tolist())) - {0}):
        warped, own = (moving == number).to(displacement.dtype), (fixed == number).to(displacement.dtype)
        if between_voxels:
            points = spatial.identity_grid(SHAPE, dtype=displacement.dtype) + displacement
            warped = spatial.sample(warped, torch.nn.functional.avg_pool3d(points, 2, stride=1))
            own = torch.nn.functional.avg_pool3d(own, 2, stride=1)
        else:
            warped = spatial.warp(warped, displacement)
        terms.append(2 * (warped * own).sum() / (warped + own).sum())
    return 1 - torch.stack(terms).mean()


@pytest.mark.parametrize("between_voxels", [False, True])
def test_soft_dice_and_its_gradient_are_those_of_warped_one_hot_volumes(between_voxels):
    moving, fixed = blocks(seed=1), blocks(seed=2)
    moving[moving == 106], fixed[fixed == 44] = 73, 72  # labels that only one has
    results = []
    for function in (soft_dice_loss, one_hot_dice):
        displacement = 4 * (torch.rand(1, 3, *SHAPE, generator=seeded(), dtype=torch.float64) - 0.5)
        displacement[..., 0] -= 3  # some of it out of the grid
        loss = function(moving, fixed, displacement.requires_grad_(), between_voxels)
        loss.backward()
        results.append((loss.detach(), displacement.grad))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-9)
    assert results[0][1].abs().max() > 0 and torch.allclose(results[0][1], results[1][1], atol=1e-9)


def test_a_small_motion_costs_less_between_voxels_than_on_them():
    labels = blocks((30, 33, 27))
    noise = 0.05 * torch.randn(1, 3, 30, 33, 27, generator=seeded())
    costs = [
        float(soft_dice_loss(labels, labels, noise, way) - soft_dice_loss(labels, labels, 0 * noise, way))
        for way in (False, True)
    ]
    assert costs[0] > 0.01 and costs[1] < 0.2 * costs[0]


def test_soft_dice_of_a_block_moved_by_half_a_voxel():
    labels = torch.zeros(1, 1, 6, 7, 8, dtype=torch.int16)
    labels[..., 2:4, 2:5, 3:6] = 7
    half = torch.zeros(1, 3, 6, 7, 8)
    half[:, 0] = 0.5
    # along i the warped block is 1/2, 1, 1/2: of two voxels one and a half overlap
    assert float(soft_dice_loss(labels, labels, half)) == pytest.approx(1 - 2 * 1.5 / (2 + 2))
    assert float(soft_dice_loss(labels, labels, 0 * half)) == pytest.approx(0, abs=1e-6)
    assert float(soft_dice_loss(labels, labels, 8 * half)) == pytest.approx(1)
    # between voxels both are 1/2, 1 ... 1, 1/2 along each axis
    squares = (0.5 + 1) * (0.5 + 2) * (0.5 + 2)
    assert float(soft_dice_loss(labels, labels, 0 * half, True)) == pytest.approx(1 - squares / (2 * 3 * 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda u: soft_dice_loss(blocks(numbers=(0, 4)), blocks(numbers=(0, 5)), u), "a label above 0 in common"),
        (lambda u: soft_dice_loss(blocks(), blocks((5, 6, 7)), u), "moving_labels and fixed_labels must share"),
        (lambda u: soft_dice_loss(blocks(), blocks(), u[..., 1:]), "moving_labels and displacement must share"),
        (lambda u: soft_dice_loss(blocks(), blocks(), u[:, :2]), r"displacement must be \(B, 3, D, H, W\)"),
    ],
)
def test_wrong_arguments_of_the_dice_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 3, *SHAPE))


# network and training ------------------------------------------------------------------------------------------------


def test_parameters_are_those_of_a_hand_count():
    def conv(width_in, width_out):
        return 27 * width_in * width_out + width_out

    encoder = conv(2, 64) + 3 * conv(64, 64)
    decoder = conv(64, 64) + 3 * conv(128, 64) + 2 * conv(64, 64)  # three of them after a skip
    count = sum(parameter.numel() for parameter in SynthMorph().build().parameters())
    assert count == encoder + decoder + conv(64, 3) == 1_336_387


@pytest.mark.parametrize("shape", [SHAPE, (8, 9, 11)])
def test_network_works_at_odd_sizes_and_every_parameter_gets_a_gradient(shape):
    model = narrow().build()
    torch.nn.init.normal_(model.flow.weight, std=0.1)
    fixed, moving = (synthesize(blocks(shape, seed=seed), seeded(seed)) for seed in (1, 2))
    assert model.velocity(fixed, moving).shape == (1, 3, *(-(-side // 2) for side in shape))
    displacement = model(fixed, moving)
    assert displacement.shape == (1, 3, *shape) and displacement.dtype == torch.float32
    displacement.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_constant_velocity_moves_by_twice_its_length():
    model = narrow().build()
    torch.nn.init.zeros_(model.flow.weight)
    with torch.no_grad():
        model.flow.bias.copy_(torch.tensor([0.5, -0.25, 0.0]))
        displacement = model(torch.rand(1, 1, 21, 25, 23), torch.rand(1, 1, 21, 25, 23))
    expected = torch.tensor([1.0, -0.5, 0.0]).view(1, 3, 1, 1, 1).expand(1, 3, 21, 25, 23)
    inside = (..., *[slice(6, -6)] * 3)  # velocity is zero outside the grid
    assert torch.allclose(displacement[inside], expected[inside], atol=1e-5)


def test_a_step_depends_on_the_generator_alone_and_weighs_as_the_preset_says():
    row = narrow()
    model, preset = row.build(), row.training_preset(get_preset("demo", smoothness_weight=9.0))
    torch.nn.init.normal_(model.flow.weight, std=0.1)
    fixed, moving = blocks(seed=1), blocks(seed=2)
    first, again, other = (row.loss_terms(model, fixed, moving, preset, seeded(seed)) for seed in (1, 1, 2))
    assert first["total"] == again["total"] != other["total"]
    assert preset.smoothness_weight == row.smoothness_weight
    expected = first["similarity"] + row.smoothness_weight * first["smoothness"]
    assert torch.allclose(first["total"], expected) and first["smoothness"] > 0
    first["total"].backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("coarse", [False, True])
def test_training_on_labels_aligns_images_that_were_never_seen(coarse):
    shape = (12, 14, 16)
    grid = spatial.identity_grid(shape)
    labels = []
    for centre in ((4.5, 6.0, 7.0), (6.5, 8.0, 8.0)):
        distance = torch.linalg.vector_norm(grid - torch.tensor(centre).view(1, 3, 1, 1, 1), dim=1, keepdim=True)
        labels.append(torch.where(distance < 2.5, 45, torch.where(distance < 4, 44, 0)).to(torch.int16))
    fixed, moving = labels
    row = SynthMorph(smoothness_weight=0.2)
    row = row.at_preset(get_preset("demo")) if coarse else row
    row = replace(row, encoder="8-8-8", decoder="8-8-8-8", warp_sigma_mm=0.0, draws=1)
    torch.manual_seed(0)
    model, preset, generator = row.build(), row.training_preset(get_preset("demo")), seeded()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    before = float(soft_dice_loss(moving, fixed, torch.zeros(1, 3, *shape)))
    for _ in range(40):
        optimizer.zero_grad()
        row.loss_terms(model, fixed, moving, preset, generator)["total"].backward()
        optimizer.step()
    images = [synthesize(volume, seeded(99)) for volume in labels]
    with torch.no_grad():
        after = float(soft_dice_loss(moving, fixed, model(*images)))
    assert after < 0.7 * before


def test_row_adapts_the_preset_and_narrows():
    row = SynthMorph()
    assert row.trains_on == "labels"
    assert row.narrowed(4).encoder == "16-16-16-16" and row.narrowed(4).decoder == "16-16-16-16-16-16"
    assert row.narrowed(1) == row
    assert row.narrowed(4).build()(torch.rand(1, 1, 9, 8, 10), torch.rand(1, 1, 9, 8, 10)).shape == (1, 3, 9, 8, 10)
    adapted = row.training_preset(PAPER)
    assert adapted.epochs == PAPER.epochs and adapted.smoothness_weight == 1.0
    assert row.synthesis(4).resolution_mm == 4
    with pytest.raises(ValueError, match="divisor must be 1 or more, got 0"):
        row.narrowed(0)
    with pytest.raises(ValueError, match="encoder must have at least two widths"):
        SynthMorphNetwork((8,), (8, 8))
    with pytest.raises(ValueError, match="squarings must be a whole number from 0, got -1"):
        SynthMorphNetwork(squarings=-1)


def test_on_coarse_voxels_the_row_takes_the_settings_that_learn_in_few_steps():
    row = SynthMorph()
    assert row.at_preset(PAPER) == row
    fine, coarse = row.at_preset(get_preset("half")), row.at_preset(get_preset("demo"))
    assert fine.draws == row.draws and not fine.normalization
    assert (coarse.draws, coarse.shared_contrast, coarse.corruption, coarse.normalization) == (4, 1.0, 0.5, True)
    assert coarse.synthesis(4).sigma_high == row.synthesis(4).sigma_high / 2
    assert coarse.build().flow.weight.std() > 30 * row.build().flow.weight.std()
    for name in ("shared_contrast", "corruption", "flow_std"):
        with pytest.raises(ValueError, match=f"{name} must be from 0 to .*, got -1"):
            replace(row, **{name: -1.0})


def test_normalization_makes_features_independent_of_an_images_scale():
    torch.manual_seed(0)
    model = SynthMorphNetwork((4, 5, 6), (6, 5, 4), normalization=True, flow_std=0.1)
    fixed, moving = torch.rand(2, 1, 1, 10, 11, 12, generator=seeded())
    plain, scaled = model(fixed, moving), model(0.5 * fixed, 0.5 * moving)
    assert plain.abs().max() > 0.01
    assert (plain - scaled).abs().max() < 0.05 * plain.abs().max()


def test_a_step_draws_as_many_images_as_asked_for_and_swaps_their_roles():
    seen = []

    class Watch(torch.nn.Module):
        def forward(self, fixed, moving):
            seen.append((fixed, moving))
            return torch.zeros(fixed.shape[0], 3, *SHAPE)

    row = replace(narrow(), draws=3, warp_sigma_mm=0.0, zero_background=1.0)
    fixed, moving = blocks(seed=1), torch.zeros_like(blocks())
    moving[..., 5:8, 5:9, 4:8] = 44
    row.loss_terms(Watch(), fixed, moving, get_preset("demo"), seeded())
    images_of_fixed, images_of_moving = seen[0]
    assert images_of_fixed.shape == images_of_moving.shape == (3, 1, *SHAPE)
    sizes = [float((volume > 0).float().mean()) for volume in (fixed, moving)]
    filled = [float((images > 0).float().mean()) for pair in zip(*seen[0], strict=True) for images in pair]
    assert sizes[0] > 3 * sizes[1]
    assert [filled[0] > filled[1], filled[2] > filled[3], filled[4] > filled[5]] == [True, False, True]
    with pytest.raises(ValueError, match="draws must be 1 or more, got 0"):
        SynthMorph(draws=0)
