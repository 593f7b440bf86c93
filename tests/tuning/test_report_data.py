"""The results in the plan are plain data and consistent."""

from __future__ import annotations

import json

import pytest

import bsa_vision as bsa
from bsa_vision.tuning import tune
from tests.helpers import models
from tests.helpers.tuning import SMALL, images


def test_report_is_data(tmp_path):
    plan = tune(models.make("dinov3"), images(6), max_error=0.2, **SMALL)
    found = plan.report
    assert json.loads(json.dumps(found)) == found
    assert [layer["layer"] for layer in found["layers"]] == [
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
