"""Model libraries that need torchvision (segment_anything, timm), and others that only tests use (sam2, peft), installed beside the environment for tests only.

torchvision's wheel on the package index is built for CUDA. On a CPU build of torch it fails to import, and transformers with it, so
it stays out of the environment that the examples run in. Here the two operators that it misses are declared first, unimplemented.

    python -m tests.neighbours examples/sam_encoder.py --rounds 5        runs a script with these libraries at hand
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch

FOLDER = Path(sys.prefix) / "model-libraries"  # made by `make test`
_declared: list[torch.library.Library] = []


def enable() -> None:
    """Make the libraries importable in this process."""
    if _declared:
        return
    if not FOLDER.is_dir():
        raise RuntimeError(
            f"{FOLDER} is missing: the tests need timm and segment_anything there; run `make test` once."
        )
    version = (FOLDER / "torchvision" / "version.py").read_text()
    if torch.version.cuda is None and "cuda = None" not in version:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)  # the operators live as long as this
    if (
        str(FOLDER) not in sys.path
    ):  # a spawned process has its parent's path, but not its operators
        sys.path.append(str(FOLDER))


if __name__ == "__main__":
    enable()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
