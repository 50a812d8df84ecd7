"""CUDA graphs of a tower's blocks: all kernels of a pass start at once, where Python would need milliseconds."""

from __future__ import annotations

import threading

import torch

from .gpu_clipmoe import say_once

GRAPH_TOKENS = 6_000
"""Up to so many tokens (10 tiles of 336 px) a graph is made: beyond, the card works longer than Python needs."""
MAX_GRAPHS = 8
"""A graph keeps the memory of its input and results."""


class Graphs:
    """The graphs of one encoder, by size of input. A size is recorded when it comes for the second time: the first
    pass has compiled its kernels, and most sizes come once."""

    def __init__(self):
        self.graphs: dict[tuple, Graph] = {}
        self.met: set[tuple] = set()
        self.refused = False
        self.pool = None  # one for all: a result is copied out before the next graph may write over it
        self.stream: torch.cuda.Stream | None = None
        self.lock = threading.Lock()  # a server's threads share the graphs' memory

    def run(self, work, x_BTD: torch.Tensor, causal: bool, only_B: torch.Tensor | None):
        """`work(x_BTD, causal, only_B)` -> [B,..,D] and router logits; from a graph where there is one."""
        if torch.cuda.is_current_stream_capturing():  # somebody else's graph: it must hold the kernels themselves
            return work(x_BTD, causal, only_B)
        key = (tuple(x_BTD.shape), x_BTD.dtype, causal, only_B is None)
        with self.lock:
            graph = self.graphs.get(key) or self._record(key, work, x_BTD, causal, only_B)
            if graph is not None:
                self._after_the_last(x_BTD.device)
                return graph.replay(x_BTD, only_B)
        return work(x_BTD, causal, only_B)

    def _record(self, key: tuple, work, x_BTD, causal, only_B) -> Graph | None:
        tokens = x_BTD.shape[0] * x_BTD.shape[1]
        if self.refused or not 0 < tokens <= GRAPH_TOKENS or len(self.graphs) == MAX_GRAPHS:
            return None
        if key not in self.met:
            self.met.add(key)
            return None
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            self.graphs[key] = Graph(work, x_BTD, causal, only_B, self.pool)
        except RuntimeError as error:  # out of memory, a driver without graphs: the same kernels run one by one
            self.refused = True
            say_once(f"CUDA graphs are not used: {str(error).splitlines()[0]}")
        return self.graphs.get(key)

    def _after_the_last(self, device: torch.device) -> None:
        """Of two threads with streams of their own the second waits for the first one's graph."""
        stream = torch.cuda.current_stream(device)
        if self.stream is not None and self.stream != stream:
            stream.wait_stream(self.stream)
        self.stream = stream


class Graph:
    """One pass over all blocks for one size of input, recorded: replaying it starts all its kernels at once."""

    def __init__(self, work, x_BTD: torch.Tensor, causal: bool, only_B: torch.Tensor | None, pool):
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(x_BTD.device):
            self.x_BTD = torch.empty_like(x_BTD).copy_(x_BTD)
            self.only_B = None if only_B is None else torch.empty_like(only_B).copy_(only_B)
            self.graph = torch.cuda.CUDAGraph()
            # What other threads do with the card (a data loader's pinned memory) does not disturb.
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                self.y_BTD, logits = work(self.x_BTD, causal, self.only_B)
                self.logits = torch.cat([part.flatten() for part in logits]) if logits else None
        self.shapes = [part.shape for part in logits]

    def replay(self, x_BTD: torch.Tensor, only_B: torch.Tensor | None):
        """-> copies of the results: the next replay writes over them."""
        self.x_BTD.copy_(x_BTD)
        if only_B is not None:
            self.only_B.copy_(only_B)
        self.graph.replay()
        if self.logits is None:
            return self.y_BTD.clone(), ()
        parts = self.logits.clone().split([shape.numel() for shape in self.shapes])
        return self.y_BTD.clone(), tuple(part.view(shape) for part, shape in zip(parts, self.shapes, strict=True))
