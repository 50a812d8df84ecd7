"""Describes a drawing in words: what its pixels show, said in sentences of 20 to 45 words.

`look` measures a rendered emoji (colours by painted area, outline, parts, symmetry); `describe` says it;
`long_captions` adds the name and its other names. Everything is computed: the same drawing always gets the
same captions, and no caption says what the pixels do not show. `openmoji.py` uses it for the fine-tuning
captions, which must tell the model something that the short caption ("an emoji of NAME") does not.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# OpenMoji's own palette (its style guide; every fill and stroke of release 17.0.0 is one of these) in words.
# The skin colours get colour words: a caption says what is painted, and the name says that it is skin.
PALETTE = {
    "000000": "black", "3F3F3F": "charcoal black", "9B9B9A": "grey", "D0CFCE": "light grey", "FFFFFF": "white",
    "FCEA2B": "yellow", "F1B31C": "golden yellow", "F4AA41": "light orange", "E27022": "orange",
    "EA5A47": "light red", "D22F27": "red", "781E32": "maroon", "FFA7C0": "pink", "E67A94": "dark pink",
    "B399C8": "light purple", "8967AA": "purple", "92D3F5": "light blue", "61B2E4": "blue",
    "1E50A0": "dark blue", "B1CC33": "light green", "5C9E31": "green", "186648": "dark green",
    "FADCBC": "pale peach", "DEBB90": "beige", "C19A65": "light brown", "A57939": "brown",
    "6A462F": "dark brown", "352318": "dark brown",
}  # fmt: skip
_WORDS = tuple(PALETTE.values())
_RGB = np.array([[int(code[i : i + 2], 16) for i in (0, 2, 4)] for code in PALETTE], np.float32)
# Pixels farther than this from every palette colour are blends along an edge: they have no name.
_SAME_COLOUR = 24
_UNNAMED = -1
# Agreement above which a drawing is called symmetric: a plain face passes, a clock at three does not.
_SYMMETRIC = 0.985
_COUNTS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


@dataclass(frozen=True)
class Looks:
    """What `look` measured. Shares are 0..1; x grows to the right and y downward."""

    colours: tuple[tuple[str, float], ...]
    """Colour words with their share of the named painted area, largest first."""
    width: float
    height: float
    """Size of the box around everything painted, as a share of the picture."""
    place: tuple[float, float]
    """The box's centre relative to the picture's, as a share of the picture."""
    weight: tuple[float, float]
    """The paint's centre of mass relative to the box's centre; +-1 is the box's edge."""
    fill: float
    """Painted share of the box: 1 for a rectangle, pi/4 for a disc, small for lines."""
    disc: float
    """Overlap (intersection over union) of the paint with the ellipse inscribed in the box."""
    parts: int
    """Painted regions that do not touch each other (specks are not counted)."""
    mirrored: float
    upside_down: float
    """Share of the paint that has the same colour after a left-right / top-bottom mirroring of the box."""

    def share(self, colour: str) -> float:
        """Share of the painted area with this colour word, 0 when it is not used."""
        return dict(self.colours).get(colour, 0.0)


def look(rgba: np.ndarray) -> Looks:
    """Measure a drawing.

    `rgba`: uint8 `[H, W, 4]` on a transparent ground, so that white paint counts and the ground does not.
    Raises ValueError for a drawing without any paint.
    """
    mask = rgba[..., 3] > 127
    if not mask.any():
        raise ValueError("the drawing is blank")
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    mask = mask[top:bottom, left:right]
    names = _colour_indices(rgba[top:bottom, left:right], mask)
    y, x = np.mgrid[-1 : 1 : mask.shape[0] * 1j, -1 : 1 : mask.shape[1] * 1j]
    ellipse = x * x + y * y <= 1
    return Looks(
        colours=_colour_shares(names),
        width=(right - left) / width,
        height=(bottom - top) / height,
        place=((left + right) / 2 / width - 0.5, (top + bottom) / 2 / height - 0.5),
        weight=(float(x[mask].mean()), float(y[mask].mean())),
        fill=float(mask.mean()),
        disc=float((mask & ellipse).sum() / (mask | ellipse).sum()),
        parts=_count_parts(mask),
        mirrored=_agreement(mask, names, 1),
        upside_down=_agreement(mask, names, 0),
    )


