"""The benchmarks beyond ImageNet, CIFAR, COCO and Flickr30k: their archives' layouts, what is asked, and what a wrong
layout is told."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip", reason="the trainer's packages are not installed")

from PIL import Image
from scipy.io import savemat
from test_features import make_bundle

from llava_clipmoe.model_directory import save_bundle
from train_encoder.data.decode import ImageTransform, open_image
from train_encoder.evaluate import benchmarks, classes, command, composition
from train_encoder.evaluate.benchmarks import BenchmarkNotFound
from train_encoder.evaluate.zero_shot import open_zero_shot
from train_encoder.features.encode import encode_images, encode_texts

CPU = {"device": "cpu", "precision": "fp32"}


def save(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 24, 3), np.uint8)).save(path)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def labelled(data: classes.Classes) -> list[tuple[str, str]]:
    """(file, class) of every image."""
    (paths,) = data.read.args
    return [(path.name, data.names[label]) for path, label in zip(paths, data.labels, strict=True)]


# --- ImageNet's kin ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "imagenetv2-matched-frequency-format-val", "ImageNetV2-matched-frequency"])
def test_imagenet_v2_has_numbers_for_classes_and_they_are_not_sorted_as_text(tmp_path, place):
    for number in range(1000):
        (tmp_path / place / str(number)).mkdir(parents=True)
        (tmp_path / place / str(number) / f"of {number}.jpeg").write_bytes(b"")
    found = dict(labelled(classes.open_classes("imagenet-v2", tmp_path)))
    assert found["of 0.jpeg"] == "tench" and found["of 2.jpeg"] == "great white shark"
    assert found["of 10.jpeg"] == "brambling" and found["of 999.jpeg"] == "toilet paper"
    (tmp_path / place / "999").rename(tmp_path / place / "1000")
    with pytest.raises(BenchmarkNotFound, match="called 0 to 999"):
        classes.open_classes("imagenet-v2", tmp_path)


def test_imagenet_o_takes_its_200_names_from_imagenets_1000(tmp_path):
    from timm.data import ImageNetInfo

    ids = ImageNetInfo().label_names()[::5]
    for name in ids:
        save(tmp_path / "imagenet-o" / name / f"{name}.png")
    data = classes.open_classes("imagenet-o", tmp_path)
    assert len(data.names) == 200 and dict(labelled(data))["n01440764.png"] == "tench"
    assert dict(labelled(data))[f"{ids[2]}.png"] == "brambling", "class 10, whatever its place among the 200"
    (tmp_path / "imagenet-o" / ids[3]).rename(tmp_path / "imagenet-o" / "n99999999")
    with pytest.raises(BenchmarkNotFound, match="n99999999 is none of ImageNet's 1,000"):
        classes.open_classes("imagenet-o", tmp_path)
    (tmp_path / "imagenet-o" / "n99999999").rename(tmp_path / "imagenet-o" / "others")
    with pytest.raises(BenchmarkNotFound, match=r"200 subfolders.*here are 199"):
        classes.open_classes("imagenet-o", tmp_path)


# --- sets in the layouts of their own archives ------------------------------------------------------------------------


def make_food101(root: Path) -> None:
    write(root / "food-101/meta/test.json", json.dumps({"ice_cream": ["ice_cream/2"], "apple_pie": ["apple_pie/1"]}))
    save(root / "food-101/images/ice_cream/2.jpg")
    save(root / "food-101/images/apple_pie/1.jpg")
    save(root / "food-101/images/apple_pie/of_the_training_split.jpg")


def make_cars(root: Path) -> None:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    kind = [("fname", "O"), ("class", "O")]
    rows = np.array([("00001.jpg", 2), ("00002.jpg", 1)], kind)
    savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": rows})
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(["AM General Hummer", "BMW X5"], object)})
    save(folder / "cars_test/00001.jpg")
    save(folder / "cars_test/00002.jpg")


def make_aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b/data"
    write(data / "variants.txt", "707-320\nBoeing 717\n")
    write(data / "images_variant_test.txt", "0034309 Boeing 717\n0034958 707-320\n")
    save(data / "images/0034309.jpg")
    save(data / "images/0034958.jpg")


def make_pets(root: Path) -> None:
    write(root / "oxford-iiit-pet/annotations/test.txt", "american_bulldog_2 2 2 1\nAbyssinian_7 1 1 1\n")
    save(root / "oxford-iiit-pet/images/american_bulldog_2.jpg")
    save(root / "oxford-iiit-pet/images/Abyssinian_7.jpg")


def make_flowers(root: Path) -> None:
    folder = root / "flowers-102"
    folder.mkdir()
    savemat(folder / "imagelabels.mat", {"labels": np.array([[77, 1, 102]])})
    savemat(folder / "setid.mat", {"tstid": np.array([[3, 2]]), "trnid": np.array([[1]])})
    for number in (1, 2, 3):
        save(folder / f"jpg/image_{number:05d}.jpg")


def make_dtd(root: Path) -> None:
    write(root / "dtd/labels/test1.txt", "zigzagged/zigzagged_0005.jpg\nbanded/banded_0002.jpg\n")
    save(root / "dtd/images/zigzagged/zigzagged_0005.jpg")
    save(root / "dtd/images/banded/banded_0002.jpg")


def make_eurosat(root: Path) -> None:
    save(root / "2750/AnnualCrop/AnnualCrop_1.jpg")
    save(root / "2750/SeaLake/SeaLake_1.jpg")


def make_sun397(root: Path) -> None:
    write(root / "SUN397/ClassName.txt", "/a/abbey\n/a/apartment_building/outdoor\n")
    save(root / "SUN397/a/abbey/sun_1.jpg")
    save(root / "SUN397/a/apartment_building/outdoor/sun_2.jpg")


def make_caltech101(root: Path) -> None:
    for name in ("accordion", "yin_yang", "BACKGROUND_Google"):
        save(root / f"101_ObjectCategories/{name}/image_{name}.jpg")


LAYOUTS = {
    "food101": (make_food101, [("1.jpg", "apple pie"), ("2.jpg", "ice cream")]),
    "stanford-cars": (make_cars, [("00001.jpg", "BMW X5"), ("00002.jpg", "AM General Hummer")]),
    "fgvc-aircraft": (make_aircraft, [("0034309.jpg", "Boeing 717"), ("0034958.jpg", "707-320")]),
    "oxford-pets": (make_pets, [("american_bulldog_2.jpg", "american bulldog"), ("Abyssinian_7.jpg", "Abyssinian")]),
    "flowers102": (make_flowers, [("image_00003.jpg", "blackberry lily"), ("image_00002.jpg", "pink primrose")]),
    "dtd": (make_dtd, [("zigzagged_0005.jpg", "zigzagged"), ("banded_0002.jpg", "banded")]),
    "eurosat": (make_eurosat, [("AnnualCrop_1.jpg", "Annual Crop"), ("SeaLake_1.jpg", "Sea Lake")]),
    "sun397": (make_sun397, [("sun_1.jpg", "abbey"), ("sun_2.jpg", "apartment building outdoor")]),
    "caltech101": (make_caltech101, [("image_accordion.jpg", "accordion"), ("image_yin_yang.jpg", "yin yang")]),
}


@pytest.mark.parametrize("preset", LAYOUTS)
def test_a_set_is_read_as_its_archive_unpacks(tmp_path, preset):
    make, expected = LAYOUTS[preset]
    make(tmp_path)
    data = classes.open_classes(preset, tmp_path)
    assert labelled(data) == expected and data.read(0).size == (24, 24)
    (inner,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert labelled(classes.open_classes(preset, inner)) == expected, "its own folder may be named too"


@pytest.mark.parametrize("preset", LAYOUTS)
def test_another_layout_is_told_what_was_looked_for(tmp_path, preset):
    save(tmp_path / "images" / "1.jpg")
    with pytest.raises(BenchmarkNotFound, match=r"does not have the layout.*looked for \S+"):
        classes.open_classes(preset, tmp_path)


@pytest.mark.parametrize("preset", ["food101", "stanford-cars", "fgvc-aircraft", "oxford-pets", "flowers102", "dtd"])
def test_a_set_of_which_an_image_is_missing_is_refused(tmp_path, preset):
    make, (_, (name, _)) = LAYOUTS[preset]
    make(tmp_path)
    next(tmp_path.rglob(name)).unlink()
    with pytest.raises(BenchmarkNotFound, match=f"1 of 2 images are missing.*{name}"):
        classes.open_classes(preset, tmp_path)


def test_a_runs_folder_of_classes_may_bear_the_name_of_a_set_that_is_handed_out_otherwise(tmp_path):
    for name in ("annual_crop", "sea"):
        save(tmp_path / "mine" / name / "1.jpg")
    name, (data, _) = open_zero_shot(f"eurosat={tmp_path / 'mine'}")
    assert (name, data.names) == ("eurosat", ["annual crop", "sea"])
    save(tmp_path / "archives" / "food-101" / "images" / "pie" / "1.jpg")  # damaged: it has no list
    with pytest.raises(BenchmarkNotFound, match=r"looked for images and meta/test\.json"):
        open_zero_shot(f"food101={tmp_path / 'archives'}")
    make_food101(tmp_path)
    assert open_zero_shot(f"food101={tmp_path}")[1][0].names == ["apple pie", "ice cream"]


# --- long captions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "Urban1k"])
def test_urban1k_pairs_image_and_caption_by_number(tmp_path, place):
    for number in (1, 2, 10):
        save(tmp_path / place / "image" / f"{number}.jpg")
        write(tmp_path / place / "caption" / f"{number}.txt", f" street {number} \nanother line\n")
    source = benchmarks.PRESETS["urban1k"](tmp_path)
    found = [(Path(source.name(i)).name, source.captions(i)) for i in range(len(source))]
    assert found == [(f"{number}.jpg", [f"street {number}"]) for number in (1, 2, 10)]
    (tmp_path / place / "image" / "2.jpg").unlink()
    with pytest.raises(BenchmarkNotFound, match=r"1 of 3 images are missing.*2\.jpg"):
        benchmarks.urban1k(tmp_path)
    (tmp_path / place / "caption" / "10.txt").write_text("\n")
    with pytest.raises(BenchmarkNotFound, match=r"10\.txt is empty"):
        benchmarks.urban1k(tmp_path)
    with pytest.raises(BenchmarkNotFound, match="image/ and caption/"):
        benchmarks.urban1k(tmp_path / "elsewhere")


def make_iiw(root: Path, tables: str, folders: tuple[str, str, str]) -> None:
    """One image a part; the third part names its image otherwise, as DCI does."""
    rows = [{"image/key": "aar_test_04600"}, {"image/key": "test_00003"}, {"image": "sa_1.jpg"}]
    for part, row, folder in zip(("IIW-400", "DOCCI_Test", "DCI_Test"), rows, folders, strict=True):
        write(root / tables / part / "data.jsonl", json.dumps({**row, "IIW": f"of {part}", "IIW-P5B": "a machine's"}))
        (name,) = row.values()
        save(root / folder / (name if "." in name else f"{name}.jpg"))


@pytest.mark.parametrize(
    ("tables", "folders"),
    [("", ("docci_aar", "docci", "dci")), ("datasets", ("images_aar", "images", "photos"))],
)
def test_imageinwords_is_its_three_human_parts(tmp_path, tables, folders):
    make_iiw(tmp_path, tables, folders)
    source = benchmarks.PRESETS["iiw"](tmp_path)
    found = {Path(source.name(i)).name: source.captions(i) for i in range(len(source))}
    expected = {"aar_test_04600.jpg": ["of IIW-400"], "test_00003.jpg": ["of DOCCI_Test"], "sa_1.jpg": ["of DCI_Test"]}
    assert found == expected
    assert len(benchmarks.PRESETS["iiw-400"](tmp_path)) == 1
    (tmp_path / folders[2]).rename(tmp_path / "elsewhere")
    with pytest.raises(BenchmarkNotFound, match=r"lacks DCI_Test.*dci or photos"):
        benchmarks.iiw(tmp_path)
    write(tmp_path / tables / "IIW-400" / "data.jsonl", '{"image/key": "x", "IIW-P5B": "a machine\'s"}')
    with pytest.raises(BenchmarkNotFound, match="line 1: no image/key"):
        benchmarks.iiw_400(tmp_path)


# --- captions that differ little --------------------------------------------------------------------------------------


def at(*degrees: float) -> torch.Tensor:
    """Unit vectors in the plane, [N,2]."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


