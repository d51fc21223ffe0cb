"""What names a run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace

from lumirlib.data import Cohort
from lumirlib.methods.base import Preset, Row, check_options, file_name, halvings


@dataclass(frozen=True)
class RunConfig:
    """What names a run: the same configuration gives the same files, and resumes.

    Attributes:
        row: Row at its final width, as :meth:`Preset.apply` gives it: a variant of the paper's network, or a method of
            :mod:`lumirlib.methods`.
        preset: Preset that it is trained with, as the row adapts it.
        cohort: Short name of the cohort, for file names.
        cohort_digest: Digest of the cohort, :attr:`lumirlib.data.Cohort.digest`.
        seed: Random seed of the weights and of the order of pairs.
        init_digest: Digest of the weights that training starts from, where the preset's `init` names some.
    """

    row: Row
    preset: Preset
    cohort: str
    cohort_digest: str
    seed: int
    init_digest: str = ""

    def row_of_stage(self, number: int) -> Row:
        """The row as a stage of the preset, counted from 0, trains it."""
        stages = self.preset.each_stage
        row = self.row.on_finer_voxels(-halvings(stages[number].resolution_mm, self.preset.resolution_mm))
        return row if number == len(stages) - 1 else row.before_last_stage()

    def as_dict(self) -> dict[str, object]:
        """The configuration as plain values; options that came after the first runs only where they are used."""
        content = asdict(self)
        content["variant"] = content.pop("row")  # as written since the first run: a digest hangs on it
        for part, described in (("variant", self.row), ("preset", self.preset)):
            for option in fields(described):
                if option.metadata.get("unnamed_at_default") and content[part][option.name] == option.default:
                    del content[part][option.name]
        if self.preset.stages:
            content["preset"]["stages"] = [stage.options() for stage in self.preset.stages]
        if not self.init_digest:
            del content["init_digest"]
        return content

    def digest(self) -> str:
        """Eight hexadecimal digits of the configuration (not of the code, the device or the versions)."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:8]

    @property
    def run(self) -> str:
        """Name of the run's files."""
        name = file_name(self.row.name)
        return f"{name}_{self.cohort}_{self.preset.name}_seed{self.seed}_{self.digest()}".replace("+", "-")


def make_config(variant: Row, preset: Preset, cohort: Cohort, seed: int, **options: object) -> RunConfig:
    """Configuration of a run; `variant` is given at its published width and gets the preset's here, then `options`."""
    if cohort.resolution_mm != preset.resolution_mm:
        raise ValueError(
            f"cohort {cohort.name!r} was loaded at {cohort.resolution_mm:g} mm, "
            f"preset {preset.name!r} works at {preset.resolution_mm:g} mm"
        )
    chosen = replace(preset.apply(variant), **check_options(variant, options))
    return RunConfig(chosen, preset, cohort.short_name, cohort.digest, seed)
