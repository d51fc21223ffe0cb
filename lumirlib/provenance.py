"""Where a number comes from: commit, command, seed, cohort, preset, device, versions."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch

from lumirlib._version import __version__

PACKAGES = ("torch", "numpy", "scipy", "numba", "nibabel", "pandas", "matplotlib", "surface-distance", "deepmriprep")

#: Stands for the results that the study has committed, wherever a results folder is asked for.
STUDY = "study"


def project_root() -> Path | None:
    """The checkout that this package runs from, or None for a copy installed elsewhere."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() else None


def results_folder(out: str | Path = "") -> Path:
    """The folder that results are read from or written to: one's own, the study's, or any other.

    What the study has committed and what a user makes are two places, so that a run never overwrites a committed file.

    Args:
        out: Name or path of the folder: "study" for what the study has committed, `results/` of the checkout; empty for
            one's own results, which are in the folder named by LUMIRLIB_RESULTS, or else in `runs/` of the checkout, or
            else, where there is no checkout, in `lumirlib-results/` of the current folder; otherwise a path.

    Raises:
        FileNotFoundError: "study" where there is no checkout.
    """
    root = project_root()
    if str(out) == STUDY:
        if root is None:
            raise FileNotFoundError(
                "the results of the study come with a checkout of lumirlib, and this is a package without one: "
                "give a results folder"
            )
        return root / "results"
    chosen = str(out) or os.environ.get("LUMIRLIB_RESULTS", "")
    if chosen:
        return Path(chosen).expanduser()
    return root / "runs" if root else Path.cwd() / "lumirlib-results"


def commit() -> str:
    """Commit of the checkout, with "+changes" where tracked files differ from it; "unknown" outside a checkout."""
    root = project_root()
    if root is None:
        return "unknown"

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # results and executed notebooks are what a run makes, not what it is made from
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!results", ":!*.ipynb")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@lru_cache(maxsize=1)
def source_digest() -> str:
    """16 hexadecimal digits of the package's own code, committed or not."""
    content = hashlib.sha256()
    folder = Path(__file__).resolve().parent
    for path in sorted(folder.rglob("*.py")):
        content.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()[:16]


def redact_path(value: object) -> str:
    """A parameter as provenance shows it: a path that is absolute or leaves the folder keeps its last part only."""
    path = Path(str(value))
    return f"<folder>/{path.name}" if path.is_absolute() or ".." in path.parts else str(value)


def describe_device(device: torch.device) -> str:
    """The device in words: a GPU's name, or the number of CPU threads and the processor's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads, {platform.machine()}"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version(), "lumirlib": __version__}
    return found | {package: version(package) for package in PACKAGES}


def version(package: str) -> str:
    """Installed version of a package, "not installed" if there is none."""
    if package == "lumirlib":
        return __version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def now() -> str:
    """The present time, UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
