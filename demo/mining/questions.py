"""Questions with known answers for mined pairs: one question for both pictures, with different right answers."""

from __future__ import annotations

from pathlib import Path

from llava_clipmoe.files import replace_surrogates
from train_encoder.data.pairs import DataError
from train_encoder.data.tables import json_rows

from .images import Pictures
from .pairs import Question

FORMAT = 'A row is {"image": "a.png", "attribute": "color", "question": "What is the main color?", "answer": "red"}.'

KEYS = ("image", "attribute", "question", "answer")
Asked = dict[int, dict[str, tuple[str, str]]]
"""{a picture's number: {question: (attribute, answer)}}, for the pictures that have a question."""


def read_questions(file: Path, pictures: Pictures) -> Asked:
    """Read a JSONL such as train_llava's heldout.jsonl or pairs.jsonl. `image` is a picture's path (a relative one
    starts from the file's folder) or its name.

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
        image, attribute, question, answer = (replace_surrogates(row[key]) for key in KEYS)
        number = by_path.get(_real(file.parent / row["image"]), by_name.get(image))
        if number is not None:
            asked.setdefault(number, {})[question] = (attribute, answer)
    if not asked:
        raise DataError(
            f"none of the {rows} questions of {file} is about one of the {len(pictures)} pictures: "
            "their `image` must be a picture's path, or its name below IMAGES."
        )
    return asked


def shared_questions(asked: Asked, first: int, second: int) -> tuple[Question, ...]:
    """Questions that both pictures have, word for word, with different answers; in the first one's order."""
    others = asked.get(second, {})
    return tuple(
        Question(attribute, question, (answer, others[question][1]))
        for question, (attribute, answer) in asked.get(first, {}).items()
        if question in others and others[question][1] != answer
    )


def _real(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, ValueError):  # no possible path, as one with a null byte: no picture has it
        return path
