"""A model directory: what transformers wrote is read, what is written here transformers reads, in both versions."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from llava_clipmoe import model_directory
from llava_clipmoe.bundle import OPENAI_MEAN, OPENAI_STD, ClipBundle
from llava_clipmoe.files import SaveError, UnsafeFile, load_tensors, save_tensors
from llava_clipmoe.load import load_bundle
from llava_clipmoe.model_card import public_name
from llava_clipmoe.model_directory import save_bundle
from llava_clipmoe.modeling_clipmoe import CLIPMoEModel
from llava_clipmoe.tokenizer import END, START, load_tokenizer, open_clip_tokenizer, save_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def write_tiny_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer of 99 tokens: letters and digits, inside and at a word's end, some merges, start and end."""
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    merges = ["c a", "ca t</w>", "t h", "th e</w>"]
    tokens = [*letters, *(f"{x}</w>" for x in letters), *(m.replace(" ", "") for m in merges)]
    tokens += [f"unused{i}" for i in range(97 - len(tokens))] + [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))


@pytest.fixture
def tiny_tokenizer(tmp_path):
    write_tiny_tokenizer(tmp_path / "tokenizer")
    return load_tokenizer(tmp_path / "tokenizer", 16)


@pytest.fixture
def dense(tiny_dense, tiny_tokenizer):
    return ClipBundle(tiny_dense, tiny_tokenizer, MEAN, STD, "tiny")


@pytest.fixture
def moe(tiny_moe, tiny_tokenizer):
    return ClipBundle(tiny_moe, tiny_tokenizer, MEAN, STD, "tiny")


def features(model: torch.nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Projected image and text embeddings, of our model or transformers' (whose own method changed with version 5)."""
    with torch.no_grad():
        image = model.visual_projection(model.vision_model(pixel_values=batch["pixel_values"]).pooler_output)
        text = model.text_projection(model.text_model(input_ids=batch["input_ids"]).pooler_output)
    return image, text


def assert_same(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        assert b.std() > 0.01  # otherwise anything would be equal
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def differ(ours, theirs) -> bool:
    return all((a - b).abs().max() > 1e-3 for a, b in zip(ours, theirs, strict=True))


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def transformers_clip(folder: Path, hidden_act: str, eos: int) -> transformers.CLIPModel:
    """A random CLIP saved by transformers itself, with a tokenizer beside it."""
    shared = dict(intermediate_size=64, hidden_act=hidden_act, num_attention_heads=2)
    config = transformers.CLIPConfig(
        vision_config=dict(hidden_size=48, num_hidden_layers=3, image_size=24, patch_size=8, **shared),
        text_config=dict(
            hidden_size=32, num_hidden_layers=2, vocab_size=99, max_position_embeddings=16,
            bos_token_id=97, eos_token_id=eos, pad_token_id=98, **shared,
        ),
        projection_dim=24,
    )  # fmt: skip
    model = transformers.CLIPModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return model


# ------------------------------------------------------------------------------------------ what transformers wrote


@pytest.mark.parametrize("eos", [98, 2])
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.filterwarnings("ignore:.*preprocessor_config")
def test_a_transformers_clip_gives_the_same_features(tmp_path, batch, hidden_act, eos):
    theirs = transformers_clip(tmp_path / "clip", hidden_act, eos)
    bundle = load_bundle(tmp_path / "clip")
    assert_same(features(bundle.model, batch), features(theirs, batch))
    assert bundle.model.config.is_dense and not bundle.model.training and bundle.model.dtype == torch.float32
    assert (bundle.image_size, bundle.context_length, bundle.name) == (24, 16, "clip")


@pytest.mark.filterwarnings("ignore:.*preprocessor_config")
def test_the_wrong_activation_gives_other_features(tmp_path, batch):
    theirs = features(transformers_clip(tmp_path / "clip", "gelu", 98), batch)
    assert differ(features(load_bundle(tmp_path / "clip", quick_gelu=True).model, batch), theirs)
    assert_same(features(load_bundle(str(tmp_path / "clip"), quick_gelu=False).model, batch), theirs)


@pytest.mark.filterwarnings("ignore:.*preprocessor_config")
def test_a_directory_with_only_a_pickled_file_is_read_without_running_it(tmp_path, batch):
    theirs = transformers_clip(tmp_path / "clip", "quick_gelu", 98)
    (tmp_path / "clip" / "model.safetensors").unlink()
    state = theirs.state_dict()
    state["text_model.embeddings.position_ids"] = torch.arange(16)[None]  # a buffer that transformers 4 saved
    torch.save(state, tmp_path / "clip" / "pytorch_model.bin")
    assert_same(features(load_bundle(tmp_path / "clip").model, batch), features(theirs, batch))

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Trap()}, tmp_path / "clip" / "pytorch_model.bin")
    with pytest.raises(UnsafeFile, match="Ask its author for a safetensors file"):
        load_bundle(tmp_path / "clip")
    assert not (tmp_path / "ran").exists()


