"""Command line of many runs, `python -m lumirlib.sweep`: rows of the tables and seeds, here or on a cluster.

    python -m lumirlib.sweep --rows table2 --seeds 0 1 2 --preset demo
    python -m lumirlib.sweep --rows table2 --seeds 0 1 2 --preset paper --executor slurm --slurm gpus_per_node=1

Every run leaves its executed notebook in `<out>/runs/` (with `--launcher train`, what it printed). A finished run is
skipped, so the same command goes on where it stopped; a broken one leaves `<run>.failed.ipynb`, is reported with its
error, and is run again by the next call. How runs become jobs of Slurm: :mod:`lumirlib.cluster`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import nbformat
import psutil
from tqdm.auto import tqdm

from lumirlib import cluster, provenance
from lumirlib._checks import check_choice
from lumirlib.data.cohort import joined_names
from lumirlib.engine import Engine, as_arguments
from lumirlib.methods import parse_row
from lumirlib.presets import parse_setting, split_options
from lumirlib.report import described, find_runs, paper_table
from lumirlib.rows import file_name
from lumirlib.train import add_engine_options, engine_options
from lumirlib.variants import Variant

#: What the sweep executes, by the parameter that names the row.
NOTEBOOKS = {"variant": "run_ablation.ipynb", "method": "run_baseline.ipynb"}
#: The variant that stands for the paper's submission in Table 1: its figures there are those of LC-2 in Table 2.
NEXT_GEN_NN = "LC-2"
#: The ablation of our own options, see docs/beyond.md: one option each on the compositional cascade, and the recipe.
BEYOND = ("LC-2", "COMP", "COMP+CORR", "COMP+SYM", "COMP+NDV", "COMP+INT", "COMP+GROUP", "COMP+REC", "COMP+MUON",
          "LC-2+MUON", "COMP+IO", "ours", "ours+IO", "LC-2+IO")  # fmt: skip
#: How a run is started: its notebook by papermill, or `python -m lumirlib.train`.
LAUNCHERS = ("notebook", "train")
#: Lines of a broken run's messages that are shown; all are in its failed output.
SHOWN_LINES = 40


def _relative(path: Path) -> str:
    try:
        return os.path.relpath(path)
    except ValueError:  # another drive, on Windows
        return str(path)


@dataclass(frozen=True)
class SweepRun:
    """One run of a row with a seed.

    Attributes:
        notebook: what is executed.
        output: where the executed notebook goes, or what `python -m lumirlib.train` printed.
        parameters: what papermill injects.
        options: what it injects as the notebook's parameter of that name.
        launcher: one of :data:`LAUNCHERS`.
        engine: arguments of :class:`lumirlib.engine.Engine` that are not at their default. A run that is finished is so
            whatever it was computed on.
    """

    notebook: Path
    output: Path
    parameters: dict[str, str]
    options: dict[str, object] = field(default_factory=dict)
    launcher: str = "notebook"
    engine: dict[str, object] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        """How many train it together."""
        return int(self.engine.get("processes", 1))

    @property
    def row(self) -> str:
        """Name of the row that is run."""
        return self.parameters.get("variant") or self.parameters["method"]

    @property
    def failed(self) -> Path:
        """Where the output goes if the run breaks."""
        return self.output.with_suffix(f".failed{self.output.suffix}")

    def command(self, output: Path) -> list[str]:
        """The call of papermill, where every parameter but the seed is passed as text, or of lumirlib.train."""
        if self.launcher == "train":
            return self._train_command()
        # relative: papermill writes both paths into the notebook, which may be committed
        words = [sys.executable, "-m", "papermill", _relative(self.notebook), _relative(output), "--no-progress-bar"]
        for name, value in self.parameters.items():
            words += ["-p" if name == "seed" else "-r", name, value]
        typed = {**({"options": self.options} if self.options else {}), **self.engine}
        return words + (["-y", json.dumps(typed)] if typed else [])

    def _train_command(self) -> list[str]:
        words = [sys.executable, "-m", "lumirlib.train", "--quiet"]
        for name, value in self.parameters.items():
            words += ["--variant" if name == "method" else f"--{name.replace('_', '-')}", value]
        words += as_arguments(self.engine)
        settings = [
            f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in self.options.items()
        ]
        return words + (["--set", *settings] if settings else [])

    def is_finished(self) -> bool:
        """Whether its result is there, whole, with these parameters and without an error.

        That is the executed notebook, unless the metrics of that name are all of another configuration, as of a recipe
        that has changed since; or, with the launcher "train", the metrics with a provenance that fits.
        """
        given = self.parameters
        folder, cohort = provenance.results_folder(given.get("out", "")), _short_name(given["cohort"])
        row = parse_row(self.row)
        runs = find_runs(folder, row, given["preset"], cohort, self.options)
        measured = any(str(about["seed"]) == given["seed"] for _, about in runs)
        if self.launcher == "train":
            return measured
        others = [about for _, about in described(folder, cohort) if about.get("method") == row.name
                  and str(about.get("seed")) == given["seed"] and about.get("set_besides") == self.options
                  and about["preset"]["name"] == given["preset"]]  # fmt: skip
        if others and not measured:
            return False
        try:
            found = nbformat.read(self.output, as_version=4)
        except (OSError, ValueError):
            return False
        record = found.metadata.get("papermill", {})
        injected = dict(record.get("parameters", {}))
        same = injected.pop("options", {}) == self.options
        for one in fields(Engine):
            injected.pop(one.name, None)
        same = same and {name: str(value) for name, value in injected.items()} == self.parameters
        return same and record.get("exception") is None and record.get("end_time") is not None

    def execute(
        self, threads: int, started: Callable[[subprocess.Popen], None] | None = None, shielded: bool = False
    ) -> str:
        """Run it; the empty string, or what went wrong. The output appears only when it is whole.

        Args:
            threads: of the processor, for each process.
            started: is given the process, for :meth:`stop`.
            shielded: keep signals that are sent to this process and its group away from the run. Not for threads.
        """
        self.output.parent.mkdir(parents=True, exist_ok=True)
        partial = self.output.with_suffix(f".partial{self.output.suffix}")
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        with (
            # a run that was stopped goes on in the same file
            partial.open("a+", encoding="utf-8") if self.launcher == "train" else tempfile.TemporaryFile("w+")
        ) as messages:
            process = subprocess.Popen(
                self.command(partial),
                stdout=messages,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=shielded,
                # Slurm may send its warning to all processes of a job; those started here would die of it
                preexec_fn=(lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN)) if shielded else None,
            )
            if started:
                started(process)
            if process.wait() == 0:
                os.replace(partial, self.output)
                self.failed.unlink(missing_ok=True)
                return ""
            messages.seek(0)
            said = "\n".join(messages.read().strip().splitlines()[-SHOWN_LINES:])
        if partial.exists():
            os.replace(partial, self.failed)
        return said or f"{shlex.join(process.args[1:3])} ended with status {process.returncode}"

    def stop(self, process: subprocess.Popen) -> None:
        """Have the training of a run under way save a checkpoint and end, and the process with it.

        SIGTERM goes to the notebook's kernel: papermill, if it were told to end, would kill the kernel after seconds.
        """
        try:
            own = psutil.Process(process.pid)
            for target in (own.children() if self.launcher == "notebook" else []) or [own]:
                target.terminate()
        except psutil.NoSuchProcess:
            pass


def needs_another(name: str) -> bool:
    """Whether the row uses another run's weights, as "BF-post" and "IO" do."""
    row = parse_row(name)
    return row.trained() != row


