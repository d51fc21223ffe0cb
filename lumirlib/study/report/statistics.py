"""What counts as a difference between two rows, by the rules of docs/protocol.md.

Pairs share people, so tests and intervals are over people: ordered pairs of ten people are not 90 observations.

Ranks of several methods on the same pairs: by significance, and by the challenge's snapshot score.

    lumirlib report ranks results/metrics/LC-2_*.csv results/metrics/TransMorph_*.csv

The published rows of other teams are means only: they can take part in the snapshot score, not in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from lumirlib._checks import check_choice
from lumirlib.evaluation import summarize
from lumirlib.study.paper import CHALLENGE, METRICS, published
from lumirlib.study.results import read_results

#: Level of the test.
ALPHA = 0.05
#: Ranks and verdicts say nothing about a metric that fewer people have.
MIN_PEOPLE = 5
#: Draws of the bootstrap.
DRAWS = 20_000


class PersonTest(NamedTuple):
    """A mean difference with the spread that other people, and other seeds, would give it.

    Attributes:
        difference: Mean over pairs and seeds.
        error: Standard error of it; NaN where one seed, or fewer than three people, leave it unknown.
        freedom: Degrees of freedom of `error`.
    """

    difference: float
    error: float
    freedom: float

    def p_value(self) -> float:
        """Two-sided p-value of no difference."""
        if math.isnan(self.error):
            return math.nan
        if self.error == 0:
            return float(self.difference == 0)
        return float(2 * stats.t.sf(abs(self.difference) / self.error, self.freedom))

    def p_below(self, bound: float) -> float:
        """One-sided p-value of a true difference of `bound` or more: small where the difference lies below it."""
        if math.isnan(self.error):
            return math.nan
        if self.error == 0:
            return float(self.difference >= bound)
        return float(stats.t.cdf((self.difference - bound) / self.error, self.freedom))

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of Student's t."""
        half = stats.t.ppf(1 - ALPHA / 2, self.freedom) * self.error
        return self.difference - half, self.difference + half

    def detectable(self, comparisons: int = 1, power: float = 0.8) -> float:
        """The true difference that a two-sided test at 5 % finds with this power, after Bonferroni."""
        level, found = stats.t.ppf([1 - ALPHA / (2 * comparisons), power], self.freedom)
        return float((level + found) * self.error)


def mean_over_people(differences: pd.Series, seed_variances: Sequence[tuple[float, int]] = ()) -> PersonTest:
    """Mean of the pairs' differences with its standard error, people and seeds being random.

    The part of the people is a jackknife: each person is left out in turn, with all of the person's pairs. The part of
    the seeds is the variance of the rows' means over seeds; the degrees of freedom are Satterthwaite's.

    Args:
        differences: Differences by (fixed, moving).
        seed_variances: Variance over seeds of its mean, and the number of seeds, for each row that has seeds.
    """
    people, places = np.unique(np.array([list(pair) for pair in differences.index]), return_inverse=True)
    places, values = places.reshape(len(differences), 2), differences.to_numpy()
    takes_part = (places[:, :1] == np.arange(len(people))) | (places[:, 1:] == np.arange(len(people)))
    left = (~takes_part).sum(axis=0)
    if (left == 0).any():  # two people, or one whom all pairs share
        return PersonTest(float(values.mean()), math.nan, math.nan)
    means = (values @ ~takes_part) / left
    parts = [((len(people) - 1) / len(people) * ((means - means.mean()) ** 2).sum(), len(people) - 1)]
    parts += [(variance / seeds, seeds - 1) for variance, seeds in seed_variances]
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / free for part, free in parts if part > 0) if variance > 0 else math.inf
    return PersonTest(float(values.mean()), math.sqrt(variance), float(freedom))


