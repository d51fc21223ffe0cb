"""How the two cascades fold: the same velocities joined additively and compositionally.

    python -m lumirlib.study.sweep --rows LC-1 LC-2 --seeds 0 1 2 --preset demo
    python -m lumirlib.study.folding --rows LC-1 LC-2 --seeds 0 1 2 --preset demo

Takes the velocities that trained networks predict for every pair, amplifies them, joins the levels both ways, and
measures the non-diffeomorphic volume: all but the cascade is equal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from lumirlib import metrics, provenance
from lumirlib.data import Cohort, Pair
from lumirlib.methods.variants import parse_variant
from lumirlib.models.backbone import CASCADES, RegistrationNetwork, join_velocities
from lumirlib.provenance import redact_path
from lumirlib.study.results import cohort_facts, write_results
from lumirlib.study.run import Run
from lumirlib.training.weights import load_model

FACTORS = (1.0, 2.0, 3.0, 4.0)


@torch.no_grad()
def amplified_folding(
    model: nn.Module,
    cohort: Cohort,
    pairs: tuple[Pair, ...],
    factors: Sequence[float] = FACTORS,
    device: torch.device | str = "cpu",
    progress: bool = True,
    description: str = "folding",
) -> pd.DataFrame:
    """NDV of amplified velocities under both cascades.

    Args:
        model: trained :class:`lumirlib.models.RegistrationNetwork` without a bilateral filter.
        cohort: gives the images.
        pairs: of the cohort.
        factors: what the velocities of all levels are multiplied by.
        device: where it is computed.
        progress: show a progress bar.
        description: of the progress bar.

    Returns:
        Columns pair, cascade, factor, ndv_percent (inside the moving brain), displacement_mm (mean length there).

    Raises:
        ValueError: a network with a bilateral filter, whose result its velocities do not give.
    """
    if not isinstance(model, RegistrationNetwork) or model.bilateral_filter is not None:
        raise ValueError("model must be a RegistrationNetwork without a bilateral filter")
    rows = []
    for pair in tqdm(pairs, desc=description, unit="pair", disable=not progress):
        fixed, moving = (cohort.image(subject).to(device) for subject in (pair.fixed, pair.moving))
        velocities = model.fields(fixed, moving).velocities
        inside = moving > 0
        for factor in factors:
            for cascade in CASCADES:
                displacement = join_velocities([factor * v for v in velocities], cascade, model.squarings)[0]
                length = displacement.norm(dim=1, keepdim=True)[inside].mean() * cohort.resolution_mm
                rows.append(
                    {
                        "pair": pair.name,
                        "cascade": cascade,
                        "factor": factor,
                        "ndv_percent": metrics.ndv_percent(displacement, inside),
                        "displacement_mm": float(length),
                    }
                )
    return pd.DataFrame(rows)


def parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    options = argparse.ArgumentParser(
        prog="python -m lumirlib.study.folding", description=(__doc__ or "").splitlines()[0]
    )
    options.add_argument("--rows", nargs="+", default=["LC-1", "LC-2"], help="variants whose trained weights are used")
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of each")
    options.add_argument("--preset", default="demo", help="preset that they were trained with")
    options.add_argument("--cohort", default="embedded", help="embedded, lumir, brains, or a Learn2Reg dataset JSON")
    options.add_argument("--data-root", default="", help="folder the JSON's paths are relative to; its own if empty")
    options.add_argument("--factors", nargs="+", type=float, default=list(FACTORS), help="of the velocities")
    options.add_argument("--out", default="", help="results folder, where the checkpoints are too")
    options.add_argument("--device", default="auto", help="auto, cpu, cuda ...")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure and write `<out>/folding/<cohort>_<preset>.csv`; the exit status is 0, or 2 for what cannot be used."""
    given = parser().parse_args(arguments)
    found, used = [], []
    try:
        for row in given.rows:
            for seed in given.seeds:
                run = Run.prepare(row, given.preset, given.cohort, seed, given.data_root, given.out, given.device)
                table = amplified_folding(
                    load_model(run.checkpoint, str(run.device)),
                    run.cohort,
                    run.pairs,
                    given.factors,
                    run.device,
                    description=f"{row}, seed {seed}",
                )
                found.append(table.assign(variant=parse_variant(row).name, seed=seed))
                used.append(run.config.run)
    except (ValueError, FileNotFoundError) as error:
        print(f"python -m lumirlib.study.folding: {error}", file=sys.stderr)
        return 2
    words = [
        f"--rows {' '.join(given.rows)}",
        f"--seeds {' '.join(map(str, given.seeds))}",
        f"--preset {given.preset}",
        f"--cohort {redact_path(given.cohort)}",
    ]
    about = {
        "command": " ".join(["python -m lumirlib.study.folding", *words]),
        "commit": run.commit,
        "device": provenance.describe_device(run.device),
        "preset": given.preset,
        "runs": used,
        **cohort_facts(run.cohort),
    }
    path = run.out / "folding" / f"{run.cohort.short_name}_{given.preset}.csv"
    table = pd.concat(found)[["variant", "seed", "pair", "cascade", "factor", "ndv_percent", "displacement_mm"]]
    write_results(table, path, about)
    print(table.groupby(["variant", "cascade", "factor"], sort=False)[["ndv_percent", "displacement_mm"]].mean())
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
