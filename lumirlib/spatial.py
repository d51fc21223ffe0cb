"""Grids, warps and displacement fields: the one place where the conventions live.

Conventions, used by every module of lumirlib:

* An image is ``(B, C, D, H, W)``. D, H, W are the array axes i, j, k of the NIfTI file
  (160, 224, 192 for LUMIR).
* A displacement ``u`` is ``(B, 3, D, H, W)``, float32, in **voxels**; channel 0 moves along i,
  channel 1 along j, channel 2 along k. It lives on the fixed grid and points into the moving
  image: ``warped(p) = moving(p + u(p))``. The identity is zero.
* Sampling is trilinear between voxel centres (``align_corners=True``) and zero outside the image.
* Composition of an inner displacement ``w`` after an outer one ``U``:
  ``(U o w)(p) = w(p) + U(p + w(p))``.
* Normalized coordinates, as ``torch.nn.functional.grid_sample`` wants them, run from -1 at the
  centre of the first voxel to +1 at the centre of the last one, in the order k, j, i.

This module is the only caller of ``grid_sample``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lumirlib import _numba, _warp_kernels
from lumirlib._checks import check_choice, check_displacement, check_image, check_same_grid

WARP_MODES = ("bilinear", "nearest")


@lru_cache(maxsize=16)
def _cached_identity(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    with torch.inference_mode(False):  # what is kept must serve a later training too
        axes = [torch.arange(side, device=device, dtype=dtype) for side in shape]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


@lru_cache(maxsize=16)
def _cached_normalized_identity(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The identity grid in normalized coordinates, ``(1, 3, D, H, W)``, channel 0 along k."""
    with torch.inference_mode(False):
        points = voxel_to_normalized(_cached_identity(shape, device, dtype).movedim(1, -1), shape)
        return points.movedim(-1, 1).contiguous()


