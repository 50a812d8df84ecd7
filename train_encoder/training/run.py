"""One run of the trainer: its data, its base, and what every method asks for: train, features, save.

    run = Run(config, accelerator)
    run.read_data()
    run.make_base()
    run.train("finetune", bundle, trainable, optim)

Every piece is kept in the run's directory as soon as it is whole; the same command again goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.load import load_bundle
from llava_clipmoe.model_card import public_name
from llava_clipmoe.model_directory import save_bundle
from llava_clipmoe.upcycling import with_text_positions

from ..config import OptimConfig, TrainConfig
from ..data.cache import check_images
from ..data.dataset import EncoderDataset
from ..data.decode import ImageTransform
from ..data.formats import open_source
from ..data.pairs import PairSource
from ..features.encode import Captions, encode_source
from ..features.store import Embeddings
from ..progress import Bar
from ..run_directory import RunDirectory, file_digest
from .checkpoint import discard_checkpoints
from .loop import Stage, train
from .losses import make_objective
from .memory import reset_peak_memory
from .metrics import Began, Metrics
from .precision import frozen_in
from .scratch import scratch_bundle

SEEDS = {"base": 0, "router": 1, "finetune": 2, "stage": 10, "expert": 110}
"""Where the seeds of each kind of training start; a training's number is added (stage2: 12)."""
OTHER_SEEDS = 500
"""Where the seeds of any other kind of training start."""


def training_seed(seed: int, name: str) -> int:
    """The seed of a training ("router", "stage2") of a run with this `seed`: every training draws its own batches."""
    kind, number = re.fullmatch(r"(.*?)(\d*)", name).groups()
    return 1000 * seed + SEEDS.get(kind, OTHER_SEEDS) + int(number or 0)


