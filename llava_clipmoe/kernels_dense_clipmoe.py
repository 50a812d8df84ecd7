"""The dense FFN of a CLIP on a GPU, frozen or in training; CLIP-FMoE's gate; the residual with its layer norm.

Products are cuBLAS's; what is fused is what lies between them. Copied beside the weights of a saved model. See
`kernels_clipmoe` for how to read a kernel.

Shape suffixes:  N tokens   D width   H FFN width   E experts
"""

import torch
import torch.nn.functional as F

from .kernels_base_clipmoe import (
    _WIDE,
    _activate,
    _activate_and_slope,
    _dot,
    call,
    find_tile,
    launch,
    tl,
    triton,
)
from .kernels_pack_clipmoe import PackedFFN

# -------------------------------------------------------------------------------------------------- bias + activation


@triton.jit
def _bias_act_kernel(T, BIAS, ENDS, OUT, hidden, E: tl.constexpr, QUICK: tl.constexpr, BN: tl.constexpr):
    """One row of OUT = act(T + bias). E > 0: rows are sorted by expert, ENDS says where each one's end."""
    row = tl.program_id(0)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    if E > 0:
        expert = tl.arange(0, _WIDE)
        ends = tl.load(ENDS + expert, mask=expert < E, other=2147483647)
        BIAS += tl.sum((ends <= row).to(tl.int32), axis=0) * hidden
    place = row.to(tl.int64) * hidden + c
    t = tl.load(T + place, mask=c < hidden, other=0.0).to(tl.float32)
    t += tl.load(BIAS + c, mask=c < hidden, other=0.0).to(tl.float32)
    tl.store(OUT + place, _activate(t, QUICK).to(OUT.dtype.element_ty), mask=c < hidden)


def bias_act(t_NH: torch.Tensor, bias: torch.Tensor, quick: bool, out=None, ends_E=None) -> torch.Tensor:
    """act(t + bias) in one pass, into `out` or a new tensor. Builds no graph. bias [H]; or [E,H] for rows that are
    sorted by expert, of which `ends_E` says where each one's end."""
    (n, hidden), tile = t_NH.shape, find_tile("rows", t_NH)
    out = torch.empty_like(t_NH) if out is None else out
    grid, ends = (n, triton.cdiv(hidden, tile.cols)), bias if ends_E is None else ends_E
    constants = {"E": 0 if ends_E is None else len(ends_E), "QUICK": quick, "BN": tile.cols}
    launch(_bias_act_kernel, grid, tile, t_NH, t_NH, bias, ends, out, hidden, **constants)
    return out


def bias_act_(t_NH: torch.Tensor, bias_H: torch.Tensor, quick: bool) -> torch.Tensor:
    """act(t + bias) in the place of t, in one pass. Builds no graph."""
    return bias_act(t_NH, bias_H, quick, out=t_NH)


