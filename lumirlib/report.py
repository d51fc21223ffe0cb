"""Our figures beside the paper's, as numbers; each comes from a CSV. :mod:`lumirlib.tables` makes them readable."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path

import pandas as pd

from lumirlib.evaluation import data_title, read_table, summarize
from lumirlib.files import read_json
from lumirlib.methods import parse_row
from lumirlib.presets import Preset, split_options
from lumirlib.rows import Row
from lumirlib.variants import Variant

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
#: Points of Dice that a converged run may rise by over the last quarter of its epochs (docs/protocol.md).
CONVERGED = 0.3


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
    name: str,
    table: pd.DataFrame,
    before: pd.DataFrame,
    val_dice: float = math.nan,
    val_dice_before: float = math.nan,
) -> pd.DataFrame:
    """A row beside the paper's, with the row before registration beside the paper's too.

    Args:
        name: of the row, as :func:`lumirlib.methods.parse_row` gives it.
        table: long table of the run, as `<out>/metrics/<run>.csv`.
        before: long table of zero displacement on the same pairs as `table`.
        val_dice: Dice on the pairs that choose the best epoch, in [0, 1]; for variants, whose Table 2 has it.
        val_dice_before: of zero displacement, on the pairs of `val_dice`.

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
    if not is_variant:
        frame = frame.drop(columns="val_dice")
    return frame.rename(columns={column: heading for column, (_, _, heading) in COLUMNS.items()})


#: Row of ours -> its row in the paper's Table 1, where they are named differently.
TABLE_1_NAMES = {BEFORE: "Zero Displacement", "LC-2": "next-gen-nn"}


def paper_method(variant: str) -> str:
    """Name of a variant's row in the paper's Table 2, whose "BF" may be either of ours (DEVIATIONS.md, N13)."""
    return variant if variant in ("backbone", BEFORE) else f"backbone+{variant.replace('BF-post', 'BF')}"


def _theirs(method: str, table: int = 2) -> dict[str, float]:
    rows = paper_table(table).set_index("method")
    if method not in rows.index:  # what the paper never ran
        return dict.fromkeys(COLUMNS, float("nan"))
    return {column: float(rows.loc[method, column]) for column in COLUMNS}


def _pairs(table: pd.DataFrame) -> dict[str, float]:
    counted = {metric: float(pairs) for metric, pairs in summarize(table)["pairs"].items()}
    # Val Dice is of the training's own choice of pairs
    return {column: counted.get(metric, float("nan")) for column, (metric, _, _) in COLUMNS.items()}


