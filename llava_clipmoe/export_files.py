"""What stands beside the weights of an exported LLaVA: tokenizer, processor, generation settings, remote code, card."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .configuration_clipmoe import CLIPMoEConfig, CLIPMoEVisionConfig
from .conversations import TEMPLATES as CONVERSATIONS
from .conversations import VICUNA, conversation_for, kind_of
from .export_text import LANGUAGE_MODELS, language_config, opens_in_old_transformers
from .export_tiles import MODEL_TYPES, family_of, grid_pinpoints
from .files import read_json, write_json
from .model_card import TEMPLATES, render
from .model_directory import MODELING_FILES, copy_modeling_files, pixel_statistics, preprocessor

IMAGE = "<image>"
_PLAIN = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
_IMAGE_ENTRY = {"content": IMAGE, **_PLAIN, "special": True}
# llava/conversation.py, conv_vicuna_v1: what LLaVA-1.5 is trained and asked with. The image comes first, as
# llava/eval/model_vqa_loader.py puts it.
VICUNA_V1 = (TEMPLATES / "vicuna_v1.jinja").read_text(encoding="utf-8")

_PROBE = [
    {"role": "system", "content": "A chat."},
    {"role": "user", "content": f"{IMAGE}\nHow many cats are there, 2 or  3?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": f"And {IMAGE}?"},
]

REMOTE_CODE = "modeling_llava_clipmoe.py"


def auto_map(family: str) -> dict[str, str]:
    """`auto_map` of an export with a CLIP-MoE; `family` is Llava or LlavaNext."""
    whole = f"modeling_llava_clipmoe.{family}ForConditionalGeneration"
    return {
        "AutoConfig": f"modeling_llava_clipmoe.{family}CLIPMoEConfig",
        "AutoModel": f"modeling_llava_clipmoe.{family}Model",
        "AutoModelForImageTextToText": whole,
        "AutoModelForMultimodalLM": whole,  # `transformers serve`
        "AutoModelForVision2Seq": whole,  # transformers 4.37
    }


def chat_template(conversation: str | None) -> str:
    """The Jinja template that makes the prompt as upstream's conversation of that name does. Any that is not in
    `conversations.TEMPLATES` gets vicuna_v1's, as upstream's own runners ask."""
    if conversation not in CONVERSATIONS:
        return VICUNA_V1
    strings = dataclasses.asdict(CONVERSATIONS[conversation])
    given = [f"{{%- set {name} = {json.dumps(text)} -%}}\n" for name, text in strings.items()]
    return "".join(given) + (TEMPLATES / "turns.jinja").read_text(encoding="utf-8")


def write_tokenizer(source: Path, folder: Path) -> Any:
    """The LLM's tokenizer with <image> at the end of its vocabulary, and its chat template; -> that tokenizer.

    One tokenizer.json, in the form that transformers 4.37 reads too; a tokenizer.model is copied beside it. Raises
    FileNotFoundError without a tokenizer, ValueError when the result would read a prompt differently from upstream.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    files = ("tokenizer.model", "tokenizer.json", "vocab.json")
    if not any((source / name).is_file() for name in files):
        raise FileNotFoundError(f"{source} has no tokenizer ({', '.join(files)}): copy the LLM's there.")
    llava, template = read_json(source / "config.json"), chat_template(conversation_for(source))
    # With the LLM's config, so that transformers does not look for the class of the unknown model type llava_llama.
    config = language_config({"model_type": kind_of(llava)})
    upstream = AutoTokenizer.from_pretrained(source, config=config, use_fast=False)
    fast = AutoTokenizer.from_pretrained(source, config=config)
    vocabulary = fast.get_vocab()
    image = vocabulary.get(IMAGE, max(vocabulary.values()) + 1)
    own = {"chat_template": template, "processor_class": f"{family_of(llava)}Processor"}
    settings = {**_tokenizer_config(source, fast, image), **own}
    legacy = getattr(upstream, "legacy", None) if _is_llama(upstream) else None
    write_json(folder / "tokenizer.json", _tokenizer_json(fast, image, legacy))
    write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if (source / "tokenizer.model").is_file():
        shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
    written = PreTrainedTokenizerFast.from_pretrained(folder)
    probe = written.apply_chat_template(_PROBE, add_generation_prompt=True, tokenize=False)
    if written(probe).input_ids != upstream_ids(upstream, probe, image):
        raise ValueError(
            f"the tokenizer of {source} ({type(upstream).__name__}) with {IMAGE} added reads prompts differently from "
            "upstream LLaVA, so the answers would differ. Llama's and byte-level BPE tokenizers can be exported."
        )
    return written


