"""The loss of one pair for instance optimization: masked, and for scans of any contrast.

What a mask leaves out counts nowhere: not in the window of a correlation, not in a descriptor's patch, not in the
smoothing between two levels. MIND-SSC (Heinrich et al., MICCAI 2013) describes each voxel by how alike the patches
around it are, which an inverted or remapped contrast leaves as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F

from lumirlib import spatial
from lumirlib._checks import check_choice, check_image, check_same_grid
from lumirlib.losses._kernels import NCC_EPSILON
from lumirlib.losses.multilevel import gaussian_smooth
from lumirlib.losses.smoothness import diffusion_loss

#: Similarities of :class:`PairLoss`.
PAIR_SIMILARITIES = ("ncc", "mind")
#: Distance of the patches that MIND-SSC compares from the voxel, and the patches' half side, in voxels.
MIND_REACH = 2
MIND_RADIUS = 1
#: A warped voxel counts if at most so much of it is of voxels that do not.
TRACE = 1e-3


def _mean_of_windows(image: torch.Tensor, side: int) -> torch.Tensor:
    """Mean over a cube of `side` voxels, axis by axis; voxels outside are zero and are counted."""
    image = F.pad(image, [side // 2] * 6)
    for axis in range(3):
        kernel = [1, 1, 1]
        kernel[axis] = side
        image = F.avg_pool3d(image, kernel, 1)
    return image


def masked_ncc_loss(warped: torch.Tensor, fixed: torch.Tensor, counts: torch.Tensor, window: int = 9) -> torch.Tensor:
    """:func:`lumirlib.losses.ncc_loss` of the voxels that count: window sums and the mean over voxels are of those.

    Where all voxels count, windows at the border take the voxels inside the image, and not zeros beyond it.

    Args:
        warped: Warped moving image ``(B, 1, D, H, W)``.
        fixed: Fixed image ``(B, 1, D, H, W)``.
        counts: Which voxels count, ``(B, 1, D, H, W)``, 1 or 0.
        window: Side of the cubic window in voxels, odd.

    Returns:
        A scalar in [0, 1], differentiable as often as PyTorch can.

    Raises:
        ValueError: shapes that differ, an even window, or no voxel that counts.
    """
    for image, name in ((warped, "warped"), (fixed, "fixed"), (counts, "counts")):
        check_image(image, name)
        check_same_grid(image, fixed, name, "fixed")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be odd and positive, got {window}")
    counts = counts.to(torch.float64)
    if not counts.any():
        raise ValueError("counts must have a voxel that counts, got none")
    w, f = warped.double() * counts, fixed.double() * counts
    share = _mean_of_windows(counts, window).clamp_min(1 / window**3)  # of a window's voxels that count
    mean_w, mean_f = _mean_of_windows(w, window) / share, _mean_of_windows(f, window) / share
    volume = share * window**3
    covariance = volume * (_mean_of_windows(w * f, window) / share - mean_w * mean_f)
    variance_w = volume * (_mean_of_windows(w * w, window) / share - mean_w * mean_w).clamp_min(0)
    variance_f = volume * (_mean_of_windows(f * f, window) / share - mean_f * mean_f).clamp_min(0)
    squared = (covariance.square() / (variance_w * variance_f + NCC_EPSILON)).clamp_max(1)
    return (1 - (squared * counts).sum() / counts.sum()).to(torch.promote_types(warped.dtype, torch.float32))


def mind_ssc(image: torch.Tensor) -> torch.Tensor:
    """MIND-SSC descriptors of an image: how unlike the patches of twelve pairs of neighbours are, as ``exp(-D / V)``.

    The neighbours lie :data:`MIND_REACH` voxels along each axis; a pair is of two axes. D is the mean squared
    difference of two patches less the smallest of the twelve, V the mean of these at the voxel.

    Args:
        image: Image ``(B, 1, D, H, W)``, floating point; beyond its border it goes on as there.

    Returns:
        ``(B, 12, D, H, W)`` in (0, 1], the same for ``a * image + b`` of any a that is not zero.
    """
    check_image(image)
    reach = MIND_REACH
    padded = F.pad(image.float(), [reach] * 6, mode="replicate")
    steps = [(axis, side) for axis in range(3) for side in (-reach, reach)]

    def beside(step: tuple[int, int]) -> torch.Tensor:
        start = [reach + step[1] * (step[0] == axis) for axis in range(3)]
        i, j, k = (slice(first, first + side) for first, side in zip(start, image.shape[2:], strict=True))
        return padded[:, :, i, j, k]

    apart = torch.cat(
        [
            _mean_of_windows((beside(one) - beside(other)).square(), 2 * MIND_RADIUS + 1)
            for one, other in combinations(steps, 2)
            if one[0] != other[0]
        ],
        dim=1,
    )
    apart -= apart.amin(1, keepdim=True)
    scale = apart.mean(1, keepdim=True)
    typical = scale.mean((2, 3, 4), keepdim=True)
    return torch.exp(-apart / torch.maximum(scale, 1e-3 * typical).clamp_min(1e-12))


class PairLoss:
    """Loss of one pair, as :class:`lumirlib.methods.instance_optimization.InstanceOptimization` takes it.

    ``sum_l 2^-l (similarity_weight similarity_l + smoothness_weight smoothness_l)`` as in
    :func:`lumirlib.losses.registration_loss`. For "mind", similarity is the mean squared difference of descriptors,
    those of the moving image being warped.

    Args:
        fixed: Fixed image ``(1, 1, D, H, W)`` in [0, 1].
        moving: Moving image ``(1, 1, D, H, W)`` in [0, 1].
        shapes: Sides of each level, finest first.
        fixed_counts: Which voxels of the fixed image count, ``(1, 1, D, H, W)``, 1 or 0; None for all.
        moving_counts: The same of the moving image.
        similarity: Name of the similarity, one of :data:`PAIR_SIMILARITIES`.
        similarity_weight: Weight of the similarity.
        smoothness_weight: Weight of the smoothness.
        window: Side of the window of "ncc" in voxels.
        passes: Number of velocities of a level.

    Raises:
        ValueError: shapes that differ, or an unknown similarity.
    """

    def __init__(
        self,
        fixed: torch.Tensor,
        moving: torch.Tensor,
        shapes: Sequence[Sequence[int]],
        fixed_counts: torch.Tensor | None = None,
        moving_counts: torch.Tensor | None = None,
        similarity: str = "ncc",
        similarity_weight: float = 1.0,
        smoothness_weight: float = 6.0,
        window: int = 9,
        passes: int = 1,
    ) -> None:
        check_same_grid(moving, fixed, "moving", "fixed")
        check_choice(similarity, PAIR_SIMILARITIES, "similarity")
        self.similarity, self.window, self.passes = similarity, window, passes
        self.similarity_weight, self.smoothness_weight = similarity_weight, smoothness_weight
        self.fixed = self._levels(fixed, fixed_counts, shapes)
        self.moving = self._levels(moving, moving_counts, shapes)

    def _levels(
        self, image: torch.Tensor, counts: torch.Tensor | None, shapes: Sequence[Sequence[int]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What is compared at each level, and which voxels of it count."""
        counts = torch.ones_like(image) if counts is None else counts.to(image)
        check_same_grid(counts, image, "counts", "image")
        levels, whole = [(image * counts, counts)], torch.ones_like(counts)
        for shape in shapes[1:]:
            image, counts = levels[-1]
            share, whole = (spatial.resize(gaussian_smooth(one), shape) for one in (counts, whole))
            smooth = spatial.resize(gaussian_smooth(image), shape) / share.clamp_min(1e-3)
            counts = (share >= 0.5 * whole).to(image)
            levels.append((smooth * counts, counts))
            whole = torch.ones_like(counts)
        if self.similarity == "ncc":
            return levels
        side = 2 * (MIND_REACH + MIND_RADIUS) + 1
        # less one, so that the background is zero, as what a warp finds outside
        return [(mind_ssc(image) - 1, 1 - F.max_pool3d(1 - counts, side, 1, side // 2)) for image, counts in levels]

    def __call__(self, predicted: object, fixed: torch.Tensor, moving: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scalars "total", "similarity" and "smoothness".

        Args:
            predicted: Displacements and velocities by level, as :class:`lumirlib.models.backbone.Fields` has them.
            fixed: Fixed image; that of the pair.
            moving: Moving image; that of the pair.
        """
        similarity, smoothness = (torch.zeros((), device=fixed.device) for _ in range(2))
        levels = zip(self.fixed, self.moving, predicted.displacements[:: self.passes], strict=True)
        for level, ((of_fixed, counts), (of_moving, moving_counts), displacement) in enumerate(levels):
            with torch.no_grad():
                counts = counts * (spatial.warp(1 - moving_counts, displacement) <= TRACE)
            warped = spatial.warp(of_moving, displacement)
            if not counts.any():  # of a small level all may be masked
                continue
            if self.similarity == "ncc":
                found = masked_ncc_loss(warped, of_fixed, counts, self.window)
            else:
                found = ((warped - of_fixed).square().mean(1, keepdim=True) * counts).sum() / counts.sum()
            similarity = similarity + 2.0**-level * found
        for entry, velocity in enumerate(predicted.velocities):
            smoothness = smoothness + 2.0 ** -(entry // self.passes) * diffusion_loss(velocity)
        total = self.similarity_weight * similarity + self.smoothness_weight * smoothness
        return {"total": total, "similarity": similarity, "smoothness": smoothness}
