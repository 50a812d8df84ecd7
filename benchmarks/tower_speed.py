"""Latency, images/s and peak memory of vision towers as LLaVA runs them, against transformers' dense CLIP tower.

    python benchmarks/tower_speed.py                    (ViT-L/14@336, random weights; the GPU where there is one)
    python benchmarks/tower_speed.py --device cpu --batches 1 8 --dtypes fp32 bf16 --no-compile
    python benchmarks/tower_speed.py --variants "ours MoE, loop" "ours delta"    (only these, beside two references)
    python benchmarks/tower_speed.py --tiny

All towers are ONE model: its experts are a base FFN and random differences of rank `--rank`, so that the delta tower
and the whole experts must agree; the features of every variant are compared with the plain masked loop's (those of the
two dense towers with each other). The dense tower of transformers runs all its blocks and returns hidden_states[-2],
ours run one block less.

Every variant is loaded and run in a PROCESS OF ITS OWN, as LLaVA runs one tower: beside others in one process the
allocator keeps what they freed, and each is faster or slower for its company. Turns go through all variants, so that
other work on the machine meets all of them; a ratio is that of one turn, and the table has their median. Every batch
has other pictures. `of peak`: the tower's necessary operations a second, as a share of what one large matrix product
reached in this run. Peak memory is that of loading and all batches; on a CPU above the libraries', and not for
compiled towers (the compiler's would count).
"""

from __future__ import annotations

import copy
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import psutil
import timing
import torch
import torch.nn.functional as F
import tyro
from torch import nn

from llava_clipmoe.compression import expand
from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig, CLIPMoEVisionConfig
from llava_clipmoe.files import write_json
from llava_clipmoe.model_directory import ClipBundle, read_config, save_bundle
from llava_clipmoe.modeling_clipmoe import CLIPMoEModel, CLIPMoESparseMLP
from llava_clipmoe.tokenizer import open_clip_tokenizer
from llava_clipmoe.vision_tower import CLIPMoEVisionTower
from train_encoder.compare.cost import vision_macs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
"""Largest |ours - reference| / |reference| (norms). bf16: a token between two experts may go to the other one."""
FULL = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
            patch_size=14)  # fmt: skip
TINY = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=28,
            patch_size=14)  # fmt: skip
DENSE = "transformers dense"
MASKED = "MoE, masked loop with index_add_"
LLAVA = SimpleNamespace(mm_vision_select_layer=-2, mm_vision_select_feature="patch")


@dataclass(frozen=True)
class Settings:
    device: timing.Device = "auto"
    batches: tuple[int, ...] = (1, 8, 32)
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    variants: tuple[str, ...] = ()
    """Only those of these names, or that contain one of these; the two references always run. Default: all."""
    compile: bool = True
    """Also through torch.compile (a minute or two a variant before the first picture)."""
    experts: int = 4
    top_k: int = 2
    rank: int = 64
    turns: int = 3
    """Processes for each variant and batch size."""
    runs: int = 6
    """Batches that are timed in each process, after two that are not."""
    tiny: bool = False
    """2 blocks of width 64, one batch of 2, no compilation: does the program work?"""
    folder: Path | None = None
    """Where the towers are written (8 GB at fp32). Default: a temporary folder."""
    output: Path | None = None
    """Append the tables to this file."""


# ------------------------------------------------------------------------------------------------------------- towers


