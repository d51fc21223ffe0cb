"""Losses of the paper: local normalized cross-correlation (eq. 2) and smoothness (eq. 3), with deep supervision.

The paper's eq. 2 is garbled in print; what trains is one minus the mean squared local correlation coefficient.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from lumirlib._checks import check_image
from lumirlib._numba import in_threads, slabs
from lumirlib.losses import _kernels

#: Planes that the window sums of NCC take at a time, but on the CPU; more cost memory, fewer cost time.
PLANES = 32


def by_planes(work: Callable[[int, int, int], None], volumes: int, depth: int) -> None:
    """Call ``work(volume, first, last)`` for parts of all volumes, in threads."""
    parts = [(volume, *part) for volume in range(volumes) for part in slabs(depth)]
    list(in_threads(lambda part: work(*part), parts))


def as_volumes(tensor: torch.Tensor) -> np.ndarray:
    """A tensor (..., D, H, W) on the CPU as an array (N, D, H, W) of the same memory where that is possible."""
    return tensor.detach().flatten(0, -4).contiguous().numpy()


def refuse_second_derivatives(loss: str) -> None:
    """RuntimeError in a backward pass that is to be differentiated again, which hand-written gradients cannot be."""
    if torch.is_grad_enabled():  # in a backward pass: with create_graph=True
        raise RuntimeError(f"the gradient of {loss} cannot be differentiated: call backward without create_graph=True")


def _ncc_compiled(
    warped: torch.Tensor, fixed: torch.Tensor, window: int, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """NCC loss on the CPU, and its gradient with respect to `warped` if that is wanted."""
    images = as_volumes(warped), as_volumes(fixed)
    count, depth = len(images[0]), images[0].shape[1]
    gradient = torch.empty(images[0].shape if wanted else (count, 0, 0, 0), dtype=warped.dtype)
    correlations = np.empty((count, depth))

    def work(volume: int, first: int, last: int) -> None:
        w, f = (image[volume] for image in images)
        out = gradient[volume].numpy()
        _kernels.ncc_planes(w, f, window, -1 / warped.numel(), correlations[volume], out, first, last)

    by_planes(work, count, depth)
    loss = torch.tensor(1 - correlations.sum() / warped.numel(), dtype=warped.dtype)
    return loss, gradient.view(warped.shape) if wanted else None


def window_sum(padded: torch.Tensor, window: int) -> torch.Tensor:
    """Sum over a cube of `window` voxels, one axis after the other; each side shrinks by ``window - 1``.

    By doubling, as in :mod:`lumirlib.losses._kernels`.
    """
    for axis in (-3, -2, -1):
        size = padded.shape[axis] - window + 1
        total, length, reach = padded.narrow(axis, 0, size), 1, 1
        while 2 * length <= window:
            rest = padded.shape[axis] - length
            padded = padded.narrow(axis, 0, rest) + padded.narrow(axis, length, rest)
            length *= 2
            if window & length:
                total = total + padded.narrow(axis, reach, size)
                reach += length
        padded = total
    return padded


def ncc_in_parts(
    warped: torch.Tensor, fixed: torch.Tensor, window: int, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same in PyTorch, for every device, some planes at a time."""
    # A variance is the difference of two large sums. In float32 what is left of it in a flat region is rounding, which
    # the division by a small number turns into correlation; float64 costs little. Apple's GPUs have none.
    working = warped.dtype if warped.device.type == "mps" else torch.float64
    radius, volume, depth = window // 2, window**3, warped.shape[2]
    reach = radius if wanted else 0
    gradient = torch.empty_like(warped) if wanted else None
    total = torch.zeros((), dtype=working, device=warped.device)
    for first in range(0, depth, PLANES):
        last = min(first + PLANES, depth)
        low, high = max(first - reach, 0), min(last + reach, depth)  # windows with their centers there

        def cut(image: torch.Tensor, low: int = low, high: int = high) -> torch.Tensor:
            near = image[:, :, max(low - radius, 0) : min(high + radius, depth)].to(working)
            return F.pad(near, [radius] * 4 + [max(radius - low, 0), max(high + radius - depth, 0)])

        w, f = cut(warped), cut(fixed)
        sum_w, sum_f = window_sum(w, window), window_sum(f, window)
        covariance = window_sum(w * f, window) - sum_w * sum_f / volume
        # rounding may leave a constant window with a variance just below zero
        variance_w = (window_sum(w * w, window) - sum_w * sum_w / volume).clamp_min_(0)
        variance_f = (window_sum(f * f, window) - sum_f * sum_f / volume).clamp_min_(0)
        del w, f
        p = covariance / variance_w.mul_(variance_f).add_(_kernels.NCC_EPSILON)
        squared = covariance.mul_(p)
        # Cauchy-Schwarz bounds this by one; rounding may not
        total += squared[:, :, first - low : last - low].clamp_max(1).sum()
        if gradient is None:
            continue
        p.mul_(2).masked_fill_(squared > 1, 0)
        q = variance_f.mul_(p).mul_(p).mul_(-0.5)
        m = sum_f.mul_(p).add_(sum_w.mul_(q)).div_(volume)
        del covariance, squared, variance_w, sum_w
        margin = [radius] * 4 + [radius - (first - low), radius - (high - last)]
        own = slice(first, last)
        found = window_sum(F.pad(p, margin), window).mul_(fixed[:, :, own])
        found += window_sum(F.pad(q, margin), window).mul_(warped[:, :, own])
        found -= window_sum(F.pad(m, margin), window)
        gradient[:, :, own] = found.mul_(-1 / warped.numel())
    return (1 - total / warped.numel()).to(warped.dtype), gradient


