"""The methods of Table 1, one file each: every one is ``method(fixed, moving) -> displacement``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from lumirlib.methods.base import Row, check_options
from lumirlib.methods.classical import CLASSICAL
from lumirlib.methods.deeds import Deeds
from lumirlib.methods.gradicon import GradICON
from lumirlib.methods.released import RELEASED
from lumirlib.methods.synthmorph import SynthMorph
from lumirlib.methods.transmorph import TransMorph
from lumirlib.methods.variants import Variant, parse_variant
from lumirlib.methods.voxelmorph import VoxelMorph

#: Rows that are not variants of the paper's network, by name.
BASELINES: dict[str, type[Row]] = {
    **{row.name: row for row in (TransMorph, GradICON, SynthMorph, VoxelMorph, Deeds)},
    **RELEASED,
    **CLASSICAL,
}


def parse_row(name: str, **overrides: object) -> Row:
    """The row that a name stands for: a method of :data:`BASELINES`, or a variant of the paper's network.

    Args:
        name: Name of a baseline, or of a variant as :func:`lumirlib.parse_variant` takes it; case does not matter.
        overrides: Options of the row to set besides.

    Raises:
        ValueError: an unknown name or option, with the choices listed.
    """
    known = {baseline.lower(): baseline for baseline in BASELINES}
    baseline = known.get(str(name).strip().lower())
    if baseline is not None:
        row = BASELINES[baseline]()
        return replace(row, **check_options(row, overrides))
    try:
        return parse_variant(name, **overrides)
    except ValueError as error:
        if "unknown variant" not in str(error):
            raise
        raise ValueError(f"{error}, nor a method: {', '.join(BASELINES)}") from None


#: Options that the paper's network had once, and what they were where they were not used.
RETIRED: dict[str, object] = {
    "correlation_window": 0,
    "correlation_mode": "channels",
    "symmetric": False,
    "inverse_consistency_weight": 0.0,
    "group_weight": 0.0,
    "intensity_probability": 0.0,
}


def row_from_options(options: Mapping[str, Any]) -> Row:
    """The row that a checkpoint or a results file describes by all its options, its name among them.

    :data:`RETIRED` options are left out where they were not used.

    Raises:
        KeyError, ValueError: no name, an option that the row has not, or a value of another type.
    """
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    kind = BASELINES.get(str(given["name"]), Variant)
    row = kind(name=str(given.pop("name")))
    if kind is Variant:
        given = {name: value for name, value in given.items() if value != RETIRED.get(name, ...)}
    return replace(row, **check_options(row, given))


def availability() -> pd.DataFrame:
    """Which of the released models and classical tools this machine can run: columns row, state."""
    states = {name: BASELINES[name]().available() or "installed" for name in (*RELEASED, *CLASSICAL)}
    return pd.DataFrame({"row": list(states), "state": list(states.values())})
