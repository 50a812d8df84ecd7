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
from .questions import image_bytes, read_table
from .settings import EvalLlava

ASKED = ("question_id", "image", "text", "suffix", "round_id", "options", "option_char")
TEXT_COLUMNS = ("hint", "question", "A", "B", "C", "D")


@dataclass
class Run:
    """One evaluation of one model."""

    settings: EvalLlava
    benchmark: Benchmark
    questions: Sequence[Row]
    """All of the benchmark, whatever the limit says: an answer is checked against them."""
    table: Path
    """The file that the questions are from."""
    images: Path
    """Folder of the pictures."""
    gpus: tuple[str, ...]
    """One process for each; ("",) leaves CUDA_VISIBLE_DEVICES as it is."""

    @property
    def answers_file(self) -> Path:
        return self.settings.folder / "answers.jsonl"

    @property
    def asks_table(self) -> bool:
        """Whether the runner reads questions and pictures from a tsv."""
        return self.settings.batch_size == 1 and self.benchmark.lang is not None


def answer_all(run: Run) -> list[Row]:
    """Have every question up to the limit answered; -> the answers file's rows. Answers from earlier runs are kept.

    Raises EvalError when a runner fails.
    """
    answers = _collect(run)
    left, asked = _unanswered(run, answers), len(run.questions[: run.settings.limit])
    if not left:
        return answers
    if len(left) < asked:
        print(f"{asked - len(left):,} of {asked:,} questions are answered already; {len(left):,} are left", flush=True)
    try:
        statuses = _run_processes(run, _split(left, len(run.gpus)))
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
    found = match(run.questions, answers, run.answers_file)[: run.settings.limit]
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
    parts = sorted((run.settings.folder / "parts").glob("answers-*.jsonl"))
    before = read_answers(run.answers_file) if run.answers_file.is_file() else []
    new = [read_answers(part, cut_end=True) for part in parts]
    answers = merge(run.questions, before, *new)
    if any(new):
        write_jsonl(run.answers_file, answers)
    for part in parts:
        part.unlink()
    return answers


def _run_processes(run: Run, shares: Sequence[Sequence[Row]]) -> list[int]:
    """Answer all shares at once; -> the processes' exit statuses. None of them outlives us."""
    children = Children()
    works = []
    for number, (share, gpu) in enumerate(zip(shares, run.gpus, strict=False)):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu} if gpu else None
        works.append(partial(children.run, _command(run, share, number), env=environment))
    with exit_on_sigterm():
        return children.run_all(works)


def _command(run: Run, share: Sequence[Row], number: int) -> list[str]:
    """Write the share's question file and -> the command that answers it."""
    asked = run.settings.folder / "parts" / f"questions-{number}.{'tsv' if run.asks_table else 'jsonl'}"
    if run.asks_table:
        _write_tsv(run, share, asked)
    else:
        write_jsonl(asked, [{name: question[name] for name in ASKED if name in question} for question in share])
    s, most = run.settings, str(run.benchmark.max_new_tokens)
    runner = f"llava.eval.{run.benchmark.runner}" if s.batch_size == 1 else "train_llava.eval.batched"
    command = [sys.executable, "-m", "llava_clipmoe.run", runner, "--question-file", str(asked)]
    command += ["--answers-file", str(asked.with_name(f"answers-{number}.jsonl"))]
    command += ["--model-path", s.model_path, "--conv-mode", s.conv_mode]
    command += ["--model-base", s.model_base] if s.model_base else []
    if run.asks_table:
        command += ["--single-pred-prompt", "--lang", run.benchmark.lang, *["--all-rounds"] * s.all_rounds]
    else:
        command += ["--image-folder", str(run.images)]
    if s.batch_size > 1:
        return [*command, "--batch-size", str(s.batch_size), "--max-new-tokens", most]
    if run.benchmark.runner == "model_vqa_loader":
        command += ["--max_new_tokens", most]
    return [*command, "--temperature", "0"]


def _write_tsv(run: Run, share: Sequence[Row], path: Path) -> None:
    """The share's rows of the table, each with its own picture in base64, as upstream's runner reads it.

    One more row, whose answer is dropped, keeps pandas from making numbers of a column: upstream adds its cells to a
    string.
    """
    header, rows = read_table(run.table)
    questions = {question["row"]: question for question in run.questions}
    chosen = []
    for number in sorted({question["row"] for question in share}):
        image = base64.b64encode(image_bytes(questions[number])).decode()
        chosen.append({**rows[number], "image": image})
    texts = dict.fromkeys(set(header) & set(TEXT_COLUMNS), "text")
    chosen.append({**chosen[0], "index": -1, **texts})
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        # all cells in quotes: else csv leaves a carriage return bare, at which pandas begins a row
        writer = csv.DictWriter(file, header, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(chosen)
