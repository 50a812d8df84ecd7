"""The comparison of recipes: what it runs, what it keeps, and what its page says."""

from __future__ import annotations

import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_run import REPOSITORY, arguments, draw_data, environment

from llava_clipmoe.files import load_tensors, read_json
from train_encoder.compare.command import (
    Settings,
    base_recipe,
    check,
    command,
    epochs_of,
    is_finished,
    main,
    recipes_of,
    run_flags,
)
from train_encoder.compare.runs import cost_of

pytestmark = pytest.mark.xdist_group("compare")  # `make test`: its runs are made once
COMPARED = ("sparse-upcycling-openmoji", "direct-ft-openmoji")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def flags(data) -> list[str]:
    """Flags that make every run tiny."""
    given = arguments(data, Path("unused"))[1:]
    place = given.index("--output-dir")
    given = [*given[:place], *given[place + 2 :], "--finetune.optim.global-batch-size", "16"]
    return [flag for flag in given if flag != "--evaluation.zero-shot"]  # what is classified is compare's to say


@pytest.fixture(scope="module")
def compared(data, flags, tmp_path_factory) -> Path:
    """Two recipes, named shortly, with two seeds."""
    out = tmp_path_factory.mktemp("compare") / "out"
    where = ["--seeds", "2", "--jobs", "2", "--output-dir", str(out)]
    assert main(["sparse-upcycling", "direct-ft", *where, "--", *flags]) == 0
    return out


@pytest.fixture(scope="module")
def classes(data, tmp_path_factory) -> Path:
    """The same pictures in a folder a shape."""
    folder = tmp_path_factory.mktemp("shapes")
    for line in data.read_text().splitlines():
        image, shape = re.search(r'"image": "(\S+)", "short": "a (\w+)"', line).groups()
        (folder / shape).mkdir(exist_ok=True)
        shutil.copy(data.parent / image, folder / shape / image)
    return folder


def test_every_recipe_of_a_seed_starts_from_the_same_base(compared):
    recipes = ("base-openmoji", *COMPARED)
    bases = {(r, seed): load_tensors(compared / f"{r}-seed{seed}" / "base") for r in recipes for seed in (0, 1)}
    for (recipe, seed), base in bases.items():
        for name, tensor in bases["base-openmoji", seed].items():
            assert torch.equal(tensor, base[name]), (recipe, seed, name)
    one, two = bases["base-openmoji", 0], bases["base-openmoji", 1]
    assert any(not torch.equal(one[name], two[name]) for name in one), "another seed, another base"


def test_the_page_has_the_means_of_the_results(compared):
    page = (compared / "compare.md").read_text()
    assert all(f"## {section}" in page for section in ("Retrieval", "Routing", "Cost"))
    for recipe in COMPARED:
        values = []
        for seed in (0, 1):
            results = read_json(compared / f"{recipe}-seed{seed}" / "results.json")
            values.append(results["retrieval"]["same"][results["result"]]["i2t_r5"])
        row = next(line for line in page.splitlines() if line.startswith(f"| {recipe.removesuffix('-openmoji')} |"))
        shown = f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"
        assert row.split(" | ")[3].strip("*") == shown


def test_the_html_page_has_the_same_tables_and_stands_alone(compared):
    page, markdown = (compared / "compare.html").read_text(), (compared / "compare.md").read_text()
    numbers = [cell.strip(" *") for line in markdown.splitlines() if line.startswith("| sparse-upcycling |") for cell in
               line.split("|")[2:-1]]  # fmt: skip
    assert len(numbers) > 15 and all(number in page for number in numbers)
    assert page.count("<svg") >= 4, "retrieval, routing, cost twice"
    assert not re.search(r'(src|href)="(?!#)', page), "nothing is loaded from elsewhere"
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_finished_cells_are_kept_and_a_lost_one_is_made_again(compared, flags):
    files = {path: path.stat().st_mtime_ns for path in compared.glob("*/results.json")}
    lost = compared / "direct-ft-openmoji-seed1" / "results.json"
    before = read_json(lost)
    lost.unlink()
    assert main([*COMPARED, "--seeds", "2", "--output-dir", str(compared), "--", *flags]) == 0
    assert [path for path, time in files.items() if path.stat().st_mtime_ns != time] == [lost]
    assert read_json(lost) == before


