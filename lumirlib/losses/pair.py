"""The masked loss of one pair, for instance optimization.

What a mask leaves out counts nowhere: neither in the window of a correlation nor in the smoothing between two levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from lumirlib import spatial
from lumirlib._checks import check_image, check_same_grid
from lumirlib.losses._kernels import NCC_EPSILON
from lumirlib.losses.multilevel import gaussian_smooth
from lumirlib.losses.similarity import PLANES, window_sum
from lumirlib.losses.smoothness import diffusion_loss

#: A warped voxel counts if at most so much of it is of voxels that do not.
TRACE = 1e-3


class _MeanOfWindows(torch.autograd.Function):
    """Mean over the cube around each voxel; voxels outside are zero and are counted, so it is its own adjoint."""

    @staticmethod
    def forward(ctx, image: torch.Tensor, side: int) -> torch.Tensor:
        ctx.side = side
        padded = F.pad(image, [side // 2] * 6)
        parts = (padded[:, :, first : first + PLANES + side - 1] for first in range(0, image.shape[2], PLANES))
        return torch.cat([window_sum(part, side) for part in parts], 2).div_(side**3)

    @staticmethod
    def backward(ctx, slope: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _MeanOfWindows.apply(slope, ctx.side), None


def masked_ncc_loss(warped: torch.Tensor, fixed: torch.Tensor, counts: torch.Tensor, window: int = 9) -> torch.Tensor:
    """:func:`lumirlib.losses.ncc_loss` of the voxels that count: window sums and the mean over voxels are of those.

    Where all voxels count, windows at the border take the voxels inside the image, and not zeros beyond it.

    Args:
        warped: Warped moving image ``(B, 1, D, H, W)``.
        fixed: Fixed image ``(B, 1, D, H, W)``.
        counts: Which voxels count, ``(B, 1, D, H, W)``, 1 or 0.
        window: Side of the cubic window in voxels, odd.

    Returns:
        A scalar in [0, 1], differentiable as often as PyTorch can.

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
        return _MeanOfWindows.apply(image, window)

    share = mean(counts).clamp_min(1 / window**3)  # of a window's voxels that count
    mean_w, mean_f = mean(w) / share, mean(f) / share
    volume = share * window**3
    covariance = volume * (mean(w * f) / share - mean_w * mean_f)
    variance_w = volume * (mean(w * w) / share - mean_w * mean_w).clamp_min(0)
    variance_f = volume * (mean(f * f) / share - mean_f * mean_f).clamp_min(0)
    squared = (covariance.square() / (variance_w * variance_f + NCC_EPSILON)).clamp_max(1)
    return (1 - (squared * counts).sum() / counts.sum()).to(torch.promote_types(warped.dtype, torch.float32))


class PairLoss:
    """Loss of one pair, as :class:`lumirlib.methods.instance_optimization.InstanceOptimization` takes it.

    ``sum_l 2^-l (similarity_l + smoothness_weight smoothness_l)`` with :func:`masked_ncc_loss`, else as
    :func:`lumirlib.losses.registration_loss`.

    Args:
        fixed: Fixed image ``(1, 1, D, H, W)`` in [0, 1].
        moving: Moving image ``(1, 1, D, H, W)`` in [0, 1].
        shapes: Sides of each level, finest first.
        fixed_counts: Which voxels of the fixed image count, ``(1, 1, D, H, W)``, 1 or 0; None for all.
        moving_counts: The same of the moving image.
        smoothness_weight: Weight of the smoothness.
        window: Side of the NCC window in voxels.
        passes: Number of velocities of a level.

    Raises:
        ValueError: shapes that differ.
    """

    def __init__(
        self,
        fixed: torch.Tensor,
        moving: torch.Tensor,
        shapes: Sequence[Sequence[int]],
        fixed_counts: torch.Tensor | None = None,
        moving_counts: torch.Tensor | None = None,
        smoothness_weight: float = 6.0,
        window: int = 9,
        passes: int = 1,
    ) -> None:
        check_same_grid(moving, fixed, "moving", "fixed")
        self.window, self.passes, self.smoothness_weight = window, passes, smoothness_weight
        self.fixed = self._levels(fixed, fixed_counts, shapes)
        self.moving = self._levels(moving, moving_counts, shapes)

    def _levels(
        self, image: torch.Tensor, counts: torch.Tensor | None, shapes: Sequence[Sequence[int]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What is compared at each level, and which voxels of it count."""
        counts = torch.ones_like(image) if counts is None else counts.to(image)
        check_same_grid(counts, image, "counts", "image")
        levels, whole = [(image * counts, counts)], torch.ones_like(counts)
        for shape in shapes[1:]:
            image, counts = levels[-1]
            share, whole = (spatial.resize(gaussian_smooth(one), shape) for one in (counts, whole))
            smooth = spatial.resize(gaussian_smooth(image), shape) / share.clamp_min(1e-3)
            counts = (share >= 0.5 * whole).to(image)
            levels.append((smooth * counts, counts))
            whole = torch.ones_like(counts)
        return levels

    def __call__(self, predicted: object, fixed: torch.Tensor, moving: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scalars "total", "similarity" and "smoothness".

        Args:
            predicted: Displacements and velocities by level, as :class:`lumirlib.models.backbone.Fields` has them.
            fixed: Fixed image; that of the pair.
            moving: Moving image; that of the pair.
        """
        similarity, smoothness = (torch.zeros((), device=fixed.device) for _ in range(2))
        levels = zip(self.fixed, self.moving, predicted.displacements[:: self.passes], strict=True)
        for level, ((of_fixed, counts), (of_moving, moving_counts), displacement) in enumerate(levels):
            with torch.no_grad():
                counts = counts * (spatial.warp(1 - moving_counts, displacement) <= TRACE)
            warped = spatial.warp(of_moving, displacement)
            if not counts.any():  # of a small level all may be masked
                continue
            similarity = similarity + 2.0**-level * masked_ncc_loss(warped, of_fixed, counts, self.window)
        for entry, velocity in enumerate(predicted.velocities):
            smoothness = smoothness + 2.0 ** -(entry // self.passes) * diffusion_loss(velocity)
        total = similarity + self.smoothness_weight * smoothness
        return {"total": total, "similarity": similarity, "smoothness": smoothness}
