"""Running the cells of a comparison: child processes, some at once, and how long the rest will take."""

from __future__ import annotations

import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PATIENCE = 20
"""Seconds that a child has to leave after SIGTERM; then it is killed. A checkpoint is whole or not there."""


class Runner:
    """Runs commands as child processes, some at once, and ends them all when it is stopped."""

    def __init__(self, jobs: int):
        self.jobs, self.stopped = jobs, False
        self._children: set[subprocess.Popen] = set()
        self._lock = threading.Lock()

    def all(self, works: Sequence[Callable[[], None]]) -> None:
        """Do all; the first error (or Ctrl-C) stops the others and is raised."""
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(work) for work in works]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self.stop()
                for future in futures:
                    future.cancel()
                raise

    def run(self, words: Sequence[str], log: Path) -> bool:
        """One command, its output in `log` -> whether it ran to its end (False: everything was stopped).

        Raises ChildProcessError with the end of the log when it fails by itself.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        with log.open("ab") as out:
            with self._lock:  # none may be born after all have been ended
                if self.stopped:
                    return False
                child = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT,
                                         env={"OMP_NUM_THREADS": threads, **os.environ})  # fmt: skip
                self._children.add(child)
            code = child.wait()
            self._children.discard(child)
        if code and not self.stopped:
            tail = "\n".join(log.read_text(errors="replace").replace("\r", "\n").splitlines()[-12:])
            raise ChildProcessError(
                f"a cell failed (exit status {code}). The end of {log}:\n{tail}\n"
                "Mend the cause and run the same command again: finished cells are kept."
            )
        return not code

    def stop(self) -> None:
        """End every child, and wait until it is gone."""
        with self._lock:
            self.stopped = True
            children = list(self._children)
        for child in children:
            child.terminate()
        for child in children:
            try:
                child.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                child.kill()


class Clock:
    """How long the cells that are left will take: by the mean of those that ended in this call, whatever the recipe.

    A cell that is running counts with what is left of the mean; `jobs` cells share the time.
    """

    def __init__(self, cells: int, jobs: int, now: Callable[[], float] = time.monotonic):
        self.waiting, self.jobs, self.now = cells, jobs, now
        self.seconds: list[float] = []
        self._running: dict[object, float] = {}
        self._lock = threading.Lock()

    def begin(self, cell: object) -> None:
        with self._lock:
            self.waiting -= 1
            self._running[cell] = self.now()

    def end(self, cell: object, ran: bool) -> None:
        """ran: False for a cell that was there already; it says nothing of the time."""
        with self._lock:
            started = self._running.pop(cell)
            if ran:
                self.seconds.append(self.now() - started)

    @property
    def left(self) -> float | None:
        """Seconds; None before the first cell has ended."""
        with self._lock:
            if not self.seconds:
                return None
            mean = statistics.mean(self.seconds)
            rest = [max(0.0, mean - (self.now() - started)) for started in self._running.values()]
            shared = (self.waiting * mean + sum(rest)) / self.jobs
            return max([shared, *rest, *([mean] if self.waiting else [])])
