"""Which files of a folder are T1 scans to prepare, and whose they are."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lumirlib.data.nifti import scan_stem
from lumirlib.scans.bids import BidsName, check_raw

ENDINGS = (".nii", ".nii.gz")
#: Endings of volumes that are not read.
OTHER_FORMATS = re.compile(
    r"\.(nii\.(bz2|zst|xz|zip)|hdr|img|img\.gz|mg[zh]|nrrd|nhdr|mha|mhd|mnc|par)$", re.IGNORECASE
)
DICOM = re.compile(r"\.(dcm|ima)$", re.IGNORECASE)

#: Last parts of a name that tell masks, label and other maps, and transforms.
NO_IMAGE = re.compile(
    r"(^|[_.-])(brain)?(mask|labels?|seg|dseg|probseg|segmentation|aseg|aparc|parc|parcellation|atlas|roi|xfm|warp)$"
    r"|map$",
    re.IGNORECASE,
)
#: Likewise names of folders.
NO_IMAGE_FOLDER = re.compile(r"(masks?|labels?|segs?|segmentations?)(Tr|Ts|Val)?$", re.IGNORECASE)
#: Last parts of a name that BIDS gives to images of another kind.
NO_T1 = re.compile(
    r"_(T2w|T2starw?|T2|FLAIR|PDw|PDT2|inplaneT2|bold|sbref|dwi|epi|cbv|asl|m0scan|pet|ct|SWI|swi|angio"
    r"|phase(diff|[12])?|magnitude[12]?|fieldmap)$",
    re.IGNORECASE,
)
#: Parts of a BIDS name that a processed copy of a scan has.
DERIVED = re.compile(r"_(desc|space|res)-")
PERSON = re.compile(r"(?:^|_)(sub-[A-Za-z0-9]+)")
#: A session, by BIDS or as others write it: `ses-2`, `session_2`, `visit2`, OASIS's `MR2`.
SESSION = r"(?:ses-[A-Za-z0-9]+|(?:ses|sess|session|visit|timepoint|tp|MR)[-_]?[0-9]+)(?![A-Za-z0-9])"
#: What tells several scans of a person apart.
REPEAT = re.compile(rf"[_-](?:(?:ses|run|acq|rec|echo|desc|space)-|{SESSION})", re.IGNORECASE)
SESSION_FOLDER = re.compile(rf"ses-|{SESSION}$", re.IGNORECASE)


@dataclass(frozen=True)
class FoundScans:
    """What :func:`find_scans` has found.

    Attributes:
        files: File of each scan, by the scan's name.
        people: Person of each scan, by the scan's name.
        skipped: Reason why a file or folder is not taken, by its path relative to the folder that was searched.
    """

    files: dict[str, Path]
    people: dict[str, str]
    skipped: dict[str, str]


def find_scans(folder: str | Path, out: str | Path) -> FoundScans:
    """The T1 scans of a folder and those below it, by name: of the file, or of its path where that comes twice.

    Linked folders and files are followed, each once. Skipped and listed are masks and label maps, images that BIDS does
    not name T1w, processed copies (`desc-`, `space-`) of a scan that is there, and other formats.

    Args:
        folder: Folder with `.nii` or `.nii.gz` files (capitals too), at any depth.
        out: Folder below it that is not searched.

    Raises:
        FileNotFoundError: No such folder, or no scan in it, with what was skipped.
        ValueError: Two scans of one name.
    """
    folder, out = Path(folder), Path(out).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    skipped: dict[str, str] = {}
    candidates = [path for path in _walk(folder, out, skipped) if _is_candidate(path, folder, skipped)]
    files = _without_copies(candidates, folder, skipped)
    if not files:
        raise FileNotFoundError(f"no scan (.nii or .nii.gz file) in {folder}{_listed(skipped)}")
    often = Counter(map(scan_stem, files))
    named: dict[str, Path] = {}
    for path in files:
        whole = "-".join([*path.relative_to(folder).parts[:-1], path.name])
        name = re.sub(r"[^\w.-]+", "-", scan_stem(path if often[scan_stem(path)] == 1 else Path(whole)))
        if name in named:
            raise ValueError(f"{path} and {named[name]} would both be named {name}: rename one")
        named[name] = path
    people = {name: person_of(path.relative_to(folder)) or name for name, path in named.items()}
    return FoundScans(named, people, dict(sorted(skipped.items())))


def _listed(skipped: dict[str, str]) -> str:
    """What was skipped, for a message."""
    listed = "".join(f"\n  {name}: {why}" for name, why in sorted(skipped.items())[:20])
    return f"{listed and '; skipped were'}{listed}"


def find_t1w(root: str | Path) -> FoundScans:
    """The T1 scans of a raw dataset of BIDS: `*_T1w.nii` and `.nii.gz` where BIDS wants them; others are skipped.

    Args:
        root: Root of the dataset, with dataset_description.json and `sub-` folders.

    Raises:
        FileNotFoundError: No such folder, or no scan in it, with what was skipped.
        ValueError: Not the root of a raw dataset, or two scans of one name.
    """
    root = Path(root)
    check_raw(root)
    skipped: dict[str, str] = {}
    named: dict[str, Path] = {}
    for path in sorted(root.glob("sub-*/**/*_T1w.nii*")):
        if not _is_candidate(path, root, skipped):
            continue
        place = path.relative_to(root)
        try:
            wanted = BidsName.of(path).file("".join(path.suffixes))
        except ValueError as error:
            skipped[str(place)] = str(error).split(": ", 1)[1]
            continue
        if place != wanted:
            skipped[str(place)] = f"not where BIDS wants it, {wanted.as_posix()}"
            continue
        if scan_stem(path) in named:
            raise ValueError(f"{path} and {named[scan_stem(path)]} have one name: remove one")
        named[scan_stem(path)] = path
    if not named:
        raise FileNotFoundError(f"no scan (sub-*/[ses-*/]anat/*_T1w.nii or .nii.gz) in {root}{_listed(skipped)}")
    return FoundScans(named, {name: person_of(path.relative_to(root)) for name, path in named.items()}, skipped)


def person_of(path: Path) -> str:
    """Whose a scan is by BIDS (`sub-`, `ses-`), in the file's name or its folders; empty where they do not say."""
    stem = scan_stem(path)
    named = PERSON.search(stem) or next(filter(None, map(PERSON.match, reversed(path.parts[:-1]))), None)
    if named:
        return named[1]
    if REPEAT.search(stem):
        return REPEAT.split(stem)[0]
    folders = path.parts[:-1]
    sessions = [at for at, part in enumerate(folders) if SESSION_FOLDER.match(part)]
    return folders[sessions[0] - 1] if sessions and sessions[0] else ""


