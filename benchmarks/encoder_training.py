"""Speed, memory and parts of a training step: an MCL stage and a router step against the dense model trained whole.

    python benchmarks/encoder_training.py                       (ViT-L/14@336; minutes on 2 cores, seconds on a GPU)
    python benchmarks/encoder_training.py --images 8 --chunk-size 2
    python benchmarks/encoder_training.py --model small         (the quick start's CLIP)
    python benchmarks/encoder_training.py --tiny

Every variant runs the trainer's own step (`train_encoder.loop.forward_backward` and AdamW) on the same random images
and captions, with the same batch and chunks, in a process of its own so that peak memory is its own; variants
alternate over the rounds, the median of all timed steps counts, and ratios are against `dense, all parameters` in the
same run. Peak memory is above what the libraries hold (on a GPU: what torch allocated). Parts of a step: `encode` is
the passes without a graph (gradient caching), then forward, backward, optimiser, and the rest (loss, copies).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import timing
import torch
import tyro

from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig

VARIANTS = {
    "dense, all parameters": ("dense", "all"),
    "MCL step (FFNs only)": ("dense", "ffn"),
    "router step (4 experts, top 2)": ("moe", "router"),
}
PARTS = ("encode", "forward", "backward", "optimiser")


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    model: Literal["vit-l-14-336", "small", "tiny"] = "vit-l-14-336"
    device: timing.Device = "auto"
    precision: Literal["bf16", "fp32"] = "bf16"
    images: int | None = None
    """Images a step; 64 on a GPU, 4 on a CPU."""
    tokens: int = 100
    """Tokens a caption."""
    chunk_size: int | None = None
    """Gradient caching with chunks of this many images; None is the plain step."""
    activation_checkpointing: bool = False
    rounds: int = 2
    steps: int = 2
    """Timed steps a round, after one that is not timed."""
    tiny: bool = False
    """--model tiny, 4 images in chunks of 2, 8 tokens, one round: does the program work?"""
    output: Path | None = None
    """Append the table to this file."""


def model_config(name: str) -> CLIPMoEConfig:
    """The dense CLIP of this name."""
    if name in ("tiny", "small"):
        width, depth = (64, 1) if name == "tiny" else (256, 4)
        text = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, num_attention_heads=4)
        vision = dict(text, num_hidden_layers=2 if name == "tiny" else 6)
        vision |= dict(image_size=28, patch_size=14) if name == "tiny" else dict(image_size=336, patch_size=42)
    else:
        width = 768
        text = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
        vision |= dict(image_size=336, patch_size=14)
    return CLIPMoEConfig(dict(text, max_position_embeddings=248), vision, projection_dim=width, num_experts=1)


class Stopwatch:
    """Seconds of the parts of a step, added up over its chunks."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        timing.synchronise(self.device)
        started = time.perf_counter()
        yield
        timing.synchronise(self.device)
        self.seconds[name] += time.perf_counter() - started

    def wrap(self, function: Callable[..., Any], name: Callable[[], str]) -> Callable[..., Any]:
        """`function`, timed as the part that `name()` says when it is called."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name()):
                return function(*args, **kwargs)

        return timed


def measure(s: Settings, variant: str) -> dict[str, Any]:
    """One variant, in this process: seconds of each timed step and of its parts, and peak memory."""
    from accelerate import Accelerator

    from llava_clipmoe.modeling_clipmoe import CLIPMoEModel
    from llava_clipmoe.upcycling import is_ffn, is_router_or_gate, moe_config
    from train_encoder.allocator import keep_freed_memory
    from train_encoder.data import Batch
    from train_encoder.loop import TwoTowers, forward_backward
    from train_encoder.losses import Contrastive

    keep_freed_memory()
    kind, trained = VARIANTS[variant]
    accelerator = Accelerator(mixed_precision="bf16" if s.precision == "bf16" else "no", cpu=s.device == "cpu")
    device = accelerator.device
    peak = timing.Peak(device)
    config = model_config(s.model)
    side = config.vision_config.image_size
    if kind == "moe":
        config = moe_config(config, num_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    with torch.device(device):
        model = CLIPMoEModel(config)
    model._set_gradient_checkpointing(s.activation_checkpointing)
    chosen = {"all": lambda n: True, "ffn": is_ffn, "router": is_router_or_gate}[trained]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name) and name != "logit_scale")
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5, fused=True)  # as the trainer's

    class Bundle:
        image_mean, image_std = (0.5,) * 3, (0.5,) * 3

    Bundle.model = model
    towers = accelerator.prepare_model(TwoTowers(Bundle).train())
    watch = Stopwatch(device)
    towers.forward = watch.wrap(towers.forward, lambda: "forward" if torch.is_grad_enabled() else "encode")
    accelerator.backward = watch.wrap(accelerator.backward, lambda: "backward")
    ids = torch.randint(1, 49000, (s.images, s.tokens))
    ids[:, -1] = 49407
    pixels = torch.randint(0, 256, (s.images, 3, side, side), dtype=torch.uint8)
    batch = Batch(pixels, ids, torch.ones_like(ids), torch.arange(s.images), [], 0)
    seconds, parts = [], []
    for step in range(s.steps + 1):
        watch.seconds = dict.fromkeys(PARTS, 0.0)
        timing.synchronise(device)
        started = time.perf_counter()
        forward_backward(towers, batch, Contrastive(0.1), accelerator, s.chunk_size, (0, step))
        with watch.part("optimiser"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
        parts.append(watch.seconds)
    return {"seconds": seconds[1:], "parts": parts[1:], "peak": peak.bytes(), "libraries": peak.before,
            "trained": sum(p.numel() for p in learning)}  # fmt: skip


def show(s: Settings, found: dict[str, list[dict[str, Any]]], device: torch.device, argv: Sequence[str] | None) -> str:
    """The table: ratios first."""
    base_time = base_peak = None
    rows = []
    for name, rounds in found.items():
        seconds = statistics.median(t for r in rounds for t in r["seconds"])
        peak = statistics.median(r["peak"] for r in rounds)
        base_time, base_peak = base_time or seconds, base_peak or peak
        parts = {p: statistics.median(one[p] for r in rounds for one in r["parts"]) for p in PARTS}
        rest = max(0.0, seconds - sum(parts.values()))
        rows.append([
            name, f"{seconds / base_time:.2f}", f"{peak / base_peak:.2f}", f"{s.images / seconds:.2f}",
            f"{seconds:.2f}", f"{peak / 2**30:.2f}", f"{rounds[0]['trained'] / 1e6:.1f}",
            *(f"{value:.2f}" for value in (*parts.values(), rest)),
        ])  # fmt: skip
    columns = ("step", "time ratio", "memory ratio", "images/s", "s/step", "peak GiB", "trained M", *PARTS, "rest")
    chunks = f"chunks of {s.chunk_size}" if s.chunk_size else "one piece"
    libraries = statistics.median(r["libraries"] for rounds in found.values() for r in rounds)
    title = (
        f"{s.model}, {s.images} images a step in {chunks}, {s.tokens} tokens, {s.precision}; {timing.machine(device)}"
        + (f"; libraries: {libraries / 2**30:.2f} GiB, not counted" if libraries else "")
    )  # fmt: skip
    return "\n".join([timing.command(__file__, argv), "", title, "", timing.markdown(columns, rows)])


def main(argv: Sequence[str] | None = None) -> None:
    s = tyro.cli(Settings, args=argv, description=__doc__, use_underscores=False)
    if s.tiny:
        s = replace(s, model="tiny", images=4, chunk_size=2, tokens=8, rounds=1, steps=1)
    device = timing.pick_device(s.device)
    s = replace(s, device=device.type, images=s.images or (64 if device.type == "cuda" else 4))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for _ in range(s.rounds):
        for name in VARIANTS:
            found[name].append(timing.in_child(measure, s, name))
    text = show(s, found, device, argv)
    print(text)
    if s.output is not None:
        timing.append(text, s.output)


if __name__ == "__main__":
    main()
