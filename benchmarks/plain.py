"""The registration network and its loss as PyTorch's documentation would have them: eager float32, nothing fused.

What the fast path is held against, in `tests/` and in `benchmarks/`. It takes a network of lumirlib for its weights and
options alone, and shares none of its computations: coordinates are normalized for each ``grid_sample``, local
correlation is five convolutions with a kernel of ones (in float64 if the images are).
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn


def warp(image: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
    """``image(p + displacement(p))``, trilinear, zero outside."""
    shape = displacement.shape[2:]
    axes = [torch.arange(side, dtype=image.dtype, device=image.device) for side in shape]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None] + displacement
    grid = torch.stack([2 * points[:, axis] / (shape[axis] - 1) - 1 for axis in (2, 1, 0)], dim=-1)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def integrate(velocity: torch.Tensor, steps: int) -> torch.Tensor:
    """Scaling and squaring."""
    field = velocity / 2**steps
    for _ in range(steps):
        field = field + warp(field, field)
    return field


def resize(image: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Trilinear, with aligned corners."""
    return F.interpolate(image, size=shape, mode="trilinear", align_corners=True)


def convolve(layer: nn.Conv3d, features: torch.Tensor) -> torch.Tensor:
    """The layer's convolution, weights in the default layout."""
    return F.conv3d(features, layer.weight.contiguous(), layer.bias, layer.stride, layer.padding)


def encoder_block(block: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """A plain block or one of LK."""
    if hasattr(block, "branches"):
        total = sum(F.instance_norm(convolve(branch[0], features)) for branch in block.branches)
        total = total + features if block.identity else total
    else:
        total = F.instance_norm(convolve(block.conv, features))
    return F.prelu(total, block.activation.weight)


def co_attention(layer: nn.Module, fixed: torch.Tensor, moving: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """CA, with the whole affinity matrix."""
    f, m = fixed.flatten(2).transpose(1, 2), moving.flatten(2).transpose(1, 2)
    affinity = layer.affinity(f) @ m.transpose(1, 2) / f.shape[-1] ** 0.5
    found = []
    for own, other, weights in ((f, m, affinity.softmax(2)), (m, f, affinity.softmax(1).transpose(1, 2))):
        attended = weights @ layer.value(other)
        gate = torch.sigmoid(layer.gate(torch.cat([own, attended], dim=-1)))
        found.append((own + layer.strength * gate * attended).transpose(1, 2).reshape(fixed.shape))
    return found[0], found[1]


def bilateral_filter(layer: nn.Module, field: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
    """BF, one neighbour after another, on a border that weighs nothing."""
    sigma, half = layer.log_sigma.exp(), layer.window // 2
    margin = [half] * 6
    wide_field, wide_guide = F.pad(field, margin), F.pad(guide, margin)
    inside = F.pad(torch.ones_like(guide), margin)
    total, weights = 0, 0
    for offset in itertools.product(range(layer.window), repeat=3):
        there = (..., *(slice(at, at + side) for at, side in zip(offset, guide.shape[2:], strict=True)))
        distance = sum(((at - half) / sigma[axis]) ** 2 for axis, at in enumerate(offset))
        distance = distance + ((wide_guide[there] - guide) / sigma[3]) ** 2
        weight = torch.exp(-distance / 2) * inside[there]
        total, weights = total + weight * wide_field[there], weights + weight
    return total / weights


def fields(
    model: nn.Module, fixed: torch.Tensor, moving: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Displacements and velocities of every level, finest first, with the weights of a RegistrationNetwork."""
    features = torch.cat([fixed, moving])
    for block in (model.encoder.block1, model.encoder.block2, model.encoder.block3):
        features = encoder_block(block, features)
    pyramid = [features]
    for shape in model.level_shapes(tuple(fixed.shape[2:]))[1:]:
        pyramid.append(resize(pyramid[-1], shape))
    displacements, velocities = [], []
    for level in reversed(range(len(pyramid))):
        f, m = pyramid[level].chunk(2)
        shape = tuple(f.shape[2:])
        if str(level) in model.co_attention:
            f, m = co_attention(model.co_attention[str(level)], f, m)
        coarser = None
        if displacements:
            ratio = [fine / coarse for fine, coarse in zip(shape, displacements[0].shape[2:], strict=True)]
            ratio = torch.tensor(ratio, dtype=f.dtype, device=f.device).view(1, 3, 1, 1, 1)
            coarser = resize(displacements[0], shape) * ratio
            m = warp(m, coarser)
        estimator = model.estimators[level]
        joint = torch.cat([f + m, f - m], dim=1)
        joint = F.relu(convolve(estimator.conv2, F.relu(convolve(estimator.conv1, joint))))
        velocity = convolve(estimator.conv3, joint)
        own = integrate(velocity, model.squarings)
        if coarser is not None:
            own = own + (coarser if model.cascade == "additive" else warp(coarser, own))
        displacements.insert(0, own)
        velocities.insert(0, velocity)
    if model.bilateral_filter is not None:
        displacements[0] = bilateral_filter(model.bilateral_filter, displacements[0], fixed)
    return displacements, velocities


def ncc_loss(warped: torch.Tensor, fixed: torch.Tensor, window: int) -> torch.Tensor:
    """One minus the mean squared local correlation, by five convolutions."""
    kernel = torch.ones(1, 1, window, window, window, dtype=fixed.dtype, device=fixed.device)

    def total(image: torch.Tensor) -> torch.Tensor:
        return F.conv3d(image, kernel, padding=window // 2)

    count, sum_w, sum_f = window**3, total(warped), total(fixed)
    covariance = total(warped * fixed) - sum_w * sum_f / count
    variance_w = total(warped * warped) - sum_w * sum_w / count
    variance_f = total(fixed * fixed) - sum_f * sum_f / count
    return 1 - (covariance * covariance / (variance_w * variance_f + 1e-5)).mean()


def smooth_and_halve(image: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Next level of the Gaussian pyramid: sigma 1, 5^3 voxels, as one convolution."""
    line = torch.exp(-((torch.arange(5, dtype=image.dtype, device=image.device) - 2) ** 2) / 2)
    line = line / line.sum()
    kernel = line.view(5, 1, 1) * line.view(1, 5, 1) * line.view(1, 1, 5)
    return resize(F.conv3d(image, kernel[None, None], padding=2), shape)


def loss(
    model: nn.Module, fixed: torch.Tensor, moving: torch.Tensor, smoothness_weight: float = 6.0, window: int = 9
) -> torch.Tensor:
    """The paper's loss with deep supervision, ``sum_l 2^-l (NCC_l + lambda1 smoothness_l)``."""
    displacements, velocities = fields(model, fixed, moving)
    total, levels = 0, [(fixed, moving)]
    for displacement in displacements[1:]:
        levels.append(tuple(smooth_and_halve(image, tuple(displacement.shape[2:])) for image in levels[-1]))
    for level, (displacement, velocity) in enumerate(zip(displacements, velocities, strict=True)):
        level_fixed, level_moving = levels[level]
        rough = sum(velocity.diff(dim=axis).square().mean() for axis in (2, 3, 4)) / 3
        similarity = ncc_loss(warp(level_moving, displacement), level_fixed, window)
        total = total + 2.0**-level * (similarity + smoothness_weight * rough)
    return total
