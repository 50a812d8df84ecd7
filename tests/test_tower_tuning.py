"""A tower that learns in LLaVA's stage 2 (`--mm_tune_vision_tower`), through upstream's own trainer.

What should move moves and nothing else, whole or beside LLaVA's LoRA; what was trained is in the checkpoint, and every
reader gets it. The trainings of one environment share a process (tiny/tower_trainings.py), which says what it saw.
DeepSpeed: test_tower_tuning_deepspeed.py; flags, and the tower alone: test_learning_tower.py.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny.llavas import upstream_is_installed
from tiny.tower_tasks import (
    KINDS,
    LORA,
    OWN_RATE,
    PARTS,
    RATE,
    arguments,
    expected_names,
    link_material,
    make_material,
    name_of,
    train,
)

from llava_clipmoe.export import export_hf
from llava_clipmoe.files import load_tensors
from llava_clipmoe.tower_tuning import MARK, TUNED_FILE
from llava_clipmoe.vision_tower import CLIPMoEVisionTower

PINNED = os.environ.get("LLAVA_CLIPMOE_PINNED_PYTHON")
pytestmark = [
    pytest.mark.skipif(not upstream_is_installed(), reason="upstream LLaVA (llava-torch) is not installed here"),
    pytest.mark.xdist_group("tower_tuning"),
]


# ------------------------------------------------------------------------------------------------------- the trainings


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    return make_material(tmp_path_factory.mktemp("tuning"))


@pytest.fixture(
    scope="module",
    params=[
        "current",
        pytest.param("pinned", marks=pytest.mark.skipif(not PINNED, reason="LLAVA_CLIPMOE_PINNED_PYTHON is not set")),
    ],
)
def trained(request, material, tmp_path_factory) -> tuple[Path, dict[str, dict], str]:
    """Every kind of stage 2: the folder of their outputs, what was seen of each, and the interpreter."""
    folder = link_material(material, tmp_path_factory.mktemp(request.param))
    tasks = []
    for what, lora in KINDS:
        name = name_of(what, lora)
        tasks.append({"name": name, "base": str(folder / "llama") if lora else None, "output": str(folder / name)})
        tasks[-1]["arguments"] = arguments(folder, name, what, **(LORA if lora else {}))
    for what in PARTS:
        name = f"llava-{what}-bf16"
        words = arguments(folder, name, what, bf16=True)
        tasks.append({"name": name, "base": None, "output": str(folder / name), "arguments": words})
    python = {"current": sys.executable, "pinned": PINNED}[request.param]
    return folder, train([python], material, tasks, folder), python


@pytest.mark.parametrize(("what", "lora"), KINDS)
def test_what_should_move_moves_and_nothing_else(trained, material, what, lora):
    folder, seen = trained[0], trained[1][name_of(what, lora)]
    assert set(seen["moved_in_tower"]) == set(seen["learning_in_tower"])
    original = {name.partition(".parametrizations.")[0] for name in seen["moved_in_tower"]}
    names = expected_names(what, material)
    assert original == ({name.removesuffix(".weight") for name in names} if what == "lora" else names)
    assert bool(names) == bool(what) and seen["projector_moved"] and seen["language_model_moved"]
    assert seen["checkpointed"] == bool(what)
    assert seen["peft_in_tower"] == []  # LLaVA's own LoRA does not reach it
    assert (folder / name_of(what, lora) / TUNED_FILE).is_file() == bool(what)


@pytest.mark.parametrize(("what", "lora"), KINDS)
def test_the_tower_has_a_learning_rate_of_its_own(trained, what, lora):
    seen = trained[1][name_of(what, lora)]
    assert seen["rates_in_tower"] == ([OWN_RATE] if what else [])
    assert seen["rates_elsewhere"] == [RATE]
    assert seen["twice_in_optimizer"] == [] and seen["not_in_optimizer"] == []


@pytest.mark.parametrize(("what", "lora"), KINDS)
def test_the_balance_loss_is_the_routers_alone(trained, what, lora):
    """As the model says itself, on the rows with a picture; 0.01 is the paper's alpha."""
    folder, seen = trained[0], trained[1][name_of(what, lora)]
    assert seen["balance_added"] == pytest.approx(seen["balance_expected"], rel=1e-4, abs=1e-6)
    assert (seen["balance_expected"] > 0.01) == (what == "routers")
    state = json.loads((folder / name_of(what, lora) / "trainer_state.json").read_text())
    steps = [line for line in state["log_history"] if "loss" in line]
    said = [0.01 < line.get("balance_loss", 0) < float(line["loss"]) for line in steps]
    assert said == [what == "routers"] * 3  # beside the loss, of which it is a part


