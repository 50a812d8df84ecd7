"""Every kernel against the readable loop, forward and backward. Run by `test_kernels.py`, see there.

The loop runs on the CPU in fp64, with the tensors that the kernel gets (rounded to its dtype). Most tests take tiles of
16, so that small shapes have several of them and hang over their edges.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llava_clipmoe import kernels_clipmoe as kernels
from llava_clipmoe import kernels_delta_clipmoe, kernels_whole_clipmoe
from llava_clipmoe.experts_clipmoe import Experts, Router
from llava_clipmoe.experts_delta_clipmoe import DeltaExperts
from llava_clipmoe.files import load_tensors, save_tensors
from llava_clipmoe.kernels_base_clipmoe import TILES, Tile, sort_experts
from llava_clipmoe.kernels_clipmoe import (
    PackedFFN,
    add_layer_norm,
    delta_ffn,
    dense_ffn,
    ffn,
    fuse,
    order_by_set,
    pack_delta,
    pack_ffn,
    route,
    share_delta,
    whole_ffn,
)
from llava_clipmoe.transformer_clipmoe import CLIPMoEMLP, CLIPMoESparseMLP

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
D, H, N = 24, 40, 21
"""No multiples of a tile of 16, and few: Triton's interpreter needs its time for each program."""

dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp16", "bf16"])
# E and K: the usual, one expert a token, all of them, the most; every dtype and activation, not every combination.
CASES = [
    (torch.float32, "quick_gelu", 4, 2), (torch.float16, "gelu", 4, 2), (torch.bfloat16, "quick_gelu", 3, 3),
    (torch.float32, "gelu", 2, 1), (torch.float16, "quick_gelu", 16, 3),
]  # fmt: skip
cases = pytest.mark.parametrize(
    ("dtype", "act", "e", "k"), CASES, ids=[f"{dtype}"[6:] + f"-{act}-e{e}k{k}" for dtype, act, e, k in CASES]
)


@pytest.fixture
def small_tiles(monkeypatch):
    for kind, size in TILES:
        inner = 2 if kind.startswith("delta") else 16
        monkeypatch.setitem(TILES, (kind, size), {0: Tile(16, 16, inner, 4, 1)})


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


@pytest.mark.parametrize(
    ("dtype", "n", "e", "k"),
    [(torch.float32, 0, 4, 2), (torch.float32, 1, 4, 2), *((dtype, N, e, k) for dtype, _, e, k in CASES)],
)
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
    logits = torch.randint(0, 3, (60, e), generator=torch.Generator().manual_seed(0)).float()
    found = route(on_device(logits), torch.eye(e, device=DEVICE), k)
    assert torch.equal(found.logits.cpu(), logits)
    expected = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(found.experts.cpu(), expected)
    share = torch.zeros(60, e).scatter(1, expected, logits.gather(1, expected).softmax(-1))
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


@pytest.mark.parametrize(("e", "k"), [(4, 2), (3, 3), (2, 1)])
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


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32])
def test_router_of_a_large_tower_is_exact(weight_dtype):
    """ViT-L's width: products of half-precision numbers are summed in fp32, and an fp32 weight is not rounded."""
    x, weight = draw(18, 1024, dtype=torch.float16), draw(4, 1024, dtype=weight_dtype, seed=5)
    found = route(on_device(x, torch.float16), on_device(weight, weight_dtype), 2)
    near(found.logits, x @ weight.t(), 2e-5)  # a GPU cuts off a little at each of its sums; rounding would be 1e-4


# -------------------------------------------------------------------------------------------------------------- sort


@pytest.mark.parametrize(("n", "e", "k"), [(0, 4, 2), (1, 2, 1), (5, 4, 2), (100, 16, 3)])
def test_pairs_sorted_by_expert(small_tiles, n, e, k):
    experts = routing(n, e, k)[2] if n else torch.zeros(0, k, dtype=torch.int64)
    found = sort_experts(on_device(experts), e)
    expected = experts.flatten().argsort(stable=True)
    assert torch.equal(found.order.cpu().long(), expected)
    assert torch.equal(found.places.cpu().long()[expected], torch.arange(n * k))
    assert found.ends.tolist() == experts.flatten().bincount(minlength=e).cumsum(0).tolist()


