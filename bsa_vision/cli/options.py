"""What several commands take, and what they make of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor, nn

from bsa_vision.adapters import inspect, uniform_plan
from bsa_vision.adapters.swap.values import like_of
from bsa_vision.cli import parse
from bsa_vision.models import image_files
from bsa_vision.models.by_name import FORMS
from bsa_vision.plans.plan import SparsityPlan

JsonFlag = Annotated[bool, typer.Option("--json", help="Data instead of a table.")]
SOMETHING_WRONG, WRONG_USAGE, INTERRUPTED = 1, 2, 130
ModelName = Annotated[str, typer.Argument(help=FORMS)]
Random = Annotated[bool, typer.Option("--random", help="Fresh weights, none are downloaded.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Of segment_anything, for sam:...")]
ImageSize = Annotated[int | None, typer.Option(help="Pixels per side. [the model's own]")]
PatternName = Annotated[
    str | None, typer.Option(help="Sparse heads in all global layers: local:8, window:14:shift=7.")
]
DenseHeads = Annotated[int, typer.Option(help="So many first heads of each layer stay dense.")]
PlanFile = Annotated[Path | None, typer.Option(help="A plan file instead of a pattern.")]


def read_images(
    model: nn.Module, files: list[Path], image_size: int | None
) -> tuple[dict[Path, Tensor], tuple[int, int], image_files.Normalisation]:
    """Return the photographs that can be read, as the model wants them, their pixels (h, w), and their normalisation."""
    spec, how = inspect(model, image_size), image_files.normalisation(model)
    size = (spec.grid[0] * spec.patch_size[0], spec.grid[1] * spec.patch_size[1])
    like = like_of(model, model)
    images, unreadable = image_files.read_all(files, size, how)
    if unreadable and not int(os.environ.get("RANK", 0)):
        print(
            f"{len(unreadable)} of {len(files)} images are left out:",
            *unreadable,
            sep="\n  ",
            file=sys.stderr,
        )
    return {file: image.to(like.device, like.dtype) for file, image in images.items()}, size, how


def chosen_plan(
    model: nn.Module, pattern: str | None, dense_heads: int, file: Path | None
) -> SparsityPlan | None:
    """What --pattern and --plan say; None where neither does."""
    if pattern is not None and file is not None:
        raise ValueError(
            "--pattern and --plan: one of the two says what heads do; leave the other out."
        )
    if file is not None:
        return SparsityPlan.load(file)
    return (
        None
        if pattern is None
        else uniform_plan(model, parse.pattern(pattern), dense_heads=dense_heads)
    )
