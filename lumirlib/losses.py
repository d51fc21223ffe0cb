"""Losses of the paper: local normalized cross-correlation (eq. 2) and smoothness (eq. 3), with deep supervision.

The paper's eq. 2 is garbled in print; what trains is one minus the mean squared local correlation coefficient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from lumirlib import _loss_kernels, spatial
from lumirlib._checks import check_choice, check_image, check_same_grid
from lumirlib._compiled import in_threads, slabs

SIMILARITIES = ("ncc", "mse")
#: Planes that the window sums of NCC take at a time, but on the CPU; more cost memory, fewer cost time.
_PLANES = 32


def _by_planes(work: Callable[[int, int, int], None], volumes: int, depth: int) -> None:
    """Call ``work(volume, first, last)`` for parts of all volumes, in threads."""
    parts = [(volume, *part) for volume in range(volumes) for part in slabs(depth)]
    list(in_threads(lambda part: work(*part), parts))


def _volumes(tensor: torch.Tensor) -> np.ndarray:
    """A tensor (..., D, H, W) on the CPU as an array (N, D, H, W) of the same memory where that is possible."""
    return tensor.detach().flatten(0, -4).contiguous().numpy()


def _refuse_second_derivatives(loss: str) -> None:
    if torch.is_grad_enabled():  # in a backward pass: with create_graph=True
        raise RuntimeError(f"the gradient of {loss} cannot be differentiated: call backward without create_graph=True")


def _ncc_compiled(
    warped: torch.Tensor, fixed: torch.Tensor, window: int, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """NCC loss on the CPU, and its gradient with respect to `warped` if that is wanted."""
    images = _volumes(warped), _volumes(fixed)
    count, depth = len(images[0]), images[0].shape[1]
    gradient = torch.empty(images[0].shape if wanted else (count, 0, 0, 0), dtype=warped.dtype)
    correlations = np.empty((count, depth))

    def work(volume: int, first: int, last: int) -> None:
        w, f = (image[volume] for image in images)
        out = gradient[volume].numpy()
        _loss_kernels.ncc_planes(w, f, window, -1 / warped.numel(), correlations[volume], out, first, last)

    _by_planes(work, count, depth)
    loss = torch.tensor(1 - correlations.sum() / warped.numel(), dtype=warped.dtype)
    return loss, gradient.view(warped.shape) if wanted else None


def _window_sum(padded: torch.Tensor, window: int) -> torch.Tensor:
    """Sum over a cube of `window` voxels, one axis after the other; each side shrinks by ``window - 1``.

    By doubling, as in :mod:`lumirlib._loss_kernels`.
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