def _walk(folder: Path, out: Path, skipped: dict[str, str]) -> Iterator[Path]:
    """All files below a folder, links followed after all else, each folder once; hidden folders are skipped."""
    known: set[str] = set()
    bases = [folder]  # the folder, and then the linked folders that are met

    def unreadable(error: OSError) -> None:
        skipped[os.path.relpath(error.filename, folder)] = f"a folder that cannot be read: {error.strerror}"

    for base in bases:
        for here, folders, files in os.walk(base, onerror=unreadable):
            where, real = Path(here), os.path.realpath(here)
            if real in known:
                skipped[str(where.relative_to(folder))] = "leads to a folder that is searched already"
                folders.clear()
                continue
            if Path(real).is_relative_to(out):
                folders.clear()
                continue
            known.add(real)
            for name in folders.copy():
                if name.startswith("."):
                    skipped[str((where / name).relative_to(folder))] = "a hidden folder"
                    folders.remove(name)
                elif (where / name).is_symlink():
                    bases.append(where / name)
            yield from (where / name for name in files)


def _is_candidate(path: Path, folder: Path, skipped: dict[str, str]) -> bool:
    """Whether a file may be a T1 scan by its name; if not, and it looks like a scan, why is written down."""
    place, stem = path.relative_to(folder), scan_stem(path)
    if DICOM.search(path.name):
        skipped[str(place.parent / f"*{path.suffix}")] = "DICOM: convert it to NIfTI, for instance with dcm2niix"
    elif OTHER_FORMATS.search(path.name):
        skipped[str(place)] = "neither .nii nor .nii.gz: convert it"
    if not path.name.lower().endswith(ENDINGS):
        if not path.suffix and path.is_symlink() and not path.exists():
            skipped[str(place)] = "a link, of a folder perhaps, to what is not there"
        return False
    if path.name.startswith("."):
        why = "a hidden file"
    elif not path.exists():
        why = "a link to a file that is not there"
    elif not path.is_file():
        why = "no regular file"
    elif NO_IMAGE.search(stem):
        why = "a mask, a map or a transform by its name"
    elif any(map(NO_IMAGE_FOLDER.match, place.parts[:-1])):
        why = "in a folder of masks or labels by its name"
    elif NO_T1.search(stem):
        why = "not T1-weighted by its name"
    else:
        return True
    skipped[str(place)] = why
    return False


def _without_copies(candidates: list[Path], folder: Path, skipped: dict[str, str]) -> list[Path]:
    """Files in order, without links to one that is there and without processed copies of one that is there."""
    kept: dict[str, Path] = {}
    for path in sorted(candidates, key=lambda path: (path.is_symlink(), path)):
        first = kept.setdefault(os.path.realpath(path), path)
        if first != path:
            skipped[str(path.relative_to(folder))] = f"the same file as {first.relative_to(folder)}"
    sittings: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path in sorted(kept.values(), key=lambda path: (_processed(path), path)):
        sittings[_sitting(path.relative_to(folder))].append(path)
    files = []
    for (person, _), paths in sittings.items():
        for path in paths:
            if person and _processed(path) > _processed(paths[0]):
                why = f"a processed copy ({'-, '.join(DERIVED.findall(path.name))}-) of {paths[0].relative_to(folder)}"
                skipped[str(path.relative_to(folder))] = why
            else:
                files.append(path)
    return sorted(files)


def _processed(path: Path) -> int:
    """How many parts of a name say that the scan was processed."""
    return len(DERIVED.findall(path.name))


def _sitting(place: Path) -> tuple[str, str]:
    """Person and session of a scan at a place below the folder."""
    session = re.search(rf"(?:^|[_/-])({SESSION})", place.as_posix(), re.IGNORECASE)
    return person_of(place), session[1] if session else ""
