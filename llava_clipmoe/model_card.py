"""The README.md of a model directory, what it may call a model or data set, and the templates of written files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .bundle import ClipBundle
from .configuration_clipmoe import active_parameters

TEMPLATES = Path(__file__).with_name("templates")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


def render(template: str, **values: Any) -> str:
    """A Jinja template of `templates/`, filled in."""
    from jinja2 import Environment, FileSystemLoader

    options = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    return Environment(loader=FileSystemLoader(TEMPLATES), **options).get_template(template).render(values)


def public_name(source: str) -> str:
    """What a model card calls a model or data set: a path by its last part, as the directory may be given away; a hub
    id, or another name, as it is."""
    path = Path(source).expanduser()
    if _HUB_NAME.fullmatch(source) and not path.exists():
        return source
    return os.path.basename(os.path.abspath(path))


def model_card(bundle: ClipBundle, card: Mapping[str, Any]) -> str:
    """The README.md of a model directory: what it is, where it comes from, how to load it."""
    config = bundle.model.config
    names = {"name": card.get("name", bundle.name), "base": card.get("base", bundle.name)}
    parameters = active_parameters(config)
    return render("model_card.md.j2", bundle=bundle, config=config, card=card, parameters=parameters, **names)
