"""`eval-llava` with a model: upstream's runners and the batched one over a tiny random LLaVA on the CPU, in fp32."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llava", reason="upstream LLaVA is not installed")

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny.language_models import make_llama_3, make_qwen_2, make_qwen_3
from tiny.llavas import make_language_model, make_llava, make_towers, upstream_in_this_process
from transformers import CONFIG_MAPPING, AutoTokenizer

from llava_clipmoe import run
from llava_clipmoe.conversations import TEMPLATES
from llava_clipmoe.processes import Children
from train_llava.eval import run as command
from train_llava.eval.answers import EvalError, read_answers, read_jsonl, write_jsonl
from train_llava.eval.benchmarks import BENCHMARKS

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tiny_llava(tmp_path_factory) -> Iterator[Path]:
    """A random LLaVA of 2 blocks whose vision tower is a tiny CLIP-MoE. Its weights are large, so that it babbles."""
    folder = tmp_path_factory.mktemp("tiny")
    tower, _ = make_towers(folder)
    with upstream_in_this_process():
        yield make_llava(folder / "llava-tiny", tower, make_language_model(folder / "llama"))


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(autouse=True)
def child_processes_find_us(monkeypatch):
    for name, value in _environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def pope(tmp_path) -> Path:
    """A folder in POPE's layout: two categories of 4 questions of different lengths about 2 pictures."""
    folder = tmp_path / "pope"
    (folder / "val2014").mkdir(parents=True)
    (folder / "coco").mkdir()
    rows = []
    for category in ("random", "popular"):
        labels = []
        for number in range(4):
            image = f"{number % 2}.jpg"
            Image.effect_noise((40, 30), 60 + 60 * (number % 2)).convert("RGB").save(folder / "val2014" / image)
            text = f"Is there a {category} {'square ' * number}in the image?\nAnswer the question."
            rows.append({"question_id": len(rows), "image": image, "text": text, "category": category})
            labels.append({"question_id": number, "image": image, "label": "yes" if number % 2 else "no"})
        write_jsonl(folder / f"coco/coco_pope_{category}.json", labels)
    write_jsonl(folder / "llava_pope_test.jsonl", rows)
    return folder


pytestmark = pytest.mark.filterwarnings("ignore:'train_llava.eval.batched' found in sys.modules:RuntimeWarning")


@pytest.fixture
def in_this_process(monkeypatch):
    """What a runner's process does, done in this one, which has imported upstream already: that alone takes a process
    ten seconds. (`python -m llava_clipmoe.run MODULE ...` is `run.main([MODULE, ...])`.)"""

    def run_here(self: Children, command: list[str], **_: object) -> int:
        assert command[:3] == [sys.executable, "-m", "llava_clipmoe.run"]
        with one_at_a_time, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [])
            patch.setenv("LLAVA_CLIPMOE_HOOK", "1")
            try:
                return run.main(command[3:])
            except SystemExit as end:
                return end.code or 0

    one_at_a_time = threading.Lock()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Children, "run", run_here)


def _evaluate(benchmark: str, model: Path, data: Path, out: Path, *flags: str) -> dict:
    words = [benchmark, "--model-path", str(model), "--data", str(data), "--output-dir", str(out), *flags]
    assert command.main(words) == 0
    return json.loads((out / "results.json").read_text())


def test_batched_answers_equal_upstreams_one_by_one(in_this_process, tiny_llava, pope, tmp_path):
    one = _evaluate("pope", tiny_llava, pope, tmp_path / "one")
    batched = _evaluate("pope", tiny_llava, pope, tmp_path / "batched", "--batch-size", "3")
    texts = [[row["text"] for row in read_answers(tmp_path / name / "answers.jsonl")] for name in ("one", "batched")]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 8, "a model that answers everything alike proves nothing"
    assert one["metrics"] == batched["metrics"] and one["n"] == 8
    # what settings.json of such a model has always said: a folder that is there already goes on
    assert json.loads((tmp_path / "one/settings.json").read_text())["conv_mode"] == "vicuna_v1"
    assert set(one["metrics"]["by_category"]) == {"random", "popular"}


@pytest.fixture(
    params=[(make_llama_3, "llama_3"), (make_qwen_2, "qwen_2"), (make_qwen_3, "qwen_2")],
    ids=["llama3", "qwen2", "qwen3"],
)
def newer(request, tmp_path) -> Iterator[tuple[str, Path]]:
    """-> (its conversation template, a random LLaVA of this language model)."""
    make, template = request.param
    if make is make_qwen_3 and "qwen3" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no Qwen3")
    llm, (tower, _) = make(tmp_path / "llm"), make_towers(tmp_path)
    with upstream_in_this_process():  # untied, so that its end mark may be moved (below)
        llava = make_llava(tmp_path / "llava-newer", tower, llm, tie_word_embeddings=False)
        with _head(llava) as rows:  # a Qwen's beyond its vocabulary, which a trained one never says
            rows[len(AutoTokenizer.from_pretrained(llm)) :] = 0
        yield template, llava


