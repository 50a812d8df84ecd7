"""Recall@k between images and captions, and the two benchmarks of the CLIP-MoE paper read from their official files.

embeddings = encode_source(bundle, source, folder, captions="all", dtype="float32")
recalls(embeddings.image, embeddings.text, embeddings.text_image)     # {"i2t_r1": 0.56, ..., "t2i_r10": 0.87}
"""

from __future__ import annotations

import contextlib
import csv
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.files import read_json, replace_surrogates

from ..config import DataConfig, digest
from ..data import PairSource, decode_image
from ..features import Captions, NotFinite, Precision, encode_source, pick_device
from ..progress import Bar

RANKS = (1, 5, 10)
TIE = 2e-6
"""Cosines closer than this are equal: fp32 products of the same vectors differ by less, from block to block."""
CAPTIONS_PER_IMAGE = 5
"""A few COCO images have six or seven captions; the papers use the first five (Long-CLIP, eval/retrieval/coco.py)."""


def recalls(
    image: np.ndarray | torch.Tensor,
    text: np.ndarray | torch.Tensor,
    text_image: np.ndarray | torch.Tensor,
    *,
    device: str | torch.device = "cpu",
    block: int = 2048,
) -> dict[str, float]:
    """Recall at 1, 5 and 10 as shares, both ways.

    image [N,P] and text [M,P], L2-normalised; text_image [M]: the image of each caption; every image needs one.
    `i2t`: ANY own caption is among the first k captions. `t2i`: the own image is among the first k images.
    A wrong item that ties with the right one counts as before it, so embeddings that collapsed to one point score 0
    and not 100%. At no time is more than a [block, block] piece of the N x M similarities in memory.
    Raises NotFinite, ValueError (an image without a caption).
    """
    device = pick_device(device)
    owner = torch.as_tensor(np.array(text_image), device=device)
    if len(torch.unique(owner)) != len(image):
        raise ValueError(f"{len(image)} images, but {len(torch.unique(owner))} of them have a caption: all need one.")
    with torch.inference_mode(), full_precision():
        before_image, before_text = _wrong_before(_Rows(image, device), _Rows(text, device), owner, block)
    found = {f"i2t_r{k}": (before_image < k).double().mean().item() for k in RANKS}
    return {**found, **{f"t2i_r{k}": (before_text < k).double().mean().item() for k in RANKS}}


