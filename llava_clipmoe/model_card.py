"""The README.md of a model directory, what it may call a model or data set, and the templates of written files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .configuration_clipmoe import CLIPMoEConfig, active_parameters
from .files import read_json, write_text

CARD = "README.md"
TEMPLATES = Path(__file__).with_name("templates")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
_LICENSE = re.compile(r"\A---\n(?:(?!---\n).*\n)*?license: *([\w.-]+) *\n")
_HEADLINES = {"i2t_r1": "image to text, R@1", "t2i_r1": "text to image, R@1", "top1": "top-1", "overall": "pairs right"}
_RUN_PARTS = ("base", "clip", "clip-moe")
"""Model directories of a run whose scores its results.json holds."""
_DATA_LICENSES = {"openmoji": "CC BY-SA 4.0 (OpenMoji project)"}
"""Of the data that come with this package."""
_OLD_LICENCE = "The weights derive from the base model and from the data they were trained on; their licences apply.\n"


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


def model_card(
    config: CLIPMoEConfig,
    card: Mapping[str, Any],
    scores: Mapping[str, Any] | None = None,
    path: str = "path/to/this/directory",
) -> str:
    """The README.md of a model directory: what it is, where it comes from, how to load it.

    card: "name", "base", and what else is known: "license" and "base_license" as the hub names them, "data", "recipe"
    or any other line. scores: as `run_scores` gives them. path: what the examples load.
    """
    own, data = ("name", "base", "license", "base_license"), card.get("data", "")
    return render(
        "model_card.md.j2",
        config=config,
        vision=config.vision_config,
        text=config.text_config,
        parameters=active_parameters(config),
        facts={key: value for key, value in card.items() if key not in own},
        scores=scores,
        path=path,
        trust="" if config.is_dense else ", trust_remote_code=True",
        data=data,
        data_license=_DATA_LICENSES.get(data.partition(":")[0]),
        **{name: card.get(name) for name in own},
    )


def license_of(directory: Path) -> str | None:
    """The licence that a directory's card says in its first lines, as the hub names it; None where it says none."""
    file = directory / CARD
    found = _LICENSE.match(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else None
    return found[1] if found else None


def run_scores(directory: Path) -> dict[str, Any] | None:
    """What the run that `directory` lies in measured of it and of its base: the table's "variants" and "rows".

    None for a directory that is no part of a run, or of one that is not measured yet.
    """
    file = directory.parent / "results.json"
    if directory.name not in _RUN_PARTS or not file.is_file():
        return None
    results = read_json(file)
    variants = ["base"] if directory.name == "base" else list(dict.fromkeys(["base", results.get("result")]))
    measured = {**(results.get("retrieval") or {}), **(results.get("zero_shot") or {})}
    measured["attribute pairs"] = results.get("attributes") or {}
    rows = {
        f"{data}: {title}": [f"{100 * by_variant[variant][key]:.1f}" for variant in variants]
        for data, by_variant in measured.items()
        for key, title in _HEADLINES.items()
        if all(key in by_variant.get(variant, {}) for variant in variants)
    }
    return {"variants": variants, "rows": rows} if rows else None


# ------------------------------------------------------------------------------------------------------ a card's update


def renewed_card(directory: Path, config: CLIPMoEConfig, path: str | None = None, license: str | None = None) -> str:
    """The card of `directory` with what this version says of scores, loading and licences; all else as it stands.

    path: what the examples load. license: of the weights, where the card says none or another.
    Raises ValueError for a card whose first lines are no YAML.
    """
    file = directory / CARD
    old = file.read_text(encoding="utf-8") if file.is_file() else ""
    facts = {"name": directory.resolve().name, "base": directory.resolve().name, **_facts(old)}
    license = license or license_of(directory)
    new = model_card(config, {**facts, "license": license}, run_scores(directory), path or "path/to/this/directory")
    if not old:
        return new
    (data, head, sections), (new_data, _, new_sections) = _parts(old, file), _parts(new, file)
    new_data.update(data, **({"license": license} if license else {}))
    ours = ("## Scores", "## Loading", "## Licences")
    merged = {**sections, **new_sections}
    ordered = [merged[name] for name in ours if name in merged]
    ordered += [section for name, section in merged.items() if name not in ours]
    body = head.replace(_OLD_LICENCE, "").rstrip() + "\n\n" + "\n\n".join(section.rstrip() for section in ordered)
    return f"---\n{_yaml(new_data)}---\n\n{body.lstrip()}\n"


def placed_card(directory: Path, hub_id: str, license: str | None = None) -> str:
    """The card of an exported LLaVA, loading from `hub_id`. license: of the weights, in place of what the card says.

    Raises FileNotFoundError where there is no card, ValueError for one whose first lines are no YAML.
    """
    file = directory / CARD
    if not file.is_file():
        raise FileNotFoundError(f"{directory} has no {CARD}. Export it anew: llava-clipmoe export-hf LLAVA_DIR OUT")
    data, head, sections = _parts(file.read_text(encoding="utf-8"), file)
    body = head + "".join(sections.values())
    body = body.replace("from_pretrained(path", f'from_pretrained("{hub_id}"').replace("serve PATH", f"serve {hub_id}")
    return f"---\n{_yaml(data | ({'license': license} if license else {}))}---\n\n{body.lstrip()}"


def write_renewed_card(directory: Path, config: CLIPMoEConfig) -> None:
    """Write `renewed_card` in the old one's place."""
    write_text(directory / CARD, renewed_card(directory, config))


def _facts(card: str) -> dict[str, str]:
    """What a card of ours says above its sections: its name, and the lines `- key: value`."""
    head = card.partition("\n## ")[0]
    facts = dict(re.findall(r"^- ([\w ]+): (.+)$", head, re.MULTILINE))
    facts.pop("parameters", None)
    title = re.search(r"^# (.+)$", head, re.MULTILINE)
    found = re.search(r"^- the base, .+: ([\w.-]+)$", card, re.MULTILINE)
    return {**({"name": title[1]} if title else {}), **facts, **({"base_license": found[1]} if found else {})}


def _parts(card: str, file: Path) -> tuple[dict[str, Any], str, dict[str, str]]:
    """A card's first lines as a dictionary, what stands above its sections, and the sections by their heading."""
    import yaml
    from huggingface_hub import ModelCard

    try:
        parsed = ModelCard(card)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: what stands between its two --- is no YAML ({error}). Mend or delete it.") from error
    head, *sections = re.split(r"^(?=## )", parsed.text, flags=re.MULTILINE)
    return parsed.data.to_dict(), head, {section.partition("\n")[0].rstrip(): section for section in sections}


def _yaml(data: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)
