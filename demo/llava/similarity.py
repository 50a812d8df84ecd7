"""What the eyes themselves say, without a language model: cosines of the whole CLIP behind each LLaVA's vision tower,
between two pictures, and between two statements and two pictures.

LLaVA's tower stops before the projection with which CLIP compares (its last block need not even be loaded), so the CLIP
is read again here, when it is first asked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.load import load_bundle
from train_encoder.data.decode import ImageTransform
from train_encoder.evaluate.mmvp import right_statements
from train_encoder.features.encode import encode_images, encode_texts

from ..mining.encoders import check_reads_texts
from .generate import Llava


@dataclass(frozen=True)
class Match:
    """How one CLIP matches two statements, each about one picture of a pair, to the two pictures."""

    cosines: list[list[float]]
    """[statement][picture]."""
    chosen: tuple[int | None, int | None]
    """The picture that each statement chooses by MMVP's rule: its own is its number; None where both score the same."""

    @property
    def right(self) -> int:
        """How many statements choose their own picture: 0, 1 or 2."""
        return sum(picture == statement for statement, picture in enumerate(self.chosen))


class Similarity:
    """Cosines by both CLIPs; they stay loaded, and look at one pair at a time: all visitors share them."""

    def __init__(self, llavas: Sequence[Llava]):
        self.llavas = llavas
        self._bundles: dict[str, ClipBundle] = {}
        self._lock = threading.Lock()

    def cosines(self, first: Image.Image, second: Image.Image) -> dict[str, float]:
        """-> {name of the LLaVA: cosine}. Raises FileNotFoundError or ValueError where a CLIP is gone."""
        found = {}
        with self._lock:
            for llava in self.llavas:
                one, two = self._encode(llava, (first, second))
                found[llava.name] = float(one @ two)
        return found

    def matches(
        self,
        pictures: Sequence[Image.Image],
        statements: Sequence[str],
        explain: Callable[[Exception], str] = str,
    ) -> list[Match | str]:
        """What each LLaVA's CLIP says of two statements about two pictures. Where it cannot say anything (it has no
        text tower, say) its place holds what `explain` makes of the error."""
        found: list[Match | str] = []
        with self._lock:
            for llava in self.llavas:
                try:
                    found.append(self._match(llava, pictures, statements))
                except Exception as error:  # shown in its place; the other one's stands
                    found.append(explain(error))
        return found

    def _match(self, llava: Llava, pictures: Sequence[Image.Image], statements: Sequence[str]) -> Match:
        bundle = self._bundle(llava)
        check_reads_texts(bundle)
        images = self._encode(llava, pictures)[None]  # [1,2,P], as the statements
        texts = encode_texts(bundle, statements, device=llava.llm.model.device)[None]
        own, other = right_statements(images, texts)[0], right_statements(images.flip(1), texts)[0]
        chosen = [s if own[s] else 1 - s if other[s] else None for s in (0, 1)]
        return Match((texts[0] @ images[0].T).tolist(), tuple(chosen))

    def _encode(self, llava: Llava, pictures: Sequence[Image.Image]) -> torch.Tensor:
        bundle = self._bundle(llava)
        pixels = torch.stack([ImageTransform(bundle.image_size)(picture) for picture in pictures])
        return encode_images(bundle, pixels, device=llava.llm.model.device)

    def _bundle(self, llava: Llava) -> ClipBundle:
        source = llava.tower_source
        if source not in self._bundles:
            self._bundles[source] = load_bundle(source)
        return self._bundles[source]
