"""Delta experts on a GPU: product -> one kernel -> product. What they must equal is `DeltaExperts`.

    h_e = act(W1_0 x + B1_e z_e + b1_e), z_e = A1_e x             out = W2_0 (sum w_e h_e) + sum B2_e u_e + w_e b2_e
    u_e = A2_e (w_e h_e)

The first product gives W1_0 x and every z_e, the second takes [sum w_e h_e | u_0 .. u_E | w_0 .. w_E]; the kernel
stands between them. Copied beside the weights of a saved model. See `kernels_clipmoe` for how to read a kernel.

Shape suffixes:  N tokens   D width   H FFN width   E experts   K experts per token
R1, R2 ranks of the differences of fc1 and fc2, padded to a multiple of 16
"""

from typing import NamedTuple

import torch

from .kernels_base_clipmoe import (
    _WIDE,
    TILES,
    Tile,
    _activate,
    _activate_and_slope,
    _block,
    _dot,
    call,
    find_tile,
    launch,
    sort_experts,
    tl,
    triton,
)
from .kernels_pack_clipmoe import PackedDelta

ENOUGH_PROGRAMS = 512  # about four for each multiprocessor of an H100; with fewer, H is split
MAX_SPLIT = 16
FEW_TOKENS = 1024  # up to so many, smaller tiles are faster where the table has them
SORT_FROM = 2048  # tokens from which sorting them by their set of experts pays on an H100

# ------------------------------------------------------------------------------------- what both kernels begin with


