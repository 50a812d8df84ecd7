"""The ways from a base CLIP to a better one; a recipe names its method (`TrainConfig.method`)."""

from __future__ import annotations

from .base import Method
from .baselines import BaseOnly, DirectFinetuning, SparseUpcycling
from .dmu import DMU, VanillaMoE
from .fmoe import FMoE
from .lora import LoraDMU

METHODS: dict[str, type[Method]] = {
    "base": BaseOnly,
    "dmu": DMU,
    "dmu-lora": LoraDMU,
    "fmoe": FMoE,
    "vanilla-moe": VanillaMoE,
    "sparse-upcycling": SparseUpcycling,
    "finetune": DirectFinetuning,
}
