"""Target registration error, in the challenge's form and in the textbook's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from lumirlib import spatial
from lumirlib._checks import check_displacement, check_labels
from lumirlib.metrics.overlap import nan_mean

Points = Mapping[str, Sequence[float]]


def landmark_volume(points: Points, shape: Sequence[int], radius: int = 1) -> torch.Tensor:
    """Draw landmarks as small balls, one label each, in as many layers as keep them apart.

    The balls of points that are close (as at coarse resolution) would cover each other in one volume; each goes into
    the first layer where it is free.

    Args:
        points: Place (i, j, k) of each landmark in voxels, by name; the n-th point gets label n + 1.
        shape: Sides (D, H, W) of the grid.
        radius: Radius of a ball in voxels; 1 is a voxel and its six neighbours.

    Returns:
        ``(1, L, D, H, W)`` int16, L the number of layers.

    Raises:
        ValueError: a point outside the grid.
    """
    reach = np.arange(-radius, radius + 1)
    ball = np.stack(np.meshgrid(reach, reach, reach, indexing="ij"), -1).reshape(-1, 3)
    ball = ball[(ball**2).sum(1) <= radius**2]
    sides = np.asarray(shape)
    layers: list[np.ndarray] = []
    for number, (name, place) in enumerate(points.items(), start=1):
        centre = np.floor(np.asarray(place, dtype=np.float64) + 0.5).astype(int)
        if (centre < 0).any() or (centre >= sides).any():
            raise ValueError(f"landmark {name!r} at {tuple(place)} lies outside the grid {tuple(shape)}")
        voxels = centre + ball
        voxels = tuple(voxels[((voxels >= 0) & (voxels < sides)).all(1)].T)
        layer = next((layer for layer in layers if not layer[voxels].any()), None)
        if layer is None:
            layer = np.zeros(tuple(shape), dtype=np.int16)
            layers.append(layer)
        layer[voxels] = number
    return torch.from_numpy(np.stack(layers))[None]


def tre_per_landmark_mm(
    warped_landmarks: torch.Tensor, fixed_landmarks: torch.Tensor, spacing_mm: float = 1.0
) -> np.ndarray:
    """Distance between the centroids of each landmark in the warped and the fixed label volume, in mm.

    The challenge's form: landmarks are small labels, warped by nearest neighbour like any other.

    Args:
        warped_landmarks: Warped label volume ``(1, L, D, H, W)``, integers, each label a landmark, 0 none; L layers as
            :func:`landmark_volume` makes them, 1 for the challenge's own files.
        fixed_landmarks: Fixed label volume ``(1, L', D, H, W)``, integers.
        spacing_mm: Edge of a voxel, in mm.

    Returns:
        One distance per landmark of the fixed volume, in ascending order of its label; NaN where the warping lost it.
    """
    if not spacing_mm > 0:
        raise ValueError(f"spacing_mm must be positive, got {spacing_mm}")
    centroids = []
    for volume, name in ((warped_landmarks, "warped_landmarks"), (fixed_landmarks, "fixed_landmarks")):
        if not isinstance(volume, torch.Tensor) or volume.ndim != 5 or volume.shape[0] != 1:
            got = tuple(volume.shape) if isinstance(volume, torch.Tensor) else type(volume).__name__
            raise ValueError(f"{name} must be (1, L, D, H, W), got {got}")
        check_labels(volume.movedim(1, 0), name)
        if volume.shape[2:] != fixed_landmarks.shape[2:]:
            raise ValueError(
                f"{name} must be on the grid {tuple(fixed_landmarks.shape[2:])} of fixed_landmarks, "
                f"got {tuple(volume.shape[2:])}"
            )
        places = torch.nonzero(volume[0])  # (n, 4): layer, i, j, k
        numbers = volume[0][tuple(places.T)].to(torch.int64)
        size = int(numbers.max()) + 1 if numbers.numel() else 1
        count = torch.bincount(numbers, minlength=size)
        total = torch.stack([torch.bincount(numbers, places[:, axis].double(), size) for axis in (1, 2, 3)], 1)
        centroids.append({n: (total[n] / count[n]).cpu().numpy() for n in torch.nonzero(count)[:, 0].tolist() if n})
    warped, fixed = centroids
    if not fixed:
        raise ValueError("fixed_landmarks must hold at least one landmark, got none")
    lost = np.full(3, np.nan)
    return np.array([np.linalg.norm(warped.get(n, lost) - fixed[n]) * spacing_mm for n in sorted(fixed)])


def tre_mm(warped_landmarks: torch.Tensor, fixed_landmarks: torch.Tensor, spacing_mm: float = 1.0) -> float:
    """Mean target registration error in mm, the challenge's form; arguments as :func:`tre_per_landmark_mm`.

    Returns:
        0 or more, lower is better; the mean over the landmarks that survive the warping, NaN where none does.
    """
    return nan_mean(tre_per_landmark_mm(warped_landmarks, fixed_landmarks, spacing_mm))


def tre_points_mm(
    displacement: torch.Tensor, fixed_points: Points, moving_points: Points, spacing_mm: float = 1.0
) -> float:
    """Mean target registration error in mm, the textbook's form: fixed points carried by the displacement.

    Sub-voxel, unlike :func:`tre_mm`, which goes through label volumes; the two are not to be mixed in one table.

    Args:
        displacement: Displacement ``(1, 3, D, H, W)`` in voxels.
        fixed_points: Place (i, j, k) of each fixed landmark in voxels, by name.
        moving_points: Place (i, j, k) of each moving landmark in voxels, by the same names.
        spacing_mm: Edge of a voxel, in mm.

    Returns:
        0 or more, lower is better.
    """
    check_displacement(displacement)
    if fixed_points.keys() != moving_points.keys() or not fixed_points:
        raise ValueError(
            f"fixed_points and moving_points must name the same landmarks, got {len(fixed_points)} and "
            f"{len(moving_points)}, of which {len(fixed_points.keys() & moving_points.keys())} are shared"
        )
    fixed = torch.tensor([list(fixed_points[name]) for name in fixed_points], dtype=torch.float64)
    moving = torch.tensor([list(moving_points[name]) for name in fixed_points], dtype=torch.float64)
    moved = fixed + spatial.sample(displacement.double().cpu(), fixed.T.reshape(1, 3, -1, 1, 1)).reshape(3, -1).T
    return float((moved - moving).norm(dim=1).mean()) * spacing_mm