@pytest.fixture
def plane(monkeypatch):
    """An encoder whose answers are known: a caption is the angle that it says, an image's red is its angle."""

    def images(bundle, pixels, **_):
        return at(*pixels[:, 0].float().mean((1, 2)).round().tolist())

    monkeypatch.setattr(composition, "encode_images", images)
    monkeypatch.setattr(composition, "encode_texts", lambda bundle, texts, **_: at(*map(float, texts)))


def colour(path: Path, red: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 24), (red, 0, 0)).save(path.with_suffix(".png"))
    path.with_suffix(".png").rename(path)


def make_sugarcrepe(root: Path, place: str = "") -> Path:
    """Seven kinds, an image at 10 degrees; the captions of add_att and swap_obj are right, two are ties."""
    colour(root / "val2017" / "1.jpg", 10)
    for kind in composition.SUGARCREPE:
        right, wrong = {"add_att": ("20", "60"), "swap_obj": ("12", "0")}.get(kind, ("60", "20"))
        if kind.startswith("replace"):
            right = wrong = "20"
        row = {"filename": "1.jpg", "caption": right, "negative_caption": wrong}
        write(root / place / f"{kind}.json", json.dumps({"7": row}))
    return root


@pytest.mark.parametrize("place", ["", "data"])
def test_sugarcrepe_is_right_where_the_caption_is_closer_than_the_negative(tmp_path, plane, place):
    found = composition.evaluate_composition(make_bundle(), "sugarcrepe", make_sugarcrepe(tmp_path, place))
    assert found["pairs"] == 7 and found["overall"] == pytest.approx(2 / 7)
    assert [kind for kind, own in found["by_type"].items() if own["accuracy"]] == ["add_att", "swap_obj"]


