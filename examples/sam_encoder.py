"""SAM's ViT-B image encoder: as segment_anything and transformers run it, exact without N x N, and with sparse global layers.

    python examples/sam_encoder.py [--rounds 5] [--sparsity 0.72] [--memory]
    python examples/sam_encoder.py --size 2048 --only own-exact,own-sparse --memory

Random weights, redrawn so that logits and relative terms are wide: times and exactness, no statement about segmentation. "own" is
bsa_vision.encoder; all have the same weights. segment_anything needs torchvision; where it cannot be imported, its rows are left out and
the reason is printed.
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
ROWS.remove("own")  # is exact by itself


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1024, help="pixels per side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--sparsity",
        type=float,
        default=0.72,
        help="of the global layers; each block keeps its nearest",
    )
    parser.add_argument(
        "--only", default=",".join(ROWS), help=f"rows: {','.join(ROWS)}; the first is compared to"
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="also the peak memory of each, in processes of their own",
    )
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rows, size, sparsity = arguments.only.split(","), arguments.size, arguments.sparsity
    if unknown := set(rows) - set(ROWS):
        parser.error(f"--only {','.join(sorted(unknown))}: rows are {', '.join(ROWS)}")
    if size < 16 or size % 16:
        parser.error(f"--size {size}: a multiple of 16 pixels is needed")
    if arguments.memory_of:
        print(json.dumps(peak_memory(arguments.memory_of, size, sparsity)))
        return
    console = Console(width=max(120, Console().width))
    models: dict[str, nn.Module] = {}
    for row in rows:
        try:
            models[row] = build(row, size, sparsity)
        except Exception as error:  # a broken neighbour raises anything
            console.print(
                f"left out: {row}: {type(error).__name__}: {error}", markup=False, soft_wrap=True
            )
    with Progress(console=console, transient=True) as progress:
        measure(models, arguments, console, progress)
    for model in [models[row] for row in rows if row in models and "-" in row][-1:]:
        console.print(str(bsa.describe(model)), markup=False, highlight=False, soft_wrap=True)


def measure(
    models: dict[str, nn.Module],
    arguments: argparse.Namespace,
    console: Console,
    progress: Progress,
) -> None:
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
            peak = json.loads(
                subprocess.run(
                    command, capture_output=True, text=True, check=True
                ).stdout.splitlines()[-1]
            )
            memory[row] = f"{peak / 2**20:.0f} MiB"
    first = next(iter(models))
    table = Table(
        "encoder",
        "median",
        f"of {first}",
        "spread",
        "difference",
        "peak memory",
        title_justify="left",
    )
    for row, times in timings.items():
        difference = (features[row] - features[first]).norm() / features[first].norm()
        spread = f"{times.spread[0]:.3f}-{times.spread[1]:.3f}"
        table.add_row(
            row,
            f"{times.median:.2f} s",
            f"{times.ratio:.3f}",
            spread,
            f"{difference:.1e}",
            memory[row],
        )
    console.print(table)
    for row, model in models.items():
        if (
            row.endswith("-sparse") and arguments.size <= 1024
        ):  # spelled out, masks and biases are N x N
            plan = bsa.SparsityPlan.uniform(
                bsa.inspect(model), "nearest", sparsity=arguments.sparsity
            )
            bsa.sparsify_(bsa.restore_(model), plan, backend="sdpa")
            with torch.no_grad():
                masked = run(model, pixels)
            bsa.sparsify_(bsa.restore_(model), plan)
            difference = ((features[row] - masked).norm() / masked.norm()).item()
            console.print(f"{row} against torch's SDPA with the same masks: {difference:.1e}")
            assert difference < 1e-4, row


def peak_memory(row: str, size: int, sparsity: float) -> int:
    """Bytes over what the process held when model and input were there."""
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

    sizes = dict(
        img_size=size, embed_dim=768, depth=12, num_heads=12, window_size=14, out_chans=256
    )
    norm = partial(nn.LayerNorm, eps=1e-6)
    return ImageEncoderViT(
        **sizes,
        norm_layer=norm,
        use_rel_pos=True,
        global_attn_indexes=SAM["vit_b"]["global_attn_indexes"],
    )


@cache
def weights(size: int) -> dict[str, Tensor]:
    """Under segment_anything's names. Fresh relative tables are zero, and fresh logits tiny: drawn wider here."""
    torch.manual_seed(0)
    state = bsa.create_encoder(**SAM["vit_b"], image_size=size).state_dict()
    for name, value in state.items():
        if "rel_pos" in name or "pos_embed" in name:
            value.normal_(0, 0.2)
        elif value.dim() >= 2:
            value.normal_(0, (1.3 if "qkv" in name else 0.7) * value[0].numel() ** -0.5)
    return state


def in_transformers(name: str) -> str:
    renames = {
        "patch_embed.proj": "patch_embed.projection",
        "blocks.": "layers.",
        ".norm": ".layer_norm",
    }
    renames |= {
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
