"""Every setting of the encoder trainer, as nested dataclasses that `tyro` turns into flags.

The defaults are the paper's (CLIP-MoE, docs/reproduce.md); a recipe in `recipes.py` changes only what it must.
`llava-clipmoe train-encoder RECIPE --help` prints this page as flags.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

ChunkSize = int | Literal["auto"] | None
METHOD_TITLES = {
    "base": "A dense CLIP as it is.",
    "dmu": "A CLIP-MoE made by Diversified Multiplet Upcycling.",
    "dmu-lora": "A CLIP-MoE made by Diversified Multiplet Upcycling, its stages of low rank (LoRA).",
    "fmoe": "A CLIP-FMoE: experts trained on clusters, beside the base behind a fusion gate.",
    "vanilla-moe": "A mixture of the base's FFNs and one set of directly fine-tuned ones.",
    "sparse-upcycling": "A mixture made by sparse upcycling.",
    "finetune": "A dense CLIP, fine-tuned.",
}
"""Method -> what a run of it makes. (The methods themselves are in methods/, which is slow to import.)"""


@dataclass(frozen=True)
class DataConfig:
    """Where image-caption pairs come from."""

    source: str = "openmoji"
    """`openmoji` (made on this machine, no download), or a CSV/TSV/JSON/JSONL file, a folder of images with .txt
    captions, a parquet file or folder, webdataset tar shards (a folder or `shards-{000..012}.tar`), a hub data set."""
    split: str = "train"
    """Which split to read of a source that has several: hub data sets, openmoji, files or folders named so."""
    image_root: Path | None = None
    """Folder that relative image paths start from; each data file's own folder when absent."""
    image_column: str | None = None
    """Column of the image (a path, bytes, or a decoded image); found by name when absent."""
    caption_columns: tuple[str, ...] = ()
    """Columns of captions; a column may hold one caption or a list. Found by name when absent."""
    captions: Literal["random", "first", "longest"] = "random"
    """Which caption of an image a training step uses (`random` is seeded by image and epoch)."""
    limit: int | None = None
    """Use only the first N images."""
    max_bad_fraction: float = 0.01
    """Stop with an error when more than this share of the images is missing or corrupt."""
    max_pixels: int = 89_478_485
    """Images with more pixels than this in their header are skipped before decoding (Pillow's own limit)."""
    cache_images: bool = False
    """Keep decoded images in one file (H*W*3 bytes an image). For small data sets that are read many times."""


@dataclass(frozen=True)
class OptimConfig:
    """One training: optimiser, schedule, batch and loss. Defaults: a DMU stage of the paper."""

    learning_rate: float = 1e-5
    """Peak of the schedule (linear warm-up, then a cosine to zero). Raise it for a small or untrained model."""
    weight_decay: float = 0.2
    """AdamW's, on every tensor that is trained."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the gradient's mean and of its square."""
    epsilon: float = 1e-8
    """AdamW's, against division by zero. A CLIP from nothing has 1e-6 (OpenAI's)."""
    warmup_steps: int = 200
    """Linear warm-up; never more than a tenth of the training."""
    epochs: float = 1
    """Passes over the data; a fraction is allowed."""
    global_batch_size: int = 800
    """Images a step over ALL processes. All negatives of an image come from this batch."""
    label_smoothing: float = 0.1
    """0.1 in the official code; the paper does not mention it."""
    temperature: float = 0.01
    """Start value of 1 / exp(logit_scale)."""
    train_temperature: bool = False
    """Frozen in the paper's stages; trainable in a CLIP from scratch."""
    max_grad_norm: float | None = None
    """Clip the gradient to this norm; off in the paper."""
    loss: Literal["clip", "multi-positive", "long-short"] = "clip"
    """`clip`: one caption an image. `multi-positive` (CLIP-FMoE): the caption and its first sentence, both positives.
    `long-short` (Long-CLIP): the caption, and its first sentence against the image's principal components."""
    short_weight: float = 0.5
    """Weight of the first sentence under multi-positive (gamma); the caption has the rest. The paper gives no value."""
    principal_components: int = 32
    """Kept of the image feature for the first sentence under long-short (Long-CLIP's value)."""


