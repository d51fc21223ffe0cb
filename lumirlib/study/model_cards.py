"""Weights for the package: exporting, describing and checking them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors.torch
import torch

from lumirlib import provenance
from lumirlib.data import load_cohort
from lumirlib.evaluation import evaluate_method, summarize, zero_displacement
from lumirlib.files import write_atomically
from lumirlib.methods.base import PAPER, Preset
from lumirlib.study.costs import MEBIBYTE, PeakMemory
from lumirlib.study.paper import CHALLENGE, METRICS, Metric
from lumirlib.study.results import read_results, scoring_facts, write_results
from lumirlib.training import weights as packaged
from lumirlib.training.engine import pick_device
from lumirlib.training.weights import (
    EVALUATION_FACTS,
    FACTS,
    FORMAT,
    Weights,
    check_facts,
    names,
    read_checkpoint,
    read_packaged,
)

#: Of a file besides its weights: configuration, facts, names and shapes.
HEADER_BYTES = 100_000
#: A check holds where Dice is within this of the card's, in [0, 1]: 0.1 point.
DICE_TOLERANCE = 1e-3

LICENSE = "Apache-2.0"
#: Metrics of the card, in its order.
SHOWN = ("dice", "hd95_mm", "tre_mm", "ndv_percent")


# writing --------------------------------------------------------------------------------------------------------------
def export(
    run: str,
    name: str,
    results: str | Path = "",
    cohort: str = "brains",
    data_root: str = "",
    device: str = "auto",
    progress: bool = True,
    command: str = "lumirlib.study.model_cards.export",
    options: Mapping[str, object] | None = None,
) -> Path:
    """Package the weights of a finished run, with a card.

    They are evaluated first, on people that neither trained the run nor chose its epoch; the figures of every pair, and
    before registration, go to `<results>/pretrained/<name>.csv`, with provenance.

    Args:
        run: Name of a run that was trained and evaluated; its files in checkpoints/, metrics/ and logs/ are read.
        name: Name of the weights: lower case, with the size of the voxels that they are for ("1mm") among its parts. If
            they were trained at others, they are passed on, see :func:`lumirlib.training.weights.to_finer_levels`.
        results: Results folder; empty for :func:`lumirlib.provenance.results_folder`.
        cohort: Cohort to evaluate on, all its pairs.
        data_root: Folder that the cohort's paths are relative to.
        device: Device to evaluate on.
        progress: Whether to show progress bars.
        command: Command for the provenance.
        options: Options of :data:`lumirlib.training.weights.REGISTRATION` to set, which the run was trained without.

    Returns:
        Path of the packaged file.

    Raises:
        FileNotFoundError: a file of the run is missing.
        ValueError: a name that hides what it must say; voxels that the network cannot be passed on to; files that do
            not belong together; a run whose epoch was chosen by the people that it would be evaluated on; too many
            bytes.
    """
    folder = provenance.results_folder(results)
    checkpoint, log = folder / "checkpoints" / run / "best.pt", folder / "logs" / f"{run}.csv"
    _, about = read_results(folder / "metrics" / f"{run}.csv")
    if about.get("weights") != run:
        raise ValueError(f"{run} uses the weights of {about.get('weights')!r}: export that run")
    trained = read_checkpoint(checkpoint, options)
    for key in ("cohort_digest", "seed"):
        if trained.config[key] != about[key]:
            raise ValueError(f"{checkpoint}: {key} is {trained.config[key]!r}, in metrics/{run}.json {about[key]!r}")
    if not log.is_file():
        raise FileNotFoundError(f"no such log: {log}")
    weights = trained.at_resolution(_resolution_in(name))
    others = [path for path in packaged.FOLDER.glob("*.safetensors") if path.stem != name]
    size = sum(path.stat().st_size for path in others) + sum(one.nbytes for one in trained.tensors.values())
    if size + HEADER_BYTES > packaged.MAX_BYTES:
        raise ValueError(
            f"{packaged.FOLDER} would hold {size} bytes of weights with {name}, more than {packaged.MAX_BYTES}"
        )

    people = load_cohort(cohort, weights.resolution_mm, data_root or None)
    if people.name == about["cohort_name"]:
        raise ValueError(
            f"{people.name!r}, which {run} is to be evaluated on, has chosen its epoch: train it with "
            "another cohort, such as --cohort brains+embedded"
        )
    target = pick_device(device)
    network = weights.network(device)
    tables = [
        evaluate_method(method, people, people.validation_pairs, target, progress=progress, description=words)
        for method, words in ((network, name), (zero_displacement, "before registration"))
    ]
    tables[1]["metric"] += "_before"
    measured = folder / "pretrained" / f"{name}.csv"
    pair = people.validation_pairs[0]
    images = [people.image(one).to(target) for one in (pair.fixed, pair.moving)]
    with PeakMemory(target) as memory, torch.no_grad():
        network(*images)
    evaluation = {
        "weights": name,
        "run": run,
        "digest": weights.digest,
        "evaluated_pairs": len(people.validation_pairs),
        "command": command,
        "commit": provenance.commit(),
        "device": provenance.describe_device(target),
        "memory_mib": round(memory.peak / MEBIBYTE),
    }
    write_results(pd.concat(tables, ignore_index=True), measured, evaluation | scoring_facts(people))

    facts = _facts(name, weights, about, pd.read_csv(log), *read_results(measured))
    facts["trained_mm"] = trained.resolution_mm
    check_facts(f"metrics/{run}.json", facts)
    stored = {"format": FORMAT, "digest": trained.digest}
    stored |= {"config": json.dumps(trained.config), "facts": json.dumps(facts)}
    tensors = {key: tensor.contiguous() for key, tensor in trained.tensors.items()}
    path = packaged.FOLDER / f"{name}.safetensors"
    write_atomically(path, lambda to: safetensors.torch.save_file(tensors, to, stored))
    _write_card(name)
    return path


def _resolution_in(name: str) -> float:
    """Edge of the voxels in mm that a name of weights says."""
    sizes = [part.removesuffix("mm") for part in name.split("-") if re.fullmatch(r"\d+(\.\d+)?mm", part)]
    if len(sizes) != 1 or not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        raise ValueError(
            "name must be of a-z, 0-9, '.' and '-' and say one voxel size between hyphens, as in ours-1mm; "
            f"got {name!r}"
        )
    return float(sizes[0])


def _facts(
    name: str, weights: Weights, about: Mapping[str, Any], log: pd.DataFrame, table: pd.DataFrame, measured: dict
) -> dict[str, Any]:
    """All that the card says, from what the run and the evaluation wrote."""
    preset = Preset(**about["preset"])
    summary = summarize(table)
    trained = log[log["epoch"] > 0]
    return {
        **{key: about[key] for key in FACTS if key in about},
        "name": name,
        "license": LICENSE,
        "resolution_mm": weights.resolution_mm,
        "words": weights.row.describe(),
        "preset": preset.name,
        "batch_size": preset.batch_size,
        "differences": preset.differences_from_paper(weights.row),
        "epochs": int(trained["epoch"].max()),
        "steps": int(trained["steps"].sum()),
        "steps_of_best_epoch": int(trained.loc[trained["epoch"] <= about["best_epoch"], "steps"].sum()),
        "training_hours": round(float((trained["seconds"] * trained["steps"]).sum()) / 3600, 3),
        "evaluation": {key: measured[key] for key in (*EVALUATION_FACTS, "scored_mm")},
        "figures": {
            metric: {"mean": float(row["mean"]), "std": float(row["std"]), "pairs": int(row["pairs"])}
            for metric, row in summary.iterrows()
            if metric.removesuffix("_before") in (*CHALLENGE, "seconds") and row["pairs"]
        },
    }


def model_card(facts: Mapping[str, Any]) -> str:
    """The card of packaged weights, as Markdown.

    Args:
        facts: Facts as :func:`export` stores them.
    """
    size, done, figures = f"{facts['resolution_mm']:g} mm", facts["evaluation"], facts["figures"]
    trained = f"{facts.get('trained_mm', facts['resolution_mm']):g} mm"
    passed_on = "" if trained == size else f", passed on to **{size}**"
    scored = f"scored at {done.get('scored_mm') or facts['resolution_mm']:g} mm"
    devices = list(dict.fromkeys(session.partition(", ")[2] for session in facts["trained_by"]))
    commits = list(dict.fromkeys(session.partition(", ")[0] for session in facts["trained_by"]))
    rows = [
        f"| {metric.heading} | {_shown(figures[f'{metric.name}_before'], metric)} "
        f"| {_shown(figures[metric.name], metric)} | {figures[metric.name]['pairs']} |"
        for metric in (METRICS[name] for name in SHOWN)
        if metric.name in figures
    ]
    dice = facts["val_dice"]
    chosen_by = "similarity" if dice is None or math.isnan(dice) else f"Dice ({100 * dice:.2f} %)"
    begun = f", begun from the weights {facts['started_from']}" if facts["started_from"] else ""
    coarse = "; what is smaller, such as the folds of the cortex, is not registered" * (facts["resolution_mm"] > 1)
    limits = [
        f"Voxels of {size}{coarse}.",
        f"{facts['steps']:,} training steps{begun}; the paper takes {PAPER.epochs} epochs of LUMIR at 1 mm.",
        "T1 scans of heads, skull-stripped, bias-corrected and affinely aligned to ICBM152, in LUMIR's frame "
        f"(160×224×192 voxels of 1 mm, averaged over blocks of {size}), as `lumirlib prepare` makes them. Other "
        "contrasts, children, lesions and missing tissue were not evaluated here.",
        f"{done['evaluated_pairs']} ordered pairs of a few people: not a LUMIR result, not to be set beside the "
        "leaderboard's.",
        "For research only: not a medical device, not for clinical use.",
    ]
    return f"""# {facts["name"]}