@pytest.mark.parametrize("small", [True, False])
def test_tokens_sorted_by_their_set_of_experts(request, small):
    if small:
        request.getfixturevalue("small_tiles")
    experts = routing(300, 4, 3)[2]
    assert torch.equal(order_by_set(on_device(experts), 4).cpu(), order_by_set(experts).int())


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


@cases
def test_delta(small_tiles, dtype, act, e, k):
    experts, x = make_delta(dtype, e, k, act=act), draw(N, D, dtype=dtype)
    weights_NE, weights, chosen = routing(N, e, k)
    near(delta_on_device(experts, dtype, x, weights_NE), of_loop(experts, x, weights, chosen), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("n", "kind", "split", "sort"),
    [(0, "mixed", 1, False), (0, "unused", 3, True), (1, "mixed", 3, False), (N, "unused", 1, True),
     (N, "unused", 3, True)],
)  # fmt: skip
def test_delta_of_any_number_of_tokens(small_tiles, monkeypatch, n, sort, split, kind):
    monkeypatch.setattr(kernels_delta_clipmoe, "_delta_split", lambda *_: split)
    experts, x = make_delta(torch.float32, 4, 2), draw(n, D, dtype=torch.float32)
    weights_NE, weights, chosen = routing(n, 4, 2, kind)
    found = delta_on_device(experts, torch.float32, x, weights_NE, chosen if sort else None)
    near(found, of_loop(experts, x, weights, chosen), 1e-5)


@pytest.mark.parametrize(
    ("ranks", "dtype"),
    [((8, 64), torch.float32), ((40, 24), torch.float16), ((136, 100), torch.float32), ((256, 256), torch.float16)],
)
def test_delta_of_any_rank(ranks, dtype):
    experts, x = make_delta(dtype, 4, 2, ranks), draw(N, D, dtype=dtype)
    weights_NE, weights, chosen = routing(N, 4, 2)
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


@pytest.mark.parametrize(("e", "k", "step", "split"), [(5, 5, 1, 1), (5, 5, 2, 2), (3, 1, 2, 1)])
def test_delta_of_some_experts_at_a_time(monkeypatch, e, k, step, split):
    """A tile whose tokens use many experts takes several launches, which add to what is there; here H is a multiple of
    the tile's columns, too."""
    monkeypatch.setitem(globals(), "H", 48)
    for kind in ("delta of rank 64", "delta back of rank 64"):
        monkeypatch.setitem(TILES, (kind, 4), {0: Tile(16, 16, step, 4, 1)})
    monkeypatch.setattr(kernels_delta_clipmoe, "_delta_split", lambda *_: split)
    experts, x = make_delta(torch.float32, e, k), draw(N, D, dtype=torch.float32)
    _, weights, chosen = routing(N, e, k)
    packed = packed_on_device(experts, torch.float32)

    def give(x, w):
        return delta_ffn(packed, x, spread(w, on_device(chosen), e))

    near(give(on_device(x.float()), on_device(weights)), experts(x, weights, chosen).detach(), 1e-5)
    found = gradients(give, on_device(x.float()), on_device(weights))
    near_gradients(found, gradients(lambda x, w: experts(x, w, chosen), x, weights.double()), 2e-5)


def test_few_tokens_are_not_sorted(monkeypatch):
    chosen = torch.tensor([[2, 0], [1, 3], [0, 2], [3, 1], [0, 1]])
    assert kernels.order_if_it_pays(chosen) is None
    monkeypatch.setattr(kernels_delta_clipmoe, "SORT_FROM", 5)
    assert kernels.order_if_it_pays(chosen).tolist() == [4, 0, 2, 1, 3]


