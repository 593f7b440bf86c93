"""Measure how much of a model's time is attention, and what sparsity can gain: Amdahl's law.

    python benchmarks/amdahl.py --model dinov3 --pattern random --density 0.21 --rounds 9

The dense model, the sparse one and the original under a plan of dense heads alternate within one
run on the CPU. Every number is a median over rounds of times of the same round.
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
    """Seconds per call of each candidate, as a whole and within attention."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    inside: dict[str, list[float]] = field(default_factory=dict)

    def timed(self, name: str, run: Callable[[], Any]) -> Callable[[], None]:
        """Return `run`, with each call recorded under `name`."""

        def timed_run() -> None:
            with attention_timed() as spent:
                start = time.perf_counter()
                run()
                self.seconds.setdefault(name, []).append(time.perf_counter() - start)
            self.inside.setdefault(name, []).append(sum(spent))

        return timed_run

    def summary(self, density: float, skip: int = 1) -> dict[str, float]:
        """Compare "dense" and "sparse", leaving out the first `skip` calls.

        attention  share of the dense model's time
        bound      sparse over dense time, if attention took `density` of its time, the rest all
        reached    speed of the sparse model over the speed at that bound
        outside    time outside attention, sparse over dense: what being swapped costs
        """
        parts = (
            of[name][skip:] for name in ("dense", "sparse") for of in (self.seconds, self.inside)
        )
        rounds = list(zip(*parts, strict=True))
        bounds = [dense - inside * (1 - density) for dense, inside, _, _ in rounds]
        return {
            "attention": median(inside / dense for dense, inside, _, _ in rounds),
            "bound": median(bound / row[0] for bound, row in zip(bounds, rounds, strict=True)),
            "reached": median(bound / row[2] for bound, row in zip(bounds, rounds, strict=True)),
            "outside": median((s - s_in) / (d - d_in) for d, d_in, s, s_in in rounds),
        }


@contextmanager
def attention_timed() -> Iterator[list[float]]:
    """Collect the seconds of each call of torch's attention and of a swapped layer's."""
    spent: list[float] = []
    attend = SparseLayer.attend

    def timed_attend(layer: SparseLayer, *args: Any, **kwargs: Any) -> Any:
        before, start = len(spent), time.perf_counter()
        try:
            return attend(layer, *args, **kwargs)
        finally:  # what the layer called is counted once, as a whole
            spent[before:] = [time.perf_counter() - start]

    SparseLayer.attend = timed_attend  # type: ignore[method-assign, assignment]
    try:
        with TimedAttention(spent):
            yield spent
    finally:
        SparseLayer.attend = attend  # type: ignore[method-assign]


class TimedAttention(TorchFunctionMode):
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
    """Return the numbers of `Clock.summary`, the density, and "dense plan": time over dense."""
    model, case = build_model(case)
    plan, pixels = make_plan(model, case), make_pixels(case)
    spec = adapters.inspect(model, case.image_size)
    layout = plan.layout(spec)
    products = {layer.key: layer.products for layer in cost(spec).layers}
    left = (flops * (1 - plan.compile(key, layout).sparsity) for key, flops in products.items())
    density = sum(left) / sum(products.values())
    sparse, dense_plan = copy.deepcopy(model), copy.deepcopy(model)
    adapters.sparsify_(sparse, plan, case.backend)
    adapters.sparsify_(dense_plan, adapters.dense_plan(dense_plan))
    models, clock = {"dense": model, "sparse": sparse, "dense plan": dense_plan}, Clock()
    runs = {name: clock.timed(name, partial(features, one, pixels)) for name, one in models.items()}
    timings = paired(runs, rounds)
    found = {"density": density, "sparse": timings["sparse"].ratio, **clock.summary(density)}
    return {**found, "dense plan": timings["dense plan"].ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="dinov3", choices=("vit", "dinov2", "dinov3"))
    parser.add_argument("--pattern", default="random", help="as in `bsa-vision bench model`")
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--image-size", type=parse.image_size)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    (pattern,) = parse.with_density(parse.pattern(asked.pattern), [asked.density], seed=0)
    order = parse.order_for(pattern, "auto")
    case = ModelCase(asked.model, pattern, asked.image_size, order=order)
    for name, value in measure(case, asked.rounds).items():
        print(f"{name:12}{value:.3f}")


if __name__ == "__main__":
    main()
