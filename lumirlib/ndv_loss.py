"""The non-diffeomorphic volume of a displacement as a loss that can be minimized.

The volume is the one that the challenge measures, :func:`lumirlib.metrics.ndv_volume`, after Liu et al., "On finite
difference Jacobian computation in deformable image registration", IJCV 2024.
"""

from __future__ import annotations

import itertools

import torch
from torch.utils.checkpoint import checkpoint

from lumirlib import spatial
from lumirlib._checks import check_displacement
from lumirlib.metrics.jacobian import BLOCK

AXES = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
#: Corners of the two tetrahedra that the eight of forward and backward differences leave between them.
TETRAHEDRA = (((-1, -1, 0), (-1, 0, -1), (0, -1, -1)), ((1, 1, 0), (0, 1, 1), (1, 0, 1)))


def _folded_volume(displacement: torch.Tensor) -> torch.Tensor:
    """Non-diffeomorphic volume of the inner voxels of ``(B, 3, d, H, W)``: minus the negative determinants, / 12."""
    inner = tuple(slice(1, side - 1) for side in displacement.shape[2:])
    here = displacement[(..., *inner)]

    def edge(offset: tuple[int, ...]) -> torch.Tensor:
        """From each inner voxel to its neighbour at `offset`, both displaced: ``(B, 3, d - 2, H - 2, W - 2)``."""
        there = (slice(part.start + by, part.stop + by) for part, by in zip(inner, offset, strict=True))
        step = torch.tensor(offset, dtype=here.dtype, device=here.device).view(1, 3, 1, 1, 1)
        return displacement[(..., *there)] - here + step

    forward = [edge(axis) for axis in AXES]
    backward = [-edge(tuple(-by for by in axis)) for axis in AXES]
    columns = [*itertools.product(*zip(forward, backward, strict=True)), *(tuple(map(edge, one)) for one in TETRAHEDRA)]
    folded = here.new_zeros(())
    for first, second, third in columns:
        determinant = (first * torch.linalg.cross(second, third, dim=1)).sum(dim=1)
        folded = folded + (-determinant).clamp_min(0).sum()
    return folded / 12


def ndv_loss(displacement: torch.Tensor) -> torch.Tensor:
    """Non-diffeomorphic volume of a displacement, as a share of the volume it is measured in.

    Of each inner voxel ten determinants are taken, those of all choices of forward and backward differences and of the
    two tetrahedra between them; the negative ones, halved and divided by six, add up. Without a mask, 100 times the
    result is :func:`lumirlib.metrics.ndv_percent`. The gradient is zero where nothing folds. Slabs of the volume are
    computed again in the backward pass instead of being kept.

    Args:
        displacement: ``(B, 3, D, H, W)`` in voxels, sides of at least 3.

    Returns:
        A scalar, 0 or more: 0 for a diffeomorphism, 1 for a flipped axis; float32 or better.

    Raises:
        ValueError: another shape, or a side below 3 voxels.
    """
    check_displacement(displacement)
    if min(displacement.shape[2:]) < 3:
        raise ValueError(f"displacement must have sides from 3 voxels, got {tuple(displacement.shape[2:])}")
    with spatial.without_autocast(displacement.device):
        displacement = displacement.to(torch.promote_types(displacement.dtype, torch.float32))
        depth = displacement.shape[2] - 2
        total = displacement.new_zeros(())
        for first in range(0, depth, BLOCK):
            slab = displacement[:, :, first : min(first + BLOCK, depth) + 2]
            total = total + checkpoint(_folded_volume, slab, use_reentrant=False, preserve_rng_state=False)
        inner = displacement[:, 0, 1:-1, 1:-1, 1:-1].numel()
    return total / inner
