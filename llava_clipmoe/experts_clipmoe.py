"""Router and whole experts of a CLIP-MoE block.

Shape suffixes:  N tokens   D width   H FFN width   E experts   K experts per token   M = N*K token-expert pairs
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .common_clipmoe import (
    activation,
    combine,
    grouped_mm_pays,
    only_reads,
    quick_gelu,
    set_ffn_init,
    sort_by_expert,
    working_dtype,
)
from .cpu_clipmoe import read_whole


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
        order_M, counts_E = sort_by_expert(experts_NK, self.num_experts)
        x_MD, counts = x_ND[order_M // experts_NK.shape[1]], counts_E.tolist()
        if self.act is quick_gelu and only_reads(self):
            return read_whole(self, x_MD, counts, order_M, weights_NK)
        # An expert without tokens runs on an empty slice, so that its gradient is zero and not None.
        parts = [self.single(part, e) for e, part in enumerate(x_MD.split(counts))]
        return combine(torch.cat(parts), order_M, weights_NK)

    def _grouped_mm(self, x_ND, weights_NK, experts_NK):
        """One grouped product per projection (torch.nn.functional.grouped_mm): no host sync, no Python loop."""
        order_M, counts_E = sort_by_expert(experts_NK, self.num_experts)
        expert_M = experts_NK.flatten()[order_M]
        offsets_E = counts_E.cumsum(0).to(torch.int32)
        # Autocast does not know grouped_mm on the CPU, and it rejects mixed dtypes: cast here.
        dtype = working_dtype(x_ND)
        x_MD = x_ND[order_M // experts_NK.shape[1]].to(dtype)
        h_MH = F.grouped_mm(x_MD, self.fc1.weight.to(dtype).transpose(-2, -1), offs=offsets_E)
        h_MH = self.act(h_MH + self.fc1.bias.to(dtype)[expert_M])
        h_MH = F.dropout(h_MH, self.dropout, self.training)
        y_MD = F.grouped_mm(h_MH, self.fc2.weight.to(dtype).transpose(-2, -1), offs=offsets_E)
        return combine(y_MD + self.fc2.bias.to(dtype)[expert_M], order_M, weights_NK)
