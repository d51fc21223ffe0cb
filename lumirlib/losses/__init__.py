"""Losses: similarity and smoothness of the paper, their deep supervision, and losses of our own.

The paper's (eq. 1 to 3) are in `similarity`, `smoothness` and `multilevel`; `ndv`, `tissue`, `forces` and `pair` are
ours.
"""

from lumirlib.losses.forces import force_maps, forces
from lumirlib.losses.masked import masked_ncc_loss
from lumirlib.losses.multilevel import PYRAMID_BLURS, SIMILARITIES, gaussian_pyramid, gaussian_smooth, registration_loss
from lumirlib.losses.ndv import ndv_loss
from lumirlib.losses.similarity import mse_loss, ncc_loss
from lumirlib.losses.smoothness import diffusion_loss
from lumirlib.losses.tissue import tissue_loss, tissue_maps

__all__ = [
    "PYRAMID_BLURS",
    "SIMILARITIES",
    "diffusion_loss",
    "force_maps",
    "forces",
    "gaussian_pyramid",
    "gaussian_smooth",
    "masked_ncc_loss",
    "mse_loss",
    "ncc_loss",
    "ndv_loss",
    "registration_loss",
    "tissue_loss",
    "tissue_maps",
]
