"""LLaVA before language models that upstream has no class for: Qwen2 (Qwen2.5 is one) and Qwen3.

Upstream has a class each for Llama, Mistral and MPT, and its trainer and loader name Llama's alone. Ours are made the
same way (its meta classes and transformers' own model), from one recipe for every kind, and Llama's `from_pretrained`
hands a directory over to the class of its kind (`loading.py`). Llama 3 is a Llama: it needs no class.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn

from ..conversations import QWEN_TYPES, kind_of

NAMES = dict(zip(QWEN_TYPES, ("Qwen2", "Qwen3"), strict=True))
"""`model_type` -> how transformers' classes begin."""
UPSTREAM = ("llama", "mistral", "mpt")
"""Kinds that upstream has a class for."""
MADE: dict[str, type] = {}
"""`model_type` -> our class, of the kinds that this transformers has."""


def class_for(source: str | Path, config: Any = None, **hub: Any) -> type | None:
    """The class of ours that a directory's or hub id's language model needs; None for what upstream itself has.

    config: an already loaded one, which wins. hub: `cache_dir` and the like. Raises ValueError for a kind that neither
    has a class for, and for one that this transformers does not know.
    """
    content = config.to_dict() if config is not None else _read(source, hub)
    kind = kind_of(content)
    if kind not in (*NAMES, *UPSTREAM, "None"):
        raise ValueError(
            f"{source} is a {kind!r}, and LLaVA has no class for it here. Known are Llama (1 to 3), Mistral, "
            f"{' and '.join(NAMES.values())} (Qwen2.5 is a Qwen2)."
        )
    check_transformers_knows(source, content)
    return MADE.get(kind)


def check_transformers_knows(source: str | Path, content: Mapping[str, Any]) -> None:
    """Raise ValueError for a language model that is newer than this transformers. content: of its config.json."""
    _check_rope(source, content)
    kind = kind_of(content)
    if kind in NAMES and kind not in MADE:
        raise ValueError(
            f"{source} is a {NAMES[kind]}, which transformers {transformers.__version__} does not know. "
            "`pip install -U transformers` (5 or newer), in an environment without LLaVA's pins."
        )


def _read(source: str | Path, hub: Mapping[str, Any]) -> dict[str, Any]:
    names = ("cache_dir", "revision", "token", "local_files_only")
    return transformers.PretrainedConfig.get_config_dict(source, **{k: v for k, v in hub.items() if k in names})[0]


def _check_rope(source: str | Path, content: Mapping[str, Any]) -> None:
    """Raise ValueError for Llama 3.1's positions under a transformers that does not know them."""
    rope = content.get("rope_scaling") or content.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind == "llama3" and Version(transformers.__version__) < Version("4.43"):
        raise ValueError(
            f"{source} has the positions of Llama 3.1 and newer (rope_type llama3), which transformers "
            f"{transformers.__version__} does not know. `pip install -U transformers` (5 or newer), in an environment "
            "without LLaVA's pins; Llama 3.0 runs here."
        )


def make_classes() -> list[type]:
    """Make and register `LlavaQwen2ForCausalLM` and its like, as far as this transformers has the kinds; -> those made
    now. Upstream's classes must be imported."""
    made = []
    for kind, name in NAMES.items():
        if kind in MADE or not hasattr(transformers, f"{name}ForCausalLM"):
            continue
        config, model = _make_classes(kind, name)
        transformers.AutoConfig.register(config.model_type, config)
        transformers.AutoModelForCausalLM.register(config, model)
        read_new_positions(config)
        MADE[kind] = model
        made.append(model)
    return made


def read_new_positions(config_class: type) -> None:
    """Under transformers 4: a config that version 5 wrote says in `rope_parameters` what older ones read from two other
    fields, and would give other positions, silently."""
    if Version(transformers.__version__) >= Version("5.0.0.dev0"):
        return
    init = config_class.__init__

    @functools.wraps(init)
    def __init__(self, *rest: Any, **fields: Any) -> None:
        rope = dict(fields.get("rope_parameters") or {})
        if "rope_theta" in rope:
            fields["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type", "default")
        if kind != "default":
            fields["rope_scaling"] = {"type": kind, **rope}
        init(self, *rest, **fields)

    config_class.__init__ = __init__


