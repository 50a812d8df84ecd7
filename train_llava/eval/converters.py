"""Answers -> the files that the benchmarks' servers and official evaluators take. Each is written atomically."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_clipmoe.files import atomic_directory, atomic_file, write_json, write_text

from .answers import EvalError, Row
from .questions import LETTERS, is_missing, read_table
from .scorers import gqa_prediction, normalise

NOT_XML = re.compile(r"[\ud800-\udfff\ufffe\uffff]")
"""Characters with which openpyxl writes a file that nobody can open."""
NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category")


def mmvet_json(path: Path, answers: Sequence[Row]) -> None:
    """{"v1_<id>": text}, what MM-Vet's evaluator reads (LLaVA's scripts/convert_mmvet_for_eval.py)."""
    write_json(path, {f"v1_{answer['question_id']}": answer["text"] for answer in answers})


def gqa_json(path: Path, answers: Sequence[Row]) -> None:
    """[{"questionId", "prediction"}], what GQA's eval.py reads (scripts/convert_gqa_for_eval.py)."""
    rows = [{"questionId": answer["question_id"], "prediction": gqa_prediction(answer["text"])} for answer in answers]
    write_text(path, json.dumps(rows))


def vizwiz_json(path: Path, questions: Sequence[Row], answers: Sequence[Row]) -> None:
    """[{"image", "answer"}] (scripts/convert_vizwiz_for_submission.py)."""
    pairs = zip(questions, answers, strict=True)
    rows = [{"image": question["image"], "answer": normalise(answer["text"])} for question, answer in pairs]
    write_text(path, json.dumps(rows))


def vqav2_json(path: Path, split: Sequence[Row], answers: Sequence[Row]) -> None:
    """[{"question_id", "answer"}] for the whole of test2015, which the server wants: what was not asked gets an empty
    answer (scripts/convert_vqav2_for_submission.py)."""
    said = {answer["question_id"]: normalise(answer["text"]) for answer in answers}
    rows = [{"question_id": row["question_id"], "answer": said.get(row["question_id"], "")} for row in split]
    strangers = said.keys() - {row["question_id"] for row in split}
    if strangers:
        raise EvalError(
            f"{len(strangers)} answered questions are not in test2015, e.g. id {next(iter(strangers))!r}: "
            "the two question files are of different versions."
        )
    write_text(path, json.dumps(rows))


def mme_folder(path: Path, rows: Sequence[tuple[str, str, str, str, str]]) -> None:
    """(task, image, question, truth, answer) rows -> a folder of TASK.txt, what MME's calculation.py reads.

    Lines of tab-separated image, question, truth and answer; the two of an image follow each other.
    """
    tasks: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for task, image, *cells in rows:
        line = "\t".join(" ".join(cell.split()) for cell in (Path(image).name, *cells))
        tasks[task][image].append(line)
    with atomic_directory(path) as folder:
        for task, images in tasks.items():
            text = "".join(f"{line}\n" for lines in images.values() for line in lines)
            (folder / f"{task}.txt").write_text(text, encoding="utf-8")


def mmbench_xlsx(path: Path, answers: Sequence[Row], table: Path | None = None) -> None:
    """The table that MMBench's server takes: index, question, options, `prediction`, and answer and split where the
    tsv has them (scripts/convert_mmbench_for_submission.py).

    Without the tsv the same columns are made from the answers file alone, but for answer and split, which only it
    knows; a hint then stands before its question. Of several rounds the first is uploaded.
    """
    said = {answer["question_id"]: answer for answer in answers if answer.get("round_id", 0) == 0}
    if table is None:
        columns = ["index", "question", *LETTERS, "prediction"]
        rows = [_row_of_answer(answer) for answer in said.values()]
    else:
        header, rows = read_table(table)
        columns = [name for name in header if name not in NOT_UPLOADED]
        columns.insert(max((columns.index(name) for name in LETTERS if name in columns), default=0) + 1, "prediction")
        rows = [{**row, "index": int(row["index"])} for row in rows]
        for row in rows:
            row["prediction"] = said[row["index"]]["text"] if row["index"] in said else None
    _write_xlsx(path, columns, rows)


def _row_of_answer(answer: Row) -> Row:
    try:
        options = dict(zip(answer["option_char"], answer["options"], strict=True))
        lines = answer["prompt"].split("\n" + f"{answer['option_char'][0]}. {answer['options'][0]}\n")
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise EvalError(
            f"the answer to question {answer['question_id']!r} lacks the options that upstream's MMBench runner writes "
            f"({error}). Pass --data with the benchmark's tsv."
        ) from error
    return {"index": answer["question_id"], "question": lines[0], **options, "prediction": answer["text"]}


def _write_xlsx(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    try:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ModuleNotFoundError as error:
        raise EvalError("writing MMBench's xlsx needs openpyxl: `pip install openpyxl`.") from error

    def text(value: Any) -> str:
        return NOT_XML.sub("\ufffd", ILLEGAL_CHARACTERS_RE.sub("", str(value)))

    def cell(row: Row, name: str) -> Any:
        value = row.get(name)
        if name == "index" or value is None:
            return value
        if name != "prediction" and is_missing(value):
            return None
        return text(value)

    book = Workbook()
    sheet = book.active
    sheet.append(list(map(text, columns)))
    for line, row in enumerate(rows, start=2):
        for place, name in enumerate(columns, start=1):
            written = sheet.cell(line, place, cell(row, name))
            if written.data_type == "f":  # an answer that starts with "=" is no formula
                written.data_type = "s"
    with atomic_file(path) as temporary:
        book.save(temporary)
