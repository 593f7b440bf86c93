"""What an import costs and where imports may point; each check in a fresh process, and each shown to be able to fail."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bsa_vision.attention.backends.select import BACKENDS

ROOT = Path(__file__).parent.parent

# May import (besides itself, torch, numpy, einops and the standard library). Imports go down only.
TABLE = {
    "masks": set(),
    "errors": set(),
    "cache": set(),
    "timing": set(),
    "block_rows": set(),
    "head_patterns": {"masks"},
    "head_masks": {"masks", "block_rows", "cache", "head_patterns"},
    "rel_pos": set(),
    "packing": {"masks", "head_masks"},
    "cache_file": {"files"},
    "backends": {"masks", "cache_file", "errors", "block_rows", "head_masks", "rel_pos"},
    "arguments": {"backends", "head_masks", "rel_pos"},
    "carried_masks": {"masks", "cache", "head_masks"},
    "onnx_form": {"masks", "carried_masks", "errors", "head_masks", "packing", "rel_pos"},
    "custom_op": {
        *(
            "masks",
            "arguments",
            "backends",
            "carried_masks",
            "errors",
            "head_masks",
            "packing",
            "rel_pos",
        ),
    },
    "attention": {
        *(
            "arguments",
            "backends",
            "carried_masks",
            "custom_op",
            "head_masks",
            "onnx_form",
            "packing",
            "rel_pos",
        ),
    },
    "model_spec": {"errors"},
    "cost": {"model_spec"},
    "static_mask": {"masks", "errors", "head_masks", "model_spec"},
    "latency": {
        "masks",
        "attention",
        "backends",
        "cache_file",
        "errors",
        "head_masks",
        "rel_pos",
        "timing",
    },
    "pruning": {"errors", "head_masks", "latency", "model_spec", "plan"},
    "plan": {
        *(
            "latency",
            "pruning",
            "masks",
            "cache",
            "errors",
            "head_masks",
            "head_patterns",
            "model_spec",
            "plan_file",
        ),
        "static_mask",
    },
    "prompts": {"masks"},
    "layer_masks": {
        "cache",
        "carried_masks",
        "errors",
        "head_masks",
        "model_spec",
        "plan",
        "plan_file",
        "prompts",
    },
    "plan_file": {"masks", "errors", "files", "plan", "static_mask"},
    "check": {"masks", "arguments", "backends", "head_masks"},
    "viz": {"masks"},
    "adapters": {
        *(
            "masks",
            "attention",
            "backends",
            "carried_masks",
            "cost",
            "errors",
            "head_masks",
            "latency",
        ),
        *("layer_masks", "model_spec", "plan", "prompts", "pruning", "rel_pos"),
    },
    "blocks": {"masks", "attention", "carried_masks", "head_masks", "rel_pos"},
    "encoder": {"masks", "adapters", "blocks", "carried_masks", "errors", "plan", "rel_pos"},
    "bench": {
        *("masks", "adapters", "attention", "backends", "cost", "errors", "loading"),
        *(
            "features",
            "files",
            "head_masks",
            "meter",
            "model_spec",
            "plan",
            "rel_pos",
            "timing",
            "tuning",
        ),
    },
    "features": set(),
    "files": set(),
    "meter": set(),
    "photographs": set(),
    "tuning": {
        *(
            "masks",
            "adapters",
            "compare",
            "errors",
            "features",
            "files",
            "latency",
            "model_spec",
            "packing",
            "plan",
        ),
        *("static_mask", "timing", "viz"),
    },
    "compare": {"adapters", "features", "meter", "timing"},
    "doctor": {"backends", "head_masks"},
    "hub_configs": set(),
    "loading": {"encoder", "errors", "hub_configs"},
    "commands": {
        *("masks", "adapters", "bench", "compare", "doctor", "errors", "loading", "meter"),
        *("photographs", "plan", "tuning", "viz"),
    },
    "cli": {"bench", "commands"},
    "__main__": {"cli"},
}
THIRD_PARTY = {"torch", "numpy", "einops"}
LAZY = {  # imported inside the functions that need them, or by modules that only those import
    "transformers": {"adapters", "bench"},
    "timm": {"adapters"},
    "PIL": {"photographs"},
    "scipy": {"tuning"},
    "safetensors": {"encoder", "tuning"},
    "matplotlib": {"viz", "bench", "commands", "tuning"},
    "rich": {"bench", "cli", "commands"},
    "typer": {"bench", "cli", "commands"},
}


def imports(path: Path) -> set[str]:
    """Dotted names of what a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            names |= {
                f"{node.module}.{alias.name}" if node.module == "bsa_vision" else node.module
                for alias in node.names
            }
    return names


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "masks" if parts[0] == "masks" else parts[1]


