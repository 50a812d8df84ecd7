"""Finds blind pairs: pictures that the dense CLIP embeds as the same while a reference sees them apart.

    llava-clipmoe mine-pairs photos --output-dir runs/pairs
    llava-clipmoe mine-pairs openmoji --questions runs/llava-quickstart/data/heldout.jsonl --only-with-questions

IMAGES is a folder of pictures (at any depth, no captions needed), a CSV/TSV/JSON/JSONL file with a column of paths,
`openmoji`, or any other image-caption source that train-encoder reads. The result is a folder that can be given away:
pairs.jsonl, pictures/, contact_sheet.png, mining.json. What is encoded is kept in --cache: the next run, with other
thresholds, takes seconds. A killed run goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console

from llava_clipmoe.files import atomic_directory, remove_leftovers, replace_surrogates, write_json
from train_encoder.data.pairs import DataError
from train_encoder.report.document import Table

from .contact_sheet import draw_contact_sheet
from .duplicates import NearDuplicates
from .encode import Encoded, encode_pictures
from .encoders import DENSE, DINOV2, EXPERTS, MOE, ClipTower, DinoTower, ReadsNoTexts, Tower
from .images import Pictures, open_pictures
from .pairs import PICTURES, ROWS, SHEET, SUMMARY, BlindPair, Question, right_by_attribute, save_picture, write_pairs
from .questions import Asked, read_questions, shared_questions
from .search import Criteria, Found, exact_cosines, search
from .statements import match_statements

OUTCOMES = {
    "both": "passed both thresholds",
    "dense": "are the widest gaps above the dense threshold: no pair passed the reference's too",
    "closest": "are the widest gaps among the closest pairs: no pair was above the dense threshold",
}
BOUNDS = {
    "dense_threshold": (-1, 1),
    "reference_threshold": (-1, 1),
    "top": (1, 50_000),
    "candidates": (1, 1_000_000),
    "per_image": (1, 1_000_000),
    "duplicate_bits": (0, 64),
    "duplicate_colour": (-1, 255),
    "batch_size": (1, 65_536),
    "workers": (0, 1024),
}


@dataclass(frozen=True)
class Settings:
    images: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="IMAGES")]
    """The pictures; see above."""
    dense: str = "runs/quickstart/base"
    """The CLIP that is blind to the difference: a dense CLIP's directory or hub id."""
    moe: str = "runs/quickstart/clip-moe"
    """A CLIP-MoE's directory or hub id."""
    output_dir: Path = Path("runs/pairs")
    """Folder of the result."""
    reference: str = MOE
    """What sees the pictures apart: clip-moe, experts (the smallest cosine over the experts), or a DINOv2's directory
    or hub id."""
    dense_threshold: float = 0.95
    """The dense cosine must be above it (MMVP's value)."""
    reference_threshold: float = 0.6
    """The reference's cosine must be below it (MMVP's value, for DINOv2)."""
    top: int = 100
    """Pairs kept, by gap (dense cosine minus the reference's)."""
    candidates: int = 1000
    """Where no pair is above the dense threshold: this many of the highest dense cosines are looked at."""
    per_image: int = 2
    """A picture is in at most this many pairs."""
    duplicate_bits: int = 10
    """Pictures are near duplicates when at most this many of the 64 bits of their perceptual hashes differ..."""
    duplicate_colour: int = 16
    """... and no pixel of their thumbnails differs by more than this, of 255. -1 keeps near duplicates."""
    questions: Path | None = None
    """JSONL rows {image, attribute, question, answer}: a pair gets the questions that both its pictures have, word for
    word, with different answers. A row may also have `statement` (what the picture shows: each eye's matches are
    counted) and `pair` (a number: such pictures share the question with those of their own pair alone)."""
    only_with_questions: bool = False
    """Keep only pairs that have a question."""
    split: str = "train"
    """Split to read, where the source has several."""
    cache: Path | None = None
    """Folder of the embeddings; OUTPUT_DIR/cache when absent. Those of other models and pictures stay in it, to be
    used again; it can be deleted at any time."""
    device: str = "auto"
    """auto (the GPU where there is one), cpu, cuda, cuda:1, ..."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Of the encoders: bf16 is faster on a GPU."""
    batch_size: int = 64
    """Pictures encoded at a time."""
    workers: int = 4
    """Processes that decode pictures; 0 does it in this one."""

    @property
    def reference_name(self) -> str:
        """What `reference` is called in the result."""
        return self.reference if self.reference in (MOE, EXPERTS) else DINOV2

    def is_reference(self, encoder: str) -> bool:
        """Whether this encoder is the reference, or one of the experts whose smallest cosine it is."""
        return encoder.startswith("expert") if self.reference == EXPERTS else encoder == self.reference_name