def rows_of_table(table: int) -> list[str]:
    """Our rows of the paper's Table 1 or 2, in its order; zero displacement is measured with each of them."""
    methods = paper_table(table)["method"]
    if table == 2:
        return [method.removeprefix("backbone+") for method in methods if method.startswith("backbone")]
    return [NEXT_GEN_NN if method == "next-gen-nn" else method for method in methods if method != "Zero Displacement"]


def _short_name(cohort: str) -> str:
    parts = joined_names(cohort)
    return "+".join(Path(part).resolve().parent.name if part.endswith(".json") else part for part in parts)


def table_rows(rows: Sequence[str]) -> list[str]:
    """Names of rows, each once, with "table1", "table2" and "beyond" replaced by theirs (:data:`BEYOND`)."""
    lists = {"table1": rows_of_table(1), "table2": rows_of_table(2), "beyond": BEYOND}
    return list(dict.fromkeys(parse_row(name).name for row in rows for name in lists.get(row, [row])))


def plan(
    rows: Sequence[str],
    seeds: Sequence[int],
    preset: str,
    cohort: str,
    data_root: str,
    out: str,
    options: Mapping[str, object] | None = None,
    launcher: str = "notebook",
    engine: Mapping[str, object] | None = None,
) -> list[SweepRun]:
    """The runs of a sweep, row by row, each with all its seeds; those that use another's weights last.

    Args:
        rows: names for :func:`lumirlib.methods.parse_row`; "table1", "table2" and "beyond" as in
            :func:`table_rows`.
        seeds: of each.
        preset: of all.
        cohort: as for :func:`lumirlib.load_cohort`.
        data_root: as the notebook's parameter.
        out: results folder; empty for the usual one.
        options: of variant and preset to set in every run.
        launcher: one of :data:`LAUNCHERS`.
        engine: arguments of :class:`lumirlib.engine.Engine` for each run.

    Raises:
        ValueError: an unknown variant, preset, option or launcher, or a value that does not fit it.
        FileNotFoundError: the notebook is not there, as in a package installed without its checkout.
    """
    check_choice(launcher, LAUNCHERS, "launcher")
    checked = Engine(**{**(engine or {}), "device": "cpu"})  # a cluster's front end may lack the device
    standard = {one.name: one.default for one in fields(Engine)}
    changed = {name: value for name, value in (engine or {}).items() if value != standard[name]}
    names = sorted(table_rows(rows), key=needs_another)
    options = dict(options or {})
    for name in names:
        row = parse_row(name)
        batch = split_options(preset, row, options)[0].batch_size
        if row.trains_on != "nothing" and batch % checked.processes:
            raise ValueError(
                f"batch_size must be a multiple of the {checked.processes} processes that share it, got {batch}: "
                f"--set batch_size={checked.processes}"
            )
    notebooks = (provenance.project_root() or Path.cwd()) / "notebooks"
    for notebook in (notebooks / name for name in NOTEBOOKS.values()):
        if not notebook.is_file():
            raise FileNotFoundError(f"the sweep runs {notebook}, which does not exist: call it from a checkout")
    # what is at its default is not injected: executed notebooks are committed, and hold no path of a machine unasked
    common = {"preset": preset, "cohort": cohort}
    common |= {name: value for name, value in (("data_root", data_root), ("out", out)) if value}
    tag = "".join(f"_{name}-{value}" for name, value in options.items()).replace(os.sep, "-")
    folder = provenance.results_folder(out) / "runs"
    ending = {"notebook": "ipynb", "train": "txt"}[launcher]
    kinds = {name: "variant" if isinstance(parse_row(name), Variant) else "method" for name in names}
    return [
        SweepRun(
            notebooks / NOTEBOOKS[kinds[name]],
            folder / f"{file_name(name)}_{_short_name(cohort).replace('+', '-')}_{preset}{tag}_seed{seed}.{ending}",
            {kinds[name]: name, "seed": str(seed), **common},
            options,
            launcher,
            changed,
        )
        for name in names
        for seed in (seeds if parse_row(name).trains_on != "nothing" else seeds[:1])  # nothing in it is random
    ]


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
                group = [run for run in pending if needs_another(run.row) == later]
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


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Meanwhile SIGTERM raises SystemExit, with status 143; not outside the main thread, which takes no signals."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


