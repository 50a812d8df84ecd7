"""The blocks of a CLIP-MoE's towers: attention, and the FFN or the router with its experts.

Shape suffixes:  B batch   T tokens   N = B*T   D width   H FFN width   E experts   K experts per token
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .common_clipmoe import activation, only_reads, quick_gelu, residual_std, set_ffn_init
from .cpu_clipmoe import quick_gelu_
from .experts_clipmoe import Experts, Router
from .experts_delta_clipmoe import DeltaExperts
from .gpu_clipmoe import Prepared, kernels_for

# -------------------------------------------------------------------------------------------------- FFNs and experts


class CLIPMoEMLP(nn.Module):
    """The dense FFN of a CLIP block (transformers' names: fc1, fc2)."""

    def __init__(self, config):
        super().__init__()
        self.act = activation(config.hidden_act)
        self.dropout = config.expert_dropout
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        set_ffn_init(self, config)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        drops = self.dropout and self.training
        if not drops and (kernels := kernels_for(x)) is not None and kernels.can_feed(self):
            return kernels.feed_forward(self, x), None
        act = quick_gelu_ if self.act is quick_gelu and only_reads(self) else self.act
        return self.fc2(F.dropout(act(self.fc1(x)), self.dropout, self.training)), None


class FusionGate(nn.Module):
    """How much of the base's FFN a token keeps, per dimension: G(x) = sigmoid(x W^T + b), W [D,D], b [D] (CLIP-FMoE).

    In fp32 whatever the model's dtype: bf16 has no number between 0.996 and 1, so the experts' share 1 - G, and with
    it the gate's gradient, would vanish long before the gate is open. It starts at `fusion_gate_init` for every token
    (W = 0; its gradient is not). Tensors as nn.Linear's, but no nn.Linear: quantisers and LoRA replace those.
    """

    def __init__(self, config):
        super().__init__()
        self.initial = config.fusion_gate_init
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..,D] -> G [..,D] in fp32, between 0 and 1."""
        with torch.autocast(x.device.type, enabled=False):  # autocast would cast the product back to bf16
            return F.linear(x.float(), self.weight.float(), self.bias.float()).sigmoid()


def make_experts(config, index: int) -> Experts | DeltaExperts:
    """The experts of block `index`: whole, or differences where the config gives their ranks (`delta_ranks`)."""
    if config.delta_ranks is None:
        return Experts(config)
    return DeltaExperts(config, *config.delta_ranks[config.moe_layers.index(index)])


class CLIPMoESparseMLP(nn.Module):
    """Router and experts in the place of a block's FFN; with `fusion_gate` (CLIP-FMoE), beside it:

    out = G * FFN_base(x) + (1 - G) * sum_k w_k FFN_k(x). G = 1 is the base exactly, G = 0 the MoE without a gate.
    The base is none of the E experts. One expert alone beside it (E = 1) has a router too, whose weight is always 1
    and whose gradient 0, so that every CLIP-FMoE has the same tensors and outputs.
    """

    def __init__(self, config, index: int = 0):
        super().__init__()
        self.router = Router(config)
        self.experts = make_experts(config, index)
        self.base = self.fusion_gate = None
        if config.fusion_gate:
            self.base = CLIPMoEMLP(config)
            self.base.dropout = 0.0  # it is frozen: what it knows is to be kept, in training too
            self.fusion_gate = FusionGate(config)
        self.only_expert: int | None = None  # set by `only_expert()`: that expert alone, router not asked

    def forward(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """-> output [B,T,D], router logits [B,T,E] in fp32 (None while one expert is selected)."""
        if self.only_expert is not None:
            return self._fuse(x_BTD, self.experts.single(x_BTD, self.only_expert)), None
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        if (kernels := kernels_for(x_BTD)) is not None and kernels.can_mix(self):
            y_ND, logits_NE = kernels.mixture(self, x_ND)
            return y_ND.view(x_BTD.shape), logits_NE.view(*x_BTD.shape[:-1], -1)
        logits_NE, weights_NK, experts_NK = self.router(x_ND)
        y_ND = self.experts(x_ND, weights_NK, experts_NK)
        return self._fuse(x_BTD, y_ND.view_as(x_BTD)), logits_NE.view(*x_BTD.shape[:-1], -1)

    def _fuse(self, x_BTD: torch.Tensor, y_BTD: torch.Tensor) -> torch.Tensor:
        """What the experts said, mixed with the base (in fp32, the gate's dtype); unchanged without a gate."""
        if self.fusion_gate is None:
            return y_BTD
        gate_BTD, (base_BTD, _) = self.fusion_gate(x_BTD), self.base(x_BTD)
        return (gate_BTD * base_BTD + (1 - gate_BTD) * y_BTD).to(y_BTD.dtype)


@contextlib.contextmanager
def only_expert(model: nn.Module, expert: int) -> Iterator[nn.Module]:
    """Inside the `with`, every MoE block uses expert number `expert` alone: the model is that stage's CLIP.

    Where there is a fusion gate it stays at work, as in the stage that trained the expert: G * base + (1 - G) * expert.
    """
    blocks = [m for m in model.modules() if isinstance(m, CLIPMoESparseMLP)]
    if not blocks or not 0 <= expert < blocks[0].experts.num_experts:
        raise ValueError(f"expert {expert} does not exist in this model.")
    for block in blocks:
        block.only_expert = expert
    try:
        yield model
    finally:
        for block in blocks:
            block.only_expert = None


# ------------------------------------------------------------------------------------------------------------- blocks


class CLIPMoEAttention(nn.Module):
    """Multi-head self-attention through torch's scaled_dot_product_attention."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))
            getattr(self, name).init_std = config.hidden_size**-0.5
        # As OpenAI draws them. transformers' CLIP has the two the other way round: attention then starts blind.
        self.out_proj.init_std = residual_std(config)

    def forward(
        self, x_BTD: torch.Tensor, mask: torch.Tensor | None, causal: bool, queries_BSD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B,T,D] -> [B,T,D], or [B,S,D] for S queries of their own; `mask` [B,1,T or S,T] is True where a query may
        look (then `causal` must be False)."""
        d = x_BTD.shape[-1]
        queries_BSD = x_BTD if queries_BSD is None else queries_BSD
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj, x in ((self.q_proj, queries_BSD), (self.k_proj, x_BTD), (self.v_proj, x_BTD))
        )
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out_proj(y.transpose(1, 2).reshape(*queries_BSD.shape[:2], d))


