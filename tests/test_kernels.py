"""The GPU kernels equal the readable loop: on a GPU where there is one, else on the CPU through Triton's interpreter.

The tests are in `kernel_tests.py`. They run in a process of their own, because the interpreter must be chosen before
triton is imported, and this process may have done that. One of them by hand, without a GPU:

    TRITON_INTERPRET=1 python -m pytest tests/kernel_tests.py -k ties
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (it comes with torch for CUDA)"
)
TESTS = Path(__file__).with_name("kernel_tests.py")


@needs_triton
def test_kernels_equal_the_loop(tmp_path):
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'kernels'}"]
    done = subprocess.run([*command, str(TESTS)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert " passed" in done.stdout
