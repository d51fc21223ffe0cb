"""Forces (FORCE): where the losses of the result would have each voxel moved.

The slope of a similarity by the displacement is its slope by the warped image times that image's gradient. A network
that is given it learns how to descend, as in GradIRN (Qiu et al., "Embedding gradient-based optimization in image
registration networks", MICCAI 2022). Here both images take part, as in symmetric demons (Vercauteren et al.,
"Diffeomorphic demons", NeuroImage 45(1), 2009): exchanged images give the forces with another sign.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lumirlib import spatial
from lumirlib.losses.multilevel import gaussian_pyramid
from lumirlib.losses.similarity import ncc_slope
from lumirlib.losses.tissue import tissue_maps

#: Channels of :func:`forces`: three components of either force.
FORCE_CHANNELS = 6
#: Window of the correlation in voxels of each level.
WINDOW = 5
#: Factor on the correlation's force, which brings either to some tenths where images disagree; and the largest value
#: that is passed on.
SCALE, LARGEST = 0.4, 5.0
#: Planes that are worked on at a time: what fits into a processor's cache takes half of the time.
SLAB = 8


def force_maps(image: torch.Tensor, shapes: Sequence[Sequence[int]], block: int = 1) -> list[torch.Tensor]:
    """What the forces of each level compare: the image and its tissues.

    Args:
        image: Brains ``(B, 1, D, H, W)`` in [0, 1], zero outside.
        shapes: Sides of each level, finest first.
        block: As of :func:`lumirlib.losses.tissue.tissue_maps`.

    Returns:
        One tensor ``(B, 4, D_l, H_l, W_l)`` per level; without a gradient.
    """
    with torch.no_grad(), spatial.without_autocast(image.device):
        tissues = [tissue_maps(image, block)]
        for shape in shapes[1:]:
            tissues.append(spatial.resize(tissues[-1], shape))
        images = gaussian_pyramid(image, shapes)
        return [torch.cat([one, maps.to(one.dtype)], dim=1) for one, maps in zip(images, tissues, strict=True)]


def _inside(maps: torch.Tensor, axis: int) -> torch.Tensor:
    return maps.narrow(2 + axis, 1, maps.shape[2 + axis] - 2)


def _slope(maps: torch.Tensor, axis: int) -> torch.Tensor:
    """Central differences along an axis, without its first and last plane."""
    size = maps.shape[2 + axis] - 2
    return (maps.narrow(2 + axis, 2, size) - maps.narrow(2 + axis, 0, size)) / 2


def forces(fixed: torch.Tensor, warped: torch.Tensor) -> torch.Tensor:
    """Forces of local correlation and of tissues at every voxel.

    Args:
        fixed: Maps of the fixed image ``(B, 4, D, H, W)``, as :func:`force_maps` gives them.
        warped: Those of the moving one, warped, same shape.

    Returns:
        ``(B, 6, D, H, W)``: first those of the correlation, then those of the tissues, along i, j and k, from -5 to 5;
        without a gradient. A displacement along them makes the images more alike.
    """
    with torch.no_grad(), spatial.without_autocast(fixed.device):
        images = fixed[:, :1].contiguous(), warped[:, :1].contiguous()
        given = fixed, warped, ncc_slope(*images, WINDOW), ncc_slope(*reversed(images), WINDOW)
        parts, depth = [], fixed.shape[2]
        for first in range(0, depth, SLAB):
            low, high = max(0, first - 1), min(depth, first + SLAB + 1)
            part = _forces(*(maps[:, :, low:high] for maps in given))
            parts.append(part[:, :, first - low : first - low + SLAB])
        return torch.cat(parts, dim=2)


def _forces(fixed: torch.Tensor, warped: torch.Tensor, by_fixed: torch.Tensor, by_warped: torch.Tensor) -> torch.Tensor:
    """:func:`forces` from the slopes of the correlation by either image; zero on the first and last voxels."""
    found = fixed.new_zeros(len(fixed), FORCE_CHANNELS, *fixed.shape[2:])
    difference, total = fixed[:, 1:] - warped[:, 1:], fixed[:, 1:] + warped[:, 1:]
    for axis in range(3):
        inner = _inside(found, axis)
        of_fixed, of_warped = _slope(fixed[:, :1], axis), _slope(warped[:, :1], axis)
        inner[:, axis] = SCALE * (_inside(by_fixed, axis) * of_fixed - _inside(by_warped, axis) * of_warped)[:, 0]
        inner[:, 3 + axis] = (_inside(difference, axis) * _slope(total, axis)).sum(1)
    return found.clamp_(-LARGEST, LARGEST)
