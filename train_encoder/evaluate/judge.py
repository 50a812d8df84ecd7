"""What counts as right: one rule for an answer, for two equal answers, and for a pair of pictures.

A pair is one question about two pictures whose right answers differ. It counts when both answers are right: a model
that cannot tell the pictures apart gives one answer twice and earns nothing. (MMVP: Tong et al. 2024, "Eyes Wide
Shut?") Multiple-choice answers are read by train_llava/eval; everything that is counted in pairs is counted here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ACCURACIES = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class"}
"""Scores of a classification, and their titles in tables."""
COMPOSITION = {"overall": "right", "text": "text score", "image": "image score"}
"""Scores of captions that differ little, and their titles; the last two are Winoground's, whose `overall` is both."""


def is_answer(text: str, answer: str) -> bool:
    """Whether a generated text is the answer and nothing more; case and a final full stop are ignored."""
    return text.strip().rstrip(".").lower() == answer.lower()


def same_answer(first: str, second: str) -> bool:
    """Whether two texts are equal; case, the number of spaces and a final full stop are ignored."""
    one, two = (" ".join(text.lower().split()).rstrip(".") for text in (first, second))
    return one == two


def names_answer(text: str, answer: str, other: str) -> bool:
    """Whether a text has more of the words that only `answer` has than of the words that only `other` has.

    For answers that are sentences: "red" is right for "a red circle" where the other picture shows "a blue circle".
    """
    said, right, wrong = (set(re.findall(r"[\w*#'-]+", part.lower())) for part in (text, answer, other))
    return len(said & (right - wrong)) > len(said & (wrong - right))


def answers_right(texts: Sequence[str], answers: tuple[str, str]) -> tuple[bool, bool]:
    """Which of the two texts about a pair's pictures name the right answer; `answers` are those of the two pictures."""
    return names_answer(texts[0], *answers), names_answer(texts[1], *reversed(answers))


def pairs_right(right: Sequence[bool]) -> list[bool]:
    """Single answers, two a pair and one pair after the other -> which pairs have both right.

    An answer at the end whose partner is missing does not count.
    """
    return [one and two for one, two in zip(right[::2], right[1::2], strict=False)]


def mcnemar_p(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact McNemar test of two verdicts on the same items: how likely chance alone is to give so much, if both are
    right equally often; 1 where they never differ."""
    from scipy.stats import binomtest  # slow to import, and needed here only

    only_second = sum(two and not one for one, two in zip(first, second, strict=True))
    differing = sum(one != two for one, two in zip(first, second, strict=True))
    return float(binomtest(only_second, differing).pvalue) if differing else 1.0


def share(right: Sequence[float]) -> float:
    """The part of them that is right, 0 to 1 (or their mean); NaN where there are none."""
    return sum(right) / len(right) if right else float("nan")
