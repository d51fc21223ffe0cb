"""How the two cascades fold: the same velocities joined additively and compositionally.

    lumirlib sweep --rows LC-1 LC-2 --seeds 0 1 2 --preset demo
    lumirlib measure folding --rows LC-1 LC-2 --seeds 0 1 2 --preset demo

Takes the velocities that trained networks predict for every pair, amplifies them, joins the levels both ways, and
measures the non-diffeomorphic volume: all but the cascade is equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from lumirlib import metrics, provenance
from lumirlib.data import Cohort, Pair
from lumirlib.methods.variants import parse_variant
from lumirlib.models.backbone import CASCADES, RegistrationNetwork, join_velocities
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
        model: Trained :class:`lumirlib.models.RegistrationNetwork` without a bilateral filter.
        cohort: Cohort that gives the images.
        pairs: Pairs of the cohort.
        factors: Factors that the velocities of all levels are multiplied by.
        device: Device to work on.
        progress: Whether to show a progress bar.
        description: Text of the progress bar.

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


def measure_rows(
    rows: Sequence[str],
    seeds: Sequence[int],
    preset: str = "demo",
    cohort: str = "embedded",
    data_root: str = "",
    factors: Sequence[float] = FACTORS,
    out: str = "",
    device: str = "auto",
    command: str = "lumirlib.study.folding.measure_rows",
) -> tuple[pd.DataFrame, Path]:
    """Measure the folding of trained rows and write `<out>/folding/<cohort>_<preset>.csv` with its provenance.

    Args:
        rows: Names of rows whose trained weights are used.
        seeds: Random seeds of each row.
        preset: Preset that they were trained with.
        cohort: Cohort that they were trained and are evaluated on.
        data_root: Folder that the cohort's paths are relative to; empty for its own.
        factors: Factors of the velocities.
        out: Results folder, where the checkpoints are too; empty for :func:`lumirlib.provenance.results_folder`.
        device: Device's name: "auto", "cpu", "cuda" ...
        command: Call that made the table, for the provenance.

    Returns:
        The table, with the columns variant, seed and those of :func:`amplified_folding`, and its path.

    Raises:
        ValueError: No row or seed, an unknown row, or a network that has a bilateral filter.
        FileNotFoundError: A row that is not trained.
    """
    if not rows or not seeds:
        raise ValueError("rows and seeds must name one run or more")
    found, used = [], []
    for row in rows:
        for seed in seeds:
            run = Run.prepare(row, preset, cohort, seed, data_root, out, device)
            table = amplified_folding(
                load_model(run.checkpoint, str(run.device)),
                run.cohort,
                run.pairs,
                factors,
                run.device,
                description=f"{row}, seed {seed}",
            )
            found.append(table.assign(variant=parse_variant(row).name, seed=seed))
            used.append(run.config.run)
    about = {
        "command": command,
        "commit": run.commit,
        "device": provenance.describe_device(run.device),
        "preset": preset,
        "runs": used,
        **cohort_facts(run.cohort),
    }
    path = run.out / "folding" / f"{run.cohort.short_name}_{preset}.csv"
    table = pd.concat(found)[["variant", "seed", "pair", "cascade", "factor", "ndv_percent", "displacement_mm"]]
    return table, write_results(table, path, about)
