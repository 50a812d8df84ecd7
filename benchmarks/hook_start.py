"""What the import hook costs a Python start: processor time of starts with it, without it, interleaved.

python benchmarks/hook_start.py --starts 25      (in an environment with the wheel or an editable install)
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys

VARIANTS = {"without (LLAVA_CLIPMOE_HOOK=0)": "0", "with the hook": "1"}


def start(hook: str) -> float:
    """Processor time of `python -c pass`, in ms."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", "pass"], env={**os.environ, "LLAVA_CLIPMOE_HOOK": hook}, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=25)
    starts = parser.parse_args().starts
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(starts):
        for name, hook in VARIANTS.items():
            times[name].append(start(hook))
    medians = {name: statistics.median(values) for name, values in times.items()}
    without, with_hook = medians.values()
    print(f"the hook adds {with_hook - without:.1f} ms of processor time to a start (median of {starts})")
    for name, value in medians.items():
        print(f"  {value:6.1f} ms  {name}")


if __name__ == "__main__":
    main()
