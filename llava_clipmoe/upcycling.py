"""Dense CLIP + the FFNs of its stages -> CLIP-MoE or CLIP-FMoE; sparse upcycling; 77 -> 248 text positions.

Everything that is not an FFN comes from the base. CLIP-MoE: expert j is the FFN of stage j, expert 0 the base's own
(CLIP-MoE paper, section 3.2). CLIP-FMoE: every expert was trained, and the base's FFN stands beside them behind a gate.
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


def expert_state(moe: State, expert: int = 0) -> dict[str, torch.Tensor]:
    """One expert's FFNs under the names of dense ones: what a stage directory holds, and `upcycle` and `fuse` take.

    moe: the state dict of a CLIP-MoE or CLIP-FMoE. Only its MoE blocks are in the result. Raises ValueError when
    there is no such expert.
    """
    stacked = {name: tensor for name, tensor in moe.items() if ".mlp.experts." in name}
    if not stacked or not all(0 <= expert < len(tensor) for tensor in stacked.values()):
        count = len(next(iter(stacked.values()))) if stacked else 0
        raise ValueError(f"there is no expert {expert}: this state dict has {count} experts, counted from 0.")
    return {name.replace(".mlp.experts.", ".mlp."): tensor[expert].clone() for name, tensor in stacked.items()}


def is_router_or_gate(name: str) -> bool:
    """True for what unification (stage 2 of CLIP-FMoE) trains: the routers and the fusion gates. Without gates: the
    routers, which are all that the last step of Diversified Multiplet Upcycling trains."""
    return ".mlp.router." in name or ".mlp.fusion_gate." in name


def is_expert_or_gate(name: str) -> bool:
    """True for what stage 1 of CLIP-FMoE trains: the expert beside the base, and the gate between them."""
    return ".mlp.experts." in name or ".mlp.fusion_gate." in name


def default_fusion_layers(num_layers: int) -> list[int]:
    """CLIP-FMoE's placement, "odd blocks of the second half of the encoder" -> indices into the blocks, from 0.

    "Odd" is read as people count, from 1: the 13th, 15th, ... 23rd of 24 blocks. The sources do not say; counted from
    0, one of them would be the last block, which LLaVA (hidden state -2) does not run: of 4 blocks the only one.
    24 blocks -> 12, 14, 16, 18, 20, 22; 12 blocks -> 6, 8, 10. The middle block of an odd number counts as second half.
    Raises ValueError where there is no such block: of 2 blocks, or none.
    """
    layers = [layer for layer in range(num_layers // 2, num_layers) if (layer + 1) % 2]
    if not layers:
        raise ValueError(
            f"a tower of {num_layers} blocks has no odd block in its second half: name its MoE blocks (moe_layers)."
        )
    return layers


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

    `config.num_experts` must be `len(stages) + 1`. Raises ValueError when a stage's FFNs do not fit the base, or when
    `config` asks for a fusion gate (that is `fuse`).
    """
    if _gated(config):
        raise ValueError(
            "the config has fusion_gate on, upcycling makes a CLIP-MoE without one: use fuse(), or turn it off."
        )
    if config.num_experts != len(stages) + 1:
        raise ValueError(
            f"num_experts is {config.num_experts}, but the base and {len(stages)} stages make "
            f"{len(stages) + 1} experts."
        )
    dense = base.state_dict()
    for number, stage in enumerate(stages, start=1):
        check_stage(dense, stage, f"stage {number}", config)
    return _assemble(base, [dense, *stages], config, seed)


def fuse(base: CLIPMoEModel, experts: Sequence[State], config: CLIPMoEConfig, seed: int = 0) -> CLIPMoEModel:
    """A CLIP-FMoE: the `experts` (FFNs under dense names) beside the FFNs of `base`, behind fresh routers and gates.

    config: has `fusion_gate`, and `num_experts` is `len(experts)` (the base is none of them); only the FFNs of its MoE
    blocks are taken from the experts. The routers come from `seed`, the gates start at `fusion_gate_init`. With one
    expert, a copy of the base's FFN, it is the model that stage 1 starts from.
    Raises ValueError when an expert's FFNs do not fit the base, or their number or the config does not fit.
    """
    if not _gated(config):
        raise ValueError("a CLIP-FMoE needs fusion_gate=True in its config; without a gate, use upcycle().")
    if config.num_experts != len(experts):
        raise ValueError(
            f"num_experts is {config.num_experts}, but {len(experts)} experts were given (the base counts as none)."
        )
    dense = base.state_dict()
    for number, expert in enumerate(experts):
        check_stage(dense, expert, f"expert {number}", config)
    return _assemble(base, experts, config, seed)


def _gated(config: CLIPMoEConfig) -> bool:
    return any(tower.fusion_gate and tower.moe_layers for tower in (config.vision_config, config.text_config))


def _assemble(base: CLIPMoEModel, experts: Sequence[State], config: CLIPMoEConfig, seed: int) -> CLIPMoEModel:
    """The experts' FFNs stacked, fresh routers and gates, and all else from the base."""
    dense = base.state_dict()
    model = empty_moe(config, seed, dtype=next(base.parameters()).dtype)
    with torch.no_grad():
        for name, target in model.state_dict().items():
            if ".mlp.experts." in name:
                for number, expert in enumerate(experts):
                    target[number].copy_(expert[name.replace(".mlp.experts.", ".mlp.")])
            elif not is_router_or_gate(name):
                target.copy_(dense[name.replace(".mlp.base.", ".mlp.")])
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
