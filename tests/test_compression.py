"""Delta experts: one base FFN and small differences. The fast paths equal the loop; at full rank nothing is lost."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny_config
from test_experts import DEVICES, D, H, N, assert_same, drawn, make_routing, needs_grouped_mm, routings, run

from llava_clipmoe import compression, cpu_clipmoe
from llava_clipmoe.common_clipmoe import quick_gelu
from llava_clipmoe.compression import Directions, compress, expand, second_moments
from llava_clipmoe.configuration_clipmoe import active_parameters
from llava_clipmoe.cpu_clipmoe import _even, _sort_by_set
from llava_clipmoe.experts_delta_clipmoe import DeltaExperts
from llava_clipmoe.modeling_clipmoe import CLIPMoEModel

R = 8


def make_delta(implementation: str, dtype=torch.float32, device="cpu", hidden_act="quick_gelu") -> DeltaExperts:
    how = {"implementation": implementation, "dtype": dtype, "device": device, "hidden_act": hidden_act}
    return drawn(DeltaExperts, R, 2 * R, **how)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = (actual.float() - expected.float()).abs().max() / expected.abs().max().clamp_min(1e-12)
    assert error <= tolerance, f"the output is off by {error:.1e} of its largest entry"


@routings
def test_the_loop_is_the_sum_of_whole_experts(kind, k):
    experts, (x, weights, chosen) = make_delta("loop"), make_routing(kind, k)
    expected = torch.zeros(N, D)
    for n in range(N):
        for w, e in zip(weights[n], chosen[n], strict=True):
            h = (experts.fc1.base + experts.fc1.up[e] @ experts.fc1.down[e]) @ x[n] + experts.fc1.bias[e]
            h = h * torch.sigmoid(1.702 * h)
            expected[n] += w * ((experts.fc2.base + experts.fc2.up[e] @ experts.fc2.down[e]) @ h + experts.fc2.bias[e])
    torch.testing.assert_close(experts(x, weights, chosen), expected, atol=1e-5, rtol=1e-5)


@routings
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("device", DEVICES)
def test_products_by_set_equal_the_loop(kind, k, hidden_act, device):
    routing = make_routing(kind, k, device)
    with torch.no_grad():
        expected = make_delta("loop", device=device, hidden_act=hidden_act)(*routing)
        assert_close(make_delta("by_set", device=device, hidden_act=hidden_act)(*routing), expected, 1e-5)
        assert_close(make_delta("by_set", torch.bfloat16, device, hidden_act)(routing[0].bfloat16(), *routing[1:]),
                     expected, 0.03)  # fmt: skip


@needs_grouped_mm
@routings
@pytest.mark.parametrize("device", DEVICES)
def test_grouped_mm_equals_the_loop_backward_too(kind, k, device):
    routing = make_routing(kind, k, device)
    expected = run(make_delta("loop", device=device), routing)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 0.04)):
        assert_same(run(make_delta("grouped_mm", dtype, device), routing), expected, tolerance)


def test_without_a_graph_auto_takes_the_fast_path_and_leaves_its_input_alone(monkeypatch):
    calls, experts, (x, weights, chosen) = [], make_delta("auto"), make_routing("mixed", 2)
    real = DeltaExperts._by_set
    monkeypatch.setattr(DeltaExperts, "_by_set", lambda self, *given: calls.append(1) or real(self, *given))
    before = x.clone()
    assert experts(x, weights, chosen).requires_grad and not calls
    with torch.no_grad():
        experts(x, weights, chosen)
    assert calls and torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens_give_no_results(moe, dtype):
    delta, _ = compress(moe, rank=8)
    experts = delta.vision_model.encoder.layers[0].mlp.experts.to(dtype)
    width = experts.fc1.base.shape[1]
    with torch.no_grad():
        none = experts(torch.zeros(0, width, dtype=dtype), torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.int64))
    assert none.shape == (0, width)


def test_tokens_are_grouped_by_the_set_of_their_experts():
    chosen = torch.tensor([[2, 0], [1, 3], [0, 2], [3, 1], [0, 1]])
    order, groups = _sort_by_set(chosen, 4)
    assert groups == [([0, 1], 1), ([0, 2], 2), ([1, 3], 2)] and order.tolist() == [4, 0, 2, 1, 3]


def test_even_groups_have_few_sizes_and_give_what_is_over_to_all_experts():
    chosen = torch.rand(400, 4, generator=torch.Generator().manual_seed(0)).topk(2).indices
    order, groups = _even(*_sort_by_set(chosen, 4), 4)
    step = 400 // (8 * 6)
    *whole, (everyone, over) = groups
    assert all(count % step == 0 for _, count in whole) and len(whole) == 6
    assert everyone == [0, 1, 2, 3] and 0 < over <= 6 * (step - 1)
    assert sorted(order.tolist()) == list(range(400))
    for (experts, _), rows in zip(whole, order.split([count for _, count in groups]), strict=False):
        assert all(sorted(chosen[row].tolist()) == experts for row in rows)


def test_even_groups_give_the_same(monkeypatch):
    experts, generator = make_delta("by_set"), torch.Generator().manual_seed(4)
    x, (weights, chosen) = torch.randn(400, D, generator=generator), torch.rand(400, 4, generator=generator).topk(2)
    calls = []

    def even(*arguments):
        calls.append(1)
        return _even(*arguments)

    with torch.no_grad():
        expected = experts(x, weights, chosen)
        monkeypatch.setattr(cpu_clipmoe, "_even", even)
        monkeypatch.setattr(cpu_clipmoe, "_sort_by_set", lambda *given: _even(*_sort_by_set(*given), 4))
        assert_close(experts(x, weights, chosen), expected, 1e-5)
        assert not calls  # by itself in half precision alone
        experts.bfloat16()(x.bfloat16(), weights, chosen)
        assert calls


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_an_expert_that_saw_one_input_many_times_is_cut_as_if_it_saw_none(size):
    generator = torch.Generator().manual_seed(5)
    difference, x = torch.randn(H, D, generator=generator), size * torch.randn(D, generator=generator)
    products = torch.zeros(D, D)
    for _ in range(7):
        products.addmm_(x[:, None], x[None])
    covariance = products.double() / 7 - x.double()[:, None] * x.double()  # rounding, and not positive definite
    up, down, shift = Directions(difference.double(), (x.double(), covariance)).factors(difference.double(), R)
    plain_up, plain_down, none = Directions(difference.double(), None).factors(difference.double(), R)
    torch.testing.assert_close((up, down), (plain_up, plain_down))
    torch.testing.assert_close(up @ down @ x.double() + shift, difference.double() @ x.double())
    assert not none.any() and shift.any()


# ------------------------------------------------------------------------------------------------------- whole models


@pytest.fixture(scope="module")
def moe() -> CLIPMoEModel:
    """Experts that are the first one plus a small difference, as a training leaves them."""
    torch.manual_seed(0)
    model = CLIPMoEModel(make_tiny_config(num_experts=4, num_experts_per_tok=2)).eval()
    with torch.no_grad():
        for module in model.modules():
            for layer in ("fc1", "fc2") if hasattr(module, "num_experts") and hasattr(module, "fc1") else ():
                stacked = getattr(module, layer)
                for tensor in (stacked.weight, stacked.bias):
                    tensor.copy_(tensor[:1] + 0.1 * tensor[:1].std() * torch.randn(tensor.shape))
                    tensor[0].copy_(tensor[0].clone())
    return model


def pixels_and_tokens(model: CLIPMoEModel, count: int = 6):
    vision, text = model.config.vision_config, model.config.text_config
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randn(count, 3, vision.image_size, vision.image_size, generator=generator)
    tokens = torch.randint(3, text.vocab_size - 1, (count, 9), generator=generator)
    tokens[:, -1] = text.eos_token_id if text.eos_token_id != 2 else text.vocab_size - 1
    return pixels, tokens


def features(model: CLIPMoEModel) -> torch.Tensor:
    pixels, tokens = pixels_and_tokens(model)
    with torch.no_grad():
        return torch.cat([model.get_image_features(pixels), model.get_text_features(tokens)])


@pytest.mark.parametrize("calibrated", [False, True])
def test_at_full_rank_nothing_is_lost(moe, calibrated):
    moments = collected(moe) if calibrated else None
    delta, kept = compress(moe, rank=10_000, moments=moments)
    assert all(abs(share - 1) < 1e-9 for one in kept for share in one.energy)
    torch.testing.assert_close(features(delta), features(moe), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features(expand(delta)), features(moe), atol=1e-5, rtol=1e-5)


def collected(model: CLIPMoEModel):
    pixels, tokens = pixels_and_tokens(model, 16)
    with second_moments(model) as moments, torch.no_grad():
        model.get_image_features(pixels)
        model.get_text_features(tokens)
    return moments


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_second_rank_needs_no_second_decomposition(moe, calibrated, monkeypatch):
    moments, decomposed = collected(moe) if calibrated else None, {}
    compress(moe, rank=16, moments=moments, decomposed=decomposed)
    expected, kept = compress(moe, rank=8, moments=moments)
    monkeypatch.setattr(compression.Directions, "__init__", lambda *_: pytest.fail("decomposed again"))
    delta, shares = compress(moe, rank=8, moments=moments, decomposed=decomposed)
    assert shares == kept
    for (name, a), b in zip(delta.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_truncated_difference_is_the_best_of_its_rank(moe):
    delta, kept = compress(moe, rank=8)
    name = "vision_model.encoder.layers.0.mlp.experts.fc1"
    whole, state = moe.state_dict()[f"{name}.weight"], delta.state_dict()
    for expert in (1, 2, 3):
        values = torch.linalg.svdvals((whole[expert] - whole[0]).double())
        error = (
            whole[expert] - state[f"{name}.base"] - state[f"{name}.up"][expert] @ state[f"{name}.down"][expert]
        ).norm()
        assert error == pytest.approx(float(values[8:].norm()), rel=1e-4)
        share = next(one for one in kept if one.block.endswith("vision_model.encoder.layers.0")).energy[expert]
        assert share == pytest.approx(float(values[:8].square().sum() / values.square().sum()), rel=1e-6)


def test_calibrated_differences_are_nearer_on_the_inputs_they_were_calibrated_on(moe):
    """Nearer than the plain cut in the mean square of a layer's outputs, its bias included."""
    moments, name = collected(moe), "vision_model.encoder.layers.1.mlp.experts"
    whole = moe.state_dict()
    for layer in ("fc1", "fc2"):
        mean, covariance = moments[name].of_layer(layer, 1)
        errors = []
        for given in (None, moments):
            state = compress(moe, rank=8, moments=given)[0].state_dict()
            made = state[f"{name}.{layer}.base"] + state[f"{name}.{layer}.up"][1] @ state[f"{name}.{layer}.down"][1]
            lost = (whole[f"{name}.{layer}.weight"][1] - made).double()
            constant = lost @ mean + (whole[f"{name}.{layer}.bias"][1] - state[f"{name}.{layer}.bias"][1]).double()
            errors.append(float((lost @ covariance * lost).sum() + constant.square().sum()))
        assert errors[1] < 0.9 * errors[0], layer


