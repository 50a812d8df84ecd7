"""One at a time, in the order of arrival, and everyone knows how many are before them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class QueueFull(ValueError):
    """As many wait already as may wait."""


class Stopped(Exception):
    """Whoever waited for a turn does not want it any more."""


class Turns:
    """A queue of bounded length in front of something that serves one at a time."""

    def __init__(self, most_waiting: int = 16):
        self.most_waiting = most_waiting
        self._changed = threading.Condition()
        self._line: deque[object] = deque()

    @contextmanager
    def turn(self, waiting: Callable[[int], None] | None = None, stop: threading.Event | None = None) -> Iterator[None]:
        """Wait for one's turn and have it while the block runs.

        waiting: told how many are before, whenever that changes. stop: gives up the place.
        Raises QueueFull at once when `most_waiting` wait already, Stopped when `stop` is set before the turn has come.
        """
        me = object()
        with self._changed:
            if len(self._line) > self.most_waiting:
                raise QueueFull(
                    f"{self.most_waiting} questions are waiting for this model already. Try again in a minute."
                )
            self._line.append(me)
        try:
            self._wait(me, waiting, stop)
            yield
        finally:
            with self._changed:
                self._line.remove(me)
                self._changed.notify_all()

    def _wait(self, me: object, waiting: Callable[[int], None] | None, stop: threading.Event | None) -> None:
        told = 0
        with self._changed:
            while before := self._line.index(me):
                if waiting is not None and before != told:
                    waiting(told := before)
                if stop is not None and stop.is_set():
                    raise Stopped
                self._changed.wait(timeout=0.2)  # seconds: `stop` is not told to us, we look
        if stop is not None and stop.is_set():
            raise Stopped
