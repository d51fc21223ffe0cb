"""A memory-mapped cache of a cohort's volumes: built once, resumable, checked.

Each volume is one `.npy` file (`numpy.load` opens it too) that ends in a JSON record: the scan that it was made from
with its size and time, how the numbers are to be read, and a CRC-32 of them. So a volume is there whole or not at all,
whenever a build is killed; a list that grows or shrinks reuses what is there; and no index can be out of step.

Integers are stored wherever they give back exactly what :meth:`lumirlib.data.Cohort.image` reads: uint8 for uint8 scans
at their own resolution, int16 for their averages over blocks of 2 or 4 voxels; else float16, rounded by at most 2⁻¹².
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
import torch
from tqdm.auto import tqdm

from lumirlib._checks import check_choice
from lumirlib.files import parse_json, write_atomically

FORMAT = "lumirlib-volume-1"

DTYPES = ("auto", "float16", "float32")
#: What the numbers of a volume may be; the record behind them has at most so many bytes.
STORED_DTYPES = {"images": ("uint8", "int16", "float16", "float32"), "labels": ("int16",)}

MAX_RECORD_BYTES = 1 << 16

REPAIR = "lumirlib cache --repair makes it anew"
#: A second process that wants to build the same cache waits this long for the first.
LOCK_SECONDS = 6 * 3600.0

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class StoredVolume:
    """A volume as it is stored, and how to read it.

    Attributes:
        values: Stored values ``(1, 1, D, H, W)``, uint8, int16, float16 or float32, mapped from the file.
        scale: Divisor: the image is values / scale in float32; None for label numbers, which are taken as they are.
    """

    values: torch.Tensor
    scale: int | None

    def decode(self) -> torch.Tensor:
        """The volume as the cohort reads it, on the device of `values`: float32 image, or int16 labels. A copy."""
        if self.scale is None:
            return self.values.clone()
        if self.scale == 1:
            return self.values.to(torch.float32, copy=True)
        # a tensor on the same device: CUDA multiplies by the reciprocal of a plain number, which rounds otherwise
        return self.values / torch.full((), self.scale, dtype=torch.float32, device=self.values.device)


def encode(image: torch.Tensor, dtype: str, block: int) -> tuple[StoredVolume, float]:
    """An image in the smallest form that `dtype` allows, and its largest rounding error.

    Args:
        image: Image in float32 in [0, 1].
        dtype: Form to store: "auto" (integers where they are exact, else float16), "float16" or "float32".
        block: Number of the scan's voxels in one of the image.
    """
    if dtype == "auto":
        for integer, scale in ((torch.uint8, 255), (torch.int16, 255 * block)):
            if scale <= torch.iinfo(integer).max:
                stored = StoredVolume((image * scale).round().to(integer), scale)
                if torch.equal(stored.decode(), image):
                    return stored, 0.0
    stored = StoredVolume(image.to(torch.float32 if dtype == "float32" else torch.float16), 1)
    return stored, float((stored.decode() - image).abs().max())


@dataclass(frozen=True)
class Source:
    """A volume to be cached.

    Attributes:
        kind: Kind of the volume, "images" or "labels".
        file: Path of the scan or label volume.
        name: Name of the subject.
        read: Function that reads it, ``(1, 1, D, H, W)``, float32 in [0, 1] or int16.
        content: Checksum of the file, of :mod:`lumirlib.data.identity`.
        white: Divisor of the image, where that is neither 1 nor 255.
    """

    kind: str
    file: Path
    name: str
    read: Callable[[], torch.Tensor]
    content: str
    white: float | None = None

    def fingerprint(self) -> dict[str, object]:
        """What tells that the volume is another: path, size, time of modification, checksum and white of the file."""
        found = self.file.stat()
        times = {"size": found.st_size, "mtime_ns": found.st_mtime_ns}
        return {"source": str(self.file.resolve()), **times, "content": self.content, "white": self.white}


@dataclass(frozen=True, eq=False)
class _Entry:
    """A cached volume: where its numbers are, and the JSON record behind them."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    record: dict

    def map(self) -> np.memmap:
        # copy on write: torch wants writable memory, and the file stays as it is
        return np.memmap(self.file, self.dtype, "c", self.offset, self.shape)

    def check(self) -> None:
        about = {key: value for key, value in self.record.items() if key != "crc32"}
        if _checksum(self.map(), about) != self.record["crc32"]:
            raise ValueError(f"{self.file}: damaged, its checksum is not the one it was written with; {REPAIR}")


def _checksum(array: np.ndarray, about: dict) -> int:
    """CRC-32 of a volume and what is recorded about it."""
    return zlib.crc32(array, zlib.crc32(json.dumps(about).encode()))


