"""Runs of the tuner: stopped and resumed, for another budget, in several processes, on a full disk; and what they certify."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

import bsa_vision as bsa
from bsa_vision.masks import Pattern, TokenLayout
from bsa_vision.models import features as features_module
from bsa_vision.tuning import store, tune
from bsa_vision.tuning.bounds import mean_at_most, share_above
from bsa_vision.tuning.calibration import _loss
from bsa_vision.tuning.distributed import collect, share
from bsa_vision.tuning.statistics import BlockStatistics
from bsa_vision.tuning.store import Calibration, Store, digest
from tests import neighbours
from tests.adapters.test_robustness import free_port
from tests.cli.test_commands import run
from tests.helpers import models
from tests.tuning.test_tuning import SMALL, images, photos

ROOT = Path(__file__).parents[2]


class Counted:
    """A target that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, model, image):
        self.calls += 1
        return features_module.features(model, image)


class Stop(Exception):
    pass


def stop_at(step):
    """An on_step that ends the run, as a kill would."""
    left = iter(range(step))

    def on_step(what, done, of):
        if next(left, None) is None:
            raise Stop

    return on_step


class TestStatisticsFile:
    @pytest.fixture(autouse=True)
    def saved_every_time(self, monkeypatch):
        monkeypatch.setattr(store, "SECONDS", 0.0)
        monkeypatch.setattr(store, "PART", 1e9)

    @pytest.mark.parametrize("step", [0, 1, 3, 5, 9, 12])
    def test_stopped_and_resumed(self, tmp_path, step):
        file, options = tmp_path / "statistics", dict(sparsity=0.5, **SMALL)
        whole = tune(models.make("dinov3"), images(6), **options)
        with pytest.raises(Stop):
            tune(
                models.make("dinov3"), images(6), statistics=file, on_step=stop_at(step), **options
            )
        resumed = tune(models.make("dinov3"), images(6), statistics=file, resume=True, **options)
        assert resumed == whole

    def test_another_budget_without_a_new_pass(self, tmp_path):
        model, file, target = models.make("dinov3"), tmp_path / "statistics", Counted()
        tune(model, images(9), sparsity=0.5, statistics=file, target=target, **SMALL)
        first, target.calls = target.calls, 0
        again = tune(
            model, images(9), sparsity=0.2, statistics=file, resume=True, target=target, **SMALL
        )
        assert (
            target.calls == 1 + 3 * 3
        )  # a witness; of those kept back: dense, with the plan, layer by layer
        assert first > 25
        assert again == tune(model, images(9), sparsity=0.2, target=Counted(), **SMALL)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (dict(seed=1), "images .* instead of"),
            (dict(block_size=8), "block_size 16 instead of 8"),
            (dict(order="raster"), "order 'auto' instead of 'raster'"),
            (dict(candidates=["static"]), "candidates"),
            (dict(layers=[1]), "layers"),
            (dict(target=Counted()), "target .*features.* instead of .*Counted"),
        ],
    )
    def test_statistics_of_something_else(self, tmp_path, change, said):
        file = tmp_path / "statistics"
        tune(models.make("dinov3"), images(4), sparsity=0.4, statistics=file, **SMALL)
        before = file.read_bytes()
        with pytest.raises(ValueError, match=said):
            tune(
                models.make("dinov3"),
                images(4),
                sparsity=0.4,
                statistics=file,
                resume=True,
                **{**SMALL, **change},
            )
        assert file.read_bytes() == before

    def test_other_weights_and_images(self, tmp_path):
        file, model = tmp_path / "statistics", models.make("dinov3")
        tune(model, images(4), sparsity=0.4, statistics=file, **SMALL)
        with pytest.raises(ValueError, match="images"):
            tune(model, images(5)[1:], sparsity=0.4, statistics=file, resume=True, **SMALL)
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1e-3
        with pytest.raises(ValueError, match="weights"):
            tune(model, images(4), sparsity=0.4, statistics=file, resume=True, **SMALL)

    def test_another_function_of_the_same_name(self, tmp_path):
        """Functions made in one place have one name, and their results tell them apart."""

        def of(channels):
            return lambda model, image: features_module.features(model, image)[..., :channels]

        file, model = tmp_path / "statistics", models.make("dinov3")
        tune(model, images(4), sparsity=0.4, statistics=file, target=of(24), **SMALL)
        with pytest.raises(ValueError, match="statistics were made for another target"):
            tune(
                model, images(4), sparsity=0.4, statistics=file, resume=True, target=of(12), **SMALL
            )

    def test_never_overwritten_unasked(self, tmp_path):
        file, model = tmp_path / "statistics", models.make("dinov3")
        file.write_text("mine")
        with pytest.raises(FileExistsError, match="holds statistics already: resume=True"):
            tune(model, images(4), sparsity=0.4, statistics=file, **SMALL)
        with pytest.raises(ValueError, match="holds no statistics that this bsa-vision reads"):
            tune(model, images(4), sparsity=0.4, statistics=file, resume=True, **SMALL)
        assert file.read_text() == "mine"

    @pytest.mark.parametrize("keep", [10, 1000, -10])
    def test_damaged(self, tmp_path, keep):
        file, model = tmp_path / "statistics", models.make("dinov3")
        tune(model, images(4), sparsity=0.4, statistics=file, **SMALL)
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(ValueError, match="holds no statistics that this bsa-vision reads"):
            tune(model, images(4), sparsity=0.4, statistics=file, resume=True, **SMALL)

    def test_written_and_read(self, tmp_path):
        layout = TokenLayout((4, 6), num_prefix_tokens=1, order="tile", tile=(2, 3), block_size=5)
        among = torch.arange(6).view(1, 2, 3)
        blocks, dropping = [BlockStatistics.empty(2, layout, 3)], [torch.rand(3, 2, 6, 6)]
        kept = Calibration(
            {"a": [1, 2]},
            layout,
            compared=[among],
            blocks=blocks,
            dropping=dropping,
            weights=[[0.1, 0.2]],
        )
        kept.blocks[0].drop += torch.rand(kept.blocks[0].drop.shape)
        (tmp_path / "file").write_bytes(b"".join(kept.dumps()))
        read = Calibration.load(tmp_path / "file")
        assert (read.identity, read.layout, read.weights, read.done) == (
            kept.identity,
            layout,
            [[0.1, 0.2]],
            kept.done,
        )
        assert torch.equal(read.blocks[0].drop, kept.blocks[0].drop)
        assert torch.equal(read.compared[0], among)
        assert torch.equal(read.dropping[0], dropping[0])
        assert read.totals == []

    def test_any_change_is_refused(self, tmp_path):
        """A digest covers every byte: bits that flip, bytes that are lost or added."""
        layout = TokenLayout((4, 6), block_size=8)
        kept = Calibration(
            {"a": 1}, layout, dropping=[torch.rand(1, 2, 3, 3)], totals=[torch.tensor(2.0)]
        )
        file, data = tmp_path / "file", b"".join(kept.dumps())
        file.write_bytes(data)
        assert Calibration.load(file).totals == [2.0]
        changed = [data[:-1], data + b"\0", b"", data[:50], data[:8] + data[9:]]
        for place in range(0, len(data), 7):
            changed.append(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        for other in changed:
            file.write_bytes(other)
            with pytest.raises(bsa.PlanError, match="no statistics that this bsa-vision reads"):
                Calibration.load(file)

    @settings(max_examples=30)
    @given(
        st.lists(
            st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=3), min_size=1, max_size=3
        )
    )
    def test_digests_tell_contents(self, values):
        items = [{"pixels": torch.tensor(own), "name": "a"} for own in values]
        same = [{"pixels": torch.tensor(own), "name": "a"} for own in values]
        assert digest(items) == digest(same)
        same[-1]["pixels"][0] += 1
        assert digest(items) != digest(same)


