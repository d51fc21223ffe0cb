"""What each scheme costs: parameters, multiply-adds, seconds and memory, side by side.

    lumirlib measure costs --rows table2 BF-post --preset demo

Every row is measured in a process of its own, all of them in turn, several rounds over, on random images of the
preset's size. The machine should have nothing else to do.

What the full reproduction costs: GPU-hours, disk and memory, as a table for docs/speed.md.

    lumirlib report budget            # prints it
    lumirlib report budget --write    # puts it into docs/speed.md, between its markers

The budget is computed from `results/costs/*.csv`, which `lumirlib measure costs` writes, and from the sizes below.
GPU-hours appear as soon as the costs of the preset `paper` have been measured on a GPU.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from lumirlib import provenance
from lumirlib._checks import counted
from lumirlib.data.dataset_json import LUMIR_SCANS
from lumirlib.data.frame import FRAME_SHAPE
from lumirlib.losses.forces import FORCE_CHANNELS
from lumirlib.methods import parse_row
from lumirlib.methods.base import PAPER, Preset, Row
from lumirlib.methods.presets import get_preset
from lumirlib.methods.variants import Variant
from lumirlib.metrics.labels import LUMIR_LABELS
from lumirlib.models.memory import freed_memory_kept, return_freed_memory
from lumirlib.study.paper import rows_of_table, table_rows
from lumirlib.study.results import read_measured, to_markdown, write_results
from lumirlib.training.engine import pick_device
from lumirlib.training.interrupts import end_with_parent
from lumirlib.training.trainer import make_optimizer
from lumirlib.training.weights import to_device

MEBIBYTE = 2**20


def image_shape(resolution_mm: float) -> tuple[int, ...]:
    """Sides of a LUMIR image in voxels of `resolution_mm`."""
    return tuple(math.ceil(side / resolution_mm) for side in FRAME_SHAPE)


def multiply_adds(row: Row, shape: tuple[int, ...]) -> float:
    """Multiply-adds of the convolutions and attentions of one registration, by torch's counter; nothing is computed.

    Warping, integration, normalization and the bilateral filter are not among them.

    Args:
        row: Row at its final width.
        shape: Sides of the images in voxels.

    Returns:
        A whole number; NaN for a method that is no network.
    """
    if row.trains_on == "nothing":
        return math.nan
    with torch.device("meta"):
        model = row.build().eval()
        image = torch.empty(1, 1, *shape)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if not isinstance(row, Variant):
            model(image, image)
        else:  # without warping, which some of its levels check the values of
            model.encoder(torch.cat([image, image]))
            for level, sides in enumerate(model.level_shapes(shape)):
                features = torch.empty(1, row.start_channels, *sides, device="meta")
                force = torch.empty(1, FORCE_CHANNELS, *sides, device="meta")
                for _ in range(model.passes + (0 if level else model.refinements)):
                    if str(level) in model.co_attention:
                        model.co_attention[str(level)](features, features)
                    model.estimators[level](features, features, force)
    return counter.get_total_flops() // 2


def count_parameters(row: Row) -> int:
    """Trainable numbers of a row's network; 0 for a method that is none."""
    if row.trains_on == "nothing":
        return 0
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in row.build().parameters())


class PeakMemory:
    """Peak memory above that at the start, in bytes: allocated on a GPU, resident (sampled each ms) on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak = device, 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
            return self
        return_freed_memory()
        process = psutil.Process()
        self._start = process.memory_info().rss
        self._done = threading.Event()

        def watch() -> None:
            while not self._done.wait(0.001):
                self.peak = max(self.peak, process.memory_info().rss - self._start)

        self._watcher = threading.Thread(target=watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device) - self._start
        else:
            self._done.set()
            self._watcher.join()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time of one call of `work`, until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of `work` over `repeats` calls, after one that is not counted."""
    return statistics.median([seconds(work, device) for _ in range(repeats + 1)][1:])


