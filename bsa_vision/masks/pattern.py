"""Mask patterns independent of a grid: `Pattern`, a name in `PATTERNS` and parameters."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, reduce
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from bsa_vision.masks.layout import TokenLayout, check_metric, whole_number
from bsa_vision.masks.origin import check_layout, layouts_of, remember
from bsa_vision.masks.patterns import (
    Box,
    axial,
    center_pairs,
    dense,
    local_window,
    nearest,
    prompt_region,
    random_blocks,
    region,
    strided,
    window,
    window_is_exact,
)
from bsa_vision.masks.sparsity import check_sparsity
from bsa_vision.masks.special_tokens import special

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
# Patterns that accept keys other than the queries' tokens.
WITH_KEYS = tuple(
    name for name, function in PATTERNS.items() if "keys" in inspect.signature(function).parameters
)
# Arguments passed when a mask is made; all others are parameters of the pattern.
GIVEN = ("layout", "stream", "boxes", "keys")

# Checks of parameter values, the same for all patterns, that need no grid.
CHECKS: dict[str, Callable[[Any], Any]] = {
    **{
        name: partial(whole_number, name, minimum=0)
        for name in ("radius", "near", "width", "shift", "seed")
    },
    **{name: partial(whole_number, name, minimum=1) for name in ("stride", "size")},
    "metric": check_metric,
    "sparsity": check_sparsity,
    "centers": center_pairs,
}

Spec = dict[str, Any]
JOINTS = {"any": torch.logical_or, "all": torch.logical_and}


class Pattern:
    """Mask pattern without a grid: one of `PATTERNS` with parameters, or several joined by | and &.

        >>> near = Pattern("local_window", radius=4) | Pattern("strided", stride=8)
        >>> near(TokenLayout((64, 64))).shape
        torch.Size([32, 32])

    Immutable and hashable; `spec` is the pattern as plain data.
    """

    def __init__(self, name: str, /, **params: Any) -> None:
        if not isinstance(name, str) or name not in PATTERNS:
            allowed = ", ".join(PATTERNS)
            raise ValueError(f"pattern {name!r} is unknown: allowed are {allowed}{_hint(name)}.")
        known = parameters(name)
        for param in params:
            if param not in known:
                raise ValueError(
                    f"pattern {name!r} has no parameter {param!r}: allowed are "
                    f"{', '.join(known) or 'none'}."
                )
        self._name = name
        if "centers" in known and "centers" not in params:
            raise ValueError(
                f"pattern {name!r} has no centers: pass (row, column) pairs, e.g. "
                "centers=[(10, 20)]."
            )
        self._params = {
            param: _plain(name, param, params[param]) for param in known if param in params
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
        """Build a pattern from its `spec`.

        spec  {"pattern": name, **parameters}, {"any": [specs]} or {"all": [specs]}
        """
        if isinstance(spec, Mapping):
            for joint in JOINTS:
                if set(spec) == {joint} and isinstance(spec[joint], (list, tuple)) and spec[joint]:
                    return cls._join(joint, [cls.from_spec(part) for part in spec[joint]])
            if "pattern" in spec and not set(spec) & set(JOINTS):
                params = {key: value for key, value in spec.items() if key != "pattern"}
                return cls(spec["pattern"], **params)
        raise ValueError(
            f"pattern spec {spec!r}: allowed are {{'pattern': name, **parameters}}, "
            "{'any': [specs]} and {'all': [specs]}."
        )

    @property
    def spec(self) -> Spec:
        """The pattern as JSON-compatible data; `Pattern.from_spec` reads it."""
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
        """Return the (R, C) bool block mask on `layout`.

        stream  selects the draw of random patterns
        boxes   prompts for dynamic patterns, in patches
        keys    layout of the columns, if keys are not the queries' tokens; ValueError for patterns
                without support for it
        """
        check_layout("layout", layout)
        if self._parts:
            joined = reduce(
                JOINTS[self._name], (part(layout, stream, boxes, keys) for part in self._parts)
            )
            return remember(joined, (layout, keys or layout))
        extra: dict[str, Any] = {}
        if self._name == "random_blocks":
            extra["stream"] = stream
        if self._name == "prompt_region":
            extra["boxes"] = boxes
        if keys is not None:
            if self._name not in WITH_KEYS:
                raise ValueError(
                    f"pattern {self._name!r} needs keys that are the queries' tokens: for other "
                    f"keys allowed are {', '.join(WITH_KEYS)}."
                )
            extra["keys"] = keys
        return PATTERNS[self._name](layout, **self._params, **extra)

    def labels(self, layout: TokenLayout) -> list[str]:
        """Return notes on this pattern on `layout`: if it follows prompts, if windows are exact."""
        if self._name == "prompt_region":
            return [
                f"{self!r} follows the prompts of `bsa.context`: features are valid for these "
                "prompts only"
            ]
        if self._parts:
            return [label for part in self._parts for label in part.labels(layout)]
        if self._name != "window":
            return []
        if window_is_exact(layout, **self._params):
            return [f"{self!r} is exact: every block lies in one window"]
        return [
            f"{self!r} is a cover (any-rule): blocks hold patches of several windows, so queries "
            "also attend to patches outside their window"
        ]

    @property
    def is_random(self) -> bool:
        """True if the mask depends on `stream`."""
        return self._name == "random_blocks" or any(part.is_random for part in self._parts)

    @property
    def is_dynamic(self) -> bool:
        """True if the mask depends on the prompts of an image."""
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
        params = ", ".join(f"{key}={value!r}" for key, value in self._params.items())
        return f"{self._name}({params})"


def parameters(name: str) -> list[str]:
    """Return the parameters of this pattern of `PATTERNS`, in order."""
    names = inspect.signature(PATTERNS[name]).parameters
    return [param for param in names if param not in GIVEN]


def is_pattern_name(name: Any) -> bool:
    """Return whether `name` is the name of a pattern or similar to one."""
    return isinstance(name, str) and (name in PATTERNS or bool(_hint(name)))


def _hint(name: Any) -> str:
    """Return " (did you mean ...?)" with Python arguments for an unknown name, or ""."""
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
    """Return `value` as JSON reads it, so that a pattern read from a file equals the original."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Integral):  # numpy's
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [_plain(name, param, item) for item in value]
    raise ValueError(
        f"pattern {name!r} got {param}={value!r}, a {type(value).__name__}: allowed are numbers, "
        "strings and lists of them; convert it, e.g. with .tolist()."
    )


def _hashable(value: Any) -> Any:
    return tuple(_hashable(item) for item in value) if isinstance(value, (list, tuple)) else value


def stack_heads(
    masks: Iterable[Tensor], batch_size: int, device: torch.device | str | None = None
) -> Tensor:
    """Stack one (R, C) mask per head to a contiguous base_blockmask (B, S, R, C).

    The masks are the same for all images of the batch. device=None is torch's default device.
    """
    heads = list(masks)
    shapes = {tuple(m.shape) if isinstance(m, Tensor) else type(m).__name__ for m in heads}
    if len(shapes) != 1 or not isinstance(heads[0], Tensor):
        raise ValueError(
            f"stack_heads got masks of shapes {sorted(map(str, shapes))}: expected one (R, C) "
            "tensor per head, all for one TokenLayout."
        )
    batch_size = whole_number("batch_size", batch_size, 1)
    device = torch.get_default_device() if device is None else device
    stacked = torch.stack(heads).repeat(batch_size, 1, 1, 1).to(device)  # (B, S, R, C)
    known = {layouts for mask in heads if (layouts := layouts_of(mask)) is not None}
    return remember(stacked, known.pop() if len(known) == 1 else None)
