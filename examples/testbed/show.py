"""Draw one scene with a click, and the dense and the sparse answer of the testbed's model.

python examples/testbed/show.py [MODEL] [--plan PLAN | --pattern nearest:0.5] [--seed 3]
    [--out out/testbed.png]
"""

from __future__ import annotations

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
from examples.testbed.evaluate import (
    in_context,
    kept_blocks,
    make_parser,
    pattern_plan,
    prompts,
)
from examples.testbed.model import Testbed, load, upsample
from examples.testbed.train import iou


@dataclass(frozen=True)
class Answer:
    """Answer of the model for one scene.

    mask          (H, W) bool
    milliseconds  per image
    sparsity      share of blocks skipped
    """

    mask: Tensor
    iou: float
    milliseconds: float
    sparsity: float


@torch.inference_mode()
def answers(
    model: Testbed, plan: bsa.SparsityPlan, scene: scenes.Scenes, rounds: int = 5
) -> tuple[Answer, Answer]:
    """Return the dense and the sparse answer, timed alternately. `model` is restored."""
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
    height, width = scene.mask.shape[-2:]
    sparsity = {"dense": 0.0, "sparse": 1 - kept.float().mean().item()}
    found = []
    for name, timing in timings.items():
        mask = upsample(logits[name].float(), (height, width)) > 0
        overlap = iou(mask, scene.mask).item()
        found.append(Answer(mask[0].cpu(), overlap, 1e3 * timing.median, sparsity[name]))
    return found[0], found[1]


def picture(scene: scenes.Scenes, dense: Answer, sparse: Answer) -> Any:
    """Return a figure: the scene with the click and the expected outline, and both answers."""
    from matplotlib.figure import Figure

    image = scene.images[0].permute(1, 2, 0).cpu().clamp(0, 1)  # (H, W, 3)
    expected, (height, width) = scene.mask[0].cpu(), scene.mask.shape[-2:]
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    panels[0].imshow(image)
    panels[0].contour(expected.float(), levels=[0.5], colors="white", linewidths=1.5)
    panels[0].set_title(
        "click and expected answer: all objects\nwith the same shape and texture",
        fontsize=10,
    )
    for panel, name, answer in ((panels[1], "dense", dense), (panels[2], "sparse", sparse)):
        panel.imshow(torch.where(answer.mask[..., None], image, 0.25 * image))
        title = f"{name}, {answer.sparsity:.0%} of blocks skipped" if answer.sparsity else name
        title += f"\nIoU {answer.iou:.2f}, {answer.milliseconds:.1f} ms"
        panel.set_title(title, fontsize=10)
    x, y = scene.click[0].tolist()
    style = {"color": "red", "markeredgecolor": "white", "markersize": 9}
    for panel in panels:
        panel.plot(x * width - 0.5, y * height - 0.5, "o", **style)
        panel.set_axis_off()
    return figure


def main() -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--plan", type=Path, help="plan file, instead of a pattern")
    add("--pattern", default="nearest:0.5", help="as in evaluate.py; default: nearest:0.5")
    add("--seed", type=int, default=3, help="index of the held-out scene; default: 3")
    out = Path("out/testbed.png")
    add("--out", type=Path, default=out, help="file for the picture; default: out/testbed.png")
    arguments = parser.parse_args()
    try:
        model = load(arguments.model, arguments.device)
        spec = bsa.inspect(model)
        if arguments.plan:
            plan = bsa.SparsityPlan.load(arguments.plan)
        else:
            plan = pattern_plan(arguments.pattern, spec)
    except (ValueError, bsa.PlanError, OSError) as error:
        parser.error(str(error))
    difficulty = scenes.SHIFTED if arguments.shifted else scenes.HARD
    seed = scenes.held_out(arguments.seed + 1)[-1]
    scene = scenes.make([seed], model.size.grid * model.size.patch, difficulty, arguments.device)
    dense, sparse = answers(model, plan, scene)
    for name, answer in (("dense", dense), ("sparse", sparse)):
        print(
            f"{name:6}  {answer.sparsity:4.0%} of blocks skipped  IoU {answer.iou:.3f}  "
            f"{answer.milliseconds:.1f} ms"
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    picture(scene, dense, sparse).savefig(arguments.out, dpi=110)
    print(f"picture: {arguments.out}")


if __name__ == "__main__":
    main()
