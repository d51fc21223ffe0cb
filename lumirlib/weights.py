"""Pretrained weights that the package carries: loaded, exported from a finished run with a model card, and checked.

    python -m lumirlib.weights list
    python -m lumirlib.weights export --run <run> --name ours-4mm-cpu
    python -m lumirlib.weights check

`pretrained_weights/<name>.safetensors` holds the weights and, as JSON in its metadata, the run's configuration and all
that the card says; the card, `<name>.md`, is made of that. Every number comes from files that runs wrote.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors
import safetensors.torch
import torch
from torch import nn

from lumirlib import provenance
from lumirlib.checkpoints import check_schema, check_weights, described_row, load_checkpoint, shapes_of
from lumirlib.data import load_cohort
from lumirlib.engine import pick_device
from lumirlib.evaluation import (
    METRICS,
    cohort_facts,
    evaluate_method,
    read_results,
    summarize,
    write_results,
    zero_displacement,
)
from lumirlib.files import parse_json, write_atomically
from lumirlib.presets import PAPER, Preset
from lumirlib.rows import Row
from lumirlib.training import to_device

#: Of the packaged files.
FOLDER = Path(__file__).resolve().parent / "pretrained_weights"
FORMAT = "lumirlib-weights-1"
#: All weights together, in bytes.
MOST_BYTES = 20_000_000
#: Of a file besides its weights: configuration, facts, names and shapes.
HEADER_BYTES = 100_000
#: A check holds where Dice is within this of the card's, in [0, 1]: 0.1 point.
DICE_TOLERANCE = 1e-3
LICENSE = "Apache-2.0"
#: What the card shows of each metric: heading, factor from the unit of the files, digits.
SHOWN = {"dice": ("Dice (%)", 100, 2), "hd95_mm": ("HD95 (mm)", 1, 3), "tre_mm": ("TRE (mm)", 1, 3),
         "ndv_percent": ("NDV (%)", 1, 4)}  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Trained weights, and what they are of.

    Attributes:
        name: of the packaged weights, or of the run.
        row: whose network they are of.
        resolution_mm: voxel size that they were trained at.
        config: of the run, as :meth:`lumirlib.training.RunConfig.as_dict` gives it.
        tensors: by name, on the CPU.
        facts: what the card says; empty for those of a checkpoint.
    """

    name: str
    row: Row
    resolution_mm: float
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of names, shapes and values."""
        content = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            content.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        return content.hexdigest()[:16]

    @property
    def about(self) -> str:
        """Name and digest, for provenance."""
        return f"{self.name}, {self.digest}"

    def network(self, device: str | torch.device = "auto") -> nn.Module:
        """The network with these weights, in evaluation mode, ready for ``model(fixed, moving)``."""
        model = to_device(self.row.build(), pick_device(str(device)))
        model.load_state_dict(self.tensors)
        return model.eval()


# reading --------------------------------------------------------------------------------------------------------------


def names() -> tuple[str, ...]:
    """The weights that the package carries."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.safetensors")))


def read_packaged(name: str) -> Weights:
    """Weights that the package carries, by name.

    Raises:
        ValueError: an unknown name, with the choices listed; a file that is damaged.
    """
    if name not in names():
        raise ValueError(
            f"no pretrained weights {name!r}: choose from {', '.join(names()) or 'none, none are packaged'}"
        )
    return read_weights(FOLDER / f"{name}.safetensors")


