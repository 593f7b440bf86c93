"""Who may look at whom: functions from a `TokenLayout` to an (R, C) bool block mask, True = compute.

Every pattern here keeps the rows and columns of blocks that hold special tokens. Those with a `keys` argument take a second layout, (R, C)
then being its columns: what is remembered of other frames, where a place is the same place in each of them. Block masks are small bool tensors, so
union and intersection are `|` and `&`. `Pattern` is the same thing not yet laid on a grid: a name and its parameters.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, reduce
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from bsa_vision.masks.layout import TokenLayout, check_metric, whole_number, whole_pair
from bsa_vision.masks.origin import check_layout, laid_out, layouts_of, remember


@laid_out
def special(layout: TokenLayout, keys: TokenLayout | None = None) -> Tensor:
    """Only what is always kept: rows and columns of blocks that hold a special token, and each block's own (its own place among `keys`)."""
    if keys is not None:
        return _keep_special(layout, layout.block_distance("chebyshev", keys) == 0, keys)
    return _keep_special(layout, torch.eye(layout.num_blocks, dtype=torch.bool, device="cpu"))


def _keep_special(layout: TokenLayout, mask: Tensor, keys: TokenLayout | None = None) -> Tensor:
    """`mask` with the rows and columns of blocks that hold a special token switched on."""
    return mask | layout.special_blocks[:, None] | (keys or layout).special_blocks[None]


@laid_out
def dense(layout: TokenLayout, keys: TokenLayout | None = None) -> Tensor:
    """Every block sees every block."""
    return torch.ones(
        layout.num_blocks, (keys or layout).num_blocks, dtype=torch.bool, device="cpu"
    )


@laid_out
def local_window(
    layout: TokenLayout, radius: int = 8, metric: str = "chebyshev", keys: TokenLayout | None = None
) -> Tensor:
    """Blocks with at least one pair of patches within `radius` patches of each other (any-rule).

    A neighbourhood around every query: raster rows give a band, tiles a band of tiles.

        █▓░░░░
        ▓█▓░░░      ▓ holds at least one pair close enough
        ░▓█▓░░
    """
    return _keep_special(
        layout, layout.block_distance(metric, keys) <= whole_number("radius", radius, 0), keys
    )


@laid_out
def axial(layout: TokenLayout, width: int = 0, keys: TokenLayout | None = None) -> Tensor:
    """Blocks with at least one pair of patches whose rows, or whose columns, differ by at most `width` (any-rule)."""
    return _keep_special(
        layout, layout.block_distance("axis", keys) <= whole_number("width", width, 0), keys
    )


@laid_out
def nearest(layout: TokenLayout, sparsity: float = 0.5, metric: str = "chebyshev") -> Tensor:
    """The k nearest blocks of each row, k = max(1, round((1 - sparsity) * C)).

    Sorted by `block_distance`, ties by the distance of centroids, then by the lower index.
    """
    return _keep_special(
        layout,
        nearest_among(layout, torch.arange(layout.num_blocks, device="cpu"), sparsity, metric),
    )


def nearest_among(
    layout: TokenLayout, blocks: Tensor, sparsity: float, metric: str = "chebyshev"
) -> Tensor:
    """(R, C) bool: each of `blocks` (M,) keeps the k nearest of `blocks`, k from M alone; other rows are empty."""
    distance = layout.block_distance(metric)[blocks][:, blocks]
    by_centroid = layout.centroid_distance()[blocks][:, blocks].sort(dim=1, stable=True).indices
    by_distance = distance.gather(1, by_centroid).sort(dim=1, stable=True).indices
    kept = by_centroid.gather(1, by_distance)[:, : num_kept(sparsity, len(blocks))]
    mask = torch.zeros(layout.num_blocks, layout.num_blocks, dtype=torch.bool, device="cpu")
    mask[blocks[:, None], blocks[kept]] = True
    return mask


@laid_out
def strided(layout: TokenLayout, stride: int = 2) -> Tensor:
    """Block columns 0, stride, 2 * stride, ...: every query sees the same regular sample of key blocks."""
    columns = torch.arange(layout.num_blocks, device="cpu") % whole_number("stride", stride, 1) == 0
    return _keep_special(layout, columns.expand(layout.num_blocks, -1))


@laid_out
def random_blocks(
    layout: TokenLayout, sparsity: float = 0.5, seed: int = 0, stream: int = 0
) -> Tensor:
    """k random blocks in each row, its own among them; k as in `nearest`.

    seed, stream  together choose the draw: streams of one seed are independent (a plan gives every head its own).
    """
    generator = torch.Generator(device="cpu").manual_seed(
        (whole_number("seed", seed, 0) * 1_000_003 + stream) % 2**63
    )
    shape = (layout.num_blocks, layout.num_blocks)
    score = torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32)
    score.fill_diagonal_(2.0)
    return _keep_special(layout, keep_highest(score, sparsity))


