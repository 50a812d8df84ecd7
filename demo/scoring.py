"""MMVP-style pair accuracy of both eyes on the loaded pairs: a pair counts when both pictures are answered right.

Both pictures of a pair get the same question, whose right answers differ. An eye that cannot tell the two apart gives
one answer twice, and scores nothing on the pair. (MMVP: Tong et al. 2024, "Eyes Wide Shut?")
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from llava_clipmoe.files import read_json, write_json
from train_llava.quickstart import says_rather

from .html import same_answer
from .models import Eye
from .pairs import BlindPair
from .turns import Stopped

BATCH = 8
"""Pictures answered at a time; between two batches others may ask the model."""


@dataclass(frozen=True)
class Item:
    """One question about one pair."""

    pair: int
    attribute: str
    question: str
    answers: tuple[str, str]
    pictures: tuple[Path, Path]


@dataclass
class Scores:
    """Answers so far. `texts[eye][i]` is the answer to picture i % 2 of item i // 2."""

    names: tuple[str, str]
    items: list[Item]
    texts: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    seconds: float = 0.0

    @property
    def done(self) -> int:
        return sum(map(len, self.texts))

    @property
    def total(self) -> int:
        return 4 * len(self.items)

    def right(self, eye: int) -> list[bool]:
        """Which of the items that this eye has finished it has right, both pictures."""
        texts = self.texts[eye]
        found = []
        for number in range(len(texts) // 2):
            first, second = self.items[number].answers
            one, two = texts[2 * number : 2 * number + 2]
            found.append(says_rather(one, first, second) and says_rather(two, second, first))
        return found

    def same(self, eye: int) -> int:
        """How many items this eye has given one answer for both pictures."""
        texts = self.texts[eye]
        return sum(same_answer(texts[i], texts[i + 1]) for i in range(0, len(texts) - 1, 2))

    def as_json(self) -> dict[str, Any]:
        rows = [
            {"pair": item.pair, "attribute": item.attribute, "question": item.question, "answers": item.answers,
             **{name: texts[2 * i : 2 * i + 2] for name, texts in zip(self.names, self.texts, strict=True)}}
            for i, item in enumerate(self.items)
        ]  # fmt: skip
        accuracy = {name: sum(self.right(eye)) / max(1, len(self.items)) for eye, name in enumerate(self.names)}
        return {"pair_accuracy": accuracy, "pairs_and_questions": len(self.items), "seconds": round(self.seconds, 1),
                "sentence": verdict(self), "rows": rows}  # fmt: skip


def items_of(pairs: Sequence[BlindPair]) -> list[Item]:
    """Every question of every pair."""
    return [
        Item(number, q.attribute, q.question, q.answers, pair.images)
        for number, pair in enumerate(pairs)
        for q in pair.questions
    ]


def score(eyes: tuple[Eye, Eye], pairs: Sequence[BlindPair], stop: threading.Event) -> Iterator[Scores]:
    """Yields the scores after every batch. Both eyes take turns, so that they can be compared all along.

    `stop` ends it after the batch under way. Raises ValueError when no pair has a question.
    """
    items = items_of(pairs)
    if not items:
        raise ValueError(
            "None of the loaded pairs has a question with known answers. Mine them with `llava-clipmoe mine-pairs "
            "IMAGES --questions FILE.jsonl`, a line for each {image, attribute, question, answer}."
        )
    found = Scores((eyes[0].name, eyes[1].name), items)
    pictures = [picture for item in items for picture in item.pictures]
    questions = [item.question for item in items for _ in item.pictures]
    start = time.monotonic()
    streams = [eye.answer_files(pictures, questions, BATCH, stop=stop) for eye in eyes]
    yield found
    with contextlib.suppress(Stopped):
        while found.done < found.total:
            for texts, stream in zip(found.texts, streams, strict=True):
                texts += next(stream)
                found.seconds = time.monotonic() - start
                yield found


def save(scores: Scores, path: Path) -> None:
    write_json(path, scores.as_json())


def interval(right: int, count: int) -> tuple[float, float]:
    """95% Wilson interval of a share."""
    found = binomtest(right, count).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def verdict(scores: Scores) -> str:
    """What the two accuracies say about each other, in one sentence (exact McNemar test on the items)."""
    left, right = (scores.right(eye) for eye in (0, 1))
    both = list(zip(left, right, strict=False))
    if not both:
        return "Nothing is scored yet."
    only_right, only_left = sum(b and not a for a, b in both), sum(a and not b for a, b in both)
    name_left, name_right = scores.names
    if only_left + only_right == 0:
        return f"{name_right} and {name_left} have exactly the same pairs right."
    p = binomtest(only_right, only_left + only_right).pvalue
    told = (
        "chance alone would seldom give such a difference" if p < 0.05 else "chance alone gives such a difference too"
    )
    return (
        f"{name_right} alone is right on {only_right} and {name_left} alone on {only_left} of {len(both)}: {told} "
        f"(exact McNemar test, {f'p = {p:.2f}' if p >= 0.01 else 'p < 0.01'})."
    )


def read(path: Path) -> dict[str, Any] | None:
    """The last finished scores, or None."""
    try:
        return read_json(path)
    except (FileNotFoundError, ValueError):
        return None
