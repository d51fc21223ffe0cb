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
#: Parts of a name of an image of a head, in the order that BIDS wants.
ORDER = ("sub", "ses", "sample", "task", "acq", "ce", "trc", "stain", "rec", "dir", "run", "mod", "echo", "flip", "inv")
ORDER += ("mt", "part", "proc", "hemi", "space", "from", "to", "mode", "split", "recording", "chunk", "seg", "res")
ORDER += ("den", "label", "desc")
#: What of our outputs is not of BIDS: pages, reports, and transforms, which it has no name for yet.
IGNORED = ("figures", "figures/**", "logs", "logs/**", "**/*_xfm.*")


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
    path = Path(out) / "dataset_description.json"
    if path.is_file():
        if not any(one.get("Name") == "lumirlib" for one in read_json(path).get("GeneratedBy", [])):
            raise ValueError(f"{path}: of another dataset than a derivative of lumirlib: choose another --out")
        return path
    links = {
        name: os.path.relpath(one, out) for name, one in zip(("raw", "raw2"), dict.fromkeys(sources), strict=False)
    }
    write_atomically(Path(out) / ".bidsignore", lambda to: to.write_text("\n".join(IGNORED) + "\n", encoding="utf-8"))
    content = {
        "Name": about,
        "BIDSVersion": VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "lumirlib", "Version": __version__}],
        "License": "as the source's",
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
