"""The command `lumirlib`: one entry point for what the modules do; each is imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from typing import TYPE_CHECKING

import pandas as pd

from lumirlib._version import __version__

if TYPE_CHECKING:
    from lumirlib.data import Cohort

#: Subcommand -> module and function that it calls with (arguments, prog), and what it does.
COMMANDS = {
    "run": ("lumirlib.train:main", "train and evaluate one row of a table, resuming"),
    "sweep": ("lumirlib.study.sweep:main", "many rows and seeds, here or on Slurm"),
    "evaluate": ("lumirlib.cli:evaluate", "score a trained network or a method on a cohort"),
    "submission": ("lumirlib.cli:submission", "write, validate or score the challenge's zip"),
    "prepare": ("lumirlib.scans.prepare:main", "make a folder of scans into a cohort"),
    "register": ("lumirlib.scans.register:main", "register two scans, in the fixed scan's own space"),
    "weights": ("lumirlib.training.weights:main", "list, check or make the pretrained weights of the package"),
    "cache": ("lumirlib.cache:main", "make, check or mend the volumes that training reads"),
    "info": ("lumirlib.cli:info", "versions, devices, and which cohorts are there"),
}

EXAMPLES = """examples:
  lumirlib run --variant LC-2 --preset demo
  lumirlib sweep --rows table2 --seeds 0 1 2 --preset demo
  lumirlib evaluate --run <run> --cohort brains
  lumirlib submission write disp.zip --run <run> --cohort lumir --data-root FOLDER
  lumirlib prepare scans --out cohort
  lumirlib register fixed.nii.gz moving.nii.gz --out registered --method deedsBCV

`lumirlib COMMAND --help` explains a command. The exit status is 0; 1 where part of the work failed, 2 for arguments or
data that cannot be used, 130 after Ctrl-C.
"""


def _options(prog: str, description: str, examples: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parser() -> argparse.ArgumentParser:
    """The options of the command itself."""
    options = argparse.ArgumentParser(
        prog="lumirlib",
        description="The LUMIR reproducibility study: brain MRI registration, reproduced.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--version", action="version", version=f"lumirlib {__version__}")
    commands = options.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, words) in COMMANDS.items():
        commands.add_parser(name, help=words, add_help=False)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Call a subcommand; the exit status is that of the subcommand, see :data:`EXAMPLES`."""
    given = sys.argv[1:] if arguments is None else arguments
    command = parser().parse_args(given[:1]).command  # what follows is the subcommand's
    module, function = COMMANDS[command][0].split(":")
    return getattr(importlib.import_module(module), function)(given[1:], f"lumirlib {command}")


# subcommands without a module of their own ----------------------------------------------------------------------------
def _add_method(options: argparse.ArgumentParser) -> None:
    by = options.add_mutually_exclusive_group(required=True)
    by.add_argument("--weights", default="", help="best.pt of a trained network")
    by.add_argument("--run", default="", help="name of a trained run in the results folder")
    by.add_argument("--pretrained", default="", metavar="NAME", help="weights of the package: `lumirlib weights list`")
    by.add_argument(
        "--method", default="", help="one that needs no training: deedsBCV, affine (zero displacement), ..."
    )
    options.add_argument("--results", default="", help="results folder")
    options.add_argument("--resolution", type=int, help="mm, for --method: 1, 2, 4; 2 if not given")
    options.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")


def _add_cohort(options: argparse.ArgumentParser) -> None:
    options.add_argument("--cohort", default="embedded", help="embedded, lumir, brains, or a Learn2Reg dataset JSON")
    options.add_argument("--data-root", default="", help="folder the JSON's paths are relative to; its own if empty")
    options.add_argument("--quiet", action="store_true", help="no progress bar")


def _summarized(table: pd.DataFrame, cohort: Cohort) -> str:
    from lumirlib.evaluation import summarize
    from lumirlib.study.results import data_title

    title = data_title(cohort.short_name, cohort.name, cohort.simulated, cohort.resolution_mm)
    return f"{title}\n{summarize(table).to_string(float_format='%.4f')}"


