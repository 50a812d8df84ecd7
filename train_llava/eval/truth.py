"""The right answers that lie in files of their own: found for each answered question, and put beside it.

An answered question is a row of the question file with `said`, the answer. Each function takes the file or folder of
right answers and these rows, and adds to every row what its scorer needs. All raise EvalError.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .answers import EvalError, Row, read_json, read_jsonl, read_text
from .questions import without_ocr

SHORT_PROMPT = "Answer the question using a single word or phrase."


def pope(folder: Path, rows: Sequence[Row]) -> None:
    """Adds `label`, "yes" or "no". The files of a category are matched by order alone."""
    labels: dict[str, list[Row]] = {}
    for row in rows:
        category = row["category"]
        if category not in labels:
            labels[category] = read_jsonl(folder / f"coco_pope_{category}.json", fields=("label", "image"))[::-1]
        label = labels[category].pop() if labels[category] else {"image": None}
        if label["image"] != row["image"]:
            raise EvalError(
                f"POPE's labels of category {category} and LLaVA's questions do not belong together (question "
                f"{row['question_id']!r}: image {row['image']} against {label['image']}). Take the labels at "
                "the commit that docs/Evaluation.md of LLaVA names."
            )
        row["label"] = label["label"]


def mme(folder: Path, rows: Sequence[Row]) -> None:
    """Adds `task`, `asked` (the question in MME's words) and `truth`, "Yes" or "No"."""
    truths: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}
    for row in rows:
        task, name = str(row["question_id"]).split("/")[0], Path(row["image"]).stem
        if (task, name) not in truths:
            truths[task, name] = _mme_file(folder / task, name, row["image"])
        known, stem = truths[task, name], _mme_stem(row["text"])
        if stem not in known:
            raise EvalError(f"MME's files have no answer to {row['text']!r} about {row['image']}.")
        row["task"], (row["asked"], row["truth"]) = task, known[stem]


def _mme_file(folder: Path, name: str, image: str) -> dict[str, tuple[str, str]]:
    """-> {stem of a question: (question, truth)} of one picture."""
    places = (folder / f"{name}.txt", folder / "questions_answers_YN" / f"{name}.txt")
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise EvalError(f"MME has no answers for {image}: looked for {places[0]} and {places[1]}.")
    lines = [line.split("\t") for line in read_text(file).split("\n") if line.strip()]
    if any(len(line) != 2 for line in lines):
        raise EvalError(f"{file} must have lines of a question, a tab and Yes or No. Download it again.")
    return {_mme_stem(text): (text, truth) for text, truth in lines}


def _mme_stem(text: str) -> str:
    """MME's question without what either side adds to it: LLaVA takes one ending off and puts another one on."""
    return " ".join(text.replace(SHORT_PROMPT, "").replace("Please answer yes or no.", "").split())


def textvqa(file: Path, rows: Sequence[Row]) -> None:
    """Adds `answers`, those of ten people."""
    people: dict[tuple[str, str], list[str]] = {}
    try:
        for row in read_json(file)["data"]:
            people[row["image_id"], row["question"].lower()] = [str(answer) for answer in row["answers"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise EvalError(f"{file} is not TextVQA's annotation file: {type(error).__name__}: {error}.") from error
    for row in rows:
        asked = without_ocr(row["text"]).split("\n")[0]
        row["answers"] = people.get((row["question_id"], asked.lower()))
        if not row["answers"]:
            raise EvalError(f"{file} has no answers to {asked!r} about image {row['question_id']}.")


def gqa(file: Path, rows: Sequence[Row]) -> None:
    """Adds `category`, the kind of question, and `answer`."""
    truth = {}
    try:
        for name, row in read_json(file).items():
            truth[name] = str((row.get("types") or {}).get("structural", "all")), row["answer"]
    except (KeyError, TypeError, AttributeError) as error:
        raise EvalError(f"{file} is not GQA's question file: {type(error).__name__}: {error}.") from error
    unknown = [row["question_id"] for row in rows if str(row["question_id"]) not in truth]
    if unknown:
        missing = f"lacks {len(unknown)} of the questions, e.g. id {unknown[0]!r}"
        raise EvalError(f"{file} {missing}: it is of another split or version.")
    for row in rows:
        row["category"], row["answer"] = truth[str(row["question_id"])]
