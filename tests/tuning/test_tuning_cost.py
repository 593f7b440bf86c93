"""Tests of benchmarks/tuning_cost.py, which measures the cost of tuning."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks import tuning_cost
from bsa_vision.tuning import tune


class TestCost:
    LINE = "--model tests.helpers.models:dinov3 --image-size 96 --sparsity 0.3 --block-size 16"

    def run(self, capsys, line: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            tuning_cost.main(line.split())
        return left.value.code, capsys.readouterr().out

    def test_cost(self, capsys, tmp_path):
        code, out = self.run(capsys, f"{self.LINE} --json {tmp_path}/cost.json")
        assert code == 0
        assert "dense forward passes" in out
        assert "as reported" in out
        found = json.loads((tmp_path / "cost.json").read_text())
        assert found["sparsity"] > 0.3 - 1e-9
        assert found["peak"] >= 0
        assert found["forwards"] == pytest.approx(found["seconds"] / 4 / found["dense"])
        assert sum(found["parts"].values()) == pytest.approx(found["seconds"], rel=0.01)

    def test_a_wrong_report_is_found(self, capsys, monkeypatch):
        def wrong(*args, **options):
            plan = tune(*args, **options)
            tuned = plan.notes["tuned"]
            doubled = {**tuned, "errors": [2 * error for error in tuned["errors"]]}
            return replace(plan, notes={"tuned": doubled})

        monkeypatch.setattr(tuning_cost, "tune", wrong)
        code, out = self.run(capsys, self.LINE)
        assert code == 1
        assert "WRONG: the report says" in out
