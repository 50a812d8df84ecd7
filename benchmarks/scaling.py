"""How the cost of one block grows with experts, experts a token, image size and batch: MoE and delta against dense.

    python benchmarks/scaling.py --output benchmarks/scaling.md --plot benchmarks/scaling.svg
    python benchmarks/scaling.py --tiny

One encoder block of ViT-L (width 1024) with random weights and tokens, without a graph, as a tower runs it. One thing
is varied at a time, from 4 experts, top 2, 336 px, batch 1. The three blocks of a point are timed in turns; ratios are
against the dense block of the same point. `operations` is what the ratio would be if every operation cost the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Literal

import timing
import torch
import tyro
from tower_speed import tower_macs
from tower_variants import DTYPES, FULL, TINY

from llava_clipmoe.configuration_clipmoe import CLIPMoEVisionConfig
from llava_clipmoe.files import atomic_file
from llava_clipmoe.modeling_clipmoe import CLIPMoEVisionModel


@dataclass(frozen=True)
class Settings:
    device: timing.Device = "auto"
    dtype: Literal["fp32", "bf16"] = "bf16"
    experts: tuple[int, ...] = (2, 4, 8, 16)
    top_k: tuple[int, ...] = (1, 2, 3, 4)
    image_size: tuple[int, ...] = (224, 336, 448, 672)
    batch: tuple[int, ...] = (1, 2, 4, 8)
    rank: int = 64
    rounds: int = 9
    tiny: bool = False
    """Width 64 and two values of each: does the program work?"""
    plot: Path | None = None
    """Write the curves here (.svg or .png)."""
    output: Path | None = None
    """Append the table to this file."""


@dataclass(frozen=True)
class Point:
    experts: int = 4
    top_k: int = 2
    image_size: int = 336
    batch: int = 1


@dataclass(frozen=True)
class Cost:
    """Seconds of the dense block; time and operations of the others as multiples of it."""

    dense: float
    moe: float
    delta: float
    moe_operations: float
    delta_operations: float


AXES = {"experts": "experts E", "top_k": "experts a token K", "image_size": "image side (px)", "batch": "batch"}


def config_of(point: Point, kind: str, s: Settings) -> CLIPMoEVisionConfig:
    shape = {**(TINY if s.tiny else FULL), "num_hidden_layers": 1, "image_size": point.image_size}
    if kind == "dense":
        return CLIPMoEVisionConfig(**shape, num_experts=1)
    ranks = [[s.rank, s.rank]] if kind == "delta" else None
    experts = {"num_experts": point.experts, "num_experts_per_tok": point.top_k}
    return CLIPMoEVisionConfig(**shape, **experts, delta_ranks=ranks)


def measure(point: Point, s: Settings, device: torch.device) -> Cost:
    """The three blocks at one point, interleaved."""
    torch.manual_seed(0)
    configs = {kind: config_of(point, kind, s) for kind in ("dense", "moe", "delta")}
    width, tokens = configs["dense"].hidden_size, configs["dense"].num_patches + 1
    x = torch.randn(point.batch, tokens, width, device=device, dtype=DTYPES[s.dtype])
    works = {}
    for kind, config in configs.items():
        block = CLIPMoEVisionModel(config).vision_model.encoder.layers[0].to(device, DTYPES[s.dtype]).eval()
        works[kind] = lambda block=block: block(x)
    with torch.inference_mode():
        times = timing.medians(timing.interleaved(works, s.rounds, device, warm=2))
    # One block's products, without the patches' (blocks: 0).
    macs = {
        kind: tower_macs(c, kind == "delta", kind == "dense", 1) - tower_macs(c, kind == "delta", kind == "dense", 0)
        for kind, c in configs.items()
    }
    dense = times["dense"]
    return Cost(dense, times["moe"] / dense, times["delta"] / dense,
                macs["moe"] / macs["dense"], macs["delta"] / macs["dense"])  # fmt: skip


def grid(s: Settings) -> dict[str, list[Point]]:
    """The points of each axis; a top-K larger than E cannot be."""
    start = Point(image_size=28) if s.tiny else Point()
    found = {}
    for axis in AXES:
        values = {"image_size": (28, 56)}.get(axis, getattr(s, axis)[:2]) if s.tiny else getattr(s, axis)
        points = [replace(start, **{axis: value}) for value in values]
        found[axis] = [point for point in points if point.top_k <= point.experts]
    return found


def plot(costs: dict[str, list[tuple[Point, Cost]]], title: str, path: Path) -> None:
    """A panel for each axis: time as a multiple of the dense block's, and operations dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = figure.subplots(1, len(costs), sharey=True)
    for panel, (axis, found) in zip(panels, costs.items(), strict=True):
        x = [getattr(point, axis) for point, _ in found]
        for kind, colour in (("moe", "tab:orange"), ("delta", "tab:blue")):
            panel.plot(x, [getattr(cost, kind) for _, cost in found], "o-", color=colour, label=f"{kind}: time")
            operations = [getattr(cost, f"{kind}_operations") for _, cost in found]
            panel.plot(x, operations, "--", color=colour, alpha=0.6, label=f"{kind}: operations")
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set_xlabel(AXES[axis])
        panel.set_xticks(x)
    panels[0].set_ylabel("multiple of the dense block")
    panels[0].legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    drawn = BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix("."))
    with atomic_file(path) as temporary:
        temporary.write_bytes(drawn.getvalue())


def main(argv: Sequence[str] | None = None) -> None:
    s = tyro.cli(Settings, args=argv, description=__doc__, use_underscores=False)
    device = timing.pick_device(s.device)
    costs = {axis: [(p, measure(p, s, device)) for p in points] for axis, points in grid(s).items()}
    size = "one block of width 64" if s.tiny else "one block of ViT-L"
    title = f"{size}, {s.dtype}, rank {s.rank}; {timing.machine(device)}; medians of {s.rounds} interleaved rounds"
    rows = [
        [f"{AXES[axis]} = {getattr(point, axis)}", *(f"{value:.2f}" for value in (c.moe, c.moe_operations, c.delta,
         c.delta_operations)), f"{1000 * c.dense:.2f}"]
        for axis, found in costs.items() for point, c in found
    ]  # fmt: skip
    columns = ("varied", "MoE : dense", "operations", "delta : dense", "operations", "dense ms")
    text = "\n".join([timing.command(__file__, argv), "", title, "", timing.markdown(columns, rows)])
    print(text)
    if s.plot is not None:
        plot(costs, title, s.plot)
    if s.output is not None:
        timing.append(text, s.output)


if __name__ == "__main__":
    main()
