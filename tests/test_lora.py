"""Low-rank stages: what learns, what a stage leaves on the disk, and that it is the model that was trained."""

from __future__ import annotations

import copy
import gc
import re
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import tiny_run
import torch
from test_losses import assert_same, gradients
from test_methods import flags

from llava_clipmoe.cli import main as command
from llava_clipmoe.files import load_tensors, read_json
from llava_clipmoe.load import load_bundle
from llava_clipmoe.upcycling import is_ffn
from train_encoder.command import main
from train_encoder.config import LoraConfig
from train_encoder.methods.lora import LoraDMU, add_adapters, check_rank, is_adapter, merge_adapters
from train_encoder.recipes import RECIPES
from train_encoder.training import loop
from train_encoder.training.precision import store_frozen_in
from train_encoder.training.run import Run

pytestmark = pytest.mark.xdist_group("lora")  # `make test`: its runs are made once
RANK, ALPHA = 4, 6.0
BLOCKS = {("vision_model", 0), ("vision_model", 2), ("text_model", 1)}


# ------------------------------------------------------------------------------------------------------- the adapters


@pytest.fixture
def adapted(tiny_dense):
    """A dense CLIP with adapters that have learned something, and peft's handle of it."""
    handle = add_adapters(tiny_dense, BLOCKS, LoraConfig(rank=RANK, alpha=ALPHA))
    with torch.no_grad():
        for seed, parameter in enumerate(p for name, p in tiny_dense.named_parameters() if is_adapter(name)):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return tiny_dense, handle


def features(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model.get_image_features(batch["pixel_values"]), model.get_text_features(batch["input_ids"])


def test_fresh_adapters_change_no_output_and_only_they_learn(tiny_dense, batch):
    before = features(tiny_dense, batch)
    add_adapters(tiny_dense, BLOCKS, LoraConfig(rank=RANK))
    assert all(torch.equal(a, b) for a, b in zip(before, features(tiny_dense, batch), strict=True))
    learning = [name for name, p in tiny_dense.named_parameters() if p.requires_grad]
    assert learning and all(map(is_adapter, learning))
    assert {tuple(name.split(".")[:4:3]) for name in learning} == {(tower, str(block)) for tower, block in BLOCKS}


def test_merged_equals_unmerged_in_both_towers(tiny_dense, batch):
    plain = {name: tensor.clone() for name, tensor in tiny_dense.state_dict().items()}
    dense_features = features(tiny_dense, batch)
    handle = add_adapters(tiny_dense, BLOCKS, LoraConfig(rank=RANK, alpha=ALPHA))
    with torch.no_grad():
        for parameter in (p for name, p in tiny_dense.named_parameters() if is_adapter(name)):
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    unmerged = features(tiny_dense, batch)
    merge_adapters(tiny_dense, handle, plain)
    for dense, one, other in zip(dense_features, unmerged, features(tiny_dense, batch), strict=True):
        assert (dense - one).abs().max() > 0.1, "the adapters must matter"
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_merging_is_pefts_own_bit_for_bit(adapted):
    model, handle = adapted
    base = {n.replace(".base_layer.", "."): t.clone() for n, t in model.state_dict().items() if not is_adapter(n)}
    theirs = copy.deepcopy(handle).merge_and_unload().state_dict()
    merge_adapters(model, handle, base)
    ours = model.state_dict()
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if not torch.equal(ours[name], base[name])} == {
        f"{tower}.encoder.layers.{block}.mlp.{matrix}.weight" for tower, block in BLOCKS for matrix in ("fc1", "fc2")
    }
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_gradient_caching_and_activation_checkpointing_change_no_gradient_of_an_adapter(adapted):
    model, _ = adapted
    plain = gradients(model, None, is_adapter)
    assert len(plain[1]) == 4 * len(BLOCKS) and all(gradient.abs().max() > 0 for gradient in plain[1].values())
    model._set_gradient_checkpointing(True)
    assert_same(plain, gradients(model, 5, is_adapter))


def test_holding_what_is_frozen_in_bf16_changes_no_bit_under_autocast(adapted, batch):
    """It is the copy that autocast makes in every step."""
    model, _ = adapted

    def step():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            found = model.get_image_features(batch["pixel_values"]), model.get_text_features(batch["input_ids"])
        sum(f.float().square().sum() for f in found).backward()
        return [*found, *(p.grad for name, p in model.named_parameters() if is_adapter(name))]

    before = step()
    store_frozen_in(model, torch.bfloat16, is_adapter)
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert types["vision_model.encoder.layers.0.mlp.fc1.base_layer.weight"] == torch.bfloat16
    assert all(dtype == torch.float32 for name, dtype in types.items() if is_adapter(name) or "norm" in name)
    assert all(torch.equal(a, b) for a, b in zip(before, step(), strict=True))


