"""How far the two directions of a registration are from being inverse to each other."""

from __future__ import annotations

import torch

from lumirlib import spatial
from lumirlib._checks import check_displacement, check_image, check_same_grid


def inverse_consistency_error(forward: torch.Tensor, backward: torch.Tensor, moving: torch.Tensor) -> float:
    """Mean distance to the identity of both directions composed, in voxels, inside the brain.

    `forward` carries the moving image onto the fixed one, `backward` the fixed one onto the moving; ``p + backward(p) +
    forward(p + backward(p))`` should be p. A network that predicts nothing is perfectly consistent: look at the length
    of the displacement too.

    Args:
        forward: Displacement ``(B, 3, D, H, W)`` in voxels, on the fixed grid.
        backward: Displacement of the other direction ``(B, 3, D, H, W)`` in voxels, on the moving grid.
        moving: Moving image ``(B, 1, D, H, W)``; the brain is where it is above zero.

    Returns:
        0 or more, lower is better.

    Raises:
        ValueError: shapes that do not fit, or a moving image without a voxel above zero.
    """
    check_displacement(forward, "forward")
    check_displacement(backward, "backward")
    check_image(moving, "moving", channels=1)
    check_same_grid(forward, backward, "forward", "backward")
    check_same_grid(forward, moving, "forward", "moving")
    brain = moving[:, 0] > 0
    if not brain.any():
        raise ValueError("moving must have voxels above zero, got none")
    return float(spatial.compose(forward, backward).norm(dim=1)[brain].mean())
