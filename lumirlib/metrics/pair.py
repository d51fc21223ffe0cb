"""The challenge's four metrics of one pair."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lumirlib import metrics, spatial
from lumirlib._checks import check_displacement, check_finite, check_labels
from lumirlib.metrics.labels import LUMIR_LABELS


@dataclass(frozen=True)
class Measure:
    """What a figure is of.

    Attributes:
        name: Name in results files.
        title: Name for a reader.
        unit: Unit for a reader; empty for none.
        factor: Factor from the unit of results files to `unit`.
        higher_is_better: Whether more is better.
    """

    name: str
    title: str
    unit: str
    factor: float = 1.0
    higher_is_better: bool = False

    @property
    def heading(self) -> str:
        """Title with unit, as a column or an axis has it."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


#: The challenge's four metrics by name, in the paper's order.
MEASURES = {
    measure.name: measure
    for measure in (
        Measure("dice", "Dice", "%", 100.0, higher_is_better=True),
        Measure("tre_mm", "TRE", "mm"),
        Measure("ndv_percent", "NDV", "%"),
        Measure("hd95_mm", "HD95", "mm"),
    )
}

NDV_MASKS = ("moving", "fixed")


def evaluate_pair(
    displacement: torch.Tensor,
    fixed_labels: torch.Tensor | None = None,
    moving_labels: torch.Tensor | None = None,
    fixed_landmarks: torch.Tensor | None = None,
    moving_landmarks: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    spacing_mm: float = 1.0,
    labels: tuple[int, ...] = LUMIR_LABELS,
) -> dict[str, float]:
    """The challenge's four metrics of one pair.

    Args:
        displacement: Displacement ``(1, 3, D, H, W)`` in voxels, on the fixed grid.
        fixed_labels: Fixed labels ``(1, 1, D, H, W)``, integers; None leaves Dice and HD95 NaN, which need both label
            volumes.
        moving_labels: Moving labels before warping, same shape.
        fixed_landmarks: Fixed landmarks ``(1, L, D, H, W)``, integers as :func:`lumirlib.metrics.landmark_volume` draws
            them; None leaves TRE NaN, which needs both.
        moving_landmarks: Moving landmarks before warping, drawn by :func:`lumirlib.metrics.landmark_volume` too.
        mask: Mask ``(1, 1, D, H, W)`` of the voxels where NDV counts (the moving image > 0 in 2024); None counts
            everywhere.
        spacing_mm: Edge of a voxel, in mm.
        labels: Label numbers to score.

    Returns:
        "dice" in [0, 1], "tre_mm", "ndv_percent", "hd95_mm".

    Raises:
        ValueError: shapes that do not fit, or a displacement that is not finite.
    """
    check_displacement(displacement)
    check_finite(displacement, "displacement")
    found = dict.fromkeys(MEASURES, math.nan)
    if fixed_labels is not None and moving_labels is not None:
        check_labels(fixed_labels, "fixed_labels")
        check_labels(moving_labels, "moving_labels")
        warped = spatial.warp(moving_labels, displacement, mode="nearest")
        found["dice"] = metrics.dice(warped, fixed_labels, moving_labels, labels)
        found["hd95_mm"] = metrics.hd95_mm(warped, fixed_labels, moving_labels, spacing_mm, labels)
    if fixed_landmarks is not None and moving_landmarks is not None:
        warped = spatial.warp(moving_landmarks, displacement, mode="nearest")
        found["tre_mm"] = metrics.tre_mm(warped, fixed_landmarks, spacing_mm)
    found["ndv_percent"] = metrics.ndv_percent(displacement, mask)
    return found
