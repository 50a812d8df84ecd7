"""Counted operations: those that torch counts, and what a whole run adds up to."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava_clipmoe.modeling_clipmoe import CLIPMoEModel
from llava_clipmoe.upcycling import is_expert_or_gate, is_ffn, is_router_or_gate
from train_encoder.compare_flops import (
    CaptionTokens,
    Training,
    caption_tokens,
    pair_macs,
    run_flops,
    tower_macs,
    vision_macs,
)
from train_encoder.config import OptimConfig

LOOP = {"experts_implementation": "loop"}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, **LOOP}
FMOE = {"num_experts": 3, "num_experts_per_tok": 2, "fusion_gate": True, **LOOP}
BESIDE = {"num_experts": 1, "num_experts_per_tok": 1, "fusion_gate": True, **LOOP}
CASES = {
    "all of a dense CLIP": ({}, lambda name: True),
    "its FFNs": ({}, is_ffn),
    "FFNs of the upper blocks": ({}, lambda name: is_ffn(name) and ".layers.0." not in name),
    "nothing of the text tower": ({}, lambda name: is_ffn(name) and name.startswith("vision_model")),
    "the routers of an MoE": (MOE, is_router_or_gate),
    "an MoE": (MOE, lambda name: ".router." in name or ".experts." in name),
    "routers and gates of an FMoE": (FMOE, is_router_or_gate),
    "an expert beside its base": (BESIDE, is_expert_or_gate),
}
TOKENS = 12


def plain_attention():
    """As matrix products: what torch counts of its fused kernels is another thing in each version and on each CPU."""
    return sdpa_kernel(SDPBackend.MATH)


def counted(model: CLIPMoEModel) -> tuple[int, int]:
    """(forward, backward) operations of two pairs, by torch, as a training step runs the towers."""
    towers = (model.config.vision_config, model.config.text_config)
    pooled = [tower.num_hidden_layers - 1 not in tower.moe_layers for tower in towers]
    ids = torch.randint(1, 90, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = model.config.text_config.eos_token_id
    with plain_attention(), FlopCounterMode(display=False) as counter:
        image = model.visual_projection(
            model.vision_model(torch.zeros(2, 3, 24, 24), pooled_only=pooled[0]).pooler_output
        )
        text = model.text_projection(model.text_model(ids, pooled_only=pooled[1]).pooler_output)
        forward = counter.get_total_flops()
        (image * text).sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("case", CASES)
def test_a_step_costs_what_torch_counts(case):
    experts, learns = CASES[case]
    model = CLIPMoEModel(make_tiny_config(**experts))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns(name))
    forward, backward = pair_macs(Training(model.config, learns, OptimConfig()), [TOKENS])
    seen = counted(model)
    assert 4 * forward == pytest.approx(seen[0], rel=0.001)
    assert 4 * backward == pytest.approx(seen[1], rel=0.03)


def test_low_rank_changes_cost_what_torch_counts():
    peft = pytest.importorskip("peft")
    model = CLIPMoEModel(make_tiny_config())
    targets = [
        name.removesuffix(".weight") for name, _ in model.named_parameters() if is_ffn(name) and "weight" in name
    ]
    peft.LoraModel(model, peft.LoraConfig(r=8, target_modules=targets), "default")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    forward, backward = pair_macs(Training(model.config, is_ffn, OptimConfig(), rank=8), [TOKENS])
    seen = counted(model)
    assert 4 * forward == pytest.approx(seen[0], rel=0.001)
    assert 4 * backward == pytest.approx(seen[1], rel=0.03)


@pytest.mark.parametrize("experts", [{}, MOE, FMOE], ids=["dense", "moe", "fmoe"])
def test_inference_costs_what_torch_counts(experts):
    config = make_tiny_config(**experts)
    model = CLIPMoEModel(config).eval()
    with plain_attention(), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.vision_model(torch.zeros(1, 3, 24, 24))
    assert vision_macs(config) == pytest.approx(counter.get_total_flops() / 2, rel=0.001)


def settings(method: str, **optim) -> SimpleNamespace:
    one = replace(OptimConfig(global_batch_size=4), **optim)
    engine = SimpleNamespace(chunk_size=None, activation_checkpointing=False)
    finetune = SimpleNamespace(parts="ffn", optim=one)
    return SimpleNamespace(
        method=method, finetune=finetune, moe=SimpleNamespace(optim=one, num_experts=3), engine=engine
    )


def test_a_run_adds_up_its_steps_its_features_and_what_is_run_again():
    base, tokens = make_tiny_config(), CaptionTokens(12, 6, 9)
    run = settings("finetune")
    forward, backward = pair_macs(Training(base, is_ffn, None), [12])
    features = pair_macs(Training(base, lambda name: False, None), [9])[0]
    total = run_flops(run, base, base, {"finetune": 5}, 100, 100, tokens)
    assert total == pytest.approx(2 * (5 * 4 * (forward + backward) + 100 * features))
    captions = tower_macs(base, "text_model", 9, pooled_only=True)[0]
    assert run_flops(run, base, base, {"finetune": 5}, 100, 0, tokens) == pytest.approx(total - 2 * 100 * captions)
    run.engine.chunk_size = 2  # gradient caching: features first without a graph
    assert run_flops(run, base, base, {"finetune": 5}, 100, 100, tokens) == pytest.approx(total + 2 * 5 * 4 * forward)
    two = settings("finetune", loss="multi-positive")
    assert run_flops(two, base, base, {"finetune": 5}, 0, 0, tokens) > run_flops(
        settings("finetune"), base, base, {"finetune": 5}, 0, 0, tokens
    )


def test_a_method_that_is_not_known_is_refused_and_the_base_alone_costs_nothing():
    base, tokens = make_tiny_config(), CaptionTokens(12, 6, 9)
    assert run_flops(settings("base"), base, base, {}, 0, 0, tokens) == 0
    with pytest.raises(ValueError, match="'alchemy' are not counted"):
        run_flops(settings("alchemy"), base, base, {}, 0, 0, tokens)


class Words:
    """A tokenizer that makes a token of every word."""

    def __call__(self, texts, truncation, max_length):
        return {"input_ids": [[7] * min(len(text.split()), max_length) for text in texts]}


def test_captions_are_measured_as_they_are_padded(tmp_path):
    file = tmp_path / "data.csv"
    long = "".join(f"{i}.png,one two. three four five\n" for i in range(3))
    file.write_text(f"image,caption\n{long}3.png,one two\n")
    found = caption_tokens({"source": str(file), "caption_columns": []}, Words(), 20, batch=4)
    assert (found.padded, found.short, found.alone) == (5, 2, (3 * 5 + 2) / 4) and found.measured
    gone = caption_tokens({"source": str(tmp_path / "gone.csv")}, Words(), 20, batch=4)
    assert gone == CaptionTokens(20, 20, 20, measured=False)
