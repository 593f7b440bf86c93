"""`bsa-vision bench`: the options of its commands."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from bsa_vision.cli.options import WRONG_USAGE
from bsa_vision.masks import Pattern
from bsa_vision.models.random_weights import BUILT_IN
from bsa_vision.storage import machine


class AttentionByDefault(TyperGroup):
    """Take `bench --tokens 64x64` for `bench attention --tokens 64x64`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] != "--help"):
            args = ["attention", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=AttentionByDefault,
    no_args_is_help=False,
    help="Measure this machine: `attention` (the default) or a whole `model`. Exit code 0: fine, "
    "1: a result was wrong, 2: wrong usage.",
)


def _option(text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=text, **limits)


PATTERN = "random, local:RADIUS, or a name of masks.PATTERNS with parameters: window:14:shift=7"
DENSITY = "Share of blocks to compute, for random and nearest"
Densities = Annotated[
    list[float] | None,
    _option(f"{DENSITY}; repeatable. Default: 0.1, 0.25, 0.5, 0.75 and 1.", min=0, max=1),
]
Dtype = Annotated[str, _option(f"{', '.join(DTYPES)}.")]
Device = Annotated[str, _option("cpu, cuda or cuda:1.")]
Batch = Annotated[int, _option("Number of images.", min=1)]
Order = Annotated[str, _option("tile, raster, or auto: raster for patterns without places.")]
DenseHeads = Annotated[int, _option("Number of leading heads to keep dense.", min=0)]
BlockSize = Annotated[int, _option("Tokens per block.", min=1)]
Seed = Annotated[int, _option("Seed of tensors, weights and random blocks.")]
Rounds = Annotated[int | None, _option("Timed rounds, all candidates each. Default: 5.", min=1)]
Backend = Annotated[str, _option(f"Backend of bsa-vision: auto, {', '.join(BACKENDS)}.")]
Quick = Annotated[bool, _option("Take a first look: small, few rounds.", "--quick")]
Implementations = Annotated[
    list[str] | None,
    _option(f"Among {', '.join(IMPLEMENTATIONS)}; repeatable. Default: all that run here."),
]
ModelName = Annotated[
    str, _option(f"{', '.join(BUILT_IN)} (ViT-B, random weights), or package.module:factory.")
]
JsonFile = Annotated[Path | None, _option("Write everything, raw seconds included.", "--json")]


@app.command()
def attention(
    ctx: typer.Context,
    tokens: Annotated[str | None, _option("Patches: 48x80. Default: 64x64.")] = None,
    density: Densities = None,
    pattern: Annotated[list[str], _option(f"{PATTERN}; repeatable.")] = ["random"],  # noqa: B006
    heads: Annotated[int, _option("Number of heads.", min=1)] = 12,
    head_dim: Annotated[int, _option("Channels per head.", min=1)] = 64,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    batch: Batch = 1,
    order: Order = "auto",
    dense_heads: DenseHeads = 0,
    block_size: BlockSize = 128,
    rel_pos: Annotated[bool, _option("Add a factored relative position.", "--rel-pos")] = False,
    backward: Annotated[bool, _option("Forward and backward.", "--backward")] = False,
    seed: Seed = 0,
    rounds: Rounds = None,
    implementation: Implementations = None,
    backend: Backend = "auto",
    quick: Quick = False,
    json: JsonFile = None,
    plot: Annotated[Path | None, _option("Plot time against density.", "--plot")] = None,
) -> None:
    """Compare one attention call with dense SDPA, SDPA with the same mask, and FlexAttention.

    Results are checked against the definition in float64 before anything is timed.
    """
    if quick:
        tokens, rounds, density = tokens or "32x32", rounds or 3, density or [0.25, 0.5]
        fast = [name for name in IMPLEMENTATIONS if name not in ("flex", *FOR_GPUS)]
        implementation = implementation or fast
    output = Output("attention", _command(ctx), json, plot)
    with _wrong_usage():
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
            replace(base, pattern=one, order=parse.order_for(one, order), **size, **how)  # type: ignore[arg-type]
            for one in _patterns(pattern, density, seed)
        ]
        for case in cases:  # a pattern that does not fit is found before the first one is timed
            make_masks(case)
    chosen, number = implementation or None, rounds or 5
    rows = run_all(cases, lambda case, on_step: run_case(case, chosen, number, on_step))
    output.finish(rows, machine.describe(device), number, len(cases))


@app.command()
def model(
    ctx: typer.Context,
    model: ModelName = "dinov3",
    image_size: Annotated[str | None, _option("Pixels: 1024, or 768x1024.")] = None,
    pattern: Annotated[str, _option(f"Pattern of every layer: {PATTERN}.")] = "local:8",
    density: Annotated[float, _option(f"{DENSITY}.", min=0, max=1)] = 0.25,
    dense_heads: DenseHeads = 0,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    batch: Batch = 1,
    order: Order = "auto",
    block_size: BlockSize = 128,
    seed: Seed = 0,
    rounds: Rounds = None,
    backend: Backend = "auto",
    quick: Quick = False,
    json: JsonFile = None,
) -> None:
    """Compare a whole model with sparse heads with the dense original."""
    output = Output("model", _command(ctx), json)
    if quick:
        image_size, rounds = image_size or "512", rounds or 2
    with _wrong_usage():
        output.check()
        _check(dtype, device, backend)
        (one,) = parse.with_density(parse.pattern(pattern), [density], seed)
        size = None if image_size is None else parse.image_size(image_size)
        how = dict(dtype=dtype, device=device, batch=batch, block_size=block_size)
        more = dict(dense_heads=dense_heads, backend=backend, seed=seed)
        case = ModelCase(model, one, size, order=parse.order_for(one, order), **how, **more)  # type: ignore[arg-type]
        rows = run_all([case], lambda case, on_step: run_model_case(case, rounds or 5))
    output.finish(rows, machine.describe(device), rounds or 5, 1)


@contextmanager
def _wrong_usage() -> Iterator[None]:
    """Turn what is wrong with the input into its message and exit code 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        print(f"bsa-vision bench: {error}", file=sys.stderr)
        raise typer.Exit(WRONG_USAGE) from None


def _check(dtype: str, device: str, backend: str) -> None:
    parse.one_of("--dtype", dtype, DTYPES)
    parse.one_of("--backend", backend, ("auto", *BACKENDS))
    parse.device(device)


def _patterns(texts: Sequence[str], density: Sequence[float] | None, seed: int) -> list[Pattern]:
    """Read the patterns; each whose density is free is repeated for every density."""
    read = [parse.pattern(text) for text in texts]
    if density and not any(parse.takes_density(one) for one in read):
        raise ValueError("--density: only random and nearest take one; leave it out.")
    densities = density or [0.1, 0.25, 0.5, 0.75, 1]
    return [one for each in read for one in parse.with_density(each, densities, seed)]


def _command(ctx: typer.Context) -> str:
    """Return the command line as it can be typed again."""
    return shlex.join(["bsa-vision", *(ctx.obj or [])])
