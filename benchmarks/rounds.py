"""Candidates measured in turn, each in a process of its own, several rounds over: what the speed benchmarks share.

With ``--against COMMIT`` each one takes turns with itself in the library as that commit had it, driven by today's
script.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from importlib import import_module, metadata
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from lumirlib import provenance
from lumirlib.files import read_json, write_json
from lumirlib.study.costs import MEBIBYTE, PeakMemory, in_own_process
from lumirlib.training.engine import pick_device

#: A candidate is made by a function of its size, ready to be called over and over.
Size = tuple[str, int]  # "160x224x192", N
#: Between a candidate's name and the older commit whose library it was measured with.
AT = " at "
_PROCESS = ExitStack()


def keep_freed_memory() -> None:
    """In this process from now on, as training and registration do; commits before that have no way to."""
    with suppress(ImportError):
        from lumirlib.models.memory import freed_memory_kept

        _PROCESS.enter_context(freed_memory_kept())


def images(shape: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair of random images in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    sides = tuple(map(int, shape.split("x")))
    fixed, moving = (torch.rand(1, 1, *sides, generator=generator).to(device) for _ in range(2))
    return fixed, moving


def _measure(make: Callable, size: Size, device: str, repeats: int, threads: int) -> dict[str, object]:
    """In a process of its own: times of `repeats` calls after a first one, and the peak of memory."""
    torch.set_num_threads(threads)
    target = torch.device(device)
    try:
        with PeakMemory(target) as memory:
            work = make(*size, target)
            times = []
            for _ in range(repeats + 1):
                started = time.perf_counter()
                work()
                if target.type == "cuda":
                    torch.cuda.synchronize(target)
                times.append(time.perf_counter() - started)
    except (
        ImportError,
        torch.OutOfMemoryError,
        ValueError,
    ) as error:  # not there, too large, or a side that is refused
        return {"note": str(error).splitlines()[0]}
    return {"first": times[0], "times": times[1:], "mib": memory.peak / MEBIBYTE, "note": ""}


def _measure_at(name: str, one: str, tree: str, *work: object) -> dict[str, object]:
    """:func:`_measure` of a candidate of the benchmark `name`, with the library that lies in `tree`."""
    code = (
        "import json, sys, rounds; name, one, *work = json.loads(sys.argv[1]);"
        "print(json.dumps(rounds.measure_named(name, one, *work)))"
    )
    path = os.pathsep.join([tree, str(Path(__file__).parent)])
    words = [sys.executable, "-c", code, json.dumps([name, one, *work])]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, cwd=tree, stdout=subprocess.PIPE, text=True)
    if done.returncode < 0:
        raise MemoryError
    done.check_returncode()
    return json.loads(done.stdout.splitlines()[-1])


def measure_named(name: str, one: str, size: Size, device: str, repeats: int, threads: int) -> dict[str, object]:
    """:func:`_measure` of a candidate by its name in a benchmark."""
    candidates = import_module(name).candidates(torch.device(device).type)
    return _measure(candidates[one], size, device, repeats, threads)


def tree_of(commit: str, folder: str) -> str:
    """Write the package as a commit had it to a folder; the commit's full name."""
    root = str(Path(__file__).parent.parent)
    full = subprocess.run(["git", "-C", root, "rev-parse", commit], capture_output=True, text=True, check=True).stdout
    words = ["git", "-C", root, "archive", full.strip(), "lumirlib"]
    with tarfile.open(fileobj=io.BytesIO(subprocess.run(words, capture_output=True, check=True).stdout)) as archive:
        archive.extractall(folder, filter="data")
    return full.strip()


def peers() -> dict[str, str]:
    """Versions of the packages compared with, where they are installed."""
    found = {}
    for name in ("voxelmorph", "neurite", "monai"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def parser(text: str, default_sizes: dict[str, list[str]]) -> argparse.ArgumentParser:
    """Options of a benchmark's command line."""
    options = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="auto", help="auto, cpu, cuda ...")
    options.add_argument("--sizes", nargs="+", default=[], help=f"DxHxW:N, by default {default_sizes}")
    options.add_argument("--rounds", type=int, default=2, help="how often every candidate is measured")
    options.add_argument("--repeats", type=int, default=2, help="timed calls in each round, after one that is not")
    options.add_argument("--only", nargs="+", default=[""], help="candidates with such a text, and the first one")
    options.add_argument("--against", default="", help="commit that each of them is measured at too; then no first one")
    options.add_argument("--out", default="", help="results folder")
    options.add_argument("--resume", action="store_true", help="keep what the file has of the same code and device")
    return options


