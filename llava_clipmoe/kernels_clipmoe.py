"""Triton kernels for the FFNs of a CLIP-MoE on a GPU. The readable loop in `experts_clipmoe` is what they must equal.

The router is here, and `check`; delta experts, whole experts and the dense FFN have files of their own, whose functions
this one passes on.

Copied beside the weights of a saved model, and imported only where Triton is: nothing imports it at module level.

How to read a kernel, for who knows torch and not Triton: the function under `@triton.jit` is one PROGRAM, started once
for each tile of the result. `tl.program_id` says which tile is mine, `tl.arange` makes its row and column numbers, and
a pointer plus such numbers is a tile of addresses to load or to store. The `mask` keeps a tile that hangs over the edge
from touching what is not there. Sizes of tiles are `tl.constexpr`, powers of two, and at least 16 where `tl.dot` (a
product of small matrices) needs it; all are chosen in `kernels_base_clipmoe`. Capitals are pointers and constants,
small letters values.

No forward pass here asks the device for a number (`.item()`, `.tolist()`, `nonzero`, ...): the CPU never waits, and a
CUDA graph can hold all of it. Nothing is summed by atomics: the same input gives the same bits.

`TRITON_INTERPRET=1` (set before triton is imported) runs the kernels on a CPU, slowly: that is how they are tested.

Shape suffixes:  N tokens   D width   E experts   K experts per token
"""

from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .experts_clipmoe import Experts, Router
from .experts_delta_clipmoe import DeltaExperts
from .kernels_base_clipmoe import (
    _WIDE,
    MAX_EXPERTS,
    MAX_RANK,
    _dot,
    call,
    find_tile,
    launch,
    refuse_experts,
    sort_experts,
    tl,
    triton,
)
from .kernels_delta_clipmoe import delta_ffn, order_by_set, order_if_it_pays
from .kernels_dense_clipmoe import add_layer_norm, bias_act_, dense_ffn, ffn, fuse
from .kernels_pack_clipmoe import PackedDelta, PackedFFN, pack_delta, pack_ffn, share_delta
from .kernels_whole_clipmoe import Pairs, grouped, whole_ffn

__all__ = [
    "MAX_EXPERTS", "MAX_RANK", "PackedDelta", "PackedFFN", "Routing", "add_layer_norm", "bias_act_", "check",
    "delta_ffn", "dense_ffn", "ffn", "fuse", "order_by_set", "order_if_it_pays", "pack_delta", "pack_ffn", "route",
    "share_delta", "whole_ffn",
]  # fmt: skip

# ------------------------------------------------------------------------------------------------------------ router


@triton.jit
def _route_kernel(
    X, W, LOGITS, WEIGHTS, EXPERTS, n, d, E: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):
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
    refuse_experts(len(weight_ED))
    return Routing(*call(_Route, x_ND, weight_ED, num_experts_per_tok))


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weight_ED, k):
        (n, d), e = x_ND.shape, len(weight_ED)
        x_ND, weight_ED = x_ND.contiguous(), weight_ED.contiguous()
        logits_NE = torch.empty(n, e, device=x_ND.device, dtype=torch.float32)
        weights_NE = torch.empty_like(logits_NE)
        experts_NK = torch.empty(n, k, device=x_ND.device, dtype=torch.int64)
        tile = find_tile("route", x_ND)
        pointers = (x_ND, weight_ED, logits_NE, weights_NE, experts_NK)
        constants = {"E": e, "K": k, "BM": tile.rows, "BD": tile.inner}
        launch(_route_kernel, (triton.cdiv(n, tile.rows),), tile, x_ND, *pointers, n, d, **constants)
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
        # LLaVA asks inside `inference_mode`, whose tensors could not have the gradients that are compared; a training
        # may ask inside a checkpointed block, which takes in every tensor that is kept for a backward pass.
        as_it_is = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
        with torch.inference_mode(False), torch.no_grad(), as_it_is:
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
    n, d, h, e, k, generator = 70, 64, 256, 4, 2, torch.Generator().manual_seed(0)

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
        config = SimpleNamespace(num_experts=e, num_experts_per_tok=k, hidden_size=d, intermediate_size=h)
        config.num_hidden_layers, config.hidden_act, config.experts_implementation = 2, hidden_act, "loop"
        config.expert_dropout, config.router_jitter_noise, config.router_initializer_range = 0.0, 0.0, 0.02
        router, whole, delta = (drawn(m) for m in (Router(config), Experts(config), DeltaExperts(config, 16, 64)))
        routing = route(given(x), given(router.weight), k)
        logits = x @ router.weight.t()
        yield "the router's logits", routing.logits, logits
        chosen = routing.experts.cpu()  # from here on the kernel's own choice: rounding may decide a near tie
        weights = logits.gather(1, chosen).softmax(-1)
        yield "the router's choice", logits.gather(1, chosen), logits.topk(k).values
        yield "the router's weights", routing.weights, torch.zeros(n, e).double().scatter(1, chosen, weights)

        expected, packed = delta(x, weights, chosen), pack_delta(delta.to(device), dtype)
        for order in (None, order_by_set(routing.experts, e)):
            yield f"delta experts ({hidden_act})", delta_ffn(packed, given(x), routing.weights, order), expected
        expected, packed = whole(x, weights, chosen), pack_ffn(whole.to(device), dtype)
        yield f"whole experts ({hidden_act})", whole_ffn(packed, given(x), *routing[1:]), expected
        one = PackedFFN(*(tensor[0] for tensor in packed[:4]), packed.quick)
        yield f"the dense FFN ({hidden_act})", dense_ffn(one, given(x)), whole.cpu().single(x, 0)
        yield from _of_large_tiles(packed, given(x), routing, whole, x, chosen)
        yield from _of_training(one, given(x), whole, x)

    gate, bias, base, y = draw(d, d), draw(d), draw(n, d), draw(n, d)
    share = F.linear(x, gate, bias).sigmoid()
    yield "the fusion gate", fuse(*map(given, (x, gate, bias, base, y))), share * base + (1 - share) * y
    both, norm = add_layer_norm(given(x), given(y), given(gate[0]), given(bias), 1e-5)
    yield "the residual", both, x + y
    yield "the layer norm", norm, F.layer_norm(both.double().cpu(), (d,), gate[0], bias, 1e-5)


def _of_large_tiles(packed, x_there, routing, whole, x, chosen):
    """The grouped product with the tile that many tokens take."""
    pairs = Pairs(sort_experts(routing.experts, len(packed.weight1)), routing.experts)
    found = grouped(pairs, x_there, packed.weight1, True, packed.bias1, packed.quick, kind="grouped")
    hidden_ENH = whole.act(torch.einsum("nd,ehd->enh", x, whole.fc1.weight) + whole.fc1.bias[:, None])
    order = chosen.flatten().argsort(stable=True)
    yield "the grouped product", found, hidden_ENH[chosen.flatten()[order], order // chosen.shape[1]]


def _of_training(one: PackedFFN, x_there, whole, x):
    """Gradients of the dense FFN in training: of x, and of the first bias, which a kernel sums."""
    with torch.enable_grad():
        x_there, bias_there = x_there.requires_grad_(), one.bias1.clone().requires_grad_()
        out = ffn(x_there, one.weight1, bias_there, one.weight2, one.bias2, one.quick)
        found = torch.autograd.grad(out.sum(), (x_there, bias_there))
        x = x.clone().requires_grad_()
        expected = torch.autograd.grad(whole.single(x, 0).sum(), (x, whole.fc1.bias))
    yield "the gradient of x", found[0], expected[0]
    yield "the gradient of a bias", found[1], expected[1][0]
