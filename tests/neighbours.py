"""Model libraries that only the tests use, installed next to the environment.

segment_anything and timm need torchvision; sam2 and peft are used in tests only. The wheel of
torchvision on the package index is built for CUDA. With a CPU build of torch it fails to import,
and transformers with it, so it is not installed in the environment of the examples. This module
first declares the two operators that are missing, without an implementation.

    python -m tests.neighbours examples/sam_encoder.py --rounds 5    run a script with the libraries
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch

FOLDER = Path(sys.prefix) / "model-libraries"  # made by `make test`
LIBRARIES = ("timm", "torchvision", "segment_anything", "sam2", "peft", "accelerate", "psutil")
MISSING = None if FOLDER.is_dir() else f"{FOLDER} is missing: run `make test`, which fills it"
_declared: list[torch.library.Library] = []


def enable() -> None:
    """Make the libraries importable in this process."""
    if _declared:
        return
    if MISSING:
        raise ModuleNotFoundError(MISSING, name=LIBRARIES[0])
    version = (FOLDER / "torchvision" / "version.py").read_text()
    if torch.version.cuda is None and "cuda = None" not in version:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)  # the operators exist only as long as this object
    # A spawned process inherits the path of its parent, but not its operators.
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))


if __name__ == "__main__":
    enable()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