def _ncc(
    warped: torch.Tensor, fixed: torch.Tensor, window: int, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    compute = _ncc_compiled if warped.device.type == "cpu" else ncc_in_parts
    return compute(warped, fixed, window, wanted)


class _LocalCorrelation(torch.autograd.Function):
    """NCC with its gradient computed beside it, and nothing but that kept; see `_loss_kernels.ncc_planes`."""

    @staticmethod
    def forward(ctx, warped: torch.Tensor, fixed: torch.Tensor, window: int) -> torch.Tensor:
        of_warped, of_fixed, _ = ctx.needs_input_grad
        loss, by_warped = _ncc(warped, fixed, window, of_warped)
        by_fixed = _ncc(fixed, warped, window, True)[1] if of_fixed else None  # the loss is symmetric
        ctx.save_for_backward(by_warped, by_fixed)
        return loss

    @staticmethod
    def backward(ctx, slope: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        refuse_second_derivatives("ncc_loss")
        by_warped, by_fixed = (None if each is None else each * slope for each in ctx.saved_tensors)
        return by_warped, by_fixed, None


def ncc_loss(warped: torch.Tensor, fixed: torch.Tensor, window: int = 9) -> torch.Tensor:
    """One minus the mean squared local correlation coefficient of two images.

    ``1 - mean(cov^2 / (var_w var_f + 1e-5))`` with window sums of the deviations from the window means, as in
    VoxelMorph's NCC (Balakrishnan et al., TMI 2019) and the paper's eq. 2. The windows at the border count
    `window**3` voxels, those outside being zero. The result is float32, under autocast too (float64 for float64
    input); the window sums are float64 (float32 on Apple's GPUs, which have none). Gradients are computed for what
    requires them, together with the loss, and can be differentiated no further.

    Args:
        warped: Warped moving image ``(B, 1, D, H, W)``.
        fixed: Fixed image ``(B, 1, D, H, W)``.
        window: Side of the cubic window in voxels, odd.

    Returns:
        A scalar in [0, 1]; 0 where both images agree up to an affine map of intensities in every window.

    Raises:
        ValueError: shapes that differ, or an even window.
    """
    check_image(warped, "warped")
    check_image(fixed, "fixed")
    if warped.shape != fixed.shape:
        raise ValueError(f"warped and fixed must have one shape, got {tuple(warped.shape)} and {tuple(fixed.shape)}")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be odd and positive, got {window}")
    with torch.autocast(warped.device.type, enabled=False):
        working = torch.promote_types(torch.promote_types(warped.dtype, fixed.dtype), torch.float32)
        warped, fixed = warped.to(working), fixed.to(working)
        if not torch.is_grad_enabled():  # else the gradient would be computed all the same
            warped, fixed = warped.detach(), fixed.detach()
        return _LocalCorrelation.apply(warped, fixed, window)


def ncc_slope(image: torch.Tensor, other: torch.Tensor, window: int) -> torch.Tensor:
    """Slope of :func:`ncc_loss` by the intensities of `image`, times the number of voxels.

    Args:
        image: Image ``(B, 1, D, H, W)``, float32 or better.
        other: Image that it is compared with, same shape and dtype.
        window: Side of the cubic window in voxels, odd.

    Returns:
        ``(B, 1, D, H, W)``.
    """
    slope = _ncc(image, other, window, True)[1]
    assert slope is not None
    return slope * image.numel()


def mse_loss(warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of two images (B, 1, D, H, W), the similarity that the paper found worse than NCC."""
    check_image(warped, "warped")
    check_image(fixed, "fixed")
    if warped.shape != fixed.shape:
        raise ValueError(f"warped and fixed must have one shape, got {tuple(warped.shape)} and {tuple(fixed.shape)}")
    return (warped.float() - fixed.float()).square().mean()
