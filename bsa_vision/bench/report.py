"""Rows -> JSON, and rows -> tables. Needs rich (the `cli` extra) for the tables only."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bsa_vision.bench.attention import BASELINE, FAILED, OK, SLOW, SLOW_ROUNDS, WRONG, Measurement, Row
from bsa_vision.bench.case import Case
from bsa_vision.bench.correct import Error
from bsa_vision.bench.machine import Machine
from bsa_vision.bench.models import ModelRow
from bsa_vision.bench.ways import WAYS
from bsa_vision.measure.timing import Timing

if TYPE_CHECKING:
    from rich.table import Table

# JSON


def to_json(
    kind: str, rows: Sequence[Row] | Sequence[ModelRow], machine: Machine, command: str, planned: int
) -> dict[str, Any]:
    """Everything a run found, raw seconds included. `planned` is how many rows there were to be."""
    return {
        "format": "bsa-vision/bench",
        "version": 1,
        "kind": kind,
        "command": command,
        "complete": len(rows) == planned,
        "ok": all(row.ok for row in rows),
        "machine": asdict(machine),
        "rows": [_row_json(row) if isinstance(row, Row) else _model_json(row) for row in rows],
    }


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "case": row.case.to_json(),
        "tokens": row.case.tokens,
        "blocks": row.num_blocks,
        "density": row.density,
        "head_density": list(row.head_density),
        "logits_std": row.logits_std,
        "checked": row.checked,
        "ok": row.ok,
        "ways": {name: _measurement_json(m, row.memory_ratio(name)) for name, m in row.measurements.items()},
    }


def _measurement_json(m: Measurement, memory_ratio: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {"status": m.status, "reason": m.reason, "backend": m.detail}
    found["timing"] = _timing_json(m.timing)
    found["errors"] = {name: _error_json(error) for name, error in m.errors.items()}
    if m.memory is not None:
        found["memory"] = {**asdict(m.memory), "ratio": memory_ratio}
    return found


def _timing_json(timing: Timing | None) -> dict[str, Any] | None:
    if timing is None:
        return None
    names = ("seconds", "ratios", "median", "ratio", "spread")
    return {name: getattr(timing, name) for name in names}


def _error_json(error: Error | None) -> dict[str, Any] | None:
    if error is None:
        return None
    return {"error": _finite(error.found), "allowed": _finite(error.allowed), "ok": error.ok}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _model_json(row: ModelRow) -> dict[str, Any]:
    return {
        "case": row.case.to_json(),
        "family": row.spec.family,
        "grid": list(row.spec.grid),
        "tokens": row.tokens,
        "layers": len(row.spec.layers),
        "heads": row.spec.layers[0].heads,
        "head_dim": row.spec.layers[0].head_dim,
        "density": row.density,
        "random_weights": row.case.random_weights,
        "backend": row.backend,
        "status": row.status,
        "reason": row.reason,
        "timing": {name: _timing_json(timing) for name, timing in row.timings.items()},
        "amdahl": None if row.amdahl is None else asdict(row.amdahl),
        "error": _error_json(row.error),
        "reference": row.reference,
        "difference_to_dense": _finite(row.difference),
        "dense_plan_difference": _finite(row.dense_plan),
        "dense_plan_swapped": _error_json(row.swapped),
        "restored": row.restored,
    }


# Which columns and labels a sweep needs

AXES: dict[str, Callable[[Case], str]] = {
    "grid": lambda case: f"{case.grid[0]}x{case.grid[1]}",
    "heads": lambda case: str(case.heads),
    "head dim": lambda case: str(case.head_dim),
    "dtype": lambda case: case.dtype,
    "device": lambda case: case.device,
    "batch": lambda case: str(case.batch),
    "pattern": lambda case: pattern_name(case),
}


def pattern_name(case: Any) -> str:
    """The pattern without what the density column says, or what only the draw depends on."""
    spec = dict(case.pattern.spec)
    name: str = spec.pop("pattern")
    said = [f"{value}" for key, value in spec.items() if key not in ("sparsity", "seed")]
    short = {"random_blocks": "random", "local_window": "local"}.get(name, name)
    return ":".join([short, *said])


def varying(cases: Sequence[Case]) -> list[str]:
    """The axes that are not the same for all cases."""
    return [name for name, read in AXES.items() if len({read(case) for case in cases}) > 1]


def labels(cases: Sequence[Case]) -> list[str]:
    """What tells a case from the others, density aside; for legends."""
    names = varying(cases)
    said = {"grid": "{} patches", "heads": "{} heads", "head dim": "head dim {}", "batch": "batch {}"}
    return [", ".join(said.get(name, "{}").format(AXES[name](case)) for name in names) for case in cases]


def constants(cases: Sequence[Case]) -> str:
    """What all cases share, as one line."""
    case, changing = cases[0], set(varying(cases))
    parts = {
        "grid": f"{AXES['grid'](case)} = {case.tokens:,} tokens",
        "heads": f"{case.heads} heads",
        "head dim": f"head dim {case.head_dim}",
        "dtype": case.dtype,
        "batch": f"batch {case.batch}",
        "pattern": f"pattern {pattern_name(case)}",
    }
    said = [text for name, text in parts.items() if name not in changing]
    if case.dense_heads:
        said.append(f"first {case.dense_heads} heads dense")
    orders = "/".join(dict.fromkeys(case.order for case in cases))
    said += [f"{orders} order, blocks of {case.block_size}", "forward + backward" if case.backward else "forward"]
    return ", ".join([*said, "relative position"] if case.rel_pos else said)


# Tables


def _table(names: Sequence[str], wide: bool, piped: bool) -> Table:
    """An empty table; names of text columns in LEFT. Narrow: headings word by word, nothing cut off."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.MARKDOWN if piped else box.SIMPLE_HEAD, pad_edge=piped, collapse_padding=not wide)
    for name in names:
        title = name if wide else re.sub("(?<![+/]) ", "\n", name.replace("FlexAttention", "Flex"))
        table.add_column(title, justify="left" if name in LEFT else "right", no_wrap=wide, overflow="fold")
    return table