_FROM_NOTHING = {
    "learning_rate": 2e-3,
    "weight_decay": 0.1,
    "betas": (0.9, 0.98),
    "epsilon": 1e-6,
    "warmup_steps": 30,
    "epochs": 10,
    "global_batch_size": 64,
    "label_smoothing": 0.0,
    "temperature": 0.07,
    "train_temperature": True,
    "max_grad_norm": 1.0,
}


@dataclass(frozen=True)
class BaseTraining:
    """One training of a base from nothing."""

    caption_columns: tuple[str, ...]
    optim: OptimConfig
    lock_text: bool = False
    """Whether the text tower stays as it is."""

    def trainable(self, name: str) -> bool:
        """Whether this parameter of a CLIP is."""
        return not (self.lock_text and name.startswith(("text_model.", "text_projection.")))


@dataclass(frozen=True)
class ScratchConfig:
    """A small CLIP to start from where there is no pretrained one (`--base.source scratch`)."""

    image_size: int = 80
    """Pixels of a side."""
    patch_size: int = 16
    """Pixels of a patch's side: 5 x 5 tokens."""
    vision_width: int = 128
    vision_layers: int = 4
    text_width: int = 128
    text_layers: int = 3
    head_width: int = 32
    """Width of an attention head; it divides both towers' widths."""
    projection_dim: int = 256
    """Dimensions of an embedding, which both towers share."""
    hidden_act: str = "gelu"
    """`gelu` has a fused kernel; `quick_gelu` is what OpenAI's weights want, and there are none here."""
    early_caption_columns: tuple[str, ...] = ()
    """Captions that the base is trained on first, in the same data; left out when empty. A real CLIP's attention comes
    from hundreds of millions of captions, a few of which name any detail; a small one's comes from these."""
    locked_text_epochs: float = 0
    """Epochs on the early captions before any other, in which the text tower stays as it was drawn. Its last token
    holds every word then; in training it soon drops those that the pictures do not show yet, and no gradient asks for
    them again. (LiT, Zhai et al. 2022, locks the image tower, which is trained there and the text tower is not.)"""
    early_optim: OptimConfig = field(default_factory=lambda: OptimConfig(**_FROM_NOTHING))
    """Training on the early captions."""
    caption_columns: tuple[str, ...] = ("short",)
    """Captions that the base is trained on, in the same data: the web's kind, which say little."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(**_FROM_NOTHING))

    @property
    def trainings(self) -> dict[str, BaseTraining]:
        """The base's trainings in order, by their names in metrics.jsonl."""
        found = {}
        if self.early_caption_columns and self.locked_text_epochs:
            locked = replace(self.early_optim, epochs=self.locked_text_epochs)
            found["base-locked"] = BaseTraining(self.early_caption_columns, locked, lock_text=True)
        if self.early_caption_columns:
            found["base-early"] = BaseTraining(self.early_caption_columns, self.early_optim)
        return found | {"base": BaseTraining(self.caption_columns, self.optim)}


@dataclass(frozen=True)
class BaseConfig:
    """The dense CLIP that everything starts from."""

    source: str = "openai/clip-vit-large-patch14-336"
    """A model directory, a hub id, an open_clip model name (with --base.checkpoint), or `scratch`."""
    checkpoint: Path | None = None
    """Weights for an open_clip model name (.safetensors or .pt)."""
    quick_gelu: bool | None = None
    """Override the activation of an open_clip model: OpenAI's weights want quick_gelu."""
    text_positions: int | None = 248
    """Stretch the text positions 77 -> 248 as in Long-CLIP; None keeps the base's own."""
    scratch: ScratchConfig = field(default_factory=ScratchConfig)


@dataclass(frozen=True)
class ClusterConfig:
    """k-means of a stage's embeddings. 3 x 3 combined clusters a stage, accumulated over the stages."""

    image_clusters: int = 3
    """Clusters of the image embeddings; an image's combined cluster is the pair of both."""
    text_clusters: int = 3
    """Clusters of the captions' embeddings."""
    batch_size: int = 16_384
    """Rows of one mini-batch of k-means."""
    n_init: int = 3
    """Random starts of which the best is kept."""


