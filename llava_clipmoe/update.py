"""A directory that an older version wrote, brought to what this version writes: `llava-clipmoe update DIR`.

A CLIP-MoE's directory, or what `export-hf` wrote of a LLaVA with one. Weights, tokenizer and the model's settings stay
as they are, to the byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from . import export_files
from .configuration_clipmoe import CLIPMoEConfig
from .export_tiles import MODEL_TYPES
from .files import json_text, read_json, weight_files, write_text
from .model_card import CARD, renewed_card
from .model_directory import AUTO_MAP, MODELING_FILES, pixel_statistics, preprocessor, read_config

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"


def outdated(directory: Path) -> dict[str, str]:
    """File -> what it would hold, for every file that this version would write otherwise.

    Raises FileNotFoundError or ValueError for what is no directory of ours, saying what it is.
    """
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is no directory on this machine. A model of the hub is updated in a copy: download it "
            "(hf download ORG/NAME --local-dir DIR), update DIR, and push it again."
        )
    wanted = {file: Path(__file__).with_name(file).read_text(encoding="utf-8") for file in MODELING_FILES}
    if (directory / export_files.REMOTE_CODE).is_file():  # an exported LLaVA; its card says nothing that changes
        of_next = read_json(directory / CONFIG).get("model_type") == MODEL_TYPES["LlavaNext"]
        family = "LlavaNext" if of_next else "Llava"
        wanted[export_files.REMOTE_CODE] = export_files.remote_code(family)
        auto_map = export_files.auto_map(family)
    else:
        config = _check(directory)
        auto_map = AUTO_MAP
        pixels = {**_pixels(directory, config), "processor_class": "CLIPProcessor"}
        if not (directory / PREPROCESSOR).is_file() or read_json(directory / PREPROCESSOR) != pixels:
            wanted[PREPROCESSOR] = json_text(dict(sorted(pixels.items())))
        wanted[CARD] = renewed_card(directory, config)
    weight_files(directory)
    raw = read_json(directory / CONFIG)
    known = raw.get("auto_map") or {}
    if {**known, **auto_map} != known:
        wanted[CONFIG] = json_text({**raw, "auto_map": {**known, **auto_map}})
    return {file: text for file, text in wanted.items() if not _holds(directory / file, text)}


def update_directory(directory: Path) -> list[str]:
    """Write what `outdated` names, code first; -> the files. A killed update is finished by the next one."""
    files = outdated(directory)
    for file, text in files.items():
        write_text(directory / file, text)
    return list(files)


def _check(directory: Path) -> CLIPMoEConfig:
    config = read_config(directory)
    if read_json(directory / CONFIG)["model_type"] != CLIPMoEConfig.model_type:
        raise ValueError(f"{directory} is a dense CLIP, which transformers' own code opens: it has no files of ours.")
    return config


def _pixels(directory: Path, config: CLIPMoEConfig) -> dict[str, Any]:
    """The image processor's settings as they stand, or CLIP's where the directory has no file of them."""
    file = directory / PREPROCESSOR
    if file.is_file():
        return read_json(file)
    return preprocessor(config.vision_config.image_size, *pixel_statistics(directory))


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_bytes() == text.encode("utf-8")


@dataclass
class Update:
    """Bring a directory of an older version to what this one writes: code, metadata and card. Weights stay.

    Example: llava-clipmoe update runs/quickstart/clip-moe
    """

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """A CLIP-MoE's model directory, or what export-hf wrote of a LLaVA with one."""


def main(argv: list[str]) -> int:
    """`llava-clipmoe update DIR`."""
    directory = tyro.cli(Update, args=argv, prog="llava-clipmoe update").directory
    files = update_directory(directory)
    print(f"updated in {directory}: {', '.join(files)}" if files else f"{directory} is up to date.")
    return 0
