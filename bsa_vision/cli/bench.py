"""`bsa-vision bench`: what is typed, run, printed and written. Imported by the command line alone: needs typer and rich."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from typer.core import TyperGroup

from bsa_vision.attention.backends.select import BACKENDS
from bsa_vision.bench import report
from bsa_vision.bench.attention import Options, num_steps, run_case
from bsa_vision.bench.case import Case, make_masks
from bsa_vision.bench.machine import describe_machine
from bsa_vision.bench.models import BUILT_IN, ModelCase, default_image_size, num_model_steps, run_model_case
from bsa_vision.bench.tuning import run_tune_case
from bsa_vision.bench.ways import FOR_GPUS, WAYS
from bsa_vision.cli import parse
from bsa_vision.cli.bench_output import Output, finish, run_all, show_attention, show_models
from bsa_vision.masks import Pattern
from bsa_vision.storage import atomic_write

SOMETHING_WRONG, WRONG_USAGE = 1, 2


class AttentionByDefault(TyperGroup):
    """`bench --tokens 64x64` is `bench attention --tokens 64x64`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] != "--help"):
            args = ["attention", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=AttentionByDefault,
    no_args_is_help=False,
    help="Measure this machine: `attention` (what plain `bench` runs) or a whole `model`. Exit code 0: fine, 1: a result was "
    "wrong, 2: wrong usage.",
)


def _option(panel: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel)


WHAT, HOW, OUTPUT = "What is computed (lists: comma-separated)", "How it is measured", "Output"
Tokens = Annotated[str | None, _option(WHAT, "Grids of patches: 64x64, or 4096 for a square. List. [64x64]")]
Density = Annotated[
    str | None, _option(WHAT, "Fractions of the blocks to compute, for random and nearest. List. [0.1,0.25,0.5,0.75,1]")
]
Sparsity = Annotated[str | None, _option(WHAT, "The same as fractions to skip. List.")]
Heads = Annotated[str, _option(WHAT, "Numbers of heads. List.")]
HeadDim = Annotated[str, _option(WHAT, "Head dims. List.")]
Dtype = Annotated[str, _option(WHAT, f"Among {', '.join(parse.DTYPES)}. List.")]
Device = Annotated[str, _option(WHAT, "Torch devices. List.")]
Batch = Annotated[str, _option(WHAT, "Numbers of images. List.")]
PatternText = Annotated[
    str,
    _option(WHAT, "random, local:RADIUS, dense, or a name of masks.PATTERNS with parameters: window:14:shift=7. List."),
]
OrderText = Annotated[str, _option(WHAT, "tile, raster, or auto: raster for patterns without places, else tile.")]
DenseHeads = Annotated[int, _option(WHAT, "So many first heads stay dense.", "--dense-heads")]
BlockSize = Annotated[int, _option(WHAT, "Tokens per block.")]
RelPosFlag = Annotated[bool, _option(WHAT, "With a factored relative position.", "--rel-pos")]
Backward = Annotated[bool, _option(WHAT, "Forward and backward.", "--backward")]
Seed = Annotated[int, _option(WHAT, "Of tensors and of random blocks.")]
Rounds = Annotated[int | None, _option(HOW, "Timed rounds; every round runs every way once. [5]", "--rounds")]
WaysText = Annotated[str | None, _option(HOW, f"Among {', '.join(WAYS)}; sdpa always runs. List. [all]", "--ways")]
Backend = Annotated[str, _option(HOW, "What ours runs on: auto, or the name of a backend.")]
Threads = Annotated[int | None, _option(HOW, "Torch threads. [torch's own choice]")]
MemoryFlag = Annotated[bool, _option(HOW, "Also peak memory, each way in a fresh process.", "--memory")]
Quick = Annotated[bool, _option(HOW, "A first look: small, few rounds, nothing compiled.", "--quick")]
JsonFile = Annotated[Path | None, _option(OUTPUT, "Write everything, each round's seconds included.", "--json")]
PlotFile = Annotated[Path | None, _option(OUTPUT, "Draw time against density: .png, .pdf or .svg.", "--plot")]
ModelName = Annotated[str, _option(WHAT, f"Among {', '.join(BUILT_IN)} (ViT-B), or package.module:factory. List.")]
ImageSize = Annotated[str | None, _option(WHAT, "Pixels: 1024, or 768x1024. List. [64 patches a side]")]
ModelPattern = Annotated[str, _option(WHAT, "As in `bench attention`; every layer gets it. List.", "--pattern")]
Radius = Annotated[int | None, _option(WHAT, "Short for --pattern local:RADIUS, in patches.")]


