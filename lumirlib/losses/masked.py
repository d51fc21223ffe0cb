"""The NCC of a part of two images, by which registrations with masks are judged."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lumirlib._checks import check_image, check_same_grid
from lumirlib.losses._kernels import NCC_EPSILON
from lumirlib.losses.similarity import PLANES, window_sum


def masked_ncc_loss(warped: torch.Tensor, fixed: torch.Tensor, counts: torch.Tensor, window: int = 9) -> torch.Tensor:
    """:func:`lumirlib.losses.ncc_loss` of the voxels that count: window sums and the mean over voxels are of those.

    Where all voxels count, windows at the border take the voxels inside the image, and not zeros beyond it.

    Args:
        warped: Warped moving image ``(B, 1, D, H, W)``.
        fixed: Fixed image ``(B, 1, D, H, W)``.
        counts: Which voxels count, ``(B, 1, D, H, W)``, 1 or 0.
        window: Side of the cubic window in voxels, odd.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: shapes that differ, an even window, or no voxel that counts.
    """
    for image, name in ((warped, "warped"), (fixed, "fixed"), (counts, "counts")):
        check_image(image, name)
        check_same_grid(image, fixed, name, "fixed")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be odd and positive, got {window}")
    counts = counts.to(torch.float64)
    if not counts.any():
        raise ValueError("counts must have a voxel that counts, got none")
    w, f = warped.double() * counts, fixed.double() * counts

    def mean(image: torch.Tensor) -> torch.Tensor:
        padded = F.pad(image, [window // 2] * 6)
        parts = (padded[:, :, first : first + PLANES + window - 1] for first in range(0, image.shape[2], PLANES))
        return torch.cat([window_sum(part, window) for part in parts], 2).div_(window**3)

    share = mean(counts).clamp_min(1 / window**3)  # of a window's voxels that count
    mean_w, mean_f = mean(w) / share, mean(f) / share
    volume = share * window**3
    covariance = volume * (mean(w * f) / share - mean_w * mean_f)
    variance_w = volume * (mean(w * w) / share - mean_w * mean_w).clamp_min(0)
    variance_f = volume * (mean(f * f) / share - mean_f * mean_f).clamp_min(0)
    squared = (covariance.square() / (variance_w * variance_f + NCC_EPSILON)).clamp_max(1)
    return (1 - (squared * counts).sum() / counts.sum()).to(torch.promote_types(warped.dtype, torch.float32))