Weights of `{facts["method"]}`, trained at voxels of **{trained}** on **{" and ".join(devices)}**{passed_on}:
{facts["words"]}; {facts["parameters"]:,} parameters.

```python
import lumirlib

model = lumirlib.pretrained("{facts["name"]}")
displacement = model(fixed, moving)  # images (1, 1, D, H, W) in [0, 1], voxels of {size}
```

Intended for registering scans of the kind below, for starting a training (`--init`), and as a reference.

## Figures

{done["cohort_name"]}, {scored}, {done["evaluated_pairs"]} pairs, {done["scored_labels"]} labels; mean ± population
standard deviation over pairs. No image or label of these people was trained on, and none chose the epoch.

| metric | before registration | registered | pairs |
| --- | --- | --- | --- |
{chr(10).join(rows)}

A registration takes {figures["seconds"]["mean"]:.2f} s, without reading images, and {done["memory_mib"]:,} MiB besides
the library itself, on {done["device"]}. Measured by `{done["command"]}` at commit {done["commit"]},
{done["written"]}. Every pair's figures are in `results/pretrained/{facts["name"]}.csv`;
`lumirlib weights check {facts["name"]}` measures them again.

## Training

- Data: {facts["trained_on"]}.
- Run `{facts["run"]}`: `{facts["command"]}`.
- Preset {facts["preset"]}, seed {facts["seed"]}, {facts["epochs"]} epochs, {facts["steps"]:,} steps, batches of
  {facts["batch_size"]}, {facts["training_hours"]:g} hours; from {facts["started_from"] or "random weights"}.
