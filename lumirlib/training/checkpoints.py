"""Checkpoints: tensors and plain values in the zip that ``torch.save`` writes, and a reader that trusts none of it.

PyTorch compares no checksum of what it loads, so that a flipped bit would be read as another weight; here all are
compared first. Nothing is unpickled but tensors and plain values, and what they form is checked before it is used.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from lumirlib.files import write_atomically
from lumirlib.methods import row_from_options
from lumirlib.methods.base import Row, option_names
from lumirlib.training.muon import MUON_STATE

CHECKPOINT_FORMAT = "lumirlib-checkpoint-1"
#: Widths, levels and the like of a network are at most this, so that a file cannot ask for one that fills the memory.
MAX_OPTION = 4096
#: What a run's history has of every epoch, at least.
HISTORY_COLUMNS = {"epoch", "steps", "val_dice", "val_similarity", "val_ndv_percent"}
#: What Adam keeps of a parameter, at least.
ADAM_STATE = {"step", "exp_avg", "exp_avg_sq"}


@dataclass
class TrainingState:
    """Where a run stands.

    Attributes:
        epoch: Number of epochs completed.
        step: Number of steps completed within the epoch under way.
        best: Best validation figure so far (see :func:`lumirlib.training.validation.validate`).
        best_epoch: Epoch that reached it.
        sums: Running sums of the epoch under way.
        trained_by: Commit and device, as "commit, device", of every session that took part.
        history: One row per completed epoch, as in the CSV log; epoch 0 is zero displacement.
    """

    epoch: int = 0
    step: int = 0
    best: float = -math.inf
    best_epoch: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    trained_by: list[str] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)


def save_checkpoint(path: Path, content: dict) -> None:
    """Write a checkpoint atomically; a disk that is full leaves the previous one as it was.

    Raises:
        OSError: it cannot be written.
    """
    try:
        write_atomically(path, lambda to: torch.save({"format": CHECKPOINT_FORMAT, **content}, to))
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter for a full disk
        kept = "; the one before it is kept" if path.exists() else ""
        raise OSError(f"cannot write the checkpoint {path} (disk full?): {error}{kept}") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint (tensors and plain values only, no pickled code), onto the CPU.

    Returns:
        At least "config", the plain values of :class:`lumirlib.training.config.RunConfig`, and "model", its weights.

    Raises:
        FileNotFoundError: no such file.
        ValueError: torn, damaged, or not written by this package.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    try:
        stored = _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile raise many types for a torn or foreign file
        raise ValueError(f"cannot read {path} as a checkpoint (torn or foreign?): {error}") from error
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this package: expected format {CHECKPOINT_FORMAT!r}")
    check_schema(path, content, stored)
    return content


def _check_archive(path: Path) -> int:
    """Raise unless every checksum fits; the bytes that tensors can have at most."""
    with zipfile.ZipFile(path) as archive:
        packed = [one.filename for one in archive.infolist() if one.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise ValueError(f"expected no compressed parts, got {packed[:3]}")
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"its part {damaged} is damaged: the checksum is not the one it was written with")
        return sum(one.file_size for one in archive.infolist())


def _expect(path: str | Path, what: str, value: object, kind: type | tuple[type, ...]) -> Any:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join(one.__name__ for one in kinds)
        raise ValueError(f"{path}: {what} must be {names}, got {'nothing' if value is None else type(value).__name__}")
    return value


def _tensors(content: object) -> list[torch.Tensor]:
    """All tensors in nested lists and dicts, which may hold themselves."""
    found, left, seen = [], [content], set()
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (dict, list, tuple)):
            left += value.values() if isinstance(value, dict) else value
    return found


def check_schema(path: Path, content: dict[str, Any], stored: int) -> None:
    """Raise ValueError unless "config" and "model" have the form of a checkpoint's, in at most `stored` bytes."""
    tensors = _tensors(content)
    if any(not tensor.is_contiguous(memory_format=_format(tensor)) for tensor in tensors):
        raise ValueError(f"{path}: expected tensors that fill the memory they are stored in, got one that repeats it")
    sizes = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
    if sum(sizes.values()) > stored:
        raise ValueError(f"{path}: its tensors claim more than the {stored} bytes that are stored")
    config = _expect(path, "config", content.get("config"), dict)
    for name, kind in (("variant", dict), ("preset", dict), ("cohort", str), ("cohort_digest", str), ("seed", int)):
        _expect(path, f"config.{name}", config.get(name), kind)
    try:
        json.dumps(config)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: config must hold plain values only: {error}") from error
    for name, weight in _expect(path, "model", content.get("model"), dict).items():
        _expect(path, f"model.{name}", weight, torch.Tensor)
        if not torch.isfinite(weight).all():
            raise ValueError(f"{path}: model.{name} must hold finite values only")


