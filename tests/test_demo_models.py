"""The demo's two LLaVAs: they say what upstream's LLaVA says, however they are loaded, asked and interrupted."""

from __future__ import annotations

import importlib.util
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny.llavas import COLOURS, make_language_model, make_llava, make_towers, upstream_is_installed

pytest.importorskip("gradio", reason="the demo's packages are not installed")
if not upstream_is_installed():
    pytest.skip("upstream LLaVA (llava-torch) is not installed here", allow_module_level=True)

from demo.llava.generate import Llava, Stopped, separator_of
from demo.llava.load import conversation_of, load_llavas
from demo.llava.settings import Generation, Models, check_models

pytest_plugins = ["tiny.loaded_llavas"]
pytestmark = pytest.mark.usefixtures("upstream")

QUESTION = "What colour is the square?"
PICTURES = [Image.new("RGB", (40 + 10 * i, 30), colour) for i, colour in enumerate(COLOURS.values())]
TALKATIVE = PICTURES[1]
"""The tiny models go on and on about it (see `full_length`)."""
SHORT, LONG = Generation(max_new_tokens=20), Generation(max_new_tokens=300)


def upstream_loads(directory: Path, base: Path | None = None) -> tuple[Any, Any]:
    """-> (tokenizer, model) from upstream's own loader."""
    from llava.model.builder import load_pretrained_model

    return load_pretrained_model(str(directory), base and str(base), directory.name, device="cpu")[:2]


