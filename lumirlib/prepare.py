"""From scans as they come from a scanner to the LUMIR frame: skull strip, bias correction, affine, one resampling.

    lumirlib prepare FOLDER --out DIR

Brains are found by deepbet (Fisch et al., NeuroImage 2024), the bias field by N4 (Tustison et al., IEEE TMI 2010) and
the affine by maximizing the correlation with the template of :mod:`lumirlib.data.embedded`, which lies in ICBM152
space; the last two are SimpleITK's. All three work on the scan's own voxels or in mm, so that the image is interpolated
once, from its own grid to the frame.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import torch
from scipy.spatial.transform import Rotation
from tqdm.auto import tqdm

from lumirlib import provenance, spatial
from lumirlib._checks import check_choice
from lumirlib.conventions import RAS_TO_LPS
from lumirlib.data.embedded import FRAME_SHAPE, frame_affine, template_in_frame
from lumirlib.data.nifti import read_volume, write_nifti
from lumirlib.engine import pick_device
from lumirlib.files import write_atomically, write_json

#: What is done to a scan, in this order; each can be skipped.
STEPS = ("strip", "bias", "affine")
#: Brains that skull stripping may find, in ml; anything else is taken for a failure.
BRAIN_ML = (400.0, 2500.0)
#: The bias field is fitted on voxels of about this edge in mm, the affine on those of the template.
BIAS_MM = 4.0
TEMPLATE_MM = 2
#: At most so many people, the last by name, are held out of a folder for validation.
MOST_VALIDATION = 10
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
            f"preparing scans needs the package {package}, which is not installed: "
            'pip install "lumirlib[prepare]", or skip the steps that need it'
        ) from error


def check_skip(skip: Iterable[str]) -> tuple[str, ...]:
    """Steps to skip, in the order of :data:`STEPS`; ValueError for an unknown one."""
    chosen = (skip,) if isinstance(skip, str) else tuple(skip)
    for step in chosen:
        check_choice(step, STEPS, "skip")
    return tuple(step for step in STEPS if step in chosen)


def transform(matrix: np.ndarray, points: torch.Tensor) -> torch.Tensor:
    """Points ``(1, 3, ...)`` moved by a 4 x 4 matrix, float64."""
    full = torch.from_numpy(np.asarray(matrix, dtype=np.float64))
    flat = full[:3, :3] @ points.double().reshape(3, -1) + full[:3, 3:]
    return flat.reshape(points.shape)


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
        image: ``(1, 1, D, H, W)``, floating point.
        affine: its voxels to its world, in mm.
        rotation_degrees: of the head about the world's three axes.
        shift_mm: of the head.
        orientation: of the new array's axes, as nibabel names it.
        spacing_mm: of the new grid.

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
        path: of the file.
        values: ``(1, 1, D, H, W)`` float32, in the file's own order of axes.
        affine: 4 x 4, voxels to world in mm, RAS.
    """

    path: Path
    values: torch.Tensor
    affine: np.ndarray

    @property
    def name(self) -> str:
        """The file's name without ending."""
        return _stem(self.path)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sides in voxels."""
        return tuple(self.values.shape[2:])

    @property
    def spacing_mm(self) -> np.ndarray:
        """Edges of a voxel."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii").removesuffix("_0000")


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
    header = nib.load(path).header
    if isinstance(header, nib.Nifti1Header):
        (qform, has_qform), (sform, has_sform) = header.get_qform(coded=True), header.get_sform(coded=True)
        if not has_qform and not has_sform:
            raise ValueError(f"{path}: the header has no orientation (neither sform nor qform), which is needed")
        if has_qform and has_sform and not np.allclose(qform, sform, atol=0.1):
            warnings.warn(f"{path}: sform and qform differ; the sform is taken, other programs may not", stacklevel=2)
    if min(array.shape) < 8:
        raise ValueError(f"{path}: expected at least 8 voxels along each axis, got shape {array.shape}")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ValueError(f"{path}: expected an invertible voxel-to-world matrix, got {affine.tolist()}")
    if array.min() == array.max():
        raise ValueError(f"{path}: expected an image, got the constant {array.min():g}")
    return Scan(path, torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))[None, None], affine)


# the three steps ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _stripper(on_cpu: bool) -> object:
    return require("deepbet").BrainExtraction(no_gpu=on_cpu)


