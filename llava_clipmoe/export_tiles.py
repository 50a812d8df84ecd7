"""Pictures in tiles (LLaVA-1.6's anyres) in `export-hf`: transformers' LlavaNext, and what it cannot express."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

MODEL_TYPES = {"Llava": "llava", "LlavaNext": "llava_next"}
"""What an export can be: how transformers' classes for it begin -> its model_type."""


def family_of(config: Mapping[str, Any]) -> str:
    """How transformers' classes for a LLaVA of upstream's begin: LlavaNext looks at tiles, Llava at one square."""
    return "LlavaNext" if config.get("image_aspect_ratio") == "anyres" else "Llava"


def tiles_not_expressible(config: Mapping[str, Any]) -> Iterator[str]:
    """What LlavaNext cannot do of upstream's ways to cut a picture into tiles and to put their features in a row."""
    aspect, merge = config.get("image_aspect_ratio"), config.get("mm_patch_merge_type", "flat")
    if family_of(config) == "Llava":
        if "anyres" in str(aspect):
            yield f"its image_aspect_ratio is {aspect!r}; of those with tiles transformers' LlavaNext has 'anyres' only"
        if merge != "flat":
            yield f"its mm_patch_merge_type is {merge!r}, but it sees no tiles (image_aspect_ratio {aspect!r})"
        return
    if merge != "spatial_unpad":
        yield (
            f"it cuts pictures into tiles (anyres) and its mm_patch_merge_type is {merge!r}: transformers' LlavaNext "
            "always removes the padding and ends each row with image_newline (spatial_unpad)"
        )
    if config.get("mm_vision_select_feature", "patch") != "patch":
        yield "it keeps the class token of each tile (mm_vision_select_feature), and with it they make no grid"
    try:
        grid_pinpoints(config)
    except (ValueError, SyntaxError, TypeError):
        yield f"its image_grid_pinpoints are {config.get('image_grid_pinpoints')!r}, expected [[width, height], ...]"


def grid_pinpoints(config: Mapping[str, Any]) -> list[list[int]]:
    """The sizes that anyres may give a picture, in pixels, as transformers has them: [[height, width], ...].

    Upstream has [[width, height], ...], as a list or as its text. The order stays: of two equally good the first is
    taken. Raises ValueError, SyntaxError or TypeError for anything else.
    """
    given = config.get("image_grid_pinpoints")
    pairs = ast.literal_eval(given) if isinstance(given, str) else given
    if not pairs:
        raise ValueError("no image_grid_pinpoints")
    return [[int(height), int(width)] for width, height in pairs]
