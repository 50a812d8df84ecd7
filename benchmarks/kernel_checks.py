"""Do the GPU's kernels compute what the readable loop computes, here and now? First part of `gpu.sh`.

    python benchmarks/kernel_checks.py
    TRITON_INTERPRET=1 python benchmarks/kernel_checks.py --tiny      (without a GPU, through Triton's interpreter)

Every kernel by `llava_clipmoe.kernels_clipmoe.check` in each dtype, then `tests/kernel_tests.py` and
`tests/fast_tests.py` (whole towers, CUDA graphs), where pytest is. Exit status 1: a kernel is wrong; 3: none was found
wrong, but the tests did not finish.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import timing
import tyro
from tower_variants import DTYPES

TESTS = Path(__file__).resolve().parent.parent / "tests"
FILES = ("kernel_tests.py", "fast_tests.py")


@dataclass(frozen=True)
class Settings:
    device: timing.Device = "auto"
    seconds: float = 100
    """For all of it: the tests are stopped then."""
    tiny: bool = False
    """One dtype and the tests of ties only: does the program work?"""
    output: Path | None = None
    """Append the table to this file."""


WRONG, UNFINISHED = 1, 3


def checked(device: str, dtype: str) -> tuple[int, str, float]:
    """Exit status, what `check` says, and its seconds; called in a process of its own."""
    started = time.perf_counter()
    try:
        from llava_clipmoe.kernels_clipmoe import check
    except ImportError as error:  # no triton: its message says what to do
        return WRONG, str(error), 0
    why_not = check(device, DTYPES[dtype])
    status, said = (0, "as the loop") if why_not is None else (WRONG, why_not.replace("|", "/"))
    return status, said, time.perf_counter() - started


def tested(s: Settings, seconds: float) -> tuple[int, str, float]:
    """Exit status, how the kernels' tests ended, and their seconds. Shared among processes where pytest can: most of
    their time is Triton's compiler's."""
    if importlib.util.find_spec("pytest") is None:
        return 0, "not run: pytest is not installed (pip install pytest pytest-xdist)", 0
    started, command = time.perf_counter(), [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    command += [str(TESTS / file) for file in FILES]
    if s.tiny:
        command += ["-k", "ties"]
    elif importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    with tempfile.TemporaryFile("w+") as said:
        # A session of its own: pytest's workers must end with it, or they would hold the card while others are timed.
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        output = said.read()
    print(output[-20_000:], file=sys.stderr)
    took = time.perf_counter() - started
    if process.returncode == -signal.SIGKILL:
        failed = output.count("FAILED")  # one a line, before the test's name with pytest-xdist, behind it without
        return WRONG if failed else UNFINISHED, f"not finished after {took:.0f} s, {failed} failed until then", took
    lines = output.strip().splitlines() or [f"exit status {process.returncode}"]
    return WRONG if process.returncode else 0, lines[-1].strip("= "), took


def main(argv: Sequence[str] | None = None) -> None:
    s = tyro.cli(Settings, args=argv, description=__doc__, use_underscores=False)
    device, started, found = timing.pick_device(s.device), time.perf_counter(), {}
    dtypes = ("fp32",) if s.tiny else ("fp16", "bf16", "fp32")
    with ThreadPoolExecutor(len(dtypes)) as pool:  # each waits for a process: they compile side by side
        checks = {dtype: pool.submit(timing.in_child, checked, device.type, dtype) for dtype in dtypes}
    for dtype, check in checks.items():
        found[f"all kernels, {dtype}"] = check.result()
    left = s.seconds - (time.perf_counter() - started)
    found[" ".join(f"tests/{file}" for file in FILES)] = tested(s, max(left, 5))
    report = timing.Report(s.output)
    report.add(timing.command(__file__, argv))
    report.add(timing.machine(device))
    rows = [[name, said, f"{seconds:.0f}"] for name, (_, said, seconds) in found.items()]
    report.add(timing.markdown(("check", "result", "seconds"), rows))
    statuses = {status for status, _, _ in found.values()}
    sys.exit(WRONG if WRONG in statuses else max(statuses))


if __name__ == "__main__":
    main()
