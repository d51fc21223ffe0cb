"""The losses' loops over voxels, each with its gradient in one sweep, compiled by numba, for the CPU.

Every function fills the planes from `first` to before `last`, so that threads may share a volume; what a plane gets
does not depend on where the parts begin. Rows are added up in loops that write to one place, which compile to vector
instructions.
"""

from __future__ import annotations

import numpy as np

from lumirlib._numba import compiled, copy

#: Added to the product of the variances, so that constant regions give zero and not NaN.
NCC_EPSILON = 1e-5
# a division by zero is inf or NaN, as PyTorch's, and no error to look for
_OPTIONS = {"nogil": True, "error_model": "numpy"}


@compiled(**_OPTIONS)
def _row(planes, i, end, j, instead):  # pragma: no cover (compiled)
    return planes[i, j] if i < end else instead


@compiled(**_OPTIONS)
def _total(row):  # pragma: no cover (compiled)
    total = 0.0
    for k in range(row.size):
        total += row[k]
    return total


# window sums ---------------------------------------------------------------------------------------------------------
@compiled(**_OPTIONS)
def _add(total, a, b, c):  # pragma: no cover (compiled)
    for k in range(total.size):
        total[k] += np.float64(a[k]) + np.float64(b[k]) + np.float64(c[k])


@compiled(**_OPTIONS)
def _add_products(total, a, b, c, d, e, f):  # pragma: no cover (compiled)
    """Add ``a d + b e + c f``."""
    for k in range(total.size):
        first = np.float64(a[k]) * np.float64(d[k])
        total[k] += first + np.float64(b[k]) * np.float64(e[k]) + np.float64(c[k]) * np.float64(f[k])


@compiled(**_OPTIONS)
def _double(total, first, second):  # pragma: no cover (compiled)
    for k in range(total.size):
        total[k] = first[k] + second[k]


@compiled(**_OPTIONS)
def _extend(total, row):  # pragma: no cover (compiled)
    for k in range(total.size):
        total[k] += row[k]


@compiled(**_OPTIONS)
def _window_sums(ring, y, window, doubled, total):  # pragma: no cover (compiled)
    """Sums over `window` rows, the last of them row y, and over `window` places from each one on.

    By doubling: sums of 2, 4, 8 ... neighbors are sums of two half as long, and the window is put together from those.
    Nothing is subtracted, as a running sum would, so that zeros add up to zero whatever was beside them.

    Args:
        ring: Ring buffer ``(levels, 2**(levels - 1) + 1, n)``; ``ring[level, y % (2**level + 1)]`` holds the sum of
            ``2**level`` rows up to row y. Row y itself is given, at level 0; the other levels are filled in here.
        y: Number of the row, from 0; before the first one all are zero.
        window: Side of the window, odd.
        doubled: Scratch array ``(levels, n)``.
        total: Array of the sums ``(n - window + 1,)``, filled.
    """
    levels = ring.shape[0]
    row = doubled[0]
    copy(ring[0, y % 2], row)
    reach = 1
    for level in range(1, levels):
        half, size = 1 << (level - 1), (1 << level) + 1
        lower = ring[level - 1, : half + 1]
        _double(ring[level, y % size], lower[y % (half + 1)], lower[(y + 1) % (half + 1)])
        if window >> level & 1:
            _extend(row, ring[level, (y - reach) % size])
            reach += 2 * half
    copy(row, total)
    count, reach = row.size, 1
    for level in range(1, levels):
        half = 1 << (level - 1)
        count -= half
        _double(doubled[level, :count], doubled[level - 1, :count], doubled[level - 1, half : half + count])
        if window >> level & 1:
            _extend(total, doubled[level, reach : reach + total.size])
            reach += 2 * half


# local normalized cross-correlation ----------------------------------------------------------------------------------
@compiled(**_OPTIONS)
def _from_means(products, first, second, count):  # pragma: no cover (compiled)
    """Make window sums of products those of the products of the deviations from the means."""
    for k in range(products.size):
        products[k] -= first[k] * second[k] / count


@compiled(**_OPTIONS)
def _not_negative(values):  # pragma: no cover (compiled)
    """Clamp; rounding may leave a constant window with a variance just below zero. NaN stays."""
    for k in range(values.size):
        values[k] = 0.0 if values[k] < 0 else values[k]


@compiled(**_OPTIONS)
def _slopes(slope, covariance, variance_w, variance_f):  # pragma: no cover (compiled)
    for k in range(slope.size):
        slope[k] = covariance[k] / (variance_w[k] * variance_f[k] + NCC_EPSILON)


@compiled(**_OPTIONS)
def _add_squared(total, slope, covariance):  # pragma: no cover (compiled)
    """Add squared correlations. Cauchy-Schwarz bounds them by one; rounding may not. NaN stays."""
    for k in range(total.size):
        squared = slope[k] * covariance[k]
        total[k] += 1.0 if squared > 1 else squared


