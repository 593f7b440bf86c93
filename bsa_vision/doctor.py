"""What is here, and what works: the machine, our backends, the libraries around us. Nothing is downloaded, a broken one breaks nothing."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from bsa_vision.backends import BACKENDS, Problem, reasons
from bsa_vision.backends import compiled as loop
from bsa_vision.head_masks import HeadMasks

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
OK, ABSENT, BROKEN, NOT_HERE = "ok", "not installed", "BROKEN", "not here"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    kind    "machine", "backend" or "library"
    state   "ok"; "not installed"; "not here": cannot run on this machine; "BROKEN": installed, and fails to import
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
    return [*_machine(), *_backends(), *(_library(name) for name in LIBRARIES)]


def _machine() -> list[Finding]:
    threads = f"{torch.get_num_threads()} torch threads, {os.cpu_count()} logical CPUs"
    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {threads}"
    found = [
        Finding("machine", "python", OK, platform.python_version()),
        Finding("machine", "torch", OK, torch.__version__),
        Finding("machine", "CPU", OK, cpu),
    ]
    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
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
    found = [Finding("backend", name, NOT_HERE if why[name] else OK, why[name] or f"on {device}") for name in BACKENDS]
    reason = loop.why_not()
    capability = torch.backends.cpu.get_cpu_capability()
    found.append(Finding("backend", "gather's compiled loop", NOT_HERE if reason else OK, reason or capability))
    return found


def _library(name: str) -> Finding:
    distribution, purpose = LIBRARIES[name]
    try:
        number = version(distribution)
    except PackageNotFoundError:
        number = ""
    error = _import_error(lambda: importlib.import_module(name))
    if error is None:
        return Finding("library", name, OK, number or "version unknown")
    if isinstance(error, ModuleNotFoundError) and error.name == name:
        return Finding("library", name, ABSENT, f"for {purpose}")
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return Finding("library", name, BROKEN, f"{number or 'version unknown'}: {type(error).__name__}: {first}")


def _import_error(load: Callable[[], object]) -> BaseException | None:
    try:
        load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # what a broken library raises is anything, SystemExit included
        return error
    return None
