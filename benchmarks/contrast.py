"""Pretrained weights on moving images of other contrasts, as they are and with matched contrast.

    python benchmarks/contrast.py --weights ours-2mm

The alterations are those of `lumirlib measure robustness`, and one that changes the order of the tissues, as FLAIR
does. Pairs are spread evenly over those of the first half of the people. Writes
results/benchmarks/contrast_<weights>.json.
"""

from __future__ import annotations

import argparse
import sys

import pandas as pd
import torch
from tqdm.auto import tqdm

from lumirlib import load_cohort, provenance
from lumirlib.data import Pair
from lumirlib.evaluation import evaluate_method
from lumirlib.files import write_json
from lumirlib.methods.contrast import for_contrast
from lumirlib.study.robustness import ALTERATIONS
from lumirlib.training.pairs import evenly_spaced, of_first_half
from lumirlib.training.weights import read_packaged

#: Share of the brightest intensities at which gray matter's lies, and the darkest of white matter.
GRAY, WHITE = 0.6, 0.65


def white_below_gray(moving: torch.Tensor, pair: Pair, resolution_mm: float) -> torch.Tensor:
    """Intensities rise to gray matter's and fall beyond, so that white matter lies below gray matter, as in FLAIR."""
    brain = moving > 0
    bright = (moving / moving[brain].double().quantile(0.97).float()).clamp_max(1)
    changed = torch.where(bright < GRAY, bright / GRAY, 1 - (bright - GRAY) / (1 - GRAY) * (1 - WHITE))
    return changed.clamp_min(0.02) * brain


CHANGES = {**ALTERATIONS, "white below gray matter": white_below_gray}


def main() -> int:
    """Measure, print and write."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--weights", default="ours-2mm")
    options.add_argument("--resolution", type=float, default=2)
    options.add_argument("--cohort", default="brains")
    options.add_argument("--pairs", type=int, default=10)
    options.add_argument("--out", default="", help="results folder; `study` for the committed one")
    given = options.parse_args()
    cohort = load_cohort(given.cohort, given.resolution)
    weights = read_packaged(given.weights).at_resolution(given.resolution)
    network = weights.network("cpu")
    methods = {"as it is": network, "matched": for_contrast(network, "any")}
    pairs = evenly_spaced(of_first_half(cohort.validation_pairs), given.pairs)
    lines = []
    with tqdm(total=len(CHANGES) * len(pairs) * len(methods), unit="registration") as bar:
        for change, alter in CHANGES.items():
            for pair in pairs:
                altered = alter(cohort.image(pair.moving), pair, cohort.resolution_mm)
                for how, method in methods.items():
                    found = evaluate_method(
                        lambda fixed, moving, method=method, altered=altered: method(fixed, altered),
                        cohort,
                        (pair,),
                        progress=False,
                    )
                    figures = found.set_index("metric")["value"]
                    lines.append({"moving": change, "method": how, **figures[["dice", "hd95_mm", "ndv_percent"]]})
                    bar.update()
    means = pd.DataFrame(lines).groupby(["moving", "method"], sort=False).mean().reset_index()
    print(means.to_string(index=False))
    write_json(
        provenance.results_folder(given.out) / "benchmarks" / f"contrast_{given.weights}.json",
        {
            "figures": means.to_dict("records"),
            "weights": weights.about,
            "resolution_mm": given.resolution,
            "scored_mm": cohort.at_own_resolution.resolution_mm,
            "cohort": cohort.short_name,
            "cohort_digest": cohort.digest,
            "pairs": [pair.name for pair in pairs],
            "commit": provenance.commit(),
            "device": provenance.describe_device(torch.device("cpu")),
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