def test_tokens_without_any_expert_get_zeros(small_tiles):
    """A tile of them too: nothing is left as the memory was."""
    experts, x = make_delta(torch.float32, 4, 2), on_device(draw(36, D, dtype=torch.float32), torch.float32)
    packed = pack_delta(experts.to(DEVICE), torch.float32)
    weights = on_device(routing(36, 4, 2)[0])
    weights[10:] = 0.0
    x.requires_grad_()
    found = delta_ffn(packed, x, weights)
    (x_grad,) = torch.autograd.grad(found.sum(), x)
    for tensor in (found, x_grad):
        assert not tensor[10:].any() and tensor[:10].all() and tensor.isfinite().all()


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


def gradients(give, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Of the sum of give(*inputs) times fixed random numbers, with respect to the inputs."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = give(*inputs)
    direction = draw(*out.shape, dtype=torch.bfloat16, seed=4)
    return torch.autograd.grad((out * direction.to(out)).sum(), inputs)


def near_gradients(found, expected, tolerance: float, names=("x", "weights")) -> None:
    for name, a, b in zip(names, found, expected, strict=True):
        near(a, b, tolerance, f"gradient of {name}")


def spread(weights_NK: torch.Tensor, chosen_NK: torch.Tensor, e: int) -> torch.Tensor:
    return weights_NK.new_zeros(len(weights_NK), e).scatter(1, chosen_NK, weights_NK)


BACKWARD = [
    (torch.float32, "quick_gelu", 4, 2), (torch.float32, "gelu", 5, 3), (torch.float16, "gelu", 4, 2),
    (torch.bfloat16, "quick_gelu", 3, 3),
]  # fmt: skip
backward = pytest.mark.parametrize(("dtype", "act", "e", "k"), BACKWARD, ids=["fp32", "fp32-e5k3", "fp16", "bf16-e3k3"])


def packed_on_device(experts: DeltaExperts, dtype) -> kernels.PackedDelta:
    packed = pack_delta(experts, dtype)
    return packed._replace(**{name: on_device(getattr(packed, name)) for name in packed._fields[:-1]})


@pytest.fixture
def poisoned():
    """Memory that nobody has written holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("split", [1, 2])
def test_what_belongs_to_an_expert_that_was_not_chosen_is_zero(small_tiles, poisoned, monkeypatch, split):
    """Of tiles that do not use it at all, too."""
    monkeypatch.setattr(kernels_delta_clipmoe, "_delta_split", lambda *_: split)
    experts, x = make_delta(torch.float32, 4, 2), draw(N, D, dtype=torch.float32)
    weights_NE, weights, chosen = routing(N, 4, 2, "unused")
    given, x_there = on_device(weights_NE).requires_grad_(), on_device(x.float()).requires_grad_()
    assert torch.empty(3).isnan().all()
    out = delta_ffn(packed_on_device(experts, torch.float32), x_there, given)
    near(out, experts(x, weights, chosen).detach(), 1e-5)
    out.sum().backward()
    assert x_there.grad.isfinite().all()
    assert torch.equal(given.grad.cpu() != 0, weights_NE != 0)


@pytest.mark.parametrize(
    ("dtype", "act", "e", "k", "sort", "split"),
    [(*BACKWARD[0], False, 1), *((*case, True, split) for case, split in zip(BACKWARD, (1, 2, 1, 2), strict=True))],
)
def test_delta_backward(small_tiles, monkeypatch, dtype, act, e, k, sort, split):
    monkeypatch.setattr(kernels_delta_clipmoe, "_delta_split", lambda *_: split)
    experts, x = make_delta(dtype, e, k, (24, 16), act), draw(N, D, dtype=dtype)
    _, weights, chosen = routing(N, e, k, "unused")
    packed, there = packed_on_device(experts, dtype), on_device(chosen)
    order = order_by_set(there) if sort else None
    found = gradients(
        lambda x, w: delta_ffn(packed, x, spread(w, there, e), order), on_device(x, dtype), on_device(weights)
    )
    expected = gradients(lambda x, w: experts(x, w, chosen), x, weights.double())
    near_gradients(found, expected, 2 * TOLERANCE[dtype])


def test_few_tokens_split_the_width():
    """Each part has at least five tiles of columns, and there are no more parts than the card needs."""
    split, large = kernels_delta_clipmoe._delta_split, Tile(128, 64, 2, 8, 2)
    assert split(577, 4096, Tile(32, 64, 2, 4, 2)) == split(577, 4096, large) == 4096 // (5 * 64)
    assert split(32 * 577, 4096, large) == 4
    assert split(10**6, 4096, large) == 1
    assert split(0, 40, large) == 1


def test_few_tokens_take_smaller_tiles():
    experts = make_delta(torch.float16, 4, 2, (64, 64))
    packed = packed_on_device(experts, torch.float16)

    def rows(kind: str, n: int) -> int:
        return kernels_delta_clipmoe._plan(kind, packed, torch.zeros(n, 1, dtype=torch.float16), None).tile.rows

    few = kernels_delta_clipmoe.FEW_TOKENS
    assert rows("delta", few) == TILES["delta of rank 64, few tokens", 2][0].rows != rows("delta", few + 1)
    assert rows("delta back", few) == rows("delta back", few + 1)  # none of its own in the table


@pytest.mark.parametrize(("ranks", "e"), [((16, 32), 4), ((8, 24), 3)], ids=["no padding", "padding"])
def test_weights_are_held_once(ranks, e, tmp_path):
    """The module's parameters become views of the packed tensors: same values, same output, same files."""
    experts, x = make_delta(torch.float32, e, 2, ranks).float(), draw(N, D, dtype=torch.float32).float()
    _, weights, chosen = routing(N, e, 2)
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    said = experts(x, weights, chosen)
    packed, expected = share_delta(experts), pack_delta(experts)
    assert all(torch.equal(a, b) for a, b in zip(packed[:-1], expected[:-1], strict=True)) and packed.quick

    after = experts.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(experts(x, weights, chosen), said)
    assert {p.untyped_storage().data_ptr() for p in experts.parameters()} == {
        tensor.untyped_storage().data_ptr() for tensor in packed[:-1]
    }
    (d, width2), r1, r2 = packed.second.shape, packed.up.shape[2], packed.down.shape[1]
    numbers = (H + e * r1) * D + d * width2 + e * H * (r1 + 1 + r2)
    assert sum(tensor.untyped_storage().nbytes() for tensor in packed[:-1]) == 4 * numbers
    if ranks == (16, 32):  # then all that is new are the zeros beside the biases of fc2
        assert numbers == sum(tensor.numel() for tensor in before.values()) + (16 - e) * D

    save_tensors(tmp_path / "experts.safetensors", after)
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in load_tensors(tmp_path / "experts.safetensors").items()
    )
    experts.load_state_dict({name: 2 * tensor for name, tensor in before.items()})  # in place: the kernels see it
    assert torch.equal(packed.second[:, :H], 2 * before["fc2.base"])