LEFT = ("dtype", "device", "pattern", "model")


def attention_table(rows: Sequence[Row], wide: bool = True, piped: bool = False) -> Table:
    """One line per case: dense SDPA's median time, the other ways' ratios to it. Narrow: cells of two lines."""
    axes = varying([row.case for row in rows])
    ways = [name for name in WAYS if any(name in row.measurements for row in rows)]
    table = _table([*axes, "density", *(WAYS[way].title for way in ways), "error / allowed"], wide, piped)
    gap = " " if wide else "\n"
    for row in rows:
        cells = [AXES[name](row.case) for name in axes]
        cells.append(f"{row.density:.3f}")
        cells += [_cell(row.measurements.get(way), gap) for way in ways]
        table.add_row(*cells, _worst(row, gap))
    return table


def _cell(m: Measurement | None, gap: str) -> str:
    if m is None:
        return ""
    if m.status in (WRONG, FAILED):
        return "[bold red]ERROR[/]"
    if m.timing is None:
        return "[dim]not run[/]"
    if m.way == BASELINE:
        return seconds(m.timing.median)
    return _ratio(m.timing, gap)


def _ratio(timing: Timing, gap: str) -> str:
    low, high = timing.spread
    return f"[bold]{timing.ratio:.3f}[/]{gap}[dim]{low:.3g}-{high:.3g}[/]"


def _worst(row: Row, gap: str) -> str:
    """The error nearest to what is allowed, of all ways."""
    found = [m.worst[1] for m in row.measurements.values() if m.worst is not None]
    if not found:
        return ""
    error = max(found, key=lambda e: (e.found != e.found, e.found / e.allowed))
    text = f"{error.found:.0e}{gap}/ {error.allowed:.0e}"
    return text if row.ok else f"[bold red]{text}[/]"


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def memory_table(rows: Sequence[Row], wide: bool = True, piped: bool = False) -> Table:
    """One line per case: peak memory of each way over its process's baseline, and over dense SDPA's."""
    axes = varying([row.case for row in rows])
    ways = [name for name in WAYS if any(name in row.measurements for row in rows)]
    table = _table([*axes, "density", *(f"{WAYS[way].title}, MB" for way in ways)], wide, piped)
    gap = " " if wide else "\n"
    for row in rows:
        cells = [AXES[name](row.case) for name in axes] + [f"{row.density:.3f}"]
        for way in ways:
            m, ratio = row.measurements.get(way), row.memory_ratio(way)
            if m is None or m.memory is None or m.memory.peak is None:
                cells.append("[dim]not run[/]")
            else:
                size = f"{m.memory.peak / 1e6:.1f}"
                cells.append(size if way == BASELINE or ratio is None else f"{size}{gap}[bold]x {ratio:.2f}[/]")
        table.add_row(*cells)
    return table


def attention_notes(rows: Sequence[Row], rounds: int) -> list[str]:
    """What the tables do not say by themselves, one sentence or list item each."""
    over = "dense SDPA without the relative position" if rows[0].case.rel_pos else "dense SDPA"
    notes = [
        f"Columns after {WAYS[BASELINE].title}: time over that of {over} in the same round; median of {_rounds(rounds)}, smallest and "
        "largest."
    ]
    if any(m.timing and len(m.timing.ratios) < rounds for row in rows for m in row.measurements.values()):
        notes.append(f"Peers slower than {SLOW:g} x dense ran {SLOW_ROUNDS} of the {rounds} rounds.")
    backends = dict.fromkeys(m.detail for row in rows for m in row.measurements.values() if m.detail)
    if backends:
        notes.append(f"Ours ran on {', '.join(backends)}.")
    checked = "; ".join(dict.fromkeys(row.checked for row in rows))
    stds = [row.logits_std for row in rows]
    notes.append(
        f"Checked against the definition in float64: {checked} (logits of standard deviation {min(stds):.1f}"
        + (f" to {max(stds):.1f})." if max(stds) - min(stds) > 0.1 else ").")
    )
    notes += _reasons(rows)
    return notes


