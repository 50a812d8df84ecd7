"""The two LLaVAs of the page: loaded by upstream's own loader, asked one question at a time, answered as a stream.

    left, right = load_eyes(Models(left=Path("llava-base"), right=Path("llava-clipmoe")))
    for text in left.stream(picture, "What is the main color?", Limits()): ...

Two ways to have two eyes: two whole LLaVA directories, or (`language_model` given) one language model in memory with
two projectors and towers, as upstream's stage 1 leaves them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from llava_clipmoe.files import load_foreign_pt, read_json

from .turns import Turns

FIRST_TOKEN_SECONDS = 600.0
"""Longest wait for the next piece of text: a 7B model on a slow CPU reads a picture for minutes."""


class ModelGone(ValueError):
    """What a LLaVA needs is no longer on the disk."""


@dataclass(frozen=True)
class Models:
    """Which two LLaVAs to compare, and how to load them."""

    left: Path = Path("runs/llava-quickstart/llava-v1-smollm2-base")
    """LLaVA directory of the first eye (with --language-model: a directory with mm_projector.bin)."""
    right: Path = Path("runs/llava-quickstart/llava-v1-smollm2-clipmoe")
    """LLaVA directory of the second eye."""
    language_model: Path | None = None
    """Directory of the language model that both eyes share: it is in memory once. For projectors of stage 1."""
    names: tuple[str, str] | None = None
    """What the page calls them. Default: after their eyes, "CLIP" and "CLIP-MoE"."""
    bits: Literal[16, 8, 4] = 16
    """8 or 4: language model quantised by bitsandbytes. 16 is float32 on a CPU (LLAVA_CLIPMOE_CPU_DTYPE)."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    conversation: str | None = None
    """Upstream's conversation template. Default: by the directory's name, as upstream's own command line does."""


@dataclass(frozen=True)
class Generation:
    """How an answer is made."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 takes the likeliest token each time: the same question gives the same answer."""


@dataclass
class LanguageModel:
    """A loaded LLaVA, and the queue that lets one generation at a time through it."""

    model: Any
    tokenizer: Any
    conversation: str
    turns: Turns = field(default_factory=Turns)


@dataclass
class Eye:
    """One of the two: a tower and a projector in front of a language model."""

    name: str
    directory: Path
    llm: LanguageModel
    tower: Any
    projector: Any
    config: Any

    @property
    def is_moe(self) -> bool:
        from llava_clipmoe.vision_tower import CLIPMoEVisionTower

        return isinstance(self.tower, CLIPMoEVisionTower)

    @property
    def processor(self) -> Any:
        return self.tower.image_processor

    @property
    def tower_source(self) -> str:
        """Directory or hub id of the whole CLIP that the tower was read from."""
        return str(self.tower.directory) if self.is_moe else self.tower.vision_tower_name

    def check_files(self) -> None:
        """Raise ModelGone when the directory has vanished: the model in memory still answers, a restart would not."""
        if not (self.directory / "config.json").is_file():
            raise ModelGone(
                f"The folder of {self.name} ({self.directory.name}) is no longer there. Answers still come from "
                "memory, but the page cannot be started again without it."
            )

    @contextmanager
    def in_place(
        self, stop: threading.Event | None = None, waiting: Callable[[int], None] | None = None
    ) -> Iterator[Any]:
        """Alone with the language model, which looks through this eye while the block runs. Waits as `Turns.turn`."""
        with self.llm.turns.turn(waiting, stop):
            inner, model = self.llm.model.get_model(), self.llm.model
            if inner.vision_tower is not self.tower:
                inner.vision_tower, inner.mm_projector = self.tower, self.projector
                model.config = inner.config = self.config
            yield model

    # ------------------------------------------------------------------------------------------------------ answers

    def inputs(self, picture: Image.Image, question: str) -> dict[str, Any]:
        """Picture and question as upstream's `generate` wants them: ids [1,T] with one image token, pixels, size."""
        from llava.mm_utils import process_images, tokenizer_image_token

        from train_llava.eval.batched import prompt_of

        pixels = process_images([picture], self.processor, self.config)
        model, tokenizer = self.llm.model, self.llm.tokenizer
        like = {"device": model.device, "dtype": model.dtype}
        prompt = prompt_of(question, self.config, self.llm.conversation)
        ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")
        return {
            "inputs": ids.unsqueeze(0).to(model.device),
            "images": [part.to(**like) for part in pixels] if isinstance(pixels, list) else pixels.to(**like),
            "image_sizes": [picture.size],
        }

    def stream(
        self,
        picture: Image.Image,
        question: str,
        how: Generation,
        stop: threading.Event | None = None,
        waiting: Callable[[int], None] | None = None,
    ) -> Iterator[str]:
        """Yields the answer so far: an empty one when its turn has come, then each time it has grown.

        `stop` ends it early, and so does closing the iterator. waiting: told how many are before it in the queue.
        Raises what the generation raised (out of memory, for instance), QueueFull, Stopped.
        """
        from transformers import TextIteratorStreamer

        left = threading.Event()  # set when nobody reads on; `stop` belongs to the caller, who may have other answers
        stops = [left] if stop is None else [left, stop]
        with self.in_place(stop, waiting) as model:
            yield ""
            streamer = TextIteratorStreamer(
                self.llm.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=FIRST_TOKEN_SECONDS
            )
            failed: list[BaseException] = []
            arguments = {
                **self.inputs(picture, question), "streamer": streamer, "use_cache": True, "do_sample": False,
                "max_new_tokens": how.max_new_tokens, "stopping_criteria": [_stops_when(stops)],
                "pad_token_id": self.llm.tokenizer.eos_token_id,
            }  # fmt: skip
            if how.temperature > 0:
                arguments |= {"do_sample": True, "temperature": how.temperature}
            thread = threading.Thread(target=_generate, args=(model, arguments, streamer, failed), daemon=True)
            thread.start()
            try:
                yield from _growing(streamer, stops, separator_of(self.llm.conversation))
            finally:
                left.set()
                thread.join()  # the lock is given back only when the model is idle
        if failed:
            raise failed[0]

    def answer_files(
        self,
        pictures: Sequence[Path],
        questions: Sequence[str],
        batch_size: int,
        max_new_tokens: int = 32,
        stop: threading.Event | None = None,
    ) -> Iterator[list[str]]:
        """Greedy answers to one question a picture file, a batch at a time; the model is free between batches."""
        from train_llava.eval.batched import Prompts, answer

        for start in range(0, len(pictures), batch_size):
            part = slice(start, start + batch_size)
            rows = [
                {"question_id": i, "text": text, "image": str(picture)}
                for i, (picture, text) in enumerate(zip(pictures[part], questions[part], strict=True))
            ]
            with self.in_place(stop) as model:
                prompts = Prompts(rows, Path(), self.llm.tokenizer, self.processor, self.config, self.llm.conversation)
                texts = next(answer(model, self.llm.tokenizer, prompts, batch_size=batch_size,
                                    max_new_tokens=max_new_tokens))  # fmt: skip
            yield texts  # out of the turn: nobody knows when the next batch is asked for


