"""Floating-point operations of a run, as torch counts them: each training's towers are built without weights (fake
tensors) and run once, forward and backward.

Attention counts as matrix products. A token passes through K of E experts, whichever, and through the base's FFN and
the gate where there is one. Gradient caching (a chunk smaller than the batch) runs the forward once more, activation
checkpointing too. Captions count at the length to which their batch is padded.

Not counted: norms, activations, softmax, the loss's B x B similarities, the optimiser, k-means, decoding, attention's
recomputation in a fused backward. A multiply-accumulate is two operations.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig, CLIPMoEVisionConfig
from llava_clipmoe.experts_clipmoe import Experts
from llava_clipmoe.modeling_clipmoe import CLIPMoEModel, CLIPMoEVisionModel

from ..config import DataConfig, EngineConfig, OptimConfig
from ..data.formats import open_source
from ..data.pairs import first_sentence
from ..features.encode import tokenise
from ..methods.base import Training
from ..training.losses import make_objective

_ATTENTION = threading.Lock()

Macs = tuple[float, float]
"""Multiply-accumulates: (forward, backward)."""


@dataclass(frozen=True)
class CaptionTokens:
    """Tokens of a caption: padded with its batch, its first sentence padded with its batch, and by itself."""

    padded: float
    short: float
    alone: float
    measured: bool = True
    """False: the data could not be read, and all three are the length of the text tower's context."""


# ------------------------------------------------------------------------------------------------------------ one pair


def pair_macs(training: Training, captions: Sequence[float], features: bool = False) -> Macs:
    """One image and its captions, of these lengths, in one step of `training`. features: only embeddings are wanted, no
    router losses, so that the last block makes one token whatever it is."""
    config, rank = training.model, training.lora.rank if training.lora else 0
    given = config.to_json_string(use_diff=False)
    trainable = frozenset(filter(training.trainable, _parameter_names(given)))

    def one(tower: str, settings: Any, tokens: int) -> np.ndarray:
        pooled_only = features or settings.num_hidden_layers - 1 not in settings.moe_layers
        return np.array(_tower_macs(given, tower, tokens, trainable, rank, pooled_only))

    def text(tokens: float) -> np.ndarray:
        """Products are linear in the tokens and attention's are square: three lengths tell every mean length's."""
        longest = config.text_config.max_position_embeddings
        lengths = [1, longest // 2, longest]
        return np.polyval(np.polyfit(lengths, [one("text_model", config.text_config, n) for n in lengths], 2), tokens)

    total = one("vision_model", config.vision_config, 0)
    for tokens in captions:
        total = total + text(tokens)
    return float(total[0]), float(total[1])


def vision_macs(config: CLIPMoEVisionConfig) -> int:
    """Multiply-accumulates of the vision tower for one image, as LLaVA would run it whole.

    Of a block of delta experts every token passes the base once, all experts' first factors (one product for all is
    cheaper than gathering) and the other factors of its own K.
    """
    whole = copy.deepcopy(config)
    whole.delta_ranks = None
    total = _vision_macs(whole.to_json_string(use_diff=False))
    d, h, e, k = config.hidden_size, config.intermediate_size, config.num_experts, config.num_experts_per_tok
    for rank1, rank2 in config.delta_ranks or ():
        differences = e * d * rank1 + k * (rank1 * h + rank2 * (h + d))
        total += (config.num_patches + 1) * (differences - (k - 1) * 2 * d * h)
    return total


@functools.cache
def _tower_macs(given: str, tower: str, tokens: int, trainable: frozenset[str], rank: int, pooled_only: bool) -> Macs:
    """Of `vision_model`, or of `text_model` on one caption of `tokens`, with its projection. given: the config's JSON.
    rank: of low-rank changes in the place of what is trainable; 0: there are none."""
    config = CLIPMoEConfig(**json.loads(given))
    with _counting() as counter:
        model = _without_routing(CLIPMoEModel(config))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable and not rank)
            if rank and name in trainable and name.endswith(".weight"):
                _add_low_rank(model.get_submodule(name.removesuffix(".weight")), rank)
        if tower == "vision_model":
            pooled = model.vision_model(_image(config.vision_config), pooled_only=pooled_only).pooler_output
            embedding = model.visual_projection(pooled)
        else:
            ids = torch.zeros(1, tokens, dtype=torch.int64)
            embedding = model.text_projection(model.text_model(ids, pooled_only=pooled_only).pooler_output)
        forward = counter.get_total_flops()
        if embedding.requires_grad:
            embedding.sum().backward()
        return forward / 2, (counter.get_total_flops() - forward) / 2


