"""NIfTI files in and out, with the file named in every error.

Files are untrusted: no more memory is taken than a file holds voxels, whatever its header claims; a gzip's checksum is
always compared, so that a flipped bit is refused and not read; and only the fixed header and the voxels are looked at.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling

from lumirlib.files import write_atomically

#: Voxels that are read of one file at most: a thousand sides of a thousand, 155 volumes of LUMIR.
MAX_VOXELS = 2**30
#: Bytes that are unpacked at a time.
CHUNK = 1 << 24
#: What a file may hold besides its voxels: header, extensions, padding.
MAX_OTHER_BYTES = 1 << 20
#: Of the longer of the two fixed headers.
HEADER_BYTES = 540

_FORMATS = {348: (nib.Nifti1Header, 348), 540: (nib.Nifti2Header, 540)}

#: Looks at shape (without a fourth side of one) and affine before voxels are read, and raises if they do not fit.
GridCheck = Callable[[tuple[int, ...], np.ndarray], None]


@dataclass(frozen=True)
class _Header:
    """What a header says, checked for sense."""

    shape: tuple[int, ...]
    affine: np.ndarray
    dtype: np.dtype
    offset: int
    slope: float | None
    intercept: float | None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _parse_header(content: bytes) -> _Header:
    sizes = {int.from_bytes(content[:4], order) for order in ("little", "big")}
    known = sizes & set(_FORMATS)
    if not known:
        raise ValueError(f"expected a header of 348 or 540 bytes, got {content[:4].hex() or 'nothing'}")
    kind, size = _FORMATS[known.pop()]
    if len(content) < size:
        raise ValueError(f"expected a header of {size} bytes, got {len(content)}")
    # the file's own four bytes tell the order of bytes; those of dim, which nibabel asks, may be broken
    order = "<" if int.from_bytes(content[:4], "little") == size else ">"
    header = kind(content[:size], endianness=order)
    magic = bytes(header["magic"])[:3]
    if magic not in (b"n+1", b"n+2"):
        raise ValueError(f"expected the magic n+1 or n+2 of one file, got {magic!r}")
    sides = int(header["dim"][0])
    if not 1 <= sides <= 7:
        raise ValueError(f"expected 1 to 7 dimensions, got {sides}")
    shape = tuple(int(side) for side in header["dim"][1 : sides + 1])
    if min(shape) < 1:
        raise ValueError(f"expected sides of at least 1 voxel, got shape {shape}")
    if math.prod(shape) > MAX_VOXELS:
        raise ValueError(f"expected at most {MAX_VOXELS:,} voxels, got shape {shape}")
    dtype = header.get_data_dtype()
    if dtype.kind not in "uif" or dtype.itemsize > 8:
        raise ValueError(f"expected real numbers of at most 64 bits, got data type {int(header['datatype'])}, {dtype}")
    offset = float(header["vox_offset"])
    if not size + 4 <= offset <= MAX_OTHER_BYTES or offset % 1:  # four bytes say whether there are extensions
        raise ValueError(f"expected voxels from byte {size + 4} to {MAX_OTHER_BYTES}, got from {offset:g}")
    affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    if not np.isfinite(affine).all():
        raise ValueError(f"expected a finite affine, got {affine.tolist()}")
    return _Header(shape, affine, dtype, int(offset), *header.get_slope_inter())


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.name.endswith(".gz") else open(path, "rb")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:3] if len(shape) == 4 and shape[3] == 1 else shape


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Make one ValueError of what gzip, zlib, nibabel and this module raise for a broken file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, ValueError, ArithmeticError, HeaderDataError) as error:
        raise ValueError(f"{what}: {error}") from error


def _read_voxels(stream: BinaryIO, start: bytes, header: _Header) -> np.ndarray:
    """The array of a file that is unpacked from the beginning, of which `start` has been read."""
    wanted, content = header.offset + header.nbytes, bytearray(start)
    while len(content) < wanted:
        part = stream.read(min(CHUNK, wanted - len(content)))
        if not part:
            raise ValueError(f"expected {wanted} bytes for shape {header.shape}, got {len(content)}")
        content += part
    if len(stream.read(MAX_OTHER_BYTES + 1)) > MAX_OTHER_BYTES:  # to its end, where a gzip has its checksum
        raise ValueError(f"expected {wanted} bytes for shape {header.shape}, got a megabyte more at least")
    voxels = np.frombuffer(content, header.dtype, math.prod(header.shape), header.offset)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite then, is refused by those who call
        return apply_read_scaling(voxels.reshape(header.shape, order="F"), header.slope, header.intercept)


def parse_nifti(content: bytes, name: str) -> np.ndarray:
    """The array, as :func:`read_nifti` gives it, of an unpacked file with a name."""
    stream = io.BytesIO(content)
    with _explained(f"{name}: cannot be read as NIfTI"):
        start = stream.read(HEADER_BYTES)
        return _read_voxels(stream, start, _parse_header(start))


def read_nifti(path: str | Path, check: GridCheck | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read a NIfTI volume and its affine.

    Args:
        path: a `.nii` or `.nii.gz` file.
        check: called with shape and affine before the voxels are read.

    Returns:
        The array in its stored axis order (scaled by the header's slope and intercept where those are set) and
        the 4 x 4 voxel-to-world affine in mm.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a NIfTI file, truncated or corrupt, or with a header that promises more than the file holds.
    """
    what = _reading(path)
    with _open(Path(path)) as stream:
        with _explained(what):
            start = stream.read(HEADER_BYTES)
            header = _parse_header(start)
        if check:
            check(_squeezed(header.shape), header.affine)
        with _explained(what):
            return _read_voxels(stream, start, header), header.affine


def read_grid(path: str | Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape (without a fourth side of one) and affine from a NIfTI header alone; errors as of :func:`read_nifti`."""
    what = _reading(path)
    with _open(Path(path)) as stream, _explained(what):
        header = _parse_header(stream.read(HEADER_BYTES))
    return _squeezed(header.shape), header.affine


def _reading(path: str | Path) -> str:
    """What is said of a file that cannot be read."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such NIfTI file: {path}")
    if not Path(path).name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"cannot read {path} as NIfTI: its name must end in .nii or .nii.gz")
    return f"cannot read {path} as NIfTI (truncated or corrupt?)"


def read_volume(path: str | Path, check: GridCheck | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read a 3-D image; refuses other dimensions and non-finite voxels. Arguments and result as of `read_nifti`."""

    def fits(shape: tuple[int, ...], affine: np.ndarray) -> None:
        if len(shape) != 3:
            raise ValueError(f"{path}: expected a 3-D volume, got shape {shape}")
        if check:
            check(shape, affine)

    array, affine = read_nifti(path, fits)
    array = array.reshape(_squeezed(array.shape))
    if array.dtype.kind == "f":
        bad = int(array.size - np.isfinite(array).sum())
        if bad:
            raise ValueError(f"{path}: expected finite voxels, got {bad} NaN or infinite of {array.size}")
    return array, affine


def read_label_volume(path: str | Path, check: GridCheck | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read a 3-D volume of label numbers as int16; refuses fractions and numbers outside 0 ... 32767."""
    array, affine = read_volume(path, check)
    inside = array.min() >= 0 and array.max() <= np.iinfo(np.int16).max
    labels = array.astype(np.int16) if inside else None
    if labels is None or not np.array_equal(labels, array):
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
