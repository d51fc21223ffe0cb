"""Landmarks: reading their files, and the centroids of label volumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lumirlib.files import read_json

#: Voxel coordinates of landmarks are below this.
MAX_COORDINATE = 1e6
#: Landmarks of one person, which are few; an image in their place has as many as gray values.
MAX_LANDMARKS = 1000


def landmark_centroids(volume: np.ndarray) -> dict[str, tuple[float, float, float]]:
    """Centroid (i, j, k) of each label of a landmark volume (D, H, W), by its number."""
    numbers = [int(number) for number in np.unique(volume) if number]
    return {str(n): tuple(float(x) for x in np.argwhere(volume == n).mean(0)) for n in numbers}


def read_landmarks(path: str | Path) -> dict[str, tuple[float, float, float]]:
    """Landmarks by name, in voxels of the image they belong to, from a JSON with "names" and "points" (i, j, k).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a JSON, points that are not three finite numbers, or a name that comes twice.
    """
    path = Path(path)
    content = read_json(path)
    names, points = content.get("names"), content.get("points")
    if not isinstance(names, list) or not isinstance(points, list) or len(names) != len(points) or not points:
        raise ValueError(f"{path}: expected lists 'names' and 'points' of one length")
    found = {}
    for name, point in zip(names, points, strict=True):
        if not isinstance(name, (str, int)):
            raise ValueError(f"{path}: expected text or a number as name of a landmark, got {name!r}")
        if not isinstance(point, list) or len(point) != 3 or not all(map(_is_coordinate, point)):
            raise ValueError(f"{path}: expected three finite voxel coordinates for landmark {name!r}, got {point!r}")
        if str(name) in found:
            raise ValueError(f"{path}: landmark {name!r} is named twice")
        found[str(name)] = tuple(map(float, point))
    return found


def _is_coordinate(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < MAX_COORDINATE
