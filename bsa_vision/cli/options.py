"""Options and helpers that several commands share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor, nn

from bsa_vision.adapters import inspect, uniform_plan
from bsa_vision.adapters.swap.values import like_of
from bsa_vision.cli import parse
from bsa_vision.errors import BackendUnavailable
from bsa_vision.models import image_files
from bsa_vision.models.by_name import FORMS
from bsa_vision.plans.plan import SparsityPlan

SOMETHING_WRONG, WRONG_USAGE, INTERRUPTED = 1, 2, 130  # exit codes


def option(text: str, *names: str, default: str | bool = True, **limits: Any) -> Any:
    """Return a typer option; `default` is shown as its default where the value itself is None.

    Use this for defaults in words: rich reads `[...]` in help texts as markup and drops it.
    """
    return typer.Option(*names, help=text, show_default=default, **limits)


JsonFlag = Annotated[bool, option("Print JSON instead of a table.", "--json")]
ModelName = Annotated[str, typer.Argument(help=f"Model to load: {FORMS}.")]
Random = Annotated[bool, option("Use random weights; do not download any.", "--random")]
Checkpoint = Annotated[Path | None, option("Checkpoint of segment_anything, for sam:... only.")]
ImageSize = Annotated[
    int | None, option("Height and width of images, in pixels.", default="the model's own")
]
PatternName = Annotated[
    str | None, option("Pattern of sparse heads in all global layers: local:8, window:14:shift=7.")
]
DenseHeads = Annotated[int, option("Number of leading heads per layer to keep dense.")]
PlanFile = Annotated[Path | None, option("Plan file to use instead of --pattern.")]
Tile = Annotated[str, option("Size of a tile in patches, ROWSxCOLUMNS.")]
BlockSize = Annotated[int, option("Number of tokens per block.", min=1)]


@contextmanager
def wrong_usage(ctx: typer.Context, command: str) -> Iterator[None]:
    """Print errors in the input to stderr and exit with code 2."""
    try:
        yield
    except (ValueError, OSError, ImportError, BackendUnavailable) as error:
        print(f"bsa-vision {command}: {_as_typed(str(error), ctx)}", file=sys.stderr)
        raise typer.Exit(WRONG_USAGE) from None


def _as_typed(message: str, ctx: typer.Context) -> str:
    """Name the option instead of the parameter: "max_error=-1: ..." -> "--max-error -1: ..."."""
    name, equals, rest = message.partition("=")
    options = {param.name: param.opts[0] for param in ctx.command.params if param.opts}
    option = options.get(name, "")
    return f"{option} {rest}" if equals and option.startswith("--") else message


def read_images(
    model: nn.Module, files: list[Path], image_size: int | None
) -> tuple[dict[Path, Tensor], tuple[int, int], image_files.Normalisation]:
    """Read images as the model expects them; list unreadable files on stderr.

    Returns the images by file, their size (height, width) in pixels, and their normalisation.
    """
    spec, normalisation = inspect(model, image_size), image_files.normalisation(model)
    size = (spec.grid[0] * spec.patch_size[0], spec.grid[1] * spec.patch_size[1])
    like = like_of(model, model)
    images, unreadable = image_files.read_all(files, size, normalisation)
    if unreadable and not int(os.environ.get("RANK", 0)):
        print(
            f"skipped {len(unreadable)} of {len(files)} images:",
            *unreadable,
            sep="\n  ",
            file=sys.stderr,
        )
    images = {file: image.to(like.device, like.dtype) for file, image in images.items()}
    return images, size, normalisation


def chosen_plan(
    model: nn.Module, pattern: str | None, dense_heads: int, file: Path | None
) -> SparsityPlan | None:
    """Return the plan given by --pattern or --plan, or None if neither is given."""
    if pattern is not None and file is not None:
        raise ValueError("--pattern and --plan are both given: expected one of them.")
    if file is not None:
        return SparsityPlan.load(file)
    if pattern is None:
        return None
    return uniform_plan(model, parse.pattern(pattern), dense_heads=dense_heads)
