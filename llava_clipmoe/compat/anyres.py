"""LLaVA-1.6's tiles ("anyres") in upstream's training: a picture is brought into the shape of the grid that suits it
best and cut into tiles of the tower's size; the whole picture in one tile comes first.

Upstream's models and runners know tiles, its train.py does not: its data set never cuts them, its batches have no
sizes, and its stage 1 does not keep the newline (`image_newline`, one learned vector after each row of patches).
Without `--image_aspect_ratio anyres` nothing of this does anything.

Shape suffixes:  R side of a tile in pixels   N tiles of a picture, the whole one first   C channels
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn

from ..files import load_foreign_pt
from ..model_directory import local_directory, read_config
from ..tower_registry import resolve
from .data import names_of_trainer
from .flags import Flags

RATIO, MERGE, GRID = "image_aspect_ratio", "mm_patch_merge_type", "image_grid_pinpoints"
"""Flags, and fields of a LLaVA's config; the first two are upstream's."""
NEWLINE = "image_newline"
RATIOS = ("square", "pad", "anyres")
MERGES = ("flat", "spatial", "spatial_unpad")
MULTIPLES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""LLaVA-1.6's grid: (width, height) in tiles."""


# ---------------------------------------------------------------------------------------------------------------- flags


def check_flags(given: Any) -> None:
    """Raise ValueError for tiles that cannot be; `given` has every field that was parsed."""
    ratio, merge = given.image_aspect_ratio, given.mm_patch_merge_type
    for flag, value, known in ((RATIO, ratio, RATIOS), (MERGE, merge, MERGES)):
        if value not in known:
            raise ValueError(f"--{flag} is {value!r}; it may be {', '.join(known[:-1])} or {known[-1]}.")
    if ratio != "anyres":
        for flag, value, default in ((MERGE, merge, "flat"), (GRID, given.image_grid_pinpoints, None)):
            if value != default:
                raise ValueError(f"--{flag} {value} needs --{RATIO} anyres: without it no picture is cut into tiles.")
        return
    if given.vision_tower is None:
        raise ValueError(f"--{RATIO} anyres needs --vision_tower.")
    if given.mm_vision_select_feature != "patch":
        raise ValueError(f"--{RATIO} anyres joins patches; --mm_vision_select_feature must be patch.")
    tower = resolve(given.vision_tower)
    if tower is None:  # upstream's own: its size is known when it is loaded
        parse_grid(given.image_grid_pinpoints)
        return
    _refuse_scales(tower.s2)
    config = read_config(local_directory(tower.source)).vision_config
    check_length(grid_for(given.image_grid_pinpoints, config.image_size), config, merge, given.model_max_length)


_TEXT = (
    "With --image_aspect_ratio anyres: the pictures' shapes in pixels, a list of (width, height), multiples of the "
    "tower's side R (default: LLaVA-1.6's, R times (1, 2), (2, 1), (2, 2), (3, 1) and (1, 3))."
)
FLAGS = Flags(frozenset({RATIO, "image_folder"}), ((GRID, str | None, None, _TEXT),), check_flags)


def parse_grid(text: str | None) -> list[list[int]] | None:
    """Shapes [[width, height], ...] from a flag's text; None where there is none. Raises ValueError."""
    if text is None:
        return None
    try:
        found = [list(shape) for shape in ast.literal_eval(text.strip())]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        found = []
    if not found or not all(len(shape) == 2 and all(type(n) is int and n > 0 for n in shape) for shape in found):
        raise ValueError(
            f'--{GRID} is {text[:80]!r}; it must be a list of (width, height) in pixels, as "[(336, 672), (672, 336)]".'
        )
    return found


def grid_for(text: str | None, side: int) -> list[list[int]]:
    """The shapes for a tower of `side` pixels; text: the flag's. Raises ValueError where they do not fit."""
    asked = parse_grid(text) or [[side * wide, side * high] for wide, high in MULTIPLES]
    for width, height in asked:
        if width % side or height % side:
            raise ValueError(
                f"--{GRID}: ({width}, {height}) cannot be cut into tiles of this tower, whose side is {side} px. Width "
                f"and height must be multiples of {side}."
            )
    return asked


