"""The command `lumirlib`: all its sub-commands, the options that they share, and one place where errors end.

Everything heavy is imported inside the sub-commands, so that `--help` need not wait for PyTorch.

The exit status is 0; 1 where part of the work failed; 2 for arguments or data that cannot be used; 3 where scans were
left out as implausible; 130 after Ctrl-C.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lumirlib._version import __version__

if TYPE_CHECKING:
    import pandas as pd

    from lumirlib.data import Cohort

Function = TypeVar("Function", bound=Callable[..., Any])


# what all sub-commands have in common ---------------------------------------------------------------------------------
def _is_expected(error: Exception) -> bool:
    """Whether an error says what the user can do about it, so that no traceback is needed."""
    if isinstance(error, (ValueError, OSError, ModuleNotFoundError, MemoryError)):
        return True
    from lumirlib.methods.external import MethodUnavailableError
    from lumirlib.study.slurm import ClusterError
    from lumirlib.training.divergence import NonFiniteLossError

    return isinstance(error, (ClusterError, MethodUnavailableError, NonFiniteLossError))


def _examples(calls: str) -> str:
    lines = "".join(f"\n  {line.strip()}" for line in calls.strip().splitlines())
    return f"\b\nexamples:{lines}"  # click takes the lines as they are


class _Command(click.Command):
    """A sub-command: its examples, options that take several words, and the end of its errors.

    Args:
        examples: Calls of it, one a line.
        resumes: Whether the same call goes on where an interrupted one stopped.
    """

    def __init__(self, *arguments: Any, examples: str = "", resumes: bool = False, **attributes: Any) -> None:
        super().__init__(*arguments, epilog=_examples(examples), **attributes)
        self.resumes = resumes

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        """Read `--seeds 0 1 2` as `--seeds 0 --seeds 1 --seeds 2`, for options that may be repeated."""
        several = {name for one in self.params if getattr(one, "multiple", False) for name in one.opts}
        words: list[str] = []
        option = ""  # that the next words belong to
        for word in arguments:
            if word.startswith("-") and not re.match(r"-[\d.]", word):
                option = word if word in several else ""
                words.append(word)
            elif option and words[-1] != option:
                words += [option, word]
            else:
                words.append(word)
        return super().parse_args(context, words)

    def invoke(self, context: click.Context) -> None:
        """Call it; its status, if it returns one, is the exit status."""
        try:
            status = super().invoke(context)
        except KeyboardInterrupt as interrupt:
            usual = "stopped; the same command goes on from here" if self.resumes else "interrupted"
            click.echo(f"{context.command_path}: {str(interrupt) or usual}", err=True)
            status = 130
        except (click.ClickException, click.exceptions.Exit):
            raise
        except Exception as error:
            if not _is_expected(error):
                raise
            click.echo(f"{context.command_path}: {error}", err=True)
            status = 2
        context.exit(status or 0)


class _Group(click.Group):
    """Sub-commands, listed in the order in which they are written."""

    command_class = _Command
    group_class = type

    def list_commands(self, context: click.Context) -> list[str]:
        """Their names."""
        return list(self.commands)


@click.group(
    "lumirlib",
    cls=_Group,
    context_settings={"show_default": True, "help_option_names": ["-h", "--help"]},
    epilog=_examples("""
    lumirlib run LC-2 --preset demo
    lumirlib sweep --rows table2 --seeds 0 1 2 --preset demo
    lumirlib evaluate --run <run> --cohort brains
    lumirlib submission write disp.zip --run <run> --cohort lumir --data-root FOLDER
    lumirlib prepare scans --out cohort
    lumirlib register fixed.nii.gz moving.nii.gz --out registered
    """),
)
@click.version_option(__version__, message="lumirlib %(version)s")
def lumirlib() -> None:
    """The LUMIR reproducibility study: brain MRI registration, reproduced.

    `lumirlib COMMAND --help` explains a command. The exit status is 0; 1 where part of the work failed; 2 for
    arguments or data that cannot be used; 3 where scans were left out as implausible; 130 after Ctrl-C.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Words after `lumirlib`; those of this process if None.

    Returns:
        The exit status.
    """
    try:
        lumirlib.main(None if arguments is None else list(arguments), prog_name="lumirlib")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def parse_setting(text: str, argument: str = "--set") -> tuple[str, object]:
    """Name and value of "name=value", as `argument` takes them; the value is JSON (a number, true ...), or text."""
    name, equals, value = text.partition("=")
    if not (name.strip() and equals):
        raise ValueError(f"{argument} takes name=value, got {text!r}")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value.strip()


def _called() -> str:
    """The call of this sub-command as it was given, for provenance; paths of this machine keep their last part."""
    import shlex

    from lumirlib.provenance import redact_path

    context = click.get_current_context()
    words = context.command_path.split()
    for one in context.command.params:
        name = one.name or ""
        if name == "quiet" or context.get_parameter_source(name) is not click.core.ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        words += [one.opts[0]] if isinstance(one, click.Option) else []
        if value is not True:
            words += [redact_path(part) for part in (value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


# options that several sub-commands share ------------------------------------------------------------------------------
def _together(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _text(*names: str, help: str, **more: Any) -> Callable[[Function], Function]:
    """An option that is empty unless it is given."""
    return click.option(*names, default="", show_default=False, help=help, **more)


def _several(*names: str, metavar: str, help: str, **more: Any) -> Callable[[Function], Function]:
    """An option that takes several words."""
    return click.option(*names, multiple=True, metavar=f"{metavar} ...", help=help, **more)


def _cohort(default: str = "embedded") -> Callable[[Function], Function]:
    return _together(
        click.option(
            "--cohort",
            default=default,
            help="embedded, lumir, brains or the path of a Learn2Reg dataset JSON; several joined by '+': trained on "
            "all, evaluated on the last.",
        ),
        _text("--data-root", help="Folder that the JSON's paths are relative to, if not its own."),
    )


def _rows(default: Sequence[str]) -> Callable[[Function], Function]:
    return _several(
        "--rows", default=default, metavar="ROW", help="table1, table2, beyond, or names of rows such as LK+BF."
    )


def _seeds(default: Sequence[int]) -> Callable[[Function], Function]:
    return _several("--seeds", default=default, type=int, metavar="SEED", help="Seeds of each row.")


_PRESET = click.option("--preset", default="demo", help="smoke, demo, real-2mm, half, full or paper.")
_DEVICE = click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
_OUT = _text("--out", help="Results folder to write to; runs/ of the checkout, if not given.")
_READ = click.option("--results", default="study", help="Results to read: study (what is committed), or a folder.")
_RESULTS = _text("--results", help="Results folder that the run is in.")
_QUIET = click.option("--quiet", is_flag=True, help="No progress bars.")
_SKIP = "strip, bias, affine"
_JOBS = click.IntRange(min=1)

_SET = _several(
    "--set",
    "settings",
    metavar="NAME=VALUE",
    help="Options of row and preset, such as smoothness_weight=0.1 cascade=compositional.",
)

#: Arguments of :class:`lumirlib.training.engine.Engine`.
_ENGINE = _together(
    _DEVICE,
    click.option("--precision", default="auto", help="auto, 32-true or bf16-mixed."),
    click.option("--processes", default=1, help="GPUs of this machine to train on; or call torchrun."),
    click.option("--compile", is_flag=True, help="Compile the network."),
    click.option("--checkpointing", is_flag=True, help="Recompute activations: less memory, more time."),
    click.option("--cache", default="auto", help="Cache of volumes on disk: auto, on or off."),
    click.option("--readers", default=1, help="Threads that read ahead."),
    click.option("--deterministic", is_flag=True, help="Bitwise reproducible results, as far as the device allows."),
)

#: Arguments of :func:`lumirlib.training.registrar.choose_registrar`: what registers.
_METHOD = _together(
    _text("--weights", help="best.pt of a trained network."),
    _text("--run", help="Name of a trained run in the results folder."),
    _text("--pretrained", metavar="NAME", help="Weights of the package: `lumirlib weights list`."),
    _text("--method", help="Method that needs no training: deedsBCV, affine (zero displacement) ..."),
    _RESULTS,
    click.option(
        "--resolution",
        "resolution_mm",
        type=int,
        help="Voxels in mm: 1, 2 or 4; if not given, those that a network was trained at, 2 for --method.",
    ),
    _DEVICE,
)


# training -------------------------------------------------------------------------------------------------------------
@lumirlib.command(
    "run",
    resumes=True,
    examples="""
    lumirlib run LC-2 --preset demo
    lumirlib run CA+BF --preset paper --cohort lumir --data-root FOLDER --set smoothness_weight=5
    lumirlib run VoxelMorph --cohort brains --preset half --no-notebook
    torchrun --nproc-per-node 4 -m lumirlib run LC-2 --preset full --cohort brains --set batch_size=4
    """,
)
@click.argument("row")
@_PRESET
@_cohort()
@click.option("--seed", default=0, help="Random seed of weights and pairs.")
@_OUT
@_ENGINE
@_SET
@_text(
    "--init",
    help="Weights to start from: random (if not given), pretrained (packaged ones that fit), a name of "
    "`lumirlib weights list`, or the path of a best.pt.",
)
@click.option("--restart", is_flag=True, help="Start anew where a checkpoint would be resumed.")
@click.option("--no-notebook", is_flag=True, help="Train and evaluate here, without pictures; torchrun always does.")
@click.option("--train-only", is_flag=True, help="With --no-notebook: do not evaluate.")
@click.option("--consistency", is_flag=True, help="With --no-notebook: measure inverse consistency of every pair.")
@_QUIET
def run_row(
    row: str,
    preset: str,
    cohort: str,
    data_root: str,
    seed: int,
    out: str,
    settings: tuple[str, ...],
    init: str,
    restart: bool,
    no_notebook: bool,
    train_only: bool,
    consistency: bool,
    quiet: bool,
    **engine: Any,
) -> int:
    """Train and evaluate one row of a table; the same call resumes it.

    ROW is the backbone or schemes joined by '+' (backbone, LK, LC-1, LC-2, CA, BF, BF-post, CA+BF ...), or another
    team's method (VoxelMorph, TransMorph, SynthMorph, uniGradICON, deedsBCV ...).

    The executed notebook, with tables and pictures, is written to notebooks/ of the results folder.
    """
    from lumirlib.evaluation import summarize
    from lumirlib.study.results import read_results
    from lumirlib.study.run import Run
    from lumirlib.training.engine import Engine, launched

    no_notebook = no_notebook or launched()
    if not no_notebook and (train_only or consistency):
        raise click.UsageError("--train-only and --consistency go with --no-notebook")
    options = dict(parse_setting(text) for text in settings) | ({"init": init} if init else {})
    job = None
    if not no_notebook:
        from lumirlib.study.jobs import plan

        (job,) = plan([row], [seed], preset, cohort, data_root, out, options, engine=engine, resume=not restart)
    run = Run.prepare(
        row,
        preset,
        cohort,
        seed,
        data_root,
        out,
        Engine(**engine),
        options=options,
        command=_called(),
    )
    if run.engine.is_first:
        print(run.describe(), flush=True)
    if job:
        from lumirlib.study.sweep import execute_run

        broken = execute_run(job, run, not quiet)
        if broken:
            click.echo(f"lumirlib run: {broken.splitlines()[-1]}; see {job.failed}", err=True)
            return 1
        table, about = read_results(run.metrics_path)
        print(f"\nbest epoch {about['best_epoch']}; {job.output}; {run.metrics_path}")
    else:
        result = run.train(resume=not restart, progress=not quiet)
        if train_only or not run.engine.is_first:
            return 0
        table = run.evaluate(result, not quiet, consistency)
        print(f"\nbest epoch {result.best_epoch}; {run.metrics_path}")
    print(summarize(table).to_string(float_format="%.4f"))
    return 0


@lumirlib.command(
    "sweep",
    resumes=True,
    examples="""
    lumirlib sweep --rows table2 --seeds 0 1 2 --preset demo --dry-run
    lumirlib sweep --rows LK+BF VoxelMorph --cohort brains --preset half --jobs 2
    lumirlib sweep --rows table2 --seeds 0 1 2 --preset paper --executor slurm --slurm gpus_per_node=1 mem_gb=64
    """,
)
@_rows(["table2"])
@_seeds([0])
@_PRESET
@_cohort()
@_OUT
@_ENGINE
@_SET
@click.option("--jobs", type=_JOBS, help="Runs at a time; if not given, 1 here, all on a cluster.")
@click.option("--no-notebook", is_flag=True, help="Keep what each run prints in place of an executed notebook.")
@click.option("--executor", default="local", type=click.Choice(["local", "slurm"]), help="Where the runs are executed.")
@_several(
    "--slurm",
    "job_settings",
    metavar="NAME=VALUE",
    help="Options of each job, as submitit has them: partition=gpu gpus_per_node=1 mem_gb=64 timeout_min=1440 ...",
)
@click.option("--no-wait", is_flag=True, help="Submit to Slurm and return.")
@click.option("--dry-run", is_flag=True, help="List what would be run, and stop.")
def run_many(
    rows: tuple[str, ...],
    seeds: tuple[int, ...],
    preset: str,
    cohort: str,
    data_root: str,
    out: str,
    settings: tuple[str, ...],
    jobs: int | None,
    no_notebook: bool,
    executor: str,
    job_settings: tuple[str, ...],
    no_wait: bool,
    dry_run: bool,
    **engine: Any,
) -> int:
    """Run many rows and seeds, here or on Slurm.

    Finished runs are skipped, so the same command resumes where it stopped. Failed runs are run again.
    """
    import shlex

    from lumirlib import provenance
    from lumirlib.study import slurm, sweep
    from lumirlib.study.jobs import plan

    on_slurm = executor == "slurm"
    if not on_slurm and (job_settings or no_wait):
        raise click.UsageError("--slurm and --no-wait go with --executor slurm")
    options = dict(parse_setting(text) for text in settings)
    launcher = "train" if no_notebook else "notebook"
    runs = plan(rows, seeds, preset, cohort, data_root, out, options, launcher, engine)
    if dry_run:
        for run in runs:
            print("finished" if run.is_finished() else "to run  ", shlex.join(run.command(run.output)))
        return 0
    if on_slurm:
        queue = slurm.Queue(provenance.results_folder(out) / "slurm", "slurm")
        queue.submit(runs, dict(parse_setting(text, "--slurm") for text in job_settings), jobs)
        broken = {} if no_wait else queue.wait(runs)
    else:
        broken = sweep.run_sweep(runs, jobs or 1)
    for output, error in broken.items():
        click.echo(f"broken: {output.name}: {error.splitlines()[-1]}", err=True)
    return 1 if broken else 0


# evaluating -----------------------------------------------------------------------------------------------------------
def _summarized(table: pd.DataFrame, cohort: Cohort) -> str:
    from lumirlib.evaluation import summarize
    from lumirlib.study.results import data_title

    scored_mm = cohort.at_own_resolution.resolution_mm
    title = data_title(cohort.short_name, cohort.name, cohort.simulated, cohort.resolution_mm, scored_mm)
    return f"{title}\n{summarize(table).to_string(float_format='%.4f')}"


@lumirlib.command(
    "evaluate",
    examples="""
    lumirlib evaluate --run <run> --cohort brains
    lumirlib evaluate --method deedsBCV --resolution 4 --out deeds.csv
    """,
)
@_METHOD
@_cohort()
@_text("--out", help="CSV for the figures of every pair; a JSON with their provenance goes beside it.")
@_QUIET
def evaluate(cohort: str, data_root: str, out: str, quiet: bool, device: str, **chosen: Any) -> None:
    """Score a network or a method on all validation pairs of a cohort."""
    from lumirlib import provenance
    from lumirlib.data import load_cohort
    from lumirlib.evaluation import evaluate_method
    from lumirlib.study.results import check_results_path, scoring_facts, write_results
    from lumirlib.training.engine import pick_device
    from lumirlib.training.registrar import choose_registrar

    if out:
        check_results_path(out)
    target = pick_device(device)
    registrar = choose_registrar(device=device, **chosen)
    people = load_cohort(cohort, registrar.resolution_mm, data_root or None)
    table = evaluate_method(registrar.method, people, people.validation_pairs, target, progress=not quiet)
    if out:
        facts = {"method": registrar.name, **registrar.facts, **scoring_facts(people), "command": _called()}
        facts |= {"commit": provenance.commit(), "device": provenance.describe_device(target)}
        write_results(table, out, facts)
    print(f"{registrar.name}: {_summarized(table, people)}")


@lumirlib.group("submission")
def submission() -> None:
    """Write, validate or score the challenge's zip of displacements, or its files in a container."""


