"""Presets: resolution, width and length of a run, as data. The paper's own values stand in `PAPER`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from lumirlib._checks import check_choice, check_option_types
from lumirlib.losses import SIMILARITIES
from lumirlib.rows import ADDED_LATER, AnyRow, Row, check_options, option_names


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
        init: weights that training starts from, see :func:`lumirlib.weights.starting_weights`; empty for random ones.
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
        for option in ("epochs", "steps_per_epoch", "channel_divisor", "levels", "validation_pairs",
                       "evaluation_pairs", "batch_size"):  # fmt: skip
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
        return row.fitted(self)

    def differences_from_paper(self, row: Row | None = None) -> list[str]:
        """What this preset changes about the paper's training, or a row's own at the paper's length, in words."""
        paper = PAPER if row is None else row.adapt(PAPER)
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

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        replace(
            PAPER, name="smoke", resolution_mm=4, epochs=2, steps_per_epoch=4, channel_divisor=8, levels=4,
            learning_rate=2e-3, smoothness_weight=1.0, window=5, validation_pairs=2, evaluation_pairs=3,
            about="does everything run? seconds, the figures mean nothing",
        ),
        replace(
            PAPER, name="demo", resolution_mm=4, epochs=8, channel_divisor=4, levels=4, learning_rate=1e-3,
            smoothness_weight=1.0, window=5, validation_pairs=10,
            about="the default: minutes on a 2-core laptop, narrow network, coarse voxels",
        ),
        replace(
            PAPER, name="real-cpu", resolution_mm=4, epochs=12, channel_divisor=4, levels=4, learning_rate=1e-3,
            smoothness_weight=1.0, window=5, validation_pairs=10,
            about="real brains at 4 mm on a CPU; about a quarter of an hour",
        ),
        replace(
            PAPER, name="half", resolution_mm=2, epochs=100, smoothness_weight=3.0,
            about="2 mm, the paper's width; for a GPU",
        ),
        replace(PAPER, name="full", resolution_mm=1, epochs=100, about="1 mm, the paper's width; for a GPU"),
        PAPER,
    )
}  # fmt: skip


#: What can be overridden.
PRESET_OPTIONS = tuple(option.name for option in fields(Preset) if option.name not in ("name", "about"))


def get_preset(name: str, **overrides: object) -> Preset:
    """The preset of a name, with options replaced where given; an unknown name fails with the choices listed."""
    check_choice(name, tuple(PRESETS), "preset")
    for option in overrides:
        if option not in PRESET_OPTIONS:
            raise ValueError(f"unknown option of preset {name!r}: {option}; choose from {', '.join(PRESET_OPTIONS)}")
    return replace(PRESETS[name], **check_option_types(PAPER, overrides))


def split_options(preset: str, row: Row, options: Mapping[str, object]) -> tuple[Preset, dict[str, object]]:
    """The preset of a name as a row trains with it, with those of `options` that are its own, and the row's, checked.

    Raises:
        ValueError: an option that neither has, with the choices listed, or a value that does not fit.
    """
    own = option_names(row)
    known = list(dict.fromkeys([*own, *PRESET_OPTIONS]))
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"unknown option {', '.join(unknown)}: choose from {', '.join(known)}")
    for_row = check_options(row, {name: value for name, value in options.items() if name in own})
    overrides = {name: value for name, value in options.items() if name in PRESET_OPTIONS}
    adapted = replace(row, **for_row).adapt(get_preset(preset))
    checked = check_option_types(PAPER, overrides)
    if "init" in checked:
        checked["init"] = init_name(checked["init"])
    return replace(adapted, **checked), for_row


def init_name(init: str) -> str:
    """What a preset says for an `init`: nothing for "random", and of a checkpoint's path the folder, its run's name."""
    return "" if init == "random" else Path(init).resolve().parent.name if init.endswith(".pt") else init


def parse_setting(text: str, argument: str = "--set") -> tuple[str, object]:
    """Name and value of "name=value", as `argument` takes them; the value is JSON (a number, true ...), or text."""
    name, equals, value = text.partition("=")
    if not (name.strip() and equals):
        raise ValueError(f"{argument} takes name=value, got {text!r}")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value.strip()
