"""LLaVA's training data: rows that upstream dies of are named before training, broken pictures are skipped in it.

What is refused is compared with what upstream's own data set and preprocess functions do with the same rows.
"""

from __future__ import annotations

import copy
import io
import json
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, PngImagePlugin, features
from test_llava_pretrain_data import stage1
from tiny.llavas import make_data, make_language_model, make_towers, upstream_in_this_process, upstream_is_installed
from transformers import AutoTokenizer, CLIPImageProcessor

from llava_clipmoe.compat import data
from llava_clipmoe.compat.data import BadTrainingData

pytestmark = pytest.mark.skipif(not upstream_is_installed(), reason="upstream LLaVA (llava-torch) is not installed")

STYLES = {"plain": "plain", "v0": "llava_v0", "v1": "v1", "llama_2": "llava_llama_2", "mpt": "mpt"}
"""Our name of each of upstream's preprocess functions -> a --version of train.py that leads to it."""


@pytest.fixture(scope="module")
def upstream():
    with upstream_in_this_process():
        from llava import conversation
        from llava.train import train

        yield SimpleNamespace(conversation=conversation, dataset=train.LazySupervisedDataset)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`llama` (a tokenizer), `data/images/0.png` to `11.png`."""
    folder = tmp_path_factory.mktemp("training-data")
    make_language_model(folder / "llama")
    make_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama", use_fast=False, padding_side="right")
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


@pytest.fixture
def dataset_of(upstream, folder, tokenizer, tmp_path, monkeypatch):
    """dataset_of(rows, version): upstream's data set of these rows, as its train.py makes it."""

    def make(rows, version="v1"):
        monkeypatch.setattr(
            upstream.conversation, "default_conversation", upstream.conversation.conv_templates[version]
        )
        (tmp_path / "data.json").write_text(json.dumps(rows))
        side = {"height": 24, "width": 24}
        args = SimpleNamespace(
            image_folder=str(folder / "data" / "images"), is_multimodal=True, image_aspect_ratio="pad",
            mm_use_im_start_end=False, image_processor=CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=side),
        )  # fmt: skip
        return upstream.dataset(str(tmp_path / "data.json"), tokenizer, args)

    return make


def row(*turns, **more):
    """A row of turns (role, text), with a picture unless `image` is given."""
    return {"id": "x", "image": "0.png", "conversations": [{"from": f, "value": v} for f, v in turns], **more}


def without_picture(*turns):
    made = row(*turns)
    del made["image"]
    return made


Q, T, A = ("human", "<image>\nWhat colour?"), ("human", "What colour?"), ("gpt", "It is red.")
GOOD = row(Q, A)


def turns(value):
    return {"id": "x", "image": "0.png", "conversations": value}


