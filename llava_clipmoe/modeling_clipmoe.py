"""CLIP-MoE: a CLIP whose FFNs are several experts, of which a token uses K. Self-contained on purpose.

transformers' CLIP classes changed names and weight prefixes between versions 4 and 5, and LLaVA users sit on
4.37.2; so this file uses PreTrainedModel only and runs under both. All `*_clipmoe.py` are copied beside the weights of
a saved model (`auto_map`), and therefore import nothing of this package but each other.

Shape suffixes:  B batch   T tokens   N = B*T   D width   H FFN width   E experts   K experts per token   P projection
Equations are those of the CLIP-MoE paper (Zhang et al. 2024, "CLIP-MoE: Towards Building Mixture of Experts for CLIP
with Diversified Multiplet Upcycling"); the fusion gate is CLIP-FMoE's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .configuration_clipmoe import CLIPMoEConfig, CLIPMoETextConfig, CLIPMoEVisionConfig
from .experts_clipmoe import Router
from .experts_delta_clipmoe import DeltaLinear
from .losses_clipmoe import block_logits, end_of_text, kept_tokens, router_counts, router_losses, weighted
from .transformer_clipmoe import CLIPMoEEncoder, FusionGate

if TYPE_CHECKING:  # transformers 4 copies only the files that are named here
    from .common_clipmoe import working_dtype  # noqa: F401
    from .cpu_clipmoe import read_whole  # noqa: F401
    from .fast_clipmoe import FastEncoder  # noqa: F401
    from .gpu_clipmoe import kernels_for  # noqa: F401
    from .graphs_clipmoe import Graphs  # noqa: F401
    from .kernels_base_clipmoe import Tile  # noqa: F401
    from .kernels_clipmoe import check  # noqa: F401
    from .kernels_delta_clipmoe import delta_ffn  # noqa: F401
    from .kernels_dense_clipmoe import dense_ffn  # noqa: F401
    from .kernels_pack_clipmoe import pack_delta  # noqa: F401
    from .kernels_whole_clipmoe import whole_ffn  # noqa: F401

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
    _keys_to_ignore_on_load_unexpected = [r"position_ids$", r"^text_model\.", r"_projection\.", r"^logit_scale$"]

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


class CLIPMoETextModel(CLIPMoEPreTrainedModel):
    """The text tower alone, with the weight names of the whole CLIP. What diffusers asks of a text encoder it has:
    the last hidden state first, the hidden states last, and `text_model.final_layer_norm`."""

    config_class = CLIPMoETextConfig
    main_input_name = "input_ids"
    _keys_to_ignore_on_load_unexpected = [r"position_ids$", r"^vision_model\.", r"_projection\.", r"^logit_scale$"]

    def __init__(self, config: CLIPMoETextConfig):
        super().__init__(config)
        self.text_model = CLIPMoETextTransformer(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, embeddings: nn.Module) -> None:
        self.text_model.embeddings.token_embedding = embeddings

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> CLIPMoETowerOutput:
        """Token ids [B,T] -> `last_hidden_state` [B,T,D] after the final norm, `pooler_output` [B,D], on demand
        `hidden_states` (depth + 1 of them, before that norm) and `router_logits` (one [B,T,E] per MoE block)."""
        out = self.text_model(input_ids, attention_mask, output_hidden_states=bool(output_hidden_states))
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
    ) -> CLIPMoEOutput:
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
                kept = kept_tokens(input_ids, self.config.text_config.eos_token_id)
                blocks = block_logits(vision.router_logits, [text.router_logits], [kept])
                aux_loss = weighted(*router_losses(blocks, router_counts(blocks)), self.config)
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
    if not output_router_logits:  # made anew: a field that is set to None stays in what indexing and to_tuple give
        kept = {field.name: getattr(out, field.name) for field in fields(out) if field.name != "router_logits"}
        out = type(out)(**kept)
    return out.to_tuple() if return_dict is False else out


CLIPMoEModel.register_for_auto_class("AutoModel")
CLIPMoEVisionModel.register_for_auto_class("AutoModel")
CLIPMoETextModel.register_for_auto_class("AutoModel")
