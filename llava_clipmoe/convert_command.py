"""Turn an OpenAI, open_clip or official CLIP-MoE checkpoint into a model directory, or a directory back into one.

llava-clipmoe convert CLIP-MoE.pt clip-moe/ --num-experts-per-tok 2
llava-clipmoe convert open_clip_model.safetensors clip/ --open-clip-name ViT-L-14-336-quickgelu
llava-clipmoe convert clip-moe/ CLIP-MoE.pt --to openai
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .bundle import ClipBundle
from .configuration_clipmoe import active_parameters
from .conversion import to_openai_state
from .files import atomic_file, save_tensors
from .load import load_bundle
from .model_directory import save_bundle
from .open_clip_models import load_open_clip


def convert(
    source: str | Path,
    output: str | Path,
    *,
    num_experts_per_tok: int | None = None,
    open_clip_name: str | None = None,
    quick_gelu: bool | None = None,
    to: str = "directory",
) -> ClipBundle:
    """Read `source` (a directory, hub id or checkpoint file), write `output`, return what was read.

    to: "directory" (ours; a dense model as a transformers CLIP), or "openai": one file in OpenAI naming, `.pt` for the
    official code or `.safetensors`.
    """
    if to not in ("directory", "openai"):
        raise ValueError(f"to must be 'directory' or 'openai', got {to!r}.")
    if to == "openai" and Path(output).suffix not in (".pt", ".safetensors"):
        raise ValueError(f"{output}: with --to openai the output is one file, whose name ends in .pt or .safetensors.")
    if Path(output).resolve() == Path(source).resolve():
        raise ValueError(f"{output} is the input itself: give another output.")
    if open_clip_name is None:
        bundle = load_bundle(source, quick_gelu=quick_gelu, num_experts_per_tok=num_experts_per_tok)
    else:
        if num_experts_per_tok is not None:
            raise ValueError("open_clip models have no experts: leave --num-experts-per-tok out.")
        bundle = load_open_clip(open_clip_name, source, quick_gelu=quick_gelu)
    if to == "directory":
        save_bundle(bundle, output, card={"base": bundle.name, "license": bundle.license})
    elif Path(output).suffix == ".safetensors":
        save_tensors(output, to_openai_state(bundle), {"format": "pt"})
    else:
        state = to_openai_state(bundle)
        with atomic_file(output) as temporary:
            torch.save(state, temporary)
    return bundle


def main(argv: list[str]) -> int:
    """`llava-clipmoe convert INPUT OUTPUT`.

    argparse, not tyro: a flag that is on, off or unsaid has a plain spelling there (--quick-gelu, --no-quick-gelu).
    """
    parser = argparse.ArgumentParser("llava-clipmoe convert", description=__doc__.splitlines()[0])
    parser.add_argument("input", help="model directory, hub id, or checkpoint file (.pt, .safetensors)")
    parser.add_argument("output", help="the directory (or, with --to openai, the file) to write")
    parser.add_argument(
        "--num-experts-per-tok", type=int, metavar="K", help="experts a token uses; official checkpoints don't say it"
    )
    parser.add_argument("--open-clip-name", metavar="NAME", help="the input is a checkpoint of this open_clip model")
    parser.add_argument(
        "--quick-gelu", action=argparse.BooleanOptionalAction, help="the activation, if the input does not say it"
    )
    parser.add_argument("--to", choices=("directory", "openai"), default="directory", help="layout of the output")
    options = vars(parser.parse_args(argv))
    source, output = options.pop("input"), options.pop("output")
    bundle = convert(source, output, **options)
    config = bundle.model.config
    kind = "dense CLIP" if config.is_dense else f"CLIP-MoE with {config.num_experts} experts"
    print(f"wrote {output}: {kind}, {active_parameters(config)['total'] / 1e6:,.1f}M parameters")
    return 0
