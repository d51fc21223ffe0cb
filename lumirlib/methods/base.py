"""What a row of Table 1 or 2 is: a frozen dataclass of options that says how its method is built and trained."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from lumirlib._checks import check_choice, check_option_types
from lumirlib.losses import SIMILARITIES

AnyRow = TypeVar("AnyRow", bound="Row")
#: From this voxel size on, presets are so short that published learning rates would not leave the start.
COARSE_MM = 4.0
#: Metadata of an option that came after the first runs: at its default it does not change a run's name.
ADDED_LATER = {"unnamed_at_default": True}


class Row:
    """Base of :class:`lumirlib.Variant` and of the methods in :mod:`lumirlib.methods`, which are frozen dataclasses.

    Attributes:
        name: as the table has it.
        trains_on: "images", "labels" (then training steps get label volumes instead of images), or "nothing": a
            method that is run as it is.
        optimizer: "adam" or "muon", see :func:`lumirlib.training.trainer.make_optimizer`.
    """

    name: str
    trains_on: ClassVar[str] = "images"
    optimizer: str = "adam"

    @property
    def trains_on_triplets(self) -> bool:
        """Whether each pair of a training step gets a third scan, see :func:`lumirlib.training.pairs.with_third`."""
        return False

    def available(self) -> str:
        """Empty where the row can be run on this machine; else "not installed: " and the steps to install it."""
        return ""

    def at_preset(self: AnyRow, preset: Preset) -> AnyRow:
        """The row at a preset's width and resolution."""
        raise NotImplementedError

    def training_preset(self, preset: Preset) -> Preset:
        """The preset with this method's own learning rate and weights of losses; the number of steps stays."""
        return preset

    def build(self) -> nn.Module:
        """The network with fresh weights (seed with ``torch.manual_seed``): ``model(fixed, moving) -> displacement``.

        A row that trains on nothing gives what it is run by, a callable of the same form.
        """
        raise NotImplementedError

    def loss_terms(
        self, model: nn.Module, fixed: torch.Tensor, moving: torch.Tensor, preset: Preset, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Loss of one training step.

        Args:
            model: from :meth:`build`.
            fixed: ``(1, 1, D, H, W)`` image in [0, 1], or integer labels where the row trains on labels. For a row with
                `trains_on_triplets` ``(2, 1, D, H, W)``: the images B and C of a triplet A, B, C.
            moving: likewise; the images A and B of a triplet.
            preset: as :meth:`adapt` gives it.
            generator: on the CPU, seeded for this step, for all that is random in it.

        Returns:
            "total" (has gradients), "similarity" and "smoothness"; further terms of it are logged.
        """
        raise NotImplementedError

    def base_row(self: AnyRow) -> AnyRow:
        """The row whose training gives this one its weights: itself, unless it only changes how they are used."""
        return self

    def as_method(self, model: nn.Module, preset: Preset) -> nn.Module:
        """What registers pairs with a trained network: itself, unless something is done behind it.

        Args:
            model: from :meth:`build`, with trained weights.
            preset: as :meth:`adapt` gives it.
        """
        return model

    def describe(self) -> str:
        """The options for a reader."""
        shown = {name.replace("_", " "): getattr(self, name) for name in option_names(self)}
        return ", ".join(f"{name} {value}" for name, value in shown.items()) or "no options"


class Baseline(Row):
    """A network of another team, retrained here with its own weights of the loss.

    Attributes:
        smoothness_weight: beside a similarity of weight 1.
        learning_rate_factor: times the preset's learning rate, which is that of the paper's own network.
        coarse_learning_rate_factor: the same for presets at :data:`COARSE_MM` or more, a few hundred steps long.
    """

    smoothness_weight: float
    learning_rate_factor: float
    coarse_learning_rate_factor: float

    def narrowed(self: AnyRow, divisor: int) -> AnyRow:
        """The row with its widths divided."""
        raise NotImplementedError

    def at_preset(self: AnyRow, preset: Preset) -> AnyRow:
        """The row at a preset's width."""
        return self.narrowed(preset.channel_divisor)

    def training_preset(self, preset: Preset) -> Preset:
        """The preset with this row's weights of the loss and its learning rate; the number of steps stays."""
        coarse = preset.resolution_mm >= COARSE_MM
        factor = self.coarse_learning_rate_factor if coarse else self.learning_rate_factor
        return replace(
            preset,
            similarity_weight=1.0,
            smoothness_weight=self.smoothness_weight,
            learning_rate=preset.learning_rate * factor,
        )


class Tool(Row):
    """A program or algorithm that is run as it is, itself ``method(fixed, moving) -> displacement``.

    Attributes:
        resolution_mm: edge of the voxels that it is given.
    """

    trains_on: ClassVar[str] = "nothing"
    resolution_mm: float

    def at_preset(self: AnyRow, preset: Preset) -> AnyRow:
        """The row for voxels of a preset's size."""
        return replace(self, resolution_mm=preset.resolution_mm)

    def build(self: AnyRow) -> AnyRow:
        """The row itself."""
        return self


def option_names(row: Row) -> tuple[str, ...]:
    """The options of a row, all fields but its name."""
    return tuple(option.name for option in fields(row) if option.name != "name")  # type: ignore[arg-type]


def check_options(row: Row, overrides: Mapping[str, Any]) -> dict[str, object]:
    """`overrides` ready for ``replace(row, …)``; ValueError, with the choices, unless all are options of its types."""
    known = option_names(row)
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise ValueError(f"unknown option {', '.join(unknown)} of {row.name!r}: choose from {', '.join(known)}")
    checked = check_option_types(row, overrides)
    replace(row, **checked)  # values that the row itself refuses
    return checked


def file_name(name: str) -> str:
    """A row's name in names of files: "CA+BF" as "CA-BF", "SynthMorph (released)" as "SynthMorph-released"."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-")


@dataclass(frozen=True)
class Preset:
    """How a variant is trained and evaluated.

    Attributes:
        name: of the preset.
        resolution_mm: voxel size that is worked at.
        epochs: passes in which each training scan is the moving image once, a random other one the fixed image.
        steps_per_epoch: stop each pass after so many pairs; None takes all scans.
        channel_divisor: the variant's start channels are divided by this (32, 36, 64 become 8, 9, 16 for 4).
        levels: pyramid levels.
        learning_rate: initial one of Adam; falls as ``(1 - epoch / epochs) ** decay_power``.
        decay_power: of that fall.
        amsgrad: of Adam.
        similarity_weight: lambda0.
        smoothness_weight: lambda1, on velocities in voxels of the working resolution.
        window: NCC window in voxels, odd.
        similarity: "ncc" or "mse".
        validation_pairs: how many pairs, spread evenly over the list, measure each epoch's Dice; None takes all.
        evaluation_pairs: how many pairs the final evaluation takes, likewise; None takes all.
        about: one line for the reader: what it is for.
        batch_size: pairs per optimizer step, over all processes. An epoch's last batch is filled up with further pairs.
        init: weights that training starts from, see :func:`lumirlib.training.weights.starting_weights`; empty for
            random ones.
    """

    name: str
    resolution_mm: float
    epochs: int
    steps_per_epoch: int | None = None
    channel_divisor: int = 1
    levels: int = 5
    learning_rate: float = 4e-4
    decay_power: float = 0.9
    amsgrad: bool = True
    similarity_weight: float = 1.0
    smoothness_weight: float = 6.0
    window: int = 9
    similarity: str = "ncc"
    validation_pairs: int | None = None
    evaluation_pairs: int | None = None
    about: str = ""
    batch_size: int = field(default=1, metadata=ADDED_LATER)
    init: str = field(default="", metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        for option in (
            "epochs",
            "steps_per_epoch",
            "channel_divisor",
            "levels",
            "validation_pairs",
            "evaluation_pairs",
            "batch_size",
        ):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ValueError(f"{option} of preset {self.name!r} must be 1 or more, got {value}")
        for option in ("resolution_mm", "learning_rate"):
            if not 0 < getattr(self, option) < math.inf:
                raise ValueError(f"{option} of preset {self.name!r} must be above 0, got {getattr(self, option)}")
        for option in ("similarity_weight", "smoothness_weight", "decay_power"):
            if not 0 <= getattr(self, option) < math.inf:
                raise ValueError(f"{option} of preset {self.name!r} must be 0 or more, got {getattr(self, option)}")
        if self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"window of preset {self.name!r} must be odd and positive, got {self.window}")
        check_choice(self.similarity, SIMILARITIES, f"similarity of preset {self.name!r}")

    def apply(self, row: AnyRow) -> AnyRow:
        """The row at this preset's width, depth and resolution."""
        return row.at_preset(self)

    def differences_from_paper(self, row: Row | None = None) -> list[str]:
        """What this preset changes about the paper's training, or a row's own at the paper's length, in words."""
        paper = PAPER if row is None else row.training_preset(PAPER)
        own = () if row is None else option_names(row)
        words = {
            "resolution_mm": "voxels of {0:g} mm instead of 1 mm",
            "epochs": "{0} epochs instead of {1}",
            "steps_per_epoch": "at most {0} pairs an epoch",
            "batch_size": "batches of {0} pairs instead of {1}",
            "init": "started from the weights {0}",
            "channel_divisor": "widths divided by {0}",
            "levels": "{0} pyramid levels instead of {1}",
            "learning_rate": "learning rate {0:g} instead of {1:g}",
            "decay_power": "learning rate falls with the power {0:g} instead of {1:g}",
            "amsgrad": "amsgrad {0} instead of {1}",
            "similarity": "{0} instead of {1} as similarity",
            "similarity_weight": "lambda0 = {0:g} instead of {1:g}",
            "smoothness_weight": "lambda1 = {0:g} instead of {1:g}",
            "window": "NCC window {0} instead of {1} voxels",
            "validation_pairs": "{0} pairs for each epoch's Dice",
            "evaluation_pairs": "{0} pairs in the final evaluation",
        }
        return [
            text.format(getattr(self, option), getattr(paper, option))
            for option, text in words.items()
            if getattr(self, option) != getattr(paper, option)
            and (option != "levels" or row is None or "levels" in own)
        ]


#: The paper: 200 epochs, Adam 4e-4, lambda 1 and 6, batch 1, at 1 mm (amsgrad, decay and window: see DEVIATIONS.md).
PAPER = Preset(name="paper", resolution_mm=1, epochs=200, about="LUMIR as in the paper; days on one GPU")
