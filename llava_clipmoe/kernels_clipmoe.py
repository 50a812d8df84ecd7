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
from typing import NamedTuple

import torch
import torch.nn.functional as F

try:  # not a bare import: transformers would ask everybody who loads the model for triton
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The GPU kernels need triton, which comes with torch for CUDA. Use the loop instead.") from error

from .experts_clipmoe import DeltaExperts, quick_gelu

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


# By kernel and by bytes of a number (2: fp16, bf16; 4: fp32). Chosen by count of registers and shared memory.
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
SORT_FROM = 4096  # tokens from which `delta` pays for sorting them by their set of experts


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


def delta_ffn(
    packed: PackedDelta, x_ND: torch.Tensor, weights_NE: torch.Tensor, order_N: torch.Tensor | None = None
) -> torch.Tensor:
    """`DeltaExperts` as product -> kernel -> product: [N,D] -> [N,D]. `weights_NE` as `route` gives them. `order_N`,
    of `order_by_set`, changes the speed alone. Gradients: of x and of the weights, none of any expert."""
    return _call(_DeltaFFN, x_ND.to(packed.first.dtype), weights_NE, packed, order_N)


class _DeltaFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weights_NE, packed, order_N):
        weights_NE = weights_NE.contiguous()
        ctx.save_for_backward(x_ND, weights_NE, order_N)
        ctx.packed = packed
        return torch.mm(_delta_middle(packed, torch.mm(x_ND, packed.first.t()), weights_NE, order_N), packed.second.t())


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
