"""The paper's claims, judged from the CSVs of finished runs by stated rules.

    lumirlib report claims --cohort brains --preset real-2mm    # prints them
    lumirlib report claims --write                              # puts them into README.md

A claim is a list of comparisons between rows, each computed by :mod:`lumirlib.study.report.statistics`, or a rule of
its own. It is supported if all of its comparisons hold, not supported if one does not hold, and cannot be told from
the runs otherwise. A comparison does not hold only where the runs exclude what is claimed: that they do not show it is
no contradiction. Nothing here knows a verdict: other CSVs give other ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd

from lumirlib._checks import check_choice
from lumirlib.methods import parse_row
from lumirlib.methods.variants import Variant
from lumirlib.study import results
from lumirlib.study.paper import (
    BEFORE,
    CHALLENGE,
    METRICS,
    NEXT_GEN_NN,
    paper_method,
    paper_table,
    rows_of_table,
)
from lumirlib.study.report import publish, runs, statistics, tables
from lumirlib.study.report.runs import Runs
from lumirlib.study.results import Measured, to_markdown

SUPPORTED, NOT_SUPPORTED, OPEN = "supported", "not supported", "cannot be told"


HOLDS, FAILS = "holds", "does not hold"
#: The backbone trained with MSE, as it is named in comparisons.
WITH_MSE = "backbone, MSE"
#: Values of lambda1 that MSE is tried with, as docs/protocol.md says; those without a run are passed over.
MSE_SMOOTHNESS = (1.0, 0.1, 0.01, 0.001, 0.0001)
#: NDV (%) of the reference below which the voxels are too coarse, or the training too short, to show folds.
FOLDS = METRICS["ndv_percent"].margin
#: Share of a run's whole gain in Dice that counts as having arrived, and the share of its epochs that is early.
ARRIVED, EARLY = 0.9, 0.25
#: Steps of one of the paper's 200 epochs: one for each of LUMIR's training scans.
PAPER_EPOCH_STEPS = 3374
#: Range of Dice over pairs (points) that is wide, and one that is not.
WIDE, NARROW = 10.0, 5.0

COMMAND = "lumirlib report claims"
MARKERS = (f"<!-- {COMMAND} --write -->", f"<!-- end of {COMMAND} -->")

_SWAPPED = {"better": "worse", "worse": "better"}


@dataclass(frozen=True)
class Evidence:
    """What claims are judged from.

    Attributes:
        runs: Runs of the rows of Tables 1 and 2, as many as are there.
        mse: Runs of the backbone trained with MSE, by lambda1.
        folding: Folding as :mod:`lumirlib.study.folding` measured it.
        draws: Draws of the bootstrap of each comparison.
    """

    runs: Runs
    mse: Mapping[float, Runs]
    folding: Measured
    draws: int = statistics.DRAWS

    @cached_property
    def mse_smoothness(self) -> float | None:
        """The lambda1 whose seed 0 reached the highest validation Dice; None without such runs."""
        found = {
            weight: float(runs.facts.loc[runs.facts["seed"] == 0, "val_dice"].max())
            for weight, runs in self.mse.items()
        }
        found = {weight: dice for weight, dice in found.items() if math.isfinite(dice)}
        return max(found, key=found.__getitem__) if found else None

    @cached_property
    def mse_at_edge(self) -> bool:
        """Whether MSE's best lambda1 is the largest or the smallest tried, so that another might serve it better."""
        return self.mse_smoothness in (None, min(self.mse, default=None), max(self.mse, default=None))

    @cached_property
    def not_converged(self) -> tuple[str, ...]:
        """The trained rows of which a seed had not converged by docs/protocol.md, or has no log to tell."""
        with_mse = () if self.mse_smoothness is None else runs.not_converged(self.mse[self.mse_smoothness])
        return (*runs.not_converged(self.runs), *((WITH_MSE,) if "backbone" in with_mse else ()))

    def width_told_apart(self, first: str, second: str) -> bool:
        """Whether two rows of the paper's network have its ratio of widths, in the encoder and in the head.

        A preset that divides the channels of the encoder and not those of the head confounds what a wider row gains
        with what its wider head gains.
        """
        rows = [parse_row(name) for name in (first, second) if name != WITH_MSE]
        if not all(isinstance(row, Variant) for row in rows) or len({row.head_channels for row in rows}) < 2:
            return True
        here = [row.at_preset(self.runs.preset) for row in rows]
        return all(
            (row.start_channels == full.start_channels) == (row.head_channels == full.head_channels)
            for row, full in zip(here, rows, strict=True)
        )

    @cached_property
    def values(self) -> pd.DataFrame:
        """The long table of all rows, MSE's best among them."""
        parts = [self.runs.values]
        if self.mse_smoothness is not None:
            values = self.mse[self.mse_smoothness].values
            parts.append(values[values["variant"] == "backbone"].assign(variant=WITH_MSE))
        return pd.concat(parts, ignore_index=True)

    @cached_property
    def rows(self) -> tuple[str, ...]:
        """The rows that have been run."""
        return tuple(name for name in self.values["variant"].unique() if name != BEFORE)

    @cached_property
    def families(self) -> dict[str, tuple[str, ...]]:
        """Reference -> the rows that are compared with it, over which p-values are adjusted."""
        schemes = [name for name in ["BF-post", *rows_of_table(2)] if name != "backbone"]
        return {
            "backbone": tuple(dict.fromkeys(schemes)),
            "LC-1": ("LC-2",),
            NEXT_GEN_NN: tuple(name for name in rows_of_table(1) if name != NEXT_GEN_NN),
            WITH_MSE: ("backbone",),
        }

    @cached_property
    def _compared(self) -> dict[tuple[str, str], pd.DataFrame]:
        return {}

    def compare(self, first: str, second: str, metric: str) -> pd.Series:
        """The line of :func:`lumirlib.study.report.statistics.compare_rows` for first - second.

        Raises:
            ValueError: a row that has not been run, or a figure that cannot be compared.
        """
        missing = [name for name in (first, second) if name not in self.rows]
        if missing:
            raise ValueError(f"not run: {', '.join(missing)}")
        direct = first in self.families.get(second, ())
        row, reference = (first, second) if direct else (second, first)
        if (reference, metric) not in self._compared:
            family = [name for name in self.families[reference] if name in self.rows]
            named = [name for name in (*family, reference) if name != WITH_MSE]
            self._compared[reference, metric] = statistics.compare_rows(
                self.values, family, reference, metric, self.draws, deterministic=runs.deterministic_rows(named)
            ).set_index("row", drop=False)
        line = self._compared[reference, metric].loc[row].copy()
        if not direct:
            line["row"], line["reference"] = first, second
            line["difference"], line["effect"] = -line["difference"], -line["effect"]
            line["low"], line["high"] = -line["high"], -line["low"]
            line["low_error"], line["high_error"] = line["high_error"], line["low_error"]
            line["verdict"] = _SWAPPED.get(line["verdict"], line["verdict"])
        return line

    def paper(self, first: str, second: str, metric: str) -> float:
        """The paper's own difference of two rows, in the paper's units; NaN where it has none."""
        figures = []
        for name in (first, second):
            found = paper_table()
            found = found[found["method"].isin([paper_method(name) if name != WITH_MSE else "", name])]
            figures.append(float(found[metric].dropna().iloc[0]) if found[metric].notna().any() else math.nan)
        return figures[0] - figures[1]

    def mean(self, row: str, metric: str) -> float:
        """Mean of a row over pairs and seeds, in the metric's own unit; NaN for a row that has not been run."""
        own = self.values[(self.values["variant"] == row) & (self.values["metric"] == metric)]
        return float(own["value"].mean())