def test_experts_of_several_dtypes_are_not_shared():
    experts = make_delta(torch.float32, 4, 2)
    experts.fc1.base.data = experts.fc1.base.data.float()
    with pytest.raises(ValueError, match="one dtype"):
        share_delta(experts)
    assert experts.fc1.base.dtype == torch.float32 and experts.fc2.base.dtype == torch.float64


# ----------------------------------------------------------------------------------------------------- whole experts


def make_whole(dtype, e: int, k: int, act: str = "quick_gelu") -> tuple[Experts, PackedFFN]:
    experts = drawn(Experts(make_config(e, k, act)), dtype)
    packed = pack_ffn(experts, dtype)
    return experts, packed._replace(**{name: on_device(getattr(packed, name)) for name in packed._fields[:-1]})


@pytest.fixture(params=["own kernel", "grouped_mm"])
def both_products(request, monkeypatch):
    """torch's grouped_mm does the products, or the kernel here: on a GPU the dtype and the card decide. On a CPU torch
    has it too, on a GPU for bf16 alone."""
    torch_does_it = request.param == "grouped_mm"
    if torch_does_it and not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    monkeypatch.setattr(
        kernels_whole_clipmoe, "uses_grouped_mm", lambda x: torch_does_it and (DEVICE == "cpu" or x.itemsize == 2)
    )


def test_few_rows_take_small_tiles():
    like = torch.zeros(1, dtype=torch.float16, device=DEVICE)
    assert kernels_whole_clipmoe.grouped_kind(2 * 577, 1024, like) == "grouped, few rows"
    assert kernels_whole_clipmoe.grouped_kind(64 * 577, 1024, like) == "grouped"


