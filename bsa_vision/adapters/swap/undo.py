"""What must be undone at the end, whatever happened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def always(undo: Callable[[], object]) -> Iterator[None]:
    """Call `undo` at the end, and again: an interruption (Ctrl-C) may have cut the first call short.

    `undo` must do no harm where nothing is left to undo.
    """
    try:
        try:
            yield
        finally:
            undo()
    finally:
        undo()
