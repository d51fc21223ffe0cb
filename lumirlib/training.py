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
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from lumirlib import losses, metrics, spatial
from lumirlib.data import Cohort, Pair, Subject, load_cohort
from lumirlib.evaluation import Method, zero_displacement
from lumirlib.files import write_atomically
from lumirlib.methods import row_from_options
from lumirlib.presets import Preset
from lumirlib.provenance import commit, describe_device
from lumirlib.rows import Row, check_options, file_name
from lumirlib.variants import Variant

CHECKPOINT_FORMAT = "lumirlib-checkpoint-1"
#: Besides at the end of each epoch and on interruption, a checkpoint is written when the last one is this old.
CHECKPOINT_SECONDS = 600.0


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the message names the step and the pair."""


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
    """

    variant: Row
    preset: Preset
    cohort: str
    cohort_digest: str
    seed: int

    def as_dict(self) -> dict[str, object]:
        """The configuration as plain values; options that came after the first runs only where they are used."""
        content = asdict(self)
        for option in fields(self.variant):
            if option.metadata.get("unnamed_at_default") and getattr(self.variant, option.name) == option.default:
                del content["variant"][option.name]
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


@dataclass
class TrainingState:
    """Where a run stands.

    Attributes:
        epoch: epochs completed.
        step: steps completed within the epoch under way.
        best: best validation figure so far (see :func:`validate`).
        best_epoch: epoch that reached it.
        sums: running sums of the epoch under way.
        trained_by: "commit, device" of every session that took part.
        history: one row per completed epoch, as in the CSV log; epoch 0 is zero displacement.
    """

    epoch: int = 0
    step: int = 0
    best: float = -math.inf
    best_epoch: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    trained_by: list[str] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class TrainingResult:
    """A finished training.

    Attributes:
        model: the network with the weights of the best epoch, in evaluation mode, or what is run where nothing
            is trained.
        history: of the training, one row per epoch, the first being zero displacement: epoch, steps; loss, similarity,
            smoothness and seconds, means over the steps; val_dice, val_similarity, val_ndv_percent, learning_rate.
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


def pick_device(device: str = "auto") -> torch.device:
    """The device of a name; "auto" is the GPU where there is one. ValueError for one that cannot be had."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that it lacks
        raise ValueError(f"device must be auto, cpu or a device of this machine, got {device!r}: {error}") from error
    return chosen


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a network, with the memory layout that its convolutions are fastest in."""
    # oneDNN's 3-D convolutions on the CPU ran 1.3 to 6 times faster in channels-last; same results to rounding
    layout = torch.channels_last_3d if device.type == "cpu" else torch.contiguous_format
    return model.to(device=device, memory_format=layout)


def make_optimizer(model: nn.Module, preset: Preset) -> torch.optim.Optimizer:
    """The optimizer that every row is trained with, at the preset's initial learning rate."""
    return torch.optim.Adam(model.parameters(), lr=preset.learning_rate, amsgrad=preset.amsgrad)


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


@torch.no_grad()
def validate(
    method: nn.Module | Method, cohort: Cohort, pairs: tuple[Pair, ...], device: torch.device, window: int
) -> dict[str, float]:
    """Figures of one epoch, each a mean over `pairs`.

    Returns:
        "val_dice" (over the pairs that have labels in common, NaN if none has) and "val_similarity"
        (``1 - NCC loss``), higher is better, and "val_ndv_percent", masked by the moving image, lower is better.
    """
    was_training = isinstance(method, nn.Module) and method.training
    if was_training:
        method.eval()
    dices, similarities, folds = [], [], []
    for pair in pairs:
        fixed, moving = cohort.image(pair.fixed).to(device), cohort.image(pair.moving).to(device)
        displacement = method(fixed, moving)
        similarities.append(1 - float(losses.ncc_loss(spatial.warp(moving, displacement), fixed, window)))
        folds.append(metrics.ndv_percent(displacement, moving > 0))
        if pair.fixed.labels and pair.moving.labels:
            moving_labels = cohort.label_volume(pair.moving).to(device)
            warped = spatial.warp(moving_labels, displacement, mode="nearest")
            fixed_labels = cohort.label_volume(pair.fixed).to(device)
            dices.append(metrics.dice(warped, fixed_labels, moving_labels, cohort.labels))
    if was_training:
        method.train()
    return {
        "val_dice": metrics.nan_mean(np.array(dices)),
        "val_similarity": float(np.mean(similarities)),
        "val_ndv_percent": float(np.mean(folds)),
    }


