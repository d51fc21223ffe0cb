"""How like a T1 brain prepared volumes are: brains, altered brains, and volumes that are none.

    python benchmarks/plausibility.py --cohort brains --people BRAIN_0048 BRAIN_1000 --others FOLDER

The thresholds of :mod:`lumirlib.scans.plausibility` lie between the two groups. FOLDER holds further volumes that are
no T1 brain, for instance the maps that nilearn ships; the atlases of deepmriprep are always taken.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter
from tqdm.auto import tqdm

from lumirlib import load_cohort, provenance
from lumirlib.data.frame import template_folder
from lumirlib.data.nifti import read_nifti, write_nifti
from lumirlib.files import write_json
from lumirlib.scans.plausibility import likeness
from lumirlib.scans.prepare import prepare_scan
from lumirlib.scans.scan import as_scanned
from lumirlib.study.results import data_title

Volume = tuple[np.ndarray, np.ndarray]


def _turned(image: np.ndarray, affine: np.ndarray, generator: np.random.Generator) -> Volume:
    turn, shift = generator.uniform(-20, 20, 3), generator.uniform(-25, 25, 3)
    return as_scanned(torch.from_numpy(image)[None, None], affine, turn, shift, "LIA", (2.0, 2.6, 2.2))[:2]


def _without(axis: int, first: bool, share: float) -> Callable[..., Volume]:
    """Cut off a share of the brain's length along an axis."""

    def cut(image: np.ndarray, affine: np.ndarray, generator: np.random.Generator) -> Volume:
        other = tuple(one for one in range(3) if one != axis)
        inside = np.flatnonzero(image.any(axis=other))
        planes = round(share * len(inside))
        lost = inside[:planes] if first else inside[-planes:]
        image = image.copy()
        np.moveaxis(image, axis, 0)[lost] = 0
        return image, affine

    return cut


def _noisy(image: np.ndarray, affine: np.ndarray, generator: np.random.Generator) -> Volume:
    noise = generator.normal(0, 0.15, image.shape)  # of the white matter's intensity
    return np.where(image > 0, (image + noise).clip(1e-3), 0).astype(np.float32), affine


def _thick(image: np.ndarray, affine: np.ndarray, generator: np.random.Generator) -> Volume:
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[2]
    count = image.shape[2] // round(6 / spacing) * round(6 / spacing)
    slices = image[:, :, :count].reshape(*image.shape[:2], -1, round(6 / spacing)).mean(3)
    factor = count // slices.shape[2]
    matrix = affine @ np.diag([1, 1, factor, 1.0])
    matrix[:3, 3] += affine[:3, 2] * (factor - 1) / 2
    return slices, matrix


def _biased(image: np.ndarray, affine: np.ndarray, generator: np.random.Generator) -> Volume:
    return image * np.exp(np.linspace(-0.7, 0.7, image.shape[1], dtype=np.float32))[None, :, None], affine


def _inverted(image: np.ndarray, affine: np.ndarray, generator: np.random.Generator) -> Volume:
    return np.where(image > 0, 1.05 - image, 0).astype(np.float32), affine


def _grey(image: np.ndarray, affine: np.ndarray, generator: np.random.Generator) -> Volume:
    return np.where(image > 0, np.exp(-(((image - 0.6) / 0.1) ** 2)), 0).astype(np.float32), affine


def _white(image: np.ndarray, affine: np.ndarray, generator: np.random.Generator) -> Volume:
    return np.where(image > 0, ((image - 0.65) * 5).clip(0, 1), 0).astype(np.float32), affine


def _mask(image: np.ndarray, affine: np.ndarray, generator: np.random.Generator) -> Volume:
    return (image > 0).astype(np.float32), affine


def _header_lies(image: np.ndarray, affine: np.ndarray, generator: np.random.Generator) -> Volume:
    return np.ascontiguousarray(image.transpose(0, 2, 1)), affine  # the nose is up, by the header


def _upside_down(image: np.ndarray, affine: np.ndarray, generator: np.random.Generator) -> Volume:
    return np.ascontiguousarray(image[:, :, ::-1]), affine


