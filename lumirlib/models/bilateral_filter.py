"""Joint bilateral filter (BF) of a displacement, guided by the fixed image, with trainable widths.

After Wagner et al., "Ultralow-parameter denoising: trainable bilateral filter layers" (arXiv 2201.10345) and its joint
form (arXiv 2207.07368).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import nn

from lumirlib._checks import check_displacement, check_image, check_same_grid

#: Widths below this act as this: a neighbour at one voxel then weighs nothing.
MIN_SIGMA = 1e-3


def _neighbours(shape: torch.Size, window: int) -> Iterator[tuple[tuple[int, int, int], tuple, tuple]]:
    """Each offset of the window, with the voxels that have such a neighbour and those neighbours, as slices."""
    half = window // 2
    for offset in itertools.product(range(-half, half + 1), repeat=3):
        if all(abs(by) < side for by, side in zip(offset, shape, strict=True)):
            here = (..., *(slice(max(0, -by), side - max(0, by)) for by, side in zip(offset, shape, strict=True)))
            there = (..., *(slice(max(0, by), side + min(0, by)) for by, side in zip(offset, shape, strict=True)))
            yield offset, here, there


class _JointBilateral(torch.autograd.Function):
    """The filter with a backward pass that computes the weights again instead of keeping window^3 volumes of them."""

    @staticmethod
    def _weight(guide, offset, here, there, precision):
        """Weight of the neighbour at `offset` for the voxels `here`; `precision` is 1 / sigma^2, three and one."""
        squared = torch.tensor([by * by for by in offset], dtype=precision.dtype, device=precision.device)
        spatial = (squared * precision[:3]).sum()
        difference = guide[there] - guide[here]
        return torch.exp(-0.5 * (spatial + difference * difference * precision[3])), squared, difference

    @staticmethod
    def forward(ctx, field, guide, sigma, window):
        precision = 1 / (sigma * sigma)
        total, weights = torch.zeros_like(field), torch.zeros_like(guide)
        for offset, here, there in _neighbours(guide.shape[2:], window):
            weight, _, _ = _JointBilateral._weight(guide, offset, here, there, precision)
            total[here] += weight * field[there]
            weights[here] += weight
        filtered = total / weights
        ctx.save_for_backward(field, guide, sigma, filtered, weights)
        ctx.window = window
        return filtered

    @staticmethod
    def backward(ctx, gradient):
        field, guide, sigma, filtered, weights = ctx.saved_tensors
        precision = 1 / (sigma * sigma)
        scaled = gradient / weights
        field_gradient = torch.zeros_like(field)
        precision_gradient = torch.zeros_like(sigma, dtype=torch.float64)
        for offset, here, there in _neighbours(guide.shape[2:], ctx.window):
            weight, squared, difference = _JointBilateral._weight(guide, offset, here, there, precision)
            field_gradient[there] += weight * scaled[here]
            # d filtered / d weight = (neighbour - filtered) / sum of weights; d weight / d precision = -weight d^2 / 2
            effect = weight * (scaled[here] * (field[there] - filtered[here])).sum(1, keepdim=True)
            precision_gradient[:3] -= 0.5 * squared.double() * effect.sum(dtype=torch.float64)
            precision_gradient[3] -= 0.5 * (effect * difference * difference).sum(dtype=torch.float64)
        sigma_gradient = precision_gradient * (-2 / sigma.double() ** 3)  # precision = sigma^-2
        return field_gradient, None, sigma_gradient.to(sigma.dtype), None


def joint_bilateral_filter(
    displacement: torch.Tensor, guide: torch.Tensor, sigma: torch.Tensor, window: int = 5
) -> torch.Tensor:
    """Average a displacement over neighbours that are near in space and alike in the guiding image.

    The weight of a neighbour q of the voxel p is ``exp(-sum_a (q_a - p_a)^2 / 2 s_a^2 - (g(q) - g(p))^2 / 2 s_r^2)``;
    the weights of the neighbours inside the image are normalized to one.

    Args:
        displacement: Displacement ``(B, 3, D, H, W)`` in voxels.
        guide: Guiding image ``(B, 1, D, H, W)``, the fixed image, in [0, 1]; takes no gradient.
        sigma: Widths ``(4,)``, positive: s_i, s_j, s_k in voxels and s_r in units of the guide; takes a gradient.
            Values below :data:`MIN_SIGMA` act as that; spatial widths of zero give the identity.
        window: Odd side of the neighbourhood in voxels.

    Returns:
        ``(B, 3, D, H, W)`` in voxels.
    """
    check_displacement(displacement)
    check_image(guide, "guide", channels=1)
    check_same_grid(displacement, guide, "displacement", "guide")
    if tuple(sigma.shape) != (4,):
        raise ValueError(f"sigma must hold four widths (i, j, k, range), got shape {tuple(sigma.shape)}")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be odd and positive, got {window}")
    with torch.autocast(displacement.device.type, enabled=False):
        working = torch.promote_types(displacement.dtype, torch.float32)
        widths = sigma.to(working).clamp_min(MIN_SIGMA)
        return _JointBilateral.apply(displacement.to(working), guide.detach().to(working), widths, window)


class JointBilateralFilter(nn.Module):
    """:func:`joint_bilateral_filter` with trainable widths, kept positive through their logarithms.

    Args:
        window: Odd side of the neighbourhood in voxels, at least 5; about five times the spatial widths.
        spatial_sigma: Initial s_i = s_j = s_k in voxels.
        range_sigma: Initial s_r.
    """

    def __init__(self, window: int = 5, spatial_sigma: float = 1.0, range_sigma: float = 0.1) -> None:
        super().__init__()
        if window < 5 or window % 2 == 0:
            raise ValueError(f"bilateral_window must be odd and 5 or more, got {window}")
        for name, width in (("bilateral_sigma", spatial_sigma), ("bilateral_sigma_range", range_sigma)):
            if not 0 < width < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {width!r}")
        self.window = window
        self.log_sigma = nn.Parameter(torch.tensor([math.log(spatial_sigma)] * 3 + [math.log(range_sigma)]))

    def forward(self, displacement: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
        """Filtered displacement ``(B, 3, D, H, W)``; `guide` is the fixed image ``(B, 1, D, H, W)``."""
        return joint_bilateral_filter(displacement, guide, self.log_sigma.exp(), self.window)
