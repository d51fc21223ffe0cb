"""What the tests of faults, bad data and hostile files share: a tally, limits of memory, and whose error it is."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lumirlib

PACKAGE = str(Path(lumirlib.__file__).parent)
#: How many inputs a reader gets, and how often a writer is killed: in every run of the tests, and with --long.
QUICK, LONG = 25, 300
KILLS, LONG_KILLS = 5, 20


class Tally:
    """Counts what was tried, by kind; with LUMIRLIB_TALLY written to that file, for docs/reliability.md."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = {}

    def count(self, kind: str, outcome: str, by: int = 1) -> None:
        outcomes = self.counts.setdefault(kind, {})
        outcomes[outcome] = outcomes.get(outcome, 0) + by

    def write(self, tests: int, failed: int) -> None:
        target = os.environ.get("LUMIRLIB_TALLY")
        if target:
            found = {"tests": tests, "failed": failed, "counts": dict(sorted(self.counts.items()))}
            Path(target).write_text(json.dumps(found))


TALLY = Tally()


def is_ours(error: BaseException) -> bool:
    """Whether this package raised an error, in place of letting another's through."""
    last = error.__traceback__
    while last.tb_next:
        last = last.tb_next
    return last.tb_frame.f_code.co_filename.startswith(PACKAGE)


@contextmanager
def at_most(mebibytes: int) -> Iterator[None]:
    """Let the process take so much more memory, used or not, and no more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + mebibytes * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def refused_or(reader: str, call: Callable[[], Any], *names: str, memory: int = 200) -> Any:
    """What a call gives; None where it refused, which it must do by an error of ours that has one of `names`."""
    try:
        with at_most(memory):
            value = call()
    except (ValueError, OSError) as error:
        assert is_ours(error), f"{reader}: not our error: {error!r}"
        assert any(name in str(error) for name in names), f"{reader}: {error} names none of {names}"
        TALLY.count(reader, "refused")
        return None
    TALLY.count(reader, "read right")
    return value


def try_inputs(inputs: int, strategy: st.SearchStrategy, check: Callable[[Any], None]) -> None:
    """Call `check` with that many generated inputs, the same in every run."""
    tried = []

    @settings(
        max_examples=inputs, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def run(case):
        tried.append(1)
        check(case)

    run()
    assert len(tried) >= inputs


#: Harm to the bytes of a file: how much is cut off, and bits that are flipped, by their place from 0 to 1.
PLACES = st.floats(0, 1, exclude_max=True)
BYTE_HARM = st.one_of(
    st.tuples(st.just("cut"), PLACES),
    st.tuples(st.just("flip"), st.lists(st.tuples(PLACES, st.integers(0, 7)), min_size=1, max_size=4)),
    st.tuples(st.just("fill"), st.tuples(PLACES, st.binary(min_size=1, max_size=40))),
    st.tuples(st.just("all"), st.binary(max_size=400)),
)


def harmed(content: bytes, harm: tuple[str, Any]) -> bytes:
    """The bytes of a file after such a harm."""
    kind, how = harm
    if kind == "cut":
        return content[: int(how * len(content))]
    if kind == "all":
        return how
    raw = bytearray(content)
    if kind == "fill":
        place = int(how[0] * len(raw))
        raw[place : place + len(how[1])] = how[1]
        return bytes(raw)
    for where, bit in how:
        raw[int(where * len(raw))] ^= 1 << bit
    return bytes(raw)


class Content(bytes):
    """A file's bytes that hypothesis does not print."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


JSON_VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=6),
        st.sampled_from([10**400, -1, 0, 2**31, 1e308, "../x.nii.gz", "/etc/passwd", "a\0b", "x" * 5000, "$(true)"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=5,
)


@st.composite
def json_harm(draw: Callable, content: Any) -> Any:
    """`content` (not changed) with one to three of its parts replaced, left out or repeated."""
    found = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        holder = found
        for _ in range(draw(st.integers(0, 4))):
            inner = [part for part in parts(holder) if isinstance(part, (dict, list)) and part]
            if not inner:
                break
            holder = draw(st.sampled_from(inner))
        if not holder:
            continue
        key = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
        how = draw(st.sampled_from(["replace", "replace", "remove", "repeat"]))
        if how == "replace":
            holder[key] = draw(JSON_VALUES)
        elif how == "remove":
            del holder[key]
        elif isinstance(holder, list):
            holder.append(holder[key])
        else:
            holder[f"{key}2"] = holder[key]
    return found


def parts(holder: Any) -> list[Any]:
    """Of a list or dict."""
    return list(holder.values()) if isinstance(holder, dict) else list(holder)
