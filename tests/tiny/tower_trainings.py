"""A program that runs upstream's stage 2, task after task, and writes down what happened to the vision tower.

    python tower_trainings.py tasks.json     (or under torchrun)

A task has `arguments` (of llava.train.train), `output` (its --output_dir), `base` (for LoRA: the language model) and
perhaps `device`, where the result is loaded ("cpu"), and `ask`: a data file whose first questions it answers.
What was seen of each goes to seen.json beside the tasks.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from llava_clipmoe import llava_hook, run
from llava_clipmoe.compat.tuning import tower_of
from llava_clipmoe.files import load_tensors
from llava_clipmoe.tower_tuning import TUNED_FILE

llava_hook.install()
run.prepare()

from llava.model.builder import load_pretrained_model  # noqa: E402
from llava.train import train  # noqa: E402


def watch(task: dict) -> dict:
    """Train as the task says, in this process; -> what happened to the model, or the error."""
    seen = {"balance_added": 0.0, "balance_expected": 0.0}
    kept, cls = [], train.LLaVATrainer
    upstream_train, upstream_loss = cls.train, cls.compute_loss

    def compute_loss(self, model, inputs, *rest, **named):
        loss = upstream_loss(self, model, inputs, *rest, **named)
        if "size" not in seen and not self.is_deepspeed_enabled and learns(self.model):
            seen["size"] = 0  # once
            with torch.no_grad():
                seen["balance_added"] = (loss - model(**inputs).loss).item()
                if learns(self.model) == "routers":
                    seen["balance_expected"] = balance_by_hand(tower_of(self.model), inputs["images"])
        return loss

    def train_and_watch(self, *arguments, **named):
        kept.append(self.model)
        before = {name: tensor.detach().clone() for name, tensor in whole(self.model).items()}
        result = upstream_train(self, *arguments, **named)
        describe(self, before, seen)
        return result

    cls.train, cls.compute_loss = train_and_watch, compute_loss
    try:
        sys.argv = ["train.py", *task["arguments"]]
        torch.manual_seed(0)
        train.train()
    except ValueError as error:
        return {"error": str(error)}
    finally:
        cls.train, cls.compute_loss = upstream_train, upstream_loss
    if "--deepspeed" in task["arguments"]:
        tensors = tower_of(kept[0]).changed()
        return seen | {"sums": {name: tensor.double().sum().item() for name, tensor in tensors.items()}}
    return seen | compare_with_reloaded(task, kept[0])


def learns(model) -> str | None:
    tower = tower_of(model)
    return tower.tuning.what if tower is not None and tower.tuning is not None else None


def balance_by_hand(tower, pixels: torch.Tensor) -> float:
    """0.01 * E * sum f P, averaged over the blocks (eq. 6-9), of the rows that are no stand-in for a picture."""
    kept = pixels[[bool(picture.abs().sum()) for picture in pixels]]
    losses = []
    for logits in tower.vision_tower(kept, output_router_logits=True).router_logits:
        p = logits.flatten(0, 1).softmax(-1)
        f = torch.nn.functional.one_hot(p.argmax(-1), p.shape[-1]).float().mean(0)
        losses.append(p.shape[-1] * (f * p.mean(0)).sum().item())
    return 0.01 * sum(losses) / len(losses)


def short(name: str) -> str:
    """A parameter's name in the tower; nothing for those elsewhere."""
    return name.partition(".vision_tower.vision_tower.")[2]


def whole(model) -> dict[str, torch.Tensor]:
    """Parameters by name, those that ZeRO-3 has sharded as copies of the whole."""
    parameters = dict(model.named_parameters())
    if not any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
        return parameters
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {
            name: tensor.detach().clone().requires_grad_(tensor.requires_grad) for name, tensor in parameters.items()
        }


def describe(trainer, before: dict[str, torch.Tensor], seen: dict) -> None:
    parameters = whole(trainer.model)
    moved = [
        name for name, tensor in parameters.items() if not torch.equal(tensor.detach(), before[name].to(tensor.dtype))
    ]
    learning = [name for name, tensor in parameters.items() if tensor.requires_grad]
    if not trainer.is_deepspeed_enabled:
        describe_optimizer(trainer, learning, seen)
    tower = tower_of(trainer.model)
    encoder = tower.vision_tower.vision_model.encoder if tower is not None else None
    seen["checkpointed"] = encoder is not None and encoder.gradient_checkpointing and encoder.training
    dtypes = {(str(p.requires_grad), str(p.dtype)[6:]) for name, p in parameters.items() if short(name)}
    seen["dtypes_in_tower"] = {learns: sorted(d for r, d in dtypes if r == learns) for learns in ("True", "False")}
    seen["moved_in_tower"] = [short(name) for name in moved if short(name)]
    seen["learning_in_tower"] = [short(name) for name in learning if short(name)]
    seen["projector_moved"] = any("mm_projector" in name for name in moved)
    seen["language_model_moved"] = any("layers" in name and not short(name) for name in moved)
    seen["peft_in_tower"] = [name for name in parameters if short(name) and ("lora_" in name or "base_layer" in name)]