_ZIP = click.argument("path", metavar="ZIP")
_ZIP_RESOLUTION = click.option(
    "--resolution", "resolution_mm", default=1, help="Voxels of the zip's displacements, mm."
)


@submission.command(
    "write", examples="lumirlib submission write disp.zip --run <run> --cohort lumir --data-root FOLDER"
)
@_ZIP
@_METHOD
@_cohort()
@_QUIET
def write_zip(path: str, cohort: str, data_root: str, quiet: bool, device: str, **chosen: Any) -> None:
    """Run a network or a method on every validation pair."""
    from lumirlib.data import load_cohort
    from lumirlib.study.submission import write_submission
    from lumirlib.training.engine import pick_device
    from lumirlib.training.registrar import choose_registrar

    registrar = choose_registrar(device=device, **chosen)
    people = load_cohort(cohort, registrar.resolution_mm, data_root or None)
    print(write_submission(registrar.method, people, path, device=pick_device(device), progress=not quiet))


@submission.command(
    "predict",
    resumes=True,
    examples="""
    lumirlib submission predict --input input --output output --pretrained ours-1mm
    lumirlib submission predict --input input --output output --weights best.pt --json input/LUMIR_dataset.json
    """,
)
@click.option("--input", "folder", default="/input", help="Folder that the JSON's paths are relative to.")
@click.option("--output", default="/output", help="Folder for disp_FIXED_MOVING.nii.gz of every pair.")
@_text("--json", "json_path", help="Dataset JSON; the only *dataset*.json in --input or beside it, if not given.")
@_METHOD
@_QUIET
def predict(folder: str, output: str, json_path: str, quiet: bool, device: str, **chosen: Any) -> None:
    """Run a network or a method as the challenge's test phase does, on mounted folders and without network.

    Reads the pairs under "validation" (or else "test") of the JSON, and nothing else that it names.
    """
    from lumirlib.study import submission
    from lumirlib.training.engine import pick_device
    from lumirlib.training.registrar import choose_registrar

    registrar = choose_registrar(device=device, **chosen)
    people = submission.load_test_pairs(
        json_path or submission.find_dataset_json(folder), folder, registrar.resolution_mm
    )
    pairs = people.submission_pairs
    submission.write_displacements(registrar.method, people, output, pairs, pick_device(device), not quiet)
    print(f"{len(pairs)} displacements in {output}")


