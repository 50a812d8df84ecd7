"""Frozen matrices held in bf16 while the rest learns: the same numbers under autocast, and the same weights after."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny_config

from llava_clipmoe.modeling_clipmoe import CLIPMoEModel
from llava_clipmoe.upcycling import is_ffn, is_router_or_gate
from train_encoder.training.precision import frozen_in


def make(**experts) -> CLIPMoEModel:
    torch.manual_seed(0)
    return CLIPMoEModel(make_tiny_config(**experts)).eval()


def step(model: CLIPMoEModel, learns, batch) -> list[torch.Tensor]:
    """Features, and the gradients of what learns, of one step under bf16 autocast."""
    model.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns(name))
    with torch.autocast("cpu", torch.bfloat16):
        found = [model.get_image_features(batch["pixel_values"]), model.get_text_features(batch["input_ids"])]
    sum(part.float().square().sum() for part in found).backward()
    return [*(part.detach() for part in found), *(p.grad for name, p in model.named_parameters() if learns(name))]


MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2}
CASES = {
    "FFNs of a dense CLIP": ({"num_experts": 1}, is_ffn),
    "routers, loop": ({**MIXTURE, "experts_implementation": "loop"}, is_router_or_gate),
    "routers, grouped_mm": ({**MIXTURE, "experts_implementation": "grouped_mm"}, is_router_or_gate),
}


@pytest.mark.parametrize("case", CASES)
def test_the_step_is_the_same_to_the_bit_and_so_are_the_weights_afterwards(case, batch):
    if "grouped_mm" in case and not hasattr(F, "grouped_mm"):
        pytest.skip("grouped_mm is public since torch 2.10")
    experts, learns = CASES[case]
    model = make(**experts)
    before, expected = copy.deepcopy(model.state_dict()), step(model, learns, batch)
    with frozen_in(model, torch.bfloat16, learns):
        held = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.bfloat16}
        assert (
            held
            and not any(map(learns, held))
            and not any("norm" in name or "embedding." in name for name in held if "patch" not in name)
        )
        for a, b in zip(step(model, learns, batch), expected, strict=True):
            assert torch.equal(a, b)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_error_inside_leaves_the_weights_whole(batch):
    model = make(num_experts=1)
    with pytest.raises(RuntimeError), frozen_in(model, torch.bfloat16, is_ffn):
        raise RuntimeError
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
