"""The runs of a sweep: which rows, which seeds, which command."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

import psutil

from lumirlib import provenance
from lumirlib._checks import check_choice
from lumirlib.data import load_cohort
from lumirlib.data.dataset_json import joined_names
from lumirlib.methods import parse_row
from lumirlib.methods.base import file_name
from lumirlib.methods.presets import split_options
from lumirlib.study.paper import table_rows, uses_other_weights
from lumirlib.study.results import find_runs, table_of
from lumirlib.training.engine import Engine, as_arguments
from lumirlib.training.threads import environment_of

#: The notebook that makes one run of any row, below the checkout (or the current folder, where there is none).
NOTEBOOK = "notebooks/run_ablation.ipynb"
#: How a run is started: its notebook by papermill, or `lumirlib run --no-notebook`.
LAUNCHERS = ("notebook", "train")
#: Lines of a broken run's messages that are shown; all are in its failed output.
SHOWN_LINES = 40


def run_notebook() -> Path:
    """Path of :data:`NOTEBOOK`.

    Raises:
        FileNotFoundError: it is not there, as in a package installed without its checkout.
    """
    path = (provenance.project_root() or Path.cwd()) / NOTEBOOK
    if not path.is_file():
        raise FileNotFoundError(
            f"no such notebook: {path}, which makes a run in a checkout of the project; call this there, or go without "
            "the notebook: --no-notebook"
        )
    return path


def _relative(path: Path) -> str:
    try:
        return os.path.relpath(path)
    except ValueError:  # another drive, on Windows
        return str(path)


@dataclass(frozen=True)
class SweepRun:
    """One run of a row with a seed.

    Attributes:
        notebook: Path of the notebook that is executed.
        output: Path of the executed notebook, or of what `lumirlib run --no-notebook` printed.
        parameters: Parameters that papermill injects.
        options: Options that papermill injects as the notebook's parameter of that name.
        launcher: Name of the launcher, one of :data:`LAUNCHERS`.
        engine: Arguments of :class:`lumirlib.training.engine.Engine` that are not at their default. A run that is
            finished is so whatever it was computed on.
        resume: Whether it goes on from its last checkpoint.
    """

    notebook: Path
    output: Path
    parameters: dict[str, str]
    options: dict[str, object] = field(default_factory=dict)
    launcher: str = "notebook"
    engine: dict[str, object] = field(default_factory=dict)
    resume: bool = True

    @property
    def processes(self) -> int:
        """How many train it together."""
        return int(self.engine.get("processes", 1))

    @property
    def row(self) -> str:
        """Name of the row that is run."""
        return self.parameters["variant"]

    @property
    def failed(self) -> Path:
        """Where the output goes if the run breaks."""
        return self.output.with_suffix(f".failed{self.output.suffix}")

    @property
    def partial(self) -> Path:
        """Where the output is until it is whole."""
        return self.output.with_suffix(f".partial{self.output.suffix}")

    def command(self, output: Path) -> list[str]:
        """The call of papermill, where every parameter but the seed is passed as text, or of `lumirlib run`."""
        if self.launcher == "train":
            return self._train_command()
        # relative: papermill writes both paths into the notebook, which may be committed
        words = [sys.executable, "-m", "papermill", _relative(self.notebook), _relative(output), "--no-progress-bar"]
        for name, value in self.parameters.items():
            words += ["-p" if name == "seed" else "-r", name, value]
        typed = {**({"options": self.options} if self.options else {}), **self.engine}
        typed |= {} if self.resume else {"resume": False}
        return words + (["-y", json.dumps(typed)] if typed else [])

    def _train_command(self) -> list[str]:
        words = [sys.executable, "-m", "lumirlib", "run", self.row, "--no-notebook", "--quiet"]
        for name, value in self.parameters.items():
            if name != "variant":
                words += [f"--{name.replace('_', '-')}", value]
        words += as_arguments(self.engine)
        words += [] if self.resume else ["--restart"]
        settings = [
            f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in self.options.items()
        ]
        return words + (["--set", *settings] if settings else [])

    def is_finished(self) -> bool:
        """Whether its metrics are there, whole, with these parameters, and nothing of it broke or was cut off.

        The executed notebook is not asked for: the study commits metrics and no notebooks of runs. Metrics of other
        files of the cohort are those of another run.
        """
        if self.failed.exists() or self.partial.exists():
            return False
        given = self.parameters
        folder = provenance.results_folder(given.get("out", ""))
        runs = find_runs(folder, parse_row(self.row), given["preset"], _short_name(given["cohort"]), self.options)
        runs = [(path, about) for path, about in runs if str(about["seed"]) == given["seed"]]
        here = self._cohort_digest() if runs else None
        for path, about in runs:
            if here in (None, about["cohort_digest"]):
                with suppress(ValueError):  # damaged: the run makes it anew
                    table_of(path, about)
                    return True
        return False

    def _cohort_digest(self) -> str | None:
        """Of the cohort as its files are now; None where they are not here, so that nothing could be run anyway."""
        given = self.parameters
        resolution = split_options(given["preset"], parse_row(self.row), self.options)[0].resolution_mm
        try:
            return load_cohort(given["cohort"], resolution, given.get("data_root")).digest
        except (OSError, ValueError):
            return None

    def execute(
        self, threads: int, started: Callable[[subprocess.Popen], None] | None = None, shielded: bool = False
    ) -> str:
        """Run it; the empty string, or what went wrong. The output appears only when it is whole.

        Args:
            threads: Number of the processor's threads for each process.
            started: Function that is given the process, for :meth:`stop`.
            shielded: Whether to keep signals that are sent to this process and its group away from the run. Not for
                threads.
        """
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with (
            # a run that was stopped goes on in the same file
            self.partial.open("a+", encoding="utf-8") if self.launcher == "train" else tempfile.TemporaryFile("w+")
        ) as messages:
            process = subprocess.Popen(
                self.command(self.partial),
                stdout=messages,
                stderr=subprocess.STDOUT,
                env=os.environ | environment_of(threads),
                start_new_session=shielded,
                # Slurm may send its warning to all processes of a job; those started here would die of it
                preexec_fn=(lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN)) if shielded else None,
            )
            if started:
                started(process)
            if process.wait() == 0:
                os.replace(self.partial, self.output)
                self.failed.unlink(missing_ok=True)
                return ""
            messages.seek(0)
            said = "\n".join(messages.read().strip().splitlines()[-SHOWN_LINES:])
        if self.partial.exists():
            os.replace(self.partial, self.failed)
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


def _short_name(cohort: str) -> str:
    parts = joined_names(cohort)
    return "+".join(Path(part).resolve().parent.name if part.endswith(".json") else part for part in parts)


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
    resume: bool = True,
) -> list[SweepRun]:
    """The runs of a sweep, row by row, each with all its seeds; those that use another's weights last.

    Args:
        rows: Names for :func:`lumirlib.methods.parse_row`; "table1", "table2" and "beyond" as in
            :func:`table_rows`.
        seeds: Random seeds of each row.
        preset: Name of the preset of all runs.
        cohort: Cohort's name or path, as for :func:`lumirlib.load_cohort`.
        data_root: Folder of the data, as the notebook's parameter.
        out: Results folder; empty for the usual one.
        options: Options of variant and preset to set in every run.
        launcher: Name of the launcher, one of :data:`LAUNCHERS`.
        engine: Arguments of :class:`lumirlib.training.engine.Engine` for each run.
        resume: Whether runs go on from their last checkpoint.

    Raises:
        ValueError: an unknown variant, preset, option or launcher, or a value that does not fit it.
        FileNotFoundError: the notebook is not there, as in a package installed without its checkout.
    """
    check_choice(launcher, LAUNCHERS, "launcher")
    checked = Engine(**{**(engine or {}), "device": "cpu"})  # a cluster's front end may lack the device
    standard = {one.name: one.default for one in fields(Engine)}
    given = standard | dict(engine or {})
    changed = {name: value for name, value in given.items() if value != standard[name]}
    names = sorted(table_rows(rows), key=uses_other_weights)
    options = dict(options or {})
    for name in names:
        row = parse_row(name)
        batch = split_options(preset, row, options)[0].batch_size
        if row.trains_on != "nothing" and batch % checked.processes:
            raise ValueError(
                f"batch_size must be a multiple of the {checked.processes} processes that share it, got {batch}: "
                f"--set batch_size={checked.processes}"
            )
    notebook = run_notebook() if launcher == "notebook" else Path(NOTEBOOK)
    # what is at its default is not injected: executed notebooks are committed, and hold no path of a machine unasked
    common = {"preset": preset, "cohort": cohort}
    common |= {name: value for name, value in (("data_root", data_root), ("out", out)) if value}
    tag = "".join(f"_{name}-{value}" for name, value in options.items()).replace(os.sep, "-")
    folder = provenance.results_folder(out) / "notebooks"
    ending = {"notebook": "ipynb", "train": "txt"}[launcher]
    return [
        SweepRun(
            notebook,
            folder / f"{file_name(name)}_{_short_name(cohort).replace('+', '-')}_{preset}{tag}_seed{seed}.{ending}",
            {"variant": name, "seed": str(seed), **common},
            options,
            launcher,
            changed,
            resume,
        )
        for name in names
        for seed in (seeds if parse_row(name).trains_on != "nothing" else seeds[:1])  # nothing in it is random
    ]
