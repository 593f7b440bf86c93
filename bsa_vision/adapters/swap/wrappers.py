"""What others put around the modules of a model: adapters look through it.

Wrappers are modules that hold another one and call it (activation checkpointing, torch.compile, FSDP, DDP).
Others give a module a new class at run time (fully_shard, parametrizations); `own_class` names the one before.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from torch import nn

from bsa_vision.errors import PlanError

CHECKPOINT = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"
# Module and class of a wrapper -> the name of its child.
WRAPPERS: dict[tuple[str, str], str] = {
    (CHECKPOINT, "ActivationWrapper"): "_checkpoint_wrapped_module",
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    (
        "torch.distributed.fsdp.fully_sharded_data_parallel",
        "FullyShardedDataParallel",
    ): "_fsdp_wrapped_module",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch.optim.swa_utils", "AveragedModel"): "module",
    (
        "fairscale.nn.data_parallel.fully_sharded_data_parallel",
        "FullyShardedDataParallel",
    ): "_fsdp_wrapped_module",
    ("fairscale.nn.misc.flatten_params_wrapper", "FlattenParamsWrapper"): "_fpw_module",
    ("deepspeed.runtime.engine", "DeepSpeedEngine"): "module",
}


def own_class(kind: type) -> type:
    """Return the class that a module had before torch gave it one made at run time; else the class itself."""
    if not _of_torch(kind):
        return kind
    # torch itself derives from no class outside of torch.
    return next((one for one in kind.__mro__ if one is not object and not _of_torch(one)), kind)


def _of_torch(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"


def _child(module: nn.Module) -> str | None:
    """Return the name of what a known wrapper wraps, None for other modules."""
    kind: Any = type(module)
    name = _child_of(kind)
    return name if name is not None and name in module._modules else None


@lru_cache(maxsize=256)
def _child_of(kind: type) -> str | None:
    names = (WRAPPERS.get((one.__module__, one.__name__)) for one in kind.__mro__)
    return next((name for name in names if name is not None), None)


def unwrap(module: Any) -> Any:
    """Return what is inside of all known wrappers."""
    while (name := _child(module)) is not None:
        module = module.get_submodule(name)
    return module


class Modules:
    """The modules of a model, without known wrappers, under the names they would have without them."""

    def __init__(self, model: nn.Module) -> None:
        self._modules: dict[str, nn.Module] = {}
        self._paths: dict[str, str] = {}
        names = {"": ""}  # real path -> name
        inside = {"": _child(model)}  # real path -> child that is looked through
        for path, module in model.named_modules():
            parent, _, child = path.rpartition(".")
            if path:
                names[path] = (
                    names[parent]
                    if child == inside[parent]
                    else f"{names[parent]}.{child}".lstrip(".")
                )
                inside[path] = _child(module)
            self._modules[names[path]] = (
                module  # wrappers come first, what they wrap takes their place
            )
            self._paths[names[path]] = path

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        return iter(self._modules.items())

    def __getitem__(self, name: str) -> nn.Module:
        return self._modules[name]

    def path(self, name: str) -> str:
        """Return the path that `get_submodule` of the model takes."""
        return self._paths.get(name, name)  # a module in several places has one name here

    def unknown_wrapper(self, name: str) -> nn.Module | None:
        """Return what stands between a list of blocks and the block of the attention `name`, if anything does."""
        block = name.rpartition(".")[0]
        parts = block.split(".")
        while parts and not parts[-1].isdigit():
            parts.pop()
        around = ".".join(parts)
        only_child = around != block and len(self._modules[around]._modules) == 1
        return self._modules[around] if parts and only_child else None


def wrapped(block: nn.Module) -> PlanError:
    """Return what to raise where a block is not the family's own, and maybe wraps it."""
    return PlanError(
        f"a block of this model is a {type(block).__name__}: no block that this version knows, and no wrapper that it "
        "looks through; sparsify_ first and wrap after, or unwrap it."
    )
