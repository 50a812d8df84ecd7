"""What a run keeps of its training steps: `metrics.jsonl`, and the trackers that the user asked for."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llava_clipmoe.files import SaveError, atomic_file

from ..progress import is_main_process
from .memory import peak_memory_bytes
from .trackers import TRACKERS, check_trackers

METRICS = "metrics.jsonl"
_NON_FINITE = {"nan", "inf", "-inf"}


def _encode(row: dict[str, Any]) -> str:
    """One JSON line. NaN and infinities become the strings "nan", "inf", "-inf": bare NaN is not JSON."""
    plain = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(plain, ensure_ascii=False) + "\n"


def _decode(line: bytes) -> dict[str, Any] | None:
    """The row of one line, or None when the line is not a whole JSON object."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    # "stage" and "event" may be any word; every other "nan" is a number that _encode wrote.
    return {
        key: float(value) if isinstance(value, str) and value in _NON_FINITE else value for key, value in row.items()
    }


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of `metrics.jsonl` (none without the file), also while another process writes to it, and how many lines
    could not be read (a torn last line counts)."""
    if not path.exists():
        return [], 0
    rows = [_decode(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    return [row for row in rows if row is not None], rows.count(None)


@dataclass(frozen=True)
class Began:
    """When a piece of work began, by the clock and by this process's own CPU time (says more on a shared machine)."""

    seconds: float = field(default_factory=time.time)
    cpu_seconds: float = field(default_factory=time.process_time)


class Metrics:
    """Writes `metrics.jsonl` and to the trackers, on process 0 of a distributed run; on the others it does nothing.

    Every line is handed to the operating system when it is logged, so a killed run loses at most the line it was
    writing; a torn one is dropped when the run goes on. Raises SaveError when the file cannot be written, ImportError
    when the package of a tracker is missing.
    """

    def __init__(
        self, run_dir: Path, trackers: Sequence[str] = (), config: dict | None = None, main: bool | None = None
    ) -> None:
        self.path = run_dir / METRICS
        self.main = is_main_process() if main is None else main
        self.trackers = []
        check_trackers(trackers)  # on every process: one that went on alone would hang in the first collective
        if self.main:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._drop_torn_tail()
            self.trackers = [TRACKERS[name](name, run_dir, config or {}) for name in trackers]

    def _lines(self) -> list[bytes]:
        return self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []

    def _drop_torn_tail(self) -> None:
        """Cut off what a killed process, or a machine that crashed, left after the last whole line."""
        lines = self._lines()
        size = sum(map(len, lines))
        while lines and (not lines[-1].endswith(b"\n") or _decode(lines[-1]) is None):
            size -= len(lines.pop())
        if self.path.exists():
            os.truncate(self.path, size)

    def log(self, row: dict[str, Any]) -> None:
        """Append one row (`time` is added when absent) and forward a training step to the trackers."""
        if not self.main:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_encode({**row, "time": row.get("time", time.time())}))
        except OSError as error:
            raise SaveError(
                f"could not append to {self.path}: {error}. Free some space and run the same command again; "
                "it goes on from the last checkpoint."
            ) from error
        if "step" in row:
            left_out = ("stage", "step", "steps", "time")
            numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k not in left_out}
            for tracker in self.trackers:
                tracker.log(row["stage"], row["step"], numbers)

    def done(self, work: str, stage: str, began: Began, device: str | torch.device, **facts: Any) -> None:
        """Append the line of a piece of work that is done: how long it took, and the memory it needed."""
        row = {"event": "done", "work": work, "stage": stage, "seconds": time.time() - began.seconds}
        row |= {"cpu_seconds": time.process_time() - began.cpu_seconds, **facts}
        self.log(row | {"peak_memory_bytes": peak_memory_bytes(device)})

    def truncate_after(self, stage: str, step: int) -> None:
        """Forget what `stage` did after `step`, because the run goes on from a checkpoint made there: its training
        steps beyond `step` and its line "training is done". The file is replaced atomically."""
        if not self.main:
            return
        lines = self._lines()
        kept = [line for line in lines if not _is_after(_decode(line), stage, step)]
        if len(kept) < len(lines):
            with atomic_file(self.path) as temporary:
                temporary.write_bytes(b"".join(kept))

    def close(self) -> None:
        """Let every tracker finish its upload."""
        for tracker in self.trackers:
            tracker.close()


def _is_after(row: dict[str, Any] | None, stage: str, step: int) -> bool:
    if row is None or row.get("stage") != stage:
        return False
    if row.get("event") == "done":
        return row.get("work") in ("train", "base")
    return "step" in row and row["step"] > step
