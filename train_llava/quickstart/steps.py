"""The steps that make one small LLaVA: settings, and the command of every step (a process of its own).

Four steps train it: a start for the projector (projector.py), upstream's stage 1 (projector, captions), upstream's
stage 2 (LoRA, conversations), and a merge into an ordinary LLaVA directory. A last one asks it the held-out questions.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOWERS = {"base": "base", "clipmoe": "clip-moe"}
"""Name in the results -> folder of the encoder run. The results are `llava-v1-smollm2-NAME`: upstream picks the class
by "llava" in the name and the conversation template by "v1"."""
ACCUMULATED = 2
"""A batch is done in halves, so that both towers fit beside each other into 12 GB."""


@dataclass(frozen=True)
class Settings:
    encoder_run: Path = Path("runs/quickstart")
    """Run of the encoder (`make quickstart`): its base/ and clip-moe/ are the two towers."""
    output_dir: Path = Path("runs/llava-quickstart")
    """Everything is written there; the two models are its llava-v1-smollm2-* folders."""
    seed: int = 0
    """Of the conversations, the projector's start and upstream's trainer."""
    warm_steps: int = 300
    """Steps of the projector's start, without the language model."""
    stage1_steps: int = 4
    """Optimiser steps of stage 1: the projector learns from captions."""
    stage1_learning_rate: float = 2e-4
    """The projector's highest learning rate in stage 1."""
    stage2_steps: int = 20
    """Optimiser steps of stage 2: projector and LoRA learn from conversations."""
    stage2_learning_rate: float = 1e-3
    """The LoRA's highest learning rate in stage 2."""
    projector_learning_rate: float = 3e-4
    """The projector's highest learning rate in stage 2."""
    lora_rank: int = 16
    """Rank of the LoRA on the language model; its alpha is twice as large."""
    batch_size: int = 8
    """Pictures per optimiser step in both stages; half of them are in memory at once."""


@dataclass(frozen=True)
class Step:
    name: str
    folder: Path
    """What the step makes; removed before it is tried again, and whole when `work/FOLDER.done.json` is there."""
    command: list[str]
    seconds: float
    """Roughly what it takes on two cores, of which this tower has one. For the estimate of the time left."""


def job_of(s: Settings, name: str) -> dict[str, Any]:
    """What one tower's steps need to know; all paths absolute, as upstream writes the tower's into the model."""
    out = s.output_dir.resolve()
    work = out / "work" / name
    return {
        "name": name,
        "seed": s.seed,
        "warm_steps": s.warm_steps,
        "tower": str(s.encoder_run.resolve() / TOWERS[name]),
        "language_model": str(out / "smollm2"),
        "data": str(out / "data"),
        "work": str(work),
        "warm_start": str(work / "warm-start"),
        "stage1": str(work / "stage1"),
        "stage2": str(work / "stage2-lora"),
        "answers": str(work / "answers"),
        "result": str(out / f"llava-v1-smollm2-{name}"),
    }


def steps_of(s: Settings, job: Mapping[str, Any]) -> list[Step]:
    """The steps of one tower in order."""
    run = [sys.executable, "-m", "llava_clipmoe.run"]
    child, file = [*run, "train_llava.quickstart.child"], str(Path(job["work"]) / "job.json")
    stage1 = {
        "version": "plain",
        "data_path": f"{job['data']}/stage1.json",
        "output_dir": job["stage1"],
        "pretrain_mm_mlp_adapter": f"{job['warm_start']}/mm_projector.bin",
        "tune_mm_mlp_adapter": True,
        **_schedule(s.stage1_steps, s.stage1_learning_rate),
    }
    stage2 = {
        "version": "v1",
        "data_path": f"{job['data']}/stage2.json",
        "output_dir": job["stage2"],
        "pretrain_mm_mlp_adapter": f"{job['stage1']}/mm_projector.bin",
        "mm_projector_lr": s.projector_learning_rate,
        **{"lora_enable": True, "lora_r": s.lora_rank, "lora_alpha": 2 * s.lora_rank, "lora_dropout": 0},
        **_schedule(s.stage2_steps, s.stage2_learning_rate),
    }
    train = [*run, "llava.train.train"]
    size = s.batch_size / 8
    return [
        Step("start of the projector", Path(job["warm_start"]), [*child, "warm-start", file], 15 + 0.04 * s.warm_steps),
        Step("stage 1", Path(job["stage1"]), [*train, *_flags(s, job, stage1)], 15 + 1 * size * s.stage1_steps),
        Step("stage 2", Path(job["stage2"]), [*train, *_flags(s, job, stage2)], 15 + 11.6 * size * s.stage2_steps),
        Step("merge", Path(job["result"]), [*child, "merge", file], 16),
        Step("questions", Path(job["answers"]), [*child, "answer", file], 250),
    ]


def _schedule(steps: int, rate: float) -> dict[str, Any]:
    return {"max_steps": steps, "learning_rate": rate, "warmup_steps": max(1, round(0.03 * steps))}


def _flags(s: Settings, job: Mapping[str, Any], stage: Mapping[str, Any]) -> list[str]:
    """LLaVA-1.5's flags that both stages share, then the stage's own, for the CPU. float32: without AMX, bfloat16 is
    half as fast there."""
    shared = {
        "model_name_or_path": job["language_model"],
        "vision_tower": job["tower"],
        "image_folder": "/",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": "pad",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "model_max_length": 2048,
        "per_device_train_batch_size": s.batch_size // ACCUMULATED,
        "gradient_accumulation_steps": ACCUMULATED,
        "weight_decay": 0.0,
        "lr_scheduler_type": "cosine",
        "seed": s.seed,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "lazy_preprocess": True,
        "dataloader_num_workers": 0,
    }
    return [word for flag, value in {**shared, **stage}.items() for word in (f"--{flag}", str(value))]
