"""The quick start's own steps for one tower, each in a process of its own. Upstream's two stages come between them.

    python -m llava_clipmoe.run train_llava.quickstart.child warm-start|merge|answer JOB.json

JOB.json is written by run.py: paths, the tower, the seed. Every step prints "done/total [" now and then, as upstream's
progress bars do; run.py draws its bar from that.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava_clipmoe.files import atomic_directory, load_tensors, read_json, write_text
from train_llava.eval.answers import read_jsonl, write_jsonl
from train_llava.eval.batched import Prompts
from train_llava.eval.batched import answer as answer_batches


def warm_start(job: Mapping[str, Any]) -> None:
    """Fit the projector to a word for each attribute of the training scenes (projector.py) -> warm-start/."""
    from llava.model.multimodal_encoder.builder import build_vision_tower
    from transformers import AutoTokenizer

    from .projector import fit_projector, save_projector, visual_tokens

    tokenizer = AutoTokenizer.from_pretrained(job["language_model"], use_fast=False)
    wanted = wanted_words(Path(job["data"]), lambda word: tokenizer(f" {word}", add_special_tokens=False).input_ids)
    # A dense CLIP is upstream's own tower, a CLIP-MoE is ours: upstream's builder knows both (llava_hook.py).
    tower = build_vision_tower(SimpleNamespace(mm_vision_tower=job["tower"], mm_vision_select_layer=-2))
    state = fit_projector(
        visual_tokens(tower, list(wanted)),
        list(wanted.values()),
        load_tensors(job["language_model"])["model.embed_tokens.weight"],
        steps=job["warm_steps"],
        seed=job["seed"],
        progress=lambda step: _say(step, job["warm_steps"], every=10),
    )
    with atomic_directory(job["warm_start"]) as folder:
        save_projector(folder / "mm_projector.bin", state)


def wanted_words(data: Path, ids_of: Callable[[str], list[int]]) -> dict[str, dict[int, float]]:
    """Image -> {token id: weight}: a word for each attribute of its scene, all of the same weight."""
    rows = read_jsonl(data / "words.jsonl")
    return {row["image"]: {i: 1.0 for word in row["words"] for i in ids_of(word)} for row in rows}


def merge(job: Mapping[str, Any]) -> None:
    """Stage 2's LoRA and projector into one ordinary LLaVA directory, the tower named in its config."""
    import torch
    from llava.model.builder import load_pretrained_model

    # "lora" in this name (and only here) tells upstream to merge what it loads.
    tokenizer, model, _, _ = load_pretrained_model(job["stage2"], job["language_model"], "llava-lora", device="cpu")
    model.to(torch.bfloat16)
    model.config.use_cache = True
    # Neither the tower (its own directory has it) nor the output layer (it is the embeddings once more).
    left_out = re.compile(r"\.vision_tower\.|^lm_head\.")
    weights = {name: tensor for name, tensor in model.state_dict().items() if not left_out.search(name)}
    with atomic_directory(job["result"]) as folder:
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        write_text(folder / "README.md", _card(job["name"]))


def _card(name: str) -> str:
    tower = "a CLIP-MoE" if name == "clipmoe" else "the dense CLIP that the CLIP-MoE was made from"
    return (
        f"# llava-v1-smollm2-{name}\n\nA toy LLaVA for the CPU: SmolLM2-135M-Instruct (Apache-2.0) that looks through "
        f"{tower}, trained by `llava-clipmoe llava-quickstart` on questions about scenes of OpenMoji drawings (CC "
        "BY-SA 4.0). It knows what is in such a scene, and little else.\n"
    )


def answer(job: Mapping[str, Any]) -> None:
    """Ask the finished directory, as upstream loads it, every held-out and pair question -> answers/.

    Blind: the same model gets one plain grey picture with every question. As the answer then depends on the question
    alone, each form is asked once and its answer stands for all.
    """
    from llava.model.builder import load_pretrained_model
    from PIL import Image

    name = Path(job["result"]).name
    tokenizer, model, processor, _ = load_pretrained_model(job["result"], None, name, device="cpu")
    heldout, pairs = (read_jsonl(Path(job["data"]) / f"{part}.jsonl") for part in ("heldout", "pairs"))
    with atomic_directory(job["answers"]) as folder:
        grey = folder / "grey.png"
        Image.new("RGB", (336, 336), (127, 127, 127)).save(grey)
        blind = [{"image": str(grey), "question": text} for text in dict.fromkeys(r["question"] for r in heldout)]
        parts = {"heldout": heldout, "blind": blind, "pairs": pairs}
        total, said = sum(map(len, parts.values())), 0
        for part, rows in parts.items():
            texts = []
            for batch in _generate(model, tokenizer, processor, rows):
                texts += batch
                said += len(batch)
                _say(said, total)
            if part == "blind":
                of_question = {row["question"]: text for row, text in zip(rows, texts, strict=True)}
                rows, texts = heldout, [of_question[row["question"]] for row in heldout]
            answered = zip(rows, texts, strict=True)
            write_jsonl(folder / f"{part}.jsonl", [{**row, "text": text} for row, text in answered])


def _generate(model: Any, tokenizer: Any, processor: Any, rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    questions = [{"question_id": i, "text": row["question"], "image": row["image"]} for i, row in enumerate(rows)]
    prompts = Prompts(questions, Path(), tokenizer, processor, model.config, "vicuna_v1")
    return answer_batches(model, tokenizer, prompts, batch_size=16, max_new_tokens=24)


def _say(done: int, total: int, every: int = 1) -> None:
    if done % every == 0 or done == total:
        print(f"{done}/{total} [", flush=True)


if __name__ == "__main__":
    {"warm-start": warm_start, "merge": merge, "answer": answer}[sys.argv[1]](read_json(sys.argv[2]))
