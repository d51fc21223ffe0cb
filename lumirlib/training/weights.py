"""Pretrained weights that the package carries: loaded, exported from a finished run with a model card, and checked.

    lumirlib weights list
    lumirlib weights export --run <run> --name ours-1mm
    lumirlib weights check

`pretrained_weights/<name>.safetensors` holds the weights and, as JSON in its metadata, the run's configuration and all
that the card says; the card, `<name>.md`, is made of that. Every number comes from files that runs wrote. Weights are
stored as they were trained; those that are for other voxels are passed on when they are read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from lumirlib._checks import check_choice
from lumirlib.files import parse_json
from lumirlib.methods.base import Row, halvings
from lumirlib.methods.contrast import for_contrast
from lumirlib.methods.variants import NetworkOptions, Variant
from lumirlib.models.backbone import RegistrationNetwork
from lumirlib.models.layers import place
from lumirlib.training.checkpoints import check_schema, check_weights, described_row, load_checkpoint, shapes_of
from lumirlib.training.config import RunConfig
from lumirlib.training.engine import pick_device

#: Of the packaged files.
FOLDER = Path(__file__).resolve().parent.parent / "pretrained_weights"

FORMAT = "lumirlib-weights-1"
#: All weights together, in bytes.
MAX_BYTES = 20_000_000

_NUMBER = (int, float)
#: Facts that a packaged file has about its weights, by name, and the types that each may have. The model card is made
#: of them.
FACTS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "license": (str,),
    "resolution_mm": _NUMBER,
    "words": (str,),
    "run": (str,),
    "method": (str,),
    "seed": (int,),
    "command": (str,),
    "trained_by": (list,),
    "parameters": (int,),
    "best_epoch": (int,),
    "val_dice": (*_NUMBER, type(None)),
    "trained_on": (str,),
    "credit": (str,),
    "cohort_name": (str,),
    "simulated": (bool,),
    "started_from": (str, type(None)),
    "preset": (str,),
    "batch_size": (int,),
    "differences": (list,),
    "epochs": (int,),
    "steps": (int,),
    "steps_of_best_epoch": (int,),
    "training_hours": _NUMBER,
    "evaluation": (dict,),
    "figures": (dict,),
}
#: Facts of the evaluation, likewise.
EVALUATION_FACTS: dict[str, tuple[type, ...]] = {
    "cohort_name": (str,),
    "cohort_digest": (str,),
    "evaluated_pairs": (int,),
    "scored_labels": (int,),
    "credit": (str,),
    "device": (str,),
    "memory_mib": (int,),
    "commit": (str,),
    "written": (str,),
    "command": (str,),
}
#: What is known of each metric over the pairs, likewise; every metric has a figure before registration beside it.
FIGURE: dict[str, tuple[type, ...]] = {"mean": _NUMBER, "std": _NUMBER, "pairs": (int,)}


@dataclass(frozen=True)
class Weights:
    """Trained weights, and what they are of.

    Attributes:
        name: Name of the packaged weights, or of the run.
        row: Row whose network they are of.
        resolution_mm: Edge of the voxels that they are for, in mm.
        config: Configuration of the run, as :meth:`lumirlib.training.config.RunConfig.as_dict` gives it.
        tensors: Tensors by name, on the CPU.
        facts: Facts that the card states; empty for those of a checkpoint.
    """

    name: str
    row: Row
    resolution_mm: float
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of names, shapes and values."""
        content = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            content.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        return content.hexdigest()[:16]

    @property
    def about(self) -> str:
        """Name and digest, for provenance."""
        return f"{self.name}, {self.digest}"

    def at_resolution(self, resolution_mm: float) -> Weights:
        """The same weights for other voxels, passed on by :func:`to_finer_levels`.

        Raises:
            ValueError: voxels so coarse that no level is left, or a resolution that halving or doubling voxels does not
                lead to.
        """
        finer = halvings(self.resolution_mm, resolution_mm)
        if not finer:
            return self
        return replace(
            self,
            name=f"{self.name} at {resolution_mm:g} mm",
            row=self.row.on_finer_voxels(finer),
            resolution_mm=float(resolution_mm),
            tensors=to_finer_levels(self.tensors, self.row, finer),
        )

    def network(self, device: str | torch.device = "auto") -> nn.Module:
        """The network with these weights, in evaluation mode, ready for ``model(fixed, moving)``."""
        model = to_device(self.row.build(), pick_device(str(device)))
        model.load_state_dict(self.tensors)
        if isinstance(model, RegistrationNetwork):
            trained_mm = float(self.config["preset"]["resolution_mm"])
            model.finer = 2 ** max(0, halvings(trained_mm, self.resolution_mm))
        return model.eval()


