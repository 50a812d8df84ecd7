"""A vision tower that learns in LLaVA's stage 2: what of it is trained, its balance loss, the file that keeps it.

A LLaVA checkpoint holds its tower by name only. What stage 2 changed of it therefore lies beside the checkpoint's
config.json, in `vision_tower.safetensors`: whole tensors under the names of the tower's own directory, low-rank
changes already added. Whoever loads the checkpoint lays them over that directory's tensors.

Shape suffixes:  B images   T tokens   E experts   r rank
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from .configuration_clipmoe import CLIPMoEVisionConfig
from .files import load_tensors, save_tensors
from .losses_clipmoe import router_counts, router_losses, weighted
from .transformer_clipmoe import CLIPMoEAttention

TUNED_FILE = "vision_tower.safetensors"
MARK = "mm_tune_vision_tower"
"""Flag of the trainer, and field of a LLaVA's config: what was trained last, where the tower is not its directory's."""
CHOICES = ("routers", "experts", "lora")
ONE_OF = "routers, experts or lora"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class Tuning:
    """What of a tower is trained, and how."""

    what: str
    """One of CHOICES: the routers (with their balance loss), the experts' FFNs, or low-rank changes of attention."""
    learning_rate: float | None = None
    """None: the trainer's own."""
    rank: int = 16


class LowRank(nn.Module):
    """W -> W + 2 up down (LoRA with alpha = 2 r, as in LLaVA's scripts): up [out,r], zero at first, down [r,in].

    A parametrization of torch's and no layer of peft's: peft's functions for LLaVA's own adapters (load, activate,
    merge) go through every layer of peft's in the model, and would find these.
    """

    def __init__(self, weight: torch.Tensor, rank: int, dtype: torch.dtype):
        super().__init__()
        rows, columns = weight.shape
        down = nn.init.kaiming_uniform_(torch.empty(rank, columns), a=5**0.5)  # as peft's
        self.up = nn.Parameter(torch.zeros(rows, rank).to(weight.device, dtype))
        self.down = nn.Parameter(down.to(weight.device, dtype))

    def change(self) -> torch.Tensor:
        return 2 * self.up.float() @ self.down.float()

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.change().to(weight.dtype)


def check_tuning(tuning: Tuning, config: CLIPMoEVisionConfig, tower: str) -> None:
    """Raise ValueError where the tower `tower` has not what is to be trained."""
    if tuning.what not in CHOICES:
        raise ValueError(f"--{MARK} is {tuning.what!r}; it may be {ONE_OF}. Without it the vision tower stays frozen.")
    if tuning.what != "lora" and not config.moe_layers:
        raise ValueError(
            f"--{MARK} {tuning.what}: the tower {tower} is a dense CLIP, which has no {tuning.what}. Only lora can be "
            "trained in it."
        )
    if tuning.what == "lora" and not 0 < tuning.rank < config.hidden_size:
        raise ValueError(
            f"--mm_vision_tower_lora_r is {tuning.rank}; it must lie between 1 and {config.hidden_size - 1}, as the "
            f"tower {tower} is {config.hidden_size} wide."
        )


# ------------------------------------------------------------------------------------------------------------- training


def require_gradients(model: nn.Module, tuning: Tuning, dtype: torch.dtype) -> list[str]:
    """Let what `tuning` names require gradients, all else not; -> the names of the tensors that will change.

    dtype: of what is trained.
    """
    model.requires_grad_(False)
    if tuning.what == "lora":
        attentions = [(n, m) for n, m in model.named_modules() if isinstance(m, CLIPMoEAttention)]
        names = [f"{name}.{projection}.weight" for name, _ in attentions for projection in PROJECTIONS]
        for _, attention in attentions:
            for projection in PROJECTIONS:
                linear = getattr(attention, projection)
                parametrize.register_parametrization(linear, "weight", LowRank(linear.weight, tuning.rank, dtype))
                linear.parametrizations.weight.original.requires_grad_(False)
        return names
    part = ".mlp.router." if tuning.what == "routers" else ".mlp.experts."
    names = [name for name, _ in model.named_parameters() if part in name]
    for name in names:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(True)
    return names


def balance_loss(
    router_logits: Iterable[torch.Tensor], pixels: torch.Tensor, config: CLIPMoEVisionConfig
) -> torch.Tensor:
    """The weighted router losses (eq. 10) of a batch: logits [B,T,E] of every MoE block, pixels [B,3,R,R].

    Upstream gives a row without a picture one of zeros: it does not count.
    """
    places = pixels.flatten(1).any(1).nonzero().squeeze(-1)
    blocks = [logits[places].flatten(0, 1) for logits in router_logits]
    if not len(places):
        return sum(logits.sum() for logits in blocks)  # of nothing: zero, with a graph in every process
    return weighted(*router_losses(blocks, router_counts(blocks)), config)


# -------------------------------------------------------------------------------------------------------------- keeping


@torch.no_grad()
def changed_tensors(model: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Copies of the named tensors on the CPU, low-rank changes added in fp32. Every process must call it, as ZeRO-3
    gathers what it has sharded."""
    tensors = {}
    for name in names:
        place, _, kind = name.rpartition(".")
        module = model.get_submodule(place)
        with _gathered(list(module.parameters())):
            if parametrize.is_parametrized(module, kind):
                weight = module.parametrizations[kind]
                tensors[name] = (weight.original.float() + weight[0].change()).cpu()
            else:
                tensors[name] = getattr(module, kind).detach().cpu().clone()
    return tensors


def _gathered(parameters: list[nn.Parameter]) -> Any:
    """DeepSpeed's context in which sharded parameters are whole; nothing where none is sharded."""
    from contextlib import nullcontext

    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def save_tuned(folder: Path, tensors: dict[str, torch.Tensor], what: str | None) -> None:
    """Write what was changed of a tower beside a LLaVA checkpoint."""
    save_tensors(folder / TUNED_FILE, tensors, {"format": "pt", MARK: what or ""})


def load_tuned(checkpoint: str, blocks: int | None = None) -> dict[str, torch.Tensor]:
    """What was changed of the tower of a LLaVA: a directory, or a hub id. Raises FileNotFoundError without the file.

    blocks: how many of the tower are run; what belongs to later ones is left out."""
    from transformers.utils import cached_file

    try:
        found = cached_file(checkpoint, TUNED_FILE)
    except OSError as error:
        raise FileNotFoundError(
            f"{checkpoint} says in its config.json that its vision tower was trained ({MARK}), but {TUNED_FILE}, which "
            "holds it, is not there. Copy it from the training's --output_dir."
        ) from error
    return load_tensors(found, keep=lambda name: blocks is None or _block(name) < blocks)


def _block(name: str) -> int:
    """Number of the block that a tensor of the tower belongs to."""
    return int(name.partition(".layers.")[2].partition(".")[0])