def load_study(folder: str | Path, cohort: str = "brains", preset: str = "real-2mm") -> Evidence:
    """The study of a results folder.

    Args:
        folder: Results folder with `metrics/`, `logs/` and, if measured, `folding/`.
        cohort: Short name of the cohort.
        preset: Name of the preset of all runs.

    Raises:
        FileNotFoundError: no run of any row.
    """
    rows = list(dict.fromkeys([*rows_of_table(2), "BF-post", *rows_of_table(1)]))
    mse = {}
    for weight in MSE_SMOOTHNESS:
        try:
            options = {"similarity": "mse", "smoothness_weight": weight}
            mse[weight] = runs.load_runs(folder, ["backbone"], preset, cohort, options)
        except FileNotFoundError:
            continue
    folding = results.read_measured(folder, "folding", f"{cohort}_{preset}")
    return Evidence(runs.load_runs(folder, rows, preset, cohort), mse, folding)


@dataclass(frozen=True)
class Check:
    """One comparison of a claim: what it says about `row` minus `reference` on a metric.

    Attributes:
        row: Name of the row that the claim is about.
        reference: Name of the row that it is compared with.
        metric: Metric of the challenge.
        expect: Outcome that the claim expects: "better"; "kept", not worse by more than the margin within which rows
            match; or "alike", different by no more than that.
        at_least: Size of the improvement that is claimed, in the paper's units; 0 for any, and then the paper's own
            improvement is what the runs must exclude for a contradiction.
    """

    row: str
    reference: str
    metric: str
    expect: str = "better"
    at_least: float = 0.0

    def __post_init__(self) -> None:
        check_choice(self.metric, CHALLENGE, "metric")
        check_choice(self.expect, ("better", "kept", "alike"), "expect")

    def judge(self, study: Evidence, comparisons: int = 1) -> dict[str, object]:
        """The comparison with its outcome: "holds", "does not hold" or "cannot be told", and why.

        Differences and intervals are in the paper's units.

        Args:
            study: Evidence that the comparison is judged from.
            comparisons: Number of the claim's comparisons, each of which could contradict it by chance.
        """
        factor = METRICS[self.metric].factor
        found: dict[str, object] = {
            "row": self.row,
            "reference": self.reference,
            "metric": self.metric,
            "expect": self.expect,
            "paper": study.paper(self.row, self.reference, self.metric),
        }
        try:
            line = study.compare(self.row, self.reference, self.metric)
        except ValueError as error:
            return {**found, "outcome": OPEN, "why": str(error)}
        in_units = ("difference", "low", "high", "low_error", "high_error", "error", "seeds_sd")
        found |= {name: factor * line[name] for name in in_units}
        found |= {name: line[name] for name in ("freedom", "p_holm", "effect", "pairs", "people", "seeds", "verdict")}
        outcomes = [self._outcome(found, low, high, comparisons) for low, high in statistics.within_error(found)]
        outcome, why = outcomes[0]
        if reasons := self._reasons(line, study, outcome):
            outcome, why = OPEN, "; ".join(reasons)
        elif len({kind for kind, _ in outcomes}) > 1:
            why = f"{why}; " * bool(why) + "within the Monte-Carlo error of a margin"
        return {**found, "outcome": outcome, "why": why}

    def _reasons(self, line: pd.Series, study: Evidence, outcome: str) -> list[str]:
        """Why the figures, whatever they say, decide nothing here."""
        found = []
        if line["people"] < statistics.MIN_PEOPLE:
            of = "landmarks on " * (self.metric == "tre_mm")
            found.append(f"{of}{line['people']} people only")
        if self.metric == "ndv_percent" and study.mean(self.reference, "ndv_percent") < FOLDS:
            found.append(f"{self.reference} folds in less than {FOLDS} % of the brain here")
        if math.isnan(line["seeds_sd"]):
            found.append("one seed")
        if WITH_MSE in (self.row, self.reference) and study.mse_at_edge:
            found.append(f"MSE serves best at λ1 = {study.mse_smoothness:g}, at the edge of those tried")
        if not study.width_told_apart(self.row, self.reference):
            found.append("the preset narrows the encoder and not the head, so that width is not told apart from K")
        # a row that may still rise can yet be better; a reference that may still rise can yet be as good
        one_sided = {HOLDS: [self.reference], FAILS: [self.row]} if self.expect != "alike" else {}
        names = one_sided.get(outcome, [self.reference, self.row])
        if late := [name for name in names if name in study.not_converged]:
            found.append(f"not converged: {', '.join(late)}")
        return found

    def _outcome(self, found: Mapping[str, object], low: float, high: float, comparisons: int) -> tuple[str, str]:
        """What the difference says by itself, with the ends of its interval in the paper's units."""
        metric = METRICS[self.metric]
        sign, margin = (1 if metric.higher_is_better else -1), metric.shown_margin
        tested = statistics.PersonTest(sign * found["difference"], found["error"], found["freedom"])
        # gains are positive whichever way the metric goes
        low, high = (low, high) if sign > 0 else (-high, -low)

        def excluded(size: float) -> bool:
            """Whether a gain of that size or more is."""
            return high < size and tested.p_below(size) * comparisons < statistics.ALPHA

        if self.expect == "alike":
            if -margin <= low and high <= margin:
                return HOLDS, ""
            opposite = statistics.PersonTest(-tested.difference, tested.error, tested.freedom)
            larger = low > margin and opposite.p_below(-margin) * comparisons < statistics.ALPHA
            return (
                (FAILS, str(found["verdict"])) if larger or excluded(-margin) else (OPEN, "interval leaves the margin")
            )
        if self.expect == "kept":
            if low >= -margin:
                return HOLDS, ""
            return (FAILS, str(found["verdict"])) if excluded(-margin) else (OPEN, "interval leaves the margin")
        papers = sign * found["paper"]
        size = self.at_least or (papers if papers > 0 else 0.0)  # the paper's own figure may be NaN, or against it
        if found["verdict"] == "better" and low >= self.at_least:
            return HOLDS, ""
        if excluded(size):
            return FAILS, f"excludes a gain of {size:.{metric.short_digits}f}"
        if self.at_least and low < self.at_least <= high:
            return OPEN, f"interval reaches from below to above {self.at_least:g}"
        return OPEN, f"does not exclude the claimed {size:.{metric.short_digits}f}" if size else ""


