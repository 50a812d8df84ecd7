"""The fast path of a whole model equals its modules: features, gradients, memory, and when it must stand back.

Run by `test_fast.py` in a process of its own, on a GPU, or on the CPU through Triton's interpreter. The environment
variable LLAVA_CLIPMOE_FAST is 1 here, so that fp32 takes the fast path too, and 0 for the twin.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_config, shake

from llava_clipmoe import fast_clipmoe, gpu_clipmoe
from llava_clipmoe.common_clipmoe import working_dtype
from llava_clipmoe.compression import compress
from llava_clipmoe.experts_clipmoe import Router
from llava_clipmoe.experts_delta_clipmoe import DeltaExperts
from llava_clipmoe.gpu_clipmoe import FAST, kernels_for
from llava_clipmoe.kernels_base_clipmoe import TILES, Tile
from llava_clipmoe.modeling_clipmoe import CLIPMoEModel
from llava_clipmoe.transformer_clipmoe import CLIPMoEEncoder, CLIPMoESparseMLP, only_expert
from llava_clipmoe.upcycling import ffn_state, fuse, moe_config, upcycle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["dense", "whole", "delta", "gate"]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Of the norm: where two experts are nearly equal, rounding decides, and one token differs more."""
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setenv(FAST, "1")
    gpu_clipmoe.say_once.cache_clear()
    if DEVICE == "cpu":  # large tiles are few programs, and those are what the interpreter needs its time for
        for kind, size in TILES:
            if not kind.startswith(("rows", "sort")):
                monkeypatch.setitem(TILES, (kind, size), {0: Tile(64, 64, 2 if kind.startswith("delta") else 64, 4, 1)})


@contextlib.contextmanager
def slow():
    """Inside the `with`, the modules themselves."""
    os.environ[FAST] = "0"
    try:
        yield
    finally:
        os.environ[FAST] = "1"


def make(kind: str, dtype: torch.dtype = torch.float32, **fields) -> CLIPMoEModel:
    config = make_tiny_config(**fields)
    config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers = 2, 1  # the interpreter is slow
    base = shake(CLIPMoEModel(config), seed=1).eval()
    stages = [ffn_state(shake(CLIPMoEModel(base.config), seed).state_dict()) for seed in (2, 3, 4)]
    if kind == "dense":
        return base.to(DEVICE, dtype)
    if kind == "gate":
        config = moe_config(base.config, num_experts=3, num_experts_per_tok=2, fusion_gate=True)
        model = shake(fuse(base, stages, config), seed=5)
    else:
        model = upcycle(base, stages, moe_config(base.config, num_experts=4, num_experts_per_tok=2))
        for seed, router in enumerate((m for m in model.modules() if isinstance(m, Router)), start=5):
            shake(router, seed)
    if kind == "delta":
        model, _ = compress(model, rank=20)  # no multiple of what a kernel's tile needs
    return model.eval().to(DEVICE, dtype)


def given(batch: dict, dtype: torch.dtype = torch.float32) -> dict:
    """Two pictures, and two captions of 3 and 5 tokens."""
    rows = [0, 3] if len(batch["input_ids"]) > 2 else [0, 1]
    moved = {name: tensor[rows].to(DEVICE) for name, tensor in batch.items()}
    short = {name: moved[name][:, :6] for name in ("input_ids", "attention_mask")}
    return moved | short | {"pixel_values": moved["pixel_values"].to(dtype)}


def outputs(model: CLIPMoEModel, batch: dict) -> dict[str, torch.Tensor]:
    """Everything that a forward pass gives, by name."""
    with torch.no_grad():
        whole = model(**batch, output_hidden_states=True, output_router_logits=True)
        found = {
            "image features": model.get_image_features(batch["pixel_values"]),
            "text features": model.get_text_features(batch["input_ids"]),  # without the mask that `whole` has
        }
    for tower in ("vision", "text"):
        states = whole[f"{tower}_model_output"].hidden_states
        found |= {f"{tower} state {number}": state for number, state in enumerate(states)}
    found |= {f"logits {number}": logits for number, logits in enumerate(whole.router_logits)}
    return found


