"""Whether the kernels of a GPU run for a tensor, and what a module keeps for them."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .common_clipmoe import working_dtype

FAST = "LLAVA_CLIPMOE_FAST"
"""Environment variable: 0, no kernels; 1, in fp32 too, where nobody has measured that they pay."""


def kernels_for(x: torch.Tensor) -> ModuleType | None:
    """`fast_clipmoe`, where the kernels run for `x`: on a GPU, with products in half precision. Else None."""
    wanted = os.environ.get(FAST, "")
    if not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") or wanted == "0":  # (the interpreter: for tests)
        return None
    dtype = working_dtype(x)
    if (dtype.itemsize != 2 and wanted != "1") or _is_compiling():
        return None
    module = _import_kernels()
    return module if module is not None and module.runs_on(x.device, dtype) else None


@functools.cache
def _import_kernels() -> ModuleType | None:
    """None, and one line that says why, where there is no triton."""
    try:  # by name: transformers 4 follows the imports that it reads in these files, round and round in a circle
        return importlib.import_module(".fast_clipmoe", __package__)
    except ImportError as error:
        say_once(f"the GPU kernels are not used, the slower loop is: {error}")
        return None


@functools.cache
def say_once(line: str) -> None:
    """A warning, once a process: why something is slower here."""
    logging.getLogger("llava_clipmoe").warning("llava-clipmoe: %s", line)


def _is_compiling() -> bool:
    """True while torch.compile traces: it has kernels of its own."""
    compiler = getattr(torch, "compiler", None)
    return bool(getattr(compiler, "is_compiling", bool)())


class Prepared(nn.Module):
    """A module that keeps what the fast path made of its weights (`prepared`), until they move or it trains."""

    prepared: Any = None

    def _apply(self, *args: Any, **kwargs: Any):  # what `.to()`, `.cpu()` and `.half()` call
        super()._apply(*args, **kwargs)
        if self.prepared is not None and not self.prepared.in_place():
            self.prepared = None
        return self

    def train(self, mode: bool = True):
        if mode:
            self.prepared = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of a module make their own."""
        return {**self.__dict__, "prepared": None}