def _make_classes(kind: str, name: str) -> tuple[type, type]:
    """-> (configuration, language model with a picture in its prompt)."""
    from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel

    def of(suffix: str) -> type:
        return getattr(transformers, name + suffix)

    def class_of(suffix: str, bases: tuple[type, ...], **attributes: Any) -> type:
        made = type(f"Llava{name}{suffix}", bases, {"__module__": __name__, **attributes})
        setattr(sys.modules[__name__], made.__name__, made)  # where pickle and a reader look for it
        return made

    config = class_of("Config", (of("Config"),), model_type=f"llava_{kind}")
    body = class_of("Model", (LlavaMetaModel, of("Model")), config_class=config)
    parts = dict(config_class=config, body=body, forward=_forward_of(of("ForCausalLM")))
    return config, class_of("ForCausalLM", (Seeing, of("ForCausalLM"), LlavaMetaForCausalLM), **parts)


def _forward_of(base: type) -> Any:
    """`base.forward` with pictures. It shows base's signature, by which generation decides what to hand over."""

    @functools.wraps(base.forward)
    def forward(self, input_ids: Any = None, *, images: Any = None, image_sizes: Any = None, **given: Any) -> Any:
        if given.get("inputs_embeds") is None:
            input_ids, given = self._with_pictures(input_ids, images, image_sizes, given)
        return base.forward(self, input_ids=input_ids, **given)

    return forward


class Seeing:
    """What a language model of transformers gets to take pictures, before its class among the bases.

    In `forward` and `generate`: input_ids [B,T] with -200 where a picture is; images [B,3,R,R], or a list of each
    picture's tiles [N,3,R,R] with `image_sizes`; all else as transformers' own model takes it.
    """

    body: type
    """The model under the head: upstream's meta class and transformers' model."""
    accepts_loss_kwargs = False  # as upstream's Llama: a step's loss is the mean of its parts' means

    def __init__(self, config: Any) -> None:
        transformers.PreTrainedModel.__init__(self, config)
        self.model = self.body(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_model(self) -> nn.Module:
        return self.model

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *rest: Any, **named: Any) -> nn.Module:
        """Never fewer: Qwen's are longer than its vocabulary, and upstream's loader would cut them to that."""
        if new_num_tokens is not None and new_num_tokens <= self.config.vocab_size:
            return self.get_input_embeddings()
        return super().resize_token_embeddings(new_num_tokens, *rest, **named)

    def initialize_vision_tokenizer(self, model_args: Any, tokenizer: Any) -> None:
        """Upstream's, which takes the last rows for those of new tokens: not where there are rows to spare."""
        if model_args.mm_use_im_start_end and len(tokenizer) < self.config.vocab_size:
            raise ValueError(
                f"--mm_use_im_start_end True does not work before this {type(self).__name__}, whose embeddings are "
                "longer than its vocabulary: give False, as LLaVA-1.5 does."
            )
        super().initialize_vision_tokenizer(model_args, tokenizer)

    @torch.no_grad()
    def generate(self, inputs: Any = None, images: Any = None, image_sizes: Any = None, **given: Any) -> torch.Tensor:
        """-> ids of the answer alone, as upstream's classes."""
        if "inputs_embeds" in given:
            raise NotImplementedError("`inputs_embeds` is not supported")
        if images is None:
            given["inputs_embeds"] = self.get_model().embed_tokens(inputs)
        else:
            _, given = self._with_pictures(inputs, images, image_sizes, given)
        return super().generate(**given)

    def _with_pictures(
        self, input_ids: Any, images: Any, image_sizes: Any, given: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """input_ids and arguments after pictures took the place of their tokens (upstream's function)."""
        takes = ("position_ids", "attention_mask", "past_key_values", "labels")
        found = self.prepare_inputs_labels_for_multimodal(
            input_ids, *(given.get(name) for name in takes), images, image_sizes
        )
        names = ("position_ids", "attention_mask", "past_key_values", "inputs_embeds", "labels")
        new = {name: value for name, value in zip(names, found[1:], strict=True) if value is not None}
        return found[0], {**{name: value for name, value in given.items() if name not in names}, **new}

    # Generation looks for these two names, by which it knows what the model takes.
    def prepare_inputs_for_generation(self, input_ids: Any, inputs_embeds: Any = None, **kwargs: Any) -> dict[str, Any]:
        pictures = {name: kwargs.pop(name, None) for name in ("images", "image_sizes")}
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        return {**inputs, **{name: value for name, value in pictures.items() if value is not None}}
