"""`llava-clipmoe push` against a hub that answers, and `llava-clipmoe update` of what an older version wrote."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import REPOSITORY
from huggingface_hub import ModelCard
from test_model_directory import assert_same, dense, edit_json, features, moe, tiny_tokenizer  # noqa: F401
from tiny import hub as hubs
from tiny.exported import make_exported_llava
from tiny.llavas import upstream_is_installed

from llava_clipmoe import cli, export_files, load_bundle
from llava_clipmoe.files import load_tensors, save_tensors, write_json
from llava_clipmoe.model_directory import MODELING_FILES, save_bundle
from llava_clipmoe.push import plan

OLD_CARD = """---
library_name: transformers
pipeline_tag: zero-shot-image-classification
license: mit
tags: [clip, clip-moe, mixture-of-experts]
---

# mine

A CLIP-MoE at 24 px, and a sentence that its owner wrote.

- base: org/some-clip
- parameters: 1
- recipe: dmu
- data: org/pairs

The weights derive from the base model and from the data they were trained on; their licences apply.

## Loading

With transformers (4.37 or newer): an old way.

## What I found

It likes cats.
"""


@pytest.fixture
def directory(tmp_path, moe) -> Path:  # noqa: F811
    """A CLIP-MoE's directory as this version writes it."""
    save_bundle(
        moe, tmp_path / "run" / "clip-moe", card={"base": "org/some-clip", "recipe": "dmu", "data": "org/pairs"}
    )
    return tmp_path / "run" / "clip-moe"


@pytest.fixture
def older(directory) -> Path:
    """The same as an older version wrote it: what consumers need is not there, the code is another, the card has been
    worked on."""
    config = json.loads((directory / "config.json").read_text())
    del config["auto_map"]["AutoModelForZeroShotImageClassification"]
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    pixels = json.loads((directory / "preprocessor_config.json").read_text())
    del pixels["processor_class"]
    (directory / "preprocessor_config.json").write_text(json.dumps(pixels))
    code = directory / "modeling_clipmoe.py"
    code.write_text(code.read_text().replace(") -> CLIPMoEOutput:", "):"))
    (directory / "cpu_clipmoe.py").write_text((directory / "cpu_clipmoe.py").read_text() + "\n# older\n")
    (directory / "README.md").write_text(OLD_CARD)
    return directory


def write_results(run: Path) -> None:
    """A results.json as `train-encoder` leaves it beside its model directories."""
    recalls = {"i2t_r1": 0.25, "t2i_r1": 0.5, "i2t_r5": 1.0}
    better = {name: value / 2 + 0.4 for name, value in recalls.items()}
    results = {
        "result": "clip-moe",
        "retrieval": {"held out": {"base": recalls, "stage1": recalls, "clip-moe": better}},
        "zero_shot": {"nouns": {"base": {"top1": 0.125}, "clip-moe": {"top1": 0.75}}},
        "attributes": {"base": {"overall": 0.3}},
    }
    (run / "results.json").write_text(json.dumps(results))


# -------------------------------------------------------------------------------------------------------------- update


