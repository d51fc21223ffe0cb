"""Training steps an hour of two cores: one job or two, and freed memory kept or given back at once.

    python benchmarks/jobs.py --rows backbone LC-2

Each job is a process of its own that trains on random images at the last stage of a preset, under bfloat16 autocast.
The ways take turns. Writes results/benchmarks/jobs_cpu.json. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context

import torch

from lumirlib import provenance
from lumirlib.files import write_json
from lumirlib.methods import parse_row
from lumirlib.methods.presets import get_preset
from lumirlib.models.memory import freed_memory_kept
from lumirlib.study.costs import image_shape
from lumirlib.training.interrupts import end_with_parent
from lumirlib.training.trainer import make_optimizer

#: Jobs, threads of each, whether freed memory is kept.
WAYS = {
    "1 job, 2 threads": (1, 2, True),
    "2 jobs, 1 thread each": (2, 1, True),
    "2 jobs, 1 thread each, freed memory given back": (2, 1, False),
}


def steps_per_hour(name: str, preset_name: str, stage: int, threads: int, kept: bool, until: float) -> float:
    """Steps an hour of one job from after its first step to the time `until`."""
    torch.set_num_threads(threads)
    full = parse_row(name)
    preset = full.training_preset(get_preset(preset_name))
    row, preset = preset.apply(full), preset.at_stage(stage)
    fixed, moving = torch.rand(2, 1, 1, *image_shape(preset.resolution_mm))
    model = row.build()
    optimizer, generator = make_optimizer(model, preset, row.optimizer), torch.Generator()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            terms = row.loss_terms(model, fixed, moving, preset, generator)
        optimizer.zero_grad(set_to_none=True)
        terms["total"].backward()
        optimizer.step()

    with freed_memory_kept() if kept else nullcontext():
        step()
        started, done = time.time(), 0
        while time.time() < until or not done:
            step()
            done += 1
    return 3600 * done / (time.time() - started)


def main() -> int:
    """Measure, print and write."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--rows", nargs="+", default=["backbone", "LC-2"])
    options.add_argument("--preset", default="real-2mm")
    options.add_argument("--stage", type=int, default=-1)
    options.add_argument("--seconds", type=float, default=40, help="of each measurement")
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--out", default="", help="results folder; `study` for the committed one")
    given = options.parse_args()
    found = {name: {way: [] for way in WAYS} for name in given.rows}
    for _ in range(given.rounds):
        for name in given.rows:
            for way, (jobs, threads, kept) in WAYS.items():
                until = time.time() + given.seconds
                with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
                    arguments = (name, given.preset, given.stage, threads, kept, until)
                    speeds = [pool.submit(steps_per_hour, *arguments) for _ in range(jobs)]
                    found[name][way].append(sum(speed.result() for speed in speeds))
                print(name, way, [round(speed) for speed in found[name][way]], flush=True)
    write_json(
        provenance.results_folder(given.out) / "benchmarks" / "jobs_cpu.json",
        {
            "preset": given.preset,
            "steps_per_hour": found,
            "load_at_end": os.getloadavg()[0],
            "commit": provenance.commit(),
            "device": provenance.describe_device(torch.device("cpu")),
            "torch": torch.__version__,
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
