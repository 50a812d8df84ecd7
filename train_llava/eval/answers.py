"""Answers files: read them, match them to their questions, and merge what several processes wrote.

An answers file is LLaVA's: one JSON object a line with `question_id`, `prompt` and `text` (and more that is kept).
An id alone does not name a question: TextVQA and MME use the image's name as the id of all its questions, and
MMBench asks one id several times in turned order. So a question is known by its id, its prompt where the id occurs
more than once, and its round.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from llava_clipmoe.files import parse_json, write_text

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Found = dict[str, Path]
"""What was found in --data, by use (`benchmarks.Need`)."""


class EvalError(ValueError):
    """Data, answers or settings that cannot be evaluated; the message says what to do."""


def read_text(path: Path, errors: str = "strict") -> str:
    """A UTF-8 text, with or without a byte order mark. Split it at line feeds: str.splitlines would split at characters
    that people's texts may hold. Raises EvalError for another encoding; FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        return path.read_text(encoding="utf-8-sig", errors=errors)
    except UnicodeDecodeError as error:
        raise EvalError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8, or download it again.") from error


def read_json(path: Path) -> Any:
    """Raises EvalError; FileNotFoundError."""
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise EvalError(f"{path} is not valid JSON: {error}. Download it again.") from error


def read_jsonl(path: Path, *, fields: Sequence[str] = (), cut_end: bool = False) -> list[Row]:
    """The objects of a JSON-lines file. With `cut_end` a last line that was cut (its writer was killed) is left out.

    Raises EvalError with file and line for a line that is no object, or in which one of `fields` is missing or no text
    (an id may be a number), and for an empty file; FileNotFoundError.
    """
    lines = read_text(path, "replace" if cut_end else "strict").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            if cut_end and number == len(lines):
                logger.warning("%s: its last line was cut when its writer was stopped; it is left out", path)
                break
            raise EvalError(
                f"{path}, line {number} is not valid JSON ({getattr(error, 'msg', error)}): {line[:60]!r}. The file "
                "was cut or damaged; remove that line and answer the question again, or make the file anew."
            ) from error
        missing = [field for field in fields if not isinstance(row, dict) or field not in row]
        if missing:
            raise EvalError(f"{path}, line {number} has no {' and no '.join(map(repr, missing))}.")
        for field in fields:
            if not isinstance(row[field], (str, int, float) if field == "question_id" else str):
                raise EvalError(f"{path}, line {number}: {field!r} must be a text, and is {row[field]!r}.")
        rows.append(row)
    if not rows and not cut_end:
        raise EvalError(f"{path} is empty.")
    return rows


def write_jsonl(path: str | Path, rows: Iterable[Row]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_answers(path: Path, *, cut_end: bool = False) -> list[Row]:
    """Rows with at least `question_id` and `text`. Raises as `read_jsonl`."""
    rows = read_jsonl(path, fields=("question_id", "text"), cut_end=cut_end)
    for row in rows:
        if not isinstance(row.get("round_id", 0), int):
            raise EvalError(
                f"{path}: the round_id of question {row['question_id']!r} is no number: {row['round_id']!r}."
            )
    return rows


class Key:
    """Names the questions of one set: by id, by prompt too where ids repeat, and by round where there are rounds."""

    def __init__(self, questions: Sequence[Row]):
        ids = Counter((question["question_id"], question.get("round_id", 0)) for question in questions)
        self.by_prompt = any(count > 1 for count in ids.values())

    def __call__(self, row: Row) -> Hashable:
        prompt = str(row.get("prompt", row.get("text"))) if self.by_prompt else None
        return row["question_id"], row.get("round_id", 0), prompt


def match(questions: Sequence[Row], answers: Sequence[Row], source: Path) -> list[Row | None]:
    """The answer to each question, None where there is none. A question that the set asks twice may be answered once.

    Raises EvalError for answers to questions that do not exist and for second answers to one question.
    """
    key = Key(questions)
    asked, counts = Counter(map(key, questions)), Counter(map(key, answers))
    strangers = [name[0] for name in counts if name not in asked]
    doubles = [name[0] for name, count in counts.items() if count > asked[name] > 0]
    if strangers:
        detail = " with this prompt" if key.by_prompt else ""
        raise EvalError(
            f"{source} answers {len(strangers)} questions that are not in the benchmark, e.g. id {strangers[0]!r}"
            f"{detail}. It belongs to another benchmark, split or version of the question file."
        )
    if doubles:
        raise EvalError(
            f"{source} answers {len(doubles)} questions twice, e.g. id {doubles[0]!r}. Two runs were put into one "
            "file; keep one line a question."
        )
    found = {key(answer): answer for answer in answers}
    return [found.get(key(question)) for question in questions]


def complete(questions: Sequence[Row], answers: Sequence[Row | None], source: Path) -> list[Row]:
    """The answers of a complete set. Raises EvalError that says how many of how many are missing."""
    missing = [question["question_id"] for question, answer in zip(questions, answers, strict=True) if answer is None]
    if missing:
        raise EvalError(
            f"{source} has answers to {len(questions) - len(missing):,} of {len(questions):,} questions; "
            f"{len(missing):,} are missing, e.g. id {missing[0]!r}. Only a complete set is scored: run the evaluation "
            "again (it goes on where it stopped), or pass --limit N to score the first N questions."
        )
    return list(answers)


def merge(questions: Sequence[Row], *sources: Iterable[Row]) -> list[Row]:
    """All answers that belong to `questions`, in their order; the first of several answers to a question wins."""
    key = Key(questions)
    found: dict[Hashable, Row] = {}
    for rows in sources:
        for row in rows:
            found.setdefault(key(row), row)
    return [found[name] for name in dict.fromkeys(map(key, questions)) if name in found]