class CLIPMoEEncoderLayer(nn.Module):
    """One pre-norm block: attention, then the FFN or its experts."""

    def __init__(self, config, index: int):
        super().__init__()
        self.self_attn = CLIPMoEAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMoESparseMLP(config, index) if index in config.moe_layers else CLIPMoEMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x_BTD, mask=None, causal=False, only_B=None):
        """-> hidden state [B,T,D], router logits [B,T,E] or None. only_B: of one token a sequence, at this position:
        hidden state and logits are [B,1,D] and [B,1,E], and only keys and values are made of the others."""
        seen_BTD, queries_BSD = self.layer_norm1(x_BTD), None
        if only_B is not None:
            row_B = torch.arange(len(x_BTD), device=x_BTD.device)
            if causal:
                mask = (torch.arange(x_BTD.shape[1], device=x_BTD.device) <= only_B[:, None])[:, None, None]
            elif mask is not None:
                mask = mask[row_B, :, only_B][:, :, None]
            x_BTD, queries_BSD, causal = x_BTD[row_B, only_B][:, None], seen_BTD[row_B, only_B][:, None], False
        x_BTD = x_BTD + self.self_attn(seen_BTD, mask, causal, queries_BSD)
        y_BTD, router_logits = self.mlp(self.layer_norm2(x_BTD))
        return x_BTD + y_BTD, router_logits


class CLIPMoEEncoder(Prepared):
    """The blocks of one tower."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(CLIPMoEEncoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(self, x_BTD, mask=None, causal=False, output_hidden_states=False, only_B=None):
        """-> last hidden state, all hidden states (input first) or None, router logits of the MoE blocks in order.

        only_B: of the last block, one token a sequence, at this position (its part of the results is [B,1,...]).
        """
        if (fast := self._fast(x_BTD)) is not None:
            return fast(x_BTD, mask, causal, output_hidden_states, only_B)
        hidden_states, router_logits = [x_BTD], []
        for number, layer in enumerate(self.layers, start=1):
            arguments = (x_BTD, mask, causal, only_B if number == len(self.layers) else None)
            if self.gradient_checkpointing and self.training:
                x_BTD, logits = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x_BTD, logits = layer(*arguments)
            if output_hidden_states:
                hidden_states.append(x_BTD)
            if logits is not None:
                router_logits.append(logits)
        return x_BTD, tuple(hidden_states) if output_hidden_states else None, tuple(router_logits)

    def _fast(self, x_BTD: torch.Tensor):
        """The same on a GPU where nothing is to be learnt (`fast_clipmoe.FastEncoder`), or None."""
        if torch.is_grad_enabled() or self.training or (kernels := kernels_for(x_BTD)) is None:
            return None
        if self.prepared is None or not self.prepared.fits(x_BTD):
            self.prepared = kernels.FastEncoder(self, x_BTD)
        return self.prepared if self.prepared.usable() else None
