"""Router rows that start from the experts' own clusters (`--moe.router-init centroids`), after Cluster-aware Upcycling
(CVPR 2026, arXiv 2604.13508), which gives a router the centroids of the dense model's activations as its rows.

A router does not see embeddings: in block l it sees that block's tokens behind the second layer norm. So the centroid
of expert e in block l is the mean of those tokens, class token included and padding left out, over the images (vision
tower) or first captions (text tower) of the expert's own cluster. They are the tokens of the dense base, as in the
paper: the mixture's own depend on routers that are not there yet. The rows are made of them in three steps (`rows_of`):

1. The mean of all centroids is taken away. It is in every row, so it changes no choice; and it is most of a centroid.
2. So is what is left along that mean. A router has no bias: without this step an expert whose centroid lies along
   the mean token would be ahead for every token there is. With it the mean token likes all experts the same.
3. Every row gets the length that a random row has (`router_initializer_range` times the root of the width). A longer
   row would take more tokens for its length alone; and a random router is a control of directions, not of lengths.

Which cluster is an expert's own is the method's to say (`Mixture.expert_of`). In CLIP-FMoE it is the one that the
expert was trained on. In Diversified Multiplet Upcycling every stage passes over ALL clusters, so none is an expert's
own by its training: there an expert's own are those, of the base's clusters, in which it matches pictures and captions
better than the other experts do (`best_experts`). The paper clusters the tokens of every block anew and cuts its
experts out of the base by these clusters; ours are trained already, and are to be found where they were trained.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig
from llava_clipmoe.losses_clipmoe import text_token_mask

from ..data.decode import normalise
from ..data.pairs import PairSource
from ..evaluate.options import readable_images
from ..features.encode import Precision, inference, pick_device, tokenise

IMAGES = 4096
"""Images that centroids are made of; at 336 px they give 2.4 million tokens a block."""
Centroids = dict[tuple[str, int], torch.Tensor]
"""(tower, block) -> [E,D], in float64."""


def sample(rows: np.ndarray, seed: int) -> np.ndarray:
    """At most IMAGES of the usable rows, at random, in ascending order."""
    return np.sort(np.random.default_rng(seed).permutation(rows)[:IMAGES])


def routers(
    base: ClipBundle,
    config: CLIPMoEConfig,
    source: PairSource,
    rows: np.ndarray,
    expert_of: np.ndarray,
    **encoding,
) -> dict[str, torch.Tensor]:
    """Router weights of a mixture under their names in its state dict.

    config: of the mixture. rows [n]: images of `source`; expert_of [n]: the expert in whose own cluster each is.
    encoding: device, precision and batch_size.
    """
    blocks = [("vision_model", block) for block in config.vision_config.moe_layers]
    blocks += [("text_model", block) for block in config.text_config.moe_layers]
    centroids = token_means(base, blocks, source, rows, expert_of, config.num_experts, **encoding)
    found = {}
    for (tower, block), means in centroids.items():
        length = config.router_initializer_range * math.sqrt(means.shape[1])
        found[f"{tower}.encoder.layers.{block}.mlp.router.weight"] = rows_of(means, length).float()
    return found


def rows_of(centroids: torch.Tensor, length: float) -> torch.Tensor:
    """Centroids [E,D] -> router rows [E,D] of this length: without what all of them share, as the module says. A
    centroid that is the mean of all gives a row of zeros."""
    mean = centroids.mean(0)
    own = centroids - mean
    along = F.normalize(mean, dim=0)
    return length * F.normalize(own - (own @ along)[:, None] * along, dim=1)


def token_means(
    bundle: ClipBundle,
    blocks: list[tuple[str, int]],
    source: PairSource,
    rows: np.ndarray,
    expert_of: np.ndarray,
    experts: int,
    *,
    device: str | torch.device = "auto",
    precision: Precision = "fp32",
    batch_size: int = 64,
) -> Centroids:
    """The mean token that the dense FFN of each of the `blocks` is given, by the expert of its image or caption.

    Raises ValueError for an expert without an image.
    """
    if missing := sorted(set(range(experts)) - set(expert_of.tolist())):
        raise ValueError(f"no image belongs to expert(s) {missing}, so they have no centroid: use more data.")
    device, kept = pick_device(device), {}
    sums: Centroids = {}
    counts: Centroids = {}

    def hook_of(place: tuple[str, int]) -> Callable:
        def hook(ffn: nn.Module, args: tuple, output: tuple) -> None:
            tokens, expert = args[0][kept["mask"]].double(), kept["expert"]
            one_hot = F.one_hot(expert, experts).double()
            sums[place] = sums.get(place, 0) + (one_hot.T @ tokens).cpu()
            counts[place] = counts.get(place, 0) + one_hot.sum(0).cpu()

        return hook

    def run(tower: str, inputs: torch.Tensor, mask_BT: torch.Tensor, experts_B: torch.Tensor) -> None:
        kept["mask"], kept["expert"] = mask_BT, experts_B[:, None].expand_as(mask_BT)[mask_BT]
        getattr(bundle.model, tower)(inputs)

    own = dict(zip(rows.tolist(), expert_of.tolist(), strict=True))
    tokens = bundle.model.config.vision_config.num_patches + 1
    eos = bundle.model.config.text_config.eos_token_id
    with contextlib.ExitStack() as stack, inference(bundle, device, precision):
        for tower, block in blocks:
            ffn = getattr(bundle.model, tower).encoder.layers[block].mlp
            stack.enter_context(ffn.register_forward_hook(hook_of((tower, block))))
        for batch in _batches(readable_images(source, rows, bundle.image_size), batch_size):
            experts_B = torch.tensor([own[row] for row, _ in batch], device=device)
            pixels = torch.stack([pixels for _, pixels in batch]).to(device)
            every = torch.ones(len(batch), tokens, dtype=torch.bool, device=device)
            run("vision_model", normalise(pixels, bundle.image_mean, bundle.image_std), every, experts_B)
            captions = [source.captions(row)[0] for row, _ in batch]
            ids = tokenise(bundle.tokenizer, captions, bundle.context_length)[0].to(device)
            run("text_model", ids, text_token_mask(ids, eos), experts_B)
    return {place: total / counts[place][:, None] for place, total in sums.items()}


# --- clusters of experts that were trained on everything -------------------------------------------------------------


def in_cluster_fit(image: np.ndarray, text: np.ndarray, clusters: np.ndarray, temperature: float) -> np.ndarray:
    """How surely each pair finds itself among the pairs of its cluster [n]: the mean log-likelihood of its two
    contrastive softmaxes, as in a stage's batches. image, text [n,P]: L2-normalised; clusters [n]."""
    fit = np.zeros(len(clusters))
    for cluster in np.unique(clusters):
        mine = np.flatnonzero(clusters == cluster)
        logits = torch.from_numpy(np.float32(image[mine]) @ np.float32(text[mine]).T) / temperature
        fit[mine] = ((logits.log_softmax(0) + logits.log_softmax(1)).diagonal() / 2).numpy()
    return fit


def best_experts(fits: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """fits [E,n] of n pairs under every expert, clusters [n] -> the expert of each pair's cluster [n].

    What counts is how much better an expert is in a cluster than it is on average, and than the others are there: one
    that is best everywhere does not get everything. Every expert gets one cluster (the best such choice), then every
    other cluster goes to the expert that is best in it. Raises ValueError for fewer clusters than experts.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    names, place = np.unique(clusters, return_inverse=True)
    if len(names) < len(fits):
        raise ValueError(
            f"there are {len(names)} clusters for {len(fits)} experts: raise --clusters.image-clusters or "
            "--clusters.text-clusters, or use --moe.router-init random."
        )
    gains = np.stack([np.bincount(place, fit) / np.bincount(place) for fit in fits])  # [E,K]
    gains = gains - gains.mean(1, keepdims=True)
    gains = gains - gains.mean(0)
    owner = gains.argmax(0)
    experts, first = linear_sum_assignment(gains, maximize=True)
    owner[first] = experts
    return owner[place]


def _batches(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch
