"""FFNs without a graph on a CPU: the same results as the readable loops, with fewer copies.

Shape suffixes:  N tokens   D width   H FFN width   E experts   K experts per token   M = N*K token-expert pairs
r rank of a difference   G tokens of one group
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .common_clipmoe import QUICK, inverse, working_dtype


def quick_gelu_(x: torch.Tensor) -> torch.Tensor:
    """`quick_gelu` in place: no copies of the FFN's width."""
    return F.silu(x.mul_(QUICK), inplace=True).div_(QUICK)


def read_whole(experts, x_MD, counts, order_M, weights_NK) -> torch.Tensor:
    """The rest of the loop where no graph is built. Results overwrite their tokens, and few tensors are held at a time:
    memory that one block frees at its end, the next one must fetch from the system again, page by page."""
    y_MD = x_MD.to(working_dtype(x_MD))
    for e, (rows, own) in enumerate(_slices(counts, step=16 if few_sizes_pay(x_MD) else 1)):
        y_MD[rows][own] = _in_place(experts, y_MD[rows], e)[own]
    place_NK = inverse(order_M).view(weights_NK.shape)
    weights_NK = weights_NK.to(y_MD.dtype)
    out_ND = y_MD[place_NK[:, 0]].mul_(weights_NK[:, :1])
    for k in range(1, weights_NK.shape[1]):
        out_ND.addcmul_(y_MD[place_NK[:, k]], weights_NK[:, k : k + 1])
    return out_ND


def _in_place(experts, x: torch.Tensor, expert: int) -> torch.Tensor:
    """`single` where no graph is built: quick_gelu(x) = silu(1.702 x) / 1.702, one pass and no copy of [..,H]; the
    factors ride on the products. Elementwise passes are a quarter of a bf16 FFN's time on a CPU."""
    h = torch.addmm(experts.fc1.bias[expert], x, experts.fc1.weight[expert].t(), beta=QUICK, alpha=QUICK)
    h = F.silu(h, inplace=True)
    return torch.addmm(experts.fc2.bias[expert], h, experts.fc2.weight[expert].t(), alpha=1 / QUICK)


def read_delta(experts, parts, x_ND, weights_NK, experts_NK) -> torch.Tensor:
    """Without a graph, for the CPU: tokens sorted by the SET of experts that they use (6 sets of 2 out of 4), so
    that a group is one slice for all its experts and nothing of width H is ever gathered or copied."""
    fc1, fc2, dtype = *parts, working_dtype(x_ND)
    order_N, groups = _sort_by_set(experts_NK, experts.num_experts)
    if groups and few_sizes_pay(x_ND):
        order_N, groups = _even(order_N, groups, experts.num_experts)
    weights_NE = torch.zeros(len(x_ND), experts.num_experts, device=x_ND.device).scatter(1, experts_NK, weights_NK)
    weights_NE = (weights_NE[order_N] / experts.scale).to(dtype)
    x_ND = x_ND[order_N].to(dtype)
    z_NEr = F.linear(x_ND, fc1.down.flatten(0, 1)).mul_(experts.scale).unflatten(1, (experts.num_experts, -1))
    h_NH = torch.addmm(fc1.bias[0], x_ND, fc1.base.t(), beta=experts.scale, alpha=experts.scale)
    y_ND = torch.mm(weights_NE * experts.scale, fc2.bias, out=x_ND)  # over x, which is needed no more
    spare = h_NH.new_empty(max(((len(chosen) - 1) * count for chosen, count in groups), default=0), h_NH.shape[1])
    shift_EH = (fc1.bias - fc1.bias[0]) * experts.scale
    start = 0
    for chosen, count in groups:
        rows = slice(start, start := start + count)
        _group(experts, h_NH[rows], y_ND[rows], z_NEr[rows], weights_NE[rows], chosen, spare, fc1.up, shift_EH, fc2)
    y_ND.addmm_(h_NH, fc2.base.t())
    del h_NH, spare  # before the result is made, which then takes their memory
    return y_ND[inverse(order_N)]


