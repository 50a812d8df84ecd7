"""LLaVA-1.6's tiles (`--image_aspect_ratio anyres`): through upstream's trainer, its loader, both runners and the demo.

The trainings of one environment share a process (tiny/tile_trainings.py), which says what it saw. The tower reads 24 px
in 3x3 patches, so a picture of 2x2 tiles is 9 + 6 * (6 + 1) tokens at most.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import REPOSITORY
from PIL import Image
from tiny.language_models import make_qwen_2
from tiny.llavas import make_llava, upstream_in_this_process, upstream_is_installed
from tiny.tower_tasks import LORA, arguments, link_material, make_material, train

from llava_clipmoe import run
from llava_clipmoe.compat.anyres import grid_for, most_tokens, parse_grid, prepare
from llava_clipmoe.compat.data import guard
from llava_clipmoe.compat.trainer import rename_flags
from llava_clipmoe.files import load_tensors
from llava_clipmoe.vision_tower import CLIPMoEVisionTowerS2

PINNED = os.environ.get("LLAVA_CLIPMOE_PINNED_PYTHON")
PROGRAM = str(REPOSITORY / "tests" / "tiny" / "tile_trainings.py")
GRID = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
SIZES = [(22, 46), (46, 22), (50, 44), (100, 20), (20, 100)]
"""Of pictures, one for each shape of the grid."""
TILES = ["--image_aspect_ratio", "anyres", "--mm_patch_merge_type", "spatial_unpad"]
NEWLINE = "image_newline"
pytestmark = [
    pytest.mark.skipif(not upstream_is_installed(), reason="upstream LLaVA (llava-torch) is not installed here"),
    pytest.mark.xdist_group("anyres"),
    pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """As `make_material`, with noise in many shapes as pictures; `data/pictures.json` has the rows with a picture,
    `vit` is a tower of upstream's, `llava-flat` a LLaVA without tiles, `qwen2.5` another language model."""
    folder = make_material(tmp_path_factory.mktemp("material"))
    for number in range(12):
        picture = Image.effect_noise(SIZES[number % len(SIZES)], 60 + 5 * number).convert("RGB")
        picture.save(folder / "data" / "images" / f"{number}.png")
    rows = json.loads((folder / "data" / "data.json").read_text())
    (folder / "data" / "pictures.json").write_text(json.dumps([row for row in rows if "image" in row]))
    make_upstreams_tower(folder / "vit")
    make_qwen_2(folder / "qwen2.5")
    make_llava(folder / "llava-flat", folder / "clip-moe", folder / "llama")
    return folder


