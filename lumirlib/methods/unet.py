"""VoxelMorph's U-Net and the registration network around it.

Balakrishnan et al., "VoxelMorph: A Learning Framework for Deformable Medical Image Registration", TMI 2019.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from lumirlib._checks import check_choice, check_finite, check_network_images
from lumirlib.models.layers import Conv3d, instance_norm_prelu

DOWNSAMPLINGS = ("stride", "pool")

UPSAMPLINGS = ("nearest", "trilinear")
#: Slope of the leaky ReLUs for negative values.
NEGATIVE_SLOPE = 0.2
#: Standard deviation of the initial weights of the last convolution: training starts from the identity.
FLOW_STD = 1e-5


def check_widths(widths: Sequence[int], name: str) -> tuple[int, ...]:
    """The widths as a tuple; ValueError unless they are whole numbers from 1, at least one."""
    widths = tuple(widths)
    if not widths or any(isinstance(width, bool) or not isinstance(width, int) or width < 1 for width in widths):
        raise ValueError(f"{name} must be whole numbers from 1, at least one, got {widths}")
    return widths


def parse_widths(text: str, name: str) -> tuple[int, ...]:
    """The whole numbers of a text such as "16-32-32-32".

    Raises:
        ValueError: anything else, or a number below 1.
    """
    parts = text.split("-") if isinstance(text, str) else []
    if not parts or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{name} must be whole numbers from 1 joined by '-', such as 16-32, got {text!r}")
    return tuple(int(part) for part in parts)


def divide_widths(text: str, divisor: int, name: str = "widths") -> str:
    """Widths joined by "-", each divided and rounded, at least 2.

    Raises:
        ValueError: a divisor below 1, or what :func:`parse_widths` refuses.
    """
    if divisor < 1:
        raise ValueError(f"divisor must be 1 or more, got {divisor}")
    return "-".join(str(max(2, round(width / divisor))) for width in parse_widths(text, name))


def check_pair(fixed: torch.Tensor, moving: torch.Tensor, weights: torch.dtype) -> None:
    """Raise unless both images are finite, of one shape (B, 1, D, H, W) and of the weights' dtype.

    Args:
        fixed: Fixed image ``(B, 1, D, H, W)``.
        moving: Moving image ``(B, 1, D, H, W)``.
        weights: Dtype of the network's weights; not asked for under autocast.

    Raises:
        ValueError: shapes that differ or are not (B, 1, D, H, W), a side below 2 voxels, voxels that are not finite.
        TypeError: no tensor, or another dtype.
    """
    check_network_images(fixed, moving, weights)
    check_finite(fixed, "fixed")
    check_finite(moving, "moving")


def flow_convolution(in_channels: int, std: float = FLOW_STD) -> nn.Conv3d:
    """Convolution 3^3 to a displacement, with weights of standard deviation `std` and no bias at first."""
    convolution = Conv3d(in_channels, 3, kernel_size=3, padding=1)
    nn.init.normal_(convolution.weight, std=std)
    nn.init.zeros_(convolution.bias)
    return convolution


def convolve(convolution: nn.Conv3d, features: torch.Tensor, normalization: bool) -> torch.Tensor:
    """A convolution, instance normalization without parameters where asked for, and a leaky ReLU."""
    features = convolution(features)
    if normalization:
        return instance_norm_prelu(features, torch.full((1,), NEGATIVE_SLOPE, device=features.device))
    return F.leaky_relu(features, NEGATIVE_SLOPE)


class UNet(nn.Module):
    """Encoder and decoder with skips, one convolution 3^3 and a leaky ReLU (slope 0.2) per step.

    The encoder has one level per entry of `encoder`, each half as large as the one before. The first
    ``len(encoder)`` convolutions of the decoder are each followed by upsampling and by joining the encoder's map of
    that size; the rest works at full resolution.

    Images of any size, nothing is padded or cropped: a level has ``ceil(side / 2)`` voxels of the finer one along
    each axis, and upsampling goes to the size of the map that is joined. On sides that 2^levels divides this is the
    doubling of the published networks.

    Args:
        in_channels: Number of channels of the input.
        encoder: Widths of the encoder, finest level first.
        decoder: Widths of the decoder, coarsest level first; at least as many as `encoder`.
        out_channels: Number of channels of a last convolution without activation; None leaves it out.
        downsampling: Way of going down: "stride", convolutions of stride 2 and the input itself as the skip at full
            resolution, or "pool", convolutions at full resolution first, then the maximum of 2^3 voxels.
        upsampling: Interpolation: "nearest", or "trilinear" with aligned corners.
        out_kernel: Side of the last convolution's kernel, odd.
        normalization: See :func:`convolve`.

    Attributes:
        channels: Number of channels of the output.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        in_channels: int,
        encoder: Sequence[int],
        decoder: Sequence[int],
        out_channels: int | None = None,
        downsampling: str = "stride",
        upsampling: str = "nearest",
        out_kernel: int = 3,
        normalization: bool = False,
    ) -> None:
        super().__init__()
        encoder, decoder = check_widths(encoder, "encoder"), check_widths(decoder, "decoder")
        check_choice(downsampling, DOWNSAMPLINGS, "downsampling")
        check_choice(upsampling, UPSAMPLINGS, "upsampling")
        if len(decoder) < len(encoder):
            raise ValueError(f"decoder must have at least the {len(encoder)} widths of encoder, got {len(decoder)}")
        if out_kernel < 1 or out_kernel % 2 == 0:
            raise ValueError(f"out_kernel must be odd and positive, got {out_kernel}")
        self.downsampling, self.upsampling, self.normalization = downsampling, upsampling, normalization
        stride = 2 if downsampling == "stride" else 1
        before = (in_channels, *encoder[:-1])
        self.encoder = nn.ModuleList(
            Conv3d(width_in, width, kernel_size=3, stride=stride, padding=1)
            for width_in, width in zip(before, encoder, strict=True)
        )
        skips = before if downsampling == "stride" else encoder
        self.decoder = nn.ModuleList()
        width = encoder[-1]
        for index, width_out in enumerate(decoder):
            self.decoder.append(Conv3d(width, width_out, kernel_size=3, padding=1))
            width = width_out + (skips[-1 - index] if index < len(encoder) else 0)
        self.out = None if out_channels is None else nn.Conv3d(width, out_channels, out_kernel, padding=out_kernel // 2)
        self.channels = width if out_channels is None else out_channels

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """``(B, in_channels, D, H, W)`` -> ``(B, channels, D, H, W)``."""
        skips = []
        for convolution in self.encoder:
            if self.downsampling == "stride":
                skips.append(features)
                features = convolve(convolution, features, self.normalization)
            else:
                skips.append(convolve(convolution, features, self.normalization))
                features = F.max_pool3d(skips[-1], 2, ceil_mode=True)
        aligned = True if self.upsampling == "trilinear" else None
        for convolution in self.decoder:
            features = convolve(convolution, features, self.normalization)
            if skips:
                skip = skips.pop()
                features = F.interpolate(features, size=skip.shape[2:], mode=self.upsampling, align_corners=aligned)
                features = torch.cat([features, skip], dim=1)
        return features if self.out is None else self.out(features)
