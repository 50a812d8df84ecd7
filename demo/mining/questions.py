"""Questions with known answers for mined pairs: one question for both pictures, with different right answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llava_clipmoe.files import replace_surrogates
from train_encoder.data.pairs import DataError
from train_encoder.data.tables import json_rows

from .images import Pictures
from .pairs import Question

FORMAT = 'A row is {"image": "a.png", "attribute": "color", "question": "What is the main color?", "answer": "red"}.'


class Questions:
    """The questions of every picture, by its number."""

    def __init__(self, file: Path, pictures: Pictures) -> None:
        """Read a JSONL such as train_llava's heldout.jsonl or pairs.jsonl. `image` is a picture's path (a relative one
        starts from the file's folder) or its name. Raises DataError for a malformed row, and where no picture has a
        question; FileNotFoundError.
        """
        if not file.is_file():
            raise FileNotFoundError(f"there is no file of questions at {file}. {FORMAT}")
        by_name = {name: i for i, name in enumerate(pictures.names)}
        by_path = {_real(path): i for i, path in enumerate(pictures.paths or ())}
        self.of: dict[int, dict[str, tuple[str, str]]] = {}
        rows = 0
        for rows, row in enumerate(json_rows(file), start=1):
            image, *texts = (_text(file, rows, row, key) for key in KEYS)
            attribute, question, answer = map(replace_surrogates, texts)
            number = by_path.get(_real(file.parent / image), by_name.get(replace_surrogates(image)))
            if number is not None:
                self.of.setdefault(number, {})[question] = (attribute, answer)
        if not self.of:
            raise DataError(
                f"none of the {rows} questions of {file} is about one of the {len(pictures)} pictures: "
                "their `image` must be a picture's path, or its name below IMAGES."
            )

    def __len__(self) -> int:
        """Pictures with a question."""
        return len(self.of)

    def shared(self, first: int, second: int) -> tuple[Question, ...]:
        """Questions that both pictures have, word for word, with different answers; in the first one's order."""
        others = self.of.get(second, {})
        return tuple(
            Question(attribute, question, (answer, others[question][1]))
            for question, (attribute, answer) in self.of.get(first, {}).items()
            if question in others and others[question][1] != answer
        )

    def any_shared(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """bool [n]: which of n pairs share a question."""
        pairs = zip(first.tolist(), second.tolist(), strict=True)
        return np.fromiter((bool(self.shared(*pair)) for pair in pairs), bool, len(first))


def _real(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, ValueError):  # no possible path, as one with a null byte: no picture has it
        return path


KEYS = (("image",), ("attribute", "type"), ("question",), ("answer",))


def _text(file: Path, number: int, row: dict, keys: tuple[str, ...]) -> str:
    value = next((row[key] for key in keys if key in row), None)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{file}, row {number} has no text in {keys[0]!r}. {FORMAT}")
    return value
