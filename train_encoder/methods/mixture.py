"""What every method has in common whose result is a mixture of experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.configuration_clipmoe import EXPERT_FIELDS, CLIPMoEConfig, active_parameters
from llava_clipmoe.files import load_tensors, save_tensors
from llava_clipmoe.upcycling import is_router_or_gate, moe_config

from ..config import TrainConfig
from ..data.formats import open_source
from ..evaluate.routing import evaluate_routing, router_movement
from ..evaluate.run import RANDOM_ROUTER, UNTRAINED_ROUTER, Variant
from ..training.metrics import Began
from . import centroids
from .base import Method, Trainable, Training


class Mixture(Method):
    """A method that puts experts together and then trains what chooses among them."""

    recipe = ""
    """The method's name in the result's model card."""
    own_clusters = False
    """Whether experts have clusters of their own (`expert_of`)."""

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

    def check_settings(self) -> None:
        if self.config.moe.router_init == "centroids" and not self.own_clusters:
            raise ValueError(
                f"--moe.router-init centroids needs experts with clusters of their own; method {self.config.method} "
                "trains all of its experts on everything. Use random, or method dmu, dmu-lora or fmoe."
            )

    @staticmethod
    def default_layers(num_hidden_layers: int) -> list[int]:
        """The blocks of a tower that get experts where the settings name none: all."""
        return list(range(num_hidden_layers))

    def random_moe(self) -> ClipBundle:
        """The experts put together, under random routers (the same ones every time: `seed` decides them)."""
        raise NotImplementedError

    def untrained_moe(self) -> ClipBundle:
        """The mixture as its last training finds it: under random routers, or those of `make_routers`."""
        bundle = self.random_moe()
        if self.config.moe.router_init == "centroids":
            bundle.model.load_state_dict({**bundle.model.state_dict(), **load_tensors(self.run.folder.routers)})
        return bundle

    def expert_of(self, rows: np.ndarray) -> np.ndarray:
        """The expert in whose own cluster each of the images `rows` is [n]; for methods with `own_clusters`."""
        raise NotImplementedError

    def make_routers(self) -> None:
        """Keep the routers that start from centroids; all processes call it, the first one computes."""
        run, file = self.run, self.run.folder.routers
        if self.config.moe.router_init == "centroids" and not file.exists():
            began, rows = Began(), centroids.sample(run.rows, self.config.seed)
            if run.accelerator.is_main_process:
                made = centroids.routers(self.load_base(), self.result_config(), run.source, rows, self.expert_of(rows),
                                         **self.encoding)  # fmt: skip
                file.parent.mkdir(exist_ok=True)
                save_tensors(file, made)
            run.accelerator.wait_for_everyone()
            run.metrics.done("router-init", "router", began, run.accelerator.device, images=len(rows))

    @property
    def encoding(self) -> dict[str, Any]:
        """How models run outside of trainings."""
        settings = self.config
        batch_size = settings.evaluation.batch_size
        return {
            "device": self.run.accelerator.device,
            "precision": settings.engine.precision,
            "batch_size": batch_size,
        }

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
        self.make_routers()
        data, columns = self.config.data, self.config.moe.caption_columns
        source = open_source(dataclasses.replace(data, caption_columns=columns)) if columns else None
        return self.train_last("router", self.untrained_moe, self.recipe, source=source)

    def variants(self) -> Mapping[str, Variant]:
        """The base, every expert alone, the mixture before its last training and after it. Its control is the same
        experts under random routers: those from before the training, unless these start from centroids."""
        found = {"base": Variant(self.load_base)}
        for expert in range(self.config.moe.num_experts):
            found[f"expert{expert}"] = Variant(lambda: self.result, expert)
        if self.config.moe.router_init != "random":
            found[RANDOM_ROUTER] = Variant(self.random_moe)
        return {**found, UNTRAINED_ROUTER: Variant(self.untrained_moe), self.final: Variant(lambda: self.result)}

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
