"""The parts of deedsBCV: MIND-SSC words, data costs, spanning tree, min-sum on it, sampling.

All arrays here are NumPy's: an image is ``(D, H, W)`` float32, a field ``(3, D, H, W)`` float32 in voxels of the image,
channel 0 along i. Control point a of an axis stands for the block of voxels ``[a g, (a + 1) g)``, g being the grid
spacing; a label is a displacement ``step * (a - radius, b - radius, c - radius)``, numbered ``(a n + b) n + c`` with
``n = 2 radius + 1``. Every result is the same for any number of threads. Method: Heinrich et al., "MRF-based deformable
registration and ventilation estimation of lung CT", IEEE TMI 2013; "Towards realtime multimodal fusion for
image-guided interventions using self-similarities", MICCAI 2013 (MIND-SSC).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import get_num_threads, prange, types
from numba.extending import intrinsic

from lumirlib._numba import compiled, copy

#: Levels of a MIND-SSC entry: 0 to 5 bits set.
ENTRY_BITS = 5
#: Smallest mean distance that entries are divided by; the original's 1e-6 for grey values up to 255, here up to 1.
NOISE_FLOOR = 1e-6 / 255**2
#: Tree depths with fewer nodes than this are not worth starting threads for.
_SERIAL_WIDTH = 16


@intrinsic
def _popcount(typing_context, word):
    def generate(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


# MIND-SSC ------------------------------------------------------------------------------------------------------------
@compiled(parallel=True)
def _patch_distances(image, shift, radius, out):
    """Squared differences of the image and itself moved by `shift`, summed over boxes cut off at the border."""
    depth, height, width = image.shape
    first_k, last_k = max(0, -shift[2]), min(width, width - shift[2])
    sums = np.empty_like(image)  # over the box's two last axes
    for plane in prange(depth):
        i = np.int64(plane)
        other_i = i + shift[0]
        rows = np.zeros((height, width), np.float32)
        padded = np.zeros(width + 2 * radius, np.float32)
        for j in range(height):
            other_j = j + shift[1]
            if not (0 <= other_i < depth and 0 <= other_j < height):
                continue
            here, there = image[i, j], image[other_i, other_j]
            for k in range(first_k, last_k):
                padded[radius + k] = (there[k + shift[2]] - here[k]) ** 2
            row = rows[j]
            for near in range(2 * radius + 1):
                for k in range(width):
                    row[k] += padded[k + near]
        for j in range(height):
            total = sums[i, j]
            total[:] = 0
            for near in range(max(j - radius, 0), min(j + radius + 1, height)):
                row = rows[near]
                for k in range(width):
                    total[k] += row[k]
    for plane in prange(depth):
        i = np.int64(plane)
        for j in range(height):
            total = out[i, j]
            total[:] = 0
            for near in range(max(i - radius, 0), min(i + radius + 1, depth)):
                row = sums[near, j]
                for k in range(width):
                    total[k] += row[k]


@compiled(parallel=True)
def _pack_entries(distances, sources, places, thresholds, floor, words):
    """Twelve distances per voxel to one word; `places` outside the image fall back on the voxel itself."""
    depth, height, width = words.shape
    entries = len(sources)
    for plane in prange(depth):
        i = np.int64(plane)
        found = np.empty((entries, width), np.float32)
        smallest, noise = np.empty(width, np.float32), np.empty(width, np.float32)
        bits = np.empty(width, np.uint64)
        for j in range(height):
            smallest[:] = np.inf
            noise[:] = 0
            for entry in range(entries):
                at_i, at_j, shift = i + places[entry, 0], j + places[entry, 1], places[entry, 2]
                taken, own = found[entry], distances[sources[entry], i, j]
                copy(own, taken)
                if 0 <= at_i < depth and 0 <= at_j < height:
                    moved = distances[sources[entry], at_i, at_j]
                    for k in range(max(0, -shift), min(width, width - shift)):
                        taken[k] = moved[k + shift]
                for k in range(width):
                    smallest[k] = taken[k] if taken[k] < smallest[k] else smallest[k]
                    noise[k] += taken[k]
            for k in range(width):
                mean = noise[k] / np.float32(entries) - smallest[k]
                noise[k] = mean if mean > floor else floor
            line = words[i, j]
            line[:] = 0
            for entry in range(entries):
                taken = found[entry]
                bits[:] = 0
                for threshold in thresholds:  # rising: the bits that are set are the lowest ones
                    for k in range(width):
                        below = taken[k] - smallest[k] < threshold * noise[k]
                        bits[k] = (bits[k] << np.uint64(1)) | np.uint64(below)
                for k in range(width):
                    line[k] = (line[k] << np.uint64(len(thresholds))) | bits[k]


def _context(step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Six shifts; for each of the twelve entries the shift's number, and where its patch lies."""
    shifts, sources, places = [], [], []
    unit = np.eye(3, dtype=np.int64) * step
    for first, second in ((0, 1), (0, 2), (1, 2)):
        # each shift joins two pairs of neighbours: of opposite signs, then of equal signs
        for shift, starts in (
            (unit[second] + unit[first], (-unit[first], -unit[second])),
            (unit[second] - unit[first], (unit[first], -unit[second])),
        ):
            sources += [len(shifts)] * 2
            places += starts
            shifts.append(shift)
    return np.array(shifts), np.array(sources), np.array(places)


