"""The paper: its figures, its metrics, the rows of its tables."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import pandas as pd

from lumirlib.methods import parse_row

#: Metric -> whether more is better, and its weight in the snapshot score of July 2024.
CHALLENGE_METRICS: dict[str, tuple[bool, float]] = {
    "dice": (True, 1 / 6),
    "tre_mm": (False, 1 / 3),
    "ndv_percent": (False, 1 / 3),
    "hd95_mm": (False, 1 / 6),
}
#: Weights over ranks by significance in the final ranking of 2024, as a participant states them.
FINAL_WEIGHTS = {"dice": 1 / 5, "tre_mm": 2 / 5, "ndv_percent": 1 / 5, "hd95_mm": 1 / 5}


def published() -> pd.DataFrame:
    """Published figures on LUMIR's validation pairs: the paper's Table 1, and others beside it.

    Returns:
        Index: method; columns dice (0 to 1), tre_mm, ndv_percent, hd95_mm, source.
    """
    paper = paper_table(1).set_index("method")
    paper = paper.assign(dice=paper["dice"] / 100, source="the paper, Table 1")
    with resources.files("lumirlib").joinpath("published.csv").open(encoding="utf-8") as lines:
        others = pd.read_csv(lines, index_col="method")
    return pd.concat([paper[others.columns], others])


#: Column of paper.csv -> metric of ours, factor from our unit to the paper's, heading.
COLUMNS: dict[str, tuple[str, float, str]] = {
    "val_dice": ("val_dice", 100.0, "Val Dice (%)"),
    "dice": ("dice", 100.0, "Dice (%)"),
    "dice_std": ("dice_std", 100.0, "± std"),
    "tre_mm": ("tre_mm", 1.0, "TRE (mm)"),
    "ndv_percent": ("ndv_percent", 1.0, "NDV (%)"),
    "hd95_mm": ("hd95_mm", 1.0, "HD95 (mm)"),
}
#: Digits after the point, as the paper has them.
DIGITS = {"val_dice": 2, "dice": 2, "dice_std": 2, "tre_mm": 4, "ndv_percent": 4, "hd95_mm": 4}
#: Metrics of which more is better; of the others less is.
HIGHER_IS_BETTER = ("val_dice", "dice")

BEFORE = "Before Reg"


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


#: Row of ours -> its row in the paper's Table 1, where they are named differently.
TABLE_1_NAMES = {BEFORE: "Zero Displacement", "LC-2": "next-gen-nn"}


def paper_method(variant: str) -> str:
    """Name of a variant's row in the paper's Table 2, whose "BF" may be either of ours (DEVIATIONS.md, N13)."""
    return variant if variant in ("backbone", BEFORE) else f"backbone+{variant.replace('BF-post', 'BF')}"


#: The variant that stands for the paper's submission in Table 1: its figures there are those of LC-2 in Table 2.
NEXT_GEN_NN = "LC-2"
#: The ablation of our own options, see docs/beyond.md: one option each on the compositional cascade, and the recipe.
BEYOND = (
    "LC-2",
    "COMP",
    "COMP+CORR",
    "COMP+SYM",
    "COMP+NDV",
    "COMP+INT",
    "COMP+GROUP",
    "COMP+REC",
    "COMP+MUON",
    "LC-2+MUON",
    "COMP+IO",
    "ours",
    "ours+IO",
    "LC-2+IO",
)


def uses_other_weights(name: str) -> bool:
    """Whether the row uses another run's weights, as "BF-post" and "IO" do."""
    row = parse_row(name)
    return row.base_row() != row


def rows_of_table(table: int) -> list[str]:
    """Our rows of the paper's Table 1 or 2, in its order; zero displacement is measured with each of them."""
    methods = paper_table(table)["method"]
    if table == 2:
        return [method.removeprefix("backbone+") for method in methods if method.startswith("backbone")]
    return [NEXT_GEN_NN if method == "next-gen-nn" else method for method in methods if method != "Zero Displacement"]


def table_rows(rows: Sequence[str]) -> list[str]:
    """Names of rows, each once, with "table1", "table2" and "beyond" replaced by theirs (:data:`BEYOND`)."""
    lists = {"table1": rows_of_table(1), "table2": rows_of_table(2), "beyond": BEYOND}
    return list(dict.fromkeys(parse_row(name).name for row in rows for name in lists.get(row, [row])))
