"""Why some pairs are hard: facts of each pair before registration, against the figures after it.

The paper's conclusion finds that Dice differs widely between pairs and asks for the reasons.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy.stats import spearmanr
from tqdm.auto import tqdm

from lumirlib.data import Cohort, Subject
from lumirlib.metrics.overlap import label_counts

#: BrainCOLOR numbers of the third, fourth, inferior lateral and lateral ventricles.
VENTRICLES = (4, 11, 49, 50, 51, 52)
#: What may make a pair hard -> words for an axis.
FEATURES = {
    "dice_before": "Dice before (%)",
    "brain_ratio": "brain volumes, larger / smaller",
    "ventricle_ratio": "ventricle volumes, larger / smaller",
    "displacement_mm": "mean displacement (mm)",
}

OUTCOMES = {"dice": "Dice after (%)", "gain": "gain (points)"}


def _ratio(first: float, second: float) -> float:
    return max(first, second) / min(first, second) if min(first, second) > 0 else math.nan


def pair_table(cohort: Cohort, before: pd.DataFrame, after: pd.DataFrame, progress: bool = True) -> pd.DataFrame:
    """One row per labelled pair, hardest first.

    Args:
        cohort: Cohort of the pairs.
        before: Long table of zero displacement.
        after: Long table of one or more runs of a method; several values of a pair are averaged.
        progress: Show a progress bar.

    Returns:
        Columns pair, dice (after, percent), gain (points), dice_before (percent), brain_ratio and ventricle_ratio
        (larger volume over smaller, 1 or more), displacement_mm (mean length inside the fixed brain).

    Raises:
        ValueError: no pair has a Dice, or a table lacks a figure of a pair.
    """
    values = after.groupby(["metric", "pair"])["value"].mean()
    dice_before = before[before["metric"] == "dice"].set_index("pair")["value"]
    volumes: dict[str, tuple[float, float]] = {}

    def measured(subject: Subject) -> tuple[float, float]:
        if subject.name not in volumes:
            labels = cohort.label_volume(subject)
            ventricles = label_counts(labels, VENTRICLES).sum()
            volumes[subject.name] = (float((cohort.image(subject) > 0).sum()), float(ventricles))
        return volumes[subject.name]

    pairs = {pair.name: pair for pair in cohort.validation_pairs if pair.fixed.labels and pair.moving.labels}
    names = [name for name in pairs if math.isfinite(values.get(("dice", name), math.nan))]
    if not names:
        raise ValueError(f"{cohort.path}: no pair of the tables has a Dice")
    rows = []
    for name in tqdm(names, desc="pairs", unit="pair", disable=not progress):
        if name not in dice_before.index or ("displacement_mm", name) not in values.index:
            raise ValueError(
                f"the tables must have Dice before registration and displacement_mm for {name}, but lack one of them"
            )
        (brain, ventricles), (other_brain, other_ventricles) = map(measured, (pairs[name].fixed, pairs[name].moving))
        dice = 100 * values["dice", name]
        rows.append(
            {
                "pair": name,
                "dice": dice,
                "gain": dice - 100 * dice_before[name],
                "dice_before": 100 * dice_before[name],
                "brain_ratio": _ratio(brain, other_brain),
                "ventricle_ratio": _ratio(ventricles, other_ventricles),
                "displacement_mm": values["displacement_mm", name],
            }
        )
    return pd.DataFrame(rows).sort_values("dice", kind="stable", ignore_index=True)


def explain(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation of every feature with the Dice reached and with the gain.

    Pairs share people, so no p-value is given.

    Args:
        table: Table as :func:`pair_table` gives it.

    Returns:
        One row per feature: feature, dice, gain (each in [-1, 1], NaN where a column is constant or has fewer than
        three values), pairs.
    """
    rows = []
    for feature in FEATURES:
        kept = table[[feature, *OUTCOMES]].replace([np.inf, -np.inf], np.nan).dropna()
        row = {"feature": feature, "pairs": len(kept)}
        for outcome in OUTCOMES:
            varied = len(kept) > 2 and len(set(kept[feature])) > 1 and len(set(kept[outcome])) > 1
            row[outcome] = float(spearmanr(kept[feature], kept[outcome]).statistic) if varied else math.nan
        rows.append(row)
    return pd.DataFrame(rows)[["feature", *OUTCOMES, "pairs"]]
