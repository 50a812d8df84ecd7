"""Dense CLIP + stages -> CLIP-MoE: what goes where, what is refused, and what a seed decides."""

from __future__ import annotations

import copy

import pytest
import torch

from llava_clipmoe.modeling_clipmoe import CLIPMoEModel
from llava_clipmoe.upcycling import ffn_state, is_ffn, moe_config, sparse_upcycle, upcycle


def four(base, **changes):
    return moe_config(base.config, **{"num_experts": 4, "num_experts_per_tok": 2, **changes})


def test_expert_zero_is_the_base_expert_j_is_stage_j_and_the_rest_is_the_base(tiny_dense, stages):
    dense, moe = tiny_dense.state_dict(), upcycle(tiny_dense, stages, four(tiny_dense)).state_dict()
    for name, tensor in dense.items():
        if is_ffn(name):
            stacked = moe[name.replace(".mlp.", ".mlp.experts.")]
            for expert, source in enumerate([dense, *stages]):
                assert torch.equal(stacked[expert], source[name]), f"{name} of expert {expert}"
        else:
            assert torch.equal(moe[name], tensor), name
    extra = {name for name in moe if ".mlp." not in name} - set(dense)
    assert not extra


def test_upcycling_leaves_the_base_and_the_stages_alone(tiny_dense, stages):
    before = copy.deepcopy((tiny_dense.state_dict(), stages, tiny_dense.config.to_dict()))
    moe = upcycle(tiny_dense, stages, four(tiny_dense))
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.zero_()  # nothing may be shared
    after = (tiny_dense.state_dict(), stages, tiny_dense.config.to_dict())
    assert all(torch.equal(after[0][name], before[0][name]) for name in before[0])
    assert all(torch.equal(a[name], b[name]) for a, b in zip(after[1], before[1], strict=True) for name in b)
    assert after[2] == before[2]


def test_upcycling_keeps_the_bases_dtype_and_evaluates(tiny_dense, stages):
    moe = upcycle(tiny_dense.bfloat16(), stages, four(tiny_dense))
    assert {p.dtype for p in moe.parameters()} == {torch.bfloat16} and not moe.training


def test_blocks_without_experts_keep_the_bases_ffn(tiny_dense, stages):
    chosen = {"vision_model": [1], "text_model": [0]}
    moe = upcycle(tiny_dense, stages, moe_config(tiny_dense.config, chosen, num_experts=4)).state_dict()
    dense = tiny_dense.state_dict()
    kept = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(moe[kept], dense[kept])
    assert "vision_model.encoder.layers.1.mlp.experts.fc1.weight" in moe
    assert "vision_model.encoder.layers.0.mlp.experts.fc1.weight" not in moe


# ------------------------------------------------------------------------------------------------------------ the seed


def routers(model: CLIPMoEModel) -> torch.Tensor:
    return torch.cat([p.flatten() for name, p in model.named_parameters() if name.endswith("router.weight")])


def test_the_seed_alone_decides_the_routers(tiny_dense, stages):
    torch.manual_seed(100)
    a = routers(upcycle(tiny_dense, stages, four(tiny_dense), seed=3))
    torch.manual_seed(200)
    b = routers(upcycle(tiny_dense, stages, four(tiny_dense), seed=3))
    c = routers(upcycle(tiny_dense, stages, four(tiny_dense), seed=4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_upcycling_does_not_touch_the_global_random_state(tiny_dense, stages):
    torch.manual_seed(100)
    expected = torch.rand(3)
    torch.manual_seed(100)
    upcycle(tiny_dense, stages, four(tiny_dense), seed=3)
    assert torch.equal(torch.rand(3), expected)


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_stage_of_another_width_is_refused(tiny_dense, stages):
    key = "vision_model.encoder.layers.1.mlp.fc1.weight"
    stages[1][key] = torch.zeros(128, 48)
    with pytest.raises(ValueError, match=rf"stage 2 has {key} of shape \[128, 48\], the base has \[64, 48\].*one base"):
        upcycle(tiny_dense, stages, four(tiny_dense))


def test_a_stage_of_a_deeper_base_is_refused(tiny_dense, stages):
    stages[0]["text_model.encoder.layers.7.mlp.fc2.bias"] = torch.zeros(32)
    with pytest.raises(
        ValueError, match=r"stage 1 has text_model\.encoder\.layers\.7\.mlp\.fc2\.bias, which the base does"
    ):
        upcycle(tiny_dense, stages, four(tiny_dense))


def test_a_stage_without_an_moe_blocks_ffn_is_refused(tiny_dense, stages):
    stages[2] = {name: t for name, t in stages[2].items() if ".layers.2." not in name}
    with pytest.raises(ValueError, match=r"stage 3 has no (whole )?FFN for block\(s\) \[2\] of the vision_model"):
        upcycle(tiny_dense, stages, four(tiny_dense))
    elsewhere = {"vision_model": [0, 1], "text_model": [0, 1]}  # that block has no experts: nothing is missing
    upcycle(tiny_dense, stages, moe_config(tiny_dense.config, elsewhere, num_experts=4))


@pytest.mark.parametrize("tensor", ["fc1.bias", "fc2.weight"])
def test_a_stage_without_one_tensor_of_a_block_is_refused(tiny_dense, stages, tensor):
    """Half of a stage's FFN and half of the base's is no expert of anything."""
    del stages[0][f"text_model.encoder.layers.0.mlp.{tensor}"]
    with pytest.raises(ValueError, match=r"stage 1 .*text_model"):
        upcycle(tiny_dense, stages, four(tiny_dense))


def test_a_file_without_ffns_is_refused(tiny_dense, stages):
    with pytest.raises(ValueError, match="stage 1 holds no FFN tensors"):
        upcycle(tiny_dense, [{"weight": torch.zeros(2)}, *stages[1:]], four(tiny_dense))


def test_the_number_of_stages_must_fit(tiny_dense, stages):
    with pytest.raises(ValueError, match="num_experts is 4, but the base and 2 stages make 3 experts"):
        upcycle(tiny_dense, stages[:2], four(tiny_dense))


def test_more_experts_per_token_than_experts_is_refused_with_the_next_step(tiny_dense):
    with pytest.raises(ValueError, match=r"num_experts_per_tok \(5\).*num_experts \(4\).*Lower num_experts_per_tok"):
        four(tiny_dense, num_experts_per_tok=5)


# ---------------------------------------------------------------------------------------------------- sparse upcycling


def test_sparse_upcycling_copies_the_bases_ffn_to_every_expert(tiny_dense):
    moe = sparse_upcycle(tiny_dense, four(tiny_dense)).state_dict()
    for name, tensor in ffn_state(tiny_dense.state_dict()).items():
        stacked = moe[name.replace(".mlp.", ".mlp.experts.")]
        assert stacked.shape[0] == 4 and all(torch.equal(expert, tensor) for expert in stacked), name
