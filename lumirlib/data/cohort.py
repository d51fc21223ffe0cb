"""Cohorts: Learn2Reg dataset JSONs, read through one interface whatever dialect they are written in.

Three cohorts, one format: the embedded (simulated) one, real brains, and the challenge's own LUMIR download.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

from lumirlib import spatial
from lumirlib.data import embedded
from lumirlib.data.cache import Source, StoredVolume, VolumeCache
from lumirlib.data.nifti import read_grid, read_label_volume, read_nifti, read_volume
from lumirlib.files import read_json
from lumirlib.labels import LUMIR_LABELS
from lumirlib.metrics.landmarks import Points, landmark_volume

LUMIR_JSON = "LUMIR_dataset.json"
BRAINS_VARIABLE = "LUMIR_BRAINS"
NAMED_COHORTS = ("embedded", "lumir", "brains")
LABEL_KEYS = ("seg", "label", "labels", "segmentation")
LANDMARK_KEYS = ("landmarks", "landmark", "keypoints")
VALIDATION_KEYS = ("validation", "registration_val")
#: Whom to name beside figures made from a cohort whose JSON points elsewhere for it, by the JSON's name.
CREDITS = {
    "Real brains in the LUMIR frame": "training scans: OpenNeuro ds002748 (CC0); validation scans: OASIS; validation "
    "labels: MICCAI 2012 multi-atlas labelling, provided by Neuromorphometrics, Inc. "
    "(http://Neuromorphometrics.com/) under academic subscription (CC BY-NC); landmarks: AFIDs-OASIS",
}
#: Voxels that a label needs to be scored on a grid coarser than 1 mm.
SMALLEST_LABEL = 8
#: Voxel coordinates of landmarks are below this.
MOST_COORDINATE = 1e6
#: Landmarks of one person, which are few; an image in their place has as many as gray values.
MOST_LANDMARKS = 1000
#: Labelled scans of which all ordered pairs are evaluated where the JSON names none; LUMIR has ten.
MOST_HELD_OUT = 100
#: Downsampled volumes kept in memory by one cohort, in bytes.
MEMORY_BUDGET = 2 * 1024**3
#: A loader's threads read too. Of the module, so that cohorts can be pickled.
_MEMORY_LOCK = threading.Lock()


@dataclass(frozen=True)
class Subject:
    """One scan of a cohort and what is known about it; the files are read on demand.

    Attributes:
        name: the file name of the image without `.nii.gz` and without Learn2Reg's modality suffix `_0000`.
        image: path of the image.
        labels: path of the label volume, or None.
        landmarks: path of the landmarks (label volume, or JSON of points), or None.
        velocity: path of the simulated person's velocity, or None.
    """

    name: str
    image: Path
    labels: Path | None = None
    landmarks: Path | None = None
    velocity: Path | None = None


@dataclass(frozen=True)
class Pair:
    """A fixed and a moving subject."""

    fixed: Subject
    moving: Subject

    @property
    def name(self) -> str:
        """`<fixed>_<moving>`, as in Learn2Reg's displacement files."""
        return f"{self.fixed.name}_{self.moving.name}"


