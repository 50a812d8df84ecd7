"""What every method has in common whose result is a mixture of experts."""

from __future__ import annotations

from typing import Any

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig, active_parameters
from llava_clipmoe.load import load_bundle
from llava_clipmoe.model_directory import save_bundle
from llava_clipmoe.upcycling import is_router_or_gate, moe_config

from ..config import MoEConfig
from ..evaluate.routing import evaluate_routing, router_movement
from ..training.run import Pipeline, System

UNTRAINED = "clip-moe (untrained router)"


class Mixture(Pipeline):
    """A method that puts experts together and then trains what chooses among them."""

    paper = "CLIP-MoE"
    """For the model card."""

    def untrained_moe(self) -> ClipBundle:
        """The experts put together, under fresh routers (the same ones every time: `seed` decides them)."""
        raise NotImplementedError

    def learns_last(self, name: str) -> bool:
        """Which tensors the last training changes."""
        return is_router_or_gate(name)

    def moe_blocks(self) -> set[tuple[str, int]]:
        """(tower, block) of every block that gets experts."""
        config = self.upcycled_config()
        vision = {("vision_model", i) for i in config.vision_config.moe_layers}
        return vision | {("text_model", i) for i in config.text_config.moe_layers}

    def upcycled_config(self) -> CLIPMoEConfig:
        """The mixture's configuration, by the settings."""
        return self.mixture_config(self.config.moe)

    def mixture_config(self, moe: MoEConfig, **more: Any) -> CLIPMoEConfig:
        """`moe` on the base's architecture; `more`: other expert fields (EXPERT_FIELDS)."""
        dense = self.start.model.config
        fields = {name: getattr(moe, name) for name in (
            "num_experts", "num_experts_per_tok", "router_aux_loss_coef", "router_z_loss_coef",
            "router_jitter_noise", "router_initializer_range", "expert_dropout")}  # fmt: skip
        vision = range(dense.vision_config.num_hidden_layers) if moe.vision_layers is None else moe.vision_layers
        text = range(dense.text_config.num_hidden_layers) if moe.text_layers is None else moe.text_layers
        return moe_config(dense, {"vision_model": list(vision), "text_model": list(text)}, **{**fields, **more})

    def train_routers(self) -> ClipBundle:
        """The result: the mixture after its last training, on shuffled global batches."""
        if not self.folder.result.exists():
            bundle = self.untrained_moe()
            self.train("router", bundle, self.learns_last, self.config.moe.optim)
            card = self.trained_card(self.paper)
            self.save(lambda: save_bundle(bundle, self.folder.result, card=card))
            self.discard("router")
        return load_bundle(self.folder.result)

    def mixture_systems(self) -> dict[str, System]:
        """Every expert alone, the mixture before its last training and after it."""
        alone = {f"expert{e}": (lambda: self.result, e) for e in range(self.config.moe.num_experts)}
        return alone | {UNTRAINED: (self.untrained_moe, None), self.final: (lambda: self.result, None)}

    def systems(self) -> dict[str, System]:
        return {"base": (lambda: load_bundle(self.folder.base), None), **self.mixture_systems()}

    def describe(self) -> dict[str, Any]:
        """Routing, how far the routers moved, parameters."""
        sample = self.rows[: self.config.evaluation.routing_images]
        settings = {"rows": sample, "device": self.accelerator.device, "precision": self.config.engine.precision}
        before = self.untrained_moe().model.state_dict()
        dense = active_parameters(self.base.model.config)["total"]
        return {
            "routing": evaluate_routing(self.result, self.source, **settings),
            "router_movement": router_movement(before, self.result, self.source, **settings),
            "parameters": {"dense": dense, **active_parameters(self.result.model.config)},
        }
