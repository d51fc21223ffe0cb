"""Ranks of several methods on the same pairs: by significance, and by the challenge's snapshot score.

    python -m lumirlib.ranking results/metrics/LC-2_*.csv results/metrics/TransMorph_*.csv

The published rows of other teams are means only: they can take part in the snapshot score, not in the tests.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import wilcoxon

from lumirlib.evaluation import read_results as read_metrics
from lumirlib.evaluation import summarize
from lumirlib.report import paper_table

#: Metric -> whether more is better, and its weight in the snapshot score of July 2024.
CHALLENGE_METRICS: dict[str, tuple[bool, float]] = {
    "dice": (True, 1 / 6),
    "tre_mm": (False, 1 / 3),
    "ndv_percent": (False, 1 / 3),
    "hd95_mm": (False, 1 / 6),
}
#: Weights over ranks by significance in the final ranking of 2024, as a participant states them.
FINAL_WEIGHTS = {"dice": 1 / 5, "tre_mm": 2 / 5, "ndv_percent": 1 / 5, "hd95_mm": 1 / 5}


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
    for metric, (higher_is_better, _) in CHALLENGE_METRICS.items():
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
                found.append({"metric": metric, "first": first, "second": second, "difference": difference.mean(),
                              "pairs": len(values), "p": p})  # fmt: skip
        for row, adjusted in zip(found, holm(np.array([row["p"] for row in found])), strict=True):
            ahead = row["first"] if (row["difference"] > 0) == higher_is_better else row["second"]
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
        One row per method, best first: a rank per metric, and "weighted", their mean by :data:`FINAL_WEIGHTS`, whose
        metrics that no pair has are left out.
    """
    tests = compare(tables, alpha)
    ranks = pd.DataFrame(1, index=list(tables), columns=list(dict.fromkeys(tests["metric"])))
    for _, test in tests.iterrows():
        if test["better"]:
            ranks.loc[test["second"] if test["better"] == test["first"] else test["first"], test["metric"]] += 1
    weights = pd.Series(FINAL_WEIGHTS)[ranks.columns]
    ranks["weighted"] = (ranks * weights).sum(axis=1) / weights.sum()
    return ranks.sort_values("weighted", kind="stable")


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
    metrics = list(CHALLENGE_METRICS)
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
    for metric, (higher_is_better, weight) in CHALLENGE_METRICS.items():
        values = means[metric] if higher_is_better else -means[metric]
        spread = values.max() - values.min()
        score = score + weight * ((values - values.min()) / spread if spread > 0 else 1.0)
    return means.assign(score=score).sort_values("score", ascending=False, kind="stable")


def read_results(paths: Sequence[str | Path]) -> tuple[dict[str, pd.DataFrame], str]:
    """Tables of metrics by the name of their run, and the short name of the cohort that they are all of.

    Raises:
        FileNotFoundError: a CSV, or the provenance beside it, that is not there.
        ValueError: a CSV without the columns pair, metric and value, a run named twice, or runs on different cohorts.
    """
    tables, cohorts = {}, {}
    for path in map(Path, paths):
        table, about = read_metrics(path)
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
    options = argparse.ArgumentParser(prog="python -m lumirlib.ranking", description=(__doc__ or "").splitlines()[0])
    options.add_argument("results", nargs="+", help="CSVs of metrics, each with its provenance (.json) beside it")
    options.add_argument(
        "--published", action="store_true", help="score among the published rows; results on LUMIR only"
    )
    given = options.parse_args(arguments)
    try:
        tables, cohort = read_results(given.results)
        ranks = rank(tables)
        scores = snapshot_scores(tables, cohort, given.published)
    except (ValueError, FileNotFoundError) as error:
        print(f"python -m lumirlib.ranking: {error}", file=sys.stderr)
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
