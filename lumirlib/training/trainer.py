"""Training: one loop for every variant, seeded, logged, resumable.

A run is named by its configuration; its files are

    <out>/checkpoints/<run>/last.pt   everything needed to go on
    <out>/checkpoints/<run>/best.pt   weights of the epoch with the best validation figure
    <out>/logs/<run>.csv              one row per epoch

each written atomically. Killed at any moment, the same call goes on from the last checkpoint.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from lumirlib import losses, metrics, spatial
from lumirlib.data import Cohort, Pair
from lumirlib.data.loader import Batch, PairLoader
from lumirlib.evaluation import Method, zero_displacement
from lumirlib.files import write_atomically
from lumirlib.methods.base import Preset
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
from lumirlib.training.divergence import NonFiniteLossError, first_non_finite
from lumirlib.training.engine import Engine
from lumirlib.training.interrupts import StopRequest
from lumirlib.training.muon import Muon
from lumirlib.training.pairs import epoch_pairs, evenly_spaced, training_source, with_third
from lumirlib.training.weights import load_model, method_of_weights, to_device

#: Besides at the end of each epoch and on interruption, a checkpoint is written when the last one is this old.
CHECKPOINT_SECONDS = 600.0


@dataclass(frozen=True)
class TrainingResult:
    """A finished training.

    Attributes:
        model: the network with the weights of the best epoch, in evaluation mode, or what is run where nothing
            is trained.
        history: of the training, one row per epoch, the first being zero displacement: epoch, steps; loss, its terms
            (similarity, smoothness ...) and seconds, means over the steps; val_dice, val_similarity, val_ndv_percent,
            learning_rate.
        best_epoch: whose weights these are.
        val_dice: Dice of `model` on the validation pairs that chose it, in [0, 1]; NaN without labels.
        trained_by: "commit, device" of every session that took part.
        log: path of the CSV; None where nothing is trained.
        checkpoint: path of the best weights; likewise.
    """

    model: nn.Module | Method
    history: pd.DataFrame
    best_epoch: int
    val_dice: float
    trained_by: list[str]
    log: Path | None
    checkpoint: Path | None


def make_optimizer(model: nn.Module, preset: Preset, name: str = "adam") -> torch.optim.Optimizer:
    """The optimizer of a row's training, "adam" or "muon", at the preset's initial learning rate."""
    kind = {"adam": torch.optim.Adam, "muon": Muon}[name]
    return kind(model.parameters(), lr=preset.learning_rate, amsgrad=preset.amsgrad)


@torch.no_grad()
def _figures_of_pair(
    method: nn.Module | Method, cohort: Cohort, pair: Pair, device: torch.device, window: int, engine: Engine | None
) -> tuple[float, float, float]:
    """Dice (NaN without labels), similarity and NDV of one pair."""
    fixed, moving = cohort.image(pair.fixed).to(device), cohort.image(pair.moving).to(device)
    with engine.fabric.autocast() if engine else nullcontext():
        displacement = method(fixed, moving)
    similarity = 1 - float(losses.ncc_loss(spatial.warp(moving, displacement), fixed, window))
    folds = metrics.ndv_percent(displacement, moving > 0)
    if not (pair.fixed.labels and pair.moving.labels):
        return math.nan, similarity, folds
    moving_labels = cohort.label_volume(pair.moving).to(device)
    warped = spatial.warp(moving_labels, displacement, mode="nearest")
    fixed_labels = cohort.label_volume(pair.fixed).to(device)
    return metrics.dice(warped, fixed_labels, moving_labels, cohort.labels), similarity, folds


def validate(
    method: nn.Module | Method,
    cohort: Cohort,
    pairs: tuple[Pair, ...],
    device: torch.device,
    window: int,
    engine: Engine | None = None,
) -> dict[str, float]:
    """Figures of one epoch, each a mean over `pairs`.

    Args:
        method: network or function.
        cohort: of the pairs.
        pairs: to take.
        device: where.
        window: of the NCC.
        engine: whose precision is taken, and whose processes share the pairs; None for plain float32 and one process.

    Returns:
        "val_dice" (over the pairs that have labels in common, NaN if none has) and "val_similarity"
        (``1 - NCC loss``), higher is better, and "val_ndv_percent", masked by the moving image, lower is better.
    """
    was_training = isinstance(method, nn.Module) and method.training
    if was_training:
        method.eval()
    own = pairs[engine.rank :: engine.world_size] if engine else pairs
    found = [_figures_of_pair(method, cohort, pair, device, window, engine) for pair in own]
    dices, similarities, folds = zip(*(engine.gather(found) if engine else found), strict=True)
    if was_training:
        method.train()
    return {
        "val_dice": metrics.nan_mean(np.array(dices)),
        "val_similarity": float(np.mean(similarities)),
        "val_ndv_percent": float(np.mean(folds)),
    }


class Trainer:
    """Trains one run; see the module's docstring for its files.

    Args:
        config: what to train.
        cohort: loaded at the preset's resolution.
        out: the results folder.
        engine: how to compute it; of several processes each has a trainer, the first one writes.
        progress: show progress bars.
        start: weights to start from, those that the configuration names; None for random ones.

    Raises:
        ValueError: a row that is not trained; a batch that cannot be shared among the processes; weights to start from
            that the configuration lacks, or that are lacking.
    """

    def __init__(
        self,
        config: RunConfig,
        cohort: Cohort,
        out: Path,
        engine: Engine,
        progress: bool = True,
        start: Mapping[str, torch.Tensor] | None = None,
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
        self.cohort = cohort
        self.source = training_source(row, cohort)
        #: Of an epoch, each with one batch.
        self.steps = math.ceil(min(len(cohort.train), preset.steps_per_epoch or len(cohort.train)) / preset.batch_size)
        torch.manual_seed(config.seed)
        self.model = to_device(row.build(), engine.target)
        if (start is None) == bool(config.init_digest):
            named = config.preset.init if config.init_digest else "random weights"
            raise ValueError(f"{config.run} starts from {named}, got {'others' if start else 'none'}")
        if start is not None:
            check_weights(config.preset.init, start, self.model.state_dict())
            self.model.load_state_dict(start)
        self.optimizer = make_optimizer(self.model, preset, row.optimizer)
        self._called_model, self._called_optimizer = engine.prepare(self.model, self.optimizer)
        self.state = TrainingState()
        self.validation = evenly_spaced(cohort.labelled_pairs or cohort.validation_pairs, preset.validation_pairs)
        self.saved_at = time.monotonic()

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
        self.state = training_state(self.last_path, content)
        if self.state.epoch > self.config.preset.epochs or self.state.step > self.steps:
            raise ValueError(
                f"{self.last_path}: expected at most {self.config.preset.epochs} epochs of {self.steps} steps, "
                f"got epoch {self.state.epoch}, step {self.state.step}"
            )
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
        preset, state = self.config.preset, self.state
        done = state.epoch * self.steps + state.step
        if not state.history:
            before = self._validate(zero_displacement)
            if self.cohort.has_labels and math.isnan(before["val_dice"]):
                raise ValueError(f"{self.cohort.path}: no validation pair has a scored label on both sides")
            state.history.append({"epoch": 0, "steps": 0} | before)
        session = f"{commit()}, {self.engine.describe()}"
        if state.epoch < preset.epochs and session not in state.trained_by:
            state.trained_by.append(session)
        with (
            StopRequest() as stop,
            self.engine.reproducibly(),
            tqdm(
                total=preset.epochs * self.steps,
                initial=done,
                desc=f"train {self.config.row.name}",
                unit="pair" if preset.batch_size == 1 else "step",
                disable=not self.progress,
            ) as bar,
        ):
            while state.epoch < preset.epochs:
                self._epoch(bar, stop)

    def _validate(self, method: nn.Module | Method) -> dict[str, float]:
        return validate(
            method, self.cohort, self.validation, self.engine.target, self.config.preset.window, self.engine
        )

    def _batches(self) -> Iterator[tuple[Pair, ...]]:
        """This process's share of each batch that is left of the epoch under way; of triplets both pairs in turn."""
        preset, engine, state = self.config.preset, self.engine, self.state
        pairs = epoch_pairs(self.source.train, self.config.seed, state.epoch, self.steps * preset.batch_size)
        triplets, source = self.config.row.trains_on_triplets, self.source.train
        for step in range(self.steps):
            batch = tuple(itertools.islice(pairs, preset.batch_size))
            if step < state.step:
                continue
            if triplets:
                first = step * preset.batch_size
                batch = [
                    with_third(pair, source, self.config.seed, state.epoch, first + place)
                    for place, pair in enumerate(batch)
                ]
                yield tuple(itertools.chain.from_iterable(batch[engine.rank :: engine.world_size]))
            else:
                yield batch[engine.rank :: engine.world_size]

    def _epoch(self, bar: tqdm, stop: StopRequest) -> None:
        preset, state = self.config.preset, self.state
        rate = preset.learning_rate * (1 - state.epoch / preset.epochs) ** preset.decay_power
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        read = self.source.stored_image if self.config.row.trains_on == "images" else self.source.label_volume
        with PairLoader(read, list(self._batches()), self.engine.target, workers=self.engine.readers) as loader:
            waited = 0.0
            for batch in loader:
                started = time.perf_counter()
                terms, stopping = self._step(batch, stop)
                terms["seconds"] = time.perf_counter() - started
                terms["waiting_seconds"], waited = loader.waited - waited, loader.waited
                for name, value in terms.items():
                    state.sums[name] = state.sums.get(name, 0.0) + value
                state.step += 1
                bar.update()
                bar.set_postfix(epoch=f"{state.epoch + 1}/{preset.epochs}", loss=f"{terms['loss']:.4f}", refresh=False)
                if stopping or time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
                    self.save()
                if stopping:
                    self.engine.barrier()
                    stop.obey()
        found = self._validate(self.model)
        row = {"epoch": state.epoch + 1, "steps": state.step}
        row |= {name: total / state.step for name, total in state.sums.items()}
        row |= {**found, "learning_rate": rate}
        figure = found["val_dice"] if self.cohort.has_labels else found["val_similarity"]
        if figure > state.best:
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

    def _step(self, batch: Batch, stop: StopRequest) -> tuple[dict[str, float], bool]:
        """One step on this process's share of a batch: means over the whole batch, and whether to stop after it.

        Weights and optimizer are left as they were if a loss or a gradient is not finite.
        """
        preset, state, fabric = self.config.preset, self.state, self.engine.fabric
        self._called_optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        together = 2 if self.config.row.trains_on_triplets else 1
        count = len(batch.pairs) // together
        parts = zip(batch.fixed.split(together), batch.moving.split(together), strict=True)
        for index, (fixed, moving) in enumerate(parts):
            # of this pair alone, so that a run resumes in the middle of an epoch, on any number of processes
            place = state.step * preset.batch_size + index * self.engine.world_size + self.engine.rank
            seeds = np.random.SeedSequence([self.config.seed, state.epoch, place])
            generator = torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
            with fabric.no_backward_sync(self._called_model, enabled=index + 1 < count):
                with fabric.autocast():
                    terms = self.config.row.loss_terms(self._called_model, fixed, moving, preset, generator)
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
        if math.isfinite(sums["total"]):
            bad = [
                name
                for name, parameter in self.model.named_parameters()
                if parameter.grad is not None and not parameter.grad.isfinite().all()
            ]
            what = f"the gradient of {', '.join(bad) or 'another process'} is not finite"
        else:
            where = [
                found
                for fixed, moving in zip(batch.fixed.split(1), batch.moving.split(1), strict=True)
                if (found := first_non_finite(self.config.row, self.model, fixed, moving, self.config.preset))
            ]
            what = f"the loss became {sums['total']}"
            what += f" (first in {where[0]})" if where else ""
        return NonFiniteLossError(f"{what} in {place}, {pairs}; weights are those before it; batch saved in {path}")


