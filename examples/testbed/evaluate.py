"""Evaluate plans on the testbed: quality and speed on held-out scenes.

    python examples/testbed/evaluate.py --plan plan.json
    python examples/testbed/evaluate.py MODEL --pattern random_blocks:0.5 --pattern nearest:0.5

mIoU             mean IoU of the answers over scenes, at full resolution
boundary IoU     IoU of pixels whose distance to the outline is at most 2 % of the image's
                 diagonal (arXiv 2103.16562)
agreement        IoU of the sparse and the dense answer
feature error    relative L2 distance of the encoder's output tokens, sparse to dense
kept mass        share of the dense model's attention in kept blocks, over all heads and every
                 fifth query
time             per image, dense and sparse alternating

Intervals are 95 %, by paired bootstrap over scenes. A pattern applies to every head of every layer,
with blocks of 32 tokens and tiles of 4 x 8, or rows (`--pattern nearest:0.5@raster`). At 32 x 32
tokens this gives the block map of 64 x 64 tokens in blocks of 128.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

if __package__ in (None, ""):  # run as a script: find `examples` and the checkout's own packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import bsa_vision as bsa
from bsa_vision.adapters.swap.sparse_layer import layers_of
from bsa_vision.cli import parse
from bsa_vision.masks import TokenLayout
from examples.testbed import scenes
from examples.testbed.model import SHIPPED, Testbed, load, untrained, upsample
from examples.testbed.observe import block_mass, probabilities
from examples.testbed.train import iou

BATCH = 4
BLOCK_SIZE, TILE = 32, (4, 8)
QUERIES = 5  # attention is measured on every fifth query; coprime to the grid: all columns occur
METRICS = ("iou", "boundary_iou", "agreement", "feature_error", "kept_mass")


@dataclass(frozen=True)
class Interval:
    """Mean over scenes with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Row:
    """Results of the model with one plan, or without.

    sparsity      realised, over all heads
    cost          IoU lost relative to the dense model
    milliseconds  per image
    of_dense      median ratio of the time to that of the dense model on the same batch
    per_scene     metric -> one number per scene; the other fields are means over scenes
    """

    name: str
    sparsity: float
    iou: Interval
    cost: Interval
    boundary_iou: Interval
    agreement: Interval
    feature_error: Interval
    kept_mass: Interval
    milliseconds: float
    of_dense: float
    per_scene: Mapping[str, Sequence[float]]


Plans = Mapping[str, bsa.SparsityPlan]


