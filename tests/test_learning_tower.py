"""A tower that learns, without a training: what its flags refuse, its features, gradients and balance loss."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny.llavas import make_towers, upstream_in_this_process, upstream_is_installed
from tiny.tower_tasks import PARTS

from llava_clipmoe.compat.tuning import wake
from llava_clipmoe.tower_tuning import MARK, Tuning, check_tuning
from llava_clipmoe.vision_tower import CLIPMoEVisionTower, CLIPMoEVisionTowerS2


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("towers")
    make_towers(folder)
    return folder


# ------------------------------------------------------------------------------------------------------------ bad flags


@pytest.mark.skipif(not upstream_is_installed(), reason="upstream LLaVA (llava-torch) is not installed here")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([f"--{MARK}", "router"], "'router'; it may be routers, experts or lora"),
        ([f"--{MARK}", "routers", "--tune_mm_mlp_adapter", "True"], "belongs to stage 2"),
        ([f"--{MARK}", "routers", "--vision_tower", "openai/clip-vit-large-patch14-336"], "trains a CLIP-MoE tower"),
        ([f"--{MARK}", "lora", "--mm_vision_tower_lora_r", "48"], "must lie between 1 and 47"),
        (["--mm_vision_tower_lr", "1e-5"], f"--mm_vision_tower_lr needs --{MARK}"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused_before_anything_is_loaded(material, monkeypatch, words, message):
    with upstream_in_this_process():
        from llava.train.train import ModelArguments
    monkeypatch.setenv("LLAVA_CLIPMOE_TOWERS", f"clipmoe-336={material / 'clip-moe'}")
    parser = transformers.HfArgumentParser((ModelArguments,))
    with pytest.raises(ValueError, match=message):
        parser.parse_args_into_dataclasses(["--vision_tower", "clipmoe-336", *words])
    assert all(f"--{flag}" in parser.format_help() for flag in (MARK, "mm_vision_tower_lr", "mm_vision_tower_lora_r"))


def test_a_dense_tower_has_no_routers(tiny_config):
    with pytest.raises(ValueError, match="the tower mine is a dense CLIP, which has no routers"):
        check_tuning(Tuning("routers"), tiny_config().vision_config, "mine")
    check_tuning(Tuning("lora"), tiny_config().vision_config, "mine")


@pytest.mark.parametrize(
    ("engine", "gpus", "message"),
    [({"optimizer": {"type": "AdamW"}}, 1, "optimizer of DeepSpeed's file"), ({}, 2, "use torchrun")],
)
def test_what_would_be_ignored_in_silence_is_refused(material, engine, gpus, message):
    tower = learning_tower(material, "routers")
    model = SimpleNamespace(get_vision_tower=lambda: tower)
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config=engine))
    arguments = SimpleNamespace(deepspeed_plugin=plugin, n_gpu=gpus, bf16=True, fp16=False)
    with pytest.raises(ValueError, match=message):
        wake(arguments, model)


# ------------------------------------------------------------------------------------------------------ the tower alone


def learning_tower(material: Path, what: str, kind: type = CLIPMoEVisionTower, **more) -> CLIPMoEVisionTower:
    tower = kind(str(material / "clip-moe"), SimpleNamespace(mm_vision_select_layer=-2, **more))
    tower.ask_for_tuning(Tuning(what, 1e-3, rank=4))
    return tower


def test_a_row_without_a_picture_does_not_count_in_the_balance(material):
    tower = learning_tower(material, "routers")
    tower.wake(half=False)
    pictures = torch.randn(3, 3, 24, 24)
    tower(pictures)
    alone = tower.take_balance()
    tower(torch.cat([pictures, torch.zeros(2, 3, 24, 24)]))
    torch.testing.assert_close(tower.take_balance(), alone)
    features = tower(torch.zeros(2, 3, 24, 24))
    nothing = tower.take_balance()
    assert nothing.item() == 0 and tower.take_balance() is None
    (features.sum() * 0 + nothing).backward()
    assert all(p.grad is not None and not p.grad.any() for p in tower.parameters() if p.requires_grad)


def test_a_tower_on_several_scales_learns_too(material):
    tower = learning_tower(material, "routers", CLIPMoEVisionTowerS2, s2_scales=[24, 48])
    tower.wake(half=False)
    features = tower(torch.randn(2, 3, 48, 48))
    assert len(tower.balance) == 2 and 0.01 < tower.take_balance() < 0.04
    features.square().mean().backward()
    assert all(p.grad.any() for p in tower.parameters() if p.requires_grad)


@pytest.mark.parametrize("what", PARTS)
def test_the_first_features_are_the_frozen_towers(material, what):
    """Also without a gradient asked for; and checkpointed blocks give the same gradients."""
    pixels = torch.randn(2, 3, 24, 24)
    frozen = CLIPMoEVisionTower(str(material / "clip-moe"), SimpleNamespace(mm_vision_select_layer=-2))(pixels)
    assert not frozen.requires_grad
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        tower = learning_tower(material, what)
        tower.wake(half=False)
        tower.train()
        tower.vision_tower.vision_model.encoder.gradient_checkpointing = checkpointed
        features = tower(pixels)
        torch.testing.assert_close(features, frozen)
        features.square().mean().backward()
        gradients.append({name: p.grad for name, p in tower.named_parameters() if p.requires_grad})
        with torch.no_grad():
            assert not tower(pixels).requires_grad and not tower.balance
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    assert any(gradient.any() for gradient in gradients[0].values())
