"""What every FFN of a CLIP-MoE needs: activations, initialisation, the dtype of products, token-expert pairs in order.

Shape suffixes:  N tokens   D width   E experts   K experts per token   M = N*K token-expert pairs
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

QUICK = 1.702


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """OpenAI CLIP's activation, x * sigmoid(1.702 x). Not the same as gelu: a mix-up costs points silently.

    Written as silu(1.702 x) / 1.702: a backward pass then keeps one tensor of the FFN's width instead of two.
    """
    return F.silu(QUICK * x) / QUICK


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


def activation(name: str):
    """The activation called `name` ("quick_gelu" or "gelu"); any other name is refused, never replaced."""
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act {name!r} is not one of {sorted(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def residual_std(config) -> float:
    """Standard deviation of what writes into the residual stream (OpenAI's CLIP): narrower the deeper the tower."""
    return config.hidden_size**-0.5 * (2 * config.num_hidden_layers) ** -0.5


def set_ffn_init(ffn: nn.Module, config) -> None:
    """Tell `_init_weights` how to draw an FFN, dense or of experts. On the layers that own the weights, see there."""
    ffn.fc1.init_std = (2 * config.hidden_size) ** -0.5
    ffn.fc2.init_std = residual_std(config)


def only_reads(experts: nn.Module) -> bool:
    """True when nothing will be learnt from this pass: hidden states may be overwritten."""
    return not torch.is_grad_enabled() and not (experts.dropout and experts.training)


def working_dtype(x: torch.Tensor) -> torch.dtype:
    """What matrix products run in: autocast's dtype inside autocast, else that of `x`."""
    return torch.get_autocast_dtype(x.device.type) if _autocast_on(x) else x.dtype


def _autocast_on(x: torch.Tensor) -> bool:
    try:
        return torch.is_autocast_enabled(x.device.type)
    except TypeError:  # torch < 2.4 takes no device type
        return torch.is_autocast_cpu_enabled() if x.device.type == "cpu" else torch.is_autocast_enabled()


def grouped_mm_pays(x: torch.Tensor) -> bool:
    """True where grouped_mm has a fused kernel: bf16 on NVIDIA SM90 and newer, torch >= 2.10."""
    if not hasattr(F, "grouped_mm") or x.device.type != "cuda":
        return False
    return working_dtype(x) == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (9, 0)


def sort_by_expert(experts_NK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-> order [N*K] of the flattened token-expert pairs, grouped by expert (stable), and each expert's count [E]."""
    flat = experts_NK.flatten()
    return flat.argsort(stable=True), count_experts(flat, num_experts)


def count_experts(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How often each expert occurs [E]. torch.bincount would wait for a GPU, and cannot be compiled."""
    return (experts.flatten() == torch.arange(num_experts, device=experts.device)[:, None]).sum(1)


def inverse(order: torch.Tensor) -> torch.Tensor:
    """Where each thing went that was put in this order: x[order][inverse(order)] is x."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def combine(y_MD: torch.Tensor, order_M: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """Undo the sort and sum over K. Gather + sum, not index_add_: that one is not deterministic on CUDA."""
    y_NKD = y_MD[inverse(order_M)].view(*weights_NK.shape, -1)
    return (y_NKD * weights_NK.unsqueeze(-1).to(y_NKD.dtype)).sum(1)
