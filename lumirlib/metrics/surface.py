"""Distance between label surfaces."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import surface_distance
import torch
from scipy.spatial import cKDTree
from surface_distance import lookup_tables

from lumirlib.labels import LUMIR_LABELS
from lumirlib.metrics.overlap import check_label_volumes, label_counts, nan_mean

#: Outside the volume; no label has this number.
OUTSIDE = -1
#: Nearest neighbours of fewer points than this are looked up in one thread: starting others takes longer.
POINTS_FOR_THREADS = 20_000


@lru_cache(maxsize=1)
def _surface_areas() -> np.ndarray:
    """Area of a surface element by its 2 x 2 x 2 neighbourhood code, voxels of side 1; building it takes a while."""
    return lookup_tables.create_table_neighbour_code_to_surface_area([1, 1, 1])


def _surface_elements(volume: np.ndarray, labels: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Surface elements of all labels, from one pass over the volume.

    An element lies at the corner that eight voxels share, for every label that some of the eight carry and some do
    not; its code has a bit for each that does, in the order of `surface_distance`.

    Args:
        volume: ``(D, H, W)`` label numbers from 0.
        labels: to find.

    Returns:
        For each label ``(n, 3)`` positions in voxels and ``(n,)`` areas in squared voxels.
    """
    padded = np.pad(volume.astype(np.int32), 1, constant_values=OUTSIDE)
    sides = [side + 1 for side in volume.shape]
    corners = [
        padded[tuple(slice(by, by + side) for by, side in zip(shift, sides, strict=True))]
        for shift in itertools.product((0, 1), repeat=3)
    ]
    mixed = np.zeros(sides, dtype=bool)
    for corner in corners[1:]:
        mixed |= corner != corners[0]
    places = np.flatnonzero(mixed)
    around = np.stack([corner[mixed] for corner in corners])  # (8, n)

    # label -> its place in `labels`, or -1; the last entry is that of OUTSIDE
    number = np.full(max(int(volume.max(initial=0)), max(labels)) + 2, -1)
    number[np.asarray(labels)] = np.arange(len(labels))
    owners, codes, at = [], [], []
    for position in range(8):
        same = around == around[position]
        # a label that several of the eight carry is taken once, at the first of them
        new = (number[around[position]] >= 0) & ~same[:position].any(axis=0)
        owners.append(number[around[position, new]])
        codes.append(np.packbits(same[:, new], axis=0)[0])
        at.append(places[new])
    owner, code, place = np.concatenate(owners), np.concatenate(codes), np.concatenate(at)
    order = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner, minlength=len(labels)))[:-1]
    points = np.stack(np.unravel_index(place[order], sides), axis=1)
    return list(zip(np.split(points, ends), np.split(_surface_areas()[code[order]], ends), strict=True))


def _distances(points: np.ndarray, surface: np.ndarray) -> np.ndarray:
    """Distance of each point to the nearest of a surface, in voxels."""
    found, _ = cKDTree(surface).query(points, workers=-1 if len(points) > POINTS_FOR_THREADS else 1)
    return found


def hd95_per_label_mm(
    warped_labels: torch.Tensor,
    fixed_labels: torch.Tensor,
    moving_labels: torch.Tensor | None = None,
    spacing_mm: float = 1.0,
    labels: Sequence[int] = LUMIR_LABELS,
) -> np.ndarray:
    """95th percentile of the Hausdorff distance of each label, in mm, as the LUMIR challenge scores it.

    That of DeepMind's `surface_distance`: surface elements by 2 x 2 x 2 neighbourhood codes, weighted with their areas;
    the larger of the two directed 95th percentiles. The elements of all labels are found in one pass, distances by
    nearest neighbours among the elements instead of distance transforms of volumes.

    Args:
        warped_labels: moving labels warped by nearest neighbour, ``(1, 1, D, H, W)``, integers from 0.
        fixed_labels: same shape.
        moving_labels: the moving labels before warping. A label absent from them, or from the fixed ones, is NaN; one
            that only the warping lost is infinite. None takes the warped ones.
        spacing_mm: edge of a voxel.
        labels: label numbers to score.

    Returns:
        One value per label, 0 or more, infinite or NaN; lower is better.
    """
    moving_labels = check_label_volumes(warped_labels, fixed_labels, moving_labels)
    if not spacing_mm > 0:
        raise ValueError(f"spacing_mm must be positive, got {spacing_mm}")
    in_fixed, in_warped, in_moving = (
        label_counts(volume, labels).tolist() for volume in (fixed_labels, warped_labels, moving_labels)
    )
    surfaces = [_surface_elements(volume[0, 0].cpu().numpy(), labels) for volume in (fixed_labels, warped_labels)]
    distances = np.full(len(labels), np.nan)
    for position in range(len(labels)):
        if not in_fixed[position] or not in_moving[position]:
            continue
        if not in_warped[position]:
            distances[position] = np.inf
            continue
        (fixed, fixed_areas), (warped, warped_areas) = (elements[position] for elements in surfaces)
        found = {}
        for here, there, areas, names in (
            (fixed, warped, fixed_areas, ("distances_gt_to_pred", "surfel_areas_gt")),
            (warped, fixed, warped_areas, ("distances_pred_to_gt", "surfel_areas_pred")),
        ):
            to_there = _distances(here, there)
            order = np.argsort(to_there, kind="stable")
            found |= {names[0]: to_there[order], names[1]: areas[order]}
        distances[position] = spacing_mm * surface_distance.compute_robust_hausdorff(found, 95)
    return distances


def hd95_mm(
    warped_labels: torch.Tensor,
    fixed_labels: torch.Tensor,
    moving_labels: torch.Tensor | None = None,
    spacing_mm: float = 1.0,
    labels: Sequence[int] = LUMIR_LABELS,
) -> float:
    """Mean 95 % Hausdorff distance over the labels that both people have, in mm.

    Arguments as :func:`hd95_per_label_mm`.

    Returns:
        0 or more, infinite where the warping lost a label, NaN where no label can be scored.
    """
    return nan_mean(hd95_per_label_mm(warped_labels, fixed_labels, moving_labels, spacing_mm, labels))
