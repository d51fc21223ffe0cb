"""Stopping at a loss or gradient that is not finite."""

from __future__ import annotations

import math

import torch
from torch import nn

from lumirlib import losses
from lumirlib.methods.base import Preset, Row
from lumirlib.methods.variants import Variant


class NonFiniteLossError(RuntimeError):
    """A loss or a gradient became NaN or infinite.

    The message names the step, the pair, the level and the file with the batch.
    """


@torch.no_grad()
def first_non_finite(row: Row, model: nn.Module, fixed: torch.Tensor, moving: torch.Tensor, preset: Preset) -> str:
    """Where the loss of one pair is first not finite, from the coarsest level: "the similarity of level 2".

    Args:
        row: Row that `model` was built from.
        model: Network of the row.
        fixed: Fixed image, ``(1, 1, D, H, W)``.
        moving: Moving image, ``(1, 1, D, H, W)``.
        preset: Preset as for :meth:`lumirlib.methods.base.Row.loss_terms`.

    Returns:
        Empty where all is finite, or the row is no variant of the paper's network.
    """
    if not isinstance(row, Variant):
        return ""
    predicted = model.fields(fixed, moving)
    shapes = [tuple(field.shape[2:]) for field in predicted.displacements[:: row.passes]]
    images = [losses.gaussian_pyramid(image, shapes, preset.pyramid_blur) for image in (moving, fixed)]
    for entry in reversed(range(len(predicted.velocities))):
        level = entry // row.passes
        velocity, displacement = predicted.velocities[entry], predicted.displacements[entry]
        for name, values in (("velocity", velocity), ("displacement", displacement)):
            if not values.isfinite().all():
                return f"the {name} of level {level}"
        terms = losses.registration_loss(
            *(pyramid[level] for pyramid in images),
            [displacement],
            [velocity],
            window=preset.window_voxels,
            similarity=preset.similarity,
        )
        for name in ("similarity", "smoothness"):
            if not terms[name].isfinite():
                return f"the {name} of level {level}"
    return ""


def what_is_not_finite(
    row: Row, model: nn.Module, fixed: torch.Tensor, moving: torch.Tensor, preset: Preset, loss: float
) -> str:
    """What went wrong in a step, as the beginning of a sentence.

    Args:
        row: Row that `model` was built from.
        model: Network of the row, with the gradients of the step.
        fixed: Fixed images of the step, ``(B, 1, D, H, W)``.
        moving: Moving images of the step, ``(B, 1, D, H, W)``.
        preset: Preset as for :meth:`lumirlib.methods.base.Row.loss_terms`.
        loss: Loss of the step; where it is finite, a gradient is not.
    """
    if math.isfinite(loss):
        lengths = {
            name: parameter.grad.norm() for name, parameter in model.named_parameters() if parameter.grad is not None
        }
        broken = [name for name, length in lengths.items() if not length.isfinite()]
        if not broken and not torch.stack(list(lengths.values())).norm().isfinite():
            broken = [max(lengths, key=lengths.__getitem__)]  # all are numbers, and too large together
        return f"the gradient of {', '.join(broken) or 'another process'} is not finite"
    for one in zip(fixed.split(1), moving.split(1), strict=True):
        where = first_non_finite(row, model, *one, preset)
        if where:
            return f"the loss became {loss} (first in {where})"
    return f"the loss became {loss}"
