"""The command `llava-clipmoe clip-benchmark`: CLIP_benchmark (pip install clip-benchmark) on our model directories.

    llava-clipmoe clip-benchmark eval --model runs/mine/clip-moe runs/mine/base --dataset cifar10 --dataset_root data

Everything behind `clip-benchmark` is CLIP_benchmark's own command, with its data sets, class names and prompts; only
its models are ours (`--model_type llava_clipmoe`, set here): whatever `load_bundle` takes. CLIP_benchmark downloads
data sets that it does not find in --dataset_root.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image
from torch import nn

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.load import load_bundle

from ..data.decode import ImageTransform, normalise
from ..features.encode import tokenise

MODEL_TYPE = "llava_clipmoe"


class Towers(nn.Module):
    """A model as CLIP_benchmark calls it."""

    def __init__(self, bundle: ClipBundle) -> None:
        super().__init__()
        self.clip = bundle.model

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """From `Preprocess`, in a batch [B,3,R,R] -> [B,P]."""
        return self.clip.get_image_features(pixels)

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        """From `Tokenise`, [M,T] -> [M,P]."""
        return self.clip.get_text_features(ids)


class Preprocess:
    """A picture -> normalised pixels [3,R,R], by the transform that every evaluation of ours uses."""

    def __init__(self, bundle: ClipBundle) -> None:
        self.transform, self.mean, self.std = ImageTransform(bundle.image_size), bundle.image_mean, bundle.image_std

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return normalise(self.transform(image.convert("RGB"))[None], self.mean, self.std)[0]


class Tokenise:
    """Texts -> ids [M,T], cut at the model's own context."""

    def __init__(self, bundle: ClipBundle) -> None:
        self.tokenizer, self.context_length = bundle.tokenizer, bundle.context_length

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        return tokenise(self.tokenizer, [texts] if isinstance(texts, str) else texts, self.context_length)[0]


def load(
    directories: dict[str, str], model_name: str, pretrained: str, cache_dir: str | None, device: str | torch.device
) -> tuple[Towers, Preprocess, Tokenise]:
    """What CLIP_benchmark asks a kind of model for. directories: the model of each name."""
    bundle = load_bundle(directories[model_name])
    return Towers(bundle).to(device).eval(), Preprocess(bundle), Tokenise(bundle)


def main(argv: list[str]) -> int:
    """Run CLIP_benchmark with our models; -> 0. Raises ValueError where it is missing, or two models have one name."""
    cli, models = _packages()
    words, directories = named_models(argv)
    models.TYPE2FUNC[MODEL_TYPE] = functools.partial(load, directories)
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)
    for module in (cli.zeroshot_classification, cli.linear_probe):
        if hasattr(module, "accuracy"):
            module.accuracy = accuracy
    before, sys.argv = sys.argv, ["llava-clipmoe clip-benchmark", *words]
    try:
        cli.main()
    finally:
        sys.argv = before
    return 0


def accuracy(output: torch.Tensor, target: torch.Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """Top-k shares of scores [N,C] and labels [N], in the place of CLIP_benchmark's own: that one (1.6.2) makes a float
    of an array with one dimension, which NumPy 2.4 refuses."""
    right = output.topk(max(topk)).indices == target[:, None]
    return [right[:, :k].any(1).float().mean().item() for k in topk]


def _packages() -> tuple[ModuleType, ModuleType]:
    try:
        from clip_benchmark import cli, models
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error}: this command is CLIP_benchmark's. Install it: pip install clip-benchmark"
        ) from error
    return cli, models


def named_models(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """-> the words for CLIP_benchmark, where a model is called by its folder's name (it puts names into file names),
    and the model of each name. Raises ValueError for two models of one name."""
    words, directories = [], {}
    flag = ""
    for word in argv:
        if word.startswith("--"):
            flag, _, given = word.partition("=")
            if flag == "--model" and given:
                words, word = [*words, flag], given
        if flag == "--model" and word != flag:
            name = Path(word).name
            if directories.get(name, word) != word:
                raise ValueError(
                    f"two models are called {name}: {directories[name]} and {word}. Evaluate them in turn."
                )
            directories[name], word = word, name
        words.append(word)
    if words[:1] == ["eval"]:
        if not directories:
            raise ValueError("name a model: llava-clipmoe clip-benchmark eval --model DIRECTORY --dataset ...")
        words += ["--model_type", MODEL_TYPE, "--pretrained", MODEL_TYPE]
    return words, directories
