"""`bsa-vision tune`: compute a plan from a folder of images.

Under torchrun, several processes share the images.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from bsa_vision.cli import parse
from bsa_vision.cli.options import (
    INTERRUPTED,
    BlockSize,
    Checkpoint,
    ImageSize,
    JsonFlag,
    ModelName,
    Random,
    Tile,
    option,
    read_images,
    wrong_usage,
)
from bsa_vision.measure.peak_memory import Meter
from bsa_vision.models import image_files
from bsa_vision.models.by_name import load
from bsa_vision.plans.plan import SparsityPlan
from bsa_vision.tuning import report, tune

Images = Annotated[
    list[str], typer.Argument(help="Image files, or folders of images; 24 or more recommended.")
]
Output = Annotated[Path, option("File for the plan.", "--output", "-o")]
Sparsity = Annotated[float | None, option("Budget: fraction of blocks to skip, 0 to below 1.")]
MaxError = Annotated[
    float | None, option("Budget: relative error of the features, mean over images.")
]
Speedup = Annotated[
    float | None,
    option("Budget: speed-up of the whole model on this machine; 1.3 is 1.3 times as fast."),
]
Order = Annotated[
    str, option("Token order: tile, raster or auto. auto = the order with the smallest loss.")
]
Seed = Annotated[int, option("Random seed for the calibration / held-out split.")]
Device = Annotated[
    str | None,
    option("Torch device: cpu, cuda or cuda:1.", default="cuda if available, else cpu"),
]
Statistics = Annotated[
    Path | None,
    option(
        "File for the statistics of the images, used by --resume.",
        default="OUTPUT with the ending .statistics.safetensors",
    ),
]
Resume = Annotated[
    bool,
    option(
        "Reuse saved statistics instead of running the model again; budgets may differ.", "--resume"
    ),
]
Report = Annotated[
    Path | None,
    option("File for the HTML report.", "--report", default="OUTPUT with the ending .html"),
]


def tune_model(
    ctx: typer.Context,
    model: ModelName,
    images: Images,
    output: Output,
    sparsity: Sparsity = None,
    max_error: MaxError = None,
    speedup: Speedup = None,
    random: Random = False,
    checkpoint: Checkpoint = None,
    image_size: ImageSize = None,
    order: Order = "auto",
    tile: Tile = "8x16",
    block_size: BlockSize = 128,
    seed: Seed = 0,
    device: Device = None,
    statistics: Statistics = None,
    resume: Resume = False,
    page: Report = None,
    as_json: JsonFlag = False,
) -> None:
    """Choose a pattern for every head of a model, and save the choice as a plan.

    The plan is computed on calibration images and checked on held-out images. Give exactly one
    budget: --sparsity, --max-error or --speedup.
    """
    start = time.monotonic()
    with wrong_usage(ctx, "tune"):
        budget = _budget(sparsity=sparsity, max_error=max_error, speedup=speedup)
        files = _files(output, statistics, page)
        _check_installed()
        with _resumable(ctx, files), _processes(device) as (rank, where):
            paths = image_files.find(images)
            loaded = load(model, random=random, checkpoint=checkpoint, image_size=image_size)
            pixels = list(read_images(loaded.to(where), paths, image_size)[0].values())
            meter = Meter(where)
            with _bars(rank == 0) as on_step:
                plan = tune(
                    loaded,
                    pixels,
                    **budget,
                    order=order,
                    tile=parse.grid(tile, "--tile"),
                    block_size=block_size,
                    seed=seed,
                    statistics=files.statistics,
                    resume=resume,
                    on_step=on_step,
                )
            if rank:
                return
            plan.save(files.plan)
            report(plan, files.report, loaded, pixels[0])
    run = _Run(time.monotonic() - start, meter.peak(), random)
    if as_json:
        print(json.dumps({**plan.report, **vars(run), **files.to_json()}, indent=2))
    else:
        _show(plan, run, files)


@dataclass(frozen=True)
class _Files:
    """Files that a run writes."""

    plan: Path
    report: Path
    statistics: Path

    def to_json(self) -> dict[str, str]:
        return {name: str(path) for name, path in vars(self).items()}


@dataclass(frozen=True)
class _Run:
    """Time, memory above that of the model and the images, and kind of weights of a run."""

    seconds: float
    peak_bytes: int
    random_weights: bool


def _budget(**budgets: float | None) -> dict[str, Any]:
    """Return the one budget that is given."""
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        allowed, got = (
            ", ".join(f"--{name.replace('_', '-')}" for name in names) for names in (budgets, given)
        )
        raise ValueError(f"exactly one of {allowed} is needed, got {got or 'none'}.")
    return given


def _files(output: Path, statistics: Path | None, report: Path | None) -> _Files:
    """Complete the paths; raise OSError now if a file cannot be written in the end."""
    if not output.name:
        raise OSError(f"--output {str(output)!r}: expected a file for the plan, such as plan.json.")
    statistics = statistics or output.with_suffix(".statistics.safetensors")
    report = report or output.with_suffix(".html")
    paths = [path.resolve() for path in (output, statistics, report)]
    if len(set(paths)) < len(paths):
        raise OSError(
            f"--output {output}, --statistics {statistics}, --report {report}: expected three "
            "different files."
        )
    for path in paths:
        if path.is_dir():
            raise OSError(f"{path} cannot be written: it is a directory.")
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise OSError(
                f"{path} cannot be written: its parent directory is missing or not writable."
            )
    return _Files(output, report, statistics)


def _check_installed() -> None:
    """Raise ImportError now, not after tuning, if the report cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the report needs matplotlib ({error}): pip install 'bsa-vision[tune]'."
        ) from None