- Epoch {facts["best_epoch"]}, after {facts["steps_of_best_epoch"]:,} steps, was chosen by {chosen_by} on validation
  pairs of {facts["cohort_name"]}.
- Differences from `{facts["method"]}` trained at the paper's length: {"; ".join(facts["differences"]) or "none"}.
- Device: {"; ".join(devices)}. Commit: {", ".join(commits)}.

## Data and license

The weights are under {facts["license"]}, as the package. To be named:

- for the cohorts that it was trained on, of which the training scans alone were used: {facts["credit"] or "nobody"};
- for the figures: {done["credit"] or "nobody"}.

## Limits

{chr(10).join(f"- {limit}" for limit in limits)}
"""


def _shown(figure: Mapping[str, float], metric: Metric) -> str:
    return " ± ".join(f"{metric.shown(figure[part]):.{metric.short_digits}f}" for part in ("mean", "std"))


def write_cards() -> list[Path]:
    """Write the card of all packaged weights anew from their facts; the paths."""
    return [_write_card(name) for name in names()]


def _write_card(name: str) -> Path:
    card = model_card(read_packaged(name).facts)
    return write_atomically(packaged.FOLDER / f"{name}.md", lambda to: to.write_text(card, encoding="utf-8"))


# checking -------------------------------------------------------------------------------------------------------------
def check(name: str, cohort: str = "brains", data_root: str = "", device: str = "auto", progress: bool = True) -> bool:
    """Measure packaged weights anew, print what came of it, and say whether the card is right.

    It is if it is the one that :func:`model_card` makes of the file's facts, and Dice over all pairs is within
    :data:`DICE_TOLERANCE` of its figure. A card without "scored_mm" is of figures at the resolution of the weights.
    """
    weights = read_packaged(name)
    stated, done = weights.facts["figures"]["dice"]["mean"], weights.facts["evaluation"]
    card = packaged.FOLDER / f"{name}.md"
    if not card.is_file() or card.read_text(encoding="utf-8") != model_card(weights.facts):
        print(f"{name}: {card.name} is not the card of the facts in {name}.safetensors")
        return False
    people = load_cohort(cohort, weights.resolution_mm, data_root or None)
    if people.digest != done["cohort_digest"]:
        print(
            f"{name}: the card is of {done['cohort_name']!r}, {done['cohort_digest']}; this is {people.name!r}, "
            f"{people.digest}"
        )
    table = evaluate_method(
        weights.network(device),
        people,
        people.validation_pairs,
        pick_device(device),
        progress=progress,
        description=name,
        at_own_resolution="scored_mm" in done,
    )
    found = float(summarize(table).loc["dice", "mean"])
    agrees = abs(found - stated) <= DICE_TOLERANCE
    verdict = f"{'the same' if agrees else 'NOT the same'} to {100 * DICE_TOLERANCE} point"
    print(
        f"{name}: Dice {100 * found:.2f} % over {len(people.validation_pairs)} pairs, the card says "
        f"{100 * stated:.2f} %: {verdict}"
    )
    return agrees
