"""Preparing a folder of scans: a cohort in the LUMIR frame."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from tqdm.auto import tqdm

from lumirlib import provenance
from lumirlib._checks import check_choice
from lumirlib.data.frame import FRAME_SHAPE, frame_affine
from lumirlib.data.nifti import write_nifti
from lumirlib.files import check_writable, no_empty_folders, read_json, write_atomically, write_json
from lumirlib.scans.bids import DESCRIPTION, BidsName, is_dataset, write_description
from lumirlib.scans.find import find_scans, find_t1w
from lumirlib.scans.plausibility import Likeness, likeness
from lumirlib.scans.prepare import RECIPES, check_skip, check_tools, prepare_scan
from lumirlib.scans.scan import collected_warnings
from lumirlib.training.engine import pick_device
from lumirlib.training.interrupts import end_with_parent
from lumirlib.training.threads import threads_each

LIKENESS = tuple(measure.name for measure in fields(Likeness))
#: At most so many people, the last by name, are held out of a folder for validation.
MAX_VALIDATION = 10
#: File that says which folder a cohort was prepared from.
SOURCE = "source.json"
#: What the names of prepared scans have besides, as derivatives of BIDS, and where their space is described.
DERIVED = {"space": "LUMIR", "desc": "preproc"}
FRAME_REFERENCE = "https://learn2reg.grand-challenge.org/learn2reg-2024/"


@dataclass(frozen=True)
class PreparedFolder:
    """What :func:`prepare_folder` has made.

    Attributes:
        path: Path of dataset.json.
        broken: Reason why a scan could not be prepared, by the scan; such scans are left out.
        implausible: Reason why a scan is hardly a T1 brain, by the scan; such scans are left out unless they were to be
            kept.
        skipped: Reason why a file was not taken for a scan, by the file.
        remarks: Remarks made while a scan was read and prepared, by the scan.
    """

    path: Path
    broken: dict[str, str]
    implausible: dict[str, str]
    skipped: dict[str, str]
    remarks: dict[str, list[str]]


@dataclass(frozen=True)
class _Layout:
    """Where things lie in the folder of a cohort.

    Attributes:
        out: The folder.
        bids: Whether it is a derivative of BIDS; the record of a scan is the image's sidecar then.
    """

    out: Path
    bids: bool

    def files(self, name: str) -> tuple[Path, Path]:
        """Image and record of a prepared scan."""
        if self.bids:
            derived = BidsName.of(name).with_(**DERIVED)
            return self.out / derived.file(), self.out / derived.file(".json")
        return self.out / "imagesTr" / f"{name}_0000.nii.gz", self.out / "prepared" / f"{name}.json"

    def records(self) -> dict[str, Path]:
        """Record of each scan that was prepared, by its name."""
        if not self.bids:
            return {path.stem: path for path in sorted((self.out / "prepared").glob("*.json"))}
        mark = "".join(f"_{key}-{label}" for key, label in DERIVED.items())
        return {path.stem.replace(mark, ""): path for path in sorted(self.out.glob(f"sub-*/**/*{mark}_T1w.json"))}

    def foreign(self) -> list[str]:
        """Names of what a cohort consists of that are there, of folders of people the first."""
        images = sorted(self.out.glob("sub-*"))[:1] if self.bids else [self.out / "imagesTr"]
        return [path.name for path in (self.out / "dataset.json", *images) if path.is_file() or any(path.glob("*"))]

    def about(self, scan: Path) -> dict[str, object]:
        """What BIDS wants to know of a prepared scan."""
        if not self.bids:
            return {}
        source = BidsName.of(scan).file("".join(scan.suffixes)).as_posix()
        return {
            "Description": f"Brain in the LUMIR frame, {'x'.join(map(str, FRAME_SHAPE))} voxels of 1 mm, uint8.",
            "Sources": [f"bids:raw:{source}"],
            "SpatialReference": FRAME_REFERENCE,
            "SkullStripped": True,
        }


def _facts(path: Path, skip: tuple[str, ...], recipe: str) -> dict[str, object]:
    """What makes a prepared scan out of date when it changes."""
    return {"scan": path.name, "sha256": _digest_of(path), "skipped": list(skip), "recipe": recipe, "tools": _tools()}


def _digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@lru_cache(maxsize=1)
def _tools() -> dict[str, str]:
    """Versions of what prepares scans."""
    return {package: provenance.version(package) for package in ("lumirlib", "deepbet", "SimpleITK", "deepmriprep")}


def _record(layout: _Layout, name: str, path: Path, skip: tuple[str, ...], recipe: str) -> dict | None:
    """The record of a scan that was prepared before: of the same bytes, steps and tools, its image as written."""
    image, record = layout.files(name)
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        wanted = _facts(path, skip, recipe) | {"image_sha256": _digest_of(image)}
        return known if wanted.items() <= known.items() else None
    except (OSError, ValueError, AttributeError):
        return None


def _prepare_into(
    layout: _Layout, name: str, path: Path, skip: tuple[str, ...], recipe: str, device: str, threads: int
) -> dict | str:
    """Prepare one scan of a folder, image first, record last; the record, or what went wrong."""
    if threads:
        torch.set_num_threads(threads)
    image_path, record_path = layout.files(name)
    try:
        record_path.unlink(missing_ok=True)
        facts = _facts(path, skip, recipe)
        with collected_warnings() as told:
            prepared = prepare_scan(path, skip, device, recipe=recipe)
            found = likeness(prepared)
        remarks = [one.replace(str(path), path.name) for one in told]
        write_nifti(image_path, prepared.in_frame[0, 0].numpy().astype(np.uint8), frame_affine(1))
        record = {
            "name": name,
            **layout.about(path),
            **facts,
            "image_sha256": _digest_of(image_path),
            "shape": list(prepared.scan.shape),
            "spacing_mm": prepared.scan.spacing_mm.round(4).tolist(),
            "orientation": "".join(nib.aff2axcodes(prepared.scan.affine)),
            **found.rounded(),
            "doubts": found.doubts,
            "remarks": remarks,
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


def _source_of(folder: Path) -> str:
    """16 hexadecimal digits that stand for the place of a folder, which no cohort should name."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]


