"""Floating-point operations of a run, counted from its config: what each training's forward and backward multiply.

Per image-text pair, in multiply-accumulates (a FLOP count is twice that), for every matrix product with weights W:

    forward                                             1 x  tokens * in * out
    backward, the gradient of its input                 1 x  where anything below it learns
    backward, the gradient of W                         1 x  where W learns

and for attention's two products of activations 1 x forward and 2 x backward where queries, keys or values need one. So
a frozen block above one that learns costs 2 x its forward, one that learns 3 x, and a block below which nothing learns
1 x. Gradient caching (a chunk smaller than the batch) runs the forward once more, activation checkpointing too.
A token passes through K of E experts, and through the base's FFN and the gate where there is one.

Not counted: norms, activations, softmax, the loss's B x B similarities, the optimiser, k-means, decoding, attention's
recomputation in a fused backward. Captions count at the length to which their batch is padded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig
from llava_clipmoe.upcycling import is_expert_or_gate, is_ffn, is_router_or_gate, moe_config

from .config import DataConfig
from .data.formats import open_source
from .data.pairs import first_sentence
from .features.encode import tokenise
from .training.losses import make_objective

Learns = Callable[[str], bool]
"""Whether a parameter learns, by its name."""


@dataclass(frozen=True)
class Training:
    """One training of a run: the model that it runs, what learns of it, and its settings."""

    model: CLIPMoEConfig
    learns: Learns
    optim: Any
    rank: int = 0
    """Of low-rank deltas on what learns, where these learn in its place."""


@dataclass(frozen=True)
class CaptionTokens:
    """Tokens of a caption: padded with its batch, its first sentence padded with its batch, and by itself."""

    padded: float
    short: float
    alone: float
    measured: bool = True
    """False: the data could not be read, and all three are the length of the text tower's context."""


# ------------------------------------------------------------------------------------------------------ one pair


class _Count:
    """Adds up the products of one tower, from the bottom to the top."""

    def __init__(self, learns: Learns, rank: int):
        self.learns, self.rank = learns, rank
        self.forward = self.backward = 0.0

    def product(self, name: str, tokens: float, inputs: int, outputs: int, below: bool, times: int = 1) -> bool:
        """x W^T with the weight `name`; below: whether x needs a gradient -> whether the output does."""
        macs, learns = times * tokens * inputs * outputs, self.learns(name)
        self.forward += macs
        if learns and self.rank:  # x (W + B A)^T with W frozen
            delta = times * tokens * self.rank * (inputs + outputs)
            self.forward += delta
            # The gradients of A and B and of what lies between them; that of x only where it is wanted.
            self.backward += below * macs + 2 * delta - (not below) * times * tokens * self.rank * inputs
        else:
            self.backward += (below + learns) * macs
        return below or learns

    def attention(self, queries: float, tokens: float, width: int, below: bool) -> None:
        macs = 2 * queries * tokens * width
        self.forward += macs
        self.backward += 2 * below * macs


def tower_macs(
    config: CLIPMoEConfig, tower: str, tokens: float, learns: Learns = lambda name: False, rank: int = 0,
    pooled_only: bool = False,
) -> tuple[float, float]:  # fmt: skip
    """(forward, backward) multiply-accumulates of `vision_model` or `text_model` with its projection, for one sequence
    of `tokens`. pooled_only: the last block makes one token, of keys and values of all."""
    t = config.vision_config if tower == "vision_model" else config.text_config
    d, h, count = t.hidden_size, t.intermediate_size, _Count(learns, rank)
    if tower == "vision_model":
        patch = t.num_channels * t.patch_size**2
        below = count.product(f"{tower}.embeddings.patch_embedding.weight", t.num_patches, patch, d, False)
    else:
        below = learns(f"{tower}.embeddings.token_embedding.weight")
    for layer in range(t.num_hidden_layers):
        block = f"{tower}.encoder.layers.{layer}"
        made = 1 if pooled_only and layer == t.num_hidden_layers - 1 else tokens
        qkv = [
            count.product(f"{block}.self_attn.{x}_proj.weight", made if x == "q" else tokens, d, d, below)
            for x in "qkv"
        ]
        count.attention(made, tokens, d, any(qkv))
        below = count.product(f"{block}.self_attn.out_proj.weight", made, d, d, any(qkv))
        parts = [("mlp", 1)]
        above = [below]
        if layer in t.moe_layers:
            parts = [("mlp.experts", t.num_experts_per_tok), *([("mlp.base", 1)] if t.fusion_gate else [])]
            above.append(count.product(f"{block}.mlp.router.weight", made, d, t.num_experts, below))
            if t.fusion_gate:
                above.append(count.product(f"{block}.mlp.fusion_gate.weight", made, d, d, below))
        for part, times in parts:
            hidden = count.product(f"{block}.{part}.fc1.weight", made, d, h, below, times)
            above.append(count.product(f"{block}.{part}.fc2.weight", made, h, d, hidden, times))
        below = any(above)
    projection = "visual_projection" if tower == "vision_model" else "text_projection"
    count.product(f"{projection}.weight", 1, d, config.projection_dim, below)
    return count.forward, count.backward


def pair_macs(
    training: Training, captions: Mapping[str, float] | list[float], features: bool = False
) -> tuple[float, float]:
    """(forward, backward) of one image and its captions, of these lengths, in one step of `training`; features: only
    embeddings are wanted, no router losses."""

    def one(tower: str, tokens: float) -> tuple[float, float]:
        t = model.vision_config if tower == "vision_model" else model.text_config
        pooled_only = features or t.num_hidden_layers - 1 not in t.moe_layers
        return tower_macs(model, tower, tokens, training.learns, training.rank, pooled_only)

    model = training.model
    each = [one("vision_model", model.vision_config.num_patches + 1), *(one("text_model", n) for n in captions)]
    return sum(forward for forward, _ in each), sum(backward for _, backward in each)