ANGLES = [(0, 60, 5, 55), (100, 90, 160, 47), (100, 90, 161, 46), (160, 47, 100, 90)]
"""Of image 0, image 1, caption 0, caption 1."""


def make_winoground(root: Path, place: str = "") -> Path:
    """Both ways right, the images' way twice, the captions' way once."""
    lines = []
    for number, (*images, first, second) in enumerate(ANGLES):
        names = [f"ex_{number}_img_{i}" for i in (0, 1)]
        for name, red in zip(names, images, strict=True):
            colour(root / place / "images" / f"{name}.png", red)
        row = {
            "id": number,
            "image_0": names[0],
            "image_1": names[1],
            "caption_0": str(first),
            "caption_1": str(second),
        }
        lines.append(json.dumps({**row, "collapsed_tag": "Relation" if number else "Object"}))
    write(root / place / "examples.jsonl", "\n".join(lines) + "\n")
    return root


def scores_by_hand(images: tuple[int, int], captions: tuple[float, float]) -> tuple[bool, bool]:
    """(text score, image score), from Winoground's definition."""
    s = [[float(at(image)[0] @ at(caption)[0]) for caption in captions] for image in images]
    return s[0][0] > s[0][1] and s[1][1] > s[1][0], s[0][0] > s[1][0] and s[1][1] > s[0][1]


