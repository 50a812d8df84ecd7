"""The measures, as plain functions of texts: no files, no torch. All shares are in percent.

Each function says which official evaluator it answers to; where that one crashes or guesses, the difference is named.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from train_encoder.evaluate.judge import pairs_right

Metrics = dict[str, Any]


def percent(right: float, of: float) -> float:
    """100 * right / of; 0 for an empty set."""
    return 100 * right / of if of else 0.0


def by_group(rows: Iterable[tuple[str, float]]) -> dict[str, float]:
    """(group, points) rows -> the mean of each group in percent, groups in order of appearance."""
    groups: dict[str, list[float]] = defaultdict(list)
    for group, points in rows:
        groups[group].append(points)
    return {group: percent(sum(points), len(points)) for group, points in groups.items()}


def pope_says_yes(text: str) -> bool:
    """POPE's reading of an answer (llava/eval/eval_pope.py): no if its first sentence has "no" or "not", else yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def pope(rows: Sequence[tuple[str, str, str]]) -> Metrics:
    """(category, label "yes" or "no", answer) rows -> per category accuracy, precision, recall, F1 and yes ratio.

    The headline is the mean F1 of the categories, which is the "POPE" of LLaVA-1.5's table. Where the official script
    divides by zero (nothing answered with yes), precision, recall and F1 are 0.
    """
    categories: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for category, label, text in rows:
        categories[category].append((label != "no", pope_says_yes(text)))
    found = {category: _binary(pairs) for category, pairs in categories.items()}
    mean = {key: sum(each[key] for each in found.values()) / len(found) for key in ("f1", "accuracy", "yes_ratio")}
    return {**{f"mean_{key}": value for key, value in mean.items()}, "by_category": found}


