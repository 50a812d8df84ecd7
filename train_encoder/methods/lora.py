"""Diversified Multiplet Upcycling with low-rank stages (LoRA): of W + (alpha / r) B A in every FFN, B A is trained.

peft's layers are there while a stage trains; then the stage is merged, and all that follows (features, clusters,
upcycling, evaluation) meets an ordinary DMU stage. What it saves is memory: gradients and Adam's moments of the FFNs,
and under bf16 the fp32 copies of all that is frozen.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig
from llava_clipmoe.modeling_clipmoe import CLIPMoEModel
from llava_clipmoe.upcycling import ffn_state

from ..config import LoraConfig, TrainConfig
from ..training.precision import store_frozen_in
from .dmu import DMU, Tensors
from .mixture import moe_blocks

if TYPE_CHECKING:
    from peft import LoraModel

MATRICES = ("fc1", "fc2")


class LoraDMU(DMU):
    """DMU; a stage's training is of low rank, its files are those of a DMU stage."""

    title = "A CLIP-MoE made by Diversified Multiplet Upcycling, its stages of low rank (LoRA)."
    recipe = "Diversified Multiplet Upcycling, stages of low rank"

    @classmethod
    def lora(cls, config: TrainConfig) -> LoraConfig:
        return config.lora

    @classmethod
    def check_packages(cls) -> None:
        import peft  # noqa: F401

    def check_settings(self) -> None:
        check_rank(self.config.lora.rank, self.run.start.model.config)

    def train_stage(self, number: int, bundle: ClipBundle, cluster_ids: np.ndarray | None) -> Tensors:
        settings, model = self.config.lora, bundle.model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed * 1000 + number)  # A starts random: the same in every process and resume
            tuner = add_adapters(model, moe_blocks(self.upcycled_config()), settings)
        if self.config.engine.precision == "bf16":
            store_frozen_in(model, torch.bfloat16, is_adapter)  # the originals are in the base's files
        self.run.train(f"stage{number}", bundle, is_adapter, self.config.mcl.optim, cluster_ids=cluster_ids)

        adapter = adapter_state(model)
        dense = self.run.base.model.state_dict()
        if start := self.started_from(number):
            dense = {**dense, **self.stages[start - 1]}
        stage = merge_adapter(dense, adapter, settings.scale)
        tuner.unload()
        model.float().load_state_dict({**dense, **stage})  # what was stored in bf16 is whole again
        return self.stage_ffns(stage)

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

    -> peft's handle, whose `unload()` takes them out. B is zero: the model computes what it did. Only the adapters
    require gradients afterwards. A is drawn from torch's global random state.
    """
    import peft

    targets = [f"{tower}.encoder.layers.{block}.mlp.{matrix}" for tower, block in sorted(blocks) for matrix in MATRICES]
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.effective_alpha, lora_dropout=settings.dropout, target_modules=targets
    )
    return peft.LoraModel(model, config, "default")


def adapter_state(model: nn.Module) -> Tensors:
    """A [r,in] and B [out,r] of every matrix, as `vision_model.encoder.layers.0.mlp.fc1.lora_A.weight`, on the CPU."""
    return {
        name.replace(".default.", "."): parameter.detach().cpu()
        for name, parameter in model.named_parameters()
        if is_adapter(name)
    }


def merge_adapter(base: Mapping[str, torch.Tensor], adapter: Mapping[str, torch.Tensor], scale: float) -> Tensors:
    """The FFNs of `base` (a dense state dict, or a stage's) with W + scale * B A for every matrix of the adapter.

    scale: alpha / rank. Bit for bit what peft's own merge gives; biases, and matrices without an adapter, are the
    base's. Raises ValueError when the adapter is of another base.
    """
    merged = dict(ffn_state(base))
    for name, a in adapter.items():
        if not name.endswith(".lora_A.weight"):
            continue
        weight, b = name.replace(".lora_A.weight", ".weight"), adapter.get(name.replace(".lora_A.", ".lora_B."))
        if weight not in merged or b is None or merged[weight].shape != (b.shape[0], a.shape[1]):
            raise ValueError(f"the adapter's {name} does not fit the base: both must come from one run's stage.")
        merged[weight] = merged[weight] + (b @ a) * scale
    return merged