def mind_ssc(image: np.ndarray, step: int) -> np.ndarray:
    """MIND-SSC descriptor of every voxel in 60 bits of one word; the popcount of an xor is the distance of two.

    Twelve entries, the pairs of the six neighbours at `step` that do not face each other: squared difference summed
    over a box of radius `step`, less the smallest of the twelve, over their mean, d. An entry's five bits count, from
    the lowest, how many of 1.5/6, 2.5/6, ..., 5.5/6 lie below exp(-d).

    Args:
        image: Image ``(D, H, W)`` float32 in [0, 1].
        step: Distance of the neighbours and radius of the box in voxels, 1 or more.

    Returns:
        ``(D, H, W)`` uint64.
    """
    shifts, sources, places = _context(step)
    distances = np.empty((len(shifts), *image.shape), np.float32)
    for shift, out in zip(shifts, distances, strict=True):
        _patch_distances(image, shift, step, out)
    thresholds = -np.log((np.arange(ENTRY_BITS, 0, -1) + 0.5) / (ENTRY_BITS + 1)).astype(np.float32)
    words = np.empty(image.shape, np.uint64)
    _pack_entries(distances, sources, places, thresholds, np.float32(NOISE_FLOOR), words)
    return words


# data costs ----------------------------------------------------------------------------------------------------------
@compiled(parallel=True)
def _count_bits(fixed, padded, spacing, radius, step, places, offsets, scale, costs):
    control_i, control_j, control_k, _ = costs.shape
    labels = 2 * radius + 1
    rows, columns = padded.shape[1], padded.shape[2]
    flat = padded.reshape(-1)
    samples = len(offsets)  # offsets are unsigned: no index has to be checked for its sign
    for line in prange(control_i * control_j):
        a, b = np.int64(line) // control_j, np.int64(line) % control_j
        block = np.empty(samples, np.uint64)
        for c in range(control_k):
            for sample in range(samples):
                block[sample] = fixed[
                    a * spacing + places[sample, 0], b * spacing + places[sample, 1], c * spacing + places[sample, 2]
                ]
            found = costs[a, b, c]
            label = 0
            for i in range(labels):
                for j in range(labels):
                    start = ((a * spacing + i * step) * rows + b * spacing + j * step) * columns + c * spacing
                    for k in range(labels):
                        begin = np.uint64(start + k * step)
                        bits = np.uint64(0)
                        for sample in range(samples):
                            bits += _popcount(block[sample] ^ flat[begin + offsets[sample]])
                        found[label] = np.float32(bits) * scale
                        label += 1


def data_costs(fixed: np.ndarray, moving: np.ndarray, spacing: int, radius: int, step: int, alpha: float) -> np.ndarray:
    """Cost of every label at every control point: mean descriptor distance of its block times ``g / (2 alpha step)``.

    Of blocks wider than 4 voxels every second voxel along j and k is taken. Outside the moving image the border goes
    on.

    Args:
        fixed: Words of the fixed image, ``(D, H, W)`` uint64.
        moving: Words of the moving image warped so far, same shape.
        spacing: Spacing g of the control points in voxels.
        radius: Number of labels on each side of zero, along each axis.
        step: Step between labels in voxels.
        alpha: Weight of smoothness.

    Returns:
        ``(D // g, H // g, W // g, (2 radius + 1)^3)`` float32.
    """
    stride = 2 if spacing > 4 else 1
    inside = np.meshgrid(
        np.arange(spacing), np.arange(0, spacing, stride), np.arange(0, spacing, stride), indexing="ij"
    )
    places = np.stack(inside, axis=-1).reshape(-1, 3)
    padded = np.pad(moving, radius * step, mode="edge")
    offsets = (places[:, 0] * padded.shape[1] + places[:, 1]) * padded.shape[2] + places[:, 2]
    costs = np.empty((*control_shape(fixed.shape, spacing), (2 * radius + 1) ** 3), np.float32)
    scale = np.float32(spacing / (2 * alpha * step) / len(places))
    _count_bits(fixed, padded, spacing, radius, step, places, offsets.astype(np.uint64), scale, costs)
    return costs