@dataclass
class Cohort:
    """Training scans, validation pairs and labels of one dataset JSON, at one resolution.

    Attributes:
        name: the JSON's own name.
        path: the JSON.
        resolution_mm: edge of a voxel of everything that is loaded, in mm.
        simulated: True for the embedded cohort; every table made from it says so.
        train: subjects to train on; never one of a validation pair.
        validation_pairs: the pairs to evaluate.
        credit: who is to be named beside figures made from it.
        downsampling: voxels of the files per voxel of the cohort, along each axis.
        affine: voxel-to-world matrix of the cohort's grid, in mm.
        shape: sides (D, H, W) of the cohort's grid.
        digest: 16 hexadecimal digits of the JSON and, for real scans, of the sizes of the files that it names.
        cache: the memory-mapped volumes that are read in place of the files, or None: see :meth:`with_cache`.
        joined: the cohorts whose training scans it has, where they are of several; all else is that of the last.
    """

    name: str
    path: Path
    resolution_mm: float
    simulated: bool
    train: tuple[Subject, ...]
    validation_pairs: tuple[Pair, ...]
    credit: str
    downsampling: int
    affine: np.ndarray
    shape: tuple[int, int, int]
    digest: str
    cache: VolumeCache | None = None
    joined: tuple[Cohort, ...] = ()
    _memory: OrderedDict[Path, torch.Tensor] = field(default_factory=OrderedDict, repr=False)

    @property
    def short_name(self) -> str:
        """Name for files and tables: "embedded", "lumir", or the folder of the JSON; of joined cohorts "a+b"."""
        if self.joined:
            return "+".join(part.short_name for part in self.joined)
        if self.simulated:
            return "embedded"
        if self.path.name == LUMIR_JSON:
            return "lumir"
        folder = self.path.resolve().parent.name
        return "".join(letter if letter.isalnum() or letter in "-." else "-" for letter in folder)

    @property
    def parts(self) -> tuple[Cohort, ...]:
        """The cohorts that this one is joined from; itself where it is not joined."""
        return self.joined or (self,)

    @cached_property
    def _owners(self) -> dict[Path, Cohort]:
        """The joined cohort that reads a training scan."""
        return {subject.image: part for part in self.joined for subject in part.train}

    @property
    def has_labels(self) -> bool:
        """Whether some validation pairs carry labels on both sides."""
        return bool(self.labelled_pairs)

    @property
    def labelled_pairs(self) -> tuple[Pair, ...]:
        """The validation pairs with labels on both sides."""
        return tuple(pair for pair in self.validation_pairs if pair.fixed.labels and pair.moving.labels)

    @cached_property
    def labels(self) -> tuple[int, ...]:
        """The label numbers that are scored: LUMIR's 133, background included.

        On voxels coarser than 1 mm those are left out that have fewer than :data:`SMALLEST_LABEL` voxels in any
        validation person that has them: a warped label of one or two voxels vanishes by the grid's doing, and its
        HD95 is infinite.

        Raises:
            ValueError: the labels are numbered otherwise, so that only the background would be scored.
        """
        if not self.has_labels:
            return LUMIR_LABELS
        people = {subject.image: subject for pair in self.labelled_pairs for subject in (pair.fixed, pair.moving)}
        first = next(iter(people.values()))
        numbers = set(self.label_volume(first).unique().tolist())
        if not numbers & set(LUMIR_LABELS[1:]):
            raise ValueError(
                f"{first.labels}: expected label numbers of LUMIR (BrainCOLOR: 4, 11, 23 ... 207), "
                f"got {sorted(numbers)[:20]}"
            )
        if self.resolution_mm <= 1:
            return LUMIR_LABELS
        too_small: set[int] = set()
        for subject in people.values():
            numbers, voxels = self.label_volume(subject).unique(return_counts=True)
            too_small.update(numbers[voxels < SMALLEST_LABEL].tolist())
        return tuple(label for label in LUMIR_LABELS if label not in too_small)

    def image(self, subject: Subject) -> torch.Tensor:
        """Image of a subject, ``(1, 1, D, H, W)`` float32 in [0, 1], block-averaged to the cohort's resolution.

        Raises:
            ValueError: a file that is corrupt, not 3-D, not finite, not on the cohort's grid, or whose intensities
                are not in 0 ... 255, as LUMIR's are.
        """
        owner = self._owners.get(subject.image)
        if owner:
            return owner.image(subject)
        return self.stored_image(subject).decode() if self.cache else self._image(subject)

    def stored_image(self, subject: Subject) -> StoredVolume:
        """As :meth:`image`, but as the cache holds it: fewer bytes to copy to a device, to be decoded there."""
        owner = self._owners.get(subject.image)
        if owner:
            return owner.stored_image(subject)
        stored = self.cache.get("images", subject.image) if self.cache else None
        return stored or StoredVolume(self._image(subject), 1)

    def _image(self, subject: Subject) -> torch.Tensor:
        return self._remember(subject.image, lambda: self._read_image(subject.image))

    def label_volume(self, subject: Subject) -> torch.Tensor:
        """Labels of a subject, ``(1, 1, D, H, W)`` int16, the most frequent label of each block."""
        owner = self._owners.get(subject.image)
        if owner:
            return owner.label_volume(subject)
        if subject.labels is None:
            raise ValueError(f"{self.path}: no labels are named for {subject.name}")
        path = subject.labels
        stored = self.cache.get("labels", path) if self.cache else None
        return stored.decode() if stored else self._remember(path, lambda: self._read_labels_here(path))

    def landmark_points(self, subject: Subject) -> dict[str, tuple[float, float, float]] | None:
        """Landmarks of a subject in voxels of the cohort's grid, by name; None where it has none.

        A label volume gives the centroid of each of its labels.
        """
        if subject.landmarks is None:
            return None
        if subject.landmarks.suffix == ".json":
            points = read_landmarks(subject.landmarks)
            sides = [side * self.downsampling for side in self.shape]
            for name, place in points.items():
                if not all(-0.5 <= x <= side - 0.5 for x, side in zip(place, sides, strict=True)):
                    raise ValueError(f"{subject.landmarks}: landmark {name!r} at {place} lies outside {tuple(sides)}")
        else:
            volume = self._read_labels(subject.landmarks)[0, 0].numpy()
            count = len(np.unique(volume[volume > 0]))
            if not 1 <= count <= MOST_LANDMARKS:
                raise ValueError(
                    f"{subject.landmarks}: expected 1 to {MOST_LANDMARKS} landmarks, each a number above 0, got {count}"
                )
            points = landmark_centroids(volume)
        shift = (self.downsampling - 1) / 2
        return {name: tuple((x - shift) / self.downsampling for x in place) for name, place in points.items()}

    def landmark_pair(self, pair: Pair) -> tuple[Points, Points] | None:
        """Landmarks of the fixed and the moving subject, in one order; None where one of them has none.

        Raises:
            ValueError: the two do not name the same landmarks.
        """
        fixed, moving = self.landmark_points(pair.fixed), self.landmark_points(pair.moving)
        if not fixed or not moving:
            return None
        if fixed.keys() != moving.keys():
            raise ValueError(
                f"{pair.fixed.landmarks} and {pair.moving.landmarks} must name the same landmarks, "
                f"but only {len(fixed.keys() & moving.keys())} of {len(fixed)} and {len(moving)} are shared"
            )
        return fixed, {name: moving[name] for name in fixed}

    def landmark_volumes(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Landmarks of a pair as label volumes ``(1, L, D, H, W)``, for the challenge's form of TRE.

        Label volumes at their own resolution are taken as they are; points, and anything downsampled, are drawn as
        small balls (:func:`lumirlib.metrics.landmark_volume`).
        """
        points = self.landmark_pair(pair)
        if points is None:
            return None
        files = [pair.fixed.landmarks, pair.moving.landmarks]
        if self.downsampling == 1 and all(file.suffix != ".json" for file in files):
            return tuple(self._read_labels(file) for file in files)
        return tuple(landmark_volume(places, self.shape) for places in points)

    def true_displacement(self, pair: Pair) -> torch.Tensor | None:
        """The exact displacement ``(1, 3, D, H, W)`` of a simulated pair in voxels; None for real scans."""
        if pair.fixed.velocity is None or pair.moving.velocity is None:
            return None
        fixed_to_template, _ = self._person_transforms(pair.fixed)
        return embedded.true_displacement(
            fixed_to_template, *self._person_transforms(pair.moving), resolution_mm=int(self.resolution_mm)
        )

    def _person_transforms(self, subject: Subject) -> tuple[torch.Tensor, torch.Tensor]:
        def compute() -> torch.Tensor:
            array, _ = read_nifti(subject.velocity)
            velocity = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).movedim(-1, 0)
            return torch.stack(embedded.person_transforms(velocity))

        to_template, from_template = self._remember(subject.velocity, compute)
        return to_template, from_template

    def _remember(self, path: Path, read) -> torch.Tensor:
        with _MEMORY_LOCK:
            if path in self._memory:
                self._memory.move_to_end(path)
                return self._memory[path]
        volume = read()
        with _MEMORY_LOCK:
            self._memory[path] = volume
            used = sum(kept.nbytes for kept in self._memory.values())
            while used > MEMORY_BUDGET and len(self._memory) > 1:
                used -= self._memory.popitem(last=False)[1].nbytes
        return volume

    def _check_grid(self, path: Path, shape: tuple[int, ...], affine: np.ndarray) -> None:
        """Raise unless a file has the cohort's shape, voxel size and orientation (its origin may differ).

        For LUMIR's own files the shape decides alone, as in the challenge's evaluation, which reads arrays only.
        """
        expected = tuple(side * self.downsampling for side in self.shape)
        if tuple(shape) != expected:
            raise ValueError(f"{path}: expected shape {expected}, like the cohort's other images, got {tuple(shape)}")
        directions = self.affine[:3, :3] / self.downsampling
        if self.path.name == LUMIR_JSON:
            return
        if not np.allclose(affine[:3, :3], directions, atol=0.02 * self.resolution_mm / self.downsampling):
            raise ValueError(
                f"{path}: expected voxels of {self.resolution_mm / self.downsampling:g} mm in orientation "
                f"{_orientation(directions)}, like the cohort's other images, got "
                f"{'x'.join(f'{edge:g}' for edge in np.linalg.norm(affine[:3, :3], axis=0).round(3))} mm in "
                f"{_orientation(affine)} (affine {affine[:3, :3].round(3).tolist()})"
            )

    @property
    def fits_in_memory(self) -> bool:
        """Whether the images of all people can be kept within :data:`MEMORY_BUDGET`."""
        people = {*self.train, *(subject for pair in self.validation_pairs for subject in (pair.fixed, pair.moving))}
        return len(people) * 4 * math.prod(self.shape) <= MEMORY_BUDGET

    def with_cache(
        self,
        folder: str | Path | None = None,
        dtype: str = "auto",
        workers: int | None = None,
        progress: bool = True,
        verify: bool = False,
        repair: bool = False,
    ) -> Cohort:
        """The same cohort, reading its images and label volumes from a memory-mapped cache, which is made first.

        Integers are cached as they are, so nothing changes; scans of other numbers are rounded to float16
        (:mod:`lumirlib.data.cache`). The digest stays.

        Args:
            folder: where caches are kept; None takes the folder of the embedded cohort, see README.
            dtype: "auto", or "float16" or "float32" for images whatever they hold.
            workers: of :meth:`lumirlib.data.cache.VolumeCache.build`, as are the others.
            progress: show progress bars.
            verify: compare every checksum now.
            repair: likewise, and make anew what is damaged.
        """
        if self.joined:
            parts = tuple(part.with_cache(folder, dtype, workers, progress, verify, repair) for part in self.joined)
            return replace(self, joined=parts, cache=parts[-1].cache, _memory=OrderedDict())
        people = dict.fromkeys([*self.train, *(s for pair in self.validation_pairs for s in (pair.fixed, pair.moving))])
        sources = [Source("images", one.image, one.name, partial(self._read_image, one.image)) for one in people]
        sources += [
            Source("labels", one.labels, one.name, partial(self._read_labels_here, one.labels))
            for one in people
            if one.labels
        ]
        name = f"{self.short_name}_{self.resolution_mm:g}mm_{dtype}"
        root = Path(folder) if folder else embedded.cache_folder() / "volumes"
        cache = VolumeCache(root / name, sources, self.shape, self.downsampling**3, dtype)
        cache.build(workers, progress, verify, repair)
        return replace(self, cache=cache, _memory=OrderedDict())

    def describe_cache(self) -> str | None:
        """What :meth:`with_cache` has made, in words; None without a cache."""
        return "; ".join(part.cache.describe() for part in self.parts if part.cache) or None

    def _read_image(self, path: Path) -> torch.Tensor:
        array, _ = read_volume(path, partial(self._check_grid, path))
        low, high = float(array.min()), float(array.max())
        if high > 255.5 or low < -0.5:  # resampling may overshoot a little
            raise ValueError(f"{path}: expected intensities from 0 to 255 (or 0 to 1), got {low:g} to {high:g}")
        if high == low:
            raise ValueError(f"{path}: expected an image, got the constant {low:g}")
        image = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))[None, None]
        top = 255 if high > 1.5 else 1
        image = image.clamp(0, top)
        if self.downsampling > 1:  # before dividing: averages of integers are exact, so that a cache can be
            image = F.avg_pool3d(image, self.downsampling)
        return image / top

    def _read_labels_here(self, path: Path) -> torch.Tensor:
        """At the cohort's resolution."""
        return spatial.majority_label(self._read_labels(path), self.downsampling)

    def _read_labels(self, path: Path) -> torch.Tensor:
        array, _ = read_label_volume(path, partial(self._check_grid, path))
        return torch.from_numpy(np.ascontiguousarray(array))[None, None]


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
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < MOST_COORDINATE


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
        if resolution not in embedded.RESOLUTIONS_MM:
            raise ValueError(
                f"resolution_mm must be one of {embedded.RESOLUTIONS_MM} for the embedded cohort, got {resolution}"
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
            if len(candidates) > MOST_HELD_OUT:
                raise ValueError(
                    f"{path}: names no validation pair with labels, and {len(candidates)} labelled scans, more than "
                    f"the {MOST_HELD_OUT} whose ordered pairs would all be evaluated: list the pairs as 'validation'"
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
    wanted = own if resolution_mm is None else float(resolution_mm)
    if not 0 < wanted < 1000:
        raise ValueError(f"resolution_mm must be a voxel size in mm, got {resolution_mm}")
    factor = round(wanted / own)
    if factor < 1 or abs(factor * own - wanted) > 1e-3 * wanted or any(side % factor for side in shape):
        raise ValueError(
            f"resolution_mm must be a whole multiple of the files' {own:g} mm that divides their shape {shape}, "
            f"got {wanted:g}"
        )
    block = np.diag([factor, factor, factor, 1.0])
    block[:3, 3] = (factor - 1) / 2
    for key, kind in (("name", str), ("simulated", bool)):
        if not isinstance(content.get(key, kind()), kind):
            raise ValueError(f"{path}: expected {kind.__name__} as {key!r}, got {content[key]!r}")
    name = content.get("name", path.stem)
    return Cohort(
        name=name,
        path=path,
        resolution_mm=wanted,
        simulated=content.get("simulated", False),
        train=train,
        validation_pairs=tuple(pairs),
        credit=CREDITS.get(name, str(content.get("licence", content.get("license", "")))),
        digest=_digest(path, reader, simulated=content.get("simulated", False)),
        downsampling=factor,
        affine=affine @ block,
        shape=tuple(side // factor for side in shape),
    )


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
                f"{part.resolution_mm:g} mm in {_orientation(part.affine)}, {last.path} has {last.shape} of "
                f"{last.resolution_mm:g} mm in {_orientation(last.affine)}"
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
        digest=hashlib.sha256(" ".join(part.digest for part in parts).encode()).hexdigest()[:16],
        _memory=OrderedDict(),
    )


def _check_names(path: Path, pairs: list[Pair]) -> None:
    """Raise where two pairs would have one name, by which results and submissions are filed."""
    named: dict[str, Pair] = {}
    for pair in pairs:
        other = named.setdefault(pair.name, pair)
        if other != pair:
            images = ", ".join(str(subject.image) for one in (other, pair) for subject in (one.fixed, one.moving))
            raise ValueError(f"{path}: two validation pairs would both be named {pair.name}: {images}")


def _digest(path: Path, reader: _Reader, simulated: bool) -> str:
    """Of the JSON's text and the sizes of its files; simulated files follow from the JSON alone."""
    content = hashlib.sha256(path.read_bytes())
    if not simulated:
        for subject in sorted(reader.subjects.values(), key=lambda subject: subject.image):
            for file in (subject.image, subject.labels, subject.landmarks):
                content.update(f"{file.name} {file.stat().st_size}\n".encode() if file else b"-\n")
    return content.hexdigest()[:16]


def _orientation(affine: np.ndarray) -> str:
    """Axis codes of an affine (its 3 x 3 part suffices), such as RAS."""
    full = np.eye(4)
    full[:3, :3] = affine[:3, :3]
    return "".join(code or "?" for code in nib.aff2axcodes(full))


def _grid_of(path: Path) -> tuple[tuple[int, int, int], np.ndarray]:
    """Shape and affine from a NIfTI header alone."""
    shape, affine = read_grid(path)
    if len(shape) != 3 or min(shape) < 2:
        raise ValueError(f"{path}: expected a 3-D volume of at least 2 voxels a side, got shape {shape}")
    return shape, affine
