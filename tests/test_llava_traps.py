"""The nine traps in upstream LLaVA (docs/design.md), each with upstream's own code around ours; and bad input.

Everything but the import error runs in this process, with the hook in place.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import shake
from tiny.llavas import make_language_model, make_towers, save_tower, upstream_is_installed
from torch import nn

from llava_clipmoe import llava_hook, run
from llava_clipmoe.compat import loading, versions
from llava_clipmoe.compat.trainer import rename_flags
from llava_clipmoe.compat.versions import BrokenTransformers, check_transformers
from llava_clipmoe.modeling_clipmoe import CLIPMoEModel, CLIPMoEVisionModel
from llava_clipmoe.tower_registry import CONFIG_DIRECTORY, OVERRIDE, UnknownTower
from llava_clipmoe.vision_tower import CLIPMoEVisionTower

REPOSITORY = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not upstream_is_installed(), reason="upstream LLaVA (llava-torch) is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`llama`, `clip-moe`, `clip`."""
    folder = tmp_path_factory.mktemp("traps")
    make_language_model(folder / "llama")
    make_towers(folder)
    return folder


@pytest.fixture(autouse=True)
def registered(folder, tmp_path, monkeypatch):
    monkeypatch.setenv(CONFIG_DIRECTORY, str(tmp_path / "config"))
    monkeypatch.setenv(OVERRIDE, f"clipmoe-336={folder / 'clip-moe'}")
    monkeypatch.setenv(llava_hook.SWITCH, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def upstream():
    """Upstream's modules with the hook in place; another test of this process may have imported them before."""
    os.environ[llava_hook.SWITCH] = "1"
    llava_hook.install()
    names = ("model.llava_arch", "model.builder", "model.language_model.llava_llama", "train.train")
    modules = [importlib.import_module(f"llava.{name}") for name in names]
    return SimpleNamespace(**{module.__name__.rpartition(".")[2]: module for module in modules})


def model_args(tower: object = "clipmoe-336", layer: int = -2, **changed: object) -> SimpleNamespace:
    """LLaVA's model arguments, as far as `initialize_vision_modules` reads them."""
    given = {
        "vision_tower": str(tower), "mm_vision_select_layer": layer, "mm_vision_select_feature": "patch",
        "pretrain_mm_mlp_adapter": None, "mm_patch_merge_type": "flat", "mm_projector_type": "mlp2x_gelu", **changed,
    }  # fmt: skip
    return SimpleNamespace(**given)


def language_model(upstream, directory: Path):
    return upstream.llava_llama.LlavaLlamaForCausalLM.from_pretrained(directory)


def with_tower(upstream, directory: Path, args: SimpleNamespace):
    """A LLaVA: the language model of `directory` with the tower and projector of `args`."""
    model = language_model(upstream, directory)
    model.get_model().initialize_vision_modules(args)
    return model


def save(model, folder: Path, directory: Path) -> Path:
    """Write a LLaVA as upstream's trainer does, with the tokenizer of `folder`/llama."""
    model.config.mm_use_im_patch_token = model.config.mm_use_im_start_end = False
    model.save_pretrained(directory)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(folder / "llama" / name, directory)
    return directory


@pytest.fixture(scope="module")
def llava_directory(upstream, folder) -> Path:
    """A checkpoint `llava-tiny` that says mm_vision_tower = clipmoe-336."""
    os.environ[OVERRIDE] = f"clipmoe-336={folder / 'clip-moe'}"
    try:
        return save(with_tower(upstream, folder / "llama", model_args()), folder, folder / "llava-tiny")
    finally:
        del os.environ[OVERRIDE]


def load(upstream, directory: Path, **more):
    return upstream.builder.load_pretrained_model(str(directory), None, directory.name, **more)


def hidden_states(folder: Path, pixels: torch.Tensor):
    with torch.no_grad():
        model = CLIPMoEModel.from_pretrained(folder / "clip-moe").eval()
        return model.vision_model(pixels, output_hidden_states=True).hidden_states


PIXELS = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(3))