def test_moments_are_those_of_the_tokens_that_an_expert_was_given(moe):
    name, seen = "vision_model.encoder.layers.1.mlp.experts", []
    handle = moe.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given))
    moments = collected(moe)[name]
    handle.remove()
    ((x, _, chosen),) = seen
    experts = moe.get_submodule(name)
    mine = [x[(chosen == e).any(-1)] for e in range(4)]
    with torch.no_grad():
        hidden = torch.cat([
            quick_gelu(F.linear(part, experts.fc1.weight[e], experts.fc1.bias[e])) for e, part in enumerate(mine)
        ])  # fmt: skip
    for layer, tokens in (("fc1", mine[2]), ("fc2", hidden)):
        mean, covariance = moments.of_layer(layer, 2)
        torch.testing.assert_close(mean, tokens.double().mean(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(covariance, torch.cov(tokens.double().T, correction=0), atol=1e-4, rtol=1e-4)


def test_energy_chooses_the_smallest_rank_of_eight_that_keeps_it(moe):
    _, kept = compress(moe, energy=0.8)
    for one in kept:
        assert min(one.energy) >= 0.8 and one.rank % 8 == 0
        if one.rank > 8:
            less = next(k for k in compress(moe, rank=one.rank - 8)[1] if (k.block, k.layer) == (one.block, one.layer))
            assert min(less.energy) < 0.8


def test_a_small_rank_makes_a_small_model(moe):
    whole, delta = moe, compress(moe, rank=8)[0]
    counted = {name: sum(p.numel() for p in model.parameters()) for name, model in (("whole", whole), ("delta", delta))}
    assert counted == {"whole": active_parameters(whole.config)["total"],
                       "delta": active_parameters(delta.config)["total"]}  # fmt: skip
    assert active_parameters(delta.config)["active"] < active_parameters(whole.config)["active"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [({}, "one of the two"), ({"rank": 4, "energy": 0.5}, "one of the two"), ({"rank": 0}, "at least 1"),
     ({"energy": 1.5}, "between 0 and 1")],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(moe, settings, words):
    with pytest.raises(ValueError, match=words):
        compress(moe, **settings)


def test_models_without_whole_experts_are_refused(moe):
    with pytest.raises(ValueError, match="dense"):
        compress(CLIPMoEModel(make_tiny_config(num_experts=1)), rank=8)
    with pytest.raises(ValueError, match="already"):
        compress(compress(moe, rank=8)[0], rank=8)
    with pytest.raises(ValueError, match="no delta experts"):
        expand(copy.deepcopy(moe))
