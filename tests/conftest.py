"""Fixtures for every test: tiny CLIPs in fp32 whose weights are drawn so large that each tensor matters.

Freshly initialised CLIPs have zero biases and undecided routers; a test on them would pass with half of the model
left out. `shaken` weights make every tensor count. Nothing here needs the trainer's packages: the files that test the
model also run in LLaVA's pinned environment.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks the hub is a defect; before transformers is imported
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import pytest
import torch

from llava_clipmoe.compat.versions import newer_than_tested
from llava_clipmoe.configuration_clipmoe import CLIPMoEConfig
from llava_clipmoe.experts_clipmoe import Router
from llava_clipmoe.modeling_clipmoe import CLIPMoEModel
from llava_clipmoe.upcycling import ffn_state, moe_config, upcycle

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_report_header() -> str | None:
    """A failure under a version that nobody has tested should be read with that in mind."""
    return newer_than_tested()


EOS = 98
"""Id of the end-of-text token in the tiny vocabulary (its largest, as in CLIP)."""


def make_tiny_config(hidden_act: str = "quick_gelu", eos_token_id: int = EOS, **experts) -> CLIPMoEConfig:
    """A dense CLIP of 3 vision and 2 text blocks with different widths; `experts` are fields of EXPERT_FIELDS."""
    shared = {"intermediate_size": 64, "hidden_act": hidden_act}
    return CLIPMoEConfig(
        vision_config=dict(
            hidden_size=48, num_hidden_layers=3, num_attention_heads=3, image_size=24, patch_size=8, **shared
        ),
        text_config=dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=EOS + 1,
            max_position_embeddings=16,
            bos_token_id=97,
            eos_token_id=eos_token_id,
            pad_token_id=EOS,
            **shared,
        ),
        projection_dim=24,
        **{"num_experts": 1, **experts},
    )


def shake(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draw every parameter anew, in place, so that all of them have a visible effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("logit_scale"):
                continue
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            elif isinstance(model, Router) or name.endswith("router.weight"):
                parameter.copy_(0.5 * noise)  # decided, and differently for each token
            else:
                parameter.copy_(0.15 * noise)
    return model


@pytest.fixture(scope="session")
def tiny_config():
    """The factory of tiny configurations: `tiny_config(hidden_act="gelu", num_experts=4, ...)`."""
    return make_tiny_config


@pytest.fixture
def tiny_dense() -> CLIPMoEModel:
    """A dense CLIP (num_experts=1), eval mode."""
    return shake(CLIPMoEModel(make_tiny_config()), seed=1).eval()


@pytest.fixture
def stages(tiny_dense) -> list[dict[str, torch.Tensor]]:
    """The FFNs of three stages that were "trained" from `tiny_dense`."""
    return [ffn_state(shake(CLIPMoEModel(tiny_dense.config), seed).state_dict()) for seed in (2, 3, 4)]


@pytest.fixture
def tiny_moe(tiny_dense, stages) -> CLIPMoEModel:
    """The CLIP-MoE of `tiny_dense` and `stages` (4 experts, top 2) with routers that have made up their mind."""
    model = upcycle(tiny_dense, stages, moe_config(tiny_dense.config, num_experts=4, num_experts_per_tok=2))
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for seed, router in enumerate(routers, start=5):
        shake(router, seed)
    return model


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Five pictures and captions of 3 to 12 tokens, padded on the right with the end-of-text id."""
    generator = torch.Generator().manual_seed(6)
    lengths = torch.tensor([3, 12, 7, 5, 9])
    input_ids = torch.randint(1, 97, (5, 12), generator=generator)
    input_ids[:, 0] = 97
    attention_mask = torch.arange(12) < lengths[:, None]
    input_ids[torch.arange(12) >= lengths[:, None] - 1] = EOS
    pixel_values = torch.randn(5, 3, 24, 24, generator=generator)
    return {"input_ids": input_ids, "attention_mask": attention_mask.long(), "pixel_values": pixel_values}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs and captions, which is no part of the repository."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of real photographs (../shared/data) is not on this machine")
    return folder
