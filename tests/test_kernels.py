"""The GPU kernels equal the readable loop: on a GPU where there is one, else on the CPU through Triton's interpreter.

The tests are in `kernel_tests.py`. They run in a process of their own, because the interpreter must be chosen before
triton is imported, and this process may have done that. One of them by hand, without a GPU:

    TRITON_INTERPRET=1 python -m pytest tests/kernel_tests.py -k ties
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava_clipmoe.experts_clipmoe import Experts
from llava_clipmoe.experts_delta_clipmoe import DeltaExperts

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (it comes with torch for CUDA)"
)
TESTS = Path(__file__).with_name("kernel_tests.py")


@needs_triton
def test_kernels_equal_the_loop(tmp_path):
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'kernels'}"]
    done = subprocess.run([*command, str(TESTS)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert " passed" in done.stdout


POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}


def compile_for(arch: int, kernel, tile, arguments, constants):
    """What a launch with these arguments would compile, for a card that need not be here -> Triton's metadata."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names, signature, attributes = kernel.arg_names, {}, {}
    for number, (name, value) in enumerate(zip(names, arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS.get(value.dtype, "*i64")
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:  # as Triton does at a launch
            constants = {**constants, name: 1}
        else:
            signature[name] = "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(number,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel,
        {name: signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return compile(source, target=GPUTarget("cuda", arch, 32), options=options).metadata


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("arch", "dtype"), [(80, torch.bfloat16), (89, torch.float16), (89, torch.float32),
                                             (90, torch.bfloat16)], ids=str)  # fmt: skip
def test_kernels_compile_for_cards_that_are_not_here(arch, dtype, monkeypatch, tmp_path):
    """At the width of ViT-L, forward and backward. The interpreter knows neither types nor shared memory: this finds
    what it lets pass, and that one program asks for no more than the 99 KiB that a 4090 has."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from llava_clipmoe import kernels_clipmoe as kernels

    shared = {}

    def launch(kernel, grid, tile, like, *arguments, **constants):
        name = kernel.__name__
        shared[name] = max(shared.get(name, 0), compile_for(arch, kernel, tile, arguments, constants).shared)

    monkeypatch.setattr(kernels, "_launch", launch)
    config = SimpleNamespace(
        num_experts=4, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, hidden_act="quick_gelu",
        expert_dropout=0.0, experts_implementation="loop",
    )  # fmt: skip
    x = torch.zeros(32, 1024, dtype=dtype, requires_grad=True)
    kernels.route(x, torch.zeros(4, 1024, dtype=dtype), 2)
    weights, chosen = torch.zeros(32, 4), torch.zeros(32, 2, dtype=torch.int64)
    for rank in (64, 256):
        packed = kernels.pack_delta(DeltaExperts(config, rank, rank), dtype)
        kernels.delta_ffn(packed, x, weights, kernels.order_by_set(chosen)).sum().backward()
    packed = kernels.pack_ffn(Experts(config), dtype)
    kernels.whole_ffn(packed, x, weights, chosen).sum().backward()
    one = kernels.PackedFFN(*(tensor[0] for tensor in packed[:4]), False)
    y = kernels.dense_ffn(one, x)
    y.sum().backward()
    with torch.no_grad():
        kernels.add_layer_norm(x, y, one.bias2, one.bias2, 1e-5)
        kernels.fuse(x, torch.zeros(1024, 1024, dtype=dtype), one.bias2, y, y)
    written = {name for name in vars(kernels) if name.endswith("_kernel")}
    assert set(shared) == written
    assert max(shared.values()) <= 99 * 1024, shared


def test_without_triton_the_model_loads_and_the_kernels_say_what_to_do(monkeypatch):
    """transformers refuses a model whose files import at module level what is not installed, outside of a `try`."""
    from transformers.dynamic_module_utils import get_imports

    from llava_clipmoe import experts_clipmoe

    file = Path(experts_clipmoe.__file__).with_name("kernels_clipmoe.py")
    assert set(get_imports(file)) == {"contextlib", "os", "torch", "types", "typing"}
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "llava_clipmoe.kernels_clipmoe", raising=False)
    with pytest.raises(ImportError, match="Use the loop"):
        importlib.import_module("llava_clipmoe.kernels_clipmoe")