ROWS = {
    # what LLaVA's own files hold
    "question and answer": GOOD,
    "the token last": row(("human", "What colour?\n<image>"), A),
    "many turns": row(Q, A, T, A, T, A),
    "gpt first": row(A, Q, A),
    "text alone": without_picture(T, A, T, A),
    "text alone, gpt first": without_picture(A, T, A),
    "text alone that speaks of the token": without_picture(("human", "What does <image> mean?"), A),
    "an empty answer": row(Q, ("gpt", "")),
    "an empty first question": without_picture(("human", ""), A),
    # ways to have no picture
    "null": row(T, A, image=None),
    "an empty path": row(T, A, image=""),
    "an empty list": row(T, A, image=[]),
    "a list of null": row(T, A, image=[None]),
    "not a number": row(T, A, image=float("nan")),
    "null, with a token": row(Q, A, image=None),
    # other pictures
    "a list of one": row(Q, A, image=["0.png"]),
    "a list of two": row(("human", "<image>\n<image>\nWhat colour?"), A, image=["0.png", "1.png"]),
    "a number": row(Q, A, image=5),
    "an object": row(Q, A, image={"path": "0.png"}),
    "true": row(Q, A, image=True),
    # tokens
    "two tokens in a turn": row(("human", "<image>\n<image>\nWhat colour?"), A),
    "no token": row(T, A),
    "two turns with a token": row(Q, A, Q, A),
    "a token in the answer": row(Q, ("gpt", "It is an <image> tag.")),
    "a token in the answer alone": row(T, ("gpt", "<image> It is red.")),
    "a token in the turn that is left out": row(("gpt", "<image>"), T, A),
    "a token there and in a question": row(("gpt", "<image>"), Q, A),
    # turns
    "no answer": row(Q),
    "no second answer": row(Q, A, T),
    "gpt alone": without_picture(A),
    "gpt alone with a token": row(("gpt", "<image> It is red.")),
    "two questions in a row": row(Q, T, A),
    "two answers in a row": row(Q, A, A),
    "gpt twice first": row(A, A, Q, A),
    "no turns": row(),
    "blank turns": without_picture(("human", ""), ("gpt", " \n")),
    "two turns, gpt first": row(("gpt", "<image>"), T),
    "a turn of a system": row(("system", "Answer."), Q, A),
    "user and assistant": row(("user", "<image>\nWhat colour?"), ("assistant", "It is red.")),
    "other letters": row(("Human", "<image>\nWhat colour?"), ("GPT", "It is red.")),
    "a role that is null": row((None, "<image>\nWhat colour?"), A),
    "role and content": turns(
        [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "Red."}]
    ),
    "no from": turns([{"value": "<image>\nWhat colour?"}, {"value": "It is red."}]),
    "no value": turns([{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt"}]),
    "a value that is null": without_picture(T, ("gpt", None)),
    "a value that is a number": row(Q, ("gpt", 5)),
    "a value that is a list": without_picture(("human", [{"type": "text", "text": "What colour?"}]), A),
    "turns that are texts": turns(["<image>\nWhat colour?", "It is red."]),
    "a text in their place": turns("<image>\nWhat colour?"),
    "JSON in a text": turns(json.dumps(GOOD["conversations"])),
    "an object in their place": turns(GOOD["conversations"][0]),
    "null in their place": turns(None),
    "nothing in their place": {"id": "x", "image": "0.png"},
    "a row that is a list": [GOOD],
    "a row that is a text": "<image>",
    "a row that is null": None,
}
# Upstream writes "unknown" into the prompt for these in its oldest style, or learns the questions too.
WRONG_IN_SILENCE = {("v0", "a turn of a system"), ("v0", "user and assistant"), ("v0", "other letters")}


def fails_upstream(dataset) -> bool:
    """Whether upstream dies of the first row, or its prompt has another number of pictures than the row."""
    given = getattr(type(dataset).__getitem__, "__wrapped__", type(dataset).__getitem__)  # without ours around it
    try:
        assert all(length != 0 for length in dataset.modality_lengths)  # its sampler's, with --group_by_modality_length
        sample = given(dataset, 0)
    except Exception:
        return True
    return int((sample["input_ids"] == -200).sum()) != ("image" in dataset.list_data_dict[0])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ROWS)
def test_exactly_the_rows_that_upstream_cannot_use_are_refused(dataset_of, style, name, capsys):
    dataset = dataset_of([ROWS[name]], STYLES[style])
    original = copy.deepcopy(dataset.list_data_dict)
    assert data._style() == style
    try:
        data.check_rows(dataset.list_data_dict, style)  # which may write "image": null otherwise
        refused = False
    except BadTrainingData as error:
        assert (
            str(error).startswith("1 of 1 rows cannot be trained on (counted from 0): row 0 ") and len(str(error)) < 300
        )
        refused, dataset.list_data_dict = True, original
    assert refused == (fails_upstream(dataset) or (style, name) in WRONG_IN_SILENCE)


def test_the_version_of_train_py_is_what_upstream_makes_of_it(upstream, dataset_of):
    """Of --version v0 and unknown ones too: there upstream leaves or puts vicuna's v1."""
    templates = upstream.conversation.conv_templates
    found = {}
    for version in templates:
        dataset_of([GOOD], version)
        found[version] = data._style()
    assert {found[v] for v in ("v1", "vicuna_v1", "llava_v1", "v1_mmtag")} == {"v1"}
    assert {found[v] for v in ("default", "v0", "llava_v0", "v0_mmtag")} == {"v0"}
    assert {found[v] for v in ("plain", "v0_plain")} == {"plain"}
    assert {found[v] for v in ("llama_2", "llava_llama_2", "mistral_instruct")} == {"llama_2"}
    assert {found[v] for v in ("mpt", "chatml_direct", "mistral_direct")} == {"mpt"}
    assert len(found) == len(templates)


def test_rows_without_answer_teach_nothing_upstream_as_is_said(dataset_of, capsys):
    for version in ("v1", "mpt", "llava_llama_2"):
        dataset = dataset_of([GOOD, row(Q), row(Q, A, T), without_picture(A)], version)
        data.guard(dataset)
        assert "rows that do not end with an answer, which LLaVA's trainer ignores: 3, first row 1 (id x)." in (
            capsys.readouterr().err
        )
        learnt = [bool((dataset[i]["labels"] != -100).any()) for i in range(4)]
        assert learnt[1:] == [False] * 3 and (learnt[0] or version != "v1"), version  # the tokenizer is vicuna's


def test_a_token_without_a_picture_is_said(dataset_of, capsys):
    dataset = dataset_of([GOOD, ROWS["null, with a token"], ROWS["text alone that speaks of the token"]])
    data.guard(dataset)
    assert "rows without a picture but with <image>, which is read as plain words there: 2, first row 1 (id x)." in (
        capsys.readouterr().err
    )
    dataset = dataset_of([GOOD, ROWS["text alone"], ROWS["gpt first"]])
    data.guard(dataset)
    assert capsys.readouterr().err == ""


def test_rows_are_named_with_their_fault():
    rows = [copy.deepcopy(GOOD) for _ in range(9)]
    for number, name in ((2, "two turns with a token"), (4, "a list of two"), (5, "role and content"), (8, "no token")):
        rows[number] = {**ROWS[name], "id": f"r{number}"}
    del rows[4]["id"]
    with pytest.raises(BadTrainingData) as error:
        data.check_rows(rows, "v1")
    said = str(error.value)
    assert said.startswith("4 of 9 rows cannot be trained on (counted from 0): row 2 (id r2) has one picture, but <im")
    assert "row 4 has 2 pictures, and LLaVA reads one a row; row 5 (id r5) has a turn that is not" in said
    assert "'role': 'user'" in said and "r8" not in said and "; ... . Mend" not in said and said.count(";") == 3
    for nothing in ([], {"data": rows}, "rows", None):
        with pytest.raises(BadTrainingData, match="must be a JSON list of at least one row, this is"):
            data.check_rows(nothing, "v1")


def test_all_of_llavas_665k_rows_are_looked_at_within_seconds():
    """Each row is an object of its own, as in a file; a tenth of the length, a tenth of the time."""
    text = " ".join(["a square in one plain colour"] * 4)
    rows = []
    for i in range(66_500):
        count = 1 + i % 5
        made = [(("human", f"{text} {i}"), ("gpt", f"{text} {i}"))[j % 2] for j in range(2 * count)]
        rows.append(without_picture(*made) if i % 16 == 0 else row(("human", f"<image>\n{i}"), *made[1:]))
    taken = []
    for _ in range(3):
        start = time.process_time()
        data.check_rows(rows, "v1")
        taken.append(time.process_time() - start)
    assert min(taken) < 0.5
    rows[66_499] = ROWS["no token"]
    with pytest.raises(
        BadTrainingData, match=r"1 of 66500 rows .*row 66499 \(id x\) has one picture, but <image> in none of"
    ):
        data.check_rows(rows, "v1")


def test_pictures_without_tower_or_folder_and_what_is_no_path_at_all(dataset_of):
    for setting, flag in (("image_processor", "--vision_tower"), ("image_folder", "--image_folder")):
        dataset = dataset_of([GOOD])
        setattr(dataset.data_args, setting, None)
        with pytest.raises(BadTrainingData, match=f"the data has pictures, but {flag} is not given"):
            data.guard(dataset)
    encoded = "iVBORw0KGgo" * 1000  # the picture itself: longer than a path may be
    with pytest.raises(BadTrainingData, match="1 of 1 pictures that were looked for are not in") as error:
        data.guard(dataset_of([row(Q, A, image=encoded)]))
    assert len(str(error.value)) < 600


# ------------------------------------------------------------------------------------------------------ broken pictures


def saved(kind: str, **options) -> bytearray:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (220, 30, 30)).save(file, kind, **options)
    return bytearray(file.getvalue())


