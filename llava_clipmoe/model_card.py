"""The README.md of a model directory, and what it may call a model or data set."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .bundle import ClipBundle
from .configuration_clipmoe import active_parameters

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


def public_name(source: str) -> str:
    """What a model card calls a model or data set: a path by its last part, as the directory may be given away; a hub
    id, or another name, as it is."""
    path = Path(source).expanduser()
    if _HUB_NAME.fullmatch(source) and not path.exists():
        return source
    return os.path.basename(os.path.abspath(path))


def model_card(bundle: ClipBundle, card: Mapping[str, Any]) -> str:
    """The README.md of a model directory: what it is, where it comes from, how to load it."""
    name = card.get("name", bundle.name)
    config = bundle.model.config
    dense = config.is_dense
    counts = active_parameters(config)
    head = ["library_name: transformers", "pipeline_tag: zero-shot-image-classification"]
    if "license" in card:
        head.append(f"license: {card['license']}")
    kind, place, gate = "CLIP-MoE", "in place of", ""
    if config.fusion_gate:
        kind, place, gate = "CLIP-FMoE", "beside", ", mixed with it by a fusion gate"
    head.append("tags: [clip]" if dense else "tags: [clip, clip-moe, mixture-of-experts]")
    what = (
        f"A CLIP at {bundle.image_size} px with {bundle.context_length} text positions."
        if dense
        else f"A {kind} at {bundle.image_size} px with {bundle.context_length} text positions: "
        f"{config.num_experts} expert{'s' * (config.num_experts > 1)} {place} an FFN, "
        f"{config.num_experts_per_tok} per token{gate}, in "
        f"{len(config.vision_config.moe_layers)} of {config.vision_config.num_hidden_layers} image blocks and "
        f"{len(config.text_config.moe_layers)} of {config.text_config.num_hidden_layers} text blocks."
    )
    facts = [f"- base: {card.get('base', bundle.name)}", f"- parameters: {counts['total']:,}"]
    if not dense:
        facts[-1] += f", of which an image-caption pair uses {counts['active']:,}"
    facts += [f"- {key}: {value}" for key, value in card.items() if key not in ("name", "base", "license")]
    loading = "CLIPModel.from_pretrained(path)" if dense else "AutoModel.from_pretrained(path, trust_remote_code=True)"
    imported = "CLIPModel" if dense else "AutoModel"
    lines = [
        "---", *head, "---", "", f"# {name}", "", what, "", *facts, "",
        "The weights derive from the base model and from the data they were trained on; their licences apply.", "",
        "## Loading", "", "With transformers (4.37 or newer):", "", "```python",
        f"from transformers import {imported}", "", f"model = {loading}", "```", "",
        "With llava-clipmoe, tokenizer and pixel statistics included:", "", "```python",
        "from llava_clipmoe import load_bundle", "", "bundle = load_bundle(path)", "```", "",
    ]  # fmt: skip
    return "\n".join(lines)