def test_bad_settings_are_refused_and_say_what_to_do(tiny_config):
    for bad, message in {
        ("rank", 0): "rank is 0; it must be at least 1",
        ("rank", -3): "rank is -3; it must be at least 1",
        ("alpha", 0.0): "alpha is 0.0; it must be above 0",
        ("alpha", float("nan")): "alpha is nan; it must be above 0",
        ("dropout", 1.0): "dropout is 1.0; it must be at least 0 and below 1",
    }.items():
        with pytest.raises(ValueError, match=re.escape(f"--lora.{message}")):
            LoraConfig(**dict([bad]))
    check_rank(31, tiny_config())
    with pytest.raises(ValueError, match="rank is 32, but the narrower tower is 32 wide"):
        check_rank(32, tiny_config())


def test_alpha_is_the_rank_unless_it_is_given():
    assert LoraConfig(rank=5).effective_alpha == 5 and LoraConfig(rank=5, alpha=10.0).effective_alpha == 10


@pytest.mark.parametrize("scale", ["openmoji", "vitl14-336-sharegpt4v"])
def test_the_recipe_is_dmus_but_for_rank_rate_and_chunk(scale):
    lora, dmu = RECIPES[f"dmu-lora-{scale}"][1], RECIPES[f"dmu-{scale}"][1]
    assert lora.mcl.optim == replace(dmu.mcl.optim, learning_rate=lora.mcl.optim.learning_rate)
    same = replace(lora, method="dmu", lora=dmu.lora, mcl=dmu.mcl, engine=dmu.engine)
    assert same == dmu


# ------------------------------------------------------------------------------------------------------- whole stages


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny_run.draw_data(tmp_path_factory.mktemp("data"))


def lora_flags(data: Path, output: Path, *more: str) -> list[str]:
    return [*flags("dmu-lora", data, output), "--lora.rank", str(RANK), "--lora.alpha", str(ALPHA), *more]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """An undisturbed run, and its stages' models before training, after it and merged."""
    folder, seen = tmp_path_factory.mktemp("lora") / "run", {}
    real_train, real_stage = Run.train, LoraDMU.train_stage

    def train(self, name, bundle, *given, **more):
        seen[name, "before"] = {n: t.clone() for n, t in bundle.model.state_dict().items()}
        real_train(self, name, bundle, *given, **more)
        seen[name, "after"] = {n: t.clone() for n, t in bundle.model.state_dict().items()}

    def train_stage(self, number, bundle, cluster_ids):
        ffns = real_stage(self, number, bundle, cluster_ids)
        seen[f"stage{number}", "plain"] = bundle.model
        return ffns

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "train", train)
        patch.setattr(LoraDMU, "train_stage", train_stage)
        assert main(lora_flags(data, folder)) == 0
    return folder, seen


def stage_of(folder: Path, number: int) -> dict:
    """FFN tensors of a stage."""
    return load_tensors(folder / f"stage{number}" / "model.safetensors")


def assert_low_rank(stage: dict, start: dict) -> None:
    """The stage is `start`, in fp32, plus a change of exactly RANK; no bias changed."""
    for name, tensor in stage.items():
        if name.endswith("bias"):
            assert torch.equal(tensor, start[name])
            continue
        values = torch.linalg.svdvals(tensor.double() - start[name].double())
        assert values[RANK - 1] > 100 * values[RANK], name  # what is left is fp32 rounding of the sum


@pytest.mark.parametrize("number", [1, 2])
def test_a_stage_is_the_base_plus_its_adapter_bit_for_bit(finished, number):
    folder, seen = finished
    stage, about = stage_of(folder, number), read_json(folder / f"stage{number}" / "stage.json")
    trained, base = seen[f"stage{number}", "after"], load_tensors(folder / "base")
    assert (about["rank"], about["alpha"], about["started_from"]) == (RANK, ALPHA, "base")
    assert stage.keys() == set(filter(is_ffn, base))
    for name, tensor in stage.items():
        expected = base[name]
        if name.endswith("weight"):
            a, b = (trained[name.replace(".weight", f".lora_{letter}.default.weight")] for letter in "AB")
            expected = expected + (b @ a) * (about["alpha"] / about["rank"])
        assert torch.equal(tensor, expected), name


def test_a_stages_change_has_exactly_its_rank_and_no_bias_changes(finished):
    folder, _ = finished
    assert_low_rank(stage_of(folder, 2), load_tensors(folder / "base"))


def test_a_training_changes_its_adapters_and_nothing_else(finished):
    _, seen = finished
    before, after = seen["stage1", "before"], seen["stage1", "after"]
    changed = {name for name in before if name != "logit_scale" and not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed == {name for name in before if is_adapter(name)}


def test_after_a_stage_the_model_is_a_plain_one_with_the_stages_ffns(finished):
    folder, seen = finished
    model, base = seen["stage1", "plain"], load_tensors(folder / "base")
    assert not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in model.modules())
    state, stage = model.state_dict(), stage_of(folder, 1)
    assert state.keys() == base.keys() and all(tensor.dtype == torch.float32 for tensor in state.values())
    expected = {**base, **stage, "logit_scale": state["logit_scale"]}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_the_result_is_a_clip_moe_whose_experts_are_the_stages(finished):
    folder, _ = finished
    bundle, base = load_bundle(folder / "clip-moe"), load_tensors(folder / "base")
    stages = [base, stage_of(folder, 1), stage_of(folder, 2)]
    assert bundle.model.config.num_experts == 3
    for name, tensor in bundle.model.state_dict().items():
        if ".mlp.experts." in name:
            dense = name.replace(".mlp.experts.", ".mlp.")
            assert all(torch.equal(tensor[e], stage[dense]) for e, stage in enumerate(stages)), name
        elif ".router." not in name and name != "logit_scale":
            assert torch.equal(tensor, base[name]), name
    assert (folder / "report.html").is_file() and not list((folder / "checkpoints").iterdir())
    scores = read_json(folder / "results.json")["retrieval"]["same"]
    assert scores["expert1"] == scores["stage1"]


