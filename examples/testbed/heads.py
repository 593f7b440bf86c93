"""What every head of the testbed's model does: how spread its attention is, and where it goes.

    python examples/testbed/heads.py [MODEL] [--scenes 50] [--json heads.json]

entropy        of a query's attention over keys, in nats; ln of the tokens (6.9 at 32 x 32) is uniform
keys, blocks   density needed for 95 % of the attention: of the keys, chosen query by query; of the key blocks, chosen block row by block row
near           attention to patches within 4 of the query; a head that pays more than half there is called local
alike          attention to patches that show the same shape and texture (ground to ground), over what uniform attention pays: 1 = no preference;
               a head that is not local and above 2 is called content
click          attention to the click's token

Other heads are called diffuse where they need more than half of the keys, mixed where not. Means over patches' queries and scenes.
"""

from __future__ import annotations

import argparse
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
from examples.testbed.evaluate import BLOCK_SIZE, TILE
from examples.testbed.model import SHIPPED, Testbed, load
from examples.testbed.observe import block_mass, probabilities

SHARE = 0.95  # of the attention
NEAR = 4  # patches
EVERY = 4  # only every fourth query is sorted: sorting is what takes long


@dataclass(frozen=True)
class Head:
    """One head, as the module's docstring describes it; densities are 0 to 1."""

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
    """Every head of every layer, layer by layer."""
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

        def see(seen: bsa.Observation, alike: Tensor = alike) -> None:
            found[seen.layer.index].append(
                _statistics(probabilities(seen.q, seen.k)[0], layout, alike)
            )

        with bsa.observe(model, see):
            model.encode(batch.images, batch.click)
        on_scene()
    means = {layer: torch.stack(rows).double().mean(0) for layer, rows in found.items()}  # (H, 6)
    return [
        Head(layer, head, *row.tolist())
        for layer, rows in means.items()
        for head, row in enumerate(rows)
    ]


def _alike(batch: scenes.Scenes, patch: int) -> Tensor:
    """(N, N) bool: which patches of one scene show the same shape and texture, in their middle."""
    shape, texture = (
        kind[0, patch // 2 :: patch, patch // 2 :: patch].flatten() for kind in batch.kinds()
    )
    kind = shape * len(scenes.TEXTURES) + texture
    return kind[:, None] == kind


def _statistics(probs: Tensor, layout: TokenLayout, alike: Tensor) -> Tensor:
    """(H, N, N) -> (H, 6): the numbers of `Head`, in its order."""
    start = layout.num_prefix_tokens
    patches = probs[:, start:]  # queries (H, h * w, N)
    entropy = -(patches * patches.clamp(min=1e-30).log()).sum(-1).mean(1)
    keys = _needed(patches[:, ::EVERY]).mean(1)
    blocks = _needed(block_mass(probs[None], layout)[0]).mean(1)
    among = patches[..., start:]
    near = (among * _near(layout.grid).to(among.device)).sum(-1).mean(1)
    share = alike.float().mean(1)  # what uniform attention over patches would pay
    preference = ((among * alike).sum(-1) / among.sum(-1).clamp(min=1e-9) / share).mean(1)
    return torch.stack(
        [entropy, keys, blocks, near, preference, patches[..., :start].sum(-1).mean(1)], dim=1
    )


def _needed(mass: Tensor) -> Tensor:
    """(..., keys) -> (...): the smallest share of the keys that holds `SHARE` of each row."""
    running = mass.sort(-1, descending=True).values.cumsum(-1)
    return ((running < SHARE * running[..., -1:]).sum(-1) + 1) / mass.shape[-1]


def _near(grid: tuple[int, int]) -> Tensor:
    """(h * w, h * w) bool: within `NEAR` patches of each other, diagonal steps counting as one."""
    rows, columns = (
        line.flatten() for line in torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    )
    distance = torch.maximum((rows[:, None] - rows).abs(), (columns[:, None] - columns).abs())
    return distance <= NEAR


def table(heads: Sequence[Head], title: str) -> Table:
    found = Table(title=title, title_justify="left")
    for name in (
        "layer",
        "head",
        "entropy",
        "keys for 95 %",
        "blocks for 95 %",
        "near",
        "alike",
        "click",
        "kind",
    ):
        found.add_column(name, justify="left" if name == "kind" else "right")
    for one in heads:
        shares = (f"{value:.0%}" for value in (one.keys, one.blocks, one.near))
        found.add_row(
            f"{one.layer}",
            f"{one.head}",
            f"{one.entropy:.2f}",
            *shares,
            f"{one.alike:.1f}",
            f"{one.click:.0%}",
            one.kind,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        default=SHIPPED,
        help="a file of train.py; the shipped one if left out",
    )
    parser.add_argument("--scenes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    parser.add_argument(
        "--shifted",
        action="store_true",
        help="more objects, and textures that training never showed",
    )
    parser.add_argument("--grid", type=int, help="tokens per side; the model's own if left out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the table there as well")
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
    title = f"{arguments.model.name}, {len(seeds)} {kind} scenes of seed {arguments.seed}, {grid} x {grid} tokens"
    (Console() if sys.stdout.isatty() else Console(width=120)).print(table(heads, title))
    if arguments.json:
        rows = [{**asdict(head), "kind": head.kind} for head in heads]
        command = " ".join(["python", *sys.argv])
        arguments.json.write_text(
            json.dumps({"title": title, "command": command, "heads": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