def vision_macs(config: CLIPMoEConfig) -> int:
    """Multiply-accumulates of the vision tower for one image, as LLaVA would run it whole: no projection.

    Of a block of delta experts every token passes the base once, all experts' first factors (one product for all is
    cheaper than gathering) and the other factors of its own K.
    """
    t = config.vision_config
    total = tower_macs(config, "vision_model", t.num_patches + 1)[0] - t.hidden_size * config.projection_dim
    d, h, e, k = t.hidden_size, t.intermediate_size, t.num_experts, t.num_experts_per_tok
    for rank1, rank2 in t.delta_ranks or ():
        differences = e * d * rank1 + k * (rank1 * h + rank2 * (h + d))
        total += (t.num_patches + 1) * (differences - (k - 1) * 2 * d * h)
    return round(total)


# ------------------------------------------------------------------------------------------------------ a whole run


def trainings(config: SimpleNamespace, base: CLIPMoEConfig, result: CLIPMoEConfig) -> dict[str, Training]:
    """The trainings of a run after its base, by the names that metrics.jsonl gives them.

    config: a run's config.json as nested namespaces. Raises ValueError for a method that is not known here.
    """
    last = {"router": Training(result, is_router_or_gate, config.moe.optim)}
    stages = [f"stage{number}" for number in range(1, config.moe.num_experts)]
    if config.method in ("dmu", "vanilla-moe", "dmu-lora"):
        rank = config.lora.rank if config.method == "dmu-lora" else 0
        mine = _ffns_of(result)
        return {name: Training(base, mine, config.mcl.optim, rank) for name in stages} | last
    if config.method == "fmoe":
        blocks = {"vision_model": result.vision_config.moe_layers, "text_model": result.text_config.moe_layers}
        beside = moe_config(base, blocks, num_experts=1, num_experts_per_tok=1, fusion_gate=True)
        experts = [f"expert{number}" for number in range(config.moe.num_experts)]
        return {name: Training(beside, is_expert_or_gate, config.fmoe.optim) for name in experts} | last
    everything = config.finetune.parts == "all"
    if config.method == "sparse-upcycling":
        learns = lambda name: everything or ".mlp.router." in name or ".mlp.experts." in name  # noqa: E731
        return {"router": Training(result, learns, config.moe.optim)}
    if config.method == "finetune":
        learns = (lambda name: True) if everything else is_ffn
        return {"finetune": Training(base, learns, config.finetune.optim)}
    if config.method == "base":
        return {}
    raise ValueError(f"the operations of the method {config.method!r} are not counted here.")


def _ffns_of(result: CLIPMoEConfig) -> Learns:
    """The dense FFNs of the blocks that have experts in `result`."""
    towers = {"vision_model": result.vision_config, "text_model": result.text_config}
    blocks = {f"{tower}.encoder.layers.{i}." for tower, t in towers.items() for i in t.moe_layers}
    return lambda name: is_ffn(name) and any(name.startswith(block) for block in blocks)


def run_flops(
    config: SimpleNamespace, base: CLIPMoEConfig, result: CLIPMoEConfig, steps: Mapping[str, int],
    encoded: int, encoded_captions: int, tokens: CaptionTokens, chunks: Mapping[str, int | None] | None = None,
) -> float:  # fmt: skip
    """Floating-point operations of everything after the base.

    steps: of each training, by its name. encoded: images whose features were computed; encoded_captions: captions.
    chunks: the chunk that each training ran in (None: one piece), where the run says so; else the settings' number.
    """
    frozen = Training(base, lambda name: False, None)
    picture, pair = (pair_macs(frozen, captions, features=True)[0] for captions in ([], [tokens.alone]))
    total = encoded * picture + encoded_captions * (pair - picture)
    found = trainings(config, base, result)
    for name, done in steps.items():
        training = found[name]
        batch = training.optim.global_batch_size
        captions = [tokens.padded, tokens.short][: make_objective(training.optim).captions]
        forward, backward = pair_macs(training, captions)
        chunk = (chunks or {}).get(name, config.engine.chunk_size)
        again = (isinstance(chunk, int) and chunk < batch) + config.engine.activation_checkpointing
        total += done * batch * ((1 + again) * forward + backward)
    return 2 * total


def caption_tokens(data: Mapping[str, Any], tokenizer: Any, context: int, batch: int, draws: int = 20) -> CaptionTokens:
    """Lengths of the captions of a run's data, from `draws` random batches; the context's length where the data is not
    there any more. data: `config.json`'s part."""
    names = {field.name for field in dataclasses.fields(DataConfig)}
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items() if name in names}
    if known.get("image_root"):
        known["image_root"] = Path(known["image_root"])
    try:
        source = open_source(DataConfig(**known))
    except (OSError, ValueError):
        return CaptionTokens(context, context, context, measured=False)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        rows = rng.choice(len(source), min(batch, len(source)), replace=False)
        texts = [rng.choice(source.captions(int(row))) for row in rows]
        long, short = (tokenise(tokenizer, list(map(str, part)), context)[1].numpy() for part in
                       (texts, map(first_sentence, map(str, texts))))  # fmt: skip
        found.append((long.max(), short.max(), long.mean()))
    return CaptionTokens(*np.mean(found, axis=0).tolist())
