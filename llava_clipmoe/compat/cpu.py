"""Upstream's scripts on a machine without CUDA. Installed by the launcher only: it changes torch for its process."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch


def install() -> None:
    """Where CUDA is missing, what upstream's runners send to "cuda" stays on the CPU: `tensor.cuda()`,
    `tensor.to("cuda")`; and `torch.cuda.synchronize()` does nothing."""
    if torch.cuda.is_available() or getattr(torch.Tensor.to, "stays_on_cpu", False):
        return
    upstream = torch.Tensor.to

    @functools.wraps(upstream)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple("cpu" if _is_cuda(value) else value for value in args)
        kwargs = {name: "cpu" if _is_cuda(value) else value for name, value in kwargs.items()}
        return upstream(self, *args, **kwargs)

    to.stays_on_cpu = True
    torch.Tensor.to = to
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.cuda.synchronize = lambda *args, **kwargs: None


def _is_cuda(value: Any) -> bool:
    return isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda"


def prepare_deepspeed() -> None:
    """DeepSpeed's engine without GPUs (DS_ACCELERATOR=cpu): start its processes before the model is made.

    ZeRO-3 shards while the model is being built and would see one process. Its shared-memory operator is left out: it
    is compiled for minutes at first use, and gloo does the same work.
    """
    if os.environ.get("DS_ACCELERATOR") != "cpu" or "WORLD_SIZE" not in os.environ:
        return
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
