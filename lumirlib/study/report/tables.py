"""Our figures beside the paper's, as numbers; each comes from a CSV. `publish` makes them readable."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from lumirlib.evaluation import summarize
from lumirlib.methods import parse_row
from lumirlib.methods.variants import Variant
from lumirlib.study.paper import (
    BEFORE,
    CHALLENGE,
    COLUMNS,
    METRICS,
    SHOWN_COLUMNS,
    TABLE_1_NAMES,
    paper_method,
    paper_table,
)
from lumirlib.study.report.runs import Runs


def _ours(table: pd.DataFrame, val_dice: float) -> dict[str, float]:
    summary = summarize(table)
    values = {metric: float(row["mean"]) for metric, row in summary.iterrows()}
    values |= {"val_dice": val_dice, "dice_std": float(summary.loc["dice", "std"])}
    return {column: METRICS[column].shown(values.get(column, math.nan)) for column in SHOWN_COLUMNS}


def compare_with_paper(
    name: str,
    table: pd.DataFrame,
    before: pd.DataFrame,
    val_dice: float = math.nan,
    val_dice_before: float = math.nan,
) -> pd.DataFrame:
    """A row beside the paper's, with the row before registration beside the paper's too.

    Args:
        name: Name of the row, as :func:`lumirlib.methods.parse_row` gives it.
        table: Long table of the run, as `<out>/metrics/<run>.csv`.
        before: Long table of zero displacement on the same pairs as `table`.
        val_dice: Dice on the pairs that choose the best epoch, in [0, 1]; for variants, whose Table 2 has it.
        val_dice_before: Dice of zero displacement, on the pairs of `val_dice`.

    Returns:
        One row each for before registration (paper, ours), the row (paper, ours, ours - paper, and how many pairs
        ours has a figure for), and the gain over zero displacement (paper, ours); columns as headed in the paper. NaN
        where the paper has no figure.
    """
    is_variant = isinstance(parse_row(name), Variant)
    paper_before = _theirs(BEFORE)
    ours_before = _ours(before, val_dice_before)
    paper = _theirs(paper_method(name)) if is_variant else _theirs(name, 1)
    ours = _ours(table, val_dice)
    rows = {
        ("before registration", "paper"): paper_before,
        ("before registration", "ours"): ours_before,
        (name, "paper"): paper,
        (name, "ours"): ours,
        (name, "ours - paper"): _minus(ours, paper),
        (name, "our pairs"): _pairs(table),
        ("gain by registration", "paper"): _minus(paper, paper_before),
        ("gain by registration", "ours"): _minus(ours, ours_before),
    }
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index = pd.MultiIndex.from_tuples(frame.index)
    frame = frame[[column for column in COLUMNS if is_variant or column != "val_dice"]]
    return frame.rename(columns={column: METRICS[column].heading for column in COLUMNS})


def _theirs(method: str, table: int = 2) -> dict[str, float]:
    rows = paper_table(table).set_index("method")
    found = dict.fromkeys(SHOWN_COLUMNS, math.nan)
    # the paper never ran some rows, and has no TRE of points
    return found | {column: float(rows.loc[method, column]) for column in COLUMNS if method in rows.index}


def _pairs(table: pd.DataFrame) -> dict[str, float]:
    counted = {metric: float(pairs) for metric, pairs in summarize(table)["pairs"].items()}
    # Val Dice is of the training's own choice of pairs
    return {column: counted.get(column, math.nan) for column in SHOWN_COLUMNS}


def _people(table: pd.DataFrame) -> dict[str, float]:
    known = table.dropna(subset="value").groupby("metric")[["fixed", "moving"]]
    counted = {metric: float(len({*pairs["fixed"], *pairs["moving"]})) for metric, pairs in known}
    return {column: counted.get(column, math.nan) for column in SHOWN_COLUMNS} | {"dice_std": counted["dice"]}


def _minus(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    difference = {column: first[column] - second[column] for column in SHOWN_COLUMNS}
    return difference | {"dice_std": math.nan}  # a difference of spreads tells nothing


def table1(runs: Runs) -> pd.DataFrame:
    """The paper's Table 1 beside ours; as :func:`table2`, without "val_dice", which that table lacks."""
    return _beside(runs, {name: TABLE_1_NAMES.get(name, name) for name in (BEFORE, *runs.variants)}, 1)


def table2(runs: Runs) -> pd.DataFrame:
    """The paper's Table 2 beside ours, as numbers.

    Returns:
        One row per method (as the paper names it, "Before Reg" first) and column of the paper: method, variant, sc
        (ours), metric (one of :data:`SHOWN_COLUMNS`), paper, ours (mean over seeds), seed_std (sample standard
        deviation over seeds, NaN for one), difference (ours - paper), seeds, pairs and people (with a figure).
    """
    names = {name: paper_method(name) for name in (BEFORE, *runs.variants)}
    return _beside(runs, names, 2)


