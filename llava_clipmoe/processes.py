"""Child processes that never outlive us: run with their output in a log, ended by Ctrl-C, by SIGTERM and by an error.

children = Children()
with exit_on_sigterm():
    children.run_all([lambda: children.run(command, log=Path("a.log")), ...])
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")
PATIENCE = 20.0
"""Seconds that a child has to leave after SIGTERM; then it is killed."""


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """While the block runs, SIGTERM (`kill`, a cluster's time limit) raises SystemExit(143) here, as Ctrl-C raises
    KeyboardInterrupt: children are ended and files are closed."""
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    except ValueError:  # not the main thread: its owner decides about signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Children:
    """The child processes of one task; `stop` ends them all, and no other is started afterwards."""

    def __init__(self) -> None:
        self.stopped = False
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()

    def run(
        self, command: Sequence[str], *, log: Path | None = None, env: Mapping[str, str] | None = None
    ) -> int | None:
        """Run one command and wait for it; -> its exit status, None where `stop` came first.

        Its output is appended to `log`; without one it goes where ours goes.
        """
        out = log.open("ab") if log else None
        try:
            with self._lock:
                if self.stopped:
                    return None
                child = subprocess.Popen(command, stdout=out, stderr=out and subprocess.STDOUT, env=env)
                self._running.add(child)
            status = child.wait()
        finally:
            if out:
                out.close()
        with self._lock:
            self._running.discard(child)
            return None if self.stopped else status

    def run_all(self, works: Sequence[Callable[[], Result]], at_once: int | None = None) -> list[Result]:
        """Call all `works` in threads; -> their results. An error, or Ctrl-C, stops all children and is raised."""
        with ThreadPoolExecutor(at_once or len(works)) as pool:
            futures = [pool.submit(work) for work in works]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()  # raises its error
                return [future.result() for future in futures]
            except BaseException:
                self.stop()
                for future in futures:
                    future.cancel()
                raise

    def stop(self) -> None:
        """End every child and wait until it is gone."""
        with self._lock:
            self.stopped = True
            running = list(self._running)
        for child in running:
            child.terminate()
        for child in running:
            try:
                child.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                child.kill()


def end_of(log: Path, lines: int = 15) -> str:
    """The last lines of a log, a progress bar's carriage returns read as line ends."""
    return "\n".join(log.read_text(errors="replace").replace("\r", "\n").splitlines()[-lines:])
