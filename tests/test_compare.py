"""The comparison of recipes: what it runs, what it keeps, and what its page says."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_config
from tiny_run import arguments, draw_data
from torch.utils.flop_counter import FlopCounterMode

from llava_clipmoe.files import load_tensors, read_json
from llava_clipmoe.modeling_clipmoe import CLIPMoEModel
from train_encoder.compare import Settings, base_recipe, check, command, main
from train_encoder.compare_page import cost_of, epochs_of, vision_macs
from train_encoder.recipes import RECIPES

COMPARED = ("dmu-openmoji", "direct-ft-openmoji")


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """Flags that make every run tiny."""
    given = arguments(draw_data(tmp_path_factory.mktemp("data")), Path("unused"))[1:]
    place = given.index("--output-dir")
    return [*given[:place], *given[place + 2 :], "--finetune.optim.global-batch-size", "16"]


@pytest.fixture(scope="module")
def compared(flags, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compare") / "out"
    assert main([*COMPARED, "--seeds", "2", "--jobs", "2", "--output-dir", str(out), "--", *flags]) == 0
    return out


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
        row = next(line for line in page.splitlines() if line.startswith(f"| {recipe} |"))
        shown = f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"
        assert row.split(" | ")[3].strip("*") == shown


def test_finished_cells_are_kept_and_a_lost_one_is_made_again(compared, flags):
    files = {path: path.stat().st_mtime_ns for path in compared.glob("*/results.json")}
    lost = compared / "direct-ft-openmoji-seed1" / "results.json"
    before = read_json(lost)
    lost.unlink()
    assert main([*COMPARED, "--seeds", "2", "--output-dir", str(compared), "--", *flags]) == 0
    assert [path for path, time in files.items() if path.stat().st_mtime_ns != time] == [lost]
    assert read_json(lost) == before


def test_a_cell_that_fails_is_named_with_the_end_of_its_log(tmp_path):
    argv = ["dmu-openmoji", "--seeds", "1", "--output-dir", str(tmp_path), "--", "--data.source", "no/such/file.jsonl"]
    with pytest.raises(ChildProcessError, match=r"(?s)base-openmoji-seed0\.log.*no/such/file\.jsonl.*again"):
        main(argv)


@pytest.mark.parametrize(
    ("recipes", "more", "words"),
    [
        (("dmu-openmoij",), (), "no recipe 'dmu-openmoij'"),
        (("dmu-openmoji", "dmu-openmoji"), (), "named twice"),
        (("dmu-openmoji", "dmu-vitl14-336-sharegpt4v"), (), "equally often"),
        (("dmu-openmoji",), ("--seed", "3"), "set by compare"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(recipes, more, words):
    with pytest.raises(ValueError, match=words):
        check(Settings(recipes), more)


@pytest.mark.parametrize("scale", ["openmoji", "vitl14-336-sharegpt4v"])
def test_all_recipes_of_a_scale_can_be_compared(scale):
    recipes = tuple(name for name in RECIPES if name.endswith(scale) and not name.startswith("base-"))
    settings = Settings(recipes)
    check(settings, ())
    assert len(recipes) >= 7 and epochs_of(RECIPES[base_recipe(settings)][1]) == 0
    assert all("--base.source" in command(settings, recipe, 0, ()) for recipe in recipes)


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
    cost = cost_of(rows)
    assert (cost.steps, cost.samples, cost.train_seconds) == (11, 110, 30.0)
    assert cost.other_seconds == {"features": 2.0} and cost.peak_memory == 8


EXPERTS = {
    "dense": {},
    "moe": {"num_experts": 4, "num_experts_per_tok": 2},
    "fmoe": {"num_experts": 3, "num_experts_per_tok": 2, "fusion_gate": True},
}


@pytest.mark.parametrize("kind", EXPERTS)
def test_the_macs_are_those_that_torch_counts(kind):
    config = make_tiny_config(**EXPERTS[kind], experts_implementation="loop")
    model = CLIPMoEModel(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.vision_model(torch.zeros(1, 3, 24, 24))
    assert vision_macs(config) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
