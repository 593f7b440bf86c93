"""Share work among the processes of `torch.distributed`, if there are several.

Images are distributed round-robin and sums are added up. Without a process group one process does
everything. Any backend works (gloo, NCCL). Every process must call the same functions in the same
order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def share(items: Sequence[T]) -> list[T]:
    """Return the items of this process."""
    rank, size = rank_and_size()
    return list(items[rank::size])


def collect(results: list[T]) -> list[T]:
    """Undo `share`: return the results of all processes, in the order of the items."""
    _, size = rank_and_size()
    if size == 1:
        return results
    parts: list[Any] = [None] * size
    torch.distributed.all_gather_object(parts, results)
    return [parts[i % size][i // size] for i in range(sum(map(len, parts)))]


def run_together(run: Callable[[], T]) -> T:
    """Return the result of `run` in this process.

    If it fails in one process, raise an error in all of them, so that none waits for it.
    """
    _, size = rank_and_size()
    if size == 1:
        return run()
    error: Exception | None = None
    try:
        result = run()
    except Exception as raised:
        error = raised
    texts: list[str | None] = [None] * size
    torch.distributed.all_gather_object(
        texts, None if error is None else f"{type(error).__name__}: {error}"
    )
    if error is not None:
        raise error
    for rank, text in enumerate(texts):
        if text is not None:
            raise RuntimeError(f"process {rank} of {size} failed, so all processes stop: {text}")
    return result


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace float64 tensors on the CPU by their sums over all processes, in place."""
    if rank_and_size()[1] == 1:
        return
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    flat = torch.cat([tensor.flatten() for tensor in tensors]).to(device)
    torch.distributed.all_reduce(flat)
    sums = flat.cpu().split([tensor.numel() for tensor in tensors])
    for tensor, summed in zip(tensors, sums, strict=True):
        tensor.copy_(summed.view_as(tensor))


def broadcast(value: T) -> T:
    """Return the value of rank 0 in all processes.

    For values on which processes must agree, but which each could compute differently.
    """
    if rank_and_size()[1] == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, 0)
    return values[0]
