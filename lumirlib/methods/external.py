"""Other people's programs: running one on a pair, and the error if it is not installed."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lumirlib._checks import check_finite, check_image, check_same_grid
from lumirlib.methods.base import Tool

#: How much of a failed program's output an error repeats.
LAST_LINES = 12


class MethodUnavailableError(RuntimeError):
    """A method was called whose program, package or weights are not on this machine; the message says what to do."""


def check_single_pair(fixed: torch.Tensor, moving: torch.Tensor) -> None:
    """Raise unless both are one image ``(1, 1, D, H, W)`` on one grid, floating point and finite.

    Raises:
        TypeError: not tensors, or not of a floating-point dtype.
        ValueError: other shapes, more than one pair, or values that are not finite.
    """
    check_image(fixed, "fixed", channels=1)
    check_image(moving, "moving", channels=1)
    check_same_grid(fixed, moving, "fixed", "moving")
    if fixed.shape[0] != 1:
        raise ValueError(f"fixed and moving must be one pair (1, 1, D, H, W), got a batch of {fixed.shape[0]}")
    check_finite(fixed, "fixed")
    check_finite(moving, "moving")


def grid_affine(shape: Sequence[int], resolution_mm: float, orientation: str = "RAS") -> np.ndarray:
    """Voxel-to-RAS matrix (4 x 4, mm) of a grid of cubic voxels centred at the origin of the world.

    Args:
        shape: Sides (D, H, W).
        resolution_mm: Edge of a voxel, in mm.
        orientation: Directions of the array's axes i, j, k, as nibabel's axis codes: one of R/L, A/P, S/I each.

    Raises:
        ValueError: not such three letters.
    """
    letters = orientation.upper()
    pairs = ("RL", "AP", "SI")
    if len(letters) != 3 or sorted(next((p for p in pairs if x in p), "") for x in letters) != sorted(pairs):
        raise ValueError(f"orientation must name one of R/L, A/P and S/I each, like 'RAS', got {orientation!r}")
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, letter in enumerate(letters):
        world = next(number for number, pair in enumerate(pairs) if letter in pair)
        affine[world, axis] = resolution_mm if letter == pairs[world][0] else -resolution_mm
    affine[:3, 3] = -affine[:3, :3] @ ((np.asarray(shape, dtype=float) - 1) / 2)
    return affine


def run_program(command: Sequence[str], folder: Path) -> str:
    """Run a program to its end, without a shell, in a process group of its own.

    Whatever interrupts the waiting, Ctrl-C first of all, kills the program and all that it has started.

    Args:
        command: Program and its arguments.
        folder: Folder that it runs in.

    Returns:
        The last lines of what it printed.

    Raises:
        RuntimeError: it cannot be started, or ends with an exit status other than 0.
    """
    name = Path(command[0]).name
    try:
        process = subprocess.Popen(
            list(command),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise RuntimeError(f"{name} cannot be started: {error}") from error
    try:
        output, complaints = process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    # some programs complain on their standard output
    said = "\n".join((complaints if complaints.strip() else output).strip().splitlines()[-LAST_LINES:])
    if process.returncode != 0:
        raise RuntimeError(f"{name} failed with exit status {process.returncode}: {said or 'it printed nothing'}")
    return said


class ExternalTool(Tool):
    """A row that another team's program, package or weights are run for, where the user has them."""

    def __post_init__(self) -> None:
        if not 0 < self.resolution_mm < math.inf:
            raise ValueError(f"resolution_mm must be above 0, got {self.resolution_mm}")

    def __call__(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """Displacement of a pair; see :mod:`lumirlib.spatial` for its meaning.

        Args:
            fixed: Fixed image ``(1, 1, D, H, W)`` in [0, 1].
            moving: Moving image in [0, 1], same shape.

        Returns:
            ``(1, 3, D, H, W)`` in voxels, on the device of `fixed`.

        Raises:
            MethodUnavailableError: what the row needs is not on this machine; the message says what to do.
            RuntimeError: it failed; the message has the program's last lines.
            TypeError, ValueError: images that do not fit.
        """
        check_single_pair(fixed, moving)
        missing = self.available()
        if missing:
            raise MethodUnavailableError(f"{self.name}: {missing}")
        return self.register(fixed, moving).to(fixed.device)

    def register(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """What :meth:`__call__` returns, on any device; the images are checked and the program is there."""
        raise NotImplementedError
