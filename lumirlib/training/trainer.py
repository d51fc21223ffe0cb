"""The training loop, one for every row: seeded, logged, resumable.

A run is named by its configuration; its files are

    <out>/checkpoints/<run>/last.pt   everything needed to go on
    <out>/checkpoints/<run>/best.pt   weights of the epoch with the best validation figure
    <out>/logs/<run>.csv              one row per epoch

each written atomically. Killed at any moment, the same call goes on from the last checkpoint.

A preset with stages trains from coarse to fine. Each stage has voxels, a network and an optimizer of its own, and
begins with the last weights of the one before, see :func:`lumirlib.training.weights.to_finer_levels`. Epochs are
counted through. Each is validated on its stage's voxels, and the best one is chosen among those of the last stage.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from lumirlib.data import Cohort, Pair
from lumirlib.data.loader import Batch, PairLoader
from lumirlib.evaluation import Method, zero_displacement
from lumirlib.files import write_atomically
from lumirlib.methods.base import Preset, halvings
from lumirlib.models.memory import freed_memory_kept
from lumirlib.provenance import commit
from lumirlib.training.checkpoints import (
    TrainingState,
    check_weights,
    load_checkpoint,
    load_optimizer,
    save_checkpoint,
    training_state,
)
from lumirlib.training.config import RunConfig
from lumirlib.training.divergence import NonFiniteLossError, what_is_not_finite
from lumirlib.training.engine import Engine
from lumirlib.training.interrupts import StopRequest
from lumirlib.training.muon import Muon
from lumirlib.training.pairs import epoch_batches, pair_generator
from lumirlib.training.stages import StageTraining
from lumirlib.training.validation import validate, validation_pairs
from lumirlib.training.weights import to_device, to_finer_levels, with_idle_forces

#: Besides at the end of each epoch and on interruption, a checkpoint is written when the last one is this old.
CHECKPOINT_SECONDS = 600.0


def make_optimizer(model: nn.Module, preset: Preset, name: str = "adam") -> torch.optim.Optimizer:
    """The optimizer of a row's training, "adam" or "muon", at the preset's initial learning rate."""
    kind = {"adam": torch.optim.Adam, "muon": Muon}[name]
    return kind(model.parameters(), lr=preset.learning_rate, amsgrad=preset.amsgrad)


class Trainer:
    """Trains one run; see the module's docstring for its files.

    Args:
        config: Configuration of the run.
        cohort: Cohort loaded at the preset's resolution, which is that of its last stage.
        out: The results folder.
        engine: Engine that computes it; of several processes each has a trainer, the first one writes.
        progress: Whether to show progress bars.
        start: Weights to start from, those that the configuration names; None for random ones.
        coarser: The same cohort at the other resolutions of the preset's stages.

    Raises:
        ValueError: a row that is not trained; a batch that cannot be shared among the processes; weights to start from
            that the configuration lacks, or that are lacking; a stage whose resolution no cohort has.
    """

    def __init__(
        self,
        config: RunConfig,
        cohort: Cohort,
        out: Path,
        engine: Engine,
        progress: bool = True,
        start: Mapping[str, torch.Tensor] | None = None,
        coarser: Sequence[Cohort] = (),
    ) -> None:
        self.config, self.engine, self.progress = config, engine, progress and engine.is_first
        self.folder = out / "checkpoints" / config.run
        self.log = out / "logs" / f"{config.run}.csv"
        preset, row = config.preset, config.row
        if row.trains_on == "nothing":
            raise ValueError(f"{row.name} is not trained")
        if row.base_row() != row:
            raise ValueError(f"{row.name} is not trained: train {row.base_row().name}")
        if preset.batch_size % engine.world_size:
            raise ValueError(
                f"batch_size must be a multiple of the {engine.world_size} processes that share it, got "
                f"{preset.batch_size}: set batch_size={engine.world_size}"
            )
        self.stages = [StageTraining.of(config, stage, (cohort, *coarser)) for stage in range(len(preset.each_stage))]
        self.state = TrainingState()
        self._enter(0)
        if (start is None) == bool(config.init_digest):
            named = config.preset.init if config.init_digest else "random weights"
            raise ValueError(f"{config.run} starts from {named}, got {'others' if start else 'none'}")
        if start is not None:
            check_weights(config.preset.init, start, self.model.state_dict())
            self.model.load_state_dict(start)
        self.saved_at = time.monotonic()

    def _enter(self, number: int, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Begin a stage, with a new optimizer, and with given weights or random ones."""
        self.number, self.stage = number, self.stages[number]
        torch.manual_seed(self.config.seed)
        self.model = to_device(self.stage.row.build(), self.engine.target)
        if weights is not None:
            self.model.load_state_dict(with_idle_forces(weights, self.model.state_dict()))
        self.optimizer = make_optimizer(self.model, self.stage.preset, self.stage.row.optimizer)
        self._called_model, self._called_optimizer = self.engine.prepare(self.model, self.optimizer)

    def _enter_next(self) -> None:
        before, after = self.stage.preset, self.stages[self.number + 1].preset
        finer = halvings(before.resolution_mm, after.resolution_mm)
        self._enter(self.number + 1, to_finer_levels(self.model.state_dict(), self.stage.row, finer))

    @property
    def best_path(self) -> Path:
        """The weights of the best epoch so far."""
        return self.folder / "best.pt"

    @property
    def last_path(self) -> Path:
        """Where the run stands, to go on from."""
        return self.folder / "last.pt"

    def save(self) -> None:
        """Write last.pt: weights, optimizer, where the run stands.

        The learning rate follows from the epoch, and every random number from seed, epoch and step, so neither a
        scheduler nor a generator has a state to be kept.
        """
        if self.engine.is_first:
            save_checkpoint(
                self.last_path,
                {
                    "config": self.config.as_dict(),
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "state": asdict(self.state),
                    "stage": self.number,
                },
            )
        self.saved_at = time.monotonic()

    def resume(self) -> bool:
        """Go on from last.pt where there is one; whether there was."""
        if not self.last_path.is_file():
            return False
        content = load_checkpoint(self.last_path)
        if content["config"] != self.config.as_dict():
            raise ValueError(f"{self.last_path} belongs to another configuration: {content['config']}")
        self.state = state = training_state(self.last_path, content)
        number = content.get("stage", 0)  # which the first checkpoints do not name
        if type(number) is not int or not 0 <= number < len(self.stages):
            raise ValueError(f"{self.last_path}: expected a stage from 0 to {len(self.stages) - 1}, got {number!r}")
        stage = self.stages[number]
        if not stage.first <= state.epoch <= stage.last or state.step > stage.steps:
            raise ValueError(
                f"{self.last_path}: expected epochs {stage.first} to {stage.last} of {stage.steps} steps in stage "
                f"{number + 1}, got epoch {state.epoch}, step {state.step}"
            )
        if number != self.number:
            self._enter(number)
        check_weights(self.last_path, content["model"], self.model.state_dict())
        self.model.load_state_dict(content["model"])
        load_optimizer(self.last_path, content, self.optimizer)
        return True

    def forget(self) -> None:
        """Remove the run's checkpoints, so that it starts anew."""
        if self.engine.is_first:
            for stale in (self.last_path, self.best_path):
                stale.unlink(missing_ok=True)
        self.engine.barrier()

    def run(self) -> None:
        """Train to the end, or go on to it."""
        preset, state, last = self.config.preset, self.state, self.stages[-1]
        if not state.history:
            before = self._validate(zero_displacement, last)
            if last.cohort.has_labels and math.isnan(before["val_dice"]):
                raise ValueError(f"{last.cohort.path}: no validation pair has a scored label on both sides")
            state.history.append({"epoch": 0, "steps": 0, **self._where(last), **before})
        session = here = f"{commit()}, {self.engine.describe()}"
        with (
            StopRequest() as stop,
            self.engine.reproducibly(),
            freed_memory_kept(),
            tqdm(
                total=sum(stage.steps * stage.preset.epochs for stage in self.stages),
                initial=state.step + sum(row["steps"] for row in state.history),
                desc=f"train {self.config.row.name}",
                unit="pair" if preset.batch_size == 1 else "step",
                disable=not self.progress,
            ) as bar,
        ):
            while state.epoch < preset.epochs:
                if state.epoch == self.stage.last:
                    self._enter_next()
                if len(self.stages) > 1:
                    session = f"{here}, stage {self.number + 1} at {self.stage.preset.resolution_mm:g} mm"
                if session not in state.trained_by:
                    state.trained_by.append(session)
                self._epoch(bar, stop)

    def _validate(self, method: nn.Module | Method, stage: StageTraining) -> dict[str, float]:
        pairs, window = validation_pairs(stage.cohort, stage.preset), stage.preset.window_voxels
        return validate(method, stage.cohort, pairs, self.engine.target, window, self.engine)

    def _where(self, stage: StageTraining) -> dict[str, float]:
        """Columns of the log that tell the stages of a run; none where there is one."""
        if len(self.stages) == 1:
            return {}
        return {"stage": self.stages.index(stage) + 1, "resolution_mm": stage.preset.resolution_mm}

    def batches(self) -> Iterator[tuple[Pair, ...]]:
        """This process's share of each batch that is left of the epoch under way."""
        engine, stage, state = self.engine, self.stage, self.state
        train, preset = stage.source.train, stage.preset
        batches = epoch_batches(train, self.config.seed, state.epoch, stage.steps, preset.batch_size)
        for batch in itertools.islice(batches, state.step, None):
            yield tuple(batch[engine.rank :: engine.world_size])

    def _epoch(self, bar: tqdm, stop: StopRequest) -> None:
        state, stage = self.state, self.stage
        rate = stage.learning_rate(state.epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        read = stage.source.stored_image if stage.row.trains_on == "images" else stage.source.label_volume
        with PairLoader(read, list(self.batches()), self.engine.target, workers=self.engine.readers) as loader:
            waited = 0.0
            for batch in loader:
                started = time.perf_counter()
                terms, stopping = self.step(batch, stop)
                terms["seconds"] = time.perf_counter() - started
                terms["waiting_seconds"], waited = loader.waited - waited, loader.waited
                for name, value in terms.items():
                    state.sums[name] = state.sums.get(name, 0.0) + value
                state.step += 1
                bar.update()
                epoch = f"{state.epoch + 1}/{self.config.preset.epochs}"
                bar.set_postfix(
                    {"epoch": epoch, "loss": f"{terms['loss']:.4f}"}
                    | ({"mm": f"{stage.preset.resolution_mm:g}"} if len(self.stages) > 1 else {}),
                    refresh=False,
                )
                if stopping or time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
                    self.save()
                if stopping:
                    self.engine.barrier()
                    stop.obey()
        found = self._validate(self.model, stage)
        row = {"epoch": state.epoch + 1, "steps": state.step, **self._where(stage)}
        row |= {name: total / state.step for name, total in state.sums.items()}
        row |= {**found, "learning_rate": rate}
        figure = found["val_dice"] if stage.cohort.has_labels else found["val_similarity"]
        if figure > state.best and self.number == len(self.stages) - 1:
            state.best, state.best_epoch = figure, row["epoch"]
            if self.engine.is_first:
                save_checkpoint(
                    self.best_path,
                    {"config": self.config.as_dict(), "model": self.model.state_dict(), "epoch": row["epoch"]} | found,
                )
        state.history.append(row)
        state.epoch, state.step, state.sums = state.epoch + 1, 0, {}
        # the checkpoint last: killed before it, the epoch is done again, and its row written again
        if self.engine.is_first:
            write_atomically(self.log, lambda to: pd.DataFrame(state.history).to_csv(to, index=False))
        self.save()
        if self.engine.sum([float(bool(stop.signal))])[0]:
            self.engine.barrier()
            stop.obey()

    def step(self, batch: Batch, stop: StopRequest) -> tuple[dict[str, float], bool]:
        """One step on this process's share of a batch: means over the whole batch, and whether to stop after it.

        Weights and optimizer are left as they were if a loss or a gradient is not finite.
        """
        row, preset, state, fabric = self.stage.row, self.stage.preset, self.state, self.engine.fabric
        self._called_optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        count = len(batch.pairs)
        parts = zip(batch.fixed.split(1), batch.moving.split(1), strict=True)
        for index, (fixed, moving) in enumerate(parts):
            place = state.step * preset.batch_size + index * self.engine.world_size + self.engine.rank
            generator = pair_generator(self.config.seed, state.epoch, place)
            with fabric.no_backward_sync(self._called_model, enabled=index + 1 < count):
                with fabric.autocast():
                    terms = row.loss_terms(self._called_model, fixed, moving, preset, generator)
                fabric.backward(terms["total"] / count)
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + float(term.detach())
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        finite = math.isfinite(sums["total"]) and math.isfinite(float(torch.nn.utils.get_total_norm(gradients)))
        *totals, broken, stopping = self.engine.sum(
            [*(value / preset.batch_size for value in sums.values()), float(not finite), float(bool(stop.signal))]
        )
        if broken:
            raise self._non_finite(batch, sums)
        self._called_optimizer.step()
        names = ("loss" if name == "total" else name for name in sums)
        return dict(zip(names, totals, strict=True)), bool(stopping)

    def _non_finite(self, batch: Batch, sums: dict[str, float]) -> NonFiniteLossError:
        """The error of a step that went wrong; its batch, with the weights before the step, is written to a file."""
        place = f"epoch {self.state.epoch + 1}, step {self.state.step + 1}"
        pairs = "; ".join(f"fixed {pair.fixed.image}, moving {pair.moving.image}" for pair in batch.pairs)
        path = self.folder / f"nonfinite_{place.replace(', ', '_').replace(' ', '')}_process{self.engine.rank}.pt"
        save_checkpoint(
            path,
            {
                "config": self.config.as_dict(),
                "model": self.model.state_dict(),
                "fixed": batch.fixed,
                "moving": batch.moving,
                "names": [pair.name for pair in batch.pairs],
            },
        )
        what = what_is_not_finite(
            self.stage.row, self.model, batch.fixed, batch.moving, self.stage.preset, sums["total"]
        )
        return NonFiniteLossError(f"{what} in {place}, {pairs}; weights are those before it; batch saved in {path}")
