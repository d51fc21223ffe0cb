"""One run of the study from its parameters to its files: what the notebooks and the command line call."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from lumirlib import provenance
from lumirlib.data import Cohort, Pair, load_cohort
from lumirlib.data.cohort import MIN_LABEL_VOXELS
from lumirlib.evaluation import FURTHER_METRICS, Method, evaluate_method, zero_displacement
from lumirlib.files import Journal, check_writable, read_json, write_atomically
from lumirlib.methods import parse_row
from lumirlib.methods.base import Baseline
from lumirlib.methods.presets import split_options
from lumirlib.methods.variants import Variant
from lumirlib.metrics import inverse_consistency_error
from lumirlib.provenance import redact_path
from lumirlib.study.results import data_title, read_results, scoring_facts, write_results
from lumirlib.training.config import RunConfig, make_config
from lumirlib.training.engine import Engine
from lumirlib.training.launch import TrainingResult, train, train_in_processes
from lumirlib.training.pairs import evenly_spaced, training_source
from lumirlib.training.weights import Weights, method_of_weights, starting_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _written_for(path: Path) -> tuple[str, str]:
    """Commit that wrote a table of metrics, content of its cohort; empty for no table, or one of uncommitted code."""
    try:
        about = read_json(path.with_suffix(".json"))
    except (OSError, ValueError):
        return "", ""
    commit, content = str(about.get("commit", "")), str(about.get("content_digest", ""))
    return (commit, content) if path.is_file() and len(commit) == 40 else ("", "")


@dataclass(frozen=True)
class Run:
    """A row of Table 1 or 2, to be trained (where there is something to train) and evaluated on a cohort.

    Attributes:
        config: Configuration of what is trained.
        cohort: Cohort that it is trained and evaluated on.
        out: Path of the results folder.
        engine: Engine that computes it.
        options: Options that were set besides the variant's and the preset's own values.
        command: Command that repeats it.
        commit: Commit of the code when the run was prepared; that it was trained by stands in the checkpoint.
        arguments: Arguments for `lumirlib run` that give the same run.
        start: Weights that its training starts from; None for random ones.
        coarser: The cohort at the other resolutions of the preset's stages.
    """

    config: RunConfig
    cohort: Cohort
    out: Path
    engine: Engine
    options: dict[str, object]
    command: str
    commit: str
    arguments: tuple[str, ...] = ()
    start: Weights | None = None
    coarser: tuple[Cohort, ...] = ()

    @classmethod
    def prepare(
        cls,
        variant: str = "backbone",
        preset: str = "demo",
        cohort: str = "embedded",
        seed: int = 0,
        data_root: str = "",
        out: str = "",
        engine: Engine | str = "auto",
        options: Mapping[str, object] | None = None,
        command: str = "",
    ) -> Run:
        """Check all parameters and open the cohort; nothing is trained yet.

        Args:
            variant: Name for :func:`lumirlib.methods.parse_row`.
            preset: Name of a preset in :data:`lumirlib.methods.presets.PRESETS`.
            cohort: Cohort's name or path, as for :func:`lumirlib.load_cohort`.
            seed: Random seed of weights and pairs, 0 or more.
            data_root: Folder that the JSON's paths are relative to; empty for its own.
            out: Results folder; empty for :func:`lumirlib.provenance.results_folder`.
            engine: Engine that computes it, or a device's name: "auto", "cpu", "cuda" ...
            options: Options of :class:`lumirlib.methods.base.Preset` and of the row to set besides, such as
                ``{"start_channels": 16, "smoothness_weight": 0.5}``; None as a value leaves the option as it is. A
                `start_channels` counts as it is, the preset's divisor is not applied to it.
            command: Call that prepared it; the notebook with these parameters if empty.

        Raises:
            ValueError: an unknown variant, preset or option, with the choices listed; a seed below 0; a cohort that
                cannot be used.
        """
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed must be a whole number from 0, got {seed!r}")
        row = parse_row(variant)
        given = {name: value for name, value in (options or {}).items() if value is not None}
        if given.get("init") in ("", "random"):
            del given["init"]
        chosen_preset, for_row = split_options(preset, row, given)
        engine = engine if isinstance(engine, Engine) else Engine(engine)
        stages = chosen_preset.each_stage
        with engine.first_alone():  # the embedded cohort and a cache are made by one process
            cohorts = {}
            for resolution in dict.fromkeys(stage.resolution_mm for stage in reversed(stages)):
                cohorts[resolution] = load_cohort(cohort, resolution, data_root or None)
                if engine.cache == "on" or (engine.cache == "auto" and not cohorts[resolution].fits_in_memory):
                    cohorts[resolution] = cohorts[resolution].with_cache()
        loaded, *coarser = cohorts.values()
        for pair in loaded.validation_pairs:
            loaded.landmark_pair(pair)  # landmarks that do not fit are said before the training, not after
        _ = loaded.labels  # nor labels of another protocol
        config = make_config(row, chosen_preset, loaded, seed, **for_row)
        start = starting_weights(str(given.get("init", "")), config.row_of_stage(0), stages[0].resolution_mm)
        config = replace(config, init_digest=start.digest if start else "")
        named = given | ({"init": chosen_preset.init} if start else {})  # no path of this machine
        shown = {
            "variant": variant,
            "preset": preset,
            "cohort": redact_path(cohort),
            "seed": seed,
        }
        shown |= {"data_root": redact_path(data_root)} if data_root else {}
        shown |= engine.as_parameters()
        words = [f"-p {name} {shlex.quote(str(value))}" for name, value in shown.items()]
        words += [f"-y {shlex.quote(json.dumps({'options': named}))}"] if named else []
        return cls(
            config=config,
            cohort=loaded,
            out=provenance.results_folder(out),
            engine=engine,
            options=named,
            command=command or " ".join(["papermill notebooks/run_ablation.ipynb <output>.ipynb", *words]),
            commit=provenance.commit(),
            arguments=(
                variant,
                f"--preset={preset}",
                f"--cohort={cohort}",
                f"--seed={seed}",
                f"--data-root={data_root}",
                f"--out={provenance.results_folder(out)}",
                *engine.as_arguments(),
                *(["--set", *(f"{name}={json.dumps(value)}" for name, value in given.items())] if given else []),
            ),
            start=start,
            coarser=tuple(coarser),
        )

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.engine.target

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The pairs of the final evaluation."""
        return evenly_spaced(self.cohort.validation_pairs, self.config.preset.evaluation_pairs)

    @property
    def title(self) -> str:
        """What a table or figure of this run is headed with; says "simulated" where it is."""
        cohort, scored_mm = self.cohort, self.cohort.at_own_resolution.resolution_mm
        data = data_title(cohort.short_name, cohort.name, cohort.simulated, cohort.resolution_mm, scored_mm)
        set_besides = "".join(f", {name}={value}" for name, value in self.options.items() if name != "start_channels")
        row = self.config.row
        if isinstance(row, Variant):
            return f"{row.name} (sc:{row.start_channels}){set_besides}, {data}"
        return f"{row.name}{' (retrained here)' if row.trains_on != 'nothing' else ''}{set_besides}, {data}"

    def describe(self) -> str:
        """The run in a few lines of Markdown, with all that differs from the paper's training."""
        row, preset = self.config.row, self.config.preset
        parts = [(part, f" of {part.name!r}" if self.cohort.joined else "") for part in self.cohort.parts]
        lines = [
            f"**{self.title}**",
            "",
            f"- run `{self.config.run}`, preset *{preset.name}* ({preset.about}), seed {self.config.seed}, "
            f"on {self.engine.describe()}",
            f"- {'method' if row.trains_on == 'nothing' else 'network'}: {row.describe()}",
            f"- {' and '.join(f'{len(part.train)} training scans{of}' for part, of in parts)}, {len(self.pairs)} pairs "
            f"to evaluate, {'x'.join(map(str, self.cohort.shape))} voxels",
        ]
        if row.trains_on == "labels":
            source = training_source(row, self.cohort)
            lines.append(
                f"- trained on the label volumes of {len(source.train)} people of {source.name!r}, on no image"
            )
        differences = preset.differences_from_paper(row)
        if differences and row.trains_on != "nothing":
            whose = "the method's own" if isinstance(row, Baseline) else "the paper's"
            lines.append(f"- **not {whose} training**: {'; '.join(differences)}")
        scoring, protocol = self.cohort.at_own_resolution, set(self.cohort.protocol[1:])
        if scoring.has_labels:
            known = set().union(*scoring.label_sizes.values()) & protocol
            if len(known) < len(protocol) / 2 or scoring.given_labels:
                whose = "the JSON's" if scoring.given_labels else "LUMIR's"
                lines.append(f"- {len(known)} of {whose} {len(protocol)} labels are in the label volumes")
        if scoring.has_labels and len(scoring.labels) < len(scoring.protocol):
            lines.append(
                f"- {len(scoring.labels)} of the {len(scoring.protocol)} labels are scored; the others have fewer "
                f"than {MIN_LABEL_VOXELS} voxels of {scoring.resolution_mm:g} mm in one of the people"
            )
        if not self.cohort.has_labels:
            lines.append("- no labels for the validation pairs: the best epoch is chosen by similarity, not Dice")
        if self.cohort.cache:
            lines.append(f"- volumes from a cache on disk: {self.cohort.describe_cache()}")
        if self.missing:
            lines.append(f"- **{self.missing}**")
        if self.cohort.credit:
            lines.append(f"- data: {self.cohort.credit}")
        return "\n".join(lines)

    @property
    def missing(self) -> str:
        """Empty where the row can be run on this machine; else what to install."""
        return self.config.row.available()

    @property
    def checkpoint(self) -> Path:
        """The best weights of the run's finished training, or of that of the row whose weights it uses.

        Raises:
            FileNotFoundError: not trained, or not to the end.
        """
        row = self.config.row.base_row()
        run = replace(self.config, row=row).run
        path, log = self.out / "checkpoints" / run / "best.pt", self.out / "logs" / f"{run}.csv"
        epochs = len(pd.read_csv(log)) - 1 if log.is_file() else 0
        if not path.is_file() or epochs < self.config.preset.epochs:
            raise FileNotFoundError(
                f"{row.name} with seed {self.config.seed} is not trained yet ({path}; {epochs} of "
                f"{self.config.preset.epochs} epochs): lumirlib sweep --rows {shlex.quote(row.name)} "
                f"--seeds {self.config.seed} --preset {self.config.preset.name}, with the same cohort"
            )
        return path

    def trained_method(self) -> nn.Module | Method:
        """What :meth:`evaluate` would score, from :attr:`checkpoint`; nothing is trained."""
        if self.config.row.trains_on == "nothing":
            return self.config.row.build()
        return method_of_weights(self.config, self.checkpoint, self.device)

    def training_labels(self) -> torch.Tensor:
        """A label volume ``(1, 1, D, H, W)`` of those that a row that trains on labels learns from."""
        source = training_source(self.config.row, self.cohort)
        return source.label_volume(source.train[0])

    def inverse_consistency(self, result: TrainingResult, count: int = 5, progress: bool = True) -> pd.DataFrame:
        """Inverse consistency on `count` pairs, spread evenly, before training and after.

        Args:
            result: Result of :meth:`train`.
            count: Number of pairs.
            progress: Whether to show a progress bar.

        Returns:
            Columns when, error_voxels (mean distance of both directions composed to the identity), displacement_voxels
            (mean length), each a mean over the pairs, inside the brain.
        """
        stages = {"as run": result.model}
        if result.log:
            torch.manual_seed(self.config.seed)
            stages = {"before training": self.config.row.build().to(self.device).eval(), "after": result.model}
        rows = []
        for when, model in stages.items():
            found = []
            for pair in tqdm(evenly_spaced(self.pairs, count), desc=when, unit="pair", disable=not progress):
                fixed, moving = (self.cohort.image(one).to(self.device) for one in (pair.fixed, pair.moving))
                with torch.no_grad():
                    forward, backward = model(fixed, moving), model(moving, fixed)
                error = inverse_consistency_error(forward, backward, moving)
                found.append((error, float(forward.norm(dim=1, keepdim=True)[fixed > 0].mean())))
            error, length = np.mean(found, axis=0)
            rows.append({"when": when, "error_voxels": error, "displacement_voxels": length})
        return pd.DataFrame(rows)

    def train(self, resume: bool = True, progress: bool = True) -> TrainingResult:
        """Train, or go on from the last checkpoint; see :func:`lumirlib.training.launch.train`.

        An engine of several processes has torchrun start them; they end when all epochs are trained.

        Raises:
            ChildProcessError: One of several processes broke.
            OSError: the results folder cannot be written, said before anything is trained.
        """
        if self.engine.is_first:
            check_writable(self.out)
        if self.engine.processes == 1 or self.config.row.trains_on == "nothing":
            return train(self.config, self.cohort, self.out, self.engine, resume, progress, self._start, self.coarser)
        train_in_processes(self.config, self.out, self.engine.processes, self.arguments, resume, progress)
        alone = replace(self.engine, processes=1)
        return train(self.config, self.cohort, self.out, alone, True, progress, self._start, self.coarser)

    @property
    def _start(self) -> dict[str, torch.Tensor] | None:
        return self.start.tensors if self.start else None

    def evaluate(self, result: TrainingResult, progress: bool = True, consistency: bool = False) -> pd.DataFrame:
        """Score the trained network and write `<out>/metrics/<run>.csv` with its provenance; the long table.

        Scored pairs are kept as they come, so that an evaluation that was stopped goes on with the next pair.

        Args:
            result: Result of :meth:`train`.
            progress: Whether to show a progress bar.
            consistency: Whether to measure inverse consistency on every pair.
        """
        name = self.config.row.name
        depends_on = {
            "code": provenance.source_digest(),
            "cohort": self.cohort.content_digest,
            "weights": hashlib.sha256(result.checkpoint.read_bytes()).hexdigest() if result.checkpoint else None,
            "consistency": consistency,
            "further_metrics": sorted(FURTHER_METRICS),
            "device": self.engine.describe(),
        }
        journal = Journal(self.out / "checkpoints" / self.config.run / "evaluated.jsonl", depends_on)
        with self.engine.reproducibly():
            table = evaluate_method(
                result.model,
                self.cohort,
                self.pairs,
                self.device,
                progress=progress,
                description=f"evaluate {name}",
                consistency=consistency,
                journal=journal,
            )
        about = {
            "run": self.config.run,
            "method": name,
            "set_besides": self.options,
            "options": asdict(self.config.row),
            "preset": asdict(self.config.preset),
            "seed": self.config.seed,
            "command": self.command,
            "commit": self.commit,
            "device": self.engine.describe(),
            "cache": self.cohort.describe_cache(),
            "parameters": sum(p.numel() for p in result.model.parameters())
            if isinstance(result.model, nn.Module)
            else 0,
            "trained_by": result.trained_by,
            "best_epoch": result.best_epoch,
            "val_dice": result.val_dice,
            "val_dice_before": float(result.history["val_dice"].iloc[0]),
            "weights": result.checkpoint.parent.name if result.checkpoint else None,
            "trained_on": self.trained_on(),
            "started_from": self.start.about if self.start else None,
            "seconds_per_step": float(result.history["seconds"].mean()) if "seconds" in result.history else None,
            "evaluated_pairs": len(self.pairs),
        }
        about |= {"stages": self._stages(result.history)} if "stage" in result.history else {}
        table.insert(0, "run", self.config.run)
        write_results(table, self.metrics_path, {**about, **scoring_facts(self.cohort)})
        journal.remove()
        return table

    def _stages(self, history: pd.DataFrame) -> list[dict[str, object]]:
        """What each stage of the training was, for provenance."""
        digests = {one.resolution_mm: one.digest for one in (self.cohort, *self.coarser)}
        found = []
        for number, stage in history.loc[1:].groupby("stage"):
            resolution = float(stage["resolution_mm"].iloc[0])
            found.append(
                {
                    "stage": int(number),
                    "resolution_mm": resolution,
                    "epochs": len(stage),
                    "steps": int(stage["steps"].sum()),
                    "seconds_per_step": float(stage["seconds"].mean()),
                    "cohort_digest": digests[resolution],
                }
            )
        return found

    def trained_on(self) -> str:
        """What the row learns from: images or labels, whose, and the cohorts' digests."""
        row = self.config.row
        if row.trains_on == "nothing":
            return "nothing"
        parts = training_source(row, self.cohort).parts
        return "; ".join(f"{row.trains_on} of {len(part.train)} people, {part.name}, {part.digest}" for part in parts)

    @property
    def metrics_path(self) -> Path:
        """Where :meth:`evaluate` writes."""
        return self.out / "metrics" / f"{self.config.run}.csv"

    def save_figure(self, figure: Figure, kind: str) -> Figure:
        """Write a figure to `<out>/figures/<run>_<kind>.png`; returns the figure."""
        write_atomically(
            self.out / "figures" / f"{self.config.run}_{kind}.png",
            lambda to: figure.savefig(to, format="png", dpi=120),
        )
        return figure

    def before_registration(self, progress: bool = True) -> pd.DataFrame:
        """Metrics of zero displacement on the same pairs, kept while commit and the cohort's files stay.

        They are those of the files' own voxels, whatever resolution the run works at.
        """
        facts = scoring_facts(self.cohort)
        facts["resolution_mm"] = facts["scored_mm"]
        run = (
            f"ZeroDisplacement_{self.config.cohort}_{facts['scored_mm']:g}mm_{len(self.pairs)}pairs_"
            f"{facts['cohort_digest'][:8]}"
        ).replace("+", "-")
        path = self.out / "metrics" / f"{run}.csv"
        if _written_for(path) != (self.commit, facts["content_digest"]):
            table = evaluate_method(
                zero_displacement,
                self.cohort.at_own_resolution,
                self.pairs,
                progress=progress,
                description="before registration",
            )
            table.insert(0, "run", run)
            about = {
                "run": run,
                "method": "Zero Displacement",
                "command": self.command,
                "commit": self.commit,
                "device": "cpu",
            }
            write_results(table, path, {**about, "evaluated_pairs": len(self.pairs), **facts})
        return read_results(path)[0]
