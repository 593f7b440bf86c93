"""Cache machine measurements as JSON; repeating them takes about a second per process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bsa_vision.storage import atomic_write


def cache_file(name: str) -> Path | None:
    """Return the path of a cache file; None for a user without a home folder.

    The folder is `BSA_VISION_CACHE`, or bsa-vision in the user's cache folder.
    """
    folder = (
        os.environ.get("BSA_VISION_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "bsa-vision"
    )
    try:
        return Path(folder).expanduser() / name
    except RuntimeError:
        return None


def read(name: str) -> dict[str, Any]:
    """Return the entries of the file; {} if it is missing or holds something else."""
    path = cache_file(name)
    try:
        found = json.loads(path.read_text()) if path else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write(name: str, entries: dict[str, Any]) -> None:
    """Replace the file. If that fails, the next process measures again."""
    path = cache_file(name)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write.write(path, json.dumps(dict(sorted(entries.items())), indent=2).encode())
    except OSError:
        pass
