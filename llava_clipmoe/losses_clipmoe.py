"""The router losses of a CLIP-MoE, and which text tokens they count.

Copied beside the weights of a saved model (`auto_map`), therefore it imports nothing of this package but other copied
files.

Shape suffixes:  B batch   T tokens   N tokens of a block   E experts
Equations are those of the CLIP-MoE paper (Zhang et al. 2024).
"""

from __future__ import annotations

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


def load_balancing_loss(logits_NE: torch.Tensor, fractions_E: torch.Tensor | None = None) -> torch.Tensor:
    """E * sum_j f_j P_j of ONE block (eq. 6-9); minimum 1 at f = P = 1/E.

    f_j: share of tokens whose largest logit is expert j's (no gradient); P_j: mean probability of j. `fractions_E`
    gives f from outside, when these tokens are only a part of the batch that f is taken over.
    The official code pools all blocks into one f and P, which cannot see a block that collapsed onto one expert.
    """
    num_experts = logits_NE.shape[-1]
    if fractions_E is None:
        fractions_E = expert_fractions(logits_NE)
    return num_experts * (fractions_E * logits_NE.softmax(-1).mean(0)).sum()


def expert_fractions(logits_NE: torch.Tensor) -> torch.Tensor:
    """f [E]: share of tokens whose first choice is each expert."""
    return count_experts(logits_NE.argmax(-1), logits_NE.shape[-1]) / max(logits_NE.shape[0], 1)


def router_z_loss(logits_NE: torch.Tensor) -> torch.Tensor:
    """Mean squared log-partition (ST-MoE, eq. 5): keeps the router's logits small."""
    return logits_NE.logsumexp(-1).square().mean()


def router_losses(vision_logits, text_logits, text_mask_BT: torch.Tensor, config: CLIPMoEConfig) -> torch.Tensor:
    """alpha * balance + z-coefficient * z-loss, each averaged over the MoE blocks of both towers -> scalar."""
    blocks = [logits.flatten(0, -2) for logits in vision_logits] + [logits[text_mask_BT] for logits in text_logits]
    balance = torch.stack([load_balancing_loss(b) for b in blocks]).mean()
    loss = config.router_aux_loss_coef * balance
    if config.router_z_loss_coef:
        loss = loss + config.router_z_loss_coef * torch.stack([router_z_loss(b) for b in blocks]).mean()
    return loss
