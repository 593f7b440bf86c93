"""Measure the attention share of a model's time, and the speed-up it permits (Amdahl's law).

    python benchmarks/amdahl.py --model dinov3 --pattern random --density 0.21 --rounds 9

Every round times the dense model, the sparse model and a model with a dense plan on the CPU. Every
number is a median over rounds.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from bsa_vision import adapters
from bsa_vision.adapters.swap.sparse_layer import SparseLayer
from bsa_vision.bench.models import ModelCase, build_model, make_pixels, make_plan
from bsa_vision.cli import parse
from bsa_vision.measure.timing import paired
from bsa_vision.models.features import features
from bsa_vision.plans.flops import cost


@dataclass
class Clock:
    """Seconds per call of each model: in total and within attention."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    inside: dict[str, list[float]] = field(default_factory=dict)

    def timed(self, name: str, run: Callable[[], Any]) -> Callable[[], None]:
        """Return a function that calls `run` and records its times under `name`."""

        def timed_run() -> None:
            with attention_timed() as spent:
                start = time.perf_counter()
                run()
                self.seconds.setdefault(name, []).append(time.perf_counter() - start)
            self.inside.setdefault(name, []).append(sum(spent))

        return timed_run

    def summary(self, density: float, skip: int = 1) -> dict[str, float]:
        """Compare the sparse model with the dense one, without the first `skip` calls.

        attention  attention's share of the dense model's time
        bound      lowest possible sparse / dense time: attention scales with `density`, the rest
                   takes as long as before
        reached    speed of the sparse model / speed at that bound
        outside    time outside attention, sparse / dense: the overhead of replaced layers
        """
        times = (self.seconds, self.inside)
        parts = (table[name][skip:] for name in ("dense", "sparse") for table in times)
        rounds = list(zip(*parts, strict=True))  # (dense, attention of dense, sparse, ...)
        bounds = [dense - inside * (1 - density) for dense, inside, _, _ in rounds]
        return {
            "attention": median(inside / dense for dense, inside, _, _ in rounds),
            "bound": median(bound / row[0] for bound, row in zip(bounds, rounds, strict=True)),
            "reached": median(bound / row[2] for bound, row in zip(bounds, rounds, strict=True)),
            "outside": median((s - s_in) / (d - d_in) for d, d_in, s, s_in in rounds),
        }


@contextmanager
def attention_timed() -> Iterator[list[float]]:
    """Collect the seconds of each call of torch's attention and of replaced attention layers."""
    spent: list[float] = []
    attend = SparseLayer.attend

    def timed_attend(layer: SparseLayer, *args: Any, **kwargs: Any) -> Any:
        before, start = len(spent), time.perf_counter()
        try:
            return attend(layer, *args, **kwargs)
        finally:  # replaces the times of calls within the layer
            spent[before:] = [time.perf_counter() - start]

    SparseLayer.attend = timed_attend  # type: ignore[method-assign, assignment]
    try:
        with TimedAttention(spent):
            yield spent
    finally:
        SparseLayer.attend = attend  # type: ignore[method-assign]


class TimedAttention(TorchFunctionMode):
    """Append the seconds of each call of torch's attention to a list."""

    def __init__(self, spent: list[float]) -> None:
        super().__init__()
        self.spent = spent

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        start = time.perf_counter()
        try:
            return func(*args, **(kwargs or {}))
        finally:
            if func is F.scaled_dot_product_attention:
                self.spent.append(time.perf_counter() - start)


@torch.no_grad()
def measure(case: ModelCase, rounds: int) -> dict[str, float]:
    """Return the numbers of `Clock.summary`, the density, and times relative to the dense model.

    The times are those of the sparse model and of a model with a dense plan.
    """
    model, case = build_model(case)
    plan, pixels = make_plan(model, case), make_pixels(case)
    spec = adapters.inspect(model, case.image_size)
    layout = plan.layout(spec)
    products = {layer.key: layer.products for layer in cost(spec).layers}
    kept = (flops * (1 - plan.compile(key, layout).sparsity) for key, flops in products.items())
    density = sum(kept) / sum(products.values())
    sparse, dense_plan = copy.deepcopy(model), copy.deepcopy(model)
    adapters.sparsify_(sparse, plan, case.backend)
    adapters.sparsify_(dense_plan, adapters.dense_plan(dense_plan))
    models, clock = {"dense": model, "sparse": sparse, "dense plan": dense_plan}, Clock()
    runs = {
        name: clock.timed(name, partial(features, each, pixels)) for name, each in models.items()
    }
    timings = paired(runs, rounds)
    numbers = {"density": density, "sparse": timings["sparse"].ratio, **clock.summary(density)}
    return {**numbers, "dense plan": timings["dense plan"].ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="dinov3", choices=("vit", "dinov2", "dinov3"), help="Default: dinov3.")
    add("--pattern", default="random", help="Pattern, as in `bench model`. Default: random.")
    add("--density", type=float, default=0.25, help="Share of blocks to compute. Default: 0.25.")
    add("--image-size", type=parse.image_size, help="Pixels. Default: 64 patches per side.")
    add("--rounds", type=int, default=9, help="Number of timed rounds. Default: 9.")
    args = parser.parse_args()
    (pattern,) = parse.with_density(parse.pattern(args.pattern), [args.density], seed=0)
    order = parse.order_for(pattern, "auto")
    case = ModelCase(args.model, pattern, args.image_size, order=order)
    for name, value in measure(case, args.rounds).items():
        print(f"{name:12}{value:.3f}")


if __name__ == "__main__":
    main()
