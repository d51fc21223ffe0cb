"""Training: one loop for every variant, seeded, logged, resumable.

A run is named by its configuration; its files are

    <out>/checkpoints/<run>/last.pt   everything needed to go on
    <out>/checkpoints/<run>/best.pt   weights of the epoch with the best validation figure
    <out>/logs/<run>.csv              one row per epoch

each written atomically. Killed at any moment, the same call goes on from the last checkpoint.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from lumirlib import losses, metrics, spatial
from lumirlib.checkpoints import (
    TrainingState,
    check_weights,
    described_row,
    load_checkpoint,
    load_optimizer,
    save_checkpoint,
    shapes_of,
    training_state,
)
from lumirlib.data import Cohort, Pair, Subject, load_cohort
from lumirlib.data.loader import Batch, PairLoader
from lumirlib.engine import Engine, launched, pick_device
from lumirlib.evaluation import Method, zero_displacement
from lumirlib.files import write_atomically
from lumirlib.models.layout import place
from lumirlib.muon import Muon
from lumirlib.presets import Preset
from lumirlib.provenance import commit
from lumirlib.rows import Row, check_options, file_name
from lumirlib.variants import Variant

#: Besides at the end of each epoch and on interruption, a checkpoint is written when the last one is this old.
CHECKPOINT_SECONDS = 600.0


class NonFiniteLossError(RuntimeError):
    """A loss or a gradient became NaN or infinite.

    The message names the step, the pair, the level and the file with the batch.
    """


@dataclass(frozen=True)
class RunConfig:
    """What names a run: the same configuration gives the same files, and resumes.

    Attributes:
        variant: the row at its final width, as :meth:`Preset.apply` gives it: a variant of the paper's network, or a
            method of :mod:`lumirlib.methods`.
        preset: how it is trained, as the row adapts it.
        cohort: short name of the cohort, for file names.
        cohort_digest: :attr:`lumirlib.data.Cohort.digest`.
        seed: of the weights and of the order of pairs.
        init_digest: of the weights that training starts from, where the preset's `init` names some.
    """

    variant: Row
    preset: Preset
    cohort: str
    cohort_digest: str
    seed: int
    init_digest: str = ""

    def as_dict(self) -> dict[str, object]:
        """The configuration as plain values; options that came after the first runs only where they are used."""
        content = asdict(self)
        for part in ("variant", "preset"):
            for option in fields(getattr(self, part)):
                if option.metadata.get("unnamed_at_default") and content[part][option.name] == option.default:
                    del content[part][option.name]
        if not self.init_digest:
            del content["init_digest"]
        return content

    def digest(self) -> str:
        """Eight hexadecimal digits of the configuration (not of the code, the device or the versions)."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:8]

    @property
    def run(self) -> str:
        """Name of the run's files."""
        name = file_name(self.variant.name)
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


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a network, with the memory layout that its convolutions are fastest in as far as that has been measured."""
    return place(model, device, channels_last=device.type == "cpu")


def make_optimizer(model: nn.Module, preset: Preset, name: str = "adam") -> torch.optim.Optimizer:
    """The optimizer of a row's training, "adam" or "muon", at the preset's initial learning rate."""
    kind = {"adam": torch.optim.Adam, "muon": Muon}[name]
    return kind(model.parameters(), lr=preset.learning_rate, amsgrad=preset.amsgrad)


def spread(items: tuple, count: int | None) -> tuple:
    """`count` items spread evenly over the sequence; all where it is None or larger."""
    if count is None or count >= len(items):
        return tuple(items)
    return tuple(items[round(position)] for position in np.linspace(0, len(items) - 1, count))


def epoch_pairs(train: tuple[Subject, ...], seed: int, epoch: int, limit: int | None = None) -> Iterator[Pair]:
    """The pairs of one epoch: each scan is the moving image once, in random order, with a random other one fixed.

    They depend on nothing but the arguments, so that a run resumes in the middle of an epoch. A `limit` above the
    number of scans takes them again, in another order.
    """
    if len(train) < 2:
        raise ValueError(f"training needs at least 2 scans, the cohort has {len(train)}")
    generator = np.random.default_rng([seed, epoch])
    left = len(train) if limit is None else limit
    while left > 0:
        for moving in generator.permutation(len(train))[:left]:
            fixed = (moving + 1 + generator.integers(len(train) - 1)) % len(train)
            yield Pair(fixed=train[fixed], moving=train[moving])
        left -= len(train)


def with_third(pair: Pair, train: tuple[Subject, ...], seed: int, epoch: int, place: int) -> tuple[Pair, Pair]:
    """A pair that registers A to B, and one that registers B to C, a random third scan.

    Args:
        pair: A is its moving scan, B its fixed one.
        train: scans that C is drawn from.
        seed: of the run.
        epoch: under way.
        place: of the pair in the epoch.

    Raises:
        ValueError: fewer than three scans.
    """
    others = [subject for subject in train if subject not in (pair.fixed, pair.moving)]
    if not others:
        raise ValueError(f"triplets need at least 3 training scans, the cohort has {len(train)}")
    third = others[np.random.default_rng([seed, epoch, place]).integers(len(others))]
    return pair, Pair(fixed=third, moving=pair.fixed)


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


def load_model(path: str | Path, device: str = "auto", **bilateral: object) -> nn.Module:
    """The trained network of a best.pt, ready for ``model(fixed, moving)``.

    Args:
        path: of the checkpoint.
        device: "auto", "cpu", "cuda" ...
        bilateral: `bilateral_window`, `bilateral_sigma` and `bilateral_sigma_range` of :class:`Variant`, to put a
            bilateral filter with these widths behind a network that was trained without one.

    Raises:
        FileNotFoundError, ValueError: as :func:`lumirlib.checkpoints.load_checkpoint`; weights that do not fit; a
            filter for a network that has one.
    """
    target = pick_device(device)
    content = load_checkpoint(path)
    variant = described_row(path, content)
    foreign = [name for name in bilateral if not name.startswith("bilateral_")]
    if foreign:
        raise ValueError(f"only a bilateral filter can be added to trained weights, got {', '.join(foreign)}")
    if bilateral and not isinstance(variant, Variant):
        raise ValueError(f"{path}: no bilateral filter can be put behind {variant.name}")
    if bilateral and variant.bilateral_window:
        raise ValueError(f"{path}: {variant.name} was trained with a bilateral filter; none can be put behind it")
    check_weights(path, content["model"], shapes_of(path, variant))
    model = to_device(replace(variant, **bilateral).build(), target)
    model.load_state_dict(content["model"], strict=not bilateral)
    return model.eval()


class _StopRequest:
    """Holds back Ctrl-C and SIGTERM until a step is complete, so that what is saved is whole.

    Ctrl-C twice stops at once, but not under torchrun, which passes one on in several forms. Outside the main
    thread, where Python takes no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> _StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if number == self.signal == signal.SIGINT and not launched():
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def obey(self) -> None:
        """Stop: after Ctrl-C by KeyboardInterrupt, else, as after SIGTERM, by exit status 143."""
        if self.signal == signal.SIGINT and not launched():
            raise KeyboardInterrupt("stopped after saving a checkpoint; the same call goes on from here")
        raise SystemExit(128 + signal.SIGTERM)


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
        preset, row = config.preset, config.variant
        if row.trains_on == "nothing":
            raise ValueError(f"{row.name} is not trained")
        if row.trained() != row:
            raise ValueError(f"{row.name} is not trained: train {row.trained().name}")
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
        self.validation = spread(cohort.labelled_pairs or cohort.validation_pairs, preset.validation_pairs)
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
            _StopRequest() as stop,
            self.engine.reproducibly(),
            tqdm(total=preset.epochs * self.steps, initial=done, desc=f"train {self.config.variant.name}",
                 unit="pair" if preset.batch_size == 1 else "step", disable=not self.progress) as bar,
        ):  # fmt: skip
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
        triplets, source = self.config.variant.trains_on_triplets, self.source.train
        for step in range(self.steps):
            batch = tuple(itertools.islice(pairs, preset.batch_size))
            if step < state.step:
                continue
            if triplets:
                first = step * preset.batch_size
                batch = [with_third(pair, source, self.config.seed, state.epoch, first + place)
                         for place, pair in enumerate(batch)]  # fmt: skip
                yield tuple(itertools.chain.from_iterable(batch[engine.rank :: engine.world_size]))
            else:
                yield batch[engine.rank :: engine.world_size]

    def _epoch(self, bar: tqdm, stop: _StopRequest) -> None:
        preset, state = self.config.preset, self.state
        rate = preset.learning_rate * (1 - state.epoch / preset.epochs) ** preset.decay_power
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        read = self.source.stored_image if self.config.variant.trains_on == "images" else self.source.label_volume
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

    def _step(self, batch: Batch, stop: _StopRequest) -> tuple[dict[str, float], bool]:
        """One step on this process's share of a batch: means over the whole batch, and whether to stop after it.

        Weights and optimizer are left as they were if a loss or a gradient is not finite.
        """
        preset, state, fabric = self.config.preset, self.state, self.engine.fabric
        self._called_optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        together = 2 if self.config.variant.trains_on_triplets else 1
        count = len(batch.pairs) // together
        parts = zip(batch.fixed.split(together), batch.moving.split(together), strict=True)
        for index, (fixed, moving) in enumerate(parts):
            # of this pair alone, so that a run resumes in the middle of an epoch, on any number of processes
            place = state.step * preset.batch_size + index * self.engine.world_size + self.engine.rank
            seeds = np.random.SeedSequence([self.config.seed, state.epoch, place])
            generator = torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
            with fabric.no_backward_sync(self._called_model, enabled=index + 1 < count):
                with fabric.autocast():
                    terms = self.config.variant.loss_terms(self._called_model, fixed, moving, preset, generator)
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
                "config": self.config.as_dict(), "model": self.model.state_dict(), "fixed": batch.fixed,
                "moving": batch.moving, "names": [pair.name for pair in batch.pairs],
            },
        )  # fmt: skip
        if math.isfinite(sums["total"]):
            bad = [name for name, parameter in self.model.named_parameters()
                   if parameter.grad is not None and not parameter.grad.isfinite().all()]  # fmt: skip
            what = f"the gradient of {', '.join(bad) or 'another process'} is not finite"
        else:
            where = [
                found for fixed, moving in zip(batch.fixed.split(1), batch.moving.split(1), strict=True)
                if (found := first_non_finite(self.config.variant, self.model, fixed, moving, self.config.preset))
            ]  # fmt: skip
            what = f"the loss became {sums['total']}"
            what += f" (first in {where[0]})" if where else ""
        return NonFiniteLossError(f"{what} in {place}, {pairs}; weights are those before it; batch saved in {path}")