@triton.jit
def _tokens(ORDER, n, SORTED: tl.constexpr, BIG: tl.constexpr, BM: tl.constexpr):
    """My tokens [BM], and which of them there are. BIG: positions in the matrices need 64 bits (more registers)."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    token = row
    if SORTED:
        token = tl.load(ORDER + row, mask=row < n, other=0).to(tl.int32)
    if BIG:
        token = token.to(tl.int64)
    return token, row < n


@triton.jit
def _used_experts(WEIGHTS, token, real, E: tl.constexpr):
    """[16]: 1 for every expert that one of my tokens chose. A weight that is not a number counts: it must be seen in
    the result. Where there is none, expert 0 is taken, and its zeros are written."""
    expert = tl.arange(0, _WIDE)
    mask = real[:, None] & (expert[None, :] < E)
    weights = tl.load(WEIGHTS + token[:, None] * E + expert[None, :], mask=mask, other=0.0)
    used = tl.max((weights != 0).to(tl.int32), axis=0)
    return tl.where((expert == 0) & (tl.sum(used, axis=0) == 0), 1, used)


@triton.jit
def _number_at(used, place):
    """The number of the expert that is at `place` among those in use."""
    return tl.sum(tl.where((used > 0) & (tl.cumsum(used, 0) == place + 1), tl.arange(0, _WIDE), 0), axis=0)


@triton.jit
def _zeros_of_unused(START, token, real, used, width, E, R, BM, BR):
    """Zeros where experts that none of my tokens chose would have R columns each."""
    r = tl.arange(0, BR)
    for e in range(E):
        if tl.sum(tl.where(tl.arange(0, _WIDE) == e, used, 0), axis=0) == 0:
            zeros = tl.zeros((BM, BR), START.dtype.element_ty)
            tl.store(START + token[:, None] * width + e * R + r[None, :], zeros, mask=real[:, None] & (r[None, :] < R))


# ----------------------------------------------------------------------------------------------------------- forward


@triton.jit
def _delta_expert(z, u, weight, base, UP, BIAS, DOWN, e, c, end, hidden, R1, R2, QUICK, EVEN, BR1, BR2):
    """One expert at some columns c of H -> w_e h_e there, and u_e with their part added."""
    r1, r2 = tl.arange(0, BR1), tl.arange(0, BR2)
    up = _block(UP + e * hidden * R1, c, r1, R1, c < end, r1 < R1, EVEN, R1 == BR1)
    down = _block(DOWN + e * R2 * hidden, r2, c, hidden, r2 < R2, c < end, R2 == BR2, EVEN)
    if EVEN:
        bias = tl.load(BIAS + e * hidden + c).to(tl.float32)
    else:
        bias = tl.load(BIAS + e * hidden + c, mask=c < end, other=0.0).to(tl.float32)
    t = _dot(z, tl.trans(up), base.to(tl.float32) + bias[None, :])
    h = tl.where((weight != 0)[:, None], _activate(t, QUICK) * weight[:, None], 0.0)
    return h, _dot(h.to(z.dtype), tl.trans(down), u)


@triton.jit
def _delta_pass(Y1, WEIGHTS, UP, BIAS, DOWN, Y2, U, token, real, e0, e1, earlier, start, end, hidden, width1, width2,
                u_width, TWO, E, R1, R2, QUICK, EVEN, BM, BN, BR1, BR2):  # fmt: skip
    """Two experts (or e0 alone) over the columns start .. end of H. earlier: experts that Y2 holds already."""
    r1, r2 = tl.arange(0, BR1), tl.arange(0, BR2)
    dtype = Y2.dtype.element_ty
    weight0 = tl.load(WEIGHTS + token * E + e0, mask=real, other=0.0)
    z0 = _block(Y1 + hidden + e0 * R1, token, r1, width1, real, r1 < R1, False, R1 == BR1)
    u0 = tl.zeros((BM, BR2), tl.float32)
    if TWO:
        weight1 = tl.load(WEIGHTS + token * E + e1, mask=real, other=0.0)
        z1 = _block(Y1 + hidden + e1 * R1, token, r1, width1, real, r1 < R1, False, R1 == BR1)
        u1 = tl.zeros((BM, BR2), tl.float32)
    for c0 in range(start, end, BN):
        c = c0 + tl.arange(0, BN)
        base = _block(Y1, token, c, width1, real, c < end, False, EVEN)
        mixed, u0 = _delta_expert(
            z0, u0, weight0, base, UP, BIAS, DOWN, e0, c, end, hidden, R1, R2, QUICK, EVEN, BR1, BR2
        )
        if TWO:
            h, u1 = _delta_expert(
                z1, u1, weight1, base, UP, BIAS, DOWN, e1, c, end, hidden, R1, R2, QUICK, EVEN, BR1, BR2
            )
            mixed += h
        if earlier > 0:
            mixed += _block(Y2, token, c, width2, real, c < end, False, EVEN).to(tl.float32)
        tl.store(Y2 + token[:, None] * width2 + c[None, :], mixed.to(dtype), mask=real[:, None] & (c[None, :] < end))
    u_mask = real[:, None] & (r2[None, :] < R2)
    tl.store(U + token[:, None] * u_width + e0 * R2 + r2[None, :], u0.to(U.dtype.element_ty), mask=u_mask)
    if TWO:
        tl.store(U + token[:, None] * u_width + e1 * R2 + r2[None, :], u1.to(U.dtype.element_ty), mask=u_mask)


@triton.jit(do_not_specialize=["earlier"])
def _delta_kernel(Y1, WEIGHTS, ORDER, UP, BIAS, DOWN, Y2, PARTS, n, hidden, part_width, width1, width2, earlier,
                  E: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, QUICK: tl.constexpr, SORTED: tl.constexpr,
                  BIG: tl.constexpr, SPLIT: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr,
                  BN: tl.constexpr, BR1: tl.constexpr, BR2: tl.constexpr):  # fmt: skip
    """A tile of tokens and a part of H:  Y1 = [base h | z_0 .. z_E]  ->  Y2 = [sum w_e h_e | u_0 .. u_E | weights].

    u_e is a sum over H: with SPLIT each part of H goes to PARTS [parts,N,E R2], fp32. Of the experts that my tokens
    use, one launch takes STEP, from number `earlier` on; what earlier launches left in Y2 is added to.
    """
    token, real = _tokens(ORDER, n, SORTED, BIG, BM)
    used = _used_experts(WEIGHTS, token, real, E)
    count = tl.sum(used, axis=0)
    if earlier < count:
        part = tl.program_id(1)
        start = part * part_width
        end = tl.minimum(start + part_width, hidden)
        U = Y2 + hidden
        u_width = width2
        if SPLIT:
            U = PARTS + part.to(tl.int64) * n * (E * R2)
            u_width = E * R2
        e0 = _number_at(used, earlier)
        if STEP == 2 and earlier + 1 < count:
            e1 = _number_at(used, earlier + 1)
            _delta_pass(Y1, WEIGHTS, UP, BIAS, DOWN, Y2, U, token, real, e0, e1, earlier, start, end, hidden, width1,
                        width2, u_width, True, E, R1, R2, QUICK, EVEN, BM, BN, BR1, BR2)  # fmt: skip
        else:
            _delta_pass(Y1, WEIGHTS, UP, BIAS, DOWN, Y2, U, token, real, e0, e0, earlier, start, end, hidden, width1,
                        width2, u_width, False, E, R1, R2, QUICK, EVEN, BM, BN, BR1, BR2)  # fmt: skip
        if earlier == 0:
            if not SPLIT:
                _zeros_of_unused(U, token, real, used, u_width, E, R2, BM, BR2)
            if part == 0:
                expert = tl.arange(0, _WIDE)
                mask = real[:, None] & (expert[None, :] < E)
                weights = tl.load(WEIGHTS + token[:, None] * E + expert[None, :], mask=mask, other=0.0)
                place = Y2 + token[:, None] * width2 + hidden + E * R2 + expert[None, :]
                tl.store(place, weights.to(Y2.dtype.element_ty), mask=real[:, None])


@triton.jit
def _sum_parts_kernel(PARTS, WEIGHTS, OUT, n, columns, width, E: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr):
    """OUT [N, columns] (rows `width` apart) = the sum of PARTS [SPLIT, N, columns], and 0 for experts that a token did
    not choose: nothing was written there."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    e = c // (columns // E)
    chosen = (c < columns) & (tl.load(WEIGHTS + row * E + e, mask=c < columns, other=0.0) != 0)
    total = tl.zeros((BN,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(PARTS + (part * n + row) * columns + c, mask=chosen, other=0.0)
    tl.store(OUT + row * width + c, total.to(OUT.dtype.element_ty), mask=c < columns)


def _sum_parts(parts: torch.Tensor, weights_NE: torch.Tensor, out: torch.Tensor) -> None:
    """out, columns of a larger matrix, becomes the sum over the first dimension of parts."""
    (split, n, columns), tile = parts.shape, Tile(1, 256, 0, 2, 1)
    grid, constants = (n, triton.cdiv(columns, tile.cols)), {"E": weights_NE.shape[1], "SPLIT": split, "BN": tile.cols}
    launch(_sum_parts_kernel, grid, tile, out, parts, weights_NE, out, n, columns, out.stride(0), **constants)


def order_by_set(experts_NK: torch.Tensor, num_experts: int | None = None) -> torch.Tensor:
    """Tokens [N] in the order of the sets of experts that they use: a tile of them then uses few experts.

    `num_experts` (of the model) need not be given, but of 4 or fewer there are at most 16 sets, and one kernel sorts.
    """
    if num_experts is not None and num_experts <= 4:
        return sort_experts(experts_NK, 1 << num_experts, sets=True).order
    return (1 << experts_NK).sum(-1, dtype=torch.int32).argsort(stable=True)


def order_if_it_pays(experts_NK: torch.Tensor, num_experts: int | None = None) -> torch.Tensor | None:
    """`order_by_set` of many tokens; None of few, which `delta_ffn` then takes as they come."""
    return order_by_set(experts_NK, num_experts) if len(experts_NK) >= SORT_FROM else None


def delta_ffn(
    packed: PackedDelta, x_ND: torch.Tensor, weights_NE: torch.Tensor, order_N: torch.Tensor | None = None
) -> torch.Tensor:
    """`DeltaExperts` as product -> kernel -> product: [N,D] -> [N,D]. `weights_NE` as `route` gives them. `order_N`,
    of `order_if_it_pays`, changes the speed alone. Gradients: of x and of the weights, none of any expert."""
    return call(_DeltaFFN, x_ND.to(packed.first.dtype), weights_NE, packed, order_N)


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


class _Plan(NamedTuple):
    """How a delta kernel goes over N tokens and the columns of H."""

    tile: Tile
    grid: tuple[int, int]
    part_width: int  # columns of H that one program takes
    constants: dict[str, int | bool]


def tile_kind(kind: str, packed: PackedDelta, y1: torch.Tensor, order_N: torch.Tensor | None) -> str:
    """Which line of the table of tiles `delta` or `delta back` takes for these tokens."""
    rank = triton.next_power_of_2(max(packed.up.shape[2], packed.down.shape[1], 64))
    name = f"{kind} of rank {rank}"
    few = order_N is None and len(y1) <= FEW_TOKENS  # those that are sorted are many
    return f"{name}, few tokens" if few and (f"{name}, few tokens", y1.element_size()) in TILES else name


def _plan(kind: str, packed: PackedDelta, y1: torch.Tensor, order_N: torch.Tensor | None) -> _Plan:
    (e, hidden, r1), r2, n = packed.up.shape, packed.down.shape[1], len(y1)
    br1, br2 = triton.next_power_of_2(r1), triton.next_power_of_2(r2)
    tile = find_tile(tile_kind(kind, packed, y1, order_N), y1)
    split = _delta_split(n, hidden, tile)
    part_width = triton.cdiv(triton.cdiv(hidden, split), tile.cols) * tile.cols
    constants = {"E": e, "R1": r1, "R2": r2, "BR1": br1, "BR2": br2, "BM": tile.rows, "BN": tile.cols}
    constants |= {"QUICK": packed.quick, "SORTED": order_N is not None, "SPLIT": split > 1, "STEP": tile.inner}
    constants["BIG"] = n * max(y1.shape[1], packed.second.shape[1]) >= 2**31
    constants["EVEN"] = hidden % tile.cols == 0
    return _Plan(tile, (triton.cdiv(n, tile.rows), split), part_width, constants)


def _delta_split(tokens: int, hidden: int, tile: Tile) -> int:
    """Into how many parts H is cut, so that a few tokens keep a whole card busy; each of at least five tiles."""
    wanted = triton.cdiv(ENOUGH_PROGRAMS, max(1, triton.cdiv(tokens, tile.rows)))
    return max(1, min(wanted, MAX_SPLIT, hidden // (5 * tile.cols)))


def _delta_middle(packed, y1, weights_NE, order_N) -> torch.Tensor:
    """What stands between the two products: [N, H + E R1] -> [N, H + E R2 + 16]."""
    plan, (n, hidden) = _plan("delta", packed, y1, order_N), (len(y1), packed.up.shape[1])
    split, columns = plan.grid[1], packed.down.shape[0] * packed.down.shape[1]  # E R2
    y2 = y1.new_empty(n, packed.second.shape[1])
    parts = y1.new_empty(split, n, columns, dtype=torch.float32) if split > 1 else y2
    order = weights_NE if order_N is None else order_N
    pointers = (y1, weights_NE, order, packed.up, packed.bias, packed.down, y2, parts)
    sizes = (n, hidden, plan.part_width, y1.shape[1], y2.shape[1])
    for earlier in range(0, weights_NE.shape[1], plan.constants["STEP"]):
        launch(_delta_kernel, plan.grid, plan.tile, y1, *pointers, *sizes, earlier, **plan.constants)
    if split > 1:
        _sum_parts(parts, weights_NE, y2[:, hidden : hidden + columns])
    return y2


# ---------------------------------------------------------------------------------------------------------- backward


@triton.jit
def _delta_back_expert(z, u_grad, z_grad, weight_grad, weight, base, mixed_grad, UP, BIAS, DOWN, e, c, end, hidden,
                       R1, R2, QUICK, EVEN, BR1, BR2):  # fmt: skip
    """One expert at some columns c of H -> t_e's gradient there; z_e's and w_e's with their part added."""
    r1, r2 = tl.arange(0, BR1), tl.arange(0, BR2)
    up = _block(UP + e * hidden * R1, c, r1, R1, c < end, r1 < R1, EVEN, R1 == BR1)
    down = _block(DOWN + e * R2 * hidden, r2, c, hidden, r2 < R2, c < end, R2 == BR2, EVEN)
    bias = tl.load(BIAS + e * hidden + c, mask=c < end, other=0.0).to(tl.float32)
    t = _dot(z, tl.trans(up), base.to(tl.float32) + bias[None, :])
    h_grad = _dot(u_grad, down, mixed_grad.to(tl.float32))
    h, slope = _activate_and_slope(t, QUICK)
    weight_grad += tl.sum(h * h_grad, axis=1)  # columns past the end have h_grad 0
    t_grad = tl.where((weight != 0)[:, None], weight[:, None] * h_grad * slope, 0.0)
    return t_grad, _dot(t_grad.to(z.dtype), up, z_grad), weight_grad


@triton.jit
def _delta_back_pass(Y1, G2, WEIGHTS, UP, BIAS, DOWN, G1, Z_GRAD, WEIGHTS_GRAD, token, real, e0, e1, earlier, start,
                     end, hidden, width1, width2, z_width, TWO, E, R1, R2, QUICK, EVEN, BM, BN, BR1, BR2):  # fmt: skip
    """Two experts (or e0 alone) over the columns start .. end of H. earlier: experts that G1 holds already."""
    r1, r2 = tl.arange(0, BR1), tl.arange(0, BR2)
    weight0 = tl.load(WEIGHTS + token * E + e0, mask=real, other=0.0)
    z0 = _block(Y1 + hidden + e0 * R1, token, r1, width1, real, r1 < R1, False, R1 == BR1)
    u_grad0 = _block(G2 + hidden + e0 * R2, token, r2, width2, real, r2 < R2, False, R2 == BR2)
    z_grad0 = tl.zeros((BM, BR1), tl.float32)
    # What came through the biases of fc2, once
    bias_place = G2 + token * width2 + hidden + E * R2
    weight_grad0 = tl.load(bias_place + e0, mask=real & (start == 0), other=0.0).to(tl.float32)
    if TWO:
        weight1 = tl.load(WEIGHTS + token * E + e1, mask=real, other=0.0)
        z1 = _block(Y1 + hidden + e1 * R1, token, r1, width1, real, r1 < R1, False, R1 == BR1)
        u_grad1 = _block(G2 + hidden + e1 * R2, token, r2, width2, real, r2 < R2, False, R2 == BR2)
        z_grad1 = tl.zeros((BM, BR1), tl.float32)
        weight_grad1 = tl.load(bias_place + e1, mask=real & (start == 0), other=0.0).to(tl.float32)
    for c0 in range(start, end, BN):
        c = c0 + tl.arange(0, BN)
        base = _block(Y1, token, c, width1, real, c < end, False, EVEN)
        mixed_grad = _block(G2, token, c, width2, real, c < end, False, EVEN)
        base_grad, z_grad0, weight_grad0 = _delta_back_expert(
            z0, u_grad0, z_grad0, weight_grad0, weight0, base, mixed_grad, UP, BIAS, DOWN, e0, c, end, hidden, R1, R2,
            QUICK, EVEN, BR1, BR2)  # fmt: skip
        if TWO:
            t_grad, z_grad1, weight_grad1 = _delta_back_expert(
                z1, u_grad1, z_grad1, weight_grad1, weight1, base, mixed_grad, UP, BIAS, DOWN, e1, c, end, hidden, R1,
                R2, QUICK, EVEN, BR1, BR2)  # fmt: skip
            base_grad += t_grad
        if earlier > 0:
            base_grad += _block(G1, token, c, width1, real, c < end, False, EVEN).to(tl.float32)
        mask = real[:, None] & (c[None, :] < end)
        tl.store(G1 + token[:, None] * width1 + c[None, :], base_grad.to(G1.dtype.element_ty), mask=mask)
    z_mask = real[:, None] & (r1[None, :] < R1)
    z_type = Z_GRAD.dtype.element_ty
    tl.store(Z_GRAD + token[:, None] * z_width + e0 * R1 + r1[None, :], z_grad0.to(z_type), mask=z_mask)
    tl.store(WEIGHTS_GRAD + token * E + e0, tl.where(weight0 != 0, weight_grad0, 0.0), mask=real)
    if TWO:
        tl.store(Z_GRAD + token[:, None] * z_width + e1 * R1 + r1[None, :], z_grad1.to(z_type), mask=z_mask)
        tl.store(WEIGHTS_GRAD + token * E + e1, tl.where(weight1 != 0, weight_grad1, 0.0), mask=real)


@triton.jit(do_not_specialize=["earlier"])
def _delta_back_kernel(Y1, G2, WEIGHTS, ORDER, UP, BIAS, DOWN, G1, PARTS, WEIGHTS_GRAD, n, hidden, part_width, width1,
                       width2, earlier, E: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, QUICK: tl.constexpr,
                       SORTED: tl.constexpr, BIG: tl.constexpr, SPLIT: tl.constexpr, STEP: tl.constexpr,
                       EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR1: tl.constexpr,
                       BR2: tl.constexpr):  # fmt: skip
    """Gradients G2 of Y2 [mixed h | u | weights] -> gradients G1 of Y1 [base h | z], and of the weights [parts,N,E].

    h_e is computed again from Y1. With g_e = G2's h + down_e^T (G2's u_e), the gradient of w_e h_e:
    t_e's gradient is w_e g_e act'(t_e), summed over experts it is the base's, times up_e it is z_e's (a sum over H:
    with SPLIT each part goes to PARTS); w_e's is the sum over H of g_e h_e, and what came through the biases of fc2.
    """
    token, real = _tokens(ORDER, n, SORTED, BIG, BM)
    used = _used_experts(WEIGHTS, token, real, E)
    count = tl.sum(used, axis=0)
    if earlier < count:
        part = tl.program_id(1)
        start = part * part_width
        end = tl.minimum(start + part_width, hidden)
        Z_GRAD = G1 + hidden
        z_width = width1
        if SPLIT:
            Z_GRAD = PARTS + part.to(tl.int64) * n * (E * R1)
            z_width = E * R1
        MINE = WEIGHTS_GRAD + part.to(tl.int64) * n * E
        e0 = _number_at(used, earlier)
        if STEP == 2 and earlier + 1 < count:
            e1 = _number_at(used, earlier + 1)
            _delta_back_pass(Y1, G2, WEIGHTS, UP, BIAS, DOWN, G1, Z_GRAD, MINE, token, real, e0, e1, earlier, start,
                             end, hidden, width1, width2, z_width, True, E, R1, R2, QUICK, EVEN, BM, BN, BR1,
                             BR2)  # fmt: skip
        else:
            _delta_back_pass(Y1, G2, WEIGHTS, UP, BIAS, DOWN, G1, Z_GRAD, MINE, token, real, e0, e0, earlier, start,
                             end, hidden, width1, width2, z_width, False, E, R1, R2, QUICK, EVEN, BM, BN, BR1,
                             BR2)  # fmt: skip
        if earlier == 0:
            if not SPLIT:
                _zeros_of_unused(Z_GRAD, token, real, used, z_width, E, R1, BM, BR1)
            _zeros_of_unused(MINE, token, real, used, E, E, 1, BM, 1)


def _delta_middle_grad(packed, y1, y2_grad, weights_NE, order_N) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of what stands between the products: [N, H + E R2 + 16] -> [N, H + E R1], and of the weights [N,E]."""
    plan, (n, hidden) = _plan("delta back", packed, y1, order_N), (len(y1), packed.up.shape[1])
    split, columns = plan.grid[1], packed.up.shape[0] * packed.up.shape[2]  # E R1
    y1_grad = torch.empty_like(y1)
    parts = y1.new_empty(split, n, columns, dtype=torch.float32) if split > 1 else y1_grad
    weights_grad = weights_NE.new_empty(split, *weights_NE.shape)
    order = weights_NE if order_N is None else order_N
    pointers = (y1, y2_grad, weights_NE, order, packed.up, packed.bias, packed.down, y1_grad, parts, weights_grad)
    sizes = (n, hidden, plan.part_width, y1.shape[1], y2_grad.shape[1])
    for earlier in range(0, weights_NE.shape[1], plan.constants["STEP"]):
        launch(_delta_back_kernel, plan.grid, plan.tile, y1, *pointers, *sizes, earlier, **plan.constants)
    if split > 1:
        _sum_parts(parts, weights_NE, y1_grad[:, hidden:])
    return y1_grad, weights_grad.sum(0)
