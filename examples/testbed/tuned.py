"""What the tuner is worth on the testbed: against simpler plans at equal sparsity, and whether the error that was asked for holds.

    python examples/testbed/tuned.py                              # 50, 70 and 80 %, three tuning seeds, 300 held-out scenes
    python examples/testbed/tuned.py --max-error 0.1 --runs 20    # 20 tunings, each on scenes of its own

Tuning sees 24 scenes of its own for each seed, 16 to choose on and 8 to check; held-out scenes are others again. Simpler plans have the order of
tokens that the tuner found, and skip at most as many blocks as the tuned plan; the two that follow from images see the same 24 scenes.

uniform static     in every head the same share of the blocks, those with most attention in the mean over the scenes
local windows      the same radius in every head
nearest            the same number of nearest blocks in every row
spatial locality   `masks.generate_vit_spatial_locality_mask`
image to prompt    `masks.generate_sam_image_to_prompt_mask`, the click as its prompt
random             the same number of random blocks in every row

agreement is the IoU of the sparse and the dense answer, feature error the relative L2 distance of the tokens that leave the encoder.
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
    """What is tuned for: the tokens that leave the encoder."""
    return model.encode(*scene)


def calibration_scenes(model: Testbed, seed: int, count: int | None = None) -> list[Scene]:
    """Return scenes, `CALIBRATION` unless said, that neither training nor `scenes.held_out` of a small seed shows."""
    count = CALIBRATION if count is None else count
    made = scenes.make(
        list(scenes.held_out(count, 1000 + seed)),
        model.size.grid * model.size.patch,
        scenes.HARD,
        "cpu",
    )
    return [(made.images[i : i + 1], made.click[i : i + 1]) for i in range(count)]


# Plans


def tuned_plans(
    model: Testbed, sparsities: Sequence[float], seed: int
) -> tuple[dict[float, bsa.SparsityPlan], float, int]:
    """One pass over the scenes for all of them; also the time of the first, in dense forwards of a scene, and how many it was chosen on."""
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
    """Names and plans that skip as many blocks as `tuned` or a few less."""
    spec = bsa.inspect(model)
    layout, most = tuned.layout(spec), tuned.report["sparsity"]
    options = dict(order=tuned.order, tile=tuned.tile, block_size=tuned.block_size)

    def uniform(pattern: str, name: str, values: Sequence[Any]) -> bsa.SparsityPlan:
        chosen = _within(values, lambda value: Pattern(pattern, **{name: value})(layout), most)
        return bsa.uniform_plan(spec, pattern, **{name: chosen}, **options)

    shares = [share / 200 for share in range(199)]
    yield "uniform static", uniform_static(model, layout, 1 - most, calibration_scenes(model, seed))
    yield "local windows", uniform("local_window", "radius", range(layout.grid[0]))
    yield "nearest", uniform("nearest", "sparsity", shares)
    yield "random", uniform("random_blocks", "sparsity", shares)
    yield "spatial locality", spatial_locality(model, most)
    yield "image to prompt", image_to_prompt(model, most)


def _within(values: Sequence[Any], mask: Callable[[Any], Tensor], most: float) -> Any:
    """The value whose mask skips most, yet not more than `most`."""
    skipped = {value: 1 - mask(value).double().mean().item() for value in values}
    return max(
        (value for value in values if skipped[value] <= most + 1e-9),
        key=lambda value: skipped[value],
    )


def uniform_static(
    model: Testbed, layout: TokenLayout, density: float, images: Sequence[Scene]
) -> bsa.SparsityPlan:
    """Every head keeps this share of its blocks, those with most attention."""
    spec = bsa.inspect(model)
    found = {layer.key: BlockStatistics.empty(layer.heads, layout) for layer in spec.layers}
    with torch.no_grad(), bsa.observe(model, lambda seen: found[seen.layer.key].add(seen, layout)):
        for image in images:
            encode(model, image)
    return bsa.SparsityPlan(
        spec.fingerprint,
        {
            f"{key}/{head}": Static(_top(mass, density, layout), layout)
            for key, own in found.items()
            for head, mass in enumerate(own.mass)
        },
        {
            layer.key: tuple(f"{layer.key}/{head}" for head in range(layer.heads))
            for layer in spec.layers
        },
        **dict(order=layout.order, tile=layout.tile, block_size=layout.block_size),
    )


def _top(mass: Tensor, density: float, layout: TokenLayout) -> Tensor:
    """(R, C) -> the blocks with most attention; special ones and the diagonal always."""
    forced = Pattern("special")(layout) | torch.eye(layout.num_blocks, dtype=torch.bool)
    score = mass.masked_fill(forced, torch.inf).flatten()
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask[score.topk(-int(-density * len(score) // 1)).indices] = True
    return mask.view_as(mass)


def spatial_locality(model: Testbed, most: float) -> bsa.SparsityPlan:
    size, spec = model.size, bsa.inspect(model)

    def made(radius: int) -> Tensor:
        return masks.generate_vit_spatial_locality_mask(
            size.grid * size.patch, size.patch, BLOCK_SIZE, 1, size.heads, locality_radius=radius
        )

    chosen = _within(range(size.grid), made, most)
    # Made for rows of tokens with one special token in front, as the click's is.
    return _of_all_layers(spec, bsa.HeadMasks(made(chosen), block_size=BLOCK_SIZE))


def image_to_prompt(model: Testbed, most: float) -> bsa.SparsityPlan:
    size, spec = model.size, bsa.inspect(model)

    def made(sparsity: float) -> Tensor:
        return masks.generate_sam_image_to_prompt_mask(
            size.grid**2, 1, BLOCK_SIZE, 1, size.heads, image_sparsity=sparsity
        )

    chosen = _within([share / 200 for share in range(199)], made, most)
    # Its prompts come last: tiles of one row are the rows of the image, and special tokens follow them.
    layout = TokenLayout(
        spec.grid, num_prefix_tokens=1, order="tile", tile=(1, size.grid), block_size=BLOCK_SIZE
    )
    return _of_all_layers(spec, bsa.HeadMasks(made(chosen), layout=layout, block_size=BLOCK_SIZE))


def _of_all_layers(spec: bsa.ModelSpec, head_masks: bsa.HeadMasks) -> bsa.SparsityPlan:
    return bsa.SparsityPlan.from_head_masks(spec, {layer.key: head_masks for layer in spec.layers})


# What they are worth


def against_simpler(
    model: Testbed, sparsities: Sequence[float], seeds: int, count: int, console: Console
) -> None:
    """A table for each sparsity."""
    plans: dict[str, bsa.SparsityPlan] = {}
    forwards: list[float] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("tuning", total=seeds)
        for seed in range(seeds):
            found_plans, took, chosen_on = tuned_plans(model, sparsities, seed)
            forwards.append(took)
            for level, plan in found_plans.items():
                plans[f"tuned {level} {seed}"] = plan
                same = {
                    name: one
                    for name, one in simpler_plans(model, plan, seed)
                    if not seed or name == "uniform static"
                }
                plans |= {f"{name} {level} {seed}": one for name, one in same.items()}
            progress.advance(task)
        task = progress.add_task("scenes", total=count)
        rows = evaluate(
            model, plans, scenes.held_out(count), on_batch=lambda done: progress.advance(task, done)
        )
    found = {row.name: row for row in rows}
    for level in sparsities:
        Console(width=170).print(_table(found, level, count))
    print(
        f"tuning took {median(forwards):.0f} dense forwards of a scene, the median of {seeds} seeds: {median(forwards) / CALIBRATION:.1f} for each of the "
        f"{CALIBRATION} scenes given, {median(forwards) / chosen_on:.1f} for each of the {chosen_on} chosen on; another sparsity needs no new pass"
    )


def _table(found: dict[str, Row], level: float, count: int) -> Table:
    table = Table(
        title=f"{level:.0%}, {count} held-out scenes; intervals are 95 %, paired by scene",
        title_justify="left",
    )
    for column in (
        "",
        "skipped",
        "mIoU lost",
        "of each seed",
        "more than tuned",
        "agreement",
        "less than tuned",
        "feature error",
    ):
        table.add_column(column)
    dense = torch.tensor(found["dense"].per_scene["iou"])
    names = dict.fromkeys(key.rsplit(" ", 2)[0] for key in found if f" {level} " in key)
    tuned, agreed = (_of(found, f"tuned {level} ", metric) for metric in ("iou", "agreement"))
    for name in names:
        iou, agreement, error = (
            _of(found, f"{name} {level} ", x) for x in ("iou", "agreement", "feature_error")
        )
        simpler = name != "tuned"
        table.add_row(
            name,
            f"{mean(row.sparsity for key, row in found.items() if key.startswith(f'{name} {level} ')):.1%}",
            str(bootstrap(dense - iou.mean(0))),
            ", ".join(f"{x:.3f}" for x in (dense - iou).mean(1).tolist()),
            str(bootstrap(tuned.mean(0) - iou.mean(0))) if simpler else "",
            f"{agreement.mean():.3f}",
            str(bootstrap(agreed.mean(0) - agreement.mean(0))) if simpler else "",
            f"{error.mean():.3f}",
        )
    return table


def _of(found: dict[str, Row], prefix: str, metric: str) -> Tensor:
    """(tuning seeds, scenes)"""
    return torch.stack(
        [
            torch.tensor(row.per_scene[metric])
            for key, row in found.items()
            if key.startswith(prefix)
        ]
    )


@torch.no_grad()
def holds(model: Testbed, max_error: float, runs: int, count: int, console: Console) -> None:
    """Tune for an error with other seeds and scenes, and look at scenes that no run saw."""
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
            layers += [(one["predicted"], one["measured"]) for one in plan.report["layers"]]
            progress.advance(task)
    within = sum(error <= max_error for error in measured)
    print(
        f"max_error={max_error:g}: the mean error of {count} held-out scenes is within it in {within} of {runs} runs; median {median(measured):.4f}, "
        f"largest {max(measured):.4f}; sparsity {min(sparsity):.1%} to {max(sparsity):.1%}"
    )
    pooled = torch.corrcoef(torch.tensor(layers).T)[0, 1].item()
    print(
        f"error of layers, predicted and measured: correlation {pooled:.3f} over all runs and layers; within a run {min(correlations):.3f} to "
        f"{max(correlations):.3f}, median {median(correlations):.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, default=SHIPPED, help="a file of train.py")
    parser.add_argument(
        "--sparsity",
        type=float,
        action="append",
        help="several times; 0.5, 0.7 and 0.8 if left out",
    )
    parser.add_argument("--seeds", type=int, default=3, help="of tuning")
    parser.add_argument("--scenes", type=int, default=300, help="held out")
    parser.add_argument("--max-error", type=float, help="instead: whether this error holds")
    parser.add_argument("--runs", type=int, default=20, help="with --max-error")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    try:
        model = load(arguments.model)
        if arguments.max_error is not None:
            holds(model, arguments.max_error, arguments.runs, arguments.scenes, console)
        else:
            against_simpler(
                model,
                arguments.sparsity or [0.5, 0.7, 0.8],
                arguments.seeds,
                arguments.scenes,
                console,
            )
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
