"""`bsa-vision bench`: options and commands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from bsa_vision.attention.backends.select import BACKENDS
from bsa_vision.bench.attention import run_case
from bsa_vision.bench.case import DTYPES, Case, make_masks
from bsa_vision.bench.implementations import FOR_GPUS, IMPLEMENTATIONS
from bsa_vision.bench.models import ModelCase, run_model_case
from bsa_vision.cli import parse
from bsa_vision.cli.bench_output import Output, run_all
from bsa_vision.cli.options import BlockSize, option, wrong_usage
from bsa_vision.masks import Pattern
from bsa_vision.models.random_weights import BUILT_IN
from bsa_vision.storage import machine


class AttentionByDefault(TyperGroup):
    """Run `bench --tokens 64x64` as `bench attention --tokens 64x64`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] != "--help"):
            args = ["attention", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=AttentionByDefault,
    no_args_is_help=False,
    help="Measure the speed of attention (`attention`, the default) or of a whole model (`model`)."
    "\n\nExit codes: 0 = success, 1 = a result was wrong, 2 = wrong usage.",
)

PATTERN = "random, local:RADIUS, or a name in masks.PATTERNS with parameters (window:14:shift=7)"
DENSITY = "Share of blocks to compute, 0 to 1, for random and nearest"
Densities = Annotated[
    list[float] | None,
    option(f"{DENSITY}; repeatable.", default="0.1, 0.25, 0.5, 0.75, 1", min=0, max=1),
]
Dtype = Annotated[str, option(f"Data type: {', '.join(DTYPES)}.")]
Device = Annotated[str, option("Torch device: cpu, cuda or cuda:1.")]
Batch = Annotated[int, option("Number of images.", min=1)]
Order = Annotated[
    str,
    option(
        "Token order: tile, raster or auto. auto = raster for patterns that ignore positions, tile "
        "for all others."
    ),
]
DenseHeads = Annotated[int, option("Number of leading heads to keep dense.", min=0)]
Seed = Annotated[int, option("Random seed of tensors, weights and random blocks.")]
Rounds = Annotated[
    int | None,
    option(
        "Number of timed rounds; each runs every candidate.", default="5, fewer with --quick", min=1
    ),
]
Backend = Annotated[str, option(f"Backend of bsa-vision: auto, {', '.join(BACKENDS)}.")]
Implementations = Annotated[
    list[str] | None,
    option(
        f"Implementation to compare: {', '.join(IMPLEMENTATIONS)}; repeatable.",
        default="all that this device can run",
    ),
]
ModelName = Annotated[
    str,
    option(f"Model: {', '.join(BUILT_IN)} (ViT-B with random weights), or package.module:factory."),
]
JsonFile = Annotated[Path | None, option("JSON file for all results and raw times.", "--json")]


