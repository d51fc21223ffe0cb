"""NIfTI files in and out, with the file named in every error."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from lumirlib.files import write_atomically


def read_nifti(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a NIfTI volume and its affine.

    Args:
        path: a `.nii` or `.nii.gz` file.

    Returns:
        The array in its stored axis order (scaled by the header's slope and intercept where those are set) and
        the 4 x 4 voxel-to-world affine in mm.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a NIfTI file, truncated or corrupt, or with a header that promises more than the file holds.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such NIfTI file: {path}")
    try:
        image = nib.load(path)
        array = np.asanyarray(image.dataobj)
    except Exception as error:  # nibabel, gzip and zlib each raise their own types for a broken file
        raise ValueError(f"cannot read {path} as NIfTI (truncated or corrupt?): {error}") from error
    return array, np.asarray(image.affine, dtype=np.float64)


def read_volume(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a 3-D image; refuses other dimensions and non-finite voxels. Returns array and affine as `read_nifti`."""
    array, affine = read_nifti(path)
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim != 3:
        raise ValueError(f"{path}: expected a 3-D volume, got shape {array.shape}")
    if array.dtype.kind not in "uif":
        raise ValueError(f"{path}: expected real numbers, got dtype {array.dtype}")
    if array.dtype.kind == "f":
        bad = int(array.size - np.isfinite(array).sum())
        if bad:
            raise ValueError(f"{path}: expected finite voxels, got {bad} NaN or infinite of {array.size}")
    return array, affine


def read_label_volume(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a 3-D volume of label numbers as int16; refuses fractions and numbers outside 0 ... 32767."""
    array, affine = read_volume(path)
    labels = array.astype(np.int16)
    if array.min() < 0 or array.max() > np.iinfo(np.int16).max or not np.array_equal(labels, array):
        raise ValueError(
            f"{path}: expected whole label numbers from 0 to 32767, got values from {array.min()} to {array.max()}"
        )
    return labels, affine


def write_nifti(path: str | Path, array: np.ndarray, affine: np.ndarray, intent: str = "none") -> Path:
    """Write a NIfTI file atomically: a reader sees the whole file or none.

    Args:
        path: where to, ending in `.nii` or `.nii.gz`; folders are made.
        array: the voxels; the dtype is kept.
        affine: 4 x 4 voxel-to-world matrix in mm.
        intent: NIfTI's name for what the voxels are, "vector" for a displacement field of ITK.

    Returns:
        `path`.
    """
    path = Path(path)
    suffix = ".nii.gz" if path.name.endswith(".nii.gz") else ".nii"
    if not path.name.endswith(suffix):
        raise ValueError(f"path must end in .nii or .nii.gz, got {path.name}")
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.header.set_intent(intent)
    return write_atomically(path, lambda to: nib.save(image, to))
