"""Labelled images for zero-shot classification: the benchmarks of the papers in the layouts in which they are handed
out, or any folder with one subfolder of images per class."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from llava_clipmoe.files import read_json

from ..data.decode import open_image
from ..data.image_files import image_files, is_image_name
from .benchmarks import BenchmarkNotFound, first_existing


@dataclass(frozen=True)
class Classes:
    """Labelled images: `read(i)` gives image i, labels [N] index into `names`."""

    names: list[str]
    labels: np.ndarray
    read: Callable[[int], Image.Image]


def open_classes(preset: str | None, folder: str | Path) -> Classes:
    """The labelled images in `folder`: a preset's (`PRESETS`), or one subfolder a class. Raises BenchmarkNotFound."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise BenchmarkNotFound(f"{folder} is not a folder on this machine.")
    return (image_folder if preset is None else PRESETS[preset])(folder)


def named_classes(name: str, folder: str | Path) -> Classes:
    """The labelled images that a run's settings call NAME=FOLDER: those of the preset NAME, or of a folder of classes
    under any other name. A folder of classes may bear the name of a set that is handed out otherwise (`eurosat`).
    Raises BenchmarkNotFound."""
    try:
        return open_classes(name if name in PRESETS else None, folder)
    except LayoutNotFound:
        places = [path for path in Path(folder).expanduser().iterdir() if path.is_dir() and path.name[0] != "."]
        if not places or not all(any(map(is_image_name, os.listdir(place))) for place in places):
            raise
        return open_classes(None, folder)


def _read_file(paths: Sequence[Path], i: int) -> Image.Image:
    return open_image(paths[i])


def _read_pixels(images: np.ndarray, i: int) -> Image.Image:
    """images: uint8 [N,3,32,32]."""
    return Image.fromarray(np.ascontiguousarray(images[i].transpose(1, 2, 0)))


