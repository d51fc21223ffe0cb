"""Runs of a sweep on this machine: rows of the tables and seeds, several at a time.

    lumirlib sweep --rows table2 --seeds 0 1 2 --preset demo
    lumirlib sweep --rows table2 --seeds 0 1 2 --preset paper --executor slurm --slurm gpus_per_node=1

Every run leaves its executed notebook in `<out>/notebooks/` (with `--no-notebook`, what it printed). A run whose
metrics are in `<out>/metrics/` is skipped, so the same command goes on where it stopped; a broken one leaves
`<run>.failed.ipynb`, is reported with its error, and is run again by the next call. How runs become jobs of Slurm:
:mod:`lumirlib.study.slurm`.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from lumirlib._checks import counted
from lumirlib.study.jobs import SweepRun
from lumirlib.study.paper import uses_other_weights
from lumirlib.study.run import Run
from lumirlib.training.interrupts import ending_on_sigterm
from lumirlib.training.threads import threads_each


def run_sweep(runs: Sequence[SweepRun], jobs: int = 1) -> dict[Path, str]:
    """Execute what is not finished, `jobs` at a time, the processor's threads shared among them.

    A run that uses another's weights ("BF-post", "IO") starts when all others have ended. SIGTERM has the runs under
    way save and end, and then ends this process.

    Returns:
        Output of each run that broke -> its error.
    """
    pending = [run for run in runs if not run.is_finished()]
    print(f"{counted(len(runs), 'run')}, {len(runs) - len(pending)} finished before")
    broken: dict[Path, str] = {}
    under_way: list[tuple[SweepRun, subprocess.Popen]] = []

    ending = threading.Event()

    def execute(run: SweepRun) -> str:
        def started(process: subprocess.Popen) -> None:
            under_way.append((run, process))
            if ending.is_set():
                run.stop(process)

        return run.execute(threads_each(jobs * run.processes), started)

    with (
        ending_on_sigterm(),
        ThreadPoolExecutor(max_workers=jobs) as pool,
        tqdm(total=len(pending), desc="sweep", unit="run", disable=not pending) as bar,
    ):
        try:
            for later in (False, True):
                group = [run for run in pending if uses_other_weights(run.row) == later]
                futures = {pool.submit(execute, run): run for run in group}
                for future in as_completed(futures):
                    error = future.result()
                    if error:
                        broken[futures[future].output] = error
                        tqdm.write(f"broken: {futures[future].output.name}\n{error}")
                    bar.update()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, SystemExit):  # Ctrl-C reaches the runs by itself
                ending.set()
                for run, process in under_way:
                    if process.poll() is None:
                        run.stop(process)
            raise
    return broken


def execute_run(job: SweepRun, run: Run, progress: bool = True) -> str:
    """Execute the notebook of one run, with a bar over the epochs of its training.

    SIGTERM or Ctrl-C has the training save and end, and then ends this process.

    Args:
        job: The run as a sweep has it.
        run: The same run, prepared; its log says how many epochs are done.
        progress: Whether the bar is shown.

    Returns:
        The empty string, or what went wrong.
    """
    log = run.out / "logs" / f"{run.config.run}.csv"
    row = run.config.row
    epochs = run.config.preset.epochs if row.trains_on != "nothing" and row.base_row() == row else 0
    began = time.time()
    under_way: list[subprocess.Popen] = []
    with (
        ending_on_sigterm(),
        ThreadPoolExecutor(max_workers=1) as pool,
        tqdm(total=epochs, desc=f"train {row.name}", unit="epoch", disable=not progress or not epochs) as bar,
    ):
        future = pool.submit(job.execute, threads_each(job.processes), under_way.append)
        try:
            while not future.done():
                wait([future], timeout=0.5)
                if log.is_file() and (job.resume or log.stat().st_mtime >= began):
                    bar.update(max(0, len(pd.read_csv(log)) - 1 - bar.n))
        except BaseException:
            for process in under_way:
                job.stop(process)
            raise
    return future.result()
