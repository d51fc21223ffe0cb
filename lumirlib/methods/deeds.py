"""The row "deedsBCV" of Table 1: discrete registration on spanning trees, not learned.

Heinrich et al., "MRF-based deformable registration and ventilation estimation of lung CT" (IEEE TMI 2013), with
MIND-SSC descriptors (MICCAI 2013), in our own code; the settings are those of the LUMIR organizers' row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numba import config, set_num_threads
from tqdm.auto import tqdm

from lumirlib import spatial
from lumirlib._checks import check_finite, check_image, check_same_grid
from lumirlib.methods import _deeds_kernels as kernels
from lumirlib.methods.base import Preset, Tool

#: `Deeds.for_resolution` works on voxels of at most this edge in mm.
MAX_MM = 2.0
#: It takes the LUMIR settings for voxels below this edge in mm.
LUMIR_BELOW_MM = 1.5
#: Rounds of making the two fields of a pair consistent.
CONSISTENCY_ROUNDS = 10


@dataclass(frozen=True)
class Deeds(Tool):
    """deedsBCV; an instance is the method: ``Deeds()(fixed, moving) -> displacement``.

    Attributes:
        name: Name of the row.
        grid_spacings: Spacings of the control points in voxels, one per level, coarse to fine.
        radii: Numbers of labels on each side of zero along each axis, one per level.
        quantisations: Steps between labels in voxels, one per level. A level reaches radius times step.
        alpha: Weight of smoothness against descriptors.
        upsampling: Factor by which images are first made finer, trilinearly, before the result is brought back: steps
            are whole voxels, which is too coarse for coarse voxels. The other options are in voxels of the finer grid.
        progress: Whether to show a progress bar.
    """

    name: str = "deedsBCV"
    grid_spacings: tuple[int, ...] = (6, 5, 4, 3, 2)
    radii: tuple[int, ...] = (6, 5, 4, 3, 2)
    quantisations: tuple[int, ...] = (5, 4, 3, 2, 1)
    alpha: float = 1.6
    upsampling: int = 1
    progress: bool = False

    def __post_init__(self) -> None:
        levels = len(self.grid_spacings)
        for option in ("grid_spacings", "radii", "quantisations"):
            values = getattr(self, option)
            if not isinstance(values, tuple) or len(values) != levels or levels == 0:
                raise ValueError(f"{option} must be a tuple with one whole number per level ({levels}), got {values!r}")
            if any(isinstance(value, bool) or not isinstance(value, int) or value < 1 for value in values):
                raise ValueError(f"{option} must be whole numbers of 1 or more, got {values}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be above 0, got {self.alpha}")
        if isinstance(self.upsampling, bool) or not isinstance(self.upsampling, int) or self.upsampling < 1:
            raise ValueError(f"upsampling must be a whole number of 1 or more, got {self.upsampling!r}")

    @classmethod
    def for_resolution(cls, resolution_mm: float, **options: object) -> Deeds:
        """The row for voxels of a given size: about the same reach in mm.

        Voxels above 2 mm are upsampled by the least whole factor that brings them to 2 mm or less. Voxels below 1.5 mm
        then take the LUMIR settings (at 1 mm, levels reach 30, 20, 12, 6 and 2 mm); others take four levels, grid and
        radius 5-4-3-2 with steps 3-2-1-1 (at 2 mm: 30, 16, 6 and 4 mm).

        Args:
            resolution_mm: Edge of a voxel, in mm.
            options: Options of the row, taken instead of those chosen here.

        Raises:
            ValueError: a resolution that is not above 0.
        """
        if not 0 < resolution_mm < math.inf:
            raise ValueError(f"resolution_mm must be above 0, got {resolution_mm}")
        upsampling = max(1, math.ceil(resolution_mm / MAX_MM))
        settings: dict[str, object] = {"upsampling": upsampling}
        if resolution_mm / upsampling >= LUMIR_BELOW_MM:
            settings |= {"grid_spacings": (5, 4, 3, 2), "radii": (5, 4, 3, 2), "quantisations": (3, 2, 1, 1)}
        return cls(**{**settings, **options})

    def at_preset(self, preset: Preset) -> Deeds:
        """The row for voxels of a preset's size."""
        return self.for_resolution(preset.resolution_mm, alpha=self.alpha, progress=self.progress)

    def __call__(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """See :meth:`register`."""
        return self.register(fixed, moving)

    def register(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """The displacement that warps `moving` onto `fixed`; computed on the CPU.

        Args:
            fixed: Fixed image ``(1, 1, D, H, W)`` in [0, 1], any device; sides, upsampled, of at least twice the widest
                grid spacing.
            moving: Moving image in [0, 1], any device, same shape.

        Returns:
            ``(1, 3, D, H, W)`` float32 in voxels, on the device of `fixed`.

        Raises:
            TypeError: an image that is no tensor of floating-point numbers.
            ValueError: shapes that do not fit, values that are not finite, or an image without contrast.
        """
        return self.symmetric(fixed, moving)[0]

    def symmetric(self, fixed: torch.Tensor, moving: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both directions: `moving` onto `fixed`, and `fixed` onto `moving`, close to inverse to each other.

        Arguments and errors are those of :meth:`register`.

        Returns:
            Two displacements ``(1, 3, D, H, W)`` float32 in voxels, on the device of `fixed`.
        """
        self._check(fixed, moving)
        threads = torch.get_num_threads()  # Numba's parallel loops change it: both use OpenMP
        set_num_threads(min(threads, config.NUMBA_NUM_THREADS))
        grid = [side * self.upsampling for side in fixed.shape[2:]]
        images = [
            spatial.resize(image.detach().float().cpu(), grid)[0, 0].contiguous().numpy() for image in (fixed, moving)
        ]
        fields = [np.zeros((3, 1, 1, 1), np.float32)] * 2
        levels = list(zip(self.grid_spacings, self.radii, self.quantisations, strict=True))
        words: list[np.ndarray] = []
        last_patch = 0
        with tqdm(total=2 * len(levels), desc=self.name, unit="search", disable=not self.progress) as bar:
            for spacing, radius, step in levels:
                patch = step // 2 + 1  # the floor of step / 2 + 1
                if patch != last_patch:
                    words = [kernels.mind_ssc(image, patch) for image in images]
                    last_patch = patch
                found = []
                for target, source in ((0, 1), (1, 0)):
                    level = (fields[target], spacing, radius, step)
                    found.append(self._search(images[target], images[source], words[target], *level))
                    bar.update()
                fields = list(make_consistent(*found, spacing))
        forward, backward = (
            spatial.resize_displacement(torch.from_numpy(resample(field, tuple(grid)))[None], fixed.shape[2:])
            for field in fields
        )
        torch.set_num_threads(threads)
        return forward.to(fixed.device), backward.to(fixed.device)

    def _search(
        self,
        fixed: np.ndarray,
        moving: np.ndarray,
        fixed_words: np.ndarray,
        field: np.ndarray,
        spacing: int,
        radius: int,
        step: int,
    ) -> np.ndarray:
        """One level, one direction: the field on this level's control points."""
        shape = kernels.control_shape(fixed.shape, spacing)
        previous = resample(field, shape)
        warped = kernels.sample_at(moving[None], resample(previous, fixed.shape))[0]
        warped_words = kernels.mind_ssc(warped, step // 2 + 1)
        costs = kernels.data_costs(fixed_words, warped_words, spacing, radius, step, self.alpha)
        tree = kernels.image_tree(fixed, spacing)
        before = previous.reshape(3, -1)
        chosen = kernels.min_sum(costs.reshape(before.shape[1], -1), tree, before / np.float32(step))
        return (before + kernels.label_vectors(radius)[:, chosen] * np.float32(step)).reshape(previous.shape)

    def _check(self, fixed: torch.Tensor, moving: torch.Tensor) -> None:
        for image, name in ((fixed, "fixed"), (moving, "moving")):
            check_image(image, name, channels=1)
            if image.shape[0] != 1:
                raise ValueError(f"{name} must be (1, 1, D, H, W), got {tuple(image.shape)}")
            check_finite(image, name)
            if image.min() == image.max():
                raise ValueError(f"{name} must have contrast, got {float(image.min()):g} everywhere")
        check_same_grid(fixed, moving, "fixed", "moving")
        needed = math.ceil(2 * max(self.grid_spacings) / self.upsampling)
        if min(fixed.shape[2:]) < needed:
            raise ValueError(
                f"fixed must have at least {needed} voxels along each axis for grid spacings {self.grid_spacings} "
                f"and upsampling {self.upsampling}, got {tuple(fixed.shape[2:])}"
            )


def resample(field: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A field on another grid, trilinear; values keep their units.

    Point a of the new grid lies at ``a * old / new`` of the old one: points sit at the first corner of their blocks,
    as in the original program, and the border goes on beyond the last one.

    Args:
        field: Field ``(3, d, h, w)`` float32.
        shape: New sides.

    Returns:
        ``(3, *shape)`` float32.
    """
    for axis, side in enumerate(shape, start=1):
        old = field.shape[axis]
        at = np.arange(side) * (old / side)
        low = at.astype(np.int64)
        part = (at - low).astype(np.float32).reshape([-1 if axis == other else 1 for other in range(4)])
        lower = field.take(low, axis)
        field = lower + part * (field.take(np.minimum(low + 1, old - 1), axis) - lower)
    return np.ascontiguousarray(field, np.float32)


def make_consistent(forward: np.ndarray, backward: np.ndarray, spacing: int) -> tuple[np.ndarray, np.ndarray]:
    """Bring two fields on control points towards each other's inverse.

    Ten rounds of ``u <- (u - v o u) / 2`` and ``v <- (v - u o v) / 2``, both from the fields of the round before.

    Args:
        forward: Field ``(3, d, h, w)`` float32 in voxels.
        backward: Field of the other direction, ``(3, d, h, w)`` float32 in voxels.
        spacing: Spacing of the control points in voxels.

    Returns:
        The two fields.
    """
    there, back = forward / np.float32(spacing), backward / np.float32(spacing)
    for _ in range(CONSISTENCY_ROUNDS):
        there, back = (there - kernels.sample_at(back, there)) / 2, (back - kernels.sample_at(there, back)) / 2
    return there * np.float32(spacing), back * np.float32(spacing)
