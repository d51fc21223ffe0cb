"""Smoothness of a displacement: the diffusion regularizer."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from lumirlib._checks import check_image
from lumirlib.losses import _kernels
from lumirlib.losses.similarity import as_volumes, by_planes, refuse_second_derivatives


class _Diffusion(torch.autograd.Function):
    """Mean squared forward difference that keeps nothing but the field, where autograd keeps three more as large."""

    @staticmethod
    def forward(ctx, field: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(field)
        # factors of the sums of squares: a mean over each axis, with one difference less than voxels, then over three
        ctx.scales = [side / (3 * field.numel() * (side - 1)) for side in field.shape[2:]]
        if field.device.type != "cpu":
            halves = (
                (field.narrow(a, 1, n - 1), field.narrow(a, 0, n - 1)) for a, n in enumerate(field.shape) if a > 1
            )
            return sum(F.mse_loss(after, before) for after, before in halves) / 3
        components = as_volumes(field)
        squares = np.empty((*components.shape[:2], 3))

        def work(component: int, first: int, last: int) -> None:
            _kernels.squared_differences(components[component], squares[component], first, last)

        by_planes(work, *squares.shape[:2])
        return torch.tensor(squares.sum((0, 1)) @ ctx.scales, dtype=field.dtype)

    @staticmethod
    def backward(ctx, slope: torch.Tensor) -> torch.Tensor:
        refuse_second_derivatives("diffusion_loss")
        (field,) = ctx.saved_tensors
        if field.device.type != "cpu":
            gradient = torch.zeros_like(field)
            for axis, scale in zip((2, 3, 4), ctx.scales, strict=True):
                difference, rest = field.diff(dim=axis), field.shape[axis] - 1
                gradient.narrow(axis, 1, rest).add_(difference, alpha=2 * scale)
                gradient.narrow(axis, 0, rest).sub_(difference, alpha=2 * scale)
            return gradient.mul_(slope)
        components, scales = as_volumes(field), 2 * float(slope) * np.array(ctx.scales)
        gradient = np.empty_like(components)

        def work(component: int, first: int, last: int) -> None:
            _kernels.curvatures(components[component], scales, gradient[component], first, last)

        by_planes(work, *gradient.shape[:2])
        return torch.from_numpy(gradient).view(field.shape)


def diffusion_loss(field: torch.Tensor) -> torch.Tensor:
    """Mean squared forward difference of a field, averaged over the three axes (the paper's eq. 3).

    Args:
        field: Displacement or velocity ``(B, 3, D, H, W)`` in voxels.

    Returns:
        A scalar, 0 or more, in (voxels per voxel)^2; 0 for a translation.
    """
    check_image(field, "field", channels=3)
    with torch.autocast(field.device.type, enabled=False):
        field = field.to(torch.promote_types(field.dtype, torch.float32))
        return _Diffusion.apply(field)
