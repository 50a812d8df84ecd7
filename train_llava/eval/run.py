"""The command `llava-clipmoe eval-llava`: one benchmark, from the model to the score or the file to upload.

llava-clipmoe eval-llava pope --model-path llava-v1.5-7b-clipmoe --data playground/data/eval/pope
llava-clipmoe eval-llava mmbench --answers answers/llava-v1.5-13b.jsonl --data mmbench_dev_20230712.tsv
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from llava_clipmoe.files import read_json, remove_leftovers, replace_surrogates, write_json

from .answers import EvalError, Row, complete, match, read_answers
from .benchmarks import BENCHMARKS, Benchmark, Found
from .questions import check_images, extract_images, repeat_images
from .runners import Run, answer_all
from .scorers import Metrics

WEIGHTS = ("*.safetensors", "*.bin", "config.json")
PAPER_MODELS = ("llava-1.5-7b", "llava-1.5-7b + CLIP-MoE")


@dataclass(frozen=True)
class EvalLlava:
    """Have a LLaVA answer a benchmark as LLaVA-1.5 was evaluated (greedy, its prompts), convert the answers to the file
    that the benchmark's server or scorer takes, and score what can be scored here.

    Missing data is named, with where to get it. A repeated command goes on where the last one stopped. Works on the
    CPU too. With --answers no model is run.
    """

    benchmark: Annotated[Literal[tuple(BENCHMARKS)], tyro.conf.Positional]
    """What to measure."""
    model_path: str | None = None
    """The LLaVA: a directory with "llava" in its name, or a hub id."""
    model_base: str | None = None
    """The language model under a LoRA or a projector alone."""
    data: Path | None = None
    """The benchmark's folder, in the layout of LLaVA-1.5's playground/data/eval/NAME; or its question file."""
    output_dir: Path | None = None
    """Where answers, converted file and results.json go; runs/eval-llava/BENCHMARK/MODEL when absent."""
    answers: Path | None = None
    """Convert and score this answers file."""
    conv_mode: str = "vicuna_v1"
    """LLaVA's conversation template."""
    batch_size: int = 1
    """1: upstream's runner. More: our runner, which asks several questions at a time and gives the same answers."""
    num_gpus: int | None = None
    """Processes, one a GPU, that share the questions; all of CUDA_VISIBLE_DEVICES, else 1, when absent."""
    limit: int | None = None
    """Only the first N questions: a look, not a result to report."""
    all_rounds: bool = False
    """MMBench: ask each question with its options in every turn (for a tsv that does not hold the turns itself)."""

    def check(self) -> None:
        """Raises EvalError for settings that contradict each other."""
        if (self.answers is None) == (self.model_path is None):
            raise EvalError("give --model-path (a model that answers) or --answers (a file of answers), one of them.")
        if self.answers is None and self.data is None:
            raise EvalError(f"--data is needed: {BENCHMARKS[self.benchmark].title}'s folder.")
        for name in ("batch_size", "num_gpus", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EvalError(f"--{name.replace('_', '-')} must be at least 1, and is {value}.")
        if self.all_rounds and BENCHMARKS[self.benchmark].lang is None:
            raise EvalError("--all-rounds is for mmbench and mmbench_cn.")

    @property
    def folder(self) -> Path:
        name = Path(self.model_path.rstrip("/")).name if self.model_path else self.answers.stem
        return self.output_dir or Path("runs/eval-llava") / self.benchmark / name


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark, print its table and write results.json; -> 0. Raises EvalError (a ValueError) or OSError that
    a user can mend; SystemExit for --help and flags that do not exist."""
    settings = tyro.cli(EvalLlava, args=argv, prog="llava-clipmoe eval-llava")
    settings.check()
    started = time.monotonic()
    benchmark = BENCHMARKS[settings.benchmark]
    if settings.answers is not None:
        found, questions, answers = _from_file(settings, benchmark)
    else:
        found, questions, answers = _from_model(settings, benchmark)
    results = finish(settings, benchmark, found, questions, answers)
    results["seconds"] = round(time.monotonic() - started, 1)
    write_json(settings.folder / "results.json", results)
    show(benchmark, results, settings.folder / "results.json")
    return 0


def _load(benchmark: Benchmark, found: Found, all_rounds: bool) -> list[Row]:
    rounds = {"all_rounds": all_rounds} if benchmark.lang else {}
    return benchmark.questions(found["questions"], **benchmark.extras, **rounds)


def _from_file(settings: EvalLlava, benchmark: Benchmark) -> tuple[Found, list[Row] | None, list[Row]]:
    answers = read_answers(settings.answers)
    if settings.data is None and benchmark.converts_alone:
        ids = [{"question_id": answer["question_id"], "round_id": answer.get("round_id", 0)} for answer in answers]
        unique = list({tuple(row.values()): row for row in ids}.values())
        match(unique, answers, settings.answers)  # no question has two answers
        return {}, None, answers
    data = settings.data or Path("playground/data/eval") / settings.benchmark  # what the message names
    found = benchmark.find(data, {"questions", "truth", "split"})
    rounds = any(answer.get("round_id", 0) for answer in answers)
    questions = _load(benchmark, found, rounds)
    matched = match(questions, answers, settings.answers)
    return _limited(settings, found, questions, matched, settings.answers)


def _from_model(settings: EvalLlava, benchmark: Benchmark) -> tuple[Found, list[Row], list[Row]]:
    found = benchmark.find(settings.data, {"questions", "images", "truth", "split"})
    questions = _load(benchmark, found, settings.all_rounds)
    repeat_images(questions, found["questions"])
    folder = settings.folder
    remove_leftovers(folder)
    _same_settings(settings)
    asked = questions[: settings.limit]
    images = found.get("images", found["questions"].parent)
    if benchmark.runner != "model_vqa_mmbench" or settings.batch_size > 1:
        if any("image_data" in question for question in asked):
            extract_images(asked, folder / "images")
            images = folder / "images"
        check_images(asked, images)
    run = Run(
        benchmark=benchmark, questions=questions, limit=settings.limit, image_folder=images, table=found["questions"],
        folder=folder, model_path=settings.model_path, model_base=settings.model_base, conv_mode=settings.conv_mode,
        batch_size=settings.batch_size, gpus=_gpus(settings.num_gpus), all_rounds=settings.all_rounds,
    )  # fmt: skip
    matched = match(questions, answer_all(run), run.answers_file)
    return _limited(settings, found, questions, matched, run.answers_file)


def _limited(
    settings: EvalLlava, found: Found, questions: Sequence[Row], matched: Sequence[Row | None], source: Path
) -> tuple[Found, list[Row], list[Row]]:
    asked = list(questions[: settings.limit])
    return found, asked, complete(asked, matched[: settings.limit], source)


def _gpus(number: int | None) -> tuple[str, ...]:
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if number is None:
        number = max(1, len(visible))
    if number == 1:
        return ("",)
    if visible and len(visible) < number:
        raise EvalError(f"--num-gpus {number}, but CUDA_VISIBLE_DEVICES names {len(visible)}: {','.join(visible)}.")
    return tuple(visible[:number] or map(str, range(number)))


def _same_settings(settings: EvalLlava) -> None:
    """Keep what decides the answers beside them; refuse to go on with answers of another model or other settings."""
    names = ("benchmark", "model_path", "model_base", "conv_mode", "all_rounds")
    now: dict[str, Any] = {name: getattr(settings, name) for name in names}
    now["weights"] = _fingerprint(settings.model_path)
    file = settings.folder / "settings.json"
    before = read_json(file) if file.is_file() else now
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise EvalError(
            f"{settings.folder} holds answers made with another {', '.join(changed)}. Choose another --output-dir, or "
            "delete that folder to ask again."
        )
    write_json(file, now)


def _fingerprint(model_path: str) -> list[list[Any]]:
    """Names, sizes and times of a local model's files: a model trained on under the same name is another model."""
    files = sorted({file for pattern in WEIGHTS for file in Path(model_path).glob(pattern)})
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def finish(
    settings: EvalLlava, benchmark: Benchmark, found: Found, questions: Sequence[Row] | None, answers: Sequence[Row]
) -> dict[str, Any]:
    """Score, convert and -> the content of results.json (but for the seconds)."""
    scored = benchmark.score is not None and questions is not None
    metrics: Metrics = benchmark.score(found, questions, answers) if scored else {}  # before anything is written
    model = settings.model_path or answers[0].get("model_id") or settings.answers.stem
    results: dict[str, Any] = {
        "benchmark": settings.benchmark,
        "n": len(answers),
        "limited": settings.limit is not None,
        "headline": benchmark.headline,
        "metrics": metrics,
        "model": model,
        "settings": {
            name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()
        },
        "paper": dict(zip(PAPER_MODELS, benchmark.paper, strict=True)) if benchmark.paper else None,
    }
    if benchmark.upload:
        name = benchmark.upload.format(model=Path(str(model).rstrip("/")).name)
        upload = settings.folder / "upload" / name
        benchmark.convert(upload, found, questions or [], answers)
        results |= {"upload": str(upload), "next_step": benchmark.next_step.format(upload=upload)}
    return results


def show(benchmark: Benchmark, results: dict[str, Any], file: Path) -> None:
    """Print the metrics, the paper's figure beside the headline, and what is left to do."""
    console = Console()
    metrics, paper = results["metrics"], results["paper"]
    subset = ", only the first: --limit" if results["limited"] else ""
    title = f"{benchmark.title}: {results['model']} ({results['n']:,} answers{subset})"
    console.print(replace_surrogates(title), markup=False, highlight=False)
    if metrics:
        table = Table(box=box.SIMPLE)
        for name in ("", "here", *(paper or ())):
            table.add_column(name, justify="left" if not name else "right")
        for name, value in _flat(metrics):
            shown = f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
            figures = [f"{value:.1f}" for value in paper.values()] if paper and name == results["headline"] else []
            table.add_row(name.replace("_", " "), shown, *figures)
        console.print(table)
    elif benchmark.score is None:
        console.print("This benchmark is not scored here.")
    else:
        console.print("Not scored: the right answers are not here (give --data, with a split that has them).")
    if paper and not metrics:
        figures = ", ".join(f"{name} {value}" for name, value in paper.items())
        console.print(f"The paper's figures: {figures}", markup=False, highlight=False)
    for text in (benchmark.note, results.get("next_step"), f"written to {file}"):
        if text:
            console.print(replace_surrogates(text), markup=False, highlight=False, soft_wrap=True)


def _flat(metrics: Metrics, prefix: str = "") -> list[tuple[str, float]]:
    """Nested metrics as (name, value) lines: "by_category" {"popular": {"f1": ..}} gives "popular f1"."""
    lines = []
    for name, value in metrics.items():
        if isinstance(value, dict):
            inner = "" if name == "by_category" else "circular " if name == "circular_by_category" else f"{name} "
            lines += _flat(value, prefix + inner)
        else:
            lines.append((prefix + name, value))
    return lines


if __name__ == "__main__":
    sys.exit(main())