@torch.no_grad()
def first_non_finite(row: Row, model: nn.Module, fixed: torch.Tensor, moving: torch.Tensor, preset: Preset) -> str:
    """Where the loss of one pair is first not finite, from the coarsest level: "the similarity of level 2".

    Args:
        row: what `model` was built from.
        model: its network.
        fixed: ``(1, 1, D, H, W)``.
        moving: likewise.
        preset: as for :meth:`lumirlib.rows.Row.loss_terms`.

    Returns:
        Empty where all is finite, or the row is no variant of the paper's network.
    """
    if not isinstance(row, Variant):
        return ""
    predicted = model.fields(fixed, moving)
    shapes = [tuple(field.shape[2:]) for field in predicted.displacements[:: row.passes]]
    images = [losses.gaussian_pyramid(image, shapes) for image in (moving, fixed)]
    for entry in reversed(range(len(predicted.velocities))):
        level = entry // row.passes
        velocity, displacement = predicted.velocities[entry], predicted.displacements[entry]
        for name, values in (("velocity", velocity), ("displacement", displacement)):
            if not values.isfinite().all():
                return f"the {name} of level {level}"
        terms = losses.registration_loss(
            *(pyramid[level] for pyramid in images), [displacement], [velocity],
            window=preset.window, similarity=preset.similarity,
        )  # fmt: skip
        for name in ("similarity", "smoothness"):
            if not terms[name].isfinite():
                return f"the {name} of level {level}"
    return ""