@dataclass(frozen=True)
class Verdict:
    """A claim with its verdict.

    Attributes:
        key: Short name.
        claim: The paper's words in brief.
        rule: Rule that says when the claim is supported.
        verdict: Verdict: "supported", "not supported" or "cannot be told".
        paper: Figures of the paper's own tables, in words.
        ours: Our figures, in words.
        checks: The comparisons, one line each; empty for a rule of its own.
        values: Values that a figure of it shows, where they are not the comparisons.
    """

    key: str
    claim: str
    rule: str
    verdict: str
    paper: str
    ours: str
    rests_on: str
    checks: pd.DataFrame = field(default_factory=pd.DataFrame)
    values: pd.DataFrame = field(default_factory=pd.DataFrame)


def _span(counts: Iterable[int]) -> str:
    fewest, most = min(counts), max(counts)
    return f"{fewest}" if fewest == most else f"{fewest} to {most}"


def _seeds(counts: Iterable[int]) -> str:
    span = _span(counts)
    return f"{span} seed{'' if span == '1' else 's'}"


def _basis(
    study: Evidence, rows: Sequence[str], people: Sequence[int], pairs: Sequence[int], seeds: Sequence[int]
) -> str:
    """People, pairs, seeds, voxels, and which rows had not converged."""
    late = [name for name in dict.fromkeys(rows) if name in study.not_converged]
    converged = f"not converged: {', '.join(late)}" if late else "all converged"
    return f"{_span(people)} people, {_span(pairs)} pairs, {_seeds(seeds)}, {study.runs.voxels}; {converged}"


