"""Near duplicates among pictures: by a hash that sees shapes and a thumbnail that sees colours."""

from __future__ import annotations

import imagehash
import numpy as np
from PIL import Image

HASH_SIDE, THUMB_SIDE = 8, 16
HASH_BYTES = HASH_SIDE**2 // 8


def looks(image: Image.Image) -> np.ndarray:
    """RGB picture -> uint8 [B]: its perceptual hash (64 bits, packed), which sees no colour, then an RGB thumbnail
    just large enough to see a clock's hands."""
    bits = np.packbits(imagehash.phash(image, hash_size=HASH_SIDE).hash.reshape(-1))
    thumb = np.asarray(image.resize((THUMB_SIDE, THUMB_SIDE), Image.Resampling.BOX)).reshape(-1)
    return np.concatenate([bits, thumb])


class NearDuplicates:
    """Tells which pictures are copies: at most `max_bits` bits of their hashes differ AND no pixel of their thumbnails
    differs by more than `max_colour` (of 255) in a channel. Hashes alone are not enough: a red and a blue circle have
    the same one, and are just such a pair as mining looks for.
    """

    def __init__(self, looks: np.ndarray, max_bits: int, max_colour: int) -> None:
        """looks: uint8 [N, B], perhaps memory-mapped."""
        self.hashes = np.ascontiguousarray(looks[:, :HASH_BYTES]).view(np.uint64).reshape(-1)
        self.looks, self.max_bits, self.max_colour = looks, max_bits, max_colour

    def __call__(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Numbers of n first and n second pictures -> bool [n]."""
        near = np.bitwise_count(self.hashes[first] ^ self.hashes[second]) <= self.max_bits
        for some in np.array_split(near.nonzero()[0], near.sum() // 4096 + 1):  # thumbnails of a few at a time
            a, b = (self.looks[numbers[some], HASH_BYTES:].astype(np.int16) for numbers in (first, second))
            near[some] = np.abs(a - b).max(1, initial=0) <= self.max_colour
        return near
