"""Evaluation: recall, zero-shot, attribute pairs and routing against answers that are known; the command end to end."""

from __future__ import annotations

import csv
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip", reason="the trainer's packages are not installed")

from conftest import shake
from PIL import Image
from test_features import Pictures, make_bundle

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.model_directory import save_bundle
from llava_clipmoe.modeling_clipmoe import CLIPMoEModel
from llava_clipmoe.transformer_clipmoe import only_expert
from llava_clipmoe.upcycling import ffn_state, moe_config, upcycle
from train_encoder.data.decode import ImageTransform
from train_encoder.evaluate import benchmarks, classes, command, mmvp, routing, zero_shot
from train_encoder.evaluate.benchmarks import BenchmarkNotFound
from train_encoder.evaluate.retrieval import evaluate_retrieval, recalls
from train_encoder.features.encode import NotFinite, encode_images, encode_texts

CPU = {"device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def dense() -> ClipBundle:
    return make_bundle()


@pytest.fixture(scope="module")
def stages(dense) -> list[dict[str, torch.Tensor]]:
    """FFNs of two stages."""
    return [ffn_state(shake(CLIPMoEModel(dense.model.config), seed).state_dict()) for seed in (2, 3)]


@pytest.fixture(scope="module")
def moe(dense, stages) -> ClipBundle:
    """The base and two stages: three experts, two a token, routers that have made up their mind."""
    model = upcycle(dense.model, stages, moe_config(dense.model.config, num_experts=3, num_experts_per_tok=2))
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if name.endswith("router.weight"):
            parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return ClipBundle(model, dense.tokenizer, name="tiny-moe")


def unit(array: np.ndarray) -> np.ndarray:
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


def save(path: Path, colour=None, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), np.uint8)
    (Image.new("RGB", (24, 24), colour) if colour else Image.fromarray(pixels)).save(path)


# --- retrieval ------------------------------------------------------------------------------------------------------


def brute_force(image: np.ndarray, text: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """Sorts every list, item by item."""
    similarity = image.astype(np.float64) @ text.T.astype(np.float64)
    found = {}
    for k in (1, 5, 10):
        i2t = [any(owner[m] == i for m in np.argsort(-similarity[i])[:k]) for i in range(len(image))]
        t2i = [owner[m] in np.argsort(-similarity[:, m])[:k] for m in range(len(text))]
        found[f"i2t_r{k}"], found[f"t2i_r{k}"] = np.mean(i2t), np.mean(t2i)
    return found


@pytest.mark.parametrize("block", [7, 2048])
def test_recall_equals_sorting_every_list(block):
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(40), rng.integers(1, 6, 40))
    image = unit(rng.normal(size=(40, 8)))
    text = unit(image[owner] + 0.4 * rng.normal(size=(len(owner), 8)))
    expected = brute_force(image, text, owner)
    assert 0.2 < expected["i2t_r1"] < 0.9 and expected["t2i_r1"] < expected["t2i_r10"]  # a case that can tell
    assert recalls(image, text, owner, block=block) == pytest.approx(expected)
    shuffled = rng.permutation(len(owner))
    assert recalls(image, text[shuffled], owner[shuffled], block=block) == pytest.approx(expected)


def test_any_own_caption_is_a_hit_for_the_image():
    image = np.eye(3, dtype=np.float32)
    text = unit(np.array([[1, 0, 0.1], [0, 1, 0], [0, 0, 1], [0, 0, 1]]) + 1e-3)
    text[3] = image[1]  # image 2's second caption fits image 1 exactly, its first one is right
    found = recalls(image, text, np.array([0, 1, 2, 2]))
    assert found["i2t_r1"] == pytest.approx(2 / 3)  # image 1 finds image 2's caption first
    assert found["t2i_r1"] == pytest.approx(3 / 4)


