"""`tune`: choose a plan for a budget and check it on held-out images."""

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
from bsa_vision.measure.latency import latency as measure_latency
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
from bsa_vision.tuning.trial import Target, layer_errors


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
    on_step: OnStep = lambda step, done, total: None,
) -> SparsityPlan:
    """Return a plan for `model`, chosen on calibration images and checked on held-out images.

    Exactly one budget is required: `sparsity`, `max_error` or `speedup`.

    images      inputs of `target`, all of one size; by default pixels (B, 3, h, w). At least 2;
                24 are good
    sparsity    fraction of the blocks of all tuned layers to skip, 0 to 1, at the least error
    max_error   relative L2 error of the target, mean over images. The plan is the sparsest one
                whose mean error over images like the held-out ones is below it, at 99 % confidence
    speedup     of the target over dense, measured on this machine, at the least error
    layers      indices, keys or module paths; None = all layers that attend to the whole image
    candidates  names among "static" (best blocks of the mean map), "local_window", "axial",
                "strided", "special"
    order       token order: "tile", "raster", or "auto" for the one that loses least on a few
                images
    tile        (rows, columns) in patches; "auto" also tries half as high and twice as wide
    verify      share of held-out images
    target      (model, image) -> the features that you use; errors are errors of these
    seed        random seed of the split into calibration and held-out images
    latency     latency model of attention, for `speedup`; None = `bsa.latency`, measured now
    statistics  path of a file for the statistics; with it another budget needs no new pass
    resume      continue from that file, complete or not
    on_step     called with (name of the step, amount done, total amount), for progress bars

    The model must have no sparse heads and is not changed. `plan.report` has the predicted and
    measured errors; `bsa.report` draws them as an HTML page. The processes of a `torch.distributed`
    process group share the work: pass all images to each of them, and each gets the plan. After
    Ctrl-C, the message of the KeyboardInterrupt tells what was saved.

    Raise ValueError or PlanError if the budget cannot be met, if there are too few images or images
    of several sizes, or if features are not finite. Raise FileExistsError if the statistics file
    exists and `resume` is False.
    """
    _check_installed()
    name, wanted = _asked({"sparsity": sparsity, "max_error": max_error, "speedup": speedup})
    spec = inspect(model)
    images = check_images(images, target)
    chosen, held_out = split(images, verify, seed)
    if name == "max_error" and len(held_out) < 2:
        raise ValueError(
            f"{len(images)} images, of which 1 is held out: a bound on the mean error needs at "
            "least 2 held-out images; give max_error more images (24 are good), or a larger "
            "verify=."
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
    counts = {"calibration": len(chosen), "held_out": len(held_out), "seed": seed}
    budget, orders = {name: wanted}, calibration.orders
    notes = describe(tuned, best, trials.tried, budget, counts, orders, measured, curve)
    return replace(best.plan, notes={"tuned": notes})


def _check_installed() -> None:
    """Raise ImportError if optional packages are missing, before minutes of work."""
    try:
        import safetensors.torch  # noqa: F401
        import scipy.optimize  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"tuning needs scipy and safetensors ({error}): pip install 'bsa-vision[tune]'."
        ) from None


def _asked(asked: Mapping[str, float | None]) -> tuple[str, float]:
    """Return name and value of the only budget that is given; raise ValueError if it is invalid."""
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"tune got {', '.join(given) or 'no budget'}: exactly one of {', '.join(asked)} is "
            "required, e.g. sparsity=0.5."
        )
    ((name, value),) = given.items()
    allowed, fits = {
        "sparsity": ("a fraction from 0 to below 1", lambda x: 0 <= x < 1),
        "max_error": ("an error above 0", lambda x: 0 < x < math.inf),
        "speedup": ("at least 1", lambda x: 1 <= x < math.inf),
    }[name]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and fits(value)):
        percent = number and name == "sparsity" and 1 < value < 100
        advice = f"; give {value / 100:g} for {value:g} %" if percent else ""
        raise ValueError(f"{name}={value!r}: expected {allowed}{advice}.")
    if name == "max_error" and value > 1:
        warnings.warn(
            f"max_error={value!r} allows errors larger than the features themselves: it is "
            "relative, 0.05 is 5 %.",
            stacklevel=3,
        )
    return name, float(value)


def _names(candidates: str | Sequence[str]) -> tuple[str, ...]:
    names = (candidates,) if isinstance(candidates, str) else tuple(candidates)
    if not names or not {*names} <= {*table.NAMES}:
        raise ValueError(f"candidates={list(names)}: allowed are {', '.join(table.NAMES)}.")
    return names


def _layout_options(order: str, tile: tuple[int, int], block_size: int) -> dict[str, Any]:
    if order not in ("auto", *ORDERS):
        raise ValueError(f"order={order!r}: allowed are 'auto', {', '.join(map(repr, ORDERS))}.")
    TokenLayout((1, 1), tile=tile, block_size=block_size)  # checks both
    return {"order": order, "tile": tile, "block_size": block_size}


def _identity(model: nn.Module, spec: ModelSpec, options: Options) -> dict[str, Any]:
    """Return everything but the images that statistics depend on.

    Saved statistics are only used again if all of it is the same.
    """
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
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    return f"{getattr(inner, '__module__', '')}.{name}{given}"


def _latency(model: nn.Module, image: Any, target: Target, layer: LayerSpec) -> Latency:
    """Return the latency model for the head dim, dtype and device of this layer.

    Measured in the first process.
    """
    kinds: list[tuple[torch.dtype, torch.device]] = []
    with observe(
        model,
        lambda call: kinds.append((call.q.dtype, call.q.device)) if call.layer == layer else None,
    ):
        target(model, image)
    rank, _ = distributed.rank_and_size()
    measured = None if rank else measure_latency(layer.head_dim, *kinds[0])
    return distributed.broadcast(measured)  # type: ignore[return-value]


def _check_processes(identity: Mapping[str, Any]) -> None:
    """Raise ValueError if processes were given different models, images or options."""
    identities = distributed.collect([dict(identity)])
    different = [
        name for name in identity if any(one[name] != identities[0][name] for one in identities)
    ]
    if different:
        raise ValueError(
            f"processes were given different {', '.join(different)}: every process needs the same "
            "model and all images; tune distributes the images itself."
        )


def layers_to_tune(spec: ModelSpec, layers: Iterable[int | str] | None) -> tuple[LayerSpec, ...]:
    """Return the layers to tune, given as indices, keys or module paths; None = all possible ones.

    Raise PlanError for layers that do not attend to the whole image.
    """
    able = [layer for layer in spec.layers if not layer.window and not layer.frames]
    if layers is None:
        if not able:
            raise PlanError(
                "no layer of this model attends to the whole image: there is nothing to tune."
            )
        return tuple(able)
    wanted = [layers] if isinstance(layers, (int, str)) else list(layers)
    found = [
        next((layer for layer in able if layer.index == name), None)
        if isinstance(name, int)
        else spec.find(name)
        for name in wanted
    ]
    if not wanted or any(layer not in able for layer in found):
        allowed = ", ".join(layer.name for layer in able)
        raise PlanError(
            f"layers={wanted}: allowed are the layers that attend to the whole image: {allowed}."
        )
    return tuple(layer for layer in able if layer in found)
