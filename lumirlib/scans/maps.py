"""Maps between the worlds of two scans: those of a registration, those that files hold, their inverses, and images.

A map takes world points ``(1, 3, ...)`` of a fixed scan, in mm, RAS, to the places in the moving scan that belong there
(:mod:`lumirlib.spatial`). So an image is carried from the moving scan to the fixed one, and points go the other way,
unless the map is inverted first.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from lumirlib import spatial
from lumirlib.data.field_formats import RAS_TO_LPS, channels_last_to_voxel
from lumirlib.data.frame import frame_affine
from lumirlib.data.nifti import read_header, read_nifti
from lumirlib.scans._kernels import trilinear
from lumirlib.scans.scan import require, transform, world_slabs

#: Cosine of the angle between two axes, at most; ITK refuses files from between 1e-4 and 3e-4.
MAX_SHEAR = 5e-5
#: What the search for an inverse ends at, in mm, and after how many steps: first simple ones, then Newton's.
INVERSE_MM = 1e-3
SIMPLE_STEPS = 12
NEWTON_STEPS = 24
#: How far from where a search ended without success others begin, along each axis, in mm, in turn.
RESTARTS_MM = (1.0, 3.0)
#: Points that are searched anew at a time, each from 27 places.
RESTARTED = 4096
#: Half the distance over which slopes are measured, in mm.
SLOPE_MM = 0.05
#: The smallest part of a step that is tried where a whole one leads away.
LEAST_STEP = 1 / 64
#: Interpolations of images, and what SimpleITK calls them.
INTERPOLATIONS = {"linear": "sitkLinear", "cubic": "sitkBSpline", "nearest": "sitkNearestNeighbor"}
INTERPOLATIONS |= {"label": "sitkLabelLinear"}
#: Those of label maps: the nearest voxel's number, and the one that weighs most if each is interpolated linearly.
OF_LABELS = ("nearest", "label")
#: Endings of files that SimpleITK reads a transform from.
ITK_ENDINGS = (".mat", ".txt", ".tfm", ".xfm", ".h5", ".hdf5")
#: A displacement by this many voxels leads out of any image.
FAR = 1e7


#: What the header of a transform says of the grids of the two scans, see :func:`made_for`.
MADE_FOR = "lumirlib: from grid "


def made_for(shape: Sequence[int], affine: np.ndarray, other: str = "") -> str:
    """The description of a transform that leads from a grid to another: the digest of each; of one grid its digest."""
    content = repr((tuple(map(int, shape)), (np.asarray(affine).round(3) + 0.0).tolist()))
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    return f"{MADE_FOR}{digest} to {other}" if other else digest


def is_orthogonal(affine: np.ndarray) -> bool:
    """Whether a grid's axes are at right angles, as ITK wants them of a file."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(directions.T @ directions - np.eye(3)).max() < MAX_SHEAR)


class WorldMap:
    """A map from world points to world points, float64, in mm, RAS."""

    @property
    def linear(self) -> np.ndarray:
        """A matrix 4 x 4 that comes near the map; an inverse is searched from there."""
        raise NotImplementedError

    def extended(self, points: torch.Tensor) -> torch.Tensor:
        """Places of points ``(1, 3, ...)``; where the map is not defined, it goes on as at its border."""
        raise NotImplementedError

    def defined(self, points: torch.Tensor) -> torch.Tensor:
        """Whether the map is defined at points ``(1, 3, ...)``: ``(1, 1, ...)`` bool."""
        return torch.ones_like(points[:, :1], dtype=torch.bool)

    def __call__(self, points: torch.Tensor) -> torch.Tensor:
        """Places of points ``(1, 3, ...)``, NaN where the map is not defined."""
        return self.extended(points).where(self.defined(points), torch.nan)


@dataclass(frozen=True)
class AffineMap(WorldMap):
    """A matrix 4 x 4.

    Attributes:
        matrix: Matrix 4 x 4 from world to world, in mm.
    """

    matrix: np.ndarray

    @property
    def linear(self) -> np.ndarray:
        """The matrix."""
        return self.matrix

    def extended(self, points: torch.Tensor) -> torch.Tensor:
        """Points moved by the matrix."""
        return transform(self.matrix, points)


