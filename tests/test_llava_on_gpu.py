"""Upstream's LLaVA on a GPU: stage 2 in bf16 as its scripts train, then loaded in fp16, with the kernels and without.
With a tower that learns, with tiles, and before newer language models.

Skipped without a GPU. What each kernel computes is tested elsewhere (kernel_tests.py); here LLaVA itself must reach
them, in training and in answering, and get what the modules give.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from tiny.language_models import make_llama_3, make_qwen_2, make_qwen_3
from tiny.llavas import COLOURS, upstream_is_installed
from tiny.tower_tasks import LORA, PARTS, arguments, expected_names, link_material, make_material, name_of, train

pytestmark = [
    pytest.mark.skipif(not upstream_is_installed(), reason="upstream LLaVA (llava-torch) is not installed here"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton here"),
    pytest.mark.xdist_group("llava_on_gpu"),
]
TILES = str(REPOSITORY / "tests" / "tiny" / "tile_trainings.py")
KINDS = [(None, False), *((what, False) for what in PARTS), (None, True), ("routers", True)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict[str, dict], str]:
    """The material, what was seen of every kind of stage 2, and what the process said on stderr."""
    material = make_material(tmp_path_factory.mktemp("material"))
    folder, tasks = link_material(material, tmp_path_factory.mktemp("trained")), []
    for what, lora in KINDS:
        name = name_of(what, lora)
        words = arguments(folder, name, what, bf16=True, use_cpu=False, **(LORA if lora else {}))
        base = str(folder / "llama") if lora else None
        tasks.append({"name": name, "base": base, "output": str(folder / name), "arguments": words, "device": "cuda"})
    seen = train([sys.executable], material, tasks, folder, CUDA_VISIBLE_DEVICES="0")
    return material, seen, (folder / "stderr.txt").read_text()


@pytest.mark.parametrize(("what", "lora"), KINDS)
def test_what_should_learn_does(trained, what, lora):
    material, seen = trained[0], trained[1][name_of(what, lora)]
    assert set(seen["moved_in_tower"]) == set(seen["learning_in_tower"])
    assert bool(expected_names(what, material)) == bool(seen["moved_in_tower"])
    assert seen["projector_moved"] and seen["language_model_moved"]


@pytest.mark.parametrize(("what", "lora"), KINDS)
def test_the_balance_loss_is_the_routers_alone(trained, what, lora):
    seen = trained[1][name_of(what, lora)]
    assert seen["balance_added"] == pytest.approx(seen["balance_expected"], rel=0.05, abs=0.005)
    assert (seen["balance_expected"] > 0.01) == (what == "routers")


@pytest.mark.parametrize(("what", "lora"), KINDS)
def test_what_is_loaded_is_what_was_trained(trained, what, lora):
    """fp16 against bf16, with the kernels; and without them nearly the same."""
    seen = trained[1][name_of(what, lora)]
    assert seen["off"] < 0.1 * seen["size"], seen
    assert 0 < seen["off_without_kernels"] < 0.02 * seen["size"], seen  # 0: they were not used


def test_the_kernels_served_all_of_it(trained):
    """But for the tower whose attention learns, when it is asked in the trainer's hands."""
    said = {line for line in trained[2].splitlines() if "are not used" in line}
    assert all("self_attn.q_proj is a ParametrizedLinear" in line for line in said), said


NEWER = {"llama_3": make_llama_3, "qwen_2": make_qwen_2, "qwen_3": make_qwen_3}


@pytest.fixture(scope="module")
def newer(trained, tmp_path_factory) -> dict[str, dict]:
    """What was seen of newer language models that learn four colours through a frozen tower."""
    material, folder, tasks = trained[0], tmp_path_factory.mktemp("newer"), []
    for name, make in NEWER.items():
        make(folder / name)
        changed = {"model_name_or_path": folder / name, "version": "llama_3" if name == "llama_3" else "qwen_2"}
        words = arguments(material, "", None, use_cpu=False, **changed, **LEARN)  # in bf16 steps would be rounded away
        words[words.index("--output_dir") + 1] = str(folder / f"llava-{name}")
        tasks.append({"name": name, "base": None, "output": str(folder / f"llava-{name}"), "arguments": words,
                      "device": "cuda", "ask": str(material / "data" / "data.json")})  # fmt: skip
    return train([sys.executable], material, tasks, folder, CUDA_VISIBLE_DEVICES="0")


LEARN = {"num_train_epochs": 60, "learning_rate": 4e-3, "save_steps": 1000}


@pytest.mark.parametrize("name", NEWER)
def test_a_newer_language_model_learns_to_answer(newer, name):
    seen = newer[name]
    assert seen["answers"] == [f"It is {colour}." for colour in COLOURS] and len(seen["answer_ids"]) < 24
    assert seen["off"] < 0.1 * seen["size"] and 0 < seen["off_without_kernels"] < 0.05 * seen["size"], seen


def test_tiles_go_through_the_kernels_too(trained, tmp_path):
    material, folder = trained[0], link_material(trained[0], tmp_path)
    words = arguments(folder, "llava-tiles", "routers", bf16=True, use_cpu=False, image_aspect_ratio="anyres")
    words += ["--mm_patch_merge_type", "spatial_unpad"]
    task = {"name": "tiles", "base": None, "output": str(folder / "llava-tiles"), "arguments": words, "device": "cuda"}
    seen = train([sys.executable], material, [task], folder, TILES, CUDA_VISIBLE_DEVICES="0")["tiles"]
    assert any(".mlp.router." in name for name in seen["moved"]) and any("newline" in name for name in seen["moved"])
    assert seen["off"] < 0.1 * seen["size"] and 0 < seen["off_without_kernels"] < 0.05 * seen["size"], seen
    assert "are not used" not in (folder / "stderr.txt").read_text()
