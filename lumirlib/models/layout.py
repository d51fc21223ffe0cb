"""How a network lies in memory and is compiled: what makes it fast and leaves what it computes as it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

#: PyTorch gives a float32 convolution with a kernel of 3 voxels or less on a single image to its slow kernel, and not
#: to oneDNN, if channels times the first two sides are no more than this (``use_mkldnn`` in ATen's Convolution.cpp).
SLOW_CONVOLUTION_SIZE = 20480


class Conv3d(nn.Conv3d):
    """:class:`torch.nn.Conv3d` that avoids PyTorch's slow kernel for small volumes on the CPU, 15 times slower.

    A volume that would get it is computed as a batch of two halves.
    """

    def _conv_forward(self, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        same = self.kernel_size == (3, 3, 3) and self.stride == (1, 1, 1) and self.padding == (1, 1, 1)
        if not (same and self.groups == 1 and self.dilation == (1, 1, 1) and _is_given_to_slow_kernel(features)):
            return super()._conv_forward(features, weight, bias)
        depth = features.shape[2]
        half = -(-depth // 2)
        padded = F.pad(features, (0, 0, 0, 0, 1, 1 + 2 * half - depth))
        halves = torch.cat([padded[:, :, : half + 2], padded[:, :, half:]])  # (2, C, half + 2, H, W)
        first, second = F.conv3d(halves, weight, bias, padding=(0, 1, 1)).chunk(2)
        return torch.cat([first, second], dim=2)[:, :, :depth]


def _is_given_to_slow_kernel(features: torch.Tensor) -> bool:
    if features.device.type != "cpu" or features.ndim != 5 or features.shape[0] != 1:
        return False
    if features.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    _, channels, depth, height, _ = features.shape
    return channels * depth * height <= SLOW_CONVOLUTION_SIZE


def place(model: nn.Module, device: torch.device | str, channels_last: bool = True) -> nn.Module:
    """Move a network to a device, its weights in channels_last_3d or not.

    oneDNN's 3-D convolutions on the CPU ran 1.3 to 6 times faster so; benchmarks/train_step.py measures a GPU's.

    Args:
        model: any network.
        device: "cpu", "cuda" ...
        channels_last: False keeps PyTorch's default layout.

    Returns:
        `model` itself.
    """
    return model.to(device=device, memory_format=torch.channels_last_3d if channels_last else torch.contiguous_format)


def compile_model(model: nn.Module, backend: str = "inductor") -> nn.Module:
    """Have ``torch.compile`` fuse a network, in place; the names of the weights stay as they are.

    Of a :class:`lumirlib.models.RegistrationNetwork` encoder and flow estimators, as warps and integrations between
    them have kernels of their own; any other as a whole. The first steps take minutes; it is for GPUs, and needs a C++
    compiler.

    Args:
        model: any network.
        backend: of ``torch.compile``.

    Returns:
        `model` itself.
    """
    for part in [model.encoder, *model.estimators] if hasattr(model, "estimators") else [model]:
        part.compile(backend=backend, dynamic=False)
    return model
