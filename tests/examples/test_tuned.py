"""The testbed's evaluation, shipped checkpoint and tuned plans."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bsa_vision as bsa
from examples.testbed import evaluate, heads, scenes, train, tuned
from examples.testbed.model import SHIPPED, load, save, untrained
from examples.testbed.scenes import HARD
from tests.examples.test_testbed import small

ROOT = Path(__file__).parents[2]


class TestEvaluation:
    def test_bootstrap(self):
        values = torch.randn(300, generator=torch.Generator().manual_seed(0)) + 3
        interval = evaluate.bootstrap(values)
        assert interval.low < interval.mean < interval.high
        assert interval.mean == pytest.approx(values.mean().item(), abs=1e-5)
        width = 2 * 1.96 * values.std().item() / 300**0.5
        assert interval.high - interval.low == pytest.approx(width, rel=0.15)
        assert evaluate.bootstrap(torch.ones(5)) == evaluate.Interval(1.0, 1.0, 1.0)

    def test_iou(self):
        a = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 0, 0]], [[0, 0, 0, 0]]]).bool()
        b = torch.tensor([[[0, 1, 1, 0]], [[0, 0, 0, 0]], [[1, 0, 0, 0]]]).bool()
        assert train.iou(a, b).tolist() == pytest.approx([1 / 3, 1, 0])

    def test_outline(self):
        mask = torch.zeros(1, 100, 100, dtype=torch.bool)
        mask[0, 20:60, 30:80] = True
        found = evaluate.outline(mask)[0]  # 2 % of the diagonal: 3 pixels
        expected = mask[0].clone()
        expected[23:57, 33:77] = False
        assert torch.equal(found, expected)

    def test_a_dense_plan_changes_nothing_and_a_random_one_does(self):
        model = small()
        random = bsa.uniform_plan(model, "random_blocks", sparsity=0.5, tile=(2, 4), block_size=8)
        plans = {"same": bsa.dense_plan(model), "random": random}
        dense, same, other = evaluate.evaluate(model, plans, range(6))
        assert (same.cost.mean, same.sparsity) == (0, 0)
        assert (same.agreement.mean, same.kept_mass.mean) == (1, 1)
        assert same.feature_error.mean < 1e-5
        assert other.feature_error.mean > 1e-2
        assert 0.3 < other.sparsity < 0.5  # blocks of special tokens are kept
        assert 0.3 < other.kept_mass.mean < 1
        assert len(dense.per_scene["iou"]) == 6
        assert dense.iou.mean == pytest.approx(sum(dense.per_scene["iou"]) / 6, abs=1e-4)

    def test_patterns_by_name(self):
        spec = bsa.inspect(untrained())
        orders = {
            "nearest:0.5@raster": "raster",
            "nearest:0.5": "tile",
            "random_blocks:0.5": "tile",
        }
        for text, order in orders.items():
            plan = evaluate.pattern_plan(text, spec)
            layout, kept = plan.layout(spec), evaluate.kept_blocks(plan, spec)
            assert (layout.order, layout.num_blocks) == (order, 33)
            assert 0.40 < 1 - kept.float().mean() <= 0.5
        random = evaluate.kept_blocks(evaluate.pattern_plan("random_blocks:0.5", spec), spec)[0]
        assert not torch.equal(random[0, 0], random[0, 1])  # every head has other blocks
        assert not torch.equal(random[0, 0], random[1, 0])

    def test_patterns_that_depend_on_the_click(self):
        """Each scene has other blocks, and the model uses them."""
        model = small()
        plan = bsa.uniform_plan(model, "prompt_region", radius=2, near=1, tile=(2, 4), block_size=8)
        batch = scenes.make(range(3), 64, HARD)
        kept = evaluate.kept_blocks(plan, bsa.inspect(model), evaluate.prompts(batch))
        assert kept.shape[:3] == (3, 2, 2)
        assert not torch.equal(kept[0], kept[1])
        row = evaluate.evaluate(model, {"click": plan}, range(3))[1]
        assert row.sparsity == pytest.approx(1 - kept.float().mean().item(), abs=1e-6)
        assert row.feature_error.mean > 1e-3

    def test_the_command(self, tmp_path):
        """Evaluate a plan file and a pattern, with a table and JSON."""
        model, plan, out = (tmp_path / name for name in ("m.safetensors", "p.json", "out.json"))
        save(small(), model, {})
        local = bsa.uniform_plan(small(), "local_window", radius=1, tile=(2, 4), block_size=8)
        local.save(plan)
        command = [sys.executable, "examples/testbed/evaluate.py", model, "--plan", plan]
        command += ["--pattern", "random:0.5", "--scenes", "3", "--shifted", "--json", out]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "random:0.5" in done.stdout
        record = json.loads(out.read_text())
        assert [row["name"] for row in record["rows"]] == ["dense", "p.json", "random:0.5"]
        assert record["shifted"] is True
        iou = record["rows"][1]["iou"]
        assert iou["low"] <= iou["mean"] <= iou["high"]

    def test_an_unknown_pattern(self):
        command = [sys.executable, "examples/testbed/evaluate.py", "--pattern", "sideways"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert "--pattern 'sideways': allowed are" in done.stderr


class TestShipped:
    @pytest.mark.slow
    def test_beats_random_weights(self):
        seeds = scenes.held_out(20, seed=7)
        assert evaluate.evaluate(load(), {}, seeds)[0].iou.mean > 0.6
        assert evaluate.evaluate(untrained(load().size), {}, seeds)[0].iou.mean < 0.2

    def test_notes(self):
        assert SHIPPED.stat().st_size <= 8 * 2**20
        notes = load().notes
        assert {"command", "seed", "device", "seconds", "versions", "images"} <= set(notes)

    def test_heads(self):
        found = heads.measure(load(), scenes.held_out(1), grid=16)
        assert len(found) == load().size.depth * load().size.heads
        assert all(0 < share <= 1 for head in found for share in (head.keys, head.blocks))
        assert all(0 <= head.near <= 1 for head in found)

    def test_other_grids(self):
        """Smaller images work, because positions are normalised coordinates."""
        difficulty = replace(HARD, clutter=0.2)
        found = evaluate.evaluate(load(), {}, scenes.held_out(10), difficulty, grid=24)[0]
        assert found.iou.mean > 0.4


class TestTuned:
    @pytest.mark.slow
    def test_simpler_plans_skip_at_most_as_many_blocks(self):
        model = load()
        images = tuned.calibration_scenes(model, 0, 3)
        plan = bsa.tune(
            model, images, sparsity=0.6, target=tuned.encode, order="raster", **tuned.LAYOUT
        )
        spec, most = bsa.inspect(model), plan.report["sparsity"]
        for name, simpler in tuned.simpler_plans(model, plan, 0):
            kept = evaluate.kept_blocks(simpler, spec)[0]
            assert most - 0.1 < 1 - kept.float().mean() <= most + 1e-6, name
            # The click's token attends to all tokens, and all attend to it, in every order.
            block = int(simpler.layout(spec).inverse[0]) // tuned.BLOCK_SIZE
            assert kept[..., block, :].all(), name
            assert kept[..., :, block].all(), name

    def test_calibration_scenes_differ_from_held_out_ones(self):
        model = load()
        first, other = (tuned.calibration_scenes(model, seed, 2)[0][0] for seed in (0, 1))
        held_out = scenes.make(list(scenes.held_out(2)), 256, HARD).images
        assert not torch.equal(first, other)
        assert not torch.equal(first, held_out[:1])

    @pytest.mark.slow
    def test_the_commands(self, capsys, monkeypatch):
        monkeypatch.setattr(tuned, "CALIBRATION", 9)
        line = "tuned.py --seeds 1 --scenes 4 --sparsity 0.6"
        monkeypatch.setattr(sys, "argv", line.split())
        tuned.main()
        out = capsys.readouterr().out
        for name in ("tuned", "uniform static", "local windows", "nearest", "random"):
            assert name in out
        for name in ("spatial locality", "image to prompt"):
            assert name in out
        line = "tuned.py --max-error 0.2 --runs 2 --scenes 4"
        monkeypatch.setattr(sys, "argv", line.split())
        tuned.main()
        assert "in 2 of 2 runs" in capsys.readouterr().out
