"""A tower's blocks on a GPU: the kernels in the place of the modules, and, without gradients, CUDA graphs.

Copied beside the weights of a saved model, and imported only on a GPU (see `kernels_for` in `gpu_clipmoe`). The
modules in `modeling_clipmoe` are what this must equal:

- `mixture` and `feed_forward` are one block's router and experts, and its dense FFN. With gradients too.
- `FastEncoder` is all blocks of a tower without gradients: q, k and v as one product, residual and layer norm as one
  pass, and for the small batches that come again a CUDA graph, which starts a few hundred kernels at once where Python
  would need milliseconds to start them one by one.

What is packed here is no second copy: the modules' parameters become views of it.

Shape suffixes:  B batch   T tokens   N = B*T   D width   E experts
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .common_clipmoe import quick_gelu, working_dtype
from .experts_delta_clipmoe import DeltaExperts
from .gpu_clipmoe import say_once
from .graphs_clipmoe import Graphs
from .kernels_clipmoe import (
    MAX_EXPERTS,
    MAX_RANK,
    PackedDelta,
    add_layer_norm,
    check,
    delta_ffn,
    dense_ffn,
    ffn,
    fuse,
    order_if_it_pays,
    pack_delta,
    pack_ffn,
    route,
    share_delta,
    whole_ffn,
)


@functools.cache
def runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """True where the kernels give the loop's results on this device. Otherwise one line says why, once a process."""
    why_not = check(device, dtype)
    if why_not is not None:
        say_once(f"the GPU kernels are not used, the slower loop is: {why_not}")
    return why_not is None


# --------------------------------------------------------------------------------------------------------- one block


def can_feed(mlp: nn.Module) -> bool:
    """True where `feed_forward` gives what `mlp` (a CLIPMoEMLP) would: nothing has replaced its layers (LoRA, 8 bits),
    listens to them or has sharded their weights."""
    return all(
        type(fc) is nn.Linear and fc.weight.numel() and not (fc._forward_hooks or fc._forward_pre_hooks)
        for fc in (mlp.fc1, mlp.fc2)
    )


def can_mix(block: nn.Module) -> bool:
    """True where `mixture` gives what `block` (a CLIPMoESparseMLP) would: its experts are frozen or nobody asks for a
    gradient, nothing is dropped, and there are not more of them than the kernels take."""
    experts = block.experts
    if experts.num_experts > MAX_EXPERTS or (experts.dropout and experts.training):
        return False
    if any(m._forward_hooks or m._forward_pre_hooks for m in (block.router, experts)) or not experts.fc1.bias.numel():
        return False  # somebody listens to them, or has sharded their weights
    if isinstance(experts, DeltaExperts) and max(_ranks(experts)) > MAX_RANK:
        return False
    return not torch.is_grad_enabled() or not any(p.requires_grad for p in _weights_without_gradient(block))


def _ranks(experts: DeltaExperts) -> tuple[int, int]:
    return experts.fc1.up.shape[-1], experts.fc2.up.shape[-1]


def _weights_without_gradient(block: nn.Module) -> Iterator[nn.Parameter]:
    """Those that the kernels give no gradient for."""
    yield from block.experts.parameters()
    if block.base is not None:
        yield from block.base.parameters()


