"""CLIP-FMoE: the base's FFN beside the experts, mixed by a gate. Open, the gate gives the base exactly;
shut, the MoE without a gate exactly; and its directory is a tower like any other.

The contracts of towers, directories and transformers' versions are those of the other test files, run here on a
CLIP-FMoE.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import test_model_directory as directory_tests
import test_versions as version_tests
import test_vision_tower as tower_tests
import torch
import torch.nn.functional as F
import transformers
from conftest import make_tiny_config, shake
from tiny.llavas import save_tower

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig, CLIPMoEVisionConfig, active_parameters
from llava_clipmoe.conversion import to_openai_state
from llava_clipmoe.experts_clipmoe import Router
from llava_clipmoe.load import load_bundle
from llava_clipmoe.model_directory import config_dict, save_bundle
from llava_clipmoe.modeling_clipmoe import CLIPMoEModel
from llava_clipmoe.transformer_clipmoe import CLIPMoESparseMLP, FusionGate, only_expert
from llava_clipmoe.upcycling import (
    default_fusion_layers,
    expert_state,
    ffn_state,
    fuse,
    is_expert_or_gate,
    is_router_or_gate,
    moe_config,
    sparse_upcycle,
    upcycle,
)

SOME_BLOCKS = {"vision_model": [1], "text_model": [1]}
"""Of 3 and 2: one that LLaVA's -2 runs, and not the first, so that blocks before it must be left alone."""

needs_grouped_mm = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="grouped_mm is public since torch 2.10")


def set_fusion_gates(model: CLIPMoEModel, value: float) -> None:
    """Set G to `value` for every token, in place: 1 gives the base exactly, 0 the MoE without a gate."""
    logit = torch.tensor(value, dtype=torch.float64).logit().clamp(-200, 200).item()  # sigmoid(-200) is 0 in fp32
    for gate in (module for module in model.modules() if isinstance(module, FusionGate)):
        torch.nn.init.zeros_(gate.weight)
        torch.nn.init.constant_(gate.bias, logit)


def gated_config(base, blocks=None, **experts) -> CLIPMoEConfig:
    return moe_config(
        base.config, blocks, **{"num_experts": 4, "num_experts_per_tok": 2, "fusion_gate": True, **experts}
    )


def decide(model: CLIPMoEModel) -> CLIPMoEModel:
    """Routers and gates that have made up their mind: G differs for each token and dimension, about 0.1 to 0.9."""
    choosers = [module for module in model.modules() if isinstance(module, (Router, FusionGate))]
    for seed, module in enumerate(choosers, start=5):
        shake(module, seed)
    return model


def make_fmoe(base: CLIPMoEModel, blocks=None, **experts) -> CLIPMoEModel:
    """A CLIP-FMoE of `base` and four "trained" experts."""
    trained = [ffn_state(shake(CLIPMoEModel(base.config), seed).state_dict()) for seed in (11, 12, 13, 14)]
    config = gated_config(base, blocks, **experts)
    return decide(fuse(base, trained[: config.num_experts], config))


@pytest.fixture
def fmoe(tiny_dense) -> CLIPMoEModel:
    return make_fmoe(tiny_dense)


def without_gate(fmoe: CLIPMoEModel) -> CLIPMoEModel:
    """The same experts and routers in a CLIP-MoE: no base, no gate."""
    config = moe_config(fmoe.config, fusion_gate=False)
    moe = CLIPMoEModel(config).eval()
    state = {n: t for n, t in fmoe.state_dict().items() if ".mlp.base." not in n and ".mlp.fusion_gate." not in n}
    moe.load_state_dict(state, strict=True)
    return moe


def answers(model: CLIPMoEModel, batch) -> dict[str, torch.Tensor]:
    """Everything that a caller sees, and every hidden state of both towers."""
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    found = {name: getattr(out, name) for name in ("image_embeds", "text_embeds", "logits_per_image")}
    for tower in ("vision_model_output", "text_model_output"):
        found |= {f"{tower} {i}": state for i, state in enumerate(getattr(out, tower).hidden_states)}
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def sparse_blocks(model) -> list[CLIPMoESparseMLP]:
    return [module for module in model.modules() if isinstance(module, CLIPMoESparseMLP)]


# ------------------------------------------------------------------------------------------------------ open and shut