@triton.jit
def _bias_act_back_kernel(T, BIAS, H_GRAD, H, PARTS, n, hidden, QUICK: tl.constexpr, KEEP_H: tl.constexpr,
                          SUM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """One tile: H_GRAD becomes t's gradient, h_grad * act'(t + bias). KEEP_H: H = act(t + bias) again. SUM: PARTS
    [rows of tiles, H] gets the sum over my rows in fp32, a part of the bias's gradient."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (row[:, None] < n) & (c[None, :] < hidden)
    place = row.to(tl.int64)[:, None] * hidden + c[None, :]
    t = tl.load(T + place, mask=mask, other=0.0).to(tl.float32)
    t += tl.load(BIAS + c, mask=c < hidden, other=0.0).to(tl.float32)[None, :]
    h, slope = _activate_and_slope(t, QUICK)
    t_grad = tl.load(H_GRAD + place, mask=mask, other=0.0).to(tl.float32) * slope
    tl.store(H_GRAD + place, t_grad.to(H_GRAD.dtype.element_ty), mask=mask)
    if KEEP_H:
        tl.store(H + place, h.to(H.dtype.element_ty), mask=mask)
    if SUM:
        tl.store(PARTS + tl.program_id(0) * hidden + c, tl.sum(t_grad, axis=0), mask=c < hidden)


def _bias_act_back(t_NH, bias_H, h_grad_NH, quick, keep_h=False, sums=False):
    """h_grad_NH becomes t's gradient. -> h or None, gradient of the bias [H] in fp32 or None."""
    (n, hidden), tile = t_NH.shape, find_tile("rows back", t_NH)
    grid = (triton.cdiv(n, tile.rows), triton.cdiv(hidden, tile.cols))
    h_NH = torch.empty_like(t_NH) if keep_h else None
    parts = t_NH.new_empty(grid[0], hidden, dtype=torch.float32) if sums else None
    pointers = (t_NH, bias_H, h_grad_NH, h_NH if keep_h else t_NH, parts if sums else t_NH)
    constants = {"QUICK": quick, "KEEP_H": keep_h, "SUM": sums, "BM": tile.rows, "BN": tile.cols}
    launch(_bias_act_back_kernel, grid, tile, t_NH, *pointers, n, hidden, **constants)
    return h_NH, parts.sum(0) if sums else None


# --------------------------------------------------------------------------------------------------------- dense FFN


def dense_ffn(packed: PackedFFN, x_ND: torch.Tensor) -> torch.Tensor:
    """`CLIPMoEMLP`, frozen: [N,D] -> [N,D]. Gradient: of x alone."""
    return call(_DenseFFN, x_ND.to(packed.weight1.dtype), packed)


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
        t_NH, h_grad_NH = torch.mm(x_ND, packed.weight1.t()), torch.mm(out_grad, packed.weight2)  # t again
        _bias_act_back(t_NH, packed.bias1, h_grad_NH, packed.quick)
        return torch.mm(h_grad_NH, packed.weight1), None


def ffn(
    x_ND: torch.Tensor,
    weight1_HD: torch.Tensor,
    bias1_H: torch.Tensor,
    weight2_DH: torch.Tensor,
    bias2_D: torch.Tensor,
    quick: bool,
) -> torch.Tensor:
    """`CLIPMoEMLP` in training: [N,D] -> [N,D]. Gradients of all five tensors, where they are asked for. All of one
    dtype: under autocast the caller casts. Between forward and backward one tensor [N,H] is kept."""
    return call(_FFN, x_ND, weight1_HD, bias1_H, weight2_DH, bias2_D, quick)


class _FFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weight1_HD, bias1_H, weight2_DH, bias2_D, quick):
        t_NH = torch.mm(x_ND, weight1_HD.t())
        ctx.save_for_backward(x_ND, weight1_HD, bias1_H, weight2_DH, t_NH)
        ctx.quick = quick
        return torch.addmm(bias2_D, bias_act(t_NH, bias1_H, quick), weight2_DH.t())

    @staticmethod
    def backward(ctx, out_grad):
        (x_ND, weight1_HD, bias1_H, weight2_DH, t_NH), needs = ctx.saved_tensors, ctx.needs_input_grad
        x_grad = weight1_grad = bias1_grad = weight2_grad = None
        if any(needs[:4]):
            h_grad_NH = torch.mm(out_grad, weight2_DH)
            h_NH, bias1_grad = _bias_act_back(t_NH, bias1_H, h_grad_NH, ctx.quick, keep_h=needs[3], sums=needs[2])
            t_grad_NH = h_grad_NH
            bias1_grad = bias1_grad.to(bias1_H.dtype) if needs[2] else None
            weight2_grad = torch.mm(out_grad.t(), h_NH) if needs[3] else None
            weight1_grad = torch.mm(t_grad_NH.t(), x_ND) if needs[1] else None
            x_grad = torch.mm(t_grad_NH, weight1_HD) if needs[0] else None
        bias2_grad = out_grad.sum(0) if needs[4] else None
        return x_grad, weight1_grad, bias1_grad, weight2_grad, bias2_grad, None


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
    return call(_Fuse, x_ND, weight_DD, bias_D, base_ND, y_ND)


class _Fuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weight_DD, bias_D, base_ND, y_ND):
        x_ND, weight_DD, base_ND, y_ND = (t.contiguous() for t in (x_ND, weight_DD, base_ND, y_ND))
        ctx.save_for_backward(x_ND, weight_DD, bias_D, base_ND, y_ND)
        # Tokens in half precision and a gate in fp32 are multiplied in fp32, whose tiles are the larger ones.
        (n, d), tile = x_ND.shape, find_tile("gate", x_ND, torch.promote_types(x_ND.dtype, weight_DD.dtype))
        out_ND = torch.empty_like(y_ND)
        grid = (triton.cdiv(n, tile.rows), triton.cdiv(d, tile.cols))
        pointers = (x_ND, weight_DD, bias_D, base_ND, y_ND, out_ND)
        launch(_gate_kernel, grid, tile, x_ND, *pointers, n, d, BM=tile.rows, BN=tile.cols, BK=tile.inner)
        return out_ND

    @staticmethod
    def backward(ctx, out_grad):
        x_ND, weight_DD, bias_D, base_ND, y_ND = ctx.saved_tensors
        out_grad, x_float, weight_float = out_grad.float(), x_ND.float(), weight_DD.float()
        gate_ND = F.linear(x_float, weight_float, bias_D.float()).sigmoid()
        slope_ND = out_grad * (base_ND.float() - y_ND.float()) * gate_ND * (1 - gate_ND)
        gradients = (
            lambda: slope_ND @ weight_float,
            lambda: slope_ND.t() @ x_float,
            lambda: slope_ND.sum(0),
            lambda: gate_ND * out_grad,
            lambda: (1 - gate_ND) * out_grad,
        )
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
    x_ND: torch.Tensor,
    y_ND: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> x + y in the dtype of x, and its layer norm in `dtype` (None: the same), in one pass. Builds no graph."""
    x_ND, y_ND = x_ND.contiguous(), y_ND.contiguous()
    sum_ND, out_ND, (n, d) = torch.empty_like(x_ND), torch.empty_like(x_ND, dtype=dtype), x_ND.shape
    tile, pointers = find_tile("rows", x_ND), (x_ND, y_ND, weight_D, bias_D, sum_ND, out_ND)
    launch(_add_norm_kernel, (n,), tile, x_ND, *pointers, d, eps, BD=triton.next_power_of_2(d))
    return sum_ND, out_ND
