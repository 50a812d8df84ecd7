"""OpenAI's tensor names <-> ours: only names and layouts, no configuration, no files.

"OpenAI naming" is that of openai/CLIP's model.py, which open_clip and the official CLIP-MoE code (clipmoe/
model_clipmoe.py in OpenSparseLLMs/CLIP-MoE) share: `visual.transformer.resblocks.0.attn.in_proj_weight` and so on.
The official MoE blocks have `experts.E.c_fc`, `experts.E.c_proj` and `gate` in the place of `mlp`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

State = Mapping[str, torch.Tensor]

LONG_POSITIONS, KEPT_POSITIONS = 248, 20  # Long-CLIP, and so the official code: 20 rows kept, the rest stretched

TOWER_PREFIXES = {"visual.transformer.resblocks": "vision_model", "transformer.resblocks": "text_model"}
BLOCK = re.compile(r"^(visual\.transformer\.resblocks|transformer\.resblocks)\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"^experts\.(\d+)\.(c_fc|c_proj)\.(weight|bias)$")
_FFN = {"c_fc": "fc1", "c_proj": "fc2"}
_IN_BLOCK = {
    **{f"ln_{i}.{kind}": f"layer_norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")},
    **{f"attn.out_proj.{kind}": f"self_attn.out_proj.{kind}" for kind in ("weight", "bias")},
    **{f"mlp.{old}.{kind}": f"mlp.{new}.{kind}" for old, new in _FFN.items() for kind in ("weight", "bias")},
    "gate.weight": "mlp.router.weight",
}
_OUTSIDE = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")  # OpenAI's own files carry them as tensors


def from_openai_names(state: State, where: str = "the checkpoint") -> dict[str, torch.Tensor]:
    """Tensors in OpenAI naming -> ours: in_proj split in three, projections transposed, experts stacked.

    `positional_embedding_res`, where there is one, gives the text positions from row 20 on, as in the official code.
    Raises ValueError naming the tensors that no CLIP of this kind has.
    """
    ours: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    unknown = []
    for name, tensor in state.items():
        block = BLOCK.match(name)
        if block:
            prefix, inside = f"{TOWER_PREFIXES[block[1]]}.encoder.layers.{block[2]}", block[3]
            expert = _EXPERT.match(inside)
            if expert:
                stacked = f"{prefix}.mlp.experts.{_FFN[expert[2]]}.{expert[3]}"
                experts.setdefault(stacked, {})[int(expert[1])] = tensor
            elif inside in ("attn.in_proj_weight", "attn.in_proj_bias"):
                for proj, part in zip("qkv", tensor.chunk(3), strict=True):
                    ours[f"{prefix}.self_attn.{proj}_proj.{inside.rsplit('_', 1)[1]}"] = part
            elif inside in _IN_BLOCK:
                ours[f"{prefix}.{_IN_BLOCK[inside]}"] = tensor
            else:
                unknown.append(name)
        elif name == "logit_scale" and tensor.numel() == 1:
            ours[name] = tensor.reshape(())  # some codes keep it as a vector of one number
        elif name in _OUTSIDE:
            ours[_OUTSIDE[name]] = tensor
        elif name in _TRANSPOSED:
            ours[_TRANSPOSED[name]] = tensor.t()
        elif name != "positional_embedding_res" and name not in OPENAI_NUMBERS:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{where} holds tensors that a CLIP of this kind does not have: {', '.join(unknown[:5])}.")
    if "positional_embedding_res" in state:
        kept, rest = state["positional_embedding"][:KEPT_POSITIONS], state["positional_embedding_res"][KEPT_POSITIONS:]
        ours[_OUTSIDE["positional_embedding"]] = torch.cat([kept, rest])
    for name, parts in experts.items():
        if sorted(parts) != list(range(len(parts))):
            raise ValueError(f"{where} is incomplete: for {name} it has only the experts {sorted(parts)}.")
        ours[name] = torch.stack([parts[e] for e in range(len(parts))])
    return {name: tensor.contiguous() for name, tensor in ours.items()}


def depth(state: State, prefix: str) -> int:
    """Number of blocks that `state` has under `prefix`."""
    pattern = re.compile(rf"^{re.escape(prefix)}\.(\d+)\.")
    return 1 + max((int(m[1]) for m in map(pattern.match, state) if m), default=-1)


def to_openai_names(state: State) -> dict[str, torch.Tensor]:
    """Our tensors -> OpenAI naming: the reverse of `from_openai_names`, with 248 text positions written twice
    (`positional_embedding` and `positional_embedding_res`), as the official code reads them."""
    towers = {ours: theirs for theirs, ours in TOWER_PREFIXES.items()}
    in_block = {ours: theirs for theirs, ours in _IN_BLOCK.items()}
    renamed: dict[str, torch.Tensor] = {}
    for theirs, ours in _OUTSIDE.items():
        renamed[theirs] = state[ours]
    for theirs, ours in _TRANSPOSED.items():
        renamed[theirs] = state[ours].t()
    for name, tensor in state.items():
        block = re.match(r"^(vision_model|text_model)\.encoder\.layers\.(\d+)\.(.+)$", name)
        if not block:
            continue
        prefix, inside = f"{towers[block[1]]}.{block[2]}", block[3]
        expert = re.match(r"^mlp\.experts\.(fc1|fc2)\.(weight|bias)$", inside)
        if expert:
            part = {new: old for old, new in _FFN.items()}[expert[1]]
            for e, one in enumerate(tensor):
                renamed[f"{prefix}.experts.{e}.{part}.{expert[2]}"] = one
        elif inside in in_block:
            renamed[f"{prefix}.{in_block[inside]}"] = tensor
    for theirs, ours in TOWER_PREFIXES.items():
        for i in range(depth(renamed, theirs)):
            for kind in ("weight", "bias"):
                parts = [state[f"{ours}.encoder.layers.{i}.self_attn.{proj}_proj.{kind}"] for proj in "qkv"]
                renamed[f"{theirs}.{i}.attn.in_proj_{kind}"] = torch.cat(parts)
    if renamed["positional_embedding"].shape[0] == LONG_POSITIONS:
        renamed["positional_embedding_res"] = renamed["positional_embedding"].clone()
    return {name: tensor.detach().clone().contiguous() for name, tensor in renamed.items()}