def png_with_much_text() -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    return bytes(saved("PNG", pnginfo=text))


def gif_with_a_tile_outside() -> bytes:
    """A screen of 40 x 40 and a frame that is 48 wide and 0 high."""
    screen = b"GIF87a" + bytes([40, 0, 40, 0, 0x81, 0, 0]) + bytes(12)
    return screen + b"," + bytes([0, 0, 0, 0, 48, 0, 0, 0, 0]) + bytes(200)


def png_with_a_short_header() -> bytes:
    content = saved("PNG")
    content[11] = 6  # of 13 bytes
    return bytes(content)


def avif_without_colours() -> bytes:
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    content = saved("AVIF")
    content[-30:] = bytes(30)
    return bytes(content)


def bmp_of_a_great_size() -> bytes:
    content = saved("BMP")
    content[20] = 174
    return bytes(content)


BROKEN = {
    "png-text": (png_with_much_text, ValueError),
    "gif-tile": (gif_with_a_tile_outside, ValueError),
    "png-header": (png_with_a_short_header, ValueError),
    "avif": (avif_without_colours, RuntimeError),
    "bomb": (bmp_of_a_great_size, Image.DecompressionBombError),
    "cut": (lambda: bytes(saved("JPEG")[:400]), OSError),
    "no picture": (lambda: b"no picture", Image.UnidentifiedImageError),
}


