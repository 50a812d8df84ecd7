"""The command `llava-clipmoe eval-llava`: one benchmark, from the model to the score or the file to upload.

llava-clipmoe eval-llava pope --model-path llava-v1.5-7b-clipmoe --data playground/data/eval/pope
llava-clipmoe eval-llava mmbench --answers answers/llava-v1.5-13b.jsonl --data mmbench_dev_20230712.tsv
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Column, Table

from llava_clipmoe.conversations import VICUNA
from llava_clipmoe.files import read_json, remove_leftovers, replace_surrogates, write_json

from .answers import EvalError, Found, Row, complete, match, read_answers
from .benchmarks import BENCHMARKS, Benchmark
from .questions import check_images, extract_images, repeat_images
from .runners import Run, answer_all
from .scorers import Metrics
from .settings import EvalLlava, template_of

PAPER_MODELS = ("llava-1.5-7b", "llava-1.5-7b + CLIP-MoE")


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark, print its table and write results.json; -> 0. Raises EvalError (a ValueError) or OSError that
    a user can mend; SystemExit for --help and flags that do not exist."""
    settings = tyro.cli(EvalLlava, args=argv, prog="llava-clipmoe eval-llava")
    settings.check()
    if settings.model_path and settings.conv_mode is None:
        settings = replace(settings, conv_mode=template_of(settings.model_path, settings.model_base))
    started = time.monotonic()
    benchmark = BENCHMARKS[settings.benchmark]
    answered = _from_file if settings.answers else _from_model
    results = finish(settings, benchmark, *answered(settings, benchmark))
    results["seconds"] = round(time.monotonic() - started, 1)
    file = settings.folder / "results.json"
    write_json(file, results)
    show(benchmark, results, file)
    return 0


def _questions(benchmark: Benchmark, found: Found, all_rounds: bool) -> list[Row]:
    mmbench = {"lang": benchmark.lang, "all_rounds": all_rounds} if benchmark.lang else {}
    return benchmark.questions(found["questions"], **mmbench)


def _from_file(settings: EvalLlava, benchmark: Benchmark) -> tuple[Found, list[Row], list[Row]]:
    """-> files found, questions, their answers. Without data no file is found, and the answers stand for questions."""
    answers = read_answers(settings.answers)
    if settings.data is None and benchmark.converts_alone:
        ids = {(answer["question_id"], answer.get("round_id", 0)) for answer in answers}
        match([{"question_id": name, "round_id": turn} for name, turn in ids], answers, settings.answers)  # no doubles
        return {}, answers, answers
    data = settings.data or Path("playground/data/eval") / settings.benchmark  # what the message names
    found = benchmark.find(data, {"questions", "truth", "split"})
    questions = _questions(benchmark, found, any(answer.get("round_id", 0) for answer in answers))
    return found, *_asked(settings, questions, answers, settings.answers)


def _from_model(settings: EvalLlava, benchmark: Benchmark) -> tuple[Found, list[Row], list[Row]]:
    """-> files found, questions, their answers."""
    found = benchmark.find(settings.data, {"questions", "images", "truth", "split"})
    questions = _questions(benchmark, found, settings.all_rounds)
    repeat_images(questions, found["questions"])
    remove_leftovers(settings.folder)
    _same_settings(settings)
    asked = questions[: settings.limit]
    images = found.get("images", found["questions"].parent)
    run = Run(settings, benchmark, questions, found["questions"], images, _gpus(settings.num_gpus))
    if not run.asks_table:
        if any("image_data" in question for question in asked):
            run.images = settings.folder / "images"
            extract_images(asked, run.images)
        check_images(asked, run.images)
    return found, *_asked(settings, questions, answer_all(run), run.answers_file)


def _asked(
    settings: EvalLlava, questions: Sequence[Row], answers: Sequence[Row], source: Path
) -> tuple[list[Row], list[Row]]:
    """The questions up to the limit, and their answers."""
    asked = list(questions[: settings.limit])
    return asked, complete(asked, match(questions, answers, source)[: settings.limit], source)


def _gpus(number: int | None) -> tuple[str, ...]:
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    number = number or max(1, len(visible))
    if number == 1:
        return ("",)
    if visible and len(visible) < number:
        raise EvalError(f"--num-gpus {number}, but CUDA_VISIBLE_DEVICES names {len(visible)}: {','.join(visible)}.")
    return tuple(visible[:number] or map(str, range(number)))


