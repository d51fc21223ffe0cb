"""What odd orientations and voxels cost: real brains registered and labels carried as a user does, against the frame.

    python benchmarks/orientations.py       # needs LUMIR_BRAINS; writes results/benchmarks/orientations_brains.*

Brains of the cohort, which are stripped, are stored as other scanners would have: turned by their headers and with
other axes, which changes no voxel, or on another grid, by linear interpolation. `register` brings each pair together at
1 mm by the packaged weights and `apply` carries the moving labels, which keep their own voxels, to the fixed ones. Dice
is taken there. `apply` carries points of the moving brain too, and SimpleITK leads them back.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
import SimpleITK as sitk  # noqa: N813
import torch
from preparation import files_of, made_by

from lumirlib import metrics
from lumirlib.data.field_formats import RAS_TO_LPS
from lumirlib.data.nifti import read_label_volume, write_nifti
from lumirlib.files import write_json
from lumirlib.metrics.labels import LUMIR_LABELS
from lumirlib.plots import save_figure, use_style
from lumirlib.scans.apply import apply_to_image, apply_to_points
from lumirlib.scans.prepare import STEPS
from lumirlib.scans.register import register
from lumirlib.scans.scan import as_scanned, read_scan

PAIRS = ((1000, 1007), (1007, 1014), (1014, 1000))
FRAME = "in the frame"
#: Turn about each axis in degrees, shift in mm, axes, and spacing in mm; without spacing the voxels stay as they are.
FIXED_TURNED = ((9, -12, 14), (15, -9, 12), "LAS", None)
MOVING_TURNED = ((-13, 8, 10), (-14, 20, 6), "PIR", None)
OBLIQUE = ((-13, 8, 10), (-14, 20, 6), "LIA", (1.0, 1.0, 1.0))
SLICES = ((5, 11, -12), (8, 10, -20), "RAS", (0.8, 0.8, 2.5))
SCANS = {
    FRAME: (None, None),
    "own voxels: LAS, turned; PIR, turned": (FIXED_TURNED, MOVING_TURNED),
    "own voxels: LAS, turned; oblique, 1 mm": (FIXED_TURNED, OBLIQUE),
    "oblique, 1 mm; 0.8 × 0.8 × 2.5 mm": (OBLIQUE, SLICES),
}
POINTS = 500


def posed(root: Path, person: int, pose: tuple | None, out: Path) -> tuple[Path, Path]:
    """Image and labels of a person in a pose; labels keep their voxels, and so does an image without a new spacing."""
    image_path, labels_path = files_of(root, person)
    if pose is None:
        return image_path, labels_path
    turn, shift, axes, spacing = pose
    scan = read_scan(image_path)
    array, affine, moved = as_scanned(scan.values, scan.affine, turn, shift, axes, spacing or (1.0, 1.0, 1.0))
    if spacing is None:
        array, affine = reoriented(scan.values[0, 0].numpy(), moved @ scan.affine, axes)
    labels, own = reoriented(read_label_volume(labels_path)[0], moved @ scan.affine, axes)
    names = [out / f"{name}_{person}_{axes}_{bool(spacing)}.nii.gz" for name in ("image", "labels")]
    return write_nifti(names[0], array.astype(np.float32), affine), write_nifti(names[1], labels, own)


def reoriented(array: np.ndarray, affine: np.ndarray, axes: str) -> tuple[np.ndarray, np.ndarray]:
    """An array with its axes flipped and exchanged, and the affine that leaves each voxel where it is."""
    wanted = nib.orientations.axcodes2ornt(tuple(axes))
    change = nib.orientations.ornt_transform(nib.orientations.io_orientation(affine), wanted)
    new = affine @ nib.orientations.inv_ornt_aff(change, array.shape)
    return np.ascontiguousarray(nib.orientations.apply_orientation(array, change)), new


def points_apart(transform: Path, labels: Path, folder: Path) -> float:
    """Largest distance in mm of points of the moving brain from where ITK leads what `apply` found for them."""
    values, affine = read_label_volume(labels)
    voxels = np.argwhere(values > 0)
    voxels = voxels[np.random.default_rng(0).choice(len(voxels), POINTS, replace=False)]
    points = voxels @ affine[:3, :3].T + affine[:3, 3]
    given, found = folder / "points.csv", folder / "points_on_fixed.csv"
    pd.DataFrame(points, columns=["x", "y", "z"]).to_csv(given, index=False)
    apply_to_points([transform], given, "ras", found)
    field = sitk.DisplacementFieldTransform(sitk.ReadImage(str(transform), sitk.sitkVectorFloat64))
    led = [
        field.TransformPoint((RAS_TO_LPS @ point).tolist()) for point in pd.read_csv(found)[["x", "y", "z"]].to_numpy()
    ]
    return float(np.linalg.norm(np.array(led) @ RAS_TO_LPS.T - points, axis=1).max())


def dice_percent(carried: Path, fixed: Path, moving: Path) -> float:
    """Mean Dice of the labels that both people have, on the fixed one's voxels."""
    warped, on_fixed, on_moving = (read_label_volume(path)[0] for path in (carried, fixed, moving))
    both = [label for label in LUMIR_LABELS if (on_fixed == label).any() and (on_moving == label).any()]
    volumes = [torch.from_numpy(np.ascontiguousarray(volume))[None, None] for volume in (warped, on_fixed, on_fixed)]
    return 100 * metrics.dice(*volumes, both)


