"""The GPU kernels equal the readable loop: on a GPU where there is one, else on the CPU through Triton's interpreter.

The tests are in `kernel_tests.py`. They run in a process of their own, because the interpreter must be chosen before
triton is imported, and this process may have done that. One of them by hand, without a GPU:

    TRITON_INTERPRET=1 python -m pytest tests/kernel_tests.py -k ties
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import re
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
    """What a launch with these arguments would compile, for a card that need not be here; and how many bytes of
    registers ptxas, which comes with Triton, had to put aside in memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names, signature, attributes = kernel.arg_names, {}, {}
    as_it_comes = {names.index(name) for name in kernel.do_not_specialize}
    for number, (name, value) in enumerate(zip(names, arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS.get(value.dtype, "*i64")
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and number not in as_it_comes:  # as Triton does at a launch
            constants = {**constants, name: 1}
        else:
            signature[name] = "i32"
        if number not in as_it_comes and (isinstance(value, torch.Tensor) or value % 16 == 0):
            attributes[(number,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel,
        {name: signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    with contextlib.redirect_stdout(io.StringIO()) as said:  # TRITON_DUMP_PTXAS_LOG
        compiled = compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    spilled = re.findall(r"(\d+) bytes spill stores", said.getvalue())
    assert spilled, "ptxas did not say what it spilled"
    return compiled, sum(map(int, spilled))


class Compiler:
    """Stands in for the launch: compiles what would have run on a card of this architecture."""

    def __init__(self, arch: int):
        self.arch, self.done = arch, {}

    def __call__(self, kernel, grid, tile, like, *arguments, **constants):
        key = (kernel.__name__, tile, tuple(sorted(constants.items())))
        if key not in self.done:
            compiled, spilled = compile_for(self.arch, kernel, tile, arguments, constants)
            self.done[key] = {"shared": compiled.metadata.shared, "spilled": spilled, "ptx": compiled.asm["ptx"]}


MODULES = ["kernels_base_clipmoe", "kernels_clipmoe", "kernels_delta_clipmoe", "kernels_dense_clipmoe",
           "kernels_whole_clipmoe", "kernels_pack_clipmoe"]  # fmt: skip
FEW_BYTES = 32  # spilled: of those that were tried on an H100 the fastest delta kernel spills 16 for each thread
SHARED_KIB = {80: 163, 89: 99, 90: 227}  # that one program may have: A100, 4090, H100


def run_everything(kernels, bias_act, dtype: torch.dtype) -> None:
    """Every kernel at the width of ViT-L, forward and backward, at sizes at which a launch would choose its tiles."""
    config = SimpleNamespace(
        num_experts=4, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, hidden_act="quick_gelu",
        expert_dropout=0.0, experts_implementation="loop",
    )  # fmt: skip
    x = torch.zeros(32, 1024, dtype=dtype, requires_grad=True)
    kernels.route(x, torch.zeros(4, 1024, dtype=dtype), 2)
    weights, chosen = torch.zeros(32, 4), torch.zeros(32, 2, dtype=torch.int64)
    for rank in (64, 128, 256):
        packed = kernels.pack_delta(DeltaExperts(config, rank, rank), dtype)
        kernels.delta_ffn(packed, x, weights, kernels.order_by_set(chosen, 4)).sum().backward()
    packed = kernels.pack_ffn(Experts(config), dtype)
    kernels.whole_ffn(packed, x, weights, chosen).sum().backward()
    many = torch.zeros(2048, 1024, dtype=dtype)
    kernels.whole_ffn(packed, many, torch.zeros(2048, 4), torch.zeros(2048, 2, dtype=torch.int64))
    one = kernels.PackedFFN(*(tensor[0] for tensor in packed[:4]), False)
    y = kernels.dense_ffn(one, x)
    y.sum().backward()
    trained = [tensor.clone().requires_grad_() for tensor in one[:4]]
    kernels.ffn(x, *trained, True).sum().backward()
    with torch.no_grad():
        hidden, ends = torch.zeros(64, 4096, dtype=dtype), torch.zeros(4, dtype=torch.int32)
        bias_act(hidden, packed.bias1, True, out=hidden, ends_E=ends)  # beside torch's grouped_mm
        kernels.add_layer_norm(x, y, one.bias2, one.bias2, 1e-5)
        kernels.fuse(x, torch.zeros(1024, 1024, dtype=dtype), one.bias2, y, y)


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("arch", "dtype"), [(80, torch.bfloat16), (89, torch.float16), (89, torch.float32),
                                             (90, torch.float16)], ids=str)  # fmt: skip
def test_kernels_compile_for_cards_that_are_not_here(arch, dtype, monkeypatch, tmp_path):
    """The interpreter knows neither types nor registers nor shared memory: this finds what it lets pass, that one
    program asks for no more shared memory than the card has, and that none spills registers where it matters."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # empty: all is compiled
    monkeypatch.setenv("TRITON_DUMP_PTXAS_LOG", "1")
    modules = [importlib.import_module(f"llava_clipmoe.{name}") for name in MODULES]
    base, kernels, compiler = modules[0], modules[1], Compiler(arch)
    for module in modules:
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", compiler)
    monkeypatch.setattr(base, "shared_kib", lambda device: SHARED_KIB[arch])
    run_everything(kernels, modules[3].bias_act, dtype)
    written = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {name for name, *_ in compiler.done} == written
    for (name, tile, constants), found in compiler.done.items():
        assert found["shared"] <= SHARED_KIB[arch] * 1024, (name, tile, constants, found["shared"])
        assert found["spilled"] <= FEW_BYTES, (name, tile, constants, found["spilled"])
        assert "tf32" not in found["ptx"], name  # it would round fp32
        assert "f16.f16.f16.f16" not in found["ptx"], name  # products of halves are summed in fp32


@needs_triton
def test_the_benchmark_of_tiles(tmp_path):
    """At tiny sizes; what it measures needs a GPU, and without one it says so."""
    program, output = TESTS.parents[1] / "benchmarks" / "kernel_tiles.py", tmp_path / "tiles.md"
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, str(program), "--tiny", "--output", str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5_000:]
    lines = [line for line in output.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert sum("in use" in line for line in lines) == sum("best" in line for line in lines) == 4 * 6
    assert "delta back of rank 64" in done.stdout
    if not torch.cuda.is_available():
        done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
        assert done.returncode == 2 and "needs a GPU" in done.stderr


def test_without_triton_the_model_loads_and_the_kernels_say_what_to_do(monkeypatch):
    """transformers refuses a model whose files import at module level what is not installed, outside of a `try`."""
    from transformers.dynamic_module_utils import get_imports

    from llava_clipmoe import experts_clipmoe

    folder = Path(experts_clipmoe.__file__).parent
    imported = {module for name in MODULES for module in get_imports(folder / f"{name}.py")}
    assert imported == {"contextlib", "functools", "os", "torch", "types", "typing"}
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, f"llava_clipmoe.{name}", raising=False)
    with pytest.raises(ImportError, match="Use the loop"):
        importlib.import_module("llava_clipmoe.kernels_clipmoe")
