"""A click, and what the testbed's model answers dense and sparse, on one picture.

python examples/testbed/show.py [MODEL] [--plan PLAN | --pattern nearest:0.5] [--seed 3] [--out out/testbed.png]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __package__ in (None, ""):  # run as a script: find `examples` and the checkout's own packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import bsa_vision as bsa
from bsa_vision.measure.timing import paired
from examples.testbed import scenes
from examples.testbed.evaluate import in_context, kept_blocks, pattern_plan, prompts
from examples.testbed.model import SHIPPED, Testbed, load, upsample
from examples.testbed.train import iou


@dataclass(frozen=True)
class Answer:
    """What the model said of one scene: (H, W) bool, its IoU, milliseconds per image, share of the blocks that were skipped."""

    mask: Tensor
    iou: float
    milliseconds: float
    sparsity: float


@torch.inference_mode()
def answers(
    model: Testbed, plan: bsa.SparsityPlan, scene: scenes.Scenes, rounds: int = 5
) -> tuple[Answer, Answer]:
    """Dense and sparse, timed in turn. `model` is left as it was."""
    spec = bsa.inspect(model, image_size=scene.mask.shape[-1])
    kept = kept_blocks(plan.complete(spec), spec, prompts(scene))
    logits: dict[str, Tensor] = {}

    def run(name: str) -> None:
        logits[name] = model(scene.images, scene.click)

    def run_dense() -> None:
        with bsa.dense(model):
            run("dense")

    bsa.sparsify_(model, plan)
    try:
        with in_context(model, scene):
            timings = paired({"dense": run_dense, "sparse": lambda: run("sparse")}, rounds)
    finally:
        bsa.restore_(model)
    found = []
    for name, timing in timings.items():
        mask = upsample(logits[name].float(), (scene.mask.shape[-2], scene.mask.shape[-1])) > 0
        sparsity = 1 - kept.float().mean().item() if name == "sparse" else 0.0
        found.append(
            Answer(mask[0].cpu(), iou(mask, scene.mask).item(), 1e3 * timing.median, sparsity)
        )
    return found[0], found[1]


def picture(scene: scenes.Scenes, dense: Answer, sparse: Answer) -> Any:
    """A figure of three panels: the scene with its click and the outline of the right answer, and the two answers."""
    from matplotlib.figure import Figure

    image = scene.images[0].permute(1, 2, 0).cpu().clamp(0, 1)  # (H, W, 3)
    right, (height, width) = scene.mask[0].cpu(), scene.mask.shape[-2:]
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    panels[0].imshow(image)
    panels[0].contour(right.float(), levels=[0.5], colors="white", linewidths=1.5)
    panels[0].set_title(
        "the click, and the right answer: every instance\nof the same shape and the same texture",
        fontsize=10,
    )
    for panel, name, answer in ((panels[1], "dense", dense), (panels[2], "sparse", sparse)):
        panel.imshow(torch.where(answer.mask[..., None], image, 0.25 * image))
        said = f"{name}, {answer.sparsity:.0%} of the blocks skipped" if answer.sparsity else name
        panel.set_title(f"{said}\nIoU {answer.iou:.2f}, {answer.milliseconds:.1f} ms", fontsize=10)
    for panel in panels:
        x, y = scene.click[0].tolist()
        panel.plot(
            x * width - 0.5,
            y * height - 0.5,
            "o",
            color="red",
            markeredgecolor="white",
            markersize=9,
        )
        panel.set_axis_off()
    return figure


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
    parser.add_argument("--plan", type=Path)
    parser.add_argument(
        "--pattern", default="nearest:0.5", help="as in evaluate.py, where no plan is given"
    )
    parser.add_argument("--seed", type=int, default=3, help="which held-out scene")
    parser.add_argument("--shifted", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("out/testbed.png"))
    arguments = parser.parse_args()
    try:
        model = load(arguments.model, arguments.device)
        spec = bsa.inspect(model)
        plan = (
            bsa.SparsityPlan.load(arguments.plan)
            if arguments.plan
            else pattern_plan(arguments.pattern, spec)
        )
    except (ValueError, bsa.PlanError, OSError) as error:
        parser.error(str(error))
    difficulty = scenes.SHIFTED if arguments.shifted else scenes.HARD
    seed = scenes.held_out(arguments.seed + 1)[-1]
    scene = scenes.make([seed], model.size.grid * model.size.patch, difficulty, arguments.device)
    dense, sparse = answers(model, plan, scene)
    for name, answer in (("dense", dense), ("sparse", sparse)):
        print(
            f"{name:6}  {answer.sparsity:4.0%} of the blocks skipped  IoU {answer.iou:.3f}  {answer.milliseconds:.1f} ms"
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    picture(scene, dense, sparse).savefig(arguments.out, dpi=110)
    print(f"picture: {arguments.out}")


if __name__ == "__main__":
    main()
