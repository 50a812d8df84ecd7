"""What a run says while it works: `metrics.jsonl`, the progress bar, and the peak memory of a piece of work.

    metrics = Metrics(run_dir, trackers=("tensorboard",))
    metrics.truncate_after("stage1", checkpoint_step)          # after a resume: no point of the curve twice
    with Bar("stage 1", total=1_200_000) as bar:
        bar.advance(800, loss=0.71)
        metrics.log({"stage": "stage1", "step": 1, "steps": 1500, "loss": 0.71})

Only process 0 of a distributed run writes or prints; the calls do nothing on the others.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from llava_clipmoe.files import SaveError, atomic_file

from .trackers import TRACKERS, Tracker, check_trackers

METRICS = "metrics.jsonl"
_NON_FINITE = {"nan", "inf", "-inf"}


def is_main_process() -> bool:
    """True on process 0 of a distributed run, and where nothing is distributed."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


# ---------------------------------------------------------------- metrics.jsonl


def _encode(row: dict[str, Any]) -> str:
    """One JSON line. NaN and infinities become the strings "nan", "inf", "-inf": bare NaN is not JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if hasattr(value, "tolist"):  # tensors, numpy arrays and scalars
            return plain(value.tolist())
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return value

    return json.dumps(plain(row), ensure_ascii=False) + "\n"


def _decode(line: bytes) -> dict[str, Any] | None:
    """The row of one line, or None when the line is not a whole JSON object."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    if not isinstance(row, dict):
        return None
    # "stage" and "event" may be any word; every other "nan" is a number that _encode wrote.
    return {
        key: float(value) if isinstance(value, str) and value in _NON_FINITE else value for key, value in row.items()
    }


