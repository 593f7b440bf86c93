"""What an import costs, where imports point, and how large files are.

Each check has a twin that shows it can fail.
"""

from __future__ import annotations

import ast
import graphlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bsa_vision.attention.backends.select import BACKENDS

ROOT = Path(__file__).parent.parent

# The packages of bsa_vision, and the modules beside them: imports go from right to left only.
ORDER = [
    "masks",
    "storage",
    "errors",
    "attention",
    "measure",
    "plans",
    "adapters",
    "models",
    "viz",
    "compare",
    "tuning",
    "bench",
    "cli",
]
THIRD_PARTY = {"torch", "numpy", "einops"}
LAZY = {  # imported inside the functions that need them, or by modules that only those import
    "transformers": {"adapters", "models"},
    "timm": {"adapters", "models"},
    "segment_anything": {"models"},
    "PIL": {"models"},
    "scipy": {"tuning"},
    "safetensors": {"models", "tuning"},
    "matplotlib": {"viz", "bench", "cli", "tuning"},
    "rich": {"bench", "cli"},
    "typer": {"cli"},
}


FILES = sorted((ROOT / "bsa_vision").rglob("*.py"))


def module_of(path: Path) -> str:
    """Return the dotted name of a file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Return the dotted names of what a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in full}
    return names


def part_of(name: str) -> str:
    """Return the package of bsa_vision that a module is in."""
    return name.split(".")[1]


GRAPH = {
    name: {found for found in imports(path) if found in MODULES} for name, path in MODULES.items()
}


def test_modules_sort():
    tuple(graphlib.TopologicalSorter(GRAPH).static_order())
    circle = {**GRAPH, "bsa_vision.errors": {"bsa_vision.cli.main"}}  # the twin
    with pytest.raises(graphlib.CycleError):
        tuple(graphlib.TopologicalSorter(circle).static_order())


@pytest.mark.parametrize("name", [name for name in MODULES if "." in name])
def test_imports_point_down(name):
    if name == "bsa_vision.__main__":
        return
    own = part_of(name)
    for found in imports(MODULES[name]):
        top = found.partition(".")[0]
        if found in MODULES:
            assert found != "bsa_vision", f"{name} imports the public face"
            assert ORDER.index(part_of(found)) <= ORDER.index(own), f"{name} imports {found}"
        elif top not in sys.stdlib_module_names:
            allowed = {"torch"} if own == "masks" else THIRD_PARTY
            assert top in allowed or own in LAZY.get(top, ()), f"{name} imports {found}"


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Upstream's signatures, the options of shell commands, and keyword-only options.
MANY_PARAMETERS = {
    "block_sparse_attn_func",
    "block_streaming_attn_func",
    "token_streaming_attn_func",
    "tune",
    "create_encoder",
}


def faults(path: Path, text: str) -> list[str]:
    """Return what is too large in a file, and what a package's face should not hold."""
    found = ["over 400 lines"] if len(text.splitlines()) > 400 else []
    for node in ast.walk(ast.parse(text)):
        if path.name == "__init__.py" and isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            found.append(f"{node.name}: defined in __init__")
        if isinstance(node, FUNCTIONS):
            body = node.body[ast.get_docstring(node) is not None :] or node.body
            if body[-1].end_lineno - body[0].lineno + 1 > 60:
                found.append(f"{node.name}: over 60 lines")
            number = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
            free = node.name in MANY_PARAMETERS or path.parent.name == "cli"
            if number > 10 and not free:
                found.append(f"{node.name}: {number} parameters")
    return found


def test_the_shape_of_the_package():
    """Few files at the top, packages' faces hold names only, files and functions stay small."""
    assert len(list((ROOT / "bsa_vision").glob("*.py"))) <= 6
    assert {part_of(name) for name in MODULES if "." in name} - {"__main__"} == set(ORDER)
    assert {str(path): found for path in FILES if (found := faults(path, path.read_text()))} == {}


def test_faults_are_seen():
    body = "    x = 1\n" * 61
    parameters = ", ".join(f"x{number}" for number in range(11))
    text = f"def f({parameters}):\n{body}" + "x = 1\n" * 400
    assert faults(Path("bsa_vision/__init__.py"), text) == [
        "over 400 lines",
        "f: defined in __init__",
        "f: over 60 lines",
        "f: 11 parameters",
    ]


def test_backends_do_not_import_each_other():
    names = set(BACKENDS)
    for name in names:
        for imported in imports(ROOT / "bsa_vision" / "attention" / "backends" / f"{name}.py"):
            assert imported.rpartition(".")[2] not in names, f"{name} imports {imported}"


def run(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, **options
    )


LOADED = """
import sys, json
{}
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""


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
    assert extra == {"bsa_vision"}
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


def foreign(folder: Path, kind: str) -> None:
    """Make the folder of a segmentation data set: images and masks, the latter a package or not."""
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    (folder / "masks" / "0001.png").write_bytes(b"")
    if kind != "pictures":
        (folder / "masks" / "__init__.py").write_text("def draw(): pass\n")
    if kind == "a module":
        (folder / "masks.py").write_text("raise ImportError('a foreign module')\n")


@pytest.mark.parametrize("kind", ["pictures", "a package", "a module"])
def test_a_folder_of_masks_breaks_nothing(tmp_path, kind):
    foreign(tmp_path, kind)
    code = (
        "import bsa_vision, bsa_vision.masks as m; from bsa_vision.masks import Pattern; "
        "assert m is bsa_vision.masks and m.__name__ == 'bsa_vision.masks'; print('fine')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.parametrize("kind", ["pictures", "a package", "a module"])
def test_type_checkers_find_the_masks(tmp_path, kind):
    foreign(tmp_path, kind)
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\n[mypy-torch.*]\nfollow_imports = skip\n[mypy-numpy.*]\nfollow_imports = skip\n"
    )
    code = "from bsa_vision.masks import Pattern\nreveal_type(Pattern('special'))\n"
    (tmp_path / "mine.py").write_text(code)
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "mine.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "bsa_vision.masks.pattern.Pattern" in done.stdout
    (tmp_path / "mine.py").write_text(code.replace("Pattern('special')", "Pattern(3)"))  # the twin
    assert subprocess.run(command, capture_output=True, cwd=tmp_path).returncode == 1


def test_masks_is_one_module_under_both_names():
    code = (
        "import masks, bsa_vision, pickle, masks.layout; from bsa_vision import masks as m; "
        "from bsa_vision.masks import TokenLayout as t; from masks.layout import TokenLayout as u; "
        "assert m is masks and t is masks.TokenLayout is u; "
        "p = b'cmasks.layout\\nTokenLayout\\n.'; assert pickle.loads(p) is t"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


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
