"""What the full reproduction costs, `python -m lumirlib.budget`: GPU-hours, disk and memory, as a table for README.

    python -m lumirlib.budget            # prints it
    python -m lumirlib.budget --write    # puts it into README.md, between its markers

Everything is computed from `results/costs/*.csv`, which `python -m lumirlib.costs` measures, and from the sizes below.
GPU-hours appear as soon as the costs of the preset `paper` have been measured on a GPU.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lumirlib import provenance
from lumirlib.data.embedded import FRAME_SHAPE
from lumirlib.files import write_atomically
from lumirlib.presets import PAPER
from lumirlib.sweep import rows_of_table
from lumirlib.tables import read_measured, to_markdown

#: Scans of the LUMIR task's training set, and those of them that are held out with labels.
LUMIR_SCANS, LUMIR_HELD_OUT = 3384, 10
#: Pairs that choose the best epoch: all ordered pairs of the scans held out.
VALIDATION_PAIRS = LUMIR_HELD_OUT * (LUMIR_HELD_OUT - 1)
#: Training steps of a row: each other scan is the moving image once an epoch.
STEPS = PAPER.epochs * (LUMIR_SCANS - LUMIR_HELD_OUT)
#: float32 numbers that a run keeps for each parameter: last.pt has the weights and Adam's two moments and, for amsgrad,
#: the largest second moment; best.pt has the weights.
NUMBERS_KEPT = 4 + 1
BYTES = 4
#: Seeds of the study.
SEEDS = 3

MARKERS = ("<!-- python -m lumirlib.budget --write -->", "<!-- end of python -m lumirlib.budget -->")
#: Table of the paper -> name of its measured costs, without the preset and the device.
SOURCES = {2: "", 1: "table1_"}


@dataclass(frozen=True)
class Budget:
    """What the rows of both tables cost at the preset `paper`.

    Attributes:
        rows: one line a row: table, row, parameters, multiply_adds (of a registration), and, NaN where no GPU has
            measured them, seconds_per_step, seconds_per_pair, training_mib, gpu_hours (one seed).
        measured: for each table with GPU figures a sentence that says where they come from.
        missing: the commands that measure the others.
    """

    rows: pd.DataFrame
    measured: tuple[str, ...]
    missing: tuple[str, ...]


def gpu_hours(seconds_per_step: float, seconds_per_pair: float) -> float:
    """Hours of a row's training at the paper's schedule: all steps, and each epoch's validation registrations."""
    return (STEPS * seconds_per_step + PAPER.epochs * VALIDATION_PAIRS * seconds_per_pair) / 3600


def load_budget(folder: str | Path) -> Budget:
    """What the measured costs in a results folder make of the full reproduction.

    Args:
        folder: results folder, with `costs/`.

    Raises:
        FileNotFoundError: a table without any measured costs, not even a CPU's.
        ValueError: measured costs that lack a row.
    """
    lines, measured, missing = [], [], []
    for table, prefix in SOURCES.items():
        found = read_measured(folder, "costs", f"{prefix}{PAPER.name}_cuda")
        on_gpu = found.table is not None
        if not on_gpu:  # parameters and multiply-adds at the paper's width stand in every file
            found = read_measured(folder, "costs", f"{prefix}demo_cpu")
        if found.table is None:
            raise FileNotFoundError(f"{Path(folder) / 'costs'}: {found.how}")
        if on_gpu:
            about = found.about
            measured.append(
                f"Table {table}: medians of {found.table['round'].nunique()} round(s) on {about['device']}, "
                f"{about['images']} voxels, batch 1, by {about['commit'][:10]}"
            )
        middle = found.table.groupby("variant").median(numeric_only=True)
        names = [name for name in rows_of_table(table) if name not in [line["row"] for line in lines]]
        lacking = [name for name in names if name not in middle.index]
        if lacking:
            raise ValueError(f"the costs of Table {table} in {Path(folder) / 'costs'} lack {', '.join(lacking)}")
        trained = middle.loc[[name for name in names if middle.loc[name, "paper_parameters"] > 0]]
        times = ["seconds_per_step", "seconds_per_pair", "training_mib"]
        if not on_gpu:
            trained = trained.assign(**dict.fromkeys(times, math.nan))
        if trained["seconds_per_step"].isna().any():
            rows_option = f"--rows table{table} " if prefix else ""
            missing.append(f"`python -m lumirlib.costs {rows_option}--preset {PAPER.name} --device cuda`")
        lines += [
            {"table": table, "row": name, "parameters": int(row["paper_parameters"]),
             "multiply_adds": row["paper_multiply_adds"], **row[times],
             "gpu_hours": gpu_hours(row["seconds_per_step"], row["seconds_per_pair"])}
            for name, row in trained.iterrows()
        ]  # fmt: skip
    return Budget(pd.DataFrame(lines), tuple(measured), tuple(missing))


