"""Configuration of a CLIP-MoE: transformers' CLIP configuration plus the experts.

`num_experts=1` is a dense CLIP: the same class reads, trains and saves both, so that a stage of the
trainer and its result differ in one number. With `fusion_gate` (CLIP-FMoE) every MoE block keeps the base's FFN
beside its experts, and `num_experts=1` is one expert beside it: not dense. This file is copied beside the weights of
a saved model (`auto_map`), therefore it imports nothing of this package.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

EXPERT_FIELDS: dict[str, Any] = {
    # field: default. The names are transformers' (Mixtral, Switch); the values are the paper's.
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.01,  # alpha, section 3.3 of the CLIP-MoE paper
    "router_z_loss_coef": 0.0,  # ST-MoE's z-loss; the paper has none
    "router_jitter_noise": 0.0,  # Switch's multiplicative noise on the router's input, training only
    "router_initializer_range": 0.018,  # std of a fresh router: nn.Linear's at width 1024, as in the official code
    "expert_dropout": 0.0,  # official code 0.1, paper silent
    "experts_implementation": "auto",  # "auto", "loop" or "grouped_mm"
    "fusion_gate": False,  # CLIP-FMoE: the base's FFN beside the experts, mixed by a gate
    # G at the start: 1 is the base alone, 0 the experts alone. CLIP-FMoE's public sources do not say it; 0.5 is where
    # an ordinary nn.Linear would start on average, and where the gate's gradient G(1 - G) is largest.
    "fusion_gate_init": 0.5,
}


def _check_tower(hidden_size: int, num_attention_heads: int, num_hidden_layers: int, experts: dict[str, Any]) -> None:
    if hidden_size % num_attention_heads:
        raise ValueError(
            f"hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({num_attention_heads})."
        )
    e, k = experts["num_experts"], experts["num_experts_per_tok"]
    if e < 1:
        raise ValueError(f"num_experts must be at least 1 (1 is a dense CLIP), got {e}.")
    if not 0 < experts["fusion_gate_init"] < 1:
        raise ValueError(
            f"fusion_gate_init must lie between 0 and 1, both excluded, got {experts['fusion_gate_init']}: a gate that "
            "starts quite open or shut has no gradient and stays there."
        )
    if not 1 <= k <= e:
        raise ValueError(
            f"num_experts_per_tok ({k}) must lie between 1 and num_experts ({e}): a token cannot use more experts "
            "than there are. Lower num_experts_per_tok or raise num_experts."
        )
    if experts["experts_implementation"] not in ("auto", "loop", "grouped_mm"):
        raise ValueError(
            f"experts_implementation must be auto, loop or grouped_mm, got {experts['experts_implementation']!r}."
        )
    ranks = experts["delta_ranks"]
    if ranks is not None and len(ranks) != len(experts["moe_layers"]):
        raise ValueError(
            f"delta_ranks has {len(ranks)} pairs, but there are {len(experts['moe_layers'])} MoE blocks: one pair "
            "[rank of fc1, rank of fc2] a block."
        )
    if ranks is not None and (wrong := [pair for pair in ranks if len(pair) != 2 or min(pair) < 1]):
        raise ValueError(f"delta_ranks are pairs of ranks of at least 1, got {wrong[0]}.")
    outside = [i for i in experts["moe_layers"] if not 0 <= i < num_hidden_layers]
    if outside:
        raise ValueError(f"moe_layers {outside} do not exist: the tower has blocks 0 to {num_hidden_layers - 1}.")


class _TowerConfig(PretrainedConfig):
    """What both towers share: width, depth, activation and the experts."""

    def __init__(
        self,
        hidden_size=512,
        intermediate_size=2048,
        projection_dim=512,
        num_hidden_layers=12,
        num_attention_heads=8,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        attention_dropout=0.0,
        initializer_range=0.02,
        initializer_factor=1.0,
        moe_layers=None,
        delta_ranks=None,
        **kwargs,
    ):
        experts = {name: kwargs.pop(name, default) for name, default in EXPERT_FIELDS.items()}
        experts["num_experts_per_tok"] = 1 if experts["num_experts"] == 1 else experts["num_experts_per_tok"]
        if experts["num_experts"] == 1 and not experts["fusion_gate"]:
            moe_layers = []
        elif moe_layers is None:
            moe_layers = list(range(num_hidden_layers))
        experts["moe_layers"] = sorted(moe_layers)
        # [rank of fc1, rank of fc2] of every MoE block whose experts are differences to one FFN (compression.py).
        experts["delta_ranks"] = delta_ranks if delta_ranks is None else [list(pair) for pair in delta_ranks]
        _check_tower(hidden_size, num_attention_heads, num_hidden_layers, experts)
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.projection_dim = projection_dim
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        # OpenAI's weights want quick_gelu, most of open_clip's gelu; the wrong one degrades silently.
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.initializer_factor = initializer_factor
        for name, value in experts.items():
            setattr(self, name, value)

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        """A tower's config read from a whole model's directory is that tower's part (transformers 4.37 needs help)."""
        config, unused = super().get_config_dict(*args, **kwargs)
        return config.get(cls.base_config_key, config), unused


