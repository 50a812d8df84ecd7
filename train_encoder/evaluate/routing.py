"""Where the tokens go: the share of each expert in every MoE block, and how far training moved the routers.

    evaluate_routing(bundle, source, images=256)      # the "routing" part of results.json
    router_movement(untrained.state_dict(), bundle, source)

Padding counts nowhere: a caption's tokens are those up to and with its end token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.losses_clipmoe import text_token_mask
from llava_clipmoe.transformer_clipmoe import CLIPMoESparseMLP

from ..data.decode import normalise
from ..data.pairs import PairSource
from ..features.encode import Precision, inference, pick_device, tokenise
from .options import readable_images

TOWERS = {"vision": "vision_model", "text": "text_model"}
Blocks = dict[str, CLIPMoESparseMLP]
See = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""see(block, x_ND, logits_NE, chosen_NK): a router's tokens, what it answered, and the experts that it chose."""


class NoExperts(ValueError):
    """A dense model has no routing to look at."""


def evaluate_routing(bundle: ClipBundle, source: PairSource, **sample: Any) -> dict[str, Any]:
    """Routing over some images and their first captions; `sample`: which, and how they are run (see `_watch`).

    -> {"vision": [[share of first choices per expert] per MoE block] (each block sums to 1), "vision_any": the share of
    tokens that use an expert at all (sums to K), "vision_blocks": block numbers, "vision_tokens": tokens counted, and
    the same for "text"}. Raises NoExperts.
    """
    blocks = _moe_blocks(bundle.model)
    first = {name: torch.zeros(mlp.experts.num_experts, dtype=torch.int64) for name, mlp in blocks.items()}
    used = {name: torch.zeros_like(count) for name, count in first.items()}

    def count(name: str, x_ND: torch.Tensor, logits_NE: torch.Tensor, chosen_NK: torch.Tensor) -> None:
        experts = logits_NE.shape[-1]
        first[name] += torch.bincount(logits_NE.argmax(-1), minlength=experts).cpu()
        used[name] += torch.bincount(chosen_NK.flatten(), minlength=experts).cpu()

    _watch(bundle, blocks, source, count, **sample)
    found: dict[str, Any] = {}
    for tower, prefix in TOWERS.items():
        names = [name for name in blocks if name.startswith(prefix)]
        tokens = int(first[names[0]].sum()) if names else 0
        found[tower] = [(first[name] / tokens).tolist() for name in names]
        found[f"{tower}_any"] = [(used[name] / tokens).tolist() for name in names]
        found[f"{tower}_blocks"] = [int(name.rpartition(".")[2]) for name in names]
        found[f"{tower}_tokens"] = tokens
    return found


def router_movement(
    initial: Mapping[str, torch.Tensor], bundle: ClipBundle, source: PairSource, **sample: Any
) -> list[dict[str, Any]]:
    """How far training moved each router W from W0, its value in the state dict `initial`.

    -> one {"block": "vision_model.0", "relative_change": |W - W0| / |W0|, "cosine": of W and W0, "changed_top1": share
    of tokens} a block. For `changed_top1` both routers see the SAME tokens, those of the trained model, so a block's
    number says nothing about the blocks before it. Raises NoExperts, ValueError (`initial` of another model).
    """
    blocks = _moe_blocks(bundle.model)
    before = {name: _initial_weight(initial, name, mlp.router.weight) for name, mlp in blocks.items()}
    changed, tokens = dict.fromkeys(blocks, 0), dict.fromkeys(blocks, 0)

    def compare(name: str, x_ND: torch.Tensor, logits_NE: torch.Tensor, chosen_NK: torch.Tensor) -> None:
        old_NE = _router_logits(x_ND, before[name])
        changed[name] += int((old_NE.argmax(-1) != logits_NE.argmax(-1)).sum())
        tokens[name] += len(x_ND)

    _watch(bundle, blocks, source, compare, **sample)
    found = []
    for name, mlp in blocks.items():
        old, new = before[name].double().flatten(), mlp.router.weight.detach().cpu().double().flatten()
        moved = ((new - old).norm() / old.norm()).item()
        cosine = F.cosine_similarity(new, old, dim=0).item()
        share = changed[name] / tokens[name]
        found.append({"block": name, "relative_change": moved, "cosine": cosine, "changed_top1": share})
    return found


def _router_logits(x_ND: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
    """What a router with these weights would answer, in fp32 as the router itself: [N,E]."""
    with torch.autocast(x_ND.device.type, enabled=False):
        return F.linear(x_ND.float(), weight_ED.to(x_ND.device, torch.float32))


def _initial_weight(initial: Mapping[str, torch.Tensor], name: str, now: torch.Tensor) -> torch.Tensor:
    tower, _, block = name.rpartition(".")
    key = f"{tower}.encoder.layers.{block}.mlp.router.weight"
    if key not in initial or initial[key].shape != now.shape:
        raise ValueError(f"the initial state has no {key} of shape {list(now.shape)}: it is of another model.")
    return initial[key].detach().cpu().clone()


def _moe_blocks(model: nn.Module) -> Blocks:
    """ "vision_model.0" -> its MoE FFN, the vision tower first."""
    found = {
        f"{prefix}.{number}": layer.mlp
        for prefix in TOWERS.values()
        for number, layer in enumerate(getattr(model, prefix).encoder.layers)
        if isinstance(layer.mlp, CLIPMoESparseMLP)
    }
    if not found:
        raise NoExperts("this model is dense: it has no experts, so there is no routing to measure.")
    return found


def _watch(
    bundle: ClipBundle,
    blocks: Blocks,
    source: PairSource,
    see: See,
    *,
    images: int | None = None,
    rows: np.ndarray | None = None,
    batch_size: int = 64,
    device: str | torch.device = "auto",
    precision: Precision = "fp32",
) -> None:
    """Run some images and their first captions, and let `see` look at the tokens that count, in every batch and block.

    rows: the images; with `images` that many random ones of them. Without rows: random ones of the whole source, 256
    where `images` does not say how many. Bad images are left out. Raises ValueError when none is left.
    """
    if rows is None:
        rows, images = np.arange(len(source)), 256 if images is None else images
    chosen = np.sort(np.random.default_rng(0).permutation(rows)[:images])
    pairs = [(pixels, source.captions(row)[0]) for row, pixels in readable_images(source, chosen, bundle.image_size)]
    if not pairs:
        raise ValueError("there is no readable image to look at the routing of.")
    text_mask = torch.empty(0)

    def hook_of(name: str) -> Callable:
        def hook(router: nn.Module, args: tuple, output: tuple) -> None:
            (x_ND,), (logits_NE, _, chosen_NK) = args, output
            if name.startswith(TOWERS["text"]):
                x_ND, logits_NE, chosen_NK = (part[text_mask] for part in (x_ND, logits_NE, chosen_NK))
            see(name, x_ND, logits_NE, chosen_NK)

        return hook

    device = pick_device(device)
    with contextlib.ExitStack() as stack, inference(bundle, device, precision):
        for name, mlp in blocks.items():
            stack.enter_context(mlp.router.register_forward_hook(hook_of(name)))
        for start in range(0, len(pairs), batch_size):
            pixels, captions = zip(*pairs[start : start + batch_size], strict=True)
            ids = tokenise(bundle.tokenizer, captions, bundle.context_length)[0].to(device)
            text_mask = text_token_mask(ids, bundle.model.config.text_config.eos_token_id).flatten()
            bundle.model.vision_model(normalise(torch.stack(pixels).to(device), bundle.image_mean, bundle.image_std))
            bundle.model.text_model(ids)
