"""The language models that `export-hf` knows: their part of config.json, the names and shapes of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .conversations import kind_of

LANGUAGE_MODELS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""`model_type` -> transformers' class. A Llama is Vicuna, Llama 2 or Llama 3; Qwen2.5 is a Qwen2."""

HEAD = "lm_head.weight"
_FIELDS = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps rope_theta rope_scaling attention_bias attention_dropout "
    "mlp_bias tie_word_embeddings use_cache bos_token_id eos_token_id pad_token_id"
).split()
_QWEN_FIELDS = ("use_sliding_window", "max_window_layers", "layer_types")


def text_config(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The language model's part of a LLaVA's config, in the fields that every version of transformers reads.

    rows: of its embedding.
    """
    kind = kind_of(config)
    names = _FIELDS if kind == "llama" else (*_FIELDS, *_QWEN_FIELDS)
    text = {name: config[name] for name in names if config.get(name) is not None}
    rope = dict(config.get("rope_parameters") or {})  # transformers 5's name for two older fields
    if "rope_theta" in rope:
        text["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        text["rope_scaling"] = {**rope, "type": rope["rope_type"]}
    if kind != "llama":  # None must be said: left out, it is 4096, which 4.37 obeys even without use_sliding_window
        text["sliding_window"] = config.get("sliding_window") if config.get("use_sliding_window") else None
    return {"architectures": [LANGUAGE_MODELS[kind]], "model_type": kind, **text, "vocab_size": rows}


def text_shapes(text: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the language model that `text_config` describes; its head only if untied.

    Raises ValueError where the installed transformers does not know that language model.
    """
    from transformers import AutoModelForCausalLM

    config = language_config(text)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    if text.get("tie_word_embeddings"):
        state.pop(HEAD, None)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def language_config(text: Mapping[str, Any]) -> Any:
    """transformers' own configuration of it. Raises ValueError where the installed version knows none."""
    import transformers

    kind = text["model_type"]
    fields = {name: value for name, value in text.items() if name != "model_type"}
    try:
        if kind not in transformers.CONFIG_MAPPING:
            raise ValueError(f"it has no {kind}")
        return transformers.AutoConfig.for_model(kind, **fields)
    except ValueError as error:
        raise ValueError(
            f"transformers {transformers.__version__} cannot build this language model: {error}. "
            "Export it where version 5 is installed (pip install -U transformers)."
        ) from error


def opens_in_old_transformers(config: Mapping[str, Any]) -> bool:
    """Whether transformers 4.37 has the language model of a LLaVA with this config.json: not Qwen3, and no positions
    scaled as Llama 3.1 does."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaled = rope.get("rope_type", rope.get("type", "default"))
    return kind_of(config) != "qwen3" and scaled in ("default", "linear", "dynamic")
