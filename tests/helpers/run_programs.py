"""Run saved programs and print their errors relative to the original models, as JSON.

    python -m tests.helpers.run_programs FOLDER [other]

other   first build another sparse model, and keep it alive
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

import bsa_vision as bsa

KINDS = ("torch.export", "AOTInductor", "torch.jit.trace", "ONNX")


def other_model() -> torch.nn.Module:
    """Build a sparse model with at least as many layers as the saved ones, and other masks."""
    encoder = bsa.create_encoder(4, 48, 4, image_size=96, patch_size=8, out_channels=None)
    plan = bsa.uniform_plan(encoder, "local_window", radius=0, tile=(4, 4), block_size=16)
    return bsa.sparsify_(encoder, plan)


def load(kind: str, path: Path):
    """Load a program as a function of the pixels."""
    if kind == "torch.export":
        return torch.export.load(path).module()
    if kind == "AOTInductor":
        return torch._inductor.aoti_load_package(str(path))
    if kind == "torch.jit.trace":
        return torch.jit.load(path)
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    (name,) = (x.name for x in session.get_inputs())
    return lambda pixels: torch.from_numpy(session.run(None, {name: pixels.numpy()})[0])


def errors(folder: Path) -> dict[str, float]:
    """Return the relative error of each program in `folder`, by "kind, model"."""
    found = {}
    for case in sorted(x for x in folder.iterdir() if x.is_dir()):
        pixels, expected = torch.load(case / "expected.pt")
        for kind in KINDS:
            with torch.no_grad():
                out: Tensor = load(kind, case / f"{kind}.pt2")(pixels)
            found[f"{kind}, {case.name}"] = ((out - expected).norm() / expected.norm()).item()
    return found


if __name__ == "__main__":
    alive = other_model() if "other" in sys.argv[2:] else None
    print(json.dumps(errors(Path(sys.argv[1]))))