def test_old_hub_configs_that_say_a_tower_twice(tmp_path, dense):
    save_bundle(dense, tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    towers = {f"{key}_dict": config[key] for key in ("text_config", "vision_config")}
    wrong = {key: {"hidden_size": 8, "num_attention_heads": 1} for key in ("text_config", "vision_config")}
    edit_json(tmp_path / "clip" / "config.json", **wrong, **towers)
    assert load_bundle(tmp_path / "clip").model.config.text_config.hidden_size == 32


@pytest.mark.parametrize(
    "file, content",
    [
        ("preprocessor_config.json", {"image_mean": MEAN, "image_std": STD, "size": 24, "crop_size": 24}),
        ("preprocessor_config.json", {"image_mean": MEAN, "image_std": STD, "size": {"shortest_edge": 24}}),
        ("processor_config.json", {"image_processor": {"image_mean": MEAN, "image_std": STD}}),
    ],
)
def test_pixel_statistics_of_old_and_new_layouts(tmp_path, dense, file, content):
    save_bundle(dense, tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").unlink()
    (tmp_path / "clip" / file).write_text(json.dumps(content))
    bundle = load_bundle(tmp_path / "clip")
    assert (bundle.image_mean, bundle.image_std) == (MEAN, STD)


def test_without_pixel_statistics_openais_are_used_and_said(tmp_path, dense):
    save_bundle(dense, tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match="has no preprocessor_config.json; OpenAI"):
        bundle = load_bundle(tmp_path / "clip")
    assert (bundle.image_mean, bundle.image_std) == (OPENAI_MEAN, OPENAI_STD)


# ------------------------------------------------------------------------------------------------ what is written here


def test_a_dense_model_is_a_plain_transformers_clip(tmp_path, dense, batch):
    save_bundle(dense, tmp_path / "clip")
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "clip").eval()
    assert_same(features(theirs, batch), features(dense.model, batch))
    assert theirs.config.text_config.eos_token_id == 98
    assert not list((tmp_path / "clip").glob("*.py"))


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_saving_and_loading_changes_nothing(tmp_path, request, batch, kind):
    bundle = request.getfixturevalue(kind)
    save_bundle(bundle, tmp_path / "model")
    again = load_bundle(tmp_path / "model")
    before, after = bundle.model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert_same(features(again.model, batch), features(bundle.model, batch), tolerance=0)
    assert (again.image_mean, again.image_std) == (MEAN, STD)
    for tower in ("vision_config", "text_config"):
        a, b = getattr(bundle.model.config, tower).to_dict(), getattr(again.model.config, tower).to_dict()
        assert {k: v for k, v in a.items() if v != b.get(k)} == {}
    caption = "the cat 42"
    assert again.tokenizer(caption)["input_ids"] == bundle.tokenizer(caption)["input_ids"]
    assert again.tokenizer.model_max_length == 16


def test_experts_in_some_blocks_only_survive_saving(tmp_path, moe, batch):
    text = moe.model.config.text_config.to_dict()
    config = type(moe.model.config)(
        vision_config={**moe.model.config.vision_config.to_dict(), "moe_layers": [1]},
        text_config={**text, "moe_layers": [], "num_experts_per_tok": 1},
        projection_dim=24, num_experts=4, num_experts_per_tok=3,
    )  # fmt: skip
    moe.model = CLIPMoEModel(config).eval()
    torch.manual_seed(0)
    for parameter in moe.model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_bundle(moe, tmp_path / "model")
    again = load_bundle(tmp_path / "model").model
    assert_same(features(again, batch), features(moe.model, batch), tolerance=0)
    assert again.config.vision_config.moe_layers == [1] and again.config.text_config.moe_layers == []


def test_the_same_model_gives_the_same_bytes_without_this_machines_paths(tmp_path, moe):
    assert moe.tokenizer.name_or_path == ""  # transformers' own save would write it down
    save_bundle(moe, tmp_path / "one", card={"recipe": "dmu"})
    save_bundle(moe, tmp_path / "two", card={"recipe": "dmu"})
    save_bundle(load_bundle(tmp_path / "one"), tmp_path / "three", card={"recipe": "dmu"})
    for file in sorted((tmp_path / "one").iterdir()):
        content = file.read_bytes()
        assert content == (tmp_path / "two" / file.name).read_bytes()
        if file.name != "README.md":  # which names what it was loaded from
            assert content == (tmp_path / "three" / file.name).read_bytes()
        for path in (tmp_path, REPOSITORY, Path.home()):
            assert str(path).encode() not in content or path == Path("/"), file.name
    card = (tmp_path / "one" / "README.md").read_text()
    for word in (
        "4 experts",
        "2 per token",
        "3 of 3 image blocks",
        "recipe: dmu",
        "trust_remote_code=True",
        "load_bundle",
    ):
        assert word in card


def test_a_card_calls_a_path_by_its_last_part_and_a_hub_id_or_name_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "clip").mkdir(parents=True)
    (tmp_path / "org").mkdir()
    for given, name in {
        str(tmp_path / "models" / "clip"): "clip",
        "models/clip": "clip",
        "models/clip/": "clip",
        ".": tmp_path.name,
        str(tmp_path / "was there.csv"): "was there.csv",
        "~/captions.json": "captions.json",
        "../shards/{000..099}.tar": "{000..099}.tar",
        "shards/train-{a,b}.tar": "train-{a,b}.tar",
        "openai/clip-vit-large-patch14-336": "openai/clip-vit-large-patch14-336",
        "org/data:subset": "org/data:subset",
        "ViT-L-14-336-quickgelu": "ViT-L-14-336-quickgelu",
        "openmoji": "openmoji",
    }.items():
        assert public_name(given) == name


