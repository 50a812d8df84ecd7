"""The vision towers that the benchmarks compare: one random model in every form, and every way to run it.

`make_directories` writes the model, `make_tower` loads one form of it to be run in one way (`VARIANTS`), and
`fast_path` must be around both the making and the running of a tower: the towers of this package ask for it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.compression import expand
from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig
from llava_clipmoe.files import write_json
from llava_clipmoe.model_directory import save_bundle
from llava_clipmoe.modeling_clipmoe import CLIPMoEModel
from llava_clipmoe.tokenizer import open_clip_tokenizer
from llava_clipmoe.vision_tower import CLIPMoEVisionTower

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FULL = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
            patch_size=14)  # fmt: skip
TINY = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=28,
            patch_size=14)  # fmt: skip
LLAVA = SimpleNamespace(mm_vision_select_layer=-2, mm_vision_select_feature="patch")
FAST = "LLAVA_CLIPMOE_FAST"
CPU = torch.device("cpu")
GROUPED = hasattr(F, "grouped_mm")

DENSE = "transformers dense"
MASKED = "MoE, masked loop with index_add_"
ON_A_CPU = {
    DENSE: ("dense", "transformers"), "ours dense": ("dense-ours", "auto"), MASKED: ("moe", "usual eager"),
    "MoE, transformers batched_mm": ("moe", "usual batched_mm"),
    "MoE, transformers grouped_mm": ("moe", "usual grouped_mm"),
    "ours MoE, loop": ("moe", "loop"), "ours MoE, grouped_mm": ("moe", "grouped_mm"),
    "ours delta, loop": ("delta", "loop"), "ours delta": ("delta", "auto"),
    "ours delta, grouped_mm": ("delta", "grouped_mm"),
}  # fmt: skip
"""Name in the table -> (directory, how): what the tower is and how its experts run."""
ON_A_GPU = {
    DENSE: ("dense", "transformers"), "transformers dense, CUDA graph": ("dense", "transformers graph"),
    "ours dense": ("dense-ours", "fast"), "ours MoE": ("moe", "fast"), "ours delta": ("delta", "fast"),
    f"ours dense, {FAST}=0": ("dense-ours", "auto"), f"ours MoE, {FAST}=0": ("moe", "auto"),
    f"ours delta, {FAST}=0": ("delta", "auto"), MASKED: ("moe", "usual eager"),
    "MoE, as the official code": ("moe", "usual official"),
    "MoE, transformers grouped_mm": ("moe", "usual grouped_mm"),
}  # fmt: skip
REFERENCES = {"dense": ("dense", "transformers"), "moe": ("moe", "usual eager"), "delta": ("delta", "loop")}
"""Directory -> the readable way to compute its features."""


# --------------------------------------------------------------------------------------------------------- one model


def make_directories(
    folder: Path, shape: dict[str, int], experts: int, top_k: int, rank: int, dtype: str, device: torch.device = CPU
) -> None:
    """Write `dense`, `moe` and `delta` into `folder`: one random model in three forms. The text tower is a stub.
    device: where the random numbers are drawn.

    W_e = W_0 + B_e A_e with |B_e A_e| = |W_0| / 10, W_0 for the dense one. Routers are drawn so large that few tokens
    lie between two experts.
    """
    text = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, moe_layers=[])
    text |= dict(max_position_embeddings=248, eos_token_id=49407, bos_token_id=49406)
    vision = shape | dict(delta_ranks=[[rank, rank]] * shape["num_hidden_layers"])
    torch.manual_seed(0)
    with torch.device(device):
        delta = CLIPMoEModel(CLIPMoEConfig(text, vision, 64, num_experts=experts, num_experts_per_tok=top_k)).eval()
        dense = CLIPMoEModel(CLIPMoEConfig(text, shape, 64, num_experts=1)).to(DTYPES[dtype]).eval()
    with torch.no_grad():
        for name, parameter in delta.named_parameters():
            if name.endswith(".up"):
                parameter.normal_(std=0.1 * rank**-0.5)
            elif name.endswith(".bias") and "norm" not in name:
                parameter.normal_(std=0.02)
            elif ".router." in name:
                parameter.normal_(std=0.1)
    delta.to(DTYPES[dtype])
    state = delta.state_dict()
    named = {name: name.replace(".weight", ".base").replace(".mlp.", ".mlp.experts.") for name in dense.state_dict()}
    dense.load_state_dict({
        name: state[name] if name in state
        else state[named[name]] if name.endswith(".weight")
        else state[name.replace(".mlp.", ".mlp.experts.")][0]
        for name in named
    })  # fmt: skip
    tokenizer, whole = open_clip_tokenizer(248), expand(delta)
    for name, model in (("dense", dense.cpu()), ("delta", delta.cpu()), ("moe", whole.cpu())):
        save_bundle(ClipBundle(model, tokenizer), folder / name)
    own = folder / "dense-ours"  # an ordinary dense directory is upstream's own tower; ours reads its own model_type
    shutil.copytree(folder / "dense", own, copy_function=os.link)
    (own / "config.json").unlink()
    write_json(own / "config.json", dense.config.to_dict())


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


def is_mixture(module: nn.Module | None) -> bool:
    """True for a router with its experts: a block's FFN in a CLIP-MoE (CLIPMoESparseMLP)."""
    return hasattr(module, "router") and hasattr(module, "experts")


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
        if is_mixture(block):
            block.experts = _Swapped(kind(config, block.experts))
    return tower


