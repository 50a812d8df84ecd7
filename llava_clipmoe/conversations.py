"""How a language model is spoken to: the conversation template that a directory needs. Imports no torch.

LLaVA-1.5's Vicuna has `vicuna_v1`, upstream's own. Newer models were taught a format of their own, whose marks are
single tokens; for these there are two templates more, which `compat.conversations` adds to upstream's.
"""

from __future__ import annotations

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
    kind = str(config.get("model_type")).removeprefix("llava_")
    if kind in QWEN_TYPES:
        return "qwen_2"
    return "llama_3" if kind == "llama" and _knows(path.parent, TEMPLATES["llama_3"].end_token) else None


def _knows(directory: Path, token: str) -> bool:
    """Whether the directory's tokenizer has this token."""
    file = directory / "tokenizer.json"
    added: list[Mapping[str, Any]] = read_json(file).get("added_tokens", []) if file.is_file() else []
    return any(entry.get("content") == token for entry in added)
