"""Masks of one layer of a model under a plan, compiled for the grid and prompts of each call."""

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
    """Identity of one encoder, under which its dynamic patterns find their prompts.

    The caller of the model enters and leaves prompts; other threads and tasks do not see them.
    """

    @property
    def entry(self) -> Entry | None:
        """The entry that this thread or task opened last and has not left yet."""
        return next((entry for entry in reversed(_open.get()) if self in entry.contexts), None)


@dataclass(frozen=True, eq=False)
class Entry:
    """Prompts of one `bsa.context`, the encoders they apply to, and the masks compiled for them.

    each  True: one `Prompts` per image of the batch; False: one for all images
    """

    contexts: tuple[Context, ...]
    prompts: tuple[Prompts, ...]
    each: bool
    masks: Cache[HeadMasks] = field(default_factory=lambda: Cache(256))

    def enter(self) -> None:
        _open.set((*_open.get(), self))

    def leave(self) -> None:
        # Compare by identity: generators may leave in another order than they entered.
        _open.set(tuple(entry for entry in _open.get() if entry is not self))

    def check_batch(self, images: int) -> None:
        if self.each and len(self.prompts) != images:
            raise ValueError(
                f"prompts for {len(self.prompts)} images, but the batch has {images}: expected "
                "a list with one bsa.Prompts per image, or a single bsa.Prompts for all images."
            )


# A new thread starts without entries; a new task copies those of its creator.
_open: ContextVar[tuple[Entry, ...]] = ContextVar("bsa_vision_prompts", default=())


class LayerMasks(MaskSource):
    """Masks of one layer under a plan, for any grid and for the current prompts."""

    def __init__(
        self, plan: SparsityPlan, spec: ModelSpec, layer: LayerSpec, context: Context
    ) -> None:
        self.plan, self.spec, self.layer, self.context = plan, spec, layer, context
        self.is_dynamic = plan.is_dynamic(layer.key)
        self._masks: Cache[HeadMasks] = Cache(64)
        self._new_handle()

    @property
    def all_dense(self) -> bool:
        """True if the plan keeps every head of this layer dense at any grid."""
        return all(name == "dense" for name in self.plan.layers.get(self.layer.key, ()))

    def masks_for(self, grid: tuple[int, int], num_keys: int | None = None) -> HeadMasks:
        """Return the HeadMasks of this layer at `grid`.

        num_keys  number of remembered keys; None = a full memory

        Raises PlanError if a static mask does not fit. Raises ValueError if a pattern follows
        prompts and there are none, or they lie outside an image of this size.
        """
        key = (grid[0], grid[1]), num_keys
        if not self.is_dynamic:
            return self._masks.get(key, lambda: self._compile(*key))
        entry = self.context.entry
        if entry is None:
            raise ValueError(
                f"layer {self.layer.name!r} has a pattern that follows prompts, and there are "
                "none: run the model inside `with bsa.context(model, prompts=...)` or inside "
                "`with bsa.dense(model)`."
            )
        return entry.masks.get((self, *key), lambda: self._compile(*key, entry.prompts))

    def without_prompts(self, grid: tuple[int, int]) -> HeadMasks:
        """Return the masks at `grid`, for an image without prompts if no prompts are entered.

        Used by reports and trial runs, which must not fail for lack of prompts.
        """
        if not self.is_dynamic or self.context.entry is not None:
            return self.masks_for(grid)
        return self._compile((grid[0], grid[1]), None)

    def _compile(
        self, grid: tuple[int, int], num_keys: int | None, prompts: Iterable[Prompts] = ()
    ) -> HeadMasks:
        layout = self.plan.layout(self.spec, grid)
        boxes = [prompt.on_patches(layout.grid, self.spec.patch_size) for prompt in prompts]
        keys = self.plan.key_layout(self.layer, layout, num_keys)
        return self.plan.compile(self.layer.key, layout, boxes or [()], keys)


@carry.register
def _(source: LayerMasks, grid: tuple[int, int], num_keys: int) -> bytes:
    """Store the masks of a fixed grid, or the patterns if the grid is symbolic."""
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
            f"layer {source.layer.name!r}: a program with a dynamic image size stores patterns "
            f"instead of masks, and {error} Or export it for one size."
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