def brain_mask(scan: Scan, device: torch.device | str = "cpu") -> torch.Tensor:
    """Where the brain is in a head, by deepbet; ``(1, 1, D, H, W)`` bool.

    Raises:
        ModuleNotFoundError: deepbet is not installed.
        ValueError: what it finds is no brain.
    """
    advice = "is it a whole T1 head? For a brain that is stripped already, skip the step: --skip strip"
    stripper = _stripper(torch.device(device).type != "cuda")
    try:
        _, found, _ = stripper.run(nib.Nifti1Image(scan.values[0, 0].numpy(), scan.affine))
    except (AssertionError, ValueError) as error:  # what it raises where its first network sees nothing
        raise ValueError(f"{scan.path}: skull stripping found no brain ({error}); {advice}") from error
    mask = np.asarray(found.dataobj) > 0
    volume = mask.sum() * abs(np.linalg.det(scan.affine[:3, :3])) / 1000
    if not BRAIN_ML[0] <= volume <= BRAIN_ML[1]:
        raise ValueError(f"{scan.path}: skull stripping found {volume:.0f} ml of brain, expected "
                         f"{BRAIN_ML[0]:.0f} to {BRAIN_ML[1]:.0f}; {advice}")  # fmt: skip
    return torch.from_numpy(mask)[None, None]


def stripped_mask(scan: Scan) -> torch.Tensor:
    """Where a scan that has been stripped before is above zero; ValueError where that is (nearly) everywhere."""
    mask = scan.values > 0
    if mask.float().mean() > 0.95:
        raise ValueError(f"{scan.path}: expected a stripped brain on zero background, as step 'strip' is skipped; "
                         f"{100 * float(mask.float().mean()):.0f} % of the voxels are above zero")  # fmt: skip
    return mask


