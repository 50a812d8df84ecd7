"""CLIP-MoE: a CLIP whose FFNs are several experts, of which a token uses K. Self-contained on purpose.

transformers' CLIP classes changed names and weight prefixes between versions 4 and 5, and LLaVA users sit on
4.37.2; so this file uses PreTrainedModel only, runs under both, and is copied beside the weights (`auto_map`).

Shape suffixes:  B batch   T tokens   N = B*T   D width   H FFN width   E experts   K experts per token   P projection
Equations are those of the CLIP-MoE paper (Zhang et al. 2024, "CLIP-MoE: Towards Building Mixture of Experts for CLIP
with Diversified Multiplet Upcycling"); the fusion gate is CLIP-FMoE's.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .configuration_clipmoe import CLIPMoEConfig, CLIPMoEVisionConfig
from .experts_clipmoe import (
    DeltaLinear,
    Prepared,
    Router,
    activation,
    count_experts,
    kernels_for,
    make_experts,
    only_reads,
    quick_gelu,
    quick_gelu_,
    residual_std,
    set_ffn_init,
)

# ------------------------------------------------------------------------------------------------- FFNs and experts


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


# ------------------------------------------------------------------------------------------------------- transformer


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


# ------------------------------------------------------------------------------------------------------------- towers


@dataclass
class CLIPMoETowerOutput(BaseModelOutputWithPooling):
    """transformers' tower output plus `router_logits`: one [B,T,E] tensor per MoE block, fp32."""

    router_logits: tuple[torch.Tensor, ...] | None = None


class CLIPMoEVisionEmbeddings(nn.Module):
    """Patches, class token and positions: [B,3,R,R] -> [B,T,D] with T = (R/patch)^2 + 1."""

    def __init__(self, config):
        super().__init__()
        self.image_size = config.image_size
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(config.num_patches + 1, config.hidden_size)
        # OpenAI's: with transformers' 0.02 for all, large patches would drown the positions a hundred times over.
        fan_in = config.num_channels * config.patch_size**2
        self.patch_embedding.init_std = (3 * fan_in) ** -0.5
        self.position_embedding.init_std = config.hidden_size**-0.5

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"This tower reads {self.image_size}x{self.image_size} pixels, got {tuple(pixel_values.shape[-2:])}. "
                "Use the model's own image processor (preprocessor_config.json)."
            )
        x = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        return x + self.position_embedding.weight.to(x.dtype)


class CLIPMoEVisionTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = CLIPMoEVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # sic: transformers' name
        self.encoder = CLIPMoEEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values, output_hidden_states=False, pooled_only=False) -> CLIPMoETowerOutput:
        """pooled_only: of the last block only the pooled token, the rest of it is not computed."""
        x = self.pre_layrnorm(self.embeddings(pixel_values))
        only_B = torch.zeros(len(x), dtype=torch.int64, device=x.device) if pooled_only else None
        x, hidden_states, router_logits = self.encoder(x, output_hidden_states=output_hidden_states, only_B=only_B)
        return CLIPMoETowerOutput(
            last_hidden_state=x,
            pooler_output=self.post_layernorm(x[:, 0]),
            hidden_states=hidden_states,
            router_logits=router_logits,
        )


class CLIPMoETextEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_embedding.init_std = self.position_embedding.init_std = 0.02

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        t, longest = input_ids.shape[1], self.position_embedding.num_embeddings
        if t > longest:
            raise ValueError(f"{t} tokens, but this text tower has {longest} positions: truncate the caption.")
        return self.token_embedding(input_ids) + self.position_embedding.weight[:t]