def read_weights(path: str | Path) -> Weights:
    """Weights of a file that :func:`export` wrote; nothing in it is trusted before it is checked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: larger than :data:`MOST_BYTES`, torn, damaged or foreign, or weights that do not fit their network.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such weights: {path}")
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{path}: expected at most {MOST_BYTES} bytes, got {size}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the library's own error, and torch's for shapes
        raise ValueError(f"cannot read {path} as safetensors (torn or foreign?): {error}") from error
    if stored.get("format") != FORMAT:
        raise ValueError(f"{path} is not of this package: expected format {FORMAT!r}, got {stored.get('format')!r}")
    config, facts = (parse_json(stored.get(key, "").encode(), f"{path}: {key}") for key in ("config", "facts"))
    found = _described(path, path.stem, {"config": config, "model": tensors}, size, facts)
    if stored.get("digest") != found.digest:
        raise ValueError(f"{path}: damaged, the digest of its weights is not the one it was written with")
    try:
        model_card(facts)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: its facts make no model card: {error!r}") from error
    return found


def read_checkpoint(path: str | Path) -> Weights:
    """Weights of a best.pt; errors as of :func:`lumirlib.checkpoints.load_checkpoint` and :func:`read_weights`."""
    path = Path(path)
    return _described(path, path.resolve().parent.name, load_checkpoint(path), path.stat().st_size)


def _described(
    path: Path, name: str, content: dict[str, Any], size: int, facts: dict[str, Any] | None = None
) -> Weights:
    check_schema(path, content, size)
    row = described_row(path, content)
    check_weights(path, content["model"], shapes_of(path, row))
    resolution = content["config"]["preset"].get("resolution_mm")
    if isinstance(resolution, bool) or not isinstance(resolution, (int, float)) or not 0 < resolution < 1000:
        raise ValueError(f"{path}: config.preset.resolution_mm must be a voxel size in mm, got {resolution!r}")
    return Weights(name, row, float(resolution), content["config"], content["model"], facts or {})


def pretrained(name: str, device: str = "auto") -> nn.Module:
    """The network with the weights of a name, ready for ``model(fixed, moving)``.

    Args:
        name: one of :func:`lumirlib.weights.names`; it says the voxel size that the weights were trained at, and images
            are to have.
        device: "auto", "cpu", "cuda" ...

    Returns:
        A module in evaluation mode: images ``(B, 1, D, H, W)`` in [0, 1], in LUMIR's frame, to displacement
        ``(B, 3, D, H, W)`` in voxels.

    Raises:
        ValueError: an unknown name, with the choices listed.
    """
    return read_packaged(name).network(device)


def _network_options(row: Row) -> dict[str, object]:
    """What a row's network is built from."""
    return {"kind": type(row)} | {
        one.name: getattr(row, one.name) for one in fields(row)  # type: ignore[arg-type]
        if one.name != "name" and one.metadata.get("of_network", True)
    }  # fmt: skip


def starting_weights(init: str, row: Row, resolution_mm: float) -> Weights | None:
    """The weights that a run starts from.

    Args:
        init: empty or "random" for random ones; a name of :func:`names`; "pretrained" for the packaged ones of this
            very network, those of the same row and then the same voxels first; or the path of a best.pt.
        row: to be trained, at its final width.
        resolution_mm: that it is trained at.

    Returns:
        None for random ones.

    Raises:
        ValueError: weights that do not fit the row's network by name and shape, none or several that do, a row that is
            not trained, or another `init`.
        FileNotFoundError: no such checkpoint.
    """
    if init in ("", "random"):
        return None
    if row.trains_on == "nothing":
        raise ValueError(f"{row.name} is not trained, and cannot start from {init!r}")
    base = row.trained()
    if init == "pretrained":
        return _fitting(base, resolution_mm)
    if init not in names() and not init.endswith(".pt"):
        choices = ", ".join(("random", "pretrained", *names()))
        raise ValueError(f"init must be one of {choices}, or the path of a best.pt; got {init!r}")
    found = read_checkpoint(init) if init.endswith(".pt") else read_packaged(init)
    check_weights(f"{init} for {base.name} ({base.words})", found.tensors, shapes_of(init, base))
    return found


def _fitting(row: Row, resolution_mm: float) -> Weights:
    packaged = [read_packaged(name) for name in names()]
    fitting = [one for one in packaged if _network_options(one.row) == _network_options(row)]
    for preferred in (lambda one: one.row.name == row.name, lambda one: one.resolution_mm == resolution_mm):
        fitting = [one for one in fitting if preferred(one)] or fitting
    if len(fitting) != 1:
        there = "; ".join(f"{one.name}: {one.row.name} ({one.row.words})" for one in fitting or packaged)
        what = "several pretrained weights are" if fitting else "no pretrained weights are"
        raise ValueError(f"{what} of the network of {row.name} ({row.words}); there are {there or 'none'}")
    return fitting[0]


# writing --------------------------------------------------------------------------------------------------------------


