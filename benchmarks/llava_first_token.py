"""Time to the first token of LLaVA with each vision tower: one picture, one question, one generated token.

    python benchmarks/llava_first_token.py                 (random weights: ViT-L/14@336 towers, a Llama of 135M)
    python benchmarks/llava_first_token.py --llava CLIP=runs/llava-v1-clip CLIP-MoE=runs/llava-v1-clipmoe
    python benchmarks/llava_first_token.py --tiny

Upstream's own classes and `generate`; the dense tower is upstream's CLIPVisionTower. The LLaVAs take turns; ratios
are against the first. The picture is already decoded and normalised, which costs the same for all of them, and is
another one in every round.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timing
import torch
import tyro
from PIL import Image
from tower_speed import DTYPES, FULL, TINY, make_directories

from llava_clipmoe import llava_hook
from llava_clipmoe.compat.loading import CPU_DTYPE

QUESTION = "What is in the picture? Answer in one sentence."
SMOLLM2 = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
               num_key_value_heads=3, vocab_size=49152)  # fmt: skip
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=200)  # fmt: skip
MADE = {"CLIP": "dense", "CLIP-MoE": "moe", "delta": "delta"}
"""Name in the table -> tower's folder, of the LLaVAs that are made here."""


@dataclass(frozen=True)
class Settings:
    llava: tuple[str, ...] = ()
    """LLaVA directories as NAME=DIR, the one to compare with first. Default: made here, with random weights."""
    device: timing.Device = "auto"
    dtype: Literal["fp32", "bf16"] = "bf16"
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


def make(s: Settings, folder: Path, device: torch.device) -> dict[str, Ready]:
    """One random language model behind each tower: the same weights in all of them, towers of one random model."""
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    shape = TINY if s.tiny else FULL
    make_directories(folder, shape, 4, 2, s.rank, s.dtype)
    side, language = shape["image_size"], SMALL if s.tiny else SMOLLM2
    ids = torch.randint(3, language["vocab_size"], (1, s.prompt), generator=torch.Generator().manual_seed(1))
    ids[0, s.prompt // 2] = IMAGE_TOKEN_INDEX
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(2)).to(device, DTYPES[s.dtype])
    found = {}
    for name, tower in MADE.items():
        torch.manual_seed(0)
        model = LlavaLlamaForCausalLM(LlavaConfig(
            **language, max_position_embeddings=2048, mm_vision_tower=str(folder / tower), mm_vision_select_layer=-2,
            mm_hidden_size=shape["hidden_size"], mm_projector_type="mlp2x_gelu", mm_vision_select_feature="patch",
            mm_patch_merge_type="flat", mm_use_im_start_end=False, mm_use_im_patch_token=False,
            image_aspect_ratio="pad", tokenizer_model_max_length=2048,
        ))  # fmt: skip
        model.get_vision_tower().load_model()
        model = model.to(device, DTYPES[s.dtype]).eval()
        inputs = {"inputs": ids.to(device), "images": pixels, "image_sizes": [(side, side)]}
        found[name] = Ready(model, inputs)
    return found


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


def prepare(s: Settings, folder: Path, device: torch.device) -> dict[str, Ready]:
    """Loads as LLaVA's users do, through our hook; transformers' progress bars and lists of tensors are left out."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    llava_hook.install()
    before = {name: os.environ.get(name) for name in (CPU_DTYPE,)}
    os.environ[CPU_DTYPE] = {"fp32": "float32", "bf16": "bfloat16"}[s.dtype]
    try:
        return load(s, device) if s.llava else make(s, folder, device)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def main(argv: Sequence[str] | None = None) -> None:
    s = tyro.cli(Settings, args=argv, description=__doc__, use_underscores=False)
    device = timing.pick_device(s.device)
    with tempfile.TemporaryDirectory() as folder:
        ready = prepare(s, Path(folder), device)
        works: dict[str, Callable[[], Any]] = {name: one.first_token for name, one in ready.items()}
        works |= {f"{name}: tower": one.look for name, one in ready.items()}

        def change_pictures() -> None:
            for one in ready.values():
                one.change_picture()

        times = timing.medians(timing.interleaved(works, s.rounds, device, before=change_pictures))
    first = next(iter(ready))
    rows = [
        [name, f"{times[name] / times[first]:.3f}", f"{1000 * times[name]:,.1f}",
         f"{1000 * times[f'{name}: tower']:,.1f}", f"{times[f'{name}: tower'] / times[f'{first}: tower']:.2f}",
         f"{times[f'{name}: tower'] / times[name]:.0%}"]
        for name in ready
    ]  # fmt: skip
    columns = ("LLaVA with", "ratio", "first token ms", "tower ms", "tower ratio", "tower's share")
    what = "given LLaVAs" if s.llava else "2 + 2 blocks, random" if s.tiny else "ViT-L/14@336, Llama of 135M, random"
    title = f"{what}, {s.dtype}; {timing.machine(device)}; medians of {s.rounds} interleaved rounds"
    text = "\n".join([timing.command(__file__, argv), "", title, "", timing.markdown(columns, rows)])
    print(text)
    if s.output is not None:
        timing.append(text, s.output)


if __name__ == "__main__":
    main()