def _wrong_before(image: _Rows, text: _Rows, owner: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-> for every image [N] the wrong captions before its best own one; for every caption [M] the wrong images
    before its own."""
    n, m = len(image), len(text)
    own = torch.cat([(text[b : b + block] * image[owner[b : b + block]]).sum(-1) for b in range(0, m, block)])
    best = torch.full((n,), -torch.inf, device=own.device).scatter_reduce_(0, owner, own, "amax")
    before_image = torch.zeros(n, dtype=torch.int64, device=own.device)
    before_text = torch.zeros(m, dtype=torch.int64, device=own.device)
    for i in range(0, n, block):
        rows, numbers = image[i : i + block], torch.arange(i, min(i + block, n), device=own.device)
        for j in range(0, m, block):
            similarity = rows @ text[j : j + block].T
            wrong = owner[j : j + block] != numbers[:, None]
            before_image[i : i + block] += (wrong & (similarity >= best[i : i + block, None] - TIE)).sum(1)
            before_text[j : j + block] += (wrong & (similarity >= own[j : j + block] - TIE)).sum(0)
    return before_image, before_text


class _Rows:
    """Rows of an array (perhaps memory-mapped) as fp32 on a device, a block at a time. Raises NotFinite."""

    def __init__(self, array: np.ndarray | torch.Tensor, device: torch.device) -> None:
        self.array, self.device = array, device

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: slice | torch.Tensor) -> torch.Tensor:
        if isinstance(self.array, np.ndarray):
            part = torch.from_numpy(np.array(self.array[index if isinstance(index, slice) else index.cpu().numpy()]))
        else:
            part = self.array[index.cpu() if torch.is_tensor(index) else index]
        part = part.to(self.device, torch.float32)
        if not part.isfinite().all():  # NaN loses every comparison, so it would count as a hit
            raise NotFinite("the embeddings hold NaN or infinite values, so there is no recall to measure.")
        return part


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products in fp32 and not in TF32, which a trainer may have switched on: ranks hang on small differences."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def evaluate_retrieval(
    bundle: ClipBundle,
    source: PairSource | ImageList,
    *,
    folder: Path | None = None,
    rows: np.ndarray | None = None,
    captions: Captions = "all",
    batch_size: int = 128,
    device: str | torch.device = "auto",
    precision: Precision = "fp32",
    workers: int = 0,
    progress: Bar | None = None,
) -> dict[str, float | int]:
    """Encode `source` and measure recall: {"i2t_r1": share, ..., "t2i_r10": share, "images": n, "captions": m}.

    Embeddings are kept in `folder` when it is given (a killed evaluation then goes on there), else thrown away.
    `rows`: the images to use, where some are bad. Raises what `encode_source` and `recalls` raise.
    """
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="retrieval-")))
        found = encode_source(
            bundle, source, folder, captions=captions, batch_size=batch_size, device=device, precision=precision,
            workers=workers, progress=progress, rows=rows, dtype="float32",
        )  # fmt: skip
        measured = recalls(found.image, found.text, found.text_image, device=device)
        return {**measured, "images": len(found.image), "captions": len(found.text)}


# --- benchmarks from their official files -----------------------------------------------------------------------------


class ImageList:
    """A benchmark's images with their captions, in its own order; reads like a `PairSource`."""

    def __init__(self, name: str, rows: Sequence[tuple[Path, list[str]]]) -> None:
        self.rows = list(rows)
        self.max_pixels = DataConfig().max_pixels
        self.fingerprint = digest(name, [(path.name, captions) for path, captions in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        return str(self.rows[i][0])

    def captions(self, i: int) -> list[str]:
        return self.rows[i][1]

    def image(self, i: int) -> Image.Image:
        """Image i in RGB. Raises BadImage when it is damaged, FileNotFoundError when it is missing."""
        with self.rows[i][0].open("rb") as file:
            return decode_image(file, self.max_pixels)


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
        captions: dict[int, list[str]] = {row["id"]: [] for row in content["images"]}
        for row in content["annotations"]:  # in the file's order, as pycocotools gives them
            captions[row["image_id"]].append(_caption(row["caption"]))
        rows = [(folder / "val2017" / row["file_name"], captions[row["id"]]) for row in content["images"]]
        return _benchmark("coco-5k", rows)
    if (folder / "dataset_coco.json").exists():
        return _benchmark("coco-5k-karpathy", _karpathy(folder / "dataset_coco.json", folder, {"test"}))
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
    readers: dict[str, Callable[[Path, Path], list[tuple[Path, list[str]]]]] = {
        "results_20130124.token": _flickr_tokens,
        "results.csv": _flickr_csv,
        "dataset_flickr30k.json": lambda file, images: _karpathy(file, images, None),
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


PRESETS: dict[str, Callable[[str | Path], ImageList]] = {"coco-5k": coco_5k, "flickr30k": flickr30k}


def first_existing(*paths: Path) -> Path | None:
    """The first of `paths` that exists."""
    return next((path for path in paths if path.exists()), None)


def _benchmark(name: str, rows: list[tuple[Path, list[str]]]) -> ImageList:
    """Checks that every image is there, before anything is computed."""
    missing = [path for path, _ in rows if not path.is_file()]
    if missing or not rows:
        raise BenchmarkNotFound(
            f"{name}: {len(missing)} of {len(rows)} images are missing, the first is {missing[0]}. The benchmark is "
            "only itself when it is whole: download the missing images." if rows else f"{name} lists no images."
        )  # fmt: skip
    return ImageList(name, [(path, captions[:CAPTIONS_PER_IMAGE]) for path, captions in rows])


def _caption(text: str) -> str:
    return replace_surrogates(text).strip()  # half an emoji: no tokenizer takes it


def _karpathy(file: Path, images: Path, splits: set[str] | None) -> list[tuple[Path, list[str]]]:
    """Rows of one of Karpathy's files: `images` of {"filepath"?, "filename", "split", "sentences": [{"raw"}]}."""
    return [
        (images / row.get("filepath", "") / row["filename"], [_caption(said["raw"]) for said in row["sentences"]])
        for row in read_json(file)["images"]
        if splits is None or row["split"] in splits
    ]


def _flickr_tokens(file: Path, images: Path) -> list[tuple[Path, list[str]]]:
    """Lines `1000092795.jpg#0<tab>caption`."""
    captions: dict[str, list[str]] = {}
    for line in file.read_text(encoding="utf-8-sig").split("\n"):
        if not line.strip():
            continue
        image, _, caption = line.partition("\t")
        captions.setdefault(image.rpartition("#")[0], []).append(caption.strip())
    return [(images / name, texts) for name, texts in captions.items()]


def _flickr_csv(file: Path, images: Path) -> list[tuple[Path, list[str]]]:
    """Lines `1000092795.jpg| 0| caption` under a header. One known line lacks its second bar."""
    captions: dict[str, list[str]] = {}
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter="|", quoting=csv.QUOTE_NONE)
        next(reader, None)
        for row in filter(None, reader):
            number, _, rest = row[1].strip().partition(" ") if len(row) > 1 else ("", "", "")
            caption = (row[2] if len(row) > 2 else rest).strip()
            if not number.isdigit() or not caption:
                raise ValueError(f"{file}, line {reader.line_num}: not `image| number| caption`: {'|'.join(row)[:80]}")
            captions.setdefault(row[0].strip(), []).append(caption)
    return [(images / name, texts) for name, texts in captions.items()]
