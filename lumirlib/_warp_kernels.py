"""Trilinear warping and scaling and squaring on the CPU, forward and backward, compiled by numba.

What :mod:`lumirlib.spatial` computes with ``grid_sample`` elsewhere. Volumes are interleaved here, ``(D, H, W, C)``,
which is torch's ``channels_last_3d``: the channels of a voxel and of its next neighbour lie together. Points are kept
as whole voxels and remainders, so that nothing is normalized. Work is split into slabs along the first axis, and a slab
adds to its own voxels only, in the order of the points that reach them: no result depends on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numba import njit
from torch.autograd.function import once_differentiable

from lumirlib import _numba
from lumirlib._numba import compiled

_OPTIONS = {"nogil": True, "cache": True, "fastmath": {"contract"}}


@njit(**_OPTIONS)
def _locate(displacement, i, j, k, shape):  # pragma: no cover (compiled)
    """Where voxel (i, j, k) moves to.

    Returns:
        0 for a point without a neighbour in the volume, or that is not finite, 1 for one at its border, 2 for one with
        eight neighbours; the lowest of these; the remainders towards the next ones.
    """
    u, v, w = displacement[i, j, k, 0], displacement[i, j, k, 1], displacement[i, j, k, 2]
    x, y, z = i + u, j + v, k + w
    if not (x > -1 and x < shape[0] and y > -1 and y < shape[1] and z > -1 and z < shape[2]):
        return 0, 0, 0, 0, u, u, u
    low_u, low_v, low_w = np.floor(u), np.floor(v), np.floor(w)
    a, b, c = i + int(low_u), j + int(low_v), k + int(low_w)
    whole = a >= 0 and a < shape[0] - 1 and b >= 0 and b < shape[1] - 1 and c >= 0 and c < shape[2] - 1
    return 2 if whole else 1, a, b, c, u - low_u, v - low_v, w - low_w


@njit(**_OPTIONS)
def _weight(corner, r, s, t, one):  # pragma: no cover (compiled)
    """Weight of a neighbour, numbered from 0 to 7 in C order."""
    weight = r if corner >> 2 else one - r
    weight *= s if (corner >> 1) & 1 else one - s
    return weight * (t if corner & 1 else one - t)


@njit(**_OPTIONS)
def _weights(r, s, t, one):  # pragma: no cover (compiled)
    """Those of all eight neighbours."""
    near_i, near_j, near_k = one - r, one - s, one - t
    return (
        near_i * near_j * near_k,
        near_i * near_j * t,
        near_i * s * near_k,
        near_i * s * t,
        r * near_j * near_k,
        r * near_j * t,
        r * s * near_k,
        r * s * t,
    )


@njit(**_OPTIONS)
def _place(corner, a, b, c, shape):  # pragma: no cover (compiled)
    """Index of a neighbour among all voxels, or -1 outside."""
    x, y, z = a + (corner >> 2), b + ((corner >> 1) & 1), c + (corner & 1)
    if x < 0 or x >= shape[0] or y < 0 or y >= shape[1] or z < 0 or z >= shape[2]:
        return -1
    return (x * shape[1] + y) * shape[2] + z


@njit(**_OPTIONS)
def _reach(displacement, low, high, first, last):  # pragma: no cover (compiled)
    """Lowest and highest plane that the points of each plane from `first` to `last` have a lowest neighbour in."""
    depth, height, width, _ = displacement.shape
    for i in range(first, last):
        least, most = depth, -2
        for j in range(height):
            for k in range(width):
                at = i + displacement[i, j, k, 0]
                if at > -1 and at < depth:
                    floor = i + int(np.floor(displacement[i, j, k, 0]))
                    least, most = min(least, floor), max(most, floor)
        low[i], high[i] = least, most


def _kernels(count):
    """Warping and its two gradients for images of `count` channels, of any number where it is 0.

    A number that the compiler knows makes loops over three channels twice as fast.
    """

    @njit(**_OPTIONS)
    def warp(image, displacement, warped, add, first, last):  # pragma: no cover (compiled)
        """Fill ``warped[first:last]`` with ``image(p + displacement(p))``, plus the displacement if `add`."""
        shape, channels = displacement.shape[:3], np.uint64(count or image.shape[3])
        values, out, own = image.reshape(-1), warped.reshape(-1), displacement.reshape(-1)
        zero, one = displacement.dtype.type(0), displacement.dtype.type(1)
        # offsets of neighbours; unsigned, which spares numba the question whether an index is negative
        by_j = np.uint64(shape[2]) * channels
        by_i = np.uint64(shape[1]) * by_j
        both = by_i + by_j
        for i in range(first, last):
            for j in range(shape[1]):
                for k in range(shape[2]):
                    kind, a, b, c, r, s, t = _locate(displacement, i, j, k, shape)
                    into = np.uint64((i * shape[1] + j) * shape[2] + k) * channels
                    if kind == 2:
                        at = np.uint64((a * shape[1] + b) * shape[2] + c) * channels
                        next_k = at + channels
                        w000, w001, w010, w011, w100, w101, w110, w111 = _weights(r, s, t, one)
                        for n in range(channels):
                            low, high = at + n, next_k + n
                            value = w000 * values[low] + w001 * values[high]
                            value += w010 * values[low + by_j] + w011 * values[high + by_j]
                            value += w100 * values[low + by_i] + w101 * values[high + by_i]
                            value += w110 * values[low + both] + w111 * values[high + both]
                            out[into + n] = value
                    else:
                        for n in range(channels):
                            out[into + n] = zero
                        if kind == 1:
                            for corner in range(8):
                                place = _place(corner, a, b, c, shape)
                                if place >= 0:
                                    weight, at = _weight(corner, r, s, t, one), np.uint64(place) * channels
                                    for n in range(channels):
                                        out[into + n] += weight * values[at + n]
                    if add:
                        for n in range(channels):
                            out[into + n] += own[into + n]

    @njit(**_OPTIONS)
    def scatter(displacement, gradient, image_gradient, low, high, first, last):  # pragma: no cover (compiled)
        """Add to ``image_gradient[first:last]`` what points give to its voxels: the gradient of warping in the image.

        Args:
            displacement: Displacement ``(D, H, W, 3)``.
            gradient: Gradient of the warped image ``(D, H, W, C)``.
            image_gradient: Gradient of the image ``(D, H, W, C)``.
            low: Lower bounds ``(D,)``, from :func:`_reach`.
            high: Upper bounds ``(D,)``, from :func:`_reach`.
            first: Plane to begin with.
            last: Plane to end before.
        """
        shape, channels = displacement.shape[:3], np.uint64(count or gradient.shape[3])
        given, into = gradient.reshape(-1), image_gradient.reshape(-1)
        one = displacement.dtype.type(1)
        by_j = np.uint64(shape[2]) * channels
        by_i = np.uint64(shape[1]) * by_j
        both = by_i + by_j
        for i in range(shape[0]):
            if high[i] + 1 < first or low[i] >= last:
                continue
            for j in range(shape[1]):
                for k in range(shape[2]):
                    kind, a, b, c, r, s, t = _locate(displacement, i, j, k, shape)
                    if kind == 0 or a + 1 < first or a >= last:
                        continue
                    source = np.uint64((i * shape[1] + j) * shape[2] + k) * channels
                    if kind == 2 and a >= first and a + 1 < last:
                        at = np.uint64((a * shape[1] + b) * shape[2] + c) * channels
                        next_k = at + channels
                        w000, w001, w010, w011, w100, w101, w110, w111 = _weights(r, s, t, one)
                        for n in range(channels):
                            value, below, above = given[source + n], at + n, next_k + n
                            into[below] += w000 * value
                            into[above] += w001 * value
                            into[below + by_j] += w010 * value
                            into[above + by_j] += w011 * value
                            into[below + by_i] += w100 * value
                            into[above + by_i] += w101 * value
                            into[below + both] += w110 * value
                            into[above + both] += w111 * value
                        continue
                    for corner in range(8):
                        place = _place(corner, a, b, c, shape)
                        if place >= 0 and first <= a + (corner >> 2) < last:
                            weight, at = _weight(corner, r, s, t, one), np.uint64(place) * channels
                            for n in range(channels):
                                into[at + n] += weight * given[source + n]

    @njit(**_OPTIONS)
    def slope(image, displacement, gradient, displacement_gradient, first, last):  # pragma: no cover (compiled)
        """Add to ``displacement_gradient[first:last]`` the gradient of warping in the displacement."""
        shape, channels = displacement.shape[:3], np.uint64(count or image.shape[3])
        values, given = image.reshape(-1), gradient.reshape(-1)
        zero, one = displacement.dtype.type(0), displacement.dtype.type(1)
        products = np.zeros(8, displacement.dtype)
        for i in range(first, last):
            for j in range(shape[1]):
                for k in range(shape[2]):
                    kind, a, b, c, r, s, t = _locate(displacement, i, j, k, shape)
                    if kind == 0:
                        continue
                    source = np.uint64((i * shape[1] + j) * shape[2] + k) * channels
                    for corner in range(8):
                        product = zero
                        place = _place(corner, a, b, c, shape)
                        if place >= 0:
                            at = np.uint64(place) * channels
                            for n in range(channels):
                                product += given[source + n] * values[at + n]
                        products[corner] = product
                    p000, p001, p010, p011, p100, p101, p110, p111 = products
                    along_i = (one - s) * ((one - t) * (p100 - p000) + t * (p101 - p001))
                    along_i += s * ((one - t) * (p110 - p010) + t * (p111 - p011))
                    along_j = (one - r) * ((one - t) * (p010 - p000) + t * (p011 - p001))
                    along_j += r * ((one - t) * (p110 - p100) + t * (p111 - p101))
                    along_k = (one - r) * ((one - s) * (p001 - p000) + s * (p011 - p010))
                    along_k += r * ((one - s) * (p101 - p100) + s * (p111 - p110))
                    displacement_gradient[i, j, k, 0] += along_i
                    displacement_gradient[i, j, k, 1] += along_j
                    displacement_gradient[i, j, k, 2] += along_k

    return warp, scatter, slope


_ANY, _THREE = _kernels(0), _kernels(3)


def _interleaved(tensor: torch.Tensor) -> np.ndarray:
    """``(B, C, D, H, W)`` as a contiguous array ``(B, D, H, W, C)``; no copy of what is in channels_last_3d."""
    return tensor.detach().movedim(1, -1).contiguous().numpy()


def _tensor(array: np.ndarray) -> torch.Tensor:
    """The tensor ``(B, C, D, H, W)`` of an array ``(B, D, H, W, C)``, in channels_last_3d."""
    return torch.from_numpy(array).movedim(-1, 1)


def _in_slabs(work: Callable[..., None], *arrays: np.ndarray | None, then: tuple = ()) -> None:
    """Call ``work(*arrays of a batch entry, *then, first, last)`` for every entry and slab, in threads."""
    batch, depth = arrays[0].shape[:2]
    tasks = [
        ([array if array is None else array[entry] for array in arrays], part)
        for entry in range(batch)
        for part in _numba.slabs(depth)
    ]
    for _ in _numba.in_threads(lambda task: work(*task[0], *then, *task[1]), tasks):
        pass


def _kernels_for(image: np.ndarray) -> tuple:
    return _THREE if image.shape[-1] == 3 else _ANY


def _warped(image: np.ndarray, displacement: np.ndarray, add: bool = False) -> np.ndarray:
    """:func:`warp` of arrays, plus the displacement if `add`."""
    warped = np.empty_like(image)
    _in_slabs(_kernels_for(image)[0], image, displacement, warped, then=(add,))
    return warped


def _add_gradients(
    image: np.ndarray | None,
    displacement: np.ndarray,
    gradient: np.ndarray,
    image_gradient: np.ndarray | None,
    displacement_gradient: np.ndarray | None,
) -> None:
    """Add the gradients of a warped image to those of the image and of the displacement, each unless it is None."""
    _, scatter, slope = _kernels_for(gradient)
    if image_gradient is not None:
        low, high = (np.empty(displacement.shape[:2], np.int64) for _ in range(2))
        _in_slabs(_reach, displacement, low, high)
        _in_slabs(scatter, displacement, gradient, image_gradient, low, high)
    if displacement_gradient is not None:
        _in_slabs(slope, image, displacement, gradient, displacement_gradient)


class _Warp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, displacement):
        # the gradient in the image does not depend on the image
        ctx.save_for_backward(image if ctx.needs_input_grad[1] else None, displacement)
        return _tensor(_warped(_interleaved(image), _interleaved(displacement)))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        image, displacement = ctx.saved_tensors
        gradient, displacement = _interleaved(gradient), _interleaved(displacement)
        image_gradient = np.zeros_like(gradient) if ctx.needs_input_grad[0] else None
        displacement_gradient = np.zeros_like(displacement) if ctx.needs_input_grad[1] else None
        image = None if image is None else _interleaved(image)
        _add_gradients(image, displacement, gradient, image_gradient, displacement_gradient)
        return tuple(None if one is None else _tensor(one) for one in (image_gradient, displacement_gradient))


def warp(image: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
    """``image(p + displacement(p))``, trilinear, zero outside and where a displacement is not finite.

    Args:
        image: Image ``(B, C, D, H, W)``, float32 or float64, on the CPU.
        displacement: Displacement ``(B, 3, D, H, W)`` in voxels, of the same dtype.

    Returns:
        ``(B, C, D, H, W)`` in channels_last_3d.
    """
    return _Warp.apply(image, displacement)


class _Integrate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, velocity, steps):
        fields = [_interleaved(velocity / 2**steps)]
        for _ in range(steps):
            squared = _warped(fields[-1], fields[-1], add=True)
            if ctx.needs_input_grad[0]:
                fields.append(squared)
            else:
                fields[0] = squared
        ctx.save_for_backward(*(torch.from_numpy(field) for field in fields[:-1]))
        return _tensor(fields[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        total = _interleaved(gradient)
        for field in reversed(ctx.saved_tensors):
            # of w(p) + w(p + w(p)): what is added, the field that is read, and the places where it is read
            gradient, total, field = total, total.copy(), field.numpy()
            _add_gradients(field, field, gradient, total, total)
        return _tensor(total) / 2 ** len(ctx.saved_tensors), None


def integrate(velocity: torch.Tensor, steps: int) -> torch.Tensor:
    """Scaling and squaring, which keeps for the backward pass the field before each squaring and nothing else.

    Args:
        velocity: Velocity ``(B, 3, D, H, W)`` in voxels, float32 or float64, on the CPU.
        steps: Number of squarings.

    Returns:
        ``(B, 3, D, H, W)`` in voxels, in channels_last_3d.
    """
    return _Integrate.apply(velocity, steps)


@compiled(nogil=True)
def warp_nearest(volumes, displacement, warped, first, last):  # pragma: no cover (compiled)
    """Fill ``warped[:, first:last]`` with the voxels of `volumes` nearest to ``p + displacement(p)``, 0 outside.

    Args:
        volumes: Volumes ``(C, D, H, W)``, any dtype.
        displacement: Displacement ``(3, D, H, W)``, floats in voxels; added to p in float64.
        warped: Result, like `volumes`.
        first: Slice along the first axis to begin with.
        last: Slice to end before.
    """
    channels, depth, height, width = volumes.shape
    for i in range(first, last):
        for j in range(height):
            for k in range(width):
                a = i + np.float64(displacement[0, i, j, k])
                b = j + np.float64(displacement[1, i, j, k])
                c = k + np.float64(displacement[2, i, j, k])
                # false for NaN too
                if a >= 0 and a <= depth - 1 and b >= 0 and b <= height - 1 and c >= 0 and c <= width - 1:
                    at_i, at_j, at_k = int(a + 0.5), int(b + 0.5), int(c + 0.5)
                    for channel in range(channels):
                        warped[channel, i, j, k] = volumes[channel, at_i, at_j, at_k]
                else:
                    for channel in range(channels):
                        warped[channel, i, j, k] = 0
