"""Triton kernels for the FFNs of a CLIP-MoE on a GPU. The readable loop in `experts_clipmoe` is what they must equal.

Copied beside the weights of a saved model, and imported only where Triton is: nothing imports it at module level.

How to read a kernel, for who knows torch and not Triton: the function under `@triton.jit` is one PROGRAM, started once
for each tile of the result. `tl.program_id` says which tile is mine, `tl.arange` makes its row and column numbers, and
a pointer plus such numbers is a tile of addresses to load or to store. The `mask` keeps a tile that hangs over the edge
from touching what is not there. Sizes of tiles are `tl.constexpr`, powers of two, and at least 16 where `tl.dot` (a
product of small matrices) needs it; all are chosen in "tiles" below. Capitals are pointers and constants, small letters
values.

No forward pass here asks the device for a number (`.item()`, `.tolist()`, `nonzero`, ...): the CPU never waits, and a
CUDA graph can hold all of it. Nothing is summed by atomics: the same input gives the same bits.

`TRITON_INTERPRET=1` (set before triton is imported) runs the kernels on a CPU, slowly: that is how they are tested.

Shape suffixes:  N tokens   D width   H FFN width   E experts   K experts per token   M = N*K token-expert pairs
R1, R2 ranks of the differences of fc1 and fc2, padded to a multiple of 16
"""

import contextlib
import os
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

try:  # not a bare import: transformers would ask everybody who loads the model for triton
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The GPU kernels need triton, which comes with torch for CUDA. Use the loop instead.") from error

from .common_clipmoe import count_experts, quick_gelu
from .experts_clipmoe import Experts, Router
from .experts_delta_clipmoe import DeltaExperts

MAX_EXPERTS = 16
MAX_RANK = 256
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
_WIDE = tl.constexpr(MAX_EXPERTS)  # experts are one tile of this width; those that do not exist are masked

# ------------------------------------------------------------------------------------------------------------- tiles


class Tile(NamedTuple):
    """How much of the work one program does, and with what: the only numbers to tune."""

    rows: int  # tokens, or token-expert pairs
    cols: int  # columns of the result
    inner: int  # columns of the operands that are multiplied in one step
    warps: int
    stages: int  # steps whose operands are fetched ahead


# By kernel and by bytes of a number (2: fp16, bf16; 4: fp32). Counted from registers and shared memory, not measured,
# as are the numbers below.
TILES = {
    ("route", 2): Tile(16, 16, 128, 4, 2),
    ("route", 4): Tile(16, 16, 64, 4, 2),
    ("delta", 2): Tile(64, 64, 0, 4, 2),
    ("delta", 4): Tile(16, 32, 0, 4, 2),
    ("grouped", 2): Tile(128, 128, 64, 8, 3),
    ("grouped", 4): Tile(32, 32, 32, 4, 2),
    ("gate", 2): Tile(64, 128, 64, 4, 3),
    ("gate", 4): Tile(32, 32, 32, 4, 2),
    ("rows", 2): Tile(1, 1024, 0, 4, 1),  # whatever goes over rows without a product
    ("rows", 4): Tile(1, 1024, 0, 4, 1),
}
SHARED_BYTES = 64 * 1024  # of the operands of `delta`; a 4090 has 99 KiB for one program
ENOUGH_PROGRAMS = 256  # fewer do not fill a card: then `delta` splits H
SORT_FROM = 4096  # tokens from which sorting them by their set of experts should pay


def _tile(kind: str, dtype: torch.dtype) -> Tile:
    return TILES[kind, dtype.itemsize]


def _delta_tile(dtype: torch.dtype, rank: int) -> Tile:
    """The higher the rank, the narrower: a program holds z [rows,rank], u [rows,rank] and, in each step, two tiles
    [cols,rank]."""
    tile = _tile("delta", dtype)
    rows, cols = (tile.rows, tile.cols) if rank <= 64 else (min(tile.rows, 32), tile.cols)
    while cols > 16 and rank * (rows + 2 * cols * tile.stages) * dtype.itemsize > SHARED_BYTES:
        cols //= 2
    return tile._replace(rows=rows, cols=cols)