def test_grouped_mm_is_for_hopper_and_bf16():
    x = torch.zeros(2, 2, dtype=torch.bfloat16, device=DEVICE)
    fused = (
        DEVICE == "cuda" and torch.cuda.get_device_capability() >= (9, 0) and hasattr(torch.nn.functional, "grouped_mm")
    )
    assert kernels_whole_clipmoe.uses_grouped_mm(x) == fused
    assert not kernels_whole_clipmoe.uses_grouped_mm(x.half())


@cases
def test_whole(small_tiles, both_products, dtype, act, e, k):
    (experts, packed), x = make_whole(dtype, e, k, act), draw(N, D, dtype=dtype)
    weights_NE, weights, chosen = routing(N, e, k)
    found = whole_ffn(packed, on_device(x, dtype), on_device(weights_NE), on_device(chosen))
    assert found.dtype == dtype
    near(found, of_loop(experts, x, weights, chosen), TOLERANCE[dtype])


@pytest.mark.parametrize(("n", "kind", "small"), [(0, "mixed", False), (1, "mixed", False), (1, "unused", True),
                                                   (N, "unused", True)])  # fmt: skip
def test_whole_of_any_number_of_tokens(request, both_products, n, kind, small):
    if small:
        request.getfixturevalue("small_tiles")
    (experts, packed), x = make_whole(torch.float32, 4, 2), draw(n, D, dtype=torch.float32)
    weights_NE, weights, chosen = routing(n, 4, 2, kind)
    found = whole_ffn(packed, on_device(x, torch.float32), on_device(weights_NE), on_device(chosen))
    near(found, of_loop(experts, x, weights, chosen), 1e-5)


@pytest.mark.parametrize(("width", "hidden"), [(32, 48), (24, 40)], ids=["even", "uneven"])
def test_whole_in_many_tiles(monkeypatch, width, hidden):
    """Several groups of tiles, the last of them smaller; sizes that are multiples of the tile (no masks) and not."""
    monkeypatch.setitem(globals(), "D", width)
    monkeypatch.setitem(globals(), "H", hidden)
    monkeypatch.setitem(TILES, ("grouped", 4), {0: Tile(16, 16, 16, 4, 1)})
    monkeypatch.setattr(kernels_whole_clipmoe, "FEW_TILES", 0)
    monkeypatch.setattr(kernels_whole_clipmoe, "GROUP", 3)
    (experts, packed), x = make_whole(torch.float32, 4, 2), draw(70, D, dtype=torch.float32)
    weights_NE, weights, chosen = routing(70, 4, 2)
    found = whole_ffn(packed, on_device(x.float()), on_device(weights_NE), on_device(chosen))
    near(found, experts(x, weights, chosen).detach(), 1e-5)


@backward
def test_whole_backward(small_tiles, both_products, dtype, act, e, k):
    (experts, packed), x = make_whole(dtype, e, k, act), draw(N, D, dtype=dtype)
    _, weights, chosen = routing(N, e, k, "unused")
    there = on_device(chosen)
    found = gradients(
        lambda x, w: whole_ffn(packed, x, spread(w, there, e), there), on_device(x, dtype), on_device(weights)
    )
    near_gradients(found, gradients(lambda x, w: experts(x, w, chosen), x, weights.double()), 2 * TOLERANCE[dtype])


# -------------------------------------------------------------------------------- dense FFN, gate, residual and norm


DENSE = pytest.mark.parametrize(("dtype", "act", "n"), [
    (torch.float32, "quick_gelu", 0), (torch.float32, "gelu", N), (torch.float16, "quick_gelu", N),
    (torch.bfloat16, "gelu", 1),
])  # fmt: skip