def mixture(block: nn.Module, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`CLIPMoESparseMLP` of tokens: -> output [N,D] in the dtype of the products, router logits [N,E] fp32.

    Gradients: of x, of the router's weight and of the fusion gate.
    """
    router, experts, dtype = block.router, block.experts, working_dtype(x_ND)
    routing = route(router.jittered(x_ND), router.weight, router.num_experts_per_tok)
    if isinstance(experts, DeltaExperts):
        y_ND = delta_ffn(
            _packed_delta(experts, dtype), x_ND, routing.weights, order_if_it_pays(routing.experts, experts.num_experts)
        )
    else:
        y_ND = whole_ffn(pack_ffn(experts, dtype), x_ND, routing.weights, routing.experts)
    if block.fusion_gate is not None:
        base_ND, gate = dense_ffn(pack_ffn(block.base, dtype), x_ND), block.fusion_gate
        y_ND = fuse(x_ND, gate.weight, gate.bias, base_ND, y_ND)
    return y_ND, routing.logits


class SharedDelta:
    """Delta experts' tensors as the kernels want them. The parameters become views of these, so they need no memory,
    unless another dtype is asked for (fp32 weights under autocast)."""

    def __init__(self, experts: DeltaExperts, dtype: torch.dtype):
        self.experts, self.dtype = experts, dtype
        with torch.inference_mode(False), torch.no_grad():  # or the parameters could never be trained again
            same = all(p.dtype == dtype for p in experts.parameters())
            self.packed = share_delta(experts) if same else pack_delta(experts, dtype)
        self.layout = layout(experts.parameters())

    def in_place(self) -> bool:
        """False once a weight has moved or changed."""
        return self.layout == layout(self.experts.parameters())


def _packed_delta(experts: DeltaExperts, dtype: torch.dtype) -> PackedDelta:
    found = experts.prepared
    if found is None or found.dtype != dtype or not found.in_place():
        experts.prepared = found = SharedDelta(experts, dtype)
    return found.packed


def layout(parameters: Iterable[nn.Parameter]) -> list[tuple[int, int]]:
    """Where every parameter lies, and how often it was changed in place."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]


def feed_forward(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`CLIPMoEMLP` without dropout: [..,D] -> [..,D]. Gradients of all that requires them."""
    dtype, x_ND = working_dtype(x), x.flatten(0, -2)
    if torch.is_grad_enabled() and any(p.requires_grad for p in mlp.parameters()):
        weights = (t.to(dtype) for t in (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias))
        y_ND = ffn(x_ND.to(dtype), *weights, mlp.act is quick_gelu)
    else:
        y_ND = dense_ffn(pack_ffn(mlp, dtype), x_ND)
    return y_ND.view(*x.shape[:-1], y_ND.shape[-1])


# --------------------------------------------------------------------------------------------------------- all blocks


class Norm(NamedTuple):
    """A layer norm's tensors [D] and its epsilon."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


class Block:
    """One block's tensors in the dtype of its products, and what is done with them."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype):
        attention = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.mlp, self.heads = layer.mlp, attention.num_heads
        self.qkv_weight = share_rows([projection.weight for projection in projections], dtype)  # [3D,D]
        self.qkv_bias = share_rows([projection.bias for projection in projections], dtype)  # [3D]
        self.out_weight = attention.out_proj.weight.detach().to(dtype)
        self.out_bias = attention.out_proj.bias.detach().to(dtype)
        self.norm1, self.norm2 = (
            Norm(norm.weight.detach(), norm.bias.detach(), norm.eps) for norm in (layer.layer_norm1, layer.layer_norm2)
        )
        if hasattr(layer.mlp, "experts") and isinstance(layer.mlp.experts, DeltaExperts):
            _packed_delta(layer.mlp.experts, dtype)

    def attend(self, x_BTD: torch.Tensor, mask, causal: bool, only_B) -> torch.Tensor:
        """Self-attention of what the first norm gave: [B,T,D] -> [B,T,D], or [B,1,D] of one token a sequence."""
        b, t, d = x_BTD.shape
        x_ND = x_BTD.flatten(0, 1)
        if only_B is None:
            qkv = torch.addmm(self.qkv_bias, x_ND, self.qkv_weight.t())
            q, k, v = qkv.view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        else:
            own_BD = x_BTD[torch.arange(b, device=x_BTD.device), only_B]
            q = torch.addmm(self.qkv_bias[:d], own_BD, self.qkv_weight[:d].t())
            q = q.view(b, 1, self.heads, d // self.heads).transpose(1, 2)
            kv = torch.addmm(self.qkv_bias[d:], x_ND, self.qkv_weight[d:].t())
            k, v = kv.view(b, t, 2, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
            mask, causal = _mask_of_one(only_B, mask, causal, t), False
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        y_ND = y.transpose(1, 2).reshape(b * y.shape[2], d)
        return torch.addmm(self.out_bias, y_ND, self.out_weight.t()).view(b, y.shape[2], d)

    def feed_forward(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """FFN or experts: -> [B,T,D], router logits [B,T,E] or None."""
        if not hasattr(self.mlp, "router"):
            return feed_forward(self.mlp, x_BTD), None
        y_ND, logits_NE = mixture(self.mlp, x_BTD.flatten(0, 1))
        return y_ND.view(x_BTD.shape), logits_NE.view(*x_BTD.shape[:-1], logits_NE.shape[-1])


def _mask_of_one(only_B: torch.Tensor, mask: torch.Tensor | None, causal: bool, t: int) -> torch.Tensor | None:
    """Where one query a sequence, at position only_B, may look: [B,1,1,T], or None for everywhere."""
    if causal:
        return (torch.arange(t, device=only_B.device) <= only_B[:, None])[:, None, None]
    if mask is None:
        return None
    return mask[torch.arange(len(only_B), device=only_B.device), :, only_B][:, :, None]


def share_rows(parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> torch.Tensor:
    """All of them in one tensor, one below the other. Parameters of this dtype become views of it, so that it needs no
    memory; but not where something else has laid them out (FSDP, a flat buffer)."""
    if all(p.dtype == dtype for p in parameters) and _lie_together(parameters):
        first, rows = parameters[0].detach(), sum(len(p) for p in parameters)
        return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
    joined = torch.cat([p.detach().to(dtype) for p in parameters])
    if all(p.dtype == dtype and p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in parameters):
        for parameter, part in zip(parameters, joined.split([len(p) for p in parameters]), strict=True):
            parameter.data = part
    return joined


def _lie_together(parameters: Sequence[nn.Parameter]) -> bool:
    """True for what `share_rows` has laid out already."""
    storage, place = parameters[0].untyped_storage().data_ptr(), parameters[0].data_ptr()
    for parameter in parameters:
        if parameter.untyped_storage().data_ptr() != storage or parameter.data_ptr() != place:
            return False
        place += parameter.numel() * parameter.element_size()
    return all(parameter.is_contiguous() for parameter in parameters)


class FastEncoder:
    """`CLIPMoEEncoder.forward` without gradients, for one dtype of products and for the weights as they are now."""

    def __init__(self, encoder: nn.Module, x_BTD: torch.Tensor):
        self.dtype, self.blocks = working_dtype(x_BTD), []
        self.why_not = _why_not(encoder, x_BTD.device)
        modules = list(encoder.modules())
        self.hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.mixtures = [m for m in modules if hasattr(m, "only_expert")]
        self.slots = [(m._parameters, name) for m in modules for name in m._parameters]
        if self.why_not is None:
            with torch.inference_mode(False), torch.no_grad():
                self.blocks = [Block(layer, self.dtype) for layer in encoder.layers]
        else:
            say_once(f"the GPU kernels are not used, the slower loop is: {self.why_not}")
        self.layout = self._layout()
        self.graphs = Graphs() if x_BTD.is_cuda else None

    def _layout(self) -> list[tuple[int, int]]:
        """Without a walk over the modules: it is asked for at every picture."""
        return layout(own[name] for own, name in self.slots if own[name] is not None)

    def in_place(self) -> bool:
        """False once a weight has moved or changed: then a new one must be made."""
        return self.layout == self._layout()

    def fits(self, x_BTD: torch.Tensor) -> bool:
        """True while it was made for these weights and this dtype of products."""
        return self.dtype == working_dtype(x_BTD) and self.in_place()

    def usable(self) -> bool:
        """False while somebody listens to a module or asks for one expert alone: then the modules must run."""
        listened_to = any(self.hooks) or any(block.only_expert is not None for block in self.mixtures)
        return self.why_not is None and not listened_to

    def __call__(self, x_BTD, mask=None, causal=False, output_hidden_states=False, only_B=None):
        """As `CLIPMoEEncoder.forward`."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            if self.graphs is None or mask is not None or output_hidden_states:
                return self._run(x_BTD, mask, causal, output_hidden_states, only_B)
            x_BTD, router_logits = self.graphs.run(self._run_plain, x_BTD, causal, only_B)
            return x_BTD, None, router_logits

    def _run_plain(self, x_BTD, causal: bool, only_B) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        x_BTD, _, router_logits = self._run(x_BTD, None, causal, False, only_B)
        return x_BTD, router_logits

    def _run(self, x_BTD, mask, causal, output_hidden_states, only_B):
        hidden_states, router_logits = [x_BTD], []
        normed_BTD = self._first_norm(x_BTD)
        for number, block in enumerate(self.blocks, start=1):
            last = number == len(self.blocks)
            y_BTD = block.attend(normed_BTD, mask, causal, only_B if last else None)
            if last and only_B is not None:
                x_BTD = x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), only_B][:, None]
            x_BTD, normed_BTD = self._add_norm(x_BTD, y_BTD, block.norm2)
            y_BTD, logits = block.feed_forward(normed_BTD)
            if last:
                x_BTD = x_BTD + y_BTD
            else:
                x_BTD, normed_BTD = self._add_norm(x_BTD, y_BTD, self.blocks[number].norm1)
            if output_hidden_states:
                hidden_states.append(x_BTD)
            if logits is not None:
                router_logits.append(logits)
        return x_BTD, tuple(hidden_states) if output_hidden_states else None, tuple(router_logits)

    def _first_norm(self, x_BTD: torch.Tensor) -> torch.Tensor | None:
        if not self.blocks:
            return None
        weight, bias, eps = self.blocks[0].norm1
        return F.layer_norm(x_BTD, weight.shape, weight.to(x_BTD.dtype), bias.to(x_BTD.dtype), eps).to(self.dtype)

    def _add_norm(self, x_BTD: torch.Tensor, y_BTD: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
        """-> x + y in x's dtype, and its norm in the products' dtype."""
        sum_ND, normed_ND = add_layer_norm(x_BTD.flatten(0, 1), y_BTD.flatten(0, 1), *norm, dtype=self.dtype)
        return sum_ND.view(x_BTD.shape), normed_ND.view(x_BTD.shape)


def _why_not(encoder: nn.Module, device: torch.device) -> str | None:
    """Why this encoder's modules must run themselves: something has replaced, sharded or spread them."""
    for name, module in encoder.named_modules():
        if hasattr(module, "_hf_hook"):
            return f"accelerate has spread {name or 'the model'} over devices"
        if name.endswith("_proj") and type(module) is not nn.Linear:
            return f"{name} is a {type(module).__name__}"
        if hasattr(module, "router") and not can_mix(module):
            return f"{name} has more experts, or of a higher rank, than the kernels take"
    for name, parameter in encoder.named_parameters():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point() or not parameter.numel():
            return f"{name} is quantised or sharded"
        if parameter.device != device:
            return f"{name} is on {parameter.device}"
    return None