def end_of_text(input_ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Position of each caption's pooled token [B]. `eos_token_id` 2 is the legacy value of OpenAI's configs on the
    hub (the true id is the vocabulary's largest): then, as transformers does, the largest id is taken."""
    if eos_token_id == 2:
        return input_ids.argmax(-1)
    return (input_ids == eos_token_id).int().argmax(-1)


class CLIPMoETextTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.eos_token_id = config.eos_token_id
        self.embeddings = CLIPMoETextEmbeddings(config)
        self.encoder = CLIPMoEEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, input_ids, attention_mask=None, output_hidden_states=False, pooled_only=False
    ) -> CLIPMoETowerOutput:
        """pooled_only: of the last block only the pooled token, the rest of it is not computed."""
        x = self.embeddings(input_ids)
        mask = None
        if attention_mask is not None:
            causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            mask = causal & attention_mask[:, None, None, :].bool()
        end_B = end_of_text(input_ids, self.eos_token_id)
        x, hidden_states, router_logits = self.encoder(
            x, mask, mask is None, output_hidden_states, only_B=end_B if pooled_only else None
        )
        x = self.final_layer_norm(x)
        return CLIPMoETowerOutput(
            last_hidden_state=x,
            pooler_output=x[:, 0] if pooled_only else x[torch.arange(x.shape[0], device=x.device), end_B],
            hidden_states=hidden_states,
            router_logits=router_logits,
        )


# -------------------------------------------------------------------------------------------------------------- models


class CLIPMoEPreTrainedModel(PreTrainedModel):
    config_class = CLIPMoEConfig
    base_model_prefix = "clip_moe"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["CLIPMoEEncoderLayer", "CLIPMoEVisionEmbeddings", "CLIPMoETextEmbeddings"]
    _keys_to_ignore_on_load_unexpected = [r"position_ids$"]  # a buffer that transformers 4 saved

    def _init_weights(self, module: nn.Module) -> None:
        """CLIP's initialisation (OpenAI), by depth and width; a router's is small so that it starts undecided.

        Only modules that own parameters are handled: transformers 5 asks for no others.
        """
        factor = self.config.initializer_factor
        if isinstance(module, DeltaLinear):  # all experts alike at first
            nn.init.normal_(module.base, std=factor * module.init_std)
            nn.init.normal_(module.down, std=factor * module.init_std)
            nn.init.zeros_(module.up)
            nn.init.zeros_(module.bias)
        elif hasattr(module, "init_std"):
            nn.init.normal_(module.weight, std=factor * module.init_std)
            if getattr(module, "bias", None) is not None:  # embeddings have none
                nn.init.zeros_(module.bias)
        elif isinstance(module, Router):
            nn.init.normal_(module.weight, std=module.initializer_range)
        elif isinstance(module, FusionGate):
            nn.init.zeros_(module.weight)
            nn.init.constant_(module.bias, math.log(module.initial / (1 - module.initial)))
        elif isinstance(module, CLIPMoEVisionEmbeddings):
            d = module.class_embedding.shape[0]
            nn.init.normal_(module.class_embedding, std=factor * d**-0.5)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, CLIPMoEModel):
            nn.init.normal_(module.text_projection.weight, std=factor * module.text_projection.in_features**-0.5)
            nn.init.normal_(module.visual_projection.weight, std=factor * module.visual_projection.in_features**-0.5)
            nn.init.constant_(module.logit_scale, self.config.logit_scale_init_value)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=None, **_: Any) -> None:
        for module in self.modules():
            if isinstance(module, CLIPMoEEncoder):
                module.gradient_checkpointing = enable


class CLIPMoEVisionModel(CLIPMoEPreTrainedModel):
    """The vision tower alone, with the weight names of the whole CLIP (`vision_model.` prefix in every version)."""

    config_class = CLIPMoEVisionConfig
    main_input_name = "pixel_values"
    _keys_to_ignore_on_load_unexpected = [
        r"position_ids$", r"^text_model\.", r"^(text|visual)_projection\.", r"^logit_scale$"
    ]  # fmt: skip

    def __init__(self, config: CLIPMoEVisionConfig):
        super().__init__(config)
        self.vision_model = CLIPMoEVisionTransformer(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.embeddings.patch_embedding

    def forward(self, pixel_values, output_hidden_states=None, output_router_logits=None, return_dict=None, **_: Any):
        """Pixels [B,3,R,R] -> `last_hidden_state` [B,T,D], `pooler_output` [B,D], on demand `hidden_states`
        (depth + 1 of them) and `router_logits` (one [B,T,E] per MoE block)."""
        out = self.vision_model(pixel_values, output_hidden_states=bool(output_hidden_states))
        return _finish(out, output_router_logits, return_dict)


@dataclass
class CLIPMoEOutput(ModelOutput):
    """What `CLIPMoEModel` returns.

    loss: CLIP's symmetric contrastive loss plus the router losses (with `return_loss=True`); logits_per_image [B,B'];
    embeds [B,P], L2-normalised; router_logits: the vision tower's MoE blocks, then the text tower's.
    """

    loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    text_model_output: CLIPMoETowerOutput | None = None
    vision_model_output: CLIPMoETowerOutput | None = None


class CLIPMoEModel(CLIPMoEPreTrainedModel):
    """Both towers and the joint embedding space of dimension P."""

    config_class = CLIPMoEConfig

    def __init__(self, config: CLIPMoEConfig):
        super().__init__(config)
        text, vision = config.text_config, config.vision_config
        self.text_model = CLIPMoETextTransformer(text)
        self.vision_model = CLIPMoEVisionTransformer(vision)
        self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.embeddings.token_embedding

    def get_image_features(self, pixel_values: torch.Tensor, **_: Any) -> torch.Tensor:
        """Pixels [B,3,R,R] -> projected embeddings [B,P], not normalised."""
        return self.visual_projection(self.vision_model(pixel_values, pooled_only=True).pooler_output)

    def get_text_features(self, input_ids: torch.Tensor, attention_mask=None, **_: Any) -> torch.Tensor:
        """Token ids [B,T] -> projected embeddings [B,P], not normalised."""
        pooled = self.text_model(input_ids, attention_mask, pooled_only=True).pooler_output
        return self.text_projection(pooled)

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_loss: bool = False,
        output_hidden_states: bool = False,
        output_router_logits: bool = False,
        return_dict: bool | None = None,
        **_: Any,
    ):
        vision = self.vision_model(pixel_values, output_hidden_states)
        text = self.text_model(input_ids, attention_mask, output_hidden_states)
        image_embeds = F.normalize(self.visual_projection(vision.pooler_output), dim=-1)
        text_embeds = F.normalize(self.text_projection(text.pooler_output), dim=-1)
        logits_per_text = self.logit_scale.exp() * text_embeds @ image_embeds.t()
        loss = aux_loss = None
        if return_loss:
            truth = torch.arange(logits_per_text.shape[0], device=logits_per_text.device)
            loss = (F.cross_entropy(logits_per_text, truth) + F.cross_entropy(logits_per_text.t(), truth)) / 2
            if vision.router_logits or text.router_logits:
                token_mask = text_token_mask(input_ids, self.config.text_config.eos_token_id)
                aux_loss = router_losses(vision.router_logits, text.router_logits, token_mask, self.config)
                loss = loss + aux_loss
        out = CLIPMoEOutput(
            loss=loss,
            aux_loss=aux_loss,
            logits_per_image=logits_per_text.t(),
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            router_logits=vision.router_logits + text.router_logits,
            text_model_output=text,
            vision_model_output=vision,
        )
        return _finish(out, output_router_logits, return_dict)