# spanning tree -------------------------------------------------------------------------------------------------------
class Tree(NamedTuple):
    """A rooted tree. Nodes are control points, numbered as ``numpy.ravel`` does; positions are places in `order`.

    Attributes:
        order: Nodes ``(N,)``, breadth first from the root: the children of a node stand side by side.
        parents: Position ``(N,)`` of the parent of the node at each position, -1 for the root.
        children: Bounds ``(N + 1,)``: the children of position p are the positions from ``children[p]`` to ``children[p
            + 1] - 1``.
        depths: First position of each depth, and N.
        weights: Weight ``(N,)`` float32 of the edge from the node at each position to its parent, 1 for the root.
    """

    order: np.ndarray
    parents: np.ndarray
    children: np.ndarray
    depths: np.ndarray
    weights: np.ndarray


def control_shape(shape: tuple[int, ...], spacing: int) -> tuple[int, ...]:
    """How many whole blocks of `spacing` voxels fit along each axis."""
    return tuple(side // spacing for side in shape)


def grid_edges(image: np.ndarray, spacing: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges between neighbouring control points, and how alike the image is at both ends.

    The weight is ``exp(-c / (2 s))``: c is the mean absolute difference of the two blocks, voxel by voxel, s the
    standard deviation of the image.

    Args:
        image: Image ``(D, H, W)`` float32, not constant.
        spacing: Spacing of the control points in voxels.

    Returns:
        ``(E, 2)`` node numbers, and ``(E,)`` float32 in (0, 1].
    """
    shape = control_shape(image.shape, spacing)
    cropped = image[tuple(slice(0, side * spacing) for side in shape)]
    nodes = np.arange(np.prod(shape)).reshape(shape)
    ends, differences = [], []
    for axis in range(3):
        beyond = np.moveaxis(cropped, axis, 0)[spacing:]
        before = np.moveaxis(cropped, axis, 0)[:-spacing]
        gap = np.moveaxis(np.abs(beyond - before), 0, axis)
        blocks = gap.reshape([part for side in gap.shape for part in (side // spacing, spacing)])
        differences.append(blocks.mean(axis=(1, 3, 5), dtype=np.float64).ravel())
        along = np.moveaxis(nodes, axis, 0)
        pairs = [np.moveaxis(part, 0, axis).ravel() for part in (along[:-1], along[1:])]
        ends.append(np.stack(pairs, axis=1))
    spread = 2 * image.std(dtype=np.float64)
    return np.concatenate(ends), np.exp(-np.concatenate(differences) / spread).astype(np.float32)


@compiled()
def _top(leaders, node):
    while leaders[node] != node:
        leaders[node] = leaders[leaders[node]]
        node = leaders[node]
    return node


@compiled()
def _join(ends, ranking, nodes):
    """Kruskal: the edges that join two parts, in the order of `ranking`."""
    leaders = np.arange(nodes)
    sizes = np.ones(nodes, np.int64)
    kept = np.empty(nodes - 1, np.int64)
    count = 0
    for edge in ranking:
        first, second = _top(leaders, ends[edge, 0]), _top(leaders, ends[edge, 1])
        if first != second:
            if sizes[first] < sizes[second]:
                first, second = second, first
            leaders[second] = first
            sizes[first] += sizes[second]
            kept[count] = edge
            count += 1
    return kept[:count]


@compiled()
def _walk(ends, kept, nodes, root):
    """Breadth first over the kept edges: order, parents, children, and the edge to each one's parent."""
    starts = np.zeros(nodes + 2, np.int64)
    for edge in kept:
        for side in range(2):
            starts[ends[edge, side] + 2] += 1
    starts = np.cumsum(starts)
    touching = np.empty(2 * len(kept), np.int64)
    for edge in kept:
        for side in range(2):
            node = ends[edge, side]
            touching[starts[node + 1]] = edge
            starts[node + 1] += 1
    order = np.empty(nodes, np.int64)
    parents = np.full(nodes, -1, np.int64)
    edges = np.full(nodes, -1, np.int64)
    children = np.empty(nodes + 1, np.int64)
    order[0] = root
    end = 1
    for position in range(nodes):
        node = order[position]
        children[position] = end
        for place in range(starts[node], starts[node + 1]):
            edge = touching[place]
            if edge != edges[position]:
                order[end] = ends[edge, 0] + ends[edge, 1] - node
                parents[end] = position
                edges[end] = edge
                end += 1
    children[nodes] = end
    return order, parents, children, edges


def spanning_tree(ends: np.ndarray, weights: np.ndarray, nodes: int, root: int) -> Tree:
    """The spanning tree of greatest total weight (Kruskal); of equal edges the first one is taken.

    Args:
        ends: Node numbers ``(E, 2)`` of a connected graph.
        weights: Weights ``(E,)`` float32; a tree of least total cost is the one of greatest weight, costs being
            ``-weight``.
        nodes: Number of nodes.
        root: Number of the root's node.

    Returns:
        The tree.
    """
    ranking = np.argsort(-weights, kind="stable")
    order, parents, children, edges = _walk(ends, _join(ends, ranking, nodes), nodes, root)
    depths, last = [0, 1], 1
    while last < nodes:
        last = int(children[last])
        depths.append(last)
    to_parent = np.ones(nodes, np.float32)
    to_parent[1:] = weights[edges[1:]]
    return Tree(order, parents, children, np.array(depths), to_parent)


def image_tree(image: np.ndarray, spacing: int) -> Tree:
    """The spanning tree of an image's control points, rooted at the middle one; see :func:`grid_edges`."""
    shape = control_shape(image.shape, spacing)
    ends, weights = grid_edges(image, spacing)
    root = int(np.ravel_multi_index([side // 2 for side in shape], shape))
    return spanning_tree(ends, weights, int(np.prod(shape)), root)


# min-sum -------------------------------------------------------------------------------------------------------------
@compiled()
def _lower(costs, offset, labels, lowest, out):
    """Along the first axis: out[rest, i] = min over j of costs[j, rest] + (i - j + offset)^2; the axes are rotated."""
    rest = labels * labels
    for i in range(labels):
        for j in range(labels):
            penalty = np.float32(i - j + offset) ** 2
            shelf = costs[j * rest : (j + 1) * rest]
            if j == 0:
                for place in range(rest):
                    lowest[place] = shelf[place] + penalty
            else:
                for place in range(rest):
                    value = shelf[place] + penalty
                    lowest[place] = value if value < lowest[place] else lowest[place]
        for place in range(rest):
            out[place * labels + i] = lowest[place]


@compiled()
def _message(costs, weight, offset_i, offset_j, offset_k, labels, scratch):
    """Message of a child in scratch[1]: the min-convolution of its weighted costs, less its minimum."""
    for label in range(len(costs)):
        scratch[0, label] = costs[label] * weight
    _lower(scratch[0], offset_i, labels, scratch[2], scratch[1])
    _lower(scratch[1], offset_j, labels, scratch[2], scratch[0])
    _lower(scratch[0], offset_k, labels, scratch[2], scratch[1])
    smallest = scratch[1].min()
    for label in range(len(costs)):
        scratch[1, label] -= smallest


@compiled()
def _collect(position, costs, previous, order, children, weights, labels, scratch):
    """Add the messages of its children to a node's costs."""
    node = order[position]
    for child_position in range(children[position], children[position + 1]):
        child = order[child_position]
        _message(
            costs[child],
            weights[child_position],
            previous[0, node] - previous[0, child],
            previous[1, node] - previous[1, child],
            previous[2, node] - previous[2, child],
            labels,
            scratch,
        )
        own = costs[node]
        for label in range(len(own)):
            own[label] += scratch[1, label]


@compiled(parallel=True)
def _leaves_to_root(costs, previous, order, children, depths, weights, labels, threads):
    scratch = np.empty((threads, 3, costs.shape[1]), np.float32)
    for depth in range(len(depths) - 2, -1, -1):
        first, last = depths[depth], depths[depth + 1]
        if last - first < _SERIAL_WIDTH:
            for position in range(first, last):
                _collect(position, costs, previous, order, children, weights, labels, scratch[0])
        else:
            for thread in prange(threads):
                for position in range(first + np.int64(thread), last, threads):
                    _collect(position, costs, previous, order, children, weights, labels, scratch[np.int64(thread)])


@compiled()
def _root_to_leaves(costs, previous, order, parents, weights, labels, chosen):
    penalties = np.empty((3, labels), np.float32)
    chosen[order[0]] = costs[order[0]].argmin()
    for position in range(1, len(order)):
        node, parent = order[position], order[parents[position]]
        label = chosen[parent]
        wanted = (label // (labels * labels), label // labels % labels, label % labels)
        for axis in range(3):
            offset = wanted[axis] + previous[axis, parent] - previous[axis, node]
            for own in range(labels):
                penalties[axis, own] = (offset - own) ** 2
        best, label = np.float32(np.inf), 0
        for i in range(labels):
            for j in range(labels):
                outer = penalties[0, i] + penalties[1, j]
                for k in range(labels):
                    value = costs[node, label] * weights[position] + outer + penalties[2, k]
                    if value < best:
                        best = value
                        chosen[node] = label
                    label += 1


def min_sum(costs: np.ndarray, tree: Tree, previous: np.ndarray) -> np.ndarray:
    """The labels of least total cost on a tree, exactly: messages from the leaves to the root, then read-out.

    The costs of a node, its children's messages included, are multiplied by the weight of its edge before its own
    message: what counts is the data cost times all weights on the way to the root, plus, per edge, the squared
    difference of total displacements times the weights from the edge's upper end to the root.

    Args:
        costs: Costs ``(N, n^3)`` float32 of all nodes' labels; **changed**: messages are added.
        tree: Tree of the N nodes.
        previous: Displacements ``(3, N)`` float32 before this level, in label steps.

    Returns:
        ``(N,)`` int64, the label of each node.
    """
    labels = round(costs.shape[1] ** (1 / 3))
    _leaves_to_root(costs, previous, tree.order, tree.children, tree.depths, tree.weights, labels, get_num_threads())
    chosen = np.empty(len(costs), np.int64)
    _root_to_leaves(costs, previous, tree.order, tree.parents, tree.weights, labels, chosen)
    return chosen


def label_vectors(radius: int) -> np.ndarray:
    """``(3, (2 radius + 1)^3)`` float32: what each label means, in steps."""
    axis = np.arange(-radius, radius + 1, dtype=np.float32)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij")).reshape(3, -1)


# sampling ------------------------------------------------------------------------------------------------------------
@compiled()
def _along_row(row, low, high, part):
    return row[low] + part * (row[high] - row[low])


@compiled(parallel=True)
def _sample(volumes, displacement, out):
    channels, depth, height, width = volumes.shape
    for plane in prange(displacement.shape[1]):
        i = np.int64(plane)
        for j in range(displacement.shape[2]):
            for k in range(displacement.shape[3]):
                at_i = min(max(i + displacement[0, i, j, k], np.float32(0)), np.float32(depth - 1))
                at_j = min(max(j + displacement[1, i, j, k], np.float32(0)), np.float32(height - 1))
                at_k = min(max(k + displacement[2, i, j, k], np.float32(0)), np.float32(width - 1))
                low_i, low_j, low_k = int(at_i), int(at_j), int(at_k)
                high_i, high_j = min(low_i + 1, depth - 1), min(low_j + 1, height - 1)
                high_k = min(low_k + 1, width - 1)
                di, dj, dk = np.float32(at_i - low_i), np.float32(at_j - low_j), np.float32(at_k - low_k)
                for channel in range(channels):
                    volume = volumes[channel]
                    near = _along_row(volume[low_i, low_j], low_k, high_k, dk)
                    far = _along_row(volume[low_i, high_j], low_k, high_k, dk)
                    front = near + dj * (far - near)
                    near = _along_row(volume[high_i, low_j], low_k, high_k, dk)
                    far = _along_row(volume[high_i, high_j], low_k, high_k, dk)
                    back = near + dj * (far - near)
                    out[channel, i, j, k] = front + di * (back - front)


def sample_at(volumes: np.ndarray, displacement: np.ndarray) -> np.ndarray:
    """Trilinear values of ``(C, D, H, W)`` at voxels moved by `displacement` ``(3, D, H, W)``; the border goes on."""
    out = np.empty_like(volumes)
    _sample(volumes, displacement, out)
    return out
