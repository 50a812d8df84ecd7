"""The fast path on a GPU, tested without one: `fast_tests.py` in a process of its own, through Triton's interpreter."""

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
INTERPRETED = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})


@needs_triton
def test_the_fast_path_equals_the_modules(tmp_path):
    tests = Path(__file__).with_name("fast_tests.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'fast'}", str(tests)]
    done = subprocess.run(command, env=INTERPRETED, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert " passed" in done.stdout
