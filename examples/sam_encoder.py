"""SAM's ViT-B image encoder at 1024 px: as transformers runs it, exact without N x N, and with sparse global layers.

    python examples/sam_encoder.py [--rounds 5] [--radius 12]

Random weights, redrawn so that logits and relative terms are wide: times and exactness, no statement about segmentation.
"eager" is the arithmetic of segment_anything: it builds the whole matrix, and softmaxes it.
"""

from __future__ import annotations

import argparse
import copy

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from transformers import SamVisionConfig, SamVisionModel

import bsa_vision as bsa
from bsa_vision.timing import paired


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--radius", type=int, default=12, help="of the windows in the global layers, in patches")
    arguments = parser.parse_args()
    console = Console()
    models = make_models(arguments.radius)
    pixels = torch.randn(1, 3, 1024, 1024)
    with torch.no_grad(), Progress(console=console, transient=True) as progress:
        features = {name: model(pixels).last_hidden_state for name, model in models.items()}
        task = progress.add_task("timing", total=arguments.rounds)
        runs = {name: lambda model=model: model(pixels) for name, model in models.items()}
        timings = paired(runs, arguments.rounds, warmup=0, on_round=lambda: progress.advance(task))
    table = Table("encoder", "median", "of eager", "spread", "relative difference to eager")
    for name, times in timings.items():
        difference = (features[name] - features["eager"]).norm() / features["eager"].norm()
        spread = f"{times.spread[0]:.2f}-{times.spread[1]:.2f}"
        table.add_row(name, f"{times.median:.2f} s", f"{times.ratio:.3f}", spread, f"{difference:.1e}")
    console.print(table)
    for line in str(bsa.describe(models["sparse"])).splitlines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def make_models(radius: int) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    eager = SamVisionModel(SamVisionConfig(attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, parameter in eager.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                parameter.normal_(0, 0.2)
            elif parameter.dim() >= 2:
                parameter.normal_(0, (1.3 if "qkv" in name else 0.7) * parameter[0].numel() ** -0.5)
    sdpa = SamVisionModel(SamVisionConfig(attn_implementation="sdpa")).eval()
    sdpa.load_state_dict(eager.state_dict())
    exact, sparse = copy.deepcopy(sdpa), copy.deepcopy(sdpa)
    bsa.sparsify_(exact, bsa.dense_plan(exact))
    bsa.sparsify_(sparse, bsa.uniform_plan(sparse, "local_window", radius=radius))
    return {"eager": eager, "sdpa": sdpa, "exact": exact, "sparse": sparse}


if __name__ == "__main__":
    main()