@app.command()
def attention(
    ctx: typer.Context,
    tokens: Tokens = None,
    density: Density = None,
    sparsity: Sparsity = None,
    heads: Heads = "12",
    head_dim: HeadDim = "64",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    batch: Batch = "1",
    pattern: PatternText = "random",
    order: OrderText = "auto",
    dense_heads: DenseHeads = 0,
    block_size: BlockSize = 128,
    rel_pos: RelPosFlag = False,
    backward: Backward = False,
    seed: Seed = 0,
    rounds: Rounds = None,
    ways: WaysText = None,
    backend: Backend = "auto",
    threads: Threads = None,
    memory: MemoryFlag = False,
    quick: Quick = False,
    json: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """One attention call: ours against dense SDPA, SDPA with the same mask, and compiled FlexAttention, in one run.

    Results are checked against the definition in float64 before anything is timed.
    """
    with _wrong_usage():
        output = Output(json, plot)
        output.check()
        chosen = tuple(parse.items(ways, parse.way)) if ways else None
        if quick and not ways:
            chosen = tuple(name for name in WAYS if name not in ("flex", *FOR_GPUS))
        backend = _check_numbers(rounds, threads, backend)
        patterns = _patterns(pattern, density, sparsity, seed, "0.25,0.5" if quick else "0.1,0.25,0.5,0.75,1")
        axes: dict[str, Sequence[Any]] = {
            "device": parse.items(device, parse.device),
            "dtype": parse.items(dtype, parse.dtype),
            "grid": parse.items(tokens or ("32x32" if quick else "64x64"), parse.grid),
            "batch": parse.items(batch, parse.count("--batch")),
            "heads": parse.items(heads, parse.count("--heads")),
            "head_dim": parse.items(head_dim, parse.count("--head-dim")),
            "pattern": patterns,
        }
        fixed = dict(dense_heads=dense_heads, block_size=block_size, rel_pos=rel_pos, backward=backward, seed=seed)
        base = Case((1, 1), patterns[0], **fixed)  # type: ignore[arg-type]
        cases = parse.sweep(base, axes, parse.one_of("--order", ("auto", "tile", "raster"))(order))
        for case in cases:  # whatever is wrong with a mask is known before hours have been spent on others
            make_masks(case)
    options = Options(chosen, backend, rounds or (3 if quick else 5), memory)
    with _threads(threads):
        machine = describe_machine(list(dict.fromkeys(case.device for case in cases)))
        jobs = [(_case_name(case), num_steps(case, options), partial(run_case, case, options)) for case in cases]
        rows, stopped = run_all(jobs)
    output.write("attention", rows, machine, command_of(ctx), len(cases))
    show_attention(rows, options, machine)
    finish(rows, stopped, len(cases))


@app.command()
def model(
    ctx: typer.Context,
    model: ModelName = "dinov3",
    image_size: ImageSize = None,
    pattern: ModelPattern = "local:8",
    radius: Radius = None,
    density: Density = None,
    sparsity: Sparsity = None,
    dense_heads: DenseHeads = 0,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    batch: Batch = "1",
    order: OrderText = "auto",
    block_size: BlockSize = 128,
    seed: Seed = 0,
    rounds: Rounds = None,
    backend: Backend = "auto",
    threads: Threads = None,
    quick: Quick = False,
    json: JsonFile = None,
) -> None:
    """A whole model: the dense original against the same model with sparse heads, in one run.

    Built-in models have random weights, made here without a download: nothing is said about quality.
    """
    with _wrong_usage():
        output = Output(json, None)
        output.check()
        backend = _check_numbers(rounds, threads, backend)
        text = pattern if radius is None else f"local:{parse.count('--radius', 0)(str(radius))}"
        patterns = _patterns(text, density, sparsity, seed, "0.25")
        parse.one_of("--order", ("auto", "tile", "raster"))(order)
        cases = [
            ModelCase(name, size, one, dense_heads, kind, where, number, parse.order_for(one, order), block_size, seed)
            for name in parse.items(model, str)
            for size in _image_sizes(name, image_size, quick)
            for where in parse.items(device, parse.device)
            for kind in parse.items(dtype, parse.dtype)
            for number in parse.items(batch, parse.count("--batch"))
            for one in patterns
        ]
    rounds = rounds or (2 if quick else 5)
    with _threads(threads):
        machine = describe_machine(list(dict.fromkeys(case.device for case in cases)))
        jobs = [(case.model, num_model_steps(rounds), partial(run_model_case, case, backend, rounds)) for case in cases]
        with _wrong_usage():  # models are built, and plans fitted to them, one after the other
            rows, stopped = run_all(jobs)
    output.write("model", rows, machine, command_of(ctx), len(cases))
    show_models(rows, rounds, machine)
    finish(rows, stopped, len(cases))


@app.command()
def tune(
    model: ModelName = "dinov3",
    image_size: ImageSize = None,
    images: Annotated[int, _option(WHAT, "How many, a third of them kept back.")] = 4,
    sparsity: Annotated[float, _option(WHAT, "Asked of the tuner.")] = 0.6,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    block_size: BlockSize = 128,
    seed: Seed = 0,
    threads: Threads = None,
    quick: Quick = False,
    json: JsonFile = None,
) -> None:
    """What tuning costs: time in dense forwards, memory; and whether the plan does what its report says. Random weights."""
    with _wrong_usage(), _threads(threads):
        (size,) = _image_sizes(model, image_size, quick)[:1]
        parse.one_of("--dtype", tuple(parse.DTYPES))(dtype)
        case = ModelCase(model, size, Pattern("dense"), 0, dtype, device, 1, "auto", block_size, seed)
        found = run_tune_case(case, images, sparsity)
    machine = describe_machine([device])
    print(f"{model} at {size[0]} x {size[1]} pixels, {dtype}; {machine}")
    print(found)
    if json is not None:
        atomic_write.write(json, (dumps({"case": case.to_json(), **found.to_json()}, indent=2) + "\n").encode())
    if not found.ok:
        raise typer.Exit(SOMETHING_WRONG)


# What is typed


@contextmanager
def _wrong_usage() -> Iterator[None]:
    """A ValueError inside is the user's: its message alone, and exit code 2."""
    try:
        yield
    except ValueError as error:
        Console(stderr=True).print(f"bsa-vision bench: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(WRONG_USAGE) from None


def _patterns(text: str, density: str | None, sparsity: str | None, seed: int, default: str) -> list[Pattern]:
    if density is not None and sparsity is not None:
        raise ValueError("--density and --sparsity are both given: one says the other; leave one out.")
    densities = parse.items(density or default, parse.fraction("--density"))
    if sparsity is not None:
        densities = [1 - value for value in parse.items(sparsity, parse.fraction("--sparsity"))]
    parsed = parse.items(text, parse.pattern)
    patterns = parse.with_density(parsed, densities, seed)
    if (density is not None or sparsity is not None) and not any(parse.takes_density(one) for one in parsed):
        raise ValueError(
            f"--density with --pattern {text!r}: the density of these patterns follows from their parameters, only random and "
            "nearest take one; leave --density out, or change the pattern."
        )
    return patterns


def _image_sizes(model: str, text: str | None, quick: bool) -> list[tuple[int, int]]:
    if text is not None:
        return parse.items(text, parse.image_size)
    height, width = default_image_size(model)
    return [(height // 2, width // 2) if quick and model in BUILT_IN else (height, width)]


def _check_numbers(rounds: int | None, threads: int | None, backend: str) -> str:
    for name, value in (("--rounds", rounds), ("--threads", threads)):
        if value is not None:
            parse.count(name)(str(value))
    return parse.one_of("--backend", ("auto", *BACKENDS))(backend)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def command_of(ctx: typer.Context) -> str:
    """The command line, as it can be typed again."""
    return shlex.join(["bsa-vision", *(ctx.obj or [])])


def _case_name(case: Case) -> str:
    return f"{case.grid[0]}x{case.grid[1]} {report.pattern_name(case)}"
