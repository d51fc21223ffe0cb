"""Smoothing of folds: what it moves, what it leaves, and the row that has it."""

import pytest
import torch
import torch.nn.functional as F

from lumirlib import metrics, parse_variant, spatial
from lumirlib.losses.ndv import folded_voxels
from lumirlib.methods.presets import get_preset
from lumirlib.models.unfolding import smooth_by_masks, smooth_folds


def folding(dtype=torch.float32, shape=(18, 20, 16)):
    """A smooth displacement of two entries, with a few folds in the one and a few at the border of the other."""
    generator = torch.Generator().manual_seed(0)
    found = spatial.resize(torch.randn(2, 3, 4, 4, 4, generator=generator), shape).to(dtype)
    found[0, 0, 8, 9, 7] += 3
    found[1, 1, 1, 1, 14] -= 3
    return found


def near_folds(displacement, reach):
    folded = F.pad(folded_voxels(displacement).float(), [1] * 6)[:, None]
    return F.max_pool3d(folded, 2 * reach + 1, 1, reach) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folds_vanish_and_what_is_far_from_them_stays(dtype):
    displacement = folding(dtype)
    found = smooth_folds(displacement, 4)
    for before, after in zip(displacement.split(1), found.split(1), strict=True):
        assert 0 < metrics.ndv_percent(before) < 1
        assert metrics.ndv_percent(after) < metrics.ndv_percent(before) / 3
    near = near_folds(displacement, 1)
    once = smooth_folds(displacement, 1)
    assert torch.equal(once.where(~near, 0), displacement.where(~near, 0)) and not torch.equal(once, displacement)
    assert torch.equal(
        found.where(~near_folds(displacement, 8), 0), displacement.where(~near_folds(displacement, 8), 0)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rounds", [1, 3])
def test_a_gpu_s_way_by_masks_gives_the_same(dtype, rounds):
    displacement = folding(dtype)
    torch.testing.assert_close(smooth_by_masks(displacement, rounds), smooth_folds(displacement, rounds))


def test_a_round_moves_a_quarter_of_the_way_to_the_weighted_mean_of_27_voxels():
    displacement = torch.zeros(1, 3, 5, 5, 5)
    displacement[0, 2, 2, 2, 2] = 4.0
    found = smooth_folds(displacement, 1)[0, 2]
    assert found[2, 2, 2] == pytest.approx(4 * (0.75 + 0.25 / 8))
    assert found[2, 2, 3] == pytest.approx(4 * 0.25 / 16) and found[1, 1, 1] == pytest.approx(4 * 0.25 / 64)


def test_without_folds_nothing_is_done():
    still = torch.zeros(1, 3, 4, 5, 6)
    assert smooth_folds(still, 4) is still
    displacement = folding()
    assert smooth_folds(displacement, 0) is displacement
    assert smooth_folds(displacement.bfloat16(), 1).dtype == torch.float32
    with pytest.raises(ValueError, match="3 voxels"):
        smooth_folds(torch.zeros(1, 3, 2, 5, 6), 4)
    with pytest.raises(ValueError, match="displacement"):
        smooth_folds(torch.zeros(1, 2, 4, 5, 6), 4)


def test_a_row_registers_so_and_trains_without():
    torch.manual_seed(0)
    plain, unfolded = (parse_variant(name).at_preset(get_preset("smoke")).build() for name in ("COMP", "COMP+UNFOLD"))
    with torch.no_grad():
        for estimator in plain.estimators:
            estimator.conv3.weight.normal_(0, 3)  # folds
    unfolded.load_state_dict(plain.state_dict())
    images = torch.rand(2, 1, 1, 24, 24, 24)
    with torch.no_grad():
        by_plain, by_unfolded = plain(*images), unfolded(*images)
        assert torch.equal(unfolded.fields(*images).displacements[0], by_plain)
    assert torch.equal(by_unfolded, smooth_folds(by_plain, 4)) and not torch.equal(by_unfolded, by_plain)
    assert "folds smoothed in 4 rounds" in parse_variant("COMP+UNFOLD").describe()
    with pytest.raises(ValueError, match="unfolding must be a whole number from 0"):
        parse_variant("COMP", unfolding=-1).build()
