"""`tune`: a plan for a budget, from statistics, candidates and a solver, checked on images that none of these saw."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from bsa_vision.adapters import inspect, observe
from bsa_vision.adapters.swap.values import state
from bsa_vision.errors import PlanError
from bsa_vision.masks import TokenLayout
from bsa_vision.masks.layout import ORDERS
from bsa_vision.measure.latency import Latency
from bsa_vision.measure.latency import latency as latency_here
from bsa_vision.models.features import eval_mode, features
from bsa_vision.plans.model_spec import LayerSpec, ModelSpec
from bsa_vision.plans.plan import SparsityPlan
from bsa_vision.tuning import candidates as table
from bsa_vision.tuning import distributed
from bsa_vision.tuning.calibration import OnStep, Options, calibrate
from bsa_vision.tuning.images import VERIFY, check_images, split
from bsa_vision.tuning.report_data import describe
from bsa_vision.tuning.search import Search
from bsa_vision.tuning.store import Store, digest
from bsa_vision.tuning.trial import (
    Target,
    layer_errors,
)

ROUNDS = 6  # of adjusting a plan until what was asked for holds where it is measured
TIMED = 5  # rounds of a measured speed-up


def tune(
    model: nn.Module,
    images: Iterable[Any],
    *,
    sparsity: float | None = None,
    max_error: float | None = None,
    speedup: float | None = None,
    layers: Iterable[int | str] | None = None,
    candidates: Sequence[str] = table.NAMES,
    order: str = "auto",
    tile: tuple[int, int] = (8, 16),
    block_size: int = 128,
    verify: float = VERIFY,
    target: Target = features,
    seed: int = 0,
    latency: Latency | None = None,
    statistics: str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_step: OnStep = lambda what, done, of: None,
) -> SparsityPlan:
    """A plan for `model`, chosen on some of `images` and checked on the others.

    images      what `target` takes with the model, all of one size: by default pixels (B, 3, h, w). At least two; 24 are good
    sparsity    fraction of the blocks of all tuned layers to skip, 0 to 1: least error among those plans; or
    max_error   relative L2 error of the target, mean over images: as sparse as it gets while the mean over images like those kept back
                stays below it, at 99 % confidence; or
    speedup     of the target, how many times as fast as dense: least error among those plans; measured here, and adjusted until it holds
    layers      indices, keys or module paths; None = all that attend to the whole image
    candidates  among "static" (best blocks of the mean map), "local_window", "axial", "strided", "special"
    order       of tokens: "tile", "raster", or "auto", whichever loses least on a few of the images
    tile        (rows, columns) in patches, and half as high and twice as wide when orders are compared
    verify      share of the images that is kept back
    target      (model, image) -> the features that are used; their error is what counts
    seed        of which images are kept back
    latency     what attention costs, for `speedup`; None = `bsa.latency`, measured here
    statistics  a file that keeps what was measured, so that another budget needs no new pass over the images
    resume      go on from that file, whether it is complete or not
    on_step     (what is done, how much of it, of how much), for progress bars

    The model must have no sparse heads, and has none afterwards. `plan.report` holds what was predicted and measured, `bsa.report` makes a
    page of it. Where `torch.distributed` has a process group, its processes share the images: all must be given all of them, and all get
    the plan. After Ctrl-C the KeyboardInterrupt says what is saved. ValueError or PlanError for budgets that cannot be met (with what can), too few images, images of several sizes, and
    results that are not finite; FileExistsError for statistics that would be overwritten.
    """
    _check_installed()
    name, wanted = _asked({"sparsity": sparsity, "max_error": max_error, "speedup": speedup})
    spec = inspect(model)
    images = check_images(images, target)
    chosen, held_out = split(images, verify, seed)
    if name == "max_error" and len(held_out) < 2:
        raise ValueError(
            f"{len(images)} images, of which 1 is held out: one image says nothing about how far "
            "others are from it; give max_error more images (24 are good), or a larger verify=."
        )
    layout = _layout_options(order, tile, block_size)
    options = Options(layers_to_tune(spec, layers), _names(candidates), target, layout)
    store = Store(statistics)
    identity = _identity(model, spec, options)
    identity |= {"images": digest(chosen), "held_out": digest(held_out)}
    _check_processes(identity)
    calibration = store.open(identity, resume)
    try:
        with eval_mode(model):
            tuned = calibrate(model, chosen, calibration, store, options, on_step)
            mine = distributed.share(held_out)
            if name == "speedup" and latency is None:
                latency = _latency(model, chosen[0], target, options.layers[0])
            trials = Search(tuned, model, name, wanted, mine, held_out[0], target, latency, on_step)
            best = trials.search()
            measured = layer_errors(model, best.plan, mine, target, options.layers)
            curve = trials.curve()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"tune was interrupted: {store.interrupted}") from None
    about = {"calibration": len(chosen), "held_out": len(held_out), "seed": seed}
    notes = describe(
        tuned, best, trials.tried, {name: wanted}, about, calibration.orders, measured, curve
    )
    return replace(best.plan, notes={"tuned": notes})


def _check_installed() -> None:
    """Before minutes are spent."""
    try:
        import safetensors.torch  # noqa: F401
        import scipy.optimize  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"tuning needs scipy and safetensors ({error}): plans that exist, and everything else, work without; pip install 'bsa-vision[tune]'."
        ) from None


def _asked(asked: dict[str, float | None]) -> tuple[str, float]:
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"tune got {', '.join(given) or 'no budget'}: exactly one of {', '.join(asked)} is needed; give e.g. sparsity=0.5."
        )
    ((name, value),) = given.items()
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = number and (
        0 <= value < 1
        if name == "sparsity"
        else 0 < value < math.inf
        if name == "max_error"
        else 1 <= value < math.inf
    )
    if not fits:
        allowed = {
            "sparsity": "a fraction from 0 to below 1",
            "max_error": "an error above 0",
            "speedup": "at least 1",
        }
        percent = number and name == "sparsity" and 1 < value < 100
        example = f"{value / 100:g} for {value:g} %" if percent else "such a number"
        raise ValueError(f"{name}={value!r}: expected {allowed[name]}; give {example}.")
    if name == "max_error" and value > 1:
        warnings.warn(
            f"max_error={value!r} allows errors larger than the features themselves: it is relative, 0.05 is 5 %.",
            stacklevel=3,
        )
    return name, float(value)


def _names(candidates: str | Sequence[str]) -> tuple[str, ...]:
    names = (candidates,) if isinstance(candidates, str) else tuple(candidates)
    if not names or not {*names} <= {*table.NAMES}:
        raise ValueError(
            f"candidates={list(names)}: allowed are {', '.join(table.NAMES)}; choose among them."
        )
    return names


def _layout_options(order: str, tile: tuple[int, int], block_size: int) -> dict[str, Any]:
    if order not in ("auto", *ORDERS):
        raise ValueError(f"order={order!r}: allowed are 'auto', {', '.join(map(repr, ORDERS))}.")
    TokenLayout((1, 1), tile=tile, block_size=block_size)  # checks both
    return {"order": order, "tile": tile, "block_size": block_size}


def _identity(model: nn.Module, spec: ModelSpec, options: Options) -> dict[str, Any]:
    """Return what statistics depend on, besides the images: they are reused for the same only."""
    return {
        "model": spec.fingerprint,
        "layers": [layer.key for layer in options.layers],
        "candidates": list(options.names),
        "table": digest([repr(table.GEOMETRIC), table.DENSITIES, table.COMPARED]),
        **options.layout,
        "tile": list(options.layout["tile"]),
        "target": _name_of(options.target),
        "weights": digest(state(model)),
    }


def _name_of(target: Target) -> str:
    inner = target.func if isinstance(target, partial) else target
    given = f"({digest([*target.args, target.keywords])})" if isinstance(target, partial) else ""
    return f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', type(inner).__qualname__)}{given}"


def _latency(model: nn.Module, image: Any, target: Target, layer: LayerSpec) -> Latency:
    """Of this layer's head dim, dtype and device, measured by the first process."""
    kinds: list[tuple[torch.dtype, torch.device]] = []
    with observe(
        model,
        lambda seen: kinds.append((seen.q.dtype, seen.q.device)) if seen.layer == layer else None,
    ):
        target(model, image)
    return distributed.of_the_first(
        None if distributed.rank_and_size()[0] else latency_here(layer.head_dim, *kinds[0])
    )  # type: ignore[return-value]


