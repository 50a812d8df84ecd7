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
    """What the step makes; removed before it is tried again, and whole when `work/FOLDER.done.json` is there."""
    command: list[str]
    seconds: float
    """Roughly what it takes on two cores, of which this tower has one. For the estimate of the time left."""


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
    own = [*run, "train_llava.quickstart.child"]
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
