"""The losses of a step, split so that they are exact when a batch is spread over processes and chunks.

L = L_CLIP + alpha * mean over blocks of L_balance (CLIP-MoE paper, eq. 6-10).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig
from llava_clipmoe.modeling_clipmoe import text_token_mask


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


def block_logits(vision_logits, text_logits, input_ids: torch.Tensor, config: CLIPMoEConfig) -> list[torch.Tensor]:
    """Router logits [tokens,E] of every MoE block of both towers, padding of the text removed."""
    mask = text_token_mask(input_ids, config.text_config.eos_token_id)
    return [x.flatten(0, -2) for x in vision_logits] + [x[mask] for x in text_logits]


@torch.no_grad()
def router_counts(blocks: list[torch.Tensor]) -> RouterCounts:
    """Counts of one chunk; add them over chunks and processes to get the f of eq. 7."""
    choices = [torch.bincount(b.argmax(-1), minlength=b.shape[-1]) for b in blocks]
    tokens = torch.tensor([len(b) for b in blocks], device=blocks[0].device)
    return RouterCounts(torch.stack(choices).double(), tokens.double())


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