def check(s: Settings) -> None:
    """Raises ValueError for settings out of bounds, and for an output folder with other people's pictures in it."""
    for name, (low, high) in BOUNDS.items():
        value = getattr(s, name)
        if not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} must be between {low} and {high:,}, not {value}.")
    if s.only_with_questions and s.questions is None:
        raise ValueError("--only-with-questions needs --questions FILE.jsonl.")
    pictures = s.output_dir / PICTURES
    if pictures.exists() and not (s.output_dir / SUMMARY).exists():
        raise ValueError(
            f"{pictures} exists and was not made by this command, which would replace it. Give another --output-dir."
        )


def mine(s: Settings) -> Path:
    """Mine blind pairs and write their folder; -> the folder. Prints what was found."""
    start = time.monotonic()
    check(s)
    pictures = open_pictures(s.images, split=s.split, leave_out=s.output_dir)
    asked = read_questions(s.questions, pictures) if s.questions else {}
    towers = [ClipTower(s.dense, dense=True), ClipTower(s.moe, dense=False)]
    if s.reference_name == DINOV2:
        towers.append(DinoTower(s.reference))
    how = {"device": s.device, "precision": s.precision, "batch_size": s.batch_size, "workers": s.workers}
    encoded = encode_pictures(pictures, towers, s.cache or s.output_dir / "cache", **how)
    found, near_duplicates = _search(s, pictures, encoded, asked)
    counts = {"images": len(pictures), "skipped": len(encoded.bad), "encoded_now": encoded.encoded}
    counts |= {"above_dense_threshold": found.above, "near_duplicates": near_duplicates, "kept": len(found.first)}
    skipped = [(_shown(pictures.names[row]), replace_surrogates(error)) for row, error in encoded.bad.items()]
    summary = {
        "outcome": found.outcome,
        "counts": counts,
        "models": {tower.encoders[0]: tower.name for tower in towers},
        "settings": {name: _without_folders(value) for name, value in asdict(s).items()},
        "skipped": [{"image": name, "error": error} for name, error in skipped],
    }
    pairs = _write(s, pictures, encoded, found, asked, towers, summary)
    _report(s, pairs, found, summary, time.monotonic() - start)
    _report_statements(summary)
    return s.output_dir


def _without_folders(value: Any) -> Any:
    """The last part of a path: the result may be given away, without the names of this machine's folders."""
    if isinstance(value, Path) or (isinstance(value, str) and Path(value).expanduser().exists()):
        return replace_surrogates(Path(value).name)
    return value


def _shown(name: str) -> str:
    """A picture's name for the result: without this machine's folders, too."""
    return Path(name).name if Path(name).is_absolute() else name