#: Options of a row that training does without, so that they can be set afterwards.
REGISTRATION = ("refinements", "unfolding")
#: Parts of the paper's network that every level has one of, all of one shape, and those that coarse levels have.
LEVEL_PARTS = ("estimators",)
COARSE_LEVEL_PARTS = ("co_attention",)
#: What weights without FORCE lack; at zero the network computes what it did.
FORCE_PART = "of_forces"


def to_finer_levels(tensors: Mapping[str, torch.Tensor], row: Row, halvings: int = 1) -> dict[str, torch.Tensor]:
    """Weights of a network for ``row.on_finer_voxels(halvings)``: a level keeps its millimetres.

    In the paper's network level l becomes level ``l + halvings``, and the finer levels are copies of level 0; for
    coarser voxels the finest levels are dropped. All levels have one width, so that shapes agree; the encoder, which
    all levels share, and which has no level of its own, stays. A bilateral filter's spatial widths, in voxels, double
    with each halving. The networks of other teams stay as they are.

    Args:
        tensors: Tensors by name.
        row: Row whose network they are of.
        halvings: Number of halvings of the voxel's edge; negative for doublings.

    Returns:
        By name; what is unchanged is not copied.
    """
    if not isinstance(row, Variant):
        return dict(tensors)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        level, _, place = rest.partition(".")
        if part in LEVEL_PARTS + COARSE_LEVEL_PARTS and int(level) + halvings < 0:
            continue
        if part in LEVEL_PARTS + COARSE_LEVEL_PARTS:
            found[f"{part}.{int(level) + halvings}.{place}"] = tensor
            if part in LEVEL_PARTS and level == "0":
                found |= {f"{part}.{new}.{place}": tensor.clone() for new in range(halvings)}
        elif name == "bilateral_filter.log_sigma":
            found[name] = tensor + tensor.new_tensor([halvings * math.log(2)] * 3 + [0.0])
        else:
            found[name] = tensor
    return found


# reading --------------------------------------------------------------------------------------------------------------
def names() -> tuple[str, ...]:
    """The weights that the package carries."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.safetensors")))


def read_packaged(name: str, resolution_mm: float | None = None) -> Weights:
    """Weights that the package carries, at the resolution that they are for.

    Args:
        name: Their name, with the voxel size or without it.
        resolution_mm: Edge of the voxels that they are wanted for, in mm: where `name` does not say it those for
            the nearest one are taken, or at the finest if none is given.

    Raises:
        ValueError: an unknown name, with the choices listed; a file that is damaged.
    """
    if name not in names():
        called_so = [
            one for one in map(read_packaged, names()) if name == one.name.replace(f"-{one.resolution_mm:g}mm", "")
        ]
        if called_so:
            finest = min(one.resolution_mm for one in called_so)
            wanted = finest if resolution_mm is None else resolution_mm
            return min(called_so, key=lambda one: (abs(one.resolution_mm - wanted), one.resolution_mm))
        raise ValueError(
            f"no pretrained weights {name!r}: choose from {', '.join(names()) or 'none, none are packaged'}"
        )
    return read_weights(FOLDER / f"{name}.safetensors")


def read_weights(path: str | Path) -> Weights:
    """Weights of a file that :func:`export` wrote; nothing in it is trusted before it is checked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: larger than :data:`MAX_BYTES`, torn, damaged or foreign, or weights that do not fit their network.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such weights: {path}")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_BYTES} bytes, got {size}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the library's own error, and torch's for shapes
        raise ValueError(f"cannot read {path} as safetensors (torn or foreign?): {error}") from error
    if stored.get("format") != FORMAT:
        raise ValueError(f"{path} is not of this package: expected format {FORMAT!r}, got {stored.get('format')!r}")
    config, facts = (parse_json(stored.get(key, "").encode(), f"{path}: {key}") for key in ("config", "facts"))
    found = _described(path, path.stem, {"config": config, "model": tensors}, size, facts)
    if stored.get("digest") != found.digest:
        raise ValueError(f"{path}: damaged, the digest of its weights is not the one it was written with")
    check_facts(path, facts)
    return replace(found.at_resolution(facts["resolution_mm"]), name=found.name)