def read_metrics(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """Read `metrics.jsonl`, also while another process writes to it.

    Returns the rows, and how many lines could not be read (a torn last line counts). A missing file gives ([], 0).
    """
    path = Path(path)
    if not path.exists():
        return [], 0
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    rows = [_decode(line) for line in lines]
    return [row for row in rows if row is not None], sum(row is None for row in rows)


def _drop_torn_tail(path: Path) -> None:
    """Cut off what a killed process left after the last whole line."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    while end > 0:  # a crash of the machine can leave whole lines of garbage (blocks of zeros) at the end, too
        start = content.rfind(b"\n", 0, end - 1) + 1
        if _decode(content[start:end]) is not None:
            break
        end = start
    if end < len(content):
        os.truncate(path, end)


class Metrics:
    """Append-only `metrics.jsonl` of a run, and the trackers that the user asked for.

    Every line is handed to the operating system when it is logged, so a killed run loses at most the line it was
    writing; that torn line is dropped when the file is opened again.

    Raises SaveError when the file cannot be written, ImportError when the package of a tracker is missing,
    ValueError for a tracker that does not exist.
    """

    def __init__(
        self,
        run_dir: str | Path,
        trackers: Iterable[str] = (),
        config: dict[str, Any] | None = None,
        main: bool | None = None,
    ) -> None:
        self.path = Path(run_dir) / METRICS
        self.main = is_main_process() if main is None else main
        self.trackers: list[Tracker] = []
        self._file = None
        trackers = tuple(trackers)
        check_trackers(trackers)  # on every process: one that went on alone would hang in the first collective
        if not self.main:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _drop_torn_tail(self.path)
        self._open()
        self.trackers = [TRACKERS[name](self.path.parent, config or {}) for name in trackers]

    def _open(self) -> None:
        self._file = self.path.open("a", encoding="utf-8", buffering=1)

    def log(self, row: dict[str, Any]) -> None:
        """Append one row (`time` is added when absent) and forward a training step to the trackers."""
        if not self.main:
            return
        if self._file is None:
            raise ValueError(f"{self.path} was closed; log before Metrics.close().")
        row = {**row, "time": row.get("time", time.time())}
        try:
            self._file.write(_encode(row))
        except OSError as error:
            raise SaveError(
                f"could not append to {self.path}: {error}. Free some space and run the same command again; "
                "it goes on from the last checkpoint."
            ) from error
        if "step" in row and "stage" in row:
            numbers = {
                key: float(value)
                for key, value in row.items()
                if key not in ("stage", "step", "steps", "time") and _is_number(value)
            }
            for tracker in self.trackers:
                tracker.log(str(row["stage"]), int(row["step"]), numbers)

    def truncate_after(self, stage: str, step: int) -> int:
        """Forget what `stage` did after `step`, because the run goes on from a checkpoint made there.

        Removes the stage's training steps beyond `step` and its line "training is done"; all else stays in order.
        The file is replaced atomically. Returns how many lines went.
        """
        if not self.main:
            return 0
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if not _is_after(_decode(line), stage, step)]
        if len(kept) < len(lines):
            self.close_file()
            with atomic_file(self.path) as temporary:
                temporary.write_bytes(b"".join(kept))
            self._open()
        return len(lines) - len(kept)

    def close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Close the file and let every tracker finish its upload."""
        self.close_file()
        for tracker in self.trackers:
            tracker.close()
        self.trackers = []

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_number(value: Any) -> bool:
    if hasattr(value, "numel"):
        return value.numel() == 1
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_after(row: dict[str, Any] | None, stage: str, step: int) -> bool:
    if row is None or row.get("stage") != stage:
        return False
    if row.get("event") == "done":
        return row.get("work") in ("train", "base")
    return "step" in row and row["step"] > step


# ---------------------------------------------------------------- the bar


def clock(seconds: float | None) -> str:
    """Seconds as h:mm:ss, with days when there are some; "-:--:--" when unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--:--"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"


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
        file = self.console.file
        self.live = bool(getattr(file, "isatty", lambda: False)()) and not self.console.is_dumb_terminal
        self.values: dict[str, Any] = {}
        self.rate = Rate()
        self._progress: Progress | None = None
        self._task: Any = None
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
            self._task = self._progress.add_task(self.description, total=self.total, completed=self.done, text="")
        elif self.main:
            self._print_line()
        return self

    def advance(self, n_images: int = 1, **values: Any) -> None:
        """Count `n_images` more, and show `values` (a loss) beside the bar."""
        self.done += n_images
        self.values.update(values)
        if not self.main:
            return
        now = time.monotonic()
        self.rate.add(now, self.done)
        if self._progress is not None:
            self._progress.update(self._task, completed=self.done, text=self.text())
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
        elapsed, rate = time.monotonic() - self._start, self.rate.per_second
        parts = []
        if self.total:
            parts.append(f"{100 * min(self.done / self.total, 1):3.0f}%")
        count = f"{self.done:,}/{self.total:,}" if self.total is not None else f"{self.done:,}"
        parts.append(f"{count} {self.unit}")
        parts.append(f"{rate:,.1f} {self.unit}/s" if rate is not None else f"- {self.unit}/s")
        left = (self.total - self.done) / rate if self.total is not None and rate else None
        parts.append(f"elapsed {clock(elapsed)}")
        parts.append(f"left {clock(left)}")
        parts += [f"{name} {_short(value)}" for name, value in self.values.items()]
        return "  ".join(parts)

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        print(f"{self.description}: {self.text()}", file=self.console.file, flush=True)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self.main:
            return
        if self._progress is not None:
            self._progress.update(self._task, text=self.text(), refresh=True)
            self._progress.stop()
            self._progress = None
        else:
            self._print_line()


def _short(value: Any) -> str:
    value = value.item() if hasattr(value, "item") else value
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isprintable() else " " for c in text)


# ---------------------------------------------------------------- memory


def _is_cuda(device: str | torch.device | None) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def peak_memory_bytes(device: str | torch.device | None = None) -> int:
    """Most memory in use since the last `reset_peak_memory`, in bytes.

    On CUDA what torch allocated on the device; elsewhere the resident memory of this process (Linux, macOS).
    """
    if _is_cuda(device):
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux


def reset_peak_memory(device: str | torch.device | None = None) -> bool:
    """Start a new peak. False where the system cannot forget the old one (CPU outside Linux, some containers)."""
    if _is_cuda(device):
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # man 5 proc: resets VmHWM
        return True
    return False
