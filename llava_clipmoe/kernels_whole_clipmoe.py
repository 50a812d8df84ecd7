"""Whole experts on a GPU: a grouped product per projection, everything else fused. They must equal `Experts`.

Token-expert pairs are sorted by expert, so that each expert's rows lie together. Where torch's grouped_mm has a fused
kernel it does the products, else `_grouped_kernel` here (fp16, fp32, and cards before Hopper). Copied beside the
weights of a saved model. See `kernels_clipmoe` for how to read a kernel.

Shape suffixes:  N tokens   D width   H FFN width   E experts   K experts per token   M = N*K token-expert pairs
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .common_clipmoe import grouped_mm_pays
from .kernels_base_clipmoe import (
    _WIDE,
    Sorted,
    _activate,
    _activate_and_slope,
    _dot,
    call,
    find_tile,
    launch,
    refuse_experts,
    sort_experts,
    tl,
    triton,
)
from .kernels_dense_clipmoe import bias_act
from .kernels_pack_clipmoe import PackedFFN

FEW_TILES = 132  # one for each multiprocessor of an H100: with fewer large tiles, small ones
GROUP = 8  # tiles of rows that go over the weights together: what they read is then still in the card's cache

# --------------------------------------------------------------------------------------------------- grouped product


@triton.jit
def _my_rows(ENDS, tile, m, E: tl.constexpr, BM: tl.constexpr):
    """-> expert of this tile of rows (E where there is none), its first row, and where the expert's rows end.

    No tile spans two experts, and how many tiles an expert has is known to the device alone: so the grid has as many as
    there can be, and each program finds out here which one it is.
    """
    expert = tl.arange(0, _WIDE)
    ends = tl.load(ENDS + expert, mask=expert < E, other=m)
    starts = tl.load(ENDS + expert - 1, mask=(expert > 0) & (expert < E), other=0)
    starts = tl.where(expert < E, starts, m)
    tiles = (ends - starts + BM - 1) // BM
    tiles_until = tl.cumsum(tiles, 0)
    e = tl.minimum(tl.sum((tiles_until <= tile).to(tl.int32), axis=0), E)
    mine = expert == e
    first_tile = tl.sum(tl.where(mine, tiles_until - tiles, 0), axis=0)
    start = tl.sum(tl.where(mine, starts, 0), axis=0) + (tile - first_tile) * BM
    return e, start, tl.sum(tl.where(mine, ends, 0), axis=0)


@triton.jit
def _grouped_kernel(A, ORDER, ENDS, W, BIAS, OUT, m, tiles, cols, inner, step_e, step_col, step_inner, E: tl.constexpr,
                    K: tl.constexpr, GATHER: tl.constexpr, ACTIVATE: tl.constexpr, QUICK: tl.constexpr,
                    BIG: tl.constexpr, EVEN_COLS: tl.constexpr, EVEN_INNER: tl.constexpr, GROUP_ROWS: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """One tile [BM,BN] of OUT = A @ W_e^T, all experts with their own pairs; with ACTIVATE act(A @ W_e^T + bias_e).

    GATHER: the rows of A are tokens, not sorted pairs. step_e, step_col, step_inner: strides of W, which may be read
    transposed. BIG: positions in A need 64 bits. EVEN_*: no tile hangs over that edge.
    """
    blocks = tl.cdiv(cols, BN)  # neighbours: GROUP_ROWS tiles of rows, then the same ones at the next columns
    group = tl.program_id(0) // (GROUP_ROWS * blocks)
    height = tl.minimum(tiles - group * GROUP_ROWS, GROUP_ROWS)
    in_group = tl.program_id(0) % (GROUP_ROWS * blocks)
    e, start, end = _my_rows(ENDS, group * GROUP_ROWS + in_group % height, m, E, BM)
    c = (in_group // height) * BN + tl.arange(0, BN)
    if e < E:
        row = start + tl.arange(0, BM)
        real = row < end
        source = tl.where(real, row, start)  # rows past the end read what is there, and are not stored
        if GATHER:
            source = tl.load(ORDER + source) // K
        if BIG:
            source = source.to(tl.int64)
        weight = W + e.to(tl.int64) * step_e
        sums = tl.zeros((BM, BN), tl.float32)
        for i0 in range(0, inner, BK):
            i = i0 + tl.arange(0, BK)
            a_place = A + source[:, None] * inner + i[None, :]
            w_place = weight + i[:, None] * step_inner + c[None, :] * step_col
            if EVEN_INNER:
                a = tl.load(a_place)
            else:
                a = tl.load(a_place, mask=i[None, :] < inner, other=0.0)
            if EVEN_INNER and EVEN_COLS:
                w = tl.load(w_place)
            else:
                w = tl.load(w_place, mask=(i[:, None] < inner) & (c[None, :] < cols), other=0.0)
            sums = _dot(a, w, sums)
        if ACTIVATE:
            sums += tl.load(BIAS + e * cols + c, mask=c < cols, other=0.0).to(tl.float32)[None, :]
            sums = _activate(sums, QUICK)
        place = OUT + row.to(tl.int64)[:, None] * cols + c[None, :]
        tl.store(place, sums.to(OUT.dtype.element_ty), mask=real[:, None] & (c[None, :] < cols))


class Pairs(NamedTuple):
    """The token-expert pairs of a batch."""

    sorted: Sorted
    experts: torch.Tensor  # [N,K]

    def tokens(self) -> torch.Tensor:
        """The token of each sorted pair [M]."""
        return self.sorted.order // self.experts.shape[1]


def uses_grouped_mm(x: torch.Tensor) -> bool:
    """Whether torch's grouped_mm does the products of `whole_ffn`, or the kernel here."""
    return grouped_mm_pays(x)


