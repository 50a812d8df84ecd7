"""Sparse upcycling (Komatsuzaki et al. 2022): experts are copies of the base's FFN, and the mixture learns as one."""

from __future__ import annotations

import dataclasses

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.upcycling import sparse_upcycle

from ..config import TrainConfig
from .base import Trainable
from .mixture import Mixture


class SparseUpcycling(Mixture):
    """One training, of experts and routers (`finetune.parts` ffn) or of everything (all), by `moe.optim`."""

    title = "A mixture made by sparse upcycling."
    paper = "sparse upcycling"

    def make_result(self) -> ClipBundle:
        return self.train_routers()

    def untrained_moe(self) -> ClipBundle:
        model = sparse_upcycle(self.base.model.cpu(), self.upcycled_config(), seed=self.config.seed)
        return dataclasses.replace(self.base, model=model)

    @classmethod
    def trainable_last(cls, config: TrainConfig) -> Trainable:
        everything = config.finetune.parts == "all"
        return lambda name: everything or ".mlp.router." in name or ".mlp.experts." in name
