"""How a language model is spoken to: the conversation template that a directory needs. Imports no torch.

LLaVA-1.5's Vicuna has `vicuna_v1`, upstream's own. Newer models were taught a format of their own, whose marks are
single tokens; for these there are two templates more, which `compat.conversations` adds to upstream's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import read_json

FIELD = "mm_conversation"
"""Where a LLaVA's config.json says which template its stage 2 was trained with (`--version`)."""
VICUNA = "vicuna_v1"


@dataclass(frozen=True)
class Template:
    """A turn is its role's head, the text, and `end`; the system's turn comes first."""

    system_head: str
    system: str
    user_head: str
    assistant_head: str
    end: str

    @property
    def end_token(self) -> str:
        """The token at which an answer ends."""
        return self.end.strip()


def _llama_3_head(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


SYSTEM = "You are a helpful assistant."
TEMPLATES = {
    # Llama 3's model card and Qwen's ChatML. Llama's <|begin_of_text|> is put by its tokenizer.
    "llama_3": Template(
        _llama_3_head("system"), SYSTEM, _llama_3_head("user"), _llama_3_head("assistant"), "<|eot_id|>"
    ),
    "qwen_2": Template("<|im_start|>system\n", SYSTEM, "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"),
}
"""Ours, by their names among upstream's `conv_templates` (`--version`, `--conv-mode`)."""

QWEN_TYPES = ("qwen2", "qwen3")
"""`model_type` of Qwen2, Qwen2.5 (qwen2) and Qwen3; a LLaVA of one has `llava_` before it."""


def kind_of(config: Mapping[str, Any]) -> str:
    """`model_type` of the language model that a config.json is of; of the one inside where it is a LLaVA's."""
    kind = str(config.get("model_type"))
    return "llama" if kind == "llava" else kind.removeprefix("llava_")  # the first: before its MPT variant had a name


def conversation_for(directory: str | Path) -> str | None:
    """Name of the template for a language model's or a LLaVA's directory; None where nothing says it.

    First what its training wrote into its config, then the kind of the language model. None: a hub id, a Llama or
    Mistral without Llama 3's tokens (Vicuna among them), any other kind.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        return None
    config = read_json(path)
    if config.get(FIELD):
        return config[FIELD]
    kind = kind_of(config)
    if kind in QWEN_TYPES:
        return "qwen_2"
    return "llama_3" if kind == "llama" and _knows(path.parent, TEMPLATES["llama_3"].end_token) else None


def _knows(directory: Path, token: str) -> bool:
    """Whether the directory's tokenizer has this token, which was added to its vocabulary."""
    file, slow = directory / "tokenizer.json", directory / "tokenizer_config.json"
    added = read_json(file).get("added_tokens", []) if file.is_file() else []
    if slow.is_file():  # a tokenizer without tokenizer.json, as transformers 4 saves Qwen's, lists them here
        added += read_json(slow).get("added_tokens_decoder", {}).values()
    return any(entry.get("content") == token for entry in added)


def find_conversation(model: str | Path, base: str | Path | None = None) -> str | None:
    """Name of the template for a model (a directory or a hub id) and, where it is a LoRA or a projector alone, the
    language model under it: what the directories say, else a guess by a hub id's name; None where neither helps."""
    places = [place for place in (model, base) if place is not None]
    found = [conversation_for(place) for place in places]
    found += [guess_conversation(str(place)) for place in places if not Path(place).is_dir()]
    return next((name for name in found if name), None)


def guess_conversation(hub_id: str) -> str | None:
    """Template that a model of this name probably has; None for other names than a Llama 3's or a Qwen's."""
    words = {r"llama-?3": "llama_3", r"qwen": "qwen_2"}
    return next((name for word, name in words.items() if re.search(word, hub_id.lower())), None)


ENDS_IN_EOS = ("v1", "vicuna_v1", "llava_v1", "v1_mmtag", "llama_2", "llava_llama_2", "mistral_instruct")
"""Upstream's templates whose answers end in </s>, a token of Llama 1 and 2 and of Mistral."""


def why_unfit(directory: str | Path, conversation: str) -> str | None:
    """Why a language model cannot be trained with this template, and which fits; None where nothing speaks against it
    (a hub id and templates that are neither ours nor upstream's among them)."""
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        return None
    own = conversation_for(directory)
    fits = own in TEMPLATES and _knows(directory, TEMPLATES[own].end_token)
    end = TEMPLATES[conversation].end_token if conversation in TEMPLATES else "</s>"
    lacks_end = not _knows(directory, end) if conversation in TEMPLATES else fits and conversation in ENDS_IN_EOS
    if not lacks_end:
        return None
    return f"answers of {conversation} end in {end}, a token that it does not have; use {own if fits else 'v1'}"
