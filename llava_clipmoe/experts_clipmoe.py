"""Router and experts of a CLIP-MoE block: whole experts, and experts as small differences to one base FFN.

Copied beside the weights of a saved model (`auto_map`), therefore it imports nothing of this package.

Shape suffixes:  N tokens   D width   H FFN width   E experts   K experts per token   M = N*K token-expert pairs
r rank of a difference   G tokens of one group
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

QUICK = 1.702


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """OpenAI CLIP's activation, x * sigmoid(1.702 x). Not the same as gelu: a mix-up costs points silently.

    Written as silu(1.702 x) / 1.702: a backward pass then keeps one tensor of the FFN's width instead of two.
    """
    return F.silu(QUICK * x) / QUICK


def quick_gelu_(x: torch.Tensor) -> torch.Tensor:
    """The same in place, where nothing will be learnt: no copies of the FFN's width."""
    return F.silu(x.mul_(QUICK), inplace=True).div_(QUICK)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


def activation(name: str):
    """The activation called `name` ("quick_gelu" or "gelu"); any other name is refused, never replaced."""
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act {name!r} is not one of {sorted(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


class Router(nn.Module):
    """Chooses K of E experts for every token, in fp32 whatever the model's dtype (eq. 3 and 5).

    softmax over all E, top-K of it, renormalised to sum 1 (equal to Softmax(TopK(logits))). No bias.
    """

    def __init__(self, config):
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.jitter = config.router_jitter_noise
        self.initializer_range = config.router_initializer_range
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> logits [N,E] fp32, weights [N,K] fp32 (sum 1), chosen experts [N,K] int64."""
        with torch.autocast(x_ND.device.type, enabled=False):  # autocast would cast the product back to bf16
            logits_NE = F.linear(self.jittered(x_ND).float(), self.weight.float())
            weights_NK, experts_NK = logits_NE.softmax(-1).topk(self.num_experts_per_tok, dim=-1)
            weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
        return logits_NE, weights_NK, experts_NK

    def jittered(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Tokens times noise around 1 (in fp32) while it trains, where the config asks for it; else as they are."""
        if not (self.training and self.jitter):
            return x_ND
        return x_ND.float() * torch.empty_like(x_ND, dtype=torch.float32).uniform_(1 - self.jitter, 1 + self.jitter)


def make_experts(config, index: int) -> Experts | DeltaExperts:
    """The experts of block `index`: whole, or differences where the config gives their ranks (`delta_ranks`)."""
    if config.delta_ranks is None:
        return Experts(config)
    return DeltaExperts(config, *config.delta_ranks[config.moe_layers.index(index)])


# ------------------------------------------------------------------------------------------------------ whole experts


class StackedLinear(nn.Module):
    """E linear layers in one tensor: weight [E,out,in], bias [E,out]."""

    def __init__(self, num_experts: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features))


class Experts(nn.Module):
    """E FFNs with stacked weights: one grouped product serves all, and a sharded engine gathers them together."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        self.implementation = config.experts_implementation
        self.dropout = config.expert_dropout
        self.act = activation(config.hidden_act)
        self.fc1 = StackedLinear(config.num_experts, config.hidden_size, config.intermediate_size)
        self.fc2 = StackedLinear(config.num_experts, config.intermediate_size, config.hidden_size)
        set_ffn_init(self, config)

    def single(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """FFN number `expert` on every token: [..,D] -> [..,D]."""
        h = self.act(F.linear(x, self.fc1.weight[expert], self.fc1.bias[expert]))
        h = F.dropout(h, self.dropout, self.training)
        return F.linear(h, self.fc2.weight[expert], self.fc2.bias[expert])

    def forward(self, x_ND: torch.Tensor, weights_NK: torch.Tensor, experts_NK: torch.Tensor) -> torch.Tensor:
        """Weighted sum over each token's experts (eq. 4): [N,D] -> [N,D]."""
        backend = self.implementation
        if backend == "auto":
            backend = "grouped_mm" if grouped_mm_pays(x_ND) else "loop"
        return getattr(self, f"_{backend}")(x_ND, weights_NK, experts_NK)

    def _loop(self, x_ND, weights_NK, experts_NK):
        """The readable reference: sort token-expert pairs by expert, run each expert on its own slice."""
        order_M, counts_E = _sort_by_expert(experts_NK, self.num_experts)
        x_MD, counts = x_ND[order_M // experts_NK.shape[1]], counts_E.tolist()
        if self.act is quick_gelu and only_reads(self):
            return self._read(x_MD, counts, order_M, weights_NK)
        # An expert without tokens runs on an empty slice, so that its gradient is zero and not None.
        parts = [self.single(part, e) for e, part in enumerate(x_MD.split(counts))]
        return _combine(torch.cat(parts), order_M, weights_NK)

    def _read(self, x_MD, counts, order_M, weights_NK):
        """The rest of the loop where no graph is built: results take the place of their tokens, and few tensors are
        held at a time, since those that a block frees at its end the next one fetches again page by page."""
        y_MD = x_MD.to(working_dtype(x_MD))
        for e, (rows, own) in enumerate(_slices(counts, step=16 if few_sizes_pay(x_MD) else 1)):
            y_MD[rows][own] = self._in_place(y_MD[rows], e)[own]
        place_NK = _inverse(order_M).view(weights_NK.shape)
        weights_NK = weights_NK.to(y_MD.dtype)
        out_ND = y_MD[place_NK[:, 0]].mul_(weights_NK[:, :1])
        for k in range(1, weights_NK.shape[1]):
            out_ND.addcmul_(y_MD[place_NK[:, k]], weights_NK[:, k : k + 1])
        return out_ND

    def _in_place(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """`single` where no graph is built: quick_gelu(x) = silu(1.702 x) / 1.702, one pass and no copy of [..,H]; the
        factors ride on the products. Elementwise passes are a quarter of a bf16 FFN's time on a CPU."""
        h = torch.addmm(self.fc1.bias[expert], x, self.fc1.weight[expert].t(), beta=QUICK, alpha=QUICK)
        h = F.silu(h, inplace=True)
        return torch.addmm(self.fc2.bias[expert], h, self.fc2.weight[expert].t(), alpha=1 / QUICK)

    def _grouped_mm(self, x_ND, weights_NK, experts_NK):
        """One grouped product per projection (torch.nn.functional.grouped_mm): no host sync, no Python loop."""
        order_M, counts_E = _sort_by_expert(experts_NK, self.num_experts)
        expert_M = experts_NK.flatten()[order_M]
        offsets_E = counts_E.cumsum(0).to(torch.int32)
        # Autocast does not know grouped_mm on the CPU, and it rejects mixed dtypes: cast here.
        dtype = working_dtype(x_ND)
        x_MD = x_ND[order_M // experts_NK.shape[1]].to(dtype)
        h_MH = F.grouped_mm(x_MD, self.fc1.weight.to(dtype).transpose(-2, -1), offs=offsets_E)
        h_MH = self.act(h_MH + self.fc1.bias.to(dtype)[expert_M])
        h_MH = F.dropout(h_MH, self.dropout, self.training)
        y_MD = F.grouped_mm(h_MH, self.fc2.weight.to(dtype).transpose(-2, -1), offs=offsets_E)
        return _combine(y_MD + self.fc2.bias.to(dtype)[expert_M], order_M, weights_NK)


# --------------------------------------------------------------------------------------------- the kernels of a GPU

FAST = "LLAVA_CLIPMOE_FAST"
"""Environment variable: 0, no kernels; 1, in fp32 too, where nobody has measured that they pay."""


def kernels_for(x: torch.Tensor) -> ModuleType | None:
    """`fast_clipmoe`, where the kernels run for `x`: on a GPU, with products in half precision. Else None."""
    wanted = os.environ.get(FAST, "")
    if not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") or wanted == "0":  # (the interpreter: for tests)
        return None
    dtype = working_dtype(x)
    if (dtype.itemsize != 2 and wanted != "1") or _is_compiling():
        return None
    module = _import_kernels()
    return module if module is not None and module.runs_on(x.device, dtype) else None


@functools.cache
def _import_kernels() -> ModuleType | None:
    """None, and one line that says why, where there is no triton."""
    try:
        from .fast_clipmoe import this_module
    except ImportError as error:
        logging.getLogger("llava_clipmoe").warning("llava-clipmoe: the GPU kernels are not used: %s", error)
        return None
    return this_module()


def _is_compiling() -> bool:
    """True while torch.compile traces: it has kernels of its own."""
    compiler = getattr(torch, "compiler", None)
    return bool(getattr(compiler, "is_compiling", bool)())


class Prepared(nn.Module):
    """A module that keeps what the fast path made of its weights (`prepared`), until they move or it trains."""

    prepared: Any = None

    def _apply(self, *args: Any, **kwargs: Any):  # what `.to()`, `.cpu()` and `.half()` call
        super()._apply(*args, **kwargs)
        if self.prepared is not None and not self.prepared.in_place():
            self.prepared = None
        return self

    def train(self, mode: bool = True):
        if mode:
            self.prepared = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of a module make their own."""
        return {**self.__dict__, "prepared": None}


# --------------------------------------------------------------------------------------------- experts as differences


class DeltaLinear(nn.Module):
    """E linear layers that differ little: W_e = base + up_e down_e, of rank r.

    base [out,in], up [E,out,r], down [E,r,in], bias [E,out] (whole, not a difference).
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.base = nn.Parameter(torch.empty(out_features, in_features))
        self.up = nn.Parameter(torch.empty(num_experts, out_features, rank))
        self.down = nn.Parameter(torch.empty(num_experts, rank, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features))

    def weight_of(self, expert: int) -> torch.Tensor:
        """W_e [out,in]."""
        return self.base + self.up[expert] @ self.down[expert]


class DeltaExperts(Prepared):
    """E FFNs as one base FFN and low-rank differences to it: the base's products run once a token, whatever K is.

        h_e = act(W1_0 x + B1_e A1_e x + b1_e)
        out = sum_k w_k (W2_e h_e + b2_e) = W2_0 (sum_k w_k h_e) + sum_k w_k (B2_e A2_e h_e + b2_e)

    since the second projection is linear. rank1, rank2: of the differences of fc1 and fc2.
    """

    def __init__(self, config, rank1: int, rank2: int):
        super().__init__()
        self.num_experts = config.num_experts
        self.implementation = config.experts_implementation
        self.dropout = config.expert_dropout
        self.act = activation(config.hidden_act)
        self.scale = QUICK if self.act is quick_gelu else 1.0
        self.fc1 = DeltaLinear(config.num_experts, config.hidden_size, config.intermediate_size, rank1)
        self.fc2 = DeltaLinear(config.num_experts, config.intermediate_size, config.hidden_size, rank2)
        set_ffn_init(self, config)

    def single(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """FFN number `expert` on every token: [..,D] -> [..,D]."""
        h = self.act(F.linear(x, self.fc1.weight_of(expert), self.fc1.bias[expert]))
        h = F.dropout(h, self.dropout, self.training)
        return F.linear(h, self.fc2.weight_of(expert), self.fc2.bias[expert])

    def forward(self, x_ND: torch.Tensor, weights_NK: torch.Tensor, experts_NK: torch.Tensor) -> torch.Tensor:
        """Weighted sum over each token's experts (eq. 4): [N,D] -> [N,D]."""
        backend = self.implementation
        if backend == "auto":
            backend = "grouped_mm" if grouped_mm_pays(x_ND) else "by_set" if only_reads(self) else "loop"
        return getattr(self, f"_{backend}")(x_ND, weights_NK, experts_NK)

    def _loop(self, x_ND, weights_NK, experts_NK):
        """The readable reference: every expert with its whole weights, on its own slice."""
        order_M, counts_E = _sort_by_expert(experts_NK, self.num_experts)
        x_MD = x_ND[order_M // experts_NK.shape[1]]
        parts = [self.single(part, e) for e, part in enumerate(x_MD.split(counts_E.tolist()))]
        return _combine(torch.cat(parts), order_M, weights_NK)

    def _by_set(self, x_ND, weights_NK, experts_NK):
        """Without a graph, for the CPU: tokens sorted by the SET of experts that they use (6 sets of 2 out of 4), so
        that a group is one slice for all its experts and nothing of width H is ever gathered or copied."""
        fc1, fc2, dtype = *self._parts(x_ND), working_dtype(x_ND)
        order_N, groups = _sort_by_set(experts_NK, self.num_experts)
        if groups and few_sizes_pay(x_ND):
            order_N, groups = _even(order_N, groups, self.num_experts)
        weights_NE = torch.zeros(len(x_ND), self.num_experts, device=x_ND.device).scatter(1, experts_NK, weights_NK)
        weights_NE = (weights_NE[order_N] / self.scale).to(dtype)
        x_ND = x_ND[order_N].to(dtype)
        z_NEr = F.linear(x_ND, fc1.down.flatten(0, 1)).mul_(self.scale).unflatten(1, (self.num_experts, -1))
        h_NH = torch.addmm(fc1.bias[0], x_ND, fc1.base.t(), beta=self.scale, alpha=self.scale)
        y_ND = torch.mm(weights_NE * self.scale, fc2.bias, out=x_ND)  # over x, which is needed no more
        spare = h_NH.new_empty(max(((len(chosen) - 1) * count for chosen, count in groups), default=0), h_NH.shape[1])
        shift_EH = (fc1.bias - fc1.bias[0]) * self.scale
        start = 0
        for chosen, count in groups:
            rows = slice(start, start := start + count)
            self._group(h_NH[rows], y_ND[rows], z_NEr[rows], weights_NE[rows], chosen, spare, fc1.up, shift_EH, fc2)
        y_ND.addmm_(h_NH, fc2.base.t())
        del h_NH, spare  # the result takes their place: what a block frees at its end is fetched again page by page
        return y_ND[_inverse(order_N)]

    def _group(self, h_GH, y_GD, z_GEr, weights_GE, chosen, spare, up1_EHr, shift_EH, fc2) -> None:
        """Tokens that use the experts `chosen`, in place: h_GH, the base's part of the first projection, becomes
        sum_k w_k h_k; the low-rank part of the second projection is added to y_GD. spare: room for the other h_k."""
        last, *others = chosen
        hidden = {}
        for e, h in zip(others, spare.split(len(h_GH)), strict=False):
            torch.add(h_GH, shift_EH[e], out=h)
            hidden[e] = self._activate_(h.addmm_(z_GEr[:, e], up1_EHr[e].t()))
        if last:  # expert 0's bias is in already
            h_GH.add_(shift_EH[last])
        hidden[last] = self._activate_(h_GH.addmm_(z_GEr[:, last], up1_EHr[last].t()))  # the base's part is used up
        for e in chosen:
            y_GD.addmm_((hidden[e] @ fc2.down[e].t()) * weights_GE[:, e : e + 1], fc2.up[e].t())
        h_GH.mul_(weights_GE[:, last : last + 1])
        for e in others:
            h_GH.addcmul_(hidden[e], weights_GE[:, e : e + 1])

    def _activate_(self, h: torch.Tensor) -> torch.Tensor:
        """h becomes scale * act(h / scale): quick_gelu(x) = silu(1.702 x) / 1.702 needs no copy."""
        return F.silu(h, inplace=True) if self.scale != 1.0 else h.copy_(self.act(h))

    def _grouped_mm(self, x_ND, weights_NK, experts_NK):
        """For a GPU, and with a graph: the base's products over all tokens, the differences' by grouped_mm."""
        order_M, counts_E = _sort_by_expert(experts_NK, self.num_experts)
        expert_M, token_M = experts_NK.flatten()[order_M], order_M // experts_NK.shape[1]
        fc1, fc2, x_ND = *self._parts(x_ND), x_ND.to(working_dtype(x_ND))
        offsets_E = counts_E.cumsum(0).to(torch.int32)

        def each(x_Mi: torch.Tensor, weight_Eoi: torch.Tensor) -> torch.Tensor:
            return F.grouped_mm(x_Mi, weight_Eoi.transpose(-2, -1), offs=offsets_E)

        z_NEr = F.linear(x_ND, fc1.down.flatten(0, 1)).unflatten(1, (self.num_experts, -1))
        h_MH = F.linear(x_ND, fc1.base)[token_M] + each(z_NEr[token_M, expert_M], fc1.up)
        h_MH = F.dropout(self.act(h_MH + fc1.bias[expert_M]), self.dropout, self.training)
        y_MD = each(each(h_MH, fc2.down), fc2.up) + fc2.bias[expert_M]
        mixed_NH = _combine(h_MH, order_M, weights_NK)
        return F.linear(mixed_NH, fc2.base) + _combine(y_MD, order_M, weights_NK)

    def _parts(self, x: torch.Tensor) -> tuple[_Parts, _Parts]:
        """Both layers' tensors in the dtype that the products run in (autocast is not asked: see `working_dtype`)."""
        dtype = working_dtype(x)
        return tuple(_Parts(*(t.to(dtype) for t in (fc.base, fc.up, fc.down, fc.bias))) for fc in (self.fc1, self.fc2))


class _Parts(NamedTuple):
    base: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    bias: torch.Tensor


# ------------------------------------------------------------------------------------------------------------ common


def residual_std(config) -> float:
    """Standard deviation of what writes into the residual stream (OpenAI's CLIP): narrower the deeper the tower."""
    return config.hidden_size**-0.5 * (2 * config.num_hidden_layers) ** -0.5


def set_ffn_init(ffn: nn.Module, config) -> None:
    """Tell `_init_weights` how to draw an FFN, dense or of experts. On the layers that own the weights, see there."""
    ffn.fc1.init_std = (2 * config.hidden_size) ** -0.5
    ffn.fc2.init_std = residual_std(config)


def _sort_by_expert(experts_NK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-> order [N*K] of the flattened token-expert pairs, grouped by expert (stable), and each expert's count [E]."""
    flat = experts_NK.flatten()
    return flat.argsort(stable=True), count_experts(flat, num_experts)


def count_experts(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How often each expert occurs [E]. torch.bincount would wait for a GPU, and cannot be compiled."""
    return (experts.flatten() == torch.arange(num_experts, device=experts.device)[:, None]).sum(1)


Groups = list[tuple[list[int], int]]
"""Tokens that lie together: the experts that they use and how many they are."""


def _sort_by_set(experts_NK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, Groups]:
    """-> order [N] of the tokens, grouped by the set of their experts, and the groups."""
    code_N = (1 << experts_NK).sum(-1)
    sorted_N, order_N = code_N.sort(stable=True)
    codes, counts = sorted_N.unique_consecutive(return_counts=True)
    sets = [[e for e in range(num_experts) if code >> e & 1] for code in codes.tolist()]
    return order_N, list(zip(sets, counts.tolist(), strict=True))


def _even(order_N: torch.Tensor, groups: Groups, num_experts: int) -> tuple[torch.Tensor, Groups]:
    """Groups of few different sizes, and a last one of what is over, whose tokens are given to all experts (those that
    a token did not choose weigh nothing). See `few_sizes_pay`."""
    step = max(1, len(order_N) // (8 * len(groups)))  # a sixteenth of the tokens is over, on average
    kept, over = [], []
    for part in order_N.split([count for _, count in groups]):
        whole = len(part) // step * step
        kept.append(part[:whole])
        over.append(part[whole:])
    rest = torch.cat(over)
    sets = [chosen for chosen, _ in groups]
    groups = [*zip(sets, map(len, kept), strict=True), (list(range(num_experts)), len(rest))]
    return torch.cat([*kept, rest]), [(chosen, count) for chosen, count in groups if count]


def _slices(counts: list[int], step: int) -> Iterator[tuple[slice, slice]]:
    """For groups that lie one after the other: the rows of each, made up to a multiple of `step` by its neighbours'
    (whose results are thrown away), and where its own lie in them. See `few_sizes_pay`."""
    start, total = 0, sum(counts)
    for count in counts:
        size = min(-(-count // step) * step, total)
        first = min(start, total - size)
        yield slice(first, first + size), slice(start - first, start - first + count)
        start += count


def _inverse(order: torch.Tensor) -> torch.Tensor:
    """Where each thing went that was put in this order: x[order][_inverse(order)] is x."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _combine(y_MD: torch.Tensor, order_M: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """Undo the sort and sum over K. Gather + sum, not index_add_: that one is not deterministic on CUDA."""
    y_NKD = y_MD[_inverse(order_M)].view(*weights_NK.shape, -1)
    return (y_NKD * weights_NK.unsqueeze(-1).to(y_NKD.dtype)).sum(1)


def few_sizes_pay(x: torch.Tensor) -> bool:
    """True where products of many sizes are dear: in half precision oneDNN compiles a kernel for every size and keeps
    it, 130 MB for one picture of ViT-L/14@336, and other sizes with the next picture."""
    return x.device.type == "cpu" and working_dtype(x).itemsize == 2


def only_reads(experts: nn.Module) -> bool:
    """True when nothing will be learnt from this pass: hidden states may be overwritten."""
    return not torch.is_grad_enabled() and not (experts.dropout and experts.training)


def working_dtype(x: torch.Tensor) -> torch.dtype:
    """What matrix products run in: autocast's dtype inside autocast, else that of `x`."""
    return torch.get_autocast_dtype(x.device.type) if _autocast_on(x) else x.dtype


def _autocast_on(x: torch.Tensor) -> bool:
    try:
        return torch.is_autocast_enabled(x.device.type)
    except TypeError:  # torch < 2.4 takes no device type
        return torch.is_autocast_cpu_enabled() if x.device.type == "cpu" else torch.is_autocast_enabled()


def grouped_mm_pays(x: torch.Tensor) -> bool:
    """True where grouped_mm has a fused kernel: bf16 on NVIDIA SM90 and newer, torch >= 2.10."""
    if not hasattr(F, "grouped_mm") or x.device.type != "cuda":
        return False
    return working_dtype(x) == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (9, 0)
