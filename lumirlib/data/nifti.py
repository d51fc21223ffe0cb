"""NIfTI files in and out, with the file named in every error.

Files are untrusted: no more memory is taken than a file holds voxels, whatever its header claims; a gzip's checksum is
always compared, so that a flipped bit is refused and not read; and only the fixed header and the voxels are looked at.
"""

from __future__ import annotations

import gzip
import io
import math
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
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
#: Bytes that a file may hold before its voxels (header and extensions), and behind them.
MAX_OTHER_BYTES = 1 << 26
#: Edges of a voxel below this are not of a scan of a head, nor of any MRI: those of a header that says metres by its
#: numbers and names no unit are.
MIN_EDGE_MM = 0.01
#: Of the longer of the two fixed headers.
HEADER_BYTES = 540

_FORMATS = {348: (nib.Nifti1Header, 348), 540: (nib.Nifti2Header, 540)}
#: Powers of ten from the unit of length that the lowest three bits of `xyzt_units` give (metre, micron) to mm.
_TO_MM = {1: 3, 3: -3}
#: A quaternion may be longer than 1 by this much, which is rounding; it is made 1 then.
QUATERNION_TOLERANCE = 1e-3

#: Looks at shape (without trailing sides of one) and affine before voxels are read, and raises if they do not fit.
GridCheck = Callable[[tuple[int, ...], np.ndarray], None]


@dataclass(frozen=True)
class Header:
    """What a header says, checked for sense.

    Attributes:
        shape: Sides in voxels, trailing sides of one included.
        affine: Matrix 4 x 4, voxels to world in mm, whatever the file's unit: the sform, else the qform, else the
            spacing.
        sform: Matrix 4 x 4, voxels to world in mm; None where the header has none or none that can be used.
        qform: Matrix 4 x 4, voxels to world in mm; None where the header has none or none that can be used.
        dtype: Type of the stored numbers.
        offset: Offset of the voxels in bytes.
        slope: Factor on the stored numbers; None where it is not set.
        intercept: Summand after that; None where it is not set.
        notes: Faults of the header that did not keep it from being read.
        description: Its text for people, `descrip`.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    sform: np.ndarray | None
    qform: np.ndarray | None
    dtype: np.dtype
    offset: int
    slope: float | None
    intercept: float | None
    notes: tuple[str, ...] = ()
    description: str = ""

    @property
    def nbytes(self) -> int:
        """Of the voxels."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def has_integers(self) -> bool:
        """Whether the voxels are whole numbers that are read as they are stored."""
        return self.dtype.kind in "ui" and self.slope in (None, 1) and self.intercept in (None, 0)


def _parse_header(content: bytes) -> Header:
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
    # nibabel makes 1 mm of an edge of zero; what was stored tells
    no_edges = (kind(content[:size], endianness=order, check=False)["pixdim"][1:4] == 0).any()
    affine, sform, qform, notes = _affines(header, bool(no_edges))
    description = bytes(header["descrip"]).rstrip(b"\0").decode("ascii", "replace")
    return Header(shape, affine, sform, qform, dtype, int(offset), *header.get_slope_inter(), notes, description)


def _affines(
    header: nib.Nifti1Header, no_edges: bool
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, tuple[str, ...]]:
    """The affine to take, the sform and the qform (None where not coded or not usable), all in mm, and notes."""
    notes: list[str] = []
    broken: list[str] = []
    try:
        qform = _qform(header, notes)
    except (ValueError, HeaderDataError) as error:
        broken.append(f"its qform cannot be used: {error}")
        qform = None
    sform = header.get_sform(coded=True)[0]
    finite = sform is None or np.isfinite(sform).all()
    # one of zeros stands for none; whoever needs three directions refuses it where there is no other
    if not finite or (sform is not None and qform is not None and np.linalg.det(sform[:3, :3]) == 0):
        broken.append(f"expected a finite affine of three directions as its sform, got {sform.tolist()}")
        sform = None
    forms = {"sform": sform, "qform": qform}
    taken = next((name for name, form in forms.items() if form is not None), None)
    if taken is None and broken:
        raise ValueError("; ".join(broken))
    notes = [f"{problem}; its {taken} is taken" for problem in [*notes, *broken]]
    if no_edges and taken != "sform":
        notes.append("an edge of 0 in its pixdim is taken for 1")
    # a code of 0 or one that the format does not know: millimetres, as other programs take it
    power = _TO_MM.get(int(header["xyzt_units"]) & 7, 0)
    sform, qform = (None if form is None else _in_mm(form, power) for form in forms.values())
    best = sform if sform is not None else qform
    affine = _in_mm(header.get_base_affine(), power) if best is None else best
    if not np.isfinite(affine).all():
        raise ValueError(f"expected a finite affine, got {affine.tolist()}")
    return affine, sform, qform, tuple(notes)


