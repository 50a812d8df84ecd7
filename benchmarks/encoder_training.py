"""Speed, memory and parts of a training step: an MCL stage and a router step against the dense model trained whole.

    python benchmarks/encoder_training.py                       (ViT-L/14@336; minutes on 2 cores, seconds on a GPU)
    python benchmarks/encoder_training.py --images 8 --chunk-size 2
    python benchmarks/encoder_training.py --images 160 --chunk-size 10 auto     (a table each, and their images/s)
    python benchmarks/encoder_training.py --model small         (the quick start's CLIP)
    python benchmarks/encoder_training.py --tiny

Every variant runs the trainer's own step (`train_encoder.training.step.forward_backward` and AdamW) on the same random
images and captions, with the same batch and chunks, in a process of its own so that peak memory is its own; variants
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
from tower_variants import fast_path

from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig

VARIANTS = {
    "dense, all parameters": ("dense", "all", True),
    "dense, all parameters, no kernels": ("dense", "all", False),
    "MCL step (FFNs only)": ("dense", "ffn", True),
    "router step (4 experts, top 2)": ("moe", "router", True),
    "router step, no kernels": ("moe", "router", False),
}
"""Name in the table -> model, what it trains, and whether with the GPU's kernels."""
NO_KERNELS = [name for name, (_, _, fast) in VARIANTS.items() if not fast]
ChunkSize = int | Literal["auto"]
NOT_THERE = "`auto` is not there in this version"
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
    chunk_size: tuple[ChunkSize, ...] = ()
    """Gradient caching with chunks of so many images, a table for each of them; auto: as many as the card holds. None
    given: the plain step."""
    activation_checkpointing: bool = False
    without_kernels: bool = True
    """On a GPU also the steps without our kernels (LLAVA_CLIPMOE_FAST=0)."""
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


def measure(s: Settings, variant: str, chunk_size: ChunkSize | None) -> dict[str, Any]:
    """One variant, in this process: seconds of each timed step and of its parts, and peak memory."""
    kind, trained, fast = VARIANTS[variant]
    with fast_path(fast), timing.heard() as said:
        return {**steps(s, kind, trained, chunk_size), "said": said}


