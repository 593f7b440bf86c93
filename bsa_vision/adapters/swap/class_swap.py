"""Swapping a module's class: the seam into models whose attention no registry reaches.

A swapped module becomes an instance of a subclass of its own class, made at run time: parameters, keys, hooks and `isinstance` stay.
Pickles and copies name the original class. The adapters of such families bring a mixin with a `forward`; this is everything else.
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any, cast

from torch import nn

from bsa_vision.adapters.swap.sparse_layer import SparseLayer, layer_of
from bsa_vision.adapters.swap.wrappers import own_class


class Swapped(nn.Module):
    """What a swapped attention module is as well as its own class; the mixins of adapters derive from this."""

    COVERS: tuple[
        str, ...
    ] = ()  # attributes that a property of the mixin hides; found in `SparseLayer.covered`
    OVERRIDES = "forward"  # the method of the mixin that runs our attention

    @property
    def _layer(self) -> SparseLayer:
        layer = layer_of(self)
        assert layer is not None
        return layer

    def __reduce_ex__(self, protocol: Any) -> Any:
        function, arguments, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        return _new, (self._layer.swapped, self._layer.original, function, arguments[1:]), *state

    def __prepare_scriptable__(self) -> Any:
        """Refuse torch.jit.script, which asks every module for this first."""
        raise RuntimeError(
            f"torch.jit.script cannot compile layer {self._layer.spec.name!r}, which has sparse heads: script the model after "
            "restore_(model), or take torch.export or torch.jit.trace instead."
        )

    def _fx_leaf(self, *args: Any, **kwargs: Any) -> Any:
        """Return what stands for a call of this module in a graph of torch.fx, which does not look inside."""
        tracer = args[0].tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)


@cache
def _swapped(mixin: type, original: type) -> type:
    """The subclass whose instances run our attention."""
    return type(f"Sparse{original.__name__}", (mixin, original), {"__module__": mixin.__module__})


def _new(mixin: type, original: type, function: Any, arguments: tuple[Any, ...]) -> Any:
    """Unpickling and copying: subclasses are made at run time, so pickles name the two classes they are made of."""
    return function(_swapped(mixin, original), *arguments)


def kind_of(module: nn.Module) -> tuple[str, str]:
    """Return module and name of a module's own class, as it was before a swap."""
    layer = layer_of(module)
    kind = own_class(
        layer.original if layer is not None and isinstance(module, Swapped) else type(module)
    )
    return kind.__module__, kind.__name__


def original_of(module: Any) -> Any:
    """Return what `unswap` puts back: the module's own class."""
    return type(module)


def swap(module: Any, layer: SparseLayer, mixin: type | None) -> None:
    """Make `module` an instance of its own class with `mixin`."""
    assert mixin is not None
    assert issubclass(mixin, Swapped)
    layer.swapped = mixin
    if _own_method(module, layer) is not None:
        raise ValueError(
            f"{layer.spec.name} has a {mixin.OVERRIDES} of its own, set on the module by a wrapper: it would go on "
            "running dense attention; sparsify_ first and wrap after, or unwrap."
        )
    # Not read from `module.__dict__` by the properties themselves: torch.compile before 2.13 takes that for the property again.
    layer.covered = {
        name: module.__dict__[name] for name in mixin.COVERS if name in module.__dict__
    }
    layer.attach(module)
    module.__dict__.pop(mixin.OVERRIDES, None)
    module.__class__ = _swapped(layer.swapped, layer.original)


def check_swapped(module: Any) -> None:
    """Raise ValueError where putting back the original class would undo or break what was done since."""
    layer = layer_of(module)
    assert layer is not None
    if type(module) not in (_swapped(layer.swapped, layer.original), layer.original):
        raise ValueError(
            f"{layer.spec.name} became a {type(module).__name__} since sparsify_ (fully_shard, a parametrization): "
            "restore_ would undo that as well; remove it first, or run the model dense inside bsa.dense(model)."
        )
    if _own_method(module, layer) is not None:
        raise ValueError(
            f"{layer.spec.name} has a {layer.swapped.OVERRIDES} of its own, set on the module since sparsify_ by a "
            "wrapper: it would go on calling the sparse one; unwrap first (accelerate: "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True)), then restore_."
        )


def _own_method(module: Any, layer: SparseLayer) -> Any:
    """Return the method that is set on a module in place of ours.

    None where it is that of its class: accelerate leaves such a one behind when its hooks are removed.
    """
    name = layer.swapped.OVERRIDES
    own = module.__dict__.get(name)
    of_class = [vars(kind).get(name) for kind in _swapped(layer.swapped, layer.original).__mro__]
    left_behind = (
        isinstance(own, MethodType) and own.__self__ is module and own.__func__ in of_class
    )
    return None if left_behind else own


def unswap(module: Any) -> None:
    """Undo `swap`, also an interrupted one; call it again if it was interrupted itself."""
    layer = layer_of(module)
    assert layer is not None
    module.__class__ = layer.original
    module.__dict__.pop(layer.swapped.OVERRIDES, None)
    layer.detach(module)


def is_of_transformers(module: nn.Module) -> bool:
    """Return whether a module's own class lives in transformers."""
    return kind_of(module)[0].startswith("transformers.")
