"""Tissues as a similarity: cerebrospinal fluid, gray matter and white matter, told apart by intensity alone.

A local correlation can be as high where gray matter lies on white as where each lies on its own, if the edges run
alike. A difference of tissues cannot. The classes are those of k-means (Lloyd, IEEE Transactions on Information Theory
28(2), 1982) on each T1's own intensities, so that no label is needed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lumirlib import spatial
from lumirlib._checks import check_image, check_same_grid

#: Classes, from dark to bright on T1.
TISSUES = ("cerebrospinal fluid", "gray matter", "white matter")
#: Bins of the histogram and rounds of k-means, which settles within some ten.
BINS, ROUNDS = 256, 30
#: Where k-means starts: shares of the brain that are darker than a class's center.
START = (0.1, 0.45, 0.85)
#: A class's standard deviation, as a share of the distance between the darkest and the brightest center.
WIDTH = 1 / 6


def tissue_centers(image: torch.Tensor) -> torch.Tensor:
    """Intensities of the three tissues, by k-means on the histogram of the voxels above zero.

    Args:
        image: Brains ``(B, 1, D, H, W)`` in [0, 1], zero outside.

    Returns:
        Centers ``(B, 3)`` float32, from dark to bright.
    """
    place = (image.float() * (BINS - 1)).round().clamp(0, BINS - 1).long().flatten(1)
    counts = torch.zeros(len(image), BINS, device=image.device)
    counts.scatter_add_(1, place, torch.ones_like(place, dtype=counts.dtype))
    counts[:, 0] = 0
    values = torch.arange(BINS, device=image.device) / (BINS - 1)
    shares = counts.cumsum(1) / counts.sum(1, keepdim=True).clamp_min(1)
    centers = torch.stack([values[(shares >= share).float().argmax(1)] for share in START], dim=1)
    for _ in range(ROUNDS):
        nearest = (values[:, None] > (centers[:, None, 1:] + centers[:, None, :-1]) / 2).sum(2)  # (B, BINS)
        for tissue in range(len(TISSUES)):
            own = counts * (nearest == tissue)
            total = own.sum(1)
            centers[:, tissue] = torch.where(total > 0, (own * values).sum(1) / total.clamp_min(1), centers[:, tissue])
    return centers


def tissue_maps(image: torch.Tensor, block: int = 1) -> torch.Tensor:
    """How far each voxel belongs to each of :data:`TISSUES`: posteriors of three Gaussians of one width.

    Args:
        image: Brains ``(B, 1, D, H, W)`` in [0, 1], zero outside.
        block: Side in voxels of the blocks whose means tell the centers. The rim of a brain on coarse voxels, or on
            interpolated ones, is dark, and the darkest center lies there.

    Returns:
        ``(B, 3, D, H, W)`` float32; they add up to one in the brain, and are zero outside it.

    Raises:
        ValueError: another shape.
    """
    check_image(image, "image", channels=1)
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        image = image.float()
        centers = tissue_centers(F.avg_pool3d(image, min(block, *image.shape[2:])))
        width = ((centers[:, 2] - centers[:, 0]) * WIDTH).clamp_min(1 / (BINS - 1)).view(-1, 1, 1, 1, 1)
        distances = (image - centers[:, :, None, None, None]) / width
        return distances.square_().mul_(-0.5).softmax(dim=1).mul_(image > 0)


def tissue_loss(moving: torch.Tensor, fixed: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
    """Mean squared difference between the warped tissues of one image and those of the other.

    Args:
        moving: Moving image ``(B, 1, D, H, W)`` in [0, 1].
        fixed: Fixed image ``(B, 1, D, H, W)`` in [0, 1].
        displacement: Displacement ``(B, 3, D, H, W)`` in voxels.

    Returns:
        A scalar in [0, 1], over all voxels and tissues, the background's among them.

    Raises:
        ValueError: shapes that differ.
    """
    check_same_grid(moving, fixed, "moving", "fixed")
    with torch.autocast(fixed.device.type, enabled=False):
        warped = spatial.warp(tissue_maps(moving), displacement.to(torch.float32))
        return (warped - tissue_maps(fixed)).square().mean()
