"""Train the testbed's model: easy scenes first, then hard ones, most of them at small grids.

    python examples/testbed/train.py --out out/testbed
    torchrun --nproc-per-node 2 examples/testbed/train.py --out out/testbed

With torchrun the processes share the same batches. A run resumes from the last checkpoint in the
folder and gives the same result as an uninterrupted one. The folder contains:

last.pt              checkpoint to resume from
testbed.safetensors  averaged weights
log.jsonl            one line every 1024 images
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

if __package__ in (None, ""):  # run as a script: find `examples` and the checkout's own packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.testbed import scenes
from examples.testbed.model import Size, Testbed, save
from examples.testbed.scenes import EASY, HARD, Difficulty, Scenes

LOG_EVERY, SAVE_EVERY = 1024, 4096  # images


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    images  number of images
    grid    tokens per side
    batch   images per step
    boost   factor of the learning rate
    """

    images: int
    grid: int
    batch: int
    difficulty: Difficulty
    boost: float = 1.0


MEDIUM = replace(HARD, objects=(4, 6), matches=2, radius=(0.13, 0.19), clutter=0.25)
# Hard scenes for 16 x 16 tokens: objects have about as many tokens, and stripes about as many
# pixels, as HARD scenes at larger grids.
COARSE = replace(HARD, objects=(5, 7), radius=(0.12, 0.19), period=(0.06, 0.11))
RECIPE = (
    Stage(4_096, 16, 16, EASY),
    Stage(6_144, 16, 16, MEDIUM),
    Stage(28_672, 16, 16, COARSE),
    Stage(5_120, 24, 8, HARD, boost=3.0),
    Stage(4_096, 32, 8, HARD, boost=4.0),
)


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of a run, besides its recipe."""

    seed: int = 0
    rate: float = 2e-3
    warmup: int = 512  # images
    weight_decay: float = 0.05
    clip: float = 1.0
    average: float = 0.99  # decay per step of the averaged weights
    naming: float = 0.5  # weight of the auxiliary loss
    flat: bool = False  # constant learning rate after warm-up


class Loss(nn.Module):
    """Training loss, as a module for DistributedDataParallel."""

    def __init__(self, model: Testbed, naming: float) -> None:
        super().__init__()
        self.model, self.naming = model, naming

    def forward(self, batch: Scenes) -> tuple[Tensor, Tensor]:
        """Return the loss and the IoU, both means over the batch.

        Losses: cross-entropy and dice of the mask; cross-entropy of the patches' shape and texture.
        """
        tokens = self.model.encode(batch.images, batch.click)
        logits = self.model.answer(tokens, batch.images).float()
        target = _target(batch, logits)
        loss = F.binary_cross_entropy_with_logits(logits, target) + _dice(logits, target)
        if self.naming:
            kinds = _patch_kinds(batch, self.model.size.patch)
            predicted = (x.float().flatten(0, 1) for x in self.model.name(tokens))
            naming = sum(F.cross_entropy(x, kind.flatten()) for x, kind in zip(predicted, kinds))
            loss = loss + self.naming * naming
        return loss, iou(logits.detach() > 0, target > 0.5).mean()


def _target(batch: Scenes, logits: Tensor) -> Tensor:
    """Return the mask at the resolution of the logits, 0 to 1."""
    return F.avg_pool2d(batch.mask[:, None].float(), batch.mask.shape[-1] // logits.shape[-1])[:, 0]


def _dice(logits: Tensor, target: Tensor) -> Tensor:
    share = logits.sigmoid()
    both, either = (share * target).sum((1, 2)), share.sum((1, 2)) + target.sum((1, 2))
    return (1 - (2 * both + 1) / (either + 1)).mean()


def iou(predicted: Tensor, expected: Tensor) -> Tensor:
    """Return the intersection over union of masks (B, H, W), (B,); 1 if both are empty."""
    both, either = (predicted & expected).sum((1, 2)), (predicted | expected).sum((1, 2))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def _patch_kinds(batch: Scenes, patch: int) -> tuple[Tensor, Tensor]:
    """Return the shape and the texture at the centre of each patch, (B, h, w) each.

    These are indices into the tables of `scenes`, starting at 1; 0 = ground.
    """
    layout, middle = batch.layout, slice(patch // 2, None, patch)
    used = ((scenes.SHAPES, layout.shapes), (scenes.TEXTURES, layout.textures))
    found = []
    for kind, (table, names) in zip(batch.kinds(), used):
        indices = torch.tensor([-1, *map(list(table).index, names)], device=kind.device)
        found.append(indices[kind[:, middle, middle] + 1] + 1)
    return found[0], found[1]


class Training:
    """State of a run: model, averaged model, optimisers and progress."""

    def __init__(
        self,
        model: Testbed,
        recipe: Sequence[Stage] = RECIPE,
        settings: Settings = Settings(),
        device: torch.device | str = "cpu",
    ) -> None:
        self.device, self.recipe, self.settings = torch.device(device), tuple(recipe), settings
        self.model = model.to(self.device).train()
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizers = optimizers(self.model, settings)
        self.seen = self.steps = 0
        self.seconds = 0.0  # training time, summed over resumed runs
        distributed = dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world = dist.get_world_size() if distributed else 1
        loss = Loss(self.model, settings.naming)
        self.loss = DistributedDataParallel(loss) if self.world > 1 else loss

    @property
    def total(self) -> int:
        return sum(stage.images for stage in self.recipe)

    @property
    def stage(self) -> Stage:
        """The stage of the next images."""
        until = 0
        for stage in self.recipe:
            until += stage.images
            if self.seen < until:
                return stage
        return self.recipe[-1]

    def step(self) -> tuple[float, float]:
        """Run one optimiser step; return the loss and IoU of this process's part of the batch."""
        started, stage = time.perf_counter(), self.stage
        seeds, pixels = self.seeds(stage.batch), stage.grid * self.model.size.patch
        batch = scenes.make(seeds, pixels, stage.difficulty, self.device)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._rate()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss, overlap = self.loss(batch)
        self.model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.seen, self.steps = self.seen + stage.batch, self.steps + 1
        self._update_average()
        self.seconds += time.perf_counter() - started
        return loss.item(), overlap.item()

    def seeds(self, batch: int) -> range:
        """Return the seeds of this process's part of the next batch."""
        first = self.settings.seed * 2**32 + self.seen
        return range(first, first + batch)[self.rank :: self.world]

    def _rate(self) -> float:
        """Return the learning rate: linear warm-up, then a cosine decay to 1 %."""
        warm = min(1.0, (self.seen + self.stage.batch) / self.settings.warmup)
        share = 0.0 if self.settings.flat else min(1.0, self.seen / self.total)
        decay = 0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2
        return self.settings.rate * self.stage.boost * warm * decay

    @torch.no_grad()
    def _update_average(self) -> None:
        keep = min(self.settings.average, (1 + self.steps) / (10 + self.steps))
        for mean, new in zip(self.average.parameters(), self.model.parameters()):
            mean.lerp_(new, 1 - keep)

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "average")}
        counts = {name: getattr(self, name) for name in ("seen", "steps", "seconds")}
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        return {**parts, **counts, "optimizers": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("model", "average"):
            getattr(self, name).load_state_dict(state[name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name in ("seen", "steps", "seconds"):
            setattr(self, name, state[name])


def optimizers(model: Testbed, settings: Settings) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks, and AdamW for all other parameters.

    In a trial this learned faster than AdamW alone.
    """
    matrices = [p for p in model.encoder.blocks.parameters() if p.dim() == 2]
    in_muon = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in in_muon]
    rate, decay = settings.rate, settings.weight_decay
    return [
        torch.optim.Muon(matrices, rate, decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


@torch.no_grad()
def held_out_iou(
    model: Testbed, grid: int, difficulty: Difficulty, count: int = 64, device: Any = "cpu"
) -> float:
    """Return the mean IoU over held-out scenes, at the resolution of the logits.

    The scenes differ from those of `evaluate`.
    """
    found, seeds = [], scenes.held_out(count, seed=1000)
    for first in range(0, count, 16):
        batch = scenes.make(seeds[first : first + 16], grid * model.size.patch, difficulty, device)
        logits = model(batch.images, batch.click)
        found.append(iou(logits > 0, _target(batch, logits) > 0.5))
    return torch.cat(found).mean().item()


def run(training: Training, out: Path, command: str) -> None:
    """Train to the end of the recipe; resume from the last checkpoint in `out`, if any."""
    main, last = training.rank == 0, out / "last.pt"
    out.mkdir(parents=True, exist_ok=True)
    if last.exists():
        training.load_state_dict(torch.load(last, map_location=training.device, weights_only=True))
    if main:
        _cut(out / "log.jsonl", training.seen)
    console = Console(stderr=True)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TimeElapsedColumn(), TimeRemainingColumn()]
    shown = main and console.is_terminal
    sums: list[tuple[float, float]] = []
    with Progress(*columns, console=console, disable=not shown) as progress:
        task = progress.add_task("images", total=training.total, completed=training.seen)
        while training.seen < training.total:
            before = training.seen
            sums.append(training.step())
            progress.update(task, completed=training.seen)
            if main and _passes(LOG_EVERY, before, training):
                line = _line(training, sums)
                progress.update(task, description=f"IoU {line['held_out']:.3f}")
                with (out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(line) + "\n")
                if not console.is_terminal:
                    print(json.dumps(line), flush=True)
                sums = []
            if main and _passes(SAVE_EVERY, before, training):
                _save(training, out, command)


def _cut(log: Path, seen: int) -> None:
    """Drop lines written after the last checkpoint; the resumed run writes them again."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    log.write_text("".join(line for line in lines if json.loads(line)["images"] <= seen))


def _passes(every: int, before: int, training: Training) -> bool:
    return before // every < training.seen // every or training.seen >= training.total


def _line(training: Training, sums: Sequence[tuple[float, float]]) -> dict[str, Any]:
    loss, overlap = (sum(column) / len(sums) for column in zip(*sums))
    stage = training.stage
    held_out = held_out_iou(training.average, stage.grid, HARD, device=training.device)
    return {
        "images": training.seen,
        "grid": stage.grid,
        "loss": round(loss, 4),
        "iou": round(overlap, 4),
        "held_out": round(held_out, 4),  # hard scenes, averaged weights
        "images_per_second": round(training.seen / training.seconds, 1),
        "seconds": round(training.seconds),
    }


def _save(training: Training, out: Path, command: str) -> None:
    """Save the checkpoint and the weights, atomically."""
    torch.save(training.state_dict(), out / "last.tmp")
    os.replace(out / "last.tmp", out / "last.pt")
    save(training.average, out / "testbed.tmp", notes(training, command))
    os.replace(out / "testbed.tmp", out / "testbed.safetensors")


def notes(training: Training, command: str) -> dict[str, str]:
    """Return a record of how the weights were trained."""
    on_gpu, threads = training.device.type == "cuda", torch.get_num_threads()
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {threads} threads"
    recipe = [[s.images, s.grid, s.batch, _name(s.difficulty), s.boost] for s in training.recipe]
    return {
        "command": command,
        "seed": str(training.settings.seed),
        "images": str(training.seen),
        "seconds": str(round(training.seconds)),
        "device": f"{device} x {training.world}" if training.world > 1 else device,
        "versions": f"python {platform.python_version()}, torch {torch.__version__}",
        "recipe": json.dumps(recipe),
    }


def _name(difficulty: Difficulty) -> str:
    names = {EASY: "EASY", MEDIUM: "MEDIUM", COARSE: "COARSE", HARD: "HARD"}
    return names.get(difficulty, repr(difficulty))


def _command(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str:
    """Return the command line that trains these weights, without the output folder."""
    options = [
        f"--{key} {value}"
        for key, value in vars(arguments).items()
        if value != parser.get_default(key) and key != "out"
    ]
    return " ".join(["python examples/testbed/train.py", *options])


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    out = Path("out/testbed")
    add("--out", type=Path, default=out, help="folder for all files; default: out/testbed")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default, help="torch device; default: cuda if available, else cpu")
    add("--seed", type=int, default=0, help="random seed of weights and scenes; default: 0")
    add("--rate", type=float, default=Settings.rate, help="learning rate; default: %(default)s")
    add("--share", type=float, default=1.0, help="factor of the number of images; default: 1")
    add("--depth", type=int, default=Size.depth, help="number of layers; default: %(default)s")
    add("--dim", type=int, default=Size.dim, help="channels per token; default: %(default)s")
    add("--heads", type=int, default=Size.heads, help="heads per layer; default: %(default)s")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if "RANK" in os.environ:  # torchrun
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.manual_seed(arguments.seed)
    model = Testbed(Size(depth=arguments.depth, dim=arguments.dim, heads=arguments.heads))
    steps = [max(1, round(stage.images * arguments.share / stage.batch)) for stage in RECIPE]
    recipe = [replace(stage, images=n * stage.batch) for n, stage in zip(steps, RECIPE)]
    settings = Settings(seed=arguments.seed, rate=arguments.rate)
    run(Training(model, recipe, settings, device), arguments.out, _command(parser, arguments))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