@contextmanager
def _head(llava: Path) -> Iterator[torch.Tensor]:
    """The language model's last layer [vocabulary, width], to be changed in place."""
    weights = load_file(llava / "model.safetensors")
    yield weights["lm_head.weight"]
    save_file(weights, llava / "model.safetensors", {"format": "pt"})


def _answer_ids(llava: Path, question: dict, images: Path, template: str) -> tuple[list[int], Any]:
    """-> (what the model says to a question in this template: token ids; its tokenizer)."""
    from llava.model.builder import load_pretrained_model

    from train_llava.eval.batched import Prompts

    tokenizer, model, processor, _ = load_pretrained_model(str(llava), None, llava.name, device="cpu")
    ids, pixels, size = Prompts([question], images, tokenizer, processor, model.config, template)[0]
    with torch.inference_mode():
        half = pixels[None].half()  # as upstream's runner has them on the CPU too
        out = model.generate(ids[None], images=half, image_sizes=[size], do_sample=False, max_new_tokens=30)
    return out[0].tolist(), tokenizer


def test_a_newer_language_model_is_asked_in_its_template_and_stops_at_its_end_mark(
    in_this_process, newer, pope, tmp_path
):
    """By both runners, though nobody names the template. The end mark is made the likeliest where another token was."""
    template, llava = newer
    for name, colour in (("0.jpg", "red"), ("1.jpg", "blue")):  # the same in every run
        Image.new("RGB", (40, 30), colour).save(pope / "val2014" / name)
    question = read_jsonl(pope / "llava_pope_test.jsonl")[0]
    whole, tokenizer = _answer_ids(llava, question, pope / "val2014", template)
    end = tokenizer.convert_tokens_to_ids(TEMPLATES[template].end_token)
    place = next(i for i in range(3, 30) if whole[i] not in whole[:i])
    with _head(llava) as rows:
        rows[end] = 1.01 * rows[whole[place]]
    ids, _ = _answer_ids(llava, question, pope / "val2014", template)
    assert ids == [*whole[:place], end]

    for name, flags in (("one", ()), ("batched", ("--batch-size", "3"))):
        _evaluate("pope", llava, pope, tmp_path / name, *flags)
        assert json.loads((tmp_path / name / "settings.json").read_text())["conv_mode"] == template
    texts = [[row["text"] for row in read_answers(tmp_path / name / "answers.jsonl")] for name in ("one", "batched")]
    assert texts[0] == texts[1] and len(set(texts[0])) > 4
    assert texts[0][0] == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_only_questions_without_an_answer_are_asked_and_two_processes_share_them(tiny_llava, pope, tmp_path):
    questions = read_jsonl(pope / "llava_pope_test.jsonl")
    lines = [json.dumps({"question_id": i, "prompt": questions[i]["text"], "text": f"kept {i}"}) for i in range(8)]
    parts = tmp_path / "out/parts"
    parts.mkdir(parents=True)
    (tmp_path / "out/answers.jsonl").write_text("\n".join(lines[:3]))
    (parts / "answers-0.jsonl").write_text("\n".join([*lines[3:5], lines[5][:20]]))  # a killed process: cut at the end
    results = _evaluate("pope", tiny_llava, pope, tmp_path / "out", "--num-gpus", "2")
    answers = read_answers(tmp_path / "out/answers.jsonl")
    assert [row["question_id"] for row in answers] == list(range(8)) and results["n"] == 8
    assert [row["text"].startswith("kept") for row in answers] == [True] * 5 + [False] * 3
    asked = [[row["question_id"] for row in read_jsonl(parts / f"questions-{i}.jsonl")] for i in range(2)]
    assert asked == [[5, 6], [7]]
    assert not list(parts.glob("answers-*")), "merged and removed"


