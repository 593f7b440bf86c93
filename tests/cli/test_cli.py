"""The command line: what a user types, sees, and gets as exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.nn.functional as F
from PIL import Image
from rich.console import Console

from bsa_vision.bench import ways
from bsa_vision.cli import bench, bench_output, main

ROOT = Path(__file__).parents[2]
SMALL = "--tokens 20x13 --heads 3 --head-dim 16 --block-size 32 --rounds 2 --ways ours,sdpa-mask"


def run(capsys, line: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `bsa-vision line`."""
    with pytest.raises(SystemExit) as left:
        main.main(line.split())
    return left.value.code or 0, *capsys.readouterr()


def process(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess:
    bench = [sys.executable, "-c", code] if code else [sys.executable, "-m", "bsa_vision"]
    return subprocess.run([*bench, *arguments], capture_output=True, text=True, cwd=ROOT)


def test_a_run_with_all_its_outputs(capsys, tmp_path):
    files = f"--json {tmp_path}/new/rows.json --plot {tmp_path}/rows.png"
    code, out, err = run(capsys, f"bench {SMALL} --density 0.25,0.5 --dtype float32,bfloat16 {files}")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "torch threads" in lines[0]
    assert (
        lines[1]
        == "20x13 = 260 tokens, 3 heads, head dim 16, batch 1, pattern random, raster order, blocks of 32, forward"
    )
    assert sum(line.startswith("| float32 ") or line.startswith("| bfloat16 ") for line in lines) == 4
    assert "\x1b" not in out  # plain when piped
    data = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert data["command"].startswith("bsa-vision bench --tokens 20x13 ")
    assert data["complete"]
    assert [row["case"]["dtype"] for row in data["rows"]] == ["float32"] * 2 + ["bfloat16"] * 2
    assert [f"{row['density']:.3f}" in out for row in data["rows"]] == [True] * 4
    assert all(len(way["timing"]["seconds"]) == 2 for row in data["rows"] for way in row["ways"].values())
    with Image.open(tmp_path / "rows.png") as picture:
        assert min(picture.size) > 500
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50  # lines and text, not an empty sheet


def test_a_wrong_result_gives_exit_code_1(capsys, monkeypatch, tmp_path):
    line = f"bench {SMALL} --density 0.5 --json {tmp_path}/rows.json"
    assert run(capsys, line)[0] == 0
    monkeypatch.setattr(ways, "sparse_attention", lambda q, k, v, hm, **how: F.scaled_dot_product_attention(q, k, v))
    code, out, err = run(capsys, line)
    assert code == 1
    assert "ERROR: ours: out is off by" in out
    assert "a result is wrong" in err
    data = json.loads((tmp_path / "rows.json").read_text())
    assert not data["ok"]
    assert data["rows"][0]["ways"]["ours"]["status"] == "wrong"


def test_attention_is_the_default_and_can_be_named(capsys):
    first = run(capsys, f"bench {SMALL} --density 0.5")
    named = run(capsys, f"bench attention {SMALL} --density 0.5")
    assert first[0] == named[0] == 0
    assert first[1].splitlines()[1] == named[1].splitlines()[1]


def test_sparsity_is_density_the_other_way_round(capsys):
    low, high = (run(capsys, f"bench {SMALL} --{text}")[1] for text in ("sparsity 0.75", "density 0.25"))
    densities = [next(line for line in out.splitlines() if "0.2" in line).split("|")[1] for out in (low, high)]
    assert densities[0] == densities[1]


def test_ways_that_cannot_run_say_why(capsys):
    code, out, _ = run(capsys, f"bench {SMALL},flex --density 0.5 --backward --backend kernel")
    assert code == 0
    assert "* Not run: FlexAttention: FlexAttention has no backward on the CPU" in out
    assert "* Not run: ours: backend='kernel' cannot run this call" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--tokens 1000", "--tokens '1000': allowed are grids of patches"),
        ("--density 2", "--density '2': allowed are fractions"),
        ("--density 0.5 --sparsity 0.5", "--density and --sparsity are both given: one says the other; leave one out"),
        (
            "--density 0.5 --pattern local:8",
            "--density with --pattern 'local:8': the density of these patterns follows",
        ),
        ("--pattern local:x", "radius='x': expected a whole number"),
        ("--pattern region:30x1 --tokens 8x8", "patch (30, 1) lies outside the grid"),
        (
            "--ways ours,xformers",
            "--ways 'xformers': allowed are sdpa, sdpa-bias, ours, sdpa-mask, flex, sdpa-flash, sdpa-cudnn, kernel, cudnn; choose",
        ),
        ("--backend cudnnn", "--backend 'cudnnn': allowed are auto, kernel,"),
        ("--device cuda:77", "--device 'cuda:77': here there is cpu"),
        ("--rounds 0", "--rounds '0': allowed are whole numbers from 1"),
        ("--threads -1", "--threads '-1': allowed are whole numbers from 1"),
        ("--order spiral", "--order 'spiral': allowed are auto, tile, raster"),
        ("--heads 2 --dense-heads 3", "--dense-heads 3: there are 2 heads"),
        ("--plot rows.gif", "--plot rows.gif: allowed are .png, .pdf, .svg"),
        ("--json /proc/nowhere/rows.json", "it cannot be written"),
        ("--block-size 0", "block_size=0: expected a whole number"),
    ],
)
def test_wrong_input(capsys, line, message):
    code, out, err = run(capsys, f"bench {line}")
    assert (code, out) == (2, "")
    assert err.startswith("bsa-vision bench: ")
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_unknown_options_and_commands(capsys):
    for line in ("bench --nothing", "bench model --nothing", "benhc"):
        code, _, err = run(capsys, line)
        assert code == 2
        assert "No such" in err
    assert not Path(ROOT, "rows.gif").exists()


