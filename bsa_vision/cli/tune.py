"""`bsa-vision tune`: a plan from a folder of photographs; under torchrun, from several processes."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    WRONG_USAGE,
    Checkpoint,
    ImageSize,
    JsonFlag,
    ModelName,
    Random,
    read_images,
)
from bsa_vision.errors import BackendUnavailable
from bsa_vision.measure.peak_memory import Meter
from bsa_vision.models import image_files
from bsa_vision.models.by_name import load
from bsa_vision.plans.plan import SparsityPlan
from bsa_vision.tuning import report, tune


def tune_model(
    ctx: typer.Context,
    model: ModelName,
    images: Annotated[
        list[str], typer.Argument(help="Photographs, or folders of them: 24 or more are good.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the plan is written.")],
    sparsity: Annotated[float | None, typer.Option(help="Fraction of the blocks to skip.")] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Relative error of the features, mean over images.")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(help="Of the model, as measured here: 1.3.")
    ] = None,
    random: Random = False,
    checkpoint: Checkpoint = None,
    image_size: ImageSize = None,
    order: Annotated[
        str, typer.Option(help="tile, raster, or auto: whichever loses least.")
    ] = "auto",
    tile: Annotated[str, typer.Option(help="Patches of a tile, rows x columns.")] = "8x16",
    block_size: Annotated[int, typer.Option(help="Tokens per block.")] = 128,
    seed: Annotated[int, typer.Option(help="Of which images are kept back.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1. [cuda where there is one]")
    ] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="What was measured. [beside the plan]")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from those; another budget needs no new pass.")
    ] = False,
    page: Annotated[
        Path | None, typer.Option("--report", help="The page about the plan. [beside the plan]")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """A plan for a model: which head uses which pattern, chosen on your images and checked on those that were kept back."""
    start, budget = time.monotonic(), dict(sparsity=sparsity, max_error=max_error, speedup=speedup)
    try:
        _check_installed()
        statistics, page = _paths(output, statistics, page)
        with _processes(device) as (rank, where):
            files = image_files.find(images)
            loaded = load(model, random=random, checkpoint=checkpoint, image_size=image_size).to(
                where
            )
            read = list(read_images(loaded, files, image_size)[0].values())
            layout = dict(order=order, tile=parse.grid(tile, "--tile"), block_size=block_size)
            meter = Meter(where)
            with _bars(rank == 0) as on_step:
                keep = dict(statistics=statistics, resume=resume, seed=seed, on_step=on_step)
                plan = tune(loaded, read, **budget, **layout, **keep)  # type: ignore[arg-type]
            if rank:
                return
            plan.save(output)
            report(plan, page, loaded, read[0])
    except (ValueError, OSError, ImportError, BackendUnavailable) as error:
        print(f"bsa-vision tune: {error}", file=sys.stderr)
        raise typer.Exit(WRONG_USAGE) from None
    except KeyboardInterrupt as interruption:
        _say_how_to_resume(ctx, str(interruption), Path(statistics or output))
        raise typer.Exit(INTERRUPTED) from None
    took = {
        "seconds": time.monotonic() - start,
        "peak_bytes": meter.peak(),
        "random_weights": random,
    }
    files_made = {"plan": str(output), "report": str(page), "statistics": str(statistics)}
    if as_json:
        print(json.dumps({**plan.report, **took, **files_made}, indent=2))
    else:
        _show(plan, took, files_made)


def _say_how_to_resume(ctx: typer.Context, text: str, statistics: Path) -> None:
    if int(os.environ.get("RANK", 0)):
        return
    given = [word for word in ctx.obj or [] if word != "--resume"]
    print(
        f"bsa-vision tune: {text.partition(';')[0] or 'interrupted before anything was measured'}.",
        file=sys.stderr,
    )
    if statistics.is_file():
        print(f"Go on with: {shlex.join(['bsa-vision', *given, '--resume'])}", file=sys.stderr)


def _show(plan: SparsityPlan, took: dict[str, Any], files_made: dict[str, str]) -> None:
    found = plan.report
    print(plan)
    print(
        f"{found['sparsity']:.1%} of the blocks are skipped; relative error of the features {found['measured']:.4f}, measured on "
        f"{found['images']['held_out']} images that were kept back ({found['predicted']:.4f} was predicted)"
    )
    certificate = found["certificate"]
    print(
        f"{certificate['above']} of {certificate['images']} are above {certificate['limit']:.4f}: of images like these at most "
        f"{certificate['share']:.0%} are, at {certificate['confidence']:.0%} confidence"
    )
    if found["speedup"] is not None:
        print(f"{found['speedup']:.2f} times as fast as dense, measured here")
    print(
        f"{took['seconds']:.0f} s, {took['peak_bytes'] / 2**20:.0f} MiB over what the model and the images take"
    )
    if took["random_weights"]:
        print("RANDOM WEIGHTS: this error says nothing about a trained model.")
    for what, path in files_made.items():
        print(f"{what}: {path}")


def _check_installed() -> None:
    """What the report needs, missed now instead of after minutes."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the report needs matplotlib ({error}): pip install 'bsa-vision[tune]'."
        ) from None


def _paths(output: Path, statistics: Path | None, page: Path | None) -> tuple[Path, Path]:
    """Where statistics and page go; OSError before minutes are spent on what could not be written, or would overwrite the plan."""
    if not output.name:
        raise OSError(f"-o {str(output)!r}: expected a file for the plan; give e.g. plan.json.")
    statistics = statistics or output.with_suffix(".statistics.safetensors")
    page = page or output.with_suffix(".html")
    paths = [path.resolve() for path in (output, statistics, page)]
    if len(set(paths)) < len(paths):
        raise OSError(
            f"plan {output}, statistics {statistics}, report {page}: three files are needed; give other names."
        )
    for path in paths:
        if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise OSError(
                f"{path} cannot be written: it is a folder, or its own is none or not yours to write to; give another path."
            )
    return statistics, page


@contextmanager
def _processes(device: str | None) -> Iterator[tuple[int, torch.device]]:
    """This process's rank and device; under torchrun, inside its process group: NCCL where models are on GPUs, gloo elsewhere."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    try:
        where = torch.device(device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(
            f"--device {device}: allowed are cpu, cuda and cuda:1 and so on; give one of them."
        ) from None
    if where.type not in ("cpu", "cuda") or (
        where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count()
    ):
        raise ValueError(
            f"--device {device}: this machine has cpu and {torch.cuda.device_count()} GPUs; give one of these."
        )
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield 0, where
        return
    if where.type == "cuda":
        torch.cuda.set_device(where)
    # Defaults of its functions are the group that is there when it is imported: imported inside (by transformers), it would keep the group
    # and its threads alive until the interpreter ends, which aborts now and then.
    from torch.distributed import nn  # noqa: F401

    torch.distributed.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield torch.distributed.get_rank(), where
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def _bars(shown: bool) -> Iterator[Any]:
    """One bar for each thing that is done."""
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

        def on_step(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=of)
            progress.update(tasks[what], completed=done)

        yield on_step
