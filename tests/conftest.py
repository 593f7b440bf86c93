"""Settings for all tests: model libraries, hypothesis, and a cache outside the user's home."""

from __future__ import annotations

import os

# Idle threads of one test process must not spin on the cores of another. Read by torch on import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from hypothesis import settings

from tests import neighbours

if neighbours.MISSING is None:
    neighbours.enable()
# Examples take longer on a shared machine; that is not an error.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


def pytest_collection_modifyitems(items):
    """Skip tests marked `models` where the model libraries are missing."""
    for item in items:
        if neighbours.MISSING and item.get_closest_marker("models"):
            item.add_marker(pytest.mark.skip(reason=neighbours.MISSING))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item, call):
    """Skip tests that turn out to import a missing model library, for some of their parameters."""
    error = call.excinfo and call.excinfo.value
    name = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    if neighbours.MISSING and (name or "").partition(".")[0] in neighbours.LIBRARIES:
        with pytest.raises(pytest.skip.Exception) as call.excinfo:
            pytest.skip(neighbours.MISSING)


@pytest.fixture(autouse=True, scope="session")
def temporary_cache(tmp_path_factory):
    """Keep what `bsa.latency` measures out of the user's cache."""
    os.environ["BSA_VISION_CACHE"] = str(tmp_path_factory.mktemp("cache"))