def assert_alike(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        error = (found[name].float() - tensor.float()).norm() / (tensor.float().norm() + 1e-2)  # (some are 0)
        assert error <= tolerance, f"{name} is off by {error:.1e}"


def is_fast(model: CLIPMoEModel) -> bool:
    """True when the last pass of both towers went through the fast path."""
    encoders = [m for m in model.modules() if isinstance(m, CLIPMoEEncoder)]
    return all(e.prepared is not None and e.prepared.usable() for e in encoders)


# ------------------------------------------------------------------------------------------------------ the same result


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float32) for kind in KINDS), ("dense", torch.bfloat16), ("whole", torch.float16),
     ("delta", torch.bfloat16), ("gate", torch.float16)],
)  # fmt: skip
def test_the_fast_path_gives_what_the_modules_give(batch, kind, dtype):
    model, batch = make(kind, dtype), given(batch, dtype)
    with slow():
        expected = outputs(make(kind, torch.float32), given(batch, torch.float32))
        expected = {name: tensor.to(torch.float32 if "logits" in name else dtype) for name, tensor in expected.items()}
    found = outputs(model, batch)
    assert is_fast(model)
    assert_alike(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["dense", "delta", "gate"])
def test_under_autocast_the_weights_stay_in_fp32(batch, kind):
    model, batch = make(kind), given(batch)
    with torch.autocast(DEVICE, torch.bfloat16):
        with slow():
            expected = outputs(model, batch)
        found = outputs(model, batch)
    assert is_fast(model) and all(p.dtype == torch.float32 for p in model.parameters())
    assert_alike(found, {n: t.to(found[n].dtype) for n, t in expected.items()}, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_no_picture_at_all(batch, act):
    model = make("whole", hidden_act=act)
    with torch.no_grad():
        assert model.get_image_features(given(batch)["pixel_values"][:0]).shape == (0, 24)


# ------------------------------------------------------------------------------------------------ weights and memory


def storage_bytes(model: CLIPMoEModel) -> int:
    """Memory of all parameters and of what was prepared from them, each storage once."""
    seen = {}

    def see(thing) -> None:
        if isinstance(thing, torch.Tensor):
            seen[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, (list, tuple)):
            for part in thing:
                see(part)

    for module in model.modules():
        see(list(module._parameters.values()))
        if isinstance(module, CLIPMoEEncoder) and module.prepared:
            for block in module.prepared.blocks:
                see([value for name, value in vars(block).items() if name != "mlp"])
        if isinstance(module, DeltaExperts) and module.prepared:
            see(module.prepared.packed)
    return sum(seen.values())


@pytest.mark.parametrize("kind", ["dense", "delta", "gate"])
def test_packing_takes_no_memory_and_changes_no_weight(batch, kind):
    model, batch = make(kind, torch.bfloat16), given(batch, torch.bfloat16)
    before, bytes_before = copy.deepcopy(model.state_dict()), storage_bytes(model)
    outputs(model, batch)
    assert is_fast(model)
    padding = 1.4 if kind == "delta" else 1.0  # rank 20 of width 32 is padded to 32: a great deal, in a tiny model
    assert storage_bytes(model) <= padding * bytes_before
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(("kind", "autocast"), [("whole", True), ("delta", False), ("delta", True)])
def test_a_changed_weight_is_seen(batch, kind, autocast):
    model, batch = make(kind), given(batch)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        first = outputs(model, batch)
        with torch.no_grad():
            for name, parameter in model.vision_model.named_parameters():
                if "experts" in name or "proj" in name:
                    parameter.mul_(0.5)
        found = outputs(model, batch)
        with slow():
            expected = outputs(model, batch)
    assert (found["image features"] - first["image features"]).abs().max() > 1e-2
    assert_alike(found, expected, TOLERANCE[torch.bfloat16 if autocast else torch.float32])


@pytest.mark.parametrize("kind", ["delta", "gate"])
def test_another_dtype_prepares_anew_and_the_old_is_gone(batch, kind):
    model = make(kind)
    outputs(model, given(batch))
    model.to(torch.bfloat16)
    assert all(module.prepared is None for module in model.modules() if hasattr(module, "prepared"))
    with slow():
        expected = outputs(model, given(batch, torch.bfloat16))
    assert_alike(outputs(model, given(batch, torch.bfloat16)), expected, TOLERANCE[torch.bfloat16])


def test_moving_nowhere_keeps_what_was_prepared(batch):
    model = make("delta")
    outputs(model, given(batch))
    prepared = model.vision_model.encoder.prepared
    model.to(DEVICE).eval()
    outputs(model, given(batch))
    assert model.vision_model.encoder.prepared is prepared
    model.train()
    assert model.vision_model.encoder.prepared is None


def test_a_copy_has_weights_of_its_own(batch):
    model = make("delta")
    found = outputs(model, given(batch))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_alike(outputs(twin, given(batch)), found, 1e-6)


@pytest.mark.parametrize("kind", ["whole", "delta"])
def test_transformers_saves_a_packed_model(batch, tmp_path, kind):
    model = make(kind)
    found = outputs(model, given(batch))
    model.save_pretrained(tmp_path)
    again = CLIPMoEModel.from_pretrained(tmp_path).eval().to(DEVICE)
    assert_alike(outputs(again, given(batch)), found, 1e-6)


def test_a_model_prepared_in_inference_mode_can_be_trained(batch):
    model, batch = make("whole"), given(batch)
    with torch.inference_mode():
        model.get_image_features(batch["pixel_values"])
    assert model.vision_model.encoder.prepared is not None
    model.train()
    model(**batch, return_loss=True).loss.backward()
    assert model.vision_model.encoder.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


# -------------------------------------------------------------------------------------------------- when it stands back


def test_who_listens_to_a_module_hears_it(batch):
    model, batch, heard = make("whole"), given(batch), []
    outputs(model, batch)
    routers = [m for m in model.vision_model.modules() if isinstance(m, Router)]
    handles = [router.register_forward_hook(lambda *_: heard.append(1)) for router in routers]
    with torch.no_grad():
        model.get_image_features(batch["pixel_values"])
    assert len(heard) == len(routers)
    for handle in handles:
        handle.remove()
    outputs(model, batch)
    assert is_fast(model) and len(heard) == len(routers)


def test_one_expert_alone(batch):
    model, batch = make("whole"), given(batch)
    free = outputs(model, batch)["image features"]
    with only_expert(model, 2), torch.no_grad():
        alone = model.get_image_features(batch["pixel_values"])
        with slow():
            expected = model.get_image_features(batch["pixel_values"])
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)
    assert (alone - free).abs().max() > 1e-2