def _product(
    pairs: Pairs, a: torch.Tensor, weight: torch.Tensor, gather: bool = False, bias=None, quick: bool | None = None
) -> torch.Tensor:
    """Rows [N or M, inner] times their expert's weight [E,cols,inner] (of any strides) -> [M,cols], sorted by expert.

    gather: the rows are tokens, not sorted pairs. With bias [E,cols] and quick: act(product + bias).
    """
    if not uses_grouped_mm(a):
        return grouped(pairs, a, weight, gather, bias, quick)
    if gather:
        a = a.index_select(0, pairs.tokens())
    out = F.grouped_mm(a, weight.transpose(1, 2), offs=pairs.sorted.ends)
    return out if bias is None else bias_act(out, bias, quick, out=out, ends_E=pairs.sorted.ends)


def grouped_kind(m: int, cols: int, like: torch.Tensor) -> str:
    """Which line of the table of tiles a grouped product of m rows and this many columns takes."""
    tile = find_tile("grouped", like)
    few = triton.cdiv(m, tile.rows) * triton.cdiv(cols, tile.cols) < FEW_TILES
    return "grouped, few rows" if few else "grouped"


def grouped(pairs, a, weight, gather=False, bias=None, quick=None, kind=None) -> torch.Tensor:
    """`_product` by the kernel here. kind: of tile, else by size."""
    (e, cols, inner), m = weight.shape, len(pairs.sorted.order)
    tile = find_tile(kind or grouped_kind(m, cols, a), a)
    out = a.new_empty(m, cols)
    tiles = triton.cdiv(m, tile.rows) + e - 1 if m else 0  # each expert may have a last tile that is not full
    pointers = (a, pairs.sorted.order, pairs.sorted.ends, weight, weight if bias is None else bias, out)
    sizes = (m, tiles, cols, inner, *weight.stride())
    constants = {"E": e, "K": pairs.experts.shape[1], "GROUP_ROWS": GROUP}
    constants |= {"GATHER": gather, "ACTIVATE": bias is not None, "QUICK": bool(quick), "BIG": a.numel() >= 2**31}
    constants |= {"EVEN_COLS": cols % tile.cols == 0, "EVEN_INNER": inner % tile.inner == 0}
    constants |= {"BM": tile.rows, "BN": tile.cols, "BK": tile.inner}
    launch(_grouped_kernel, (tiles * triton.cdiv(cols, tile.cols),), tile, a, *pointers, *sizes, **constants)
    return out


@triton.jit
def _combine_kernel(Y, PLACES, EXPERTS, WEIGHTS, BIAS, OUT, d, E: tl.constexpr, K: tl.constexpr, WEIGH: tl.constexpr,
                    BN: tl.constexpr):  # fmt: skip
    """One token: OUT = sum over its K experts of w_e (y_e + bias_e), y_e where the sort put it. Not WEIGH: of y_e."""
    token = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for k in tl.static_range(K):
        place = tl.load(PLACES + token * K + k).to(tl.int64)
        y = tl.load(Y + place * d + c, mask=c < d, other=0.0).to(tl.float32)
        if WEIGH:
            e = tl.load(EXPERTS + token * K + k)
            bias = tl.load(BIAS + e * d + c, mask=c < d, other=0.0).to(tl.float32)
            y = tl.load(WEIGHTS + token * E + e) * (y + bias)
        total += y
    tl.store(OUT + token * d + c, total.to(OUT.dtype.element_ty), mask=c < d)


