"""GradICON's network: U-Nets at growing resolution, each refining the composition of those before it.

Tian et al., "GradICON: Approximate Diffeomorphisms via Gradient Inverse Consistency", CVPR 2023, and uniGradICON,
MICCAI 2024.

uniGradICON's method, GradICON, retrained here on one cohort.

Tian et al., "GradICON: Approximate Diffeomorphisms via Gradient Inverse Consistency", CVPR 2023, and "uniGradICON: A
Foundation Model for Medical Image Registration", MICCAI 2024.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from lumirlib import losses, spatial
from lumirlib._checks import check_displacement, check_image, check_same_grid
from lumirlib.methods.base import Baseline, Preset
from lumirlib.methods.unet import UNet, check_pair, divide_widths, flow_convolution, parse_widths


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
        encoder: Widths of each U-Net's encoder.
        decoder: Widths of each U-Net's decoder.
        coarse_steps: Number of U-Nets below full resolution, from 0.
        fine_steps: Number of U-Nets at full resolution, from 1.

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
            fixed: Fixed image ``(B, 1, D, H, W)``, intensities in [0, 1]; sides from ``2**coarse_steps + 1`` voxels.
            moving: Moving image ``(B, 1, D, H, W)``, same shape.

        Returns:
            ``(B, 3, D, H, W)`` in voxels, float32 (float64 for a float64 network).

        Raises:
            TypeError, ValueError: as :func:`lumirlib.methods.unet.check_pair`, and for sides that are too small.
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


#: Added to each variance, as in the original, so that constant regions have correlation 0 and not NaN.
VARIANCE_EPSILON = 1e-5


def gaussian_lncc_loss(warped: torch.Tensor, fixed: torch.Tensor, sigma: float = 5.0) -> torch.Tensor:
    """One minus the mean local correlation coefficient of two images in Gaussian windows.

    ``1 - mean(cov / sqrt((var_w + 1e-5) (var_f + 1e-5)))``, moments weighted by a Gaussian that reaches to two standard
    deviations. Unlike :func:`lumirlib.losses.ncc_loss` the correlation is not squared: inverted contrast is worse than
    none. Moments are float64 as there (float32 on Apple's GPUs).

    Args:
        warped: Warped moving image ``(B, 1, D, H, W)``.
        fixed: Fixed image ``(B, 1, D, H, W)``.
        sigma: Standard deviation of the window in voxels.

    Returns:
        A scalar in [0, 2], float32 (float64 for float64 images). Constant regions, such as a zero background, count
        as 1.

    Raises:
        ValueError: shapes that differ, or a sigma that is not above 0.
    """
    check_image(warped, "warped", channels=1)
    check_image(fixed, "fixed", channels=1)
    if warped.shape != fixed.shape:
        raise ValueError(f"warped and fixed must have one shape, got {tuple(warped.shape)} and {tuple(fixed.shape)}")
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be above 0, got {sigma}")
    with torch.autocast(warped.device.type, enabled=False):
        result_dtype = torch.promote_types(torch.promote_types(warped.dtype, fixed.dtype), torch.float32)
        working = result_dtype if warped.device.type == "mps" else torch.float64
        warped, fixed = warped.to(working), fixed.to(working)
        moments = torch.cat([warped, fixed, warped * warped, fixed * fixed, warped * fixed], dim=1)  # (B, 5, D, H, W)
        means = losses.gaussian_smooth(moments, sigma, 2 * math.ceil(2 * sigma) + 1)
        mean_w, mean_f, mean_ww, mean_ff, mean_wf = means.unbind(1)
        variance_w = (mean_ww - mean_w * mean_w).clamp_min(0) + VARIANCE_EPSILON
        variance_f = (mean_ff - mean_f * mean_f).clamp_min(0) + VARIANCE_EPSILON
        correlation = (mean_wf - mean_w * mean_f) / (variance_w * variance_f).sqrt()
        return (1 - correlation.mean()).to(result_dtype)


def gradicon_loss(forward: torch.Tensor, backward: torch.Tensor) -> torch.Tensor:
    """Gradient inverse consistency: ``||grad(Phi_AB o Phi_BA) - I||^2``, per voxel.

    Forward differences of the composition's displacement by one voxel, squared; mean over voxels and components, sum
    over the three axes, as in the original. Differences that reach a voxel which `backward` carries out of the grid,
    where `forward` is unknown, are left out. In voxels, that is in mm for isotropic ones; the original's derivatives
    are in units of the image's sides, the same on its cubic grid.

    Args:
        forward: Displacement ``(B, 3, D, H, W)`` of Phi_AB in voxels.
        backward: Displacement of Phi_BA, which is applied first.

    Returns:
        A scalar, 0 or more; 0 where the composition is a translation.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_displacement(forward, "forward")
    check_displacement(backward, "backward")
    check_same_grid(forward, backward, "forward", "backward")
    error = spatial.compose(forward, backward)
    inside = spatial.stays_inside(backward)
    total = error.new_zeros(())
    for axis in (2, 3, 4):
        side = inside.shape[axis]
        both = inside.narrow(axis, 0, side - 1) & inside.narrow(axis, 1, side - 1)
        squares = torch.where(both, error.diff(dim=axis).square(), error.new_zeros(()))
        total = total + squares.sum() / (3 * both.sum()).clamp_min(1)
    return total


@dataclass(frozen=True)
class GradICON(Baseline):
    """The row "uniGradICON" with its method retrained here.

    Attributes:
        name: Name as in Table 1; that it is retrained is for the table to say.
        encoder: Widths of each U-Net's encoder, joined by "-".
        decoder: Widths of each U-Net's decoder, joined by "-".
        coarse_steps: Number of U-Nets below full resolution, see :class:`GradICONNetwork`.
        fine_steps: Number of U-Nets at full resolution.
        smoothness_weight: Weight lambda of the gradient inverse consistency, beside the similarity of both directions.
        learning_rate_factor: Factor on the preset's learning rate; 1/8 makes the published 5e-5 of the paper's 4e-4.
        coarse_learning_rate_factor: Factor for coarse presets, see :class:`lumirlib.methods.base.Baseline`.
        lncc_sigma_mm: Standard deviation of the similarity's window, at least one voxel. The original's 5 voxels of a
            grid of 175^3 are 4.6, 6.4 and 5.5 mm along LUMIR's axes.
    """

    name: str = "uniGradICON"
    encoder: str = "16-32-32-32"
    decoder: str = "32-32-32-32-32-16-16"
    coarse_steps: int = 2
    fine_steps: int = 2
    smoothness_weight: float = 1.5
    learning_rate_factor: float = 0.125
    coarse_learning_rate_factor: float = 4.0
    lncc_sigma_mm: float = 5.0

    def narrowed(self, divisor: int) -> GradICON:
        """The row with its widths divided, at least 2 each."""
        if divisor == 1:
            return self
        encoder = divide_widths(self.encoder, divisor, "encoder")
        return replace(self, encoder=encoder, decoder=divide_widths(self.decoder, divisor, "decoder"))

    def build(self) -> nn.Module:
        """A fresh network, its weights drawn from torch's global generator."""
        encoder, decoder = parse_widths(self.encoder, "encoder"), parse_widths(self.decoder, "decoder")
        return GradICONNetwork(encoder, decoder, self.coarse_steps, self.fine_steps)

    def loss_terms(
        self, model: nn.Module, fixed: torch.Tensor, moving: torch.Tensor, preset: Preset, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Loss of one training step, both directions of the pair in one pass.

        Args:
            model: Network from :meth:`build`.
            fixed: Fixed image ``(B, 1, D, H, W)``, intensities in [0, 1].
            moving: Moving image ``(B, 1, D, H, W)``, intensities in [0, 1].
            preset: Preset from :meth:`training_preset`.
            generator: Generator, not used: nothing here is random.

        Returns:
            Scalars "total", "similarity" (:func:`gaussian_lncc_loss`, the sum of both directions) and "smoothness"
            (:func:`gradicon_loss`).
        """
        targets, sources = torch.cat([fixed, moving]), torch.cat([moving, fixed])
        displacements = model(targets, sources)
        sigma = max(1.0, self.lncc_sigma_mm / preset.resolution_mm)
        # the mean over the batch of both directions is half their sum
        similarity = 2 * gaussian_lncc_loss(spatial.warp(sources, displacements), targets, sigma)
        smoothness = gradicon_loss(*displacements.chunk(2))
        total = preset.similarity_weight * similarity + preset.smoothness_weight * smoothness
        return {"total": total, "similarity": similarity, "smoothness": smoothness}
