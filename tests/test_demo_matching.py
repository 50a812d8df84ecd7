"""What the eyes themselves say: two statements, two pictures, which each CLIP matches to which."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny.llavas import COLOURS, upstream_is_installed

pytest.importorskip("gradio", reason="the demo's packages are not installed")
if not upstream_is_installed():
    pytest.skip("upstream LLaVA (llava-torch) is not installed here", allow_module_level=True)

from demo.llava.similarity import Match, Similarity
from demo.mining.pairs import BlindPair, Question
from demo.page import html
from demo.session import explain
from llava_clipmoe.load import load_bundle
from train_encoder.data.decode import ImageTransform, normalise
from train_encoder.evaluate.mmvp import right_pairs

pytest_plugins = ["tiny.loaded_llavas"]

PICTURES = [Image.new("RGB", (40 + 10 * i, 30), colour) for i, colour in enumerate(list(COLOURS.values())[:2])]
WORDS = ["red", "green", "a red square", "it is 7", *"abcdefghijkl"]


def directly(source: str, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """-> L2-normalised pictures [2,P] and texts [M,P], one after the other from the model in `source`."""
    bundle = load_bundle(source)
    with torch.inference_mode():
        rows = []
        for picture in PICTURES:
            pixels = ImageTransform(bundle.image_size)(picture)[None]
            rows.append(bundle.model.get_image_features(normalise(pixels, bundle.image_mean, bundle.image_std)))
        for text in texts:
            ids = bundle.tokenizer(text, truncation=True, max_length=bundle.context_length, return_tensors="pt")
            rows.append(bundle.model.get_text_features(ids["input_ids"]))
    points = torch.nn.functional.normalize(torch.cat(rows), dim=-1)
    return points[:2], points[2:]


def words(part: str) -> str:
    """A part of the page without its tags."""
    return re.sub(r"<.*?>", "", part).strip()


@pytest.fixture(scope="module")
def similarity(own) -> Similarity:
    return Similarity(own)


def test_the_numbers_are_those_of_the_models(own, similarity):
    statements = ["a red square", "green"]  # of different lengths: one of them is padded
    found = similarity.matches(PICTURES, statements)
    for llava, match in zip(own, found, strict=True):
        images, texts = directly(llava.tower_source, statements)
        torch.testing.assert_close(torch.tensor(match.cosines), texts @ images.T, atol=1e-5, rtol=1e-5)
    left, right = (torch.tensor(match.cosines) for match in found)
    assert not torch.allclose(left, right, atol=1e-3), "one eye twice"


@pytest.mark.parametrize("side", [0, 1])
def test_how_many_statements_match_is_by_mmvps_rule(own, similarity, side):
    images, texts = directly(own[side].tower_source, WORDS)
    first_rather = (texts @ (images[0] - images[1])).tolist()
    to_first = WORDS[first_rather.index(max(first_rather))]
    to_second = WORDS[first_rather.index(min(first_rather))]
    assert max(first_rather) > 1e-3 and min(first_rather) < -1e-3, "no word for each picture: nothing can be planted"
    planted = {
        (to_first, to_second): ((0, 1), 2, "✓ matches both"),
        (to_first, to_first): ((0, 0), 1, "✗ matches one"),
        (to_second, to_second): ((1, 1), 1, "✗ matches one"),
        (to_second, to_first): ((1, 0), 0, "✗ matches none"),
    }
    for statements, (chosen, right, verdict) in planted.items():
        match = similarity.matches(PICTURES, statements)[side]
        assert (match.chosen, match.right) == (chosen, right)
        both = texts[[WORDS.index(statement) for statement in statements]]
        assert right_pairs(images[None], both[None]) == [right == 2]
        assert verdict in words(html.matches(["an eye"], statements, [match]))


def test_one_picture_twice_is_matched_by_neither_statement(similarity):
    for match in similarity.matches([PICTURES[0]] * 2, ("red", "green")):
        assert (match.chosen, match.right) == ((None, None), 0)
        assert words(html.matches(["an eye"], ("red", "green"), [match])).count("✗ no difference") == 2


def test_the_higher_picture_is_marked_and_everything_is_escaped():
    match = Match([[0.25, 0.2], [0.31, 0.3]], (0, 0))
    shown = html.matches(["<i>eye</i>"], ("<b>", "&"), [match])
    rows = re.findall("<tr>.*?</tr>", shown, re.DOTALL)
    cells = [[words(cell) for cell in re.findall("<t[hd].*?</t[hd]>", row)] for row in rows]
    assert cells == [
        ["", "Picture 1", "Picture 2"],
        ["Statement 1", "0.2500 ✓ right", "0.2000"],
        ["Statement 2", "0.3100 ✗ wrong", "0.3000"],
    ]
    assert re.findall('class="text">(.*?)</span>', shown) == ["&lt;b&gt;", "&amp;"]
    assert "&lt;i&gt;eye&lt;/i&gt;" in shown
    assert "&lt;b&gt;: why" in html.matches(["<b>"], ("a", "b"), ["why"])


@pytest.mark.parametrize(
    ("statements", "shown"),
    [
        (("a red car, day", "a red car, night"), ["a red car, <b>day</b>", "a red car, <b>night</b>"]),
        (("day, ball", "day, no ball"), ["day, ball", "day, <b>no</b> ball"]),
        (("one &lt; <i>x</i> a", "one <i>y</i> z a"),
         ["one <b>&amp;lt; &lt;i&gt;x&lt;/i&gt;</b> a", "one <b>&lt;i&gt;y&lt;/i&gt; z</b> a"]),
        (("red", "green"), ["red", "green"]),
        (("the same", "the same"), ["the same", "the same"]),
        ((" ".join("a" * 300 + "b"), " ".join("a" * 300 + "c")), [f"{'a ' * 300}<b>b</b>", f"{'a ' * 300}<b>c</b>"]),
    ],
)  # fmt: skip
def test_words_that_differ_are_bold(statements, shown):
    found = html.matches([], statements, [])
    assert re.findall('class="text">(.*?)</span>', found) == shown


# --------------------------------------------------------------------------------------- an eye that reads no statement


@pytest.fixture
def dense_tower(own, tmp_path) -> Iterator[Path]:
    """The directory of the left one's CLIP, as it was again at the end."""
    tower = Path(own[0].tower_source)
    kept = shutil.copytree(tower, tmp_path / "kept")
    yield tower
    shutil.rmtree(tower, ignore_errors=True)
    shutil.copytree(kept, tower)


