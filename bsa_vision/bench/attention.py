"""Attention alone: every case in all ways, alternating within one run, results checked before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bsa_vision.bench.case import Case, logits_std
from bsa_vision.bench.correct import Error, Truth
from bsa_vision.bench.memory import Memory, measure_memory
from bsa_vision.bench.ways import BASELINE, FOR_GPUS, WAYS, Ready, Setup, set_up
from bsa_vision.errors import BackendUnavailable
from bsa_vision.measure.timing import Timing, graphed, paired

# A peer slower than SLOW x dense in its warm-up runs SLOW_ROUNDS rounds only: its ratio is far from 1 whatever the noise, and
# it would take most of the command's time. It alternates with all the others in those rounds.
SLOW, SLOW_ROUNDS = 2.0, 2

# On a GPU, where dense attention takes less than this, launching takes a part of it: ways that can are timed as CUDA graphs.
SHORT = 1e-3

OK, WRONG, FAILED, NOT_RUN = "ok", "wrong", "failed", "not run"


@dataclass(frozen=True)
class Measurement:
    """One way on one case.

    status  "ok"; "wrong": a result is off by more than rounding; "failed": it broke; "not run": `reason` says why
    detail  the backend that ran, where there is a choice
    timing  over the rounds; ratios are to dense SDPA in the same round
    errors  name of a result ("out", "dq", ...) -> its error
    """

    way: str
    status: str
    reason: str = ""
    detail: str = ""
    timing: Timing | None = None
    errors: dict[str, Error] = field(default_factory=dict)
    memory: Memory | None = None

    @property
    def worst(self) -> tuple[str, Error] | None:
        """The result that comes nearest to what is allowed, or exceeds it most. NaN is worst of all."""
        if not self.errors:
            return None
        return max(
            self.errors.items(), key=lambda item: (item[1].found != item[1].found, item[1].found / item[1].allowed)
        )


@dataclass(frozen=True)
class Row:
    """One case.

    density       fraction of blocks computed over all heads, dense ones included: counted, not asked for
    head_density  of each head
    logits_std    standard deviation of the scaled logits
    checked       which part of the results was compared to the definition
    """

    case: Case
    density: float
    head_density: tuple[float, ...]
    num_blocks: int
    logits_std: float
    checked: str
    measurements: dict[str, Measurement]

    @property
    def ok(self) -> bool:
        return all(m.status in (OK, NOT_RUN) for m in self.measurements.values())

    def memory_ratio(self, way: str) -> float | None:
        """Peak memory of `way` over that of dense SDPA."""
        first, own = self.measurements[BASELINE].memory, self.measurements[way].memory
        return own.peak / first.peak if first and own and first.peak and own.peak is not None else None


def ways_of(case: Case, asked: Iterable[str] | None) -> tuple[str, ...]:
    """The ways of a row in the order they are run: dense SDPA first, because the others compare to it."""
    wanted = {BASELINE, *(WAYS if asked is None else asked)}
    if not case.rel_pos:
        wanted -= {"sdpa-bias"}
    if asked is None and torch.device(case.device).type != "cuda":
        wanted -= set(FOR_GPUS)
    return tuple(name for name in WAYS if name in wanted)


@dataclass(frozen=True)
class Options:
    """How to measure.

    ways     names of `WAYS`; dense SDPA is always among those measured; None = all, without those for GPUs elsewhere
    backend  what ours is told to use
    rounds   timed rounds of every way that is not slow
    memory   also peak memory, each way in a fresh process
    """

    ways: tuple[str, ...] | None = None
    backend: str = "auto"
    rounds: int = 5
    memory: bool = False


def num_steps(case: Case, options: Options) -> int:
    """How often `run_case` calls `on_step`."""
    ways = len(ways_of(case, options.ways))
    return ways * (2 if options.memory else 1) + 1 + options.rounds


def run_case(case: Case, options: Options, on_step: Callable[[str], Any] = lambda what: None) -> Row:
    """Prepare, check, time, and with `options.memory` weigh every way of one case.

    on_step  called with what comes next, `num_steps` times in all
    """
    setup = set_up(case, options.backend)
    found = dict(_check(setup, options, on_step))
    checked = found.pop("checked")
    ready = {name: pair[1] for name, pair in found.items() if pair[1] is not None}
    runs = {name: way.run for name, way in ready.items()}
    as_graphs: set[str] = set()
    timings = _time(runs, options.rounds, on_step, torch.device(case.device), as_graphs)
    density = tuple(1 - sparsity for sparsity in setup.masks.head_sparsity)
    std = logits_std(setup.inputs)
    blocks = case.layout.num_blocks
    del setup, ready  # memory is measured with as much of the machine free as there was at first
    measurements = {}
    for name, (measurement, _) in found.items():
        memory = None
        if options.memory:
            on_step(f"memory of {WAYS[name].title}")
            memory = measure_memory(case, name, options.backend) if measurement.status == OK else None
        detail = ", ".join(filter(None, (measurement.detail, "as a graph" if name in as_graphs else "")))
        measurements[name] = replace(measurement, timing=timings.get(name), memory=memory, detail=detail)
    return Row(case, sum(density) / len(density), density, blocks, std, checked, measurements)


def _check(setup: Setup, options: Options, on_step: Callable[[str], Any]) -> Iterator[tuple[str, Any]]:
    """(way, (Measurement without times, Ready or None)) of each way, and ("checked", what was)."""
    truth = Truth(setup)
    yield "checked", str(truth.sample)
    for name in ways_of(setup.case, options.ways):
        on_step(f"{WAYS[name].title}, first call")
        yield name, _check_one(name, setup, truth)


def _check_one(name: str, setup: Setup, truth: Truth) -> tuple[Measurement, Ready | None]:
    way = WAYS[name]
    reason = way.why_not(setup)
    if reason is not None:
        return Measurement(name, NOT_RUN, reason), None
    try:
        ready = way.prepare(setup)
        results = ready.run()  # compiles where there is something to compile
    except BackendUnavailable as error:
        return Measurement(name, NOT_RUN, str(error)), None
    except Exception as error:  # whatever a peer runs into on this machine must not end the run
        status = FAILED if name in ("ours", BASELINE) else NOT_RUN
        return Measurement(name, status, f"{type(error).__name__}: {first_line(error)}"), None
    biased = way.biased and setup.inputs.rel_pos is not None
    errors = truth.errors(ready, results, way.masked, biased)
    wrong = [f"{key} is off by {e.found:.1e}, allowed are {e.allowed:.1e}" for key, e in errors.items() if not e.ok]
    return Measurement(name, WRONG if wrong else OK, "; ".join(wrong), ready.detail, errors=errors), ready


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, shortened to fit below a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"


def _time(
    runs: dict[str, Callable[[], Any]],
    rounds: int,
    on_step: Callable[[str], Any],
    device: torch.device,
    as_graphs: set[str],
) -> dict[str, Timing]:
    """All ways alternating; the slow ones leave after SLOW_ROUNDS rounds. `as_graphs` receives those that were timed as such."""
    if BASELINE not in runs:  # nothing to compare to
        return {}
    on_step("warm-up")
    warm = paired(runs, rounds=1, warmup=0, device=device)
    if device.type == "cuda" and warm[BASELINE].median < SHORT:
        captured = {name: graphed(run, device) for name, run in runs.items()}
        found = {name: replay for name, replay in captured.items() if replay is not None}
        as_graphs |= set(found)
        runs = {**runs, **found}
    slow = {name for name, timing in warm.items() if timing.ratio > SLOW and name != "ours"}
    together = min(rounds, SLOW_ROUNDS) if slow else rounds
    timings = paired(runs, together, warmup=0, on_round=lambda: on_step("timing"), device=device)
    if together == rounds:
        return timings
    fast = {name: run for name, run in runs.items() if name not in slow}
    more = paired(fast, rounds - together, warmup=0, on_round=lambda: on_step("timing"), device=device)
    return {
        name: Timing(t.seconds + more[name].seconds, t.ratios + more[name].ratios) if name in more else t
        for name, t in timings.items()
    }