def _basis_of_checks(study: Evidence, checks: pd.DataFrame) -> str:
    known = checks.dropna(subset="people") if "people" in checks else checks[:0]
    if known.empty:
        return "no runs"
    counts = [known[name].astype(int).tolist() for name in ("people", "pairs", "seeds")]
    return _basis(study, [*known["row"], *known["reference"]], *counts)


def _signed(value: float, metric: str) -> str:
    return f"{value:+.{METRICS[metric].short_digits}f}".replace("-", "−")


def _in_words(check: Mapping[str, object]) -> str:
    metric = str(check["metric"])
    start = f"{check['row']} against {check['reference']}, {METRICS[metric].title}:"
    if pd.isna(check.get("difference", math.nan)):
        return f"{start} {check['why']}"
    value, low, high = (_signed(check[name], metric) for name in ("difference", "low", "high"))
    figures = f"{value} {METRICS[metric].unit_of_difference} [{low}, {high}]"
    why = f" ({check['why']})" if check["why"] else ""
    return f"{start} {figures}, {check['outcome']}{why}"


def _paper_in_words(checks: pd.DataFrame) -> str:
    words = []
    for _, check in checks.iterrows():
        if math.isnan(check["paper"]):
            continue
        metric = METRICS[check["metric"]]
        against = check["expect"] == "better" and (
            check["paper"] < 0 if metric.higher_is_better else check["paper"] > 0
        )
        words.append(
            f"{check['row']} {metric.title} {_signed(check['paper'], metric.name)}{' (against the claim)' * against}"
        )
    return "; ".join(words) or "no figures"


def _all_of(outcomes: Sequence[str]) -> str:
    if FAILS in outcomes:
        return NOT_SUPPORTED
    return SUPPORTED if all(outcome == HOLDS for outcome in outcomes) else OPEN


@dataclass(frozen=True)
class Claim:
    """A claim that comparisons decide.

    Attributes:
        key: Short name.
        words: The paper's words in brief.
        checks: Comparisons, all of which must hold.
        note: Words added to the rule.
    """

    key: str
    words: str
    checks: tuple[Check, ...]
    note: str = ""

    def judge(self, study: Evidence) -> Verdict:
        """The verdict with the figures behind it."""
        judged = pd.DataFrame([check.judge(study, len(self.checks)) for check in self.checks])
        asked = {
            "better": "is better",
            "kept": "is not worse by more than the margin",
            "alike": "differs by no more than the margin",
        }
        parts = []
        for check in self.checks:
            size = f", by an interval that lies above {check.at_least:g}" if check.at_least else ""
            than = f"{'from' if check.expect == 'alike' else 'than'} {check.reference}"
            parts.append(f"{check.row} {asked[check.expect]} {than} in {METRICS[check.metric].title}{size}")
        return Verdict(
            self.key,
            self.words,
            f"Supported if {'; '.join(parts)}. Not supported if the runs exclude one of these. {self.note}".strip(),
            _all_of(list(judged["outcome"])),
            _paper_in_words(judged),
            "; ".join(_in_words(check) for check in judged.to_dict("records")),
            _basis_of_checks(study, judged),
            judged,
        )


