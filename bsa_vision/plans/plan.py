"""Which head uses which pattern: plans as plain data, compiled to masks for a layout, saved as JSON.

Knows no model: an adapter describes one as a `ModelSpec`, and a plan says what its layers do.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bsa_vision.attention.head_masks import DENSE, HeadMasks, instead_of_masks
from bsa_vision.attention.head_patterns import BlockMaskFn, check_blocks, with_special
from bsa_vision.errors import PlanError, nearest
from bsa_vision.masks import PATTERNS, Pattern, TokenLayout
from bsa_vision.masks.origin import check_layout
from bsa_vision.masks.patterns import Box, is_pattern_name, parameters
from bsa_vision.plans.model_spec import LayerSpec, ModelSpec
from bsa_vision.plans.static_mask import Static, static_heads
from bsa_vision.storage.memory_cache import Cache

if TYPE_CHECKING:
    from bsa_vision.measure.latency import Latency

PatternLike = Pattern | Static | BlockMaskFn


@dataclass(frozen=True)
class SparsityPlan:
    """Per layer, per head: which pattern.

    model       the fingerprint of the models this plan is for (`ModelSpec.fingerprint`)
    patterns    name -> pattern; "dense" is always there
    layers      layer key -> one pattern name per head; layers not named stay as they are, dense
    order, tile, block_size   the token layout that masks are made in
    scores      optional, layer key -> one number per head, e.g. what a tuner measured
    notes       anything else worth keeping: what it was tuned on, predicted and measured error

    Immutable: `replace` returns a changed plan. Frozen, comparable; picklable when its patterns are.
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
        layout = TokenLayout(
            (1, 1), order=self.order, tile=self.tile, block_size=self.block_size
        )  # checks the three
        object.__setattr__(self, "tile", layout.tile)
        object.__setattr__(
            self, "layers", {key: tuple(names) for key, names in self.layers.items()}
        )
        missing = [key for key in ("family", "depth", "heads", "head_dim") if key not in self.model]
        if missing or not self.layers:
            raise PlanError(
                f"a plan for model={dict(self.model)} with {len(self.layers)} layers: family, depth, heads, head_dim and at least "
                "one layer are needed; start from uniform_plan or dense_plan."
            )
        keys = [*self.patterns, *self.layers, *self.scores, *self.notes]
        if "dense" in self.patterns or not all(isinstance(key, str) for key in keys):
            raise PlanError(
                f"patterns={list(self.patterns)}, notes={list(self.notes)}: names must be strings, and 'dense' always means every "
                "block; rename the pattern."
            )
        for key, names in self.layers.items():
            role, _, index = key.rpartition(".")
            known = (
                index.isascii()
                and index.isdecimal()
                and str(int(index)) == index
                and int(index) < self.model["depth"]
            )
            if not role or not known:
                raise PlanError(
                    f"layer {key!r} is not one of {self.model['depth']} layers: keys are role and index, 'self.0' to "
                    f"'self.{self.model['depth'] - 1}'; correct it."
                )
            if len(names) != self.model["heads"]:
                raise PlanError(
                    f"layer {key!r} names {len(names)} heads, the model has {self.model['heads']}: give one pattern name per head."
                )
            for name in names:
                if name != "dense" and name not in self.patterns:
                    raise PlanError(
                        f"layer {key!r} uses pattern {name!r}, which is not declared: declared are "
                        f"{', '.join(['dense', *self.patterns])}; declare it under patterns."
                    )

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
        """The same pattern for all heads but the first `dense_heads`, in all global layers or these: indices, keys or module paths."""
        _check_spec(spec)
        _check_options(pattern, params, ("dense_heads", "layers", "order", "tile", "block_size"))
        if layers is not None:
            wanted = _listed("layers", layers)
            layers = [
                spec.find(x).key if isinstance(x, str) and not x.isdecimal() else x for x in wanted
            ]
        dense = {layer.key: ("dense",) * layer.heads for layer in spec.layers}
        plan = cls(spec.fingerprint, {}, dense, order, tile, block_size)
        heads = spec.layers[0].heads
        if not isinstance(dense_heads, int) or not 0 <= dense_heads <= heads:
            raise PlanError(
                f"dense_heads={dense_heads!r}: the model has {heads} heads; give a whole number from 0 to {heads}."
            )
        if dense_heads == heads:
            pattern, params, dense_heads = "dense", {}, 0
        if layers is None and pattern != "dense":
            layers = [layer.key for layer in spec.layers if not layer.window]
            if not layers:
                raise PlanError(
                    f"all {len(spec.layers)} layers of this model attend within windows, which stay dense: a pattern needs a layer that "
                    "attends to the whole image; this model has nothing to make sparse."
                )
        plan = plan.replace(
            layers=layers, heads=range(dense_heads, heads), pattern=pattern, **params
        )
        plan.check(spec)
        return plan

    @classmethod
    def from_head_masks(cls, spec: ModelSpec, head_masks: Mapping[str, HeadMasks]) -> SparsityPlan:
        """Masks made by hand or by a generator, by layer (module path or key), as a plan of static masks.

        A HeadMasks without a layout is for tokens as they come at the spec's own grid; pass `inspect(model, image_size=...)`
        for another. All must share order and block size, and be equal across the batch.
        """
        _check_spec(spec)
        if not isinstance(head_masks, Mapping):
            raise TypeError(
                f"head_masks is a {type(head_masks).__name__}: expected {{layer name: HeadMasks}}; name the layer each is for."
            )
        if not head_masks:
            raise PlanError(
                "from_head_masks got no masks: give at least one, {layer name: HeadMasks}."
            )
        patterns: dict[str, PatternLike] = {}
        layers = {layer.key: ("dense",) * layer.heads for layer in spec.layers}
        layouts = {}
        for name, masks in head_masks.items():
            layer = spec.find(name)
            if not isinstance(masks, HeadMasks):
                raise TypeError(
                    f"layer {name!r} has a {type(masks).__name__}: expected HeadMasks; {instead_of_masks(masks)}."
                )
            layout = masks.layout or TokenLayout(
                spec.grid, start=spec.start, end=spec.end, block_size=masks.block_size
            )
            if (
                masks.layout is None
                and masks.made_for is not None
                and not masks.made_for[0].is_identity
            ):
                raise PlanError(
                    f"layer {layer.name!r}: its masks were made for {masks.made_for[0]}, its HeadMasks has no layout; pass layout= to "
                    "HeadMasks, or make them with HeadMasks.from_patterns."
                )
            names = static_heads(layer, masks, layout)
            patterns.update({key: pattern for key, pattern in names if pattern is not None})
            layers[layer.key] = tuple(key for key, _ in names)
            layouts[layer.name] = layout
        first = next(iter(layouts.values()))
        for name, layout in layouts.items():
            if (layout.order, layout.tile, layout.block_size) != (
                first.order,
                first.tile,
                first.block_size,
            ):
                raise PlanError(
                    f"layer {name!r} has {layout}, others {first}: one plan has one order and block size; rebuild one."
                )
        return cls(spec.fingerprint, patterns, layers, first.order, first.tile, first.block_size)

    def replace(
        self,
        *,
        layers: int | str | Iterable[int | str] | None = None,
        heads: int | Iterable[int] | None = None,
        pattern: str | PatternLike,
        **params: Any,
    ) -> SparsityPlan:
        """This plan with other heads: the given heads (None = all) of the given layers (indices or keys; None = all).

        pattern  a name of `masks.PATTERNS` with its parameters, the name of a pattern of this plan, a `masks.Pattern`,
                 or any function layout -> (R, C) bool
        """
        _check_options(pattern, params, ("layers", "heads"))
        name, chosen = self._named(pattern, params)
        keys = self._select(layers)
        every = range(self.model["heads"])
        wanted = set(every) if heads is None else set(_listed("heads", heads))
        if not wanted or not wanted <= set(every):
            raise PlanError(
                f"heads={list(wanted)} match no head: the model has heads 0 to {self.model['heads'] - 1}; choose among them."
            )
        changed = {
            key: tuple(name if head in wanted else old for head, old in enumerate(names))
            if key in keys
            else names
            for key, names in self.layers.items()
        }
        patterns = {**self.patterns, name: chosen} if chosen is not None else dict(self.patterns)
        used = {used for names in changed.values() for used in names}
        return replace(
            self,
            patterns={key: value for key, value in patterns.items() if key in used},
            layers=changed,
        )

    def freeze(self, layout: TokenLayout) -> SparsityPlan:
        """This plan with every pattern laid out for `layout`: what was a Python function can then be saved."""
        named: dict[Static, str] = {}
        layers = {}
        for key in self.layers:
            if self.is_dynamic(key):
                raise PlanError(
                    f"layer {key!r} has a pattern that follows prompts: only what is the same for every image can be frozen; replace it."
                )
            if key.startswith("mem_cross.") and set(self.layers[key]) != {"dense"}:
                raise PlanError(
                    f"layer {key!r} attends to remembered frames, whose number grows: only what has one size can be frozen; make it dense first."
                )
            masks = self.compile(key, layout)
            blocks = masks.block_mask(layout.num_tokens, layout.num_tokens)[0]
            layers[key] = tuple(
                "dense"
                if kind == DENSE
                else named.setdefault(Static(blocks[head], layout), f"{key}/{head}")
                for head, kind in enumerate(masks.slices)
            )
        return replace(
            self, patterns={name: static for static, name in named.items()}, layers=layers
        )

    def prune(
        self,
        spec: ModelSpec,
        *,
        grid: tuple[int, int] | None = None,
        images: int = 1,
        min_gain: float = 0.05,
        latency: Latency | None = None,
    ) -> SparsityPlan:
        """This plan with the heads made dense that save less than `min_gain` of a dense head's time on this machine.

        spec      of the model: `bsa.inspect(model)`
        grid      (h, w) patches of the inputs to come, None = the model's own; images per call
        latency   what attention costs here; None = `bsa.latency(head_dim)`: float32 on the CPU, measured once

        A layer whose whole call would save less than that becomes dense altogether. What was made dense, and for which
        machine, is in the notes.
        """
        from bsa_vision.measure.latency import latency as here
        from bsa_vision.plans.prune import prune

        return prune(self, spec, latency or here(self.model["head_dim"]), grid, images, min_gain)

    def _named(
        self, pattern: str | PatternLike, params: Mapping[str, Any]
    ) -> tuple[str, PatternLike | None]:
        """The name to write into the layers, and the pattern to declare under it (None: declared already)."""
        if isinstance(pattern, str):
            if pattern == "dense" or (pattern in self.patterns and not params):
                if params:
                    raise PlanError(
                        f"pattern 'dense' has no parameters, got {', '.join(params)}; remove them."
                    )
                return pattern, None
            try:
                pattern = Pattern(pattern, **params)
            except ValueError as error:
                raise PlanError(str(error)) from None
            return repr(pattern), pattern
        if params:
            raise PlanError(
                f"{pattern!r} takes no further parameters, got {', '.join(params)}; remove them."
            )
        if not callable(pattern):
            given = (
                f"is a {type(pattern).__name__}"
                if isinstance(pattern, (Tensor, HeadMasks))
                else f"={pattern!r}"
            )
            raise PlanError(
                f"pattern{' ' if given.startswith('is') else ''}{given}: expected a name, a Pattern, or a function layout -> (R, C) bool; "
                f"pass one{_instead_of_pattern(pattern)}."
            )
        name = repr(pattern)
        if not isinstance(pattern, (Pattern, Static)):
            name = getattr(pattern, "__name__", name)
            name = f"{name} (function)" if name in PATTERNS else name
        taken, base = self.patterns.get(name), name
        for number in range(2, len(self.patterns) + 3):
            if taken is None or taken == pattern:
                break
            name = f"{base} ({number})"
            taken = self.patterns.get(name)
        return name, pattern

    def _select(self, layers: int | str | Iterable[int | str] | None) -> set[str]:
        if layers is None:
            return set(self.layers)
        wanted = _listed("layers", layers)
        keys = {
            key
            for key in self.layers
            for layer in wanted
            if key == layer or key.rpartition(".")[2] == str(layer)
        }
        missing = [
            layer
            for layer in wanted
            if not any(key == layer or key.rpartition(".")[2] == str(layer) for key in keys)
        ]
        if missing or not wanted:
            raise PlanError(
                f"layers {missing or wanted} match nothing: the plan has {', '.join(self.layers)}{nearest(str((missing or [''])[0]), self.layers)}; "
                "choose among them."
            )
        return keys

    # Use

    @property
    def report(self) -> dict[str, Any]:
        """What `bsa.tune` predicted and measured (`bsa_vision.tuning.report_data.describe` says what is in it); empty for other plans."""
        return dict(self.notes.get("tuned", {}))

    def layout(self, spec: ModelSpec, grid: tuple[int, int] | None = None) -> TokenLayout:
        """The layout of the plan's masks for `spec` at `grid` (None = the model's own)."""
        _check_spec(spec)
        return TokenLayout(
            spec.grid if grid is None else grid,
            start=spec.start,
            end=spec.end,
            order=self.order,
            tile=self.tile,
            block_size=self.block_size,
        )

    def key_layout(
        self, layer: LayerSpec, layout: TokenLayout, num_keys: int | None = None
    ) -> TokenLayout | None:
        """The layout of the keys of a layer that attends to remembered frames, each in the order of `layout`; None for other layers.

        num_keys  what is remembered at the moment, pointer tokens last; None = `layer.frames` and `layer.pointers`, a full memory
        """
        if not layer.frames:
            return None
        frames, pointers = (
            (layer.frames, layer.pointers)
            if num_keys is None
            else divmod(num_keys, layout.grid[0] * layout.grid[1])
        )
        return replace(layout, start=0, frames=frames, end=pointers)

    def compile(
        self,
        layer: str,
        layout: TokenLayout,
        prompts: Sequence[Sequence[Box]] = ((),),
        keys: TokenLayout | None = None,
    ) -> HeadMasks:
        """The masks of one layer (its key) for one layout. Special rows and columns are always kept.

        prompts  where the prompts of each image are, boxes in patches; looked at by dynamic patterns only. The default is one image
                 without any. A model gets them from `bsa.context`
        keys     the layout of the keys where they are remembered frames (`key_layout`); None = the queries' own

        Cached, unless the layer is dynamic. A head whose pattern keeps every block becomes dense, which is the same function.
        """
        check_layout("layout", layout)
        if layer not in self.layers:
            raise PlanError(
                f"no layer {layer!r} in this plan: it has {', '.join(self.layers)}; use one of these keys."
            )
        if self.is_dynamic(layer):
            return self._compile(layer, layout, prompts, keys)
        return self._masks.get(
            (layer, layout, keys), lambda: self._compile(layer, layout, ((),), keys)
        )

    def is_dynamic(self, layer: str) -> bool:
        """Whether a head of this layer (its key) has a pattern that follows prompts."""
        patterns = {self.patterns.get(name) for name in self.layers.get(layer, ())}
        return any(isinstance(pattern, Pattern) and pattern.is_dynamic for pattern in patterns)

    def sparsity(self, layout: TokenLayout) -> float:
        """Realised sparsity over all heads and blocks of the model, dense ones included, 0 to 1. What is remembered counts as one frame."""
        check_layout("layout", layout)
        one_frame = replace(layout, start=0, end=0)
        per_layer = [
            self.compile(
                key, layout, keys=one_frame if key.startswith("mem_cross.") else None
            ).sparsity
            for key in self.layers
        ]
        return sum(per_layer) / self.model["depth"]

    def complete(self, spec: ModelSpec) -> SparsityPlan:
        """This plan with every layer of `spec` named: those it does not mention are dense."""
        _check_spec(spec)
        dense = {layer.key: ("dense",) * layer.heads for layer in spec.layers}
        return replace(self, layers={**dense, **self.layers})

    def check(self, spec: ModelSpec) -> None:
        """Raise PlanError unless this plan is for models like `spec`."""
        _check_spec(spec)
        wrong = {
            key: (self.model.get(key), value)
            for key, value in spec.fingerprint.items()
            if self.model.get(key) != value
        }
        if wrong:
            said = "; ".join(
                f"{key}: plan {plan!r}, model {model!r}" for key, (plan, model) in wrong.items()
            )
            raise PlanError(
                f"this plan is for another model ({said}): all of these must agree; make a plan for this model."
            )
        keys = {layer.key for layer in spec.layers}
        unknown = [key for key in self.layers if key not in keys]
        if unknown:
            raise PlanError(
                f"the plan names layers {unknown}, the model has {sorted(keys)}: remove or rename them."
            )
        for layer in spec.layers:
            sparse = sorted({name for name in self.layers.get(layer.key, ()) if name != "dense"})
            if layer.window and sparse:
                raise PlanError(
                    f"layer {layer.key!r} attends within windows of {layer.window} x {layer.window} patches, the plan gives it "
                    f"{', '.join(sparse)}: windowed layers stay dense; leave them out, or name only global layers: "
                    f"{', '.join(other.key for other in spec.layers if not other.window)}."
                )

    def save(self, path: Any) -> None:
        """Write the plan as JSON; an existing file is replaced only once the new one is complete."""
        from bsa_vision.plans.plan_file import save

        save(self, path)

    @staticmethod
    def load(path: Any) -> SparsityPlan:
        """Read a plan written by `save`. PlanError names what is wrong with a file that is not one."""
        from bsa_vision.plans.plan_file import load

        return load(path)

    def _compile(
        self,
        layer: str,
        layout: TokenLayout,
        prompts: Sequence[Sequence[Box]],
        keys: TokenLayout | None,
    ) -> HeadMasks:
        heads = [
            name
            if name == "dense"
            else torch.stack([self._lay_out(layer, head, layout, boxes, keys) for boxes in prompts])
            for head, name in enumerate(self.layers[layer])
        ]  # (images, R, C) each
        try:
            return HeadMasks.from_patterns(layout, heads, kv_layout=keys)
        except ValueError as error:
            raise PlanError(f"layer {layer!r} of the plan: {error}") from None

    def _lay_out(
        self,
        layer: str,
        head: int,
        layout: TokenLayout,
        boxes: Sequence[Box],
        keys: TokenLayout | None,
    ) -> Tensor:
        name = self.layers[layer][head]
        pattern = self.patterns[name]
        if isinstance(pattern, Static):
            if keys is not None:
                raise PlanError(
                    f"layer {layer!r} attends to remembered frames, whose number grows: a static mask fits one number of keys only; use a "
                    "geometric pattern."
                )
            return pattern(layout)
        try:
            if isinstance(pattern, Pattern):
                return pattern(
                    layout, int(layer.rpartition(".")[2]) * self.model["heads"] + head, boxes, keys
                )
            mask = pattern(layout) if keys is None else pattern(layout, keys)
        except PlanError:
            raise
        except Exception as error:
            raise PlanError(
                f"layer {layer!r}, head {head}, pattern {name!r}: {type(error).__name__}: {error}"
            ) from error
        try:
            return with_special(
                check_blocks(mask, f"pattern {name!r} returned", layout, keys), layout, keys
            )
        except ValueError as error:
            raise PlanError(str(error)) from None

    def __str__(self) -> str:
        lines = [
            f"SparsityPlan for {', '.join(f'{key} {value}' for key, value in self.model.items())}; order {self.order}"
        ]
        for key, names in self.layers.items():
            counts = {name: names.count(name) for name in dict.fromkeys(names)}
            lines.append(
                f"  {key:<9}" + ", ".join(f"{count} x {name}" for name, count in counts.items())
            )
        return "\n".join(lines)


