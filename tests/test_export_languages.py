"""LLaVAs of Llama 3, Qwen2 and Qwen3 become ones that transformers alone runs: the same prompt, logits and answers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from test_export import IMAGE_TOKEN_INDEX, Exported, Upstream, llava, moe_tower, picture  # noqa: F401
from tiny.language_models import ROPE_3_1, make_llama_3, make_qwen_2, make_qwen_3

from llava_clipmoe.conversations import FIELD, TEMPLATES
from llava_clipmoe.export import export_hf
from llava_clipmoe.files import load_tensors, read_json, save_tensors, write_json

PINNED = os.environ.get("LLAVA_CLIPMOE_PINNED_PYTHON")
VERSION_5 = transformers.__version__.startswith("5.")
KINDS = {"llama": (make_llama_3, "llama_3"), "qwen2": (make_qwen_2, "qwen_2"), "qwen3": (make_qwen_3, "qwen_2")}
QUESTION = "How many cats are in the picture, 2 or  3?"
PATCHES, WIDTH = 9, 48  # of the tiny tower


@pytest.fixture(params=list(KINDS))
def kind(request, llava) -> str:  # noqa: F811
    """Of the language model; those that the installed transformers has."""
    if request.param not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {request.param}")
    return request.param


def make_llava(kind: str, tower: Path, folder: Path, **settings) -> Path:
    """A tiny LLaVA in upstream's format of a language model of this kind, as its stage 2 writes it."""
    llm = KINDS[kind][0](folder / kind)
    language = read_json(llm / "config.json")
    source = folder / f"llava-{kind}"
    source.mkdir()
    for file in llm.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, source / file.name)
    write_json(source / "config.json", {
        **language, "model_type": f"llava_{kind}", "architectures": ["Llava"], "mm_vision_tower": str(tower),
        "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": WIDTH, "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "mm_patch_merge_type": "flat", "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False, "image_aspect_ratio": "pad", "use_mm_proj": True, **settings,
    })  # fmt: skip
    torch.manual_seed(3)
    width = language["hidden_size"]
    state = load_tensors(llm)
    for layer, inputs in ((0, WIDTH), (2, width)):
        state[f"model.mm_projector.{layer}.weight"] = 0.3 * torch.randn(width, inputs)
        state[f"model.mm_projector.{layer}.bias"] = 0.3 * torch.randn(width)
    if "unpad" in settings.get("mm_patch_merge_type", ""):
        state["model.image_newline"] = torch.randn(width)
    save_tensors(source / "model.safetensors", state, {"format": "pt"})
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    LlavaLlamaForCausalLM.from_pretrained(source).save_pretrained(source)  # the files are upstream's own
    return source


def upstream_prompt(conversation: str, turns: list[str]) -> str:
    """Of upstream's Conversation, the user's and the assistant's texts by turns; the assistant's turn comes next."""
    from llava.conversation import conv_templates

    asked = conv_templates[conversation].copy()
    for i, text in enumerate([*turns, None]):
        asked.append_message(asked.roles[i % 2], text)
    return asked.get_prompt()