@pytest.mark.parametrize(("what", "lora"), KINDS)
def test_a_reader_gets_the_trained_tower(trained, material, what, lora):
    """Logits of the reloaded checkpoint are those of the model in the trainer's hands, through a tower that changed."""
    folder, seen = trained[0], trained[1][name_of(what, lora)]
    assert seen["size"] > 1 and seen["off"] <= 1e-5 * seen["size"], seen
    config = json.loads((folder / name_of(what, lora) / "config.json").read_text())
    assert config.get(MARK) == what
    if what is None:
        return
    tower, start = load_tensors(folder / name_of(what, lora) / TUNED_FILE), load_tensors(material / "clip-moe")
    assert tower.keys() == expected_names(what, material)
    assert all(not torch.equal(tensor, start[name]) for name, tensor in tower.items())
    assert seen["off_without_file"] > 1e-4 * seen["size"]


@pytest.mark.parametrize("what", PARTS)
def test_beside_a_model_in_bf16_what_is_trained_is_in_fp32(trained, material, what):
    """As the scripts train; in bf16 small steps would round to nothing. The rest of the tower stays in bf16."""
    folder, seen = trained[0], trained[1][f"llava-{what}-bf16"]
    assert set(seen["moved_in_tower"]) == set(seen["learning_in_tower"])
    assert seen["dtypes_in_tower"] == {"True": ["float32"], "False": ["bfloat16"]}
    tower = load_tensors(folder / f"llava-{what}-bf16" / TUNED_FILE)
    assert tower.keys() == expected_names(what, material)
    assert {tensor.dtype for tensor in tower.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in tower.values())
    assert seen["off"] < 0.1 * seen["size"]  # bf16 against fp32
    assert seen["off"] < seen["off_without_file"]


@pytest.mark.parametrize(("what", "lora"), KINDS[1:])
def test_adapters_that_are_merged_take_the_trained_tower_along(trained, what, lora):
    seen = trained[1][name_of(what, lora)]
    assert ("off_merged" in seen) == lora and seen.get("off_merged", 0) <= 1e-5 * seen["size"]


@pytest.mark.parametrize("what", PARTS)
def test_an_export_has_the_trained_tower(trained, material, what, tmp_path):
    source = trained[0] / name_of(what, False)
    export_hf(source, tmp_path / "hf", vision_tower=str(material / "clip-moe"))
    written, tuned = load_tensors(tmp_path / "hf"), load_tensors(source / TUNED_FILE)
    for name, tensor in load_tensors(material / "clip-moe").items():
        if name.startswith("vision_model."):
            assert torch.equal(written[f"vision_tower.{name}"], tuned.get(name, tensor)), name


def test_without_its_file_a_trained_tower_is_not_read(trained, material, tmp_path, monkeypatch):
    """Never the directory's tower in its place."""
    copy = shutil.copytree(trained[0] / "llava-routers", tmp_path / "llava-routers")
    (copy / TUNED_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"{TUNED_FILE}, which holds it, is not there"):
        export_hf(copy, tmp_path / "hf", vision_tower=str(material / "clip-moe"))
    monkeypatch.setenv("LLAVA_CLIPMOE_TOWERS", f"clipmoe-336={material / 'clip-moe'}")
    args = SimpleNamespace(mm_vision_select_layer=-2, _name_or_path=str(copy), **{MARK: "routers"})
    with pytest.raises(FileNotFoundError, match="Copy it from the training's --output_dir"):
        CLIPMoEVisionTower("clipmoe-336", args)


