"""A CLIP or CLIP-MoE with its tokenizer and pixel statistics, as a model directory: load and save.

A directory is an ordinary transformers one (docs/design.md). A CLIP-MoE (`model_type` clip_moe) carries its modeling
files, so that `AutoModel.from_pretrained(dir, trust_remote_code=True)` works without this package; a dense
model is written as a plain transformers CLIP. Weights are read and written by name here, never through
`from_pretrained`, so that no renaming of some transformers version comes between.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .bundle import OPENAI_MEAN, OPENAI_STD, ClipBundle
from .configuration_clipmoe import EXPERT_FIELDS, CLIPMoEConfig
from .files import atomic_directory, load_tensors, read_json, save_shards, write_json
from .model_card import CARD, license_of, model_card
from .modeling_clipmoe import CLIPMoEModel
from .tokenizer import has_tokenizer, load_tokenizer, open_clip_tokenizer, save_tokenizer

_TOWER_FIELDS = (
    "hidden_size intermediate_size projection_dim num_hidden_layers num_attention_heads hidden_act layer_norm_eps "
    "attention_dropout initializer_range initializer_factor"
).split()
_TEXT_FIELDS = "vocab_size max_position_embeddings pad_token_id bos_token_id eos_token_id".split()
_FIELDS = {
    "text_config": [*_TOWER_FIELDS, *_TEXT_FIELDS],
    "vision_config": [*_TOWER_FIELDS, "num_channels", "image_size", "patch_size"],
}
MODELING_FILES = tuple(sorted(path.name for path in Path(__file__).parent.glob("*_clipmoe.py")))
"""What a saved model carries, so that it loads without this package."""
AUTO_MAP = {
    "AutoConfig": "configuration_clipmoe.CLIPMoEConfig",
    "AutoModel": "modeling_clipmoe.CLIPMoEModel",
    "AutoModelForZeroShotImageClassification": "modeling_clipmoe.CLIPMoEModel",
}
_MAX_SHARD_BYTES = 5 * 10**9  # the hub's usual shard size


# ------------------------------------------------------------------------------------------------------------- loading


def load_directory(directory: Path, name: str, quick_gelu: bool | None, num_experts_per_tok: int | None) -> ClipBundle:
    """A bundle from a directory of ours or of transformers; the two options as in `load_bundle`."""
    config = override(read_config(directory), quick_gelu, num_experts_per_tok)
    model = build_model(config, load_tensors(directory), str(directory))
    mean, std = pixel_statistics(directory)
    length = config.text_config.max_position_embeddings
    if has_tokenizer(directory):
        tokenizer = load_tokenizer(directory, length)
    else:
        tokenizer = open_clip_tokenizer(length)
    return ClipBundle(model, tokenizer, mean, std, name, license_of(directory))


def read_config(directory: str | Path) -> CLIPMoEConfig:
    """Configuration of a model directory: ours, or a transformers CLIP's as a dense CLIPMoEConfig."""
    path = Path(directory) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{directory} is not a model directory: it has no config.json.")
    raw = read_json(path)
    model_type = raw.get("model_type")
    if model_type == CLIPMoEConfig.model_type:
        return CLIPMoEConfig.from_dict(raw)
    if model_type != "clip":
        hint = " It is a vision tower without its text tower." if model_type == "clip_vision_model" else ""
        raise ValueError(
            f"{directory} is not a CLIP: its model_type is {model_type!r}, supported are 'clip' and 'clip_moe'.{hint} "
            "Give the directory or hub id of a whole CLIP (for instance openai/clip-vit-large-patch14-336)."
        )
    towers = {}
    for key, fields in _FIELDS.items():
        # Old hub configs say a tower twice; `*_config_dict` wins, as in transformers.
        given = {**(raw.get(key) or {}), **(raw.get(f"{key}_dict") or {})}
        towers[key] = {name: given[name] for name in fields if name in given}
    joint = {name: raw[name] for name in ("projection_dim", "logit_scale_init_value") if name in raw}
    return CLIPMoEConfig(**towers, **joint, num_experts=1)