def _run_as_it_is(config: RunConfig, cohort: Cohort, device: torch.device) -> TrainingResult:
    """The result of a method that is not trained: its figures on the validation pairs, beside zero displacement's."""
    preset = config.preset
    pairs = evenly_spaced(cohort.labelled_pairs or cohort.validation_pairs, preset.validation_pairs)
    method = config.row.build()
    history = [
        {"epoch": epoch, "steps": 0} | validate(one, cohort, pairs, device, preset.window)
        for epoch, one in enumerate((zero_displacement, method))
    ]
    return TrainingResult(method, pd.DataFrame(history), 1, float(history[1]["val_dice"]), [], None, None)


def _from_trained(config: RunConfig, trained: TrainingResult, cohort: Cohort, device: torch.device) -> TrainingResult:
    """The result of a run with what is put behind its weights: a bilateral filter, instance optimization."""
    preset = config.preset
    method = method_of_weights(config, trained.checkpoint, device)
    pairs = evenly_spaced(cohort.labelled_pairs or cohort.validation_pairs, preset.validation_pairs)
    found = validate(method, cohort, pairs, device, preset.window)
    return replace(trained, model=method, val_dice=found["val_dice"])


def train(
    config: RunConfig,
    cohort: Cohort,
    out: str | Path,
    engine: Engine | str = "auto",
    resume: bool = True,
    progress: bool = True,
    start: Mapping[str, torch.Tensor] | None = None,
) -> TrainingResult:
    """Train a run to its end, from its last checkpoint where there is one.

    A variant with "BF-post" or "IO" is not trained: the run of the same variant without them is, or its finished
    checkpoint is taken, and filter and instance optimization are put behind its weights.

    Args:
        config: from :func:`make_config`.
        cohort: loaded at the preset's resolution.
        out: results folder.
        engine: how to compute it, or a device's name. Where torchrun started several processes, each calls this, on a
            file system that they share.
        resume: False starts anew and overwrites the run's checkpoints.
        progress: show progress bars.
        start: as for :class:`Trainer`.

    Returns:
        The network of the best epoch and the log.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite.
        ValueError: a checkpoint that is torn or foreign, or a cohort without validation pairs.
    """
    engine = engine if isinstance(engine, Engine) else Engine(engine)
    if config.row.trains_on == "nothing":
        return _run_as_it_is(config, cohort, engine.target)
    base = config.row.base_row()
    if base != config.row:
        trained = train(replace(config, row=base), cohort, out, engine, resume, progress, start)
        return _from_trained(config, trained, cohort, engine.target)
    if not cohort.validation_pairs:
        raise ValueError(f"{cohort.path}: names no validation pairs, which training needs to choose its best epoch")
    trainer = Trainer(config, cohort, Path(out), engine, progress, start)
    if resume:
        trainer.resume()
    else:
        trainer.forget()
    trainer.run()
    engine.barrier()
    return TrainingResult(
        model=load_model(trainer.best_path, str(engine.target)),
        history=pd.DataFrame(trainer.state.history),
        best_epoch=trainer.state.best_epoch,
        val_dice=float(trainer.state.history[trainer.state.best_epoch]["val_dice"]),
        trained_by=trainer.state.trained_by,
        log=trainer.log,
        checkpoint=trainer.best_path,
    )
