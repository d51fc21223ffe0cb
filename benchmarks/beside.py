"""Registration programs beside each other: accuracy, seconds and memory on the same pairs, on this machine.

    python benchmarks/beside.py --cohort brains --out study

Networks are packaged weights or checkpoints ("LC-2=best.pt"; "LC-2+IO=best.pt" with instance optimization, at the
resolution that it was trained at). Programs work at 1 mm, with the settings that their own
documentation or scripts give for brains. What is not installed is left out and named; ANTs, Greedy and ConvexAdam are
`pip install antspyx picsl_greedy convexadam`, in an environment of their own, as antspyx wants an older NumPy.

Pairs are spread evenly over those of the people who chose no setting and no epoch. Every method runs in a process of
its own, and each pair is written as it ends, so an interrupted call goes on. Seconds are of the registration alone, and
of the second pair on where a method compiles at the first. Writes results/benchmarks/beside_<cohort>.json, and a figure
of Dice against seconds beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.ticker import LogLocator, NullLocator
from tqdm.auto import tqdm

from lumirlib import load_cohort, pretrained, provenance
from lumirlib.evaluation import evaluate_method, zero_displacement
from lumirlib.files import read_json, write_json
from lumirlib.methods import parse_row
from lumirlib.methods.base import Preset
from lumirlib.methods.deeds import Deeds
from lumirlib.plots import save_figure, use_style
from lumirlib.study.costs import MEBIBYTE, PeakMemory, in_own_process
from lumirlib.training.pairs import evenly_spaced, halves
from lumirlib.training.weights import read_checkpoint

BEFORE = "before registration"
METRICS = ["dice", "hd95_mm", "tre_points_mm", "ndv_percent", "seconds"]


def _displacement(field: np.ndarray) -> torch.Tensor:
    """``(D, H, W, 3)`` along the axes of the array, in voxels, as ``(1, 3, D, H, W)``."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(field, -1, 0), np.float32))[None]


