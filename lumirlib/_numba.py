"""Loops over voxels that neither PyTorch nor NumPy does in one pass, compiled by numba, for the CPU.

All release Python's lock, so that callers may run several in threads; what they compute does not depend on how many.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from numba import njit

Item = TypeVar("Item")
Result = TypeVar("Result")


def compiled(**options: object) -> Callable[[Callable], Callable]:
    """Numba's njit, cached on disk; where no folder for that can be written, compiled anew in every process."""

    def decorate(function: Callable) -> Callable:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError as error:
            if "no locator" not in str(error):
                raise
            return njit(**options)(function)

    return decorate


@compiled(nogil=True)
def copy(row, into):  # pragma: no cover (compiled)
    """Copy a row in a compiled loop; ``into[:] = row`` takes numba seconds to compile, with a message if it fails."""
    for k in range(into.size):
        into[k] = row[k]


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Results of `function` in the order of `items`, on as many threads as PyTorch uses."""
    if torch.get_num_threads() == 1:  # starting one takes longer than many a loop
        yield from map(function, items)
        return
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        yield from pool.map(function, items)


def slabs(depth: int) -> list[tuple[int, int]]:
    """First and last (not included) of as many equal parts of an axis as PyTorch uses threads."""
    ends = np.linspace(0, depth, min(torch.get_num_threads(), depth) + 1).astype(int).tolist()
    return list(itertools.pairwise(ends))
