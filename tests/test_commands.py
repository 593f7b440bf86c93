"""`bsa-vision doctor` and `bsa-vision masks`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from bsa_vision import cli, doctor
from bsa_vision.backends import BACKENDS
from masks import TokenLayout, draw, local_window

ROOT = Path(__file__).parent.parent
BREAK = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        if name.partition(".")[0] == "timm":
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Broken())
from bsa_vision import cli
cli.main({arguments})
"""


def run(capsys, line: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main(line.split())
    return left.value.code or 0, *capsys.readouterr()


class TestDoctor:
    def test_what_is_here(self):
        found = {finding.name: finding for finding in doctor.doctor()}
        assert found["torch"].detail == torch.__version__
        assert set(BACKENDS) <= set(found)
        assert found["gather"].state == found["reference"].state == doctor.OK
        if not torch.cuda.is_available():
            assert found["kernel"].state == found["GPU"].state == doctor.NOT_HERE
            assert "CUDA" in found["kernel"].detail
        assert found["transformers"].state == found["timm"].state == doctor.OK
        assert found["timm"].detail[0].isdigit()
        assert found["block_sparse_attn"].state == doctor.ABSENT

    def test_table_and_json(self, capsys):
        code, out, _ = run(capsys, "doctor")
        assert code == 0
        assert "compiled loop" in out
        assert "block_sparse_attn" in out
        code, out, _ = run(capsys, "doctor --json")
        assert code == 0
        kinds = [finding["kind"] for finding in json.loads(out)]
        assert kinds == sorted(kinds, key=["machine", "backend", "library"].index)

    def test_with_torchvision_broken(self):
        """Broken and absent are told apart, neither breaks the rest, and the exit code says so."""
        result = subprocess.run(
            [sys.executable, "-c", BREAK.format(arguments=["doctor", "--json"])],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert result.returncode == 1, result.stderr
        found = {finding["name"]: finding for finding in json.loads(result.stdout)}
        assert found["torchvision"]["state"] == doctor.BROKEN
        assert "RuntimeError: operator torchvision::nms does not exist" in found["torchvision"]["detail"]
        assert found["timm"]["state"] == doctor.ABSENT
        assert found["gather"]["state"] == doctor.OK
        table = subprocess.run(
            [sys.executable, "-c", BREAK.format(arguments=["doctor"])], capture_output=True, text=True, cwd=ROOT
        )
        assert "torchvision is installed and fails to import: reinstall it to fit your torch" in table.stdout


class TestMasks:
    def test_text(self, capsys):
        code, out, _ = run(capsys, "masks local:8 --grid 32x48 --start 5")
        layout = TokenLayout((32, 48), start=5, order="tile")
        mask = local_window(layout, 8)
        assert code == 0
        assert out.startswith(draw(mask))
        assert f"{mask.shape[0]} blocks of 128, {1 - mask.float().mean():.1%} skipped" in out

    def test_json(self, capsys):
        code, out, _ = run(capsys, "masks window:8 --grid 16x24 --tile 8x8 --block-size 64 --json")
        data = json.loads(out)
        assert code == 0
        assert data["pattern"] == {"pattern": "window", "size": 8}
        assert data["mask"] == torch.eye(6, dtype=torch.int).tolist()
        assert data["labels"] == ["window(size=8) is exact: every block lies in one window"]

    def test_picture(self, capsys, tmp_path):
        code, out, _ = run(capsys, f"masks local:8 --grid 32x32 --query 3x4 --png {tmp_path}/new/view.png")
        assert code == 0
        assert "picture: " in out
        with Image.open(tmp_path / "new" / "view.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("masks nope", "allowed are random, local"),
            ("masks local --grid 3x", "allowed are grids of patches"),
            ("masks local --order spiral", "order='spiral': allowed are 'raster', 'tile'"),
            ("masks local --grid 8x8 --query 9x1 --png out/x.png", "patch (9, 1) lies outside the grid"),
            ("masks local --grid 8x8 --query 9 --png out/x.png", "expected a patch, row x column"),
        ],
    )
    def test_wrong_input(self, capsys, line, message):
        code, out, err = run(capsys, line)
        assert code == 2
        assert message in out + err