def steps(s: Settings, kind: str, trained: str, chunk_size: ChunkSize | None) -> dict[str, Any]:
    from accelerate import Accelerator

    from llava_clipmoe.modeling_clipmoe import CLIPMoEModel
    from llava_clipmoe.upcycling import is_ffn, is_router_or_gate, moe_config
    from train_encoder.data.dataset import Batch
    from train_encoder.training.losses import Contrastive
    from train_encoder.training.memory import keep_freed_memory
    from train_encoder.training.step import TwoTowers, forward_backward

    keep_freed_memory()
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
    ids = torch.randint(1, 49000, (s.images, s.tokens))
    ids[:, -1] = 49407
    pixels = torch.randint(0, 256, (s.images, 3, side, side), dtype=torch.uint8)
    batch = Batch(pixels, ids, torch.arange(s.images), [], 0)

    def one_step(part: Batch, chunk: int | None, number: int = 0) -> None:
        forward_backward(towers, part, Contrastive(0.1), accelerator, chunk, (0, number))

    chunk = chunk_size
    if chunk_size == "auto":
        chunk = largest_chunk_of(s, batch, one_step, optimizer, device)
        peak = timing.Peak(device)  # that of the search does not count
    watch = Stopwatch(device)
    towers.forward = watch.wrap(towers.forward, lambda: "forward" if torch.is_grad_enabled() else "encode")
    accelerator.backward = watch.wrap(accelerator.backward, lambda: "backward")
    seconds, parts = [], []
    for step in range(s.steps + 1):
        watch.seconds = dict.fromkeys(PARTS, 0.0)
        timing.synchronise(device)
        started = time.perf_counter()
        one_step(batch, chunk, step)
        with watch.part("optimiser"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
        parts.append(watch.seconds)
    return {"seconds": seconds[1:], "parts": parts[1:], "peak": peak.bytes(), "libraries": peak.before,
            "trained": sum(p.numel() for p in learning), "chunk": min(chunk or s.images, s.images)}  # fmt: skip


def largest_chunk_of(
    s: Settings, batch: Any, one_step: Callable[..., None], optimizer: torch.optim.Optimizer, device: torch.device
) -> int:
    """What `--engine.chunk-size auto` finds for such a step (`train_encoder.training.chunks`); all images where nothing
    can be measured. Raises ImportError where this version has no `auto`."""
    from train_encoder.training.chunks import gauge_of, largest_chunk

    gauge = gauge_of(device)
    if gauge is None:
        return s.images
    one_step(batch_of(batch, 1), None)  # makes the moments, which are there in every later step, and warms up
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    def trial(chunk: int) -> int | None:
        try:
            return gauge.peak(lambda: one_step(batch_of(batch, min(2 * chunk, s.images)), chunk))
        finally:
            optimizer.zero_grad(set_to_none=True)

    return largest_chunk(s.images, gauge.limit, trial)[0]


def batch_of(batch: Any, images: int) -> Any:
    """The first images of a batch, with their captions."""
    first = slice(images)
    return replace(
        batch, pixel_values=batch.pixel_values[first], input_ids=batch.input_ids[first], rows=batch.rows[first]
    )


Rounds = list[dict[str, Any]]
"""What `measure` gave for one variant, round by round."""


def rounds_of(s: Settings, chunk_size: ChunkSize | None, device: torch.device) -> dict[str, Rounds | str]:
    """Every variant with chunks of this size, in turns; in words what stopped one."""
    names = [name for name in VARIANTS if name not in NO_KERNELS or (device.type == "cuda" and s.without_kernels)]
    found: dict[str, Rounds | str] = {name: [] for name in names}
    for number in range(s.rounds):
        for name in names[:: -1 if number % 2 else 1]:
            if isinstance(found[name], str):
                continue
            try:
                found[name].append(timing.in_child(measure, s, name, chunk_size))
            except Exception as error:  # the others still count; the table says what happened
                missing = isinstance(error, ModuleNotFoundError) and error.name == "train_encoder.training.chunks"
                found[name] = NOT_THERE if missing else timing.why_not(error)
    return found


def said_in(rounds: Rounds | str) -> set[str]:
    """What the package warned of."""
    return set() if isinstance(rounds, str) else {line for one in rounds for line in one["said"]}


def median_of(rounds: Rounds, key: str) -> float:
    values = (value for one in rounds for value in (one[key] if isinstance(one[key], list) else [one[key]]))
    return statistics.median(values)


def table(s: Settings, found: dict[str, Rounds | str]) -> str:
    """Ratios first; against the first row."""
    base, rows = next(iter(found.values())), []
    for name, rounds in found.items():
        if isinstance(rounds, str):
            rows.append([name, rounds, *[""] * (7 + len(PARTS))])
            continue
        seconds, peak = median_of(rounds, "seconds"), median_of(rounds, "peak")
        parts = {p: statistics.median(one[p] for r in rounds for one in r["parts"]) for p in PARTS}
        rest = max(0.0, seconds - sum(parts.values()))
        ratios = ["", ""]
        if not isinstance(base, str):
            ratios = [f"{seconds / median_of(base, 'seconds'):.2f}", f"{peak / median_of(base, 'peak'):.2f}"]
        rows.append([
            name, *ratios, f"{s.images / seconds:.2f}", f"{seconds:.2f}", f"{peak / 2**30:.2f}",
            f"{rounds[0]['trained'] / 1e6:.1f}", rounds[0]["chunk"],
            *(f"{value:.2f}" for value in (*parts.values(), rest)),
        ])  # fmt: skip
    columns = ("step", "time ratio", "memory ratio", "images/s", "s/step", "peak GiB", "trained M", "chunk")
    return timing.markdown((*columns, *PARTS, "rest"), rows)


def title(s: Settings, found: dict[str, Rounds | str], chunk_size: ChunkSize | None, device: torch.device) -> str:
    chunks = f"chunks of {chunk_size}" if chunk_size else "one piece"
    libraries = [one["libraries"] for rounds in found.values() if not isinstance(rounds, str) for one in rounds]
    most = max(libraries, default=0) / 2**30
    return (
        f"{s.model}, {s.images} images a step in {chunks}, {s.tokens} tokens, {s.precision}; {timing.machine(device)}"
        + (f"; libraries: {most:.2f} GiB, not counted" if most else "")
    )


def by_chunk(s: Settings, found: dict[ChunkSize, dict[str, Rounds | str]]) -> str:
    """Images/s of every step with chunks of each size, and the last size's over the first one's."""
    sizes, rows = list(found), []
    for name in found[sizes[0]]:
        speeds = [
            None if isinstance(found[size][name], str) else s.images / median_of(found[size][name], "seconds")
            for size in sizes
        ]
        known = speeds[0] is not None and speeds[-1] is not None
        rows.append([
            name, f"{speeds[-1] / speeds[0]:.2f}" if known else "",
            *("" if speed is None else f"{speed:.2f}" for speed in speeds),
        ])  # fmt: skip
    columns = [f"images/s, chunks of {size}" for size in sizes]
    return timing.markdown(("images/s", f"{sizes[-1]} over {sizes[0]}", *columns), rows)


def main(argv: Sequence[str] | None = None) -> None:
    s = tyro.cli(Settings, args=argv, description=__doc__, use_underscores=False)
    if s.tiny:
        s = replace(s, model="tiny", images=4, chunk_size=s.chunk_size or (2,), tokens=8, rounds=1, steps=1)
    device = timing.pick_device(s.device)
    s = replace(s, device=device.type, images=s.images or (64 if device.type == "cuda" else 4))
    report, found, wrong = timing.Report(s.output), {}, []
    report.add(timing.command(__file__, argv))
    for size in s.chunk_size or (None,):
        found[size] = rounds_of(s, size, device)
        report.add(title(s, found[size], size, device))
        report.add(table(s, found[size]))
        wrong += [f"{name}, {size}: {why}" for name, why in found[size].items() if str(why).startswith("failed")]
    said = {line for by_step in found.values() for rounds in by_step.values() for line in said_in(rounds)}
    if said:
        report.add("**The package said:** " + "; ".join(sorted(said)))
        wrong += sorted(said)
    if len(found) > 1:
        report.add(by_chunk(s, found))
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
