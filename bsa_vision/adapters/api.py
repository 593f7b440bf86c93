"""Sparse heads inside the models people load: find the attention layers, swap them for a plan, put them back.

One file per family in `families`; `swap` says how a module is swapped and put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from typing import Any, TypeVar

from torch import Tensor, nn

from bsa_vision.adapters.describe import ModelReport, probe_problem, report_layer
from bsa_vision.adapters.find_encoder import at_size, find_encoder, inspect, is_supported
from bsa_vision.adapters.swap.encoder_state import (
    EncoderState,
    Observation,
    watching,
)
from bsa_vision.adapters.swap.method import method_of
from bsa_vision.adapters.swap.sparse_layer import (
    SparseLayer,
    check_whole,
    layer_of,
    layers_of,
    swapped_in,
)
from bsa_vision.adapters.swap.undo import always
from bsa_vision.adapters.swap.values import like_of, output_weight
from bsa_vision.adapters.unsupported import left_dense
from bsa_vision.attention.backends.select import BACKENDS, choose
from bsa_vision.masks import Pattern
from bsa_vision.measure.latency import Latency
from bsa_vision.measure.latency import latency as latency_here
from bsa_vision.plans.flops import cost
from bsa_vision.plans.layer_masks import Entry
from bsa_vision.plans.model_spec import ModelSpec
from bsa_vision.plans.plan import PatternLike, SparsityPlan, as_plan
from bsa_vision.plans.prompts import Prompts

Model = TypeVar("Model", bound=nn.Module)


def uniform_plan(
    model: nn.Module | ModelSpec, pattern: str | PatternLike, **options: Any
) -> SparsityPlan:
    """The same pattern for all heads of `model` but the first `dense_heads`.

    pattern  a name of `masks.PATTERNS`, a `masks.Pattern`, or your own function layout -> (R, C) bool
    options  dense_heads=0, layers=None (all that are not windowed; indices, keys or module paths), order="tile", tile=(8, 16), block_size=128, and the
             parameters of the pattern

        >>> plan = bsa.uniform_plan(model, "local_window", radius=8, dense_heads=4)
    """
    return SparsityPlan.uniform(_spec_of(model), pattern, **options)


def dense_plan(model: nn.Module | ModelSpec) -> SparsityPlan:
    """Every head of every layer dense: a start for `plan.replace`, and a check that swapping changes nothing."""
    return SparsityPlan.uniform(_spec_of(model), "dense")


def sparsify_(
    model: Model,
    plan: SparsityPlan | str | PathLike[str],
    backend: str = "auto",
    on_unsupported: str = "fallback",
) -> Model:
    """Give `model` sparse heads, in place; returns it. Parameters, state_dict keys and your hooks stay as they are.

    plan            a SparsityPlan, or the path of one that was saved
    backend         "auto", or a name that every sparse layer must then run on
    on_unsupported  what to do with calls outside the contract (attention masks, attention weights, unknown grids):
                    "fallback" runs the original attention, warns once and counts; "error" raises BackendUnavailable

    Layers the plan does not name stay dense; training and eval run the same heads. Raises PlanError for a plan that does not
    fit, BackendUnavailable for a backend that cannot run here; the model is then untouched. Interrupted (Ctrl-C) at whatever
    line, it leaves a model that `restore_` brings back.
    """
    if on_unsupported not in ("fallback", "error"):
        raise ValueError(
            f"on_unsupported={on_unsupported!r}: allowed are 'fallback' and 'error'; choose one of them."
        )
    plan = as_plan(plan)
    _check_unswapped(model)
    adapter, found = find_encoder(model)
    plan.check(found.spec)
    plan = plan.complete(found.spec)
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(
            f"backend={backend!r}: allowed are 'auto', {', '.join(map(repr, BACKENDS))}; choose one of them."
        )
    encoder = EncoderState(found.spec, plan, backend, on_unsupported, found.grid_of)
    chosen = [
        (
            module,
            SparseLayer(encoder, spec, adapter, method_of(adapter, module).original_of(module)),
        )
        for module, spec in zip(found.modules, found.spec.layers, strict=True)
    ]
    for module, layer in chosen:
        _rehearse(layer, like_of(module, model))
    try:
        adapter.prepare()
        encoder.watch(model, found.embeddings)
        for module, layer in chosen:
            method_of(adapter, module).swap(module, layer, adapter.mixin_of(module))
    except BaseException:
        _put_back(
            model, [module for module, layer in chosen if layer_of(module) is layer], [encoder]
        )
        raise
    return model


def _check_unswapped(model: nn.Module) -> None:
    if layers_of(model):
        raise ValueError(
            "this model has sparse heads already: one plan at a time; call restore_(model) first."
        )
    if watching(model):
        raise ValueError(
            "sparsify_ or restore_ was interrupted on this model: call restore_(model) first."
        )


def _rehearse(layer: SparseLayer, like: Tensor) -> None:
    """Everything about a swap that can fail: lay the masks out for the model's own grid, and choose the backend."""
    if layer.untouched:
        return
    masks = layer.masks.without_prompts(layer.grid_of(_rehearsal_grid(layer)))
    choose(probe_problem(layer, masks, like), layer.encoder.backend)


