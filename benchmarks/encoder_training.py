"""Speed and memory of a training step: an MCL stage and a router step against the dense model trained whole.

    python benchmarks/encoder_training.py                       (ViT-L/14@336; minutes on 2 cores, seconds on a GPU)
    python benchmarks/encoder_training.py --model small         (the quick start's CLIP)

Every variant runs the trainer's own step (`train_encoder.loop.forward_backward` and AdamW) on the same random images
and captions, in a process of its own so that peak memory is its own; variants alternate over the rounds, the median
of all timed steps counts, and ratios are against `dense, all parameters` in the same run.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

VARIANTS = {
    "dense, all parameters": ("dense", "all"),
    "MCL step (FFNs only)": ("dense", "ffn"),
    "router step (4 experts, top 2)": ("moe", "router"),
}


@dataclass
class Settings:
    """What to measure."""

    model: Literal["vit-l-14-336", "small"] = "vit-l-14-336"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["bf16", "fp32"] = "bf16"
    images: int | None = None
    """Images a step; 64 on a GPU, 4 on a CPU."""
    tokens: int = 100
    """Tokens a caption."""
    chunk_size: int | None = None
    """Gradient caching with chunks of this many images; None is the plain step."""
    rounds: int = 2
    steps: int = 2
    """Timed steps a round, after one that is not timed."""
    only: str | None = None
    """Used by the benchmark itself: measure one variant in this process."""


def model_config(name: str):
    from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig

    if name == "small":
        text = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4)
        vision = dict(text, num_hidden_layers=6, image_size=336, patch_size=42)
        return CLIPMoEConfig(dict(text, max_position_embeddings=248), vision, projection_dim=256, num_experts=1)
    text = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    vision |= dict(image_size=336, patch_size=14)
    return CLIPMoEConfig(dict(text, max_position_embeddings=248), vision, projection_dim=768, num_experts=1)


def measure(s: Settings) -> dict:
    """One variant, in this process: seconds of each timed step and peak memory."""
    import torch
    from accelerate import Accelerator

    from llava_clipmoe.modeling_clipmoe import CLIPMoEModel
    from llava_clipmoe.upcycling import is_ffn, moe_config
    from train_encoder.allocator import keep_freed_memory
    from train_encoder.data import Batch
    from train_encoder.loop import TwoTowers, forward_backward
    from train_encoder.losses import Contrastive
    from train_encoder.progress import peak_memory_bytes, reset_peak_memory

    keep_freed_memory()
    kind, trained = VARIANTS[s.only]
    accelerator = Accelerator(mixed_precision="bf16" if s.precision == "bf16" else "no", cpu=s.device == "cpu")
    device = accelerator.device
    config = model_config(s.model)
    if kind == "moe":
        config = moe_config(config, num_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    with torch.device(device):
        model = CLIPMoEModel(config)
    chosen = {"all": lambda n: True, "ffn": is_ffn, "router": lambda n: ".mlp.router." in n}[trained]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name) and name != "logit_scale")
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5)

    class Bundle:
        image_mean, image_std = (0.5,) * 3, (0.5,) * 3

    Bundle.model = model
    towers = accelerator.prepare_model(TwoTowers(Bundle).train())
    ids = torch.randint(1, 49000, (s.images, s.tokens))
    ids[:, -1] = 49407
    pixels = torch.randint(0, 256, (s.images, 3, 336, 336), dtype=torch.uint8)
    batch = Batch(pixels, ids, torch.ones_like(ids), torch.arange(s.images), [], 0)
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
    return {"seconds": seconds[1:], "peak": peak_memory_bytes(device), "card": card, "torch": torch.__version__,
            "trained": sum(p.numel() for p in learning)}  # fmt: skip


def main() -> None:
    import tyro

    s = tyro.cli(Settings, description=__doc__, use_underscores=False)
    if s.device == "auto":
        import torch

        s.device = "cuda" if torch.cuda.is_available() else "cpu"
    s.images = s.images or (64 if s.device == "cuda" else 4)
    if s.only:
        print(json.dumps(measure(s)))
        return
    found: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    for _ in range(s.rounds):
        for name in VARIANTS:
            flags = [f"--{k.replace('_', '-')}={v}" for k, v in vars(s).items() if v is not None and k != "only"]
            child = subprocess.run([sys.executable, __file__, *flags, "--only", name], capture_output=True, text=True)
            if child.returncode:
                raise SystemExit(f"{name} failed:\n{child.stderr[-2000:]}")
            found[name].append(json.loads(child.stdout.splitlines()[-1]))
    show(s, found)


def show(s: Settings, found: dict[str, list[dict]]) -> None:
    from rich.console import Console
    from rich.table import Table

    first = next(iter(found.values()))[0]
    machine = first["card"] or f"CPU, {platform.processor() or platform.machine()}"
    title = f"{s.model}, {s.images} images a step, {s.tokens} tokens, {s.precision}, {machine}, torch {first['torch']}"
    table = Table(title=title)
    for column in ("step", "time ratio", "memory ratio", "images/s", "s/step", "peak GiB", "trained M"):
        table.add_column(column, justify="left" if column == "step" else "right")
    base_time = base_peak = None
    for name, rounds in found.items():
        seconds = statistics.median(t for r in rounds for t in r["seconds"])
        peak = statistics.median(r["peak"] for r in rounds)
        base_time, base_peak = base_time or seconds, base_peak or peak
        table.add_row(
            name, f"{seconds / base_time:.2f}", f"{peak / base_peak:.2f}", f"{s.images / seconds:.2f}",
            f"{seconds:.2f}", f"{peak / 2**30:.2f}", f"{rounds[0]['trained'] / 1e6:.1f}",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