@dataclass(frozen=True)
class FieldMap(WorldMap):
    """A displacement field, trilinear between its voxels; it is defined up to half a voxel beyond the outermost ones.

    Attributes:
        displacement: Displacement ``(1, 3, D, H, W)`` float32, in mm along the world's axes.
        affine: Matrix 4 x 4 from its voxels to the world, in mm.
        scans: Digests of the grids of the two scans it was made for, see :func:`made_for`; empty where not known.
    """

    displacement: torch.Tensor
    affine: np.ndarray
    scans: tuple[str, ...] = ()

    @cached_property
    def linear(self) -> np.ndarray:
        """The affine of least squares, from some thousand voxels."""
        steps = tuple(slice(None, None, max(1, side // 16)) for side in self.displacement.shape[2:])
        voxels = spatial.identity_grid(self.displacement.shape[2:])[(slice(None), slice(None), *steps)].double()
        points = transform(self.affine, voxels)
        places = points + self.displacement[(slice(None), slice(None), *steps)].double()
        rows = np.vstack([points.reshape(3, -1).numpy(), np.ones(points[0, 0].numel())])
        found = np.eye(4)
        found[:3] = np.linalg.lstsq(rows.T, places.reshape(3, -1).numpy().T, rcond=None)[0].T
        return found

    @cached_property
    def _interleaved(self) -> torch.Tensor:
        return self.displacement.contiguous(memory_format=torch.channels_last_3d)

    def extended(self, points: torch.Tensor) -> torch.Tensor:
        """Points with the displacement there; outside, with that of the nearest border point."""
        return points + sample_at(self._interleaved, transform(np.linalg.inv(self.affine), points))

    def defined(self, points: torch.Tensor) -> torch.Tensor:
        """Whether points lie in the field's voxels."""
        voxels = transform(np.linalg.inv(self.affine), points)
        last = _last_voxel(self.displacement, points.ndim)
        return ((voxels >= -0.5) & (voxels <= last + 0.5)).all(1, keepdim=True)


@dataclass(frozen=True)
class ChainMap(WorldMap):
    """Maps one behind the other.

    Attributes:
        maps: Maps; the first takes the points, the last leads to the places.
    """

    maps: tuple[WorldMap, ...]

    @property
    def linear(self) -> np.ndarray:
        """The product of theirs."""
        found = np.eye(4)
        for one in self.maps:
            found = one.linear @ found
        return found

    def extended(self, points: torch.Tensor) -> torch.Tensor:
        """Points moved by one map after the other."""
        for one in self.maps:
            points = one.extended(points)
        return points

    def defined(self, points: torch.Tensor) -> torch.Tensor:
        """Whether each map is defined where the ones before it lead."""
        found = super().defined(points)
        for one in self.maps:
            found &= one.defined(points)
            points = one.extended(points)
        return found


@dataclass(frozen=True)
class ScanMap(WorldMap):
    """The whole map from the world of a fixed scan to that of a moving one: affine, displacement, affine.

    Attributes:
        fixed_to_frame: Matrix 4 x 4 from the fixed scan's world to the frame, in mm.
        displacement: Displacement ``(1, 3, D, H, W)`` in voxels of `resolution_mm`, on the frame's grid.
        resolution_mm: Edge of the displacement's voxels in mm: 1, 2 or 4.
        frame_to_moving: Matrix 4 x 4 from the frame to the moving scan's world, in mm.
    """

    fixed_to_frame: np.ndarray
    displacement: torch.Tensor
    resolution_mm: int
    frame_to_moving: np.ndarray

    @property
    def linear(self) -> np.ndarray:
        """The two affines without the displacement."""
        return self.frame_to_moving @ self.fixed_to_frame

    @cached_property
    def _field(self) -> FieldMap:
        """The displacement in mm; the frame's axes are the world's."""
        return FieldMap(self.displacement * self.resolution_mm, frame_affine(self.resolution_mm))

    def extended(self, points: torch.Tensor) -> torch.Tensor:
        """World points ``(1, 3, ...)`` of the fixed scan in the world of the moving scan; defined everywhere."""
        return self.from_frame(transform(self.fixed_to_frame, points))

    def from_frame(self, points: torch.Tensor) -> torch.Tensor:
        """World points of the frame in the world of the moving scan."""
        return transform(self.frame_to_moving, self._field.extended(points))

    def displacement_1mm(self) -> torch.Tensor:
        """The displacement on the frame's own grid, ``(1, 3, 160, 224, 192)`` in voxels of 1 mm."""
        return spatial.to_finer_grid(self.displacement, self.resolution_mm)


@dataclass(frozen=True)
class WrittenMap(WorldMap):
    """A map as its field on a grid has it; beyond the grid the map itself.

    Attributes:
        field: Field of the map.
        whole: The map.
    """

    field: FieldMap
    whole: WorldMap

    @property
    def linear(self) -> np.ndarray:
        """The map's."""
        return self.whole.linear

    def extended(self, points: torch.Tensor) -> torch.Tensor:
        """Places by the field, or by the map where the field is not defined."""
        found = self.field.extended(points)
        beyond = ~self.field.defined(points)[0, 0]
        if beyond.any():
            found[:, :, beyond] = self.whole.extended(points[:, :, beyond])
        return found


@dataclass(frozen=True)
class GriddedMap(WorldMap):
    """A map as its field on a grid without borders would have it, which is not made: trilinear between its voxels.

    Attributes:
        whole: The map.
        affine: Matrix 4 x 4 from the grid's voxels to the world, in mm.
    """

    whole: WorldMap
    affine: np.ndarray

    @property
    def linear(self) -> np.ndarray:
        """The map's."""
        return self.whole.linear

    def extended(self, points: torch.Tensor) -> torch.Tensor:
        """Places by the displacements of the eight voxels around each point."""
        voxels = transform(np.linalg.inv(self.affine), points)
        low = voxels.floor()
        found = points.double().clone()
        for corner in itertools.product((0.0, 1.0), repeat=3):
            step = torch.tensor(corner, dtype=torch.float64).view(1, 3, *[1] * (points.ndim - 2))
            at = transform(self.affine, low + step)
            weight = 1 - (voxels - low - step).abs()
            found += weight.prod(1, keepdim=True) * (self.whole.extended(at) - at)
        return found


@dataclass(frozen=True)
class InverseMap(WorldMap):
    """The inverse of a map: for each place the point that the map leads there, searched for.

    From the place that :attr:`linear` gives, steps of the residual, and where they do not suffice Newton's, each halved
    where it would lead away; then Newton's from points around. Where the map folds there may be no inverse; the nearest
    that was met is taken.

    Attributes:
        forward: Map to be inverted.
    """

    forward: WorldMap

    @property
    def linear(self) -> np.ndarray:
        """The inverse of the map's."""
        return np.linalg.inv(self.forward.linear)

    def extended(self, points: torch.Tensor) -> torch.Tensor:
        """The points that lead to places ``(1, 3, ...)``."""
        return self.solve(points)[0]

    def __call__(self, points: torch.Tensor) -> torch.Tensor:
        """The same, NaN where the map is not defined at what was found."""
        found = self.extended(points)
        return found.where(self.forward.defined(found), torch.nan)

    def defined(self, points: torch.Tensor) -> torch.Tensor:
        """Whether the map is defined at what is found."""
        return self.forward.defined(self.extended(points))

    def solve(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Points ``(1, 3, ...)``, and how far from the places the map leads them: ``(1, 1, ...)`` in mm."""
        targets = places.double().reshape(1, 3, -1)
        found, error = self._search(targets, transform(self.linear, targets))
        around = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=3)), dtype=torch.float64).T
        # beside a fold a search may end in a valley: begin again all around, then farther away
        for reach in RESTARTS_MM:
            for left in torch.nonzero(error > INVERSE_MM)[:, 0].split(RESTARTED):
                starts = found[:, :, left, None] + reach * around[None, :, None]
                aims = targets[:, :, left, None].expand_as(starts)
                again, missed = self._search(aims.flatten(2), starts.flatten(2), SIMPLE_STEPS)
                least, which = missed.view(starts.shape[2:]).min(1)
                again = again.view(starts.shape)[:, :, torch.arange(len(left)), which]
                closer = least < error[left]
                found[:, :, left[closer]], error[left[closer]] = again[:, :, closer], least[closer]
        return found.reshape(places.shape), error.reshape(places[:, :1].shape)

    def _search(self, targets: torch.Tensor, start: torch.Tensor, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Points ``(1, 3, N)`` from a start on, from step `first` on, and how far from the targets they lead, in mm."""
        found = start.clone()
        residual = targets - self.forward.extended(found)
        error = _length(residual)
        part = torch.ones_like(error)
        backward = self.linear.copy()
        backward[:3, 3] = 0
        for step in range(first, SIMPLE_STEPS + NEWTON_STEPS):
            if step == SIMPLE_STEPS:
                part.fill_(1)
            open_ = torch.nonzero((error > INVERSE_MM) & (part >= LEAST_STEP))[:, 0]
            if not len(open_):
                break
            at, left = found[:, :, open_], residual[:, :, open_]
            by = transform(backward, left) if step < SIMPLE_STEPS else self._newton(at, left)
            tried = at + part[open_] * by
            left = targets[:, :, open_] - self.forward.extended(tried)
            size = _length(left)
            better = size < error[open_]
            taken = open_[better]
            found[:, :, taken], residual[:, :, taken] = tried[:, :, better], left[:, :, better]
            error[taken] = size[better]
            part[open_] = torch.where(better, (2 * part[open_]).clamp(max=1), part[open_] / 2)
        return found, error

    def _newton(self, at: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Steps ``(1, 3, N)`` that the map's slopes at points want; damped a little, as slopes may be singular."""
        columns = []
        for axis in range(3):
            aside = torch.zeros(1, 3, 1, dtype=torch.float64)
            aside[0, axis] = SLOPE_MM
            columns.append(self.forward.extended(at + aside) - self.forward.extended(at - aside))
        slopes = torch.stack(columns, -1)[0].movedim(1, 0) / (2 * SLOPE_MM)  # (N, 3, 3)
        normal = slopes.mT @ slopes + 1e-6 * torch.eye(3, dtype=torch.float64)
        return torch.linalg.solve(normal, slopes.mT @ residual[0].T[..., None])[..., 0].T[None]


def _length(steps: torch.Tensor) -> torch.Tensor:
    """Lengths ``(N,)`` of steps ``(1, 3, N)``; PyTorch's norm along an axis of three takes several times as long."""
    return steps[0].square().sum(0).sqrt_()


def _last_voxel(image: torch.Tensor, dimensions: int) -> torch.Tensor:
    """Index of an image's last voxel along each axis, ``(1, 3, 1, ...)`` of so many dimensions."""
    return (torch.tensor(image.shape[2:], dtype=torch.float64) - 1).view(1, 3, *[1] * (dimensions - 2))


def sample_at(image: torch.Tensor, voxels: torch.Tensor) -> torch.Tensor:
    """Trilinear values ``(1, C, ...)`` float64 of an image at voxel coordinates ``(1, 3, ...)`` of any shape.

    Outside, those of the nearest border point.
    """
    interleaved, points = image[0].movedim(0, -1).contiguous(), voxels.double().reshape(3, -1).contiguous()
    values = trilinear(interleaved.numpy(), points.numpy())
    return torch.from_numpy(values).reshape(1, image.shape[1], *voxels.shape[2:])


# files ----------------------------------------------------------------------------------------------------------------
def read_transform(path: str | Path) -> WorldMap:
    """A map from a file of ITK or ANTs: a displacement field as NIfTI, or what SimpleITK reads.

    Args:
        path: NIfTI file ``(D, H, W, 1, 3)`` in mm, LPS, on a grid of right angles; or a file of :data:`ITK_ENDINGS`
            with affines, displacement fields, or several of them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file or of transform, or numbers that are not finite.
        ModuleNotFoundError: SimpleITK, for what is not NIfTI.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such transform: {path}")
    if path.name.lower().endswith((".nii", ".nii.gz")):
        return _read_field(path)
    if not path.name.lower().endswith(ITK_ENDINGS):
        raise ValueError(f"{path}: expected a transform, .nii, .nii.gz or one of {', '.join(ITK_ENDINGS)}")
    sitk = require("SimpleITK")
    try:
        found = sitk.ReadTransform(str(path))
    except RuntimeError as error:
        raise ValueError(f"cannot read {path} as a transform: {str(error).strip().splitlines()[-1]}") from error
    maps = _of_itk(found, path)
    return maps[0] if len(maps) == 1 else ChainMap(tuple(maps))


def _read_field(path: Path) -> FieldMap:
    header = read_header(path)
    shape = header.shape
    if len(shape) != 5 or shape[3:] != (1, 3):
        more = " (voxel displacements in Learn2Reg's layout are no transform of ITK)" if shape[3:] == (3,) else ""
        raise ValueError(f"{path}: expected a displacement field (D, H, W, 1, 3) in mm, got shape {shape}{more}")
    array, affine = read_nifti(path)
    check_right_angles(path, affine)
    about = header.description
    scans = tuple(about.removeprefix(MADE_FOR).split(" to ")) if about.startswith(MADE_FOR) else ()
    return replace(_field(array[:, :, :, 0], affine, path), scans=scans)


def _field(array: np.ndarray, affine: np.ndarray, path: Path) -> FieldMap:
    """The map of a field ``(D, H, W, 3)`` in mm, LPS."""
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: expected finite displacements, got NaN or infinite ones")
    return FieldMap(channels_last_to_voxel(array.astype(np.float32) * np.diag(RAS_TO_LPS).astype(np.float32)), affine)


def _of_itk(found: object, path: Path) -> list[WorldMap]:
    """Maps of a transform of SimpleITK, the one that takes the points first."""
    sitk = require("SimpleITK")
    found = found.Downcast()
    if found.GetDimension() != 3:
        raise ValueError(f"{path}: expected a transform in 3 dimensions, got {found.GetDimension()}")
    if isinstance(found, sitk.CompositeTransform):
        parts = [found.GetNthTransform(number) for number in range(found.GetNumberOfTransforms())]
        return [one for part in reversed(parts) for one in _of_itk(part, path)]  # the last one takes the points
    if found.IsLinear():
        origin = np.array(found.TransformPoint((0.0, 0.0, 0.0)))
        axes = np.stack([np.array(found.TransformPoint(tuple(axis))) - origin for axis in np.eye(3)], 1)
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = RAS_TO_LPS @ axes @ RAS_TO_LPS, RAS_TO_LPS @ origin
        if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix[:3, :3])) < 1e-9:
            raise ValueError(f"{path}: expected an affine that can be inverted, got {matrix.tolist()}")
        return [AffineMap(matrix)]
    if isinstance(found, sitk.DisplacementFieldTransform):
        grid = found.GetDisplacementField()
        directions = np.reshape(grid.GetDirection(), (3, 3)) * np.array(grid.GetSpacing())
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = RAS_TO_LPS @ directions, RAS_TO_LPS @ np.array(grid.GetOrigin())
        return [_field(sitk.GetArrayFromImage(grid).transpose(2, 1, 0, 3), affine, path)]
    raise ValueError(f"{path}: expected affines or displacement fields, got {found.GetName()}")


def check_right_angles(path: str | Path, affine: np.ndarray) -> None:
    """Raise ValueError unless a file's axes are at right angles."""
    if not is_orthogonal(affine):
        raise ValueError(
            f"{path}: expected axes at right angles, which ITK and ANTs need; they are sheared: resample it first"
        )


# images ---------------------------------------------------------------------------------------------------------------
def field_on(
    world_map: WorldMap, shape: Sequence[int], affine: np.ndarray, done: Callable[[float], object] = lambda share: None
) -> FieldMap:
    """The displacement field of a map on a grid, NaN where the map is not defined.

    Args:
        world_map: Map from the grid's world.
        shape: Sides of the grid in voxels.
        affine: Matrix 4 x 4 from the grid's voxels to its world, in mm.
        done: Function that is called with the share of the grid that has been done since its last call.
    """
    displacement = torch.empty(1, 3, *shape)
    for planes, points in world_slabs(shape, affine):
        displacement[:, :, planes] = (world_map(points) - points).float()
        done(points.shape[2] / shape[0])
    return FieldMap(displacement, affine)


def in_voxels(field: FieldMap, moving_affine: np.ndarray) -> np.ndarray:
    """A field as ``(D, H, W, 3)`` float32 from a voxel's own index to the voxel coordinates in a moving image.

    Args:
        field: Field from the grid's world to the moving image's.
        moving_affine: Matrix 4 x 4 from the moving image's voxels to its world, in mm.
    """
    found = np.empty((*field.displacement.shape[2:], 3), np.float32)
    whole = np.linalg.inv(moving_affine)
    for planes, points in world_slabs(field.displacement.shape[2:], field.affine):
        places = transform(whole, points + field.displacement[:, :, planes])
        by = places - transform(np.linalg.inv(field.affine), points)
        found[planes] = by[0].movedim(0, -1).numpy()
    return found


def carry(values: np.ndarray, displacement: np.ndarray, interpolation: str, outside: float) -> np.ndarray:
    """A moving image on another grid, by SimpleITK, interpolated once.

    Args:
        values: Moving image ``(D, H, W)``; "linear" and "cubic" want floating point.
        displacement: Displacement ``(d, h, w, 3)`` of :func:`in_voxels`; NaN leads outside.
        interpolation: Name, one of :data:`INTERPOLATIONS`.
        outside: Value where nothing of the moving image lies.

    Returns:
        ``(d, h, w)``, dtype of `values`.
    """
    sitk = require("SimpleITK")
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(torch.get_num_threads())
    # both in units of voxels: no grid is refused, and nothing depends on how ITK reads headers
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.T))
    vectors = sitk.GetImageFromArray(np.nan_to_num(displacement, nan=-FAR).transpose(2, 1, 0, 3), isVector=True)
    warp = sitk.WarpImageFilter()
    warp.SetInterpolator(getattr(sitk, INTERPOLATIONS[interpolation]))
    warp.SetOutputParameteresFromImage(vectors)
    warp.SetEdgePaddingValue(float(outside))
    return sitk.GetArrayFromImage(warp.Execute(image, vectors)).T