def make_directories(folder: Path, shape: dict[str, int], experts: int, top_k: int, rank: int, dtype: str) -> None:
    """Write `dense`, `moe` and `delta` into `folder`: one random model in three forms. The text tower is a stub.

    W_e = W_0 + B_e A_e with |B_e A_e| = |W_0| / 10, W_0 for the dense one. Routers are drawn so large that few tokens
    lie between two experts.
    """
    text = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, moe_layers=[])
    text |= dict(max_position_embeddings=248, eos_token_id=49407, bos_token_id=49406)
    vision = shape | dict(delta_ranks=[[rank, rank]] * shape["num_hidden_layers"])
    torch.manual_seed(0)
    delta = CLIPMoEModel(CLIPMoEConfig(text, vision, 64, num_experts=experts, num_experts_per_tok=top_k)).eval()
    with torch.no_grad():
        for name, parameter in delta.named_parameters():
            if name.endswith(".up"):
                parameter.normal_(std=0.1 * rank**-0.5)
            elif name.endswith(".bias") and "norm" not in name:
                parameter.normal_(std=0.02)
            elif ".router." in name:
                parameter.normal_(std=0.1)
    delta.to(DTYPES[dtype])
    dense = CLIPMoEModel(CLIPMoEConfig(text, shape, 64, num_experts=1)).to(DTYPES[dtype]).eval()
    state = delta.state_dict()
    named = {name: name.replace(".weight", ".base").replace(".mlp.", ".mlp.experts.") for name in dense.state_dict()}
    dense.load_state_dict({
        name: state[name] if name in state
        else state[named[name]] if name.endswith(".weight")
        else state[name.replace(".mlp.", ".mlp.experts.")][0]
        for name in named
    })  # fmt: skip
    tokenizer = open_clip_tokenizer(248)
    for name, model in (("dense", dense), ("delta", delta)):
        save_bundle(ClipBundle(model, tokenizer), folder / name)
    own = folder / "dense-ours"  # an ordinary dense directory is upstream's own tower; ours reads its own model_type
    shutil.copytree(folder / "dense", own, copy_function=os.link)
    (own / "config.json").unlink()
    write_json(own / "config.json", dense.config.to_dict())
    del dense, state
    save_bundle(ClipBundle(expand(delta), tokenizer), folder / "moe")


class TransformersTower(nn.Module):
    """transformers' dense CLIP as upstream LLaVA's CLIPVisionTower calls it."""

    def __init__(self, directory: Path):
        super().__init__()
        from transformers import CLIPVisionModel
        from transformers.utils import logging

        logging.set_verbosity_error()  # it would list every tensor of the text tower that it does not read
        logging.disable_progress_bar()
        self.vision_tower = CLIPVisionModel.from_pretrained(directory, dtype="auto").requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


