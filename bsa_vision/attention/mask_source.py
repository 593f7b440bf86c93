"""Refer to objects that hold masks by int handles, which torch operators accept as arguments."""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

try:
    from torch.fx.experimental.sym_node import DynamicInt
except ImportError:  # older versions of torch compile each layer by itself
    DynamicInt = int  # type: ignore[assignment, misc]


class MaskSource:
    """Base class of objects with masks, which compiled graphs refer to by an int handle.

    torch's custom operators take only tensors and numbers. A handle is valid while its object
    exists; copies and unpickled objects get new handles.
    """

    handle: int
    # For torch.compile, which then shares one graph between layers that differ only in their masks.
    dynamic_handle: int

    def _new_handle(self) -> None:
        self.handle = next(_next_handle)
        self.dynamic_handle = DynamicInt(self.handle)
        _by_handle[self.handle] = self

    def masks_for(self, grid: tuple[int, int], num_keys: int) -> Any:
        """Return the HeadMasks for images of `grid` patches and `num_keys` keys."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {
            key: value
            for key, value in self.__dict__.items()
            if key not in ("handle", "dynamic_handle")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._new_handle()


_next_handle = count(1)
_by_handle: WeakValueDictionary[int, MaskSource] = WeakValueDictionary()


def from_handle(handle: int) -> Any:
    """Return the object with this handle; raise RuntimeError if it no longer exists."""
    found = _by_handle.get(handle)
    if found is None:
        raise RuntimeError(
            f"the masks of a compiled graph (handle {handle}) no longer exist: they must outlive "
            "the graph; keep a reference to the HeadMasks or the swapped model, or compile again."
        )
    return found
