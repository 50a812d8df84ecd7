"""The retrieval benchmarks of both papers, short and long captions, read from their official files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image

from llava_clipmoe.files import read_json, replace_surrogates

from ..config import DataConfig
from ..data.decode import decode_image
from ..saved_settings import digest

CAPTIONS_PER_IMAGE = 5
"""A few COCO images have six or seven captions; the papers use the first five (Long-CLIP, eval/retrieval/coco.py)."""
Captions = dict[Path, list[str]]
"""Image -> its captions, in the benchmark's order."""


class ImageList:
    """A benchmark's images with their captions, in its own order; reads like a `PairSource`."""

    def __init__(self, name: str, captions: Captions) -> None:
        self.rows = [(path, texts[:CAPTIONS_PER_IMAGE]) for path, texts in captions.items()]
        self.fingerprint = digest(name, [(path.name, texts) for path, texts in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        return str(self.rows[i][0])

    def captions(self, i: int) -> list[str]:
        return self.rows[i][1]

    def image(self, i: int) -> Image.Image:
        """Image i in RGB. Raises BadImage when it is damaged, FileNotFoundError when it is missing."""
        with self.rows[i][0].open("rb") as file:
            return decode_image(file, DataConfig.max_pixels)


class BenchmarkNotFound(FileNotFoundError):
    """A benchmark's files are not where they should be; the message lists what was looked for."""


def coco_5k(folder: str | Path) -> ImageList:
    """COCO's 5,000 images: val2017 as the papers use it, or else the Karpathy test split of val2014.

    Looks for `annotations/captions_val2017.json` + `val2017/`, then `dataset_coco.json` + `val2014/`. The first five
    captions of an image count. Raises BenchmarkNotFound.
    """
    folder = Path(folder).expanduser()
    official = first_existing(folder / "annotations" / "captions_val2017.json", folder / "captions_val2017.json")
    if official and (folder / "val2017").is_dir():
        content = read_json(official)
        files = {row["id"]: folder / "val2017" / row["file_name"] for row in content["images"]}
        captions: Captions = {path: [] for path in files.values()}
        for row in content["annotations"]:  # in the file's order, as pycocotools gives them
            captions[files[row["image_id"]]].append(_caption(row["caption"]))
        return _benchmark("coco-5k", captions)
    if (folder / "dataset_coco.json").exists():
        return _benchmark("coco-5k-karpathy", _karpathy(folder / "dataset_coco.json", folder, only="test"))
    raise BenchmarkNotFound(
        f"COCO is not in {folder}. Looked for annotations/captions_val2017.json beside val2017/ (both from "
        "cocodataset.org), and for dataset_coco.json (Karpathy's splits) beside val2014/."
    )


def flickr30k(folder: str | Path) -> ImageList:
    """Flickr30k, ALL its 31 thousand images as the CLIP-MoE paper does, not the test split of 1,000.

    Looks for `results_20130124.token` (31,783 images), `results.csv` (the same, columns divided by "|") or
    `dataset_flickr30k.json` (Karpathy's, 31,014 images), beside a folder `flickr30k-images`, `flickr30k_images` or
    `images`. Raises BenchmarkNotFound.
    """
    folder = Path(folder).expanduser()
    folders = [folder / name for name in ("flickr30k-images", "flickr30k_images", "images")]
    images = first_existing(*folders)
    readers = {
        "results_20130124.token": _flickr_tokens,
        "results.csv": _flickr_csv,
        "dataset_flickr30k.json": _karpathy,
    }
    for name, read in readers.items():
        file = first_existing(folder / name, *(place / name for place in folders))
        if file and images:
            nested = images / "flickr30k_images"  # the well-known archive has the folder twice
            return _benchmark(f"flickr30k-{name}", read(file, nested if nested.is_dir() else images))
    raise BenchmarkNotFound(
        f"Flickr30k is not in {folder}. Looked for one of {', '.join(readers)}, beside a folder of images called "
        f"{', '.join(place.name for place in folders)}."
    )


def urban1k(folder: str | Path) -> ImageList:
    """Urban1k (Long-CLIP): 1,000 images with one long caption each, `image/N.jpg` and `caption/N.txt`, of which the
    first line counts, as in Long-CLIP's evaluation. Raises BenchmarkNotFound."""
    folder = Path(folder).expanduser()
    root = first_existing(folder / "caption", folder / "Urban1k" / "caption")
    if root is None or not (root.parent / "image").is_dir():
        raise BenchmarkNotFound(
            f"Urban1k is not in {folder}. Looked for image/ and caption/, there and in Urban1k/: unpack Urban1k.zip of "
            "the hub data set BeichenZhang/Urban1k."
        )
    captions: Captions = {}
    for file in sorted(root.glob("*.txt"), key=lambda file: (len(file.stem), file.stem)):
        lines = [line for line in file.read_text(encoding="utf-8-sig", errors="replace").split("\n") if line.strip()]
        if not lines:
            raise BenchmarkNotFound(f"{file} is empty: every image of Urban1k has a caption.")
        captions[root.parent / "image" / f"{file.stem}.jpg"] = [_caption(lines[0])]
    return _benchmark("urban1k", captions)


IIW = {
    "IIW-400": ("docci_aar", "images_aar"),
    "DOCCI_Test": ("docci", "images"),
    "DCI_Test": ("dci", "photos"),
}
"""Parts of ImageInWords whose descriptions people wrote -> where its images lie: as LoTLIP sorts them, as DOCCI and DCI
hand them out."""


def iiw(folder: str | Path, parts: Iterable[str] = tuple(IIW)) -> ImageList:
    """ImageInWords' human descriptions, one an image: 400 + 100 + 112 images, the 612 that LoTLIP measures on.

    Looks for PART/data.jsonl (also in datasets/, as its repository has them) and the images of each part in a folder
    called as in `IIW`. Raises BenchmarkNotFound.
    """
    folder, captions = Path(folder).expanduser(), {}
    for part in parts:
        names = [f"{place}{name}/data.jsonl" for place in ("", "datasets/") for name in (part, part.upper())]
        table = first_existing(*(folder / name for name in names))
        images = first_existing(*(folder / name for name in IIW[part]))
        if table is None or images is None:
            raise BenchmarkNotFound(
                f"{folder} lacks {part} of ImageInWords: looked for {names[0]} (from its repository's datasets/) and a "
                f"folder of its images called {' or '.join(IIW[part])}."
            )
        for number, line in enumerate(table.read_text(encoding="utf-8-sig").split("\n"), start=1):
            if line.strip():
                row = json.loads(line)
                name, text = row.get("image/key") or row.get("image"), row.get("IIW")
                if not name or not text:
                    raise BenchmarkNotFound(f"{table}, line {number}: no image/key (or image) and IIW.")
                captions[images / (name if Path(name).suffix else f"{name}.jpg")] = [_caption(text)]
    return _benchmark("iiw", captions)


def iiw_400(folder: str | Path) -> ImageList:
    """The 400 images of IIW-400 alone. Raises BenchmarkNotFound."""
    return iiw(folder, ("IIW-400",))


PRESETS: dict[str, Callable[[str | Path], ImageList]] = {
    "coco-5k": coco_5k,
    "flickr30k": flickr30k,
    "urban1k": urban1k,
    "iiw": iiw,
    "iiw-400": iiw_400,
}


def first_existing(*paths: Path) -> Path | None:
    """The first of `paths` that exists."""
    return next((path for path in paths if path.exists()), None)


def _benchmark(name: str, captions: Captions) -> ImageList:
    """Checks that every image is there, before anything is computed."""
    if not captions:
        raise BenchmarkNotFound(f"{name} lists no images.")
    if missing := [path for path in captions if not path.is_file()]:
        raise BenchmarkNotFound(
            f"{name}: {len(missing)} of {len(captions)} images are missing, the first is {missing[0]}. The benchmark "
            "is only itself when it is whole: download the missing images."
        )
    return ImageList(name, captions)


def _caption(text: str) -> str:
    return replace_surrogates(text).strip()  # half an emoji: no tokenizer takes it


def _karpathy(file: Path, images: Path, only: str | None = None) -> Captions:
    """One of Karpathy's files: `images` of {"filepath"?, "filename", "split", "sentences": [{"raw"}]}."""
    rows = [row for row in read_json(file)["images"] if only in (None, row["split"])]
    return {
        images / row.get("filepath", "") / row["filename"]: [_caption(said["raw"]) for said in row["sentences"]]
        for row in rows
    }


def _flickr_tokens(file: Path, images: Path) -> Captions:
    """Lines `1000092795.jpg#0<tab>caption`."""
    lines = [line.partition("\t") for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    return _grouped(images, ((image.rpartition("#")[0], caption) for image, _, caption in lines))


def _flickr_csv(file: Path, images: Path) -> Captions:
    """Lines `1000092795.jpg| 0| caption` under a header. One known line lacks its second bar."""
    found = []
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter="|", quoting=csv.QUOTE_NONE)
        next(reader, None)
        for row in filter(None, reader):
            number, _, rest = row[1].strip().partition(" ") if len(row) > 1 else ("", "", "")
            caption = row[2] if len(row) > 2 else rest
            if not number.isdigit() or not caption.strip():
                raise ValueError(f"{file}, line {reader.line_num}: not `image| number| caption`: {'|'.join(row)[:80]}")
            found.append((row[0].strip(), caption))
    return _grouped(images, found)


def _grouped(images: Path, pairs: Iterable[tuple[str, str]]) -> Captions:
    """(file name, caption) of every caption -> the captions of each image."""
    captions: Captions = {}
    for name, caption in pairs:
        captions.setdefault(images / name, []).append(caption.strip())
    return captions
