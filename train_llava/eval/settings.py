"""The settings of `llava-clipmoe eval-llava`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from llava_clipmoe.conversations import VICUNA, find_conversation

from .answers import EvalError
from .benchmarks import BENCHMARKS


def template_of(model: str, base: str | None) -> str:
    """Conversation template to ask a model (directory or hub id; base: the language model under a LoRA) with."""
    found = find_conversation(model, base) or VICUNA
    return VICUNA if found == "v1" else found  # upstream's two names of one template


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
    conv_mode: str | None = None
    """Conversation template; when absent, the one that the model's directory says it was trained with."""
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
        """Where everything is written."""
        name = Path(self.model_path.rstrip("/")).name if self.model_path else self.answers.stem
        return self.output_dir or Path("runs/eval-llava") / self.benchmark / name