@compiled(**_OPTIONS)
def _by_covariance(slope, covariance):  # pragma: no cover (compiled)
    """Make slopes the derivative of the squared correlation by the covariance, 0 where it was clamped."""
    for k in range(slope.size):
        slope[k] = 0.0 if slope[k] * covariance[k] > 1 else 2 * slope[k]


@compiled(**_OPTIONS)
def _by_variance(out, by_covariance, variance_f):  # pragma: no cover (compiled)
    """Twice the derivative by the variance of the first image."""
    for k in range(out.size):
        out[k] = -0.5 * by_covariance[k] * by_covariance[k] * variance_f[k]


@compiled(**_OPTIONS)
def _by_means(out, by_covariance, by_variance, sum_w, sum_f, count):  # pragma: no cover (compiled)
    for k in range(out.size):
        out[k] = (by_covariance[k] * sum_f[k] + by_variance[k] * sum_w[k]) / count


@compiled(**_OPTIONS)
def _gather(out, warped, fixed, by_covariance, by_variance, by_means, scale):  # pragma: no cover (compiled)
    for k in range(out.size):
        own = np.float64(fixed[k]) * by_covariance[k] + np.float64(warped[k]) * by_variance[k]
        out[k] = scale * (own - by_means[k])


@compiled(**_OPTIONS)
def ncc_planes(warped, fixed, window, scale, correlations, gradient, first, last):  # pragma: no cover (compiled)
    """Squared local correlation of two images, summed over each plane, and the gradient of the sum of all.

    With window sums S, ``n = window**3``, covariance c, variances v and u of both images and ``D = v u + 1e-5``, the
    gradient of ``sum c^2 / D`` with respect to the first image is
    ``fixed S(p) + warped S(q) - S((p S(fixed) + q S(warped)) / n)`` where ``p = 2 c / D`` and ``q = -2 c^2 u / D^2``.
    p, q and the third field are kept for as many planes as the window is wide, and no longer.

    Args:
        warped: Warped image ``(D, H, W)``, floats.
        fixed: Fixed image ``(D, H, W)``, floats.
        window: Side of the window in voxels, odd.
        scale: Factor of the gradient.
        correlations: Sums of each plane ``(D,)`` float64, filled.
        gradient: Gradient ``(D, H, W)``, filled; or of size 0, if none is wanted.
        first: Plane to begin with.
        last: Plane to end before.
    """
    depth, height, width = warped.shape
    radius, count = window // 2, float(window**3)
    padded = width + 2 * radius
    levels = 1
    while window >> levels:
        levels += 1
    wanted = gradient.size > 0
    zeros, zero_row = np.zeros(width, warped.dtype), np.zeros(width)
    slots = (1 << (levels - 1)) + 1
    moments, coefficients = np.empty((levels, slots, 5 * padded)), np.empty((levels, slots, 3 * padded))
    doubled = np.empty((levels, 5 * padded))
    sums = np.empty(5 * padded - window + 1)
    squared, slope = np.empty(width), np.empty(width)
    planes = np.empty((3, window, height, width) if wanted else (3, 0, 0, 0))
    reach = radius if wanted else 0
    for i in range(first - reach, last + reach):
        slot = i % window
        low, high = max(i - radius, 0), min(i + radius + 1, depth)
        if i < 0 or i >= depth:
            planes[:, slot] = 0
        else:
            squared[:] = 0
            moments[:] = 0
        for y in range(height + radius if 0 <= i < depth else 0):
            fresh = moments[0, y % 2]
            fresh[:] = 0
            for near in range(low, high if y < height else low, 3):
                a, d = warped[near, y], fixed[near, y]
                b, e = _row(warped, near + 1, high, y, zeros), _row(fixed, near + 1, high, y, zeros)
                c, f = _row(warped, near + 2, high, y, zeros), _row(fixed, near + 2, high, y, zeros)
                start = radius
                _add(fresh[start : start + width], a, b, c)
                start += padded
                _add(fresh[start : start + width], d, e, f)
                start += padded
                _add_products(fresh[start : start + width], a, b, c, a, b, c)
                start += padded
                _add_products(fresh[start : start + width], d, e, f, d, e, f)
                start += padded
                _add_products(fresh[start : start + width], a, b, c, d, e, f)
            _window_sums(moments, y, window, doubled, sums)
            j = y - radius
            if j < 0:
                continue
            w, f = sums[:width], sums[padded : padded + width]
            variance_w = sums[2 * padded : 2 * padded + width]
            variance_f = sums[3 * padded : 3 * padded + width]
            covariance = sums[4 * padded : 4 * padded + width]
            _from_means(variance_w, w, w, count)
            _from_means(variance_f, f, f, count)
            _from_means(covariance, w, f, count)
            _not_negative(variance_w)
            _not_negative(variance_f)
            _slopes(slope, covariance, variance_w, variance_f)
            _add_squared(squared, slope, covariance)
            if wanted:
                p, q = planes[0, slot, j], planes[1, slot, j]
                copy(slope, p)
                _by_covariance(p, covariance)
                _by_variance(q, p, variance_f)
                _by_means(planes[2, slot, j], p, q, w, f, count)
        if first <= i < last:
            correlations[i] = _total(squared)
        out = i - radius
        if not wanted or out < first:
            continue
        coefficients[:] = 0
        for y in range(height + radius):
            fresh = coefficients[0, y % 2]
            fresh[:] = 0
            for part in range(3 if y < height else 0):
                start = part * padded + radius
                for near in range(0, window, 3):
                    b = _row(planes[part], near + 1, window, y, zero_row)
                    c = _row(planes[part], near + 2, window, y, zero_row)
                    _add(fresh[start : start + width], planes[part, near, y], b, c)
            size = 3 * padded
            _window_sums(coefficients, y, window, doubled[:, :size], sums[: size - window + 1])
            j = y - radius
            if j >= 0:
                p, q = sums[:width], sums[padded : padded + width]
                m = sums[2 * padded : 2 * padded + width]
                _gather(gradient[out, j], warped[out, j], fixed[out, j], p, q, m, scale)


