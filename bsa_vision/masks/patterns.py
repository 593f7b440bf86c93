"""Describe patterns before they are laid on a grid: `Pattern`, a name of `PATTERNS` and parameters."""

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

from bsa_vision.masks.geometry import (
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
from bsa_vision.masks.layout import TokenLayout, check_metric, whole_number
from bsa_vision.masks.origin import check_layout, layouts_of, remember
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
    "sparsity": check_sparsity,
    "centers": center_pairs,
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