# ------------------------------------------------------------------------------------------------------------- resuming


@pytest.fixture(scope="module")
def onward(trained, material) -> tuple[Path, dict[str, dict]]:
    """Trainings that go on from those of `trained`: after an interruption, and as new ones from their result."""
    folder, tasks = trained[0], {}
    for what, lora in RESUMED:
        name = f"llava-again-{what}{'-lora' if lora else ''}"
        shutil.copytree(folder / name_of(what, lora) / "checkpoint-2", folder / name / "checkpoint-2")
        tasks[name] = arguments(folder, name, what, **(LORA if lora else {}))
    base = {"model_name_or_path": folder / "llava-routers"}
    tasks["llava-onward-frozen"] = arguments(folder, "llava-onward-frozen", None, **base)
    tasks["llava-onward-experts"] = arguments(folder, "llava-onward-experts", "experts", **base)
    tasks["llava-onward-lora"] = arguments(folder, "llava-onward-lora", "experts", **base, **LORA)
    other = {**base, "vision_tower": material / "clip"}
    tasks["llava-onward-other"] = arguments(folder, "llava-onward-other", None, **other)
    shutil.copytree(folder / "llava-routers" / "checkpoint-2", folder / "llava-changed" / "checkpoint-2")
    tasks["llava-changed"] = arguments(folder, "llava-changed", "experts")
    listed = []
    for name, words in tasks.items():
        start = folder / ("llava-routers" if "onward" in name else "llama")
        base = str(start) if "--lora_enable" in words else None
        listed.append({"name": name, "output": str(folder / name), "arguments": words, "base": base})
    return folder, train([trained[2]], material, listed, folder)


RESUMED = [("routers", False), ("experts", True), ("lora", False), ("lora", True)]


@pytest.mark.parametrize(("what", "lora"), RESUMED)
def test_an_interrupted_training_ends_as_the_one_that_went_through(onward, what, lora):
    folder = onward[0]
    again = load_tensors(folder / f"llava-again-{what}{'-lora' if lora else ''}" / TUNED_FILE)
    straight = load_tensors(folder / name_of(what, lora) / TUNED_FILE)
    halfway = load_tensors(folder / name_of(what, lora) / "checkpoint-2" / TUNED_FILE)
    for name, tensor in straight.items():
        torch.testing.assert_close(again[name], tensor)
        assert not torch.equal(halfway[name], tensor)


def test_a_trained_tower_is_kept_by_what_is_trained_after_it(onward):
    """Frozen, or with more of it trained, in a checkpoint and with LoRA; not where another tower takes its place."""
    folder, seen = onward
    first = load_tensors(folder / "llava-routers" / TUNED_FILE)
    frozen = load_tensors(folder / "llava-onward-frozen" / TUNED_FILE)
    assert frozen.keys() == first.keys() and all(torch.equal(tensor, first[name]) for name, tensor in frozen.items())
    for name in ("llava-onward-experts", "llava-onward-lora"):
        both = load_tensors(folder / name / TUNED_FILE)
        assert len(both) > len(first) and all(torch.equal(both[router], first[router]) for router in first)
        assert all(".mlp.experts." in moved for moved in seen[name]["moved_in_tower"])
        assert seen[name]["moved_in_tower"] and seen[name]["peft_in_tower"] == []  # though the base is a LLaVA
    for name in ("llava-onward-frozen", "llava-onward-experts", "llava-onward-lora"):
        assert seen[name]["off"] <= 1e-5 * seen[name]["size"] < seen[name]["off_without_file"], name
    assert not (folder / "llava-onward-other" / TUNED_FILE).exists()
    assert MARK not in json.loads((folder / "llava-onward-other" / "config.json").read_text())


def test_a_checkpoint_that_trained_something_else_is_refused(onward):
    assert f"was trained with --{MARK} routers" in onward[1]["llava-changed"]["error"]
