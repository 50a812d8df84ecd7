"""Question files of every benchmark -> one list of questions, without torch.

A question is a dict with `question_id`, `text` (the prompt that LLaVA gets) and the picture: `image`, a path inside the
image folder, or `image_data`, its bytes or base64 or (until `repeat_images`) the index of the row that has it. What a
scorer needs later (category, answer, options) lies beside.
"""

from __future__ import annotations

import ast
import base64
import csv
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from llava_clipmoe.files import atomic_file

from .answers import EvalError, Row, read_json, read_jsonl

LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
LETTER_PROMPT_CN = "请直接回答选项字母。"
END = "\x04"
"""A line added after a table's last one: where it is not read as a row of its own, a cell was never closed."""
DAMAGED = "The file was cut or damaged; download it again."
OCR_TOKENS = "Reference OCR token:"
LETTERS = "ABCD"
HANDWRITTEN_MATHS = "Handwritten Mathematical Expression Recognition"
CIRCULAR_STEP = 1_000_000
"""MMBench numbers the turned copies of question i as i + 1e6, i + 2e6, ..."""
MISSING = {"", "#N/A N/A", *"#N/A #NA -1.#IND -1.#QNAN -NaN -nan 1.#IND 1.#QNAN <NA> N/A NA NULL NaN None".split()}
MISSING |= {"n/a", "nan", "null", "none"}
"""Cells that are empty for upstream's MMBench runner: what pandas reads as missing, and "none"."""


def llava_questions(path: Path) -> list[Row]:
    """LLaVA's jsonl: question_id, image, text, sometimes category."""
    return read_jsonl(path, fields=("question_id", "image", "text"))


def pope_questions(path: Path) -> list[Row]:
    """The same with the category that POPE is scored by: random, popular, adversarial."""
    return read_jsonl(path, fields=("question_id", "image", "text", "category"))


def textvqa_without_ocr(path: Path) -> list[Row]:
    """TextVQA's questions without the line of OCR tokens that LLaVA-1.5's file puts into every prompt."""
    return [{**question, "text": without_ocr(question["text"])} for question in llava_questions(path)]


def without_ocr(prompt: str) -> str:
    return "\n".join(line for line in prompt.split("\n") if not line.startswith(OCR_TOKENS))


def read_table(path: Path) -> tuple[list[str], list[Row]]:
    """A .tsv, .csv, .json (list of objects) or .parquet file -> its columns and rows. Raises EvalError."""
    rows = {".parquet": _parquet, ".json": _json_list}.get(path.suffix.lower(), _delimited)(path)
    if not rows:
        raise EvalError(f"{path} has no rows.")
    return list(rows[0]), rows