@pytest.mark.parametrize("place", ["", "data"])
def test_winoground_has_a_text_an_image_and_a_group_score(tmp_path, plane, place):
    found = composition.evaluate_composition(make_bundle(), "winoground", make_winoground(tmp_path, place))
    by_hand = [scores_by_hand(angles[:2], angles[2:]) for angles in ANGLES]
    text, image = zip(*by_hand, strict=True)
    assert (sum(text), sum(image)) == (2, 3), "a case that tells the two apart"
    assert (found["text"], found["image"]) == (sum(text) / 4, sum(image) / 4)
    assert found["overall"] == sum(t and i for t, i in by_hand) / 4
    assert found["by_type"]["Object"] == {"accuracy": 1, "pairs": 1} and found["by_type"]["Relation"]["pairs"] == 3


def test_embeddings_that_collapsed_are_right_about_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(composition, "encode_images", lambda bundle, pixels, **_: at(*[30.0] * len(pixels)))
    monkeypatch.setattr(composition, "encode_texts", lambda bundle, texts, **_: at(*[30.0] * len(texts)))
    assert (
        composition.evaluate_composition(make_bundle(), "sugarcrepe", make_sugarcrepe(tmp_path / "s"))["overall"] == 0
    )
    found = composition.evaluate_composition(make_bundle(), "winoground", make_winoground(tmp_path / "w"))
    assert (found["text"], found["image"], found["overall"]) == (0, 0, 0)


