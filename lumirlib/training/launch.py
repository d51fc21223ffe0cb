"""Training in several processes of one machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from lumirlib.training.config import RunConfig
from lumirlib.training.interrupts import StopRequest


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
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "-m",
        "lumirlib.train",
        *arguments,
        "--train-only",
        "--quiet",
        *([] if resume else ["--restart"]),
    ]
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
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
            raise RuntimeError(f"training in {processes} processes ended with status {child.returncode}:\n{tail}")