def measured(root: Path, pairs: tuple = PAIRS, scans: dict = SCANS, fast: bool = False) -> pd.DataFrame:
    """One row for each pair and pair of scans: dice_percent, inverse_p99_mm, points_mm, cpu_seconds."""
    rows = []
    for fixed, moving in pairs:
        for name, poses in scans.items():
            with tempfile.TemporaryDirectory() as there:
                folder = Path(there)
                images, labels = zip(
                    posed(root, fixed, poses[0], folder), posed(root, moving, poses[1], folder), strict=True
                )
                started = time.process_time()
                skip = STEPS if name == FRAME else ("strip",)
                found = register(*images, folder / "out", skip=skip, fast=fast, device="cpu", progress=False)
                seconds = time.process_time() - started
                transform = found.files["transform"]
                carried = apply_to_image([transform], labels[1], labels[0], folder / "carried.nii.gz").path
                dice = dice_percent(carried, *labels)
                inverse = max(found.measures[f"inverse_{brain}_p99_mm"] for brain in ("moving", "fixed"))
                apart = points_apart(transform, labels[1], folder)
                figures = (round(dice, 3), round(inverse, 3), round(apart, 5), round(seconds, 1))
                rows.append((fixed, moving, name, *figures))
                print(*rows[-1], flush=True)
    columns = ["fixed", "moving", "scans", "dice_percent", "inverse_p99_mm", "points_mm", "cpu_seconds"]
    return pd.DataFrame(rows, columns=columns)


def with_change(table: pd.DataFrame) -> pd.DataFrame:
    """The table with each Dice minus that of the frame's own scans of the pair, in points."""
    own = table.loc[table["scans"] == FRAME, ["fixed", "moving", "dice_percent"]]
    beside = table.merge(own, on=["fixed", "moving"], suffixes=("", "_frame"))
    change = beside["dice_percent"] - beside["dice_percent_frame"]
    return table.assign(change=change.round(3))


def figure(table: pd.DataFrame) -> plt.Figure:
    """Change of Dice of each pair, by the scans."""
    use_style()
    names = [name for name in table["scans"].unique() if name != FRAME]
    shown, ax = plt.subplots(figsize=(7, 2.6), layout="constrained")
    for place, name in enumerate(names):
        change = table.loc[table["scans"] == name, "change"]
        ax.plot(change, [place] * len(change), "o")
        ax.plot([change.mean()] * 2, [place - 0.3, place + 0.3], color="0.2")
    ax.axvline(0, color="0.6", linewidth=1)
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    own = table.loc[table["scans"] == FRAME, "dice_percent"]
    ax.set(xlabel="Dice minus that of the frame's own scans (points)")
    ax.set_title(f"{len(own)} pairs of real brains at 1 mm; {own.mean():.1f} % in the frame; bars: means")
    return shown


def main() -> None:
    """Measure, and write table and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="results/benchmarks/orientations_brains", help="Path without ending.")
    parser.add_argument("--pairs", type=int, default=len(PAIRS), help="Number of pairs.")
    asked = parser.parse_args()
    out = Path(asked.out)
    table = with_change(measured(Path(os.environ["LUMIR_BRAINS"]), PAIRS[: asked.pairs]))
    about = {"provenance": made_by("python benchmarks/orientations.py"), "registered_by": "packaged weights at 1 mm"}
    about |= {"peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}
    about |= {"points": POINTS, "rows": table.to_dict("records")}
    write_json(out.with_suffix(".json"), about)
    save_figure(figure(table), out, data=False)
    print(table.groupby("scans", sort=False)[["dice_percent", "change", "inverse_p99_mm", "points_mm"]].mean())


if __name__ == "__main__":
    sys.exit(main())
