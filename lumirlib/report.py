"""Tables that set our figures beside the paper's; every number comes from a CSV."""

from __future__ import annotations

from importlib import resources

import pandas as pd

from lumirlib.evaluation import summarize

#: Column of paper.csv -> metric of ours, factor from our unit to the paper's, heading.
COLUMNS: dict[str, tuple[str, float, str]] = {
    "val_dice": ("val_dice", 100.0, "Val Dice (%)"),
    "dice": ("dice", 100.0, "Dice (%)"),
    "dice_std": ("dice_std", 100.0, "± std"),
    "tre_mm": ("tre_mm", 1.0, "TRE (mm)"),
    "ndv_percent": ("ndv_percent", 1.0, "NDV (%)"),
    "hd95_mm": ("hd95_mm", 1.0, "HD95 (mm)"),
}


def paper_table(table: int | None = None) -> pd.DataFrame:
    """The numbers of the paper's Tables 1 and 2, from the CSV that the package carries.

    Args:
        table: 1 or 2; None takes both.

    Returns:
        Columns table, method, sc, val_dice, dice, dice_std (percent), tre_mm, ndv_percent, hd95_mm; NaN where the
        paper has none.
    """
    with resources.files("lumirlib").joinpath("paper.csv").open(encoding="utf-8") as lines:
        rows = pd.read_csv(lines)
    return rows if table is None else rows[rows["table"] == table].reset_index(drop=True)


def _ours(table: pd.DataFrame, val_dice: float) -> dict[str, float]:
    summary = summarize(table)
    values = {metric: float(row["mean"]) for metric, row in summary.iterrows()}
    values |= {"val_dice": val_dice, "dice_std": float(summary.loc["dice", "std"])}
    return {column: values[metric] * factor for column, (metric, factor, _) in COLUMNS.items()}


def beside_the_paper(
    variant: str, table: pd.DataFrame, val_dice: float, before: pd.DataFrame, val_dice_before: float
) -> pd.DataFrame:
    """A variant's row beside the paper's, with the row before registration beside the paper's too.

    Args:
        variant: name as :func:`lumirlib.parse_variant` gives it.
        table: long table of the run, as `<out>/metrics/<run>.csv`.
        val_dice: Dice on the pairs that choose the best epoch, in [0, 1].
        before: long table of zero displacement on the same pairs as `table`.
        val_dice_before: of zero displacement, on the pairs of `val_dice`.

    Returns:
        One row each for before registration (paper, ours), the variant (paper, ours, ours - paper, and how many pairs
        ours has a figure for), and the gain over zero displacement (paper, ours); columns as headed in the paper. NaN
        where the paper has no figure.
    """
    paper_before = _theirs("Before Reg")
    ours_before = _ours(before, val_dice_before)
    paper = _theirs(paper_method(variant))
    ours = _ours(table, val_dice)
    rows = {
        ("before registration", "paper"): paper_before,
        ("before registration", "ours"): ours_before,
        (variant, "paper"): paper,
        (variant, "ours"): ours,
        (variant, "ours - paper"): _minus(ours, paper),
        (variant, "our pairs"): _pairs(table),
        ("gain by registration", "paper"): _minus(paper, paper_before),
        ("gain by registration", "ours"): _minus(ours, ours_before),
    }
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index = pd.MultiIndex.from_tuples(frame.index)
    return frame.rename(columns={column: heading for column, (_, _, heading) in COLUMNS.items()})


def paper_method(variant: str) -> str:
    """Name of a variant's row in the paper's Table 2, whose "BF" may be either of ours (DEVIATIONS.md, N13)."""
    return variant if variant == "backbone" else f"backbone+{variant.replace('BF-post', 'BF')}"


def _theirs(method: str) -> dict[str, float]:
    rows = paper_table(2).set_index("method")
    if method not in rows.index:  # a combination that the paper never ran
        return dict.fromkeys(COLUMNS, float("nan"))
    return {column: float(rows.loc[method, column]) for column in COLUMNS}


def _pairs(table: pd.DataFrame) -> dict[str, float]:
    counted = {metric: float(pairs) for metric, pairs in summarize(table)["pairs"].items()}
    # Val Dice is of the training's own choice of pairs
    return {column: counted.get(metric, float("nan")) for column, (metric, _, _) in COLUMNS.items()}


def _minus(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    difference = {column: first[column] - second[column] for column in COLUMNS}
    return difference | {"dice_std": float("nan")}  # a difference of spreads tells nothing
