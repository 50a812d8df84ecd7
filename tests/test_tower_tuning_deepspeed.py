"""A tower that learns in LLaVA's stage 2 under DeepSpeed's engines: the scripts' ZeRO-2 and ZeRO-3, two CPU processes.

In bf16, as the scripts train. See test_tower_tuning.py.
"""

from __future__ import annotations

import importlib.util
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from tiny.llavas import upstream_is_installed
from tiny.tower_tasks import LORA, arguments, expected_names, link_material, make_material, name_of, train

from llava_clipmoe.files import load_tensors
from llava_clipmoe.tower_tuning import TUNED_FILE

pytestmark = [
    pytest.mark.skipif(not upstream_is_installed(), reason="upstream LLaVA (llava-torch) is not installed here"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
    pytest.mark.xdist_group("tower_tuning_deepspeed"),
]


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def by_deepspeed(material, tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """ZeRO-2 and ZeRO-3, as the scripts use them, each in two processes."""
    folder, seen = link_material(material, tmp_path_factory.mktemp("deepspeed")), {}
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
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    return train([sys.executable, *launcher], material, tasks, folder, DS_ACCELERATOR="cpu")


@pytest.mark.parametrize(("stage", "what", "lora"), [(stage, *kind) for stage in ENGINES for kind in ENGINES[stage]])
def test_under_deepspeed_the_same_moves_and_is_kept(by_deepspeed, material, stage, what, lora):
    name = f"{name_of(what, lora)}-zero{stage}"
    output, seen = by_deepspeed[0] / name, by_deepspeed[1][name]
    assert set(seen["moved_in_tower"]) == set(seen["learning_in_tower"])
    names = expected_names(what, material)
    original = {name.partition(".parametrizations.")[0] for name in seen["moved_in_tower"]}
    assert original == ({name.removesuffix(".weight") for name in names} if what == "lora" else names)
    assert seen["dtypes_in_tower"] == {"True": ["bfloat16"], "False": ["bfloat16"]}  # beside fp32 copies
    assert seen["projector_moved"] and seen["language_model_moved"] and seen["peft_in_tower"] == []
    kept, start = load_tensors(output / TUNED_FILE), load_tensors(material / "clip-moe")
    assert kept.keys() == names
    for tensor_name, tensor in kept.items():
        assert tensor.shape == start[tensor_name].shape
        assert not torch.equal(tensor.bfloat16(), start[tensor_name].bfloat16())
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
