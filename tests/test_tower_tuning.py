"""A tower that learns in LLaVA's stage 2 (`--mm_tune_vision_tower`), through upstream's own trainer.

What should move moves and nothing else: in plain torch, with LLaVA's LoRA, and in DeepSpeed's engines in two CPU
processes. What was trained is in the checkpoint, and every reader gets it. The trainings of one environment share a
process (tiny/tower_trainings.py), which says what it saw.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import REPOSITORY
from tiny.llavas import make_data, make_language_model, make_towers, upstream_in_this_process, upstream_is_installed

from llava_clipmoe.export import export_hf
from llava_clipmoe.files import load_tensors
from llava_clipmoe.tower_tuning import MARK, TUNED_FILE, Tuning, check_tuning
from llava_clipmoe.vision_tower import CLIPMoEVisionTower

PINNED = os.environ.get("LLAVA_CLIPMOE_PINNED_PYTHON")
pytestmark = [
    pytest.mark.skipif(not upstream_is_installed(), reason="upstream LLaVA (llava-torch) is not installed here"),
    pytest.mark.xdist_group("tower_tuning"),
]
PROGRAM = str(REPOSITORY / "tests" / "tiny" / "tower_trainings.py")
RATE, OWN_RATE = 2e-3, 5e-3
LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0}
PARTS = {"routers": ".mlp.router.", "experts": ".mlp.experts.", "lora": ".self_attn."}
KINDS = [(what, lora) for lora in (False, True) for what in (None, *PARTS)]


# ------------------------------------------------------------------------------------------------------- the trainings


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


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """`llama`, `clip-moe`, `clip`, `data/data.json` (its last rows have no picture), `data/images`."""
    folder = tmp_path_factory.mktemp("tuning")
    make_language_model(folder / "llama")
    make_towers(folder)
    file = make_data(folder / "data")
    rows = json.loads(file.read_text())
    rows[-1] = {"id": "text", "conversations": [{"from": f, "value": "What colour?"} for f in ("human", "gpt")]}
    file.write_text(json.dumps(rows))
    return folder


def environment(folder: Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST_", "LLAVA_CLIPMOE"))}
    return {
        **kept, "LLAVA_CLIPMOE_TOWERS": f"clipmoe-336={folder / 'clip-moe'}", "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", "WANDB_DISABLED": "true",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]), **more,
    }  # fmt: skip


def train(python: str, material: Path, tasks: list[dict], folder: Path) -> list[dict]:
    """Each task in one process of `python`; -> what it saw of each."""
    (folder / "tasks.json").write_text(json.dumps(tasks))
    done = subprocess.run(
        [python, PROGRAM, str(folder / "tasks.json")],
        cwd=folder, env=environment(material), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]
    return json.loads((folder / "seen.json").read_text())


@pytest.fixture(
    scope="module",
    params=[
        "current",
        pytest.param("pinned", marks=pytest.mark.skipif(not PINNED, reason="LLAVA_CLIPMOE_PINNED_PYTHON is not set")),
    ],
)
def trained(request, material, tmp_path_factory) -> tuple[Path, dict[str, dict], str]:
    """Every kind of stage 2: the folder of their outputs, what was seen of each, and the interpreter."""
    folder = tmp_path_factory.mktemp(request.param)
    for name in ("llama", "data", "clip-moe"):
        (folder / name).symlink_to(material / name)
    tasks = []
    for what, lora in KINDS:
        name = name_of(what, lora)
        tasks.append({"name": name, "base": str(folder / "llama") if lora else None, "output": str(folder / name)})
        tasks[-1]["arguments"] = arguments(folder, name, what, **(LORA if lora else {}))
    for what in PARTS:
        words = arguments(folder, f"llava-{what}-bf16", what, bf16=True)
        tasks.append({"name": f"llava-{what}-bf16", "base": None, "output": words[-1], "arguments": words})
        tasks[-1]["output"] = str(folder / f"llava-{what}-bf16")
    python = {"current": sys.executable, "pinned": PINNED}[request.param]
    seen = dict(zip([task["name"] for task in tasks], train(python, material, tasks, folder), strict=True))
    return folder, seen, python


def expected_names(what: str | None, material: Path) -> set[str]:
    """Tensors of the tower's directory that training `what` changes; block 2 of three is not loaded (layer -2)."""
    names = load_tensors(material / "clip-moe")
    blocks = tuple(f"vision_model.encoder.layers.{block}." for block in (0, 1))
    found = {name for name in names if what and name.startswith(blocks) and PARTS[what] in name}
    return {name for name in found if what != "lora" or name.endswith("_proj.weight")}


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
    seen = trained[1][name_of(what, lora)]
    assert seen["balance_added"] == pytest.approx(seen["balance_expected"], rel=1e-4, abs=1e-6)
    assert (seen["balance_expected"] > 0.01) == (what == "routers")


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
        listed.append({"output": str(folder / name), "arguments": words, "base": base})
    return folder, dict(zip(tasks, train(trained[2], material, listed, folder), strict=True))


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
    for name in ("llava-onward-frozen", "llava-onward-experts", "llava-onward-lora"):
        assert seen[name]["off"] <= 1e-5 * seen[name]["size"] < seen[name]["off_without_file"], name
    assert not (folder / "llava-onward-other" / TUNED_FILE).exists()
    assert MARK not in json.loads((folder / "llava-onward-other" / "config.json").read_text())


def test_a_checkpoint_that_trained_something_else_is_refused(onward):
    assert f"was trained with --{MARK} routers" in onward[1]["llava-changed"]["error"]


