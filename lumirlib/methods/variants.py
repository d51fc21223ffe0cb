"""The paper's schemes as data: one frozen `Variant` with orthogonal options, parsed from names such as "LC-2"."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lumirlib import losses
from lumirlib._checks import check_choice
from lumirlib.losses.ndv import ndv_loss
from lumirlib.losses.tissue import tissue_loss
from lumirlib.methods import instance_optimization
from lumirlib.methods.base import ADDED_LATER, Row, check_options, nearest_odd
from lumirlib.models.backbone import CASCADES, Fields, RegistrationNetwork

if TYPE_CHECKING:
    from lumirlib.methods.base import Preset

BILATERAL_MODES = ("joint", "post")

OPTIMIZERS = ("adam", "muon")


@dataclass(frozen=True)
class NetworkOptions:
    """What a network computes: its name, and the arguments of :class:`lumirlib.models.backbone.RegistrationNetwork`.

    Attributes:
        name: Name as in the paper's Table 2, without "backbone+".
        start_channels: Width N of the encoder, the paper's 'sc'.
        head_channels: Width K of the flow estimators (27; the paper's 4ks is 108).
        cascade: Way of joining levels: "additive" or "compositional".
        levels: Number of pyramid levels.
        squarings: Squarings of the integration at every level.
        large_kernel: Kernel side of the encoder's parallel blocks (LK), 0 for plain convolutions.
        co_attention_levels: Number of coarsest levels with co-attention (CA).
        bilateral_window: Window of the joint bilateral filter of the displacement (BF), 0 for none.
        bilateral_sigma: Width of the filter along every axis in voxels; the initial one where it is trained.
        bilateral_sigma_range: Width of the filter in intensities of the fixed image; the initial one where it is
            trained.
        passes: Number of times that each level's estimator is applied (REC).
        refinements: Number of further passes of the finest level in registration (REF), which training does without.
        antisymmetric: Whether a level's velocity changes its sign where the features are exchanged (ANTI).
        driven: Whether the estimators are given the forces of correlation and tissues (FORCE).
        unfolding: Number of rounds that smooth the result around its folds in registration (UNFOLD), which training
            does without.
    """

    name: str = "backbone"
    start_channels: int = 32
    head_channels: int = 27
    cascade: str = "additive"
    levels: int = 5
    squarings: int = 7
    large_kernel: int = 0
    co_attention_levels: int = 0
    bilateral_window: int = 0
    bilateral_sigma: float = field(default=1.0, metadata=ADDED_LATER)
    bilateral_sigma_range: float = field(default=0.1, metadata=ADDED_LATER)
    passes: int = field(default=1, metadata=ADDED_LATER)
    refinements: int = field(default=0, metadata=ADDED_LATER)
    antisymmetric: bool = field(default=False, metadata=ADDED_LATER)
    driven: bool = field(default=False, metadata=ADDED_LATER)
    unfolding: int = field(default=0, metadata=ADDED_LATER)


@dataclass(frozen=True)
class TrainingOptions:
    """How a network is trained, beyond its preset.

    Attributes:
        bilateral_mode: Mode of the bilateral filter: "joint", it is trained with the network, or "post", it is put
            behind the trained weights of the same network without it, with its widths as given.
        ndv_weight: Weight of :func:`lumirlib.losses.ndv.ndv_loss` of the result (NDV), a share of the volume.
        tissue_weight: Weight of :func:`lumirlib.losses.tissue.tissue_loss` of the result (TISSUE).
        driven_late: Whether the stages before a run's last train without the forces (FORCE-late).
        learning_rate_factor: Factor on the preset's learning rate (LR4), which is that of the paper's own
            network.
        optimizer: Name of the optimizer (MUON), "adam" or "muon", see :mod:`lumirlib.training.muon`.
    """

    bilateral_mode: str = field(default="joint", metadata=ADDED_LATER)
    ndv_weight: float = field(default=0.0, metadata=ADDED_LATER)
    tissue_weight: float = field(default=0.0, metadata=ADDED_LATER)
    driven_late: bool = field(default=False, metadata=ADDED_LATER)
    learning_rate_factor: float = field(default=1.0, metadata=ADDED_LATER)
    optimizer: str = field(default="adam", metadata=ADDED_LATER)


@dataclass(frozen=True)
class InferenceOptions:
    """What is put behind the trained weights: instance optimization.

    Attributes:
        instance_steps: Largest number of steps of instance optimization (IO), 0 for none; see
            :class:`lumirlib.methods.instance_optimization.InstanceOptimization`.
        instance_learning_rate: Learning rate of its Adam, in voxels of each level, shared among the passes of one.
        instance_tolerance: Smallest relative fall of the loss that counts, see `instance_patience`.
        instance_patience: Number of steps within which the loss must fall by `instance_tolerance`, or the optimization
            ends.
    """

    instance_steps: int = field(default=0, metadata=ADDED_LATER)
    instance_learning_rate: float = field(default=0.03, metadata=ADDED_LATER)
    instance_tolerance: float = field(default=1e-3, metadata=ADDED_LATER)
    instance_patience: int = field(default=5, metadata=ADDED_LATER)


@dataclass(frozen=True)
class Variant(InferenceOptions, TrainingOptions, NetworkOptions, Row):
    """One network of the paper with its training and use. Every option is independent of the others.

    The options are those of :class:`NetworkOptions`, :class:`TrainingOptions` and :class:`InferenceOptions`, and

    Attributes:
        voxel_mm: Edge of the network's voxels in mm where `bilateral_window` and `bilateral_sigma` are in mm; 0 where
            they count voxels. A preset in mm sets it.
    """

    voxel_mm: float = field(default=0.0, metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        check_choice(self.cascade, CASCADES, "cascade")
        check_choice(self.bilateral_mode, BILATERAL_MODES, "bilateral_mode")
        check_choice(self.optimizer, OPTIMIZERS, "optimizer")
        for option in ("ndv_weight", "tissue_weight", "voxel_mm"):
            if not 0 <= getattr(self, option) < math.inf:
                raise ValueError(f"{option} must be 0 or more, got {getattr(self, option)}")
        if not 0 < self.learning_rate_factor < math.inf:
            raise ValueError(f"learning_rate_factor must be above 0, got {self.learning_rate_factor}")
        if self.instance_steps:
            instance_optimization.check_options(*self._instance_options)

    def at_preset(self, preset: Preset) -> Variant:
        """The variant at a preset's width and depth, and in its unit."""
        divisor = preset.channel_divisor
        return replace(
            self,
            start_channels=max(1, round(self.start_channels / divisor)),
            head_channels=max(1, round(self.head_channels / divisor)) if preset.divide_heads else self.head_channels,
            levels=preset.levels,
            voxel_mm=preset.resolution_mm if preset.unit == "mm" else 0.0,
        )

    def training_preset(self, preset: Preset) -> Preset:
        """The preset with the variant's own learning rate."""
        return preset.with_learning_rate_times(self.learning_rate_factor)

    def on_finer_voxels(self, halvings: int) -> Variant:
        """The variant with a level more for each halving, so that those it has keep their millimetres.

        Raises:
            ValueError: no level is left on voxels so large.
        """
        levels = self.levels + halvings
        if levels < 1:
            raise ValueError(
                f"levels of {self.name} must be above {-halvings}, one for each doubling of a voxel; got {self.levels}"
            )
        return replace(self, levels=levels, voxel_mm=self.voxel_mm / 2**halvings)

    def before_last_stage(self) -> Variant:
        """The variant without the forces that come late."""
        return replace(self, driven=self.driven and not self.driven_late)

    def build(self) -> RegistrationNetwork:
        """The network, with fresh weights."""
        options = {
            option.name: getattr(self, option.name) for option in fields(NetworkOptions) if option.name != "name"
        }
        if self.voxel_mm and self.bilateral_window:
            options["bilateral_window"] = max(5, nearest_odd(self.bilateral_window / self.voxel_mm))
            options["bilateral_sigma"] = self.bilateral_sigma / self.voxel_mm
        return RegistrationNetwork(**options)

    def loss_terms(
        self,
        model: RegistrationNetwork,
        fixed: torch.Tensor,
        moving: torch.Tensor,
        preset: Preset,
        generator: torch.Generator,
    ) -> dict[str, torch.Tensor]:
        """Loss of :meth:`objective`; see :meth:`lumirlib.methods.base.Row.loss_terms`."""
        return self.objective(model.fields(fixed, moving), fixed, moving, preset)

    def objective(
        self, predicted: Fields, fixed: torch.Tensor, moving: torch.Tensor, preset: Preset
    ) -> dict[str, torch.Tensor]:
        """Loss of the fields of pairs, as training and instance optimization minimize it.

        Args:
            predicted: Fields of B pairs.
            fixed: Fixed images ``(B, 1, D, H, W)``.
            moving: Moving images ``(B, 1, D, H, W)``.
            preset: Preset as :meth:`training_preset` gives it.

        Returns:
            Scalars "total", "similarity" and "smoothness", means over the pairs, and "ndv" and "tissue" where they
            count.
        """
        terms = losses.registration_loss(
            moving,
            fixed,
            predicted.displacements,
            predicted.velocities,
            preset.similarity_weight,
            preset.smoothness_weight,
            preset.window_voxels,
            preset.similarity,
            self.passes,
            preset.pyramid_blur,
        )
        if self.ndv_weight:
            found = ndv_loss(predicted.displacements[0])
            terms |= {"ndv": found, "total": terms["total"] + self.ndv_weight * found}
        if self.tissue_weight:
            found = tissue_loss(moving, fixed, predicted.displacements[0])
            terms |= {"tissue": found, "total": terms["total"] + self.tissue_weight * found}
        return terms

    def as_method(self, model: RegistrationNetwork, preset: Preset) -> nn.Module:
        """The network itself, or with instance optimization behind it."""
        if not self.instance_steps:
            return model
        return instance_optimization.InstanceOptimization(
            model, partial(self.objective, preset=preset), *self._instance_options
        )

    @property
    def _instance_options(self) -> tuple[int, float, float, int]:
        return self.instance_steps, self.instance_learning_rate, self.instance_tolerance, self.instance_patience

    def describe(self) -> str:
        """Width, cascade and schemes for a reader."""
        words = [
            f"start channels {self.start_channels}, head channels {self.head_channels}, {self.cascade} cascade, "
            f"{self.levels} levels"
        ]
        words += [f"large kernel {self.large_kernel}"] if self.large_kernel else []
        words += [f"co-attention at {self.co_attention_levels} level(s)"] if self.co_attention_levels else []
        if self.bilateral_window:
            how = "trained with the network" if self.bilateral_mode == "joint" else "put behind trained weights"
            unit = " mm" if self.voxel_mm else ""
            words.append(f"bilateral filter of window {self.bilateral_window}{unit}, {how}")
        words += ["antisymmetric velocities"] if self.antisymmetric else []
        if self.driven:
            words.append("driven by forces" + ", given in a training's last stage alone" * self.driven_late)
        words += [f"{self.passes} passes of each level"] if self.passes > 1 else []
        if self.refinements:
            noun = "pass" if self.refinements == 1 else "passes"
            words.append(f"{self.refinements} further {noun} of the finest level in registration")
        words += [f"folds smoothed in {self.unfolding} rounds"] if self.unfolding else []
        words += [f"loss on non-diffeomorphic volume weighted {self.ndv_weight:g}"] if self.ndv_weight else []
        words += [f"loss on tissues weighted {self.tissue_weight:g}"] if self.tissue_weight else []
        if self.learning_rate_factor != 1:
            words.append(f"learning rate times {self.learning_rate_factor:g}")
        words += ["trained with Muon"] if self.optimizer == "muon" else []
        if self.instance_steps:
            words.append(f"up to {self.instance_steps} steps of instance optimization behind trained weights")
        return ", ".join(words)

    def base_row(self) -> Variant:
        """The variant whose trained weights this one uses: without "BF-post" and instance optimization."""
        left_out = {"instance_": ("IO",)} if self.instance_steps else {}
        if self.bilateral_window and self.bilateral_mode == "post":
            left_out["bilateral_"] = ("BF", "BF-post")
        plain = {option.name: option.default for option in fields(self) if option.name.startswith(tuple(left_out))}
        parts = [part for part in self.name.split("+") if part not in sum(left_out.values(), ())]
        return replace(self, name="+".join(parts) or "backbone", **plain)


#: What each scheme changes about the backbone, in the order in which a combination's name lists them; "ours" is
#: COMP, REC, REF, ANTI, NDV, LR4 and MUON together.
SCHEMES: dict[str, dict[str, Any]] = {
    "LK": {"start_channels": 36, "large_kernel": 5},
    "LC-1": {"start_channels": 64, "head_channels": 108, "cascade": "additive"},
    "LC-2": {"start_channels": 64, "head_channels": 108, "cascade": "compositional"},
    "CA": {"co_attention_levels": 1},
    "BF": {"bilateral_window": 5, "bilateral_mode": "joint"},
    "BF-post": {"bilateral_window": 5, "bilateral_mode": "post"},
    "COMP": {"cascade": "compositional"},
    "ours": {
        "cascade": "compositional",
        "passes": 2,
        "refinements": 4,
        "antisymmetric": True,
        "ndv_weight": 10.0,
        "learning_rate_factor": 4.0,
        "optimizer": "muon",
    },
    "REC": {"passes": 2},
    "REF": {"refinements": 4},
    "ANTI": {"antisymmetric": True},
    "LR4": {"learning_rate_factor": 4.0},
    "MUON": {"optimizer": "muon"},
    "NDV": {"ndv_weight": 10.0},
    "TISSUE": {"tissue_weight": 8.0},
    "FORCE": {"driven": True},
    "FORCE-late": {"driven": True, "driven_late": True},
    "UNFOLD": {"unfolding": 4},
    "IO": {"instance_steps": 50},
}


def variant_choices() -> tuple[str, ...]:
    """Names that :func:`parse_variant` knows."""
    return ("backbone", *SCHEMES)


def parse_variant(name: str, **overrides: object) -> Variant:
    """The variant that a name stands for.

    Args:
        name: Name of the variant: "backbone" or schemes joined by "+", with or without a leading "backbone+"; case does
            not matter.
        overrides: Options of :class:`Variant` to set besides, such as ``cascade="compositional"``.

    Returns:
        The variant.

    Raises:
        ValueError: an unknown scheme or option, with the choices listed, or two schemes that set one option
            differently.
    """
    known = {scheme.lower(): scheme for scheme in variant_choices()}
    parts = [part.strip() for part in str(name).split("+")]
    chosen: list[str] = []
    settings: dict[str, Any] = {}
    for part in parts:
        scheme = known.get(part.lower())
        if scheme is None:
            raise ValueError(
                f"unknown variant {name!r}: {part!r} is not one of {', '.join(known.values())} (joined by '+')"
            )
        if scheme == "backbone" or scheme in chosen:
            continue
        for option, value in SCHEMES[scheme].items():
            present = settings.setdefault(option, value)
            if option == "start_channels":  # of two widths the larger one
                settings[option] = max(present, value)
            elif present != value:
                raise ValueError(
                    f"variant {name!r} joins schemes that contradict each other: {option} would be {present!r} and "
                    f"{value!r}"
                )
        chosen.append(scheme)
    chosen.sort(key=list(SCHEMES).index)
    row = Variant(name="+".join(chosen) or "backbone", **settings)
    return replace(row, **check_options(row, overrides))


def build_model(variant: str | Variant = "backbone", **overrides: object) -> RegistrationNetwork:
    """The network of a variant, with fresh random weights (seed with ``torch.manual_seed``).

    Args:
        variant: Name for :func:`parse_variant`, or a :class:`Variant`.
        overrides: Options of :class:`Variant` to set besides, such as `start_channels` or `cascade`.

    Returns:
        A module with ``model(fixed, moving) -> displacement``: images ``(B, 1, D, H, W)`` in [0, 1], displacement
        ``(B, 3, D, H, W)`` in voxels.
    """
    chosen = variant if isinstance(variant, Variant) else parse_variant(variant)
    return replace(chosen, **check_options(chosen, overrides)).build()