@DENSE
def test_dense(small_tiles, dtype, act, n):
    mlp, x = drawn(CLIPMoEMLP(make_config(1, 1, act)), dtype), draw(n, D, dtype=dtype)
    packed = pack_ffn(mlp, dtype)
    packed = packed._replace(**{name: on_device(getattr(packed, name)) for name in packed._fields[:-1]})
    near(dense_ffn(packed, on_device(x, dtype)), mlp(x)[0].detach(), TOLERANCE[dtype])
    found = gradients(lambda x: dense_ffn(packed, x), on_device(x, dtype))
    near_gradients(found, gradients(lambda x: mlp(x)[0], x), 2 * TOLERANCE[dtype], ["x"])


@DENSE
def test_dense_in_training(small_tiles, dtype, act, n):
    mlp, x = drawn(CLIPMoEMLP(make_config(1, 1, act)), dtype), draw(n, D, dtype=dtype)
    weights = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    inputs = [on_device(tensor, dtype) for tensor in (x, *weights)]

    def kernel(*tensors):
        return ffn(*tensors, act == "quick_gelu")

    def loop(x, w1, b1, w2, b2):
        return torch.nn.functional.linear(mlp.act(torch.nn.functional.linear(x, w1, b1)), w2, b2)

    near(kernel(*inputs), mlp(x)[0].detach(), TOLERANCE[dtype])
    found, names = gradients(kernel, *inputs), ["x", "weight1", "bias1", "weight2", "bias2"]
    near_gradients(found, gradients(loop, x, *weights), 2 * TOLERANCE[dtype], names)


@pytest.mark.parametrize("wanted", [(0,), (1, 4), (2, 3), (1, 2, 3, 4)], ids=str)
def test_dense_in_training_gives_what_is_asked_for(wanted):
    mlp = drawn(CLIPMoEMLP(make_config(1, 1)), torch.float32)
    tensors = [draw(N, D, dtype=torch.float32), mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias]
    tensors = [on_device(tensor.float()).requires_grad_(i in wanted) for i, tensor in enumerate(tensors)]
    expected = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    for _ in range(2):  # again: nothing that was kept is written over
        out = ffn(*tensors, True)
        out.sum().backward(retain_graph=True)
        out.sum().backward()
    (4 * ffn(*expected, True).sum()).backward()
    for i, (tensor, other) in enumerate(zip(tensors, expected, strict=True)):
        assert (tensor.grad is not None) == (i in wanted)
        if i in wanted:
            near(tensor.grad, other.grad.cpu(), 1e-5)


def test_dense_in_training_keeps_one_hidden_tensor():
    kept, mlp = [], drawn(CLIPMoEMLP(make_config(1, 1)), torch.float32).float().to(DEVICE)
    x = on_device(draw(N, D, dtype=torch.float32).float())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ffn(x, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, True)
    assert sum(tensor.shape == (N, H) for tensor in kept) == 1


def gated(e: int, k: int, dtype) -> CLIPMoESparseMLP:
    config = make_config(e, k)
    config.fusion_gate, config.fusion_gate_init, config.delta_ranks = True, 0.5, None
    return drawn(CLIPMoESparseMLP(config), dtype)


@pytest.mark.parametrize(("dtype", "n"), [(torch.float32, N), (torch.float16, 1), (torch.bfloat16, N)])
def test_gate(small_tiles, dtype, n):
    block = gated(4, 2, dtype)
    x, y, gate = draw(n, D, dtype=dtype), draw(n, D, dtype=dtype, seed=5), block.fusion_gate
    base = block.base(x)[0].detach().to(dtype).double()

    def loop(x, weight, bias, base, y):
        share = torch.nn.functional.linear(x, weight, bias).sigmoid()
        return share * base + (1 - share) * y

    inputs = (x, gate.weight, gate.bias, base, y)
    near(fuse(*(on_device(t, dtype) for t in inputs)), loop(*inputs).detach(), TOLERANCE[dtype])
    found = gradients(fuse, *(on_device(t, dtype) for t in inputs))
    names = ["x", "weight", "bias", "base", "y"]
    near_gradients(found, gradients(loop, *inputs), 2 * TOLERANCE[dtype], names)


