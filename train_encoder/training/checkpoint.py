"""Resume state of a training: trained tensors, optimiser moments and the step, as safetensors and JSON.

A checkpoint is a new directory that appears by one rename, and the older ones go only after that: whenever the
process dies, one whole checkpoint is there. No random state is kept: whatever is random in a step is seeded by the
step's number (`step.py`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import nn

from llava_clipmoe.files import atomic_directory, load_tensors, read_json, remove_leftovers, save_tensors, write_json

MOMENTS = ("exp_avg", "exp_avg_sq")


def save_checkpoint(
    folder: Path, step: int, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Write `folder/step-NNNNNNNN` after `step` steps, then delete older checkpoints."""
    moments = {
        f"{kind}.{name}": optimizer.state[parameter][kind]
        for name, parameter in trained.items()
        for kind in MOMENTS
        if parameter in optimizer.state
    }
    with atomic_directory(folder / f"step-{step:08d}") as temporary:
        save_tensors(temporary / "trained.safetensors", dict(trained))
        save_tensors(temporary / "optimizer.safetensors", moments)
        write_json(temporary / "state.json", {"step": step})
    for old in _checkpoints(folder)[:-1]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Restore the newest checkpoint in place and return its step; 0 when there is none."""
    remove_leftovers(folder)
    found = _checkpoints(folder)
    if not found:
        return 0
    newest = found[-1]
    step = read_json(newest / "state.json")["step"]
    tensors, moments = load_tensors(newest / "trained.safetensors"), load_tensors(newest / "optimizer.safetensors")
    if set(tensors) != set(trained):
        raise ValueError(
            f"{newest} holds the state of another training (its tensors differ). "
            "Use another --output-dir, or delete this one to start over."
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),  # where the fused kernel wants it
                **{kind: moments[f"{kind}.{name}"].to(parameter.device) for kind in MOMENTS},
            }
    return step


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def discard_checkpoints(folder: Path) -> None:
    """Remove the resume state of a training whose result is saved."""
    remove_leftovers(folder)
    shutil.rmtree(folder, ignore_errors=True)
