"""Upstream's scripts on a machine without CUDA. Installed by the launcher only: it changes torch for its process."""

from __future__ import annotations

import torch


def install() -> None:
    """Where CUDA is missing: `tensor.cuda()` and `torch.cuda.synchronize()` do nothing, as upstream calls both."""
    if torch.cuda.is_available():
        return
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.cuda.synchronize = lambda *args, **kwargs: None
