"""The paper's backbone: a weight-shared encoder, a feature pyramid and a cascade of small flow estimators.

After Fig. 1 of the paper and the authors' later description of the same network (EOIR, "Encoder-Only Image
Registration", arXiv 2509.00451); DEVIATIONS.md says what was inferred.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lumirlib import spatial
from lumirlib._checks import check_choice, check_finite, check_image, check_network_images
from lumirlib.losses.forces import FORCE_CHANNELS, force_maps, forces
from lumirlib.models.bilateral_filter import JointBilateralFilter
from lumirlib.models.co_attention import CoAttention
from lumirlib.models.large_kernel import LargeKernelBlock
from lumirlib.models.layers import Conv3d, instance_norm_prelu
from lumirlib.models.memory import freed_memory_kept
from lumirlib.models.unfolding import smooth_folds

CASCADES = ("additive", "compositional")


class Fields(NamedTuple):
    """What a registration network predicts, one entry per level, or per pass of a level, finest and last first.

    Attributes:
        displacements: Displacements ``(B, 3, D_l, H_l, W_l)`` in voxels of level l; entry 0 is the result.
        velocities: Stationary velocities before integration, same shapes.
    """

    displacements: list[torch.Tensor]
    velocities: list[torch.Tensor]


def upsample_displacement(displacement: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A level's displacement on the next finer level's grid, its length times the ratio of the sides.

    Args:
        displacement: Displacement ``(B, 3, d, h, w)`` in voxels of the coarser level.
        shape: Sides of the finer level; the same ones leave it as it is.
    """
    if tuple(shape) == tuple(displacement.shape[2:]):
        return displacement
    factors = [fine / coarse for fine, coarse in zip(shape, displacement.shape[2:], strict=True)]
    return spatial.resize_displacement(displacement, shape, factors)


def join_levels(own: torch.Tensor, coarser: torch.Tensor | None, cascade: str) -> torch.Tensor:
    """A level's displacement from its own field w and the upsampled coarser one U.

    Args:
        own: Field of the level itself, ``(B, 3, D, H, W)`` in voxels.
        coarser: Upsampled coarser displacement, same shape; None at the coarsest level, where the result is `own`.
        cascade: Way of joining: "additive", ``w + U``, or "compositional", ``w(p) + U(p + w(p))``.
    """
    if coarser is None:
        return own
    return own + coarser if cascade == "additive" else spatial.compose(coarser, own)


def join_velocities(velocities: Sequence[torch.Tensor], cascade: str, squarings: int = 7) -> list[torch.Tensor]:
    """Displacement of every level from the levels' stationary velocities, finest first.

    Args:
        velocities: Velocities, one per level (or pass of it), finest first, ``(B, 3, D_l, H_l, W_l)`` in voxels of the
            level.
        cascade: Way of joining: "additive" or "compositional".
        squarings: Number of squarings of each level's integration.
    """
    found: list[torch.Tensor] = []
    for velocity in reversed(velocities):
        coarser = upsample_displacement(found[0], tuple(velocity.shape[2:])) if found else None
        found.insert(0, join_levels(spatial.integrate(velocity, squarings), coarser, cascade))
    return found


class ConvBlock(nn.Module):
    """Convolution 3^3 with bias, instance normalization without parameters, PReLU with one parameter."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Conv3d(in_channels, out_channels, kernel_size=3, padding=1)
        self.activation = nn.PReLU()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features ``(B, C, D, H, W)`` after convolution, norm and activation, on the same grid."""
        return instance_norm_prelu(self.conv(features), self.activation.weight, overwrite=True)


