"""`bsa-vision bench`: options, output and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.nn.functional as F
from PIL import Image

from bsa_vision.bench import implementations
from bsa_vision.cli import bench, main
from bsa_vision.models import random_weights

ROOT = Path(__file__).parents[2]
SMALL = "--tokens 20x13 --heads 3 --head-dim 16 --block-size 32 --rounds 2"
SMALL += " --implementation bsa --implementation sdpa-mask"


def run(capsys, line: str) -> tuple[int, str, str]:
    """Run `bsa-vision line`; return the exit code, standard output and standard error."""
    with pytest.raises(SystemExit) as left:
        main.main(line.split())
    return left.value.code or 0, *capsys.readouterr()


def process(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess:
    bench = [sys.executable, "-c", code] if code else [sys.executable, "-m", "bsa_vision"]
    return subprocess.run([*bench, *arguments], capture_output=True, text=True, cwd=ROOT)


def test_all_outputs(capsys, tmp_path):
    files = f"--json {tmp_path}/new/rows.json --plot {tmp_path}/rows.png"
    code, out, err = run(capsys, f"bench {SMALL} --density 0.25 --density 0.5 {files}")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "torch threads" in lines[0]
    assert lines[1].startswith("grid 20x13, heads 3, head_dim 16, dtype float32, device cpu,")
    assert sum(line.startswith("random ") for line in lines) == 2
    assert "\x1b" not in out  # no colours in a pipe
    data = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert data["command"].startswith("bsa-vision bench --tokens 20x13 ")
    assert data["complete"]
    assert [f"{row['density']:.3f}" in out for row in data["rows"]] == [True] * 2
    found = [each for row in data["rows"] for each in row["implementations"].values()]
    assert [len(each["timing"]["seconds"]) for each in found] == [2] * 6
    with Image.open(tmp_path / "rows.png") as picture:
        assert min(picture.size) > 500
        colors = picture.convert("RGB").getcolors(1 << 24)
        assert len(colors) > 50  # lines and text, not an empty picture


def test_wrong_result_gives_exit_code_1(capsys, monkeypatch, tmp_path):
    line = f"bench {SMALL} --density 0.5 --json {tmp_path}/rows.json"
    assert run(capsys, line)[0] == 0

    def dense(q, k, v, masks, **how):
        return F.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr(implementations, "sparse_attention", dense)
    code, out, err = run(capsys, line)
    assert code == 1
    assert "ERROR: bsa: error of out / allowed: " in out
    assert "a result is wrong" in err
    data = json.loads((tmp_path / "rows.json").read_text())
    assert not data["ok"]
    assert data["rows"][0]["implementations"]["bsa"]["status"] == "wrong"


def test_attention_is_the_default_and_can_be_named(capsys):
    first = run(capsys, f"bench {SMALL} --density 0.5")
    named = run(capsys, f"bench attention {SMALL} --density 0.5")
    assert first[0] == named[0] == 0
    assert first[1].splitlines()[1] == named[1].splitlines()[1]


def test_several_patterns(capsys):
    _, out, _ = run(capsys, f"bench {SMALL} --pattern local:1 --pattern local:2")
    assert [line.split()[0] for line in out.splitlines() if " ms" in line] == ["local:1", "local:2"]


def test_implementations_that_cannot_run_say_why(capsys):
    options = "--implementation flex --density 0.5 --backward --backend kernel"
    code, out, _ = run(capsys, f"bench {SMALL} {options}")
    assert code == 0
    assert "* Not run: flex: FlexAttention has no backward on the CPU" in out
    assert "* Not run: bsa: backend='kernel' cannot run this call" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--tokens 1000", "--tokens '1000': allowed are grids"),
        ("--density 0.5 --pattern local:8", "--density: only random and nearest take one"),
        ("--pattern local:x", "radius='x': expected an integer"),
        (
            "--pattern region:30x1 --tokens 8x8",
            "patch (30, 1) lies outside the grid of 8 x 8 patches",
        ),
        ("--implementation xformers", "--implementation 'xformers': allowed are sdpa, bsa,"),
        ("--backend cudnnn", "--backend 'cudnnn': allowed are auto, kernel,"),
        ("--dtype int8", "--dtype 'int8': allowed are float32, bfloat16, float16, float64"),
        ("--device cuda:77", "--device 'cuda:77': allowed are cpu"),
        ("--order spiral", "--order 'spiral': allowed are auto, tile, raster"),
        ("--heads 2 --dense-heads 3", "--dense-heads 3: there are 2 heads"),
        ("--plot out/rows.gift", "--plot out/rows.gift: allowed endings are "),
        ("--json /proc/nowhere/rows.json", "/proc/nowhere"),
    ],
)
def test_wrong_input(capsys, line, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, f"bench {line}")
    assert (code, out) == (2, "")
    assert err.startswith("bsa-vision bench: ")
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("rows.*"))


def test_invalid_numbers_options_and_commands(capsys):
    for line in ("--density 2", "--rounds 0", "--heads x", "--block-size 0"):
        code, out, err = run(capsys, f"bench {line}")
        assert (code, out) == (2, "")
        assert "Invalid value for" in err
        assert line.split()[0] in err
    for line in ("bench --nothing", "bench model --nothing", "benhc"):
        code, _, err = run(capsys, line)
        assert code == 2
        assert "No such" in err


def test_help_names_the_options(capsys):
    code, out, _ = run(capsys, "bench attention --help")
    assert code == 0
    for option in ("--tokens", "--density", "--rel-pos", "--backward", "--plot", "--quick"):
        assert option in out
    assert "model" in run(capsys, "bench --help")[1]


@pytest.mark.parametrize(
    ("command", "default"),
    [
        ("bench attention", "all that this device can run"),
        ("bench model", "64 patches per side"),
        ("describe", "the model's own"),
        ("masks", "the middle of the grid"),
        ("tune", "cuda if available, else cpu"),
    ],
)
def test_help_shows_defaults_in_words(capsys, monkeypatch, command, default):
    """rich reads `[...]` in help texts as markup and drops it."""
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = run(capsys, f"{command} --help")
    assert code == 0
    assert f"[default: ({default}" in out


class TestModel:
    line = "bench model --model tests.helpers.models:dinov3 --block-size 16 --rounds 1"

    def test_a_run(self, capsys, tmp_path):
        options = "--image-size 96x64 --pattern local:2 --dense-heads 1"
        code, out, _ = run(capsys, f"{self.line} {options} --json {tmp_path}/rows.json")
        assert code == 0
        assert "3 layers of 4 heads of 12" in out
        assert "RANDOM WEIGHTS" not in out  # the weights of a factory are unknown
        (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
        assert row["case"]["image_size"] == [96, 64]
        sparse = row["implementations"]["sparse"]
        assert sparse["errors"]["features"]["found"] <= sparse["errors"]["features"]["allowed"]
        assert sparse["timing"]["seconds"]

    def test_random_weights_are_reported(self, capsys, monkeypatch):
        small = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4)
        small |= dict(intermediate_size=96)
        monkeypatch.setitem(random_weights.BUILT_IN, "dinov3", ("DINOv3ViT", 8, small))
        line = "bench model --image-size 64 --block-size 16 --rounds 1 --pattern random"
        code, out, _ = run(capsys, f"{line} --density 0.4")
        assert code == 0
        assert "RANDOM WEIGHTS" in out

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("--model resnet", "--model 'resnet': allowed are vit, dinov2, dinov3, sam and"),
            ("--image-size 65", "both sides must be multiples of the patch size (8, 8)"),
            ("--dense-heads 9", "--dense-heads 9: the model has 4 heads"),
            (
                "--model torch.nn:Identity --image-size 64",
                "Identity has no supported attention layer",
            ),
        ],
    )
    def test_wrong_input(self, capsys, line, message):
        code, out, err = run(capsys, f"{self.line} {line}")
        assert (code, out) == (2, "")
        assert message in err


def test_as_a_module_in_a_process():
    result = process("bench", *SMALL.split(), "--density", "0.5")
    assert result.returncode == 0, result.stderr
    assert "density" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_cli_extra(missing):
    code = f"import sys; sys.modules[{missing!r}] = None\n"
    code += "from bsa_vision.cli.main import main; main(['bench', '--quick'])"
    result = process(code=code)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "typer and rich are missing or broken" in result.stderr
    assert "pip install 'bsa-vision[cli]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_ctrl_c(capsys, monkeypatch, tmp_path):
    """Rows measured so far are printed and saved."""
    real, calls = bench.run_case, []

    def interrupted(case, *rest):
        calls.append(case)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(case, *rest)

    monkeypatch.setattr(bench, "run_case", interrupted)
    code, out, err = run(
        capsys, f"bench {SMALL} --density 0.25 --density 0.5 --json {tmp_path}/rows.json"
    )
    assert code == 130
    assert err == "stopped: 1 of 2 rows were measured\n"
    assert "density" in out
    data = json.loads((tmp_path / "rows.json").read_text())
    assert (data["complete"], len(data["rows"])) == (False, 1)
    calls[:] = [None]
    # before any row
    assert run(capsys, f"bench {SMALL} --density 0.5 --json {tmp_path}/none.json")[0] == 130
