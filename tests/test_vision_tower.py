"""CLIPMoEVisionTower: what upstream LLaVA calls on a tower (docs/design.md), without upstream.

The references are the models themselves: `hidden_states` of CLIPMoEModel, and upstream's own CLIPVisionTower with
transformers' dense CLIP on the same weights.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny.llavas import make_towers, save_tower, upstream_is_installed
from torch import nn

from llava_clipmoe.compression import compress
from llava_clipmoe.experts_delta_clipmoe import DeltaExperts
from llava_clipmoe.files import load_tensors, read_json, save_tensors, write_json
from llava_clipmoe.load import load_bundle
from llava_clipmoe.model_directory import save_bundle
from llava_clipmoe.modeling_clipmoe import CLIPMoEModel
from llava_clipmoe.tower_registry import (
    CONFIG_DIRECTORY,
    OVERRIDE,
    Tower,
    UnknownTower,
    register,
    registry_file,
    resolve,
)
from llava_clipmoe.upcycling import ffn_state, moe_config, upcycle
from llava_clipmoe.vision_tower import CLIPMoEVisionTower, CLIPMoEVisionTowerS2, build_tower

PIXELS, PATCHES, CHANNELS, BLOCKS = 24, 9, 48, 3


@pytest.fixture(scope="module")
def clip_moe(tmp_path_factory) -> Path:
    """The directory of a tiny CLIP-MoE: 24 px, patches of 8, 3 blocks of width 48, 4 experts."""
    return make_towers(tmp_path_factory.mktemp("towers"))[0]


@pytest.fixture(autouse=True)
def no_registrations(tmp_path, monkeypatch):
    monkeypatch.setenv(CONFIG_DIRECTORY, str(tmp_path / "config"))
    monkeypatch.delenv(OVERRIDE, raising=False)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(7))


def settings(layer: int = -2, **more) -> SimpleNamespace:
    """LLaVA's config or model arguments, as far as a tower reads them."""
    return SimpleNamespace(mm_vision_select_layer=layer, **more)


def tower_of(directory: Path, layer: int = -2, **more) -> CLIPMoEVisionTower:
    return CLIPMoEVisionTower(str(directory), settings(layer, **more))


