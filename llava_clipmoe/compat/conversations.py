"""Llama 3 and Qwen in upstream's training: their templates, what is learned of a conversation, padding, answers' ends.

Upstream knows the templates of 2023 (`llava/conversation.py`). Its trainer tokenises a conversation whole, counts where
the answers are by Llama 2's tokenizer, and takes the unknown token for padding, which the newer tokenizers have not.
Of other templates nothing is changed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from ..conversations import FIELD, QWEN_TYPES, TEMPLATES, Template, kind_of
from .data import names_of_trainer

IGNORED = -100
"""Label of a token that is read, not learned."""
PADDING = ("<|finetune_right_pad_id|>", "<|endoftext|>", "<|reserved_special_token_0|>", "<|end_of_text|>")
"""Tokens that stand in no conversation, the best for padding first."""
_NOT_FOR_THEM = ("v0", "v1", "llama_2", "mpt")
"""Beginnings of upstream's templates whose training functions lose a newer tokenizer's answers."""


def add_templates(module: ModuleType) -> None:
    """llava.conversation: our templates beside upstream's (`--version`, `--conv-mode`)."""
    for name, template in TEMPLATES.items():
        module.conv_templates.setdefault(name, _as_upstreams(module, name, template))


def _as_upstreams(module: ModuleType, name: str, template: Template) -> Any:
    """Upstream's MPT style is any format of heads and ends."""
    return module.Conversation(
        system=template.system_head + template.system,
        roles=(template.user_head, template.assistant_head),
        version=name,
        messages=[],  # lmms-eval appends to a deep copy of a template with "llama_3" in its name
        offset=0,
        sep_style=module.SeparatorStyle.MPT,
        sep=template.end,
    )


# ------------------------------------------------------------------------------------------------------------ training


def prepare_training(dataset: Any, model: Any) -> None:
    """For a training with the template that upstream was told (`--version`): what it needs of ours, labels and padding,
    and what the checkpoint says of it.

    Raises ValueError for a template that the language model was not made for.
    """
    from llava.conversation import conv_templates, default_conversation

    tokenizer, name = getattr(dataset, "tokenizer", None), default_conversation.version
    if model is None or tokenizer is None:
        return
    check_template(name, model, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = padding_for(tokenizer)
    if default_conversation.sep_style.name == "PLAIN":  # stage 1: captions, no conversations
        return
    if name in TEMPLATES:
        _patch_preprocess(names_of_trainer(dataset))
    known = (known for known, template in conv_templates.items() if template is default_conversation)
    setattr(model.config, FIELD, next(known, name))
    stop_at_end(model, tokenizer)


def check_template(name: str, model: Any, tokenizer: Any) -> None:
    """Raise ValueError where a conversation's marks are not the language model's."""
    own = template_of(model, tokenizer)
    if own is not None and name.startswith(_NOT_FOR_THEM):
        raise ValueError(
            f"--version {name} is not how this language model is spoken to, and LLaVA's trainer would learn nothing of "
            f"the answers: give --version {own}."
        )
    if name in TEMPLATES and (end := TEMPLATES[name].end_token) not in tokenizer.get_vocab():
        raise ValueError(
            f"--version {name} needs a tokenizer with {end}, and this one has no such token: give --version "
            f"{own or 'v1'}."
        )


def template_of(model: Any, tokenizer: Any) -> str | None:
    """The one of our templates that this language model was made for; None for others."""
    if kind_of({"model_type": model.config.model_type}) in QWEN_TYPES:
        return "qwen_2"
    return "llama_3" if TEMPLATES["llama_3"].end_token in tokenizer.get_vocab() else None


def padding_for(tokenizer: Any) -> str:
    """A token for padding: its own where it had one before upstream set it to the unknown token, which it lacks.

    Upstream's batches hide what equals it, so it must stand in no conversation. Raises ValueError where there is none.
    """
    own = tokenizer.init_kwargs.get("pad_token")
    known = tokenizer.get_vocab()
    ends = {template.end_token for template in TEMPLATES.values()}
    for token in (*([str(own)] if own else []), *PADDING):
        if token in known and token not in ends:
            return token
    raise ValueError(
        f"the tokenizer ({type(tokenizer).__name__}) has neither an unknown token nor one for padding. Give it a "
        "pad_token in its tokenizer_config.json."
    )


def stop_at_end(model: Any, tokenizer: Any, of_base: bool = True) -> None:
    """Where the model was trained with one of our templates: its answers end at that template's mark, too.

    of_base: whether its generation config is still the language model's own (in training, and beside LoRA weights),
    which may not know conversations, and penalises repetitions (Qwen: 1.05): LLaVA's answers are greedy.
    """
    template = TEMPLATES.get(getattr(model.config, FIELD, None))
    if template is None:
        return
    number, config = tokenizer.convert_tokens_to_ids(template.end_token), model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, (list, tuple)) else [config.eos_token_id]
    config.eos_token_id = [number, *(end for end in ends if end not in (None, number))]
    if of_base:
        config.repetition_penalty = 1.0
    config._from_model_config = False  # else generation may make it anew, from a config that says only one end
    if tokenizer.pad_token_id is not None:
        config.pad_token_id = tokenizer.pad_token_id


def _patch_preprocess(names: dict[str, Any]) -> None:
    """names: of upstream's train.py, changed in place."""
    upstream = names["preprocess"]
    if hasattr(upstream, "knows_ours"):
        return

    @functools.wraps(upstream)
    def preprocess(sources: Sequence[Any], tokenizer: Any, has_image: bool = False) -> dict[str, list[torch.Tensor]]:
        template = TEMPLATES.get(names["conversation_lib"].default_conversation.version)
        if template is None:
            return upstream(sources, tokenizer, has_image=has_image)
        pairs = [ids_and_labels(turns, template, tokenizer, has_image) for turns in sources]
        return {"input_ids": [ids for ids, _ in pairs], "labels": [labels for _, labels in pairs]}

    preprocess.knows_ours = True
    names["preprocess"] = preprocess


def ids_and_labels(
    turns: Sequence[Mapping[str, str]], template: Template, tokenizer: Any, has_image: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [T] with -200 for a picture, labels [T]: the assistant's words and the mark at their end.

    Each piece is tokenised alone, so an answer's tokens are those that follow its question when the model is asked.
    """
    ids: list[int] = tokenizer("").input_ids  # Llama's beginning; of Qwen nothing
    labels = [IGNORED] * len(ids)
    for text, learned in pieces(turns, template):
        new = _tokens(text, tokenizer, has_image)
        ids += new
        labels += new if learned else [IGNORED] * len(new)
    return torch.tensor(ids), torch.tensor(labels)


def pieces(turns: Sequence[Mapping[str, str]], template: Template) -> Iterator[tuple[str, bool]]:
    """The prompt's texts in order, and whether each is learned. Like upstream, a first turn of gpt's is left out."""
    read = template.system_head + template.system + template.end
    first = 0 if turns[0]["from"] == "human" else 1
    for turn in turns[first:]:
        if turn["from"] == "human":
            read += template.user_head + turn["value"] + template.end
        else:
            yield read + template.assistant_head, False
            yield turn["value"] + template.end, True
            read = ""
    if read:
        yield read, False


def _tokens(text: str, tokenizer: Any, has_image: bool) -> list[int]:
    from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX

    parts = text.split(DEFAULT_IMAGE_TOKEN) if has_image else [text]
    ids = tokenizer(parts[0], add_special_tokens=False).input_ids
    for part in parts[1:]:
        ids = [*ids, IMAGE_TOKEN_INDEX, *tokenizer(part, add_special_tokens=False).input_ids]
    return ids
