"""Swap the class of an attention module, for models without an attention registry.

A swapped module becomes an instance of a subclass of its class, made at run time. Parameters,
state_dict keys, hooks and `isinstance` do not change, and pickles and copies name the original
class. The adapters of such families provide a mixin with a `forward`.
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any, cast

from torch import nn

from bsa_vision.adapters.swap.sparse_layer import SparseLayer, layer_of
from bsa_vision.adapters.swap.wrappers import own_class


class Swapped(nn.Module):
    """Base class of the mixins that adapters add to an attention module's class."""

    # Attributes that properties of the mixin hide; their values are in `SparseLayer.covered`.
    COVERS: tuple[str, ...] = ()
    OVERRIDES = "forward"  # the method of the mixin that runs the sparse attention

    @property
    def _layer(self) -> SparseLayer:
        layer = layer_of(self)
        assert layer is not None
        return layer

    def __reduce_ex__(self, protocol: Any) -> Any:
        function, arguments, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        return _new, (self._layer.swapped, self._layer.original, function, arguments[1:]), *state

    def __prepare_scriptable__(self) -> Any:
        """Raise RuntimeError: torch.jit.script calls this method on every module first."""
        raise RuntimeError(
            f"torch.jit.script cannot compile layer {self._layer.spec.name!r}, which has sparse "
            "heads: script the model after restore_(model), or use torch.export or "
            "torch.jit.trace."
        )

    def _fx_leaf(self, *args: Any, **kwargs: Any) -> Any:
        """Return the node of this call in a torch.fx graph, which treats the module as a leaf."""
        tracer = args[0].tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)


@cache
def _swapped(mixin: type, original: type) -> type:
    """Return the subclass of `original` that swapped modules become instances of."""
    return type(f"Sparse{original.__name__}", (mixin, original), {"__module__": mixin.__module__})


def _new(mixin: type, original: type, function: Any, arguments: tuple[Any, ...]) -> Any:
    """Create a swapped module when unpickling or copying.

    The subclass exists at run time only, so pickles name the two classes it is made from.
    """
    return function(_swapped(mixin, original), *arguments)


def kind_of(module: nn.Module) -> tuple[str, str]:
    """Return the module and name of a module's class, as before a swap."""
    layer = layer_of(module)
    cls = type(module)
    if layer is not None and isinstance(module, Swapped):
        cls = layer.original
    cls = own_class(cls)
    return cls.__module__, cls.__name__


def original_of(module: Any) -> Any:
    """Return what `unswap` restores: the module's class."""
    return type(module)


def swap(module: Any, layer: SparseLayer, mixin: type | None) -> None:
    """Make `module` an instance of its class with `mixin`."""
    assert mixin is not None
    assert issubclass(mixin, Swapped)
    layer.swapped = mixin
    if _own_method(module, layer) is not None:
        raise ValueError(
            f"{layer.spec.name} has its {mixin.OVERRIDES} replaced on the module by a wrapper: it "
            "would keep running dense attention; call sparsify_ before wrapping, or unwrap it."
        )
    # The properties cannot read `module.__dict__`: torch.compile before 2.13 resolves that to the
    # property itself.
    layer.covered = {
        name: module.__dict__[name] for name in mixin.COVERS if name in module.__dict__
    }
    layer.attach(module)
    module.__dict__.pop(mixin.OVERRIDES, None)
    module.__class__ = _swapped(layer.swapped, layer.original)


def check_swapped(module: Any) -> None:
    """Raise ValueError if restoring the class would undo or break a later change."""
    layer = layer_of(module)
    assert layer is not None
    if type(module) not in (_swapped(layer.swapped, layer.original), layer.original):
        raise ValueError(
            f"{layer.spec.name} became a {type(module).__name__} since sparsify_ (fully_shard, a "
            "parametrization), which restore_ would undo: remove it first, or run the model dense "
            "with bsa.dense(model)."
        )
    if _own_method(module, layer) is not None:
        raise ValueError(
            f"{layer.spec.name} has its {layer.swapped.OVERRIDES} replaced on the module since "
            "sparsify_ by a wrapper, which would keep calling the sparse one: unwrap it first "
            "(accelerate: accelerate.hooks.remove_hook_from_module(model, recurse=True)), then "
            "call restore_."
        )


def _own_method(module: Any, layer: SparseLayer) -> Any:
    """Return the method that a wrapper has set on a module in place of the mixin's.

    None if it is the method of the class: accelerate leaves that behind when removing its hooks.
    """
    name = layer.swapped.OVERRIDES
    method = module.__dict__.get(name)
    if isinstance(method, MethodType) and method.__self__ is module:
        classes = _swapped(layer.swapped, layer.original).__mro__
        if method.__func__ in [vars(cls).get(name) for cls in classes]:
            return None
    return method


def unswap(module: Any) -> None:
    """Undo `swap`, complete or interrupted; call it again if this call is interrupted."""
    layer = layer_of(module)
    assert layer is not None
    module.__class__ = layer.original
    module.__dict__.pop(layer.swapped.OVERRIDES, None)
    layer.detach(module)


def is_of_transformers(module: nn.Module) -> bool:
    """Return whether a module's class, as before a swap, is in transformers."""
    return kind_of(module)[0].startswith("transformers.")
