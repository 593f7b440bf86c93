"""Plans as JSON that a person can read and diff: patterns declared once, then one line per layer.

    {
      "format": "bsa-vision/plan",
      "version": 1,
      "model": {"family": "dinov3", "depth": 12, "heads": 3, "head_dim": 64},
      "layout": {"order": "tile", "tile": [8, 16], "block_size": 128},
      "patterns": {
        "near": {"pattern": "local_window", "radius": 8}
      },
      "layers": {
        "self.0": ["dense", "near", "near"]
      },
      "scores": {},
      "notes": {}
    }

Everything unknown is an error: a key that was dropped in silence would change results.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bsa_vision.errors import PlanError
from bsa_vision.masks import Pattern, TokenLayout
from bsa_vision.plans.plan import PatternLike, SparsityPlan
from bsa_vision.plans.static_mask import Static
from bsa_vision.storage import atomic_write

FORMAT, VERSION = "bsa-vision/plan", 1
KEYS = ("format", "version", "model", "layout", "patterns", "layers", "scores", "notes")
MODEL_KEYS = {"family": str, "depth": int, "heads": int, "head_dim": int}
LAYOUT_KEYS = {"order": str, "tile": list, "block_size": int}


def save(plan: SparsityPlan, path: str | os.PathLike[str]) -> None:
    """Write `plan` to `path`. PlanError when a pattern is a Python function, which no file can hold."""
    text = dumps(plan)
    loads(text)  # what cannot be read back must not replace what can
    atomic_write.write(path, text.encode())


def load(path: str | os.PathLike[str]) -> SparsityPlan:
    """Read a plan; PlanError says what is wrong, OSError that there is no such file."""
    data = Path(path).read_bytes()
    try:
        return loads(data)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def dumps(plan: SparsityPlan) -> str:
    """The plan as JSON text."""
    try:
        return _dumps(plan)
    except (TypeError, ValueError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(
            f"the plan holds something JSON cannot: {error}; keep notes and scores to text and numbers."
        ) from None


def _dumps(plan: SparsityPlan) -> str:
    head = {
        "format": FORMAT,
        "version": VERSION,
        "model": dict(plan.model),
        "layout": {"order": plan.order, "tile": list(plan.tile), "block_size": plan.block_size},
    }
    sections: dict[str, Mapping[str, Any]] = {
        "patterns": {name: _pattern_spec(name, pattern) for name, pattern in plan.patterns.items()},
        "layers": plan.layers,
        "scores": plan.scores,
        "notes": plan.notes,
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    for section, entries in sections.items():
        inner = ",\n".join(
            f"    {json.dumps(key)}: {json.dumps(value, allow_nan=False)}"
            for key, value in entries.items()
        )
        lines.append(f"  {json.dumps(section)}: " + ("{\n" + inner + "\n  }" if inner else "{}"))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def loads(text: str | bytes) -> SparsityPlan:
    """The plan in JSON text, or in its UTF-8 bytes."""
    try:
        text = text.decode() if isinstance(text, bytes) else text
        data = json.loads(
            text, object_pairs_hook=_without_repeated_keys, parse_constant=_no_constant
        )
        _check_depth(data)
    except PlanError:
        raise
    except (
        ValueError,
        RecursionError,
    ) as error:  # not UTF-8, not JSON, numbers of thousands of digits
        raise PlanError(
            f"not JSON ({error}): the file is damaged or not a plan; restore it or save the plan again."
        ) from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise PlanError(
            f"no 'format': {FORMAT!r}: this is not a plan of bsa-vision; load a file written by plan.save."
        )
    if data.get("version") != VERSION or isinstance(data["version"], bool):
        raise PlanError(
            f"version {data.get('version')!r}: this bsa-vision reads version {VERSION}; update it or save again."
        )
    _check_keys("the plan", data, KEYS, optional=("scores", "notes"))
    _check_types("model", data["model"], MODEL_KEYS)
    _check_types("layout", data["layout"], LAYOUT_KEYS)
    for section in ("patterns", "layers", "scores", "notes"):
        _check_types(section, data.setdefault(section, {}), None)
    for key, values in data["scores"].items():
        if not isinstance(values, list) or not all(
            isinstance(value, (int, float)) for value in values
        ):
            raise PlanError(
                f"scores of layer {key!r} are {values!r}: expected a list of numbers, one per head; correct it."
            )
    for key, names in data["layers"].items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise PlanError(
                f"layer {key!r} is {names!r}: expected a list of pattern names, one per head; correct it."
            )
    layout = data["layout"]
    try:
        return SparsityPlan(
            data["model"],
            {name: _pattern(name, spec) for name, spec in data["patterns"].items()},
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
        raise PlanError(
            f"{error} The file is damaged or was edited wrongly; correct that entry."
        ) from None


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise PlanError(
                f"the key {key!r} is written twice: which one counts cannot be told; remove one of them."
            )
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise PlanError(f"{name} is no number of JSON: expected a finite number; correct it.")


DEPTH = 50  # of lists and objects within each other; a tuned plan has 8


def _check_depth(data: Any) -> None:
    """Raise PlanError for data nested deeper than others (copies, hashes, texts) can follow, and for infinite numbers."""
    level, depth = [data], 0
    while level:
        if depth > DEPTH:
            raise PlanError(
                f"lists or objects lie more than {DEPTH} deep in each other: the file is damaged; restore it."
            )
        if any(isinstance(x, float) and not math.isfinite(x) for x in level):
            raise PlanError(
                "a number is too large for a float: expected a finite number; correct it."
            )
        level = [
            x
            for held in level
            if isinstance(held, (dict, list))
            for x in (held.values() if isinstance(held, dict) else held)
        ]
        depth += 1


def _pattern_spec(name: str, pattern: PatternLike) -> dict[str, Any]:
    if isinstance(pattern, Pattern):
        return pattern.spec
    if isinstance(pattern, Static):
        bits = np.packbits(pattern.mask.numpy().reshape(-1))
        return {
            "static": base64.b64encode(bits.tobytes()).decode(),
            "layout": _layout_spec(pattern.layout),
        }
    raise PlanError(
        f"pattern {name!r} is a Python function, which a plan file cannot hold: files carry named patterns and block masks; "
        "call plan.freeze(plan.layout(bsa.inspect(model))) first to turn it into a block mask."
    )


def _pattern(name: str, spec: Any) -> PatternLike:
    if not isinstance(spec, dict):
        raise PlanError(
            f"pattern {name!r} is {spec!r}: expected an object such as {{'pattern': 'local_window', 'radius': 8}}."
        )
    if "static" not in spec:
        try:
            return Pattern.from_spec(spec)
        except (ValueError, TypeError, OverflowError) as error:
            raise PlanError(f"pattern {name!r}: {error}") from None
    _check_keys(f"pattern {name!r}", spec, ("static", "layout"))
    try:
        layout = TokenLayout(
            **{
                **spec["layout"],
                "grid": tuple(spec["layout"]["grid"]),
                "tile": tuple(spec["layout"]["tile"]),
            }
        )
        bits = np.frombuffer(base64.b64decode(spec["static"], validate=True), np.uint8)
        size = layout.num_blocks**2
        if len(bits) != -(-size // 8):
            raise ValueError(f"{len(bits)} bytes of mask, {layout} needs {-(-size // 8)}")
        mask = torch.from_numpy(np.unpackbits(bits, count=size).astype(bool)).reshape(
            layout.num_blocks, -1
        )
        return Static(mask, layout)
    except (ValueError, TypeError, KeyError, OverflowError, binascii.Error) as error:
        raise PlanError(
            f"static mask {name!r} is damaged ({error}): expected bit-packed base64 and its layout; save it again."
        ) from None


def _layout_spec(layout: TokenLayout) -> dict[str, Any]:
    return {
        "grid": list(layout.grid),
        "start": layout.start,
        "end": layout.end,
        "order": layout.order,
        "tile": list(layout.tile),
        "block_size": layout.block_size,
    }


def _check_keys(
    where: str, data: Mapping[str, Any], allowed: tuple[str, ...], optional: tuple[str, ...] = ()
) -> None:
    unknown = [key for key in data if key not in allowed]
    missing = [key for key in allowed if key not in data and key not in optional]
    if unknown or missing:
        raise PlanError(
            f"{where} has unknown keys {unknown} and lacks {missing}: allowed are {', '.join(allowed)}; correct the file, or "
            "update bsa-vision if a newer one wrote it."
        )


def _check_types(where: str, data: Any, expected: Mapping[str, type] | None) -> None:
    if not isinstance(data, dict):
        raise PlanError(f"{where!r} is {data!r}: expected an object; correct it.")
    if expected is None:
        return
    _check_keys(repr(where), data, tuple(expected))
    for key, kind in expected.items():
        if not isinstance(data[key], kind) or isinstance(data[key], bool):
            raise PlanError(
                f"{where}.{key} is {data[key]!r}: expected {kind.__name__}; correct it."
            )
