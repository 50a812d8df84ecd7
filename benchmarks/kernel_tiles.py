"""Times of the GPU kernels with several sizes of tiles, beside what plain torch takes. Prints a table in Markdown.

    python benchmarks/kernel_tiles.py --output benchmarks/kernel_tiles.md

For whoever has a card on which nobody has tried them: the tiles in `llava_clipmoe/kernels_base_clipmoe.py` are those of
an H100 (`kernel_tiles.md`) or, for fp32 and higher ranks, counted from registers and shared memory. Sizes of
ViT-L/14@336, 4 experts of which a token takes 2, rank 64; one picture (577 tokens) and 32. All tiles are tried in fp16
with 32 pictures; elsewhere the one in use and the best of those.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timing
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console

COLUMNS = ["kernel", "dtype", "tokens", "rows, cols, inner, warps, stages", "ms", "TFLOP/s", "GB/s", ""]
TRIED = {
    "delta of rank 64": [(64, 64, 2, 4, 2), (64, 32, 2, 4, 3), (128, 32, 2, 8, 3), (64, 16, 2, 4, 3)],
    "delta of rank 64, few tokens": [(64, 64, 2, 4, 2), (128, 64, 2, 8, 2)],
    "delta back of rank 64": [(64, 32, 2, 4, 2), (64, 16, 2, 4, 2), (32, 16, 2, 2, 2)],
    "grouped": [(128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (256, 128, 64, 8, 3),
                (128, 128, 32, 4, 4)],
    "grouped, few rows": [(64, 256, 64, 4, 3), (64, 64, 64, 4, 4), (128, 128, 64, 8, 3)],
    "rows": [(1, 1024, 0, 4, 1), (1, 4096, 0, 8, 1)],
    "rows back": [(32, 256, 0, 8, 1), (8, 1024, 0, 8, 1)],
    "route": [(16, 16, 128, 4, 2), (32, 16, 128, 4, 2)],
}  # fmt: skip


@dataclass
class Arguments:
    """Which tiles are fastest on this card."""

    output: Path | None = None
    """Append the table to this file."""
    seconds: float = 80.0
    """No further tile is tried after this long (compiling is most of it)."""
    tiny: bool = False
    """Tiny sizes: with TRITON_INTERPRET=1 also without a GPU, to see that this program works. Its times say nothing."""


@dataclass
class Work:
    """One kernel (with its launch) at one size, and the arithmetic and traffic that it cannot do without."""

    kernel: str
    run: Callable[[], Any]
    flops: float
    bytes: float
    twins: dict[str, Callable[[], Any]]


@dataclass
class Sizes:
    tokens: int
    width: int = 1024
    hidden: int = 4096
    experts: int = 4
    chosen: int = 2
    rank: int = 64


def works(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Work]:
    """Random tensors, one kernel after the other, so that only one kernel's are held."""
    from llava_clipmoe import kernels_clipmoe as kernels
    from llava_clipmoe import kernels_dense_clipmoe, kernels_whole_clipmoe
    from llava_clipmoe.common_clipmoe import grouped_mm_pays, quick_gelu

    n, d, h, e, k = sizes.tokens, sizes.width, sizes.hidden, sizes.experts, sizes.chosen
    two = dtype.itemsize

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=device) / shape[-1] ** 0.5).to(dtype)

    x, router, packed = draw(n, d), draw(e, d), kernels.PackedFFN(draw(h, d), draw(h), draw(d, h), draw(d), True)
    said = kernels.route(x, router, k)
    yield Work("route", lambda: kernels.route(x, router, k), 2 * n * d * e, n * d * two,
               {"torch": lambda: F.linear(x.float(), router.float()).softmax(-1).topk(k)})  # fmt: skip

    t, grad = draw(n, h), draw(n, h)
    twin = {"torch": lambda: quick_gelu(t + packed.bias1)}
    yield Work("rows", lambda: kernels_dense_clipmoe.bias_act(t, packed.bias1, True), 0, 2 * n * h * two, twin)
    yield Work("rows back", lambda: kernels_dense_clipmoe._bias_act_back(t, packed.bias1, grad, True, True, True),
               0, 4 * n * h * two, {})  # fmt: skip

    def dense() -> torch.Tensor:
        return F.linear(quick_gelu(F.linear(x, packed.weight1, packed.bias1)), packed.weight2, packed.bias2)

    yield from delta_works(sizes, dtype, said, draw, dense)
    whole = kernels.PackedFFN(draw(e, h, d), draw(e, h), draw(e, d, h), draw(e, d), True)
    pairs = kernels_whole_clipmoe.Pairs(kernels_whole_clipmoe.sort_experts(said.experts, e), said.experts)
    rows = x.index_select(0, pairs.tokens())

    def product() -> torch.Tensor:
        return kernels_whole_clipmoe.grouped(pairs, x, whole.weight1, True, whole.bias1, True)

    fused = lambda: F.grouped_mm(rows, whole.weight1.transpose(1, 2), offs=pairs.sorted.ends)  # noqa: E731
    twins = {"grouped_mm, no bias": fused} if grouped_mm_pays(x) else {}
    kind = kernels_whole_clipmoe.grouped_kind(n * k, h, x)
    yield Work(kind, product, 2 * n * k * d * h, (n * k * (d + h) + e * d * h) * two,
               {**twins, "cuBLAS, as many rows of one expert": lambda: F.linear(rows, whole.weight1[0])})  # fmt: skip


