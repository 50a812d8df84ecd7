"""Whole experts -> delta experts: one base FFN a block, and each expert as a low-rank difference to it.

The experts of a CLIP-MoE are the base's FFN after a short training: W_e = W_0 + (little). Each difference is cut to
its r leading directions,

    W_e - W_0  ~  B_e A_e,      the best such product for the mean square of (W_e - W_0 - B_e A_e) x

over the inputs x of that layer when their second moment S = E[x x^T] is given (as D2-MoE, Gu et al. 2025, whitens by
it), and over all directions alike (the truncated SVD) without it. Nothing is trained.

Shape suffixes:  E experts   D width   H FFN width   r rank   o, i the outputs and inputs of a layer
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .configuration_clipmoe import CLIPMoEConfig
from .experts_clipmoe import DeltaExperts, Experts
from .modeling_clipmoe import CLIPMoEModel

LAYERS = ("fc1", "fc2")
MULTIPLE = 8
"""Ranks are multiples of this (or full): grouped products want rows of 16 bytes."""


@dataclass(frozen=True)
class Kept:
    """What a layer's differences keep: `energy` [E], the share of each expert's squared difference (1 for the base)."""

    block: str  # "vision_model.encoder.layers.3"
    layer: str  # "fc1" or "fc2"
    rank: int
    energy: tuple[float, ...]


@dataclass
class Moments:
    """Second moments of what goes into the layers of one block's experts, summed over tokens."""

    inputs_EDD: torch.Tensor  # of the tokens that each expert was given
    hidden_HH: torch.Tensor  # of all experts together: [E,H,H] would be gigabytes


def compress(
    model: CLIPMoEModel,
    *,
    rank: int | None = None,
    energy: float | None = None,
    moments: Mapping[str, Moments] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[CLIPMoEModel, list[Kept]]:
    """The same model with delta experts, and what they keep. `model` is left as it is.

    rank: of every difference, or energy: between 0 and 1, the smallest rank at which every expert of a layer keeps
    this share; one of the two. moments: from `second_moments`. progress(done, total) is called after every block.
    Raises ValueError for a model without whole experts, and for a rank or energy that cannot be.
    """
    _check(model.config, rank, energy)
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    ranks: dict[str, list[list[int]]] = {"vision_model": [], "text_model": []}
    state, kept = dict(model.state_dict()), []
    for done, (name, experts) in enumerate(blocks.items(), start=1):
        pair = []
        for layer in LAYERS:
            weight_Eoi = state.pop(f"{name}.{layer}.weight")
            seen = None if moments is None else moments[name]
            factors, shares = _factors(weight_Eoi, _of_layer(seen, layer, experts.num_experts), rank, energy)
            state |= {f"{name}.{layer}.{part}": tensor for part, tensor in factors.items()}
            pair.append(factors["down"].shape[1])
            kept.append(Kept(name.removesuffix(".mlp.experts"), layer, pair[-1], shares))
        ranks[name.split(".")[0]].append(pair)
        progress(done, len(blocks))
    return _build(_config_with(model.config, ranks), state), kept


def expand(model: CLIPMoEModel) -> CLIPMoEModel:
    """Delta experts -> whole experts that compute the same. Raises ValueError for a model without delta experts."""
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, DeltaExperts)}
    if not blocks:
        raise ValueError("this model has no delta experts to expand.")
    state = dict(model.state_dict())
    for name in blocks:
        for layer in LAYERS:
            base, up, down = (state.pop(f"{name}.{layer}.{part}") for part in ("base", "up", "down"))
            state[f"{name}.{layer}.weight"] = base + up @ down
    return _build(_config_with(model.config, {"vision_model": None, "text_model": None}), state)