#: What is done to a brain that stays one: a cohort may have it.
KEPT: dict[str, Callable[..., Volume]] = {
    "as it is": lambda image, affine, generator: (image, affine),
    "turned and shifted": _turned,
    "left and right exchanged": lambda image, affine, generator: (np.ascontiguousarray(image[::-1]), affine),
    "without the lowest fifth": _without(2, True, 0.2),
    "without the uppermost fifth": _without(2, False, 0.2),
    "without the hindmost fifth": _without(1, True, 0.2),
    "noise of 15 % of white matter": _noisy,
    "blurred, sigma 2 voxels": lambda image, affine, generator: (gaussian_filter(image, 2) * (image > 0), affine),
    "slices of 6 mm": _thick,
    "bias field of factor 4": _biased,
    "gamma 0.5": lambda image, affine, generator: (image**0.5, affine),
    "gamma 2": lambda image, affine, generator: (image**2, affine),
}
#: What is done to a brain that is none afterwards, or does not lie where its header says.
LOST: dict[str, Callable[..., Volume]] = {
    "contrast inverted": _inverted,
    "grey-matter map": _grey,
    "white-matter map": _white,
    "probability map": lambda image, affine, generator: (
        ((image - 0.4) * 3).clip(0, 1) * (image < 0.78),
        affine,
    ),
    "mask": _mask,
    "header with two axes exchanged": _header_lies,
    "upside down by the header": _upside_down,
}


def volumes(cohort, names: list[str]) -> Iterator[tuple[str, str, str, np.ndarray, np.ndarray]]:
    """(group, kind, name, array, affine) of what is made from some of a cohort's scans."""
    both = [subject for pair in cohort.validation_pairs for subject in (pair.fixed, pair.moving)]
    people = {subject.name: subject for subject in [*cohort.train, *both]}
    for number, name in enumerate(names or list(people)[:1]):
        image = cohort.image(people[name])[0, 0].numpy()
        for group, ways in (("brain", KEPT), ("other", LOST)):
            for kind, way in ways.items():
                yield group, kind, name, *way(image, cohort.affine, np.random.default_rng(number))
        if people[name].labels:
            yield "other", "label map", name, cohort.label_volume(people[name])[0, 0].numpy(), cohort.affine


def others(folders: list[Path]) -> Iterator[tuple[str, str, str, np.ndarray, np.ndarray]]:
    """Volumes of installed packages and of folders."""
    for folder in folders:
        for path in sorted(folder.rglob("*.nii*")):
            array, affine = read_nifti(path)
            if path.name.startswith("Template_05mm"):
                yield "brain", "the template itself", path.name, array, affine
            elif array.ndim == 4:
                for volume in range(array.shape[3]):
                    yield "other", "volume of a package", f"{path.name}, {volume}", array[..., volume], affine
            elif "_t1_" in path.name:
                yield "brain", "another template", path.name, array, affine
            else:
                yield "other", "volume of a package", path.name, array, affine


def measure(array: np.ndarray, affine: np.ndarray, folder: Path) -> dict[str, object]:
    """What `prepare --skip strip bias` finds out about a volume, or why it refuses it."""
    path = folder / "scan.nii.gz"
    write_nifti(path, np.nan_to_num(array).clip(0).astype(np.float32), affine)
    try:
        prepared = prepare_scan(path, ("strip", "bias"))
        found = likeness(prepared)
        return {**found.rounded(), "doubts": found.doubts}
    except ValueError as error:
        return {"refused": str(error).replace(f"{path}: ", "")}


def main() -> None:
    """Measure, print the ranges, and write ``<results>/benchmarks/plausibility_<cohort>.json``."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cohort", default="brains", help="embedded, brains, or a dataset JSON")
    options.add_argument("--people", nargs="+", default=[], help="names of scans of the cohort; the first if not given")
    options.add_argument("--others", default="", help="folder of further volumes that are no T1 brain")
    options.add_argument("--out", default="", help="results folder")
    given = options.parse_args()
    cohort = load_cohort(given.cohort, 2)
    folders = [template_folder(), *([Path(given.others)] if given.others else [])]
    rows = []
    with tempfile.TemporaryDirectory() as folder, tqdm(unit="volume") as bar:
        for source in (volumes(cohort, given.people), others(folders)):
            for group, kind, name, array, affine in source:
                rows.append({"group": group, "kind": kind, "name": name, **measure(array, affine, Path(folder))})
                bar.update()
    about = {
        "command": f"python benchmarks/plausibility.py {' '.join(map(provenance.redact_path, sys.argv[1:]))}".strip(),
        "commit": provenance.commit(),
        "made": provenance.now(),
        "device": provenance.describe_device(torch.device("cpu")),
        "data": data_title(cohort.short_name, cohort.name, cohort.simulated, cohort.resolution_mm),
        "versions": provenance.versions(),
    }
    path = write_json(
        provenance.results_folder(given.out) / "benchmarks" / f"plausibility_{cohort.short_name}.json",
        {"provenance": about, "rows": rows},
    )
    table = pd.DataFrame(rows).groupby(["group", "kind"], sort=False)
    print(
        table[["template_correlation", "dark_share", "flat_share"]].agg(["min", "max"]).to_string(float_format="%.3f")
    )
    print(table["doubts"].apply(lambda found: f"{(found != '').sum()} of {len(found)} doubted").to_string())
    print(path)


if __name__ == "__main__":
    main()