@freed_memory_kept()
def measure(row: Row, preset: Preset, device: str, repeats: int, training: bool = True) -> dict[str, float]:
    """Cost of one row, in this process.

    Args:
        row: Row at its final width.
        preset: Preset that gives the size of the images and the loss.
        device: Device's name: "cpu", "cuda" ...
        repeats: Number of repeats of each timing.
        training: Whether to measure training steps too.

    Returns:
        "seconds_per_pair" and "seconds_per_step", medians, and "inference_mib" and "training_mib", peaks with the
        weights; NaN for training that was not measured, or of a row that is not trained ("BF-post", deedsBCV).
    """
    chosen = pick_device(device)
    generator = torch.Generator().manual_seed(0)
    shape = (1, 1, *image_shape(preset.resolution_mm))
    fixed, moving = (torch.rand(shape, generator=generator).to(chosen) for _ in range(2))
    torch.manual_seed(0)
    found = {"seconds_per_step": math.nan, "training_mib": math.nan}

    def infer() -> None:
        with torch.no_grad():
            model(fixed, moving)

    with PeakMemory(chosen) as memory:
        model = row.build()
        if isinstance(model, nn.Module):
            model = row.as_method(to_device(model, chosen), preset).eval()
        found["seconds_per_pair"] = median_seconds(infer, chosen, repeats)
    found["inference_mib"] = memory.peak / MEBIBYTE
    if not training or row.trains_on == "nothing" or row.base_row() != row:
        return found
    del model
    if row.trains_on == "labels":
        numbers = torch.tensor(LUMIR_LABELS, dtype=torch.int16)
        fixed, moving = (numbers[torch.randint(len(numbers), shape, generator=generator)].to(chosen) for _ in range(2))

    def step() -> None:
        terms = row.loss_terms(model, fixed, moving, preset, generator)
        optimizer.zero_grad(set_to_none=True)
        terms["total"].backward()
        optimizer.step()

    with PeakMemory(chosen) as memory:
        model = to_device(row.build(), chosen)
        optimizer = make_optimizer(model, preset, row.optimizer)
        found["seconds_per_step"] = median_seconds(step, chosen, repeats)
    found["training_mib"] = memory.peak / MEBIBYTE
    return found


def in_own_process(what: str, work: Callable[..., Any], *arguments: object) -> Any:
    """Result of `work` in a fresh process, whose memory holds nothing of another measurement's.

    Args:
        what: Name of what is measured, for the message.
        work: Function that can be imported.
        arguments: Arguments of `work`.

    Raises:
        MemoryError: the process was killed, most often for memory.
    """
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
            return pool.submit(work, *arguments).result()
    except BrokenProcessPool as error:
        raise MemoryError(f"measuring {what} was killed: memory?") from error


def measure_all(
    rows: Sequence[str],
    preset: Preset,
    device: str = "auto",
    rounds: int = 3,
    repeats: int = 3,
    training: bool = True,
    progress: bool = True,
) -> Iterator[pd.DataFrame]:
    """Costs of several rows, each round one process after another; after each round all so far.

    Args:
        rows: Names for :func:`lumirlib.methods.parse_row`.
        preset: Preset that gives widths, size of the images and the loss.
        device: Device's name: "auto", "cpu", "cuda" ...
        rounds: Number of times that every row is measured.
        repeats: Number of repeats of each timing within a round.
        training: Whether to measure training steps too.
        progress: Whether to show a progress bar.

    Yields:
        One row per method and round: variant, start_channels, round, resolution_mm, what :func:`measure` gives,
        parameters and multiply_adds, and paper_parameters and paper_multiply_adds at the paper's width and 160x224x192
        voxels.

    Raises:
        MemoryError: a measuring process was killed, most often for memory.
    """
    chosen = str(pick_device(device))
    paper_shape = image_shape(PAPER.resolution_mm)
    found = []
    with tqdm(total=rounds * len(rows), desc="costs", unit="measurement", disable=not progress) as bar:
        for number in range(rounds):
            for name in rows:
                full = parse_row(name)
                adapted = full.training_preset(preset)
                row, own = adapted.apply(full), adapted.at_stage(-1)
                what = f"{name} at preset {preset.name!r}"
                cost = in_own_process(what, measure, row, own, chosen, repeats, training)
                found.append(
                    {
                        "variant": name,
                        "start_channels": getattr(row, "start_channels", None),
                        "round": number,
                        "resolution_mm": own.resolution_mm,
                        **cost,
                        "parameters": count_parameters(row),
                        "multiply_adds": multiply_adds(row, image_shape(own.resolution_mm)),
                        "paper_parameters": count_parameters(full),
                        "paper_multiply_adds": multiply_adds(full, paper_shape),
                    }
                )
                bar.update()
            yield pd.DataFrame(found)


