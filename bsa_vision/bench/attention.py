"""Benchmark one attention call: check the results of every implementation, then time them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bsa_vision.bench.case import Case, make_inputs
from bsa_vision.bench.implementations import BASELINE, BSA, FOR_GPUS, IMPLEMENTATIONS
from bsa_vision.bench.reference import Error, Reference
from bsa_vision.errors import BackendUnavailable, first_line
from bsa_vision.measure.timing import Timing, paired_graphs

OK, WRONG, FAILED, NOT_RUN = "ok", "wrong", "failed", "not run"


@dataclass(frozen=True)
class Measurement:
    """The measurement of one implementation on one case.

    status  OK, WRONG (an error exceeds the allowed rounding), FAILED or NOT_RUN
    reason  why the status is not OK
    errors  name of a result ("out", "dq", ...) -> its error
    timing  with ratios to the first implementation in the same round
    """

    status: str = OK
    reason: str = ""
    backend: str = ""
    errors: dict[str, Error] = field(default_factory=dict)
    timing: Timing | None = None


@dataclass(frozen=True)
class Row:
    """The measurements of one case.

    density          realised share of computed blocks over all heads
    checked          which part of the results was compared with the reference
    implementations  name -> measurement; the first one is the baseline
    """

    case: Any
    density: float
    checked: str
    implementations: dict[str, Measurement]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return all(m.status in (OK, NOT_RUN) for m in self.implementations.values())


OnStep = Callable[[str], Any]  # called with the name of the next step


def selected(case: Case, asked: Iterable[str] | None) -> list[str]:
    """Return the implementations to run, dense SDPA first; None = all that the device can run."""
    skipped = () if torch.device(case.device).type == "cuda" else FOR_GPUS
    wanted = {BASELINE, *((set(IMPLEMENTATIONS) - set(skipped)) if asked is None else asked)}
    return [name for name in IMPLEMENTATIONS if name in wanted]


def run_case(
    case: Case, asked: Iterable[str] | None, rounds: int, on_step: OnStep = lambda what: None
) -> Row:
    """Prepare, check and time the implementations of one case."""
    on_step("computing the reference")
    inputs = make_inputs(case)
    reference = Reference(inputs)
    runs: dict[str, Callable[[], Any]] = {}
    found: dict[str, Measurement] = {}
    for name in selected(case, asked):
        on_step(f"first call of {IMPLEMENTATIONS[name].title}")
        try:
            prepared = IMPLEMENTATIONS[name].prepare(inputs)
            results = prepared.packed_results()  # the first call may compile
            errors = reference.errors(results, IMPLEMENTATIONS[name].is_dense)
            found[name], runs[name] = judged(errors, prepared.backend), prepared.run
        except BackendUnavailable as error:
            found[name] = Measurement(NOT_RUN, str(error))
        except Exception as error:  # a broken implementation must not end the run
            status = FAILED if name in (BSA, BASELINE) else NOT_RUN
            found[name] = Measurement(status, first_line(error))
    on_step("timing")
    if BASELINE in runs:
        timings, graphs = paired_graphs(runs, rounds, torch.device(case.device))
        for name, timing in timings.items():
            graph = "as a graph" if name in graphs else ""
            backend = ", ".join(filter(None, (found[name].backend, graph)))
            found[name] = replace(found[name], timing=timing, backend=backend)
    return Row(case, 1 - inputs.masks.sparsity, reference.checked, found)


def judged(errors: dict[str, Error], backend: str = "") -> Measurement:
    """Return a measurement without times; its status depends on the errors."""
    wrong = [f"error of {name} / allowed: {e}" for name, e in errors.items() if not e.ok]
    return Measurement(WRONG if wrong else OK, "; ".join(wrong), backend, errors)
