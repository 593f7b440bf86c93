"""Tuning in several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import bsa_vision as bsa
from bsa_vision.tuning import tune
from bsa_vision.tuning.distributed import collect, share
from tests import neighbours
from tests.adapters.test_robustness import free_port
from tests.cli.test_commands import run
from tests.helpers import models
from tests.helpers.tuning import SMALL, CountingTarget, images, photos

ROOT = Path(__file__).parents[2]


class FailsInOne(CountingTarget):
    """A target that fails in the second process, at its second image of pass 1."""

    def __call__(self, model, image):
        if dist.get_rank() == 1 and self.calls == 4:  # check, two for orders, one
            raise RuntimeError("its camera is broken")
        return super().__call__(model, image)


def tune_in_process(rank, port, folder, count, options):
    """Tune in one of two processes; write the plan, or the error, to `folder`/RANK.json."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    neighbours.enable()
    torch.set_num_threads(1)
    from torch.distributed import nn  # noqa: F401 - for the reason given in `bsa_vision.cli.tune`

    dist.init_process_group("gloo", rank=rank, world_size=2)
    given = images(count) if options.pop("same", True) else images(count + rank)
    if options.pop("fails", False):
        options["target"] = FailsInOne()
    try:
        options["statistics"] = Path(folder) / "statistics"
        plan = tune(models.make("dinov3"), given, **options, **SMALL)
        plan.save(Path(folder) / f"{rank}.json")
    except (ValueError, RuntimeError) as error:
        (Path(folder) / f"{rank}.json").write_text(str(error))
    dist.destroy_process_group()


def run_python(*arguments, **environment):
    """Run a Python process with some environment variables; return it when it has ended."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def tune_in_two(folder, count, **options):
    args = (free_port(), str(folder), count, options)
    mp.spawn(tune_in_process, args=args, nprocs=2)


@pytest.mark.slow
class TestProcesses:
    @pytest.mark.parametrize("options", [dict(sparsity=0.5), dict(max_error=0.15)], ids=str)
    def test_two_processes_one_plan(self, tmp_path, options):
        tune_in_two(tmp_path, 7, **options)
        both = [bsa.SparsityPlan.load(tmp_path / f"{rank}.json") for rank in range(2)]
        assert both[0] == both[1]
        alone = tune(models.make("dinov3"), images(7), **options, **SMALL)
        assert (both[0].layers, both[0].patterns) == (alone.layers, alone.patterns)
        assert both[0].order == alone.order
        for name in ("sparsity", "predicted", "measured", "errors"):
            assert both[0].report[name] == pytest.approx(alone.report[name], rel=1e-4)
        other = tune(models.make("dinov3"), images(8)[1:], **options, **SMALL)
        assert (both[0].layers, both[0].patterns) != (other.layers, other.patterns)
        # One process continues from the statistics of two.
        saved = dict(statistics=tmp_path / "statistics", resume=True)
        again = tune(models.make("dinov3"), images(7), **saved, **options, **SMALL)
        assert (again.layers, again.patterns) == (alone.layers, alone.patterns)

    def test_fewer_images_than_processes(self, tmp_path):
        tune_in_two(tmp_path, 2, sparsity=0.5)
        alone = tune(models.make("dinov3"), images(2), sparsity=0.5, **SMALL)
        assert bsa.SparsityPlan.load(tmp_path / "1.json").layers == alone.layers

    def test_one_fails(self, tmp_path):
        """If one process fails, the other one does not wait for it."""
        tune_in_two(tmp_path, 7, sparsity=0.5, fails=True)
        errors = [(tmp_path / f"{rank}.json").read_text() for rank in range(2)]
        assert errors[1] == "its camera is broken"
        expected = "process 1 of 2 failed, so all processes stop: RuntimeError: its"
        assert errors[0].startswith(expected)

    def test_different_images(self, tmp_path):
        tune_in_two(tmp_path, 3, sparsity=0.5, same=False)
        for rank in range(2):
            assert "processes were given different" in (tmp_path / f"{rank}.json").read_text()

    def test_torchrun(self, capsys, tmp_path):
        photos(tmp_path / "photos", count=5)
        line = f"tune tests.helpers.tuning:dinov3 {tmp_path}/photos --sparsity 0.3"
        line += " --tile 2x4 --block-size 8"
        torchrun = f"-m torch.distributed.run --nproc-per-node 2 --master-port {free_port()}"
        command = f"{torchrun} -m bsa_vision {line} -o {tmp_path}/two.json"
        done = run_python(*command.split(), OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("skipped blocks: ") == 1  # only one process prints
        assert run(capsys, f"{line} -o {tmp_path}/one.json")[0] == 0
        one, two = (bsa.SparsityPlan.load(tmp_path / f"{name}.json") for name in ("one", "two"))
        assert (one.layers, one.patterns) == (two.layers, two.patterns)

    @pytest.mark.skipif(sys.platform != "linux", reason="names of threads are read from /proc")
    def test_nothing_outlives_the_command(self):
        """No thread of the process group is left: such threads may abort the interpreter's exit."""
        code = (
            "import os; from pathlib import Path; from bsa_vision.cli.tune import _processes\n"
            "with _processes('cpu') as (rank, where):\n"
            "    import transformers.modeling_utils\n"
            "tasks = Path('/proc/self/task').iterdir()\n"
            "print(*[(task / 'comm').read_text().strip() for task in tasks])"
        )
        group = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        done = run_python("-c", code, **group, MASTER_PORT=str(free_port()))
        assert done.returncode == 0, done.stderr
        assert "gloo" not in done.stdout

    def test_alone(self):
        assert collect(share([3, 1, 2])) == [3, 1, 2]