def _check_processes(identity: Mapping[str, Any]) -> None:
    all_of_them = distributed.collect([dict(identity)])
    other = [
        name for name in identity if any(one[name] != all_of_them[0][name] for one in all_of_them)
    ]
    if other:
        raise ValueError(
            f"processes were given different {', '.join(other)}: every process needs the same model and all images; tune deals them out itself."
        )


# From a budget to a plan


def layers_to_tune(spec: ModelSpec, layers: Iterable[int | str] | None) -> tuple[LayerSpec, ...]:
    """Those asked for (indices, keys or module paths), or all that attend to the whole image. PlanError for others."""
    able = [layer for layer in spec.layers if not layer.window and not layer.frames]
    if layers is None:
        if not able:
            raise PlanError(
                "no layer of this model attends to the whole image: there is nothing to tune."
            )
        return tuple(able)
    wanted = [layers] if isinstance(layers, (int, str)) else list(layers)
    found = [
        next((layer for layer in able if layer.index == one), None)
        if isinstance(one, int)
        else spec.find(one)
        for one in wanted
    ]
    if not wanted or any(layer not in able for layer in found):
        raise PlanError(
            f"layers={wanted}: allowed are those that attend to the whole image, {', '.join(layer.name for layer in able)}; choose among them."
        )
    return tuple(layer for layer in able if layer in found)
