"""What is here, and what works: the machine, our backends, the libraries around us. Nothing is downloaded, a broken one breaks nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import torch

from bsa_vision.attention.backends import cpu_kernel as loop
from bsa_vision.attention.backends.problem import Problem
from bsa_vision.attention.backends.select import BACKENDS, reasons
from bsa_vision.attention.head_masks import HeadMasks
from bsa_vision.errors import first_line
from bsa_vision.storage import machine

# import name -> (distribution, what it is for)
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
# import name -> modules, and classes of transformers, that models are made of: the top package may import without them
PARTS = {
    "transformers": (
        *(
            "ViTModel",
            "Dinov2Model",
            "Dinov2WithRegistersModel",
            "DINOv3ViTModel",
            "CLIPVisionModel",
        ),
        *(
            "SiglipVisionModel",
            "Siglip2VisionModel",
            "SamVisionModel",
            "Sam2VisionModel",
            "Sam3ViTModel",
        ),
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
OK, ABSENT, BROKEN, NOT_HERE, SHADOWED = "ok", "not installed", "BROKEN", "not here", "shadowed"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    kind    "package" (bsa-vision itself), "machine", "backend" or "library"
    state   "ok"; "not installed"; "unavailable": cannot run on this machine; "BROKEN": installed, and fails to import;
            "shadowed": an installation is hidden by sources that come first on the path
    detail  version, or why not
    """

    kind: str
    name: str
    state: str
    detail: str

    @property
    def is_wrong(self) -> bool:
        return self.state == BROKEN


def doctor() -> list[Finding]:
    """Look at everything; takes as long as importing what is installed."""
    return [_package(), *_machine(), *_backends(), *(_library(name) for name in LIBRARIES)]


def _package() -> Finding:
    """Say which bsa-vision runs, and whether another one is installed: its compiled loop does not serve this one."""
    here = Path(__file__).parents[PACKAGE_DEPTH]
    try:
        installed = Path(str(distribution("bsa-vision").locate_file("bsa_vision")))
        number = version("bsa-vision")
    except PackageNotFoundError:
        return Finding("package", "bsa-vision", OK, f"not installed, runs from {here}")
    if (installed / "__init__.py").is_file() and installed.resolve() != here.resolve():
        return Finding(
            "package",
            "bsa-vision",
            SHADOWED,
            f"{here} hides {number}, installed in {installed}, whose compiled loop is not used: run from another folder, "
            "or install this one with pip install -e .",
        )
    return Finding("package", "bsa-vision", OK, f"{number}, {here}")


PACKAGE_DEPTH = 0  # folders from this file to the package


def _machine() -> list[Finding]:
    here = machine.describe()
    found = [
        Finding("machine", "python", OK, here.python),
        Finding("machine", "torch", OK, here.torch_version),
        Finding("machine", "CPU", OK, f"{here.hardware}, {here.cores} cores ({here.system})"),
    ]
    if not torch.cuda.is_available():
        built = (
            "this torch is built without CUDA"
            if torch.version.cuda is None
            else "torch sees no CUDA device"
        )
        return [*found, Finding("machine", "GPU", NOT_HERE, built)]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        detail = f"{about.name}, compute capability {about.major}.{about.minor}, {about.total_memory / 2**30:.0f} GiB"
        found.append(Finding("machine", f"cuda:{index}", OK, detail))
    return found


def _backends() -> list[Finding]:
    """Each backend on the most favourable call this machine allows: bfloat16, on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = torch.zeros(1, 2, 256, 64, device=device, dtype=torch.bfloat16)
    mask = torch.eye(2, dtype=torch.bool).expand(1, 2, 2, 2)
    why = reasons(Problem(q, q, q, HeadMasks(mask), scale=1.0))
    found = [
        Finding("backend", name, NOT_HERE if why[name] else OK, why[name] or f"on {device}")
        for name in BACKENDS
    ]
    reason = loop.why_not()
    capability = torch.backends.cpu.get_cpu_capability()
    found.append(
        Finding(
            "backend", "gather's compiled loop", NOT_HERE if reason else OK, reason or capability
        )
    )
    return found


def _library(name: str) -> Finding:
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
    while (
        error.__cause__ or error.__context__
    ):  # transformers says that something failed, its cause what
        error = error.__cause__ or error.__context__ or error
    what = f"{number or 'version unknown'}{part and ', ' + part}"
    return Finding("library", name, BROKEN, f"{what}: {first_line(error)}")


def _import_part(name: str, part: str) -> None:
    """Import a module of a library, or a class of one that loads them when they are asked for."""
    if part[0].isupper():
        getattr(importlib.import_module(name), part)
    else:
        importlib.import_module(f"{name}.{part}")


def advice(finding: Finding) -> str:
    """Return what to do about a broken library."""
    if "torchvision" in finding.detail:
        return (
            f"torchvision does not fit torch {torch.__version__}, and what uses it fails with it: install the torchvision made "
            "for this torch, from where torch came from, or uninstall torchvision and what needs it (timm)."
        )
    return (
        f"{finding.name} is installed and fails to import: reinstall it to fit your torch, or uninstall it; bsa_vision works "
        "without."
    )


def _import_error(load: Callable[[], object]) -> BaseException | None:
    try:
        load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # what a broken library raises is anything, SystemExit included
        return error
    return None
