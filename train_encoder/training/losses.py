"""The contrastive losses of a step, over the images and captions of all processes (eq. 1 of the CLIP-MoE paper)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss

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
    """Captions of an image that it needs: 1, or 2 (the whole one and its first sentence)."""

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
        points = image.detach().contiguous()
        if self.pair.world_size > 1:  # the training's processes; a run may have more (see `Alone`)
            parts = [torch.empty_like(points) for _ in range(self.pair.world_size)]
            dist.all_gather(parts, points)
            points = torch.cat(parts)
        mean, basis = principal_components(points, self.components)
        return mean + (image - mean) @ basis @ basis.T


def principal_components(x: torch.Tensor, components: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points [B,P] -> their mean [P], and an orthonormal basis [P,k] of the directions of largest variance: k is
    `components`, or B or P where that is less."""
    mean = x.mean(0)
    _, _, directions = torch.linalg.svd(x - mean, full_matrices=False)
    return mean, directions[:components].T


def make_objective(optim: OptimConfig, rank: int = 0, world_size: int = 1) -> Contrastive:
    """The objective that a training's settings name."""
    pair = optim.label_smoothing, rank, world_size
    if optim.loss == "multi-positive":
        return MultiPositive(optim.short_weight, *pair)
    if optim.loss == "long-short":
        return LongShort(optim.principal_components, *pair)
    return Contrastive(*pair)