@pytest.mark.parametrize("blocks", [None, SOME_BLOCKS], ids=["all", "some"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_an_open_gate_gives_the_base_exactly(tiny_dense, batch, blocks, training):
    """In training too, where the experts drop out and the frozen base does not."""
    fmoe = make_fmoe(tiny_dense, blocks, expert_dropout=0.5 if training and blocks is None else 0.0).train(training)
    expected = answers(tiny_dense, batch)
    assert not same(answers(fmoe, batch), expected), "the experts have no effect, so this would hold anyway"
    set_fusion_gates(fmoe, 1.0)
    assert same(answers(fmoe, batch), expected)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_shut_gate_gives_the_moe_without_a_gate_exactly(tiny_dense, batch, k):
    fmoe = make_fmoe(tiny_dense, num_experts_per_tok=k)
    moe = without_gate(fmoe)
    assert not same(answers(fmoe, batch), answers(moe, batch)), "the base has no effect, so this would hold anyway"
    set_fusion_gates(fmoe, 0.0)
    assert same(answers(fmoe, batch), answers(moe, batch))


def test_saturation_is_exact_also_where_the_logit_is_only_large(tiny_dense, batch):
    """sigmoid(40) is 1 in fp32; a gate can come to that by training."""
    fmoe = make_fmoe(tiny_dense)
    set_fusion_gates(fmoe, 0.5)
    for block in sparse_blocks(fmoe):
        block.fusion_gate.bias.data.fill_(40.0)
    assert same(answers(fmoe, batch), answers(tiny_dense, batch))


@pytest.mark.parametrize("num_experts", [1, 4])
def test_the_output_is_the_formula(tiny_dense, num_experts):
    """G * FFN_base(x) + (1 - G) * sum_k w_k FFN_k(x), written out token by token."""
    mlp = make_fmoe(tiny_dense, num_experts=num_experts).text_model.encoder.layers[0].mlp
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(3))

    def ffn(weights, token):
        h = weights[0] @ token + weights[1]
        return weights[2] @ (h * torch.sigmoid(1.702 * h)) + weights[3]

    base = [t for layer in (mlp.base.fc1, mlp.base.fc2) for t in (layer.weight, layer.bias)]
    experts = mlp.experts
    expected, gates = torch.zeros_like(x), []
    for b, t in [(b, t) for b in range(2) for t in range(7)]:
        token = x[b, t]
        gate = 1 / (1 + torch.exp(-(mlp.fusion_gate.weight @ token + mlp.fusion_gate.bias)))
        p = torch.softmax(mlp.router.weight @ token, -1)
        chosen = p.argsort(descending=True)[: min(2, num_experts)]
        mixed = sum(
            p[e] / p[chosen].sum()
            * ffn([experts.fc1.weight[e], experts.fc1.bias[e], experts.fc2.weight[e], experts.fc2.bias[e]], token)
            for e in chosen
        )  # fmt: skip
        expected[b, t] = gate * ffn(base, token) + (1 - gate) * mixed
        gates.append(gate)
    y, logits = mlp(x)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    assert logits.shape == (2, 7, num_experts)
    gates = torch.stack(gates)
    assert gates.std(0).mean() > 0.1 and gates.std(1).mean() > 0.1, "the gate differs per token and per dimension"


@pytest.mark.parametrize("start", [0.5, 0.1, 0.97])
def test_a_fresh_gate_starts_at_its_setting_for_every_token(tiny_config, start):
    torch.manual_seed(0)
    model = CLIPMoEModel(tiny_config(num_experts=4, fusion_gate=True, fusion_gate_init=start))
    for block in sparse_blocks(model):
        x = 10 * torch.randn(5, block.fusion_gate.weight.shape[1])
        torch.testing.assert_close(block.fusion_gate(x), torch.full_like(x, start), atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_the_gate_computes_in_fp32(fmoe, how):
    """In bf16 the largest number below 1 is 0.996: this gate, at 0.9995, would be open, and its gradient gone."""
    block = fmoe.vision_model.encoder.layers[0].mlp
    set_fusion_gates(fmoe, 0.9995)
    x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(1))
    if how == "bf16":
        block, x = block.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        gate, (y, _) = block.fusion_gate(x), block(x)
        base, _ = block.base(x)
    assert gate.dtype == torch.float32 and ((gate < 0.9998) & (gate > 0.999)).all()
    assert y.dtype == base.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert block.fusion_gate.bias.grad.abs().min() > 0


def test_a_gates_logits_are_not_rounded_on_the_way(fmoe):
    """Rounding the product and not only the sigmoid would show too: compared with float64, from the same bf16 input."""
    gate = fmoe.vision_model.encoder.layers[0].mlp.fusion_gate.bfloat16()
    x = torch.randn(50, 48, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected = (x.double() @ gate.weight.double().T + gate.bias.double()).sigmoid()
    with torch.autocast("cpu", torch.bfloat16):
        assert (gate(x) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_open_and_shut_are_exact_in_bf16_too(fmoe, tiny_dense, batch, value):
    expected = tiny_dense if value == 1.0 else without_gate(fmoe)
    set_fusion_gates(fmoe, value)
    pictures = batch | {"pixel_values": batch["pixel_values"].bfloat16()}
    assert same(answers(fmoe.bfloat16(), pictures), answers(expected.bfloat16(), pictures))


# ----------------------------------------------------------------------------------------------------------- training


def train_only(model: CLIPMoEModel, trainable) -> set[str]:
    """-> names of the parameters that `trainable` leaves with a gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable(name))
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def with_gradient(model: CLIPMoEModel) -> set[str]:
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_stage_2_trains_routers_and_gates_and_nothing_else(tiny_dense, batch, checkpointing):
    fmoe = make_fmoe(tiny_dense, SOME_BLOCKS).train()
    if checkpointing:
        fmoe.gradient_checkpointing_enable()
    chosen = train_only(fmoe, is_router_or_gate)
    assert chosen == {
        f"{tower}.encoder.layers.1.mlp.{name}"
        for tower in ("vision_model", "text_model")
        for name in ("router.weight", "fusion_gate.weight", "fusion_gate.bias")
    }
    before = {name: p.detach().clone() for name, p in fmoe.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in fmoe.parameters() if p.requires_grad], lr=0.01)
    fmoe(**batch, return_loss=True).loss.backward()
    assert with_gradient(fmoe) == chosen
    assert {name for name, p in fmoe.named_parameters() if p.grad is not None} == chosen
    optimizer.step()
    assert {name for name, p in fmoe.named_parameters() if not torch.equal(p, before[name])} == chosen


def test_a_fresh_gate_learns_though_its_weights_are_zero(tiny_dense, stages, batch):
    fmoe = fuse(tiny_dense, stages, gated_config(tiny_dense, num_experts=3)).train()
    chosen = train_only(fmoe, is_router_or_gate)
    fmoe(**batch, return_loss=True).loss.backward()
    assert with_gradient(fmoe) == chosen


def test_the_balance_loss_sees_the_routers_behind_the_gate(fmoe, batch):
    """The same router logits as without a gate (in the first block, whose input is the same), and the same loss."""
    with torch.no_grad():
        out = fmoe(**batch, return_loss=True, output_router_logits=True)
        set_fusion_gates(fmoe, 0.0)
        shut = fmoe(**batch, return_loss=True, output_router_logits=True)
        moe = without_gate(fmoe)(**batch, return_loss=True, output_router_logits=True)
    assert [x.shape[-1] for x in out.router_logits] == [4] * 5 and out.router_logits[0].dtype == torch.float32
    assert torch.equal(out.router_logits[0], moe.router_logits[0])
    assert torch.equal(shut.aux_loss, moe.aux_loss) and out.aux_loss > 0


def test_the_balance_loss_moves_routers_and_not_gates_of_the_last_block(tiny_dense, batch):
    """A gate of the last block comes after every router, so the balance loss alone cannot reach it."""
    fmoe = make_fmoe(tiny_dense, {"vision_model": [2], "text_model": [1]}).train()
    train_only(fmoe, is_router_or_gate)
    fmoe(**batch, return_loss=True).aux_loss.backward()
    assert with_gradient(fmoe) == {
        "vision_model.encoder.layers.2.mlp.router.weight", "text_model.encoder.layers.1.mlp.router.weight"
    }  # fmt: skip


# ----------------------------------------------------------------------------------------- one expert beside the base


def test_one_expert_beside_the_base_is_not_dense(tiny_dense, tiny_config):
    config = gated_config(tiny_dense, SOME_BLOCKS, num_experts=1)
    assert not config.is_dense and config.num_experts_per_tok == 1
    assert (config.vision_config.moe_layers, config.text_config.moe_layers) == ([1], [1])
    assert gated_config(tiny_dense, num_experts=1).vision_config.moe_layers == [0, 1, 2]
    assert tiny_config(num_experts=1).is_dense


def test_stage_1_starts_as_the_base_and_trains_the_expert_and_the_gate(tiny_dense, batch):
    copies = [ffn_state(tiny_dense.state_dict())]
    stage = fuse(tiny_dense, copies, gated_config(tiny_dense, SOME_BLOCKS, num_experts=1)).train()
    with torch.no_grad():
        torch.testing.assert_close(stage(**batch).image_embeds, tiny_dense(**batch).image_embeds, atol=1e-6, rtol=1e-5)
    chosen = train_only(stage, is_expert_or_gate)
    assert {name.split(".mlp.")[1].split(".")[0] for name in chosen} == {"experts", "fusion_gate"}
    optimizer = torch.optim.SGD([p for p in stage.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # in the first step base and expert agree, so that a gate between them has no gradient
        optimizer.zero_grad()
        stage(**batch, return_loss=True).loss.backward()
        optimizer.step()
    assert with_gradient(stage) == chosen


def test_the_router_of_one_expert_is_trivial(tiny_dense, batch):
    stage = make_fmoe(tiny_dense, num_experts=1).train()
    out = stage(**batch, return_loss=True, output_router_logits=True)
    out.loss.backward()
    for block in sparse_blocks(stage):
        weights = block.router(torch.randn(6, block.router.weight.shape[1]))[1]
        assert (weights == 1).all() and not block.router.weight.grad.any()
    assert len(out.router_logits) == 5
    alone = stage.eval()
    with torch.no_grad():
        free = alone(**batch).image_embeds
        with only_expert(alone, 0):
            torch.testing.assert_close(alone(**batch).image_embeds, free, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("expert", range(4))
def test_only_expert_is_that_experts_stage_gate_included(fmoe, tiny_dense, batch, expert):
    """The model of one expert of a CLIP-FMoE is that expert and the base behind the gate, as in its stage."""
    stage = fuse(tiny_dense, [expert_state(fmoe.state_dict(), expert)], gated_config(tiny_dense, num_experts=1))
    gates = {name: t for name, t in fmoe.state_dict().items() if ".mlp.fusion_gate." in name}
    stage.load_state_dict({**stage.state_dict(), **gates})
    free = answers(fmoe, batch)
    with only_expert(fmoe, expert):
        alone = answers(fmoe, batch)
        set_fusion_gates(fmoe, 1.0)
        assert same(answers(fmoe, batch), answers(tiny_dense, batch))  # the gate is at work
    for name, expected in answers(stage, batch).items():
        torch.testing.assert_close(alone[name], expected, atol=1e-4, rtol=1e-4)
    assert (alone["image_embeds"] - free["image_embeds"]).abs().max() > 1e-2, "the selection had no effect"


# ---------------------------------------------------------------------------------------------------- put together


def test_everything_is_where_it_belongs(tiny_dense, stages):
    dense = tiny_dense.state_dict()
    fmoe = fuse(tiny_dense, stages, gated_config(tiny_dense, SOME_BLOCKS, num_experts=3)).state_dict()
    for name, tensor in dense.items():
        if ".layers.1.mlp." in name:
            assert torch.equal(fmoe[name.replace(".mlp.", ".mlp.base.")], tensor)
            for expert, stage in enumerate(stages):
                assert torch.equal(fmoe[name.replace(".mlp.", ".mlp.experts.")][expert], stage[name])
        else:
            assert torch.equal(fmoe[name], tensor), name
    fresh = {name for name in fmoe if is_router_or_gate(name)}
    assert len(fmoe) == len(dense) + 2 * 4 + len(fresh) and len(fresh) == 2 * 3
    assert fmoe["text_model.encoder.layers.1.mlp.fusion_gate.weight"].shape == (32, 32)
    for expert, stage in enumerate(stages):
        back = expert_state(fmoe, expert)
        assert back.keys() == {name for name in stage if ".layers.1." in name}
        assert all(torch.equal(back[name], stage[name]) for name in back)


def test_fusing_shares_nothing_keeps_the_dtype_and_follows_the_seed(tiny_dense, stages):
    before = {name: t.clone() for name, t in tiny_dense.bfloat16().state_dict().items()}
    config = gated_config(tiny_dense, num_experts=3)
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    one, two, other = (fuse(tiny_dense, stages, config, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.rand(2), expected), "the caller's random state was touched"
    routers = [torch.cat([r.weight.flatten() for r in m.modules() if isinstance(r, Router)]) for m in (one, two, other)]
    assert torch.equal(routers[0], routers[1]) and not torch.equal(routers[0], routers[2])
    assert {p.dtype for p in one.parameters()} == {torch.bfloat16} and not one.training
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert all(torch.equal(t, before[name]) for name, t in tiny_dense.state_dict().items())


def test_what_cannot_be_fused_is_refused(tiny_dense, stages):
    config = gated_config(tiny_dense, num_experts=3)
    with pytest.raises(ValueError, match="num_experts is 3, but 2 experts were given"):
        fuse(tiny_dense, stages[:2], config)
    with pytest.raises(ValueError, match=r"needs fusion_gate=True.*use upcycle"):
        fuse(tiny_dense, stages, moe_config(tiny_dense.config, num_experts=3))
    for wrong in (lambda: upcycle(tiny_dense, stages[:2], config), lambda: sparse_upcycle(tiny_dense, config)):
        with pytest.raises(ValueError, match=r"fusion_gate on.*use fuse\(\)"):
            wrong()
    other = {**stages[1], "vision_model.encoder.layers.1.mlp.fc1.weight": torch.zeros(128, 48)}
    with pytest.raises(ValueError, match=r"expert 1 has .*\[128, 48\], the base has \[64, 48\]"):
        fuse(tiny_dense, [stages[0], other, stages[2]], config)
    partial = {name: t for name, t in stages[0].items() if ".layers.1." in name}
    with pytest.raises(ValueError, match=r"expert 0 has no whole FFN for block\(s\) \[0, 2\] of the vision_model"):
        fuse(tiny_dense, [partial, *stages[1:]], config)
    fuse(tiny_dense, [partial, *stages[1:]], gated_config(tiny_dense, SOME_BLOCKS, num_experts=3))
    with pytest.raises(ValueError, match="no expert 3: this state dict has 3 experts"):
        expert_state(fuse(tiny_dense, stages, config).state_dict(), 3)
    with pytest.raises(ValueError, match="no expert 0: this state dict has 0 experts"):
        expert_state(tiny_dense.state_dict())


def test_the_default_placement():
    """The last block of an even number is none of them: LLaVA does not run it."""
    assert default_fusion_layers(24) == [12, 14, 16, 18, 20, 22] and default_fusion_layers(12) == [6, 8, 10]
    assert [default_fusion_layers(n) for n in (1, 3, 4, 5, 6)] == [[0], [2], [2], [2, 4], [4]]
    for none in (2, 0):
        with pytest.raises(ValueError, match=f"a tower of {none} blocks has no odd block in its second half"):
            default_fusion_layers(none)


# ------------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize("start", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_gate_cannot_start_open_or_shut(tiny_config, start):
    with pytest.raises(ValueError, match=r"fusion_gate_init must lie between 0 and 1.*no gradient"):
        tiny_config(num_experts=4, fusion_gate=True, fusion_gate_init=start)


def test_a_gate_without_moe_blocks_is_refused(tiny_dense):
    with pytest.raises(ValueError, match=r"fusion_gate is on, but moe_layers is empty in both towers"):
        gated_config(tiny_dense, {"vision_model": [], "text_model": []})
    gated_config(tiny_dense, {"vision_model": [1], "text_model": []})  # one tower is enough


def test_a_configuration_from_before_the_gate_has_none(tiny_moe, tmp_path):
    content = config_dict(tiny_moe.config)
    for part in (content, content["vision_config"], content["text_config"]):
        assert part.pop("fusion_gate") is False and part.pop("fusion_gate_init") == 0.5
    config = CLIPMoEConfig.from_dict(content)
    assert not config.fusion_gate and not config.vision_config.fusion_gate and not config.text_config.fusion_gate
    assert not any("fusion_gate" in name or ".base." in name for name in CLIPMoEModel(config).state_dict())
    assert CLIPMoEVisionConfig().fusion_gate is False


@pytest.mark.parametrize("num_experts", [1, 4])
@pytest.mark.parametrize("blocks", [None, SOME_BLOCKS, {"vision_model": [2], "text_model": []}])
def test_counted_parameters_are_the_models(tiny_dense, blocks, num_experts):
    config = gated_config(tiny_dense, blocks, num_experts=num_experts)
    model = CLIPMoEModel(config)
    counts = active_parameters(config)
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    unused = 0
    for mlp in sparse_blocks(model):
        one = sum(p[0].numel() for p in mlp.experts.parameters())
        unused += (num_experts - min(2, num_experts)) * one
    assert counts["active"] == counts["total"] - unused


# -------------------------------------------------------------------------------------------------- expert backends


@needs_grouped_mm
@pytest.mark.parametrize("num_experts", [1, 4])
def test_both_backends_agree_behind_the_gate_forward_and_backward(tiny_dense, batch, num_experts):
    found = []
    for implementation in ("loop", "grouped_mm"):
        model = make_fmoe(tiny_dense, num_experts=num_experts, experts_implementation=implementation).train()
        assert sparse_blocks(model)[0].experts.implementation == implementation
        out = model(**batch, return_loss=True)
        out.loss.backward()
        found.append({"image_embeds": out.image_embeds} | {name: p.grad for name, p in model.named_parameters()})
    for name, expected in found[0].items():
        off = (found[1][name] - expected).abs().max() / expected.abs().max().clamp_min(1e-9)
        assert off < 1e-4 or (num_experts == 1 and ".router." in name), (name, off)  # that gradient is 0


# ----------------------------------------------------------------------------------- a directory and a tower like any


dense, tiny_tokenizer = directory_tests.dense, directory_tests.tiny_tokenizer
no_registrations, pixels = tower_tests.no_registrations, tower_tests.pixels


@pytest.fixture
def other_python() -> str:
    """The interpreter with LLaVA's pinned versions, where this one has the current ones."""
    if not version_tests.PINNED or int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("LLAVA_CLIPMOE_PINNED_PYTHON names no other interpreter; `make test` does")
    return version_tests.PINNED


@pytest.fixture
def moe(fmoe, tiny_tokenizer) -> ClipBundle:
    """What test_model_directory.py calls `moe`: here a CLIP-FMoE."""
    return ClipBundle(fmoe, tiny_tokenizer, directory_tests.MEAN, directory_tests.STD, "tiny")


@pytest.fixture(scope="module")
def clip_moe(tmp_path_factory) -> Path:
    """What test_vision_tower.py calls `clip_moe`: here a CLIP-FMoE's directory, with experts in its middle block."""
    base = shake(CLIPMoEModel(make_tiny_config()), seed=1).eval()
    return save_tower(make_fmoe(base, SOME_BLOCKS), tmp_path_factory.mktemp("towers") / "clip-fmoe")


TOWER_TESTS = {
    name: test
    for name, test in vars(tower_tests).items()
    if name.startswith("test_") and "clip_moe" in inspect.signature(test).parameters
}
DIRECTORY_TESTS = {
    name: getattr(directory_tests, name)
    for name in (
        "test_saving_and_loading_changes_nothing",
        "test_large_models_are_sharded",
        "test_a_stranger_loads_the_directory_with_trust_remote_code",
        "test_the_other_transformers_version_reads_and_writes_the_same_bytes",
    )
}
globals().update(TOWER_TESTS | DIRECTORY_TESTS)  # collected here, they take this file's fixtures


def test_the_tower_tests_run_on_a_clip_fmoe(clip_moe):
    assert len(TOWER_TESTS) >= 20
    bundle = load_bundle(clip_moe)
    assert bundle.model.config.fusion_gate and len(sparse_blocks(bundle.model)) == 2
    tower = tower_tests.tower_of(clip_moe)
    gates = [module for module in tower.modules() if isinstance(module, FusionGate)]
    assert len(gates) == 1 and gates[0].bias.abs().max() > 0.01


@pytest.mark.parametrize(
    ("num_experts", "says"), [(1, "1 expert beside an FFN, 1 per"), (4, "4 experts beside an FFN, 2 per")]
)
def test_the_card_says_what_it_is(tmp_path, tiny_dense, tiny_tokenizer, num_experts, says):
    model = make_fmoe(tiny_dense, SOME_BLOCKS, num_experts=num_experts)
    save_bundle(ClipBundle(model, tiny_tokenizer), tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    for words in ("A CLIP-FMoE at 24 px", says, "mixed with it by a fusion gate", "1 of 3 image blocks"):
        assert words in card
    again = load_bundle(tmp_path / "model").model
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in again.state_dict().items())


def test_the_official_layout_has_no_place_for_it(tiny_dense, tiny_tokenizer):
    with pytest.raises(ValueError, match=r"cannot hold this model: .*vision_config: a CLIP-FMoE.*fusion gate"):
        to_openai_state(ClipBundle(make_fmoe(tiny_dense), tiny_tokenizer))
