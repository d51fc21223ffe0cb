"""Distance between label surfaces."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import surface_distance
import torch
from scipy.ndimage import find_objects

from lumirlib.labels import LUMIR_LABELS
from lumirlib.metrics.overlap import check_label_volumes, label_counts, nan_mean


def hd95_per_label_mm(
    warped_labels: torch.Tensor,
    fixed_labels: torch.Tensor,
    moving_labels: torch.Tensor | None = None,
    spacing_mm: float = 1.0,
    labels: Sequence[int] = LUMIR_LABELS,
) -> np.ndarray:
    """95th percentile of the Hausdorff distance of each label, in mm, as the LUMIR challenge scores it.

    DeepMind's `surface_distance`: surface elements by 2 x 2 x 2 neighbourhood codes, weighted with their areas; the
    larger of the two directed 95th percentiles.

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
    fixed, warped = fixed_labels[0, 0].cpu().numpy(), warped_labels[0, 0].cpu().numpy()
    # shifted by one, as find_objects takes 0 for background, which is a label here
    boxes = [find_objects(volume.astype(np.int32) + 1, max_label=max(labels) + 1) for volume in (fixed, warped)]
    distances = np.full(len(labels), np.nan)
    for position, label in enumerate(labels):
        if not in_fixed[position] or not in_moving[position]:
            continue
        if not in_warped[position]:
            distances[position] = np.inf
            continue
        # only the joint bounding box and one voxel around it can hold a surface
        box = tuple(
            slice(max(min(a.start, b.start) - 1, 0), max(a.stop, b.stop) + 1)
            for a, b in zip(boxes[0][label], boxes[1][label], strict=True)
        )
        found = surface_distance.compute_surface_distances(fixed[box] == label, warped[box] == label, [spacing_mm] * 3)
        distances[position] = surface_distance.compute_robust_hausdorff(found, 95)
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