def _group(experts, h_GH, y_GD, z_GEr, weights_GE, chosen, spare, up1_EHr, shift_EH, fc2) -> None:
    """Tokens that use the experts `chosen`, in place: h_GH, the base's part of the first projection, becomes
    sum_k w_k h_k; the low-rank part of the second projection is added to y_GD. spare: room for the other h_k."""
    last, *others = chosen
    hidden = {}
    for e, h in zip(others, spare.split(len(h_GH)), strict=False):
        torch.add(h_GH, shift_EH[e], out=h)
        hidden[e] = _activate_(experts, h.addmm_(z_GEr[:, e], up1_EHr[e].t()))
    if last:  # expert 0's bias is in already
        h_GH.add_(shift_EH[last])
    hidden[last] = _activate_(experts, h_GH.addmm_(z_GEr[:, last], up1_EHr[last].t()))  # the base's part is used up
    for e in chosen:
        y_GD.addmm_((hidden[e] @ fc2.down[e].t()) * weights_GE[:, e : e + 1], fc2.up[e].t())
    h_GH.mul_(weights_GE[:, last : last + 1])
    for e in others:
        h_GH.addcmul_(hidden[e], weights_GE[:, e : e + 1])


def _activate_(experts, h: torch.Tensor) -> torch.Tensor:
    """h becomes scale * act(h / scale): quick_gelu(x) = silu(1.702 x) / 1.702 needs no copy."""
    return F.silu(h, inplace=True) if experts.scale != 1.0 else h.copy_(experts.act(h))


Groups = list[tuple[list[int], int]]
"""Tokens that lie together: the experts that they use and how many they are."""


def _sort_by_set(experts_NK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, Groups]:
    """-> order [N] of the tokens, grouped by the set of their experts, and the groups."""
    code_N = (1 << experts_NK).sum(-1)
    sorted_N, order_N = code_N.sort(stable=True)
    codes, counts = sorted_N.unique_consecutive(return_counts=True)
    sets = [[e for e in range(num_experts) if code >> e & 1] for code in codes.tolist()]
    return order_N, list(zip(sets, counts.tolist(), strict=True))


def _even(order_N: torch.Tensor, groups: Groups, num_experts: int) -> tuple[torch.Tensor, Groups]:
    """Round every group's size down to a multiple of one step. The tokens that are left over form a last group, which
    runs all experts (one that a token did not choose has weight 0). See `few_sizes_pay`."""
    step = max(1, len(order_N) // (8 * len(groups)))  # a sixteenth of the tokens is over, on average
    kept, over = [], []
    for part in order_N.split([count for _, count in groups]):
        whole = len(part) // step * step
        kept.append(part[:whole])
        over.append(part[whole:])
    rest = torch.cat(over)
    sets = [chosen for chosen, _ in groups]
    groups = [*zip(sets, map(len, kept), strict=True), (list(range(num_experts)), len(rest))]
    return torch.cat([*kept, rest]), [(chosen, count) for chosen, count in groups if count]


def _slices(counts: list[int], step: int) -> Iterator[tuple[slice, slice]]:
    """For groups that lie one after the other: the rows of each, made up to a multiple of `step` by its neighbours'
    (whose results are thrown away), and where its own lie in them. See `few_sizes_pay`."""
    start, total = 0, sum(counts)
    for count in counts:
        size = min(-(-count // step) * step, total)
        first = min(start, total - size)
        yield slice(first, first + size), slice(start - first, start - first + count)
        start += count


def few_sizes_pay(x: torch.Tensor) -> bool:
    """True where products of many sizes are dear: in half precision oneDNN compiles a kernel for every size and keeps
    it, 130 MB for one picture of ViT-L/14@336, and other sizes with the next picture."""
    return x.device.type == "cpu" and working_dtype(x).itemsize == 2