def hidden_states(directory: Path, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All hidden states of the whole model's vision tower: the input, then each block's output."""
    model = CLIPMoEModel.from_pretrained(directory).eval()
    with torch.no_grad():
        return model.vision_model(pixels, output_hidden_states=True).hidden_states


# ------------------------------------------------------------------------------------------ before the weights are read


def test_everything_but_the_weights_is_known_before_they_are_read(clip_moe, tmp_path):
    """LLaVA builds the tower inside from_pretrained and asks for its width; there may be no memory for weights yet."""
    directory = shutil.copytree(clip_moe, tmp_path / "moe")
    (directory / "model.safetensors").unlink()
    tower = CLIPMoEVisionTower(str(directory), args=settings(), delay_load=True)
    assert not tower.is_loaded and not list(tower.parameters())
    assert (tower.hidden_size, tower.num_patches, tower.num_patches_per_side) == (CHANNELS, PATCHES, 3)
    assert tower.config.num_hidden_layers == BLOCKS and tower.config.image_size == PIXELS
    assert tower.vision_tower_name == str(directory)
    with pytest.raises(FileNotFoundError):
        tower.load_model()
    assert not tower.is_loaded


def test_a_registered_name_is_kept_as_the_towers_name(clip_moe):
    register(Tower("clipmoe-336", str(clip_moe)))
    tower = CLIPMoEVisionTower("clipmoe-336", settings(), delay_load=True)
    assert tower.vision_tower_name == "clipmoe-336" and tower.hidden_size == CHANNELS


def test_upstreams_names_are_refused():
    with pytest.raises(UnknownTower, match="upstream LLaVA's own"):
        CLIPMoEVisionTower("openai/clip-vit-large-patch14-336", settings())


# ------------------------------------------------------------------------------------------------- after they were read


def test_the_members_that_llava_asks_for(clip_moe, pixels):
    tower = CLIPMoEVisionTower(str(clip_moe), args=settings())
    assert tower.is_loaded and tower.dtype == torch.float32 and tower.device == torch.device("cpu")
    assert tower.dummy_feature.shape == (1, CHANNELS) and not tower.dummy_feature.any()
    assert tower.dummy_feature.dtype == tower.dtype and tower.dummy_feature.device == tower.device
    assert tower(pixels).shape == (2, tower.num_patches, tower.hidden_size)
    assert "CLIPMoEEncoderLayer" in tower.vision_tower._no_split_modules
    processor = tower.image_processor
    assert processor.crop_size["height"] == PIXELS and processor.size["shortest_edge"] == PIXELS
    assert len(processor.image_mean) == 3
    picture = Image.new("RGB", (50, 30), (220, 30, 30))
    assert processor.preprocess(picture, return_tensors="pt")["pixel_values"][0].shape == (3, PIXELS, PIXELS)


def test_loading_again_changes_nothing(clip_moe):
    tower = CLIPMoEVisionTower(str(clip_moe), settings(), delay_load=True)
    tower.load_model()
    model, processor = tower.vision_tower, tower.image_processor
    tower.load_model()
    tower.load_model(device_map="auto")
    assert tower.vision_tower is model and tower.image_processor is processor


@pytest.mark.parametrize("layer", [-2, -1, -4, 0, 1, 3])
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_features_are_the_asked_hidden_state(clip_moe, pixels, layer, feature):
    expected = hidden_states(clip_moe, pixels)[layer]
    expected = expected[:, 1:] if feature == "patch" else expected
    got = tower_of(clip_moe, layer, mm_vision_select_feature=feature)(pixels)
    assert got.shape == (2, PATCHES + (feature == "cls_patch"), CHANNELS)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_that_does_not_exist_is_refused_at_once(clip_moe, layer):
    with pytest.raises(ValueError, match=r"4 hidden states \(-4 to 3\)"):
        CLIPMoEVisionTower(str(clip_moe), settings(layer), delay_load=True)


def test_an_unknown_kind_of_feature_is_refused(clip_moe):
    with pytest.raises(ValueError, match="'patch' or 'cls_patch'"):
        tower_of(clip_moe, mm_vision_select_feature="cls")


@pytest.mark.parametrize(("layer", "blocks"), [(-2, 2), (-1, 3), (0, 0), (1, 1)])
def test_only_the_needed_blocks_are_in_memory(clip_moe, monkeypatch, layer, blocks):
    read = []

    def load(directory, keep):
        read.extend(load_tensors(directory, keep=keep))
        return load_tensors(directory, keep=keep)

    monkeypatch.setattr("llava_clipmoe.vision_tower.load_tensors", load)
    tower = tower_of(clip_moe, layer)
    assert len(tower.vision_tower.vision_model.encoder.layers) == blocks
    names = {name for name in read if ".layers." in name}
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == set(range(blocks))
    assert all(name.startswith("vision_model.") for name in read)  # no text tower
    assert tower.config.num_hidden_layers == BLOCKS


def test_a_list_gives_a_list_as_upstream(clip_moe, pixels):
    tower = tower_of(clip_moe)
    got = tower([pixels[0], pixels[1].half()])
    assert isinstance(got, list) and [f.shape for f in got] == [(1, PATCHES, CHANNELS)] * 2
    assert [f.dtype for f in got] == [torch.float32, torch.float16]
    torch.testing.assert_close(got[0], tower(pixels)[:1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_features_have_the_pictures_dtype_whatever_the_towers(clip_moe, pixels, dtype, own):
    expected = tower_of(clip_moe)(pixels)
    tower = tower_of(clip_moe).to(own)
    assert tower.dtype == own
    got = tower(pixels.to(dtype))
    assert got.dtype == dtype
    off = (got.float() - expected).norm() / expected.norm()
    assert off < 0.1  # rounding sends a token to another expert here and there; another picture is off by more than 1


def test_float16_on_the_cpu_becomes_float32(clip_moe, pixels):
    """Upstream asks for float16 everywhere; the CPU is slow in it, or cannot."""
    tower = tower_of(clip_moe)
    expected = tower(pixels)
    tower.to(device="cpu", dtype=torch.float16)
    assert tower.dtype == torch.float32
    assert torch.equal(tower(pixels), expected)  # and was not rounded to float16 on the way
    unloaded = CLIPMoEVisionTower(str(clip_moe), settings(), delay_load=True).to(torch.float16)
    unloaded.load_model()
    assert unloaded.dtype == torch.float32


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}, torch.device("cpu")])
def test_every_device_map_that_upstream_hands_over(clip_moe, pixels, monkeypatch, device_map):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tower = CLIPMoEVisionTower(str(clip_moe), settings(), delay_load=True)
    tower.load_model(device_map=device_map)
    assert tower.device == torch.device("cpu") and tower.dtype == torch.float32
    assert torch.equal(tower(pixels), tower_of(clip_moe)(pixels))
    assert not any(parameter.requires_grad for parameter in tower.parameters())


# --------------------------------------------------------------------------------------------------------- stays frozen


def test_a_trainer_cannot_wake_it(clip_moe, pixels, monkeypatch):
    """LLaVA's trainer calls `.train()` on everything and turns gradient checkpointing on wherever it finds it."""
    tower = tower_of(clip_moe)
    expected = tower(pixels)
    whole = nn.ModuleDict({"tower": tower, "projector": nn.Linear(CHANNELS, 4)})

    def checkpoint(*args, **kwargs):
        raise AssertionError("the frozen tower runs under gradient checkpointing")

    monkeypatch.setattr("llava_clipmoe.transformer_clipmoe.checkpoint", checkpoint)
    whole.train()
    for module in whole.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    assert whole.training and not any(module.training for module in tower.modules())
    features = tower(pixels.requires_grad_())
    assert torch.equal(features, expected) and not features.requires_grad
    whole["projector"](features).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in tower.parameters())
    tower.requires_grad_(True)  # even then: no graph is built through it
    assert not tower(pixels).requires_grad


