"""What a row of Table 1 or 2 is: a frozen dataclass of options that says how its method is built and trained."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import accumulate, pairwise
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from lumirlib._checks import check_choice, check_option_types
from lumirlib.losses import PYRAMID_BLURS, SIMILARITIES

AnyRow = TypeVar("AnyRow", bound="Row")
#: From this voxel size on, presets are so short that published learning rates would not leave the start.
COARSE_MM = 4.0
#: Metadata of an option that came after the first runs: at its default it does not change a run's name.
ADDED_LATER = {"unnamed_at_default": True}

UNITS = ("voxels", "mm")


class Row:
    """Base of :class:`lumirlib.Variant` and of the methods in :mod:`lumirlib.methods`, which are frozen dataclasses.

    Attributes:
        name: Name in the tables.
        trains_on: Data of the training steps: "images", "labels" (label volumes instead of images), or "nothing": a
            method that is run as it is.
        optimizer: Name of the optimizer, "adam" or "muon", see :func:`lumirlib.training.trainer.make_optimizer`.
    """

    name: str
    trains_on: ClassVar[str] = "images"
    optimizer: str = "adam"

    def available(self) -> str:
        """Empty where the row can be run on this machine; else "not installed: " and the steps to install it."""
        return ""

    def at_preset(self: AnyRow, preset: Preset) -> AnyRow:
        """The row at a preset's width and resolution."""
        raise NotImplementedError

    def training_preset(self, preset: Preset) -> Preset:
        """The preset with this method's own learning rate and weights of losses; the number of steps stays."""
        return preset

    def on_finer_voxels(self: AnyRow, halvings: int) -> AnyRow:
        """The row on voxels whose edge is halved so many times, doubled where the number is negative.

        Its network stays, unless it has levels of a fixed size in mm.
        """
        return self

    def before_last_stage(self: AnyRow) -> AnyRow:
        """The row as the stages before a run's last train it."""
        return self

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
            model: Network from :meth:`build`.
            fixed: ``(1, 1, D, H, W)`` image in [0, 1], or integer labels where the row trains on labels.
            moving: Image or labels of the same shape.
            preset: Preset as :meth:`training_preset` gives it.
            generator: Generator on the CPU, seeded for this step, for all that is random in it.

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
            model: Network from :meth:`build`, with trained weights.
            preset: Preset as :meth:`training_preset` gives it.
        """
        return model

    def describe(self) -> str:
        """The options for a reader."""
        shown = {name.replace("_", " "): getattr(self, name) for name in option_names(self)}
        return ", ".join(f"{name} {value}" for name, value in shown.items()) or "no options"


class Baseline(Row):
    """A network of another team, retrained here with its own weights of the loss.

    Attributes:
        smoothness_weight: Weight of the smoothness, beside a similarity of weight 1.
        learning_rate_factor: Factor on the preset's learning rate, which is that of the paper's own network.
        coarse_learning_rate_factor: The same factor for presets that train at :data:`COARSE_MM` or more, a few hundred
            steps.
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
        factor = self.coarse_learning_rate_factor if preset.is_coarse else self.learning_rate_factor
        scaled = preset.with_learning_rate_times(factor)
        return replace(
            scaled,
            similarity_weight=1.0,
            smoothness_weight=self.smoothness_weight,
            stages=tuple(replace(stage, smoothness_weight=None) for stage in scaled.stages),
        )


