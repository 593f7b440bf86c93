"""Compare SAM's ViT-B image encoder as published, exact without N x N tensors, and sparse.

    python examples/sam_encoder.py [--rounds 5] [--sparsity 0.72] [--memory]
    python examples/sam_encoder.py --size 2048 --only own-exact,own-sparse --memory

The encoders are those of segment_anything, transformers and, as "own", bsa_vision. All have the
same random weights, drawn so that logits and relative terms are large. The script compares time,
memory and exactness, not segmentation. segment_anything needs torchvision; if it cannot be
imported, its rows are omitted and the reason is printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from functools import cache

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import bsa_vision as bsa
from bsa_vision.measure.peak_memory import Meter
from bsa_vision.measure.timing import paired
from bsa_vision.models.encoder import SAM

ROWS = [
    f"{base}{kind}"
    for base in ("segment_anything", "transformers", "own")
    for kind in ("", "-exact", "-sparse")
]
ROWS.remove("own")  # same as own-exact


def main() -> None:
    arguments = parse_arguments()
    rows, size, sparsity = arguments.only.split(","), arguments.size, arguments.sparsity
    if arguments.memory_of:
        print(json.dumps(peak_memory(arguments.memory_of, size, sparsity)))
        return
    console = Console(width=max(120, Console().width))
    models: dict[str, nn.Module] = {}
    for row in rows:
        try:
            models[row] = build(row, size, sparsity)
        except Exception as error:  # a broken library may raise any error
            text = f"omitted: {row}: {type(error).__name__}: {error}"
            console.print(text, markup=False, soft_wrap=True)
    with Progress(console=console, transient=True) as progress:
        measure(models, arguments, console, progress)
    for model in [models[row] for row in rows if row in models and "-" in row][-1:]:
        console.print(str(bsa.describe(model)), markup=False, highlight=False, soft_wrap=True)


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add, names = parser.add_argument, ",".join(ROWS)
    add("--size", type=int, default=1024, help="image side in pixels; default: 1024")
    add("--rounds", type=int, default=5, help="timed rounds; default: 5")
    text = "fraction of blocks that the global layers skip (pattern nearest); default: 0.72"
    add("--sparsity", type=float, default=0.72, help=text)
    text = f"rows to run, the first is the baseline; default: {names}"
    add("--only", default=names, help=text)
    text = "also measure peak memory, each row in a separate process"
    add("--memory", action="store_true", help=text)
    add("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.only.split(",")) - set(ROWS):
        parser.error(f"--only {','.join(sorted(unknown))}: allowed are {', '.join(ROWS)}")
    if arguments.size < 16 or arguments.size % 16:
        parser.error(f"--size {arguments.size}: expected a multiple of 16 pixels")
    return arguments


def measure(
    models: dict[str, nn.Module],
    arguments: argparse.Namespace,
    console: Console,
    progress: Progress,
) -> None:
    """Print time, peak memory and differences of the models."""
    pixels = torch.randn(1, 3, arguments.size, arguments.size)
    task = progress.add_task("first pass, then timing", total=arguments.rounds + 1)
    with torch.no_grad():
        features = {row: run(model, pixels) for row, model in models.items()}
        progress.advance(task)
        runs = {row: lambda model=model: run(model, pixels) for row, model in models.items()}
        timings = paired(runs, arguments.rounds, warmup=0, on_round=lambda: progress.advance(task))
    memory = {row: "" for row in models}
    if arguments.memory:
        for row in progress.track(models, description="memory"):
            command = [*sys.orig_argv, "--memory-of", row]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            memory[row] = f"{json.loads(done.stdout.splitlines()[-1]) / 2**20:.0f} MiB"
    first = next(iter(models))
    table = Table("encoder", "median", f"time / {first}", "min-max", "difference", "peak memory")
    for row, times in timings.items():
        cells = [f"{times.median:.2f} s", f"{times.ratio:.3f}"]
        cells += ["{:.3f}-{:.3f}".format(*times.spread)]
        cells += [f"{relative(features[row], features[first]):.1e}", memory[row]]
        table.add_row(row, *cells)
    console.print(table)
    for row, model in models.items():
        if row.endswith("-sparse") and arguments.size <= 1024:  # SDPA builds N x N masks and biases
            masked = run_with_sdpa(model, pixels, arguments.sparsity)
            difference = relative(features[row], masked)
            console.print(f"{row} against torch's SDPA with the same masks: {difference:.1e}")
            assert difference < 1e-4, row


def relative(x: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of `reference`."""
    return ((x - reference).norm() / reference.norm()).item()


