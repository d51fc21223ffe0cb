"""Submissions to the challenge: written from any method, checked before upload, scored where labels exist.

A submission is one zip of `disp_<fixed>_<moving>.nii.gz`, four-digit case numbers, each ``(D, H, W, 3)`` or
``(3, D, H, W)``: displacements in voxels, in the order of the array's axes, as ``scipy.ndimage.map_coordinates`` takes
them (:mod:`lumirlib.data.field_formats` has others).
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import re
import shutil
import struct
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from lumirlib import spatial
from lumirlib._checks import check_finite
from lumirlib.data import Cohort, Pair, field_formats, load_cohort
from lumirlib.data.nifti import parse_nifti, write_nifti
from lumirlib.evaluation import Method, evaluate_method
from lumirlib.files import check_writable, check_writable_file, read_json, write_atomically, write_json
from lumirlib.metrics import tre_per_landmark_mm
from lumirlib.study.method_digest import method_digest

#: What a NIfTI file holds besides its voxels, at most, in bytes.
HEADER_BYTES = 1 << 20
#: What zipfile, gzip and zlib raise for a broken file, an encrypted one and one of a later version.
BROKEN_ZIP = (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError, struct.error, ArithmeticError)
#: Parts of a dataset JSON that the test phase does not need: what they name is not mounted there.
UNUSED_IN_TEST = ("training", "numTraining", "test", "numTest", "validation", "numValidation", "labelled", "simulated")
#: A misreading is named when it aligns the images this much better than the file as it is (correlation, 0 to 1).
MARGIN = 0.01


def case_number(name: str) -> str:
    """Four-digit number of a case by the last number in its name; "LUMIRMRI_3455" is "3455".

    Raises:
        ValueError: no number, or one of more than four digits.
    """
    found = re.findall(r"\d+", name)
    if not found or len(found[-1].lstrip("0")) > 4:
        raise ValueError(f"{name!r} has no case number of up to four digits, which a submission's file names need")
    return found[-1].lstrip("0").zfill(4)


def file_name(pair: Pair) -> str:
    """Name of a pair's file in a submission."""
    return f"disp_{case_number(pair.fixed.name)}_{case_number(pair.moving.name)}.nii.gz"


def files_of(pairs: tuple[Pair, ...]) -> dict[str, Pair]:
    """The files that a submission for these pairs has; ValueError if two pairs would share one."""
    found: dict[str, Pair] = {}
    for pair in pairs:
        name = file_name(pair)
        if name in found:
            raise ValueError(f"{pair.name} and {found[name].name} would both be {name}: case numbers must differ")
        found[name] = pair
    return found


