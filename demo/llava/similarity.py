"""How alike each LLaVA's CLIP finds two pictures: cosines of the whole CLIP behind its vision tower.

LLaVA's tower stops before the projection with which CLIP compares pictures (its last block need not even be loaded),
so the CLIP is read again here, its vision half only, when it is first asked.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from PIL import Image

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.load import load_bundle
from train_encoder.data.decode import ImageTransform
from train_encoder.features.encode import encode_images

from .generate import Llava


class Similarity:
    """Cosines of uploaded pictures; the encoders stay loaded."""

    def __init__(self, llavas: Sequence[Llava]):
        self.llavas = llavas
        self._bundles: dict[str, ClipBundle] = {}
        self._lock = threading.Lock()

    def cosines(self, first: Image.Image, second: Image.Image) -> dict[str, float]:
        """-> {name of the LLaVA: cosine}. Raises FileNotFoundError or ValueError where a CLIP is gone."""
        found = {}
        with self._lock:  # one pair at a time: the encoders are shared by all visitors
            for llava in self.llavas:
                source = llava.tower_source
                if source not in self._bundles:
                    self._bundles[source] = load_bundle(source)
                    self._bundles[source].model.text_model = None  # only pictures are compared
                bundle = self._bundles[source]
                pixels = torch.stack([ImageTransform(bundle.image_size)(picture) for picture in (first, second)])
                one, two = encode_images(bundle, pixels, device=llava.llm.model.device)
                found[llava.name] = float(one @ two)
        return found
