"""From scans as they come from a scanner to the LUMIR frame: skull strip, bias correction, affine, one resampling.

    lumirlib prepare FOLDER --out DIR

Brains are found by deepbet (Fisch et al., NeuroImage 2024), the bias field by N4 (Tustison et al., IEEE TMI 2010) and
the affine by maximizing the correlation with the template of :mod:`lumirlib.data.embedded`, which lies in ICBM152
space; the last two are SimpleITK's. All three work on the scan's own voxels or in mm, so that the image is interpolated
once, from its own grid to the frame.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy.ndimage import binary_erosion, binary_fill_holes, map_coordinates, spline_filter, zoom

from lumirlib import spatial
from lumirlib._checks import check_choice
from lumirlib.data.field_formats import RAS_TO_LPS
from lumirlib.data.frame import FRAME_SHAPE, frame_affine, template_in_frame
from lumirlib.scans.scan import Scan, correlation, read_scan, require, sample_world, transform, world_slabs

#: What is done to a scan, in this order; each can be skipped.
STEPS = ("strip", "bias", "affine")
#: How a scan comes to the frame: ours, interpolated once, or as the challenge's organizers publish it.
RECIPES = ("direct", "lumir")
#: Brains that skull stripping may find, in ml; anything else is taken for a failure.
BRAIN_ML = (400.0, 2500.0)
#: The bias field is fitted on voxels of about this edge in mm, the affine on those of the template.
BIAS_MM = 4.0

TEMPLATE_MM = 2

#: Share of the voxels that a background has at least, where it cannot be told by being zero.
MIN_BACKGROUND = 0.05
#: Interpolation leaves negative values beside an edge, at most this part of the brightest, in so many voxels.
MAX_OVERSHOOT = 0.1

RIM_VOXELS = 3
NOT_IN_FRAME = "no brain lies in the LUMIR frame; was the step 'affine' skipped wrongly?"
#: Share of a brain's voxels that may be an exception.
FEW = 1e-3


def check_skip(skip: Iterable[str]) -> tuple[str, ...]:
    """Steps to skip, in the order of :data:`STEPS`; ValueError for an unknown one."""
    chosen = (skip,) if isinstance(skip, str) else tuple(skip)
    for step in chosen:
        check_choice(step, STEPS, "skip")
    return tuple(step for step in STEPS if step in chosen)


def check_tools(skipped: Iterable[str]) -> None:
    """Raise ModuleNotFoundError unless the packages that the steps need, those skipped left out, are installed."""
    for step, package in zip(STEPS, ("deepbet", "SimpleITK", "SimpleITK"), strict=True):
        if step not in skipped:
            require(package)


# the three steps ------------------------------------------------------------------------------------------------------
@lru_cache(maxsize=2)
def _stripper(on_cpu: bool) -> object:
    return require("deepbet").BrainExtraction(no_gpu=on_cpu)


def brain_mask(scan: Scan, device: torch.device | str = "cpu") -> torch.Tensor:
    """Where the brain is in a head, by deepbet; ``(1, 1, D, H, W)`` bool.

    Raises:
        ModuleNotFoundError: deepbet is not installed.
        ValueError: what it finds is no brain.
    """
    advice = "is it a whole T1 head? For a brain that is stripped already, skip the step: --skip strip"
    stripper = _stripper(torch.device(device).type != "cuda")
    try:
        _, found, _ = stripper.run(nib.Nifti1Image(scan.values[0, 0].numpy(), scan.affine))
    except (AssertionError, ValueError) as error:  # what it raises where its first network sees nothing
        raise ValueError(f"{scan.path}: skull stripping found no brain ({error}); {advice}") from error
    mask = np.asarray(found.dataobj) > 0
    volume = mask.sum() * abs(np.linalg.det(scan.affine[:3, :3])) / 1000
    if not BRAIN_ML[0] <= volume <= BRAIN_ML[1]:
        raise ValueError(
            f"{scan.path}: skull stripping found {volume:.0f} ml of brain, expected "
            f"{BRAIN_ML[0]:.0f} to {BRAIN_ML[1]:.0f}; {advice}"
        )
    return torch.from_numpy(mask)[None, None]


def stripped_mask(scan: Scan) -> torch.Tensor:
    """Where a scan that has been stripped before has a brain, ``(1, 1, D, H, W)`` bool: what is above zero.

    Where values are negative (z-scores, for instance), the background is the most frequent one, and the brain is all
    else and what that encloses. Negative values at the rim alone are what interpolation leaves beside an edge: they are
    background, and it is said.

    Raises:
        ValueError: (nearly) all is brain, or there are negative values and no constant background.
    """
    values = scan.values[0, 0].numpy()
    mask = values > 0
    if values.min() < 0:
        background = background_value(scan.values)
        if background is None:
            raise ValueError(
                f"{scan.path}: expected a stripped brain on a constant background, as step 'strip' is skipped; values "
                f"go from {values.min():.4g} to {values.max():.4g}, none of them in {100 * MIN_BACKGROUND:g} % of the "
                "voxels. Set the background to 0"
            )
        enclosed = binary_fill_holes(values != background)
        if background or not _is_overshoot(values, enclosed):
            mask = enclosed
        else:
            warnings.warn(
                f"{scan.path}: {(values < 0).sum()} voxels below zero at the rim of the brain, as interpolation leaves "
                "them, are background",
                stacklevel=2,
            )
    share = mask.mean()
    if share > 0.95:
        raise ValueError(
            f"{scan.path}: expected a stripped brain on zero background, as step 'strip' is skipped; "
            f"{100 * share:.0f} % of the voxels are above zero"
        )
    return torch.from_numpy(mask)[None, None]


def background_value(values: torch.Tensor) -> float | None:
    """The value around the head: 0 where none is negative, else the most frequent one; None where none is frequent."""
    if values.min() >= 0:
        return 0.0
    found, counts = np.unique(values.numpy(), return_counts=True)
    return float(found[counts.argmax()]) if counts.max() >= MIN_BACKGROUND * values.numel() else None


def _is_overshoot(values: np.ndarray, brain: np.ndarray) -> bool:
    """Whether what is negative lies in the outermost voxels of a brain only, and little below zero."""
    core = binary_erosion(brain, iterations=RIM_VOXELS)
    shallow = values.min() > -MAX_OVERSHOOT * np.percentile(values[brain], 99.9)
    return bool(shallow and core.any() and (values < 0)[core].mean() < FEW)


def above_zero(scan: Scan, mask: torch.Tensor) -> torch.Tensor:
    """Values of a scan; where some of the brain is negative, such that all of it is above zero, the background's value.

    Z-scores are shifted, so that their lowest is a little above zero. Single negative voxels are made as dark as that.

    Args:
        scan: Scan as it lies in its file.
        mask: Mask of the brain, ``(1, 1, D, H, W)`` bool.

    Returns:
        ``(1, 1, D, H, W)`` float32; the scan's own values where none in the brain is negative.

    Warns:
        UserWarning: values were changed, and how.
    """
    inside = scan.values[mask].numpy()
    if not inside.size or inside.min() >= 0:
        return scan.values
    low, high = np.percentile(inside, [100 * FEW, 99.9])
    shift = max(0.0, -float(low))
    step = max((float(high) + shift) / 255, np.finfo(np.float32).tiny)
    shift += step if shift else 0.0
    how = (
        f"{shift:.4g} was added to all"
        if shift
        else f"the {(inside < 0).sum()} voxels below zero were set to {step:.4g}"
    )
    warnings.warn(
        f"{scan.path}: values in the brain go from {inside.min():.4g} to {inside.max():.4g}, and zero stands for the "
        f"background; {how}",
        stacklevel=2,
    )
    shifted, background = scan.values + shift, background_value(scan.values)
    around = shifted.clamp(min=0) if background is None else shifted.clamp(min=0).where(scan.values != background, 0.0)
    return torch.where(mask, shifted.clamp(min=step), around)


def _to_itk(volume: np.ndarray, affine: np.ndarray) -> object:
    """A volume in the file's order of axes as SimpleITK image at the same place, which it calls LPS."""
    sitk = require("SimpleITK")
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(torch.get_num_threads())
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.T))
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((RAS_TO_LPS @ affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin((RAS_TO_LPS @ affine[:3, 3]).tolist())
    return image


def corrected_bias(scan: Scan, mask: torch.Tensor) -> torch.Tensor:
    """Values of a scan divided by its bias field, which N4 fits inside a mask; ``(1, 1, D, H, W)`` float32."""
    sitk = require("SimpleITK")
    inside = (mask & (scan.values > 0))[0, 0].numpy().astype(np.uint8)
    image = _to_itk(scan.values[0, 0].numpy(), scan.affine)
    shrink = [max(1, min(round(BIAS_MM / edge), side // 4)) for edge, side in zip(scan.spacing_mm, scan.shape)]  # noqa: B905
    filter_ = sitk.N4BiasFieldCorrectionImageFilter()
    filter_.Execute(sitk.Shrink(image, shrink), sitk.Shrink(_to_itk(inside, scan.affine), shrink))
    bias = np.exp(sitk.GetArrayFromImage(filter_.GetLogBiasFieldAsImage(image)).T)
    return scan.values / torch.from_numpy(np.ascontiguousarray(bias, dtype=np.float32))


def affine_to_frame(
    values: torch.Tensor,
    mask: torch.Tensor,
    affine: np.ndarray,
    name: str = "scan",
    contrast: str = "t1",
    recipe: str = "direct",
) -> np.ndarray:
    """The affine from the LUMIR frame to a scan, by the correlation of its brain with the template's.

    Starts from the header's orientation, with centres of mass and volumes made equal. For any contrast the brains'
    masks are correlated first, and then the mutual information of the images is maximized from there. With the recipe
    "lumir" the mean squared difference of a T1 brain and the template is minimized.

    Args:
        values: Values of the scan, ``(1, 1, D, H, W)``.
        mask: Mask of the brain, same shape, bool.
        affine: Matrix 4 x 4 from the scan's voxels to its world, in mm.
        name: Name of the scan, for the message.
        contrast: Contrast of the scan, "t1" or "any".
        recipe: Name, one of :data:`RECIPES`.

    Returns:
        4 x 4: world of the frame in mm to world of the scan in mm.

    Raises:
        ValueError: an empty mask, or a search that fails.
    """
    sitk = require("SimpleITK")
    template = template_in_frame(TEMPLATE_MM)
    target = frame_affine(TEMPLATE_MM)
    if not mask.any():
        raise ValueError(f"{name}: the brain's mask is empty")
    brain = up_to_one(torch.where(mask, values, values.new_zeros(())))
    here, there = _center(mask, affine), _center(template > 0.02, target)
    scale = (
        float(mask.sum()) * abs(np.linalg.det(affine[:3, :3])) / (float((template > 0.02).sum()) * TEMPLATE_MM**3)
    ) ** (1 / 3)
    found = sitk.AffineTransform(3)
    found.SetCenter((RAS_TO_LPS @ there).tolist())
    found.SetMatrix((scale * np.eye(3)).ravel().tolist())
    found.SetTranslation((RAS_TO_LPS @ (here - there)).tolist())
    by_squares = recipe == "lumir"
    target_image = (up_to_one(template) if by_squares else template)[0, 0].numpy()
    ours = _to_itk(target_image, target), _to_itk(brain[0, 0].numpy(), affine)
    searches = [("MeanSquares" if by_squares else "Correlation", *ours)]
    if contrast == "any":
        masks = (template > 0.02).float(), mask.float()
        of_masks = (_to_itk(m[0, 0].numpy(), on) for m, on in zip(masks, (target, affine), strict=True))
        searches = [("Correlation", *of_masks), ("MattesMutualInformation", *ours)]
    try:
        for metric, *images in searches:
            _search(found, metric).Execute(*images)
    except RuntimeError as error:
        raise ValueError(f"{name}: no affine to the template was found: {error}") from error
    matrix, center = np.reshape(found.GetMatrix(), (3, 3)), np.array(found.GetCenter())
    to_scan = np.eye(4)
    to_scan[:3, :3] = RAS_TO_LPS @ matrix @ RAS_TO_LPS
    to_scan[:3, 3] = RAS_TO_LPS @ (np.array(found.GetTranslation()) + center - matrix @ center)
    return to_scan


def _search(found: object, metric: str) -> object:
    """SimpleITK's search for an affine by one of its metrics, which starts at the one that is given, and changes it."""
    sitk = require("SimpleITK")
    search = sitk.ImageRegistrationMethod()
    getattr(search, f"SetMetricAs{metric}")(*([32] if metric == "MattesMutualInformation" else []))
    search.SetInterpolator(sitk.sitkLinear)
    search.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-2, 100, 0.5, 1e-8)  # steps in mm
    search.SetOptimizerScalesFromPhysicalShift()
    search.SetShrinkFactorsPerLevel([2, 1])
    search.SetSmoothingSigmasPerLevel([2, 1])
    search.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    search.SetInitialTransform(found, inPlace=True)
    return search


def up_to_one(values: torch.Tensor) -> torch.Tensor:
    """Values of a brain on a background of zero, divided by their 99.9th percentile; what is beyond 0 or 1 is cut."""
    return (values / float(np.percentile(values[values > 0].numpy(), 99.9))).clamp(0, 1)


def _center(mask: torch.Tensor, affine: np.ndarray) -> np.ndarray:
    """Mean place of a mask's voxels, in mm."""
    return (affine @ np.append(torch.nonzero(mask[0, 0]).double().mean(0).numpy(), 1.0))[:3]


# a scan ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PreparedScan:
    """A scan with what has been found out about it; nothing is interpolated until it is asked for.

    Attributes:
        scan: Scan as it lies in its file.
        corrected: Values of the scan without bias field, not negative, on its own grid, ``(1, 1, D, H, W)`` float32.
        mask: Mask of the brain, ``(1, 1, D, H, W)`` bool, on the scan's own grid.
        to_scan: Matrix 4 x 4, world of the frame in mm to world of the scan in mm.
        skipped: Steps that were not done.
        seconds: Seconds of each step.
        recipe: How it comes to the frame, one of :data:`RECIPES`.
    """

    scan: Scan
    corrected: torch.Tensor
    mask: torch.Tensor
    to_scan: np.ndarray
    skipped: tuple[str, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    recipe: str = "direct"

    @cached_property
    def _spline(self) -> np.ndarray:
        """Coefficients ``(D, H, W)`` float32 of the cubic B-spline through the scan's values."""
        return spline_filter(self.corrected[0, 0].numpy(), output=np.float32)

    def brain_at(self, points: torch.Tensor) -> torch.Tensor:
        """Values at world points ``(1, 3, ...)`` of the scan, above zero in the brain; zero outside it.

        By a cubic spline, which blurs less than linear interpolation; by the latter where the spline is not above zero,
        so that no voxel of the brain becomes background. The mask is interpolated apart and cut at one half, so that
        the brain's edge is as bright as it is in the scan.
        """
        voxels = transform(np.linalg.inv(self.scan.affine), points)
        inside = spatial.sample(self.mask.float(), voxels) >= 0.5
        values = torch.zeros_like(inside, dtype=torch.float32)
        of_brain = voxels.movedim(1, 0)[:, inside[:, 0]]
        smooth = torch.from_numpy(map_coordinates(self._spline, of_brain.numpy(), mode="mirror", prefilter=False))
        below = ~(smooth > 0)
        linear = spatial.sample(self.corrected, of_brain[None, :, below, None, None].float())
        smooth[below] = linear.flatten().clamp(min=0)
        values[inside] = smooth
        return values

    @cached_property
    def in_frame(self) -> torch.Tensor:
        """The brain on the frame's grid, as the cohorts are: ``(1, 1, 160, 224, 192)`` float32, 0 ... 255.

        Whole numbers; the 99.9th percentile of the brain is 255, the background 0 and nothing else is. With the recipe
        "lumir" the percentile is that of the scan's own voxels, and the brain's rim fades into the background.
        """
        if self.recipe == "lumir":
            image, affine = self.at_1mm()
            found = torch.empty(1, 1, *FRAME_SHAPE)
            for planes, points in world_slabs(FRAME_SHAPE, frame_affine(1)):
                found[:, :, planes] = sample_world(image, affine, transform(self.to_scan, points))
            if not found.any():
                raise ValueError(f"{self.scan.path}: {NOT_IN_FRAME}")
            return (found * 255).round_()
        return as_cohort(self.resampled(lambda points: transform(self.to_scan, points)), str(self.scan.path))

    def at_1mm(self) -> tuple[torch.Tensor, np.ndarray]:
        """The brain in [0, 1] on voxels of about 1 mm along the scan's own axes, and their affine.

        As the organizers have it: a spline of order 2 through values taken for its coefficients, which blurs a little,
        and outermost voxels that stay where they are.
        """
        brain = up_to_one(torch.where(self.mask, self.corrected, self.corrected.new_zeros(())))[0, 0].numpy()
        found = zoom(brain, self.scan.spacing_mm, order=2, prefilter=False, mode="constant")
        steps = [(old - 1) / max(new - 1, 1) for old, new in zip(brain.shape, found.shape, strict=True)]
        return torch.from_numpy(found)[None, None], self.scan.affine @ np.diag([*steps, 1.0])

    def resampled(self, places: Callable[[torch.Tensor], torch.Tensor], every: int = 1) -> torch.Tensor:
        """The brain, ``(1, 1, 160, 224, 192)`` float32 in the scan's units, where a function puts the frame's points.

        Args:
            places: Function from world points of the frame ``(1, 3, ...)`` to world points of the scan.
            every: Take every voxel of the frame, or every second along each axis, and so on; sides are divided by it.
        """
        shape, affine = [side // every for side in FRAME_SHAPE], frame_affine(1) @ np.diag([*[every] * 3, 1.0])
        values = torch.empty(1, 1, *shape)
        for planes, points in world_slabs(shape, affine):
            values[:, :, planes] = self.brain_at(places(points))
        return values

    def mask_in_frame(self, mask: torch.Tensor) -> torch.Tensor:
        """A mask ``(1, 1, D, H, W)`` bool of the scan on the frame's grid, nearest: ``(1, 1, 160, 224, 192)`` bool."""
        found = torch.empty(1, 1, *FRAME_SHAPE, dtype=torch.bool)
        to_voxels = np.linalg.inv(self.scan.affine) @ self.to_scan
        for planes, points in world_slabs(FRAME_SHAPE, frame_affine(1)):
            found[:, :, planes] = spatial.sample_nearest(mask, transform(to_voxels, points))
        return found

    @property
    def brain_ml(self) -> float:
        """Volume of the brain."""
        return float(self.mask.sum()) * abs(np.linalg.det(self.scan.affine[:3, :3])) / 1000


def as_cohort(values: torch.Tensor, name: str) -> torch.Tensor:
    """Intensities of a brain as LUMIR's: whole numbers, its 99.9th percentile at 255, the background alone at 0."""
    brain = values > 0
    if not brain.any():
        raise ValueError(f"{name}: {NOT_IN_FRAME}")
    white = float(np.percentile(values[brain].numpy(), 99.9))
    return torch.where(brain, (values / white * 255).round().clamp(1, 255), values.new_zeros(()))


def prepare_scan(
    path: str | Path | Scan,
    skip: Iterable[str] = (),
    device: torch.device | str = "cpu",
    step_done: Callable[[str], object] = lambda step: None,
    contrast: str = "t1",
    recipe: str = "direct",
) -> PreparedScan:
    """Find brain, bias field and place in the LUMIR frame of a T1 scan.

    Args:
        path: Path of a NIfTI file, any orientation and spacing; or a scan that was read.
        skip: Steps of :data:`STEPS` that have been done before: "strip" (its background is constant), "bias", "affine"
            (its world coordinates are those of the frame, on whatever grid).
        device: Device that the skull is stripped on.
        step_done: Function that is called with each of :data:`STEPS` when it is done.
        contrast: Contrast of the scan, "t1" or "any", see :func:`affine_to_frame`.
        recipe: Name, one of :data:`RECIPES`: "direct", or "lumir" for what the challenge's organizers publish, with
            deepbet and SimpleITK in place of SynthStrip and ANTs (DEVIATIONS.md, S1).

    Raises:
        FileNotFoundError, ValueError: as :func:`read_scan`; a step that fails.
        ModuleNotFoundError: a package that a step needs, with the command that installs it.
    """
    skipped = check_skip(skip)
    check_choice(recipe, RECIPES, "recipe")
    seconds: dict[str, float] = {}
    scan = path if isinstance(path, Scan) else read_scan(path)

    def timed(step: str, work, otherwise):
        started = time.perf_counter()
        found = otherwise() if step in skipped else work()
        seconds[step] = 0.0 if step in skipped else round(time.perf_counter() - started, 2)
        step_done(step)
        return found

    mask = timed("strip", lambda: brain_mask(scan, device), lambda: stripped_mask(scan))
    positive = replace(scan, values=above_zero(scan, mask))
    corrected = timed("bias", lambda: corrected_bias(positive, mask), lambda: positive.values)
    name = str(scan.path)
    to_scan = timed(
        "affine", lambda: affine_to_frame(corrected, mask, scan.affine, name, contrast, recipe), lambda: np.eye(4)
    )
    return PreparedScan(scan, corrected, mask, to_scan, skipped, seconds, recipe)


def template_correlation(image: torch.Tensor) -> float:
    """Pearson correlation of a prepared brain (1, 1, 160, 224, 192) with the template, inside the latter's brain."""
    template = template_in_frame(TEMPLATE_MM)
    coarse = torch.nn.functional.avg_pool3d(image.float(), TEMPLATE_MM)
    return correlation(coarse, template, template > 0.02)