def as_plan(plan: object) -> SparsityPlan:
    """`plan`, or the one in the file of that path; TypeError or FileNotFoundError for what is none."""
    if isinstance(plan, SparsityPlan):
        return plan
    if isinstance(plan, (str, os.PathLike)):
        if not os.path.exists(plan):
            hint = (
                f"; for a pattern use bsa.uniform_plan(model, {plan!r})"
                if is_pattern_name(plan)
                else ""
            )
            raise FileNotFoundError(
                f"plan={os.fspath(plan)!r}: no such file; pass a SparsityPlan or the path of one that was saved{hint}."
            )
        return SparsityPlan.load(plan)
    how = "make one with bsa.uniform_plan(model, ...), or read one with bsa.SparsityPlan.load(path)"
    held = list(plan.values()) if isinstance(plan, Mapping) else [plan]
    if held and all(isinstance(masks, HeadMasks) for masks in held):
        how = "make one of masks with bsa.SparsityPlan.from_head_masks(bsa.inspect(model), {layer: masks})"
    elif isinstance(plan, nn.Module):
        how = "the model comes first"
    elif isinstance(plan, Pattern):
        how = "make one with bsa.uniform_plan(model, pattern)"
    raise TypeError(
        f"plan is a {type(plan).__name__}: expected a SparsityPlan or the path of one; {how}."
    )