def openmoji_classes(folder: Path, attribute: str) -> Classes:
    """Held-out scenes of `build_openmoji`'s folder; their classes are the values of an attribute."""
    rows = [json.loads(line) for line in (folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    names, labels = np.unique([row["scene"][attribute] for row in rows], return_inverse=True)
    return Classes(names.tolist(), labels, partial(_read_file, [folder / row["image"] for row in rows]))


def image_folder(folder: Path) -> Classes:
    """One subfolder of images per class, in sorted order. Names come from `classes.txt` (one a line, in that order) or
    else from the subfolders, `_` read as a space. Raises BenchmarkNotFound."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = [sorted(image_files(place)) for place in folders]
    if not any(found):
        raise BenchmarkNotFound(f"{folder} has no images in subfolders. Make one subfolder per class.")
    if empty := [place.name for place, paths in zip(folders, found, strict=True) if not paths]:
        raise BenchmarkNotFound(
            f"{folder} has no image that can be read in {len(empty)} of its {len(folders)} "
            f"subfolders, such as {empty[0]}: that class would not be measured. Add its images, or "
            "remove the subfolder."
        )
    names = [place.name.replace("_", " ") for place in folders]
    listed = folder / "classes.txt"
    if listed.exists():
        names = _lines(listed)
        if len(names) != len(folders):
            raise BenchmarkNotFound(f"{listed} names {len(names)} classes, but {folder} has {len(folders)} subfolders.")
    labels = np.repeat(np.arange(len(folders)), [len(paths) for paths in found])
    return Classes(names, labels, partial(_read_file, [path for paths in found for path in paths]))


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank. Raises BenchmarkNotFound."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BenchmarkNotFound(f"{path} is not UTF-8 text ({error}). Save it in UTF-8.") from error
    return [line.strip() for line in text.split("\n") if line.strip()]


def _wordnet_ids(root: Path) -> list[str]:
    """Names of the subfolders that are WordNet ids (such as n01440764), sorted."""
    return sorted(path.name for path in root.iterdir() if path.is_dir() and re.fullmatch(r"n\d{8}", path.name))


def imagenet(folder: Path) -> Classes:
    """ImageNet-1k's validation set: `val/` (or the folder itself) with 1,000 subfolders named by WordNet id.

    The sorted ids are the classes 0 to 999, as in torchvision's ImageFolder and open_clip's list of names.
    Raises BenchmarkNotFound.
    """
    from open_clip import IMAGENET_CLASSNAMES

    root = first_existing(folder / "val", folder / "ILSVRC2012_img_val") or folder
    ids = _wordnet_ids(root)
    if len(ids) != 1000:
        raise BenchmarkNotFound(
            f"{root} has {len(ids)} subfolders named by WordNet id (such as n01440764); ImageNet's validation set has "
            "1,000. If its images lie in one folder, sort them into one folder per id first."
        )
    found = image_folder(root)
    if more := len(found.names) - 1000:
        raise BenchmarkNotFound(f"{root} has {more} subfolders that are not named by WordNet id: remove them.")
    return dataclasses.replace(found, names=list(IMAGENET_CLASSNAMES))


IMAGENET_V2 = ("imagenetv2-matched-frequency-format-val", "ImageNetV2-matched-frequency")
"""Names of its folder: as its archive has it, and as CLIP_benchmark calls it."""


def imagenet_v2(folder: Path) -> Classes:
    """ImageNet-V2, matched frequency: subfolders 0 to 999, called by their class's number. Raises BenchmarkNotFound."""
    from open_clip import IMAGENET_CLASSNAMES

    root = first_existing(*(folder / name for name in IMAGENET_V2)) or folder
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if sorted(names, key=lambda name: (len(name), name)) != [str(number) for number in range(1000)]:
        raise BenchmarkNotFound(
            f"{root} is not ImageNet-V2: its 1,000 subfolders are called 0 to 999, by the numbers of the classes; here "
            f"are {len(names)}{f', such as {names[0]}' if names else ''}. Unpack imagenetv2-matched-frequency.tar.gz."
        )
    found = image_folder(root)
    numbers = np.array([int(name) for name in names])  # image_folder has them sorted as text: 0, 1, 10, 100, ...
    return dataclasses.replace(found, names=list(IMAGENET_CLASSNAMES), labels=numbers[found.labels])


def imagenet_o(folder: Path) -> Classes:
    """ImageNet-O: `imagenet-o/` (or the folder itself) with 200 subfolders named by WordNet id.

    Its images show nothing of ImageNet's 1,000 classes: it was made to measure how well that is noticed. What tables of
    CLIPs report, and CLIP_benchmark computes, is another thing: how many of the images are put, among the 200 classes,
    into the one that their subfolder is called by. So it is here. Raises BenchmarkNotFound.
    """
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo  # open_clip brings timm, which knows the order of the ids

    root = first_existing(folder / "imagenet-o") or folder
    ids, known = _wordnet_ids(root), {name: number for number, name in enumerate(ImageNetInfo().label_names())}
    if len(ids) != 200:
        raise BenchmarkNotFound(
            f"{root} is not ImageNet-O: it has 200 subfolders named by WordNet id (such as n01443537), here are "
            f"{len(ids)}. Unpack imagenet-o.tar there."
        )
    if unknown := [name for name in ids if name not in known]:
        raise BenchmarkNotFound(f"{root}: {unknown[0]} is none of ImageNet's 1,000 classes.")
    found = image_folder(root)
    if more := len(found.names) - 200:
        raise BenchmarkNotFound(f"{root} has {more} subfolders that are not named by WordNet id: remove them.")
    return dataclasses.replace(found, names=[IMAGENET_CLASSNAMES[known[name]] for name in ids])


def cifar10(folder: Path) -> Classes:
    """CIFAR-10's test images from the binary version (`cifar-10-batches-bin`). Raises BenchmarkNotFound."""
    return _cifar(folder, "cifar-10-batches-bin", "test_batch.bin", "batches.meta.txt", label_bytes=1)


def cifar100(folder: Path) -> Classes:
    """CIFAR-100's test images, fine labels, from the binary version (`cifar-100-binary`). Raises BenchmarkNotFound."""
    return _cifar(folder, "cifar-100-binary", "test.bin", "fine_label_names.txt", label_bytes=2)


def _cifar(folder: Path, archive: str, images: str, names: str, label_bytes: int) -> Classes:
    """A record is `label_bytes` labels (the last is the fine one), then 32x32 pixels of red, of green, of blue."""
    root = folder / archive if (folder / archive).is_dir() else folder
    if not (root / images).exists() or not (root / names).exists():
        raise BenchmarkNotFound(
            f"{folder} has no {archive}/{images} with {names}. Download the BINARY version of CIFAR "
            f"({archive}; cs.toronto.edu/~kriz/cifar.html) and unpack it there. The Python version is pickled: reading "
            "it could run code, so it is not read."
        )
    records = np.fromfile(root / images, np.uint8)
    if not len(records) or len(records) % (label_bytes + 3072):
        raise BenchmarkNotFound(f"{root / images} is cut short: unpack the archive again.")
    records = records.reshape(-1, label_bytes + 3072)
    classes = [line.replace("_", " ") for line in _lines(root / names)]
    labels = records[:, label_bytes - 1].astype(np.int64)
    if labels.max() >= len(classes):
        raise BenchmarkNotFound(f"{root / names} names {len(classes)} classes, but there is a label {labels.max()}.")
    return Classes(classes, labels, partial(_read_pixels, records[:, label_bytes:].reshape(-1, 3, 32, 32)))


# --- other sets: the layouts of their own archives --------------------------------------------------------------------

Labelled = Sequence[tuple[Path, int]]
"""(image, label)."""


class LayoutNotFound(BenchmarkNotFound):
    """A folder holds nothing of an archive's layout (it may be a folder of classes)."""


def _root(folder: Path, needed: Sequence[str], *places: str) -> Path:
    """`folder`, or the first of the `places` in it, that holds all that is `needed`. Raises LayoutNotFound."""
    for root in (folder, *(folder / place for place in places)):
        if all((root / name).exists() for name in needed):
            return root
    raise LayoutNotFound(
        f"{folder} does not have the layout of this data set: looked for {' and '.join(needed)} there"
        f"{' and in ' if places else ''}{' and '.join(places)}."
    )


def _labelled(names: Sequence[str], images: Labelled) -> Classes:
    """Raises BenchmarkNotFound for images that are not there, before anything is computed."""
    if missing := [path for path, _ in images if not path.is_file()]:
        raise BenchmarkNotFound(f"{len(missing)} of {len(images)} images are missing, the first is {missing[0]}.")
    if not images:
        raise BenchmarkNotFound("the data set's own list names no image of its test split.")
    labels = np.array([label for _, label in images], np.int64)
    return Classes(
        [name.replace("_", " ") for name in names], labels, partial(_read_file, [path for path, _ in images])
    )


def food101(folder: Path) -> Classes:
    """Food-101's test split: `images/` and `meta/test.json`."""
    root = _root(folder, ("images", "meta/test.json"), "food-101")
    listed = read_json(root / "meta" / "test.json")
    names = sorted(listed)
    return _labelled(names, [(root / "images" / f"{i}.jpg", k) for k, name in enumerate(names) for i in listed[name]])


def stanford_cars(folder: Path) -> Classes:
    """Stanford Cars' test split: `cars_test/`, `cars_test_annos_withlabels.mat` and `devkit/cars_meta.mat`."""
    from scipy.io import loadmat

    annotations, meta = "cars_test_annos_withlabels.mat", "devkit/cars_meta.mat"
    root = _root(folder, ("cars_test", annotations, meta), "stanford_cars")
    names = loadmat(root / meta, squeeze_me=True)["class_names"].tolist()
    rows = np.atleast_1d(loadmat(root / annotations, squeeze_me=True)["annotations"])
    return _labelled(names, [(root / "cars_test" / str(row["fname"]), int(row["class"]) - 1) for row in rows])


def fgvc_aircraft(folder: Path) -> Classes:
    """FGVC Aircraft's test split by variant: `data/images/`, `data/variants.txt`, `data/images_variant_test.txt`."""
    root = _root(folder, ("images", "variants.txt", "images_variant_test.txt"), "data", "fgvc-aircraft-2013b/data")
    names = _lines(root / "variants.txt")
    rows = [line.partition(" ") for line in _lines(root / "images_variant_test.txt")]
    return _labelled(names, [(root / "images" / f"{image}.jpg", names.index(name)) for image, _, name in rows])


def oxford_pets(folder: Path) -> Classes:
    """Oxford-IIIT Pet's test split by breed: `images/` and `annotations/test.txt`."""
    root = _root(folder, ("images", "annotations/test.txt"), "oxford-iiit-pet")
    rows = [line.split() for line in _lines(root / "annotations" / "test.txt")]
    breeds = {int(row[1]) - 1: row[0].rpartition("_")[0] for row in rows}
    names = [breeds.get(label, "") for label in range(max(breeds) + 1)]
    return _labelled(names, [(root / "images" / f"{row[0]}.jpg", int(row[1]) - 1) for row in rows])


def flowers102(folder: Path) -> Classes:
    """Oxford Flowers 102's test split: `jpg/`, `imagelabels.mat`, `setid.mat`; torchvision knows the names."""
    from scipy.io import loadmat
    from torchvision.datasets import Flowers102

    root = _root(folder, ("jpg", "imagelabels.mat", "setid.mat"), "flowers-102")
    labels = np.atleast_1d(loadmat(root / "imagelabels.mat", squeeze_me=True)["labels"])
    test = np.atleast_1d(loadmat(root / "setid.mat", squeeze_me=True)["tstid"])
    return _labelled(Flowers102.classes, [(root / "jpg" / f"image_{i:05d}.jpg", int(labels[i - 1]) - 1) for i in test])


def dtd(folder: Path) -> Classes:
    """Describable Textures' first test split: `images/` and `labels/test1.txt`."""
    root = _root(folder, ("images", "labels/test1.txt"), "dtd", "dtd/dtd")
    rows = _lines(root / "labels" / "test1.txt")
    names = sorted({row.partition("/")[0] for row in rows})
    return _labelled(names, [(root / "images" / row, names.index(row.partition("/")[0])) for row in rows])


def eurosat(folder: Path) -> Classes:
    """EuroSAT (RGB): the ten folders of `2750/`, AnnualCrop to SeaLake; all images, as it has no test split."""
    found = image_folder(_root(folder, ("AnnualCrop", "SeaLake"), "2750", "EuroSAT", "eurosat/2750"))
    return dataclasses.replace(found, names=[re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name) for name in found.names])


def sun397(folder: Path) -> Classes:
    """SUN397: `ClassName.txt` beside the folders `a/` to `z/`; all images, as CLIP_benchmark takes them."""
    root = _root(folder, ("ClassName.txt",), "SUN397")
    names = [
        line.split("/", 2)[2] for line in _lines(root / "ClassName.txt")
    ]  # /a/abbey, /a/apartment_building/outdoor
    places = [root / name[0] / name for name in names]
    images = [(path, label) for label, place in enumerate(places) for path in sorted(place.glob("sun_*.jpg"))]
    return _labelled([name.replace("/", " ") for name in names], images)


def caltech101(folder: Path) -> Classes:
    """Caltech-101: the folders of `101_ObjectCategories/` but for its background; all images."""
    root = _root(folder, ("accordion", "yin_yang"), "101_ObjectCategories", "caltech101/101_ObjectCategories")
    places = [place for place in sorted(root.iterdir()) if place.is_dir() and place.name != "BACKGROUND_Google"]
    images = [(path, label) for label, place in enumerate(places) for path in sorted(place.glob("*.jpg"))]
    return _labelled([place.name for place in places], images)


PRESETS: dict[str, Callable[[Path], Classes]] = {
    "imagenet": imagenet,
    "imagenet-v2": imagenet_v2,
    "imagenet-o": imagenet_o,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "food101": food101,
    "stanford-cars": stanford_cars,
    "fgvc-aircraft": fgvc_aircraft,
    "oxford-pets": oxford_pets,
    "flowers102": flowers102,
    "dtd": dtd,
    "eurosat": eurosat,
    "sun397": sun397,
    "caltech101": caltech101,
}
