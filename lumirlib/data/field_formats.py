"""Displacements of other programs, converted to and from ours: ``(1, 3, D, H, W)`` in voxels, channel 0 along i.

What ours means is stated in :mod:`lumirlib.spatial`: on the fixed grid, ``warped(p) = moving(p + u(p))``. All
conventions here have the same direction (fixed to moving); they differ in units, order of axes and layout.
"""

from __future__ import annotations

import numpy as np
import torch

from lumirlib._checks import check_displacement

#: RAS (NIfTI) to LPS (ITK, ANTs): the first two world axes are turned round.
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])


def channels_last_to_voxel(array: np.ndarray) -> torch.Tensor:
    """Voxel displacement stored as ``(D, H, W, 3)``, as Learn2Reg's files and SciPy users have it, in our layout.

    Returns:
        ``(1, 3, D, H, W)`` float32.

    Raises:
        ValueError: another shape.
    """
    array = np.asarray(array)
    if array.ndim != 4 or array.shape[3] != 3:
        raise ValueError(f"array must be (D, H, W, 3), got {array.shape}")
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0), dtype=np.float32))[None]


def voxel_to_channels_last(displacement: torch.Tensor) -> np.ndarray:
    """Our displacement ``(1, 3, D, H, W)`` as ``(D, H, W, 3)`` float32 array."""
    _check_single(displacement)
    return np.ascontiguousarray(displacement[0].detach().cpu().float().movedim(0, -1).numpy())


def channels_first_to_voxel(array: np.ndarray) -> torch.Tensor:
    """Voxel displacement stored as ``(3, D, H, W)`` in our layout, ``(1, 3, D, H, W)`` float32."""
    array = np.asarray(array)
    if array.ndim != 4 or array.shape[0] != 3:
        raise ValueError(f"array must be (3, D, H, W), got {array.shape}")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))[None]


def grid_sample_to_voxel(flow: torch.Tensor, align_corners: bool = True) -> torch.Tensor:
    """Displacement to be added to the normalized grid of ``torch.nn.functional.grid_sample``, in our convention.

    Args:
        flow: Displacement ``(1, D, H, W, 3)``, the last axis being (along k, along j, along i); with aligned corners 2
            is the distance of the outermost voxels' centres, without it is the whole side.
        align_corners: Value given in the call of ``grid_sample``.

    Returns:
        ``(1, 3, D, H, W)`` in voxels.
    """
    if flow.ndim != 5 or flow.shape[0] != 1 or flow.shape[4] != 3:
        raise ValueError(f"flow must be (1, D, H, W, 3), got {tuple(flow.shape)}")
    return flow.flip(-1).movedim(-1, 1).float() * _half_sides(flow.shape[1:4], align_corners)


def itk_to_voxel(field: np.ndarray, affine: np.ndarray) -> torch.Tensor:
    """Displacement field of ITK or ANTs, in mm along the world axes of LPS, in voxels of the fixed image.

    Args:
        field: Displacement field ``(D, H, W, 3)``, or ``(D, H, W, 1, 3)`` as NIfTI stores vectors, on the fixed grid.
        affine: Matrix 4 x 4 of the fixed image, voxels to RAS in mm, as nibabel gives it.

    Returns:
        ``(1, 3, D, H, W)`` float32 in voxels.
    """
    field = np.asarray(field)
    if field.ndim == 5 and field.shape[3] == 1:
        field = field[:, :, :, 0]
    if field.ndim != 4 or field.shape[3] != 3:
        raise ValueError(f"field must be (D, H, W, 3) or (D, H, W, 1, 3), got {field.shape}")
    to_voxels = np.linalg.inv(_check_affine(affine)[:3, :3]) @ RAS_TO_LPS  # LPS to RAS is its own inverse
    return channels_last_to_voxel(field @ to_voxels.T)


def voxel_to_itk(displacement: torch.Tensor, affine: np.ndarray) -> np.ndarray:
    """Our displacement as a field of ITK or ANTs, ``(D, H, W, 1, 3)`` float32 in mm, LPS; see itk_to_voxel.

    The NIfTI that holds it needs the intent code "vector" (1007).
    """
    to_world = RAS_TO_LPS @ _check_affine(affine)[:3, :3]
    return (voxel_to_channels_last(displacement) @ to_world.T).astype(np.float32)[:, :, :, None]


def _half_sides(shape: tuple[int, ...], align_corners: bool) -> torch.Tensor:
    sides = [side - 1 if align_corners else side for side in shape]
    return torch.tensor([side / 2 for side in sides], dtype=torch.float32).view(1, 3, 1, 1, 1)


def _check_single(displacement: torch.Tensor) -> None:
    check_displacement(displacement)
    if displacement.shape[0] != 1:
        raise ValueError(f"displacement must be (1, 3, D, H, W), got {tuple(displacement.shape)}")


def _check_affine(affine: np.ndarray) -> np.ndarray:
    affine = np.asarray(affine, dtype=np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise ValueError(f"affine must be an invertible 4 x 4 matrix, got {affine.tolist()}")
    return affine
