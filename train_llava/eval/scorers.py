"""The measures: answered questions -> metrics, without files or torch. All shares are in percent.

An answered question is a row with `said` and what its function names. Each function says which official evaluator it
answers to; where that one crashes or guesses, the difference is named.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from train_encoder.evaluate.judge import pairs_right

from .answers import Row
from .letters import letter
from .questions import CIRCULAR_STEP, HANDWRITTEN_MATHS, is_missing

Metrics = dict[str, Any]


def percent(right: float, of: float) -> float:
    """100 * right / of; 0 for an empty set."""
    return 100 * right / of if of else 0.0


def mean_percent(points: Sequence[float]) -> float:
    """The mean in percent; 0 for an empty set."""
    return percent(sum(points), len(points))


def by_group(rows: Iterable[tuple[str, float]]) -> dict[str, float]:
    """(group, points) rows -> the mean of each group in percent, groups in order of appearance."""
    groups: dict[str, list[float]] = defaultdict(list)
    for group, points in rows:
        groups[group].append(points)
    return {group: mean_percent(points) for group, points in groups.items()}


def pope(rows: Sequence[Row]) -> Metrics:
    """`category`, `label` ("yes" or "no") -> accuracy, precision, recall, F1 and yes ratio of each category.

    The headline is the mean F1 of the categories, which is the "POPE" of LLaVA-1.5's table. As llava/eval/eval_pope.py
    an answer is a no if its first sentence has "no" or "not", else a yes. Where the official script divides by zero
    (nothing answered with yes), precision, recall and F1 are 0.
    """
    categories: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for row in rows:
        words = row["said"].split(".")[0].replace(",", "").split(" ")
        categories[row["category"]].append((row["label"] != "no", not {"No", "no", "not"} & set(words)))
    found = {category: _binary(pairs) for category, pairs in categories.items()}
    means = {}
    for key in ("f1", "accuracy", "yes_ratio"):
        means[f"mean_{key}"] = sum(metrics[key] for metrics in found.values()) / len(found)
    return {**means, "by_category": found}


def _binary(pairs: Sequence[tuple[bool, bool]]) -> Metrics:
    """(truth, prediction) pairs -> the measures of one category."""
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


MME_GROUPS = {
    "perception": "existence count position color posters celebrity scene landmark artwork OCR".split(),
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning".split(),
}


def mme(rows: Sequence[Row]) -> Metrics:
    """`task`, `image`, `truth` ("Yes" or "No") -> perception and cognition scores (calculation.py of MME's eval_tool).

    An answer is yes or no by its first four letters. A task scores accuracy + accuracy+ (images whose two questions
    are both right), 200 at most; perception sums ten tasks (2000), cognition four (800). An image with one question
    only (--limit) does not count in accuracy+.
    """
    tasks: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        start = row["said"].lower()[:4]
        said = "yes" if "yes" in start else "no" if "no" in start else "other"
        tasks[row["task"]][row["image"]].append(said == row["truth"].strip().lower())
    found = {}
    for task, images in tasks.items():
        answers = [right for image in images.values() for right in image]
        acc, plus = mean_percent(answers), mean_percent([all(image) for image in images.values() if len(image) > 1])
        found[task] = {"score": acc + plus, "acc": acc, "acc_plus": plus, "n": len(answers)}
    totals = {name: sum(found[task]["score"] for task in group if task in found) for name, group in MME_GROUPS.items()}
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


def textvqa(rows: Sequence[Row]) -> Metrics:
    """`answers` (of ten people) -> mean soft accuracy (llava/eval/m4c_evaluator.py)."""
    return {"accuracy": mean_percent([vqa_accuracy(row["said"], row["answers"]) for row in rows])}


def gqa_prediction(text: str) -> str:
    """An answer as LLaVA's scripts hand it to GQA's evaluation: lower case, without its full stop."""
    return text.rstrip(".").lower()


def gqa(rows: Sequence[Row]) -> Metrics:
    """`category`, `answer` -> exact-match accuracy, also by category (GQA's own eval.py)."""
    right = [(row["category"], gqa_prediction(row["said"]) == row["answer"]) for row in rows]
    return {"accuracy": mean_percent([hit for _, hit in right]), "by_category": by_group(right)}


def ocrbench_right(category: str, text: str, answers: Sequence[str]) -> bool:
    """Whether one of `answers` stands in `text`: case ignored; for handwritten formulas spaces are, and case counts."""

    def form(words: str) -> str:
        words = words.strip().replace("\n", " ")
        return words.replace(" ", "") if category == HANDWRITTEN_MATHS else words.lower()

    return any(form(answer) in form(text) for answer in answers)


def ocrbench(rows: Sequence[Row]) -> Metrics:
    """`category`, `answers` (any of them) -> number of right answers (of 1000 in the whole set), by category."""
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        counts[row["category"]] += ocrbench_right(row["category"], row["said"], row["answers"])
    score = sum(counts.values())
    return {"score": score, "percent": percent(score, len(rows)), "by_category": dict(counts)}


def choices(rows: Sequence[Row], letters: Sequence[str | None] | None = None) -> Metrics:
    """`options`, `answer` (a letter), `category` -> accuracy, by category; `letters`: what the answers name, if known.

    `unread` counts answers that named no option: they are wrong.
    """
    letters = letters or [letter(row["said"], row["options"]) for row in rows]
    right = [said == row["answer"] for said, row in zip(letters, rows, strict=True)]
    groups = zip((row["category"] for row in rows), right, strict=True)
    return {"accuracy": mean_percent(right), "unread": letters.count(None), "by_category": by_group(groups)}


def pairs(rows: Sequence[Row]) -> Metrics:
    """MMVP: rows in the order of its file; a pair (two consecutive rows) counts when both answers are right."""
    letters = [letter(row["said"], row["options"]) for row in rows]
    right = [said == row["answer"] for said, row in zip(letters, rows, strict=True)]
    both = pairs_right(right)
    return {
        "pair_accuracy": mean_percent(both),
        "accuracy": mean_percent(right),
        "pairs": len(both),
        "unread": letters.count(None),
    }


def mmbench(rows: Sequence[Row]) -> Metrics:
    """Rows of `questions.mmbench_questions` -> as `choices`; and circular accuracy (every turned form of a question
    right, as MMBench ranks) where questions come in several forms. Nothing for the test split, whose answers only the
    server knows.

    A question whose last forms are not in the set (--limit) does not count in the circular accuracy.
    """
    if any(is_missing(row["answer"]) for row in rows):
        return {}
    letters, forms = [], defaultdict(list)
    for row in rows:
        said = letter(row["said"], dict(zip(sorted(row["option_char"]), row["options"], strict=True)))
        letters.append(said and row["option_char"][ord(said) - ord("A")])
        forms[row["question_id"] % CIRCULAR_STEP].append((row, letters[-1] == row["answer"]))
    found = choices(rows, letters)
    whole = [of_one for of_one in forms.values() if len(of_one) == of_one[0][0]["forms"]]
    if any(len(of_one) > 1 for of_one in whole):
        points = [(of_one[0][0]["category"], all(right for _, right in of_one)) for of_one in whole]
        found["circular_accuracy"] = mean_percent([right for _, right in points])
        found |= {"circular_questions": len(points), "circular_by_category": by_group(points)}
    return found
