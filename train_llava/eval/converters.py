"""Answered questions -> the files that the benchmarks' servers and official evaluators take, written atomically.

Each function takes the file or folder to write, the rows (of the question file, with `said`; of the answers file where
no questions are known), and the files that were found in --data.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_clipmoe.files import atomic_directory, atomic_file, write_json, write_text

from .answers import EvalError, Found, Row, read_jsonl
from .questions import LETTERS, is_missing, read_table
from .scorers import gqa_prediction, normalise

NOT_XML = re.compile(r"[\ud800-\udfff\ufffe\uffff]")
"""Characters with which openpyxl writes a file that nobody can open."""
NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category")


def mmvet_json(path: Path, rows: Sequence[Row], found: Found) -> None:
    """{"v1_<id>": text}, what MM-Vet's evaluator reads (LLaVA's scripts/convert_mmvet_for_eval.py)."""
    write_json(path, {f"v1_{row['question_id']}": row["said"] for row in rows})


def gqa_json(path: Path, rows: Sequence[Row], found: Found) -> None:
    """[{"questionId", "prediction"}], what GQA's eval.py reads (scripts/convert_gqa_for_eval.py)."""
    said = [{"questionId": row["question_id"], "prediction": gqa_prediction(row["said"])} for row in rows]
    write_text(path, json.dumps(said))


def vizwiz_json(path: Path, rows: Sequence[Row], found: Found) -> None:
    """[{"image", "answer"}] (scripts/convert_vizwiz_for_submission.py)."""
    write_text(path, json.dumps([{"image": row["image"], "answer": normalise(row["said"])} for row in rows]))


def vqav2_json(path: Path, rows: Sequence[Row], found: Found) -> None:
    """[{"question_id", "answer"}] for the whole of test2015, which the server wants: what was not asked gets an empty
    answer (scripts/convert_vqav2_for_submission.py)."""
    said = {row["question_id"]: normalise(row["said"]) for row in rows}
    split = [row["question_id"] for row in read_jsonl(found["split"], fields=("question_id",))]
    strangers = said.keys() - set(split)
    if strangers:
        raise EvalError(
            f"{len(strangers)} answered questions are not in test2015, e.g. id {next(iter(strangers))!r}: "
            "the two question files are of different versions."
        )
    write_text(path, json.dumps([{"question_id": name, "answer": said.get(name, "")} for name in split]))


def mme_folder(path: Path, rows: Sequence[Row], found: Found) -> None:
    """A folder of TASK.txt, what MME's calculation.py reads.

    Lines of tab-separated image, question, truth and answer; the two of an image follow each other.
    """
    tasks: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells = Path(row["image"]).name, row["asked"], row["truth"], row["said"]
        tasks[row["task"]][row["image"]].append("\t".join(" ".join(cell.split()) for cell in cells) + "\n")
    with atomic_directory(path) as folder:
        for task, images in tasks.items():
            lines = [line for of_image in images.values() for line in of_image]
            (folder / f"{task}.txt").write_text("".join(lines), encoding="utf-8")


def mmbench_xlsx(path: Path, rows: Sequence[Row], found: Found) -> None:
    """The table that MMBench's server takes: index, question, options, `prediction`, and answer and split where the
    tsv has them (scripts/convert_mmbench_for_submission.py).

    Without the tsv the same columns are made from the answers file alone, but for answer and split, which only it
    knows; a hint then stands before its question. Of several rounds the first is uploaded.
    """
    said = {row["question_id"]: row for row in rows if row.get("round_id", 0) == 0}
    if "questions" not in found:
        columns = ["index", "question", *LETTERS, "prediction"]
        _write_xlsx(path, columns, [_table_row(row) for row in said.values()])
        return
    header, table = read_table(found["questions"])
    columns = [name for name in header if name not in NOT_UPLOADED]
    columns.insert(max((columns.index(name) for name in LETTERS if name in columns), default=0) + 1, "prediction")
    for row in table:
        row["index"] = int(row["index"])
        row["prediction"] = said[row["index"]]["said"] if row["index"] in said else None
    _write_xlsx(path, columns, table)


def _table_row(answer: Row) -> Row:
    try:
        options = dict(zip(answer["option_char"], answer["options"], strict=True))
        question = answer["prompt"].split(f"\n{answer['option_char'][0]}. {answer['options'][0]}\n")[0]
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise EvalError(
            f"the answer to question {answer['question_id']!r} lacks the options that upstream's MMBench runner writes "
            f"({error}). Pass --data with the benchmark's tsv."
        ) from error
    return {"index": answer["question_id"], "question": question, **options, "prediction": answer["said"]}


def _write_xlsx(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    try:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ModuleNotFoundError as error:
        raise EvalError("writing MMBench's xlsx needs openpyxl: `pip install openpyxl`.") from error

    def cell(row: Row, name: str) -> Any:
        value = row.get(name)
        if name == "index" or value is None:
            return value
        if name != "prediction" and is_missing(value):
            return None
        return NOT_XML.sub("\ufffd", ILLEGAL_CHARACTERS_RE.sub("", str(value)))

    book = Workbook()
    sheet = book.active
    head = dict(zip(columns, columns, strict=True))
    for line, row in enumerate([head, *rows], start=1):
        for place, name in enumerate(columns, start=1):
            written = sheet.cell(line, place, cell(row, name))
            if written.data_type == "f":  # an answer that starts with "=" is no formula
                written.data_type = "s"
    with atomic_file(path) as temporary:
        book.save(temporary)