def _combine(pairs: Pairs, y_MD: torch.Tensor, weights_NE=None, bias_ED=None) -> torch.Tensor:
    """Sorted pairs' results -> tokens [N,D]: weighted, with their expert's bias, or (without these) just summed."""
    (n, k), d, tile = pairs.experts.shape, y_MD.shape[1], find_tile("rows", y_MD)
    out_ND = y_MD.new_empty(n, d)
    weigh = weights_NE is not None
    weights, bias, e = (weights_NE, bias_ED, weights_NE.shape[1]) if weigh else (y_MD, y_MD, 1)
    pointers = (y_MD, pairs.sorted.places, pairs.experts, weights, bias, out_ND)
    grid, constants = (n, triton.cdiv(d, tile.cols)), {"E": e, "K": k, "WEIGH": weigh, "BN": tile.cols}
    launch(_combine_kernel, grid, tile, y_MD, *pointers, d, **constants)
    return out_ND


# ------------------------------------------------------------------------------------------------------- whole experts


def whole_ffn(
    packed: PackedFFN, x_ND: torch.Tensor, weights_NE: torch.Tensor, experts_NK: torch.Tensor
) -> torch.Tensor:
    """`Experts`: [N,D] -> [N,D]. Weights and experts as `route` gives them. Gradients: of x and of the weights, none of
    any expert."""
    refuse_experts(len(packed.weight1))
    return call(_WholeFFN, x_ND.to(packed.weight1.dtype), weights_NE, experts_NK, packed)


class _WholeFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weights_NE, experts_NK, packed):
        x_ND, weights_NE, experts_NK = x_ND.contiguous(), weights_NE.contiguous(), experts_NK.contiguous()
        pairs = Pairs(sort_experts(experts_NK, len(packed.weight1)), experts_NK)
        ctx.save_for_backward(x_ND, weights_NE, experts_NK, *pairs.sorted)
        ctx.packed = packed
        h_MH = _product(pairs, x_ND, packed.weight1, gather=True, bias=packed.bias1, quick=packed.quick)
        return _combine(pairs, _product(pairs, h_MH, packed.weight2), weights_NE, packed.bias2)

    @staticmethod
    def backward(ctx, out_grad):
        x_ND, weights_NE, experts_NK, *places = ctx.saved_tensors
        packed, pairs, out_grad = ctx.packed, Pairs(Sorted(*places), experts_NK), out_grad.contiguous()
        t_MH = _product(pairs, x_ND, packed.weight1, gather=True)  # again, and kept by nobody
        h_grad_MH = _product(pairs, out_grad, packed.weight2.transpose(1, 2), gather=True)
        bias_grad_NE = out_grad.float() @ packed.bias2.float().t()
        weights_grad_NE = _whole_middle_grad(pairs, t_MH, packed, h_grad_MH, weights_NE, bias_grad_NE)
        x_grad_MD = _product(pairs, t_MH, packed.weight1.transpose(1, 2))
        return _combine(pairs, x_grad_MD), weights_grad_NE, None, None


@triton.jit
def _whole_back_kernel(T, BIAS, H_GRAD, ORDER, EXPERTS, WEIGHTS, BIAS_GRAD, WEIGHTS_GRAD, hidden, E: tl.constexpr,
                       K: tl.constexpr, QUICK: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """One pair: T becomes its own gradient, and the gradient of the pair's weight is the sum of act(t + bias) times
    h's, and what came through the bias of fc2."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(ORDER + row).to(tl.int64)
    e = tl.load(EXPERTS + pair)
    place = (pair // K) * E + e
    weight = tl.load(WEIGHTS + place)
    total = tl.zeros((BN,), tl.float32)
    for c0 in range(0, hidden, BN):
        c = c0 + tl.arange(0, BN)
        t = tl.load(T + row * hidden + c, mask=c < hidden, other=0.0).to(tl.float32)
        t += tl.load(BIAS + e * hidden + c, mask=c < hidden, other=0.0).to(tl.float32)
        h_grad = tl.load(H_GRAD + row * hidden + c, mask=c < hidden, other=0.0).to(tl.float32)
        h, slope = _activate_and_slope(t, QUICK)
        total += h * h_grad
        tl.store(T + row * hidden + c, (weight * h_grad * slope).to(T.dtype.element_ty), mask=c < hidden)
    tl.store(WEIGHTS_GRAD + place, tl.load(BIAS_GRAD + place) + tl.sum(total, axis=0))


def _whole_middle_grad(pairs, t_MH, packed, h_grad_MH, weights_NE, bias_grad_NE) -> torch.Tensor:
    """Between the products of the backward pass: t_MH becomes its gradient, -> gradient of the weights [N,E]."""
    (m, hidden), tile = t_MH.shape, find_tile("rows", t_MH)
    weights_grad_NE = torch.zeros_like(weights_NE)
    places = (pairs.sorted.order, pairs.experts)
    pointers = (t_MH, packed.bias1, h_grad_MH, *places, weights_NE, bias_grad_NE, weights_grad_NE)
    constants = {"E": weights_NE.shape[1], "K": pairs.experts.shape[1], "QUICK": packed.quick, "BN": tile.cols}
    launch(_whole_back_kernel, (m,), tile, t_MH, *pointers, hidden, **constants)
    return weights_grad_NE
