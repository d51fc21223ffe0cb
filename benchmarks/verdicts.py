"""How often the rules of docs/protocol.md are wrong: simulated studies with people, seeds and pairs as random effects.

    python benchmarks/verdicts.py --studies 100 --out results/benchmarks/verdicts.json    # a minute

The variances are those of the committed runs of Table 2. Each study has ten people, all ordered pairs, three seeds, and
every row of the claims. Everything has converged, everyone has landmarks, nothing is narrowed: what is left is chance.

- nothing differs: all rows have the same mean. How many families of comparisons have any "better" or "worse"?
- the paper is right: rows differ by exactly the paper's differences. How often is a claim "not supported"?
- clear effects: improvements are twice the smallest effect below, and no less than claimed. How often "supported"?

The smallest effect that is found in four of five studies is given beside the paper's own.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from lumirlib import provenance
from lumirlib.files import write_json
from lumirlib.methods.presets import get_preset
from lumirlib.study.paper import CHALLENGE, METRICS, paper_method, paper_table, rows_of_table
from lumirlib.study.report import claims, statistics
from lumirlib.study.report.runs import Runs, load_runs
from lumirlib.study.results import Measured

#: Mean of the backbone on every metric.
BASE = 5.0
#: Of the bootstrap in each comparison: a tenth of the study's, for time.
DRAWS = 2000
SEEDS = (0, 1, 2)
PEOPLE = [f"P{number}" for number in range(10)]
PAIRS = list(itertools.permutations(PEOPLE, 2))
ROWS = list(dict.fromkeys([*rows_of_table(2), "BF-post", *rows_of_table(1), claims.WITH_MSE]))
SCENARIOS = ("nothing differs", "the paper is right", "clear effects")


@dataclass(frozen=True)
class Components:
    """Standard deviations of a row's figures around what all rows share, in the unit of results files.

    Attributes:
        person: of a row with a person, in either role.
        seed: of a seed.
        seed_person: of a seed with a person.
        pair: of a pair with a seed, the rest.
    """

    person: float
    seed: float
    seed_person: float
    pair: float


def components(runs: Runs, metric: str) -> Components:
    """The components of a metric from runs of similar rows, by the method of moments."""
    own = runs.values[(runs.values["metric"] == metric) & runs.values["variant"].isin(runs.variants)]
    table = own.dropna(subset="value").pivot_table("value", ["fixed", "moving"], ["variant", "seed"]).dropna()
    people = sorted({person for pair in table.index for person in pair})
    roles = [[fixed == one for one in people] + [moving == one for one in people] for fixed, moving in table.index]
    solve = np.linalg.pinv(np.array(roles, dtype=float) - np.mean(roles, axis=0))
    apart = table - table.T.groupby("variant").mean().mean().to_numpy()[:, None]  # from what all rows share
    means = apart.mean()
    of_people = solve @ (apart - means).to_numpy()  # (2 people, runs)
    left = (apart - means).to_numpy() - (np.array(roles, dtype=float) - np.mean(roles, axis=0)) @ of_people
    pair = left.var() * len(table) / max(1, len(table) - 2 * len(people) + 1)
    variants = table.columns.get_level_values("variant")
    effects = pd.DataFrame(of_people, columns=table.columns)
    of_rows = effects.T.groupby("variant").mean().T
    rows, seeds = len(of_rows.columns), len(table.columns) / len(of_rows.columns)
    within = (effects - of_rows[variants].to_numpy()).to_numpy()
    chance = pair * float((solve**2).sum(axis=1).mean())
    seed_person = max(0.0, within.var() * seeds / (seeds - 1) - chance)
    person = max(0.0, float(of_rows.to_numpy().var()) * rows / (rows - 1) - (seed_person + chance) / seeds)
    seed = float(means.groupby("variant").var(ddof=1).mean())
    seed = max(0.0, seed - 2 * seed_person / len(people) - pair / len(table))
    return Components(*map(math.sqrt, (person, seed, seed_person, pair)))


def simulate(
    parts: dict[str, Components], effects: dict[tuple[str, str], float], generator: np.random.Generator
) -> claims.Evidence:
    """A study whose rows differ by `effects`, {(row, metric): difference}, and by chance."""
    places = np.array([[PEOPLE.index(person) for person in pair] for pair in PAIRS])
    fixed, moving = zip(*PAIRS, strict=True)
    tables = []
    for metric, part in parts.items():

        def of_pairs(spread: float, *shape: int) -> np.ndarray:
            """What people in either role bring to the pairs."""
            roles = generator.normal(0, spread, (*shape, 2, len(PEOPLE)))
            return roles[..., 0, places[:, 0]] + roles[..., 1, places[:, 1]]

        shape = (len(ROWS), len(SEEDS))
        # differences alone count; every row folds enough for its NDV to be judged
        values = BASE + np.array([effects.get((row, metric), 0.0) for row in ROWS])[:, None, None]
        values = values + of_pairs(part.person, len(ROWS))[:, None] + of_pairs(part.seed_person, *shape)
        values = values + generator.normal(0, part.seed, (*shape, 1))
        values = values + generator.normal(0, part.pair, (*shape, len(PAIRS)))
        tables.append(
            pd.DataFrame(
                {
                    "variant": np.repeat(ROWS, len(SEEDS) * len(PAIRS)),
                    "seed": np.tile(np.repeat(SEEDS, len(PAIRS)), len(ROWS)),
                    "fixed": np.tile(fixed, len(ROWS) * len(SEEDS)),
                    "moving": np.tile(moving, len(ROWS) * len(SEEDS)),
                    "metric": metric,
                    "value": values.reshape(-1),
                }
            )
        )
    table = pd.concat(tables, ignore_index=True)
    with_mse = table["variant"] == claims.WITH_MSE
    named = tuple(row for row in ROWS if row != claims.WITH_MSE)

    def runs(values: pd.DataFrame, val_dice: float) -> Runs:
        facts = pd.DataFrame(
            [{"variant": row, "seed": seed, "val_dice": val_dice, "scored_mm": 1.0} for row in named for seed in SEEDS]
        )
        flat = [(row, seed, epoch, val_dice) for row in named for seed in SEEDS for epoch in range(9)]
        history = pd.DataFrame(flat, columns=["variant", "seed", "epoch", "val_dice"])
        return Runs(named, get_preset("full"), {}, values, facts, (), "", history)

    of_mse = table[with_mse].assign(variant="backbone")
    best_inside = {weight: runs(of_mse, dice) for weight, dice in ((1.0, 0.4), (0.1, 0.5), (0.01, 0.4))}
    return claims.Evidence(runs(table[~with_mse], 0.5), best_inside, Measured(None, {}, "not simulated"), DRAWS)


def papers_effects() -> dict[tuple[str, str], float]:
    """The paper's differences of rows from the backbone, in the unit of results files."""
    paper = paper_table().drop_duplicates("method").set_index("method")
    found = {(claims.WITH_MSE, "dice"): -0.01}  # of which the paper has no figure
    for row, metric in itertools.product(ROWS, CHALLENGE):
        name = row if row in paper.index else paper_method(row)
        if name in paper.index and not math.isnan(paper.loc[name, metric]):
            found[row, metric] = (paper.loc[name, metric] - paper.loc["backbone", metric]) / METRICS[metric].factor
    return found


