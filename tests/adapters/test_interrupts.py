"""Ctrl-C at every line of the calls that change a model: `restore_` always restores it.

A trace function raises KeyboardInterrupt at a chosen line of this package, or of torch's code that
registers hooks.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bsa_vision as bsa
from bsa_vision.adapters import sparsify as adapters
from bsa_vision.adapters.swap import sparse_layer as layers
from tests.helpers import models, sam_models, timm_models

pytestmark = pytest.mark.slow  # every line is interrupted

PACKAGE = str(Path(bsa.__file__).parent)
SMALL = dict(radius=1, tile=(2, 4), block_size=8)

FAMILIES: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "transformers": lambda: (models.make("dinov2", num_hidden_layers=2), models.image()),
    "timm": lambda: (timm_models.make("vit"), timm_models.image(batch=1)),
    "segment_anything": lambda: (
        sam_models.make("segment_anything", depth=2),
        sam_models.image(batch=1),
    ),
}


# Functions that change a model: each of their lines is interrupted every time it runs. Functions
# that only read it are interrupted the first time.
CHANGES = {
    *("sparsify_", "restore_", "put_back", "sparse", "observe", "dense"),
    *("always", "eval_mode", "leave"),
    *("watch", "unwatch", "attach", "detach"),
    *("swap", "unswap", "check_swapped", "prepare", "register_forward_pre_hook"),
}
TORCH = ("torch/nn/modules/module.py", "torch/utils/hooks.py")

Point = tuple[str, str, int, int]  # function, file, line, and how often it has run


class Trace:
    """A trace function that counts how often lines run, and interrupts one of them."""

    def __init__(
        self, at: Point | None = None, only: Callable[[Any], bool] = lambda code: True
    ) -> None:
        self.at, self.only = at, only
        self.times: Counter[tuple[str, str, int]] = Counter()
        self.points: list[Point] = []

    def __call__(self, frame: Any, event: str, arg: Any) -> Any:
        code = frame.f_code
        file, changes = code.co_filename, code.co_name in CHANGES
        traced = file.startswith(f"{PACKAGE}/adapters/") or (
            changes and (file.startswith(PACKAGE) or file.endswith(TORCH))
        )
        return partial(self.line, changes) if traced and self.only(code) else None

    def line(self, changes: bool, frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            where = (frame.f_code.co_name, frame.f_code.co_filename, frame.f_lineno)
            self.times[where] += 1
            point = (*where, self.times[where])
            if changes or self.times[where] == 1:
                self.points.append(point)
            if point == self.at:
                raise KeyboardInterrupt  # Python then ends tracing
        return partial(self.line, changes)


@contextmanager
def tracing(trace: Trace):
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class Watched:
    """A model, with a record of its original state and output."""

    def __init__(self, family: str) -> None:
        self.model, self.pixels = FAMILIES[family]()
        self.plan = bsa.uniform_plan(self.model, "local_window", **SMALL)
        self.before = self.state()
        self.output = self.run()

    def state(self) -> list[Any]:
        hooks = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks")
        return [
            (type(module), dict(module.__dict__), [dict(getattr(module, name)) for name in hooks])
            for module in self.model.modules()
        ]

    def run(self) -> torch.Tensor:
        with torch.no_grad():
            out = self.model(self.pixels)
        return out if isinstance(out, torch.Tensor) else out.last_hidden_state

    def bring_back(self) -> None:
        """Restore the model as a user would, and compare it with its original state."""
        if layers.layers_of(self.model) or layers.watching(self.model):
            bsa.restore_(self.model)
        with pytest.raises(ValueError, match="nothing to restore"):
            bsa.restore_(self.model)
        assert self.state() == self.before

    def at_every_line(
        self,
        call: Callable[[], Any],
        prepare: Callable[[], Any] = lambda: None,
        only: Any = lambda code: True,
    ) -> int:
        """Interrupt `call` at every line, each time from the same state; return their number."""
        prepare()
        call()  # fill caches
        self.bring_back()
        prepare()
        with tracing(trace := Trace(only=only)):
            call()
        self.bring_back()
        for point in trace.points:
            prepare()
            with tracing(Trace(point, only)), pytest.raises(KeyboardInterrupt):
                call()
            self.bring_back()
        assert torch.equal(self.run(), self.output)
        return len(trace.points)


@pytest.fixture(params=FAMILIES)
def watched(request):
    return Watched(request.param)


@pytest.fixture
def end_tracing():
    """End tracing after a test, also if it fails."""
    yield
    sys.settrace(None)


def test_sparsify(watched):
    assert watched.at_every_line(lambda: bsa.sparsify_(watched.model, watched.plan)) > 100


def test_restore(watched):
    swap = partial(bsa.sparsify_, watched.model, watched.plan)
    assert watched.at_every_line(lambda: bsa.restore_(watched.model), swap) > 50


def test_observe(watched):
    def call(run: Callable[[], Any] = lambda: None):
        with bsa.observe(watched.model, seen.append):
            run()

    seen: list[Any] = []
    # Without sparsify_ and restore_, which are tested above.
    ends = {"observe", "sparse", "always", "<lambda>", "like_of", "output_weight"}
    assert watched.at_every_line(call, only=lambda code: code.co_name in ends) > 20
    assert not seen
    call(watched.run)  # it still observes
    assert seen


def test_dense(watched):
    """An interruption must not leave the model dense."""

    def call():
        with bsa.dense(watched.model):
            pass

    bsa.sparsify_(watched.model, watched.plan)
    sparse = watched.run()
    with tracing(trace := Trace()):
        call()
    for point in trace.points:
        with tracing(Trace(point)), pytest.raises(KeyboardInterrupt):
            call()
        assert not any(layer.encoder.dense for layer in layers.layers_of(watched.model)), point
    assert torch.equal(watched.run(), sparse)
    assert not torch.equal(sparse, watched.output)


def test_the_second_time_as_well(watched, monkeypatch, end_tracing):
    """Interrupt every line of the cleanup after a first interruption."""
    put_back, second = adapters.put_back, [Trace()]

    def interrupted(*args):
        sys.settrace(second[-1])  # the first interruption ended tracing
        put_back(*args)

    def swap(first: Point) -> None:
        with tracing(Trace(first)), pytest.raises(KeyboardInterrupt):
            bsa.sparsify_(watched.model, watched.plan)

    with tracing(trace := Trace()):
        bsa.sparsify_(watched.model, watched.plan)
    watched.bring_back()
    monkeypatch.setattr(adapters, "put_back", interrupted)
    # All layers but the last are swapped.
    first = [point for point in trace.points if point[0] == "swap"][-1]
    swap(first)
    watched.bring_back()
    left = 0
    for point in second[0].points:
        second.append(Trace(point))
        swap(first)
        second.append(Trace())
        if layers.layers_of(watched.model) or layers.watching(watched.model):
            left += 1
            with pytest.raises(ValueError, match=r"call restore_\(model\) first"):
                bsa.sparsify_(watched.model, watched.plan)
        watched.bring_back()
    assert left > 10  # the counter-check: some models were left half restored


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_removed_after_an_interruption(family):
    """Remove a block, deleted or kept elsewhere, from a half restored model."""
    for keep in (False, True):
        watched = Watched(family)
        bsa.sparsify_(watched.model, watched.plan)
        path = layers.layers_of(watched.model)[0].spec.name.split(".")
        blocks = watched.model.get_submodule(".".join(path[: path.index("0")]))
        with tracing(trace := Trace()):
            bsa.restore_(watched.model)
        halfway = [point for point in trace.points if point[0] == "unswap"][-1]
        bsa.sparsify_(watched.model, watched.plan)
        with tracing(Trace(halfway)), pytest.raises(KeyboardInterrupt):
            bsa.restore_(watched.model)
        removed = blocks[0] if keep else None
        del blocks[0]
        if layers.layers_of(watched.model) or layers.watching(watched.model):
            bsa.restore_(watched.model)
        assert not layers.layers_of(watched.model)
        assert not layers.watching(watched.model)
        if keep and layers.layers_of(removed):
            bsa.restore_(removed)
        bsa.sparsify_(watched.model, bsa.dense_plan(watched.model))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ends_of_tune(family, tmp_path):
    """Interrupt `tune` where it swaps and restores plans, with existing statistics."""
    watched = Watched(family)
    watched.model.train()
    watched.before = watched.state()
    images = [
        torch.randn(watched.pixels.shape, generator=torch.Generator().manual_seed(i))
        for i in range(3)
    ]
    options = dict(
        sparsity=0.2,
        statistics=tmp_path / "statistics",
        candidates=["local_window"],
        order="raster",
    )
    tune = partial(bsa.tune, watched.model, images, resume=True, block_size=16, **options)
    tune()
    ends = {"sparse", "always", "leave", "eval_mode", "restore_", "put_back"}
    ends |= {"unswap", "watch", "swap"}
    with tracing(trace := Trace(only=lambda code: code.co_name in ends)):
        tune()
    points = trace.points[:: max(1, len(trace.points) // 12)] + trace.points[-8:]
    for point in points:
        with tracing(Trace(point, trace.only)), pytest.raises(KeyboardInterrupt):
            tune()
        watched.bring_back()
    assert len(points) > 15
