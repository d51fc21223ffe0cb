"""The loss of all levels: Gaussian pyramids, a similarity, smoothness."""

from __future__ import annotations

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
        volumes = as_volumes(image)
        smooth = np.empty_like(volumes)

        def work(volume: int, first: int, last: int) -> None:
            _kernels.convolve_planes(volumes[volume], kernel.numpy(), smooth[volume], first, last)

        by_planes(work, *smooth.shape[:2])
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