# --------------------------------------------------------------------------------- 1: the base model is a LLaVA already


def test_1_another_tower_than_the_base_models_is_really_built(upstream, folder, tmp_path, capsys):
    base = save(with_tower(upstream, folder / "llama", model_args(folder / "clip")), folder, tmp_path / "llava-dense")
    model = language_model(upstream, base)
    assert type(model.get_vision_tower()).__name__ == "CLIPVisionTower"
    projector = model.get_model().mm_projector
    start = projector[0].weight.clone()
    model.get_model().initialize_vision_modules(model_args())
    tower = model.get_vision_tower()
    assert isinstance(tower, CLIPMoEVisionTower) and tower.is_loaded
    assert model.config.mm_vision_tower == "clipmoe-336"
    assert model.get_model().mm_projector is projector and torch.equal(projector[0].weight, start)  # same width: kept
    assert "clipmoe-336 takes its place" in capsys.readouterr().err
    torch.testing.assert_close(tower(PIXELS), hidden_states(folder, PIXELS)[-2][:, 1:])


def test_1_a_projector_of_another_width_goes_with_the_old_tower(upstream, folder, tmp_path, tiny_config, capsys):
    config = tiny_config()
    config.vision_config.hidden_size = 24
    narrow = save_tower(CLIPMoEModel(config), tmp_path / "narrow")
    base = save(with_tower(upstream, folder / "llama", model_args(narrow)), folder, tmp_path / "llava-narrow")
    model = language_model(upstream, base)
    model.get_model().initialize_vision_modules(model_args())
    assert model.get_model().mm_projector[0].in_features == model.config.mm_hidden_size == 48
    assert "a new projector is made" in capsys.readouterr().err.replace("\n", " ")
    assert model.encode_images(PIXELS).shape == (2, 9, 32)


def test_1_the_same_tower_again_is_kept(upstream, folder, llava_directory, capsys):
    model = language_model(upstream, llava_directory)
    tower = model.get_vision_tower()
    model.get_model().initialize_vision_modules(model_args())
    assert model.get_vision_tower() is tower and tower.is_loaded and "takes its place" not in capsys.readouterr().err


# --------------------------------------------------------------------------------------- 2: any path goes to dense CLIP


def test_2_a_clip_moe_directory_keeps_its_experts(upstream, folder):
    tower = upstream.llava_arch.build_vision_tower(model_args(folder / "clip-moe"))
    torch.testing.assert_close(tower(PIXELS), hidden_states(folder, PIXELS)[-2][:, 1:])


def test_2_a_stray_folder_cannot_hide_the_registered_name(upstream, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "clip", "clipmoe-336")
    tower = upstream.llava_arch.build_vision_tower(model_args())
    assert isinstance(tower, CLIPMoEVisionTower) and tower.source.source == str(folder / "clip-moe")
    monkeypatch.delenv(OVERRIDE)
    with pytest.raises(UnknownTower, match="llava-clipmoe register clipmoe-336"):
        upstream.llava_arch.build_vision_tower(model_args())


# ----------------------------------------------------------------------------------- 3: checkpoints hold the short name


def test_3_the_short_name_of_a_checkpoint_means_the_tower_at_evaluation(upstream, llava_directory, folder):
    assert json.loads((llava_directory / "config.json").read_text())["mm_vision_tower"] == "clipmoe-336"
    _, model, processor, _ = load(upstream, llava_directory)
    assert isinstance(model.get_vision_tower(), CLIPMoEVisionTower) and processor.crop_size["height"] == 24
    torch.testing.assert_close(model.get_vision_tower()(PIXELS), hidden_states(folder, PIXELS)[-2][:, 1:])


def test_3_unregistered_it_fails_with_the_command_that_registers_it(upstream, llava_directory, monkeypatch):
    monkeypatch.delenv(OVERRIDE)
    with pytest.raises(UnknownTower, match="llava-clipmoe register clipmoe-336 DIR_OR_HUB_ID"):
        load(upstream, llava_directory)


