"""A bounded, thread-safe cache for an object's attribute; copies and pickles start empty."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

import torch

Value = TypeVar("Value")


class Cache(Generic[Value]):
    """The `size` most recently used values, by key.

    functools.lru_cache keeps its arguments alive and cannot be copied or pickled. Values derived
    from a plan or a mask must be freed with it.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = Lock()
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return the value of `key`, made on first use.

        Two threads may both make it; the first one stored is kept. It is made outside inference
        mode, because a later call may need gradients.
        """
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        with torch.inference_mode(False):
            value = make()
        with self._lock:
            value = self._values.setdefault(key, value)
            self._values.move_to_end(key)
            while len(self._values) > self._size:
                self._values.popitem(last=False)
            return value

    def __len__(self) -> int:
        return len(self._values)

    def __reduce__(self) -> tuple[type[Cache], tuple[int]]:
        return type(self), (self._size,)