def _values(table: pd.DataFrame, row: str, metric: str) -> pd.DataFrame:
    """Value of each pair (rows, by fixed and moving) with each seed (columns)."""
    own = table[(table["variant"] == row) & (table["metric"] == metric)]
    if own.empty:
        raise ValueError(f"no {metric} of {row}: the table has {', '.join(map(str, table['variant'].unique()))}")
    if own.duplicated(["seed", "fixed", "moving"]).any():
        raise ValueError(f"{row} has several values of {metric} for one pair and seed")
    return own.pivot(index=["fixed", "moving"], columns="seed", values="value")  # noqa: PD010 (each value once)


class Interval(NamedTuple):
    """A 95 % interval, with the half width of the 95 % Monte-Carlo interval of either end."""

    low: float
    high: float
    low_error: float
    high_error: float


@lru_cache(maxsize=16)
def _counts(things: int, draws: int, *seed: int) -> np.ndarray:
    """How often each of so many things is drawn, ``(draws, things)``."""
    return np.random.default_rng(seed).multinomial(things, np.full(things, 1 / things), size=draws)


@lru_cache(maxsize=8)
def _weights_of_pairs(places: bytes, people: int, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each pair counts in each draw of people, as a share of all, and which draws have a pair at all.

    Comparisons of the same pairs share it.
    """
    pairs = np.frombuffer(places, dtype=np.int64).reshape(-1, 2)
    drawn = _counts(people, draws, seed)
    weights = (drawn[:, pairs[:, 0]] * drawn[:, pairs[:, 1]]).astype(np.float64)
    total = weights.sum(axis=1)
    return weights[total > 0] / total[total > 0, None], total > 0


def _end(ordered: np.ndarray, share: float) -> tuple[float, float]:
    """A quantile of ordered draws, and its Monte-Carlo error from the order statistics around it."""
    last = len(ordered) - 1
    around = 1.96 * math.sqrt(len(ordered) * share * (1 - share))
    below, above = (int(np.clip(round(share * last + sign * around), 0, last)) for sign in (-1, 1))
    return float(np.interp(share * last, np.arange(len(ordered)), ordered)), float(ordered[above] - ordered[below]) / 2


def bootstrap_over_people(first: pd.DataFrame, second: pd.DataFrame, draws: int = DRAWS, seed: int = 0) -> Interval:
    """95 % interval of the difference of two rows, people and seeds being drawn anew.

    People are drawn with replacement, as many as there are, and a pair counts as often as the product of its two
    people's draws says. The seeds of each row are drawn with replacement too.

    Args:
        first: Values of the first row by (fixed, moving) and seed.
        second: Values of the second row by (fixed, moving) and seed, with the same pairs in the same order.
        draws: Number of draws.
        seed: Random seed of the draws.

    Returns:
        The 2.5th and the 97.5th percentile of first - second, with their Monte-Carlo errors.
    """
    people, places = np.unique(np.array([list(pair) for pair in first.index]), return_inverse=True)
    weights, drawn = _weights_of_pairs(places.astype(np.int64).tobytes(), len(people), draws, seed)
    means = [
        np.einsum("ds,ds->d", weights @ one.to_numpy(), _counts(one.shape[1], draws, seed, which)[drawn]) / one.shape[1]
        for which, one in enumerate((first, second), start=1)
    ]
    ordered = np.sort(means[0] - means[1])
    (low, low_error), (high, high_error) = _end(ordered, 0.025), _end(ordered, 0.975)
    return Interval(low, high, low_error, high_error)


def verdict(difference: float, low: float, high: float, p_holm: float, seeds_sd: float, metric: str) -> str:
    """Whether a row is "better" or "worse", "matches" or "cannot be told", as docs/protocol.md defines them.

    Args:
        difference: Difference of the first row from the second.
        low: Lower end of the difference's interval.
        high: Upper end of the difference's interval.
        p_holm: Adjusted p-value.
        seeds_sd: The larger of both rows' standard deviations over seeds; NaN (one seed) proves nothing better.
        metric: Metric of the challenge.
    """
    check_choice(metric, CHALLENGE, "metric")
    told = p_holm < ALPHA and (low > 0 or high < 0) and abs(difference) > 2 * seeds_sd
    if told and abs(difference) >= METRICS[metric].resolution:
        return "better" if (difference > 0) == METRICS[metric].higher_is_better else "worse"
    if max(abs(low), abs(high)) <= METRICS[metric].margin:
        return "matches"
    return "cannot be told"


def compare_rows(
    table: pd.DataFrame,
    rows: Sequence[str],
    reference: str,
    metric: str,
    draws: int = DRAWS,
    seed: int = 0,
    deterministic: Collection[str] = (),
) -> pd.DataFrame:
    """Rows against one of them on one metric.

    Args:
        table: Long table with the columns variant, seed, fixed, moving, metric, value, as the `values` of
            :class:`lumirlib.study.report.runs.Runs`.
        rows: Rows to compare.
        reference: Row that they are compared with.
        metric: Metric of the challenge.
        draws: Number of draws of :func:`bootstrap_over_people`.
        seed: Random seed of :func:`bootstrap_over_people`.
        deterministic: Rows without random numbers, whose one run has no spread over seeds.

    Returns:
        One line per row: row, reference, metric, difference (mean of row - reference), low and high (its interval),
        low_error and high_error (their Monte-Carlo errors), error and freedom (see :class:`PersonTest`), p, p_holm
        (two-sided, over people and seeds, Holm-adjusted over `rows`), seeds_sd, effect (difference over the standard
        deviation of the differences over pairs), pairs, people, seeds (the fewer of both rows), verdict, settled
        (whether the verdict is the same with either end of the interval moved by its Monte-Carlo error).

    Raises:
        ValueError: an unknown metric, a row that the table lacks, no pair that both rows have, several values for one
            pair and seed, or values that are not finite.
    """
    check_choice(metric, CHALLENGE, "metric")
    base = _values(table, reference, metric).dropna()
    lines = []
    for row in rows:
        own = _values(table, row, metric).dropna()
        shared = own.index.intersection(base.index)
        if shared.empty:
            raise ValueError(f"{row} and {reference} have no pair with {metric} in common")
        first, second = own.loc[shared], base.loc[shared]
        if not np.isfinite(first.to_numpy()).all() or not np.isfinite(second.to_numpy()).all():
            raise ValueError(f"{metric} of {row} or {reference} is infinite on some pair: a label was lost")
        differences = first.mean(axis=1) - second.mean(axis=1)
        # of one seed it is NaN, and so is all that follows from it
        trained = [values for name, values in ((row, first), (reference, second)) if name not in deterministic]
        variances = [(float(values.mean().var(ddof=1)), len(values.columns)) for values in trained]
        tested = mean_over_people(differences, variances)
        deviation = differences.std(ddof=1)
        lines.append(
            {
                "row": row,
                "reference": reference,
                "metric": metric,
                **tested._asdict(),
                **bootstrap_over_people(first, second, draws, seed)._asdict(),
                "p": tested.p_value(),
                "seeds_sd": math.sqrt(np.max([0.0, *(variance for variance, _ in variances)])),
                "effect": differences.mean() / deviation if deviation > 0 else np.nan,
                "pairs": len(shared),
                "people": _people(shared),
                "seeds": min((seeds for _, seeds in variances), default=1),
            }
        )
    found = pd.DataFrame(lines)
    found.insert(found.columns.get_loc("p") + 1, "p_holm", holm(found["p"].to_numpy()))
    verdicts = [
        [verdict(line["difference"], *ends, line["p_holm"], line["seeds_sd"], metric) for ends in within_error(line)]
        for line in found.to_dict("records")
    ]
    return found.assign(verdict=[first for first, *_ in verdicts], settled=[len(set(each)) == 1 for each in verdicts])


def within_error(line: Mapping[str, float]) -> list[tuple[float, float]]:
    """The interval of a comparison: as found, then with its ends moved by their Monte-Carlo errors."""
    return [
        (line["low"] + down * line["low_error"], line["high"] + up * line["high_error"])
        for down, up in ((0, 0), (-1, -1), (-1, 1), (1, -1), (1, 1))
    ]


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values adjusted for all of them being looked at (Holm, 1979): the k-th smallest of n times n - k + 1.

    Args:
        p_values: Values ``(n,)`` in [0, 1]; one that is NaN counts, and stays NaN.

    Returns:
        ``(n,)`` in [0, 1], in the same order.
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.fmax.accumulate(p_values[order] * factors), 1)
    adjusted[np.isnan(p_values)] = np.nan
    return adjusted


def _by_pair(tables: Mapping[str, pd.DataFrame], metric: str) -> pd.DataFrame:
    columns = {}
    for name, table in tables.items():
        if lacking := {"fixed", "moving"} - set(table.columns):
            raise ValueError(f"{name} lacks the column(s) {', '.join(sorted(lacking))}, which say whom pairs share")
        own = table[table["metric"] == metric]
        if own["pair"].duplicated().any():
            raise ValueError(f"{name} has several values of {metric} for one pair: give one run at a time")
        columns[name] = own.set_index(["fixed", "moving"])["value"]
    return pd.DataFrame(columns).dropna()


def _people(pairs: Iterable[tuple[str, str]]) -> int:
    return len({person for pair in pairs for person in pair})


def compare(tables: Mapping[str, pd.DataFrame], alpha: float = ALPHA) -> pd.DataFrame:
    """Every pair of methods on every metric: two-sided tests over people, Holm-adjusted within a metric.

    A metric that fewer than :data:`MIN_PEOPLE` people have is left out. A lost label makes HD95 infinite; where a pair
    has that, the signs of the pairs' differences are tested.

    Args:
        tables: Long table (pair, fixed, moving, metric, value) of each method by name, as
            :func:`lumirlib.evaluation.evaluate_method` gives it.
        alpha: Level of significance.

    Returns:
        Columns metric, first, second, difference (mean of first - second), pairs (that both have), p, p_holm, better
        (name of the significantly better method, or "").

    Raises:
        ValueError: fewer than two methods, several values for one pair, or too few people that all methods have.
    """
    if len(tables) < 2:
        raise ValueError(f"tables must hold two methods or more, got {len(tables)}")
    rows = []
    for metric in CHALLENGE:
        values, found = _by_pair(tables, metric), []
        if _people(values.index) < MIN_PEOPLE:
            continue
        for position, first in enumerate(values):
            for second in list(values)[position + 1 :]:
                # infinite minus infinite is no difference
                difference = (values[first] - values[second]).fillna(0.0)
                finite = np.isfinite(difference).all()
                p = mean_over_people(difference if finite else np.sign(difference)).p_value()
                found.append(
                    {
                        "metric": metric,
                        "first": first,
                        "second": second,
                        "difference": difference.mean(),
                        "pairs": len(values),
                        "p": p,
                    }
                )
        for row, adjusted in zip(found, holm(np.array([row["p"] for row in found])), strict=True):
            ahead = row["first"] if (row["difference"] > 0) == METRICS[metric].higher_is_better else row["second"]
            told = adjusted < alpha and abs(row["difference"]) >= METRICS[metric].resolution
            rows.append({**row, "p_holm": adjusted, "better": ahead if told else ""})
    if not rows:
        raise ValueError(f"the methods {', '.join(tables)} have no pairs of {MIN_PEOPLE} people in common")
    return pd.DataFrame(rows)


def rank(tables: Mapping[str, pd.DataFrame], alpha: float = 0.05) -> pd.DataFrame:
    """Ranks by significance: a method's rank on a metric is one plus the number of methods significantly better.

    Args:
        tables: Long table of each method by name, as for :func:`compare`.
        alpha: Level of significance.

    Returns:
        One row per method, best first: a rank per metric, and "weighted", their mean by the final weights, without
        the metrics that :func:`compare` leaves out.
    """
    tests = compare(tables, alpha)
    ranks = pd.DataFrame(1, index=list(tables), columns=list(dict.fromkeys(tests["metric"])))
    for _, test in tests.iterrows():
        if test["better"]:
            ranks.loc[test["second"] if test["better"] == test["first"] else test["first"], test["metric"]] += 1
    weights = pd.Series({metric: METRICS[metric].final_weight for metric in ranks.columns})
    ranks["weighted"] = (ranks * weights).sum(axis=1) / weights.sum()
    return ranks.sort_values("weighted", kind="stable")


def snapshot_scores(tables: Mapping[str, pd.DataFrame], cohort: str = "", with_published: bool = False) -> pd.DataFrame:
    """The challenge's snapshot score: metrics normalized from the worst (0) to the best (1), weighted.

    Args:
        tables: Long table of each method by name.
        cohort: Short name of the cohort the tables were computed on.
        with_published: Whether to rank ours among the published rows; only for results computed on LUMIR.

    Returns:
        One row per method, best first: the means, "published" (True for rows that were not computed here) and
        "score" in [0, 1], without metrics that fewer than :data:`MIN_PEOPLE` people have; one whose means differ by
        less than its resolution is alike for all.

    Raises:
        ValueError: published rows beside results of another cohort, fewer than two rows, or a metric that is lacking.
    """
    if with_published and cohort != "lumir":
        raise ValueError(
            f"published figures are of LUMIR's validation pairs; ours are of the cohort {cohort!r} and cannot be "
            "placed among them"
        )
    metrics = [
        metric
        for metric in CHALLENGE
        if any(_people(_by_pair({name: table}, metric).index) >= MIN_PEOPLE for name, table in tables.items())
    ]
    means = pd.DataFrame(
        {name: summarize(table)["mean"].reindex(metrics) for name, table in tables.items()}, dtype=float
    ).T.assign(published=False)
    if with_published:
        means = pd.concat([means, published()[metrics].assign(published=True)])
    if len(means) < 2:
        raise ValueError(f"a score needs two methods or more, got {len(means)}")
    lacking = means[metrics].isna().any(axis=1)
    if lacking.any():
        raise ValueError(f"{', '.join(means.index[lacking])} lack a metric that the score needs: {', '.join(metrics)}")
    score, weights = 0.0, sum(METRICS[name].snapshot_weight for name in metrics)
    for metric in (METRICS[name] for name in metrics):
        values = means[metric.name] if metric.higher_is_better else -means[metric.name]
        spread = values.max() - values.min()
        told = spread > 0 and spread >= metric.resolution
        score = score + metric.snapshot_weight / weights * ((values - values.min()) / spread if told else 1.0)
    return means.assign(score=score).sort_values("score", ascending=False, kind="stable")


def read_scores(paths: Sequence[str | Path]) -> tuple[dict[str, pd.DataFrame], str]:
    """Tables of metrics by the name of their run, and the short name of the cohort that they are all of.

    Raises:
        FileNotFoundError: a CSV, or the provenance beside it, that is not there.
        ValueError: a CSV without the columns pair, metric and value, a run named twice, or runs on different cohorts.
    """
    tables, cohorts = {}, {}
    for path in map(Path, paths):
        table, about = read_results(path)
        name = str(about.get("run", path.stem))
        if name in tables:
            raise ValueError(f"{path}: the run {name} is given twice")
        tables[name], cohorts[name] = table, (about.get("cohort", ""), about.get("cohort_digest", ""))
    if len(set(cohorts.values())) > 1:
        raise ValueError(
            f"the runs are on different cohorts: {', '.join(sorted({name for name, _ in cohorts.values()}))}"
        )
    return tables, next(iter(cohorts.values()))[0]
