"""Runs of a sweep as jobs of Slurm, through submitit: what `lumirlib sweep --executor slurm` does.

Why submitit: it is small, needs nothing but Python on either side, has a local executor that the tests use, and knows
requeueing. (Snakemake with its Slurm plugin would do the rest as well, but wants a workflow file beside the sweep.)

Each run is a job of one task; all that can start together are one array. Before a job's time is over Slurm sends it
SIGUSR2: the training saves and ends, the job goes back into the queue, and goes on from its checkpoint. SIGTERM alone
(`scancel`, or a preemption, after which Slurm itself requeues the job) has it save and end. Nothing but files says what
is finished, so the same command comes back at any time. Files in `<out>/slurm/`:

    <run>.json                 id of the run's last job
    <job>_0_log.out, .err      what it printed
    <job>_submission.sh        what sbatch was given
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import psutil
from tqdm.auto import tqdm

from lumirlib import provenance
from lumirlib._checks import counted
from lumirlib.files import read_json, write_json
from lumirlib.methods import parse_row
from lumirlib.training.threads import threads_each

if TYPE_CHECKING:
    import submitit

    from lumirlib.study.jobs import SweepRun

#: A job's time unless it is given: submitit's own would be five minutes.
TIMEOUT_MIN = 24 * 60
#: How often a job whose time is over goes back into the queue.
MAX_TIMEOUTS = 100
#: How long a file of a job that has ended may take to be seen here, on a shared disk.
LATE_SECONDS = 20.0


class ClusterError(RuntimeError):
    """Slurm or submitit is missing, or did not do what it was asked for."""


def _submitit() -> ModuleType:
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ClusterError(f'the executor slurm needs submitit ({error}): pip install "lumirlib[slurm]"') from error
    return submitit


class SweepJob:
    """What a job does: one run, in a process that is told to save when the job has to end."""

    def __init__(self, run: SweepRun) -> None:
        self.run = run
        self._process: subprocess.Popen | None = None
        self._stopped = False

    def __call__(self) -> None:
        """Run it, unless it is finished; submitit calls this in the job."""
        if self.run.is_finished():  # Slurm may requeue a job at any time
            return
        signal.signal(signal.SIGTERM, self._terminate)
        processors = int(os.environ.get("SLURM_CPUS_PER_TASK", 0))
        error = self.run.execute(threads_each(self.run.processes, processors), self._started, shielded=True)
        if error and self._stopped:
            sys.exit(128 + signal.SIGTERM)  # no result: neither a success nor an error of the run
        if error:
            raise RuntimeError(error)

    def _started(self, process: subprocess.Popen) -> None:
        self._process = process
        if self._stopped:
            self.run.stop(process)

    def _terminate(self, number: int, frame: object) -> None:
        self._stopped = True
        if self._process:
            self.run.stop(self._process)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit in the handler of SIGUSR2: returns, when the run has ended, what is to be requeued."""
        if self._process:
            if not self._stopped:
                self.run.stop(self._process)
            with suppress(psutil.NoSuchProcess):
                psutil.Process(self._process.pid).wait()  # not Popen's, whose lock the interrupted call may hold
        return _submitit().helpers.DelayedSubmission(SweepJob(self.run))