def run_with_sdpa(model: nn.Module, pixels: Tensor, sparsity: float) -> Tensor:
    """Run a sparse model with torch's SDPA and the same masks."""
    plan = bsa.SparsityPlan.uniform(bsa.inspect(model), "nearest", sparsity=sparsity)
    bsa.sparsify_(bsa.restore_(model), plan, backend="sdpa")
    with torch.no_grad():
        masked = run(model, pixels)
    bsa.sparsify_(bsa.restore_(model), plan)
    return masked


def peak_memory(row: str, size: int, sparsity: float) -> int:
    """Return the bytes that a forward adds to the model and its input."""
    model = build(row, size, sparsity)
    weights.cache_clear()
    pixels = torch.randn(1, 3, size, size)
    meter = Meter("cpu")
    with torch.no_grad():
        run(model, pixels)
    return meter.peak()


def run(model: nn.Module, pixels: Tensor) -> Tensor:
    out = model(pixels)
    return out if isinstance(out, Tensor) else out.last_hidden_state


def build(row: str, size: int, sparsity: float) -> nn.Module:
    base, _, kind = row.partition("-")
    state = weights(size)
    if base == "own":
        model: nn.Module = bsa.create_encoder(**SAM["vit_b"], image_size=size)
    elif base == "transformers":
        from transformers import SamVisionConfig, SamVisionModel

        model = SamVisionModel(SamVisionConfig(image_size=size, attn_implementation="sdpa"))
        state = {in_transformers(name): value for name, value in state.items()}
    else:
        model = segment_anything(size)
    model.load_state_dict(state)
    model.eval()
    if kind == "exact":
        bsa.sparsify_(model, bsa.dense_plan(model))
    elif kind == "sparse":
        bsa.sparsify_(model, bsa.uniform_plan(model, "nearest", sparsity=sparsity))
    return model


def segment_anything(size: int) -> nn.Module:
    from functools import partial

    from segment_anything.modeling import ImageEncoderViT

    return ImageEncoderViT(
        img_size=size,
        embed_dim=768,
        depth=12,
        num_heads=12,
        window_size=14,
        out_chans=256,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        global_attn_indexes=SAM["vit_b"]["global_attn_indexes"],
    )


@cache
def weights(size: int) -> dict[str, Tensor]:
    """Return random weights with segment_anything's names.

    Their variance is larger than that of new models, in which relative tables are zero and logits
    are tiny.
    """
    torch.manual_seed(0)
    state = bsa.create_encoder(**SAM["vit_b"], image_size=size).state_dict()
    for name, value in state.items():
        if "rel_pos" in name or "pos_embed" in name:
            value.normal_(0, 0.2)
        elif value.dim() >= 2:
            value.normal_(0, (1.3 if "qkv" in name else 0.7) * value[0].numel() ** -0.5)
    return state


def in_transformers(name: str) -> str:
    """Return the name of the parameter in transformers."""
    renames = {
        "patch_embed.proj": "patch_embed.projection",
        "blocks.": "layers.",
        ".norm": ".layer_norm",
        "neck.0": "neck.conv1",
        "neck.1": "neck.layer_norm1",
        "neck.2": "neck.conv2",
        "neck.3": "neck.layer_norm2",
    }
    for old, new in renames.items():
        name = name.replace(old, new)
    return f"vision_encoder.{name}"


if __name__ == "__main__":
    main()
