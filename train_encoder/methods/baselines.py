"""The baselines without stages: the base alone, fine-tuning of the dense base, and sparse upcycling."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig
from llava_clipmoe.upcycling import is_ffn, sparse_upcycle

from ..config import TrainConfig
from ..evaluate.run import Variant
from .base import Method, Trainable, Training
from .mixture import Mixture


class BaseOnly(Method):
    """The base alone, measured as it is. What every comparison starts from."""

    final = output = "base"

    @classmethod
    def epochs(cls, config: TrainConfig) -> float:
        return 0.0

    @classmethod
    def trainings(cls, config: TrainConfig, base: CLIPMoEConfig, result: CLIPMoEConfig) -> dict[str, Training]:
        return {}

    def make(self) -> ClipBundle:
        return self.load_base()

    def variants(self) -> Mapping[str, Variant]:
        return {"base": Variant(lambda: self.result)}


class DirectFinetuning(Method):
    """One training of the dense base, of its FFNs or of everything, on shuffled batches; the result is a dense CLIP."""

    final = "fine-tuned"
    output = "clip"

    @classmethod
    def epochs(cls, config: TrainConfig) -> float:
        return config.finetune.optim.epochs

    @classmethod
    def trainings(cls, config: TrainConfig, base: CLIPMoEConfig, result: CLIPMoEConfig) -> dict[str, Training]:
        trainable = is_ffn if config.finetune.parts == "ffn" else lambda name: True
        return {"finetune": Training(base, trainable, config.finetune.optim)}

    def make(self) -> ClipBundle:
        return self.train_last("finetune", self.load_base, f"fine-tuned ({self.config.finetune.parts})")


class SparseUpcycling(Mixture):
    """Sparse upcycling (Komatsuzaki et al. 2022): experts are copies of the base's FFN, trained together.

    One training, of experts and routers (`finetune.parts` ffn) or of everything (all), by `moe.optim`.
    """

    recipe = "sparse upcycling"

    @classmethod
    def trainable_last(cls, config: TrainConfig) -> Trainable:
        everything = config.finetune.parts == "all"
        return lambda name: everything or ".mlp.router." in name or ".mlp.experts." in name

    def make(self) -> ClipBundle:
        return self.train_routers()

    def random_moe(self) -> ClipBundle:
        base = self.run.base
        model = sparse_upcycle(base.model.cpu(), self.result_config(), seed=self.config.seed)
        return dataclasses.replace(base, model=model)
