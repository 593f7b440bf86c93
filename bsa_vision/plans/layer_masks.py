"""What an attention call asks for its masks: those of one layer of one model under a plan, for the image at hand."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bsa_vision.attention.carried_masks import READERS, carry, encode, is_symbolic
from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.attention.mask_source import MaskSource
from bsa_vision.errors import PlanError
from bsa_vision.plans import plan_file
from bsa_vision.plans.model_spec import LayerSpec, ModelSpec
from bsa_vision.plans.plan import SparsityPlan
from bsa_vision.plans.prompts import Prompts
from bsa_vision.storage.memory_cache import Cache


class Context:
    """What the dynamic patterns of one encoder follow. Prompts are entered and left by whoever calls the model, and nobody else sees them."""

    @property
    def entry(self) -> Entry | None:
        """What was entered last in this thread (or task), and not left yet."""
        return next((entry for entry in reversed(_open.get()) if self in entry.contexts), None)


@dataclass(frozen=True, eq=False)
class Entry:
    """The prompts of one `bsa.context`, the encoders they are for, and the masks made for them.

    each  one for each image of the batch; False: one for all
    """

    contexts: tuple[Context, ...]
    prompts: tuple[Prompts, ...]
    each: bool
    masks: Cache[HeadMasks] = field(default_factory=lambda: Cache(256))

    def enter(self) -> None:
        _open.set((*_open.get(), self))

    def leave(self) -> None:
        # By identity: generators may leave in another order than they entered.
        _open.set(tuple(entry for entry in _open.get() if entry is not self))

    def check_batch(self, images: int) -> None:
        if self.each and len(self.prompts) != images:
            raise ValueError(
                f"prompts for {len(self.prompts)} images, the batch has {images}: a list has one bsa.Prompts for each image, and a single "
                "bsa.Prompts serves all; give as many as images."
            )


# Threads start with none, tasks with those of who made them.
_open: ContextVar[tuple[Entry, ...]] = ContextVar("bsa_vision_prompts", default=())


class LayerMasks(MaskSource):
    """The masks of one layer of one model under a plan, for whatever grid the model is given, and for its prompts."""

    def __init__(
        self, plan: SparsityPlan, spec: ModelSpec, layer: LayerSpec, context: Context
    ) -> None:
        self.plan, self.spec, self.layer, self.context = plan, spec, layer, context
        self.is_dynamic = plan.is_dynamic(layer.key)
        self._masks: Cache[HeadMasks] = Cache(64)
        self._new_handle()

    @property
    def all_dense(self) -> bool:
        """Whether the plan leaves every head of this layer dense, whatever the grid."""
        return all(name == "dense" for name in self.plan.layers.get(self.layer.key, ()))

    def masks_for(self, grid: tuple[int, int], num_keys: int | None = None) -> HeadMasks:
        """The HeadMasks of this layer at `grid`, for so many remembered keys (None = a full memory); PlanError where a static mask does not fit.

        ValueError where they follow prompts and there are none, or these lie outside an image of this size.
        """
        asked = (grid[0], grid[1]), num_keys
        if not self.is_dynamic:
            return self._masks.get(asked, lambda: self._compile(*asked))
        entry = self.context.entry
        if entry is None:
            raise ValueError(
                f"layer {self.layer.name!r} has a pattern that follows prompts, and there are none: run the model inside "
                "`with bsa.context(model, prompts=...)`, or inside `with bsa.dense(model)`."
            )
        return entry.masks.get((self, *asked), lambda: self._compile(*asked, entry.prompts))

    def without_prompts(self, grid: tuple[int, int]) -> HeadMasks:
        """As `masks_for`, with those of the moment if there are any, else of an image without: for trying and for reports."""
        if not self.is_dynamic or self.context.entry is not None:
            return self.masks_for(grid)
        return self._compile((grid[0], grid[1]), None)

    def _compile(
        self, grid: tuple[int, int], num_keys: int | None, prompts: Iterable[Prompts] = ()
    ) -> HeadMasks:
        layout = self.plan.layout(self.spec, grid)
        boxes = [one.on_patches(layout.grid, self.spec.patch_size) for one in prompts] or [()]
        keys = self.plan.key_layout(self.layer, layout, num_keys)
        return self.plan.compile(self.layer.key, layout, boxes, keys)


@carry.register
def _(source: LayerMasks, grid: tuple[int, int], num_keys: int) -> bytes:
    """Store the masks of one grid, or, where the grid may change, the patterns that make them."""
    if not is_symbolic(grid):
        return carry(source.masks_for(grid, num_keys), grid, num_keys)
    key = source.layer.key
    names = source.plan.layers[key]
    used = {name: pattern for name, pattern in source.plan.patterns.items() if name in names}
    plan = replace(source.plan, layers={key: names}, patterns=used, scores={}, notes={})
    spec = replace(source.spec, layers=(source.layer,), others=())
    try:
        text = plan_file.dumps(plan.to_dict())
    except PlanError as error:
        raise PlanError(
            f"layer {source.layer.name!r}: a program whose image size may change carries patterns, not masks, and {error} "
            "Or export it for one size."
        ) from None
    return encode("layer", {"spec": asdict(spec), "plan": text})


def _layer(header: dict[str, Any], payload: bytes) -> LayerMasks:
    fields = header["spec"]
    pairs = {name: tuple(fields[name]) for name in ("grid", "patch_size", "others")}
    layer = LayerSpec(**fields["layers"][0])
    spec = ModelSpec(**{**fields, **pairs, "layers": (layer,)})
    plan = SparsityPlan.from_dict(plan_file.loads(header["plan"]))
    return LayerMasks(plan, spec, layer, Context())


READERS["layer"] = _layer
