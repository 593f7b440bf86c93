"""Measure the cost of tuning in dense forward passes and memory, and check its report.

    python benchmarks/tuning_cost.py --model dinov3 --images 4

The images are smooth noise and the weights are random. The exit code is 1 if the reported error of
the held-out images is wrong.
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

FORWARDS = 3  # dense forward passes to time before and after tuning
CLOSE = 1e-3  # allowed relative difference between the reported and the measured error


@dataclass(frozen=True)
class TuningCost:
    """The cost of one call of `tune`.

    dense    seconds of a dense forward pass of one image, median before and after tuning
    seconds  seconds of `tune`
    parts    seconds per step
    peak     peak bytes on top of the model and the images
    method   how the peak was read
    errors   largest error of a held-out image, as reported and as measured again
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
        """Time per image, in dense forward passes."""
        return self.seconds / self.images / self.dense

    @property
    def ok(self) -> bool:
        reported, found = self.errors
        return abs(reported - found) <= CLOSE * found

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {took / self.seconds:.0%}" for name, took in self.parts.items())
        verdict = "as reported" if self.ok else f"WRONG: the report says {self.errors[0]:.6g}"
        return (
            f"{self.seconds:.1f} s for {self.images} images, {self.forwards:.1f} dense forward "
            f"passes ({self.dense:.3g} s) per image: {parts}\n"
            f"peak memory: {self.peak / 2**20:.0f} MiB on top of model and images ({self.method})\n"
            f"{self.sparsity:.1%} of the blocks skipped; largest error of a held-out image: "
            f"{self.errors[1]:.6g}, {verdict}"
        )


@torch.no_grad()
def measure(case: ModelCase, images: int, sparsity: float) -> TuningCost:
    """Tune the model of the case, whose pattern is ignored."""
    model, case = build_model(case)
    samples = [make_image(case, number) for number in range(images)]
    before = [_dense_seconds(model, samples[0]) for _ in range(FORWARDS + 1)][1:]
    parts: dict[str, float] = {}
    last = start = time.perf_counter()

    def on_step(what: str, done: int, of: int) -> None:
        nonlocal last
        now = time.perf_counter()
        parts[what] = parts.get(what, 0.0) + now - last
        last = now

    meter, size = Meter(case.device), case.block_size
    plan = tune(model, samples, sparsity=sparsity, block_size=size, seed=case.seed, on_step=on_step)
    seconds = time.perf_counter() - start
    parts["layer by layer"] = time.perf_counter() - last
    peak = meter.peak()
    after = [_dense_seconds(model, samples[0]) for _ in range(FORWARDS)]
    _, held_out = split(samples, VERIFY, case.seed)
    references = [features(model, image) for image in held_out]
    sparsify_(model, plan)
    results = [features(model, image) for image in held_out]
    restore_(model)
    errors = [
        float((result - expected).double().norm() / expected.double().norm())
        for result, expected in zip(results, references, strict=True)
    ]
    report, dense = plan.report, statistics.median([*before, *after])
    largest = (max(report["errors"]), max(errors))
    cost = (peak, meter.method, report["sparsity"], largest)
    return TuningCost(images, dense, seconds, parts, *cost)


def make_image(case: ModelCase, number: int) -> Tensor:
    """Draw a (1, 3, h, w) image of noise at several scales, so that adjacent patches are alike."""
    assert case.image_size is not None
    generator = torch.Generator().manual_seed(1000 * case.seed + number)
    image = torch.zeros(1, 3, *case.image_size)
    for side in (4, 16, 64):
        coarse = torch.randn(1, 3, side, side, generator=generator)
        image += nn.functional.interpolate(coarse, case.image_size, mode="bilinear")
    return image.to(case.device, DTYPES[case.dtype])


def _dense_seconds(model: nn.Module, image: Tensor) -> float:
    start = time.perf_counter()
    if features(model, image).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="dinov3", help="Model, as in `bench model`. Default: dinov3.")
    add("--image-size", type=parse.image_size, help="Pixels. Default: 64 patches per side.")
    add("--images", type=int, default=4, help="Number of images; a third is held out. Default: 4.")
    add("--sparsity", type=float, default=0.6, help="Share of blocks to skip. Default: 0.6.")
    add("--block-size", type=int, default=128, help="Tokens per block. Default: 128.")
    add("--device", type=parse.device, default="cpu", help="Torch device. Default: cpu.")
    add("--json", type=Path, help="JSON file for the results.")
    args = parser.parse_args(arguments)
    size, device = args.block_size, args.device
    case = ModelCase(args.model, Pattern("dense"), args.image_size, device=device, block_size=size)
    cost = measure(case, args.images, args.sparsity)
    print(cost)
    if args.json is not None:
        data = {**asdict(cost), "forwards": cost.forwards, "ok": cost.ok}
        args.json.write_text(json.dumps(data, indent=2) + "\n")
    sys.exit(0 if cost.ok else 1)


if __name__ == "__main__":
    main()
