"""Every method of the trainer, run whole and small: what it trains, what it leaves alone, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_run import arguments, draw_data, run_two

from llava_clipmoe.files import load_tensors, read_json
from llava_clipmoe.load import load_bundle
from llava_clipmoe.model_directory import read_config
from llava_clipmoe.upcycling import is_ffn
from train_encoder.command import main
from train_encoder.config import METHOD_TITLES
from train_encoder.methods import METHODS
from train_encoder.recipes import RECIPES
from train_encoder.training.run import training_seed


def flags(method: str, data: Path, output: Path) -> list[str]:
    """A run of `method`, small: the flags of the tiny DMU run with every training shortened."""
    short = []
    for name, batch in (("finetune.optim", 8), ("fmoe.optim", 4)):
        short += [
            f"--{name}.learning-rate",
            "1e-3",
            f"--{name}.epochs",
            "2",
            f"--{name}.global-batch-size",
            str(batch),
            f"--{name}.warmup-steps",
            "0",
        ]
    given = arguments(data, output, *short, "--moe.vision-layers", "0", "1", "--moe.text-layers", "0", "1")
    if method == "vanilla-moe":
        given[given.index("--moe.num-experts") + 1] = "2"
    return [f"{method}-openmoji", *given[1:]]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """`runs(method)`: the folder of a finished run of it, made once."""
    made: dict[str, Path] = {}

    def run(method: str) -> Path:
        if method not in made:
            made[method] = tmp_path_factory.mktemp(method) / "run"
            assert main(flags(method, data, made[method])) == 0
        return made[method]

    return run


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_bundle(folder).model.state_dict()


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that differ, but for the temperature, which every training sets."""
    assert before.keys() == after.keys()
    return {name for name in before if name != "logit_scale" and not torch.equal(before[name], after[name])}


def test_direct_fine_tuning_changes_the_ffns_and_nothing_else(runs):
    run = runs("direct-ft")
    before = state(run / "base")
    assert changed(before, state(run / "clip")) == {name for name in before if is_ffn(name)}
    assert not (run / "clip-moe").exists()
    card = (run / "clip" / "README.md").read_text()
    assert "- base: clip\n" in card and "- data: data.jsonl\n" in card


def test_direct_fine_tuning_of_everything_changes_attention_and_embeddings_too(runs):
    run = runs("direct-ft-all")
    names = changed(state(run / "base"), state(run / "clip"))
    assert any("self_attn" in name for name in names) and any("patch_embedding" in name for name in names)


def test_long_clip_is_the_same_training_with_another_objective(runs):
    run = runs("long-clip")
    assert read_json(run / "config.json")["finetune"]["optim"]["loss"] == "long-short"
    one, other = state(run / "clip"), state(runs("direct-ft-all") / "clip")
    assert changed(one, other), "the objective must matter"


def test_sparse_upcycling_starts_from_copies_and_trains_experts_and_routers(runs):
    run = runs("sparse-upcycling")
    base, moe = state(run / "base"), state(run / "clip-moe")
    for name, tensor in moe.items():
        if ".mlp.experts." in name:
            copy = base[name.replace(".mlp.experts.", ".mlp.")]
            assert not torch.equal(tensor[0], copy) and not torch.equal(tensor[0], tensor[1])
        elif ".mlp.router." not in name and name != "logit_scale":
            assert torch.equal(tensor, base[name]), name


def test_vanilla_moe_has_the_base_and_one_directly_trained_ffn(runs):
    run = runs("vanilla-moe")
    base, stage, moe = state(run / "base"), load_tensors(run / "stage1" / "model.safetensors"), state(run / "clip-moe")
    experts = [name for name in moe if ".mlp.experts." in name]
    for name in experts:
        dense = name.replace(".mlp.experts.", ".mlp.")
        assert len(moe[name]) == 2
        assert torch.equal(moe[name][0], base[dense]) and torch.equal(moe[name][1], stage[dense])
        assert not torch.equal(base[dense], stage[dense])
    assert experts and not (run / "clusters").exists()


def test_fmoe_keeps_the_base_beside_experts_that_were_trained_apart(runs):
    run = runs("fmoe")
    base, moe = state(run / "base"), state(run / "clip-moe")
    config = load_bundle(run / "clip-moe").model.config
    assert config.fusion_gate and config.num_experts == 3
    trained = [load_tensors(run / f"expert{e}" / "model.safetensors") for e in range(3)]
    for name, tensor in moe.items():
        if ".mlp.base." in name:
            assert torch.equal(tensor, base[name.replace(".mlp.base.", ".mlp.")])
        elif ".mlp.experts." in name:
            for expert, weights in enumerate(trained):
                dense = name.replace(".mlp.experts.", ".mlp.")
                assert torch.equal(tensor[expert], weights[dense]) and not torch.equal(weights[dense], base[dense])
        elif ".mlp.fusion_gate.weight" in name:
            assert tensor.abs().max() > 0, "it starts at zero and learns"
    results = read_json(run / "results.json")
    assert sum(results["iccl"]["sizes"]) == 60 and set(results["routing"]) >= {"vision", "text"}


