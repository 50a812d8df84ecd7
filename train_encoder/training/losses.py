"""The losses of a step, split so that they are exact when a batch is spread over processes and chunks.

L = L_CLIP + alpha * mean over blocks of L_balance (CLIP-MoE paper, eq. 6-10).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from llava_clipmoe.common_clipmoe import count_experts
from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig
from llava_clipmoe.losses_clipmoe import text_token_mask

from ..config import OptimConfig


class SmoothedClipLoss(ClipLoss):
    """open_clip's symmetric contrastive loss (local loss over the gathered global batch, gradient included) with
    label smoothing, which the official CLIP-MoE code uses and open_clip does not have."""

    def __init__(self, label_smoothing: float, rank: int = 0, world_size: int = 1):
        super().__init__(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
        self.label_smoothing = label_smoothing

    def forward(self, image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor):
        """image, text [b,P] L2-normalised features of this process -> scalar, in fp32."""
        with torch.autocast(image_features.device.type, enabled=False):
            per_image, per_text = self.get_logits(image_features.float(), text_features.float(), logit_scale.float())
            truth = self.get_ground_truth(per_image.device, per_image.shape[0])
            image_loss = F.cross_entropy(per_image, truth, label_smoothing=self.label_smoothing)
            return (image_loss + F.cross_entropy(per_text, truth, label_smoothing=self.label_smoothing)) / 2


class Contrastive:
    """CLIP's own objective: every image against one caption each (CLIP-MoE paper, eq. 1)."""

    captions = 1
    """Captions of an image that a step needs: 1, or 2 for the long one and its first sentence."""

    def __init__(self, label_smoothing: float, rank: int = 0, world_size: int = 1):
        self.pair = SmoothedClipLoss(label_smoothing, rank, world_size)

    def __call__(self, image: torch.Tensor, texts: Sequence[torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
        """image [b,P] and, for each caption, text [b,P], L2-normalised features of this process -> scalar."""
        return self.pair(image, texts[0], scale)


class MultiPositive(Contrastive):
    """Both captions are positives: sum over c of gamma_c [InfoNCE(I,T^c) + InfoNCE(T^c,I)] / 2  (CLIP-FMoE).

    gamma: (long caption, first sentence), sum 1.
    """

    captions = 2

    def __init__(self, short_weight: float, *pair: Any):
        super().__init__(*pair)
        self.gamma = (1 - short_weight, short_weight)

    def __call__(self, image: torch.Tensor, texts: Sequence[torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
        return sum(gamma * self.pair(image, text, scale) for gamma, text in zip(self.gamma, texts, strict=True))


class LongShort(Contrastive):
    """Long-CLIP (Zhang et al. 2024): the long caption against the image feature, plus the short one against what is
    left of that feature in the batch's `components` principal components. Official code: both with weight 1.

    The components are those of the global batch (the official code takes each GPU's own), and a constant for the
    gradient: where two of their variances are nearly equal, that of the eigenvectors has no bound.
    """

    captions = 2

    def __init__(self, components: int, *pair: Any):
        super().__init__(*pair)
        self.components = components

    def __call__(self, image: torch.Tensor, texts: Sequence[torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
        long, short = texts
        return self.pair(image, long, scale) + self.pair(self.coarse(image), short, scale)

    def coarse(self, image: torch.Tensor) -> torch.Tensor:
        """Features [b,P] -> the same with only the principal components kept, not normalised again."""
        image = image.float()
        mean, basis = principal_components(gather_all(image.detach()), self.components)
        return mean + (image - mean) @ basis @ basis.T


def principal_components(x: torch.Tensor, components: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points [B,P] -> their mean [P] and an orthonormal basis [P,k] of their k = min(components, B, P) directions of
    largest variance."""
    mean = x.mean(0)
    _, _, directions = torch.linalg.svd(x - mean, full_matrices=False)
    return mean, directions[:components].T


def gather_all(x: torch.Tensor) -> torch.Tensor:
    """[b,P] of every process -> [B,P], in the order of the ranks, without gradient."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def make_objective(optim: OptimConfig, rank: int = 0, world_size: int = 1) -> Contrastive:
    """The objective that a training's settings name."""
    pair = optim.label_smoothing, rank, world_size
    if optim.loss == "multi-positive":
        return MultiPositive(optim.short_weight, *pair)
    if optim.loss == "long-short":
        return LongShort(optim.principal_components, *pair)
    return Contrastive(*pair)


@dataclass
class RouterCounts:
    """Per MoE block, over the GLOBAL batch: first choices [blocks,E] and tokens [blocks] (text padding not counted)."""

    first_choices: torch.Tensor
    tokens: torch.Tensor

    def __add__(self, other: RouterCounts) -> RouterCounts:
        return RouterCounts(self.first_choices + other.first_choices, self.tokens + other.tokens)

    def over_processes(self) -> RouterCounts:
        """Sum over all processes of the run."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.first_choices)
            dist.all_reduce(self.tokens)
        return self


def kept_tokens(input_ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Places [tokens] in the flattened ids [B,T] of those that are no padding. A mask would do, but how many it leaves
    is a question that a GPU is waited for, in every block."""
    return text_token_mask(input_ids, eos_token_id).flatten().nonzero().squeeze(-1)


def block_logits(
    vision_logits: Sequence[torch.Tensor],
    text_logits: Sequence[Sequence[torch.Tensor]],
    kept: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """Router logits [tokens,E] of every MoE block of both towers, padding of the text removed.

    text_logits, kept (`kept_tokens`): one entry a caption; a block's tokens are those of all captions.
    """
    blocks = zip(*text_logits, strict=True)
    texts = [torch.cat([x.flatten(0, -2)[places] for x, places in zip(block, kept, strict=True)]) for block in blocks]
    return [x.flatten(0, -2) for x in vision_logits] + texts


@torch.no_grad()
def router_counts(blocks: list[torch.Tensor]) -> RouterCounts:
    """Counts of one chunk; add them over chunks and processes to get the f of eq. 7."""
    choices = [count_experts(b.argmax(-1), b.shape[-1]) for b in blocks]
    tokens = torch.tensor([len(b) for b in blocks], dtype=torch.float64)
    return RouterCounts(torch.stack(choices).double(), tokens.to(blocks[0].device, non_blocking=True))


def router_losses(
    blocks: list[torch.Tensor], counts: RouterCounts, config: CLIPMoEConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """This chunk's part of (balance, z), each averaged over blocks; parts ADD UP over chunks and processes.

    f carries no gradient and is known from the whole batch (`counts`), and P is a mean over tokens: so the loss is a
    sum over tokens, and chunking it is exact.
    """
    balance, z = [], []
    for logits, choices, tokens in zip(blocks, counts.first_choices, counts.tokens, strict=True):
        fractions = (choices / tokens).to(logits.dtype)
        share_of_mean = logits.softmax(-1).sum(0) / tokens.to(logits.dtype)
        balance.append(logits.shape[-1] * (fractions * share_of_mean).sum())
        z.append(logits.logsumexp(-1).square().sum() / tokens.to(logits.dtype))
    return torch.stack(balance).mean(), torch.stack(z).mean()