def _delimited(path: Path) -> list[Row]:
    csv.field_size_limit(sys.maxsize)  # a cell may hold a whole picture
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(chain(file, [END]), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            columns = _columns(reader.fieldnames or (), path)
            if columns in ([], [END]):
                return rows
            for row in reader:
                if row[columns[0]] == END:
                    return rows
                rows.append(row)
                if None in row or None in row.values():
                    if END in "".join(map(str, row.values())):
                        break
                    raise EvalError(f"{path}, line {reader.line_num}: {len(columns)} cells are needed. {DAMAGED}")
    except UnicodeDecodeError as error:
        raise EvalError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8, or download it again.") from error
    except csv.Error as error:
        raise EvalError(f"{path}, line {reader.line_num}: {error}. Download the file again.") from error
    raise EvalError(f"{path}: a quote opens a cell in row {len(rows)} and is never closed. {DAMAGED}")


def _columns(names: Sequence[str], path: Path) -> list[str]:
    """Raises EvalError where two columns have one name: nobody can tell which of them is meant."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise EvalError(f"{path} has more than one column {', '.join(map(repr, twice))}. Remove or rename one.")
    return list(names)


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow.parquet as parquet
    except ModuleNotFoundError as error:
        raise EvalError(f"reading {path} needs pyarrow: `pip install pyarrow`, or take the .tsv file.") from error
    try:
        table = parquet.ParquetFile(path).read()
    except (ValueError, OSError) as error:  # what pyarrow's errors are
        raise EvalError(f"{path} is damaged or not a parquet file: {error}. Download it again.") from error
    _columns(table.column_names, path)
    return table.to_pylist()


def _json_list(path: Path) -> list[Row]:
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise EvalError(f"{path} must be a list of objects.")
    return rows


def column(row: Row, *names: str, path: Path | str) -> Any:
    """The first of several columns that a row has. Raises EvalError that names them all."""
    for name in names:
        if name in row:
            return row[name]
    raise EvalError(f"{path} needs a column {' or '.join(names)}; it has {', '.join(map(str, row))}.")


def is_missing(cell: Any) -> bool:
    return cell is None or str(cell) in MISSING


def options_of(row: Row) -> dict[str, str]:
    """The options A, B, ... of a row up to the first that is missing, as upstream's runner reads them."""
    names = takewhile(lambda name: not is_missing(row.get(name)), LETTERS)
    return {name: str(row[name]) for name in names}


def mmbench_questions(path: Path, *, lang: str = "en", all_rounds: bool = False) -> list[Row]:
    """MMBench's tsv -> a question per row, with `all_rounds` one per turn of its options.

    `text` is what upstream's runner keeps as the prompt; `suffix` is what it adds before it asks.
    """
    suffix = "\n" + (LETTER_PROMPT_CN if lang == "cn" else LETTER_PROMPT)
    questions = []
    for number, row in enumerate(read_table(path)[1]):
        options = options_of(row)
        letters, texts = list(options), list(options.values())
        stem = str(column(row, "question", path=path))
        if not is_missing(row.get("hint")):
            stem = f"{row['hint']}\n{stem}"
        shared = {"question_id": _number(column(row, "index", path=path), path), "row": number, "suffix": suffix}
        shared |= {"answer": row.get("answer"), "image_data": row.get("image")}
        shared["category"] = "all" if is_missing(row.get("category")) else str(row["category"])
        for turn in range(len(letters) if all_rounds else 1):
            turned = texts[turn:] + texts[:turn]
            question = {"round_id": turn, "text": _with_options(stem, dict(zip(letters, turned, strict=True)))}
            question |= {"options": turned, "option_char": letters[turn:] + letters[:turn]}
            questions.append(shared | question)
    forms = Counter(question["question_id"] % CIRCULAR_STEP for question in questions)
    for question in questions:
        question["forms"] = forms[question["question_id"] % CIRCULAR_STEP]
    return questions


def _with_options(stem: str, options: dict[str, str]) -> str:
    return "\n".join([stem, *(f"{name}. {text}" for name, text in options.items())])


def _number(cell: Any, path: Path) -> int:
    try:
        number = int(cell)
    except (TypeError, ValueError, OverflowError) as error:
        raise EvalError(f"{path}: the index {cell!r} is no number.") from error
    if isinstance(cell, float) and cell != number:
        raise EvalError(f"{path}: the index {cell!r} is no whole number.")
    return number


def mmstar_questions(path: Path) -> list[Row]:
    """MMStar's parquet or tsv: the options stand in the question, or in columns A to D."""
    questions = []
    for number, row in enumerate(read_table(path)[1]):
        options = options_of(row)
        answer = str(column(row, "answer", path=path)).strip().upper()
        if answer not in tuple(LETTERS):
            raise EvalError(f"{path}: the answer of row {number} is {row['answer']!r}, and must be one of A to D.")
        stem = str(column(row, "question", path=path)).strip()
        question = {"question_id": _number(row.get("index", number), path), "answer": answer}
        question["text"] = f"{_with_options(stem, options)}\n{LETTER_PROMPT}"
        question["options"] = options or inline_options(stem)
        question["category"] = str(column(row, "category", path=path))
        questions.append(question | {"image_data": column(row, "image", path=path)})
    return questions


def inline_options(text: str) -> dict[str, str]:
    """Options written into a question -> {letter: text}.

    "Which? Options: A: yes, B: no" and "(a) Open (b) Closed" are read. The letters A to D without texts where the
    question has none that can be read.
    """
    tail = text.rsplit("Options:", 1)[-1]
    marks = list(re.finditer(r"\(([A-Da-d])\)|(?:^|[\s,;])([A-D])[:.]", tail))
    ends = [*(mark.start() for mark in marks), len(tail)][1:]
    found = {
        (mark.group(1) or mark.group(2)).upper(): tail[mark.end() : end].strip(" ,;\n")
        for mark, end in zip(marks, ends, strict=True)
    }
    return found or dict.fromkeys(LETTERS, "")


def ocrbench_questions(path: Path) -> list[Row]:
    """OCRBench's json (pictures in a folder), tsv or parquet (pictures inside)."""
    questions = []
    for number, row in enumerate(read_table(path)[1]):
        name = row.get("id", row.get("index", number))
        if not isinstance(name, (str, int, float)):
            raise EvalError(f"{path}: the id of row {number} must be a text or a number, and is {name!r}.")
        maths = row.get("dataset_name", row.get("dataset")) == "HME100k"
        category = HANDWRITTEN_MATHS if maths else str(column(row, "type", "question_type", "category", path=path))
        question = {"question_id": name, "text": str(column(row, "question", path=path)), "category": category}
        question["answers"] = _answers(column(row, "answers", "answer", path=path), number, path)
        if "image_path" in row:
            question["image"] = str(row["image_path"])
        else:
            question["image_data"] = column(row, "image", "image_path", path=path)
        questions.append(question)
    return questions


def _answers(cell: Any, number: int, path: Path) -> list[str]:
    """A list of accepted answers, a list written as text, or one answer -> the answers. Raises EvalError."""
    if isinstance(cell, str) and cell.startswith("["):
        try:
            cell = ast.literal_eval(cell)
        except (ValueError, SyntaxError) as error:
            raise EvalError(f"{path}: the answers of row {number} are no list: {cell!r}.") from error
    if cell in (None, "", []) or cell != cell:  # none, or NaN; and "" stands in any text
        raise EvalError(f"{path}: row {number} has no answer. Download it again.")
    return [str(answer) for answer in (cell if isinstance(cell, list) else [cell])]


def mmvp_questions(path: Path) -> list[Row]:
    """MMVP's Questions.csv (Index, Question, Options, Correct Answer); two consecutive rows are a pair."""
    questions = []
    for row in read_table(path)[1]:
        index = _number(column(row, "Index", "lndex", path=path), path)  # a published copy has a misspelt head
        options = str(column(row, "Options", path=path)).strip()
        text = f"{str(column(row, 'Question', path=path)).strip()} {options}\n{LETTER_PROMPT}"
        truth = re.search(r"[A-Da-d]", str(column(row, "Correct Answer", path=path)))
        if truth is None:
            raise EvalError(f"{path}: row {index} has no correct answer like (a).")
        question = {"question_id": index, "text": text, "image": f"{index}.jpg"}
        questions.append(question | {"answer": truth.group().upper(), "options": inline_options(options)})
    if len(questions) % 2:
        raise EvalError(f"{path} has {len(questions)} rows: two consecutive rows are a pair, so one is missing.")
    return questions


def repeat_images(questions: Sequence[Row], table: Path) -> None:
    """Put the picture into `image_data` where it holds the index of the row whose picture is meant: MMBench's turned
    copies of a question are written so.

    Takes the questions of the whole table, for the other row may not be among those that are asked. Raises EvalError.
    """
    cells = {str(question["question_id"]): question.get("image_data") for question in questions}

    def is_index(cell: Any) -> bool:
        return isinstance(cell, int) or (isinstance(cell, str) and (cell in cells or cell.strip().isdecimal()))

    for question in questions:
        cell, passed = question.get("image_data"), [str(question["question_id"])]
        while is_index(cell):
            name = str(cell).strip()
            if name not in cells or name in passed:
                fault = "which is not there" if name not in cells else "and that leads back to it"
                repeats_it = f"the row with index {passed[-1]} repeats the picture of the row with index {name}"
                raise EvalError(f"{table}: {repeats_it}, {fault}. {DAMAGED}")
            passed.append(name)
            cell = cells[name]
        if len(passed) > 1:
            question["image_data"] = cell


def extract_images(questions: Sequence[Row], folder: Path) -> None:
    """Write the pictures that came inside a table to `folder` and name them in `image`.

    A file is named by its content: ids may be any text, and another version of the table has other pictures.
    """
    for question in questions:
        if "image" in question:
            continue
        data = image_bytes(question)
        file = folder / f"{hashlib.sha256(data).hexdigest()[:16]}.{'png' if data.startswith(b'PNG', 1) else 'jpg'}"
        if not file.exists():
            with atomic_file(file) as temporary:
                temporary.write_bytes(data)
        question["image"] = file.name


def image_bytes(question: Row) -> bytes:
    """The picture that came inside a table, in a cell of bytes, {"bytes": ...} or base64. Raises EvalError."""
    cell, name = question["image_data"], question["question_id"]
    if isinstance(cell, dict):
        cell = cell.get("bytes")
    if isinstance(cell, str) and not is_missing(cell):
        try:
            cell = base64.b64decode("".join(cell.split()), validate=True)
        except ValueError as error:
            raise EvalError(f"the picture of question {name} is no base64 ({error}). {DAMAGED}") from error
    if not isinstance(cell, bytes) or not cell:
        raise EvalError(f"question {name} has no picture. {DAMAGED}")
    return cell


def check_images(questions: Sequence[Row], folder: Path) -> None:
    """Raises EvalError when a picture is not in `folder`: upstream's runner would stop in the middle."""
    names = {question["image"] for question in questions}
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise EvalError(
            f"{len(missing):,} of {len(names):,} images are not in {folder}, e.g. {missing[0]}. Was the archive "
            "unpacked whole, and into this folder?"
        )
