"""Unwrap modules: adapters ignore known wrappers.

Wrappers are modules that hold another module and call it (activation checkpointing, torch.compile,
FSDP, DDP). Others give a module a new class at run time (fully_shard, parametrizations);
`own_class` returns the previous one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from torch import nn

from bsa_vision.errors import PlanError

CHECKPOINT = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"
FSDP = "torch.distributed.fsdp.fully_sharded_data_parallel"
FAIRSCALE_FSDP = "fairscale.nn.data_parallel.fully_sharded_data_parallel"
# Module and class of a wrapper -> the name of its child.
WRAPPERS: dict[tuple[str, str], str] = {
    (CHECKPOINT, "ActivationWrapper"): "_checkpoint_wrapped_module",
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    (FSDP, "FullyShardedDataParallel"): "_fsdp_wrapped_module",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch.optim.swa_utils", "AveragedModel"): "module",
    (FAIRSCALE_FSDP, "FullyShardedDataParallel"): "_fsdp_wrapped_module",
    ("fairscale.nn.misc.flatten_params_wrapper", "FlattenParamsWrapper"): "_fpw_module",
    ("deepspeed.runtime.engine", "DeepSpeedEngine"): "module",
}


def own_class(kind: type) -> type:
    """Return the class of a module before torch replaced it at run time, or `kind` itself."""
    if not _of_torch(kind):
        return kind
    # Classes of torch itself have no base class outside of torch.
    return next((base for base in kind.__mro__ if base is not object and not _of_torch(base)), kind)


def _of_torch(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"


def _child(module: nn.Module) -> str | None:
    """Return the name of the module inside a known wrapper; None for other modules."""
    kind: Any = type(module)
    name = _child_of(kind)
    return name if name is not None and name in module._modules else None


@lru_cache(maxsize=256)
def _child_of(kind: type) -> str | None:
    names = (WRAPPERS.get((base.__module__, base.__name__)) for base in kind.__mro__)
    return next((name for name in names if name is not None), None)


def unwrap(module: Any) -> Any:
    """Return the module inside all known wrappers."""
    while (name := _child(module)) is not None:
        module = module.get_submodule(name)
    return module


class Modules:
    """The modules of a model without known wrappers, by the names they have without them."""

    def __init__(self, model: nn.Module) -> None:
        self._modules: dict[str, nn.Module] = {}
        self._paths: dict[str, str] = {}
        names = {"": ""}  # real path -> name
        wrapped_child = {"": _child(model)}  # real path -> name of the wrapped child
        for path, module in model.named_modules():
            parent, _, child = path.rpartition(".")
            if path:
                names[path] = names[parent]
                if child != wrapped_child[parent]:
                    names[path] = f"{names[parent]}.{child}".lstrip(".")
                wrapped_child[path] = _child(module)
            # A wrapper comes before the module inside, which replaces it.
            self._modules[names[path]] = module
            self._paths[names[path]] = path

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        return iter(self._modules.items())

    def __getitem__(self, name: str) -> nn.Module:
        return self._modules[name]

    def path(self, name: str) -> str:
        """Return the path for `get_submodule` of the model."""
        return self._paths.get(name, name)  # shared modules have one name only

    def unknown_wrapper(self, name: str) -> nn.Module | None:
        """Return the unknown wrapper around the block of the attention `name`, or None."""
        block = name.rpartition(".")[0]
        parts = block.split(".")
        while parts and not parts[-1].isdigit():
            parts.pop()
        wrapper = ".".join(parts)
        only_child = wrapper != block and len(self._modules[wrapper]._modules) == 1
        return self._modules[wrapper] if parts and only_child else None


def wrapped(block: nn.Module) -> PlanError:
    """Return the error for a block that is neither of the family nor a known wrapper."""
    return PlanError(
        f"a block of this model is a {type(block).__name__}, which is neither a supported block "
        "nor a known wrapper: call sparsify_ before wrapping, or unwrap it."
    )