def test_the_environment_switches_it_off_and_half_precision_on(batch, monkeypatch):
    x = given(batch)["pixel_values"]
    monkeypatch.setenv(FAST, "0")
    assert kernels_for(x.bfloat16()) is None
    monkeypatch.delenv(FAST)
    assert kernels_for(x) is None
    assert kernels_for(x.bfloat16()) is fast_clipmoe
    with torch.autocast(DEVICE, torch.bfloat16):
        assert working_dtype(x) == torch.bfloat16 and kernels_for(x) is fast_clipmoe


def test_kernels_that_are_wrong_here_are_not_used_and_one_line_says_so(batch, monkeypatch, caplog):
    monkeypatch.setattr(fast_clipmoe, "check", lambda *_: "the router is off by 3e-1")
    monkeypatch.setattr(fast_clipmoe, "runs_on", functools.cache(fast_clipmoe.runs_on.__wrapped__))
    model = make("whole", torch.bfloat16)
    found = outputs(model, given(batch, torch.bfloat16))
    with slow():
        assert_alike(found, outputs(model, given(batch, torch.bfloat16)), 0)
    assert not any(m.prepared for m in model.modules() if isinstance(m, CLIPMoEEncoder))
    assert [record.message for record in caplog.records].count(
        "llava-clipmoe: the GPU kernels are not used, the slower loop is: the router is off by 3e-1"
    ) == 1


def test_a_replaced_layer_is_named_and_runs_itself(batch, caplog):
    class Linear8bit(torch.nn.Linear):
        pass

    model = make("dense", torch.bfloat16)
    attention = model.vision_model.encoder.layers[1].self_attn
    attention.v_proj.__class__ = Linear8bit
    model.get_image_features(given(batch, torch.bfloat16)["pixel_values"])  # with gradients: another way, no line
    assert not caplog.records
    outputs(model, given(batch, torch.bfloat16))
    assert "layers.1.self_attn.v_proj is a Linear8bit" in caplog.text
    assert len(caplog.records) == 1


# ------------------------------------------------------------------------------------------------------------- training


def gradients(model: CLIPMoEModel, batch: dict, trainable) -> dict[str, torch.Tensor]:
    model.train().zero_grad(set_to_none=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable(name))
    model(**batch, return_loss=True).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


TRAININGS = {
    "router": lambda name: "router" in name,
    "router and gate": lambda name: "router" in name or "fusion_gate" in name,
    "ffn": lambda name: ".mlp." in name,
    "all": lambda name: True,
    "attention": lambda name: "self_attn" in name,
}


@pytest.mark.parametrize(
    ("kind", "training"),
    [("whole", "router"), ("delta", "router"), ("gate", "router and gate"), ("dense", "ffn"), ("dense", "all"),
     ("whole", "all"), ("whole", "attention"), ("delta", "attention")],
)  # fmt: skip
def test_gradients_are_those_of_the_modules(batch, monkeypatch, kind, training):
    model, batch = make(kind), given(batch)
    model._set_gradient_checkpointing(training == "router")
    asked = []
    for can in ("can_mix", "can_feed"):
        answer = getattr(fast_clipmoe, can)
        monkeypatch.setattr(fast_clipmoe, can, lambda module, answer=answer: asked.append(answer(module)) or asked[-1])
    found = gradients(model, batch, TRAININGS[training])
    assert any(asked) == ((kind, training) != ("whole", "all"))  # experts that are trained themselves: the modules
    with slow():
        expected = gradients(model, batch, TRAININGS[training])
    assert_alike(found, expected, 1e-4)