@submission.command("validate", examples="lumirlib submission validate disp.zip --cohort lumir --data-root FOLDER")
@_ZIP
@_ZIP_RESOLUTION
@_cohort()
@_QUIET
def validate_zip(path: str, resolution_mm: int, cohort: str, data_root: str, quiet: bool) -> int:
    """Say what is wrong with a zip before it is uploaded; the status is 1 if it must not be."""
    from lumirlib.data import load_cohort
    from lumirlib.study.submission import validate_submission

    people = load_cohort(cohort, resolution_mm, data_root or None)
    problems = validate_submission(path, people, progress=not quiet)
    for problem in problems:
        print(("error: " if problem.fatal else "remark: ") + problem.message)
    fatal = any(problem.fatal for problem in problems)
    print("not fit to be uploaded" if fatal else "fit to be uploaded, as to its form")
    return 1 if fatal else 0


@submission.command("score", examples="lumirlib submission score disp.zip --cohort brains")
@_ZIP
@_ZIP_RESOLUTION
@_cohort()
@_QUIET
def score_zip(path: str, resolution_mm: int, cohort: str, data_root: str, quiet: bool) -> None:
    """Score a zip on pairs with labels or landmarks."""
    from lumirlib.data import load_cohort
    from lumirlib.study.submission import score_submission

    people = load_cohort(cohort, resolution_mm, data_root or None)
    print(_summarized(score_submission(path, people, progress=not quiet), people))


