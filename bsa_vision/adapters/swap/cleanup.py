"""Cleanup that is safe against interruptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def always(undo: Callable[[], object]) -> Iterator[None]:
    """Call `undo` twice at the end, in case an interruption (Ctrl-C) ended the first call early.

    `undo` must do nothing if nothing is left to undo.
    """
    try:
        try:
            yield
        finally:
            undo()
    finally:
        undo()
