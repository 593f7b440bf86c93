"""Read and write plans as JSON: each pattern declared once, then one line per layer.

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

Unknown keys are errors, because ignoring one could change results.
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
            f"the plan cannot be written as JSON: {error}; use only text and numbers in notes and "
            "scores."
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
    """Return a plan's data from JSON text or UTF-8 bytes; PlanError for unknown keys and types."""
    try:
        text = text.decode() if isinstance(text, bytes) else text
        data = json.loads(
            text, object_pairs_hook=_without_repeated_keys, parse_constant=_no_constant
        )
        _check_depth(data)
    except PlanError:
        raise
    # Not UTF-8, not JSON, or a number with thousands of digits.
    except (ValueError, RecursionError) as error:
        raise PlanError(
            f"not JSON ({error}): the file is damaged or not a plan; restore it or save the plan "
            "again."
        ) from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise PlanError(
            f"no 'format': {FORMAT!r}: this is not a plan of bsa-vision; load a file written by "
            "plan.save."
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
        if not isinstance(values, list) or not all(isinstance(x, (int, float)) for x in values):
            raise PlanError(
                f"scores of layer {key!r} are {values!r}: expected a list of numbers, one per head."
            )
    for key, names in data["layers"].items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise PlanError(
                f"layer {key!r} is {names!r}: expected a list of pattern names, one per head."
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
    """Rename the keys of version 1 in place, in static masks and in the notes of the tuner."""
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
            raise PlanError(f"the key {key!r} is written twice: remove one of the two.")
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise PlanError(f"{name} is not a JSON number: expected a finite number.")


DEPTH = 50  # nesting of lists and objects; a tuned plan has 8 levels


def _check_depth(data: Any) -> None:
    """Raise PlanError for infinite numbers, and for data nested deeper than DEPTH.

    Copying, hashing and printing deeper data would exceed Python's recursion limit.
    """
    level, depth = [data], 0
    while level:
        if depth > DEPTH:
            raise PlanError(
                f"lists or objects are nested more than {DEPTH} levels deep: the file is damaged."
            )
        if any(isinstance(x, float) and not math.isfinite(x) for x in level):
            raise PlanError("a number is too large for a float: expected a finite number.")
        level = [
            x
            for parent in level
            if isinstance(parent, (dict, list))
            for x in (parent.values() if isinstance(parent, dict) else parent)
        ]
        depth += 1


def _check_types(where: str, data: Any, expected: Mapping[str, type] | None) -> None:
    if not isinstance(data, dict):
        raise PlanError(f"{where!r} is {data!r}: expected an object.")
    if expected is None:
        return
    check_keys(repr(where), data, tuple(expected))
    for key, kind in expected.items():
        if not isinstance(data[key], kind) or isinstance(data[key], bool):
            raise PlanError(f"{where}.{key} is {data[key]!r}: expected {kind.__name__}.")