EXAMPLES = """examples:
  lumirlib sweep --rows table2 --seeds 0 1 2 --preset demo --dry-run
  lumirlib sweep --rows LK+BF VoxelMorph --cohort brains --preset half --jobs 2
"""


def parser(prog: str = "python -m lumirlib.sweep") -> argparse.ArgumentParser:
    """The options of the command line."""
    options = argparse.ArgumentParser(
        prog=prog, description=(__doc__ or "").splitlines()[0], epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    options.add_argument("--rows", nargs="+", default=["table2"], help="table1, table2, beyond, or rows such as "
                         "LK+BF")  # fmt: skip
    options.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds of each row")
    options.add_argument("--preset", default="demo", help="preset of every run")
    options.add_argument("--cohort", default="embedded", help="embedded, lumir, brains, or a Learn2Reg dataset JSON; "
                         "joined by '+': trained on all, evaluated on the last")  # fmt: skip
    options.add_argument("--data-root", default="", help="folder the JSON's paths are relative to; its own if empty")
    options.add_argument("--out", default="", help="results folder")
    add_engine_options(options)
    options.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="options of variant and preset, "
                         "such as smoothness_weight=0.1 cascade=compositional")  # fmt: skip
    options.add_argument("--jobs", type=int, help="runs at a time: 1 here, all on a cluster")
    options.add_argument("--launcher", default="notebook", help="notebook, or train: `python -m lumirlib.train`")
    options.add_argument("--executor", default="local", choices=["local", "slurm"], help="where the runs are executed")
    options.add_argument("--slurm", nargs="+", default=[], metavar="NAME=VALUE", help="of each job, as submitit "
                         "has them: partition=gpu gpus_per_node=1 mem_gb=64 timeout_min=1440 ...")  # fmt: skip
    options.add_argument("--no-wait", action="store_true", help="submit to Slurm and return")
    options.add_argument("--dry-run", action="store_true", help="list what would be run, and stop")
    return options


def main(arguments: list[str] | None = None, prog: str = "python -m lumirlib.sweep") -> int:
    """Run a sweep; the exit status is 0, 1 if a run broke, 2 for parameters that cannot be used, 130 after Ctrl-C."""
    given = parser(prog).parse_args(arguments)
    on_slurm = given.executor == "slurm"
    try:
        if given.jobs is not None and given.jobs < 1:
            raise ValueError(f"--jobs must be 1 or more, got {given.jobs}")
        if not on_slurm and (given.slurm or given.no_wait):
            raise ValueError("--slurm and --no-wait go with --executor slurm")
        runs = plan(given.rows, given.seeds, given.preset, given.cohort, given.data_root, given.out,
                    dict(parse_setting(text) for text in given.set), given.launcher, engine_options(given))  # fmt: skip
        if given.dry_run:
            for run in runs:
                print("finished" if run.is_finished() else "to run  ", shlex.join(run.command(run.output)))
            return 0
        if on_slurm:
            queue = cluster.Queue(provenance.results_folder(given.out) / "slurm", "slurm")
            options = dict(parse_setting(text, "--slurm") for text in given.slurm)
            queue.submit(runs, options, given.jobs)
            broken = {} if given.no_wait else queue.wait(runs)
        else:
            broken = run_sweep(runs, given.jobs or 1)
    except (ValueError, OSError, cluster.ClusterError) as error:
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
    from lumirlib import sweep

    sys.exit(sweep.main())
