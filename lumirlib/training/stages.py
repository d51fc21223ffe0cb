"""The stages of a run from coarse to fine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lumirlib.data import Cohort
from lumirlib.methods.base import Preset, Row
from lumirlib.training.config import RunConfig
from lumirlib.training.pairs import training_source


@dataclass(frozen=True)
class StageTraining:
    """What one stage of a run trains; a run without stages has one.

    Attributes:
        preset: Preset of the stage, without stages.
        row: Row on the stage's voxels.
        cohort: Cohort on the stage's voxels.
        source: The cohort whose training people the row learns from.
        first: Epochs of the run before the stage.
        last: Epochs of the run at its end.
        steps: Steps of an epoch, each with one batch.
    """

    preset: Preset
    row: Row
    cohort: Cohort
    source: Cohort
    first: int
    last: int
    steps: int

    @classmethod
    def of(cls, config: RunConfig, number: int, cohorts: Sequence[Cohort]) -> StageTraining:
        """A stage of a run.

        Args:
            config: Configuration of the run.
            number: Number of the stage, from 0.
            cohorts: The run's cohort at the resolution of every stage.

        Raises:
            ValueError: no cohort at the stage's resolution.
        """
        whole = config.preset
        preset = whole.at_stage(number)
        cohort = next((one for one in cohorts if one.resolution_mm == preset.resolution_mm), None)
        if cohort is None:
            loaded = ", ".join(f"{one.resolution_mm:g}" for one in cohorts)
            raise ValueError(
                f"stage {number + 1} of preset {whole.name!r} works at {preset.resolution_mm:g} mm, the cohort was "
                f"loaded at {loaded} mm"
            )
        pairs = min(len(cohort.train), preset.steps_per_epoch or len(cohort.train))
        row = config.row_of_stage(number)
        last = whole.ends[number]
        return cls(
            preset=preset,
            row=row,
            cohort=cohort,
            source=training_source(row, cohort),
            first=last - preset.epochs,
            last=last,
            steps=math.ceil(pairs / preset.batch_size),
        )

    def learning_rate(self, epoch: int) -> float:
        """The rate of an epoch of the run, which falls from the stage's initial one over its epochs."""
        done = (epoch - self.first) / self.preset.epochs
        return self.preset.learning_rate * (1 - done) ** self.preset.decay_power