def _checks(row: str, reference: str, *metrics: str, expect: str = "better") -> tuple[Check, ...]:
    return tuple(Check(row, reference, metric, expect) for metric in metrics)


def convergence(study: Evidence) -> Verdict:
    """Does Dice rise within few epochs and stay?"""
    words = "training converges rapidly, within a minimal number of initial epochs"
    rule = (
        f"Of each run of Table 2's rows: the first epoch with {100 * ARRIVED:.0f} % of the whole gain in validation "
        f"Dice, as a share of its epochs. Supported if the median is at most {100 * EARLY:.0f} %, not supported above; "
        f"not to be told if most runs still rise by more than {runs.CONVERGED} points over their last quarter, or if "
        f"they end within what is the first epoch of the paper, {PAPER_EPOCH_STEPS:,} steps."
    )
    names = [name for name in rows_of_table(2) if name in study.rows]
    history = study.runs.history[study.runs.history["variant"].isin(names)]
    if history.empty:
        return Verdict("convergence", words, rule, OPEN, "Fig. 2, 200 epochs", "no logs", "no runs")
    shares = []
    for _, log in history.groupby(["variant", "seed"]):
        dice = log.set_index("epoch")["val_dice"]
        gain = dice - dice[0]
        last = int(dice.index.max())
        shares.append(float((gain >= ARRIVED * gain[last]).idxmax()) / last if gain[last] > 0 else math.inf)
    rises = runs.late_rises(study.runs)
    rises = rises[rises["variant"].isin(names)]
    rising = int((~rises["converged"].astype(bool)).sum())
    median = float(pd.Series(shares).median())
    steps = int(history.groupby(["variant", "seed"])["steps"].sum().median())
    verdict = SUPPORTED if median <= EARLY else NOT_SUPPORTED
    if rising > len(rises) / 2 or steps < PAPER_EPOCH_STEPS:
        verdict = OPEN
    ours = (
        f"{100 * ARRIVED:.0f} % of the gain after {100 * median:.0f} % of the epochs (median of {len(shares)} runs); "
        f"{rising} of them still rise by more than {runs.CONVERGED} points over the last quarter; all of it is "
        f"{steps:,} steps, {steps / PAPER_EPOCH_STEPS:.1f} epochs of the paper"
    )
    seeds = history.groupby("variant")["seed"].nunique()
    pairs = study.runs.preset.validation_pairs
    rests_on = (
        f"{len(names)} rows, {_seeds(seeds)}, Dice of {'all' if pairs is None else pairs} validation pairs, "
        f"{study.runs.voxels}"
    )
    return Verdict("convergence", words, rule, verdict, "Fig. 2, 200 epochs", ours, rests_on, values=history)


def spread_between_pairs(study: Evidence) -> Verdict:
    """Does Dice differ widely between pairs?"""
    words = "pairs differ widely in difficulty: Dice from 18 % to 99 %"
    rule = (
        f"Supported if {NEXT_GEN_NN}'s Dice (means over labels and seeds) of the easiest and the hardest pair differ "
        f"by {WIDE:g} points or more, not supported below {NARROW:g}. A mean over labels cannot reach 99 % where its "
        "standard deviation over pairs is 3 points: the paper's range must be over single labels."
    )
    own = study.values[(study.values["variant"] == NEXT_GEN_NN) & (study.values["metric"] == "dice")]
    published = paper_table(2).set_index("method")["dice_std"][paper_method(NEXT_GEN_NN)]
    paper = f"18 to 99 %; ± {published:.2f} over pairs in Table 2"
    if own.empty:
        return Verdict("pairs", words, rule, OPEN, paper, f"not run: {NEXT_GEN_NN}", "no runs")
    dice = 100 * own.groupby("pair")["value"].mean()
    width = float(dice.max() - dice.min())
    verdict = SUPPORTED if width >= WIDE else NOT_SUPPORTED if width < NARROW else OPEN
    ours = f"{dice.min():.1f} to {dice.max():.1f} % over {len(dice)} pairs, ± {dice.std(ddof=0):.2f}"
    people = len({*own["fixed"], *own["moving"]})
    rests_on = _basis(study, [NEXT_GEN_NN], [people], [len(dice)], [own["seed"].nunique()])
    return Verdict("pairs", words, rule, verdict, paper, ours, rests_on, values=dice.rename("dice").reset_index())