def _generate(model: Any, arguments: dict[str, Any], streamer: Any, failed: list[BaseException]) -> None:
    """Body of the generating thread; the reader of the stream raises what failed here."""
    import torch

    try:
        with torch.inference_mode():
            model.generate(**arguments)
    except BaseException as error:
        failed.append(error)
        streamer.end()


def _growing(streamer: Any, stops: Sequence[threading.Event], separator: str) -> Iterator[str]:
    text = ""
    for piece in streamer:
        text += piece
        before, found, _ = text.partition(separator)
        if piece:
            yield before.strip()
        if found or any(stop.is_set() for stop in stops):
            return


def _stops_when(stops: Sequence[threading.Event]) -> Any:
    import torch
    from transformers import StoppingCriteria

    class Stopped(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return torch.full((len(input_ids),), any(stop.is_set() for stop in stops), device=input_ids.device)

    return Stopped()


# ------------------------------------------------------------------------------------------------------------- loading


def conversation_of(name: str) -> str:
    """Upstream's template for a directory of this name (the rule of llava/serve/cli.py)."""
    name = name.lower()
    rules = {"llama-2": "llava_llama_2", "mistral": "mistral_instruct", "v1.6-34b": "chatml_direct", "v1": "llava_v1",
             "mpt": "mpt"}  # fmt: skip
    return next((template for part, template in rules.items() if part in name), "llava_v0")


def separator_of(conversation: str) -> str:
    """What ends an answer in this template: text after it is the model talking to itself."""
    from llava.conversation import SeparatorStyle, conv_templates

    template = conv_templates[conversation]
    if template.sep_style == SeparatorStyle.TWO or not template.sep:  # Mistral's has only the second
        return template.sep2
    return template.sep


def check_models(models: Models) -> None:
    """Raise FileNotFoundError or ValueError for what is missing, before anything is loaded."""
    for side, directory in (("left", models.left), ("right", models.right)):
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(
                f"there is no LLaVA at {directory} (the {side} eye). Train the two small ones with `make "
                "llava-quickstart`, or give two LLaVA directories: llava-clipmoe demo --left DIR --right DIR"
            )
        if not read_json(directory / "config.json").get("mm_vision_tower"):
            raise ValueError(f"{directory} is no LLaVA: its config.json names no mm_vision_tower.")
        if models.language_model is not None and not (directory / "mm_projector.bin").is_file():
            raise ValueError(
                f"{directory} has no mm_projector.bin. --language-model goes with two directories of stage 1 (a "
                "projector and a config each); leave it out for two whole LLaVAs."
            )
        if models.language_model is None and not _has_weights(directory):
            raise FileNotFoundError(
                f"{directory} has no weights of a whole LLaVA. If stage 1 has left it (mm_projector.bin), give the "
                "language model that it belongs to: --language-model DIR."
            )
    if models.language_model is not None and not (models.language_model / "config.json").is_file():
        raise FileNotFoundError(f"there is no language model at {models.language_model} (no config.json).")
    if models.names is not None:
        _check_names(*models.names)


def _has_weights(directory: Path) -> bool:
    return any(directory.glob("*.safetensors")) or any(directory.glob("pytorch_model*.bin"))


def _check_names(left: str, right: str) -> None:
    if left == right:
        raise ValueError(f"both eyes are called {left!r}: give them two --names.")


def load_eyes(models: Models, say: Callable[[str], None] = print) -> tuple[Eye, Eye]:
    """Load both; `say` gets one line about each. Raises what `check_models` does, and TooLittleMemory."""
    check_models(models)
    left = _load(models.left, models, say)
    right = _share(left, models.right, say) if models.language_model else _load(models.right, models, say)
    left.name, right.name = models.names or _names(left, right)
    return left, right


def _load(directory: Path, models: Models, say: Callable[[str], None]) -> Eye:
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    start = time.monotonic()
    base = str(models.language_model) if models.language_model else None
    directory = directory.resolve()
    device, name = device_of(models.device), get_model_name_from_path(str(directory))
    tokenizer, model, _, _ = load_pretrained_model(
        str(directory), base, name, device=device, **_quantised(models.bits, device)
    )
    conversation = models.conversation or conversation_of(name)
    inner = model.get_model()
    _settle(inner.vision_tower, model.device)
    llm = LanguageModel(model.eval(), tokenizer, conversation)
    eye = Eye(directory.name, directory, llm, inner.vision_tower, inner.mm_projector, model.config)
    say(f"{directory.name}: loaded in {time.monotonic() - start:.0f} s")
    return eye


def _settle(tower: Any, device: Any) -> None:
    """Where the language model is on the CPU, so is its tower, in float32: upstream puts it onto a GPU where there is
    one, and into the dtype that it is stored in."""
    import torch

    if device.type == "cpu":
        tower.to(device=device, dtype=torch.float32)


def _quantised(bits: int, device: str) -> dict[str, Any]:
    """What upstream's loader is given for a language model of 8 or 4 bits. Asked for them by its own switches, it would
    quantise the projector too: part of what is compared, and of stage 1's it would make an empty one.
    """
    if bits == 16:
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    from llava_clipmoe.compat.loading import cpu_dtype

    how = {"load_in_8bit": True} if bits == 8 else {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": cpu_dtype() if device == "cpu" else torch.float16,
    }  # fmt: skip
    return {"quantization_config": BitsAndBytesConfig(**how, llm_int8_skip_modules=["model.mm_projector", "lm_head"])}


def _share(first: Eye, directory: Path, say: Callable[[str], None]) -> Eye:
    """A second tower and projector before the language model of `first`."""
    from llava.model.multimodal_encoder.builder import build_vision_tower
    from llava.model.multimodal_projector.builder import build_vision_projector
    from transformers import AutoConfig

    model = first.llm.model
    directory = directory.resolve()
    config = AutoConfig.from_pretrained(directory)
    if config.hidden_size != model.config.hidden_size:
        raise ValueError(
            f"the projector of {directory} is for a language model of width {config.hidden_size}, the shared one has "
            f"{model.config.hidden_size}."
        )
    tower = build_vision_tower(config, delay_load=True)
    tower.load_model(device_map={"": model.device})
    _settle(tower, model.device)
    projector = build_vision_projector(config)
    state = load_foreign_pt(directory / "mm_projector.bin")
    # Through halves, as upstream's loader reads the first eye's: the two must differ in nothing but their training.
    projector.load_state_dict({name.rpartition("mm_projector.")[2]: tensor.half() for name, tensor in state.items()
                               if "mm_projector." in name})  # fmt: skip
    projector.to(device=model.device, dtype=model.dtype).eval()
    say(f"{directory.name}: its eye shares that language model")
    return Eye(directory.name, directory, first.llm, tower, projector, config)


def _names(left: Eye, right: Eye) -> tuple[str, str]:
    """After their eyes where these differ, else after their directories."""
    kinds = tuple("CLIP-MoE" if eye.is_moe else "CLIP" for eye in (left, right))
    if kinds[0] != kinds[1]:
        return kinds
    names = left.directory.name, right.directory.name
    return names if names[0] != names[1] else (f"{names[0]} (left)", f"{names[1]} (right)")


def device_of(device: str) -> str:
    import torch

    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
