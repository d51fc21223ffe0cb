"""The evidence for our own options (docs/beyond.md) from finished runs: ablation, equal time, targets, robustness.

Everything follows from CSVs that runs wrote; rows that have not been run are left out and named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from lumirlib.methods import parse_row
from lumirlib.study import robustness
from lumirlib.study.paper import METRICS, uses_other_weights
from lumirlib.study.report.publish import as_text, not_converged_note, publish
from lumirlib.study.report.runs import Runs, deterministic_rows, late_rises, not_converged
from lumirlib.study.report.statistics import compare_rows
from lumirlib.study.results import Measured, check_scored_alike, find_runs, read_table

RECIPE = "ours"
#: The authors' best row as it is tuned, and with the recipe's optimizer and rate: what ours has to lead.
EQUALLY_TUNED = ("LC-2", "LC-2+LR4+MUON")
#: What every row is compared with: these, and the cascade that the options are added to.
REFERENCES = (*EQUALLY_TUNED, "COMP")
#: Metrics of the table.
COMPARED = ("dice", "hd95_mm", "tre_mm", "tre_points_mm", "ndv_percent")
#: Targets: Dice (%); points of Dice above rows that are tuned equally; NDV (%); seconds for a pair.
MIN_DICE, DICE_GAIN, MAX_NDV, MAX_SECONDS = 65.5, 1.0, 0.005, 5.0


MET, NOT_MET, OPEN = "met", "not met", "cannot be told"


def with_measured_step_times(runs: Runs, costs: Measured) -> Runs:
    """The runs with the seconds of a step measured in turn (:mod:`lumirlib.study.costs`) in place of their own.

    Runs that were made beside other work took longer than they cost. Rows that were not measured have no time then. A
    step is measured at the preset's voxels; one of a coarser stage counts as its share of the voxels, an eighth at
    twice the edge.

    Args:
        runs: Runs of any rows.
        costs: Measured costs of the same preset.
    """
    seconds = pd.Series(dtype=float)
    if costs.table is not None:
        seconds = costs.table.groupby("variant")["seconds_per_step"].median()
    trained = {name: parse_row(name).base_row().name for name in runs.variants}
    finest = runs.preset.resolution_mm
    edges = runs.history.reindex(columns=["resolution_mm"])["resolution_mm"].fillna(finest)
    of_steps = runs.history["variant"].map(trained).map(seconds) * (finest / edges) ** 3
    return replace(runs, history=runs.history.assign(seconds=of_steps.where(runs.history["steps"] > 0)))


def training_minutes(runs: Runs) -> pd.DataFrame:
    """Validation Dice of each run against the time that its training steps had taken.

    Returns:
        Columns variant, seed, epoch, minutes (of all steps until then; validation is not counted), val_dice (percent).
        A row that uses another's weights has that one's; one whose steps have no time is left out.
    """
    history = runs.history.reindex(columns=["variant", "seed", "epoch", "steps", "seconds", "val_dice"])
    untimed = history.loc[(history["steps"] > 0) & history["seconds"].isna(), "variant"]
    history = history[~history["variant"].isin(untimed)]
    minutes = history["seconds"].fillna(0) * history["steps"] / 60
    minutes = minutes.groupby([history["variant"], history["seed"]]).cumsum()
    found = history[["variant", "seed", "epoch"]].assign(minutes=minutes, val_dice=100 * history["val_dice"])
    return found.astype({"minutes": float, "val_dice": float})


def trained_here(runs: Runs) -> tuple[str, ...]:
    """The rows with a training of their own, as "IO" has none."""
    return tuple(
        name for name in runs.variants if not uses_other_weights(name) and name not in deterministic_rows([name])
    )


def equal_time(runs: Runs, reference: str = REFERENCES[0]) -> pd.DataFrame:
    """The best validation Dice that each run had reached when the reference with the same seed had been trained.

    Returns:
        One line per row with a training of its own, and seed that the reference has too: variant, seed, minutes (of
        the reference's training), epochs (of the row, complete by then), of_epochs (that it was trained for), val_dice
        and reference_val_dice (percent, of the best epoch until then). Empty without the reference.
    """
    times = training_minutes(runs)
    times = times[times["variant"].isin(trained_here(runs))]
    lines = []
    for seed, log in times[times["variant"] == reference].groupby("seed"):
        minutes, best = log["minutes"].max(), log["val_dice"].max()
        for name, own in times[times["seed"] == seed].groupby("variant", sort=False):
            by_then = own[own["minutes"] <= minutes]
            lines.append(
                {
                    "variant": name,
                    "seed": seed,
                    "minutes": minutes,
                    "epochs": by_then["epoch"].max(),
                    "of_epochs": own["epoch"].max(),
                    "val_dice": by_then["val_dice"].max(),
                    "reference_val_dice": best,
                }
            )
    columns = ["variant", "seed", "minutes", "epochs", "of_epochs", "val_dice", "reference_val_dice"]
    return pd.DataFrame(lines, columns=columns)


def differences(runs: Runs, metric: str = "dice") -> dict[str, pd.DataFrame]:
    """Every row against each of :data:`REFERENCES`, by the rules of docs/protocol.md.

    Returns:
        Reference -> what :func:`lumirlib.study.report.statistics.compare_rows` gives, by row. References that have not
        been run are left out.
    """
    found, idle = {}, deterministic_rows(runs.variants)
    for reference in REFERENCES:
        rows = [name for name in runs.variants if name != reference]
        if reference in runs.variants and rows:
            table = compare_rows(runs.values, rows, reference, metric, deterministic=idle)
            found[reference] = table.set_index("row")
    return found


def ablation(runs: Runs) -> pd.DataFrame:
    """The ablation of our options, as numbers.

    Returns:
        One line per row: variant, seeds, pairs; dice (percent), hd95_mm, tre_mm, ndv_percent, each a mean over pairs
        and seeds, with `_sd`, the sample standard deviation over seeds; parameters, training_minutes (mean over seeds;
        of the row whose weights it uses), seconds_per_pair (median over pairs, mean over seeds); for each reference
        dice_minus_<reference>, its _low and _high (points), _p_holm and _verdict;
        equal_time_dice (mean over seeds, see :func:`equal_time`) with equal_time_minus (the reference's own
        subtracted); converged (all seeds).
    """
    compared, at_once, rises = differences(runs), equal_time(runs), late_rises(runs).set_index("variant")
    minutes = training_minutes(runs).groupby(["variant", "seed"])["minutes"].max()
    lines = []
    for name in runs.variants:
        own, facts = runs.values[runs.values["variant"] == name], runs.facts[runs.facts["variant"] == name]
        means = own.pivot_table(index="metric", columns="seed", values="value").reindex(COMPARED)
        line: dict[str, object] = {"variant": name, "seeds": len(facts), "pairs": own["pair"].nunique()}
        for metric in COMPARED:
            values = METRICS[metric].factor * means.loc[metric]
            line |= {metric: values.mean(), f"{metric}_sd": values.std(ddof=1)}
        seconds = own[own["metric"] == "seconds"].groupby("seed")["value"].median()
        spent = minutes[name].mean() if name in minutes else math.nan
        line |= {
            "parameters": facts["parameters"].iloc[0],
            "training_minutes": spent,
            "seconds_per_pair": seconds.mean(),
        }
        for reference, table in compared.items():
            if name in table.index:
                found, key = table.loc[name], f"dice_minus_{reference}"
                line |= {
                    key: 100 * found["difference"],
                    f"{key}_low": 100 * found["low"],
                    f"{key}_high": 100 * found["high"],
                    f"{key}_p_holm": found["p_holm"],
                    f"{key}_verdict": _judged(found),
                }
        reached = at_once[at_once["variant"] == name]
        line |= {
            "equal_time_dice": reached["val_dice"].mean(),
            "equal_time_minus": (reached["val_dice"] - reached["reference_val_dice"]).mean(),
        }
        line["converged"] = bool(rises.loc[[name], "converged"].all()) if name in rises.index else None
        lines.append(line)
    return pd.DataFrame(lines)


def _judged(line: pd.Series) -> str:
    """The verdict of a comparison; says where one seed is why it cannot be told."""
    one_seed = line["verdict"] == "cannot be told" and pd.isna(line["seeds_sd"])
    return f"{line['verdict']}{' (one seed)' if one_seed else ''}"


def _interval(value: float, low: float, high: float) -> str:
    return f"{as_text(value, 2, True)} [{as_text(low, 2, True)}, {as_text(high, 2, True)}]"


def readable_ablation(table: pd.DataFrame) -> pd.DataFrame:
    """:func:`ablation` as text."""
    rows = []
    for _, line in table.iterrows():
        row = {"row": line["variant"], "seeds": str(line["seeds"])}
        for metric in COMPARED:
            heading = METRICS[metric].heading
            row[heading] = as_text(line[metric], METRICS[metric].digits)
            if metric == "dice" and not pd.isna(line["dice_sd"]):
                row[heading] += f" ± {line['dice_sd']:.2f}"
        row |= {
            "parameters": f"{int(line['parameters']):,}",
            "training (min)": as_text(line["training_minutes"], 1),
            "s / pair": as_text(line["seconds_per_pair"], 2),
        }
        for reference in REFERENCES:
            key = f"dice_minus_{reference}"
            known = not pd.isna(line.get(key, math.nan))
            text = (
                "–"
                if not known
                else (f"{_interval(line[key], line[f'{key}_low'], line[f'{key}_high'])}, {line[f'{key}_verdict']}")
            )
            row[f"Dice − {reference}"] = text
        row["val Dice at equal time"] = as_text(line["equal_time_dice"], 2)
        if not pd.isna(line["equal_time_minus"]):
            row["val Dice at equal time"] += f" ({as_text(line['equal_time_minus'], 2, True)})"
        rows.append(row)
    return pd.DataFrame(rows)


def publish_ablation(runs: Runs, costs: Measured, stem: str | Path) -> str:
    """Publish the ablation, with times as :func:`with_measured_step_times` has them; the Markdown."""
    runs = with_measured_step_times(runs, costs)
    table = ablation(runs)
    reference = REFERENCES[0]
    how = "not measured" if costs.table is None else f"all rows in turn, {costs.about['device']}"
    note = (
        f"{int(table['pairs'].min())} pairs. ± is the sample standard deviation over seeds. Differences: points of "
        "Dice, in brackets the 95 % interval over people and seeds, "
        "verdict by docs/protocol.md (test over people, adjusted after Holm over the rows of the column). TRE of "
        "points is the textbook's form, beside the challenge's, which moves landmarks by whole voxels; both rest on "
        "the few people with landmarks. s / pair: median over pairs, as the runs took it, whatever "
        f"else the machine did. Training: time of all steps, at what one costs ({how}), in coarser "
        "stages by their voxels. At equal time: the best "
        f"validation Dice by the time that {reference} with the same seed took in all, in parentheses minus "
        f"{reference}'s own; a slower row is cut off before its learning rate has fallen, and could reach more in that "
        "time with fewer epochs."
    )
    devices = sorted(set(runs.facts["device"]))
    note += f" Devices: {'; '.join(devices)}." + not_converged_note(runs)
    if runs.missing:
        note += f" Not run: {', '.join(runs.missing)}."
    return publish(
        stem, table, readable_ablation(table), f"Ablation of our own options ({runs.title})", note, runs.about()
    )


# targets --------------------------------------------------------------------------------------------------------------
def _judge_interval(low: float, high: float, target: float, at_least: bool) -> str:
    """Where an interval lies: wholly on the target's right side, wholly on its wrong side, or across it."""
    if at_least:
        return MET if low >= target else NOT_MET if high < target else OPEN
    return MET if high <= target else NOT_MET if low > target else OPEN


def targets(runs: Runs, costs: Measured) -> pd.DataFrame:
    """Whether our recipe meets its targets; nothing here knows an outcome.

    - Dice over each row of :data:`EQUALLY_TUNED`: at least :data:`DICE_GAIN` points. Met if the whole 95 % interval
      over people and seeds is, and the row is "better" by docs/protocol.md; not met if the whole interval is below;
      else it cannot be told. Nor can it be told from one seed, that it is met over a reference that had not converged,
      or that a row misses it that had not.
    - Dice of at least :data:`MIN_DICE` percent, NDV of at most :data:`MAX_NDV` percent: means over pairs, met if with
      every seed, not met if with none; one seed decides nothing.
    - Seconds for a pair: at most :data:`MAX_SECONDS`, in every round of :mod:`lumirlib.study.costs`; not met if in
      none. The runs' own timings, made beside other work, decide nothing.

    Args:
        runs: Runs of :data:`RECIPE` and :data:`EQUALLY_TUNED`, as many as there are.
        costs: Measured costs of the same preset.

    Returns:
        One line per target: target, value, low, high (of the interval, the seeds or the rounds), unit, outcome,
        why; of Dice also value_on_unused, the difference on the pairs that chose no epoch, which decides nothing.
    """
    compared, lines, unused, late = differences(runs), [], runs.unused_pairs, not_converged(runs)
    dice = runs.values[(runs.values["metric"] == "dice") & runs.values["pair"].isin(unused)]
    dice = 100 * dice.pivot_table(index="pair", columns="variant", values="value").mean()

    def add(
        target: str,
        unit: str,
        outcome: str,
        why: str = "",
        value=math.nan,
        low=math.nan,
        high=math.nan,
        elsewhere=math.nan,
    ) -> None:
        lines.append(
            {
                "target": target,
                "value": value,
                "low": low,
                "high": high,
                "unit": unit,
                "outcome": outcome,
                "why": why,
                "value_on_unused": elsewhere,
            }
        )

    for reference in EQUALLY_TUNED:
        words = f"Dice at least {DICE_GAIN:.1f} points over {reference}"
        absent = [name for name in (RECIPE, reference) if name not in runs.variants]
        if absent:
            add(words, "points", OPEN, f"not run: {', '.join(absent)}")
            continue
        found = compared[reference].loc[RECIPE]
        value, low, high = (100 * found[name] for name in ("difference", "low", "high"))
        outcome, why = _judge_interval(low, high, DICE_GAIN, True), found["verdict"]
        if pd.isna(found["seeds_sd"]):
            outcome, why = OPEN, "one seed"
        elif (unfinished := {MET: reference, NOT_MET: RECIPE}.get(outcome)) in late:
            outcome, why = OPEN, f"{why}; not converged: {unfinished}"
        elif outcome == MET and found["verdict"] != "better":
            outcome = OPEN
        elsewhere = dice[RECIPE] - dice[reference] if unused else math.nan
        if unused:
            why += f"; {as_text(elsewhere, 2, True)} on the {len(unused)} pairs that chose no epoch"
        add(words, "points", outcome, why, value, low, high, elsewhere)
    for metric, target, at_least in (("dice", MIN_DICE, True), ("ndv_percent", MAX_NDV, False)):
        known = METRICS[metric]
        words = f"{known.title} at {'least' if at_least else 'most'} {target:g} %"
        if RECIPE not in runs.variants:
            add(words, "%", OPEN, f"not run: {RECIPE}")
            continue
        own = runs.values[(runs.values["variant"] == RECIPE) & (runs.values["metric"] == metric)]
        seeds = known.factor * own.groupby("seed")["value"].mean()
        outcome = _judge_interval(seeds.min(), seeds.max(), target, at_least) if len(seeds) > 1 else OPEN
        why = f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed"
        add(words, "%", outcome, why, seeds.mean(), seeds.min(), seeds.max())
    words = f"seconds for a pair at most {MAX_SECONDS:g}"
    if costs.table is None or RECIPE not in set(costs.table["variant"]):
        why = f"not measured: lumirlib measure costs --rows {RECIPE} --preset {runs.preset.name}"
        add(words, "s", OPEN, why)
        return pd.DataFrame(lines)
    seconds = costs.table.loc[costs.table["variant"] == RECIPE, "seconds_per_pair"].dropna()
    outcome = _judge_interval(seconds.min(), seconds.max(), MAX_SECONDS, False)
    why = f"{len(seconds)} round{'s' * (len(seconds) > 1)}, {costs.about['device']}"
    add(words, "s", outcome, why, seconds.median(), seconds.min(), seconds.max())
    return pd.DataFrame(lines)


def publish_targets(found: pd.DataFrame, runs: Runs, stem: str | Path) -> str:
    """Publish :func:`targets`; the Markdown."""
    rows = []
    for _, line in found.iterrows():
        digits, signed = {"points": (2, True), "%": (4, False), "s": (2, False)}[line["unit"]]
        text = "–"
        if not pd.isna(line["value"]):
            text = as_text(line["value"], digits, signed)
            if not pd.isna(line["low"]):
                text += f" [{as_text(line['low'], digits, signed)}, {as_text(line['high'], digits, signed)}]"
            text += f" {line['unit']}"
        rows.append(
            {
                "target": line["target"],
                "measured": text,
                "outcome": f"**{line['outcome']}**",
                "because": line["why"],
            }
        )
    shown = pd.DataFrame(rows)
    note = (
        f"Of {RECIPE}. In brackets: of a difference the 95 % interval over people and seeds, of Dice and NDV the least "
        "and the largest mean of a seed, of seconds those of a round. Met: wholly on the right side; not met: wholly "
        "on the wrong one."
    )
    return publish(
        stem, found, shown, f"Targets ({runs.title})", note, runs.about(), shown.assign(outcome=found["outcome"])
    )


# robustness -----------------------------------------------------------------------------------------------------------
def load_robustness(
    folder: str | Path, rows: Sequence[str], preset: str, cohort: str, seeds: Sequence[int] = ()
) -> Measured:
    """What :mod:`lumirlib.study.robustness` measured of some rows.

    Args:
        folder: Results folder, with `robustness/`.
        rows: Names of the rows.
        preset: Name of the runs' preset.
        cohort: Short name of the cohort.
        seeds: Random seeds to take; none given takes all.

    Returns:
        A table with the columns variant, seed, pair, fixed, moving, alteration and one for each figure; `about` says of
        which runs, and which rows are "missing".

    Raises:
        ValueError: a damaged table, or tables of different states of the cohort or scored on different voxels.
    """
    parts, facts = [], []
    for name in rows:
        for path, about in find_runs(folder, parse_row(name), preset, cohort, {}, "robustness"):
            if not seeds or about["seed"] in seeds:
                table = read_table(path, about, robustness.COLUMNS)
                parts.append(table.assign(variant=parse_row(name).name, seed=about["seed"]))
                facts.append(about)
    measured = {about["method"] for about in facts}
    missing = [parse_row(name).name for name in rows if parse_row(name).name not in measured]
    how = (
        f"**Not measured: {', '.join(missing)}.** `lumirlib measure robustness --rows {' '.join(missing)} "
        f"--preset {preset} --cohort {cohort}` measures trained networks on altered images."
    )
    if not parts:
        return Measured(None, {"missing": missing}, how)
    if len({about["cohort_digest"] for about in facts}) > 1:
        raise ValueError(f"{Path(folder, 'robustness')}: the runs are on different states of the cohort {cohort!r}")
    check_scored_alike(
        Path(folder, "robustness"),
        facts,
        f"lumirlib measure robustness --rows {' '.join(rows)} --preset {preset} --cohort {cohort}",
    )
    about = {
        "preset": preset,
        "cohort": cohort,
        "runs": sorted(about["run"] for about in facts),
        "commits": sorted({about["commit"] for about in facts}),
        "missing": missing,
    }
    return Measured(pd.concat(parts, ignore_index=True), about, how if missing else "")


def robustness_table(measured: pd.DataFrame) -> pd.DataFrame:
    """Dice of every row under every alteration, as numbers; the first row is the reference.

    Returns:
        One line per alteration and row: alteration, variant, seeds, pairs, dice (percent) and dice_sd (over seeds),
        change (points, from the unaltered image), ndv_percent, hd95_mm, and difference, low, high, p_holm and verdict
        of its Dice minus the reference's under the same alteration, adjusted over the rows; NaN for the reference.
    """
    reference, *others = dict.fromkeys(measured["variant"])
    names = [reference, *others]
    lines = []
    for alteration, table in measured.groupby("alteration", sort=False):
        found = pd.DataFrame()
        if others:
            long = table.assign(metric="dice", value=table["dice"])
            found = compare_rows(long, others, reference, "dice", deterministic=deterministic_rows(names)).set_index(
                "row"
            )
        for name in names:
            own = table[table["variant"] == name]
            seeds = 100 * own.groupby("seed")["dice"].mean()
            line = {
                "alteration": alteration,
                "variant": name,
                "seeds": len(seeds),
                "pairs": own["pair"].nunique(),
                "dice": seeds.mean(),
                "dice_sd": seeds.std(ddof=1),
                "ndv_percent": own["ndv_percent"].mean(),
                "hd95_mm": own["hd95_mm"].mean(),
            }
            if name in found.index:
                judged = found.loc[name]
                line |= {
                    "difference": 100 * judged["difference"],
                    "low": 100 * judged["low"],
                    "high": 100 * judged["high"],
                    "p_holm": judged["p_holm"],
                    "verdict": _judged(judged),
                }
            lines.append(line)
    columns = [
        "alteration",
        "variant",
        "seeds",
        "pairs",
        "dice",
        "dice_sd",
        "change",
        "ndv_percent",
        "hd95_mm",
        "difference",
        "low",
        "high",
        "p_holm",
        "verdict",
    ]
    frame = pd.DataFrame(lines, columns=columns)
    whole = frame[frame["alteration"] == robustness.UNALTERED].set_index("variant")["dice"]
    return frame.assign(change=frame["dice"] - frame["variant"].map(whole))


def publish_robustness(measured: Measured, runs: Runs, stem: str | Path) -> str:
    """Publish :func:`robustness_table`; the Markdown, or that nothing has been measured."""
    if measured.table is None:
        return measured.how
    table, reference = robustness_table(measured.table), measured.table["variant"].iloc[0]
    rows = []
    for _, line in table.iterrows():
        known = not pd.isna(line["difference"])
        rows.append(
            {
                "moving image": line["alteration"],
                "row": line["variant"],
                "seeds": str(line["seeds"]),
                "Dice (%)": as_text(line["dice"], 2)
                + ("" if pd.isna(line["dice_sd"]) else f" ± {line['dice_sd']:.2f}"),
                "change (points)": as_text(line["change"], 2, True),
                f"Dice − {reference}": f"{_interval(line['difference'], line['low'], line['high'])}, {line['verdict']}"
                if known
                else "–",
                "NDV (%)": as_text(line["ndv_percent"], 4),
                "HD95 (mm)": as_text(line["hd95_mm"], 2),
            }
        )
    note = (
        f"{int(table['pairs'].min())} pairs; the fixed images are unaltered, labels are those of the unaltered moving "
        "image, in a hole too. ± is the sample standard deviation over seeds; in brackets the "
        "95 % interval over people and seeds, verdict by docs/protocol.md, adjusted after Holm over the rows of an "
        "alteration. Change: from the same row on unaltered images."
    )
    if measured.about["missing"]:
        note += f" Not measured: {', '.join(measured.about['missing'])}."
    return publish(stem, table, pd.DataFrame(rows), f"Altered moving images ({runs.title})", note, measured.about)
