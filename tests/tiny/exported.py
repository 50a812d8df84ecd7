"""A tiny LLaVA as `export-hf` writes it, pictures to ask it about, and what transformers itself answers."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from .llavas import COLOURS, make_language_model, make_llava, make_towers

QUESTION = "What colour is the square?"
NEW_TOKENS = 8


TILES = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[24, 48], [48, 48], [72, 24]],
}
"""Settings of a LLaVA that cuts pictures into tiles of the tiny towers' 24 pixels."""


def make_exported_llava(folder: Path, **settings) -> tuple[Path, Path]:
    """-> (a LLaVA with a CLIP-MoE in upstream's format, the same as export-hf writes it); settings: of its config."""
    from llava_clipmoe.export import export_hf

    tower, llm = make_towers(folder)[0], make_language_model(folder / "llama")
    llava = make_llava(folder / "llava-v1-clipmoe", tower, llm, 2, **settings)
    export_hf(llava, folder / "exported")
    return llava, folder / "exported"


def make_pictures(folder: Path) -> list[Path]:
    """Four squares in plain colours, none of them square in pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (name, colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (40 + i, 30), colour).save(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in COLOURS]


def answers_of_transformers(directory: Path, pictures: list[Path]) -> list[str]:
    """What transformers' own class says of each picture to QUESTION: the reference for whoever serves it."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from llava_clipmoe.registration import register_auto_classes

    register_auto_classes()
    model = AutoModelForImageTextToText.from_pretrained(directory).eval()
    processor = AutoProcessor.from_pretrained(directory)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    answers = []
    for picture in pictures:
        inputs = processor(text=prompt, images=Image.open(picture), return_tensors="pt")
        out = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.decode(out, skip_special_tokens=True).strip())
    return answers
