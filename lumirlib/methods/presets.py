"""Presets: resolution, width and length of a run, as data. The paper's own values stand in `PAPER`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

from lumirlib._checks import check_choice, check_option_types
from lumirlib.methods.base import PAPER, Preset, Row, check_options, option_names

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        replace(
            PAPER,
            name="smoke",
            resolution_mm=4,
            epochs=2,
            steps_per_epoch=4,
            channel_divisor=8,
            levels=4,
            learning_rate=2e-3,
            smoothness_weight=1.0,
            window=5,
            validation_pairs=2,
            evaluation_pairs=3,
            about="does everything run? seconds, the figures mean nothing",
        ),
        replace(
            PAPER,
            name="demo",
            resolution_mm=4,
            epochs=8,
            channel_divisor=4,
            levels=4,
            learning_rate=1e-3,
            smoothness_weight=1.0,
            window=5,
            validation_pairs=10,
            about="the default: minutes on a 2-core laptop, narrow network, coarse voxels",
        ),
        replace(
            PAPER,
            name="real-cpu",
            resolution_mm=4,
            epochs=12,
            channel_divisor=4,
            levels=4,
            learning_rate=1e-3,
            smoothness_weight=1.0,
            window=5,
            validation_pairs=10,
            about="real brains at 4 mm on a CPU; about a quarter of an hour",
        ),
        replace(
            PAPER,
            name="half",
            resolution_mm=2,
            epochs=100,
            smoothness_weight=3.0,
            about="2 mm, the paper's width; for a GPU",
        ),
        replace(PAPER, name="full", resolution_mm=1, epochs=100, about="1 mm, the paper's width; for a GPU"),
        PAPER,
    )
}

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
    adapted = replace(row, **for_row).training_preset(get_preset(preset))
    checked = check_option_types(PAPER, overrides)
    if "init" in checked:
        checked["init"] = init_name(checked["init"])
    return replace(adapted, **checked), for_row


def init_name(init: str) -> str:
    """What a preset says for an `init`: nothing for "random", and of a checkpoint's path the folder, its run's name."""
    return "" if init == "random" else Path(init).resolve().parent.name if init.endswith(".pt") else init