def _colour_indices(rgba: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Index into `_WORDS` of every pixel `[h, w]`, `_UNNAMED` for the ground and for blended edges."""
    names = np.full(mask.shape, _UNNAMED)
    opaque = mask & (rgba[..., 3] > 250)
    colours = rgba[opaque][:, :3].astype(np.float32)
    # |c - p|^2 by one matrix product; whole numbers below 2^24, so float32 is exact on every machine.
    distance = (colours**2).sum(1, keepdims=True) - 2 * colours @ _RGB.T + (_RGB**2).sum(1)
    nearest = distance.argmin(1)
    names[opaque] = np.where(distance.min(1) <= _SAME_COLOUR**2, nearest, _UNNAMED)
    return names


def _colour_shares(names: np.ndarray) -> tuple[tuple[str, float], ...]:
    counts = np.bincount(names[names != _UNNAMED], minlength=len(_WORDS))
    shares: dict[str, float] = {}
    for word, count in zip(_WORDS, counts / max(counts.sum(), 1), strict=True):
        shares[word] = shares.get(word, 0.0) + float(count)
    return tuple(sorted(((w, s) for w, s in shares.items() if s > 0), key=lambda item: (-item[1], item[0])))


def _agreement(mask: np.ndarray, names: np.ndarray, axis: int) -> float:
    """Share of the painted area whose colour is the same in the mirrored box."""
    other_mask, other_names = np.flip(mask, axis), np.flip(names, axis)
    # An unnamed edge pixel agrees with any paint: anti-aliasing is seldom symmetric to the pixel.
    same = mask & other_mask & ((names == other_names) | (names == _UNNAMED) | (other_names == _UNNAMED))
    return float(same.sum() / (mask | other_mask).sum())


def _count_parts(mask: np.ndarray, speck: float = 0.002) -> int:
    """Number of 8-connected regions larger than `speck` of the box (union-find over horizontal runs)."""
    parent: list[int] = []
    area: list[int] = []

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    above: list[tuple[int, int, int]] = []
    for row in mask:
        edges = np.flatnonzero(np.diff(np.concatenate(([0], row.astype(np.int8), [0]))))
        runs = []
        for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            label = len(parent)
            parent.append(label)
            area.append(end - start)
            for other_start, other_end, other in above:
                if other_start <= end and start <= other_end and root(other) != root(label):
                    a, b = root(other), root(label)
                    parent[b], area[a] = a, area[a] + area[b]
            runs.append((start, end, label))
        above = runs
    return sum(parent[i] == i and area[i] > speck * mask.size for i in range(len(parent)))


def colour_words(looks: Looks) -> str:
    """E.g. "mostly yellow with some white and a little red, outlined in black"."""
    black = looks.share("black")
    if black > 0.9:
        return "all black"
    # Nearly every OpenMoji has black lines: they count as a colour only where they are most of the paint.
    listed = [(w, s) for w, s in looks.colours if s >= 0.04 and (w != "black" or s > 0.45)]
    (first, share), rest = listed[0], listed[1:4]
    words = f"{'mostly' if share >= 0.5 else 'partly'} {first}" if share < 0.95 else f"all {first}"
    some = [f"{'some' if s >= 0.12 else 'a little'} {w}" for w, s in rest]
    if some:
        words += " with " + " and ".join([", ".join(some[:-1]), some[-1]] if some[1:] else some)
    outlined = 0.04 <= black <= 0.45
    return words + (", outlined in black" if outlined else "")


def form_words(looks: Looks) -> str:
    """The outline, e.g. "a round shape", "a wide rectangle", "a tall narrow drawing"."""
    aspect = looks.width / looks.height
    even = 0.92 < aspect < 1.09
    if looks.disc > 0.93 and even:
        return "a round shape"
    if looks.fill > 0.93:
        return "a square shape" if even else f"a {'wide' if aspect > 1 else 'tall'} rectangle"
    kind = "line drawing" if looks.fill < 0.4 and looks.share("black") > 0.6 else "drawing"
    if aspect > 1.8 or aspect < 0.55:
        return f"a long flat {kind}" if aspect > 1 else f"a tall narrow {kind}"
    if aspect > 1.2 or aspect < 0.83:
        return f"a {kind} wider than it is tall" if aspect > 1 else f"a {kind} taller than it is wide"
    return f"a {kind} about as wide as it is tall"


def _sides(offset: tuple[float, float], threshold: float) -> str:
    """The side that an offset points to ("top left"), or "" when it is smaller than the threshold."""
    x, y = offset
    vertical = "top" if y < -threshold else "bottom" if y > threshold else ""
    horizontal = "left" if x < -threshold else "right" if x > threshold else ""
    return f"{vertical} {horizontal}".strip()


def detail_words(looks: Looks) -> list[str]:
    """Everything else that can be said, the most telling first; at least three phrases."""
    details = []
    sideways, upright = looks.mirrored > _SYMMETRIC, looks.upside_down > _SYMMETRIC
    if sideways and upright:
        details.append("symmetric in both directions")
    elif sideways or upright:
        details.append("left-right symmetric" if sideways else "symmetric from top to bottom")
    else:
        details.append("nearly left-right symmetric" if looks.mirrored > 0.88 else "not left-right symmetric")
    parts = _COUNTS.get(looks.parts, "many")
    details.append("in one piece" if looks.parts == 1 else f"in {parts} separate parts")
    size = max(looks.width, looks.height)
    large, small = size > 0.85, size < 0.5
    details.append("filling the picture" if large else "small in the picture" if small else "of medium size")
    if side := _sides(looks.weight, 0.12):
        details.append(f"heavier at the {side}")
    if side := _sides(looks.place, 0.05):
        details.append(f"placed towards the {side}")
    if looks.fill < 0.3:
        details.append("with much empty space in it")
    return details


def describe(looks: Looks) -> str:
    """One sentence without the name: form, colours and every detail."""
    return f"{_capital(form_words(looks))}, {colour_words(looks)}; it is {', '.join(detail_words(looks))}."


def other_names(name: str, code_points: Sequence[int], aliases: Sequence[str]) -> list[str]:
    """Other names of an emoji: Unicode's own name of its first character, then the common aliases.

    Only names that add a word to `name`, and only where a single character (with or without a skin tone)
    makes the emoji: the first character of a longer sequence means something else. In Unicode's names "black"
    and "white" mean filled and hollow ("heavy black heart" is the red heart): a caption must not repeat them.
    """
    core = [c for c in code_points if c != 0xFE0F and not 0x1F3FB <= c <= 0x1F3FF]
    candidates = [unicodedata.name(chr(core[0]), "").lower()] if len(core) == 1 else []
    candidates += [alias.strip(":").replace("_", " ").lower() for alias in aliases]
    known = set(name.lower().split())
    kept = []
    for candidate in candidates:
        words = set(candidate.split())
        readable = len(candidate) > 2 and candidate.replace(" ", "").replace("-", "").isalpha()
        if readable and words - known and not (words - known) & {"black", "white"}:
            kept.append(candidate)
            known |= words
    return kept


def long_captions(name: str, others: Sequence[str], looks: Looks) -> list[str]:
    """Two captions of a drawing in different wordings; which wordings and details depends on the name only."""
    form, colours, details = form_words(looks), colour_words(looks), detail_words(looks)
    turn = stable_hash(name)
    captions = []
    for i in range(2):
        also = others[min(i, len(others) - 1)] if others else ""
        called, known, or_also = (
            (f", also called {also}", f" Also known as {also}.", f" or {also}") if also else ("",) * 3
        )
        start = (turn // 3 + i) % len(details)
        said = ", ".join((details[start:] + details[:start])[:3])
        captions.append(
            (
                f"{_capital(name)}{called}. It is {colours}; {form}, {said}.",
                f"A picture of {name}: {form}, {said}. The colours: {colours}.{known}",
                f"{_capital(form)} that shows {name}{or_also}, {said}; it is {colours}.",
            )[(turn + i) % 3]
        )
    return captions


def stable_hash(text: str) -> int:
    """A 64-bit hash that is the same in every process (Python's own `hash` of a string is not)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
