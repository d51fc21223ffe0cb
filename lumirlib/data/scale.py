"""The intensity that counts as white: one for all images of a cohort, so that it never depends on a single file.

Images of whole numbers, as they are stored, reach 255. Of all others of a cohort the largest voxel decides: up to
:data:`UNIT` they are on the scale from 0 to 1, from :data:`LOWEST_BYTE` on that from 0 to 255, and between on a scale
of their own, whose white is that voxel. A dataset JSON's `intensity_maximum` overrules this.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from lumirlib.data.embedded import cache_folder
from lumirlib.data.identity import REMEMBERED_BYTES, checksum
from lumirlib.data.nifti import read_header
from lumirlib.files import read_json, write_json

#: The white of uint8 images, and what their voxels may reach.
BYTE, HIGHEST_BYTE = 255, 255.5
#: Images on the scale from 0 to 1 reach no higher: resampling may overshoot.
UNIT = 1.1
#: Images on the scale from 0 to 255 reach this at least.
LOWEST_BYTE = 25.5
#: Names in a warning or an error at most.
SHOWN = 5


def float_maxima(
    files: Sequence[Path], read: Callable[[Path], np.ndarray], memory: str, threads: int | None = None
) -> dict[Path, float]:
    """The largest voxel of each image that does not hold whole numbers as they are stored.

    Args:
        files: Paths of the images.
        read: Function that gives the array of one.
        memory: Name under which the maxima of large images are remembered in the cache folder, by their checksums.
        threads: Number of threads that read; None takes two per core, at most 8.
    """
    pool_size = threads or min(8, 2 * (os.cpu_count() or 1))
    place = cache_folder() / "maxima" / f"{hashlib.sha256(memory.encode()).hexdigest()[:16]}.json"
    known: dict = {}
    with suppress(FileNotFoundError, ValueError):  # harmed, it is made anew
        known = read_json(place)

    def find(file: Path) -> tuple[float | None, str]:
        header = read_header(file)
        if header.has_integers:
            return None, ""
        content = checksum(file) if header.nbytes >= REMEMBERED_BYTES else ""
        found = known.get(content)
        return (found if isinstance(found, float) else float(read(file).max())), content

    with ThreadPoolExecutor(pool_size) as pool:
        found = list(tqdm(pool.map(find, files), "intensities", len(files), unit="image", leave=False, delay=3))
    remembered = {content: maximum for maximum, content in found if content}
    if remembered and remembered != known:
        with suppress(OSError):  # then they are read again next time
            write_json(place, remembered)
    return {file: maximum for file, (maximum, _) in zip(files, found, strict=True) if maximum is not None}


def common_white(maxima: Mapping[Path, float], source: Path) -> float:
    """The white of images with these largest voxels.

    Args:
        maxima: Largest voxel of each image, as :func:`float_maxima` gives them; not empty.
        source: Path of the dataset JSON, for messages.

    Returns:
        1, 255, or the largest of them.

    Raises:
        ValueError: some reach a few percent of the others' scale, but more than 1.

    Warns:
        UserWarning: maxima that are neither about 1 nor about 255, named; or both in one cohort.
    """
    largest = max(maxima.values())
    low = {file: value for file, value in maxima.items() if value <= UNIT}
    if largest <= UNIT:
        _tell_dark({file: value for file, value in low.items() if value < 0.5}, 1, source)
        return 1
    if largest < LOWEST_BYTE:
        warnings.warn(
            f"{source}: the largest voxels of its images ({_listed(maxima)}) are neither about 1 nor about 255: all "
            f"are divided by {largest:g}. 'intensity_maximum' in the JSON gives another number",
            stacklevel=1,
        )
        return largest
    between = {file: value for file, value in maxima.items() if UNIT < value < LOWEST_BYTE}
    if between:
        raise ValueError(
            f"{source}: expected images on one scale of intensities, got some whose largest voxels are "
            f"{_listed(between)}, and one with {largest:g}: bring them to one scale, or give 'intensity_maximum'"
        )
    if low:
        warnings.warn(
            f"{source}: images on two scales: some reach {largest:g}, and others about 1 ({_listed(low)}). Those are "
            "divided by 255, and these by 1",
            stacklevel=1,
        )
    _tell_dark({file: value for file, value in maxima.items() if UNIT < value < BYTE / 2}, BYTE, source)
    return BYTE


def tell_dark(path: Path, maximum: float) -> None:
    """Warn of an image of whole numbers that is far from reaching 255."""
    if maximum < BYTE / 2:
        _tell_dark({path: maximum}, BYTE, path)


def _tell_dark(dark: Mapping[Path, float], white: float, source: Path) -> None:
    if dark:
        warnings.warn(
            f"{source}: expected images whose largest voxel is about {white:g}, got {_listed(dark)}; they are divided "
            f"by {white:g} nevertheless. 'intensity_maximum' in the dataset JSON gives another number",
            stacklevel=1,
        )


def _listed(maxima: Mapping[Path, float]) -> str:
    parts = [f"{value:g} in {file.name}" for file, value in list(maxima.items())[:SHOWN]]
    return ", ".join(parts) + (f" and {len(maxima) - SHOWN} more" if len(maxima) > SHOWN else "")