def at_equal_displacement(folding: pd.DataFrame) -> pd.DataFrame:
    """NDV of both cascades where their fields are equally long.

    The same velocities, amplified equally, make shorter fields if they are composed. So each pair's additive NDV is
    interpolated, on logarithmic scales, between the amplifications that enclose the compositional field's length; half
    the shortest additive field counts as free of folds.

    Args:
        folding: Table as :mod:`lumirlib.study.folding` writes it.

    Returns:
        Columns variant, seed, pair, factor (of the compositional field), displacement_mm, additive and compositional
        (NDV in percent).
    """
    keys = ["variant", "seed", "pair"]
    none = 1e-9  # percent, for the logarithm of nothing
    ordered = folding.sort_values([*keys, "factor"], ignore_index=True)
    length, ndv = ordered["displacement_mm"].to_numpy(), ordered["ndv_percent"].to_numpy()
    additive, matched = ordered["cascade"].to_numpy() == "additive", np.full(len(ordered), np.nan)
    for rows in ordered.groupby(keys).indices.values():
        one, other = rows[additive[rows]], rows[~additive[rows]]
        lengths = np.log([length[one[0]] / 2, *length[one]])
        folded = np.log([none, *np.maximum(ndv[one], none)])
        matched[other] = np.exp(np.interp(np.log(length[other]), lengths, folded))
    found = ordered.assign(additive=matched, compositional=ndv)[~additive]
    return found[["factor", "displacement_mm", "additive", "compositional", *keys]].reset_index(drop=True)


def smoother_cascade(study: Evidence) -> Verdict:
    """Does the compositional cascade fold less than the additive one, all else and the length of the field equal?"""
    words = "a better cascade (LC-2's) makes smoother fields"
    rule = (
        "The velocities of trained networks, amplified, are joined both ways (DEVIATIONS.md, E7). Each pair's NDV is "
        "compared where both fields are equally long, by the test over people and seeds, adjusted after Holm. "
        f"Supported if the compositional cascade folds less wherever the additive one folds in {FOLDS} % of the brain, "
        "not supported if it folds more somewhere; else not to be told. These are not the plain fields of any network: "
        "at 4 mm those do not fold, and at 2 mm they need no amplification."
    )
    paper = f"LC-2 against LC-1, NDV {_signed(study.paper('LC-2', 'LC-1', 'ndv_percent'), 'ndv_percent')}"
    if study.folding.table is None:
        return Verdict("cascade", words, rule, OPEN, paper, study.folding.how, "no runs")
    of_pair = study.values.drop_duplicates("pair").set_index("pair")[["fixed", "moving"]]
    matched = at_equal_displacement(study.folding.table).join(of_pair, on="pair")
    lines = []
    for (variant, factor), table in matched.groupby(["variant", "factor"]):
        if table["additive"].mean() < FOLDS:
            continue
        seeds = table.assign(difference=table["compositional"] - table["additive"]).pivot_table(
            "difference", ["fixed", "moving"], "seed"
        )
        tested = statistics.mean_over_people(seeds.mean(axis=1), [(seeds.mean().var(ddof=1), len(seeds.columns))])
        means = table[["additive", "compositional", "displacement_mm"]].mean().to_dict()
        low, high = tested.interval()
        lines.append({"variant": variant, "factor": factor, **means, "low": low, "high": high, "p": tested.p_value()})
    rests_on = _basis(
        study,
        sorted(set(matched["variant"])),
        [len({*matched["fixed"], *matched["moving"]})],
        [matched["pair"].nunique()],
        [matched["seed"].nunique()],
    )
    if not lines:
        ours = f"nothing folds in {FOLDS} % of the brain"
        return Verdict("cascade", words, rule, OPEN, paper, ours, rests_on, values=matched)
    compared = pd.DataFrame(lines)
    told = statistics.holm(compared["p"].to_numpy()) < statistics.ALPHA
    less = told & (compared["high"] < 0)
    verdict = SUPPORTED if less.all() else NOT_SUPPORTED if (told & (compared["low"] > 0)).any() else OPEN
    widest = compared.groupby("variant", sort=False).last()
    ends = widest[["low", "high"]].map(partial(publish.as_text, digits=2, signed=True))
    widest["interval"] = (" [" + ends["low"] + ", " + ends["high"] + "]").where(widest["low"].notna(), "")  # of seeds
    ours = f"less folding in {less.sum()} of {len(less)} comparisons at equal length; " + "; ".join(
        f"{variant}'s velocities ×{line['factor']:g}, fields of {line['displacement_mm']:.1f} mm, NDV: "
        f"{line['compositional']:.2f} against {line['additive']:.2f} %{line['interval']}"
        for variant, line in widest.iterrows()
    )
    return Verdict("cascade", words, rule, verdict, paper, ours, rests_on, values=compared)


