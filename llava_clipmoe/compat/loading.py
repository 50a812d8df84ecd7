"""Loading a LLaVA: keyword arguments that changed between transformers versions, CPU dtypes, and memory."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..conversations import kind_of
from ..files import read_json
from . import language_models
from .conversations import stop_at_end
from .generation import explain_generation, patch_generation
from .tuning import read_beside, save_beside
from .versions import check_transformers

CPU_DTYPE = "LLAVA_CLIPMOE_CPU_DTYPE"
"""Environment variable: dtype of a LLaVA on the CPU, "float32" (default) or "bfloat16" (half the memory)."""


class TooLittleMemory(RuntimeError):
    """The model does not fit into memory in the asked precision."""


def cpu_dtype() -> torch.dtype:
    name = os.environ.get(CPU_DTYPE, "float32")
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"{CPU_DTYPE} is {name!r}; it may be float32 or bfloat16.")
    return getattr(torch, name)


def patch_language_model(module: ModuleType) -> None:
    """llava.model.language_model.llava_llama: `LlavaLlamaForCausalLM` loads and generates under every transformers, and
    hands a language model of another kind to the class of that kind."""
    cls = module.LlavaLlamaForCausalLM
    patch_generation(cls)
    language_models.read_new_positions(cls.config_class)
    ours = language_models.make_classes()
    for model in ours:
        explain_generation(model)
    for model in (cls, *ours):
        patch_loading(model)
    llamas = cls.from_pretrained.__func__

    @functools.wraps(llamas)
    def from_pretrained(cls, name: str, *args: Any, **kwargs: Any):
        other = language_models.class_for(name, **kwargs)
        return llamas(cls, name, *args, **kwargs) if other is None else other.from_pretrained(name, *args, **kwargs)

    cls.from_pretrained = classmethod(from_pretrained)


def patch_loading(cls: type) -> None:
    """A language model of LLaVA, upstream's or ours: how it is loaded, and the tower's file beside it."""
    # A full fine-tuning saves the frozen tower too; like upstream we read it from its own directory. Said nowhere,
    # transformers prints a page of unexpected tensors.
    cls._keys_to_ignore_on_load_unexpected = [*(cls._keys_to_ignore_on_load_unexpected or []), r"\.vision_tower\."]
    upstream = cls.from_pretrained.__func__

    @functools.wraps(upstream)
    def from_pretrained(cls, name: str, *args: Any, **kwargs: Any):
        kwargs = translate(kwargs)
        check_memory(Path(name), kwargs)
        checkpoint = getattr(kwargs.get("config"), "_name_or_path", None) or name  # transformers overwrites it
        model = upstream(cls, name, *args, **kwargs)
        read_beside(model[0] if isinstance(model, tuple) else model, str(checkpoint))
        return model

    cls.from_pretrained = classmethod(from_pretrained)
    _patch_save_pretrained(cls)


def _patch_save_pretrained(cls: type) -> None:
    upstream = cls.save_pretrained

    @functools.wraps(upstream)
    def save_pretrained(self, folder: str | os.PathLike, *args: Any, **kwargs: Any):
        written = upstream(self, folder, *args, **kwargs)
        save_beside(self, folder)
        return written

    cls.save_pretrained = save_pretrained


def translate(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Upstream's keyword arguments as every transformers version takes them.

    `load_in_8bit` / `load_in_4bit` become a quantization_config (transformers 5 takes nothing else, and both at once
    are refused since 4.38); float16 on the CPU becomes the CPU's dtype.
    """
    from transformers import BitsAndBytesConfig

    kwargs = dict(kwargs)
    eight, four = kwargs.pop("load_in_8bit", False), kwargs.pop("load_in_4bit", False)
    if (eight or four) and kwargs.get("quantization_config") is None:
        kwargs["quantization_config"] = BitsAndBytesConfig(load_in_8bit=eight, load_in_4bit=four)
    if kwargs.get("torch_dtype") == torch.float16 and _on_cpu(kwargs.get("device_map")):
        kwargs["torch_dtype"] = cpu_dtype()
    return kwargs


def _on_cpu(device_map: Any) -> bool:
    if isinstance(device_map, dict):
        return set(map(str, device_map.values())) == {"cpu"}
    return device_map == "cpu" or (device_map is not None and not torch.cuda.is_available())


