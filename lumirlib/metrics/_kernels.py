"""The metrics' loops over voxels, compiled by numba."""

from __future__ import annotations

import numpy as np

from lumirlib._numba import compiled


@compiled(nogil=True)
def histogram(values, size):  # pragma: no cover (compiled)
    """How often each number below `size` occurs in a flat array of numbers from 0; larger ones are not counted."""
    counts = np.zeros(size, np.int64)
    for position in range(values.size):
        value = values[position]
        if value < size:
            counts[value] += 1
    return counts


@compiled(nogil=True)
def agreement(first, second, size):  # pragma: no cover (compiled)
    """How often each number below `size` occurs at the same place of two flat arrays of numbers from 0."""
    counts = np.zeros(size, np.int64)
    for position in range(first.size):
        value = first[position]
        if value < size and second[position] == value:
            counts[value] += 1
    return counts


@compiled(nogil=True)
def _corners(padded, i, j, k, around):  # pragma: no cover (compiled)
    """Write the eight voxels that share a corner to `around`, in C order; whether they differ."""
    mixed = False
    for position in range(8):
        around[position] = padded[i + (position >> 2), j + ((position >> 1) & 1), k + (position & 1)]
        mixed |= around[position] != around[0]
    return mixed


@compiled(nogil=True)
def _is_new(around, position):  # pragma: no cover (compiled)
    """Whether the label at `position` is one to score that none of the corners before it carries."""
    if around[position] < 0:
        return False
    for before in range(position):  # noqa: SIM110
        if around[before] == around[position]:
            return False
    return True


@compiled(nogil=True)
def surface_elements(padded, count):  # pragma: no cover (compiled)
    """Surface elements of all labels of a volume, grouped by label, within a label in C order.

    Args:
        padded: Index of each voxel's label ``(D + 2, H + 2, W + 2)``, from 0, or below 0 for what is not scored; one
            voxel around the volume is below 0.
        count: Number of labels.

    Returns:
        ``(count + 1,)`` where each label's elements begin, ``(n, 3)`` int32 corners in voxels and ``(n,)`` uint8
        neighborhood codes, the first corner in C order being the highest bit.
    """
    depth, height, width = padded.shape[0] - 1, padded.shape[1] - 1, padded.shape[2] - 1
    around = np.empty(8, padded.dtype)
    starts = np.zeros(count + 1, np.int64)
    for i in range(depth):
        for j in range(height):
            for k in range(width):
                if _corners(padded, i, j, k, around):
                    for position in range(8):
                        if _is_new(around, position):
                            starts[around[position] + 1] += 1
    starts = np.cumsum(starts)
    filled = starts[:-1].copy()
    places = np.empty((starts[-1], 3), np.int32)
    codes = np.empty(starts[-1], np.uint8)
    for i in range(depth):
        for j in range(height):
            for k in range(width):
                if not _corners(padded, i, j, k, around):
                    continue
                for position in range(8):
                    if not _is_new(around, position):
                        continue
                    label = around[position]
                    code = 0
                    for other in range(8):
                        code = 2 * code + (around[other] == label)
                    at = filled[label]
                    places[at, 0], places[at, 1], places[at, 2] = i, j, k
                    codes[at] = code
                    filled[label] = at + 1
    return starts, places, codes


@compiled(nogil=True)
def nearest_squared(points, surface, offsets, squares):  # pragma: no cover (compiled)
    """Squared distance of each point to the nearest of a surface, or -1 where none lies within the offsets.

    Args:
        points: Places ``(n, 3)`` int32 in voxels.
        surface: Places of the surface ``(m, 3)`` int32, m from 1.
        offsets: Steps to try ``(r, 3)`` int32, in ascending order of their length.
        squares: Squared lengths of the steps ``(r,)`` int32.

    Returns:
        ``(n,)`` int32.
    """
    low = np.empty(3, np.int64)
    sides = np.empty(3, np.int64)
    for axis in range(3):
        low[axis] = surface[:, axis].min()
        sides[axis] = surface[:, axis].max() - low[axis] + 1
    occupied = np.zeros((sides[0], sides[1], sides[2]), np.bool_)
    for place in range(len(surface)):
        occupied[surface[place, 0] - low[0], surface[place, 1] - low[1], surface[place, 2] - low[2]] = True
    found = np.empty(len(points), np.int32)
    for point in range(len(points)):
        a, b, c = points[point, 0] - low[0], points[point, 1] - low[1], points[point, 2] - low[2]
        found[point] = -1
        for step in range(len(offsets)):
            i, j, k = a + offsets[step, 0], b + offsets[step, 1], c + offsets[step, 2]
            inside = i >= 0 and j >= 0 and k >= 0 and i < sides[0] and j < sides[1] and k < sides[2]
            if inside and occupied[i, j, k]:
                found[point] = squares[step]
                break
    return found


