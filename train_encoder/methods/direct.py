"""Fine-tuning of the dense base: the FFNs or everything, with CLIP's loss or Long-CLIP's. The simplest baselines."""

from __future__ import annotations

from typing import Any

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig, active_parameters
from llava_clipmoe.load import load_bundle
from llava_clipmoe.model_directory import save_bundle
from llava_clipmoe.upcycling import is_ffn

from ..config import TrainConfig
from .base import Method, Trainable, Training


class DirectFinetuning(Method):
    """One training of the dense base, on shuffled batches; the result is a dense CLIP."""

    title = "A dense CLIP, fine-tuned."
    final = "fine-tuned"

    @classmethod
    def epochs(cls, config: TrainConfig) -> float:
        return config.finetune.optim.epochs

    @classmethod
    def trainings(cls, config: TrainConfig, base: CLIPMoEConfig, result: CLIPMoEConfig) -> dict[str, Training]:
        return {"finetune": Training(base, cls.trainable(config), config.finetune.optim)}

    @staticmethod
    def trainable(config: TrainConfig) -> Trainable:
        return is_ffn if config.finetune.parts == "ffn" else lambda name: True

    def make_result(self) -> ClipBundle:
        settings = self.config.finetune
        if not self.folder.result.exists():
            bundle = load_bundle(self.folder.base)
            self.train("finetune", bundle, self.trainable(self.config), settings.optim)
            card = self.trained_card(f"fine-tuned ({settings.parts})")
            self.save(lambda: save_bundle(bundle, self.folder.result, card=card))
            self.discard("finetune")
        return load_bundle(self.folder.result)

    def describe(self) -> dict[str, Any]:
        dense = active_parameters(self.base.model.config)["total"]
        return {"parameters": {"dense": dense, "total": dense, "active": dense}}
