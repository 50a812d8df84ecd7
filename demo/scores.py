"""Pair accuracy of both LLaVAs on the loaded pairs: every question of every pair, asked about both pictures."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from llava_clipmoe.files import write_json
from train_encoder.evaluate.judge import answers_right, pairs_right, same_answer

from .llava.generate import Llava
from .llava.turns import Stopped
from .mining.pairs import BlindPair

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
    """Answers so far. `texts[llava][i]` is the answer to picture i % 2 of item i // 2."""

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

    def _answered(self, llava: int) -> list[tuple[Item, list[str]]]:
        """The items whose two pictures this LLaVA has answered, with its two texts."""
        texts = self.texts[llava]
        return [(self.items[i], texts[2 * i : 2 * i + 2]) for i in range(len(texts) // 2)]

    def right(self, llava: int) -> list[bool]:
        """Of the items that this LLaVA has finished: whether both pictures are answered right."""
        single = [right for item, texts in self._answered(llava) for right in answers_right(texts, item.answers)]
        return pairs_right(single)

    def same(self, llava: int) -> int:
        """Number of items for which this LLaVA has given one answer for both pictures."""
        return sum(same_answer(*texts) for _, texts in self._answered(llava))

    def as_json(self) -> dict[str, Any]:
        rows = []
        for i, item in enumerate(self.items):
            row = {"pair": item.pair, "attribute": item.attribute, "question": item.question, "answers": item.answers}
            answers = {name: texts[2 * i : 2 * i + 2] for name, texts in zip(self.names, self.texts, strict=True)}
            rows.append(row | answers)
        accuracy = {name: sum(self.right(i)) / max(1, len(self.items)) for i, name in enumerate(self.names)}
        facts = {"pair_accuracy": accuracy, "pairs_and_questions": len(self.items), "seconds": round(self.seconds, 1)}
        return {**facts, "sentence": verdict(self), "rows": rows}


def items_of(pairs: Sequence[BlindPair]) -> list[Item]:
    """Every question of every pair."""
    return [
        Item(number, q.attribute, q.question, q.answers, pair.images)
        for number, pair in enumerate(pairs)
        for q in pair.questions
    ]


def score(llavas: tuple[Llava, Llava], pairs: Sequence[BlindPair], stop: threading.Event) -> Iterator[Scores]:
    """Yields the scores after every batch. Both LLaVAs take turns, so that they can be compared all along.

    Setting `stop` ends it after the present batch. Raises ValueError when no pair has a question.
    """
    items = items_of(pairs)
    if not items:
        raise ValueError(
            "None of the loaded pairs has a question with known answers. Mine them with `llava-clipmoe mine-pairs "
            "IMAGES --questions FILE.jsonl`, a line for each {image, attribute, question, answer}."
        )
    found = Scores((llavas[0].name, llavas[1].name), items)
    pictures = [picture for item in items for picture in item.pictures]
    questions = [item.question for item in items for _ in item.pictures]
    start = time.monotonic()
    streams = [llava.answer_files(pictures, questions, BATCH, stop=stop) for llava in llavas]
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
    left, right = (scores.right(llava) for llava in (0, 1))
    both = list(zip(left, right, strict=False))
    if not both:
        return "Nothing is scored yet."
    only_right, only_left = sum(b and not a for a, b in both), sum(a and not b for a, b in both)
    name_left, name_right = scores.names
    if only_left + only_right == 0:
        return f"{name_right} and {name_left} have exactly the same pairs right."
    p = binomtest(only_right, only_left + only_right).pvalue
    alone = f"{name_right} alone is right on {only_right} and {name_left} alone on {only_left} of {len(both)}"
    chance = "would seldom give such a difference" if p < 0.05 else "gives such a difference too"
    p_text = f"p = {p:.2f}" if p >= 0.01 else "p < 0.01"
    return f"{alone}: chance alone {chance} (exact McNemar test, {p_text})."
