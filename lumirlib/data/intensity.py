"""Contrast: one image's made like another's.

:func:`match_contrast` takes the mean of the one image where the other has some intensity, as the correlation ratio does
(Roche et al., "The correlation ratio as a new similarity measure for multimodal image registration", MICCAI 1998), and
then matches histograms (Nyúl et al., "New variants of a method of MRI scale standardization", IEEE TMI 19(2), 2000).
"""

from __future__ import annotations

import math

import numpy as np
import torch

from lumirlib._checks import check_image, check_same_grid

#: Bins of intensities, each with as many voxels as the others; the width in bins of the
#: Gaussian that smooths the means over them; and points of the histograms that are matched.
BINS, BIN_SIGMA, QUANTILES = 64, 2.5, 257
#: Share of the means' variance that a rising or falling curve must explain to count as their course.
MONOTONE = 0.95


def match_contrast(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The image with its intensities replaced by those of the reference's contrast; the background stays zero.

    Both brains are roughly aligned, as in one frame. The mean of the reference over the voxels where the image has some
    intensity gives the order of the intensities: that of the image if the mean rises with them, the reverse if it
    falls, as of an inverted contrast, and else that of the mean itself. The image's voxels in this order then get the
    reference's histogram. So the result is the same for any monotone map of the image's intensities, rising or falling,
    as far as intensities remain apart.

    Args:
        image: Image ``(B, 1, D, H, W)``, zero outside the brain, of any contrast.
        reference: Image of the same shape, zero outside the brain.

    Returns:
        ``(B, 1, D, H, W)``, dtype and device of `image`, within the range of the reference's brain.

    Raises:
        ValueError: shapes that differ, or brains that do not overlap.
    """
    check_image(image, "image", channels=1)
    check_image(reference, "reference", channels=1)
    check_same_grid(image, reference, "image", "reference")
    return torch.cat([_matched(*pair) for pair in zip(image.split(1), reference.split(1), strict=True)])


def _matched(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    brain, other = image > 0, reference > 0
    both = brain & other
    if not both.any():
        raise ValueError("image and reference must overlap where they are above 0, got no such voxel")
    of_reference = reference[other].double().sort().values
    values, place, count = image[brain].double().unique(return_inverse=True, return_counts=True)
    ends = count.cumsum(0)
    at = torch.linspace(0, int(ends[-1]) - 1, 2 * BINS + 1, device=image.device).round().long()
    quantiles = values[torch.searchsorted(ends, at, right=True)]
    edges, middles = quantiles[2:-1:2].contiguous(), quantiles[1::2].contiguous()
    bins = torch.bucketize(image[both].double(), edges, right=True)
    counts = torch.bincount(bins, minlength=BINS).double()
    sums = torch.bincount(bins, reference[both].double(), minlength=BINS)
    means = _smoothed(sums) / _smoothed(counts).clamp_min(torch.finfo(torch.float64).tiny)
    rises = _monotone(means.cpu().numpy(), counts.cpu().numpy())
    order = rises * values if rises else _interpolated(values, middles, means)
    knots = torch.linspace(0, 1, QUANTILES, dtype=torch.float64, device=image.device)
    histogram = of_reference[(knots * (len(of_reference) - 1)).round().long()]
    rank = _middle_rank(order, count) / max(1, int(ends[-1]) - 1)
    found = torch.zeros_like(image)
    found[brain] = _interpolated(rank, knots, histogram).to(image.dtype)[place]
    return found


def _middle_rank(order: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Rank of each value among all voxels; those of equal order have the middle one, so that they stay equal."""
    _, place = order.unique(return_inverse=True)
    together = torch.bincount(place, count.double())
    return (together.cumsum(0) - (together + 1) / 2)[place]


def _monotone(means: np.ndarray, counts: np.ndarray) -> int:
    """1 if the means rise from bin to bin but for noise, -1 if they fall, 0 if they do neither."""
    from scipy.optimize import isotonic_regression  # imported where contrasts are matched: it takes a while

    weights = np.maximum(counts, 1e-9)
    spread = np.average((means - np.average(means, weights=weights)) ** 2, weights=weights)
    best, left = 0, (1 - MONOTONE) * spread
    for rises in (1, -1):
        fit = isotonic_regression(means, weights=weights, increasing=rises > 0).x
        if (error := np.average((means - fit) ** 2, weights=weights)) <= left:
            best, left = rises, error
    return best


def _smoothed(of_bins: torch.Tensor) -> torch.Tensor:
    """Sums over bins, Gaussian-weighted; at both ends they go on as in a mirror."""
    reach = math.ceil(3 * BIN_SIGMA)
    steps = torch.arange(-reach, reach + 1, dtype=of_bins.dtype, device=of_bins.device)
    kernel = torch.exp(-0.5 * (steps / BIN_SIGMA) ** 2)
    padded = torch.cat([of_bins[:reach].flip(0), of_bins, of_bins[-reach:].flip(0)])
    return torch.nn.functional.conv1d(padded[None, None], kernel[None, None])[0, 0]


def _interpolated(where: torch.Tensor, points: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values at places between points in rising order, linearly; beyond the ends as at them."""
    above = torch.bucketize(where, points, right=True).clamp(1, len(points) - 1)
    low, high = points[above - 1], points[above]
    share = ((where - low) / (high - low).clamp_min(torch.finfo(torch.float64).tiny)).clamp(0, 1)
    return torch.lerp(values[above - 1], values[above], share)