def without_text_tower(tower: Path) -> None:
    from llava_clipmoe.files import load_tensors, save_tensors

    state = {name: tensor for name, tensor in load_tensors(tower).items() if not name.startswith("text_model")}
    save_tensors(tower / "model.safetensors", state, {"format": "pt"})


def without_tokenizer(tower: Path) -> None:
    (tower / "vocab.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [(without_tokenizer, "has no tokenizer"), (without_text_tower, "missing: text_model"), (shutil.rmtree, "is not a")],
)
def test_why_an_eye_reads_no_statements_is_told_and_the_other_one_does(own, dense_tower, damage, words):
    damage(dense_tower)
    said, match = Similarity(own).matches(PICTURES, ("red", "green"), explain)
    assert words in said and "not foreseen" not in said
    assert isinstance(match, Match)
    shown = html.matches([llava.name for llava in own], ("red", "green"), [said, match])
    assert shown.count("<table") == 1 and f'<p class="note">{own[0].name}: ' in shown


def test_a_missing_package_is_named(own, dense_tower, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)  # as where it is not installed
    without_tokenizer(dense_tower)
    assert "pip install" in Similarity(own).matches(PICTURES, ("red", "green"), explain)[0]


# -------------------------------------------------------------------------------------------------- a pair's statements


@pytest.mark.parametrize(
    ("names", "statements"),
    [
        (("red apple", "green apple"), ("a picture of red apple", "a picture of green apple")),
        (("Mrs. Claus", "猫"), ("a picture of Mrs. Claus", "a picture of 猫")),
        (("a.png", "b.png"), ("red", "blue")),
        (("red apple", "b.jpeg"), ("red", "blue")),
        (("0012", "0013"), ("red", "blue")),
        (("apple", "apple"), ("red", "blue")),
    ],
)
def test_a_pairs_statements(names, statements):
    question = Question("color", "What colour is it?", ("red", "blue"))
    pair = BlindPair((Path("a"), Path("b")), names, {"dense": 1.0}, "clip-moe", 0.1, True, (question,))
    assert pair.statements == statements
    told = Question("color", "What colour is it?", ("red", "blue"), ("it is red", "it is blue"))
    assert replace(pair, questions=(told, question)).statements == ("it is red", "it is blue")
    unasked = BlindPair((Path("a"), Path("b")), names, {"dense": 1.0}, "clip-moe", 0.1, True)
    assert unasked.statements == (statements if "picture" in statements[0] else ("", ""))
