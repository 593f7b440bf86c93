"""Report the machine, the available backends, and missing or broken libraries.

Nothing is downloaded. A broken library does not affect the rest of the report.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import torch

from bsa_vision.attention.backends import cpu_kernel
from bsa_vision.attention.backends.problem import Problem
from bsa_vision.attention.backends.select import BACKENDS, GPU_ONLY, reasons
from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.errors import first_line
from bsa_vision.storage import machine

# import name -> (distribution, purpose)
LIBRARIES = {
    "transformers": ("transformers", "models"),
    "timm": ("timm", "models"),
    "torchvision": ("torchvision", "models; timm and segment_anything need it"),
    "segment_anything": ("segment-anything", "models"),
    "sam2": ("sam2", "models"),
    "block_sparse_attn": ("block-sparse-attn", "the kernel backend"),
    "cudnn": ("nvidia-cudnn-frontend", "the cudnn backend"),
    "safetensors": ("safetensors", "checkpoints"),
    "matplotlib": ("matplotlib", "pictures"),
    "rich": ("rich", "the command line"),
    "typer": ("typer", "the command line"),
}
# import name -> its modules and classes that models need; they can fail to import although the
# top-level package imports
PARTS = {
    "transformers": (
        *("ViTModel", "Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel"),
        *("CLIPVisionModel", "SiglipVisionModel", "Siglip2VisionModel"),
        *("SamVisionModel", "Sam2VisionModel", "Sam3ViTModel"),
    ),
    "timm": (
        "models.vision_transformer",
        "models.eva",
        "models.vision_transformer_sam",
        "models.hieradet_sam2",
    ),
    "torchvision": ("models.vision_transformer",),
    "segment_anything": ("modeling",),
    "sam2": ("modeling.backbones.hieradet", "modeling.memory_attention"),
}
OK, ABSENT, BROKEN = "ok", "not installed", "BROKEN"
UNAVAILABLE, SHADOWED = "unavailable", "shadowed"


@dataclass(frozen=True)
class Finding:
    """One row of the report.

    kind    "package" (bsa-vision itself), "machine", "backend" or "library"
    state   "ok"
            "not installed"
            "unavailable"    cannot run on this machine
            "BROKEN"         installed, but fails to import
            "shadowed"       hidden by another copy that comes first on sys.path
    detail  version, device or reason
    """

    kind: str
    name: str
    state: str
    detail: str

    @property
    def is_wrong(self) -> bool:
        return self.state == BROKEN


def doctor() -> list[Finding]:
    """Check everything; this imports all libraries that are installed."""
    return [_package(), *_machine(), *_backends(), *(_library(name) for name in LIBRARIES)]


def _package() -> Finding:
    """Report which copy of bsa-vision runs, and whether it hides an installed one."""
    running = Path(__file__).parents[1]
    try:
        installed = Path(str(distribution("bsa-vision").locate_file("bsa_vision")))
        number = version("bsa-vision")
    except PackageNotFoundError:
        return Finding("package", "bsa-vision", OK, f"not installed, runs from {running}")
    if (installed / "__init__.py").is_file() and installed.resolve() != running.resolve():
        return Finding(
            "package",
            "bsa-vision",
            SHADOWED,
            f"{running} hides {number}, installed in {installed}, and cannot use its compiled "
            "loop: run from another folder, or install this copy with pip install -e .",
        )
    return Finding("package", "bsa-vision", OK, f"{number}, {running}")


def _machine() -> list[Finding]:
    about = machine.describe()
    found = [
        Finding("machine", "python", OK, about.python),
        Finding("machine", "torch", OK, about.torch_version),
        Finding("machine", "CPU", OK, f"{about.hardware}, {about.cores} cores ({about.system})"),
    ]
    if not torch.cuda.is_available():
        no_cuda = torch.version.cuda is None
        reason = "torch is built without CUDA" if no_cuda else "torch finds no CUDA device"
        return [*found, Finding("machine", "GPU", UNAVAILABLE, reason)]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        detail = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory}"
        found.append(Finding("machine", f"cuda:{index}", OK, detail))
    return found


def _backends() -> list[Finding]:
    """Check each backend with a small bfloat16 call, on a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = torch.zeros(1, 2, 256, 64, device=device, dtype=torch.bfloat16)
    mask = torch.eye(2, dtype=torch.bool).expand(1, 2, 2, 2)
    why = reasons(Problem(q, q, q, HeadMasks(mask), scale=1.0))
    if device == "cpu":
        why |= dict.fromkeys(GPU_ONLY, "needs a CUDA device")
    loop = cpu_kernel.why_not()
    return [
        *(
            Finding("backend", name, UNAVAILABLE if why[name] else OK, why[name] or f"on {device}")
            for name in BACKENDS
        ),
        Finding(
            "backend",
            "gather's compiled loop",
            UNAVAILABLE if loop else OK,
            loop or torch.backends.cpu.get_cpu_capability(),
        ),
    ]


def _library(name: str) -> Finding:
    """Import a library, and those of its parts that models need."""
    distribution, purpose = LIBRARIES[name]
    try:
        number = version(distribution)
    except PackageNotFoundError:
        number = ""
    error, part = _import_error(lambda: importlib.import_module(name)), ""
    for part in PARTS.get(name, ()) if error is None else ():
        error = _import_error(lambda part=part: _import_part(name, part))  # type: ignore[misc]
        if error is not None:
            break
    if error is None:
        return Finding("library", name, OK, number or "version unknown")
    if isinstance(error, ModuleNotFoundError) and error.name == name:
        return Finding("library", name, ABSENT, f"for {purpose}")
    # transformers wraps the error of a model's module in one without details.
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    what = f"{number or 'version unknown'}{part and ', ' + part}"
    return Finding("library", name, BROKEN, f"{what}: {first_line(error)}")


def _import_part(name: str, part: str) -> None:
    """Import a module of a library, or a class that the library imports lazily."""
    if part[0].isupper():
        getattr(importlib.import_module(name), part)
    else:
        importlib.import_module(f"{name}.{part}")


def advice(finding: Finding) -> str:
    """Return how to fix a broken library."""
    if "torchvision" in finding.detail:
        return (
            f"torchvision does not match torch {torch.__version__}, so libraries that use it fail "
            "to import. Install the torchvision built for this torch, from the same package index, "
            "or uninstall torchvision and the libraries that need it (timm)."
        )
    return (
        f"{finding.name} is installed but fails to import. Reinstall a version that matches torch, "
        "or uninstall it; bsa_vision works without it."
    )


def _import_error(load: Callable[[], object]) -> BaseException | None:
    try:
        load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # broken libraries raise all kinds of errors, even SystemExit
        return error
    return None