def _rehearsal_grid(layer: SparseLayer) -> tuple[int, int]:
    """The grid a plan is tried on: that of its static masks where it has any, else the model's own."""
    for name in layer.encoder.plan.layers[layer.spec.key]:
        layout = getattr(layer.encoder.plan.patterns.get(name), "layout", None)
        if layout is not None:
            return layout.grid
    return layer.encoder.spec.grid


def restore_(model: Model) -> Model:
    """Undo `sparsify_`, in place, bit-exact; returns the model. ValueError when it has no sparse heads.

    Undoes a call of either that was interrupted as well. Layers that were removed from the model since are not missed.
    Raises ValueError where something that was done to the model since would break, and for a part of an encoder; the model
    is then untouched.
    """
    swapped = swapped_in(model)
    encoders = list(
        dict.fromkeys((*(layer.encoder for layer in swapped.values()), *watching(model)))
    )
    if not encoders:
        raise ValueError(
            "this model has no sparse heads: nothing to restore; sparsify_(model, plan) gives it some."
        )
    for encoder in encoders:
        check_whole(
            encoder, model, (layer for layer in swapped.values() if layer.encoder is encoder)
        )
    for module, layer in swapped.items():
        method_of(layer.adapter, module).check_swapped(module)
    _put_back(model, list(swapped), encoders)
    return model


def _put_back(
    model: nn.Module, swapped: Sequence[nn.Module], encoders: Sequence[EncoderState]
) -> None:
    """Undo whatever of `sparsify_` was done; to be called again where it was interrupted."""
    for module in swapped:
        layer = layer_of(module)
        assert layer is not None
        method_of(layer.adapter, module).unswap(module)
    for encoder in encoders:
        encoder.unwatch(model.modules())


@contextmanager
def sparse(model: Model, plan: SparsityPlan, on_unsupported: str = "fallback") -> Iterator[Model]:
    """Inside, the model has the sparse heads of `plan`; it has none before, and none afterwards, whatever happened."""
    _check_unswapped(model)
    with always(lambda: restore_(model) if layers_of(model) or watching(model) else model):
        yield sparsify_(model, plan, on_unsupported=on_unsupported)


@contextmanager
def dense(model: Model) -> Iterator[Model]:
    """Inside, the model runs its original, dense attention: `with dense(model): reference = model(x)`.

    Holds for every thread that uses the model; with gradient checkpointing, run backward inside as well. ValueError when it
    has no sparse heads.
    """
    encoders = {id(layer.encoder): layer.encoder for layer in layers_of(model)}
    if not encoders:
        raise ValueError(
            "this model has no sparse heads, so it is dense already; sparsify_(model, plan) gives it some."
        )
    mine = object()

    def leave() -> None:
        for encoder in encoders.values():
            if mine in encoder.dense:
                encoder.dense.remove(mine)

    with always(leave):
        for encoder in encoders.values():
            encoder.dense.append(mine)
        yield model


