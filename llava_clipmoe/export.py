"""A LLaVA directory of upstream's format as one that transformers alone can run: `llava-clipmoe export-hf`.

    llava-clipmoe export-hf checkpoints/llava-v1.5-7b-clipmoe llava-clipmoe-hf

The output is a `LlavaForConditionalGeneration` whose vision model is CLIPMoEVisionModel (for a dense tower,
transformers' CLIPVisionModel), with its LlavaProcessor; a LLaVA that cuts pictures into tiles (LLaVA-1.6's anyres)
becomes a `LlavaNextForConditionalGeneration` with a LlavaNextProcessor. Weights go through in shards, each in the dtype
it has, so that a 7B model needs a few gigabytes of memory. Tensors get the names that transformers 4.37 saved
(`language_model.model.*`, `vision_tower.vision_model.*`): version 5 renames them when it loads.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from . import export_files
from .configuration_clipmoe import CLIPMoEConfig
from .conversations import conversation_for, kind_of
from .export_text import HEAD, LANGUAGE_MODELS, text_config, text_shapes
from .export_tiles import MODEL_TYPES, family_of, grid_pinpoints, tiles_not_expressible
from .files import atomic_directory, iter_tensors, read_json, save_shards, weight_files, write_json
from .model_directory import WRONG_DIRECTORY, config_dict, local_directory, read_config
from .modeling_clipmoe import CLIPMoEVisionModel
from .tower_registry import resolve
from .tower_tuning import MARK, load_tuned

_SHARD_BYTES = 2 * 10**9  # a shard is in memory twice while it is written
_VOCABULARY_MULTIPLE = 64  # as transformers' own conversion pads, for the speed of the last matrix product

_EMBEDDING = "model.embed_tokens.weight"
_NEWLINE = "image_newline"
_TOWER = "model.vision_tower.vision_tower."
_PROJECTOR = {
    "model.mm_projector.0.": "multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "multi_modal_projector.linear_2.",
}


@dataclass(frozen=True)
class Source:
    """What is exported: an upstream LLaVA directory and the model directory of its vision tower."""

    directory: Path
    config: dict[str, Any]
    tower: Path
    clip: CLIPMoEConfig

    @property
    def family(self) -> str:
        """How the names of transformers' classes for it begin: Llava or LlavaNext."""
        return family_of(self.config)

    @property
    def tower_from_checkpoint(self) -> bool:
        """True where the LLaVA checkpoint's own copy of the tower counts: upstream loads it when that tower was trained
        too. Otherwise the copy is ignored, as upstream ignores it; what LLaVA trained of a CLIP-MoE lies in a file of
        its own (`tuned`)."""
        return bool(self.config.get("unfreeze_mm_vision_tower")) and self.clip.is_dense

    @functools.cached_property
    def tuned(self) -> dict[str, torch.Tensor]:
        """What LLaVA's stage 2 trained of the tower, by name."""
        return load_tuned(str(self.directory)) if self.config.get(MARK) else {}


