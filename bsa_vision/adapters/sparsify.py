"""Make the heads of existing models sparse, in place.

Each model family has a file in `families`; `swap` swaps and restores modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any, TypeVar

from torch import Tensor, nn

from bsa_vision.adapters.describe import probe_problem
from bsa_vision.adapters.find_encoder import (
    find_encoder,
    inspect,
    sparse_layers,
)
from bsa_vision.adapters.restore import put_back, restore_
from bsa_vision.adapters.swap.cleanup import always
from bsa_vision.adapters.swap.encoder_state import (
    EncoderState,
    Observation,
    watching,
)
from bsa_vision.adapters.swap.method import method_of
from bsa_vision.adapters.swap.sparse_layer import (
    SparseLayer,
    layer_of,
    layers_of,
    swapped_in,
)
from bsa_vision.adapters.swap.values import like_of, output_weight
from bsa_vision.attention.backends.select import BACKENDS, choose
from bsa_vision.plans.layer_masks import Entry
from bsa_vision.plans.model_spec import ModelSpec
from bsa_vision.plans.plan import PatternLike, SparsityPlan, as_plan
from bsa_vision.plans.prompts import Prompts

Model = TypeVar("Model", bound=nn.Module)


def uniform_plan(
    model: nn.Module | ModelSpec, pattern: str | PatternLike, **options: Any
) -> SparsityPlan:
    """Return a plan with one pattern for all heads except the first `dense_heads` of each layer.

    pattern  a name in `masks.PATTERNS`, a `masks.Pattern`, or a function layout -> (R, C) bool
    options  dense_heads=0, layers=None (indices, keys or module paths; None = all layers that are
             not windowed), order="tile", tile=(8, 16), block_size=128, and the parameters of the
             pattern

        >>> plan = bsa.uniform_plan(model, "local_window", radius=8, dense_heads=4)
    """
    return SparsityPlan.uniform(_spec_of(model), pattern, **options)


def dense_plan(model: nn.Module | ModelSpec) -> SparsityPlan:
    """Return a plan with only dense heads.

    Use it as a start for `plan.replace`, or to check that swapping does not change the output.
    """
    return SparsityPlan.uniform(_spec_of(model), "dense")


def sparsify_(
    model: Model,
    plan: SparsityPlan | str | PathLike[str],
    backend: str = "auto",
    on_unsupported: str = "fallback",
) -> Model:
    """Give `model` sparse heads, in place, and return it.

    Parameters, state_dict keys and your hooks do not change. Layers that the plan does not name
    stay dense. Training and eval run the same heads.

    plan            a SparsityPlan, or the path of a saved one
    backend         "auto", or the name of the backend that every sparse layer must use
    on_unsupported  for unsupported calls (attention masks, attention weights, unknown grids):
                    "fallback" runs the original attention, warns once and counts the calls;
                    "error" raises BackendUnavailable

    Raises PlanError if the plan does not fit the model, and BackendUnavailable if the backend
    cannot run on this machine; the model is then unchanged. After an interruption (Ctrl-C),
    `restore_` restores the model.
    """
    if on_unsupported not in ("fallback", "error"):
        raise ValueError(f"on_unsupported={on_unsupported!r}: allowed are 'fallback' and 'error'.")
    plan = as_plan(plan)
    _check_unswapped(model)
    adapter, found = find_encoder(model)
    plan.check(found.spec)
    plan = plan.complete(found.spec)
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(
            f"backend={backend!r}: allowed are 'auto', {', '.join(map(repr, BACKENDS))}."
        )
    encoder = EncoderState(found.spec, plan, backend, on_unsupported, found.grid_of)
    pairs = sparse_layers(encoder, adapter, found)
    for module, layer in pairs:
        _rehearse(layer, like_of(module, model))
    try:
        adapter.prepare()
        encoder.watch(model, found.embeddings)
        for module, layer in pairs:
            method_of(adapter, module).swap(module, layer, adapter.mixin_of(module))
    except BaseException:
        put_back(model, [module for module, layer in pairs if layer_of(module) is layer], [encoder])
        raise
    return model


def _check_unswapped(model: nn.Module) -> None:
    if layers_of(model):
        raise ValueError("this model already has sparse heads: call restore_(model) first.")
    if watching(model):
        raise ValueError(
            "sparsify_ or restore_ was interrupted on this model: call restore_(model) first."
        )


def _rehearse(layer: SparseLayer, like: Tensor) -> None:
    """Compute the masks for one grid and choose the backend, so that errors occur before a swap."""
    if layer.untouched:
        return
    masks = layer.masks.without_prompts(layer.grid_of(_rehearsal_grid(layer)))
    choose(probe_problem(layer, masks, like), layer.encoder.backend)


def _rehearsal_grid(layer: SparseLayer) -> tuple[int, int]:
    """Return the grid of the layer's static masks if it has any, else the model's default grid."""
    for name in layer.encoder.plan.layers[layer.spec.key]:
        layout = getattr(layer.encoder.plan.patterns.get(name), "layout", None)
        if layout is not None:
            return layout.grid
    return layer.encoder.spec.grid


@contextmanager
def sparse(model: Model, plan: SparsityPlan, on_unsupported: str = "fallback") -> Iterator[Model]:
    """Give the model the sparse heads of `plan` within the `with` block, and restore it after."""
    _check_unswapped(model)
    with always(lambda: restore_(model) if layers_of(model) or watching(model) else model):
        yield sparsify_(model, plan, on_unsupported=on_unsupported)


@contextmanager
def context(model: Model, *, prompts: Prompts | Sequence[Prompts]) -> Iterator[Model]:
    """Set the prompts that prompt-dependent patterns (`prompt_region`) use in the `with` block.

    prompts  one `Prompts` for all images of the batch, or a list with one for each image

    **An image embedding computed here belongs to its prompts**: another click needs another
    embedding. The prompts apply to the current thread (or asyncio task) only. Backward may run
    outside the block. Gradient checkpointing is not supported.

    Raises ValueError for prompts outside the image, and if the model has no such pattern.

        >>> with bsa.context(model, prompts=prompts):
        ...     embedding = model(x)
    """
    single = isinstance(prompts, Prompts)
    given = (prompts,) if single else tuple(prompts) if isinstance(prompts, Sequence) else ()
    if not given or not all(isinstance(item, Prompts) for item in given):
        raise TypeError(
            f"prompts={prompts!r}: expected bsa.Prompts, or a list with one for each image, such "
            "as bsa.Prompts(points=[(x, y)], image_size=(height, width))."
        )
    contexts = {
        id(layer.encoder): layer.encoder.context
        for layer in layers_of(model)
        if layer.masks.is_dynamic
    }
    if not contexts:
        raise ValueError(
            "no layer of this model has a pattern that follows prompts: sparsify_ it with one, "
            'e.g. bsa.uniform_plan(model, "prompt_region", radius=8).'
        )
    entry = Entry(tuple(contexts.values()), given, each=not single)  # type: ignore[arg-type]
    with always(entry.leave):
        entry.enter()
        yield model


@contextmanager
def observe(model: Model, see: Callable[[Observation], None]) -> Iterator[Model]:
    """Call `see` with an `Observation` before each attention call within the `with` block.

    The model runs dense. It must have no sparse heads, and is restored at the end. Unsupported
    calls (attention masks, unknown grids) raise BackendUnavailable. torch.compile is not supported.

        >>> with bsa.observe(model, observations.append):
        ...     model(x)
    """
    with sparse(model, dense_plan(model), on_unsupported="error"):
        for module, layer in swapped_in(model).items():
            width = layer.spec.heads * layer.spec.head_dim
            layer.weight = output_weight(module, width, like_of(module, model))
            layer.encoder.observer = see
        yield model


def _spec_of(model: nn.Module | ModelSpec) -> ModelSpec:
    return model if isinstance(model, ModelSpec) else inspect(model)
