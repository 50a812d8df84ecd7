"""Look inside a loaded LLaVA's vision tower (ours or upstream's): which experts a picture's patches go to, and where
two pictures differ for it.

Shape suffixes:  L MoE blocks   S patches a side   E experts   N = S*S patches   T = N + 1 tokens   R side in pixels
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image, ImageDraw, ImageFont

from train_encoder.evaluate.routing import NoExperts
from train_encoder.report.figures import style

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7F7F7F")
"""Colours that the colour-blind can tell apart too (Okabe and Ito 2008); its black is a grey here, for dark pages."""
INK = "#747a85"
"""Colour of text: as readable on a white page as on a nearly black one (contrast 4.3 and 4.4)."""
SIDE = 672
"""Pixels of a large overlay, roughly: each patch gets a whole number."""


def as_seen(image: Image.Image, processor: Any, aspect_ratio: str | None) -> tuple[Image.Image, torch.Tensor]:
    """-> the square picture that the model sees [R x R] and its pixels [1,3,R,R], normalised.

    aspect_ratio: the LLaVA's `config.image_aspect_ratio`; "anyres" gives its base picture, the whole one squeezed into
    a square. The pixels come from upstream's own `process_images`, and the picture from the pixels, so that what is
    drawn over it fits its patches.
    """
    from llava.mm_utils import process_images  # upstream is there wherever a LLaVA is loaded

    image = image.convert("RGB")
    if aspect_ratio == "anyres":  # as process_anyres_image makes the first of its pictures
        side = processor.size["shortest_edge"]
        image, aspect_ratio = image.resize((side, side)), None
    pixels_13RR = process_images([image], processor, SimpleNamespace(image_aspect_ratio=aspect_ratio))
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (processor.image_mean, processor.image_std))
    bytes_3RR = ((pixels_13RR[0].float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(bytes_3RR.permute(1, 2, 0).numpy()), pixels_13RR


@dataclass(frozen=True)
class Routing:
    """Where each patch of one picture goes, in every MoE block that the tower holds."""

    blocks: list[int]
    """Numbers of the blocks, L of them, counted from 0 over all blocks."""
    weights: np.ndarray
    """[L,S,S,E] float32: each expert's weight in the mixture; 0 where it is not used, a patch's sum is 1."""

    @cached_property
    def first(self) -> np.ndarray:
        """[L,S,S] the strongest expert."""
        return self.weights.argmax(-1)

    @cached_property
    def shares(self) -> np.ndarray:
        """[L,E] share of the patches whose strongest expert it is; a block sums to 1."""
        return (self.first[..., None] == np.arange(self.experts)).mean(axis=(1, 2))

    @property
    def experts(self) -> int:
        return self.weights.shape[-1]


@torch.no_grad()
def routing_of(tower: Any, pixels_13RR: torch.Tensor) -> Routing:
    """The routing of one picture's patches, without the class token; an S2 tower's at its base scale. Raises NoExperts.

    The logits are the model's own output: a hook would also see what another thread asks the same model.
    """
    config = tower.config
    if not getattr(config, "moe_layers", None):
        raise NoExperts("This tower is a dense CLIP: it has no experts to look at. Choose the CLIP-MoE.")
    pixels_13RR = pixels_13RR.to(device=tower.device, dtype=tower.dtype)
    if pixels_13RR.shape[-1] != config.image_size:  # S2: as CLIPMoEVisionTowerS2 makes its smallest scale
        smaller = F.interpolate(pixels_13RR.float(), size=(config.image_size,) * 2, mode="bicubic")
        pixels_13RR = smaller.to(pixels_13RR.dtype)
    logits = tower.vision_tower(pixels_13RR, output_router_logits=True).router_logits
    if not logits:
        raise NoExperts("None of the blocks that this LLaVA uses has experts, so there is nothing to look at.")
    side = config.image_size // config.patch_size
    logits_LNE = torch.stack([block[0, 1:] for block in logits]).float().cpu()
    # Mixture weights as the Router makes them (eq. 3 and 5), 0 for the experts that are not among the K.
    top_LNK, chosen_LNK = logits_LNE.softmax(-1).topk(config.num_experts_per_tok)
    weights_LNE = torch.zeros_like(logits_LNE).scatter(-1, chosen_LNK, top_LNK / top_LNK.sum(-1, keepdim=True))
    return Routing(sorted(config.moe_layers)[: len(logits)], weights_LNE.unflatten(1, (side, side)).numpy())


@torch.no_grad()
def difference(tower: Any, pixels_a: torch.Tensor, pixels_b: torch.Tensor, relative: bool = False) -> np.ndarray:
    """[S,S] float32: 1 - cosine of the two pictures' features at each patch; 0 where the tower sees no difference.

    `relative` divides by the mean difference between patches at different places of the two pictures: 1 is then "as
    unlike as any two places", and numbers of different towers can be compared.
    """
    x_ND, y_ND = (F.normalize(_features(tower, pixels), dim=-1) for pixels in (pixels_a, pixels_b))
    distance_NN = 1 - x_ND @ y_ND.T
    count, map_N = len(distance_NN), distance_NN.diagonal().clamp(min=0)
    if relative:
        others = (distance_NN.sum() - distance_NN.trace()) / (count * (count - 1))
        map_N = map_N / others.clamp(min=1e-6)
    return map_N.unflatten(0, (int(count**0.5), -1)).numpy()


def _features(tower: Any, pixels_13RR: torch.Tensor) -> torch.Tensor:
    """[N,C] in fp32 on the CPU, as LLaVA's projector gets them, without the class token."""
    x_NC = tower(pixels_13RR.to(device=tower.device))[0].float().cpu()
    return x_NC[1:] if getattr(tower, "select_feature", "patch") == "cls_patch" else x_NC


