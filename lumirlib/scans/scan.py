"""A user's scan: reading it, and sampling it in world coordinates."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import torch
from scipy.spatial.transform import Rotation

from lumirlib import spatial
from lumirlib.data.nifti import MIN_EDGE_MM, read_header, read_volume, scan_stem

#: Voxels of a head are below this; those of a header that says metres and means millimetres are not.
MAX_EDGE_MM = 100
#: Planes of a volume that are mapped at a time.
SLAB = 16


def require(package: str) -> ModuleType:
    """An optional package.

    Raises:
        ModuleNotFoundError: it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModuleNotFoundError(
            f"work on scans needs the package {package}, which is not installed: "
            'pip install "lumirlib[prepare]", or skip the steps that need it'
        ) from error


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """A list that has, at the end of the block, what was warned of in it, each once; nothing is shown."""
    remarks: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield remarks
    remarks += dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, UserWarning))


def transform(matrix: np.ndarray, points: torch.Tensor) -> torch.Tensor:
    """Points ``(1, 3, ...)`` moved by a 4 x 4 matrix, float64."""
    full = torch.from_numpy(np.asarray(matrix, dtype=np.float64))
    return torch.addmm(full[:3, 3:], full[:3, :3], points.double().reshape(3, -1)).reshape(points.shape)


def world_slabs(shape: Sequence[int], affine: np.ndarray) -> Iterator[tuple[slice, torch.Tensor]]:
    """World coordinates of a grid's voxels, some planes at a time: (planes along i, ``(1, 3, n, H, W)`` in mm)."""
    axes = [torch.arange(side, dtype=torch.float64) for side in shape]
    for first in range(0, shape[0], SLAB):
        planes = slice(first, min(first + SLAB, shape[0]))
        grid = torch.stack(torch.meshgrid(axes[0][planes], *axes[1:], indexing="ij"))[None]
        yield planes, transform(affine, grid)


def sample_world(image: torch.Tensor, affine: np.ndarray, points: torch.Tensor) -> torch.Tensor:
    """Trilinear values of an image (1, 1, D, H, W) at world points (1, 3, ...) in mm, zero outside."""
    return spatial.sample(image, transform(np.linalg.inv(affine), points))


def as_scanned(
    image: torch.Tensor,
    affine: np.ndarray,
    rotation_degrees: Sequence[float] = (0.0, 0.0, 0.0),
    shift_mm: Sequence[float] = (0.0, 0.0, 0.0),
    orientation: str = "LIA",
    spacing_mm: Sequence[float] = (0.9, 1.2, 1.0),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A volume as another scanner would have stored it, to try things out: turned, shifted, on another grid.

    Args:
        image: Image ``(1, 1, D, H, W)``, floating point.
        affine: Matrix 4 x 4 from the image's voxels to its world, in mm.
        rotation_degrees: Rotation of the head about the world's three axes, in degrees.
        shift_mm: Shift of the head, in mm.
        orientation: Orientation of the new array's axes, as nibabel names it.
        spacing_mm: Spacing of the new grid, in mm.

    Returns:
        Array float32 that holds the whole volume, its 4 x 4 affine, and the pose: old world to new world, 4 x 4.
    """
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_euler("xyz", rotation_degrees, degrees=True).as_matrix()
    pose[:3, 3] = shift_mm
    corners = np.stack(np.meshgrid(*[(0, side - 1) for side in image.shape[2:]])).reshape(3, -1)
    world = (pose @ affine @ np.vstack([corners, np.ones(corners.shape[1])]))[:3]
    directions = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(orientation), (1, 1, 1))[:3, :3].T
    along = directions.T @ world  # of the new axes
    shape = np.ceil((along.max(1) - along.min(1)) / spacing_mm).astype(int) + 1
    new = np.eye(4)
    new[:3, :3] = directions * np.asarray(spacing_mm)
    new[:3, 3] = directions @ along.min(1)
    seen = torch.empty(1, 1, *shape)
    for planes, points in world_slabs(shape, new):
        seen[:, :, planes] = sample_world(image, affine, transform(np.linalg.inv(pose), points))
    return seen[0, 0].numpy(), new, pose


@dataclass(frozen=True)
class Scan:
    """A scan as it lies in its file.

    Attributes:
        path: Path of the file.
        values: Values ``(1, 1, D, H, W)`` float32, in the file's own order of axes.
        affine: Matrix 4 x 4, voxels to world in mm, RAS.
    """

    path: Path
    values: torch.Tensor
    affine: np.ndarray

    @property
    def name(self) -> str:
        """The file's name without ending."""
        return scan_stem(self.path)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sides in voxels."""
        return tuple(self.values.shape[2:])

    @property
    def spacing_mm(self) -> np.ndarray:
        """Edges of a voxel."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def read_scan(path: str | Path) -> Scan:
    """Read a T1 scan, of any orientation and spacing.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a 3-D NIfTI of finite numbers, without contrast or orientation, or fewer than 8 voxels a side.

    Warns:
        UserWarning: the header holds two different orientations.
    """
    path = Path(path)
    array, affine = read_volume(path)
    header = read_header(path)
    if header.sform is None and header.qform is None:
        raise ValueError(f"{path}: the header has no orientation (neither sform nor qform), which is needed")
    if header.sform is not None and header.qform is not None and not np.allclose(header.qform, header.sform, atol=0.1):
        warnings.warn(f"{path}: sform and qform differ; the sform is taken, other programs may not", stacklevel=2)
    if min(array.shape) < 8:
        raise ValueError(f"{path}: expected at least 8 voxels along each axis, got shape {array.shape}")
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    if not abs(np.linalg.det(affine[:3, :3])) > 1e-6 * edges.prod():
        raise ValueError(f"{path}: expected an invertible voxel-to-world matrix, got {affine.tolist()}")
    if edges.max() > MAX_EDGE_MM or edges.min() < MIN_EDGE_MM:
        raise ValueError(
            f"{path}: expected voxels of {MIN_EDGE_MM} to {MAX_EDGE_MM} mm, got "
            f"{' x '.join(f'{edge:g}' for edge in edges)} mm: is its unit right?"
        )
    if array.min() == array.max():
        raise ValueError(f"{path}: expected an image, got the constant {array.min():g}")
    return Scan(path, torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))[None, None], affine)


def correlation(first: torch.Tensor, second: torch.Tensor, mask: torch.Tensor) -> float:
    """Pearson correlation of two images inside a mask; 0 where one has no contrast there."""
    values = torch.stack([first[mask], second[mask]]).double()
    values = values - values.mean(1, keepdim=True)
    scale = values.norm(dim=1).prod()
    return float((values[0] * values[1]).sum() / scale) if scale > 0 else 0.0
