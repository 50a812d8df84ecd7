"""AdamW, the learning rate's schedule, and one step of both."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from torch import nn

from llava_clipmoe.modeling_clipmoe import CLIPMoEModel

from ..config import OptimConfig


def make_optimizer(trained: dict[str, nn.Parameter], o: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        list(trained.values()), o.learning_rate, o.betas, o.epsilon, weight_decay=o.weight_decay, fused=True
    )


def learning_rate(o: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up, then cosine to zero (open_clip's schedule). Warm-up is at most a tenth of the steps."""
    warmup = min(o.warmup_steps, steps // 10)
    if step < warmup:
        return o.learning_rate * (step + 1) / warmup
    return 0.5 * o.learning_rate * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def optimizer_step(
    optimizer: torch.optim.Optimizer, accelerator: Accelerator, o: OptimConfig, rate: float, wants_norm: bool
) -> torch.Tensor | None:
    """One step at this learning rate -> the norm of the gradient, where it is wanted or clipped."""
    (group,), norm = optimizer.param_groups, None
    group["lr"] = rate
    if wants_norm or o.max_grad_norm is not None:  # without a limit it is only looked at
        norm = accelerator.clip_grad_norm_(group["params"], o.max_grad_norm or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def limit_temperature(clip: CLIPMoEModel, o: OptimConfig) -> None:
    """Keep a trainable temperature at 1/100 or above, as OpenAI's CLIP."""
    if o.train_temperature:
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(100))
