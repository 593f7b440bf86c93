"""Plans as JSON that a person can read and diff: patterns declared once, then one line per layer.

    {
      "format": "bsa-vision/plan",
      "version": 2,
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

import json
import math
from collections.abc import Mapping
from typing import Any

from bsa_vision.errors import PlanError
from bsa_vision.plans.validation import check_keys

FORMAT, VERSION = "bsa-vision/plan", 2
SECTIONS = ("patterns", "layers", "scores", "notes")
KEYS = ("format", "version", "model", "layout", *SECTIONS)
MODEL_KEYS = {"family": str, "depth": int, "heads": int, "head_dim": int}
LAYOUT_KEYS = {"order": str, "tile": list, "block_size": int}


def dumps(data: Mapping[str, Any]) -> str:
    """Return a plan's data as JSON text, one line per pattern and layer."""
    try:
        return _dumps(data)
    except (TypeError, ValueError) as error:
        raise PlanError(
            f"the plan holds something JSON cannot: {error}; keep notes and scores to text and "
            "numbers."
        ) from None


def _dumps(data: Mapping[str, Any]) -> str:
    head: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    lines = []
    for key, value in {**head, **data}.items():
        text = json.dumps(value, allow_nan=False)
        if key in SECTIONS and value:
            inner = (
                f"    {json.dumps(name)}: {json.dumps(entry, allow_nan=False)}"
                for name, entry in value.items()
            )
            text = "{\n" + ",\n".join(inner) + "\n  }"
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def loads(text: str | bytes) -> dict[str, Any]:
    """Return a plan's data from JSON text, or its UTF-8 bytes; PlanError for anything unknown."""
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
    version = data.get("version")
    if version not in (1, VERSION) or isinstance(version, bool):
        raise PlanError(
            f"version {version!r}: this bsa-vision reads versions 1 and {VERSION}; update it or "
            "save the plan again."
        )
    if version == 1:
        _upgrade(data)
    check_keys("the plan", data, KEYS, optional=("scores", "notes"))
    _check_types("model", data["model"], MODEL_KEYS)
    _check_types("layout", data["layout"], LAYOUT_KEYS)
    for section in SECTIONS:
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
    return data


OLD_KEYS = {  # version 1 -> version 2
    "start": "num_prefix_tokens",
    "end": "num_suffix_tokens",
    "special tokens": "special_tokens",
    "chosen on": "calibration",
    "kept back": "held_out",
    "images above": "images_above",
}


def _upgrade(data: dict[str, Any]) -> None:
    """Rename, in place, what version 1 called otherwise: in static masks and tuning's notes."""
    patterns, notes = data.get("patterns"), data.get("notes")
    static = [(spec, "layout") for spec in patterns.values()] if isinstance(patterns, dict) else []
    tuned = notes.get("tuned") if isinstance(notes, dict) else None
    for found, key in (*static, (tuned, "images"), (notes, "tuned")):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found[key] = {OLD_KEYS.get(name, name): value for name, value in found[key].items()}


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


def _check_types(where: str, data: Any, expected: Mapping[str, type] | None) -> None:
    if not isinstance(data, dict):
        raise PlanError(f"{where!r} is {data!r}: expected an object; correct it.")
    if expected is None:
        return
    check_keys(repr(where), data, tuple(expected))
    for key, kind in expected.items():
        if not isinstance(data[key], kind) or isinstance(data[key], bool):
            raise PlanError(
                f"{where}.{key} is {data[key]!r}: expected {kind.__name__}; correct it."
            )
