"""A queue of bounded length in front of something that serves one at a time, in the order of arrival."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class QueueFull(ValueError):
    """The queue has its full length already."""


class Stopped(Exception):
    """The turn was given up before it came."""


class Turns:
    def __init__(self, most_waiting: int = 16):
        self.most_waiting = most_waiting
        self._changed = threading.Condition()
        self._line: deque[object] = deque()

    @contextmanager
    def turn(self, waiting: Callable[[int], None] | None = None, stop: threading.Event | None = None) -> Iterator[None]:
        """Wait for a turn and have it while the block runs.

        `waiting` is called with the number of those that come first, whenever it changes. Setting `stop` gives up the
        place. Raises QueueFull at once when `most_waiting` wait already, Stopped when `stop` is set before the turn.
        """
        me, reported = object(), 0
        with self._changed:
            if len(self._line) > self.most_waiting:
                raise QueueFull(
                    f"{self.most_waiting} questions are waiting for this model already. Try again in a minute."
                )
            self._line.append(me)
        try:
            with self._changed:
                while before := self._line.index(me):
                    if waiting is not None and before != reported:
                        waiting(reported := before)
                    if stop is not None and stop.is_set():
                        break
                    self._changed.wait(timeout=0.2)  # seconds: setting `stop` wakes nobody, so it is polled
            if stop is not None and stop.is_set():
                raise Stopped
            yield
        finally:
            with self._changed:
                self._line.remove(me)
                self._changed.notify_all()