def upstream_answers(tokenizer: Any, model: Any, picture: Image.Image, question: str, max_new_tokens: int = 20) -> str:
    """As llava/serve/cli.py asks, greedy, in one go."""
    from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token

    conversation = conv_templates["llava_v1"].copy()
    conversation.append_message(conversation.roles[0], DEFAULT_IMAGE_TOKEN + "\n" + question)
    conversation.append_message(conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
    pixels = process_images([picture], model.get_vision_tower().image_processor, model.config)
    with torch.inference_mode():
        out = model.generate(ids[None], images=pixels, image_sizes=[picture.size], do_sample=False,
                             max_new_tokens=max_new_tokens, use_cache=True)  # fmt: skip
    return tokenizer.decode(out[0], skip_special_tokens=True).strip()


def said(llava: Llava, picture: Image.Image, how: Generation = SHORT, **more: Any) -> str:
    return list(llava.stream(picture, QUESTION, how, **more))[-1]


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """The result of `work`, or a failing test where it hangs (a turn that is not given back, for instance)."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(work).result(timeout=seconds)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Steps:
    """Counts the forward passes of a language model: one a token."""

    def __init__(self, llava: Llava):
        self.count = 0
        self.handle = llava.llm.model.register_forward_hook(self.one_more)

    def one_more(self, *_: Any) -> None:
        self.count += 1

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()


# ------------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("side", [0, 1])
def test_a_streamed_answer_is_the_one_that_upstream_generates_in_one_go(own, two_llavas, side):
    tokenizer, model = upstream_loads(two_llavas[side])
    answers = set()
    for picture in PICTURES:
        states = list(own[side].stream(picture, QUESTION, SHORT))
        assert states[-1] == upstream_answers(tokenizer, model, picture, QUESTION)
        answers.add(states[-1])
    assert len(answers) > 2, "the pictures hardly matter: the test would pass with the wrong one"


def test_an_answer_grows(own):
    states = list(own[0].stream(PICTURES[0], QUESTION, SHORT))
    assert states[0] == ""
    assert len(states) > 4
    assert all(after.startswith(before) for before, after in pairwise(states))


def test_the_number_of_tokens_is_limited(own):
    with Steps(own[0]) as steps:
        said(own[0], PICTURES[0], Generation(max_new_tokens=7))
    assert steps.count == 7


def test_batched_answers_to_files_are_the_streamed_ones(own, tmp_path):
    """Questions of different lengths in one batch: padding must not change an answer."""
    questions = [QUESTION, "Describe the picture.", "Describe the picture in one sentence. " * 3, QUESTION, "Red?"]
    files, expected = [], []
    for llava in own:
        for number, (picture, question) in enumerate(zip([*PICTURES, PICTURES[0]], questions, strict=True)):
            files.append(tmp_path / f"{number}.png")
            picture.save(files[-1])
            expected.append(list(llava.stream(picture, question, SHORT))[-1])
        batches = list(llava.answer_files(files, questions, batch_size=2, max_new_tokens=20))
        assert [len(batch) for batch in batches] == [2, 2, 1]
        assert [text for batch in batches for text in batch] == expected
        files, expected = [], []


def test_a_warm_answer_is_drawn_from_the_distribution_and_a_cold_one_is_not(own):
    warm = Generation(20, temperature=5.0)
    torch.manual_seed(0)
    assert len({said(own[0], PICTURES[0], warm) for _ in range(3)}) == 3
    assert len({said(own[0], PICTURES[0]) for _ in range(3)}) == 1


def test_text_after_the_templates_separator_is_not_shown(own):
    """A model that goes on after its answer talks to itself; generation ends there too."""
    from demo.llava.generate import _growing

    read = []

    def pieces():
        for piece in ("It is ", "red.#", "## Human: ", "and"):
            read.append(piece)
            yield piece

    assert list(_growing(pieces(), [], "###")) == ["It is", "It is red.#", "It is red."]
    assert read[-1] == "## Human: "


# --- one language model, two towers


def test_a_shared_language_model_is_in_memory_once(shared):
    left, right = shared
    assert left.llm is right.llm and left.tower is not right.tower
    storages: dict[int, int] = {}
    for llava in shared:
        for part in (llava.llm.model, llava.tower, llava.projector):
            storages |= {p.data_ptr(): p.numel() * p.element_size() for p in part.parameters()}

    def size(part: Any) -> int:
        return sum(p.numel() * p.element_size() for p in part.parameters())

    language_model = size(left.llm.model.model.layers) + size(left.llm.model.model.embed_tokens)
    language_model += size(left.llm.model.model.norm) + size(left.llm.model.lm_head)
    assert sum(storages.values()) == language_model + sum(size(e.tower) + size(e.projector) for e in shared)


@pytest.mark.parametrize("side", [0, 1])
def test_a_shared_pair_answers_as_each_llava_loaded_on_its_own(shared, two_projectors, side):
    tokenizer, model = upstream_loads(two_projectors[1 + side], base=two_projectors[0])
    for name, tensor in shared[side].projector.state_dict().items():
        torch.testing.assert_close(tensor, model.get_model().mm_projector.state_dict()[name], atol=0, rtol=0)
    for picture in PICTURES:
        assert said(shared[side], picture) == upstream_answers(tokenizer, model, picture, QUESTION)


def test_two_llavas_of_one_language_model_never_look_through_each_other(shared, tmp_path):
    """Streams and batches of both LLaVAs at once, from six threads."""
    files = [tmp_path / f"{i}.png" for i in range(len(PICTURES))]
    for picture, file in zip(PICTURES, files, strict=True):
        picture.save(file)
    expected = [[said(llava, picture) for picture in PICTURES] for llava in shared]
    assert not set(expected[0]) & set(expected[1]), "the LLaVAs must differ for this to show anything"

    def stream(llava: Llava) -> list[str]:
        return [said(llava, picture) for picture in PICTURES]

    def batches(llava: Llava) -> list[str]:
        found = llava.answer_files(files, [QUESTION] * len(files), batch_size=1, max_new_tokens=20)
        return [text for batch in found for text in batch]

    with ThreadPoolExecutor(6) as pool:
        work = [(side, pool.submit(how, shared[side])) for how in (stream, batches, stream) for side in (0, 1)]
        for side, future in work:
            assert future.result(timeout=60) == expected[side]


def test_the_model_is_free_between_two_batches(shared, tmp_path):
    """One reads the first batch and takes a long time over it: others ask meanwhile."""
    PICTURES[0].save(tmp_path / "0.png")
    batches = shared[0].answer_files([tmp_path / "0.png"] * 2, [QUESTION] * 2, batch_size=1, max_new_tokens=20)
    first = next(batches)
    assert within(30, lambda: said(shared[1], PICTURES[0]))
    assert within(30, lambda: list(batches)) == [first]


def test_a_projector_for_another_width_is_refused(two_projectors, tmp_path):
    llm, left, _ = two_projectors
    wide = make_language_model(tmp_path / "wide", hidden_size=64)
    moe, _ = make_towers(tmp_path)
    right = make_llava(tmp_path / "llava-v1-wide", moe, wide, whole=False)
    with pytest.raises(ValueError, match="width 64, the shared one has 32"):
        load_llavas(Models(left, right, llm, device="cpu"), say=lambda line: None)


def test_towers_that_are_stored_in_half_compute_in_float32_on_the_cpu(two_projectors, tmp_path):
    """Both in one precision, whichever way they came in."""
    from llava_clipmoe.files import load_tensors, read_json, save_tensors, write_json

    llm, *sides = two_projectors
    copies = []
    for side in sides:
        config = read_json(side / "config.json")
        tower = shutil.copytree(config["mm_vision_tower"], tmp_path / Path(config["mm_vision_tower"]).name)
        state = {name: tensor.half() for name, tensor in load_tensors(tower).items()}
        save_tensors(tower / "model.safetensors", state, {"format": "pt"})
        copies.append(shutil.copytree(side, tmp_path / side.name))
        write_json(copies[-1] / "config.json", {**config, "mm_vision_tower": str(tower)})
    for left, right in (copies, reversed(copies)):
        for llava in load_llavas(Models(left, right, llm, device="cpu"), say=lambda line: None):
            assert llava.tower.dtype == torch.float32 and llava.tower.device.type == "cpu", llava.name


# ----------------------------------------------------------------------------------------------------------- quantised


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("one_language_model", [False, True])
def test_a_quantised_language_model_answers(tmp_path, bits, one_language_model):
    """4-bit weights come in blocks of 64."""
    llm = make_language_model(tmp_path / "llama", hidden_size=64)
    towers = make_towers(tmp_path)
    whole = not one_language_model
    names = ("llava-v1-left", "llava-v1-right")
    sides = [
        make_llava(tmp_path / n, t, llm, i, whole=whole) for i, (n, t) in enumerate(zip(names, towers, strict=True))
    ]
    base = llm if one_language_model else None
    full = load_llavas(Models(*sides, base, device="cpu"), say=lambda line: None)
    small = load_llavas(Models(*sides, base, bits=bits, device="cpu"), say=lambda line: None)
    kind = {8: "Linear8bitLt", 4: "Linear4bit"}[bits]
    for llava, reference in zip(small, full, strict=True):
        assert type(llava.llm.model.model.layers[0].mlp.up_proj).__name__ == kind
        assert llava.tower.dtype == reference.tower.dtype  # the towers are what is compared: they stay whole
        for name, tensor in reference.projector.state_dict().items():
            torch.testing.assert_close(llava.projector.state_dict()[name], tensor, atol=0, rtol=0)
        assert said(llava, PICTURES[0])  # random weights in 4 bits may end an answer early


# ----------------------------------------------------------------------------------------------- stopping, and failing


@pytest.fixture
def full_length(own) -> int:
    """Steps of the whole long answer: the other tests must see far fewer."""
    with Steps(own[0]) as steps:
        said(own[0], TALKATIVE, LONG)
    assert steps.count > 100, "the tiny model says its end too early for these tests"
    return steps.count


def test_stop_ends_a_long_answer_early_and_frees_the_turn(own, full_length):
    llava, stop = own[0], threading.Event()
    with Steps(llava) as steps:
        for text in llava.stream(TALKATIVE, QUESTION, LONG, stop):
            if text:
                stop.set()
    assert steps.count < full_length / 2
    assert text, "what was said so far stays"
    assert within(30, lambda: said(llava, PICTURES[0]))


@pytest.mark.parametrize("after", [1, 3])
def test_closing_the_iterator_ends_the_answer_and_frees_the_turn(own, full_length, after):
    """1: before the generation has begun."""
    llava = own[0]
    with Steps(llava) as steps:
        answer = llava.stream(TALKATIVE, QUESTION, LONG)
        for _ in range(after):
            next(answer)
        answer.close()
        seen = steps.count
        assert within(30, lambda: said(llava, TALKATIVE))
        assert steps.count - seen == SHORT.max_new_tokens, "the closed answer ran on"
    assert seen < full_length / 2


def test_who_has_stopped_before_the_turn_comes_does_not_start(own):
    """Reading a picture with a large model takes long: a stopped question must not cost it."""
    stop = threading.Event()
    stop.set()
    with Steps(own[0]) as steps, pytest.raises(Stopped):
        said(own[0], PICTURES[0], stop=stop)
    assert steps.count == 0


def test_an_error_in_the_tower_reaches_the_reader_and_the_next_question_works(own, monkeypatch):
    expected = said(own[0], PICTURES[0])

    def fail(pixels):
        raise RuntimeError("the tower has run out of memory")

    monkeypatch.setattr(own[0].tower, "forward", fail)
    with pytest.raises(RuntimeError, match="the tower has run out of memory"):
        within(30, lambda: said(own[0], PICTURES[0]))
    monkeypatch.undo()
    assert within(30, lambda: said(own[0], PICTURES[0])) == expected


def test_an_error_in_mid_answer_reaches_the_reader_after_what_was_said(own, monkeypatch):
    model, steps = own[0].llm.model, []
    expected, forward = said(own[0], PICTURES[0]), model.forward

    def fail_later(*args, **kwargs):
        steps.append(1)
        if len(steps) > 15:
            raise RuntimeError("out of memory after 15 tokens")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", fail_later)
    texts = []
    with pytest.raises(RuntimeError, match="after 15 tokens"):
        for text in own[0].stream(PICTURES[0], QUESTION, SHORT):
            texts.append(text)
    monkeypatch.undo()
    assert texts[-1] and expected.startswith(texts[-1])
    assert within(30, lambda: said(own[0], PICTURES[0])) == expected


def test_answers_still_come_when_the_directory_has_vanished(two_llavas, tmp_path):
    copies = [shutil.copytree(directory, tmp_path / directory.name) for directory in two_llavas]
    llavas = load_llavas(Models(*copies, device="cpu"), say=lambda line: None)
    before = said(llavas[1], PICTURES[0])
    shutil.rmtree(copies[1])
    assert said(llavas[1], PICTURES[0]) == before


# -------------------------------------------------------------------------------------------------- templates and names

NAMES = [
    "llava-v1.5-7b", "llava-v1-smollm2-base", "LLaVA-Llama-2-13b-chat", "llava-v1.6-mistral-7b", "llava-v1.6-34b",
    "llava-mpt-7b", "llava-7b-v0", "my-llava", "llava-v1.6-vicuna-13b", "llava-llama-2-v1", "llava-v1-mpt",
]  # fmt: skip


@pytest.fixture
def cli_rule(monkeypatch) -> Callable[[str], str]:
    """The template that upstream's own command line takes for a name: its `main`, up to the first question."""
    from llava import conversation
    from llava.serve import cli

    class Asked(Exception):
        pass

    class Templates(dict):
        def __getitem__(self, key: str) -> Any:
            raise Asked(key)

    def rule(name: str) -> str:
        arguments = dict(model_path=name, model_base=None, load_8bit=False, load_4bit=False, device="cpu",
                         conv_mode=None)  # fmt: skip
        monkeypatch.setattr(cli, "disable_torch_init", lambda: None)
        monkeypatch.setattr(cli, "load_pretrained_model", lambda *args, **kwargs: (None,) * 4)
        monkeypatch.setattr(cli, "conv_templates", Templates(conversation.conv_templates))
        with pytest.raises(Asked) as asked:
            cli.main(type("Arguments", (), arguments)())
        return str(asked.value)

    return rule


@pytest.mark.parametrize("name", NAMES)
def test_the_template_goes_by_the_name_as_upstreams_command_line_has_it(cli_rule, name):
    assert conversation_of(name) == cli_rule(name)


def test_the_separator_ends_an_answer_in_its_template():
    from llava.conversation import conv_templates

    assert {name: separator_of(name) for name in ("llava_v1", "llava_v0", "chatml_direct", "llava_llama_2")} == {
        "llava_v1": "</s>", "llava_v0": "###", "chatml_direct": "<|im_end|>", "llava_llama_2": "<s>",
    }  # fmt: skip
    assert all(separator_of(conversation_of(name)) for name in NAMES)
    assert conversation_of("x") in conv_templates


def test_another_template_is_another_prompt(own, two_llavas):
    """The setting wins over the name."""
    llavas = load_llavas(Models(*two_llavas, device="cpu", conversation="llava_v0"), say=lambda line: None)
    assert llavas[0].llm.conversation == "llava_v0" and own[0].llm.conversation == "llava_v1"
    ids = [llava.inputs(PICTURES[0], QUESTION)["inputs"][0].tolist() for llava in (llavas[0], own[0])]
    assert ids[0] != ids[1] and ids[0].count(-200) == ids[1].count(-200) == 1  # each has the picture in it


def test_llavas_are_called_after_their_towers(own, two_llavas):
    assert [llava.name for llava in own] == ["CLIP", "CLIP-MoE"]
    assert [llava.is_moe for llava in own] == [False, True]
    assert Path(own[0].tower_source).name == "clip" and Path(own[1].tower_source).name == "clip-moe"
    swapped = load_llavas(Models(*reversed(two_llavas), device="cpu"), say=lambda line: None)
    assert [llava.name for llava in swapped] == ["CLIP-MoE", "CLIP"]


def test_two_llavas_of_one_kind_are_called_after_their_directories(two_llavas, tmp_path):
    other = shutil.copytree(two_llavas[0], tmp_path / "llava-v1-other")
    llavas = load_llavas(Models(two_llavas[0], other, device="cpu"), say=lambda line: None)
    assert [llava.name for llava in llavas] == ["llava-v1-clip", "llava-v1-other"]
    twin = shutil.copytree(two_llavas[0], tmp_path / "elsewhere" / two_llavas[0].name)
    llavas = load_llavas(Models(two_llavas[0], twin, device="cpu"), say=lambda line: None)
    assert [llava.name for llava in llavas] == ["llava-v1-clip (left)", "llava-v1-clip (right)"]


def test_own_names_are_taken_and_equal_ones_refused_before_anything_is_loaded(two_llavas):
    llavas = load_llavas(Models(*two_llavas, names=("old", "new"), device="cpu"), say=lambda line: None)
    assert [llava.name for llava in llavas] == ["old", "new"]
    with pytest.raises(ValueError, match="both LLaVAs are called 'same'"):
        check_models(Models(*two_llavas, names=("same", "same")))


# ------------------------------------------------------------------------------------------------------ what is missing


def test_what_is_missing_is_said_before_anything_is_loaded(two_llavas, two_projectors, tmp_path):
    left, right = two_llavas
    llm, llava, _ = two_projectors
    nothing = tmp_path / "nothing"
    with pytest.raises(FileNotFoundError, match=r"no LLaVA at .*nothing \(the left one\).*make llava-quickstart"):
        check_models(Models(nothing, right))
    with pytest.raises(FileNotFoundError, match=r"\(the right one\).*--left DIR --right DIR"):
        check_models(Models(left, nothing))
    with pytest.raises(ValueError, match=r"llama is no LLaVA: its config.json names no mm_vision_tower"):
        check_models(Models(left, llm))
    with pytest.raises(
        ValueError, match=r"llava-v1-clipmoe has no mm_projector.bin.*leave it out for two whole LLaVAs"
    ):
        check_models(Models(llava, right, llm))
    with pytest.raises(FileNotFoundError, match=r"no language model at .*nothing"):
        check_models(Models(llava, llava, nothing))
    check_models(Models(left, right))
    check_models(Models(llava, llava, llm))


def test_a_stage_1_directory_without_its_language_model_says_what_to_give(two_projectors, two_llavas):
    with pytest.raises((ValueError, FileNotFoundError), match="--language-model"):
        check_models(Models(two_projectors[1], two_llavas[1]))


def test_a_pickle_in_the_place_of_a_projector_is_not_run(two_projectors, tmp_path):
    llm, left, right = two_projectors
    bad = shutil.copytree(right, tmp_path / "llava-v1-bad")
    torch.save({"model.mm_projector.0.weight": Evil(tmp_path / "was-run")}, bad / "mm_projector.bin")
    with pytest.raises(ValueError):
        load_llavas(Models(left, bad, llm, device="cpu"), say=lambda line: None)
    assert not (tmp_path / "was-run").exists()


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
