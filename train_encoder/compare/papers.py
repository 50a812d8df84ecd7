"""The papers' own figures, for the data sets that are theirs: they stand in brackets beside what a comparison measured.

CLIP-MoE: Zhang et al., arXiv 2409.19291 (EMNLP 2025), Tables 1 to 5: ViT-L/14 at 224 px, trained on ShareGPT4V; Table
3, LLaVA-1.5, at 336 px. CLIP-FMoE: its project page (ICLR 2026), ViT-L/14. All in percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RETRIEVAL = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")


@dataclass(frozen=True)
class Published:
    """What a paper says of one data set."""

    images: tuple[int, ...]
    """How many images the whole set has (some sets go round in two versions): another number is another set."""
    source: str
    scores: Mapping[str, Mapping[str, float]]
    """Recipe, by its short name -> score -> percent."""


def _rows(keys: Sequence[str], **recipes: Sequence[float]) -> dict[str, dict[str, float]]:
    """recipes: names with _ for -."""
    return {name.replace("_", "-"): dict(zip(keys, values, strict=True)) for name, values in recipes.items()}


_TABLES_2_4 = "CLIP-MoE paper, Table 2, of vanilla-moe Table 4 (ViT-L/14, 224 px, ShareGPT4V)"
COCO = Published(
    (5000,),
    f"{_TABLES_2_4}; of fmoe: CLIP-FMoE's project page",
    {
        **_rows(
            RETRIEVAL,
            base=(56.1, 79.5, 86.8, 35.4, 60.1, 70.2),
            direct_ft=(63.3, 84.9, 91.0, 44.5, 70.0, 78.9),
            sparse_upcycling=(62.9, 84.6, 90.8, 45.2, 70.6, 79.6),
            long_clip=(62.8, 85.1, 91.2, 46.3, 70.8, 79.8),
            vanilla_moe=(62.6, 84.2, 90.3, 43.4, 68.3, 77.8),
            dmu=(65.0, 86.0, 92.0, 46.8, 71.7, 80.4),
        ),
        **_rows(("t2i_r1", "i2t_r1"), fmoe=(47.7, 65.6)),
    },
)
FLICKR30K = Published(
    (31_783, 31_014),
    _TABLES_2_4,
    _rows(
        RETRIEVAL,
        base=(48.5, 72.6, 80.8, 28.0, 49.3, 58.7),
        direct_ft=(50.5, 74.4, 82.3, 38.5, 61.3, 69.9),
        sparse_upcycling=(49.6, 73.8, 82.1, 39.5, 62.4, 71.1),
        long_clip=(53.4, 77.5, 85.3, 41.2, 64.1, 72.6),
        vanilla_moe=(56.4, 79.3, 86.3, 37.6, 60.3, 69.3),
        dmu=(60.5, 82.3, 88.8, 42.1, 64.7, 73.2),
    ),
)
IIW = Published(
    (612,),
    "CLIP-FMoE's project page, IIW-Long (taken to be the 612 descriptions that people wrote; it does not say)",
    _rows(
        ("t2i_r1", "i2t_r1"),
        base=(90.5, 90.2),
        direct_ft=(97.5, 96.8),
        long_clip=(97.2, 94.5),
        fmoe=(97.3, 98.0),
    ),
)

_TABLE_5 = "CLIP-MoE paper, Table 5 (ViT-L/14, 224 px, ShareGPT4V)"


def _table_5(images: int, source: str = _TABLE_5, **more: float) -> Published:
    return Published((images,), source, _rows(("top1",), **{name: (value,) for name, value in more.items()}))


IMAGENET = f"{_TABLE_5}, of vanilla-moe Table 4; of fmoe: CLIP-FMoE's project page"
FMOE_PAGE = "CLIP-FMoE's project page"
ZERO_SHOT = {
    "imagenet": _table_5(
        50_000,
        IMAGENET,
        base=75.5,
        direct_ft=59.8,
        sparse_upcycling=62.5,
        long_clip=73.5,
        vanilla_moe=75.4,
        dmu=74.6,
        fmoe=74.87,
    ),
    "imagenet-o": _table_5(2000, base=31.9, direct_ft=34.5, sparse_upcycling=34.4, long_clip=33.7, dmu=33.5),
    "imagenet-v2": _table_5(10_000, base=69.9, direct_ft=53.3, sparse_upcycling=56.5, long_clip=67.9, dmu=68.5),
    "cifar10": _table_5(10_000, base=95.4, direct_ft=87.8, sparse_upcycling=91.3, long_clip=95.3, dmu=95.7),
    "cifar100": _table_5(10_000, base=76.8, direct_ft=63.1, sparse_upcycling=67.5, long_clip=78.5, dmu=79.6),
    "stanford-cars": _table_5(
        8041, FMOE_PAGE, base=77.93, direct_ft=69.12, sparse_upcycling=68.98, dmu=71.20, fmoe=74.62
    ),
    "fgvc-aircraft": _table_5(
        3333, FMOE_PAGE, base=31.77, direct_ft=25.83, sparse_upcycling=27.66, dmu=27.81, fmoe=29.58
    ),
}
DATA_SETS = {
    "retrieval": {"coco-5k": COCO, "flickr30k": FLICKR30K, "iiw": IIW},
    "zero_shot": ZERO_SHOT,
}
"""Kind of results -> data set, called as the presets of `evaluate` are."""

TABLE_1 = {
    "orientation": (40, 33.3, 46.7, 46.7),
    "presence": (33.3, 26.7, 26.7, 13.3),
    "state": (20, 40, 53.3, 40),
    "quantity": (60, 46.7, 40, 40),
    "positional": (46.7, 33.3, 40, 26.7),
    "color": (26.7, 13.3, 6.7, 6.7),
    "structural": (26.7, 46.7, 40, 33.3),
    "text": (26.7, 40, 46.7, 40),
    "viewpoint": (53.3, 46.7, 40, 60),
}
"""MMVP-VLM's kind of pairs, by the beginning of its name -> experts 0 to 3 alone."""
TABLE_1_SOURCE = "CLIP-MoE paper, Table 1 (experts 0 to 3 alone)"
MMVP_PAIRS = 135

LLAVA_13B = {
    "mme": (1522.6, 1560.1),
    "pope": (85.9, 86.5),
    "mmbench": (67.7, 69.3),
    "mmvet": (35.3, 39.5),
    "vizwiz": (56.7, 59.2),
    "mmstar": (36.1, 36.7),
    "ocrbench": (33.6, 34.4),
    "vqav2": (80.0, 80.0),
    "textvqa_no_ocr": (48.7, 48.3),
    "gqa": (63.2, 63.8),
}
"""CLIP-MoE paper, Table 3: LLaVA-1.5-13B with OpenAI's CLIP, with CLIP-MoE. (eval-llava's results have the 7B rows.)"""


def published(kind: str, name: str, images: int) -> Published | None:
    """What the papers say of a data set; None where it is not theirs, or not the whole of it."""
    found = DATA_SETS.get(kind, {}).get(name)
    return found if found is not None and images in found.images else None


def expert_figures(scores: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Table 1's row of each kind of pairs in a variant's `scores`; none where they are not MMVP-VLM's 135 pairs."""
    if scores.get("pairs") != MMVP_PAIRS:
        return {}
    found = {}
    for kind in scores["by_type"]:
        row = next((row for start, row in TABLE_1.items() if kind.lower().startswith(start)), None)
        if row is not None:
            found[kind] = row
    return found