def override(config: CLIPMoEConfig, quick_gelu: bool | None, num_experts_per_tok: int | None) -> CLIPMoEConfig:
    """`config` with another activation or another K, in place. Raises ValueError for a K that cannot be."""
    towers = (config.vision_config, config.text_config)
    if quick_gelu is not None:
        for tower in towers:
            tower.hidden_act = "quick_gelu" if quick_gelu else "gelu"
    if num_experts_per_tok is not None:
        if not 1 <= num_experts_per_tok <= config.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {num_experts_per_tok}, but this model has {config.num_experts} expert(s): "
                f"choose a number from 1 to {config.num_experts}."
            )
        for part in (config, *(tower for tower in towers if tower.moe_layers)):
            part.num_experts_per_tok = num_experts_per_tok
    return config


WRONG_DIRECTORY = (
    "The file is incomplete, or config.json belongs to other weights: copy or download the whole directory again."
)


def build_model(
    config: CLIPMoEConfig, state: Mapping[str, torch.Tensor], where: str, advice: str = WRONG_DIRECTORY
) -> CLIPMoEModel:
    """A model of exactly these tensors, fp32 and in eval mode; names and shapes must fit (position_ids are dropped).

    Raises ValueError naming the first missing, unexpected or misshapen tensors of `where`, and ending in `advice`.
    """
    state = {name: tensor for name, tensor in state.items() if not name.endswith("position_ids")}
    with torch.device("meta"):  # no time or memory for random weights that are replaced at once
        model = CLIPMoEModel(config)
    _check_fit(model, {name: tuple(tensor.shape) for name, tensor in state.items()}, where, advice)
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in state.items()}, assign=True)
    return model.eval()