def evaluate(arguments: list[str], prog: str) -> int:
    """Score a network or a method on a cohort; the exit status is 0, or 2 for what cannot be used."""
    options = _options(
        prog,
        "Score a trained network or a method on a cohort's validation pairs.",
        f"  {prog} --run <run> --cohort brains\n  {prog} --method deedsBCV --resolution 4 --out deeds.csv\n",
    )
    _add_method(options)
    _add_cohort(options)
    options.add_argument(
        "--out", default="", help="CSV for the figures of every pair, with a JSON of where they are from"
    )
    given = options.parse_args(arguments)

    from lumirlib import provenance
    from lumirlib.data import load_cohort
    from lumirlib.evaluation import evaluate_method
    from lumirlib.study.results import cohort_facts, write_results
    from lumirlib.training.engine import pick_device
    from lumirlib.training.registrar import choose_registrar

    try:
        device = pick_device(given.device)
        chosen = choose_registrar(
            given.weights, given.run, given.method, given.results, given.resolution, given.device, given.pretrained
        )
        cohort = load_cohort(given.cohort, chosen.resolution_mm, given.data_root or None)
        table = evaluate_method(chosen.method, cohort, cohort.validation_pairs, device, progress=not given.quiet)
        if given.out:
            facts = {"method": chosen.name, **chosen.facts, **cohort_facts(cohort), "command": prog}
            facts |= {"commit": provenance.commit(), "device": provenance.describe_device(device)}
            write_results(table, given.out, facts)
    except (ValueError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    print(f"{chosen.name}: {_summarized(table, cohort)}")
    return 0


def submission(arguments: list[str], prog: str) -> int:
    """Write, validate or score a zip; the exit status is 0, 1 if it must not be uploaded, 2 for what cannot be used."""
    options = argparse.ArgumentParser(prog=prog, description="The challenge's zip of displacements.")
    actions = options.add_subparsers(dest="action", metavar="ACTION", required=True)
    for action, words, example in (
        (
            "write",
            "run a network or a method on every validation pair",
            "--run <run> --cohort lumir --data-root FOLDER",
        ),
        ("validate", "say what is wrong with a zip before it is uploaded", "--cohort lumir --data-root FOLDER"),
        ("score", "score a zip where labels or landmarks are there", "--cohort brains"),
    ):
        one = actions.add_parser(
            action,
            help=words,
            description=words,
            epilog=f"example:\n  {prog} {action} disp.zip {example}\n",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.add_argument("zip", help="path of the zip")
        if action == "write":
            _add_method(one)
        else:
            one.add_argument("--resolution", type=int, default=1, help="mm of the zip's displacements")
        _add_cohort(one)
    given = options.parse_args(arguments)

    from lumirlib.data import load_cohort
    from lumirlib.study.submission import score_submission, validate_submission, write_submission
    from lumirlib.training.engine import pick_device
    from lumirlib.training.registrar import choose_registrar

    try:
        resolution, registrar = given.resolution, None
        if given.action == "write":
            registrar = choose_registrar(
                given.weights, given.run, given.method, given.results, resolution, given.device, given.pretrained
            )
            resolution = registrar.resolution_mm
        cohort = load_cohort(given.cohort, resolution, given.data_root or None)
        if registrar:
            device = pick_device(given.device)
            print(write_submission(registrar.method, cohort, given.zip, device=device, progress=not given.quiet))
            return 0
        cohort = load_cohort(given.cohort, given.resolution, given.data_root or None)
        if given.action == "score":
            print(_summarized(score_submission(given.zip, cohort, progress=not given.quiet), cohort))
            return 0
        findings = validate_submission(given.zip, cohort, progress=not given.quiet)
    except (ValueError, OSError) as error:
        print(f"{prog} {given.action}: {error}", file=sys.stderr)
        return 2
    print(*(("error: " if finding.fatal else "remark: ") + finding.message for finding in findings), sep="\n")
    fatal = any(finding.fatal for finding in findings)
    print("not fit to be uploaded" if fatal else "fit to be uploaded, as to its form")
    return 1 if fatal else 0


def info(arguments: list[str], prog: str) -> int:
    """Print versions, devices and cohorts; the exit status is 0."""
    _options(prog, "Versions, devices, and which cohorts are there.", f"  {prog}\n").parse_args(arguments)

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
    return 0


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return 'not installed: pip install "lumirlib[prepare]"'


if __name__ == "__main__":
    sys.exit(main())


def parse_setting(text: str, argument: str = "--set") -> tuple[str, object]:
    """Name and value of "name=value", as `argument` takes them; the value is JSON (a number, true ...), or text."""
    name, equals, value = text.partition("=")
    if not (name.strip() and equals):
        raise ValueError(f"{argument} takes name=value, got {text!r}")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value.strip()
