"""SynthMorph's network: a U-Net that stops at half the resolution, and an integration there.

Hoffmann et al., "SynthMorph: Learning Contrast-Invariant Registration Without Acquired Images", IEEE TMI 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from lumirlib import spatial
from lumirlib.models.unet import FLOW_STD, UNet, check_pair, check_widths, convolve, flow_convolution


class SynthMorphNetwork(nn.Module):
    """From a pair of images to the displacement of a stationary velocity at half the resolution.

    VoxelMorph's U-Net in its pooling layout without the last upsampling: the encoder's first convolution works at full
    resolution, the decoder ends at half of it.

    Args:
        encoder: widths of the encoder, finest level first, at least two.
        decoder: widths of the decoder, coarsest level first; one per level of the encoder, then those of the rest.
        squarings: squarings of the integration.
        normalization: instance normalization without parameters behind every convolution but the last; the published
            network has none.
        flow_std: standard deviation of the last convolution's initial weights.

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
            fixed: ``(B, 1, D, H, W)``, intensities in [0, 1]; any sides from 3 voxels.
            moving: ``(B, 1, D, H, W)``, same shape.

        Returns:
            ``(B, 3, D, H, W)`` in voxels, float32 (float64 for a float64 network).

        Raises:
            TypeError, ValueError: as :func:`lumirlib.models.unet.check_pair`.
        """
        displacement = spatial.integrate(self.velocity(fixed, moving), self.squarings)
        return spatial.resize_displacement(displacement, tuple(fixed.shape[2:]))