def recomputed(function: Callable[..., torch.Tensor], *arguments: torch.Tensor | None) -> torch.Tensor:
    """``function(*arguments)``, whose intermediate results are computed again in the backward pass, not kept."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class Encoder(nn.Module):
    """Three blocks 1 -> N -> 2N -> N at full resolution.

    Args:
        channels: Number N of channels, the paper's 'sc'.
        large_kernel: Kernel side k of :class:`LargeKernelBlock` in place of each convolution; 0 for plain ones.
    """

    def __init__(self, channels: int, large_kernel: int = 0) -> None:
        super().__init__()

        def block(in_channels: int, out_channels: int) -> nn.Module:
            if large_kernel:
                return LargeKernelBlock(in_channels, out_channels, large_kernel)
            return ConvBlock(in_channels, out_channels)

        self.large_kernel = large_kernel
        #: Keep each block's input alone for the backward pass.
        self.checkpointing = False
        self.block1 = block(1, channels)
        self.block2 = block(channels, 2 * channels)
        self.block3 = block(2 * channels, channels)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """``(B, 1, D, H, W)`` -> ``(B, N, D, H, W)``; the first block, and LK's last, without autocast."""
        # in bfloat16 an image's grey levels would be rounded to 256 steps, which the first, high-pass block amplifies
        with spatial.without_autocast(image.device):
            features = self._block(self.block1, image.to(self.dtype))
        features = self._block(self.block2, features)
        # three rounded branches add up to more than 0.01 voxels where the displacement is 4
        with spatial.without_autocast(image.device) if self.large_kernel else nullcontext():
            return self._block(self.block3, features.to(self.dtype) if self.large_kernel else features)

    def _block(self, block: nn.Module, features: torch.Tensor) -> torch.Tensor:
        return recomputed(block, features) if self.checkpointing and torch.is_grad_enabled() else block(features)


#: Slices of a slab, and how many slices away a flow estimator's three convolutions see.
SLAB, REACH = 40, 3


class FlowEstimator(nn.Module):
    """Velocity of one level from the sum and the difference of fixed and warped moving features.

    Args:
        feature_channels: Number N of feature channels.
        head_channels: Width K of the second convolution.
        antisymmetric: Whether the velocity is half the difference of the two that the features give in either order
            (ANTI), so that exchanged features give the velocity with another sign.
        driven: Whether it is given forces, too (FORCE). What it makes of them starts at zero.
    """

    def __init__(
        self, feature_channels: int, head_channels: int, antisymmetric: bool = False, driven: bool = False
    ) -> None:
        super().__init__()
        width = 2 * feature_channels
        self.antisymmetric = antisymmetric
        self.conv1 = Conv3d(width, width, kernel_size=3, padding=1)
        self.conv2 = Conv3d(width, head_channels, kernel_size=3, padding=1)
        self.conv3 = Conv3d(head_channels, 3, kernel_size=3, padding=1, bias=not antisymmetric)
        self.of_forces = Conv3d(FORCE_CHANNELS, width, kernel_size=3, padding=1, bias=False) if driven else None
        if self.of_forces is not None:
            nn.init.zeros_(self.of_forces.weight)

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor, force: torch.Tensor | None = None) -> torch.Tensor:
        """Features ``(B, N, D_l, H_l, W_l)`` of both -> velocity ``(B, 3, D_l, H_l, W_l)``.

        Forces ``(B, 6, D_l, H_l, W_l)`` are needed if it is driven. Under autocast the last convolution stays in the
        weights' dtype. Where no gradient is asked for, a large volume is computed in slabs on a CPU, so that features
        between the convolutions take a part of the memory.
        """
        depth = fixed.shape[2]
        in_slabs = fixed.device.type == "cpu" and depth > 2 * SLAB
        if not in_slabs or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._velocity(fixed, moving, force)
        parts = []
        for first in range(0, depth, SLAB):
            low, high = max(0, first - REACH), min(depth, first + SLAB + REACH)
            given = (one if one is None else one[:, :, low:high] for one in (fixed, moving, force))
            part = self._velocity(*given)
            parts.append(part[:, :, first - low : first - low + SLAB])
        return torch.cat(parts, dim=2)

    def _velocity(self, fixed: torch.Tensor, moving: torch.Tensor, force: torch.Tensor | None) -> torch.Tensor:
        first = self._antisymmetric_pair if self.antisymmetric else self._first
        features = first(fixed, moving, force)
        features = F.relu(features, inplace=True)
        features = F.relu(self.conv2(features), inplace=True)
        with spatial.without_autocast(features.device):
            features = features.to(self.conv3.weight.dtype)
            if self.antisymmetric:  # conv3 is linear, and a bias would cancel
                there, back = features.chunk(2)
                features = (there - back) / 2
            return self.conv3(features)

    def _first(self, fixed: torch.Tensor, moving: torch.Tensor, force: torch.Tensor | None) -> torch.Tensor:
        """First convolution of ``cat(F + M, F - M)``.

        It is one of ``cat(F, M)`` with sums and differences of its weights, which are small where features are large.
        """
        of_sum, of_difference = self.conv1.weight.chunk(2, dim=1)
        weight = torch.cat([of_sum + of_difference, of_sum - of_difference], dim=1)
        return self._with_forces(
            self.conv1._conv_forward(torch.cat([fixed, moving], dim=1), weight, self.conv1.bias), force
        )

    def _antisymmetric_pair(
        self, fixed: torch.Tensor, moving: torch.Tensor, force: torch.Tensor | None
    ) -> torch.Tensor:
        """First convolution for (F, M) and for (M, F), ``(2 B, 2 N, D_l, H_l, W_l)``, at the cost of one.

        The part of the sum is the same for both; those of the difference and of the forces change their sign.
        """
        of_sum, of_difference = self.conv1.weight.chunk(2, dim=1)
        even = self.conv1._conv_forward(fixed + moving, of_sum, self.conv1.bias)
        odd = self._with_forces(self.conv1._conv_forward(fixed - moving, of_difference, None), force)
        if torch.is_grad_enabled():
            return torch.cat([even + odd, even - odd])
        both = torch.empty_like(even.expand(2, *even.shape)).flatten(0, 1)  # written once, in the layout of `even`
        torch.add(even, odd, out=both[: len(even)])
        torch.sub(even, odd, out=both[len(even) :])
        return both

    def _with_forces(self, features: torch.Tensor, force: torch.Tensor | None) -> torch.Tensor:
        return features if self.of_forces is None else features + self.of_forces(force)


