"""Registration of images of any contrast by a method that knows one."""

from __future__ import annotations

import torch
from torch import nn

from lumirlib._checks import check_choice
from lumirlib.data.intensity import match_contrast
from lumirlib.evaluation import Method

#: Contrast of the images: both T1, which networks here are trained on, or any.
CONTRASTS = ("t1", "any")


def for_contrast(method: Method, contrast: str) -> Method:
    """A method for images of a contrast, one of :data:`CONTRASTS`; :class:`MatchedContrast` for any.

    Raises:
        ValueError: an unknown contrast.
    """
    check_choice(contrast, CONTRASTS, "contrast")
    return method if contrast == "t1" else MatchedContrast(method).eval()


class MatchedContrast(nn.Module):
    """A method that is given the moving image in the fixed one's contrast: see :func:`match_contrast`.

    The fixed image has the contrast that the method was trained on. Where none of both has, registration is somewhat
    less accurate.

    Args:
        method: Function of two images that returns the displacement; a network is one.
    """

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    @property
    def last_run(self) -> dict[str, float]:
        """Figures of the method's last call; none if it keeps none."""
        return getattr(self.method, "last_run", {})

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """Displacement ``(B, 3, D, H, W)`` in voxels that carries `moving` onto `fixed`.

        Args:
            fixed: Fixed image ``(B, 1, D, H, W)``, intensities in [0, 1], zero outside the brain.
            moving: Moving image ``(B, 1, D, H, W)``, likewise, of any contrast.

        Raises:
            ValueError: as of :func:`match_contrast` and of the method.
        """
        return self.method(fixed, match_contrast(moving, fixed))