@contextmanager
def context(model: Model, *, prompts: Prompts | Sequence[Prompts]) -> Iterator[Model]:
    """Inside, patterns that follow prompts (`prompt_region`) follow these: `with bsa.context(model, prompts=...): model(x)`.

    prompts  for all images of the batch, or a list, one `Prompts` for each image

    **An embedding made this way belongs to its prompts**: another click needs another embedding. Holds for the thread (and the task) that
    entered it, others bring their own; backward may run outside. Not with gradient checkpointing. ValueError for prompts outside the
    image, and for a model without such a pattern.
    """
    single = isinstance(prompts, Prompts)
    given = (prompts,) if single else tuple(prompts) if isinstance(prompts, Sequence) else ()
    if not given or not all(isinstance(one, Prompts) for one in given):
        raise TypeError(
            f"prompts={prompts!r}: expected bsa.Prompts, or a list with one for each image; make them with "
            "bsa.Prompts(points=[(x, y)], image_size=(height, width))."
        )
    contexts = {
        id(layer.encoder): layer.encoder.context
        for layer in layers_of(model)
        if layer.masks.is_dynamic
    }
    if not contexts:
        raise ValueError(
            "no layer of this model has a pattern that follows prompts: sparsify_ it with one, say "
            'bsa.uniform_plan(model, "prompt_region", radius=8).'
        )
    entry = Entry(tuple(contexts.values()), given, each=not single)  # type: ignore[arg-type]
    with always(entry.leave):
        entry.enter()
        yield model


@contextmanager
def observe(model: Model, see: Callable[[Observation], None]) -> Iterator[Model]:
    """Inside, the model runs dense, and every layer shows `see` what it is about to attend with: `with bsa.observe(model, see): model(x)`.

    The model must have no sparse heads; it gets its own attention back at the end, whatever happened. Calls outside the contract (attention
    masks, unknown grids) raise BackendUnavailable: nothing would be seen of them. Not under torch.compile.
    """
    with sparse(model, dense_plan(model), on_unsupported="error"):
        for module, layer in swapped_in(model).items():
            layer.weight = output_weight(
                module, layer.spec.heads * layer.spec.head_dim, like_of(module, model)
            )
            layer.encoder.observer = see
        yield model


def describe(
    model: nn.Module,
    image_size: int | tuple[int, int] | None = None,
    latency: Latency | None = None,
) -> ModelReport:
    """What each attention layer of a model does, on its device and dtype; print it for a table. Without sparse heads: what could be gained.

    image_size  pixels, an int or (height, width); None = the last input's, or the model's own before there was one
    latency     what attention costs on this machine; None = `bsa.latency(...)`, measured once, which takes a second or two
    """
    pairs = list(swapped_in(model).items()) or _as_it_is(model)
    layers = [layer for _, layer in pairs]
    encoder = layers[0].encoder
    if any(layer.encoder is not encoder for layer in layers):
        raise ValueError(
            f"{type(model).__name__} holds several encoders with sparse heads: one at a time is described; pass the one you mean."
        )
    grid = (
        encoder.grid
        if image_size is None and encoder.grid != (0, 0)
        else at_size(encoder.spec, image_size).grid
    )
    like = like_of(pairs[0][0], model)
    latency = latency or latency_here(encoder.spec.layers[0].head_dim, like.dtype, like.device)
    spec = replace(
        encoder.spec, grid=grid, layers=tuple(layer.spec for layer in layers)
    )  # some may be removed since
    model_cost = cost(spec, element_size=like.element_size())
    reports = tuple(report_layer(layer, grid, like, latency, model_cost) for layer in layers)
    used = {name for names in encoder.plan.layers.values() for name in names if name != "dense"}
    labels = tuple(
        f"{name}: {label}" for name in sorted(used) for label in _labels(encoder.plan, name, spec)
    )
    left = left_dense(model, [module for module, _ in pairs], is_supported)
    return ModelReport(
        spec.family, grid, encoder.plan.order, reports, latency.what, model_cost, left, labels
    )


def _as_it_is(model: nn.Module) -> list[tuple[nn.Module, SparseLayer]]:
    """The layers that a plan of dense heads would give a model that has none; the model is not touched."""
    adapter, found = find_encoder(model)
    encoder = EncoderState(found.spec, dense_plan(found.spec), "auto", "fallback", found.grid_of)
    return [
        (
            module,
            SparseLayer(encoder, spec, adapter, method_of(adapter, module).original_of(module)),
        )
        for module, spec in zip(found.modules, found.spec.layers, strict=True)
    ]


def _labels(plan: SparsityPlan, name: str, spec: ModelSpec) -> list[str]:
    pattern = plan.patterns[name]
    return pattern.labels(plan.layout(spec)) if isinstance(pattern, Pattern) else []


def _spec_of(model: nn.Module | ModelSpec) -> ModelSpec:
    return model if isinstance(model, ModelSpec) else inspect(model)