def run(
    name: str, candidates: Callable[[str], dict[str, Callable]], default_sizes: dict[str, list[str]], text: str
) -> Path:
    """Measure, print the table, and write ``<results>/benchmarks/<name>_<cpu or cuda>.json``; the path.

    Args:
        name: of the benchmark.
        candidates: gives, for "cpu" or "cuda", functions ``make(shape, channels, device) -> work`` by name, the first
            one being what the ratios refer to, until one whose name ends in "plain" or is of an older commit.
        default_sizes: "DxHxW:N" by kind of device.
        text: the benchmark's docstring.
    """
    given = parser(text, default_sizes).parse_args()
    device = pick_device(given.device)
    kind = "cuda" if device.type == "cuda" else "cpu"
    sizes, every = given.sizes or default_sizes[kind], candidates(kind)
    first = "" if given.against else next(iter(every))
    chosen = {one: make for one, make in every.items() if one == first or any(text in one for text in given.only)}
    about = {
        "command": f"python benchmarks/{name}.py {' '.join(sys.argv[1:])}".strip(),
        "commit": provenance.commit(),
        "device": provenance.describe_device(device),
        "made": provenance.now(),
        "rounds": given.rounds,
        "repeats": given.repeats,
        "versions": provenance.versions() | peers(),
        "tf32": {"convolutions": torch.backends.cudnn.allow_tf32, "matmul": torch.backends.cuda.matmul.allow_tf32},
        "images": "random",
    }
    ending = "_against" if given.against else ""
    path = provenance.results_folder(given.out) / "benchmarks" / f"{name}{ending}_{device.type}.json"
    with tempfile.TemporaryDirectory() as tree:
        if given.against:
            about["against"] = tree_of(given.against, tree)
            older = {f"{one}{AT}{about['against'][:9]}": partial(_measure_at, name, one, tree) for one in chosen}
            pairs = zip(older.items(), chosen.items(), strict=True)
            chosen = {one: make for pair in pairs for one, make in pair}
        kept = measured_before(path, about) if given.resume else {}
        for table in measure_all(chosen, sizes, str(device), given.rounds, given.repeats, kept):  # a cut loses one
            rows = table.astype(object).where(table.notna(), None).to_dict("records")
            write_json(path, {"provenance": about, "rows": rows})
    print(table.drop(columns="seconds").to_string(index=False, float_format="%.3f"))
    print(path)
    return path


def measured_before(path: Path, about: dict) -> dict[tuple[str, str], list[dict]]:
    """Measurements by size and candidate of a file that the same commit, device and versions wrote; else none."""
    content = read_json(path) if path.is_file() else {"provenance": {}}
    if any(
        content["provenance"].get(name) != about.get(name)
        for name in ("commit", "against", "device", "versions", "repeats")
    ):
        return {}
    return {
        (row["size"], row["candidate"]): [
            {"note": "", "times": row["seconds"], "first": row["first_s"], "mib": row["mib"]}
        ]
        for row in content["rows"]
        if not row["note"]
    }


def measure_all(
    candidates: dict[str, Callable],
    sizes: Sequence[str],
    device: str,
    rounds: int,
    repeats: int,
    kept: Mapping[tuple[str, str], list[dict]] | None = None,
) -> Iterator[pd.DataFrame]:
    """After each measurement, all so far: medians and minima by size and candidate, ratios to the first candidate.

    What is in `kept`, by size and candidate, is not measured again.
    """
    found: dict[tuple[str, str], list[dict]] = {}
    with tqdm(total=len(candidates) * len(sizes) * rounds, unit="measurement") as bar:
        for size in sizes:
            shape, _, channels = size.partition(":")
            for _ in range(rounds):
                for one, make in candidates.items():
                    bar.set_postfix_str(f"{size} {one}")
                    work = ((shape, int(channels)), device, repeats, torch.get_num_threads())
                    measured = found.setdefault((size, one), list((kept or {}).get((size, one), ())))
                    if (size, one) not in (kept or {}) and (not measured or not measured[-1]["note"]):
                        try:
                            of_older = AT in one  # which starts a process itself
                            measured.append(make(*work) if of_older else in_own_process(one, _measure, make, *work))
                        except MemoryError:
                            measured.append({"note": "killed: memory?"})
                    bar.update()
                    yield summarize(found)


def summarize(found: dict[tuple[str, str], list[dict]]) -> pd.DataFrame:
    """One row per size and candidate.

    Args:
        found: what :func:`_measure` gave in each round, by size and candidate.
    """
    rows: list[dict] = []
    plain: dict = {}
    for (size, one), measured in found.items():
        row = {"size": size, "candidate": one, "note": measured[-1]["note"]}
        if not row["note"]:
            seconds = [value for each in measured for value in each["times"]]
            row |= {
                "median_s": statistics.median(seconds),
                "min_s": min(seconds),
                "first_s": min(each["first"] for each in measured),
                "mib": statistics.median(each["mib"] for each in measured),
                "seconds": seconds,
            }
        if not rows or rows[-1]["size"] != size or one.endswith("plain") or AT in one:
            plain = row
        row["times_as_fast"] = plain.get("median_s", math.nan) / row.get("median_s", math.nan)
        row["share_of_memory"] = row.get("mib", math.nan) / plain.get("mib", math.nan)
        rows.append(row)
    columns = ["size", "candidate", "median_s", "min_s", "first_s", "mib", "times_as_fast", "share_of_memory"]
    return pd.DataFrame(rows).reindex(columns=[*columns, "note", "seconds"])
