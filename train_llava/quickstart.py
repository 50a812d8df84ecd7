"""The command `llava-clipmoe llava-quickstart`: two small real LLaVAs on the CPU, one for each eye, and their scores.

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
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from llava_clipmoe.files import read_json, remove_leftovers, write_json

from .conversations import ANSWERS, build_conversations, read_rows
from .language_model import find_gguf, make_language_model

TOWERS = {"base": "base", "clipmoe": "clip-moe"}
"""Name in the results -> folder of the encoder run. The results are `llava-v1-smollm2-NAME`: upstream picks the class
by "llava" in the name and the conversation template by "v1"."""
BLIND = "blind"
ACCUMULATED = 2
"""A batch is done in halves, so that both towers fit beside each other into 12 GB."""


@dataclass(frozen=True)
class Settings:
    encoder_run: Path = Path("runs/quickstart")
    """Run of the encoder (`make quickstart`): its base/ and clip-moe/ are the two towers."""
    output_dir: Path = Path("runs/llava-quickstart")
    """Everything is written there; the two models are its llava-v1-smollm2-* folders."""
    seed: int = 0
    warm_steps: int = 800
    """Steps of the projector's start, without the language model."""
    stage1_steps: int = 16
    stage1_learning_rate: float = 2e-4
    stage2_steps: int = 60
    stage2_learning_rate: float = 1e-3
    projector_learning_rate: float = 3e-4
    """The projector's in stage 2."""
    lora_rank: int = 16
    batch_size: int = 8


@dataclass(frozen=True)
class Step:
    name: str
    folder: Path
    """Holds `done.json` when the step is finished; removed before it is tried again."""
    command: list[str]
    seconds: float
    """About what it takes on two cores, of which this tower has one: for the time that is left."""


# ----------------------------------------------------------------------------------------------------- the steps


def job_of(s: Settings, name: str) -> dict[str, Any]:
    """What one tower's steps need to know; all paths absolute, as upstream writes the tower's into the model."""
    out = s.output_dir.resolve()
    work = out / "work" / name
    return {
        "name": name, "tower": str(s.encoder_run.resolve() / TOWERS[name]), "seed": s.seed, "warm_steps": s.warm_steps,
        "language_model": str(out / "smollm2"), "data": str(out / "data"), "work": str(work),
        "warm_start": str(work / "warm-start"), "stage1": str(work / "stage1"), "stage2": str(work / "stage2-lora"),
        "answers": str(work / "answers"), "result": str(out / f"llava-v1-smollm2-{name}"), "card": _card(name),
    }  # fmt: skip


def steps_of(s: Settings, job: Mapping[str, Any]) -> list[Step]:
    """The steps of one tower in order."""
    run = [sys.executable, "-m", "llava_clipmoe.run"]
    own = [*run, "train_llava.quickstart_steps"]
    file = str(Path(job["work"]) / "job.json")
    stage1 = _flags(s, job, version="plain", data="stage1.json", steps=s.stage1_steps, rate=s.stage1_learning_rate)
    stage1 += ["--tune_mm_mlp_adapter", "True", "--output_dir", job["stage1"]]
    stage1 += ["--pretrain_mm_mlp_adapter", f"{job['warm_start']}/mm_projector.bin"]
    stage2 = _flags(s, job, version="v1", data="stage2.json", steps=s.stage2_steps, rate=s.stage2_learning_rate)
    stage2 += ["--lora_enable", "True", "--lora_r", str(s.lora_rank), "--lora_alpha", str(2 * s.lora_rank)]
    stage2 += ["--lora_dropout", "0", "--mm_projector_lr", str(s.projector_learning_rate)]
    stage2 += ["--pretrain_mm_mlp_adapter", f"{job['stage1']}/mm_projector.bin", "--output_dir", job["stage2"]]
    sample = s.batch_size / 8
    return [
        Step("start of the projector", Path(job["warm_start"]), [*own, "warm-start", file], 15 + 0.13 * s.warm_steps),
        Step("stage 1", Path(job["stage1"]), [*run, "llava.train.train", *stage1], 20 + 6.5 * sample * s.stage1_steps),
        Step("stage 2", Path(job["stage2"]), [*run, "llava.train.train", *stage2], 20 + 10.5 * sample * s.stage2_steps),
        Step("merge", Path(job["result"]), [*own, "merge", file], 16),
        Step("questions", Path(job["answers"]), [*own, "answer", file], 270),
    ]