def patch_load_pretrained_model(module: ModuleType) -> None:
    """llava.model.builder: `load_pretrained_model` checks version and name first, and answers end where they should."""
    upstream = module.load_pretrained_model

    @functools.wraps(upstream)
    def load_pretrained_model(model_path, model_base, model_name, load_8bit=False, load_4bit=False, *args, **kwargs):
        check_transformers()
        check_name(model_path, model_name)
        for directory in (model_path, model_base):  # upstream reads its config first, and transformers' error is long
            if directory is not None and (config := Path(directory) / "config.json").is_file():
                language_models.check_transformers_knows(directory, read_json(config))
        if (load_8bit or load_4bit) and kwargs.get("torch_dtype") is None:
            kwargs["torch_dtype"] = torch.float16  # what is not quantised: upstream leaves it at float32
        found = upstream(model_path, model_base, model_name, load_8bit, load_4bit, *args, **kwargs)
        stop_at_end(found[1], found[0], of_base=model_base is not None)
        return found

    module.load_pretrained_model = load_pretrained_model


def check_name(model_path: str, model_name: str) -> None:
    """Upstream picks the class by the folder's name: refuse names that would load the wrong one.

    Without "llava" in it a LLaVA is loaded as a plain language model, blind; with "mpt" anywhere (prompt, attempt)
    as an MPT, and with "mistral" a Qwen as a Mistral.
    """
    config = Path(model_path) / "config.json"
    if not config.is_file():
        return
    content = read_json(config)
    if not content.get("mm_vision_tower"):
        return
    if "llava" not in model_name.lower():
        raise ValueError(
            f"upstream LLaVA reads the model's kind from its folder's name, and {model_name!r} has no 'llava' in it: "
            "it would be loaded without its eyes. Rename the folder (for instance llava-" + model_name + ")."
        )
    if "mpt" in model_name.lower() and content.get("model_type") != "llava_mpt":
        raise ValueError(
            f"upstream LLaVA takes every folder with 'mpt' in its name for an MPT model, and {model_name!r} has it: "
            "rename the folder."
        )
    if "mistral" in model_name.lower() and kind_of(content) in language_models.NAMES:
        raise ValueError(
            f"upstream LLaVA takes every folder with 'mistral' in its name for a Mistral, and {model_name!r} is none: "
            "rename the folder."
        )


def check_memory(directory: Path, kwargs: dict[str, Any]) -> None:
    """Raise TooLittleMemory when the weights cannot fit: parameters x bytes against what the device has free.

    kwargs: those of `from_pretrained`. Nothing is said of a hub id, whose size is not known here, nor of a model that
    DeepSpeed shards while it is loaded.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    parameters = count_parameters(directory) if directory.is_dir() else None
    if parameters is None or is_deepspeed_zero3_enabled():
        return
    bits = bits_of(kwargs)
    on_cpu = kwargs.get("device_map") is None or _on_cpu(kwargs["device_map"])
    gpus = range(torch.cuda.device_count())
    free = _free_on_cpu() if on_cpu else sum(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus)
    needed = parameters * bits / 8
    if free is None or needed <= free:
        return
    if on_cpu:
        smaller = f"{CPU_DTYPE}=bfloat16" if bits == 32 else "a smaller model"
    else:
        smaller = {16: "--load-8bit or --load-4bit (in training --bits 8 or 4)", 8: "4 bits"}.get(bits, "16 bits")
    raise TooLittleMemory(
        f"{directory.name} needs about {needed / 2**30:.1f} GiB for its weights in {bits} bits, and "
        f"{free / 2**30:.1f} GiB are free on this {'machine' if on_cpu else 'GPU'}. Free some, or use {smaller}."
    )


def bits_of(kwargs: dict[str, Any]) -> int:
    """Bits a weight takes when loaded with these keyword arguments of `from_pretrained`."""
    quantization = kwargs.get("quantization_config")
    for bits in (4, 8):
        if getattr(quantization, f"load_in_{bits}bit", False):
            return bits
    dtype = kwargs.get("torch_dtype") or kwargs.get("dtype")
    return 8 * dtype.itemsize if isinstance(dtype, torch.dtype) else 32


def count_parameters(directory: Path) -> int | None:
    """Parameters of a model directory, from its safetensors headers (or its .bin sizes); None when there are none."""
    from safetensors import safe_open

    total = 0
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():
                total += math.prod(opened.get_slice(name).get_shape())
    if total:
        return total
    size = sum(file.stat().st_size for file in directory.glob("pytorch_model*.bin"))
    return size // 2 or None  # LLaVA's .bin files hold two bytes a parameter


def _free_on_cpu() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:  # no Linux: nothing reliable without another package
        return None
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable"))