def the_same_model():
    return models.make("dinov3")


def killed_run(folder):
    """`bsa-vision tune` in a process of its own, killed while candidates are measured."""
    slow = (
        "import time, bsa_vision.tuning.calibration as c, bsa_vision.tuning.store as s; from bsa_vision.cli import main as cli; s.SECONDS, s.PART = 0.0, 1e9; "
        "add = c.CandidateErrors.add; c.CandidateErrors.add = lambda *a: (time.sleep(0.3), add(*a))[1]; cli.main({})"
    )
    line = f"tune tests.tuning.test_tuning_runs:the_same_model {folder}/photos -o {folder}/plan.json --sparsity 0.3 --tile 2x4 --block-size 8"
    child = subprocess.Popen(
        [sys.executable, "-c", slow.format(line.split())], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    statistics = folder / "plan.statistics.safetensors"
    try:
        while child.poll() is None and not (
            statistics.exists() and Calibration.load(statistics).done["candidates"]
        ):
            time.sleep(0.05)
        assert child.poll() is None, "it ended before it was killed"
        child.send_signal(signal.SIGKILL)
    finally:
        child.wait()
    return line, Calibration.load(statistics).done


def test_killed_and_resumed(capsys, tmp_path):
    photos(tmp_path / "photos", count=6)
    line, done = killed_run(tmp_path)
    assert done["blocks"] == 4
    assert 0 < done["candidates"] < 4
    assert not (tmp_path / "plan.json").exists()
    code, _, err = run(capsys, line)
    assert code == 2
    assert "--resume" in err
    code, _, err = run(capsys, f"{line} --resume")
    assert code == 0, err
    code, _, err = run(capsys, line.replace("plan.json", "whole.json"))
    assert code == 0, err
    resumed, whole = (
        bsa.SparsityPlan.load(tmp_path / name) for name in ("plan.json", "whole.json")
    )
    assert resumed == whole


def test_ctrl_c_says_what_is_saved_and_how_to_go_on(tmp_path):
    photos(tmp_path / "photos", count=6)
    line = f"tune tests.tuning.test_tuning_runs:the_same_model {tmp_path}/photos -o {tmp_path}/plan.json --sparsity 0.3 --tile 2x4 --block-size 8"
    code = (
        "import bsa_vision.tuning.calibration as c, bsa_vision.tuning.store as s, os, signal; from bsa_vision.cli import main as cli; s.SECONDS, s.PART = 0.0, 1e9\n"
        "save = s.Store.save\n"
        "def interrupt(store, calibration, now=False):\n"
        "    save(store, calibration, now)\n"
        "    if calibration.done['candidates']: os.kill(os.getpid(), signal.SIGINT)\n"
        f"s.Store.save = interrupt; cli.main({line.split()})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert "plan.statistics.safetensors holds 4 images of pass 1, 1 images of pass 2" in done.stderr
    assert f"Go on with: bsa-vision {line} --resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(x.name for x in tmp_path.iterdir()) == ["photos", "plan.statistics.safetensors"]


def test_ctrl_c_in_python_says_what_is_saved(tmp_path):
    def interrupt(what, done, of):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="nothing is saved: give statistics=PATH"):
        bsa.tune(models.make("dinov3"), images(4), sparsity=0.4, on_step=interrupt, **SMALL)
    with pytest.raises(
        KeyboardInterrupt, match=r"holds .*resume=True goes on from there|nothing is saved in"
    ):
        bsa.tune(
            models.make("dinov3"),
            images(4),
            sparsity=0.4,
            statistics=tmp_path / "s",
            on_step=interrupt,
            **SMALL,
        )


def test_full_disk(tmp_path):
    """Files may not grow beyond 2 kB: the plan and the statistics that were there stay as they are, and the plan is not lost in Python."""
    code = f"""
import resource, signal, sys, warnings
from tests.tuning.test_tuning import SMALL, images
from tests import neighbours; from tests.helpers import models
import bsa_vision as bsa
model = models.make("dinov3")  # importing may write files, too
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    plan = bsa.tune(model, images(4), sparsity=0.4, statistics=r"{tmp_path}/s", **SMALL)
assert plan.report["sparsity"] >= 0.4 - 1e-9
print([str(one.message) for one in said if "could not be saved" in str(one.message)])
try:
    plan.save(r"{tmp_path}/plan.json")
except OSError as error:
    print("not saved:", error)
"""
    (tmp_path / "plan.json").write_text("an older plan")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("could not be saved") == 1  # said once, not at every image
    assert "not saved:" in done.stdout
    assert (tmp_path / "plan.json").read_text() == "an older plan"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


class FailsInOne(Counted):
    """In the second process, at its second image of the first pass."""

    def __call__(self, model, image):
        if dist.get_rank() == 1 and self.calls == 4:  # a witness, the first look at two, one
            raise RuntimeError("its camera is broken")
        return super().__call__(model, image)


def tune_in(rank, address, folder, count, options):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(address)}
    neighbours.enable()
    torch.set_num_threads(1)
    from torch.distributed import nn  # noqa: F401 - as `bsa-vision tune` does, and why

    dist.init_process_group("gloo", rank=rank, world_size=2)
    given = images(count) if options.pop("same", True) else images(count + rank)
    if options.pop("fails", False):
        options["target"] = FailsInOne()
    try:
        plan = tune(
            models.make("dinov3"), given, statistics=Path(folder) / "statistics", **options, **SMALL
        )
        plan.save(Path(folder) / f"{rank}.json")
    except (ValueError, RuntimeError) as error:
        (Path(folder) / f"{rank}.json").write_text(str(error))
    dist.destroy_process_group()