@pytest.mark.parametrize("kind", ["whole", "gate", "dense"])
def test_gradients_under_autocast(batch, kind):
    model, batch = make(kind), given(batch)
    training = {"whole": "router", "gate": "router and gate", "dense": "ffn"}[kind]
    with torch.autocast(DEVICE, torch.bfloat16):
        found = gradients(model, batch, TRAININGS[training])
        with slow():
            expected = gradients(model, batch, TRAININGS[training])
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        a, b = found[name].flatten().float(), gradient.flatten().float()
        assert found[name].dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.98, name


def test_jitter_reaches_the_router_alone(batch):
    model, batch = make("whole", router_jitter_noise=0.3), given(batch)

    def drawn(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return gradients(model, batch, TRAININGS["router"])

    found, other = drawn(0), drawn(1)
    assert any((found[name] - other[name]).norm() > 0.01 * found[name].norm() for name in found)
    with slow():
        assert_alike(found, drawn(0), 1e-3)


def test_dropout_goes_through_the_modules(batch):
    model = make("whole", expert_dropout=0.5).train().requires_grad_(False)
    block = next(m for m in model.modules() if isinstance(m, CLIPMoESparseMLP))
    assert not fast_clipmoe.can_mix(block)
    assert fast_clipmoe.can_mix(block.eval())


# ---------------------------------------------------------------------------------------------------------- CUDA graphs


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_of_several_sizes(kind):
    model = make(kind, torch.float16)
    encoder = model.vision_model.encoder
    for turn in range(4):
        for size in (1, 4, 9):
            generator = torch.Generator().manual_seed(10 * turn + size)
            pixels = torch.randn(size, 3, 24, 24, generator=generator).to(DEVICE, torch.float16)
            with torch.no_grad():
                found = model.vision_model(pixels)
                with slow():
                    expected = model.vision_model(pixels)
            error = (found.last_hidden_state - expected.last_hidden_state).abs().max()
            assert error <= 1e-2 * expected.last_hidden_state.abs().max()
            for a, b in zip(found.router_logits, expected.router_logits, strict=True):
                torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)
    assert len(encoder.prepared.graphs.graphs) == 3 and not encoder.prepared.graphs.refused


@needs_gpu
def test_a_graph_forgets_old_weights():
    model, pixels = make("delta", torch.float16), torch.randn(1, 3, 24, 24, device=DEVICE, dtype=torch.float16)
    with torch.no_grad():
        for _ in range(3):
            before = model.vision_model(pixels).last_hidden_state
        for parameter in model.vision_model.encoder.parameters():
            parameter.mul_(0.5)
        after = model.vision_model(pixels).last_hidden_state
        with slow():
            expected = model.vision_model(pixels).last_hidden_state
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(after, expected, atol=1e-2, rtol=1e-2)


@needs_gpu
def test_threads_share_graphs():
    model = make("whole", torch.float16)
    pictures = [torch.randn(1, 3, 24, 24, device=DEVICE, dtype=torch.float16) for _ in range(4)]
    with torch.no_grad(), slow():
        expected = [model.vision_model(p).last_hidden_state for p in pictures]
    wrong = []

    def ask(number: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                found = model.vision_model(pictures[number]).last_hidden_state
                if (found - expected[number]).abs().max() > 1e-2 * expected[number].abs().max():
                    wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -------------------------------------------------------------------------------------------------------- LLaVA's tower


def test_the_tower_that_llava_gets(tmp_path):
    from tiny.llavas import make_towers

    from llava_clipmoe.vision_tower import CLIPMoEVisionTower, CLIPMoEVisionTowerS2

    directory = make_towers(tmp_path)[0]
    arguments = SimpleNamespace(mm_vision_select_layer=-2, s2_scales=[24, 48])
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    for kind, images in ((CLIPMoEVisionTower, pixels[..., :24, :24]), (CLIPMoEVisionTowerS2, pixels)):
        tower = kind(str(directory), arguments).to(DEVICE)
        for _ in range(3):  # on a GPU the second and third are a graph
            found = tower(images)
        assert tower.vision_tower.vision_model.encoder.prepared.usable()
        with slow():
            torch.testing.assert_close(found, tower(images), atol=1e-4, rtol=1e-4)
