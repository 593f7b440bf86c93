"""`bsa_vision.compare`, the command `bsa-vision compare`, and reading of images."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import bsa_vision as bsa
from bsa_vision.adapters.swap.sparse_layer import layers_of
from bsa_vision.cli.options import read_images
from bsa_vision.compare import compare, num_steps
from bsa_vision.models import image_files
from bsa_vision.models.features import features
from tests.adapters import test_torchvision_vit
from tests.cli.test_commands import BREAK, ROOT, run, save
from tests.helpers import models, sam2_models, sam_models, timm_models
from tests.helpers.errors import relative_error

SMALL = dict(tile=(4, 4), block_size=16)
MODELS = {
    "transformers": (lambda: models.make("dinov3"), lambda seed: models.image(96, 64, seed=seed)),
    "timm": (
        lambda: timm_models.make("vit, not fused"),
        lambda seed: timm_models.image(batch=1) + seed,
    ),
    "torchvision": (test_torchvision_vit.make, lambda seed: test_torchvision_vit.image(1) + seed),
    "sam": (
        lambda: sam_models.make("transformers sam"),
        lambda seed: sam_models.image(batch=1) + seed,
    ),
    "sam2": (lambda: sam2_models.make("sam2"), lambda seed: sam2_models.image(batch=1) + seed),
}


@pytest.fixture
def photos(tmp_path):
    """Write two images of sizes that no model has, and a text file."""
    folder = tmp_path / "photos"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name, size in (("a.jpg", (90, 120)), ("b.png", (130, 70))):
        Image.fromarray(draw.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


class TestCompare:
    @pytest.mark.parametrize("name", MODELS)
    def test_against_the_models_own_outputs(self, name):
        make, image = MODELS[name]
        model, images = make(), [image(seed) for seed in (1, 2)]
        plan = bsa.uniform_plan(model, "local_window", radius=1, **SMALL)
        first = bsa.inspect(model).layers[0].name
        with torch.no_grad():
            expected = [features(model, x) for x in images]
            bsa.sparsify_(model, plan)
            out = [features(model, x) for x in images]
        steps = []
        found = compare(model, images, rounds=2, on_step=lambda: steps.append(1))
        assert len(steps) == num_steps(images, 2)
        assert found.errors == pytest.approx(
            [relative_error(a, b) for a, b in zip(out, expected)], rel=1e-4
        )
        assert all(0 < cosine < 1 for cosine in found.cosines)
        assert [layer.name for layer in found.layers] == [
            layer.spec.name for layer in layers_of(model)
        ]
        sparse = [layer for layer in found.layers if layer.sparsity]
        assert all(min(layer.alone) > 1e-3 for layer in sparse)
        if found.layers[0].name == first and found.layers[0].sparsity:  # no earlier errors
            assert found.layers[0].alone == pytest.approx(found.layers[0].so_far, rel=1e-4)
        assert found.layers[-1].alone != pytest.approx(found.layers[-1].so_far, rel=1e-3)
        assert len(found.times["sparse"].seconds) == 2
        assert set(found.memory) == {"dense", "sparse"}
        assert not model.training
        assert "features: error" in str(found)

    def test_a_dense_plan_has_no_error(self):
        model = bsa.sparsify_(models.make("vit"), bsa.dense_plan(models.make("vit")))
        found = compare(model, [models.image()], rounds=1)
        assert found.errors == (0.0,)
        assert {layer.so_far for layer in found.layers} == {(0.0,)}

    def test_one_sparse_layer(self):
        """Only its own `alone` error is above 0, and `so_far` of it and of later layers."""
        model = models.make("vit")
        bsa.sparsify_(model, bsa.uniform_plan(model, "special", layers=[1], block_size=8))
        first, second, third = compare(model, [models.image()], rounds=1).layers
        assert first.alone == first.so_far == (0.0,)
        assert second.alone == pytest.approx(second.so_far, rel=1e-5)
        assert second.alone[0] > 1e-2
        assert third.alone == (0.0,)
        assert third.so_far[0] > 1e-3

    def test_memory_sees_the_matrix(self):
        """Eager attention stores N x N logits, sparse heads do not."""
        model = models.make("vit", attn_implementation="eager")
        bsa.sparsify_(model, bsa.uniform_plan(model, "local_window", radius=1))
        found = compare(model, [torch.randn(1, 3, 512, 512)], rounds=1)
        matrix = 4 * 4097**2 * 4
        assert found.memory["dense"] > matrix
        assert found.memory["sparse"] < matrix / 2

    def test_memory_again_and_again(self):
        """Memory that the C library keeps from earlier runs does not hide later peaks."""
        model = models.make("vit", attn_implementation="eager")
        bsa.sparsify_(model, bsa.uniform_plan(model, "local_window", radius=1))
        peaks = [
            compare(model, [torch.randn(1, 3, 256, 256)], rounds=1).memory["dense"]
            for _ in range(3)
        ]
        assert min(peaks) > 4 * 1025**2 * 4  # N x N float32 logits of four heads, 17 MB

    def test_every_modules_mode_comes_back(self):
        model = models.make("vit").train()
        model.layers[0].eval()
        modes = [module.training for module in model.modules()]
        bsa.sparsify_(model, bsa.uniform_plan(model, "axial", block_size=8))
        compare(model, [models.image()], rounds=1)
        assert [module.training for module in model.modules()] == modes

    def test_only_what_ran_dense_meanwhile_is_counted(self):
        model = models.make("vit")
        bsa.sparsify_(model, bsa.uniform_plan(model, "axial", block_size=8))
        with pytest.warns(UserWarning, match="an attention mask was passed"):
            models.features(model, models.image(), attention_mask=torch.arange(65)[None] < 60)
        assert compare(model, [models.image()], rounds=1).fallbacks == 0

    def test_alone_is_for_the_input_the_layer_got(self):
        """A hook that changes the layer's input changes both runs."""
        model = models.make("vit")
        bsa.sparsify_(model, bsa.uniform_plan(model, "axial", layers=[0], block_size=8))
        attention = next(module for module in model.modules() if "_bsa_layer" in module.__dict__)
        attention.register_forward_pre_hook(
            lambda module, args: (2 * args[0], *args[1:]) if args else None
        )
        first = compare(model, [models.image()], rounds=1).layers[0]
        assert first.alone == pytest.approx(first.so_far, rel=1e-5)

    def test_stages(self):
        """All feature maps of a list count; the first one precedes every sparse block."""
        trunk = sam2_models.make("sam2").trunk
        bsa.sparsify_(trunk, bsa.uniform_plan(trunk, "special", **SMALL))
        assert compare(trunk, [sam2_models.image(batch=1)], rounds=1).errors[0] > 1e-2

    def test_eager_attention_is_compared_too(self):
        """Its modules return attention weights, which hooks could read; compare's hooks do not."""
        found = []
        for attention in ("sdpa", "eager"):
            model = models.make("dinov3", attn_implementation=attention)
            bsa.sparsify_(model, bsa.uniform_plan(model, "axial", tile=(2, 4), block_size=8))
            found.append(compare(model, [models.image()], rounds=1))
        sdpa, eager = found
        assert eager.fallbacks == 0
        assert eager.errors[0] == pytest.approx(sdpa.errors[0], rel=1e-3)
        assert eager.errors[0] > 0.01
        for one, other in zip(eager.layers, sdpa.layers, strict=True):
            assert one.alone[0] == pytest.approx(other.alone[0], rel=1e-3)

    def test_wrong_input(self):
        model = models.make("vit")
        with pytest.raises(ValueError, match="no sparse heads"):
            compare(model, [models.image()])
        bsa.sparsify_(model, bsa.uniform_plan(model, "axial", block_size=8))
        with bsa.dense(model), pytest.raises(ValueError, match=r"is inside bsa\.dense"):
            compare(model, [models.image()])
        for images in ([], [models.image(), models.image(72, 40)], [models.image(batch=2)]):
            with pytest.raises(
                ValueError, match=r"expected at least one, each \(1, 3, h, w\), all of one size"
            ):
                compare(model, images)