def _minus(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    difference = {column: first[column] - second[column] for column in COLUMNS}
    return difference | {"dice_std": float("nan")}  # a difference of spreads tells nothing


# many runs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    """Finished runs of several variants and seeds, with one preset on one cohort.

    Attributes:
        variants: names, in the order of the table.
        preset: of all runs.
        options: what was set besides in all runs.
        values: columns variant, seed, pair, fixed, moving, metric, value; the variant "Before Reg", seed 0, is zero
            displacement.
        facts: one row per run: variant, seed, run, val_dice, val_dice_before and the rest of its provenance.
        history: one row per run and epoch: variant, seed and the columns of its log; a row that only filters another's
            result has the history of that one, a row that is not trained has none.
        missing: variants without a run.
        command: the sweep that makes what is missing.
    """

    variants: tuple[str, ...]
    preset: Preset
    options: Mapping[str, object]
    values: pd.DataFrame
    facts: pd.DataFrame
    missing: tuple[str, ...]
    command: str
    history: pd.DataFrame

    @property
    def title(self) -> str:
        """What a table or figure of these runs is headed with; says "simulated" where it is."""
        first = self.facts.iloc[0]
        data = data_title(first["cohort"], first["cohort_name"], first["simulated"], first["resolution_mm"])
        set_besides = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"{data}; preset {self.preset.name}{set_besides}"

    @property
    def missing_note(self) -> str:
        """Which rows have no run, and how to make them; says so where none lacks one."""
        if not self.missing:
            return "No row is missing."
        return f"**Not run: {', '.join(self.missing)}.** Make them with `{self.command}`."

    @property
    def commits(self) -> list[str]:
        """Of the code that made the runs."""
        return sorted(set(self.facts["commit"]))

    def about(self) -> dict[str, object]:
        """Provenance of a table of these runs."""
        return {
            "preset": self.preset.name,
            "cohort": self.facts["cohort"].iloc[0],
            "runs": sorted(self.facts["run"]),
            "commits": self.commits,
        }

    @property
    def spread_note(self) -> str:
        """How many pairs and seeds the figures are of, and what their signs mean."""
        pairs = self.values.groupby("variant")["pair"].nunique()
        seeds = self.facts.groupby("variant", sort=False)["seed"].nunique()
        fewest, most = int(seeds.min()), int(seeds.max())
        counted = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        return (
            f"{int(pairs.min())} pairs; {counted} seed(s) a row: means over the seeds, in parentheses the sample "
            "standard deviation over them; ± std is the population standard deviation over pairs"
        )


def _same_row(options: Mapping[str, object], wanted: Row) -> bool:
    """Whether the options in a results file, where those that came later may be lacking, are those of a row."""
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    return {**asdict(type(wanted)()), **found} == asdict(wanted)


def _same_preset(given: Mapping[str, object], wanted: Preset) -> bool:
    """Whether a preset in a results file, where options that came later may be lacking, is a preset."""
    later = {option.name: option.default for option in fields(wanted) if option.metadata.get("unnamed_at_default")}
    return {**later, **given, "about": ""} == {**asdict(wanted), "about": ""}


#: What the provenance of everything measured says, and that of a run besides.
MEASURED_FACTS = {"run": str, "method": str, "cohort": str, "cohort_digest": str, "resolution_mm": (int, float),
                  "evaluated_pairs": int}  # fmt: skip
RUN_FACTS = {"options": dict, "preset": dict, "seed": int, "val_dice": (int, float),
             "val_dice_before": (int, float, type(None)), "commit": str,
             "device": str, "cohort_name": str, "simulated": bool}  # fmt: skip


def _check_facts(path: Path, about: Mapping[str, object]) -> None:
    wanted = {**MEASURED_FACTS, **(RUN_FACTS if "options" in about else {})}
    if path.parent.name != "metrics":  # made from trained weights, later
        wanted = {name: kind for name, kind in wanted.items() if not name.startswith("val_dice")}
    for name, kind in wanted.items():
        value = about.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            kinds = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"{path}: expected {kinds} as {name!r}, got {value!r}")


def described(folder: str | Path, cohort: str | None = None, kind: str = "metrics") -> list[tuple[Path, dict]]:
    """CSV and provenance of all that was measured on a cohort; None takes all cohorts."""
    found = []
    for path in sorted(Path(folder, kind).glob("*.json")):
        try:
            about = read_json(path)
        except FileNotFoundError:  # a run is writing it anew at this moment
            continue
        _check_facts(path, about)
        if cohort in (None, about.get("cohort")) and path.with_suffix(".csv").is_file():
            found.append((path.with_suffix(".csv"), about))
    return found


def studies(folder: str | Path) -> pd.DataFrame:
    """What a results folder holds: one line for each cohort, preset and set of other options that was run.

    Args:
        folder: results folder, with `metrics/`.

    Returns:
        Columns cohort, preset, set_besides ("name=value, ..."; empty where nothing was), resolution_mm, simulated,
        rows, seeds, runs (their numbers), methods (names, joined by ", "); real data first, then by voxel size.
    """
    found = [
        {"cohort": about["cohort"], "preset": about["preset"]["name"], "method": about["method"], "seed": about["seed"],
         "set_besides": ", ".join(f"{name}={value}" for name, value in sorted(about.get("set_besides", {}).items())),
         "resolution_mm": about["resolution_mm"], "simulated": about["simulated"]}
        for _, about in described(folder) if "preset" in about
    ]  # fmt: skip
    keys = ["simulated", "resolution_mm", "cohort", "preset", "set_besides"]
    columns = ["cohort", "preset", "set_besides", "resolution_mm", "simulated", "rows", "seeds", "runs", "methods"]
    if not found:
        return pd.DataFrame(columns=columns)
    grouped = pd.DataFrame(found).groupby(keys)
    table = grouped.agg(
        rows=("method", "nunique"),
        seeds=("seed", "nunique"),
        runs=("method", "size"),
        methods=("method", lambda names: ", ".join(dict.fromkeys(names))),
    )
    return table.reset_index()[columns]


def _table_of(path: Path, about: Mapping[str, object]) -> pd.DataFrame:
    """The table of something measured, with all of its pairs."""
    table = read_table(path, about)
    pairs = table["pair"].nunique()
    if pairs != about["evaluated_pairs"] or len(table) != pairs * table["metric"].nunique():
        raise ValueError(
            f"{path}: expected {about['evaluated_pairs']} pairs with all metrics, as its provenance says, got "
            f"{pairs} pairs in {len(table)} rows"
        )
    return table


def find_runs(
    folder: str | Path, row: Row, preset: str, cohort: str, options: Mapping[str, object], kind: str = "metrics"
) -> list[tuple[Path, dict]]:
    """CSV and provenance of each finished run of a row, with any seed.

    Args:
        folder: results folder, with `metrics/`.
        row: as :func:`lumirlib.methods.parse_row` gives it.
        preset: name of the preset.
        cohort: short name of the cohort.
        options: what was set besides.
        kind: part of the folder that is looked in: "metrics", or "robustness".
    """
    chosen, for_row = split_options(preset, row, options)
    wanted = replace(chosen.apply(row), **for_row)
    return [
        (path, about)
        for path, about in described(folder, cohort, kind)
        if "options" in about and _same_row(about["options"], wanted) and _same_preset(about["preset"], chosen)
    ]


def load_runs(
    folder: str | Path,
    variants: Sequence[str],
    preset: str = "demo",
    cohort: str = "embedded",
    options: Mapping[str, object] | None = None,
) -> Runs:
    """The finished runs of a results folder that were made with one preset and cohort.

    Args:
        folder: results folder, with `metrics/`.
        variants: names for :func:`lumirlib.methods.parse_row`, in the order of the table.
        preset: name of the preset.
        cohort: short name of the cohort.
        options: what was set besides in these runs, as for :meth:`lumirlib.study.AblationRun.prepare`.

    Returns:
        :class:`Runs`; variants that have no run are in its `missing`.

    Raises:
        FileNotFoundError: no run of any of the variants.
        ValueError: two runs for one variant and seed, runs on different cohorts, or no zero displacement.
    """
    folder, given = Path(folder), dict(options or {})
    rows = {row.name: row for row in map(parse_row, variants)}
    names = list(rows)
    sweep = ["python -m lumirlib.sweep --rows", *names, "--preset", preset, "--cohort", cohort]
    sweep += ["--set", *(shlex.quote(f"{name}={value}") for name, value in given.items())] if given else []
    command = " ".join([*sweep, "--seeds 0 1 2"])
    tables, facts = [], []
    for name in names:
        for path, about in find_runs(folder, rows[name], preset, cohort, given):
            facts.append({"variant": name, **about})
            tables.append(_table_of(path, about).assign(variant=name, seed=about["seed"]))
    if not facts:
        raise FileNotFoundError(f"{folder / 'metrics'} has no run of {', '.join(names)}; make them with: {command}")
    about = pd.DataFrame(facts)
    twice = about[about.duplicated(["variant", "seed"], keep=False)]
    if len(twice):
        raise ValueError(f"{folder / 'metrics'} has several runs of one variant and seed: {', '.join(twice['run'])}")
    if len(set(about["cohort_digest"])) > 1:
        raise ValueError(f"{folder / 'metrics'}: the runs are on different states of the cohort {cohort!r}")
    first = about.iloc[0]
    before = [
        (path, other) for path, other in described(folder, cohort)
        if other["method"] == "Zero Displacement" and other["cohort_digest"] == first["cohort_digest"]
        and other["resolution_mm"] == first["resolution_mm"] and other["evaluated_pairs"] == first["evaluated_pairs"]
    ]  # fmt: skip
    if not before:
        raise ValueError(f"{folder / 'metrics'} has no zero displacement on the pairs of {first['run']}")
    tables.insert(0, _table_of(*before[0]).assign(variant=BEFORE, seed=0))
    values = pd.concat(tables, ignore_index=True)[["variant", "seed", "pair", "fixed", "moving", "metric", "value"]]
    present = set(about["variant"])
    return Runs(
        tuple(name for name in names if name in present),
        split_options(preset, rows[names[0]], given)[0],
        given,
        values,
        about,
        tuple(name for name in names if name not in present),
        command,
        _histories(folder, about),
    )


def _histories(folder: Path, facts: pd.DataFrame) -> pd.DataFrame:
    found = [pd.DataFrame({"variant": [], "seed": [], "epoch": [], "val_dice": []})]
    for _, fact in facts.iterrows():
        weights = fact.get("weights")
        log = folder / "logs" / f"{weights if isinstance(weights, str) else fact['run']}.csv"
        if log.is_file():
            found.append(pd.read_csv(log).assign(variant=fact["variant"], seed=fact["seed"]))
    return pd.concat(found[1:] or found, ignore_index=True)


def late_rises(runs: Runs) -> pd.DataFrame:
    """By how much the validation Dice of each run rose over the last quarter of its epochs.

    Returns:
        Columns variant, seed, epochs, rise (points), converged (rise at most :data:`CONVERGED`); runs with a log only.
    """
    rows = []
    for (variant, seed), log in runs.history.groupby(["variant", "seed"], sort=False):
        dice = 100 * log.set_index("epoch")["val_dice"]
        last = int(dice.index.max())
        rise = float(dice[last] - dice[last - max(1, last // 4)])
        rows.append(
            {"variant": variant, "seed": seed, "epochs": last, "rise": rise, "converged": not rise > CONVERGED}
        )  # fmt: skip
    return pd.DataFrame(rows, columns=["variant", "seed", "epochs", "rise", "converged"])


def table1(runs: Runs) -> pd.DataFrame:
    """The paper's Table 1 beside ours; as :func:`table2`, without "val_dice", which that table lacks."""
    return _beside(runs, {name: TABLE_1_NAMES.get(name, name) for name in (BEFORE, *runs.variants)}, 1)


def table2(runs: Runs) -> pd.DataFrame:
    """The paper's Table 2 beside ours, as numbers.

    Returns:
        One row per method (as the paper names it, "Before Reg" first) and column of the paper: method, variant, sc
        (ours), metric (key of :data:`COLUMNS`), paper, ours (mean over seeds), seed_std (sample standard deviation
        over seeds, NaN for one), difference (ours - paper), seeds, pairs (with a figure).
    """
    names = {name: paper_method(name) for name in (BEFORE, *runs.variants)}
    return _beside(runs, names, 2)


def _beside(runs: Runs, names: Mapping[str, str], table: int) -> pd.DataFrame:
    """Rows of :func:`table1` and :func:`table2`; `names` has the paper's name of each row of ours."""
    rows = []
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
            seeds.append((_ours(values, val_dice), _pairs(values)))
        ours = pd.DataFrame([values for values, _ in seeds])
        for column in COLUMNS if table == 2 else [column for column in COLUMNS if column != "val_dice"]:
            rows.append(
                {"method": method if name != "BF-post" else "backbone+BF-post", "variant": name, "sc": sc,
                 "metric": column, "paper": paper[column], "ours": ours[column].mean(),
                 "seed_std": ours[column].std(ddof=1), "difference": ours[column].mean() - paper[column],
                 "seeds": len(ours), "pairs": min(pairs[column] for _, pairs in seeds)}
            )  # fmt: skip
    return pd.DataFrame(rows)


def paired_differences(runs: Runs, reference: str = "backbone") -> pd.DataFrame:
    """Each pair's figure minus that of the reference with the same seed, in the paper's units.

    Args:
        runs: with the reference among them.
        reference: a variant.

    Returns:
        Columns variant, metric (dice, tre_mm, ndv_percent, hd95_mm), seed, pair, difference.

    Raises:
        ValueError: no run of the reference, or another row that has no seed in common with it.
    """
    if reference not in runs.variants:
        raise ValueError(f"reference must be one of the runs ({', '.join(runs.variants)}); got {reference!r}")
    scored = runs.values[runs.values["metric"].isin([column for column in COLUMNS if column in DIGITS])]
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
        factor = difference.index.get_level_values("metric").map(lambda metric: COLUMNS[metric][1])
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
        better = pairs > 0 if metric in HIGHER_IS_BETTER else pairs < 0
        rows.append(
            {"variant": name, "metric": metric, "paper": _theirs(paper_method(name))[metric] - paper_reference[metric],
             "ours": pairs.mean(), "seed_std": seeds.std(ddof=1), "better_pairs": better.mean(), "seeds": len(seeds),
             "pairs": len(pairs)}
        )  # fmt: skip
    order = [column for column in COLUMNS if column not in ("val_dice", "dice_std")]
    frame = pd.DataFrame(rows)
    if frame.empty:
        return frame
    frame["metric"] = pd.Categorical(frame["metric"], order)
    frame["variant"] = pd.Categorical(frame["variant"], runs.variants)
    return frame.sort_values(["variant", "metric"]).astype({"variant": str, "metric": str}).reset_index(drop=True)
