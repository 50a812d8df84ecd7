"""What all Triton kernels of a CLIP-MoE share: sizes of tiles, products, activations, the launch.

Copied beside the weights of a saved model. See `kernels_clipmoe` for how to read a kernel.
"""

import contextlib
import functools
import os
from typing import NamedTuple

import torch

try:  # not a bare import: transformers would ask everybody who loads the model for triton
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The GPU kernels need triton, which comes with torch for CUDA. Use the loop instead.") from error

MAX_EXPERTS = 16
MAX_RANK = 256
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
_WIDE = tl.constexpr(MAX_EXPERTS)  # experts are one tile of this width; those that do not exist are masked

# ------------------------------------------------------------------------------------------------------------- tiles


class Tile(NamedTuple):
    """How much of the work one program does, and with what: the only numbers to tune."""

    rows: int  # tokens, or token-expert pairs
    cols: int  # columns of the result
    inner: int  # columns of the operands that are multiplied in one step; of `delta`, experts at a time
    warps: int
    stages: int  # steps whose operands are fetched ahead


# By kernel and by bytes of a number (2: fp16, bf16; 4: fp32): the KiB of shared memory that a tile needs, best first.
# Of 2 bytes and rank 64: the fastest of those that were tried on an H100 (benchmarks/kernel_tiles.md). The others are
# counted from registers and shared memory (tests/test_kernels.py), never measured. A 4090 gives one program 99 KiB, an
# A100 163, an H100 227. benchmarks/kernel_tiles.py tries others.
TILES = {
    ("route", 2): {0: Tile(16, 16, 256, 4, 2)},
    ("route", 4): {0: Tile(16, 16, 64, 4, 2)},
    ("delta of rank 64", 2): {227: Tile(128, 64, 2, 8, 2), 0: Tile(64, 16, 2, 4, 3)},
    ("delta of rank 64, few tokens", 2): {0: Tile(32, 64, 2, 4, 2)},
    ("delta of rank 128", 2): {227: Tile(128, 32, 2, 8, 2), 0: Tile(64, 32, 1, 4, 2)},
    ("delta of rank 256", 2): {227: Tile(64, 32, 1, 8, 2), 0: Tile(32, 16, 1, 4, 2)},
    ("delta back of rank 64", 2): {227: Tile(128, 32, 2, 8, 2), 0: Tile(32, 16, 2, 2, 2)},
    ("delta back of rank 128", 2): {227: Tile(64, 32, 1, 4, 2), 0: Tile(32, 16, 1, 2, 2)},
    ("delta back of rank 256", 2): {227: Tile(64, 16, 1, 8, 2), 0: Tile(32, 16, 1, 4, 2)},
    ("delta of rank 64", 4): {0: Tile(16, 32, 2, 4, 2)},
    ("delta of rank 128", 4): {0: Tile(16, 16, 1, 4, 2)},
    ("delta of rank 256", 4): {0: Tile(16, 16, 1, 8, 1)},
    ("delta back of rank 64", 4): {0: Tile(16, 32, 1, 4, 2)},
    ("delta back of rank 128", 4): {0: Tile(16, 16, 1, 4, 2)},
    ("delta back of rank 256", 4): {0: Tile(16, 16, 1, 8, 1)},
    ("grouped", 2): {227: Tile(128, 256, 64, 8, 4), 163: Tile(128, 256, 64, 8, 3), 0: Tile(128, 128, 64, 8, 3)},
    ("grouped", 4): {0: Tile(32, 32, 32, 4, 2)},
    ("grouped, few rows", 2): {0: Tile(64, 128, 64, 4, 4)},
    ("grouped, few rows", 4): {0: Tile(32, 32, 32, 4, 2)},
    ("gate", 2): {0: Tile(64, 128, 64, 4, 3)},
    ("gate", 4): {0: Tile(32, 32, 32, 4, 2)},
    ("rows", 2): {0: Tile(1, 2048, 0, 4, 1)},  # whatever goes over rows without a product
    ("rows", 4): {0: Tile(1, 1024, 0, 4, 1)},
    ("rows back", 2): {0: Tile(32, 128, 0, 4, 1)},
    ("rows back", 4): {0: Tile(32, 128, 0, 8, 1)},
    ("sort", 8): {0: Tile(256, 2048, 0, 8, 1)},  # keys that are placed, keys that are counted in one step
}


@functools.cache
def shared_kib(device: torch.device) -> float:
    """Shared memory that one program may have on this card. Of a CPU, and where torch does not say: a 4090's."""
    given = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return getattr(given, "shared_memory_per_block_optin", 99 * 1024) / 1024


def find_tile(kind: str, like: torch.Tensor, dtype: torch.dtype | None = None) -> Tile:
    """The first in the table that fits the card of `like`."""
    tiles, room = TILES[kind, (dtype or like.dtype).itemsize], shared_kib(like.device)
    return next(tile for needed, tile in tiles.items() if needed <= room)


# ----------------------------------------------------------------------------------------------------- small helpers


