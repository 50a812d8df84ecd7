"""Checkpoints in OpenAI naming, the official CLIP-MoE's among them, <-> our bundles."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .bundle import ClipBundle
from .configuration_clipmoe import CLIPMoEConfig
from .files import load_foreign_pt, load_tensors
from .model_directory import build_model
from .openai_names import (
    BLOCK,
    LONG_POSITIONS,
    OPENAI_NUMBERS,
    TOWER_PREFIXES,
    State,
    depth,
    from_openai_names,
    to_openai_names,
)
from .tokenizer import open_clip_tokenizer

CLIP_VOCABULARY = 49408
HEAD_WIDTH = 64  # of every OpenAI ViT and of the official CLIP-MoE; open_clip's config says its own
LARGEST = 1024  # the image tower of OpenAI's ViT-L; open_clip's ViT-H of 1280 has heads of 80, and the same tensors


def to_openai_state(bundle: ClipBundle) -> dict[str, torch.Tensor]:
    """A bundle as the state dict that the official CLIP-MoE code (or, for a dense 77-token CLIP, OpenAI's) loads.

    Raises ValueError when those codes could not represent the model: they read widths and depths from the tensors and
    take everything else (head width, activation, FFN width, which blocks have experts) for granted.
    """
    config = bundle.model.config
    problems = []
    for name in ("vision_config", "text_config"):
        tower = getattr(config, name)
        if tower.num_attention_heads != tower.hidden_size // HEAD_WIDTH or tower.hidden_size % HEAD_WIDTH:
            problems.append(f"{name}: heads are not {HEAD_WIDTH} wide")
        if tower.hidden_act != "quick_gelu":
            problems.append(f"{name}: the activation is {tower.hidden_act}, not quick_gelu")
        if tower.intermediate_size != 4 * tower.hidden_size:
            problems.append(f"{name}: the FFN is not 4 times as wide as the tower")
        if tower.delta_ranks:
            problems.append(f"{name}: its experts are compressed; convert the model that it was compressed from")
        if tower.fusion_gate and tower.moe_layers:
            problems.append(f"{name}: a CLIP-FMoE, whose base FFN and fusion gate it has no place for")
        first = tower.num_hidden_layers - len(tower.moe_layers)
        if tower.moe_layers != list(range(first, tower.num_hidden_layers)):
            problems.append(f"{name}: the blocks with experts {tower.moe_layers} are not the tower's last ones")
    vision, text = config.vision_config, config.text_config
    if not config.is_dense and len(text.moe_layers) != min(len(vision.moe_layers), text.num_hidden_layers):
        problems.append("the towers have different numbers of blocks with experts")
    if not config.is_dense and bundle.context_length != LONG_POSITIONS:
        problems.append(f"{bundle.context_length} text positions, the official CLIP-MoE has {LONG_POSITIONS}")
    if problems:
        raise ValueError(f"the official layout cannot hold this model: {'; '.join(problems)}. Keep our directory.")
    return to_openai_names(bundle.model.state_dict())


# ------------------------------------------------------------------------------------------- checkpoints without a name


def load_checkpoint(
    path: str | Path, *, num_experts_per_tok: int | None = None, quick_gelu: bool | None = None
) -> ClipBundle:
    """A checkpoint file in OpenAI naming: the official CLIP-MoE, one of its dense stage files, or an OpenAI CLIP.

    Heads are 64 wide (as in all of these). E and the blocks with experts are read from the tensors; K is not in the
    file, so `num_experts_per_tok` must be given when there are experts.
    Raises ValueError when it is another model, when K is missing, or when the activation cannot be known.
    """
    state = read_state(Path(path))
    check_kind(state, str(path))
    experts = _experts_of(state, str(path))
    if experts and num_experts_per_tok is None:
        raise ValueError(
            f"{path} is a CLIP-MoE with {experts['num_experts']} experts, but the file does not say how many of them "
            "a token uses. Say it with --num-experts-per-tok (the published models were trained with 2)."
        )
    if not experts and num_experts_per_tok is not None:
        raise ValueError(f"{path} is a dense CLIP, it has no experts: leave --num-experts-per-tok out.")
    if quick_gelu is None:
        # open_clip's dense files look the same and mostly want gelu; a wrong guess would only lower the scores.
        if not (experts or "positional_embedding_res" in state or any(name in state for name in OPENAI_NUMBERS)):
            raise ValueError(
                f"{path} is a dense CLIP that does not say its activation. If it is open_clip's, give its name "
                "(--open-clip-name, for instance ViT-L-14); otherwise --quick-gelu (OpenAI's CLIP) or --no-quick-gelu."
            )
        quick_gelu = True
    widths = [state["visual.conv1.weight"].shape[0], state["ln_final.weight"].shape[0]]
    if any(width % HEAD_WIDTH for width in widths) or widths[0] > LARGEST:
        raise ValueError(
            f"{path} has towers {widths[0]} and {widths[1]} wide, and does not say how many heads they have: only "
            f"OpenAI's ViTs (up to {LARGEST}) are known to have them of {HEAD_WIDTH}. If it is open_clip's, give its "
            "name (--open-clip-name, for instance ViT-H-14)."
        )
    config = _config_from_shapes(state, quick_gelu, experts, num_experts_per_tok)
    advice = "The file is incomplete (copy or download it again), or its CLIP is built otherwise than OpenAI's."
    return bundle_of(config, state, str(path), Path(path).stem, advice)


CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which trainers keep a model's tensors, beside the epoch, the optimizer's state and the like."""


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or foreign .pt file, taken out of what trainers and wrappers put around them."""
    state: Any = load_tensors(path) if path.suffix == ".safetensors" else load_foreign_pt(path)
    while isinstance(state, Mapping):
        inner = [state[key] for key in CONTAINERS if isinstance(state.get(key), Mapping)]
        if not inner:
            break
        state = inner[0]
    others = {"all of it": state}
    if isinstance(state, Mapping):
        others = {name: value for name, value in state.items() if not isinstance(value, torch.Tensor)}
    if others:
        shown = ", ".join(f"{name} ({type(value).__name__})" for name, value in list(others.items())[:5])
        raise ValueError(
            f"{path} does not hold a plain state dict (names and tensors): {shown} is something else. Ask its author "
            "for the model's state_dict()."
        )
    empty = [name for name, tensor in state.items() if tensor.numel() == 0]
    if empty:
        raise ValueError(
            f"{path} holds tensors without numbers ({', '.join(empty[:3])}): one part of a model that DeepSpeed (ZeRO "
            "3) or FSDP divided. Put the parts together first; DeepSpeed writes a zero_to_fp32.py beside them."
        )
    return _plain_names(state, str(path))


_OUTER = re.compile(r"(?:(?:module|_orig_mod)\.)*")  # what DDP and torch.compile put before every name
_INNER = re.compile(r"(?<=\.)(?:module|_orig_mod)\.")  # and what they put around a part of the model
_VISUAL = re.compile(r"((?:[^.]+\.)*?)visual\.")  # before it stands what a class around the CLIP puts: "clip."


def _plain_names(state: State, where: str) -> dict[str, torch.Tensor]:
    """`state` without the prefixes that all of its names have. Raises ValueError when only some have them."""
    first = next(iter(state), "")
    shared = _OUTER.match(first)[0]
    plain: dict[str, str] = {}
    for name in state:
        short = _INNER.sub("", name.removeprefix(shared))
        if _OUTER.match(name)[0] != shared or short in plain:
            raise _mixture(where, plain.get(short, first), name)
        plain[short] = name
    clips: dict[str, str] = {}
    for name in plain:
        before = _VISUAL.match(name)
        if before:
            clips.setdefault(before[1], name)
    prefix = next(iter(clips), "")
    others = [*list(clips.values())[1:], *(name for name in plain if not name.startswith(prefix))]
    if others:
        raise _mixture(where, plain[clips[prefix]], plain[others[0]])
    return {name.removeprefix(prefix): state[original] for name, original in plain.items()}


def _mixture(where: str, name: str, other: str) -> ValueError:
    return ValueError(
        f"{where} holds {name} beside {other}: more than one model, or parts of several. Save the state_dict() of the "
        "CLIP alone."
    )


def check_kind(state: State, where: str) -> None:
    """Raises ValueError, saying what the file is, unless it is a ViT-CLIP in OpenAI naming."""
    if any(name.endswith("vision_model.embeddings.patch_embedding.weight") for name in state):
        raise ValueError(f"{where} has transformers' names: give the directory it lies in, config.json included.")
    if "logit_bias" in state:
        raise ValueError(f"{where} has a logit_bias, as SigLIP's loss trains one; our model has no place for it.")
    others = {
        "CoCa": ("text_decoder.", "text.cls_emb"),
        "a CLIP with a ResNet": ("visual.layer1.", "visual.attnpool."),
        "a CLIP with a timm image tower": ("visual.trunk.",),
        "a CLIP with another text tower": ("text.", "bert."),
    }
    for kind, prefixes in others.items():
        if any(name.startswith(prefixes) for name in state):
            raise ValueError(f"{where} is {kind}; only CLIPs with OpenAI's two transformers can be converted.")
    needed = ("visual.conv1.weight", "visual.proj", "token_embedding.weight", "text_projection", "ln_final.weight")
    missing = [name for name in (*needed, "visual.positional_embedding", "positional_embedding") if name not in state]
    if missing:
        raise ValueError(
            f"{where} is no CLIP in OpenAI naming: it lacks {', '.join(missing[:5])} (its first tensors: "
            f"{', '.join(list(state)[:3])}). A checkpoint with only some of the weights cannot be converted."
        )


def _experts_of(state: State, where: str) -> dict[str, Any]:
    """`num_experts` and the blocks with experts of each tower, read from the gates; {} for a dense model."""
    blocks: dict[str, list[int]] = {tower: [] for tower in TOWER_PREFIXES.values()}
    counts = set()
    for name, tensor in state.items():
        block = BLOCK.match(name)
        if block and block[3] == "gate.weight":
            blocks[TOWER_PREFIXES[block[1]]].append(int(block[2]))
            counts.add(tensor.shape[0])
    if not counts:
        return {}
    if len(counts) > 1:
        raise ValueError(f"{where} has blocks with different numbers of experts ({sorted(counts)}): not supported.")
    return {"num_experts": counts.pop(), "moe_layers": {tower: sorted(found) for tower, found in blocks.items()}}


def _config_from_shapes(
    state: State, quick_gelu: bool, experts: dict[str, Any], num_experts_per_tok: int | None
) -> CLIPMoEConfig:
    """The config of a model in OpenAI naming with heads of 64, as the official `build_model` infers it."""
    routing = {"num_experts": 1}
    if experts:
        routing = {"num_experts": experts["num_experts"], "num_experts_per_tok": num_experts_per_tok}
    widths = {"vision_model": state["visual.conv1.weight"].shape[0], "text_model": state["ln_final.weight"].shape[0]}
    towers: dict[str, dict[str, Any]] = {}
    for prefix, tower in TOWER_PREFIXES.items():
        towers[tower] = {
            "hidden_size": widths[tower],
            "intermediate_size": 4 * widths[tower],
            "num_hidden_layers": depth(state, prefix),
            "num_attention_heads": widths[tower] // HEAD_WIDTH,
            "hidden_act": "quick_gelu" if quick_gelu else "gelu",
            "moe_layers": experts["moe_layers"][tower] if experts else None,
        }
    patch = state["visual.conv1.weight"].shape[-1]
    side = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    towers["vision_model"].update(patch_size=patch, image_size=patch * side)
    towers["text_model"].update(text_ids(state["token_embedding.weight"].shape[0]))
    towers["text_model"]["max_position_embeddings"] = state["positional_embedding"].shape[0]
    return CLIPMoEConfig(
        vision_config=towers["vision_model"],
        text_config=towers["text_model"],
        projection_dim=state["text_projection"].shape[1],
        **routing,
    )


def text_ids(vocab_size: int) -> dict[str, int]:
    """Both codes pool at the largest id of a caption, which is the vocabulary's last: the end of text."""
    if vocab_size != CLIP_VOCABULARY:
        raise ValueError(
            f"the checkpoint has a vocabulary of {vocab_size} tokens, CLIP's tokenizer has {CLIP_VOCABULARY}: models "
            "with another tokenizer cannot be converted."
        )
    return {"vocab_size": vocab_size, "bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1}


def bundle_of(config: CLIPMoEConfig, state: State, where: str, name: str, advice: str) -> ClipBundle:
    model = build_model(config, from_openai_names(state, where), where, advice)
    return ClipBundle(model, open_clip_tokenizer(config.text_config.max_position_embeddings), name=name)