def _check_source(folder: Path, layout: _Layout, scans: Mapping[str, Path]) -> None:
    """Raise ValueError if a layout holds a cohort of another folder, or images that were not prepared here.

    What was prepared from this folder, or from one that has all of the same files by name and content (it was moved, or
    copied and added to), is gone on with.
    """
    out, known = layout.out, layout.records()
    source = out / SOURCE
    if source.is_file() and read_json(source).get("folder_sha256") == _source_of(folder):
        return
    held = layout.foreign()
    if not known and not held:
        return
    if not known and not source.is_file():
        raise ValueError(f"{out} has {' and '.join(held)} that lumirlib did not prepare: choose another --out")
    lost = []
    for name, path in known.items():
        try:
            same = name in scans and read_json(path).get("sha256") == _digest_of(scans[name])
        except (OSError, ValueError):
            same = False
        if not same:
            lost.append(name)
    if lost or not known:
        what = f"{', '.join(lost[:5])}{' ...' if len(lost) > 5 else ''}" if lost else "unfinished work"
        raise ValueError(
            f"{out} holds scans that were prepared from another folder and are not in {folder}, or not with this "
            f"content: {what}. Choose another --out, or remove that folder"
        )


@contextmanager
def _begun(folder: Path, layout: _Layout) -> Iterator[None]:
    """A block that prepares scans, whose folder says of what; where nothing was prepared, nothing is left there."""
    marks = [layout.out / name for name in (SOURCE, DESCRIPTION, ".bidsignore") if not (layout.out / name).exists()]
    with no_empty_folders(layout.out / SOURCE):
        try:
            if layout.bids:
                write_description(layout.out, [folder.resolve()], "lumirlib prepare")
            about = {"folder_sha256": _source_of(folder), "name": folder.resolve().name}
            write_json(layout.out / SOURCE, about)
            yield
        finally:
            if not (layout.records() or layout.foreign()):
                for mark in marks:
                    mark.unlink(missing_ok=True)