class OfficialForm(nn.Module):
    """A block's FFN with the steps of the official CLIP-MoE code (OpenSparseLLMs/CLIP-MoE, MoEResidualAttentionBlock):
    the router in the tower's dtype, and run twice; a one-hot mask [E,K,N]; a module for each expert."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.gate, self.experts, self.top_k = block.router.weight, block.experts, block.router.num_experts_per_tok

    def forward(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        F.linear(x_BTD, self.gate)  # the first of the two
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        logits_NE = F.linear(x_ND, self.gate)
        weights_NK, experts_NK = logits_NE.softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        weights_NK = (weights_NK / weights_NK.sum(-1, keepdim=True)).to(x_ND.dtype)
        mask_EKN = F.one_hot(experts_NK, len(self.gate)).permute(2, 1, 0)
        out_ND = torch.zeros_like(x_ND)
        for expert, mask_KN in enumerate(mask_EKN):
            choice, token = torch.where(mask_KN)
            y = self._expert(x_ND[token], expert) * weights_NK[token, choice, None]
            out_ND.index_add_(0, token, y.to(x_ND.dtype))
        return out_ND.view_as(x_BTD), logits_NE.view(*x_BTD.shape[:-1], -1)

    def _expert(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        fc1, fc2 = self.experts.fc1, self.experts.fc2
        hidden = F.linear(x, fc1.weight[expert], fc1.bias[expert])
        return F.linear(hidden * torch.sigmoid(1.702 * hidden), fc2.weight[expert], fc2.bias[expert])


def in_official_form(tower: CLIPMoEVisionTower) -> CLIPMoEVisionTower:
    for layer in tower.modules():
        if is_mixture(getattr(layer, "mlp", None)):
            layer.mlp = OfficialForm(layer.mlp)
    return tower


def with_backend(tower: CLIPMoEVisionTower, backend: str) -> CLIPMoEVisionTower:
    """Our own experts by `backend`; a delta tower knows `by_set` beside what its config may say."""
    for block in tower.modules():
        if is_mixture(block):
            block.experts.implementation = backend
    return tower


# ------------------------------------------------------------------------------------------------- one way to run it


class Graphed(nn.Module):
    """A tower in a CUDA graph for every number of pictures that it has met."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower, self.graphs = tower, {}

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) not in self.graphs:
            self.graphs[len(pixels)] = self._capture(pixels)
        graph, given, features = self.graphs[len(pixels)]
        given.copy_(pixels)
        graph.replay()
        return features.clone()

    def _capture(self, pixels: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        given, graph, side = pixels.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.tower(given)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            features = self.tower(given)
        return graph, given, features


@contextmanager
def fast_path(on: bool) -> Iterator[None]:
    """Our towers with (the default of the package) or without the GPU's kernels and graphs, inside the `with`."""
    before = os.environ.pop(FAST, None)
    if not on:
        os.environ[FAST] = "0"
    try:
        yield
    finally:
        os.environ.pop(FAST, None)
        if before is not None:
            os.environ[FAST] = before


def make_tower(folder: Path, kind: str, how: str, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """The form `kind` of the model in `folder`, run as `how` says. dtype: None is that of the files."""
    if how.startswith("transformers"):
        tower = TransformersTower(folder / kind).to(device, dtype)
        return Graphed(tower) if how.endswith("graph") else tower
    tower = CLIPMoEVisionTower(str(folder / kind), LLAVA).to(device, dtype)
    if how == "usual official":
        return in_official_form(tower)
    if how.startswith("usual "):
        return with_usual_experts(tower, how.removeprefix("usual "))
    return with_backend(tower, how) if how in ("loop", "grouped_mm") else tower
