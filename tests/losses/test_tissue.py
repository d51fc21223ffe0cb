"""The loss on tissues: which voxels are of which, and what warps one person's onto another's."""

import pytest
import torch

from lumirlib import parse_variant, spatial
from lumirlib.data.frame import template_in_frame
from lumirlib.losses import tissue_loss, tissue_maps
from lumirlib.losses.tissue import tissue_centers
from lumirlib.methods.presets import get_preset

SHAPE = (12, 14, 16)
CENTERS = (0.2, 0.55, 0.8)


def layers(shares, noise=0.03, seed=0):
    """A box of three intensities, from dark to bright along the last axis, in a dark frame, and their numbers."""
    generator = torch.Generator().manual_seed(seed)
    sides = [round(share * (SHAPE[2] - 2)) for share in shares]
    numbers = torch.zeros(1, 1, *SHAPE, dtype=torch.long)
    along = torch.tensor([1] * sides[0] + [2] * sides[1] + [3] * (SHAPE[2] - 2 - sides[0] - sides[1]))
    numbers[:, :, 1:-1, 1:-1, 1:-1] = along
    image = torch.tensor([0.0, *CENTERS])[numbers]
    image += noise * torch.randn(image.shape, generator=generator) * (numbers > 0)
    return image.clamp(0, 1) * (numbers > 0), numbers


@pytest.mark.parametrize("shares", [(0.15, 0.45), (0.4, 0.2), (0.08, 0.6)])
def test_three_intensities_are_found_whatever_share_of_the_brain_each_has(shares):
    image, numbers = layers(shares)
    torch.testing.assert_close(tissue_centers(image)[0], torch.tensor(CENTERS), atol=0.02, rtol=0)
    maps = tissue_maps(image)
    assert (maps.argmax(1, keepdim=True) + 1)[numbers > 0].eq(numbers[numbers > 0]).float().mean() > 0.98


def test_tissues_add_up_to_one_in_the_brain_and_to_none_outside_it_in_each_image_of_a_batch():
    images = [layers((0.15, 0.45))[0], 0.5 * layers((0.4, 0.2), seed=1)[0]]
    both = tissue_maps(torch.cat(images))
    torch.testing.assert_close(both.sum(1, keepdim=True), (torch.cat(images) > 0).float())
    torch.testing.assert_close(both, torch.cat([tissue_maps(image) for image in images]))


@pytest.mark.parametrize("image", [torch.zeros(1, 1, *SHAPE), torch.full((1, 1, *SHAPE), 0.7)], ids=["none", "one"])
def test_an_image_without_three_intensities_gives_finite_maps(image):
    assert torch.isfinite(tissue_maps(image)).all()


def test_tissues_of_a_brain_hardly_change_with_its_contrast():
    brain = template_in_frame(4)
    assert (tissue_maps(brain) - tissue_maps(brain**1.3)).abs()[brain.expand(-1, 3, -1, -1, -1) > 0].mean() < 0.06


def test_the_dark_rim_that_interpolation_leaves_hardly_changes_tissues_told_apart_on_blocks():
    brain = template_in_frame(1)
    brain = brain * (brain > 0.35)  # stripped without a margin
    aside = torch.full((1, 3, *brain.shape[2:]), 0.5)
    interpolated = spatial.warp(spatial.warp(brain, aside), -aside)

    def change(block):
        maps = [tissue_maps(image, block) for image in (brain, interpolated)]
        return float((maps[0] - maps[1]).abs()[:, :, brain[0, 0] > 0].mean())

    assert change(2) < change(1) / 2


def test_the_loss_is_zero_where_tissues_agree_and_falls_along_its_gradient():
    fixed = template_in_frame(4)
    moving = fixed.roll(1, dims=3)
    there = torch.zeros(1, 3, *fixed.shape[2:])
    assert tissue_loss(fixed, fixed, there) == 0
    shifted = there.clone()
    shifted[:, 1] = 1
    at_rest, at_goal = tissue_loss(moving, fixed, there), tissue_loss(moving, fixed, shifted)
    assert at_goal < 1e-6 < at_rest
    part = (0.3 * shifted).requires_grad_()
    (gradient,) = torch.autograd.grad(tissue_loss(moving, fixed, part), part)
    step = 1e-2 * gradient / gradient.abs().max()
    change = tissue_loss(moving, fixed, part.detach() - step) - tissue_loss(moving, fixed, part.detach())
    assert change == pytest.approx(float(-(gradient * step).sum()), rel=0.05)


def test_a_row_adds_it_with_its_weight():
    torch.manual_seed(0)
    row = parse_variant("COMP+TISSUE", start_channels=4, head_channels=4, levels=2, tissue_weight=3.0)
    preset = get_preset("smoke")
    images = [layers((0.15, 0.45), seed=seed)[0] for seed in (0, 1)]
    model = row.build()
    terms = row.loss_terms(model, *images, preset, torch.Generator())
    plain = parse_variant("COMP").objective(model.fields(*images), *images, preset)
    assert terms["tissue"] > 0
    torch.testing.assert_close(terms["total"], plain["total"] + 3 * terms["tissue"])
    with pytest.raises(ValueError, match="tissue_weight must be 0 or more, got -1"):
        parse_variant("TISSUE", tissue_weight=-1)
