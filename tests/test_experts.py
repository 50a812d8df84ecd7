"""Every expert backend equals the readable loop, and the loop equals the paper's sum (eq. 4), forward and backward."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llava_clipmoe.common_clipmoe import combine, grouped_mm_pays, sort_by_expert
from llava_clipmoe.cpu_clipmoe import _slices
from llava_clipmoe.experts_clipmoe import Experts
from llava_clipmoe.modeling_clipmoe import CLIPMoEModel

E, D, H, N = 4, 32, 64, 40

needs_grouped_mm = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="grouped_mm is public since torch 2.10")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")),
]


def drawn(
    kind: type, *ranks: int, implementation: str, dtype=torch.float32, device="cpu", hidden_act="quick_gelu"
) -> torch.nn.Module:
    """Whole or delta experts, all their parameters drawn."""
    config = SimpleNamespace(
        num_experts=E, hidden_size=D, intermediate_size=H, num_hidden_layers=2, hidden_act=hidden_act,
        expert_dropout=0.0, experts_implementation=implementation,
    )  # fmt: skip
    experts, generator = kind(config, *ranks), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return experts.to(device, dtype)


def make_experts(implementation: str, dtype=torch.float32, device="cpu") -> Experts:
    return drawn(Experts, implementation=implementation, dtype=dtype, device=device)


def make_routing(kind: str, k: int, device="cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [N,D], weights [N,K] of sum 1, chosen experts [N,K].

    `mixed`: all experts have tokens; `unused`: expert 1 has none; `one`: expert 2 is everybody's first choice.
    """
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(N, D, generator=generator)
    logits = torch.randn(N, E, generator=generator)
    if kind == "unused":
        logits[:, 1] = -50.0
    elif kind == "one":
        logits[:, 2] = 50.0
    weights = torch.rand(N, k, generator=generator).softmax(-1)
    return x.to(device), weights.to(device), logits.topk(k, dim=-1).indices.to(device)


def run(experts: Experts, routing) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-> output and the gradients of everything that takes part, all in fp32."""
    x, weights, chosen = routing
    x = x.to(next(experts.parameters()).dtype, copy=True).requires_grad_()
    weights = weights.clone().requires_grad_()
    out = experts(x, weights, chosen)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    (out * direction).sum().backward()
    gradients = {"x": x.grad, "weights": weights.grad} | {name: p.grad for name, p in experts.named_parameters()}
    return out.detach().float(), {name: g.float() for name, g in gradients.items()}


def assert_same(actual, expected, tolerance: float) -> None:
    """Output and gradients agree, each relative to the largest entry of the expected tensor."""
    pairs = {"output": (actual[0], expected[0])}
    pairs |= {f"gradient of {name}": (actual[1][name], expected[1][name]) for name in expected[1]}
    for name, (a, b) in pairs.items():
        assert torch.isfinite(a).all(), name
        error = (a - b).abs().max() / b.abs().max().clamp_min(1e-12)
        assert error <= tolerance, f"{name} is off by {error:.1e} of its largest entry"


ROUTINGS = [("mixed", 1), ("mixed", 2), ("mixed", 3), ("mixed", 4), ("unused", 2), ("one", 1), ("one", 2)]
routings = pytest.mark.parametrize(("kind", "k"), ROUTINGS, ids=[f"{kind}-k{k}" for kind, k in ROUTINGS])


@routings
def test_the_loop_is_the_papers_sum(kind, k):
    """Eq. 4, token by token: out = sum_k w_k FFN_{idx_k}(x)."""
    experts = make_experts("loop")
    x, weights, chosen = make_routing(kind, k)
    expected = torch.zeros(N, D)
    for n in range(N):
        for w, e in zip(weights[n], chosen[n], strict=True):
            h = experts.fc1.weight[e] @ x[n] + experts.fc1.bias[e]
            h = h * torch.sigmoid(1.702 * h)
            expected[n] += w * (experts.fc2.weight[e] @ h + experts.fc2.bias[e])
    torch.testing.assert_close(experts(x, weights, chosen), expected, atol=1e-5, rtol=1e-5)


@routings
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=["fp32", "bf16"])
def test_the_loop_without_a_graph_equals_the_loop(kind, k, dtype, tolerance, device):
    """It works in place, and in half precision on a CPU in slices of few sizes."""
    routing = make_routing(kind, k, device)
    expected = make_experts("loop", device=device)(*routing)
    x, weights, chosen = routing
    x, before = x.to(dtype), x.to(dtype, copy=True)
    with torch.no_grad():
        actual = make_experts("loop", dtype, device)(x, weights, chosen)
    assert actual.dtype == dtype and not actual.requires_grad
    assert torch.equal(x, before), "the caller's tokens were overwritten"
    error = (actual.float() - expected).abs().max() / expected.abs().max()
    assert error <= tolerance


@pytest.mark.parametrize("counts", [[5, 0, 33, 16], [54, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 3]])
def test_slices_are_of_few_sizes_and_find_each_groups_own_rows(counts):
    rows = torch.arange(sum(counts))
    slices = list(_slices(counts, step=16))
    own = [rows[around][inner].tolist() for around, inner in slices]
    assert own == [part.tolist() for part in rows.split(counts)]
    for (around, _), count in zip(slices, counts, strict=True):
        assert len(rows[around]) == min(-(-count // 16) * 16, len(rows))


@needs_grouped_mm
@routings
@pytest.mark.parametrize("device", DEVICES)
def test_grouped_mm_equals_the_loop_in_fp32(kind, k, device):
    routing = make_routing(kind, k, device)
    assert_same(
        run(make_experts("grouped_mm", device=device), routing), run(make_experts("loop", device=device), routing), 1e-5
    )


@needs_grouped_mm
@routings
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_grouped_mm_equals_the_loop_in_bf16(kind, k, device, autocast):
    """Both stay within bf16's rounding of the fp32 loop: weights in bf16, and fp32 weights under autocast."""
    routing = make_routing(kind, k, device)
    exact = run(make_experts("loop", device=device), routing)
    dtype = torch.float32 if autocast else torch.bfloat16
    for implementation in ("loop", "grouped_mm"):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            out = run(make_experts(implementation, dtype, device), routing)
        assert_same(out, exact, 0.03)
        assert (out[0] - exact[0]).abs().max() > 1e-4, "this did not run in bf16"