def _same_settings(settings: EvalLlava) -> None:
    """Keep what decides the answers beside them; refuse to go on with answers of another model or other settings."""
    names = ("benchmark", "model_path", "model_base", "conv_mode", "all_rounds")
    now: dict[str, Any] = {name: getattr(settings, name) for name in names}
    # a model trained on under the same name is another model
    weights = [
        file for kind in ("*.safetensors", "*.bin", "config.json") for file in Path(now["model_path"]).glob(kind)
    ]
    now["weights"] = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(weights)]
    file = settings.folder / "settings.json"
    before = read_json(file) if file.is_file() else now
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise EvalError(
            f"{settings.folder} holds answers made with another {', '.join(changed)}. Choose another --output-dir, or "
            "delete that folder to ask again."
        )
    write_json(file, now)


def finish(
    settings: EvalLlava, benchmark: Benchmark, found: Found, questions: Sequence[Row], answers: Sequence[Row]
) -> dict[str, Any]:
    """Score, convert and -> the content of results.json (but for the seconds)."""
    pairs = zip(questions, answers, strict=True)
    rows = [{**question, "said": answer["text"]} for question, answer in pairs]
    metrics: Metrics = {}
    if found and benchmark.truth:
        benchmark.truth(found["truth"], rows)
    if found and benchmark.score:
        metrics = benchmark.score(rows)  # before anything is written
    model = settings.model_path or answers[0].get("model_id") or settings.answers.stem
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
    results: dict[str, Any] = {
        "benchmark": settings.benchmark,
        "n": len(answers),
        "limited": settings.limit is not None,
        "headline": benchmark.headline,
        "metrics": metrics,
        "model": model,
        "settings": shown,
        "paper": dict(zip(PAPER_MODELS, benchmark.paper, strict=True)) if benchmark.paper else None,
    }
    if benchmark.upload:
        name = benchmark.upload.format(model=Path(str(model).rstrip("/")).name)
        upload = settings.folder / "upload" / name
        benchmark.convert(upload, rows, found)
        results |= {"upload": str(upload), "next_step": benchmark.next_step.format(upload=upload)}
    return results


def show(benchmark: Benchmark, results: dict[str, Any], file: Path) -> None:
    """Print the metrics, the paper's figure beside the headline, and what is left to do."""
    console = Console(markup=False, highlight=False, soft_wrap=True)
    metrics, paper = results["metrics"], results["paper"] or {}
    subset = ", only the first: --limit" if results["limited"] else ""
    title = f"{benchmark.title}: {results['model']} ({results['n']:,} answers{subset})"
    console.print(replace_surrogates(title))
    if results["settings"]["conv_mode"] not in (None, VICUNA):
        console.print(f"asked with the conversation template {results['settings']['conv_mode']}")
    if metrics:
        table = Table("", *(Column(name, justify="right") for name in ("here", *paper)), box=box.SIMPLE)
        for name, value in _flat(metrics):
            figures = [f"{value:.1f}" for value in paper.values()] if name == results["headline"] else []
            table.add_row(
                name.replace("_", " "), f"{value:,.1f}" if isinstance(value, float) else f"{value:,}", *figures
            )
        console.print(table, soft_wrap=False)
    elif benchmark.score is None:
        console.print("This benchmark is not scored here.")
    else:
        console.print("Not scored: the right answers are not here (give --data, with a split that has them).")
    if paper and not metrics:
        console.print(f"The paper's figures: {', '.join(f'{name} {value}' for name, value in paper.items())}")
    for text in (benchmark.note, results.get("next_step"), f"written to {file}"):
        if text:
            console.print(replace_surrogates(text))


def _flat(metrics: Metrics, prefix: str = "") -> list[tuple[str, float]]:
    """Nested metrics as (name, value) lines: "by_category" {"popular": {"f1": ..}} gives "popular f1"."""
    lines = []
    for name, value in metrics.items():
        if isinstance(value, dict):
            inner = {"by_category": "", "circular_by_category": "circular "}.get(name, f"{name} ")
            lines += _flat(value, prefix + inner)
        else:
            lines.append((prefix + name, value))
    return lines


if __name__ == "__main__":
    sys.exit(main())
