"""docs/models.md: its snippet runs, and its table names the code bases and the tests that there are."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import bsa_vision as bsa
from bsa_vision.attention.backends.select import BACKENDS
from tests.adapters import test_sam_encoder
from tests.helpers import models, sam2_models, timm_models
from tests.helpers.sam_models import ANY_SIZE, MODELS

DOCS = Path(__file__).parent.parent / "docs"
MODELS_PAGE = (DOCS / "models.md").read_text()
# Column -> the test that runs its cells, with `name` or `model` going through all of MODELS.
COLUMNS = {
    "exact": test_sam_encoder.TestExact.test_dense_plan_changes_nothing,
    "without the relative term": test_sam_encoder.TestExact.test_twin_without_the_relative_term,
    "keys": test_sam_encoder.TestExact.test_dense_plan_changes_nothing,
    "restored": test_sam_encoder.TestExact.test_restore_is_bit_exact,
    "compiled": test_sam_encoder.TestExact.test_compile_fullgraph,
    "gradients": test_sam_encoder.TestExact.test_gradients,
    "sparse": test_sam_encoder.TestSparse.test_equals_masked_arithmetic_and_differs_from_dense,
    "SAM's weights": test_sam_encoder.TestSparse.test_one_plan_and_one_checkpoint_for_every_code_base,
}


def table(first: str) -> list[dict[str, str]]:
    """The rows of the table whose first column has this title."""
    (text,) = re.findall(rf"^\| {first} \|.*?\n\n", MODELS_PAGE + "\n\n", re.S | re.M)
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def test_the_table_of_sam():
    rows = table("code base")
    assert [row["code base"] for row in rows] == list(MODELS)
    assert set(rows[0]) == {"code base", "other sizes", *COLUMNS}
    for row in rows:
        name = row["code base"]
        sizes = {"deepseek-ocr": "square"}.get(name, "any") if name in ANY_SIZE else "its own error"
        assert row["other sizes"] == sizes
        assert row["SAM's weights"] == (
            "has none" if "rope" in name or "qk-norm" in name else "1e-5"
        )
        cells = {
            "exact": "1e-5",
            "without the relative term": "fails",
            "keys": "same",
            "restored": "bit-exact",
        }
        cells |= {"compiled": "one graph", "gradients": "1e-4", "sparse": "1e-5"}
        assert {column: row[column] for column in cells} == cells
    for column, test in COLUMNS.items():
        assert {"name", "model"} & set(inspect.signature(test).parameters), column


CELLS = {
    "dense plan": "1e-5",
    "sparse": "1e-5",
    "without the masks": "fails",
    "keys": "same",
    "restored": "bit-exact",
}


def test_the_table_of_vits():
    """Each row is a model that the tests of its library go through."""
    rows = table("model")
    transformers = [f"transformers {name}" for name in [*models.MODELS, "sam3"]]
    timm = [f"timm {name}" for name in timm_models.MODELS]
    assert [row["model"] for row in rows] == [*transformers, *timm, "torchvision vit"]
    for row in rows:
        name = row.pop("model")
        assert row == CELLS | {
            "compiled": "graph breaks" if name == "transformers siglip2" else "one graph"
        }


@pytest.mark.parametrize(
    ("first", "names"),
    [("image encoder", sam2_models.ENCODERS), ("memory attention", sam2_models.MEMORIES)],
)
def test_the_tables_of_sam2(first, names):
    rows = table(first)
    assert [row.pop(first) for row in rows] == list(names)
    assert all(row == CELLS | {"compiled": "one graph", "gradients": "1e-5"} for row in rows)


def test_the_snippets_run(capsys):
    snippets = re.findall(r"```python\n(.*?)```", MODELS_PAGE, re.S)
    assert len(snippets) == 2
    names: dict = {"bsa": bsa}
    for snippet in snippets:
        exec(snippet, names)
    text = str(bsa.describe(names["encoder"]))
    assert "(window(size=16) | strided(stride=8))" in text
    assert "window(size=16) is exact: every block lies in one window" in text
    hiera, memory = capsys.readouterr().out.splitlines()
    assert "at most 1.36x over" in hiera
    assert "at most 11.06x over" in memory


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (
            "1.27x (small)",
            dict(embed_dim=96, num_heads=1, stages=(1, 2, 11, 2), global_att_blocks=(7, 10, 13)),
        ),
        ("1.16x (base plus)", dict(embed_dim=112, num_heads=2)),
        (
            "1.07x (large)",
            dict(
                embed_dim=144,
                num_heads=2,
                stages=(2, 6, 36, 4),
                global_att_blocks=(23, 33, 43),
                window_spec=(8, 4, 16, 8),
            ),
        ),
    ],
)
def test_the_ceilings_of_sam2(said, options):
    from sam2.modeling.backbones.hieradet import Hiera
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine

    trunk = Hiera(**{"window_spec": (8, 4, 14, 7), **options})
    neck = FpnNeck(PositionEmbeddingSine(256), 256, trunk.channel_list, fpn_top_down_levels=[2, 3])
    sentence = bsa.cost(bsa.inspect(ImageEncoder(trunk, neck).to("meta"))).sentence
    assert f"at most {said.split()[0]} over" in sentence
    assert said in MODELS_PAGE


@pytest.mark.parametrize(
    ("size", "said"), [("vit_b", "1.27x"), ("vit_l", "1.10x"), ("vit_h", "1.06x")]
)
def test_the_ceilings(size, said):
    import torch

    from bsa_vision.models.encoder import SAM, create_encoder

    with torch.device("meta"):
        encoder = create_encoder(**SAM[size])
    assert f"at most {said} over" in bsa.cost(bsa.inspect(encoder)).sentence
    assert said in MODELS_PAGE


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_and_files_exist(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    ("page", "row"),
    [("backends.md", r"^\| `(\w+)` \|"), ("concepts.md", r"^\| backend \|.*: (.*) \|$")],
)
def test_every_backend_is_listed(page, row):
    found = (
        " ".join(re.findall(row, (DOCS / page).read_text(), re.M))
        .replace("`", "")
        .replace(",", "")
        .split()
    )
    assert found == list(BACKENDS)


def test_the_snippet_of_concepts_runs():
    (snippet,) = re.findall(
        r"```python\n(layout = .*?)```", (DOCS / "concepts.md").read_text(), re.S
    )
    names: dict = {"bsa": bsa}
    exec(snippet, names)
    assert names["hm"].layout is names["layout"]
    assert names["hm"].slices[:5] == (0, 0, 0, 0, 1)
