"""Experts of a CLIP-MoE block as low-rank differences to one base FFN.

Shape suffixes:  N tokens   D width   H FFN width   E experts   K experts per token   M = N*K token-expert pairs
r rank of a difference
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .common_clipmoe import (
    QUICK,
    activation,
    combine,
    grouped_mm_pays,
    only_reads,
    quick_gelu,
    set_ffn_init,
    sort_by_expert,
    working_dtype,
)
from .cpu_clipmoe import read_delta
from .gpu_clipmoe import Prepared


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

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """As copies where the parameters are views of what the kernels packed: transformers saves no such views."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._parameters:
            tensor = destination[prefix + name]
            if not keep_vars and tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
                destination[prefix + name] = tensor.clone(memory_format=torch.contiguous_format)


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
        order_M, counts_E = sort_by_expert(experts_NK, self.num_experts)
        x_MD = x_ND[order_M // experts_NK.shape[1]]
        parts = [self.single(part, e) for e, part in enumerate(x_MD.split(counts_E.tolist()))]
        return combine(torch.cat(parts), order_M, weights_NK)

    def _by_set(self, x_ND, weights_NK, experts_NK):
        """Without a graph, for the CPU: nothing of width H is ever gathered or copied."""
        return read_delta(self, self._parts(x_ND), x_ND, weights_NK, experts_NK)

    def _grouped_mm(self, x_ND, weights_NK, experts_NK):
        """For a GPU, and with a graph: the base's products over all tokens, the differences' by grouped_mm."""
        order_M, counts_E = sort_by_expert(experts_NK, self.num_experts)
        expert_M, token_M = experts_NK.flatten()[order_M], order_M // experts_NK.shape[1]
        fc1, fc2, x_ND = *self._parts(x_ND), x_ND.to(working_dtype(x_ND))
        offsets_E = counts_E.cumsum(0).to(torch.int32)

        def each(x_Mi: torch.Tensor, weight_Eoi: torch.Tensor) -> torch.Tensor:
            return F.grouped_mm(x_Mi, weight_Eoi.transpose(-2, -1), offs=offsets_E)

        z_NEr = F.linear(x_ND, fc1.down.flatten(0, 1)).unflatten(1, (self.num_experts, -1))
        h_MH = F.linear(x_ND, fc1.base)[token_M] + each(z_NEr[token_M, expert_M], fc1.up)
        h_MH = F.dropout(self.act(h_MH + fc1.bias[expert_M]), self.dropout, self.training)
        y_MD = each(each(h_MH, fc2.down), fc2.up) + fc2.bias[expert_M]
        mixed_NH = combine(h_MH, order_M, weights_NK)
        return F.linear(mixed_NH, fc2.base) + combine(y_MD, order_M, weights_NK)

    def _parts(self, x: torch.Tensor) -> tuple[Parts, Parts]:
        """Both layers' tensors in the dtype that the products run in (autocast is not asked: see `working_dtype`)."""
        dtype = working_dtype(x)
        return tuple(Parts(*(t.to(dtype) for t in (fc.base, fc.up, fc.down, fc.bias))) for fc in (self.fc1, self.fc2))


class Parts(NamedTuple):
    base: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    bias: torch.Tensor
