"""Memory and open files of a long training: 2,000 steps of the backbone at `smoke` size, loader included.

    python benchmarks/long_run.py        # simulated people, a quarter of an hour on a busy CPU

Resident memory and open file descriptors are sampled every few steps. Slopes are Theil and Sen's: medians
over all pairs of samples after the first quarter, in which caches fill. Single peaks do not move them. A leak of one
float32 volume a step would be 420 KiB.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
from scipy.stats import theilslopes

from lumirlib import load_cohort, parse_variant, provenance
from lumirlib.data import Cohort
from lumirlib.files import write_json
from lumirlib.methods.base import Preset
from lumirlib.methods.presets import get_preset
from lumirlib.study.results import cohort_facts
from lumirlib.training.config import make_config
from lumirlib.training.engine import Engine
from lumirlib.training.trainer import Trainer

MEBIBYTE = 2**20


class Sampled(Trainer):
    """A training that notes memory and open files every `every` steps."""

    every = 10

    def step(self, *arguments):
        found = super().step(*arguments)
        self.taken = getattr(self, "taken", 0) + 1
        if self.taken % self.every == 0:
            own = psutil.Process()
            samples = self.__dict__.setdefault("samples", [])
            samples.append((self.taken, own.memory_info().rss / MEBIBYTE, own.num_fds(), own.num_threads()))
        return found


def long_run(cohort: Cohort, preset: Preset, steps: int, engine: Engine, progress: bool = True) -> dict[str, object]:
    """Train the backbone for so many steps, in epochs of the preset, and measure.

    Returns:
        "samples" (step, MiB, open files, threads), and of those behind the first quarter the slopes of memory in KiB
        per step and of open files per step, and how much both vary.
    """
    epochs = -(-steps // preset.steps_per_epoch)
    config = make_config(parse_variant("backbone"), replace(preset, epochs=epochs), cohort, 0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Sampled(config, cohort, Path(folder), engine, progress)
        started = time.perf_counter()
        trainer.run()
        seconds = time.perf_counter() - started
    samples = np.array(trainer.samples, dtype=float)
    step, memory, files, threads = samples[len(samples) // 4 :].T
    slope, _, low, high = (float(value) for value in theilslopes(memory * 1024, step))
    return {
        "steps": trainer.taken,
        "epochs": epochs,
        "seconds": seconds,
        "memory_slope_kib_per_step": slope,
        "memory_slope_95_percent": [low, high],
        "memory_mib": [float(memory.min()), float(memory.max())],
        "open_files_slope_per_step": float(theilslopes(files, step)[0]),
        "open_files": [int(files.min()), int(files.max())],
        "threads": [int(threads.min()), int(threads.max())],
        "samples": samples.tolist(),
    }


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--steps", type=int, default=2000)
    options.add_argument("--readers", type=int, default=2, help="threads of the loader")
    options.add_argument("--cache", action="store_true", help="read a cache on disk, as large cohorts are")
    options.add_argument("--out", type=Path, default=provenance.results_folder() / "benchmarks" / "long_run_cpu.json")
    given = options.parse_args(arguments)
    commit = provenance.commit()
    cohort = load_cohort("embedded", 4)
    cohort = cohort.with_cache() if given.cache else cohort
    preset = get_preset("smoke", steps_per_epoch=24)
    engine = Engine("cpu", readers=given.readers)
    found = long_run(cohort, preset, given.steps, engine)
    about = {
        "command": " ".join(["python benchmarks/long_run.py", *(arguments or sys.argv[1:])]),
        "commit": commit,
        "device": engine.describe(),
        "readers": given.readers,
        "cache": given.cache,
        "written": provenance.now(),
        "versions": {**provenance.versions(), "psutil": psutil.__version__},
    }
    write_json(given.out, {**about, **cohort_facts(cohort), **found, "torch_threads": torch.get_num_threads()})
    print({name: value for name, value in found.items() if name != "samples"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