class Queue:
    """The jobs of a results folder.

    Args:
        folder: Folder for logs and the ids of jobs.
        executor: Name of submitit's executor: "slurm", or "local" (processes of this machine).
        poll_seconds: Seconds between two looks at the jobs while waiting.

    Raises:
        ClusterError: submitit is not installed.
    """

    def __init__(self, folder: Path, executor: str = "slurm", poll_seconds: float = 15.0) -> None:
        self.folder, self.executor, self.poll_seconds = Path(folder), executor, poll_seconds
        self._submitit = _submitit()

    def _record(self, run: SweepRun) -> Path:
        return self.folder / f"{run.output.stem}.json"

    def job_id(self, run: SweepRun) -> str:
        """Of the run's last job; empty where it has had none."""
        try:
            return str(read_json(self._record(run))["job"])
        except FileNotFoundError:
            return ""
        except KeyError as error:
            raise ValueError(f"{self._record(run)}: has no {error}, the id of the run's last job") from error

    def live(self, runs: Sequence[SweepRun]) -> list[SweepRun]:
        """Those of the runs that have a job in the queue or at work.

        Raises:
            ClusterError: Slurm does not say.
        """
        if self.executor != "slurm":
            return [run for run in runs if _is_controller(self.job_id(run))]
        command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={os.getuid()}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise ClusterError("the executor slurm needs Slurm's squeue and sbatch on the PATH") from error
        if done.returncode:
            raise ClusterError(f"squeue: {done.stderr.strip()}")
        queued = set(done.stdout.split())
        return [run for run in runs if self.job_id(run) in queued]

    def _executor(self, options: Mapping[str, object], jobs: int | None, dependency: str = "") -> submitit.Executor:
        """An executor of submitit with the options of a job, as the user gave them.

        Raises:
            ValueError: an unknown option, with the choices, or a value that does not fit.
            ClusterError: no Slurm here.
        """
        for name in ("nodes", "tasks_per_node", "ntasks_per_node"):
            if options.get(name, 1) != 1:
                raise ValueError(
                    f"--slurm {name} must be 1, got {options[name]!r}: a run is one task of one node; for several GPUs "
                    "of it give gpus_per_node and --processes"
                )
        given = {"name": "lumirlib", "timeout_min": TIMEOUT_MIN, **options}
        if jobs:
            given["array_parallelism"] = jobs
        if dependency:
            given["dependency"] = ",".join(filter(None, [str(given.get("dependency", "")), dependency]))
            # or the job would wait for ever when the other breaks
            given["additional_parameters"] = {
                "kill_on_invalid_dep": "yes",
                **dict(given.get("additional_parameters", {})),
            }
        shared = self._submitit.AutoExecutor._typed_parameters()
        own = self._submitit.SlurmExecutor._valid_parameters()
        unknown = [name for name in given if name not in shared and name not in own]
        if unknown:
            raise ValueError(
                f"unknown --slurm option {', '.join(unknown)}: choose from {', '.join(sorted({*shared, *own}))}; "
                """others of sbatch go as --slurm 'additional_parameters={"reservation": "mri"}'"""
            )
        try:
            executor = self._submitit.AutoExecutor(
                self.folder, cluster=self.executor, slurm_max_num_timeout=MAX_TIMEOUTS
            )
        except RuntimeError as error:
            raise ClusterError(f"the executor slurm needs Slurm's srun and sbatch on the PATH: {error}") from error
        try:
            executor.update_parameters(
                **{name if name in shared else f"slurm_{name}": value for name, value in given.items()}
            )
        except (AssertionError, TypeError) as error:  # submitit's own checks of types
            raise ValueError(f"--slurm: {error}") from error
        return executor

    def submit(self, runs: Sequence[SweepRun], options: Mapping[str, object], jobs: int | None = None) -> None:
        """Submit those of the runs that are neither finished nor submitted already.

        A run that filters another's weights ("BF-post") is queued behind that other's job, where it has one.

        Args:
            runs: Runs of a sweep.
            options: Options of each job, by submitit's names.
            jobs: Largest number of jobs at work at a time; None for no limit.

        Raises:
            ValueError: an option that cannot be used.
            ClusterError: no Slurm, or it refused the jobs.
        """
        executor = self._executor(options, jobs)
        unfinished = [run for run in runs if not run.is_finished()]
        live = self.live(unfinished)
        new = [run for run in unfinished if run not in live]
        print(
            f"{counted(len(runs), 'run')}, {len(runs) - len(unfinished)} finished before, {len(live)} submitted before"
        )
        try:
            first = [run for run in new if _base(run, unfinished) is None]
            started = executor.submit_array([SweepJob(run) for run in first]) if first else []
            for run, job in zip(first, started, strict=True):
                self._submitted(run, job.job_id)
            for run in new:
                base = _base(run, unfinished)
                if base is not None:
                    behind = self._executor(options, jobs, f"afterok:{self.job_id(base)}")
                    self._submitted(run, behind.submit(SweepJob(run)).job_id)
        except self._submitit.core.utils.FailedJobError as error:
            raise ClusterError(f"sbatch refused the jobs: {error}") from error
        if new:
            print(f"submitted {counted(len(new), 'job')}; logs are in {self.folder}")

    def _submitted(self, run: SweepRun, job_id: str) -> None:
        write_json(self._record(run), {"job": job_id, "run": run.output.name, "submitted": provenance.now()})

    def wait(self, runs: Sequence[SweepRun]) -> dict[Path, str]:
        """Wait until none of the runs has a job. Ctrl-C leaves the jobs at work and says how to come back.

        Returns:
            Output of each run that broke -> its error.
        """
        waiting = [run for run in runs if not run.is_finished()]
        broken: dict[Path, str] = {}
        with tqdm(total=len(waiting), desc="sweep", unit="run", disable=not waiting) as bar:
            try:
                while waiting:
                    try:
                        live = self.live(waiting)
                    except ClusterError as error:  # busy, or restarted: the jobs go on
                        tqdm.write(f"cannot look after the jobs at the moment: {error}")
                        live = waiting
                    for run in [run for run in waiting if run not in live]:
                        error = self._outcome(run)
                        if error:
                            broken[run.output] = error
                            tqdm.write(f"broken: {run.output.name}\n{error}")
                        waiting.remove(run)
                        bar.update()
                    if waiting:
                        time.sleep(self.poll_seconds)
            except KeyboardInterrupt:
                tqdm.write(
                    "the jobs go on; the same command comes back to them, and this ends them: scancel "
                    + " ".join(self.job_id(run) for run in waiting)
                )
                raise
        return broken

    def _outcome(self, run: SweepRun) -> str:
        """The empty string for a run whose job has ended well, or what went wrong."""
        job_id = self.job_id(run)
        paths = self._submitit.core.utils.JobPaths(self.folder, job_id)
        deadline = time.monotonic() + LATE_SECONDS
        while not run.is_finished():
            if paths.result_pickle.is_file():
                outcome, error = self._submitit.core.utils.pickle_load(paths.result_pickle)
                if outcome == "error":
                    return f"job {job_id}, log {paths.stderr}\n{error.strip()}"
            if time.monotonic() > deadline:
                return f"job {job_id} left no result (cancelled, killed, or its base broke?): see {paths.stderr}"
            time.sleep(min(1.0, self.poll_seconds))
        return ""


def _base(run: SweepRun, runs: Sequence[SweepRun]) -> SweepRun | None:
    """The one of the runs whose weights a run filters; None for one that trains its own."""
    row = parse_row(run.row)
    base = row.base_row().name
    if base == row.name:
        return None
    same_seed = [other for other in runs if other.row == base and other.parameters["seed"] == run.parameters["seed"]]
    return same_seed[0] if same_seed else None


def _is_controller(job_id: str) -> bool:
    """Whether the process that watches over a job of submitit's local executor is there."""
    try:
        process = psutil.Process(int(job_id or -1))
        return process.status() != psutil.STATUS_ZOMBIE and "submitit.local._local" in process.cmdline()
    except (psutil.NoSuchProcess, ValueError):
        return False