def _to_itk(volume: np.ndarray, affine: np.ndarray) -> object:
    """A volume in the file's order of axes as SimpleITK image at the same place, which it calls LPS."""
    sitk = require("SimpleITK")
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(torch.get_num_threads())
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.T))
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((RAS_TO_LPS @ affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin((RAS_TO_LPS @ affine[:3, 3]).tolist())
    return image


def corrected_bias(scan: Scan, mask: torch.Tensor) -> torch.Tensor:
    """Values of a scan divided by its bias field, which N4 fits inside a mask; ``(1, 1, D, H, W)`` float32."""
    sitk = require("SimpleITK")
    inside = (mask & (scan.values > 0))[0, 0].numpy().astype(np.uint8)
    image = _to_itk(scan.values[0, 0].numpy(), scan.affine)
    shrink = [max(1, min(round(BIAS_MM / edge), side // 4)) for edge, side in zip(scan.spacing_mm, scan.shape)]  # noqa: B905
    filter_ = sitk.N4BiasFieldCorrectionImageFilter()
    filter_.Execute(sitk.Shrink(image, shrink), sitk.Shrink(_to_itk(inside, scan.affine), shrink))
    bias = np.exp(sitk.GetArrayFromImage(filter_.GetLogBiasFieldAsImage(image)).T)
    return scan.values / torch.from_numpy(np.ascontiguousarray(bias, dtype=np.float32))


def affine_to_frame(values: torch.Tensor, mask: torch.Tensor, affine: np.ndarray, name: str = "scan") -> np.ndarray:
    """The affine from the LUMIR frame to a scan, by the correlation of its brain with the template's.

    Starts from the header's orientation, with centres of mass and volumes made equal.

    Args:
        values: ``(1, 1, D, H, W)``.
        mask: of the brain, same shape, bool.
        affine: of the scan's voxels to its world, in mm.
        name: for the message.

    Returns:
        4 x 4: world of the frame in mm to world of the scan in mm.

    Raises:
        ValueError: an empty mask, or a search that fails.
    """
    sitk = require("SimpleITK")
    template = template_in_frame(TEMPLATE_MM)
    target = frame_affine(TEMPLATE_MM)
    if not mask.any():
        raise ValueError(f"{name}: the brain's mask is empty")
    brain = torch.where(mask, values, values.new_zeros(()))
    brain = (brain / np.percentile(brain[mask].numpy(), 99.9)).clamp(0, 1)
    here, there = _center(mask, affine), _center(template > 0.02, target)
    scale = (float(mask.sum()) * abs(np.linalg.det(affine[:3, :3]))
             / (float((template > 0.02).sum()) * TEMPLATE_MM**3)) ** (1 / 3)  # fmt: skip
    found = sitk.AffineTransform(3)
    found.SetCenter((RAS_TO_LPS @ there).tolist())
    found.SetMatrix((scale * np.eye(3)).ravel().tolist())
    found.SetTranslation((RAS_TO_LPS @ (here - there)).tolist())
    search = sitk.ImageRegistrationMethod()
    search.SetMetricAsCorrelation()
    search.SetInterpolator(sitk.sitkLinear)
    search.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-2, 100, 0.5, 1e-8)  # steps in mm
    search.SetOptimizerScalesFromPhysicalShift()
    search.SetShrinkFactorsPerLevel([2, 1])
    search.SetSmoothingSigmasPerLevel([2, 1])
    search.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    search.SetInitialTransform(found, inPlace=True)
    try:
        search.Execute(_to_itk(template[0, 0].numpy(), target), _to_itk(brain[0, 0].numpy(), affine))
    except RuntimeError as error:
        raise ValueError(f"{name}: no affine to the template was found: {error}") from error
    matrix, center = np.reshape(found.GetMatrix(), (3, 3)), np.array(found.GetCenter())
    to_scan = np.eye(4)
    to_scan[:3, :3] = RAS_TO_LPS @ matrix @ RAS_TO_LPS
    to_scan[:3, 3] = RAS_TO_LPS @ (np.array(found.GetTranslation()) + center - matrix @ center)
    return to_scan


def _center(mask: torch.Tensor, affine: np.ndarray) -> np.ndarray:
    """Mean place of a mask's voxels, in mm."""
    return (affine @ np.append(torch.nonzero(mask[0, 0]).double().mean(0).numpy(), 1.0))[:3]


# a scan ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedScan:
    """A scan with what has been found out about it; nothing is interpolated until it is asked for.

    Attributes:
        scan: as it lies in its file.
        corrected: its values without bias field, on its own grid, ``(1, 1, D, H, W)`` float32.
        mask: of the brain, likewise, bool.
        to_scan: 4 x 4, world of the frame in mm to world of the scan in mm.
        skipped: steps that were not done.
        seconds: of each step.
    """

    scan: Scan
    corrected: torch.Tensor
    mask: torch.Tensor
    to_scan: np.ndarray
    skipped: tuple[str, ...]
    seconds: dict[str, float] = field(default_factory=dict)

    def brain_at(self, points: torch.Tensor) -> torch.Tensor:
        """Values at world points ``(1, 3, ...)`` of the scan, trilinear; zero outside the brain.

        The mask is interpolated apart and cut at one half, so that the brain's edge is as bright as it is in the scan.
        """
        voxels = transform(np.linalg.inv(self.scan.affine), points)
        inside = spatial.sample(self.mask.float(), voxels) >= 0.5
        values = spatial.sample(self.corrected, voxels)
        return torch.where(inside, values.clamp(min=0), values.new_zeros(()))

    @cached_property
    def in_frame(self) -> torch.Tensor:
        """The brain on the frame's grid, as the cohorts are: ``(1, 1, 160, 224, 192)`` float32, 0 ... 255.

        Whole numbers; the 99.9th percentile of the brain is 255, the background 0 and nothing else is.
        """
        return as_cohort(self.resampled(lambda points: transform(self.to_scan, points)), str(self.scan.path))

    def resampled(self, places: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The brain, ``(1, 1, 160, 224, 192)`` float32 in the scan's units, where a function puts the frame's points.

        Args:
            places: world points of the frame ``(1, 3, ...)`` -> world points of the scan.
        """
        values = torch.empty(1, 1, *FRAME_SHAPE)
        for planes, points in world_slabs(FRAME_SHAPE, frame_affine(1)):
            values[:, :, planes] = self.brain_at(places(points))
        return values

    @property
    def brain_ml(self) -> float:
        """Volume of the brain."""
        return float(self.mask.sum()) * abs(np.linalg.det(self.scan.affine[:3, :3])) / 1000


def as_cohort(values: torch.Tensor, name: str) -> torch.Tensor:
    """Intensities of a brain as LUMIR's: whole numbers, its 99.9th percentile at 255, the background alone at 0."""
    brain = values > 0
    if not brain.any():
        raise ValueError(f"{name}: no brain lies in the LUMIR frame; was the step 'affine' skipped wrongly?")
    white = float(np.percentile(values[brain].numpy(), 99.9))
    return torch.where(brain, (values / white * 255).round().clamp(1, 255), values.new_zeros(()))


def prepare_scan(
    path: str | Path, skip: Iterable[str] = (), device: torch.device | str = "cpu", progress: bool = False
) -> PreparedScan:
    """Find brain, bias field and place in the LUMIR frame of a T1 scan.

    Args:
        path: of a NIfTI file, any orientation and spacing.
        skip: steps of :data:`STEPS` that have been done before: "strip" (its background is zero), "bias", "affine"
            (its world coordinates are those of the frame, on whatever grid).
        device: where the skull is stripped.
        progress: show a progress bar.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_scan`; a step that fails.
        ModuleNotFoundError: a package that a step needs, with the command that installs it.
    """
    skipped = check_skip(skip)
    seconds: dict[str, float] = {}
    scan = read_scan(path)
    with tqdm(total=len(STEPS), desc=scan.name, unit="step", disable=not progress) as bar:

        def timed(step: str, work, otherwise):
            started = time.perf_counter()
            found = otherwise() if step in skipped else work()
            seconds[step] = 0.0 if step in skipped else round(time.perf_counter() - started, 2)
            bar.update()
            return found

        mask = timed("strip", lambda: brain_mask(scan, device), lambda: stripped_mask(scan))
        corrected = timed("bias", lambda: corrected_bias(scan, mask), lambda: scan.values)
        to_scan = timed("affine", lambda: affine_to_frame(corrected, mask, scan.affine, str(path)), lambda: np.eye(4))
    return PreparedScan(scan, corrected, mask, to_scan, skipped, seconds)


def template_correlation(image: torch.Tensor) -> float:
    """Pearson correlation of a prepared brain (1, 1, 160, 224, 192) with the template, inside the latter's brain."""
    template = template_in_frame(TEMPLATE_MM)
    coarse = torch.nn.functional.avg_pool3d(image.float(), TEMPLATE_MM)
    return correlation(coarse, template, template > 0.02)


def correlation(first: torch.Tensor, second: torch.Tensor, mask: torch.Tensor) -> float:
    """Pearson correlation of two images inside a mask; 0 where one has no contrast there."""
    values = torch.stack([first[mask], second[mask]]).double()
    values = values - values.mean(1, keepdim=True)
    scale = values.norm(dim=1).prod()
    return float((values[0] * values[1]).sum() / scale) if scale > 0 else 0.0


# a folder -------------------------------------------------------------------------------------------------------------


def find_scans(folder: str | Path, out: str | Path) -> dict[str, Path]:
    """The NIfTI files of a folder and those below it, but not in `out`, by name: of the file, or of its path."""
    folder, out = Path(folder), Path(out).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    files = sorted(
        path for path in folder.rglob("*.nii*")
        if path.name.endswith((".nii", ".nii.gz")) and not path.name.startswith(".") and path.is_file()
        and not path.resolve().is_relative_to(out)
    )  # fmt: skip
    if not files:
        raise FileNotFoundError(f"no .nii or .nii.gz file in {folder}")
    often = Counter(map(_stem, files))

    def name(path: Path) -> str:
        whole = _stem(path) if often[_stem(path)] == 1 else "-".join([*path.relative_to(folder).parts[:-1], path.name])
        return re.sub(r"[^\w.-]+", "-", _stem(Path(whole)))

    named: dict[str, Path] = {}
    for path in files:
        if name(path) in named:
            raise ValueError(f"{path} and {named[name(path)]} would both be named {name(path)}: rename one")
        named[name(path)] = path
    return named


def _files_of(out: Path, name: str) -> tuple[Path, Path]:
    """Image and record of a prepared scan."""
    return out / "imagesTr" / f"{name}_0000.nii.gz", out / "prepared" / f"{name}.json"


def _facts(path: Path, skip: tuple[str, ...]) -> dict[str, object]:
    """What makes a prepared scan out of date when it changes."""
    return {"scan": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "skipped": list(skip)}


def _record(out: Path, name: str, path: Path, skip: tuple[str, ...]) -> dict | None:
    """The record of a scan that was prepared before, of the same bytes and with the same steps, else None."""
    image, record = _files_of(out, name)
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        return known if image.is_file() and _facts(path, skip).items() <= known.items() else None
    except (OSError, ValueError):
        return None


def _prepare_into(out: Path, name: str, path: Path, skip: tuple[str, ...], device: str, threads: int) -> dict | str:
    """Prepare one scan of a folder, image first, record last; the record, or what went wrong."""
    if threads:
        torch.set_num_threads(threads)
    image_path, record_path = _files_of(out, name)
    try:
        record_path.unlink(missing_ok=True)
        prepared = prepare_scan(path, skip, device)
        image = prepared.in_frame
        write_nifti(image_path, image[0, 0].numpy().astype(np.uint8), frame_affine(1))
        record = {
            "name": name,
            **_facts(path, skip),
            "shape": list(prepared.scan.shape),
            "spacing_mm": prepared.scan.spacing_mm.round(4).tolist(),
            "orientation": "".join(nib.aff2axcodes(prepared.scan.affine)),
            "brain_ml": round(prepared.brain_ml, 1),
            "template_correlation": round(template_correlation(image), 4),
            "frame_to_scan_mm": prepared.to_scan.tolist(),
            "seconds": prepared.seconds,
            "written": provenance.now(),
            "commit": provenance.commit(),
            "versions": provenance.versions(),
        }
        write_json(record_path, record)
        return record
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"


def _validation_people(names: Sequence[str], validation: int | None) -> list[str]:
    """The last names, held out: a tenth, 2 to 10, where None is given and at least 4 people are there."""
    if validation is None:
        validation = min(MOST_VALIDATION, max(2, len(names) // 10)) if len(names) >= 4 else 0
    if validation not in (0, *range(2, len(names) + 1)):
        raise ValueError(f"validation must be 0, or from 2 to the number of scans, {len(names)}; got {validation}")
    return list(names[len(names) - validation :])


def prepare_folder(
    folder: str | Path,
    out: str | Path,
    skip: Iterable[str] = (),
    jobs: int = 1,
    validation: int | None = None,
    name: str = "",
    device: str = "auto",
    progress: bool = True,
) -> tuple[Path, dict[str, str]]:
    """Make a folder of T1 scans into a cohort that :func:`lumirlib.load_cohort` reads.

    Each scan is written atomically, its record last, so that an interrupted call goes on where it stopped; a scan whose
    bytes or steps have changed is prepared anew. The dataset JSON and the QC sheet are written at the end.

    Args:
        folder: with `.nii` or `.nii.gz` files, at any depth, one scan a person.
        out: where the cohort goes: dataset.json, imagesTr, prepared (a record per scan), qc.csv, qc_*.png and .pdf.
        skip: as for :func:`prepare_scan`, of all scans.
        jobs: scans at a time, each in a process of its own with its share of the processor.
        validation: how many people, the last by name, are held out: their ordered pairs are the validation pairs.
            None takes a tenth, 2 to 10, where there are at least 4 scans.
        name: of the cohort; the folder's if empty.
        device: where skulls are stripped.
        progress: show a progress bar.

    Returns:
        Path of dataset.json, and the scans that could not be prepared -> why. They are left out and named in it.

    Raises:
        FileNotFoundError: no such folder, or no scan in it.
        ValueError: an unknown step, names that clash, or no scan that could be prepared.
        ModuleNotFoundError: a package that a step needs.
    """
    from lumirlib.qc import prepared_figures

    skipped, folder, out = check_skip(skip), Path(folder), Path(out)
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ValueError(f"jobs must be a whole number from 1, got {jobs!r}")
    scans = find_scans(folder, out)
    _validation_people(list(scans), validation)
    for step, package in (("strip", "deepbet"), ("bias", "SimpleITK"), ("affine", "SimpleITK")):
        if step not in skipped:
            require(package)
    device = str(pick_device(device))
    records = {one: found for one, path in scans.items() if (found := _record(out, one, path, skipped))}
    missing = {one: path for one, path in scans.items() if one not in records}
    broken: dict[str, str] = {}
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else 0
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) if jobs > 1 and missing else None
    with (
        pool or nullcontext(),
        tqdm(total=len(scans), initial=len(records), desc="prepare", unit="scan", disable=not progress) as bar,
    ):
        work = {one: partial(_prepare_into, out, one, path, skipped, device, threads) for one, path in missing.items()}
        try:
            for one, found in _results(work, pool):
                if isinstance(found, str):
                    broken[one] = found
                    tqdm.write(f"cannot be prepared: {scans[one]}: {found}", file=sys.stderr)
                else:
                    records[one] = found
                bar.update()
        except BrokenProcessPool as error:
            raise MemoryError("a process that prepared a scan was killed: memory? Take fewer --jobs") from error
        except KeyboardInterrupt:
            if pool:
                pool.shutdown(wait=False, cancel_futures=True)
            raise
    names = [one for one in scans if one in records]
    if not names:
        raise ValueError(f"none of the {len(scans)} scans in {folder} could be prepared")
    held_out = _validation_people(names, validation)
    entry = {one: f"./{_files_of(out, one)[0].relative_to(out).as_posix()}" for one in names}
    pairs = [{"fixed": entry[a], "moving": entry[b]} for a in held_out for b in held_out if a != b]
    content = {
        "name": name or folder.resolve().name,
        "description": "prepared by lumirlib: LUMIR frame (160x224x192, 1 mm, RAS, affine to ICBM152), uint8",
        "pairing": "unpaired",
        "modality": {"0": "MR"},
        "tensorImageSize": {"0": "3D"},
        "tensorImageShape": {"0": list(FRAME_SHAPE)},
        "skipped_steps": list(skipped),
        "left_out": broken,
        "numTraining": len(names) - len(held_out),
        "training": [{"image": entry[one]} for one in names if one not in held_out],
        "numValidation": len(pairs),
        "validation": pairs,
    }
    _write_table(out / "qc.csv", [records[one] for one in names])
    prepared_figures([(records[one], _files_of(out, one)[0]) for one in names], out, content["name"])
    return write_json(out / "dataset.json", content), broken


def _results(work: dict[str, partial], pool: ProcessPoolExecutor | None) -> Iterator[tuple[str, dict | str]]:
    """(name, result) of each piece of work, as they end."""
    if pool is None:
        yield from ((name, one()) for name, one in work.items())
        return
    futures = {pool.submit(one): name for name, one in work.items()}
    for future in as_completed(futures):
        yield futures[future], future.result()


def _write_table(path: Path, records: Sequence[dict]) -> None:
    import pandas as pd

    columns = ("name", "scan", "orientation", "shape", "spacing_mm", "brain_ml", "template_correlation")
    table = pd.DataFrame([{key: record[key] for key in columns} for record in records])
    write_atomically(path, lambda to: table.sort_values("template_correlation").to_csv(to, index=False))


# command line ---------------------------------------------------------------------------------------------------------

EXAMPLES = """examples:
  lumirlib prepare scans --out cohort                      heads as they come from the scanner
  lumirlib prepare scans --out cohort --jobs 4             four at a time
  lumirlib prepare brains --out cohort --skip strip bias   brains that are stripped and corrected already
  lumirlib run --cohort cohort/dataset.json --preset half  train on them
"""


def parser(prog: str = "python -m lumirlib.prepare") -> argparse.ArgumentParser:
    """The options of the command line."""
    options = argparse.ArgumentParser(
        prog=prog, description="Make a folder of T1 scans into a cohort in the LUMIR frame.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    options.add_argument("folder", help="folder with .nii or .nii.gz files, at any depth, one scan a person")
    options.add_argument("--out", required=True, help="folder of the cohort; an interrupted call goes on from there")
    options.add_argument("--skip", nargs="+", default=[], metavar="STEP", help=f"steps done before: {', '.join(STEPS)}")
    options.add_argument("--jobs", type=int, default=1, help="scans at a time")
    options.add_argument("--validation", type=int, help="people held out, the last by name; a tenth if not given")
    options.add_argument("--name", default="", help="of the cohort; the folder's if not given")
    options.add_argument("--device", default="auto", help="where skulls are stripped: auto, cpu, cuda ...")
    options.add_argument("--quiet", action="store_true", help="no progress bar")
    return options


def main(arguments: list[str] | None = None, prog: str = "python -m lumirlib.prepare") -> int:
    """Prepare a folder; the exit status is 0, 1 if a scan was left out, 2 for what cannot be used, 130 after Ctrl-C."""
    given = parser(prog).parse_args(arguments)
    try:
        path, broken = prepare_folder(given.folder, given.out, given.skip, given.jobs, given.validation, given.name,
                                      given.device, not given.quiet)  # fmt: skip
    except (ValueError, OSError, ModuleNotFoundError, MemoryError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    content = json.loads(path.read_text(encoding="utf-8"))
    print(f"{path}: {content['numTraining']} training scans, {content['numValidation']} validation pairs")
    print(f"look at {path.parent / 'qc_1.png'}, worst correlation with the template first")
    for name, error in broken.items():
        print(f"left out: {name}: {error}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    # of the module by its name: what is handed to other processes must be found there under it
    from lumirlib import prepare

    sys.exit(prepare.main())