class Run:
    """One run: its settings, its directory, its data and its base. A method (methods/) is handed one.

    After `read_data`: `source`, `rows` (its usable rows), `transform`, `cache`, and `start`, the base as it was given.
    After `make_base`: `base`, the dense CLIP that the method starts from.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        self.accelerator = accelerator
        self.folder = RunDirectory(config)
        with self.accelerator.main_process_first():
            self.folder.claim(accelerator.is_main_process)
        engine = dataclasses.replace(config.engine, chunk_size=self.folder.config["engine"]["chunk_size"])
        self.config = dataclasses.replace(config, engine=engine)  # the chunk that a run of this folder began with
        self.metrics = Metrics(self.folder.path, config.engine.trackers, self.folder.config)

    def read_data(self) -> None:
        """Open the training data, look at every image once, and keep decoded images where asked to."""
        data, engine = self.config.data, self.config.engine
        with self.accelerator.main_process_first():
            self.source = open_source(data)
            self.folder.check_data(self.source.fingerprint, self.accelerator.is_main_process)
        self.start = self._open_base()  # says image size and tokenizer
        self.transform = ImageTransform(self.start.image_size)
        self.cache = self.folder.cache if data.cache_images else None
        with self.accelerator.main_process_first(), Bar("checking images", len(self.source)) as bar:
            # Where images are kept decoded, the one pass that checks them also writes the cache.
            good = check_images(
                self.source,
                workers=engine.workers,
                max_bad_fraction=data.max_bad_fraction,
                skipped_path=self.folder.skipped,
                bar=bar,
                transform=self.transform,
                cache=self.cache,
            )
        self.rows = np.flatnonzero(good)

    def _open_base(self) -> ClipBundle:
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

    def make_base(self) -> None:
        """Keep the dense CLIP that everything starts from; a small one is trained here from nothing where asked."""
        self.base, base = self.start, self.config.base
        if self.folder.base.exists():
            return
        trainings = base.scratch.trainings if base.source == "scratch" else {}
        for name, training in trainings.items():
            source = open_source(dataclasses.replace(self.config.data, caption_columns=training.caption_columns))
            self.train(name, self.base, training.trainable, training.optim, source=source)
        card = {**self.card(role="the dense base of a CLIP-MoE run"), "license": self.base.license}
        self.save(lambda: save_bundle(self.base, self.folder.base, card=card))
        for name in trainings:
            self.discard(name)

    def train(
        self,
        name: str,
        bundle: ClipBundle,
        trainable: Callable[[str], bool],
        optim: OptimConfig,
        *,
        cluster_ids: np.ndarray | None = None,
        rows: np.ndarray | None = None,
        source: PairSource | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        """Train the tensors of `bundle.model` whose names are `trainable`, in place; resumed, and seeded, by its name.

        cluster_ids [N,S]: the clusters of the usable rows that batches come from (plain shuffled batches when absent).
        rows: train on these of them only. accelerator: another one than the run's (`alone.Alone`).
        """
        accelerator = accelerator or self.accelerator
        rows = self.rows if rows is None else rows
        if cluster_ids is None:
            cluster_ids = np.zeros((len(rows), 0), dtype=np.int64)
        start, settings = self.start, self.config
        dataset = EncoderDataset(
            source or self.source,
            start.tokenizer,
            self.transform,
            start.context_length,
            settings.data.captions,
            settings.seed,
            cache=self.cache,
            short=make_objective(optim).captions == 2,
        )
        stage = Stage(name, bundle, dataset, rows, cluster_ids, trainable, optim, training_seed(settings.seed, name))
        files = self.folder.checkpoints(name), self.folder.chunk(name)
        gpu_bf16 = accelerator.device.type == "cuda" and settings.engine.precision == "bf16"
        with frozen_in(bundle.model, torch.bfloat16, trainable) if gpu_bf16 else nullcontext():
            train(stage, accelerator, settings.engine, self.metrics, *files)
        bundle.model.cpu()

    def features(self, name: str, bundle: ClipBundle, weights: Path, captions: Captions = "first") -> Embeddings:
        """Embeddings of all usable training images and of their `captions` under the model `name`. `weights`: the file
        of its weights, or of those that differ from the base's."""
        engine = self.config.engine
        with self.timed("features", name, captions=0 if captions == "none" else len(self.rows)):
            return encode_source(
                bundle,
                self.source,
                self.folder.features(name),
                captions=captions,
                rows=self.rows,
                batch_size=self.config.evaluation.batch_size,
                precision=engine.precision,
                workers=engine.workers,
                cache=self.cache,
                accelerator=self.accelerator,
                model_id=file_digest(weights),
                progress=Bar(f"features of {name}", None, unit="items"),
            )

    def card(self, **facts: str) -> dict[str, str]:
        """`facts` and the base's name for a model card, by the settings alone: a resumed run says the same."""
        base = self.config.base.source
        name = ClipBundle.name if base == "scratch" else public_name(base)
        return {"name": name, "base": name, **facts}

    def trained_card(self, recipe: str) -> dict[str, str]:
        """Lines for the model card of what was trained."""
        return self.card(recipe=recipe, data=public_name(self.config.data.source))

    def save(self, write: Callable[[], object]) -> None:
        """Let process 0 write, and all processes wait until it is there."""
        if self.accelerator.is_main_process:
            write()
        self.accelerator.wait_for_everyone()

    def discard(self, name: str, everywhere: bool = False) -> None:
        """Drop the resume state of a training whose result is saved. everywhere: not on process 0 alone."""
        if everywhere or self.accelerator.is_main_process:
            discard_checkpoints(self.folder.checkpoints(name))

    @contextmanager
    def timed(self, work: str, stage: str, **counts: int) -> Iterator[None]:
        """Log how long a piece of work took and the memory it needed. counts: what was worked on besides images."""
        began, device = Began(), self.accelerator.device
        reset_peak_memory(device)
        yield
        self.metrics.done(work, stage, began, device, images=len(self.rows), **counts)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """accelerate's engine for this run: DDP under torchrun, bf16 autocast or fp32."""
    precision = "bf16" if config.engine.precision == "bf16" else "no"
    # Processes other than 0 wait while it writes, clusters and evaluates: longer than NCCL's ten minutes.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=24))
    return Accelerator(mixed_precision=precision, cpu=config.engine.device == "cpu", kwargs_handlers=[patience])
