"""Names of vision towers: "clipmoe-336" -> the model directory (or hub id) behind it. Imports no torch.

A registration is one entry of `towers.json` in the user's config directory; `LLAVA_CLIPMOE_TOWERS` overrides it for
one process and its children. A LLaVA checkpoint stores only the short name (`mm_vision_tower`), so the same look-up
serves training, evaluation and serving.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .files import read_json, write_json

OVERRIDE = "LLAVA_CLIPMOE_TOWERS"
"""Environment variable "NAME=DIR_OR_HUB_ID", several separated by commas; wins over the registrations."""
CONFIG_DIRECTORY = "LLAVA_CLIPMOE_CONFIG_DIR"
MODEL_TYPE = "clip_moe"
DEFAULT_NAME = "clipmoe-336"

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*$")
_RESERVED = ("openai", "laion")  # upstream's builder takes every name that starts so


class UnknownTower(ValueError):
    """A tower name that neither we nor upstream LLaVA can turn into a model."""


@dataclass(frozen=True)
class Tower:
    """A tower of ours: the name it was asked by, and where its model is."""

    name: str
    source: str
    """A directory, or a hub id "org/name"."""
    s2: bool = False
    """Scaling on scales (CLIPMoEVisionTowerS2) instead of the plain tower."""
    s2_scales: list[int] = field(default_factory=list)
    """Image sides in pixels, ascending; empty: one, two and three times the model's."""


# ----------------------------------------------------------------------------------------------------------- look-up


def registry_file() -> Path:
    """Where the registrations are: $LLAVA_CLIPMOE_CONFIG_DIR, else the platform's config directory."""
    if os.environ.get(CONFIG_DIRECTORY):
        return Path(os.environ[CONFIG_DIRECTORY]).expanduser() / "towers.json"
    if sys.platform == "win32":
        base = Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming")
    else:
        base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return base / "llava-clipmoe" / "towers.json"


def _entries() -> dict[str, dict[str, Any]]:
    """The registrations as they are written. Raises ValueError for a damaged file."""
    path = registry_file()
    content = read_json(path) if path.exists() else {}
    if not isinstance(content, dict) or not all(isinstance(v, dict) and "source" in v for v in content.values()):
        raise ValueError(f'{path} is not a list of towers ({{"NAME": {{"source": DIR}}}}): mend or delete it.')
    return content


def registered() -> dict[str, Tower]:
    """Every registered tower by name, the environment's last. Raises ValueError for a damaged file or variable."""
    towers = {}
    for name, entry in _entries().items():
        known = {key: entry[key] for key in ("source", "s2", "s2_scales") if key in entry}
        towers[name] = Tower(name, **known)
    for part in filter(None, (part.strip() for part in os.environ.get(OVERRIDE, "").split(","))):
        name, equals, source = part.partition("=")
        if not (equals and name and source):
            raise ValueError(f"{OVERRIDE} holds {part!r}; expected NAME=DIR_OR_HUB_ID, several separated by commas.")
        towers[name.strip()] = Tower(name.strip(), source.strip())
    return towers


def resolve(name: str) -> Tower | None:
    """The tower of ours that `name` means; None for names that belong to upstream LLaVA (openai/..., a dense CLIP).

    Order: registrations (so that a stray folder ./clipmoe-336 cannot hide one), our own directories, upstream's
    names, hub ids of ours. Raises UnknownTower, with the command that registers it, for anything else.
    """
    towers = registered()
    if name in towers:
        tower = towers[name]
        _check_source(tower)
        return tower
    if os.path.exists(name):
        return _from_path(name)
    if _upstream_takes(name):
        return None
    if HUB_ID.match(name) and _hub_model_type(name) == MODEL_TYPE:
        return Tower(name, name)
    raise UnknownTower(_unknown(name, towers))


def _upstream_takes(name: str) -> bool:
    """What llava/model/multimodal_encoder/builder.py accepts besides existing paths."""
    return name.startswith(_RESERVED) or "ShareGPT4V" in name