@pytest.mark.parametrize(("dtype", "e", "k"), [(torch.float32, 1, 1), (torch.float16, 4, 2)], ids=["e1k1", "e4k2"])
def test_a_whole_block_with_a_gate(small_tiles, dtype, e, k):
    """CLIP-FMoE's FFN from its four pieces; and one expert alone has weight 1."""
    block, x = gated(e, k, dtype), draw(N, D, dtype=dtype)
    with torch.no_grad():
        expected, _ = block.float()(x[None].float())
    x, (weight, bias) = on_device(x, dtype), (on_device(t, dtype) for t in block.fusion_gate.parameters())
    said = route(x, on_device(block.router.weight, dtype), k)
    base, whole = (pack_ffn(part.to(DEVICE), dtype) for part in (block.base, block.experts))
    found = fuse(x, weight, bias, dense_ffn(base, x), whole_ffn(whole, x, said.weights, said.experts))
    near(found, expected[0], TOLERANCE[dtype])
    assert e > 1 or said.weights.eq(1).all()


@dtypes
@pytest.mark.parametrize(("n", "d"), [(0, D), (1, 33), (9, D)])
def test_residual_and_layer_norm(dtype, n, d):
    x, y = 5 + 3 * draw(n, d, dtype=dtype), draw(n, d, dtype=dtype, seed=5)
    weight, bias = draw(d, dtype=dtype, seed=6), draw(d, dtype=dtype, seed=7)
    given = [on_device(t, dtype) for t in (x, y, weight, bias)]
    both, norm = add_layer_norm(*given, 1e-3)
    if dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter cuts what does not fit, a GPU rounds
        near(both, x + y, 2**-7)
    else:
        assert torch.equal(both, given[0] + given[1])
    expected = torch.nn.functional.layer_norm(both.double().cpu(), (d,), weight, bias, 1e-3)
    near(norm, expected, TOLERANCE[dtype])


# ------------------------------------------------------------------------------------------------ what goes for all


@dtypes
def test_check_is_content(dtype):
    assert kernels.check(DEVICE, dtype) is None


def test_check_is_content_where_llava_asks():
    with torch.inference_mode():
        assert kernels.check(DEVICE, torch.float16) is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_check_is_content_inside_a_checkpointed_block(reentrant):
    """Where a training with gradient checkpointing asks first. The checkpoint counts what is kept for its backward,
    and a tensor of `check`'s that is asked for would make it compute the block again, `check` included."""
    said = []

    def block(x):
        if not said:
            said.append(kernels.check(DEVICE, torch.float16))
        return (x * x).exp().sum()

    x = torch.ones(3, device=DEVICE, requires_grad=True)
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant).backward()
    assert said == [None]
    torch.testing.assert_close(x.grad, 2 * torch.e * torch.ones_like(x))


def test_check_says_what_is_wrong(monkeypatch):
    assert "float64" in kernels.check(DEVICE, torch.float64)
    monkeypatch.setattr(kernels, "fuse", lambda x, weight, bias, base, y: base)
    assert "fusion gate" in kernels.check(DEVICE, torch.float32)

    def broken(*_):
        raise RuntimeError("out of resource\nand a long story")

    monkeypatch.setattr(kernels, "whole_ffn", broken)
    said = kernels.check(DEVICE, torch.float32)
    assert said.startswith("RuntimeError") and said.endswith("out of resource")


def test_no_gradient_of_any_expert_is_computed():
    """Experts are frozen in the router step, and their tensors are packed without a graph."""
    experts, x = make_delta(torch.float32, 4, 2), draw(5, D, dtype=torch.float32).float().to(DEVICE)
    weights_NE = on_device(routing(5, 4, 2)[0]).requires_grad_()
    delta_ffn(pack_delta(experts.to(DEVICE), torch.float32), x, weights_NE).sum().backward()
    assert weights_NE.grad is not None and all(p.grad is None for p in experts.parameters())


def test_autocast_changes_nothing():
    """The products run in the dtype of the packed tensors."""
    (_, packed), x = make_whole(torch.float32, 4, 2), draw(9, D, dtype=torch.float32).float().to(DEVICE)
    one = PackedFFN(*(tensor[0] for tensor in packed[:4]), True)
    expected = dense_ffn(one, x)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(dense_ffn(one, x), expected)
