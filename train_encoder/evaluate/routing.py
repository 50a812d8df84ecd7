"""Where the tokens go: the share of each expert in every MoE block, and how far training moved the routers.

    evaluate_routing(bundle, source, images=256)      # the "routing" part of results.json
    router_movement(untrained.state_dict(), bundle, source)

Padding counts nowhere: a caption's tokens are those up to and with its end token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.losses_clipmoe import text_token_mask
from llava_clipmoe.transformer_clipmoe import CLIPMoESparseMLP

from ..data.cache import RowImages
from ..data.decode import ImageTransform, normalise
from ..data.pairs import PairSource
from ..features.encode import Precision, inference, pick_device, tokenise

TOWERS = {"vision": "vision_model", "text": "text_model"}
Sample = list[tuple[torch.Tensor, torch.Tensor]]  # batches of pixels uint8 [B,3,R,R] and ids [B,T]


class NoExperts(ValueError):
    """A dense model has no routing to look at."""


def evaluate_routing(
    bundle: ClipBundle,
    source: PairSource,
    *,
    images: int | None = None,
    rows: np.ndarray | None = None,
    batch_size: int = 64,
    device: str | torch.device = "auto",
    precision: Precision = "fp32",
    seed: int = 0,
) -> dict[str, Any]:
    """Routing over some images and their first captions: `rows`, or seeded random ones of them or of the whole source
    (`images` of them; all of `rows` when absent, 256 of a whole source).

    -> {"vision": [[share of first choices per expert] per MoE block] (each block sums to 1), "vision_any": the share of
    tokens that use an expert at all (sums to K), "vision_blocks": block numbers, "vision_tokens": tokens counted, and
    the same for "text"}. A bad image is left out. Raises NoExperts.
    """
    sample = _sample(bundle, source, images, rows, batch_size, seed)
    blocks = _moe_blocks(bundle.model)
    first = {name: torch.zeros(mlp.experts.num_experts, dtype=torch.int64) for name, mlp in blocks.items()}
    used = {name: torch.zeros_like(count) for name, count in first.items()}

    def count(name: str, router: nn.Module, x_ND: torch.Tensor, logits_NE: torch.Tensor, chosen_NK: torch.Tensor):
        experts = logits_NE.shape[-1]
        first[name] += torch.bincount(logits_NE.argmax(-1), minlength=experts).cpu()
        used[name] += torch.bincount(chosen_NK.flatten(), minlength=experts).cpu()

    _watch(bundle, blocks, sample, pick_device(device), precision, count)
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
    initial: Mapping[str, torch.Tensor],
    bundle: ClipBundle,
    source: PairSource,
    *,
    images: int | None = None,
    rows: np.ndarray | None = None,
    batch_size: int = 64,
    device: str | torch.device = "auto",
    precision: Precision = "fp32",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """How far training moved each router W from W0, its value in the state dict `initial`.

    -> one {"block": "vision_model.0", "relative_change": |W - W0| / |W0|, "cosine": of W and W0, "changed_top1": share
    of tokens} a block. For `changed_top1` both routers see the SAME tokens, those of the trained model, so a block's
    number says nothing about the blocks before it. Raises NoExperts, ValueError (`initial` of another model).
    """
    blocks = _moe_blocks(bundle.model)
    before = {name: _initial_weight(initial, name, mlp.router.weight) for name, mlp in blocks.items()}
    sample = _sample(bundle, source, images, rows, batch_size, seed)
    changed, tokens = dict.fromkeys(blocks, 0), dict.fromkeys(blocks, 0)

    def compare(name: str, router: nn.Module, x_ND: torch.Tensor, logits_NE: torch.Tensor, chosen_NK: torch.Tensor):
        old_NE = router_logits(x_ND, before[name])
        changed[name] += int((old_NE.argmax(-1) != logits_NE.argmax(-1)).sum())
        tokens[name] += len(x_ND)

    _watch(bundle, blocks, sample, pick_device(device), precision, compare)
    rows_out = []
    for name, mlp in blocks.items():
        old, new = before[name].double().flatten(), mlp.router.weight.detach().cpu().double().flatten()
        rows_out.append(
            {
                "block": name,
                "relative_change": ((new - old).norm() / old.norm()).item(),
                "cosine": torch.nn.functional.cosine_similarity(new, old, dim=0).item(),
                "changed_top1": changed[name] / tokens[name],
            }
        )
    return rows_out


def router_logits(x_ND: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
    """What a router with these weights would say to these tokens, in fp32 as the router itself: [N,E]."""
    with torch.autocast(x_ND.device.type, enabled=False):
        return torch.nn.functional.linear(x_ND.float(), weight_ED.to(x_ND.device, torch.float32))


def _initial_weight(initial: Mapping[str, torch.Tensor], name: str, now: torch.Tensor) -> torch.Tensor:
    tower, _, block = name.rpartition(".")
    key = f"{tower}.encoder.layers.{block}.mlp.router.weight"
    if key not in initial or initial[key].shape != now.shape:
        raise ValueError(f"the initial state has no {key} of shape {list(now.shape)}: it is of another model.")
    return initial[key].detach().cpu().clone()


def _moe_blocks(model: nn.Module) -> dict[str, CLIPMoESparseMLP]:
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


def _sample(
    bundle: ClipBundle, source: PairSource, images: int | None, rows: np.ndarray | None, batch_size: int, seed: int
) -> Sample:
    """The rows to look at with their first captions; bad images are left out. Raises ValueError when none is left."""
    if images is None:
        images = 256 if rows is None else len(rows)
    rows = np.arange(len(source)) if rows is None else np.asarray(rows)
    chosen = np.sort(np.random.default_rng(seed).permutation(rows)[:images])
    image, pairs = RowImages(source, ImageTransform(bundle.image_size)), []
    for row in chosen.tolist():
        pixels, error = image(row)
        if error is None:
            pairs.append((pixels, source.captions(row)[0]))
    if not pairs:
        raise ValueError("there is no readable image to look at the routing of.")
    batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    return [
        (
            torch.stack([pixels for pixels, _ in batch]),
            tokenise(bundle.tokenizer, [caption for _, caption in batch], bundle.context_length)[0],
        )
        for batch in batches
    ]


def _watch(
    bundle: ClipBundle,
    blocks: Mapping[str, CLIPMoESparseMLP],
    sample: Sample,
    device: torch.device,
    precision: Precision,
    see: Callable[[str, nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], None],
) -> None:
    """Run the sample; `see(block, router, x_ND, logits_NE, chosen_NK)` gets the tokens that count, of every batch."""
    with inference(bundle, device, precision):
        for pixels, ids in sample:
            ids = ids.to(device)
            pixels = normalise(pixels.to(device), bundle.image_mean, bundle.image_std)
            with _hooks(blocks, text_token_mask(ids, bundle.model.config.text_config.eos_token_id), see):
                bundle.model.vision_model(pixels)
                bundle.model.text_model(ids)


class _hooks:
    """While entered, each block's router reports what it was asked and what it answered, without padding."""

    def __init__(self, blocks: Mapping[str, CLIPMoESparseMLP], text_mask: torch.Tensor, see: Callable) -> None:
        self.blocks, self.mask, self.see = blocks, text_mask.flatten(), see

    def __enter__(self) -> None:
        self.handles = [mlp.router.register_forward_hook(self._hook(name)) for name, mlp in self.blocks.items()]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, name: str) -> Callable:
        def hook(router: nn.Module, args: tuple, output: tuple) -> None:
            (x_ND,), (logits_NE, _, chosen_NK) = args, output
            if name.startswith(TOWERS["text"]):
                x_ND, logits_NE, chosen_NK = (part[self.mask] for part in (x_ND, logits_NE, chosen_NK))
            self.see(name, router, x_ND, logits_NE, chosen_NK)

        return hook
