"""Registration of images of which a part does not count, such as a lesion or a resection.

What is masked in one image is filled from the other one, as the affine has placed it. So nothing there asks for a
displacement, and the method sees two whole brains. Filling from the other side of the same brain is known from lesions
(Nachev et al., "Enantiomorphic normalization of focally lesioned brains", NeuroImage 39(3), 2008).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lumirlib._checks import check_same_grid
from lumirlib.evaluation import Method


class Filled(nn.Module):
    """A method for one pair, with what is masked in either image filled from the other one, or empty in both.

    Args:
        method: Function of two images that returns the displacement; a network is one.
        fixed_mask: What does not count in the fixed image, ``(1, 1, D, H, W)`` bool; None for nothing.
        moving_mask: The same of the moving image.
        block: Voxels of a mask along each edge of those that the method works on; one that is masked in part is masked.
    """

    def __init__(
        self, method: Method, fixed_mask: torch.Tensor | None, moving_mask: torch.Tensor | None, block: int = 1
    ) -> None:
        super().__init__()
        self.method = method
        masks = (None if mask is None else F.max_pool3d(mask.float(), block) > 0 for mask in (fixed_mask, moving_mask))
        self.fixed_mask, self.moving_mask = masks

    @property
    def last_run(self) -> dict[str, float]:
        """Figures of the method's last call; none if it keeps none."""
        return getattr(self.method, "last_run", {})

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """Displacement ``(1, 3, D, H, W)`` in voxels that carries `moving` onto `fixed`.

        Args:
            fixed: Fixed image ``(1, 1, D, H, W)``.
            moving: Moving image, same shape, in the fixed one's contrast.

        Raises:
            ValueError: a mask of another shape, and as of the method.
        """
        masks = [None if one is None else one.to(fixed.device) for one in (self.fixed_mask, self.moving_mask)]
        for mask in masks:
            if mask is not None:
                check_same_grid(mask, fixed, "mask", "fixed")
        kept = [
            image if mask is None else image.masked_fill(mask, 0)
            for mask, image in zip(masks, (fixed, moving), strict=True)
        ]
        filled = [
            own if mask is None else torch.where(mask, other, own)
            for mask, own, other in zip(masks, kept, reversed(kept), strict=True)
        ]
        return self.method(*filled)