# a user's own scans ---------------------------------------------------------------------------------------------------
@lumirlib.command(
    "prepare",
    resumes=True,
    examples="""
    lumirlib prepare scans --out cohort                       # heads as they come from the scanner
    lumirlib prepare scans --out cohort --jobs 4              # four at a time
    lumirlib prepare raw --out derivatives/lumirlib           # a BIDS dataset becomes a BIDS derivative
    lumirlib prepare brains --out cohort --skip strip bias    # brains that are stripped and corrected already
    lumirlib run LC-2 --cohort cohort/dataset.json            # train on them
    """,
)
@click.argument("folder")
@click.option("--out", required=True, help="Folder of the cohort; an interrupted call goes on from there.")
@_several("--skip", metavar="STEP", help=f"Steps done before: {_SKIP}.")
@click.option("--jobs", default=1, help="Scans at a time.")
@click.option("--validation", type=int, help="People held out, the last by name; a tenth if not given.")
@click.option("--keep-implausible", is_flag=True, help="Keep scans that are hardly a T1 brain.")
@click.option(
    "--recipe",
    default="direct",
    type=click.Choice(["direct", "lumir"]),
    help="direct: interpolated once; lumir: as the challenge's organizers publish it.",
)
@_text("--name", help="Name of the cohort; the folder's if not given.")
@_DEVICE
@_QUIET
def prepare(quiet: bool, **given: Any) -> int:
    """Make a folder of T1 scans into a cohort in the LUMIR frame.

    FOLDER has .nii or .nii.gz files, at any depth. All scans of a person, by BIDS names, stay on one side of the split.
    Where FOLDER has dataset_description.json, its *_T1w are taken, and --out is a BIDS derivative too.
    Skulls are stripped on --device. The status is 1 where a scan could not be prepared, 3 where one was left out as
    hardly a T1 brain.
    """
    from lumirlib._checks import counted
    from lumirlib.scans.folder import prepare_folder

    made = prepare_folder(**given, progress=not quiet)
    content = json.loads(made.path.read_text(encoding="utf-8"))
    counts = counted(content["numTraining"], "training scan"), counted(content["numValidation"], "validation pair")
    print(f"{made.path}: {', '.join(counts)}")
    print(f"look at {made.path.parent / 'qc_1.png'}, worst correlation with the template first")
    kept = given["keep_implausible"]
    told = [f"skipped: {file}: {why}" for file, why in made.skipped.items()]
    told += [f"remark: {remark}" for remarks in made.remarks.values() for remark in remarks]
    told += [
        f"{'kept' if kept else 'left out'}: {scan}: hardly a T1 brain; it {why}"
        for scan, why in made.implausible.items()
    ]
    told += [f"left out: {scan}: {error}" for scan, error in made.broken.items()]
    for line in told:
        click.echo(line, err=True)
    return 1 if made.broken else 3 if made.implausible and not kept else 0


_OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace results that are there.")


@lumirlib.command(
    "register",
    examples="""
    lumirlib register fixed.nii.gz moving.nii.gz --out registered                  # the best packaged weights, 1 mm
    lumirlib register fixed.nii.gz moving.nii.gz --out registered --fast           # the same at 2 mm
    lumirlib register fixed.nii.gz moving.nii.gz --out registered --moving-mask lesion.nii.gz
    lumirlib register t1.nii.gz flair.nii.gz --out registered --contrast any
    lumirlib register fixed.nii.gz moving.nii.gz --out registered --method deedsBCV
    lumirlib register sub-01_T1w.nii.gz sub-02_T1w.nii.gz --out derivatives --bids
    antsApplyTransforms -d 3 -i moving.nii.gz -r fixed.nii.gz -t registered/transform.nii.gz -o warped.nii.gz
    """,
)
@click.argument("fixed")
@click.argument("moving")
@click.option("--out", required=True, help="Folder of the results.")
@click.option("--fast", is_flag=True, help="The packaged weights at 2 mm in place of 1 mm.")
@click.option(
    "--contrast",
    default="t1",
    type=click.Choice(["t1", "any"]),
    help="any: for other sequences than T1, or two that differ; if one is a T1, it should be FIXED.",
)
@_text("--fixed-mask", metavar="FILE", help="Mask, not zero where the fixed scan does not count (lesion, resection).")
@_text("--moving-mask", metavar="FILE", help="The same for the moving scan.")
@click.option("--displacements", is_flag=True, help="Also write displacements in voxels, as Learn2Reg has them.")
@click.option("--bids", is_flag=True, help="Name the results as BIDS derivatives.")
@_OVERWRITE
@_METHOD
@_several("--skip", metavar="STEP", help=f"Steps done before to both scans: {_SKIP}.")
@_several("--skip-fixed", metavar="STEP", help="Steps done before to the fixed scan.")
@_several("--skip-moving", metavar="STEP", help="Steps done before to the moving scan.")
@_QUIET
def register(quiet: bool, **given: Any) -> None:
    """Register two scans: images, transforms and their inverses in the spaces of both.

    FIXED and MOVING are NIfTI files of heads, any orientation and spacing. Without --weights, --run, --pretrained or
    --method the best packaged weights are taken. `lumirlib apply` carries labels, images and points.
    """
    from lumirlib.scans.register import register

    found = register(**given, progress=not quiet, command=_called())
    facts = json.loads(found.files["report"].read_text(encoding="utf-8"))
    print(_registered_by(facts))
    for name, value in found.measures.items():
        print(f"{name:24s} {value:.4f}")
    print(*(f"{kind}: {path}" for kind, path in found.files.items()), sep="\n")


def _registered_by(facts: dict[str, Any]) -> str:
    """What registered two scans, on which voxels, and why on those."""
    works = f"on voxels of {facts['resolution_mm']} mm"
    name = facts.get("pretrained") or facts.get("run")
    if name is None:
        return f"registered by {facts['method']}, {works}"
    trained, kind = facts["trained_at_mm"], "packaged weights" if "pretrained" in facts else "run"
    if trained == facts["resolution_mm"]:
        return f"registered by the {kind} {name}, {works}, as in training"
    finer = "; finer voxels than in training, as they align brains better" * (facts["resolution_mm"] < trained)
    return f"registered by the {kind} {name}, trained on voxels of {trained:g} mm; here {works}{finer}"


@lumirlib.command(
    "apply",
    examples="""
    lumirlib apply registered/transform.nii.gz labels.nii.gz --reference fixed.nii.gz --out labels_on_fixed.nii.gz
    lumirlib apply registered/transform.nii.gz moving_bold.nii.gz --reference fixed.nii.gz --out bold_on_fixed.nii.gz
    lumirlib apply registered/inverse_transform.nii.gz atlas.nii.gz --reference moving.nii.gz --out on_moving.nii.gz
    lumirlib apply to_template.nii.gz affine.mat scan.nii.gz --reference template.nii.gz --out scan_in_template.nii.gz
    lumirlib apply registered/transform.nii.gz points.csv --points ras --out points_on_fixed.csv
    """,
)
@click.argument("transforms", metavar="TRANSFORM...", nargs=-1, required=True)
@click.argument("input")
@_text("--reference", metavar="FILE", help="NIfTI file whose grid the result gets; for points, with voxels only.")
@click.option("--out", required=True, metavar="FILE", help="File to write.")
@click.option(
    "--interpolation",
    default="auto",
    type=click.Choice(["auto", "linear", "cubic", "nearest", "label"]),
    help="auto: nearest for label maps, else linear; label: smoother for label maps of thick slices.",
)
@click.option("--inverse", is_flag=True, help="Invert the transforms, all of them as one.")
@click.option("--points", type=click.Choice(["ras", "lps", "voxels"]), help="Coordinates of INPUT, a CSV of points.")
@_text("--points-of", metavar="FILE", help="With --points voxels: the image whose voxels these are.")
@_OVERWRITE
def apply(
    transforms: tuple[str, ...],
    input: str,
    reference: str,
    out: str,
    interpolation: str,
    inverse: bool,
    points: str | None,
    points_of: str,
    overwrite: bool,
) -> None:
    """Carry an image, label map, series or points by transforms, interpolated once.

    TRANSFORMs are displacement fields of ITK and ANTs (NIfTI) or files that ITK reads (.mat, .txt, .tfm, .xfm, .h5).
    The first one leads away from the reference, the last one to INPUT, as for antsApplyTransforms. Points go with
    the image: from where they lie in INPUT to where they lie in the reference.
    """
    from lumirlib.scans.apply import apply_to_image, apply_to_points

    if points:
        done = apply_to_points(transforms, input, points, out, reference, points_of, inverse, overwrite)
    elif input.lower().endswith(".csv"):
        raise click.UsageError("a CSV of points needs --points ras, lps or voxels")
    elif not reference:
        raise click.UsageError("an image needs --reference")
    else:
        done = apply_to_image(transforms, input, reference, out, interpolation, inverse, overwrite)
    for remark in done.remarks:
        click.echo(f"remark: {remark}", err=True)
    print(f"{done.path}: {done.about}")


