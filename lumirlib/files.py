"""Small files: written atomically, so that a reader or a run that resumes sees the whole file or none; JSON read."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# os.umask can only be read by setting it, for the whole process: done once here, before there are threads
_UMASK = os.umask(0)


os.umask(_UMASK)
#: Temporary files of writers that were killed are removed by the next one in that folder when they are this old.
STALE_SECONDS = 24 * 3600.0


@contextmanager
def no_empty_folders(path: str | Path) -> Iterator[None]:
    """A block that makes a file's folders: those that were not there before it, and are empty after it, are removed."""
    made = [folder for folder in Path(path).parents if not folder.exists()]
    try:
        yield
    finally:
        for folder in made:
            with suppress(OSError):  # not empty, which is as it should be, or never made
                folder.rmdir()


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Call `write` on a temporary file beside `path`, then move it into place.

    Args:
        path: Path of the file to make; its folder is made too.
        write: Function that writes to the path it is given. If it raises, or the disk is full, `path` stays as it was,
            and no folder is left empty.

    Returns:
        `path`.

    Raises:
        OSError: of the system's own kind, that names `path`: a folder that cannot be written, a full disk.
    """
    path = Path(path)
    with no_empty_folders(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(path.parent)
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
        except OSError as error:  # names the temporary file, or none
            kept = "; the file that was there is kept" if path.is_file() else ""
            raise OSError(error.errno, f"cannot write: {error.strerror or error}{kept}", str(path)) from error
    return path


def _remove_stale(folder: Path) -> None:
    for left in folder.glob(".partial-*"):
        with suppress(OSError):  # another process may be doing the same
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                left.unlink()


def check_writable(folder: str | Path) -> None:
    """Make a folder where it is missing, and raise the OSError of :func:`write_atomically` unless it can be written."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "cannot write: expected a folder, got a file", str(folder))
    probe = folder / ".writable"
    write_atomically(probe, lambda to: to.write_bytes(b"0")).unlink(missing_ok=True)


def check_writable_file(path: str | Path) -> None:
    """As :func:`check_writable`, for a file that is to be written later; one that is there may be replaced."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "cannot write: expected a file, got a folder", str(path))
    check_writable(path.parent)


def check_new(path: str | Path, overwrite: bool) -> None:
    """As :func:`check_writable_file`, and raise FileExistsError for a file that is there, unless it may be replaced."""
    path = Path(path)
    with no_empty_folders(path):
        check_writable_file(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: exists already; --overwrite replaces it")


class Journal:
    """What a long job found so far, one JSON line each, so that a job that was killed goes on where it stopped.

    A line that a kill cut off is dropped, and so is a whole journal with another key.

    Args:
        path: Path of the journal; made, with its folder, where it is missing.
        key: What the results depend on, such as code, weights and data.

    Attributes:
        found: Results by name.
    """

    def __init__(self, path: str | Path, key: dict[str, Any]) -> None:
        self.path = Path(path)
        self.found: dict[str, Any] = {}
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        first, *lines = text.split("\n")
        if first == json.dumps(key):
            with suppress(ValueError):
                for line in lines:
                    name, result = json.loads(line)
                    self.found[name] = result
        kept = [key, *([name, result] for name, result in self.found.items())]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(self.path, lambda to: to.write_text(text, encoding="utf-8"))

    def add(self, name: str, result: Any) -> None:
        """Keep a result, on the disk too."""
        self.found[name] = result
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps([name, result]) + "\n")
            lines.flush()
            os.fsync(lines.fileno())

    def remove(self) -> None:
        """Remove the journal, and its folder if nothing else is in it."""
        self.path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            self.path.parent.rmdir()


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


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, not an object, or an object that has a key twice, of which a reader would drop one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such JSON file: {path}")
    return parse_json(path.read_bytes(), str(path))


def parse_json(content: bytes, name: str) -> dict[str, Any]:
    """As :func:`read_json`, from the bytes of a file with a name."""
    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:  # numbers of too many digits and double keys are ValueErrors too
        raise ValueError(f"{name}: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected a JSON object, got {type(found).__name__}")
    return found


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice in one object")
    return found
