"""What the entry points of other programs call: lmms-eval's models and vLLM's plugins. Imports neither of them itself.

    lmms-eval --model llava_clipmoe --model_args pretrained=OUT --tasks mme     # OUT: what export-hf wrote
    vllm serve OUT --model-impl transformers
"""

from __future__ import annotations

from typing import Any

LMMS_EVAL_NAME = "llava_clipmoe"


def lmms_eval_manifest() -> Any:
    """lmms-eval's ModelManifest of its own LLaVA-HF classes, under our name; transformers then knows our vision model.

    Called for the entry point `lmms_eval.models` whenever lmms-eval starts.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    register_vision_model()
    return ModelManifest(
        model_id=LMMS_EVAL_NAME,
        simple_class_path="lmms_eval.models.simple.llava_hf.LlavaHf",
        chat_class_path="lmms_eval.models.chat.llava_hf.LlavaHf",
    )


def register_vision_model() -> None:
    """Teach transformers' Auto classes our classes; for vLLM (`vllm.general_plugins`), in each of its processes."""
    from .registration import register_auto_classes

    register_auto_classes()
