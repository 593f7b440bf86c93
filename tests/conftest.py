"""What all tests share: the model libraries, and nothing they measure is remembered beyond them."""

from __future__ import annotations

import os

# Idle threads of one test process must not spin on the cores of another; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from hypothesis import settings

from tests import neighbours

neighbours.enable()
settings.register_profile(
    "shared machine", deadline=None
)  # how long an example takes says nothing here
settings.load_profile("shared machine")


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory):
    """`bsa.latency` remembers what it measured on this machine; tests must not leave that to the user, nor take it from them."""
    os.environ["BSA_VISION_CACHE"] = str(tmp_path_factory.mktemp("cache"))