def test_composition_by_a_real_model_is_what_its_embeddings_say(tmp_path):
    bundle, items = make_bundle(), []
    for number in range(6):
        save(tmp_path / "val2017" / f"{number}.png", seed=number)
        captions = [f"red {number}", f"blue cat {number}"]
        right, wrong = captions if number % 2 else reversed(captions)
        items.append({"filename": f"{number}.png", "caption": right, "negative_caption": wrong})
    for kind in composition.SUGARCREPE:
        write(tmp_path / f"{kind}.json", json.dumps({str(n): item for n, item in enumerate(items)}))
    found = composition.evaluate_composition(bundle, "sugarcrepe", tmp_path, batch_size=4, **CPU)
    pixels = torch.stack([ImageTransform(24)(open_image(tmp_path / "val2017" / item["filename"])) for item in items])
    images = encode_images(bundle, pixels)
    right, wrong = (encode_texts(bundle, [item[key] for item in items]) for key in ("caption", "negative_caption"))
    expected = ((images * right).sum(1) > (images * wrong).sum(1)).float().mean().item()
    assert 0 < expected < 1 and found["overall"] == pytest.approx(expected)


def test_composition_in_another_layout_is_told_what_was_looked_for(tmp_path):
    for preset, words in {
        "sugarcrepe": r"add_att\.json.*val2017",
        "winoground": r"examples\.jsonl and images/",
    }.items():
        with pytest.raises(BenchmarkNotFound, match=words):
            composition.PRESETS[preset](tmp_path)
    crepe, ground = make_sugarcrepe(tmp_path / "s"), make_winoground(tmp_path / "w")
    (ground / "images" / "ex_1_img_1.png").unlink()
    with pytest.raises(BenchmarkNotFound, match=r"1 of 8 images are missing.*ex_1_img_1\.png"):
        composition.winoground(ground)
    write(ground / "examples.jsonl", '{"image_0": "a", "image_1": "b", "caption_0": "c"}')
    with pytest.raises(BenchmarkNotFound, match=r"line 1: .*caption_1"):
        composition.winoground(ground)
    write(crepe / "swap_att.json", '{"3": {"filename": "1.jpg", "caption": "a"}}')
    with pytest.raises(BenchmarkNotFound, match=r"swap_att\.json, entry 3.*negative_caption"):
        composition.sugarcrepe(crepe)
    (crepe / "swap_att.json").unlink()
    with pytest.raises(BenchmarkNotFound, match=r"lacks swap_att\.json"):
        composition.sugarcrepe(crepe)
    with pytest.raises(ValueError, match="sugarcrepe=FOLDER or winoground=FOLDER"):
        composition.open_composition("winogrande=x")


def test_the_command_measures_composition(tmp_path, capsys):
    save_bundle(make_bundle(), tmp_path / "model")
    folder, output = make_winoground(tmp_path / "w"), tmp_path / "found.json"
    flags = [
        "--preset",
        "winoground",
        "--data",
        str(folder),
        "--output",
        str(output),
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    assert command.main([str(tmp_path / "model"), "composition", *flags]) == 0
    found = json.loads(output.read_text())["composition"]["winoground"]["model"]
    assert found == composition.evaluate_composition(make_bundle(), "winoground", folder, **CPU)
    printed = capsys.readouterr().out
    assert "winoground" in printed and "Relation (3)" in printed and "all (4)" in printed
    assert re.search(rf"text score\s+{100 * found['text']:.1f}\s", printed), "the two scores beside their group's"


# --- in a run --------------------------------------------------------------------------------------------------------


def test_a_finished_run_measures_composition_that_is_asked_for_later(tmp_path):
    from test_methods import flags
    from tiny_run import draw_data

    from train_encoder.command import main

    run, ground = tmp_path / "run", make_winoground(tmp_path / "w")
    words = flags("direct-ft", draw_data(tmp_path / "data"), run)
    assert main(words) == 0
    before = json.loads((run / "results.json").read_text())
    assert "Captions that differ little" not in (run / "report.html").read_text()
    assert main([*words, "--evaluation.composition", f"winoground={ground}"]) == 0
    after = json.loads((run / "results.json").read_text())
    assert set(after["composition"]["winoground"]) == {"base", "fine-tuned"}
    assert {**after, "composition": {}} == {**before, "composition": {}}, "what was measured stays"
    page = (run / "report.html").read_text()
    assert "Captions that differ little" in page and "image score" in page and "Relation" in page
