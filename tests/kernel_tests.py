"""Every kernel against the readable loop, forward and backward. Run by `test_kernels.py`, see there.

The loop runs on the CPU in fp64, with the tensors that the kernel gets (rounded to its dtype). Most tests take tiles of
16, so that small shapes have several of them and hang over their edges.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llava_clipmoe import kernels_clipmoe as kernels
from llava_clipmoe.experts_clipmoe import DeltaExperts, Router
from llava_clipmoe.kernels_clipmoe import Tile, delta_ffn, order_by_set, pack_delta, route

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
D, H, N = 24, 40, 37

dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp16", "bf16"])
activations = pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
# E, K: the usual, one expert a token, all of them, the most, a number that is no power of two
CHOICES = [(4, 2), (2, 1), (3, 3), (16, 3)]
choices = pytest.mark.parametrize(("e", "k"), CHOICES, ids=[f"e{e}k{k}" for e, k in CHOICES])
tokens = pytest.mark.parametrize("n", [0, 1, 16, 37])


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "TILES", {key: Tile(16, 16, 16, 4, 1) for key in kernels.TILES})


def make_config(e: int, k: int, act: str = "quick_gelu") -> SimpleNamespace:
    return SimpleNamespace(
        num_experts=e, num_experts_per_tok=k, hidden_size=D, intermediate_size=H, num_hidden_layers=2, hidden_act=act,
        expert_dropout=0.0, experts_implementation="loop", router_jitter_noise=0.0, router_initializer_range=0.02,
    )  # fmt: skip


def drawn(module: torch.nn.Module, dtype: torch.dtype, seed: int = 1, scale: float = 0.3) -> torch.nn.Module:
    """All parameters drawn anew so that each matters, and rounded to `dtype`; in fp64."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_((scale * torch.randn(parameter.shape, generator=generator)).to(dtype))
    return module