def _ants(transform: str) -> Callable:
    """ANTs' own script of that name for a deformation alone; its images are aligned already."""

    def register(fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        import ants

        images = [ants.from_numpy(image[0, 0].double().numpy()) for image in (fixed, moving)]
        found = ants.registration(*images, type_of_transform=transform)
        (warp,) = [name for name in found["fwdtransforms"] if name.endswith(".nii.gz")]
        return _displacement(ants.image_read(warp).numpy())  # voxels of 1 mm, axes of the array

    return register


def _greedy(fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
    """Greedy with NCC of radius 2 and three resolutions, as its documentation registers two brains."""
    import SimpleITK
    from picsl_greedy import Greedy3D

    # ITK's x is our first axis
    images = [SimpleITK.GetImageFromArray(image[0, 0].numpy().T) for image in (fixed, moving)]
    greedy = Greedy3D()
    command = "-i fixed moving -o warp -m NCC 2x2x2 -n 100x50x10 -threads {}"
    greedy.execute(command.format(torch.get_num_threads()), fixed=images[0], moving=images[1], warp=None)
    return _displacement(SimpleITK.GetArrayFromImage(greedy["warp"]).transpose(2, 1, 0, 3))


def _convex_adam(fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
    """ConvexAdam with MIND and its default settings."""
    from convexAdam.convex_adam_MIND import convex_adam_pt

    with torch.enable_grad():
        return _displacement(convex_adam_pt(fixed[0, 0], moving[0, 0], device=torch.device("cpu"), dtype=torch.float32))


#: Name -> voxels in mm that it works on, and how it is made.
PROGRAMS: dict[str, tuple[float, Callable[[], Callable]]] = {
    BEFORE: (1, lambda: zero_displacement),
    "deedsBCV (ours)": (1, lambda: Deeds.for_resolution(1)),
    "SyN (antsRegistrationSyN)": (1, lambda: _ants("antsRegistrationSyN[so]")),
    "SyN (antsRegistrationSyNQuick)": (1, lambda: _ants("antsRegistrationSyNQuick[so]")),
    "Greedy": (1, lambda: _greedy),
    "ConvexAdam": (1, lambda: _convex_adam),
}
#: Package of a program -> its module.
MODULES = {"antspyx": "ants", "picsl_greedy": "picsl_greedy", "convexadam": "convexAdam"}


def method(name: str, source: str, resolution_mm: float) -> Callable:
    """A program of :data:`PROGRAMS`, packaged weights, or the network of a checkpoint, at a resolution."""
    if name in PROGRAMS:
        return PROGRAMS[name][1]()
    if source.endswith(".pt"):
        found = read_checkpoint(source).at_resolution(resolution_mm)
        row = replace(found.row, instance_steps=parse_row("IO").instance_steps) if "+IO" in name else found.row
        return row.as_method(found.network("cpu"), Preset(**found.config["preset"]).at_stage(-1))
    return pretrained(source, "cpu", resolution_mm)


def measure(
    name: str, source: str, resolution_mm: float, cohort_name: str, pairs: list[str], threads: int, path: Path
) -> None:
    """In a process of its own: put the figures of a method on each of these pairs into the file, as they come."""
    torch.set_num_threads(threads)
    cohort = load_cohort(cohort_name, resolution_mm)
    run = method(name, source, resolution_mm)
    for number, pair in enumerate(one for one in cohort.validation_pairs if one.name in pairs):
        images = cohort.image(pair.fixed), cohort.image(pair.moving)
        with torch.no_grad(), PeakMemory(torch.device("cpu")) as memory:
            started, busy = time.perf_counter(), time.process_time()
            displacement = run(*images)
            seconds, busy = time.perf_counter() - started, time.process_time() - busy
        table = evaluate_method(lambda *_, known=displacement: known, cohort, (pair,), progress=False)
        figures = table.set_index("metric")["value"].reindex(METRICS)
        line = {"method": name, "resolution_mm": resolution_mm, "weights": source, "pair": pair.name, **figures}
        line |= {"seconds": seconds, "cpu_seconds": busy, "mib": memory.peak / MEBIBYTE}
        line |= {"first_of_process": number == 0, "threads": threads, "commit": provenance.commit()}
        content = read_json(path)
        rows = [{key: None if value != value else value for key, value in line.items()}]  # JSON has no NaN
        write_json(path, content | {"pairs": content["pairs"] + rows})


def means(rows: list[dict]) -> pd.DataFrame:
    """A line for each method: means over its pairs; the largest memory; seconds without the first pair of a process."""
    table = pd.DataFrame(rows)
    alone = ~table["method"].isin(table.loc[~table["first_of_process"], "method"])
    later = table[~table["first_of_process"] | alone].groupby("method", sort=False)
    grouped = table.groupby("method", sort=False)
    found = grouped[METRICS].mean().assign(mib=grouped["mib"].max(), pairs=grouped.size())
    return found.assign(seconds=later["seconds"].mean(), cpu_seconds=later["cpu_seconds"].mean()).reset_index()


def figure(table: pd.DataFrame, title: str) -> plt.Figure:
    """Dice against seconds of what :func:`means` gives; Dice before registration is a line."""
    use_style()
    shown, ax = plt.subplots(figsize=(9, 4.4), layout="constrained")

    def beside(seconds: float) -> pd.DataFrame:
        return table[table["seconds"].between(seconds / 1.7, 1.7 * seconds) & (table["method"] != BEFORE)]

    for line in table.itertuples():
        own = line.method.startswith("ours")
        if line.method == BEFORE:
            ax.axhline(100 * line.dice, color="0.6", linestyle="--", linewidth=1)
            ax.annotate(
                line.method, (1, 100 * line.dice), (0, 3), ("axes fraction", "data"), "offset points", ha="right"
            )
            continue
        ax.plot(line.seconds, 100 * line.dice, "o" if own else "s", color="C1" if own else "C0")
        near = beside(line.seconds)
        above = line.dice == near["dice"].max()  # names of neighbours do not meet: others' are below it, one each line
        lower = near[near["dice"].between(line.dice, line.dice + 0.02, inclusive="right")]
        lines = sum(one.dice < beside(one.seconds)["dice"].max() for one in lower.itertuples())
        at = (line.seconds, 100 * line.dice), (0, 6 if above else -7 - 12 * lines), "data", "offset points"
        name = line.method.replace(" (", "\n(")
        ax.annotate(name, *at, ha="center", va="bottom" if above else "top", fontsize=9)
    ax.set(xscale="log", xlabel="seconds a pair", ylabel="Dice (%)", title=title)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.margins(0.2, 0.1)
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, print and write."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--networks", nargs="*", default=["ours=ours"], help="NAME=WEIGHTS or NAME=FILE.pt")
    options.add_argument("--resolutions", nargs="*", type=float, default=[2.0, 1.0], help="of the networks, in mm")
    options.add_argument("--programs", nargs="*", default=list(PROGRAMS), help="all if not given")
    options.add_argument("--cohort", default="brains")
    options.add_argument("--pairs", type=int, default=10)
    options.add_argument("--out", default="", help="results folder; `study` for the committed one")
    arguments = sys.argv[1:] if arguments is None else arguments
    given = options.parse_args(arguments)
    for name in given.programs:
        if name not in PROGRAMS:
            options.error(f"--programs must be among {', '.join(PROGRAMS)}, got {name}")
    cohort = load_cohort(given.cohort, 4)
    _, others = halves(subject.name for pair in cohort.validation_pairs for subject in (pair.fixed, pair.moving))
    unseen = tuple(one for one in cohort.validation_pairs if {one.fixed.name, one.moving.name} <= others)
    pairs = [pair.name for pair in evenly_spaced(unseen, given.pairs)]
    path = provenance.results_folder(given.out) / "benchmarks" / f"beside_{cohort.short_name}.json"
    versions = provenance.versions() | {one: metadata.version(one) for one in MODULES if find_spec(MODULES[one])}
    about = {
        "command": f"python benchmarks/beside.py {' '.join(arguments)}".strip(),
        "device": provenance.describe_device(torch.device("cpu")),
        "cohort": cohort.short_name,
        "cohort_digest": cohort.digest,
        "versions": versions,
    }
    write_json(path, {"provenance": about, "pairs": read_json(path)["pairs"] if path.is_file() else []})
    wanted = [(name, "", PROGRAMS[name][0]) for name in given.programs]
    for text in given.networks:
        name, _, source = text.partition("=")
        wanted += [(f"{name}, {resolution:g} mm", source, resolution) for resolution in given.resolutions]
    for name, source, resolution in tqdm(wanted, unit="method"):
        done = {row["pair"] for row in read_json(path)["pairs"] if row["method"] == name}
        if left := [pair for pair in pairs if pair not in done]:
            work = (name, source, resolution, given.cohort, left, torch.get_num_threads(), path)
            try:
                in_own_process(name, measure, *work)
            except (ImportError, MemoryError) as error:
                print(f"{name}: left out, {error}", file=sys.stderr)
    rows = read_json(path)["pairs"]
    if rows:
        table = means(rows)
        counted = table["pairs"], [row["threads"] for row in rows]
        counts, threads = (" or ".join(map(str, sorted(set(one)))) for one in counted)
        drawn = figure(table, f"{cohort.name}, pairs: {counts}, scored at 1 mm; threads: {threads}")
        save_figure(drawn, path.with_suffix(""), data=False)
        print(table.to_string(index=False, float_format="%.4f"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