def write_costs(
    table: pd.DataFrame, preset: Preset, device: torch.device, out: Path, command: str, name: str = ""
) -> Path:
    """Write `<out>/costs/<name><preset>_<cpu or cuda>.csv` with its provenance; the path."""
    about = {
        "command": command,
        "commit": provenance.commit(),
        "device": provenance.describe_device(device),
        "preset": preset.name,
        "images": "x".join(map(str, image_shape(preset.resolution_mm))),
    }
    return write_results(table, out / "costs" / f"{name}{preset.name}_{device.type}.csv", about)


def measure_rows(
    rows: Sequence[str],
    preset: str = "demo",
    device: str = "auto",
    rounds: int = 3,
    repeats: int = 3,
    training: bool = True,
    out: str = "",
    command: str = "lumirlib.study.costs.measure_rows",
) -> tuple[pd.DataFrame, Path]:
    """Measure rows and write their costs after each round.

    Args:
        rows: Names for :func:`lumirlib.study.paper.table_rows`.
        preset: Name of the preset that gives widths and size of the images.
        device: Device's name: "auto", "cpu", "cuda" ...
        rounds: Number of times that every row is measured, from 1.
        repeats: Number of repeats of each timing within a round, from 1.
        training: Whether training steps are measured too.
        out: Results folder; empty for :func:`lumirlib.provenance.results_folder`.
        command: Call that made the table, for the provenance.

    Returns:
        The table of :func:`measure_all`, and the path that it was written to.

    Raises:
        ValueError: An unknown row or preset, a device that is not there, or a number below 1.
        MemoryError: A measuring process was killed; the rounds before it are written.
    """
    for name, value in (("rounds", rounds), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    chosen, names, target = get_preset(preset), table_rows(rows), pick_device(device)
    prefix = f"{rows[0]}_" if list(rows) in (["table1"], ["beyond"]) else ""
    folder = provenance.results_folder(out)
    for table in measure_all(names, chosen, str(target), rounds, repeats, training):
        path = write_costs(table, chosen, target, folder, command, prefix)
    return table, path


# the budget -----------------------------------------------------------------------------------------------------------
#: Scans of LUMIR's training set that are held out with labels.
LUMIR_HELD_OUT = 10
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
#: How many GPUs the paper's schedule is worked out for.
GPUS = (1, 8, 64)

COMMAND = "lumirlib report budget"
MARKERS = (f"<!-- {COMMAND} --write -->", f"<!-- end of {COMMAND} -->")
#: Table of the paper -> name of its measured costs, without the preset and the device.
SOURCES = {2: "", 1: "table1_"}


@dataclass(frozen=True)
class Budget:
    """What the rows of both tables cost at the preset `paper`.

    Attributes:
        rows: Table with one line a row: table, row, parameters, multiply_adds (of a registration), and, NaN where no
            GPU has measured them, seconds_per_step, seconds_per_pair, training_mib, gpu_hours (one seed).
        measured: Sentences that say where the figures come from, one for each table with GPU figures.
        missing: Commands that measure the others.
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
        folder: Results folder, with `costs/`.

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
                f"Table {table}: medians of {counted(found.table['round'].nunique(), 'round')} on {about['device']}, "
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
            missing.append(f"`lumirlib measure costs {rows_option}--preset {PAPER.name} --device cuda`")
        lines += [
            {
                "table": table,
                "row": name,
                "parameters": int(row["paper_parameters"]),
                "multiply_adds": row["paper_multiply_adds"],
                **row[times],
                "gpu_hours": gpu_hours(row["seconds_per_step"], row["seconds_per_pair"]),
            }
            for name, row in trained.iterrows()
        ]
    return Budget(pd.DataFrame(lines), tuple(measured), tuple(missing))


def scale() -> pd.DataFrame:
    """One seed of the paper's schedule on several GPUs that share each batch, a pair each: what needs no measurement.

    Returns:
        Text by column: GPUs, steps, hours of t seconds a step and r a registration, MB read a step (two volumes in
        uint8 for each pair), MB that each GPU sends a step (gradients in float32, summed in a ring).
    """
    voxels = math.prod(FRAME_SHAPE)
    smallest, largest = (count_parameters(parse_row(name)) * BYTES / 1e6 for name in ("backbone", "LC-2"))
    rows = []
    for gpus in GPUS:
        steps = PAPER.epochs * math.ceil((LUMIR_SCANS - LUMIR_HELD_OUT) / gpus)
        registrations = PAPER.epochs * math.ceil(VALIDATION_PAIRS / gpus)
        sent = 2 * (gpus - 1) / gpus
        rows.append(
            {
                "GPUs": str(gpus),
                "steps, one seed": f"{steps:,}",
                "hours": f"{steps / 3600:.1f} t + {registrations / 3600:.1f} r",
                "MB read / step": f"{2 * gpus * voxels / 1e6:,.0f}",
                "MB sent / step and GPU, backbone to LC-2": f"{sent * smallest:.1f} to {sent * largest:.1f}",
            }
        )
    return pd.DataFrame(rows)


def checkpoint_bytes(parameters: int) -> int:
    """Disk that the checkpoints of a run take: last.pt and best.pt."""
    return parameters * BYTES * NUMBERS_KEPT


def readable_budget(budget: Budget) -> str:
    """The table and the notes below it, as Markdown."""
    reference = budget.rows.set_index("row").loc["backbone"]

    def number(value: float, form: str, ratio_to: float = math.nan) -> str:
        if math.isnan(value):
            return ""
        return f"{value:{form}}" + ("" if math.isnan(ratio_to) else f" ({value / ratio_to:.2f}×)")

    shown = [
        {
            "Table": str(row["table"]),
            "row": row["row"],
            "parameters": f"{row['parameters']:,}",
            "checkpoints (MB)": f"{checkpoint_bytes(row['parameters']) / 1e6:.0f}",
            "T multiply-adds, forward": number(row["multiply_adds"] / 1e12, ".2f", reference["multiply_adds"] / 1e12),
            "s / training step": number(row["seconds_per_step"], ".3f", reference["seconds_per_step"]),
            "GPU memory, training (GiB)": number(row["training_mib"] / 1024, ".1f"),
            "GPU-hours, one seed": number(row["gpu_hours"], ".0f"),
        }
        for _, row in budget.rows.iterrows()
    ]
    table = pd.DataFrame(shown)
    table = table.loc[:, (table != "").any()]  # a column that no row has is a sentence below
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
            f"Seconds, memory and hours on a GPU have not been measured yet: {' and '.join(budget.missing)} measure "
            "them. They do not follow from multiply-adds, which leave out warping, integration and the loss."
        )
    if budget.measured:
        notes.append(f"{'; '.join(budget.measured)}.")
    notes.append(
        f"Disk: {LUMIR_SCANS:,} scans × {voxels / 1e6:.2f} MB (uint8) = {LUMIR_SCANS * voxels / 1e9:.1f} GB of "
        f"unpacked images, beside the download; checkpoints at {NUMBERS_KEPT} float32 numbers a parameter (weights, "
        f"Adam's three, best weights), {disk / 1e9:.2f} GB a seed for all rows. Memory: where it holds the unpacked "
        "images beside the program, the disk is read in the first epoch only; less works too, as they are mapped."
    )
    unknown = "t, r and memory on a GPU, " if budget.missing else ""
    shared = [
        "Each GPU has one pair of the batch that they share (`--processes`, `torchrun`). Its memory is that of batch 1 "
        "on any number of them, and t is the slowest one's step with the exchange of gradients in it.",
        "What limits it: on one GPU its own t; on 8 of a machine besides it reading, and memory that holds the "
        "unpacked images; on 64, of 8 machines, the batch. With 64 pairs a step the weights change a 64th as often, "
        "which is another training, whose learning rate would have to be found.",
        "Measured: reading a pair (`python benchmarks/loading.py`), and that two processes end in the weights of one "
        f"at the same batch (tests/training/test_engine.py). Not measured yet: {unknown}the exchange between GPUs, and "
        "what a larger batch does to the results.",
    ]
    intro = "The same seed on several GPUs, with t seconds a step and r a registration:"
    return "\n\n".join([to_markdown(table), _listed(notes), intro, to_markdown(scale()), _listed(shared)])


def _listed(notes: Sequence[str]) -> str:
    return "\n".join(f"- {note}" for note in notes)