def check_facts(path: str | Path, facts: dict[str, Any]) -> None:
    """Raise ValueError unless facts have the names and types of :data:`FACTS`.

    Args:
        path: File that holds the facts, for the message.
        facts: Facts as the file has them.
    """

    def check(where: str, given: dict[str, Any], types: dict[str, tuple[type, ...]]) -> None:
        for name, allowed in types.items():
            value = given.get(name, ...)
            if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
                came = "nothing" if value is ... else repr(value)
                raise ValueError(f"{path}: {where}.{name} must be {expected}, got {came}")

    check("facts", facts, FACTS)
    for name in ("trained_by", "differences"):
        if not all(isinstance(text, str) for text in facts[name]):
            raise ValueError(f"{path}: facts.{name} must be texts, got {facts[name]!r}")
    check("facts.evaluation", facts["evaluation"], EVALUATION_FACTS)
    figures = facts["figures"]
    metrics = {"dice", "seconds", *(name.removesuffix("_before") for name in figures)}
    check("facts.figures", figures, {f"{name}{when}": (dict,) for name in sorted(metrics) for when in ("", "_before")})
    for name, figure in figures.items():
        check(f"facts.figures.{name}", figure, FIGURE)


def read_checkpoint(path: str | Path, options: Mapping[str, object] | None = None) -> Weights:
    """Weights of a best.pt; errors as of `load_checkpoint` and :func:`read_weights`.

    Args:
        path: Path of the checkpoint.
        options: Options of :data:`REGISTRATION` to set, whatever it was trained with.
    """
    path, options = Path(path), dict(options or {})
    for name in options:
        check_choice(name, REGISTRATION, "option")
    content = load_checkpoint(path)
    if options:
        content["config"]["variant"] |= options
    return _described(path, path.resolve().parent.name, content, path.stat().st_size)


def _described(
    path: Path, name: str, content: dict[str, Any], size: int, facts: dict[str, Any] | None = None
) -> Weights:
    check_schema(path, content, size)
    row = described_row(path, content)
    check_weights(path, content["model"], shapes_of(path, row))
    resolution = content["config"]["preset"].get("resolution_mm")
    if isinstance(resolution, bool) or not isinstance(resolution, (int, float)) or not 0 < resolution < 1000:
        raise ValueError(f"{path}: config.preset.resolution_mm must be a voxel size in mm, got {resolution!r}")
    return Weights(name, row, float(resolution), content["config"], content["model"], facts or {})


def pretrained(name: str, device: str = "auto", resolution_mm: float | None = None, contrast: str = "t1") -> nn.Module:
    """The network with the weights of a name, ready for ``model(fixed, moving)``.

    Args:
        name: Name of the weights, one of :func:`lumirlib.training.weights.names`, which says the voxel size that they
            are for, and images are to have; or such a name without it, as "ours", see :func:`read_packaged`.
        device: Device's name: "auto", "cpu", "cuda" ...
        resolution_mm: Edge of the voxels that images are to have instead, in mm, see :func:`to_finer_levels`.
        contrast: Contrast of the images, see :func:`lumirlib.methods.contrast.for_contrast`.

    Returns:
        A module in evaluation mode: images ``(B, 1, D, H, W)`` in [0, 1], in LUMIR's frame, to displacement
        ``(B, 3, D, H, W)`` in voxels.

    Raises:
        ValueError: an unknown name or contrast, with the choices listed; voxels that halving or doubling does not lead
            to.
    """
    found = read_packaged(name, resolution_mm)
    network = (found if resolution_mm is None else found.at_resolution(resolution_mm)).network(device)
    return for_contrast(network, contrast)


def _network_options(row: Row) -> dict[str, object]:
    """What the weights of a row's network depend on."""
    options = fields(NetworkOptions if isinstance(row, Variant) else row)  # type: ignore[arg-type]
    used = {one.name for one in options} - {"name", *REGISTRATION}
    return {"kind": type(row)} | {name: getattr(row, name) for name in used}