@pytest.fixture
def rows_of(folder, tmp_path):
    """rows_of(content): three rows, whose second has a picture of these bytes."""

    def make(content: bytes) -> list[dict]:
        path = tmp_path / "broken.png"
        path.write_bytes(content)
        return [dict(GOOD), row(Q, ("gpt", "broken"), id="b", image=str(path)), dict(GOOD, id="c", image="1.png")]

    return make


@pytest.mark.parametrize("kind", BROKEN)
def test_whatever_pillow_raises_the_picture_is_skipped(dataset_of, rows_of, tmp_path, capsys, kind):
    make, error = BROKEN[kind]
    dataset = data.guard(dataset_of(rows_of(make())))
    with pytest.raises(error):
        Image.open(tmp_path / "broken.png").convert("RGB")
    for _ in range(2):
        assert torch.equal(dataset[1]["input_ids"], dataset[2]["input_ids"])
    said = capsys.readouterr().err
    assert said.count("llava-clipmoe: skipped row b:") == 1 and "broken.png cannot be read (" in said


def test_a_warning_that_is_an_error_is_the_pictures_too(dataset_of, rows_of, capsys, monkeypatch):
    dataset = data.guard(dataset_of(rows_of(bytes(saved("PNG")))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # between this and twice as many Pillow only warns
    monkeypatch.setattr(dataset, "list_data_dict", [*dataset.list_data_dict[1:2], ROWS["text alone"]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset[0]
    assert "skipped row b" in capsys.readouterr().err


class Processor(CLIPImageProcessor):
    """Raises what it is told to, on its first calls."""

    def preprocess(self, *args, **kwargs):
        if self.errors:
            raise self.errors.pop()
        return super().preprocess(*args, **kwargs)


def with_errors(dataset, *errors):
    side = {"height": 24, "width": 24}
    dataset.data_args.image_processor = Processor(size={"shortest_edge": 24}, crop_size=side)
    dataset.data_args.image_processor.errors = list(errors)
    return data.guard(dataset)


@pytest.mark.parametrize(
    "error",
    [ValueError("mean must have 1 elements"), RuntimeError("CUDA out of memory"), KeyError("x"), SyntaxError("mine"),
     MemoryError(), OSError("no space left")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_an_error_of_the_program_is_not_a_broken_picture(dataset_of, capsys, error):
    dataset = with_errors(dataset_of([GOOD, dict(GOOD, id="y")]), *[error] * 9)
    with pytest.raises(type(error)) as raised:
        dataset[1]
    assert raised.value is error and not hasattr(dataset, "broken_pictures")
    assert capsys.readouterr().err == f"llava-clipmoe: row 1 (id y) could not be prepared ({type(error).__name__}).\n"


def test_a_hiccup_of_the_disk_costs_nothing(dataset_of, capsys):
    dataset = with_errors(dataset_of([GOOD]), OSError("stale file handle"))
    assert dataset[0]["image"].shape == (3, 24, 24) and capsys.readouterr().err == ""


def test_conversations_that_break_later_are_not_a_broken_picture(dataset_of, capsys):
    dataset = data.guard(dataset_of([GOOD, ROWS["text alone"]]))
    for broken in dataset.list_data_dict:
        broken["conversations"] = [{"from": "user", "value": "<image>"}]
    for index in range(2):
        with pytest.raises(KeyError, match="user"):
            dataset[index]
    assert "cannot be read" not in capsys.readouterr().err


def test_too_little_memory_for_a_picture_is_not_a_broken_one(dataset_of, rows_of, monkeypatch, capsys):
    dataset = data.guard(dataset_of(rows_of(bytes(saved("PNG")))))

    def too_little(self, *args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", too_little)
    with pytest.raises(MemoryError):
        dataset[1]
    assert "cannot be read" not in capsys.readouterr().err


def test_a_picture_that_is_gone_is_missing_not_broken(dataset_of, rows_of, tmp_path):
    dataset = data.guard(dataset_of(rows_of(bytes(saved("PNG")))))
    (tmp_path / "broken.png").unlink()
    with pytest.raises(BadTrainingData, match=r"broken\.png\. Check --image_folder"):
        dataset[1]


# --------------------------------------------------------------------------------------------------- upstream's trainer


@pytest.fixture
def run(tmp_path):
    """run(change, **flags): a run of `llava.train.train` on 12 rows, which `change` alters before."""
    make_language_model(tmp_path / "llama")
    make_towers(tmp_path)
    file = make_data(tmp_path / "data")

    def train(change, **flags):
        rows = json.loads(file.read_text())
        change(rows, tmp_path / "data" / "images")
        file.write_text(json.dumps(rows))
        return stage1(tmp_path, file, tmp_path / "data" / "images", max_steps=3, per_device_train_batch_size=4, **flags)

    return train


def test_a_run_goes_past_broken_pictures_and_rows_without_one(run, tmp_path):
    def change(rows, images):
        (images / "0.png").write_bytes(png_with_much_text())
        (images / "1.png").write_bytes(gif_with_a_tile_outside())
        rows[2] = {**ROWS["null"], "id": "text"}
        rows[3]["image"] = ["3.png"]

    done = run(change, version="v1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "skipped row 0: 0.png cannot be read (Decompressed data too large" in done.stderr
    assert "skipped row 1: 1.png cannot be read (tile cannot extend outside image" in done.stderr
    assert (tmp_path / "llava-out" / "mm_projector.bin").exists()


def test_a_run_with_unusable_rows_never_starts(run, tmp_path):
    def change(rows, images):
        rows[5]["conversations"][0]["value"] = "What colour is the square?"
        rows[7]["image"] = ["7.png", "8.png"]

    done = run(change)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "error: 2 of 12 rows cannot be trained on (counted from 0): row 5 (id 5) has no <image> in its" in done.stderr
    )
    assert "row 7 (id 7) has 2 pictures, and LLaVA reads one a row. Mend" in done.stderr
    assert not (tmp_path / "llava-out" / "mm_projector.bin").exists()