def training_source(row: Row, cohort: Cohort) -> Cohort:
    """The cohort whose training people a row learns from.

    That is `cohort`, but for a row that trains on label volumes where training scans have none: then it is the
    embedded cohort at the same resolution, so that no label of a validation person is used.

    Raises:
        ValueError: the embedded cohort's grid is not that of `cohort`.
    """
    if row.trains_on != "labels" or all(subject.labels for subject in cohort.train):
        return cohort
    embedded = load_cohort("embedded", cohort.resolution_mm)
    if embedded.shape != cohort.shape:
        raise ValueError(
            f"{row.name} trains on label volumes, which the training scans of {cohort.path} lack; those of the "
            f"embedded cohort are {embedded.shape} voxels, not {cohort.shape}"
        )
    return embedded


def _run_as_it_is(config: RunConfig, cohort: Cohort, device: torch.device) -> TrainingResult:
    """The result of a method that is not trained: its figures on the validation pairs, beside zero displacement's."""
    preset = config.preset
    pairs = spread(cohort.labelled_pairs or cohort.validation_pairs, preset.validation_pairs)
    method = config.variant.build()
    history = [
        {"epoch": epoch, "steps": 0} | validate(one, cohort, pairs, device, preset.window)
        for epoch, one in enumerate((zero_displacement, method))
    ]
    return TrainingResult(method, pd.DataFrame(history), 1, float(history[1]["val_dice"]), [], None, None)


