"""Pair accuracy of both LLaVAs on the loaded pairs: every question of every pair, asked about both pictures."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train_encoder.evaluate.judge import answers_right, mcnemar_p, pairs_right, same_answer

from .llava.generate import Llava, Stopped
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

    def both(self, llava: int) -> list[tuple[str, str]]:
        """This LLaVA's two answers to each of the items that it has finished."""
        texts = self.texts[llava]
        return list(zip(texts[::2], texts[1::2], strict=False))

    def right(self, llava: int) -> list[bool]:
        """Of the items that this LLaVA has finished: whether both pictures are answered right."""
        answered = zip(self.both(llava), self.items, strict=False)
        return pairs_right([right for texts, item in answered for right in answers_right(texts, item.answers)])

    def same(self, llava: int) -> int:
        """Number of items for which this LLaVA has given one answer for both pictures."""
        return sum(same_answer(*texts) for texts in self.both(llava))

    def as_json(self) -> dict[str, Any]:
        """What scores.json holds once all answers are there."""
        answers = [self.both(0), self.both(1)]
        rows = [
            {"pair": item.pair, "attribute": item.attribute, "question": item.question, "answers": item.answers}
            | {name: texts[i] for name, texts in zip(self.names, answers, strict=True)}
            for i, item in enumerate(self.items)
        ]
        return {
            "pair_accuracy": {name: sum(self.right(i)) / len(self.items) for i, name in enumerate(self.names)},
            "pairs_and_questions": len(self.items),
            "seconds": round(self.seconds, 1),
            "sentence": verdict(self),
            "rows": rows,
        }


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


def verdict(scores: Scores) -> str:
    """What the two accuracies say about each other, in one sentence (exact McNemar test on the items)."""
    both = list(zip(scores.right(0), scores.right(1), strict=False))
    if not both:
        return "Nothing is scored yet."
    left, right = scores.names
    only_left, only_right = both.count((True, False)), both.count((False, True))
    if only_left + only_right == 0:
        return f"{right} and {left} have exactly the same pairs right."
    p = mcnemar_p(*zip(*both, strict=True))
    chance = "would seldom give such a difference" if p < 0.05 else "gives such a difference too"
    return (
        f"{right} alone is right on {only_right} and {left} alone on {only_left} of {len(both)}: chance alone {chance} "
        f"(exact McNemar test, {f'p = {p:.2f}' if p >= 0.01 else 'p < 0.01'})."
    )
