"""docs/models.md: its snippet runs, and its table names the code bases and the tests that there are."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import bsa_vision as bsa
from tests import test_sam
from tests.sam_models import ANY_SIZE, MODELS

DOCS = Path(__file__).parent.parent / "docs"
MODELS_PAGE = (DOCS / "models.md").read_text()
# Column -> the test that runs its cells, with `name` or `model` going through all of MODELS.
COLUMNS = {
    "exact": test_sam.TestExact.test_dense_plan_changes_nothing,
    "without the relative term": test_sam.TestExact.test_twin_without_the_relative_term,
    "keys": test_sam.TestExact.test_dense_plan_changes_nothing,
    "restored": test_sam.TestExact.test_restore_is_bit_exact,
    "compiled": test_sam.TestExact.test_compile_fullgraph,
    "gradients": test_sam.TestExact.test_gradients,
    "sparse": test_sam.TestSparse.test_equals_masked_arithmetic_and_differs_from_dense,
    "SAM's weights": test_sam.TestSparse.test_one_plan_and_one_checkpoint_for_every_code_base,
}


def table() -> list[dict[str, str]]:
    lines = [line.strip("| ").split(" | ") for line in MODELS_PAGE.splitlines() if line.startswith("| ")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def test_the_table_of_sam():
    rows = table()
    assert [row["code base"] for row in rows] == list(MODELS)
    assert set(rows[0]) == {"code base", "other sizes", *COLUMNS}
    for row in rows:
        name = row["code base"]
        sizes = {"deepseek-ocr": "square"}.get(name, "any") if name in ANY_SIZE else "its own error"
        assert row["other sizes"] == sizes
        assert row["SAM's weights"] == ("has none" if "rope" in name or "qk-norm" in name else "1e-5")
        cells = {"exact": "1e-5", "without the relative term": "fails", "keys": "same", "restored": "bit-exact"}
        cells |= {"compiled": "one graph", "gradients": "1e-4", "sparse": "1e-5"}
        assert {column: row[column] for column in cells} == cells
    for column, test in COLUMNS.items():
        assert {"name", "model"} & set(inspect.signature(test).parameters), column


def test_the_snippet_runs():
    (snippet,) = re.findall(r"```python\n(.*?)```", MODELS_PAGE, re.S)
    names: dict = {"bsa": bsa}
    exec(snippet, names)
    text = str(bsa.describe(names["encoder"]))
    assert "(window(size=16) | strided(stride=8))" in text
    assert "window(size=16) is exact: every block lies in one window" in text


@pytest.mark.parametrize(("size", "said"), [("vit_b", "1.27x"), ("vit_l", "1.10x"), ("vit_h", "1.06x")])
def test_the_ceilings(size, said):
    import torch

    from bsa_vision.encoder import SAM, create_encoder

    with torch.device("meta"):
        encoder = create_encoder(**SAM[size])
    assert f"at most {said} over" in bsa.cost(bsa.inspect(encoder)).sentence
    assert said in MODELS_PAGE


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_and_files_exist(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