def _delta_split(tokens: int, hidden: int, tile: Tile) -> int:
    """Into how many parts `delta` cuts H, so that a few tokens keep a whole card busy."""
    wanted = ENOUGH_PROGRAMS // max(1, triton.cdiv(tokens, tile.rows))
    return max(1, min(wanted, 8, hidden // (4 * tile.cols)))


# ----------------------------------------------------------------------------------------------------- small helpers


@triton.jit
def _dot(a, b, sums):
    """sums + a @ b, summed in fp32 and, for fp32 operands, multiplied in fp32 too (no TF32)."""
    if _INTERPRETED and a.dtype == tl.bfloat16:  # the interpreter would multiply the bits
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _activate(t, QUICK: tl.constexpr):
    """OpenAI's quick_gelu, else the exact gelu."""
    if QUICK:
        result = t * tl.sigmoid(1.702 * t)
    else:
        result = 0.5 * t * (1.0 + tl.erf(t * 0.7071067811865476))
    return result


@triton.jit
def _activate_slope(t, QUICK: tl.constexpr):
    """Derivative of the activation."""
    if QUICK:
        s = tl.sigmoid(1.702 * t)
        result = s * (1.0 + 1.702 * t * (1.0 - s))
    else:
        density = 0.3989422804014327 * tl.exp(-0.5 * t * t)
        result = 0.5 * (1.0 + tl.erf(t * 0.7071067811865476)) + t * density
    return result


def _launch(kernel, grid: tuple[int, ...], tile: Tile, like: torch.Tensor, *arguments, **constants) -> None:
    """Start one program for each tile of `grid`, on the card of `like`; none where there is nothing to do."""
    if 0 in grid:
        return
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[grid](*arguments, **constants, num_warps=tile.warps, num_stages=tile.stages)


def _call(function, x: torch.Tensor, *arguments):
    """An autograd function outside of autocast, which would change the dtype of its matrix products."""
    with torch.autocast(x.device.type, enabled=False):
        return function.apply(x, *arguments)


def _refuse_experts(number: int) -> None:
    if number > MAX_EXPERTS:
        raise ValueError(f"the kernels go up to {MAX_EXPERTS} experts, this model has {number}: use the loop.")


# ------------------------------------------------------------------------------------------------------------ router


@triton.jit
def _route_kernel(X, W, LOGITS, WEIGHTS, EXPERTS, n, d, E: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
                  BD: tl.constexpr):  # fmt: skip
    """One tile of tokens: logits [BM,E], the softmax over the K largest [BM,E] (0 elsewhere), their numbers [BM,K]."""
    token = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    expert = tl.arange(0, _WIDE)
    logits = tl.zeros((BM, _WIDE), tl.float32)
    for start in range(0, d, BD):
        c = start + tl.arange(0, BD)
        x = tl.load(X + token[:, None] * d + c[None, :], mask=(token[:, None] < n) & (c[None, :] < d), other=0.0)
        w = tl.load(W + expert[:, None] * d + c[None, :], mask=(expert[:, None] < E) & (c[None, :] < d), other=0.0)
        if x.dtype != w.dtype:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        logits = _dot(x, tl.trans(w), logits)

    # An expert's rank is the number of those before it: with a larger logit, or with the same and a smaller number.
    # Not a number counts as the largest, as in torch.topk, so that ranks are 0 .. E-1 whatever comes.
    key = tl.where(logits == logits, logits, float("inf"))
    mine, other = key[:, :, None], key[:, None, :]
    before = (other > mine) | ((other == mine) & (expert[None, None, :] < expert[None, :, None]))
    rank = tl.sum((before & (expert[None, None, :] < E)).to(tl.int32), axis=2)
    real = expert[None, :] < E
    chosen = real & (rank < K)

    largest = tl.max(tl.where(real, logits, float("-inf")), axis=1)
    share = tl.where(chosen, tl.exp(logits - largest[:, None]), 0.0)
    weights = share / tl.sum(share, axis=1)[:, None]
    mask = (token[:, None] < n) & real
    tl.store(LOGITS + token[:, None] * E + expert[None, :], logits, mask=mask)
    tl.store(WEIGHTS + token[:, None] * E + expert[None, :], weights, mask=mask)
    for k in tl.static_range(K):
        number = tl.sum(tl.where(real & (rank == k), expert[None, :], 0), axis=1)
        tl.store(EXPERTS + token * K + k, number.to(tl.int64), mask=token < n)


class Routing(NamedTuple):
    """What the router says of every token."""

    logits: torch.Tensor  # [N,E] fp32
    weights: torch.Tensor  # [N,E] fp32, sum 1, 0 where an expert was not chosen
    experts: torch.Tensor  # [N,K] int64, the most probable first


def route(x_ND: torch.Tensor, weight_ED: torch.Tensor, num_experts_per_tok: int) -> Routing:
    """`Router` in one kernel. Of experts with equal logits the one with the smaller number comes first (torch.topk
    promises no order: its choice differs between a CPU and a GPU). Gradients: of x and of the router's weight."""
    _refuse_experts(len(weight_ED))
    return Routing(*_call(_Route, x_ND, weight_ED, num_experts_per_tok))


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weight_ED, k):
        (n, d), e = x_ND.shape, len(weight_ED)
        x_ND, weight_ED = x_ND.contiguous(), weight_ED.contiguous()
        logits_NE = torch.empty(n, e, device=x_ND.device, dtype=torch.float32)
        weights_NE = torch.empty_like(logits_NE)
        experts_NK = torch.empty(n, k, device=x_ND.device, dtype=torch.int64)
        tile = _tile("route", x_ND.dtype)
        _launch(
            _route_kernel, (triton.cdiv(n, tile.rows),), tile, x_ND,
            x_ND, weight_ED, logits_NE, weights_NE, experts_NK, n, d, E=e, K=k, BM=tile.rows, BD=tile.inner,
        )  # fmt: skip
        ctx.save_for_backward(x_ND, weight_ED, weights_NE)
        ctx.mark_non_differentiable(experts_NK)
        ctx.set_materialize_grads(False)
        return logits_NE, weights_NE, experts_NK

    @staticmethod
    def backward(ctx, logits_grad, weights_grad, _):
        x_ND, weight_ED, weights_NE = ctx.saved_tensors
        slope_NE = torch.zeros_like(weights_NE) if logits_grad is None else logits_grad
        if weights_grad is not None:  # of a softmax; an expert that was not chosen has weight 0, and no gradient
            pulled_NE = weights_NE * weights_grad
            slope_NE = slope_NE + pulled_NE - weights_NE * pulled_NE.sum(-1, keepdim=True)
        x_grad = (slope_NE @ weight_ED.float()).to(x_ND.dtype) if ctx.needs_input_grad[0] else None
        weight_grad = (slope_NE.t() @ x_ND.float()).to(weight_ED.dtype) if ctx.needs_input_grad[1] else None
        return x_grad, weight_grad, None


# ----------------------------------------------------------------------------------------------------- delta experts


class PackedDelta(NamedTuple):
    """The tensors of `DeltaExperts`, laid out so that both of the large products are one each."""

    first: torch.Tensor  # [H + E R1, D]: the base's fc1, then every expert's `down` of fc1
    second: torch.Tensor  # [D, H + E R2 + E8]: the base's fc2, every expert's `up` of fc2, the biases of fc2, zeros
    up: torch.Tensor  # [E,H,R1] of fc1
    bias: torch.Tensor  # [E,H] of fc1
    down: torch.Tensor  # [E,R2,H] of fc2
    quick: bool  # quick_gelu, else gelu


def pack_delta(experts: DeltaExperts, dtype: torch.dtype | None = None) -> PackedDelta:
    """Once, after loading. Ranks are padded with zeros to a multiple of 16, the E biases to one of 8."""
    fc1, fc2, number = experts.fc1, experts.fc2, experts.num_experts
    _refuse_experts(number)
    if max(fc1.up.shape[-1], fc2.up.shape[-1]) > MAX_RANK:
        raise ValueError(f"the kernels go up to rank {MAX_RANK}, this model has {fc1.up.shape[-1]} and "
                         f"{fc2.up.shape[-1]}: use the loop.")  # fmt: skip

    def padded(tensor: torch.Tensor, dim: int, multiple: int = 16) -> torch.Tensor:
        missing = -tensor.shape[dim] % multiple
        return F.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, missing])

    with torch.no_grad():
        first = torch.cat([fc1.base, padded(fc1.down, 1).flatten(0, 1)])
        up2 = padded(fc2.up, 2).permute(1, 0, 2).flatten(1)  # [D, E R2]
        second = torch.cat([fc2.base, up2, padded(fc2.bias, 0, 8).t()], dim=1)
        tensors = (first, second, padded(fc1.up, 2), fc1.bias, padded(fc2.down, 1))
        return PackedDelta(*(t.detach().to(dtype or t.dtype).contiguous() for t in tensors), experts.act is quick_gelu)


