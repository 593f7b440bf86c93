"""One attention call with every implementation: results are checked first, then timed in turn."""

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
    """One implementation on one case.

    status  OK, WRONG (a result is off by more than rounding), FAILED or NOT_RUN, with a reason
    errors  name of a result ("out", "dq", ...) -> its error
    timing  ratios are to the first implementation in the same round
    """

    status: str = OK
    reason: str = ""
    backend: str = ""
    errors: dict[str, Error] = field(default_factory=dict)
    timing: Timing | None = None


@dataclass(frozen=True)
class Row:
    """What was found for one case.

    density          realised share of blocks that are computed, all heads together
    checked          which part of the results was compared with the definition
    implementations  name -> measurement; the first one is what the others are compared with
    """

    case: Any
    density: float
    checked: str
    implementations: dict[str, Measurement]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return all(one.status in (OK, NOT_RUN) for one in self.implementations.values())


OnStep = Callable[[str], Any]  # is told what comes next


def selected(case: Case, asked: Iterable[str] | None) -> list[str]:
    """Name the implementations to run, dense SDPA first; None = all that make sense here."""
    skipped = () if torch.device(case.device).type == "cuda" else FOR_GPUS
    wanted = {BASELINE, *((set(IMPLEMENTATIONS) - set(skipped)) if asked is None else asked)}
    return [name for name in IMPLEMENTATIONS if name in wanted]


def run_case(
    case: Case, asked: Iterable[str] | None, rounds: int, on_step: OnStep = lambda what: None
) -> Row:
    """Prepare, check and time the implementations."""
    on_step("computing the reference")
    inputs = make_inputs(case)
    reference = Reference(inputs)
    runs: dict[str, Callable[[], Any]] = {}
    found: dict[str, Measurement] = {}
    for name in selected(case, asked):
        on_step(f"first call of {IMPLEMENTATIONS[name].title}")
        try:
            prepared = IMPLEMENTATIONS[name].prepare(inputs)
            results = prepared.packed_results()  # compiles where there is something to compile
            errors = reference.errors(results, IMPLEMENTATIONS[name].is_dense)
            found[name], runs[name] = judged(errors, prepared.backend), prepared.run
        except BackendUnavailable as error:
            found[name] = Measurement(NOT_RUN, str(error))
        except Exception as error:  # a peer that breaks on this machine must not end the run
            status = FAILED if name in (BSA, BASELINE) else NOT_RUN
            found[name] = Measurement(status, first_line(error))
    on_step("timing")
    if BASELINE in runs:
        timings, graphs = paired_graphs(runs, rounds, torch.device(case.device))
        for name, timing in timings.items():
            how = ", ".join(filter(None, (found[name].backend, "as a graph" * (name in graphs))))
            found[name] = replace(found[name], timing=timing, backend=how)
    return Row(case, 1 - inputs.masks.sparsity, reference.checked, found)


def judged(errors: dict[str, Error], backend: str = "") -> Measurement:
    """Return a measurement, still without times, that says which results are wrong."""
    wrong = [f"error of {name} / allowed: {one}" for name, one in errors.items() if not one.ok]
    return Measurement(WRONG if wrong else OK, "; ".join(wrong), backend, errors)
