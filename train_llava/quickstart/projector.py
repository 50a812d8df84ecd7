"""Initial weights for LLaVA's projector, without running the language model: visual tokens that resemble words.

    tokens = visual_tokens(tower, images)                         # once, frozen
    state = fit_projector(tokens, wanted, embeddings)             # half a minute on two cores
    save_projector("mm_projector.bin", state)                     # train.py --pretrain_mm_mlp_adapter

A random projector sends noise to a small language model, and most of stage 1 is spent on making it resemble words.
Here every visual token is scored against the model's word embeddings, as its output layer would do (the two share
their weights), and the tokens of a picture together are fitted to the words of its caption and of its answers: as a
mixture over tokens, so that one may say "red" and another "round". A step costs a thousandth of one of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_clipmoe.files import atomic_file

PREFIX = "model.mm_projector."
"""Where LLaVA keeps the projector in a whole model."""


@torch.no_grad()
def visual_tokens(tower: nn.Module, images: Sequence[str], batch_size: int = 32) -> Tensor:
    """The projector's input for each picture: `[images, N, C]` in fp32, from a loaded vision tower."""
    from PIL import Image

    batches = []
    for start in range(0, len(images), batch_size):
        pixels = []
        for path in images[start : start + batch_size]:
            with Image.open(path) as image:
                prepared = tower.image_processor.preprocess(image.convert("RGB"), return_tensors="pt")
            pixels.append(prepared["pixel_values"])
        batches.append(tower(torch.cat(pixels)).float())
    return torch.cat(batches)


def fit_projector(
    tokens_INC: Tensor,
    wanted: Sequence[Mapping[int, float]],
    embeddings_VH: Tensor,
    *,
    steps: int = 800,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    noise: float = 0.1,
    seed: int = 0,
    progress=None,
) -> dict[str, Tensor]:
    """Fit an `mlp2x_gelu` projector to the wanted words; -> its weights, named as in LLaVA's `mm_projector.bin`.

    tokens_INC: N visual tokens of each of I pictures. wanted: for each picture, word (an id of the language model's
    vocabulary) -> weight. embeddings_VH: the language model's input embeddings. `noise` is added to the standardised
    tokens: a few thousand pictures would be memorised without it. `progress(step)` is called after every step.
    """
    words, targets_IW = _targets(wanted)
    embeddings_WH = embeddings_VH[words].float()
    usual_norm = embeddings_VH.float().norm(dim=1).mean()
    mean_C, std_C = tokens_INC.mean((0, 1)), tokens_INC.std((0, 1)).clamp(min=1e-6)
    tokens_INC = (tokens_INC - mean_C) / std_C

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = embeddings_VH.shape[1]
        projector = nn.Sequential(nn.Linear(tokens_INC.shape[2], hidden), nn.GELU(), nn.Linear(hidden, hidden))
    optimizer = torch.optim.AdamW(projector.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(len(tokens_INC), (batch_size,), generator=generator)
        tokens_BNC = tokens_INC[chosen]
        tokens_BNC = tokens_BNC + noise * torch.randn(tokens_BNC.shape, generator=generator)
        said_BNH = projector(tokens_BNC)
        log_p_BNW = F.log_softmax(said_BNH @ embeddings_WH.T, dim=-1)
        log_p_BW = torch.logsumexp(log_p_BNW, dim=1) - math.log(tokens_BNC.shape[1])
        loss = -(targets_IW[chosen] * log_p_BW).sum(1).mean()
        # Tokens much longer than words would drown these in the model's first layers.
        loss = loss + 0.1 * ((said_BNH.norm(dim=-1) / usual_norm - 1) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1)
    with torch.no_grad():  # fold the standardisation into the first layer
        first = projector[0]
        first.weight.div_(std_C)
        first.bias.sub_(first.weight @ mean_C)
    return {PREFIX + name: tensor.detach().clone() for name, tensor in projector.state_dict().items()}


def _targets(wanted: Sequence[Mapping[int, float]]) -> tuple[list[int], Tensor]:
    """-> the W words that occur, and their weights [I,W] in each picture, whose sums are 1 on average."""
    words = sorted({word for of_one in wanted for word in of_one})
    column = {word: i for i, word in enumerate(words)}
    targets_IW = torch.zeros(len(wanted), len(words))
    for row, of_one in enumerate(wanted):
        for word, weight in of_one.items():
            targets_IW[row, column[word]] = weight
    return words, targets_IW / targets_IW.sum(1).mean()


def save_projector(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Write `mm_projector.bin`: upstream reads no other format (llava_arch.py, torch.load)."""
    with atomic_file(path) as temporary:
        torch.save(dict(state), temporary)