def test_logits_answers_and_prompts_are_upstreams(kind, llava, moe_tower, tmp_path, picture):  # noqa: F811
    source = make_llava(kind, moe_tower, tmp_path)
    config = export_hf(source, tmp_path / "out")
    upstream, exported = Upstream(llava, source, "AutoTokenizer"), Exported(tmp_path / "out")
    tokenizer, image = exported.processor.tokenizer, config["image_token_index"]
    question = [{"type": "text", "text": QUESTION}, {"type": "image"}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == upstream_prompt(KINDS[kind][1], [f"<image>\n{QUESTION}"])
    ids = upstream.ids(prompt)[0].tolist()
    inputs = dict(exported.processor(text=prompt, images=picture, return_tensors="pt"))
    place, times = ids.index(IMAGE_TOKEN_INDEX), PATCHES if VERSION_5 else 1  # 4.37 makes the room in the model
    assert inputs["input_ids"][0].tolist() == [*ids[:place], *[image] * times, *ids[place + 1 :]]
    assert ids.count(upstream.tokenizer.bos_token_id) == (kind == "llama")
    pixels = upstream.pixels(picture)
    expected, got = upstream.logits(pixels, prompt), exported.logits({**inputs, "pixel_values": pixels})
    assert got.shape[:2] == expected.shape[:2] and expected.std() > 0.1
    assert (got[..., : expected.shape[-1]] - expected).abs().max() < 1e-4
    answer, known = exported.answer({**inputs, "pixel_values": pixels}), upstream.answer(pixels, prompt)
    assert answer[: len(known)] == known and len(known) > 1
    assert (exported.logits({**inputs, "pixel_values": pixels.flip(-1)}) - got).abs().max() > 1e-2  # it looks


@pytest.mark.parametrize("conversation", list(TEMPLATES))
def test_the_chat_template_is_the_conversations(conversation, llava, moe_tower, tmp_path):  # noqa: F811
    """Several turns, with a system's turn of one's own or not; as text and as parts."""
    kind = {"llama_3": "llama", "qwen_2": "qwen2"}[conversation]
    export_hf(make_llava(kind, moe_tower, tmp_path), tmp_path / "out")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    turns = ["<image>\nWhat is this?", "A cat.", "Which colour?"]
    expected = upstream_prompt(conversation, turns)
    picture_first = [{"type": "text", "text": "What is this?"}, {"type": "image"}]
    for first in (turns[0], picture_first):
        messages = [
            {"role": role, "content": text}
            for role, text in zip(["user", "assistant", "user"], [first, *turns[1:]], strict=True)
        ]
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == expected
        answered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert answered == expected.removesuffix(TEMPLATES[conversation].assistant_head)
        own = [{"role": "system", "content": [{"type": "text", "text": "Be short."}]}, *messages]
        prompt = tokenizer.apply_chat_template(own, add_generation_prompt=True, tokenize=False)
        assert prompt == expected.replace(TEMPLATES[conversation].system, "Be short.")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == tokenizer.chat_template


def test_the_template_is_the_one_of_the_training(llava, moe_tower, tmp_path):  # noqa: F811
    """What stage 2 wrote into the config counts more than the kind of the language model."""
    source = make_llava("qwen2", moe_tower, tmp_path, **{FIELD: "vicuna_v1"})
    export_hf(source, tmp_path / "out")
    assert "USER: " in (tmp_path / "out" / "chat_template.jinja").read_text()
    assert "conversation vicuna_v1" in (tmp_path / "out" / "README.md").read_text()


def test_the_language_models_config_is_its_own(kind, moe_tower, tmp_path):  # noqa: F811
    """Every field: none left to a default of transformers that this language model does not have."""
    unusual = {
        "llama": {"rms_norm_eps": 2e-5},
        "qwen2": {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1, "layer_types": None},
        "qwen3": {"sliding_window": 4096, "attention_bias": False},
    }[kind]
    source = make_llava(kind, moe_tower, tmp_path, **unusual)
    given = {**read_json(tmp_path / kind / "config.json"), **unusual}
    own = transformers.AutoConfig.for_model(**given).to_dict()
    config = export_hf(source, tmp_path / "out")
    exported = transformers.AutoConfig.for_model(**config["text_config"]).to_dict()
    ignored = {"vocab_size", "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}
    different = {name for name in own if name not in ignored and own[name] != exported.get(name)}
    assert not different, {name: (own[name], exported.get(name)) for name in different}
    if kind == "qwen3":
        assert config["text_config"]["sliding_window"] is None


def test_an_answer_ends_where_the_conversation_ends(kind, moe_tower, tmp_path):  # noqa: F811
    """Of an instruction model all its end tokens, in their order; of a base model, whose own ends a document, the
    conversation's too. Batches can be padded, and no token is invented."""
    source = make_llava(kind, moe_tower, tmp_path)
    ends = read_json(source / "generation_config.json")["eos_token_id"]
    export_hf(source, tmp_path / "out")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    written = read_json(tmp_path / "out" / "generation_config.json")
    end = tokenizer.convert_tokens_to_ids(TEMPLATES[KINDS[kind][1]].end_token)
    assert written["eos_token_id"] == ends and end in ends
    pad = {"llama": "<|eot_id|>"}.get(kind, "<|endoftext|>")
    assert tokenizer.pad_token == pad and written["pad_token_id"] == tokenizer.convert_tokens_to_ids(pad)
    assert (tokenizer.bos_token is None) == (kind != "llama") and tokenizer.unk_token is None
    assert len(tokenizer) == tokenizer.convert_tokens_to_ids("<image>") + 1
    (source / "generation_config.json").unlink()
    document = next(token for token in ends if token != end)
    write_json(source / "config.json", {**read_json(source / "config.json"), "eos_token_id": document})
    settings = read_json(source / "tokenizer_config.json")
    base = {**settings, "eos_token": tokenizer.convert_ids_to_tokens(document)}
    write_json(source / "tokenizer_config.json", base)
    export_hf(source, tmp_path / "out", overwrite=True)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert tokenizer.eos_token_id == end  # lmms-eval asks the tokenizer
    assert read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [document, end]


@pytest.mark.skipif(VERSION_5, reason="transformers 5 has them all")
def test_an_old_transformers_says_what_to_install(llava, moe_tower, tmp_path):  # noqa: F811
    source = make_llava("llama", moe_tower, tmp_path)
    write_json(source / "config.json", {**read_json(source / "config.json"), "rope_scaling": ROPE_3_1})
    with pytest.raises(ValueError, match=r"4\.37.*pip install -U transformers"):
        export_hf(source, tmp_path / "out")
    write_json(source / "config.json", {**read_json(source / "config.json"), "model_type": "llava_qwen3"})
    with pytest.raises(ValueError, match=r"4\.37.*has no qwen3.*pip install -U transformers"):
        export_hf(source, tmp_path / "out")


_IN_4_37 = """
import sys, torch, transformers
sys.modules["llava_clipmoe"] = None
for kind in sys.argv[1:]:
    case = torch.load(f"{kind}.pt")
    model = transformers.AutoModelForVision2Seq.from_pretrained(case["directory"], trust_remote_code=True).eval()
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor.from_pretrained(case["directory"]),
        transformers.LlamaTokenizerFast.from_pretrained(case["directory"]),
    )
    assert len(processor.tokenizer) == case["tokens"], kind  # LlamaTokenizerFast has no <s>, <unk> of its own to add
    prompt = processor.tokenizer.apply_chat_template(case["messages"], add_generation_prompt=True, tokenize=False)
    inputs = processor(text=prompt, return_tensors="pt")
    with torch.no_grad():
        logits = model(**{**inputs, "pixel_values": case["pixel_values"]}).logits
    assert logits.shape == case["logits"].shape, (kind, logits.shape)
    assert (logits - case["logits"]).abs().max() < 1e-4, kind
print(transformers.__version__)
"""


@pytest.mark.skipif(not PINNED, reason="LLAVA_CLIPMOE_PINNED_PYTHON is not set")
def test_transformers_4_37_opens_what_it_has(llava, moe_tower, tmp_path, picture):  # noqa: F811
    """Llama 3 and Qwen2, exported under transformers 5, in a process that cannot import llava_clipmoe."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    for kind in ("llama", "qwen2"):
        export_hf(make_llava(kind, moe_tower, tmp_path), tmp_path / f"out-{kind}")
        exported = Exported(tmp_path / f"out-{kind}")
        prompt = exported.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = dict(exported.processor(text=prompt, images=picture, return_tensors="pt"))
        case = {"directory": str(tmp_path / f"out-{kind}"), "messages": messages, "logits": exported.logits(inputs)}
        case |= {"pixel_values": inputs["pixel_values"], "tokens": len(exported.processor.tokenizer)}
        torch.save(case, tmp_path / f"{kind}.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "LLAVA_CLIPMOE_HOOK": "0"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [PINNED, "-c", _IN_4_37, "llama", "qwen2"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout.startswith("4.37"), done.stderr[-3000:]