@triton.jit
def _delta_kernel(Y1, WEIGHTS, ORDER, UP, BIAS, DOWN, Y2, PARTS, n, hidden, part_width, width1, width2, E: tl.constexpr,
                  E8: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, QUICK: tl.constexpr, SORTED: tl.constexpr,
                  SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR1: tl.constexpr,
                  BR2: tl.constexpr):  # fmt: skip
    """A tile of tokens and a part of H:  Y1 = [base h | z_0 .. z_E]  ->  Y2 = [sum w_e h_e | u_0 .. u_E | weights].

    h_e = act(base + up_e z_e + bias_e)     u_e = down_e (w_e h_e), a sum over H: with SPLIT parts of H it goes to PARTS
    An expert that none of these tokens chose costs nothing but its zeros in u.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    real = row < n
    token = row.to(tl.int64)
    if SORTED:
        token = tl.load(ORDER + row, mask=real, other=0).to(tl.int64)
    part = tl.program_id(1)
    start = part * part_width
    end = tl.minimum(start + part_width, hidden)
    r1 = tl.arange(0, BR1)
    r2 = tl.arange(0, BR2)
    dtype = Y2.dtype.element_ty
    seen = 0  # experts that have left something in Y2
    for e in range(E):
        weight = tl.load(WEIGHTS + token * E + e, mask=real, other=0.0)
        chosen = weight != 0  # true for what is not a number: it must be seen in the result
        used = tl.max(chosen.to(tl.int32), axis=0)
        used = tl.where((e == E - 1) & (seen == 0), 1, used)  # tokens without any expert: their zeros must be written
        u = tl.zeros((BM, BR2), tl.float32)
        if used > 0:
            z = tl.load(Y1 + token[:, None] * width1 + hidden + e * R1 + r1[None, :],
                        mask=real[:, None] & (r1[None, :] < R1), other=0.0)  # fmt: skip
            for c0 in range(start, end, BN):
                c = c0 + tl.arange(0, BN)
                here = real[:, None] & (c[None, :] < end)
                up = tl.load(UP + (e * hidden + c[:, None]) * R1 + r1[None, :],
                             mask=(c[:, None] < end) & (r1[None, :] < R1), other=0.0)  # fmt: skip
                down = tl.load(DOWN + (e * R2 + r2[:, None]) * hidden + c[None, :],
                               mask=(r2[:, None] < R2) & (c[None, :] < end), other=0.0)  # fmt: skip
                base = tl.load(Y1 + token[:, None] * width1 + c[None, :], mask=here, other=0.0).to(tl.float32)
                bias = tl.load(BIAS + e * hidden + c, mask=c < end, other=0.0).to(tl.float32)
                t = _dot(z, tl.trans(up), base + bias[None, :])
                h = tl.where(chosen[:, None], _activate(t, QUICK) * weight[:, None], 0.0)
                u = _dot(h.to(dtype), tl.trans(down), u)
                place = Y2 + token[:, None] * width2 + c[None, :]
                sum_so_far = tl.load(place, mask=here & (seen > 0), other=0.0).to(tl.float32)
                tl.store(place, (sum_so_far + h).to(dtype), mask=here)
        seen += used
        if SPLIT == 1:
            tl.store(Y2 + token[:, None] * width2 + hidden + e * R2 + r2[None, :], u.to(dtype),
                     mask=real[:, None] & (r2[None, :] < R2))  # fmt: skip
        else:
            tl.store(PARTS + ((part * n + token[:, None]) * E + e) * R2 + r2[None, :], u,
                     mask=real[:, None] & (r2[None, :] < R2))  # fmt: skip
        tl.debug_barrier()  # the next expert reads the sum so far, maybe with another thread
    if part == 0:
        expert = tl.arange(0, _WIDE)
        weights = tl.load(WEIGHTS + token[:, None] * E + expert[None, :],
                          mask=real[:, None] & (expert[None, :] < E), other=0.0)  # fmt: skip
        tl.store(Y2 + token[:, None] * width2 + hidden + E * R2 + expert[None, :], weights.to(dtype),
                 mask=real[:, None] & (expert[None, :] < E8))  # fmt: skip


def order_by_set(experts_NK: torch.Tensor) -> torch.Tensor:
    """Tokens [N] in the order of the sets of experts that they use: a tile of them then uses few experts."""
    return (1 << experts_NK).sum(-1, dtype=torch.int32).argsort(stable=True)


def order_if_it_pays(experts_NK: torch.Tensor) -> torch.Tensor | None:
    """`order_by_set` of many tokens; None of few, which `delta_ffn` then takes as they come."""
    return order_by_set(experts_NK) if len(experts_NK) >= SORT_FROM else None


def delta_ffn(
    packed: PackedDelta, x_ND: torch.Tensor, weights_NE: torch.Tensor, order_N: torch.Tensor | None = None
) -> torch.Tensor:
    """`DeltaExperts` as product -> kernel -> product: [N,D] -> [N,D]. `weights_NE` as `route` gives them. `order_N`,
    of `order_if_it_pays`, changes the speed alone. Gradients: of x and of the weights, none of any expert."""
    return _call(_DeltaFFN, x_ND.to(packed.first.dtype), weights_NE, packed, order_N)


class _DeltaFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weights_NE, packed, order_N):
        weights_NE = weights_NE.contiguous()
        ctx.save_for_backward(x_ND, weights_NE, order_N)
        ctx.packed = packed
        return torch.mm(_delta_middle(packed, torch.mm(x_ND, packed.first.t()), weights_NE, order_N), packed.second.t())

    @staticmethod
    def backward(ctx, out_grad):
        (x_ND, weights_NE, order_N), packed = ctx.saved_tensors, ctx.packed
        y1, y2_grad = torch.mm(x_ND, packed.first.t()), torch.mm(out_grad, packed.second)  # y1 again: kept by nobody
        y1_grad, weights_grad_NE = _delta_middle_grad(packed, y1, y2_grad, weights_NE, order_N)
        return torch.mm(y1_grad, packed.first), weights_grad_NE, None, None


def _delta_sizes(packed: PackedDelta) -> dict[str, int]:
    """Constants of the delta kernels, and the tile that fits the rank."""
    (e, _, r1), r2 = packed.up.shape, packed.down.shape[1]
    return {"E": e, "R1": r1, "R2": r2, "BR1": triton.next_power_of_2(r1), "BR2": triton.next_power_of_2(r2)}


def _delta_middle(packed, y1, weights_NE, order_N) -> torch.Tensor:
    """What stands between the two products: [N, H + E R1] -> [N, H + E R2 + E8]."""
    sizes, (n, hidden) = _delta_sizes(packed), (len(y1), packed.up.shape[1])
    e, r2 = sizes["E"], sizes["R2"]
    tile = _delta_tile(y1.dtype, max(sizes["BR1"], sizes["BR2"]))
    split = _delta_split(n, hidden, tile)
    part_width = triton.cdiv(triton.cdiv(hidden, split), tile.cols) * tile.cols
    y2 = y1.new_empty(n, packed.second.shape[1])
    parts = y1.new_empty(split, n, e * r2, dtype=torch.float32) if split > 1 else y2
    _launch(
        _delta_kernel, (triton.cdiv(n, tile.rows), split), tile, y1,
        y1, weights_NE, weights_NE if order_N is None else order_N, packed.up, packed.bias, packed.down, y2, parts,
        n, hidden, part_width, y1.shape[1], y2.shape[1], E8=y2.shape[1] - hidden - e * r2, QUICK=packed.quick,
        SORTED=order_N is not None, SPLIT=split, BM=tile.rows, BN=tile.cols, **sizes,
    )  # fmt: skip
    if split > 1:
        y2[:, hidden : hidden + e * r2] = parts.sum(0)
    return y2


@triton.jit
def _delta_back_kernel(Y1, G2, WEIGHTS, ORDER, UP, BIAS, DOWN, G1, WEIGHTS_GRAD, n, hidden, width1, width2,
                       E: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, QUICK: tl.constexpr, SORTED: tl.constexpr,
                       BM: tl.constexpr, BN: tl.constexpr, BR1: tl.constexpr, BR2: tl.constexpr):  # fmt: skip
    """Gradients G2 of Y2 [mixed h | u | weights] -> gradients G1 of Y1 [base h | z], and of the weights [N,E].

    h_e is computed again from Y1. With g_e = G2's h + down_e^T (G2's u_e), the gradient of w_e h_e:
    t_e's gradient is w_e g_e act'(t_e), summed over experts it is the base's, times up_e it is z_e's;
    w_e's is the sum over H of g_e h_e, and what came through the biases of fc2.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    real = row < n
    token = row.to(tl.int64)
    if SORTED:
        token = tl.load(ORDER + row, mask=real, other=0).to(tl.int64)
    r1 = tl.arange(0, BR1)
    r2 = tl.arange(0, BR2)
    dtype = G1.dtype.element_ty
    seen = 0
    for e in range(E):
        weight = tl.load(WEIGHTS + token * E + e, mask=real, other=0.0)
        chosen = weight != 0
        used = tl.max(chosen.to(tl.int32), axis=0)
        used = tl.where((e == E - 1) & (seen == 0), 1, used)  # tokens without any expert: their zeros must be written
        z_grad = tl.zeros((BM, BR1), tl.float32)
        weight_grad = tl.zeros((BM,), tl.float32)
        if used > 0:
            z = tl.load(Y1 + token[:, None] * width1 + hidden + e * R1 + r1[None, :],
                        mask=real[:, None] & (r1[None, :] < R1), other=0.0)  # fmt: skip
            u_grad = tl.load(G2 + token[:, None] * width2 + hidden + e * R2 + r2[None, :],
                             mask=real[:, None] & (r2[None, :] < R2), other=0.0)  # fmt: skip
            for c0 in range(0, hidden, BN):
                c = c0 + tl.arange(0, BN)
                here = real[:, None] & (c[None, :] < hidden)
                up = tl.load(UP + (e * hidden + c[:, None]) * R1 + r1[None, :],
                             mask=(c[:, None] < hidden) & (r1[None, :] < R1), other=0.0)  # fmt: skip
                down = tl.load(DOWN + (e * R2 + r2[:, None]) * hidden + c[None, :],
                               mask=(r2[:, None] < R2) & (c[None, :] < hidden), other=0.0)  # fmt: skip
                base = tl.load(Y1 + token[:, None] * width1 + c[None, :], mask=here, other=0.0).to(tl.float32)
                mixed_grad = tl.load(G2 + token[:, None] * width2 + c[None, :], mask=here, other=0.0).to(tl.float32)
                bias = tl.load(BIAS + e * hidden + c, mask=c < hidden, other=0.0).to(tl.float32)
                t = _dot(z, tl.trans(up), base + bias[None, :])
                h_grad = _dot(u_grad, down, mixed_grad)
                weight_grad += tl.sum(tl.where(here, _activate(t, QUICK) * h_grad, 0.0), axis=1)
                t_grad = tl.where(chosen[:, None], weight[:, None] * h_grad * _activate_slope(t, QUICK), 0.0)
                z_grad = _dot(t_grad.to(dtype), up, z_grad)
                place = G1 + token[:, None] * width1 + c[None, :]
                sum_so_far = tl.load(place, mask=here & (seen > 0), other=0.0).to(tl.float32)
                tl.store(place, (sum_so_far + t_grad).to(dtype), mask=here)
            bias_grad = tl.load(G2 + token * width2 + hidden + E * R2 + e, mask=real, other=0.0).to(tl.float32)
            weight_grad = tl.where(chosen, weight_grad + bias_grad, 0.0)
        seen += used
        tl.store(G1 + token[:, None] * width1 + hidden + e * R1 + r1[None, :], z_grad.to(dtype),
                 mask=real[:, None] & (r1[None, :] < R1))  # fmt: skip
        tl.store(WEIGHTS_GRAD + token * E + e, weight_grad, mask=real)
        tl.debug_barrier()