# ------------------------------------------------------------------------------------- the same as upstream's own tower


@pytest.mark.skipif(not upstream_is_installed(), reason="upstream LLaVA (llava-torch) is not installed")
@pytest.mark.parametrize("layer", [-2, -1, 1])
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_identical_experts_equal_upstreams_tower_on_the_dense_clip(tiny_dense, tmp_path, pixels, layer, feature):
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    same = upcycle(tiny_dense, [ffn_state(tiny_dense.state_dict())] * 3, moe_config(tiny_dense.config, num_experts=4))
    ours = tower_of(save_tower(same, tmp_path / "moe"), layer, mm_vision_select_feature=feature)
    args = settings(layer, mm_vision_select_feature=feature)
    upstreams = CLIPVisionTower(str(save_tower(tiny_dense, tmp_path / "dense")), args)
    torch.testing.assert_close(ours(pixels), upstreams(pixels), atol=1e-5, rtol=1e-5)
    for member in ("hidden_size", "num_patches", "num_patches_per_side", "dtype", "device"):
        assert getattr(ours, member) == getattr(upstreams, member), member
    picture = Image.effect_mandelbrot((50, 30), (-2, -1, 1, 1), 50).convert("RGB")
    both = [t.image_processor.preprocess(picture, return_tensors="pt")["pixel_values"][0] for t in (ours, upstreams)]
    assert torch.equal(*both)


# ------------------------------------------------------------------------------------------------------- several scales


def slow_s2(tower: CLIPMoEVisionTower, pixels: torch.Tensor, scales: list[int]) -> torch.Tensor:
    """S2 as its paper says it, one tile after the other: the reference."""
    side = tower.num_patches_per_side
    out = []
    for picture in pixels:
        channels = []
        for scale in scales:
            resized = F.interpolate(picture[None], size=(scale, scale), mode="bicubic")
            n = scale // PIXELS
            whole = torch.zeros(CHANNELS, n * side, n * side)
            for row in range(n):
                for column in range(n):
                    y, x = row * PIXELS, column * PIXELS
                    features = tower(resized[:, :, y : y + PIXELS, x : x + PIXELS])[0]  # [N,C]
                    for i in range(side):
                        for j in range(side):
                            whole[:, row * side + i, column * side + j] = features[i * side + j]
            cells = [(i * n, j * n) for i in range(side) for j in range(side)]
            small = torch.stack([whole[:, i : i + n, j : j + n].mean((1, 2)) for i, j in cells])
            channels.append(small)  # [N,C]
        out.append(torch.cat(channels, dim=1))
    return torch.stack(out)


@pytest.mark.parametrize("scales", ["24,48,72", "24,72", "24"])
def test_s2_equals_a_plain_loop_over_tiles(clip_moe, scales):
    numbers = [int(part) for part in scales.split(",")]
    tower = CLIPMoEVisionTowerS2(str(clip_moe), settings(s2_scales=scales))
    pixels = torch.randn(2, 3, numbers[-1], numbers[-1], generator=torch.Generator().manual_seed(8))
    got = tower(pixels)
    assert got.shape == (2, PATCHES, CHANNELS * len(numbers)) and tower.hidden_size == CHANNELS * len(numbers)
    torch.testing.assert_close(got, slow_s2(tower_of(clip_moe), pixels, numbers), atol=1e-5, rtol=1e-5)


