"""Volume of a transformation that is not diffeomorphic."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from lumirlib import _numba, spatial
from lumirlib._checks import check_displacement
from lumirlib.metrics import _kernels

#: Slices of i that are worked on at once, so that memory stays far below that of the ten full volumes.
BLOCK = 16


def _cross(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
    """The three components of the cross product of vectors given as (3, ...) tensors."""
    return [torch.addcmul(first[a] * second[b], first[b], second[a], value=-1) for a, b in ((1, 2), (2, 0), (0, 1))]


def _dot(first: torch.Tensor, second: list[torch.Tensor]) -> torch.Tensor:
    total = first[0] * second[0]
    return total.addcmul_(first[1], second[1]).addcmul_(first[2], second[2])


def _shifted(points: torch.Tensor, i: int, j: int, k: int) -> torch.Tensor:
    """The interior of `points` (3, D, H, W), moved by (i, j, k) voxels."""
    sides = points.shape[1:]
    return points[(slice(None), *(slice(1 + by, side - 1 + by) for by, side in zip((i, j, k), sides, strict=True)))]


def ndv_volume(displacement: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[float, float]:
    """Non-diffeomorphic volume in voxels, and the number of interior voxels of the mask it is a part of.

    Liu et al., "On finite difference Jacobian computation in deformable image registration", IJCV 2024: ten
    determinants per voxel, eight from every choice of forward and backward differences and two of the tetrahedra
    between them; the negative ones, halved and divided by six, add up to the volume. One voxel at every border is
    left out.

    Args:
        displacement: Displacement ``(1, 3, D, H, W)`` in voxels, sides of at least 3.
        mask: Mask ``(1, 1, D, H, W)``, not zero where voxels count; None counts all.

    Returns:
        The volume (0 or more) and the voxels of the mask without the border.
    """
    check_displacement(displacement)
    if displacement.shape[0] != 1 or min(displacement.shape[2:]) < 3:
        raise ValueError(f"displacement must be (1, 3, D, H, W) with sides from 3, got {tuple(displacement.shape)}")
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask is None:
        mask = torch.ones_like(displacement[:, :1])
    if mask.shape != (1, 1, *displacement.shape[2:]):
        raise ValueError(f"mask must be {(1, 1, *displacement.shape[2:])}, got {tuple(mask.shape)}")
    if displacement.device.type == "cpu":
        return _ndv_compiled(displacement, mask)
    return ndv_in_blocks(displacement, mask)


def _ndv_compiled(displacement: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    """:func:`ndv_volume` on the CPU: voxel by voxel, those outside the mask skipped."""
    if displacement.dtype not in (torch.float32, torch.float64):
        displacement = displacement.float()  # exact; NumPy lacks bfloat16
    depth = displacement.shape[2]
    volumes, counts = np.zeros(depth), np.zeros(depth, dtype=np.int64)
    arrays = displacement[0].detach().contiguous().numpy(), (mask[0, 0] != 0).contiguous().numpy(), volumes, counts
    parts = [(first + 1, last + 1) for first, last in _numba.slabs(depth - 2)]
    list(_numba.in_threads(lambda part: _kernels.folded_volume(*arrays, *part), parts))
    return float(volumes.sum()), float(counts.sum())


def ndv_in_blocks(displacement: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    """:func:`ndv_volume` by whole tensors, as a GPU does it fast."""
    volume, counted = 0.0, 0.0
    depth = displacement.shape[2]
    grid = spatial.identity_grid(displacement.shape[2:], displacement.device, torch.float64)
    for start in range(0, depth - 2, BLOCK):
        rows = slice(start, min(start + BLOCK, depth - 2) + 2)
        points = grid[0, :, rows] + displacement[0, :, rows].double()
        inside = (mask[0, 0, rows][1:-1, 1:-1, 1:-1] != 0).double()
        here = _shifted(points, 0, 0, 0)
        axes = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
        forward = [_shifted(points, *axis) - here for axis in axes]
        backward = [here - _shifted(points, *(-step for step in axis)) for axis in axes]
        # the columns along j and k, whose cross product both columns along i share
        choices = [
            ((forward[0], backward[0]), second, third)
            for second, third in itertools.product((forward[1], backward[1]), (forward[2], backward[2]))
        ]
        for corners in (
            ((-1, -1, 0), (-1, 0, -1), (0, -1, -1)),
            ((1, 1, 0), (0, 1, 1), (1, 0, 1)),
        ):
            first, second, third = (_shifted(points, *corner) - here for corner in corners)
            choices.append(((first,), second, third))
        folded = torch.zeros_like(inside)
        for firsts, second, third in choices:
            normal = _cross(second, third)
            for first in firsts:
                folded -= _dot(first, normal).clamp_max_(0)
        volume += float((0.5 * folded).mul_(inside).sum()) / 6
        counted += float(inside.sum())
    return volume, counted


def ndv_percent(displacement: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Non-diffeomorphic volume in percent of the mask; arguments as :func:`ndv_volume`.

    The 2024 LUMIR task masks by the moving image > 0, the 2025 one by the fixed image > 0.

    Returns:
        0 or more, lower is better; 0 for a diffeomorphism, and 100 for a flipped axis.

    Raises:
        ValueError: shapes that do not fit, a displacement that is not finite, or an empty mask.
    """
    check_displacement(displacement)
    if not torch.isfinite(displacement).all():
        raise ValueError("displacement must be finite, got NaN or infinite values")
    volume, counted = ndv_volume(displacement, mask)
    if counted == 0:
        raise ValueError("mask must hold at least one voxel away from the border, got none")
    return 100 * volume / counted


def jacobian_determinant(displacement: torch.Tensor) -> torch.Tensor:
    """Determinant of the Jacobian of ``p + u(p)`` at each voxel, by central differences (one-sided at the borders).

    For maps to look at: it misses folds that :func:`ndv_percent` counts.

    Args:
        displacement: Displacement ``(B, 3, D, H, W)`` in voxels.

    Returns:
        ``(B, 1, D, H, W)``: 1 where volume is kept, above where it grows, 0 and below where the map folds.
    """
    check_displacement(displacement)
    columns = torch.gradient(displacement.movedim(1, 0), dim=(2, 3, 4))  # d/di, d/dj, d/dk, each (3, B, D, H, W)
    for axis, column in enumerate(columns):
        column[axis] += 1
    first, second, third = columns
    return _dot(first, _cross(second, third))[:, None]
