"""What counts as a difference between two rows, by the rules of docs/protocol.md.

Pairs share people, so an interval is drawn over people: a test over pairs takes for independent what is not.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd
from scipy.stats import wilcoxon

from lumirlib._checks import check_choice
from lumirlib.ranking import CHALLENGE_METRICS, holm

#: Two rows match on a metric if the interval of their difference lies within this, in the metric's own unit.
MATCHING = {"dice": 0.0025, "tre_mm": 0.05, "ndv_percent": 0.01, "hd95_mm": 0.1}
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
    check_choice(metric, tuple(MATCHING), "metric")
    if p_holm < ALPHA and (low > 0 or high < 0) and abs(difference) > 2 * seeds_sd:
        return "better" if (difference > 0) == CHALLENGE_METRICS[metric][0] else "worse"
    if max(abs(low), abs(high)) <= MATCHING[metric]:
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
            :class:`lumirlib.report.Runs`.
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
    check_choice(metric, tuple(MATCHING), "metric")
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
                "row": row, "reference": reference, "metric": metric, "difference": differences.mean(),
                "low": low, "high": high,
                "p": float(wilcoxon(differences).pvalue) if differences.any() else 1.0,
                # np.max: one seed of a trained row makes it NaN
                "seeds_sd": float(np.max([
                    0.0 if name in deterministic else values.mean().std(ddof=1)
                    for name, values in ((row, first), (reference, second))
                ])),
                "effect": differences.mean() / deviation if deviation > 0 else np.nan,
                "pairs": len(shared), "people": len({person for pair in shared for person in pair}),
                "seeds": first.shape[1],
            }
        )  # fmt: skip
    found = pd.DataFrame(lines)
    found.insert(found.columns.get_loc("p") + 1, "p_holm", holm(found["p"].to_numpy()))
    found["verdict"] = [
        verdict(line.difference, line.low, line.high, line.p_holm, line.seeds_sd, metric)
        for line in found.itertuples()
    ]  # fmt: skip
    return found