class Tool(Row):
    """A program or algorithm that is run as it is, itself ``method(fixed, moving) -> displacement``.

    Attributes:
        resolution_mm: Edge of the voxels that it is given, in mm.
        natural_resolution_mm: Edge of the voxels, in mm, for presets with stages, whose resolutions are those of a
            training.
    """

    trains_on: ClassVar[str] = "nothing"
    natural_resolution_mm: ClassVar[float] = 1.0
    resolution_mm: float

    def training_preset(self, preset: Preset) -> Preset:
        """The preset; one with stages at the row's natural resolution, without them."""
        if not preset.stages:
            return preset
        return replace(preset, stages=(), epochs=1, resolution_mm=self.natural_resolution_mm)

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
class Stage:
    """One stage of a training from coarse to fine; an option that is None is the preset's.

    Attributes:
        resolution_mm: Edge of the voxels, in mm.
        epochs: Passes over the training scans.
        steps_per_epoch: Largest number of pairs in each pass.
        learning_rate: Initial learning rate; it falls over this stage's epochs.
        smoothness_weight: Weight lambda1 of the smoothness.
        window: Side of the NCC window, in the preset's unit.
    """

    resolution_mm: float
    epochs: int
    steps_per_epoch: int | None = None
    learning_rate: float | None = None
    smoothness_weight: float | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            whole = name in ("epochs", "steps_per_epoch", "window")
            if value is None and name not in ("resolution_mm", "epochs"):
                continue
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                kind = "a whole number" if whole else "a number"
                raise ValueError(f"{name} of a stage must be {kind}, got {value!r}")
            object.__setattr__(self, name, value if whole else float(value))

    def options(self) -> dict[str, float]:
        """What it sets, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def describe(self) -> str:
        """What it sets, in words."""
        own = {name.replace("_", " "): value for name, value in self.options().items()}
        words = f"{own.pop('epochs')} epochs at {own.pop('resolution mm'):g} mm"
        return ", ".join([words, *(f"{name} {value:g}" for name, value in own.items())])


STAGE_OPTIONS = tuple(option.name for option in fields(Stage))


def as_stage(given: object) -> Stage:
    """A stage from a mapping of its options, as files and command lines have it.

    Raises:
        ValueError: anything else.
    """
    if isinstance(given, Stage):
        return given
    required = {"resolution_mm", "epochs"}
    if not isinstance(given, Mapping) or not required <= given.keys() <= set(STAGE_OPTIONS):
        raise ValueError(
            f"a stage must have resolution_mm and epochs, and may have {', '.join(STAGE_OPTIONS[2:])}; got {given!r}"
        )
    return Stage(**given)


@dataclass(frozen=True)
class Preset:
    """How a variant is trained and evaluated.

    Attributes:
        name: Name of the preset.
        resolution_mm: Edge of the voxels worked on, in mm; with stages that of the last stage.
        epochs: Passes in which each training scan is the moving image once, a random other one the fixed image; with
            stages those of all stages together.
        steps_per_epoch: Number of pairs after which each pass stops; None takes all scans.
        channel_divisor: Divisor of the variant's start channels (32, 36, 64 become 8, 9, 16 for 4).
        levels: Pyramid levels; with stages those of the last stage, a coarser one has one less per doubling of the
            voxel.
        learning_rate: Initial learning rate of the optimizer; falls as ``(1 - epoch / epochs) ** decay_power``.
        decay_power: Exponent of the learning rate's fall.
        amsgrad: Whether Adam is run in its AMSGrad form.
        similarity_weight: Weight lambda0 of the similarity.
        smoothness_weight: Weight lambda1 of the smoothness, on velocities in voxels of the working resolution.
        window: Side of the NCC window, in `unit`; odd if that is voxels.
        similarity: Name of the similarity, "ncc" or "mse".
        validation_pairs: Number of pairs, spread evenly over the list, that measure each epoch's Dice; None takes all.
        evaluation_pairs: Number of pairs, spread evenly over the list, that the final evaluation takes; None takes all.
        about: One line for the reader: the preset's purpose.
        batch_size: Pairs per optimizer step, over all processes. An epoch's last batch is filled up with further pairs.
        init: Weights that training starts from, see :func:`lumirlib.training.weights.starting_weights`; empty for
            random ones.
        divide_heads: Whether `channel_divisor` divides the variant's head channels too (27 and 108 become 7 and 27 for
            4).
        pyramid_blur: Blur of the images between two levels of the loss, one of :data:`lumirlib.losses.PYRAMID_BLURS`.
        unit: "voxels" of the working resolution, or "mm": unit of the NCC window, of the variant's bilateral filter,
            and of the lengths that its consistency losses weigh (see :attr:`lumirlib.Variant.voxel_mm`).
        stages: Stages of a training from coarse to fine; empty for one at `resolution_mm`. Weights pass from one to the
            next, see :func:`lumirlib.training.weights.to_finer_levels`.
        validation_half: Whether `validation_pairs` are taken from the pairs of the first half of the people alone, see
            :func:`lumirlib.training.pairs.of_first_half`; the other half then chooses no epoch. All pairs where the
            first half has none, as with three people.
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
    divide_heads: bool = field(default=False, metadata=ADDED_LATER)
    pyramid_blur: str = field(default="isotropic", metadata=ADDED_LATER)
    unit: str = field(default="voxels", metadata=ADDED_LATER)
    stages: tuple[Stage, ...] = field(default=(), metadata=ADDED_LATER)
    validation_half: bool = field(default=False, metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        if not isinstance(self.stages, (list, tuple)):
            raise ValueError(f"stages of preset {self.name!r} must be a list, got {self.stages!r}")
        object.__setattr__(self, "stages", tuple(map(as_stage, self.stages)))
        if self.stages:
            object.__setattr__(self, "epochs", sum(stage.epochs for stage in self.stages))
            object.__setattr__(self, "resolution_mm", float(self.stages[-1].resolution_mm))
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
        if self.window < 1 or (self.unit == "voxels" and self.window % 2 == 0):
            raise ValueError(f"window of preset {self.name!r} must be odd and positive, got {self.window}")
        check_choice(self.similarity, SIMILARITIES, f"similarity of preset {self.name!r}")
        check_choice(self.pyramid_blur, tuple(PYRAMID_BLURS), f"pyramid_blur of preset {self.name!r}")
        check_choice(self.unit, UNITS, f"unit of preset {self.name!r}")
        for before, after in pairwise(self.stages):
            if halvings(before.resolution_mm, after.resolution_mm) < 0:
                raise ValueError(
                    f"stages of preset {self.name!r} must go from coarse to fine, got {before.resolution_mm:g} mm "
                    f"before {after.resolution_mm:g} mm"
                )
        for stage in range(len(self.stages)):
            self.at_stage(stage)  # values that no preset can have

    def at_stage(self, stage: int) -> Preset:
        """The training of one stage, as a preset without stages; the preset itself where it has none.

        Args:
            stage: Number of the stage, from 0; -1 is the last, which the finished network is used at.
        """
        if not self.stages:
            return self
        chosen = self.stages[stage]
        levels = self.levels - halvings(chosen.resolution_mm, self.resolution_mm)
        return replace(self, stages=(), levels=levels, **chosen.options())

    @property
    def each_stage(self) -> tuple[Preset, ...]:
        """The training of every stage, as :meth:`at_stage` gives it."""
        return tuple(map(self.at_stage, range(max(1, len(self.stages)))))

    @property
    def ends(self) -> tuple[int, ...]:
        """Epochs, counted through all stages, after which each one is complete."""
        return tuple(accumulate(stage.epochs for stage in self.each_stage))

    @property
    def is_coarse(self) -> bool:
        """Whether some of it is at :data:`COARSE_MM` or more."""
        return max(stage.resolution_mm for stage in self.each_stage) >= COARSE_MM

    @property
    def window_voxels(self) -> int:
        """Side of the NCC window in voxels: of one in mm the nearest odd number, at least 3."""
        if self.unit == "voxels":
            return self.window
        return max(3, nearest_odd(self.window / self.resolution_mm))

    def with_learning_rate_times(self, factor: float) -> Preset:
        """The preset with the learning rate of every stage times a factor."""
        stages = tuple(
            stage if stage.learning_rate is None else replace(stage, learning_rate=stage.learning_rate * factor)
            for stage in self.stages
        )
        return replace(self, learning_rate=self.learning_rate * factor, stages=stages)

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
            "divide_heads": "head channels divided too",
            "levels": "{0} pyramid levels instead of {1}",
            "learning_rate": "learning rate {0:g} instead of {1:g}",
            "decay_power": "learning rate falls with the power {0:g} instead of {1:g}",
            "amsgrad": "amsgrad {0} instead of {1}",
            "similarity": "{0} instead of {1} as similarity",
            "similarity_weight": "lambda0 = {0:g} instead of {1:g}",
            "smoothness_weight": "lambda1 = {0:g} instead of {1:g}",
            "window": "NCC window {0} instead of {1} " + self.unit,
            "pyramid_blur": "images of the loss blurred as by the authors' code",
            "validation_pairs": "{0} pairs for each epoch's Dice",
            "validation_half": "they are of the first half of the people",
            "evaluation_pairs": "{0} pairs in the final evaluation",
        }
        found = [
            text.format(getattr(self, option), getattr(paper, option))
            for option, text in words.items()
            if getattr(self, option) != getattr(paper, option)
            and (option != "levels" or row is None or "levels" in own)
        ]
        return found + [f"stage {number}: {stage.describe()}" for number, stage in enumerate(self.stages, 1)]


def nearest_odd(length: float) -> int:
    """The odd number that is nearest, the larger one of two."""
    return 2 * math.floor(length / 2) + 1


def halvings(coarse_mm: float, fine_mm: float) -> int:
    """How often a voxel's edge is halved from one resolution to a finer one; negative to a coarser one.

    Raises:
        ValueError: resolutions whose ratio is no power of two, or that are no edges of a voxel.
    """
    for edge in (coarse_mm, fine_mm):
        if not 0 < edge < math.inf:
            raise ValueError(f"a resolution must be the edge of a voxel in mm, above 0, got {edge:g}")
    found = math.log2(coarse_mm / fine_mm)
    if abs(found - round(found)) > 1e-3:
        raise ValueError(f"resolutions must differ by powers of two, got {coarse_mm:g} mm and {fine_mm:g} mm")
    return round(found)


#: The paper: 200 epochs, Adam 4e-4, lambda 1 and 6, batch 1, at 1 mm (amsgrad, decay and window: see DEVIATIONS.md).
PAPER = Preset(name="paper", resolution_mm=1, epochs=200, about="LUMIR as in the paper; days on one GPU")
