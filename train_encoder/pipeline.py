"""Diversified Multiplet Upcycling from start to end: what `llava-clipmoe train-encoder` runs.

    llava-clipmoe train-encoder dmu-openmoji --output-dir runs/quickstart      (minutes, 2 cores)
    torchrun --nproc-per-node 8 -m llava_clipmoe.cli train-encoder dmu-vitl14-336-sharegpt4v --output-dir runs/paper

    base -> [ features -> clusters -> in-cluster FFN training ] x (E-1) -> upcycle -> routers -> evaluate -> report

Every piece is kept in the run's directory as soon as it is whole; the same command again goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from llava_clipmoe.files import atomic_directory, load_tensors, save_tensors, write_json
from llava_clipmoe.model_directory import ClipBundle, load_bundle, save_bundle
from llava_clipmoe.upcycling import check_stage, ffn_state, is_ffn, moe_config, upcycle, with_text_positions

from .allocator import keep_freed_memory
from .checkpoint import discard_checkpoints
from .clusters import StageClusters, accumulate, cluster_stage, load_clusters, save_clusters
from .config import DataConfig, OptimConfig, TrainConfig
from .data import EncoderDataset, ImageTransform, check_images
from .features import Embeddings, encode_source
from .loop import Stage, train
from .progress import Bar, Metrics, peak_memory_bytes, reset_peak_memory
from .run_directory import RunDirectory, file_digest
from .sampler import plan_epoch
from .scratch import scratch_bundle
from .sources import PairSource, open_source


class Pipeline:
    """One run: its settings, its directory, its data, and the pieces made so far. `run()` is the table of contents."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.folder = RunDirectory(config)
        with self.accelerator.main_process_first():
            self.folder.claim(accelerator.is_main_process)
        self.metrics = Metrics(self.folder.path, config.engine.trackers, self.folder.config)

    def run(self) -> None:
        self.read_data()
        self.base = self.make_base()
        self.stages: list[dict[str, torch.Tensor]] = []
        for number in range(1, self.config.moe.num_experts):
            self.stages.append(self.make_stage(number))
        self.clip_moe = self.train_routers()
        if self.accelerator.is_main_process:
            from .final import evaluate_run  # the page and the table, once everything is trained

            evaluate_run(self)
        self.accelerator.wait_for_everyone()
        self.metrics.close()

    # ------------------------------------------------------------------------------------------------------ data

    def read_data(self) -> None:
        """Open the training data, look at every image once, and keep decoded images where asked to."""
        data, engine = self.config.data, self.config.engine
        with self.accelerator.main_process_first():
            self.source = open_source(data)
            self.folder.check_data(self.source.fingerprint, self.accelerator.is_main_process)
        self.start = self.open_base()  # the base before it is changed: says image size and tokenizer
        self.transform = ImageTransform(self.start.image_size)
        self.cache = self.folder.cache if data.cache_images else None
        with self.accelerator.main_process_first(), Bar("checking images", len(self.source)) as bar:
            # Where images are kept decoded, the one pass that checks them also writes the cache.
            good = check_images(
                self.source, workers=engine.workers, max_bad_fraction=data.max_bad_fraction,
                skipped_path=self.folder.skipped, progress=lambda done, _: bar.advance(done - bar.done),
                transform=self.transform, cache=self.cache,
            )  # fmt: skip
        self.rows = np.flatnonzero(good)

    def dataset(self, source: PairSource) -> EncoderDataset:
        return EncoderDataset(
            source, self.start.tokenizer, self.transform, self.start.context_length, self.config.data.captions,
            self.config.seed, cache=self.cache,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------------ base

    def open_base(self) -> ClipBundle:
        """The base as it was given: a saved one of this run, a pretrained model, or a fresh small one."""
        base = self.config.base
        if self.folder.base.exists():
            return load_bundle(self.folder.base)
        if base.source == "scratch":
            bundle = scratch_bundle(base.scratch, self.config.seed)
        else:
            bundle = load_bundle(base.source, checkpoint=base.checkpoint, quick_gelu=base.quick_gelu)
        if base.text_positions is not None:
            with_text_positions(bundle.model, base.text_positions)
            bundle.tokenizer.model_max_length = base.text_positions
        return bundle

    def make_base(self) -> ClipBundle:
        """The dense CLIP that the experts come from; a small one is trained here from nothing where asked."""
        bundle, base = self.start, self.config.base
        if self.folder.base.exists():
            return bundle
        if base.source == "scratch":
            source = open_source(dataclasses.replace(self.config.data, caption_columns=base.scratch.caption_columns))
            self._train("base", bundle, self.dataset(source), None, lambda name: True, base.scratch.optim)
        self.save(lambda: save_bundle(bundle, self.folder.base, card={"role": "the dense base of a CLIP-MoE run"}))
        self.discard("base")
        return bundle

    # ---------------------------------------------------------------------------------------------------- stages

    def make_stage(self, number: int) -> dict[str, torch.Tensor]:
        """FFN tensors of stage `number`: cluster the previous stage's embeddings, then train on in-cluster batches."""
        name, weights = f"stage{number}", self.folder.stage_weights(number)
        paths = accumulate([self.clusters(s) for s in range(number)])
        if not weights.exists():
            if self.config.mcl.start_from == "previous" and number > 1:
                bundle = self.dense(number - 1)
            else:
                bundle = self.dense(0)
            blocks = self.moe_blocks()
            self._train(
                name, bundle, self.dataset(self.source), paths,
                lambda tensor: is_ffn(tensor) and _block_of(tensor) in blocks, self.config.mcl.optim,
            )  # fmt: skip
            trained = {k: v for k, v in ffn_state(bundle.model.state_dict()).items() if _block_of(k) in blocks}
            self.save(lambda: self._save_stage(number, trained))
            self.discard(name)
        stage = load_tensors(weights)
        check_stage(self.base.model.state_dict(), stage, f"{weights.parent}")
        return stage

    def _save_stage(self, number: int, trained: dict[str, torch.Tensor]) -> None:
        with atomic_directory(self.folder.stage_weights(number).parent) as temporary:
            save_tensors(temporary / "model.safetensors", trained)
            about = {"what": "the FFN tensors of one DMU stage; all else is the base's", "stage": number}
            write_json(temporary / "stage.json", about)

    def clusters(self, number: int) -> StageClusters:
        """Clusters of the embeddings that stage `number` gives (0: the base)."""
        path = self.folder.clusters(number)
        if not path.exists():
            embeddings = self.features(number)
            if self.accelerator.is_main_process:
                with self.timed("clusters", f"stage{number}"):
                    c = self.config
                    found = cluster_stage(embeddings.image, embeddings.text, c.clusters, c.seed + 2 * number)
                    save_clusters(path, found)
            self.accelerator.wait_for_everyone()
        return load_clusters(path)

    def features(self, number: int) -> Embeddings:
        """Embeddings of all usable training images and their first captions under stage `number`'s model."""
        name, engine = ("base" if number == 0 else f"stage{number}"), self.config.engine
        weights = self.folder.base / "model.safetensors" if number == 0 else self.folder.stage_weights(number)
        with self.timed("features", name):
            bundle = self.dense(number)
            bundle.model.to(self.accelerator.device)
            return encode_source(
                bundle, self.source, self.folder.features(name), captions="first", rows=self.rows,
                batch_size=self.config.evaluation.batch_size, device=self.accelerator.device,
                precision=engine.precision, workers=engine.workers, cache=self.cache,
                accelerator=self.accelerator, model_id=file_digest(weights),
                progress=Bar(f"features of {name}", 2 * len(self.rows), unit="items"),
            )  # fmt: skip

    def dense(self, number: int) -> ClipBundle:
        """A fresh copy of the base with stage `number`'s FFNs (0: the base itself)."""
        bundle = load_bundle(self.folder.base)
        if number:
            stage = self.stages[number - 1] if number <= len(self.stages) else load_tensors(
                self.folder.stage_weights(number))  # fmt: skip
            bundle.model.load_state_dict({**bundle.model.state_dict(), **stage})
        return bundle

    # --------------------------------------------------------------------------------------------------- routers

    def moe_blocks(self) -> set[tuple[str, int]]:
        """(tower, block) of every block that gets experts."""
        config = self.upcycled_config()
        vision = {("vision_model", i) for i in config.vision_config.moe_layers}
        return vision | {("text_model", i) for i in config.text_config.moe_layers}

    def upcycled_config(self):
        moe, dense = self.config.moe, self.start.model.config
        fields = {name: getattr(moe, name) for name in (
            "num_experts", "num_experts_per_tok", "router_aux_loss_coef", "router_z_loss_coef",
            "router_jitter_noise", "router_initializer_range", "expert_dropout")}  # fmt: skip
        vision = range(dense.vision_config.num_hidden_layers) if moe.vision_layers is None else moe.vision_layers
        text = range(dense.text_config.num_hidden_layers) if moe.text_layers is None else moe.text_layers
        return moe_config(dense, {"vision_model": list(vision), "text_model": list(text)}, **fields)

    def untrained_moe(self) -> ClipBundle:
        """The experts put together, under fresh routers (the same ones every time: `seed` decides them)."""
        model = upcycle(self.base.model.cpu(), self.stages, self.upcycled_config(), seed=self.config.seed)
        return dataclasses.replace(self.base, model=model)

    def train_routers(self) -> ClipBundle:
        """The result: a CLIP-MoE whose routers alone were trained, on shuffled global batches."""
        if not self.folder.clip_moe.exists():
            bundle = self.untrained_moe()
            self._train(
                "router", bundle, self.dataset(self.source), None, lambda name: ".mlp.router." in name,
                self.config.moe.optim,
            )  # fmt: skip
            card = {"recipe": "Diversified Multiplet Upcycling", "data": self.config.data.source}
            self.save(lambda: save_bundle(bundle, self.folder.clip_moe, card=card))
            self.discard("router")
        return load_bundle(self.folder.clip_moe)

    # --------------------------------------------------------------------------------------------------- helpers

    def _train(self, name: str, bundle: ClipBundle, dataset, paths, trainable, optim: OptimConfig) -> None:
        if paths is None:
            paths = np.zeros((len(self.rows), 0), dtype=np.int64)
        seed = self.config.seed * 1000 + STAGE_SEEDS.index(name) if name in STAGE_SEEDS else (
            self.config.seed * 1000 + 10 + int(name.removeprefix("stage")))  # fmt: skip
        stage = Stage(name, bundle, dataset, self.rows, paths, trainable, optim, seed)
        train(stage, self.accelerator, self.config.engine, self.metrics, self.folder.checkpoints(name))
        bundle.model.cpu()

    def save(self, write) -> None:
        """Let process 0 write, and all processes wait until it is there."""
        if self.accelerator.is_main_process:
            write()
        self.accelerator.wait_for_everyone()

    def discard(self, name: str) -> None:
        """Drop the resume state of a training whose result is saved."""
        if self.accelerator.is_main_process:
            discard_checkpoints(self.folder.checkpoints(name))

    @contextmanager
    def timed(self, work: str, stage: str) -> Iterator[None]:
        """Log how long a piece of work took and the memory it needed."""
        started = time.time()
        reset_peak_memory(self.accelerator.device)
        yield
        self.metrics.log({
            "event": "done", "work": work, "stage": stage, "seconds": time.time() - started,
            "images": len(self.rows), "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
        })  # fmt: skip

    def cluster_report(self) -> list[dict]:
        """Sizes of the accumulated clusters before every stage, and how its batches backed off to parents."""
        report, e = [], self.config.moe.num_experts
        for number in range(1, e):
            paths = accumulate([self.clusters(s) for s in range(number)])
            sizes = np.unique(paths, axis=0, return_counts=True)[1]
            depth = plan_epoch(paths, self.config.mcl.optim.global_batch_size, 0, 0).depth
            report.append({
                "stage": number, "sizes": sorted(sizes.tolist(), reverse=True),
                "batches_by_depth": {str(d): int((depth == d).sum()) for d in sorted(set(depth.tolist()))},
            })  # fmt: skip
        return report


STAGE_SEEDS = ("base", "router")


def _block_of(tensor_name: str) -> tuple[str, int]:
    tower, _, _, block, *_ = tensor_name.split(".")
    return tower, int(block)


def parse_source(text: str, data: DataConfig) -> tuple[str, DataConfig]:
    """`NAME=SOURCE[:SPLIT]` -> (name, the data settings to read it with)."""
    name, _, rest = text.rpartition("=") if "=" in text else (text, "", text)
    source, _, split = rest.rpartition(":") if ":" in rest and not Path(rest).exists() else (rest, "", "train")
    same = source == data.source
    return name, dataclasses.replace(
        DataConfig(), source=source, split=split,
        image_root=data.image_root if same else None, image_column=data.image_column if same else None,
    )  # fmt: skip


def make_accelerator(config: TrainConfig) -> Accelerator:
    """accelerate's engine for this run: DDP under torchrun, bf16 autocast or fp32."""
    from datetime import timedelta

    from accelerate import InitProcessGroupKwargs

    precision = "bf16" if config.engine.precision == "bf16" else "no"
    # Processes other than 0 wait while it writes, clusters and evaluates: longer than NCCL's ten minutes.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=24))
    return Accelerator(mixed_precision=precision, cpu=config.engine.device == "cpu", kwargs_handlers=[patience])


def main(argv: list[str]) -> int:
    """The command `llava-clipmoe train-encoder RECIPE [--field value ...] --output-dir runs/NAME`."""
    import tyro

    from .recipes import RECIPES

    config = tyro.extras.overridable_config_cli(
        RECIPES, args=argv, prog="llava-clipmoe train-encoder", description=__doc__, use_underscores=False
    )
    if config.output_dir is None:
        raise ValueError("say where the run is kept: --output-dir runs/NAME (the same command again resumes it).")
    accelerator = make_accelerator(config)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    Pipeline(config, accelerator).run()
    return 0