def _validation_people(people: Sequence[str], validation: int | None) -> list[str]:
    """The last people, held out: a tenth, 2 to 10, where None is given and at least 4 people are there."""
    people = list(dict.fromkeys(people))
    if validation is None:
        validation = min(MAX_VALIDATION, max(2, len(people) // 10)) if len(people) >= 4 else 0
    if validation not in (0, *range(2, len(people) + 1)):
        raise ValueError(f"validation must be 0, or from 2 to the number of people, {len(people)}; got {validation}")
    return people[len(people) - validation :]


def prepare_folder(
    folder: str | Path,
    out: str | Path,
    skip: Iterable[str] = (),
    jobs: int = 1,
    validation: int | None = None,
    name: str = "",
    device: str = "auto",
    progress: bool = True,
    keep_implausible: bool = False,
    recipe: str = "direct",
) -> PreparedFolder:
    """Make a folder of T1 scans into a cohort that :func:`lumirlib.load_cohort` reads.

    Each scan is written atomically, its record last, so that an interrupted call goes on where it stopped; a scan whose
    bytes, steps or tools have changed is prepared anew. The dataset JSON and the QC sheet are written at the end. All
    scans of a person stand on one side of the split.

    A raw dataset of BIDS, a folder with dataset_description.json, becomes a derivative of BIDS, which is a cohort too:
    `sub-X/[ses-Y/]anat/sub-X[_ses-Y]_space-LUMIR_desc-preproc_T1w.nii.gz`, each with its record as sidecar.

    Args:
        folder: Folder with `.nii` or `.nii.gz` files, at any depth; see :func:`lumirlib.scans.find.find_scans`. Of a
            dataset of BIDS its root; see :func:`lumirlib.scans.find.find_t1w`.
        out: Folder of the cohort: dataset.json, imagesTr, prepared (a record per scan), qc.csv, qc_*.png and .pdf.
        skip: Steps to skip for all scans, as for :func:`prepare_scan`.
        jobs: Number of scans at a time, each in a process of its own with its share of the processor.
        validation: Number of people, the last by name, that are held out: the ordered pairs of scans of two of them are
            the validation pairs. None takes a tenth, 2 to 10, where there are at least 4 people.
        name: Name of the cohort; the folder's if empty.
        device: Device that skulls are stripped on.
        progress: Whether to show a progress bar.
        keep_implausible: Whether scans that are hardly a T1 brain stay in the cohort; they are named in either case.
        recipe: Name, one of :data:`lumirlib.scans.prepare.RECIPES`.

    Returns:
        What was made. Scans that were left out are named in dataset.json too.

    Raises:
        FileNotFoundError: No such folder, or no scan in it.
        ValueError: An unknown step, names that clash, no scan that is left, `out` has the cohort of another folder, or
            the folder is a dataset of BIDS and no raw one.
        OSError: `out` cannot be written, said before anything is prepared.
        ModuleNotFoundError: A package that a step needs.
    """
    from lumirlib.scans.qc import prepared_figures

    skipped, folder, out = check_skip(skip), Path(folder), Path(out)
    check_choice(recipe, RECIPES, "recipe")
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ValueError(f"jobs must be a whole number from 1, got {jobs!r}")
    layout = _Layout(out, is_dataset(folder))
    found = find_t1w(folder) if layout.bids else find_scans(folder, out)
    scans = found.files
    _validation_people(list(found.people.values()), validation)
    check_tools(skipped)
    with no_empty_folders(out / SOURCE):
        check_writable(out)
    _check_source(folder, layout, scans)
    device = str(pick_device(device))
    records = {one: known for one, path in scans.items() if (known := _record(layout, one, path, skipped, recipe))}
    missing = {one: path for one, path in scans.items() if one not in records}
    broken: dict[str, str] = {}
    threads = threads_each(jobs) if jobs > 1 else 0
    spawned = partial(ProcessPoolExecutor, mp_context=get_context("spawn"), initializer=end_with_parent)
    pool = spawned(jobs) if jobs > 1 and missing else None
    with (
        _begun(folder, layout),
        pool or nullcontext(),
        tqdm(total=len(scans), initial=len(records), desc="prepare", unit="scan", disable=not progress) as bar,
    ):
        work = {
            one: partial(_prepare_into, layout, one, path, skipped, recipe, device, threads)
            for one, path in missing.items()
        }
        try:
            for one, result in _results(work, pool):
                if isinstance(result, str):
                    broken[one] = result
                    tqdm.write(f"cannot be prepared: {scans[one]}: {result}", file=sys.stderr)
                else:
                    records[one] = result
                bar.update()
        except BrokenProcessPool as error:
            raise MemoryError("a process that prepared a scan was killed: memory? Take fewer --jobs") from error
        except KeyboardInterrupt:
            if pool:
                pool.shutdown(wait=False, cancel_futures=True)
            raise
    implausible = {one: record["doubts"] for one, record in records.items() if record["doubts"]}
    names = [one for one in scans if one in records and (keep_implausible or one not in implausible)]
    if not names:
        reasons = "".join(f"\n  {one}: {why}" for one, why in {**broken, **implausible}.items())
        raise ValueError(f"none of the {len(scans)} scans in {folder} is left for a cohort:{reasons}")
    person = found.people
    held_out = _validation_people([person[one] for one in names], validation)
    entry = {one: f"./{layout.files(one)[0].relative_to(out).as_posix()}" for one in names}
    held = [one for one in names if person[one] in held_out]
    pairs = [{"fixed": entry[a], "moving": entry[b]} for a in held for b in held if person[a] != person[b]]
    content = {
        "name": name or folder.resolve().name,
        "description": "prepared by lumirlib: LUMIR frame (160x224x192, 1 mm, RAS, affine to ICBM152), uint8",
        "pairing": "unpaired",
        "modality": {"0": "MR"},
        "tensorImageSize": {"0": "3D"},
        "tensorImageShape": {"0": list(FRAME_SHAPE)},
        "recipe": recipe,
        "skipped_steps": list(skipped),
        "left_out": broken,
        "implausible": implausible,
        "skipped_files": found.skipped,
        "numTraining": len(names) - len(held),
        "training": [{"image": entry[one]} for one in names if one not in held],
        "numValidation": len(pairs),
        "validation": pairs,
    }
    shown = [records[one] | {"person": person[one]} for one in scans if one in records]
    _write_table(out / "qc.csv", shown)
    prepared_figures([(record, layout.files(record["name"])[0]) for record in shown], out, content["name"])
    remarks = {one: record["remarks"] for one, record in records.items() if record["remarks"]}
    return PreparedFolder(write_json(out / "dataset.json", content), broken, implausible, found.skipped, remarks)


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

    columns = ("name", "person", "scan", "orientation", "shape", "spacing_mm", *LIKENESS, "doubts")
    table = pd.DataFrame([{key: record[key] for key in columns} for record in records])
    write_atomically(path, lambda to: table.sort_values("template_correlation").to_csv(to, index=False))