def checkpoint_bytes(parameters: int) -> int:
    """Disk that the checkpoints of a run take: last.pt and best.pt."""
    return parameters * BYTES * NUMBERS_KEPT


def readable_budget(budget: Budget) -> str:
    """The table and the notes below it, as Markdown."""
    reference = budget.rows.set_index("row").loc["backbone"]

    def number(value: float, form: str, ratio_to: float = math.nan) -> str:
        if math.isnan(value):
            return "not measured yet"
        return f"{value:{form}}" + ("" if math.isnan(ratio_to) else f" ({value / ratio_to:.2f}×)")

    shown = [
        {"Table": str(row["table"]), "row": row["row"], "parameters": f"{row['parameters']:,}",
         "checkpoints (MB)": f"{checkpoint_bytes(row['parameters']) / 1e6:.0f}",
         "T multiply-adds, forward": number(row["multiply_adds"] / 1e12, ".2f", reference["multiply_adds"] / 1e12),
         "s / training step": number(row["seconds_per_step"], ".3f", reference["seconds_per_step"]),
         "GPU memory, training (GiB)": number(row["training_mib"] / 1024, ".1f"),
         "GPU-hours, one seed": number(row["gpu_hours"], ".0f")}
        for _, row in budget.rows.iterrows()
    ]  # fmt: skip
    voxels = math.prod(FRAME_SHAPE)
    disk = sum(checkpoint_bytes(parameters) for parameters in budget.rows["parameters"])
    notes = [
        f"One seed is {PAPER.epochs} epochs × {LUMIR_SCANS - LUMIR_HELD_OUT:,} pairs = {STEPS:,} steps, batch 1, at "
        f"{'×'.join(map(str, FRAME_SHAPE))} voxels, with {VALIDATION_PAIRS} registrations after each epoch. Reading "
        "data and computing metrics come on top; deedsBCV is not trained.",
    ]
    hours = budget.rows["gpu_hours"]
    if not budget.missing:
        notes.append(f"All rows: {hours.sum():,.0f} GPU-hours a seed, {SEEDS * hours.sum():,.0f} with {SEEDS} seeds.")
    else:
        notes.append(
            f"**GPU-hours not measured yet** are made by {' and '.join(budget.missing)}. Multiply-adds alone do not "
            "give them: warping, integration and the loss are not among them."
        )
    if budget.measured:
        notes.append(f"{'; '.join(budget.measured)}.")
    notes.append(
        f"Disk: {LUMIR_SCANS:,} scans × {voxels / 1e6:.2f} MB (uint8) = {LUMIR_SCANS * voxels / 1e9:.1f} GB of "
        f"unpacked images, beside the download; checkpoints at {NUMBERS_KEPT} float32 numbers a parameter (weights, "
        f"Adam's three, best weights), {disk / 1e9:.2f} GB a seed for all rows. Memory: where it holds the unpacked "
        "images beside the program, the disk is read in the first epoch only; less works too, as they are mapped."
    )
    return f"{to_markdown(pd.DataFrame(shown))}\n\n" + "\n".join(f"- {note}" for note in notes)


def write_into(path: Path, text: str, markers: tuple[str, str] = MARKERS) -> Path:
    """Replace what stands between two markers in a file; ValueError for one that lacks them."""
    before, start, rest = path.read_text(encoding="utf-8").partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not (start and end):
        raise ValueError(f"{path} must hold {markers[0]} and, after it, {markers[1]}")
    whole = f"{before}{start}\n\n{text}\n\n{end}{after}"
    return write_atomically(path, lambda to: to.write_text(whole, encoding="utf-8"))


def main(arguments: list[str] | None = None) -> int:
    """Print the table, or write it into README.md; the exit status is 0, or 2 where something is missing."""
    options = argparse.ArgumentParser(prog="python -m lumirlib.budget", description=(__doc__ or "").splitlines()[0])
    options.add_argument("--out", default="", help="results folder, with costs/")
    options.add_argument("--write", action="store_true", help="put the table into README.md of the checkout")
    given = options.parse_args(arguments)
    try:
        text = readable_budget(load_budget(provenance.results_folder(given.out)))
        if given.write:
            print(write_into((provenance.project_root() or Path.cwd()) / "README.md", text))
        else:
            print(text)
    except (ValueError, FileNotFoundError) as error:
        print(f"python -m lumirlib.budget: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
