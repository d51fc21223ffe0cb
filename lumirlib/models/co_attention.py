"""Co-attention (CA) between fixed and moving features, after Chen et al., arXiv 2211.13828."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class CoAttention(nn.Module):
    """Every fixed token attends to every moving one and back, over one affinity matrix.

    With tokens f and m the affinity is ``f W m^T / sqrt(N)``; its softmax along the moving tokens gathers moving
    values for the fixed stream, that along the fixed tokens fixed values for the moving stream. A gate from the
    stream's own and its attended features weighs what is added. The strength starts at zero, so that the network
    starts as the one without attention.

    Args:
        channels: Number N of channels of both streams.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.affinity = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels)
        self.gate = nn.Linear(2 * channels, channels)
        self.strength = nn.Parameter(torch.zeros(1))

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features ``(B, N, D, H, W)`` of both streams -> the same, each with what it found in the other."""
        shape = fixed.shape
        fixed_tokens, moving_tokens = (stream.flatten(2).transpose(1, 2) for stream in (fixed, moving))  # (B, T, N)
        fixed_keys = self.affinity(fixed_tokens)
        merged = [
            self._merge(fixed_tokens, fixed_keys, moving_tokens, moving_tokens),
            self._merge(moving_tokens, moving_tokens, fixed_keys, fixed_tokens),
        ]
        fixed, moving = (tokens.transpose(1, 2).reshape(shape) for tokens in merged)
        return fixed, moving

    def _merge(self, own: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        # one head: (B, 1, T, N)
        attended = F.scaled_dot_product_attention(queries[:, None], keys[:, None], self.value(other)[:, None])[:, 0]
        gate = torch.sigmoid(self.gate(torch.cat([own, attended], dim=-1)))
        return own + self.strength * gate * attended