def test_s2_equals_the_package_s2wrapper(clip_moe):
    s2wrapper = pytest.importorskip("s2wrapper", reason="the package s2wrapper, S2's own, is not installed")
    plain, tower = tower_of(clip_moe), CLIPMoEVisionTowerS2(str(clip_moe), settings(s2_scales="24,48,72"))
    pixels = torch.randn(2, 3, 72, 72, generator=torch.Generator().manual_seed(9))
    expected = s2wrapper.forward(plain, pixels, img_sizes=[24, 48, 72], max_split_size=24)
    torch.testing.assert_close(tower(pixels), expected, atol=1e-5, rtol=1e-5)


def test_s2_takes_the_picture_at_its_largest_scale(clip_moe):
    tower = CLIPMoEVisionTowerS2(str(clip_moe), settings(), delay_load=True)
    assert tower.scales == [24, 48, 72] and tower.hidden_size == 3 * CHANNELS and tower.num_patches == PATCHES
    tower.load_model()
    assert tower.image_processor.crop_size["height"] == 72 and tower.image_processor.size["shortest_edge"] == 72
    picture = tower.image_processor.preprocess(Image.new("RGB", (100, 80)), return_tensors="pt")["pixel_values"]
    assert picture.shape == (1, 3, 72, 72) and tower(picture).shape == (1, PATCHES, 3 * CHANNELS)
    assert tower.dummy_feature.shape == (1, 3 * CHANNELS)
    assert [f.shape for f in tower([picture[0]])] == [(1, PATCHES, 3 * CHANNELS)]


def test_s2_is_asked_for_at_registration_or_by_llavas_config(clip_moe):
    register(Tower("plain", str(clip_moe)))
    register(Tower("scales", str(clip_moe), s2=True, s2_scales=[24, 48]))
    kinds = []
    for name, args in (("plain", settings()), ("scales", settings()), ("plain", settings(s2=True))):
        tower = build_tower(Tower(name, str(clip_moe), s2=name == "scales"), args, delay_load=True)
        kinds.append((type(tower).__name__, tower.hidden_size // CHANNELS))
    assert kinds == [("CLIPMoEVisionTower", 1), ("CLIPMoEVisionTowerS2", 2), ("CLIPMoEVisionTowerS2", 3)]


@pytest.mark.parametrize("scales", ["48,72", "24,40", "12,24"])
def test_s2_scales_that_do_not_fit_are_refused(clip_moe, scales):
    with pytest.raises(ValueError, match="do not fit a tower of 24 px"):
        CLIPMoEVisionTowerS2(str(clip_moe), settings(s2_scales=scales), delay_load=True)


def test_s2_joins_patches_only(clip_moe):
    with pytest.raises(ValueError, match="must be 'patch'"):
        CLIPMoEVisionTowerS2(str(clip_moe), settings(mm_vision_select_feature="cls_patch"), delay_load=True)


# ------------------------------------------------------------------------------------------------------ damaged weights


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_weights_that_do_not_fit_are_named_and_never_random(clip_moe, tmp_path, damage):
    directory = shutil.copytree(clip_moe, tmp_path / "moe")
    state, name = load_tensors(directory), "vision_model.encoder.layers.1.mlp.experts.fc1.weight"
    weight = state.pop(name)
    if damage == "shape":
        state[name] = weight[:2].clone()
    save_tensors(directory / "model.safetensors", state, {"format": "pt"})
    with pytest.raises(ValueError, match=name):
        tower_of(directory)
    assert tower_of(directory, layer=1)(torch.zeros(1, 3, PIXELS, PIXELS)).isfinite().all()  # block 1 is not needed


# ------------------------------------------------------------------------------------------------------------- speed


def compressed(directory: Path, target: Path) -> Path:
    """The same CLIP-MoE with delta experts, at full rank."""
    bundle = load_bundle(directory)
    save_bundle(dataclasses.replace(bundle, model=compress(bundle.model, rank=10_000)[0]), target)
    return target


def test_a_tower_of_delta_experts_is_the_tower_of_whole_ones(clip_moe, pixels, tmp_path):
    expected = tower_of(clip_moe)(pixels)
    delta = tower_of(compressed(clip_moe, tmp_path / "delta"))
    assert any(isinstance(module, DeltaExperts) for module in delta.modules())
    torch.testing.assert_close(delta(pixels), expected, atol=1e-5, rtol=1e-5)


def test_an_old_registration_that_asks_for_compilation_still_opens(clip_moe):
    register(Tower("old", str(clip_moe)))
    content = read_json(registry_file())
    content["old"]["compile"] = True  # what `register --compile` wrote before there were kernels
    write_json(registry_file(), content)
    assert build_tower(resolve("old"), settings(), delay_load=True).directory == clip_moe
