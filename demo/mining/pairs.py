"""A folder of blind pairs: pictures that the dense CLIP embeds as the same though they differ.

    FOLDER/pairs.jsonl          a line per pair, the widest gap first
    FOLDER/pictures/            the pictures of the pairs, PNG
    FOLDER/contact_sheet.png    the first pairs at a glance
    FOLDER/mining.json          settings, models, counts

The folder can be moved or given away. So what is read here may come from a stranger, and no path may lead out of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from llava_clipmoe.files import parse_json, write_json, write_text

ROWS, PICTURES, SHEET, SUMMARY = "pairs.jsonl", "pictures", "contact_sheet.png", "mining.json"
LONG_SIDE = 1024
"""Pixels: what a screen shows; LLaVA's towers look at 336."""
EYES = ("dense", "clip-moe")
"""Whose scores `BlindPair.right` holds."""
HOW = "`llava-clipmoe mine-pairs IMAGES --output-dir FOLDER` makes one."


@dataclass(frozen=True)
class Question:
    """A question about both pictures of a pair, with different right answers."""

    attribute: str
    question: str
    answers: tuple[str, str]
    """The right answer for the first and for the second picture."""
    statements: tuple[str, str] | None = None
    """What the first and the second picture show, where the questions came with it."""


@dataclass(frozen=True)
class BlindPair:
    """Two pictures, and how alike every encoder finds them."""

    images: tuple[Path, Path]
    """Absolute paths."""
    names: tuple[str, str]
    cosines: dict[str, float]
    """By encoder: "dense", "clip-moe", "expert0" ..., and "dinov2" where it was the reference."""
    reference: str
    """What sees the pictures apart: "clip-moe", "experts" (the smallest cosine over them) or "dinov2"."""
    gap: float
    """The dense cosine minus the reference's."""
    passed: bool
    """Both thresholds held. False for a pair that is only the best of what there was."""
    questions: tuple[Question, ...] = ()
    right: dict[str, int] | None = None
    """How many of the pair's two statements each of `EYES` matched to their own picture when the pair was mined; None
    where no questions came with statements."""

    @property
    def difference(self) -> str:
        """What differs by the first question, as "color: red / blue"; "" without a question."""
        return f"{self.questions[0].attribute}: {' / '.join(self.questions[0].answers)}" if self.questions else ""

    @property
    def statements(self) -> tuple[str, str]:
        """What the pictures show, in words that a CLIP reads: as the first question says it; else by their names where
        these are words (no file's name, no number) and differ; else the first question's answers; else two empty
        texts."""
        if self.questions and self.questions[0].statements:
            return self.questions[0].statements
        if all(map(_is_words, self.names)) and self.names[0] != self.names[1]:
            return f"a picture of {self.names[0]}", f"a picture of {self.names[1]}"
        return self.questions[0].answers if self.questions else ("", "")

    @property
    def attributes(self) -> tuple[str, ...]:
        """The questions' attributes, each once, in order."""
        return tuple(dict.fromkeys(question.attribute for question in self.questions))


def clearest_first(pairs: Sequence[BlindPair]) -> list[int]:
    """Numbers of the pairs: first those where CLIP-MoE matches most statements right, of these the ones where the dense
    CLIP matches fewest, then the widest gap. Pairs without scores come last, in their order."""

    def key(number: int) -> tuple[float, ...]:
        right, gap = pairs[number].right, pairs[number].gap
        return (1,) if right is None else (0, -right["clip-moe"], right["dense"], -gap)

    return sorted(range(len(pairs)), key=key)


def opening_pair(pairs: Sequence[BlindPair], told: Collection[frozenset[str]] = ()) -> int | None:
    """Number of the pair that the page opens on: the clearest of those that only the CLIP-MoE matches wholly right and
    that are among `told` (the names of both pictures): only its LLaVA told them apart. Else the clearest of all."""
    order = clearest_first(pairs)
    for number in order:
        pair = pairs[number]
        by_one_alone = pair.right is not None and pair.right["clip-moe"] == 2 > pair.right["dense"]
        if by_one_alone and frozenset(pair.names) in told:
            return number
    return order[0] if order else None


def right_by_attribute(pairs: Sequence[BlindPair]) -> dict[str, dict[str, int]]:
    """{attribute: {"pairs": n, eye: pairs of which it matched both statements right}}, "all" first, of the pairs with
    scores; {} where none has any. A pair counts for each of its attributes."""
    scored = [pair for pair in pairs if pair.right is not None]
    attributes = sorted({name for pair in scored for name in pair.attributes})
    table = {}
    for attribute in ("all", *attributes) if scored else ():
        own = [pair.right for pair in scored if attribute == "all" or attribute in pair.attributes]
        table[attribute] = {"pairs": len(own)} | {eye: sum(right[eye] == 2 for right in own) for eye in EYES}
    return table