def save_checkpoint(path: Path, content: dict) -> None:
    """Write a checkpoint atomically; a disk that is full leaves the previous one as it was."""
    write_atomically(path, lambda to: torch.save({"format": CHECKPOINT_FORMAT, **content}, to))


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict:
    """Read a checkpoint (tensors and plain values only, no pickled code).

    Raises:
        FileNotFoundError: no such file.
        ValueError: torn, or not written by this package.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many types for a torn or foreign file
        raise ValueError(f"cannot read {path} as a checkpoint (torn or foreign?): {error}") from error
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this package: expected format {CHECKPOINT_FORMAT!r}")
    return content


def load_model(path: str | Path, device: str = "auto", **bilateral: object) -> nn.Module:
    """The trained network of a best.pt, ready for ``model(fixed, moving)``.

    Args:
        path: of the checkpoint.
        device: "auto", "cpu", "cuda" ...
        bilateral: `bilateral_window`, `bilateral_sigma` and `bilateral_sigma_range` of :class:`Variant`, to put a
            bilateral filter with these widths behind a network that was trained without one.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_checkpoint`; a filter for a network that has one.
    """
    target = pick_device(device)
    content = load_checkpoint(path, target)
    variant = row_from_options(content["config"]["variant"])
    foreign = [name for name in bilateral if not name.startswith("bilateral_")]
    if foreign:
        raise ValueError(f"only a bilateral filter can be added to trained weights, got {', '.join(foreign)}")
    if bilateral and not isinstance(variant, Variant):
        raise ValueError(f"{path}: no bilateral filter can be put behind {variant.name}")
    if bilateral and variant.bilateral_window:
        raise ValueError(f"{path}: {variant.name} was trained with a bilateral filter; none can be put behind it")
    model = to_device(replace(variant, **bilateral).build(), target)
    found = model.load_state_dict(content["model"], strict=False)
    missing = [key for key in found.missing_keys if not (bilateral and key.startswith("bilateral_filter."))]
    if missing or found.unexpected_keys:
        raise ValueError(f"{path}: weights do not fit the network: {missing + found.unexpected_keys}")
    return model.eval()


class _StopRequest:
    """Holds back Ctrl-C and SIGTERM until a step is complete, so that what is saved is whole.

    A second Ctrl-C stops at once. Outside the main thread, where Python takes no signals, it does nothing.
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
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def obey(self) -> None:
        """Stop now if a signal has come: Ctrl-C as KeyboardInterrupt, SIGTERM as exit status 143."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt("stopped after saving a checkpoint; the same call goes on from here")
        if self.signal:
            raise SystemExit(128 + self.signal)


class Trainer:
    """Trains one run; see the module's docstring for its files.

    Args:
        config: what to train.
        cohort: loaded at the preset's resolution.
        out: the results folder.
        device: where to train.
        progress: show progress bars.
    """

    def __init__(
        self, config: RunConfig, cohort: Cohort, out: Path, device: torch.device, progress: bool = True
    ) -> None:
        self.config, self.cohort, self.device, self.progress = config, cohort, device, progress
        self.folder = out / "checkpoints" / config.run
        self.log = out / "logs" / f"{config.run}.csv"
        preset, row = config.preset, config.variant
        if row.trains_on == "nothing":
            raise ValueError(f"{row.name} is not trained")
        if trained_row(row) != row:
            raise ValueError(f"{row.name} is not trained: train {trained_row(row).name}")
        self.source, self.steps = (
            training_source(row, cohort),
            min(len(cohort.train), preset.steps_per_epoch or len(cohort.train)),
        )
        torch.manual_seed(config.seed)
        self.model = to_device(row.build(), device)
        self.optimizer = make_optimizer(self.model, preset)
        self.state = TrainingState()
        self.validation = spread(cohort.labelled_pairs or cohort.validation_pairs, preset.validation_pairs)
        self.saved_at = time.monotonic()

    @property
    def best_path(self) -> Path:
        return self.folder / "best.pt"

    @property
    def last_path(self) -> Path:
        return self.folder / "last.pt"

    def save(self) -> None:
        """Write last.pt."""
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
        content = load_checkpoint(self.last_path, self.device)
        if content["config"] != self.config.as_dict():
            raise ValueError(f"{self.last_path} belongs to another configuration: {content['config']}")
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.state = TrainingState(**content["state"])
        return True

    def run(self) -> None:
        """Train to the end, or go on to it."""
        preset, state = self.config.preset, self.state
        done = state.epoch * self.steps + state.step
        if not state.history:
            before = validate(zero_displacement, self.cohort, self.validation, self.device, preset.window)
            if self.cohort.has_labels and math.isnan(before["val_dice"]):
                raise ValueError(f"{self.cohort.path}: no validation pair has a scored label on both sides")
            state.history.append({"epoch": 0, "steps": 0} | before)
        session = f"{commit()}, {describe_device(self.device)}"
        if state.epoch < preset.epochs and session not in state.trained_by:
            state.trained_by.append(session)
        with (
            _StopRequest() as stop,
            tqdm(total=preset.epochs * self.steps, initial=done, desc=f"train {self.config.variant.name}",
                 unit="pair", disable=not self.progress) as bar,
        ):  # fmt: skip
            while state.epoch < preset.epochs:
                self._epoch(bar, stop)

    def _epoch(self, bar: tqdm, stop: _StopRequest) -> None:
        preset, state = self.config.preset, self.state
        rate = preset.learning_rate * (1 - state.epoch / preset.epochs) ** preset.decay_power
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        pairs = epoch_pairs(self.source.train, self.config.seed, state.epoch, self.steps)
        for pair in itertools.islice(pairs, state.step, None):
            started = time.perf_counter()
            terms = self._step(pair)
            terms["seconds"] = time.perf_counter() - started
            for name, value in terms.items():
                state.sums[name] = state.sums.get(name, 0.0) + value
            state.step += 1
            bar.update()
            bar.set_postfix(epoch=f"{state.epoch + 1}/{preset.epochs}", loss=f"{terms['loss']:.4f}")
            if stop.signal or time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
                self.save()
                stop.obey()
        found = validate(self.model, self.cohort, self.validation, self.device, preset.window)
        row = {"epoch": state.epoch + 1, "steps": state.step}
        row |= {name: total / state.step for name, total in state.sums.items()}
        row |= {**found, "learning_rate": rate}
        figure = found["val_dice"] if self.cohort.has_labels else found["val_similarity"]
        if figure > state.best:
            state.best, state.best_epoch = figure, row["epoch"]
            save_checkpoint(
                self.best_path,
                {"config": self.config.as_dict(), "model": self.model.state_dict(), "epoch": row["epoch"]} | found,
            )
        state.history.append(row)
        state.epoch, state.step, state.sums = state.epoch + 1, 0, {}
        # the checkpoint last: killed before it, the epoch is done again, and its row written again
        write_atomically(self.log, lambda to: pd.DataFrame(state.history).to_csv(to, index=False))
        self.save()
        stop.obey()

    def _step(self, pair: Pair) -> dict[str, float]:
        preset = self.config.preset
        read = self.source.image if self.config.variant.trains_on == "images" else self.source.label_volume
        fixed, moving = (read(subject).to(self.device, non_blocking=True) for subject in (pair.fixed, pair.moving))
        # of this step alone, so that a run resumes in the middle of an epoch
        seeds = np.random.SeedSequence([self.config.seed, self.state.epoch, self.state.step])
        generator = torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
        terms = self.config.variant.loss_terms(self.model, fixed, moving, preset, generator)
        loss = float(terms["total"].detach())
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"the loss became {loss} in epoch {self.state.epoch + 1}, step {self.state.step + 1}, "
                f"fixed {pair.fixed.image}, moving {pair.moving.image}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        terms["total"].backward()
        self.optimizer.step()
        return {
            "loss": loss,
            "similarity": float(terms["similarity"].detach()),
            "smoothness": float(terms["smoothness"].detach()),
        }


def trained_row(row: Row) -> Row:
    """The row whose weights a row uses: for "BF-post" the variant without the filter, else the row itself."""
    return row.without_post_filter() if isinstance(row, Variant) else row


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


def _run_as_it_is(config: RunConfig, cohort: Cohort, device: str) -> TrainingResult:
    """The result of a method that is not trained: its figures on the validation pairs, beside zero displacement's."""
    target, preset = pick_device(device), config.preset
    pairs = spread(cohort.labelled_pairs or cohort.validation_pairs, preset.validation_pairs)
    method = config.variant.build()
    history = [
        {"epoch": epoch, "steps": 0} | validate(one, cohort, pairs, target, preset.window)
        for epoch, one in enumerate((zero_displacement, method))
    ]
    return TrainingResult(method, pd.DataFrame(history), 1, float(history[1]["val_dice"]), [], None, None)


def _filter_afterwards(config: RunConfig, trained: TrainingResult, cohort: Cohort, device: str) -> TrainingResult:
    """The result of a run with a bilateral filter of the widths in `config` put behind its weights."""
    options = {name: value for name, value in asdict(config.variant).items() if name.startswith("bilateral_")}
    del options["bilateral_mode"]
    model = load_model(trained.checkpoint, device, **options)
    preset = config.preset
    pairs = spread(cohort.labelled_pairs or cohort.validation_pairs, preset.validation_pairs)
    found = validate(model, cohort, pairs, pick_device(device), preset.window)
    return replace(trained, model=model, val_dice=found["val_dice"])


def train(
    config: RunConfig,
    cohort: Cohort,
    out: str | Path,
    device: str = "auto",
    resume: bool = True,
    progress: bool = True,
) -> TrainingResult:
    """Train a run to its end, from its last checkpoint where there is one.

    A variant with "BF-post" is not trained: the run of the same variant without the filter is, or its finished
    checkpoint is taken, and the filter is put behind its weights.

    Args:
        config: from :func:`make_config`.
        cohort: loaded at the preset's resolution.
        out: results folder.
        device: "auto", "cpu", "cuda" ...
        resume: False starts anew and overwrites the run's checkpoints.
        progress: show progress bars.

    Returns:
        The network of the best epoch and the log.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite.
        ValueError: a checkpoint that is torn or foreign, or a cohort without validation pairs.
    """
    if config.variant.trains_on == "nothing":
        return _run_as_it_is(config, cohort, device)
    base = trained_row(config.variant)
    if base != config.variant:
        return _filter_afterwards(config, train(replace(config, variant=base), cohort, out, device, resume, progress),
                                  cohort, device)  # fmt: skip
    if not cohort.validation_pairs:
        raise ValueError(f"{cohort.path}: names no validation pairs, which training needs to choose its best epoch")
    trainer = Trainer(config, cohort, Path(out), pick_device(device), progress)
    if resume:
        trainer.resume()
    else:
        for stale in (trainer.last_path, trainer.best_path):
            stale.unlink(missing_ok=True)
    trainer.run()
    return TrainingResult(
        model=load_model(trainer.best_path, str(trainer.device)),
        history=pd.DataFrame(trainer.state.history),
        best_epoch=trainer.state.best_epoch,
        val_dice=float(trainer.state.history[trainer.state.best_epoch]["val_dice"]),
        trained_by=trainer.state.trained_by,
        log=trainer.log,
        checkpoint=trainer.best_path,
    )
