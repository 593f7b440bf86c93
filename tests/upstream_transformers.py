"""Run transformers' own model tests on swapped models: no test may fail that the originals pass.

    python tests/upstream_transformers.py PATH [MODEL ...]

PATH is a checkout of transformers (or its tests/, conftest.py and pyproject.toml), preferably of
the installed version. Every model with a vision encoder that a test creates or loads gets sparse
heads. This is not part of CI: it takes a few minutes per model. Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
MODELS = ("vit", "dinov2", "dinov3_vit", "sam", "sam2", "clip", "siglip")
# Tests that check the name of the attention implementation, which differs in swapped layers.
EXPECTED_FAILURES = {
    "test_attn_implementation_composite_models": "expects _attn_implementation 'eager' everywhere"
}
REPEATS = 2  # a failure must occur in all of these runs: some tests draw random numbers


class Results:
    """A pytest plugin that records the outcome of every test."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.errors: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.outcome == "failed":
            self.outcomes[report.nodeid] = "failed"
            lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
            self.errors[report.nodeid] = " ".join(lines[:2])[:300]
        elif report.when == "call" or report.outcome == "skipped":
            self.outcomes.setdefault(report.nodeid, report.outcome)


class Swapped:
    """A pytest plugin that gives every model sparse heads when it is created or loaded."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def pytest_sessionstart(self, session: Any) -> None:
        from transformers import PreTrainedModel

        from bsa_vision.adapters.swap.sparse_layer import SparseLayer

        made, loaded = PreTrainedModel.post_init, PreTrainedModel.from_pretrained.__func__
        attend, fall_back = SparseLayer.attend, SparseLayer.fall_back

        def post_init(model: Any) -> None:
            made(model)
            self.swap(model)

        def from_pretrained(kind: Any, *args: Any, **kwargs: Any) -> Any:
            found = loaded(kind, *args, **kwargs)
            self.swap(found[0] if isinstance(found, tuple) else found)
            return found

        def counted_attend(layer: Any, *args: Any, **kwargs: Any) -> Any:
            kind = "dense" if layer.masks.all_dense else "sparse"
            self.counts[f"calls of {kind} layers"] += 1
            return attend(layer, *args, **kwargs)

        def counted_fall_back(layer: Any, reason: str) -> None:
            self.counts[f"fell back: {reason.partition(' of ')[0][:60]}"] += 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some tests count warnings
                fall_back(layer, reason)

        PreTrainedModel.post_init = post_init
        PreTrainedModel.from_pretrained = classmethod(from_pretrained)
        SparseLayer.attend, SparseLayer.fall_back = counted_attend, counted_fall_back

    def swap(self, model: Any) -> None:
        import bsa_vision as bsa
        from bsa_vision.adapters.swap.sparse_layer import layers_of

        if layers_of(model) or any(parameter.is_meta for parameter in model.parameters()):
            return
        try:
            plan = bsa.dense_plan(model)
        except bsa.PlanError:  # a text model, a mask decoder
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                plan = bsa.uniform_plan(model, "local_window", radius=1, block_size=16, tile=(4, 4))
            except bsa.PlanError:  # all layers are windowed
                self.counts["models without a global layer"] += 1
            bsa.sparsify_(model, plan)
        self.counts["models swapped"] += 1


def inside(checkout: str, out: str, how: str, *tests: str) -> None:
    """Run tests in this process and write their results to the file `out`."""
    import pytest

    results, swapped = Results(), Swapped()
    plugins = [results, swapped] if how == "swapped" else [results]
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-W", "ignore", "--rootdir", checkout]
    pytest.main(
        [*options, "-k", "not IntegrationTest and not Pipeline and not pipeline", *tests],
        plugins=plugins,
    )
    found = {"outcomes": results.outcomes, "errors": results.errors, "counts": swapped.counts}
    Path(out).write_text(json.dumps(found))


def run(checkout: Path, how: str, tests: list[str]) -> dict[str, Any]:
    """Run tests in a separate process: the checkout also has a package named `tests`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        path = os.pathsep.join(
            filter(None, [str(checkout), str(REPOSITORY), os.environ.get("PYTHONPATH")])
        )
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, "-P", __file__, "--inside", str(checkout), str(out), how, *tests]
        done = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, text=True
        )
        if not out.exists():
            sys.exit(f"the tests did not run:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(out.read_text())
        if not found["outcomes"]:
            sys.exit(f"no test was collected:\n{done.stdout[-3000:]}")
        return found


def compare(checkout: Path, name: str) -> dict[str, str]:
    """Print the results of one model; return the tests that fail only when swapped, and why."""
    tests = [f"tests/models/{name}/test_modeling_{name}.py"]
    original, swapped = (run(checkout, how, tests) for how in ("original", "swapped"))
    for how, found in (("original", original), ("swapped", swapped)):
        print(f"{name}, {how}: {dict(Counter(found['outcomes'].values()))}", flush=True)
    print(f"  {swapped['counts']}")
    new = [test for test, outcome in swapped["outcomes"].items() if outcome == "failed"]
    new = [test for test in new if original["outcomes"].get(test) != "failed"]
    errors = {test: swapped["errors"][test] for test in new}
    for _ in range(REPEATS):
        if errors:
            again_swapped, again_original = (
                run(checkout, how, list(errors))["outcomes"] for how in ("swapped", "original")
            )
            errors = {
                test: error
                for test, error in errors.items()
                if again_swapped.get(test) == "failed" and again_original.get(test) != "failed"
            }
    for test, error in errors.items():
        reason, title = expected_failure(test), test.partition("::")[2]
        print(f"  {'expected' if reason else 'NEW'}: {title}: {reason or error}", flush=True)
    return {test: error for test, error in errors.items() if not expected_failure(test)}


def expected_failure(test: str) -> str | None:
    """Return why this test is expected to fail, if it is."""
    return EXPECTED_FAILURES.get(test.rpartition("::")[2].partition("[")[0])


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if sys.argv[1] == "--inside":
        inside(*sys.argv[2:])
        return
    checkout = Path(sys.argv[1]).resolve()
    if not (checkout / "tests" / "test_modeling_common.py").exists():
        sys.exit(
            f"{checkout} has no tests/test_modeling_common.py: expected a checkout of transformers."
        )
    new = [test for name in sys.argv[2:] or MODELS for test in compare(checkout, name)]
    sys.exit(f"{len(new)} tests fail on swapped models only" if new else 0)


if __name__ == "__main__":
    main()