def test_large_models_are_sharded(tmp_path, moe, batch):
    save_bundle(moe, tmp_path / "model", max_shard_bytes=200_000)
    shards = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model" / "model.safetensors").exists()
    assert all(file.stat().st_size < 300_000 for file in shards)
    assert_same(features(load_bundle(tmp_path / "model").model, batch), features(moe.model, batch), tolerance=0)
    loaded = CLIPMoEModel.from_pretrained(tmp_path / "model").eval()  # transformers reads our index too
    assert_same(features(loaded, batch), features(moe.model, batch))
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[1].name):
        load_bundle(tmp_path / "model")


def test_a_failing_save_leaves_the_old_directory(tmp_path, dense, moe, monkeypatch):
    save_bundle(dense, tmp_path / "model")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_directory, "save_tokenizer", full_disk)
    with pytest.raises(SaveError, match="Nothing was lost"):
        save_bundle(moe, tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert load_bundle(tmp_path / "model").model.config.is_dense


def test_saving_never_replaces_something_else(tmp_path, dense):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    (tmp_path / "note.txt").touch()
    for path in ("photos", "note.txt"):
        with pytest.raises(ValueError, match="is not a CLIP model directory; saving would replace all of it"):
            save_bundle(dense, tmp_path / path)
    assert (tmp_path / "photos" / "cat.jpg").exists()
    save_bundle(dense, tmp_path / "model")
    save_bundle(dense, tmp_path / "model")  # its own kind it does replace


def test_the_image_processor_is_transformers_own(tmp_path, dense):
    if transformers.__version__ >= "5":
        pytest.importorskip("torchvision")
    save_bundle(dense, tmp_path / "clip")
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "clip")
    assert list(processor.image_mean) == list(MEAN) and list(processor.image_std) == list(STD)
    assert processor.crop_size["height"] == processor.crop_size["width"] == processor.size["shortest_edge"] == 24


