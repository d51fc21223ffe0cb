"""What a mask is worth where a brain has a hole: labels around a simulated resection, with the mask and without.

    python benchmarks/holes.py              # needs LUMIR_BRAINS; writes results/benchmarks/holes_brains.*

A ball of the fixed brain is emptied, as by a resection, and its labels are kept. The moving brain, which is whole, is
registered to it at 1 mm by the packaged weights, without a mask and with one, as `lumirlib register` does; and as a
bound the same pair before the resection. Dice is that of the labels within 12 mm around the hole.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from preparation import files_of, labels_of, made_by

from lumirlib import metrics, spatial
from lumirlib.data.frame import FRAME_SHAPE
from lumirlib.files import write_json
from lumirlib.metrics.labels import LUMIR_LABELS
from lumirlib.plots import save_figure, use_style
from lumirlib.scans.prepare import STEPS, prepare_scan
from lumirlib.training.registrar import BEST_MM, default_registrar

#: Fixed and moving person, and the hole's middle in voxels of the frame: frontal, temporal and parietal.
CASES = ((1000, 1007, (50, 165, 100)), (1007, 1014, (35, 120, 60)), (1014, 1000, (105, 80, 120)))
RADIUS_MM, AROUND_MM = 20.0, 12.0
WAYS = ("no mask", "masked", "no hole")


def distance_from_hole(middle: tuple[int, int, int]) -> np.ndarray:
    """Distance of each voxel of the frame from the ball's rim in mm, negative inside: ``(160, 224, 192)``."""
    grid = np.stack(np.meshgrid(*map(np.arange, FRAME_SHAPE), indexing="ij"), -1)
    return np.linalg.norm(grid - np.array(middle), axis=-1) - RADIUS_MM


def dice_around(root: Path, cases: tuple = CASES) -> tuple[pd.DataFrame, dict]:
    """Dice in percent around each hole by each way, and images of the first case by name."""
    registrar = default_registrar(device="cpu")
    rows, shown = [], {}
    for fixed, moving, middle in cases:
        whole, other = (prepare_scan(files_of(root, person)[0], STEPS).in_frame for person in (fixed, moving))
        labels, moved = (labels_of(root, person) for person in (fixed, moving))
        distance = torch.from_numpy(distance_from_hole(middle))[None, None]
        hole, around = distance <= 0, (distance > 0) & (distance <= AROUND_MM) & (whole > 0)
        holed = whole.masked_fill(hole, 0)
        inside = labels.where(around, 0)
        for way in WAYS:
            by = registrar.masked(hole) if way == "masked" else registrar
            displacement = by.displacement(whole if way == "no hole" else holed, other, "cpu")
            warped = spatial.warp(moved, displacement, "nearest").where(around, 0)
            dice = metrics.dice(warped, inside, inside, LUMIR_LABELS)
            rows.append((fixed, moving, way, round(100 * dice, 3)))
            print(*rows[-1], flush=True)
            if fixed == cases[0][0]:
                shown |= {"fixed, with a hole": holed, way: spatial.warp(other, displacement)}
    return pd.DataFrame(rows, columns=["fixed", "moving", "way", "dice_percent"]), shown


def figure(table: pd.DataFrame, shown: dict, middle: tuple[int, int, int]) -> plt.Figure:
    """The hole and what it does to the warped brain, and Dice around it."""
    use_style()
    page, axes = plt.subplots(1, 4, figsize=(10, 3.1), layout="constrained", width_ratios=(1, 1, 1, 1.5))
    rim = distance_from_hole(middle)[:, :, middle[2]].T
    for ax, name in zip(axes, ("fixed, with a hole", *WAYS[:2]), strict=False):
        ax.imshow(shown[name][0, 0, :, :, middle[2]].T, cmap="gray", origin="lower", vmin=0, vmax=255)
        ax.contour(rim, levels=[0], colors="C1", linewidths=1)
        ax.set(title=name, xticks=[], yticks=[])
    for number, (_, rows) in enumerate(table.groupby("fixed", sort=False)):
        axes[-1].plot(rows["dice_percent"], range(len(rows)), "o-", label=f"pair {number + 1}")
    axes[-1].set(yticks=range(len(WAYS)), yticklabels=WAYS, xlabel=f"Dice within {AROUND_MM:g} mm of the hole (%)")
    axes[-1].invert_yaxis()
    axes[-1].legend()
    return page


def main() -> None:
    """Measure, and write table and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="results/benchmarks/holes_brains", help="Path without ending.")
    out = Path(parser.parse_args().out)
    table, shown = dice_around(Path(os.environ["LUMIR_BRAINS"]))
    means = table.groupby("way", sort=False)["dice_percent"].mean().round(3)
    about = {"provenance": made_by("python benchmarks/holes.py"), "radius_mm": RADIUS_MM, "around_mm": AROUND_MM}
    about |= {
        "cases": CASES,
        "resolution_mm": BEST_MM,
        "mean_dice_percent": means.to_dict(),
        "rows": table.to_dict("records"),
    }
    write_json(out.with_suffix(".json"), about)
    save_figure(figure(table, shown, CASES[0][2]), out, data=False)
    print(means)


if __name__ == "__main__":
    sys.exit(main())
