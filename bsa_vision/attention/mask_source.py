"""Name the owner of masks by an int, as operators of torch take tensors and numbers only."""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

try:
    from torch.fx.experimental.sym_node import DynamicInt
except ImportError:  # older versions of torch compile each layer by itself
    DynamicInt = int  # type: ignore[assignment, misc]


class MaskSource:
    """An object that a compiled graph can name by an int: `handle` finds it again for as long as it lives.

    torch custom operators take tensors and numbers only. Copies and unpickled objects get handles of their own.
    """

    handle: int
    dynamic_handle: int  # the same for torch.compile, which makes one graph for layers that differ in nothing else

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
    """The living object with this handle."""
    found = _by_handle.get(handle)
    if found is None:
        raise RuntimeError(
            f"the masks of a compiled graph (handle {handle}) are gone: they must outlive the graph; keep the HeadMasks or the "
            "swapped model referenced, or compile again."
        )
    return found
