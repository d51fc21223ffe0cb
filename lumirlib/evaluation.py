"""From displacements to a long CSV: one row per pair and metric, with its provenance beside it.

A method works at the cohort's resolution; it is scored on the files' own voxels, 1 mm for LUMIR, with all labels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from lumirlib import metrics, spatial
from lumirlib._checks import check_choice
from lumirlib.data import Cohort, Pair
from lumirlib.files import Journal
from lumirlib.metrics.pair import NDV_MASKS, evaluate_pair
from lumirlib.models.memory import freed_memory_kept

#: A registration method: images (1, 1, D, H, W) in [0, 1] -> displacement (1, 3, D, H, W) in voxels.
Method = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

#: Metrics of your own, by the name that they get in the CSV: each is ``metric(cohort, pair, displacement) -> float``,
#: with the cohort on the files' own voxels and the displacement (1, 3, D, H, W) in these, on the CPU. Every evaluation
#: computes them; see docs/extending.md.
FURTHER_METRICS: dict[str, Callable[[Cohort, Pair, torch.Tensor], float]] = {}


def zero_displacement(fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
    """The row "Zero Displacement" of Table 1: ``(B, 3, D, H, W)`` zeros, the images as they are."""
    return torch.zeros(fixed.shape[0], 3, *fixed.shape[2:], device=fixed.device)


def score_displacement(
    cohort: Cohort, pair: Pair, displacement: torch.Tensor, ndv_mask: str = "moving"
) -> dict[str, float]:
    """All that is known about one displacement on one pair of a cohort, at the cohort's resolution.

    Args:
        cohort: Cohort that gives labels, landmarks and masks; :attr:`lumirlib.data.Cohort.at_own_resolution` for final
            figures.
        pair: Pair of the cohort.
        displacement: Displacement ``(1, 3, D, H, W)`` in voxels of the cohort's grid, on the CPU.
        ndv_mask: Image whose mask the NDV takes: "moving" (the 2024 task) or "fixed" (2025).

    Returns:
        The four of :func:`evaluate_pair`, "tre_points_mm" (the textbook's form), "displacement_mm" (mean length
        inside the fixed brain) and, for simulated pairs, "displacement_error_mm" (mean distance to the true
        displacement, likewise); NaN where the cohort lacks what a metric needs. Then those of :data:`FURTHER_METRICS`.
    """
    check_choice(ndv_mask, NDV_MASKS, "ndv_mask")
    spacing = cohort.resolution_mm
    both_labelled = pair.fixed.labels is not None and pair.moving.labels is not None
    points, volumes = cohort.landmark_pair(pair), cohort.landmark_volumes(pair) or (None, None)
    fixed_image, moving_image = cohort.image(pair.fixed), cohort.image(pair.moving)
    found = evaluate_pair(
        displacement,
        fixed_labels=cohort.label_volume(pair.fixed) if both_labelled else None,
        moving_labels=cohort.label_volume(pair.moving) if both_labelled else None,
        fixed_landmarks=volumes[0],
        moving_landmarks=volumes[1],
        mask=(moving_image if ndv_mask == "moving" else fixed_image) > 0,
        spacing_mm=spacing,
        labels=cohort.labels,
    )
    found["tre_points_mm"] = metrics.tre_points_mm(displacement, *points, spacing) if points else math.nan
    brain = fixed_image[0, 0] > 0
    inside = displacement[0][:, brain]  # (3, voxels)
    found["displacement_mm"] = float(inside.norm(dim=0).mean()) * spacing
    truth = cohort.true_displacement(pair)
    if truth is not None:
        found["displacement_error_mm"] = float((inside - truth[0][:, brain]).norm(dim=0).mean()) * spacing
    return found | {name: float(metric(cohort, pair, displacement)) for name, metric in FURTHER_METRICS.items()}


@freed_memory_kept()
def evaluate_method(
    method: Method,
    cohort: Cohort,
    pairs: tuple[Pair, ...],
    device: torch.device | str = "cpu",
    ndv_mask: str = "moving",
    progress: bool = True,
    description: str = "evaluate",
    consistency: bool = False,
    at_own_resolution: bool = True,
    journal: Journal | None = None,
) -> pd.DataFrame:
    """Run a method on pairs and score it.

    The method is given images at the cohort's resolution. Its displacement is carried to the files' own voxels by
    :func:`lumirlib.spatial.to_finer_grid` and scored there.

    A method with a ``symmetric(fixed, moving)``, as deedsBCV has it, gives both directions of a pair at once. It is run
    once for the two, and both are given its time.

    Args:
        method: Function ``method(fixed, moving) -> displacement``; a network is one.
        cohort: Cohort at the resolution that the method works at.
        pairs: Pairs of the cohort to take.
        device: Device that the method runs on; the scoring is on the CPU.
        ndv_mask: Image whose mask the NDV takes: "moving" or "fixed".
        progress: Whether to show a progress bar.
        description: Text of the progress bar.
        consistency: Whether to register each pair the other way round too and add the metric "inverse_consistency_mm",
            see :func:`lumirlib.metrics.inverse_consistency_error`.
        at_own_resolution: Whether to score at the files' own resolution; False scores at the cohort's resolution
            instead, as results without "scored_mm" in their provenance were.
        journal: Journal of the same evaluation, with the pairs that an earlier process did; new ones are added.

    Returns:
        Columns pair, fixed, moving, metric, value; one row per pair and metric of :func:`score_displacement`. Where
        the files' voxels are finer than the cohort's, "ndv_working_percent" is the NDV before the displacement was
        carried to them, as interpolation hides folds. The metric "seconds" is the time of the method alone; one that
        has a `last_run` (instance optimization) adds its figures.

    Raises:
        ValueError: The method gives another shape, or numbers that are not finite.
    """
    device = torch.device(device)
    if isinstance(method, nn.Module):
        method.eval()
    both_ways = getattr(method, "symmetric", None)
    waiting: dict[tuple[str, str], tuple[torch.Tensor, float]] = {}  # what the opposite pair's registration gave
    found: dict[str, dict[str, float]] = dict(journal.found) if journal else {}
    left = {(pair.fixed.name, pair.moving.name) for pair in pairs if pair.name not in found}
    for pair in tqdm(_opposites_together(pairs), desc=description, unit="pair", disable=not progress):
        if pair.name in found:
            continue
        names = (pair.fixed.name, pair.moving.name)
        if names in waiting:
            displacement, seconds = waiting.pop(names)
        else:
            fixed, moving = (cohort.image(one).to(device) for one in (pair.fixed, pair.moving))
            started = time.perf_counter()
            with torch.no_grad():
                if both_ways and names[::-1] in left:
                    displacement, opposite = both_ways(fixed, moving)
                else:
                    displacement, opposite = method(fixed, moving), None
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - started
            if opposite is not None:
                waiting[names[::-1]] = opposite, seconds
        scored = _score(displacement, cohort, pair, ndv_mask, at_own_resolution)
        scored |= {"seconds": seconds, **getattr(method, "last_run", {})}
        if consistency:
            fixed, moving = (cohort.image(one).to(device) for one in (pair.fixed, pair.moving))
            with torch.no_grad():
                error = metrics.inverse_consistency_error(displacement, method(moving, fixed), moving)
            scored["inverse_consistency_mm"] = error * cohort.resolution_mm
        found[pair.name] = scored
        if journal:
            journal.add(pair.name, scored)
    rows = [
        {"pair": pair.name, "fixed": pair.fixed.name, "moving": pair.moving.name, "metric": metric, "value": value}
        for pair in pairs
        for metric, value in found[pair.name].items()
    ]
    return pd.DataFrame(rows)


def _opposites_together(pairs: tuple[Pair, ...]) -> list[Pair]:
    """The pairs, each followed by the one with its roles exchanged, where that is among them."""
    by_names = {(pair.fixed.name, pair.moving.name): pair for pair in pairs}
    ordered: dict[str, Pair] = {}
    for pair in pairs:
        for one in (pair, by_names.get((pair.moving.name, pair.fixed.name), pair)):
            ordered.setdefault(one.name, one)
    return list(ordered.values())


def _score(
    displacement: torch.Tensor, cohort: Cohort, pair: Pair, ndv_mask: str, at_own_resolution: bool
) -> dict[str, float]:
    if displacement.shape != (1, 3, *cohort.shape):
        raise ValueError(
            f"the method must give displacements of {(1, 3, *cohort.shape)}, got {tuple(displacement.shape)} "
            f"for {pair.name}"
        )
    scoring = cohort.at_own_resolution if at_own_resolution else cohort
    factor = cohort.downsampling // scoring.downsampling
    at_work = displacement.float().cpu()
    found = score_displacement(scoring, pair, spatial.to_finer_grid(at_work, factor), ndv_mask)
    if factor > 1:
        mask = cohort.image(pair.moving if ndv_mask == "moving" else pair.fixed) > 0
        found["ndv_working_percent"] = metrics.ndv_percent(at_work, mask)
    return found


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Mean, population standard deviation and number of pairs of each metric; NaN pairs are left out and not counted.

    Args:
        table: Table as :func:`evaluate_method` gives it.

    Returns:
        Index: metric; columns mean, std, pairs.
    """
    grouped = table.dropna(subset="value").groupby("metric", sort=False)["value"]
    summary = pd.DataFrame({"mean": grouped.mean(), "std": grouped.std(ddof=0), "pairs": grouped.count()})
    return summary.reindex(list(dict.fromkeys(table["metric"])))
