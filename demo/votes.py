"""Blind votes: one JSON object a line, and what they say so far."""

from __future__ import annotations

import json
import logging
import os
import random
import secrets
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, TypeVar, get_args

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
    time: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    """ISO 8601, UTC."""

    def __post_init__(self) -> None:
        lists, texts = (self.pictures, self.answers_a, self.answers_b), (self.question, self.model_a, self.model_b)
        if self.choice not in get_args(Choice):
            raise ValueError(f"a vote's choice is one of {', '.join(get_args(Choice))}, not {self.choice!r}.")
        if not all(isinstance(part, list) and all(isinstance(x, str) for x in part) for part in lists):
            raise ValueError("a vote's pictures and answers are lists of texts.")
        if not all(isinstance(text, str) for text in (*texts, self.time)) or self.model_a == self.model_b:
            raise ValueError("a vote has a question, a time and two models of different names.")


def append_vote(path: Path, vote: Vote) -> None:
    """Add a vote: on disk when this returns, and safe against other threads and (where there is fcntl) processes.

    A torn last line, left by a crash in the middle of a write, becomes a line of its own, which `read_votes` skips.
    Raises SaveError when it cannot be written; the file is then as before.
    """
    line = json.dumps(asdict(vote), ensure_ascii=False).encode("utf-8", errors="backslashreplace") + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock, path.open("a+b", buffering=0) as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line
            try:
                written = os.write(file.fileno(), line)
                if written != len(line):
                    raise OSError(f"only {written} of {len(line)} bytes were written (is the disk full?)")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise SaveError(
            f"could not save the vote to {path}: {error}. No earlier vote was lost. Free some space or choose another "
            "file, then vote again."
        ) from error


def read_votes(path: Path) -> list[Vote]:
    """All votes of a file, oldest first; [] where there is none yet. Damaged lines are skipped with a warning."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    votes, damaged = [], 0
    for line in filter(None, map(bytes.strip, lines)):
        try:
            row = json.loads(line)
            votes.append(Vote(**{f.name: row[f.name] for f in fields(Vote) if f.name in row}))
        except (ValueError, TypeError):  # no JSON, no object, a part that is missing or no vote's
            damaged += 1
    if damaged:
        logger.warning("%s: skipped %d damaged line(s); the other %d votes are counted", path, damaged, len(votes))
    return votes


def interval(right: int, count: int) -> tuple[float, float]:
    """95% Wilson interval of a share."""
    found = binomtest(right, count).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


@dataclass(frozen=True)
class Tally:
    """What the votes between two models say. `str()` gives one sentence."""

    models: tuple[str, str]
    wins: tuple[int, int]
    ties: int
    bad: int

    @property
    def decided(self) -> int:
        """Votes that are neither a tie nor both bad."""
        return sum(self.wins)

    @property
    def votes(self) -> int:
        return self.decided + self.ties + self.bad

    @property
    def share(self) -> float:
        """Of the decided votes, those that the first model won."""
        return self.wins[0] / self.decided

    @property
    def interval(self) -> tuple[float, float]:
        """Of the share. It holds for independent votes that are counted once, at a time fixed beforehand: stopping as
        soon as it looks good would mislead."""
        return interval(self.wins[0], self.decided)

    def __str__(self) -> str:
        rest = [f"{count} {what}" for count, what in ((self.ties, "tied"), (self.bad, "both bad")) if count]
        more = f" ({', '.join(rest)})" if rest else ""
        if not self.decided:
            return f"No decided votes yet{more}."
        low, high = self.interval
        verdict = "no clear preference" if high - low < 0.2 else "too few to tell"
        if low > 0.5 or high < 0.5:
            verdict = f"enough to prefer {self.models[0 if low > 0.5 else 1]}"
        return (
            f"{self.models[0]} preferred in {self.wins[0]} of {self.decided} decided votes{more}: {self.share:.0%} "
            f"(95% interval {100 * low:.0f}–{high:.0%}), {verdict}."
        )


def tally(votes: Sequence[Vote], models: tuple[str, str]) -> Tally:
    """Count the votes between these two models, whichever was A; votes between others are left out."""
    ours = [vote for vote in votes if {vote.model_a, vote.model_b} == set(models)]
    winners = Counter({"a": vote.model_a, "b": vote.model_b}.get(vote.choice) for vote in ours)
    choices = Counter(vote.choice for vote in ours)
    return Tally(models, (winners[models[0]], winners[models[1]]), choices["tie"], choices["bad"])


def draw_sides(models: Sequence[Model], rng: random.Random | None = None) -> tuple[Model, Model]:
    """The two models in a random order, (A, B), by the system's randomness; `rng` makes it repeatable for tests."""
    return tuple((rng or secrets.SystemRandom()).sample(list(models), 2))
