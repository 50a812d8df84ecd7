"""A CLIP-MoE's directory that an older version wrote, brought to what this version writes: `llava-clipmoe update DIR`.

The weights, the tokenizer and the model's settings stay as they are, to the byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from .configuration_clipmoe import CLIPMoEConfig
from .files import json_text, read_json, weight_files, write_text
from .model_card import CARD, renewed_card
from .model_directory import AUTO_MAP, MODELING_FILES, pixel_statistics, preprocessor, read_config

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"


def outdated(directory: Path) -> dict[str, str]:
    """File -> what it would hold, for every file that this version would write otherwise.

    Raises FileNotFoundError or ValueError for what is no CLIP-MoE's directory, saying what it is.
    """
    config = _check(directory)
    wanted = {file: Path(__file__).with_name(file).read_text(encoding="utf-8") for file in MODELING_FILES}
    raw = read_json(directory / CONFIG)
    if raw.get("auto_map", {}) != (auto_map := {**raw.get("auto_map", {}), **AUTO_MAP}):
        wanted[CONFIG] = json_text({**raw, "auto_map": auto_map})
    pixels = _pixels(directory, config)
    if pixels.get("processor_class") != "CLIPProcessor":
        wanted[PREPROCESSOR] = json_text(dict(sorted({**pixels, "processor_class": "CLIPProcessor"}.items())))
    wanted[CARD] = renewed_card(directory, config)
    return {file: text for file, text in wanted.items() if not _holds(directory / file, text)}


def update_directory(directory: Path) -> list[str]:
    """Write what `outdated` names, code first; -> the files. A killed update is finished by the next one."""
    files = outdated(directory)
    for file, text in files.items():
        write_text(directory / file, text)
    return list(files)


def _check(directory: Path) -> CLIPMoEConfig:
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is no directory on this machine. A model of the hub is updated in a copy: download it "
            "(hf download ORG/NAME --local-dir DIR), update DIR, and push it again."
        )
    config = read_config(directory)
    if read_json(directory / CONFIG)["model_type"] != CLIPMoEConfig.model_type:
        raise ValueError(f"{directory} is a dense CLIP, which transformers' own code opens: it has no files of ours.")
    weight_files(directory)
    return config


def _pixels(directory: Path, config: CLIPMoEConfig) -> dict[str, Any]:
    """The image processor's settings as they stand, or CLIP's where the directory has no file of them."""
    file = directory / PREPROCESSOR
    if file.is_file():
        return read_json(file)
    return {**preprocessor(config.vision_config.image_size, *pixel_statistics(directory)), "processor_class": None}


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_bytes() == text.encode("utf-8")


@dataclass
class Update:
    """Bring an older CLIP-MoE directory to what this version writes: code, metadata and card. Weights stay.

    Example: llava-clipmoe update runs/quickstart/clip-moe
    """

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """A CLIP-MoE's model directory."""


def main(argv: list[str]) -> int:
    """`llava-clipmoe update DIR`."""
    directory = tyro.cli(Update, args=argv, prog="llava-clipmoe update").directory
    files = update_directory(directory)
    print(f"updated in {directory}: {', '.join(files)}" if files else f"{directory} is up to date.")
    return 0
