"""What stands beside the weights of an exported LLaVA: tokenizer, processor, generation settings, remote code, card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .configuration_clipmoe import CLIPMoEConfig, CLIPMoEVisionConfig
from .files import read_json, write_json
from .model_directory import MODELING_FILES, pixel_statistics

IMAGE = "<image>"
_IMAGE_ENTRY = {
    "content": IMAGE, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True,
}  # fmt: skip
# llava/conversation.py, conv_vicuna_v1: what LLaVA-1.5 is trained and asked with. The image comes first, as
# llava/eval/model_vqa_loader.py puts it.
VICUNA_V1 = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] -%}
{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, \
detailed, and polite answers to the user's questions." -%}
{%- set turns = messages -%}
{%- endif -%}
{%- if system is not string -%}{%- set system = system[0]['text'] -%}{%- endif -%}
{{- system + ' ' -}}
{%- for message in turns -%}
{{- 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- ' ' if message['role'] == 'user' else '</s>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""

_PROBE = f"A chat. USER: {IMAGE}\nHow many cats are there, 2 or  3? ASSISTANT: Two.</s>USER: And {IMAGE}? ASSISTANT:"

REMOTE_CODE = "modeling_llava_clipmoe.py"
AUTO_MAP = {
    "AutoConfig": "modeling_llava_clipmoe.LlavaCLIPMoEConfig",
    "AutoModelForImageTextToText": "modeling_llava_clipmoe.LlavaCLIPMoEForConditionalGeneration",
    "AutoModelForVision2Seq": "modeling_llava_clipmoe.LlavaCLIPMoEForConditionalGeneration",
}
_REMOTE_SOURCE = '''\
"""transformers' Llava with a CLIP-MoE as its vision model, for `trust_remote_code=True`."""

from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel, LlavaConfig, LlavaForConditionalGeneration

from .configuration_clipmoe import CLIPMoEVisionConfig
from .modeling_clipmoe import CLIPMoEVisionModel

if TYPE_CHECKING:  # transformers 4 fetches only the files that are named here
    MODELING_FILES

AutoConfig.register(CLIPMoEVisionConfig.model_type, CLIPMoEVisionConfig, exist_ok=True)
AutoModel.register(CLIPMoEVisionConfig, CLIPMoEVisionModel, exist_ok=True)


class LlavaCLIPMoEConfig(LlavaConfig):
    pass


class LlavaCLIPMoEForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = LlavaCLIPMoEConfig


try:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping as conversion_of
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping as register_conversion
except ImportError:
    pass  # before transformers 5 the weights' names are what they are
else:
    register_conversion("LlavaCLIPMoEForConditionalGeneration", conversion_of("llava"), overwrite=True)