# ---------------------------------------------------------------------------------------------- 4: the trainer wakes it


def test_4_upstreams_trainer_leaves_the_tower_frozen_in_eval_mode_and_uncheckpointed(upstream, folder, monkeypatch):
    model = with_tower(upstream, folder / "llama", model_args())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    model.train()
    tower = model.get_vision_tower()
    assert model.training and not any(module.training for module in tower.modules())

    def checkpoint(*args, **kwargs):
        raise AssertionError("the frozen tower runs under gradient checkpointing")

    monkeypatch.setattr("llava_clipmoe.transformer_clipmoe.checkpoint", checkpoint)
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    ids = torch.tensor([[1, 40, -200, 60], [1, 41, -200, 61]])
    loss = model(input_ids=ids, labels=ids.clone(), images=PIXELS, attention_mask=torch.ones_like(ids)).loss
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert model.get_model().mm_projector[0].weight.grad.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in tower.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())


# ------------------------------------------------------------------------------------------------ 5: which hidden state


@pytest.mark.parametrize("layer", [-1, -2])
def test_5_the_layer_asked_for_is_the_hidden_state_of_that_number(upstream, folder, layer):
    """-1 is train.py's default, -2 what LLaVA-1.5's scripts pass."""
    assert upstream.train.ModelArguments().mm_vision_select_layer == -1
    model = with_tower(upstream, folder / "llama", model_args(layer=layer))
    assert model.config.mm_vision_select_layer == layer
    expected = model.get_model().mm_projector(hidden_states(folder, PIXELS)[layer][:, 1:])
    torch.testing.assert_close(model.encode_images(PIXELS), expected)


# ---------------------------------------------------------------------------------------------- 6: hidden import errors


def test_6_an_import_error_that_upstream_hides_is_the_launchers_error():
    """Upstream's `except: pass` leaves only "cannot import name 'LlavaLlamaForCausalLM'", which names no cause."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); sys.modules['llava.mm_utils'] = None\n"
    code += "from llava_clipmoe import run; sys.exit(run.main(['llava.eval.model_vqa']))"
    command = [sys.executable, "-W", "ignore", "-c", code, str(REPOSITORY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "llava.mm_utils" in errors[0], done.stderr


# ---------------------------------------------------------------------------------------------------- 7: folders' names


@pytest.mark.parametrize(
    ("name", "words"),
    [("my-model", "has no 'llava' in it"), ("llava-attempt", "'mpt' in its name"), ("prompt-llava", "'mpt' in its")],
)
def test_7_a_name_that_would_load_the_wrong_class_is_refused(upstream, llava_directory, tmp_path, name, words):
    with pytest.raises(ValueError, match=words):
        load(upstream, shutil.copytree(llava_directory, tmp_path / name))


def test_7_good_names_and_plain_language_models_are_let_through(llava_directory, folder):
    loading.check_name(str(llava_directory), "LLaVA-v1.5-7b")
    loading.check_name(str(folder / "llama"), "llama")  # not a LLaVA: upstream may load it as what it is
    loading.check_name("liuhaotian/some-model", "some-model")  # not here: nothing to look into


# ------------------------------------------------------------------------------------------------- 8: device_map="auto"


def test_8_loaded_with_device_map_auto_it_answers_on_the_cpu(upstream, llava_directory):
    """As upstream's runners do: float16 asked for, `device_map="auto"`, pictures in float16."""
    tokenizer, model, _, _ = load(upstream, llava_directory, device_map="auto")
    tower = model.get_vision_tower()
    assert tower.is_loaded and {tower.dtype, model.dtype} == {torch.float32}
    ids = torch.tensor([[1, 40, -200, 60]])
    with torch.inference_mode():
        out = model.generate(ids, images=PIXELS[:1].half(), image_sizes=[(24, 24)], do_sample=False, max_new_tokens=3)
    assert tokenizer.batch_decode(out)


