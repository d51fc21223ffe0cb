"""Names, sidecars and the description of BIDS and its derivatives (BIDS 1.10)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lumirlib._version import __version__
from lumirlib.data.nifti import scan_stem
from lumirlib.files import read_json, write_atomically, write_json

VERSION = "1.10.0"
#: File at the root of every dataset.
DESCRIPTION = "dataset_description.json"
#: Parts of a name of an image of a head, in the order that BIDS wants.
ORDER = ("sub", "ses", "sample", "task", "acq", "ce", "trc", "stain", "rec", "dir", "run", "mod", "echo", "flip", "inv")
ORDER += ("mt", "part", "proc", "hemi", "space", "from", "to", "mode", "split", "recording", "chunk", "seg", "res")
ORDER += ("den", "label", "desc")
#: What of our outputs is not of BIDS: pages, reports, the cohort, and transforms, which it has no name for yet.
IGNORED = ("figures", "figures/**", "logs", "logs/**", "dataset.json", "source.json", "qc*", "**/*_xfm.*")


@dataclass(frozen=True)
class BidsName:
    """A file's name as BIDS takes it apart.

    Attributes:
        entities: Label of each part, such as "01" of "sub".
        suffix: Kind of the image, such as "T1w".
    """

    entities: Mapping[str, str]
    suffix: str

    @classmethod
    def of(cls, path: str | Path) -> BidsName:
        """The name of a file.

        Raises:
            ValueError: not a name of BIDS, with a person and a suffix.
        """
        *parts, suffix = scan_stem(Path(path)).split("_")
        found = dict(part.split("-", 1) for part in parts if re.fullmatch(r"[a-z]+-[A-Za-z0-9+]+", part))
        well = len(found) == len(parts) and set(found) <= set(ORDER) and re.fullmatch(r"[A-Za-z0-9]+", suffix)
        if not well or "sub" not in found:
            raise ValueError(f"{path}: expected a name of BIDS, such as sub-01_ses-1_T1w.nii.gz, got {Path(path).name}")
        return cls(found, suffix)

    def with_(self, suffix: str = "", **entities: str) -> BidsName:
        """The name with other parts; an empty suffix is kept."""
        return BidsName({**self.entities, **entities}, suffix or self.suffix)

    @property
    def stem(self) -> str:
        """The name without ending, its parts in order."""
        parts = [f"{key}-{self.entities[key]}" for key in ORDER if key in self.entities]
        return "_".join([*parts, self.suffix])

    @property
    def label(self) -> str:
        """The scan as one label, to name its space by."""
        return "".join(re.findall("[A-Za-z0-9]", "".join(f"{k}{v}" for k, v in self.entities.items())))

    @property
    def folder(self) -> Path:
        """Where its images lie in a dataset."""
        levels = [f"{key}-{self.entities[key]}" for key in ("sub", "ses") if key in self.entities]
        return Path(*levels, "anat")

    def file(self, ending: str = ".nii.gz") -> Path:
        """Its path in a dataset."""
        return self.folder / f"{self.stem}{ending}"


def is_dataset(root: str | Path) -> bool:
    """Whether a folder is the root of a dataset of BIDS."""
    return (Path(root) / DESCRIPTION).is_file()


def check_raw(root: str | Path) -> None:
    """Raise unless a folder is the root of a raw dataset of BIDS.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no dataset_description.json, one that lacks what BIDS requires, or one of a derivative.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    if not is_dataset(root):
        raise ValueError(f"{root}: expected the root of a dataset of BIDS, with {DESCRIPTION}, which is not there")
    description = read_json(root / DESCRIPTION)
    missing = [key for key in ("Name", "BIDSVersion") if not isinstance(description.get(key), str)]
    if missing:
        raise ValueError(f"{root / DESCRIPTION}: BIDS requires {' and '.join(missing)}, as text")
    if description.get("DatasetType", "raw") != "raw":
        raise ValueError(f"{root / DESCRIPTION}: expected a raw dataset, got DatasetType {description['DatasetType']}")


def check_derivative(out: str | Path) -> bool:
    """Whether a folder is a derivative of ours; ValueError where it holds another dataset."""
    path = Path(out) / DESCRIPTION
    if path.is_file() and not any(one.get("Name") == "lumirlib" for one in read_json(path).get("GeneratedBy", [])):
        raise ValueError(f"{path}: of another dataset than a derivative of lumirlib: choose another --out")
    return path.is_file()


def write_description(out: str | Path, sources: Iterable[Path], about: str) -> Path:
    """Write dataset_description.json and .bidsignore of a derivative.

    One of ours that is there is kept.

    Args:
        out: Root of the derivative.
        sources: Roots of the datasets that it is made from, named by where they lie from `out`.
        about: Name of the derivative.

    Raises:
        ValueError: `out` holds another dataset.
    """
    path = Path(out) / DESCRIPTION
    if check_derivative(out):
        return path
    roots = list(dict.fromkeys(sources))
    links = {
        name: Path(os.path.relpath(one, out)).as_posix() for name, one in zip(("raw", "raw2"), roots, strict=False)
    }
    described = [read_json(one / DESCRIPTION) if is_dataset(one) else {} for one in roots]
    origins = [
        {"DOI": one["DatasetDOI"]} if "DatasetDOI" in one else {"URL": link}
        for one, link in zip(described, links.values(), strict=True)
    ]
    write_atomically(Path(out) / ".bidsignore", lambda to: to.write_text("\n".join(IGNORED) + "\n", encoding="utf-8"))
    content = {
        "Name": about,
        "BIDSVersion": VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "lumirlib", "Version": __version__}],
        "License": "as the source's",
        "SourceDatasets": origins,
        "DatasetLinks": links,
    }
    return write_json(path, content)


def write_sidecar(image: str | Path, content: Mapping[str, object]) -> Path:
    """Write the JSON beside an image."""
    image = Path(image)
    return write_json(image.with_name(f"{scan_stem(image)}.json"), content)


def root_of(path: Path, name: BidsName) -> Path:
    """The dataset that a file lies in, if it lies where BIDS wants it; else its folder."""
    folder = path.resolve().parent
    return (
        folder.parents[len(name.folder.parts) - 1]
        if folder.parts[-len(name.folder.parts) :] == name.folder.parts
        else folder
    )
