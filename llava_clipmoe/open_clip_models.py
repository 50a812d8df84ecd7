"""open_clip models by their name and a checkpoint file -> a bundle."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .bundle import OPENAI_MEAN, OPENAI_STD, ClipBundle
from .configuration_clipmoe import CLIPMoEConfig
from .conversion import bundle_of, check_kind, read_state, text_ids
from .files import read_json
from .openai_names import OPENAI_NUMBERS


def load_open_clip(name: str, checkpoint: str | Path, quick_gelu: bool | None = None) -> ClipBundle:
    """An open_clip model by its name and a checkpoint file of it (.safetensors, or a .pt that holds only tensors).

    The activation is the one of open_clip's config (names ending in -quickgelu want quick_gelu), or `quick_gelu`.
    Raises ValueError for models that are not CLIPs with OpenAI's two transformers.
    """
    settings = _open_clip_settings(name)
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    act = settings["quick_gelu"] if quick_gelu is None else quick_gelu
    state = read_state(Path(checkpoint))
    check_kind(state, str(checkpoint))
    is_openai = "openai" in Path(checkpoint).name.lower() or any(n in state for n in OPENAI_NUMBERS)
    if quick_gelu is None and not act and is_openai:
        warnings.warn(
            f"{checkpoint} looks like OpenAI's weights, which were trained with quick_gelu, but {name} means gelu. "
            f"Use {name}-quickgelu (or --quick-gelu) unless you know better: the wrong one lowers scores silently.",
            stacklevel=2,
        )
    size = vision["image_size"]
    config = CLIPMoEConfig(
        vision_config={
            **_open_clip_tower(vision, vision["width"] // vision["head_width"], act),
            "patch_size": vision["patch_size"],
            "image_size": size[0] if isinstance(size, (list, tuple)) else size,
        },
        text_config={
            **_open_clip_tower(text, text["heads"], act),
            **text_ids(text["vocab_size"]),
            "max_position_embeddings": text["context_length"],
        },
        projection_dim=settings["embed_dim"],
        num_experts=1,
    )
    advice = f"Is this the checkpoint of {name}? Give the open_clip name that it was saved as."
    bundle = bundle_of(config, state, f"{checkpoint} as {name}", name, advice)
    bundle.image_mean, bundle.image_std = _open_clip_statistics(Path(checkpoint))
    return bundle


def _open_clip_tower(tower: Mapping[str, Any], heads: int, quick_gelu: bool) -> dict[str, Any]:
    return {
        "hidden_size": tower["width"],
        "intermediate_size": int(tower["width"] * tower["mlp_ratio"]),
        "num_hidden_layers": tower["layers"],
        "num_attention_heads": heads,
        "hidden_act": "quick_gelu" if quick_gelu else "gelu",
    }


def _open_clip_settings(name: str) -> dict[str, Any]:
    """open_clip's config of `name` with its defaults filled in; refuses what our towers do not compute."""
    try:
        import open_clip
        from open_clip.model import CLIPTextCfg, CLIPVisionCfg
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'open_clip models need the package open_clip_torch: pip install "llava-clipmoe[train]".',
            name=error.name,
        ) from error
    settings = open_clip.get_model_config(name)
    if settings is None and name.endswith("-quickgelu"):
        settings = open_clip.get_model_config(name.removesuffix("-quickgelu"))
        settings = None if settings is None else {**settings, "quick_gelu": True}
    if settings is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.3)
        raise ValueError(f"open_clip has no model {name!r}; near it: {', '.join(near)}.")
    strange = [k for k in settings if k not in ("embed_dim", "quick_gelu", "vision_cfg", "text_cfg") and settings[k]]
    filled: dict[str, Any] = {"embed_dim": settings["embed_dim"], "quick_gelu": bool(settings.get("quick_gelu"))}
    free = {
        "vision_cfg": ("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"),
        "text_cfg": ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"),
    }
    for key, cls in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        given = settings[key]
        strange += [f"{key}.{k}" for k, v in given.items() if k not in free[key] and v != defaults.get(k)]
        filled[key] = {**defaults, **given}
    if not isinstance(filled["vision_cfg"]["layers"], int):
        strange.append("a ResNet")
    size = filled["vision_cfg"]["image_size"]
    if isinstance(size, (list, tuple)) and size[0] != size[1]:
        strange.append("an image size that is not square")
    if strange:
        raise ValueError(
            f"open_clip's {name} is not a CLIP with OpenAI's two transformers (it has {', '.join(strange[:4])}), so it "
            "cannot be converted. ResNet, timm, CoCa, SigLIP and custom text towers are out of reach."
        )
    return filled


def _open_clip_statistics(checkpoint: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Pixel mean and std: from the open_clip_config.json beside the checkpoint (hub models), else OpenAI's."""
    beside = checkpoint.with_name("open_clip_config.json")
    given = read_json(beside).get("preprocess_cfg", {}) if beside.exists() else {}
    return tuple(given.get("mean", OPENAI_MEAN)), tuple(given.get("std", OPENAI_STD))