def export_hf(
    directory: str | Path, output: str | Path, *, vision_tower: str | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write the LLaVA of `directory` to `output` for transformers; -> its config.json.

    vision_tower: name or directory to use for the one that LLaVA's config names (it must be the same tower).
    overwrite: replace an earlier export at `output`; anything else there is never replaced.
    Raises ValueError for what is no LLaVA or cannot be expressed exactly, FileNotFoundError for missing files,
    UnknownTower for an unregistered tower and SaveError for a failed write; `output` is then what it was.
    """
    _check_output(Path(output), overwrite)
    source = open_source(Path(directory), vision_tower)
    expected = _expected_shapes(source)
    with atomic_directory(output) as folder:
        tokenizer = export_files.write_tokenizer(source.directory, folder)
        image_token = tokenizer.convert_tokens_to_ids(export_files.IMAGE)
        rows = expected["language_model.model.embed_tokens.weight"][0]
        if image_token >= rows:
            rows = -(-(image_token + 1) // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
        config = llava_config(source, image_token, rows)
        write_json(folder / "config.json", config)
        export_files.write_processor(folder, source.config, source.tower, source.clip.vision_config)
        export_files.write_generation_config(source.directory, folder, tokenizer)
        save_shards(_grown(_checked(_tensors(source), expected, source), rows), folder, _SHARD_BYTES)
        export_files.write_card(folder, source.config, source.clip, conversation_for(source.directory))
    return config


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    config = output / "config.json"
    is_llava = config.is_file() and read_json(config).get("model_type") in MODEL_TYPES.values()
    if not (is_llava and (output / "processor_config.json").is_file()):  # upstream's oldest are of type llava, too
        raise ValueError(f"{output} exists and is no earlier export; it is not replaced. Choose another output.")
    if not overwrite:
        raise ValueError(f"{output} holds an earlier export. Add --overwrite to replace it, or choose another output.")


# ------------------------------------------------------------------------------------------------------------- reading


def open_source(directory: Path, vision_tower: str | None = None) -> Source:
    """Read and check the configurations of a LLaVA directory and of its tower, and that their weights are there."""
    config = read_llava_config(directory)
    tower = _tower_directory(vision_tower or config["mm_vision_tower"])
    clip = read_config(tower)
    try:
        weight_files(directory)
    except FileNotFoundError as error:
        if not (directory / "mm_projector.bin").is_file():
            raise
        raise FileNotFoundError(f"{error} It holds a projector alone (stage 1): export what stage 2 wrote.") from error
    weight_files(tower)
    source = Source(directory, config, tower, clip)
    _ = source.tuned  # raises where it is missing
    if config.get("mm_hidden_size") != clip.vision_config.hidden_size:
        raise ValueError(
            f"{tower} is another tower than the one {directory} was trained with: its features are "
            f"{clip.vision_config.hidden_size} wide, the projector reads {config.get('mm_hidden_size')}."
        )
    return source


def read_llava_config(directory: Path) -> dict[str, Any]:
    """config.json of an upstream LLaVA. Raises ValueError for everything that would not be exported exactly."""
    if (directory / "adapter_config.json").is_file():
        raise ValueError(
            f"{directory} holds LoRA weights only. Merge them into their base with LLaVA's own "
            "scripts/merge_lora_weights.py, then export what it wrote."
        )
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is not a LLaVA directory: it has no config.json.")
    config = read_json(path)
    if kind_of(config) not in LANGUAGE_MODELS or not config.get("mm_vision_tower"):
        raise ValueError(
            f"{directory} is not a LLaVA of upstream's format: its model_type is {config.get('model_type')!r}, "
            "expected 'llava_llama', 'llava_qwen2' or 'llava_qwen3' and the field mm_vision_tower. Give the directory "
            "that LLaVA's stage 2 wrote."
        )
    problems = list(_not_expressible(config))
    if problems:
        raise ValueError(f"{directory} cannot be exported with the same answers: {'; '.join(problems)}.")
    return config


def _not_expressible(config: Mapping[str, Any]) -> Iterator[str]:
    """What transformers' LlavaForConditionalGeneration and LlavaNextForConditionalGeneration have no place for."""
    projector = config.get("mm_projector_type", "linear")  # upstream's default
    if projector != "mlp2x_gelu":
        yield (
            f"its projector is {projector!r}, and transformers' LLaVAs have exactly two layers with a GELU "
            "between (mlp2x_gelu); no other projector can be written as that"
        )
    yield from tiles_not_expressible(config)
    if config.get("s2"):
        yield "its tower looks on several scales (S2), which transformers' LLaVAs cannot do"
    if config.get("mm_use_im_start_end"):
        yield "its prompts have tokens before and after the picture (mm_use_im_start_end)"
    select = config.get("mm_vision_select_feature", "patch")
    if select not in ("patch", "cls_patch"):
        yield f"mm_vision_select_feature is {select!r}, known are 'patch' and 'cls_patch'"
    if not isinstance(config.get("mm_vision_select_layer"), int):
        yield "its config does not say mm_vision_select_layer (LLaVA-1.5 has -2)"


def _tower_directory(name: str) -> Path:
    """The model directory behind a tower's name: a registration, a directory, or a hub id. Raises UnknownTower."""
    tower = resolve(name)
    if tower is not None and tower.s2:
        raise ValueError(f"the tower {name!r} is registered with S2, which transformers' LLaVAs cannot do.")
    return local_directory(name if tower is None else tower.source)


def _tensors(source: Source) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the export under its new name, one file after the other."""
    tied: dict[str, torch.Tensor] = {}
    for name, tensor in iter_tensors(source.directory):
        if name.startswith(_TOWER):
            if source.tower_from_checkpoint:
                yield _tower_name(name.removeprefix(_TOWER)), tensor
            continue
        if name.endswith("rotary_emb.inv_freq"):  # a buffer that transformers before 4.32 saved
            continue
        if source.config.get("tie_word_embeddings") and name in (_EMBEDDING, HEAD):
            tied[name] = tensor
            if name == HEAD:
                continue
        yield _language_or_projector_name(name), tensor
    if len(tied) == 2 and not torch.equal(*tied.values()):
        raise ValueError(
            f"{source.directory} says tie_word_embeddings, but its lm_head differs from its embeddings. Set "
            "tie_word_embeddings to false in its config.json if it was trained with two."
        )
    if not source.tower_from_checkpoint:
        for name, tensor in iter_tensors(source.tower):
            if name.startswith("vision_model."):
                yield _tower_name(name), source.tuned.get(name, tensor).to(tensor.dtype)


def _language_or_projector_name(name: str) -> str:
    if name == f"model.{_NEWLINE}":
        return _NEWLINE
    for old, new in _PROJECTOR.items():
        if name.startswith(old):
            return name.replace(old, new)
    return f"language_model.{name}"


def _tower_name(name: str) -> str:
    """transformers 5 saves a CLIPVisionModel without its inner `vision_model.`"""
    return f"vision_tower.vision_model.{name.removeprefix('vision_model.')}"


# ------------------------------------------------------------------------------------------------------- configuration


def llava_config(source: Source, image_token: int, rows: int) -> dict[str, Any]:
    """config.json of the export. `image_token`: id of <image>; `rows`: of the embedding, padding included."""
    config, strategy = source.config, export_files.select_strategy(source.config)
    content = {
        "architectures": [f"{source.family}ForConditionalGeneration"],
        "ignore_index": -100,
        "image_seq_length": source.clip.vision_config.num_patches + (strategy == "full"),
        "image_token_index": image_token,
        "model_type": MODEL_TYPES[source.family],
        "pad_token_id": config.get("pad_token_id"),
        "projector_hidden_act": "gelu",
        "text_config": text_config(config, rows),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
        "torch_dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
        "vision_config": config_dict(source.clip)["vision_config"],
        "vision_feature_layer": config["mm_vision_select_layer"],
        "vision_feature_select_strategy": strategy,
        "vocab_size": rows,
    }
    if not source.clip.is_dense:
        content["auto_map"] = export_files.auto_map(source.family)
    if source.family == "LlavaNext":
        content["image_grid_pinpoints"] = grid_pinpoints(config)
    return content


def _expected_shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the export must have, before its vocabulary grows."""
    text = text_config(source.config, source.config["vocab_size"])
    with torch.device("meta"):
        tower = CLIPMoEVisionModel(source.clip.vision_config).state_dict()
    wide, narrow = text["hidden_size"], source.clip.vision_config.hidden_size
    shapes = {f"language_model.{name}": shape for name, shape in text_shapes(text).items()}
    shapes.update({_tower_name(name): tuple(tensor.shape) for name, tensor in tower.items()})
    for layer, inputs in (("linear_1", narrow), ("linear_2", wide)):
        shapes[f"multi_modal_projector.{layer}.weight"] = (wide, inputs)
        shapes[f"multi_modal_projector.{layer}.bias"] = (wide,)
    if source.family == "LlavaNext":
        shapes[_NEWLINE] = (wide,)
    return {name: shape for name, shape in shapes.items() if not name.endswith(("inv_freq", "position_ids"))}


# ------------------------------------------------------------------------------------------------------------- writing


def _checked(
    tensors: Iterable[tuple[str, torch.Tensor]], expected: Mapping[str, tuple[int, ...]], source: Source
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass the tensors on; raise ValueError for one that is unexpected, misshapen or, at the end, missing."""
    where = f"the weights of {source.directory} (or of its tower {source.tower}) do not fit the config"
    missing = set(expected)
    for name, tensor in tensors:
        if name.endswith("position_ids"):  # a buffer that transformers 4 saved
            continue
        if name not in expected:
            raise ValueError(f"{where}: {name} has no place. {WRONG_DIRECTORY}")
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"{where}: {name} is {list(tensor.shape)} instead of {list(expected[name])}. {WRONG_DIRECTORY}"
            )
        missing.discard(name)
        yield name, tensor
    if missing:
        names = ", ".join(sorted(missing)[:5])
        raise ValueError(f"{where}: {len(missing)} tensors are missing ({names}). {WRONG_DIRECTORY}")


def _grown(tensors: Iterable[tuple[str, torch.Tensor]], rows: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors, those of the vocabulary with `rows` rows. New rows are the mean of the old ones: a logit that is the
    mean of all others is never the largest, so greedy answers stay what they were (a row of zeros could win)."""
    for name, tensor in tensors:
        if name.endswith((_EMBEDDING, HEAD)):
            mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
            tensor = torch.cat([tensor, mean.expand(rows - tensor.shape[0], -1)])
        yield name, tensor


# ------------------------------------------------------------------------------------------------------------- command


@dataclass
class ExportHF:
    """Write a LLaVA for transformers: LlavaForConditionalGeneration with its processor, the same logits.

    One that cuts pictures into tiles (anyres, spatial_unpad) becomes LlavaNextForConditionalGeneration.

    Example: llava-clipmoe export-hf checkpoints/llava-v1.5-7b-clipmoe llava-clipmoe-hf
    """

    llava: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="LLAVA_DIR")]
    """The directory that LLaVA's stage 2 wrote (merged, when it was LoRA)."""
    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """The directory to write."""
    vision_tower: Annotated[str | None, tyro.conf.arg(metavar="DIR_NAME_OR_HUB_ID")] = None
    """Where the vision tower is, if not where the LLaVA's config says: a directory, registered name or hub id."""
    overwrite: bool = False
    """Replace an earlier export."""


def main(argv: list[str]) -> int:
    """`llava-clipmoe export-hf LLAVA_DIR OUT`."""
    args = tyro.cli(ExportHF, args=argv, prog="llava-clipmoe export-hf")
    config = export_hf(args.llava, args.output, vision_tower=args.vision_tower, overwrite=args.overwrite)
    print(f"wrote {args.output}: {config['architectures'][0]} with a {config['vision_config']['model_type']}")
    return 0
