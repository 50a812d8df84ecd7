"""Diversified Multiplet Upcycling with low-rank stages (LoRA): of W + (alpha / r) B A in every FFN, B A is trained.

peft's layers are there while a stage trains; then the stage is merged, and all that follows (features, clusters,
upcycling, evaluation) meets an ordinary DMU stage. What it saves is memory: gradients and Adam's moments of the FFNs,
and under bf16 the fp32 copies of all that is frozen.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig
from llava_clipmoe.modeling_clipmoe import CLIPMoEModel

from ..config import LoraConfig, TrainConfig
from ..training.precision import store_frozen_in
from .dmu import DMU, Tensors
from .mixture import moe_blocks

if TYPE_CHECKING:
    from peft import LoraModel


class LoraDMU(DMU):
    """DMU; a stage's training is of low rank, its files are those of a DMU stage."""

    recipe = "Diversified Multiplet Upcycling, stages of low rank"

    @classmethod
    def lora(cls, config: TrainConfig) -> LoraConfig:
        return config.lora

    @classmethod
    def check_packages(cls) -> None:
        import peft  # noqa: F401

    def check_settings(self) -> None:
        super().check_settings()
        check_rank(self.config.lora.rank, self.run.start.model.config)

    def train_stage(self, number: int, bundle: ClipBundle, cluster_ids: np.ndarray | None) -> Tensors:
        model = bundle.model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed * 1000 + number)  # A starts random: the same in every process and resume
            adapters = add_adapters(model, moe_blocks(self.result_config()), self.config.lora)
        if self.config.engine.precision == "bf16":
            store_frozen_in(model, torch.bfloat16, is_adapter)  # the originals are on the disk
        self.run.train(f"stage{number}", bundle, is_adapter, self.config.mcl.optim, cluster_ids=cluster_ids)
        merge_adapters(model, adapters, self.dense(self.started_from(number)).model.state_dict())
        return self.stage_ffns(model.state_dict())

    def about_stage(self, number: int) -> dict[str, Any]:
        lora = self.config.lora
        return {**super().about_stage(number), "rank": lora.rank, "alpha": lora.effective_alpha}


def is_adapter(name: str) -> bool:
    """True for the parameters that peft put into a model: what a low-rank stage trains."""
    return ".lora_" in name


def check_rank(rank: int, config: CLIPMoEConfig) -> None:
    """Raises ValueError when `rank` is not below the width of both towers: then B A would be no smaller than W."""
    width = min(config.vision_config.hidden_size, config.text_config.hidden_size)
    if rank >= width:
        raise ValueError(
            f"--lora.rank is {rank}, but the narrower tower is {width} wide: that is not a low rank. Lower it, or "
            "train whole stages (method dmu)."
        )


def add_adapters(model: CLIPMoEModel, blocks: Collection[tuple[str, int]], settings: LoraConfig) -> LoraModel:
    """Put peft's LoRA layers around the FFN matrices of `blocks` ((tower, number) each) of a dense CLIP, in place.

    -> peft's handle of them. B is zero: the model computes what it did. Only the adapters require gradients afterwards.
    A is drawn from torch's global random state.
    """
    import peft

    ffns = [f"{tower}.encoder.layers.{block}.mlp" for tower, block in sorted(blocks)]
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.effective_alpha,
        lora_dropout=settings.dropout,
        target_modules=[f"{ffn}.{matrix}" for ffn in ffns for matrix in ("fc1", "fc2")],
    )
    return peft.LoraModel(model, config, "default")


@torch.no_grad()
def merge_adapters(model: CLIPMoEModel, adapters: LoraModel, start: Tensors) -> None:
    """Take the adapters out again, in place: `model` gets the fp32 tensors of `start` (its state before
    `add_adapters`), and every adapted matrix its change (alpha / r) B A on top. Bit for bit peft's own merge."""
    from peft.tuners.lora import LoraLayer

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    changes = {name: layer.get_delta_weight("default") for name, layer in layers.items()}
    adapters.unload()
    model.float().load_state_dict(start)
    for name, change in changes.items():
        model.get_submodule(name).weight += change