def test_adapters_and_blocks_without_experts_are_in_no_stage(finished, data, tmp_path):
    folder, _ = finished
    some = [*lora_flags(data, tmp_path / "run", "--base.source", str(folder / "base")), "--moe.vision-layers", "1"]
    assert main(some) == 0
    assert sorted(p.name for p in (tmp_path / "run" / "stage1").iterdir()) == ["model.safetensors", "stage.json"]
    stage = load_tensors(tmp_path / "run" / "stage1" / "model.safetensors")
    ffns = {name for name in load_tensors(folder / "base") if is_ffn(name)}
    assert stage.keys() == {name for name in ffns if not name.startswith("vision_model.encoder.layers.0")}


def test_a_stage_that_starts_from_the_previous_one_is_that_one_plus_its_adapter(finished, data, tmp_path):
    base = str(finished[0] / "base")
    given = ("--mcl.start-from", "previous", "--base.source", base, "--engine.chunk-size", "5")
    assert main(lora_flags(data, tmp_path / "run", *given)) == 0
    assert read_json(tmp_path / "run" / "stage2" / "stage.json")["started_from"] == "stage1"
    assert_low_rank(stage_of(tmp_path / "run", 2), stage_of(tmp_path / "run", 1))


def test_a_run_stopped_inside_two_stages_ends_in_the_same_bits(finished, data, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    real = loop.save_checkpoint

    def save_and_stop(folder, step, *rest):
        real(folder, step, *rest)
        if (folder.name, step) == stop:
            raise Stopped

    again = lora_flags(data, tmp_path / "run")
    monkeypatch.setattr(loop, "save_checkpoint", save_and_stop)
    for stop in (("stage1", 3), ("stage2", 2)):  # stage 2 then starts under another random state than undisturbed
        with pytest.raises(Stopped):
            main(again)
        gc.collect()  # the run's lock goes with the run
        assert not (tmp_path / "run" / stop[0]).exists()
        torch.manual_seed(len(stop[0]) + stop[1])
    monkeypatch.setattr(loop, "save_checkpoint", real)
    trained = []
    monkeypatch.setattr(loop, "forward_backward", _counted(loop.forward_backward, trained))
    assert main(again) == 0
    assert len(trained) == 1 + 3, "one step of stage 2 and the routers' three are left"
    assert tiny_run.weights(tmp_path / "run") == tiny_run.weights(finished[0])


def _counted(function, calls: list):
    def counting(*given, **more):
        calls.append(None)
        return function(*given, **more)

    return counting


def test_two_processes_train_as_one(finished, data, tmp_path):
    alone, folder = finished[0], tmp_path / "two"
    more = ("--engine.chunk-size", "5", "--engine.activation-checkpointing", "--evaluation.retrieval")
    tiny_run.run_two(lora_flags(data, folder, "--base.source", str(alone / "base"), *more))
    for number in (1, 2):
        one, two = stage_of(alone, number), stage_of(folder, number)
        assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5


def test_a_run_in_bf16_keeps_the_base_in_fp32(finished, data, tmp_path):
    """The frozen copy in bf16 is for the training alone; a stage is the fp32 base plus its change."""
    base = finished[0] / "base"
    run = tmp_path / "run"
    given = ("--engine.precision", "bf16", "--base.source", str(base))
    tiny_run.run(lora_flags(data, run, *given))  # accelerate allows one precision a process
    stage = stage_of(run, 1)
    assert_low_rank(stage, load_tensors(base))
    assert any(not torch.equal(t, load_tensors(base)[n]) for n, t in stage.items() if n.endswith("weight"))


def test_a_rank_that_does_not_fit_and_a_missing_peft_stop_the_run_before_anything_is_trained(
    data, tmp_path, monkeypatch, capsys
):
    assert command(["train-encoder", *lora_flags(data, tmp_path / "wide"), "--lora.rank", "32"]) == 2
    assert "--lora.rank is 32, but the narrower tower is 32 wide" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setitem(sys.modules, "peft", None)
    assert command(["train-encoder", *lora_flags(data, tmp_path / "without")]) == 2
    message = capsys.readouterr().err
    assert "peft" in message and "llava-clipmoe[train]" in message
    assert not list(tmp_path.rglob("*.safetensors"))
