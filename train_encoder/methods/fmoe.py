"""CLIP-FMoE: experts trained independently on clusters of the data, then fused with the base behind a gate.

    base -> features -> ICCL clusters -> [ one expert a cluster, beside the frozen base ] x N -> routers and gates

Isolated cluster contrastive learning (ICCL): k-means of the base's image features into N clusters, each into M
sub-clusters; expert i trains on cluster i alone, every batch from one sub-cluster. No expert needs another one, so
several processes train one each; a single process trains them one after the other, to the same bits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig
from llava_clipmoe.files import atomic_directory, load_tensors, save_tensors, write_json
from llava_clipmoe.upcycling import default_fusion_layers, expert_state, ffn_state, fuse, is_expert_or_gate, moe_config

from ..config import TrainConfig
from ..features.clusters import NestedClusters, nested_clusters
from ..training.alone import Alone
from .base import Training
from .mixture import Mixture


class FMoE(Mixture):
    """Cluster once, train the experts side by side, then routers and fusion gates together."""

    recipe = "CLIP-FMoE"
    own_clusters = True
    default_layers = staticmethod(default_fusion_layers)

    @classmethod
    def epochs(cls, config: TrainConfig) -> float:
        return config.fmoe.optim.epochs + super().epochs(config)  # an expert passes over its own cluster

    @classmethod
    def trainings(cls, config: TrainConfig, base: CLIPMoEConfig, result: CLIPMoEConfig) -> dict[str, Training]:
        blocks = {"vision_model": result.vision_config.moe_layers, "text_model": result.text_config.moe_layers}
        beside = moe_config(base, blocks, num_experts=1, num_experts_per_tok=1, fusion_gate=True)
        one = Training(beside, is_expert_or_gate, config.fmoe.optim)
        experts = {f"expert{number}": one for number in range(config.moe.num_experts)}
        return {**experts, **super().trainings(config, base, result)}

    def make(self) -> ClipBundle:
        found, experts = self.clusters(), range(self.config.moe.num_experts)
        accelerator = self.run.accelerator
        for expert in experts[accelerator.process_index :: accelerator.num_processes]:
            self.make_expert(expert, found)
        accelerator.wait_for_everyone()
        self.experts = [load_tensors(self.run.folder.expert_weights(expert)) for expert in experts]
        return self.train_routers()

    def clusters(self) -> NestedClusters:
        """N clusters of the base's image features, each with its sub-clusters."""
        path, run, c = self.run.folder.path / "clusters" / "iccl.npz", self.run, self.config
        if not path.exists():
            weights = run.folder.base / "model.safetensors"
            embeddings = run.features("base", self.load_base(), weights, captions="none")
            if run.accelerator.is_main_process:
                with run.timed("clusters", "base"):
                    made = nested_clusters(embeddings.image, c.moe.num_experts, c.fmoe.sub_clusters, c.clusters, c.seed)
                    made.save(path)
            run.accelerator.wait_for_everyone()
        return NestedClusters.load(path)

    def make_expert(self, number: int, found: NestedClusters) -> None:
        """Train expert `number` on its own cluster, in this process alone."""
        weights, name = self.run.folder.expert_weights(number), f"expert{number}"
        if weights.exists():
            return
        mine = np.flatnonzero(found.labels == number)
        batch = self.config.fmoe.optim.global_batch_size
        if len(mine) < batch:
            raise ValueError(
                f"cluster {number} has {len(mine)} images, fewer than a batch of {batch}: lower "
                "--fmoe.optim.global-batch-size or --moe.num-experts, or use more data."
            )
        base, config = self.load_base(), self.result_config(num_experts=1, num_experts_per_tok=1)
        beside = fuse(base.model, [ffn_state(base.model.state_dict())], config, seed=self.config.seed)
        bundle = dataclasses.replace(base, model=beside)
        sub_clusters, alone = found.sub_labels[mine][:, None], Alone(self.run.accelerator)
        self.train(name, bundle, cluster_ids=sub_clusters, rows=self.run.rows[mine], accelerator=alone)
        with atomic_directory(weights.parent) as temporary:
            save_tensors(temporary / "model.safetensors", expert_state(bundle.model.state_dict()))
            about = {"what": "the FFN tensors of one expert of a CLIP-FMoE; all else is the base's", "expert": number}
            write_json(temporary / "expert.json", about)
        self.run.discard(name, everywhere=True)

    # ------------------------------------------------------------------------------------------------- the mixture

    def result_config(self, **more: Any) -> CLIPMoEConfig:
        """With fusion gates, in the paper's blocks where the settings name none."""
        return super().result_config(fusion_gate=True, fusion_gate_init=self.config.fmoe.gate_init, **more)

    def expert_of(self, rows: np.ndarray) -> np.ndarray:
        """The cluster that the expert was trained on."""
        return self.clusters().labels[np.searchsorted(self.run.rows, rows)]

    def random_moe(self) -> ClipBundle:
        model = fuse(self.run.base.model.cpu(), self.experts, self.result_config(), seed=self.config.seed)
        return dataclasses.replace(self.run.base, model=model)

    def describe(self) -> dict[str, Any]:
        """The common part, and the sizes of the clusters."""
        sizes = np.bincount(self.clusters().labels, minlength=self.config.moe.num_experts)
        return {**super().describe(), "iccl": {"sizes": sizes.tolist()}}
