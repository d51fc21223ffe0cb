"""What counts as a difference between two rows, by the rules of docs/protocol.md.

Pairs share people, so an interval is drawn over people: a test over pairs takes for independent what is not.

Ranks of several methods on the same pairs: by significance, and by the challenge's snapshot score.

    python -m lumirlib.study.report.statistics results/metrics/LC-2_*.csv results/metrics/TransMorph_*.csv

The published rows of other teams are means only: they can take part in the snapshot score, not in the tests.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import wilcoxon

from lumirlib._checks import check_choice
from lumirlib.evaluation import summarize
from lumirlib.study.paper import CHALLENGE, METRICS, published
from lumirlib.study.results import read_results

#: Level of the test.
ALPHA = 0.05

DRAWS = 2000


def _values(table: pd.DataFrame, row: str, metric: str) -> pd.DataFrame:
    """Value of each pair (rows, by fixed and moving) with each seed (columns)."""
    own = table[(table["variant"] == row) & (table["metric"] == metric)]
    if own.empty:
        raise ValueError(f"no {metric} of {row}: the table has {', '.join(map(str, table['variant'].unique()))}")
    if own.duplicated(["seed", "fixed", "moving"]).any():
        raise ValueError(f"{row} has several values of {metric} for one pair and seed")
    return own.pivot_table(index=["fixed", "moving"], columns="seed", values="value")


def bootstrap_over_people(
    first: pd.DataFrame, second: pd.DataFrame, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the difference of two rows, people and seeds being drawn anew.

    People are drawn with replacement, as many as there are, and a pair counts as often as the product of its two
    people's draws says. The seeds of each row are drawn with replacement too.

    Args:
        first: values by (fixed, moving) and seed.
        second: likewise, with the same pairs in the same order.
        draws: number of draws.
        seed: of the draws.

    Returns:
        The 2.5th and the 97.5th percentile of first - second.
    """
    people, places = np.unique(np.array([list(pair) for pair in first.index]), return_inverse=True)
    places = places.reshape(len(first), 2)
    generator = np.random.default_rng(seed)

    def counts(things: int) -> np.ndarray:
        """How often each of so many things is drawn, ``(draws, things)``."""
        return generator.multinomial(things, np.full(things, 1 / things), size=draws)

    drawn = counts(len(people))
    weights = drawn[:, places[:, 0]] * drawn[:, places[:, 1]]
    total = weights.sum(axis=1)
    found = np.full(draws, np.nan)  # where no pair has a weight
    means = [(weights @ one.to_numpy() * counts(one.shape[1])).sum(axis=1) / one.shape[1] for one in (first, second)]
    np.divide(means[0] - means[1], total, out=found, where=total > 0)
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)


def verdict(difference: float, low: float, high: float, p_holm: float, seeds_sd: float, metric: str) -> str:
    """Whether a row is "better" or "worse", "matches" or "cannot be told", as docs/protocol.md defines them.

    Args:
        difference: of the first row from the second.
        low: lower end of its interval.
        high: upper end.
        p_holm: adjusted p-value.
        seeds_sd: the larger of both rows' standard deviations over seeds; NaN (one seed) proves nothing better.
        metric: one of the challenge's.
    """
    check_choice(metric, CHALLENGE, "metric")
    if p_holm < ALPHA and (low > 0 or high < 0) and abs(difference) > 2 * seeds_sd:
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
        table: long table with the columns variant, seed, fixed, moving, metric, value, as the `values` of
            :class:`lumirlib.study.report.runs.Runs`.
        rows: to compare.
        reference: the row that they are compared with.
        metric: one of the challenge's.
        draws: of :func:`bootstrap_over_people`.
        seed: likewise.
        deterministic: rows without random numbers, whose one run has no spread over seeds.

    Returns:
        One line per row: row, reference, metric, difference (mean of row - reference), low and high (its interval),
        p, p_holm (two-sided Wilcoxon over pairs, Holm-adjusted over `rows`), seeds_sd, effect (difference over the
        standard deviation of the differences over pairs), pairs, people, seeds (of the row), verdict.

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
        low, high = bootstrap_over_people(first, second, draws, seed)
        deviation = differences.std(ddof=1)
        lines.append(
            {
                "row": row,
                "reference": reference,
                "metric": metric,
                "difference": differences.mean(),
                "low": low,
                "high": high,
                "p": float(wilcoxon(differences).pvalue) if differences.any() else 1.0,
                # np.max: one seed of a trained row makes it NaN
                "seeds_sd": float(
                    np.max(
                        [
                            0.0 if name in deterministic else values.mean().std(ddof=1)
                            for name, values in ((row, first), (reference, second))
                        ]
                    )
                ),
                "effect": differences.mean() / deviation if deviation > 0 else np.nan,
                "pairs": len(shared),
                "people": len({person for pair in shared for person in pair}),
                "seeds": first.shape[1],
            }
        )
    found = pd.DataFrame(lines)
    found.insert(found.columns.get_loc("p") + 1, "p_holm", holm(found["p"].to_numpy()))
    found["verdict"] = [
        verdict(line.difference, line.low, line.high, line.p_holm, line.seeds_sd, metric) for line in found.itertuples()
    ]
    return found


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values adjusted for all of them being looked at (Holm, 1979): the k-th smallest of n times n - k + 1.

    Args:
        p_values: ``(n,)`` in [0, 1].

    Returns:
        ``(n,)`` in [0, 1], in the same order.
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(p_values[order] * factors), 1)
    return adjusted