@laid_out
def region(
    layout: TokenLayout, centers: Sequence[tuple[int, int]], radius: int = 8, metric: str = "l1"
) -> Tensor:
    """Patches within `radius` of any of `centers` (row, column) see each other (any-rule); no other pair does."""
    radius = whole_number("radius", radius, 0)
    focus = torch.zeros(layout.num_blocks, dtype=torch.bool, device="cpu")
    for row, column in _pairs(centers):
        focus |= layout.distance_to_patch(row, column, metric) <= radius
    return _keep_special(layout, focus[:, None] & focus[None])


def _pairs(centers: Any) -> list[tuple[int, int]]:
    if not isinstance(centers, Sequence) or isinstance(centers, str):
        raise ValueError(
            f"centers={centers!r}: expected a list of (row, column) pairs in patches; give e.g. [(10, 20)]."
        )
    return [whole_pair("center", center, 0) for center in centers]


Box = tuple[int, int, int, int]


@laid_out
def prompt_region(
    layout: TokenLayout, radius: int = 8, near: int = 2, boxes: Sequence[Box] = ()
) -> Tensor:
    """Patches within `radius` of a prompt see each other; beyond that, every patch sees those within `near` (both L1, any-rule).

    boxes  (top, left, bottom, right) in patches, both ends included: where the prompts are; a click is a box of one patch

    A dynamic pattern: in a plan, `boxes` come with the images (`bsa.context`). With clicks, the masks are those of
    `generate_sam_region_focused_mask`.
    """
    radius = whole_number("radius", radius, 0)
    focus = torch.zeros(layout.num_blocks, dtype=torch.bool, device="cpu")
    for box in boxes:
        focus |= layout.distance_to_box(*box) <= radius
    return _keep_special(layout, (focus[:, None] & focus[None])) | local_window(layout, near, "l1")


@laid_out
def window(layout: TokenLayout, size: int = 14, shift: int = 0) -> Tensor:
    """Blocks that share a window of size x size patches, the windows moved by `shift` patches (any-rule).

    Swin's two layouts are shift 0 and shift size // 2, which moves the borders by half a window; at the rim the windows are cut off,
    as Swin's masks cut them. Exact when every block lies in one window (say `tile=(size, size), block_size=size * size`, shift 0),
    a cover of it otherwise: `window_is_exact` tells.
    """
    holds = _windows_of_blocks(layout, size, shift)
    return _keep_special(layout, holds @ holds.T > 0)


def window_is_exact(layout: TokenLayout, size: int = 14, shift: int = 0) -> bool:
    """Whether `window` keeps exactly the pairs of patches that share a window: no block holds two windows' patches, or special tokens too."""
    holds = _windows_of_blocks(layout, size, shift)
    if int(holds.any(0).sum()) == 1:  # all of the image
        return True
    windows = holds.sum(1)
    return bool((windows <= 1).all()) and not bool((layout.special_blocks & (windows > 0)).any())


def _windows_of_blocks(layout: TokenLayout, size: int, shift: int) -> Tensor:
    """(R, windows) float32: 1 where a block holds a patch of a window."""
    size, shift = whole_number("size", size, 1), whole_number("shift", shift, 0)
    row, column = layout.coordinates
    patches = row >= 0
    across = (layout.grid[1] + size - 1 + shift) // size + 1
    index = ((row[patches] + size - shift % size) // size) * across + (
        column[patches] + size - shift % size
    ) // size
    holds = torch.zeros(layout.num_blocks, int(index.max()) + 1, device="cpu", dtype=torch.float32)
    holds[layout.block_of[patches], index] = 1
    return holds


PATTERNS: dict[str, Callable[..., Tensor]] = {
    "dense": dense,
    "special": special,
    "local_window": local_window,
    "axial": axial,
    "nearest": nearest,
    "strided": strided,
    "random_blocks": random_blocks,
    "region": region,
    "prompt_region": prompt_region,
    "window": window,
}
# Those that may keep blocks of keys that are other tokens than the queries.
AMONG_OTHERS = tuple(
    name for name, function in PATTERNS.items() if "keys" in inspect.signature(function).parameters
)
# What a pattern gets when it is laid out; everything else are its parameters.
GIVEN = ("layout", "stream", "boxes", "keys")

# What the values of parameters must be, whatever the pattern; checked before a grid is known.
CHECKS: dict[str, Callable[[Any], Any]] = {
    **{
        name: partial(whole_number, name, minimum=0)
        for name in ("radius", "near", "width", "shift", "seed")
    },
    **{name: partial(whole_number, name, minimum=1) for name in ("stride", "size")},
    "metric": check_metric,
    "sparsity": lambda value: check_sparsity(value),
    "centers": _pairs,
}

