"""A small CLIP with fresh weights, for the quick start and for data where no pretrained one fits."""

from __future__ import annotations

import torch

from llava_clipmoe.bundle import OPENAI_MEAN, OPENAI_STD, ClipBundle
from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig
from llava_clipmoe.modeling_clipmoe import CLIPMoEModel
from llava_clipmoe.tokenizer import open_clip_tokenizer

from ..config import ScratchConfig

TEXT_POSITIONS = 77  # as every CLIP before Long-CLIP


def scratch_bundle(c: ScratchConfig, seed: int) -> ClipBundle:
    """Fresh weights from `seed`, CLIP's own vocabulary and image normalisation."""
    if c.image_size % c.patch_size:
        raise ValueError(f"--base.scratch.patch-size {c.patch_size} does not divide the image size {c.image_size}.")
    towers = [
        {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": max(1, width // c.head_width),
            "hidden_act": c.hidden_act,
        }
        for width, layers in ((c.text_width, c.text_layers), (c.vision_width, c.vision_layers))
    ]
    towers[0]["max_position_embeddings"] = TEXT_POSITIONS
    towers[1] |= {"image_size": c.image_size, "patch_size": c.patch_size}
    config = CLIPMoEConfig(*towers, projection_dim=c.projection_dim, num_experts=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPMoEModel(config).eval()
        _smooth_patches(model, c)
        _spread_positions(model, c)
    return ClipBundle(model, open_clip_tokenizer(TEXT_POSITIONS), OPENAI_MEAN, OPENAI_STD)


def _smooth_patches(model: CLIPMoEModel, c: ScratchConfig, cells: int = 7) -> None:
    """Start large patch filters as coarse random grids, blown up.

    A filter of 42 x 42 independent random pixels mostly answers to noise between neighbouring pixels, which drawings
    and photographs hardly have; a 7 x 7 grid answers to shapes and colours from the first step on.
    """
    weight = model.vision_model.embeddings.patch_embedding.weight
    if c.patch_size <= 2 * cells:
        return
    coarse = torch.randn(weight.shape[0], 3, cells, cells) * (3 * cells**2) ** -0.5 / (c.patch_size / cells) ** 2
    with torch.no_grad():
        weight.copy_(torch.nn.functional.interpolate(coarse, size=c.patch_size, mode="nearest"))


def _spread_positions(model: CLIPMoEModel, c: ScratchConfig, scale: float = 0.5) -> None:
    """Start the patches' position embeddings as sines and cosines of row and column, as large as the patches' content.

    Random ones are a thirtieth of the content, and it takes long until attention finds a mark in its corner.
    """
    side, quarter = c.image_size // c.patch_size, c.vision_width // 4
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([columns.flatten(), rows.flatten()], 1) / side  # [patches, 2]
    angles = places[..., None] * torch.linspace(0.5, side / 2, quarter) * torch.pi  # [patches, 2, quarter]
    waves = torch.cat([angles.sin(), angles.cos()], 2).flatten(1)  # [patches, 4 x quarter]
    weight = model.vision_model.embeddings.position_embedding.weight
    with torch.no_grad():
        weight[1:, : waves.shape[1]] = scale * waves
