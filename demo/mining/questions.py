"""Questions with known answers for mined pairs: one question for both pictures, with different right answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava_clipmoe.files import replace_surrogates
from train_encoder.data.pairs import DataError
from train_encoder.data.tables import json_rows

from .images import Pictures
from .pairs import Question

FORMAT = 'A row is {"image": "a.png", "attribute": "color", "question": "What is the main color?", "answer": "red"}.'

KEYS = ("image", "attribute", "question", "answer")


@dataclass(frozen=True)
class Answer:
    """What a row says of one question about one picture."""

    attribute: str
    answer: str
    statement: str | None = None
    """What the picture shows, in words that a CLIP reads."""
    pair: int | None = None
    """The pair that the picture was made for."""


Asked = dict[int, dict[str, Answer]]
"""{a picture's number: {question: its Answer}}, for the pictures that have a question."""


def read_questions(file: Path, pictures: Pictures) -> Asked:
    """Read a JSONL such as train_llava's heldout.jsonl or pairs.jsonl. `image` is a picture's path (a relative one
    starts from the file's folder) or its name. `statement` (a text) and `pair` (a whole number) may be absent.

    Raises DataError for a malformed row, and where no picture has a question; FileNotFoundError.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file of questions at {file}. {FORMAT}")
    by_name = {name: i for i, name in enumerate(pictures.names)}
    by_path = {_real(path): i for i, path in enumerate(pictures.paths or ())}
    asked: Asked = {}
    rows = 0
    for rows, row in enumerate(json_rows(file), start=1):
        row = {"attribute": row.get("type"), **row}
        for key in KEYS:
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise DataError(f"{file}, row {rows} has no text in {key!r}. {FORMAT}")
        statement, pair = row.get("statement"), row.get("pair")
        if statement is not None and (not isinstance(statement, str) or not statement.strip()):
            raise DataError(f"{file}, row {rows}: where there is a 'statement', it must be text.")
        if pair is not None and type(pair) is not int:
            raise DataError(f"{file}, row {rows}: where there is a 'pair', it must be a whole number.")
        image, attribute, question, answer = (replace_surrogates(row[key]) for key in KEYS)
        number = by_path.get(_real(file.parent / row["image"]), by_name.get(image))
        if number is not None:
            said = None if statement is None else replace_surrogates(statement)
            asked.setdefault(number, {})[question] = Answer(attribute, answer, said, pair)
    if not asked:
        raise DataError(
            f"none of the {rows} questions of {file} is about one of the {len(pictures)} pictures: "
            "their `image` must be a picture's path, or its name below IMAGES."
        )
    return asked


def shared_questions(asked: Asked, first: int, second: int) -> tuple[Question, ...]:
    """Questions that both pictures have, word for word, with different answers; in the first one's order. Where both
    have a pair's number with the question, it must be the same: other pictures may differ in much more."""
    shared, others = [], asked.get(second, {})
    for question, one in asked.get(first, {}).items():
        other = others.get(question)
        if other is None or other.answer == one.answer:
            continue
        if None in (one.pair, other.pair) or one.pair == other.pair:
            said = None if None in (one.statement, other.statement) else (one.statement, other.statement)
            shared.append(Question(one.attribute, question, (one.answer, other.answer), said))
    return tuple(shared)


def _real(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, ValueError):  # no possible path, as one with a null byte: no picture has it
        return path
