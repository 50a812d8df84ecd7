"""Whole tiny runs through the real command: resume after SIGKILL, several processes, refusals.

Runs that are killed are processes of their own, and a kill is a real SIGKILL; the others run in the tests' process.
"""

import fcntl
import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

from llava_clipmoe.files import load_tensors, save_tensors
from train_encoder import run_directory
from train_encoder.config import ScratchConfig

pytestmark = pytest.mark.xdist_group("training")  # `make test`: its runs are made once

# Runs each [word, N, arguments] in a process of its own, which kills itself at (for a negative N: right after) the N-th
# rename of what has the word in its path: in the middle of writing a checkpoint, for instance. The word "seconds" kills
# it so long after the first step that it logs. Without a word nothing does. Prints how each ended.
KILLED = """
import json, os, signal, sys, threading, time
import train_encoder.command  # once for all
from llava_clipmoe.cli import main

def die_at(word, at):
    real, count = os.replace, 0
    def replace(source, target):
        nonlocal count
        count += word in str(target)
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)
        if count == -at:
            os.kill(os.getpid(), signal.SIGKILL)
    os.replace = replace

def die_after(seconds, arguments):
    file = os.path.join(arguments[arguments.index("--output-dir") + 1], "metrics.jsonl")
    size = lambda: os.path.getsize(file) if os.path.exists(file) else 0
    before = size()
    def watch():
        while size() <= before:
            time.sleep(0.005)
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=watch, daemon=True).start()

ended = []
for word, at, arguments in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        if word == "seconds":
            die_after(at, arguments)
        elif word:
            die_at(word, at)
        os._exit(main(["train-encoder", *arguments]))
    ended.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print("\\n", ended)
"""


SMALLER = ("--moe.num-experts", "2", "--evaluation.retrieval")
"""One stage, and no scores."""


