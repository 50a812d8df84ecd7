"""The command `llava-clipmoe llava-quickstart`: two small real LLaVAs on the CPU, one for each tower, and their scores.

    llava-clipmoe llava-quickstart --encoder-run runs/quickstart --output-dir runs/llava-quickstart

Language model: SmolLM2-135M-Instruct. Towers: the encoder run's dense base and its CLIP-MoE. Both are trained alike and
side by side, each in four steps: a start for the projector (projector.py), upstream's stage 1 (projector, captions),
upstream's stage 2 (LoRA, conversations), and a merge into an ordinary LLaVA directory. Both then answer held-out
questions and attribute pairs. A finished step is kept: the same command goes on where it was killed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from dataclasses import asdict

import tyro
from rich.console import Console

from llava_clipmoe.files import read_json, remove_leftovers, write_json
from llava_clipmoe.processes import exit_on_sigterm
from train_encoder.openmoji.build import build_openmoji

from .conversations import build_conversations
from .language_model import find_gguf, make_language_model
from .results import collect, table_of
from .run import TowerRun, run_all
from .steps import TOWERS, Settings, job_of, steps_of


def check(s: Settings) -> None:
    """Everything that could be missing, before any work. Raises FileNotFoundError, ModuleNotFoundError, ValueError."""
    for folder in TOWERS.values():
        if not (s.encoder_run / folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{s.encoder_run} is not a finished encoder run (there is no {folder}/ in it). Train one with `make "
                "quickstart`, or point --encoder-run to the --output-dir of `llava-clipmoe train-encoder`."
            )
    if importlib.util.find_spec("llava") is None:
        raise FileNotFoundError(
            "upstream LLaVA is not installed here: pip install --no-deps llava-torch==1.2.2.post1 (and "
            "pip install 'llava-clipmoe[llava]' for what it imports)"
        )
    find_gguf()
    file = s.output_dir / "settings.json"
    known = json.loads(json.dumps(asdict(s), default=lambda path: str(path.resolve())))
    if file.exists() and read_json(file) != known:
        raise ValueError(
            f"{s.output_dir} holds a quick start with other settings. Give another --output-dir, or remove it."
        )
    s.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(file, known)


def main(argv: list[str] | None = None) -> int:
    """The whole quick start; -> 0."""
    s = tyro.cli(Settings, args=argv, prog="llava-clipmoe llava-quickstart", description=__doc__)
    console, start = Console(), time.monotonic()
    check(s)
    with exit_on_sigterm():
        remove_leftovers(s.output_dir)
        console.print("language model: SmolLM2-135M-Instruct")
        make_language_model(s.output_dir / "smollm2")
        console.print("questions: from the scenes")
        build_conversations(s.output_dir / "data", build_openmoji(), seed=s.seed)
        threads = max(1, (os.cpu_count() or 1) // len(TOWERS))
        jobs = [job_of(s, name) for name in TOWERS]
        runs = [TowerRun(job, steps_of(s, job), threads) for job in jobs]
        run_all(runs, console)
    results = collect(runs)
    write_json(s.output_dir / "results.json", results)
    console.print(table_of(results))
    console.print(
        "blind: the same model with a plain grey picture. pairs: attribute pairs, both pictures right; both get the "
        "same question, so a blind model gets none. new nouns: pairs of things that no training showed.\n"
        f"clipmoe against base on the pairs: exact McNemar test, p = {results['mcnemar_p']:.2g}. "
        f"{(time.monotonic() - start) / 60:.1f} minutes. Ask them yourself: "
        + " and ".join(job["result"] for job in jobs)
    )
    return 0