def _delta_middle_grad(packed, y1, y2_grad, weights_NE, order_N) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of what stands between the products: [N, H + E R2 + E8] -> [N, H + E R1], and of the weights [N,E]."""
    sizes, (n, hidden) = _delta_sizes(packed), (len(y1), packed.up.shape[1])
    tile = _delta_tile(y1.dtype, max(sizes["BR1"], sizes["BR2"]))
    y1_grad, weights_grad_NE = torch.empty_like(y1), torch.empty_like(weights_NE)
    _launch(
        _delta_back_kernel, (triton.cdiv(n, tile.rows),), tile, y1,
        y1, y2_grad, weights_NE, weights_NE if order_N is None else order_N, packed.up, packed.bias, packed.down,
        y1_grad, weights_grad_NE, n, hidden, y1.shape[1], y2_grad.shape[1], QUICK=packed.quick,
        SORTED=order_N is not None, BM=tile.rows, BN=tile.cols, **sizes,
    )  # fmt: skip
    return y1_grad, weights_grad_NE


# ----------------------------------------------------------------------------------------------------- whole experts


class PackedFFN(NamedTuple):
    """A dense FFN's tensors, or those of E whole experts (then each has E in front)."""

    weight1: torch.Tensor  # [H,D]
    bias1: torch.Tensor  # [H]
    weight2: torch.Tensor  # [D,H]
    bias2: torch.Tensor  # [D]
    quick: bool  # quick_gelu, else gelu


