"""Runs on small cohorts, for tests that train in a second, and stand-ins for runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from lumirlib.data import load_cohort
from lumirlib.methods import parse_row
from lumirlib.methods.presets import PRESETS, split_options
from lumirlib.study.jobs import SweepRun
from lumirlib.study.results import write_results
from lumirlib.study.run import Run
from lumirlib.training.engine import Engine

CPU = Engine("cpu")
TINY = replace(
    PRESETS["smoke"], name="tiny", resolution_mm=1, epochs=2, steps_per_epoch=None, channel_divisor=16, levels=3
)


def small_run(small_cohort_json, out, variant="backbone", **changes) -> Run:
    """A run of the preset smoke at full resolution with the narrowest network; `changes` are options of the preset."""
    options = {"resolution_mm": 1, "channel_divisor": 16, "levels": 3, **changes}
    return Run.prepare(
        variant, preset="smoke", cohort=str(small_cohort_json), out=str(out), engine="cpu", options=options
    )


#: Last lines of a stand-in for the run notebook: it leaves the metrics of :func:`prepare_metrics`.
LEAVES_METRICS = """
import shutil
from pathlib import Path
Path(out, "metrics").mkdir(exist_ok=True)
for path in Path(out, "prepared").glob(f"{variant}-{seed}.*"):
    shutil.copy(path, Path(out, "metrics"))
"""


def prepare_metrics(runs: Iterable[SweepRun]) -> None:
    """Write what each run on simulated people would measure to `prepared/` in its results folder."""
    for run in runs:
        given, row = run.parameters, parse_row(run.row)
        preset, for_row = split_options(given["preset"], row, run.options)
        about = {
            "run": f"{run.row}-{given['seed']}",
            "method": row.name,
            "seed": int(given["seed"]),
            "options": asdict(replace(preset.apply(row), **for_row)),
            "preset": asdict(preset),
            "set_besides": run.options,
            "cohort": "embedded",
            "cohort_name": "Simulated people",
            "cohort_digest": load_cohort("embedded", preset.resolution_mm).digest,
            "simulated": True,
            "resolution_mm": preset.resolution_mm,
            "evaluated_pairs": 1,
            "val_dice": 0.5,
            "val_dice_before": 0.25,
            "commit": "0" * 40,
            "device": "cpu",
        }
        table = pd.DataFrame([{"pair": "A_B", "metric": "dice", "value": 0.5}])
        write_results(table, Path(given["out"], "prepared", f"{run.row}-{given['seed']}.csv"), about)
