"""The evaluator against a plain one: Dice, HD95, TRE and NDV of one pair, in one run, with the ratio of the times.

    python benchmarks/evaluator.py

The plain one takes label after label over the whole volume, with DeepMind's surface-distance and SciPy as their
documentation shows them; files are read before. The pair is of the embedded cohort at 1 mm (160x224x192 voxels, 133
labels), which is made on first use; the displacement is half the true one with noise, so that surfaces are apart and
something folds.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings

import numpy as np
import surface_distance
import torch
from scipy import ndimage

from lumirlib import evaluate_pair, load_cohort, provenance, spatial
from lumirlib.files import write_json
from lumirlib.study.costs import MEBIBYTE, PeakMemory
from lumirlib.study.results import cohort_facts


def plain_dice(warped: np.ndarray, fixed: np.ndarray, moving: np.ndarray, labels: tuple[int, ...]) -> float:
    """Mean Dice, one label after another."""
    found = []
    for label in labels:
        a, b = fixed == label, warped == label
        if not a.any() or not (moving == label).any():
            continue
        found.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    return float(np.mean(found))


def plain_hd95(warped: np.ndarray, fixed: np.ndarray, moving: np.ndarray, labels: tuple[int, ...]) -> float:
    """Mean HD95 in voxels, one label after another, as surface-distance's README has it."""
    found = []
    for label in labels:
        a, b = fixed == label, warped == label
        if not a.any() or not (moving == label).any():
            continue
        if not b.any():
            found.append(np.inf)
            continue
        distances = surface_distance.compute_surface_distances(a, b, [1, 1, 1])
        found.append(surface_distance.compute_robust_hausdorff(distances, 95))
    return float(np.mean(found))


def plain_tre(warped: np.ndarray, fixed: np.ndarray) -> float:
    """Mean distance of the landmarks' centroids in voxels, in volumes (L, D, H, W)."""
    found = []
    for layer, label in itertools.product(range(len(fixed)), range(1, int(fixed.max()) + 1)):
        if (fixed[layer] == label).any():
            centre = ndimage.center_of_mass(fixed[layer] == label)
            for other in warped:
                if (other == label).any():
                    found.append(np.linalg.norm(np.subtract(centre, ndimage.center_of_mass(other == label))))
    return float(np.mean(found))


def plain_ndv(displacement: np.ndarray, mask: np.ndarray) -> float:
    """NDV in percent, from whole volumes: (3, D, H, W) displacement, (D, H, W) mask."""
    points = displacement.astype(np.float64) + np.indices(mask.shape)
    core = (slice(None), *(slice(1, -1),) * 3)

    def moved(*by: int) -> np.ndarray:
        return np.roll(points, [-step for step in by], axis=(1, 2, 3))[core] - points[core]

    axes = np.eye(3, dtype=int)
    choices = list(itertools.product((1, -1), repeat=3))
    columns = [[sign * moved(*(sign * axis)) for sign, axis in zip(signs, axes, strict=True)] for signs in choices]
    columns.append([moved(-1, -1, 0), moved(-1, 0, -1), moved(0, -1, -1)])
    columns.append([moved(1, 1, 0), moved(0, 1, 1), moved(1, 0, 1)])
    inside = mask[1:-1, 1:-1, 1:-1]
    volume = 0.0
    for choice in columns:
        determinant = np.linalg.det(np.moveaxis(np.stack(choice, axis=1), (0, 1), (-2, -1)))
        volume += (0.5 * np.maximum(-determinant, 0) * inside).sum() / 6
    return float(100 * volume / inside.sum())


def plain(
    displacement: torch.Tensor, volumes: list[torch.Tensor], mask: torch.Tensor, labels: tuple[int, ...]
) -> tuple[dict[str, float], np.ndarray]:
    """The four metrics, one label after another, and the warped labels."""
    fixed, moving, *landmarks = (volume[0].numpy() for volume in volumes)
    fixed, moving, field = fixed[0], moving[0], displacement[0].numpy()
    places = np.indices(fixed.shape) + field
    warped = ndimage.map_coordinates(moving, places, order=0)
    layers = np.stack([ndimage.map_coordinates(layer, places, order=0) for layer in landmarks[1]])
    found = {
        "dice": plain_dice(warped, fixed, moving, labels),
        "tre_mm": plain_tre(layers, landmarks[0]),
        "ndv_percent": plain_ndv(field, mask[0, 0].numpy()),
        "hd95_mm": plain_hd95(warped, fixed, moving, labels),
    }
    return found, warped


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--repeats", type=int, default=5, help="of ours; the plain one is timed once")
    given = options.parse_args()
    cohort = load_cohort("embedded", 1)
    pair = cohort.validation_pairs[0]
    noise = torch.randn(1, 3, *cohort.shape, generator=torch.Generator().manual_seed(0))
    displacement = 0.5 * cohort.true_displacement(pair) + 0.3 * noise
    volumes = [cohort.label_volume(pair.fixed), cohort.label_volume(pair.moving), *cohort.landmark_volumes(pair)]
    mask = cohort.image(pair.moving) > 0

    def ours() -> dict[str, float]:
        return evaluate_pair(displacement, *volumes, mask=mask, labels=cohort.labels)

    started = time.perf_counter()
    ours()
    first = time.perf_counter() - started  # compiles, on a machine where it has not run yet
    times = []
    with PeakMemory(torch.device("cpu")) as memory:
        for _ in range(given.repeats):
            started = time.perf_counter()
            found = ours()
            times.append(time.perf_counter() - started)
    print(f"ours:  {statistics.median(times):.2f} s, peak {memory.peak / MEBIBYTE:.0f} MiB above the start, {found}")
    with PeakMemory(torch.device("cpu")) as plain_memory, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # surface-distance 0.1 uses names that SciPy deprecates
        started = time.perf_counter()
        expected, plainly_warped = plain(displacement, volumes, mask, cohort.labels)
        seconds = time.perf_counter() - started
    print(f"plain: {seconds:.2f} s, peak {plain_memory.peak / MEBIBYTE:.0f} MiB above the start, {expected}")
    ratio = seconds / statistics.median(times)
    warped = spatial.warp(volumes[1], displacement, mode="nearest")[0, 0].numpy()
    other_labels = int((warped != plainly_warped).sum())
    print(f"ratio: {ratio:.1f}; {other_labels} of {warped.size} voxels are warped to another label than by SciPy")
    differences = {name: abs(found[name] - expected[name]) for name in expected}
    about = {
        "command": f"python benchmarks/evaluator.py --repeats {given.repeats}",
        "commit": provenance.commit(),
        "device": provenance.describe_device(torch.device("cpu")),
        "written": provenance.now(),
        "versions": provenance.versions(),
        **cohort_facts(cohort),
        "pair": pair.name,
        "first_seconds": round(first, 3),
        "seconds": [round(value, 3) for value in times],
        "plain_seconds": round(seconds, 3),
        "ratio": round(ratio, 1),
        "peak_mib": round(memory.peak / MEBIBYTE),
        "plain_peak_mib": round(plain_memory.peak / MEBIBYTE),
        "difference": differences,
        "voxels_warped_otherwise": other_labels,
    }
    print(write_json(provenance.results_folder() / "benchmarks" / "evaluator.json", about))


if __name__ == "__main__":
    main()
