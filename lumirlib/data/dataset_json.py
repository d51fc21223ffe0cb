"""Dataset JSONs in the form of Learn2Reg: reading one, and finding what lies beside it."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lumirlib.data import embedded, frame
from lumirlib.data.cohort import LUMIR_JSON, Cohort, Pair, Subject, block_affine, grid_orientation
from lumirlib.data.entries import EntryReader, is_file
from lumirlib.data.identity import checksums
from lumirlib.data.nifti import MIN_EDGE_MM, read_grid
from lumirlib.files import read_json

BRAINS_VARIABLE = "LUMIR_BRAINS"

NAMED_COHORTS = ("embedded", "lumir", "brains")
#: Scans of the LUMIR task's training set.
LUMIR_SCANS = 3384

#: Whom to name beside figures made from a cohort whose JSON points elsewhere for it, by the JSON's name.
CREDITS = {
    "Real brains in the LUMIR frame": "training scans: OpenNeuro ds002748 (CC0); validation scans: OASIS; validation "
    "labels: MICCAI 2012 multi-atlas labelling, provided by Neuromorphometrics, Inc. "
    "(http://Neuromorphometrics.com/) under academic subscription (CC BY-NC); landmarks: AFIDs-OASIS",
}
#: Cohorts of which runs were committed when digests were of names and sizes: they keep the digest of then, under which
#: those runs are found. Digest of today -> digest of then, of the real brains.
EARLIER_DIGESTS = {"4120c9548869fa52": "4bfc82e735ad6024"}
MAX_LABEL = 32767
#: Labelled scans of which all ordered pairs are evaluated where the JSON names none; LUMIR has ten.
MAX_HELD_OUT = 100


def cohort_json(name_or_json: str | Path, resolution_mm: float | None, data_root: str | Path | None) -> Path:
    """The dataset JSON that a cohort's name stands for.

    Args:
        name_or_json: Name or path: "embedded", "lumir" (`data_root`/LUMIR_dataset.json), "brains" (the folder named by
            the environment variable LUMIR_BRAINS), or the path of a JSON.
        resolution_mm: Voxel size in mm for "embedded", which is made for one resolution.
        data_root: Folder for "lumir", and for a JSON name relative to it.
    """
    name = str(name_or_json)
    if name == "embedded":
        resolution = 4 if resolution_mm is None else resolution_mm
        if resolution not in frame.RESOLUTIONS_MM:
            raise ValueError(
                f"resolution_mm must be one of {frame.RESOLUTIONS_MM} for the embedded cohort, got {resolution}"
            )
        return embedded.embedded_json(int(resolution))
    if name == "lumir":
        if not data_root:
            raise ValueError(f"cohort 'lumir' needs data_root, the folder with {LUMIR_JSON}")
        return Path(data_root) / LUMIR_JSON
    if name == "brains":
        folder = os.environ.get(BRAINS_VARIABLE)
        if not folder:
            raise ValueError(f"cohort 'brains' needs the environment variable {BRAINS_VARIABLE}, a folder")
        return Path(folder) / "dataset.json"
    path = Path(name)
    if path.suffix != ".json":
        raise ValueError(
            f"cohort must be one of {', '.join(NAMED_COHORTS)} or the path of a .json, joined by '+'; got {name!r}"
        )
    if not path.is_absolute() and not path.is_file() and data_root and (Path(data_root) / path).is_file():
        return Path(data_root) / path
    return path


def load_cohort(
    name_or_json: str | Path = "embedded",
    resolution_mm: float | None = None,
    data_root: str | Path | None = None,
) -> Cohort:
    """Open a cohort; images are read later, on demand.

    Where some of the JSON's validation pairs carry labels, that list is taken, and what a pair lacks is not scored.
    Where none does (the official LUMIR list) but at least two scans of the "labelled" list, or some of the training
    scans, do (the challenge's sanity-check scans 3364 ... 3373), these are held out of training and all their ordered
    pairs are the validation pairs: the paper's "Val Dice" protocol. Where fewer than two unlabelled training scans
    would be left, none is held out. Scans under "validation" that are in no pair, as the paper's authors list them,
    count as labelled ones. Nobody of the pairs that the JSON lists, those under "test" included, is trained on.

    Args:
        name_or_json: Name or path: "embedded", "lumir", "brains", or the path of a Learn2Reg dataset JSON; several of
            them joined by "+", such as "brains+embedded", give the training scans of all, and the validation pairs of
            the last.
        resolution_mm: Voxel size to work at, in mm, a whole multiple of the files' own; None takes the files' own, and
            4 mm for the embedded cohort.
        data_root: Folder that the JSON's paths are relative to; None takes the JSON's own folder. Of joined cohorts
            it is for "lumir" and for JSONs.

    Returns:
        A :class:`Cohort`.

    Raises:
        FileNotFoundError: the JSON, or a file that it names, does not exist.
        ValueError: an unknown name, a malformed JSON, a path that leaves the data root, a resolution that does
            not fit, or joined cohorts that differ in their grids or share a scan.

    Warns:
        UserWarning: keys or folders that seem to hold something of the scans and are not understood.
    """
    names = joined_names(str(name_or_json))
    if len(names) > 1:
        return _join([load_cohort(name, resolution_mm, data_root if _has_root(name) else None) for name in names])
    path = cohort_json(name_or_json, resolution_mm, data_root)
    reader = EntryReader(path, Path(data_root) if data_root else path.parent, read_json(path))
    listed = _read_lists(reader)
    train, pairs = _hold_out(path, listed)
    first = next(iter([*train, *(pair.fixed for pair in pairs), *reader.subjects.values()]))
    resolution, factor, shape, affine = _grid(first.image, resolution_mm)
    about = _about(reader)
    digest, content_digest = _identity(reader)
    reader.warn_of_unknown()
    return Cohort(
        **about,
        path=path,
        resolution_mm=resolution,
        train=train,
        validation_pairs=pairs,
        listed_pairs=tuple(listed.pairs or listed.test),
        digest=digest,
        content_digest=content_digest,
        downsampling=factor,
        affine=affine @ block_affine(factor),
        shape=tuple(side // factor for side in shape),
    )


@dataclass(frozen=True)
class _Listed:
    """What a dataset JSON lists.

    Attributes:
        training: Scans under "training".
        labelled: Scans under "labelled".
        people: Scans under "validation" that are in no pair there, as the paper's authors list those with labels.
        pairs: Pairs under "validation".
        test: Pairs under "test" whose files are here.
    """

    training: list[Subject]
    labelled: list[Subject]
    people: list[Subject]
    pairs: list[Pair]
    test: list[Pair]


def _read_lists(reader: EntryReader) -> _Listed:
    labelled = [reader.subject(entry, what) for what, entry in reader.entries("labelled")]
    training = [reader.subject(entry, what) for what, entry in reader.entries("training")]
    people: list[Subject] = []
    pairs: list[Pair] = []
    for what, entry in reader.entries("validation"):
        if reader.is_person(entry):
            people.append(reader.subject(entry, what))
        else:
            pairs.append(reader.pair(entry, what))
    tests = [(what, entry) for what, entry in reader.entries("test") if not reader.is_person(entry)]
    here = [reader.pair_is_here(entry, what) for what, entry in tests]
    if any(here) and not all(here):
        reader.unknown["test"] = f"{here.count(False)} of {len(here)} 'test' pairs, whose files are not all here"
    test = [reader.pair(entry, what) for (what, entry), is_here in zip(tests, here, strict=True) if is_here]
    if not (training or pairs or people or labelled):
        raise ValueError(f"{reader.path}: names no 'training' scans and no 'validation' or 'registration_val' pairs")
    # every mention of an image may have added to what is known about it; what is listed twice counts once
    known = reader.subjects
    labelled, training, people = (
        list(dict.fromkeys(known[one.image] for one in scans)) for scans in (labelled, training, people)
    )
    pairs, test = (
        list(dict.fromkeys(Pair(known[pair.fixed.image], known[pair.moving.image]) for pair in listed))
        for listed in (pairs, test)
    )
    return _Listed(training, labelled, people, pairs, test)


def _hold_out(path: Path, listed: _Listed) -> tuple[tuple[Subject, ...], tuple[Pair, ...]]:
    """The scans to train on and the pairs to validate with; see :func:`load_cohort`."""
    pairs = listed.pairs
    if not any(pair.fixed.labels and pair.moving.labels for pair in pairs):
        named = [*listed.labelled, *listed.people]
        candidates = list(dict.fromkeys(subject for subject in (named or listed.training) if subject.labels))
        if len(candidates) < 2 and not pairs:
            candidates = listed.people
        left_to_train = len(set(listed.training) - set(candidates))
        if len(candidates) >= 2 and (named or left_to_train >= 2):
            if len(candidates) > MAX_HELD_OUT:
                raise ValueError(
                    f"{path}: names no validation pair with labels, and {len(candidates)} labelled scans, more than "
                    f"the {MAX_HELD_OUT} whose ordered pairs would all be evaluated: list the pairs as 'validation'"
                )
            pairs = [Pair(fixed, moving) for fixed in candidates for moving in candidates if fixed != moving]
    for filed in (pairs, listed.test):
        _check_names(path, filed)
    evaluated = {one for pair in (*pairs, *listed.pairs, *listed.test) for one in (pair.fixed, pair.moving)}
    held_out = {subject.image.resolve() for subject in (*evaluated, *listed.people)}
    train = tuple(subject for subject in listed.training if subject.image.resolve() not in held_out)
    return train, tuple(pairs)


def _grid(image: Path, resolution_mm: float | None) -> tuple[float, int, tuple[int, ...], np.ndarray]:
    """The cohort's resolution, voxels of an image per voxel of it along each axis, the image's own shape and affine."""
    shape, affine = read_grid(image)
    if len(shape) != 3 or min(shape) < 2:
        raise ValueError(f"{image}: expected a 3-D volume of at least 2 voxels a side, got shape {shape}")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not (spacing > 0).all() or not np.allclose(spacing, spacing[0], rtol=1e-3):
        raise ValueError(f"{image}: expected cubic voxels, got spacing {tuple(spacing.round(4).tolist())} mm")
    axes = affine[:3, :3] / spacing
    if not np.allclose(axes.T @ axes, np.eye(3), atol=1e-3):
        raise ValueError(f"{image}: expected axes at right angles, got the affine {affine.round(4).tolist()}")
    own = float(spacing.mean())
    if not MIN_EDGE_MM <= own < 1000:
        raise ValueError(
            f"{image}: expected voxels of {MIN_EDGE_MM} to 1000 mm, got {own:g} mm: does its unit (xyzt_units, without "
            "which it is the millimetre) fit its affine?"
        )
    wanted = own if resolution_mm is None else float(resolution_mm)
    if not 0 < wanted < 1000:
        raise ValueError(f"resolution_mm must be a voxel size in mm, got {resolution_mm}")
    factor = round(wanted / own)
    if factor < 1 or abs(factor * own - wanted) > 1e-3 * wanted or any(side % factor for side in shape):
        raise ValueError(
            f"resolution_mm must be a whole multiple of the files' {own:g} mm that divides their shape {shape}, "
            f"got {wanted:g}"
        )
    return wanted, factor, shape, affine


def _about(reader: EntryReader) -> dict[str, Any]:
    """Name, credit and other options of a dataset JSON, as fields of a cohort."""
    path, content = reader.path, reader.options
    for key, kind in (("name", str), ("simulated", bool)):
        if not isinstance(content.get(key, kind()), kind):
            raise ValueError(f"{path}: expected {kind.__name__} as {key!r}, got {content[key]!r}")
    maximum = content.get("intensitymaximum")
    is_number = isinstance(maximum, (int, float)) and not isinstance(maximum, bool)
    if maximum is not None and not (is_number and 0 < maximum < 1e6):
        raise ValueError(f"{path}: expected a number above 0 as 'intensity_maximum', got {maximum!r}")
    name = content.get("name", path.stem)
    return {
        "name": name,
        "simulated": content.get("simulated", False),
        "credit": CREDITS.get(name, str(content.get("licence", content.get("license", "")))),
        "intensity_maximum": maximum,
        "given_labels": _given_labels(path, content.get("labels")),
    }


def _given_labels(path: Path, given: object) -> tuple[int, ...] | None:
    """The numbers under "labels", background first: a list, or names by number, or numbers by name (nnU-Net)."""
    if isinstance(given, dict) and given and all(isinstance(part, dict) for part in given.values()):
        given = {key: name for part in given.values() for key, name in part.items()}  # by modality (Learn2Reg)
    numbers = given
    if isinstance(given, dict):
        by_number = all(str(key).isdecimal() for key in given)
        numbers = [int(key) for key in given] if by_number else list(given.values())
        numbers = [one for part in numbers for one in (part if isinstance(part, list) else [part])]  # regions
    numbers = [] if numbers in (None, "") else numbers
    if not isinstance(numbers, list) or not all(type(one) is int and 0 <= one <= MAX_LABEL for one in numbers):
        raise ValueError(
            f'{path}: expected label numbers from 0 to {MAX_LABEL} as \'labels\', [2, 3, 4] or {{"2": "a name"}}, '
            f"got {str(given)[:200]}"
        )
    return (0, *sorted(set(numbers) - {0})) if set(numbers) - {0} else None


def joined_names(name: str) -> list[str]:
    """The cohorts that a name joins; itself alone unless it does."""
    names = name.split("+")
    joins = all(part in NAMED_COHORTS or part.endswith(".json") for part in names) and not is_file(Path(name))
    return names if joins else [name]


def _has_root(name: str) -> bool:
    return name == "lumir" or name.endswith(".json")


def _join(parts: list[Cohort]) -> Cohort:
    """The last cohort, with the training scans of all.

    Raises:
        ValueError: other shapes, voxels or orientations, or a scan that two of them have: one that is trained on could
            be among the validation people.
    """
    last = parts[-1]
    seen: dict[Path, Cohort] = {}
    for part in parts:
        same_axes = np.allclose(part.affine[:3, :3], last.affine[:3, :3], atol=0.02 * last.resolution_mm)
        if part.shape != last.shape or not same_axes:
            raise ValueError(
                f"joined cohorts must have one grid (give resolution_mm): {part.path} has {part.shape} voxels of "
                f"{part.resolution_mm:g} mm in {grid_orientation(part.affine)}, {last.path} has {last.shape} of "
                f"{last.resolution_mm:g} mm in {grid_orientation(last.affine)}"
            )
        evaluated = (*part.validation_pairs, *part.listed_pairs)
        held_out = {subject for pair in evaluated for subject in (pair.fixed, pair.moving)}
        for image in {subject.image.resolve() for subject in (*part.train, *held_out)}:
            if image in seen:
                raise ValueError(
                    f"joined cohorts must not share scans: {image} is in {seen[image].path} and {part.path}"
                )
            seen[image] = part
    return replace(
        last,
        train=tuple(subject for part in parts for subject in part.train),
        joined=tuple(parts),
        credit="; ".join(dict.fromkeys(part.credit for part in parts if part.credit)),
        digest=_short_hash(" ".join(part.digest for part in parts).encode()),
        content_digest=_short_hash(" ".join(part.content_digest for part in parts).encode()),
        memory=OrderedDict(),
    )


def _check_names(path: Path, pairs: list[Pair]) -> None:
    """Raise where two pairs would have one name, by which results and submissions are filed."""
    named: dict[str, Pair] = {}
    for pair in pairs:
        other = named.setdefault(pair.name, pair)
        if other != pair:
            images = ", ".join(str(subject.image) for one in (other, pair) for subject in (one.fixed, one.moving))
            raise ValueError(f"{path}: two validation pairs would both be named {pair.name}: {images}")


def _identity(reader: EntryReader) -> tuple[str, str]:
    """The digest of a cohort, and that of its files' content alone."""
    subjects = sorted(reader.subjects.values(), key=lambda subject: subject.image)
    files = [(one.image, one.labels, one.landmarks, one.velocity) for one in subjects]
    found = checksums((file for group in files for file in group if file), str(reader.path.resolve()))
    lines = "".join(f"{file.name} {found[file]}\n" if file else "-\n" for group in files for file in group)
    text = reader.path.read_bytes()
    digest = _short_hash(text + lines.encode())
    if reader.options.get("simulated", False) and "population" in reader.options:  # whose recipe stands in the JSON
        digest = _short_hash(text)
    return EARLIER_DIGESTS.get(digest, digest), _short_hash(lines.encode())


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
