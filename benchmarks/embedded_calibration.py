"""How far apart the embedded cohort's people are before registration, against the paper's "before registration" row.

    python benchmarks/embedded_calibration.py --resolution 1

Makes the cohort where it is not in the cache yet (a minute or two at 1 mm), and takes some seconds a pair.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from tqdm.auto import tqdm

from lumirlib import load_cohort, metrics, provenance
from lumirlib.files import write_json
from lumirlib.study.paper import paper_table
from lumirlib.study.results import cohort_facts


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--resolution", type=int, default=1, help="voxel size in mm: 1, 2 or 4")
    cohort = load_cohort("embedded", options.parse_args().resolution)
    found: dict[str, list[float]] = {
        "Dice (%)": [],
        "TRE (mm)": [],
        "TRE, textbook (mm)": [],
        "true displacement (mm)": [],
    }
    zero = torch.zeros(1, 3, *cohort.shape)
    for pair in tqdm(cohort.validation_pairs, unit="pair"):
        fixed, moving = cohort.label_volume(pair.fixed), cohort.label_volume(pair.moving)
        points, volumes = cohort.landmark_pair(pair), cohort.landmark_volumes(pair)
        found["Dice (%)"].append(100 * metrics.dice(moving, fixed))
        found["TRE (mm)"].append(metrics.tre_mm(volumes[1], volumes[0], cohort.resolution_mm))
        found["TRE, textbook (mm)"].append(metrics.tre_points_mm(zero, *points, cohort.resolution_mm))
        inside = cohort.image(pair.fixed)[0] > 0
        length = cohort.true_displacement(pair).norm(dim=1)[inside].mean() * cohort.resolution_mm
        found["true displacement (mm)"].append(float(length))
    paper = paper_table(1).iloc[0]
    print(f"{cohort.name}, {cohort.resolution_mm:g} mm, {len(cohort.validation_pairs)} pairs, before registration")
    print(f"paper: Dice {paper['dice']} ± {paper['dice_std']} %, TRE {paper['tre_mm']} mm")
    summary = {
        name: {"mean": np.mean(values), "std": np.std(values), "min": min(values), "max": max(values)}
        for name, values in found.items()
    }
    for name, figures in summary.items():
        print(f"{name}: {figures['mean']:.2f} ± {figures['std']:.2f}, {figures['min']:.2f} to {figures['max']:.2f}")
    about = {
        "command": f"python benchmarks/embedded_calibration.py --resolution {cohort.resolution_mm:g}",
        "commit": provenance.commit(),
        "written": provenance.now(),
        "versions": provenance.versions(),
        **cohort_facts(cohort),
        "pairs": len(cohort.validation_pairs),
    }
    rounded = {name: {key: round(float(x), 4) for key, x in figures.items()} for name, figures in summary.items()}
    path = provenance.results_folder() / f"embedded_calibration_{cohort.resolution_mm:g}mm.json"
    print(write_json(path, {"before registration": rounded, **about}))


if __name__ == "__main__":
    main()