def _is_llama(tokenizer: Any) -> bool:
    """Whether it is Llama 2's, of sentencepiece; Llama 3 has a byte-level one of another class."""
    return type(tokenizer).__name__.startswith("LlamaTokenizer")


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
            "type": "Metaspace",
            "replacement": "\u2581",
            "add_prefix_space": True,
            "prepend_scheme": "first",
            "split": False,
        }
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
    special["eos_token"] = _end_of_answer(source, tokenizer) or special["eos_token"]
    if special["pad_token"] is None:  # as LLaVA's trainer does: batches need one
        special["pad_token"] = special["unk_token"] or special["eos_token"]
    return {
        **{name: content[name] for name in ("legacy", "model_max_length") if name in content},
        # None is said: transformers 4.37 would add its LlamaTokenizerFast's own <s>, <unk>
        **{name: None if token is None else str(token) for name, token in special.items()},
        "add_bos_token": tokenizer("a").input_ids[0] == tokenizer.bos_token_id,
        "add_eos_token": False,
        "added_tokens_decoder": {**added, str(image): _IMAGE_ENTRY},
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",  # for generation in batches
        "tokenizer_class": "LlamaTokenizer" if _is_llama(tokenizer) else "PreTrainedTokenizerFast",
    }


def _end_of_answer(source: Path, tokenizer: Any) -> str | None:
    """The token at which an answer ends in Llama 3's and Qwen's conversations; None for others, or where it is none.

    Their base models' own end token ends a document, and what LLaVA teaches them is to end a turn.
    """
    conversation = conversation_for(source)
    if conversation not in CONVERSATIONS:
        return None
    end = CONVERSATIONS[conversation].end_token
    return end if end in tokenizer.get_vocab() else None


def select_strategy(config: Mapping[str, Any]) -> str:
    """LLaVA's mm_vision_select_feature in transformers' words."""
    return {"patch": "default", "cls_patch": "full"}[config.get("mm_vision_select_feature", "patch")]


def write_processor(folder: Path, config: Mapping[str, Any], tower: Path, vision: CLIPMoEVisionConfig) -> None:
    """preprocessor_config.json and processor_config.json: LlavaProcessor with LLaVA's way of making a square, or
    LlavaNextProcessor with its tiles.

    LlavaImageProcessor is CLIPImageProcessor plus `do_pad`; transformers 4.37 reads the file with CLIPImageProcessor.
    """
    family = family_of(config)
    own: dict[str, Any] = {"do_pad": config.get("image_aspect_ratio") == "pad"}
    if family == "LlavaNext":  # do_pad here: pictures of a batch with fewer tiles than others get empty ones
        own = {"do_pad": True, "image_grid_pinpoints": grid_pinpoints(config)}
    own |= {"image_processor_type": f"{family}ImageProcessor", "processor_class": f"{family}Processor"}
    pixels = preprocessor(vision.image_size, *pixel_statistics(tower), **own)
    write_json(folder / "preprocessor_config.json", pixels)
    processor = {
        "image_token": IMAGE,
        "num_additional_image_tokens": 1,  # the class token, which "default" drops again
        "patch_size": vision.patch_size,
        "processor_class": f"{family}Processor",
        "vision_feature_select_strategy": select_strategy(config),
    }
    write_json(folder / "processor_config.json", processor)


def write_generation_config(source: Path, folder: Path, tokenizer: Any) -> None:
    """The special tokens that generation needs; greedy, since sampling was the LLM's default, not LLaVA's."""
    path = source / "generation_config.json"
    given = {**read_json(source / "config.json"), **(read_json(path) if path.is_file() else {})}
    given = {name: number for name, number in given.items() if number is not None}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    content = {name: given[name] for name in names if name in given}
    content.setdefault("pad_token_id", tokenizer.pad_token_id)
    end = _end_of_answer(source, tokenizer)
    if end is not None:
        ends, number = content.get("eos_token_id", []), tokenizer.convert_tokens_to_ids(end)
        ends = ends if isinstance(ends, list) else [ends]
        content["eos_token_id"] = ends if number in ends else [*ends, number]
    content["max_new_tokens"] = 512  # llava/serve/cli.py; transformers' default is 20, the image's tokens included
    write_json(folder / "generation_config.json", content)


def remote_code(family: str) -> str:
    """The file that `trust_remote_code` runs of an exported LLaVA; it imports the modeling files beside it."""
    modules = [Path(file).stem for file in MODELING_FILES]
    return render(f"{REMOTE_CODE}.j2", modules=modules, family=family, model_type=MODEL_TYPES[family])


def write_card(folder: Path, config: Mapping[str, Any], clip: CLIPMoEConfig, conversation: str | None = None) -> None:
    """README.md, and for a CLIP-MoE the files that `trust_remote_code` needs. config: upstream's; conversation: what
    `conversation_for` says of it."""
    family = family_of(config)
    if not clip.is_dense:
        (folder / REMOTE_CODE).write_text(remote_code(family), encoding="utf-8")
        copy_modeling_files(folder)
    values = {"clip": clip, "vision": clip.vision_config, "config": config, "family": family}
    language = LANGUAGE_MODELS.get(kind_of(config), "Llama").removesuffix("ForCausalLM")
    name = conversation if conversation in CONVERSATIONS else VICUNA
    values["language"] = f"Its language model is a {language}, asked with the conversation {name}."
    values["old_transformers"] = opens_in_old_transformers(config) and family == "Llava"
    card = render("llava_card.md.j2", **values)
    (folder / "README.md").write_text(card, encoding="utf-8")
