"""The ways from a base CLIP to a better one; a recipe names its method (`TrainConfig.method`)."""

from __future__ import annotations

from ..training.run import Pipeline
from .base import BaseOnly
from .direct import DirectFinetuning
from .dmu import DMU, VanillaMoE
from .fmoe import FMoE
from .lora import LoraDMU
from .sparse import SparseUpcycling

METHODS: dict[str, type[Pipeline]] = {
    "base": BaseOnly,
    "dmu": DMU,
    "dmu-lora": LoraDMU,
    "fmoe": FMoE,
    "vanilla-moe": VanillaMoE,
    "sparse-upcycling": SparseUpcycling,
    "finetune": DirectFinetuning,
}
