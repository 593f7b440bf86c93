"""Small JSON files in the user's cache: what was measured on this machine, because a second at the start of every process would be felt."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bsa_vision.storage import atomic_write


def cache_file(name: str) -> Path | None:
    """Where it is kept: in the folder `BSA_VISION_CACHE`, or one of the user's cache; None for a user without a home."""
    folder = (
        os.environ.get("BSA_VISION_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "bsa-vision"
    )
    try:
        return Path(folder).expanduser() / name
    except RuntimeError:
        return None


def read(name: str) -> dict[str, Any]:
    """What the file holds; nothing where there is none, or something else."""
    path = cache_file(name)
    try:
        found = json.loads(path.read_text()) if path else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write(name: str, entries: dict[str, Any]) -> None:
    """Replace the file; where it cannot be written, the next process measures again."""
    path = cache_file(name)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write.write(path, json.dumps(dict(sorted(entries.items())), indent=2).encode())
    except OSError:
        pass
