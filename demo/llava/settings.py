"""Which two LLaVAs to compare and how they answer. Imports neither torch nor transformers: `--help` needs this."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llava_clipmoe.files import read_json


@dataclass(frozen=True)
class Generation:
    """How an answer is made."""

    max_new_tokens: int = 64
    """An answer ends there, finished or not."""
    temperature: float = 0.0
    """0 takes the likeliest token each time: the same question gives the same answer."""


@dataclass(frozen=True)
class Models:
    """Which two LLaVAs to compare, and how to load them."""

    left: Path = Path("runs/llava-quickstart/llava-v1-smollm2-base")
    """First LLaVA directory (with --language-model: a directory with mm_projector.bin)."""
    right: Path = Path("runs/llava-quickstart/llava-v1-smollm2-clipmoe")
    """Second LLaVA directory."""
    language_model: Path | None = None
    """Directory of a language model that both share: it is in memory once. For projectors of stage 1."""
    names: tuple[str, str] | None = None
    """What the page calls them. Default: after their vision towers, "CLIP" and "CLIP-MoE"."""
    bits: Literal[16, 8, 4] = 16
    """8 or 4: language model quantised by bitsandbytes. 16 is float32 on a CPU (LLAVA_CLIPMOE_CPU_DTYPE)."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU where there is one."""
    conversation: str | None = None
    """Conversation template. Default: what the directory says, else by its name as upstream's own command line does."""


def check_models(models: Models) -> None:
    """Raise FileNotFoundError or ValueError for what is missing, before anything is loaded."""
    for side, directory in (("left", models.left), ("right", models.right)):
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(
                f"there is no LLaVA at {directory} (the {side} one). Train the two small ones with `make "
                "llava-quickstart`, or give two LLaVA directories: llava-clipmoe demo --left DIR --right DIR"
            )
        if not read_json(directory / "config.json").get("mm_vision_tower"):
            raise ValueError(f"{directory} is no LLaVA: its config.json names no mm_vision_tower.")
        if models.language_model and not (directory / "mm_projector.bin").is_file():
            raise ValueError(
                f"{directory} has no mm_projector.bin. --language-model goes with two directories of stage 1 (a "
                "projector and a config each); leave it out for two whole LLaVAs."
            )
        weights = [*directory.glob("*.safetensors"), *directory.glob("pytorch_model*.bin")]
        if not models.language_model and not weights:
            raise FileNotFoundError(
                f"{directory} has no weights of a whole LLaVA. If stage 1 has left it (mm_projector.bin), give the "
                "language model that it belongs to: --language-model DIR."
            )
    if models.language_model and not (models.language_model / "config.json").is_file():
        raise FileNotFoundError(f"there is no language model at {models.language_model} (no config.json).")
    if models.names and models.names[0] == models.names[1]:
        raise ValueError(f"both LLaVAs are called {models.names[0]!r}: give them two --names.")
