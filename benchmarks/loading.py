"""What reading costs a training step: .nii.gz at every step, the cache, and the loader behind steps of a given length.

    python benchmarks/loading.py
    python benchmarks/loading.py --device cuda

Two cohorts: the embedded one at 4 mm, and volumes of LUMIR's size (160x224x192), which are those in the folder named by
LUMIR_BRAINS, or else noise in an ellipsoid, written as .nii.gz into a temporary folder. A step sleeps (as a CPU does
while a GPU works), convolves on the device, or keeps Python busy; all are about as long as --step. What the loader's
thread takes from them shows in steps taken in turn, while it reads and while it has nothing to do. Cold means that the
files were dropped from the page cache (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from lumirlib import load_cohort, provenance
from lumirlib.data import Cohort, Pair, PairLoader
from lumirlib.data.dataset_json import LUMIR_SCANS
from lumirlib.data.nifti import write_nifti
from lumirlib.files import write_json
from lumirlib.study.results import cohort_facts
from lumirlib.training.engine import pick_device

FULL_SIZE = (160, 224, 192)


def synthetic_cohort(folder: Path, scans: int) -> Path:
    """Dataset JSON of noise in an ellipsoid, smoothed a little so that it compresses like a brain."""
    axes = [np.linspace(-1.2, 1.2, side) for side in FULL_SIZE]
    inside = sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij")) < 1
    entries = []
    for number in range(scans):
        noise = torch.randn(1, 1, *FULL_SIZE, generator=torch.Generator().manual_seed(number))
        image = (F.avg_pool3d(noise, 3, 1, 1)[0, 0].numpy() * 60 + 120).clip(1, 255) * inside
        entries.append(f"imagesTr/NOISE_{number:04d}_0000.nii.gz")
        write_nifti(folder / entries[-1], image.astype(np.uint8), np.eye(4))
    content = {"name": "Noise of LUMIR's size (simulated)", "training": entries}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder / "dataset.json"


def drop_from_page_cache(files: Iterable[Path]) -> bool:
    """Whether the system let go of what it kept of these files in memory."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def busy_steps(device: torch.device, seconds: float) -> dict[str, Callable[[], None]]:
    """Steps that take about `seconds` each, by name."""
    steps: dict[str, Callable[[], None]] = {}
    volume, weight = torch.randn(1, 8, 32, 32, 32, device=device), torch.randn(8, 8, 3, 3, 3, device=device)

    def convolve(times: int) -> None:
        for _ in range(times):
            F.conv3d(volume, weight, padding=1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def count(times: int) -> None:
        for _ in range(times):
            pass

    for name, work, times in (("convolves", convolve, 50), ("counts in Python", count, 1_000_000)):
        work(times)
        started = time.perf_counter()
        work(times)
        enough = max(1, round(times * seconds / (time.perf_counter() - started)))
        steps[name] = lambda work=work, enough=enough: work(enough)
    return {"sleeps": lambda: time.sleep(seconds)} | steps


def seconds_of(step: Callable[[], None]) -> float:
    """Seconds that one call takes."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def seconds_per_pair(cohort: Cohort, pairs: Iterable[Pair], device: torch.device) -> float:
    """Reading pair after pair without a loader, nothing kept in memory."""
    pairs = list(pairs)
    started = time.perf_counter()
    for pair in pairs:
        cohort.memory.clear()
        for subject in (pair.fixed, pair.moving):
            cohort.image(subject).to(device)
    return (time.perf_counter() - started) / len(pairs)


def behind_a_loader(
    read: Callable, pairs: Iterable[Pair], device: torch.device, step: Callable[[], None], workers: int
) -> dict[str, float]:
    """Share of the time spent waiting for data, and the median step while the loader reads and while it does not."""
    with PairLoader(read, ([pair] for pair in pairs), device, workers=workers) as loader:
        for _ in loader:
            step()
    waiting, batch = loader.waited / loader.total, loader.total / loader.batches_given
    with PairLoader(read, ([pair] for pair in pairs), device, workers=workers) as loader:
        reading, idle = zip(*((seconds_of(step), seconds_of(step)) for _ in loader), strict=True)
    return {
        "waiting_percent": round(100 * waiting, 2),
        "batch_ms": round(1000 * batch, 1),
        "step_while_reading_ms": round(1000 * median(reading), 1),
        "step_while_idle_ms": round(1000 * median(idle), 1),
    }


def measure(cohort: Cohort, given: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """All measurements of one cohort."""
    people = cohort.train
    pairs = [Pair(fixed, moving) for fixed, moving in zip(people, [*people[1:], people[0]], strict=True)]
    chosen = list(islice(cycle(pairs), given.pairs))
    build = {}
    for workers in given.build_workers:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            cached = cohort.with_cache(folder, workers=workers)
            build[str(workers)] = round((time.perf_counter() - started) / cached.cache.made, 4)
    with tempfile.TemporaryDirectory() as folder:
        cached = cohort.with_cache(folder)
        found: dict[str, object] = {
            **cohort_facts(cohort),
            "shape": cohort.shape,
            "cache": cached.cache.describe(),
            "build_seconds_per_volume_by_workers": build,
            "lumir": {
                "disk_and_page_cache_gb": round(LUMIR_SCANS * cached.stored_image(people[0]).values.nbytes / 1e9, 1),
                "build_minutes_by_workers": {key: round(LUMIR_SCANS * value / 60, 1) for key, value in build.items()},
            },
        }
        reading = {"nii.gz": seconds_per_pair(cohort, chosen, device)}
        if drop_from_page_cache(Path(folder).rglob("*.npy")):
            reading["cache, cold, checksums compared"] = seconds_per_pair(
                cohort.with_cache(folder), chosen[: len(people)], device
            )
        opened = cohort.with_cache(folder)
        reading["cache, checksums compared"] = seconds_per_pair(opened, chosen[: len(people)], device)
        seconds_per_pair(opened, pairs, device)
        reading["cache"] = seconds_per_pair(opened, chosen, device)
        found["read_ms_per_pair"] = {name: round(1000 * value, 2) for name, value in reading.items()}
        found["cache_ratio"] = round(reading["nii.gz"] / reading["cache"], 1)
        steps, loader = busy_steps(device, given.step / 1000), []
        uncached = {"read": "nii.gz", "step": "sleeps"}

        def forgetful(subject):
            cohort.memory.clear()
            return cohort.image(subject)

        for workers in (1, 2):
            loader.append(
                uncached | {"workers": workers} | behind_a_loader(forgetful, chosen, device, steps["sleeps"], workers)
            )
        for name, step in steps.items():
            measured = behind_a_loader(opened.stored_image, chosen, device, step, 1)
            loader.append({"read": "cache", "step": name, "workers": 1} | measured)
        found["loader"] = loader
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    options.add_argument("--step", type=float, default=150, help="length of a step in ms")
    options.add_argument("--pairs", type=int, default=40, help="steps of each measurement")
    options.add_argument("--scans", type=int, default=8, help="synthetic volumes, where LUMIR_BRAINS is not set")
    options.add_argument("--build-workers", type=int, nargs="+", default=[1, 2], help="threads that build")
    given = options.parse_args()
    device = pick_device(given.device)
    with tempfile.TemporaryDirectory() as folder:
        full_size = "brains" if os.environ.get("LUMIR_BRAINS") else synthetic_cohort(Path(folder), given.scans)
        cohorts = [
            measure(load_cohort("embedded", 4), given, device),
            measure(load_cohort(full_size, 1), given, device),
        ]
    for found in cohorts:
        print(f"\n{found['cohort']}, {found['shape']}: {found['cache']}")
        print(f"read, ms per pair: {found['read_ms_per_pair']}, ratio {found['cache_ratio']}")
        print(
            f"build, s per volume by threads: {found['build_seconds_per_volume_by_workers']}; LUMIR: {found['lumir']}"
        )
        print(pd.DataFrame(found["loader"]).to_string(index=False))
    about = {
        "command": f"python benchmarks/loading.py --device {given.device} --step {given.step:g} --pairs {given.pairs}",
        "commit": provenance.commit(),
        "device": provenance.describe_device(device),
        "written": provenance.now(),
        "versions": provenance.versions(),
        "step_ms": given.step,
        "cohorts": cohorts,
    }
    print(write_json(provenance.results_folder() / "benchmarks" / f"loading_{device.type}.json", about))


if __name__ == "__main__":
    main()
