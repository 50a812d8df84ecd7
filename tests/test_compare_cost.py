"""Counted operations: those of a real step, whatever the lengths, and what a whole run adds up to."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
import torch
from conftest import make_tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava_clipmoe.modeling_clipmoe import CLIPMoEModel
from llava_clipmoe.upcycling import is_expert_or_gate, is_ffn, is_router_or_gate, moe_config
from train_encoder.compare import cost
from train_encoder.compare.cost import CaptionTokens, caption_tokens, pair_macs, run_flops, vision_macs
from train_encoder.config import LoraConfig, OptimConfig
from train_encoder.methods import METHODS
from train_encoder.methods.base import Training
from train_encoder.recipes import RECIPES

LOOP = {"experts_implementation": "loop"}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, **LOOP}
FMOE = {"num_experts": 3, "num_experts_per_tok": 2, "fusion_gate": True, **LOOP}
BESIDE = {"num_experts": 1, "num_experts_per_tok": 1, "fusion_gate": True, **LOOP}
CASES = {
    "nothing of the text tower": ({}, lambda name: is_ffn(name) and name.startswith("vision_model"), 0),
    "low-rank changes of the FFNs": ({}, is_ffn, 8),
    "an MoE": (MOE, lambda name: ".router." in name or ".experts." in name, 0),
    "routers and gates of an FMoE": (FMOE, is_router_or_gate, 0),
    "an expert beside its base": (BESIDE, is_expert_or_gate, 0),
}
TOKENS = 12


def counted(model: CLIPMoEModel) -> tuple[int, int]:
    """(forward, backward) operations of two real pairs as a training step runs the towers, routing included."""
    towers = (model.config.vision_config, model.config.text_config)
    pooled = [tower.num_hidden_layers - 1 not in tower.moe_layers for tower in towers]
    ids = torch.randint(1, 90, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = model.config.text_config.eos_token_id
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        image = model.visual_projection(
            model.vision_model(torch.zeros(2, 3, 24, 24), pooled_only=pooled[0]).pooler_output
        )
        text = model.text_projection(model.text_model(ids, pooled_only=pooled[1]).pooler_output)
        forward = counter.get_total_flops()
        (image * text).sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("case", CASES)
def test_a_step_costs_what_a_real_one_does(case):
    experts, trainable, rank = CASES[case]
    model = CLIPMoEModel(make_tiny_config(**experts))
    names = [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable(name))
    if rank:
        targets = [name.removesuffix(".weight") for name in names if trainable(name) and name.endswith("weight")]
        peft.LoraModel(model, peft.LoraConfig(r=rank, target_modules=targets), "default")
    lora = LoraConfig(rank=rank) if rank else None
    found = pair_macs(Training(make_tiny_config(**experts), trainable, OptimConfig(), lora), [TOKENS])
    assert [4 * macs for macs in found] == pytest.approx(counted(model), rel=1e-9)


def test_a_dense_pair_costs_what_its_shapes_say():
    config = make_tiny_config()
    v, t = config.vision_config, config.text_config
    n, c = v.num_patches + 1, 9.5

    def tower(tokens: float, d: int, h: int, layers: int) -> float:
        """All blocks whole but the last, of which the pooled token alone goes on from keys and values of all."""
        whole = tokens * (4 * d * d + 2 * d * h + 2 * tokens * d)
        return (layers - 1) * whole + 2 * tokens * d * d + 2 * d * d + 2 * d * h + 2 * tokens * d

    expected = tower(n, v.hidden_size, v.intermediate_size, v.num_hidden_layers)
    expected += v.num_patches * v.num_channels * v.patch_size**2 * v.hidden_size
    expected += tower(c, t.hidden_size, t.intermediate_size, t.num_hidden_layers)
    expected += (v.hidden_size + t.hidden_size) * config.projection_dim
    assert pair_macs(Training(config, lambda name: False, OptimConfig()), [c]) == (pytest.approx(expected), 0)


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("base", []),
        ("dmu", ["stage1", "stage2", "stage3", "router"]),
        ("dmu-lora", ["stage1", "stage2", "stage3", "router"]),
        ("fmoe", ["expert0", "expert1", "expert2", "expert3", "router"]),
        ("sparse-upcycling", ["router"]),
        ("direct-ft", ["finetune"]),
    ],
)
def test_a_method_names_its_trainings_as_its_runs_log_them(recipe, names):
    config, base = RECIPES[f"{recipe}-openmoji"][1], make_tiny_config()
    result = moe_config(base, {"vision_model": [1], "text_model": [1]}, num_experts=4, fusion_gate=recipe == "fmoe")
    trainings = METHODS[config.method].trainings(config, base, result)
    assert list(trainings) == names
    assert all((training.lora is not None) == (recipe == "dmu-lora" and name != "router")
               for name, training in trainings.items())  # fmt: skip
    if "stage1" in trainings:
        ffn = "vision_model.encoder.layers.{}.mlp.fc1.weight"
        assert [trainings["stage1"].trainable(ffn.format(block)) for block in (0, 1)] == [False, True]


@pytest.mark.parametrize("experts", [{}, MOE, FMOE], ids=["dense", "moe", "fmoe"])
def test_inference_costs_what_torch_counts(experts):
    config = make_tiny_config(**experts)
    model = CLIPMoEModel(config).eval()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.vision_model(torch.zeros(1, 3, 24, 24))
    assert vision_macs(config.vision_config) == counter.get_total_flops() / 2


def test_a_run_adds_up_its_steps_its_features_and_what_is_run_again():
    base, tokens = make_tiny_config(), CaptionTokens(12, 6, 9)
    engine = SimpleNamespace(chunk_size=None, activation_checkpointing=False)
    training = Training(base, is_ffn, OptimConfig(global_batch_size=4))
    forward, backward = pair_macs(training, [12])
    image, pair = (pair_macs(replace(training, trainable=lambda name: False), captions)[0] for captions in ([], [9]))

    def flops(encoded: int, captions: int, one: Training = training) -> float:
        return run_flops({"finetune": one}, engine, base, {"finetune": 5}, encoded, captions, tokens)

    total = flops(100, 100)
    assert total == pytest.approx(2 * (5 * 4 * (forward + backward) + 100 * pair))
    assert flops(100, 0) == pytest.approx(total - 2 * 100 * (pair - image))
    two = replace(training, optim=replace(training.optim, loss="multi-positive"))
    assert flops(0, 0, two) == pytest.approx(2 * 5 * 4 * sum(pair_macs(training, [12, 6])))
    engine.chunk_size = 2  # gradient caching: features first without a graph
    assert flops(100, 100) == pytest.approx(total + 2 * 5 * 4 * forward)


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


def test_two_threads_that_count_leave_attention_as_it_was():
    """A comparison counts in as many threads as it has jobs; which attention runs is a setting of the process."""
    entered = threading.Event()

    def count(seconds: float) -> None:
        with cost._counting():
            entered.set()
            time.sleep(seconds)

    first, second = threading.Thread(target=count, args=(0.3,)), threading.Thread(target=count, args=(0.6,))
    first.start()
    entered.wait()
    second.start()
    first.join()
    second.join()
    assert torch.backends.cuda.flash_sdp_enabled()