@dataclass(frozen=True)
class MCLConfig:
    """Multistage contrastive learning: the stages that make the experts."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    start_from: Literal["base", "previous"] = "base"
    """The FFNs a stage starts from."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank stages (method `dmu-lora`): every matrix of an FFN becomes W + (alpha / rank) B A, of which B A is
    trained."""

    rank: int = 64
    """A sixteenth of ViT-L's width, which held 85% of a small CLIP's full change (squared norm); an eighth held 93%."""
    alpha: float | None = None
    """The change is scaled by alpha / rank; the rank itself when absent, so that another rank keeps the scale of 1."""
    dropout: float = 0.0
    """Of what goes into A; off, as everywhere in the stages."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"--lora.rank is {self.rank}; it must be at least 1 (full-rank stages: method dmu).")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"--lora.alpha is {self.alpha}; it must be above 0 (leave it out for a scale of 1).")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--lora.dropout is {self.dropout}; it must be at least 0 and below 1.")

    @property
    def effective_alpha(self) -> float:
        return self.rank if self.alpha is None else self.alpha


@dataclass(frozen=True)
class MoEConfig:
    """The mixture and the training of its routers."""

    num_experts: int = 4
    """Experts of a block: the base's FFN and those of num_experts - 1 stages."""
    num_experts_per_tok: int = 2
    """Experts that each token passes through (K). Fewer are faster; 1 leaves the router nothing to weigh."""
    vision_layers: tuple[int, ...] | None = None
    """Blocks of the vision tower that get experts; all when absent."""
    text_layers: tuple[int, ...] | None = None
    """Blocks of the text tower that get experts; all when absent."""
    router_aux_loss_coef: float = 0.01
    """Weight of the load-balance loss. Raise it where a few experts take most tokens (the report's Routing)."""
    router_z_loss_coef: float = 0.0
    """Weight of the loss that keeps router logits small; ST-MoE has 1e-3. For a router training that is unstable."""
    router_jitter_noise: float = 0.0
    """In training, router inputs are multiplied by random numbers within 1 ± this; Switch has 0.01, 0 is off."""
    router_init: Literal["random", "centroids"] = "random"
    """What a router's rows start from. `centroids` (after Cluster-aware Upcycling): the mean tokens of the experts' own
    clusters (methods/centroids.py), in dmu, dmu-lora and fmoe; the mixture under random routers is measured too."""
    router_initializer_range: float = 0.018
    """Standard deviation of a fresh router's weights; a smaller one weighs the experts more evenly at the start."""
    expert_dropout: float = 0.0
    """Dropout in the experts while the routers train: 0.1 in the official code, not in the paper."""
    caption_columns: tuple[str, ...] = ()
    """Captions of the router training; the stages' when empty. Short captions among them let the routers keep what the
    base knows."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=1e-6, weight_decay=0.01))
    """Router training. At the paper's 1e-6 a router hardly moves; the report shows how far it did."""


@dataclass(frozen=True)
class FMoEConfig:
    """CLIP-FMoE's experts: one a cluster (`moe.num_experts` clusters), each trained beside the frozen base."""

    sub_clusters: int = 64
    """Sub-clusters of a cluster; a batch comes from one of them (ICCL)."""
    gate_init: float = 0.5
    """The gate's value at the start: the base's share of a block's output. The public sources do not say it."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(loss="multi-positive"))
    """Training of an expert and its gate. The public sources do not say the learning rate: CLIP-MoE's."""


