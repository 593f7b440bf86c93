"""Caches, atomic writes, worker threads, timing and pictures."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import bsa_vision as bsa
from bsa_vision.attention.backends import cpu_kernel, workers
from bsa_vision.attention.backends.workers import run_tasks, scratch
from bsa_vision.masks import TokenLayout, local_window
from bsa_vision.measure import timing
from bsa_vision.measure.timing import paired
from bsa_vision.storage import atomic_write
from bsa_vision.storage.memory_cache import Cache
from bsa_vision.viz import View, block_at, plot_views

CPU = torch.device("cpu")


class TestCache:
    def test_bounded_by_last_use(self):
        cache, made = Cache(2), []

        def get(key):
            return cache.get(key, lambda: made.append(key) or key)

        for key in ("a", "b", "a", "c", "a", "b"):
            assert get(key) == key
        assert made == ["a", "b", "c", "b"]
        assert len(cache) == 2

    def test_copies_start_empty(self):
        cache = Cache(3)
        cache.get("a", lambda: 1)
        assert len(pickle.loads(pickle.dumps(cache))) == 0

    def test_the_first_of_two_threads_wins(self):
        cache, barrier, seen = Cache(4), threading.Barrier(2), []

        def make():
            barrier.wait()
            return object()

        threads = [
            threading.Thread(target=lambda: seen.append(cache.get("k", make))) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen[0] is seen[1]


class TestFiles:
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_ctrl_c_stays_ctrl_c(self, tmp_path, monkeypatch, when):
        """Ctrl-C during the replacement leaves the old or the new file, and no other."""
        path, replace = tmp_path / "plan.json", os.replace
        path.write_bytes(b"old")

        def interrupted(source, target):
            if when == "after":
                replace(source, target)
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            atomic_write.write(path, b"n", b"ew")
        assert path.read_bytes() == (b"new" if when == "after" else b"old")
        assert list(tmp_path.iterdir()) == [path]

    def test_interrupted_at_any_line(self, tmp_path):
        path, line, done = tmp_path / "plan.json", 0, False
        while not done:
            line += 1
            path.write_bytes(b"old")
            remaining = [line]

            def trace(frame, event, arg, remaining=remaining):
                if frame.f_code.co_filename != atomic_write.__file__:
                    return None
                if event == "line":
                    remaining[0] -= 1
                    if remaining[0] == 0:
                        raise KeyboardInterrupt
                return trace

            sys.settrace(trace)
            try:
                atomic_write.write(path, b"new")
                done = True
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(None)
            assert path.read_bytes() in (b"old", b"new")
            assert list(tmp_path.iterdir()) == [path]
        assert line > 8

    def test_errors_name_what_was_given(self, tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            atomic_write.write(tmp_path / "none" / "plan.json", b"x")
        assert error.value.filename == str(tmp_path / "none" / "plan.json")
        assert ".tmp" not in str(error.value)
        (tmp_path / "x").mkdir()
        with pytest.raises(IsADirectoryError):
            atomic_write.write(tmp_path / "x", b"x")
        assert [x.name for x in tmp_path.iterdir()] == ["x"]


class TestWorkers:
    def test_every_task_runs_once_on_one_core_each(self):
        done, threads = [], []

        def task(i):
            threads.append(torch.get_num_threads())
            done.append(i)

        run_tasks([lambda i=i: task(i) for i in range(50)], CPU)
        assert sorted(done) == list(range(50))
        assert set(threads) == {1}

    def test_the_first_operation_of_a_worker_keeps_to_one_core(self):
        """A new thread takes torch's process-wide number of threads at its first operation."""
        counts = []

        def task():
            torch.randn(64, 64) @ torch.randn(64, 64)
            counts.append(torch.get_num_threads())

        run_tasks([task] * 20, CPU)
        assert set(counts) == {1}

    def test_errors_reach_the_caller_and_the_pool_survives(self):
        def fail():
            raise ZeroDivisionError("in a task")

        with pytest.raises(ZeroDivisionError, match="in a task"):
            run_tasks([fail] * 8, CPU)
        self.test_every_task_runs_once_on_one_core_each()

    def test_tasks_within_tasks(self):
        done = []
        run_tasks([lambda: run_tasks([lambda: done.append(1)] * 5, CPU)] * 6, CPU)
        assert len(done) == 30

    def test_one_thread_stays_on_the_callers(self):
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            seen = set()
            run_tasks([lambda: seen.add(threading.current_thread())] * 5, CPU)
            assert seen == {threading.current_thread()}
        finally:
            torch.set_num_threads(before)

    def test_scratch_is_kept_and_grows(self):
        first = scratch("test", (4, 8), torch.float32, CPU)
        assert scratch("test", (2, 3), torch.float32, CPU).data_ptr() == first.data_ptr()
        assert scratch("test", (2, 3), torch.float64, CPU).dtype == torch.float64
        assert scratch("test", (40, 80), torch.float32, CPU).shape == (40, 80)

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_data_loader_workers(self, method):
        """A process forked after the pool was made does not wait for threads it lacks."""
        expected = attention_of(3)
        loader = torch.utils.data.DataLoader(
            Attentions(),
            num_workers=2,
            multiprocessing_context=multiprocessing.get_context(method),
            timeout=120,
        )
        results = [item[0] for item in loader]
        assert torch.equal(results[3], expected)

    def test_calls_after_the_main_thread_has_ended(self):
        """Threads, timers, pools and atexit handlers still get correct results."""
        done = subprocess.run(
            [sys.executable, "-c", LATE], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert sorted(done.stdout.split()) == ["atexit", "new-workers", "pool", "thread", "timer"]
        assert "Error" not in done.stderr

    @pytest.mark.slow
    @pytest.mark.parametrize("threads", [1, 2])
    def test_daemon_threads_that_compute_at_exit(self, threads):
        """Daemon threads read no freed memory at exit; the interpreter may abort in torch's C++."""
        done = subprocess.run(
            [sys.executable, "-c", ABANDONED, str(threads)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode in (0, -signal.SIGABRT), done.stderr

    def test_memory_in_use_outlives_what_its_thread_keeps(self, monkeypatch):
        """Buffers stay alive during a call, even if the thread's cache is cleared.

        The interpreter clears it at exit while daemon threads compute.
        """
        alive = []

        def compute(batch):
            (memory,) = (x for (name, *_), x in workers._local.buffers.items() if name == "attend")
            storage = StorageWeakRef(memory.untyped_storage())
            del memory
            workers._local.buffers.clear()
            alive.append(not storage.expired())

        monkeypatch.setattr(cpu_kernel, "variant", lambda capability: (compute, compute))
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            attention_of(0)
        finally:
            torch.set_num_threads(before)
        assert alive
        assert all(alive)


LATE = """
import atexit, concurrent.futures, os, threading, time, torch
torch.set_num_threads(2)
import bsa_vision as bsa
q = torch.randn(1, 4, 600, 32)
hm = bsa.HeadMasks(torch.rand(1, 4, 5, 5) < .5, allow_empty_rows=True)
expected = bsa.sparse_attention(q, q, q, hm)
def late(name, number=2):
    if name == "pool":  # the main thread waits for it at exit
        time.sleep(0.5)
    elif name != "atexit":
        threading.main_thread().join()
    torch.set_num_threads(number)
    assert torch.equal(bsa.sparse_attention(q, q, q, hm), expected)
    os.write(1, f"{name}\\n".encode())
threading.Thread(target=late, args=("thread",)).start()
threading.Thread(target=late, args=("new-workers", 3)).start()
threading.Timer(0.1, late, ("timer",)).start()
concurrent.futures.ThreadPoolExecutor(1).submit(late, "pool")
atexit.register(late, "atexit")
"""


ABANDONED = """
import sys, threading, time, torch
torch.set_num_threads(int(sys.argv[1]))
import bsa_vision as bsa
q = torch.randn(1, 4, 4096, 64)
hm = bsa.HeadMasks(torch.rand(1, 4, 32, 32) < .6, allow_empty_rows=True)
def compute():
    with torch.no_grad():
        while True:
            bsa.sparse_attention(q, q, q, hm)
with torch.no_grad():
    bsa.sparse_attention(q, q, q, hm)
for _ in range(3):
    threading.Thread(target=compute, daemon=True).start()
time.sleep(0.5)
"""


class Attentions(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        torch.set_num_threads(2)
        return attention_of(index)


def attention_of(seed):
    layout = TokenLayout((12, 12), block_size=16)
    hm = bsa.HeadMasks(local_window(layout, 2).expand(1, 4, -1, -1), layout=layout)
    q, k, v = torch.randn(3, 1, 4, 144, 16, generator=torch.Generator().manual_seed(seed))
    return bsa.sparse_attention(q, k, v, hm, backend="gather")


class TestTiming:
    def test_alternates_and_compares_within_rounds(self):
        order, rounds = [], []
        timings = paired(
            {
                "a": lambda: order.append("a") or time.sleep(0.002),
                "b": lambda: order.append("b") or time.sleep(0.02),
            },
            rounds=3,
            warmup=1,
            on_round=lambda: rounds.append(1),
        )
        assert order == ["a", "b"] * 4
        assert len(rounds) == 4
        assert timings["a"].ratios == (1.0, 1.0, 1.0)
        assert timings["b"].ratio > 1
        low, high = timings["b"].spread
        assert low <= timings["b"].ratio <= high
        assert timings["b"].median == sorted(timings["b"].seconds)[1]

    def test_errors(self):
        with pytest.raises(ValueError, match="0 candidates, 5 rounds"):
            paired({})

    @pytest.mark.parametrize("captures", [True, False])
    def test_as_a_graph(self, monkeypatch, captures):
        """A run is called twice, then captured; None if that fails. Tested with a fake graph."""
        log = []

        class Stream:
            def wait_stream(self, other):
                log.append("wait")

        class Graph:
            def replay(self):
                log.append("replay")

        @contextlib.contextmanager
        def graph(captured):
            log.append("capture")
            yield
            if not captures:
                raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
        replay = timing.graphed(lambda: log.append("run"), torch.device("cuda", 0))
        assert log[:6] == ["wait", "run", "run", "wait", "capture", "run"]
        if captures:
            replay()
            assert log[6:] == ["replay"]
        else:
            assert replay is None
            assert log[6:] == ["synchronize"]

    def test_on_a_gpu_its_own_time_counts(self, monkeypatch):
        """Events enclose each run, after the cache is overwritten. Tested with fake events."""
        log = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = len(log)
                log.append("event")

            def synchronize(self):
                log.append("wait")

            def elapsed_time(self, end):
                return 1000.0 * log[self.at : end.at].count("work")

        class Cache:
            def zero_(self):
                log.append("clear")

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
        monkeypatch.setattr(timing, "_larger_than_cache", lambda device: Cache())
        work = {"one": lambda: log.append("work"), "two": lambda: log.extend(["work"] * 2)}
        found = paired(work, rounds=2, warmup=0, device=torch.device("cuda", 0))
        assert found["one"].seconds == (1.0, 1.0)
        assert found["two"].ratio == 2.0
        assert log[:5] == ["clear", "event", "work", "event", "wait"]
        log.clear()
        paired(work, rounds=1, device=torch.device("cpu"))
        assert set(log) == {"work"}


class TestViz:
    layout = TokenLayout((6, 10), num_prefix_tokens=3, order="tile", tile=(2, 4), block_size=8)

    def test_patches_of_a_view(self):
        block = block_at(self.layout, 2, 5)
        queries, visible = View("", self.layout, local_window(self.layout, 0), block).patches()
        assert queries.nonzero().tolist() == [[r, c] for r in (2, 3) for c in range(4, 8)]
        assert visible.shape == (6, 10)
        assert visible[queries].all()
        assert not visible[0, :8].any()  # tiles without common patches

    def test_picture(self, tmp_path):
        mask = local_window(self.layout, 1)
        figure = plot_views(
            np.zeros((60, 100, 3), np.uint8),
            [View("one", self.layout, mask, 0), View("two", self.layout, mask, 1)],
        )
        figure.savefig(tmp_path / "views.png")
        assert (tmp_path / "views.png").stat().st_size > 1000
        assert [axes.get_title().splitlines()[0] for axes in figure.axes] == ["one", "two"]

    def test_errors(self):
        with pytest.raises(ValueError, match=r"patch \(6, 0\) lies outside the grid \(6, 10\)"):
            block_at(self.layout, 6, 0)
