"""What a plan does to the testbed's answers, on scenes that training never saw: how good they are, how near to the dense ones, how fast.

    python examples/testbed/evaluate.py --plan plan.json
    python examples/testbed/evaluate.py MODEL --pattern random_blocks:0.5 --pattern nearest:0.5 --pattern nearest:0.5@raster

mIoU             mean over scenes of the IoU of the answer, at full resolution
boundary IoU     of the pixels within 2 % of the image's diagonal of the outline (arXiv 2103.16562)
agreement        IoU of the sparse and the dense answer
feature error    relative L2 distance of the tokens that leave the encoder, sparse from dense
kept mass        share of the dense model's attention that lies in blocks that are kept, over all heads and every fifth query
time             per image, dense and sparse in turn

Intervals are 95 %, by paired bootstrap over scenes. Patterns stand for the same pattern in every head of every layer, in blocks of 32
tokens, in tiles of 4 x 8 unless @raster says rows: at 32 x 32 tokens that is the block map of 64 x 64 tokens in blocks of 128.
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
QUERIES = 5  # every fifth one tells where attention lies; prime to the sides of grids, so that all columns take part
METRICS = ("iou", "boundary_iou", "agreement", "feature_error", "kept_mass")


@dataclass(frozen=True)
class Interval:
    """A mean over scenes and where 95 % of the means of resampled scenes lie."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Row:
    """One way to run the model.

    sparsity      realised, over all heads
    iou ... kept_mass   means over scenes
    cost          IoU lost against dense, scene by scene
    milliseconds  per image, and `of_dense`: the median ratio to the dense run beside it
    per_scene     metric -> one number per scene
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
    """One row for the dense model and one for each plan, on the same scenes.

    grid      tokens per side, None = the model's own
    on_batch  called with the number of scenes that are done since the last call
    """
    grid = model.size.grid if grid is None else grid
    device = next(model.parameters()).device
    spec = bsa.inspect(model, image_size=grid * model.size.patch)
    plans = {name: plan.complete(spec) for name, plan in plans.items()}
    runs = {
        "dense": model,
        **{name: bsa.sparsify_(copy.deepcopy(model), plan) for name, plan in plans.items()},
    }
    layouts = {name: plan.layout(spec) for name, plan in plans.items()}
    found: dict[str, dict[str, list[Tensor]]] = {
        name: {metric: [] for metric in METRICS} for name in runs
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    sparsity: dict[str, list[float]] = {name: [] for name in runs}
    _warm_up(runs, scenes.make(seeds[:BATCH], grid * model.size.patch, difficulty, device))
    for first in range(0, len(seeds), BATCH):
        batch = scenes.make(
            seeds[first : first + BATCH], grid * model.size.patch, difficulty, device
        )
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
    means = {
        name: {metric: torch.cat(parts) for metric, parts in own.items()}
        for name, own in found.items()
    }
    return [_row(name, mean(sparsity[name] or [0.0]), means, seconds) for name in runs]


def _warm_up(runs: Mapping[str, Testbed], batch: scenes.Scenes) -> None:
    for run in runs.values():
        _run(run, batch)


def _run(model: Testbed, batch: scenes.Scenes) -> tuple[Tensor, Tensor, float]:
    """Tokens (B, 1 + h * w, dim), the answer (B, H, W) bool, and the seconds they took."""
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
    """Metric -> (B,)"""
    error = (tokens - dense_tokens).flatten(1).norm(dim=1) / dense_tokens.flatten(1).norm(dim=1)
    return {
        "iou": iou(answer, batch.mask),
        "boundary_iou": iou(outline(answer), outline(batch.mask)),
        "agreement": iou(answer, dense_answer),
        "feature_error": error,
        "kept_mass": mass,
    }


def outline(mask: Tensor) -> Tensor:
    """(B, H, W) bool -> the pixels of it that lie within 2 % of the diagonal of what is not it, or of the image's border."""
    height, width = mask.shape[-2:]
    reach = max(1, round(0.02 * (height**2 + width**2) ** 0.5))
    outside = F.pad(1 - mask[:, None].float(), (reach,) * 4, value=1.0)
    wide = F.max_pool2d(outside, (1, 2 * reach + 1), stride=1)  # a square is a row of columns
    return mask & (F.max_pool2d(wide, (2 * reach + 1, 1), stride=1)[:, 0] > 0)


# Attention that is kept


def kept_blocks(
    plan: bsa.SparsityPlan, spec: bsa.ModelSpec, clicks: Sequence[bsa.Prompts] = ()
) -> Tensor:
    """The blocks of a plan that names every layer, (1, layers, H, R, C) bool; one for each click where patterns follow them."""
    layout = plan.layout(spec)
    boxes = [click.on_patches(spec.grid, spec.patch_size) for click in clicks] or [()]
    masks = [plan.compile(layer.key, layout, boxes) for layer in spec.layers]
    blocks = [
        one.block_mask(layout.num_tokens, layout.num_tokens) for one in masks
    ]  # (1 or B, H, R, C)
    most = max(len(one) for one in blocks)
    return torch.stack([one.expand(most, -1, -1, -1) for one in blocks], dim=1)


def prompts(batch: scenes.Scenes) -> list[bsa.Prompts]:
    """The clicks in pixels, as patterns that follow them want to know them."""
    height, width = batch.mask.shape[-2:]
    return [bsa.Prompts(points=[(x * width, y * height)]) for x, y in batch.click.tolist()]