def starting_weights(init: str, row: Row, resolution_mm: float) -> Weights | None:
    """The weights that a run starts from; those of other voxels are passed on by :func:`to_finer_levels`.

    Args:
        init: Choice of the weights: empty or "random" for random ones; a name of :func:`names`; "pretrained" for the
            packaged ones of this very network, those of the same row and then the same voxels first; or the path of a
            best.pt.
        row: Row to be trained, at its final width.
        resolution_mm: Edge of the voxels that it is trained at, in mm.

    Returns:
        None for random ones.

    Raises:
        ValueError: weights that do not fit the row's network by name and shape, none or several that do, a row that is
            not trained, or another `init`.
        FileNotFoundError: no such checkpoint.
    """
    if init in ("", "random"):
        return None
    if row.trains_on == "nothing":
        raise ValueError(f"{row.name} is not trained, and cannot start from {init!r}")
    base = row.base_row()
    if init == "pretrained":
        return _fitting(base, resolution_mm)
    if init not in names() and not init.endswith(".pt"):
        choices = ", ".join(("random", "pretrained", *names()))
        raise ValueError(f"init must be one of {choices}, or the path of a best.pt; got {init!r}")
    found = (read_checkpoint(init) if init.endswith(".pt") else read_packaged(init)).at_resolution(resolution_mm)
    wanted = shapes_of(init, base)
    found = replace(found, tensors=with_idle_forces(found.tensors, wanted))
    check_weights(f"{init} for {base.name} ({base.describe()})", found.tensors, wanted)
    return found


def with_idle_forces(
    tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Weights with zeros for the parts of `wanted` that take forces, where they have none themselves.

    Args:
        tensors: Tensors by name.
        wanted: Those of the network that they are for; their values do not count.
    """
    idle = {name: torch.zeros_like(one, device="cpu") for name, one in wanted.items() if FORCE_PART in name.split(".")}
    return idle | dict(tensors)


def _fitting(row: Row, resolution_mm: float) -> Weights:
    packaged = [read_packaged(name) for name in names()]
    fitting = [one for one in packaged if _network_options(one.row) == _network_options(row)]
    for preferred in (lambda one: one.row.name == row.name, lambda one: one.resolution_mm == resolution_mm):
        fitting = [one for one in fitting if preferred(one)] or fitting
    if len(fitting) != 1:
        there = "; ".join(f"{one.name}: {one.row.name} ({one.row.describe()})" for one in fitting or packaged)
        what = "several pretrained weights are" if fitting else "no pretrained weights are"
        raise ValueError(f"{what} of the network of {row.name} ({row.describe()}); there are {there or 'none'}")
    return fitting[0]


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a network, with the memory layout that its convolutions are fastest in as far as that has been measured."""
    return place(model, device, channels_last=device.type == "cpu")


def load_model(path: str | Path, device: str = "auto", **bilateral: object) -> nn.Module:
    """The trained network of a best.pt, ready for ``model(fixed, moving)``.

    Args:
        path: Path of the checkpoint.
        device: Device's name: "auto", "cpu", "cuda" ...
        bilateral: Options `bilateral_window`, `bilateral_sigma` and `bilateral_sigma_range` of :class:`Variant`, to put
            a bilateral filter with these widths behind a network that was trained without one.

    Raises:
        FileNotFoundError, ValueError: as :func:`lumirlib.training.checkpoints.load_checkpoint`; weights that do not
        fit; a filter for a network that has one.
    """
    target = pick_device(device)
    content = load_checkpoint(path)
    variant = described_row(path, content)
    foreign = [name for name in bilateral if not name.startswith("bilateral_")]
    if foreign:
        raise ValueError(f"only a bilateral filter can be added to trained weights, got {', '.join(foreign)}")
    if bilateral and not isinstance(variant, Variant):
        raise ValueError(f"{path}: no bilateral filter can be put behind {variant.name}")
    if bilateral and variant.bilateral_window:
        raise ValueError(f"{path}: {variant.name} was trained with a bilateral filter; none can be put behind it")
    check_weights(path, content["model"], shapes_of(path, variant))
    model = to_device(replace(variant, **bilateral).build(), target)
    model.load_state_dict(content["model"], strict=not bilateral)
    return model.eval()


def method_of_weights(config: RunConfig, checkpoint: str | Path, device: torch.device) -> nn.Module:
    """What a run is evaluated by: the network of a checkpoint with what its row puts behind it.

    Args:
        config: Configuration of the run; its row may be one that uses another's weights, such as "BF-post" or "IO".
        checkpoint: Path of the best.pt of the row that is trained.
        device: Device that the method works on.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_model`.
    """
    row, widths = config.row, {}
    if isinstance(row, Variant) and row.bilateral_window and row.bilateral_mode == "post":
        widths = {name: getattr(row, name) for name in ("bilateral_window", "bilateral_sigma", "bilateral_sigma_range")}
    return row.as_method(load_model(checkpoint, str(device), **widths), config.preset.at_stage(-1)).eval()