def _is_words(name: str) -> bool:
    return bool(re.search(r"[^\W\d_]", name)) and not re.search(r"\.\w{1,5}$", name)


def save_picture(image: Image.Image, folder: Path, name: str, number: int) -> str:
    """Write a picture into `folder` as PNG, without metadata, its long side at most LONG_SIDE; -> the file's name, in
    which `number` tells apart pictures of one name."""
    stem = re.sub(r"[^\w-]+", "_", PurePosixPath(name.replace("\\", "/")).stem)[:40].strip("_")
    file = f"{number:05}{'-' if stem else ''}{stem}.png"
    image = image.convert("RGB")
    image.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    # Made anew from the pixels: Pillow would write the original's colour profile into the PNG.
    Image.frombytes("RGB", image.size, image.tobytes()).save(folder / file)
    return file


def write_pairs(folder: Path, pairs: Sequence[BlindPair], summary: dict[str, Any]) -> None:
    """Write pairs.jsonl and mining.json into `folder`, where the pictures are already."""
    folder = folder.resolve()
    lines = []
    for pair in pairs:
        row = asdict(pair)
        row["images"] = [image.resolve().relative_to(folder).as_posix() for image in pair.images]
        for part, name in [*((question, "statements") for question in row["questions"]), (row, "right")]:
            if part[name] is None:
                del part[name]
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_json(folder / SUMMARY, summary)
    write_text(folder / ROWS, "".join(lines))


def read_pairs(path: Path) -> list[BlindPair]:
    """The pairs of a folder (or of its pairs.jsonl), in the file's order.

    Raises FileNotFoundError where there is no such file, or a picture is missing; ValueError, with the line's number,
    for a row that is malformed or names a picture outside the folder.
    """
    file = path if path.suffix == ".jsonl" and not path.is_dir() else path / ROWS
    if not file.is_file():
        raise FileNotFoundError(f"there are no mined pairs at {file}. {HOW}")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: U+2028 may be in a question
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}). {HOW}") from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            pairs.append(_pair(parse_json(line), file.parent.resolve()))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{file}, line {number}: {error}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{file}, line {number} is not a mined pair: {what}. {HOW}") from error
    return pairs


def _pair(row: Any, folder: Path) -> BlindPair:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    if not isinstance(row["reference"], str) or not isinstance(row["passed"], bool):
        raise ValueError("`reference` must be a name and `passed` true or false")
    cosines = {name: _number(value, f"cosines.{name}", 1) for name, value in row["cosines"].items()}
    if "dense" not in cosines:
        raise ValueError("`cosines` has no 'dense'")
    first, second = _two_texts(row, "images")
    return BlindPair(
        images=(_inside(folder, first), _inside(folder, second)),
        names=_two_texts(row, "names"),
        cosines=cosines,
        reference=row["reference"],
        gap=_number(row["gap"], "gap", 2),
        passed=row["passed"],
        questions=tuple(_question(question) for question in row.get("questions", ())),
        right=_right(row["right"]) if row.get("right") is not None else None,
    )


def _question(row: dict[str, Any]) -> Question:
    if not isinstance(row["attribute"], str) or not isinstance(row["question"], str):
        raise ValueError("`attribute` and `question` of a question must be text")
    statements = _two_texts(row, "statements") if row.get("statements") is not None else None
    return Question(row["attribute"], row["question"], _two_texts(row, "answers"), statements)


def _right(scores: Any) -> dict[str, int]:
    known = isinstance(scores, dict) and set(scores) == set(EYES)
    if not known or not all(type(score) is int and 0 <= score <= 2 for score in scores.values()):
        raise ValueError(f"`right` must say 0, 1 or 2 for each of {', '.join(EYES)}, found {scores!r}")
    return scores


def _two_texts(row: dict[str, Any], key: str) -> tuple[str, str]:
    texts = row[key]
    if not isinstance(texts, list) or len(texts) != 2 or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`{key}` must be two texts")
    return texts[0], texts[1]


def _number(value: Any, name: str, most: int) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not abs(value) <= most + 0.01:  # cosines are rounded; NaN is in no range
        raise ValueError(f"`{name}` must be a number between -{most} and {most}, found {value!r}")
    return float(value)


def _inside(folder: Path, name: str) -> Path:
    """The picture called `name`, links followed. The page serves these files: one outside is a leak."""
    path = (folder / name).resolve()
    if Path(name).is_absolute() or not path.is_relative_to(folder):
        raise ValueError(f"the picture {name!r} is not inside {folder}")
    if not path.is_file():
        raise FileNotFoundError(f"the picture {name!r} is missing. {HOW}")
    return path