def pack_ffn(ffn: torch.nn.Module, dtype: torch.dtype | None = None) -> PackedFFN:
    """Of `Experts` or `CLIPMoEMLP`: the same memory where the dtype is the same."""
    tensors = (ffn.fc1.weight, ffn.fc1.bias, ffn.fc2.weight, ffn.fc2.bias)
    return PackedFFN(*(t.detach().to(dtype or t.dtype).contiguous() for t in tensors), ffn.act is quick_gelu)


class _Pairs(NamedTuple):
    """Token-expert pairs in the order of their experts. Pair number p is token p // K's choice p % K."""

    order_M: torch.Tensor  # int64: which pair stands where
    ends_E: torch.Tensor  # int32: where each expert's pairs end
    k: int


def _sort_pairs(experts_NK: torch.Tensor, num_experts: int) -> _Pairs:
    flat = experts_NK.flatten()
    ends_E = count_experts(flat, num_experts).cumsum(0).to(torch.int32)
    return _Pairs(flat.to(torch.int8).argsort(stable=True), ends_E, experts_NK.shape[1])  # int8: few passes of a sort


@triton.jit
def _grouped_kernel(A, ORDER, ENDS, W, BIAS, WEIGHTS, OUT, m, cols, inner, step_e, step_col, step_inner,
                    E: tl.constexpr, K: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr,
                    HAS_BIAS: tl.constexpr, ACTIVATE: tl.constexpr, QUICK: tl.constexpr, WEIGH: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """One tile [BM,BN] of the products of all experts with their own pairs: OUT = weight * act(A @ W_e^T + bias_e).

    Pairs lie in the order of their experts and no tile spans two of them. How many tiles an expert has is known to the
    device alone; so the grid has as many as there can be, and each program finds out here which one it is.
    GATHER: the rows of A are tokens, not sorted pairs. SCATTER: the rows of OUT are unsorted pairs.
    step_e, step_col, step_inner: strides of W, which may be read transposed.
    """
    blocks = tl.cdiv(cols, BN)
    tile = tl.program_id(0) // blocks  # neighbours share rows
    c = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)

    expert = tl.arange(0, _WIDE)
    ends = tl.load(ENDS + expert, mask=expert < E, other=m)
    starts = tl.load(ENDS + expert - 1, mask=(expert > 0) & (expert < E), other=0)
    starts = tl.where(expert < E, starts, m)
    tiles = (ends - starts + BM - 1) // BM
    tiles_until = tl.cumsum(tiles, 0)
    e = tl.sum((tiles_until <= tile).to(tl.int32), axis=0)
    if e < E:
        mine = expert == e
        first_tile = tl.sum(tl.where(mine, tiles_until - tiles, 0), axis=0)
        start = tl.sum(tl.where(mine, starts, 0), axis=0)
        end = tl.sum(tl.where(mine, ends, 0), axis=0)
        row = start + (tile - first_tile) * BM + tl.arange(0, BM)
        real = row < end
        pair = tl.load(ORDER + row, mask=real, other=0)
        source = row.to(tl.int64)
        if GATHER:
            source = pair // K
        sums = tl.zeros((BM, BN), tl.float32)
        for i0 in range(0, inner, BK):
            i = i0 + tl.arange(0, BK)
            a = tl.load(A + source[:, None] * inner + i[None, :], mask=real[:, None] & (i[None, :] < inner), other=0.0)
            w = tl.load(W + e.to(tl.int64) * step_e + i[:, None] * step_inner + c[None, :] * step_col,
                        mask=(i[:, None] < inner) & (c[None, :] < cols), other=0.0)  # fmt: skip
            sums = _dot(a, w, sums)
        if HAS_BIAS:
            sums += tl.load(BIAS + e * cols + c, mask=c < cols, other=0.0).to(tl.float32)[None, :]
        if ACTIVATE:
            sums = _activate(sums, QUICK)
        if WEIGH:
            sums *= tl.load(WEIGHTS + (pair // K) * E + e, mask=real, other=0.0)[:, None]
        target = row.to(tl.int64)
        if SCATTER:
            target = pair
        tl.store(OUT + target[:, None] * cols + c[None, :], sums.to(OUT.dtype.element_ty),
                 mask=real[:, None] & (c[None, :] < cols))  # fmt: skip


def _grouped(
    pairs: _Pairs, a: torch.Tensor, weight: torch.Tensor, bias=None, weights_NE=None, quick=None, gather=False,
    scatter=False,
) -> torch.Tensor:  # fmt: skip
    """[N or M, inner] and weight [E,cols,inner] (of any strides) -> [M,cols]. quick: None for no activation."""
    (e, cols, inner), m, tile = weight.shape, len(pairs.order_M), _tile("grouped", a.dtype)
    out = a.new_empty(m, cols)
    programs = (triton.cdiv(m, tile.rows) + e) * triton.cdiv(cols, tile.cols) if m else 0
    _launch(
        _grouped_kernel, (programs,), tile, a,
        a, pairs.order_M, pairs.ends_E, weight, weight if bias is None else bias,
        a if weights_NE is None else weights_NE, out, m, cols, inner, *weight.stride(), E=e, K=pairs.k, GATHER=gather,
        SCATTER=scatter, HAS_BIAS=bias is not None, ACTIVATE=quick is not None, QUICK=bool(quick),
        WEIGH=weights_NE is not None, BM=tile.rows, BN=tile.cols, BK=tile.inner,
    )  # fmt: skip
    return out


@triton.jit
def _sum_kernel(Y, OUT, d, K: tl.constexpr, BN: tl.constexpr):
    """OUT [N,D] = sum over the K results of a token, Y [N*K,D], in fp32."""
    token = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for k in tl.static_range(K):
        total += tl.load(Y + (token * K + k) * d + c, mask=c < d, other=0.0).to(tl.float32)
    tl.store(OUT + token * d + c, total.to(OUT.dtype.element_ty), mask=c < d)


def _sum_of_pairs(y_MD: torch.Tensor, k: int) -> torch.Tensor:
    tile, (m, d) = _tile("rows", y_MD.dtype), y_MD.shape
    out_ND = y_MD.new_empty(m // k, d)
    _launch(_sum_kernel, (m // k, triton.cdiv(d, tile.cols)), tile, y_MD, y_MD, out_ND, d, K=k, BN=tile.cols)
    return out_ND


def whole_ffn(
    packed: PackedFFN, x_ND: torch.Tensor, weights_NE: torch.Tensor, experts_NK: torch.Tensor
) -> torch.Tensor:
    """`Experts`: [N,D] -> [N,D]. Weights and experts as `route` gives them. Gradients: of x and of the weights, none of
    any expert."""
    _refuse_experts(len(packed.weight1))
    return _call(_WholeFFN, x_ND.to(packed.weight1.dtype), weights_NE, experts_NK, packed)


class _WholeFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weights_NE, experts_NK, packed):
        x_ND, weights_NE = x_ND.contiguous(), weights_NE.contiguous()
        pairs = _sort_pairs(experts_NK, len(packed.weight1))
        ctx.save_for_backward(x_ND, weights_NE, pairs.order_M, pairs.ends_E)
        ctx.packed, ctx.k = packed, pairs.k
        h_MH = _grouped(pairs, x_ND, packed.weight1, packed.bias1, quick=packed.quick, gather=True)
        y_MD = _grouped(pairs, h_MH, packed.weight2, packed.bias2, weights_NE, scatter=True)
        return _sum_of_pairs(y_MD, pairs.k)

    @staticmethod
    def backward(ctx, out_grad):
        x_ND, weights_NE, order_M, ends_E = ctx.saved_tensors
        packed, pairs, out_grad = ctx.packed, _Pairs(order_M, ends_E, ctx.k), out_grad.contiguous()
        t_MH = _grouped(pairs, x_ND, packed.weight1, packed.bias1, gather=True)  # again, and kept by nobody
        h_grad_MH = _grouped(pairs, out_grad, packed.weight2.transpose(1, 2), gather=True)
        bias_grad_NE = out_grad.float() @ packed.bias2.float().t()
        weights_grad_NE = _whole_middle_grad(pairs, t_MH, h_grad_MH, weights_NE, bias_grad_NE, packed.quick)
        x_grad_MD = _grouped(pairs, t_MH, packed.weight1.transpose(1, 2), scatter=True)
        return _sum_of_pairs(x_grad_MD, pairs.k), weights_grad_NE, None, None


@triton.jit
def _whole_back_kernel(T, H_GRAD, ORDER, ENDS, WEIGHTS, BIAS_GRAD, WEIGHTS_GRAD, hidden, E: tl.constexpr,
                       K: tl.constexpr, QUICK: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """One pair: T becomes its own gradient, and the gradient of the pair's weight is the sum of act(t) times h's."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(ORDER + row)
    expert = tl.arange(0, _WIDE)
    e = tl.sum(
        (tl.load(ENDS + expert, mask=expert < E, other=0) <= row).to(tl.int32) * (expert < E).to(tl.int32), axis=0
    )
    place = (pair // K) * E + e
    weight = tl.load(WEIGHTS + place)
    total = tl.zeros((BN,), tl.float32)
    for c0 in range(0, hidden, BN):
        c = c0 + tl.arange(0, BN)
        t = tl.load(T + row * hidden + c, mask=c < hidden, other=0.0).to(tl.float32)
        h_grad = tl.load(H_GRAD + row * hidden + c, mask=c < hidden, other=0.0).to(tl.float32)
        total += _activate(t, QUICK) * h_grad
        t_grad = weight * h_grad * _activate_slope(t, QUICK)
        tl.store(T + row * hidden + c, t_grad.to(T.dtype.element_ty), mask=c < hidden)
    tl.store(WEIGHTS_GRAD + place, tl.load(BIAS_GRAD + place) + tl.sum(total, axis=0))


def _whole_middle_grad(pairs, t_MH, h_grad_MH, weights_NE, bias_grad_NE, quick) -> torch.Tensor:
    """Between the products of the backward pass: t_MH becomes its gradient, -> gradient of the weights [N,E]."""
    (m, hidden), tile = t_MH.shape, _tile("rows", t_MH.dtype)
    weights_grad_NE = torch.zeros_like(weights_NE)
    _launch(
        _whole_back_kernel, (m,), tile, t_MH, t_MH, h_grad_MH, pairs.order_M, pairs.ends_E, weights_NE,
        bias_grad_NE, weights_grad_NE, hidden, E=weights_NE.shape[1], K=pairs.k, QUICK=quick, BN=tile.cols,
    )  # fmt: skip
    return weights_grad_NE


# --------------------------------------------------------------------------------------------------------- dense FFN


@triton.jit
def _bias_act_kernel(T, BIAS, hidden, QUICK: tl.constexpr, BN: tl.constexpr):
    """In place: act(t + bias)."""
    place = T + tl.program_id(0).to(tl.int64) * hidden
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    t = tl.load(place + c, mask=c < hidden, other=0.0).to(tl.float32)
    t += tl.load(BIAS + c, mask=c < hidden, other=0.0).to(tl.float32)
    tl.store(place + c, _activate(t, QUICK).to(T.dtype.element_ty), mask=c < hidden)


@triton.jit
def _bias_act_back_kernel(T, BIAS, H_GRAD, hidden, QUICK: tl.constexpr, BN: tl.constexpr):
    """In place: T becomes its own gradient, h's gradient times act'(t + bias)."""
    start = tl.program_id(0).to(tl.int64) * hidden
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    t = tl.load(T + start + c, mask=c < hidden, other=0.0).to(tl.float32)
    t += tl.load(BIAS + c, mask=c < hidden, other=0.0).to(tl.float32)
    h_grad = tl.load(H_GRAD + start + c, mask=c < hidden, other=0.0).to(tl.float32)
    tl.store(T + start + c, (h_grad * _activate_slope(t, QUICK)).to(T.dtype.element_ty), mask=c < hidden)


def bias_act_(t_NH: torch.Tensor, bias_H: torch.Tensor, quick: bool) -> torch.Tensor:
    """act(t + bias) in the place of t, in one pass. Builds no graph."""
    (n, hidden), tile = t_NH.shape, _tile("rows", t_NH.dtype)
    grid = (n, triton.cdiv(hidden, tile.cols))
    _launch(_bias_act_kernel, grid, tile, t_NH, t_NH, bias_H, hidden, QUICK=quick, BN=tile.cols)
    return t_NH


def dense_ffn(packed: PackedFFN, x_ND: torch.Tensor) -> torch.Tensor:
    """`CLIPMoEMLP`: [N,D] -> [N,D]. Gradient: of x alone."""
    return _call(_DenseFFN, x_ND.to(packed.weight1.dtype), packed)


class _DenseFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, packed):
        ctx.save_for_backward(x_ND)
        ctx.packed = packed
        h_NH = bias_act_(torch.mm(x_ND, packed.weight1.t()), packed.bias1, packed.quick)
        return torch.addmm(packed.bias2, h_NH, packed.weight2.t())

    @staticmethod
    def backward(ctx, out_grad):
        (x_ND,), packed = ctx.saved_tensors, ctx.packed
        t_NH, h_grad_NH = torch.mm(x_ND, packed.weight1.t()), torch.mm(out_grad, packed.weight2)
        (n, hidden), tile = t_NH.shape, _tile("rows", t_NH.dtype)
        _launch(
            _bias_act_back_kernel, (n, triton.cdiv(hidden, tile.cols)), tile, t_NH,
            t_NH, packed.bias1, h_grad_NH, hidden, QUICK=packed.quick, BN=tile.cols,
        )  # fmt: skip
        return torch.mm(t_NH, packed.weight1), None


# ------------------------------------------------------------------------------------------------ CLIP-FMoE's gate


@triton.jit
def _gate_kernel(X, W, BIAS, BASE, Y, OUT, n, d, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """One tile of OUT = G * BASE + (1 - G) * Y with G = sigmoid(X W^T + bias), all in fp32 until it is stored."""
    token = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    sums = tl.zeros((BM, BN), tl.float32)
    for i0 in range(0, d, BK):
        i = i0 + tl.arange(0, BK)
        x = tl.load(X + token[:, None] * d + i[None, :], mask=(token[:, None] < n) & (i[None, :] < d), other=0.0)
        w = tl.load(W + c[None, :] * d + i[:, None], mask=(c[None, :] < d) & (i[:, None] < d), other=0.0)
        if x.dtype != w.dtype:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        sums = _dot(x, w, sums)
    gate = tl.sigmoid(sums + tl.load(BIAS + c, mask=c < d, other=0.0).to(tl.float32)[None, :])
    place = token[:, None] * d + c[None, :]
    here = (token[:, None] < n) & (c[None, :] < d)
    base = tl.load(BASE + place, mask=here, other=0.0).to(tl.float32)
    y = tl.load(Y + place, mask=here, other=0.0).to(tl.float32)
    tl.store(OUT + place, (gate * base + (1.0 - gate) * y).to(OUT.dtype.element_ty), mask=here)


def fuse(
    x_ND: torch.Tensor, weight_DD: torch.Tensor, bias_D: torch.Tensor, base_ND: torch.Tensor, y_ND: torch.Tensor
) -> torch.Tensor:
    """CLIP-FMoE's gate G = sigmoid(x W^T + b) and the mixture G * base + (1 - G) * y, in one kernel. Gradients: of all
    five, since the gate learns beside the router."""
    return _call(_Fuse, x_ND, weight_DD, bias_D, base_ND, y_ND)


class _Fuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weight_DD, bias_D, base_ND, y_ND):
        x_ND, weight_DD, base_ND, y_ND = (t.contiguous() for t in (x_ND, weight_DD, base_ND, y_ND))
        ctx.save_for_backward(x_ND, weight_DD, bias_D, base_ND, y_ND)
        # Tokens in half precision and a gate in fp32 are multiplied in fp32, whose tiles are the larger ones.
        (n, d), tile = x_ND.shape, _tile("gate", torch.promote_types(x_ND.dtype, weight_DD.dtype))
        out_ND = torch.empty_like(y_ND)
        _launch(
            _gate_kernel, (triton.cdiv(n, tile.rows), triton.cdiv(d, tile.cols)), tile, x_ND,
            x_ND, weight_DD, bias_D, base_ND, y_ND, out_ND, n, d, BM=tile.rows, BN=tile.cols, BK=tile.inner,
        )  # fmt: skip
        return out_ND

    @staticmethod
    def backward(ctx, out_grad):
        x_ND, weight_DD, bias_D, base_ND, y_ND = ctx.saved_tensors
        out_grad, x_float, weight_float = out_grad.float(), x_ND.float(), weight_DD.float()
        gate_ND = F.linear(x_float, weight_float, bias_D.float()).sigmoid()
        slope_ND = out_grad * (base_ND.float() - y_ND.float()) * gate_ND * (1 - gate_ND)
        gradients = (
            lambda: slope_ND @ weight_float, lambda: slope_ND.t() @ x_float, lambda: slope_ND.sum(0),
            lambda: gate_ND * out_grad, lambda: (1 - gate_ND) * out_grad,
        )  # fmt: skip
        return tuple(
            gradient().to(tensor.dtype) if wanted else None
            for gradient, tensor, wanted in zip(gradients, ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        )


# --------------------------------------------------------------------------------------------- residual + layer norm


@triton.jit
def _add_norm_kernel(X, Y, WEIGHT, BIAS, SUM, OUT, d, eps, BD: tl.constexpr):
    """One token: SUM = X + Y, OUT = layer norm of SUM as it was stored, statistics in fp32."""
    start = tl.program_id(0).to(tl.int64) * d
    c = tl.arange(0, BD)
    mask = c < d
    x = tl.load(X + start + c, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(Y + start + c, mask=mask, other=0.0).to(tl.float32)
    rounded = (x + y).to(SUM.dtype.element_ty)
    tl.store(SUM + start + c, rounded, mask=mask)
    total = rounded.to(tl.float32)
    centred = tl.where(mask, total - tl.sum(total, axis=0) / d, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / d + eps)
    weight = tl.load(WEIGHT + c, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(BIAS + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(OUT + start + c, (centred * scale * weight + bias).to(OUT.dtype.element_ty), mask=mask)


def add_layer_norm(
    x_ND: torch.Tensor, y_ND: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor, eps: float, dtype=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> x + y, and its layer norm, in one pass. Builds no graph."""
    x_ND, y_ND = x_ND.contiguous(), y_ND.contiguous()
    sum_ND, out_ND, (n, d) = torch.empty_like(x_ND), torch.empty_like(x_ND, dtype=dtype), x_ND.shape
    _launch(
        _add_norm_kernel, (n,), _tile("rows", x_ND.dtype), x_ND,
        x_ND, y_ND, weight_D, bias_D, sum_ND, out_ND, d, eps, BD=triton.next_power_of_2(d),
    )  # fmt: skip
    return sum_ND, out_ND


# ------------------------------------------------------------------------------------------------------------- check

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest error over the largest entry."""


def check(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Run every kernel once on this device, on small random inputs: why they must not be used, or None.

    To be asked once before the kernels are trusted: a card or a Triton that nobody has tried then falls back to the
    loop instead of giving wrong features. Compiles the kernels (some seconds, cached by Triton), and waits for the
    device. `TRITON_INTERPRET=1` is needed where the device is a CPU.
    """
    if dtype not in TOLERANCE:
        return f"there are no kernels for {dtype}"
    try:
        with torch.no_grad():
            for name, found, expected in _comparisons(torch.device(device), dtype):
                error = (found.double().cpu() - expected).abs().max() / expected.abs().max()
                if not error <= TOLERANCE[dtype]:  # also when it is no number
                    return f"{name} is off by {error:.1e} of its largest entry on {device} in {dtype}"
    except Exception as error:  # whatever a compiler or a driver may raise
        first_line = (str(error).strip() or "no message").splitlines()[0]
        return f"{type(error).__name__} on {device} in {dtype}: {first_line}"
    return None


def _comparisons(device: torch.device, dtype: torch.dtype):
    """Yields (what, result of a kernel, the same by the loop on the CPU in fp64)."""
    n, d, h, e, k, generator = 70, 40, 72, 4, 2, torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return (0.3 * torch.randn(*shape, generator=generator)).to(dtype).double()

    def drawn(module: torch.nn.Module) -> torch.nn.Module:
        module.double()
        for parameter in module.parameters():
            parameter.copy_(draw(*parameter.shape))
        return module

    def given(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, dtype)

    x = 4 * draw(n, d)  # times a power of two: no rounding
    for hidden_act in ("quick_gelu", "gelu"):
        config = SimpleNamespace(
            num_experts=e, num_experts_per_tok=k, hidden_size=d, intermediate_size=h, num_hidden_layers=2,
            hidden_act=hidden_act, expert_dropout=0.0, experts_implementation="loop", router_jitter_noise=0.0,
            router_initializer_range=0.02,
        )  # fmt: skip
        router, whole, delta = (drawn(m) for m in (Router(config), Experts(config), DeltaExperts(config, 16, 64)))
        routing = route(given(x), given(router.weight), k)
        logits = x @ router.weight.t()
        yield "the router's logits", routing.logits, logits
        chosen = routing.experts.cpu()  # from here on the kernel's own choice: rounding may decide a near tie
        weights = logits.gather(1, chosen).softmax(-1)
        yield "the router's choice", logits.gather(1, chosen), logits.topk(k).values
        yield "the router's weights", routing.weights, torch.zeros(n, e).double().scatter(1, chosen, weights)

        expected, packed = delta(x, weights, chosen), pack_delta(delta.to(device), dtype)
        for order in (None, order_by_set(routing.experts)):
            yield f"delta experts ({hidden_act})", delta_ffn(packed, given(x), routing.weights, order), expected
        expected, packed = whole(x, weights, chosen), pack_ffn(whole.to(device), dtype)
        yield f"whole experts ({hidden_act})", whole_ffn(packed, given(x), *routing[1:]), expected
        one = PackedFFN(*(tensor[0] for tensor in packed[:4]), packed.quick)
        yield f"the dense FFN ({hidden_act})", dense_ffn(one, given(x)), whole.cpu().single(x, 0)

    gate, bias, base, y = draw(d, d), draw(d), draw(n, d), draw(n, d)
    share = F.linear(x, gate, bias).sigmoid()
    yield "the fusion gate", fuse(*map(given, (x, gate, bias, base, y))), share * base + (1 - share) * y
    both, norm = add_layer_norm(given(x), given(y), given(gate[0]), given(bias), 1e-5)
    yield "the residual", both, x + y
    yield "the layer norm", norm, F.layer_norm(both.double().cpu(), (d,), gate[0], bias, 1e-5)


def share_delta(experts):
    return pack_delta(experts)


def ffn(x_ND, weight1, bias1, weight2, bias2, quick):
    t = F.linear(x_ND, weight1, bias1)
    return F.linear(quick_gelu(t) if quick else F.gelu(t), weight2, bias2)