# smoothing and smoothness --------------------------------------------------------------------------------------------
@compiled(**_OPTIONS)
def _add_weighted(total, row, weight):  # pragma: no cover (compiled)
    for k in range(total.size):
        total[k] += weight * row[k]


@compiled(**_OPTIONS)
def convolve_planes(image, kernels, smooth, first, last):  # pragma: no cover (compiled)
    """Convolution with a symmetric kernel along each axis, zeros outside.

    Args:
        image: Image ``(D, H, W)``, floats.
        kernels: Kernels ``(3, n)`` of the same dtype, n odd: those along i, j and k.
        smooth: Result, like `image`, filled.
        first: Plane to begin with.
        last: Plane to end before.
    """
    depth, height, width = image.shape
    size, radius = kernels.shape[1], kernels.shape[1] // 2
    ring = np.zeros((size, width), image.dtype)
    row = np.zeros(width + 2 * radius, image.dtype)
    for i in range(first, last):
        for y in range(-radius, height + radius):
            fresh = ring[y % size]
            fresh[:] = 0
            if 0 <= y < height:
                for near in range(max(i - radius, 0), min(i + radius + 1, depth)):
                    _add_weighted(fresh, image[near, y], kernels[0, near - i + radius])
            j = y - radius
            if j < 0:
                continue
            row[radius : radius + width] = 0
            for tap in range(size):
                _add_weighted(row[radius : radius + width], ring[(j + tap - radius) % size], kernels[1, tap])
            smooth[i, j] = 0
            for tap in range(size):
                _add_weighted(smooth[i, j], row[tap : tap + width], kernels[2, tap])


@compiled(**_OPTIONS)
def _add_squared_difference(total, a, b):  # pragma: no cover (compiled)
    for k in range(total.size):
        total[k] += (np.float64(a[k]) - np.float64(b[k])) ** 2


@compiled(**_OPTIONS)
def _add_curvature(total, before, here, after, scale):  # pragma: no cover (compiled)
    for k in range(total.size):
        total[k] += scale * (2 * np.float64(here[k]) - np.float64(before[k]) - np.float64(after[k]))


@compiled(**_OPTIONS)
def squared_differences(field, squares, first, last):  # pragma: no cover (compiled)
    """Squared forward differences along each of the three axes, summed over each plane.

    Args:
        field: Field ``(D, H, W)``, floats.
        squares: Sums of each plane and axis ``(D, 3)`` float64, filled.
        first: Plane to begin with.
        last: Plane to end before.
    """
    depth, height, width = field.shape
    sums = np.empty((3, width))
    for i in range(first, last):
        sums[:] = 0
        for j in range(height):
            here = field[i, j]
            _add_squared_difference(sums[0], field[min(i + 1, depth - 1), j], here)
            _add_squared_difference(sums[1], field[i, min(j + 1, height - 1)], here)
            _add_squared_difference(sums[2, : width - 1], here[1:], here[:-1])
        for axis in range(3):
            squares[i, axis] = _total(sums[axis])


@compiled(**_OPTIONS)
def curvatures(field, scales, weighted, first, last):  # pragma: no cover (compiled)
    """Negative second differences along the three axes, weighted and added: half the gradient of squared differences.

    Args:
        field: Field ``(D, H, W)``, floats.
        scales: Weights of the axes ``(3,)`` float64.
        weighted: Result, like `field`, filled.
        first: Plane to begin with.
        last: Plane to end before.
    """
    depth, height, width = field.shape
    total = np.empty(width)
    for i in range(first, last):
        for j in range(height):
            here = field[i, j]
            total[:] = 0
            # outside lies what is at the border
            _add_curvature(total, field[max(i - 1, 0), j], here, field[min(i + 1, depth - 1), j], scales[0])
            _add_curvature(total, field[i, max(j - 1, 0)], here, field[i, min(j + 1, height - 1)], scales[1])
            _add_curvature(total[1:-1], here[:-2], here[1:-1], here[2:], scales[2])
            _add_curvature(total[:1], here[:1], here[:1], here[1:2], scales[2])
            _add_curvature(total[-1:], here[-2:-1], here[-1:], here[-1:], scales[2])
            copy(total, weighted[i, j])
