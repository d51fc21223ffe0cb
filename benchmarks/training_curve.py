"""Training curves of the backbone: plain float32, fast float32 and bfloat16 against the noise between seeds.

    python benchmarks/training_curve.py        # demo size, some minutes on a CPU; goes on where it stopped

Each curve is the total loss over pairs of simulated people. Fast float32 and bfloat16 have the weights and pairs of
plain float32's seed 0; its further seeds draw others. A curve lies within seed noise if its distance from seed 0's, the
root mean square of the smoothed loss, is below the seeds' mean distance from each other.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import plain
import torch
from tqdm.auto import tqdm

from lumirlib import load_cohort, provenance
from lumirlib.files import write_json
from lumirlib.methods.presets import get_preset
from lumirlib.methods.variants import parse_variant
from lumirlib.models.layers import place
from lumirlib.training.engine import pick_device
from lumirlib.training.pairs import epoch_pairs
from lumirlib.training.trainer import make_optimizer

#: Steps that are averaged before curves are compared: every pair once.
SMOOTHED = 24


def curve(kind: str, seed: int, steps: int, device: torch.device) -> list[float]:
    """Total loss of each step.

    Args:
        kind: "plain float32", "fast float32" or "fast bfloat16".
        seed: of the weights and of the order of pairs.
        steps: how many.
        device: where.
    """
    preset = get_preset("demo")
    cohort, variant = load_cohort("embedded", preset.resolution_mm), preset.apply(parse_variant("backbone"))
    torch.manual_seed(seed)
    model = place(variant.build(), device, channels_last=kind != "plain float32")
    optimizer = make_optimizer(model, preset)
    found = []
    for pair in tqdm(epoch_pairs(cohort.train, seed, 0, steps), total=steps, desc=f"{kind}, seed {seed}", unit="step"):
        fixed, moving = (cohort.image(subject).to(device) for subject in (pair.fixed, pair.moving))
        if kind == "plain float32":
            loss = plain.loss(model, fixed, moving, preset.smoothness_weight, preset.window)
        else:
            with torch.autocast(device.type, torch.bfloat16, enabled=kind == "fast bfloat16"):
                loss = variant.loss_terms(model, fixed, moving, preset, torch.Generator())["total"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def smooth(losses: list[float]) -> np.ndarray:
    """Running mean."""
    window = min(SMOOTHED, len(losses))
    return np.convolve(losses, np.ones(window) / window, mode="valid")


def distance(first: list[float], second: list[float]) -> float:
    """Root mean square of the difference of two smoothed curves."""
    return float(np.sqrt(np.mean((smooth(first) - smooth(second)) ** 2)))


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Smoothed curves of all runs."""
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, losses in curves.items():
        seed_noise = name.startswith("plain") and not name.endswith("seed 0")
        ax.plot(smooth(losses), label=name, color="0.75" if seed_noise else None, zorder=1 if seed_noise else 2)
    ax.set(xlabel="step", ylabel=f"loss, mean of {SMOOTHED} steps", title="backbone, simulated people at 4 mm")
    ax.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=200, help="of each curve")
    options.add_argument("--seeds", type=int, default=3, help="of plain float32")
    options.add_argument("--device", default="auto", help="auto, cpu, cuda ...")
    options.add_argument("--out", default="", help="results folder")
    given = options.parse_args()
    device = pick_device(given.device)
    path = provenance.results_folder(given.out) / "benchmarks" / f"training_curve_{device.type}.json"
    about = {
        "command": f"python benchmarks/training_curve.py --steps {given.steps} --seeds {given.seeds}",
        "commit": provenance.commit(),
        "device": provenance.describe_device(device),
        "data": "simulated people, 4 mm",
        "versions": provenance.versions(),
    }
    curves: dict[str, list[float]] = {}
    if path.is_file():
        before = json.loads(path.read_text())
        if before["provenance"] == about:  # of another commit or machine nothing is taken over
            curves = before["curves"]
    runs = [("plain float32", 0), ("fast float32", 0), ("fast bfloat16", 0)]
    runs += [("plain float32", seed) for seed in range(1, given.seeds)]
    for kind, seed in runs:
        name = f"{kind}, seed {seed}"
        if name not in curves:
            curves[name] = curve(kind, seed, given.steps, device)
            write_json(path, {"provenance": about, "curves": curves})
    seeds = [curves[f"plain float32, seed {seed}"] for seed in range(given.seeds)]
    noise = float(np.mean([distance(a, b) for a, b in itertools.combinations(seeds, 2)]))
    found = {kind: distance(curves[f"{kind}, seed 0"], seeds[0]) for kind in ("fast float32", "fast bfloat16")}
    last = {name: float(smooth(losses)[-1]) for name, losses in curves.items()}
    summary = {"between_seeds": noise, "from_plain_seed_0": found, "last": last}
    write_json(path, {"provenance": about, "summary": summary, "curves": curves})
    draw(curves, path.with_suffix(".png"))
    print(json.dumps(summary, indent=1))
    print(path)


if __name__ == "__main__":
    main()