def check_shapes(config: CLIPMoEConfig, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise ValueError as `build_model` does, by names and shapes alone: no weight is read."""
    with torch.device("meta"):
        model = CLIPMoEModel(config)
    kept = {name: shape for name, shape in shapes.items() if not name.endswith("position_ids")}
    _check_fit(model, kept, where, WRONG_DIRECTORY)


def _check_fit(model: CLIPMoEModel, state: Mapping[str, tuple[int, ...]], where: str, advice: str) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shared = [name for name in expected if name in state]
    wrong = [name for name in shared if state[name] != expected[name]]
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [f"{n} {list(state[n])} instead of {list(expected[n])}" for n in wrong],
    }
    found = [
        f"{len(names)} {kind}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        for kind, names in problems.items()
        if names
    ]
    if found:
        raise ValueError(f"the weights of {where} do not fit its config. Tensors {'; '.join(found)}. {advice}")


def pixel_statistics(directory: Path) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """image_mean and image_std of a directory: preprocessor_config.json, or the processor_config.json that holds the
    image processor in newer transformers. OpenAI's, with a warning, when neither file says them."""
    for file in ("preprocessor_config.json", "processor_config.json"):
        if not (directory / file).exists():
            continue
        content = read_json(directory / file)
        content = content.get("image_processor", content)
        if "image_mean" in content and "image_std" in content:
            return tuple(content["image_mean"]), tuple(content["image_std"])
    warnings.warn(
        f"{directory} has no preprocessor_config.json; OpenAI CLIP's pixel mean and std are used. If the model was "
        "trained with others, put its preprocessor_config.json there.",
        stacklevel=4,
    )
    return OPENAI_MEAN, OPENAI_STD


def local_directory(source: str) -> Path:
    """The directory that `source` names, or that of a hub id after fetching it. Raises FileNotFoundError."""
    path = Path(source).expanduser()
    return path if path.is_dir() else download(source)


def download(hub_id: str) -> Path:
    """Fetch a hub model's config, tokenizer and weights (or find them in the cache) -> local directory."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    small = ["*.json", "*.txt", "README.md"]
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=[*small, "model*.safetensors"]))
        if not list(folder.glob("model*.safetensors")):  # older models have only the pickled file
            folder = Path(snapshot_download(hub_id, allow_patterns=[*small, "pytorch_model*.bin"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{hub_id} is no directory on this machine, and fetching it from the hub failed "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the name and the connection, or download "
            "the model elsewhere, copy its directory here and give that path."
        ) from error
    return folder


# -------------------------------------------------------------------------------------------------------------- saving


def save_bundle(
    bundle: ClipBundle,
    directory: str | Path,
    *,
    card: Mapping[str, Any] | None = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> None:
    """Write a whole model directory, atomically; the same model gives the same bytes.

    A model with experts is written as clip_moe with its modeling files, a dense one as a plain transformers CLIP.
    card: lines for the README ("name", "base", "license", "recipe", "data" or any other key, see `model_card`).
    Raises SaveError when the write fails (what stood there before is unchanged then), and ValueError when something
    else than a model directory stands there: it would be replaced as a whole.
    """
    config = bundle.model.config
    _refuse_other_contents(Path(directory))
    with atomic_directory(directory) as folder:
        write_json(folder / "config.json", config_dict(config))
        pixels = preprocessor(bundle.image_size, bundle.image_mean, bundle.image_std)
        write_json(folder / "preprocessor_config.json", pixels)
        save_shards(sorted(bundle.model.state_dict().items()), folder, max_shard_bytes)
        save_tokenizer(bundle.tokenizer, folder, bundle.context_length)
        facts = {"name": bundle.name, "base": bundle.name, "base_license": bundle.license, **(card or {})}
        (folder / CARD).write_text(model_card(config, facts), encoding="utf-8")
        if not config.is_dense:
            copy_modeling_files(folder)


def copy_modeling_files(folder: Path) -> None:
    for file in MODELING_FILES:
        shutil.copyfile(Path(__file__).with_name(file), folder / file)


def _refuse_other_contents(directory: Path) -> None:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    config = directory / "config.json"
    if config.is_file() and read_json(config).get("model_type") in ("clip", CLIPMoEConfig.model_type):
        return
    raise ValueError(
        f"{directory} exists and is not a CLIP model directory; saving would replace all of it. Choose another output."
    )


def config_dict(config: CLIPMoEConfig) -> dict[str, Any]:
    """What `config.json` holds: written field by field, because each transformers version adds its own, and paths."""
    dense = config.is_dense
    content: dict[str, Any] = {
        "architectures": ["CLIPModel" if dense else "CLIPMoEModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": config.logit_scale_init_value,
        "model_type": "clip" if dense else CLIPMoEConfig.model_type,
        "projection_dim": config.projection_dim,
    }
    for key, fields in _FIELDS.items():
        tower = getattr(config, key)
        extra = () if dense else (*EXPERT_FIELDS, "moe_layers", *(("delta_ranks",) if tower.delta_ranks else ()))
        kind = key.replace("config", "model")
        content[key] = {name: getattr(tower, name) for name in (*fields, *extra)}
        content[key]["model_type"] = f"clip_{kind}" if dense else f"clip_moe_{kind}"
        content[key] = dict(sorted(content[key].items()))
    if not dense:
        content["auto_map"] = AUTO_MAP
        content.update({name: getattr(config, name) for name in EXPERT_FIELDS})
    return dict(sorted(content.items()))


def preprocessor(size: int, mean: Sequence[float], std: Sequence[float], **others: Any) -> dict[str, Any]:
    """preprocessor_config.json of transformers' CLIPImageProcessor: shorter side to `size` pixels (bicubic), centre
    crop, mean and std. others: fields to add or to change."""
    settings = {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(mean),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(std),
        "processor_class": "CLIPProcessor",
        "resample": 3,  # PIL's number for bicubic
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }
    return dict(sorted({**settings, **others}.items()))