@functools.cache
def _vision_macs(given: str) -> int:
    config = CLIPMoEVisionConfig(**json.loads(given))
    with _counting() as counter, torch.no_grad():
        _without_routing(CLIPMoEVisionModel(config))(_image(config))
        return counter.get_total_flops() // 2


@functools.cache
def _parameter_names(given: str) -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in CLIPMoEModel(CLIPMoEConfig(**json.loads(given))).named_parameters()]


@contextlib.contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    """Fake tensors and not the meta device, which the router's switch of autocast does not know.

    One thread at a time: which attention is used is a setting of the whole process, and of two threads that change and
    restore it the second would leave it changed.
    """
    with _ATTENTION, FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def _image(config: CLIPMoEVisionConfig) -> torch.Tensor:
    return torch.zeros(1, config.num_channels, config.image_size, config.image_size)


def _add_low_rank(linear: nn.Linear, rank: int) -> None:
    """W x + B A x, of which A and B are trainable: what peft's layer computes, which fake tensors cannot build."""
    a = torch.zeros(rank, linear.in_features, requires_grad=True)
    b = torch.zeros(linear.out_features, rank, requires_grad=True)
    linear.register_forward_hook(lambda _, inputs, output: output + F.linear(F.linear(inputs[0], a), b))


def _without_routing(model: nn.Module) -> nn.Module:
    """Every token goes to the first K experts: fake tensors cannot be routed, and which experts does not matter."""

    def forward(experts: Experts, x_ND: torch.Tensor, weights_NK: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return sum(weight_N[:, None] * experts.single(x_ND, k) for k, weight_N in enumerate(weights_NK.unbind(1)))

    for module in model.modules():
        if isinstance(module, Experts):
            module.forward = functools.partial(forward, module)
    return model


# --------------------------------------------------------------------------------------------------------- a whole run


def run_flops(
    trainings: Mapping[str, Training],
    engine: EngineConfig,
    base: CLIPMoEConfig,
    steps: Mapping[str, int],
    encoded: int,
    encoded_captions: int,
    tokens: CaptionTokens,
    chunks: Mapping[str, int | None] | None = None,
) -> float:
    """Floating-point operations of everything after the base.

    steps: of each training, by its name. encoded: images whose features were computed; encoded_captions: captions.
    chunks: the chunk that each training ran in (None: one piece), where the run says so; else the settings' number.
    """
    frozen = Training(base, lambda name: False, OptimConfig())
    picture, pair = (pair_macs(frozen, captions, features=True)[0] for captions in ([], [tokens.alone]))
    total = encoded * picture + encoded_captions * (pair - picture)
    for name, done in steps.items():
        training = trainings[name]
        batch = training.optim.global_batch_size
        captions = [tokens.padded, tokens.short][: make_objective(training.optim).captions]
        forward, backward = pair_macs(training, captions)
        chunk = (chunks or {}).get(name, engine.chunk_size)
        again = (isinstance(chunk, int) and chunk < batch) + engine.activation_checkpointing
        total += done * batch * ((1 + again) * forward + backward)
    return 2 * total


def caption_tokens(data: Mapping[str, Any], tokenizer: Any, context: int, batch: int, draws: int = 20) -> CaptionTokens:
    """Lengths of the captions of a run's data, from `draws` random batches; the context's length where the data is not
    there any more. data: `config.json`'s part."""
    names = {field.name for field in dataclasses.fields(DataConfig)}
    known = {name: value for name, value in data.items() if name in names}
    known["caption_columns"] = tuple(known.get("caption_columns", ()))
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
        texts = [str(rng.choice(source.captions(int(row)))) for row in rows]
        long = tokenise(tokenizer, texts, context)[1].numpy()
        short = tokenise(tokenizer, [first_sentence(text) for text in texts], context)[1].numpy()
        found.append((long.max(), short.max(), long.mean()))
    return CaptionTokens(*np.mean(found, axis=0).tolist())
