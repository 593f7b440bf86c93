"""The statistics file: resumed runs, other budgets, and files of other runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bsa_vision as bsa
from bsa_vision.masks import TokenLayout
from bsa_vision.models.features import features
from bsa_vision.tuning import store, tune
from bsa_vision.tuning.statistics import BlockStatistics
from bsa_vision.tuning.store import Calibration, Store, digest
from tests.helpers import models
from tests.helpers.tuning import SMALL, CountingTarget, images


class Stop(Exception):
    pass


def stop_at(step):
    """Return an `on_step` that raises `Stop` after `step` calls."""
    left = iter(range(step))

    def on_step(name, done, total):
        if next(left, None) is None:
            raise Stop

    return on_step


class TestStatisticsFile:
    @pytest.fixture(autouse=True)
    def saved_every_time(self, monkeypatch):
        monkeypatch.setattr(store, "SECONDS", 0.0)
        monkeypatch.setattr(store, "PART", 1e9)

    @pytest.mark.slow
    @pytest.mark.parametrize("step", [0, 1, 3, 5, 9, 12])
    def test_stopped_and_resumed(self, tmp_path, step):
        file, options = tmp_path / "statistics", dict(sparsity=0.5, **SMALL)
        whole = tune(models.make("dinov3"), images(6), **options)
        options["statistics"] = file
        with pytest.raises(Stop):
            tune(models.make("dinov3"), images(6), on_step=stop_at(step), **options)
        resumed = tune(models.make("dinov3"), images(6), resume=True, **options)
        assert resumed == whole

    def test_another_budget_without_a_new_pass(self, tmp_path):
        model, file, target = models.make("dinov3"), tmp_path / "statistics", CountingTarget()
        options = dict(statistics=file, target=target, **SMALL)
        tune(model, images(9), sparsity=0.5, **options)
        first, target.calls = target.calls, 0
        again = tune(model, images(9), sparsity=0.2, resume=True, **options)
        # Once to check the target; then on 3 held-out images dense, with the plan, and for errors
        # of layers.
        assert target.calls == 1 + 3 * 3
        assert first > 25
        assert again == tune(model, images(9), sparsity=0.2, target=CountingTarget(), **SMALL)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(seed=1), "images .* instead of"),
            (dict(block_size=8), "block_size 16 instead of 8"),
            (dict(order="raster"), "order 'auto' instead of 'raster'"),
            (dict(candidates=["static"]), "candidates"),
            (dict(layers=[1]), "layers"),
            (dict(target=CountingTarget()), "target .*features.* instead of .*CountingTarget"),
        ],
    )
    def test_statistics_of_something_else(self, tmp_path, change, message):
        file = tmp_path / "statistics"
        tune(models.make("dinov3"), images(4), sparsity=0.4, statistics=file, **SMALL)
        before = file.read_bytes()
        options = dict(sparsity=0.4, statistics=file, resume=True, **{**SMALL, **change})
        with pytest.raises(ValueError, match=message):
            tune(models.make("dinov3"), images(4), **options)
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
        """Targets of one name are told apart by their outputs."""

        def channels(count):
            return lambda model, image: features(model, image)[..., :count]

        model = models.make("dinov3")
        options = dict(sparsity=0.4, statistics=tmp_path / "statistics", **SMALL)
        tune(model, images(4), target=channels(24), **options)
        with pytest.raises(ValueError, match="statistics were made for another target"):
            tune(model, images(4), target=channels(12), resume=True, **options)

    def test_never_overwritten_unasked(self, tmp_path):
        file, model = tmp_path / "statistics", models.make("dinov3")
        file.write_text("mine")
        with pytest.raises(FileExistsError, match="already exists: pass resume=True"):
            tune(model, images(4), sparsity=0.4, statistics=file, **SMALL)
        with pytest.raises(ValueError, match="holds no statistics that this version can read"):
            tune(model, images(4), sparsity=0.4, statistics=file, resume=True, **SMALL)
        assert file.read_text() == "mine"

    @pytest.mark.parametrize("keep", [10, 1000, -10])
    def test_damaged(self, tmp_path, keep):
        file, model = tmp_path / "statistics", models.make("dinov3")
        tune(model, images(4), sparsity=0.4, statistics=file, **SMALL)
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(ValueError, match="holds no statistics that this version can read"):
            tune(model, images(4), sparsity=0.4, statistics=file, resume=True, **SMALL)

    def test_written_and_read(self, tmp_path):
        layout = TokenLayout((4, 6), num_prefix_tokens=1, order="tile", tile=(2, 3), block_size=5)
        among = torch.arange(6).view(1, 2, 3)
        blocks, dropping = [BlockStatistics.empty(2, layout, 3)], [torch.rand(3, 2, 6, 6)]
        sums = dict(compared=[among], blocks=blocks, dropping=dropping)
        kept = Calibration({"a": [1, 2]}, layout, **sums, weights=[[0.1, 0.2]])
        kept.blocks[0].drop += torch.rand(kept.blocks[0].drop.shape)
        (tmp_path / "file").write_bytes(b"".join(kept.dumps()))
        read = Calibration.load(tmp_path / "file")
        assert (read.identity, read.layout) == (kept.identity, layout)
        assert (read.weights, read.done) == ([[0.1, 0.2]], kept.done)
        assert torch.equal(read.blocks[0].drop, kept.blocks[0].drop)
        assert torch.equal(read.compared[0], among)
        assert torch.equal(read.dropping[0], dropping[0])
        assert read.totals == []

    def test_any_change_is_refused(self, tmp_path):
        """The digest covers every byte: flipped bits, and lost or added bytes are found."""
        layout = TokenLayout((4, 6), block_size=8)
        sums = dict(dropping=[torch.rand(1, 2, 3, 3)], totals=[torch.tensor(2.0)])
        kept = Calibration({"a": 1}, layout, **sums)
        file, data = tmp_path / "file", b"".join(kept.dumps())
        file.write_bytes(data)
        assert Calibration.load(file).totals == [2.0]
        changed = [data[:-1], data + b"\0", b"", data[:50], data[:8] + data[9:]]
        for place in range(0, len(data), 7):
            changed.append(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        for other in changed:
            file.write_bytes(other)
            with pytest.raises(bsa.PlanError, match="no statistics that this version can read"):
                Calibration.load(file)

    @settings(max_examples=30)
    @given(
        st.lists(
            st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=3), min_size=1, max_size=3
        )
    )
    def test_digests_tell_contents(self, values):
        items = [{"pixels": torch.tensor(pixels), "name": "a"} for pixels in values]
        same = [{"pixels": torch.tensor(pixels), "name": "a"} for pixels in values]
        assert digest(items) == digest(same)
        same[-1]["pixels"][0] += 1
        assert digest(items) != digest(same)


def test_store_without_a_file():
    store = Store(None)
    assert store.open({"a": 1}, resume=True).identity == {"a": 1}
    store.save(Calibration({}), now=True)
