"""The paper: its figures, its metrics, the rows of its tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources

import pandas as pd

from lumirlib.methods import parse_row
from lumirlib.metrics.pair import MEASURES, Measure


@dataclass(frozen=True, kw_only=True)
class Metric(Measure):
    """A metric with all that tables, tests and claims need to know of it.

    Attributes:
        digits: Digits after the point in the paper's tables.
        short_digits: Digits after the point in differences of ours, and on model cards.
        unit_of_difference: Unit of a difference, for a reader.
        margin: Half the width of the band within which two rows match, in the unit of results files; NaN where rows
            are not compared.
        resolution: Smallest difference that counts as one, in the unit of results files.
        snapshot_weight: Weight in the challenge's snapshot score of July 2024.
        final_weight: Weight over ranks by significance in the final ranking of 2024, as a participant states it.
    """

    digits: int
    short_digits: int
    unit_of_difference: str
    margin: float = math.nan
    resolution: float = 0.0
    snapshot_weight: float = 0.0
    final_weight: float = 0.0

    def shown(self, value: float) -> float:
        """A value of results files in the unit that readers see."""
        return value * self.factor

    @property
    def shown_margin(self) -> float:
        """The margin in the unit that readers see."""
        return self.shown(self.margin)


def _challenge(name: str, **more) -> Metric:
    return Metric(**asdict(MEASURES[name]), **more)


def _of_dice(name: str, title: str, **more) -> Metric:
    """A figure of tables that is made of Dice."""
    factor = MEASURES["dice"].factor
    return Metric(name=name, title=title, factor=factor, digits=2, short_digits=2, unit_of_difference="points", **more)


#: All that is known of a metric, by its name; every table, test and figure of the study takes it from here.
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        _of_dice("val_dice", "Val Dice", unit="%", higher_is_better=True),
        _challenge(
            "dice",
            digits=2,
            short_digits=2,
            unit_of_difference="points",
            margin=0.0025,
            snapshot_weight=1 / 6,
            final_weight=1 / 5,
        ),
        _of_dice("dice_unused", "Dice, other people", unit="%", higher_is_better=True),
        _of_dice("dice_std", "± std", unit=""),
        _challenge(
            "tre_mm",
            digits=4,
            short_digits=3,
            unit_of_difference="mm",
            margin=0.05,
            snapshot_weight=1 / 3,
            final_weight=2 / 5,
        ),
        Metric(
            name="tre_points_mm", title="TRE of points", unit="mm", digits=4, short_digits=3, unit_of_difference="mm"
        ),
        _challenge(
            "ndv_percent",
            digits=4,
            short_digits=4,
            unit_of_difference="%",
            margin=0.01,
            resolution=0.001,
            snapshot_weight=1 / 3,
            final_weight=1 / 5,
        ),
        _challenge(
            "hd95_mm",
            digits=4,
            short_digits=3,
            unit_of_difference="mm",
            margin=0.1,
            snapshot_weight=1 / 6,
            final_weight=1 / 5,
        ),
    )
}
#: The challenge's metrics, which rows are compared and ranked by, in the paper's order.
CHALLENGE = tuple(MEASURES)
#: Columns of the paper's tables, in their order; "val_dice" is in Table 2 alone.
COLUMNS = ("val_dice", "dice", "dice_std", "tre_mm", "ndv_percent", "hd95_mm")
#: Columns of our tables: the paper's; TRE in the textbook's form, as the challenge's is coarse on coarse voxels; and,
#: where half of the people chose settings and epochs, Dice of the others.
SHOWN_COLUMNS = ("val_dice", "dice", "dice_std", "dice_unused", "tre_mm", "tre_points_mm", "ndv_percent", "hd95_mm")


def published() -> pd.DataFrame:
    """Published figures on LUMIR's validation pairs: the paper's Table 1, and others beside it.

    Returns:
        Index: method; columns dice (0 to 1), tre_mm, ndv_percent, hd95_mm, source.
    """
    paper = paper_table(1).set_index("method")
    paper = paper.assign(dice=paper["dice"] / METRICS["dice"].factor, source="the paper, Table 1")
    with resources.files("lumirlib.study").joinpath("published.csv").open(encoding="utf-8") as lines:
        others = pd.read_csv(lines, index_col="method")
    return pd.concat([paper[others.columns], others])


BEFORE = "Before Reg"


@cache
def _numbers() -> pd.DataFrame:
    with resources.files("lumirlib.study").joinpath("paper.csv").open(encoding="utf-8") as lines:
        return pd.read_csv(lines)


def paper_table(table: int | None = None) -> pd.DataFrame:
    """The numbers of the paper's Tables 1 and 2, from the CSV that the package carries.

    Args:
        table: Number of the table, 1 or 2; None takes both.

    Returns:
        Columns table, method, sc, val_dice, dice, dice_std (percent), tre_mm, ndv_percent, hd95_mm; NaN where the
        paper has none.
    """
    rows = _numbers()
    return rows.copy() if table is None else rows[rows["table"] == table].reset_index(drop=True)


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
    "COMP+REC",
    "COMP+REF",
    "COMP+ANTI",
    "COMP+NDV",
    "COMP+LR4",
    "COMP+MUON",
    "COMP+TISSUE",
    "COMP+FORCE",
    "LC-2+LR4+MUON",
    "ours",
    "ours+TISSUE+FORCE",
    "ours+TISSUE+FORCE-late",
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