def _by_pair(tables: Mapping[str, pd.DataFrame], metric: str) -> pd.DataFrame:
    columns = {}
    for name, table in tables.items():
        own = table[table["metric"] == metric]
        if own["pair"].duplicated().any():
            raise ValueError(f"{name} has several values of {metric} for one pair: give one run at a time")
        columns[name] = own.set_index("pair")["value"]
    return pd.DataFrame(columns).dropna()


def compare(tables: Mapping[str, pd.DataFrame], alpha: float = 0.05) -> pd.DataFrame:
    """Every pair of methods on every metric: two-sided Wilcoxon signed-rank tests, Holm-adjusted within a metric.

    Pairs of people share people, so the tests take for independent what is not quite: read p-values near alpha with
    care.

    Args:
        tables: method -> long table (pair, metric, value), as :func:`lumirlib.evaluation.evaluate_method` gives it.
        alpha: level of significance.

    Returns:
        Columns metric, first, second, difference (mean of first - second), pairs (that both have), p, p_holm, better
        (name of the significantly better method, or "").

    Raises:
        ValueError: fewer than two methods, several values for one pair, or no pair that all methods have.
    """
    if len(tables) < 2:
        raise ValueError(f"tables must hold two methods or more, got {len(tables)}")
    rows = []
    for metric in CHALLENGE:
        values = _by_pair(tables, metric)
        if values.empty:
            continue
        found = []
        for position, first in enumerate(values):
            for second in list(values)[position + 1 :]:
                # infinite minus infinite is no difference
                with np.errstate(invalid="ignore"):
                    difference = np.nan_to_num((values[first] - values[second]).to_numpy(), nan=0.0)
                p = float(wilcoxon(difference).pvalue) if np.any(difference) else 1.0
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
            rows.append({**row, "p_holm": adjusted, "better": ahead if adjusted < alpha else ""})
    if not rows:
        raise ValueError(f"the methods {', '.join(tables)} have no pair in common")
    return pd.DataFrame(rows)


def rank(tables: Mapping[str, pd.DataFrame], alpha: float = 0.05) -> pd.DataFrame:
    """Ranks by significance: a method's rank on a metric is one plus the number of methods significantly better.

    Args:
        tables: as :func:`compare`.
        alpha: level of significance.

    Returns:
        One row per method, best first: a rank per metric, and "weighted", their mean by the final weights, from
        which metrics that no pair has are left out.
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
        tables: method -> long table.
        cohort: short name of the cohort the tables were computed on.
        with_published: rank ours among the published rows; only for results computed on LUMIR.

    Returns:
        One row per method, best first: the means, "published" (True for rows that were not computed here) and
        "score" in [0, 1].

    Raises:
        ValueError: published rows beside results of another cohort, fewer than two rows, or a metric that is lacking.
    """
    if with_published and cohort != "lumir":
        raise ValueError(
            f"published figures are of LUMIR's validation pairs; ours are of the cohort {cohort!r} and cannot be "
            "placed among them"
        )
    metrics = list(CHALLENGE)
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
    score = 0.0
    for metric in (METRICS[name] for name in CHALLENGE):
        values = means[metric.name] if metric.higher_is_better else -means[metric.name]
        spread = values.max() - values.min()
        score = score + metric.snapshot_weight * ((values - values.min()) / spread if spread > 0 else 1.0)
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


def main(arguments: list[str] | None = None) -> int:
    """Print ranks and scores; the exit status is 0, or 2 for files that cannot be used."""
    options = argparse.ArgumentParser(
        prog="python -m lumirlib.study.report.statistics", description=(__doc__ or "").splitlines()[0]
    )
    options.add_argument("results", nargs="+", help="CSVs of metrics, each with its provenance (.json) beside it")
    options.add_argument(
        "--published", action="store_true", help="score among the published rows; results on LUMIR only"
    )
    given = options.parse_args(arguments)
    try:
        tables, cohort = read_scores(given.results)
        ranks = rank(tables)
        scores = snapshot_scores(tables, cohort, given.published)
    except (ValueError, FileNotFoundError) as error:
        print(f"python -m lumirlib.study.report.statistics: {error}", file=sys.stderr)
        return 2
    print(f"ranks by significance, cohort {cohort}")
    print(ranks.to_string(float_format="%.3g"))
    print(
        "\nsnapshot score, 1 is best" + ("; rows marked published are other teams' figures" if given.published else "")
    )
    print(scores.to_string(float_format="%.4g"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
