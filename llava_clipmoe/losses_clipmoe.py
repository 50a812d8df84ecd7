"""The router losses of a CLIP-MoE, and which text tokens they count.

Shape suffixes:  B batch   T tokens   N tokens of a block   E experts
Equations are those of the CLIP-MoE paper (Zhang et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .common_clipmoe import count_experts
from .configuration_clipmoe import CLIPMoEConfig


def end_of_text(input_ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Position of each caption's pooled token [B]. `eos_token_id` 2 is the legacy value of OpenAI's configs on the
    hub (the true id is the vocabulary's largest): then, as transformers does, the largest id is taken."""
    if eos_token_id == 2:
        return input_ids.argmax(-1)
    return (input_ids == eos_token_id).int().argmax(-1)


def text_token_mask(input_ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """True for the tokens up to and with the pooled one [B,T]; what follows is padding and counts in no statistic."""
    end_B = end_of_text(input_ids, eos_token_id)
    return torch.arange(input_ids.shape[1], device=input_ids.device) <= end_B[:, None]


def kept_tokens(input_ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Places [tokens] in the flattened ids [B,T] of those that are no padding. A mask would do, but how many it leaves
    is a question that a GPU is waited for, in every block."""
    return text_token_mask(input_ids, eos_token_id).flatten().nonzero().squeeze(-1)


def block_logits(
    vision_logits: Sequence[torch.Tensor],
    text_logits: Sequence[Sequence[torch.Tensor]],
    kept: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """Router logits [N,E] of every MoE block of both towers, padding of the text removed.

    text_logits, kept (`kept_tokens`): one entry a caption; a block's tokens are those of all captions.
    """
    blocks = [logits.flatten(0, -2) for logits in vision_logits]
    for block in zip(*text_logits, strict=True):
        blocks.append(torch.cat([x.flatten(0, -2)[places] for x, places in zip(block, kept, strict=True)]))
    return blocks


@dataclass
class RouterCounts:
    """Per MoE block: first choices [blocks,E] and tokens [blocks]; sums over chunks and processes are those of all."""

    first_choices: torch.Tensor
    tokens: torch.Tensor

    def __add__(self, other: RouterCounts) -> RouterCounts:
        return RouterCounts(self.first_choices + other.first_choices, self.tokens + other.tokens)


@torch.no_grad()
def router_counts(blocks: Sequence[torch.Tensor]) -> RouterCounts:
    """Counts of the logits [N,E] of every block: what the f of eq. 7 is made of."""
    choices = [count_experts(logits.argmax(-1), logits.shape[-1]) for logits in blocks]
    tokens = torch.tensor([len(logits) for logits in blocks], dtype=torch.float64)
    return RouterCounts(torch.stack(choices).double(), tokens.to(blocks[0].device, non_blocking=True))


def router_losses(blocks: Sequence[torch.Tensor], counts: RouterCounts) -> tuple[torch.Tensor, torch.Tensor]:
    """(balance, z) of the logits [N,E] of every block, each averaged over the blocks.

    balance: E * sum_j f_j P_j (eq. 6-9), at least 1, at f = P = 1/E; f_j is the share of tokens whose largest logit is
    expert j's (no gradient), P_j the mean probability of j. The official code pools all blocks into one f and P, which
    cannot see a block that collapsed onto one expert. z: the mean squared log-partition (ST-MoE, eq. 5), which keeps
    the logits small.

    `counts` are those of all tokens that the means are over. Where `blocks` are only a part of them (a chunk, a
    process), the parts' losses add up to those of the whole, exactly: P is a sum over tokens, and f is given.
    """
    balance, z = [], []
    for logits, choices, tokens in zip(blocks, counts.first_choices, counts.tokens, strict=True):
        fractions = (choices / tokens).to(logits.dtype)
        share_of_mean = logits.softmax(-1).sum(0) / tokens.to(logits.dtype)
        balance.append(logits.shape[-1] * (fractions * share_of_mean).sum())
        z.append(logits.logsumexp(-1).square().sum() / tokens.to(logits.dtype))
    return torch.stack(balance).mean(), torch.stack(z).mean()


def weighted(balance: torch.Tensor, z: torch.Tensor, config: CLIPMoEConfig) -> torch.Tensor:
    """alpha * balance + z-coefficient * z: what is added to CLIP's own loss (eq. 10)."""
    return config.router_aux_loss_coef * balance + config.router_z_loss_coef * z
