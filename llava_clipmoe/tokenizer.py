"""CLIP's tokenizer: read from a directory whatever transformers wrote it, built from open_clip's BPE file, saved.

transformers 4 keeps `vocab.json` and `merges.txt`, transformers 5 may write only a `tokenizer.json` that older versions
cannot parse. So the vocabulary is read here, and always written as the two plain files, which every version loads.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from .files import read_json, write_json, write_text

START, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL_TOKENS = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}


def load_tokenizer(directory: str | Path, context_length: int) -> Any:
    """transformers' CLIP tokenizer of a model directory, cutting at `context_length` tokens.

    Raises FileNotFoundError when there are no tokenizer files, ValueError when they are not a CLIP tokenizer's.
    """
    directory = Path(directory)
    if not has_tokenizer(directory):
        raise FileNotFoundError(f"{directory} holds no CLIP tokenizer (vocab.json and merges.txt, or tokenizer.json).")
    if (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
        vocab = read_json(directory / "vocab.json")
        lines = (directory / "merges.txt").read_text(encoding="utf-8-sig").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
    else:
        vocab, merges = _from_tokenizer_json(directory / "tokenizer.json")
    return _build(vocab, merges, _special_tokens(directory), context_length)


def has_tokenizer(directory: Path) -> bool:
    """True when `directory` has the files that `load_tokenizer` reads."""
    plain = (directory / "vocab.json").exists() and (directory / "merges.txt").exists()
    return plain or (directory / "tokenizer.json").exists()


def open_clip_tokenizer(context_length: int = 77) -> Any:
    """transformers' CLIP tokenizer from the BPE file that open_clip ships: no download.

    Same ids as open_clip's own tokenizer, except where open_clip cleans the text first: it unescapes HTML entities,
    straightens curly quotes and opens ligatures (ftfy); transformers' tokenizer does none of it. And transformers
    reads a special token written out in a caption as that token.
    Raises ModuleNotFoundError naming the extra when open_clip is not installed.
    """
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "CLIP's vocabulary comes from the package open_clip_torch, which is not installed: "
            'pip install "llava-clipmoe[train]", or put CLIP\'s vocab.json and merges.txt into the model directory.',
            name=error.name,
        ) from error
    theirs = SimpleTokenizer()
    entries = [
        *list(theirs.encoder)[:-2],
        START,
        END,
    ]  # in the order of their ids; open_clip names the last two otherwise
    merges = [" ".join(pair) for pair in theirs.bpe_ranks]
    return _build({entry: i for i, entry in enumerate(entries)}, merges, SPECIAL_TOKENS, context_length)


def save_tokenizer(tokenizer: Any, directory: str | Path, context_length: int) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json: the same bytes from every transformers version.

    Raises ValueError when the tokenizer has added tokens, which the two plain files cannot hold.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    _refuse_added_tokens(backend, "this tokenizer")
    merges = [m if isinstance(m, str) else " ".join(m) for m in backend["model"]["merges"]]
    special = {name: str(getattr(tokenizer, name)) for name in SPECIAL_TOKENS if getattr(tokenizer, name) is not None}
    _write(directory, backend["model"]["vocab"], merges, special, context_length)


def _build(vocab: dict[str, int], merges: list[str], special: dict[str, str], context_length: int) -> Any:
    # The fast class in both versions (in transformers 5 it is the only one): the slow one of version 4 splits text
    # in another way unless ftfy happens to be installed.
    from transformers import CLIPTokenizerFast

    missing = sorted({token for token in special.values() if token not in vocab})
    if missing:
        raise ValueError(f"the vocabulary lacks the special tokens {missing}: this is not a CLIP tokenizer.")
    with tempfile.TemporaryDirectory() as folder:
        _write(folder, vocab, merges, special, context_length)
        tokenizer = CLIPTokenizerFast.from_pretrained(folder)
    tokenizer.name_or_path = ""  # otherwise the temporary folder's name would be written into saved models
    return tokenizer


def _write(
    directory: str | Path, vocab: dict[str, int], merges: list[str], special: dict[str, str], context_length: int
) -> None:
    directory = Path(directory)
    by_id = dict(sorted(vocab.items(), key=lambda item: item[1]))
    write_text(directory / "vocab.json", json.dumps(by_id, ensure_ascii=False) + "\n")
    write_text(directory / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
    settings = {"do_lower_case": True, "model_max_length": context_length, "tokenizer_class": "CLIPTokenizer"}
    write_json(directory / "tokenizer_config.json", dict(sorted({**settings, **special}.items())))


def _from_tokenizer_json(path: Path) -> tuple[dict[str, int], list[str]]:
    """Vocabulary and merges of a tokenizer.json, old format (merges "a b") or new (["a", "b"])."""
    content = read_json(path)
    model = content.get("model", {})
    if model.get("type", "BPE") != "BPE" or "merges" not in model or model.get("end_of_word_suffix") != "</w>":
        raise ValueError(f"{path} is not a CLIP tokenizer (a BPE with the end-of-word suffix </w>).")
    _refuse_added_tokens(content, str(path))
    return model["vocab"], [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]


def _refuse_added_tokens(content: dict[str, Any], where: str) -> None:
    added = [t["content"] for t in content.get("added_tokens", []) if t["content"] not in content["model"]["vocab"]]
    if added:
        raise ValueError(
            f"{where} has tokens beside CLIP's vocabulary ({', '.join(added[:5])}). Use the tokenizer without them: "
            "a CLIP has no embedding for tokens outside its vocabulary."
        )


def _special_tokens(directory: Path) -> dict[str, str]:
    """The names of the special tokens, from whichever file has them; CLIP's own where no file does."""
    special = dict(SPECIAL_TOKENS)
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        given = read_json(directory / file) if (directory / file).exists() else {}
        for name in SPECIAL_TOKENS:
            value = given.get(name)
            if value is not None:
                special[name] = value["content"] if isinstance(value, dict) else value
    return special