def expert_colours(experts: int) -> np.ndarray:
    """[E,3] in 0..1, the same for an expert everywhere. Up to 8 are safe for the colour-blind, more are not."""
    if experts <= len(OKABE_ITO):
        return np.array([to_rgb(colour) for colour in OKABE_ITO[:experts]])
    return matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, experts))[:, :3]


def overlay(seen: Image.Image, routing: Routing, block: int, side: int = SIDE) -> Image.Image:
    """The picture in grey, each patch tinted by its strongest expert: the more, the larger its weight."""
    layer = routing.blocks.index(block)
    first_SS = routing.first[layer]
    strength_SS = routing.weights[layer].max(-1)
    alpha_SS = 0.2 + 0.6 * strength_SS  # 0.5 for an even pair of experts, 0.8 for one that decides alone
    return _tint(seen, expert_colours(routing.experts)[first_SS], alpha_SS, first_SS, side)


def difference_overlay(seen: Image.Image, map_SS: np.ndarray, scale: float, side: int = SIDE) -> Image.Image:
    """The picture in grey, tinted from yellow to red where it differs. `scale`: the value of full red, one for both
    towers so that their pictures can be compared."""
    strength_SS = np.clip(map_SS / scale, 0, 1)
    colours_SS3 = matplotlib.colormaps["autumn_r"](strength_SS)[..., :3]  # yellow and red show on dark and on light
    return _tint(seen, colours_SS3, 0.85 * strength_SS, np.zeros(map_SS.shape), side)


def _tint(
    seen: Image.Image, colours_SS3: np.ndarray, alpha_SS: np.ndarray, groups_SS: np.ndarray, side: int
) -> Image.Image:
    """Lay a colour over each cell of the grey picture. Faint dark lines part cells of one group, bright ones groups."""
    cell = max(1, round(side / len(alpha_SS)))
    size = cell * len(alpha_SS)
    grey = np.asarray(seen.convert("L").resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
    blow_up = np.ones((cell, cell, 1), np.float32)
    alpha, colours = np.kron(alpha_SS[..., None], blow_up), np.kron(colours_SS3, blow_up)
    muted = 0.1 + 0.82 * grey[..., None]  # neither black nor white: tints show on it
    picture = muted * (1 - alpha) + colours * alpha
    if cell >= 8:
        for rows, groups in (
            (picture, groups_SS),
            (picture.swapaxes(0, 1), groups_SS.T),
        ):  # the second: columns, a view
            for i in range(1, len(groups)):
                changes = np.repeat(groups[i] != groups[i - 1], cell)
                line = rows[i * cell]
                line[changes] = 0.15 * line[changes] + 0.85
                line[~changes] *= 0.88
    return Image.fromarray((picture * 255).round().clip(0, 255).astype(np.uint8))


def strip(seen: Image.Image, routing: Routing, columns: int = 6, side: int = 168) -> Image.Image:
    """Small overlays of all blocks, row by row, each with its number below; RGBA, transparent in between."""
    small = [overlay(seen, routing, block, side) for block in routing.blocks]
    size, gap, text = small[0].width, 12, 26
    columns = min(columns, len(small))
    rows = -(-len(small) // columns)
    sheet = Image.new("RGBA", (columns * (size + gap) - gap, rows * (size + text)), (0, 0, 0, 0))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for i, (block, picture) in enumerate(zip(routing.blocks, small, strict=True)):
        x, y = i % columns * (size + gap), i // columns * (size + text)
        sheet.paste(picture, (x, y))
        draw.text((x + size / 2, y + size + 4), f"block {block}", fill=INK, font=font, anchor="ma")
    return sheet


def shares_figure(routing: Routing) -> Figure:
    """A bar for each block: the share of the patches whose strongest expert is each; on a transparent ground."""
    count = len(routing.blocks)
    ink = {"text.color": INK, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.labelcolor": INK}
    with style(), matplotlib.rc_context({**ink, "font.size": 10, "axes.grid": False}):
        figure = Figure(figsize=(6.4, 1.0 + 0.34 * count), dpi=144, facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        left = np.zeros(count)
        for expert, colour in enumerate(expert_colours(routing.experts)):
            share = routing.shares[:, expert]
            bars = axes.barh(range(count), share, left=left, height=0.72, color=colour, label=f"expert {expert}")
            dark = colour @ (0.299, 0.587, 0.114) > 0.4
            numbers = [f"{value:.0%}" if value >= 0.08 else "" for value in share]
            axes.bar_label(bars, numbers, label_type="center", color="#111111" if dark else "white", fontsize=9)
            left += share
        axes.set(xlim=(0, 1), yticks=range(count), yticklabels=[f"block {block}" for block in routing.blocks])
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel("share of the patches whose strongest expert it is")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.margins(y=0.01)
        axes.invert_yaxis()
        figure.legend(loc="outside upper center", ncols=min(routing.experts, 4), handlelength=1, handleheight=1)
        return figure