def clear_effects(smallest: dict[str, float]) -> dict[tuple[str, str], float]:
    """Differences by which every claimed improvement is clear.

    Each is twice the smallest effect that is found in four of five studies, or that much more than the claimed size.

    Args:
        smallest: By metric, in the unit of results files.
    """
    found = papers_effects()
    checks = [check for claim in claims.CLAIMS for check in getattr(claim, "checks", ()) if check.expect == "better"]

    def gain(check: claims.Check) -> float:
        metric, least = METRICS[check.metric], 2 * smallest[check.metric]
        papers = abs(found.get((check.row, metric.name), 0.0) - found.get((check.reference, metric.name), 0.0))
        size = max(least, papers, check.at_least / metric.factor + least if check.at_least else 0.0)
        return size if metric.higher_is_better else -size

    gains = {check: gain(check) for check in checks}
    for check in checks:
        if check.reference == "backbone":
            found[check.row, check.metric] = gains[check]
    for check in checks:
        if check.reference == "LC-1":  # its Dice is kept
            found[check.row, check.metric] = found[check.reference, check.metric] + gains[check]
            found[check.row, "dice"] = found[check.reference, "dice"]
    for check in sorted(checks, key=lambda one: abs(gains[one])):  # other references move, by the most of their claims
        if check.reference not in ("backbone", "LC-1"):
            found[check.reference, check.metric] = found.get((check.row, check.metric), 0.0) - gains[check]
    return found


def judged(
    parts: dict[str, Components], effects: dict[tuple[str, str], float], *seed: int
) -> tuple[dict[str, str], pd.DataFrame]:
    """The verdicts of one simulated study, and all of its comparisons."""
    study = simulate(parts, effects, np.random.default_rng(seed))
    verdicts = {claim.key: claim.judge(study).verdict for claim in claims.CLAIMS if isinstance(claim, claims.Claim)}
    lines = [
        study.compare(row, reference, metric)
        for reference, rows in study.families.items()
        for row, metric in itertools.product(rows, CHALLENGE)
        if reference != claims.WITH_MSE or metric == "dice"
    ]
    return verdicts, pd.DataFrame(lines).assign(study=seed[-1])


def errors(compared: pd.DataFrame) -> dict[str, float]:
    """Of rows that do not differ: comparisons and families told to differ, and intervals that leave out zero."""
    wrong = compared["verdict"].isin(["better", "worse"])
    families = wrong.groupby([compared["study"], compared["reference"], compared["metric"]]).any()
    return {
        "comparisons": len(compared),
        "told_to_differ": float(wrong.mean()),
        "families": len(families),
        "families_with_one_told_to_differ": float(families.mean()),
        "test_alone_below_5_percent": float((compared["p"] < statistics.ALPHA).mean()),
        "interval_leaves_out_zero": float(((compared["low"] > 0) | (compared["high"] < 0)).mean()),
    }


