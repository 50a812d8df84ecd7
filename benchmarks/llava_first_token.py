"""Time to the first token of LLaVA with each vision tower: one picture, one question, one generated token.

    python benchmarks/llava_first_token.py                 (random weights: ViT-L/14@336 towers, a Llama of 135M)
    python benchmarks/llava_first_token.py --language vicuna-7b --dtype fp16          (a GPU with 24 GB)
    python benchmarks/llava_first_token.py --llava CLIP=runs/llava-v1-clip CLIP-MoE=runs/llava-v1-clipmoe
    python benchmarks/llava_first_token.py --tiny

The LLaVAs that are made here are a tower, a projector and transformers' Llama, one language model behind all towers;
"CLIP" is transformers' dense tower as upstream runs it. Those of `--llava` are loaded and run by upstream's classes.
They take turns; ratios are against the first. The picture is already decoded and normalised, which costs the same for
all of them, and is another one in every round.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timing
import torch
import tyro
from PIL import Image
from torch import nn
from tower_variants import DTYPES, FULL, TINY, fast_path, make_directories, make_tower
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from llava_clipmoe import llava_hook
from llava_clipmoe.compat.loading import CPU_DTYPE

QUESTION = "What is in the picture? Answer in one sentence."
LANGUAGES = {
    "smollm2-135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                         num_key_value_heads=3, vocab_size=49152),
    "vicuna-7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                      num_key_value_heads=32, vocab_size=32000),
}  # fmt: skip
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=200)  # fmt: skip
MADE = {"CLIP": ("dense", "transformers"), "CLIP, our tower": ("dense-ours", "fast"), "CLIP-MoE": ("moe", "fast"),
        "delta": ("delta", "fast")}  # fmt: skip
"""Name in the table -> the tower's form and how it is run, of the LLaVAs that are made here."""
WARM = {"cpu": 1, "cuda": 5}
"""Rounds before the first timed one: CUDA graphs are made for a size that comes again."""


@dataclass(frozen=True)
class Settings:
    llava: tuple[str, ...] = ()
    """LLaVA directories as NAME=DIR, the one to compare with first. Default: made here, with random weights."""
    device: timing.Device = "auto"
    dtype: Literal["fp32", "fp16", "bf16"] = "bf16"
    language: Literal["smollm2-135m", "vicuna-7b"] = "smollm2-135m"
    """Shape of the language model, where the LLaVAs are made here."""
    prompt: int = 64
    """Tokens of the prompt beside the picture's, where the LLaVAs are made here."""
    conversation: str | None = None
    """Upstream's template for the given LLaVAs. Default: by the directory's name."""
    rank: int = 64
    rounds: int = 9
    tiny: bool = False
    """Towers and language model of 2 blocks, width 64 and 32: does the program work?"""
    output: Path | None = None
    """Append the table to this file."""


@dataclass(frozen=True)
class Ready:
    """A loaded LLaVA and what `generate` is given."""

    model: Any
    inputs: dict[str, Any]

    @torch.inference_mode()
    def first_token(self) -> torch.Tensor:
        return self.model.generate(
            **self.inputs, do_sample=False, max_new_tokens=1, use_cache=True, pad_token_id=0, eos_token_id=None
        )

    def change_picture(self) -> None:
        """To noise: what it costs does not depend on what it shows, and no two rounds see the same."""
        self.inputs["images"].normal_()

    @torch.inference_mode()
    def look(self) -> torch.Tensor:
        """The tower alone."""
        return self.model.get_vision_tower()(self.inputs["images"])


