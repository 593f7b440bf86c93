"""What single heads see of a photograph: the attention of one query when nothing is skipped, and what its block may see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from bsa_vision.adapters import Observation, inspect, observe
from bsa_vision.attention.token_order import key_places
from bsa_vision.masks import TokenLayout
from bsa_vision.models.features import eval_mode, features
from bsa_vision.plans.plan import SparsityPlan
from bsa_vision.tuning.trial import Target
from bsa_vision.viz import View, block_at

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Layers = Sequence[Mapping[str, Any]]  # as the notes hold them


@dataclass(frozen=True, eq=False)
class Sight:
    """What one query attends to in a head when nothing is skipped, and what of that it may see.

    view       what the block of the query may see
    query      (row, column) of its patch
    attention  (N,) of the query, model order
    """

    view: View
    query: tuple[int, int]
    attention: Tensor

    def patches(self) -> Tensor:
        """(h, w): the attention that patches get; special tokens get the rest."""
        layout = self.view.layout
        return self.attention[
            layout.num_prefix_tokens : layout.num_prefix_tokens + layout.num_patches
        ].reshape(layout.grid)

    @property
    def kept(self) -> float:
        """The share of its attention that it keeps; blocks with special tokens always stay."""
        _, visible = self.view.patches()
        return 1 - float(self.patches()[~visible].sum())


def choose(layers: Layers, views: int) -> list[tuple[int, int]]:
    """(layer, head) of so many sparse heads: from the largest expected error to the least, of layers not shown yet where there are any."""
    errors = {
        (index, number): head["error"]
        for index, one in enumerate(layers)
        for number, head in enumerate(one["heads"])
        if head["pattern"] != "dense"
    }
    ranked = sorted(errors, key=lambda pair: -errors[pair])
    count, shown = min(views, len(ranked)), Counter[int]()
    chosen: list[int] = []  # ranks
    for step in range(count):
        wanted = step * (len(ranked) - 1) / max(count - 1, 1)
        left = [rank for rank in range(len(ranked)) if rank not in chosen]
        chosen.append(min(left, key=lambda rank: (shown[ranked[rank][0]], abs(rank - wanted))))
        shown[ranked[chosen[-1]][0]] += 1
    return [ranked[rank] for rank in sorted(chosen)]


def look(
    plan: SparsityPlan,
    model: nn.Module,
    image: Any,
    heads: Sequence[tuple[str, int]],
    target: Target = features,
) -> list[Sight]:
    """What each of these heads (layer key, head) attends to from the middle of the first image; the model is left as it was."""
    spec = inspect(model)
    plan.check(spec)
    found: dict[tuple[str, int], Sight] = {}

    def see(seen: Observation) -> None:
        for key, head in heads:
            if key == seen.layer.key and (key, head) not in found:
                found[key, head] = _sight(seen, head, plan, plan.layout(spec, seen.grid))

    with eval_mode(model), observe(model, see):
        target(model, image)
    missing = {key: 0 for key, head in heads if (key, head) not in found}
    if missing:
        raise ValueError(
            f"target ran no attention of {', '.join(missing)}: only layers that run can be shown; pass the target of the tuning."
        )
    return [found[pair] for pair in heads]


def _sight(seen: Observation, head: int, plan: SparsityPlan, layout: TokenLayout) -> Sight:
    row, column = layout.grid[0] // 2, layout.grid[1] // 2
    blocks = plan.compile(seen.layer.key, layout).block_mask(layout.num_tokens, layout.num_tokens)[
        0, head
    ]
    view = View(f"{seen.layer.name}, head {head}", layout, blocks, block_at(layout, row, column))
    return Sight(view, (row, column), attention_of(seen, layout, head, row, column))


def attention_of(
    seen: Observation, layout: TokenLayout, head: int, row: int, column: int
) -> Tensor:
    """(N,) float32: what the query of a patch attends to in one head, in the first image, model order."""
    query, group = (
        layout.num_prefix_tokens + row * layout.grid[1] + column,
        seen.q.shape[1] // seen.k.shape[1],
    )
    logits = seen.k[0, head // group].float() @ seen.q[0, head, query].float() * seen.scale
    if seen.rel_pos is not None:
        for term, place in zip(seen.rel_pos, key_places(layout, False, logits.device), strict=True):
            logits = logits + term[0, head, query].float()[place]
    return logits.softmax(-1).cpu()


def pixels_of(image: Any) -> Tensor:
    """(h, w, 3) from 0 to 1: the first image of the first tensor (B, 3, h, w) in what a target takes."""
    left = [image]
    while left:
        one = left.pop(0)
        if isinstance(one, Tensor) and one.dim() == 4 and one.shape[1] == 3:
            pixels = one[0].detach().float().cpu().permute(1, 2, 0)
            return (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-12)
        left = [
            *(
                one.values()
                if isinstance(one, Mapping)
                else one
                if isinstance(one, (list, tuple))
                else ()
            ),
            *left,
        ]
    raise ValueError(
        f"image is a {type(image).__name__} without pixels: views need a tensor (B, 3, h, w), or a tuple, list or mapping that holds one; "
        "pass such an image, or no model."
    )


def photograph(pixels: Tensor, sight: Sight) -> Figure:
    """The photograph (h, w, 3) in grey, the query's attention in colour, dark where its block may not look."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    (rows, columns), (height, width) = sight.view.layout.grid, pixels.shape[:2]
    queries, visible = (x.numpy() for x in sight.view.patches())
    figure = Figure((3.6, 3.6 * height / width), dpi=120)
    axes = figure.add_axes((0, 0, 1, 1))
    share = (sight.patches() / sight.patches().max().clamp(min=1e-30)).numpy()
    heat = colormaps["inferno"](0.25 + 0.75 * share)  # (rows, columns, 4)
    heat[..., 3] = 0.85 * share**0.7
    shade = np.zeros_like(heat)
    shade[..., 3] = 0.6 * ~visible
    grey = np.repeat(0.2 + 0.65 * pixels.numpy().mean(-1, keepdims=True), 3, axis=-1)
    for layer in (grey, heat, shade):
        axes.imshow(layer, extent=(0, columns, rows, 0), aspect="auto", interpolation="nearest")
    fine = np.pad(np.kron(queries, np.ones((8, 8))), 1)  # an eighth of a patch each
    around = (-1 / 16, columns + 1 / 16, -1 / 16, rows + 1 / 16)
    axes.contour(fine, [0.5], colors="white", linewidths=2, extent=around)
    axes.plot(sight.query[1] + 0.5, sight.query[0] + 0.5, "+", color="white", ms=9, mew=2)
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    axes.set_axis_off()
    return figure