Spec = dict[str, Any]
JOINTS = {"any": torch.logical_or, "all": torch.logical_and}


class Pattern:
    """A pattern not yet laid on a grid: one of `PATTERNS` with its parameters, or several joined by `|` and `&`.

        >>> near = Pattern("local_window", radius=4) | Pattern("strided", stride=8)
        >>> near(TokenLayout((64, 64))).shape
        torch.Size([32, 32])

    Immutable, hashable, and plain data through `spec`.
    """

    def __init__(self, name: str, /, **params: Any) -> None:
        if not isinstance(name, str) or name not in PATTERNS:
            raise ValueError(
                f"pattern {name!r} is unknown: allowed are {', '.join(PATTERNS)}; choose one of them{_meant(name)}."
            )
        allowed = parameters(name)
        for param in params:
            if param not in allowed:
                raise ValueError(
                    f"pattern {name!r} has no parameter {param!r}: allowed are {', '.join(allowed) or 'none'}; "
                    "remove it or correct its name."
                )
        self._name = name
        if "centers" in allowed and "centers" not in params:
            raise ValueError(
                f"pattern {name!r} has no centers: give it (row, column) pairs, e.g. centers=[(10, 20)]."
            )
        self._params = {
            param: _plain(name, param, params[param]) for param in allowed if param in params
        }
        self._parts: tuple[Pattern, ...] = ()
        for param, value in self._params.items():
            CHECKS[param](value)

    @classmethod
    def _join(cls, joint: str, parts: Sequence[Pattern]) -> Pattern:
        joined = cls.__new__(cls)
        joined._name, joined._params, joined._parts = joint, {}, tuple(parts)
        return joined

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Pattern:
        """The pattern that `spec` describes: {"pattern": name, **parameters}, {"any": [specs]} or {"all": [specs]}."""
        if isinstance(spec, Mapping):
            for joint in JOINTS:
                if set(spec) == {joint} and isinstance(spec[joint], (list, tuple)) and spec[joint]:
                    return cls._join(joint, [cls.from_spec(part) for part in spec[joint]])
            if "pattern" in spec and not set(spec) & set(JOINTS):
                return cls(
                    spec["pattern"],
                    **{key: value for key, value in spec.items() if key != "pattern"},
                )
        raise ValueError(
            f"pattern spec {spec!r}: allowed are {{'pattern': name, **parameters}}, {{'any': [specs]}} and {{'all': [specs]}}; "
            "write it as one of them."
        )

    @property
    def spec(self) -> Spec:
        """The pattern as plain data, JSON-ready; `Pattern.from_spec` reads it back."""
        if self._parts:
            return {self._name: [part.spec for part in self._parts]}
        return {"pattern": self._name, **copy.deepcopy(self._params)}

    def __call__(
        self,
        layout: TokenLayout,
        stream: int = 0,
        boxes: Sequence[Box] = (),
        keys: TokenLayout | None = None,
    ) -> Tensor:
        """The (R, C) bool block mask on `layout`.

        stream  tells random patterns which of their draws to use; boxes tell dynamic ones where the prompts are, in patches
        keys    the layout of the columns where they are other tokens than the rows. ValueError for patterns that do not know of such
        """
        check_layout("layout", layout)
        if self._parts:
            joined = reduce(
                JOINTS[self._name], (part(layout, stream, boxes, keys) for part in self._parts)
            )
            return remember(joined, (layout, keys or layout))
        given: dict[str, dict[str, Any]] = {
            "random_blocks": {"stream": stream},
            "prompt_region": {"boxes": boxes},
        }
        others = dict(given.get(self._name, {}))
        if keys is not None:
            if self._name not in AMONG_OTHERS:
                raise ValueError(
                    f"pattern {self._name!r} is for keys that are the queries' own tokens: for others allowed are {', '.join(AMONG_OTHERS)}; choose "
                    "one of them."
                )
            others["keys"] = keys
        return PATTERNS[self._name](layout, **self._params, **others)

    def labels(self, layout: TokenLayout) -> list[str]:
        """What to know of this pattern on `layout`, in words: that it follows prompts; whether its windows hold exactly, or as a cover."""
        if self._name == "prompt_region":
            return [
                f"{self!r} follows the prompts of `bsa.context`: features made this way belong to their prompts"
            ]
        if self._parts:
            return [label for part in self._parts for label in part.labels(layout)]
        if self._name != "window":
            return []
        if window_is_exact(layout, **self._params):
            return [f"{self!r} is exact: every block lies in one window"]
        return [
            f"{self!r} is a cover (any-rule): blocks hold patches of several windows, so queries see beyond their own"
        ]

    @property
    def is_random(self) -> bool:
        """Whether `stream` makes a difference."""
        return self._name == "random_blocks" or any(part.is_random for part in self._parts)

    @property
    def is_dynamic(self) -> bool:
        """Whether it follows the prompts of an image."""
        return self._name == "prompt_region" or any(part.is_dynamic for part in self._parts)

    def __or__(self, other: object) -> Pattern:
        return self._join("any", [self, other]) if isinstance(other, Pattern) else NotImplemented

    def __and__(self, other: object) -> Pattern:
        return self._join("all", [self, other]) if isinstance(other, Pattern) else NotImplemented

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[Any, ...]:
        return self._name, _hashable(list(self._params.items())), self._parts

    def __repr__(self) -> str:
        if self._parts:
            return "(" + {"any": " | ", "all": " & "}[self._name].join(map(repr, self._parts)) + ")"
        return (
            f"{self._name}({', '.join(f'{key}={value!r}' for key, value in self._params.items())})"
        )


