"""How much a preparation changes Dice: real brains from odd grids, prepared by each recipe, against the frame's own.

    python benchmarks/preparation.py        # needs LUMIR_BRAINS; writes results/benchmarks/preparation_brains.*

Brains of the cohort are stored as another scanner would have, turned, shifted, with other axes, voxels and a bias
field, and prepared (they are stripped already). The packaged weights register them at 2 mm, labels are carried by the
whole map, and Dice is taken on the labels' own voxels, as for the images that were in the frame from the start.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from lumirlib import metrics, provenance, spatial
from lumirlib.data.nifti import read_label_volume, write_nifti
from lumirlib.files import write_json
from lumirlib.metrics.labels import LUMIR_LABELS
from lumirlib.plots import save_figure, use_style
from lumirlib.scans.maps import ScanMap
from lumirlib.scans.prepare import RECIPES, STEPS, PreparedScan, prepare_scan
from lumirlib.scans.scan import as_scanned, read_scan, transform, world_slabs
from lumirlib.training.registrar import Registrar, default_registrar

PEOPLE = (1000, 1007, 1014)
#: Turn about each axis in degrees, shift in mm, orientation and spacing in mm of each.
SCANNERS = (
    ((9, -12, 14), (15, -9, 12), "LAS", (1.0, 1.0, 1.0)),
    ((-13, 8, 10), (-14, 20, 6), "RSA", (0.8, 0.8, 1.6)),
    ((5, 11, -12), (8, 10, -20), "PIR", (0.9, 1.2, 1.0)),
)
#: The images as the cohort has them, beside the recipes.
FRAME = "frame's own"


def files_of(root: Path, person: int) -> tuple[Path, Path]:
    """Image and labels of a person of the cohort."""
    return tuple(root / folder / f"BRAIN_{person}_0000.nii.gz" for folder in ("imagesVal", "labelsVal"))


def labels_of(root: Path, person: int) -> torch.Tensor:
    """Labels ``(1, 1, 160, 224, 192)`` of a person."""
    return torch.from_numpy(np.ascontiguousarray(read_label_volume(files_of(root, person)[1])[0]))[None, None]


def scanned(root: Path, person: int, scanner: tuple, out: Path) -> tuple[Path, np.ndarray]:
    """A brain as another scanner would have stored it, under a bias field: its file, and the pose 4 x 4."""
    scan = read_scan(files_of(root, person)[0])
    array, affine, pose = as_scanned(scan.values, scan.affine, *scanner)
    along = np.linspace(-0.25, 0.25, array.shape[1])[None, :, None]
    bright = np.rint(array * np.exp(along) * 4).astype(np.int16)
    return write_nifti(out / f"person{person}.nii.gz", bright, affine), pose


def carried(
    registrar: Registrar, fixed: PreparedScan, moving: PreparedScan, labels: torch.Tensor, poses: list, grid: np.ndarray
) -> torch.Tensor:
    """Labels of the moving brain on those of the fixed one, by the whole map, nearest."""
    displacement = registrar.displacement(fixed.in_frame, moving.in_frame, "cpu")
    whole = ScanMap(np.linalg.inv(fixed.to_scan), displacement, registrar.resolution_mm, moving.to_scan)
    found = torch.zeros_like(labels)
    to_moving = np.linalg.inv(poses[1] @ grid)
    for planes, points in world_slabs(labels.shape[2:], grid):
        found[:, :, planes] = spatial.sample_nearest(labels, transform(to_moving, whole(transform(poses[0], points))))
    return found


def dice_of(root: Path, people: tuple, recipes: tuple = RECIPES) -> pd.DataFrame:
    """One row for each person, moved by the next one, and preparation: fixed, moving, preparation, dice_percent."""
    registrar = default_registrar(fast=True, device="cpu")
    grid = read_scan(files_of(root, people[0])[0]).affine
    labels = {person: labels_of(root, person) for person in people}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for preparation in (FRAME, *recipes):
            prepared, poses = {}, {}
            for person, scanner in zip(people, SCANNERS[: len(people)], strict=True):
                if preparation == FRAME:
                    path, poses[person] = files_of(root, person)[0], np.eye(4)
                    prepared[person] = prepare_scan(path, STEPS)
                else:
                    path, poses[person] = scanned(root, person, scanner, Path(folder))
                    prepared[person] = prepare_scan(path, ["strip"], recipe=preparation)
            for fixed, moving in zip(people, people[1:] + people[:1], strict=True):
                pair = prepared[fixed], prepared[moving]
                warped = carried(registrar, *pair, labels[moving], [poses[fixed], poses[moving]], grid)
                dice = metrics.dice(warped, labels[fixed], labels[moving], LUMIR_LABELS)
                rows.append((fixed, moving, preparation, round(100 * dice, 3)))
                print(*rows[-1], flush=True)
    return pd.DataFrame(rows, columns=["fixed", "moving", "preparation", "dice_percent"])


def figure(table: pd.DataFrame) -> plt.Figure:
    """Change of Dice of each pair, by the recipe."""
    use_style()
    wide = table.set_index(["fixed", "moving", "preparation"])["dice_percent"].unstack()  # noqa: PD010
    shown, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for place, recipe in enumerate(RECIPES):
        change = (wide[recipe] - wide[FRAME]).sort_values().to_numpy()
        aside = np.linspace(-0.25, 0.25, len(change))
        ax.plot(place + aside, change, "o", label=f"--recipe {recipe}")
        ax.plot([place - 0.32, place + 0.32], [change.mean()] * 2, color="0.2")
        ax.annotate(f"mean {change.mean():+.2f}", (place + 0.34, change.mean()), va="center")
    ax.axhline(0, color="0.6", linewidth=1)
    ax.set(xticks=range(len(RECIPES)), xticklabels=[f"--recipe {recipe}" for recipe in RECIPES], xlim=(-0.6, 1.8))
    ax.set(ylabel="Dice minus that of the\nframe's own images (points)")
    ax.set_title(f"Real brains from odd grids, {len(wide)} pairs at 2 mm; {wide[FRAME].mean():.1f} % in the frame")
    return shown


def made_by(command: str) -> dict[str, object]:
    """Provenance of what a script of benchmarks/ writes."""
    where = provenance.describe_device(torch.device("cpu"))
    about = {"command": command, "commit": provenance.commit(), "made": provenance.now(), "device": where}
    return about | {"data": "Real brains in the LUMIR frame: not LUMIR", "versions": provenance.versions()}


def main() -> None:
    """Measure, and write table and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="results/benchmarks/preparation_brains", help="Path without ending.")
    out = Path(parser.parse_args().out)
    table = dice_of(Path(os.environ["LUMIR_BRAINS"]), PEOPLE)
    means = table.groupby("preparation", sort=False)["dice_percent"].mean().round(3)
    about = {"provenance": made_by("python benchmarks/preparation.py"), "registered_by": "packaged weights at 2 mm"}
    about |= {"mean_dice_percent": means.to_dict(), "rows": table.to_dict("records")}
    write_json(out.with_suffix(".json"), about)
    save_figure(figure(table), out, data=False)
    print(means)


if __name__ == "__main__":
    sys.exit(main())
