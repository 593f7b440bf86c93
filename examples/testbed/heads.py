"""Describe the attention of every head of the testbed's model.

    python examples/testbed/heads.py [MODEL] [--scenes 50] [--json heads.json]

entropy   entropy of a query's attention in nats; that of uniform attention is the logarithm of
          the number of tokens (6.9 at 32 x 32)
keys      share of keys needed for 95 % of the attention, chosen for each query
blocks    share of key blocks needed for 95 % of the attention, chosen for each query block
near      share of attention on patches at most 4 patches away
alike     attention to patches with the same shape and texture, relative to uniform attention;
          1 = no preference (the ground counts as one kind)
click     share of attention on the click's token
kind      local:    near > 50 %
          content:  alike > 2
          diffuse:  keys > 50 %
          mixed:    all others

All numbers are means over the queries of patches, and over scenes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

if __package__ in (None, ""):  # run as a script: find `examples` and the checkout's own packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import bsa_vision as bsa
from bsa_vision.masks import TokenLayout
from examples.testbed import scenes
from examples.testbed.evaluate import BLOCK_SIZE, TILE, make_parser
from examples.testbed.model import Testbed, load
from examples.testbed.observe import block_mass, probabilities

SHARE = 0.95  # of the attention
NEAR = 4  # patches
EVERY = 4  # `keys` uses every fourth query, because sorting takes most of the time


@dataclass(frozen=True)
class Head:
    """Statistics of one head; see the docstring of the module. Shares are 0 to 1."""

    layer: int
    head: int
    entropy: float
    keys: float
    blocks: float
    near: float
    alike: float
    click: float

    @property
    def kind(self) -> str:
        if self.near > 0.5:
            return "local"
        if self.alike > 2:
            return "content"
        return "diffuse" if self.keys > 0.5 else "mixed"


@torch.inference_mode()
def measure(
    model: Testbed,
    seeds: Sequence[int],
    difficulty: scenes.Difficulty = scenes.HARD,
    grid: int | None = None,
    on_scene: Callable[[], Any] = lambda: None,
) -> list[Head]:
    """Return the statistics of all heads, layer by layer."""
    grid = model.size.grid if grid is None else grid
    device = next(model.parameters()).device
    spec = bsa.inspect(model, image_size=grid * model.size.patch)
    layout = TokenLayout(
        spec.grid,
        num_prefix_tokens=spec.num_prefix_tokens,
        num_suffix_tokens=spec.num_suffix_tokens,
        order="tile",
        tile=TILE,
        block_size=BLOCK_SIZE,
    )
    found: dict[int, list[Tensor]] = {layer.index: [] for layer in spec.layers}
    for seed in seeds:
        batch = scenes.make([seed], grid * model.size.patch, difficulty, device)
        alike = _alike(batch, model.size.patch)

        def add(seen: bsa.Observation, alike: Tensor = alike) -> None:
            probs = probabilities(seen.q, seen.k)[0]
            found[seen.layer.index].append(_statistics(probs, layout, alike))

        with bsa.observe(model, add):
            model.encode(batch.images, batch.click)
        on_scene()
    means = {layer: torch.stack(rows).double().mean(0) for layer, rows in found.items()}  # (H, 6)
    return [
        Head(layer, head, *row.tolist())
        for layer, rows in means.items()
        for head, row in enumerate(rows)
    ]


def _alike(batch: scenes.Scenes, patch: int) -> Tensor:
    """Return which patches show the same shape and texture in their centre, (N, N) bool."""
    shape, texture = (
        kind[0, patch // 2 :: patch, patch // 2 :: patch].flatten() for kind in batch.kinds()
    )
    kind = shape * len(scenes.TEXTURES) + texture
    return kind[:, None] == kind


def _statistics(probs: Tensor, layout: TokenLayout, alike: Tensor) -> Tensor:
    """Compute the statistics of `Head`, in its order: (H, N, N) -> (H, 6)."""
    start = layout.num_prefix_tokens
    patches = probs[:, start:]  # queries (H, h * w, N)
    entropy = -(patches * patches.clamp(min=1e-30).log()).sum(-1).mean(1)
    keys = _needed(patches[:, ::EVERY]).mean(1)
    blocks = _needed(block_mass(probs[None], layout)[0]).mean(1)
    to_patches = patches[..., start:]
    near = (to_patches * _near(layout.grid).to(patches.device)).sum(-1).mean(1)
    uniform = alike.float().mean(1)  # attention to alike patches if it were uniform
    share = (to_patches * alike).sum(-1) / to_patches.sum(-1).clamp(min=1e-9)
    click = patches[..., :start].sum(-1).mean(1)
    return torch.stack([entropy, keys, blocks, near, (share / uniform).mean(1), click], dim=1)


def _needed(mass: Tensor) -> Tensor:
    """Return the smallest share of keys with `SHARE` of each row's mass: (..., keys) -> (...)."""
    running = mass.sort(-1, descending=True).values.cumsum(-1)
    return ((running < SHARE * running[..., -1:]).sum(-1) + 1) / mass.shape[-1]


def _near(grid: tuple[int, int]) -> Tensor:
    """Return which patches are at most `NEAR` rows and columns apart, (h * w, h * w) bool."""
    rows, columns = (
        line.flatten() for line in torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    )
    distance = torch.maximum((rows[:, None] - rows).abs(), (columns[:, None] - columns).abs())
    return distance <= NEAR


def table(heads: Sequence[Head], title: str) -> Table:
    """Return the heads as a table for the terminal."""
    names = ("layer", "head", "entropy", "keys for 95 %", "blocks for 95 %", "near", "alike")
    found = Table(title=title, title_justify="left")
    for name in (*names, "click", "kind"):
        found.add_column(name, justify="left" if name == "kind" else "right")
    for head in heads:
        shares = (f"{value:.0%}" for value in (head.keys, head.blocks, head.near))
        found.add_row(
            f"{head.layer}",
            f"{head.head}",
            f"{head.entropy:.2f}",
            *shares,
            f"{head.alike:.1f}",
            f"{head.click:.0%}",
            head.kind,
        )
    return found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--scenes", type=int, default=50, help="number of scenes; default: 50")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the scenes; default: 0")
    parser.add_argument("--grid", type=int, help="tokens per side; default: that of the model")
    parser.add_argument("--json", type=Path, help="JSON file for the table")
    arguments = parser.parse_args()
    try:
        model = load(arguments.model, arguments.device)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    console = Console(stderr=True)
    seeds = scenes.held_out(arguments.scenes, arguments.seed)
    difficulty = scenes.SHIFTED if arguments.shifted else scenes.HARD
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("scenes", total=len(seeds))
        heads = measure(model, seeds, difficulty, arguments.grid, lambda: progress.advance(task))
    grid = arguments.grid or model.size.grid
    kind = "SHIFTED" if arguments.shifted else "HARD"
    title = (
        f"{arguments.model.name}, {len(seeds)} {kind} scenes of seed {arguments.seed}, "
        f"{grid} x {grid} tokens"
    )
    (Console() if sys.stdout.isatty() else Console(width=120)).print(table(heads, title))
    if arguments.json:
        rows = [{**asdict(head), "kind": head.kind} for head in heads]
        command = " ".join(["python", *sys.argv])
        record = {"title": title, "command": command, "heads": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
