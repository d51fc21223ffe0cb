"""SynthMorph's network: a U-Net that stops at half the resolution, and an integration there.

Hoffmann et al., "SynthMorph: Learning Contrast-Invariant Registration Without Acquired Images", IEEE TMI 2022.

SynthMorph, retrained here: trained on label maps and images synthesized from them, never on acquired images.

Hoffmann et al., "SynthMorph: Learning Contrast-Invariant Registration Without Acquired Images", IEEE TMI 2022.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from lumirlib import losses, spatial
from lumirlib._checks import check_displacement, check_labels, check_same_grid
from lumirlib.methods.base import ADDED_LATER, Baseline, Preset
from lumirlib.methods.synthesis import SynthesisOptions, deform_labels, draw_contrast, synthesize
from lumirlib.methods.unet import (
    FLOW_STD,
    UNet,
    check_pair,
    check_widths,
    convolve,
    divide_widths,
    flow_convolution,
    parse_widths,
)


class SynthMorphNetwork(nn.Module):
    """From a pair of images to the displacement of a stationary velocity at half the resolution.

    VoxelMorph's U-Net in its pooling layout without the last upsampling: the encoder's first convolution works at full
    resolution, the decoder ends at half of it.

    Args:
        encoder: Widths of the encoder, finest level first, at least two.
        decoder: Widths of the decoder, coarsest level first; one per level of the encoder, then those of the rest.
        squarings: Number of squarings of the integration.
        normalization: Whether instance normalization without parameters stands behind every convolution but the last;
            the published network has none.
        flow_std: Standard deviation of the last convolution's initial weights.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        encoder: Sequence[int] = (64, 64, 64, 64),
        decoder: Sequence[int] = (64, 64, 64, 64, 64, 64),
        squarings: int = 7,
        normalization: bool = False,
        flow_std: float = FLOW_STD,
    ) -> None:
        super().__init__()
        encoder, decoder = check_widths(encoder, "encoder"), check_widths(decoder, "decoder")
        if len(encoder) < 2 or len(decoder) < len(encoder):
            raise ValueError(
                "encoder must have at least two widths and decoder as many as encoder, "
                f"got {len(encoder)} and {len(decoder)}"
            )
        if isinstance(squarings, bool) or not isinstance(squarings, int) or squarings < 0:
            raise ValueError(f"squarings must be a whole number from 0, got {squarings!r}")
        self.squarings = squarings
        self.stem = nn.Conv3d(2, encoder[0], kernel_size=3, padding=1)
        self.normalization = normalization
        self.unet = UNet(encoder[0], encoder[1:], decoder, downsampling="pool", normalization=normalization)
        self.flow = flow_convolution(self.unet.channels, flow_std)

    def velocity(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """Velocity ``(B, 3, ceil(D/2), ceil(H/2), ceil(W/2))`` in voxels of that grid; arguments as `forward`."""
        check_pair(fixed, moving, self.flow.weight.dtype)
        features = convolve(self.stem, torch.cat([moving, fixed], dim=1), self.normalization)
        velocity = self.flow(self.unet(F.max_pool3d(features, 2, ceil_mode=True)))
        return velocity.to(torch.promote_types(velocity.dtype, torch.float32))

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """Displacement that carries `moving` onto `fixed`.

        Args:
            fixed: Fixed image ``(B, 1, D, H, W)``, intensities in [0, 1]; any sides from 3 voxels.
            moving: Moving image ``(B, 1, D, H, W)``, same shape.

        Returns:
            ``(B, 3, D, H, W)`` in voxels, float32 (float64 for a float64 network).

        Raises:
            TypeError, ValueError: as :func:`lumirlib.methods.unet.check_pair`.
        """
        displacement = spatial.integrate(self.velocity(fixed, moving), self.squarings)
        return spatial.resize_displacement(displacement, tuple(fixed.shape[2:]))


def _corner_values(volume: torch.Tensor, points: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Values of the eight voxels around each point and their trilinear weights.

    Args:
        volume: Volume ``(D, H, W)``.
        points: Places ``(3, N)`` in voxels; the weights have their gradient.

    Yields:
        Eight times values ``(N,)`` and weights ``(N,)``; outside the volume the weight is 0.
    """
    below = points.detach().floor()
    upper = points - below
    below = below.long()
    flat = volume.flatten()
    for corner in product((0, 1), repeat=3):
        weight, index = torch.ones_like(upper[0]), torch.zeros_like(below[0])
        inside = torch.ones_like(index, dtype=torch.bool)
        for axis, (step, side) in enumerate(zip(corner, volume.shape, strict=True)):
            weight = weight * (upper[axis] if step else 1 - upper[axis])
            along = below[axis] + step
            inside = inside & (along >= 0) & (along < side)
            index = index * side + along.clamp(0, side - 1)
        yield flat[index], torch.where(inside, weight, weight.new_zeros(()))


def soft_dice_loss(
    moving_labels: torch.Tensor, fixed_labels: torch.Tensor, displacement: torch.Tensor, between_voxels: bool = False
) -> torch.Tensor:
    """One minus the mean soft Dice of trilinearly warped one-hot labels.

    Per label ``2 sum(w f) / sum(w + f)`` with w the warped and f the fixed one-hot volume, as in SynthMorph. The
    one-hot volumes are never made: a value of w is the weight of those of eight voxels that have the label, so the
    sums over all labels take eight passes over the grid whatever the number of labels.

    On voxel centres w is as sharp as the labels where the displacement is zero, and any small incoherent one costs
    overlap: the loss has a kink there. `between_voxels` compares both volumes half a voxel off the grid, where both are
    smooth, at the price of a blunter optimum.

    Args:
        moving_labels: Moving labels ``(1, 1, D, H, W)``, integers.
        fixed_labels: Fixed labels ``(1, 1, D, H, W)``, integers.
        displacement: Displacement ``(1, 3, D, H, W)`` in voxels; has the gradient.
        between_voxels: Whether to sum over the centres of the cells of eight voxels in place of the voxels.

    Returns:
        A scalar in [0, 1]. For labels that coincide it is 0 on voxels, and above 0 between them, where the labels
        overlap with their neighbours. The mean is over the labels above 0 that both volumes have.

    Raises:
        ValueError: shapes that do not fit, or volumes without a label in common.
    """
    check_labels(moving_labels, "moving_labels")
    check_labels(fixed_labels, "fixed_labels")
    check_displacement(displacement)
    check_same_grid(moving_labels, fixed_labels, "moving_labels", "fixed_labels")
    check_same_grid(moving_labels, displacement, "moving_labels", "displacement")
    if displacement.shape[0] != 1:
        raise ValueError(f"displacement must be (1, 3, D, H, W), got {tuple(displacement.shape)}")
    moving, fixed = moving_labels[0, 0].long(), fixed_labels[0, 0].long()
    count = int(torch.maximum(fixed.max(), moving.max())) + 1
    shared = (torch.bincount(fixed.flatten(), minlength=count) > 0) & (
        torch.bincount(moving.flatten(), minlength=count) > 0
    )
    shared[0] = False
    if not shared.any():
        raise ValueError("moving_labels and fixed_labels must have a label above 0 in common, got none")
    displacement = displacement.to(torch.promote_types(displacement.dtype, torch.float32))
    points = spatial.identity_grid(displacement.shape[2:], displacement.device, displacement.dtype) + displacement
    # fixed labels that meet at each point, all with the same weight
    meeting = [fixed.flatten()]
    if between_voxels:
        points = F.avg_pool3d(points, 2, stride=1)
        meeting = [
            fixed[tuple(slice(step, step - 1 or None) for step in corner)].flatten()
            for corner in product((0, 1), repeat=3)
        ]
    share = 1 / len(meeting)
    overlap, volume = displacement.new_zeros(count), displacement.new_zeros(count)
    for own in meeting:
        volume = volume + share * torch.bincount(own, minlength=count)
    for label, weight in _corner_values(moving, points.flatten(2)[0]):
        agreement = share * sum((label == own).to(weight.dtype) for own in meeting)
        volume = volume.index_add(0, label, weight)
        overlap = overlap.index_add(0, label, weight * agreement)
    dice = 2 * overlap / volume.clamp_min(1e-6)
    return 1 - dice[shared].mean()


@dataclass(frozen=True)
class SynthMorph(Baseline):
    """The row "SynthMorph".

    Attributes:
        name: Name as in Table 1.
        encoder: Widths of the U-Net's encoder, joined by "-".
        decoder: Widths of the U-Net's decoder, joined by "-".
        squarings: Number of squarings of the integration.
        smoothness_weight: Weight lambda of the displacement's diffusion, beside a soft Dice of weight 1.
        draws: Number of image pairs synthesized from each pair of label maps in a step, one batch. Every second one has
            fixed and moving exchanged. Batches of one fall back to a slow convolution in PyTorch on the CPU: two take
            half the time of one.
        dice_between_voxels: Whether the Dice is summed between voxels, see :func:`soft_dice_loss`.
        learning_rate_factor: Factor on the preset's learning rate; 1/4 makes the published 1e-4 of the paper's 4e-4.
        coarse_learning_rate_factor: Factor for coarse presets, see :class:`lumirlib.methods.base.Baseline`.
        warp_sigma_mm: Strength of the random deformation of the label maps, see :class:`SynthesisOptions`; 0 for none.
        warp_spacing_mm: Distance of the velocity's nodes in mm, see :class:`SynthesisOptions`.
        zero_background: Probability that label 0 is exactly zero, see :class:`SynthesisOptions`.
        mirrored: Probability that left and right structures look alike, see :class:`SynthesisOptions`.
        shared_cortex: Probability that all cortical labels look alike, see :class:`SynthesisOptions`.
        shared_contrast: Probability that both images of a draw have one contrast, that is the means and spreads of
            their labels, background and gamma; everything else stays their own.
        corruption: Factor on the generator's spreads, blur, bias field and noise, whose values at 1 are those of
            :class:`SynthesisOptions`.
        normalization: Whether the network has instance normalization, see
            :class:`lumirlib.methods.synthmorph.SynthMorphNetwork`.
        flow_std: Standard deviation of the last convolution's initial weights, see
            :class:`lumirlib.methods.synthmorph.SynthMorphNetwork`.
    """

    name: str = "SynthMorph"
    encoder: str = "64-64-64-64"
    decoder: str = "64-64-64-64-64-64"
    squarings: int = 7
    smoothness_weight: float = 1.0
    draws: int = 2
    dice_between_voxels: bool = False
    learning_rate_factor: float = 0.25
    coarse_learning_rate_factor: float = 2.0
    warp_sigma_mm: float = 3.0
    warp_spacing_mm: float = 16.0
    zero_background: float = 0.5
    mirrored: float = 0.5
    shared_cortex: float = 0.5
    shared_contrast: float = field(default=0.0, metadata=ADDED_LATER)
    corruption: float = field(default=1.0, metadata=ADDED_LATER)
    normalization: bool = field(default=False, metadata=ADDED_LATER)
    flow_std: float = field(default=FLOW_STD, metadata=ADDED_LATER)
    trains_on: ClassVar[str] = "labels"

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws must be 1 or more, got {self.draws}")
        for name, highest in (("shared_contrast", 1), ("corruption", math.inf), ("flow_std", math.inf)):
            if not 0 <= getattr(self, name) <= highest:
                raise ValueError(f"{name} must be from 0 to {highest}, got {getattr(self, name)}")

    def at_preset(self, preset: Preset) -> SynthMorph:
        """The row at a preset's width; on coarse voxels made to learn in a few hundred steps, see DEVIATIONS.md."""
        row = super().at_preset(preset)
        if not preset.is_coarse:
            return row
        return replace(
            row,
            draws=4,
            dice_between_voxels=True,
            shared_contrast=1.0,
            corruption=0.5,
            normalization=True,
            flow_std=1e-3,
        )

    def narrowed(self, divisor: int) -> SynthMorph:
        """The row with its widths divided, at least 2 each."""
        if divisor == 1:
            return self
        encoder = divide_widths(self.encoder, divisor, "encoder")
        return replace(self, encoder=encoder, decoder=divide_widths(self.decoder, divisor, "decoder"))

    def build(self) -> nn.Module:
        """A fresh network, its weights drawn from torch's global generator."""
        return SynthMorphNetwork(
            parse_widths(self.encoder, "encoder"),
            parse_widths(self.decoder, "decoder"),
            self.squarings,
            self.normalization,
            self.flow_std,
        )

    def synthesis(self, resolution_mm: float) -> SynthesisOptions:
        """The generator's options at a voxel size."""
        usual = SynthesisOptions()
        strengths = ("sigma_low", "sigma_high", "blur_voxels", "bias_sigma", "noise_sigma")
        return SynthesisOptions(
            **{name: self.corruption * getattr(usual, name) for name in strengths},
            resolution_mm=resolution_mm,
            warp_sigma_mm=self.warp_sigma_mm,
            warp_spacing_mm=self.warp_spacing_mm,
            zero_background=self.zero_background,
            mirrored=self.mirrored,
            shared_cortex=self.shared_cortex,
        )

    def loss_terms(
        self, model: nn.Module, fixed: torch.Tensor, moving: torch.Tensor, preset: Preset, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Loss of one training step: both label maps are deformed, two images synthesized, their labels compared.

        Args:
            model: Network from :meth:`build`.
            fixed: Fixed label map ``(1, 1, D, H, W)``, integers.
            moving: Moving label map ``(1, 1, D, H, W)``, integers.
            preset: Preset from :meth:`training_preset`.
            generator: Generator of all random numbers, on the CPU.

        Returns:
            Scalars "total", "similarity" (:func:`soft_dice_loss`) and "smoothness" (diffusion of the displacement),
            means over the draws.
        """
        options = self.synthesis(preset.resolution_mm)
        pairs, images = [], []
        for draw in range(self.draws):
            ends = (moving, fixed) if draw % 2 else (fixed, moving)
            pairs.append([deform_labels(labels, generator, options) for labels in ends])
            alike = self.shared_contrast and float(torch.rand(1, generator=generator)) < self.shared_contrast
            numbers = torch.cat([labels.unique() for labels in pairs[-1]]).tolist()
            contrast = draw_contrast(numbers, generator, options) if alike else None
            images.append([synthesize(labels, generator, options, contrast) for labels in pairs[-1]])
        displacements = model(*(torch.cat(ends) for ends in zip(*images, strict=True)))
        similarity = torch.stack(
            [
                soft_dice_loss(source, target, displacement[None], self.dice_between_voxels)
                for (target, source), displacement in zip(pairs, displacements, strict=True)
            ]
        ).mean()
        smoothness = losses.diffusion_loss(displacements)
        total = preset.similarity_weight * similarity + preset.smoothness_weight * smoothness
        return {"total": total, "similarity": similarity, "smoothness": smoothness}
