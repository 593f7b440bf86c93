"""`bsa-vision doctor`, `describe` and `masks`, and models by name."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from PIL import Image

from bsa_vision.adapters import inspect
from bsa_vision.attention.backends.select import BACKENDS
from bsa_vision.cli import doctor, main
from bsa_vision.masks import TokenLayout, draw, local_window
from bsa_vision.models import by_name, hub_configs
from tests.helpers import models

ROOT = Path(__file__).parents[2]
# Runs the command with a broken torchvision and without timm.
BREAK = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        if name.partition(".")[0] == "timm":
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Broken())
from bsa_vision.cli import main as cli
cli.main({arguments})
"""


def run(capsys, line: str) -> tuple[int, str, str]:
    """Run `bsa-vision line`; return the exit code, standard output and standard error."""
    with pytest.raises(SystemExit) as left:
        main.main(line.split())
    return left.value.code or 0, *capsys.readouterr()


class TestDoctor:
    def test_findings(self):
        found = {finding.name: finding for finding in doctor.doctor()}
        assert found["torch"].detail == torch.__version__
        assert set(BACKENDS) <= set(found)
        assert found["gather"].state == found["reference"].state == doctor.OK
        if not torch.cuda.is_available():
            assert found["kernel"].state == found["GPU"].state == doctor.UNAVAILABLE
            assert found["kernel"].detail == "needs a CUDA device"  # there are no tensors to name
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
        assert kinds == sorted(kinds, key=["package", "machine", "backend", "library"].index)

    def test_details_are_not_parsed_as_markup(self, capsys, monkeypatch):
        found = [doctor.Finding("library", "timm", doctor.BROKEN, "[Errno 2] no such file")]
        monkeypatch.setattr("bsa_vision.cli.show.doctor", lambda: found)
        code, out, _ = run(capsys, "doctor")
        assert code == 1
        assert "[Errno 2] no such file" in out

    @pytest.mark.slow
    def test_with_torchvision_broken(self):
        """Broken libraries give exit code 1; neither they nor missing ones affect other rows."""
        result = subprocess.run(
            [sys.executable, "-c", BREAK.format(arguments=["doctor", "--json"])],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert result.returncode == 1, result.stderr
        found = {finding["name"]: finding for finding in json.loads(result.stdout)}
        assert found["torchvision"]["state"] == doctor.BROKEN
        assert (
            "RuntimeError: operator torchvision::nms does not exist"
            in found["torchvision"]["detail"]
        )
        assert found["timm"]["state"] == doctor.ABSENT
        assert found["gather"]["state"] == doctor.OK
        table = subprocess.run(
            [sys.executable, "-c", BREAK.format(arguments=["doctor"])],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert "torchvision does not match torch" in table.stdout
        assert table.stdout.count("uninstall torchvision") == 1

    def test_models_are_imported_and_the_cause_of_errors_is_shown(self, monkeypatch):
        """timm with a mismatched torchvision breaks DINOv3, but not `import transformers`."""
        real = doctor.importlib.import_module

        class Transformers:
            def __getattr__(self, name):
                if name != "DINOv3ViTModel":
                    return object
                try:
                    raise RuntimeError("operator torchvision::nms does not exist")
                except RuntimeError as error:
                    raise ModuleNotFoundError(f"Could not import module {name!r}.") from error

        monkeypatch.setattr(
            doctor.importlib,
            "import_module",
            lambda name: Transformers() if name == "transformers" else real(name),
        )
        found = doctor._library("transformers")
        assert found.state == doctor.BROKEN
        assert (
            "DINOv3ViTModel: RuntimeError: operator torchvision::nms does not exist" in found.detail
        )
        assert "Install the torchvision built for this torch" in doctor.advice(found)
        assert "Reinstall a version that matches torch" in doctor.advice(
            doctor.Finding("library", "timm", doctor.BROKEN, "1.0: OSError: x")
        )

    def test_sources_that_shadow_an_installation(self, tmp_path, monkeypatch):
        installed = tmp_path / "bsa_vision"
        installed.mkdir()
        (installed / "__init__.py").touch()

        class Distribution:
            def locate_file(self, name):
                return tmp_path / name

        assert doctor._package().state == doctor.OK
        assert doctor._package().detail == f"{version('bsa-vision')}, {ROOT / 'bsa_vision'}"
        monkeypatch.setattr(doctor, "distribution", lambda name: Distribution())
        found = doctor._package()
        assert found.state == doctor.SHADOWED
        assert str(installed) in found.detail
        assert "run from another folder" in found.detail


class TestMasks:
    def test_text(self, capsys):
        code, out, _ = run(capsys, "masks local:8 --grid 32x48 --prefix-tokens 5")
        layout = TokenLayout((32, 48), num_prefix_tokens=5, order="tile")
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
        code, out, _ = run(
            capsys, f"masks local:8 --grid 32x32 --query 3x4 --png {tmp_path}/new/view.png"
        )
        assert code == 0
        assert "picture: " in out
        with Image.open(tmp_path / "new" / "view.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("masks nope", "masks: pattern 'nope': allowed are random, local"),
            ("masks local --grid 3x", "allowed are grids such as 48x80"),
            ("masks local --order spiral", "--order 'spiral': allowed are 'raster', 'tile'"),
            (
                "masks local --grid 8x8 --query 9x1 --png out/x.png",
                "patch (9, 1) lies outside the grid",
            ),
            ("masks local --query 9", "--query '9': expected a patch, ROWxCOLUMN"),
            ("masks local --query axb", "--query 'axb': expected a patch, ROWxCOLUMN"),
            ("masks local --block-size 0", "Invalid value for '--block-size'"),
        ],
    )
    def test_wrong_input(self, capsys, line, message):
        code, out, err = run(capsys, line)
        assert code == 2
        assert message in out + err


class TestDescribe:
    def test_sam_with_a_pattern(self, capsys):
        code, out, _ = run(
            capsys, "describe sam:vit_b --random --pattern local:8 --dense-heads 2 --image-size 512"
        )
        assert code == 0
        assert "2 x dense, 10 x local_window(radius=8)" in out
        assert "sam at 512 x 512 px: sparsity in the global layers can gain at most" in out

    def test_json(self, capsys):
        code, out, _ = run(
            capsys,
            "describe timm:vit_tiny_patch16_224 --random --image-size 448 "
            "--pattern random_blocks:0.5 --json",
        )
        data = json.loads(out)
        assert code == 0
        assert len(data["layers"]) == 12
        assert data["layers"][0]["patterns"] == ["random_blocks(sparsity=0.5)"] * 3
        assert 1 < data["gain"] < data["ceiling"]
        assert 0 < data["sparsity"] < 1

    def test_a_plan(self, capsys, tmp_path):
        import bsa_vision as bsa

        folder = save(tmp_path)
        bsa.uniform_plan(models.make("dinov3"), "axial", block_size=16).save(tmp_path / "plan.json")
        code, out, _ = run(capsys, f"describe transformers:{folder} --plan {tmp_path}/plan.json")
        assert code == 0
        assert "axial()" in out

    def test_without_a_pattern(self, capsys):
        code, out, _ = run(capsys, "describe tests.helpers.models:dinov3")
        assert code == 0
        assert "sparsity can gain at most" in out

    @pytest.mark.slow
    def test_with_torchvision_broken(self):
        arguments = ["describe", "sam:vit_b", "--random", "--image-size", "256"]
        result = subprocess.run(
            [sys.executable, "-c", BREAK.format(arguments=arguments)],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert result.returncode == 0, result.stderr
        assert "sam at 256 x 256 px" in result.stdout

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (
                "resnet",
                "model 'resnet': allowed are timm:NAME, transformers:NAME-OR-FOLDER, sam:vit_b",
            ),
            ("timm:vit_tinny_patch16 --random", "nearest are vit_tiny_patch16"),
            (
                "timm:resnet18 --random",
                "ResNet has no supported attention layer (found: none)",
            ),
            ("transformers:no/such/folder", "gave "),
            ("sam:vit_x --random", "allowed are vit_b, vit_l, vit_h"),
            ("sam:vit_b", "with no checkpoint: one of the two is needed"),
            ("sam:vit_b --checkpoint nowhere.pth", "nowhere.pth"),
            ("tests.helpers.models:dinov3 --checkpoint a.pth", "it belongs to sam:"),
            ("tests.helpers.models:nothing", "gave AttributeError"),
            (
                "tests.helpers.models:dinov3 --pattern local --plan p.json",
                "--pattern and --plan are both given",
            ),
            ("tests.helpers.models:dinov3 --pattern nope", "allowed are random, local"),
            ("tests.helpers.models:dinov3 --pattern windw:8", "nearest are window"),
            (
                "tests.helpers.models:dinov3 --pattern local:8.5",
                "radius=8.5: expected an integer",
            ),
            (
                "tests.helpers.models:dinov3 --image-size 65",
                "both sides must be multiples of the patch size (8, 8)",
            ),
        ],
    )
    def test_wrong_input(self, capsys, line, message):
        code, _, err = run(capsys, f"describe {line}")
        assert code == 2
        assert message in err