def smallest_effect(compared: pd.DataFrame, comparisons: int, power: float = 0.8) -> float:
    """The smallest effect that this share of comparisons of rows that do not differ, shifted by it, tells."""
    gains = compared.assign(
        sign=[1 if METRICS[metric].higher_is_better else -1 for metric in compared["metric"]]
    ).to_dict("records")

    def found(effect: float) -> float:
        told = 0
        for line in gains:
            shift = line["sign"] * effect
            tested = statistics.PersonTest(line["difference"] + shift, line["error"], line["freedom"])
            p = min(1.0, comparisons * tested.p_value())
            ends = (line["low"] + shift, line["high"] + shift)
            told += statistics.verdict(tested.difference, *ends, p, line["seeds_sd"], line["metric"]) == "better"
        return told / len(gains)

    low, high = 0.0, 100 * METRICS[gains[0]["metric"]].margin
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) >= power else (middle, high)
    return high


def run(studies: int, workers: int) -> dict[str, object]:
    """Simulate, judge and count.

    Args:
        studies: Number of studies in each scenario.
        workers: Number of processes.
    """
    results = provenance.project_root() / "results"
    real = load_runs(results, rows_of_table(2), "real-2mm", "brains")
    simulated = load_runs(results, rows_of_table(2), "demo", "embedded")
    parts = {metric: components(real, metric) for metric in CHALLENGE}
    # landmarks on three real people tell little of the spread between people: the larger of both cohorts'
    of_points = (parts["tre_mm"], components(simulated, "tre_mm"))
    parts["tre_mm"] = Components(*map(max, *(vars(one).values() for one in of_points)))
    # narrow networks fold less than the paper's: their spread, relative to their mean, at the paper's level
    own = real.values[(real.values["metric"] == "ndv_percent") & real.values["variant"].isin(real.variants)]
    level = paper_table(2).set_index("method").loc["backbone", "ndv_percent"] / own["value"].mean()
    parts["ndv_percent"] = Components(*(level * one for one in vars(parts["ndv_percent"]).values()))

    found: dict[str, object] = {"components": {metric: asdict(part) for metric, part in parts.items()}}
    effects = {"nothing differs": {}, "the paper is right": papers_effects()}
    with ProcessPoolExecutor(workers) as pool:
        for number, scenario in enumerate(SCENARIOS):
            work = partial(judged, parts, effects[scenario], number)
            done = list(tqdm(pool.map(work, range(studies)), desc=scenario, total=studies))
            counted: dict[str, Counter[str]] = {}
            for verdicts, _ in done:
                for key, verdict in verdicts.items():
                    counted.setdefault(key, Counter())[verdict] += 1
            shares = {key: {verdict: n / studies for verdict, n in one.items()} for key, one in counted.items()}
            found[scenario] = {"studies": studies, "claims": shares}
            if scenario == "nothing differs":
                compared = pd.concat([lines for _, lines in done], ignore_index=True)
                found[scenario]["errors"] = errors(compared)
                found["smallest_effect"] = smallest_effects(compared)
                in_files = {
                    metric: one["told_in_80_percent"] / METRICS[metric].factor
                    for metric, one in found["smallest_effect"].items()
                }
                effects["clear effects"] = clear_effects(in_files)
    return found


def smallest_effects(compared: pd.DataFrame) -> dict[str, object]:
    """Of each metric, beside the paper's own effects of its schemes; in the units of the paper's tables."""
    own = compared[compared["reference"] == "backbone"]
    paper = paper_table(2).set_index("method")
    found = {}
    for metric, lines in own.groupby("metric", sort=False):
        shown = METRICS[metric]
        effects = (paper[metric] - paper.loc["backbone", metric]).drop(["Before Reg", "backbone"]).dropna()
        found[metric] = {
            "unit": shown.unit_of_difference,
            "told_in_80_percent": round(shown.shown(smallest_effect(lines, lines["row"].nunique())), 4),
            "papers_effects": {method.removeprefix("backbone+"): round(one, 4) for method, one in effects.items()},
        }
    return found


def main(arguments: list[str] | None = None) -> int:
    """Write the JSON and print what it says in brief."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--studies", type=int, default=200, help="in each scenario")
    options.add_argument("--workers", type=int, default=2, help="processes")
    options.add_argument("--out", default="", help="file; empty: benchmarks/verdicts.json of your own results")
    given = options.parse_args(arguments)
    if given.studies < 1 or given.workers < 1:
        print("verdicts: --studies and --workers must be 1 or more", file=sys.stderr)
        return 2
    found = run(given.studies, given.workers)
    about = {"command": " ".join(["python benchmarks/verdicts.py", *(arguments or sys.argv[1:])])}
    about |= {"commit": provenance.commit(), "written": provenance.now(), "versions": provenance.versions()}
    write_json(given.out or provenance.results_folder() / "benchmarks" / "verdicts.json", {**about, **found})
    print(found["nothing differs"]["errors"])
    for scenario in SCENARIOS:
        print(pd.DataFrame(found[scenario]["claims"]).T.fillna(0).to_string())
    print(found["smallest_effect"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
