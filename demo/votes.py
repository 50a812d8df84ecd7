"""Blind votes: one JSON object a line, and what they say so far.

left, right = draw_sides((moe, clip))               # which is A and which is B
append_vote(path, Vote(...))
print(tally(read_votes(path), ("CLIP-MoE", "CLIP")))
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from scipy.stats import binomtest

from llava_clipmoe.files import SaveError

try:
    import fcntl
except ImportError:  # Windows: votes are then safe among threads, not among processes
    fcntl = None

logger = logging.getLogger(__name__)
Choice = Literal["a", "b", "tie", "bad"]
Model = TypeVar("Model")
_lock = threading.Lock()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Vote:
    """One person's verdict on the answers of two models whose names were hidden.

    pictures: names, not paths. answers_a, answers_b: one answer a picture. choice: who was better, "tie" (both good)
    or "bad" (both bad). Raises ValueError for anything else, so that a file of votes holds only votes.
    """

    pictures: list[str]
    question: str
    model_a: str
    model_b: str
    answers_a: list[str]
    answers_b: list[str]
    choice: Choice
    time: str = field(default_factory=_now)
    """ISO 8601, UTC."""

    def __post_init__(self) -> None:
        lists, texts = (self.pictures, self.answers_a, self.answers_b), (self.question, self.model_a, self.model_b)
        if self.choice not in get_args(Choice):
            raise ValueError(f"a vote's choice is one of {', '.join(get_args(Choice))}, not {self.choice!r}.")
        if not all(isinstance(part, list) and all(isinstance(x, str) for x in part) for part in lists):
            raise ValueError("a vote's pictures and answers are lists of texts.")
        if not all(isinstance(text, str) for text in (*texts, self.time)) or self.model_a == self.model_b:
            raise ValueError("a vote has a question, a time and two models of different names.")


def append_vote(path: str | Path, vote: Vote) -> None:
    """Add a vote: on disk when this returns, and safe against other threads and (where there is fcntl) processes.

    A torn last line, left by a crash in the middle of a write, becomes a line of its own, which `read_votes` skips.
    Raises SaveError when it cannot be written; the file is then as before.
    """
    path = Path(path)
    line = json.dumps(asdict(vote), ensure_ascii=False).encode("utf-8", errors="backslashreplace") + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock, _locked(path) as fd:
            size = os.fstat(fd).st_size
            torn = size > 0 and _last_byte(fd, size) != b"\n"
            _write(fd, b"\n" * torn + line, size)
    except OSError as error:
        raise SaveError(
            f"could not save the vote to {path}: {error}. No earlier vote was lost. Free some space or choose another "
            "file, then vote again."
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The file opened for reading and appending, locked against other processes while the block runs."""
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            fcntl.flock(fd, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
        yield fd
    finally:
        os.close(fd)


def _last_byte(fd: int, size: int) -> bytes:
    os.lseek(fd, size - 1, os.SEEK_SET)
    return os.read(fd, 1)


def _write(fd: int, data: bytes, size: int) -> None:
    try:
        written = os.write(fd, data)
        if written != len(data):
            raise OSError(f"only {written} of {len(data)} bytes were written (is the disk full?)")
        os.fsync(fd)
    except OSError:
        os.ftruncate(fd, size)
        raise


def read_votes(path: str | Path) -> list[Vote]:
    """All votes of a file, oldest first; [] where there is none yet. Damaged lines are skipped with a warning."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    votes, damaged = [], 0
    for line in filter(None, map(bytes.strip, lines)):
        try:
            votes.append(_vote(json.loads(line)))
        except (ValueError, TypeError):
            damaged += 1
    if damaged:
        logger.warning("%s: skipped %d damaged line(s); the other %d votes are counted", path, damaged, len(votes))
    return votes


def _vote(row: Any) -> Vote:
    if not isinstance(row, dict):
        raise ValueError("a vote is a JSON object.")
    return Vote(**{f.name: row[f.name] for f in fields(Vote) if f.name in row})  # TypeError where one is missing


@dataclass(frozen=True)
class Tally:
    """What the votes between two models say. `str()` gives one sentence.

    share: of the decided votes (neither tie nor both bad), how many the first model won; low, high: its 95% Wilson
    interval; None where nothing is decided. The interval holds for independent votes that are counted once, at a time
    fixed beforehand: stopping as soon as it looks good would mislead.
    """

    models: tuple[str, str]
    wins: tuple[int, int]
    ties: int
    bad: int
    share: float | None
    low: float | None
    high: float | None

    @property
    def decided(self) -> int:
        return sum(self.wins)

    @property
    def votes(self) -> int:
        return self.decided + self.ties + self.bad

    def __str__(self) -> str:
        rest = [f"{count} {what}" for count, what in ((self.ties, "tied"), (self.bad, "both bad")) if count]
        more = f" ({', '.join(rest)})" if rest else ""
        if self.share is None:
            return f"No decided votes yet{more}."
        return (
            f"{self.models[0]} preferred in {self.wins[0]} of {self.decided} decided votes{more}: {self.share:.0%} "
            f"(95% interval {100 * self.low:.0f}–{self.high:.0%}), {self._verdict()}."
        )

    def _verdict(self) -> str:
        if self.low > 0.5 or self.high < 0.5:
            return f"enough to prefer {self.models[0 if self.low > 0.5 else 1]}"
        return "no clear preference" if self.high - self.low < 0.2 else "too few to tell"


def tally(votes: Sequence[Vote], models: tuple[str, str]) -> Tally:
    """Count the votes between these two models, whichever was A; votes between others are left out."""
    if models[0] == models[1]:
        raise ValueError(f"a score compares two models; both are called {models[0]!r}.")
    ours = [vote for vote in votes if {vote.model_a, vote.model_b} == set(models)]
    winners = [{"a": vote.model_a, "b": vote.model_b}.get(vote.choice, vote.choice) for vote in ours]
    choices = [vote.choice for vote in ours]
    wins = tuple(sum(w == model and c in "ab" for w, c in zip(winners, choices, strict=True)) for model in models)
    share = low = high = None
    if sum(wins):
        interval = binomtest(wins[0], sum(wins)).proportion_ci(confidence_level=0.95, method="wilson")
        share, low, high = wins[0] / sum(wins), float(interval.low), float(interval.high)
    return Tally(tuple(models), wins, choices.count("tie"), choices.count("bad"), share, low, high)


def draw_sides(models: Sequence[Model], rng: random.Random | None = None) -> tuple[Model, Model]:
    """The two models in a random order, (A, B), by the system's randomness; `rng` makes it repeatable for tests."""
    first, second = models
    return tuple((rng or secrets.SystemRandom()).sample([first, second], 2))