@app.command()
def attention(
    ctx: typer.Context,
    tokens: Annotated[
        str | None, option("Grid of patches, ROWSxCOLUMNS.", default="64x64, 32x32 with --quick")
    ] = None,
    density: Densities = None,
    pattern: Annotated[list[str], option(f"Pattern: {PATTERN}; repeatable.")] = ["random"],  # noqa: B006
    heads: Annotated[int, option("Number of heads.", min=1)] = 12,
    head_dim: Annotated[int, option("Number of channels per head.", min=1)] = 64,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    batch: Batch = 1,
    order: Order = "auto",
    dense_heads: DenseHeads = 0,
    block_size: BlockSize = 128,
    rel_pos: Annotated[bool, option("Add SAM's relative position terms.", "--rel-pos")] = False,
    backward: Annotated[bool, option("Time the backward pass as well.", "--backward")] = False,
    seed: Seed = 0,
    rounds: Rounds = None,
    implementation: Implementations = None,
    backend: Backend = "auto",
    quick: Annotated[
        bool,
        option(
            "Run a short benchmark: 32x32 patches, densities 0.25 and 0.5, 3 rounds.", "--quick"
        ),
    ] = False,
    json: JsonFile = None,
    plot: Annotated[Path | None, option("Image file for a plot of time over density.")] = None,
) -> None:
    """Compare sparse attention with dense SDPA, SDPA with the same mask, and FlexAttention.

    All results are checked against a float64 reference before they are timed.
    """
    if quick:
        tokens, rounds, density = tokens or "32x32", rounds or 3, density or [0.25, 0.5]
        fast = [name for name in IMPLEMENTATIONS if name not in ("flex", *FOR_GPUS)]
        implementation = implementation or fast
    output = Output("attention", _command(ctx), json, plot)
    with wrong_usage(ctx, "bench"):
        output.check()
        for name in implementation or ():
            parse.one_of("--implementation", name, IMPLEMENTATIONS)
        _check(dtype, device, backend)
        size = dict(heads=heads, head_dim=head_dim, batch=batch, dense_heads=dense_heads)
        how = dict(dtype=dtype, device=device, block_size=block_size, backend=backend, seed=seed)
        base = Case(
            parse.grid(tokens or "64x64"), Pattern("dense"), rel_pos=rel_pos, backward=backward
        )
        cases = [
            replace(base, pattern=read, order=parse.order_for(read, order), **size, **how)  # type: ignore[arg-type]
            for read in _patterns(pattern, density, seed)
        ]
        for case in cases:  # find a pattern that does not fit before anything is timed
            make_masks(case)
    names, number = implementation or None, rounds or 5
    rows = run_all(cases, lambda case, on_step: run_case(case, names, number, on_step))
    output.finish(rows, machine.describe(device), number, len(cases))


@app.command()
def model(
    ctx: typer.Context,
    model: ModelName = "dinov3",
    image_size: Annotated[
        str | None,
        option(
            "Image size in pixels: 1024, or HEIGHTxWIDTH.",
            default="64 patches per side; the model's own size for a factory",
        ),
    ] = None,
    pattern: Annotated[str, option(f"Pattern of all layers: {PATTERN}.")] = "local:8",
    density: Annotated[float, option(f"{DENSITY}.", min=0, max=1)] = 0.25,
    dense_heads: DenseHeads = 0,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    batch: Batch = 1,
    order: Order = "auto",
    block_size: BlockSize = 128,
    seed: Seed = 0,
    rounds: Rounds = None,
    backend: Backend = "auto",
    quick: Annotated[
        bool, option("Run a short benchmark: 512 pixels per side, 2 rounds.", "--quick")
    ] = False,
    json: JsonFile = None,
) -> None:
    """Compare a whole model with sparse heads with the dense model."""
    output = Output("model", _command(ctx), json)
    if quick:
        image_size, rounds = image_size or "512", rounds or 2
    with wrong_usage(ctx, "bench"):
        output.check()
        _check(dtype, device, backend)
        (read,) = parse.with_density(parse.pattern(pattern), [density], seed)
        size = None if image_size is None else parse.image_size(image_size)
        how = dict(dtype=dtype, device=device, batch=batch, block_size=block_size)
        more = dict(dense_heads=dense_heads, backend=backend, seed=seed)
        case = ModelCase(model, read, size, order=parse.order_for(read, order), **how, **more)  # type: ignore[arg-type]
        rows = run_all([case], lambda case, on_step: run_model_case(case, rounds or 5))
    output.finish(rows, machine.describe(device), rounds or 5, 1)


def _check(dtype: str, device: str, backend: str) -> None:
    parse.one_of("--dtype", dtype, DTYPES)
    parse.one_of("--backend", backend, ("auto", *BACKENDS))
    parse.device(device)


def _patterns(texts: Sequence[str], density: Sequence[float] | None, seed: int) -> list[Pattern]:
    """Parse the patterns; repeat those without a sparsity for every density."""
    patterns = [parse.pattern(text) for text in texts]
    if density and not any(map(parse.takes_density, patterns)):
        raise ValueError("--density: only random and nearest take one.")
    densities = density or [0.1, 0.25, 0.5, 0.75, 1]
    return [each for pattern in patterns for each in parse.with_density(pattern, densities, seed)]


def _command(ctx: typer.Context) -> str:
    """Return the command line, quoted for a shell."""
    return shlex.join(["bsa-vision", *(ctx.obj or [])])