def test_mmbench_goes_through_upstreams_runner(in_this_process, tiny_llava, tmp_path, monkeypatch):
    """With options that pandas would take for numbers, on which upstream's runner would stop with a TypeError."""
    picture = io.BytesIO()
    Image.effect_noise((30, 20), 90).convert("RGB").save(picture, "PNG")
    image = base64.b64encode(picture.getvalue()).decode()
    head = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "split"]
    rows = [[3, "How many?", "", "1", "2", "3", "", "B", "count", image, "dev"],
            [4, "Which?", "Look.", "red", "blue square", "it", "no", "A", "colour", image, "dev"]]  # fmt: skip
    with (tmp_path / "small.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([head, *rows])
    results = _evaluate("mmbench", tiny_llava, tmp_path / "small.tsv", tmp_path / "out", "--limit", "1")
    assert results["n"] == 1 and set(results["metrics"]["by_category"]) == {"count"}
    monkeypatch.setitem(BENCHMARKS, "mmbench", replace(BENCHMARKS["mmbench"], max_new_tokens=16))
    flags = ("--all-rounds", "--batch-size", "4")
    _evaluate("mmbench", tiny_llava, tmp_path / "small.tsv", tmp_path / "batched", *flags)
    rounds = read_answers(tmp_path / "batched/answers.jsonl")
    asked = [(row["question_id"], row["round_id"]) for row in rounds]
    assert asked == [(3, 0), (3, 1), (3, 2), (4, 0), (4, 1), (4, 2), (4, 3)]
    upstream = read_answers(tmp_path / "out/answers.jsonl")[0]
    same = ("question_id", "round_id", "prompt", "options", "option_char")
    assert {name: upstream[name] for name in same} == {name: rounds[0][name] for name in same}
    assert rounds[0]["text"] and upstream["text"].startswith(rounds[0]["text"])


def test_rows_that_repeat_a_picture_are_answered_like_those_that_hold_it(
    in_this_process, tiny_llava, tmp_path, monkeypatch
):
    """By both runners; with the picture in another process's share, behind the limit, and after a stop."""
    pictures = []
    for colour in ("black", "red"):
        picture = io.BytesIO()
        Image.new("RGB", (30, 20), colour).save(picture, "PNG")
        pictures.append(base64.b64encode(picture.getvalue()).decode())
    head = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    indexes, repeats = (1_000_001, 1_000_002, 1, 2), (1, 2, *pictures)
    rows = [[i, "Which colour is it?", "", "red", "blue", "it", "no", "A", "colour"] for i in indexes]
    for file, cells in (("repeats.tsv", repeats), ("whole.tsv", pictures * 2)):
        with (tmp_path / file).open("w", newline="") as out:
            writer = csv.writer(out, delimiter="\t")
            writer.writerows([head, *([*row, cell] for row, cell in zip(rows, cells, strict=True))])
    monkeypatch.setitem(BENCHMARKS, "mmbench", replace(BENCHMARKS["mmbench"], max_new_tokens=16))
    answers = {}
    for file in ("repeats.tsv", "whole.tsv"):
        _evaluate("mmbench", tiny_llava, tmp_path / file, tmp_path / f"batched-{file}", "--batch-size", "2")
        answers[file] = [row["text"] for row in read_answers(tmp_path / f"batched-{file}/answers.jsonl")]
    one, two, again, second = answers["whole.tsv"]
    assert answers["repeats.tsv"] == answers["whole.tsv"] and (one, two) == (again, second)
    assert one != two, "a model that does not look proves nothing"
    for flags in (("--limit", "1"), ("--num-gpus", "2")):
        _evaluate("mmbench", tiny_llava, tmp_path / "repeats.tsv", tmp_path / "upstream", *flags)
    found = read_answers(tmp_path / "upstream/answers.jsonl")
    assert [row["question_id"] for row in found] == list(indexes)
    assert all(row["text"].startswith(text) for row, text in zip(found, answers["whole.tsv"], strict=True))


def test_answers_of_another_model_are_not_continued(pope, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "settings.json").write_text(json.dumps({"benchmark": "pope", "conv_mode": "plain"}))
    with pytest.raises(EvalError, match=r"made with another .*conv_mode.*Choose another --output-dir"):
        _evaluate("pope", tmp_path / "llava", pope, out)


def test_a_missing_picture_is_named_before_the_model_is_loaded(pope, tmp_path):
    (pope / "val2014/1.jpg").unlink()
    with pytest.raises(EvalError, match=r"1 of 2 images are not in .*val2014, e\.g\. 1\.jpg"):
        _evaluate("pope", tmp_path / "llava", pope, tmp_path / "out")


def test_a_runner_that_fails_says_what_is_kept(pope, tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/transformers.py").write_text("raise SystemExit('this installation is broken')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'broken'}{os.pathsep}{REPOSITORY}")
    with pytest.raises(EvalError, match=r"exit status \d+\) after 0 of 8 answers.*the same command goes on"):
        _evaluate("pope", tmp_path / "llava-that-is-not-there", pope, tmp_path / "out")
    assert not (tmp_path / "out/results.json").exists()


def test_termination_stops_the_runner_and_keeps_its_answers(tiny_llava, pope, tmp_path):
    """As a cluster's time limit does."""
    rows = read_jsonl(pope / "llava_pope_test.jsonl")
    write_jsonl(pope / "llava_pope_test.jsonl", [{**rows[i % 8], "question_id": i} for i in range(5000)])
    out = tmp_path / "out"
    words = ["pope", "--model-path", tiny_llava, "--data", pope, "--output-dir", out, "--batch-size", "2"]
    process = subprocess.Popen([sys.executable, "-m", "train_llava.eval.run", *map(str, words)])
    part = out / "parts/answers-0.jsonl"
    deadline = time.monotonic() + 300
    while not (part.exists() and part.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert not part.exists() and 0 < len(read_answers(out / "answers.jsonl")) < 5000
