"""Convert the patterns of a plan to plain data and back.

A named pattern is stored as its parameters, a static block mask as packed bits.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import numpy as np
import torch

from bsa_vision.attention.head_patterns import BlockMaskFn
from bsa_vision.errors import PlanError
from bsa_vision.masks import Pattern, TokenLayout
from bsa_vision.plans.static_mask import Static
from bsa_vision.plans.validation import check_keys

PatternLike = Pattern | Static | BlockMaskFn


def to_spec(name: str, pattern: PatternLike) -> dict[str, Any]:
    """Return the entry of a pattern in a plan file; PlanError for a Python function."""
    if isinstance(pattern, Pattern):
        return pattern.spec
    if isinstance(pattern, Static):
        bits = np.packbits(pattern.mask.numpy().reshape(-1))
        text = base64.b64encode(bits.tobytes()).decode()
        return {"static": text, "layout": _layout_spec(pattern.layout)}
    raise PlanError(
        f"pattern {name!r} is a Python function, which a plan file cannot hold: files carry named "
        "patterns and block masks; call plan.freeze(plan.layout(bsa.inspect(model))) first to turn "
        "it into a block mask."
    )


def from_spec(name: str, spec: Any) -> PatternLike:
    """Return the pattern described by an entry of a plan file (the inverse of `to_spec`)."""
    if not isinstance(spec, dict):
        raise PlanError(
            f"pattern {name!r} is {spec!r}: expected an object such as "
            "{'pattern': 'local_window', 'radius': 8}."
        )
    if "static" not in spec:
        try:
            return Pattern.from_spec(spec)
        except (ValueError, TypeError, OverflowError) as error:
            raise PlanError(f"pattern {name!r}: {error}") from None
    check_keys(f"pattern {name!r}", spec, ("static", "layout"))
    try:
        pairs = {key: tuple(spec["layout"][key]) for key in ("grid", "tile")}
        layout = TokenLayout(**{**spec["layout"], **pairs})
        bits = np.frombuffer(base64.b64decode(spec["static"], validate=True), np.uint8)
        size = layout.num_blocks**2
        if len(bits) != -(-size // 8):
            raise ValueError(f"{len(bits)} bytes of mask, but {layout} needs {-(-size // 8)}")
        mask = torch.from_numpy(np.unpackbits(bits, count=size).astype(bool))
        return Static(mask.reshape(layout.num_blocks, -1), layout)
    except (ValueError, TypeError, KeyError, OverflowError, binascii.Error) as error:
        raise PlanError(
            f"static mask {name!r} is damaged ({error}): expected bit-packed base64 and its "
            "layout; save it again."
        ) from None


def _layout_spec(layout: TokenLayout) -> dict[str, Any]:
    return {
        "grid": list(layout.grid),
        "num_prefix_tokens": layout.num_prefix_tokens,
        "num_suffix_tokens": layout.num_suffix_tokens,
        "order": layout.order,
        "tile": list(layout.tile),
        "block_size": layout.block_size,
    }
