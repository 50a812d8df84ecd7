"""How alike each eye finds two pictures: cosines of the whole CLIP behind each LLaVA's tower, loaded when first asked.

LLaVA's tower stops before the projection that CLIP compares pictures with (its last block need not even be loaded),
so the CLIP is read again here, its vision half only.
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

from .models import Eye


class Similarity:
    """Cosines of uploaded pictures by eye; the encoders stay loaded."""

    def __init__(self, eyes: Sequence[Eye]):
        self.eyes = eyes
        self._bundles: dict[str, ClipBundle] = {}
        self._lock = threading.Lock()

    def cosines(self, first: Image.Image, second: Image.Image) -> dict[str, float]:
        """-> {eye's name: cosine}. Raises FileNotFoundError or ValueError where an eye's CLIP is gone."""
        found = {}
        with self._lock:  # one picture pair at a time: the models are shared by all visitors
            for eye in self.eyes:
                bundle = self._bundle(eye)
                pixels = torch.stack([ImageTransform(bundle.image_size)(picture) for picture in (first, second)])
                one, two = encode_images(bundle, pixels, device=eye.llm.model.device)
                found[eye.name] = float(one @ two)
        return found

    def _bundle(self, eye: Eye) -> ClipBundle:
        source = eye.tower_source
        if source not in self._bundles:
            bundle = load_bundle(source)
            bundle.model.text_model = None  # only pictures are compared
            self._bundles[source] = bundle
        return self._bundles[source]
