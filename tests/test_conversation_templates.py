"""Which conversation template a model is trained and asked with, where nobody names one."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tiny.language_models import make_llama_3, make_qwen_2
from tiny.llavas import make_llava, make_towers, upstream_is_installed

from demo.llava.settings import Generation, Models
from llava_clipmoe.conversations import FIELD, TEMPLATES, conversation_for, find_conversation
from llava_clipmoe.run import conversation_flag
from train_llava.eval.settings import template_of

pytest_plugins = ["tiny.loaded_llavas"]
LLAMA_3, QWEN = {"model_type": "llama"}, {"model_type": "qwen2"}


def model(folder: Path, config: dict, *tokens: str, slow: bool = False) -> Path:
    """A directory as far as it is looked at: its config, and the tokens added to its tokenizer's vocabulary."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if slow:
        added = {"added_tokens_decoder": {str(i): {"content": token} for i, token in enumerate(tokens)}}
        (folder / "tokenizer_config.json").write_text(json.dumps(added))
    else:
        (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": token} for token in tokens]}))
    return folder


@pytest.mark.parametrize(
    "config, tokens, template",
    [
        (LLAMA_3, ["<|begin_of_text|>", "<|eot_id|>"], "llama_3"),
        ({"model_type": "llava_llama"}, ["<|eot_id|>"], "llama_3"),
        (QWEN, [], "qwen_2"),
        ({"model_type": "llava_qwen3"}, [], "qwen_2"),
        ({"model_type": "llama"}, ["<s>", "</s>"], None),
        ({"model_type": "mistral"}, ["<|eot_id|>"], None),
        ({"model_type": "llava_llama", FIELD: "v1"}, ["<|eot_id|>"], "v1"),
        ({"model_type": "llava_qwen2", FIELD: "chatml_direct"}, [], "chatml_direct"),
    ],
)
def test_a_directory_says_its_template(config, tokens, template, tmp_path):
    assert conversation_for(model(tmp_path / "model", config, *tokens)) == template
    assert conversation_for(model(tmp_path / "slow", config, *tokens, slow=True)) == template


@pytest.mark.parametrize(
    "own, base, template",
    [
        ({"model_type": "llava_llama"}, ["<|eot_id|>"], "llama_3"),  # a projector alone: no tokenizer of its own
        ({"model_type": "llava_llama", FIELD: "llava_v1"}, ["<|eot_id|>"], "llava_v1"),  # what it was trained with
        ({"model_type": "llava_llama"}, [], "vicuna_v1"),
        ({"model_type": "llava_llama", FIELD: "v1"}, [], "vicuna_v1"),  # upstream's two names of one template
    ],
)
def test_a_part_is_asked_as_it_was_trained_else_as_its_base(own, base, template, tmp_path):
    part, below = model(tmp_path / "part", own), model(tmp_path / "base", {"model_type": "llama"}, *base)
    assert template_of(str(part), str(below)) == template


@pytest.mark.parametrize(
    "name, template",
    [
        ("liuhaotian/llava-v1.5-7b", "vicuna_v1"),
        ("org/llava-Meta-Llama-3-8B-Instruct", "llama_3"),
        ("org/llava-llama3.2", "llama_3"),
        ("org/llava-Llama-2-13b", "vicuna_v1"),
        ("org/llava-Qwen2.5-7B-Instruct-clipmoe", "qwen_2"),
    ],
)
def test_of_a_hub_id_only_the_name_is_known(name, template, tmp_path, monkeypatch):
    assert template_of(name, None) == template
    # a directory of that name speaks for itself
    monkeypatch.chdir(tmp_path)
    model(tmp_path / name, {"model_type": "llava_llama"})
    assert template_of(name, None) == "vicuna_v1"
    assert find_conversation(name) is None
    assert find_conversation(name, "meta-llama/Llama-3.1-8B-Instruct") == "llama_3", "its base may still be guessed"


needs_upstream = pytest.mark.skipif(not upstream_is_installed(), reason="upstream LLaVA (llava-torch) is not installed")


@needs_upstream
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda template: template.copy()], ids=["lmms-eval", "LLaVA"])
def test_a_copy_of_a_template_is_filled_and_the_template_stays_empty(upstream, copied):
    from llava.conversation import conv_templates

    for name in TEMPLATES:
        conversation = copied(conv_templates[name])
        conversation.append_message(conversation.roles[0], "What is it?")
        assert "What is it?" in conversation.get_prompt()
        assert not conv_templates[name].messages


# ------------------------------------------------------------------------------------------------------------- the demo


@needs_upstream
def test_in_the_demo_what_a_directory_says_wins_over_its_name(two_llavas, tmp_path):
    from demo.llava.load import load_llavas

    llava = shutil.copytree(two_llavas[0], tmp_path / two_llavas[0].name)
    config = json.loads((llava / "config.json").read_text())
    (llava / "config.json").write_text(json.dumps({**config, FIELD: "chatml_direct"}))
    llavas = load_llavas(Models(llava, two_llavas[1], device="cpu"), say=lambda line: None)
    assert [each.llm.conversation for each in llavas] == ["chatml_direct", "llava_v1"]


@needs_upstream
@pytest.mark.parametrize("make, template", [(make_llama_3, "llama_3"), (make_qwen_2, "qwen_2")])
def test_in_the_demo_two_projectors_are_asked_as_their_language_model_is(upstream, tmp_path, make, template):
    from demo.llava.load import load_llavas

    llm, towers = make(tmp_path / "llm"), make_towers(tmp_path)
    names = "llava-v1-moe-pretrain", "llava-v1-clip-pretrain"
    parts = [make_llava(tmp_path / name, tower, llm, whole=False) for name, tower in zip(names, towers, strict=True)]
    llavas = load_llavas(Models(*parts, llm, device="cpu"), say=lambda line: None)
    assert [each.llm.conversation for each in llavas] == [template, template]
    texts = list(llavas[0].stream(Image.new("RGB", (40, 30), "red"), "What is it?", Generation(max_new_tokens=8)))
    assert texts[-1] and "<|" not in texts[-1]


def test_the_launcher_tells_upstreams_programs(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [])
    llama, vicuna = model(tmp_path / "llama", LLAMA_3, "<|eot_id|>"), model(tmp_path / "vicuna", LLAMA_3)
    lora = model(tmp_path / "llava-lora", {"model_type": "llava_llama", FIELD: "llama_3"})
    for target in ("llava.serve.cli", "llava.eval.model_vqa_loader"):
        assert conversation_flag(target, ["--model-path", str(llama)]) == ["--conv-mode", "llama_3"]
        assert conversation_flag(target, [f"--model-path={lora}", "--model-base", "x"]) == ["--conv-mode", "llama_3"]
        assert conversation_flag(target, ["--model-path", str(vicuna), "--model-base", str(llama)])[1:] == ["llama_3"]
        for silent in (["--model-path", str(vicuna)], [], ["--model-path", str(llama), "--conv-mode", "llava_v1"]):
            assert conversation_flag(target, silent) == []
    for target in ("llava.serve.model_worker", "llava.train.train", "script.py"):  # they know no such flag
        assert conversation_flag(target, ["--model-path", str(llama)]) == []
