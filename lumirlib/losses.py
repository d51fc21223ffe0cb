"""Losses of the paper: local normalized cross-correlation (eq. 2) and smoothness (eq. 3), with deep supervision.

The paper's eq. 2 is garbled in print; what trains is one minus the mean squared local correlation coefficient.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F

from lumirlib import spatial
from lumirlib._checks import check_choice, check_image, check_same_grid

SIMILARITIES = ("ncc", "mse")
#: Added to the product of the variances, so that constant regions give zero and not NaN.
NCC_EPSILON = 1e-5


def _window_sum(padded: torch.Tensor, window: int) -> torch.Tensor:
    """Sum over a cube of `window` voxels, one axis after the other; each side shrinks by ``window - 1``."""
    for axis in range(3):
        kernel = [1, 1, 1]
        kernel[axis] = window
        padded = F.avg_pool3d(padded, kernel, stride=1, divisor_override=1)
    return padded


def ncc_loss(warped: torch.Tensor, fixed: torch.Tensor, window: int = 9) -> torch.Tensor:
    """One minus the mean squared local correlation coefficient of two images.

    ``1 - mean(cov^2 / (var_w var_f + 1e-5))`` with window sums of the deviations from the window means, as in
    VoxelMorph's NCC (Balakrishnan et al., TMI 2019) and the paper's eq. 2. The windows at the border count
    `window**3` voxels, those outside being zero. The result is float32, under autocast too (float64 for float64
    input); the window sums are float64.

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
        result_dtype = torch.promote_types(torch.promote_types(warped.dtype, fixed.dtype), torch.float32)
        # A variance is the difference of two large sums. In float32 what is left of it in a flat region is rounding,
        # which the division by a small number turns into correlation; float64 costs little beside a convolution.
        # Apple's GPUs have no float64.
        working = result_dtype if warped.device.type == "mps" else torch.float64
        count, margin = window**3, [window // 2] * 6
        warped, fixed = F.pad(warped.to(working), margin), F.pad(fixed.to(working), margin)
        # one pass of window sums for all five moments, stacked as a batch
        moments = torch.stack([warped, fixed, warped * warped, fixed * fixed, warped * fixed])
        sums = _window_sum(moments.flatten(0, 1), window)
        sum_w, sum_f, sum_ww, sum_ff, sum_wf = sums.chunk(5)
        covariance = sum_wf - sum_w * sum_f / count
        # rounding may leave a constant window with a variance just below zero
        variance_w = (sum_ww - sum_w * sum_w / count).clamp_min(0)
        variance_f = (sum_ff - sum_f * sum_f / count).clamp_min(0)
        squared = covariance * covariance / (variance_w * variance_f + NCC_EPSILON)
        # Cauchy-Schwarz bounds this by one; rounding may not
        return (1 - squared.clamp_max(1).mean()).to(result_dtype)


def mse_loss(warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of two images (B, 1, D, H, W), the similarity that the paper found worse than NCC."""
    check_image(warped, "warped")
    check_image(fixed, "fixed")
    if warped.shape != fixed.shape:
        raise ValueError(f"warped and fixed must have one shape, got {tuple(warped.shape)} and {tuple(fixed.shape)}")
    return (warped.float() - fixed.float()).square().mean()


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
        return sum(field.diff(dim=axis).square().mean() for axis in (2, 3, 4)) / 3


@lru_cache(maxsize=8)
def _gaussian_kernel(sigma: float, size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    with torch.inference_mode(False):  # what is kept must serve a later training too
        offsets = torch.arange(size, device=device, dtype=dtype) - (size - 1) / 2
        kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
        return kernel / kernel.sum()


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
) -> dict[str, torch.Tensor]:
    """The paper's eq. 1 with deep supervision: ``sum_l 2^-l (lambda0 similarity_l + lambda1 smoothness_l)``.

    At level l the moving image of a Gaussian pyramid is warped by the displacement of that level and compared with
    the fixed one; the smoothness acts on the velocity before integration.

    Args:
        moving: ``(B, 1, D, H, W)``.
        fixed: ``(B, 1, D, H, W)``.
        displacements: one per level, finest first, ``(B, 3, D_l, H_l, W_l)`` in voxels of the level.
        velocities: one per level, same shapes.
        similarity_weight: lambda0.
        smoothness_weight: lambda1.
        window: NCC window in voxels, the same at every level.
        similarity: "ncc" or "mse".

    Returns:
        Scalars "total" (to be minimized), "similarity" and "smoothness" (weighted sums over levels, without the
        lambdas).
    """
    check_same_grid(moving, fixed, "moving", "fixed")
    shapes = [tuple(displacement.shape[2:]) for displacement in displacements]
    moving_levels, fixed_levels = gaussian_pyramid(moving, shapes), gaussian_pyramid(fixed, shapes)
    check_choice(similarity, SIMILARITIES, "similarity")
    compare = (lambda a, b: ncc_loss(a, b, window)) if similarity == "ncc" else mse_loss
    similarity_sum = torch.zeros((), device=fixed.device)
    smoothness_sum = torch.zeros((), device=fixed.device)
    levels = zip(moving_levels, fixed_levels, displacements, velocities, strict=True)
    for level, (moving_level, fixed_level, displacement, velocity) in enumerate(levels):
        weight = 2.0**-level
        warped = spatial.warp(moving_level, displacement)
        similarity_sum = similarity_sum + weight * compare(warped, fixed_level)
        smoothness_sum = smoothness_sum + weight * diffusion_loss(velocity)
    total = similarity_weight * similarity_sum + smoothness_weight * smoothness_sum
    return {"total": total, "similarity": similarity_sum, "smoothness": smoothness_sum}