def _beside(runs: Runs, names: Mapping[str, str], table: int) -> pd.DataFrame:
    """Rows of :func:`table1` and :func:`table2`; `names` has the paper's name of each row of ours."""
    rows = []
    left_out = {"val_dice"} if table == 1 else set()
    unused = runs.unused_pairs if runs.preset.validation_half else []
    left_out |= set() if unused else {"dice_unused"}
    for name, method in names.items():
        paper = _theirs(method, table)
        seeds = []
        for seed, values in runs.values[runs.values["variant"] == name].groupby("seed"):
            if name == BEFORE:
                known = runs.facts.get("val_dice_before", pd.Series(dtype=float)).dropna()  # the first runs lack it
                val_dice, sc = float(known.iloc[0]) if len(known) else math.nan, None
            else:
                fact = runs.facts[(runs.facts["variant"] == name) & (runs.facts["seed"] == seed)].iloc[0]
                val_dice, sc = float(fact["val_dice"]), fact["options"].get("start_channels")
            others = values[(values["metric"] == "dice") & values["pair"].isin(unused)]
            of_others = {"dice_unused": float(len(others))}
            people = {"dice_unused": float(len({*others["fixed"], *others["moving"]}))}
            found = _ours(values, val_dice) | {"dice_unused": METRICS["dice"].shown(others["value"].mean())}
            seeds.append((found, _pairs(values) | of_others, _people(values) | people))
        ours = pd.DataFrame([values for values, *_ in seeds])
        for column in (column for column in SHOWN_COLUMNS if column not in left_out):
            rows.append(
                {
                    "method": method if name != "BF-post" else "backbone+BF-post",
                    "variant": name,
                    "sc": sc,
                    "metric": column,
                    "paper": paper[column],
                    "ours": ours[column].mean(),
                    "seed_std": ours[column].std(ddof=1),
                    "difference": ours[column].mean() - paper[column],
                    "seeds": len(ours),
                    "pairs": min(pairs[column] for _, pairs, _ in seeds),
                    "people": min(people[column] for *_, people in seeds),
                }
            )
    return pd.DataFrame(rows)


def paired_differences(runs: Runs, reference: str = "backbone") -> pd.DataFrame:
    """Each pair's figure minus that of the reference with the same seed, in the paper's units.

    Args:
        runs: Runs with the reference among them.
        reference: Name of a variant.

    Returns:
        Columns variant, metric (dice, tre_mm, ndv_percent, hd95_mm), seed, pair, difference.

    Raises:
        ValueError: no run of the reference, or another row that has no seed in common with it.
    """
    if reference not in runs.variants:
        raise ValueError(f"reference must be one of the runs ({', '.join(runs.variants)}); got {reference!r}")
    scored = runs.values[runs.values["metric"].isin(CHALLENGE)]
    keys = ["seed", "pair", "metric"]
    base = scored[scored["variant"] == reference].set_index(keys)["value"]
    found = []
    for name in runs.variants:
        if name == reference:
            continue
        own = scored[scored["variant"] == name].set_index(keys)["value"]
        difference = (own - base).dropna()
        if difference.empty:
            raise ValueError(f"{name} and {reference} have no seed and pair in common")
        factor = difference.index.get_level_values("metric").map(lambda metric: METRICS[metric].factor)
        found.append((difference * factor).rename("difference").reset_index().assign(variant=name))
    if not found:
        return pd.DataFrame(columns=["variant", "metric", "seed", "pair", "difference"])
    return pd.concat(found, ignore_index=True)[["variant", "metric", "seed", "pair", "difference"]]


def effects(runs: Runs, reference: str = "backbone") -> pd.DataFrame:
    """What each scheme changes about the backbone: the paper's difference, and ours over the same pairs and seeds.

    Returns:
        One row per variant and metric: variant, metric, paper (difference of the table's means), ours (mean of the
        paired differences), seed_std (sample standard deviation of the seeds' means), better_pairs (share of the pairs
        whose difference, meaned over seeds, is an improvement), seeds, pairs. In the paper's units.
    """
    differences = paired_differences(runs, reference)
    paper_reference = _theirs(paper_method(reference))
    rows = []
    for (name, metric), table in differences.groupby(["variant", "metric"], sort=False):
        seeds = table.groupby("seed")["difference"].mean()
        pairs = table.groupby("pair")["difference"].mean()
        better = pairs > 0 if METRICS[metric].higher_is_better else pairs < 0
        rows.append(
            {
                "variant": name,
                "metric": metric,
                "paper": _theirs(paper_method(name))[metric] - paper_reference[metric],
                "ours": pairs.mean(),
                "seed_std": seeds.std(ddof=1),
                "better_pairs": better.mean(),
                "seeds": len(seeds),
                "pairs": len(pairs),
            }
        )
    frame = pd.DataFrame(rows)
    if frame.empty:
        return frame
    frame["metric"] = pd.Categorical(frame["metric"], CHALLENGE)
    frame["variant"] = pd.Categorical(frame["variant"], runs.variants)
    return frame.sort_values(["variant", "metric"]).astype({"variant": str, "metric": str}).reset_index(drop=True)
