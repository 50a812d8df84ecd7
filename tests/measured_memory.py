"""The CPU's memory, measured as a GPU's is: by counters of its allocator. Used by several tests."""

import gc
import math

from torch.profiler import ProfilerActivity, profile

GIB = 2**30


class CPUAllocator:
    """The CPU's memory, by what torch's profiler sees its allocator give and take."""

    name, total = "a CPU's allocator", 4 * GIB

    def __init__(self, limit: float = math.inf, capacity: float = math.inf):
        self.most, self.capacity, self.works = limit, capacity, 0

    def limit(self) -> int:
        return int(self.most)

    def peak(self, work) -> int | None:
        self.works += 1
        gc.collect()  # what is freed meanwhile must be of the work
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            work()
        events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak if peak <= self.capacity else None