def _instead_of_pattern(given: object) -> str:
    """The end of a message about what is no pattern."""
    if isinstance(given, (Tensor, HeadMasks)):
        return ", and masks with bsa.SparsityPlan.from_head_masks(bsa.inspect(model), {layer: HeadMasks})"
    if isinstance(given, (list, tuple)):
        return ", and others head by head with plan.replace(heads=..., pattern=...)"
    return ""


def _check_spec(spec: object) -> None:
    if not isinstance(spec, ModelSpec):
        raise TypeError(
            f"spec is a {type(spec).__name__}: expected a ModelSpec; pass bsa.inspect(model)."
        )


def _check_options(pattern: Any, params: Mapping[str, Any], options: Sequence[str]) -> None:
    """Raise PlanError for a parameter that looks like one of `options`, misspelt: the pattern's own message would mislead."""
    own = parameters(pattern) if isinstance(pattern, str) and pattern in PATTERNS else []
    for param in params:
        close = difflib.get_close_matches(param, [*options, *own], n=1, cutoff=0.7)
        if param not in own and close and close[0] in options:
            raise PlanError(
                f"{param}={params[param]!r}: allowed are {', '.join([*options, *own])}; did you mean {close[0]}?"
            )


def _listed(name: str, given: Any) -> list[Any]:
    """A single layer or head, or several, as a list."""
    if isinstance(given, (int, str)):
        return [given]
    if not isinstance(given, Iterable):
        raise PlanError(
            f"{name}={given!r}: expected indices{' or names' * (name == 'layers')}; give one, or a list."
        )
    return list(given)