def run_each(*runs: tuple[str, float, list[str]]) -> None:
    """Runs one after the other, each of which dies at its moment if it has a word."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(runs)],
        env=tiny_run.environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.splitlines()[-1:] == [f" {[-9 if word else 0 for word, *_ in runs]}"], done.stderr[-4000:]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny_run.draw_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    tiny_run.run_here(tiny_run.arguments(data, folder))
    return folder


def curve(folder: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["stage"], row["step"], row["loss"]) for row in lines if "step" in row]


def test_a_run_leaves_what_the_readme_promises(finished):
    for name in (
        "config.json",
        "metrics.jsonl",
        "results.json",
        "report.html",
        "clusters/stage0.npz",
        "clusters/stage1.npz",
        "base/config.json",
        "clip-moe/config.json",
        "clip-moe/README.md",
    ):
        assert (finished / name).is_file(), name
    assert not list((finished / "checkpoints").iterdir())  # resume state goes when its result is saved
    base, stage = load_tensors(finished / "base"), load_tensors(finished / "stage1")
    assert stage and all(".mlp.fc" in name for name in stage)
    assert all((base[name] != tensor).any() for name, tensor in stage.items() if name.endswith("weight"))


def test_a_base_from_nothing_is_trained_on_its_early_captions_first(finished):
    stages = [stage for stage, _, _ in curve(finished)]
    assert list(dict.fromkeys(stages)) == ["base-early", "base", "stage1", "stage2", "router"]


def test_a_base_from_nothing_may_begin_with_a_locked_text_tower(data, tmp_path, finished):
    flags = ("--method", "base", "--base.scratch.locked-text-epochs", "1")
    tiny_run.run_here(tiny_run.arguments(data, tmp_path, *flags))
    assert list(dict.fromkeys(stage for stage, _, _ in curve(tmp_path))) == ["base-locked", "base-early", "base"]
    trainings = ScratchConfig(early_caption_columns=("caption",), locked_text_epochs=1).trainings
    names = load_tensors(tmp_path / "base").keys()
    locked = {name for name in names if not trainings["base-locked"].trainable(name)}
    assert locked == {name for name in names if "text" in name} and 0 < len(locked) < len(names)
    assert all(map(trainings["base-early"].trainable, names)) and all(map(trainings["base"].trainable, names))


def test_each_training_reads_its_own_captions(data, tmp_path):
    """The router's loss changes with --moe.caption-columns, the base's early one with its own, and no other."""
    runs = {}
    for name, more in {
        "as is": (),
        "router": ("--moe.caption-columns", "short"),
        "early": ("--base.scratch.early-caption-columns", "short"),
    }.items():
        tiny_run.run_here(tiny_run.arguments(data, tmp_path / name, *more))
        runs[name] = curve(tmp_path / name)
    differing = {name: {a[0] for a, b in zip(runs["as is"], runs[name], strict=True) if a != b} for name in runs}
    assert differing["router"] == {"router"}
    assert differing["early"] == {"base-early", "base", "stage1", "stage2", "router"}


def test_only_routers_differ_from_base_and_stages_in_the_result(finished):
    base, moe = load_tensors(finished / "base"), load_tensors(finished / "clip-moe")
    stages = [base, load_tensors(finished / "stage1"), load_tensors(finished / "stage2")]
    for name, tensor in moe.items():
        if ".experts." in name:
            dense = name.replace(".experts", "")
            assert all((tensor[e] == stage[dense]).all() for e, stage in enumerate(stages)), name
        elif name == "logit_scale":
            assert tensor == pytest.approx(math.log(1 / 0.07))  # the stages' temperature, frozen
        elif ".router." not in name:
            assert (tensor == base[name]).all(), name


def test_the_same_command_again_trains_nothing_and_changes_nothing(finished, data):
    before, steps = tiny_run.weights(finished), curve(finished)
    tiny_run.run_here(tiny_run.arguments(data, finished))
    assert tiny_run.weights(finished) == before and curve(finished) == steps


def test_an_expert_alone_scores_as_its_stage_does(finished):
    scores = json.loads((finished / "results.json").read_text())["retrieval"]["same"]
    assert list(scores) == [
        "base",
        "stage1",
        "stage2",
        "expert0",
        "expert1",
        "expert2",
        "clip-moe (untrained router)",
        "clip-moe",
    ]
    assert scores["expert0"] == scores["base"]
    assert scores["expert1"] == scores["stage1"] and scores["expert2"] == scores["stage2"]


def everything(folder: Path) -> dict[str, bytes]:
    """All that a run leaves but for what holds times and its own path."""
    own = ("config.json", ".lock", "metrics.jsonl", "results.json", "report.html")
    files = (path for path in folder.rglob("*") if path.parent != folder or path.name not in own)
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in files}


def test_five_kills_end_in_the_weights_of_an_undisturbed_run(finished, data, tmp_path):
    folder, rng = tmp_path / "killed", random.Random(0)
    args = tiny_run.arguments(data, folder)
    renames = [("checkpoints", at) for at in (2, 9)]  # 1-3 are a checkpoint's files, 4 its own; 9 lies in the third
    moments = [*renames, *(("seconds", rng.uniform(0, 0.3)) for _ in range(3))]
    run_each(*((*moment, args) for moment in moments))
    tiny_run.run_here(args)
    assert tiny_run.weights(folder) == tiny_run.weights(finished)
    assert curve(folder) == curve(finished)  # no step twice, none missing
    assert not list(folder.rglob("*.tmp"))


def test_a_run_killed_at_its_weakest_moments_leaves_exactly_what_an_undisturbed_one_does(finished, data, tmp_path):
    """Before a new directory's first file is there, before the image cache is, and when a stage is saved but its resume
    state not yet gone. The base is one of this machine: the model cards name neither its path nor the run's copy."""
    source = shutil.copytree(finished / "base", tmp_path / "somewhere" / "some-clip")
    killed, whole = (
        tiny_run.arguments(data, tmp_path / name, "--base.source", str(source)) for name in ("killed", "whole")
    )
    moments = ("config.json", 1), ("images.npy", 1), ("killed/stage1", -1), ("", 0)
    run_each(*((*moment, killed) for moment in moments), ("", 0, whole))
    left, wanted = everything(tmp_path / "killed"), everything(tmp_path / "whole")
    assert left.keys() == wanted.keys()
    assert [name for name in wanted if left[name] != wanted[name]] == []
    for model in ("base", "clip-moe"):
        assert "# some-clip\n" in left[f"{model}/README.md"].decode()
        assert "- base: some-clip\n" in left[f"{model}/README.md"].decode()
    assert "- data: data.jsonl\n" in left["clip-moe/README.md"].decode()
    given_away = [name for name in left if name.startswith(("base/", "clip-moe/"))]
    assert not [name for name in given_away for path in (data.parent, tmp_path) if str(path).encode() in left[name]]


def test_two_processes_train_as_one_with_the_same_global_batch(finished, data, tmp_path):
    folder = tmp_path / "two"
    tiny_run.run_two(tiny_run.arguments(data, folder, "--evaluation.retrieval"))
    one, two = curve(finished), curve(folder)
    assert [row[:2] for row in one] == [row[:2] for row in two]
    assert max(abs(a[2] - b[2]) for a, b in zip(one, two, strict=True)) < 1e-5
    for name in ("base", "stage1", "stage2", "clip-moe"):
        a, b = load_tensors(finished / name), load_tensors(folder / name)
        assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-5, name


