"""Trilinear values at points anywhere, compiled by numba, for the CPU."""

from __future__ import annotations

import numpy as np

from lumirlib._numba import compiled, in_threads, slabs


@compiled(nogil=True)
def _split(place, side):  # pragma: no cover (compiled)
    """The voxel before a coordinate along an axis, how far behind it the coordinate lies, and the step to the next."""
    if not place > 0:  # NaN too
        return 0, 0.0, 0
    if place >= side - 1:
        return side - 1, 0.0, 0
    low = int(place)
    return low, place - low, 1


@compiled(nogil=True)
def _trilinear(image, voxels, values, first, last):  # pragma: no cover (compiled)
    depth, height, width, channels = image.shape
    flat = image.reshape(-1)
    for n in range(first, last):
        i, r, next_i = _split(voxels[0, n], depth)
        j, s, next_j = _split(voxels[1, n], height)
        k, t, next_k = _split(voxels[2, n], width)
        by_i, by_j, by_k = next_i * height * width * channels, next_j * width * channels, next_k * channels
        at = ((i * height + j) * width + k) * channels
        for channel in range(channels):
            here = at + channel
            near = (1 - t) * flat[here] + t * flat[here + by_k]
            far = (1 - t) * flat[here + by_j] + t * flat[here + by_j + by_k]
            front = (1 - s) * near + s * far
            here += by_i
            near = (1 - t) * flat[here] + t * flat[here + by_k]
            far = (1 - t) * flat[here + by_j] + t * flat[here + by_j + by_k]
            values[channel, n] = (1 - r) * front + r * ((1 - s) * near + s * far)


def trilinear(image: np.ndarray, voxels: np.ndarray) -> np.ndarray:
    """Values ``(C, N)`` float64 of an image ``(D, H, W, C)`` at voxel coordinates ``(3, N)`` float64.

    Outside, those of the nearest border point.
    """
    values = np.empty((image.shape[3], voxels.shape[1]))
    for _ in in_threads(lambda part: _trilinear(image, voxels, values, *part), slabs(voxels.shape[1])):
        pass
    return values
