"""Work shared by the processes of `torch.distributed`, where there are several: images are dealt out in turn, sums are added up.

Without a process group, one process does everything. Any backend serves (gloo, NCCL); every process must call the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """Which of the processes this is, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def share(items: Sequence[T]) -> list[T]:
    """Those that this process is dealt."""
    own, count = rank_and_size()
    return list(items[own::count])


def collect(own: list[T]) -> list[T]:
    """Undo `share`: what all processes made of theirs, in the order of the items."""
    _, count = rank_and_size()
    if count == 1:
        return own
    parts: list[Any] = [None] * count
    torch.distributed.all_gather_object(parts, own)
    return [parts[i % count][i // count] for i in range(sum(map(len, parts)))]


def together(run: Callable[[], T]) -> T:
    """What `run` returns in this process; where it fails in one of them, an error in all, so that none waits for it."""
    _, count = rank_and_size()
    if count == 1:
        return run()
    error: Exception | None = None
    try:
        result = run()
    except Exception as raised:
        error = raised
    said: list[str | None] = [None] * count
    torch.distributed.all_gather_object(
        said, None if error is None else f"{type(error).__name__}: {error}"
    )
    if error is not None:
        raise error
    for other, text in enumerate(said):
        if text is not None:
            raise RuntimeError(f"process {other} of {count} failed, and all stop with it: {text}")
    return result


def add_up(tensors: Sequence[Tensor]) -> None:
    """Float64 tensors on the CPU, in place: their sums over all processes."""
    if rank_and_size()[1] == 1:
        return
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    flat = torch.cat([tensor.flatten() for tensor in tensors]).to(device)
    torch.distributed.all_reduce(flat)
    for tensor, summed in zip(
        tensors, flat.cpu().split([tensor.numel() for tensor in tensors]), strict=True
    ):
        tensor.copy_(summed.view_as(tensor))


def of_the_first(value: T) -> T:
    """What the first process has, in all of them: where processes must agree on something that each could find differently."""
    if rank_and_size()[1] == 1:
        return value
    held = [value]
    torch.distributed.broadcast_object_list(held, 0)
    return held[0]
