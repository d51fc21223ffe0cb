"""All runs of one table, loaded once."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from lumirlib._checks import counted
from lumirlib.methods import parse_row
from lumirlib.methods.base import Preset
from lumirlib.methods.presets import split_options
from lumirlib.study.paper import BEFORE
from lumirlib.study.results import check_scored_alike, data_title, find_runs, read_provenance, scored_mm, table_of
from lumirlib.training.pairs import evenly_spaced, halves


def load_study_runs(
    folder: str | Path, rows: Sequence[str], preset: str, cohort: str, seeds: Sequence[int] = ()
) -> Runs:
    """As :func:`lumirlib.study.report.runs.load_runs`, of some seeds only; none given takes all.

    Raises:
        FileNotFoundError, ValueError: as there, or no run of these seeds.
    """
    runs = load_runs(folder, rows, preset, cohort)
    if not seeds:
        return runs
    facts = runs.facts[runs.facts["seed"].isin(seeds)]
    if facts.empty:
        raise FileNotFoundError(f"no run of the seeds {', '.join(map(str, seeds))}; make them with: {runs.command}")
    present = tuple(name for name in runs.variants if name in set(facts["variant"]))
    lost = tuple(name for name in runs.variants if name not in present)
    values = runs.values[runs.values["seed"].isin(seeds) | (runs.values["variant"] == BEFORE)]
    history = runs.history[runs.history["seed"].isin(seeds)]
    return replace(runs, variants=present, missing=(*lost, *runs.missing), values=values, facts=facts, history=history)


def deterministic_rows(names: Sequence[str]) -> list[str]:
    """The rows without random numbers, whose one run has no spread over seeds."""
    return [name for name in names if parse_row(name).trains_on == "nothing"]


#: Points of Dice that a converged run may rise by over the last quarter of its epochs (docs/protocol.md).
CONVERGED = 0.3


# many runs -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Runs:
    """Finished runs of several variants and seeds, with one preset on one cohort.

    Attributes:
        variants: Names of the variants, in the order of the table.
        preset: Preset of all runs.
        options: Options that were set besides in all runs.
        values: Table with the columns variant, seed, pair, fixed, moving, metric, value; the variant "Before Reg", seed
            0, is zero displacement.
        facts: Table with one row per run: variant, seed, run, val_dice, val_dice_before, scored_mm and the rest of its
            provenance.
        history: Table with one row per run and epoch: variant, seed and the columns of its log; a row that only filters
            another's result has the history of that one, a row that is not trained has none.
        missing: Variants without a run.
        command: Sweep command that makes what is missing.
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
        """What a table or figure of these runs is headed with; says "simulated" where it is.

        The voxels named are those that most runs work at, as a preset's methods may have some of their own.
        """
        first = self.facts.iloc[0]
        usual = float(self.facts["resolution_mm"].mode().max())
        data = data_title(first["cohort"], first["cohort_name"], first["simulated"], usual, first["scored_mm"])
        set_besides = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"{data}; preset {self.preset.name}{set_besides}"

    @property
    def scored_mm(self) -> float:
        """Edge of a voxel of the labels that are scored."""
        return float(self.facts["scored_mm"].iloc[0])

    @property
    def voxels(self) -> str:
        """Size of the voxels that the rows work at, and are scored at where that differs."""
        size = f"{self.preset.resolution_mm:g} mm"
        return size if self.scored_mm == self.preset.resolution_mm else f"{size}, scored at {self.scored_mm:g} mm"

    @property
    def missing_note(self) -> str:
        """Which rows have no run, and how to make them; says so where none lacks one."""
        if not self.missing:
            return "No row is missing."
        return f"**Not run: {', '.join(self.missing)}.** Make them with `{self.command}`."

    @property
    def unused_pairs(self) -> list[str]:
        """Evaluated pairs that chose no epoch; of presets that choose by half of the people those of the other half.

        Empty if it cannot be told.
        """
        if self.preset.evaluation_pairs is not None:
            return []
        pairs = self.values.loc[self.values["variant"] == BEFORE].drop_duplicates("pair")
        if self.preset.validation_half:
            _, others = halves([*pairs["fixed"], *pairs["moving"]])
            return list(pairs.loc[pairs["fixed"].isin(others) & pairs["moving"].isin(others), "pair"])
        chose = set(evenly_spaced(tuple(pairs["pair"]), self.preset.validation_pairs))
        return [pair for pair in pairs["pair"] if pair not in chose]

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
        each = ("" if fewest == most else f"{fewest} to ") + counted(most, "seed")
        return (
            f"{int(pairs.min())} pairs; {each} a row: means over the seeds, in parentheses the sample "
            "standard deviation over them; ± std is the population standard deviation over pairs"
        )


