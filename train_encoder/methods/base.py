"""What a method is: a way from a base CLIP to a better one, which answers everything about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig, active_parameters
from llava_clipmoe.load import load_bundle
from llava_clipmoe.model_directory import save_bundle

from ..config import LoraConfig, OptimConfig, TrainConfig
from ..evaluate.run import Variant
from ..training.run import Run

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


class Method:
    """One way from a base CLIP to a better one, on the data and in the directory of a `Run`.

    A new method is a subclass in a file of its own, a line in `METHODS` and one in `METHOD_TITLES` (config.py). What
    comparisons and costs want to know is asked of the class; `config` there is a run's settings, as TrainConfig or as
    config.json in namespaces.
    """

    final = "clip-moe"
    """Name of the result among the variants that are measured."""
    output = "clip-moe"
    """Folder of the result in the run's directory."""

    result: ClipBundle
    """What `make` gave."""

    def __init__(self, run: Run):
        self.run, self.config = run, run.config

    # ------------------------------------------------------------------------------------------ asked of the class

    @classmethod
    def check_packages(cls) -> None:
        """Raise ModuleNotFoundError now, before a directory is made, where a package is missing."""

    @classmethod
    def epochs(cls, config: TrainConfig) -> float:
        """Passes over the data after the base, in all trainings together."""
        raise NotImplementedError

    @classmethod
    def trainings(cls, config: TrainConfig, base: CLIPMoEConfig, result: CLIPMoEConfig) -> dict[str, Training]:
        """The trainings after the base, by the names that metrics.jsonl gives them. base, result: of the models."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------- a run

    def check_settings(self) -> None:
        """Raise ValueError for settings that do not fit `run.start`, before anything is trained."""

    def make(self) -> ClipBundle:
        """Everything from the base to the model that the run is for; it is in `output_folder` when this returns."""
        raise NotImplementedError

    @property
    def output_folder(self) -> Path:
        return self.run.folder.path / self.output

    def load_base(self) -> ClipBundle:
        """A fresh copy of the base."""
        return load_bundle(self.run.folder.base)

    def train(self, name: str, bundle: ClipBundle, **more: Any) -> None:
        """One of the `trainings`, of `bundle.model` in place. more: what else `Run.train` takes."""
        training = self.trainings(self.config, self.run.base.model.config, self.result_config())[name]
        self.run.train(name, bundle, training.trainable, training.optim, **more)

    def result_config(self) -> CLIPMoEConfig:
        """The configuration of the result's model."""
        return self.run.base.model.config

    def train_last(self, name: str, start: Callable[[], ClipBundle], recipe: str, **more: Any) -> ClipBundle:
        """The result: what `start` gives, after its training; kept in `output_folder`. recipe: for the model card.
        more: what else `Run.train` takes."""
        if not self.output_folder.exists():
            bundle = start()
            self.train(name, bundle, **more)
            card = self.run.trained_card(recipe)
            self.run.save(lambda: save_bundle(bundle, self.output_folder, card=card))
            self.run.discard(name)
        return load_bundle(self.output_folder)

    def variants(self) -> Mapping[str, Variant]:
        """What is measured, by its name in results.json, in the order of the table."""
        return {"base": Variant(self.load_base), self.final: Variant(lambda: self.result)}

    def describe(self) -> dict[str, Any]:
        """What is not a score, for results.json: parameters, routing, clusters."""
        dense = active_parameters(self.run.base.model.config)["total"]
        return {"parameters": {"dense": dense, "total": dense, "active": dense}}
