"""Frozen weights in the dtype that they are used in.

Autocast keeps its casts of trainable weights for the length of a step, but not those of frozen ones: a router training
of ViT-L would turn 1.2 billion fp32 numbers into bf16 for every chunk of images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from llava_clipmoe.experts_clipmoe import StackedLinear

MATRICES = (nn.Linear, nn.Conv2d, StackedLinear)


@contextlib.contextmanager
def frozen_in(model: nn.Module, dtype: torch.dtype, trainable: Callable[[str], bool]) -> Iterator[None]:
    """Inside the `with`, the frozen matrices of `model` (all but those `trainable` by name) are stored in `dtype`;
    their originals wait in the CPU's memory. What autocast leaves in fp32 (norms, embeddings) stays so, so the numbers
    are the same."""
    held = [(parameter, parameter.data.cpu()) for parameter in _frozen(model, trainable)]
    for parameter, original in held:
        parameter.data = original.to(parameter.device, dtype)
    try:
        yield
    finally:
        for parameter, original in held:
            parameter.data = original.to(parameter.device)


def store_frozen_in(model: nn.Module, dtype: torch.dtype, trainable: Callable[[str], bool]) -> None:
    """The same for good, for callers that have the originals elsewhere and need their memory."""
    for parameter in _frozen(model, trainable):
        parameter.data = parameter.data.to(dtype)


def _frozen(model: nn.Module, trainable: Callable[[str], bool]) -> list[nn.Parameter]:
    return [
        parameter
        for prefix, module in model.named_modules()
        if isinstance(module, MATRICES)
        for name, parameter in module.named_parameters(recurse=False)
        if not trainable(f"{prefix}.{name}")
    ]