def export(
    run: str,
    name: str,
    results: str | Path = "",
    cohort: str = "brains",
    data_root: str = "",
    device: str = "auto",
    progress: bool = True,
    command: str = "lumirlib.weights.export",
) -> Path:
    """Package the weights of a finished run, with a card.

    They are evaluated first, on people that neither trained the run nor chose its epoch; the figures of every pair, and
    before registration, go to `<results>/pretrained/<name>.csv`, with provenance.

    Args:
        run: name of a run that was trained and evaluated; its files in checkpoints/, metrics/ and logs/ are read.
        name: of the weights: lower case, with the voxel size ("4mm") and, if they were trained on a CPU, "cpu" among
            its parts.
        results: folder; empty for :func:`lumirlib.provenance.results_folder`.
        cohort: to evaluate on, all its pairs.
        data_root: of the cohort.
        device: to evaluate on.
        progress: show progress bars.
        command: for the provenance.

    Returns:
        Path of the packaged file.

    Raises:
        FileNotFoundError: a file of the run is missing.
        ValueError: a name that hides what it must say; files that do not belong together; a run whose epoch was chosen
            by the people that it would be evaluated on; too many bytes.
    """
    folder = provenance.results_folder(results)
    checkpoint, log = folder / "checkpoints" / run / "best.pt", folder / "logs" / f"{run}.csv"
    _, about = read_results(folder / "metrics" / f"{run}.csv")
    if about.get("weights") != run:
        raise ValueError(f"{run} uses the weights of {about.get('weights')!r}: export that run")
    weights = read_checkpoint(checkpoint)
    for key in ("cohort_digest", "seed"):
        if weights.config[key] != about[key]:
            raise ValueError(f"{checkpoint}: {key} is {weights.config[key]!r}, in metrics/{run}.json {about[key]!r}")
    if not log.is_file():
        raise FileNotFoundError(f"no such log: {log}")
    devices = [session.partition(", ")[2] for session in about["trained_by"]]
    _check_name(name, weights.resolution_mm, devices)
    others = [path for path in FOLDER.glob("*.safetensors") if path.stem != name]
    size = sum(path.stat().st_size for path in others) + sum(one.nbytes for one in weights.tensors.values())
    if size + HEADER_BYTES > MOST_BYTES:
        raise ValueError(f"{FOLDER} would hold {size} bytes of weights with {name}, more than {MOST_BYTES}")

    people = load_cohort(cohort, weights.resolution_mm, data_root or None)
    if people.name == about["cohort_name"]:
        raise ValueError(f"{people.name!r}, which {run} is to be evaluated on, has chosen its epoch: train it with "
                         "another cohort, such as --cohort brains+embedded")  # fmt: skip
    target = pick_device(device)
    tables = [
        evaluate_method(method, people, people.validation_pairs, target, progress=progress, description=words)
        for method, words in ((weights.network(device), name), (zero_displacement, "before registration"))
    ]
    tables[1]["metric"] += "_before"
    measured = folder / "pretrained" / f"{name}.csv"
    evaluation = {
        "weights": name, "run": run, "digest": weights.digest, "evaluated_pairs": len(people.validation_pairs),
        "command": command, "commit": provenance.commit(), "device": provenance.describe_device(target),
    }  # fmt: skip
    write_results(pd.concat(tables, ignore_index=True), measured, evaluation | cohort_facts(people))

    facts = _facts(name, weights, about, pd.read_csv(log), *read_results(measured))
    stored = {"format": FORMAT, "digest": weights.digest}
    stored |= {"config": json.dumps(weights.config), "facts": json.dumps(facts)}
    tensors = {key: tensor.contiguous() for key, tensor in weights.tensors.items()}
    path = FOLDER / f"{name}.safetensors"
    write_atomically(path, lambda to: safetensors.torch.save_file(tensors, to, stored))
    write_cards()
    return path


def _check_name(name: str, resolution_mm: float, devices: list[str]) -> None:
    needed = [f"{resolution_mm:g}mm", *(["cpu"] if any("cpu" in device for device in devices) else [])]
    lacking = [word for word in needed if word not in name.split("-")]
    if lacking or not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        raise ValueError(
            f"name must be of a-z, 0-9, '.' and '-' and say {' and '.join(needed)} between hyphens, as in "
            f"ours-{'-'.join(needed)}; got {name!r}"
        )


def _facts(
    name: str, weights: Weights, about: Mapping[str, Any], log: pd.DataFrame, table: pd.DataFrame, measured: dict
) -> dict[str, Any]:
    """All that the card says, from what the run and the evaluation wrote."""
    preset = Preset(**about["preset"])
    summary = summarize(table)
    trained = log[log["epoch"] > 0]
    keys = ("run", "method", "seed", "command", "trained_by", "parameters", "best_epoch", "val_dice", "trained_on",
            "credit", "cohort_name", "simulated", "started_from")  # fmt: skip
    evaluation = ("cohort_name", "cohort_digest", "evaluated_pairs", "scored_labels", "credit", "device", "commit",
                  "written", "command")  # fmt: skip
    return {
        "name": name,
        "license": LICENSE,
        "resolution_mm": weights.resolution_mm,
        "words": weights.row.words,
        **{key: about.get(key) for key in keys},
        "preset": preset.name,
        "batch_size": preset.batch_size,
        "differences": preset.differences_from_paper(weights.row),
        "epochs": int(trained["epoch"].max()),
        "steps": int(trained["steps"].sum()),
        "steps_of_best_epoch": int(trained.loc[trained["epoch"] <= about["best_epoch"], "steps"].sum()),
        "training_hours": round(float((trained["seconds"] * trained["steps"]).sum()) / 3600, 3),
        "evaluation": {key: measured[key] for key in evaluation},
        "figures": {
            metric: {"mean": float(row["mean"]), "std": float(row["std"]), "pairs": int(row["pairs"])}
            for metric, row in summary.iterrows()
            if metric.removesuffix("_before") in (*METRICS, "seconds") and row["pairs"]
        },
    }