def snapshot(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_an_older_directory_opens_and_one_command_updates_it(older, batch, moe, capsys):  # noqa: F811
    assert_same(features(load_bundle(older).model, batch), features(moe.model, batch))
    auto = transformers.AutoModel.from_pretrained(older, trust_remote_code=True).eval()
    assert_same(features(auto, batch), features(moe.model, batch))
    before = snapshot(older)
    assert cli.main(["update", str(older)]) == 0
    assert "updated in" in capsys.readouterr().out
    after = snapshot(older)
    changed = {name for name in after if after[name] != before.get(name)}
    code = {"modeling_clipmoe.py", "cpu_clipmoe.py"}
    assert changed == {*code, "config.json", "preprocessor_config.json", "README.md"}
    fresh = older.parent / "fresh"
    save_bundle(moe, fresh)
    for name in changed - {"README.md"}:  # to the byte what is written today
        assert (
            json.loads(after[name]) == json.loads((fresh / name).read_text())
            if name.endswith("json")
            else (after[name] == (fresh / name).read_bytes())
        )
    assert cli.main(["update", str(older)]) == 0
    assert "is up to date" in capsys.readouterr().out
    assert snapshot(older) == after


def test_an_update_keeps_what_the_owner_wrote_in_the_card(older):
    write_results(older.parent)
    assert cli.main(["update", str(older)]) == 0
    text = (older / "README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert (data["license"], data["base_model"], data["datasets"]) == ("mit", "org/some-clip", ["org/pairs"])
    for kept in (
        "# mine\n",
        "a sentence that its owner wrote.",
        "## What I found\n\nIt likes cats.",
        "- recipe: dmu\n",
    ):
        assert text.count(kept) == 1, kept
    assert "an old way" not in text and text.count("their licences apply") == 1
    assert "| held out: image to text, R@1 | 25.0 | 52.5 |" in text and "| nouns: top-1 | 12.5 | 75.0 |" in text
    assert "attribute pairs" not in text  # measured of the base alone
    shutil.move(older, older.parent.parent / "elsewhere")  # away from its run, the scores stay
    assert cli.main(["update", str(older.parent.parent / "elsewhere")]) == 0
    assert (older.parent.parent / "elsewhere" / "README.md").read_text() == text


def test_another_directory_of_a_run_does_not_get_its_scores(older):
    """A compressed model is often put beside the result."""
    write_results(older.parent)
    shutil.move(older, older.with_name("clip-moe-delta"))
    assert cli.main(["update", str(older.with_name("clip-moe-delta"))]) == 0
    assert "## Scores" not in (older.with_name("clip-moe-delta") / "README.md").read_text()


@pytest.mark.parametrize("family", ["Llava", "LlavaNext"])
def test_an_exported_llavas_code_is_updated(tmp_path, moe, family):  # noqa: F811
    model_type, tiles = {"Llava": ("llava", {}), "LlavaNext": ("llava_next", {"image_aspect_ratio": "anyres"})}[family]
    auto_map = export_files.auto_map(family)

    def export(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        export_files.write_card(folder, tiles, moe.model.config)
        write_json(folder / "config.json", {"model_type": model_type, "auto_map": auto_map})
        save_tensors(folder / "model.safetensors", {"weight": torch.zeros(1)}, {"format": "pt"})
        return folder

    fresh, old = export("fresh"), export("old")
    assert cli.main(["update", str(fresh)]) == 0 and snapshot(fresh) == snapshot(old)  # nothing to do
    (old / "experts_clipmoe.py").unlink()
    (old / export_files.REMOTE_CODE).write_text("# older\n")
    edit_json(old / "config.json", auto_map={"AutoConfig": auto_map["AutoConfig"]})
    assert cli.main(["update", str(old)]) == 0
    assert snapshot(old) == snapshot(fresh)


def test_what_is_not_ours_is_not_updated(tmp_path, directory, dense, capsys):  # noqa: F811
    save_bundle(dense, tmp_path / "dense")
    shutil.copytree(directory, tmp_path / "llava")
    edit_json(tmp_path / "llava" / "config.json", model_type="llava")
    shutil.copytree(directory, tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    for path, words in {
        tmp_path / "dense": "is a dense CLIP, which transformers' own code opens",
        tmp_path / "llava": "is not a CLIP: its model_type is 'llava'",
        tmp_path / "empty": "has no weights",
        tmp_path: "it has no config.json",
        Path("org/name"): "is no directory on this machine. A model of the hub is updated in a copy",
    }.items():
        before = snapshot(path) if path.is_dir() and path != tmp_path else None
        assert cli.main(["update", str(path)]) == 2
        assert words in capsys.readouterr().err
        assert before is None or snapshot(path) == before
    (directory / "README.md").write_text("---\n: [\n---\n\n# x\n")
    assert cli.main(["update", str(directory)]) == 2
    assert "what stands between its two --- is no YAML" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- push


def test_a_dry_run_lists_what_would_go_up_and_asks_nobody(directory, capsys):
    write_results(directory.parent)
    (directory / "notes.txt").write_text("a secret")
    (directory / "checkpoint").mkdir()
    before = snapshot_files(directory)
    assert cli.main(["push", str(directory), "me/moe", "--license", "apache-2.0", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for name in ("config.json", "model.safetensors", "vocab.json", "merges.txt", "README.md", *MODELING_FILES):
        assert f" {name} " in out, name
    assert "stays here: checkpoint, notes.txt" in out and "Nothing was uploaded" in out
    assert f" {(directory / 'model.safetensors').stat().st_size:,} " in out
    assert snapshot_files(directory) == before
    card = plan(directory, "me/moe", "apache-2.0").card
    assert card.strip() in out
    assert ModelCard(card).data.to_dict()["license"] == "apache-2.0"
    for words in ("- base: org/some-clip", "- data: org/pairs", "- recipe: dmu", "| nouns: top-1 | 12.5 | 75.0 |",
                  'path = "me/moe"', "pipeline(", "SentenceTransformer(", "CLIPMoETextModel", "load_bundle(",
                  "- these weights: apache-2.0", "- the base, org/some-clip: see where it comes from"):  # fmt: skip
        assert words in card, words


def snapshot_files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


def test_the_bases_licence_reaches_the_card(tmp_path, dense, moe):  # noqa: F811
    save_bundle(dense, tmp_path / "base", card={"license": "cc-by-nc-4.0"})
    base = load_bundle(tmp_path / "base")
    assert base.license == "cc-by-nc-4.0"
    base.model = moe.model
    save_bundle(base, tmp_path / "moe", card={"base": "base"})
    assert load_bundle(tmp_path / "moe").license is None  # nobody has said it
    card = plan(tmp_path / "moe", "me/moe", "mit").card
    assert "- these weights: mit\n- the base, base: cc-by-nc-4.0\n" in card
    assert "license: mit" in card.partition("# base")[0]


def test_the_embedded_datas_licence_is_in_the_card(tmp_path, moe):  # noqa: F811
    save_bundle(moe, tmp_path / "moe", card={"data": "openmoji"})
    card = (tmp_path / "moe" / "README.md").read_text()
    assert "- the data, openmoji: CC BY-SA 4.0 (OpenMoji project)\n" in card and "datasets" not in card


def test_what_is_no_whole_model_directory_is_not_pushed(tmp_path, directory, capsys):
    def broken(name: str) -> Path:
        return shutil.copytree(directory, tmp_path / name)

    edit_json(broken("llava") / "config.json", model_type="llava")
    (broken("tokens") / "vocab.json").unlink()
    (broken("code") / "experts_clipmoe.py").unlink()
    (broken("weights") / "model.safetensors").unlink()
    weights = broken("other") / "model.safetensors"
    state = load_tensors(weights)
    state["surprise"] = state.pop("logit_scale")
    save_tensors(weights, state, {"format": "pt"})
    pickled = broken("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for name, words in {
        "run": "it has no config.json",
        "nowhere": "is no directory",
        "llava": "is not a CLIP: its model_type is 'llava'",
        "tokens": "has no tokenizer",
        "code": "llava-clipmoe update",
        "weights": "has no weights",
        "other": "1 missing: logit_scale; 1 unexpected: surprise",
        "pickled": "has pickled weights",
    }.items():
        assert cli.main(["push", str(tmp_path / name), "me/moe", "--dry-run"]) == 2, name
        assert words in capsys.readouterr().err, name
    for hub_id in ("moe", "me/moe/1", "https://huggingface.co/me/moe"):
        assert cli.main(["push", str(directory), hub_id, "--dry-run"]) == 2
        assert "is no hub id: give ORG/NAME" in capsys.readouterr().err
    assert cli.main(["push", str(directory), "me/moe", "--license", "MIT License", "--dry-run"]) == 2
    assert "is no licence of the hub" in capsys.readouterr().err


def test_an_older_directory_is_not_pushed(older, capsys):
    assert cli.main(["push", str(older), "me/moe", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "was written by another version" in error and f"llava-clipmoe update {older}" in error
    assert cli.main(["update", str(older)]) == 0 and cli.main(["push", str(older), "me/moe", "--dry-run"]) == 0


_PUSH = """
import sys
from llava_clipmoe import cli
sys.exit(cli.main(sys.argv[1:]))
"""
_FROM_THE_HUB = """
import sys
sys.modules["llava_clipmoe"] = None
import torch
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained("me/moe", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("me/moe", trust_remote_code=True)
batch = torch.load("batch.pt", weights_only=True)
with torch.no_grad():
    image, text = model.get_image_features(batch["pixel_values"]), model.get_text_features(batch["input_ids"])
torch.save({"image": image, "text": text, "ids": torch.tensor(processor.tokenizer("the cat").input_ids)}, "out.pt")
"""


def child(folder: Path, hub: hubs.Hub, code: str, *arguments: str, token: str | None = hubs.TOKEN):
    """`code` in a process of its own, as huggingface_hub reads where the hub is when it is imported."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HOME": str(folder / "home")}
    environment |= {**hub.environment(token), "LLAVA_CLIPMOE_HOOK": "0"}
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_what_was_pushed_is_on_the_hub_and_loads_from_there(tmp_path, directory, moe, batch):  # noqa: F811
    torch.save(batch, tmp_path / "batch.pt")
    with hubs.running() as hub:
        done = child(tmp_path, hub, _PUSH, "push", str(directory), "me/moe", "--license", "mit", "--private")
        assert done.returncode == 0, done.stderr
        assert f"uploaded: {hub.endpoint}/me/moe/commit/" in done.stdout
        files = hub.repositories["me/moe"]
        for file in directory.iterdir():
            assert file.name == "README.md" or files[file.name] == file.read_bytes()
        assert set(files) == {file.name for file in directory.iterdir()} | {".gitattributes"}
        assert b"license: mit" in files["README.md"] and hub.private == {"me/moe"}
        done = child(tmp_path, hub, _PUSH, "push", str(directory), "me/moe")  # again, into what is there
        assert done.returncode == 0, done.stderr
        done = child(tmp_path, hub, _FROM_THE_HUB)
        assert done.returncode == 0, done.stderr[-2000:]
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    assert_same((out["image"], out["text"]), features(moe.model, batch))
    assert out["ids"].tolist() == moe.tokenizer("the cat").input_ids


_LLAVA_FROM_THE_HUB = """
import sys
sys.modules["llava_clipmoe"] = None
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("me/llava", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("me/llava", trust_remote_code=True)
print(type(processor).__name__, sum(p.double().sum().item() for p in model.parameters()))
"""


@pytest.mark.skipif(not upstream_is_installed(), reason="upstream LLaVA (llava-torch) is not installed here")
def test_an_exported_llava_is_pushed_and_loads_from_there(tmp_path, directory, capsys):
    llava, exported = make_exported_llava(tmp_path)
    (exported / "notes.txt").write_text("mine")
    with hubs.running() as hub:
        done = child(tmp_path, hub, _PUSH, "push", str(exported), "me/llava", "--license", "llama3.1")
        assert done.returncode == 0, done.stderr
        files = hub.repositories["me/llava"]
        assert set(files) == {file.name for file in exported.iterdir()} - {"notes.txt"} | {".gitattributes"}
        assert "stays here: notes.txt" in done.stdout
        card = files["README.md"].decode()
        assert ModelCard(card).data.license == "llama3.1" and "serve me/llava" in card
        assert card.count('from_pretrained("me/llava"') == 5 and "from_pretrained(path" not in card
        done = child(tmp_path, hub, _LLAVA_FROM_THE_HUB)
        assert done.returncode == 0, done.stderr[-2000:]
        kind, total = done.stdout.split()
        expected = sum(tensor.double().sum().item() for tensor in load_tensors(exported).values())
        assert kind == "LlavaProcessor" and float(total) == pytest.approx(expected, rel=1e-9)
        done = child(tmp_path, hub, _PUSH, "push", str(directory), "me/llava")  # a tower in the LLaVA's place
        assert done.returncode == 2 and "holds another model already (model_type 'llava')" in done.stderr
    (exported / "modeling_clipmoe.py").write_text("# older\n")
    for broken, words in ((exported, "llava-clipmoe update"), (llava, "is not a CLIP")):
        assert cli.main(["push", str(broken), "me/llava", "--dry-run"]) == 2
        assert words in capsys.readouterr().err


def test_a_hub_that_refuses_and_another_model_there_are_said_plainly(tmp_path, directory):
    with hubs.running() as hub:
        hub.repositories["me/llama"] = {"config.json": b'{"model_type": "llama"}'}
        done = child(tmp_path, hub, _PUSH, "push", str(directory), "me/llama")
        assert done.returncode == 2 and "holds another model already (model_type 'llama')" in done.stderr
        assert set(hub.repositories["me/llama"]) == {"config.json"}
        done = child(tmp_path, hub, _PUSH, "push", str(directory), "me/moe", token=None)
        assert done.returncode == 2 and "hf auth login" in done.stderr and "Traceback" not in done.stderr
        done = child(tmp_path, hub, "import llava_clipmoe; llava_clipmoe.load_bundle('me/llama')")
        assert "is not a CLIP: its model_type is 'llama'" in done.stderr
    done = child(tmp_path, hub, _PUSH, "push", str(directory), "me/moe")  # nobody answers there now
    assert done.returncode == 2 and "Check the connection" in done.stderr and "Traceback" not in done.stderr