# -------------------------------------------------------------------------------------------------------------- errors


def test_missing_and_unexpected_tensors_are_named(tmp_path, dense):
    save_bundle(dense, tmp_path / "clip")
    weights = tmp_path / "clip" / "model.safetensors"
    state = load_tensors(weights)
    state["surprise"] = state.pop("logit_scale")
    state["visual_projection.weight"] = torch.zeros(3, 3)
    save_tensors(weights, state)
    with pytest.raises(ValueError) as error:
        load_bundle(tmp_path / "clip")
    for words in ("1 missing: logit_scale", "1 unexpected: surprise", "[3, 3] instead of [24, 48]", "copy or download"):
        assert words in str(error.value)
    save_tensors(weights, {"logit_scale": state["surprise"]})
    with pytest.raises(ValueError, match=r"\d\d missing: ([\w.]+, ){4}[\w.]+ \.\.\.\. "):  # five names, not all
        load_bundle(tmp_path / "clip")


def test_a_damaged_file_says_so(tmp_path, dense):
    save_bundle(dense, tmp_path / "clip")
    weights = tmp_path / "clip" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load_bundle(tmp_path / "clip")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        load_bundle(tmp_path / "clip")


@pytest.mark.parametrize("model_type", ["siglip", "clip_vision_model", "llava", None])
def test_other_models_are_refused(tmp_path, dense, model_type):
    save_bundle(dense, tmp_path / "clip")
    edit_json(tmp_path / "clip" / "config.json", model_type=model_type)
    with pytest.raises(ValueError, match=f"not a CLIP: its model_type is {model_type!r}.*whole CLIP"):
        load_bundle(tmp_path / "clip")