@dataclass(frozen=True)
class FinetuneConfig:
    """The baselines without stages: direct fine-tuning, Long-CLIP, sparse upcycling."""

    parts: Literal["ffn", "all"] = "ffn"
    """What is trainable: the FFNs (sparse upcycling: experts and routers), or every tensor. `all` costs more memory."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Fine-tuning of a dense CLIP. Sparse upcycling trains by --moe.optim."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured at the end of a run, on data that training never saw."""

    retrieval: tuple[str, ...] = ()
    """Data sets, each `NAME=SOURCE`, `NAME=SOURCE:SPLIT` or just a source (see --data.source)."""
    attributes: Path | str | None = None
    """A folder in MMVP-VLM's layout, or `openmoji`."""
    zero_shot: tuple[str, ...] = ()
    """Classification, each `NAME=FOLDER`: NAME is a preset of `evaluate ... zero-shot` (imagenet, imagenet-v2, cifar10,
    food101, ...), or any name for a folder with one subfolder of images a class. `openmoji-nouns`, `openmoji-colours`:
    held-out scenes into what they show."""
    composition: tuple[str, ...] = ()
    """Captions that differ little: sugarcrepe=FOLDER and winoground=FOLDER."""
    routing_images: int = 256
    """Images over which the routing share is measured."""
    batch_size: int = 128
    """Images, or captions, that pass through a model at once. Lower it where memory runs out."""


@dataclass(frozen=True)
class EngineConfig:
    """How it runs: precision, memory, workers, checkpoints. Changes nothing of what is computed but rounding."""

    device: Literal["auto", "cpu"] = "auto"
    """`auto`: the GPU where there is one (one a process under torchrun). `cpu`: never a GPU."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 autocast over fp32 weights, or fp32 throughout."""
    chunk_size: ChunkSize = "auto"
    """Images a process holds a graph for at once. Smaller than its share of the batch: gradient caching, the same
    gradients at a fraction of the memory. None: the share in one piece. auto: on a GPU the most that fits, measured
    before a training's first step; without a GPU one piece, or 10 where the share is more than 128 images. A resumed
    run keeps its chunk unless another one is given."""
    activation_checkpointing: bool = False
    """Compute each block again in the backward pass: less memory, more time. For where small chunks do not fit."""
    workers: int = 4
    """Processes that decode images and make tokens; 0 does it in the trainer itself."""
    checkpoint_every: int = 200
    """Steps between two checkpoints."""
    log_every: int = 10
    """Steps between two that are logged, in metrics.jsonl and in the trackers."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also send the metrics there; the package must be installed."""

    def __post_init__(self) -> None:
        if isinstance(self.chunk_size, int) and self.chunk_size < 1:
            raise ValueError(
                f"--engine.chunk-size is {self.chunk_size}; it must be at least 1 image (None: the batch in one piece, "
                "auto: the most that fits the GPU)."
            )


@dataclass(frozen=True)
class TrainConfig:
    """A whole run, from a base CLIP to the method's result."""

    method: str = "dmu"
    """How the result is made: base, dmu, dmu-lora, fmoe, vanilla-moe, sparse-upcycling or finetune. A recipe sets it
    together with what it needs."""
    data: DataConfig = field(default_factory=DataConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    clusters: ClusterConfig = field(default_factory=ClusterConfig)
    mcl: MCLConfig = field(default_factory=MCLConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    fmoe: FMoEConfig = field(default_factory=FMoEConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    seed: int = 0
    """Of all random draws (weights, batches, captions, clusters). Other seeds tell chance from effect."""
    output_dir: Path | None = None
    """Where the run is kept: runs/NAME. The same command again resumes it."""

    def __post_init__(self) -> None:
        e, k = self.moe.num_experts, self.moe.num_experts_per_tok
        if e < 2:
            raise ValueError(f"--moe.num-experts is {e}; a mixture needs at least 2 (the base and one stage).")
        if not 1 <= k <= e:
            raise ValueError(
                f"--moe.num-experts-per-tok is {k}, but there are {e} experts: a token cannot use more experts than "
                "there are. Lower it, or raise --moe.num-experts."
            )
        for name in ("mcl", "moe", "finetune", "fmoe"):
            optim = getattr(self, name).optim
            if optim.global_batch_size < 2:
                raise ValueError(f"--{name}.optim.global-batch-size must be at least 2: contrast needs a negative.")
            if not 0 < optim.short_weight < 1:
                raise ValueError(f"--{name}.optim.short-weight must lie between 0 and 1, got {optim.short_weight}.")
