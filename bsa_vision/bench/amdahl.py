"""How much of a model's time is attention, and so what sparsity can gain at most: Amdahl's law, from times of the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from bsa_vision.adapters.swap.sparse_layer import Layer


@dataclass(frozen=True)
class Amdahl:
    """Medians over the rounds of one run; each compares times of the same round.

    share    of the dense model's time that its attention takes, 0 to 1
    bound    the sparse model's time over the dense one's if attention took the density's share of its time, and the rest stayed
    reached  speed of the sparse model over the speed at that bound: above 1 where a sparse block costs less than a dense one
    outside  time outside attention, sparse over dense: what being swapped costs
    """

    share: float
    bound: float
    reached: float
    outside: float


@dataclass
class Clock:
    """Seconds of candidates, as a whole and within attention, round by round; on the CPU, where a call returns when its work is done."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    inside: dict[str, list[float]] = field(default_factory=dict)

    def timed(self, name: str, run: Callable[[], Any]) -> Callable[[], None]:
        """`run`, each call of which adds one entry to `seconds[name]` and `inside[name]`."""

        def timed_run() -> None:
            with _attention_timed() as spent:
                start = time.perf_counter()
                run()
                self.seconds.setdefault(name, []).append(time.perf_counter() - start)
            self.inside.setdefault(name, []).append(sum(spent))

        return timed_run

    def amdahl(self, density: float, skip: int) -> Amdahl | None:
        """Of the candidates "dense" and "sparse", without the first `skip` calls; None where the dense model's attention is not torch's."""
        if not all(self.inside["dense"]):
            return None
        return _amdahl(
            density, *(of[name][skip:] for name in ("dense", "sparse") for of in (self.seconds, self.inside))
        )


def _amdahl(
    density: float,
    dense: Sequence[float],
    in_dense: Sequence[float],
    sparse: Sequence[float],
    in_sparse: Sequence[float],
) -> Amdahl:
    rounds = list(zip(dense, in_dense, sparse, in_sparse, strict=True))
    bounds = [whole - part * (1 - density) for whole, part, _, _ in rounds]
    return Amdahl(
        share=statistics.median(part / whole for whole, part, _, _ in rounds),
        bound=statistics.median(bound / whole for bound, (whole, _, _, _) in zip(bounds, rounds, strict=True)),
        reached=statistics.median(bound / ours for bound, (_, _, ours, _) in zip(bounds, rounds, strict=True)),
        outside=statistics.median((ours - own) / (whole - part) for whole, part, ours, own in rounds),
    )


@contextmanager
def _attention_timed() -> Iterator[list[float]]:
    """Inside, each call of torch's attention and of a swapped layer's adds its seconds to the list."""
    spent: list[float] = []
    attend = Layer.attend

    def timed_attend(layer: Layer, *args: Any, **kwargs: Any) -> Any:
        with mode.paused():
            return _add_time(spent, attend, (layer, *args), kwargs)

    mode = _TimedAttention(spent)
    Layer.attend = timed_attend  # type: ignore[method-assign, assignment]
    try:
        with mode:
            yield spent
    finally:
        Layer.attend = attend  # type: ignore[method-assign]


class _TimedAttention(TorchFunctionMode):
    def __init__(self, spent: list[float]) -> None:
        super().__init__()
        self.spent, self.is_paused = spent, False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is counted: what a swapped layer calls is counted as a whole."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention or self.is_paused:
            return func(*args, **(kwargs or {}))
        return _add_time(self.spent, func, args, kwargs or {})


def _add_time(spent: list[float], run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    start = time.perf_counter()
    try:
        return run(*args, **kwargs)
    finally:
        spent.append(time.perf_counter() - start)
