"""One training step: both towers, the loss over the global batch, and its gradients, in one piece or in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.losses_clipmoe import (
    RouterCounts,
    block_logits,
    end_of_text,
    kept_tokens,
    router_counts,
    router_losses,
    weighted,
)

from ..data.dataset import Batch
from ..data.decode import normalise
from .losses import Contrastive


class TwoTowers(nn.Module):
    """What a step runs and what DDP wraps: pixels and tokens in, everything the loss needs out."""

    def __init__(self, bundle: ClipBundle):
        super().__init__()
        self.clip = bundle.model
        self.mean, self.std = bundle.image_mean, bundle.image_std

    def forward(self, pixels: torch.Tensor, captions: Sequence[torch.Tensor], kept: Sequence[torch.Tensor]):
        """uint8 [b,3,R,R], ids [b,T] of each caption, and `kept_tokens` of each -> image features [b,P], a list of text
        features [b,P] (all L2-normalised, fp32), exp(logit_scale), router logits of every block ([tokens,E], text
        padding removed)."""
        clip = self.clip
        vision = clip.vision_model(
            normalise(pixels, self.mean, self.std), pooled_only=_needs_pooled(clip.config.vision_config)
        )
        texts = [clip.text_model(ids, pooled_only=_needs_pooled(clip.config.text_config)) for ids in captions]
        image_features = nn.functional.normalize(clip.visual_projection(vision.pooler_output).float(), dim=-1)
        projected = [clip.text_projection(text.pooler_output).float() for text in texts]
        text_features = [nn.functional.normalize(features, dim=-1) for features in projected]
        blocks = block_logits(vision.router_logits, [text.router_logits for text in texts], kept)
        return image_features, text_features, clip.logit_scale.float().exp(), blocks


def _needs_pooled(tower: Any) -> bool:
    """True where only the pooled tokens of the last block are read; router losses read all tokens of their blocks."""
    return tower.num_hidden_layers - 1 not in tower.moe_layers


def forward_backward(
    towers: nn.Module,
    batch: Batch,
    objective: Contrastive,
    accelerator: Accelerator,
    chunk_size: int | None,
    seed: tuple[int, int],
) -> dict[str, torch.Tensor]:
    """Gradients of the loss over the GLOBAL batch into the trainable parameters -> the parts of the loss (detached).

    With a chunk smaller than this process's share: gradient caching (Gao et al. 2021, "Scaling deep contrastive
    learning batch size under memory limited setup"), features without a graph, then one chunk at a time with a graph.
    The same gradients as the plain step.
    """
    size = chunk_size or len(batch.pixel_values)
    config = accelerator.unwrap_model(towers).clip.config
    split = zip(*(whole.split(size) for whole in (batch.pixel_values, *batch.texts)), strict=True)
    eos, device = config.text_config.eos_token_id, accelerator.device
    chunks = [_on_device(pixels, captions, eos, device) for pixels, *captions in split]
    step = _plain_step if len(chunks) == 1 else _cached_step
    parts = step(towers, chunks, objective, accelerator, config, seed)
    total = parts["contrastive"]
    if "balance" in parts:
        total = total + config.router_aux_loss_coef * parts["balance"] + config.router_z_loss_coef * parts["router_z"]
    return {"loss": total, **parts}


Chunk = tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]
"""What `TwoTowers` takes: pixels, ids of each caption, and which of their tokens are no padding."""


def _on_device(pixels: torch.Tensor, captions: list[torch.Tensor], eos_token_id: int, device: torch.device) -> Chunk:
    """Lengths are computed here, where the ids are on the CPU: on a GPU, Python would have to wait for them."""
    # Ids up to the end of the longest caption: padding comes after the pooled token, and the mask is causal.
    captions = [ids[:, : int(end_of_text(ids, eos_token_id).max()) + 1] for ids in captions]
    kept = [kept_tokens(ids, eos_token_id) for ids in captions]
    pixels, *others = (part.to(device, non_blocking=True) for part in (pixels, *captions, *kept))
    return pixels, others[: len(captions)], others[len(captions) :]


def _plain_step(towers, chunks: list[Chunk], objective, accelerator, config, seed) -> dict[str, torch.Tensor]:
    _seed_step(seed, accelerator.process_index, chunk=0)
    image, texts, scale, blocks = towers(*chunks[0])
    clip_loss = objective(image, texts, scale)
    parts, router_part = {"contrastive": clip_loss.detach()}, 0.0
    if blocks:
        counts = _over_processes(router_counts(blocks), accelerator)
        router_part, values = _router_part(blocks, counts, config, accelerator)
        parts |= values
    accelerator.backward(clip_loss + router_part)
    return parts


def _cached_step(towers, chunks: list[Chunk], objective, accelerator, config, seed) -> dict[str, torch.Tensor]:
    features, counts = [], None
    with torch.no_grad():
        for i, chunk in enumerate(chunks):
            _seed_step(seed, accelerator.process_index, i)
            image, texts, scale, blocks = towers(*chunk)
            features.append((image, *texts))
            if blocks:
                counted = router_counts(blocks)
                counts = counted if counts is None else counts + counted
    image, *texts = (torch.cat(parts).requires_grad_() for parts in zip(*features, strict=True))
    scale = scale.detach().requires_grad_()
    clip_loss = objective(image, texts, scale)
    clip_loss.backward()
    parts = {"contrastive": clip_loss.detach()}
    if counts is not None:
        counts = _over_processes(counts, accelerator)

    sizes = [len(pixels) for pixels, *_ in chunks]
    gradients = zip(*(part.grad.split(sizes) for part in (image, *texts)), strict=True)
    for i, (chunk, wanted) in enumerate(zip(chunks, gradients, strict=True)):
        last = i + 1 == len(sizes)
        # DDP averages the gradient over processes once, with the last chunk.
        with nullcontext() if last else accelerator.no_sync(towers):
            _seed_step(seed, accelerator.process_index, i)  # the same dropout as without the graph
            image_i, texts_i, scale_i, blocks = towers(*chunk)
            surrogate = sum((part * grad).sum() for part, grad in zip((image_i, *texts_i), wanted, strict=True))
            surrogate = surrogate + (scale_i * scale.grad if last else scale_i * 0)
            if blocks:
                router_part, values = _router_part(blocks, counts, config, accelerator)
                surrogate = surrogate + router_part
                parts |= {name: parts.get(name, 0) + value for name, value in values.items()}
            accelerator.backward(surrogate)
    return parts


def _over_processes(counts: RouterCounts, accelerator: Accelerator) -> RouterCounts:
    """Counts summed over the processes that share this training (`Alone` is one process)."""
    if accelerator.num_processes > 1:
        dist.all_reduce(counts.first_choices)
        dist.all_reduce(counts.tokens)
    return counts


def _router_part(blocks, counts: RouterCounts, config, accelerator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This chunk's router loss with its gradient, and its values. Parts add up over processes, whereas DDP averages:
    hence the factor of the world size."""
    balance, z = router_losses(blocks, counts)
    world = accelerator.num_processes
    return weighted(balance, z, config) * world, {"balance": balance.detach() * world, "router_z": z.detach() * world}


def _seed_step(seed: tuple[int, int], rank: int, chunk: int) -> None:
    """Everything random in a forward pass depends on (run, step, process, chunk): no random state to save."""
    torch.manual_seed(int(np.random.SeedSequence([*seed, rank, chunk]).generate_state(1)[0]))
