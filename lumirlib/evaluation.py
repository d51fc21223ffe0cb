"""From displacements to a long CSV: one row per pair and metric, with its provenance beside it."""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from lumirlib import metrics, provenance, spatial
from lumirlib._checks import check_choice, check_displacement, check_finite, check_labels
from lumirlib.data import Cohort, Pair
from lumirlib.files import read_json, write_atomically, write_json
from lumirlib.labels import LUMIR_LABELS

#: The four metrics of the challenge, in the paper's order. Dice is in [0, 1] in files, in percent in tables.
METRICS = ("dice", "tre_mm", "ndv_percent", "hd95_mm")
NDV_MASKS = ("moving", "fixed")
#: Of a table of metrics, at least.
COLUMNS = ("pair", "metric", "value")

#: A registration method: images (1, 1, D, H, W) in [0, 1] -> displacement (1, 3, D, H, W) in voxels.
Method = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

#: Metrics of your own, by the name that they get in the CSV: each is ``metric(cohort, pair, displacement) -> float``,
#: with the displacement (1, 3, D, H, W) in voxels on the CPU. Every evaluation computes them; see docs/extending.md.
FURTHER_METRICS: dict[str, Callable[[Cohort, Pair, torch.Tensor], float]] = {}


def zero_displacement(fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
    """The row "Zero Displacement" of Table 1: ``(B, 3, D, H, W)`` zeros, the images as they are."""
    return torch.zeros(fixed.shape[0], 3, *fixed.shape[2:], device=fixed.device)


def evaluate_pair(
    displacement: torch.Tensor,
    fixed_labels: torch.Tensor | None = None,
    moving_labels: torch.Tensor | None = None,
    fixed_landmarks: torch.Tensor | None = None,
    moving_landmarks: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    spacing_mm: float = 1.0,
    labels: tuple[int, ...] = LUMIR_LABELS,
) -> dict[str, float]:
    """The challenge's four metrics of one pair.

    Args:
        displacement: ``(1, 3, D, H, W)`` in voxels, on the fixed grid.
        fixed_labels: ``(1, 1, D, H, W)`` integers; None leaves Dice and HD95 NaN, without both label volumes.
        moving_labels: same shape, before warping.
        fixed_landmarks: ``(1, L, D, H, W)`` integers as :func:`lumirlib.metrics.landmark_volume` draws them; None
            leaves TRE NaN, without both.
        moving_landmarks: likewise, before warping.
        mask: ``(1, 1, D, H, W)``, where NDV counts (the moving image > 0 in 2024); None counts everywhere.
        spacing_mm: edge of a voxel.
        labels: label numbers to score.

    Returns:
        "dice" in [0, 1], "tre_mm", "ndv_percent", "hd95_mm".

    Raises:
        ValueError: shapes that do not fit, or a displacement that is not finite.
    """
    check_displacement(displacement)
    check_finite(displacement, "displacement")
    found = dict.fromkeys(METRICS, math.nan)
    if fixed_labels is not None and moving_labels is not None:
        check_labels(fixed_labels, "fixed_labels")
        check_labels(moving_labels, "moving_labels")
        warped = spatial.warp(moving_labels, displacement, mode="nearest")
        found["dice"] = metrics.dice(warped, fixed_labels, moving_labels, labels)
        found["hd95_mm"] = metrics.hd95_mm(warped, fixed_labels, moving_labels, spacing_mm, labels)
    if fixed_landmarks is not None and moving_landmarks is not None:
        warped = spatial.warp(moving_landmarks, displacement, mode="nearest")
        found["tre_mm"] = metrics.tre_mm(warped, fixed_landmarks, spacing_mm)
    found["ndv_percent"] = metrics.ndv_percent(displacement, mask)
    return found


def score_displacement(
    cohort: Cohort, pair: Pair, displacement: torch.Tensor, ndv_mask: str = "moving"
) -> dict[str, float]:
    """All that is known about one displacement on one pair of a cohort.

    Args:
        cohort: gives labels, landmarks and masks.
        pair: of the cohort.
        displacement: ``(1, 3, D, H, W)`` in voxels, on the CPU.
        ndv_mask: "moving" (the 2024 task) or "fixed" (2025).

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
    brain = fixed_image > 0
    found["displacement_mm"] = float(displacement.norm(dim=1, keepdim=True)[brain].mean()) * spacing
    truth = cohort.true_displacement(pair)
    if truth is not None:
        error = (displacement - truth).norm(dim=1, keepdim=True)[brain]
        found["displacement_error_mm"] = float(error.mean()) * spacing
    return found | {name: float(metric(cohort, pair, displacement)) for name, metric in FURTHER_METRICS.items()}


def evaluate_method(
    method: Method,
    cohort: Cohort,
    pairs: tuple[Pair, ...],
    device: torch.device | str = "cpu",
    ndv_mask: str = "moving",
    progress: bool = True,
    description: str = "evaluate",
    consistency: bool = False,
) -> pd.DataFrame:
    """Run a method on pairs and score it.

    Args:
        method: ``method(fixed, moving) -> displacement``; a network is one.
        cohort: where the pairs come from.
        pairs: which to take.
        device: where the method runs; the scoring is on the CPU.
        ndv_mask: "moving" or "fixed".
        progress: show a progress bar.
        description: of the progress bar.
        consistency: register each pair the other way round too and add the metric "inverse_consistency_mm", see
            :func:`lumirlib.metrics.inverse_consistency_error`.

    Returns:
        Columns pair, fixed, moving, metric, value; one row per pair and metric. The metric "seconds" is the time of
        the method alone; one that has a `last_run` (instance optimization) adds its figures.
    """
    device = torch.device(device)
    if isinstance(method, nn.Module):
        method.eval()
    rows = []
    for pair in tqdm(pairs, desc=description, unit="pair", disable=not progress):
        fixed, moving = cohort.image(pair.fixed).to(device), cohort.image(pair.moving).to(device)
        started = time.perf_counter()
        with torch.no_grad():
            displacement = method(fixed, moving)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
        found = score_displacement(cohort, pair, displacement.float().cpu(), ndv_mask)
        names = {"pair": pair.name, "fixed": pair.fixed.name, "moving": pair.moving.name}
        found |= {"seconds": seconds, **getattr(method, "last_run", {})}
        if consistency:
            with torch.no_grad():
                error = metrics.inverse_consistency_error(displacement, method(moving, fixed), moving)
            found["inverse_consistency_mm"] = error * cohort.resolution_mm
        rows += [{**names, "metric": metric, "value": value} for metric, value in found.items()]
    return pd.DataFrame(rows)


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Mean, population standard deviation and number of pairs of each metric; NaN pairs are left out and not counted.

    Args:
        table: as :func:`evaluate_method` gives it.

    Returns:
        Index: metric; columns mean, std, pairs.
    """
    grouped = table.dropna(subset="value").groupby("metric", sort=False)["value"]
    summary = pd.DataFrame({"mean": grouped.mean(), "std": grouped.std(ddof=0), "pairs": grouped.count()})
    return summary.reindex(list(dict.fromkeys(table["metric"])))


def write_results(table: pd.DataFrame, path: str | Path, about: dict) -> Path:
    """Write a table of metrics, and beside it (`.json`) where it comes from.

    Both are written atomically, the provenance last: what stands beside a CSV always belongs to it, and holds its
    SHA-256, so that :func:`read_results` tells a damaged one.

    Args:
        table: as :func:`evaluate_method` gives it.
        path: of the CSV.
        about: provenance: commit, command, seed, cohort, preset ...; time and versions are added here.

    Returns:
        `path`.
    """
    path = Path(path)
    full = {**about, "written": provenance.now(), "versions": provenance.versions()}
    path.with_suffix(".json").unlink(missing_ok=True)
    write_atomically(path, lambda to: table.to_csv(to, index=False))
    write_json(path.with_suffix(".json"), {**full, "table_sha256": _digest(path.read_bytes())})
    return path


def _digest(content: bytes) -> str:
    return hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest()  # whatever git made of line ends


def read_table(path: str | Path, about: Mapping[str, object], columns: Sequence[str] = COLUMNS) -> pd.DataFrame:
    """The table that :func:`write_results` wrote.

    Args:
        path: of the CSV.
        about: its provenance; the first results have no checksum there.
        columns: that it must have. With those of a table of metrics, each pair and metric comes once, with a number.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, cut off, or not such a table.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    content = path.read_bytes()
    if about.get("table_sha256", _digest(content)) != _digest(content):
        raise ValueError(f"{path}: damaged or changed, its SHA-256 is not the one in {path.with_suffix('.json').name}")
    if not content.endswith(b"\n"):
        raise ValueError(f"{path}: expected a table that ends with its last line, got one that is cut off")
    try:
        table = pd.read_csv(io.BytesIO(content))
    except (ValueError, OverflowError) as error:  # pandas' own errors are ValueErrors
        raise ValueError(f"{path}: cannot be read as CSV: {error}") from error
    lacking = set(columns) - set(table.columns)
    if lacking:
        raise ValueError(f"{path} lacks the column(s) {', '.join(sorted(lacking))} of such a table")
    if set(COLUMNS) <= set(columns):
        if not len(table) or table["value"].dtype.kind not in "if":
            raise ValueError(f"{path}: expected numbers as values, got {list(table['value'][:3])}")
        if table[["pair", "metric"]].isna().any(axis=None) or table.duplicated(["pair", "metric"]).any():
            raise ValueError(f"{path}: expected every pair and metric once, got one twice or without a name")
    return table


def read_results(path: str | Path) -> tuple[pd.DataFrame, dict]:
    """A table of metrics and its provenance; errors as of :func:`read_table` and :func:`lumirlib.files.read_json`."""
    for needed in (Path(path), Path(path).with_suffix(".json")):
        if not needed.is_file():
            raise FileNotFoundError(f"no such file: {needed}")
    about = read_json(Path(path).with_suffix(".json"))
    return read_table(path, about), about


def data_title(cohort: str, name: str, simulated: bool, resolution_mm: float) -> str:
    """What data a table or figure is of, for its title: says "simulated" where it is, and what is not LUMIR.

    Args:
        cohort: short name of the cohort; of joined ones the last is what is evaluated, and all are trained on.
        name: its own name.
        simulated: whether it is.
        resolution_mm: edge of a voxel.
    """
    evaluated = cohort.split("+")[-1]
    trained = "" if evaluated == cohort else f"; trained on {cohort.replace('+', ' and ')}"
    if simulated:
        return f"simulated people, {resolution_mm:g} mm: not a LUMIR result{trained}"
    return f"{name}, {resolution_mm:g} mm{'' if evaluated == 'lumir' else ': not LUMIR'}{trained}"


def cohort_facts(cohort: Cohort) -> dict[str, object]:
    """What provenance says about a cohort; no path of this machine."""
    return {
        "cohort": cohort.short_name,
        "cohort_name": cohort.name,
        "cohort_digest": cohort.digest,
        "simulated": cohort.simulated,
        "resolution_mm": cohort.resolution_mm,
        "training_scans": len(cohort.train),
        "credit": cohort.credit,
        "scored_labels": len(cohort.labels),
    }
