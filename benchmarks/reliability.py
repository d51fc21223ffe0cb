"""Faults, bad data and hostile files: run all of their tests and count what was tried, for docs/reliability.md.

    python benchmarks/reliability.py              # a quarter of an hour on an idle CPU
    python benchmarks/reliability.py -- -k "not two_thousand and not papermill"

What follows `--` is handed to pytest. Where a test fails nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch

from lumirlib import provenance
from lumirlib.files import write_between, write_json
from lumirlib.provenance import describe_device
from lumirlib.study.results import to_markdown

ROOT = Path(__file__).resolve().parent.parent
TESTS = "tests/reliability"
MARKERS = ("<!-- python benchmarks/reliability.py -->", "<!-- end of python benchmarks/reliability.py -->")
TARGET = ROOT / "results" / "reliability" / "tally.json"


def readable(tally: dict) -> str:
    """The counts as Markdown."""
    rows = [
        {
            "tried": kind,
            "times": sum(outcomes.values()),
            "outcome": ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(outcomes.items())),
        }
        for kind, outcomes in tally["counts"].items()
    ]
    head = (
        f"{tally['tests']} tests, {tally['failed']} failed; {sum(row['times'] for row in rows):,} things tried, none "
        f"read wrongly, none with another's error. Commit {tally['commit'][:9]}, {tally['device']}."
    )
    return f"{head}\n\n{to_markdown(pd.DataFrame(rows))}"


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("pytest_arguments", nargs="*", help="further arguments of pytest, behind --")
    arguments = options.parse_args(arguments).pytest_arguments
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "tally.json")
        commit = provenance.commit()
        command = [sys.executable, "-m", "pytest", "--long", "-q", "-n0", TESTS, *arguments]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "LUMIRLIB_TALLY": str(target)})
        if done.returncode:
            return done.returncode
        found = json.loads(target.read_text(encoding="utf-8"))
    about = {
        "command": " ".join(["python benchmarks/reliability.py", *arguments]),
        "commit": commit,
        "device": describe_device(torch.device("cpu")),
        "written": provenance.now(),
        "versions": provenance.versions(),
    }
    write_json(TARGET, {**about, **found})
    print(write_between(ROOT / "docs" / "reliability.md", MARKERS, readable({**about, **found})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
