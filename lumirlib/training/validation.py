"""The figures of an epoch, which choose the best one.

They are taken at the resolution that is trained at, which is cheap. Final figures are those of
:mod:`lumirlib.evaluation`.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn

from lumirlib import losses, metrics, spatial
from lumirlib.data import Cohort, Pair
from lumirlib.evaluation import Method
from lumirlib.methods.base import Preset
from lumirlib.training.engine import Engine
from lumirlib.training.pairs import evenly_spaced, of_first_half


def validation_pairs(cohort: Cohort, preset: Preset) -> tuple[Pair, ...]:
    """The pairs that measure each epoch: those with labels where there are any.

    With `validation_half` they are those of the first half of the people, if there is a pair among them.
    """
    pairs = cohort.labelled_pairs or cohort.validation_pairs
    if preset.validation_half:
        pairs = of_first_half(pairs) or pairs
    return evenly_spaced(pairs, preset.validation_pairs)


@torch.no_grad()
def _figures_of_pair(
    method: nn.Module | Method, cohort: Cohort, pair: Pair, device: torch.device, window: int, engine: Engine | None
) -> tuple[float, float, float]:
    """Dice (NaN without labels), similarity and NDV of one pair."""
    fixed, moving = cohort.image(pair.fixed).to(device), cohort.image(pair.moving).to(device)
    with engine.fabric.autocast() if engine else nullcontext():
        displacement = method(fixed, moving)
    similarity = 1 - float(losses.ncc_loss(spatial.warp(moving, displacement), fixed, window))
    folds = metrics.ndv_percent(displacement, moving > 0)
    if not (pair.fixed.labels and pair.moving.labels):
        return math.nan, similarity, folds
    moving_labels = cohort.label_volume(pair.moving).to(device)
    warped = spatial.warp(moving_labels, displacement, mode="nearest")
    fixed_labels = cohort.label_volume(pair.fixed).to(device)
    return metrics.dice(warped, fixed_labels, moving_labels, cohort.labels), similarity, folds


def validate(
    method: nn.Module | Method,
    cohort: Cohort,
    pairs: tuple[Pair, ...],
    device: torch.device,
    window: int,
    engine: Engine | None = None,
) -> dict[str, float]:
    """Figures of one epoch, each a mean over `pairs`.

    Args:
        method: Network or function.
        cohort: Cohort of the pairs.
        pairs: Pairs to take.
        device: Device to work on.
        window: Side of the NCC window, in voxels.
        engine: Engine whose precision is taken, and whose processes share the pairs; None for plain float32 and one
            process.

    Returns:
        "val_dice" (over the pairs that have labels in common, NaN if none has) and "val_similarity"
        (``1 - NCC loss``), higher is better, and "val_ndv_percent", masked by the moving image, lower is better.
    """
    was_training = isinstance(method, nn.Module) and method.training
    if was_training:
        method.eval()
    own = pairs[engine.rank :: engine.world_size] if engine else pairs
    found = [_figures_of_pair(method, cohort, pair, device, window, engine) for pair in own]
    dices, similarities, folds = zip(*(engine.gather(found) if engine else found), strict=True)
    if was_training:
        method.train()
    return {
        "val_dice": metrics.nan_mean(np.array(dices)),
        "val_similarity": float(np.mean(similarities)),
        "val_ndv_percent": float(np.mean(folds)),
    }
