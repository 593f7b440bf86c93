"""Format rows as JSON, and as a table with notes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from bsa_vision.bench.attention import FAILED, NOT_RUN, OK, WRONG, Measurement, Row
from bsa_vision.bench.implementations import IMPLEMENTATIONS
from bsa_vision.masks import Pattern
from bsa_vision.measure.timing import Timing
from bsa_vision.plans import text_table
from bsa_vision.storage.machine import Machine


def to_json(
    kind: str, rows: Sequence[Row], machine: Machine, command: str, planned: int
) -> dict[str, Any]:
    """Return all results of a run; `planned` is the intended number of rows."""
    about = {"format": "bsa-vision/bench", "version": 2, "kind": kind, "command": command}
    ok, complete = all(row.ok for row in rows), len(rows) == planned
    return {**about, "complete": complete, "ok": ok, **to_data(dict(machine=machine, rows=rows))}


def to_data(value: Any) -> Any:
    """Convert to JSON types: dataclasses to dicts, patterns to specs, NaN and infinity to None."""
    if isinstance(value, Pattern):
        return value.spec
    if isinstance(value, Timing):
        names = ("seconds", "ratios", "median", "ratio", "spread")
        return {name: getattr(value, name) for name in names}
    if is_dataclass(value):
        return {field.name: to_data(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: to_data(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_data(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def pattern_name(pattern: Pattern) -> str:
    """Name the pattern without its density, which has its own column, and without its seed."""
    spec = dict(pattern.spec)
    name: str = spec.pop("pattern")
    values = [str(value) for key, value in spec.items() if key not in ("sparsity", "seed")]
    return ":".join([{"random_blocks": "random", "local_window": "local"}.get(name, name), *values])


def describe(case: Any) -> str:
    """Return the options that all rows of a run share, in one line."""
    shared = {name: value for name, value in vars(case).items() if value and name != "pattern"}
    texts = {k: "x".join(map(str, v)) if isinstance(v, tuple) else v for k, v in shared.items()}
    return ", ".join(k if v is True else f"{k} {v}" for k, v in texts.items())


def table(rows: Sequence[Row]) -> list[str]:
    """Return one line per row: the median time of the first column, ratios in the others."""
    names = list(dict.fromkeys(name for row in rows for name in row.implementations))
    titles = [IMPLEMENTATIONS[name].title if name in IMPLEMENTATIONS else name for name in names]
    lines = [("pattern", "density", *titles, "error / allowed")]
    for row in rows:
        cells = [_cell(row.implementations.get(name), name == names[0]) for name in names]
        errors = [error for m in row.implementations.values() for error in m.errors.values()]
        worst = max(errors, key=lambda e: (not e.ok, e.found / e.allowed), default="")
        lines.append((pattern_name(row.case.pattern), f"{row.density:.3f}", *cells, str(worst)))
    return text_table.lines(lines)


def _cell(m: Measurement | None, is_first: bool) -> str:
    if m is None or m.status in (WRONG, FAILED) or m.timing is None:
        return "" if m is None else "ERROR" if m.status in (WRONG, FAILED) else NOT_RUN
    if is_first:
        median = m.timing.median
        return f"{median:.2f} s" if median >= 1 else f"{median * 1e3:.3g} ms"
    low, high = m.timing.spread
    return f"{m.timing.ratio:.3f} ({low:.3g}-{high:.3g})"


def notes(rows: Sequence[Row], rounds: int) -> list[str]:
    """Return the notes below the table, each once."""
    first, *_ = rows[0].implementations
    title = IMPLEMENTATIONS[first].title if first in IMPLEMENTATIONS else "the dense model"
    lines = [f"Ratios: time / time of {title} in the same round, median of {rounds} rounds."]
    for row in rows:
        lines.append(f"Checked against the reference in float64: {row.checked}.")
        lines += row.notes
        for name, m in row.implementations.items():
            lines += [f"Backend of {name}: {m.backend}."] if m.backend else []
            if m.status != OK:
                word = "Not run" if m.status == NOT_RUN else "ERROR"
                lines.append(f"{word}: {name}: {m.reason}")
    return list(dict.fromkeys(lines))
