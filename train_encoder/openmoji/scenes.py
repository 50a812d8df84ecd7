"""What there is in a scene, and every sentence about it: captions, statements, questions.

A scene is one choice of every attribute. The attributes are those nine kinds of MMVP (Tong et al. 2024) on which CLIP
is blind, and the noun. The web's kind of caption names the noun and the colour; a long one begins with it and says
everything, in a fixed order, as captions of one captioner do.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Scene = Mapping[str, str]
"""Attribute -> value, of all `ATTRIBUTES`."""

NOUNS = ("cat", "pig", "tree", "house", "car", "umbrella", "mushroom", "apple")
NEW_NOUNS = ("frog", "fish", "cactus", "rocket")
"""Nouns of the test only: no training picture and no training caption has them."""


@dataclass(frozen=True)
class Attribute:
    kind: str
    """MMVP's name of it ("" for the noun, which is no kind of MMVP's)."""
    values: tuple[str, ...]
    """What a caption says; a scene holds one of these."""
    question: str

    @property
    def answers(self) -> tuple[str, ...]:
        """What may answer the question."""
        return tuple(map(answer_of, self.values))


def answer_of(value: str) -> str:
    """What answers the question about an attribute of this value."""
    return {"no ball": "nowhere"}.get(value, value.split()[-1])


ATTRIBUTES = {
    "noun": Attribute("", NOUNS, "What is it?"),
    "colour": Attribute("Color and Appearance", ("red", "yellow", "green", "blue"), "What color is it on?"),
    "quantity": Attribute("Quantity and Count", ("one", "four"), "How many are there?"),
    "size": Attribute("Viewpoint and Perspective", ("large", "small"), "Is it large or small?"),
    "texture": Attribute(
        "Structural and Physical Characteristics", ("plain", "striped", "dotted", "checked"), "What pattern is it on?"
    ),
    "time": Attribute("State and Condition", ("day", "night"), "Is it day or night?"),
    "ball": Attribute("Presence of Specific Features", ("ball left", "ball right", "no ball"), "Where is the ball?"),
    "arrow": Attribute("Orientation and Direction", ("up", "down"), "Which way does the arrow point?"),
    "letter": Attribute("Texts", ("A", "O", "X"), "Which letter is on the sign?"),
}
POSITION = "Positional and Relational Context"
"""MMVP's ninth kind: the ball on the one side and on the other."""
KINDS = (*(attribute.kind for attribute in ATTRIBUTES.values() if attribute.kind), POSITION)
SHORT = "{noun}, {colour} ground"
DETAILS = "{quantity}, {size}, {texture}, {time}, {ball}, arrow {arrow}, sign {letter}."
LONG = f"{SHORT}. {DETAILS}"
NOUN_TEMPLATES = tuple(f"{{}}, {colour} ground" for colour in ATTRIBUTES["colour"].values)
COLOUR_TEMPLATES = tuple(f"{noun}, {{}} ground" for noun in NOUNS)
"""What a classification by noun and one by colour ask: short captions, `{}` for the class."""
HELD_OUT_BY = ("noun", "texture", "colour")
HELD_OUT_SHARE = 1 / 6


def held_out(scene: Scene) -> bool:
    """Whether the encoder's and LLaVA's training never see a scene's combination of `HELD_OUT_BY`, or its noun."""
    combination = ":".join(scene[name] for name in HELD_OUT_BY)
    return scene["noun"] in NEW_NOUNS or stable_hash(combination) < HELD_OUT_SHARE * 2**64


def stable_hash(text: str) -> int:
    """A 64-bit hash that is the same in every process (Python's own `hash` of a string is not)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def draw_scenes(count: int, rng: random.Random, *, held: bool, nouns: Sequence[str] = NOUNS) -> list[Scene]:
    """`count` different scenes, either all held out or none."""
    drawn: dict[str, Scene] = {}
    while len(drawn) < count:
        scene = {name: rng.choice(nouns if name == "noun" else a.values) for name, a in ATTRIBUTES.items()}
        if held_out(scene) == held:
            drawn[LONG.format(**scene)] = scene
    return list(drawn.values())


@dataclass(frozen=True)
class ScenePair:
    """Two held-out scenes that differ in one attribute."""

    attribute: str
    scenes: tuple[Scene, Scene]
    split: str
    """`combinations`: of known nouns; `nouns`: of new ones."""

    @property
    def kind(self) -> str:
        """MMVP's name of what differs."""
        moved = self.attribute == "ball" and all(scene["ball"] != "no ball" for scene in self.scenes)
        return POSITION if moved else ATTRIBUTES[self.attribute].kind

    @property
    def statements(self) -> tuple[str, str]:
        """Long captions: all but one word of them is the same."""
        return tuple(LONG.format(**scene) for scene in self.scenes)


def draw_pairs(known: int, new: int, rng: random.Random) -> list[ScenePair]:
    """Pairs of every kind of MMVP's: `known` of known nouns and `new` of new ones."""
    pairs = []
    for kind, (split, nouns, count) in itertools.product(
        KINDS, (("combinations", NOUNS, known), ("nouns", NEW_NOUNS, new))
    ):
        (name,) = [name for name, a in ATTRIBUTES.items() if kind in (a.kind, POSITION if name == "ball" else "")]
        drawn: list[ScenePair] = []
        while len(drawn) < count:
            (scene,) = draw_scenes(1, rng, held=True, nouns=nouns)
            other = {**scene, name: rng.choice([value for value in ATTRIBUTES[name].values if value != scene[name]])}
            pair = ScenePair(name, (scene, other), split)
            if held_out(other) and pair.kind == kind:
                drawn.append(pair)
        pairs += drawn
    return pairs