def _binary(pairs: Sequence[tuple[bool, bool]]) -> Metrics:
    """(truth, prediction) pairs -> the five measures of one category."""
    tp = sum(truth and said for truth, said in pairs)
    fp = sum(said and not truth for truth, said in pairs)
    fn = sum(truth and not said for truth, said in pairs)
    precision, recall = percent(tp, tp + fp), percent(tp, tp + fn)
    return {
        "accuracy": percent(len(pairs) - fp - fn, len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_ratio": percent(tp + fp, len(pairs)),
        "n": len(pairs),
    }


MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
MME_PERCEPTION = tuple("existence count position color posters celebrity scene landmark artwork OCR".split())


def mme_says(text: str) -> str:
    """MME's reading of an answer (calculation.py of its eval_tool): yes or no in the first four letters, or other."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme(rows: Sequence[tuple[str, str, str, str]]) -> Metrics:
    """(task, image, truth "Yes" or "No", answer) rows -> perception and cognition scores.

    A task scores accuracy + accuracy+ (images whose two questions are both right), 200 at most; perception sums ten
    tasks (2000), cognition four (800). An image with one question only (--limit) does not count in accuracy+.
    """
    tasks: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for task, image, truth, text in rows:
        tasks[task][image].append(mme_says(text) == truth.strip().lower())
    found = {}
    for task, images in tasks.items():
        answers = [right for image in images.values() for right in image]
        pairs = [all(image) for image in images.values() if len(image) > 1]
        acc, plus = percent(sum(answers), len(answers)), percent(sum(pairs), len(pairs))
        found[task] = {"score": acc + plus, "acc": acc, "acc_plus": plus, "n": len(answers)}
    totals = {
        name: sum(found[task]["score"] for task in group if task in found)
        for name, group in (("perception", MME_PERCEPTION), ("cognition", MME_COGNITION))
    }
    return {**totals, "total": sum(totals.values()), "by_category": found}


# Words that the VQA evaluation writes with their apostrophe: a form that lost exactly one gets it back. Left out are
# those that are words without it (ill, shell, were, well, id, wed, hell, lets).
_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _APOSTROPHES.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the evaluation's own table has this one the wrong way round
NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBERS["none"] = "0"
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def normalise(text: str) -> str:
    """An answer as the VQA evaluation compares it (visualqa.org/evaluation.html, in its EvalAI form).

    Lower case; commas and question marks gone; punctuation gone where it touches a space anywhere in the answer and a
    space in its place elsewhere; full stops gone unless a digit follows; number words as digits; no articles;
    apostrophes put back.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    spaced = text
    for mark in PUNCTUATION:
        text = text.replace(mark, "" if f"{mark} " in spaced or f" {mark}" in spaced else " ")
    # 32: the official code gives re.UNICODE in the place of the count, and so removes no more than that many
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(text: str, answers: Sequence[str]) -> float:
    """Soft accuracy in 0..1 of one answer against those of ten people: the mean over leaving each of them out of
    min(1, how many of the others said so / 3)."""
    said = normalise(text)
    same = [normalise(answer) == said for answer in answers]
    return sum(min(1.0, (sum(same) - one) / 3) for one in same) / len(same)


def textvqa(rows: Sequence[tuple[str, Sequence[str]]]) -> Metrics:
    """(answer, the ten people's answers) rows -> mean soft accuracy (llava/eval/m4c_evaluator.py)."""
    return {"accuracy": percent(sum(vqa_accuracy(text, answers) for text, answers in rows), len(rows))}


def gqa_prediction(text: str) -> str:
    """An answer as LLaVA's scripts hand it to GQA's evaluation: lower case, without its full stop."""
    return text.rstrip(".").lower()


def gqa(rows: Sequence[tuple[str, str, str]]) -> Metrics:
    """(kind of question, truth, answer) rows -> exact-match accuracy, also by kind (GQA's own eval.py)."""
    right = [(kind, gqa_prediction(text) == truth) for kind, truth, text in rows]
    return {"accuracy": percent(sum(hit for _, hit in right), len(right)), "by_category": by_group(right)}


HANDWRITTEN_MATHS = "Handwritten Mathematical Expression Recognition"


def ocrbench_right(category: str, text: str, answers: Sequence[str]) -> bool:
    """Whether one of `answers` stands in `text`: case ignored; for handwritten formulas spaces are, and case counts."""

    def form(words: str) -> str:
        words = words.strip().replace("\n", " ")
        return words.replace(" ", "") if category == HANDWRITTEN_MATHS else words.lower()

    return any(form(answer) in form(text) for answer in answers)


def ocrbench(rows: Sequence[tuple[str, str, Sequence[str]]]) -> Metrics:
    """(category, answer, accepted answers) rows -> number of right answers (of 1000 in the whole set), by category."""
    right = [(category, ocrbench_right(category, text, answers)) for category, text, answers in rows]
    counts: dict[str, int] = defaultdict(int)
    for category, hit in right:
        counts[category] += hit
    score = sum(hit for _, hit in right)
    return {"score": score, "percent": percent(score, len(right)), "by_category": dict(counts)}


@dataclass(frozen=True)
class Choice:
    """One answer to a multiple-choice question."""

    question: str | int
    """The question that this is a form of; all its forms must be right for a circular point."""
    category: str
    said: str | None
    """The letter that the answer named."""
    truth: str
    whole: bool = True
    """Whether all forms of the question are in the set (false for the last one under --limit)."""

    @property
    def right(self) -> bool:
        return self.said == self.truth


def choices(rows: Sequence[Choice]) -> Metrics:
    """Accuracy, by category; and circular accuracy (every turned form of a question right, as MMBench ranks) where
    questions come in several forms. `unread` counts answers that named no option: they are wrong."""
    found: Metrics = {
        "accuracy": percent(sum(row.right for row in rows), len(rows)),
        "unread": sum(row.said is None for row in rows),
    }
    found["by_category"] = by_group((row.category, row.right) for row in rows)
    questions: dict[str | int, list[Choice]] = defaultdict(list)
    for row in rows:
        questions[row.question].append(row)
    whole = [forms for forms in questions.values() if forms[0].whole]
    if any(len(forms) > 1 for forms in whole):
        points = [(forms[0].category, all(form.right for form in forms)) for forms in whole]
        found["circular_accuracy"] = percent(sum(hit for _, hit in points), len(points))
        found |= {"circular_questions": len(points), "circular_by_category": by_group(points)}
    return found


def pairs(rows: Sequence[Choice]) -> Metrics:
    """MMVP: rows in the order of its file; a pair (two consecutive rows) counts when both answers are right."""
    both = pairs_right([row.right for row in rows])
    return {
        "pair_accuracy": percent(sum(both), len(both)),
        "accuracy": percent(sum(row.right for row in rows), len(rows)),
        "pairs": len(both),
        "unread": sum(row.said is None for row in rows),
    }