# weights of the package -----------------------------------------------------------------------------------------------
@lumirlib.group("weights")
def weights() -> None:
    """List, check or make the pretrained weights of the package."""


@weights.command("list", examples="lumirlib weights list")
def list_weights() -> None:
    """List the packaged weights, with their Dice."""
    from lumirlib.training.weights import FOLDER, names, read_packaged

    for one in map(read_packaged, names()):
        dice = one.facts["figures"]["dice"]["mean"]
        print(
            f"{one.name}: {one.row.name}, {one.resolution_mm:g} mm, Dice {100 * dice:.2f} % on "
            f"{one.facts['evaluation']['cohort_name']}; {FOLDER / one.name}.md"
        )


@weights.command("export", examples="lumirlib weights export --run <run> --name ours-1mm --set unfolding=8")
@click.option("--run", required=True, help="Name of the run in the results folder.")
@click.option("--name", required=True, help="Name of the weights, such as ours-1mm.")
@_several("--set", "settings", metavar="NAME=VALUE", help="How they register: refinements, unfolding.")
@_RESULTS
@_cohort("brains")
@_DEVICE
@_QUIET
def export_weights(
    run: str, name: str, settings: tuple[str, ...], results: str, cohort: str, data_root: str, device: str, quiet: bool
) -> None:
    """Evaluate a finished run and package its weights with a card."""
    from lumirlib.study.model_cards import export

    options = dict(parse_setting(text) for text in settings)
    print(export(run, name, results, cohort, data_root, device, not quiet, _called(), options))


@weights.command(
    "check",
    examples="""
    lumirlib weights check
    lumirlib weights check ours-1mm
    """,
)
@click.argument("names", nargs=-1)
@_cohort("brains")
@_DEVICE
@_QUIET
def check_weights(names: tuple[str, ...], cohort: str, data_root: str, device: str, quiet: bool) -> int:
    """Measure packaged weights anew: all, or those of the NAMES.

    The status is 1 if Dice differs from the card's by more than 0.1 point.
    """
    from lumirlib.study.model_cards import check
    from lumirlib.training import weights as packaged

    chosen = names or packaged.names()
    if not chosen:
        raise ValueError("no weights are packaged")
    right = [check(name, cohort, data_root, device, not quiet) for name in chosen]  # all, whatever the first says
    return 0 if all(right) else 1


@weights.command("cards", examples="lumirlib weights cards")
def write_cards() -> None:
    """Write the cards anew from the facts in the weights' files."""
    from lumirlib.study import model_cards

    print(*model_cards.write_cards(), sep="\n")


# the machine ----------------------------------------------------------------------------------------------------------
@lumirlib.command(
    "cache",
    resumes=True,
    examples="""
    lumirlib cache --cohort lumir --data-root FOLDER --preset paper
    lumirlib cache --cohort brains --resolution 2 --repair
    """,
)
@_cohort()
@_PRESET
@click.option("--resolution", type=float, help="Voxel size in mm, in place of the preset's.")
@_text("--folder", help="Folder of caches; the user's cache folder if not given.")
@click.option("--dtype", default="auto", help="auto (integers where exact, else float16), float16 or float32.")
@click.option("--workers", type=int, help="Threads that read scans; one per core, at most 8, if not given.")
@click.option("--verify", is_flag=True, help="Compare the checksum of every volume.")
@click.option("--repair", is_flag=True, help="Verify, and make damaged volumes anew.")
@_QUIET
def cache(
    cohort: str,
    data_root: str,
    preset: str,
    resolution: float | None,
    folder: str,
    dtype: str,
    workers: int | None,
    verify: bool,
    repair: bool,
    quiet: bool,
) -> None:
    """Make, check or repair the cache of volumes that training reads.

    The volumes are memory-mapped. An interrupted call goes on where it stopped.
    """
    import time

    from lumirlib.data import load_cohort
    from lumirlib.data.dataset_json import LUMIR_SCANS
    from lumirlib.methods.presets import get_preset

    resolution = get_preset(preset).resolution_mm if resolution is None else resolution
    people = load_cohort(cohort, resolution, data_root or None)
    started = time.perf_counter()
    cached = people.with_cache(folder or None, dtype, workers, not quiet, verify, repair)
    seconds, caches = time.perf_counter() - started, [part.cache for part in cached.parts]
    made = sum(one.made for one in caches)
    print(f"{people.name}, {resolution:g} mm: {cached.describe_cache()}")
    for one in caches:
        print(f"{one.folder}: {one.nbytes / 1e9:.2f} GB")
    print(f"{made} volumes made in {seconds:.1f} s")
    image = cached.stored_image(next(iter([*people.train, *(pair.fixed for pair in people.validation_pairs)])))
    size = LUMIR_SCANS * image.values.nbytes / 1e9
    print(f"LUMIR's {LUMIR_SCANS} scans, if like these: {size:.1f} GB of disk, and as much free memory to stay there")
    if made:
        print(f"and {LUMIR_SCANS * seconds / made / 60:.0f} minutes to make")


