"""The docs list the tested models and limits, their snippets run, and their links exist."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import bsa_vision as bsa
from bsa_vision.attention.backends.select import BACKENDS
from tests.adapters import (
    test_sam2,
    test_sam_encoder,
    test_sparsify,
    test_timm_vit,
    test_torchvision_vit,
    test_vision_towers,
)
from tests.helpers import models, sam2_models, timm_models
from tests.helpers.sam_models import ANY_SIZE, MODELS

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
MODELS_PAGE = (DOCS / "models.md").read_text()
PROSE = " ".join(MODELS_PAGE.split())

Vit = test_sparsify.TestEveryFamily
Timm = test_timm_vit.TestEveryBranch
Sam3 = test_vision_towers.TestSam3.test_dense_and_sparse
Exact, Sparse = test_sam_encoder.TestExact, test_sam_encoder.TestSparse
Sam2 = test_sam2.TestEveryCodeBase


def test_keys_of_sam3():
    model = models.make("sam3")
    keys = list(model.state_dict())
    bsa.sparsify_(model, bsa.uniform_plan(model, "local_window", radius=1))
    assert list(model.state_dict()) == keys


# Each test runs for all models of its library, by one of these parameters or fixtures, unless its
# module tests a single model.
PARAMETERS = {"name", "model", "kind_and_name"}
SINGLE_MODEL = (test_torchvision_vit, test_vision_towers, sys.modules[__name__])
# Heading of a table in models.md -> {row: (result, the tests that check it)}
TABLES: dict[str, dict[str, tuple[str, list[Callable]]]] = {
    "test of ViTs": {
        "dense plan through `gather`, against the original": (
            "1e-5",
            [
                Vit.test_dense_plan_is_exact,
                Timm.test_dense_plan,
                test_torchvision_vit.test_dense_and_sparse,
                Sam3,
            ],
        ),
        "sparse plan, against dense attention with the same mask": (
            "1e-5",
            [
                Vit.test_sparse_plan_equals_masked_arithmetic,
                Timm.test_sparse_equals_masked_arithmetic,
                test_torchvision_vit.test_equals_masked_attention,
                Sam3,
            ],
        ),
        "the same without the mask": (
            "must fail",
            [
                Vit.test_sparse_plan_equals_masked_arithmetic,
                Timm.test_sparse_equals_masked_arithmetic,
                test_torchvision_vit.test_dense_and_sparse,
                Sam3,
            ],
        ),
        "state dict keys with sparse heads": (
            "the same",
            [
                Vit.test_dense_plan_is_exact,
                Timm.test_dense_plan,
                test_torchvision_vit.test_dense_and_sparse,
                test_keys_of_sam3,
            ],
        ),
        "output after `restore_`": (
            "bit-exact",
            [
                Vit.test_restore_is_bit_exact_and_leaves_nothing,
                Timm.test_restore_is_bit_exact,
                test_torchvision_vit.test_dense_and_sparse,
                Sam3,
            ],
        ),
        "`torch.compile(model, fullgraph=True)`": (
            "one graph",
            [
                Vit.test_compile_fullgraph,
                Timm.test_compile_fullgraph,
                test_torchvision_vit.test_compile_fullgraph,
                Sam3,
            ],
        ),
    },
    "test of SAM": {
        "dense plan, windowed layers included, against the original": (
            "1e-5",
            [Exact.test_dense_plan_changes_nothing],
        ),
        "the same without the relative position of one layer": (
            "must fail",
            [Exact.test_twin_without_the_relative_term],
        ),
        "state dict keys with sparse heads": ("the same", [Exact.test_dense_plan_changes_nothing]),
        "output after `restore_`": ("bit-exact", [Exact.test_restore_is_bit_exact]),
        "`torch.compile(model, fullgraph=True)`, dense and sparse": (
            "one graph",
            [Exact.test_compile_fullgraph],
        ),
        "gradients of one training step, relative tables included": (
            "1e-4",
            [Exact.test_gradients],
        ),
        "sparse plan, against dense attention with the same mask": (
            "1e-5",
            [Sparse.test_equals_masked_arithmetic_and_differs_from_dense],
        ),
        "segment_anything's weights, one plan file, all code bases": (
            "1e-5",
            [Sparse.test_one_plan_and_one_checkpoint_for_every_code_base],
        ),
    },
    "test of SAM 2": {
        "dense plan through `gather`, against the original": ("1e-5", [Sam2.test_dense_plan]),
        "sparse plan, against dense attention with the same mask": (
            "1e-5",
            [Sam2.test_sparse_equals_masked_arithmetic],
        ),
        "the same without the mask": ("must fail", [Sam2.test_sparse_equals_masked_arithmetic]),
        "state dict keys with sparse heads": ("the same", [Sam2.test_dense_plan]),
        "output after `restore_`": ("bit-exact", [Sam2.test_restore_is_bit_exact]),
        "`torch.compile(model, fullgraph=True)`, dense and sparse": (
            "one graph",
            [Sam2.test_compile_fullgraph],
        ),
        "gradients in float64, against dense attention with the mask": (
            "1e-5",
            [Sam2.test_gradients],
        ),
    },
}
# Result in a table -> a regular expression that the source of the test must match
EVIDENCE = {
    "1e-5": r"<=? 1e-5",
    "1e-4": r"< 1e-4|<= 1e-4",
    "must fail": r"> 1e-2",
    "bit-exact": r"torch\.equal\(",
    "the same": r"assert list\(model\.state_dict\(\)\) == \w+",
    "one graph": r"fullgraph=",
}


def table(first: str) -> dict[str, str]:
    """Return the rows of the two-column table with this first heading."""
    (text,) = re.findall(rf"^\| {first} \|.*?\n\n", MODELS_PAGE, re.S | re.M)
    rows = [line.strip("| ").split(" | ") for line in text.strip().splitlines()[2:]]
    return {row: result for row, result in rows}


def listed(title: str, number: int = 0) -> list[str]:
    """Return the names in the paragraph `number` of those that start with `title`."""
    found = re.findall(rf"^{title}: (.*?)\n\n", MODELS_PAGE, re.S | re.M)
    text = " ".join(found[number].split())
    assert re.fullmatch(r"(`[^`]+`, )*`[^`]+`\.", text), text
    return re.findall(r"`([^`]+)`", text)


@pytest.mark.parametrize("first", TABLES)
def test_tables_match_the_tests(first):
    assert table(first) == {row: result for row, (result, _) in TABLES[first].items()}
    for row, (result, tests) in TABLES[first].items():
        for test in tests:
            assert re.search(EVIDENCE[result], inspect.getsource(test)), (row, test)
            all_models = PARAMETERS & set(inspect.signature(test).parameters)
            assert all_models or inspect.getmodule(test) in SINGLE_MODEL, (row, test)


def test_list_of_vits():
    transformers = [f"transformers {name}" for name in [*models.MODELS, "sam3"]]
    timm = [f"timm {name}" for name in timm_models.MODELS]
    assert listed("Tested") == [*transformers, *timm, "torchvision vit"]
    assert listed("Compiles with graph breaks") == ["transformers siglip2"]


def test_lists_of_sam():
    def shown(names) -> list[str]:
        return ["bsa.create_encoder" if name == "create_encoder" else name for name in names]

    assert listed("Tested", 1) == shown(MODELS)
    assert listed("Any image size") == shown(name for name in MODELS if name in ANY_SIZE)
    assert listed("Only square images") == ["deepseek-ocr"]
    assert listed("Without SAM's weights") == [
        name for name in MODELS if "rope" in name or "qk-norm" in name
    ]


def test_lists_of_sam2():
    assert listed("Tested image encoders") == list(sam2_models.ENCODERS)
    assert listed("Tested memory attention") == list(sam2_models.MEMORIES)


def test_snippets_of_models_run(capsys):
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
    ("shown", "options"),
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
def test_speedup_limits_of_sam2(shown, options):
    from sam2.modeling.backbones.hieradet import Hiera
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine

    trunk = Hiera(**{"window_spec": (8, 4, 14, 7), **options})
    neck = FpnNeck(PositionEmbeddingSine(256), 256, trunk.channel_list, fpn_top_down_levels=[2, 3])
    sentence = bsa.cost(bsa.inspect(ImageEncoder(trunk, neck).to("meta"))).sentence
    assert f"at most {shown.split()[0]} over" in sentence
    assert shown in PROSE


@pytest.mark.parametrize(
    ("size", "shown"), [("vit_b", "1.27x"), ("vit_l", "1.10x"), ("vit_h", "1.06x")]
)
def test_speedup_limits_of_sam(size, shown):
    import torch

    from bsa_vision.models.encoder import SAM, create_encoder

    with torch.device("meta"):
        encoder = create_encoder(**SAM[size])
    assert f"at most {shown} over" in bsa.cost(bsa.inspect(encoder)).sentence
    assert shown in PROSE


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
        linked = (page.parent / target) if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), (target, anchor)


@pytest.mark.parametrize(
    ("page", "row"),
    [("backends.md", r"^\| `(\w+)` \|"), ("concepts.md", r"^\| backend \|.*: (.*) \|$")],
)
def test_every_backend_is_listed(page, row):
    found = " ".join(re.findall(row, (DOCS / page).read_text(), re.M))
    assert found.replace("`", "").replace(",", "").split() == list(BACKENDS)


def test_snippet_of_concepts_runs():
    concepts = (DOCS / "concepts.md").read_text()
    (snippet,) = re.findall(r"```python\n(layout = .*?)```", concepts, re.S)
    names: dict = {"bsa": bsa}
    exec(snippet, names)
    assert names["hm"].layout is names["layout"]
    assert names["hm"].slices[:5] == (0, 0, 0, 0, 1)
