"""CLIP_benchmark's own command on model directories of ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("open_clip", reason="the trainer's packages are not installed")

from test_features import make_bundle

from llava_clipmoe.cli import COMMANDS
from llava_clipmoe.model_directory import save_bundle
from llava_clipmoe.upcycling import moe_config, sparse_upcycle
from train_encoder.data.decode import ImageTransform, open_image
from train_encoder.evaluate import clip_benchmark as ours
from train_encoder.evaluate.composition import evaluate_composition
from train_encoder.features.encode import encode_images, encode_texts


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A dense CLIP in base/, another one in other/, and its copies as experts in clip-moe/."""
    folder, dense = tmp_path_factory.mktemp("models"), make_bundle()
    save_bundle(dense, folder / "base")
    save_bundle(make_bundle(seed=5), folder / "other")
    dense.model = sparse_upcycle(dense.model, moe_config(dense.model.config, num_experts=2, num_experts_per_tok=1))
    save_bundle(dense, folder / "clip-moe")
    return folder


def test_a_model_is_called_by_its_folders_name_and_two_of_one_name_are_refused():
    words, directories = ours.named_models(["eval", "--model", "runs/a/clip-moe", "runs/a/base", "--dataset", "cars"])
    assert words[:6] == ["eval", "--model", "clip-moe", "base", "--dataset", "cars"]
    assert words[6:] == ["--model_type", "llava_clipmoe", "--pretrained", "llava_clipmoe"]
    assert directories == {"clip-moe": "runs/a/clip-moe", "base": "runs/a/base"}
    assert ours.named_models(["eval", "--model=runs/b/x"])[1] == {"x": "runs/b/x"}
    assert ours.named_models(["build", "x.json"]) == (["build", "x.json"], {})
    with pytest.raises(ValueError, match="two models are called clip-moe: a/clip-moe and b/clip-moe"):
        ours.named_models(["eval", "--model", "a/clip-moe", "b/clip-moe"])
    with pytest.raises(ValueError, match="name a model"):
        ours.named_models(["eval", "--dataset", "cars"])


def test_pixels_and_tokens_are_those_of_our_own_evaluations(tmp_path, models):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    directories = {"base": str(models / "base")}
    model, preprocess, tokenise = ours.load(directories, "base", "", None, "cpu")
    bundle, texts = make_bundle(), ["a red cat", "blue " * 40]
    with torch.no_grad():
        pixels, ids = preprocess(image)[None], tokenise(texts)
        found = [torch.nn.functional.normalize(x) for x in (model.encode_image(pixels), model.encode_text(ids))]
    torch.testing.assert_close(found[0], encode_images(bundle, ImageTransform(24)(image)[None]))
    torch.testing.assert_close(found[1], encode_texts(bundle, texts))
    assert preprocess(image.convert("L")).shape == (3, 24, 24), "grey pictures too"


def test_without_the_package_the_command_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    with pytest.raises(ValueError, match="pip install clip-benchmark"):
        ours.main(["eval", "--model", "x"])
    assert COMMANDS["clip-benchmark"].target == "train_encoder.evaluate.clip_benchmark:main"


# --- the real package -------------------------------------------------------------------------------------------------


def test_clip_benchmark_itself_measures_our_directories_on_a_local_set(models, tmp_path, monkeypatch, capsys):
    """Classification of a local folder in torchvision's layout, of two models in one command."""
    pytest.importorskip("clip_benchmark.cli", reason="clip-benchmark is not installed")
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        name = ("AnnualCrop", "Forest", "SeaLake")[number % 3]
        path = tmp_path / "data/eurosat/2750" / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24), tuple(np.random.default_rng(number).integers(0, 256, 3).tolist())).save(path)
    names = {"eurosat": ["red", "blue cat", "old"]}
    (tmp_path / "names.json").write_text(json.dumps(names))
    flags = ["--dataset", "eurosat", "--dataset_root", "data", "--num_workers", "0", "--no_amp", "--batch_size", "5"]
    given = [str(models / name) for name in ("base", "other", "clip-moe")]
    assert ours.main(["eval", "--model", *given, *flags, "--custom_classname_file", "names.json", "--quiet"]) == 0
    found = {}
    for file in tmp_path.glob("eurosat_*.json"):
        result = json.loads(file.read_text())
        found[result["model"]] = result["metrics"]
    assert set(found) == {"base", "other", "clip-moe"}
    assert found["base"]["acc1"] == found["clip-moe"]["acc1"], "experts that are copies are the dense model"
    from clip_benchmark.datasets.builder import build_dataset

    data = build_dataset("eurosat", root="data", download=False, custom_classname_file="names.json")
    bundle = make_bundle()
    texts = [[t.format(c=name) for t in data.templates] for name in names["eurosat"]]
    classifier = torch.stack([encode_texts(bundle, group).mean(0) for group in texts])
    pixels = torch.stack([ImageTransform(24)(open_image(Path(path))) for path, _ in data.samples])
    right = (encode_images(bundle, pixels) @ torch.nn.functional.normalize(classifier).T).argmax(1)
    assert len(set(right.tolist())) > 1, "a case that can tell"
    expected = (right == torch.tensor([label for _, label in data.samples])).float().mean().item()
    assert found["base"]["acc1"] == pytest.approx(expected)


def test_its_composition_score_is_ours(models, tmp_path, monkeypatch):
    pytest.importorskip("clip_benchmark.cli", reason="clip-benchmark is not installed")
    from train_encoder.evaluate.composition import SUGARCREPE

    monkeypatch.chdir(tmp_path)
    rows = {}
    for number in range(8):
        path = tmp_path / "crepe" / "val2017" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        captions = [f"red {number}", f"blue cat {number}"]
        right, wrong = captions if number % 2 else reversed(captions)
        rows[str(number)] = {"filename": path.name, "caption": right, "negative_caption": wrong}
    for kind in SUGARCREPE:
        (tmp_path / "crepe" / f"{kind}.json").write_text(json.dumps(rows))
    flags = [
        "--dataset",
        "sugar_crepe/swap_att",
        "--dataset_root",
        "crepe",
        "--num_workers",
        "0",
        "--no_amp",
        "--quiet",
    ]
    assert ours.main(["eval", "--model", str(models / "base"), *flags]) == 0
    (file,) = tmp_path.glob("sugar_crepe_swap_att_*.json")
    theirs = json.loads(file.read_text())["metrics"]
    found = evaluate_composition(make_bundle(), "sugarcrepe", tmp_path / "crepe", device="cpu")
    assert theirs["text_acc"] == pytest.approx(found["by_type"]["swap_att"]["accuracy"])