def beyond_validation(study: Evidence) -> Verdict:
    """Does what validation pairs gain carry over to the leaderboard?"""
    return Verdict(
        "leaderboard",
        "LC's larger gains on the validation people do not carry over to the leaderboard",
        "Needs labels of the challenge's own validation pairs, which only its server has.",
        OPEN,
        "; ".join(
            f"{name}: Val Dice {study.paper(name, 'backbone', 'val_dice'):+.2f}, leaderboard "
            f"{study.paper(name, 'backbone', 'dice'):+.2f}"
            for name in ("LC-1", "LC-2")
        ),
        "not testable without the challenge's server",
        "no runs",
    )


#: The claims, in the order of the paper's text.
CLAIMS: tuple[Claim | Callable[[Evidence], Verdict], ...] = (
    Claim(
        "transmorph",
        "next-gen-nn beats TransMorph by 1.4 Dice points",
        (Check(NEXT_GEN_NN, "TransMorph", "dice", at_least=1.4),),
    ),
    Claim(
        "transmorph-hd95-ndv",
        "next-gen-nn beats TransMorph in HD95 and NDV",
        _checks(NEXT_GEN_NN, "TransMorph", "hd95_mm", "ndv_percent"),
    ),
    Claim(
        "table1",
        "next-gen-nn has the best Dice of Table 1",
        tuple(Check(NEXT_GEN_NN, name, "dice") for name in rows_of_table(1) if name != NEXT_GEN_NN),
    ),
    Claim(
        "ncc",
        "NCC beats MSE significantly",
        _checks("backbone", WITH_MSE, "dice"),
        "MSE has the λ1 that serves it best on the validation pairs, of those tried; at their edge nothing is told.",
    ),
    Claim(
        "bf",
        "BF improves Dice and HD95 and makes fields smoother",
        _checks("BF", "backbone", "dice", "hd95_mm", "ndv_percent"),
    ),
    Claim(
        "bf-post",
        "BF put behind the trained backbone improves Dice and HD95 and makes fields smoother",
        _checks("BF-post", "backbone", "dice", "hd95_mm", "ndv_percent"),
    ),
    Claim("lk", "LK improves TRE and NDV", _checks("LK", "backbone", "tre_mm", "ndv_percent")),
    Claim(
        "channels",
        "more channels improve TRE and NDV",
        _checks("LC-1", "backbone", "tre_mm", "ndv_percent"),
        "LC-1 has the backbone's cascade, so that only channels differ.",
    ),
    Claim("channels-dice", "larger channels generally give higher accuracy", _checks("LC-1", "backbone", "dice")),
    Claim("ca-bf", "CA with BF improves Dice", _checks("CA+BF", "backbone", "dice")),
    Claim(
        "lc",
        "LC-2's cascade brings NDV from 0.19 % to 0 without losing Dice",
        (*_checks("LC-2", "LC-1", "ndv_percent"), *_checks("LC-2", "LC-1", "dice", expect="kept")),
    ),
    smoother_cascade,
    Claim(
        "comparable",
        "other schemes merely match the backbone",
        tuple(Check(name, "backbone", "dice", "alike") for name in rows_of_table(2) if name != "backbone"),
    ),
    beyond_validation,
    convergence,
    spread_between_pairs,
)


def judge(study: Evidence) -> list[Verdict]:
    """All claims of :data:`CLAIMS`, judged."""
    return [claim.judge(study) if isinstance(claim, Claim) else claim(study) for claim in CLAIMS]


def numbers(findings: Sequence[Verdict]) -> pd.DataFrame:
    """Findings as a tidy table, one line per comparison, or per claim that has none."""
    lines = []
    for finding in findings:
        about = {"claim": finding.key, "words": finding.claim, "verdict": finding.verdict, "ours": finding.ours}
        about["rests_on"] = finding.rests_on
        lines += [{**about, **check} for check in finding.checks.to_dict("records")] or [about]
    return pd.DataFrame(lines)


def readable(findings: Sequence[Verdict]) -> pd.DataFrame:
    """Findings as text: claim, verdict, the paper's figures, ours."""
    return pd.DataFrame(
        {
            "claim": finding.claim,
            "verdict": f"**{finding.verdict}**" if finding.verdict != OPEN else finding.verdict,
            "paper": finding.paper,
            "ours [95 % interval over people and seeds]": finding.ours,
            "rests on": finding.rests_on,
        }
        for finding in findings
    )


