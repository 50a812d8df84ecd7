"""open_clip, OpenAI-named and official CLIP-MoE checkpoints <-> our model directory.

llava-clipmoe convert CLIP-MoE.pt clip-moe/ --num-experts-per-tok 2
llava-clipmoe convert open_clip_model.safetensors clip/ --open-clip-name ViT-L-14-336-quickgelu
llava-clipmoe convert clip-moe/ CLIP-MoE.pt --to openai
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .configuration_clipmoe import CLIPMoEConfig, active_parameters
from .files import atomic_file, load_foreign_pt, load_tensors, read_json, save_tensors
from .model_directory import OPENAI_MEAN, OPENAI_STD, ClipBundle, build_model, load_bundle, save_bundle
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
    state = _read_state(Path(path))
    _check_kind(state, str(path))
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
    return _bundle(config, state, str(path), Path(path).stem, advice)


CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which trainers keep a model's tensors, beside the epoch, the optimizer's state and the like."""


def _read_state(path: Path) -> dict[str, torch.Tensor]:
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


def _check_kind(state: State, where: str) -> None:
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
    towers["text_model"].update(_text_ids(state["token_embedding.weight"].shape[0]))
    towers["text_model"]["max_position_embeddings"] = state["positional_embedding"].shape[0]
    return CLIPMoEConfig(
        vision_config=towers["vision_model"],
        text_config=towers["text_model"],
        projection_dim=state["text_projection"].shape[1],
        **routing,
    )


def _text_ids(vocab_size: int) -> dict[str, int]:
    """Both codes pool at the largest id of a caption, which is the vocabulary's last: the end of text."""
    if vocab_size != CLIP_VOCABULARY:
        raise ValueError(
            f"the checkpoint has a vocabulary of {vocab_size} tokens, CLIP's tokenizer has {CLIP_VOCABULARY}: models "
            "with another tokenizer cannot be converted."
        )
    return {"vocab_size": vocab_size, "bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1}


def _bundle(config: CLIPMoEConfig, state: State, where: str, name: str, advice: str) -> ClipBundle:
    model = build_model(config, from_openai_names(state, where), where, advice)
    return ClipBundle(model, open_clip_tokenizer(config.text_config.max_position_embeddings), name=name)


# ----------------------------------------------------------------------------------------------------------- open_clip


def load_open_clip(name: str, checkpoint: str | Path, quick_gelu: bool | None = None) -> ClipBundle:
    """An open_clip model by its name and a checkpoint file of it (.safetensors, or a .pt that holds only tensors).

    The activation is the one of open_clip's config (names ending in -quickgelu want quick_gelu), or `quick_gelu`.
    Raises ValueError for models that are not CLIPs with OpenAI's two transformers.
    """
    settings = _open_clip_settings(name)
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    act = settings["quick_gelu"] if quick_gelu is None else quick_gelu
    state = _read_state(Path(checkpoint))
    _check_kind(state, str(checkpoint))
    is_openai = "openai" in Path(checkpoint).name.lower() or any(n in state for n in OPENAI_NUMBERS)
    if quick_gelu is None and not act and is_openai:
        warnings.warn(
            f"{checkpoint} looks like OpenAI's weights, which were trained with quick_gelu, but {name} means gelu. "
            f"Use {name}-quickgelu (or --quick-gelu) unless you know better: the wrong one lowers scores silently.",
            stacklevel=2,
        )
    size = vision["image_size"]
    config = CLIPMoEConfig(
        vision_config={
            **_open_clip_tower(vision, vision["width"] // vision["head_width"], act),
            "patch_size": vision["patch_size"],
            "image_size": size[0] if isinstance(size, (list, tuple)) else size,
        },
        text_config={
            **_open_clip_tower(text, text["heads"], act),
            **_text_ids(text["vocab_size"]),
            "max_position_embeddings": text["context_length"],
        },
        projection_dim=settings["embed_dim"],
        num_experts=1,
    )
    advice = f"Is this the checkpoint of {name}? Give the open_clip name that it was saved as."
    bundle = _bundle(config, state, f"{checkpoint} as {name}", name, advice)
    bundle.image_mean, bundle.image_std = _open_clip_statistics(Path(checkpoint))
    return bundle


def _open_clip_tower(tower: Mapping[str, Any], heads: int, quick_gelu: bool) -> dict[str, Any]:
    return {
        "hidden_size": tower["width"],
        "intermediate_size": int(tower["width"] * tower["mlp_ratio"]),
        "num_hidden_layers": tower["layers"],
        "num_attention_heads": heads,
        "hidden_act": "quick_gelu" if quick_gelu else "gelu",
    }


def _open_clip_settings(name: str) -> dict[str, Any]:
    """open_clip's config of `name` with its defaults filled in; refuses what our towers do not compute."""
    try:
        import open_clip
        from open_clip.model import CLIPTextCfg, CLIPVisionCfg
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'open_clip models need the package open_clip_torch: pip install "llava-clipmoe[train]".',
            name=error.name,
        ) from error
    settings = open_clip.get_model_config(name)
    if settings is None and name.endswith("-quickgelu"):
        settings = open_clip.get_model_config(name.removesuffix("-quickgelu"))
        settings = None if settings is None else {**settings, "quick_gelu": True}
    if settings is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.3)
        raise ValueError(f"open_clip has no model {name!r}; near it: {', '.join(near)}.")
    strange = [k for k in settings if k not in ("embed_dim", "quick_gelu", "vision_cfg", "text_cfg") and settings[k]]
    filled: dict[str, Any] = {"embed_dim": settings["embed_dim"], "quick_gelu": bool(settings.get("quick_gelu"))}
    free = {
        "vision_cfg": ("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"),
        "text_cfg": ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"),
    }
    for key, cls in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        given = settings[key]
        strange += [f"{key}.{k}" for k, v in given.items() if k not in free[key] and v != defaults.get(k)]
        filled[key] = {**defaults, **given}
    if not isinstance(filled["vision_cfg"]["layers"], int):
        strange.append("a ResNet")
    size = filled["vision_cfg"]["image_size"]
    if isinstance(size, (list, tuple)) and size[0] != size[1]:
        strange.append("an image size that is not square")
    if strange:
        raise ValueError(
            f"open_clip's {name} is not a CLIP with OpenAI's two transformers (it has {', '.join(strange[:4])}), so it "
            "cannot be converted. ResNet, timm, CoCa, SigLIP and custom text towers are out of reach."
        )
    return filled


