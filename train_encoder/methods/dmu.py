"""Diversified Multiplet Upcycling (CLIP-MoE paper, section 3) and its ablation without the clusters.

base -> [ features -> clusters -> in-cluster FFN training ] x (E-1) -> upcycle -> routers
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.files import atomic_directory, load_tensors, save_tensors, write_json
from llava_clipmoe.load import load_bundle
from llava_clipmoe.upcycling import check_stage, ffn_state, upcycle

from ..features.clusters import StageClusters, accumulate, cluster_stage, load_clusters, save_clusters
from ..features.store import Embeddings
from ..training.run import System
from ..training.sampler import plan_epoch
from .mixture import Mixture

Tensors = dict[str, torch.Tensor]


class DMU(Mixture):
    """Multistage contrastive learning makes the experts, one stage after the other."""

    paper = "Diversified Multiplet Upcycling"

    def make_result(self) -> ClipBundle:
        self.stages: list[Tensors] = []
        for number in range(1, self.config.moe.num_experts):
            self.stages.append(self.make_stage(number))
        return self.train_routers()

    def make_stage(self, number: int) -> Tensors:
        """FFN tensors of stage `number`: cluster the previous stage's embeddings, then train on in-cluster batches."""
        weights, paths = self.folder.stage_weights(number), self.paths(number)
        if not weights.exists():
            files = self.train_stage(number, self.dense(self.started_from(number)), paths)
            self.save(lambda: self._save_stage(number, files))
            self.discard(f"stage{number}")
        stage = load_tensors(weights)
        check_stage(self.base.model.state_dict(), stage, f"{weights.parent}")
        return stage

    def train_stage(self, number: int, bundle: ClipBundle, paths: np.ndarray | None) -> dict[str, Tensors]:
        """Train `bundle.model` in place -> what the stage's directory holds, by file: its FFNs are `model`."""
        learns = set(self.stage_ffns(bundle.model.state_dict()))
        self.train(f"stage{number}", bundle, learns.__contains__, self.config.mcl.optim, paths=paths, number=number)
        return {"model": self.stage_ffns(bundle.model.state_dict())}

    def stage_ffns(self, state: Tensors) -> Tensors:
        """The FFN tensors of a dense state dict that a stage has of its own: those of the MoE blocks."""
        blocks = self.moe_blocks()
        return {name: tensor for name, tensor in ffn_state(state).items() if _block_of(name) in blocks}

    def started_from(self, number: int) -> int:
        """The stage whose FFNs stage `number` starts from (0: the base)."""
        return number - 1 if self.config.mcl.start_from == "previous" else 0

    def about_stage(self, number: int) -> dict[str, Any]:
        """What stage.json says."""
        start = self.started_from(number)
        return {
            "what": "the FFN tensors of one DMU stage; all else is the base's", "stage": number,
            "started_from": f"stage{start}" if start else "base",
        }  # fmt: skip

    def paths(self, number: int) -> np.ndarray | None:
        """Cluster paths [N,number] that stage `number` draws its batches by."""
        return accumulate([self.clusters(s) for s in range(number)])

    def _save_stage(self, number: int, files: dict[str, Tensors]) -> None:
        with atomic_directory(self.folder.stage_weights(number).parent) as temporary:
            for name, tensors in files.items():
                save_tensors(temporary / f"{name}.safetensors", tensors)
            write_json(temporary / "stage.json", self.about_stage(number))

    def clusters(self, number: int) -> StageClusters:
        """Clusters of the embeddings that stage `number` gives (0: the base)."""
        path = self.folder.clusters(number)
        if not path.exists():
            embeddings = self.stage_features(number)
            if self.accelerator.is_main_process:
                with self.timed("clusters", f"stage{number}"):
                    c = self.config
                    found = cluster_stage(embeddings.image, embeddings.text, c.clusters, c.seed + 2 * number)
                    save_clusters(path, found)
            self.accelerator.wait_for_everyone()
        return load_clusters(path)

    def stage_features(self, number: int) -> Embeddings:
        """Embeddings of the training images and their first captions under stage `number`'s model."""
        name = "base" if number == 0 else f"stage{number}"
        weights = self.folder.base / "model.safetensors" if number == 0 else self.folder.stage_weights(number)
        return self.features(name, self.dense(number), weights)

    def dense(self, number: int) -> ClipBundle:
        """A fresh copy of the base with stage `number`'s FFNs (0: the base itself)."""
        bundle = load_bundle(self.folder.base)
        if number:
            stage = self.stages[number - 1] if number <= len(self.stages) else load_tensors(
                self.folder.stage_weights(number))  # fmt: skip
            bundle.model.load_state_dict({**bundle.model.state_dict(), **stage})
        return bundle

    def untrained_moe(self) -> ClipBundle:
        model = upcycle(self.base.model.cpu(), self.stages, self.upcycled_config(), seed=self.config.seed)
        return dataclasses.replace(self.base, model=model)

    # ------------------------------------------------------------------------------------------------- evaluation

    def systems(self) -> dict[str, System]:
        stages = range(1, self.config.moe.num_experts)
        dense = {f"stage{s}": (lambda s=s: self.dense(s), None) for s in stages}
        return {"base": (lambda: self.dense(0), None), **dense, **self.mixture_systems()}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "clusters": self.cluster_report(), "ffn_change": self.ffn_change()}

    def cluster_report(self) -> list[dict]:
        """Sizes of the accumulated clusters before every stage, and how its batches backed off to parents."""
        report, e = [], self.config.moe.num_experts
        for number in range(1, e):
            paths = self.paths(number)
            sizes = np.unique(paths, axis=0, return_counts=True)[1]
            depth = plan_epoch(paths, self.config.mcl.optim.global_batch_size, 0, 0).depth
            report.append({
                "stage": number, "sizes": sorted(sizes.tolist(), reverse=True),
                "batches_by_depth": {str(d): int((depth == d).sum()) for d in sorted(set(depth.tolist()))},
            })  # fmt: skip
        return report

    def ffn_change(self) -> dict[str, float]:
        """How far each stage's FFNs went from the base: |W_s - W_0| / |W_0| over all of them."""
        base = ffn_state(self.base.model.state_dict())
        size = sum(t.double().square().sum() for t in base.values()) ** 0.5
        return {
            f"stage{number}": float(sum((t - base[k]).double().square().sum() for k, t in stage.items()) ** 0.5 / size)
            for number, stage in enumerate(self.stages, start=1)
        }


class VanillaMoE(DMU):
    """The ablation of CLIP-MoE's Table 4: the base and a directly fine-tuned FFN are the experts; no clusters."""

    paper = "vanilla MoE (CLIP-MoE, Table 4)"

    def paths(self, number: int) -> None:
        return None

    def cluster_report(self) -> list[dict]:
        return []


def _block_of(tensor_name: str) -> tuple[str, int]:
    tower, _, _, block, *_ = tensor_name.split(".")
    return tower, int(block)
