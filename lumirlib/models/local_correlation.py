"""Local correlation (CORR) of fixed and warped moving features at each level of the pyramid.

Every fixed feature is compared with the moving ones in a small window around its place: the cost volume of PWC-Net (Sun
et al., CVPR 2018), whose channels an estimator reads, or the attention of "Vector field attention for deformable image
registration" (VFA; Liu et al., J. Medical Imaging 11(6), 2024), which turns them into a displacement.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from lumirlib import spatial
from lumirlib._checks import check_image

MODES = ("channels", "attention")
#: Below this length features count as zero.
SHORTEST = 1e-4


def window_offsets(window: int) -> list[tuple[int, int, int]]:
    """Offsets (i, j, k) of a cube of `window` voxels, the last axis fastest."""
    half = window // 2
    return list(itertools.product(range(-half, half + 1), repeat=3))


def local_correlation(fixed: torch.Tensor, moving: torch.Tensor, window: int = 3) -> torch.Tensor:
    """Cosine of each fixed feature and the moving features around its place.

    ``c_o(p) = F(p) . M(p + o) / (|F(p)| |M(p + o)|)`` for each offset o of the window; 0 where ``p + o`` lies outside.

    Args:
        fixed: Fixed features ``(B, N, D, H, W)``.
        moving: Moving features ``(B, N, D, H, W)``.
        window: Odd side of the window in voxels.

    Returns:
        ``(B, window**3, D, H, W)`` in [-1, 1], in the order of :func:`window_offsets`; float32 or better.

    Raises:
        ValueError: shapes that differ, or an even window.
    """
    check_image(fixed, "fixed")
    check_image(moving, "moving")
    if fixed.shape != moving.shape:
        raise ValueError(f"fixed and moving must have one shape, got {tuple(fixed.shape)} and {tuple(moving.shape)}")
    check_window(window)
    half = window // 2
    with spatial.without_autocast(fixed.device):
        working = torch.promote_types(fixed.dtype, torch.float32)
        fixed, moving = (F.normalize(features.to(working), dim=1, eps=SHORTEST) for features in (fixed, moving))
        padded = F.pad(moving, [half] * 6)
        found = []
        for offset in window_offsets(window):
            there = [slice(half + by, half + by + side) for by, side in zip(offset, fixed.shape[2:], strict=True)]
            found.append((fixed * padded[(..., *there)]).sum(dim=1))
        return torch.stack(found, dim=1)


def check_window(window: int) -> None:
    """Raise ValueError unless `window` can be the side of one."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 3 or window % 2 == 0:
        raise ValueError(f"correlation_window must be odd and 3 or more, got {window!r}")


class CorrelationChannels(nn.Module):
    """The correlations as further channels of a flow estimator's first convolution.

    They enter it through a kernel of one voxel, as the window reaches around already. Its weights start at zero, so
    that the network starts as the one without correlations.

    Args:
        window: Side of the window in voxels.
        width: Number of channels of the convolution that they are added to.
    """

    def __init__(self, window: int, width: int) -> None:
        super().__init__()
        check_window(window)
        self.window = window
        self.conv = nn.Conv3d(window**3, width, kernel_size=1, bias=False)
        nn.init.zeros_(self.conv.weight)

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """Features ``(B, N, D, H, W)`` -> what is added to the convolution's result, ``(B, width, D, H, W)``."""
        return self.conv(local_correlation(fixed, moving, self.window))


class CorrelationAttention(nn.Module):
    """The mean offset of the window, weighted by the softmax of the correlations: a velocity.

    Both the sharpness of the softmax and the strength of the result are trained; the latter starts at zero, so that the
    network starts as the one without correlations.

    Args:
        window: Side of the window in voxels.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        check_window(window)
        self.window = window
        self.log_sharpness = nn.Parameter(torch.full((1,), math.log(10.0)))
        self.strength = nn.Parameter(torch.zeros(1))

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """Features ``(B, N, D, H, W)`` -> velocity ``(B, 3, D, H, W)`` in voxels, at most half a window long."""
        with spatial.without_autocast(fixed.device):
            weights = (self.log_sharpness.exp() * local_correlation(fixed, moving, self.window)).softmax(dim=1)
            offsets = torch.tensor(window_offsets(self.window), dtype=weights.dtype, device=weights.device)
            return self.strength * torch.einsum("bodhw,oa->badhw", weights, offsets)
