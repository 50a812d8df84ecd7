"""LLaVAs of Llama 3, Qwen2 and Qwen3 become ones that transformers alone runs: the same prompt, logits and answers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from test_export import Exported, dense_tower, moe_tower, picture  # noqa: F401
from tiny.language_models import make_llama_3, make_qwen_2, make_qwen_3

from llava_clipmoe.conversations import FIELD, TEMPLATES
from llava_clipmoe.export import export_hf
from llava_clipmoe.export_files import upstream_ids
from llava_clipmoe.files import load_tensors, read_json, save_tensors, write_json
from llava_clipmoe.modeling_clipmoe import CLIPMoEVisionModel

VERSION_5 = transformers.__version__.startswith("5.")
KINDS = {"llama": (make_llama_3, "llama_3"), "qwen2": (make_qwen_2, "qwen_2"), "qwen3": (make_qwen_3, "qwen_2")}
QUESTION = "How many cats are in the picture, 2 or  3?"
PATCHES, WIDTH = 9, 48  # of the tiny tower


@pytest.fixture(params=list(KINDS))
def kind(request) -> str:
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
    state = {name: tensor for name, tensor in load_tensors(llm).items()}
    for layer, inputs in ((0, WIDTH), (2, width)):
        state[f"model.mm_projector.{layer}.weight"] = 0.3 * torch.randn(width, inputs)
        state[f"model.mm_projector.{layer}.bias"] = 0.3 * torch.randn(width)
    save_tensors(source / "model.safetensors", state, {"format": "pt"})
    return source


class Reference:
    """What upstream computes, from its parts: transformers' own language model reads the text's embeddings with the
    projected features of the picture in the place of <image>."""

    def __init__(self, source: Path):
        config, weights = read_json(source / "config.json"), load_tensors(source)
        llm = source.parent / config["model_type"].removeprefix("llava_")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(llm, use_fast=False)
        self.language_model = transformers.AutoModelForCausalLM.from_pretrained(llm).eval()
        self.tower = CLIPMoEVisionModel.from_pretrained(config["mm_vision_tower"]).eval()
        self.projector = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, config["hidden_size"]),
            torch.nn.GELU(),
            torch.nn.Linear(config["hidden_size"], config["hidden_size"]),
        )
        prefix = "model.mm_projector."
        self.projector.load_state_dict(
            {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        )

    def embeddings(self, ids: list[int], pixels: torch.Tensor) -> torch.Tensor:
        """ids: with -1 where the picture goes."""
        place = ids.index(-1)
        text = [torch.tensor([part]) for part in (ids[:place], ids[place + 1 :])]
        embed = self.language_model.get_input_embeddings()
        features = self.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        return torch.cat([embed(text[0]), self.projector(features), embed(text[1])], dim=1)

    @torch.no_grad()
    def logits(self, ids: list[int], pixels: torch.Tensor) -> torch.Tensor:
        return self.language_model(inputs_embeds=self.embeddings(ids, pixels)).logits

    @torch.no_grad()
    def answer(self, ids: list[int], pixels: torch.Tensor) -> list[int]:
        embeddings = self.embeddings(ids, pixels)
        out = self.language_model.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2]),
            do_sample=False,
            max_new_tokens=12,
        )[0].tolist()
        return out if VERSION_5 else out[1:]  # 4.37 puts a begin before what it made from embeddings


def upstream_prompt(conversation: str, *turns: str) -> str:
    """Upstream's Conversation (MPT style): the system's turn, then user and assistant by turns."""
    template = TEMPLATES[conversation]
    prompt = template.system_head + template.system + template.end
    for i, text in enumerate(turns):
        prompt += (template.assistant_head if i % 2 else template.user_head) + text + template.end
    return prompt + template.assistant_head


def test_logits_answers_and_prompts_are_upstreams(kind, moe_tower, tmp_path, picture):  # noqa: F811
    source = make_llava(kind, moe_tower, tmp_path)
    config = export_hf(source, tmp_path / "out")
    reference, exported = Reference(source), Exported(tmp_path / "out")
    tokenizer, image = exported.processor.tokenizer, config["image_token_index"]
    question = [{"type": "text", "text": QUESTION}, {"type": "image"}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == upstream_prompt(KINDS[kind][1], f"<image>\n{QUESTION}")
    ids = upstream_ids(reference.tokenizer, prompt, -1)
    inputs = dict(exported.processor(text=prompt, images=picture, return_tensors="pt"))
    place, times = ids.index(-1), PATCHES if VERSION_5 else 1  # 4.37 makes the room in the model
    assert inputs["input_ids"][0].tolist() == [*ids[:place], *[image] * times, *ids[place + 1 :]]
    pixels = inputs["pixel_values"]
    expected, got = reference.logits(ids, pixels), exported.logits(inputs)
    assert got.shape[:2] == expected.shape[:2] and expected.std() > 0.1
    assert (got[..., : expected.shape[-1]] - expected).abs().max() < 1e-4
    answer, known = exported.answer(inputs), reference.answer(ids, pixels)
    assert answer[: len(known)] == known and len(known) > 1
    other = exported.logits({**inputs, "pixel_values": pixels.flip(-1)})
    assert (other - got).abs().max() > 1e-2  # the picture counts


@pytest.mark.parametrize("conversation", list(TEMPLATES))
def test_the_chat_template_is_the_conversations(conversation, moe_tower, tmp_path):  # noqa: F811
    """Several turns, with a system's turn of one's own or not; as text and as parts."""
    kind = {"llama_3": "llama", "qwen_2": "qwen2"}[conversation]
    export_hf(make_llava(kind, moe_tower, tmp_path), tmp_path / "out")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    turns = ["<image>\nWhat is this?", "A cat.", "Which colour?"]
    expected = upstream_prompt(conversation, *turns)
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


def test_the_template_is_the_one_of_the_training(moe_tower, tmp_path):  # noqa: F811
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
def test_an_old_transformers_says_what_to_install(moe_tower, tmp_path):  # noqa: F811
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    source = make_llava("llama", moe_tower, tmp_path, rope_scaling={**scaled, "original_max_position_embeddings": 64})
    with pytest.raises(ValueError, match=r"4\.37.*pip install -U transformers"):
        export_hf(source, tmp_path / "out")
    write_json(source / "config.json", {**read_json(source / "config.json"), "model_type": "llava_qwen3"})
    with pytest.raises(ValueError, match=r"4\.37.*has no qwen3.*pip install -U transformers"):
        export_hf(source, tmp_path / "out")
