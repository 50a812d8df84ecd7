"""Memory of long work: freed blocks are kept on the CPU, and the peak is measured."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import resource
import sys
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h of glibc
_KEEP = 2**31 - 1


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks instead of handing them back to the system and faulting every page in again.

    A training step on the CPU frees and takes the same large tensors over and over; element-wise operations are two to
    three times faster when their pages stay. Changes no result. Does nothing where the C library is another.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL("libc.so.6")
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _KEEP), (_M_ARENA_MAX, 1)):
        libc.mallopt(option, value)


def peak_memory_bytes(device: str | torch.device) -> int:
    """Most memory in use since the last `reset_peak_memory`, in bytes: what torch allocated on a CUDA device; elsewhere
    the resident memory of this process (Linux, macOS)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux


def reset_peak_memory(device: str | torch.device) -> bool:
    """Start a new peak. False where the system cannot forget the old one (CPU outside Linux, some containers)."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # man 5 proc: resets VmHWM
        return True
    return False
