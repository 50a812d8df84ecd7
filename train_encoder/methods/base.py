"""What every method answers about itself, without a run; and the first method, the base alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig, active_parameters
from llava_clipmoe.load import load_bundle

from ..config import LoraConfig, OptimConfig, TrainConfig
from ..pipeline import Pipeline, System

Trainable = Callable[[str], bool]
"""Whether a parameter is trainable, by its name."""


@dataclass(frozen=True)
class Training:
    """One training of a run after its base: the model that it runs, what of it is trainable, and its settings."""

    model: CLIPMoEConfig
    trainable: Trainable
    optim: OptimConfig
    lora: LoraConfig | None = None
    """Low-rank changes are trained in the place of the matrices that are `trainable`."""


class Method(Pipeline):
    """A way from a base CLIP to a better one. What reports, comparisons and costs want to know is asked of the class.

    `config` below: a run's settings, as TrainConfig or as its config.json in nested namespaces.
    """

    title = ""
    """One sentence: what a run makes."""

    @classmethod
    def epochs(cls, config: TrainConfig) -> float:
        """Passes over the data after the base, in all trainings together."""
        raise NotImplementedError

    @classmethod
    def trainings(cls, config: TrainConfig, base: CLIPMoEConfig, result: CLIPMoEConfig) -> dict[str, Training]:
        """The trainings after the base, by the names that metrics.jsonl gives them. base, result: of the models."""
        raise NotImplementedError


class BaseOnly(Method):
    """The base: trained from nothing where asked, measured, left as it is. What every comparison starts from."""

    title = "A dense CLIP as it is."
    final = "base"

    @classmethod
    def epochs(cls, config: TrainConfig) -> float:
        return 0.0

    @classmethod
    def trainings(cls, config: TrainConfig, base: CLIPMoEConfig, result: CLIPMoEConfig) -> dict[str, Training]:
        return {}

    def make_result(self) -> ClipBundle:
        return load_bundle(self.folder.base)

    def systems(self) -> dict[str, System]:
        return {"base": (lambda: self.result, None)}

    def describe(self) -> dict[str, Any]:
        dense = active_parameters(self.base.model.config)["total"]
        return {"parameters": {"dense": dense, "total": dense, "active": dense}}