def test_help_names_the_options(capsys):
    code, out, _ = run(capsys, "bench attention --help")
    assert code == 0
    for option in ("--tokens", "--density", "--rel-pos", "--backward", "--memory", "--plot", "--quick"):
        assert option in out
    assert "model" in run(capsys, "bench --help")[1]


class TestModel:
    line = "bench model --model tests.models:dinov3 --block-size 16 --rounds 1"

    def test_a_run(self, capsys, tmp_path):
        files = f"--json {tmp_path}/rows.json"
        code, out, _ = run(capsys, f"{self.line} --image-size 64,96x64 --radius 2 --dense-heads 1 {files}")
        assert code == 0
        assert out.count("same bits") == 2
        assert "3 layers of 4 heads of 12" in out
        assert "RANDOM WEIGHTS" not in out  # a factory's weights are its own affair
        data = json.loads((tmp_path / "rows.json").read_text())
        assert [row["grid"] for row in data["rows"]] == [[8, 8], [12, 8]]
        assert [row["dense_plan_difference"] for row in data["rows"]] == [0.0, 0.0]
        assert all(row["error"]["ok"] and row["timing"]["sparse"]["seconds"] for row in data["rows"])

    def test_random_weights_are_named_as_such(self, capsys, monkeypatch):
        from bsa_vision.bench import models

        small = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
        monkeypatch.setitem(models.BUILT_IN, "dinov3", ("DINOv3ViTConfig", "DINOv3ViTModel", 8, small))
        line = "bench model --image-size 64 --block-size 16 --rounds 1 --pattern random --density 0.4"
        code, out, _ = run(capsys, line)
        assert code == 0
        assert "RANDOM WEIGHTS" in out

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("--model resnet", "--model 'resnet': allowed are vit, dinov2, dinov3, sam and package.module:factory"),
            ("--model tests.models:dinov3 --image-size 65", "both sides must be whole numbers of (8, 8) pixel patches"),
            ("--model tests.models:dinov3 --dense-heads 9", "dense_heads=9: the model has 4 heads"),
            ("--model torch.nn:Identity --image-size 64", "no attention layer of Identity"),
        ],
    )
    def test_wrong_input(self, capsys, line, message):
        code, out, err = run(capsys, f"bench model --block-size 16 {line}")
        assert (code, out) == (2, "")
        assert message in err


def test_as_a_module_in_a_process():
    result = process("bench", *SMALL.split(), "--density", "0.5")
    assert result.returncode == 0, result.stderr
    assert "| density |" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal_and_lose_nothing(monkeypatch, capsys, width):
    monkeypatch.setattr(
        bench_output, "stdout", lambda: Console(width=width, force_terminal=True, highlight=False, color_system=None)
    )
    _, out, _ = run(capsys, f"bench {SMALL} --density 0.25,0.5 --rel-pos --tokens 20x13,16x16")
    assert max(map(len, out.splitlines())) <= width
    assert "…" not in out
    rows = [line for line in out.splitlines() if line.strip().startswith(("20x13", "16x16"))]
    assert len(rows) == 4
    assert all(" ms" in row for row in rows)
    _, out, _ = run(capsys, f"{TestModel.line} --image-size 64 --radius 2")
    assert max(map(len, out.splitlines())) <= width
    row = next(line for line in out.splitlines() if line.strip().startswith("dinov3"))
    assert re.search(r"dinov3 .* 69 .* local:2 .* ms .* [0-9.]+e-0[0-9] .* same", row)


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_cli_extra(missing):
    code = f"import sys; sys.modules[{missing!r}] = None\nfrom bsa_vision.cli import main; main(['bench', '--quick'])"
    result = process(code=code)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "typer and rich are missing or broken" in result.stderr
    assert "pip install 'bsa-vision[cli]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_ctrl_c_leaves_cleanly(capsys, monkeypatch, tmp_path):
    """Rows measured so far are shown and written."""
    real, calls = bench.run_case, []

    def interrupted(case, *rest):
        calls.append(case)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(case, *rest)

    monkeypatch.setattr(bench, "run_case", interrupted)
    code, out, err = run(capsys, f"bench {SMALL} --density 0.25,0.5,1 --json {tmp_path}/rows.json")
    assert code == 130
    assert err == "stopped: 1 of 3 rows were measured\n"
    assert "| density |" in out
    data = json.loads((tmp_path / "rows.json").read_text())
    assert (data["complete"], len(data["rows"])) == (False, 1)
    calls[:] = [None]
    assert run(capsys, f"bench {SMALL} --density 0.5 --json {tmp_path}/none.json")[0] == 130  # before any row
