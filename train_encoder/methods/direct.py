"""Fine-tuning of the dense base: the FFNs or everything, with CLIP's loss or Long-CLIP's. The simplest baselines."""

from __future__ import annotations

from typing import Any

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.configuration_clipmoe import active_parameters
from llava_clipmoe.load import load_bundle
from llava_clipmoe.model_directory import save_bundle
from llava_clipmoe.upcycling import is_ffn

from ..training.run import Pipeline


class DirectFinetuning(Pipeline):
    """One training of the dense base, on shuffled batches; the result is a dense CLIP."""

    final = "fine-tuned"

    def make_result(self) -> ClipBundle:
        settings = self.config.finetune
        if not self.folder.result.exists():
            bundle = load_bundle(self.folder.base)
            self.train("finetune", bundle, is_ffn if settings.parts == "ffn" else lambda name: True, settings.optim)
            card = self.trained_card(f"fine-tuned ({settings.parts})")
            self.save(lambda: save_bundle(bundle, self.folder.result, card=card))
            self.discard("finetune")
        return load_bundle(self.folder.result)

    def describe(self) -> dict[str, Any]:
        dense = active_parameters(self.base.model.config)["total"]
        return {"parameters": {"dense": dense, "total": dense, "active": dense}}