# ------------------------------------------------------------------------------------------------------------ bad flags


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([f"--{MARK}", "router"], "'router'; it may be routers, experts or lora"),
        ([f"--{MARK}", "routers", "--tune_mm_mlp_adapter", "True"], "belongs to stage 2"),
        ([f"--{MARK}", "routers", "--vision_tower", "openai/clip-vit-large-patch14-336"], "trains a CLIP-MoE tower"),
        ([f"--{MARK}", "lora", "--mm_vision_tower_lora_r", "48"], "must lie between 1 and 47"),
        (["--mm_vision_tower_lr", "1e-5"], f"--mm_vision_tower_lr needs --{MARK}"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused_before_anything_is_loaded(material, monkeypatch, words, message):
    with upstream_in_this_process():
        from llava.train.train import ModelArguments
    monkeypatch.setenv("LLAVA_CLIPMOE_TOWERS", f"clipmoe-336={material / 'clip-moe'}")
    parser = transformers.HfArgumentParser((ModelArguments,))
    with pytest.raises(ValueError, match=message):
        parser.parse_args_into_dataclasses(["--vision_tower", "clipmoe-336", *words])
    assert all(f"--{flag}" in parser.format_help() for flag in (MARK, "mm_vision_tower_lr", "mm_vision_tower_lora_r"))


def test_a_dense_tower_has_no_routers(tiny_config):
    with pytest.raises(ValueError, match="the tower mine is a dense CLIP, which has no routers"):
        check_tuning(Tuning("routers"), tiny_config().vision_config, "mine")
    check_tuning(Tuning("lora"), tiny_config().vision_config, "mine")


# ----------------------------------------------------------------------------------------------------------- DeepSpeed


@pytest.fixture(scope="module")
def by_deepspeed(material, tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """ZeRO-2 and ZeRO-3, as the scripts use them, each in two processes."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed (pip install deepspeed)")
    folder, seen = tmp_path_factory.mktemp("deepspeed"), {}
    for name in ("llama", "data", "clip-moe"):
        (folder / name).symlink_to(material / name)
    for stage, kinds in ENGINES.items():
        seen |= in_two_processes(material, [engine_task(folder, stage, *kind) for kind in kinds], folder)
        again, straight = (engine_task(folder, stage, *kinds[0], again) for again in ("again-", ""))
        shutil.copytree(Path(straight["output"], "checkpoint-2"), Path(again["output"], "checkpoint-2"))
        seen |= in_two_processes(material, [again], folder)
    return folder, seen


ENGINES = {2: [("experts", True), ("routers", False), ("lora", False)], 3: [("experts", False), ("lora", True)]}


def engine_task(folder: Path, stage: int, what: str, lora: bool, again: str = "") -> dict:
    name = f"llava-{again}{name_of(what, lora).removeprefix('llava-')}-zero{stage}"
    changed = {"deepspeed": REPOSITORY / "train_llava" / f"zero{stage}.json", "per_device_train_batch_size": 2}
    words = arguments(folder, name, what, bf16=True, **changed, **(LORA if lora else {}))
    return {"name": name, "base": None, "output": str(folder / name), "arguments": words}


def in_two_processes(material: Path, tasks: list[dict], folder: Path) -> dict[str, dict]:
    (folder / "tasks.json").write_text(json.dumps(tasks))
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [sys.executable, *launcher, PROGRAM, str(folder / "tasks.json")],
        cwd=folder, env=environment(material, DS_ACCELERATOR="cpu"), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-6000:]
    return dict(zip([task["name"] for task in tasks], json.loads((folder / "seen.json").read_text()), strict=True))


@pytest.mark.parametrize(("stage", "what", "lora"), [(stage, *kind) for stage in ENGINES for kind in ENGINES[stage]])
def test_under_deepspeed_the_same_moves_and_is_kept(by_deepspeed, material, stage, what, lora):
    name = f"{name_of(what, lora)}-zero{stage}"
    output, seen = by_deepspeed[0] / name, by_deepspeed[1][name]
    assert set(seen["moved_in_tower"]) == set(seen["learning_in_tower"])
    names = expected_names(what, material)
    original = {name.partition(".parametrizations.")[0] for name in seen["moved_in_tower"]}
    assert original == ({name.removesuffix(".weight") for name in names} if what == "lora" else names)
    assert seen["projector_moved"] and seen["language_model_moved"] and seen["peft_in_tower"] == []
    kept, start = load_tensors(output / TUNED_FILE), load_tensors(material / "clip-moe")
    assert kept.keys() == names
    for tensor_name, tensor in kept.items():
        assert tensor.shape == start[tensor_name].shape and not torch.equal(tensor, start[tensor_name])
        assert tensor.double().sum().item() == pytest.approx(seen["sums"][tensor_name], rel=1e-6)


@pytest.mark.parametrize("stage", ENGINES)
def test_under_deepspeed_an_interrupted_training_goes_on(by_deepspeed, stage):
    """Nearly as the one that went through: its random states are not kept for all that upstream draws."""
    folder = by_deepspeed[0]
    straight, again = (engine_task(folder, stage, *ENGINES[stage][0], again) for again in ("", "again-"))
    tensors = [load_tensors(Path(task["output"]) / TUNED_FILE) for task in (straight, again)]
    halfway = load_tensors(Path(straight["output"]) / "checkpoint-2" / TUNED_FILE)
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, atol=1e-3, rtol=2e-2)
        assert not torch.equal(halfway[name], tensor)
