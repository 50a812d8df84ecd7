"""Answer questions several at a time, with the answers that upstream's runners give one by one.

    python -m llava_clipmoe.run train_llava.eval.batched --model-path DIR --batch-size 16 \
        --question-file Q.jsonl --image-folder IMAGES --answers-file A.jsonl

Same prompts, same picture preparation, greedy. A decoder must have its prompts end at the same place, so a batch is
padded on the left; upstream's prepare_inputs_labels_for_multimodal does that when the model's config has
`tokenizer_padding_side = "left"` and an attention mask says what is padding (positions are counted from the mask).
Padding changes the order of sums: in fp16 two nearly equal logits may change places, in fp32 that is very rare.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from .answers import Row, read_jsonl
from .settings import template_of

KEPT = ("round_id", "options", "option_char")
"""Fields that only MMBench's answers have."""


@dataclass(frozen=True)
class Arguments:
    model_path: str
    question_file: Path
    image_folder: Path
    answers_file: Path
    model_base: str | None = None
    conv_mode: str | None = None
    """Conversation template; when absent, the one that the model's directory says it was trained with."""
    batch_size: int = 8
    max_new_tokens: int = 128
    workers: int = min(4, os.cpu_count() or 1)
    """Processes that read pictures; 0 does it in this one."""


@dataclass
class Prompts(Dataset):
    """Questions -> (input ids [T] with one image token, pixels [3,R,R] or [N,3,R,R], picture size)."""

    questions: Sequence[Row]
    image_folder: Path
    tokenizer: Any
    processor: Any
    config: Any
    conv_mode: str

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
        from llava.mm_utils import process_images, tokenizer_image_token
        from PIL import Image

        question = self.questions[index]
        with Image.open(self.image_folder / question["image"]) as file:
            image = file.convert("RGB")
        pixels = process_images([image], self.processor, self.config)[0]
        prompt = prompt_of(question["text"] + question.get("suffix", ""), self.config, self.conv_mode)
        return tokenizer_image_token(prompt, self.tokenizer, return_tensors="pt"), pixels, image.size


def prompt_of(text: str, config: Any, conv_mode: str) -> str:
    """The whole prompt of a first question about one picture: upstream's template, its image token before the text."""
    from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
    from llava.conversation import conv_templates

    token = DEFAULT_IMAGE_TOKEN
    if config.mm_use_im_start_end:
        token = DEFAULT_IM_START_TOKEN + token + DEFAULT_IM_END_TOKEN
    conversation = conv_templates[conv_mode].copy()
    conversation.append_message(conversation.roles[0], f"{token}\n{text}")
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def _collate(batch: Sequence[tuple[torch.Tensor, torch.Tensor, tuple[int, int]]]) -> tuple[Any, ...]:
    """-> ids [B,T] padded on the right, mask [B,T], pixels (stacked, or a list where shapes differ), sizes.

    The side does not matter here: upstream removes the padding by the mask, puts the picture in, and pads again.
    """
    ids, pixels, sizes = zip(*batch, strict=True)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    same = len({picture.shape for picture in pixels}) == 1
    return pad_sequence(ids, batch_first=True), mask, torch.stack(pixels) if same else list(pixels), list(sizes)


def answer(
    model: Any, tokenizer: Any, prompts: Prompts, *, batch_size: int, max_new_tokens: int, workers: int = 0
) -> Iterator[list[str]]:
    """Yields the answers of one batch after the other, in the order of the questions."""
    model.config.tokenizer_padding_side = "left"
    half = {"device": model.device, "dtype": torch.float16}  # as upstream's runners do, on every device
    for ids, mask, pixels, sizes in DataLoader(prompts, batch_size, num_workers=workers, collate_fn=_collate):
        with torch.inference_mode():
            found = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                images=[picture.to(**half) for picture in pixels] if isinstance(pixels, list) else pixels.to(**half),
                image_sizes=sizes,
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_new_tokens,
                use_cache=True,
                pad_token_id=tokenizer.eos_token_id,  # fills up answers that end early; not decoded
            )
        yield [text.strip() for text in tokenizer.batch_decode(found, skip_special_tokens=True)]


def main(argv: list[str] | None = None) -> int:
    """Answer a question file. Answers are on disk after each batch."""
    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model
    from llava.utils import disable_torch_init
    from tqdm import tqdm

    questions = read_jsonl(arguments.question_file, fields=("question_id", "text", "image"))
    disable_torch_init()
    name = get_model_name_from_path(arguments.model_path)
    tokenizer, model, processor, _ = load_pretrained_model(arguments.model_path, arguments.model_base, name)
    template = arguments.conv_mode or template_of(arguments.model_path, arguments.model_base)
    prompts = Prompts(questions, arguments.image_folder, tokenizer, processor, model.config, template)
    how = {name: getattr(arguments, name) for name in ("batch_size", "max_new_tokens", "workers")}
    rows = iter(questions)
    arguments.answers_file.parent.mkdir(parents=True, exist_ok=True)
    with arguments.answers_file.open("w", encoding="utf-8") as file, tqdm(total=len(questions)) as bar:
        for texts in answer(model, tokenizer, prompts, **how):
            for text, question in zip(texts, rows, strict=False):
                line = {"question_id": question["question_id"], "prompt": question["text"], "text": text}
                line |= {key: question[key] for key in KEPT if key in question}
                file.write(json.dumps(line | {"model_id": name, "metadata": {}}) + "\n")
            file.flush()
            bar.update(len(texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
