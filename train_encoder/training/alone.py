"""An accelerator for work that one process does by itself while the run has several."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn


class Alone:
    """Stands in for an Accelerator in a training that one process does by itself, while others do theirs."""

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, accelerator: Accelerator):
        self.device, self.unwrap_model = accelerator.device, accelerator.unwrap_model
        self._together = accelerator

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """On the device and under the run's autocast, but not wrapped in DDP."""
        return self._together.prepare_model(model, evaluation_mode=True)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: list[nn.Parameter], most: float) -> torch.Tensor:
        return nn.utils.clip_grad_norm_(parameters, most)

    def reduce(self, value: torch.Tensor, how: str) -> torch.Tensor:
        return value

    def no_sync(self, model: nn.Module) -> Any:
        return nullcontext()

    def wait_for_everyone(self) -> None:
        pass

    def free_memory(self) -> None:
        pass
