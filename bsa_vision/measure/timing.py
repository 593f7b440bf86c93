"""Time candidates in alternation within one run, and compare them as ratios.

Machines are shared and noisy, so times of different runs cannot be compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each round of one candidate, and ratios to the first candidate of the round."""

    seconds: tuple[float, ...]
    ratios: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float:
        """The median over rounds of this candidate's time over the first candidate's."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest ratio."""
        return min(self.ratios), max(self.ratios)


def paired(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int = 5,
    warmup: int = 1,
    on_round: Callable[[], None] = lambda: None,
    device: torch.device | None = None,
) -> dict[str, Timing]:
    """Time the candidates in alternation: every round runs each once; ratios are to the first.

    on_round  called after each round, warm-up included, for a progress bar
    device    a GPU is timed with events and a cold cache; otherwise the wall clock is used
    """
    if not candidates or rounds < 1:
        raise ValueError(
            f"{len(candidates)} candidates, {rounds} rounds: at least one of each is needed."
        )
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(warmup + rounds):
        for name, run in candidates.items():
            elapsed = (
                _seconds(run)
                if device is None or device.type != "cuda"
                else _seconds_on(device, run)
            )
            if number >= warmup:
                seconds[name].append(elapsed)
        on_round()
    first = next(iter(seconds.values()))
    return {
        name: Timing(tuple(times), tuple(a / b for a, b in zip(times, first, strict=True)))
        for name, times in seconds.items()
    }


# Seconds. Below this, much of the time of a call on a GPU is spent on launching kernels.
SHORT = 1e-3


def paired_graphs(
    candidates: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device
) -> tuple[dict[str, Timing], set[str]]:
    """Time as `paired` does, short calls as CUDA graphs; return also which ran as graphs."""
    graphs: dict[str, Callable[[], Any]] = {}
    if device.type == "cuda":
        (first,) = paired(dict([next(iter(candidates.items()))]), 2, device=device).values()
        if first.median < SHORT:
            captured = {name: graphed(run, device) for name, run in candidates.items()}
            graphs = {name: replay for name, replay in captured.items() if replay is not None}
    return paired({**candidates, **graphs}, rounds, device=device), set(graphs)


def _seconds(run: Callable[[], Any]) -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    start = time.perf_counter()
    run()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def _seconds_on(device: torch.device, run: Callable[[], Any]) -> float:
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _larger_than_cache(device).zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


@lru_cache(maxsize=1)
def _larger_than_cache(device: torch.device) -> torch.Tensor:
    """Return a tensor larger than the GPU's cache; writing it evicts everything else."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return torch.empty(max(2 * cache, 2**28), dtype=torch.int8, device=device)


def graphed(run: Callable[[], Any], device: torch.device) -> Callable[[], Any] | None:
    """Return `run` as a CUDA graph, launched without Python; None if it cannot be captured.

    A replay writes to the tensors of the captured run and returns nothing.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):  # first calls allocate: keep that out of the graph
                for _ in range(2):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
        except RuntimeError:  # it waits for the GPU, or draws random numbers
            torch.cuda.synchronize()
            return None
    replay: Callable[[], Any] = graph.replay
    return replay
