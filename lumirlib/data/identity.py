"""Digest of a cohort's content: it changes with any voxel, label or landmark.

A `.nii.gz` carries a CRC-32 of its content at its end, which every reader compares (:mod:`lumirlib.data.nifti`): it is
taken as it stands, so that thousands of scans are looked through in seconds. Of other files all bytes are hashed.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from tqdm.auto import tqdm

from lumirlib.data.embedded import cache_folder
from lumirlib.data.nifti import read_header
from lumirlib.files import read_json, write_json

#: Hashes of files from this size are remembered, with size, times and number of the file.
REMEMBERED_BYTES = 1 << 20
#: A file that was written this recently may be written again without another time.
RECENT_SECONDS = 2.0

_CHUNK = 1 << 22


def checksum(path: str | Path) -> str:
    """A checksum of all that a file holds.

    Raises:
        OSError: the file cannot be read.
    """
    return _gzip_checksum(Path(path)) or hash_file(Path(path))


def checksums(paths: Iterable[Path], memory: str) -> dict[Path, str]:
    """The checksum of each file.

    Args:
        paths: Paths of the files.
        memory: Name under which hashes of large files are remembered in the cache folder until the files change.
    """
    files = list(dict.fromkeys(paths))
    place = cache_folder() / "checksums" / f"{hashlib.sha256(memory.encode()).hexdigest()[:16]}.json"
    known: dict = {}
    with suppress(FileNotFoundError, ValueError):  # harmed, it is made anew
        known = read_json(place)

    def find(path: Path) -> tuple[str, list | None]:
        quick = _gzip_checksum(path)
        if quick:
            return quick, None
        found = path.stat()
        times = max(found.st_mtime, found.st_ctime)
        state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        match known.get(str(path)):
            case [*before, str(digest)] if before == state:
                return digest, [*state, digest]
        digest = hash_file(path)
        keep = found.st_size >= REMEMBERED_BYTES and time.time() - times > RECENT_SECONDS
        return digest, [*state, digest] if keep else None

    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        found = list(tqdm(pool.map(find, files), "checksums", len(files), unit="file", leave=False, delay=3))
    remembered = {str(path): entry for path, (_, entry) in zip(files, found, strict=True) if entry}
    if remembered and remembered != known:
        with suppress(OSError):  # then they are hashed again next time
            write_json(place, remembered)
    return {path: digest for path, (digest, _) in zip(files, found, strict=True)}


def _gzip_checksum(path: Path) -> str:
    """The CRC-32 at the end of a gzip that holds one NIfTI volume and nothing else; empty for other files."""
    if not path.name.endswith(".nii.gz"):
        return ""
    try:
        header = read_header(path)
    except ValueError:  # told by whoever reads it
        return ""
    with open(path, "rb") as stream:
        stream.seek(-8, os.SEEK_END)
        crc, size = (int.from_bytes(stream.read(4), "little") for _ in range(2))
    return f"crc32 {crc:08x} of {size}" if size == header.offset + header.nbytes else ""


def hash_file(path: Path) -> str:
    """The word sha256 and that digest of a file's bytes."""
    content = hashlib.sha256()
    with open(path, "rb") as stream:
        while part := stream.read(_CHUNK):
            content.update(part)
    return f"sha256 {content.hexdigest()}"
