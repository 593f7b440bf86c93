"""Work dealt over the cores: worker threads that each compute on one core, so that small operations never fork and join.

What is process-wide: torch keeps one number, `torch.set_num_threads`, from which every new thread starts, and one setting
per thread. Each worker sets its own to 1, and the number is put back at once; a thread that starts in that moment, while the
first workers are made, may begin with 1. Callers' own settings are never changed. A forked child makes workers of its own.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from queue import SimpleQueue

import torch
from torch import Tensor

Task = Callable[[], None]

_lock = threading.Lock()
_pools: dict[int, Pool] = {}  # by number of workers
_local = threading.local()


def _forget() -> None:
    """In a forked child: the parent's threads do not exist here."""
    global _lock, _local
    _lock, _local = threading.Lock(), threading.local()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class Pool:
    """Daemon threads that take jobs from one queue.

    A ThreadPoolExecutor refuses jobs once the main thread has ended, when other threads and atexit handlers still run.
    """

    def __init__(self, size: int) -> None:
        self._jobs: SimpleQueue[tuple[Future[None], Task]] = SimpleQueue()
        started = threading.Barrier(size + 1)
        threads = [
            threading.Thread(
                target=self._serve, args=(started,), name=f"bsa-vision_{n}", daemon=True
            )
            for n in range(size)
        ]
        number = torch.get_num_threads()
        try:
            for thread in threads:
                thread.start()
            started.wait()
        except (
            BaseException
        ):  # Ctrl-C, or no new threads at shutdown: those that wait for the others give up
            started.abort()
            raise
        finally:
            torch.set_num_threads(number)

    def submit(self, task: Task) -> Future[None]:
        """Let a worker run `task`; the future raises what it raises."""
        job: Future[None] = Future()
        self._jobs.put((job, task))
        return job

    def _serve(self, started: threading.Barrier) -> None:
        if started.broken:
            return
        torch.get_num_threads()  # or the first operation in this thread would undo the next line
        torch.set_num_threads(1)
        _local.is_worker = True
        try:
            started.wait()
        except threading.BrokenBarrierError:
            return
        while True:
            _run(
                *self._jobs.get()
            )  # in a frame of its own, so that a waiting worker holds on to nothing


def _run(job: Future[None], task: Task) -> None:
    try:
        task()
    except BaseException as error:
        job.set_exception(error)
    else:
        job.set_result(None)


def _pool(size: int) -> Pool | None:
    """Return the workers, or None where the interpreter makes no new threads any more."""
    with _lock:
        if size not in _pools:
            try:
                _pools[size] = Pool(size)
            except RuntimeError:
                return None
        return _pools[size]


def run_tasks(tasks: Iterable[Task], device: torch.device) -> None:
    """Run all tasks, which must not depend on each other, and return when all are done; the first error is raised.

    Dealt over as many workers as the caller has torch threads. In turn, on the calling thread, where that gains nothing:
    on other devices, with one thread, with fewer tasks than threads, or within a task.
    """
    queue = deque(tasks)
    size = torch.get_num_threads()
    inline = (
        device.type != "cpu"
        or size == 1
        or len(queue) < size
        or getattr(_local, "is_worker", False)
    )
    pool = None if inline else _pool(size)
    inference = torch.is_inference_mode_enabled()

    def work() -> None:
        with (
            torch.inference_mode(inference),
            torch.no_grad(),
        ):  # in this order: leaving inference mode turns gradients on
            while True:
                try:
                    task = queue.popleft()
                except IndexError:
                    return
                task()

    if pool is None:
        work()
        return
    jobs = [pool.submit(work) for _ in range(size)]
    try:
        wait(jobs)
    finally:
        queue.clear()  # interrupted: no new task starts
    for job in jobs:
        job.result()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory of this thread, kept from call to call; valid until the next `scratch` of the same name.

    Code that hands out its address must hold on to the tensor: what threads keep is freed when the interpreter exits,
    while daemon threads may still compute.
    """
    size = 1
    for side in shape:
        size *= side
    buffers = _local.__dict__.setdefault("buffers", {})
    buffer = buffers.get((name, dtype, device))
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):
            buffer = buffers[name, dtype, device] = torch.empty(size, dtype=dtype, device=device)
    return buffer[:size].view(shape)
