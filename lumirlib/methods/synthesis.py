"""SynthMorph's generator: images made from label maps, without any acquired image.

After Hoffmann et al., IEEE TMI 41(3), 2022: labels are moved by a random smooth diffeomorphism, each label gets a
random mean and standard deviation, and the picture is blurred, multiplied by a bias field, scaled to [0, 1] and given
a random gamma. Anatomy has lengths in mm, so deformation and bias field are set in mm and fit any grid; blur and noise
come from the imaging and are set in voxels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lumirlib import spatial
from lumirlib._checks import check_labels
from lumirlib.losses import gaussian_smooth

#: Labels from this number on are cortical parcels in LUMIR's numbering (BrainCOLOR).
CORTEX_FROM = 100
#: (right, left) labels of the structures below :data:`CORTEX_FROM`; cortical parcels are (even, odd).
MIRRORED_PAIRS = (
    (23, 30),
    (31, 32),
    (36, 37),
    (38, 39),
    (40, 41),
    (44, 45),
    (47, 48),
    (49, 50),
    (51, 52),
    (55, 56),
    (57, 58),
    (59, 60),
    (61, 62),
    (75, 76),
)


@dataclass(frozen=True)
class SynthesisOptions:
    """Ranges that the generator draws from.

    Attributes:
        resolution_mm: Edge of a voxel of the label maps, in mm; turns the lengths in mm below into voxels.
        mean_low: Lowest mean of a label, as a share of the intensity range.
        mean_high: Highest mean of a label, as a share of the intensity range.
        sigma_low: Lowest standard deviation within a label, as a share of the intensity range.
        sigma_high: Highest standard deviation within a label, as a share of the intensity range.
        blur_voxels: Highest standard deviation of the Gaussian blur; the lowest is 0.
        bias_sigma: Highest standard deviation of the logarithm of the bias field; the lowest is 0.
        bias_spacing_mm: Distance of the bias field's nodes.
        gamma_sigma: Standard deviation of the logarithm of the gamma exponent.
        noise_sigma: Highest standard deviation of the noise that is added behind the blur; the lowest is 0.
        zero_background: Probability that label 0 is exactly zero, as in skull-stripped images.
        mirrored: Probability that left and right structures share their mean and standard deviation.
        shared_cortex: Probability that all cortical labels share their mean and standard deviation.
        warp_sigma_mm: Highest standard deviation of the velocity at its nodes; the lowest is 0.
        warp_spacing_mm: Distance of the velocity's nodes.
        squarings: Number of squarings of the velocity's integration.
    """

    resolution_mm: float = 1.0
    mean_low: float = 0.1
    mean_high: float = 0.9
    sigma_low: float = 0.02
    sigma_high: float = 0.1
    blur_voxels: float = 1.0
    bias_sigma: float = 0.3
    bias_spacing_mm: float = 40.0
    gamma_sigma: float = 0.25
    noise_sigma: float = 0.02
    zero_background: float = 0.5
    mirrored: float = 0.5
    shared_cortex: float = 0.5
    warp_sigma_mm: float = 3.0
    warp_spacing_mm: float = 16.0
    squarings: int = 7

    def __post_init__(self) -> None:
        for option in ("resolution_mm", "bias_spacing_mm", "warp_spacing_mm"):
            if not 0 < getattr(self, option) < math.inf:
                raise ValueError(f"{option} must be above 0, got {getattr(self, option)}")
        for option in ("blur_voxels", "bias_sigma", "gamma_sigma", "noise_sigma", "warp_sigma_mm"):
            if not 0 <= getattr(self, option) < math.inf:
                raise ValueError(f"{option} must be 0 or more, got {getattr(self, option)}")
        for option in ("zero_background", "mirrored", "shared_cortex"):
            if not 0 <= getattr(self, option) <= 1:
                raise ValueError(f"{option} must be a probability from 0 to 1, got {getattr(self, option)}")
        for low, high in (("mean_low", "mean_high"), ("sigma_low", "sigma_high")):
            if not 0 <= getattr(self, low) <= getattr(self, high):
                raise ValueError(f"{low} must be from 0 to {high}, got {getattr(self, low)} and {getattr(self, high)}")


def _uniform(generator: torch.Generator, low: float, high: float, count: int = 1) -> torch.Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _smooth_noise(shape: Sequence[int], spacing: float, channels: int, generator: torch.Generator) -> torch.Tensor:
    """Standard normal values at nodes about `spacing` voxels apart, linear between: ``(1, channels, D, H, W)``."""
    nodes = [max(2, round((side - 1) / spacing) + 1) for side in shape]
    return spatial.resize(torch.randn(1, channels, *nodes, generator=generator), shape)


def random_deformation(
    shape: Sequence[int],
    generator: torch.Generator,
    options: SynthesisOptions | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """A random diffeomorphism: Gaussian velocity at coarse nodes, linear between them, integrated.

    Computed on the grid of half the resolution, as SynthMorph does it.

    Args:
        shape: Sides (D, H, W) of the result, each at least 3.
        generator: Generator of random numbers, on the CPU.
        options: Options, see :class:`SynthesisOptions`; the defaults if None.
        device: Device to integrate on; the random numbers are the same everywhere.

    Returns:
        Displacement ``(1, 3, D, H, W)`` in voxels.

    Raises:
        ValueError: `shape` does not have three sides of at least 3 voxels.
    """
    options = options or SynthesisOptions()
    shape = tuple(int(side) for side in shape)
    if len(shape) != 3 or min(shape) < 3:
        raise ValueError(f"shape must be three sides of at least 3 voxels, got {shape}")
    half = [-(-side // 2) for side in shape]
    half_mm = 2 * options.resolution_mm
    sigma = float(_uniform(generator, 0, options.warp_sigma_mm)) / half_mm
    velocity = sigma * _smooth_noise(half, options.warp_spacing_mm / half_mm, 3, generator)
    displacement = spatial.integrate(velocity.to(device), options.squarings)
    return spatial.resize_displacement(displacement, shape)


def deform_labels(
    labels: torch.Tensor, generator: torch.Generator, options: SynthesisOptions | None = None
) -> torch.Tensor:
    """Labels moved by a :func:`random_deformation`, nearest neighbour; shape, dtype and device of `labels`."""
    check_labels(labels)
    return spatial.warp(labels, random_deformation(labels.shape[2:], generator, options, labels.device), "nearest")


def _tissues(present: torch.Tensor, generator: torch.Generator, options: SynthesisOptions) -> torch.Tensor:
    """For each label number of `present` the index of its tissue; labels of one tissue look alike."""
    tissue = present.long().clone()
    if float(_uniform(generator, 0, 1)) < options.mirrored:
        for right, left in MIRRORED_PAIRS:
            tissue[present == left] = right
        tissue = torch.where(present >= CORTEX_FROM, tissue - tissue % 2, tissue)
    if float(_uniform(generator, 0, 1)) < options.shared_cortex:
        tissue = tissue.clamp_max(CORTEX_FROM)
    return tissue.unique(return_inverse=True)[1]


@dataclass(frozen=True)
class Contrast:
    """How tissues look in one image: what :func:`draw_contrast` draws.

    Attributes:
        means: Means of the label numbers from 0, ``(numbers,)``.
        sigmas: Standard deviations within the label numbers from 0, ``(numbers,)``.
        stripped: Whether label 0 is exactly zero.
        gamma: Exponent of the intensities.
    """

    means: torch.Tensor
    sigmas: torch.Tensor
    stripped: bool
    gamma: float


def draw_contrast(
    numbers: Sequence[int], generator: torch.Generator, options: SynthesisOptions | None = None
) -> Contrast:
    """A random contrast of the labels of one image, or of several that are to look alike.

    Args:
        numbers: Labels that need one.
        generator: Generator of random numbers, on the CPU.
        options: Options, see :class:`SynthesisOptions`; the defaults if None.
    """
    options = options or SynthesisOptions()
    present = torch.tensor(sorted(set(numbers)))
    tissue = _tissues(present, generator, options)
    drawn = {}
    for name in ("mean", "sigma"):
        low, high = getattr(options, f"{name}_low"), getattr(options, f"{name}_high")
        drawn[name] = torch.zeros(int(present.max()) + 1)
        drawn[name][present] = _uniform(generator, low, high, len(present))[tissue]
    stripped = float(_uniform(generator, 0, 1)) < options.zero_background
    if stripped:
        drawn["mean"][0] = drawn["sigma"][0] = 0.0
    gamma = math.exp(options.gamma_sigma * float(torch.randn(1, generator=generator)))
    return Contrast(drawn["mean"], drawn["sigma"], stripped, gamma)


def synthesize(
    labels: torch.Tensor,
    generator: torch.Generator,
    options: SynthesisOptions | None = None,
    contrast: Contrast | None = None,
) -> torch.Tensor:
    """An image of random contrast from a label map.

    In this order: a normal value for each voxel with its label's mean and standard deviation; blur; bias field;
    noise; scaling of the range to [0, 1]; gamma.

    Args:
        labels: Label map ``(1, 1, D, H, W)``, integers, 0 is the background; the labels are not deformed here.
        generator: Generator of random numbers, on the CPU.
        options: Options, see :class:`SynthesisOptions`; the defaults if None.
        contrast: Contrast of these labels, from :func:`draw_contrast`; drawn here if None.

    Returns:
        ``(1, 1, D, H, W)`` float32 in [0, 1], on the device of `labels`.

    Raises:
        ValueError: `labels` is not (1, 1, D, H, W), holds negative numbers, or one that the contrast lacks.
        TypeError: `labels` does not hold integers.
    """
    options = options or SynthesisOptions()
    check_labels(labels)
    if labels.shape[0] != 1:
        raise ValueError(f"labels must be (1, 1, D, H, W), got {tuple(labels.shape)}")
    shape, device = tuple(labels.shape[2:]), labels.device
    contrast = contrast or draw_contrast(labels.unique().tolist(), generator, options)
    if int(labels.max()) >= len(contrast.means):
        raise ValueError(f"contrast must be of labels up to {int(labels.max())}, got {len(contrast.means) - 1}")

    def noise() -> torch.Tensor:
        return torch.randn(labels.shape, generator=generator).to(device)

    place = labels.long()
    image = contrast.means.to(device)[place] + contrast.sigmas.to(device)[place] * noise()
    width = float(_uniform(generator, 0, options.blur_voxels))
    if width > 0:
        reach = math.ceil(3 * width)
        padded = F.pad(image, [reach] * 6, mode="replicate")  # with zeros a bright background would darken at the edge
        image = gaussian_smooth(padded, width, 2 * reach + 1)[(..., *[slice(reach, -reach)] * 3)]
    strength = float(_uniform(generator, 0, options.bias_sigma))
    bias = _smooth_noise(shape, options.bias_spacing_mm / options.resolution_mm, 1, generator)
    image = image * (strength * bias).exp().to(device)
    added = float(_uniform(generator, 0, options.noise_sigma)) * noise()
    # a stripped background stays exactly zero, except for what the blur has put there
    kept = torch.where(image > 0, added, added.new_zeros(())) if contrast.stripped else added
    image = (image + kept).clamp_min(0)
    low, high = image.min(), image.max()
    image = (image - low) / (high - low).clamp_min(torch.finfo(image.dtype).tiny)
    return image**contrast.gamma
