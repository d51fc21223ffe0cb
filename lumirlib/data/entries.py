"""The entries of a dataset JSON as subjects and pairs, and what lies beside their images, in all known spellings.

What is not understood is named in one warning: keys that lead to files, folders whose files are named like the scans.
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from lumirlib.data.cohort import Pair, Subject
from lumirlib.data.nifti import scan_stem

#: Keys of an entry, and sister folders of the images, by :func:`plain`.
LABELS = ("seg", "label", "labels", "segmentation", "segs", "segmentations", "labelmap", "labelmaps", "parcellation")
LANDMARKS = ("landmarks", "landmark", "keypoints", "keypoint")
IMAGES = ("image", "img", "images", "imgs")
#: As the challenge names the folder of its ten labelled scans.
SANITY_CHECK = "sanitychecklabels"
#: Lists of a dataset JSON, by :func:`plain`.
LISTS = {
    "training": ("training", "train"),
    "validation": ("validation", "val", "registrationval"),
    "labelled": ("labelled", "labeled"),
    "test": ("test", "testing", "registrationtest"),
}
#: Other keys of a dataset JSON that are read.
OPTIONS = ("name", "simulated", "population", "labels", "intensity_maximum", "licence", "license")
#: What may follow the image's name in that of its labels or landmarks.
LABEL_TAILS = ("", "_seg", "_label", "_labels", "_segmentation", "_dseg")
LANDMARK_TAILS = ("", "_landmarks", "_keypoints")
VOLUMES = (".nii.gz", ".nii")

#: Endings of volumes, and of all that a key may lead to.
_VOLUME = re.compile(r"\.(nii|nii\.gz|mgz|mgh|mha|nrrd|hdr|img)$", re.IGNORECASE)
_FILE = re.compile(r"\.(nii|nii\.gz|mgz|mgh|mha|nrrd|hdr|img|json|csv|fcsv|txt)$", re.IGNORECASE)
#: In a key of a dataset JSON these words say that it decides how scans are read or scored.
_OF_SCANS = ("label", "classes", "intensit", "landmark", "keypoint")
#: Names in a warning at most.
_SHOWN = 10


def plain(key: str) -> str:
    """A key or folder's name without case and signs: "Label_Map" and "labelmap" are one."""
    return "".join(letter for letter in key.casefold() if letter.isalnum())


def is_file(path: Path) -> bool:
    """Whether a path is that of a file; not where no file can have it."""
    try:
        return path.is_file()
    except OSError:  # a name longer than the file system's, a loop of links
        return False