def _from_path(path: str) -> Tower | None:
    model_type = _model_type(Path(path))
    if model_type == MODEL_TYPE:
        return Tower(path, path)
    if (model_type or "").startswith(MODEL_TYPE):  # upstream would load it as a dense CLIP with random FFNs
        raise UnknownTower(
            f"{path} holds a CLIP-MoE's vision tower alone (model_type {model_type}). Give the directory of the whole "
            "CLIP-MoE."
        )
    if Path(path).name.lower().startswith("clipmoe"):  # a stray folder: upstream would load it with random weights
        found = f"its model_type is {model_type!r}" if model_type else "it has no readable config.json"
        raise UnknownTower(
            f"there is a file or folder {path!r} here, but it is no CLIP-MoE model directory ({found}). If you meant "
            f"the registered name, register it:\n    llava-clipmoe register {Path(path).name} DIR_OR_HUB_ID"
        )
    return None


def _model_type(directory: Path) -> str | None:
    config = directory / "config.json"
    if not config.is_file():
        return None
    content = read_json(config)
    return content.get("model_type") if isinstance(content, dict) else None


def _hub_model_type(hub_id: str) -> str | None:
    """`model_type` of a hub model (or of its cached copy); None when there is no such model."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return read_json(hf_hub_download(hub_id, "config.json")).get("model_type")
    except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError):
        return None  # the message of UnknownTower says what was tried


def _unknown(name: str, towers: dict[str, Tower]) -> str:
    known = ", ".join(sorted(towers)) or "none"
    tried = ", nor a CLIP-MoE on the hub (or the hub cannot be reached)" if HUB_ID.match(name) else ""
    return (
        f"unknown vision tower {name!r}: it is not registered, not a directory{tried}. Registered: {known}. "
        f"Register it with\n    llava-clipmoe register {name.replace('/', '-')} DIR_OR_HUB_ID\n"
        f"or, for this shell only,\n    export {OVERRIDE}={name}=DIR_OR_HUB_ID"
    )


# ------------------------------------------------------------------------------------------------------ registration


def _check_source(tower: Tower) -> None:
    """Raise UnknownTower when the model behind a registration is gone or is no CLIP-MoE."""
    path = Path(tower.source).expanduser()
    if not path.exists():
        if HUB_ID.match(tower.source):
            return  # a hub id: found (or not) when it is loaded
        raise UnknownTower(
            f"the tower {tower.name!r} points to {tower.source}, which does not exist (moved or deleted?). Point it to "
            f"the model directory again:\n    llava-clipmoe register {tower.name} DIR_OR_HUB_ID"
        )
    model_type = _model_type(path)
    if model_type == MODEL_TYPE:
        return
    if model_type in ("clip", "clip_vision_model"):
        why = "is a dense CLIP (model_type clip); give its path or hub id to LLaVA directly, no registration is needed"
    elif model_type is None:
        why = "is not a model directory: it has no config.json"
    else:
        why = f"holds a model of type {model_type!r}"
    raise UnknownTower(
        f"{tower.source} cannot be the CLIP-MoE tower {tower.name!r}: it {why}. Train one with `llava-clipmoe "
        "train-encoder`, or convert a checkpoint with `llava-clipmoe convert`."
    )


def register(tower: Tower) -> Tower:
    """Write a registration; -> the tower with an absolute path. Raises ValueError before anything is written."""
    if not _NAME.match(tower.name) or _upstream_takes(tower.name):
        raise ValueError(
            f"{tower.name!r} cannot be a tower's name: use letters, digits, '.', '_' and '-', and no name that starts "
            f"with {' or '.join(_RESERVED)} (those are upstream LLaVA's)."
        )
    path = Path(tower.source).expanduser()
    if path.exists():
        tower = replace(tower, source=str(path.resolve()))
    elif not HUB_ID.match(tower.source):
        raise ValueError(f"{tower.source} is neither a directory on this machine nor a hub id (org/name).")
    _check_source(tower)
    content = _entries()
    entry = {key: value for key, value in asdict(tower).items() if key != "name" and value not in (False, [])}
    write_json(registry_file(), dict(sorted({**content, tower.name: entry}.items())))
    return tower


def unregister(name: str) -> None:
    """Forget a registration; the model stays. Raises UnknownTower when there is none."""
    path = registry_file()
    content = _entries()
    if name not in content:
        raise UnknownTower(f"{name!r} is not registered in {path}. Registered: {', '.join(sorted(content)) or 'none'}.")
    write_json(path, {key: value for key, value in content.items() if key != name})