def model_card(facts: Mapping[str, Any]) -> str:
    """The card of packaged weights, as Markdown.

    Args:
        facts: as :func:`export` stores them.
    """
    size, done, figures = f"{facts['resolution_mm']:g} mm", facts["evaluation"], facts["figures"]
    devices = list(dict.fromkeys(session.partition(", ")[2] for session in facts["trained_by"]))
    commits = list(dict.fromkeys(session.partition(", ")[0] for session in facts["trained_by"]))
    rows = [
        f"| {heading} | {_shown(figures[f'{metric}_before'], factor, digits)} "
        f"| {_shown(figures[metric], factor, digits)} | {figures[metric]['pairs']} |"
        for metric, (heading, factor, digits) in SHOWN.items()
        if metric in figures
    ]
    dice = facts["val_dice"]
    chosen_by = "similarity" if dice is None or math.isnan(dice) else f"Dice ({100 * dice:.2f} %)"
    coarse = "; what is smaller, such as the folds of the cortex, is not registered" * (facts["resolution_mm"] > 1)
    limits = [
        f"Voxels of {size}{coarse}.",
        f"{facts['steps']:,} training steps; the paper takes {PAPER.epochs} epochs of LUMIR at 1 mm.",
        "T1 scans of heads, skull-stripped, bias-corrected and affinely aligned to ICBM152, in LUMIR's frame "
        f"(160×224×192 voxels of 1 mm, averaged over blocks of {size}), as `lumirlib prepare` makes them. Other "
        "contrasts, children, lesions and missing tissue were not evaluated here.",
        f"{done['evaluated_pairs']} ordered pairs of a few people: not a LUMIR result, not to be set beside the "
        "leaderboard's.",
        "For research only: not a medical device, not for clinical use.",
    ]
    return f"""# {facts["name"]}

Weights of the network of {facts["method"]}, trained at voxels of **{size}** on **{" and ".join(devices)}**:
{facts["words"]}; {facts["parameters"]:,} parameters.

```python
import lumirlib

model = lumirlib.pretrained("{facts["name"]}")
displacement = model(fixed, moving)  # images (1, 1, D, H, W) in [0, 1], voxels of {size}
```

Intended for registering scans of the kind below, for starting a training (`--init`), and as a reference.

## Figures

{done["cohort_name"]}, {size}, {done["evaluated_pairs"]} pairs, {done["scored_labels"]} labels; mean ± population
standard deviation over pairs. No image or label of these people was trained on, and none chose the epoch.

| metric | before registration | registered | pairs |
| --- | --- | --- | --- |
{chr(10).join(rows)}

A registration takes {figures["seconds"]["mean"]:.2f} s on {done["device"]}, without reading. Measured by
`{done["command"]}` at commit {done["commit"]}, {done["written"]}. Every pair's figures are in
`results/pretrained/{facts["name"]}.csv`; `python -m lumirlib.weights check {facts["name"]}` measures them again.

## Training

- Data: {facts["trained_on"]}.
- Run `{facts["run"]}`: `{facts["command"]}`.
- Preset {facts["preset"]}, seed {facts["seed"]}, {facts["epochs"]} epochs, {facts["steps"]:,} steps of
  {facts["batch_size"]} pair(s), {facts["training_hours"]:g} hours; from {facts["started_from"] or "random weights"}.
- Epoch {facts["best_epoch"]}, after {facts["steps_of_best_epoch"]:,} steps, was chosen by {chosen_by} on validation
  pairs of {facts["cohort_name"]}.
- Differences from the paper's training: {"; ".join(facts["differences"]) or "none"}.
- Device: {"; ".join(devices)}. Commit: {", ".join(commits)}.

## Data and license

The weights are under {facts["license"]}, as the package. To be named:

- for the cohorts that it was trained on, of which the training scans alone were used: {facts["credit"] or "nobody"};
- for the figures: {done["credit"] or "nobody"}.

## Limits

{chr(10).join(f"- {limit}" for limit in limits)}
"""


def _shown(figure: Mapping[str, float], factor: float, digits: int) -> str:
    return f"{figure['mean'] * factor:.{digits}f} ± {figure['std'] * factor:.{digits}f}"