def method_of_weights(config: RunConfig, checkpoint: str | Path, device: torch.device) -> nn.Module:
    """What a run is evaluated by: the network of a checkpoint with what its row puts behind it.

    Args:
        config: of the run; its row may be one that uses another's weights, such as "BF-post" or "IO".
        checkpoint: best.pt of the row that is trained.
        device: where it works.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_model`.
    """
    row, widths = config.variant, {}
    if isinstance(row, Variant) and row.bilateral_window and row.bilateral_mode == "post":
        widths = {name: getattr(row, name) for name in ("bilateral_window", "bilateral_sigma", "bilateral_sigma_range")}
    return row.as_method(load_model(checkpoint, str(device), **widths), config.preset).eval()


def _from_trained(config: RunConfig, trained: TrainingResult, cohort: Cohort, device: torch.device) -> TrainingResult:
    """The result of a run with what is put behind its weights: a bilateral filter, instance optimization."""
    preset = config.preset
    method = method_of_weights(config, trained.checkpoint, device)
    pairs = spread(cohort.labelled_pairs or cohort.validation_pairs, preset.validation_pairs)
    found = validate(method, cohort, pairs, device, preset.window)
    return replace(trained, model=method, val_dice=found["val_dice"])


def train_in_processes(
    config: RunConfig,
    out: Path,
    processes: int,
    arguments: Sequence[str],
    resume: bool = True,
    progress: bool = True,
) -> None:
    """Train a run to its end in several processes of this machine, started by torchrun.

    Progress is shown by epochs. What stops this process, SIGTERM too, asks the others to save a checkpoint, and waits
    for that.

    Args:
        config: what `arguments` stand for.
        out: results folder.
        processes: how many.
        arguments: of the run, for `python -m lumirlib.train`.
        resume: False starts anew.
        progress: show a progress bar.

    Raises:
        RuntimeError: one of them broke; the message ends with what it said.
    """
    log = out / "logs" / f"{config.run}.csv"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        "-m", "lumirlib.train", *arguments, "--train-only", "--quiet", *([] if resume else ["--restart"]),
    ]  # fmt: skip
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        tqdm(total=config.preset.epochs, desc=f"train {config.variant.name} in {processes} processes", unit="epoch",
             disable=not progress) as bar,
        _StopRequest() as stop,
    ):  # fmt: skip
        # a session of its own: Ctrl-C reaches it once, by us
        child = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
        try:
            while child.poll() is None and not stop.signal:
                time.sleep(0.2)
                if log.is_file():
                    bar.update(max(0, len(pd.read_csv(log)) - 1 - bar.n))
            if stop.signal:
                stop.obey()
        except BaseException:
            child.send_signal(signal.SIGTERM)
            child.wait()
            raise
        if child.returncode:
            said.seek(0)
            tail = said.read()[-4000:]
            raise RuntimeError(f"training in {processes} processes ended with status {child.returncode}:\n{tail}")


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
    if config.variant.trains_on == "nothing":
        return _run_as_it_is(config, cohort, engine.target)
    base = config.variant.trained()
    if base != config.variant:
        trained = train(replace(config, variant=base), cohort, out, engine, resume, progress, start)
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
