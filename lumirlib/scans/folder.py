"""Preparing a folder of scans: a cohort in the LUMIR frame."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from tqdm.auto import tqdm

from lumirlib import provenance
from lumirlib.data.frame import FRAME_SHAPE, frame_affine
from lumirlib.data.nifti import write_nifti
from lumirlib.files import write_atomically, write_json
from lumirlib.scans.prepare import check_skip, prepare_scan, template_correlation
from lumirlib.scans.scan import require, scan_stem
from lumirlib.training.engine import pick_device

#: At most so many people, the last by name, are held out of a folder for validation.
MAX_VALIDATION = 10


# a folder -------------------------------------------------------------------------------------------------------------
def find_scans(folder: str | Path, out: str | Path) -> dict[str, Path]:
    """The NIfTI files of a folder and those below it, but not in `out`, by name: of the file, or of its path."""
    folder, out = Path(folder), Path(out).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    files = sorted(
        path
        for path in folder.rglob("*.nii*")
        if path.name.endswith((".nii", ".nii.gz"))
        and not path.name.startswith(".")
        and path.is_file()
        and not path.resolve().is_relative_to(out)
    )
    if not files:
        raise FileNotFoundError(f"no .nii or .nii.gz file in {folder}")
    often = Counter(map(scan_stem, files))

    def name(path: Path) -> str:
        whole = (
            scan_stem(path)
            if often[scan_stem(path)] == 1
            else "-".join([*path.relative_to(folder).parts[:-1], path.name])
        )
        return re.sub(r"[^\w.-]+", "-", scan_stem(Path(whole)))

    named: dict[str, Path] = {}
    for path in files:
        if name(path) in named:
            raise ValueError(f"{path} and {named[name(path)]} would both be named {name(path)}: rename one")
        named[name(path)] = path
    return named


def _files_of(out: Path, name: str) -> tuple[Path, Path]:
    """Image and record of a prepared scan."""
    return out / "imagesTr" / f"{name}_0000.nii.gz", out / "prepared" / f"{name}.json"


def _facts(path: Path, skip: tuple[str, ...]) -> dict[str, object]:
    """What makes a prepared scan out of date when it changes."""
    return {"scan": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "skipped": list(skip)}


def _record(out: Path, name: str, path: Path, skip: tuple[str, ...]) -> dict | None:
    """The record of a scan that was prepared before, of the same bytes and with the same steps, else None."""
    image, record = _files_of(out, name)
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        return known if image.is_file() and _facts(path, skip).items() <= known.items() else None
    except (OSError, ValueError):
        return None


def _prepare_into(out: Path, name: str, path: Path, skip: tuple[str, ...], device: str, threads: int) -> dict | str:
    """Prepare one scan of a folder, image first, record last; the record, or what went wrong."""
    if threads:
        torch.set_num_threads(threads)
    image_path, record_path = _files_of(out, name)
    try:
        record_path.unlink(missing_ok=True)
        prepared = prepare_scan(path, skip, device)
        image = prepared.in_frame
        write_nifti(image_path, image[0, 0].numpy().astype(np.uint8), frame_affine(1))
        record = {
            "name": name,
            **_facts(path, skip),
            "shape": list(prepared.scan.shape),
            "spacing_mm": prepared.scan.spacing_mm.round(4).tolist(),
            "orientation": "".join(nib.aff2axcodes(prepared.scan.affine)),
            "brain_ml": round(prepared.brain_ml, 1),
            "template_correlation": round(template_correlation(image), 4),
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


def _validation_people(names: Sequence[str], validation: int | None) -> list[str]:
    """The last names, held out: a tenth, 2 to 10, where None is given and at least 4 people are there."""
    if validation is None:
        validation = min(MAX_VALIDATION, max(2, len(names) // 10)) if len(names) >= 4 else 0
    if validation not in (0, *range(2, len(names) + 1)):
        raise ValueError(f"validation must be 0, or from 2 to the number of scans, {len(names)}; got {validation}")
    return list(names[len(names) - validation :])


def prepare_folder(
    folder: str | Path,
    out: str | Path,
    skip: Iterable[str] = (),
    jobs: int = 1,
    validation: int | None = None,
    name: str = "",
    device: str = "auto",
    progress: bool = True,
) -> tuple[Path, dict[str, str]]:
    """Make a folder of T1 scans into a cohort that :func:`lumirlib.load_cohort` reads.

    Each scan is written atomically, its record last, so that an interrupted call goes on where it stopped; a scan whose
    bytes or steps have changed is prepared anew. The dataset JSON and the QC sheet are written at the end.

    Args:
        folder: with `.nii` or `.nii.gz` files, at any depth, one scan a person.
        out: where the cohort goes: dataset.json, imagesTr, prepared (a record per scan), qc.csv, qc_*.png and .pdf.
        skip: as for :func:`prepare_scan`, of all scans.
        jobs: scans at a time, each in a process of its own with its share of the processor.
        validation: how many people, the last by name, are held out: their ordered pairs are the validation pairs.
            None takes a tenth, 2 to 10, where there are at least 4 scans.
        name: of the cohort; the folder's if empty.
        device: where skulls are stripped.
        progress: show a progress bar.

    Returns:
        Path of dataset.json, and the scans that could not be prepared -> why. They are left out and named in it.

    Raises:
        FileNotFoundError: no such folder, or no scan in it.
        ValueError: an unknown step, names that clash, or no scan that could be prepared.
        ModuleNotFoundError: a package that a step needs.
    """
    from lumirlib.scans.qc import prepared_figures

    skipped, folder, out = check_skip(skip), Path(folder), Path(out)
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ValueError(f"jobs must be a whole number from 1, got {jobs!r}")
    scans = find_scans(folder, out)
    _validation_people(list(scans), validation)
    for step, package in (("strip", "deepbet"), ("bias", "SimpleITK"), ("affine", "SimpleITK")):
        if step not in skipped:
            require(package)
    device = str(pick_device(device))
    records = {one: found for one, path in scans.items() if (found := _record(out, one, path, skipped))}
    missing = {one: path for one, path in scans.items() if one not in records}
    broken: dict[str, str] = {}
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else 0
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) if jobs > 1 and missing else None
    with (
        pool or nullcontext(),
        tqdm(total=len(scans), initial=len(records), desc="prepare", unit="scan", disable=not progress) as bar,
    ):
        work = {one: partial(_prepare_into, out, one, path, skipped, device, threads) for one, path in missing.items()}
        try:
            for one, found in _results(work, pool):
                if isinstance(found, str):
                    broken[one] = found
                    tqdm.write(f"cannot be prepared: {scans[one]}: {found}", file=sys.stderr)
                else:
                    records[one] = found
                bar.update()
        except BrokenProcessPool as error:
            raise MemoryError("a process that prepared a scan was killed: memory? Take fewer --jobs") from error
        except KeyboardInterrupt:
            if pool:
                pool.shutdown(wait=False, cancel_futures=True)
            raise
    names = [one for one in scans if one in records]
    if not names:
        raise ValueError(f"none of the {len(scans)} scans in {folder} could be prepared")
    held_out = _validation_people(names, validation)
    entry = {one: f"./{_files_of(out, one)[0].relative_to(out).as_posix()}" for one in names}
    pairs = [{"fixed": entry[a], "moving": entry[b]} for a in held_out for b in held_out if a != b]
    content = {
        "name": name or folder.resolve().name,
        "description": "prepared by lumirlib: LUMIR frame (160x224x192, 1 mm, RAS, affine to ICBM152), uint8",
        "pairing": "unpaired",
        "modality": {"0": "MR"},
        "tensorImageSize": {"0": "3D"},
        "tensorImageShape": {"0": list(FRAME_SHAPE)},
        "skipped_steps": list(skipped),
        "left_out": broken,
        "numTraining": len(names) - len(held_out),
        "training": [{"image": entry[one]} for one in names if one not in held_out],
        "numValidation": len(pairs),
        "validation": pairs,
    }
    _write_table(out / "qc.csv", [records[one] for one in names])
    prepared_figures([(records[one], _files_of(out, one)[0]) for one in names], out, content["name"])
    return write_json(out / "dataset.json", content), broken


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

    columns = ("name", "scan", "orientation", "shape", "spacing_mm", "brain_ml", "template_correlation")
    table = pd.DataFrame([{key: record[key] for key in columns} for record in records])
    write_atomically(path, lambda to: table.sort_values("template_correlation").to_csv(to, index=False))