def load_runs(
    folder: str | Path,
    variants: Sequence[str],
    preset: str = "demo",
    cohort: str = "embedded",
    options: Mapping[str, object] | None = None,
) -> Runs:
    """The finished runs of a results folder that were made with one preset and cohort.

    Args:
        folder: Results folder, with `metrics/`.
        variants: Names for :func:`lumirlib.methods.parse_row`, in the order of the table.
        preset: Name of the preset.
        cohort: Short name of the cohort.
        options: Options that were set besides in these runs, as for :meth:`lumirlib.study.run.Run.prepare`.

    Returns:
        :class:`Runs`; variants that have no run are in its `missing`.

    Raises:
        FileNotFoundError: no run of any of the variants.
        ValueError: two runs for one variant and seed, runs on different cohorts or scored on different voxels, or no
            zero displacement.
    """
    folder, given = Path(folder), dict(options or {})
    rows = {row.name: row for row in map(parse_row, variants)}
    names = list(rows)
    sweep = ["lumirlib sweep --rows", *names, "--preset", preset, "--cohort", cohort]
    sweep += ["--set", *(shlex.quote(f"{name}={value}") for name, value in given.items())] if given else []
    command = " ".join([*sweep, "--seeds 0 1 2"])
    tables, facts = [], []
    for name in names:
        for path, about in find_runs(folder, rows[name], preset, cohort, given):
            facts.append({"variant": name, **about, "scored_mm": scored_mm(about)})
            tables.append(table_of(path, about).assign(variant=name, seed=about["seed"]))
    if not facts:
        raise FileNotFoundError(f"{folder / 'metrics'} has no run of {', '.join(names)}; make them with: {command}")
    about = pd.DataFrame(facts)
    twice = about[about.duplicated(["variant", "seed"], keep=False)]
    if len(twice):
        raise ValueError(f"{folder / 'metrics'} has several runs of one variant and seed: {', '.join(twice['run'])}")
    if len(set(about["cohort_digest"])) > 1:
        raise ValueError(f"{folder / 'metrics'}: the runs are on different states of the cohort {cohort!r}")
    check_scored_alike(folder / "metrics", facts, command)
    first = about.iloc[0]
    before = [
        (path, other)
        for path, other in read_provenance(folder, cohort)
        if other["method"] == "Zero Displacement"
        and other["cohort_digest"] == first["cohort_digest"]
        and scored_mm(other) == first["scored_mm"]
        and other["evaluated_pairs"] == first["evaluated_pairs"]
    ]
    if not before:
        raise ValueError(f"{folder / 'metrics'} has no zero displacement on the pairs of {first['run']}")
    tables.insert(0, table_of(*before[0]).assign(variant=BEFORE, seed=0))
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


def not_converged(runs: Runs) -> tuple[str, ...]:
    """The trained rows of which a seed had not converged by docs/protocol.md, or has no log to tell."""
    highest = late_rises(runs).groupby("variant")["rise"].max()
    trained = [name for name in runs.variants if not deterministic_rows([name])]
    return tuple(name for name in trained if not highest.get(name, math.nan) <= CONVERGED)


def late_rises(runs: Runs) -> pd.DataFrame:
    """By how much the validation Dice of each run rose over the last quarter of its epochs, or of its last stage's.

    Returns:
        Columns variant, seed, epochs, rise (points), converged (rise at most :data:`CONVERGED`); runs with a log only.
    """
    rows = []
    for (variant, seed), log in runs.history.groupby(["variant", "seed"], sort=False):
        dice = 100 * log.set_index("epoch")["val_dice"]
        last = int(dice.index.max())
        in_last_stage = (log["stage"] == log["stage"].iloc[-1]) if "stage" in log else log["epoch"] >= 0
        count = int((in_last_stage & (log["epoch"] > 0)).sum())
        rise = float(dice[last] - dice[last - max(1, count // 4)])
        rows.append({"variant": variant, "seed": seed, "epochs": last, "rise": rise, "converged": not rise > CONVERGED})
    return pd.DataFrame(rows, columns=["variant", "seed", "epochs", "rise", "converged"])
