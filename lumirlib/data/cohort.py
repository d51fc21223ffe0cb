"""Cohorts: Learn2Reg dataset JSONs, read through one interface whatever dialect they are written in.

Three cohorts, one format: the embedded (simulated) one, real brains, and the challenge's own LUMIR download.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

from lumirlib import spatial
from lumirlib.data import embedded, scale
from lumirlib.data.cache import Source, StoredVolume, VolumeCache
from lumirlib.data.identity import checksums
from lumirlib.data.landmark_files import MAX_LANDMARKS, landmark_centroids, read_landmarks
from lumirlib.data.nifti import read_label_volume, read_nifti, read_volume
from lumirlib.metrics.labels import LUMIR_LABELS, other_protocol
from lumirlib.metrics.landmarks import Points, landmark_volume

LUMIR_JSON = "LUMIR_dataset.json"
#: Voxels that a label needs to be scored on a grid coarser than 1 mm.
MIN_LABEL_VOXELS = 8
#: Downsampled volumes kept in memory by one cohort, in bytes.
MEMORY_BUDGET = 2 * 1024**3
#: A loader's threads read too. Of the module, so that cohorts can be pickled.
_MEMORY_LOCK = threading.Lock()
_SCALE_LOCK = threading.Lock()


@dataclass(frozen=True)
class Subject:
    """One scan of a cohort and what is known about it; the files are read on demand.

    Attributes:
        name: File name of the image without `.nii.gz` and without Learn2Reg's modality suffix `_0000`.
        image: Path of the image.
        labels: Path of the label volume, or None.
        landmarks: Path of the landmarks (label volume, or JSON of points), or None.
        velocity: Path of the simulated person's velocity, or None.
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
        name: Name that the JSON gives itself.
        path: Path of the JSON.
        resolution_mm: Edge of a voxel of everything that is loaded, in mm.
        simulated: Whether the cohort is the embedded one; every table made from it says so.
        train: Subjects to train on; never one of a validation pair.
        validation_pairs: Pairs to evaluate.
        credit: Those to be named beside figures made from it.
        downsampling: Voxels of the files per voxel of the cohort, along each axis.
        affine: Voxel-to-world matrix of the cohort's grid, in mm.
        shape: Sides (D, H, W) of the cohort's grid.
        digest: 16 hexadecimal digits of the JSON and, for real scans, of the content of the files that it names. It
            names runs.
        content_digest: 16 hexadecimal digits of the content of the files alone, of simulated scans too.
        cache: Memory-mapped volumes that are read in place of the files, or None: see :meth:`with_cache`.
        intensity_maximum: Divisor of the images, where the JSON gives one; None for :mod:`lumirlib.data.scale`.
        given_labels: Label numbers that the JSON gives to be scored, background first; None for LUMIR's.
        listed_pairs: Pairs that the JSON itself lists, under "validation", or else under "test".
        joined: Cohorts whose training scans it has, where they are of several; all else is that of the last.
        memory: Volumes read and displacements made so far, the last used at the end; see :data:`MEMORY_BUDGET`.
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
    content_digest: str
    cache: VolumeCache | None = None
    intensity_maximum: float | None = None
    given_labels: tuple[int, ...] | None = None
    listed_pairs: tuple[Pair, ...] = ()
    joined: tuple[Cohort, ...] = ()
    memory: OrderedDict[Path | tuple[Path, Path], torch.Tensor] = field(default_factory=OrderedDict, repr=False)

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
        """The joined cohort that reads a training scan; all else the last one reads."""
        return {subject.image: part for part in self.joined for subject in part.train}

    def _owner(self, subject: Subject) -> Cohort | None:
        return self._owners.get(subject.image, self.joined[-1]) if self.joined else None

    @cached_property
    def at_own_resolution(self) -> Cohort:
        """The same people and validation pairs on the files' own voxels, where results are scored.

        Itself where it is not downsampled; of joined cohorts that of the last one, whose pairs they have. It reads the
        files and keeps what it has read, within a :data:`MEMORY_BUDGET` of its own.
        """
        if self.joined:
            return self.joined[-1].at_own_resolution
        if self.downsampling == 1:
            return self
        return replace(
            self,
            resolution_mm=self.resolution_mm / self.downsampling,
            downsampling=1,
            affine=self.affine @ np.linalg.inv(block_affine(self.downsampling)),
            shape=tuple(side * self.downsampling for side in self.shape),
            cache=None,
            memory=OrderedDict(),
        )

    @property
    def submission_pairs(self) -> tuple[Pair, ...]:
        """The pairs of a submission: those that the JSON lists, also where labelled people take their place here."""
        return self.listed_pairs or self.validation_pairs

    @property
    def has_labels(self) -> bool:
        """Whether some validation pairs carry labels on both sides."""
        return bool(self.labelled_pairs)

    @property
    def labelled_pairs(self) -> tuple[Pair, ...]:
        """The validation pairs with labels on both sides."""
        return tuple(pair for pair in self.validation_pairs if pair.fixed.labels and pair.moving.labels)

    @property
    def protocol(self) -> tuple[int, ...]:
        """The label numbers that the JSON gives to be scored, or LUMIR's 133; background included."""
        return self.given_labels or LUMIR_LABELS

    @cached_property
    def label_sizes(self) -> dict[Path, dict[int, int]]:
        """Voxels of each label number of each validation person with labels, background included."""
        people = {subject.labels: subject for pair in self.labelled_pairs for subject in (pair.fixed, pair.moving)}
        counts = {path: np.bincount(self.label_volume(one).numpy().ravel()) for path, one in people.items()}
        return {path: {int(n): int(found[n]) for n in np.flatnonzero(found)} for path, found in counts.items()}

    @cached_property
    def labels(self) -> tuple[int, ...]:
        """The label numbers that are scored: those of :attr:`protocol`.

        On voxels coarser than 1 mm those are left out that have fewer than :data:`MIN_LABEL_VOXELS` voxels in any
        validation person that has them: a warped label of one or two voxels vanishes by the grid's doing, and its
        HD95 is infinite.

        Raises:
            ValueError: the JSON gives no labels, and some people are labelled by another protocol than LUMIR's; or
                it gives some that nobody has.
        """
        if not self.has_labels:
            return self.protocol
        if self.given_labels is None:
            others = other_protocol({str(path): sizes for path, sizes in self.label_sizes.items()})
            if others:
                raise ValueError(
                    f"{self.path}: expected label numbers of LUMIR (BrainCOLOR: 4, 11, 23 ... 207). Give the numbers "
                    f'that are to be scored as \'labels\' in the JSON: [2, 3, 4] or {{"2": "a name"}}.\n{others}'
                )
        elif not any(sizes.keys() & set(self.given_labels[1:]) for sizes in self.label_sizes.values()):
            found = sorted(set().union(*self.label_sizes.values()) - {0})
            raise ValueError(
                f"{self.path}: none of its 'labels', {list(self.given_labels[1:])[:40]}, is in anybody's label "
                f"volume, where there are {found[:40]}"
            )
        if self.resolution_mm <= 1:
            return self.protocol
        too_small = {
            number
            for sizes in self.label_sizes.values()
            for number, voxels in sizes.items()
            if voxels < MIN_LABEL_VOXELS
        }
        return tuple(label for label in self.protocol if label not in too_small)

    def image(self, subject: Subject) -> torch.Tensor:
        """Image of a subject, ``(1, 1, D, H, W)`` float32 in [0, 1], block-averaged to the cohort's resolution.

        Raises:
            ValueError: a file that is corrupt, not 3-D, not finite, not on the cohort's grid, or whose intensities
                are not on the cohort's scale (:mod:`lumirlib.data.scale`).
        """
        owner = self._owner(subject)
        if owner:
            return owner.image(subject)
        return self.stored_image(subject).decode() if self.cache else self._image(subject)

    def stored_image(self, subject: Subject) -> StoredVolume:
        """As :meth:`image`, but as the cache holds it: fewer bytes to copy to a device, to be decoded there."""
        owner = self._owner(subject)
        if owner:
            return owner.stored_image(subject)
        stored = self.cache.get("images", subject.image) if self.cache else None
        return stored or StoredVolume(self._image(subject), 1)

    def _image(self, subject: Subject) -> torch.Tensor:
        return self._remember(subject.image, lambda: self._read_image(subject.image))

    def label_volume(self, subject: Subject) -> torch.Tensor:
        """Labels of a subject, ``(1, 1, D, H, W)`` int16, the most frequent label of each block."""
        owner = self._owner(subject)
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
            if not 1 <= count <= MAX_LANDMARKS:
                raise ValueError(
                    f"{subject.landmarks}: expected 1 to {MAX_LANDMARKS} landmarks, each a number above 0, got {count}"
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

        def compute() -> torch.Tensor:
            to_template, _ = self._person_transforms(pair.fixed)
            of_moving = self._person_transforms(pair.moving)
            return embedded.true_displacement(to_template, *of_moving, resolution_mm=int(self.resolution_mm))

        return self._remember((pair.fixed.velocity, pair.moving.velocity), compute)

    def _person_transforms(self, subject: Subject) -> tuple[torch.Tensor, torch.Tensor]:
        def compute() -> torch.Tensor:
            array, _ = read_nifti(subject.velocity)
            velocity = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).movedim(-1, 0)
            return torch.stack(embedded.person_transforms(velocity))

        to_template, from_template = self._remember(subject.velocity, compute)
        return to_template, from_template

    def _remember(self, path: Path | tuple[Path, Path], read: Callable[[], torch.Tensor]) -> torch.Tensor:
        with _MEMORY_LOCK:
            if path in self.memory:
                self.memory.move_to_end(path)
                return self.memory[path]
        volume = read()
        with _MEMORY_LOCK:
            self.memory[path] = volume
            used = sum(kept.nbytes for kept in self.memory.values())
            while used > MEMORY_BUDGET and len(self.memory) > 1:
                used -= self.memory.popitem(last=False)[1].nbytes
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
                f"{grid_orientation(directions)}, like the cohort's other images, got "
                f"{'x'.join(f'{edge:g}' for edge in np.linalg.norm(affine[:3, :3], axis=0).round(3))} mm in "
                f"{grid_orientation(affine)} (affine {affine[:3, :3].round(3).tolist()})"
            )

    @property
    def fits_in_memory(self) -> bool:
        """Whether the images of all people can be kept within :data:`MEMORY_BUDGET`."""
        return len(self._people) * 4 * math.prod(self.shape) <= MEMORY_BUDGET

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
            folder: Folder where caches are kept; None takes the folder of the embedded cohort, see docs/speed.md.
            dtype: Form to store images in: "auto", or "float16" or "float32" for images whatever they hold.
            workers: Number of threads that read scans, as for :meth:`lumirlib.data.cache.VolumeCache.build`.
            progress: Whether to show progress bars.
            verify: Whether to compare every checksum now.
            repair: Whether to compare every checksum now and make anew what is damaged.
        """
        if self.joined:
            parts = tuple(part.with_cache(folder, dtype, workers, progress, verify, repair) for part in self.joined)
            return replace(self, joined=parts, cache=parts[-1].cache, memory=OrderedDict())
        images = [("images", one.image, one.name, self._read_image) for one in self._people]
        labels = [("labels", one.labels, one.name, self._read_labels_here) for one in self._people if one.labels]
        contents = checksums((file for _, file, *_ in images + labels), str(self.path.resolve()))
        white = self._float_white if self.intensity_maximum is None else self.intensity_maximum
        own_scale = None if white in (1, scale.BYTE) else float(white)
        sources = [
            Source(kind, file, name, partial(read, file), contents[file], own_scale if kind == "images" else None)
            for kind, file, name, read in images + labels
        ]
        name = f"{self.short_name}_{self.resolution_mm:g}mm_{dtype}"
        root = Path(folder) if folder else embedded.cache_folder() / "volumes"
        cache = VolumeCache(root / name, sources, self.shape, self.downsampling**3, dtype)
        cache.build(workers, progress, verify, repair)
        return replace(self, cache=cache, memory=OrderedDict())

    def describe_cache(self) -> str | None:
        """What :meth:`with_cache` has made, in words; None without a cache."""
        return "; ".join(part.cache.describe() for part in self.parts if part.cache) or None

    def _read_image(self, path: Path) -> torch.Tensor:
        array, _ = read_volume(path, partial(self._check_grid, path))
        low, high = float(array.min()), float(array.max())
        if high == low:
            raise ValueError(f"{path}: expected an image, got the constant {low:g}")
        white = self._white(path, high, array.dtype.kind in "ui")
        highest = scale.UNIT if white == 1 else white * scale.HIGHEST_BYTE / scale.BYTE
        if high > highest or low < white - highest:  # resampling may overshoot a little
            scales = "255 (or 0 to 1)" if white in (1, scale.BYTE) else f"{white:g}"
            raise ValueError(
                f"{path}: expected intensities from 0 to {scales}, got {low:g} to {high:g}; "
                "'intensity_maximum' in the dataset JSON sets another maximum"
            )
        image = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))[None, None]
        image = image.clamp(0, white)
        if self.downsampling > 1:  # before dividing: averages of integers are exact, so that a cache can be
            image = F.avg_pool3d(image, self.downsampling)
        return image / white

    def _white(self, path: Path, high: float, integers: bool) -> float:
        """What an image is divided by, where its largest voxel is `high`; see :mod:`lumirlib.data.scale`."""
        if self.intensity_maximum is not None:
            return self.intensity_maximum
        if integers:
            if high > 1:
                scale.tell_dark(path, high)
            return scale.BYTE if high > 1 else 1
        white = self._float_white
        return 1 if white == scale.BYTE and high <= scale.UNIT else white

    @property
    def _people(self) -> tuple[Subject, ...]:
        pairs = (*self.validation_pairs, *self.listed_pairs)
        people = [*self.train, *(subject for pair in pairs for subject in (pair.fixed, pair.moving))]
        return tuple(dict.fromkeys(people))

    @cached_property
    def _float_white(self) -> float:
        """The white of images that do not hold whole numbers; the images are read for it, once."""
        with _SCALE_LOCK:
            if "_float_white" in vars(self):  # another thread has found it meanwhile
                return vars(self)["_float_white"]
            maxima = scale.float_maxima(
                [subject.image for subject in self._people],
                lambda path: read_volume(path, partial(self._check_grid, path))[0],
                str(self.path.resolve()),
            )
            white = scale.common_white(maxima, self.path) if maxima else scale.BYTE
            vars(self)["_float_white"] = white
        return white

    def _read_labels_here(self, path: Path) -> torch.Tensor:
        """At the cohort's resolution."""
        return spatial.majority_label(self._read_labels(path), self.downsampling)

    def _read_labels(self, path: Path) -> torch.Tensor:
        array, _ = read_label_volume(path, partial(self._check_grid, path))
        return torch.from_numpy(np.ascontiguousarray(array))[None, None]


def block_affine(factor: int) -> np.ndarray:
    """Matrix from voxels of block averages to the voxels that were averaged: centres at ``factor i + (factor - 1)/2``.

    Args:
        factor: Number of voxels along the edge of a block.
    """
    matrix = np.diag([factor, factor, factor, 1.0])
    matrix[:3, 3] = (factor - 1) / 2
    return matrix


def grid_orientation(affine: np.ndarray) -> str:
    """Axis codes of an affine (its 3 x 3 part suffices), such as RAS."""
    full = np.eye(4)
    full[:3, :3] = affine[:3, :3]
    return "".join(code or "?" for code in nib.aff2axcodes(full))