def _flags(s: Settings, job: Mapping[str, Any], *, version: str, data: str, steps: int, rate: float) -> list[str]:
    """LLaVA-1.5's flags that both stages share, for the CPU. float32: without AMX, bfloat16 is half as fast there."""
    flags = {
        "model_name_or_path": job["language_model"], "version": version, "data_path": f"{job['data']}/{data}",
        "image_folder": "/", "vision_tower": job["tower"], "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2, "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad", "max_steps": steps, "per_device_train_batch_size": s.batch_size // ACCUMULATED,
        "gradient_accumulation_steps": ACCUMULATED,
        "learning_rate": rate, "weight_decay": 0.0, "warmup_steps": max(1, round(0.03 * steps)),
        "lr_scheduler_type": "cosine", "logging_steps": 1, "save_strategy": "no", "model_max_length": 2048,
        "lazy_preprocess": True, "dataloader_num_workers": 0, "report_to": "none", "seed": s.seed, "use_cpu": True,
    }  # fmt: skip
    return [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]


def _card(name: str) -> str:
    eye = "a CLIP-MoE" if name == "clipmoe" else "the dense CLIP that the CLIP-MoE was made from"
    return (
        f"# llava-v1-smollm2-{name}\n\nA toy LLaVA for the CPU: SmolLM2-135M-Instruct (Apache-2.0) that looks through "
        f"{eye}, trained by `llava-clipmoe llava-quickstart` on questions about OpenMoji drawings (CC BY-SA 4.0). It "
        "knows the colour, shape, size, kind, skin tone and direction of a drawing, and little else.\n"
    )


# ------------------------------------------------------------------------------------------------------ running


class TowerRun:
    """Runs one tower's steps, one child process after the other, and tells how far it is."""

    def __init__(self, job: Mapping[str, Any], steps: Sequence[Step], threads: int):
        self.job, self.steps, self.threads = job, steps, threads
        self.now, self.log, self.stopped = "", Path(), False
        self.finished = 0.0
        self.seconds: dict[str, float] = {}
        self._child: subprocess.Popen | None = None

    @property
    def total(self) -> float:
        return sum(step.seconds for step in self.steps)

    def run(self) -> None:
        """All steps that are not done, until `stop`. Raises ChildProcessError with the end of the log if one fails."""
        work = Path(self.job["work"])
        work.mkdir(parents=True, exist_ok=True)
        remove_leftovers(work)
        write_json(work / "job.json", dict(self.job))
        for step in self.steps:
            marker = work / f"{step.folder.name}.done.json"
            if not (marker.exists() and step.folder.is_dir()):
                self._one(step, work / f"{step.folder.name}.log", marker)
            if self.stopped:
                return
            self.seconds[step.name] = read_json(marker)["seconds"]
            self.finished += step.seconds

    def _one(self, step: Step, log: Path, marker: Path) -> None:
        # A step begins anew: upstream's own LoRA checkpoints lack the projector, which stage 2 trains too.
        shutil.rmtree(step.folder, ignore_errors=True)
        self.now, self.log, start = step.name, log, time.monotonic()
        with log.open("wb") as out:
            self._child = subprocess.Popen(
                step.command, stdout=out, stderr=subprocess.STDOUT, env=_environment(self.threads)
            )
            if self.stopped:
                self.stop()
            code = self._child.wait()
        if self.stopped:
            return
        if code != 0:
            tail = "\n".join(log.read_text(errors="replace").replace("\r", "\n").splitlines()[-15:])
            raise ChildProcessError(
                f"{self.job['name']}: the step {step.name!r} failed (exit status {code}). The end of {log}:\n{tail}\n"
                "Mend the cause and run the same command again: the steps before are kept."
            )
        write_json(marker, {"seconds": round(time.monotonic() - start, 1)})

    def stop(self) -> None:
        """End the child process, if there is one; no other is started."""
        self.stopped = True
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()

    def progress(self) -> float:
        """Seconds' worth of work done, by the last "done/total [" that the present step printed."""
        running = next((step for step in self.steps if step.name == self.now), None)
        if running is None or not self.log.is_file() or self.now in self.seconds:
            return self.finished
        return self.finished + running.seconds * last_fraction(self.log)


