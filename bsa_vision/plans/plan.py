"""Sparsity plans: a pattern for every head, compiled to masks for a layout, saved as JSON.

Plans do not depend on model classes: adapters describe a model as a `ModelSpec`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.attention.mask_tensors import DENSE
from bsa_vision.errors import PlanError
from bsa_vision.masks import Pattern, TokenLayout
from bsa_vision.masks.origin import check_layout
from bsa_vision.masks.pattern import is_pattern_name
from bsa_vision.masks.patterns import Box
from bsa_vision.plans import plan_file
from bsa_vision.plans.model_spec import LayerSpec, ModelSpec
from bsa_vision.plans.named_patterns import check_options, lay_out, named
from bsa_vision.plans.pattern_spec import PatternLike, from_spec, to_spec
from bsa_vision.plans.static_mask import Static, static_layers
from bsa_vision.plans.validation import check_fields, check_fit, check_spec, listed, select_layers
from bsa_vision.storage import atomic_write
from bsa_vision.storage.memory_cache import Cache


@dataclass(frozen=True)
class SparsityPlan:
    """A pattern for every head of every layer.

    model       fingerprint of the models this plan is for (`ModelSpec.fingerprint`)
    patterns    name -> pattern; "dense" needs no declaration
    layers      layer key -> one pattern name per head; layers not listed stay dense
    order, tile, block_size  token layout of the masks
    scores      optional, layer key -> one number per head, e.g. measured by a tuner
    notes       any other JSON data, e.g. calibration images, predicted and measured error

    Immutable and hashable; `replace` returns a changed plan. Plans can be pickled if their patterns
    can.
    """

    model: Mapping[str, Any]
    patterns: Mapping[str, PatternLike]
    layers: Mapping[str, tuple[str, ...]]
    order: str = "tile"
    tile: tuple[int, int] = (8, 16)
    block_size: int = 128
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    _masks: Cache[HeadMasks] = field(
        default_factory=lambda: Cache(512), init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        # Checks order, tile and block_size.
        layout = TokenLayout((1, 1), order=self.order, tile=self.tile, block_size=self.block_size)
        layers = {key: tuple(names) for key, names in self.layers.items()}
        object.__setattr__(self, "tile", layout.tile)
        object.__setattr__(self, "layers", layers)
        check_fields(self.model, self.layers, [*self.patterns], [*self.scores, *self.notes])

    def __hash__(self) -> int:
        return hash((frozenset(self.layers.items()), self.order, self.tile, self.block_size))

    # Building

    @classmethod
    def uniform(
        cls,
        spec: ModelSpec,
        pattern: str | PatternLike,
        *,
        dense_heads: int = 0,
        layers: int | str | Iterable[int | str] | None = None,
        order: str = "tile",
        tile: tuple[int, int] = (8, 16),
        block_size: int = 128,
        **params: Any,
    ) -> SparsityPlan:
        """Build a plan with the same pattern for all heads but the first `dense_heads` per layer.

        layers  indices, keys or module paths; None = all global layers
        """
        check_spec(spec)
        check_options(pattern, params, ("dense_heads", "layers", "order", "tile", "block_size"))
        if layers is not None:
            layers = [
                spec.find(x).key if isinstance(x, str) and not x.isdecimal() else x
                for x in listed("layers", layers)
            ]
        dense = {layer.key: ("dense",) * layer.heads for layer in spec.layers}
        plan = cls(spec.fingerprint, {}, dense, order, tile, block_size)
        heads = spec.layers[0].heads
        if not isinstance(dense_heads, int) or not 0 <= dense_heads <= heads:
            raise PlanError(
                f"dense_heads={dense_heads!r}: the model has {heads} heads; expected an integer "
                f"from 0 to {heads}."
            )
        if dense_heads == heads:
            pattern, params, dense_heads = "dense", {}, 0
        if layers is None and pattern != "dense":
            layers = [layer.key for layer in spec.layers if not layer.window]
            if not layers:
                raise PlanError(
                    f"all {len(spec.layers)} layers of this model attend within windows, which "
                    "stay dense: a pattern needs a layer that attends to the whole image."
                )
        plan = plan.replace(
            layers=layers, heads=range(dense_heads, heads), pattern=pattern, **params
        )
        plan.check(spec)
        return plan

    @classmethod
    def from_head_masks(cls, spec: ModelSpec, head_masks: Mapping[str, HeadMasks]) -> SparsityPlan:
        """Build a plan of static masks from HeadMasks, by layer (module path or key).

        HeadMasks without a layout apply to tokens in raster order at the spec's grid; pass
        `inspect(model, image_size=...)` for another grid. All must share order and block size, and
        be equal across the batch.
        """
        check_spec(spec)
        patterns, layers, layout = static_layers(spec, head_masks)
        order = (layout.order, layout.tile, layout.block_size)
        return cls(spec.fingerprint, patterns, layers, *order)

    def replace(
        self,
        *,
        layers: int | str | Iterable[int | str] | None = None,
        heads: int | Iterable[int] | None = None,
        pattern: str | PatternLike,
        **params: Any,
    ) -> SparsityPlan:
        """Return this plan with another pattern for some heads.

        layers   indices or keys; None = all layers
        heads    indices; None = all heads
        pattern  a name of `masks.PATTERNS` with its parameters, the name of a pattern of this plan,
                 a `masks.Pattern`, or any function layout -> (R, C) bool
        """
        check_options(pattern, params, ("layers", "heads"))
        name, chosen = named(pattern, params, self.patterns)
        keys = select_layers(self.layers, layers)
        every = range(self.model["heads"])
        wanted = set(every) if heads is None else set(listed("heads", heads))
        if not wanted or not wanted <= set(every):
            raise PlanError(
                f"heads={list(wanted)} match no head: the model has heads 0 to "
                f"{self.model['heads'] - 1}."
            )
        changed = {
            key: tuple(name if head in wanted else old for head, old in enumerate(names))
            if key in keys
            else names
            for key, names in self.layers.items()
        }
        patterns = {**self.patterns, name: chosen} if chosen is not None else dict(self.patterns)
        used = {used for names in changed.values() for used in names}
        patterns = {key: value for key, value in patterns.items() if key in used}
        return replace(self, patterns=patterns, layers=changed)

    def freeze(self, layout: TokenLayout) -> SparsityPlan:
        """Return this plan with every pattern replaced by its static mask for `layout`.

        Plans with Python functions can then be saved.
        """
        named: dict[Static, str] = {}
        layers = {}
        for key in self.layers:
            if self.is_dynamic(key):
                raise PlanError(
                    f"layer {key!r} has a pattern that follows prompts: only patterns that are the "
                    "same for every image can be frozen; replace it first."
                )
            if key.startswith("mem_cross.") and set(self.layers[key]) != {"dense"}:
                raise PlanError(
                    f"layer {key!r} attends to remembered frames, whose number changes: only masks "
                    "of one size can be frozen; make it dense first."
                )
            masks = self.compile(key, layout)
            blocks = masks.block_mask(layout.num_tokens, layout.num_tokens)[0]
            layers[key] = tuple(
                "dense"
                if kind == DENSE
                else named.setdefault(Static(blocks[head], layout), f"{key}/{head}")
                for head, kind in enumerate(masks.slices)
            )
        patterns = {name: static for static, name in named.items()}
        return replace(self, patterns=patterns, layers=layers)

    # Use

    @property
    def report(self) -> dict[str, Any]:
        """Results of `bsa.tune`, as `bsa_vision.tuning.report_data` describes; empty without it."""
        return dict(self.notes.get("tuned", {}))

    def layout(self, spec: ModelSpec, grid: tuple[int, int] | None = None) -> TokenLayout:
        """Return the layout of the plan's masks for `spec` at `grid` (None = the model's own)."""
        check_spec(spec)
        return TokenLayout(
            spec.grid if grid is None else grid,
            num_prefix_tokens=spec.num_prefix_tokens,
            num_suffix_tokens=spec.num_suffix_tokens,
            order=self.order,
            tile=self.tile,
            block_size=self.block_size,
        )

    def key_layout(
        self, layer: LayerSpec, layout: TokenLayout, num_keys: int | None = None
    ) -> TokenLayout | None:
        """Return the key layout of a layer that attends to remembered frames, else None.

        layout    layout of the queries; each frame has its token order
        num_keys  number of keys in memory at present, pointer tokens last; None = a full memory,
                  `layer.frames` and `layer.pointers`
        """
        if not layer.frames:
            return None
        frames, pointers = layer.frames, layer.pointers
        if num_keys is not None:
            frames, pointers = divmod(num_keys, layout.grid[0] * layout.grid[1])
        return replace(layout, num_prefix_tokens=0, frames=frames, num_suffix_tokens=pointers)

    def compile(
        self,
        layer: str,
        layout: TokenLayout,
        prompts: Sequence[Sequence[Box]] = ((),),
        keys: TokenLayout | None = None,
    ) -> HeadMasks:
        """Compile the masks of one layer (its key) for one layout.

        prompts  boxes in patches, for each image; only dynamic patterns use them. The default is
                 one image without prompts. `bsa.context` supplies them to a model
        keys     layout of remembered frames (`key_layout`); None = the layout of the queries

        Special rows and columns are always kept. A head whose pattern keeps every block becomes
        dense, which computes the same function. Results are cached unless the layer is dynamic.
        """
        check_layout("layout", layout)
        if layer not in self.layers:
            raise PlanError(f"no layer {layer!r} in this plan: it has {', '.join(self.layers)}.")
        if self.is_dynamic(layer):
            return self._compile(layer, layout, prompts, keys)
        return self._masks.get(
            (layer, layout, keys), lambda: self._compile(layer, layout, ((),), keys)
        )

    def is_dynamic(self, layer: str) -> bool:
        """Return True if a head of this layer (its key) has a pattern that follows prompts."""
        patterns = {self.patterns.get(name) for name in self.layers.get(layer, ())}
        return any(isinstance(pattern, Pattern) and pattern.is_dynamic for pattern in patterns)

    def sparsity(self, layout: TokenLayout) -> float:
        """Return the realised sparsity, 0 to 1, over all heads and blocks, dense heads included.

        Remembered keys count as one frame.
        """
        check_layout("layout", layout)
        one_frame = replace(layout, num_prefix_tokens=0, num_suffix_tokens=0)
        total = 0.0
        for key in self.layers:
            keys = one_frame if key.startswith("mem_cross.") else None
            total += self.compile(key, layout, keys=keys).sparsity
        return total / self.model["depth"]

    def complete(self, spec: ModelSpec) -> SparsityPlan:
        """Return this plan with every layer of `spec` listed; missing layers become dense."""
        check_spec(spec)
        dense = {layer.key: ("dense",) * layer.heads for layer in spec.layers}
        return replace(self, layers={**dense, **self.layers})

    def check(self, spec: ModelSpec) -> None:
        """Raise PlanError unless this plan fits models like `spec`."""
        check_spec(spec)
        check_fit(self.model, self.layers, spec)

    # Files

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data; PlanError if a pattern is a Python function."""
        layout = {"order": self.order, "tile": list(self.tile), "block_size": self.block_size}
        return {
            "model": dict(self.model),
            "layout": layout,
            "patterns": {name: to_spec(name, pattern) for name, pattern in self.patterns.items()},
            "layers": dict(self.layers),
            "scores": dict(self.scores),
            "notes": dict(self.notes),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparsityPlan:
        """Build a plan from data of `to_dict`; PlanError if its parts do not fit together."""
        layout = data["layout"]
        try:
            return cls(
                data["model"],
                {name: from_spec(name, spec) for name, spec in data["patterns"].items()},
                {key: tuple(names) for key, names in data["layers"].items()},
                layout["order"],
                tuple(layout["tile"]),
                layout["block_size"],
                {key: tuple(values) for key, values in data["scores"].items()},
                data["notes"],
            )
        except PlanError:
            raise
        except (ValueError, TypeError, OverflowError) as error:
            raise PlanError(f"{error} The file is damaged or was edited incorrectly.") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; an existing file is replaced once the new one is complete.

        PlanError if a pattern is a Python function, which no file can hold.
        """
        text = plan_file.dumps(self.to_dict())
        self.from_dict(plan_file.loads(text))  # never replace a file by one that cannot be read
        atomic_write.write(path, text.encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparsityPlan:
        """Read a plan written by `save`; PlanError for a damaged file."""
        data = Path(path).read_bytes()
        try:
            return cls.from_dict(plan_file.loads(data))
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None

    def _compile(
        self,
        layer: str,
        layout: TokenLayout,
        prompts: Sequence[Sequence[Box]],
        keys: TokenLayout | None,
    ) -> HeadMasks:
        heads = self.model["heads"]

        def mask(head: int, name: str) -> str | torch.Tensor:
            """Return "dense" or the head's (images, R, C) mask."""
            if name == "dense":
                return name
            pattern, where = self.patterns[name], (layer, head)
            return torch.stack(
                [lay_out(name, pattern, where, heads, layout, boxes, keys) for boxes in prompts]
            )

        masks = [mask(head, name) for head, name in enumerate(self.layers[layer])]
        try:
            return HeadMasks.from_patterns(layout, masks, kv_layout=keys)
        except ValueError as error:
            raise PlanError(f"layer {layer!r} of the plan: {error}") from None

    def __str__(self) -> str:
        model = ", ".join(f"{key} {value}" for key, value in self.model.items())
        lines = [f"SparsityPlan for {model}; order {self.order}"]
        for key, names in self.layers.items():
            counts = (f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
            lines.append(f"  {key:<9}" + ", ".join(counts))
        return "\n".join(lines)


def as_plan(plan: object) -> SparsityPlan:
    """Return `plan` itself, or load it if it is a path.

    Raises TypeError for other types and FileNotFoundError for a missing file.
    """
    if isinstance(plan, SparsityPlan):
        return plan
    if isinstance(plan, (str, os.PathLike)):
        if not os.path.exists(plan):
            hint = f"; for a pattern use bsa.uniform_plan(model, {plan!r})"
            raise FileNotFoundError(
                f"plan={os.fspath(plan)!r}: no such file; pass a SparsityPlan or the path of a "
                f"saved one{hint if is_pattern_name(plan) else ''}."
            )
        return SparsityPlan.load(plan)
    how = "make one with bsa.uniform_plan(model, ...), or read one with bsa.SparsityPlan.load(path)"
    values = list(plan.values()) if isinstance(plan, Mapping) else [plan]
    if values and all(isinstance(masks, HeadMasks) for masks in values):
        how = "for masks use bsa.SparsityPlan.from_head_masks(bsa.inspect(model), {layer: masks})"
    elif isinstance(plan, nn.Module):
        how = "the model comes first"
    elif isinstance(plan, Pattern):
        how = "make one with bsa.uniform_plan(model, pattern)"
    raise TypeError(
        f"plan is a {type(plan).__name__}: expected a SparsityPlan or the path of one; {how}."
    )