def _open_clip_statistics(checkpoint: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Pixel mean and std: from the open_clip_config.json beside the checkpoint (hub models), else OpenAI's."""
    beside = checkpoint.with_name("open_clip_config.json")
    given = read_json(beside).get("preprocess_cfg", {}) if beside.exists() else {}
    return tuple(given.get("mean", OPENAI_MEAN)), tuple(given.get("std", OPENAI_STD))


# ------------------------------------------------------------------------------------------------------------- command


def convert(
    source: str | Path,
    output: str | Path,
    *,
    num_experts_per_tok: int | None = None,
    open_clip_name: str | None = None,
    quick_gelu: bool | None = None,
    to: str = "directory",
) -> ClipBundle:
    """Read `source` (a directory, hub id or checkpoint file), write `output`, return what was read.

    to: "directory" (ours; a dense model as a transformers CLIP), or "openai": one file in OpenAI naming, `.pt` for the
    official code or `.safetensors`.
    """
    if to not in ("directory", "openai"):
        raise ValueError(f"to must be 'directory' or 'openai', got {to!r}.")
    if to == "openai" and Path(output).suffix not in (".pt", ".safetensors"):
        raise ValueError(f"{output}: with --to openai the output is one file, whose name ends in .pt or .safetensors.")
    if Path(output).resolve() == Path(source).resolve():
        raise ValueError(f"{output} is the input itself: give another output.")
    if open_clip_name is None:
        bundle = load_bundle(source, quick_gelu=quick_gelu, num_experts_per_tok=num_experts_per_tok)
    else:
        if num_experts_per_tok is not None:
            raise ValueError("open_clip models have no experts: leave --num-experts-per-tok out.")
        bundle = load_open_clip(open_clip_name, source, quick_gelu=quick_gelu)
    if to == "directory":
        save_bundle(bundle, output, card={"base": bundle.name})
    elif Path(output).suffix == ".safetensors":
        save_tensors(output, to_openai_state(bundle), {"format": "pt"})
    else:
        state = to_openai_state(bundle)
        with atomic_file(output) as temporary:
            torch.save(state, temporary)
    return bundle


def main(argv: list[str]) -> int:
    """The command `llava-clipmoe convert`; -> exit status. Raises what `convert` raises, which cli.py prints.

    argparse, not tyro: a flag that is on, off or unsaid has a plain spelling there (--quick-gelu, --no-quick-gelu).
    """
    parser = argparse.ArgumentParser("llava-clipmoe convert", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("input", help="model directory, hub id, or checkpoint file (.pt, .safetensors)")
    parser.add_argument("output", help="the directory (or, with --to openai, the file) to write")
    parser.add_argument(
        "--num-experts-per-tok", type=int, metavar="K", help="experts a token uses; official checkpoints don't say it"
    )
    parser.add_argument("--open-clip-name", metavar="NAME", help="the input is a checkpoint of this open_clip model")
    parser.add_argument(
        "--quick-gelu", action=argparse.BooleanOptionalAction, help="the activation, if the input does not say it"
    )
    parser.add_argument("--to", choices=("directory", "openai"), default="directory", help="layout of the output")
    options = vars(parser.parse_args(argv))
    source, output = options.pop("input"), options.pop("output")
    bundle = convert(source, output, **options)
    config = bundle.model.config
    kind = "dense CLIP" if config.is_dense else f"CLIP-MoE with {config.num_experts} experts"
    print(f"wrote {output}: {kind}, {active_parameters(config)['total'] / 1e6:,.1f}M parameters")
    return 0