def _finish(out: ModelOutput, output_router_logits: bool | None, return_dict: bool | None):
    if not output_router_logits:
        out.router_logits = None
    return out.to_tuple() if return_dict is False else out


# ------------------------------------------------------------------------------------------------------ router losses


def text_token_mask(input_ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """True for the tokens up to and with the pooled one [B,T]; what follows is padding and counts in no statistic."""
    end_B = end_of_text(input_ids, eos_token_id)
    return torch.arange(input_ids.shape[1], device=input_ids.device) <= end_B[:, None]


def load_balancing_loss(logits_NE: torch.Tensor, fractions_E: torch.Tensor | None = None) -> torch.Tensor:
    """E * sum_j f_j P_j of ONE block (eq. 6-9); minimum 1 at f = P = 1/E.

    f_j: share of tokens whose largest logit is expert j's (no gradient); P_j: mean probability of j. `fractions_E`
    gives f from outside, when these tokens are only a part of the batch that f is taken over.
    The official code pools all blocks into one f and P, which cannot see a block that collapsed onto one expert.
    """
    num_experts = logits_NE.shape[-1]
    if fractions_E is None:
        fractions_E = expert_fractions(logits_NE)
    return num_experts * (fractions_E * logits_NE.softmax(-1).mean(0)).sum()


def expert_fractions(logits_NE: torch.Tensor) -> torch.Tensor:
    """f [E]: share of tokens whose first choice is each expert."""
    return count_experts(logits_NE.argmax(-1), logits_NE.shape[-1]) / max(logits_NE.shape[0], 1)


def router_z_loss(logits_NE: torch.Tensor) -> torch.Tensor:
    """Mean squared log-partition (ST-MoE, eq. 5): keeps the router's logits small."""
    return logits_NE.logsumexp(-1).square().mean()


def router_losses(vision_logits, text_logits, text_mask_BT: torch.Tensor, config: CLIPMoEConfig) -> torch.Tensor:
    """alpha * balance + z-coefficient * z-loss, each averaged over the MoE blocks of both towers -> scalar."""
    blocks = [logits.flatten(0, -2) for logits in vision_logits] + [logits[text_mask_BT] for logits in text_logits]
    balance = torch.stack([load_balancing_loss(b) for b in blocks]).mean()
    loss = config.router_aux_loss_coef * balance
    if config.router_z_loss_coef:
        loss = loss + config.router_z_loss_coef * torch.stack([router_z_loss(b) for b in blocks]).mean()
    return loss


def active_parameters(config: CLIPMoEConfig) -> dict[str, int]:
    """Parameter counts from the config alone: `total`, and `active` (those one image-text pair passes through: of a
    block with a fusion gate also the base's FFN and the gate)."""
    total = active = 1  # logit_scale
    for tower in (config.vision_config, config.text_config):
        d, h = tower.hidden_size, tower.intermediate_size
        ffn, rest = 2 * d * h + d + h, 4 * d * d + 4 * d + 4 * d
        moe = len(tower.moe_layers)
        dense = tower.num_hidden_layers - moe
        if tower is config.vision_config:
            ends = d + tower.num_channels * tower.patch_size**2 * d + (tower.num_patches + 1) * d + 4 * d
        else:
            ends = (tower.vocab_size + tower.max_position_embeddings) * d + 2 * d
        fusion = moe * (ffn + d * d + d) if tower.fusion_gate else 0
        common = ends + d * config.projection_dim + tower.num_hidden_layers * rest + dense * ffn + fusion
        whole, common = [(ffn, 0)] * moe, common + moe * tower.num_experts * d
        if tower.delta_ranks is not None:  # (an expert's own, what a block's experts share)
            whole = [((d + h) * (r1 + r2) + d + h, 2 * d * h) for r1, r2 in tower.delta_ranks]
        total += common + sum(tower.num_experts * own + shared for own, shared in whole)
        active += common + sum(tower.num_experts_per_tok * own + shared for own, shared in whole)
    return {"total": total, "active": active}


CLIPMoEModel.register_for_auto_class("AutoModel")
CLIPMoEVisionModel.register_for_auto_class("AutoModel")
