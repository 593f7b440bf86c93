"""Distribute tasks over worker threads that compute on one core each.

This avoids torch's fork and join within every small operation.

`torch.set_num_threads` sets one value per thread, and a process-wide value that new threads start
with. Every worker sets its own value to 1, and the process-wide value is restored immediately. A
thread that starts while the first workers start may begin with 1 torch thread. The caller's own
setting never changes. A forked child process starts its own workers.
"""

from __future__ import annotations

import math
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
    """Start without workers in a forked child, where the parent's threads do not exist."""
    global _lock, _local
    _lock, _local = threading.Lock(), threading.local()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class Pool:
    """Daemon threads that take jobs from one queue.

    A ThreadPoolExecutor rejects jobs once the main thread has ended, although other threads and
    atexit handlers may still run.
    """

    def __init__(self, size: int) -> None:
        self._jobs: SimpleQueue[tuple[Future[None], Task]] = SimpleQueue()
        started = threading.Barrier(size + 1)

        def thread(number: int) -> threading.Thread:
            name = f"bsa-vision_{number}"
            return threading.Thread(target=self._work, args=(started,), name=name, daemon=True)

        num_threads = torch.get_num_threads()
        try:
            for number in range(size):
                thread(number).start()
            started.wait()
        except BaseException:  # Ctrl-C, or no new threads at shutdown: let started workers give up
            started.abort()
            raise
        finally:
            torch.set_num_threads(num_threads)

    def submit(self, task: Task) -> Future[None]:
        """Let a worker run `task`; the returned future raises the exceptions of the task."""
        job: Future[None] = Future()
        self._jobs.put((job, task))
        return job

    def _work(self, started: threading.Barrier) -> None:
        if started.broken:
            return
        torch.get_num_threads()  # without this, the first operation would undo the next line
        torch.set_num_threads(1)
        _local.is_worker = True
        try:
            started.wait()
        except threading.BrokenBarrierError:
            return
        while True:
            _run(*self._jobs.get())  # a call, so that a waiting worker keeps no task alive


def _run(job: Future[None], task: Task) -> None:
    try:
        task()
    except BaseException as error:
        job.set_exception(error)
    else:
        job.set_result(None)


def _pool(size: int) -> Pool | None:
    """Return the workers, or None if the interpreter starts no more threads."""
    with _lock:
        if size not in _pools:
            try:
                _pools[size] = Pool(size)
            except RuntimeError:
                return None
        return _pools[size]


def run_tasks(tasks: Iterable[Task], device: torch.device) -> None:
    """Run independent tasks and wait until all are done; raise their first error.

    Tasks run on as many workers as the caller has torch threads. They run in the calling thread if
    workers would not help: on other devices, with one thread, with fewer tasks than threads, or
    within another task.
    """
    queue, size = deque(tasks), torch.get_num_threads()
    inline = device.type != "cpu" or size == 1 or len(queue) < size
    inline = inline or getattr(_local, "is_worker", False)
    pool = None if inline else _pool(size)
    inference = torch.is_inference_mode_enabled()

    def work() -> None:
        # In this order, because inference_mode(False) enables gradients.
        with torch.inference_mode(inference), torch.no_grad():
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
        queue.clear()  # if interrupted, start no new task
    for job in jobs:
        job.result()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised memory of this thread, reused by the next call with the same name.

    Code that passes its address on must keep the tensor alive: thread-local buffers are freed when
    the interpreter exits, while daemon threads may still compute.
    """
    size = math.prod(shape)
    buffers = _local.__dict__.setdefault("buffers", {})
    buffer = buffers.get((name, dtype, device))
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):
            buffer = buffers[name, dtype, device] = torch.empty(size, dtype=dtype, device=device)
    return buffer[:size].view(shape)
