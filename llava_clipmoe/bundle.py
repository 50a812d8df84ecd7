"""A CLIP or CLIP-MoE together with what it needs to read pictures and captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .modeling_clipmoe import CLIPMoEModel

# OpenAI CLIP's pixel statistics (openai/CLIP, clip.py): for directories that do not say their own.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class ClipBundle:
    """A model and what it needs to read images and captions.

    `model` is dense when its config's `is_dense` says so; as loaded it is fp32 and in eval mode. `image_mean` and
    `image_std` are per RGB channel, for pixels in [0, 1]. `name` says where it came from, without any path;
    `license` is the one that the card there says, as the hub names it.
    """

    model: CLIPMoEModel
    tokenizer: Any
    image_mean: tuple[float, float, float] = OPENAI_MEAN
    image_std: tuple[float, float, float] = OPENAI_STD
    name: str = "clip"
    license: str | None = None

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.model.config.vision_config.image_size

    @property
    def context_length(self) -> int:
        """Text positions: the longest caption in tokens, start and end included."""
        return self.model.config.text_config.max_position_embeddings
