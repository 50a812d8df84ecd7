"""Whole experts -> delta experts: one base FFN a block, and each expert as a low-rank difference to it.

The experts of a CLIP-MoE are the base's FFN after a short training: W_e = W_0 + (little). Each difference is cut to
its r leading directions,

    W_e - W_0  ~  B_e A_e,      the best such product for the mean square of (W_e - W_0 - B_e A_e) (x - mean x)

over the inputs x of that layer when their moments are given (D2-MoE, Gu et al. 2025, whitens by the second moment), and
over all directions alike (the truncated SVD) without them. What the cut does to the mean input is put right by the
bias, which costs nothing. Nothing is trained.

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
from .experts_clipmoe import Experts
from .experts_delta_clipmoe import DeltaExperts
from .modeling_clipmoe import CLIPMoEModel

LAYERS = ("fc1", "fc2")
MULTIPLE = 8
"""Ranks are multiples of this (or full): grouped products want rows of 16 bytes."""
RIDGE = 3.0
"""Added to the covariance of the inputs, times its mean diagonal: the cut lies between the one for these inputs and the
truncated SVD, which knows of none. Of 0.001 to 3, this was nearest on held-out pictures (benchmarks/compression.md)."""

ROUNDING = 1e-5
"""Inputs that spread less than this about their mean (relative, squared) were one input, and the rest is rounding."""


@dataclass(frozen=True)
class Kept:
    """What a layer's differences keep: `energy` [E], the share of each expert's squared difference (1 for the base)."""

    block: str  # "vision_model.encoder.layers.3"
    layer: str  # "fc1" or "fc2"
    rank: int
    energy: tuple[float, ...]


@dataclass
class Moments:
    """Sums over tokens of what goes into the layers of one block's experts, and of its outer products."""

    inputs_EDD: torch.Tensor  # of the tokens that each expert was given
    inputs_ED: torch.Tensor
    inputs_E: torch.Tensor  # how many
    hidden_HH: torch.Tensor  # of all experts together: [E,H,H] would be gigabytes
    hidden_H: torch.Tensor

    def of_layer(self, layer: str, expert: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Mean [i] and covariance [i,i] of a layer's inputs; None for an expert that saw no token."""
        if not self.inputs_E[expert]:
            return None
        if layer == "fc1":
            products, total, count = self.inputs_EDD[expert], self.inputs_ED[expert], self.inputs_E[expert]
        else:
            products, total, count = self.hidden_HH, self.hidden_H, self.inputs_E.sum()
        mean = total.double() / count
        return mean, products.double() / count - mean[:, None] * mean


def compress(
    model: CLIPMoEModel,
    *,
    rank: int | None = None,
    energy: float | None = None,
    moments: Mapping[str, Moments] | None = None,
    decomposed: Decomposed | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[CLIPMoEModel, list[Kept]]:
    """The same model with delta experts, and what they keep. `model` is left as it is.

    rank: of every difference, or energy: between 0 and 1, the smallest rank at which every expert of a layer keeps
    this share; one of the two. moments: from `second_moments`. decomposed: an empty dict to fill, or one filled by an
    earlier call with the same model and moments, so that only the first rank costs a decomposition (about 3.5 GB for a
    ViT-L with four experts). progress(done, total) is called after every block.
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
            known = {} if decomposed is None else decomposed  # by itself, one layer's are held at a time
            if (name, layer) not in known:
                seen = [moments and moments[name].of_layer(layer, e) for e in range(experts.num_experts)]
                known[name, layer] = [Directions(m, s) for m, s in zip(_differences(weight_Eoi), seen, strict=True)]
            found = known[name, layer]
            factors, shift_Eo, shares = _factors(weight_Eoi, found, rank, energy)
            state |= {f"{name}.{layer}.{part}": tensor for part, tensor in factors.items()}
            state[f"{name}.{layer}.bias"] = state[f"{name}.{layer}.bias"] + shift_Eo
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


Seen = tuple[torch.Tensor, torch.Tensor]
"""Mean [i] and covariance [i,i] of a layer's inputs."""


def _differences(weight_Eoi: torch.Tensor) -> Iterator[torch.Tensor]:
    """Of every expert from the base, the first of them, in double precision [o,i]."""
    return ((one - weight_Eoi[0]).double() for one in weight_Eoi)


def _factors(
    weight_Eoi: torch.Tensor, found: list[Directions], rank: int | None, energy: float | None
) -> tuple[dict[str, torch.Tensor], torch.Tensor, tuple[float, ...]]:
    """-> base [o,i], up [E,o,r], down [E,r,i]; what the biases need [E,o]; the shares kept."""
    if rank is None:
        rank = max(one.rank_for(energy) for one in found)
    rank = min(*weight_Eoi.shape[1:], -(-rank // MULTIPLE) * MULTIPLE)
    triples = [one.factors(m_oi, rank) for one, m_oi in zip(found, _differences(weight_Eoi), strict=True)]
    up_Eor, down_Eri, shift_Eo = (torch.stack(parts).to(weight_Eoi.dtype) for parts in zip(*triples, strict=True))
    shares = tuple(one.energy(rank) for one in found)
    return {"base": weight_Eoi[0], "up": up_Eor, "down": down_Eri}, shift_Eo, shares


class Directions:
    """The leading directions of one difference M [o,i], in double precision, under the covariance S of its inputs.

    With S = L L^T the product B A of rank r that is nearest to M in |(M - B A) L| comes from the leading eigenvectors
    of M S M^T (U: B = U, A = U^T M) or of L^T M^T M L (V: B = M L V, A = V^T L^-1): whichever is smaller.
    """

    def __init__(self, m_oi: torch.Tensor, seen: Seen | None):
        o, i = m_oi.shape
        self.zero, self.left, self.mean, root = not m_oi.any(), o <= i, None, None
        if seen is not None:
            self.mean, s = (part.to(m_oi) for part in seen)
            spread = s.diagonal().mean()
            if spread > ROUNDING * self.mean.square().mean():
                s = s / spread + RIDGE * torch.eye(i, dtype=s.dtype, device=s.device)
                root = torch.linalg.cholesky(s)
        self.root = None if self.left else root  # the other way needs it again
        if self.zero:
            return
        whitened = m_oi if root is None else m_oi @ root
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

    def factors(self, m_oi: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the same difference -> up [o,r], down [r,i], and what the bias needs [o]. up and down are scaled alike, so
        that half precision suits both."""
        o, i = m_oi.shape
        if self.zero:
            return m_oi.new_zeros(o, rank), m_oi.new_zeros(rank, i), m_oi.new_zeros(o)
        v = self.vectors[:, :rank]
        if self.left:
            up, down = v, v.T @ m_oi
        elif self.root is None:
            up, down = m_oi @ v, v.T
        else:
            up = m_oi @ (self.root @ v)
            down = torch.linalg.solve_triangular(self.root.T, v, upper=True).T
        shift = m_oi.new_zeros(o) if self.mean is None else m_oi @ self.mean - up @ (down @ self.mean)
        balance = (down.norm(dim=1) / up.norm(dim=0).clamp_min(1e-300)).sqrt()
        balance = torch.where(balance > 0, balance, 1.0)
        return up * balance, down / balance[:, None], shift


Decomposed = dict[tuple[str, str], list[Directions]]
"""Block and layer -> the directions of its experts."""


# --------------------------------------------------------------------------------------------------------- the moments


@contextlib.contextmanager
def second_moments(model: CLIPMoEModel) -> Iterator[dict[str, Moments]]:
    """Inside the `with`, every forward pass of `model` adds its tokens to the moments that are given (by block).

    Memory: about E*D*D + H*H floats a block. Batches of captions should be of one length: padding is counted as well.
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
            sizes = ((e, d, d), (e, d), (e,), (h, h), (h,))
            self.moments[self.name] = Moments(*(x_ND.new_zeros(size) for size in sizes))
        seen = self.moments[self.name]
        for expert in range(e):
            mine = x_ND[(chosen_NK == expert).any(-1)]
            weight, bias = experts.fc1.weight[expert].float(), experts.fc1.bias[expert].float()
            hidden = experts.act(nn.functional.linear(mine, weight, bias))
            seen.inputs_EDD[expert].addmm_(mine.T, mine)
            seen.inputs_ED[expert] += mine.sum(0)
            seen.inputs_E[expert] += len(mine)
            seen.hidden_HH.addmm_(hidden.T, hidden)
            seen.hidden_H += hidden.sum(0)
