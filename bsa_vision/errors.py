"""The two errors a caller may want to catch by name; everything else is a ValueError or TypeError."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PlanError(ValueError):
    """A plan that cannot be built, read, or applied to this model or layout."""


class BackendUnavailable(RuntimeError):
    """A backend that was named and cannot run this problem here; the message says why and what can."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: "; nearest are ...", or nothing where none is near."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; nearest {'is' if len(close) == 1 else 'are'} {', '.join(close)}" if close else ""


def first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