def write_cards() -> list[Path]:
    """Write the card of all packaged weights anew from their facts; the paths."""
    return [
        write_atomically(
            FOLDER / f"{name}.md",
            lambda to, name=name: to.write_text(model_card(read_packaged(name).facts), encoding="utf-8"),
        )
        for name in names()
    ]


# checking -------------------------------------------------------------------------------------------------------------


def check(name: str, cohort: str = "brains", data_root: str = "", device: str = "auto", progress: bool = True) -> bool:
    """Measure packaged weights anew, print what came of it, and say whether the card is right.

    It is if it is the one that :func:`model_card` makes of the file's facts, and Dice over all pairs is within
    :data:`DICE_TOLERANCE` of its figure.
    """
    weights = read_packaged(name)
    stated, done = weights.facts["figures"]["dice"]["mean"], weights.facts["evaluation"]
    card = FOLDER / f"{name}.md"
    if not card.is_file() or card.read_text(encoding="utf-8") != model_card(weights.facts):
        print(f"{name}: {card.name} is not the card of the facts in {name}.safetensors")
        return False
    people = load_cohort(cohort, weights.resolution_mm, data_root or None)
    if people.digest != done["cohort_digest"]:
        print(f"{name}: the card is of {done['cohort_name']!r}, {done['cohort_digest']}; this is {people.name!r}, "
              f"{people.digest}")  # fmt: skip
    table = evaluate_method(weights.network(device), people, people.validation_pairs, pick_device(device),
                            progress=progress, description=name)  # fmt: skip
    found = float(summarize(table).loc["dice", "mean"])
    agrees = abs(found - stated) <= DICE_TOLERANCE
    verdict = f"{'the same' if agrees else 'NOT the same'} to {100 * DICE_TOLERANCE} point"
    print(f"{name}: Dice {100 * found:.2f} % over {len(people.validation_pairs)} pairs, the card says "
          f"{100 * stated:.2f} %: {verdict}")  # fmt: skip
    return agrees


def parser(prog: str = "python -m lumirlib.weights") -> argparse.ArgumentParser:
    """The options of the command line."""
    options = argparse.ArgumentParser(
        prog=prog, description="Pretrained weights of the package.",
        epilog=f"examples:\n  {prog} list\n  {prog} export --run <run> --name ours-4mm-cpu\n  {prog} check\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    actions = options.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("list", help="what there is, with its Dice")
    actions.add_parser("cards", help="write the cards anew from what the weights' files say")
    for action, words in (
        ("export", "package the weights of a finished run, evaluated, with a card"),
        ("check", "measure packaged weights anew; status 1 unless Dice is the card's to 0.1 point"),
    ):
        one = actions.add_parser(action, help=words, description=words)
        if action == "export":
            one.add_argument("--run", required=True, help="name of the run in the results folder")
            one.add_argument("--name", required=True, help="of the weights, such as ours-4mm-cpu")
            one.add_argument("--results", default="", help="results folder")
        else:
            one.add_argument("names", nargs="*", help="all if none is given")
        one.add_argument("--cohort", default="brains", help="to evaluate on")
        one.add_argument("--data-root", default="", help="folder the JSON's paths are relative to; its own if empty")
        one.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
        one.add_argument("--quiet", action="store_true", help="no progress bars")
    return options


def main(arguments: list[str] | None = None, prog: str = "python -m lumirlib.weights") -> int:
    """List, export or check; exit status 0, 1 where a card is wrong, 2 for what cannot be used, 130 after Ctrl-C."""
    given = parser(prog).parse_args(arguments)
    try:
        if given.action == "list":
            for one in map(read_packaged, names()):
                dice = one.facts["figures"]["dice"]["mean"]
                print(f"{one.name}: {one.row.name}, {one.resolution_mm:g} mm, Dice {100 * dice:.2f} % on "
                      f"{one.facts['evaluation']['cohort_name']}; {FOLDER / one.name}.md")  # fmt: skip
            return 0
        if given.action == "cards":
            print(*write_cards(), sep="\n")
            return 0
        where = (given.cohort, given.data_root, given.device, not given.quiet)
        if given.action == "export":
            people = shlex.quote(provenance.without_folders(given.cohort))
            command = f"{prog} export --run {given.run} --name {given.name} --cohort {people}"
            print(export(given.run, given.name, given.results, *where, command))
            return 0
        if not (given.names or names()):
            raise ValueError("no weights are packaged")
        right = [check(name, *where) for name in given.names or names()]  # all of them, whatever the first says
        return 0 if all(right) else 1
    except (ValueError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was packaged", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
