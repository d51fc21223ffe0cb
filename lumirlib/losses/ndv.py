"""The non-diffeomorphic volume of a displacement as a loss that can be minimized.

The volume is the one that the challenge measures, :func:`lumirlib.metrics.ndv_volume`, after Liu et al., "On finite
difference Jacobian computation in deformable image registration", IJCV 2024.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch.utils.checkpoint import checkpoint

from lumirlib import spatial
from lumirlib._checks import check_displacement
from lumirlib._numba import in_threads, slabs
from lumirlib.metrics import _kernels
from lumirlib.metrics.jacobian import BLOCK

AXES = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
#: Corners of the two tetrahedra that the eight of forward and backward differences leave between them.
TETRAHEDRA = (((-1, -1, 0), (-1, 0, -1), (0, -1, -1)), ((1, 1, 0), (0, 1, 1), (1, 0, 1)))

#: Where more of a slab than this share folds, all of it is computed again for the gradient.
DENSE = 1 / 8


def _determinants(at: Callable[[tuple[int, ...]], torch.Tensor]) -> Iterator[torch.Tensor]:
    """The ten determinants of some voxels, one after the other.

    Args:
        at: Function that gives the displacement of the voxels' neighbours at an offset, three components in its second
            dimension.
    """
    here = at((0, 0, 0))

    def edge(offset: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        """From each voxel to its neighbour, both displaced."""
        difference = at(offset) - here
        return tuple(part + by if by else part for part, by in zip(difference.unbind(1), offset, strict=True))

    forward = [edge(axis) for axis in AXES]
    backward = [tuple(-part for part in edge(tuple(-by for by in axis))) for axis in AXES]
    columns = [*itertools.product(*zip(forward, backward, strict=True)), *(tuple(map(edge, one)) for one in TETRAHEDRA)]
    for (a, b, c), (d, e, f), (g, h, i) in columns:
        yield a * (e * i - f * h) + b * (f * g - d * i) + c * (d * h - e * g)


def _inner(displacement: torch.Tensor) -> Callable[[tuple[int, ...]], torch.Tensor]:
    """For :func:`_determinants`: all voxels but those at the border."""

    def at(offset: tuple[int, ...]) -> torch.Tensor:
        inner = (slice(1 + by, side - 1 + by) for side, by in zip(displacement.shape[2:], offset, strict=True))
        return displacement[(..., *inner)]

    return at


def _listed(displacement: torch.Tensor, voxels: torch.Tensor) -> Callable[[tuple[int, ...]], torch.Tensor]:
    """For :func:`_determinants`: voxels ``(n, 4)``, counted from the border: of which batch entry, and i, j, k."""
    entry, *place = voxels.unbind(1)

    def at(offset: tuple[int, ...]) -> torch.Tensor:
        i, j, k = (1 + along + by for along, by in zip(place, offset, strict=True))
        return displacement[entry, :, i, j, k]

    return at


def _folded_volume(at: Callable[[tuple[int, ...]], torch.Tensor]) -> torch.Tensor:
    """Non-diffeomorphic volume of voxels: minus the negative determinants, / 12."""
    return sum((-determinant).clamp_min(0).sum() for determinant in _determinants(at)) / 12


def _volume_of_all(displacement: torch.Tensor) -> torch.Tensor:
    return _folded_volume(_inner(displacement))


def with_inner_voxels(displacement: torch.Tensor) -> torch.Tensor:
    """A displacement in float32 or better; ValueError unless it has voxels that are not at the border."""
    check_displacement(displacement)
    if min(displacement.shape[2:]) < 3:
        raise ValueError(f"displacement must have sides from 3 voxels, got {tuple(displacement.shape[2:])}")
    return displacement.to(torch.promote_types(displacement.dtype, torch.float32))


def folded_voxels(displacement: torch.Tensor, among: torch.Tensor | None = None) -> torch.Tensor:
    """Which inner voxels have a determinant that is negative, or not a number.

    Args:
        displacement: Displacement ``(B, 3, D, H, W)`` in voxels, float32 or float64.
        among: Which voxels are asked for, ``(B, D, H, W)`` bool; None for all.

    Returns:
        ``(B, D - 2, H - 2, W - 2)`` bool.
    """
    with torch.no_grad():
        if displacement.device.type == "cpu":
            found = [
                _folded_compiled(one, None if among is None else among[entry])
                for entry, one in enumerate(displacement.detach())
            ]
            return torch.stack(found)[:, 1:-1, 1:-1, 1:-1]
        folded = folded_of_all(displacement)
        return folded if among is None else folded & among[:, 1:-1, 1:-1, 1:-1]


def folded_of_all(displacement: torch.Tensor) -> torch.Tensor:
    """:func:`folded_voxels` by whole tensors, as a GPU does it fast."""
    unfolded = None
    for determinant in _determinants(_inner(displacement)):
        unfolded = determinant >= 0 if unfolded is None else unfolded.logical_and_(determinant >= 0)
    return ~unfolded


def _folded_compiled(displacement: torch.Tensor, among: torch.Tensor | None) -> torch.Tensor:
    """:func:`folded_voxels` of one entry on the CPU, ``(D, H, W)`` with a border of zeros."""
    mask = torch.ones(displacement.shape[1:], dtype=torch.bool) if among is None else among.contiguous()
    folded = torch.zeros_like(mask)
    arrays = displacement.contiguous().numpy(), mask.numpy(), folded.numpy()
    parts = [(first + 1, last + 1) for first, last in slabs(len(mask) - 2)]
    list(in_threads(lambda part: _kernels.folded_voxels(*arrays, *part), parts))
    return folded


def _volume_of_slab(slab: torch.Tensor) -> torch.Tensor:
    """Its volume, and a gradient that costs what the folded voxels do."""
    if not (torch.is_grad_enabled() and slab.requires_grad):
        return _volume_of_all(slab)
    if slab.device.type == "cpu":
        voxels = folded_voxels(slab)
        listed = voxels.nonzero()
        if len(listed) <= DENSE * voxels.numel():
            return _folded_volume(_listed(slab, listed))
    # elsewhere always: a GPU would be waited for to know how many voxels to list, and no graph holds such a list
    return checkpoint(_volume_of_all, slab, use_reentrant=False, preserve_rng_state=False)


def ndv_loss(displacement: torch.Tensor) -> torch.Tensor:
    """Non-diffeomorphic volume of a displacement, as a share of the volume it is measured in.

    Of each inner voxel ten determinants are taken, those of all choices of forward and backward differences and of the
    two tetrahedra between them; the negative ones, halved and divided by six, add up. Without a mask, 100 times the
    result is :func:`lumirlib.metrics.ndv_percent`. The gradient is zero where nothing folds. On the CPU it is taken of
    the voxels that do alone; slabs with many of them, and on a GPU all slabs, are computed again in the backward pass
    instead of being kept, with what does not fold masked out.

    Args:
        displacement: Displacement ``(B, 3, D, H, W)`` in voxels, sides of at least 3.

    Returns:
        A scalar, 0 or more: 0 for a diffeomorphism, 1 for a flipped axis; float32 or better.

    Raises:
        ValueError: another shape, or a side below 3 voxels.
    """
    displacement = with_inner_voxels(displacement)
    with spatial.without_autocast(displacement.device):
        depth = displacement.shape[2] - 2
        total = displacement.new_zeros(())
        for first in range(0, depth, BLOCK):
            slab = displacement[:, :, first : min(first + BLOCK, depth) + 2]
            total = total + _volume_of_slab(slab)
        inner = displacement[:, 0, 1:-1, 1:-1, 1:-1].numel()
    return total / inner
