"""Images, labels and points carried by transforms, interpolated once.

    lumirlib apply TRANSFORM INPUT --reference FILE --out FILE

A transform leads from a reference (the fixed scan) to the input (the moving scan), as those of ITK and ANTs do. So an
image is read at the places of the reference's voxels, and points of the input are taken the other way, to where they
lie in the reference: :mod:`lumirlib.scans.maps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch

from lumirlib._checks import check_choice, counted
from lumirlib.data.field_formats import RAS_TO_LPS
from lumirlib.data.nifti import read_grid, read_nifti, write_nifti
from lumirlib.files import check_new, write_atomically
from lumirlib.scans.maps import (
    INTERPOLATIONS,
    OF_LABELS,
    ChainMap,
    FieldMap,
    InverseMap,
    WorldMap,
    carry,
    check_right_angles,
    field_on,
    in_voxels,
    made_for,
    read_transform,
)
from lumirlib.scans.prepare import background_value
from lumirlib.scans.scan import transform

#: What the columns of a table of points mean, and their names.
POINTS = {"ras": ("x", "y", "z"), "lps": ("x", "y", "z"), "voxels": ("i", "j", "k")}
#: A volume of whole numbers in which so large a share of neighbours are alike is a label map.
MIN_ALIKE = 0.5
#: At most so large a share of the reference may lie where a transform is not defined.
MAX_UNDEFINED = 0.5


@dataclass(frozen=True)
class Applied:
    """What :func:`apply_to_image` or :func:`apply_to_points` has written.

    Attributes:
        path: Path of the file.
        about: What was done, for a reader.
        remarks: What is hardly right about it.
    """

    path: Path
    about: str
    remarks: tuple[str, ...] = ()


def read_map(transforms: Sequence[str | Path], inverse: bool = False) -> WorldMap:
    """The map of one or several transforms, see :func:`lumirlib.scans.maps.read_transform`.

    Args:
        transforms: Files; the first one leads away from the reference, the last one to the input, as for
            ``antsApplyTransforms -t``.
        inverse: Whether to invert the whole: what was the input is the reference then.
    """
    if not transforms:
        raise ValueError("transforms must be one file or more, got none")
    maps = tuple(read_transform(path) for path in transforms)
    whole = maps[0] if len(maps) == 1 else ChainMap(maps)
    return InverseMap(whole) if inverse else whole


def is_label_map(values: np.ndarray) -> bool:
    """Whether an array of three or four axes is a label map: whole numbers, neighbours alike but for background."""
    if values.dtype.kind == "f" and not np.array_equal(values, np.rint(values)):
        return False
    volume = values if values.ndim == 3 else values[..., 0]
    alike = pairs = 0
    for axis in range(3):
        one, other = (
            np.take(volume, range(*part), axis) for part in ((0, volume.shape[axis] - 1), (1, volume.shape[axis]))
        )
        inside = (one != 0) & (other != 0)
        alike, pairs = alike + int((one == other)[inside].sum()), pairs + int(inside.sum())
    return pairs > 0 and alike >= MIN_ALIKE * pairs


def apply_to_image(
    transforms: Sequence[str | Path],
    image: str | Path,
    reference: str | Path,
    out: str | Path,
    interpolation: str = "auto",
    inverse: bool = False,
    overwrite: bool = False,
) -> Applied:
    """Carry an image, a label map or a series onto a reference's grid.

    Args:
        transforms: Transforms from the reference to the image, see :func:`read_map`.
        image: NIfTI file, 3-D, or 4-D for a series, each volume of which is carried alike.
        reference: NIfTI file whose grid is taken.
        out: NIfTI file to write: whole numbers as they are with "nearest" and "label", else float32.
        interpolation: Name, "linear", "cubic" or "nearest"; for label maps also "label", the number that weighs most
            where each is interpolated linearly, ANTs' GenericLabel; "auto" takes "nearest" for label maps, else
            "linear".
        inverse: Whether to invert the transforms.
        overwrite: Whether `out` may be replaced.

    Raises:
        FileNotFoundError: a file that is not there.
        FileExistsError: `out` is there.
        ValueError: files that are no such thing; sheared axes; a label map with an interpolation of images, or the
            reverse; a reference that lies where a transform is not defined, or is the scan that it leads to; an image
            that none of it leads to.
    """
    check_choice(interpolation, ("auto", *INTERPOLATIONS), "interpolation")
    if not str(out).endswith((".nii", ".nii.gz")):
        raise ValueError(f"out must end in .nii or .nii.gz for an image, got {out}")
    check_new(out, overwrite)
    shape, affine = read_grid(reference)
    if len(shape) < 3:
        raise ValueError(f"{reference}: expected a volume as reference, got shape {shape}")
    shape = shape[:3]
    whole = read_map(transforms, inverse)

    def fits(sides: tuple[int, ...], own: np.ndarray) -> None:
        if len(sides) not in (3, 4):
            raise ValueError(f"{image}: expected a volume or a series of volumes, got shape {sides}")
        check_right_angles(image, own)

    check_right_angles(reference, affine)
    remarks = _check_reference(transforms, whole, inverse, shape, affine, reference)
    values, own = read_nifti(image, fits)
    values = values[..., 0] if values.ndim == 4 and values.shape[3] == 1 else values
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"{image}: expected finite voxels, got NaN or infinite ones: set them to the background")
    labels = is_label_map(values)
    if interpolation == "auto":
        interpolation = "nearest" if labels else "linear"
    if interpolation == "label" and not labels:
        raise ValueError(
            f"{image}: expected a label map (whole numbers, most neighbours alike) for interpolation label"
        )
    if labels and interpolation not in OF_LABELS:
        raise ValueError(
            f"{image}: a label map (whole numbers, most neighbours alike); {interpolation} interpolation makes numbers "
            "that are no labels: take nearest or label"
        )
    field = field_on(whole, shape, affine)
    undefined = float(field.displacement[:, 0].isnan().double().mean())
    if undefined > MAX_UNDEFINED:
        raise ValueError(
            f"{reference}: {100 * undefined:.0f} % of its voxels lie where the transform is not defined, so it is not "
            f"the reference of {_named(transforms)}; are direction and order right?"
        )
    displacement = in_voxels(field, own)
    del field
    _check_meets(displacement, values.shape[:3], image, reference)
    if interpolation not in OF_LABELS and values.dtype != np.float64:
        values = values.astype(np.float32)
    background = background_value(torch.from_numpy(np.ascontiguousarray(values.astype(np.float32))))
    outside = float(values.min()) if background is None else background
    volumes = [values] if values.ndim == 3 else list(np.moveaxis(values, -1, 0))
    carried = np.stack([carry(volume, displacement, interpolation, outside) for volume in volumes], -1)
    carried = carried[..., 0] if values.ndim == 3 else carried
    carried = carried if interpolation in OF_LABELS else carried.astype(np.float32)
    write_nifti(out, carried, affine, seconds=_seconds(image) if values.ndim == 4 else None)
    if undefined:
        remarks.append(
            f"{100 * undefined:.2g} % of {Path(reference).name} lie where {_named(transforms)} is not defined and have "
            f"the background, {outside:g}"
        )
    kind = "label map" if labels else "image" if values.ndim == 3 else f"series of {values.shape[3]}"
    return Applied(Path(out), f"{kind}, {interpolation}, onto {shape} voxels of {Path(reference).name}", tuple(remarks))


def _seconds(path: str | Path) -> float | None:
    """Seconds between two volumes of a series, as is meant by a header without a unit; None where they are no times."""
    header = nib.load(path).header
    unit = {"unknown": 1.0, "sec": 1.0, "msec": 1e-3, "usec": 1e-6}.get(header.get_xyzt_units()[1])
    return None if unit is None else float(header["pixdim"][4]) * unit


def _named(transforms: Sequence[str | Path]) -> str:
    return ", ".join(Path(path).name for path in transforms)


def _check_reference(
    transforms: Sequence[str | Path],
    whole: WorldMap,
    inverse: bool,
    shape: Sequence[int],
    affine: np.ndarray,
    reference: str | Path,
) -> list[str]:
    """Remarks on a reference's grid; ValueError where it is that of the scan a transform of ours leads to.

    Another grid than that of the scan it was made for may be right: there are other images of its space.
    """
    whole = whole.forward if isinstance(whole, InverseMap) else whole
    maps = whole.maps if isinstance(whole, ChainMap) else (whole,)
    first = maps[-1 if inverse else 0]
    if not isinstance(first, FieldMap) or not first.scans:
        return []
    name = Path(transforms[-1 if inverse else 0]).name
    start, end = reversed(first.scans) if inverse else first.scans
    grid = made_for(shape, affine)
    if grid == start:
        return []
    inverted = f"{name} inverted" if inverse else name
    if grid == end:
        raise ValueError(
            f"{reference}: has the grid of the scan that {inverted} leads to, expected that of the one it leads from; "
            "take the other scan, or the inverse"
        )
    return [
        f"{Path(reference).name} has another grid than the scan that {inverted} leads from: right if both lie in one "
        "space, as a person's images in one scanner do"
    ]


def _check_meets(displacement: np.ndarray, sides: tuple[int, ...], image: str | Path, reference: str | Path) -> None:
    """Raise ValueError unless a voxel of the reference lies in the image."""
    inside = np.ones(displacement.shape[:3], bool)
    for axis, side in enumerate(sides):
        index = np.arange(displacement.shape[axis], dtype=np.float32).reshape(
            [-1 if at == axis else 1 for at in range(3)]
        )
        along = displacement[..., axis] + index
        inside &= (along >= -0.5) & (along <= side - 0.5)
    if not inside.any():
        raise ValueError(
            f"{image}: no voxel of {Path(reference).name} leads into it; are direction and order of transforms right?"
        )


def apply_to_points(
    transforms: Sequence[str | Path],
    points: str | Path,
    convention: str,
    out: str | Path,
    reference: str | Path = "",
    points_of: str | Path = "",
    inverse: bool = False,
    overwrite: bool = False,
) -> Applied:
    """Carry points of the input to where they lie in the reference, as :func:`apply_to_image` carries what is there.

    Args:
        transforms: Transforms from the reference to the input, see :func:`read_map`. Points go against them.
        points: CSV with a header; columns x, y and z in mm, or i, j and k in voxels. Others are kept.
        convention: What the coordinates are: "ras" (NIfTI, nibabel) or "lps" (ITK, ANTs) in mm, or "voxels".
        out: CSV to write, in the same convention.
        reference: NIfTI file, in whose voxels the result is; for "voxels" only.
        points_of: NIfTI file, in whose voxels the points are; for "voxels" only.
        inverse: Whether to invert the transforms: points of the reference go to the input.
        overwrite: Whether `out` may be replaced.

    Raises:
        FileNotFoundError: a file that is not there.
        FileExistsError: `out` is there.
        ValueError: a table without the columns, numbers that are not finite, or points where a transform is not
            defined.
    """
    check_choice(convention, tuple(POINTS), "convention")
    if not str(out).endswith(".csv"):
        raise ValueError(f"out must end in .csv for points, got {out}")
    in_grids = convention == "voxels"
    if in_grids != bool(points_of) or (in_grids and not reference):
        raise ValueError(
            "points in voxels need two images: that of the points (--points-of), and that of the result (--reference)"
            if in_grids
            else f"points_of goes with voxels, got convention {convention}"
        )
    check_new(out, overwrite)
    table, coordinates = read_points(points, POINTS[convention])
    whole = read_map(transforms, inverse)
    turn = np.eye(4)
    turn[:3, :3] = RAS_TO_LPS if convention == "lps" else np.eye(3)
    to_world, from_world = (
        (read_grid(points_of)[1], np.linalg.inv(read_grid(reference)[1])) if in_grids else (turn, turn)
    )
    if in_grids:
        check_inside(coordinates, read_grid(points_of)[0], points, points_of)
    world = transform(to_world, torch.from_numpy(coordinates.T[None].copy()))
    # an image is read at the places of the reference's voxels; its points lie where the map comes from
    found = (whole.forward if isinstance(whole, InverseMap) else InverseMap(whole))(world)
    lost = found.isnan().any(1)[0].numpy()
    if lost.any():
        rows = ", ".join(
            f"{row + 2} ({', '.join(f'{x:g}' for x in coordinates[row])})" for row in np.flatnonzero(lost)[:5]
        )
        raise ValueError(
            f"{points}: {lost.sum()} of {len(lost)} points lie where the transform is not defined: line {rows}; are "
            f"they {convention}, and of the {'reference' if inverse else 'input'}?"
        )
    moved = transform(from_world, found)[0].T.numpy()
    for column, values in zip(POINTS[convention], moved.T, strict=True):
        table[column] = [f"{value:.6f}" for value in values]
    write_atomically(out, lambda to: table.to_csv(to, index=False))
    ways = ("reference", "input") if inverse else ("input", "reference")
    return Applied(Path(out), f"{counted(len(table), 'point')} from the {ways[0]} to the {ways[1]}, {convention}")


def read_points(path: str | Path, columns: Sequence[str]) -> tuple[pd.DataFrame, np.ndarray]:
    """A table of points as text, and their coordinates ``(N, 3)`` float64.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a CSV with these columns, no points, or coordinates that are not finite numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such CSV of points: {path}")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} as CSV: {error}") from error
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(f"{path}: expected columns {', '.join(columns)}, got {', '.join(map(str, table.columns))}")
    if not len(table):
        raise ValueError(f"{path}: expected points, got none")
    numbers = table[list(columns)].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    broken = np.flatnonzero(~np.isfinite(numbers).all(1))
    if broken.size:
        row = int(broken[0])
        raise ValueError(f"{path}: expected three finite numbers in line {row + 2}, got {table.iloc[row].to_list()}")
    return table, numbers


def check_inside(voxels: np.ndarray, shape: Sequence[int], points: str | Path, image: str | Path) -> None:
    """Raise ValueError unless voxel coordinates ``(N, 3)`` lie in an image of sides `shape`."""
    outside = np.flatnonzero(((voxels < -0.5) | (voxels > np.array(shape[:3]) - 0.5)).any(1))
    if outside.size:
        row = int(outside[0])
        raise ValueError(
            f"{points}: {outside.size} of {len(voxels)} points lie outside {Path(image).name}, "
            f"{tuple(shape[:3])} voxels: line {row + 2}, {voxels[row].tolist()}"
        )
