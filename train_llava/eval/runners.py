"""Run upstream's (or our batched) runner over the questions that have no answer yet, one process a GPU.

Upstream's runners start their answers file anew at every start and split questions themselves (a split into more
parts than there are questions ends in an IndexError). So each process gets its own file with its own share of what is
left, and what it wrote is merged into `answers.jsonl` when it ends, is stopped, or was killed in an earlier run.
"""

from __future__ import annotations

import base64
import csv
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llava_clipmoe.files import atomic_file
from llava_clipmoe.processes import Children, exit_on_sigterm

from .answers import EvalError, Row, match, merge, read_answers, write_jsonl
from .benchmarks import Benchmark
from .questions import image_bytes, is_missing, read_table

TEXT_COLUMNS = ("hint", "question", "A", "B", "C", "D")
PARTS = "parts"


@dataclass(frozen=True)
class Run:
    """One evaluation of one model: what to ask, how, and where it is kept."""

    benchmark: Benchmark
    questions: Sequence[Row]
    """All of the benchmark, whatever `limit` says: an answer is checked against them."""
    limit: int | None
    image_folder: Path | None
    """None where the runner reads pictures from the table itself (MMBench)."""
    table: Path
    folder: Path
    """Holds answers.jsonl and, while running, parts/."""
    model_path: str
    model_base: str | None
    conv_mode: str
    batch_size: int
    gpus: tuple[str, ...]
    """One process for each; ("",) leaves CUDA_VISIBLE_DEVICES as it is."""
    all_rounds: bool = False

    @property
    def answers_file(self) -> Path:
        return self.folder / "answers.jsonl"


def answer_all(run: Run) -> list[Row]:
    """Have every question up to the limit answered; -> the answers file's rows. Answers from earlier runs are kept.

    Raises EvalError when a runner fails.
    """
    left = _unanswered(run, _collect(run))
    asked = len(run.questions[: run.limit])
    if not left:
        return _collect(run)
    if len(left) < asked:
        print(f"{asked - len(left):,} of {asked:,} questions are answered already; {len(left):,} are left", flush=True)
    commands = [_command(run, share, number) for number, share in enumerate(_split(left, len(run.gpus)))]
    try:
        statuses = _run_processes(commands, run.gpus)
    finally:
        answers = _collect(run)
    missing = len(_unanswered(run, answers))
    if missing:
        codes = ", ".join(map(str, sorted({status for status in statuses if status}))) or "0"
        raise EvalError(
            f"the runner ended (exit status {codes}) after {asked - missing:,} of {asked:,} answers; its own message "
            f"is above. They are kept in {run.answers_file}: the same command goes on with the other {missing:,}."
        )
    return answers


def _unanswered(run: Run, answers: Sequence[Row]) -> list[Row]:
    found = match(run.questions, answers, run.answers_file)[: run.limit]
    return [question for question, answer in zip(run.questions, found, strict=False) if answer is None]


def _split(rows: Sequence[Row], parts: int) -> list[Sequence[Row]]:
    """At most `parts` shares of nearly equal size, none empty; the rounds of one question stay together."""
    size = -(-len(rows) // parts)
    shares: list[list[Row]] = [[]]
    for row in rows:
        if len(shares[-1]) >= size and row["question_id"] != shares[-1][-1]["question_id"]:
            shares.append([])
        shares[-1].append(row)
    return shares


def _collect(run: Run) -> list[Row]:
    """Merge what is in parts/ into answers.jsonl and remove it; -> all answers so far, in the questions' order."""
    parts = sorted((run.folder / PARTS).glob("answers-*.jsonl"))
    before = read_answers(run.answers_file) if run.answers_file.is_file() else []
    new = [read_answers(part, cut_end=True) for part in parts]
    answers = merge(run.questions, before, *new)
    if any(new):
        write_jsonl(run.answers_file, answers)
    for part in parts:
        part.unlink()
    return answers


def _command(run: Run, share: Sequence[Row], number: int) -> list[str]:
    """Write the share's question file and -> the command that answers it."""
    folder = run.folder / PARTS
    upstream_table = run.batch_size == 1 and run.benchmark.runner == "model_vqa_mmbench"
    asked = folder / f"questions-{number}.{'tsv' if upstream_table else 'jsonl'}"
    (_write_tsv if upstream_table else _write_questions)(run, share, asked)
    runner = f"llava.eval.{run.benchmark.runner}" if run.batch_size == 1 else "train_llava.eval.batched"
    command = [sys.executable, "-m", "llava_clipmoe.run", runner, "--question-file", str(asked)]
    command += ["--model-path", run.model_path, "--conv-mode", run.conv_mode]
    command += ["--answers-file", str(folder / f"answers-{number}.jsonl")]
    if run.model_base:
        command += ["--model-base", run.model_base]
    if not upstream_table:
        command += ["--image-folder", str(run.image_folder)]
    if run.batch_size > 1:
        return [*command, "--batch-size", str(run.batch_size), "--max-new-tokens", str(run.benchmark.max_new_tokens)]
    rounds = ["--all-rounds"] if run.all_rounds else []
    return [*command, "--temperature", "0", *run.benchmark.runner_flags, *rounds]


def _write_questions(run: Run, share: Sequence[Row], path: Path) -> None:
    fields = ("question_id", "image", "text", "suffix", "round_id", "options", "option_char")
    write_jsonl(path, [{name: question[name] for name in fields if name in question} for question in share])


def _write_tsv(run: Run, share: Sequence[Row], path: Path) -> None:
    """The share's rows of the table, each with its own picture in base64, as upstream's runner reads it."""
    header, rows = read_table(run.table)
    questions = {question["row"]: question for question in run.questions}
    chosen = sorted({question["row"] for question in share})
    chosen = _readable_by_pandas(rows, chosen)
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        # all cells in quotes: else csv leaves a carriage return bare, at which pandas begins a row
        writer = csv.DictWriter(file, header, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        for number in chosen:
            image = base64.b64encode(image_bytes(questions[number])).decode()
            writer.writerow({**rows[number], "image": image})


def _readable_by_pandas(rows: Sequence[Row], chosen: list[int]) -> list[int]:
    """Add rows until no text column of a small file is all numbers or all true/false.

    Upstream adds a cell to a string, and pandas would have made numbers of such a column: TypeError. The answers to
    the added rows are not used twice.
    """
    for name in TEXT_COLUMNS:
        cells = [rows[number][name] for number in chosen if not is_missing(rows[number].get(name))]
        if cells and not any(map(_is_text, cells)):
            spare = next((number for number, row in enumerate(rows) if _is_text(row.get(name))), None)
            chosen = chosen if spare is None else [*chosen, spare]
    return chosen


def _is_text(cell: object) -> bool:
    try:
        float(str(cell))
    except ValueError:
        return not is_missing(cell) and str(cell).lower() not in ("true", "false")
    return False


def _run_processes(commands: Sequence[Sequence[str]], gpus: Sequence[str]) -> list[int]:
    """Run all commands at once and wait for them; -> their exit statuses. None of them outlives us."""
    children = Children()

    def run(command: Sequence[str], gpu: str) -> int | None:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu} if gpu else None
        return children.run(command, env=environment)

    with exit_on_sigterm():
        return children.run_all([partial(run, *pair) for pair in zip(commands, gpus, strict=False)])
