"""Makes what the LLaVA tests need, offline: a tiny random LLaMA with a real tokenizer, a tiny CLIP-MoE and CLIP as
tower directories, pictures, and conversations in LLaVA's format.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from PIL import Image

SENTENCES = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What colour is the square? ASSISTANT: It is red, green, blue or yellow.",
    "Answer the question using a single word or phrase. Describe the picture in one sentence.",
    "Provide a brief description of the given image. A small square in one plain colour.",
]
COLOURS = {"red": (220, 30, 30), "green": (30, 170, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}


def upstream_is_installed() -> bool:
    """Whether upstream LLaVA (llava-torch, or a checkout) is there; found without importing it, which takes seconds.

    The package called `llava` on the index is another project: it has no `llava.model`.
    """
    spec = importlib.util.find_spec("llava")
    places = (spec.submodule_search_locations or []) if spec is not None else []
    return any((Path(place) / "model" / "llava_arch.py").is_file() for place in places)


@contextmanager
def upstream_in_this_process() -> Iterator[None]:
    """Our hook in place; at the end torch is as before: upstream's loader switches its initialisation off for good."""
    from llava_clipmoe import llava_hook

    layers = torch.nn.Linear, torch.nn.LayerNorm
    before = [layer.reset_parameters for layer in layers]
    llava_hook.install()
    try:
        yield
    finally:
        for layer, reset in zip(layers, before, strict=True):
            layer.reset_parameters = reset


def make_language_model(folder: Path, hidden_size: int = 32) -> Path:
    """A random LLaMA of 2 blocks (fp32) with a sentencepiece tokenizer of its own, as a transformers directory."""
    import sentencepiece
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "sentences.txt"
    text.write_text("\n".join(SENTENCES * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=200, model_type="bpe", pad_id=-1,
        byte_fallback=False, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    text.unlink()
    (folder / "tokenizer.vocab").unlink()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": True,
                    "model_max_length": 512, **special})
    )  # fmt: skip
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200, hidden_size=hidden_size, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_tower(model: torch.nn.Module, folder: Path) -> Path:
    """Write a CLIP or CLIP-MoE as a model directory, with a tokenizer of its 99 tokens."""
    from llava_clipmoe.bundle import ClipBundle
    from llava_clipmoe.model_directory import save_bundle
    from llava_clipmoe.tokenizer import END, START, load_tokenizer

    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    tokens = [*letters, *(f"{x}</w>" for x in letters)]
    tokens += [f"unused{i}" for i in range(97 - len(tokens))] + [START, END]
    words = folder.with_name(folder.name + "-words")
    words.mkdir(parents=True, exist_ok=True)
    (words / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    save_bundle(ClipBundle(model, load_tokenizer(words, 16)), folder)
    return folder


def make_towers(folder: Path) -> tuple[Path, Path]:
    """-> (CLIP-MoE directory, dense CLIP directory) of one tiny CLIP: 24 px, 9 patches, width 48, 3 blocks."""
    from conftest import make_tiny_config, shake

    from llava_clipmoe.experts_clipmoe import Router
    from llava_clipmoe.modeling_clipmoe import CLIPMoEModel
    from llava_clipmoe.upcycling import ffn_state, moe_config, upcycle

    dense = shake(CLIPMoEModel(make_tiny_config()), seed=1).eval()
    stages = [ffn_state(shake(CLIPMoEModel(dense.config), seed).state_dict()) for seed in (2, 3, 4)]
    moe = upcycle(dense, stages, moe_config(dense.config, num_experts=4, num_experts_per_tok=2))
    for seed, router in enumerate((m for m in moe.modules() if isinstance(m, Router)), start=5):
        shake(router, seed)
    return save_tower(moe, folder / "clip-moe"), save_tower(dense, folder / "clip")


def make_data(folder: Path, count: int = 12) -> Path:
    """Pictures of plain squares, and their conversations: `folder`/data.json, `folder`/images/."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        name = list(COLOURS)[i % len(COLOURS)]
        Image.new("RGB", (40 + i, 30), COLOURS[name]).save(folder / "images" / f"{i}.png")
        turns = [("human", "<image>\nWhat colour is the square?"), ("gpt", f"It is {name}.")]
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": [{"from": f, "value": v} for f, v in turns]})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def make_llava(folder: Path, tower: Path, llm: Path, seed: int = 0, *, whole: bool = True, **settings) -> Path:
    """A LLaVA of the random weights that `seed` gives, with the tokenizer of `llm`; `settings` go into its config.

    whole: the directory of stage 2 (config, weights without the tower, tokenizer); otherwise that of stage 1 (config
    and mm_projector.bin, for `llm`). Upstream's loader wants "llava" in the folder's name.
    """
    from llava_clipmoe import llava_hook

    llava_hook.install()
    import llava.model.language_model.llava_llama  # noqa: F401  (registers the Auto classes)
    from transformers import AutoConfig, AutoModelForCausalLM

    language_model = json.loads((llm / "config.json").read_text())
    config = AutoConfig.for_model(**{
        **language_model, "model_type": f"llava_{language_model['model_type']}", "architectures": None,
        "mm_vision_tower": str(tower), "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 48, "use_mm_proj": True,
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "image_aspect_ratio": "pad",
        "tokenizer_model_max_length": 512, **settings,
    })  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.get_model().mm_projector.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))  # so large that another picture is another answer
        if hasattr(model.get_model(), "image_newline"):  # of tiles; upstream leaves it to what is loaded
            model.get_model().image_newline.copy_(torch.randn(config.hidden_size))
    if whole:
        model.save_pretrained(folder)
        names = "*token*", "vocab.json", "merges.txt", "generation_config.json"
        for file in chain.from_iterable(llm.glob(name) for name in names):
            shutil.copyfile(file, folder / file.name)
    else:
        config.save_pretrained(folder)
        kept = ("mm_projector", "image_newline")
        projector = {name: tensor for name, tensor in model.state_dict().items() if any(part in name for part in kept)}
        torch.save(projector, folder / "mm_projector.bin")
    return folder


def make_two_llavas(folder: Path) -> tuple[Path, Path]:
    """-> (LLaVA with a dense CLIP, another with its CLIP-MoE), whole directories; their language models differ."""
    llm, (moe, dense) = make_language_model(folder / "llama"), make_towers(folder)
    return make_llava(folder / "llava-v1-clip", dense, llm, 1), make_llava(folder / "llava-v1-clipmoe", moe, llm, 2)


def make_two_projectors(folder: Path) -> tuple[Path, Path, Path]:
    """-> (language model, dense CLIP and CLIP-MoE before it), the two as upstream's stage 1 leaves them."""
    llm, (moe, dense) = make_language_model(folder / "llama"), make_towers(folder)
    left = make_llava(folder / "llava-v1-clip-pretrain", dense, llm, 1, whole=False)
    return llm, left, make_llava(folder / "llava-v1-clipmoe-pretrain", moe, llm, 2, whole=False)
