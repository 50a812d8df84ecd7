"""A LLaVA of upstream's format becomes one that transformers alone runs: the same logits, the same answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from test_fusion_gate import make_fmoe

from llava_clipmoe import export, files, llava_hook
from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.cli import _message
from llava_clipmoe.compression import compress
from llava_clipmoe.export import export_hf, main
from llava_clipmoe.files import SaveError, load_tensors, read_json, save_tensors, write_json
from llava_clipmoe.load import load_bundle
from llava_clipmoe.model_directory import save_bundle
from llava_clipmoe.registration import register_auto_classes
from llava_clipmoe.tokenizer import load_tokenizer
from llava_clipmoe.tower_registry import UnknownTower

spm = pytest.importorskip("sentencepiece", reason="the LLM's tokenizer needs sentencepiece")
VERSION_5 = transformers.__version__.startswith("5.")
IMAGE_TOKEN_INDEX = -200  # llava/constants.py
PATCHES = 9  # 24 pixels in patches of 8
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QUESTION = "How many cats are in the picture?"
PROMPT = f"{SYSTEM} USER: <image>\n{QUESTION} ASSISTANT:"  # conv_vicuna_v1


@pytest.fixture(scope="module")
def llava():
    """Upstream's LlavaLlamaForCausalLM, taught our towers."""
    llava_hook.install()
    pytest.importorskip("llava.constants", reason="upstream LLaVA (llava-torch) is not installed")
    from llava.model.language_model import llava_llama

    return llava_llama


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory) -> Path:
    """A sentencepiece model like Llama's: BPE with bytes, <unk> <s> </s> first."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentences = [SYSTEM, f"USER: {QUESTION} ASSISTANT: There are two cats.", "What is the colour of the ball? Red."]
    (folder / "text.txt").write_text("\n".join(sentences * 5))
    spm.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=360, model_type="bpe",
        byte_fallback=True, pad_id=-1, unk_id=0, bos_id=1, eos_id=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


def make_tower(model, folder: Path) -> Path:
    vocabulary = folder / "clip-tokenizer"
    vocabulary.mkdir()
    tokens = [*"abcdefghijklmnopqrstuvwxyz", *(f"{x}</w>" for x in "abcdefghijklmnopqrstuvwxyz")]
    tokens += [f"unused{i}" for i in range(97 - len(tokens))] + ["<|startoftext|>", "<|endoftext|>"]
    (vocabulary / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (vocabulary / "merges.txt").write_text("#version: 0.2\n")
    tower = folder / "tower"
    save_bundle(ClipBundle(model, load_tokenizer(vocabulary, 16)), tower)
    return tower


def make_llava(llava, tower: Path, tokenizer_model: Path, folder: Path, **settings) -> Path:
    """A tiny upstream LLaVA directory, saved as its trainer saves it; `settings` go into the config."""
    vocabulary = spm.SentencePieceProcessor(model_file=str(tokenizer_model)).vocab_size()
    config = llava.LlavaConfig(**{
        "vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
        "mm_vision_tower": str(tower), "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 48,
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "image_aspect_ratio": "pad",
        "use_mm_proj": True, "tune_mm_mlp_adapter": False, **settings,
    })  # fmt: skip
    torch.manual_seed(7)
    model = llava.LlavaLlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.15 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    shutil.copyfile(tokenizer_model, folder / "tokenizer.model")
    write_json(folder / "tokenizer_config.json", {
        "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "legacy": False, "model_max_length": 512, "pad_token": "<unk>", "tokenizer_class": "LlamaTokenizer",
    })  # fmt: skip
    return folder


@pytest.fixture
def moe_tower(tiny_moe, tmp_path) -> Path:
    return make_tower(tiny_moe, tmp_path)


@pytest.fixture
def dense_tower(tiny_dense, tmp_path) -> Path:
    return make_tower(tiny_dense, tmp_path)


@pytest.fixture
def source(llava, moe_tower, tokenizer_model, tmp_path) -> Path:
    """A tiny LLaVA-1.5 with a CLIP-MoE tower."""
    return make_llava(llava, moe_tower, tokenizer_model, tmp_path / "llava-tiny")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Not square, and with a gradient both ways: padding, cropping and turning all show."""
    picture = Image.new("RGB", (60, 40))
    picture.putdata([(4 * x, 6 * y, 3 * (x + y) % 256) for y in range(40) for x in range(60)])
    return picture


