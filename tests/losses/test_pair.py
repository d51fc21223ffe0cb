"""The loss of one pair: what is masked counts nowhere."""

import pytest
import torch

from lumirlib import losses
from lumirlib.losses import PairLoss, masked_ncc_loss
from lumirlib.models.backbone import Fields

SHAPE = (18, 20, 22)
SHAPES = [SHAPE, (9, 10, 11)]


def noise(seed, margin=5):
    image = torch.zeros(1, 1, *SHAPE, dtype=torch.float64)
    inner = tuple(slice(margin, -margin) for _ in range(3))
    sides = [side - 2 * margin for side in SHAPE]
    image[(0, 0, *inner)] = torch.rand(*sides, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return image


def hole(image, corner=(8, 9, 10), side=3):
    found = torch.zeros_like(image)
    found[(0, 0, *(slice(at, at + side) for at in corner))] = 1
    return found


def fields(scale=0.3):
    generator = torch.Generator().manual_seed(7)
    of = [torch.randn(1, 3, *shape, generator=generator) * scale for shape in SHAPES]
    return Fields(of, of)


def test_where_all_voxels_count_it_is_the_papers_ncc_away_from_the_border():
    warped, fixed = noise(0), noise(1)
    found = masked_ncc_loss(warped, fixed, torch.ones_like(fixed), 5)
    torch.testing.assert_close(found, losses.ncc_loss(warped, fixed, 5), atol=1e-9, rtol=0)


def test_masked_ncc_of_a_window_is_the_correlation_of_its_voxels_that_count():
    warped, fixed = (torch.rand(1, 1, 3, 3, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    counts = torch.zeros(1, 1, 3, 3, 3)
    counts[..., 1:, :] = 1
    counts_center = torch.zeros_like(counts)
    counts_center[..., 1, 1, 1] = 1
    w, f = warped[counts > 0].double(), fixed[counts > 0].double()
    expected = 1 - torch.corrcoef(torch.stack([w, f]))[0, 1] ** 2
    whole = masked_ncc_loss(warped, fixed, counts, 3)
    assert 0 < whole < 1
    large = masked_ncc_loss(100 * warped, 100 * fixed, counts, 5)  # each window has all that counts
    assert float(large) == pytest.approx(float(expected), abs=1e-3)


def test_what_is_masked_in_either_image_changes_no_level_of_the_loss():
    fixed, moving = noise(0, 2).float(), noise(1, 2).float()
    masks = hole(fixed), hole(moving, (5, 11, 9))
    counts = [1 - mask for mask in masks]
    predicted = fields()

    def total(a, b, *masks):
        return float(PairLoss(a, b, SHAPES, *masks, window=5)(predicted, a, b)["total"])

    other = [image + 5 * mask for image, mask in zip((fixed, moving), masks, strict=True)]
    assert total(*other, *counts) == pytest.approx(total(fixed, moving, *counts), abs=1e-6)
    assert abs(total(*other) - total(fixed, moving)) > 1e-3


def test_gradient_is_the_slope_of_the_loss():
    fixed, moving = noise(0, 2).float(), losses.gaussian_smooth(noise(1, 2).float())
    loss = PairLoss(fixed, moving, SHAPES, 1 - hole(fixed), None, window=5)
    start = [field.clone().requires_grad_() for field in fields().displacements]
    total = loss(Fields(start, start), fixed, moving)["total"]
    by = torch.autograd.grad(total, start[0])[0]
    step = 1e-3 * by / by.abs().max()
    with torch.no_grad():
        there, back = (
            loss(Fields([start[0] + s * step, start[1]], [start[0] + s * step, start[1]]), fixed, moving)["total"]
            for s in (1, -1)
        )
    assert float(there - back) == pytest.approx(float(2 * (by * step).sum()), rel=0.05)


def test_what_does_not_fit_is_refused():
    fixed = noise(0).float()
    with pytest.raises(ValueError, match="window must be odd"):
        masked_ncc_loss(fixed, fixed, fixed, 4)
    with pytest.raises(ValueError, match="counts must have a voxel that counts, got none"):
        masked_ncc_loss(fixed, fixed, torch.zeros_like(fixed))
