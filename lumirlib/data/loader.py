"""Pairs of volumes read ahead of the training step that takes them, on the step's device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import torch

from lumirlib.data.cache import StoredVolume
from lumirlib.data.cohort import Pair, Subject


class LoadError(ValueError):
    """A volume could not be read; the message names the subject and the file."""


@dataclass(frozen=True)
class Batch:
    """One step's data.

    Attributes:
        pairs: Pairs in the batch.
        fixed: Volumes of the fixed subjects, ``(B, 1, D, H, W)``, float32 images or integer labels.
        moving: Volumes of the moving subjects, ``(B, 1, D, H, W)``, float32 images or integer labels.
    """

    pairs: tuple[Pair, ...]
    fixed: torch.Tensor
    moving: torch.Tensor


class PairLoader:
    """Iterates over batches in the order given while threads read the next ones.

    For use in a `with` statement, and once: its end, however it comes, ends the threads.

    Threads, not processes: reading maps, copies and divides outside Python's lock, so a step of PyTorch's operations
    loses a few percent at most to a thread that decodes 1 mm volumes on the CPU (`benchmarks/loading.py`).

    Args:
        read: Function that reads a subject's volume: :meth:`lumirlib.data.Cohort.stored_image` (decoded on the device,
            so that uint8 crosses the bus), `image` or `label_volume`.
        batches: Pairs of each batch; taken one after another, `depth` batches ahead of the step.
        device: Device that the volumes go to. With CUDA they go through pinned memory, on a stream of their own.
        depth: Number of batches read ahead.
        workers: Number of threads.

    Attributes:
        waited: Seconds that the consumer has waited for data.
        total: Seconds since the first batch was asked for.
        batches_given: Number of batches handed out.
    """

    def __init__(
        self,
        read: Callable[[Subject], torch.Tensor | StoredVolume],
        batches: Iterable[Sequence[Pair]],
        device: torch.device | str = "cpu",
        depth: int = 2,
        workers: int = 1,
    ) -> None:
        if depth < 1 or workers < 1:
            raise ValueError(f"depth and workers must be at least 1, got {depth} and {workers}")
        self.read, self.device = read, torch.device(device)
        self.waited, self.batches_given = 0.0, 0
        self._batches, self._depth = iter(batches), depth
        self._ready: deque[Future[Batch]] = deque()
        self._started: float | None = None
        self._ended: float | None = None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="PairLoader")

    @property
    def total(self) -> float:
        """Seconds since the first batch was asked for, up to the end."""
        if self._started is None:
            return 0.0
        return (time.perf_counter() if self._ended is None else self._ended) - self._started

    def __enter__(self) -> PairLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; what was read ahead is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ready.clear()
        if self._ended is None:
            self._ended = time.perf_counter()

    def __iter__(self) -> Iterator[Batch]:
        if self._started is not None or self._ended is not None:
            raise RuntimeError("a PairLoader can be iterated over once")
        self._started = time.perf_counter()
        try:
            self._read_ahead(self._depth)
            while self._ready:
                asked = time.perf_counter()
                batch = self._ready.popleft().result()
                self.waited += time.perf_counter() - asked
                self._read_ahead(1)
                self.batches_given += 1
                if self._stream is not None:  # the memory is the side stream's: not to be reused before the step's end
                    for volume in (batch.fixed, batch.moving):
                        volume.record_stream(torch.cuda.current_stream(self.device))
                yield batch
        finally:
            self.close()

    def _read_ahead(self, count: int) -> None:
        self._ready.extend(self._pool.submit(self._load, tuple(pairs)) for pairs in islice(self._batches, count))

    def _load(self, pairs: tuple[Pair, ...]) -> Batch:
        if self._stream is None:
            return self._on_device(pairs)
        with torch.cuda.stream(self._stream):
            batch = self._on_device(pairs)
            # here, so that a batch that is ready lies on the device, and the time waited counts the copy
            self._stream.synchronize()
        return batch

    def _on_device(self, pairs: tuple[Pair, ...]) -> Batch:
        sides = []
        for side in ("fixed", "moving"):
            volumes = [self._volume(getattr(pair, side)) for pair in pairs]
            sides.append(volumes[0] if len(volumes) == 1 else torch.cat(volumes))
        return Batch(pairs, *sides)

    def _volume(self, subject: Subject) -> torch.Tensor:
        try:
            volume = self.read(subject)
        except (ValueError, OSError, RuntimeError) as error:
            raise LoadError(f"cannot read {subject.name}: {error}") from error
        stored = volume if isinstance(volume, StoredVolume) else StoredVolume(volume, None)
        if self._stream is None:
            return stored.decode().to(self.device)
        pinned = torch.empty_like(stored.values, pin_memory=True).copy_(stored.values)
        return StoredVolume(pinned.to(self.device, non_blocking=True), stored.scale).decode()