@dataclass(frozen=True)
class Made:
    """A LLaVA of this file: tower -> two-layer projector -> language model, the picture before the question. What
    upstream's LLaVA computes, without needing it."""

    tower: nn.Module
    projector: nn.Module
    language: PreTrainedModel
    pixels: torch.Tensor
    ids: torch.Tensor
    fast: bool

    @torch.inference_mode()
    def first_token(self) -> torch.Tensor:
        with fast_path(self.fast):
            picture = self.projector(self.tower(self.pixels))
            words = self.language.get_input_embeddings()(self.ids)
            seen = torch.cat([words[:, :1], picture, words[:, 1:]], dim=1)
            return self.language.generate(
                inputs_embeds=seen, attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
                do_sample=False, max_new_tokens=1, use_cache=True, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip

    def change_picture(self) -> None:
        """To noise: what it costs does not depend on what it shows, and no two rounds see the same."""
        self.pixels.normal_()

    @torch.inference_mode()
    def look(self) -> torch.Tensor:
        """The tower alone."""
        with fast_path(self.fast):
            return self.tower(self.pixels)


def make(s: Settings, folder: Path, device: torch.device) -> dict[str, Made]:
    """One random language model behind each tower: the same weights in all of them, towers of one random model."""
    shape, dtype = TINY if s.tiny else FULL, DTYPES[s.dtype]
    make_directories(folder, shape, 4, 2, s.rank, s.dtype, device)
    language = make_language(SMALL if s.tiny else LANGUAGES[s.language], dtype, device)
    width, side = language.config.hidden_size, shape["image_size"]
    with torch.device(device):
        ids = torch.randint(3, language.config.vocab_size, (1, s.prompt))
        pixels = torch.randn(1, 3, side, side, dtype=dtype)
        projector = nn.Sequential(nn.Linear(shape["hidden_size"], width), nn.GELU(), nn.Linear(width, width))
    projector.to(dtype).requires_grad_(False)
    found = {}
    for name, (kind, how) in MADE.items():
        with fast_path(how == "fast"):
            tower = make_tower(folder, kind, how, device, dtype)
        found[name] = Made(tower, projector, language, pixels, ids, how == "fast")
    return found


def make_language(shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A Llama of random weights, drawn on the device and in the dtype: one of 7B would not fit into memory twice."""
    config = LlamaConfig(**shape, max_position_embeddings=2048, tie_word_embeddings=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def load(s: Settings, device: torch.device) -> dict[str, Ready]:
    """The LLaVAs of the command line, by upstream's own loader, and the prompt by their own template."""
    from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    from demo.llava.load import conversation_of
    from train_llava.eval.batched import prompt_of

    picture = Image.effect_mandelbrot((640, 480), (-2, -1, 1, 1), 50).convert("RGB")
    found = {}
    for given in s.llava:
        name, _, directory = given.partition("=")
        if not (Path(directory) / "config.json").is_file():
            raise SystemExit(f"{given!r} names no LLaVA: give NAME=DIR, with a config.json in DIR.")
        path = str(Path(directory).resolve())
        kind = get_model_name_from_path(path)
        tokenizer, model, processor, _ = load_pretrained_model(path, None, kind, device=str(device))
        model = model.to(DTYPES[s.dtype]).eval()
        model.get_vision_tower().to(device=device, dtype=DTYPES[s.dtype])
        pixels = process_images([picture], processor, model.config)
        prompt = prompt_of(QUESTION, model.config, s.conversation or conversation_of(kind))
        ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt").unsqueeze(0)
        pixels = pixels.to(device, DTYPES[s.dtype])
        found[name] = Ready(model, {"inputs": ids.to(device), "images": pixels, "image_sizes": [picture.size]})
    return found


def prepare(s: Settings, folder: Path, device: torch.device) -> Mapping[str, Ready | Made]:
    """Given ones are loaded as LLaVA's users do, through our hook; transformers' progress bars and lists of tensors are
    left out."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not s.llava:
        return make(s, folder, device)
    llava_hook.install()
    before = {name: os.environ.get(name) for name in (CPU_DTYPE,)}
    os.environ[CPU_DTYPE] = str(DTYPES[s.dtype]).removeprefix("torch.")
    try:
        return load(s, device)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def main(argv: Sequence[str] | None = None) -> None:
    s = tyro.cli(Settings, args=argv, description=__doc__, use_underscores=False)
    device = timing.pick_device(s.device)
    with timing.heard() as said, tempfile.TemporaryDirectory() as folder:
        ready = prepare(s, Path(folder), device)
        works: dict[str, Callable[[], Any]] = {name: one.first_token for name, one in ready.items()}
        works |= {f"{name}: tower": one.look for name, one in ready.items()}

        def change_pictures() -> None:
            for one in ready.values():
                one.change_picture()

        warm = WARM[device.type]
        times = timing.medians(timing.interleaved(works, s.rounds, device, warm, before=change_pictures))
    first = next(iter(ready))
    rows = [
        [name, f"{times[name] / times[first]:.3f}", f"{1000 * times[name]:,.1f}",
         f"{1000 * times[f'{name}: tower']:,.1f}", f"{times[f'{name}: tower'] / times[f'{first}: tower']:.2f}",
         f"{times[f'{name}: tower'] / times[name]:.0%}"]
        for name in ready
    ]  # fmt: skip
    columns = ("LLaVA with", "ratio", "first token ms", "tower ms", "tower ratio", "tower's share")
    if s.llava:
        what = "given LLaVAs"
    else:
        size = "2 + 2 blocks" if s.tiny else f"ViT-L/14@336, {s.language}"
        what = f"{size}, random, {s.prompt} tokens of text"
    title = f"{what}, {s.dtype}; {timing.machine(device)}; medians of {s.rounds} interleaved rounds"
    report = timing.Report(s.output)
    report.add(timing.command(__file__, argv))
    report.add(title)
    report.add(timing.markdown(columns, rows))
    if said:
        report.add("**The package said:** " + "; ".join(said))
        raise SystemExit("\n".join(said))


if __name__ == "__main__":
    main()
