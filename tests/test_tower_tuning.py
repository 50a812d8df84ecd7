"""A tower that learns in LLaVA's stage 2 (`--mm_tune_vision_tower`), through upstream's own trainer.

What should move moves and nothing else: in plain torch, with LLaVA's LoRA, and in DeepSpeed's engines in two CPU
processes. What was trained is in the checkpoint, and every reader gets it. The trainings of one environment share a
process (this file, run as a program), which says what it saw.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from tiny.llavas import make_data, make_language_model, make_towers, upstream_is_installed

from llava_clipmoe.files import load_tensors
from llava_clipmoe.tower_tuning import MARK, TUNED_FILE

PINNED = os.environ.get("LLAVA_CLIPMOE_PINNED_PYTHON")
pytestmark = [
    pytest.mark.skipif(not upstream_is_installed(), reason="upstream LLaVA (llava-torch) is not installed here"),
    pytest.mark.xdist_group("tower_tuning"),
]
RATE, OWN_RATE = 2e-3, 5e-3
TOWER = "model.vision_tower.vision_tower."
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
        [python, __file__, str(folder / "tasks.json")],
        cwd=folder, env=environment(material), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(
    scope="module",
    params=[
        "current",
        pytest.param("pinned", marks=pytest.mark.skipif(not PINNED, reason="LLAVA_CLIPMOE_PINNED_PYTHON is not set")),
    ],
)
def trained(request, material, tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """Every kind of stage 2: the folder of their outputs, and what was seen of each."""
    folder = tmp_path_factory.mktemp(request.param)
    for name in ("llama", "data", "clip-moe"):
        (folder / name).symlink_to(material / name)
    tasks = []
    for what, lora in KINDS:
        name = name_of(what, lora)
        tasks.append({"name": name, "base": str(folder / "llama") if lora else None, "output": str(folder / name)})
        tasks[-1]["arguments"] = arguments(folder, name, what, **(LORA if lora else {}))
    python = {"current": sys.executable, "pinned": PINNED}[request.param]
    return folder, dict(zip([task["name"] for task in tasks], train(python, material, tasks, folder), strict=True))


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


# ------------------------------------------------------------------------------------------------------------- program


def watch(task: dict) -> dict:
    """Train as the task says, in this process; -> what happened to the model."""
    from llava.train import train

    from llava_clipmoe.compat.tuning import tower_of

    seen, torch_model = {"balance_added": 0.0, "balance_expected": 0.0}, []
    trainer_class = train.LLaVATrainer
    upstream_train, upstream_loss = trainer_class.train, trainer_class.compute_loss

    def compute_loss(self, model, inputs, *rest, **named):
        loss = upstream_loss(self, model, inputs, *rest, **named)
        if "expected" not in seen:
            with torch.no_grad():
                seen["expected"] = balance_by_hand(tower_of(self.model), inputs["images"])
                plain = model(**{**inputs, "images": inputs["images"].clone()}).loss
                seen["balance_added"] = (loss - plain).item()
        return loss

    def train_and_watch(self, *arguments, **named):
        before = {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}
        result = upstream_train(self, *arguments, **named)
        torch_model.append(self.model)
        describe(self, before, seen)
        return result

    trainer_class.train, trainer_class.compute_loss = train_and_watch, compute_loss
    try:
        sys.argv = ["train.py", *task["arguments"]]
        torch.manual_seed(0)
        train.train()
    finally:
        trainer_class.train, trainer_class.compute_loss = upstream_train, upstream_loss
    learns = getattr(tower_of(torch_model[0]).tuning, "what", None)
    seen["balance_expected"] = seen.pop("expected") if learns == "routers" else 0.0
    compare_with_reloaded(task, torch_model[0], seen)
    return seen


def balance_by_hand(tower, pixels: torch.Tensor) -> float:
    """0.01 * E * sum f P, averaged over the blocks (eq. 6-9), of the rows that are no stand-in for a picture."""
    kept = pixels[[bool(picture.abs().sum()) for picture in pixels]]
    losses = []
    for logits in tower.vision_tower(kept, output_router_logits=True).router_logits:
        p = logits.flatten(0, 1).softmax(-1)
        f = torch.nn.functional.one_hot(p.argmax(-1), p.shape[-1]).float().mean(0)
        losses.append(p.shape[-1] * (f * p.mean(0)).sum().item())
    return 0.01 * sum(losses) / len(losses)


def describe(trainer, before: dict[str, torch.Tensor], seen: dict) -> None:
    def short(name: str) -> str:
        return name.partition(".vision_tower.vision_tower.")[2]

    parameters = dict(trainer.model.named_parameters())
    moved = [name for name, tensor in parameters.items() if not torch.equal(tensor.detach(), before[name])]
    names = {id(tensor): name for name, tensor in parameters.items()}
    rates = [(names[id(p)], group["lr"]) for group in trainer.optimizer.param_groups for p in group["params"]]
    learning = [name for name, tensor in parameters.items() if tensor.requires_grad]
    seen["moved_in_tower"] = [short(name) for name in moved if short(name)]
    seen["learning_in_tower"] = [short(name) for name in learning if short(name)]
    seen["projector_moved"] = any("mm_projector" in name for name in moved)
    seen["language_model_moved"] = any("layers" in name and not short(name) for name in moved)
    seen["peft_in_tower"] = [name for name in parameters if short(name) and ("lora_" in name or "base_layer" in name)]
    seen["rates_in_tower"] = sorted({rate for name, rate in rates if short(name)})
    seen["rates_elsewhere"] = sorted({rate for name, rate in rates if not short(name)})
    seen["twice_in_optimizer"] = [name for name, _ in rates if [n for n, _ in rates].count(name) > 1]
    seen["not_in_optimizer"] = [name for name in learning if name not in dict(rates)]


def logits(model) -> torch.Tensor:
    """[T,V] for a prompt around one picture."""
    model.eval()
    ids = torch.tensor([[1, 40, 50, -200, 60, 70, 80, 90]])
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, images=pixels, use_cache=False).logits[0].float()


def compare_with_reloaded(task: dict, model, seen: dict) -> None:
    from llava.model.builder import load_pretrained_model

    path = Path(task["output"])
    reloaded = load_pretrained_model(str(path), task["base"], path.name, device="cpu")[1]
    trained, found = logits(model), logits(reloaded)
    seen["size"], seen["off"] = trained.abs().max().item(), (trained - found).abs().max().item()
    if (path / TUNED_FILE).is_file():
        start = load_tensors(os.environ["LLAVA_CLIPMOE_TOWERS"].partition("=")[2])
        tower = reloaded.get_vision_tower().vision_tower
        tower.load_state_dict({name: start[name] for name in tower.state_dict()})
        seen["off_without_file"] = (trained - logits(reloaded)).abs().max().item()


def main(tasks_file: str) -> None:
    """The program that `train` starts."""
    from llava_clipmoe import llava_hook, run

    llava_hook.install()
    run.prepare()
    seen = [watch(task) for task in json.loads(Path(tasks_file).read_text())]
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1])