@torch.inference_mode()
def evaluate(
    model: Testbed,
    plans: Plans,
    seeds: Sequence[int],
    difficulty: scenes.Difficulty = scenes.HARD,
    grid: int | None = None,
    on_batch: Callable[[int], Any] = lambda images: None,
) -> list[Row]:
    """Return one row for the dense model and one for each plan, on the same scenes.

    grid      tokens per side; None = the model's default
    on_batch  called with the number of scenes in each finished batch
    """
    grid = model.size.grid if grid is None else grid
    device = next(model.parameters()).device
    spec = bsa.inspect(model, image_size=grid * model.size.patch)
    plans = {name: plan.complete(spec) for name, plan in plans.items()}
    runs = {name: bsa.sparsify_(copy.deepcopy(model), plan) for name, plan in plans.items()}
    runs = {"dense": model, **runs}
    layouts = {name: plan.layout(spec) for name, plan in plans.items()}
    found: dict[str, dict[str, list[Tensor]]] = {
        name: {metric: [] for metric in METRICS} for name in runs
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    sparsity: dict[str, list[float]] = {name: [] for name in runs}
    pixels = grid * model.size.patch
    warm_up = scenes.make(seeds[:BATCH], pixels, difficulty, device)
    for run in runs.values():
        _run(run, warm_up)
    for first in range(0, len(seeds), BATCH):
        batch = scenes.make(seeds[first : first + BATCH], pixels, difficulty, device)
        masses = dense_masses(model, batch, set(layouts.values()))
        dense: tuple[Tensor, Tensor] | None = None
        for name, run in runs.items():
            tokens, answer, took = _run(run, batch)
            dense = dense or (tokens, answer)
            seconds[name].append(took / len(answer))
            mass = torch.ones(len(answer))
            if name in plans:
                kept = kept_blocks(plans[name], spec, prompts(batch))
                mass = _kept_mass(masses[layouts[name]], kept)
                sparsity[name].append(1 - kept.float().mean().item())
            for metric, values in _measure(batch, tokens, answer, *dense, mass).items():
                found[name][metric].append(values.float().cpu())
        on_batch(len(batch.mask))
    values = {
        name: {metric: torch.cat(parts) for metric, parts in metrics.items()}
        for name, metrics in found.items()
    }
    return [_row(name, mean(sparsity[name] or [0.0]), values, seconds) for name in runs]


def _run(model: Testbed, batch: scenes.Scenes) -> tuple[Tensor, Tensor, float]:
    """Return the tokens (B, 1 + h * w, dim), the answer (B, H, W) bool, and the time in seconds."""
    on_gpu = batch.images.is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    with in_context(model, batch):
        tokens = model.encode(batch.images, batch.click)
    logits = model.answer(tokens, batch.images)
    answer = upsample(logits.float(), batch.mask.shape[-2:]) > 0  # type: ignore[arg-type]
    if on_gpu:
        torch.cuda.synchronize()
    return tokens, answer, time.perf_counter() - start


def _measure(
    batch: scenes.Scenes,
    tokens: Tensor,
    answer: Tensor,
    dense_tokens: Tensor,
    dense_answer: Tensor,
    mass: Tensor,
) -> dict[str, Tensor]:
    """Return every metric of `METRICS`, (B,) each."""
    error = (tokens - dense_tokens).flatten(1).norm(dim=1) / dense_tokens.flatten(1).norm(dim=1)
    return {
        "iou": iou(answer, batch.mask),
        "boundary_iou": iou(outline(answer), outline(batch.mask)),
        "agreement": iou(answer, dense_answer),
        "feature_error": error,
        "kept_mass": mass,
    }


def outline(mask: Tensor) -> Tensor:
    """Return the pixels of a mask (B, H, W) near its outline or the border of the image.

    The distance is at most 2 % of the image's diagonal.
    """
    height, width = mask.shape[-2:]
    reach = max(1, round(0.02 * (height**2 + width**2) ** 0.5))
    outside = F.pad(1 - mask[:, None].float(), (reach,) * 4, value=1.0)
    wide = F.max_pool2d(outside, (1, 2 * reach + 1), stride=1)  # a square is a row of columns
    return mask & (F.max_pool2d(wide, (2 * reach + 1, 1), stride=1)[:, 0] > 0)


def kept_blocks(
    plan: bsa.SparsityPlan, spec: bsa.ModelSpec, clicks: Sequence[bsa.Prompts] = ()
) -> Tensor:
    """Return the blocks of a plan for all layers, (1, layers, H, R, C) bool.

    If patterns depend on clicks, the first dimension is the number of clicks.
    """
    layout = plan.layout(spec)
    boxes = [click.on_patches(spec.grid, spec.patch_size) for click in clicks] or [()]
    masks = [plan.compile(layer.key, layout, boxes) for layer in spec.layers]
    tokens = layout.num_tokens
    blocks = [mask.block_mask(tokens, tokens) for mask in masks]  # (1 or B, H, R, C)
    batch = max(map(len, blocks))
    return torch.stack([mask.expand(batch, -1, -1, -1) for mask in blocks], dim=1)


def prompts(batch: scenes.Scenes) -> list[bsa.Prompts]:
    """Return the clicks in pixels, for patterns that depend on them."""
    height, width = batch.mask.shape[-2:]
    return [bsa.Prompts(points=[(x * width, y * height)]) for x, y in batch.click.tolist()]


def in_context(model: Testbed, batch: scenes.Scenes) -> AbstractContextManager[Any]:
    """Return `bsa.context` with the clicks, or no context if no pattern depends on them."""
    needs_clicks = any(layer.masks.is_dynamic for layer in layers_of(model))
    return bsa.context(model, prompts=prompts(batch)) if needs_clicks else nullcontext()


def dense_masses(
    model: Testbed, batch: scenes.Scenes, layouts: set[TokenLayout]
) -> dict[TokenLayout, Tensor]:
    """Return the block mass of dense attention for each layout, (B, layers, H, R, C)."""
    found: dict[TokenLayout, list[Tensor]] = {layout: [] for layout in layouts}

    def add(seen: bsa.Observation) -> None:
        probs = probabilities(seen.q[:, :, ::QUERIES], seen.k)
        for layout, masses in found.items():
            masses.append(block_mass(probs, layout, QUERIES))

    if layouts:
        with bsa.observe(model, add):
            model.encode(batch.images, batch.click)
    return {layout: torch.stack(masses, dim=1) for layout, masses in found.items()}


def _kept_mass(mass: Tensor, kept: Tensor) -> Tensor:
    """Return the share of mass in kept blocks: (B, layers, H, R, C), (1 or B, ...) -> (B,)."""
    return (mass * kept.to(mass)).flatten(1).sum(1) / mass.flatten(1).sum(1)


def bootstrap(values: Tensor, draws: int = 2000, seed: int = 0) -> Interval:
    """Return the mean over scenes and its 95 % interval.

    Every call resamples the same scenes, so that differences are paired.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randint(len(values), (draws, len(values)), generator=generator)
    means = values.double()[samples].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return Interval(values.double().mean().item(), low, high)


def _row(
    name: str,
    sparsity: float,
    values: Mapping[str, Mapping[str, Tensor]],
    seconds: Mapping[str, Sequence[float]],
) -> Row:
    metrics = values[name]
    return Row(
        name,
        sparsity,
        cost=bootstrap(values["dense"]["iou"] - metrics["iou"]),
        **{metric: bootstrap(metrics[metric]) for metric in METRICS},
        milliseconds=1e3 * median(seconds[name]),
        of_dense=median(a / b for a, b in zip(seconds[name], seconds["dense"])),
        per_scene={key: [round(x, 5) for x in metrics[key].tolist()] for key in METRICS},
    )


def pattern_plan(text: str, spec: bsa.ModelSpec) -> bsa.SparsityPlan:
    """Return a plan with this pattern in every head; "nearest:0.5@raster" has raster order."""
    pattern, _, order = text.partition("@")
    options = dict(order=order or "tile", tile=TILE, block_size=BLOCK_SIZE)
    return bsa.uniform_plan(spec, parse.pattern(pattern), **options)


def table(rows: Sequence[Row], title: str) -> Table:
    """Return the rows as a table for the terminal."""
    names = ["sparsity", "mIoU (95 %)", "lost (95 %)", "boundary IoU", "agreement"]
    names += ["feature error", "kept mass", "ms per image", "time / dense"]
    found = Table("plan", title=title, title_justify="left")
    for name in names:
        found.add_column(name, justify="right")
    for row in rows:
        means = (row.boundary_iou, row.agreement, row.feature_error, row.kept_mass)
        found.add_row(
            row.name,
            f"{row.sparsity:.0%}",
            str(row.iou),
            "" if row.name == "dense" else str(row.cost),
            *(f"{interval.mean:.3f}" for interval in means),
            f"{row.milliseconds:.1f}",
            f"{row.of_dense:.2f}",
        )
    return found


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the arguments that the scripts of the testbed share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", type=Path, default=SHIPPED, help="model file; default: the shipped one")
    add("--shifted", action="store_true", help="use more objects, and textures unseen in training")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default, help="torch device; default: cuda if available, else cpu")
    return parser


def main() -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--plan", type=Path, action="append", default=[], help="plan file; repeatable")
    add(
        "--pattern",
        action="append",
        default=[],
        help="pattern as in `bsa-vision bench`, with @raster or @tile for the order; repeatable",
    )
    add("--scenes", type=int, default=300, help="number of scenes; default: 300")
    add("--seed", type=int, default=0, help="random seed of the scenes; default: 0")
    add("--grid", type=int, help="tokens per side; default: that of the model")
    add("--untrained", action="store_true", help="use random weights, for comparison")
    add("--json", type=Path, help="JSON file for all results, scene by scene")
    arguments = parser.parse_args()
    try:
        rows, record = _run_command(arguments)
    except (ValueError, bsa.PlanError, OSError) as error:
        parser.error(str(error))
    console = Console() if sys.stdout.isatty() else Console(width=180)
    console.print(table(rows, record["title"]))
    if arguments.json:
        record["rows"] = [asdict(row) for row in rows]
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def _run_command(arguments: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows, and a record of how they were measured."""
    if arguments.scenes < 1:
        raise ValueError(f"--scenes {arguments.scenes}: expected at least 1.")
    model = load(arguments.model, arguments.device)
    if arguments.untrained:
        model = untrained(model.size).to(arguments.device)
    grid = arguments.grid or model.size.grid
    spec = bsa.inspect(model, image_size=grid * model.size.patch)
    plans = {path.name: bsa.SparsityPlan.load(path) for path in arguments.plan}
    plans |= {text: pattern_plan(text, spec) for text in arguments.pattern}
    difficulty = scenes.SHIFTED if arguments.shifted else scenes.HARD
    seeds = scenes.held_out(arguments.scenes, arguments.seed)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("scenes", total=len(seeds))
        rows = evaluate(
            model, plans, seeds, difficulty, grid, lambda images: progress.advance(task, images)
        )
    kind = "SHIFTED" if arguments.shifted else "HARD"
    weights = "random weights" if arguments.untrained else arguments.model.name
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["bsa_vision"] = bsa.__version__
    record = {
        "title": f"{weights}, {len(seeds)} {kind} scenes of seed {arguments.seed}, "
        f"{grid} x {grid} tokens, {arguments.device}",
        "command": " ".join(["python", *sys.argv]),
        "model": getattr(model, "notes", None),
        "scenes": len(seeds),
        "seed": arguments.seed,
        "shifted": arguments.shifted,
        "grid": grid,
        "device": arguments.device,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return rows, record


if __name__ == "__main__":
    main()