def _rounds(number: int) -> str:
    return f"{number} round{'s' if number > 1 else ''}"


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Why something did not run, or is wrong: each sentence once, whatever its numbers, and for how many rows it holds."""
    found: list[str] = []
    for row in rows:
        for way, m in row.measurements.items():
            if m.status != OK:
                word = "ERROR" if m.status in (WRONG, FAILED) else "Not run"
                found.append(f"{word}: {WAYS[way].title}: {m.reason}")
            if m.memory is not None and m.memory.reason:
                found.append(f"No memory figure: {WAYS[way].title}: {m.memory.reason}")
    alike: dict[str, list[str]] = {}
    for text in found:
        alike.setdefault(re.sub(r"[0-9][0-9.,e+-]*", "#", text), []).append(text)
    return [
        texts[0] if len(rows) == 1 else f"{texts[0]} ({len(texts)} of {len(rows)} rows)" for texts in alike.values()
    ]


def model_table(rows: Sequence[ModelRow], wide: bool = True, piped: bool = False) -> Table:
    """One line per model and size. Narrow: pixels below the model's name, density below the pattern's."""
    first = ["model", "pixels", "tokens", "pattern", "density"] if wide else ["model", "tokens", "pattern density"]
    table = _table([*first, "dense", "sparse", "error / allowed", "to dense", "dense plan"], wide, piped)
    gap = " " if wide else "\n"
    for row in rows:
        cells = [row.case.model.rpartition(":")[2], "x".join(map(str, row.case.image_size)), str(row.tokens)]
        cells += [pattern_name(row.case), f"{row.density:.3f}"]
        if not wide:
            cells = [f"{cells[0]}\n{cells[1]}", cells[2], f"{cells[3]}\n{cells[4]}"]
        table.add_row(*cells, *_model_cells(row, gap))
    return table


def model_constants(rows: Sequence[ModelRow]) -> str:
    """What the rows of a model table share, or have between them, as one line."""
    first = rows[0].spec
    kinds = [
        [row.case.dtype for row in rows],
        [f"batch {row.case.batch}" for row in rows],
        [f"{row.case.order} order" for row in rows],
    ]
    said = [f"{len(first.layers)} layers of {first.layers[0].heads} heads of {first.layers[0].head_dim}"]
    said = said if len({(len(row.spec.layers), row.spec.layers[0]) for row in rows}) == 1 else []
    said += ["/".join(dict.fromkeys(names)) for names in kinds]
    dense_heads = rows[0].case.dense_heads
    return ", ".join([*said, *([f"first {dense_heads} heads dense"] if dense_heads else []), "forward"])


def _model_cells(row: ModelRow, gap: str) -> list[str]:
    if not row.timings:
        return ["[bold red]ERROR[/]" if row.status == FAILED else "[dim]not run[/]", "", "", "", ""]
    sparse = _ratio(row.timings["sparse"], gap)
    error = "not checked" if row.error is None else f"{row.error.found:.0e}{gap}/ {row.error.allowed:.0e}"
    if row.status == WRONG:
        error = f"[bold red]ERROR[/]{gap}{error}"
    exact = "same bits" if row.dense_plan == 0 and row.restored else "[bold red]differs[/]"
    return [seconds(row.timings["dense"].median), sparse, error, f"{row.difference:.3f}", exact]


def model_notes(rows: Sequence[ModelRow], rounds: int) -> list[str]:
    notes = [
        f"Sparse: time over that of the dense original in the same round; median of {_rounds(rounds)}, smallest and largest."
    ]
    how = dict.fromkeys(row.reference for row in rows if row.reference)
    notes.append(
        "Error: features of the first image against the same masks applied in float64 by "
        f"{', '.join(how) or 'nothing'}; dense plan: the original against a plan of dense heads, and against the restored model."
    )
    if any(row.case.random_weights for row in rows):
        notes.append(
            "RANDOM WEIGHTS: the column 'to dense' (relative difference of the features) says nothing about the quality of a "
            "trained model."
        )
    notes += [_amdahl_note(row) for row in rows if row.timings]
    backends = dict.fromkeys(row.backend for row in rows if row.backend)
    notes += [f"Sparse layers ran on {', '.join(backends)}."] if backends else []
    word = {WRONG: "ERROR", FAILED: "ERROR"}
    notes += [f"{word.get(row.status, 'Not run')}: {row.case.model}: {row.reason}" for row in rows if row.status != OK]
    return notes


def _amdahl_note(row: ModelRow) -> str:
    """What the dense time is made of, what sparsity could make of it, and what swapping costs."""
    height, width = row.case.image_size
    plan = f"{row.case.model.rpartition(':')[2]} {height}x{width}: a plan of dense heads takes {row.timings['dense plan'].ratio:.3f} of the original's time"
    if row.amdahl is None:
        return f"{plan}."
    return (
        f"{plan}; attention is {row.amdahl.share:.0%} of the dense time, so at density {row.density:.3f} Amdahl's law allows {row.amdahl.bound:.2f}; "
        f"reached: {row.amdahl.reached:.2f} of that speed, time outside attention {row.amdahl.outside:.3f} of the original's."
    )