def test_experts_of_fmoe_trained_by_two_processes_are_those_of_one(runs, data, tmp_path):
    """They are independent: whoever trains them, and beside whom, the bits are the same."""
    alone = runs("fmoe")
    # The base is trained by both processes together and would differ in its last bits: take the one that is there.
    run_two([*flags("fmoe", data, tmp_path / "run"), "--base.source", str(alone / "base"), "--evaluation.retrieval"])
    for expert in range(3):
        one, two = (load_tensors(run / f"expert{expert}" / "model.safetensors") for run in (alone, tmp_path / "run"))
        assert not changed(one, two)


@pytest.mark.parametrize("method", ["direct-ft", "sparse-upcycling", "vanilla-moe", "fmoe"])
def test_every_run_ends_with_results_and_a_page(runs, method):
    run = runs(method)
    results = read_json(run / "results.json")
    systems = results["retrieval"]["same"]
    assert results["result"] in systems and "base" in systems
    assert results["parameters"]["active"] <= results["parameters"]["total"]
    assert (run / "report.html").stat().st_size > 10_000


def test_a_method_stopped_between_its_trainings_goes_on_with_what_is_there(runs, data, tmp_path):
    run = tmp_path / "run"
    assert main(flags("fmoe", data, run)) == 0
    times = {e: (run / f"expert{e}" / "model.safetensors").stat().st_mtime_ns for e in range(3)}
    before = state(run / "clip-moe")
    for made in ("clip-moe", "results.json", "report.html"):
        path = run / made
        path.unlink() if path.is_file() else [file.unlink() for file in path.iterdir()] and path.rmdir()
    assert main(flags("fmoe", data, run)) == 0
    assert times == {e: (run / f"expert{e}" / "model.safetensors").stat().st_mtime_ns for e in range(3)}
    assert not changed(before, state(run / "clip-moe"))


def test_all_methods_of_one_scale_get_the_same_epochs():
    """Total passes over the data: what a fair comparison needs. Each FMoE expert passes over its own cluster only."""
    for scale in ("openmoji", "vitl14-336-sharegpt4v"):
        configs = {name: config for name, (_, config) in RECIPES.items() if name.endswith(f"-{scale}")}
        spent = {name: METHODS[c.method].epochs(c) for name, c in configs.items() if c.method != "base"}
        dmu = configs[f"dmu-{scale}"]
        total = (dmu.moe.num_experts - 1) * dmu.mcl.optim.epochs + dmu.moe.optim.epochs
        assert len(spent) > 7 and set(spent.values()) == {total}


@pytest.mark.parametrize(
    ("recipe", "trainings"),
    [
        ("dmu", ["stage1", "stage2", "router"]),
        ("dmu-lora", ["stage1", "stage2", "router"]),
        ("fmoe", ["expert0", "expert1", "expert2", "router"]),
        ("vanilla-moe", ["stage1", "router"]),
        ("sparse-upcycling", ["router"]),
        ("direct-ft", ["finetune"]),
    ],
)
def test_a_method_says_what_each_of_its_trainings_changes(runs, recipe, trainings):
    """The names are those of metrics.jsonl, and what is called trainable is what the run's files say has changed."""
    run = runs(recipe)
    settings = json.loads((run / "config.json").read_text(), object_hook=lambda values: SimpleNamespace(**values))
    method, base = METHODS[settings.method], read_config(run / "base")
    found = method.trainings(settings, base, read_config(run / method.output))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    done = [row["stage"] for row in lines if row.get("work") == "train" and not row["stage"].startswith("base")]
    assert list(found) == done == trainings
    if "stage1" in found:
        kept = load_tensors(run / "stage1" / "model.safetensors")
        assert {name for name in load_tensors(run / "base") if found["stage1"].trainable(name)} == set(kept)


def test_every_method_says_what_its_runs_make():
    assert METHOD_TITLES.keys() == METHODS.keys()


NAMES = ("base", "base-early", "router", "finetune", "stage1", "stage2", "expert0")


def test_every_training_draws_its_own_batches_whatever_comes_before_it():
    """By its name alone: runs of older versions go on with the seeds that they began with."""
    seeds = {name: training_seed(3, name) for name in NAMES}
    assert list(seeds.values()) == [3000, 3500, 3001, 3002, 3011, 3012, 3110]
    assert training_seed(3, "distilled4") not in seeds.values()