@triton.jit
def _dot(a, b, sums):
    """sums + a @ b, summed in fp32 and, for fp32 operands, multiplied in fp32 too (no TF32)."""
    if _INTERPRETED and a.dtype == tl.bfloat16:  # the interpreter would multiply the bits
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _block(START, row, column, step, rows_in, columns_in, ALL_ROWS: tl.constexpr, ALL_COLUMNS: tl.constexpr):
    """The tile [row, column] of a matrix whose rows are `step` apart; 0 where there is none. The two constants leave
    out masks that would always be true."""
    place = START + row[:, None] * step + column[None, :]
    if ALL_ROWS and ALL_COLUMNS:
        tile = tl.load(place)
    elif ALL_COLUMNS:
        tile = tl.load(place, mask=rows_in[:, None], other=0.0)
    elif ALL_ROWS:
        tile = tl.load(place, mask=columns_in[None, :], other=0.0)
    else:
        tile = tl.load(place, mask=rows_in[:, None] & columns_in[None, :], other=0.0)
    return tile


@triton.jit
def _activate(t, QUICK: tl.constexpr):
    """OpenAI's quick_gelu, else the exact gelu."""
    if QUICK:
        result = t * tl.sigmoid(1.702 * t)
    else:
        result = 0.5 * t * (1.0 + tl.erf(t * 0.7071067811865476))
    return result


@triton.jit
def _activate_and_slope(t, QUICK: tl.constexpr):
    """The activation and its derivative, which share what is dear."""
    if QUICK:
        s = tl.sigmoid(1.702 * t)
        result = t * s
        slope = s * (1.0 + 1.702 * t * (1.0 - s))
    else:
        half = 0.5 * (1.0 + tl.erf(t * 0.7071067811865476))
        result = t * half
        slope = half + t * 0.3989422804014327 * tl.exp(-0.5 * t * t)
    return result, slope


def launch(kernel, grid: tuple[int, ...], tile: Tile, like: torch.Tensor, *arguments, **constants) -> None:
    """Start one program for each tile of `grid`, on the card of `like`; none where there is nothing to do."""
    if 0 in grid:
        return
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[grid](*arguments, **constants, num_warps=tile.warps, num_stages=tile.stages)


def call(function, x: torch.Tensor, *arguments):
    """An autograd function outside of autocast, which would change the dtype of its matrix products."""
    with torch.autocast(x.device.type, enabled=False):
        return function.apply(x, *arguments)


def refuse_experts(number: int) -> None:
    if number > MAX_EXPERTS:
        raise ValueError(f"the kernels go up to {MAX_EXPERTS} experts, this model has {number}: use the loop.")


# -------------------------------------------------------------------------------------------------------------- sort


@triton.jit
def _keys(EXPERTS, place, n, K: tl.constexpr, SETS: tl.constexpr):
    """Small numbers to sort by: experts; with SETS each token's set of K experts, one bit an expert."""
    if SETS:
        key = tl.zeros_like(place)
        for k in tl.static_range(K):
            key |= 1 << tl.load(EXPERTS + place * K + k, mask=place < n, other=0).to(tl.int32)
    else:
        key = tl.load(EXPERTS + place, mask=place < n, other=0).to(tl.int32)
    return tl.where(place < n, key, -1)  # -1 is counted nowhere


@triton.jit
def _sort_kernel(
    EXPERTS, ORDER, PLACES, ENDS, n, bins, K: tl.constexpr, SETS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Stable counting sort of keys 0 .. 15. ORDER: which key stands where. PLACES: where each key went. ENDS [bins].

    Each program places BM keys, and counts for itself what the others hold: everything in one launch.
    """
    expert = tl.arange(0, _WIDE)
    first = tl.program_id(0) * BM
    total = tl.zeros((_WIDE,), tl.int32)
    before = tl.zeros((_WIDE,), tl.int32)  # of each key, those that stand before mine in the input
    for start in range(0, n, BN):
        place = start + tl.arange(0, BN)
        same = _keys(EXPERTS, place, n, K, SETS)[:, None] == expert[None, :]
        total += tl.sum(same.to(tl.int32), axis=0)
        before += tl.sum((same & (place[:, None] < first)).to(tl.int32), axis=0)
    ends = tl.cumsum(total, 0)
    place = first + tl.arange(0, BM)
    mine = (_keys(EXPERTS, place, n, K, SETS)[:, None] == expert[None, :]).to(tl.int32)
    target = tl.sum(mine * (ends - total + before + tl.cumsum(mine, 0) - 1), axis=1)
    tl.store(ORDER + target, place, mask=place < n)
    tl.store(PLACES + place, target, mask=place < n)
    tl.store(ENDS + expert, ends, mask=(expert < bins) & (tl.program_id(0) == 0))


class Sorted(NamedTuple):
    """Token-expert pairs in the order of their experts (pair number p is token p // K's choice p % K), or tokens in
    the order of their sets of experts. All int32."""

    order: torch.Tensor  # which one stands where
    places: torch.Tensor  # where each one stands
    ends: torch.Tensor  # where each expert's (or set's) end


def sort_experts(experts_NK: torch.Tensor, bins: int, sets: bool = False) -> Sorted:
    """Sort pairs by their expert, or tokens by their set of experts (`sets`); bins: how many there can be, at most 16.
    Stable; one launch, no wait."""
    experts_NK = experts_NK.contiguous()
    n, tile = experts_NK.shape[0] if sets else experts_NK.numel(), find_tile("sort", experts_NK)
    order, places = torch.empty(2, n, device=experts_NK.device, dtype=torch.int32)
    ends = torch.zeros(bins, device=experts_NK.device, dtype=torch.int32)
    grid = (triton.cdiv(n, tile.rows),)
    constants = {"K": experts_NK.shape[1], "SETS": sets, "BM": tile.rows, "BN": tile.cols}
    launch(_sort_kernel, grid, tile, experts_NK, experts_NK, order, places, ends, n, bins, **constants)
    return Sorted(order, places, ends)