def test_gradient_caching_trains_to_the_same_weights(finished, data, tmp_path):
    folder = tmp_path / "chunks"
    flags = ["--engine.chunk-size", "5", "--engine.activation-checkpointing", "--evaluation.retrieval"]
    tiny_run.run_here(tiny_run.arguments(data, folder, *flags))
    for name in ("base", "stage1", "stage2", "clip-moe"):
        a, b = load_tensors(finished / name), load_tensors(folder / name)
        assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-5, name


# --------------------------------------------------------------------------------------------------------- refusals


def refusal(args: list[str]) -> str:
    done = tiny_run.run_here(args, check=False)
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    assert "Traceback" not in done.stderr
    plain = re.sub(r"[╭╮╰╯│─]", " ", done.stdout + done.stderr)  # flags are refused in a drawn box
    return " ".join(plain.split())


def test_another_config_in_the_same_directory_is_refused_and_named(finished, data):
    before = tiny_run.weights(finished)
    message = refusal(tiny_run.arguments(data, finished, "--mcl.optim.label-smoothing", "0.2"))
    assert "mcl.optim.label_smoothing: 0.1 -> 0.2" in message and "another --output-dir" in message
    assert tiny_run.weights(finished) == before


def test_a_directory_that_is_not_a_run_is_refused_and_left_alone(data, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    assert "is not a run of this trainer" in refusal(tiny_run.arguments(data, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_changed_data_is_refused_on_resume(finished, data):
    original = data.read_text()
    data.write_text("".join(original.splitlines(keepends=True)[:-5]))
    try:
        assert "the data is not what the run" in refusal(tiny_run.arguments(data, finished))
    finally:
        data.write_text(original)


def test_more_experts_a_token_than_there_are_is_refused(data, tmp_path):
    message = refusal(tiny_run.arguments(data, tmp_path / "run", "--moe.num-experts-per-tok", "4"))
    assert "--moe.num-experts-per-tok is 4, but there are 3 experts" in message
    assert not (tmp_path / "run").exists()


def test_a_missing_dataset_an_empty_one_and_a_missing_column_are_refused(data, tmp_path):
    missing = tmp_path / "nowhere.jsonl"
    assert str(missing) in refusal(tiny_run.arguments(missing, tmp_path / "a"))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty" in refusal(tiny_run.arguments(empty, tmp_path / "b"))
    message = refusal(tiny_run.arguments(data, tmp_path / "c", "--data.caption-columns", "description"))
    assert "description" in message and "caption" in message and "short" in message


def test_a_base_that_does_not_fit_the_stage_files_is_refused(data, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "mixed")
    wide = {name: tensor.repeat(*[2] * tensor.dim()) for name, tensor in load_tensors(finished / "stage1").items()}
    save_tensors(folder / "stage1" / "model.safetensors", wide)
    message = refusal(tiny_run.arguments(data, folder))
    assert "the base has" in message and "come from one base" in message


def test_too_many_bad_images_stop_the_run_and_are_named(tmp_path):
    data = tiny_run.draw_data(tmp_path / "data", count=40)
    (data.parent / "003.png").write_bytes(b"not a picture")
    (data.parent / "007.png").unlink()
    message = refusal(tiny_run.arguments(data, tmp_path / "run", *SMALLER))
    assert "2 of 40 images" in message and "003.png" in message
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [row["image"] for row in skipped] == ["003.png", "007.png"]
    tiny_run.run_here(tiny_run.arguments(data, tmp_path / "run", "--data.max-bad-fraction", "0.1", *SMALLER))


def test_captions_longer_than_the_text_tower_are_cut_counted_and_reported(tmp_path):
    data = tiny_run.draw_data(tmp_path / "data", count=40)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows[:20]:
        row["caption"] = ["word " * 300]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = tiny_run.run_here(tiny_run.arguments(data, tmp_path / "run", *SMALLER))
    cut = re.search(r"(\d+) of 32 captions were longer than 77 tokens: cut", done.stdout)
    assert cut and int(cut[1]) > 0


def test_a_full_disk_while_saving_loses_nothing(data, finished, tmp_path):
    """A real tmpfs that fills up during the run; after more room the same command ends as an undisturbed run."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=25m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    try:
        args = tiny_run.arguments(data, disk / "run")
        message = refusal(args)
        assert "No space left" in message and "Nothing was lost" in message
        assert not list(disk.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=500m", disk], check=True)
        tiny_run.run_here(args)
        assert tiny_run.weights(disk / "run") == tiny_run.weights(finished)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_two_runs_in_one_directory_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "PATIENCE", 0.2)
    args = tiny_run.arguments(data, tmp_path / "run")
    tmp_path.joinpath("run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is training" in refusal(args)


def test_help_of_a_recipe_teaches_its_settings():
    done = tiny_run.run_here(["dmu-openmoji", "--help"])
    words = " ".join(done.stdout.split())
    assert "--mcl.optim.learning-rate" in words and "--moe.num-experts-per-tok" in words
    assert "gradient caching" in words