def _search(s: Settings, pictures: Pictures, encoded: Encoded, asked: Asked) -> tuple[Found, int]:
    """-> the pairs, and how many near duplicates were left out. Raises DataError where no pair is left."""
    near_duplicates = NearDuplicates(encoded.looks, s.duplicate_bits, s.duplicate_colour)
    usable = asked if s.only_with_questions else range(len(pictures))
    good = np.array(sorted(set(usable) - set(encoded.bad)), np.int64)
    if len(good) < 2:
        raise DataError(f"{s.images} has {len(good)} pictures to compare; a pair needs two.")
    dropped = 0

    def accept(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        nonlocal dropped
        kept = ~near_duplicates(first, second)
        dropped += int((~kept).sum())
        if s.only_with_questions:
            kept[kept] = [bool(shared_questions(asked, *pair)) for pair in zip(first[kept], second[kept], strict=True)]
        return kept

    references = [array for encoder, array in encoded.embeddings.items() if s.is_reference(encoder)]
    criteria = Criteria(s.dense_threshold, s.reference_threshold, s.top, s.per_image, s.candidates)
    found = search(encoded.embeddings[DENSE], references, criteria, numbers=good, accept=accept, device=s.device)
    if not len(found.first):
        questionless = ", or had no question in common" if s.only_with_questions else ""
        raise DataError(
            f"of {len(good):,} pictures no pair is left: all were near duplicates{questionless}. "
            "Give more pictures, or lower --duplicate-bits."
        )
    return found, dropped


def _write(
    s: Settings,
    pictures: Pictures,
    encoded: Encoded,
    found: Found,
    asked: Asked,
    towers: Sequence[Tower],
    summary: dict,
) -> list[BlindPair]:
    """Write the folder of the result. An old pairs.jsonl is removed first and the new one is written last, so that it
    never names a picture that is not there; mining.json marks the pictures as ours."""
    folder = s.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    write_json(folder / SUMMARY, summary)
    (folder / ROWS).unlink(missing_ok=True)
    images = list(zip(found.first.tolist(), found.second.tolist(), strict=True))
    files: dict[int, Path] = {}
    with atomic_directory(folder / PICTURES) as temporary:
        for image in dict.fromkeys(np.ravel(images).tolist()):
            file = save_picture(pictures.image(image), temporary, pictures.names[image], len(files))
            files[image] = (folder / PICTURES / file).resolve()
    each = {name: exact_cosines(array, found.first, found.second) for name, array in encoded.embeddings.items()}
    questions = [shared_questions(asked, *pair) for pair in images]
    right = _match(s, encoded, found, questions, towers, summary)
    pairs = []
    for number, (first, second) in enumerate(images):
        cosines = {name: round(float(values[number]), 6) for name, values in each.items()}
        reference = min(cosine for name, cosine in cosines.items() if s.is_reference(name))
        pair = BlindPair(
            images=(files[first], files[second]),
            names=(_shown(pictures.names[first]), _shown(pictures.names[second])),
            cosines=cosines,
            reference=s.reference_name,
            gap=round(cosines[DENSE] - reference, 6),
            passed=found.outcome == "both",
            questions=questions[number],
            right=right[number],
        )
        pairs.append(pair)
    if table := right_by_attribute(pairs):
        summary["right"] = table
    draw_contact_sheet(pairs, folder / SHEET, f"{len(pairs)} blind pairs; reference: {s.reference_name}")
    write_pairs(folder, pairs, summary)
    return pairs


def _match(
    s: Settings,
    encoded: Encoded,
    found: Found,
    questions: Sequence[tuple[Question, ...]],
    towers: Sequence[Tower],
    summary: dict,
) -> list[dict[str, int] | None]:
    """`BlindPair.right` of each pair. Where an eye reads no texts no pair has any, and the summary says why."""
    statements = [asked[0].statements if asked else None for asked in questions]
    clips = [tower for tower in towers if isinstance(tower, ClipTower)]
    try:
        return match_statements(clips, encoded.embeddings, found, statements, s.device, s.precision)
    except ReadsNoTexts as error:
        summary["no_right"] = str(error)
        return [None] * len(questions)


def _report_statements(summary: dict) -> None:
    """Print how many pairs each eye matches right, by attribute."""
    console = Console()
    if "no_right" in summary:
        console.print(f"No statements were matched: {summary['no_right']}", markup=False, highlight=False)
    if "right" not in summary:
        return
    rows = []
    for attribute, counts in summary["right"].items():
        total = counts["pairs"]
        shares = [f"{counts[eye]} ({counts[eye] / total:.0%})" for eye in (DENSE, MOE)]
        rows.append([replace_surrogates(attribute), str(total), *shares])
    title = "Pairs with both statements right (chance: 25%)"
    console.print(Table(["what differs", "pairs", DENSE, MOE], rows, title))


def _report(s: Settings, pairs: Sequence[BlindPair], found: Found, summary: dict, seconds: float) -> None:
    counts, skipped = summary["counts"], summary["skipped"]
    lines = [
        f"{counts['images']:,} pictures, {counts['skipped']:,} skipped, {counts['encoded_now']:,} encoded now; "
        f"{counts['above_dense_threshold']:,} pairs above {s.dense_threshold}, {counts['near_duplicates']:,} near "
        f"duplicates dropped, {counts['kept']:,} kept; {seconds:.1f} s",
        f"The pairs {OUTCOMES[found.outcome]}.",
    ]
    if found.forgotten:
        lines.append("Few pictures are in nearly all good pairs: more pairs may be found with a larger --per-image.")
    if skipped:
        names = ", ".join(f"{row['image']} ({row['error']})" for row in skipped[:3])
        lines.append(f"Skipped: {names}{', ...' if len(skipped) > 3 else ''}")
    lines.append(f"Written to {s.output_dir}: {ROWS}, {SHEET}, {PICTURES}/, {SUMMARY}")
    other = [] if s.reference_name == MOE else [s.reference_name]
    rows = []
    for number, pair in enumerate(pairs[:10], start=1):
        dense = pair.cosines[DENSE]
        cosines = [pair.gap, dense, pair.cosines[MOE], *[dense - pair.gap for _ in other]]
        rows.append([str(number), *pair.names, *(f"{cosine:.3f}" for cosine in cosines), ", ".join(pair.attributes)])
    head = ["", "first", "second", "gap", DENSE, MOE, *other, "asks"]
    console = Console()
    console.print(Table(head, rows, "Blind pairs, the widest gap first"))
    console.print(replace_surrogates("\n".join(lines)), markup=False, highlight=False)


def main(argv: list[str] | None = None) -> int:
    """The command `llava-clipmoe mine-pairs`; -> 0."""
    mine(tyro.cli(Settings, args=argv, prog="llava-clipmoe mine-pairs", description=__doc__))
    return 0
