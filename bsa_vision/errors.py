"""The two errors a caller may want to catch by name; everything else is a ValueError or TypeError."""


class PlanError(ValueError):
    """A plan that cannot be built, read, or applied to this model or layout."""


class BackendUnavailable(RuntimeError):
    """A backend that was named and cannot run this problem here; the message says why and what can."""
