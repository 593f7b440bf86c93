"""Compare the tuner with simpler plans on the testbed, or check that its error bound holds.

    python examples/testbed/tuned.py                              # compare at 50, 70 and 80 %
    python examples/testbed/tuned.py --max-error 0.1 --runs 20    # check the bound, 20 times

Each tuning seed has its own 24 scenes (16 calibration, 8 held out); the evaluation uses other
scenes. Simpler plans use the token order of the tuned plan, and skip at most as many blocks. The
two that depend on images see the same 24 scenes.

uniform static     the same share of blocks in every head: those with most attention, mean over
                   the scenes
local windows      the same radius in every head
nearest            the same number of nearest blocks in every row
spatial locality   `masks.generate_vit_spatial_locality_mask`
image to prompt    `masks.generate_sam_image_to_prompt_mask`, with the click as its prompt
random             the same number of random blocks in every row

agreement is the IoU of the sparse and the dense answer. feature error is the relative L2 distance
of the encoder's output tokens.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

if __package__ in (None, ""):  # run as a script: find `examples` and the checkout's own packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import bsa_vision as bsa
import masks
from bsa_vision.masks import Pattern, TokenLayout
from bsa_vision.plans.static_mask import Static
from bsa_vision.tuning.statistics import BlockStatistics
from examples.testbed import scenes
from examples.testbed.evaluate import BLOCK_SIZE, TILE, Row, bootstrap, evaluate
from examples.testbed.model import SHIPPED, Testbed, load

CALIBRATION = 24  # scenes
Scene = tuple[Tensor, Tensor]  # (1, 3, H, W) pixels, (1, 2) click
LAYOUT = dict(tile=TILE, block_size=BLOCK_SIZE)


def encode(model: Testbed, scene: Scene) -> Tensor:
    """Return the target of tuning: the output tokens of the encoder."""
    return model.encode(*scene)


def calibration_scenes(model: Testbed, seed: int, count: int | None = None) -> list[Scene]:
    """Return `count` scenes (default: `CALIBRATION`) for tuning.

    They occur neither in training nor in `scenes.held_out` with a seed below 500.
    """
    count = CALIBRATION if count is None else count
    seeds, pixels = scenes.held_out(count, 1000 + seed), model.size.grid * model.size.patch
    batch = scenes.make(seeds, pixels, scenes.HARD)
    return list(zip(batch.images.split(1), batch.click.split(1)))


def tuned_plans(
    model: Testbed, sparsities: Sequence[float], seed: int
) -> tuple[dict[float, bsa.SparsityPlan], float, int]:
    """Tune a plan for each sparsity, with one pass over the scenes.

    Also returns the time of the first tuning, in dense forward passes of one scene, and the number
    of calibration scenes.
    """
    found = calibration_scenes(model, seed)
    plans, forward, seconds = {}, _forward_seconds(model, found), 0.0
    with tempfile.TemporaryDirectory() as folder:
        keep: dict[str, Any] = dict(statistics=Path(folder) / "statistics", resume=True, **LAYOUT)
        for level in sparsities:
            start = time.perf_counter()
            plans[level] = bsa.tune(model, found, sparsity=level, target=encode, seed=seed, **keep)
            seconds = seconds or time.perf_counter() - start
    forward = (forward + _forward_seconds(model, found)) / 2
    return plans, seconds / forward, plans[level].report["images"]["calibration"]


@torch.no_grad()
def _forward_seconds(model: Testbed, found: Sequence[Scene]) -> float:
    times = []
    for scene in found:
        start = time.perf_counter()
        encode(model, scene)
        times.append(time.perf_counter() - start)
    return median(times)


def simpler_plans(
    model: Testbed, tuned: bsa.SparsityPlan, seed: int
) -> Iterator[tuple[str, bsa.SparsityPlan]]:
    """Yield names and plans that skip as many blocks as `tuned`, or a few less."""
    spec = bsa.inspect(model)
    layout, most = tuned.layout(spec), tuned.report["sparsity"]
    options = dict(order=tuned.order, tile=tuned.tile, block_size=tuned.block_size)

    def uniform(pattern: str, name: str, values: Sequence[Any]) -> bsa.SparsityPlan:
        best = _best(values, lambda value: Pattern(pattern, **{name: value})(layout), most)
        return bsa.uniform_plan(spec, pattern, **{name: best}, **options)

    shares = [share / 200 for share in range(199)]
    yield "uniform static", uniform_static(model, layout, 1 - most, calibration_scenes(model, seed))
    yield "local windows", uniform("local_window", "radius", range(layout.grid[0]))
    yield "nearest", uniform("nearest", "sparsity", shares)
    yield "random", uniform("random_blocks", "sparsity", shares)
    yield "spatial locality", spatial_locality(model, most)
    yield "image to prompt", image_to_prompt(model, most)


def _best(values: Sequence[Any], mask: Callable[[Any], Tensor], most: float) -> Any:
    """Return the value whose mask skips the largest share of blocks that is at most `most`."""
    skipped = {value: 1 - mask(value).double().mean().item() for value in values}
    allowed = [value for value in values if skipped[value] <= most + 1e-9]
    return max(allowed, key=lambda value: skipped[value])


def uniform_static(
    model: Testbed, layout: TokenLayout, density: float, images: Sequence[Scene]
) -> bsa.SparsityPlan:
    """Return a plan in which every head keeps this share of its blocks: those with most mass."""
    spec = bsa.inspect(model)
    found = {layer.key: BlockStatistics.empty(layer.heads, layout) for layer in spec.layers}
    with torch.no_grad(), bsa.observe(model, lambda seen: found[seen.layer.key].add(seen, layout)):
        for image in images:
            encode(model, image)
    patterns = {
        f"{key}/{head}": Static(_top(mass, density, layout), layout)
        for key, statistics in found.items()
        for head, mass in enumerate(statistics.mass)
    }
    layers = {
        layer.key: tuple(f"{layer.key}/{head}" for head in range(layer.heads))
        for layer in spec.layers
    }
    options = dict(order=layout.order, tile=layout.tile, block_size=layout.block_size)
    return bsa.SparsityPlan(spec.fingerprint, patterns, layers, **options)


def _top(mass: Tensor, density: float, layout: TokenLayout) -> Tensor:
    """Return the blocks with most mass, (R, C) bool; always those of special tokens and itself."""
    forced = Pattern("special")(layout) | torch.eye(layout.num_blocks, dtype=torch.bool)
    score = mass.masked_fill(forced, torch.inf).flatten()
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask[score.topk(-int(-density * len(score) // 1)).indices] = True
    return mask.view_as(mass)


def spatial_locality(model: Testbed, most: float) -> bsa.SparsityPlan:
    """Return a plan with `masks.generate_vit_spatial_locality_mask` in all layers."""
    size, spec = model.size, bsa.inspect(model)

    def mask(radius: int) -> Tensor:
        return masks.generate_vit_spatial_locality_mask(
            size.grid * size.patch, size.patch, BLOCK_SIZE, 1, size.heads, locality_radius=radius
        )

    radius = _best(range(size.grid), mask, most)
    # The generator assumes raster order with one prefix token: here that of the click.
    return _plan_of(spec, bsa.HeadMasks(mask(radius), block_size=BLOCK_SIZE))


def image_to_prompt(model: Testbed, most: float) -> bsa.SparsityPlan:
    """Return a plan with `masks.generate_sam_image_to_prompt_mask` in all layers."""
    size, spec = model.size, bsa.inspect(model)

    def mask(sparsity: float) -> Tensor:
        return masks.generate_sam_image_to_prompt_mask(
            size.grid**2, 1, BLOCK_SIZE, 1, size.heads, image_sparsity=sparsity
        )

    sparsity = _best([share / 200 for share in range(199)], mask, most)
    # The generator puts prompts last, as tile order does. Tiles of one row give raster order.
    layout = TokenLayout(
        spec.grid, num_prefix_tokens=1, order="tile", tile=(1, size.grid), block_size=BLOCK_SIZE
    )
    return _plan_of(spec, bsa.HeadMasks(mask(sparsity), layout=layout, block_size=BLOCK_SIZE))


def _plan_of(spec: bsa.ModelSpec, head_masks: bsa.HeadMasks) -> bsa.SparsityPlan:
    return bsa.SparsityPlan.from_head_masks(spec, {layer.key: head_masks for layer in spec.layers})


def against_simpler(
    model: Testbed, sparsities: Sequence[float], seeds: int, count: int, console: Console
) -> None:
    """Print a table for each sparsity."""
    plans: dict[str, bsa.SparsityPlan] = {}
    forwards: list[float] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("tuning", total=seeds)
        for seed in range(seeds):
            tuned, took, num_calibration = tuned_plans(model, sparsities, seed)
            forwards.append(took)
            for level, plan in tuned.items():
                plans[f"tuned {level} {seed}"] = plan
                for name, simpler in simpler_plans(model, plan, seed):
                    if not seed or name == "uniform static":  # others do not depend on the seed
                        plans[f"{name} {level} {seed}"] = simpler
            progress.advance(task)
        task = progress.add_task("scenes", total=count)
        rows = evaluate(
            model, plans, scenes.held_out(count), on_batch=lambda done: progress.advance(task, done)
        )
    found = {row.name: row for row in rows}
    for level in sparsities:
        Console(width=170).print(_table(found, level, count))
    took = median(forwards)
    print(
        f"tuning took as long as {took:.0f} dense forward passes of one scene (median of {seeds} "
        f"seeds): {took / CALIBRATION:.1f} per scene ({CALIBRATION} scenes), "
        f"{took / num_calibration:.1f} per calibration scene ({num_calibration} scenes); further "
        "sparsities need no new pass"
    )


def _table(found: dict[str, Row], level: float, count: int) -> Table:
    table = Table(
        *("plan", "skipped", "mIoU lost", "per seed", "more than tuned"),
        *("agreement", "less than tuned", "feature error"),
        title=f"{level:.0%}, {count} held-out scenes; intervals are 95 %, paired by scene",
        title_justify="left",
    )
    dense = torch.tensor(found["dense"].per_scene["iou"])
    names = dict.fromkeys(key.rsplit(" ", 2)[0] for key in found if f" {level} " in key)
    tuned_rows = _rows(found, "tuned", level)
    tuned_iou, tuned_agreement = (_values(tuned_rows, key).mean(0) for key in ("iou", "agreement"))
    for name in names:
        rows, is_simpler = _rows(found, name, level), name != "tuned"
        iou, agreement = _values(rows, "iou"), _values(rows, "agreement")
        table.add_row(
            name,
            f"{mean(row.sparsity for row in rows):.1%}",
            str(bootstrap(dense - iou.mean(0))),
            ", ".join(f"{x:.3f}" for x in (dense - iou).mean(1).tolist()),
            str(bootstrap(tuned_iou - iou.mean(0))) if is_simpler else "",
            f"{agreement.mean():.3f}",
            str(bootstrap(tuned_agreement - agreement.mean(0))) if is_simpler else "",
            f"{_values(rows, 'feature_error').mean():.3f}",
        )
    return table


def _rows(found: dict[str, Row], name: str, level: float) -> list[Row]:
    """Return the rows of one kind of plan at one sparsity, one per tuning seed."""
    return [row for key, row in found.items() if key.startswith(f"{name} {level} ")]


def _values(rows: Sequence[Row], metric: str) -> Tensor:
    """Return a metric of every scene, (tuning seeds, scenes)."""
    return torch.stack([torch.tensor(row.per_scene[metric]) for row in rows])


@torch.no_grad()
def holds(model: Testbed, max_error: float, runs: int, count: int, console: Console) -> None:
    """Tune for `max_error` with several seeds, and print the errors of unseen scenes."""
    held_out = calibration_scenes(model, -500, count)
    references = [encode(model, scene) for scene in held_out]
    measured, sparsity, correlations = [], [], []
    layers: list[tuple[float, float]] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("runs", total=runs)
        for seed in range(runs):
            found = calibration_scenes(model, seed)
            plan = bsa.tune(model, found, max_error=max_error, target=encode, seed=seed, **LAYOUT)
            bsa.sparsify_(model, plan)
            errors = [
                float((encode(model, scene) - dense).norm() / dense.norm())
                for scene, dense in zip(held_out, references, strict=True)
            ]
            bsa.restore_(model)
            measured.append(mean(errors))
            sparsity.append(plan.report["sparsity"])
            correlations.append(plan.report["correlation"])
            layers += [(x["predicted"], x["measured"]) for x in plan.report["layers"]]
            progress.advance(task)
    within = sum(error <= max_error for error in measured)
    print(
        f"max_error={max_error:g}: the mean error of {count} held-out scenes is within the limit "
        f"in {within} of {runs} runs; median {median(measured):.4f}, largest {max(measured):.4f}; "
        f"sparsity {min(sparsity):.1%} to {max(sparsity):.1%}"
    )
    pooled = torch.corrcoef(torch.tensor(layers).T)[0, 1].item()
    print(
        f"predicted and measured errors of layers: correlation {pooled:.3f} over all runs and "
        f"layers; within a run {min(correlations):.3f} to {max(correlations):.3f}, median "
        f"{median(correlations):.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", type=Path, default=SHIPPED, help="model file; default: the shipped one")
    add(
        "--sparsity",
        type=float,
        action="append",
        help="share of blocks to skip; repeatable; default: 0.5, 0.7 and 0.8",
    )
    add("--seeds", type=int, default=3, help="number of tuning seeds; default: 3")
    add("--scenes", type=int, default=300, help="number of held-out scenes; default: 300")
    add("--max-error", type=float, help="check this error bound instead")
    add("--runs", type=int, default=20, help="number of tunings for --max-error; default: 20")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    try:
        model = load(arguments.model)
        if arguments.max_error is not None:
            holds(model, arguments.max_error, arguments.runs, arguments.scenes, console)
        else:
            sparsities = arguments.sparsity or [0.5, 0.7, 0.8]
            against_simpler(model, sparsities, arguments.seeds, arguments.scenes, console)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
