"""Files that are either the old ones or the new ones, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` at once: on any error (a full disk, say) what was there before is still there.

    OSError names `path` as it was given.
    """
    given = os.fspath(path)
    path = Path(path).resolve()  # a link stays a link
    if path.exists() and not path.is_file():  # a pipe, /dev/null
        Path(given).write_bytes(data)
        return
    check_folder(given)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name[:100], suffix=".tmp")
    except OSError as error:
        raise OSError(error.errno, error.strerror, given) from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~umask  # mkstemp makes files private
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check_folder(path: str | os.PathLike[str]) -> None:
    """Raise FileNotFoundError unless the folder of `path` is there."""
    if not Path(path).resolve().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder, make it first", os.fspath(path))