def _in_mm(affine: np.ndarray, power: int) -> np.ndarray:
    """An affine in units of 10^power mm in mm; 0.004 m is 4 mm to the last digit, though float32 has no 0.004."""
    affine = np.array(affine, dtype=np.float64)
    if power and np.isfinite(affine).all():
        affine[:3] = [[float(Decimal(str(np.float32(x))).scaleb(power)) for x in row] for row in affine[:3]]
    return affine


def _qform(header: nib.Nifti1Header, notes: list[str]) -> np.ndarray | None:
    """The qform, None where it is not coded; a quaternion that rounding made too long is made 1, and noted."""
    if int(header["qform_code"]) <= 0:
        return None
    names = ("quatern_b", "quatern_c", "quatern_d")
    quaternion = np.array([header[name] for name in names], dtype=np.float64)
    length = float(np.linalg.norm(quaternion))
    if not length <= 1 + QUATERNION_TOLERANCE:
        raise ValueError(f"expected a quaternion of length 1, got {length:g} from b, c and d alone")
    try:
        form = header.get_qform(coded=True)[0]
    except (ValueError, HeaderDataError):
        if length <= 1:
            raise
        header = header.copy()
        for name, value in zip(names, quaternion / length, strict=True):
            header[name] = value
        form = header.get_qform(coded=True)[0]
        notes.append(f"the quaternion of its qform is {length - 1:.1e} longer than 1")
    if not np.isfinite(form).all():
        raise ValueError(f"expected a finite affine, got {form.tolist()}")
    return form


