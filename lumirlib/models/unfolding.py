"""Folds of a displacement smoothed away, where they are.

Our own step, which the paper does not have: it changes what folds and its neighbors, and nothing else.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from lumirlib.losses.ndv import folded_voxels, with_inner_voxels

#: Weights along each axis of the mean that a voxel moves towards, and how far it moves in a round.
WEIGHTS = (0.25, 0.5, 0.25)
SHARE = 0.25


def smooth_folds(displacement: torch.Tensor, rounds: int) -> torch.Tensor:
    """A displacement that folds less: near folds each voxel moves a quarter of the way to the mean of its neighbors.

    A voxel folds where one of the ten determinants of :func:`lumirlib.metrics.ndv_volume` is negative; what moves are
    these voxels and their 26 neighbors. A round begins with the folds that the last one left.

    Args:
        displacement: Displacement ``(B, 3, D, H, W)`` in voxels, sides of at least 3.
        rounds: Number of rounds, from 0.

    Returns:
        ``(B, 3, D, H, W)``, float32 or better; the displacement itself where nothing folds.

    Raises:
        ValueError: another shape, or a side below 3 voxels.
    """
    displacement = with_inner_voxels(displacement)
    return (_by_lists if displacement.device.type == "cpu" else smooth_by_masks)(displacement, rounds)


def _near(voxels: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Mask ``(B, D, H, W)`` of listed inner voxels ``(n, 4)`` and their neighbors."""
    mask = torch.zeros_like(like[:, 0], dtype=torch.bool)
    entry, *place = voxels.unbind(1)
    for step in itertools.product((-1, 0, 1), repeat=3):
        mask[(entry, *(along + by for along, by in zip(place, step, strict=True)))] = True
    return mask


def _by_lists(displacement: torch.Tensor, rounds: int) -> torch.Tensor:
    """:func:`smooth_folds` on the CPU: folds are few, so voxels are listed, and the next ones sought near them."""
    last = [side - 1 for side in displacement.shape[2:]]
    among = None
    for _ in range(rounds):
        folded = folded_voxels(displacement, among).nonzero()
        if not len(folded):
            break
        folded[:, 1:] += 1  # counted from the border
        voxels = _near(folded, displacement).nonzero()
        entry, *place = voxels.unbind(1)
        mean = torch.zeros(len(voxels), 3, dtype=displacement.dtype)
        for step in itertools.product((-1, 0, 1), repeat=3):
            weight = WEIGHTS[step[0] + 1] * WEIGHTS[step[1] + 1] * WEIGHTS[step[2] + 1]
            i, j, k = ((at + by).clamp(0, end) for at, by, end in zip(place, step, last, strict=True))
            mean += weight * displacement[entry, :, i, j, k]
        i, j, k = place
        here = displacement[entry, :, i, j, k]
        displacement = displacement.clone() if among is None else displacement
        displacement[entry, :, i, j, k] = torch.lerp(here, mean, SHARE)
        inner = torch.stack([at.clamp(1, end - 1) for at, end in zip(place, last, strict=True)], 1)
        among = _near(torch.cat([entry[:, None], inner], 1), displacement)
    return displacement


def smooth_by_masks(displacement: torch.Tensor, rounds: int) -> torch.Tensor:
    """The same by whole tensors, as a GPU does it, which would be waited for to list voxels."""
    for _ in range(rounds):
        folded = F.pad(folded_voxels(displacement)[:, None].to(displacement.dtype), [1] * 6)
        near = F.max_pool3d(folded, 3, 1, 1)
        mean = F.pad(displacement, [1] * 6, mode="replicate")
        for axis in (2, 3, 4):
            size = mean.shape[axis] - 2
            mean = sum(weight * mean.narrow(axis, first, size) for first, weight in enumerate(WEIGHTS))
        displacement = torch.lerp(displacement, mean, SHARE * near)
    return displacement