def describe_optimizer(trainer, learning: list[str], seen: dict) -> None:
    names = {id(tensor): name for name, tensor in trainer.model.named_parameters()}
    rates = [(names[id(p)], group["lr"]) for group in trainer.optimizer.param_groups for p in group["params"]]
    seen["rates_in_tower"] = sorted({rate for name, rate in rates if short(name)})
    seen["rates_elsewhere"] = sorted({rate for name, rate in rates if not short(name)})
    seen["twice_in_optimizer"] = [name for name, _ in rates if [n for n, _ in rates].count(name) > 1]
    seen["not_in_optimizer"] = [name for name in learning if name not in dict(rates)]


def logits(model) -> torch.Tensor:
    """[T,V] for a prompt around one picture."""
    model.eval()
    ids = torch.tensor([[1, 40, 50, -200, 60, 70, 80, 90]])
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    if model.device.type != "cpu":
        ids, pixels = ids.to(model.device), pixels.to(next(model.get_model().mm_projector.parameters()))
    with torch.no_grad():
        return model(input_ids=ids, images=pixels, use_cache=False).logits[0].float().cpu()


def ask(file: str, model, tokenizer) -> dict:
    """Its answers to the first turns of the first rows, and the tokens that it made for the first of them."""
    from llava_clipmoe.conversations import conversation_for
    from train_llava.eval.batched import Prompts, answer

    rows, folder = json.loads(Path(file).read_text())[:4], Path(file).parent / "images"
    questions = [
        {"image": row["image"], "text": row["conversations"][0]["value"].removeprefix("<image>\n")} for row in rows
    ]
    template = conversation_for(model.config._name_or_path)
    prompts = Prompts(questions, folder, tokenizer, model.get_vision_tower().image_processor, model.config, template)
    (answers,) = answer(model, tokenizer, prompts, batch_size=4, max_new_tokens=24)
    ids, pixels, _ = prompts[0]
    images = pixels[None].to(model.device, torch.float16)
    found = model.generate(ids[None].to(model.device), images=images, do_sample=False, max_new_tokens=24)[0].tolist()
    return {"answers": answers, "answer_ids": found}


def without_kernels(compute: Callable[[], torch.Tensor], found: torch.Tensor) -> dict:
    """How far what the modules give is from what the GPU's kernels gave."""
    os.environ["LLAVA_CLIPMOE_FAST"] = "0"
    try:
        return {"off_without_kernels": (compute() - found).abs().max().item()}
    finally:
        del os.environ["LLAVA_CLIPMOE_FAST"]


def compare_with_reloaded(task: dict, model) -> dict:
    seen, device = {}, task.get("device", "cpu")
    path = Path(task["output"])
    tokenizer, reloaded, _, _ = load_pretrained_model(str(path), task["base"], path.name, device=device)
    trained, found = logits(model), logits(reloaded)
    if device != "cpu":
        seen |= without_kernels(lambda: logits(reloaded), found)
    if task["base"] is not None:
        merged = path.with_name(path.name.replace("-lora", "") + "-merged")
        reloaded.save_pretrained(merged)
        tokenizer.save_pretrained(merged)
        again = logits(load_pretrained_model(str(merged), None, merged.name, device=device)[1])
        seen["off_merged"] = (trained - again).abs().max().item()
    seen["size"], seen["off"] = trained.abs().max().item(), (trained - found).abs().max().item()
    if "ask" in task:
        seen |= ask(task["ask"], reloaded, tokenizer)
    if (path / TUNED_FILE).is_file():
        start = load_tensors(os.environ["LLAVA_CLIPMOE_TOWERS"].partition("=")[2])
        tower = reloaded.get_vision_tower().vision_tower
        tower.load_state_dict({name: start[name] for name in tower.state_dict()})
        seen["off_without_file"] = (trained - logits(reloaded)).abs().max().item()
    return seen


def main(tasks_file: str, watch: Callable[[dict], dict] = watch) -> None:
    seen = []
    for task in json.loads(Path(tasks_file).read_text()):
        seen.append(watch(task))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # the next task may read what the first process is still writing
    if os.environ.get("RANK", "0") == "0":
        Path(tasks_file).with_name("seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1])