def write_submission(
    method: Method,
    cohort: Cohort,
    path: str | Path,
    pairs: tuple[Pair, ...] | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Path:
    """Run a method on every pair and pack the displacements.

    The files are written beside the zip first, in `<zip's name>.parts`, and removed when the zip is whole, so that an
    interrupted call goes on where it stopped. Each file's header (`descrip`) holds a digest of method and cohort: what
    another method, or this one on other images, has left there is made anew.

    Args:
        method: Function ``method(fixed, moving) -> displacement``; a network is one.
        cohort: Cohort at the resolution that the method works at. The displacements are written on the files' own
            voxels, 1 mm for LUMIR, carried there by :func:`lumirlib.spatial.to_finer_grid`.
        path: Path of the zip.
        pairs: Pairs to register; all of :attr:`lumirlib.data.Cohort.submission_pairs` if None.
        device: Device that the method runs on.
        progress: Whether to show a progress bar.

    Returns:
        `path`.

    Raises:
        ValueError: case numbers that cannot be told apart, a path that does not end in .zip, or a displacement that
            is not finite or of the wrong shape.
        OSError: the zip cannot be written, said before the method runs.
    """
    path = Path(path)
    if path.suffix != ".zip":
        raise ValueError(f"path must end in .zip, got {path.name}")
    parts, chosen = path.with_suffix(".parts"), cohort.submission_pairs if pairs is None else pairs
    files = files_of(chosen)
    check_writable_file(path)
    digest = write_displacements(method, cohort, parts, chosen, device, progress)

    def pack(to: Path) -> None:
        for name in files:
            if _digest_in(parts / name) != digest:
                raise ValueError(f"{parts / name}: another call writes there at the same time; wait until it ends")
        with zipfile.ZipFile(to, "w", zipfile.ZIP_STORED) as archive:  # the parts are compressed already
            for name in files:
                archive.write(parts / name, name)

    write_atomically(path, pack)
    shutil.rmtree(parts)  # what killed writers have left there too
    return path


def write_displacements(
    method: Method,
    cohort: Cohort,
    folder: str | Path,
    pairs: tuple[Pair, ...],
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> str:
    """Run a method on pairs and write a file of :func:`files_of` for each, as for :func:`write_submission`.

    Returns:
        The digest of method and cohort, which stands in the header of each file. Files that have it are kept.

    Raises:
        ValueError: as for :func:`write_submission`.
        OSError: the folder cannot be written, said before the method runs.
    """
    folder, files, affine = Path(folder), files_of(pairs), cohort.at_own_resolution.affine
    check_writable(folder)
    if isinstance(method, torch.nn.Module):
        method.eval()
    digest = _digest_of(method, cohort)
    others = [name for name in files if (folder / name).is_file() and _digest_in(folder / name) != digest]
    if others:
        tqdm.write(
            f"{folder}: {len(others)} of the displacements there, {others[0]} for one, are another method's or of "
            "other images; they are made anew",
            file=sys.stderr,
        )
    for name, pair in tqdm(files.items(), desc="submission", unit="pair", disable=not progress):
        if (folder / name).is_file() and name not in others:
            continue
        fixed, moving = (cohort.image(subject).to(device) for subject in (pair.fixed, pair.moving))
        with torch.no_grad():
            displacement = method(fixed, moving).float().cpu()
        if displacement.shape != (1, 3, *cohort.shape) or not torch.isfinite(displacement).all():
            raise ValueError(
                f"the method must give finite displacements of {(1, 3, *cohort.shape)}, got "
                f"{tuple(displacement.shape)} for {pair.name}"
            )
        array = field_formats.voxel_to_channels_last(spatial.to_finer_grid(displacement, cohort.downsampling))
        write_nifti(folder / name, array, affine, description=digest)
    return digest


# the test phase -------------------------------------------------------------------------------------------------------
#: Lists of pairs in a dataset JSON, the first that is there counts.
PAIR_LISTS = ("validation", "test")


def find_dataset_json(folder: str | Path) -> Path:
    """The dataset JSON of the test phase: in the folder of the images, or, as the challenge mounts it, beside it.

    Raises:
        FileNotFoundError: no such folder, or no `*dataset*.json` there.
        ValueError: several.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder of images: {folder}")
    for place in (folder, folder.parent):
        found = sorted(place.glob("*dataset*.json"))
        if len(found) > 1:
            raise ValueError(f"{place} has several dataset JSONs: {', '.join(path.name for path in found)}; name one")
        if found:
            return found[0]
    raise FileNotFoundError(f"no *dataset*.json in {folder} or beside it, expected LUMIR_dataset.json; name one")


def load_test_pairs(json_path: str | Path, folder: str | Path, resolution_mm: float) -> Cohort:
    """The pairs of a dataset JSON, of whose other lists nothing needs to be there.

    Args:
        json_path: Dataset JSON, with "fixed" and "moving" of each pair under "validation" or else "test".
        folder: Folder that the paths in the JSON are relative to.
        resolution_mm: Edge of the voxels that are registered.

    Raises:
        FileNotFoundError: no such JSON or image.
        ValueError: no pairs, or a JSON or an image that cannot be read.
    """
    json_path = Path(json_path)
    content = read_json(json_path)
    kept = {key: value for key, value in content.items() if key not in UNUSED_IN_TEST}
    pairs = next((content[key] for key in PAIR_LISTS if content.get(key)), None)
    if not pairs:
        raise ValueError(f"{json_path}: expected pairs of fixed and moving under {' or '.join(PAIR_LISTS)}, got none")
    kept |= {"training": [], "numTraining": 0, "validation": pairs, "numValidation": len(pairs)}
    with tempfile.TemporaryDirectory() as place:
        return load_cohort(write_json(Path(place) / json_path.name, kept), resolution_mm, folder)


def _digest_of(method: Method, cohort: Cohort) -> str:
    """What the files of a submission must agree in to stand in one zip."""
    what = f"{method_digest(method)} {cohort.digest} {cohort.resolution_mm}"
    return f"lumirlib {hashlib.sha256(what.encode()).hexdigest()[:16]}"


def _digest_in(path: Path) -> str:
    """The digest in a displacement's header; empty for a file of another origin."""
    try:
        return bytes(nib.load(path).header["descrip"].item()).decode("ascii", "replace")
    except (nib.filebasedimages.ImageFileError, KeyError, *BROKEN_ZIP):
        return ""


def _open(path: str | Path) -> zipfile.ZipFile:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such submission: {path}")
    try:
        return zipfile.ZipFile(path)
    except (*BROKEN_ZIP, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} as a zip (truncated?): {error}") from error


def _read_array(archive: zipfile.ZipFile, member: str, shape: tuple[int, ...]) -> np.ndarray:
    """Array of a member, read in memory and never more of it than a field of `shape` can need."""
    limit = int(np.prod(shape)) * 3 * 8 + HEADER_BYTES
    about = archive.getinfo(member)
    if about.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others take the memory they ask for
        raise ValueError(
            f"{member}: cannot be unpacked: expected it stored or deflated, got method {about.compress_type}"
        )
    if about.file_size > limit:
        raise ValueError(f"{member}: has {about.file_size} bytes, more than the {limit} of a field of {shape} voxels")
    try:
        with archive.open(about) as packed, gzip.GzipFile(fileobj=packed) as stream:
            content = stream.read(limit + 1)
    except BROKEN_ZIP as error:
        raise ValueError(f"{member}: cannot be unpacked (truncated, encrypted or not gzip?): {error}") from error
    if len(content) > limit:
        raise ValueError(f"{member}: unpacks to more than {limit} bytes, which no field of {shape} voxels needs")
    return parse_nifti(content, member)


def _as_displacement(array: np.ndarray, shape: tuple[int, ...], member: str) -> torch.Tensor:
    with np.errstate(over="ignore"):  # what float32 does not hold becomes infinite, and is refused as such
        if array.shape == (*shape, 3):
            return field_formats.channels_last_to_voxel(array)
        if array.shape == (3, *shape):
            return field_formats.channels_first_to_voxel(array)
    raise ValueError(f"{member}: expected shape {(*shape, 3)} or {(3, *shape)}, got {array.shape}")


def read_submission(path: str | Path, cohort: Cohort, pairs: tuple[Pair, ...] | None = None) -> Iterator:
    """Pairs of a cohort and their displacements ``(1, 3, D, H, W)`` in voxels, one after another.

    Nothing is unpacked to disk.

    Raises:
        FileNotFoundError: no such zip.
        ValueError: a file that is missing, broken, or of another shape.
    """
    with _open(path) as archive:
        present = Counter(archive.namelist())
        for name, pair in files_of(cohort.submission_pairs if pairs is None else pairs).items():
            if present[name] != 1:
                raise ValueError(f"{path}: {name} is {f'there {present[name]} times' if present[name] else 'missing'}")
            displacement = _as_displacement(_read_array(archive, name, cohort.shape), cohort.shape, name)
            check_finite(displacement, f"{path}: {name}")
            yield pair, displacement


def score_submission(
    path: str | Path,
    cohort: Cohort,
    pairs: tuple[Pair, ...] | None = None,
    ndv_mask: str = "moving",
    progress: bool = True,
) -> pd.DataFrame:
    """Score the files of a zip: the long table of :func:`lumirlib.evaluation.evaluate_method`.

    Warns once of all landmarks that the warping loses. Our TRE leaves them out; the official one becomes NaN.
    """
    chosen = cohort.submission_pairs if pairs is None else pairs
    displacements = read_submission(path, cohort, chosen)
    lost: list[str] = []

    def submitted(fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        pair, displacement = next(displacements)
        lost.extend(f"{name} of {pair.name}" for name in _lost_landmarks(cohort, pair, displacement))
        return displacement

    table = evaluate_method(
        submitted,
        cohort,
        chosen,
        ndv_mask=ndv_mask,
        progress=progress,
        description="score submission",
    )
    if lost:
        warnings.warn(
            f"{path}: the warping loses {len(lost)} landmark(s): {', '.join(lost)}. The TRE here leaves them out; the "
            "official evaluation takes a plain mean, so that TRE of the pair and of the submission would be NaN there",
            stacklevel=2,
        )
    return table


def _lost_landmarks(cohort: Cohort, pair: Pair, displacement: torch.Tensor) -> list[str]:
    """Names of the landmarks that the warped volume no longer has."""
    scoring = cohort.at_own_resolution
    volumes = scoring.landmark_volumes(pair)
    if volumes is None:
        return []
    fixed, moving = volumes
    on_files = spatial.to_finer_grid(displacement, cohort.downsampling // scoring.downsampling)
    distances = tre_per_landmark_mm(spatial.warp(moving, on_files, mode="nearest"), fixed)
    return [name for name, mm in zip(scoring.landmark_points(pair.fixed) or (), distances, strict=True) if np.isnan(mm)]


# validation ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Problem:
    """Something about a submission that its author should know.

    Attributes:
        file: Name in the zip; empty for the zip itself.
        kind: Kind of the problem: "missing", "extra", "name", "duplicate", "unreadable", "shape", "dtype", "not
            finite", "transposed", "normalized", "millimetres", "direction", "worse than nothing" or "too large".
        message: Message that says what is wrong, what was expected, what came.
        fatal: Whether it makes the submission unfit; False for a remark.
    """

    file: str
    kind: str
    message: str
    fatal: bool = True


def validate_submission(
    path: str | Path, cohort: Cohort, pairs: tuple[Pair, ...] | None = None, progress: bool = True
) -> list[Problem]:
    """What is wrong with a submission, by its names, its files, and what its fields do to the images.

    A field is read in every way that mistakes make (:func:`misreadings`); where one of them aligns the warped moving
    image with the fixed one clearly better than the field as it is, that mistake is named.

    Args:
        path: Path of the zip.
        cohort: Cohort that it is for.
        pairs: Pairs that it should hold; all of :attr:`lumirlib.data.Cohort.submission_pairs` if None.
        progress: Whether to show a progress bar.

    Returns:
        Findings, none if all is well.

    Raises:
        FileNotFoundError: no such zip.
        ValueError: not a zip.
    """
    expected = files_of(cohort.submission_pairs if pairs is None else pairs)
    findings: list[Problem] = []
    with _open(path) as archive:
        members = Counter(archive.namelist())
        for name in sorted(name for name, count in members.items() if count > 1):
            findings.append(Problem(name, "duplicate", f"{name} is in the zip {members[name]} times"))
        for name in sorted(members.keys() - expected.keys()):
            findings.append(_misplaced(name, expected))
        for name in sorted(expected.keys() - members.keys()):
            findings.append(Problem(name, "missing", f"{name} (pair {expected[name].name}) is missing"))
        for name in tqdm(
            [name for name in expected if name in members], desc="validate", unit="pair", disable=not progress
        ):
            findings += _check_file(archive, name, cohort, expected[name])
    return findings


def _misplaced(name: str, expected: dict[str, Pair]) -> Problem:
    inner = name.replace("\\", "/").rsplit("/", 1)[-1]
    if name.endswith("/"):
        return Problem(name, "extra", f"{name} is a folder; the files must lie at the top of the zip")
    if inner in expected:
        return Problem(name, "name", f"{name} lies in a folder; expected {inner} at the top of the zip")
    match = re.fullmatch(r"disp_(\d{4})_(\d{4})\.nii\.gz", inner)
    if match and f"disp_{match[2]}_{match[1]}.nii.gz" in expected:
        return Problem(name, "name", f"{name} has fixed and moving exchanged; expected disp_<fixed>_<moving>.nii.gz")
    if match:
        return Problem(name, "extra", f"{name} is of a pair that is not asked for")
    return Problem(name, "name", f"{name} is not named disp_<fixed>_<moving>.nii.gz with four-digit case numbers")


def _check_file(archive: zipfile.ZipFile, name: str, cohort: Cohort, pair: Pair) -> list[Problem]:
    shape = cohort.shape
    try:
        array = _read_array(archive, name, shape)
    except ValueError as error:
        return [Problem(name, "unreadable", str(error))]
    found = []
    if array.shape not in ((*shape, 3), (3, *shape)):
        message = f"{name}: expected shape {(*shape, 3)} or {(3, *shape)}, got {array.shape}"
        if sorted(array.shape) == sorted((*shape, 3)):
            return [Problem(name, "transposed", f"{message}: the axes are in another order")]
        return [Problem(name, "shape", message)]
    if array.dtype.kind != "f":
        found.append(Problem(name, "dtype", f"{name}: expected floating-point displacements, got {array.dtype}"))
    displacement = _as_displacement(array.astype(np.float64), shape, name)
    bad = int((~torch.isfinite(displacement)).sum())
    if bad:
        return [*found, Problem(name, "not finite", f"{name}: {bad} displacements are NaN or infinite")]
    return found + _check_effect(name, displacement, cohort, pair)


def misreadings(displacement: torch.Tensor, affine: np.ndarray) -> dict[tuple[str, str], torch.Tensor]:
    """A field as it would have to be read if its author had made a mistake: (kind, words) -> displacement in voxels.

    Args:
        displacement: Displacement ``(1, 3, D, H, W)``, as it stands in the file.
        affine: Matrix 4 x 4 of the fixed image, voxels to RAS in mm.
    """
    sides = displacement.shape[2:]
    found: dict[tuple[str, str], torch.Tensor] = {}
    for order in itertools.permutations(range(3)):
        if order != (0, 1, 2):
            words = f"its components are in the order {', '.join('ijk'[axis] for axis in order)} instead of i, j, k"
            found["transposed", words] = displacement[:, [order.index(axis) for axis in range(3)]]
    flow = displacement.movedim(1, -1)
    words = "it is in grid_sample's normalized units, components k, j, i"
    found["normalized", words] = field_formats.grid_sample_to_voxel(flow)
    halves = torch.tensor([(side - 1) / 2 for side in sides]).view(1, 3, 1, 1, 1)
    found["normalized", "it is in normalized units, -1 to 1 across the volume"] = displacement * halves
    words = "it is in mm along LPS axes, as ITK and ANTs store it"
    found["millimetres", words] = field_formats.itk_to_voxel(flow[0].numpy(), affine)
    spacing = torch.tensor(np.linalg.norm(affine[:3, :3], axis=0), dtype=torch.float32).view(1, 3, 1, 1, 1)
    found["millimetres", "it is in mm instead of voxels"] = displacement / spacing
    found["direction", "it points the other way: it carries fixed onto moving"] = -displacement
    return found


def _check_effect(name: str, displacement: torch.Tensor, cohort: Cohort, pair: Pair) -> list[Problem]:
    fixed, moving = cohort.image(pair.fixed), cohort.image(pair.moving)
    largest = float(displacement.norm(dim=1).max())
    if largest == 0:
        return [Problem(name, "worse than nothing", f"{name}: every displacement is zero", False)]
    before = _alignment(moving, fixed)
    as_it_is = _alignment(spatial.warp(moving, displacement), fixed)
    others = {
        key: _alignment(spatial.warp(moving, field), fixed)
        for key, field in misreadings(displacement, cohort.affine).items()
    }
    (kind, words), best = max(others.items(), key=lambda item: item[1])
    effect = f"correlation with the fixed image {as_it_is:.4f} as it is, {before:.4f} without it"
    if best > max(as_it_is, before) + MARGIN:
        return [Problem(name, kind, f"{name}: it looks as if {words} ({effect}, {best:.4f} when read so)")]
    if largest > max(cohort.shape):
        words = f"the largest displacement is {largest:.0f} voxels, more than the volume's side"
        return [Problem(name, "too large", f"{name}: {words} ({effect})")]
    if as_it_is < before - MARGIN:
        return [Problem(name, "worse than nothing", f"{name}: it moves the images apart ({effect})")]
    return []


def _alignment(warped: torch.Tensor, fixed: torch.Tensor) -> float:
    """Pearson correlation of two images where either is not zero, after a light smoothing that quiets noise."""
    warped, fixed = (F.avg_pool3d(image, 2) if min(image.shape[2:]) >= 8 else image for image in (warped, fixed))
    inside = (warped > 0) | (fixed > 0)
    values = torch.stack([warped[inside], fixed[inside]]).double()
    values = values - values.mean(1, keepdim=True)
    scale = values.norm(dim=1).prod()
    return float((values[0] * values[1]).sum() / scale) if scale > 0 else 0.0
