"""Llama 3's and Qwen's conversations in upstream's trainer: what is learned is what a question asks for."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tiny.language_models import make_llama_3, make_qwen_2
from tiny.llavas import make_language_model, upstream_in_this_process, upstream_is_installed
from transformers import AutoTokenizer, GenerationConfig

from llava_clipmoe.conversations import FIELD, TEMPLATES, conversation_for

pytestmark = pytest.mark.skipif(
    not upstream_is_installed(), reason="upstream LLaVA (llava-torch) is not installed here"
)

KINDS = {"llama_3": make_llama_3, "qwen_2": make_qwen_2}
TURNS = [("human", "<image>\nWhat colour is the square?"), ("gpt", "It is red."), ("human", "Describe it."),
         ("gpt", "A small square\nin 2 colours: 100 red.")]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def upstream():
    with upstream_in_this_process():
        from llava_clipmoe import run

        run.prepare()
        yield


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    """(name of the template, the language model's directory, its tokenizer as upstream loads it)"""
    folder = KINDS[request.param](tmp_path_factory.mktemp("model") / request.param)
    return request.param, folder, AutoTokenizer.from_pretrained(folder, use_fast=False)


def rows(turns):
    return [{"from": speaker, "value": text} for speaker, text in turns]


def asked(name, turns):
    """The prompt in upstream's words, where the last turn is to be answered."""
    from llava.conversation import conv_templates

    conversation = conv_templates[name].copy()
    for speaker, text in turns:
        conversation.append_message(conversation.roles[speaker == "gpt"], text)
    return conversation.get_prompt()


def learned(name, tokenizer, turns, has_image=True):
    from llava_clipmoe.compat.conversations import ids_and_labels

    ids, labels = ids_and_labels(rows(turns), TEMPLATES[name], tokenizer, has_image)
    assert ids.shape == labels.shape and ids.dtype == torch.long
    return ids.tolist(), labels.tolist()


def test_training_reads_what_asking_reads(model):
    from llava.mm_utils import tokenizer_image_token

    name, _, tokenizer = model
    ids, labels = learned(name, tokenizer, TURNS)
    assert ids == tokenizer_image_token(asked(name, TURNS), tokenizer)
    for turn in (1, 3):  # before an answer stands the prompt that would be answered, and it is not learned
        prompt = tokenizer_image_token(asked(name, [*TURNS[:turn], ("gpt", None)]), tokenizer)
        assert ids[: len(prompt)] == prompt and labels[len(prompt) - 1] == -100
        answer = tokenizer(TURNS[turn][1] + TEMPLATES[name].end, add_special_tokens=False).input_ids
        assert labels[len(prompt) : len(prompt) + len(answer)] == answer == ids[len(prompt) : len(prompt) + len(answer)]
        assert tokenizer.convert_tokens_to_ids(TEMPLATES[name].end_token) in answer
    answers = [text + TEMPLATES[name].end for speaker, text in TURNS if speaker == "gpt"]
    expected = sum(len(tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers)
    assert sum(label != -100 for label in labels) == expected


def test_without_a_picture_the_token_is_plain_words(model):
    name, _, tokenizer = model
    ids, _ = learned(name, tokenizer, TURNS, has_image=False)
    assert -200 not in ids and ids == tokenizer(asked(name, TURNS)).input_ids
    begins = tokenizer("").input_ids
    assert ids[: len(begins)] == begins and ids.count(tokenizer.bos_token_id) == len(begins)


def test_a_first_turn_of_gpts_is_left_out_and_an_open_end_is_not_learned(model):
    name, _, tokenizer = model
    assert learned(name, tokenizer, [("gpt", "Hello."), *TURNS]) == learned(name, tokenizer, TURNS)
    ids, labels = learned(name, tokenizer, TURNS[:3])
    assert labels[-5:] == [-100] * 5 and ids[: len(learned(name, tokenizer, TURNS[:2])[0])] != labels


def test_the_directory_says_its_template(model, tmp_path):
    name, folder, _ = model
    assert conversation_for(folder) == name and conversation_for(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_llama", FIELD: name}))
    assert conversation_for(tmp_path) == name
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_llama"}))
    assert conversation_for(tmp_path) is None


def trained(kind, tokenizer, eos=7):
    """What of a model is looked at: its kind and where its answers end."""
    return SimpleNamespace(
        config=SimpleNamespace(model_type=kind), generation_config=GenerationConfig(eos_token_id=eos, pad_token_id=None)
    )


def test_padding_stands_in_no_conversation(model):
    from llava_clipmoe.compat.conversations import padding_for

    name, _, tokenizer = model
    token = padding_for(tokenizer)
    assert token == {"llama_3": "<|finetune_right_pad_id|>", "qwen_2": "<|endoftext|>"}[name]
    assert tokenizer.convert_tokens_to_ids(token) not in learned(name, tokenizer, TURNS)[0]
    poor = SimpleNamespace(init_kwargs={"pad_token": "<|eot_id|>"}, get_vocab=lambda: {"a": 0, "<|eot_id|>": 1})
    with pytest.raises(ValueError, match=r"pad_token in its tokenizer_config\.json"):
        padding_for(poor)


@pytest.mark.parametrize(("eos", "kept"), [(7, [7]), ([7, 8], [7, 8]), (None, [])])
def test_an_answer_ends_at_the_templates_mark_too(model, eos, kept):
    from llava_clipmoe.compat.conversations import stop_at_end

    name, _, tokenizer = model
    one = trained("llava_llama", tokenizer, eos)
    stop_at_end(one, tokenizer)
    assert one.generation_config.eos_token_id == eos  # nothing says that it was trained so
    setattr(one.config, FIELD, name)
    one.generation_config.repetition_penalty = 1.05
    stop_at_end(one, tokenizer, of_base=False)
    assert one.generation_config.repetition_penalty == 1.05  # what is said of a whole LLaVA holds
    stop_at_end(one, tokenizer)
    assert one.generation_config.repetition_penalty == 1  # the language model's own does not: greedy is greedy
    mark = tokenizer.convert_tokens_to_ids(TEMPLATES[name].end_token)
    assert one.generation_config.eos_token_id == [mark, *kept]


def test_another_template_than_the_models_is_refused(model):
    from llava_clipmoe.compat.conversations import check_template

    name, _, tokenizer = model
    kind = {"llama_3": "llava_llama", "qwen_2": "llava_qwen2"}[name]
    other = {"llama_3": "qwen_2", "qwen_2": "llama_3"}[name]
    for wrong in ("v1", "v0", "llama_2", "v1_mmtag", "mpt"):
        with pytest.raises(ValueError, match=f"--version {wrong} is not how .* give --version {name}"):
            check_template(wrong, trained(kind, tokenizer), tokenizer)
    with pytest.raises(ValueError, match=f"no such token: give --version {name}"):
        check_template(other, trained(kind, tokenizer), tokenizer)
    for right in (name, "plain", "a fork's own"):
        check_template(right, trained(kind, tokenizer), tokenizer)


@pytest.mark.parametrize("version", ["v1", "chatml_direct"])
def test_upstream_would_learn_nothing_with_another_template(model, version, monkeypatch):
    """Of any answer, and says no more than that it ignores the row: so these are refused."""
    from llava import conversation
    from llava.train import train

    from llava_clipmoe.compat.conversations import padding_for

    tokenizer = AutoTokenizer.from_pretrained(model[1], use_fast=False)
    tokenizer.pad_token = padding_for(tokenizer)
    monkeypatch.setattr(conversation, "default_conversation", conversation.conv_templates[version])
    for turns in (TURNS[:2], TURNS):
        assert set(train.preprocess([rows(turns)], tokenizer, has_image=True)["labels"][0].tolist()) == {-100}


@pytest.mark.parametrize(
    ("version", "written"), [("v1", "v1"), ("llava_llama_2", "llava_llama_2"), ("plain", "before")]
)
def test_the_config_says_the_template_of_stage_2(tmp_path, monkeypatch, version, written):
    """Upstream's own too, in place of the one that an earlier training wrote; stage 1 has none."""
    from llava import conversation

    from llava_clipmoe.compat.conversations import prepare_training

    tokenizer = AutoTokenizer.from_pretrained(make_language_model(tmp_path / "llama"), use_fast=False)
    tokenizer.pad_token = tokenizer.unk_token
    monkeypatch.setattr(conversation, "default_conversation", conversation.conv_templates[version])
    one = trained("llava_llama", tokenizer)
    setattr(one.config, FIELD, "before")
    prepare_training(SimpleNamespace(tokenizer=tokenizer), one)
    assert getattr(one.config, FIELD) == written
    assert tokenizer.pad_token == tokenizer.unk_token and one.generation_config.eos_token_id == 7  # as upstream's
