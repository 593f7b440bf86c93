"""Train the testbed's model: easy scenes first, then hard ones, most of them at small grids.

    python examples/testbed/train.py --out out/testbed                       # from the start, or on from the last checkpoint there
    torchrun --nproc-per-node 2 examples/testbed/train.py --out out/testbed  # the same batches, shared by the processes

Progress is counted in images, so a run that is stopped and resumed ends where one that goes straight on does. Writes `last.pt` (to
resume) and `testbed.safetensors` (averaged weights, to use) into the folder, and a line every 1024 images into `log.jsonl`.
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
    """Some images of one kind: how many, tokens per side, how many per step, how hard, and a factor of the learning rate."""

    images: int
    grid: int
    batch: int
    difficulty: Difficulty
    boost: float = 1.0


MEDIUM = replace(HARD, objects=(4, 6), matches=2, radius=(0.13, 0.19), clutter=0.25)
# Hard scenes as 16 x 16 tokens can show them: as many tokens to an object and as many pixels to a stripe as at larger grids, or nearly.
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
    """What a run depends on besides its recipe."""

    seed: int = 0
    rate: float = 2e-3
    warmup: int = 512  # images
    weight_decay: float = 0.05
    clip: float = 1.0
    average: float = 0.99  # of the weights, per step
    naming: float = 0.5  # weight of the loss on the side
    flat: bool = False  # for trials: no decay of the learning rate


class Loss(nn.Module):
    """What is minimised, as a module, so that processes can share it."""

    def __init__(self, model: Testbed, naming: float) -> None:
        super().__init__()
        self.model, self.naming = model, naming

    def forward(self, batch: Scenes) -> tuple[Tensor, Tensor]:
        """Loss and IoU, each a mean over the batch. Segmentation: cross-entropy and dice; on the side: what every patch shows."""
        tokens = self.model.encode(batch.images, batch.click)
        logits = self.model.answer(tokens, batch.images).float()
        target = F.avg_pool2d(
            batch.mask[:, None].float(), batch.mask.shape[-1] // logits.shape[-1]
        )[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, target) + _dice(logits, target)
        if self.naming:
            shape, texture = _on_patches(batch, self.model.size.patch)
            said = (x.float().flatten(0, 1) for x in self.model.name(tokens))
            naming = sum(
                F.cross_entropy(x, wanted.flatten()) for x, wanted in zip(said, (shape, texture))
            )
            loss = loss + self.naming * naming
        return loss, iou(logits.detach() > 0, target > 0.5).mean()


def _dice(logits: Tensor, target: Tensor) -> Tensor:
    share = logits.sigmoid()
    both, either = (share * target).sum((1, 2)), share.sum((1, 2)) + target.sum((1, 2))
    return (1 - (2 * both + 1) / (either + 1)).mean()


def iou(said: Tensor, right: Tensor) -> Tensor:
    """(B, H, W) bool twice -> (B,) intersection over union; 1 where both are empty."""
    both, either = (said & right).sum((1, 2)), (said | right).sum((1, 2))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def _on_patches(batch: Scenes, patch: int) -> tuple[Tensor, Tensor]:
    """(B, h, w) twice: shape and texture at the middle of each patch, as places in the tables of `scenes`, from 1; 0 = ground."""
    tables = (
        (list(scenes.SHAPES), batch.layout.shapes),
        (list(scenes.TEXTURES), batch.layout.textures),
    )
    found = []
    for kind, (table, used) in zip(batch.kinds(), tables):
        places = torch.tensor([-1, *(table.index(name) for name in used)], device=kind.device)
        found.append(places[kind[:, patch // 2 :: patch, patch // 2 :: patch] + 1] + 1)
    return found[0], found[1]


class Training:
    """A run: model, averaged model, optimiser, and how many images went by."""

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
        self.seconds = 0.0  # of work, over all resumed runs
        self.rank, self.world = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )
        loss = Loss(self.model, settings.naming)
        self.loss = DistributedDataParallel(loss) if self.world > 1 else loss

    @property
    def total(self) -> int:
        return sum(stage.images for stage in self.recipe)

    @property
    def stage(self) -> Stage:
        """The one that the next images belong to."""
        until = 0
        for stage in self.recipe:
            until += stage.images
            if self.seen < until:
                return stage
        return self.recipe[-1]

    def step(self) -> tuple[float, float]:
        """One step of the optimiser; loss and IoU of this process's share of the batch."""
        started, stage = time.perf_counter(), self.stage
        batch = scenes.make(
            self.seeds(stage.batch),
            stage.grid * self.model.size.patch,
            stage.difficulty,
            self.device,
        )
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
        """Of the next scenes: this process's share."""
        first = self.settings.seed * 2**32 + self.seen
        return range(first, first + batch)[self.rank :: self.world]

    def _rate(self) -> float:
        """Warm-up, then half a cosine down to a hundredth; by images."""
        warm = min(1.0, (self.seen + self.stage.batch) / self.settings.warmup)
        share = 0.0 if self.settings.flat else min(1.0, self.seen / self.total)
        return (
            self.settings.rate
            * self.stage.boost
            * warm
            * (0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2)
        )

    @torch.no_grad()
    def _update_average(self) -> None:
        keep = min(self.settings.average, (1 + self.steps) / (10 + self.steps))
        for mean, new in zip(self.average.parameters(), self.model.parameters()):
            mean.lerp_(new, 1 - keep)

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "average")}
        counts = {name: getattr(self, name) for name in ("seen", "steps", "seconds")}
        return {
            **parts,
            **counts,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("model", "average"):
            getattr(self, name).load_state_dict(state[name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name in ("seen", "steps", "seconds"):
            setattr(self, name, state[name])


def optimizers(model: Testbed, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, which learned this task faster in a trial; AdamW for everything else."""
    matrices = [p for p in model.encoder.blocks.parameters() if p.dim() == 2]
    taken = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in taken]
    return [
        torch.optim.Muon(
            matrices, settings.rate, settings.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, settings.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


@torch.no_grad()
def held_out_iou(
    model: Testbed, grid: int, difficulty: Difficulty, count: int = 64, device: Any = "cpu"
) -> float:
    """Mean IoU over held-out scenes, at the resolution of the logits; the seeds are not those of `evaluate`."""
    found = []
    seeds = scenes.held_out(count, seed=1000)
    for first in range(0, count, 16):
        batch = scenes.make(seeds[first : first + 16], grid * model.size.patch, difficulty, device)
        logits = model(batch.images, batch.click)
        target = F.avg_pool2d(
            batch.mask[:, None].float(), batch.mask.shape[-1] // logits.shape[-1]
        )[:, 0]
        found.append(iou(logits > 0, target > 0.5))
    return torch.cat(found).mean().item()


# Running


def run(training: Training, out: Path, command: str) -> None:
    """Train to the end of the recipe, from the last checkpoint in `out` if there is one."""
    main, last = training.rank == 0, out / "last.pt"
    out.mkdir(parents=True, exist_ok=True)
    if last.exists():
        training.load_state_dict(torch.load(last, map_location=training.device, weights_only=True))
    if main:
        _cut(out / "log.jsonl", training.seen)
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    sums: list[tuple[float, float]] = []
    with Progress(
        *columns, console=console, disable=not (main and console.is_terminal)
    ) as progress:
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
    """Forget lines from after the last checkpoint: they will be written again."""
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
    """Both files, each whole or not at all."""
    torch.save(training.state_dict(), out / "last.tmp")
    os.replace(out / "last.tmp", out / "last.pt")
    save(training.average, out / "testbed.tmp", notes(training, command))
    os.replace(out / "testbed.tmp", out / "testbed.safetensors")


def notes(training: Training, command: str) -> dict[str, str]:
    """What made these weights."""
    device = (
        torch.cuda.get_device_name()
        if training.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    return {
        "command": command,
        "seed": str(training.settings.seed),
        "images": str(training.seen),
        "seconds": str(round(training.seconds)),
        "device": f"{device} x {training.world}" if training.world > 1 else device,
        "versions": f"python {platform.python_version()}, torch {torch.__version__}",
        "recipe": json.dumps(
            [[s.images, s.grid, s.batch, _name(s.difficulty), s.boost] for s in training.recipe]
        ),
    }


def _name(difficulty: Difficulty) -> str:
    return {EASY: "EASY", MEDIUM: "MEDIUM", COARSE: "COARSE", HARD: "HARD"}.get(
        difficulty, repr(difficulty)
    )


def _command(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str:
    """What to type for these weights; where they went is nobody's business."""
    given = {
        key: value
        for key, value in vars(arguments).items()
        if value != parser.get_default(key) and key != "out"
    }
    return " ".join(
        ["python examples/testbed/train.py", *(f"--{key} {value}" for key, value in given.items())]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/testbed"), help="folder for checkpoints and the log"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the scenes")
    parser.add_argument("--rate", type=float, default=Settings.rate, help="highest learning rate")
    parser.add_argument(
        "--share",
        type=float,
        default=1.0,
        help="of the recipe's images, for a shorter or longer run",
    )
    parser.add_argument("--depth", type=int, default=Size.depth, help="layers")
    parser.add_argument("--dim", type=int, default=Size.dim, help="channels of a token")
    parser.add_argument("--heads", type=int, default=Size.heads, help="per layer")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if "RANK" in os.environ:  # torchrun
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        device = (
            torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device.type == "cuda" else device
        )
    torch.manual_seed(arguments.seed)
    model = Testbed(Size(depth=arguments.depth, dim=arguments.dim, heads=arguments.heads))
    recipe = [
        replace(s, images=max(1, round(s.images * arguments.share / s.batch)) * s.batch)
        for s in RECIPE
    ]
    settings = Settings(seed=arguments.seed, rate=arguments.rate)
    run(Training(model, recipe, settings, device), arguments.out, _command(parser, arguments))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