def test_8_a_block_is_never_divided_between_devices(tiny_config):
    from accelerate import infer_auto_device_map

    config = tiny_config().vision_config
    config.num_hidden_layers = 8
    model = CLIPMoEVisionModel(config)
    size = sum(p.numel() * p.element_size() for p in model.parameters())

    def divided(share: float, whole: list[str]) -> set[str]:
        memory = {"cpu": int(size * share), "disk": size}  # stand for two GPUs, which are not here
        places = infer_auto_device_map(model, memory, no_split_module_classes=whole)
        assert len(set(places.values())) == 2
        return {n.split(".layers.")[1].split(".")[0] for n in places if ".layers." in n and n.split(".layers.")[1][1:]}

    shares = (0.35, 0.4, 0.5, 0.6, 0.7)
    assert not set().union(*(divided(share, model._no_split_modules) for share in shares))
    assert set().union(*(divided(share, []) for share in shares))  # without the list, some would be


# ------------------------------------------------------------------------------------------------ 9: `args` is a global


def test_9_the_launcher_runs_a_module_as_main_so_that_its_globals_exist(tmp_path, monkeypatch, capsys):
    """model_vqa_loader's data set reads `args`, which is set under `if __name__ == "__main__"` only."""
    (tmp_path / "runner_of_upstream.py").write_text(
        "import argparse\ndef ask(): return args.word\n"
        "if __name__ == '__main__':\n"
        "    parser = argparse.ArgumentParser(); parser.add_argument('--word'); args = parser.parse_args()\n"
        "    import __main__; print(ask(), __main__.ask is ask)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(run, "prepare", lambda: None)
    monkeypatch.setattr(sys, "argv", sys.argv)
    for target in ("runner_of_upstream", str(tmp_path / "runner_of_upstream.py")):
        assert run.main([target, "--word", "seen"]) == 0
        assert capsys.readouterr().out.split()[0] == "seen"


def test_9_a_launchers_rank_is_handed_on(tmp_path, monkeypatch, capsys):
    """DeepSpeed puts --local_rank before the module."""
    (tmp_path / "shows.py").write_text("import sys; print(sys.argv[1:])\n")
    monkeypatch.setattr(run, "prepare", lambda: None)
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert run.main(["--local_rank=1", str(tmp_path / "shows.py"), "--a", "b"]) == 0
    assert capsys.readouterr().out.strip() == "['--a', 'b', '--local_rank=1']"


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("version", ["4.40.0", "4.45.2", "4.57.1"])
def test_a_transformers_that_breaks_upstream_is_refused_everywhere(
    upstream, llava_directory, monkeypatch, capsys, version
):
    monkeypatch.setattr(versions.transformers, "__version__", version)
    for act in (lambda: upstream.llava_arch.build_vision_tower(model_args()), lambda: load(upstream, llava_directory)):
        with pytest.raises(BrokenTransformers, match=r"pip install transformers==4\.37\.2"):
            act()
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert run.main(["llava.train.train"]) == 2
    text = capsys.readouterr().err
    assert (
        text.startswith(f"error: transformers {version} does not work with upstream LLaVA") and "Traceback" not in text
    )


@pytest.mark.parametrize("version", ["4.37.2", "4.39.3", "5.0.0", "5.23.0"])
def test_versions_that_work_are_let_through(monkeypatch, version):
    monkeypatch.setattr(versions.transformers, "__version__", version)
    check_transformers()


def test_too_little_memory_is_said_before_anything_is_loaded(upstream, llava_directory, monkeypatch):
    parameters = loading.count_parameters(llava_directory)
    model = language_model(upstream, llava_directory)
    assert parameters >= sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(loading, "_free_on_cpu", lambda: parameters * 4 - 1)
    with pytest.raises(loading.TooLittleMemory, match=r"32 bits.*LLAVA_CLIPMOE_CPU_DTYPE=bfloat16"):
        load(upstream, llava_directory)
    monkeypatch.setenv(loading.CPU_DTYPE, "bfloat16")  # what the message says helps
    _, model, _, _ = load(upstream, llava_directory)
    assert model.dtype == torch.bfloat16
    monkeypatch.setattr(loading, "_free_on_cpu", lambda: parameters * 4)
    monkeypatch.delenv(loading.CPU_DTYPE)
    load(upstream, llava_directory)


@pytest.mark.parametrize(
    ("kwargs", "bytes_each"),
    [
        ({}, 4),
        ({"torch_dtype": torch.float16, "device_map": "auto"}, 4),  # upstream's way: float32 on the CPU
        ({"torch_dtype": torch.bfloat16}, 2),
        ({"quantization_config": SimpleNamespace(load_in_8bit=True, load_in_4bit=False)}, 1),
        ({"quantization_config": SimpleNamespace(load_in_8bit=False, load_in_4bit=True)}, 0.5),
    ],
)
def test_memory_is_counted_at_the_asked_precision(llava_directory, monkeypatch, kwargs, bytes_each):
    needed, kwargs = loading.count_parameters(llava_directory) * bytes_each, loading.translate(kwargs)
    monkeypatch.setattr(loading, "_free_on_cpu", lambda: needed)
    loading.check_memory(llava_directory, kwargs)
    monkeypatch.setattr(loading, "_free_on_cpu", lambda: needed - 1)
    with pytest.raises(loading.TooLittleMemory, match=f"in {int(8 * bytes_each)} bits"):
        loading.check_memory(llava_directory, kwargs)


def test_a_projector_of_another_width_names_both_widths(upstream, folder, tmp_path):
    file = tmp_path / "mm_projector.bin"
    wide = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 32)).state_dict()
    torch.save({f"model.mm_projector.{name}": tensor for name, tensor in wide.items()}, file)
    with pytest.raises(ValueError, match="gives 48 channels, the language model takes 32"):
        with_tower(upstream, folder / "llama", model_args(pretrain_mm_mlp_adapter=str(file)))


