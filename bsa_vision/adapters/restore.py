"""Restore the original attention: for good, or while a `with` block lasts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from bsa_vision.adapters.swap.cleanup import always
from bsa_vision.adapters.swap.encoder_state import EncoderState, watching
from bsa_vision.adapters.swap.method import method_of
from bsa_vision.adapters.swap.sparse_layer import check_whole, layer_of, layers_of, swapped_in

Model = TypeVar("Model", bound=nn.Module)


def restore_(model: Model) -> Model:
    """Undo `sparsify_` in place, bit-exact, and return the model.

    Also undoes interrupted calls of `sparsify_` and `restore_`. Layers may have been removed from
    the model since.

    Raises ValueError if the model has no sparse heads or is only a part of an encoder, or if a
    later change of the model would break; the model is then unchanged.
    """
    swapped = swapped_in(model)
    encoders = list(
        dict.fromkeys((*(layer.encoder for layer in swapped.values()), *watching(model)))
    )
    if not encoders:
        raise ValueError(
            "this model has no sparse heads: nothing to restore; call sparsify_(model, plan) first."
        )
    for encoder in encoders:
        check_whole(
            encoder, model, (layer for layer in swapped.values() if layer.encoder is encoder)
        )
    for module, layer in swapped.items():
        method_of(layer.adapter, module).check_swapped(module)
    put_back(model, list(swapped), encoders)
    return model


def put_back(
    model: nn.Module, swapped: Sequence[nn.Module], encoders: Sequence[EncoderState]
) -> None:
    """Undo what `sparsify_` has done so far; call it again if it was interrupted."""
    for module in swapped:
        layer = layer_of(module)
        assert layer is not None
        method_of(layer.adapter, module).unswap(module)
    for encoder in encoders:
        encoder.unwatch(model.modules())


@contextmanager
def dense(model: Model) -> Iterator[Model]:
    """Run the original, dense attention within the `with` block.

    This applies to all threads that use the model. With gradient checkpointing, run backward in
    the block as well. Raises ValueError if the model has no sparse heads.

        >>> with bsa.dense(model):
        ...     reference = model(x)
    """
    encoders = {id(layer.encoder): layer.encoder for layer in layers_of(model)}
    if not encoders:
        raise ValueError(
            "this model has no sparse heads and is dense already: "
            "call sparsify_(model, plan) first."
        )
    token = object()

    def leave() -> None:
        for encoder in encoders.values():
            if token in encoder.dense:
                encoder.dense.remove(token)

    with always(leave):
        for encoder in encoders.values():
            encoder.dense.append(token)
        yield model
