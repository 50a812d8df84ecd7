"""Stage 2 of upstream LLaVA with a tower that learns, in small: arguments, data, and the processes that run it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from conftest import REPOSITORY

from llava_clipmoe.files import load_tensors
from llava_clipmoe.tower_tuning import MARK
from tiny.llavas import make_data, make_language_model, make_towers

PROGRAM = str(REPOSITORY / "tests" / "tiny" / "tower_trainings.py")
RATE, OWN_RATE = 2e-3, 5e-3
LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0}
PARTS = {"routers": ".mlp.router.", "experts": ".mlp.experts.", "lora": ".self_attn."}
KINDS = [(what, lora) for lora in (False, True) for what in (None, *PARTS)]


def name_of(what: str | None, lora: bool) -> str:
    return f"llava-{what or 'frozen'}{'-lora' if lora else ''}"


def arguments(folder: Path, output: str, what: str | None, **changed: object) -> list[str]:
    """Of `llava.train.train`, stage 2 in fp32."""
    given = {
        "model_name_or_path": folder / "llama", "version": "v1", "vision_tower": "clipmoe-336",
        "data_path": folder / "data" / "data.json", "image_folder": folder / "data" / "images",
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False, "bf16": False, "use_cpu": True, "output_dir": folder / output,
        "num_train_epochs": 1, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2,
        "learning_rate": RATE, "lr_scheduler_type": "constant", "logging_steps": 1, "model_max_length": 256,
        "gradient_checkpointing": True, "dataloader_num_workers": 0, "lazy_preprocess": True, "report_to": "none",
        "image_aspect_ratio": "pad", **changed,
    }  # fmt: skip
    if what is not None:
        given |= {MARK: what, "mm_vision_tower_lr": OWN_RATE, "mm_vision_tower_lora_r": 4}
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


def make_material(folder: Path) -> Path:
    """`llama`, `clip-moe`, `clip`, `data/data.json` (its last row has no picture), `data/images`."""
    make_language_model(folder / "llama")
    make_towers(folder)
    file = make_data(folder / "data")
    rows = json.loads(file.read_text())
    rows[-1] = {"id": "text", "conversations": [{"from": f, "value": "What colour?"} for f in ("human", "gpt")]}
    file.write_text(json.dumps(rows))
    return folder


def link_material(material: Path, folder: Path) -> Path:
    for name in ("llama", "data", "clip-moe"):
        (folder / name).symlink_to(material / name)
    return folder


def environment(folder: Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST_", "LLAVA_CLIPMOE"))}
    return {
        **kept, "LLAVA_CLIPMOE_TOWERS": f"clipmoe-336={folder / 'clip-moe'}", "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", "WANDB_DISABLED": "true",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]), **more,
    }  # fmt: skip


def train(
    command: list[str], material: Path, tasks: list[dict], folder: Path, program: str = PROGRAM, **more: str
) -> dict[str, dict]:
    """Every task in one process (or several) that `command`, an interpreter, starts; -> what was seen, by its name.
    What it said is in `folder`/stderr.txt."""
    (folder / "tasks.json").write_text(json.dumps(tasks))
    done = subprocess.run(
        [*command, program, str(folder / "tasks.json")],
        cwd=folder, env=environment(material, **more), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    (folder / "stderr.txt").write_text(done.stderr)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]
    seen = json.loads((folder / "seen.json").read_text())
    return {task["name"]: found for task, found in zip(tasks, seen, strict=True)}


def expected_names(what: str | None, material: Path) -> set[str]:
    """Tensors of the tower's directory that training `what` changes; block 2 of three is not loaded (layer -2)."""
    names = load_tensors(material / "clip-moe")
    blocks = tuple(f"vision_model.encoder.layers.{block}." for block in (0, 1))
    found = {name for name in names if what and name.startswith(blocks) and PARTS[what] in name}
    return {name for name in found if what != "lora" or name.endswith("_proj.weight")}