'''


def write_tokenizer(source: Path, folder: Path) -> int:
    """The LLM's tokenizer with <image> at the end of its vocabulary; -> the id of <image>.

    One tokenizer.json, in the form that transformers 4.37 reads too; a tokenizer.model is copied beside it. Raises
    FileNotFoundError without a tokenizer, ValueError when the result would read a prompt differently from upstream.
    """
    from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

    files = ("tokenizer.model", "tokenizer.json", "vocab.json")
    if not any((source / name).is_file() for name in files):
        raise FileNotFoundError(f"{source} has no tokenizer ({', '.join(files)}): copy the LLM's there.")
    # With a config, so that transformers does not look for the class of the unknown model type llava_llama.
    upstream = AutoTokenizer.from_pretrained(source, config=LlamaConfig(), use_fast=False)
    fast = AutoTokenizer.from_pretrained(source, config=LlamaConfig())
    vocabulary = fast.get_vocab()
    image = vocabulary.get(IMAGE, max(vocabulary.values()) + 1)
    write_json(folder / "tokenizer.json", _tokenizer_json(fast, image, getattr(upstream, "legacy", None)))
    write_json(folder / "tokenizer_config.json", _tokenizer_config(source, fast, image))
    (folder / "chat_template.jinja").write_text(VICUNA_V1, encoding="utf-8")
    if (source / "tokenizer.model").is_file():
        shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
    written = PreTrainedTokenizerFast.from_pretrained(folder)
    if written(_PROBE).input_ids != upstream_ids(upstream, _PROBE, image):
        raise ValueError(
            f"the tokenizer of {source} ({type(upstream).__name__}) with {IMAGE} added reads prompts differently from "
            "upstream LLaVA, so the answers would differ. Llama's and byte-level BPE tokenizers can be exported."
        )
    return image


def upstream_ids(tokenizer: Any, prompt: str, image: int) -> list[int]:
    """What llava/mm_utils.py (tokenizer_image_token) makes of a prompt: the parts around <image>, each read alone."""
    parts = [tokenizer(part).input_ids for part in prompt.split(IMAGE)]
    begins = 1 if parts[0] and parts[0][0] == tokenizer.bos_token_id else 0
    return parts[0] + [token for part in parts[1:] for token in (image, *part[begins:])]


def _tokenizer_json(tokenizer: Any, image: int, legacy: bool | None) -> dict[str, Any]:
    """`legacy` is that of transformers' LlamaTokenizer; None for tokenizers of another kind."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if not any(" " in part for pair in model.get("merges") or [] if not isinstance(pair, str) for part in pair):
        # tokenizers before 0.20 know no pairs
        model["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]
    if not model.get("ignore_merges"):
        model.pop("ignore_merges", None)
    if legacy is not None:
        # Upstream reads each part around <image> alone, so each begins with sentencepiece's extra space; after other
        # special tokens there is none (unless legacy), and what follows those in this template is "USER:".
        start = r"\A" if legacy else r"\A(?!USER:)"
        content["normalizer"] = {"type": "Replace", "pattern": {"Regex": start}, "content": " "}
        content["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "\u2581", "add_prefix_space": True, "prepend_scheme": "first",
            "split": False,
        }  # fmt: skip
    if all(entry["content"] != IMAGE for entry in content["added_tokens"]):
        content["added_tokens"].append({"id": image, **_IMAGE_ENTRY})
    return content


def _tokenizer_config(source: Path, tokenizer: Any, image: int) -> dict[str, Any]:
    path = source / "tokenizer_config.json"
    content = read_json(path) if path.is_file() else {}
    added = {
        str(number): {key: getattr(token, key) for key in _IMAGE_ENTRY}
        for number, token in tokenizer.added_tokens_decoder.items()
    }
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    if special["pad_token"] is None:  # as LLaVA's trainer does: batches need one
        special["pad_token"] = special["unk_token"] or special["eos_token"]
    llama = type(tokenizer).__name__.startswith("LlamaTokenizer")
    return {
        **{name: content[name] for name in ("legacy", "model_max_length") if name in content},
        **{name: str(token) for name, token in special.items() if token is not None},
        "add_bos_token": tokenizer("a").input_ids[0] == tokenizer.bos_token_id,
        "add_eos_token": False,
        "added_tokens_decoder": {**added, str(image): _IMAGE_ENTRY},
        "chat_template": VICUNA_V1,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",  # for generation in batches
        "processor_class": "LlavaProcessor",
        "tokenizer_class": "LlamaTokenizer" if llama else "PreTrainedTokenizerFast",
    }


def write_processor(folder: Path, config: Mapping[str, Any], tower: Path, vision: CLIPMoEVisionConfig) -> None:
    """preprocessor_config.json and processor_config.json: LlavaProcessor with LLaVA's way of making a square.

    LlavaImageProcessor is CLIPImageProcessor plus `do_pad`; transformers 4.37 reads the file with CLIPImageProcessor.
    """
    mean, std = pixel_statistics(tower)
    size = vision.image_size
    select = config.get("mm_vision_select_feature", "patch")
    write_json(folder / "preprocessor_config.json", {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": config.get("image_aspect_ratio") == "pad",
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(mean),
        "image_processor_type": "LlavaImageProcessor",
        "image_std": list(std),
        "processor_class": "LlavaProcessor",
        "resample": 3,  # PIL's number for bicubic
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    })  # fmt: skip
    write_json(folder / "processor_config.json", {
        "image_token": IMAGE,
        "num_additional_image_tokens": 1,  # the class token, which "default" drops again
        "patch_size": vision.patch_size,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": {"patch": "default", "cls_patch": "full"}[select],
    })  # fmt: skip


def write_generation_config(source: Path, folder: Path, config: Mapping[str, Any]) -> None:
    """The special tokens that generation needs; greedy, since sampling was the LLM's default, not LLaVA's."""
    path = source / "generation_config.json"
    given = {**config, **(read_json(path) if path.is_file() else {})}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    write_json(folder / "generation_config.json", {
        **{name: given[name] for name in names if given.get(name) is not None},
        "max_new_tokens": 512,  # llava/serve/cli.py; transformers' default is 20, the image's tokens included
    })  # fmt: skip


def write_card(folder: Path, config: Mapping[str, Any], clip: CLIPMoEConfig) -> None:
    """README.md, and for a CLIP-MoE the files that `trust_remote_code` needs."""
    if not clip.is_dense:
        named = "\n".join(f"    from .{Path(file).stem} import *" for file in MODELING_FILES)
        (folder / REMOTE_CODE).write_text(_REMOTE_SOURCE.replace("    MODELING_FILES", named), encoding="utf-8")
        for file in MODELING_FILES:
            shutil.copyfile(Path(__file__).with_name(file), folder / file)
    (folder / "README.md").write_text(_card(config, clip), encoding="utf-8")


def _card(config: Mapping[str, Any], clip: CLIPMoEConfig) -> str:
    vision = clip.vision_config
    register = [] if clip.is_dense else ["from llava_clipmoe.registration import register_auto_classes"]
    call = [] if clip.is_dense else ["register_auto_classes()  # teaches transformers the vision model"]
    tower = "a dense CLIP"
    if not clip.is_dense:
        tower = f"a CLIP-MoE ({vision.num_experts} experts, {vision.num_experts_per_tok} per token)"
    lines = [
        "---", "library_name: transformers", "pipeline_tag: image-text-to-text",
        "tags: [llava]" if clip.is_dense else "tags: [llava, clip-moe, mixture-of-experts]", "---", "",
        "# LLaVA-1.5 for transformers", "",
        f"A LLaVA-1.5 whose vision tower is {tower} at {vision.image_size} px, exported from upstream's format. The "
        "weights derive from the LLM, the vision tower and the data they were trained on; their licences apply.", "",
        "## Loading", "", "With transformers 5 (for 4.37 see below):", "", "```python", *register,
        "from transformers import AutoProcessor, LlavaForConditionalGeneration", "", *call,
        "model = LlavaForConditionalGeneration.from_pretrained(path)",
        "processor = AutoProcessor.from_pretrained(path)",
        'question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]',
        "prompt = processor.apply_chat_template(question, add_generation_prompt=True)",
        'inputs = processor(text=prompt, images=picture, return_tensors="pt")',
        "print(processor.decode(model.generate(**inputs)[0], skip_special_tokens=True))", "```", "",
    ]  # fmt: skip
    if not clip.is_dense:
        lines += [
            "Without the package llava-clipmoe: `AutoModelForImageTextToText.from_pretrained(path, "
            "trust_remote_code=True)`.", "",
        ]  # fmt: skip
    lines += [
        "transformers 4.37 loads the model, and its `LlavaProcessor(CLIPImageProcessor.from_pretrained(path), "
        "LlamaTokenizerFast.from_pretrained(path))` reads pictures and prompts (its AutoProcessor does not know the "
        "settings that version 5 needs). Make the prompt with `processor.tokenizer.apply_chat_template`.",
    ]
    if config.get("image_aspect_ratio") == "pad":
        lines += [
            "", "This LLaVA sees pictures padded to a square (image_aspect_ratio pad). transformers 5 does that "
            "(LlavaImageProcessor, `do_pad`); 4.37 does not, and would cut the sides off: pad the picture yourself "
            "there, with llava.mm_utils.expand2square and the mean colour.",
        ]  # fmt: skip
    return "\n".join([*lines, ""])
