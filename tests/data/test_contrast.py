"""One image in another's contrast: what any map of intensities leaves as it is, and what is refused."""

import pytest
import torch
from scipy import stats

from lumirlib import pretrained
from lumirlib.data.intensity import match_contrast
from lumirlib.methods.contrast import for_contrast

SIDE = 24


def anatomy(shift=0):
    """Three tissues and a little noise within a ball, as in T1: dark, middle and bright; and where its brain is."""
    axis = torch.arange(SIDE, dtype=torch.float64) - SIDE / 2 + 0.5
    i, j, k = torch.meshgrid(axis - shift, axis, axis, indexing="ij")
    radius = (i**2 + j**2 + k**2).sqrt()
    image = torch.where(radius < 3, 0.2, torch.where(radius < 7, 0.8, 0.5))
    image = image + 0.03 * torch.randn(SIDE, SIDE, SIDE, generator=torch.Generator().manual_seed(shift))
    return (image * (radius < 10)).clamp(0, 1)[None, None].float()


MAPS = {
    "inverted": lambda x: 1.1 - x,
    "gamma 2": lambda x: x**2,
    "gamma 0.5": lambda x: x**0.5,
    "other units": lambda x: 300 + 1000 * x,
    "steep": lambda x: torch.sigmoid(10 * (x - 0.5)) + 0.01,
}


@pytest.mark.parametrize("name", MAPS)
def test_a_monotone_map_rising_or_falling_changes_nothing(name):
    fixed, moving = anatomy(), anatomy(1)
    mapped = torch.where(moving > 0, MAPS[name](moving), 0.0)
    plain, found = match_contrast(moving, fixed), match_contrast(mapped, fixed)
    assert ((found > 0) == (moving > 0)).all() and found.dtype == moving.dtype
    brain = moving > 0
    assert float((found - plain)[brain].abs().max()) < 0.02
    assert stats.spearmanr(plain[brain], moving[brain]).statistic > 0.99
    assert fixed[fixed > 0].min() <= plain[brain].min() and plain.max() <= fixed.max()


def test_a_map_that_is_not_monotone_is_undone_where_it_leaves_tissues_apart():
    fixed, moving = anatomy(), anatomy(1)
    flair = torch.where(moving < 0.35, moving, torch.where(moving < 0.65, 0.9, 0.6)) * (moving > 0)
    flair = flair + 0.02 * torch.rand(flair.shape, generator=torch.Generator().manual_seed(3)) * (moving > 0)
    correlation = [
        float(torch.corrcoef(torch.stack([image[moving > 0], moving[moving > 0]]))[0, 1])
        for image in (flair, match_contrast(flair, fixed))
    ]
    assert correlation[0] < 0 and correlation[1] > 0.8


def test_equal_intensities_stay_equal_and_each_image_of_a_batch_is_matched_alone():
    fixed = torch.cat([anatomy(), 0.5 * anatomy()])
    moving = torch.cat([(8 * anatomy(1)).round() / 8, anatomy(2)])
    found = match_contrast(moving, fixed)
    for level in moving[0].unique():
        assert len(found[0][moving[0] == level].unique()) == 1
    assert torch.equal(found[1:], match_contrast(moving[1:], fixed[1:]))
    flat = (moving[:1] > 0).float()  # one intensity, as of a mask
    assert len(match_contrast(flat, fixed[:1])[flat > 0].unique()) == 1


def test_brains_that_do_not_overlap_and_other_grids_are_refused():
    fixed = anatomy()
    with pytest.raises(ValueError, match="image and reference must overlap where they are above 0"):
        match_contrast(torch.zeros_like(fixed), fixed)
    with pytest.raises(ValueError, match="image"):
        match_contrast(fixed[..., 1:], fixed)


def test_the_method_sees_the_fixed_image_as_it_is_and_the_moving_one_matched():
    seen = []
    method = for_contrast(lambda fixed, moving: seen.append((fixed, moving)), "any")
    fixed, moving = anatomy(), torch.where(anatomy(1) > 0, 1.1 - anatomy(1), 0.0)
    method(fixed, moving)
    assert torch.equal(seen[0][0], fixed) and torch.equal(seen[0][1], match_contrast(moving, fixed))
    assert method.last_run == {} and for_contrast(method, "t1") is method


def test_pretrained_weights_register_an_inverted_scan_as_the_scan_itself():
    network = pretrained("ours", "cpu", resolution_mm=4, contrast="any")
    fixed, moving = anatomy(), anatomy(1)
    inverted = torch.where(moving > 0, 1.1 - moving, 0.0)
    with torch.no_grad():
        assert torch.allclose(network(fixed, inverted), network(fixed, moving), atol=0.02)
    with pytest.raises(ValueError, match="contrast must be one of t1, any"):
        pretrained("ours", contrast="T2")
