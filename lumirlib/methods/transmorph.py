"""TransMorph-TVF: a Swin transformer over the halved pair, and a displacement built up in seven steps.

Chen et al., "TransMorph: Transformer for unsupervised medical image registration", MedIA 2022, and "Unsupervised
Learning of Diffeomorphic Image Registration via TransMorph", WBIR 2022 (the time-varying field). Windows after Liu et
al., "Swin Transformer", ICCV 2021. Three levels as the challenge organisers trained them; DEVIATIONS.md says what
differs.

TransMorph, retrained here: the row's network and recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lumirlib import spatial
from lumirlib.methods.base import Baseline, Preset
from lumirlib.methods.unet import check_pair, check_widths, flow_convolution, parse_widths
from lumirlib.methods.voxelmorph import both_directions, pair_loss
from lumirlib.models.layers import Conv3d

#: Side of the cube of halved voxels that makes one token.
PATCH = 4
#: Hidden width of a block's perceptron over its width.
MLP_RATIO = 4
#: Standard deviation of the initial relative position bias.
BIAS_STD = 0.02
#: Sides are padded to multiples of this, so that patches and their halvings are whole,
SIDE_MULTIPLE = 2 * PATCH
#: and to at least this, so that every normalized map has more than one voxel.
MIN_SIDE = 24


def partition(tokens: torch.Tensor, window: Sequence[int]) -> torch.Tensor:
    """Cut a grid into windows.

    Args:
        tokens: Tokens ``(B, D, H, W, C)``, sides divisible by the window's.
        window: Sides (d, h, w) of a window in tokens.

    Returns:
        ``(B * windows, d * h * w, C)``.
    """
    batch, depth, height, width, channels = tokens.shape
    d, h, w = window
    blocks = tokens.reshape(batch, depth // d, d, height // h, h, width // w, w, channels)
    return blocks.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, d * h * w, channels)


def join_windows(windows: torch.Tensor, window: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """The inverse of :func:`partition`: ``(B * windows, d * h * w, C)`` -> ``(B, *shape, C)``."""
    (depth, height, width), (d, h, w) = shape, window
    blocks = windows.reshape(-1, depth // d, height // h, width // w, d, h, w, windows.shape[-1])
    return blocks.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, depth, height, width, windows.shape[-1])


def window_mask(shape: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> torch.Tensor | None:
    """Which tokens of a window of the padded and rolled grid may attend to each other.

    Rolling brings tokens of opposite borders into one window, and padding adds some that are none: both are kept
    apart from the rest.

    Args:
        shape: Sides of the grid in tokens, before padding to multiples of the window.
        window: Sides of a window in tokens.
        shift: Steps by which the padded grid is rolled towards its origin, below the window's sides.

    Returns:
        ``(windows, N, N)`` bool with N tokens in a window, True where attention is allowed; None if it is everywhere.
    """
    regions = torch.zeros((), dtype=torch.int64)
    for axis, (side, width, by) in enumerate(zip(shape, window, shift, strict=True)):
        place = torch.arange(-(-side // width) * width) + by
        wrapped = place >= len(place)
        padded = place % len(place) >= side
        view = [-1 if other == axis else 1 for other in range(3)]
        regions = regions * 4 + (2 * wrapped + padded).view(view)
    if not regions.any():
        return None
    regions = partition(regions[None, ..., None], window)[..., 0]  # (windows, N)
    return regions[:, :, None] == regions[:, None, :]


class WindowAttention(nn.Module):
    """Self-attention within windows of a grid of tokens, with a learned bias per head and relative position.

    Args:
        channels: Width of a token, divisible by `heads`.
        heads: Number of heads.
        window: Sides (d, h, w) of a window in tokens.
        shifted: Whether the windows are moved by half their sides, so that they join neighbours that plain windows
            part. Along an axis that one window covers nothing is moved.
    """

    def __init__(self, channels: int, heads: int, window: Sequence[int], shifted: bool) -> None:
        super().__init__()
        self.heads, self.window, self.shifted = heads, tuple(window), shifted
        self.projections = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)
        spans = [2 * side - 1 for side in self.window]
        self.position_bias = nn.Parameter(torch.empty(spans[0] * spans[1] * spans[2], heads))
        nn.init.trunc_normal_(self.position_bias, std=BIAS_STD)
        places = torch.cartesian_prod(*(torch.arange(side) for side in self.window))  # (N, 3)
        index = torch.zeros((), dtype=torch.int64)
        for axis, (side, span) in enumerate(zip(self.window, spans, strict=True)):
            index = index * span + places[:, None, axis] - places[None, :, axis] + side - 1
        self.register_buffer("position_index", index, persistent=False)  # (N, N)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """``(B, D, H, W, C)`` -> the same shape."""
        batch, *shape, channels = tokens.shape
        padding = [-side % width for side, width in zip(shape, self.window, strict=True)]
        padded = [side + more for side, more in zip(shape, padding, strict=True)]
        shift = [
            width // 2 if self.shifted and side > width else 0 for side, width in zip(padded, self.window, strict=True)
        ]
        tokens = F.pad(tokens, (0, 0, 0, padding[2], 0, padding[1], 0, padding[0]))
        rolled = torch.roll(tokens, [-by for by in shift], (1, 2, 3))
        windows = partition(rolled, self.window)  # (B * windows, N, C)
        count = windows.shape[1]
        query, key, value = (
            self.projections(windows).reshape(len(windows), count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )  # (B * windows, heads, N, C / heads) each
        bias = self.position_bias[self.position_index].permute(2, 0, 1)[None].to(query.dtype)  # (1, heads, N, N)
        allowed = window_mask(shape, self.window, shift)
        if allowed is not None:
            allowed = allowed.to(bias.device)[:, None].repeat(batch, 1, 1, 1)  # (B * windows, 1, N, N)
            bias = torch.where(allowed, bias, -torch.inf)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        attended = self.out(attended.transpose(1, 2).reshape(len(windows), count, channels))
        tokens = torch.roll(join_windows(attended, self.window, padded), shift, (1, 2, 3))
        return tokens[:, : shape[0], : shape[1], : shape[2]]


class SwinBlock(nn.Module):
    """Window attention and a perceptron, each behind a layer normalization and beside an identity path.

    Args:
        channels: Width of a token.
        heads: Number of heads of the attention.
        window: Sides of a window in tokens.
        shifted: Whether the windows are moved, see :class:`WindowAttention`.
        drop_path: Probability that one of the two paths is left out for an image of the batch, in training.
    """

    def __init__(self, channels: int, heads: int, window: Sequence[int], shifted: bool, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, heads, window, shifted)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, MLP_RATIO * channels), nn.GELU(), nn.Linear(MLP_RATIO * channels, channels)
        )

    def drop(self, path: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Drop the path of some of a batch's samples in training; those that stay make up for it."""
        if not self.training or self.drop_path == 0:
            return path
        draws = torch.rand(len(path), generator=generator)  # on the CPU: the same draws on every device
        kept = (draws >= self.drop_path).to(path) / (1 - self.drop_path)
        return path * kept.view(-1, 1, 1, 1, 1)

    def forward(self, tokens: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """``(B, D, H, W, C)`` -> the same shape; `generator` (CPU) draws the paths that are left out."""
        tokens = tokens + self.drop(self.attention(self.norm1(tokens)), generator)
        return tokens + self.drop(self.mlp(self.norm2(tokens)), generator)


class PatchMerging(nn.Module):
    """Joins each 2^3 tokens to one of twice the width: layer normalization and a linear map of all eight."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8 * channels)
        self.reduction = nn.Linear(8 * channels, 2 * channels, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """``(B, D, H, W, C)`` -> ``(B, ceil(D/2), ceil(H/2), ceil(W/2), 2 C)``; odd sides get one zero token."""
        batch, *shape, channels = tokens.shape
        more = [side % 2 for side in shape]
        tokens = F.pad(tokens, (0, 0, 0, more[2], 0, more[1], 0, more[0]))
        half = [(side + 1) // 2 for side in shape]
        eight = partition(tokens, (2, 2, 2)).reshape(batch, *half, 8 * channels)
        return self.reduction(self.norm(eight))


class SwinTransformer(nn.Module):
    """Features of a pair at 1/4, 1/8, ... of its resolution.

    Args:
        in_channels: Number of channels of the input.
        embedding: Width of the first level's tokens; each further level doubles it.
        depths: Blocks per level; every other one has shifted windows.
        heads: Number of heads of every attention.
        window: Sides of a window in tokens.
        drop_path: Probability of leaving out a path of the last block; grows linearly from 0 at the first one.
    """

    def __init__(
        self,
        in_channels: int,
        embedding: int,
        depths: Sequence[int],
        heads: int,
        window: Sequence[int],
        drop_path: float,
    ) -> None:
        super().__init__()
        self.embed = nn.Conv3d(in_channels, embedding, kernel_size=PATCH, stride=PATCH)
        self.embed_norm = nn.LayerNorm(embedding)
        rates = iter(np.linspace(0, drop_path, sum(depths)).tolist())
        widths = [embedding * 2**level for level in range(len(depths))]
        self.levels = nn.ModuleList(
            nn.ModuleList(SwinBlock(width, heads, window, index % 2 == 1, next(rates)) for index in range(depth))
            for width, depth in zip(widths, depths, strict=True)
        )
        self.merge = nn.ModuleList(PatchMerging(width) for width in widths[:-1])
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)

    def forward(self, pair: torch.Tensor, generator: torch.Generator | None = None) -> list[torch.Tensor]:
        """``(B, in_channels, D, H, W)``, sides divisible by 4 -> one map ``(B, C_l, D_l, H_l, W_l)`` per level."""
        tokens = self.embed_norm(self.embed(pair).movedim(1, -1))  # (B, D/4, H/4, W/4, C)
        features = []
        for level, blocks in enumerate(self.levels):
            if level:
                tokens = self.merge[level - 1](tokens)
            for block in blocks:
                tokens = block(tokens, generator)
            features.append(self.norms[level](tokens).movedim(-1, 1))
        return features


def norm_block(in_channels: int, out_channels: int, norm: type[nn.Module]) -> nn.Sequential:
    """Convolution 3^3 without bias, normalization, leaky ReLU (slope 0.01)."""
    convolution = Conv3d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    return nn.Sequential(convolution, norm(out_channels), nn.LeakyReLU())


class DecoderBlock(nn.Module):
    """Doubles a map, joins a finer one, and convolves twice, with instance normalization without parameters."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            norm_block(in_channels + skip_channels, out_channels, nn.InstanceNorm3d),
            norm_block(out_channels, out_channels, nn.InstanceNorm3d),
        )

    def forward(self, features: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """Map ``(B, C, d, h, w)`` and skip ``(B, S, D, H, W)`` -> ``(B, out_channels, D, H, W)``."""
        depth, height, width = skip.shape[2:]
        # an odd side was padded by one before it was halved: what comes back at its end is cut off
        features = F.interpolate(features, scale_factor=2, mode="trilinear")[:, :, :depth, :height, :width]
        return self.convolutions(torch.cat([features, skip], dim=1))


class FlowStep(nn.Module):
    """One time step: a small flow from the decoder's map and the pair as warped so far."""

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.skip = norm_block(2, channels, nn.BatchNorm3d)
        self.decoder = DecoderBlock(channels, channels, head_channels)
        self.flow = flow_convolution(head_channels)

    def forward(self, features: torch.Tensor, pair: torch.Tensor) -> torch.Tensor:
        """Map ``(B, C, D/2, H/2, W/2)`` and pair ``(B, 2, D, H, W)`` -> flow ``(B, 3, D, H, W)`` in voxels."""
        return self.flow(self.decoder(features, self.skip(pair)))


class TransMorphTVF(nn.Module):
    """TransMorph with a time-varying field, from a pair of images to a displacement.

    Both images are halved by averaging. A Swin transformer sees them once; its decoder, with the transformer's maps
    and one of convolutions as skips, ends at a quarter of the resolution. Then each of the time steps makes a small
    flow at half the resolution from that map and the moving image warped so far, and the displacement becomes
    ``previous + flow(flow)``. The last one is doubled by trilinear interpolation.

    Images of any size: zeros are appended up to sides divisible by 8 and at least 24, and cut off the result. Tokens
    are padded to whole windows, and the padding takes no part in attention.

    Args:
        embedding: Width of the first level's tokens, even and divisible by `heads`.
        depths: Blocks per level, three levels.
        heads: Number of heads of every attention.
        window: Sides of a window in tokens.
        head_channels: Width of the time steps' convolutions.
        time_steps: Number of time steps.
        drop_path: Largest probability of leaving a block's path out in training.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        embedding: int = 96,
        depths: Sequence[int] = (4, 4, 5),
        heads: int = 8,
        window: Sequence[int] = (2, 3, 3),
        head_channels: int = 16,
        time_steps: int = 7,
        drop_path: float = 0.3,
    ) -> None:
        super().__init__()
        depths, window = check_widths(depths, "depths"), check_widths(window, "window")
        for name, value in (
            ("embedding", embedding),
            ("heads", heads),
            ("head_channels", head_channels),
            ("time_steps", time_steps),
        ):
            check_widths([value], name)
        if len(depths) != 3 or len(window) != 3:
            raise ValueError(f"depths and window must have three numbers each, got {depths} and {window}")
        if embedding % 2 or embedding % heads:
            raise ValueError(f"embedding must be even and divisible by the {heads} heads, got {embedding}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be from 0 to below 1, got {drop_path}")
        self.transformer = SwinTransformer(2, embedding, depths, heads, window, drop_path)
        self.skip = norm_block(2, embedding // 2, nn.BatchNorm3d)
        self.decoders = nn.ModuleList(
            [
                DecoderBlock(4 * embedding, 2 * embedding, 2 * embedding),
                DecoderBlock(2 * embedding, embedding, embedding),
                DecoderBlock(embedding, embedding // 2, embedding // 2),
            ]
        )
        self.steps = nn.ModuleList(FlowStep(embedding // 2, head_channels) for _ in range(time_steps))

    def forward(
        self, fixed: torch.Tensor, moving: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Displacement that carries `moving` onto `fixed`.

        Args:
            fixed: Fixed image ``(B, 1, D, H, W)``, intensities in [0, 1]; any sides from 2 voxels.
            moving: Moving image ``(B, 1, D, H, W)``, same shape.
            generator: Generator on the CPU that draws the paths that training leaves out; torch's global one if None.

        Returns:
            ``(B, 3, D, H, W)`` in voxels, float32 (float64 for a float64 network).

        Raises:
            TypeError, ValueError: as :func:`~lumirlib.methods.unet.check_pair`.
        """
        check_pair(fixed, moving, self.transformer.embed.weight.dtype)
        depth, height, width = fixed.shape[2:]
        more = [max(MIN_SIDE, -(-side // SIDE_MULTIPLE) * SIDE_MULTIPLE) - side for side in (width, height, depth)]
        pair = F.pad(torch.cat([moving, fixed], dim=1), (0, more[0], 0, more[1], 0, more[2]))
        half = F.avg_pool3d(pair, 2)
        half_moving, half_fixed = half[:, :1], half[:, 1:]

        quarter = self.skip(F.avg_pool3d(half, 3, stride=2, padding=1))
        first, second, features = self.transformer(half, generator)
        for decoder, skip in zip(self.decoders, (second, first, quarter), strict=True):
            features = decoder(features, skip)

        displacement, warped = None, half_moving
        for step in self.steps:
            if displacement is not None:
                warped = spatial.warp(half_moving, displacement)
            flow = step(features, torch.cat([warped, half_fixed], dim=1))
            flow = flow.to(torch.promote_types(flow.dtype, torch.float32))
            moved = spatial.warp(flow, flow)
            displacement = moved if displacement is None else displacement + moved
        # both grids' voxels are cut from the same cube: without aligned corners twice the length is exact
        displacement = 2 * F.interpolate(displacement, scale_factor=2, mode="trilinear")
        return displacement[:, :, :depth, :height, :width]


@dataclass(frozen=True)
class TransMorph(Baseline):
    """The row "TransMorph": the challenge organisers' TransMorph-TVF with three levels.

    Attributes:
        name: Name as in Table 1.
        embedding: Width of the first level's tokens.
        depths: Blocks per level, joined by "-".
        heads: Number of heads of every attention.
        window: Sides of a window in tokens, joined by "-"; the organisers' are the full sides over 64, which is
            2-3-3 for LUMIR's 160 x 224 x 192.
        head_channels: Width of the time steps' convolutions.
        time_steps: Number of time steps.
        drop_path: Largest probability of leaving a block's path out in training.
        smoothness_weight: Weight of the diffusion, beside a similarity of weight 1.
        learning_rate_factor: Factor on the preset's learning rate; 1/4 makes the organisers' 1e-4 of the paper's 4e-4.
        coarse_learning_rate_factor: Factor for coarse presets, see :class:`lumirlib.methods.base.Baseline`.
    """

    name: str = "TransMorph"
    embedding: int = 96
    depths: str = "4-4-5"
    heads: int = 8
    window: str = "2-3-3"
    head_channels: int = 16
    time_steps: int = 7
    drop_path: float = 0.3
    smoothness_weight: float = 1.0
    learning_rate_factor: float = 0.25
    coarse_learning_rate_factor: float = 1.0

    def training_preset(self, preset: Preset) -> Preset:
        """As any baseline's, but on voxels half as large in every stage, 1 mm at the least: its network halves them."""
        own = super().training_preset(preset)
        if not own.stages or own.resolution_mm < 2:
            return own
        return replace(own, stages=tuple(replace(one, resolution_mm=one.resolution_mm / 2) for one in own.stages))

    def narrowed(self, divisor: int) -> TransMorph:
        """The row with its number of heads and its widths divided; the width of a head stays."""
        if divisor < 1:
            raise ValueError(f"divisor must be 1 or more, got {divisor}")
        if divisor == 1:
            return self
        heads = max(1, round(self.heads / divisor))
        return replace(
            self,
            heads=heads,
            embedding=heads * (self.embedding // self.heads),
            head_channels=max(2, round(self.head_channels / divisor)),
        )

    def build(self) -> nn.Module:
        """A fresh network, its weights drawn from torch's global generator."""
        return TransMorphTVF(
            self.embedding,
            parse_widths(self.depths, "depths"),
            self.heads,
            parse_widths(self.window, "window"),
            self.head_channels,
            self.time_steps,
            self.drop_path,
        )

    def loss_terms(
        self, model: nn.Module, fixed: torch.Tensor, moving: torch.Tensor, preset: Preset, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Loss of one training step, the mean over both directions of the pair.

        Args:
            model: Network from :meth:`build`.
            fixed: Fixed image ``(B, 1, D, H, W)``, intensities in [0, 1].
            moving: Moving image ``(B, 1, D, H, W)``, intensities in [0, 1].
            preset: Preset from :meth:`training_preset`.
            generator: Generator on the CPU that draws the paths that are left out.

        Returns:
            Scalars "total", "similarity" and "smoothness".
        """
        fixed, moving = both_directions(fixed, moving)
        return pair_loss(fixed, moving, model(fixed, moving, generator), preset)