class TestProcesses:
    @pytest.mark.parametrize("options", [dict(sparsity=0.5), dict(max_error=0.15)], ids=str)
    def test_two_processes_one_plan(self, tmp_path, options):
        mp.spawn(tune_in, args=(free_port(), str(tmp_path), 7, options), nprocs=2)
        both = [bsa.SparsityPlan.load(tmp_path / f"{rank}.json") for rank in range(2)]
        assert both[0] == both[1]
        alone = tune(models.make("dinov3"), images(7), **options, **SMALL)
        assert (both[0].layers, both[0].patterns, both[0].order) == (
            alone.layers,
            alone.patterns,
            alone.order,
        )
        for name in ("sparsity", "predicted", "measured", "errors"):
            assert both[0].report[name] == pytest.approx(alone.report[name], rel=1e-4)
        other = tune(
            models.make("dinov3"), images(8)[1:], **options, **SMALL
        )  # the twin: images decide
        assert (both[0].layers, both[0].patterns) != (other.layers, other.patterns)
        # What two processes saved, one goes on from.
        again = tune(
            models.make("dinov3"),
            images(7),
            statistics=tmp_path / "statistics",
            resume=True,
            **options,
            **SMALL,
        )
        assert (again.layers, again.patterns) == (alone.layers, alone.patterns)

    def test_fewer_images_than_processes(self, tmp_path):
        mp.spawn(tune_in, args=(free_port(), str(tmp_path), 2, dict(sparsity=0.5)), nprocs=2)
        alone = tune(models.make("dinov3"), images(2), sparsity=0.5, **SMALL)
        assert bsa.SparsityPlan.load(tmp_path / "1.json").layers == alone.layers

    def test_one_fails(self, tmp_path):
        """None waits for it."""
        mp.spawn(
            tune_in, args=(free_port(), str(tmp_path), 7, dict(sparsity=0.5, fails=True)), nprocs=2
        )
        assert (tmp_path / "1.json").read_text() == "its camera is broken"
        assert (
            (tmp_path / "0.json")
            .read_text()
            .startswith("process 1 of 2 failed, and all stop with it: RuntimeError: its")
        )

    def test_different_images(self, tmp_path):
        mp.spawn(
            tune_in, args=(free_port(), str(tmp_path), 3, dict(sparsity=0.5, same=False)), nprocs=2
        )
        for rank in range(2):
            assert "processes were given different" in (tmp_path / f"{rank}.json").read_text()

    def test_torchrun(self, capsys, tmp_path):
        photos(tmp_path / "photos", count=5)
        line = f"tune tests.tuning.test_tuning_runs:the_same_model {tmp_path}/photos --sparsity 0.3 --tile 2x4 --block-size 8"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
        ]
        command += [
            str(free_port()),
            "-m",
            "bsa_vision",
            *line.split(),
            "-o",
            f"{tmp_path}/two.json",
        ]
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("of the blocks are skipped") == 1  # one process speaks
        assert run(capsys, f"{line} -o {tmp_path}/one.json")[0] == 0
        one, two = (bsa.SparsityPlan.load(tmp_path / f"{name}.json") for name in ("one", "two"))
        assert (one.layers, one.patterns) == (two.layers, two.patterns)

    @pytest.mark.skipif(sys.platform != "linux", reason="names of threads are read from /proc")
    def test_nothing_outlives_the_command(self):
        """Threads of a process group that are left when the interpreter ends abort it now and then."""
        code = (
            "import os; from pathlib import Path; from bsa_vision.cli.tune import _processes\n"
            "with _processes('cpu') as (rank, where):\n"
            "    import transformers.modeling_utils\n"
            "print(*[(task / 'comm').read_text().strip() for task in Path('/proc/self/task').iterdir()])"
        )
        alone = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, **alone},
        )
        assert done.returncode == 0, done.stderr
        assert "gloo" not in done.stdout

    def test_alone(self):
        assert collect(share([3, 1, 2])) == [3, 1, 2]