@pytest.mark.parametrize("block", [3, 2048])
def test_embeddings_collapsed_to_one_point_score_nothing(block):
    point = unit(np.random.default_rng(1).normal(size=(1, 64)))
    found = recalls(point.repeat(30, 0), point.repeat(60, 0), np.repeat(np.arange(30), 2), block=block)
    assert set(found.values()) == {0}


def test_a_tie_counts_as_worse():
    image = np.eye(12, dtype=np.float32)
    image[1] = image[0]
    found = recalls(image, np.eye(12, dtype=np.float32)[[0, 0, *range(2, 12)]], np.arange(12))
    assert found["i2t_r1"] == found["t2i_r1"] == pytest.approx(10 / 12) and found["i2t_r5"] == 1


def test_nan_embeddings_are_an_error_and_not_a_hit():
    image = np.eye(3, dtype=np.float32)
    broken = image.copy()
    broken[2, 0] = np.nan
    for arguments in ((broken, image), (image, broken)):
        with pytest.raises(NotFinite):
            recalls(*arguments, np.arange(3))


def test_an_image_without_caption_is_an_error():
    with pytest.raises(ValueError, match="all need one"):
        recalls(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), np.array([0, 1, 1]))


def test_evaluate_retrieval_equals_encoding_by_hand(dense):
    source = Pictures(30)
    found = evaluate_retrieval(dense, source, batch_size=8, **CPU)
    pixels = torch.stack([ImageTransform(24)(source.image(i)) for i in range(30)])
    texts = [caption for i in range(30) for caption in source.captions(i)]
    owner = np.repeat(np.arange(30), [len(source.captions(i)) for i in range(30)])
    expected = brute_force(encode_images(dense, pixels).numpy(), encode_texts(dense, texts).numpy(), owner)
    assert found == pytest.approx({**expected, "images": 30, "captions": len(texts)})


def test_coco_in_both_of_its_layouts(tmp_path):
    annotations = [{"id": 9 - n, "image_id": 1 + n % 2, "caption": f" c{n} "} for n in range(9)] + [
        {"id": 20 + n, "image_id": 1, "caption": "sixth or later"} for n in range(3)
    ]
    content = {"images": [{"id": i, "file_name": f"{i:012}.jpg"} for i in (2, 1)], "annotations": annotations}
    (tmp_path / "official" / "annotations").mkdir(parents=True)
    (tmp_path / "official" / "annotations" / "captions_val2017.json").write_text(json.dumps(content))
    for i in (1, 2):
        save(tmp_path / "official" / "val2017" / f"{i:012}.jpg", seed=i)
    source = benchmarks.coco_5k(tmp_path / "official")
    assert [source.captions(i) for i in range(2)] == [["c1", "c3", "c5", "c7"], ["c0", "c2", "c4", "c6", "c8"]]
    assert source.image(0).size == (24, 24) and source.name(0).endswith("000000000002.jpg")

    rows = [
        {"filepath": "val2014", "filename": f"{s}.jpg", "split": s, "sentences": [{"raw": f"a {s}"}]}
        for s in ("train", "restval", "test")
    ]
    save(tmp_path / "karpathy" / "val2014" / "test.jpg")
    (tmp_path / "karpathy" / "dataset_coco.json").write_text(json.dumps({"images": rows}))
    source = benchmarks.coco_5k(tmp_path / "karpathy")
    assert len(source) == 1 and source.captions(0) == ["a test"]


