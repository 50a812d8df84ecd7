"""What pictures are compared by: a dense CLIP, a CLIP-MoE's mixture and each of its experts alone, and DINOv2."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.load import load_bundle
from llava_clipmoe.model_directory import local_directory, read_config
from llava_clipmoe.transformer_clipmoe import only_expert
from train_encoder.data.decode import ImageTransform
from train_encoder.features.encode import NotFinite, Precision, encode_images, encode_texts

DENSE, MOE, DINOV2, EXPERTS = "dense", "clip-moe", "dinov2", "experts"
"""Names of encoders; EXPERTS as the reference is the smallest cosine over "expert0", "expert1", ..."""


class ReadsNoTexts(ValueError):
    """A CLIP that has no tokenizer of its own, and whose text tower does not read CLIP's."""


def check_reads_texts(bundle: ClipBundle) -> None:
    """Raises ReadsNoTexts."""
    if len(bundle.tokenizer) > bundle.model.config.text_config.vocab_size:  # CLIP's own, for want of another
        raise ReadsNoTexts(
            "the folder of its vision tower has no tokenizer, and its text tower does not read CLIP's, so it can match "
            "no statements."
        )


class ClipTower:
    """A dense CLIP (one encoder), or a CLIP-MoE: its mixture and every expert alone. Weights are read when needed.

    Towers of one `view` take the same pixels, which are made once.
    """

    def __init__(self, source: str, *, dense: bool) -> None:
        """Raises FileNotFoundError where there is no model, ValueError where it is of the other kind."""
        self.directory = local_directory(source)
        config = read_config(self.directory)
        if config.is_dense != dense:
            flag, is_a, other = ("dense", "CLIP-MoE", "moe") if dense else ("moe", "dense CLIP", "dense")
            wanted = "dense CLIP" if dense else "CLIP-MoE"
            raise ValueError(f"--{flag} {source} is a {is_a}. Give a {wanted} there, and this one as --{other}.")
        self.name = self.directory.resolve().name
        self.encoders = (DENSE,) if dense else (MOE, *(f"expert{e}" for e in range(config.num_experts)))
        self.fingerprint = weights_fingerprint(self.directory)
        self.size = config.vision_config.image_size
        self.view = f"clip {self.size}"

    def preprocess(self) -> ImageTransform:
        return ImageTransform(self.size)

    @cached_property
    def _bundle(self) -> ClipBundle:
        bundle = load_bundle(self.directory)
        bundle.model.text_model = None  # a third of the memory, and not used for pictures
        return bundle

    def encode(self, encoder: str, pixels: torch.Tensor, device: torch.device, precision: Precision) -> torch.Tensor:
        """uint8 [B,3,R,R] -> L2-normalised [B,P] fp32 on the CPU. Raises NotFinite."""
        expert = encoder.removeprefix("expert")
        alone = only_expert(self._bundle.model, int(expert)) if expert.isdecimal() else contextlib.nullcontext()
        with alone:
            return encode_images(self._bundle, pixels, device=device, precision=precision, batch_size=len(pixels))

    def encode_texts(self, texts: Sequence[str], device: torch.device, precision: Precision) -> torch.Tensor:
        """-> L2-normalised [M,P] fp32 on the CPU. Reads the weights again. Raises ReadsNoTexts, NotFinite."""
        bundle = load_bundle(self.directory)
        check_reads_texts(bundle)
        bundle.model.vision_model = None  # the larger part of the memory
        return encode_texts(bundle, texts, device=device, precision=precision)


class DinoTower:
    """DINOv2 (or any transformers vision model with a class token) as the reference; Tong et al. 2024, MMVP."""

    encoders = (DINOV2,)
    view = DINOV2

    def __init__(self, source: str) -> None:
        """Raises FileNotFoundError where there is no model."""
        self.directory = local_directory(source)
        self.name = self.directory.resolve().name
        if not list(self.directory.glob("*.safetensors")):
            raise FileNotFoundError(
                f"{source} has no safetensors weights, and a pickled file is not read. Save the model again with a "
                "current transformers (model.save_pretrained)."
            )
        self.fingerprint = weights_fingerprint(self.directory)

    def preprocess(self) -> Callable[[Image.Image], torch.Tensor]:
        from transformers import AutoImageProcessor  # takes a second, and only this tower needs it

        processor = AutoImageProcessor.from_pretrained(self.directory, local_files_only=True)
        return lambda image: torch.as_tensor(np.asarray(processor(images=image)["pixel_values"][0]))

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModel

        return AutoModel.from_pretrained(self.directory, local_files_only=True, use_safetensors=True).eval()

    def encode(self, encoder: str, pixels: torch.Tensor, device: torch.device, precision: Precision) -> torch.Tensor:
        """float [B,3,R,R] -> the class token, L2-normalised [B,P] fp32 on the CPU. Raises NotFinite."""
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            tokens = self._model.to(device)(pixel_values=pixels.to(device)).last_hidden_state
        found = F.normalize(tokens[:, 0].float(), dim=-1).cpu()
        if not found.isfinite().all():
            raise NotFinite(f"{self.name} gave NaN or infinite embeddings: its weights are damaged.")
        return found


Tower = ClipTower | DinoTower


def weights_fingerprint(directory: Path) -> str:
    """A hash of all that decides a model's answers: every byte of its weights and configurations."""
    found = hashlib.sha256()
    names = ("config.json", "preprocessor_config.json", "*.safetensors", "*.index.json", "pytorch_model*.bin")
    for path in sorted({path for name in names for path in directory.glob(name)}):
        found.update(os.fsencode(path.name))
        with path.open("rb") as file:
            while part := file.read(1 << 24):
                found.update(part)
    return found.hexdigest()[:16]