class Upstream:
    """The original: asked the way llava/eval/model_vqa_loader.py asks."""

    def __init__(self, llava, directory: Path, tokenizer_class: str = "LlamaTokenizer"):
        self.model = llava.LlavaLlamaForCausalLM.from_pretrained(directory, torch_dtype=torch.float32).eval()
        self.tower = self.model.get_vision_tower()
        if not self.tower.is_loaded:
            self.tower.load_model()
        self.tower.to(torch.float32)
        self.tokenizer = getattr(transformers, tokenizer_class).from_pretrained(directory, use_fast=False)

    def ids(self, prompt: str = PROMPT) -> torch.Tensor:
        from llava.mm_utils import tokenizer_image_token

        return tokenizer_image_token(prompt, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        from llava.mm_utils import process_images

        return process_images([picture], self.tower.image_processor, self.model.config)

    def logits(self, pixels: torch.Tensor, prompt: str = PROMPT) -> torch.Tensor:
        with torch.no_grad():
            return self.model(self.ids(prompt), images=pixels).logits

    def answer(self, pixels: torch.Tensor, prompt: str = PROMPT) -> list[int]:
        ids = self.ids(prompt)
        with torch.inference_mode():
            answer = self.model.generate(ids, images=pixels, do_sample=False, max_new_tokens=12)[0].tolist()
        return answer if VERSION_5 else answer[1:]  # 4.37 puts a <s> before what it made from embeddings


class Exported:
    """What transformers makes of the exported directory."""

    def __init__(self, directory: Path, family: str = "Llava", **kwargs):
        register_auto_classes()
        whole = getattr(transformers, f"{family}ForConditionalGeneration")
        self.model = whole.from_pretrained(directory, **kwargs).eval()
        if VERSION_5:
            self.processor = transformers.AutoProcessor.from_pretrained(directory)
        else:  # 4.37's LlavaProcessor refuses the settings that version 5 cannot do without
            self.processor = transformers.LlavaProcessor(
                transformers.CLIPImageProcessor.from_pretrained(directory),
                transformers.LlamaTokenizerFast.from_pretrained(directory),
            )

    def inputs(self, picture: Image.Image, pixels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        inputs = dict(self.processor(text=PROMPT, images=picture, return_tensors="pt"))
        return inputs if pixels is None else {**inputs, "pixel_values": pixels}

    def logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(**inputs).logits

    def answer(self, inputs: dict[str, torch.Tensor]) -> list[int]:
        with torch.inference_mode():
            out = self.model.generate(**inputs, do_sample=False, max_new_tokens=12)
        return out[0, inputs["input_ids"].shape[1] :].tolist()


def assert_same(upstream: Upstream, exported: Exported, picture: Image.Image) -> None:
    pixels = upstream.pixels(picture)
    inputs = exported.inputs(picture, pixels)
    expected, got = upstream.logits(pixels), exported.logits(inputs)
    assert got.shape[:2] == expected.shape[:2]
    assert (got[..., : expected.shape[-1]] - expected).abs().max() < 1e-4
    assert expected.std() > 0.1  # random weights that say nothing would pass
    answer, reference = exported.answer(inputs), upstream.answer(pixels)
    assert answer[: len(reference)] == reference and len(reference) > 1


# ----------------------------------------------------------------------------------------------------------- same model


def test_a_llava_with_experts_gives_the_same_logits_and_answers(llava, source, tmp_path, picture):
    config = export_hf(source, tmp_path / "out")
    exported = Exported(tmp_path / "out")
    assert config["vision_config"]["model_type"] == "clip_moe_vision_model"
    assert_same(Upstream(llava, source), exported, picture)


def test_a_llava_with_a_dense_tower_gives_the_same_logits_and_answers(
    llava, dense_tower, tokenizer_model, tmp_path, picture
):
    source = make_llava(llava, dense_tower, tokenizer_model, tmp_path / "llava-dense")
    export_hf(source, tmp_path / "out")
    exported = Exported(tmp_path / "out")
    assert type(vision_model(exported)).__name__ == "CLIPVisionModel"
    assert_same(Upstream(llava, source), exported, picture)


@pytest.mark.parametrize("kind", ["a fusion gate", "delta experts"])
def test_every_kind_of_experts_is_exported(kind, llava, tiny_dense, tiny_moe, tokenizer_model, tmp_path, picture):
    model = make_fmoe(tiny_dense) if kind == "a fusion gate" else compress(tiny_moe, rank=4)[0]
    source = make_llava(llava, make_tower(model, tmp_path), tokenizer_model, tmp_path / "llava-kind")
    vision = export_hf(source, tmp_path / "out")["vision_config"]
    assert bool(vision.get("fusion_gate")) == (kind == "a fusion gate")
    assert bool(vision.get("delta_ranks")) == (kind == "delta experts")
    assert_same(Upstream(llava, source), Exported(tmp_path / "out"), picture)


def vision_model(exported: Exported) -> torch.nn.Module:
    return exported.model.model.vision_tower if VERSION_5 else exported.model.vision_tower


@pytest.mark.parametrize("tower", ["moe_tower", "dense_tower"])
def test_every_selection_of_features_is_kept(llava, tower, tokenizer_model, tmp_path, picture, request):
    """Class token included, and the last hidden state: "full" and -1."""
    settings = {"mm_vision_select_feature": "cls_patch", "mm_vision_select_layer": -1}
    source = make_llava(llava, request.getfixturevalue(tower), tokenizer_model, tmp_path / "llava-all", **settings)
    config = export_hf(source, tmp_path / "out")
    assert config["image_seq_length"] == PATCHES + 1
    assert_same(Upstream(llava, source), Exported(tmp_path / "out"), picture)


def test_tied_embeddings_stay_tied(llava, moe_tower, tokenizer_model, tmp_path, picture):
    source = make_llava(llava, moe_tower, tokenizer_model, tmp_path / "llava-tied", tie_word_embeddings=True)
    export_hf(source, tmp_path / "out")
    assert "language_model.lm_head.weight" not in load_tensors(tmp_path / "out")
    assert_same(Upstream(llava, source), Exported(tmp_path / "out"), picture)


def test_a_head_that_is_not_the_tied_embedding_is_refused(llava, moe_tower, tokenizer_model, tmp_path):
    source = make_llava(llava, moe_tower, tokenizer_model, tmp_path / "llava-tied", tie_word_embeddings=True)
    state = load_tensors(source)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    save_tensors(source / "model.safetensors", state, {"format": "pt"})
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        export_hf(source, tmp_path / "out")


def test_the_experts_run_in_the_exported_model(source, tmp_path, picture):
    export_hf(source, tmp_path / "out")
    exported = Exported(tmp_path / "out")
    inputs = exported.inputs(picture)
    before = exported.logits(inputs)
    experts = vision_model(exported).vision_model.encoder.layers[0].mlp.experts
    with torch.no_grad():
        experts.fc2.weight[0].zero_()
    assert (exported.logits(inputs) - before).abs().max() > 1e-3


def test_bf16_weights_stay_bf16(llava, moe_tower, tokenizer_model, tmp_path, picture):
    """Each tensor keeps its dtype; the config says the LLM's, which transformers 5 loads in."""
    source = make_llava(llava, moe_tower, tokenizer_model, tmp_path / "llava-bf16")
    save_tensors(
        source / "model.safetensors", {k: v.bfloat16() for k, v in load_tensors(source).items()}, {"format": "pt"}
    )
    config = read_json(source / "config.json")
    config.pop("dtype", None)
    write_json(source / "config.json", {**config, "torch_dtype": "bfloat16"})
    export_hf(source, tmp_path / "out")
    state = load_tensors(tmp_path / "out")
    assert state["language_model.lm_head.weight"].dtype == torch.bfloat16
    assert state["vision_tower.vision_model.encoder.layers.0.mlp.router.weight"].dtype == torch.float32
    assert Exported(tmp_path / "out", torch_dtype="auto").model.dtype == torch.bfloat16
    assert_same(Upstream(llava, source), Exported(tmp_path / "out", torch_dtype=torch.float32), picture)


def test_shards_and_pickled_weights_are_read_and_shards_written(llava, source, tmp_path, picture, monkeypatch):
    """Old checkpoints are pytorch_model.bin in several files; what is written has an index of its own."""
    state = load_tensors(source)
    names = sorted(state)
    halves = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    old = tmp_path / "llava-old"
    shutil.copytree(source, old, ignore=shutil.ignore_patterns("*.safetensors*"))
    for file, part in halves.items():
        torch.save({name: state[name] for name in part}, old / file)
    index = {name: file for file, part in halves.items() for name in part}
    write_json(old / "pytorch_model.bin.index.json", {"weight_map": index})
    monkeypatch.setattr(export, "_SHARD_BYTES", 100_000)
    export_hf(old, tmp_path / "out")
    weight_map = read_json(tmp_path / "out" / "model.safetensors.index.json")["weight_map"]
    assert len(set(weight_map.values())) > 3
    assert {file.name for file in (tmp_path / "out").glob("*.safetensors")} == set(weight_map.values())
    assert_same(Upstream(llava, source), Exported(tmp_path / "out"), picture)


def test_a_copy_of_the_tower_in_the_checkpoint_is_ignored_as_upstream_ignores_it(llava, source, tmp_path, picture):
    """Full fine-tuning saves the frozen tower too, with the blocks it had loaded."""
    state = load_tensors(source)
    state["model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight"] = torch.full((48,), 9.0)
    save_tensors(source / "model.safetensors", state, {"format": "pt"})
    export_hf(source, tmp_path / "out")
    assert_same(Upstream(llava, source), Exported(tmp_path / "out"), picture)


def test_a_dense_tower_that_was_trained_comes_from_the_checkpoint(
    llava, dense_tower, tokenizer_model, tmp_path, picture
):
    """unfreeze_mm_vision_tower: upstream loads the checkpoint's tower then, not the one of the directory."""
    source = make_llava(llava, dense_tower, tokenizer_model, tmp_path / "llava", unfreeze_mm_vision_tower=True)
    trained = load_tensors(source)
    prefix = "model.vision_tower.vision_tower."
    for name, tensor in load_tensors(dense_tower).items():
        if name.startswith("vision_model."):
            trained[prefix + name] = 1.5 * tensor
    for name in [n for n in trained if n.startswith(prefix) and not n.startswith(prefix + "vision_model.")]:
        del trained[name]  # as transformers 5 saved it
    save_tensors(source / "model.safetensors", trained, {"format": "pt"})
    export_hf(source, tmp_path / "out")
    written = load_tensors(tmp_path / "out")["vision_tower.vision_model.pre_layrnorm.weight"]
    assert torch.equal(written, trained[prefix + "vision_model.pre_layrnorm.weight"])


# ------------------------------------------------------------------------------------------------ tokenizer, processor


def test_the_processor_gives_the_token_ids_of_upstream(llava, source, tmp_path, picture):
    export_hf(source, tmp_path / "out")
    exported = Exported(tmp_path / "out")
    image = exported.model.config.image_token_index
    (places,) = (Upstream(llava, source).ids()[0] == IMAGE_TOKEN_INDEX).nonzero(as_tuple=True)
    (ids,) = Upstream(llava, source).ids().tolist()
    times = PATCHES if VERSION_5 else 1  # transformers 4.37 makes the room in the model
    ids[places : places + 1] = [image] * times
    assert exported.inputs(picture)["input_ids"][0].tolist() == ids
    assert image >= exported.processor.tokenizer.vocab_size - 1
    assert exported.model.get_input_embeddings().num_embeddings % 64 == 0


def test_the_template_is_vicuna_v1(llava, source, tmp_path):
    from llava.conversation import conv_templates

    export_hf(source, tmp_path / "out")
    tokenizer = Exported(tmp_path / "out").processor.tokenizer
    conversation = conv_templates["vicuna_v1"].copy()
    turns = ["<image>\nWhat is this?", "A cat.", "Which colour?", None]
    for role, text in zip([*conversation.roles] * 2, turns, strict=True):
        conversation.append_message(role, text)
    picture_first = [{"type": "text", "text": "What is this?"}, {"type": "image"}]
    for first in (turns[0], picture_first):
        messages = [
            {"role": role, "content": text}
            for role, text in zip(["user", "assistant", "user"], [first, *turns[1:3]], strict=True)
        ]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert prompt == conversation.get_prompt()


@pytest.mark.skipif(not VERSION_5, reason="the image processor of transformers 4.37 does not pad; the README says so")
@pytest.mark.parametrize("aspect", ["pad", None])
def test_pictures_are_made_square_as_upstream_does(llava, moe_tower, tokenizer_model, tmp_path, picture, aspect):
    source = make_llava(llava, moe_tower, tokenizer_model, tmp_path / "llava", image_aspect_ratio=aspect)
    export_hf(source, tmp_path / "out")
    expected = Upstream(llava, source).pixels(picture)
    got = Exported(tmp_path / "out").inputs(picture)["pixel_values"]
    assert (got - expected).abs().max() < 0.02
    other = Upstream(llava, source)
    other.model.config.image_aspect_ratio = None if aspect else "pad"
    assert (other.pixels(picture) - expected).abs().max() > 0.5


_STRANGER = """
import sys, torch, transformers
sys.modules["llava_clipmoe"] = None
class_name = sys.argv[1]
inputs, logits = torch.load("inputs.pt"), torch.load("logits.pt")
version_5 = transformers.__version__.startswith("5.")
names = ["AutoModelForImageTextToText", "AutoModelForMultimodalLM"] if version_5 else ["AutoModelForVision2Seq"]
for name in names:
    model = getattr(transformers, name).from_pretrained("out", trust_remote_code=True).eval()
    assert type(model).__name__ == class_name  # servers look it up by this name
    assert "transformers_modules" in type(model).__module__
    with torch.no_grad():
        assert (model(**inputs).logits - logits).abs().max() < 1e-5, name
base = transformers.AutoModel.from_pretrained("out", trust_remote_code=True).eval()
with torch.no_grad():
    out = base(**inputs)
    got = model.lm_head(out.last_hidden_state) if version_5 else out.logits
assert (got - logits).abs().max() < 1e-5
if version_5:
    transformers.AutoProcessor.from_pretrained("out", trust_remote_code=True)
# transformers' own class, in the same process: what the remote code registered under its name does it no harm
own = getattr(transformers, class_name).from_pretrained("out").eval()
assert type(own) is getattr(transformers, class_name)
with torch.no_grad():
    assert (own(**inputs).logits - logits).abs().max() < 1e-5
"""


def check_as_a_stranger(exported: Exported, inputs: dict[str, torch.Tensor], folder: Path) -> None:
    """That a process which cannot import llava_clipmoe opens `folder`/out and gets the same logits, by each Auto class
    that a consumer may ask."""
    import os
    import subprocess
    import sys

    torch.save(inputs, folder / "inputs.pt")
    torch.save(exported.logits(inputs), folder / "logits.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "LLAVA_CLIPMOE_HOOK": "0"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", _STRANGER, type(exported.model).__name__]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_trust_remote_code_loads_it_without_the_package(llava, source, tmp_path, picture):
    export_hf(source, tmp_path / "out")
    exported = Exported(tmp_path / "out")
    check_as_a_stranger(exported, exported.inputs(picture), tmp_path)


# ------------------------------------------------------------------------------------------------------------ refusals


def change_config(source: Path, **settings) -> Path:
    write_json(source / "config.json", {**read_json(source / "config.json"), **settings})
    return source


def test_what_cannot_be_expressed_is_refused(source, tmp_path):
    for settings, words in [
        ({"mm_projector_type": "linear"}, "projector is 'linear'.*two layers"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mlp3x_gelu"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "'spatial_unpad', but it sees no tiles"),
        ({"s2": True}, "S2"),
    ]:
        before = (source / "config.json").read_text()
        with pytest.raises(ValueError, match=words):
            export_hf(change_config(source, **settings), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        (source / "config.json").write_text(before)


def test_what_is_no_llava_is_refused(source, moe_tower, tmp_path):
    with pytest.raises(ValueError, match=r"not a LLaVA.*clip_moe"):
        export_hf(moe_tower, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        export_hf(tmp_path, tmp_path / "out")
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="merge_lora_weights"):
        export_hf(source, tmp_path / "out")


def test_a_stage_1_directory_is_refused(source, tmp_path):
    (source / "model.safetensors").unlink()
    (source / "mm_projector.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="stage 1"):
        export_hf(source, tmp_path / "out")


def test_an_unregistered_tower_fails_with_the_command_that_registers_it(source, moe_tower, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_CLIPMOE_CONFIG_DIR", str(tmp_path / "config"))
    change_config(source, mm_vision_tower="clipmoe-336")
    with pytest.raises(UnknownTower, match="llava-clipmoe register clipmoe-336"):
        export_hf(source, tmp_path / "out")
    monkeypatch.setenv("LLAVA_CLIPMOE_TOWERS", f"clipmoe-336={moe_tower}")
    export_hf(source, tmp_path / "out")
    monkeypatch.delenv("LLAVA_CLIPMOE_TOWERS")
    export_hf(source, tmp_path / "other", vision_tower=str(moe_tower))


def test_another_tower_is_refused(source, tmp_path, moe_tower):
    with pytest.raises(ValueError, match="48 wide, the projector reads 1024"):
        export_hf(change_config(source, mm_hidden_size=1024), tmp_path / "out")


@pytest.mark.parametrize("damage", ["missing", "misshapen", "unexpected"])
def test_weights_that_do_not_fit_are_refused(source, tmp_path, damage):
    state = load_tensors(source)
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "unexpected":
        state["model.image_newline"] = torch.zeros(64)
    else:
        tensor = state.pop(name)
        state.update({name: tensor[:-1]} if damage == "misshapen" else {})
    save_tensors(source / "model.safetensors", state, {"format": "pt"})
    with pytest.raises(ValueError, match="image_newline" if damage == "unexpected" else "up_proj"):
        export_hf(source, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_an_export_can_be_given_away(source, tmp_path):
    """It names no path of this machine, though the LLaVA that it comes from names its tower by one."""
    assert str(tmp_path) in (source / "config.json").read_text()
    export_hf(source, tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file


def test_only_an_earlier_export_is_replaced_and_only_when_asked(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="not replaced"):
            export_hf(source, out, overwrite=overwrite)
    assert (out / "thesis.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="not replaced"):
        export_hf(source, source, overwrite=True)
    (out / "thesis.txt").unlink()
    export_hf(source, out)
    with pytest.raises(ValueError, match="--overwrite"):
        export_hf(source, out)
    (out / "stale").write_text("")
    export_hf(source, out, overwrite=True)
    assert not (out / "stale").exists()


def test_a_full_disk_leaves_nothing_half_written(source, tmp_path, monkeypatch):
    export_hf(source, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(export, "_SHARD_BYTES", 100_000)
    real, calls = files.save_tensors, []

    def full(path, tensors, metadata=None):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(path, tensors, metadata)

    monkeypatch.setattr(files, "save_tensors", full)
    with pytest.raises(SaveError, match="No space left"):
        export_hf(source, tmp_path / "out", overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert not list(tmp_path.glob(".out*"))


def test_the_command_writes_and_says_what(source, tmp_path, capsys):
    assert main([str(source), str(tmp_path / "out")]) == 0
    assert "clip_moe_vision_model" in capsys.readouterr().out
    with pytest.raises(ValueError) as error:
        main([str(source), str(tmp_path / "out")])
    assert "--overwrite" in (_message(error.value) or "")
    load_bundle(read_json(source / "config.json")["mm_vision_tower"])  # the tower is only read
