"""Attention of single heads on an image: the dense attention of one query and what it keeps."""

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

Layers = Sequence[Mapping[str, Any]]  # `layers` of the report


@dataclass(frozen=True, eq=False)
class HeadView:
    """The dense attention of one query in one head, and the part of it that the plan keeps.

    view       blocks that the query's block attends to
    query      (row, column) of its patch
    attention  (N,) of the query, model order
    """

    view: View
    query: tuple[int, int]
    attention: Tensor

    def patches(self) -> Tensor:
        """Return the attention to patches (h, w), without that to special tokens."""
        layout = self.view.layout
        first = layout.num_prefix_tokens
        return self.attention[first : first + layout.num_patches].reshape(layout.grid)

    @property
    def kept(self) -> float:
        """Share of the query's attention that is kept; special tokens are always kept."""
        _, visible = self.view.patches()
        return 1 - float(self.patches()[~visible].sum())


def choose_heads(layers: Layers, views: int) -> list[tuple[int, int]]:
    """Choose (layer, head) of at most `views` sparse heads.

    Their predicted errors range from the largest to the smallest. Layers that have no view yet are
    preferred.
    """
    errors = {
        (index, number): head["error"]
        for index, layer in enumerate(layers)
        for number, head in enumerate(layer["heads"])
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


def head_views(
    plan: SparsityPlan,
    model: nn.Module,
    image: Any,
    heads: Sequence[tuple[str, int]],
    target: Target = features,
) -> list[HeadView]:
    """Return the attention of the middle query of the first image in each head (layer key, head).

    The model is not changed.
    """
    spec = inspect(model)
    plan.check(spec)
    found: dict[tuple[str, int], HeadView] = {}

    def add(call: Observation) -> None:
        for key, head in heads:
            if key == call.layer.key and (key, head) not in found:
                found[key, head] = _head_view(call, head, plan, plan.layout(spec, call.grid))

    with eval_mode(model), observe(model, add):
        target(model, image)
    missing = {key: 0 for key, head in heads if (key, head) not in found}
    if missing:
        raise ValueError(
            f"target ran no attention of {', '.join(missing)}: only layers that run can be shown; "
            "pass the target used for tuning."
        )
    return [found[pair] for pair in heads]


def _head_view(call: Observation, head: int, plan: SparsityPlan, layout: TokenLayout) -> HeadView:
    row, column = layout.grid[0] // 2, layout.grid[1] // 2
    masks = plan.compile(call.layer.key, layout)
    blocks = masks.block_mask(layout.num_tokens, layout.num_tokens)[0, head]
    title, block = f"{call.layer.name}, head {head}", block_at(layout, row, column)
    attention = attention_of(call, layout, head, row, column)
    return HeadView(View(title, layout, blocks, block), (row, column), attention)


def attention_of(
    call: Observation, layout: TokenLayout, head: int, row: int, column: int
) -> Tensor:
    """Return the dense attention of one patch's query in the first image, (N,) float32.

    In model order.
    """
    query = layout.num_prefix_tokens + row * layout.grid[1] + column
    group = call.q.shape[1] // call.k.shape[1]
    logits = call.k[0, head // group].float() @ call.q[0, head, query].float() * call.scale
    if call.rel_pos is not None:
        for term, place in zip(call.rel_pos, key_places(layout, False, logits.device), strict=True):
            logits = logits + term[0, head, query].float()[place]
    return logits.softmax(-1).cpu()


def pixels_of(image: Any) -> Tensor:
    """Return the first image, (h, w, 3) from 0 to 1, of the first tensor (B, 3, h, w) in `image`.

    image  input of a target: a tensor, or tuples, lists and mappings that contain one
    """
    left = [image]
    while left:
        item = left.pop(0)
        if isinstance(item, Tensor) and item.dim() == 4 and item.shape[1] == 3:
            pixels = item[0].detach().float().cpu().permute(1, 2, 0)
            return (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-12)
        if isinstance(item, Mapping):
            left = [*item.values(), *left]
        elif isinstance(item, (list, tuple)):
            left = [*item, *left]
    raise ValueError(
        f"image is a {type(image).__name__} without pixels: expected a tensor (B, 3, h, w), or a "
        "tuple, list or mapping that contains one."
    )


def draw(pixels: Tensor, head: HeadView) -> Figure:
    """Draw the image (h, w, 3) in grey and the query's attention in colour.

    Patches that its block skips are dark.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    (rows, columns), (height, width) = head.view.layout.grid, pixels.shape[:2]
    queries, visible = (x.numpy() for x in head.view.patches())
    figure = Figure((3.6, 3.6 * height / width), dpi=120)
    axes = figure.add_axes((0, 0, 1, 1))
    share = (head.patches() / head.patches().max().clamp(min=1e-30)).numpy()
    heat = colormaps["inferno"](0.25 + 0.75 * share)  # (rows, columns, 4)
    heat[..., 3] = 0.85 * share**0.7
    shade = np.zeros_like(heat)
    shade[..., 3] = 0.6 * ~visible
    grey = np.repeat(0.2 + 0.65 * pixels.numpy().mean(-1, keepdims=True), 3, axis=-1)
    for layer in (grey, heat, shade):
        axes.imshow(layer, extent=(0, columns, rows, 0), aspect="auto", interpolation="nearest")
    fine = np.pad(np.kron(queries, np.ones((8, 8))), 1)  # 8 x 8 samples per patch
    around = (-1 / 16, columns + 1 / 16, -1 / 16, rows + 1 / 16)
    axes.contour(fine, [0.5], colors="white", linewidths=2, extent=around)
    axes.plot(head.query[1] + 0.5, head.query[0] + 0.5, "+", color="white", ms=9, mew=2)
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    axes.set_axis_off()
    return figure
