"""What tuning costs: its time in dense forwards, its memory, and whether the plan does what its report says."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bsa_vision.adapters import restore_, sparsify_
from bsa_vision.bench.case import DTYPES
from bsa_vision.bench.models import ModelCase, build_model
from bsa_vision.measure.peak_memory import Meter
from bsa_vision.models.features import features
from bsa_vision.tuning import tune
from bsa_vision.tuning.images import VERIFY, split

FORWARDS = 3  # timed, before and after
CLOSE = 1e-3  # relative difference of an error that is measured again


@dataclass(frozen=True)
class TuneCost:
    """Of one `tune`.

    dense      seconds of a dense forward of one image: median before and after
    seconds    of tune, and by what it did
    peak       bytes at the peak over model and images, read as `method` says
    again      largest error of an image kept back, as reported and as measured again from outside
    """

    images: int
    dense: float
    seconds: float
    parts: dict[str, float]
    peak: int
    method: str
    sparsity: float
    again: tuple[float, float]

    @property
    def forwards(self) -> float:
        """Time per image that was given, in dense forwards."""
        return self.seconds / self.images / self.dense

    @property
    def ok(self) -> bool:
        reported, found = self.again
        return abs(reported - found) <= CLOSE * found

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "forwards": self.forwards, "ok": self.ok}

    def __str__(self) -> str:
        parts = ", ".join(f"{what} {seconds / self.seconds:.0%}" for what, seconds in self.parts.items())
        right = "as reported" if self.ok else f"WRONG: reported were {self.again[0]:.6g}"
        return "\n".join(
            [
                f"tune: {self.seconds:.1f} s for {self.images} images, {self.forwards:.1f} dense forwards ({self.dense:.3g} s) per image: {parts}",
                f"memory at the peak: {self.peak / 2**20:.0f} MiB over model and images ({self.method})",
                f"{self.sparsity:.1%} of the blocks skipped; largest error of an image kept back {self.again[1]:.6g}, {right}",
            ]
        )


@torch.no_grad()
def run_tune_case(case: ModelCase, images: int, sparsity: float) -> TuneCost:
    """Pictures of smooth noise, each another; the case's pattern is not used."""
    model = build_model(case)
    pictures = [_picture(case, number) for number in range(images)]
    before = [_dense_seconds(model, pictures[0]) for _ in range(FORWARDS + 1)][1:]
    parts: dict[str, float] = {}
    last = start = time.perf_counter()

    def on_step(what: str, done: int, of: int) -> None:
        nonlocal last
        now = time.perf_counter()
        parts[what] = parts.get(what, 0.0) + now - last
        last = now

    meter = Meter(case.device)
    plan = tune(model, pictures, sparsity=sparsity, block_size=case.block_size, seed=case.seed, on_step=on_step)
    seconds = time.perf_counter() - start
    parts["layer by layer"] = time.perf_counter() - last
    peak = meter.peak()
    dense = statistics.median([*before, *(_dense_seconds(model, pictures[0]) for _ in range(FORWARDS))])
    _, kept_back = split(pictures, VERIFY, case.seed)
    references = [features(model, picture) for picture in kept_back]
    sparsify_(model, plan)
    errors = [
        _error(features(model, picture), expected) for picture, expected in zip(kept_back, references, strict=True)
    ]
    restore_(model)
    again = (max(plan.report["errors"]), max(errors))
    return TuneCost(images, dense, seconds, parts, peak, meter.method, plan.report["sparsity"], again)


def _picture(case: ModelCase, number: int) -> Tensor:
    """(1, 3, h, w): noise of several sizes, so that patches differ and neighbours are alike."""
    generator = torch.Generator().manual_seed(1000 * case.seed + number)
    height, width = case.image_size
    found = torch.zeros(1, 3, height, width)
    for side in (4, 16, 64):
        coarse = torch.randn(1, 3, side, side, generator=generator)
        found += torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    return found.to(case.device, DTYPES[case.dtype])


def _dense_seconds(model: nn.Module, picture: Tensor) -> float:
    start = time.perf_counter()
    out = features(model, picture)
    if out.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).double().norm() / expected.double().norm())
