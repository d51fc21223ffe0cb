"""The loss of all levels: Gaussian pyramids, a similarity, smoothness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from lumirlib import spatial
from lumirlib._checks import check_choice, check_image, check_same_grid
from lumirlib.losses import _kernels
from lumirlib.losses.similarity import as_volumes, by_planes, mse_loss, ncc_loss
from lumirlib.losses.smoothness import diffusion_loss

SIMILARITIES = ("ncc", "mse")

#: Blur between two levels of the image pyramid -> standard deviations along i, j and k in voxels, of kernels of 5.
#: "authors" is what the authors' public code computes: an axis' coordinates are used twice, another's not at all, so
#: that the kernel is a box along j and too narrow along k.
PYRAMID_BLURS = {"isotropic": (1.0, 1.0, 1.0), "authors": (1.0, math.inf, math.sqrt(0.5))}


@lru_cache(maxsize=8)
def _gaussian_kernels(
    sigma: tuple[float, float, float], size: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    with torch.inference_mode(False):  # what is kept must serve a later training too
        offsets = torch.arange(size, device=device, dtype=dtype) - (size - 1) / 2
        kernels = torch.stack([torch.exp(-(offsets**2) / (2 * width**2)) for width in sigma])
        return kernels / kernels.sum(dim=1, keepdim=True)


class _Convolution(torch.autograd.Function):
    """Convolution of an image on the CPU with a symmetric kernel along each axis, its own adjoint."""

    @staticmethod
    def forward(ctx, image: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(kernels)
        volumes = as_volumes(image)
        smooth = np.empty_like(volumes)

        def work(volume: int, first: int, last: int) -> None:
            _kernels.convolve_planes(volumes[volume], kernels.numpy(), smooth[volume], first, last)

        by_planes(work, *smooth.shape[:2])
        return torch.from_numpy(smooth).view(image.shape)

    @staticmethod
    def backward(ctx, slope: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Convolution.apply(slope, *ctx.saved_tensors), None


def gaussian_smooth(
    image: torch.Tensor, sigma: float | tuple[float, float, float] = 1.0, size: int = 5
) -> torch.Tensor:
    """Gaussian filter with a kernel of `size` voxels along each axis, zeros outside.

    Args:
        image: Image ``(B, C, D, H, W)``.
        sigma: Standard deviation in voxels, or those along i, j and k; infinity for a box.
        size: Odd kernel side in voxels.

    Returns:
        ``(B, C, D, H, W)``.
    """
    check_image(image)
    sigma = tuple(sigma) if isinstance(sigma, Sequence) else (float(sigma),) * 3
    if image.device.type == "cpu":  # where convolutions of one channel are slow
        working = torch.promote_types(image.dtype, torch.float32)
        kernels = _gaussian_kernels(sigma, size, image.device, working)
        return _Convolution.apply(image.to(working), kernels).to(image.dtype)
    kernels = _gaussian_kernels(sigma, size, image.device, image.dtype)
    batch, channels = image.shape[:2]
    image = image.flatten(0, 1)[:, None]
    for axis in range(3):
        shape, padding = [1, 1, 1], [0, 0, 0]
        shape[axis], padding[axis] = size, size // 2
        image = F.conv3d(image, kernels[axis].view(1, 1, *shape), padding=padding)
    return image.reshape(batch, channels, *image.shape[2:])


def gaussian_pyramid(
    image: torch.Tensor, shapes: Sequence[Sequence[int]], blur: str = "isotropic"
) -> list[torch.Tensor]:
    """The image at each level: level 0 as it is, each further one smoothed (sigma 1, 5 voxels) and resampled.

    Args:
        image: Image ``(B, 1, D, H, W)``.
        shapes: Sides of each level, finest first; `shapes[0]` is the image's own.
        blur: Name of the blur, one of :data:`PYRAMID_BLURS`.

    Returns:
        One image per level, float32 or better.
    """
    check_image(image)
    check_choice(blur, tuple(PYRAMID_BLURS), "blur")
    if tuple(shapes[0]) != tuple(image.shape[2:]):
        raise ValueError(f"shapes[0] must be the image's {tuple(image.shape[2:])}, got {tuple(shapes[0])}")
    with torch.autocast(image.device.type, enabled=False):
        levels = [image.to(torch.promote_types(image.dtype, torch.float32))]
        for shape in shapes[1:]:
            levels.append(spatial.resize(gaussian_smooth(levels[-1], PYRAMID_BLURS[blur]), shape))
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
    pyramid_blur: str = "isotropic",
) -> dict[str, torch.Tensor]:
    """The paper's eq. 1 with deep supervision: ``sum_l 2^-l (lambda0 similarity_l + lambda1 smoothness_l)``.

    At level l the moving image of a Gaussian pyramid is warped by the displacement of that level and compared with
    the fixed one; the smoothness acts on the velocity before integration. Of several passes of a level the last one's
    displacement is compared, and all velocities count.

    Args:
        moving: Moving image ``(B, 1, D, H, W)``.
        fixed: Fixed image ``(B, 1, D, H, W)``.
        displacements: Displacements, one per level and pass, finest and last first, ``(B, 3, D_l, H_l, W_l)`` in voxels
            of the level.
        velocities: Stationary velocities, same shapes.
        similarity_weight: Weight lambda0 of the similarity.
        smoothness_weight: Weight lambda1 of the smoothness.
        window: Side of the NCC window in voxels, the same at every level.
        similarity: Name of the similarity, "ncc" or "mse".
        passes: Number of entries per level.
        pyramid_blur: Name of the blur, one of :data:`PYRAMID_BLURS`.

    Returns:
        Scalars "total" (to be minimized), "similarity" and "smoothness" (weighted sums over levels, without the
        lambdas).
    """
    check_same_grid(moving, fixed, "moving", "fixed")
    if len(velocities) != len(displacements):
        raise ValueError(f"expected a velocity for each of {len(displacements)} displacements, got {len(velocities)}")
    last = displacements[::passes]
    shapes = [tuple(displacement.shape[2:]) for displacement in last]
    moving_levels, fixed_levels = (gaussian_pyramid(image, shapes, pyramid_blur) for image in (moving, fixed))
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