def last_fraction(log: Path) -> float:
    """How far a step is, 0 to 1, by the end of its log; a bar of tqdm counts as our own lines do."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        found = re.findall(r"(\d+)/(\d+) \[", file.read().decode(errors="replace"))
    done, total = map(int, found[-1]) if found else (0, 1)
    return min(1.0, done / max(1, total))


def _environment(threads: int) -> dict[str, str]:
    """A child's: its share of the cores, no hub, and freed memory kept by glibc (train_encoder/training/memory.py)."""
    package = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    glibc = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_ARENA_MAX": "1"}
    return {**os.environ, **glibc, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip


def run_all(runs: Sequence[TowerRun], console: Console) -> None:
    """Both towers side by side (two processes of one thread do more than one of two), with a bar each."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, speed_estimate_period=300) as bars, ThreadPoolExecutor(len(runs)) as pool:
        tasks = [bars.add_task(run.job["name"], total=run.total) for run in runs]
        futures = [pool.submit(run.run) for run in runs]
        said = [""] * len(runs)
        try:
            while not all(future.done() for future in futures):
                for i, (run, task) in enumerate(zip(runs, tasks, strict=True)):
                    bars.update(task, description=f"{run.job['name']}: {run.now}", completed=run.progress())
                    if run.now != said[i]:  # in a log without a terminal the bars do not show
                        bars.print(f"{run.job['name']}: {run.now} (log: {run.log})")
                        said[i] = run.now
                if any(future.done() and future.exception() for future in futures):
                    break
                time.sleep(0.5)
            for run, task in zip(runs, tasks, strict=True):
                bars.update(task, completed=run.progress())
        finally:
            failed = not all(f.done() and not f.exception() for f in futures)
            for run in runs if failed else ():
                run.stop()
    for future in futures:
        if future.done() and (error := future.exception()) and not isinstance(error, KeyboardInterrupt):
            raise error


# ------------------------------------------------------------------------------------------------------ scoring


def says(text: str, answer: str) -> bool:
    """Whether a generated text is the answer, but for case and a full stop."""
    return text.strip().rstrip(".").lower() == answer.lower()


def says_rather(text: str, answer: str, other: str) -> bool:
    """Whether a text names more of the words that only `answer` has than of those that only `other` has.

    For the pairs, whose answers are sentences: "red" is a right answer to "Is it a red circle or a blue circle?".
    """
    said, right, wrong = (set(re.findall(r"[\w*#'-]+", part.lower())) for part in (text, answer, other))
    return len(said & (right - wrong)) > len(said & (wrong - right))


def accuracy(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By attribute, and "overall": all questions alike."""
    right: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        right[row["attribute"]].append(says(row["text"], row["answer"]))
    scores = {attribute: sum(r) / len(r) for attribute, r in right.items()}
    return {**scores, "overall": sum(map(sum, right.values())) / sum(map(len, right.values()))}


def pair_accuracy(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """MMVP's: a pair counts when both of its pictures are answered right; of single pictures; of pairs with a
    held-out picture; and pairs by type."""
    pairs: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        pairs[row["pair"]].append(row)
    right = {n: [says_rather(r["text"], r["answer"], r["other"]) for r in both] for n, both in pairs.items()}
    heldout = [number for number, both in pairs.items() if any(r["split"] == "heldout" for r in both)]
    types: dict[str, list[bool]] = defaultdict(list)
    for number, both in pairs.items():
        types[both[0]["type"]].append(all(right[number]))
    return {
        "pairs": _share([all(r) for r in right.values()]),
        "pictures": _share([x for r in right.values() for x in r]),
        "pairs with a held-out picture": _share([all(right[number]) for number in heldout]),
        "by type": {kind: _share(r) for kind, r in types.items()},
        "counts": {"pairs": len(pairs), "pairs with a held-out picture": len(heldout)},
    }


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else float("nan")


def collect(runs: Sequence[TowerRun]) -> dict[str, Any]:
    """What goes into results.json."""
    results: dict[str, Any] = {"heldout": {}, BLIND: {}, "pairs": {}, "seconds": {}}
    for run in runs:
        name, folder = run.job["name"], Path(run.job["answers"])
        heldout = read_rows(folder / "heldout.jsonl")
        results["heldout"][name] = accuracy(heldout)
        results[BLIND][name] = accuracy(read_rows(folder / "blind.jsonl"))
        results["pairs"][name] = pair_accuracy(read_rows(folder / "pairs.jsonl"))
        results["seconds"][name] = run.seconds
    chance = accuracy([{**row, "text": row["answer"]} for row in heldout])  # for its keys
    counts = {attribute: sum(row["attribute"] == attribute for row in heldout) for attribute in ANSWERS}
    chance = {attribute: 1 / len(answers) for attribute, answers in ANSWERS.items() if attribute in chance}
    chance["overall"] = sum(chance[a] * counts[a] for a in chance) / len(heldout)
    return {**results, "chance": {**chance, "pairs": 0.25}, "questions": {**counts, "overall": len(heldout)}}


def table_of(results: Mapping[str, Any]) -> Table:
    """Accuracy by attribute: both towers, each one blind, chance."""
    table = Table(box=box.SIMPLE_HEAD, title="right answers to held-out questions, %")
    for column in ("attribute", *TOWERS, *(f"{name} {BLIND}" for name in TOWERS), "chance", "questions"):
        table.add_column(column, justify="left" if column == "attribute" else "right")
    for attribute in (a for a in results["chance"] if a != "pairs"):
        scores = [results[part][name][attribute] for part in ("heldout", BLIND) for name in TOWERS]
        numbers = [f"{100 * x:.1f}" for x in (*scores, results["chance"][attribute])]
        table.add_row(attribute, *numbers, str(results["questions"][attribute]), end_section=attribute == "direction")
    table.add_section()
    for kind, label in (("pairs", "pairs"), ("pairs with a held-out picture", "held-out pairs")):
        scores = [results["pairs"][name] for name in TOWERS]
        numbers = [f"{100 * score[kind]:.1f}" for score in scores]
        table.add_row(label, *numbers, "0.0", "0.0", "25.0", str(scores[0]["counts"][kind]))
    return table


# ------------------------------------------------------------------------------------------------------ the command


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


def leave_on_sigterm() -> None:
    """Make a plain `kill` end this process as Ctrl-C does, its children with it: they must not write on beside the
    same command started again."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def main(argv: list[str] | None = None) -> int:
    """The whole quick start; -> 0."""
    s = tyro.cli(Settings, args=argv, prog="llava-clipmoe llava-quickstart", description=__doc__)
    console, start = Console(), time.monotonic()
    check(s)
    leave_on_sigterm()
    from train_encoder.openmoji.drawings import build_openmoji

    remove_leftovers(s.output_dir)
    console.print("language model: SmolLM2-135M-Instruct")
    make_language_model(s.output_dir / "smollm2")
    console.print("questions: from OpenMoji's names and pixels")
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
        "same question, so a blind model gets none and a coin a quarter. held-out pairs: with a held-out picture.\n"
        f"{(time.monotonic() - start) / 60:.1f} minutes. Ask them yourself: "
        + " and ".join(job["result"] for job in jobs)
    )
    return 0