@compiled(nogil=True)
def _dot_cross(a, b, c):  # pragma: no cover (compiled)
    """Determinant of the matrix with the columns a, b, c."""
    return a[0] * (b[1] * c[2] - b[2] * c[1]) + a[1] * (b[2] * c[0] - b[0] * c[2]) + a[2] * (b[0] * c[1] - b[1] * c[0])


@compiled(nogil=True)
def _edge(displacement, i, j, k, by_i, by_j, by_k):  # pragma: no cover (compiled)
    """``T(p + by) - T(p)`` of the transformation ``T(p) = p + displacement(p)``, in float64."""
    at = (i + by_i, j + by_j, k + by_k)
    return (
        by_i + (np.float64(displacement[0, at[0], at[1], at[2]]) - np.float64(displacement[0, i, j, k])),
        by_j + (np.float64(displacement[1, at[0], at[1], at[2]]) - np.float64(displacement[1, i, j, k])),
        by_k + (np.float64(displacement[2, at[0], at[1], at[2]]) - np.float64(displacement[2, i, j, k])),
    )


@compiled(nogil=True)
def _folding(displacement, i, j, k):  # pragma: no cover (compiled)
    """Twelve times the non-diffeomorphic volume of a voxel: its negative determinants; NaN if one is not a number."""
    total = 0.0
    # negative edges for backward differences: each of them changes the determinant's sign
    for along_i in (1, -1):
        a = _edge(displacement, i, j, k, along_i, 0, 0)
        for along_j in (1, -1):
            b = _edge(displacement, i, j, k, 0, along_j, 0)
            for along_k in (1, -1):
                c = _edge(displacement, i, j, k, 0, 0, along_k)
                determinant = along_i * along_j * along_k * _dot_cross(a, b, c)
                total += 0.0 if determinant >= 0 else -determinant
    a = _edge(displacement, i, j, k, -1, -1, 0)
    b = _edge(displacement, i, j, k, -1, 0, -1)
    c = _edge(displacement, i, j, k, 0, -1, -1)
    determinant = _dot_cross(a, b, c)
    total += 0.0 if determinant >= 0 else -determinant
    a = _edge(displacement, i, j, k, 1, 1, 0)
    b = _edge(displacement, i, j, k, 0, 1, 1)
    c = _edge(displacement, i, j, k, 1, 0, 1)
    determinant = _dot_cross(a, b, c)
    total += 0.0 if determinant >= 0 else -determinant
    return total


@compiled(nogil=True)
def folded_volume(displacement, mask, volumes, counts, first, last):  # pragma: no cover (compiled)
    """Non-diffeomorphic volume and voxels of the mask in each slice along the first axis; the border is left out.

    Args:
        displacement: Displacement ``(3, D, H, W)``, floats in voxels.
        mask: Mask ``(D, H, W)`` bool.
        volumes: Array ``(D,)`` float64 that the volumes are written to.
        counts: Array ``(D,)`` int64 that the numbers of voxels are written to.
        first: Slice to begin with, from 1.
        last: Slice to end before, at most D - 1.
    """
    height, width = mask.shape[1:]
    for i in range(first, last):
        total, count = 0.0, 0
        for j in range(1, height - 1):
            for k in range(1, width - 1):
                if mask[i, j, k]:
                    count += 1
                    total += _folding(displacement, i, j, k)
        volumes[i] = 0.5 * total / 6
        counts[i] = count


@compiled(nogil=True)
def folded_voxels(displacement, mask, folded, first, last):  # pragma: no cover (compiled)
    """Which voxels of the mask have a negative determinant, or one that is not a number; the border is left out.

    Args:
        displacement: Displacement ``(3, D, H, W)``, floats in voxels.
        mask: Mask ``(D, H, W)`` bool.
        folded: Array ``(D, H, W)`` bool that is filled, but for its border.
        first: Slice to begin with, from 1.
        last: Slice to end before, at most D - 1.
    """
    height, width = mask.shape[1:]
    for i in range(first, last):
        for j in range(1, height - 1):
            for k in range(1, width - 1):
                folded[i, j, k] = mask[i, j, k] and _folding(displacement, i, j, k) != 0