def _tell(name: str | Path, notes: tuple[str, ...]) -> None:
    for note in notes:  # the place is always this line, so that Python tells each only once
        warnings.warn(f"{name}: {note}", stacklevel=1)


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without trailing sides of one, down to three."""
    sides = len(shape)
    while sides > 3 and shape[sides - 1] == 1:
        sides -= 1
    return shape[:sides]


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Make one ValueError of what gzip, zlib, nibabel and this module raise for a broken file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, ValueError, ArithmeticError, HeaderDataError) as error:
        raise ValueError(f"{what}: {error}") from error


def _read_voxels(stream: BinaryIO, start: bytes, header: Header, name: str) -> np.ndarray:
    """The array of a file that is unpacked from the beginning, of which `start` has been read."""
    wanted, content = header.offset + header.nbytes, bytearray(start)
    while len(content) < wanted:
        part = stream.read(min(CHUNK, wanted - len(content)))
        if not part:
            raise ValueError(f"expected {wanted} bytes for shape {header.shape}, got {len(content)}")
        content += part
    more = _read_to_end(stream, wanted, header) + max(len(start) - wanted, 0)
    if more:
        _tell(name, (f"what follows its voxels is left out: {more:,} bytes or more",))
    voxels = np.frombuffer(content, header.dtype, math.prod(header.shape), header.offset)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite then, is refused by those who call
        return apply_read_scaling(voxels.reshape(header.shape, order="F"), header.slope, header.intercept)


def _read_to_end(stream: BinaryIO, wanted: int, header: Header) -> int:
    """Bytes behind the voxels; a gzip has its checksum at its end."""
    more = 0
    while True:
        try:
            part = stream.read(CHUNK)
        except gzip.BadGzipFile as error:  # whole, checksum and all, and then something that is no gzip
            if not str(error).startswith("Not a gzipped file"):
                raise
            return more + 1
        if not part:
            return more
        more += len(part)
        if more > MAX_OTHER_BYTES:
            raise ValueError(
                f"expected {wanted} bytes for shape {header.shape}, got {MAX_OTHER_BYTES >> 20} megabytes more at least"
            )


def parse_nifti(content: bytes, name: str) -> np.ndarray:
    """The array, as :func:`read_nifti` gives it, of an unpacked file with a name."""
    stream = io.BytesIO(content)
    with _explained(f"{name}: cannot be read as NIfTI"):
        start = stream.read(HEADER_BYTES)
        header = _parse_header(start)
        array = _read_voxels(stream, start, header, name)
    _tell(name, header.notes)
    return array


def read_nifti(path: str | Path, check: GridCheck | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read a NIfTI volume and its affine.

    Args:
        path: Path of a `.nii` or `.nii.gz` file.
        check: Function called with shape and affine before the voxels are read.

    Returns:
        The array in its stored axis order (scaled by the header's slope and intercept where those are set) and
        the 4 x 4 voxel-to-world affine in mm: the header's unit is read, and where it names none it is the millimetre.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a NIfTI file, truncated or corrupt, or with a header that promises more than the file holds.

    Warns:
        UserWarning: one of the header's two orientations cannot be used, or there are bytes behind the voxels.
    """
    what = _reading(path)
    with _open(Path(path)) as stream:
        with _explained(what):
            start = stream.read(HEADER_BYTES)
            header = _parse_header(start)
        if check:
            check(_squeezed(header.shape), header.affine)
        _tell(path, header.notes)
        with _explained(what):
            return _read_voxels(stream, start, header, str(path)), header.affine


def read_header(path: str | Path) -> Header:
    """The header of a NIfTI file alone; errors as of :func:`read_nifti`, which also tells what is odd in it."""
    what = _reading(path)
    with _open(Path(path)) as stream, _explained(what):
        return _parse_header(stream.read(HEADER_BYTES))


def read_grid(path: str | Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape (without trailing sides of one) and affine in mm from a NIfTI header alone; see :func:`read_header`."""
    header = read_header(path)
    return _squeezed(header.shape), header.affine


def scan_stem(path: Path) -> str:
    """The name of a scan's file without `.nii` and `.gz`, in capitals too, and Learn2Reg's modality suffix `_0000`."""
    return re.sub(r"(\.nii)?(\.gz)?$", "", path.name, count=1, flags=re.IGNORECASE).removesuffix("_0000")


def _reading(path: str | Path) -> str:
    """What is said of a file that cannot be read."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such NIfTI file: {path}")
    if not Path(path).name.lower().endswith((".nii", ".nii.gz")):
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


def write_nifti(
    path: str | Path,
    array: np.ndarray,
    affine: np.ndarray,
    intent: str = "none",
    description: str = "",
    seconds: float | None = None,
) -> Path:
    """Write a NIfTI file atomically: a reader sees the whole file or none.

    Args:
        path: Path to write to, ending in `.nii` or `.nii.gz`; missing folders are made.
        array: Voxels; the dtype is kept.
        affine: Matrix 4 x 4, voxels to world in mm.
        intent: NIfTI's name for the kind of the voxels, "vector" for a displacement field of ITK.
        description: Text for the header's `descrip`, 79 characters at most.
        seconds: Seconds between two volumes of a series; None where it is none, or where they are not known.

    Returns:
        `path`.
    """
    path = Path(path)
    suffix = ".nii.gz" if path.name.endswith(".nii.gz") else ".nii"
    if not path.name.endswith(suffix):
        raise ValueError(f"path must end in .nii or .nii.gz, got {path.name}")
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm", None if seconds is None else "sec")
    if seconds is not None:
        image.header["pixdim"][4] = seconds
    image.header.set_intent(intent)
    image.header["descrip"] = description
    return write_atomically(path, lambda to: nib.save(image, to))
