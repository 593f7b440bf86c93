"""Measure what tuning costs in dense forwards and memory, and whether its report is right.

    python benchmarks/tuning_cost.py --model dinov3 --images 4

The images are smooth noise and the weights random. Exit code 1 where the error of a held-out image
is not the one that was reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bsa_vision.adapters import restore_, sparsify_
from bsa_vision.bench.case import DTYPES
from bsa_vision.bench.models import ModelCase, build_model
from bsa_vision.cli import parse
from bsa_vision.masks import Pattern
from bsa_vision.measure.peak_memory import Meter
from bsa_vision.models.features import features
from bsa_vision.tuning import tune
from bsa_vision.tuning.images import VERIFY, split

FORWARDS = 3  # timed, before and after
CLOSE = 1e-3  # relative difference of an error that is measured again


@dataclass(frozen=True)
class TuningCost:
    """The cost of one `tune`.

    dense    seconds of a dense forward of one image: median before and after
    seconds  of `tune`; `parts` says what they were spent on
    peak     bytes at the peak on top of model and images, read as `method` says
    errors   largest error of a held-out image: as reported, and as measured again from outside
    """

    images: int
    dense: float
    seconds: float
    parts: dict[str, float]
    peak: int
    method: str
    sparsity: float
    errors: tuple[float, float]

    @property
    def forwards(self) -> float:
        """Time per given image, in dense forwards."""
        return self.seconds / self.images / self.dense

    @property
    def ok(self) -> bool:
        reported, found = self.errors
        return abs(reported - found) <= CLOSE * found

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {took / self.seconds:.0%}" for name, took in self.parts.items())
        right = "as reported" if self.ok else f"WRONG: reported were {self.errors[0]:.6g}"
        return (
            f"{self.seconds:.1f} s for {self.images} images, {self.forwards:.1f} dense forwards "
            f"({self.dense:.3g} s) per image: {parts}\n"
            f"peak memory: {self.peak / 2**20:.0f} MiB over model and images ({self.method})\n"
            f"{self.sparsity:.1%} of the blocks skipped; largest error of a held-out image "
            f"{self.errors[1]:.6g}, {right}"
        )


@torch.no_grad()
def measure(case: ModelCase, images: int, sparsity: float) -> TuningCost:
    """Tune the case's model; its pattern is not used."""
    model, case = build_model(case)
    pictures = [make_picture(case, number) for number in range(images)]
    before = [_dense_seconds(model, pictures[0]) for _ in range(FORWARDS + 1)][1:]
    parts: dict[str, float] = {}
    last = start = time.perf_counter()

    def on_step(what: str, done: int, of: int) -> None:
        nonlocal last
        now = time.perf_counter()
        parts[what] = parts.get(what, 0.0) + now - last
        last = now

    meter, size = Meter(case.device), case.block_size
    plan = tune(
        model, pictures, sparsity=sparsity, block_size=size, seed=case.seed, on_step=on_step
    )
    seconds = time.perf_counter() - start
    parts["layer by layer"] = time.perf_counter() - last
    peak = meter.peak()
    after = [_dense_seconds(model, pictures[0]) for _ in range(FORWARDS)]
    _, held_out = split(pictures, VERIFY, case.seed)
    references = [features(model, picture) for picture in held_out]
    sparsify_(model, plan)
    found = [features(model, picture) for picture in held_out]
    restore_(model)
    errors = [
        float((one - expected).double().norm() / expected.double().norm())
        for one, expected in zip(found, references, strict=True)
    ]
    report, dense = plan.report, statistics.median([*before, *after])
    largest = (max(report["errors"]), max(errors))
    cost = (peak, meter.method, report["sparsity"], largest)
    return TuningCost(images, dense, seconds, parts, *cost)


def make_picture(case: ModelCase, number: int) -> Tensor:
    """(1, 3, h, w): noise of several sizes, so that patches differ and neighbours are alike."""
    assert case.image_size is not None
    generator = torch.Generator().manual_seed(1000 * case.seed + number)
    found = torch.zeros(1, 3, *case.image_size)
    for side in (4, 16, 64):
        coarse = torch.randn(1, 3, side, side, generator=generator)
        found += nn.functional.interpolate(coarse, case.image_size, mode="bilinear")
    return found.to(case.device, DTYPES[case.dtype])


def _dense_seconds(model: nn.Module, picture: Tensor) -> float:
    start = time.perf_counter()
    if features(model, picture).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="dinov3", help="as in `bsa-vision bench model`")
    parser.add_argument("--image-size", type=parse.image_size)
    parser.add_argument("--images", type=int, default=4, help="a third of them is held out")
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--device", type=parse.device, default="cpu")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(arguments)
    case = ModelCase(
        asked.model,
        Pattern("dense"),
        asked.image_size,
        device=asked.device,
        block_size=asked.block_size,
    )
    found = measure(case, asked.images, asked.sparsity)
    print(found)
    if asked.json is not None:
        data = {**asdict(found), "forwards": found.forwards, "ok": found.ok}
        asked.json.write_text(json.dumps(data, indent=2) + "\n")
    sys.exit(0 if found.ok else 1)


if __name__ == "__main__":
    main()
