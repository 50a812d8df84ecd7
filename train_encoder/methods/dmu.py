"""Diversified Multiplet Upcycling (CLIP-MoE paper, section 3) and its ablation without the clusters.

base -> [ features -> clusters -> in-cluster FFN training ] x (E-1) -> upcycle -> routers
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig
from llava_clipmoe.files import atomic_directory, load_tensors, save_tensors, write_json
from llava_clipmoe.upcycling import check_stage, ffn_state, is_ffn, upcycle

from ..config import LoraConfig, TrainConfig
from ..evaluate.run import Variant
from ..features.clusters import StageClusters, accumulate, cluster_stage
from ..features.encode import encode_source
from ..training.run import Run
from ..training.sampler import plan_epoch
from . import centroids
from .base import Training
from .mixture import Mixture, moe_blocks

Tensors = dict[str, torch.Tensor]


class DMU(Mixture):
    """Multistage contrastive learning makes the experts, one stage after the other."""

    recipe = "Diversified Multiplet Upcycling"
    own_clusters = True

    def __init__(self, run: Run):
        super().__init__(run)
        self.stages: list[Tensors] = []
        """FFN tensors of the stages made so far, in order."""

    @classmethod
    def epochs(cls, config: TrainConfig) -> float:
        return (config.moe.num_experts - 1) * config.mcl.optim.epochs + super().epochs(config)

    @classmethod
    def trainings(cls, config: TrainConfig, base: CLIPMoEConfig, result: CLIPMoEConfig) -> dict[str, Training]:
        blocks = moe_blocks(result)
        one = Training(base, lambda name: _is_own(name, blocks), config.mcl.optim, cls.lora(config))
        stages = {f"stage{number}": one for number in range(1, config.moe.num_experts)}
        return {**stages, **super().trainings(config, base, result)}

    @classmethod
    def lora(cls, config: TrainConfig) -> LoraConfig | None:
        """Settings of low-rank stages; None: the stages are full."""
        return None

    # ------------------------------------------------------------------------------------------------------ stages

    def make(self) -> ClipBundle:
        for number in range(1, self.config.moe.num_experts):
            self.stages.append(self.make_stage(number))
        return self.train_routers()

    def make_stage(self, number: int) -> Tensors:
        """FFN tensors of stage `number`: cluster the previous stage's embeddings, then train on in-cluster batches."""
        weights, cluster_ids = self.run.folder.stage_weights(number), self.cluster_ids(number)
        if not weights.exists():
            ffns = self.train_stage(number, self.dense(self.started_from(number)), cluster_ids)
            self.run.save(lambda: self._save_stage(number, ffns))
            self.run.discard(f"stage{number}")
        stage = load_tensors(weights)
        check_stage(self.run.base.model.state_dict(), stage, f"{weights.parent}")
        return stage

    def train_stage(self, number: int, bundle: ClipBundle, cluster_ids: np.ndarray | None) -> Tensors:
        """Train `bundle.model` in place -> its FFN tensors."""
        self.train(_name(number), bundle, cluster_ids=cluster_ids)
        return self.stage_ffns(bundle.model.state_dict())

    def stage_ffns(self, state: Tensors) -> Tensors:
        """Those tensors of a dense state dict that a stage trains: the FFNs of the MoE blocks."""
        blocks = moe_blocks(self.result_config())
        return {name: tensor for name, tensor in state.items() if _is_own(name, blocks)}

    def started_from(self, number: int) -> int:
        """The stage whose FFNs stage `number` starts from (0: the base)."""
        return number - 1 if self.config.mcl.start_from == "previous" else 0

    def about_stage(self, number: int) -> dict[str, Any]:
        """What stage.json says."""
        what = "the FFN tensors of one DMU stage; all else is the base's"
        return {"what": what, "stage": number, "started_from": _name(self.started_from(number))}

    def _save_stage(self, number: int, ffns: Tensors) -> None:
        with atomic_directory(self.run.folder.stage_weights(number).parent) as temporary:
            save_tensors(temporary / "model.safetensors", ffns)
            write_json(temporary / "stage.json", self.about_stage(number))

    def dense(self, number: int) -> ClipBundle:
        """A fresh copy of the base with stage `number`'s FFNs (0: the base itself)."""
        bundle = self.load_base()
        if number:
            bundle.model.load_state_dict({**bundle.model.state_dict(), **self.stages[number - 1]})
        return bundle

    # ---------------------------------------------------------------------------------------------------- clusters

    def cluster_ids(self, number: int) -> np.ndarray | None:
        """Accumulated clusters [N,number] that stage `number` draws its batches from."""
        return accumulate([self.clusters(stage) for stage in range(number)])

    def clusters(self, number: int) -> StageClusters:
        """Clusters of the training data's embeddings (images and first captions) under stage `number` (0: the base)."""
        path, run, c = self.run.folder.clusters(number), self.run, self.config
        if not path.exists():
            weights = run.folder.stage_weights(number) if number else run.folder.base / "model.safetensors"
            embeddings = run.features(_name(number), self.dense(number), weights)
            if run.accelerator.is_main_process:
                with run.timed("clusters", f"stage{number}"):
                    found = cluster_stage(embeddings.image, embeddings.text, c.clusters, c.seed + 2 * number)
                    found.save(path)
            run.accelerator.wait_for_everyone()
        return StageClusters.load(path)

    # ------------------------------------------------------------------------------------------------- the mixture

    def expert_of(self, rows: np.ndarray) -> np.ndarray:
        """Every stage was trained on all clusters: an expert's own are those of the base's in which it fits best."""
        run, fits = self.run, []
        clusters = self.clusters(0).labels[np.searchsorted(run.rows, rows)]
        reading = {"rows": rows, "cache": run.cache, "workers": self.config.engine.workers}
        for number in range(self.config.moe.num_experts):
            with tempfile.TemporaryDirectory(prefix="router-init-") as folder:
                found = encode_source(
                    self.dense(number), run.source, folder, dtype="float32", **reading, **self.encoding
                )
                temperature = self.config.mcl.optim.temperature
                fits.append(centroids.in_cluster_fit(found.image, found.text, clusters, temperature))
        return centroids.best_experts(np.stack(fits), clusters)

    def random_moe(self) -> ClipBundle:
        base = self.run.base
        model = upcycle(base.model.cpu(), self.stages, self.result_config(), seed=self.config.seed)
        return dataclasses.replace(base, model=model)

    def variants(self) -> Mapping[str, Variant]:
        """The dense CLIP of every stage beside what every mixture shows."""
        mixture = super().variants()
        stages = {_name(s): Variant(lambda s=s: self.dense(s)) for s in range(1, self.config.moe.num_experts)}
        return {"base": mixture["base"], **stages, **mixture}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "clusters": self.cluster_report(), "ffn_change": self.ffn_change()}

    def cluster_report(self) -> list[dict]:
        """Sizes of the accumulated clusters before every stage, and at which depth its batches were drawn."""
        report = []
        for number in range(1, self.config.moe.num_experts):
            cluster_ids = self.cluster_ids(number)
            sizes = sorted(np.unique(cluster_ids, axis=0, return_counts=True)[1].tolist(), reverse=True)
            plan = plan_epoch(cluster_ids, self.config.mcl.optim.global_batch_size, 0, 0)
            depths, batches = np.unique(plan.depth, return_counts=True)
            by_depth = dict(zip(map(str, depths.tolist()), batches.tolist(), strict=True))
            report.append({"stage": number, "sizes": sizes, "batches_by_depth": by_depth})
        return report

    def ffn_change(self) -> dict[str, float]:
        """How far each stage's FFNs went from the base: |W_s - W_0| / |W_0| over all of them."""
        base = ffn_state(self.run.base.model.state_dict())
        size = _norm(base.values())
        changes = {}
        for number, stage in enumerate(self.stages, start=1):
            changes[_name(number)] = float(_norm(t - base[name] for name, t in stage.items()) / size)
        return changes


class VanillaMoE(DMU):
    """The ablation of CLIP-MoE's Table 4: the base and a directly fine-tuned FFN are the experts; no clusters."""

    recipe = "vanilla MoE (CLIP-MoE, Table 4)"
    own_clusters = False

    def cluster_ids(self, number: int) -> None:
        return None

    def cluster_report(self) -> list[dict]:
        return []


def _name(stage: int) -> str:
    return f"stage{stage}" if stage else "base"


def _norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return sum(t.double().square().sum() for t in tensors) ** 0.5


def _is_own(name: str, blocks: set[tuple[str, int]]) -> bool:
    """Whether a tensor belongs to an FFN in one of these blocks, (tower, number) each."""
    if not is_ffn(name):
        return False
    tower, _, _, block, *_ = name.split(".")
    return (tower, int(block)) in blocks
