"""TransMorph, retrained here: the row's network and recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from lumirlib.methods.voxelmorph import both_directions, pair_loss
from lumirlib.models.transmorph import TransMorphTVF
from lumirlib.models.unet import parse_widths
from lumirlib.presets import Preset
from lumirlib.rows import Baseline


@dataclass(frozen=True)
class TransMorph(Baseline):
    """The row "TransMorph": the challenge organisers' TransMorph-TVF with three levels.

    Attributes:
        name: as in Table 1.
        embedding: width of the first level's tokens.
        depths: blocks per level, joined by "-".
        heads: of every attention.
        window: sides of a window in tokens, joined by "-"; the organisers' are the full sides over 64, which is
            2-3-3 for LUMIR's 160 x 224 x 192.
        head_channels: width of the time steps' convolutions.
        time_steps: number of them.
        drop_path: largest probability of leaving a block's path out in training.
        smoothness_weight: of the diffusion, beside a similarity of weight 1.
        learning_rate_factor: times the preset's learning rate; 1/4 makes the organisers' 1e-4 of the paper's 4e-4.
        coarse_learning_rate_factor: see :class:`lumirlib.rows.Baseline`.
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
            self.embedding, parse_widths(self.depths, "depths"), self.heads, parse_widths(self.window, "window"),
            self.head_channels, self.time_steps, self.drop_path,
        )  # fmt: skip

    def loss_terms(
        self, model: nn.Module, fixed: torch.Tensor, moving: torch.Tensor, preset: Preset, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Loss of one training step, the mean over both directions of the pair.

        Args:
            model: from :meth:`build`.
            fixed: ``(B, 1, D, H, W)``, intensities in [0, 1].
            moving: ``(B, 1, D, H, W)``, likewise.
            preset: from :meth:`adapt`.
            generator: on the CPU, draws the paths that are left out.

        Returns:
            Scalars "total", "similarity" and "smoothness".
        """
        fixed, moving = both_directions(fixed, moving)
        return pair_loss(fixed, moving, model(fixed, moving, generator), preset)