@lru_cache(maxsize=64)
def _per_axis(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """One number per axis as ``(1, 3, 1, 1, 1)``; kept, as a GPU waits for each new tensor of numbers."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=dtype).view(1, 3, 1, 1, 1)


def _normalized_per_voxel(displacement: torch.Tensor) -> torch.Tensor:
    """How far a voxel reaches in normalized coordinates along k, j, i; ``(1, 3, 1, 1, 1)``."""
    scales = tuple(2.0 / (side - 1) for side in reversed(displacement.shape[2:]))
    return _per_axis(scales, displacement.device, displacement.dtype)


def _memory_format(image: torch.Tensor) -> torch.memory_format:
    """channels_last_3d for a tensor that is in it and no other."""
    interleaved = image.is_contiguous(memory_format=torch.channels_last_3d) and not image.is_contiguous()
    return torch.channels_last_3d if interleaved else torch.contiguous_format


def _is_for_numba(tensor: torch.Tensor) -> bool:
    """Whether :mod:`lumirlib._warp_kernels` computes it, and not ``grid_sample``: on the CPU, unless it is traced."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def without_autocast(device: torch.device) -> AbstractContextManager:
    """No autocast to what must not touch coordinates: bfloat16 resolves whole voxels only beyond 128."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def identity_grid(
    shape: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Voxel coordinates of every voxel centre.

    Args:
        shape: Three sides (D, H, W) in voxels.
        device: Device that the grid is made on.
        dtype: Floating-point dtype.

    Returns:
        ``(1, 3, D, H, W)`` in voxels, channel 0 along i; a fresh tensor.

    Raises:
        ValueError: `shape` does not have three sides of at least 2 voxels.
    """
    shape = tuple(int(side) for side in shape)
    if len(shape) != 3 or min(shape) < 2:
        raise ValueError(f"shape must be three sides of at least 2 voxels, got {shape}")
    return _cached_identity(shape, torch.device(device), dtype).clone()


def voxel_to_normalized(points: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Convert voxel coordinates (last axis i, j, k) to normalized ones (last axis k, j, i).

    Args:
        points: Points ``(..., 3)`` in voxels.
        shape: Sides (D, H, W) of the image that the points lie in.

    Returns:
        ``(..., 3)``, -1 at the first and +1 at the last voxel centre, axes reversed.
    """
    sides = torch.tensor([side - 1 for side in shape], dtype=points.dtype, device=points.device)
    return (points * (2.0 / sides) - 1.0).flip(-1)


def sample(image: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Trilinear values of an image at arbitrary voxel coordinates, zero outside.

    Args:
        image: Image ``(B, C, D, H, W)``, floating point. float16 and bfloat16 images are interpolated in float32.
        points: Points ``(B, 3, d, h, w)`` in voxels of `image`, channel 0 along i.

    Returns:
        ``(B, C, d, h, w)`` in the dtype of `image`.
    """
    working = torch.promote_types(image.dtype, torch.float32)
    with without_autocast(image.device):
        grid = voxel_to_normalized(points.to(working).movedim(1, -1), image.shape[2:])  # (B, d, h, w, 3)
        return F.grid_sample(image.to(working), grid, mode="bilinear", padding_mode="zeros", align_corners=True).to(
            image.dtype
        )


def sample_nearest(image: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Values of `image` (B, C, D, H, W) at the voxel nearest to each point (B, 3, d, h, w).

    The rule is SciPy's ``map_coordinates(order=0, mode="constant")``: index ``floor(p + 0.5)``, and zero for
    any point outside ``[0, side - 1]`` or not finite. ``grid_sample`` rounds ties to even and loses them in the
    normalization, so the voxels are gathered directly.
    """
    inside = torch.ones_like(points[:, 0], dtype=torch.bool)
    index = torch.zeros_like(points[:, 0], dtype=torch.int64)
    for axis, side in enumerate(image.shape[2:]):
        along = points[:, axis]
        within = (along >= 0) & (along <= side - 1)  # false for NaN too
        inside &= within
        index = index * side + torch.where(within, (along + 0.5).floor(), 0).to(torch.int64)
    channels = image.shape[1]
    flat = image.reshape(*image.shape[:2], -1)  # (B, C, D*H*W)
    taken = flat.gather(2, index.flatten(1)[:, None].expand(-1, channels, -1))
    taken = taken.reshape(image.shape[0], channels, *points.shape[2:])
    return torch.where(inside[:, None], taken, taken.new_zeros(()))


def warp(image: torch.Tensor, displacement: torch.Tensor, mode: str = "bilinear") -> torch.Tensor:
    """Warp a moving image by a displacement: ``warped(p) = image(p + displacement(p))``.

    Args:
        image: Moving image ``(B, C, D, H, W)``; any dtype for "nearest", floating point for "bilinear".
        displacement: Displacement ``(B, 3, D, H, W)`` in voxels, on the fixed grid.
        mode: Interpolation: "bilinear" (trilinear in 3-D, zero outside, for images) or "nearest" (for labels, as
            SciPy's ``map_coordinates(order=0)`` does it).

    Returns:
        The warped image, shape and dtype of `image`.

    Raises:
        ValueError: shapes that do not fit, or an unknown mode.
        TypeError: an image of integers with mode "bilinear".
    """
    check_choice(mode, WARP_MODES, "mode")
    check_displacement(displacement)
    if mode == "bilinear":
        check_image(image)
    elif not isinstance(image, torch.Tensor) or image.ndim != 5:
        got = tuple(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
        raise ValueError(f"image must be (B, C, D, H, W), got {got}")
    check_same_grid(image, displacement, "image", "displacement")
    if mode == "nearest":
        return _warp_nearest(image, displacement)
    working = torch.promote_types(image.dtype, torch.float32)
    with without_autocast(image.device):
        if _is_for_numba(image):
            warped = _warp_kernels.warp(image.to(working), displacement.to(working))
        else:
            warped = warp_by_grid_sample(image, displacement.to(working))
        return warped.to(dtype=image.dtype, memory_format=_memory_format(image))


def _warp_nearest(image: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
    """What :func:`warp` does with mode "nearest". Points are added in float64, as SciPy's users do: ties are kept."""
    if image.device.type != "cpu":
        points = _cached_identity(tuple(displacement.shape[2:]), displacement.device, torch.float64) + displacement
        return sample_nearest(image, points)
    if displacement.dtype not in (torch.float32, torch.float64):
        displacement = displacement.float()  # exact; NumPy lacks bfloat16
    image, displacement = image.detach().contiguous(), displacement.detach().contiguous()
    warped = torch.empty_like(image)
    for one, by, into in zip(image.numpy(), displacement.numpy(), warped.numpy(), strict=True):
        parts = _numba.slabs(image.shape[2])
        list(_numba.in_threads(lambda part: _warp_kernels.warp_nearest(one, by, into, *part), parts))  # noqa: B023
    return warped


def warp_by_grid_sample(image: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
    """What :func:`warp` computes on GPUs, in the displacement's dtype; arguments and result are as there."""
    return _WarpByGridSample.apply(image, displacement)


class _WarpByGridSample(torch.autograd.Function):
    """Keeps the image in its own dtype and the displacement for the backward pass."""

    @staticmethod
    def _grid(displacement):
        identity = _cached_normalized_identity(tuple(displacement.shape[2:]), displacement.device, displacement.dtype)
        return torch.addcmul(identity, displacement.flip(1), _normalized_per_voxel(displacement)).movedim(1, -1)

    @staticmethod
    def forward(ctx, image, displacement):
        ctx.save_for_backward(image, displacement)
        grid = _WarpByGridSample._grid(displacement)
        return F.grid_sample(image.to(displacement.dtype), grid, padding_mode="zeros", align_corners=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        image, displacement = ctx.saved_tensors
        by_image, by_grid = torch.ops.aten.grid_sampler_3d_backward(
            gradient,
            image.to(displacement.dtype),
            _WarpByGridSample._grid(displacement),
            0,
            0,
            True,
            ctx.needs_input_grad[:2],
        )
        if by_image is not None:
            by_image = by_image.to(dtype=image.dtype, memory_format=_memory_format(image))
        if by_grid is not None:
            by_grid = (by_grid.movedim(-1, 1) * _normalized_per_voxel(displacement)).flip(1)
        return by_image, by_grid


class _IntegrateNormalized(torch.autograd.Function):
    """Squarings by ``grid_sample`` of a field in normalized coordinates along k, j, i, so that none is converted.

    Keeps the field before each squaring for the backward pass.
    """

    @staticmethod
    def _grid(field):
        return (_cached_normalized_identity(tuple(field.shape[2:]), field.device, field.dtype) + field).movedim(1, -1)

    @staticmethod
    def forward(ctx, velocity, steps):
        fields = [velocity / 2**steps]
        for _ in range(steps):
            grid = _IntegrateNormalized._grid(fields[-1])
            squared = F.grid_sample(fields[-1], grid, padding_mode="zeros", align_corners=True).add_(fields[-1])
            if ctx.needs_input_grad[0]:
                fields.append(squared)
            else:
                fields[0] = squared
        ctx.save_for_backward(*fields[:-1])
        return fields[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        for field in reversed(ctx.saved_tensors):
            by_field, by_grid = torch.ops.aten.grid_sampler_3d_backward(
                gradient, field, _IntegrateNormalized._grid(field), 0, 0, True, (True, True)
            )
            gradient = by_field.add_(gradient).add_(by_grid.movedim(-1, 1))
        return gradient / 2 ** len(ctx.saved_tensors), None


def compose(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """Composition of two displacements, `inner` applied first: ``inner(p) + outer(p + inner(p))``.

    Args:
        outer: Displacement ``(B, 3, D, H, W)`` in voxels, applied last.
        inner: Displacement ``(B, 3, D, H, W)`` in voxels, on the same grid, applied first.

    Returns:
        ``(B, 3, D, H, W)`` in voxels.
    """
    check_displacement(outer, "outer")
    check_displacement(inner, "inner")
    return inner + warp(outer, inner)


@torch.no_grad()
def stays_inside(displacement: torch.Tensor) -> torch.Tensor:
    """Which voxels of ``(B, 3, D, H, W)`` a displacement leaves in the grid: ``(B, 1, D, H, W)``, bool."""
    check_displacement(displacement)
    shape = tuple(displacement.shape[2:])
    points = _cached_identity(shape, displacement.device, displacement.dtype) + displacement
    last = _per_axis(tuple(side - 1.0 for side in shape), displacement.device, displacement.dtype)
    return ((points >= 0) & (points <= last)).all(dim=1, keepdim=True)


def integrate(velocity: torch.Tensor, steps: int = 7) -> torch.Tensor:
    """Displacement of a stationary velocity field after unit time, by scaling and squaring.

    ``w <- velocity / 2**steps``, then `steps` times ``w <- w o w`` (Arsigny et al., MICCAI 2006). Always in
    float32 or better.

    Args:
        velocity: Velocity ``(B, 3, D, H, W)`` in voxels per unit time.
        steps: Number of squarings, 0 returns the velocity itself.

    Returns:
        ``(B, 3, D, H, W)`` in voxels.
    """
    check_displacement(velocity, "velocity")
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, got {steps}")
    velocity = velocity.to(torch.promote_types(velocity.dtype, torch.float32))
    if steps == 0:
        return velocity
    with without_autocast(velocity.device):
        if _is_for_numba(velocity):
            return _warp_kernels.integrate(velocity, steps).to(memory_format=_memory_format(velocity))
        return integrate_by_grid_sample(velocity, steps)


def integrate_by_grid_sample(velocity: torch.Tensor, steps: int) -> torch.Tensor:
    """What :func:`integrate` computes on GPUs; arguments and result are as there."""
    scale = _normalized_per_voxel(velocity)
    return _IntegrateNormalized.apply(velocity.flip(1) * scale, steps).div(scale).flip(1)


def invert(displacement: torch.Tensor, initial: torch.Tensor | None = None, iterations: int = 10) -> torch.Tensor:
    """Inverse of a displacement, by compositional corrections of a first guess.

    With ``r = u o v`` the residual of the guess v, each iteration replaces v by ``v o (-r)``; near the inverse the
    residual shrinks quadratically. ``compose(displacement, invert(displacement))`` tells how well it went.

    Args:
        displacement: Displacement ``(B, 3, D, H, W)`` in voxels.
        initial: First guess of the inverse, for an integrated velocity that of the negative velocity; ``-displacement``
            if None.
        iterations: Number of corrections.

    Returns:
        ``(B, 3, D, H, W)`` in voxels.
    """
    check_displacement(displacement)
    inverse = -displacement if initial is None else initial
    for _ in range(iterations):
        inverse = compose(inverse, -compose(displacement, inverse))
    return inverse


def resize(image: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Resample an image to another shape, trilinearly with aligned corner voxels; values keep their units.

    Args:
        image: Image ``(B, C, D, H, W)``, floating point.
        shape: New sides (D', H', W').

    Returns:
        ``(B, C, D', H', W')``.
    """
    check_image(image)
    return F.interpolate(image, size=tuple(shape), mode="trilinear", align_corners=True)


def resize_displacement(
    displacement: torch.Tensor, shape: Sequence[int], factors: Sequence[float] | None = None
) -> torch.Tensor:
    """Resample a displacement to another grid **and** convert its voxels into voxels of that grid.

    Args:
        displacement: Displacement ``(B, 3, D, H, W)`` in voxels of its own grid.
        shape: New sides (D', H', W').
        factors: New voxels per old voxel along i, j, k. None takes ``(side' - 1) / (side - 1)``, the exact factor
            for corner-aligned grids. Coarse-to-fine cascades in the literature multiply by 2 instead.

    Returns:
        ``(B, 3, D', H', W')`` in voxels of the new grid.
    """
    check_displacement(displacement)
    if factors is None:
        factors = [(new - 1) / (old - 1) for new, old in zip(shape, displacement.shape[2:], strict=True)]
    return resize(displacement, shape) * _per_axis(tuple(factors), displacement.device, displacement.dtype)


@torch.no_grad()
def to_finer_grid(displacement: torch.Tensor, factor: int) -> torch.Tensor:
    """A displacement found on block averages, on the voxels that were averaged.

    The centre of coarse voxel i is that of its block, fine coordinate ``factor * i + (factor - 1) / 2``. Between these
    centres the displacement is interpolated linearly; outside the outermost ones, by less than half a block, it is
    that of the border. Corners are not aligned, unlike in :func:`resize_displacement`. No gradient is kept.

    Args:
        displacement: Displacement ``(B, 3, D, H, W)`` in coarse voxels.
        factor: Fine voxels along the edge of a coarse one, from 1.

    Returns:
        ``(B, 3, factor D, factor H, factor W)`` in fine voxels; with a factor of 1 the displacement itself.

    Raises:
        ValueError: another shape, or a factor that is not a whole number from 1.
    """
    check_displacement(displacement)
    if factor < 1 or factor != int(factor):
        raise ValueError(f"factor must be a whole number from 1, got {factor}")
    if factor == 1:
        return displacement
    return F.interpolate(displacement, scale_factor=int(factor), mode="trilinear", align_corners=False).mul_(factor)


def majority_label(labels: torch.Tensor, factor: int) -> torch.Tensor:
    """The most frequent label of each block of factor^3 voxels; ties go to the smallest number.

    Args:
        labels: Labels ``(B, 1, D, H, W)``, integers, sides divisible by `factor`.
        factor: Side of a block in voxels.

    Returns:
        ``(B, 1, D/factor, H/factor, W/factor)``, same dtype.
    """
    if factor == 1:
        return labels
    batch, _, *sides = labels.shape
    if any(side % factor for side in sides):
        raise ValueError(f"sides {tuple(sides)} are not divisible by the factor {factor}")
    depth, height, width = (side // factor for side in sides)
    blocks = labels.reshape(batch, depth, factor, height, factor, width, factor)
    blocks = blocks.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, depth, height, width, factor**3)
    return blocks.mode(dim=-1).values[:, None]
