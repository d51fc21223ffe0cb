"""Trained networks on altered moving images: contrast, thick slices, missing tissue.

    lumirlib measure robustness --rows LC-2+LR4+MUON ours --preset real-2mm --cohort brains --seeds 0 1

The fixed images stay as they are. Every alteration leaves the anatomy where it is (missing tissue takes a part of it
away), so labels, landmarks and the brain that NDV counts in are those of the unaltered moving image: the displacement
that is asked for is the same one. That goes for the labels inside a hole too: what was there before it was cut out is
known, and all of it is scored.

Writes `<out>/robustness/<run>.csv`, a line for each pair and alteration, with its provenance beside it. What is there
is not measured again, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn import functional
from tqdm.auto import tqdm

from lumirlib import spatial
from lumirlib._checks import check_image
from lumirlib.data import Pair
from lumirlib.evaluation import Method, evaluate_method
from lumirlib.files import check_writable, read_json, write_json
from lumirlib.methods import parse_row
from lumirlib.study.paper import CHALLENGE
from lumirlib.study.results import read_table, scored_mm, scoring_facts, write_results
from lumirlib.study.run import Run
from lumirlib.training.pairs import evenly_spaced

#: Voxels that a thick slice spans: 16 mm where the network works at 4 mm, 4 mm where it works at 1 mm.
SLICE_VOXELS = 4
#: Semi-axes of the hole in mm, least and most; of a mean one the volume is 33 ml.
HOLE_MM = (15.0, 25.0)

UNALTERED = "unaltered"
#: Columns of the table, at least.
COLUMNS = ("pair", "fixed", "moving", "alteration", *CHALLENGE)


def invert_contrast(image: torch.Tensor) -> torch.Tensor:
    """The image with the intensities of the brain reflected in the middle of their range; the background stays zero.

    Contrast as between T1 and T2 weighting, reversed, which the network has never seen: the theme of the LUMIR task of
    Learn2Reg 2025, where other contrasts are registered without training on them.

    Args:
        image: Image ``(1, 1, D, H, W)`` in [0, 1], zero outside the brain.

    Returns:
        Likewise; the brain keeps its smallest and its largest intensity, so none of it becomes background.
    """
    check_image(image, "image", channels=1)
    brain = image[image > 0]
    if not len(brain):
        return image.clone()
    return torch.where(image > 0, brain.min() + brain.max() - image, 0.0)


def change_gamma(image: torch.Tensor, gamma: float) -> torch.Tensor:
    """The image to the power of `gamma`, as RandomGamma of TorchIO (Pérez-García et al., CMPB 208, 2021) draws it.

    Args:
        image: Image ``(1, 1, D, H, W)`` in [0, 1].
        gamma: Exponent above 0; below 1 brightens.
    """
    check_image(image, "image", channels=1)
    if not gamma > 0:
        raise ValueError(f"gamma must be above 0, got {gamma}")
    return image**gamma


def thicken_slices(image: torch.Tensor, voxels: int = SLICE_VOXELS) -> torch.Tensor:
    """The image as from a scan with thick axial slices: means over `voxels` voxels along k, interpolated linearly back.

    The partial volume of a box profile, as Billot et al. (SynthSeg, MedIA 86, 2023) and RandomAnisotropy of TorchIO
    simulate clinical scans. In the plane nothing is lost.

    Args:
        image: Image ``(1, 1, D, H, W)``.
        voxels: Number of voxels that a slice spans, from 1.

    Returns:
        On the same grid.
    """
    check_image(image, "image", channels=1)
    if voxels < 1:
        raise ValueError(f"voxels must be 1 or more, got {voxels}")
    length = image.shape[4]
    whole = functional.pad(image, (0, -length % voxels, 0, 0, 0, 0), mode="replicate")
    slices = functional.avg_pool3d(whole, (1, 1, voxels))
    back = functional.interpolate(slices, scale_factor=(1, 1, voxels), mode="trilinear", align_corners=False)
    return back[..., :length]


def remove_tissue(image: torch.Tensor, name: str, resolution_mm: float) -> torch.Tensor:
    """The image with an ellipsoid of it set to zero, as where a tumor was resected.

    After the simulated resections of Pérez-García et al. (IJCARS 16, 2021), whose cavities are noisy ellipsoids. Here
    the center is any voxel of the brain, the semi-axes are uniform in :data:`HOLE_MM`, and their directions random.

    Args:
        image: Image ``(1, 1, D, H, W)``, zero outside the brain.
        name: Name of the pair, which seeds all that is random: every method meets the same hole.
        resolution_mm: Edge of a voxel, in mm.
    """
    check_image(image, "image", channels=1)
    generator = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))
    brain = torch.nonzero(image[0, 0] > 0)
    if not len(brain):
        return image.clone()
    center = brain[generator.integers(len(brain))].to(image)
    semi_axes = generator.uniform(*HOLE_MM, size=3) / resolution_mm
    directions, _ = np.linalg.qr(generator.standard_normal((3, 3)))
    places = spatial.identity_grid(image.shape[2:], image.device, image.dtype)[0] - center.reshape(3, 1, 1, 1)
    scaled = torch.as_tensor(directions / semi_axes).to(image)  # columns: directions over their semi-axes
    distance = torch.einsum("cijk,cd->dijk", places, scaled).square().sum(0)
    return image.masked_fill(distance <= 1, 0.0)


#: Name -> what is done to the moving image of a pair, at a resolution in mm.
ALTERATIONS: dict[str, Callable[[torch.Tensor, Pair, float], torch.Tensor]] = {
    UNALTERED: lambda moving, pair, resolution_mm: moving,
    "contrast inverted": lambda moving, pair, resolution_mm: invert_contrast(moving),
    "gamma 0.5": lambda moving, pair, resolution_mm: change_gamma(moving, 0.5),
    "gamma 2": lambda moving, pair, resolution_mm: change_gamma(moving, 2.0),
    "thick slices": lambda moving, pair, resolution_mm: thicken_slices(moving),
    "missing tissue": lambda moving, pair, resolution_mm: remove_tissue(moving, pair.name, resolution_mm),
}


class _OfAltered:
    """A method that is given another moving image than the evaluation has, so that its time is the method's alone."""

    def __init__(self, method: Method, moving: torch.Tensor) -> None:
        self.method, self.moving = method, moving

    def __call__(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        return self.method(fixed, self.moving)

    @property
    def last_run(self) -> dict[str, float]:
        return getattr(self.method, "last_run", {})


def evaluate_altered(method: Method, run: Run, pair: Pair) -> pd.DataFrame:
    """Figures of one pair under every alteration.

    Args:
        method: Function ``method(fixed, moving) -> displacement``, on the run's device.
        run: Run that gives cohort and device.
        pair: Pair of the cohort.

    Returns:
        A line per alteration: pair, fixed, moving, alteration, and a column for each figure of
        :func:`lumirlib.evaluation.evaluate_method`.
    """
    lines = []
    for name, alter in ALTERATIONS.items():
        moving = alter(run.cohort.image(pair.moving), pair, run.cohort.resolution_mm).to(run.device)
        found = evaluate_method(_OfAltered(method, moving), run.cohort, (pair,), run.device, progress=False)
        keys = {"pair": pair.name, "fixed": pair.fixed.name, "moving": pair.moving.name, "alteration": name}
        lines.append({**keys, **found.set_index("metric")["value"]})
    return pd.DataFrame(lines)


def _identity(run: Run) -> dict[str, object]:
    """What figures must agree in to stand in one table."""
    trained = run.config.row.trains_on != "nothing"
    return {
        "run": run.config.run,
        "weights_sha256": hashlib.sha256(run.checkpoint.read_bytes()).hexdigest() if trained else None,
        "cohort_digest": run.cohort.digest,
        "scored_mm": run.cohort.at_own_resolution.resolution_mm,
        "alterations": list(ALTERATIONS),
    }


def table_path(run: Run) -> Path:
    """Where the figures of a run are written."""
    return run.out / "robustness" / f"{run.config.run}.csv"


def measure(run: Run, command: str, pairs: int | None = None, progress: bool = True) -> Path:
    """Evaluate a trained run on altered images, or what is lacking of that, and write its table.

    Interrupted, it leaves what it has in `<run>.unfinished` beside the table, and goes on from there.

    Args:
        run: Run whose checkpoint is there.
        command: Command for the provenance.
        pairs: Number of pairs, spread evenly over those of the run; None takes all. A table with more is left as it is.
        progress: Whether to show a progress bar.

    Returns:
        Path of the table.

    Raises:
        FileNotFoundError: the run is not trained.
        ValueError: a damaged table.
    """
    path, identity = table_path(run), _identity(run)
    unfinished = path.with_suffix(".unfinished")
    sources = []
    if path.is_file() and path.with_suffix(".json").is_file():
        about = read_json(path.with_suffix(".json"))
        if all({**about, "scored_mm": scored_mm(about)}.get(name) == value for name, value in identity.items()):
            sources.append((read_table(path, about, COLUMNS), about["measured_by"]))
    if unfinished.is_file():
        left = read_json(unfinished)
        if left["identity"] == identity:
            sources.append((pd.DataFrame(left["lines"]), left["measured_by"]))
    known = {name: part for table, _ in sources for name, part in table.groupby("pair", sort=False)}
    measured_by = list(dict.fromkeys(session for _, sessions in sources for session in sessions))
    wanted = evenly_spaced(run.pairs, pairs)
    lacking = [pair for pair in wanted if pair.name not in known]
    if not lacking and not unfinished.is_file():
        return path
    check_writable(path.parent)
    method = run.trained_method()
    session = f"{run.commit}, {run.engine.describe()}"
    label = f"{run.config.row.name}, seed {run.config.seed}"
    for pair in tqdm(lacking, desc=f"robustness of {label}", unit="pair", disable=not progress):
        known[pair.name] = evaluate_altered(method, run, pair)
        measured_by = list(dict.fromkeys([*measured_by, session]))
        lines = [line for part in known.values() for line in part.to_dict("records")]
        write_json(unfinished, {"identity": identity, "measured_by": measured_by, "lines": lines})
    table = pd.concat([known[pair.name] for pair in run.pairs if pair.name in known], ignore_index=True)
    table = table.assign(run=run.config.run)[["run", *table.columns.drop("run", errors="ignore")]]
    about = {
        **identity,
        "method": run.config.row.name,
        "set_besides": run.options,
        "options": asdict(run.config.row),
        "preset": asdict(run.config.preset),
        "seed": run.config.seed,
        "command": command,
        "commit": run.commit,
        "device": run.engine.describe(),
        "measured_by": measured_by,
        "evaluated_pairs": len(known),
        **scoring_facts(run.cohort),
    }
    write_results(table, path, about)
    unfinished.unlink(missing_ok=True)
    return path


def measure_rows(
    rows: Sequence[str],
    seeds: Sequence[int],
    preset: str = "demo",
    cohort: str = "embedded",
    data_root: str = "",
    out: str = "",
    device: str = "auto",
    pairs: int | None = None,
    command: str = "lumirlib.study.robustness.measure_rows",
) -> Iterator[Path]:
    """:func:`measure` for trained rows, each with all its seeds; those without random numbers once.

    Args:
        rows: Names of rows whose trained weights are used.
        seeds: Random seeds of each row.
        preset: Preset that they were trained with.
        cohort: Cohort that they are evaluated on.
        data_root: Folder that the cohort's paths are relative to; empty for its own.
        out: Results folder, where the checkpoints are too; empty for :func:`lumirlib.provenance.results_folder`.
        device: Device's name: "auto", "cpu", "cuda" ...
        pairs: Number of pairs, spread evenly; None takes all.
        command: Call that made the tables, for the provenance.

    Yields:
        Path of each run's table, as soon as it is written.

    Raises:
        FileNotFoundError: A row that is not trained, said before the first is measured.
        ValueError: An unknown row or preset.
    """
    runs = [
        Run.prepare(row, preset, cohort, seed, data_root, out, device)
        for row in rows
        for seed in (seeds if parse_row(row).trains_on != "nothing" else seeds[:1])
    ]
    for run in runs:
        _identity(run)  # raises for what is not trained
    for run in runs:
        yield measure(run, command, pairs)