def test_flags_of_llavas_own_scripts_are_renamed_where_transformers_dropped_them():
    new = SimpleNamespace(__dataclass_fields__={"eval_strategy": 0, "warmup_steps": 0})
    old = SimpleNamespace(__dataclass_fields__={"evaluation_strategy": 0, "warmup_ratio": 0, "warmup_steps": 0})
    given = ["train", "--evaluation_strategy", "no", "--warmup_ratio=0.03", "evaluation_strategy"]
    words = list(given)
    rename_flags(words, old)
    assert words == given
    rename_flags(words, new)
    assert words == ["train", "--eval_strategy", "no", "--warmup_steps=0.03", "evaluation_strategy"]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize(("bits", "kind", "off"), [(8, "Linear8bitLt", 0.1), (4, "Linear4bit", 0.5)])
def test_a_quantised_language_model_beside_a_tower_that_is_not(
    upstream, tiny_config, tmp_path, monkeypatch, bits, kind, off
):
    """bitsandbytes on the CPU; its 4-bit blocks need widths that 64 divides."""
    config = tiny_config(num_experts=4, num_experts_per_tok=2)
    config.vision_config.hidden_size, config.vision_config.num_attention_heads = 64, 4
    moe = save_tower(shake(CLIPMoEModel(config), 1), tmp_path / "moe")
    monkeypatch.setenv(OVERRIDE, f"clipmoe-336={moe}")
    make_language_model(tmp_path / "llama", hidden_size=64)
    directory = save(with_tower(upstream, tmp_path / "llama", model_args()), tmp_path, tmp_path / "llava-wide")
    logits = []
    for more in ({}, {f"load_{bits}bit": True}):
        _, model, _, _ = load(upstream, directory, device="cpu", **more)
        with torch.inference_mode():
            logits.append(model(input_ids=torch.tensor([[1, 40, -200, 60]]), images=PIXELS[:1].half()).logits.float())
    assert type(model.model.layers[0].mlp.up_proj).__name__ == kind
    tower = model.get_vision_tower()
    assert tower.dtype == torch.float32 and not [m for m in tower.modules() if "bit" in type(m).__name__]
    assert 0 < (logits[1] - logits[0]).norm() < off * logits[0].norm()
