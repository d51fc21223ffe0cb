"""Runs on small cohorts, for tests that train in a second."""

from __future__ import annotations

from dataclasses import replace

from lumirlib.methods.presets import PRESETS
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
