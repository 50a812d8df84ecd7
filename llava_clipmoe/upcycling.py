"""Dense CLIP + the FFNs of its stages -> CLIP-MoE; sparse upcycling; 77 -> 248 text positions.

Everything that is not an FFN comes from the base; expert j is the FFN of stage j, expert 0 the base's own
(CLIP-MoE paper, section 3.2).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence

import torch

from .configuration_clipmoe import EXPERT_FIELDS, CLIPMoEConfig
from .modeling_clipmoe import CLIPMoEModel

TOWERS = ("vision_model", "text_model")
_FFN = re.compile(r"^(vision_model|text_model)\.encoder\.layers\.(\d+)\.mlp\.(fc1|fc2)\.(weight|bias)$")
_FFN_TENSORS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")

State = Mapping[str, torch.Tensor]


def is_ffn(name: str) -> bool:
    """True for the name of a dense FFN's tensor, in either tower."""
    return _FFN.match(name) is not None


def ffn_state(state: State) -> dict[str, torch.Tensor]:
    """The FFN tensors of a dense state dict: what a stage directory holds."""
    return {name: tensor for name, tensor in state.items() if is_ffn(name)}


def moe_config(base: CLIPMoEConfig, moe_layers: Mapping[str, Sequence[int]] | None = None, **experts) -> CLIPMoEConfig:
    """`base` with experts: fields of EXPERT_FIELDS for both towers, and the blocks per tower
    (`{"vision_model": [..], "text_model": [..]}`, all of them when absent)."""
    unknown = set(experts) - set(EXPERT_FIELDS)
    if unknown:
        raise TypeError(f"unknown expert fields {sorted(unknown)}; there are {sorted(EXPERT_FIELDS)}.")
    towers = {}
    for tower, key in zip(TOWERS, ("vision_config", "text_config"), strict=True):
        towers[key] = {**copy.deepcopy(getattr(base, key).to_dict()), **experts}
        towers[key]["moe_layers"] = None if moe_layers is None else list(moe_layers[tower])
    return CLIPMoEConfig(
        **towers, projection_dim=base.projection_dim, logit_scale_init_value=base.logit_scale_init_value, **experts
    )


def upcycle(base: CLIPMoEModel, stages: Sequence[State], config: CLIPMoEConfig, seed: int = 0) -> CLIPMoEModel:
    """A CLIP-MoE of `base` and the FFNs in `stages`; the routers are fresh, from `seed`.

    `config.num_experts` must be `len(stages) + 1`. Raises ValueError when a stage's FFNs do not fit the base.
    """
    if config.num_experts != len(stages) + 1:
        raise ValueError(
            f"num_experts is {config.num_experts}, but the base and {len(stages)} stages make "
            f"{len(stages) + 1} experts."
        )
    dense = base.state_dict()
    for number, stage in enumerate(stages, start=1):
        check_stage(dense, stage, f"stage {number}", config)
    model = empty_moe(config, seed, dtype=next(base.parameters()).dtype)
    state = model.state_dict()
    sources = [dense, *stages]
    with torch.no_grad():
        for name, target in state.items():
            if ".mlp.experts." in name:
                dense_name = name.replace(".mlp.experts.", ".mlp.")
                for expert, source in enumerate(sources):
                    target[expert].copy_(source[dense_name])
            elif ".mlp.router." not in name:
                target.copy_(dense[name])
    return model


def sparse_upcycle(base: CLIPMoEModel, config: CLIPMoEConfig, seed: int = 0) -> CLIPMoEModel:
    """Sparse upcycling (Komatsuzaki et al. 2022): every expert a copy of the base's FFN. Equals the base at first."""
    return upcycle(base, [ffn_state(base.state_dict())] * (config.num_experts - 1), config, seed)


def empty_moe(config: CLIPMoEConfig, seed: int, dtype: torch.dtype = torch.float32) -> CLIPMoEModel:
    """A freshly initialised model; `seed` alone decides its routers, the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPMoEModel(config)
    return model.to(dtype).eval()


def check_stage(base: State, stage: State, name: str, config: CLIPMoEConfig | None = None) -> None:
    """Raises ValueError naming the first FFN tensor of `stage` that `base` does not have, or has in another shape,
    and any that an MoE block of `config` needs but the stage lacks."""
    mine = {k: tuple(v.shape) for k, v in ffn_state(base).items()}
    theirs = {k: tuple(v.shape) for k, v in ffn_state(stage).items()}
    advice = "Both must come from one base model: rebuild the stage from this base, or give the base it was made from."
    if not theirs:
        raise ValueError(f"{name} holds no FFN tensors of a CLIP. {advice}")
    for key, shape in theirs.items():
        if key not in mine:
            raise ValueError(f"{name} has {key}, which the base does not have. {advice}")
        if shape != mine[key]:
            raise ValueError(f"{name} has {key} of shape {list(shape)}, the base has {list(mine[key])}. {advice}")
    for tower in TOWERS if config is not None else ():
        layers = (config.vision_config if tower == "vision_model" else config.text_config).moe_layers
        missing = [i for i in layers if any(f"{tower}.encoder.layers.{i}.mlp.{t}" not in theirs for t in _FFN_TENSORS)]
        if missing:
            raise ValueError(
                f"{name} has no whole FFN for block(s) {missing} of the {tower}, which are MoE blocks. {advice}"
            )


def stretch_positions(old: torch.Tensor, keep: int = 20, factor: int = 4) -> torch.Tensor:
    """Long-CLIP's knowledge-preserving stretch: [77,D] -> [248,D] with the defaults.

    The first `keep` positions are well trained and stay; the rest are stretched `factor` times linearly, the last
    `factor - 1` extrapolated: p76 + (f/4)(p76 - p75)  (Zhang et al. 2024, "Long-CLIP").
    """
    if old.shape[0] <= keep + 1:
        raise ValueError(f"cannot stretch {old.shape[0]} positions of which {keep} are kept.")
    kept, rest = old[:keep], old[keep:]
    following = torch.cat([rest[1:], (2 * rest[-1] - rest[-2])[None]])  # one past the end, extrapolated
    steps = torch.arange(factor, dtype=old.dtype, device=old.device)[None, :, None] / factor
    stretched = rest[:, None] + steps * (following - rest)[:, None]
    return torch.cat([kept, stretched.flatten(0, 1)])


def with_text_positions(model: CLIPMoEModel, positions: int) -> CLIPMoEModel:
    """Give the text tower `positions` positions, in place: unchanged when it has them, stretched 77 -> 248.

    Raises ValueError for a length that no known stretch gives.
    """
    embedding = model.text_model.embeddings.position_embedding
    current = embedding.num_embeddings
    if current == positions:
        return model
    stretched = stretch_positions(embedding.weight.data) if current > 21 else None
    if stretched is None or stretched.shape[0] != positions:
        possible = "" if stretched is None else f" or {stretched.shape[0]} (stretched as in Long-CLIP)"
        raise ValueError(f"the text tower has {current} positions; it can have {current}{possible}, not {positions}.")
    model.text_model.embeddings.position_embedding = torch.nn.Embedding.from_pretrained(stretched, freeze=False)
    model.config.text_config.max_position_embeddings = positions
    return model