def _format(tensor: torch.Tensor) -> torch.memory_format:
    channels_last = tensor.ndim == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d)
    return torch.channels_last_3d if channels_last else torch.contiguous_format


def described_row(path: str | Path, content: Mapping[str, Any]) -> Row:
    """The row whose network a checkpoint holds.

    Raises:
        ValueError: options that no row has, or far beyond any that was ever trained.
    """
    try:
        row = row_from_options(content["config"]["variant"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: config.variant describes no row of this package: {error}") from error
    for name in option_names(row):
        values = getattr(row, name)
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, (int, float)) and not -MAX_OPTION <= value <= MAX_OPTION:
                raise ValueError(f"{path}: config.variant.{name} must be at most {MAX_OPTION}, got {value}")
    return row


def shapes_of(path: str | Path, row: Row) -> dict[str, torch.Tensor]:
    """The weights of a row's network, built without memory for them.

    Raises:
        ValueError: options that make no network.
    """
    try:
        with torch.device("meta"):
            return row.build().state_dict()
    except Exception as error:  # layers raise many types for options that they cannot be made of
        raise ValueError(f"{path}: config.variant describes no network: {error}") from error


def check_weights(path: str | Path, weights: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError unless weights have the names and shapes of a network's."""
    found, expected = ({name: tuple(one.shape) for name, one in group.items()} for group in (weights, wanted))
    wrong = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    if wrong:
        first = wrong[0]
        raise ValueError(
            f"{path}: weights do not fit the network: {len(wrong)} differ, {first} is {found.get(first, 'missing')} "
            f"instead of {expected.get(first, 'absent')}"
        )


def load_optimizer(path: str | Path, content: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Take over what an optimizer had accumulated; its rates stay those of the preset.

    Raises:
        ValueError: a state that is not one of this optimizer, Adam or Muon, for these parameters.
    """
    given = _expect(path, "optimizer", content.get("optimizer"), dict)
    states = _expect(path, "optimizer.state", given.get("state"), dict)
    parameters, kept = [], []
    for group in optimizer.param_groups:
        parameters += group["params"]
        kept += [MUON_STATE if group.get("orthogonalized") else ADAM_STATE] * len(group["params"])
    for index, state in states.items():
        whole = index in range(len(parameters)) and isinstance(state, dict) and state.keys() >= kept[index]
        if not whole or not all(
            isinstance(value, torch.Tensor) and value.shape in (parameters[index].shape, ()) and value.isfinite().all()
            for value in state.values()
        ):
            raise ValueError(f"{path}: optimizer.state[{index!r}] is not what the optimizer keeps of a parameter")
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def training_state(path: str | Path, content: Mapping[str, Any]) -> TrainingState:
    """Where the run of a last.pt stands.

    Raises:
        ValueError: values that are missing or that no run can have.
    """
    given = _expect(path, "state", content.get("state"), dict)
    names = [one.name for one in fields(TrainingState)]
    if given.keys() != set(names):
        raise ValueError(f"{path}: state must have {', '.join(names)}, got {', '.join(map(str, given))}")
    for name in names:
        kind = type(getattr(TrainingState(), name))
        _expect(path, f"state.{name}", given[name], (int, float) if kind is float else kind)
    state = TrainingState(**given)
    if not (0 <= state.best_epoch <= state.epoch and state.step >= 0):
        raise ValueError(f"{path}: no run can stand at epoch {state.epoch}, step {state.step}, best {state.best_epoch}")
    if not all(isinstance(session, str) for session in state.trained_by):
        raise ValueError(f"{path}: state.trained_by must hold text only")
    numbers = [*state.history, state.sums]
    if not all(isinstance(row, dict) and all(type(value) in (int, float) for value in row.values()) for row in numbers):
        raise ValueError(f"{path}: state.history and state.sums must hold numbers by name")
    if not all(row.keys() >= HISTORY_COLUMNS for row in state.history):
        raise ValueError(f"{path}: state.history must have {', '.join(sorted(HISTORY_COLUMNS))} in each row")
    epochs = [row.get("epoch") for row in state.history]
    if epochs != list(range(len(epochs))) or (len(epochs) or 1) != state.epoch + 1:
        raise ValueError(f"{path}: state.history must have a row for each of {state.epoch} epochs and for none")
    return state
