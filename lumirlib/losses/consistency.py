"""Losses on how displacements agree: both directions of a pair, and two ways around a triplet.

Christensen and Johnson, "Consistent image registration", IEEE TMI 20(7), 2001 (inverse consistency) and "Invertibility
and transitivity analysis for nonrigid image registration", J. Electronic Imaging 12(1), 2003 (transitivity over three
images); on networks ICON (Greer et al., ICCV 2021).
"""

from __future__ import annotations

import torch

from lumirlib import spatial
from lumirlib._checks import check_displacement, check_same_grid


def _composition_error(outer: torch.Tensor, inner: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared length of ``outer o inner - target`` where `inner` stays in the grid; a target of None is zero."""
    difference = spatial.compose(outer, inner)
    if target is not None:
        difference = difference - target
    inside = spatial.stays_inside(inner)  # elsewhere `outer` is unknown
    squares = torch.where(inside, difference, difference.new_zeros(())).square().sum()
    return squares / inside.sum().clamp_min(1)


def inverse_consistency_loss(forward: torch.Tensor, backward: torch.Tensor) -> torch.Tensor:
    """Mean squared distance to the identity of both directions composed, in either order.

    ``1/2 (mean |b(p) + f(p + b(p))|^2 + mean |f(p) + b(p + f(p))|^2)`` over the voxels that the inner displacement
    leaves in the grid; the measure that is reported is :func:`lumirlib.metrics.inverse_consistency_error`.

    Args:
        forward: Displacement f ``(B, 3, D, H, W)`` in voxels that carries a moving image onto a fixed one.
        backward: Displacement b of the same images with their roles exchanged.

    Returns:
        A scalar, 0 or more, in voxels^2.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_displacement(forward, "forward")
    check_displacement(backward, "backward")
    check_same_grid(forward, backward, "forward", "backward")
    return 0.5 * (_composition_error(forward, backward) + _composition_error(backward, forward))


def group_consistency_loss(first: torch.Tensor, second: torch.Tensor, direct: torch.Tensor) -> torch.Tensor:
    """Mean squared distance between the way from A over B to C and the direct one.

    ``mean |s(p) + f(p + s(p)) - d(p)|^2`` over the voxels p of C that the second displacement leaves in the grid.

    Args:
        first: Displacement f ``(B, 3, D, H, W)`` in voxels that carries the moving image A onto B.
        second: Displacement s that carries B onto C.
        direct: Displacement d that carries A onto C.

    Returns:
        A scalar, 0 or more, in voxels^2.

    Raises:
        ValueError: shapes that do not fit.
    """
    for displacement, name in ((first, "first"), (second, "second"), (direct, "direct")):
        check_displacement(displacement, name)
        check_same_grid(displacement, direct, name, "direct")
    return _composition_error(first, second, direct)
