"""Ctrl-C and SIGTERM: held back until what is saved is whole."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lumirlib.training.engine import launched


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Meanwhile SIGTERM raises SystemExit, with status 143; not outside the main thread, which takes no signals."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_with_parent() -> None:
    """In a process of a pool: end as soon as the process that started it does, even when that is killed.

    Left alone, it would finish what it computes and then wait for work forever.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


class StopRequest:
    """Holds back Ctrl-C and SIGTERM until a step is complete, so that what is saved is whole.

    Ctrl-C twice stops at once, but not under torchrun, which passes one on in several forms. Outside the main
    thread, where Python takes no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if number == self.signal == signal.SIGINT and not launched():
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def obey(self) -> None:
        """Stop: after Ctrl-C by KeyboardInterrupt, else, as after SIGTERM, by exit status 143."""
        if self.signal == signal.SIGINT and not launched():
            raise KeyboardInterrupt("stopped after saving a checkpoint; the same call goes on from here")
        raise SystemExit(128 + signal.SIGTERM)
