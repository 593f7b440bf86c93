"""Write files atomically: after any error the old file is intact."""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress
from pathlib import Path


def write(path: str | os.PathLike[str], *data: bytes | memoryview) -> None:
    """Write `data` to `path` atomically: after an error or Ctrl-C the old file is intact.

    Raises OSError with the path as it was given.
    """
    check_folder(path)
    target = Path(path).resolve()  # a link stays a link
    # Named before it exists, so that it is removed whenever an interruption comes.
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        if target.exists() and not target.is_file():  # a pipe, /dev/null
            target.write_bytes(b"".join(data))
            return
        with open(temporary, "xb") as file:
            file.writelines(data)
        if target.exists():
            os.chmod(temporary, target.stat().st_mode & 0o777)
        os.replace(temporary, target)
    except OSError as error:
        raise type(error)(error.errno, error.strerror or str(error), os.fspath(path)) from None
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def check_folder(path: str | os.PathLike[str]) -> None:
    """Raise FileNotFoundError unless the folder of `path` exists."""
    if not Path(path).resolve().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder does not exist", os.fspath(path))
