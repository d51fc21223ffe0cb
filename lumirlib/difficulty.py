"""Why some pairs are hard: what is known of each pair before registration, against what registration reaches.

The paper's conclusion finds that Dice differs widely between pairs and asks for the reasons.
"""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from tqdm.auto import tqdm

from lumirlib.data import Cohort, Pair
from lumirlib.evaluation import Method

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


def pair_table(
    cohort: Cohort,
    pairs: tuple[Pair, ...],
    before: pd.DataFrame,
    after: pd.DataFrame,
    method: Method,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> pd.DataFrame:
    """One row per labelled pair, hardest first.

    Args:
        cohort: of the pairs.
        pairs: to describe; those without labels are left out.
        before: long table of zero displacement.
        after: long table of a method.
        method: the same method; its displacement is measured.
        device: where it runs.
        progress: show a progress bar.

    Returns:
        Columns pair, dice (after, percent), gain (points), dice_before (percent), brain_ratio and ventricle_ratio
        (larger volume over smaller, 1 or more), displacement_mm (mean length inside the fixed brain).

    Raises:
        ValueError: no pair has labels on both sides, or a pair is not in the tables.
    """
    dices = [table[table["metric"] == "dice"].set_index("pair")["value"] * 100 for table in (before, after)]
    volumes: dict[str, tuple[float, float]] = {}

    def measured(subject) -> tuple[float, float]:
        if subject.name not in volumes:
            labels = cohort.label_volume(subject)
            ventricles = torch.isin(labels, torch.tensor(VENTRICLES, dtype=labels.dtype)).sum()
            volumes[subject.name] = (float((cohort.image(subject) > 0).sum()), float(ventricles))
        return volumes[subject.name]

    labelled = [pair for pair in pairs if pair.fixed.labels and pair.moving.labels]
    if not labelled:
        raise ValueError(f"{cohort.path}: no pair has labels on both sides, so none has a Dice")
    rows = []
    for pair in tqdm(labelled, desc="pairs", unit="pair", disable=not progress):
        if not all(pair.name in dice.index for dice in dices):
            raise ValueError(f"before and after must have a Dice for {pair.name}, but one of them lacks it")
        fixed, moving = (cohort.image(subject).to(device) for subject in (pair.fixed, pair.moving))
        with torch.no_grad():
            length = method(fixed, moving).norm(dim=1, keepdim=True)[fixed > 0].mean()
        (brain, ventricles), (other_brain, other_ventricles) = measured(pair.fixed), measured(pair.moving)
        dice_before, dice = (float(found[pair.name]) for found in dices)
        rows.append(
            {"pair": pair.name, "dice": dice, "gain": dice - dice_before, "dice_before": dice_before,
             "brain_ratio": _ratio(brain, other_brain), "ventricle_ratio": _ratio(ventricles, other_ventricles),
             "displacement_mm": float(length) * cohort.resolution_mm}
        )  # fmt: skip
    return pd.DataFrame(rows).sort_values("dice", kind="stable", ignore_index=True)


def explain(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation of every feature with the Dice reached and with the gain.

    Pairs share people, so no p-value is given.

    Args:
        table: as :func:`pair_table` gives it.

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


def difficulty_figure(table: pd.DataFrame, title: str) -> Figure:
    """Dice after registration and gain against each feature, a dot per pair, with the rank correlation.

    Args:
        table: as :func:`pair_table` gives it.
        title: of the figure.
    """
    correlations = explain(table).set_index("feature")
    figure, axes = plt.subplots(len(OUTCOMES), len(FEATURES), figsize=(13, 6), layout="constrained", sharex="col",
                                sharey="row")  # fmt: skip
    for row, (outcome, outcome_words) in enumerate(OUTCOMES.items()):
        for column, (feature, words) in enumerate(FEATURES.items()):
            ax = axes[row, column]
            sns.scatterplot(table, x=feature, y=outcome, ax=ax, s=22)
            rho = correlations.loc[feature, outcome]
            ax.set(xlabel=words, ylabel=outcome_words, title="" if math.isnan(rho) else f"rank correlation {rho:+.2f}")
    figure.suptitle(title)
    return figure
