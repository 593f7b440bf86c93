"""Two errors to catch by name; all others are ValueError or TypeError."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PlanError(ValueError):
    """Raised for a plan that cannot be built, read, or applied to this model or layout."""


class BackendUnavailable(RuntimeError):
    """Raised when the named backend cannot run a call; the message says why, and what can."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; nearest are ..." for an unknown name, or "" if no known name is similar."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; nearest {'is' if len(close) == 1 else 'are'} {', '.join(close)}" if close else ""


def first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
