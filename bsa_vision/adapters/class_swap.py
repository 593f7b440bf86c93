"""Swapping a module's class: the seam into models whose attention no registry reaches.

A swapped module becomes an instance of a subclass of its own class, made at run time: parameters, keys, hooks and `isinstance` stay.
Pickles and copies name the original class. The adapters of such families bring a mixin with a `forward`; this is everything else.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from torch import nn

from bsa_vision.adapters.layer import ATTRIBUTE, Layer, layer_of


class Swapped(nn.Module):
    """What a swapped attention module is as well as its own class; the mixins of adapters derive from this."""

    COVERS: tuple[str, ...] = ()  # attributes that a property of the mixin hides; found in `Layer.covered`

    @property
    def _layer(self) -> Layer:
        layer = layer_of(self)
        assert layer is not None
        return layer

    def __reduce_ex__(self, protocol: Any) -> Any:
        function, arguments, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        return _new, (mixin_of(self), self._layer.original, function, arguments[1:]), *state

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


_made: set[type] = set()


@cache
def _swapped(mixin: type, original: type) -> type:
    """The subclass whose instances run our attention."""
    made = type(f"Sparse{original.__name__}", (mixin, original), {"__module__": mixin.__module__})
    _made.add(made)
    return made


def _new(mixin: type, original: type, function: Any, arguments: tuple[Any, ...]) -> Any:
    """Unpickling and copying: subclasses are made at run time, so pickles name the two classes they are made of."""
    return function(_swapped(mixin, original), *arguments)


def mixin_of(module: Any) -> type:
    """The adapter's class in a swapped module: the one that the run-time subclass of both was made with."""
    made = next(kind for kind in type(module).__mro__ if kind in _made)
    return made.__bases__[0]


def original_of(module: Any) -> Any:
    """What `unswap` puts back: the module's own class."""
    return type(module)


def swap(module: Any, layer: Layer, mixin: type) -> None:
    if "forward" in module.__dict__:
        raise ValueError(
            f"{layer.spec.name} has a forward of its own, set on the module by a wrapper: it would go on running dense attention; "
            "sparsify_ first and wrap after, or unwrap."
        )
    # Not read from `module.__dict__` by the properties themselves: torch.compile before 2.13 takes that for the property again.
    layer.covered = {
        name: module.__dict__[name] for name in cast(type[Swapped], mixin).COVERS if name in module.__dict__
    }
    setattr(module, ATTRIBUTE, layer)
    module.__class__ = _swapped(mixin, layer.original)


def check_swapped(module: Any) -> None:
    """Raise ValueError where something else changed the module's class since: putting back the original would undo that too."""
    layer = layer_of(module)
    assert layer is not None
    if type(module) is not _swapped(mixin_of(module), layer.original):
        raise ValueError(
            f"{layer.spec.name} became a {type(module).__name__} since sparsify_ (a parametrization, a wrapper): restore_ would undo "
            "that as well; remove it first, then restore_."
        )


def unswap(module: Any) -> None:
    layer = layer_of(module)
    assert layer is not None
    module.__class__ = layer.original
    delattr(module, ATTRIBUTE)


def prepare() -> None:
    """Nothing: the subclass is all there is."""