def _check(config: CLIPMoEConfig, rank: int | None, energy: float | None) -> None:
    towers = (config.vision_config, config.text_config)
    if config.is_dense:
        raise ValueError("this model is dense: it has no experts to compress.")
    if any(tower.delta_ranks for tower in towers):
        raise ValueError("this model's experts are compressed already: start from the model it was made from.")
    if (rank is None) == (energy is None):
        raise ValueError("give a rank or an energy, one of the two.")
    if rank is not None and rank < 1:
        raise ValueError(f"the rank must be at least 1, got {rank}.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"the energy lies between 0 and 1 (1: everything), got {energy}.")


def _config_with(config: CLIPMoEConfig, ranks: Mapping[str, list[list[int]] | None]) -> CLIPMoEConfig:
    config = copy.deepcopy(config)
    for tower, pairs in ranks.items():
        getattr(config, tower.replace("model", "config")).delta_ranks = pairs or None
    return config


def _build(config: CLIPMoEConfig, state: Mapping[str, torch.Tensor]) -> CLIPMoEModel:
    with torch.device("meta"):  # no time or memory for random weights that are replaced at once
        model = CLIPMoEModel(config)
    model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return model.eval()


# --------------------------------------------------------------------------------------------------------- the factors


def _factors(
    weight_Eoi: torch.Tensor, moments: list[torch.Tensor | None], rank: int | None, energy: float | None
) -> tuple[dict[str, torch.Tensor], tuple[float, ...]]:
    """-> base [o,i], up [E,o,r], down [E,r,i]; and the share of each difference that they keep."""
    base_oi, full = weight_Eoi[0], min(weight_Eoi.shape[1:])
    bases = [_Directions((one - base_oi).double(), s) for one, s in zip(weight_Eoi, moments, strict=True)]
    if rank is None:
        rank = max(found.rank_for(energy) for found in bases)
    rank = min(full, -(-rank // MULTIPLE) * MULTIPLE)
    pairs = [found.factors(rank) for found in bases]
    up_Eor, down_Eri = (torch.stack(parts).to(weight_Eoi.dtype) for parts in zip(*pairs, strict=True))
    return {"base": base_oi, "up": up_Eor, "down": down_Eri}, tuple(found.energy(rank) for found in bases)


class _Directions:
    """The leading directions of one difference [o,i], in double precision, under the second moment of its inputs.

    With S = L L^T the product B A of rank r that is nearest to the difference M in |(M - B A) L| comes from the leading
    eigenvectors of M S M^T (U: B = U, A = U^T M) or of L^T M^T M L (V: B = M L V, A = V^T L^-1): whichever is smaller.
    """

    def __init__(self, difference_oi: torch.Tensor, moment_ii: torch.Tensor | None):
        self.m, (o, i) = difference_oi, difference_oi.shape
        self.zero, self.left, self.root = not difference_oi.any(), o <= i, None
        if moment_ii is not None:
            s = moment_ii.to(difference_oi)
            # Directions that the calibration never saw keep a little weight, or they would be lost altogether.
            s = s + 1e-3 * s.diagonal().mean() * torch.eye(i, dtype=s.dtype, device=s.device)
            self.root = torch.linalg.cholesky(s / s.diagonal().mean())
        if self.zero:
            return
        whitened = difference_oi if self.root is None else difference_oi @ self.root
        gram = whitened @ whitened.T if self.left else whitened.T @ whitened
        values, vectors = torch.linalg.eigh(gram)
        self.values, self.vectors = values.flip(0).clamp_min(0), vectors.flip(1)

    def energy(self, rank: int) -> float:
        """The share of the squared difference that `rank` directions keep."""
        return 1.0 if self.zero else float(self.values[:rank].sum() / self.values.sum())

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps `energy`."""
        if self.zero:
            return 1
        shares = self.values.cumsum(0) / self.values.sum()
        return min(int((shares < energy - 1e-9).sum()) + 1, len(shares))

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """-> up [o,r], down [r,i]. The two are scaled alike, so that half precision suits both."""
        o, i = self.m.shape
        if self.zero:
            return self.m.new_zeros(o, rank), self.m.new_zeros(rank, i)
        v = self.vectors[:, :rank]
        if self.left:
            up, down = v, v.T @ self.m
        elif self.root is None:
            up, down = self.m @ v, v.T
        else:
            up = self.m @ (self.root @ v)
            down = torch.linalg.solve_triangular(self.root.T, v, upper=True).T
        balance = (down.norm(dim=1) / up.norm(dim=0).clamp_min(1e-300)).sqrt()
        balance = torch.where(balance > 0, balance, 1.0)
        return up * balance, down / balance[:, None]


# --------------------------------------------------------------------------------------------------------- the moments


@contextlib.contextmanager
def second_moments(model: CLIPMoEModel) -> Iterator[dict[str, Moments]]:
    """Inside the `with`, every forward pass of `model` adds its tokens to the moments that are given (by block).

    Memory: E*D*D + H*H floats a block. Batches of captions should be of one length: padding is counted as well.
    """
    moments: dict[str, Moments] = {}
    handles = [
        module.register_forward_pre_hook(_Collect(name, moments))
        for name, module in model.named_modules()
        if isinstance(module, Experts)
    ]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


class _Collect:
    """A hook that adds the tokens of one block's experts to its moments."""

    def __init__(self, name: str, moments: dict[str, Moments]):
        self.name, self.moments = name, moments

    @torch.no_grad()
    def __call__(self, experts: nn.Module, arguments: tuple) -> None:
        x_ND, _, chosen_NK = arguments
        x_ND = x_ND.float()
        e, h, d = experts.fc1.weight.shape
        if self.name not in self.moments:
            self.moments[self.name] = Moments(x_ND.new_zeros(e, d, d), x_ND.new_zeros(h, h))
        seen = self.moments[self.name]
        for expert in range(e):
            mine = x_ND[(chosen_NK == expert).any(-1)]
            weight, bias = experts.fc1.weight[expert].float(), experts.fc1.bias[expert].float()
            hidden = experts.act(nn.functional.linear(mine, weight, bias))
            seen.inputs_EDD[expert].addmm_(mine.T, mine)
            seen.hidden_HH.addmm_(hidden.T, hidden)


def _of_layer(seen: Moments | None, layer: str, experts: int) -> list[torch.Tensor | None]:
    """The second moment that each expert's difference is weighed by; none for an expert that saw no token."""
    if seen is None:
        return [None] * experts
    found = [seen.hidden_HH] * experts if layer == "fc2" else list(seen.inputs_EDD)
    return [one if one.any() else None for one in found]
