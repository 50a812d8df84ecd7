"""Do the GPU's kernels compute what the readable loop computes, here and now? First part of `gpu.sh`.

    python benchmarks/kernel_checks.py
    TRITON_INTERPRET=1 python benchmarks/kernel_checks.py --tiny      (without a GPU, through Triton's interpreter)

Every kernel by `llava_clipmoe.kernels_clipmoe.check` in each dtype, then `tests/kernel_tests.py`, where pytest is. Exit
status 1: a kernel is wrong, or its tests did not finish.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timing
import tyro
from tower_variants import DTYPES

TESTS = Path(__file__).resolve().parent.parent / "tests" / "kernel_tests.py"


@dataclass(frozen=True)
class Settings:
    device: timing.Device = "auto"
    seconds: int = 100
    """The tests are stopped after so long."""
    tiny: bool = False
    """One dtype and the tests of ties only: does the program work?"""
    output: Path | None = None
    """Append the table to this file."""


def checked(device: str, dtype: str) -> tuple[bool, str]:
    """Whether the kernels may be used, and what `check` says."""
    try:
        from llava_clipmoe.kernels_clipmoe import check
    except ImportError as error:  # no triton: its message says what to do
        return False, str(error)
    why_not = check(device, DTYPES[dtype])
    return why_not is None, "as the loop" if why_not is None else why_not.replace("|", "/")


def tested(s: Settings) -> tuple[bool, str]:
    """Whether the kernels' tests leave them in use, and how they ended. Shared among processes where pytest can: most
    of their time is Triton's compiler's."""
    if importlib.util.find_spec("pytest") is None:
        return True, "not run: pytest is not installed (pip install pytest pytest-xdist)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
    if s.tiny:
        command += ["-k", "ties"]
    elif importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=s.seconds)
    except subprocess.TimeoutExpired as error:
        return False, f"not finished after {error.timeout:.0f} s"
    print(done.stdout[-20_000:], done.stderr[-5_000:], sep="", file=sys.stderr)
    lines = done.stdout.strip().splitlines() or [f"exit status {done.returncode}"]
    return done.returncode == 0, lines[-1].strip("= ")


def main(argv: Sequence[str] | None = None) -> None:
    s = tyro.cli(Settings, args=argv, description=__doc__, use_underscores=False)
    device, rows, right = timing.pick_device(s.device), [], True
    for dtype in ("fp32",) if s.tiny else ("fp16", "bf16", "fp32"):
        started = time.perf_counter()
        ok, said = checked(device.type, dtype)
        rows.append([f"all kernels, {dtype}", said, f"{time.perf_counter() - started:.0f}"])
        right &= ok
    started = time.perf_counter()
    ok, said = tested(s)
    rows.append([f"{TESTS.parent.name}/{TESTS.name}", said, f"{time.perf_counter() - started:.0f}"])
    right &= ok
    table = timing.markdown(("check", "result", "seconds"), rows)
    text = "\n".join([timing.command(__file__, argv), "", timing.machine(device), "", table])
    print(text)
    if s.output is not None:
        timing.append(text, s.output)
    if not right:
        raise SystemExit("The kernels are not what the loop is on this device.")


if __name__ == "__main__":
    main()