class RegistrationNetwork(nn.Module):
    """Backbone of the paper, from a pair of images to a displacement.

    Images of any size: level l has ``ceil(side / 2**l)`` voxels along each axis (at least 2), reached by trilinear
    interpolation with aligned corners; nothing is padded or cropped.

    Args:
        start_channels: Width N of the encoder (the paper's 'sc').
        head_channels: Width K of the flow estimators.
        cascade: Way in which a level's own field w and the upsampled coarser one U are joined: "additive", ``w + U``,
            or "compositional", ``w(p) + U(p + w(p))``.
        levels: Number of pyramid levels; 5 in the paper.
        squarings: Number of squarings of the integration at every level.
        large_kernel: Kernel side k (LK; 5 in LKU-Net) of the encoder's parallel blocks; 0 for plain convolutions.
        co_attention_levels: Number of coarsest levels with co-attention (CA); 0 for none.
        bilateral_window: Window of the joint bilateral filter of the result (BF), in voxels; 0 for none.
        bilateral_sigma: Initial width of the filter along every axis, in voxels.
        bilateral_sigma_range: Initial width of the filter in intensities of the fixed image.
        passes: Number of times that each level's estimator is applied (REC), each time to the moving features as warped
            by all that was found before, and its field joined to that as a finer level's would be.
        refinements: Number of further passes of the finest level where the network is called (REF), not in
            :meth:`fields`, and so in no loss: the network is not trained for them.
        antisymmetric: Whether the velocity of a level is half the difference of the two that its estimator gives for
            the features in either order (ANTI), so that exchanged features give the velocity with another sign.
        driven: Whether the estimators are given :func:`lumirlib.losses.forces.forces`, too (FORCE).
        unfolding: Number of rounds of :func:`lumirlib.models.unfolding.smooth_folds` where the network is called
            (UNFOLD), not in :meth:`fields`.
    """

    def __init__(
        self,
        start_channels: int = 32,
        head_channels: int = 27,
        cascade: str = "additive",
        levels: int = 5,
        squarings: int = 7,
        large_kernel: int = 0,
        co_attention_levels: int = 0,
        bilateral_window: int = 0,
        bilateral_sigma: float = 1.0,
        bilateral_sigma_range: float = 0.1,
        passes: int = 1,
        refinements: int = 0,
        antisymmetric: bool = False,
        driven: bool = False,
        unfolding: int = 0,
    ) -> None:
        super().__init__()
        check_choice(cascade, CASCADES, "cascade")
        for name, value, least in (
            ("start_channels", start_channels, 1),
            ("head_channels", head_channels, 1),
            ("levels", levels, 1),
            ("squarings", squarings, 0),
            ("large_kernel", large_kernel, 0),
            ("co_attention_levels", co_attention_levels, 0),
            ("bilateral_window", bilateral_window, 0),
            ("passes", passes, 1),
            ("refinements", refinements, 0),
            ("unfolding", unfolding, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number from {least}, got {value!r}")
        if co_attention_levels > levels:
            raise ValueError(f"co_attention_levels must be from 0 to the {levels} levels, got {co_attention_levels}")
        self.cascade = cascade
        self.squarings = squarings
        self.passes = passes
        self.refinements = refinements
        self.driven = driven
        self.unfolding = unfolding
        #: Number of its voxels along an edge of those that it was trained on, where its weights were passed on to finer
        #: ones: forces tell tissues apart as they did there.
        self.finer = 1
        self._checkpointing = False
        self.encoder = Encoder(start_channels, large_kernel)
        self.estimators = nn.ModuleList(
            FlowEstimator(start_channels, head_channels, antisymmetric, driven) for _ in range(levels)
        )
        # what the backbone lacks is registered last, so that weights can be exchanged by order without it
        self.co_attention = nn.ModuleDict(
            {str(level): CoAttention(start_channels) for level in range(levels - co_attention_levels, levels)}
        )
        self.bilateral_filter = (
            JointBilateralFilter(bilateral_window, bilateral_sigma, bilateral_sigma_range) if bilateral_window else None
        )

    @property
    def checkpointing(self) -> bool:
        """Whether training keeps little more than each block's and each level's input and computes the rest again.

        An option of how the network is trained, not of what it computes: it may be set at any time.
        """
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        self._checkpointing = self.encoder.checkpointing = bool(on)

    def level_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Sides of each level for images of sides `shape`, finest first."""
        return [tuple(max(2, -(-side // 2**level)) for side in shape) for level in range(len(self.estimators))]

    def encode(self, fixed: torch.Tensor, moving: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of both images, ``(B, N, D, H, W)`` each, from one pass over the stacked pair."""
        fixed_features, moving_features = self.encoder(torch.cat([fixed, moving])).chunk(2)
        return fixed_features, moving_features

    def fields(self, fixed: torch.Tensor, moving: torch.Tensor) -> Fields:
        """Displacement and velocity of every level, as the loss with deep supervision needs them.

        Args:
            fixed: Fixed image ``(B, 1, D, H, W)``, intensities in [0, 1].
            moving: Moving image ``(B, 1, D, H, W)``, intensities in [0, 1].

        Returns:
            :class:`Fields`, float32.

        Raises:
            ValueError: shapes that differ or are not (B, 1, D, H, W), or a side below 2 voxels.
            TypeError: a dtype other than the weights', unless autocast is on.
        """
        return self._fields(fixed, moving)

    def _fields(
        self, fixed: torch.Tensor, moving: torch.Tensor, refinements: int = 0, last_alone: bool = False
    ) -> Fields:
        """:meth:`fields`, with further passes of the finest level; if `last_alone` with no more than the result."""
        check_network_images(fixed, moving, self.encoder.dtype)
        shapes = self.level_shapes(tuple(fixed.shape[2:]))
        fixed_features, moving_features = self.encode(fixed, moving)
        pyramid = [(fixed_features, moving_features)]
        for shape in shapes[1:]:
            finer_fixed, finer_moving = pyramid[-1]
            pyramid.append((spatial.resize(finer_fixed, shape), spatial.resize(finer_moving, shape)))
        compared = [force_maps(image, shapes, self.finer) for image in (fixed, moving)] if self.driven else []

        displacements: list[torch.Tensor] = []
        velocities: list[torch.Tensor] = []
        for level in reversed(range(len(shapes))):
            features = pyramid.pop()
            maps = [levels.pop() for levels in compared]
            for _ in range(self.passes + (0 if level else refinements)):
                coarser = upsample_displacement(displacements[0], shapes[level]) if displacements else None
                inputs = (*features, coarser, *maps)
                if self.checkpointing and torch.is_grad_enabled():
                    velocity = recomputed(lambda *given, level=level: self._velocity(level, *given), *inputs)
                else:
                    velocity = self._velocity(level, *inputs)
                displacements.insert(0, join_levels(spatial.integrate(velocity, self.squarings), coarser, self.cascade))
                velocities.insert(0, velocity)
                if last_alone:
                    del displacements[1:], velocities[:], velocity
        if self.bilateral_filter is not None:
            displacements[0] = self.bilateral_filter(displacements[0], fixed)
        return Fields(displacements, velocities)

    def displacements(self, velocities: Sequence[torch.Tensor], fixed: torch.Tensor) -> list[torch.Tensor]:
        """Displacement of every level from given velocities, as :meth:`fields` makes them from its own.

        Args:
            velocities: Velocities as :class:`Fields` has them.
            fixed: Fixed image ``(B, 1, D, H, W)``, which guides the bilateral filter where there is one.
        """
        found = join_velocities(velocities, self.cascade, self.squarings)
        if self.bilateral_filter is not None:
            found[0] = self.bilateral_filter(found[0], fixed)
        return found

    def _velocity(
        self,
        level: int,
        fixed: torch.Tensor,
        moving: torch.Tensor,
        coarser: torch.Tensor | None,
        *maps: torch.Tensor,
    ) -> torch.Tensor:
        """Velocity of one level from its features and the displacement found so far, on the level's grid.

        With forces they come from the `maps` of the fixed and of the moving image.

        Under autocast all but the finest level stay in float32: their errors are multiplied on the way to the result,
        and they have an eighth of its voxels.
        """
        with spatial.without_autocast(fixed.device) if level else nullcontext():
            if level:
                working = self.encoder.dtype
                fixed, moving = fixed.to(working), moving.to(working)
            if str(level) in self.co_attention:
                fixed, moving = self.co_attention[str(level)](fixed, moving)
            if coarser is not None:
                moving = spatial.warp(moving, coarser)
            if not maps:
                velocity = self.estimators[level](fixed, moving)
            else:
                of_fixed, of_moving = maps
                if coarser is not None:
                    of_moving = spatial.warp(of_moving, coarser.detach())
                velocity = self.estimators[level](fixed, moving, forces(of_fixed, of_moving).to(fixed.dtype))
            return velocity.to(torch.promote_types(velocity.dtype, torch.float32))

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """Displacement ``(B, 3, D, H, W)`` in voxels that carries `moving` onto `fixed`; arguments as `fields`.

        Raises:
            TypeError, ValueError: as :meth:`fields`, and for voxels that are not finite.
        """
        check_image(fixed, "fixed", channels=1)
        check_image(moving, "moving", channels=1)
        check_finite(fixed, "fixed")
        check_finite(moving, "moving")
        with freed_memory_kept():
            found = self._fields(fixed, moving, refinements=self.refinements, last_alone=True).displacements[0]
            return smooth_folds(found, self.unfolding) if self.unfolding else found
