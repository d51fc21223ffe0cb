"""Choosing what registers: a trained run, weights, or a method that needs no training."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from lumirlib import provenance
from lumirlib.evaluation import Method, zero_displacement
from lumirlib.methods import BASELINES, parse_row
from lumirlib.methods.masks import Filled
from lumirlib.methods.presets import get_preset
from lumirlib.models.memory import freed_memory_kept
from lumirlib.training.weights import read_checkpoint, read_packaged

#: A method's name for the affine alone.
AFFINE = "affine"

RESOLUTIONS_MM = (1, 2, 4)
#: For methods that are not trained, where none is given.
DEFAULT_RESOLUTION_MM = 2
#: The packaged weights that `lumirlib register` takes where nothing is chosen, and its voxels in mm, as a rule and with
#: `--fast`.
DEFAULT_WEIGHTS = "ours"
BEST_MM, FAST_MM = 1, 2


@dataclass(frozen=True)
class Registrar:
    """What registers two brains in the LUMIR frame.

    Attributes:
        name: Name for people to read.
        resolution_mm: Edge of the voxels that it works on, in mm.
        method: Function of two images ``(1, 1, D, H, W)`` in [0, 1] that returns the displacement in voxels.
        facts: Facts about its origin.
    """

    name: str
    resolution_mm: int
    method: Method
    facts: dict[str, object] = field(default_factory=dict)

    def masked(self, fixed_mask: torch.Tensor | None = None, moving_mask: torch.Tensor | None = None) -> Registrar:
        """The same for one pair of which a part does not count, by :class:`lumirlib.methods.masks.Filled`.

        Args:
            fixed_mask: What does not count in the fixed image, ``(1, 1, 160, 224, 192)`` bool at 1 mm.
            moving_mask: The same of the moving image.
        """
        if fixed_mask is None and moving_mask is None:
            return self
        return replace(self, method=Filled(self.method, fixed_mask, moving_mask, self.resolution_mm).eval())

    @freed_memory_kept()
    def displacement(self, fixed: torch.Tensor, moving: torch.Tensor, device: torch.device | str) -> torch.Tensor:
        """The displacement ``(1, 3, D, H, W)`` in voxels of its resolution, of two brains in the frame at 1 mm."""
        coarse = [F.avg_pool3d(image, self.resolution_mm).div(255).to(device) for image in (fixed, moving)]
        with torch.no_grad():
            found = self.method(*coarse).float().cpu()
        if found.shape != (1, 3, *coarse[0].shape[2:]) or not torch.isfinite(found).all():
            raise ValueError(
                f"{self.name} must give finite displacements of {(1, 3, *coarse[0].shape[2:])}, got "
                f"{tuple(found.shape)}"
            )
        return found


def choose_registrar(
    weights: str | Path = "",
    run: str = "",
    method: str = "",
    results: str | Path = "",
    resolution_mm: int | None = None,
    device: str = "auto",
    pretrained: str = "",
) -> Registrar:
    """The network of a checkpoint or of a run, pretrained weights, or a method that is not trained: exactly one.

    Args:
        weights: Path of a best.pt.
        run: Name of a run in the results folder.
        method: A row of :data:`lumirlib.methods.BASELINES` that is not trained, or "affine".
        results: Results folder; empty for :func:`lumirlib.provenance.results_folder`.
        resolution_mm: Edge of the voxels to work on, 1, 2 or 4; None takes 2 for `method`, and the edge that a network
            was trained at, which can be made finer or coarser: see :func:`lumirlib.training.weights.to_finer_levels`.
        device: Device that a network works on.
        pretrained: Name of weights that the package carries, see :func:`lumirlib.pretrained`.

    Raises:
        ValueError: none or several of weights, run, method and pretrained; an unknown name; a network as method, with
            the command that trains one.
        FileNotFoundError: no such checkpoint, with the runs that there are.
    """
    train_first = (
        'train a network first, "lumirlib run LC-2 --preset half --cohort brains", and pass its name with --run, or '
        "its best.pt with --weights; --method deedsBCV needs no training"
    )
    if sum(map(bool, (weights, run, method, pretrained))) != 1:
        raise ValueError(f"give one of weights, run, method and pretrained; {train_first}")
    if method:
        return _untrained(method, DEFAULT_RESOLUTION_MM if resolution_mm is None else resolution_mm, train_first)
    if run:
        folder = provenance.results_folder(results) / "checkpoints"
        weights = folder / run / "best.pt"
        if not weights.is_file():
            known = sorted(path.parent.name for path in folder.glob("*/best.pt"))
            raise FileNotFoundError(
                f"no trained run {run!r} in {folder}, which has {', '.join(known) or 'none'}; {train_first}"
            )
    trained = read_packaged(pretrained, resolution_mm) if pretrained else read_checkpoint(weights)
    found = trained if resolution_mm is None else trained.at_resolution(resolution_mm)
    if found.resolution_mm not in RESOLUTIONS_MM:
        raise ValueError(f"{found.name}: works at {found.resolution_mm:g} mm, expected one of {RESOLUTIONS_MM}")
    facts = {
        "pretrained" if pretrained else "run": trained.name,
        "trained_at_mm": float(found.config["preset"]["resolution_mm"]),
        "cohort": found.config["cohort"],
        "preset": found.config["preset"].get("name"),
        "weights": found.digest,
    }
    return Registrar(found.row.name, int(found.resolution_mm), found.network(device), facts)


def default_registrar(fast: bool = False, device: str = "auto", resolution_mm: int | None = None) -> Registrar:
    """The best packaged weights, for users who choose nothing.

    Args:
        fast: Whether to work at :data:`FAST_MM` in place of :data:`BEST_MM`.
        device: Device that the network works on.
        resolution_mm: Edge of the voxels in mm, where it is chosen.
    """
    resolution_mm = resolution_mm or (FAST_MM if fast else BEST_MM)
    return choose_registrar(pretrained=DEFAULT_WEIGHTS, resolution_mm=resolution_mm, device=device)


def _untrained(name: str, resolution_mm: int, train_first: str) -> Registrar:
    if resolution_mm not in RESOLUTIONS_MM:
        raise ValueError(f"resolution_mm must be one of {RESOLUTIONS_MM}, got {resolution_mm}")
    if name.lower() == AFFINE:
        return Registrar(AFFINE, resolution_mm, zero_displacement)
    row = parse_row(name)
    if row.trains_on != "nothing":
        choices = [AFFINE, *(known for known, kind in BASELINES.items() if kind.trains_on == "nothing")]
        raise ValueError(
            f"{row.name} is a network, which needs weights; {train_first}. Not trained are: {', '.join(choices)}"
        )
    if row.available():
        raise ValueError(f"{row.name}: {row.available()}")
    fitted = row.at_preset(replace(get_preset("full"), resolution_mm=float(resolution_mm)))
    return Registrar(row.name, resolution_mm, fitted.build(), {"options": fitted.describe()})
