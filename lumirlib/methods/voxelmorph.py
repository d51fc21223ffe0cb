"""VoxelMorph, retrained here: the row's network and recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lumirlib import losses, spatial
from lumirlib._checks import check_choice
from lumirlib.methods.base import Baseline, Preset
from lumirlib.methods.unet import UNet, check_pair, divide_widths, flow_convolution, parse_widths


def pair_loss(
    fixed: torch.Tensor, moving: torch.Tensor, displacement: torch.Tensor, preset: Preset
) -> dict[str, torch.Tensor]:
    """Similarity of the warped images and diffusion of their displacements, means over the batch.

    Args:
        fixed: Fixed images ``(B, 1, D, H, W)``.
        moving: Moving images ``(B, 1, D, H, W)``.
        displacement: Displacement ``(B, 3, D, H, W)`` in voxels, from fixed to moving.
        preset: Preset that gives weights, similarity and window.

    Returns:
        Scalars "total", "similarity" and "smoothness" (without the weights).
    """
    return losses.registration_loss(
        moving,
        fixed,
        [displacement],
        [displacement],
        preset.similarity_weight,
        preset.smoothness_weight,
        preset.window_voxels,
        preset.similarity,
    )


def both_directions(fixed: torch.Tensor, moving: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair and the same pair exchanged, as one batch: the fixed and the moving images, ``(2 B, 1, D, H, W)`` each.

    A loss that is a mean over the batch is then the mean over both directions. On the CPU one pass over two pairs is
    also the cheaper one: torch leaves narrow convolutions of a single image to a slow routine.
    """
    return torch.cat([fixed, moving]), torch.cat([moving, fixed])


@dataclass(frozen=True)
class VoxelMorph(Baseline):
    """The row "VoxelMorph": the challenge organisers' VoxelMorph-2.

    Attributes:
        name: Name as in Table 1.
        encoder: Widths of the U-Net's encoder, joined by "-".
        decoder: Widths of the U-Net's decoder, joined by "-".
        squarings: Number of squarings of an integration; 0 for the organisers' plain displacement.
        layout: Layout of the network, "organisers" or "package", see
            :class:`~lumirlib.methods.voxelmorph.VoxelMorphNetwork`.
        symmetric: Whether to train on the mean loss of both directions of a pair, as the organisers take both.
        smoothness_weight: Weight of the diffusion, beside a similarity of weight 1.
        learning_rate_factor: Factor on the preset's learning rate; 1/4 makes the organisers' 1e-4 of the paper's 4e-4.
        coarse_learning_rate_factor: Factor for coarse presets, see :class:`lumirlib.methods.base.Baseline`.
    """

    name: str = "VoxelMorph"
    encoder: str = "16-32-32-32"
    decoder: str = "32-32-32-32-32-16-16"
    squarings: int = 0
    layout: str = "organisers"
    symmetric: bool = True
    smoothness_weight: float = 1.0
    learning_rate_factor: float = 0.25
    coarse_learning_rate_factor: float = 4.0

    def narrowed(self, divisor: int) -> VoxelMorph:
        """The row with its widths divided, at least 2 each."""
        if divisor == 1:
            return self
        encoder = divide_widths(self.encoder, divisor, "encoder")
        return replace(self, encoder=encoder, decoder=divide_widths(self.decoder, divisor, "decoder"))

    def build(self) -> nn.Module:
        """A fresh network, its weights drawn from torch's global generator."""
        return VoxelMorphNetwork(
            parse_widths(self.encoder, "encoder"), parse_widths(self.decoder, "decoder"), self.squarings, self.layout
        )

    def loss_terms(
        self, model: nn.Module, fixed: torch.Tensor, moving: torch.Tensor, preset: Preset, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Loss of one training step.

        Args:
            model: Network from :meth:`build`.
            fixed: Fixed image ``(B, 1, D, H, W)``, intensities in [0, 1].
            moving: Moving image ``(B, 1, D, H, W)``, intensities in [0, 1].
            preset: Preset from :meth:`training_preset`.
            generator: Generator, not used: nothing here is random.

        Returns:
            Scalars "total", "similarity" and "smoothness".
        """
        if self.symmetric:
            fixed, moving = both_directions(fixed, moving)
        return pair_loss(fixed, moving, model(fixed, moving), preset)


LAYOUTS = ("organisers", "package")


class VoxelMorphNetwork(nn.Module):
    """VoxelMorph, from a pair of images to a displacement at full resolution.

    Args:
        encoder: Widths of the U-Net's encoder.
        decoder: Widths of the U-Net's decoder.
        squarings: Number of squarings: 0 takes the network's output as the displacement; more take it as a stationary
            velocity and integrate it with so many squarings.
        layout: Layout of the network: "organisers", strided convolutions and nearest-neighbour upsampling, 301,411
            parameters at the default widths; "package", that of the Python package voxelmorph 0.3: pooling, trilinear
            upsampling, three channels by a convolution 1^3 and then the flow's 3^3. The package itself has a last width
            as the one before it, so that its ``nb_features=(16, 32, 32, 32)`` is ``decoder=(32, 32, 32, 16, 16)`` here.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        encoder: Sequence[int] = (16, 32, 32, 32),
        decoder: Sequence[int] = (32, 32, 32, 32, 32, 16, 16),
        squarings: int = 0,
        layout: str = "organisers",
    ) -> None:
        super().__init__()
        check_choice(layout, LAYOUTS, "layout")
        if isinstance(squarings, bool) or not isinstance(squarings, int) or squarings < 0:
            raise ValueError(f"squarings must be a whole number from 0, got {squarings!r}")
        self.squarings = squarings
        if layout == "organisers":
            self.unet = UNet(2, encoder, decoder)
        else:
            self.unet = UNet(2, encoder, decoder, 3, downsampling="pool", upsampling="trilinear", out_kernel=1)
        self.flow = flow_convolution(self.unet.channels)

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """Displacement that carries `moving` onto `fixed`.

        Args:
            fixed: Fixed image ``(B, 1, D, H, W)``, intensities in [0, 1]; any sides from 2 voxels.
            moving: Moving image ``(B, 1, D, H, W)``, same shape.

        Returns:
            ``(B, 3, D, H, W)`` in voxels, float32 (float64 for a float64 network).

        Raises:
            TypeError, ValueError: as :func:`check_pair`.
        """
        check_pair(fixed, moving, self.flow.weight.dtype)
        field = self.flow(self.unet(torch.cat([moving, fixed], dim=1)))
        field = field.to(torch.promote_types(field.dtype, torch.float32))
        return spatial.integrate(field, self.squarings) if self.squarings else field