def most_tokens(grid: Sequence[Sequence[int]], config: Any, merge: str) -> int:
    """Tokens that a picture takes at most: the whole one, and the largest shape of the grid with a newline a row.

    config: the tower's (image_size, patch_size)."""
    patches, newline = config.image_size // config.patch_size, int("unpad" in merge)
    sides = [(shape[0] // config.image_size * patches, shape[1] // config.image_size * patches) for shape in grid]
    return patches**2 + max((width + newline) * height for width, height in sides)


def check_length(grid: Sequence[Sequence[int]], config: Any, merge: str, length: int) -> None:
    """Raise ValueError where one picture fills the sequence: upstream cuts off what comes after, the answers."""
    needed = most_tokens(grid, config, merge)
    if needed >= length:
        raise ValueError(
            f"a picture in tiles takes up to {needed} tokens, and --model_max_length is {length}: the answers would be "
            "cut off. Give a larger one (LLaVA-1.6: 4096), or fewer tiles (--image_grid_pinpoints)."
        )


def _refuse_scales(has_scales: bool) -> None:
    if has_scales:
        raise ValueError(
            f"--{RATIO} anyres cuts a picture into tiles, and S2 towers cut it already: they cannot be used together. "
            "Register the tower without --s2."
        )


# --------------------------------------------------------------------------------------------------- the trainer's data


def prepare(given: dict[str, Any]) -> None:
    """Let the data set of upstream's trainer cut tiles and its batches have sizes; write it into the model's config.

    given: the trainer's keyword arguments (model, args, train_dataset, data_collator), changed in place."""
    dataset, model, arguments = given["train_dataset"], given.get("model"), given.get("args")
    keep_newline(names_of_trainer(dataset))
    newline = getattr(model.get_model(), NEWLINE, None) if hasattr(model, "get_model") else None
    if newline is not None:
        _place_newline(newline, model, arguments)
    settings = getattr(dataset, "data_args", None)
    if getattr(settings, RATIO, None) != "anyres" or not FLAGS.are_of(settings):
        return
    tower = model.get_vision_tower()
    _refuse_scales(hasattr(tower, "scales"))
    if getattr(arguments, "n_gpu", 1) > 1:
        raise ValueError(f"--{RATIO} anyres needs a process for each GPU (tiles would be torn apart): use torchrun.")
    grid = grid_for(settings.image_grid_pinpoints, tower.config.image_size)
    check_length(grid, tower.config, model.config.mm_patch_merge_type, arguments.model_max_length)
    model.config.image_grid_pinpoints = grid
    settings.image_processor = Cutter(tower.image_processor, grid)
    _give_sizes(type(dataset))
    given["data_collator"] = TileCollator(given["data_collator"])


class Tiles(NamedTuple):
    """A picture as upstream's `process_anyres_image` gives it."""

    pixels_N3RR: torch.Tensor
    size: tuple[int, int]
    """(width, height) of the picture itself, which says where its padding is."""


@dataclass
class Cutter:
    """Stands where upstream's data set asks for an image processor; gives Tiles in place of pixels."""

    processor: Any
    grid: list[list[int]]

    def preprocess(self, image: Image.Image, return_tensors: str = "pt") -> dict[str, list[Tiles]]:
        from llava.mm_utils import process_anyres_image

        return {"pixel_values": [Tiles(process_anyres_image(image, self.processor, self.grid), image.size)]}

    @property
    def crop_size(self) -> dict[str, int]:
        """Of upstream's stand-in for a row without a picture."""
        return self.processor.crop_size


def _give_sizes(cls: type) -> None:
    """Rows of upstream's data set: `image` [N,3,R,R] and `image_size`."""
    if hasattr(cls.__getitem__, "gives_sizes"):
        return
    upstream = cls.__getitem__

    @functools.wraps(upstream)
    def __getitem__(self, index: int) -> dict[str, Any]:
        row = upstream(self, index)
        if not isinstance(self.data_args.image_processor, Cutter):
            return row
        image = row["image"]
        if not isinstance(image, Tiles):
            # No picture: zeros [3,R,R]. As a tile it is followed by the newline, which each process must use in each
            # step: DistributedDataParallel waits for every gradient.
            image = Tiles(image.unsqueeze(0), (image.shape[-1], image.shape[-2]))
        return {**row, "image": image.pixels_N3RR, "image_size": image.size}

    __getitem__.gives_sizes = True
    cls.__getitem__ = __getitem__


@dataclass
class TileCollator:
    """Upstream's batch with `images`, a list of [N,3,R,R], and `image_sizes`, a list of (width, height): one of each
    for every row, with or without a picture."""

    upstream: Any

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        texts = [{name: value for name, value in row.items() if not name.startswith("image")} for row in rows]
        batch = self.upstream(texts)
        return {**batch, "images": [row["image"] for row in rows], "image_sizes": [row["image_size"] for row in rows]}


# ---------------------------------------------------------------------------------------------------------- the newline


def settle_newline(model: Any, model_args: Any) -> None:
    """After upstream's `initialize_vision_modules`: the newline is there where pictures are joined with it, only there,
    learns, and is stage 1's where that had one. `model` is upstream's LlavaMetaModel.

    Upstream makes it together with a new projector, so not in front of a LLaVA whose projector is kept, and reads of
    stage 1's file the projector alone."""
    if "unpad" not in getattr(model_args, MERGE, "flat"):
        if hasattr(model, NEWLINE):
            delattr(model, NEWLINE)
        return
    if not hasattr(model, NEWLINE):
        width = model.config.hidden_size
        model.image_newline = nn.Parameter(torch.randn(width, dtype=model.dtype) / width**0.5)
    model.image_newline.requires_grad_(True)  # LoRA froze it where the base model had it
    if model_args.pretrain_mm_mlp_adapter is not None:
        found = load_foreign_pt(model_args.pretrain_mm_mlp_adapter)
        for name, tensor in found.items():
            if name.rpartition(".")[2] == NEWLINE:
                with torch.no_grad():
                    model.image_newline.copy_(tensor)


def _place_newline(newline: nn.Parameter, model: Any, arguments: Any) -> None:
    """In the dtype and on the device of the text's embeddings, among which it stands (of a quantised model upstream
    moves the projector alone). Stage 1 trains it with the projector."""
    if arguments is not None and getattr(arguments, "tune_mm_mlp_adapter", False):
        newline.requires_grad_(True)
    if not hasattr(newline, "ds_id"):
        embeddings = model.get_model().embed_tokens.weight
        newline.data = newline.data.to(embeddings.device, embeddings.dtype)


def keep_newline(names: dict[str, Any]) -> None:
    """What upstream saves in stage 1, and in its checkpoints, has the newline beside the projector: `mm_projector.bin`,
    from where upstream's loader reads it. names: of a module of upstream's, changed in place."""
    name = "get_mm_adapter_state_maybe_zero_3"
    upstream = names.get(name)
    if upstream is None or hasattr(upstream, "keeps_newline"):
        return

    @functools.wraps(upstream)
    def get_mm_adapter_state_maybe_zero_3(named_params: Any, keys_to_match: list[str]) -> dict[str, torch.Tensor]:
        return upstream(named_params, [*keys_to_match, NEWLINE])

    get_mm_adapter_state_maybe_zero_3.keeps_newline = True
    names[name] = get_mm_adapter_state_maybe_zero_3
