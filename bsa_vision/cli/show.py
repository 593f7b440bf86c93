"""`bsa-vision doctor`, `describe`, `compare` and `masks`: what is typed, and how it is shown."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from bsa_vision.adapters import dense_plan, describe, sparsify_
from bsa_vision.cli import parse
from bsa_vision.cli.doctor import BROKEN, OK, advice, doctor
from bsa_vision.cli.options import (
    SOMETHING_WRONG,
    WRONG_USAGE,
    Checkpoint,
    DenseHeads,
    ImageSize,
    JsonFlag,
    ModelName,
    PatternName,
    PlanFile,
    Random,
    chosen_plan,
    read_images,
)
from bsa_vision.compare import compare, num_steps
from bsa_vision.masks import TokenLayout, draw
from bsa_vision.models import image_files
from bsa_vision.models.by_name import load


def show_doctor(as_json: JsonFlag = False) -> None:
    """What is here and what works: machine, backends, libraries. Exit code 1 where an installed library is broken."""
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
    pattern: Annotated[
        str,
        typer.Argument(
            help="A name of masks.PATTERNS with parameters: local:8, window:14:shift=7."
        ),
    ],
    grid: Annotated[str, typer.Option(help="Patches: 64x64, or 4096 for a square.")] = "64x64",
    prefix_tokens: Annotated[int, typer.Option(help="Special tokens before the patches.")] = 0,
    suffix_tokens: Annotated[int, typer.Option(help="Special tokens after the patches.")] = 0,
    order: Annotated[str, typer.Option(help="tile or raster.")] = "tile",
    tile: Annotated[str, typer.Option(help="Patches of a tile, rows x columns.")] = "8x16",
    block_size: Annotated[int, typer.Option(help="Tokens per block.")] = 128,
    png: Annotated[
        Path | None, typer.Option(help="Also a picture: what one block of queries sees.")
    ] = None,
    query: Annotated[
        str | None, typer.Option(help="Patch whose block that is, row x column. [the middle]")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Draw a pattern on a grid: which blocks of queries (rows) compute which blocks of keys (columns)."""
    try:
        chosen = parse.pattern(pattern)
        layout = TokenLayout(
            parse.grid(grid, "--grid"),
            num_prefix_tokens=prefix_tokens,
            num_suffix_tokens=suffix_tokens,
            order=order,
            tile=parse.grid(tile, "--tile"),
            block_size=block_size,
        )
        mask = chosen(layout)
        middle = (layout.grid[0] // 2, layout.grid[1] // 2)
        place = middle if query is None else tuple(int(side) for side in query.split("x"))
        if png is not None:
            _picture(png, repr(chosen), layout, mask, place)
    except ValueError as error:
        print(f"bsa-vision masks: {error}", file=sys.stderr)
        raise typer.Exit(WRONG_USAGE) from None
    sparsity = 1 - mask.float().mean().item()
    if as_json:
        about = {
            "pattern": chosen.spec,
            "grid": layout.grid,
            "order": order,
            "blocks": list(mask.shape),
            "sparsity": sparsity,
        }
        print(json.dumps({**about, "labels": chosen.labels(layout), "mask": mask.int().tolist()}))
        return
    print(draw(mask))
    height, width = layout.grid
    print(
        f"{chosen!r} on {height} x {width} patches, {prefix_tokens} + {suffix_tokens} special tokens, {order} order: {mask.shape[0]} blocks of {block_size}, {sparsity:.1%} skipped"
    )
    for label in chosen.labels(layout):
        print(label)
    if png is not None:
        print(f"picture: {png}")


def show_model(
    model: ModelName,
    random: Random = False,
    checkpoint: Checkpoint = None,
    image_size: ImageSize = None,
    pattern: PatternName = None,
    dense_heads: DenseHeads = 0,
    plan: PlanFile = None,
    as_json: JsonFlag = False,
) -> None:
    """What each attention layer of a model does, what sparsity could gain, and what stays dense and why."""
    try:
        loaded = load(model, random=random, checkpoint=checkpoint, image_size=image_size)
        chosen = chosen_plan(loaded, pattern, dense_heads, plan) or dense_plan(loaded)
        report = describe(sparsify_(loaded, chosen), image_size)
    except (ValueError, OSError) as error:
        print(f"bsa-vision describe: {error}", file=sys.stderr)
        raise typer.Exit(WRONG_USAGE) from None
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
    model: ModelName,
    images: Annotated[list[str], typer.Argument(help="Photographs, or folders of them.")],
    random: Random = False,
    checkpoint: Checkpoint = None,
    image_size: ImageSize = None,
    pattern: PatternName = None,
    dense_heads: DenseHeads = 0,
    plan: PlanFile = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Timed rounds, dense and sparse alternating.")
    ] = 3,
    as_json: JsonFlag = False,
) -> None:
    """A model with sparse heads against itself without, on your images: error layer by layer, time, memory."""
    try:
        files = image_files.find(images)
        loaded = load(model, random=random, checkpoint=checkpoint, image_size=image_size)
        chosen = chosen_plan(loaded, pattern, dense_heads, plan)
        if chosen is None:
            raise ValueError(
                "neither --plan nor --pattern: one of the two says what heads do; give one."
            )
        read, size, how = read_images(loaded, files, image_size)
        sparsify_(loaded, chosen)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("comparing", total=num_steps(list(read), rounds))
            found = compare(loaded, list(read.values()), rounds, lambda: progress.advance(task))
    except (ValueError, OSError) as error:
        print(f"bsa-vision compare: {error}", file=sys.stderr)
        raise typer.Exit(WRONG_USAGE) from None
    about = {
        "images": [str(file) for file in read],
        "size": size,
        "normalisation": how,
        "random_weights": random,
    }
    if as_json:
        print(json.dumps({**about, **found.to_json()}, indent=2))
        return
    print(found)
    print(
        f"images cut to {size[0]} x {size[1]} pixels, normalised with mean {how[0]} and standard deviation {how[1]}"
    )
    if random:
        print("RANDOM WEIGHTS: these errors say nothing about a trained model.")


def _picture(
    path: Path, title: str, layout: TokenLayout, mask: object, place: tuple[int, ...]
) -> None:
    import numpy as np

    from bsa_vision.viz import View, block_at, plot_views

    if len(place) != 2:
        raise ValueError(f"--query {place}: expected a patch, row x column; write e.g. 32x32.")
    view = View(title, layout, mask, block_at(layout, place[0], place[1]))  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_views(np.full((*layout.grid, 3), 0.85), [view]).savefig(path, dpi=110)
