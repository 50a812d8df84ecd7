"""Tiny language models of newer kinds, as their directories look: Llama 3, Qwen2 (and 2.5), Qwen3.

Random weights (fp32, 2 blocks) behind byte-level BPE tokenizers that have the real ones' pre-tokenizers and special
tokens, trained on a few sentences. Llama 3 and Qwen2 load under transformers 4.37 too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .llavas import SENTENCES

SPLIT = {
    # Of the models' own tokenizer.json; they differ in how many digits are one piece.
    "llama_3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "qwen_2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
}
LLAMA_3_TOKENS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
)
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ROPE_3_1 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256}  # fmt: skip
SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=512, initializer_range=0.2)  # fmt: skip


def make_llama_3(folder: Path, *, rope_scaling: dict[str, Any] | None = None) -> Path:
    """A Llama 3 Instruct; `rope_scaling=ROPE_3_1` makes it a 3.1. It has no token for padding, nor an unknown one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer("llama_3", LLAMA_3_TOKENS)
    begin = tokenizer.token_to_id("<|begin_of_text|>")
    _write_tokenizer(
        folder, tokenizer, LLAMA_3_TOKENS, tokenizer_class="PreTrainedTokenizerFast", bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>", begin=("<|begin_of_text|>", begin),
    )  # fmt: skip
    ends = [tokenizer.token_to_id(token) for token in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), **SHAPE, bos_token_id=begin, eos_token_id=ends, rope_theta=5e5,
        rope_scaling=rope_scaling,
    )  # fmt: skip
    return _save(LlamaForCausalLM, config, folder)


def make_qwen_2(folder: Path, *, base: bool = False) -> Path:
    """A Qwen2.5 (`model_type` qwen2), its embeddings tied as in those up to 3B: Instruct, or `base`, which ends at a
    document's end, <|endoftext|>."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return _make_qwen(folder, Qwen2Config, Qwen2ForCausalLM, base, tie_word_embeddings=True)


def make_qwen_3(folder: Path) -> Path:
    """A Qwen3: heads of a width of their own. transformers 4.51 or newer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _make_qwen(folder, Qwen3Config, Qwen3ForCausalLM, False, tie_word_embeddings=False, head_dim=16)


def _make_qwen(folder: Path, config_class: type, model_class: type, base: bool, **settings: Any) -> Path:
    tokenizer = _tokenizer("qwen_2", QWEN_TOKENS)
    _write_tokenizer(
        folder, tokenizer, QWEN_TOKENS, tokenizer_class="Qwen2Tokenizer", bos_token=None,
        eos_token="<|endoftext|>" if base else "<|im_end|>", pad_token="<|endoftext|>", unk_token=None,
        additional_special_tokens=QWEN_TOKENS[1:], add_prefix_space=False, errors="replace",
    )  # fmt: skip
    model = json.loads(tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    ids = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    rows = tokenizer.get_vocab_size() + 9  # as the real ones, whose embeddings are longer than their vocabularies
    ends = {"bos_token_id": ids[1], "eos_token_id": ids[base]}
    config = config_class(vocab_size=rows, **SHAPE, **ends, rope_theta=1e6, **settings)
    return _save(model_class, config, folder, **({} if base else {"eos_token_id": ids, "pad_token_id": ids[1]}))


def _tokenizer(kind: str, special: Sequence[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT[kind]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES * 20, trainer)
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def _write_tokenizer(
    folder: Path, tokenizer: Any, special: Sequence[str], *, begin: tuple[str, int] | None = None, **settings: Any
) -> None:
    """tokenizer.json, tokenizer_config.json. begin: the token, with its id, that is put before every text."""
    from tokenizers import processors

    if begin is not None:
        token, number = begin
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{token} $A", f"{token} $A {token} $B", [(token, number)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads(tokenizer.to_str())
    content["model"]["merges"] = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]
    ]  # as strings they are read by tokenizers of before 0.20, too; no merge of these sentences has a space in it
    content["model"].pop("ignore_merges", None)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    plain = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    added = {str(tokenizer.token_to_id(token)): {"content": token, **plain} for token in special}
    settings |= {"added_tokens_decoder": added, "model_max_length": 512, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _save(model_class: type, config: Any, folder: Path, **generation: Any) -> Path:
    torch.manual_seed(0)
    model = model_class(config)
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    return folder