def detectable(study: Evidence) -> pd.DataFrame:
    """The smallest effects of a scheme on the backbone that the runs could have told, beside the paper's.

    Returns:
        One line per metric of enough people, and of NDV where the backbone folds: metric, smallest (the effect that
        the test over people finds in four of five such studies after Holm, and no less than twice the spread over
        seeds; the 80th percentile over the schemes with several seeds, as errors differ by chance), paper_low and
        paper_high (the range of the paper's schemes); in the paper's units. Empty without the backbone.
    """
    rows = [row for row in study.families["backbone"] if row in study.rows] if "backbone" in study.rows else []
    lines = []
    for metric in (METRICS[name] for name in CHALLENGE if rows):
        if metric.name == "ndv_percent" and study.mean("backbone", metric.name) < FOLDS:
            continue
        compared = pd.DataFrame([study.compare(row, "backbone", metric.name) for row in rows])
        compared = compared.dropna(subset="seeds_sd")
        if compared.empty or compared["people"].min() < statistics.MIN_PEOPLE:
            continue
        smallest = [
            max(statistics.PersonTest(0.0, line.error, line.freedom).detectable(len(rows)), 2 * line.seeds_sd)
            for line in compared.itertuples()
        ]
        papers = pd.Series([study.paper(row, "backbone", metric.name) for row in rows])
        lines.append(
            {
                "metric": metric.name,
                "smallest": metric.shown(float(np.quantile(smallest, 0.8))),
                "paper_low": papers.min(),
                "paper_high": papers.max(),
            }
        )
    return pd.DataFrame(lines, columns=["metric", "smallest", "paper_low", "paper_high"])


def what_could_be_told(study: Evidence) -> str:
    """:func:`detectable` as a paragraph; says so where nothing can be told."""
    found = detectable(study)
    if found.empty:
        return "Too few people, or one seed a row: how small an effect of a scheme these runs could tell is not known."
    parts = []
    for line in found.itertuples():
        metric = METRICS[line.metric]
        low, high = _signed(line.paper_low, metric.name), _signed(line.paper_high, metric.name)
        parts.append(
            f"{line.smallest:.{metric.short_digits}f} {metric.unit_of_difference} of {metric.title} (the paper's "
            f"schemes: {low} to {high})"
        )
    people = len({*study.values["fixed"], *study.values["moving"]})
    seeds = study.runs.facts[study.runs.facts["variant"].isin(study.families["backbone"])].groupby("variant")["seed"]
    several = [count for count in seeds.nunique() if count > 1]
    return (
        f"With {people} people and {_seeds(several)}, the smallest effect of a scheme that four of five such studies "
        f"would find is {', '.join(parts)}. Smaller claims can be neither shown nor excluded here."
    )


def publish_claims(study: Evidence, findings: Sequence[Verdict], stem: str | Path) -> str:
    """Publish the verdicts; the Markdown."""
    note = (
        f"Rules: docs/protocol.md and lumirlib/study/report/claims.py. {study.runs.spread_note}. Differences are row "
        "minus reference; p-values are adjusted after Holm, intervals are drawn over people and seeds."
    )
    shown = readable(findings)
    plain = shown.assign(verdict=[finding.verdict for finding in findings])
    return publish.publish(
        stem,
        numbers(findings),
        shown,
        f"The paper's claims ({study.runs.title})",
        note,
        study.runs.about(),
        plain,
        what_could_be_told(study),
    )


def readable_tables(study: Evidence) -> str:
    """Both tables on one screen, as Markdown: the paper's figures and ours, ± over seeds where there are several."""
    schemes = tuple(name for name in study.runs.variants if isinstance(parse_row(name), Variant))
    others = tuple(name for name in study.runs.variants if name not in schemes)
    table = tables.table2(replace(study.runs, variants=schemes))
    if others:
        baselines = tables.table1(replace(study.runs, variants=others))
        table = pd.concat([table, baselines[baselines["variant"] != BEFORE]])
    seeds = study.runs.facts.groupby("variant")["seed"].nunique()
    return (
        f"**{study.runs.title}**; {_seeds(seeds)} a row, ± over seeds; the paper's figures are of LUMIR\n\n"
        f"{to_markdown(publish.brief_table(table))}"
    )


def readable_verdicts(findings: Sequence[Verdict]) -> str:
    """Which claims are supported, which are not, and of which nothing can be told, as Markdown."""
    lines = []
    for verdict in (SUPPORTED, NOT_SUPPORTED, OPEN):
        found = [finding.claim for finding in findings if finding.verdict == verdict]
        lines.append(f"- **{verdict.capitalize()}** ({len(found)}): {'; '.join(found) or 'none'}.")
    return "\n".join(lines)


def summary(study: Evidence, findings: Sequence[Verdict]) -> str:
    """Both tables and the verdicts in one screen, as Markdown."""
    parts = (
        readable_tables(study),
        what_could_be_told(study),
        "The paper's claims, judged by these runs:",
        readable_verdicts(findings),
    )
    return "\n\n".join(parts)
