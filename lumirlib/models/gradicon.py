"""GradICON's network: U-Nets at growing resolution, each refining the composition of those before it.

Tian et al., "GradICON: Approximate Diffeomorphisms via Gradient Inverse Consistency", CVPR 2023, and uniGradICON,
MICCAI 2024.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from lumirlib import spatial
from lumirlib.models.unet import UNet, check_pair, flow_convolution


class _Step(nn.Module):
    """One U-Net with its flow convolution: the displacement of a pair in voxels of its grid."""

    def __init__(self, encoder: Sequence[int], decoder: Sequence[int]) -> None:
        super().__init__()
        self.unet = UNet(2, encoder, decoder)
        self.flow = flow_convolution(self.unet.channels)

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        displacement = self.flow(self.unet(torch.cat([moving, fixed], dim=1)))
        return displacement.to(torch.promote_types(displacement.dtype, torch.float32))


class GradICONNetwork(nn.Module):
    """From a pair of images to a displacement, in steps that are composed.

    The images are halved by averaging, `coarse_steps` times. From the coarsest grid on, a U-Net sees the fixed image
    and the moving one warped by all steps so far, ``phi``; its own displacement ``psi`` makes ``phi o psi``. There is
    one U-Net per coarse grid and `fine_steps` at full resolution. At the defaults the grids are 1/4, 1/2, 1 and again
    1: the first three are the original's first stage, the last is what its second stage adds. The displacement is in
    voxels of each grid and converted by the ratio of its sides minus one.

    Args:
        encoder: widths of each U-Net's encoder.
        decoder: widths of its decoder.
        coarse_steps: number of U-Nets below full resolution, from 0.
        fine_steps: number of U-Nets at full resolution, from 1.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        encoder: Sequence[int] = (16, 32, 32, 32),
        decoder: Sequence[int] = (32, 32, 32, 32, 32, 16, 16),
        coarse_steps: int = 2,
        fine_steps: int = 2,
    ) -> None:
        super().__init__()
        for name, value, least in (("coarse_steps", coarse_steps, 0), ("fine_steps", fine_steps, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number from {least}, got {value!r}")
        #: For each step how often the images are halved.
        self.levels = (*range(coarse_steps, 0, -1), *[0] * fine_steps)
        self.steps = nn.ModuleList(_Step(encoder, decoder) for _ in self.levels)

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """Displacement that carries `moving` onto `fixed`.

        Args:
            fixed: ``(B, 1, D, H, W)``, intensities in [0, 1]; sides from ``2**coarse_steps + 1`` voxels.
            moving: ``(B, 1, D, H, W)``, same shape.

        Returns:
            ``(B, 3, D, H, W)`` in voxels, float32 (float64 for a float64 network).

        Raises:
            TypeError, ValueError: as :func:`lumirlib.models.unet.check_pair`, and for sides that are too small.
        """
        check_pair(fixed, moving, self.steps[0].flow.weight.dtype)
        least = 2 ** max(self.levels) + 1
        if min(fixed.shape[2:]) < least:
            raise ValueError(f"fixed must have sides of at least {least} voxels, got {tuple(fixed.shape[2:])}")
        pyramid = [(fixed, moving)]
        for _ in range(max(self.levels)):
            pyramid.append(tuple(F.avg_pool3d(image, 2, ceil_mode=True) for image in pyramid[-1]))
        displacement = None
        for level, step in zip(self.levels, self.steps, strict=True):
            level_fixed, level_moving = pyramid[level]
            if displacement is None:
                displacement = step(level_fixed, level_moving)
                continue
            shape = tuple(level_fixed.shape[2:])
            if displacement.shape[2:] != shape:
                displacement = spatial.resize_displacement(displacement, shape)
            own = step(level_fixed, spatial.warp(level_moving, displacement))
            displacement = spatial.compose(displacement, own)
        return displacement