def test_an_unknown_activation_is_refused(tmp_path, dense):
    save_bundle(dense, tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    edit_json(tmp_path / "clip" / "config.json", vision_config={**config["vision_config"], "hidden_act": "relu"})
    with pytest.raises(ValueError, match="hidden_act 'relu'"):
        load_bundle(tmp_path / "clip")


def test_k_can_be_changed_within_reason(tmp_path, dense, moe, batch):
    save_bundle(moe, tmp_path / "moe")
    save_bundle(dense, tmp_path / "dense")
    one = load_bundle(tmp_path / "moe", num_experts_per_tok=1).model
    assert one.config.num_experts_per_tok == one.vision_model.encoder.layers[0].mlp.router.num_experts_per_tok == 1
    assert differ(features(one, batch), features(moe.model, batch))
    for k in (0, 5):
        with pytest.raises(ValueError, match="choose a number from 1 to 4"):
            load_bundle(tmp_path / "moe", num_experts_per_tok=k)
    with pytest.raises(ValueError, match=r"has 1 expert"):
        load_bundle(tmp_path / "dense", num_experts_per_tok=2)


def test_names_that_lead_nowhere_say_what_to_do(tmp_path, dense):
    with pytest.raises(FileNotFoundError, match="give its checkpoint file as well"):
        load_bundle("ViT-L-14")
    with pytest.raises(FileNotFoundError, match=r"fetching it from the hub failed.*copy its directory here"):
        load_bundle("nobody/there-is-no-such-clip")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_bundle(tmp_path)
    save_bundle(dense, tmp_path / "clip")
    with pytest.raises(ValueError, match="goes with the NAME of an open_clip model"):
        load_bundle(tmp_path / "clip", checkpoint=tmp_path / "x.pt")


# ----------------------------------------------------------------------------------------------------------- tokenizer

CAPTIONS = [
    "a photo of 3 cats",
    "12:30 o'clock, 2024-05-17",
    "it's the dog's toy; they'll've gone",
    "ALL CAPS and MiXeD",
    "café naïve Ångström résumé",
    "e\u0301 combining",
    "😀👍🏽 emoji 👨\u200d👩\u200d👧",
    "tabs\tand\nnewlines   spaces",
    "",
    "a " * 300,
    "#hashtag @user http://x.y/z?a=b&c=d",
    "中文字符 русский",
    "½ ² Ⅷ",
    "hello...world!!!???",
    "$1,000.00 50%",
]


def open_clip_ids() -> list[list[int]]:
    """What open_clip makes of the captions: up to and with the end of text."""
    tokens = pytest.importorskip("open_clip").get_tokenizer("ViT-B-32")(CAPTIONS).tolist()
    return [row[: row.index(49407) + 1] for row in tokens]


def test_tokens_are_open_clips(tmp_path):
    expected = open_clip_ids()
    tokenizer = open_clip_tokenizer(77)
    save_tokenizer(tokenizer, tmp_path, 77)
    for one in (tokenizer, load_tokenizer(tmp_path, 77), transformers.AutoTokenizer.from_pretrained(tmp_path)):
        assert one(CAPTIONS, truncation=True)["input_ids"] == expected
        assert (one.pad_token_id, one.eos_token_id, one.bos_token_id, one.model_max_length) == (49407, 49407, 49406, 77)


def test_without_open_clip_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "llava-clipmoe\[train\]"'):
        open_clip_tokenizer()


def test_byte_order_marks_in_a_vocabulary_change_nothing(tmp_path, tiny_tokenizer):
    folder = tmp_path / "tokenizer"
    (folder / "merges.txt").write_text("\n".join((folder / "merges.txt").read_text().split("\n")[1:]))  # no #version
    for file in (folder / "merges.txt", folder / "vocab.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_tokenizer(folder, 16)("the cat 5").input_ids == tiny_tokenizer("the cat 5").input_ids


def test_a_directory_with_only_tokenizer_json_is_read(tmp_path, tiny_tokenizer):
    tiny_tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    edit = json.loads((tmp_path / "tokenizer.json").read_text())
    # What newer versions of the tokenizers library write, and older ones cannot parse.
    edit["model"]["merges"] = [m.split(" ") if isinstance(m, str) else m for m in edit["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(edit))
    again = load_tokenizer(tmp_path, 16)
    assert again("the cat 42")["input_ids"] == tiny_tokenizer("the cat 42")["input_ids"]
    edit["added_tokens"].append({**edit["added_tokens"][0], "id": 99, "content": "<extra>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(edit))
    with pytest.raises(ValueError, match="<extra>"):
        load_tokenizer(tmp_path, 16)


def test_the_padding_token_is_kept(tmp_path, tiny_tokenizer):
    save_tokenizer(tiny_tokenizer, tmp_path, 16)
    edit_json(tmp_path / "tokenizer_config.json", pad_token={"content": "a</w>"})
    tokenizer = load_tokenizer(tmp_path, 16)
    assert tokenizer.pad_token == "a</w>"
    save_tokenizer(tokenizer, tmp_path, 16)
    assert load_tokenizer(tmp_path, 16).pad_token == "a</w>"


# ------------------------------------------------------------------------------------------- without us, other versions

_WITHOUT_US = """
import sys, torch
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert "llava_clipmoe" not in sys.modules
batch = torch.load(sys.argv[2], weights_only=True)
ids = AutoTokenizer.from_pretrained(sys.argv[1])("the cat 42")["input_ids"]
with torch.no_grad():
    image, text = model.get_image_features(batch["pixel_values"]), model.get_text_features(batch["input_ids"])
torch.save({"image": image, "text": text, "ids": torch.tensor(ids)}, sys.argv[3])
"""


def test_a_stranger_loads_the_directory_with_trust_remote_code(tmp_path, moe, batch):
    save_bundle(moe, tmp_path / "model")
    torch.save(batch, tmp_path / "batch.pt")
    (tmp_path / "stranger.py").write_text(_WITHOUT_US)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "LLAVA_CLIPMOE_HOOK": "0"}
    # -I: neither this folder nor the user's packages; an installed llava_clipmoe is there, but nothing imports it
    command = [sys.executable, "-I", "stranger.py", "model", "batch.pt", "out.pt"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    assert_same((out["image"], out["text"]), features(moe.model, batch))
    assert out["ids"].tolist() == moe.tokenizer("the cat 42")["input_ids"]


_OTHER_VERSION = """
import json, sys, torch, transformers
from llava_clipmoe import load_bundle, save_bundle
folder, captions = sys.argv[1], json.loads(open(sys.argv[1] + "/captions.json").read())
batch = torch.load(folder + "/batch.pt", weights_only=True)
for kind in ("dense", "moe"):
    bundle = load_bundle(f"{folder}/{kind}")
    save_bundle(bundle, f"{folder}/{kind}-again")
    with torch.no_grad():
        image = bundle.model.get_image_features(batch["pixel_values"])
        text = bundle.model.get_text_features(batch["input_ids"])
    torch.save({"image": image, "text": text}, f"{folder}/{kind}.out.pt")
clip = transformers.CLIPModel.from_pretrained(folder + "/dense").eval()
with torch.no_grad():
    out = clip.visual_projection(clip.vision_model(pixel_values=batch["pixel_values"]).pooler_output)
torch.save({"image": out, "version": transformers.__version__}, folder + "/clip.out.pt")
ids = transformers.AutoTokenizer.from_pretrained(folder + "/tokens")(captions, truncation=True)["input_ids"]
open(folder + "/ids.json", "w").write(json.dumps(ids))
clip.save_pretrained(folder + "/theirs")
"""


@pytest.fixture
def other_python() -> str:
    python = os.environ.get("LLAVA_CLIPMOE_PINNED_PYTHON")
    if not python or not Path(python).exists():
        pytest.skip("LLAVA_CLIPMOE_PINNED_PYTHON does not name LLaVA's own environment (`make test` does it)")
    return python


def test_the_other_transformers_version_reads_and_writes_the_same_bytes(tmp_path, other_python, dense, moe, batch):
    expected = open_clip_ids()
    save_bundle(dense, tmp_path / "dense")
    save_bundle(moe, tmp_path / "moe")
    save_tokenizer(open_clip_tokenizer(77), tmp_path / "tokens", 77)
    (tmp_path / "captions.json").write_text(json.dumps(CAPTIONS))
    torch.save(batch, tmp_path / "batch.pt")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [other_python, "-c", _OTHER_VERSION, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for kind, bundle in (("dense", dense), ("moe", moe)):
        out = torch.load(tmp_path / f"{kind}.out.pt", weights_only=True)
        # The weights are bit-identical (below); products of two torch versions differ in the last bits.
        assert_same((out["image"], out["text"]), features(bundle.model, batch))
        for file in (tmp_path / kind).iterdir():
            if file.name != "README.md":
                assert file.read_bytes() == (tmp_path / f"{kind}-again" / file.name).read_bytes(), file.name
    out = torch.load(tmp_path / "clip.out.pt", weights_only=True)
    assert out["version"] != transformers.__version__
    assert_same([out["image"]], features(dense.model, batch)[:1])
    assert json.loads((tmp_path / "ids.json").read_text()) == expected
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(tmp_path / "dense" / file, tmp_path / "theirs")
    assert_same(features(load_bundle(tmp_path / "theirs").model, batch), features(dense.model, batch), tolerance=0)


def test_the_modeling_files_import_each_other_in_no_circle():
    """transformers 4 follows what it reads as imports until nothing new comes: with a circle, for ever."""
    folder = Path(model_directory.__file__).parent
    imports = {
        file: {f"{name}.py" for name in re.findall(r"^\s*from\s+\.(\w+)\s+import", (folder / file).read_text(), re.M)}
        for file in model_directory.MODELING_FILES
    }
    assert imports["modeling_clipmoe.py"] == set(imports) - {"modeling_clipmoe.py"}  # it copies those alone
    while imports:
        leaves = {file for file, wanted in imports.items() if not wanted & imports.keys()}
        assert leaves, f"a circle among {sorted(imports)}"
        imports = {file: wanted for file, wanted in imports.items() if file not in leaves}
