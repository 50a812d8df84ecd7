"""Stage 1 on real data in LLaVA's own format: web pictures and captions, unchanged, some pictures cut short."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from tiny.llavas import make_language_model, make_towers, upstream_is_installed

REPOSITORY = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not upstream_is_installed(), reason="upstream LLaVA (llava-torch) is not installed")


def stage1(folder: Path, data: Path, images: Path, **changed: object) -> subprocess.CompletedProcess:
    flags = {
        "model_name_or_path": folder / "llama", "version": "plain", "data_path": data, "image_folder": images,
        "vision_tower": folder / "clip-moe", "mm_projector_type": "mlp2x_gelu", "tune_mm_mlp_adapter": True,
        "mm_vision_select_layer": -2, "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "bf16": True,
        "use_cpu": True, "output_dir": folder / "llava-out", "max_steps": 40, "per_device_train_batch_size": 16,
        "evaluation_strategy": "no", "save_strategy": "no", "learning_rate": 2e-3, "weight_decay": 0.0,
        "warmup_ratio": 0.03, "lr_scheduler_type": "cosine", "logging_steps": 5, "model_max_length": 512,
        "lazy_preprocess": True, "report_to": "none", **changed,
    }  # fmt: skip
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "llava_clipmoe.run", "llava.train.train", *words]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture
def pictures(shared_data, tmp_path) -> tuple[Path, Path]:
    """-> (the JSON as it is, a folder of links to its pictures)."""
    source = shared_data / "llava_pretrain"
    data = source / "blip_laion_cc_sbu_2k.json"
    for row in json.loads(data.read_text()):
        link = tmp_path / "images" / row["image"]
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(source / "images" / row["image"])
    return data, tmp_path / "images"


def test_stage_1_learns_on_real_data_and_skips_broken_pictures(pictures, tmp_path):
    data, images = pictures
    rows = json.loads(data.read_text())
    for row in rows[::150]:  # 15 of 2,183, less than the 1% that stop a run; 40 steps see 29% of the rows
        picture = images / row["image"]
        content = picture.read_bytes()[:400]
        picture.unlink()
        picture.write_bytes(content)
    make_language_model(tmp_path / "llama")
    make_towers(tmp_path)
    done = stage1(tmp_path, data, images)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cannot be read" in done.stderr and "skipped row" in done.stderr
    history = json.loads((tmp_path / "llava-out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    # One logged loss is the mean of five small batches: it swings by 0.05, and its last digit by the processor.
    assert len(losses) == 8 and statistics.mean(losses[4:]) < losses[0] - 0.1, losses
    assert (tmp_path / "llava-out" / "mm_projector.bin").exists()


def test_too_many_broken_pictures_stop_the_run(pictures, tmp_path):
    data, images = pictures
    for row in json.loads(data.read_text()):
        (images / row["image"]).unlink(missing_ok=True)
        (images / row["image"]).write_bytes(b"no picture")
    make_language_model(tmp_path / "llama")
    make_towers(tmp_path)
    done = stage1(tmp_path, data, images)
    assert done.returncode == 2
    assert "error: 22 pictures cannot be read, more than 1% of the data" in done.stderr
    assert not (tmp_path / "llava-out" / "mm_projector.bin").exists()
