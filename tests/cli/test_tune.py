"""`bsa-vision tune`: a plan from a folder of photos, and wrong input."""

from __future__ import annotations

import json
import sys

import pytest

import bsa_vision as bsa
from tests.cli.test_commands import run
from tests.helpers import models
from tests.helpers.tuning import photos

MODEL = "tests.helpers.models:dinov3"


def test_the_report_is_missed_before_anything_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = f"tune tests.helpers.tuning:dinov3 {tmp_path} --sparsity 0.5 -o {tmp_path}/plan.json"
    code, _, err = run(capsys, line)
    assert code == 2
    assert "the report needs matplotlib" in err
    assert "pip install 'bsa-vision[tune]'" in err


class TestCommand:
    def test_a_plan_from_a_folder(self, capsys, tmp_path):
        folder, plan = photos(tmp_path / "photos"), tmp_path / "plan.json"
        options = "--sparsity 0.3 --tile 2x4 --block-size 8"
        code, out, err = run(capsys, f"tune {MODEL} {folder} -o {plan} {options}")
        assert code == 0, err
        assert "measured on 1 held-out images" in out
        model = models.dinov3().eval()
        bsa.sparsify_(model, bsa.SparsityPlan.load(plan))
        code, out, _ = run(capsys, f"compare {MODEL} {folder} --plan {plan} --rounds 1")
        assert code == 0
        assert "8 x 8 patches" in out

    def test_json(self, capsys, tmp_path):
        folder = photos(tmp_path / "photos", count=6)
        options = "--max-error 0.9 --tile 2x4 --block-size 8 --json"
        code, out, _ = run(capsys, f"tune {MODEL} {folder} -o {tmp_path}/plan.json {options}")
        assert code == 0
        assert json.loads(out)["bound"] <= 0.9

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("", "--sparsity, --max-error, --speedup is needed, got none"),
            ("--sparsity 0.5 --speedup 2", "exactly one of"),
            ("--sparsity 2", "--sparsity 2.0: expected a fraction"),
            ("--sparsity 0.5 --order spiral", "--order 'spiral'"),
            ("--sparsity 0.5 --tile 3x", "--tile '3x': allowed are grids"),
        ],
    )
    def test_wrong_input(self, capsys, tmp_path, options, message):
        folder, plan = photos(tmp_path / "photos"), tmp_path / "plan.json"
        code, _, err = run(capsys, f"tune {MODEL} {folder} -o {plan} {options}")
        assert code == 2
        assert message in err
        assert not plan.exists()

    @pytest.mark.parametrize(
        ("where", "message"),
        [
            ("-o {0}/plan.html", "expected three different files"),
            ("-o {0}/plan.json --report {0}/plan.json", "expected three different files"),
            ("-o {0}/plan.json --statistics {0}/plan.json", "expected three different files"),
            ("-o {0}", "cannot be written: it is a directory"),
            ("-o {0}/nowhere/plan.json", "cannot be written"),
            ("-o .", "expected a file for the plan"),
            ("-o {0}/plan.json --device cuda:7", "this machine has cpu and"),
            ("-o {0}/plan.json --device meta", "this machine has cpu and"),
        ],
    )
    def test_files_that_cannot_be(self, capsys, tmp_path, where, message):
        folder = photos(tmp_path / "photos")
        line = f"tune {MODEL} {folder} --sparsity 0.3 {where.format(tmp_path)}"
        code, _, err = run(capsys, line)
        assert code == 2
        assert message in err
        assert [path.name for path in tmp_path.iterdir()] == ["photos"]

    def test_one_photograph(self, capsys, tmp_path):
        folder = photos(tmp_path / "photos", count=1)
        line = f"tune {MODEL} {folder} -o {tmp_path}/plan.json --sparsity 0.5"
        code, _, err = run(capsys, line)
        assert code == 2
        assert "1 images: at least 2 are needed" in err
