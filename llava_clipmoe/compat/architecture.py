"""Upstream's vision side: its builder takes our names, and a tower asked for is the tower that is used."""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

from ..tower_registry import resolve
from .versions import check_transformers

BUILDER = "llava.model.multimodal_encoder.builder"


def patch_builder(module: ModuleType) -> None:
    """llava.model.multimodal_encoder.builder: `build_vision_tower` asks us first.

    Before upstream's own existing-path check, which would load a CLIP-MoE directory as a dense CLIP with random FFNs.
    """
    upstream = module.build_vision_tower

    @functools.wraps(upstream)
    def build_vision_tower(vision_tower_cfg: Any, **kwargs: Any):
        check_transformers()
        name = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
        tower = resolve(name) if isinstance(name, str) else None
        if tower is None:
            return upstream(vision_tower_cfg, **kwargs)
        from ..vision_tower import build_tower  # torch and transformers only now

        return build_tower(tower, vision_tower_cfg, **kwargs)

    module.build_vision_tower = build_vision_tower


def patch_architecture(module: ModuleType) -> None:
    """llava.model.llava_arch: another tower than the checkpoint's is really built; pictures come in the right dtype."""
    # Upstream bound the name when it was imported: before the hook was there, perhaps.
    module.build_vision_tower = sys.modules[BUILDER].build_vision_tower
    _patch_initialize(module.LlavaMetaModel)
    _patch_encode_images(module.LlavaMetaForCausalLM)


def _patch_initialize(meta_model: type) -> None:
    upstream = meta_model.initialize_vision_modules

    @functools.wraps(upstream)
    def initialize_vision_modules(self, model_args: Any, fsdp: Any = None) -> None:
        drop_other_tower(self, model_args)
        try:
            upstream(self, model_args, fsdp=fsdp)
        except RuntimeError as error:
            raise _projector_error(self, model_args, error) from error
        from . import anyres, tuning  # torch and transformers only now

        anyres.settle_newline(self, model_args)
        tuning.ask(self, model_args)

    meta_model.initialize_vision_modules = initialize_vision_modules


def drop_other_tower(model: Any, model_args: Any) -> None:
    """Forget a base checkpoint's own tower when another one is asked for.

    A base model that is already a LLaVA has a tower; upstream keeps it and saves the new name all the same. A
    projector that reads another width goes with it; one that fits is kept as the start.
    """
    old = model.get_vision_tower()
    if old is None or old.vision_tower_name == model_args.vision_tower:
        return
    print(
        f"llava-clipmoe: the base model was trained with the vision tower {old.vision_tower_name}; "
        f"{model_args.vision_tower} takes its place.",
        file=sys.stderr,
    )
    old_width = old.hidden_size
    del model.vision_tower
    from llava.model import llava_arch  # the name that `initialize_vision_modules` itself calls

    new = llava_arch.build_vision_tower(model_args, delay_load=True)
    if new.hidden_size != old_width and getattr(model, "mm_projector", None) is not None:
        print(
            f"llava-clipmoe: its projector reads {old_width} channels, the new tower gives {new.hidden_size}: a new "
            "projector is made. Train it first (stage 1), or give --pretrain_mm_mlp_adapter.",
            file=sys.stderr,
        )
        model.mm_projector = None


def _projector_error(model: Any, model_args: Any, error: RuntimeError) -> Exception:
    """A readable error where upstream's says "size mismatch"; any other is handed back as it is."""
    if not model_args.pretrain_mm_mlp_adapter or "mm_projector" in str(error) or "size mismatch" not in str(error):
        return error
    return ValueError(
        f"the projector {model_args.pretrain_mm_mlp_adapter} does not fit: it was trained for another tower, language "
        f"model or --mm_projector_type. This tower ({model_args.vision_tower}) gives "
        f"{model.config.mm_hidden_size} channels, the language model takes {model.config.hidden_size}. Run stage 1 "
        f"with this tower, or give the projector that belongs to it. ({str(error).splitlines()[-1].strip()})"
    )


def _patch_encode_images(meta_causal_lm: type) -> None:
    upstream = meta_causal_lm.encode_images

    @functools.wraps(upstream)
    def encode_images(self, images: Any):
        # Upstream's runners send float16 whatever the model's dtype is; on the CPU the model is in float32.
        parameter = next(self.get_model().mm_projector.parameters(), None)
        if parameter is not None and parameter.device.type == "cpu" and parameter.is_floating_point():
            images = images.to(parameter.dtype)
        return upstream(self, images)

    meta_causal_lm.encode_images = encode_images
