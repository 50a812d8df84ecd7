"""Memory and speed of an MCL stage at ViT-L/14@336: all of the FFNs, against LoRA on them, against all parameters.

    python benchmarks/lora_memory.py                              (2 images a step on a CPU, 64 on a GPU)
    python benchmarks/lora_memory.py --device cuda --images 64 --chunk-size 8 --activation-checkpointing

Every variant runs the trainer's own step (`train_encoder.training.step.forward_backward` and AdamW) on the same random
images and captions, one variant at a time, each in a process of its own so that peak memory is its own. Ratios are
against the stage of DMU (all of the FFNs). `libraries` is what the process held before it had a model; `state` is
weights, gradients and Adam's moments; the rest of the peak is activations.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Literal

from encoder_training import model_config

VARIANTS = ("FFNs (DMU's stage)", "LoRA on the FFNs", "all parameters")


@dataclass
class Settings:
    """What to measure."""

    model: Literal["vit-l-14-336", "small"] = "vit-l-14-336"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["bf16", "fp32"] = "bf16"
    images: int | None = None
    """Images a step; 64 on a GPU, 2 on a CPU."""
    tokens: int = 248
    """Tokens a caption."""
    chunk_size: int = 1
    """Images that a graph is held for at once (gradient caching); the same for all variants."""
    activation_checkpointing: bool = False
    mapped: bool = False
    """CPU with glibc: give every large tensor pages of its own, returned when it is freed. Slower, but the peak is then
    what is in use, without the holes in the heap that the trainer's own way (training/memory.py) leaves."""
    rank: int = 64
    steps: int = 1
    """Timed steps, after one that is not timed."""
    only: str | None = None
    """Used by the benchmark itself: measure one variant in this process."""


def measure(s: Settings) -> dict:
    """One variant, in this process: seconds of each timed step, and memory in bytes."""
    import torch
    from accelerate import Accelerator

    from llava_clipmoe.modeling_clipmoe import CLIPMoEModel
    from llava_clipmoe.upcycling import is_ffn
    from train_encoder.config import LoraConfig
    from train_encoder.data.dataset import Batch
    from train_encoder.methods.lora import add_adapters, is_adapter
    from train_encoder.training.losses import Contrastive
    from train_encoder.training.memory import keep_freed_memory, peak_memory_bytes, reset_peak_memory
    from train_encoder.training.precision import store_frozen_in
    from train_encoder.training.step import TwoTowers, forward_backward

    if not s.mapped:
        keep_freed_memory()
    lora = s.only == VARIANTS[1]
    if lora:
        import peft  # noqa: F401  its own memory belongs to the libraries
    accelerator = Accelerator(mixed_precision="bf16" if s.precision == "bf16" else "no", cpu=s.device == "cpu")
    device = accelerator.device
    reset_peak_memory(device)
    libraries = peak_memory_bytes(device)

    torch.manual_seed(0)
    model = CLIPMoEModel(model_config(s.model))
    chosen = {VARIANTS[0]: is_ffn, VARIANTS[1]: is_adapter, VARIANTS[2]: lambda name: True}[s.only]
    if lora:
        towers = {"vision_model": model.config.vision_config, "text_model": model.config.text_config}
        blocks = {(name, i) for name, tower in towers.items() for i in range(tower.num_hidden_layers)}
        add_adapters(model, blocks, LoraConfig(rank=s.rank))
        if s.precision == "bf16":
            store_frozen_in(model, torch.bfloat16, is_adapter)
    model.to(device)._set_gradient_checkpointing(s.activation_checkpointing)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name) and name != "logit_scale")
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5, fused=True)

    class Bundle:
        image_mean, image_std = (0.5,) * 3, (0.5,) * 3

    Bundle.model = model
    towers = accelerator.prepare_model(TwoTowers(Bundle).train())
    ids = torch.randint(1, 49000, (s.images, s.tokens))
    ids[:, -1] = 49407
    pixels = torch.randint(0, 256, (s.images, 3, 336, 336), dtype=torch.uint8)
    batch = Batch(pixels, ids, torch.arange(s.images), [], 0)
    reset_peak_memory(device)
    seconds = []
    for step in range(s.steps + 1):
        started = time.perf_counter()
        forward_backward(towers, batch, Contrastive(0.1), accelerator, s.chunk_size, (0, step))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    weights, learnt = (sum(p.nbytes for p in some) for some in (model.parameters(), learning))
    return {
        "seconds": seconds[1:], "peak": peak_memory_bytes(device), "libraries": libraries,
        "state": weights + 3 * learnt, "trained": sum(p.numel() for p in learning), "card": card,
        "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    import tyro

    s = tyro.cli(Settings, description=__doc__, use_underscores=False)
    if s.device == "auto":
        import torch

        s.device = "cuda" if torch.cuda.is_available() else "cpu"
    s.images = s.images or (64 if s.device == "cuda" else 2)
    if s.only:
        print(json.dumps(measure(s)))
        return
    show(s, {name: run_alone(replace(s, only=name)) for name in VARIANTS})


def run_alone(s: Settings) -> dict:
    """`measure` in a process of its own."""
    flags = []
    for name, value in asdict(s).items():
        flag = f"--{name.replace('_', '-')}"
        flags += [flag] if value is True else [] if value is False else [flag, str(value)]
    mapped = {"MALLOC_MMAP_THRESHOLD_": str(2**18)} if s.mapped else {}
    child = subprocess.run(
        [sys.executable, __file__, *flags], capture_output=True, text=True, env={**os.environ, **mapped}
    )
    if child.returncode:
        raise SystemExit(f"{s.only} failed:\n{child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def show(s: Settings, found: dict[str, dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    base = found[VARIANTS[0]]
    machine = base["card"] or f"CPU, {platform.processor() or platform.machine()}"
    more = ", activation checkpointing" if s.activation_checkpointing else ""
    more += ", tensors mapped" if s.mapped else ""
    table = Table(title=(
        f"{s.model}, {s.images} images a step in chunks of {s.chunk_size}, {s.tokens} tokens, {s.precision}"
        f"{more}, rank {s.rank}; {machine}, torch {base['torch']}"
    ))  # fmt: skip
    table.add_column("what learns", no_wrap=True)
    for column in ("memory ratio", "less libraries", "time ratio", "peak GiB", "libraries", "state", "s/step",
                   "trained M"):  # fmt: skip
        table.add_column(column, justify="right")
    typical = {name: statistics.median(one["seconds"]) for name, one in found.items()}
    for name, one in found.items():
        own = (one["peak"] - one["libraries"]) / (base["peak"] - base["libraries"])
        table.add_row(
            name, f"{one['peak'] / base['peak']:.2f}", f"{own:.2f}", f"{typical[name] / typical[VARIANTS[0]]:.2f}",
            *(f"{one[key] / 2**30:.2f}" for key in ("peak", "libraries", "state")),
            f"{typical[name]:.2f}", f"{one['trained'] / 1e6:.1f}",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