class TestCertificate:
    @given(st.integers(1, 400), st.floats(0, 1), st.floats(0.5, 0.999))
    def test_share_is_where_so_few_become_unlikely(self, count, part, confidence):
        """The bound p is such that `above` or fewer of `images` happen with probability 1 - confidence."""
        above = round(part * count)
        bound = share_above(count, above, confidence)
        if above == count:
            assert bound == 1
        else:
            assert binom.cdf(above, count, bound) == pytest.approx(1 - confidence, abs=1e-6)

    def test_known_figures(self):
        assert share_above(59, 0) == pytest.approx(0.0495, abs=1e-4)
        assert share_above(299, 0) == pytest.approx(0.01, abs=1e-4)

    def test_means_are_below_their_bound(self):
        """Of many draws of a few errors, as many as promised; a plain mean would not do."""
        generator = torch.Generator().manual_seed(0)
        draws = 0.1 * torch.exp(0.3 * torch.randn(2000, 8, generator=generator))
        true = 0.1 * torch.exp(torch.tensor(0.3**2 / 2)).item()
        within = sum(mean_at_most(own) >= true for own in draws.tolist()) / 2000
        assert within > 0.95
        assert (draws.mean(1) >= true).float().mean() < 0.6

    def test_one_image(self):
        assert mean_at_most([0.25]) == float("inf")