def draw(*shape: int, dtype: torch.dtype, seed: int = 2) -> torch.Tensor:
    """Numbers that `dtype` can hold, in fp64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).double()


def routing(n: int, e: int, k: int, kind: str = "mixed") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights [N,E], and as the loop wants them: weights [N,K], experts [N,K]. `unused`: nobody takes expert 1."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(n, e, generator=generator)
    if kind == "unused":
        logits[:, 1] = -50.0
    weights, experts = torch.rand(n, k, generator=generator).softmax(-1), logits.topk(k, dim=-1).indices
    return torch.zeros(n, e).scatter(1, experts, weights), weights, experts


def near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str = "output") -> None:
    """Each entry within `tolerance` of the largest one."""
    assert actual.shape == expected.shape
    if expected.numel():
        error = (actual.double().cpu() - expected.double()).abs().max() / expected.abs().max().clamp_min(1e-12)
        assert error <= tolerance, f"{name} is off by {error:.1e} of its largest entry"  # also when it is no number


def on_device(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return tensor.detach().to(DEVICE, dtype, copy=True)


# ------------------------------------------------------------------------------------------------------------ router


@dtypes
@tokens
@choices
def test_router(small_tiles, dtype, n, e, k):
    router, x = drawn(Router(make_config(e, k)), dtype), draw(n, D, dtype=dtype)
    logits, weights, experts = router(x.float())
    found = route(on_device(x, dtype), on_device(router.weight, dtype), k)
    near(found.logits, logits.detach(), 1e-5, "logits")
    assert torch.equal(found.experts.cpu(), experts) and found.experts.dtype == experts.dtype
    near(found.weights, torch.zeros(n, e).scatter(1, experts, weights.detach()), 1e-5, "weights")
    assert found.weights.dtype == found.logits.dtype == torch.float32


@pytest.mark.parametrize(("e", "k"), [(2, 1), (4, 2), (7, 3), (16, 5), (16, 16)])
def test_ties_go_to_the_smaller_number(e, k):
    """And what the router says is what it does: weights stand where the experts are."""
    logits = torch.randint(0, 3, (200, e), generator=torch.Generator().manual_seed(0)).float()
    found = route(on_device(logits), torch.eye(e, device=DEVICE), k)
    assert torch.equal(found.logits.cpu(), logits)
    expected = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(found.experts.cpu(), expected)
    share = torch.zeros(200, e).scatter(1, expected, logits.gather(1, expected).softmax(-1))
    near(found.weights, share, 1e-6)


def test_router_of_half_precision_tokens_and_fp32_weights():
    router, x = drawn(Router(make_config(4, 2)), torch.float32), draw(N, D, dtype=torch.bfloat16)
    found = route(on_device(x, torch.bfloat16), on_device(router.weight, torch.float32), 2)
    near(found.logits, router(x.float())[0].detach(), 1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_token_and_in_bounds(poison):
    x, weight = draw(20, D, dtype=torch.float32).float(), draw(16, D, dtype=torch.float32, seed=5).float()
    x[3, 0] = poison
    found = route(on_device(x), on_device(weight), 3)
    wrong = found.weights.cpu().isnan().any(-1)
    assert wrong.nonzero().flatten().tolist() == [3]
    assert 0 <= found.experts.min() and found.experts.max() < 16
    assert len(found.experts[3].unique()) == 3


@choices
def test_router_backward(small_tiles, e, k):
    router, x = drawn(Router(make_config(e, k)), torch.float32), draw(N, D, dtype=torch.float32)
    direction = draw(2, N, e, dtype=torch.float32, seed=4).float()

    def gradients(give, x, weight):
        x, weight = x.requires_grad_(), weight.requires_grad_()
        logits, weights = give(x, weight)
        return torch.autograd.grad(
            (logits * direction[0].to(x)).sum() + (weights * direction[1].to(x)).sum(), (x, weight)
        )

    def loop(x, _):
        logits, weights, experts = router(x)
        return logits, torch.zeros(N, e).scatter(1, experts, weights)

    expected = gradients(loop, x.float(), router.float().weight)
    found = gradients(lambda x, w: route(x, w, k)[:2], on_device(x.float()), on_device(router.weight))
    for name, a, b in zip(("x", "weight"), found, expected, strict=True):
        near(a, b, 1e-5, f"gradient of {name}")


# ----------------------------------------------------------------------------------------------------- delta experts


def make_delta(dtype, e: int, k: int, ranks: tuple[int, int] = (8, 16), act: str = "quick_gelu") -> DeltaExperts:
    return drawn(DeltaExperts(make_config(e, k, act), *ranks), dtype)


def of_loop(experts, x, weights, chosen) -> torch.Tensor:
    """What the readable loop says; of no tokens it cannot say anything."""
    return experts(x, weights, chosen).detach() if len(x) else x


def delta_on_device(experts: DeltaExperts, dtype, x, weights, order=None) -> torch.Tensor:
    packed = pack_delta(experts.to(DEVICE), dtype)
    experts.cpu()
    order = order_by_set(on_device(order)) if order is not None else None
    out = delta_ffn(packed, on_device(x, dtype), on_device(weights), order)
    assert out.dtype == dtype
    return out


@dtypes
@choices
@activations
def test_delta(small_tiles, dtype, act, e, k):
    experts, x = make_delta(dtype, e, k, act=act), draw(N, D, dtype=dtype)
    weights_NE, weights, chosen = routing(N, e, k)
    near(delta_on_device(experts, dtype, x, weights_NE), of_loop(experts, x, weights, chosen), TOLERANCE[dtype])


@tokens
@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("kind", ["mixed", "unused"])
def test_delta_of_any_number_of_tokens(small_tiles, monkeypatch, n, sort, split, kind):
    monkeypatch.setattr(kernels, "_delta_split", lambda *_: split)
    experts, x = make_delta(torch.float32, 4, 2), draw(n, D, dtype=torch.float32)
    weights_NE, weights, chosen = routing(n, 4, 2, kind)
    found = delta_on_device(experts, torch.float32, x, weights_NE, chosen if sort else None)
    near(found, of_loop(experts, x, weights, chosen), 1e-5)


@pytest.mark.parametrize("ranks", [(8, 8), (16, 64), (40, 24), (100, 136), (256, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_delta_of_any_rank(ranks, dtype):
    experts, x = make_delta(dtype, 4, 2, ranks), draw(70, D, dtype=dtype)
    weights_NE, weights, chosen = routing(70, 4, 2)
    found = delta_on_device(experts, dtype, x, weights_NE)
    near(found, of_loop(experts, x, weights, chosen), TOLERANCE[dtype])


def test_an_expert_that_a_token_did_not_choose_cannot_spoil_it():
    """Its hidden state may overflow: 0 times that is no number."""
    experts, x = make_delta(torch.float16, 4, 2), draw(N, D, dtype=torch.float16)
    weights_NE, weights, chosen = routing(N, 4, 2)
    with torch.no_grad():
        experts.fc1.bias[1] = float("inf")
    found, clean = delta_on_device(experts, torch.float16, x, weights_NE).cpu(), ~(chosen == 1).any(-1)
    assert 0 < clean.sum() < N
    near(found[clean], experts(x, weights, chosen)[clean].detach(), 4e-3)
    assert not found[~clean].isfinite().any()


def test_a_token_that_is_no_number_shows(small_tiles):
    experts, x = make_delta(torch.float32, 4, 2), draw(N, D, dtype=torch.float32)
    weights_NE, *_ = routing(N, 4, 2)
    weights_NE[5] = float("nan")
    found = delta_on_device(experts, torch.float32, x, weights_NE)
    assert (
        found.isnan().all(-1).nonzero().flatten().tolist() == [5] == found.isnan().any(-1).nonzero().flatten().tolist()
    )


def test_more_than_the_kernels_can_is_refused():
    with pytest.raises(ValueError, match="rank 256"):
        pack_delta(make_delta(torch.float32, 2, 1, (300, 8)))
    with pytest.raises(ValueError, match="16 experts"):
        pack_delta(make_delta(torch.float32, 17, 1))
    with pytest.raises(ValueError, match="16 experts"):
        route(torch.zeros(2, D), torch.zeros(17, D), 1)
