"""Command line of many runs, `python -m lumirlib.study.sweep`: rows of the tables and seeds, here or on a cluster.

    python -m lumirlib.study.sweep --rows table2 --seeds 0 1 2 --preset demo
    python -m lumirlib.study.sweep --rows table2 --seeds 0 1 2 --preset paper --executor slurm --slurm gpus_per_node=1

Every run leaves its executed notebook in `<out>/runs/` (with `--launcher train`, what it printed). A finished run is
skipped, so the same command goes on where it stopped; a broken one leaves `<run>.failed.ipynb`, is reported with its
error, and is run again by the next call. How runs become jobs of Slurm: :mod:`lumirlib.study.slurm`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm.auto import tqdm

from lumirlib import provenance
from lumirlib.cli import parse_setting
from lumirlib.study import slurm
from lumirlib.study.jobs import SweepRun, plan
from lumirlib.study.paper import uses_other_weights
from lumirlib.train import add_engine_options, engine_options
from lumirlib.training.interrupts import ending_on_sigterm


def run_sweep(runs: Sequence[SweepRun], jobs: int = 1) -> dict[Path, str]:
    """Execute what is not finished, `jobs` at a time, the processor's threads shared among them.

    A run that uses another's weights ("BF-post", "IO") starts when all others have ended. SIGTERM has the runs under
    way save and end, and then ends this process.

    Returns:
        Output of each run that broke -> its error.
    """
    pending = [run for run in runs if not run.is_finished()]
    print(f"{len(runs)} runs, {len(runs) - len(pending)} finished before")
    broken: dict[Path, str] = {}
    under_way: list[tuple[SweepRun, subprocess.Popen]] = []

    ending = threading.Event()

    def execute(run: SweepRun) -> str:
        def started(process: subprocess.Popen) -> None:
            under_way.append((run, process))
            if ending.is_set():
                run.stop(process)

        return run.execute(max(1, (os.cpu_count() or 1) // jobs // run.processes), started)

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


EXAMPLES = """examples:
  lumirlib sweep --rows table2 --seeds 0 1 2 --preset demo --dry-run
  lumirlib sweep --rows LK+BF VoxelMorph --cohort brains --preset half --jobs 2
"""


def parser(prog: str = "python -m lumirlib.study.sweep") -> argparse.ArgumentParser:
    """The options of the command line."""
    options = argparse.ArgumentParser(
        prog=prog,
        description=(__doc__ or "").splitlines()[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--rows", nargs="+", default=["table2"], help="table1, table2, beyond, or rows such as LK+BF")
    options.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds of each row")
    options.add_argument("--preset", default="demo", help="preset of every run")
    options.add_argument(
        "--cohort",
        default="embedded",
        help="embedded, lumir, brains, or a Learn2Reg dataset JSON; "
        "joined by '+': trained on all, evaluated on the last",
    )
    options.add_argument("--data-root", default="", help="folder the JSON's paths are relative to; its own if empty")
    options.add_argument("--out", default="", help="results folder")
    add_engine_options(options)
    options.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="options of variant and preset, such as smoothness_weight=0.1 cascade=compositional",
    )
    options.add_argument("--jobs", type=int, help="runs at a time: 1 here, all on a cluster")
    options.add_argument("--launcher", default="notebook", help="notebook, or train: `python -m lumirlib.train`")
    options.add_argument("--executor", default="local", choices=["local", "slurm"], help="where the runs are executed")
    options.add_argument(
        "--slurm",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="of each job, as submitit has them: partition=gpu gpus_per_node=1 mem_gb=64 timeout_min=1440 ...",
    )
    options.add_argument("--no-wait", action="store_true", help="submit to Slurm and return")
    options.add_argument("--dry-run", action="store_true", help="list what would be run, and stop")
    return options


def main(arguments: list[str] | None = None, prog: str = "python -m lumirlib.study.sweep") -> int:
    """Run a sweep; the exit status is 0, 1 if a run broke, 2 for parameters that cannot be used, 130 after Ctrl-C."""
    given = parser(prog).parse_args(arguments)
    on_slurm = given.executor == "slurm"
    try:
        if given.jobs is not None and given.jobs < 1:
            raise ValueError(f"--jobs must be 1 or more, got {given.jobs}")
        if not on_slurm and (given.slurm or given.no_wait):
            raise ValueError("--slurm and --no-wait go with --executor slurm")
        runs = plan(
            given.rows,
            given.seeds,
            given.preset,
            given.cohort,
            given.data_root,
            given.out,
            dict(parse_setting(text) for text in given.set),
            given.launcher,
            engine_options(given),
        )
        if given.dry_run:
            for run in runs:
                print("finished" if run.is_finished() else "to run  ", shlex.join(run.command(run.output)))
            return 0
        if on_slurm:
            queue = slurm.Queue(provenance.results_folder(given.out) / "slurm", "slurm")
            options = dict(parse_setting(text, "--slurm") for text in given.slurm)
            queue.submit(runs, options, given.jobs)
            broken = {} if given.no_wait else queue.wait(runs)
        else:
            broken = run_sweep(runs, given.jobs or 1)
    except (ValueError, OSError, slurm.ClusterError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    for output, error in broken.items():
        print(f"broken: {output.name}: {error.splitlines()[-1]}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    # of the module by its name: what is pickled for a job must be found there under it

    sys.exit(main())
