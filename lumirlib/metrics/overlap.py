"""Overlap of label volumes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lumirlib._checks import check_labels
from lumirlib.metrics import _kernels
from lumirlib.metrics.labels import LUMIR_LABELS


def check_label_volumes(
    warped_labels: torch.Tensor, fixed_labels: torch.Tensor, moving_labels: torch.Tensor | None
) -> torch.Tensor:
    """Raise unless all are single (1, 1, D, H, W) integer volumes on one grid; return the moving ones or a stand-in.

    Where `moving_labels` is None the warped ones stand in for them, so that no label counts as lost.
    """
    moving_labels = warped_labels if moving_labels is None else moving_labels
    for volume, name in (
        (warped_labels, "warped_labels"),
        (fixed_labels, "fixed_labels"),
        (moving_labels, "moving_labels"),
    ):
        check_labels(volume, name)
        if volume.shape != fixed_labels.shape or volume.shape[0] != 1:
            raise ValueError(
                f"{name} must be (1, 1, D, H, W) like fixed_labels {tuple(fixed_labels.shape)}, "
                f"got {tuple(volume.shape)}"
            )
    return moving_labels


def label_counts(
    volume: torch.Tensor, labels: Sequence[int], agreeing_with: torch.Tensor | None = None
) -> torch.Tensor:
    """How many voxels carry each of `labels`; numbers outside the list are not counted.

    Args:
        volume: Integers from 0, any shape.
        labels: Label numbers.
        agreeing_with: Second volume of the same shape, to count only the voxels where both carry the same label.
    """
    size = max(labels) + 1
    if volume.device.type == "cpu":
        arrays = [part.contiguous().view(-1).numpy() for part in (volume, agreeing_with) if part is not None]
        counts = torch.from_numpy((_kernels.agreement if len(arrays) == 2 else _kernels.histogram)(*arrays, size))
    else:
        kept = volume if agreeing_with is None else volume[volume == agreeing_with]
        counts = torch.bincount(kept.reshape(-1).to(torch.int64), minlength=size)
    return counts[torch.as_tensor(labels, device=counts.device)]


def dice_per_label(
    warped_labels: torch.Tensor,
    fixed_labels: torch.Tensor,
    moving_labels: torch.Tensor | None = None,
    labels: Sequence[int] = LUMIR_LABELS,
) -> np.ndarray:
    """Dice coefficient of each label, ``2 |A and B| / (|A| + |B|)``, as the LUMIR challenge scores it.

    Args:
        warped_labels: Moving labels warped by nearest neighbour, ``(1, 1, D, H, W)``, integers from 0.
        fixed_labels: Fixed labels, same shape.
        moving_labels: Moving labels before warping. A label absent from them, or from the fixed ones, is NaN; one that
            only the warping lost is 0. None takes the warped ones.
        labels: Label numbers to score.

    Returns:
        One value in [0, 1] or NaN per label, higher is better.
    """
    moving_labels = check_label_volumes(warped_labels, fixed_labels, moving_labels)
    both = label_counts(warped_labels, labels, agreeing_with=fixed_labels).double()
    in_fixed, in_warped = label_counts(fixed_labels, labels), label_counts(warped_labels, labels)
    scored = (in_fixed > 0) & (label_counts(moving_labels, labels) > 0)
    value = 2 * both / (in_fixed + in_warped).clamp_min(1)
    return torch.where(scored, value, torch.nan).cpu().numpy()


def dice(
    warped_labels: torch.Tensor,
    fixed_labels: torch.Tensor,
    moving_labels: torch.Tensor | None = None,
    labels: Sequence[int] = LUMIR_LABELS,
) -> float:
    """Mean Dice over the labels that both people have; arguments as :func:`dice_per_label`.

    Returns:
        A value in [0, 1], NaN where no label can be scored.
    """
    return nan_mean(dice_per_label(warped_labels, fixed_labels, moving_labels, labels))


def nan_mean(values: np.ndarray) -> float:
    """Mean of the values that are not NaN, NaN (without a warning) if none is."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if kept.size else float("nan")
