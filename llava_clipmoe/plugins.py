"""What other programs call when they start, by an entry point of ours: lmms-eval and vLLM. Imports neither of them.

So these take OUT, which `llava-clipmoe export-hf` wrote (docs/evaluate-elsewhere.md, docs/serving.md):
`lmms-eval --model llava_clipmoe --model_args pretrained=OUT --tasks pope`; `vllm serve OUT --model-impl transformers`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

LMMS_EVAL_NAME = "llava_clipmoe"
"""What lmms-eval calls our model."""


def lmms_eval_manifest() -> ModelManifest:
    """lmms-eval's own LLaVA-HF classes under our name. Also teaches transformers our classes.

    Entry point of the group `lmms_eval.models`: called whenever lmms-eval starts.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    register_vision_model()
    ours = "llava_clipmoe.lmms_eval_models"
    return ModelManifest(
        LMMS_EVAL_NAME, simple_class_path=f"{ours}.LlavaClipMoe", chat_class_path=f"{ours}.LlavaClipMoeChat"
    )


def register_vision_model() -> None:
    """Teach transformers' Auto classes our classes; may be called any number of times.

    Entry point of the group `vllm.general_plugins`: vLLM calls it in each of its processes.
    """
    from .registration import register_auto_classes

    register_auto_classes()


def explain_old_lmms_eval(models: ModuleType) -> None:
    """Say why an old lmms-eval does not know our model; `models` is its module lmms_eval.models, just imported.

    Called by the import hook: a version without entry points never calls us, and only says that the name is unknown.
    """
    asked_for = any(word in (LMMS_EVAL_NAME, f"--model={LMMS_EVAL_NAME}") for word in sys.argv)
    if asked_for and not hasattr(models, "MODEL_REGISTRY_V2"):
        print(
            f"llava-clipmoe: this lmms-eval has no entry points for models, so it cannot find {LMMS_EVAL_NAME}. "
            "Versions from 0.6.0 on have them: pip install -U lmms-eval. Or give it the LLaVA directory before "
            "export-hf, with upstream LLaVA installed: --model llava.",
            file=sys.stderr,
        )