def in_context(model: Testbed, batch: scenes.Scenes) -> AbstractContextManager[Any]:
    """`bsa.context` with the clicks of these scenes, where the model has a pattern that follows them."""
    follows = any(layer.masks.is_dynamic for layer in layers_of(model))
    return bsa.context(model, prompts=prompts(batch)) if follows else nullcontext()


def dense_masses(
    model: Testbed, batch: scenes.Scenes, layouts: set[TokenLayout]
) -> dict[TokenLayout, Tensor]:
    """Layout -> (B, layers, H, R, C): where the dense model's attention lies, all of a head's adding up to its queries."""
    found: dict[TokenLayout, list[Tensor]] = {layout: [] for layout in layouts}

    def see(seen: bsa.Observation) -> None:
        probs = probabilities(seen.q[:, :, ::QUERIES], seen.k)
        for layout, masses in found.items():
            masses.append(block_mass(probs, layout, QUERIES))

    if layouts:
        with bsa.observe(model, see):
            model.encode(batch.images, batch.click)
    return {layout: torch.stack(masses, dim=1) for layout, masses in found.items()}


def _kept_mass(mass: Tensor, kept: Tensor) -> Tensor:
    """(B, layers, H, R, C) and (1 or B, layers, H, R, C) -> (B,)"""
    return (mass * kept.to(mass)).flatten(1).sum(1) / mass.flatten(1).sum(1)


# Statistics


def bootstrap(values: Tensor, draws: int = 2000, seed: int = 0) -> Interval:
    """(scenes,) -> mean and 95 % interval. The same scenes are drawn for every call, so that differences are paired."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(values), (draws, len(values)), generator=generator)
    means = values.double()[chosen].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return Interval(values.double().mean().item(), low, high)


def _row(
    name: str,
    sparsity: float,
    values: Mapping[str, Mapping[str, Tensor]],
    seconds: Mapping[str, Sequence[float]],
) -> Row:
    own = values[name]
    return Row(
        name,
        sparsity,
        cost=bootstrap(values["dense"]["iou"] - own["iou"]),
        **{metric: bootstrap(own[metric]) for metric in METRICS},
        milliseconds=1e3 * median(seconds[name]),
        of_dense=median(a / b for a, b in zip(seconds[name], seconds["dense"])),
        per_scene={
            metric: [round(value, 5) for value in own[metric].tolist()] for metric in METRICS
        },
    )


# The command


def pattern_plan(text: str, spec: bsa.ModelSpec) -> bsa.SparsityPlan:
    """ "nearest:0.5@raster" -> the plan with this pattern in every head; the order is tile where none is given."""
    described, _, order = text.partition("@")
    options = dict(order=order or "tile", tile=TILE, block_size=BLOCK_SIZE)
    return bsa.uniform_plan(spec, parse.pattern(described), **options)


def table(rows: Sequence[Row], title: str) -> Table:
    right = [
        ("", "left"),
        *(
            (name, "right")
            for name in ("sparsity", "mIoU (95 %)", "lost (95 %)", "boundary IoU", "agreement")
        ),
    ]
    right += [(name, "right") for name in ("feature error", "kept mass", "ms an image", "of dense")]
    found = Table(title=title, title_justify="left")
    for name, justify in right:
        found.add_column(name, justify=justify)  # type: ignore[arg-type]
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        default=SHIPPED,
        help="a file of train.py; the shipped one if left out",
    )
    parser.add_argument(
        "--plan",
        type=Path,
        action="append",
        default=[],
        help="a plan file; may be given several times",
    )
    parser.add_argument(
        "--pattern",
        action="append",
        default=[],
        help="as in `bsa-vision bench`, @raster or @tile for the order; several times",
    )
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    parser.add_argument(
        "--shifted",
        action="store_true",
        help="more objects, and textures that training never showed",
    )
    parser.add_argument("--grid", type=int, help="tokens per side; the model's own if left out")
    parser.add_argument(
        "--untrained", action="store_true", help="the same model with fresh weights, for comparison"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write everything there, scene by scene")
    arguments = parser.parse_args()
    try:
        rows, what = _evaluate_asked(arguments)
    except (ValueError, bsa.PlanError, OSError) as error:
        parser.error(str(error))
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table(rows, what["title"]))
    if arguments.json:
        what["rows"] = [asdict(row) for row in rows]
        arguments.json.write_text(json.dumps(what, indent=1) + "\n")


def _evaluate_asked(arguments: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """The rows, and what they were measured with."""
    if arguments.scenes < 1:
        raise ValueError(f"--scenes {arguments.scenes}: expected at least 1; give e.g. 300.")
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
    title = f"{weights}, {len(seeds)} {kind} scenes of seed {arguments.seed}, {grid} x {grid} tokens, {arguments.device}"
    what = {
        "title": title,
        "command": " ".join(["python", *sys.argv]),
        "model": getattr(model, "notes", None),
        "scenes": len(seeds),
        "seed": arguments.seed,
        "shifted": arguments.shifted,
        "grid": grid,
        "device": arguments.device,
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, bsa_vision {bsa.__version__}",
    }
    return rows, what


if __name__ == "__main__":
    main()
