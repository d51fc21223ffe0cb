"""The LUMIR frame: its grid, and the ICBM152 template in it."""

from __future__ import annotations

import importlib.util
import itertools
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

from lumirlib import spatial

RESOLUTIONS_MM = (1, 2, 4)

FRAME_SHAPE = (160, 224, 192)

FRAME_ORIGIN_MM = (-79.5, -129.0, -80.0)


def template_folder() -> Path:
    """Folder of the template and atlas inside the installed package `deepmriprep` (which is not imported)."""
    spec = importlib.util.find_spec("deepmriprep")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the embedded cohort needs the package 'deepmriprep' for its template: pip install deepmriprep"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "templates"


def frame_affine(resolution_mm: int) -> np.ndarray:
    """Voxel-to-world matrix (mm, RAS) of the LUMIR frame at 1, 2 or 4 mm: blocks of 1 mm voxels share their centre."""
    affine = np.diag([resolution_mm, resolution_mm, resolution_mm, 1.0]).astype(np.float64)
    affine[:3, 3] = np.asarray(FRAME_ORIGIN_MM) + (resolution_mm - 1) / 2
    return affine


def _stored_template() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The template at half a millimetre ``(D, H, W)`` in bytes, what each byte stands for, and the affine."""
    image = nib.load(template_folder() / "Template_05mm_bet.nii.gz")
    values = np.arange(256) * image.dataobj.slope + image.dataobj.inter
    return image.dataobj.get_unscaled(), values.clip(0, 1).astype(np.float32), image.affine


@lru_cache(maxsize=1)
def template_image() -> tuple[torch.Tensor, np.ndarray]:
    """The template at half a millimetre, ``(1, 1, D, H, W)`` in [0, 1], and its affine."""
    stored, values, affine = _stored_template()
    return torch.from_numpy(values[stored])[None, None], affine


@lru_cache(maxsize=1)
def template_1mm() -> tuple[torch.Tensor, np.ndarray]:
    """The template averaged over blocks of 2 x 2 x 2 voxels, and its affine."""
    stored, values, affine = _stored_template()
    coarse_affine = affine @ np.array([[2, 0, 0, 0.5], [0, 2, 0, 0.5], [0, 0, 2, 0.5], [0, 0, 0, 1.0]])
    depth, height, width = (size // 2 * 2 for size in stored.shape)
    total = np.zeros([size // 2 for size in stored.shape], np.float32)
    for i, j, k in itertools.product((0, 1), repeat=3):  # all voxels at once take 1 GB
        total += values[stored[i:depth:2, j:height:2, k:width:2]]
    return torch.from_numpy(total / 8)[None, None], coarse_affine


def sample_in_frame(image: torch.Tensor, affine: np.ndarray, field: torch.Tensor, spacing_mm: int, mode: str):
    """Values of a template-space volume at the frame's voxels moved by `field` (voxels of the frame)."""
    points = spatial.identity_grid(field.shape[2:]) + field  # (1, 3, D, H, W)
    to_image = np.linalg.inv(affine) @ frame_affine(spacing_mm)
    matrix = torch.from_numpy(to_image[:3, :3].astype(np.float32))
    offset = torch.from_numpy(to_image[:3, 3].astype(np.float32)).view(1, 3, 1, 1, 1)
    points = torch.einsum("ab,nbdhw->nadhw", matrix, points) + offset
    return spatial.sample(image, points) if mode == "bilinear" else spatial.sample_nearest(image, points)


@lru_cache(maxsize=2)
def template_in_frame(resolution_mm: int) -> torch.Tensor:
    """The template on the LUMIR frame's grid, ``(1, 1, D, H, W)`` in [0, 1], background 0; not to be changed.

    Args:
        resolution_mm: Voxel size in mm: 1, 2 or 4.
    """
    if resolution_mm not in RESOLUTIONS_MM:
        raise ValueError(f"resolution_mm must be one of {RESOLUTIONS_MM}, got {resolution_mm}")
    template, affine = template_1mm()
    still = torch.zeros(1, 3, *FRAME_SHAPE)
    return F.avg_pool3d(sample_in_frame(template, affine, still, 1, "bilinear"), resolution_mm)