def test_classification_asked_for_later_is_added_to_finished_cells(compared, flags, classes):
    pages = {path: path.read_text() for path in compared.glob("compare.*")}
    cell = compared / "direct-ft-openmoji-seed0"
    weights, before = (cell / "clip" / "model.safetensors").read_bytes(), read_json(cell / "results.json")
    assert is_finished(cell) and not is_finished(cell, ["shapes"])
    more = ["--seeds", "1", "--zero-shot", f"shapes={classes}", "--output-dir", str(compared)]
    assert main(["direct-ft", *more, "--", *flags]) == 0
    page = (compared / "compare.md").read_text()
    for path, text in pages.items():  # other tests read them
        path.write_text(text)
    assert is_finished(cell, ["shapes"])
    after = read_json(cell / "results.json")
    assert after["zero_shot"]["shapes"]["fine-tuned"]["classes"] == 3
    assert {**after, "zero_shot": None} == {**before, "zero_shot": None}, "what was measured stays"
    assert (cell / "clip" / "model.safetensors").read_bytes() == weights
    assert "## Zero-shot classification" in page and "**shapes** (60 pictures, 3 classes)" in page


def test_a_cell_that_fails_is_named_with_the_end_of_its_log(tmp_path):
    argv = ["dmu-openmoji", "--seeds", "1", "--output-dir", str(tmp_path), "--", "--data.source", "no/such/file.jsonl"]
    with pytest.raises(ChildProcessError, match=r"(?s)base-openmoji-seed0\.log.*no/such/file\.jsonl.*again"):
        main(argv)


def test_whoever_ends_the_comparison_ends_its_runs(flags, tmp_path):
    words = ["compare", "dmu", "--seeds", "1", "--output-dir", str(tmp_path / "out"), "--", *flags]
    parent = subprocess.Popen(
        [sys.executable, "-m", "llava_clipmoe.cli", *words], env=environment(), cwd=REPOSITORY,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,  # the signal reaches it alone
    )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while not (children := children_of(parent.pid)) and time.monotonic() < until:
            assert parent.poll() is None, "it ended before it began"
            time.sleep(0.05)
        assert children, "no run was started"
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(60) == 143
        assert not [child for child in children if Path(f"/proc/{child}").exists()]
    finally:
        parent.kill()


def children_of(pid: int) -> list[int]:
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("children are found through /proc")
    files = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for file in files for child in file.read_text().split()]
    return [child for child in children if b"train-encoder" in Path(f"/proc/{child}/cmdline").read_bytes()]


# ----------------------------------------------------------------------------------------------------- what is compared