class TestFeatures:
    def test_models_of_images_and_texts_give_their_vision_tower(self):
        from tests.adapters.test_vision_towers import two_towers

        model = two_towers("clip")
        with torch.no_grad():
            assert torch.equal(
                features(model, models.image()), models.features(model.vision_model, models.image())
            )

    def test_timms_are_those_before_pooling(self):
        model = timm_models.make("eva, dinov3", global_pool="avg")
        with torch.no_grad():
            assert features(model, timm_models.image()).shape == (2, 149, 48)
            assert model(timm_models.image()).shape == (2, 48)

    def test_the_models_own_size_is_not_interpolated(self):
        from transformers import ViTConfig, ViTModel

        sizes = dict(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
        model = ViTModel(ViTConfig(image_size=(64, 160), patch_size=16, **sizes)).eval()
        pixels = torch.randn(1, 3, 64, 160)
        with torch.no_grad():
            assert torch.equal(features(model, pixels), model(pixels).last_hidden_state)

    def test_a_model_that_wants_more(self):
        with pytest.raises(
            ValueError,
            match=r"Siglip2.* was called with pixels only and raised .*pixel_attention_mask",
        ):
            features(models.make("siglip2"), models.image())

    def test_what_holds_no_tensor(self):
        class Strange(torch.nn.Module):
            def forward(self, pixels):
                return {"masks": None}

        with pytest.raises(ValueError, match="returned a dict: allowed are a tensor"):
            features(Strange(), models.image())


class TestImageFiles:
    def test_what_is_found(self, photos):
        assert [path.name for path in image_files.find([photos])] == ["a.jpg", "b.png"]
        assert image_files.find([photos / "b.png"]) == [photos / "b.png"]

    def test_size_and_values(self, tmp_path):
        """Images are scaled without distortion, cropped to the centre and normalised."""
        wide = np.zeros((40, 120, 3), dtype=np.uint8)
        wide[:, 40:80] = (255, 0, 128)
        Image.fromarray(wide).save(tmp_path / "wide.png")
        out = image_files.read(tmp_path / "wide.png", (40, 40), ((0.5, 0.5, 0.5), (0.25, 0.5, 1.0)))
        assert out.shape == (1, 3, 40, 40)
        assert out[0, :, 20, 20].tolist() == pytest.approx([2.0, -1.0, 128 / 255 - 0.5], abs=1e-6)
        assert image_files.read(tmp_path / "wide.png", (16, 32)).shape == (1, 3, 16, 32)

    def test_what_cannot_be_read_is_said(self, tmp_path):
        Image.fromarray((np.arange(64).reshape(8, 8) * 1000).astype(np.uint16)).save(
            tmp_path / "deep.png"
        )
        with pytest.raises(ValueError, match="has mode I;16, more than 8 bits per channel"):
            image_files.read(tmp_path / "deep.png", (8, 8))
        (tmp_path / "folder.jpg").mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / "real.png")
        assert image_files.find(path for path in [tmp_path]) == [
            tmp_path / "deep.png",
            tmp_path / "real.png",
        ]

    def test_hidden_files_are_none_and_unreadable_ones_are_counted(self, tmp_path, capsys):
        """Hidden files are ignored (macOS adds `._x.jpg` to `x.jpg`), broken files listed."""
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
        for name in ("a.jpg", "B.PNG", "c.png"):
            Image.fromarray(noise).save(tmp_path / name)
        whole = (tmp_path / "c.png").read_bytes()
        (tmp_path / "c.png").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "d.webp").write_bytes(b"")
        (tmp_path / "e.png").write_bytes(whole[:40] + b"????" + whole[44:])
        for name in ("._a.jpg", ".hidden/x.jpg", "Thumbs.db", ".DS_Store", "notes.txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"x")
        found = image_files.find([tmp_path])
        assert [path.name for path in found] == ["B.PNG", "a.jpg", "c.png", "d.webp", "e.png"]
        images, unreadable = image_files.read_all(found, (8, 8))
        assert [path.name for path in images] == ["B.PNG", "a.jpg"]
        for name, text in zip(("c.png", "d.webp", "e.png"), unreadable, strict=True):
            assert name in text
        read, _, _ = read_images(models.make("dinov3"), found, 64)
        assert list(read) == list(images)
        assert capsys.readouterr().err.startswith("skipped 3 of 5 images:")
        with pytest.raises(ValueError, match="none of 3 images can be read; the first"):
            image_files.read_all(found[2:], (8, 8))

    def test_an_empty_path_is_refused(self):
        with pytest.raises(ValueError, match="an image path is empty"):
            image_files.find([""])

    def test_bombs(self, tmp_path, monkeypatch):
        Image.new("RGB", (99, 99)).save(tmp_path / "big.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(ValueError, match="cannot be read"):
            image_files.read(tmp_path / "big.png", (8, 8))

    def test_timms_normalisation(self):
        model = timm_models.make("vit")
        assert image_files.normalisation(model) == image_files.IMAGENET
        model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        assert image_files.normalisation(model)[0] == (0.5, 0.5, 0.5)

    def test_grey_and_turned(self, tmp_path):
        image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(4, 16))
        exif = image.getexif()
        exif[0x0112] = 6  # rotated by 90 degrees
        image.save(tmp_path / "grey.png", exif=exif)
        out = image_files.read(tmp_path / "grey.png", (16, 4), ((0, 0, 0), (1, 1, 1)))
        assert torch.equal(out[0, 0], out[0, 2])
        assert out[0, 0, -1, 0] > out[0, 0, 0, 0]


class TestCommand:
    LINE = "--random --image-size 64 --pattern axial"

    def test_table(self, capsys, photos):
        code, out, err = run(
            capsys, f"compare timm:vit_tiny_patch16_224 {photos} {self.LINE} --rounds 1"
        )
        assert code == 0, err
        assert "2 images of 4 x 4 patches" in out
        assert "blocks.11.attn" in out
        assert "time per image: dense" in out
        assert "RANDOM WEIGHTS" in out
        assert "mean (0.5, 0.5, 0.5)" in out

    def test_a_plan_and_json(self, capsys, photos, tmp_path):
        folder = save(tmp_path)
        plan = bsa.uniform_plan(models.make("dinov3"), "local_window", radius=1, block_size=16)
        plan.save(tmp_path / "plan.json")
        options = f"--plan {tmp_path}/plan.json --rounds 1 --json"
        code, out, _ = run(capsys, f"compare transformers:{folder} {photos}/a.jpg {options}")
        data = json.loads(out)
        assert code == 0
        assert len(data["layers"]) == 3
        assert len(data["errors"]) == 1
        assert data["errors"][0] > 0
        assert data["times"]["sparse"]["ratio"] > 0
        assert data["size"] == [64, 64]

    def test_half_precision_weights(self, capsys, photos, tmp_path):
        models.make("dinov3").half().save_pretrained(tmp_path / "half")
        code, out, err = run(
            capsys, f"compare transformers:{tmp_path}/half {photos} --pattern axial --rounds 1"
        )
        assert code == 0, err
        assert "2 images of 8 x 8 patches" in out

    def test_without_torchvision_and_network(self, photos):
        arguments = [
            "compare",
            "sam:vit_b",
            str(photos),
            *["--random", "--image-size", "128", "--pattern", "local:1", "--rounds", "1"],
        ]
        result = subprocess.run(
            [sys.executable, "-c", BREAK.format(arguments=arguments)],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert result.returncode == 0, result.stderr
        assert "2 images of 8 x 8 patches" in result.stdout

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("tests.helpers.models:dinov3 {photos}", "neither --pattern nor --plan"),
            (
                "tests.helpers.models:dinov3 {photos} --pattern axial --plan p.json",
                "--pattern and --plan are both given",
            ),
            (
                "tests.helpers.models:dinov3 nowhere.jpg --pattern axial",
                "image 'nowhere.jpg': no such file or folder",
            ),
            ("tests.helpers.models:dinov3 {photos}/notes.txt --pattern axial", "cannot be read"),
            ("tests.helpers.models:dinov3 {photos} --plan nowhere.json", "nowhere.json"),
            ("tests.helpers.models:dinov3 {photos} --pattern nope", "allowed are random, local"),
            ("timm:vit_tinny_patch16 {photos} --random --pattern axial", "nearest are vit_tiny"),
            (
                "tests.helpers.models:dinov3 {photos} --pattern axial --image-size 65",
                "multiples of the patch size (8, 8)",
            ),
        ],
    )
    def test_wrong_input(self, capsys, photos, line, message):
        code, _, err = run(capsys, "compare " + line.format(photos=photos))
        assert code == 2
        assert message in err

    def test_an_empty_folder(self, capsys, tmp_path):
        code, _, err = run(
            capsys, f"compare tests.helpers.models:dinov3 {tmp_path} --pattern axial"
        )
        assert code == 2
        assert "no images in" in err