# Millions of parameters, as published.
SIZES = {
    "facebook/dinov2-small": 22.06,
    "facebook/dinov2-giant": 1136.48,
    "facebook/dinov2-with-registers-base": 86.58,
    "facebook/dinov3-vits16-pretrain-lvd1689m": 21.60,
    "facebook/dinov3-vits16plus-pretrain-lvd1689m": 28.69,
    "facebook/dinov3-vitl16-pretrain-lvd1689m": 303.13,
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": 840.59,
    "facebook/dinov3-vit7b16-pretrain-lvd1689m": 6716.04,
    "google/vit-base-patch16-224": 86.39,
    "google/vit-huge-patch14-224-in21k": 632.40,
    "openai/clip-vit-base-patch32": 151.28,
    "openai/clip-vit-base-patch16": 149.62,
    "openai/clip-vit-large-patch14": 427.62,
    "openai/clip-vit-large-patch14-336": 427.94,
    "google/siglip-base-patch16-224": 203.16,
    "google/siglip-large-patch16-256": 652.15,
    "google/siglip-so400m-patch14-384": 877.96,
    "facebook/sam-vit-base": 93.74,
    "facebook/sam-vit-large": 312.34,
    "facebook/sam-vit-huge": 641.09,
}


class TestLoading:
    @pytest.fixture
    def offline(self, monkeypatch):
        def refuse(*_):
            raise OSError("no network here")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)

    @pytest.mark.parametrize("name", hub_configs.CONFIGS)
    def test_well_known_names_need_no_network(self, name, offline):
        with torch.device("meta"):
            model = by_name.load(f"transformers:{name}", random=True)
        assert inspect(model).layers
        if name in SIZES:
            assert sum(x.numel() for x in model.parameters()) == pytest.approx(
                SIZES[name] * 1e6, rel=3e-4
            )

    def test_sizes_belong_to_known_names(self):
        assert set(SIZES) <= set(hub_configs.CONFIGS)

    def test_other_names_need_the_network(self, monkeypatch):
        import transformers

        def refuse(*_):
            raise OSError("no network here")

        for kind in (transformers.AutoConfig, transformers.AutoModel):
            monkeypatch.setattr(kind, "from_pretrained", refuse)
        message = (
            r"its configuration, which is not built in, must be fetched: .*config\.json.*"
            r"nearest .*facebook/dinov2-base"
        )
        with pytest.raises(ValueError, match=message):
            by_name.load("transformers:facebook/dinov2-bas", random=True)
        with pytest.raises(ValueError, match="no network here; its weights must be fetched"):
            by_name.load("transformers:facebook/dinov2-base")

    def test_transformers_from_a_folder(self, tmp_path):
        """Load a folder with its weights, and only its configuration."""
        folder = save(tmp_path)
        expected = models.make("dinov3")
        loaded, fresh = (
            by_name.load(f"transformers:{folder}"),
            by_name.load(f"transformers:{folder}", random=True),
        )
        with torch.no_grad():
            out = models.features(expected, models.image())
            assert torch.equal(models.features(loaded, models.image()), out)
            assert not torch.equal(models.features(fresh, models.image()), out)
        assert not loaded.training

    def test_sam_with_a_checkpoint(self, tmp_path):
        from bsa_vision.models.encoder import SAM, create_encoder

        torch.manual_seed(0)
        encoder = create_encoder(**SAM["vit_b"], image_size=128)
        torch.save(
            {f"image_encoder.{key}": value for key, value in encoder.state_dict().items()},
            tmp_path / "sam.pth",
        )
        loaded = by_name.load("sam:vit_b", checkpoint=tmp_path / "sam.pth", image_size=128)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), encoder.parameters()))


def save(folder: Path) -> Path:
    models.make("dinov3").save_pretrained(folder / "model")
    return folder / "model"
