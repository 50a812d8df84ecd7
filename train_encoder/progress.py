"""The progress bar of long work; only process 0 of a distributed run prints.

with Bar("stage 1", total=1_200_000) as bar:
    bar.advance(800, loss=0.71)
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from datetime import timedelta

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


def is_main_process() -> bool:
    """True on process 0 of a distributed run, and where nothing is distributed."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def clock(seconds: float | None) -> str:
    """Seconds as h:mm:ss, with days when there are some; "-:--:--" when unknown."""
    return str(timedelta(seconds=int(seconds))) if seconds is not None and math.isfinite(seconds) else "-:--:--"


class Rate:
    """Items a second over the last `window` seconds (at least the last two reports)."""

    def __init__(self, window: float = 30.0) -> None:
        self.window = window
        self.points: deque[tuple[float, int]] = deque()

    def add(self, now: float, done: int) -> None:
        self.points.append((now, done))
        while len(self.points) > 2 and now - self.points[0][0] > self.window:
            self.points.popleft()

    @property
    def per_second(self) -> float | None:
        if len(self.points) < 2:
            return None
        (first, before), (last, after) = self.points[0], self.points[-1]
        return (after - before) / (last - first) if last > first else None


class Bar:
    """Progress of long work: percentage, done/total, images a second, time elapsed and left, and extra values.

    On a terminal a rich bar; elsewhere (CI logs, a pipe) one plain line at most every `interval` seconds, without
    control characters. Silent on processes other than 0. `completed` is what an earlier, resumed run had done: it
    counts in the percentage, not in the speed. `total` may be None (unknown length).
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        *,
        completed: int = 0,
        unit: str = "images",
        interval: float = 20.0,
        console: Console | None = None,
        main: bool | None = None,
    ) -> None:
        self.description = "".join(c if c.isprintable() else " " for c in description)
        self.total, self.done, self.unit, self.interval = total, completed, unit, interval
        self.console = console or Console()
        self.main = is_main_process() if main is None else main
        # Not console.is_terminal: FORCE_COLOR, which CI services set, makes that true for a pipe.
        self.live = self.console.file.isatty() and not self.console.is_dumb_terminal
        self.values: dict[str, float] = {}
        self.rate = Rate()
        self._progress: Progress | None = None
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> Bar:
        self._start = time.monotonic()
        self.rate.add(self._start, self.done)
        if self.main and self.live:
            # `text` is a field of ours, not markup: a "[" in a data set's name must not be read as a style.
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}", markup=False),
                console=self.console,
            )
            self._progress.start()
            self._progress.add_task(self.description, total=self.total, completed=self.done, text="")
        elif self.main:
            self._print_line()
        return self

    def advance(self, n_images: int = 1, **values: float) -> None:
        """Count `n_images` more, and show `values` (a loss) beside the bar."""
        self.done += n_images
        self.values.update(values)
        if not self.main:
            return
        now = time.monotonic()
        self.rate.add(now, self.done)
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=self.done, text=self.text())
        elif now - self._last_line >= self.interval:
            self._print_line()

    def write(self, text: str) -> None:
        """Print a line above the bar."""
        if self.main and self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        elif self.main:
            print(text, file=self.console.file, flush=True)

    def text(self) -> str:
        """Everything but the description and the drawn bar, as one line."""
        rate, of_total, left = self.rate.per_second, "", None
        parts = [f"{100 * min(self.done / self.total, 1):3.0f}%"] if self.total else []
        if self.total is not None:
            of_total, left = f"/{self.total:,}", (self.total - self.done) / rate if rate else None
        speed = f"{rate:,.1f}" if rate is not None else "-"
        parts += [f"{self.done:,}{of_total} {self.unit}", f"{speed} {self.unit}/s"]
        parts += [f"elapsed {clock(time.monotonic() - self._start)}", f"left {clock(left)}"]
        return "  ".join([*parts, *(f"{name} {value:.4g}" for name, value in self.values.items())])

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        print(f"{self.description}: {self.text()}", file=self.console.file, flush=True)

    def __exit__(self, *_: object) -> None:
        if not self.main:
            return
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], text=self.text(), refresh=True)
            self._progress.stop()
            self._progress = None
        else:
            self._print_line()
