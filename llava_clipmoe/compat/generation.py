"""Generation: transformers hands a model's `forward` what that version needs; upstream's takes only what it names.

5.24 renamed `past_key_values` to `cache`; others may follow. So what upstream's signature does not name goes on to the
class below it, which is transformers' own and of the same version as what called it.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from .versions import NewerTransformers, newer_than_tested

PICTURES = ("images", "image_sizes")


def patch_generation(cls: type) -> None:
    """One of upstream's language models (`LlavaLlamaForCausalLM`): works with keywords that it has never heard of."""
    _patch_forward(cls)
    _patch_prepare(cls)
    explain_generation(cls)


def _patch_forward(cls: type) -> None:
    upstream = cls.forward
    signature = inspect.signature(upstream)

    @functools.wraps(upstream)
    def forward(self, *args: Any, **kwargs: Any):
        unknown = {name: kwargs.pop(name) for name in list(kwargs) if name not in signature.parameters}
        if not unknown:
            return upstream(self, *args, **kwargs)
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        del given["self"]
        pictures = [given.pop(name, None) for name in PICTURES]
        if given.get("inputs_embeds") is None:
            given |= _embed(self, given, pictures)
        # None is every argument's default; a name that this transformers no longer has must not be handed on.
        given = {name: value for name, value in given.items() if value is not None}
        return super(cls, self).forward(**given, **unknown)

    cls.forward = forward


def _embed(model: Any, given: dict[str, Any], pictures: list[Any]) -> dict[str, Any]:
    """Upstream's arguments of `forward` after pictures took the place of their tokens."""
    takes = ("input_ids", "position_ids", "attention_mask", "past_key_values", "labels")
    gives = ("input_ids", "position_ids", "attention_mask", "past_key_values", "inputs_embeds", "labels")
    embedded = model.prepare_inputs_labels_for_multimodal(*(given.get(name) for name in takes), *pictures)
    return dict(zip(gives, embedded, strict=True))


def _patch_prepare(cls: type) -> None:
    upstream = cls.prepare_inputs_for_generation

    @functools.wraps(upstream)
    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> dict[str, Any]:
        # Upstream's hands on `past_key_values=None` beside a `cache`, and is warned for it at every token.
        pictures = {name: kwargs.pop(name, None) for name in PICTURES}
        inputs = super(cls, self).prepare_inputs_for_generation(input_ids, **kwargs)
        return {**inputs, **{name: value for name, value in pictures.items() if value is not None}}

    cls.prepare_inputs_for_generation = prepare_inputs_for_generation


def explain_generation(cls: type) -> None:
    """A language model of LLaVA, upstream's or ours: what fails under a newer transformers than was tested says so."""
    upstream = cls.generate

    @functools.wraps(upstream)
    def generate(self, *args: Any, **kwargs: Any):
        try:
            return upstream(self, *args, **kwargs)
        except (TypeError, AttributeError) as error:  # what a changed interface ends in
            newer = newer_than_tested()
            if newer is None:
                raise
            raise NewerTransformers(f"{type(error).__name__} in generation: {error}. {newer}") from error

    cls.generate = generate