class EntryReader:
    """Turns the entries of one dataset JSON into subjects and pairs.

    Attributes:
        subjects: Subjects read so far, by their images; each mention may have added to what is known.
        options: Content of the JSON by :func:`plain` keys.
        unknown: Keys that lead to files and are not understood -> where one is.
    """

    def __init__(self, path: Path, root: Path, content: dict) -> None:
        self.path, self.root, self.content = path, root.resolve(), content
        self.subjects: dict[Path, Subject] = {}
        self.unknown: dict[str, str] = {}
        self.options = {plain(key): value for key, value in content.items()}
        self._listings: dict[Path, frozenset[str]] = {}
        self._sisters: dict[tuple[Path, tuple[str, ...]], list[Path]] = {}

    # entries ---------------------------------------------------------------------------------------------------------

    def entries(self, name: str) -> Iterator[tuple[str, object]]:
        """Entries of a list of :data:`LISTS`, each with the words that name it in messages."""
        for key, listed in self.content.items():
            if plain(key) not in LISTS[name]:
                continue
            if not isinstance(listed, list):
                raise ValueError(f"{self.path}: expected a list under {key!r}, got {type(listed).__name__}")
            for position, entry in enumerate(listed):
                yield f"{key}[{position}]", entry

    def resolve(self, text: object, what: str) -> Path:
        """A path of the JSON ("./x", "/x" and "x" all mean the data root's x) as a file that exists."""
        file = self._locate(text, what)
        if not is_file(file):
            raise FileNotFoundError(f"{self.path} names {text!r} for {what}, but {file} does not exist")
        return file

    def _locate(self, text: object, what: str) -> Path:
        if not isinstance(text, str) or not text:
            raise ValueError(f"{self.path}: expected a path for {what}, got {text!r}")
        if "\0" in text or len(text) > 4096:
            raise ValueError(f"{self.path}: expected a path for {what}, got {text[:80]!r} of {len(text)} characters")
        file = Path(os.path.normpath(self.root / text.replace("\\", "/").lstrip("/")))
        if not file.is_relative_to(self.root):
            raise ValueError(f"{self.path}: {what} names {text!r}, which leaves the data root {self.root}")
        return file

    def subject(self, entry: object, what: str) -> Subject:
        """Subject of an entry: a path, or an object with "image" and perhaps labels and landmarks."""
        fields = {plain(key): value for key, value in entry.items()} if isinstance(entry, dict) else {"image": entry}
        named = [key for key in IMAGES if key in fields]
        if not named:
            raise ValueError(f"{self.path}: {what} has no 'image', only {sorted(entry)}")
        if isinstance(entry, dict):
            self._note_unknown(entry, (*IMAGES, *LABELS, *LANDMARKS, "velocity"), what)
        image = self.resolve(fields[named[0]], what)
        known = self.subjects.get(image)
        subject = Subject(
            name=scan_stem(image),
            image=image,
            labels=self._beside(fields, LABELS, what, image, LABEL_TAILS, VOLUMES),
            landmarks=self._beside(fields, LANDMARKS, what, image, LANDMARK_TAILS, (".json", *VOLUMES)),
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

    def is_person(self, entry: object) -> bool:
        """Whether an entry is of one scan, and not of a pair."""
        if isinstance(entry, str):
            return True
        return isinstance(entry, dict) and {plain(key) for key in entry} & set(IMAGES) != set()

    def pair(self, entry: object, what: str) -> Pair:
        """Pair of an entry with "fixed" and "moving": paths, or objects as of :meth:`subject`."""
        sides = self._sides(entry, what)
        fixed, moving = (self.subject(fields, f"{side} of {what}") for side, fields in sides.items())
        if fixed.image == moving.image:
            raise ValueError(f"{self.path}: {what} has one image as 'fixed' and 'moving', {fixed.image}")
        return Pair(fixed, moving)

    def pair_is_here(self, entry: object, what: str) -> bool:
        """Whether both images of a pair exist."""
        sides = self._sides(entry, what)
        images = [fields[key] for fields in sides.values() for key in IMAGES if key in fields]
        return len(images) == 2 and all(is_file(self._locate(image, what)) for image in images)

    def _sides(self, entry: object, what: str) -> dict[str, dict[str, object]]:
        """The fields of both sides: {"fixed": "x", "fixed_seg": "y"} is {"fixed": {"image": "x", "seg": "y"}}."""
        sides: dict[str, dict[str, object]] = {"fixed": {}, "moving": {}}
        if not isinstance(entry, dict):
            raise ValueError(f"{self.path}: {what} must have 'fixed' and 'moving', got {entry!r}")
        others = {}
        for key, value in entry.items():
            side = next((side for side in sides if plain(key).startswith(side) or plain(key).endswith(side)), None)
            rest = plain(key).removeprefix(side).removesuffix(side) if side else ""
            if side is None:
                others[key] = value
            elif not rest and isinstance(value, dict):
                sides[side] |= value
            else:
                sides[side][rest or "image"] = value
        if not all(sides.values()):
            raise ValueError(f"{self.path}: {what} must have 'fixed' and 'moving', got {entry!r}")
        self._note_unknown(others, (), what)
        return sides

    def _note_unknown(self, fields: dict, known: Sequence[str], what: str) -> None:
        for key, value in fields.items():
            if plain(key) not in known and isinstance(value, str) and _FILE.search(value):
                self.unknown.setdefault(key, f"{key!r} in {what}, {value[:80]!r}")

    # what lies beside the images -------------------------------------------------------------------------------------

    def _beside(
        self,
        fields: dict[str, object],
        words: tuple[str, ...],
        what: str,
        image: Path,
        tails: tuple[str, ...],
        endings: tuple[str, ...],
    ) -> Path | None:
        given = [key for key in words if fields.get(key)]
        for key in given[1:]:
            if fields[key] != fields[given[0]]:
                self.unknown.setdefault(key, f"{key!r} in {what}, {str(fields[key])[:80]!r}, beside {given[0]!r}")
        if given:
            return self.resolve(fields[given[0]], f"{given[0]} of {what}")
        # Learn2Reg's layout: imagesTr/NAME.nii.gz has its labels in labelsTr/NAME.nii.gz, nnU-Net's without _0000
        stem = image.name.removesuffix(".gz").removesuffix(".nii")
        stems = dict.fromkeys([stem, scan_stem(image)])
        places = [(folder, tails) for folder in self._sister_folders(image.parent, words)]
        places.append((image.parent, tuple(tail for tail in tails if tail)))  # x_seg.nii.gz beside x.nii.gz
        for folder, chosen in places:
            names = self._names(folder)
            for name in (f"{stem}{tail}{ending}" for stem in stems for tail in chosen for ending in endings):
                if name in names and is_file(folder / name):
                    return folder / name
        return None

    def _names(self, folder: Path) -> frozenset[str]:
        if folder not in self._listings:
            names: list[str] = []
            with suppress(OSError):  # not to be listed
                names = os.listdir(folder)
            self._listings[folder] = frozenset(names)
        return self._listings[folder]

    def _sister_folders(self, images: Path, words: tuple[str, ...]) -> list[Path]:
        """Folders beside one of images that may hold their labels (or landmarks), the likeliest first."""
        if (images, words) not in self._sisters:
            part = _part(images)
            names = {f"{word}{part}": 0 for word in words}
            if words is LABELS:
                names[f"{SANITY_CHECK}{part}"] = 1
            names |= {word: 2 for word in words if word not in names}
            found = [] if part is None else [one for one in _folders(images.parent) if plain(one.name) in names]
            if part is None and self.root in images.parent.parents:  # images/train and labels/train
                inner = [one / images.name for one in self._sister_folders(images.parent, words)]
                names |= {plain(images.name): 0}
                found = [one for one in inner if one.is_dir()]
            first = f"{'labels' if words is LABELS else 'landmarks'}{images.name.removeprefix('images')}"
            found.sort(key=lambda one: (one.name != first, names[plain(one.name)], one.name))
            self._sisters[images, words] = found
        return self._sisters[images, words]

    def warn_of_unknown(self) -> None:
        """Name what leads to files and was not understood, in one warning."""
        known = [*(word for words in LISTS.values() for word in words), *map(plain, OPTIONS)]
        found = list(self.unknown.values())
        for key, value in self.content.items():
            lists_files = isinstance(value, list) and re.search(r"\.(nii|mgz|mgh|mha|nrrd)\b", str(value[:3]))
            close = difflib.get_close_matches(plain(key), known, 1, 0.85) if not plain(key).startswith("num") else []
            means_scans = any(word in plain(key) for word in _OF_SCANS) and not plain(key).startswith("num")
            if plain(key) not in known and (close or lists_files or means_scans):
                found.append(repr(key) + (f" (is it {close[0]!r}?)" if close else ""))
        found += self._unknown_folders()
        if found:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            warnings.warn(
                f"{self.path}: not understood and left out: {'; '.join(found[:_SHOWN])}{more}. Labels are 'seg' of an "
                "entry, or lie in labelsTr/ beside imagesTr/ under the image's name; landmarks are 'landmarks', or lie "
                "in landmarksTr/",
                stacklevel=1,
            )

    def _unknown_folders(self) -> list[str]:
        """Unused folders with names or files like those of labels: beside or in those of images, or in derivatives/."""
        people = self.subjects.values()
        used = {file.parent for one in people for file in (one.image, one.labels, one.landmarks, one.velocity) if file}
        stems = {stem for one in people for stem in (one.name, one.image.name.removesuffix(".gz").removesuffix(".nii"))}
        images = {one.image.parent for one in people}
        parts = {_part(folder) for folder in images} - {None}
        words = {f"{word}{part}" for word in (*LABELS, *LANDMARKS, SANITY_CHECK) for part in (*parts, "")}
        found = []
        roots = sorted({folder if folder == self.root else folder.parent for folder in images}, reverse=True)
        near = [folder for root in roots for folder in _folders(root)]
        hosts = [one for one in near if one in images or plain(one.name) == "derivatives"]
        within = [folder for one in hosts for folder in _folders(one)]
        for folder in dict.fromkeys([*near, *within]):
            if folder in used or folder.name.startswith(".") or plain(folder.name).startswith(IMAGES):
                continue
            names = [name for name in sorted(self._names(folder)) if _FILE.search(name)]
            alike = [name for name in names if _VOLUME.search(name) and _VOLUME.sub("", name) in stems]
            if names and (alike or plain(folder.name) in words):
                place = next(folder.relative_to(root) for root in roots if folder.is_relative_to(root)).as_posix()
                found.append(f"the folder {place!r} with {(alike or names)[0]!r}")
        return found


def _part(images: Path) -> str | None:
    """What follows "images" in a folder's name, such as "tr" and "val"; None for a folder of another name."""
    name = plain(images.name)
    word = next((word for word in sorted(IMAGES, key=len, reverse=True) if name.startswith(word)), None)
    return None if word is None else name.removeprefix(word)


def _folders(parent: Path) -> list[Path]:
    # scandir knows folders without a look at each file; of a link in a circle it raises where Path says no
    with suppress(OSError), os.scandir(parent) as entries:  # not to be listed
        return sorted(Path(one) for one in entries if (Path(one) if one.is_symlink() else one).is_dir())
    return []
