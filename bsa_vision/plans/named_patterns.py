"""Name the patterns of a plan, check their parameters, and make the mask of one head."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.attention.head_patterns import check_blocks, with_special
from bsa_vision.errors import PlanError
from bsa_vision.masks import PATTERNS, Pattern, TokenLayout
from bsa_vision.masks.pattern import parameters
from bsa_vision.masks.patterns import Box
from bsa_vision.plans.pattern_spec import PatternLike
from bsa_vision.plans.static_mask import Static


def named(
    pattern: str | PatternLike, params: Mapping[str, Any], declared: Mapping[str, PatternLike]
) -> tuple[str, PatternLike | None]:
    """Return the name to write into layers, and the pattern to declare.

    The pattern is None if it needs no declaration: "dense", or a name in `declared`.
    """
    if isinstance(pattern, str):
        if pattern == "dense" or (pattern in declared and not params):
            if params:
                raise PlanError(f"pattern 'dense' takes no parameters, got {', '.join(params)}.")
            return pattern, None
        try:
            pattern = Pattern(pattern, **params)
        except ValueError as error:
            raise PlanError(str(error)) from None
        return repr(pattern), pattern
    if params:
        raise PlanError(f"{pattern!r} takes no further parameters, got {', '.join(params)}.")
    if not callable(pattern):
        is_mask = isinstance(pattern, (Tensor, HeadMasks))
        given = f" is a {type(pattern).__name__}" if is_mask else f"={pattern!r}"
        raise PlanError(
            f"pattern{given}: expected a name, a Pattern, or a function layout -> (R, C) bool"
            f"{_other_way(pattern)}."
        )
    name = repr(pattern)
    if not isinstance(pattern, (Pattern, Static)):
        name = getattr(pattern, "__name__", name)
        name = f"{name} (function)" if name in PATTERNS else name
    taken, base = declared.get(name), name
    for number in range(2, len(declared) + 3):
        if taken is None or taken == pattern:
            break
        name = f"{base} ({number})"
        taken = declared.get(name)
    return name, pattern


def _other_way(given: object) -> str:
    """Return the end of the message about a value that is not a pattern."""
    if isinstance(given, (Tensor, HeadMasks)):
        return (
            "; pass masks with bsa.SparsityPlan.from_head_masks(bsa.inspect(model), "
            "{layer: HeadMasks})"
        )
    if isinstance(given, (list, tuple)):
        return "; set heads one by one with plan.replace(heads=..., pattern=...)"
    return ""


def check_options(pattern: Any, params: Mapping[str, Any], options: Sequence[str]) -> None:
    """Raise PlanError for a parameter that looks like a misspelt name in `options`.

    The pattern's own message would name only its parameters.
    """
    known = parameters(pattern) if isinstance(pattern, str) and pattern in PATTERNS else []
    for param in params:
        close = difflib.get_close_matches(param, [*options, *known], n=1, cutoff=0.7)
        if param not in known and close and close[0] in options:
            raise PlanError(
                f"{param}={params[param]!r}: allowed are {', '.join([*options, *known])}; did you "
                f"mean {close[0]}?"
            )


def lay_out(
    name: str,
    pattern: PatternLike,
    where: tuple[str, int],
    heads: int,
    layout: TokenLayout,
    boxes: Sequence[Box],
    keys: TokenLayout | None,
) -> Tensor:
    """Return the (R, C) mask of a pattern for one head, `where` = (layer key, head)."""
    layer, head = where
    if isinstance(pattern, Static):
        if keys is not None:
            raise PlanError(
                f"layer {layer!r} attends to remembered frames, whose number changes: a static "
                "mask fits one number of keys; use a geometric pattern."
            )
        return pattern(layout)
    try:
        if isinstance(pattern, Pattern):
            return pattern(layout, int(layer.rpartition(".")[2]) * heads + head, boxes, keys)
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