def _ncc_in_parts(
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
    for first in range(0, depth, _PLANES):
        last = min(first + _PLANES, depth)
        low, high = max(first - reach, 0), min(last + reach, depth)  # windows with their centers there

        def cut(image: torch.Tensor, low: int = low, high: int = high) -> torch.Tensor:
            near = image[:, :, max(low - radius, 0) : min(high + radius, depth)].to(working)
            return F.pad(near, [radius] * 4 + [max(radius - low, 0), max(high + radius - depth, 0)])

        w, f = cut(warped), cut(fixed)
        sum_w, sum_f = _window_sum(w, window), _window_sum(f, window)
        covariance = _window_sum(w * f, window) - sum_w * sum_f / volume
        # rounding may leave a constant window with a variance just below zero
        variance_w = (_window_sum(w * w, window) - sum_w * sum_w / volume).clamp_min_(0)
        variance_f = (_window_sum(f * f, window) - sum_f * sum_f / volume).clamp_min_(0)
        del w, f
        p = covariance / variance_w.mul_(variance_f).add_(_loss_kernels.NCC_EPSILON)
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
        found = _window_sum(F.pad(p, margin), window).mul_(fixed[:, :, own])
        found += _window_sum(F.pad(q, margin), window).mul_(warped[:, :, own])
        found -= _window_sum(F.pad(m, margin), window)
        gradient[:, :, own] = found.mul_(-1 / warped.numel())
    return (1 - total / warped.numel()).to(warped.dtype), gradient


class _LocalCorrelation(torch.autograd.Function):
    """NCC with its gradient computed beside it, and nothing but that kept; see `_loss_kernels.ncc_planes`."""

    @staticmethod
    def forward(ctx, warped: torch.Tensor, fixed: torch.Tensor, window: int) -> torch.Tensor:
        compute = _ncc_compiled if warped.device.type == "cpu" else _ncc_in_parts
        of_warped, of_fixed, _ = ctx.needs_input_grad
        loss, by_warped = compute(warped, fixed, window, of_warped)
        by_fixed = compute(fixed, warped, window, True)[1] if of_fixed else None  # the loss is symmetric
        ctx.save_for_backward(by_warped, by_fixed)
        return loss

    @staticmethod
    def backward(ctx, slope: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        _refuse_second_derivatives("ncc_loss")
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
        warped: ``(B, 1, D, H, W)``, the warped moving image.
        fixed: ``(B, 1, D, H, W)``.
        window: side of the cubic window in voxels, odd.

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


def mse_loss(warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of two images (B, 1, D, H, W), the similarity that the paper found worse than NCC."""
    check_image(warped, "warped")
    check_image(fixed, "fixed")
    if warped.shape != fixed.shape:
        raise ValueError(f"warped and fixed must have one shape, got {tuple(warped.shape)} and {tuple(fixed.shape)}")
    return (warped.float() - fixed.float()).square().mean()


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
        components = _volumes(field)
        squares = np.empty((*components.shape[:2], 3))

        def work(component: int, first: int, last: int) -> None:
            _loss_kernels.squared_differences(components[component], squares[component], first, last)

        _by_planes(work, *squares.shape[:2])
        return torch.tensor(squares.sum((0, 1)) @ ctx.scales, dtype=field.dtype)

    @staticmethod
    def backward(ctx, slope: torch.Tensor) -> torch.Tensor:
        _refuse_second_derivatives("diffusion_loss")
        (field,) = ctx.saved_tensors
        if field.device.type != "cpu":
            gradient = torch.zeros_like(field)
            for axis, scale in zip((2, 3, 4), ctx.scales, strict=True):
                difference, rest = field.diff(dim=axis), field.shape[axis] - 1
                gradient.narrow(axis, 1, rest).add_(difference, alpha=2 * scale)
                gradient.narrow(axis, 0, rest).sub_(difference, alpha=2 * scale)
            return gradient.mul_(slope)
        components, scales = _volumes(field), 2 * float(slope) * np.array(ctx.scales)
        gradient = np.empty_like(components)

        def work(component: int, first: int, last: int) -> None:
            _loss_kernels.curvatures(components[component], scales, gradient[component], first, last)

        _by_planes(work, *gradient.shape[:2])
        return torch.from_numpy(gradient).view(field.shape)


def diffusion_loss(field: torch.Tensor) -> torch.Tensor:
    """Mean squared forward difference of a field, averaged over the three axes (the paper's eq. 3).

    Args:
        field: ``(B, 3, D, H, W)`` in voxels: a displacement, or a velocity.

    Returns:
        A scalar, 0 or more, in (voxels per voxel)^2; 0 for a translation.
    """
    check_image(field, "field", channels=3)
    with torch.autocast(field.device.type, enabled=False):
        field = field.to(torch.promote_types(field.dtype, torch.float32))
        return _Diffusion.apply(field)


@lru_cache(maxsize=8)
def _gaussian_kernel(sigma: float, size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    with torch.inference_mode(False):  # what is kept must serve a later training too
        offsets = torch.arange(size, device=device, dtype=dtype) - (size - 1) / 2
        kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
        return kernel / kernel.sum()


class _Convolution(torch.autograd.Function):
    """Convolution of an image on the CPU with a symmetric kernel along each axis, which is its own adjoint."""

    @staticmethod
    def forward(ctx, image: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(kernel)
        volumes = _volumes(image)
        smooth = np.empty_like(volumes)

        def work(volume: int, first: int, last: int) -> None:
            _loss_kernels.convolve_planes(volumes[volume], kernel.numpy(), smooth[volume], first, last)

        _by_planes(work, *smooth.shape[:2])
        return torch.from_numpy(smooth).view(image.shape)

    @staticmethod
    def backward(ctx, slope: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Convolution.apply(slope, *ctx.saved_tensors), None


def gaussian_smooth(image: torch.Tensor, sigma: float = 1.0, size: int = 5) -> torch.Tensor:
    """Gaussian filter with a kernel of `size` voxels along each axis, zeros outside.

    Args:
        image: ``(B, C, D, H, W)``.
        sigma: standard deviation in voxels.
        size: odd kernel side in voxels.

    Returns:
        ``(B, C, D, H, W)``.
    """
    check_image(image)
    if image.device.type == "cpu":  # where convolutions of one channel are slow
        working = torch.promote_types(image.dtype, torch.float32)
        kernel = _gaussian_kernel(sigma, size, image.device, working)
        return _Convolution.apply(image.to(working), kernel).to(image.dtype)
    kernel = _gaussian_kernel(sigma, size, image.device, image.dtype)
    batch, channels = image.shape[:2]
    image = image.flatten(0, 1)[:, None]
    for axis in range(3):
        shape, padding = [1, 1, 1], [0, 0, 0]
        shape[axis], padding[axis] = size, size // 2
        image = F.conv3d(image, kernel.view(1, 1, *shape), padding=padding)
    return image.reshape(batch, channels, *image.shape[2:])


def gaussian_pyramid(image: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The image at each level: level 0 as it is, each further one smoothed (sigma 1, 5 voxels) and resampled.

    Args:
        image: ``(B, 1, D, H, W)``.
        shapes: the sides of each level, finest first; `shapes[0]` is the image's own.

    Returns:
        One image per level, float32 or better.
    """
    check_image(image)
    if tuple(shapes[0]) != tuple(image.shape[2:]):
        raise ValueError(f"shapes[0] must be the image's {tuple(image.shape[2:])}, got {tuple(shapes[0])}")
    with torch.autocast(image.device.type, enabled=False):
        levels = [image.to(torch.promote_types(image.dtype, torch.float32))]
        for shape in shapes[1:]:
            levels.append(spatial.resize(gaussian_smooth(levels[-1]), shape))
    return levels


def registration_loss(
    moving: torch.Tensor,
    fixed: torch.Tensor,
    displacements: Sequence[torch.Tensor],
    velocities: Sequence[torch.Tensor],
    similarity_weight: float = 1.0,
    smoothness_weight: float = 6.0,
    window: int = 9,
    similarity: str = "ncc",
    passes: int = 1,
) -> dict[str, torch.Tensor]:
    """The paper's eq. 1 with deep supervision: ``sum_l 2^-l (lambda0 similarity_l + lambda1 smoothness_l)``.

    At level l the moving image of a Gaussian pyramid is warped by the displacement of that level and compared with
    the fixed one; the smoothness acts on the velocity before integration. Of several passes of a level the last one's
    displacement is compared, and all velocities count.

    Args:
        moving: ``(B, 1, D, H, W)``.
        fixed: ``(B, 1, D, H, W)``.
        displacements: one per level and pass, finest and last first, ``(B, 3, D_l, H_l, W_l)`` in voxels of the level.
        velocities: same shapes.
        similarity_weight: lambda0.
        smoothness_weight: lambda1.
        window: NCC window in voxels, the same at every level.
        similarity: "ncc" or "mse".
        passes: entries per level.

    Returns:
        Scalars "total" (to be minimized), "similarity" and "smoothness" (weighted sums over levels, without the
        lambdas).
    """
    check_same_grid(moving, fixed, "moving", "fixed")
    if len(velocities) != len(displacements):
        raise ValueError(f"expected a velocity for each of {len(displacements)} displacements, got {len(velocities)}")
    last = displacements[::passes]
    shapes = [tuple(displacement.shape[2:]) for displacement in last]
    moving_levels, fixed_levels = gaussian_pyramid(moving, shapes), gaussian_pyramid(fixed, shapes)
    check_choice(similarity, SIMILARITIES, "similarity")
    compare = (lambda a, b: ncc_loss(a, b, window)) if similarity == "ncc" else mse_loss
    similarity_sum = torch.zeros((), device=fixed.device)
    smoothness_sum = torch.zeros((), device=fixed.device)
    levels = zip(moving_levels, fixed_levels, last, strict=True)
    for level, (moving_level, fixed_level, displacement) in enumerate(levels):
        similarity_sum = similarity_sum + 2.0**-level * compare(spatial.warp(moving_level, displacement), fixed_level)
    for entry, velocity in enumerate(velocities):
        smoothness_sum = smoothness_sum + 2.0 ** -(entry // passes) * diffusion_loss(velocity)
    total = similarity_weight * similarity_sum + smoothness_weight * smoothness_sum
    return {"total": total, "similarity": similarity_sum, "smoothness": smoothness_sum}
