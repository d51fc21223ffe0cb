"""The NCC of the voxels that count."""

import pytest
import torch

from lumirlib import losses
from lumirlib.losses import masked_ncc_loss

SHAPE = (18, 20, 22)


def noise(seed, margin=5):
    image = torch.zeros(1, 1, *SHAPE, dtype=torch.float64)
    inner = tuple(slice(margin, -margin) for _ in range(3))
    sides = [side - 2 * margin for side in SHAPE]
    image[(0, 0, *inner)] = torch.rand(*sides, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return image


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


def test_what_does_not_fit_is_refused():
    fixed = noise(0).float()
    with pytest.raises(ValueError, match="window must be odd"):
        masked_ncc_loss(fixed, fixed, fixed, 4)
    with pytest.raises(ValueError, match="counts must have a voxel that counts, got none"):
        masked_ncc_loss(fixed, fixed, torch.zeros_like(fixed))
