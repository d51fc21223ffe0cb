"""Presets: resolution, width and length of a run, as data. The paper's own values stand in `PAPER`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

from lumirlib._checks import check_choice, check_option_types
from lumirlib.methods.base import PAPER, Preset, Row, Stage, check_options, option_names

#: A narrow network on voxels of 4 mm, which a CPU trains in minutes.
_COARSE = replace(
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
)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        replace(
            _COARSE,
            name="smoke",
            epochs=2,
            steps_per_epoch=4,
            channel_divisor=8,
            learning_rate=2e-3,
            validation_pairs=2,
            evaluation_pairs=3,
            about="does everything run? seconds, the figures mean nothing",
        ),
        _COARSE,
        # from coarse to fine, lengths in mm
        replace(
            PAPER,
            name="real-2mm",
            stages=(Stage(resolution_mm=4, epochs=12, window=20), Stage(resolution_mm=2, epochs=4, window=10)),
            channel_divisor=4,
            divide_heads=True,
            levels=5,
            learning_rate=1e-3,
            smoothness_weight=1.0,
            unit="mm",
            validation_pairs=10,
            validation_half=True,
            about="real brains from 4 mm to 2 mm on a CPU; about an hour",
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


#: What trials chose for a row at a preset, where that is not its own: a test holds it to `results/trials/equal.csv`
#: (docs/protocol.md, "Equal tuning").
TUNED: dict[str, dict[str, dict[str, float]]] = {
    "real-2mm": {
        "CA": {"smoothness_weight": 0.5},
        "CA+BF": {"smoothness_weight": 0.5},
        "LK": {"smoothness_weight": 0.5},
        "LC-1": {"learning_rate": 2e-3},
        "LC-2": {"learning_rate": 2e-3, "smoothness_weight": 0.5},
        "SynthMorph": {"learning_rate": 4e-3},
    }
}


def get_preset(name: str, **overrides: object) -> Preset:
    """The preset of a name, with options replaced where given; an unknown name fails with the choices listed."""
    check_choice(name, tuple(PRESETS), "preset")
    for option in overrides:
        if option not in PRESET_OPTIONS:
            raise ValueError(f"unknown option of preset {name!r}: {option}; choose from {', '.join(PRESET_OPTIONS)}")
    return with_options(PRESETS[name], overrides)


def with_options(preset: Preset, overrides: Mapping[str, object]) -> Preset:
    """The preset with options replaced.

    Raises:
        ValueError: a value of another type, or that no preset can have; an option that a stage sets, unless the stages
            are replaced too.
    """
    plain = {name: value for name, value in overrides.items() if name != "stages"}
    checked = check_option_types(PAPER, plain)
    if "stages" in overrides:
        checked["stages"] = overrides["stages"]
    else:
        for name in checked:
            if any(name in stage.options() for stage in preset.stages):
                raise ValueError(f"{name} of preset {preset.name!r} is set by its stages: set stages, got {name}")
    return replace(preset, **checked)


def split_options(
    preset: str, row: Row, options: Mapping[str, object], tuned: bool = True
) -> tuple[Preset, dict[str, object]]:
    """The preset of a name as a row trains with it, with those of `options` that are its own, and the row's, checked.

    Args:
        preset: Name of a preset.
        row: Row at its published width.
        options: Options of the preset and of the row.
        tuned: Whether what :data:`TUNED` says of the row goes before `options`.

    Raises:
        ValueError: an option that neither has, with the choices listed, or a value that does not fit.
    """
    own = option_names(row)
    if tuned:
        options = {**TUNED.get(preset, {}).get(row.base_row().name, {}), **options}
    known = list(dict.fromkeys([*own, *PRESET_OPTIONS]))
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"unknown option {', '.join(unknown)}: choose from {', '.join(known)}")
    for_row = check_options(row, {name: value for name, value in options.items() if name in own})
    overrides = {name: value for name, value in options.items() if name in PRESET_OPTIONS}
    adapted = replace(row, **for_row).training_preset(get_preset(preset))
    chosen = with_options(adapted, overrides)
    return replace(chosen, init=init_name(chosen.init)), for_row


def init_name(init: str) -> str:
    """What a preset says for an `init`: nothing for "random", and of a checkpoint's path the folder, its run's name."""
    return "" if init == "random" else Path(init).resolve().parent.name if init.endswith(".pt") else init
