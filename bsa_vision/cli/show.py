"""`bsa-vision doctor`, `describe`, `compare` and `masks`: options and output."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor

from bsa_vision.adapters import dense_plan, describe, sparsify_
from bsa_vision.cli import parse
from bsa_vision.cli.doctor import BROKEN, OK, advice, doctor
from bsa_vision.cli.options import (
    SOMETHING_WRONG,
    BlockSize,
    Checkpoint,
    DenseHeads,
    ImageSize,
    JsonFlag,
    ModelName,
    PatternName,
    PlanFile,
    Random,
    Tile,
    chosen_plan,
    option,
    read_images,
    wrong_usage,
)
from bsa_vision.compare import compare, num_steps
from bsa_vision.masks import Pattern, TokenLayout, draw
from bsa_vision.models import image_files
from bsa_vision.models.by_name import load


def show_doctor(as_json: JsonFlag = False) -> None:
    """Report the machine, the available backends and broken libraries.

    Exit code 1 if an installed library is broken.
    """
    found = doctor()
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        console = Console()
        table = Table(
            "kind", "name", "state", "details", title="bsa-vision doctor", title_justify="left"
        )
        for finding in found:
            style = {OK: "green", BROKEN: "bold red"}.get(finding.state, "")
            table.add_row(
                finding.kind, finding.name, Text(finding.state, style), Text(finding.detail)
            )
        console.print(table)
        for text in dict.fromkeys(advice(finding) for finding in found if finding.is_wrong):
            console.print(text, markup=False)
    if any(finding.is_wrong for finding in found):
        raise typer.Exit(SOMETHING_WRONG)


def show_masks(
    ctx: typer.Context,
    pattern: Annotated[
        str,
        typer.Argument(
            help="Name in masks.PATTERNS with parameters, e.g. local:8 or window:14:shift=7."
        ),
    ],
    grid: Annotated[
        str, option("Grid of patches, ROWSxCOLUMNS, or the number of patches of a square.")
    ] = "64x64",
    prefix_tokens: Annotated[
        int, option("Number of special tokens before the patches.", min=0)
    ] = 0,
    suffix_tokens: Annotated[int, option("Number of special tokens after the patches.", min=0)] = 0,
    order: Annotated[str, option("Token order: tile or raster.")] = "tile",
    tile: Tile = "8x16",
    block_size: BlockSize = 128,
    png: Annotated[
        Path | None, option("PNG file for a picture of the keys that one query block attends to.")
    ] = None,
    query: Annotated[
        str | None,
        option(
            "Patch, ROWxCOLUMN, whose query block --png shows.", default="the middle of the grid"
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Draw the block mask of a pattern: query blocks (rows) by key blocks (columns)."""
    with wrong_usage(ctx, "masks"):
        read = parse.pattern(pattern, "pattern")
        layout = TokenLayout(
            parse.grid(grid, "--grid"),
            num_prefix_tokens=prefix_tokens,
            num_suffix_tokens=suffix_tokens,
            order=order,
            tile=parse.grid(tile, "--tile"),
            block_size=block_size,
        )
        mask = read(layout)
        height, width = layout.grid
        patch = (height // 2, width // 2) if query is None else parse.patch(query)
        if png is not None:
            _picture(png, repr(read), layout, mask, patch)
    if as_json:
        print(json.dumps(_mask_data(read, layout, mask)))
        return
    print(draw(mask))
    print(
        f"{read!r} on {height} x {width} patches, {prefix_tokens} prefix and {suffix_tokens} "
        f"suffix tokens, {order} order: {mask.shape[0]} blocks of {block_size}, "
        f"{_sparsity(mask):.1%} skipped"
    )
    for label in read.labels(layout):
        print(label)
    if png is not None:
        print(f"picture: {png}")


def _sparsity(mask: Tensor) -> float:
    return 1 - mask.float().mean().item()


def _mask_data(pattern: Pattern, layout: TokenLayout, mask: Tensor) -> dict[str, object]:
    """Return the output of `bsa-vision masks --json`."""
    return {
        "pattern": pattern.spec,
        "grid": layout.grid,
        "order": layout.order,
        "blocks": list(mask.shape),
        "sparsity": _sparsity(mask),
        "labels": pattern.labels(layout),
        "mask": mask.int().tolist(),
    }


def show_model(
    ctx: typer.Context,
    model: ModelName,
    random: Random = False,
    checkpoint: Checkpoint = None,
    image_size: ImageSize = None,
    pattern: PatternName = None,
    dense_heads: DenseHeads = 0,
    plan: PlanFile = None,
    as_json: JsonFlag = False,
) -> None:
    """Describe a model's attention layers, and how much faster sparse heads can make it.

    Also lists the layers that stay dense, with reasons.
    """
    with wrong_usage(ctx, "describe"):
        loaded = load(model, random=random, checkpoint=checkpoint, image_size=image_size)
        plan_used = chosen_plan(loaded, pattern, dense_heads, plan) or dense_plan(loaded)
        report = describe(sparsify_(loaded, plan_used), image_size)
    if as_json:
        data = {
            **asdict(report),
            "gain": report.gain,
            "sparsity": report.sparsity,
            "ceiling": report.cost.ceiling(),
        }
        print(json.dumps(data, indent=2))
    else:
        print(report)


def show_comparison(
    ctx: typer.Context,
    model: ModelName,
    images: Annotated[list[str], typer.Argument(help="Image files, or folders of images.")],
    random: Random = False,
    checkpoint: Checkpoint = None,
    image_size: ImageSize = None,
    pattern: PatternName = None,
    dense_heads: DenseHeads = 0,
    plan: PlanFile = None,
    rounds: Annotated[
        int, option("Number of timed rounds; each runs the dense and the sparse model.", min=1)
    ] = 3,
    as_json: JsonFlag = False,
) -> None:
    """Compare a model with and without sparse heads on your images.

    Shows the error of every layer, time and memory. Give --pattern or --plan.
    """
    with wrong_usage(ctx, "compare"):
        files = image_files.find(images)
        loaded = load(model, random=random, checkpoint=checkpoint, image_size=image_size)
        plan_used = chosen_plan(loaded, pattern, dense_heads, plan)
        if plan_used is None:
            raise ValueError("neither --pattern nor --plan is given: expected one of them.")
        read, size, (mean, std) = read_images(loaded, files, image_size)
        sparsify_(loaded, plan_used)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("comparing", total=num_steps(list(read), rounds))
            found = compare(loaded, list(read.values()), rounds, lambda: progress.advance(task))
    if as_json:
        about = {
            "images": [str(file) for file in read],
            "size": size,
            "normalisation": (mean, std),
            "random_weights": random,
        }
        print(json.dumps({**about, **found.to_json()}, indent=2))
        return
    print(found)
    print(
        f"images cropped to {size[0]} x {size[1]} pixels, normalised with mean {mean} and "
        f"standard deviation {std}"
    )
    if random:
        print("RANDOM WEIGHTS: these errors say nothing about a trained model.")


def _picture(
    path: Path, title: str, layout: TokenLayout, mask: Tensor, patch: tuple[int, int]
) -> None:
    """Save a picture of the keys that the query block of one patch attends to."""
    import numpy as np

    from bsa_vision.viz import View, block_at, plot_views

    view = View(title, layout, mask, block_at(layout, *patch))
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_views(np.full((*layout.grid, 3), 0.85), [view]).savefig(path, dpi=110)