@pytest.mark.parametrize(
    ("settings", "more", "words"),
    [
        (Settings(("dmu-openmoij",)), (), "no recipe 'dmu-openmoij'.*direct-ft"),
        (Settings(("dmu", "dmu-openmoji")), (), "named twice"),
        (Settings(("dmu-openmoji", "dmu-vitl14-336-sharegpt4v")), (), "equally often"),
        (Settings(("dmu-vitl14-336-recap1m",)), (), "stands alone"),
        (Settings(("dmu-openmoji",)), ("--seed", "3"), "set by compare"),
        (Settings(("dmu",), data="train.csv"), (), "what to measure"),
        (Settings(), (), "name the recipes"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(settings, more, words):
    with pytest.raises(ValueError, match=words):
        check(settings, more)


@pytest.mark.parametrize("scale", ["openmoji", "vitl14-336-sharegpt4v"])
def test_all_recipes_of_a_scale_can_be_compared(scale):
    settings = Settings(("all",), scale=scale)
    check(settings, ())
    recipes = recipes_of(settings)
    assert len(recipes) >= 7 and epochs_of(base_recipe(settings)) == 0
    assert all("--base.source" in command(settings, recipe, 0, ()) for recipe in recipes)


def test_short_names_are_of_the_scale_that_a_full_name_or_the_flag_gives():
    assert recipes_of(Settings(("dmu", "fmoe"))) == ["dmu-openmoji", "fmoe-openmoji"]
    assert recipes_of(Settings(("fmoe-vitl14-336-sharegpt4v", "dmu")))[1] == "dmu-vitl14-336-sharegpt4v"
    assert recipes_of(Settings(("dmu",), scale="vitl14-336-sharegpt4v")) == ["dmu-vitl14-336-sharegpt4v"]


def test_a_comparison_on_other_data_leaves_the_emoji_out():
    flags = run_flags(Settings(("dmu",), data="train.csv", retrieval=("dev=dev.csv", "far=far.csv")), ())
    given = " ".join(flags)
    assert "--data.source train.csv" in given and "--evaluation.retrieval dev=dev.csv far=far.csv" in given
    assert "openmoji" not in given and "--evaluation.attributes None" in given
    assert "--base.scratch.caption-columns --" in given, "captions are found by name, not under the emoji's names"
    assert flags[-1] == "--evaluation.zero-shot", "nothing is classified, the recipe's scenes neither"
    assert run_flags(Settings(("dmu",)), ())[-2:] == ["openmoji-nouns", "openmoji-colours"]


def test_the_cost_leaves_out_the_base_and_adds_up_the_rest():
    done = {"event": "done", "work": "train"}
    rows = [
        {"stage": "base", "step": 5, "steps": 50},
        {**done, "stage": "base", "seconds": 100.0, "images": 9, "peak_memory_bytes": 99},
        {**done, "work": "features", "stage": "base", "seconds": 2.0, "images": 9, "peak_memory_bytes": 5},
        {"stage": "stage1", "step": 3, "steps": 7},
        {**done, "stage": "stage1", "seconds": 10.0, "images": 70, "peak_memory_bytes": 7},
        {"stage": "router", "step": 1, "steps": 4},
        {**done, "stage": "router", "seconds": 20.0, "images": 40, "peak_memory_bytes": 8},
        {**done, "work": "evaluate", "stage": "all", "seconds": 9.0, "peak_memory_bytes": 99},
    ]
    cost = cost_of(rows, {"stage1": 10, "router": 10})
    assert (cost.steps, cost.samples, cost.train_seconds, cost.seconds) == (11, 110, 30.0, 32.0)
    assert cost.other_seconds == {"features": 2.0} and cost.peak_memory == 8
    assert (cost.encoded, cost.encoded_captions) == (9, 9)


def test_features_without_captions_say_so():
    row = {"event": "done", "work": "features", "seconds": 2.0, "images": 9, "captions": 0, "peak_memory_bytes": 5}
    cost = cost_of([{**row, "stage": "base"}], {})
    assert (cost.encoded, cost.encoded_captions) == (9, 0)


def test_a_training_that_was_killed_counts_whole():
    row = {"event": "done", "work": "train", "stage": "router", "peak_memory_bytes": 1}
    rows = [{"stage": "router", "step": 1, "steps": 4}, {**row, "seconds": 5.0, "images": 10}]
    cost = cost_of(rows, {"router": 10})
    assert (cost.samples, cost.train_seconds) == (40, 20.0)


def test_on_a_cpu_its_own_time_counts_where_it_is_known():
    row = {"event": "done", "peak_memory_bytes": 1, "images": 10}
    rows = [
        {"stage": "router", "step": 1, "steps": 1},
        {**row, "work": "train", "stage": "router", "seconds": 9.0, "cpu_seconds": 4.0},
        {**row, "work": "clusters", "stage": "base", "seconds": 2.0},
    ]
    assert cost_of(rows, {"router": 10}, cpu=True).seconds == 6.0
    assert cost_of(rows, {"router": 10}).seconds == 11.0