FILES = [
    path for folder in ("masks", "bsa_vision") for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    module = module_of(path)
    if module == "__init__":
        return  # the public face imports everything
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "bsa_vision":
            assert rest[0] in TABLE[module] | {module}, f"{path.name} imports {name}"
        elif top == "masks":
            assert module == "masks" or "masks" in TABLE[module], f"{path.name} imports {name}"
        elif top not in sys.stdlib_module_names:
            allowed = {"torch"} if module == "masks" else THIRD_PARTY
            assert top in allowed or module in LAZY.get(top, ()), f"{path.name} imports {name}"


def test_the_table_names_what_there_is():
    assert {module_of(path) for path in FILES} - {"__init__"} == set(TABLE)


def test_backends_do_not_import_each_other():
    names = set(BACKENDS)
    for name in names:
        for imported in imports(ROOT / "bsa_vision" / "backends" / f"{name}.py"):
            assert imported.rpartition(".")[2] not in names, f"{name} imports {imported}"


def run(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, **options
    )


LOADED = "import sys, json; {}; print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"


def loaded(statement: str) -> set[str]:
    result = run(LOADED.format(statement))
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout))


def test_importing_loads_nothing_more_than_torch_numpy_and_einops_do():
    base = loaded("import torch, numpy, einops, torch._dynamo")
    extra = {
        name
        for name in loaded("import bsa_vision") - base
        if name not in sys.stdlib_module_names and not name.startswith("_")
    }
    assert extra == {"bsa_vision", "masks"}
    assert (
        "matplotlib" in loaded("import bsa_vision, matplotlib") - base
    )  # the twin: more would be seen


def test_importing_starts_no_cuda():
    result = run("import bsa_vision, torch; assert not torch.cuda.is_initialized()")
    assert result.returncode == 0, result.stderr


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise {error}
sys.meta_path.insert(0, Block())
"""
NEIGHBOURS = [
    "timm",
    "transformers",
    "torchvision",
    "block_sparse_attn",
    "matplotlib",
    "rich",
    "typer",
]
USE = """
import torch, bsa_vision as bsa
hm = bsa.HeadMasks(*bsa.masks.generate_vit_hybrid_mask(256, 16, 128, 1, 6))
q = torch.randn(1, 6, 257, 32)
bsa.sparse_attention(q, q, q, hm)
try:
    bsa.sparse_attention(q, q, q, hm, backend="kernel")
except bsa.BackendUnavailable:
    pass
try:
    bsa.inspect(torch.nn.Linear(2, 2))
except bsa.PlanError:
    print("fine")
"""


@pytest.mark.parametrize(
    "error",
    [
        "ModuleNotFoundError(name, name=name)",
        "RuntimeError('operator torchvision::nms does not exist')",
    ],
)
def test_works_while_neighbours_are_absent_or_broken(error):
    blocked = BLOCK.format(names=NEIGHBOURS, error=error)
    result = run(blocked + USE)
    assert result.stdout == "fine\n", result.stderr
    assert run(blocked + "import transformers").returncode != 0  # the twin: the block holds


def test_a_foreign_masks_package_is_named(tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "__init__.py").write_text("def draw(): pass\n")
    result = run(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import bsa_vision")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: the package `masks` found at")
    assert str(tmp_path / "masks" / "__init__.py") in last
    assert "rename or uninstall the other package" in last


def test_masks_is_one_module_under_both_names():
    code = "import masks, bsa_vision; from bsa_vision import masks as m; from bsa_vision.masks import TokenLayout as t; "
    assert run(code + "assert m is masks and t is masks.TokenLayout").returncode == 0


def test_public_names():
    import bsa_vision as bsa

    assert sorted(bsa.__all__) == bsa.__all__
    assert all(hasattr(bsa, name) for name in bsa.__all__)
    assert {
        "sparse_attention",
        "sparsify_",
        "restore_",
        "dense",
        "describe",
        "check",
        "inspect",
    } <= set(bsa.__all__)