class UsualExperts(nn.Module):
    """Experts as most MoE code writes them: for each expert a mask, its tokens gathered, index_add_ into the sum.

    The attributes are what transformers' `use_experts_implementation` reads; the tensors are those of our experts.
    """

    def __init__(self, config: Any, ours: nn.Module):
        super().__init__()
        self.num_experts, self.act_fn = ours.num_experts, ours.act
        self.up_proj, self.up_proj_bias = ours.fc1.weight, ours.fc1.bias
        self.down_proj, self.down_proj_bias = ours.fc2.weight, ours.fc2.bias

    def forward(self, x_ND: torch.Tensor, experts_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        out_ND = torch.zeros_like(x_ND)
        for expert in range(self.num_experts):
            token, choice = torch.where(experts_NK == expert)
            hidden = self.act_fn(F.linear(x_ND[token], self.up_proj[expert], self.up_proj_bias[expert]))
            y = F.linear(hidden, self.down_proj[expert], self.down_proj_bias[expert])
            out_ND.index_add_(0, token, (y * weights_NK[token, choice, None]).to(out_ND.dtype))
        return out_ND


class _Swapped(nn.Module):
    """Takes arguments in our order."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x_ND: torch.Tensor, weights_NK: torch.Tensor, experts_NK: torch.Tensor) -> torch.Tensor:
        return self.inner(x_ND, experts_NK, weights_NK)


def with_usual_experts(tower: CLIPMoEVisionTower, backend: str) -> CLIPMoEVisionTower:
    """`tower` with UsualExperts: by themselves ("eager"), or by a backend of transformers."""
    kind = UsualExperts
    if backend != "eager":
        from transformers.integrations.moe import use_experts_implementation

        kind = use_experts_implementation(
            type("TransformersExperts", (UsualExperts,), {}), has_gate=False, has_bias=True
        )
    config = SimpleNamespace(_experts_implementation=backend)
    for block in tower.modules():
        if isinstance(block, CLIPMoESparseMLP):
            block.experts = _Swapped(kind(config, block.experts))
    return tower


def with_backend(tower: CLIPMoEVisionTower, backend: str) -> CLIPMoEVisionTower:
    """Our own experts by `backend`; a delta tower knows `by_set` beside what its config may say."""
    for block in tower.modules():
        if isinstance(block, CLIPMoESparseMLP):
            block.experts.implementation = backend
    return tower


GROUPED = hasattr(F, "grouped_mm")


def ours(directory: Path, device: torch.device, compiled: bool = False) -> CLIPMoEVisionTower:
    return CLIPMoEVisionTower(str(directory), LLAVA, compile=compiled).to(device)


def variants(s: Settings) -> dict[str, tuple[str, str]]:
    """name -> (directory, how): what the tower is and how its experts run."""
    found = {
        DENSE: ("dense", "transformers"), "ours dense": ("dense-ours", "auto"), MASKED: ("moe", "usual eager"),
        "MoE, transformers batched_mm": ("moe", "usual batched_mm"),
        "MoE, transformers grouped_mm": ("moe", "usual grouped_mm"),
        "ours MoE, loop": ("moe", "loop"), "ours MoE, grouped_mm": ("moe", "grouped_mm"),
        "ours MoE, compiled": ("moe", "compiled"),
        "ours delta, loop": ("delta", "loop"), "ours delta": ("delta", "auto"),
        "ours delta, grouped_mm": ("delta", "grouped_mm"), "ours delta, compiled": ("delta", "compiled"),
        "ours dense, compiled": ("dense-ours", "compiled"),
    }  # fmt: skip
    compiles = s.compile and not s.tiny
    asked = (name for part in s.variants for name in found if (name == part if part in found else part in name))
    wanted = {DENSE, MASKED, *asked}
    return {
        name: (kind, how)
        for name, (kind, how) in found.items()
        if (GROUPED or "grouped_mm" not in how) and (compiles or how != "compiled")
        and (not s.variants or name in wanted)
    }  # fmt: skip


def make_tower(folder: Path, kind: str, how: str, device: torch.device) -> nn.Module:
    if how == "transformers":
        return TransformersTower(folder / kind).to(device)
    tower = ours(folder / kind, device, how == "compiled")
    if how.startswith("usual "):
        return with_usual_experts(tower, how.removeprefix("usual "))
    return with_backend(tower, how) if how in ("loop", "grouped_mm") else tower


# --------------------------------------------------------------------------------------------------------- measurement


def tower_macs(config: CLIPMoEVisionConfig, delta: bool, dense: bool, blocks: int) -> int:
    """Multiply-accumulates that one picture needs in `blocks` blocks of this kind, and for its patches."""
    kind = copy.deepcopy(config)
    kind.num_hidden_layers, kind.moe_layers = blocks, [] if dense else list(range(blocks))
    kind.delta_ranks = [config.delta_ranks[0]] * blocks if delta else None
    return vision_macs(kind)


def random_pixels(shape: dict[str, int], batch: int, dtype: str, device: torch.device) -> torch.Tensor:
    side = shape["image_size"]
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1)).to(device, DTYPES[dtype])


@dataclass(frozen=True)
class Seen:
    """What one process saw of one variant."""

    seconds: float
    """Median time of a batch."""
    peak: int
    """Bytes."""
    features: np.ndarray
    """[patches, width] of a picture that all variants are shown first."""


def alone(
    folder: Path, kind: str, how: str, shape: dict[str, int], batch: int, dtype: str, place: str, runs: int
) -> Seen:
    """Load one variant and run it on `runs` batches; called in a process of its own."""
    device = torch.device(place)
    peak = timing.Peak(device)
    tower = make_tower(folder, kind, how, device)
    pixels = random_pixels(shape, batch, dtype, device)
    features = tower(pixels)[0].float().cpu().numpy()
    # Other pictures each time: experts meet groups of other sizes, and some libraries compile for a size.
    found = timing.interleaved({"tower": lambda: tower(pixels)}, runs, device, before=pixels.normal_)
    return Seen(statistics.median(found["tower"]), peak.bytes(), features)


def check(features: dict[str, np.ndarray], dtype: str) -> dict[str, float]:
    """Each tower's distance from its reference, relative to the reference. Raises ValueError for one that is too far.

    The dense towers' reference is transformers', that of the others the masked loop.
    """
    found = {}
    for name, got in features.items():
        reference = features[DENSE if "dense" in name else MASKED]
        found[name] = float(np.linalg.norm(got - reference) / np.linalg.norm(reference))
        if not found[name] <= TOLERANCE[dtype]:
            raise ValueError(f"{name} is off by {found[name]:.1e} in {dtype} (tolerance {TOLERANCE[dtype]:.0e}).")
    return found


def too_large(how: str, shape: dict[str, int], s: Settings, batch: int, dtype: str, device: torch.device) -> bool:
    """Whether transformers' batched_mm would not fit: it gathers a whole weight matrix for every token and choice."""
    if how != "usual batched_mm":
        return False
    tokens = batch * ((shape["image_size"] // shape["patch_size"]) ** 2 + 1) * s.top_k
    need = tokens * shape["hidden_size"] * shape["intermediate_size"] * DTYPES[dtype].itemsize
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    return need > 0.25 * free  # a quarter: it copies them, and other programs want memory too


def measure(s: Settings, folder: Path, dtype: str, device: torch.device, say: Callable[[str], None]) -> None:
    """All batch sizes of one dtype, a table each."""
    shape, known = TINY if s.tiny else FULL, variants(s)
    make_directories(folder, shape, s.experts, s.top_k, s.rank, dtype)
    macs = necessary_macs(read_config(folder / "delta").vision_config, known)
    best = timing.peak_flops(device, DTYPES[dtype], 256 if s.tiny else None)
    for batch in (2,) if s.tiny else s.batches:
        fits = {n: v for n, v in known.items() if not too_large(v[1], shape, s, batch, dtype, device)}
        seen: dict[str, list[Seen]] = {name: [] for name in fits}
        for turn in range(s.turns):
            for name in list(fits)[:: -1 if turn % 2 else 1]:  # nothing always comes after the same neighbour
                print(f"{dtype}, batch {batch}, turn {turn + 1} of {s.turns}: {name}", file=sys.stderr, flush=True)
                given = (folder, *fits[name], shape, batch, dtype, str(device), s.runs)
                seen[name].append(timing.in_child(alone, *given))
        off = check({name: turns[0].features for name, turns in seen.items()}, dtype)
        ideal = {name: 2 * batch * value / best for name, value in macs.items()}
        # On a CPU the compiler's own memory would count.
        weighed = {n for n in fits if device.type == "cuda" or known[n][1] != "compiled"}
        say(f"\n**{dtype}, batch {batch}** (large product: {best / 1e12:.2f} TFLOP/s)\n")
        say(table(batch, ideal, seen, weighed, off))


def necessary_macs(config: CLIPMoEVisionConfig, known: dict[str, tuple[str, str]]) -> dict[str, float]:
    """Of one picture in every variant: transformers' tower runs all blocks, ours leave out the last."""
    return {
        name: tower_macs(config, kind == "delta", "dense" in kind, config.num_hidden_layers - (name != DENSE))
        for name, (kind, _) in known.items()
    }


def table(
    batch: int, ideal: dict[str, float], seen: dict[str, list[Seen]], weighed: set[str], off: dict[str, float]
) -> str:
    """ideal: seconds at the machine's peak. weighed: whose memory is told. Who was not seen did not fit."""
    rows = []
    for name in ideal:
        if name not in seen:
            rows.append([name, "does not fit", *[""] * 7])
            continue
        ratios = [mine.seconds / dense.seconds for mine, dense in zip(seen[name], seen[DENSE], strict=True)]
        seconds = statistics.median(turn.seconds for turn in seen[name])
        peak, dense_peak = (statistics.median(turn.peak for turn in seen[which]) for which in (name, DENSE))
        memory = (f"{peak / dense_peak:.2f}", f"{peak / 2**20:,.0f}") if name in weighed else ("", "")
        rows.append([
            name, f"{statistics.median(ratios):.2f}", " ".join(f"{ratio:.2f}" for ratio in ratios), memory[0],
            f"{1000 * seconds:,.1f}", f"{batch / seconds:.2f}", memory[1], f"{ideal[name] / seconds:.0%}",
            f"{off[name]:.0e}",
        ])  # fmt: skip
    columns = ("tower", "time ratio", "by turn", "memory ratio", "ms", "images/s", "peak MiB", "of peak", "off by")
    return timing.markdown(columns, rows)


def main(argv: Sequence[str] | None = None) -> None:
    s = tyro.cli(Settings, args=argv, description=__doc__, use_underscores=False)
    device = timing.pick_device(s.device)
    size = "2 blocks of width 64" if s.tiny else "ViT-L/14@336"
    lines = [timing.command(__file__, argv), "",
             f"{size}, {s.experts} experts, top {s.top_k}, rank {s.rank}; {timing.machine(device)}; medians of "
             f"{s.runs} batches in each of {s.turns} turns"]  # fmt: skip
    for line in lines:
        print(line, flush=True)
    for dtype in s.dtypes:
        with tempfile.TemporaryDirectory(dir=s.folder) as folder:
            measure(s, Path(folder), dtype, device, lambda text: (lines.append(text), print(text, flush=True)))
    if s.output is not None:
        timing.append("\n".join(lines), s.output)


if __name__ == "__main__":
    main()
