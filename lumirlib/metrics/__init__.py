"""Metrics, the challenge's and our own: pure functions of tensors, which know neither models nor files."""

from lumirlib.metrics.consistency import inverse_consistency_error
from lumirlib.metrics.jacobian import jacobian_determinant, ndv_percent, ndv_volume
from lumirlib.metrics.landmarks import landmark_volume, tre_mm, tre_per_landmark_mm, tre_points_mm
from lumirlib.metrics.overlap import dice, dice_per_label, nan_mean
from lumirlib.metrics.surface import hd95_mm, hd95_per_label_mm

__all__ = [
    "dice",
    "dice_per_label",
    "hd95_mm",
    "hd95_per_label_mm",
    "inverse_consistency_error",
    "jacobian_determinant",
    "landmark_volume",
    "nan_mean",
    "ndv_percent",
    "ndv_volume",
    "tre_mm",
    "tre_per_landmark_mm",
    "tre_points_mm",
]