class CLIPMoETextConfig(_TowerConfig):
    """The text tower. Defaults are OpenAI ViT-B/32's; `max_position_embeddings` is 248 after stretching."""

    model_type = "clip_moe_text_model"
    base_config_key = "text_config"

    def __init__(
        self,
        vocab_size=49408,
        max_position_embeddings=77,
        pad_token_id=1,
        bos_token_id=49406,
        eos_token_id=49407,
        **kwargs,
    ):
        super().__init__(pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id, **kwargs)
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings


class CLIPMoEVisionConfig(_TowerConfig):
    """The vision tower. `image_size` in pixels (square), `patch_size` must divide it."""

    model_type = "clip_moe_vision_model"
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        num_channels=3,
        image_size=224,
        patch_size=32,
        **kwargs,
    ):
        super().__init__(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_attention_heads=num_attention_heads,
            **kwargs,
        )
        self.num_channels = num_channels
        self.image_size = image_size
        self.patch_size = patch_size

    @property
    def num_patches(self) -> int:
        """Patch tokens of one image, the class token not counted."""
        return (self.image_size // self.patch_size) ** 2


class CLIPMoEConfig(PretrainedConfig):
    """Both towers and the joint embedding.

    An expert field (`num_experts`, `num_experts_per_tok`, ...) given here goes to both towers; a tower's own
    dictionary wins. Reading it here gives the vision tower's value. Raises ValueError for settings that no model can
    have, a fusion gate without a single MoE block among them.
    """

    model_type = "clip_moe"
    sub_configs = {"text_config": CLIPMoETextConfig, "vision_config": CLIPMoEVisionConfig}

    def __init__(
        self, text_config=None, vision_config=None, projection_dim=512, logit_scale_init_value=2.6592, **kwargs
    ):
        shared = {name: kwargs.pop(name) for name in EXPERT_FIELDS if name in kwargs}
        super().__init__(**kwargs)
        self.text_config = self._tower(CLIPMoETextConfig, text_config, shared, projection_dim)
        self.vision_config = self._tower(CLIPMoEVisionConfig, vision_config, shared, projection_dim)
        if self.is_dense and (self.vision_config.fusion_gate or self.text_config.fusion_gate):
            raise ValueError(
                "fusion_gate is on, but moe_layers is empty in both towers: the gate lies in the MoE blocks. Name the "
                "blocks in a tower's moe_layers (None: all of them), or turn fusion_gate off."
            )
        self.projection_dim = projection_dim
        self.logit_scale_init_value = logit_scale_init_value
        self.initializer_factor = 1.0
        for name in EXPERT_FIELDS:
            setattr(self, name, getattr(self.vision_config, name))

    @staticmethod
    def _tower(cls, given, shared, projection_dim):
        if isinstance(given, PretrainedConfig):
            given = given.to_dict()
        given = {k: v for k, v in (given or {}).items() if k not in ("model_type", "transformers_version")}
        return cls(**{"projection_dim": projection_dim, **shared, **given})

    @property
    def is_dense(self) -> bool:
        """True when no block of either tower has experts."""
        return not (self.vision_config.moe_layers or self.text_config.moe_layers)


CLIPMoEConfig.register_for_auto_class()
CLIPMoETextConfig.register_for_auto_class()
CLIPMoEVisionConfig.register_for_auto_class()


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