@lumirlib.command("info", examples="lumirlib info")
def info() -> None:
    """Show versions, devices and available cohorts."""
    import os

    import psutil
    import torch

    from lumirlib import provenance
    from lumirlib.data.dataset_json import BRAINS_VARIABLE, cohort_json
    from lumirlib.data.embedded import EmbeddedPopulation, cache_folder
    from lumirlib.data.frame import RESOLUTIONS_MM
    from lumirlib.methods import availability
    from lumirlib.training.weights import names

    def show(title: str, facts: dict[str, object]) -> None:
        print(title)
        for name, value in facts.items():
            print(f"  {name:28s} {value}")

    show("versions", provenance.versions() | {"commit": provenance.commit()})
    memory = psutil.virtual_memory()
    devices: dict[str, object] = {
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {memory.available / 2**30:.1f} of "
        f"{memory.total / 2**30:.1f} GiB free"
    }
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        devices[f"cuda:{number}"] = f"{found.name}, {found.total_memory / 2**30:.1f} GiB"
    show("devices", devices)
    made = cache_folder() / EmbeddedPopulation().name()
    here = [f"{mm} mm" for mm in RESOLUTIONS_MM if (made / f"{mm}mm" / "dataset.json").is_file()]
    cohorts: dict[str, object] = {
        "embedded": f"made: {', '.join(here)}" if here else "made on first use",
        "lumir": "wherever --data-root says: the folder with LUMIR_dataset.json",
        "brains": f"not found: {BRAINS_VARIABLE} is not set",
    }
    if os.environ.get(BRAINS_VARIABLE):
        path = cohort_json("brains", None, None)
        cohorts["brains"] = f"{path}{'' if path.is_file() else ' does not exist'}"
    show("cohorts", cohorts)
    folder = provenance.results_folder() / "checkpoints"
    show("trained runs", {path.parent.name: "" for path in sorted(folder.glob("*/best.pt"))} or {"none": folder})
    show("pretrained weights", dict.fromkeys(names(), "") or {"none": ""})
    show("tools", dict(availability().itertuples(index=False)))
    show("preparing scans", {name: _version(name) for name in ("deepbet", "SimpleITK")})


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return 'not installed: pip install "lumirlib[prepare]"'


# measuring ------------------------------------------------------------------------------------------------------------
@lumirlib.group("measure")
def measure() -> None:
    """Measure costs, folding and robustness of rows."""


@measure.command(
    "costs",
    examples="""
    lumirlib measure costs --rows table2 BF-post --preset demo
    lumirlib measure costs --rows table1 --preset paper --device cuda
    """,
)
@_rows(["table2", "BF-post"])
@_PRESET
@_DEVICE
@click.option("--rounds", default=3, type=_JOBS, help="How often each row is measured.")
@click.option("--repeats", default=3, type=_JOBS, help="Repeats of each timing within a round.")
@click.option("--no-training", is_flag=True, help="Measure registration alone.")
@_OUT
def measure_costs(
    rows: tuple[str, ...], preset: str, device: str, rounds: int, repeats: int, no_training: bool, out: str
) -> None:
    """Parameters, multiply-adds, seconds and memory of rows, side by side.

    Every row is measured in a process of its own, all of them in turn, several rounds over, on random images of the
    preset's size. The machine should have nothing else to do.
    """
    from lumirlib.study import costs

    table, path = costs.measure_rows(rows, preset, device, rounds, repeats, not no_training, out, _called())
    columns = ["seconds_per_pair", "seconds_per_step", "inference_mib", "training_mib"]
    print(table.groupby("variant", sort=False)[columns].median().to_string(float_format="%.3f"))
    print(path)


@measure.command("folding", examples="lumirlib measure folding --rows LC-1 LC-2 --seeds 0 1 2 --preset demo")
@_rows(["LC-1", "LC-2"])
@_seeds([0, 1, 2])
@_PRESET
@_cohort()
@_several("--factors", default=[1.0, 2.0, 3.0, 4.0], type=float, metavar="FACTOR", help="Factors of the velocities.")
@_OUT
@_DEVICE
def measure_folding(**given: Any) -> None:
    """Folds of the two cascades: velocities of trained rows, joined additively and compositionally."""
    from lumirlib.study import folding

    table, path = folding.measure_rows(**given, command=_called())
    print(table.groupby(["variant", "cascade", "factor"], sort=False)[["ndv_percent", "displacement_mm"]].mean())
    print(path)


@measure.command(
    "robustness",
    resumes=True,
    examples="lumirlib measure robustness --rows LC-2+LR4+MUON ours --preset real-2mm --cohort brains --seeds 0 1",
)
@_rows(["LC-2+LR4+MUON", "ours"])
@_seeds([0, 1, 2])
@_PRESET
@_cohort()
@click.option("--pairs", type=_JOBS, help="Number of pairs, evenly spaced; all if not given.")
@_OUT
@_DEVICE
def measure_robustness(**given: Any) -> None:
    """Trained rows on altered moving images: contrast, thick slices, missing tissue."""
    from lumirlib.study import robustness

    for path in robustness.measure_rows(**given, command=_called()):
        print(path)


