"""A program that runs upstream's trainings with tiles, task after task, and writes down what it saw.

A task has `arguments` (of llava.train.train), `output` (its --output_dir), `base` (the language model, where `output`
holds only a projector or adapters), perhaps `from` (an output whose checkpoint-2 it goes on from) and `device`, where
the result is loaded ("cpu").
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
from PIL import Image

from tiny.tower_trainings import balance_by_hand, learns, main, whole, without_kernels

from llava_clipmoe.compat.tuning import tower_of  # isort: skip

from llava.mm_utils import process_images  # isort: skip
from llava.model.builder import load_pretrained_model  # isort: skip
from llava.train import train  # isort: skip


def watch(task: dict) -> dict:
    """Train as the task says, in this process; -> what was seen, or the error."""
    seen, trainers, cls = {}, [], train.LLaVATrainer
    upstream_train, upstream_loss = cls.train, cls.compute_loss

    def compute_loss(self, model, inputs, *rest, **named):
        loss = upstream_loss(self, model, inputs, *rest, **named)
        if "batch" not in seen:
            seen["batch"] = describe_batch(inputs)
        if "balance_expected" not in seen and learns(self.model) == "routers" and has_both(inputs["images"]):
            with torch.no_grad():
                seen["balance_added"] = (loss - model(**inputs).loss).item()
                seen["balance_expected"] = balance_by_hand(tower_of(self.model), torch.cat(inputs["images"]))
        return loss

    def train_and_watch(self, *arguments, **named):
        trainers.append(self)
        before = {name: tensor.detach().clone() for name, tensor in whole(self.model).items()}
        result = upstream_train(self, *arguments, **named)
        after = whole(self.model)
        seen["moved"] = [name for name in after if not torch.equal(after[name].to(before[name].dtype), before[name])]
        seen["learns"] = [name for name, tensor in after.items() if tensor.requires_grad]
        return result

    cls.train, cls.compute_loss = train_and_watch, compute_loss
    try:
        if "from" in task:
            shutil.copytree(Path(task["from"], "checkpoint-2"), Path(task["output"], "checkpoint-2"))
        sys.argv = ["train.py", *task["arguments"]]
        torch.manual_seed(0)
        train.train()
    except ValueError as error:
        return {"error": str(error)}
    finally:
        cls.train, cls.compute_loss = upstream_train, upstream_loss
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return seen
    return seen | compare_with_reloaded(task, trainers[0])


def has_both(images: list[torch.Tensor]) -> bool:
    """Whether a batch has rows with and without a picture."""
    return {bool(image.any()) for image in images} == {True, False}


def describe_batch(inputs: dict) -> dict:
    images = inputs["images"]
    if not isinstance(images, list):
        return {"shape": list(images.shape)}
    return {"shapes": [list(image.shape) for image in images], "sizes": [list(size) for size in inputs["image_sizes"]]}


@torch.no_grad()
def compare_with_reloaded(task: dict, trainer) -> dict:
    """The trained model beside what upstream's loader makes of its output: logits, and pictures."""
    path, model = Path(task["output"]), trainer.model
    device = task.get("device", "cpu")
    _, reloaded, processor, _ = load_pretrained_model(str(path), task["base"], path.name, device=device)
    inner = model.get_model()
    if task["base"] is not None and "--lora_enable" not in task["arguments"]:
        for tensor in (*inner.mm_projector.parameters(), *newline_of(model)):  # upstream's loader rounds stage 1
            tensor.copy_(tensor.half())
    pictures = [Image.effect_noise(size, 90).convert("RGB") for size in ((24, 60), (50, 30))]
    pixels = process_images(pictures, processor, reloaded.config)
    inputs = {"images": list(pixels), "image_sizes": [picture.size for picture in pictures]}
    trained, found = logits(model, inputs), logits(reloaded, inputs)
    seen = {"size": trained.abs().max().item(), "shape": list(trained.shape), "off": far(trained, found)}
    if device != "cpu":
        seen |= without_kernels(lambda: logits(reloaded, inputs), found)
    for tensor in newline_of(reloaded):
        tensor.zero_()
        seen["off_without_newline"] = far(trained, logits(reloaded, inputs))
    return seen | {"same_pictures": compare_pictures(trainer.train_dataset, processor, reloaded.config)}


def newline_of(model) -> list[torch.Tensor]:
    newline = getattr(model.get_model(), "image_newline", None)
    return [] if newline is None else [newline]


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item() if one.shape == other.shape else float("inf")


def logits(model, inputs: dict) -> torch.Tensor:
    """[B,T,V] for one prompt around each of the pictures."""
    model.eval()
    ids = torch.tensor([[1, 40, 50, -200, 60, 70, 80, 90]]).expand(len(inputs["images"]), -1)
    if model.device.type != "cpu":
        images = [image.to(next(model.get_model().mm_projector.parameters())) for image in inputs["images"]]
        ids, inputs = ids.to(model.device), {**inputs, "images": images}
    return model(input_ids=ids, use_cache=False, **inputs).logits.float().cpu()


def compare_pictures(dataset, processor, config) -> list[bool]:
    """For each row with a picture: whether the data set gives what upstream's runners make of the picture."""
    same = []
    for number, row in enumerate(dataset.list_data_dict):
        if "image" in row:
            with Image.open(Path(dataset.data_args.image_folder, row["image"])) as file:
                picture = file.convert("RGB")
            item = dataset[number]
            expected = process_images([picture], processor, config)[0]
            same.append(torch.equal(item["image"], expected) and item.get("image_size", picture.size) == picture.size)
    return same


if __name__ == "__main__":
    main(sys.argv[1], watch)