class TestOrder:
    def test_the_one_that_loses_least(self):
        plan = tune(models.make("dinov3"), images(4), sparsity=0.5, **SMALL)
        orders = plan.report["orders"]
        assert [(one["order"], one["tile"]) for one in orders] == [
            ("raster", [4, 4]),
            ("tile", [4, 4]),
            ("tile", [2, 8]),
        ]
        best = min(orders, key=lambda one: one["lost"])
        assert (plan.order, list(plan.tile)) == (best["order"], best["tile"])
        assert len({one["lost"] for one in orders}) == 3

    def test_lost(self):
        """All but the best blocks of each head, special ones never."""
        layout = TokenLayout((8, 6), num_prefix_tokens=2, order="tile", tile=(4, 2), block_size=8)
        statistics = BlockStatistics.empty(2, layout)
        torch.manual_seed(0)
        statistics.drop += torch.rand(statistics.drop.shape)
        special = Pattern("special")(layout)
        expected = 0.0
        for head in statistics.drop:
            ordinary = head[~special].sort().values
            for keep in (0.25, 0.5):
                expected += ordinary[: round((1 - keep) * head.numel())].sum().item() / 2
        assert _loss(statistics, layout, torch.tensor(10.0)) == pytest.approx(expected / 10)

    def test_given(self):
        assert (
            tune(models.make("dinov3"), images(3), sparsity=0.5, order="raster", **SMALL).report[
                "orders"
            ]
            == []
        )


def test_report_is_data(tmp_path):
    plan = tune(models.make("dinov3"), images(6), max_error=0.2, **SMALL)
    found = plan.report
    assert json.loads(json.dumps(found)) == found
    assert [one["layer"] for one in found["layers"]] == [
        layer.name for layer in bsa.inspect(models.make("dinov3")).layers
    ]
    for layer in found["layers"]:
        for head in layer["heads"]:
            assert 0 < head["density"] <= 1
            assert head["kept"]["1"] <= head["kept"]["50"] <= 1
            if head["pattern"] == "dense":
                assert head["density"] == 1
                assert head["error"] == 0
                assert set(head["kept"].values()) == {1.0}
    heads = [head for layer in found["layers"] for head in layer["heads"]]
    mean = sum(head["density"] for head in heads) / len(heads)
    assert 1 - mean == pytest.approx(found["sparsity"], abs=1e-6)
    errors = [sum(head["error"] ** 2 for head in layer["heads"]) for layer in found["layers"]]
    assert sum(errors) ** 0.5 == pytest.approx(found["predicted"])
    assert [a for a, _ in found["curve"]] == sorted(a for a, _ in found["curve"])
    assert [b for _, b in found["curve"]] == sorted(b for _, b in found["curve"])
    assert bsa.dense_plan(models.make("dinov3")).report == {}


def test_store_without_a_file():
    store = Store(None)
    assert store.open({"a": 1}, resume=True).identity == {"a": 1}
    store.save(Calibration({}), now=True)
