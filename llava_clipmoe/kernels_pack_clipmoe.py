"""The tensors of experts and of dense FFNs as the GPU kernels want them: made once, after loading.

Copied beside the weights of a saved model.

Shape suffixes:  D width   H FFN width   E experts
R1, R2 ranks of the differences of fc1 and fc2, padded to a multiple of 16
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .common_clipmoe import quick_gelu
from .experts_delta_clipmoe import DeltaExperts
from .kernels_base_clipmoe import MAX_RANK, refuse_experts

# --------------------------------------------------------------------------------------------- dense and whole experts


class PackedFFN(NamedTuple):
    """A dense FFN's tensors, or those of E whole experts (then each has E in front)."""

    weight1: torch.Tensor  # [H,D]
    bias1: torch.Tensor  # [H]
    weight2: torch.Tensor  # [D,H]
    bias2: torch.Tensor  # [D]
    quick: bool  # quick_gelu, else gelu


def pack_ffn(ffn: torch.nn.Module, dtype: torch.dtype | None = None) -> PackedFFN:
    """Of `Experts` or `CLIPMoEMLP`: the same memory where the dtype is the same."""
    tensors = (ffn.fc1.weight, ffn.fc1.bias, ffn.fc2.weight, ffn.fc2.bias)
    return PackedFFN(*(t.detach().to(dtype or t.dtype).contiguous() for t in tensors), ffn.act is quick_gelu)


# ------------------------------------------------------------------------------------------------------ delta experts


class PackedDelta(NamedTuple):
    """The tensors of `DeltaExperts`, laid out so that both of the large products are one each."""

    first: torch.Tensor  # [H + E R1, D]: the base's fc1, then every expert's `down` of fc1
    second: torch.Tensor  # [D, H + E R2 + 16]: the base's fc2, every expert's `up` of fc2, the biases of fc2, zeros
    up: torch.Tensor  # [E,H,R1] of fc1
    bias: torch.Tensor  # [E,H] of fc1
    down: torch.Tensor  # [E,R2,H] of fc2
    quick: bool  # quick_gelu, else gelu


def pack_delta(experts: DeltaExperts, dtype: torch.dtype | None = None) -> PackedDelta:
    """A copy, once, after loading. Ranks are padded with zeros to a multiple of 16, the E biases to 16:
    where rows start at multiples of 16 numbers, a kernel loads and stores 8 of them at once."""
    fc1, fc2, number = experts.fc1, experts.fc2, experts.num_experts
    refuse_experts(number)
    if max(fc1.up.shape[-1], fc2.up.shape[-1]) > MAX_RANK:
        ranks = f"{fc1.up.shape[-1]} and {fc2.up.shape[-1]}"
        raise ValueError(f"the kernels go up to rank {MAX_RANK}, this model has {ranks}: use the loop.")

    def padded(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        missing = -tensor.shape[dim] % 16
        return F.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, missing])

    with torch.no_grad():
        first = torch.cat([fc1.base, padded(fc1.down, 1).flatten(0, 1)])
        up2 = padded(fc2.up, 2).permute(1, 0, 2).flatten(1)  # [D, E R2]
        second = torch.cat([fc2.base, up2, padded(fc2.bias, 0).t()], dim=1)
        tensors = (first, second, padded(fc1.up, 2), fc1.bias, padded(fc2.down, 1))
        return PackedDelta(*(t.detach().to(dtype or t.dtype).contiguous() for t in tensors), experts.act is quick_gelu)


def share_delta(experts: DeltaExperts) -> PackedDelta:
    """`pack_delta` in the memory of the module: from now on its parameters are views of the packed tensors, with the
    same values, so that the weights are held once. Moving or casting the module takes them apart again."""
    packed = pack_delta(experts)
    for name, view in _views(packed, experts.fc1.up.shape[-1], experts.fc2.up.shape[-1]).items():
        parameter = experts.get_parameter(name)
        if view.shape != parameter.shape or view.dtype != parameter.dtype:
            raise ValueError(
                f"{name} is {parameter.dtype} {tuple(parameter.shape)}, its packed form {view.dtype} "
                f"{tuple(view.shape)}: all tensors of the experts must have one dtype."
            )
    for name, view in _views(packed, experts.fc1.up.shape[-1], experts.fc2.up.shape[-1]).items():
        experts.get_parameter(name).data = view
    return packed


def _views(packed: PackedDelta, rank1: int, rank2: int) -> dict[str, torch.Tensor]:
    """The parameters of the module as parts of the packed tensors, padding left out."""
    (e, hidden, r1), r2, d = packed.up.shape, packed.down.shape[1], len(packed.second)
    base2, up2, bias2 = packed.second.split([hidden, e * r2, packed.second.shape[1] - hidden - e * r2], dim=1)
    return {
        "fc1.base": packed.first[:hidden],
        "fc1.down": packed.first[hidden:].view(e, r1, -1)[:, :rank1],
        "fc1.up": packed.up[..., :rank1],
        "fc1.bias": packed.bias,
        "fc2.base": base2,
        "fc2.up": up2.view(d, e, r2).permute(1, 0, 2)[..., :rank2],
        "fc2.bias": bias2[:, :e].t(),
        "fc2.down": packed.down[:, :rank2],
    }