def make_upstreams_tower(folder: Path) -> None:
    """A CLIP of transformers', which upstream loads with its own CLIPVisionTower: 24 px, 9 patches."""
    shape = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.CLIPConfig(
        text_config={**shape, "vocab_size": 9}, vision_config={**shape, "image_size": 24, "patch_size": 8}
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    sides = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    transformers.CLIPImageProcessor(**sides).save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------- the trainings


@pytest.fixture(
    scope="module",
    params=[
        "current",
        pytest.param("pinned", marks=pytest.mark.skipif(not PINNED, reason="LLAVA_CLIPMOE_PINNED_PYTHON is not set")),
    ],
)
def trained(request, material, tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """Both stages, resumed and begun from other LLaVAs: the folder of their outputs, and what was seen of each."""
    folder = link_material(material, tmp_path_factory.mktemp(request.param))
    for name in ("llava-flat", "vit", "qwen2.5"):
        (folder / name).symlink_to(material / name)
    python = {"current": sys.executable, "pinned": PINNED}[request.param]
    return folder, train([python], material, tasks_in(folder, material), folder, PROGRAM)


def tasks_in(folder: Path, material: Path) -> list[dict]:
    first, projector = first_stage(folder), projector_of(folder)
    tiles = {"model_name_or_path": folder / "llava-tiles"}
    return [
        task(folder, "llava-pretrain", base="llama", **first),
        task(folder, "llava-pretrain-again", base="llama", start="llava-pretrain", **first),
        task(folder, "llava-tiles", what="routers", **projector),
        task(folder, "llava-tiles-again", what="routers", start="llava-tiles", **projector),
        task(folder, "llava-tiles-lora", base="llama", **projector, **LORA),
        task(folder, "llava-tiles-lora-again", base="llama", start="llava-tiles-lora", **projector, **LORA),
        task(folder, "llava-from-flat", model_name_or_path=folder / "llava-flat", vision_tower=material / "clip-moe"),
        task(folder, "llava-onward-lora", base="llava-tiles", **tiles, **LORA),
        task(folder, "llava-to-flat", tiles=[], **tiles),
        task(folder, "llava-plain-tiles", tiles=[*TILES[:2], "--image_grid_pinpoints", "[(24, 48), (48, 24)]"]),
        task(folder, "llava-upstreams-tower", vision_tower=folder / "vit"),
        task(folder, "llava-qwen", model_name_or_path=folder / "qwen2.5", version="qwen_2"),
    ]


def first_stage(folder: Path) -> dict[str, object]:
    return {"version": "plain", "tune_mm_mlp_adapter": True, "data_path": folder / "data" / "pictures.json"}


def projector_of(folder: Path) -> dict[str, object]:
    return {"pretrain_mm_mlp_adapter": folder / "llava-pretrain" / "mm_projector.bin"}


def task(
    folder: Path,
    name: str,
    base: str | None = None,
    start: str | None = None,
    what: str | None = None,
    tiles: list[str] = TILES,
    **changed: object,
) -> dict:
    """Tiles follow `--image_aspect_ratio pad`, as they do in a script's command."""
    words = [*arguments(folder, name, what, **changed), *tiles]
    found = {"name": name, "arguments": words, "output": str(folder / name), "base": base and str(folder / base)}
    return found | ({"from": str(folder / start)} if start else {})


WITH_NEWLINE = (
    "llava-pretrain", "llava-tiles", "llava-tiles-lora", "llava-from-flat", "llava-onward-lora",
    "llava-upstreams-tower", "llava-qwen",
)  # fmt: skip


@pytest.mark.parametrize("name", [*WITH_NEWLINE, "llava-to-flat", "llava-plain-tiles"])
def test_the_loaded_model_is_the_trained_one_and_reads_pictures_as_in_training(trained, name):
    folder, seen = trained[0], trained[1][name]
    near = 1e-2 if "upstreams" in name else 1e-5  # upstream trains with its own tower in float16
    assert seen["size"] > 1 and seen["off"] <= near * seen["size"], seen
    assert seen["same_pictures"] and all(seen["same_pictures"])
    config = json.loads((folder / name / "config.json").read_text())
    asked = ("image_aspect_ratio", "mm_patch_merge_type", "image_grid_pinpoints")
    expected = {
        "llava-to-flat": ("pad", "flat", GRID),  # the grid of the LLaVA that it began as; nobody asks for it
        "llava-plain-tiles": ("anyres", "flat", GRID[:2]),
    }
    assert tuple(config[field] for field in asked) == expected.get(name, ("anyres", "spatial_unpad", GRID))
    assert (NEWLINE in " ".join(seen["learns"])) == (name in WITH_NEWLINE)


@pytest.mark.parametrize("name", WITH_NEWLINE)
def test_the_newline_learns_and_is_kept(trained, name):
    seen = trained[1][name]
    assert any(NEWLINE in moved for moved in seen["moved"])
    assert any("mm_projector" in moved for moved in seen["moved"])
    assert seen["off_without_newline"] > 1e-3 * seen["size"]


def test_stage_1_trains_nothing_but_projector_and_newline(trained):
    learns = trained[1]["llava-pretrain"]["learns"]
    assert all("mm_projector" in name or name.endswith(NEWLINE) for name in learns) and len(learns) == 5
    kept = torch.load(trained[0] / "llava-pretrain" / "mm_projector.bin", weights_only=True)
    assert set(kept) == set(learns)


def newline_in(path: Path) -> torch.Tensor:
    """What a training left of the newline, in whatever file."""
    for name in ("mm_projector.bin", "non_lora_trainables.bin"):
        if (path / name).is_file():
            kept = torch.load(path / name, weights_only=True)
            return next(tensor for name, tensor in kept.items() if name.endswith(NEWLINE))
    return load_tensors(path, keep=lambda name: name == f"model.{NEWLINE}")[f"model.{NEWLINE}"]


@pytest.mark.parametrize("name", ["llava-tiles", "llava-tiles-lora"])
def test_stage_2_goes_on_with_the_newline_of_stage_1(trained, name):
    """Whose values move by the learning rate a step (Adam), three steps; drawn anew they would be far off."""
    before, after = newline_in(trained[0] / "llava-pretrain"), newline_in(trained[0] / name)
    assert 0 < (before - after).abs().max() < 0.01 < before.std()


@pytest.mark.parametrize("name", ["llava-pretrain", "llava-tiles", "llava-tiles-lora"])
def test_an_interrupted_training_ends_as_the_one_that_went_through(trained, name):
    straight, again = (newline_in(trained[0] / found) for found in (name, f"{name}-again"))
    torch.testing.assert_close(again, straight)


def test_a_batch_has_tiles_and_sizes_of_every_row(trained):
    """The whole picture first. A row without a picture is one tile of zeros."""
    shapes, sizes = (trained[1]["llava-tiles"]["batch"][key] for key in ("shapes", "sizes"))
    tiles = {(22, 46): 3, (46, 22): 3, (50, 44): 5, (100, 20): 4, (20, 100): 4, (24, 24): 1}
    assert shapes == [[tiles[tuple(size)], 3, 24, 24] for size in sizes] and len(sizes) == 4
    assert trained[1]["llava-to-flat"]["batch"] == {"shape": [4, 3, 24, 24]}


def test_the_balance_counts_the_tiles_of_pictures_alone(trained):
    """Of a batch that has a row without a picture, too: 0.01 (the paper's alpha) times eq. 6-9 over all other tiles."""
    seen = trained[1]["llava-tiles"]
    assert seen["balance_expected"] > 0.01
    assert seen["balance_added"] == pytest.approx(seen["balance_expected"], rel=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_under_deepspeed_the_newline_goes_through_both_stages(material, tmp_path):
    """ZeRO-2 in two processes, a row each, in bf16: so that in one step a process has a row without a picture alone."""
    engine = {"deepspeed": REPOSITORY / "train_llava" / "zero2.json", "bf16": True, "per_device_train_batch_size": 1}
    folder = link_material(material, tmp_path)
    tasks = [
        task(folder, "llava-pretrain", **first_stage(folder), **engine),
        task(folder, "llava-tiles", **projector_of(folder), **engine),
    ]
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = str(opened.getsockname()[1])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    seen = train(launcher, material, tasks, folder, PROGRAM, DS_ACCELERATOR="cpu")
    for name in ("llava-pretrain", "llava-tiles"):
        assert any(NEWLINE in moved for moved in seen[name]["moved"])
    before, after = newline_in(folder / "llava-pretrain"), newline_in(folder / "llava-tiles")
    assert 0 < (before - after).abs().max() < 0.02 < before.std()


# --------------------------------------------------------------------------------------------------------------- flags


@pytest.fixture(scope="module")
def upstream():
    with upstream_in_this_process(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def parsed(words: list[str]) -> tuple:
    from llava.train.train import DataArguments, ModelArguments, TrainingArguments

    parser = transformers.HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    return parser.parse_args_into_dataclasses(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image_aspect_ratio", "anyres_max_9"], "is 'anyres_max_9'; it may be square, pad or anyres"),
        ([*TILES[:2], "--mm_patch_merge_type", "unpad"], "is 'unpad'; it may be flat, spatial or spatial_unpad"),
        (TILES[2:], "--mm_patch_merge_type spatial_unpad needs --image_aspect_ratio anyres"),
        (["--image_grid_pinpoints", "[(24, 48)]"], "needs --image_aspect_ratio anyres"),
        ([*TILES, "--image_grid_pinpoints", "[(336, 672)]"], None),
        ([*TILES, "--image_grid_pinpoints", "[[24, 50]]"], "whose side is 24 px"),
        ([*TILES, "--image_grid_pinpoints", "__import__('os').getcwd()"], "must be a list of"),
        ([*TILES, "--image_grid_pinpoints", "[24, 48]"], "must be a list of"),
        ([*TILES, "--model_max_length", "51"], "up to 51 tokens, and --model_max_length is 51"),
        ([*TILES, "--model_max_length", "52"], None),
        ([*TILES, "--mm_vision_select_feature", "cls_patch"], "--mm_vision_select_feature must be patch"),
        ([*TILES, "--vision_tower", "clipmoe-s2"], "S2 towers cut it already"),
    ],
)
def test_tiles_that_cannot_be_are_refused_before_anything_is_loaded(
    upstream, material, tmp_path, monkeypatch, words, message
):
    monkeypatch.setenv("LLAVA_CLIPMOE_CONFIG_DIR", str(tmp_path))
    entries = {"clipmoe-336": {}, "clipmoe-s2": {"s2": True}}
    towers = {name: {"source": str(material / "clip-moe"), **more} for name, more in entries.items()}
    (tmp_path / "towers.json").write_text(json.dumps(towers))
    if "[(336, 672)]" in words:  # 14 and 28 tiles: 9 + (42 + 1) * 84
        words = [*words, "--model_max_length", "4096"]
    words = [*arguments(material, str(tmp_path), None), *words]
    if message is None:
        assert parsed(words)[1].image_aspect_ratio == "anyres"
    else:
        with pytest.raises(ValueError, match=message):
            parsed(words)


def test_the_default_grid_is_llava_16s():
    text = "[(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]"
    assert grid_for(None, 336) == grid_for(text, 336) == parse_grid(text.replace("(", "[").replace(")", "]"))
    assert grid_for(None, 24) == GRID


def test_a_picture_takes_at_most_the_tokens_that_are_said(upstream):
    """2,928 at 336 px: 576 of the whole picture, and 48 rows of 48 patches and a newline."""
    vit = transformers.CLIPVisionConfig(image_size=336, patch_size=14)
    assert [most_tokens([shape], vit, "spatial_unpad") - 576 for shape in grid_for(None, 336)] == [
        1200, 1176, 2352, 1752, 1800,
    ]  # fmt: skip
    assert most_tokens(grid_for(None, 336), vit, "spatial_unpad") == 2928
    assert most_tokens(grid_for(None, 336), vit, "spatial") == most_tokens(grid_for(None, 336), vit, "flat") == 2880


def test_in_a_scripts_command_the_later_flag_wins(upstream, material, tmp_path, monkeypatch):
    """The scripts say `pad`; what follows their name comes behind it."""
    monkeypatch.setenv("LLAVA_CLIPMOE_TOWERS", f"clipmoe-336={material / 'clip-moe'}")
    script = ["bash", str(REPOSITORY / "train_llava" / "finetune.sh"), "--dry-run", *TILES, "--model_max_length", "99"]
    here = {"PYTHON": sys.executable, "DEVICE": "cpu", "OUTPUT": "llava-x", "PYTHONPATH": str(REPOSITORY)}
    environment = {**os.environ, **here}
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    words = shlex.split(done.stdout.replace("\\\n", ""))
    words = words[words.index("llava.train.train") + 1 :]
    assert words.count("--image_aspect_ratio") == 2, done.stderr
    rename_flags(words, transformers.TrainingArguments)
    model_args, data_args, training_args = parsed(words)
    assert (data_args.image_aspect_ratio, model_args.mm_patch_merge_type) == ("anyres", "spatial_unpad")
    assert training_args.model_max_length == 99


# -------------------------------------------------------------------------------------- the data set, and evaluation


@pytest.fixture(scope="module")
def tiled(upstream, material) -> dict[str, Path]:
    """LLaVAs with random weights that read tiles: whole, and two projectors as stage 1 leaves them."""
    settings = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": GRID}
    make = [("llava-v1-a", 1, True), ("llava-v1-b", 2, True), ("llava-v1-c", 3, False), ("llava-v1-d", 4, False)]
    tower, llm = material / "clip-moe", material / "llama"
    return {name: make_llava(material / name, tower, llm, seed, whole=all_, **settings) for name, seed, all_ in make}


@pytest.fixture
def given(tiled, material, tmp_path, monkeypatch) -> dict:
    """What upstream's train.py hands to its trainer, for pictures of which the second is broken."""
    from llava.model.builder import load_pretrained_model
    from llava.train.train import make_supervised_data_module

    monkeypatch.setenv("LLAVA_CLIPMOE_TOWERS", f"clipmoe-336={material / 'clip-moe'}")
    folder = shutil.copytree(material / "data" / "images", tmp_path / "images")
    (folder / "1.png").write_bytes(b"no picture")
    words = arguments(material, str(tmp_path), None, image_folder=folder)
    _, data_args, training_args = parsed([*words, *TILES])
    tokenizer, model, processor, _ = load_pretrained_model(str(tiled["llava-v1-a"]), None, "llava-v1-a", device="cpu")
    tokenizer.pad_token, tokenizer.model_max_length = tokenizer.unk_token, 256
    data_args.image_processor, data_args.is_multimodal, data_args.mm_use_im_start_end = processor, True, False
    module = make_supervised_data_module(tokenizer=tokenizer, data_args=data_args)
    return {"model": model, "args": training_args, **module}


def test_a_broken_picture_is_skipped_with_its_size(given, capsys):
    guard(given["train_dataset"])
    lengths = given["train_dataset"].modality_lengths
    prepare(given)
    rows = given["train_dataset"]
    assert torch.equal(rows[1]["image"], rows[2]["image"]) and rows[1]["image_size"] == SIZES[2]
    assert "skipped row 1: 1.png cannot be read" in capsys.readouterr().err
    assert rows.modality_lengths == lengths  # by which rows are grouped: words, negative without a picture
    batch = given["data_collator"]([rows[0], rows[11]])
    assert batch["image_sizes"] == [SIZES[0], (24, 24)] and not batch["images"][1].any()
    assert [image.shape[0] for image in batch["images"]] == [3, 1]
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape


def test_the_launcher_runs_stage_1_with_tiles(upstream, material, tmp_path, monkeypatch):
    """Where upstream's train.py is the main module."""
    monkeypatch.setenv("LLAVA_CLIPMOE_TOWERS", f"clipmoe-336={material / 'clip-moe'}")
    monkeypatch.setenv("LLAVA_CLIPMOE_HOOK", "1")
    monkeypatch.setattr(sys, "argv", ["run"])
    words = arguments(
        material, str(tmp_path / "llava-x"), None, max_steps=1, dataloader_num_workers=1, **first_stage(material)
    )
    assert run.main(["llava.train.train", *words, *TILES]) == 0
    kept = torch.load(tmp_path / "llava-x" / "mm_projector.bin", weights_only=True)
    assert kept[f"model.{NEWLINE}"].shape == (32,) and len(kept) == 5
    config = json.loads((tmp_path / "llava-x" / "config.json").read_text())
    assert config["image_grid_pinpoints"] == GRID


def test_what_would_tear_tiles_apart_is_refused(given):
    given["args"]._n_gpu = 2
    with pytest.raises(ValueError, match="use torchrun"):
        prepare(given)
    args = SimpleNamespace(mm_vision_select_layer=-2, s2_scales=[24, 48])
    directory = given["model"].get_vision_tower().vision_tower_name
    given["model"].get_model().vision_tower = CLIPMoEVisionTowerS2(directory, args)
    with pytest.raises(ValueError, match="S2 towers cut it already"):
        prepare(given)


def test_a_fork_that_cuts_tiles_itself_is_left_alone(given):
    """Its flag of the same name is its own."""
    given["train_dataset"].data_args = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=GRID)
    before, fields = dict(given), {**vars(given["train_dataset"].data_args)}
    prepare(given)
    assert given == before and vars(given["train_dataset"].data_args) == fields


def test_the_newline_has_the_dtype_of_the_texts_embeddings(given):
    """Upstream makes it in the model's, which QLoRA's preparation has turned to fp32, and moves the projector alone."""
    given["model"].get_model().embed_tokens.bfloat16()
    prepare(given)
    assert given["model"].get_model().image_newline.dtype == torch.bfloat16


def test_no_picture_takes_more_tokens_than_is_said(given):
    """One of a shape of the grid, which has no padding, takes just as many."""
    model, rows = given["model"], []
    for size in map(tuple, GRID):
        images = [torch.zeros(1 + size[0] * size[1] // 24**2, 3, 24, 24)]
        ids = torch.tensor([[1, -200, 2]])
        embeds = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images, [size])[4]
        rows.append(embeds.shape[1] - 2)
    assert rows == [most_tokens([size], model.get_vision_tower().config, "spatial_unpad") for size in GRID]


def test_batched_answers_equal_upstreams_one_by_one(tiled, material, tmp_path, monkeypatch):
    """Pictures of every shape in one batch, and questions of different lengths."""
    monkeypatch.setenv("LLAVA_CLIPMOE_HOOK", "1")
    rows = [{"question_id": i, "image": f"{i}.png", "text": "What colour? " * (1 + i % 3)} for i in range(10)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    texts = []
    for module, more in (
        ("llava.eval.model_vqa_loader", ["--temperature", "0", "--max_new_tokens", "12"]),
        ("train_llava.eval.batched", ["--batch-size", "4", "--max-new-tokens", "12", "--workers", "0"]),
    ):
        monkeypatch.setattr(sys, "argv", [])
        words = ["--model-path", str(tiled["llava-v1-a"]), "--image-folder", str(material / "data" / "images")]
        words += ["--question-file", str(tmp_path / "questions.jsonl"), "--answers-file", str(tmp_path / module)]
        try:
            assert not run.main([module, *words, "--conv-mode", "vicuna_v1", *more])
        except SystemExit as end:
            assert not end.code
        texts.append([json.loads(line)["text"] for line in (tmp_path / module).read_text().splitlines()])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 7, "a model that answers everything alike proves nothing"


@pytest.mark.parametrize("pair", ["ab", "cd"])
def test_the_demo_answers_as_upstream_does(tiled, material, pair):
    """Two LLaVAs of their own (ab), and two projectors, each with its newline, before one language model (cd)."""
    pytest.importorskip("gradio", reason="the demo's packages are not installed")
    from llava.model.builder import load_pretrained_model

    from demo.llava.load import load_llavas
    from demo.llava.settings import Generation, Models

    base = material / "llama" if pair == "cd" else None
    directories = [tiled[f"llava-v1-{letter}"] for letter in pair]
    llavas = load_llavas(Models(*directories, base, device="cpu"), say=lambda line: None)
    pictures = [Image.open(material / "data" / "images" / f"{i}.png").convert("RGB") for i in range(3)]
    for llava, directory in zip(llavas, directories, strict=True):
        tokenizer, model, *_ = load_pretrained_model(str(directory), base and str(base), directory.name, device="cpu")
        for picture in pictures:
            inputs = llava.inputs(picture, "What colour?")
            with torch.inference_mode():
                found = model.generate(**inputs, do_sample=False, max_new_tokens=12, use_cache=True)
            expected = tokenizer.decode(found[0], skip_special_tokens=True).strip()
            assert list(llava.stream(picture, "What colour?", Generation(max_new_tokens=12)))[-1] == expected