def delta_works(sizes: Sizes, dtype: torch.dtype, said, draw, dense) -> Iterator[Work]:
    """What stands between the products of delta experts, forward and backward."""
    from llava_clipmoe import kernels_delta_clipmoe as kernels
    from llava_clipmoe.experts_delta_clipmoe import DeltaExperts
    from llava_clipmoe.kernels_pack_clipmoe import pack_delta

    n, h, k, r = sizes.tokens, sizes.hidden, sizes.chosen, sizes.rank
    config = SimpleNamespace(
        num_experts=sizes.experts, hidden_size=sizes.width, intermediate_size=h, num_hidden_layers=24,
        hidden_act="quick_gelu", expert_dropout=0.0, experts_implementation="loop",
    )  # fmt: skip
    experts = DeltaExperts(config, r, r).to(said.logits.device, dtype)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(draw(*parameter.shape))
    packed = pack_delta(experts)
    order = kernels.order_if_it_pays(said.experts, sizes.experts)
    y1, y2_grad = draw(n, len(packed.first)), draw(n, packed.second.shape[1])
    kind = kernels.tile_kind("delta", packed, y1, order)
    yield Work(kind, lambda: kernels._delta_middle(packed, y1, said.weights, order), 4 * n * k * h * r,
               (y1.numel() + y2_grad.numel()) * dtype.itemsize, {"torch: a whole dense FFN": dense})  # fmt: skip
    kind = kernels.tile_kind("delta back", packed, y1, order)
    yield Work(kind,
               lambda: kernels._delta_middle_grad(packed, y1, y2_grad, said.weights, order), 6 * n * k * h * r,
               (2 * y1.numel() + y2_grad.numel()) * dtype.itemsize, {})  # fmt: skip


@contextmanager
def tile_in_use(kernel: str, dtype: torch.dtype, tile: tuple[int, ...]) -> Iterator[None]:
    """This tile instead of the one in the table."""
    from llava_clipmoe import kernels_base_clipmoe as base

    before = base.TILES[kernel, dtype.itemsize]
    base.TILES[kernel, dtype.itemsize] = {0: base.Tile(*tile)}
    try:
        yield
    finally:
        base.TILES[kernel, dtype.itemsize] = before


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """Median time of a call, which has run before."""
    if device.type == "cuda":
        from triton.testing import do_bench_cudagraph

        return do_bench_cudagraph(run, rep=20, return_mode="median")  # for few tokens Python's launches take longer
    return 1000 * timing.medians(timing.interleaved({"it": run}, 1, device, warm=0))["it"]


def measure(work: Work, tile: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> float | None:
    """Milliseconds with this tile; None where the card has not the registers or the memory for it."""
    from triton.runtime.errors import OutOfResources

    try:
        with torch.no_grad(), tile_in_use(work.kernel, dtype, tile):
            work.run()
            return milliseconds(work.run, device)
    except OutOfResources:
        return None


def row(work: Work, dtype: torch.dtype, tokens: int, what: str, ms: float | None, note: str | None = None) -> list[str]:
    """One line of the table; note: None for what is no kernel of ours, whose work is another."""
    start = [work.kernel, str(dtype)[6:], f"{tokens:,}", what]
    if ms is None:
        return [*start, "", "", "", "too large for this card"]
    rates = [f"{work.flops / ms / 1e9:.0f}" if work.flops else "", f"{work.bytes / ms / 1e6:.0f}"]
    return [*start, f"{ms:.3f}", *(["", ""] if note is None else rates), note or ""]


def table(arguments: Arguments, device: torch.device) -> list[list[str]]:
    """All lines. The tile in use comes first, so that it is measured whatever the time."""
    from llava_clipmoe import kernels_base_clipmoe as base

    started, best, lines = time.perf_counter(), {}, []
    pictures = [(torch.float16, 32), (torch.float16, 1), (torch.bfloat16, 32), (torch.bfloat16, 1)]
    for dtype, number in pictures:
        sizes = Sizes(number, 32, 64, rank=16) if arguments.tiny else Sizes(577 * number)
        for work in works(sizes, dtype, device):
            in_use = tuple(base.find_tile(work.kernel, torch.empty(0, device=device, dtype=dtype)))
            first = work.kernel not in best
            others = TRIED[work.kernel][: 1 if arguments.tiny else None] if first else [best[work.kernel]]
            found = {in_use: measure(work, in_use, dtype, device)}
            for tile in others:
                if tile not in found and time.perf_counter() - started < arguments.seconds:
                    found[tile] = measure(work, tile, dtype, device)
            fastest = min((tile for tile in found if found[tile] is not None), key=found.get)
            best.setdefault(work.kernel, fastest)
            for tile, ms in found.items():
                notes = ["in use"] * (tile == in_use) + ["best"] * (tile == fastest)
                lines.append(row(work, dtype, sizes.tokens, ", ".join(map(str, tile)), ms, ", ".join(notes)))
            for name, twin in work.twins.items():
                with torch.no_grad():
                    twin()
                    lines.append(row(work, dtype, sizes.tokens, name, milliseconds(twin, device)))
    return lines


def main(arguments: Arguments) -> int:
    console = Console(stderr=True)
    interpreted = arguments.tiny and os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        console.print("This needs a GPU: there is none here that torch can use.", style="bold red")
        return 2
    device = timing.pick_device("auto")
    with console.status("Trying tiles ..."):
        lines = table(arguments, device)
    text = f"{timing.machine(device)}\n\n{timing.command(__file__, None)}\n\n{timing.markdown(COLUMNS, lines)}"
    print(text)
    if arguments.output is not None:
        timing.append(text, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