class VolumeCache:
    """The cached volumes of one cohort at one resolution.

    Attributes:
        folder: Folder of the files; files of other scans may lie there too.
        sources: Volumes to be cached.
        shape: Sides (D, H, W) of a volume.
        block: Number of a scan's voxels in one of the volume.
        dtype: Form to store, "auto", "float16" or "float32": see :func:`encode`.
        made: Number of volumes that :meth:`build` has made.
    """

    def __init__(
        self, folder: Path, sources: Sequence[Source], shape: tuple[int, int, int], block: int, dtype: str = "auto"
    ) -> None:
        check_choice(dtype, DTYPES, "dtype")
        self.folder, self.sources, self.shape, self.block, self.dtype = folder, tuple(sources), shape, block, dtype
        self.made = 0
        self._entries: dict[tuple[str, Path], _Entry] = {}
        self._checked: set[_Entry] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of the volumes that are there, which is also what the page cache holds once all have been read."""
        return sum(entry.file.stat().st_size for entry in self._entries.values())

    def describe(self) -> str:
        """In words, for provenance: how many volumes in which form, and how far they are from what is uncached."""
        images = [entry for (kind, _), entry in self._entries.items() if kind == "images"]
        parts = []
        for dtype in sorted({entry.dtype.name for entry in images}):
            errors = [entry.record["error"] for entry in images if entry.dtype.name == dtype]
            off = f"rounded by at most {max(errors):.1e}" if max(errors) else "exact"
            parts.append(f"{len(errors)} images in {dtype}, {off}")
        labels = len(self._entries) - len(images)
        return "; ".join(parts + [f"{labels} label volumes"] * bool(labels)) or "nothing"

    def get(self, kind: str, file: Path) -> StoredVolume | None:
        """The cached volume of a scan, None where it is not one of the cache's; its checksum is checked once.

        Raises:
            ValueError: the volume is damaged.
        """
        entry = self._entries.get((kind, file))
        if entry is None:
            return None
        if entry not in self._checked:
            entry.check()
            self._checked.add(entry)
        return StoredVolume(torch.from_numpy(entry.map()), entry.record["scale"])

    def build(
        self, workers: int | None = None, progress: bool = True, verify: bool = False, repair: bool = False
    ) -> None:
        """Open what is there and make what is missing or whose scan has changed.

        Killed at any moment, the next call goes on. A second process that builds the same cache waits for the first.

        Args:
            workers: Number of threads that read scans; None takes one per core, at most 8.
            progress: Whether to show progress bars.
            verify: Whether to compare every checksum now, instead of when a volume is first read.
            repair: Whether to compare every checksum now and make anew what is damaged.

        Raises:
            ValueError: a scan that cannot be read, or a cached file that is truncated, damaged or foreign.
            OSError: the disk is full, or the folder cannot be written.
            TimeoutError: another process has been building for hours.
        """
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        missing = self._open(self.sources, progress and (verify or repair), verify or repair, repair)
        if not missing:
            return
        with self._lock():
            missing = self._open(missing, False, repair, repair)  # another process may have made them meanwhile
            if missing:
                self._fill(missing, workers or min(8, os.cpu_count() or 1), progress)
                self.made += len(missing)

    def _open(self, sources: Sequence[Source], progress: bool, verify: bool, repair: bool) -> list[Source]:
        """Take up the entries of `sources`; returns those that have none, or only a stale one."""
        missing = []
        for source in tqdm(sources, desc="checksums", unit="volume", disable=not progress):
            try:
                entry = self._entry(source)
                if entry and verify:
                    entry.check()
                    self._checked.add(entry)
            except ValueError as error:
                if not repair:
                    raise
                tqdm.write(str(error), file=sys.stderr)
                entry = None
            if entry is None:
                missing.append(source)
            else:
                self._entries[source.kind, source.file] = entry
        return missing

    def _file(self, source: Source) -> Path:
        digest = hashlib.sha256(str(source.file.resolve()).encode()).hexdigest()[:8]
        return self.folder / source.kind / f"{source.name}_{digest}.npy"

    def _entry(self, source: Source) -> _Entry | None:
        file = self._file(source)
        if not file.exists():
            return None
        try:
            array = np.lib.format.open_memmap(file, mode="r")
            with open(file, "rb") as stored:
                stored.seek(array.offset + array.nbytes)
                record = parse_json(stored.read(MAX_RECORD_BYTES), "its record")
            if record["format"] != FORMAT:
                raise ValueError(f"format {record['format']!r} instead of {FORMAT!r}")
            fingerprint = source.fingerprint()
            if record["source"] != fingerprint["source"]:
                raise ValueError(f"made from {record['source']}, not from {fingerprint['source']}")
            known = {"content": source.content, "white": None} | record  # the first caches had neither
            if any(known[key] != value for key, value in fingerprint.items()):
                return None  # the scan has changed since
            found, expected = (array.shape, array.dtype.name), ((1, 1, *self.shape), record["dtype"])
            if found != expected or not array.flags.c_contiguous or not array.dtype.isnative:
                raise ValueError(f"expected shape and dtype {expected}, got {found}")
            scale, scaled = record["scale"], source.kind == "images"
            if found[1] not in STORED_DTYPES[source.kind] or not (
                type(scale) is int and scale > 0 if scaled else scale is None
            ):
                raise ValueError(f"no {source.kind} are stored as {found[1]} with the scale {scale!r}")
            if not isinstance(record["crc32"], int) or not isinstance(record["error"], float):
                raise ValueError("its record lacks a checksum or a rounding error")
            return _Entry(file, array.offset, array.dtype, array.shape, record)
        except Exception as error:  # numpy's parser of headers raises many types, a tokenizer's among them
            raise ValueError(
                f"{file}: not a whole volume of this cache (truncated or foreign?): {error}; {REPAIR}"
            ) from error

    def _lock(self) -> AbstractContextManager:
        """The lock of those who build, held; the system frees it when its process dies."""
        # filelock, which torch brings: flock leaves no stale locks, and where a file system has none it says so
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder / ".lock")
            try:
                return lock.acquire(timeout=0)
            except filelock.Timeout:
                tqdm.write(f"another process is building {self.folder}: waiting for it", file=sys.stderr)
                return lock.acquire(timeout=LOCK_SECONDS, poll_interval=0.2)
        except filelock.Timeout as error:
            raise TimeoutError(f"{self.folder}: another process has held its lock for {LOCK_SECONDS:g} s") from error
        except OSError as error:
            raise self._explained(error, self.folder) from error

    def _fill(self, missing: list[Source], workers: int, progress: bool) -> None:
        for left in self.folder.glob("*/.partial-*"):  # of a build that was killed; whoever writes holds the lock
            left.unlink()
        first, *rest = sorted(missing, key=lambda source: source.kind)  # an image, where one is missing
        done = len(self.sources) - len(missing)
        with (
            ThreadPoolExecutor(workers) as pool,
            tqdm(
                total=len(self.sources),
                initial=done,
                desc=f"cache {self.folder.name}",
                unit="volume",
                disable=not progress,
            ) as bar,
        ):
            self._store(first)
            bar.update()
            self._check_space(first, rest)
            futures = [pool.submit(self._store, source) for source in rest]
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # those under way are waited for at the end of `with`
                raise

    def _check_space(self, first: Source, rest: list[Source]) -> None:
        """Raise unless the disk has room for `rest`, after the form of the first volume that was made."""
        size = self._entries[first.kind, first.file].file.stat().st_size
        voxels = int(np.prod(self.shape))
        need = sum(size if source.kind == first.kind else 2 * voxels for source in rest)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise OSError(
                errno.ENOSPC,
                f"{len(rest)} more volumes need {need:,} bytes, and {free:,} are free; choose another folder",
                str(self.folder),
            )

    def _store(self, source: Source) -> None:
        fingerprint = source.fingerprint()  # before it is read: whoever changes it meanwhile makes this entry stale
        volume = source.read()
        labels = source.kind == "labels"
        stored, rounding = (StoredVolume(volume, None), 0.0) if labels else encode(volume, self.dtype, self.block)
        array = stored.values.contiguous().numpy()
        about = {"dtype": array.dtype.name, "scale": stored.scale, "error": rounding}
        about = {"format": FORMAT, **fingerprint, **about}
        record = about | {"crc32": _checksum(array, about)}

        def write(to: Path) -> None:
            with open(to, "wb") as out:
                np.lib.format.write_array_header_1_0(out, np.lib.format.header_data_from_array_1_0(array))
                out.write(array.data)  # array.tofile would lose the number of the error
                out.write(json.dumps(record).encode())

        file = self._file(source)
        try:
            write_atomically(file, write)
        except OSError as error:
            raise self._explained(error, file, array.nbytes) from error
        entry = self._entry(source)
        if entry is None:
            raise ValueError(f"{source.file} changed while it was read")
        self._entries[source.kind, source.file] = entry

    def _explained(self, error: OSError, file: Path, size: int = 0) -> OSError:
        if error.errno in DISK_FULL:
            left = len(self.sources) - len(self._entries)
            free = shutil.disk_usage(self.folder).free
            what = f"disk full: {left} more volumes need {left * size:,} bytes, and {free:,} are free"
            return OSError(error.errno, f"{what}; what is done stays, and the next build goes on", str(file))
        if error.errno in NOT_WRITABLE:
            what = f"cannot write the cache of volumes ({error.strerror}); choose another folder, or set LUMIRLIB_CACHE"
            return PermissionError(error.errno, what, str(file))
        return error