def test_flickr30k_in_its_three_layouts_takes_every_image(tmp_path):
    names = ["1.jpg", "2.jpg"]
    tokens = "\n".join(f"{name}#{k}\t{name} says {k} , end ." for name in names for k in range(5))
    lines = [f"{name}| {k}| {name} says {k} , end ." for name in names for k in range(5)]
    lines[-1] = "2.jpg| 4   2.jpg says 4 , end ."  # one line of the real file lacks its second bar
    table = "\n".join(["image_name| comment_number| comment", *lines])
    rows = [
        {"filename": name, "split": split, "sentences": [{"raw": f"{name} says {k} , end ."} for k in range(5)]}
        for name, split in zip(names, ("train", "test"), strict=True)
    ]
    layouts = {
        "results_20130124.token": tokens,
        "results.csv": table,
        "dataset_flickr30k.json": json.dumps({"images": rows}),
    }
    for number, (file, content) in enumerate(layouts.items()):
        folder = tmp_path / str(number)
        for name in names:
            save(folder / "flickr30k-images" / name)
        (folder / file).write_text(content)
        source = benchmarks.flickr30k(folder)
        assert [source.captions(i) for i in range(2)] == [[f"{n} says {k} , end ." for k in range(5)] for n in names]
        # a byte order mark, half an emoji, a blank line, lines that end as Windows' do
        if file.endswith(".json"):
            content, expected = content.replace("1.jpg says", r"1.jpg\ud83d says"), "1.jpg\ufffd says 0 , end ."
        else:
            content, expected = content.replace("\n", "\n\n").replace("\n", "\r\n"), "1.jpg says 0 , end ."
        (folder / file).write_bytes(b"\xef\xbb\xbf" + content.encode())
        edited = benchmarks.flickr30k(folder)
        assert edited.captions(0)[0] == expected and edited.captions(1) == source.captions(1) and len(edited) == 2


@pytest.mark.parametrize("preset", ["coco-5k", "flickr30k"])
def test_a_missing_benchmark_says_what_was_looked_for(tmp_path, preset):
    wanted = {"coco-5k": "captions_val2017.json.*dataset_coco.json", "flickr30k": "results_20130124.token.*results.csv"}
    with pytest.raises(BenchmarkNotFound, match=wanted[preset]):
        benchmarks.PRESETS[preset](tmp_path)


def test_a_benchmark_with_a_missing_image_is_refused(tmp_path):
    save(tmp_path / "images" / "1.jpg")
    (tmp_path / "results_20130124.token").write_text("1.jpg#0\ta\n2.jpg#0\tb\n")
    with pytest.raises(BenchmarkNotFound, match=r"1 of 2 images are missing.*2\.jpg"):
        benchmarks.flickr30k(tmp_path)


# --- attribute pairs --------------------------------------------------------------------------------------------------

RED, BLUE = (255, 0, 0), (0, 0, 255)


