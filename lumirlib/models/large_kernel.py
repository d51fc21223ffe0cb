"""Large-kernel convolution (LK), the parallel block of LKU-Net (Jia et al., MLMI 2022, arXiv 2208.04939)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lumirlib.models.layers import instance_norm_prelu


class LargeKernelBlock(nn.Module):
    """PReLU of the sum of a k^3, a 3^3 and a 1^3 convolution, each normalized, and the input where shapes allow.

    As each branch has an instance norm of its own, whose statistics depend on the image, the branches cannot be
    folded into one k^3 convolution for inference.

    Args:
        in_channels: Number of channels of the features.
        out_channels: Number of channels of the result; the input is added where both are equal.
        kernel_size: Side k of the kernel, odd, above 3.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 5) -> None:
        super().__init__()
        if kernel_size < 5 or kernel_size % 2 == 0:
            raise ValueError(f"large_kernel must be odd and 5 or more, got {kernel_size}")
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(in_channels, out_channels, kernel_size=size, padding=size // 2),
                nn.InstanceNorm3d(out_channels),
            )
            for size in (kernel_size, 3, 1)
        )
        self.identity = in_channels == out_channels
        self.activation = nn.PReLU()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """``(B, in_channels, D, H, W)`` -> ``(B, out_channels, D, H, W)``."""
        convolved = [branch[0](features) for branch in self.branches]
        # their sum is float32 under autocast too; a PReLU of slope one is none
        working = torch.promote_types(convolved[0].dtype, torch.float32)
        one = torch.ones(1, dtype=working, device=features.device)
        total = sum(instance_norm_prelu(branch.to(working), one, overwrite=True) for branch in convolved)
        total = total + features if self.identity else total
        return F.prelu(total, self.activation.weight).to(convolved[0].dtype)
