"""Instance normalization without parameters and the PReLU behind it, in one pass that keeps the memory layout.

``torch.nn.functional.instance_norm`` copies features in ``channels_last_3d`` to the other layout and the next
convolution copies them back; and PReLU keeps what the normalization made besides what the convolution did.

How a network lies in memory and is compiled: what makes it fast and leaves what it computes as it is.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lumirlib import _numba, spatial
from lumirlib._numba import compiled, copy

#: Added to the variance, as torch.nn.InstanceNorm3d does.
EPSILON = 1e-5
#: Voxels that are summed at once. Their sums are added in one order, whatever the number of threads.
_BLOCK = 4096

_OPTIONS = {"nogil": True, "fastmath": {"contract"}}


@compiled(**_OPTIONS)
def _moments(features, sums, first, last):  # pragma: no cover (compiled)
    """Write the sums of values and of squares of the blocks from `first` to `last` to `sums`, ``(blocks, 2, C)``."""
    voxels, channels = features.shape
    for block in range(first, last):
        total, squares = np.zeros(channels), np.zeros(channels)
        for voxel in range(block * _BLOCK, min(voxels, (block + 1) * _BLOCK)):
            row = features[voxel]
            for channel in range(channels):
                value = np.float64(row[channel])
                total[channel] += value
                squares[channel] += value * value
        copy(total, sums[block, 0])
        copy(squares, sums[block, 1])


@compiled(**_OPTIONS)
def _normalize(features, mean, scale, slope, result, first, last):  # pragma: no cover (compiled)
    """Fill the blocks from `first` to `last` of `result` with the PReLU of the normalized features."""
    voxels, channels = features.shape
    for voxel in range(first * _BLOCK, min(voxels, last * _BLOCK)):
        row, into = features[voxel], result[voxel]
        for channel in range(channels):
            value = (row[channel] - mean[channel]) * scale[channel]
            into[channel] = value if value > 0 else slope * value


@compiled(**_OPTIONS)
def _gradient_sums(features, gradient, mean, scale, slope, sums, first, last):  # pragma: no cover (compiled)
    """Write sums of the blocks from `first` to `last` to ``sums``, ``(blocks, 3, C)``.

    They are those of the gradient before the PReLU, of its product with the normalized features, and of what makes the
    gradient of the slope.
    """
    voxels, channels = features.shape
    for block in range(first, last):
        total, product, by_slope = np.zeros(channels), np.zeros(channels), np.zeros(channels)
        for voxel in range(block * _BLOCK, min(voxels, (block + 1) * _BLOCK)):
            row, given = features[voxel], gradient[voxel]
            for channel in range(channels):
                value = (row[channel] - mean[channel]) * scale[channel]
                inner = given[channel] if value > 0 else slope * given[channel]
                total[channel] += inner
                product[channel] += inner * value
                by_slope[channel] += np.float64(0) if value > 0 else np.float64(given[channel] * value)
        copy(total, sums[block, 0])
        copy(product, sums[block, 1])
        copy(by_slope, sums[block, 2])


@compiled(**_OPTIONS)
def _input_gradient(features, gradient, mean, scale, slope, total, product, result, first, last):  # pragma: no cover
    """Fill blocks of `result` with the gradient in the features; `total` and `product` are means over the voxels."""
    voxels, channels = features.shape
    for voxel in range(first * _BLOCK, min(voxels, last * _BLOCK)):
        row, given, into = features[voxel], gradient[voxel], result[voxel]
        for channel in range(channels):
            value = (row[channel] - mean[channel]) * scale[channel]
            inner = given[channel] if value > 0 else slope * given[channel]
            into[channel] = scale[channel] * (inner - total[channel] - value * product[channel])


def _rows(tensor: torch.Tensor) -> np.ndarray:
    """``(B, C, D, H, W)`` as an array ``(B, D H W, C)``, float32 or float64."""
    working = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.detach().to(working).movedim(1, -1).contiguous().flatten(1, 3).numpy()


def _in_blocks(work, *arguments: object, voxels: int) -> None:
    """Call ``work(*arguments, first, last)`` for parts of the blocks, in threads."""
    for _ in _numba.in_threads(lambda part: work(*arguments, *part), _numba.slabs(-(-voxels // _BLOCK))):
        pass


class _InstanceNormPReLU(torch.autograd.Function):
    """On the CPU; keeps the features as they come and two numbers per channel for the backward pass."""

    @staticmethod
    def forward(ctx, features, slope, overwrite):
        rows = _rows(features)
        batch, voxels, channels = rows.shape
        ctx.moments = np.empty((batch, 2, channels), rows.dtype)  # mean, 1 / standard deviation
        is_copy = rows.ctypes.data != features.data_ptr()
        result = rows if is_copy or overwrite else np.empty_like(rows)
        sums = np.empty((-(-voxels // _BLOCK), 2, channels))
        ctx.slope, ctx.slope_dtype = rows.dtype.type(slope.item()), slope.dtype
        for row, moments, into in zip(rows, ctx.moments, result, strict=True):
            _in_blocks(_moments, row, sums, voxels=voxels)
            mean, squares = sums.sum(0) / voxels
            moments[0], moments[1] = mean, 1 / np.sqrt(np.maximum(squares - mean * mean, 0) + EPSILON)
            _in_blocks(_normalize, row, *moments, ctx.slope, into, voxels=voxels)
        ctx.save_for_backward(features)
        return _InstanceNormPReLU._like(features, result)

    @staticmethod
    def _like(features, rows):
        """Rows as a tensor with the dtype and the memory layout of `features`."""
        shape = (features.shape[0], *features.shape[2:], features.shape[1])
        tensor = torch.from_numpy(rows).reshape(shape).movedim(-1, 1)
        interleaved = features.is_contiguous(memory_format=torch.channels_last_3d)
        layout = torch.channels_last_3d if interleaved else torch.contiguous_format
        return tensor.to(dtype=features.dtype, memory_format=layout)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (features,) = ctx.saved_tensors
        rows, given = _rows(features), _rows(gradient)
        _, voxels, channels = rows.shape
        result = np.empty_like(rows)
        sums = np.empty((-(-voxels // _BLOCK), 3, channels))
        by_slope = 0.0
        for row, moments, out, into in zip(rows, ctx.moments, given, result, strict=True):
            _in_blocks(_gradient_sums, row, out, *moments, ctx.slope, sums, voxels=voxels)
            total, product, by = sums.sum(0)
            by_slope += by.sum()
            means = (total / voxels).astype(rows.dtype), (product / voxels).astype(rows.dtype)
            _in_blocks(_input_gradient, row, out, *moments, ctx.slope, *means, into, voxels=voxels)
        slope_gradient = torch.tensor([by_slope], dtype=ctx.slope_dtype) if ctx.needs_input_grad[1] else None
        return _InstanceNormPReLU._like(features, result), slope_gradient, None


def instance_norm_prelu(features: torch.Tensor, slope: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
    """PReLU of features whose every channel is shifted and scaled to mean zero and variance one.

    ``y = (x - mean) / sqrt(variance + 1e-5)`` per image and channel, then y where it is positive and ``slope y``
    elsewhere. The statistics are float32 or better for every dtype.

    Args:
        features: Features ``(B, C, D, H, W)``.
        slope: Slope ``(1,)`` of the PReLU, takes a gradient.
        overwrite: Whether the memory of `features` may hold the result; it does only where no gradient is asked for.

    Returns:
        ``(B, C, D, H, W)``, dtype and memory layout of `features`.
    """
    if torch.compiler.is_compiling():  # one fused pass, in either layout
        working = features.to(torch.promote_types(features.dtype, torch.float32))
        variance, mean = torch.var_mean(working, dim=(2, 3, 4), correction=0, keepdim=True)
        normalized = (working - mean) * torch.rsqrt(variance + EPSILON)
        return torch.where(normalized > 0, normalized, normalized * slope).to(features.dtype)
    if features.device.type == "cpu":
        return _InstanceNormPReLU.apply(features, slope, overwrite and not torch.is_grad_enabled())
    with spatial.without_autocast(features.device):
        return F.prelu(F.instance_norm(features, eps=EPSILON), slope.to(features.dtype))


#: Fewest voxels along each axis of a volume that oneDNN convolves in bfloat16. Gradients of a thinner one it makes of
#: memory that nothing was written to, and it writes beyond their end (oneDNN 3.12 of PyTorch 2.13, AVX-512).
BFLOAT16_SIDE = 3
#: PyTorch gives a float32 convolution with a kernel of 3 voxels or less on a single image to its slow kernel, and not
#: to oneDNN, if channels times the first two sides are no more than this (``use_mkldnn`` in ATen's Convolution.cpp).
SLOW_CONVOLUTION_SIZE = 20480
#: Channels that oneDNN computes at a time with AVX-512: fewer take as long.
CHANNELS_AT_A_TIME = 16
#: What a convolution of 3^3 voxels that keeps the grid is given.
_SAME_OF_THREE = (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1


class Conv3d(nn.Conv3d):
    """:class:`torch.nn.Conv3d` without three faults of PyTorch on the CPU.

    - A small volume that would get its slow kernel, 15 times slower, is computed as a batch of two halves.
    - Volumes thinner than :data:`BFLOAT16_SIDE` are computed in float32.
    - Eight channels or fewer are computed for two or four neighboring voxels at once, where no gradient is asked for.
    """

    def _conv_forward(self, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if _is_too_thin_for_bfloat16(features):
            with spatial.without_autocast(features.device):
                single = None if bias is None else bias.float()
                return super()._conv_forward(features.float(), weight.float(), single).bfloat16()
        if (self.kernel_size, self.stride, self.padding, self.dilation, self.groups) != _SAME_OF_THREE:
            return super()._conv_forward(features, weight, bias)
        if _is_given_to_slow_kernel(features):
            return _convolved_in_halves(features, weight, bias)
        voxels = _voxels_at_once(features, len(weight))
        if voxels > 1:
            return _convolved_at_once(features, weight, bias, voxels)
        return super()._conv_forward(features, weight, bias)


def _is_too_thin_for_bfloat16(features: torch.Tensor) -> bool:
    if features.device.type != "cpu" or torch.compiler.is_compiling() or min(features.shape[2:]) >= BFLOAT16_SIDE:
        return False
    given = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else features.dtype
    return given == torch.bfloat16


def _is_given_to_slow_kernel(features: torch.Tensor) -> bool:
    if features.device.type != "cpu" or features.ndim != 5 or features.shape[0] != 1:
        return False
    if features.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    _, channels, depth, height, _ = features.shape
    return channels * depth * height <= SLOW_CONVOLUTION_SIZE


def _convolved_in_halves(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    depth = features.shape[2]
    half = -(-depth // 2)
    padded = F.pad(features, (0, 0, 0, 0, 1, 1 + 2 * half - depth))
    halves = torch.cat([padded[:, :, : half + 2], padded[:, :, half:]])  # (2, C, half + 2, H, W)
    first, second = F.conv3d(halves, weight, bias, padding=(0, 1, 1)).chunk(2)
    return torch.cat([first, second], dim=2)[:, :, :depth]


def _voxels_at_once(features: torch.Tensor, channels: int) -> int:
    if features.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return 1
    if not features.is_contiguous(memory_format=torch.channels_last_3d):
        return 1
    fitting = (n for n in (4, 2) if n * channels <= CHANNELS_AT_A_TIME and features.shape[-1] % n == 0)
    return next(fitting, 1)


def _convolved_at_once(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, voxels: int
) -> torch.Tensor:
    """Results of so many neighbors along the last axis as channels of one, in memory where they belong."""
    wide = torch.cat([F.pad(weight, (first, voxels - 1 - first)) for first in range(voxels)])
    wide = wide.contiguous(memory_format=torch.channels_last_3d)
    repeated = None if bias is None else bias.repeat(voxels)
    found = F.conv3d(features, wide, repeated, stride=(1, 1, voxels), padding=1).movedim(1, -1)
    batch, *sides = features.movedim(1, -1).shape[:-1]
    return found.reshape(batch, *sides, len(weight)).movedim(-1, 1)


def place(model: nn.Module, device: torch.device | str, channels_last: bool = True) -> nn.Module:
    """Move a network to a device, its weights in channels_last_3d or not.

    oneDNN's 3-D convolutions on the CPU ran 1.3 to 6 times faster so; benchmarks/train_step.py measures a GPU's.

    Args:
        model: Any network.
        device: Device's name: "cpu", "cuda" ...
        channels_last: Whether the weights take channels_last_3d; False keeps PyTorch's default layout.

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
        model: Any network.
        backend: Backend of ``torch.compile``.

    Returns:
        `model` itself.
    """
    for part in [model.encoder, *model.estimators] if hasattr(model, "estimators") else [model]:
        part.compile(backend=backend, dynamic=False)
    return model