def make_pairs(folder: Path, rows: list[tuple], header=("id", "type", "statement"), images="MMVP_VLM_Images") -> Path:
    """rows: (id, type, statement, colour, ...)."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "Questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *(row[:3] + row[4:] for row in rows)])
    for number, kind, _, colour, *_ in rows:
        save(folder / images / kind / f"{number}.png", colour)
    return folder


FOUR_PAIRS = [
    (1, "Colour", "red", RED),
    (2, "Colour", "blue", BLUE),
    (3, "Colour", "blue", RED),
    (4, "Colour", "red", BLUE),
    (5, "State", "red", RED),
    (6, "State", "red thing", BLUE),
    (7, "State", "blue", BLUE),
    (8, "State", "red", RED),
]


@pytest.fixture
def knowing(monkeypatch):
    """An encoder whose answers are known: what is red lies on one axis and what is blue on the other, text or image."""
    axes = torch.eye(2)

    def images(bundle, pixels, **_):
        return torch.stack([axes[int(p[2].float().mean() > p[0].float().mean())] for p in pixels])

    def texts(bundle, captions, **_):
        assert all(caption.startswith("a photo of ") for caption in captions)
        return torch.stack([axes[int("blue" in caption)] for caption in captions])

    monkeypatch.setattr(mmvp, "encode_images", images)
    monkeypatch.setattr(mmvp, "encode_texts", texts)


def test_a_pair_counts_when_both_statements_find_their_image(tmp_path, dense, knowing):
    folder = make_pairs(tmp_path, FOUR_PAIRS)
    assert mmvp.evaluate_mmvp(dense, folder) == {
        "overall": 0.5,
        "pairs": 4,
        "by_type": {"Colour": {"accuracy": 0.5, "pairs": 2}, "State": {"accuracy": 0.5, "pairs": 2}},
    }


def at(*degrees: float) -> torch.Tensor:
    """Unit vectors in the plane [1,2,2]: two embeddings whose cosines are those of the angles between them."""
    return torch.tensor([[[np.cos(np.radians(angle)), np.sin(np.radians(angle))] for angle in degrees]])


def test_it_is_the_statement_that_chooses_between_the_images():
    first, second = at(0, -10), at(60, -53)
    # Scores [statement, image] are [[.50, .34], [.60, .73]]: both statements prefer their image, though image 1 would
    # rather have statement 2. Then transposed: both images prefer their statement, but statement 1 prefers image 2.
    assert mmvp.right_pairs(images=first, statements=second) == [True]
    assert mmvp.right_pairs(images=second, statements=first) == [False]
    assert mmvp.right_statements(images=second, statements=first).tolist() == [[False, True]]


def test_equal_embeddings_are_never_right(tmp_path, dense):
    point = torch.nn.functional.normalize(torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    other = torch.nn.functional.normalize(torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    assert not any(mmvp.right_pairs(point.expand(5, 2, 16), point.expand(5, 2, 16)))
    assert not any(mmvp.right_pairs(point.expand(5, 2, 16), other))
    rows = [(number, kind, text, RED) for number, kind, text, _ in FOUR_PAIRS]  # all pictures are the same
    assert mmvp.evaluate_mmvp(dense, make_pairs(tmp_path, rows), **CPU)["overall"] == 0


def test_upstreams_header_and_folder_and_our_extra_columns_are_read(tmp_path, dense, knowing):
    upstream = make_pairs(tmp_path / "a", FOUR_PAIRS, ("Question ID", "Type", "Statement"), "MLLM_VLM Images")
    assert mmvp.evaluate_mmvp(dense, upstream)["overall"] == 0.5
    rows = [(*row, "x", "train" if row[0] in (1, 2, 3) else "heldout") for row in FOUR_PAIRS]
    ours = make_pairs(tmp_path / "b", rows, ("id", "type", "statement", "note", "split"))
    assert mmvp.evaluate_mmvp(dense, ours, split="train") == {
        "overall": 1,
        "pairs": 1,
        "by_type": {"Colour": {"accuracy": 1, "pairs": 1}},
    }
    assert mmvp.evaluate_mmvp(dense, ours, split="heldout")["pairs"] == 2  # the pair (3, 4) is of no single split
    with pytest.raises(ValueError, match="split 'dev'"):
        mmvp.evaluate_mmvp(dense, ours, split="dev")


def test_the_odd_id_is_the_first_image_in_whatever_order_the_rows_are(tmp_path, dense, knowing):
    rows = [FOUR_PAIRS[1], FOUR_PAIRS[0], *FOUR_PAIRS[2:]]
    assert mmvp.evaluate_mmvp(dense, make_pairs(tmp_path, rows))["overall"] == 0.5
    assert mmvp.read_pairs(tmp_path)[0].statements == ("red", "blue")


def test_a_type_folder_of_another_spelling_is_found(tmp_path, dense, knowing):
    folder = make_pairs(tmp_path, FOUR_PAIRS)
    (folder / "MMVP_VLM_Images" / "State").rename(folder / "MMVP_VLM_Images" / "State_and_Condition")
    assert mmvp.evaluate_mmvp(dense, folder)["overall"] == 0.5


@pytest.mark.parametrize(
    ("rows", "message"),
    [(FOUR_PAIRS[:3], "even"), (FOUR_PAIRS[:4:2], "no pair"), ([FOUR_PAIRS[0], FOUR_PAIRS[5]], "no pair")],
)
def test_rows_that_make_no_pair_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        mmvp.read_pairs(make_pairs(tmp_path, rows))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(BenchmarkNotFound, match=r"Questions\.csv.*MLLM_VLM Images or MMVP_VLM_Images"):
        mmvp.read_pairs(tmp_path)
    folder = make_pairs(tmp_path, FOUR_PAIRS)
    (folder / "MMVP_VLM_Images" / "State" / "7.png").unlink()
    with pytest.raises(BenchmarkNotFound, match="picture 7"):
        mmvp.read_pairs(folder)


def noise_pairs(folder: Path) -> Path:
    """Twelve pairs of noise: systems answer them differently."""
    make_pairs(folder, [(n, "A" if n < 13 else "B", f"{'red' if n % 2 else 'blue'} {n}", None) for n in range(1, 25)])
    for n in range(1, 25):
        save(folder / "MMVP_VLM_Images" / ("A" if n < 13 else "B") / f"{n}.png", seed=n)
    return folder


def test_an_expert_alone_answers_as_its_stage_does(tmp_path, dense, stages, moe):
    folder = noise_pairs(tmp_path)
    found, source = {}, Pictures(25)
    for number, stage in enumerate([{}, *stages]):
        model = CLIPMoEModel(dense.model.config).eval()
        model.load_state_dict({**dense.model.state_dict(), **stage})
        alone = ClipBundle(model, dense.tokenizer)
        with only_expert(moe.model, number):
            found[number] = mmvp.evaluate_mmvp(moe, folder, **CPU)
            assert found[number] == mmvp.evaluate_mmvp(alone, folder, **CPU)
            assert evaluate_retrieval(moe, source, **CPU) == evaluate_retrieval(alone, source, **CPU)
    assert len({json.dumps(result) for result in found.values()}) > 1  # else the test could not tell them apart


# --- zero-shot --------------------------------------------------------------------------------------------------------


def test_zero_shot_on_a_folder_of_classes(tmp_path, dense):
    for number in range(12):
        save(tmp_path / ("big_red", "blue", "old")[number % 3] / f"{number}.png", seed=number)
    data = classes.open_classes(None, tmp_path)
    assert data.names == ["big red", "blue", "old"] and np.bincount(data.labels).tolist() == [4, 4, 4]
    found = zero_shot.evaluate_zero_shot(dense, data, templates=("a photo of a {}.", "the {}."), batch_size=5, **CPU)
    texts = encode_texts(dense, [t.format(n) for n in data.names for t in ("a photo of a {}.", "the {}.")])
    classifier = texts.view(3, 2, -1).mean(1)
    classifier /= classifier.norm(dim=-1, keepdim=True)
    pixels = torch.stack([ImageTransform(24)(data.read(i)) for i in range(12)])
    right = (encode_images(dense, pixels) @ classifier.T).argmax(1).numpy() == data.labels
    assert 0 < right.mean() < 1
    assert found["top1"] == pytest.approx(right.mean()) and found["top5"] == 1 and found["images"] == 12
    assert found["by_class"]["blue"] == pytest.approx(right[data.labels == 1].mean())


def test_the_mean_per_class_weighs_classes_and_not_images():
    data = classes.Classes(["a", "b", "c"], np.array([0, 0, 0, 1]), lambda i: None)
    found = zero_shot._accuracies(np.array([0, 0, 0, 7]), data)
    assert (found["top1"], found["top5"], found["mean_per_class"]) == (0.75, 0.75, 0.5)


def test_classes_that_tie_are_wrong(tmp_path, dense):
    for name in ("a", "b"):
        save(tmp_path / name / "1.png")
    (tmp_path / "classes.txt").write_text("red\nred\n")
    assert zero_shot.evaluate_zero_shot(dense, classes.image_folder(tmp_path), templates=("{}",), **CPU)["top1"] == 0
    (tmp_path / "classes.txt").write_text("red\n")
    with pytest.raises(BenchmarkNotFound, match=r"1 classes.*2 subfolders"):
        classes.image_folder(tmp_path)


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_class_names_come_from_text_whatever_an_editor_put_before_it(tmp_path, start):
    for name in ("c0", "c1"):
        save(tmp_path / name / "1.jfif", seed=1)
    (tmp_path / "classes.txt").write_text(f"{start}red\u2028fox\r\n\nblue\n", encoding="utf-8", newline="")
    data = classes.image_folder(tmp_path)
    assert data.names == ["red\u2028fox", "blue"] and len(data.labels) == 2
    (tmp_path / "classes.txt").write_text("caf\xe9\nblue", encoding="latin-1")
    with pytest.raises(BenchmarkNotFound, match=r"classes\.txt is not UTF-8 text .*Save it in UTF-8"):
        classes.image_folder(tmp_path)


def test_a_class_without_a_picture_is_not_counted_as_measured(tmp_path):
    save(tmp_path / "c0" / "1.png")
    (tmp_path / "c1").mkdir()
    (tmp_path / "c1" / "1.heic").write_bytes(b"no picture that is read here")
    with pytest.raises(BenchmarkNotFound, match="no image that can be read in 1 of its 2 subfolders, such as c1"):
        classes.image_folder(tmp_path)


def test_the_classifier_uses_openais_templates(dense):
    import open_clip

    found = zero_shot.text_classifier(dense, ["red"])
    texts = encode_texts(dense, [template("red") for template in open_clip.OPENAI_IMAGENET_TEMPLATES])
    expected = torch.nn.functional.normalize(texts.mean(0, keepdim=True), dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_imagenet_needs_its_thousand_folders_and_takes_them_sorted(tmp_path):
    ids = [f"n{number:08}" for number in range(1000)]
    for name in reversed(ids):
        save(tmp_path / "val" / name / "ILSVRC2012_val_00000001.JPEG")
    data = classes.open_classes("imagenet", tmp_path)
    assert [data.names[data.labels[i]] for i in (0, 2, 999)] == ["tench", "great white shark", "toilet paper"]
    (tmp_path / "val" / ids[5] / "ILSVRC2012_val_00000001.JPEG").unlink()
    with pytest.raises(
        BenchmarkNotFound, match=f"no image that can be read in 1 of its 1000 subfolders, such as {ids[5]}"
    ):
        classes.open_classes("imagenet", tmp_path)
    (tmp_path / "val" / ids[5]).rmdir()
    with pytest.raises(BenchmarkNotFound, match="has 999 subfolders"):
        classes.open_classes("imagenet", tmp_path)


@pytest.mark.parametrize(
    ("preset", "folder", "images", "names", "labels"),
    [
        ("cifar10", "cifar-10-batches-bin", "test_batch.bin", "batches.meta.txt", [(1,), (0,)]),
        ("cifar100", "cifar-100-binary", "test.bin", "fine_label_names.txt", [(7, 1), (1, 0)]),
    ],
)
def test_cifar_is_read_from_its_binary_version_only(tmp_path, preset, folder, images, names, labels):
    with pytest.raises(BenchmarkNotFound, match=r"BINARY version.*pickled"):
        classes.open_classes(preset, tmp_path)
    (tmp_path / folder).mkdir()
    pixels = bytes([255] * 1024 + [0] * 1023 + [9] + [0] * 1024)  # red, and one last pixel with some green
    (tmp_path / folder / images).write_bytes(b"".join(struct.pack(f"{len(at)}B", *at) + pixels for at in labels))
    (tmp_path / folder / names).write_text("apple\naquarium_fish\n\n")
    data = classes.open_classes(preset, tmp_path)
    assert [data.names[label] for label in data.labels] == ["aquarium fish", "apple"]
    assert data.read(0).getpixel((0, 0)) == (255, 0, 0) and data.read(1).getpixel((31, 31)) == (255, 9, 0)


# --- routing ----------------------------------------------------------------------------------------------------------


def test_routing_shares_sum_to_one_and_any_of_k_to_k(moe):
    found = routing.evaluate_routing(moe, Pictures(12), **CPU)
    for tower, tokens in (("vision", 12 * 10), ("text", None)):
        assert found[f"{tower}_blocks"] == [0, 1]
        np.testing.assert_allclose(np.sum(found[tower], axis=1), 1)
        np.testing.assert_allclose(np.sum(found[f"{tower}_any"], axis=1), 2)
        assert tokens is None or found[f"{tower}_tokens"] == tokens
    json.dumps(found)


def test_routing_equals_counting_the_models_own_logits(moe):
    source = Pictures(4)
    found = routing.evaluate_routing(moe, source, **CPU)
    counts = torch.zeros(2, 3)
    for i in range(4):
        ids = moe.tokenizer(source.captions(i)[0], truncation=True, max_length=24, return_tensors="pt")["input_ids"]
        for block, logits in enumerate(moe.model.text_model(ids).router_logits):
            counts[block] += torch.bincount(logits[0].argmax(-1), minlength=3)
    np.testing.assert_allclose(found["text"], (counts / counts.sum(1, keepdim=True)).numpy(), atol=1e-6)
    assert found["text_tokens"] == counts[0].sum()


def test_padding_is_in_no_routing_share(moe, monkeypatch):
    alone = routing.evaluate_routing(moe, Pictures(12), batch_size=1, **CPU)  # no caption is padded
    together = routing.evaluate_routing(moe, Pictures(12), batch_size=12, **CPU)
    assert alone == together
    tokenise = routing.tokenise

    def padded(*arguments):
        ids, lengths = tokenise(*arguments)
        extra = 24 - ids.shape[1]
        return torch.cat([ids, torch.full((len(ids), extra), 49407)], dim=1), lengths

    monkeypatch.setattr(routing, "tokenise", padded)
    assert routing.evaluate_routing(moe, Pictures(12), batch_size=1, **CPU) == alone


def test_routing_leaves_bad_images_out_and_takes_the_rows_it_is_given(moe):
    some = routing.evaluate_routing(moe, Pictures(12), rows=np.array([1, 2]), **CPU)
    assert routing.evaluate_routing(moe, Pictures(12, bad=(5,)), rows=np.array([1, 2, 5]), **CPU) == some
    assert some["vision_tokens"] == 2 * 10
    assert routing.evaluate_routing(moe, Pictures(12), images=3, **CPU)["vision_tokens"] == 3 * 10


def test_a_dense_model_has_no_routing(dense):
    with pytest.raises(routing.NoExperts, match="dense"):
        routing.evaluate_routing(dense, Pictures(2), **CPU)


def test_router_movement_sees_what_changed_and_what_did_not(moe):
    initial = {name: tensor.clone() for name, tensor in moe.model.state_dict().items()}
    swapped = "vision_model.encoder.layers.1.mlp.router.weight"
    initial[swapped] = initial[swapped][[1, 2, 0]]  # every expert's row is another's: every first choice changes
    doubled = "text_model.encoder.layers.0.mlp.router.weight"
    initial[doubled] = initial[doubled] / 2  # the same direction: no choice changes
    moved = {row.pop("block"): row for row in routing.router_movement(initial, moe, Pictures(8), **CPU)}
    still = {"relative_change": 0, "cosine": pytest.approx(1), "changed_top1": 0}
    assert moved["vision_model.0"] == moved["text_model.1"] == still
    assert moved["text_model.0"] == {**still, "relative_change": pytest.approx(1)}
    assert moved["vision_model.1"]["changed_top1"] == 1 and moved["vision_model.1"]["cosine"] < 0.9
    with pytest.raises(ValueError, match="another model"):
        routing.router_movement({}, moe, Pictures(8), **CPU)


# --- the command ------------------------------------------------------------------------------------------------------

FLAGS = ["--device", "cpu", "--workers", "0", "--batch-size", "8"]


@pytest.fixture(scope="module")
def models(tmp_path_factory, dense, moe) -> tuple[str, str]:
    """Directories of the dense and of the MoE model."""
    folder = tmp_path_factory.mktemp("models")
    save_bundle(dense, folder / "base")
    save_bundle(moe, folder / "clip-moe")
    return str(folder / "base"), str(folder / "clip-moe")


@pytest.fixture
def table(tmp_path) -> Path:
    """A data file of eight images with two captions each, one image damaged."""
    source, rows = Pictures(9), []
    for i in range(9):
        source.image(i).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "captions": [f"red {i}", f"blue {i}"]})
    (tmp_path / "3.png").write_bytes(b"torn")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data.jsonl"


def test_command_puts_retrieval_of_models_side_by_side(tmp_path, models, table, capsys):
    output = tmp_path / "out" / "results.json"
    flags = ["--data", str(table), "--experts", "--max-bad-fraction", "0.2", "--output", str(output), *FLAGS]
    assert command.main([*models, "retrieval", *flags]) == 0
    systems = json.loads(output.read_text())["retrieval"]["data.jsonl"]
    assert list(systems) == ["base", "clip-moe expert0", "clip-moe expert1", "clip-moe expert2", "clip-moe"]
    assert systems["base"] == systems["clip-moe expert0"]
    assert (systems["base"]["images"], systems["base"]["captions"]) == (8, 16)  # the damaged one is left out
    printed = capsys.readouterr().out
    assert "image to text" in printed and "8 images, 16 captions" in printed and "clip-moe expert2" in printed
    with pytest.raises(ValueError, match="1 of 9 images"):
        command.main([models[0], "retrieval", "--data", str(table), *FLAGS])


def test_command_measures_attribute_pairs_of_every_expert(tmp_path, models, moe, capsys):
    folder, output = noise_pairs(tmp_path / "pairs"), tmp_path / "mmvp.json"
    assert command.main(["mmvp", models[1], "--data", str(folder), "--output", str(output), *FLAGS]) == 0
    found = json.loads(output.read_text())["attributes"]
    assert list(found) == ["clip-moe expert0", "clip-moe expert1", "clip-moe expert2", "clip-moe"]
    for number in range(3):
        with only_expert(moe.model, number):
            assert found[f"clip-moe expert{number}"] == mmvp.evaluate_mmvp(moe, folder, **CPU)
    assert found["clip-moe"] == mmvp.evaluate_mmvp(moe, folder, **CPU)
    assert "all (12)" in capsys.readouterr().out


def test_command_measures_zero_shot(tmp_path, models, capsys):
    for name in ("red", "blue"):
        save(tmp_path / "classes" / name / "1.png", seed=len(name))
    flags = ["--data", str(tmp_path / "classes"), "--templates", "simple", *FLAGS]
    assert command.main([models[0], "zero-shot", *flags]) == 0
    assert "2 images, 2 classes" in capsys.readouterr().out


def test_command_measures_routing_and_its_movement(tmp_path, models, table, capsys):
    output = tmp_path / "routing.json"
    flags = ["--data", str(table), "--initial", models[1], "--output", str(output), *FLAGS]
    assert command.main([models[1], "routing", *flags]) == 0
    found = json.loads(output.read_text())
    assert len(found["routing"]["vision"]) == 2 and [row["changed_top1"] for row in found["router_movement"]] == [0] * 4
    assert "First choices of 80 vision tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match="dense"):
        command.main([models[0], "routing", "--data", str(table), *FLAGS])


def test_command_says_what_is_missing(models, capsys):
    with pytest.raises(ValueError, match="which evaluation"):
        command.main([models[0]])
    with pytest.raises(ValueError, match="one model"):
        command.main([*models, "routing", "--data", "openmoji"])
    assert command.main([models[0], "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(task in printed for task in ("retrieval", "zero-shot", "mmvp", "routing"))


@pytest.mark.parametrize("task", ["retrieval", "zero-shot", "composition", "mmvp", "routing"])
def test_every_tasks_help_gives_an_example_and_its_data(task, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["model", task, "--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and f"llava-clipmoe evaluate my-clip-moe {task}" in printed and "--data" in printed
