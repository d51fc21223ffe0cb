"""How many threads sweeps, tests and notebooks take on a CPU: decided here. Nothing here waits for PyTorch.

Idle threads of OpenMP spin for a while before they sleep. Where there are more threads than cores they spin on cores
that others need, which slows jobs beside each other up to tenfold.
"""

from __future__ import annotations

import os


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_each(jobs: int, processors: int | None = None) -> int:
    """Threads for each of `jobs` that share so many processors, by default this process's cores; at least 1."""
    return max(1, (processors or cores()) // jobs)


def environment_of(threads: int) -> dict[str, str]:
    """Variables that give a process, and those that it starts, so many threads; set before PyTorch is imported."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
