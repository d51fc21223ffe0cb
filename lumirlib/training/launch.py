"""From a configuration to trained weights: in this process, in several, or where there is nothing to train."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from lumirlib.data import Cohort
from lumirlib.evaluation import Method, zero_displacement
from lumirlib.training.config import RunConfig
from lumirlib.training.engine import Engine
from lumirlib.training.interrupts import StopRequest
from lumirlib.training.threads import environment_of, threads_each
from lumirlib.training.trainer import Trainer
from lumirlib.training.validation import validate, validation_pairs
from lumirlib.training.weights import load_model, method_of_weights


@dataclass(frozen=True)
class TrainingResult:
    """A finished training.

    Attributes:
        model: The network with the weights of the best epoch, in evaluation mode, or what is run where nothing
            is trained.
        history: History of the training, one row per epoch, the first being zero displacement: epoch, steps; loss, its
            terms (similarity, smoothness ...) and seconds, means over the steps; val_dice, val_similarity,
            val_ndv_percent, learning_rate.
        best_epoch: Epoch whose weights these are.
        val_dice: Dice of `model` on the validation pairs that chose it, in [0, 1]; NaN without labels.
        trained_by: Commit and device, as "commit, device", of every session that took part.
        log: Path of the CSV; None where nothing is trained.
        checkpoint: Path of the best weights; None where nothing is trained.
    """

    model: nn.Module | Method
    history: pd.DataFrame
    best_epoch: int
    val_dice: float
    trained_by: list[str]
    log: Path | None
    checkpoint: Path | None


def _run_as_it_is(config: RunConfig, cohort: Cohort, device: torch.device) -> TrainingResult:
    """The result of a method that is not trained: its figures on the validation pairs, beside zero displacement's."""
    pairs = validation_pairs(cohort, config.preset)
    method = config.row.build()
    history = [
        {"epoch": epoch, "steps": 0} | validate(one, cohort, pairs, device, config.preset.at_stage(-1).window_voxels)
        for epoch, one in enumerate((zero_displacement, method))
    ]
    return TrainingResult(method, pd.DataFrame(history), 1, float(history[1]["val_dice"]), [], None, None)


def _from_trained(config: RunConfig, trained: TrainingResult, cohort: Cohort, device: torch.device) -> TrainingResult:
    """The result of a run with what is put behind its weights: a bilateral filter, instance optimization."""
    method = method_of_weights(config, trained.checkpoint, device)
    pairs = validation_pairs(cohort, config.preset)
    found = validate(method, cohort, pairs, device, config.preset.at_stage(-1).window_voxels)
    return replace(trained, model=method, val_dice=found["val_dice"])


def train(
    config: RunConfig,
    cohort: Cohort,
    out: str | Path,
    engine: Engine | str = "auto",
    resume: bool = True,
    progress: bool = True,
    start: Mapping[str, torch.Tensor] | None = None,
    coarser: Sequence[Cohort] = (),
) -> TrainingResult:
    """Train a run to its end, from its last checkpoint where there is one.

    A variant with "BF-post" or "IO" is not trained: the run of the same variant without them is, or its finished
    checkpoint is taken, and filter and instance optimization are put behind its weights.

    Args:
        config: Configuration from :func:`make_config`.
        cohort: Cohort loaded at the preset's resolution.
        out: Results folder.
        engine: Engine that computes it, or a device's name. Where torchrun started several processes, each calls this,
            on a file system that they share.
        resume: Whether to go on from the last checkpoint; False starts anew and overwrites the run's checkpoints.
        progress: Whether to show progress bars.
        start: Weights to start from, as for :class:`Trainer`.
        coarser: The same cohort at the resolutions of the earlier stages, as for :class:`Trainer`.

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
        trained = train(replace(config, row=base), cohort, out, engine, resume, progress, start, coarser)
        return _from_trained(config, trained, cohort, engine.target)
    if not cohort.validation_pairs:
        raise ValueError(f"{cohort.path}: names no validation pairs, which training needs to choose its best epoch")
    trainer = Trainer(config, cohort, Path(out), engine, progress, start, coarser)
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
        config: Configuration that `arguments` stand for.
        out: Results folder.
        processes: Number of processes.
        arguments: Arguments of the run, for `lumirlib run`.
        resume: Whether to go on from the last checkpoint; False starts anew.
        progress: Whether to show a progress bar.

    Raises:
        ChildProcessError: One of them broke; the message ends with what it said.
    """
    log = out / "logs" / f"{config.run}.csv"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "-m",
        "lumirlib",
        "run",
        *arguments,
        "--train-only",
        "--quiet",
        *([] if resume else ["--restart"]),
    ]
    environment = environment_of(threads_each(processes)) | os.environ
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        tqdm(
            total=config.preset.epochs,
            desc=f"train {config.row.name} in {processes} processes",
            unit="epoch",
            disable=not progress,
        ) as bar,
        StopRequest() as stop,
    ):
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
            raise ChildProcessError(f"training in {processes} processes ended with status {child.returncode}:\n{tail}")
