"""Dataset JSONs in the form of Learn2Reg: reading one, and finding what lies beside it."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from lumirlib.data import embedded, frame
from lumirlib.data.cohort import LUMIR_JSON, Cohort, Pair, Subject, block_affine, grid_orientation
from lumirlib.data.identity import checksums
from lumirlib.data.nifti import read_grid
from lumirlib.files import read_json

BRAINS_VARIABLE = "LUMIR_BRAINS"

NAMED_COHORTS = ("embedded", "lumir", "brains")
#: Scans of the LUMIR task's training set.
LUMIR_SCANS = 3384

LABEL_KEYS = ("seg", "label", "labels", "segmentation")

LANDMARK_KEYS = ("landmarks", "landmark", "keypoints")

VALIDATION_KEYS = ("validation", "registration_val")
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


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than the file system's, a loop of links
        return False


class _Reader:
    """Turns the entries of one dataset JSON into subjects."""

    def __init__(self, path: Path, root: Path, content: dict) -> None:
        self.path, self.root, self.content = path, root.resolve(), content
        self.subjects: dict[Path, Subject] = {}

    def resolve(self, text: object, what: str) -> Path:
        """A path of the JSON ("./x", "/x" and "x" all mean the data root's x) as a file that exists."""
        if not isinstance(text, str) or not text:
            raise ValueError(f"{self.path}: expected a path for {what}, got {text!r}")
        if "\0" in text or len(text) > 4096:
            raise ValueError(f"{self.path}: expected a path for {what}, got {text[:80]!r} of {len(text)} characters")
        relative = text.replace("\\", "/").lstrip("/")
        file = Path(os.path.normpath(self.root / relative))
        if not file.is_relative_to(self.root):
            raise ValueError(f"{self.path}: {what} names {text!r}, which leaves the data root {self.root}")
        if not _is_file(file):
            raise FileNotFoundError(f"{self.path} names {text!r} for {what}, but {file} does not exist")
        return file

    def subject(self, entry: object, what: str) -> Subject:
        """Subject of an entry: a path, or an object with "image" and perhaps labels and landmarks."""
        fields = entry if isinstance(entry, dict) else {"image": entry}
        if "image" not in fields:
            raise ValueError(f"{self.path}: {what} has no 'image', only {sorted(fields)}")
        image = self.resolve(fields["image"], what)
        known = self.subjects.get(image)
        subject = Subject(
            name=image.name.removesuffix(".gz").removesuffix(".nii").removesuffix("_0000"),
            image=image,
            labels=self._beside(fields, LABEL_KEYS, what, image, "labels", (".nii.gz",)),
            landmarks=self._beside(fields, LANDMARK_KEYS, what, image, "landmarks", (".json", ".nii.gz")),
            velocity=self.resolve(fields["velocity"], f"velocity of {what}") if fields.get("velocity") else None,
        )
        if known is not None:  # an image may be listed twice, once with its labels and once without
            subject = Subject(
                subject.name,
                image,
                known.labels or subject.labels,
                known.landmarks or subject.landmarks,
                known.velocity or subject.velocity,
            )
        self.subjects[image] = subject
        return subject

    def _beside(
        self, fields: dict, keys: tuple[str, ...], what: str, image: Path, folder: str, endings: tuple[str, ...]
    ) -> Path | None:
        for key in keys:
            if fields.get(key):
                return self.resolve(fields[key], f"{key} of {what}")
        # Learn2Reg's layout: imagesTr/NAME.nii.gz has its labels in labelsTr/NAME.nii.gz
        if image.parent.name.startswith("images"):
            sibling = image.parent.with_name(folder + image.parent.name.removeprefix("images"))
            for ending in endings:
                candidate = sibling / (image.name.removesuffix(".gz").removesuffix(".nii") + ending)
                if candidate.is_file():
                    return candidate
        return None

    def entries(self, key: str) -> Iterator[tuple[str, object]]:
        listed = self.content.get(key, [])
        if not isinstance(listed, list):
            raise ValueError(f"{self.path}: expected a list under {key!r}, got {type(listed).__name__}")
        for position, entry in enumerate(listed):
            yield f"{key}[{position}]", entry


def cohort_json(name_or_json: str | Path, resolution_mm: float | None, data_root: str | Path | None) -> Path:
    """The dataset JSON that a cohort's name stands for.

    Args:
        name_or_json: "embedded", "lumir" (`data_root`/LUMIR_dataset.json), "brains" (the folder named by the
            environment variable LUMIR_BRAINS), or the path of a JSON.
        resolution_mm: for "embedded", which is made for one resolution.
        data_root: for "lumir", and for a JSON name relative to it.
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
    would be left, none is held out.

    Args:
        name_or_json: "embedded", "lumir", "brains", or the path of a Learn2Reg dataset JSON; several of them joined by
            "+", such as "brains+embedded", give the training scans of all, and the validation pairs of the last.
        resolution_mm: voxel size to work at, a whole multiple of the files' own; None takes the files' own, and
            4 mm for the embedded cohort.
        data_root: folder that the JSON's paths are relative to; None takes the JSON's own folder. Of joined cohorts
            it is for "lumir" and for JSONs.

    Returns:
        A :class:`Cohort`.

    Raises:
        FileNotFoundError: the JSON, or a file that it names, does not exist.
        ValueError: an unknown name, a malformed JSON, a path that leaves the data root, a resolution that does
            not fit, or joined cohorts that differ in their grids or share a scan.
    """
    names = joined_names(str(name_or_json))
    if len(names) > 1:
        return _join([load_cohort(name, resolution_mm, data_root if _has_root(name) else None) for name in names])
    path = cohort_json(name_or_json, resolution_mm, data_root)
    content = read_json(path)
    reader = _Reader(path, Path(data_root) if data_root else path.parent, content)
    labelled = [reader.subject(entry, what) for what, entry in reader.entries("labelled")]
    training = [reader.subject(entry, what) for what, entry in reader.entries("training")]
    pairs: list[Pair] = []
    for key in VALIDATION_KEYS:
        for what, entry in reader.entries(key):
            if not isinstance(entry, dict) or not {"fixed", "moving"} <= entry.keys():
                raise ValueError(f"{path}: {what} must have 'fixed' and 'moving', got {entry!r}")
            sides = []
            for side in ("fixed", "moving"):
                named = {k.removeprefix(f"{side}_"): v for k, v in entry.items() if k.startswith(f"{side}_")}
                given = entry[side] if isinstance(entry[side], dict) else {"image": entry[side], **named}
                sides.append(reader.subject(given, f"{side} of {what}"))
            if sides[0].image == sides[1].image:
                raise ValueError(f"{path}: {what} has one image as 'fixed' and 'moving', {sides[0].image}")
            pairs.append(Pair(*sides))
    if not training and not pairs and not labelled:
        raise ValueError(f"{path}: names no 'training' scans and no {' or '.join(map(repr, VALIDATION_KEYS))} pairs")
    # every mention of an image may have added to what is known about it
    labelled, training = ([reader.subjects[s.image] for s in listed] for listed in (labelled, training))
    pairs = [Pair(reader.subjects[pair.fixed.image], reader.subjects[pair.moving.image]) for pair in pairs]
    pairs = list(dict.fromkeys(pairs))  # listed twice, counted once, as training scans are
    held_out = {subject.image for pair in pairs for subject in (pair.fixed, pair.moving)}
    if not any(pair.fixed.labels and pair.moving.labels for pair in pairs):
        candidates = list(dict.fromkeys(subject for subject in (labelled or training) if subject.labels))
        left_to_train = len(set(training) - set(candidates))
        if len(candidates) >= 2 and (labelled or left_to_train >= 2):
            if len(candidates) > MAX_HELD_OUT:
                raise ValueError(
                    f"{path}: names no validation pair with labels, and {len(candidates)} labelled scans, more than "
                    f"the {MAX_HELD_OUT} whose ordered pairs would all be evaluated: list the pairs as 'validation'"
                )
            pairs = [Pair(fixed, moving) for fixed in candidates for moving in candidates if fixed != moving]
    _check_names(path, pairs)
    held_out |= {subject.image for pair in pairs for subject in (pair.fixed, pair.moving)}
    train = tuple(subject for subject in dict.fromkeys(training) if subject.image not in held_out)
    first = next(iter([*train, *(pair.fixed for pair in pairs), *training, *labelled]))
    shape, affine = _grid_of(first.image)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not (spacing > 0).all() or not np.allclose(spacing, spacing[0], rtol=1e-3):
        raise ValueError(f"{first.image}: expected cubic voxels, got spacing {tuple(spacing.round(4).tolist())} mm")
    axes = affine[:3, :3] / spacing
    if not np.allclose(axes.T @ axes, np.eye(3), atol=1e-3):
        raise ValueError(f"{first.image}: expected axes at right angles, got the affine {affine.round(4).tolist()}")
    own = float(spacing.mean())
    if not own < 1000:
        raise ValueError(f"{first.image}: expected voxels below 1000 mm, got {own:g} mm: does its unit fit its affine?")
    wanted = own if resolution_mm is None else float(resolution_mm)
    if not 0 < wanted < 1000:
        raise ValueError(f"resolution_mm must be a voxel size in mm, got {resolution_mm}")
    factor = round(wanted / own)
    if factor < 1 or abs(factor * own - wanted) > 1e-3 * wanted or any(side % factor for side in shape):
        raise ValueError(
            f"resolution_mm must be a whole multiple of the files' {own:g} mm that divides their shape {shape}, "
            f"got {wanted:g}"
        )
    for key, kind in (("name", str), ("simulated", bool)):
        if not isinstance(content.get(key, kind()), kind):
            raise ValueError(f"{path}: expected {kind.__name__} as {key!r}, got {content[key]!r}")
    maximum = content.get("intensity_maximum")
    if maximum is not None and (
        isinstance(maximum, bool) or not isinstance(maximum, (int, float)) or not 0 < maximum < 1e6
    ):
        raise ValueError(f"{path}: expected a number above 0 as 'intensity_maximum', got {maximum!r}")
    name = content.get("name", path.stem)
    digest, content_digest = _identity(path, content, reader)
    return Cohort(
        name=name,
        path=path,
        resolution_mm=wanted,
        simulated=content.get("simulated", False),
        train=train,
        validation_pairs=tuple(pairs),
        credit=CREDITS.get(name, str(content.get("licence", content.get("license", "")))),
        digest=digest,
        content_digest=content_digest,
        downsampling=factor,
        affine=affine @ block_affine(factor),
        shape=tuple(side // factor for side in shape),
        intensity_maximum=maximum,
        given_labels=_given_labels(path, content),
    )


def _given_labels(path: Path, content: dict) -> tuple[int, ...] | None:
    """The numbers under "labels", background first: a list, or names by number, or numbers by name (nnU-Net)."""
    given = content.get("labels")
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
    joins = all(part in NAMED_COHORTS or part.endswith(".json") for part in names) and not _is_file(Path(name))
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
        held_out = {subject for pair in part.validation_pairs for subject in (pair.fixed, pair.moving)}
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


def _identity(path: Path, content: dict, reader: _Reader) -> tuple[str, str]:
    """The digest of a cohort, and that of its files' content alone."""
    subjects = sorted(reader.subjects.values(), key=lambda subject: subject.image)
    files = [(one.image, one.labels, one.landmarks, one.velocity) for one in subjects]
    found = checksums((file for group in files for file in group if file), str(path.resolve()))
    lines = "".join(f"{file.name} {found[file]}\n" if file else "-\n" for group in files for file in group)
    text = path.read_bytes()
    digest = _short_hash(text + lines.encode())
    if content.get("simulated", False) and "population" in content:  # whose recipe stands in the JSON
        digest = _short_hash(text)
    return EARLIER_DIGESTS.get(digest, digest), _short_hash(lines.encode())


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _grid_of(path: Path) -> tuple[tuple[int, int, int], np.ndarray]:
    """Shape and affine from a NIfTI header alone."""
    shape, affine = read_grid(path)
    if len(shape) != 3 or min(shape) < 2:
        raise ValueError(f"{path}: expected a 3-D volume of at least 2 voxels a side, got shape {shape}")
    return shape, affine