# reporting ------------------------------------------------------------------------------------------------------------
def _write_option(page: str) -> Any:
    """The option `--write`, for a page of the checkout."""
    return click.option("--write", is_flag=True, help=f"Put it into {page} of the checkout, between its markers.")


def _page(name: str) -> Path:
    from lumirlib.provenance import project_root

    return (project_root() or Path.cwd()) / name


@lumirlib.group("report")
def report() -> None:
    """Verdicts, costs and ranks from finished runs; checks, site and PDF of the study."""


@report.command(
    "verify",
    examples="""
    lumirlib report verify
    lumirlib report verify --write
    """,
)
@click.option("--write", is_flag=True, help="Put what the results make now in the place of what is committed.")
def report_verify(write: bool) -> int:
    """Make every table, figure, verdict, card and part of a page anew from the committed results, and compare.

    Lists what drifted, with file and line; the status is 1 then. To be called in a checkout.
    """
    from lumirlib.study.report import verify

    root = _page("")
    if write:
        print(*verify.renew(root), sep="\n")
        return 0
    found = verify.verify(root)
    print(*found.drifts, sep="\n", end="\n" * bool(found.drifts))
    print("made anew and compared: " + ", ".join(f"{len(what)} {kind}" for kind, what in found.compared.items()))
    print(f"pictures of scans, which need weights and scans: {len(found.pictures)}")
    print(f"{len(found.drifts)} drifted")
    return 1 if found.drifts else 0


@report.command("crate", examples="lumirlib report crate")
def report_crate() -> None:
    """Describe results/ of the checkout as an RO-Crate: licence, source and SHA-256 of every file."""
    from lumirlib.study.report import crate

    print(crate.write_crate(_page("")))


@report.command("site", examples="lumirlib report site --out site")
@click.option("--out", default="site", help="Folder to write to; index.html there is the start page.")
def report_site(out: str) -> int:
    """Build the study as pages that open from disk: start page, notebooks, tables, docs, API reference, search.

    The status is 1 where a link leads nowhere.
    """
    from lumirlib.study.report.site import build_site

    warnings = build_site(_page(""), out)
    click.echo("\n".join(warnings), err=True, nl=bool(warnings))
    print(Path(out) / "index.html")
    return 1 if warnings else 0


@report.command("pdf", examples="lumirlib report pdf --out report.pdf")
@click.option("--cohort", default="brains", help="Short name of the cohort of the runs.")
@click.option("--preset", default="real-2mm", help="Preset of the runs.")
@click.option("--out", default="report.pdf", help="Path of the PDF.")
def report_pdf(cohort: str, preset: str, out: str) -> None:
    """Typeset the study on four pages: question, methods, tables, figures, claims, limits and every deviation."""
    from lumirlib.study.report.pdf import build_pdf

    print(build_pdf(_page(""), out, cohort, preset))


@report.command("manifest", examples="lumirlib report manifest --cohort brains")
@_cohort()
@_OUT
def report_manifest(cohort: str, data_root: str, out: str) -> None:
    """Write which files a cohort is made of, with their SHA-256, to cohorts/ of the results folder."""
    from lumirlib.data import load_cohort
    from lumirlib.provenance import results_folder
    from lumirlib.study.report import crate

    print(crate.write_manifest(load_cohort(cohort, 4, data_root or None), results_folder(out)))


@report.command(
    "claims",
    examples="""
    lumirlib report claims --cohort brains --preset real-2mm
    lumirlib report claims --write
    """,
)
@click.option("--cohort", default="brains", help="Short name of the cohort of the runs.")
@click.option("--preset", default="real-2mm", help="Preset of the runs.")
@_READ
@_write_option("README.md")
def report_claims(cohort: str, preset: str, results: str, write: bool) -> None:
    """The paper's claims, judged from finished runs by stated rules."""
    from lumirlib.files import write_between
    from lumirlib.provenance import results_folder
    from lumirlib.study.report import claims, publish

    study = claims.load_study(results_folder(results), cohort, preset)
    verdicts = claims.judge(study)
    if write:
        print(write_between(_page("README.md"), claims.MARKERS, claims.summary(study, verdicts)))
    else:
        print(publish.to_markdown(claims.readable(verdicts)))


@report.command(
    "budget",
    examples="""
    lumirlib report budget
    lumirlib report budget --write
    """,
)
@_READ
@_write_option("docs/speed.md")
def report_budget(results: str, write: bool) -> None:
    """What the full reproduction costs: GPU-hours, disk and memory, from what `lumirlib measure costs` wrote."""
    from lumirlib.files import write_between
    from lumirlib.provenance import results_folder
    from lumirlib.study import costs

    text = costs.readable_budget(costs.load_budget(results_folder(results)))
    print(write_between(_page("docs/speed.md"), costs.MARKERS, text) if write else text)


@report.command("ranks", examples="lumirlib report ranks results/metrics/LC-2_*.csv results/metrics/TransMorph_*.csv")
@click.argument("results", nargs=-1, required=True)
@click.option("--published", is_flag=True, help="Score among the published rows; results on LUMIR only.")
def report_ranks(results: tuple[str, ...], published: bool) -> None:
    """Ranks of methods on the same pairs: by significance, and by the challenge's snapshot score.

    RESULTS are CSVs of metrics, each with its provenance (.json) beside it.
    """
    from lumirlib.study.report import statistics

    tables, cohort = statistics.read_scores(results)
    ranks = statistics.rank(tables)
    scores = statistics.snapshot_scores(tables, cohort, published)
    print(f"ranks by significance, cohort {cohort}")
    print(ranks.to_string(float_format="%.3g"))
    print("\nsnapshot score, 1 is best" + ("; rows marked published are other teams' figures" if published else ""))
    print(scores.to_string(float_format="%.4g"))
