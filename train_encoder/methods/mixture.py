"""What every method has in common whose result is a mixture of experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.configuration_clipmoe import EXPERT_FIELDS, CLIPMoEConfig, active_parameters
from llava_clipmoe.upcycling import is_router_or_gate, moe_config

from ..config import TrainConfig
from ..data.formats import open_source
from ..evaluate.routing import evaluate_routing, router_movement
from ..evaluate.run import Variant
from .base import Method, Trainable, Training

UNTRAINED = "clip-moe (untrained router)"


class Mixture(Method):
    """A method that puts experts together and then trains what chooses among them."""

    recipe = ""
    """The method's name in the result's model card."""

    @classmethod
    def trainable_last(cls, config: TrainConfig) -> Trainable:
        """What the last training changes."""
        return is_router_or_gate

    @classmethod
    def epochs(cls, config: TrainConfig) -> float:
        return config.moe.optim.epochs

    @classmethod
    def trainings(cls, config: TrainConfig, base: CLIPMoEConfig, result: CLIPMoEConfig) -> dict[str, Training]:
        """The last training; a subclass adds those before it."""
        return {"router": Training(result, cls.trainable_last(config), config.moe.optim)}

    @staticmethod
    def default_layers(num_hidden_layers: int) -> list[int]:
        """The blocks of a tower that get experts where the settings name none: all."""
        return list(range(num_hidden_layers))

    def untrained_moe(self) -> ClipBundle:
        """The experts put together, under fresh routers (the same ones every time: `seed` decides them)."""
        raise NotImplementedError

    def result_config(self, **more: Any) -> CLIPMoEConfig:
        """The mixture's configuration, by the settings. more: other expert fields (EXPERT_FIELDS)."""
        dense, moe = self.run.start.model.config, self.config.moe
        fields = {name: value for name, value in vars(moe).items() if name in EXPERT_FIELDS}
        towers = {
            "vision_model": (dense.vision_config, moe.vision_layers),
            "text_model": (dense.text_config, moe.text_layers),
        }
        blocks = {}
        for name, (tower, chosen) in towers.items():
            blocks[name] = self.default_layers(tower.num_hidden_layers) if chosen is None else list(chosen)
        return moe_config(dense, blocks, **{**fields, **more})

    def train_routers(self) -> ClipBundle:
        """The result: the mixture after its last training, on shuffled global batches."""
        data, columns = self.config.data, self.config.moe.caption_columns
        source = open_source(dataclasses.replace(data, caption_columns=columns)) if columns else None
        return self.train_last("router", self.untrained_moe, self.recipe, source=source)

    def variants(self) -> Mapping[str, Variant]:
        """The base, every expert alone, the mixture before its last training and after it."""
        found = {"base": Variant(self.load_base)}
        for expert in range(self.config.moe.num_experts):
            found[f"expert{expert}"] = Variant(lambda: self.result, expert)
        return {**found, UNTRAINED: Variant(self.untrained_moe), self.final: Variant(lambda: self.result)}

    def describe(self) -> dict[str, Any]:
        """Routing, how far the routers moved, parameters."""
        run = self.run
        sample = run.rows[: self.config.evaluation.routing_images]
        settings = {"rows": sample, "device": run.accelerator.device, "precision": self.config.engine.precision}
        before = self.untrained_moe().model.state_dict()
        dense = active_parameters(run.base.model.config)["total"]
        return {
            "routing": evaluate_routing(self.result, run.source, **settings),
            "router_movement": router_movement(before, self.result, run.source, **settings),
            "parameters": {"dense": dense, **active_parameters(self.result.model.config)},
        }


def moe_blocks(config: CLIPMoEConfig) -> set[tuple[str, int]]:
    """(tower, block) of every block that has experts."""
    towers = {"vision_model": config.vision_config, "text_model": config.text_config}
    return {(name, block) for name, tower in towers.items() for block in tower.moe_layers}
