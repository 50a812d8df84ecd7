"""A vision tower beside others in one process, as `tower_speed.py` runs them on a GPU: what it holds and must equal."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tower_variants import REFERENCES, fast_path, make_tower

WARM = 5
"""Batches before the first timed one: kernels are compiled, and CUDA graphs made for a size that comes again."""


@dataclass
class Runner:
    """A variant's tower, made when it is first asked for, and what it holds."""

    folder: Path
    kind: str
    how: str
    device: torch.device
    dtype: torch.dtype
    tower: nn.Module | None = None
    held: int = 0
    """Bytes that torch has allocated for it between two batches."""
    reserved: int = 0
    """Bytes that torch cannot give to others between two batches."""

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        with fast_path(self.how == "fast"):
            if self.tower is None:
                self.tower = make_tower(self.folder, self.kind, self.how, self.device, self.dtype)
            return self.tower(pixels)

    def meet(self, pixels: torch.Tensor) -> tuple[np.ndarray, int]:
        """Warm up with this number of pictures -> features of the first ones, as the warm tower gives them, and peak
        memory in bytes."""
        allocated, reserved = self._memory()
        for _ in range(WARM):
            self(torch.randn_like(pixels))
        features = self(pixels)[:2].float().cpu().numpy()
        if self.device.type != "cuda":
            return features, 0
        peak = torch.cuda.max_memory_allocated(self.device) - allocated + self.held
        allocated_now, reserved_now = self._memory()
        self.held += allocated_now - allocated
        self.reserved += reserved_now - reserved
        return features, max(peak, self.reserved)

    def _memory(self) -> tuple[int, int]:
        """Bytes allocated and reserved, when everything that can be freed is."""
        if self.device.type != "cuda":
            return 0, 0
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)


@torch.no_grad()
def reference_features(folder: Path, pixels: torch.Tensor, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Directory -> features of these pictures, by the weights as they are in `dtype`, computed in fp32."""
    found = {}
    with fast_path(False), exact_products():
        for name, (kind, how) in REFERENCES.items():
            tower = make_tower(folder, kind, how, pixels.device, dtype).float()
            found[name] = tower(pixels.float()).cpu().numpy()
    return found


@contextmanager
def exact_products() -> Iterator[None]:
    """No TF32 inside the `with`."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
