"""What a run keeps of its training steps: `metrics.jsonl`, and the trackers that the user asked for.

    metrics = Metrics(run_dir, trackers=("tensorboard",))
    metrics.truncate_after("stage1", checkpoint_step)          # after a resume: no point of the curve twice
    metrics.log({"stage": "stage1", "step": 1, "steps": 1500, "loss": 0.71})

Only process 0 of a distributed run writes; the calls do nothing on the others.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llava_clipmoe.files import SaveError, atomic_file

from ..progress import is_main_process
from .memory import peak_memory_bytes
from .trackers import TRACKERS, Tracker, check_trackers

METRICS = "metrics.jsonl"
_NON_FINITE = {"nan", "inf", "-inf"}


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


@dataclass(frozen=True)
class Began:
    """When a piece of work began, by the clock and by this process's own CPU time (says more on a shared machine)."""

    seconds: float = field(default_factory=time.time)
    cpu_seconds: float = field(default_factory=time.process_time)


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

    def done(self, work: str, stage: str, began: Began, device: str | torch.device, **facts: Any) -> None:
        """Append the line of a piece of work that is done: how long it took, and the memory it needed."""
        row = {"event": "done", "work": work, "stage": stage, "seconds": time.time() - began.seconds}
        row |= {"cpu_seconds": time.process_time() - began.cpu_seconds, **facts}
        self.log(row | {"peak_memory_bytes": peak_memory_bytes(device)})

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
