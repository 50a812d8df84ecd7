"""Loading the two LLaVAs of the page with upstream's own loader: two whole LLaVA directories, or (`language_model`
given) one language model, loaded once, with two projectors and towers as upstream's stage 1 leaves them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.utils import logging

from llava_clipmoe import llava_hook, run
from llava_clipmoe.compat.anyres import NEWLINE
from llava_clipmoe.compat.loading import cpu_dtype
from llava_clipmoe.conversations import find_conversation
from llava_clipmoe.files import load_foreign_pt
from train_encoder.features.encode import pick_device

from .generate import LanguageModel, Llava
from .settings import Models, check_models


def prepare_upstream() -> None:
    """Make upstream LLaVA know our towers and run with the versions installed here, and keep its notes short."""
    llava_hook.install()
    run.prepare()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_llavas(models: Models, say: Callable[[str], None] = print) -> tuple[Llava, Llava]:
    """Load both; `say` gets one line about each. Raises what `check_models` raises, and ValueError."""
    check_models(models)
    left = _load(models.left, models, say)
    right = _share(left, models.right, say) if models.language_model else _load(models.right, models, say)
    names = models.names
    if names is None:  # after their towers where these differ in kind, else after their directories
        names = tuple("CLIP-MoE" if llava.is_moe else "CLIP" for llava in (left, right))
        if names[0] == names[1]:
            names = left.directory.name, right.directory.name
        if names[0] == names[1]:
            names = f"{names[0]} (left)", f"{names[1]} (right)"
    left.name, right.name = names
    return left, right


def _load(directory: Path, models: Models, say: Callable[[str], None]) -> Llava:
    from llava.mm_utils import get_model_name_from_path  # upstream: only after `prepare_upstream`
    from llava.model.builder import load_pretrained_model

    start = time.monotonic()
    directory = directory.resolve()
    device, name = pick_device(models.device), get_model_name_from_path(str(directory))
    base = str(models.language_model) if models.language_model else None
    quantised = _quantised(models.bits, device)
    tokenizer, model, *_ = load_pretrained_model(str(directory), base, name, device=device.type, **quantised)
    inner = model.get_model()
    _place_tower(inner.vision_tower, model.device)
    template = models.conversation or find_conversation(directory, base) or conversation_of(name)
    llm = LanguageModel(model.eval(), tokenizer, template)
    say(f"{directory.name}: loaded in {time.monotonic() - start:.0f} s")
    newline = getattr(inner, NEWLINE, None)
    return Llava(directory.name, directory, llm, inner.vision_tower, inner.mm_projector, model.config, newline)


def _share(first: Llava, directory: Path, say: Callable[[str], None]) -> Llava:
    """A second tower and projector in front of the language model of `first`."""
    from llava.model.multimodal_encoder.builder import build_vision_tower  # upstream: only after `prepare_upstream`
    from llava.model.multimodal_projector.builder import build_vision_projector

    model = first.llm.model
    directory = directory.resolve()
    config = AutoConfig.from_pretrained(directory)
    if config.hidden_size != model.config.hidden_size:
        raise ValueError(
            f"the projector of {directory} is for a language model of width {config.hidden_size}, the shared one has "
            f"{model.config.hidden_size}."
        )
    tower = build_vision_tower(config, delay_load=True)
    tower.load_model(device_map={"": model.device})
    _place_tower(tower, model.device)
    projector = build_vision_projector(config)
    kept = load_foreign_pt(directory / "mm_projector.bin")
    state = {name.rpartition("mm_projector.")[2]: tensor for name, tensor in kept.items() if "mm_projector." in name}
    # Rounded to halves, as upstream's loader reads the first one's: the two may differ in their training alone.
    projector.load_state_dict({name: tensor.half() for name, tensor in state.items()})
    projector.to(device=model.device, dtype=model.dtype).eval()
    newlines = [tensor.half() for name, tensor in kept.items() if name.rpartition(".")[2] == NEWLINE]
    newline = nn.Parameter(newlines[0].to(model.device, model.dtype), requires_grad=False) if newlines else None
    say(f"{directory.name}: its tower shares that language model")
    return Llava(directory.name, directory, first.llm, tower, projector, config, newline)


def _place_tower(tower: Any, device: torch.device) -> None:
    """Where the language model is on the CPU, its tower goes there too, in float32. Upstream would put it onto a GPU
    where there is one, and keep the dtype that it is stored in."""
    if device.type == "cpu":
        tower.to(device=device, dtype=torch.float32)


def _quantised(bits: int, device: torch.device) -> dict[str, Any]:
    """Arguments of upstream's loader for a language model of 8 or 4 bits. Its own switches for them would quantise the
    projector too, which is part of what is compared, and leave that of stage 1 empty."""
    if bits == 16:
        return {}
    how: dict[str, Any] = {"load_in_8bit": True}
    if bits == 4:
        dtype = cpu_dtype() if device.type == "cpu" else torch.float16
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        how["bnb_4bit_compute_dtype"] = dtype
    return {"quantization_config": BitsAndBytesConfig(**how, llm_int8_skip_modules=["model.mm_projector", "lm_head"])}


def conversation_of(name: str) -> str:
    """Upstream's conversation template for a directory of this name (the rule of llava/serve/cli.py)."""
    rules = {
        "llama-2": "llava_llama_2",
        "mistral": "mistral_instruct",
        "v1.6-34b": "chatml_direct",
        "v1": "llava_v1",
        "mpt": "mpt",
    }
    return next((template for part, template in rules.items() if part in name.lower()), "llava_v0")
