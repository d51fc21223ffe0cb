"""Atomic writes of small files: a reader, or a run that resumes, sees the whole file or none."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# os.umask can only be read by setting it, for the whole process: done once here, before there are threads
_UMASK = os.umask(0)
os.umask(_UMASK)


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Call `write` on a temporary file beside `path`, then move it into place.

    Args:
        path: the file to make; its folder is made too.
        write: writes to the path it is given. If it raises, or the disk is full, `path` stays as it was.

    Returns:
        `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".partial-", suffix="".join(path.suffixes), dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_UMASK)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: str | Path, content: Any) -> Path:
    """Write `content` as indented JSON, atomically."""
    return write_atomically(path, lambda to: to.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


def write_between(path: str | Path, markers: tuple[str, str], text: str) -> Path:
    """Replace what stands between two markers in a text file, atomically; ValueError for one that lacks them."""
    path = Path(path)
    before, start, rest = path.read_text(encoding="utf-8").partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not (start and end):
        raise ValueError(f"{path} must hold {markers[0]} and, after it, {markers[1]}")
    whole = f"{before}{start}\n\n{text}\n\n{end}{after}"
    return write_atomically(path, lambda to: to.write_text(whole, encoding="utf-8"))