@contextmanager
def _resumable(ctx: typer.Context, files: _Files) -> Iterator[None]:
    """After Ctrl-C, print how to resume, and exit with code 130."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        if not int(os.environ.get("RANK", 0)):
            saved = str(interruption).partition(";")[0]
            print(
                f"bsa-vision tune: {saved or 'interrupted before anything was measured'}.",
                file=sys.stderr,
            )
            if files.statistics.is_file():
                given = [word for word in ctx.obj or [] if word != "--resume"]
                command = shlex.join(["bsa-vision", *given, "--resume"])
                print(f"Resume with: {command}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def _processes(device: str | None) -> Iterator[tuple[int, torch.device]]:
    """Yield the rank and the device of this process; join the process group under torchrun.

    The group uses NCCL on GPUs and gloo on CPUs.
    """
    where = _device(device)
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield 0, where
        return
    if where.type == "cuda":
        torch.cuda.set_device(where)
    # The functions of this module keep the process group that exists when it is imported.
    # transformers imports it: within the group, the group and its threads would live until the
    # interpreter exits, which aborts occasionally.
    from torch.distributed import nn  # noqa: F401

    torch.distributed.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield torch.distributed.get_rank(), where
    finally:
        torch.distributed.destroy_process_group()


def _device(device: str | None) -> torch.device:
    """Parse --device; by default the GPU of this process, or the CPU."""
    gpus = torch.cuda.device_count()
    if device is None:
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device {device!r}: allowed are cpu, cuda, cuda:1 and so on.") from None
    if where.type != "cpu" and (where.type != "cuda" or (where.index or 0) >= gpus):
        raise ValueError(f"--device {device!r}: this machine has cpu and {gpus} GPUs.")
    return where


@contextmanager
def _bars(shown: bool) -> Iterator[Any]:
    """Yield a callback (step, done, total) that shows one progress bar per step on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not shown
    ) as progress:

        def on_step(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(step, total=total)
            progress.update(tasks[step], completed=done)

        yield on_step


def _show(plan: SparsityPlan, run: _Run, files: _Files) -> None:
    """Print the plan and its results."""
    found, certificate = plan.report, plan.report["certificate"]
    print(plan)
    print(
        f"skipped blocks: {found['sparsity']:.1%}; relative error of the features: "
        f"{found['measured']:.4f}, measured on {found['images']['held_out']} held-out images "
        f"(predicted: {found['predicted']:.4f})"
    )
    print(
        f"held-out images with an error above {certificate['limit']:.4f}: {certificate['above']} "
        f"of {certificate['images']}; so at most {certificate['share']:.0%} of all such images, at "
        f"{certificate['confidence']:.0%} confidence"
    )
    if found["speedup"] is not None:
        print(f"measured speed-up over dense: {found['speedup']:.2f}")
    print(
        f"tuning took {run.seconds:.0f} s and {run.peak_bytes / 2**20:.0f} MiB more memory than "
        "the model and the images"
    )
    if run.random_weights:
        print("RANDOM WEIGHTS: this error says nothing about a trained model.")
    for name, path in files.to_json().items():
        print(f"{name}: {path}")