def parameters(name: str) -> list[str]:
    """The parameters of this pattern of `PATTERNS`, in their order."""
    return [param for param in inspect.signature(PATTERNS[name]).parameters if param not in GIVEN]


def is_pattern_name(name: Any) -> bool:
    """Whether `name` is, or looks like, the name of a pattern."""
    return isinstance(name, str) and (name in PATTERNS or bool(_meant(name)))


def _meant(name: Any) -> str:
    """The end of a message about an unknown name: what it looks like, written as Python wants it."""
    if not isinstance(name, str):
        return ""
    word, *values = name.split(":")
    close = difflib.get_close_matches(word, PATTERNS, n=1, cutoff=0.55)
    if not close:
        return ""
    first = [f"{param}={value}" for param, value in zip(parameters(close[0]), values, strict=False)]
    named = [value if "=" in value else pair for value, pair in zip(values, first, strict=False)]
    return f" (did you mean {', '.join([repr(close[0]), *named])}?)"


def _plain(name: str, param: str, value: Any) -> Any:
    """`value` as JSON gives it back, so that a pattern equals itself after a round trip through a file."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Integral):  # numpy's
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [_plain(name, param, item) for item in value]
    raise ValueError(
        f"pattern {name!r} got {param}={value!r}, a {type(value).__name__}: allowed are numbers, strings and lists of them; "
        "convert it, e.g. with .tolist()."
    )


def _hashable(value: Any) -> Any:
    return tuple(_hashable(item) for item in value) if isinstance(value, (list, tuple)) else value


def check_sparsity(sparsity: Any) -> float:
    """`sparsity` as a float, or a ValueError."""
    number = isinstance(sparsity, Real) and not isinstance(sparsity, bool)
    if not number or not 0.0 <= sparsity <= 1.0:
        percent = number and 1 < sparsity <= 100
        example = f"{float(sparsity) / 100:g} for {sparsity:g} %" if percent else "such a number"
        raise ValueError(
            f"sparsity={sparsity!r}: expected the fraction of blocks to skip, 0 to 1; give {example}."
        )
    return float(sparsity)


def num_kept(sparsity: float, num_blocks: int) -> int:
    """How many of `num_blocks` blocks a row keeps at `sparsity`: max(1, round((1 - sparsity) * C))."""
    skipped = check_sparsity(sparsity)
    if skipped == 1 and num_blocks > 1:
        warnings.warn(
            f"sparsity={sparsity!r} keeps one block of {num_blocks} in each row, the least there is: sparsity is "
            "the fraction to skip; give 0.0 to keep every block.",
            stacklevel=3,
        )
    return max(1, round((1 - skipped) * num_blocks))


def keep_highest(score: Tensor, sparsity: float) -> Tensor:
    """The k highest `score` (..., R, C) of every row as a bool mask."""
    kept = score.topk(num_kept(sparsity, score.shape[-1]), dim=-1).indices
    return torch.zeros(score.shape, dtype=torch.bool, device=score.device).scatter_(-1, kept, True)


def stack_heads(
    masks: Iterable[Tensor], batch_size: int, device: torch.device | str | None = None
) -> Tensor:
    """One (R, C) mask per head -> base_blockmask (B, S, R, C), equal across the batch, contiguous.

    device  None is torch's default device.
    """
    given = list(masks)
    shapes = {
        tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__ for mask in given
    }
    if len(shapes) != 1 or not isinstance(given[0], Tensor):
        raise ValueError(
            f"stack_heads got masks of shapes {sorted(map(str, shapes))}: expected one (R, C) tensor per head, all of one "
            "layout; make them for one TokenLayout."
        )
    heads = torch.stack(given)  # (S, R, C)
    device = torch.get_default_device() if device is None else device
    stacked = heads.repeat(whole_number("batch_size", batch_size, 1), 1, 1, 1).to(
        device
    )  # (B, S, R, C)
    known = {layouts for mask in given if (layouts := layouts_of(mask)) is not None}
    return remember(stacked, known.pop() if len(known) == 1 else None)
