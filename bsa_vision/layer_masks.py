"""What an attention call asks for its masks: those of one layer of one model under a plan, for the image at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bsa_vision.cache import Cache
from bsa_vision.head_masks import Handled, HeadMasks
from bsa_vision.model_spec import LayerSpec, ModelSpec
from bsa_vision.plan import SparsityPlan
from bsa_vision.prompts import Prompts


class Context:
    """What dynamic patterns follow, shared by the layers of one encoder: the prompts of the images, or None."""

    def __init__(self) -> None:
        self.set(None)

    def set(self, prompts: Sequence[Prompts] | None) -> None:
        self.prompts = None if prompts is None else tuple(prompts)
        self.masks: Cache[HeadMasks] = Cache(256)  # for as long as these prompts hold

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy made inside `bsa.context` has no prompts

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.set(None)


class LayerMasks(Handled):
    """The masks of one layer of one model under a plan, for whatever grid the model is given, and for its prompts."""

    def __init__(self, plan: SparsityPlan, spec: ModelSpec, layer: LayerSpec, context: Context) -> None:
        self.plan, self.spec, self.layer, self.context = plan, spec, layer, context
        self.is_dynamic = plan.is_dynamic(layer.key)
        self._new_handle()

    @property
    def all_dense(self) -> bool:
        """Whether the plan leaves every head of this layer dense, whatever the grid."""
        return all(name == "dense" for name in self.plan.layers.get(self.layer.key, ()))

    def masks_for(self, grid: tuple[int, int]) -> HeadMasks:
        """The HeadMasks of this layer at `grid`; PlanError where a static mask does not fit it.

        ValueError where they follow prompts and there are none, or these lie outside an image of this size.
        """
        key, layout = self.layer.key, self.plan.layout(self.spec, (grid[0], grid[1]))
        if not self.is_dynamic:
            return self.plan.compile(key, layout)
        prompts = self.context.prompts
        if prompts is None:
            raise ValueError(
                f"layer {self.layer.name!r} has a pattern that follows prompts, and there are none: run the model inside "
                "`with bsa.context(model, prompts=...)`, or inside `with bsa.dense(model)`."
            )
        boxes = [one.on_patches(layout.grid, self.spec.patch_size) for one in prompts]
        return self.context.masks.get((key, layout), lambda: self.plan.compile(key, layout, boxes))

    def without_prompts(self, grid: tuple[int, int]) -> HeadMasks:
        """As `masks_for`, with those of the moment if there are any, else of an image without: for trying and for reports."""
        if not self.is_dynamic or self.context.prompts is not None:
            return self.masks_for(grid)
        return self.plan.compile(self.layer.key, self.plan.layout(self.spec, (grid[0], grid[1])))
