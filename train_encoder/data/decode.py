"""An image file's bytes -> an upright RGB picture -> the pixels that CLIP sees."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from ..config import DataConfig
from .image_files import readable_formats


class DataError(ValueError):
    """A data source that cannot be used; the message names the cause and what to do next."""


class BadImage(Exception):
    """An image that is missing, corrupt or over-large; the message names the cause."""


# Pillow refuses a PNG with a text or colour profile of more than 1 MiB, which editors write. In all they may have 64.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def decode_image(file: BinaryIO, max_pixels: int, formats: Sequence[str] | None = None) -> Image.Image:
    """Decodes the first frame of an image file, upright and in RGB; transparent pixels lie on white.

    formats: Pillow's names of the only formats to try (default: all that it decodes itself, starting no program).
    Raises BadImage when the header promises more than `max_pixels` (nothing is decoded then), or when the file is
    corrupt or cut short.
    """
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's limit would refuse what the settings allow
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF and of large images: both are handled below
            image = Image.open(file, formats=formats or readable_formats())
            width, height = image.size
            if width * height > max_pixels:
                raise BadImage(f"too large: {width} x {height} pixels in its header, over max_pixels={max_pixels}")
            image.load()
            return _to_rgb(_upright(image))
    except (BadImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"too large: over max_pixels={max_pixels} by its header ({error})") from error
    except UnidentifiedImageError as error:
        raise BadImage("corrupt: no picture of a format that is read here") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes; no worker may die of it
        raise BadImage(f"corrupt: {type(error).__name__}: {error}") from error


def open_image(path: Path) -> Image.Image:
    """Decodes an image file. Raises BadImage, which names the file, and OSError."""
    try:
        with path.open("rb") as file:
            return decode_image(file, DataConfig.max_pixels)
    except BadImage as error:
        raise BadImage(f"{path}: {error}. Remove or replace it.") from error


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation (tag 0x0112). Damaged EXIF is ignored: the pixels are right all the same."""
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(image.getexif().get(0x0112))
    except Exception:  # the same wide range of errors as above, and the same reason
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" and image.getextrema()[1] <= 1:  # floats from 0 to 1, which convert() would make black
        image = image.point(lambda value: value * 255)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own convert() would clip to white
        grey = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


# A strip of 1 x 10,000 pixels would become 336 x 3,360,000 on its way to a centre crop of 336 x 336.
MAX_ASPECT = 32


@dataclass(frozen=True)
class ImageTransform:
    """CLIP's preprocessing up to uint8 pixels: shorter side to `size` (bicubic), centre crop.

    By torchvision, as OpenAI's code does it, so the pixels are the ones that the pretrained weights have seen.
    """

    size: int

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """RGB image -> uint8 [3, size, size]."""
        most = MAX_ASPECT * min(image.size)
        if max(image.size) > most:
            image = transforms.center_crop(image, [min(image.height, most), min(image.width, most)])
        image = transforms.resize(image, self.size, InterpolationMode.BICUBIC)
        return transforms.pil_to_tensor(transforms.center_crop(image, self.size)).contiguous()


def normalise(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 [B,3,H,W] -> float32 [B,3,H,W] on the same device: (pixels / 255 - mean) / std, by channel."""
    mean_3, std_3 = (_channels(tuple(v), pixels.device) for v in (mean, std))
    # In place: a batch of 336 px pictures is large, and each temporary copy costs as much time as the arithmetic.
    return pixels.to(torch.float32, copy=True).div_(255).sub_(mean_3).div_(std_3)


@functools.lru_cache(maxsize=16)
def _channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """[3,1,1] on the device. Cached: copying it there in every step would make the CPU wait for the GPU."""
    return torch.tensor(values, device=device).view(-1, 1, 1)