@needs_grouped_mm
def test_the_two_backends_are_two(monkeypatch):
    """The comparisons above would hold trivially if both settings ran the same code."""
    calls = []
    real = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    make_experts("loop")(*make_routing("mixed", 2))
    make_experts("auto")(*make_routing("mixed", 2))
    assert not calls, "on the CPU `auto` is the loop"
    make_experts("grouped_mm")(*make_routing("mixed", 2))
    assert len(calls) == 2


@pytest.mark.parametrize("implementation", ["loop", pytest.param("grouped_mm", marks=needs_grouped_mm)])
def test_an_unused_expert_has_zero_gradients_and_a_used_one_has_not(implementation):
    _, gradients = run(make_experts(implementation), make_routing("unused", 2))
    for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
        assert [bool(g.any()) for g in gradients[name]] == [True, False, True, True], name


@pytest.mark.parametrize("implementation", ["loop", pytest.param("grouped_mm", marks=needs_grouped_mm)])
def test_two_runs_are_equal_to_the_bit(implementation):
    first, second = (run(make_experts(implementation), make_routing("mixed", 2)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_sorting_and_combining_undo_each_other():
    _, weights, chosen = make_routing("unused", 3)
    order, counts = sort_by_expert(chosen, E)
    assert counts.tolist() == [(chosen == e).sum().item() for e in range(E)] and counts[1] == 0
    assert chosen.flatten()[order].tolist() == sorted(chosen.flatten().tolist())
    pairs = torch.arange(chosen.numel(), dtype=torch.float32).view(-1, 1)  # each pair carries its own number
    combined = combine(pairs[order], order, weights)
    torch.testing.assert_close(combined, (pairs.view(N, 3) * weights).sum(1, keepdim=True))


@needs_grouped_mm
def test_whole_models_agree_under_both_backends(tiny_moe, batch):
    other = CLIPMoEModel(type(tiny_moe.config)(**{**tiny_moe.config.to_dict(), **_both_towers(tiny_moe, "grouped_mm")}))
    other.load_state_dict(tiny_moe.state_dict())
    assert other.vision_model.encoder.layers[0].mlp.experts.implementation == "grouped_mm"
    with torch.no_grad():
        a, b = tiny_moe(**batch), other.eval()(**batch)
    torch.testing.assert_close(b.image_embeds, a.image_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(b.text_embeds, a.text_embeds, atol=1e-5, rtol=1e-5)


def _both_towers(model, implementation: str) -> dict:
    return {
        key: {**getattr(model.config, key).to_dict(), "experts_implementation": implementation}
        for key in ("vision_config", "text_config")
    }


def test_the_fused_path_is_chosen_only_where_it_exists():
    assert not grouped_mm_pays(torch.zeros(1, dtype=torch.bfloat16))
    if torch.cuda.is_available() and hasattr(F, "grouped_mm"):
        modern = torch.cuda.get_device_capability() >= (9, 0)
        assert grouped_mm_pays(torch.zeros(1, dtype=torch.bfloat16, device="cuda")) == modern
        assert not grouped_mm_pays(torch.zeros(1, device="cuda"))
