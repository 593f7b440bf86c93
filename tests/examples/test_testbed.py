"""The testbed: scenes with right answers, a model that learns, figures that can be trusted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bsa_vision as bsa
from bsa_vision.masks import TokenLayout
from bsa_vision.models.blocks import rotary_angles, rotate
from bsa_vision.models.encoder import create_encoder
from examples.testbed import evaluate, heads, scenes, train, tuned
from examples.testbed.model import SHIPPED, Size, Testbed, load, save, untrained
from examples.testbed.observe import block_mass, probabilities
from examples.testbed.scenes import EASY, HARD, SHIFTED

ROOT = Path(__file__).parents[2]
SMALL = Size(depth=2, dim=64, heads=2, grid=8, stem=16)


def small(seed=0):
    """A small model with weights wide enough that attention is far from uniform."""
    model = untrained(SMALL, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "names" not in name:
                parameter.normal_(0, (1.5 if "qkv" in name else 0.7) * parameter.shape[-1] ** -0.5)
    return model


def small_batch(count=2, size=64):
    batch = scenes.make(range(count), size, HARD)
    return batch.images, batch.click


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


class TestScenes:
    def test_a_scene_follows_from_its_seed(self):
        whole = scenes.make(range(10, 16), 64, HARD)
        again = scenes.make(range(10, 16), 64, HARD)
        assert torch.equal(whole.images, again.images)
        parts = [scenes.make(seeds, 64, HARD) for seeds in ([10], range(11, 14), [14, 15])]
        assert torch.allclose(torch.cat([part.images for part in parts]), whole.images, atol=1e-5)
        assert torch.equal(torch.cat([part.click for part in parts]), whole.click)
        differs = torch.cat([part.mask for part in parts]) != whole.mask
        assert differs.float().mean() < 1e-4
        assert not torch.equal(scenes.make([9], 64, HARD).images, whole.images[:1])

    @pytest.mark.parametrize(
        "difficulty", [EASY, train.MEDIUM, HARD, SHIFTED], ids=["easy", "medium", "hard", "shifted"]
    )
    def test_the_answer_is_every_instance_of_the_same_shape_and_texture(self, difficulty):
        """Object by object, in plain Python."""
        batch = scenes.make(range(40), 64, difficulty)
        layout = batch.layout
        several = 0
        for image in range(40):
            clicked = int(layout.clicked[image])
            kind = (int(layout.shape[image, clicked]), int(layout.texture[image, clicked]))
            expected = torch.zeros(64, 64, dtype=torch.bool)
            kinds = []
            for one in range(layout.radius.shape[1]):
                if layout.radius[image, one] == 0:
                    assert not (batch.instance[image] == one).any()
                    continue
                kinds.append((int(layout.shape[image, one]), int(layout.texture[image, one])))
                if kinds[-1] == kind:
                    expected |= batch.instance[image] == one
            assert torch.equal(batch.mask[image], expected)
            assert batch.mask[image].any()
            assert difficulty.objects[0] <= len(kinds) <= difficulty.objects[1]
            assert any(shape == kind[0] and texture != kind[1] for shape, texture in kinds)
            assert any(shape != kind[0] and texture == kind[1] for shape, texture in kinds)
            several += kinds.count(kind) > 1
        assert 10 < several < 40

    @pytest.mark.parametrize(("size", "share"), [(scenes.LOOKS, 1.0), (96, 0.95)])
    def test_the_click_is_on_the_clicked_object(self, size, share):
        """Exactly, where pixel centres are those that clicks are chosen among; elsewhere a thin ring may round away from it."""
        batch = scenes.make(range(100), size, HARD)
        column, row = (batch.click * size).long().unbind(1)
        on = batch.instance[torch.arange(100), row, column]
        assert (on == batch.layout.clicked).float().mean() >= share
        assert batch.mask[torch.arange(100), row, column].float().mean() >= share

    def test_matching_instances_lie_far_apart(self):
        layout = scenes.draw(range(100), HARD)
        far = []
        for answers, centre in zip(layout.answers, layout.centre):
            if answers.sum() > 1:
                far.append(torch.pdist(centre[answers]).max().item())
        assert len(far) > 30
        assert sum(far) / len(far) > 0.4

    @pytest.mark.parametrize("difficulty", [EASY, HARD], ids=["easy", "hard"])
    def test_any_resolution_shows_the_same(self, difficulty):
        coarse, fine = (scenes.make(range(8), size, difficulty) for size in (96, 192))
        assert torch.equal(coarse.click, fine.click)
        shrunk = F.avg_pool2d(fine.images, 2)
        assert (shrunk - coarse.images).abs().mean() < 0.02
        assert (shrunk - coarse.images.flip(0)).abs().mean() > 0.1  # other scenes do differ
        share = F.avg_pool2d(fine.mask[:, None].float(), 2)[:, 0]
        assert ((share > 0.5) != coarse.mask).float().mean() < 0.01

    @pytest.mark.parametrize("name", scenes.SHAPES)
    def test_distances_have_the_right_sign(self, name):
        """The middle of a shape is inside (of a ring: outside), far away is outside, and REACH is far enough."""
        angle = torch.linspace(0, 2 * math.pi, 721)
        x, y = angle.cos(), angle.sin()
        shape = scenes.SHAPES[name]
        assert (shape(scenes.REACH * x, scenes.REACH * y) > 0).all()
        assert (shape(0.01 * x, 0.01 * y) < 0).all() == (name != "ring")
        area = (
            shape(*torch.meshgrid(*[torch.linspace(-1.2, 1.2, 241)] * 2, indexing="ij")) < 0
        ).float().mean() * 2.4**2
        assert 1.0 < area < 2.7

    def test_textures_alternate(self):
        line = torch.linspace(0, 8, 400)
        u, v = torch.meshgrid(line, line, indexing="ij")
        for name, texture in scenes.TEXTURES.items():
            if texture is None:
                continue
            value = texture(u, v)
            assert 0 <= value.min() <= value.max() <= 1
            assert (value.std() > 0.2) == (name != "plain"), name

    def test_shifted_scenes_are_other_scenes(self):
        assert set(SHIFTED.textures) - set(HARD.textures)
        assert SHIFTED.objects[0] > HARD.objects[1]
        assert scenes.held_out(3)[0] > 2**32 * 100  # far from what any training seed gives


class TestRope:
    def test_is_a_rotation_written_by_hand(self):
        grid, head_dim, start = (3, 5), 16, 2
        x = torch.randn(2, 3, start + 15, head_dim, dtype=torch.float64)
        out = rotate(x, rotary_angles(grid, head_dim, (0.5, 8.0), start, torch.device("cpu")))
        assert torch.equal(out[:, :, :start], x[:, :, :start])
        for row in range(grid[0]):
            for column in range(grid[1]):
                token = start + row * grid[1] + column
                place = (2 * row + 1) / grid[0] - 1, (2 * column + 1) / grid[1] - 1
                for channel in range(head_dim // 2):
                    axis, index = divmod(channel, head_dim // 4)
                    period = 0.5 * 16 ** (index / (head_dim // 4))
                    turn = complex(
                        math.cos(2 * math.pi * place[axis] / period),
                        math.sin(2 * math.pi * place[axis] / period),
                    )
                    a, b = (
                        x[0, 1, token, channel].item(),
                        x[0, 1, token, channel + head_dim // 2].item(),
                    )
                    wanted = complex(a, b) * turn
                    assert out[0, 1, token, channel].item() == pytest.approx(wanted.real, abs=1e-5)
                    assert out[0, 1, token, channel + head_dim // 2].item() == pytest.approx(
                        wanted.imag, abs=1e-5
                    )

    def test_true_is_dinov3s(self):
        from transformers import DINOv3ViTConfig
        from transformers.models.dinov3_vit.modeling_dinov3_vit import (
            DINOv3ViTRopePositionEmbedding,
            apply_rotary_pos_emb,
        )

        config = DINOv3ViTConfig(hidden_size=64, num_attention_heads=2, patch_size=8)
        angles = DINOv3ViTRopePositionEmbedding(config).eval()(torch.zeros(1, 3, 48, 64))
        q = torch.randn(1, 2, 3 + 48, 32)
        encoder = create_encoder(
            1, 64, 2, rel_pos=False, rope=True, image_size=64, patch_size=8, num_special=3
        )
        ours = rotate(q, encoder._rotation((6, 8), q.device))
        assert torch.allclose(ours, apply_rotary_pos_emb(q, q, *angles)[0], atol=1e-5)

    def test_positions_matter_and_checkpointing_keeps_them(self):
        torch.manual_seed(0)
        options = dict(image_size=64, patch_size=8, out_channels=None, rel_pos=False)
        encoder = create_encoder(2, 32, 2, rope=True, **options)
        assert encoder.pos_embed is None
        with torch.no_grad():
            for parameter in encoder.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.5)
        pixels = torch.randn(1, 3, 32, 64)
        turned = (
            pixels.unflatten(3, (8, 8)).flip(3).flatten(3)
        )  # the same patches, columns in reverse
        out, other = encoder(pixels), encoder(turned).unflatten(1, (4, 8)).flip(2).flatten(1, 2)
        assert relative(other, out) > 1e-3
        encoder.gradient_checkpointing = True
        assert torch.equal(encoder(pixels), out)
        assert len(list(encoder.load_checkpoint(encoder.state_dict()).state_dict())) == len(
            encoder.state_dict()
        )

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(rope=True), r"rope=\(1\.0, 100\.0\) with rel_pos=True.*set rel_pos=False"),
            (dict(rope=True, rel_pos=False, global_attn_indexes=(1,)), r"some windowed layers"),
            (dict(rope=True, rel_pos=False, dim=36, heads=2), r"head dim of 18"),
            (dict(rope=(2, 1), rel_pos=False), r"rope=\(2, 1\): expected True, False or"),
            (dict(rope=3, rel_pos=False), r"rope=3: expected True, False or"),
        ],
    )
    def test_bad_input(self, options, message):
        with pytest.raises(ValueError, match=message):
            create_encoder(**{**dict(depth=2, dim=32, heads=2), **options})

    def test_special_tokens_of_the_caller(self):
        encoder = create_encoder(
            1,
            32,
            2,
            rel_pos=False,
            rope=True,
            image_size=64,
            patch_size=8,
            num_special=2,
            out_channels=None,
        )
        pixels, special = torch.randn(3, 3, 64, 64), torch.randn(3, 2, 32)
        with torch.no_grad():
            plain = encoder(pixels)
            assert torch.equal(encoder(pixels, special=torch.zeros_like(special)), plain)
            assert relative(encoder(pixels, special=special)[:, :2], plain[:, :2]) > 0.1
            encoder.special_tokens.zero_()
            assert torch.allclose(
                encoder(pixels[1:2], special=special[1:2]),
                encoder(pixels, special=special)[1:2],
                atol=1e-5,
            )
        for wrong in (special[:, :1], special[:2]):
            with pytest.raises(
                ValueError, match=r"expected \(3, 2, 32\), \(images, num_special, dim\)"
            ):
                encoder(pixels, special=wrong)


class TestModel:
    def test_what_a_plan_sees(self):
        spec = bsa.inspect(untrained())
        assert (
            spec.family,
            spec.grid,
            spec.patch_size,
            spec.num_prefix_tokens,
            spec.num_suffix_tokens,
        ) == (
            "vit",
            (32, 32),
            (8, 8),
            1,
            0,
        )
        assert len(spec.layers) >= 4
        assert all(
            layer.heads >= 4 and layer.head_dim >= 32 and not layer.window for layer in spec.layers
        )

    @pytest.mark.parametrize("size", [(64, 64), (48, 80)])
    def test_any_resolution(self, size):
        model = small()
        logits = model(torch.rand(2, 3, *size), torch.rand(2, 2))
        assert logits.shape == (2, size[0] // 2, size[1] // 2)

    def test_the_click_decides(self):
        model, (images, click) = small(), small_batch()
        with torch.no_grad():
            assert relative(model(images, 1 - click), model(images, click)) > 1e-3

    def test_a_dense_plan_changes_nothing(self):
        model, batch = small(), small_batch()
        with torch.no_grad():
            dense = model(*batch)
            assert relative(bsa.sparsify_(model, bsa.dense_plan(model))(*batch), dense) < 1e-5
            assert torch.equal(bsa.restore_(model)(*batch), dense)

    def test_sparse_is_masked_arithmetic(self):
        model, batch = small(), small_batch()
        plan = bsa.uniform_plan(model, "random_blocks", sparsity=0.6, tile=(2, 4), block_size=8)
        with torch.no_grad():
            dense = model(*batch)
            masked = bsa.sparsify_(model, plan, backend="reference")(*batch)
            bsa.restore_(model)
            assert relative(bsa.sparsify_(model, plan)(*batch), masked) < 1e-5
            assert relative(masked, dense) > 1e-2

    def test_compiled(self):
        model, batch = small(), small_batch()
        bsa.sparsify_(
            model, bsa.uniform_plan(model, "local_window", radius=1, tile=(2, 4), block_size=8)
        )
        with torch.no_grad():
            expected = model(*batch)
            assert (
                relative(torch.compile(model, backend="eager", fullgraph=True)(*batch), expected)
                < 1e-5
            )

    def test_checkpoint_round_trip(self, tmp_path):
        model, batch = small(), small_batch()
        save(model, tmp_path / "m.safetensors", {"command": "x", "seed": "3"})
        again = load(tmp_path / "m.safetensors")
        assert again.notes == {"command": "x", "seed": "3"}
        assert again.size == SMALL
        with torch.no_grad():
            assert torch.equal(again(*batch), model(*batch))

    def test_a_file_of_something_else(self, tmp_path):
        from safetensors.torch import save_file

        save_file({"x": torch.ones(1)}, str(tmp_path / "x.safetensors"))
        with pytest.raises(ValueError, match=r"no 'size' in its header.*pass such a file"):
            load(tmp_path / "x.safetensors")


class TestTraining:
    RECIPE = (train.Stage(16, 8, 4, EASY), train.Stage(16, 8, 4, train.MEDIUM))

    def training(self, **settings):
        torch.manual_seed(0)
        return train.Training(Testbed(SMALL), self.RECIPE, train.Settings(warmup=8, **settings))

    def test_loss_falls_on_a_batch(self):
        torch.manual_seed(0)
        loss = train.Loss(Testbed(SMALL), naming=0.5)
        batch = scenes.make(range(4), 64, EASY)
        optimizer = torch.optim.AdamW(loss.parameters(), 3e-3)
        losses = []
        for _ in range(30):
            value, _ = loss(batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
        assert losses[-1] < 0.7 * losses[0]
        assert all(parameter.grad is not None for parameter in loss.parameters())

    def test_resumed_is_as_straight_on(self, tmp_path):
        straight, first, second = self.training(), self.training(), self.training(seed=0)
        while straight.seen < straight.total:
            straight.step()
        while first.seen < first.total // 2:
            first.step()
        torch.save(first.state_dict(), tmp_path / "last.pt")
        second.load_state_dict(torch.load(tmp_path / "last.pt", weights_only=True))
        while second.seen < second.total:
            second.step()
        for a, b in zip(straight.average.parameters(), second.average.parameters()):
            assert torch.allclose(a, b, atol=1e-6)
        assert any(
            not torch.equal(a, b)
            for a, b in zip(straight.model.parameters(), first.model.parameters())
        )

    def test_a_run_writes_what_made_it_and_goes_on(self, tmp_path, monkeypatch):
        monkeypatch.setattr(train, "LOG_EVERY", 8)
        monkeypatch.setattr(train, "SAVE_EVERY", 8)
        monkeypatch.setattr(train, "held_out_iou", lambda *a, **k: 0.5)
        train.run(self.training(), tmp_path, "python train.py")
        notes = load(tmp_path / "testbed.safetensors").notes
        assert notes["command"] == "python train.py"
        assert notes["images"] == "32"
        assert {"seed", "device", "versions", "seconds", "recipe"} <= set(notes)
        lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert [line["images"] for line in lines] == [8, 16, 24, 32]
        train.run(self.training(), tmp_path, "again")  # already at the end: nothing to do
        assert load(tmp_path / "testbed.safetensors").notes["command"] == "python train.py"

    def test_processes_share_a_batch(self):
        """Two ranks take every scene of a batch between them, none twice."""
        first, second = self.training(), self.training()
        taken = []
        for rank, one in enumerate((first, second)):
            one.rank, one.world = rank, 2
            taken += one.seeds(4)
        assert sorted(taken) == [0, 1, 2, 3]

    def test_names_of_patches(self):
        batch = scenes.make(range(3), 64, HARD)
        shape, texture = train._on_patches(batch, 8)
        for image in range(3):
            seen = batch.instance[image, 20, 36]  # the middle of patch (2, 4)
            wanted = (0, 0)
            if seen >= 0:
                names = (
                    HARD.shapes[batch.layout.shape[image, seen]],
                    HARD.textures[batch.layout.texture[image, seen]],
                )
                wanted = (
                    list(scenes.SHAPES).index(names[0]) + 1,
                    list(scenes.TEXTURES).index(names[1]) + 1,
                )
            assert (shape[image, 2, 4], texture[image, 2, 4]) == wanted


class TestObserving:
    def test_probabilities_give_the_attention(self):
        """softmax(q k) v of what is seen, projected, is what the layer returns."""
        model, batch, seen, outs = small(), small_batch(), [], []
        attention = model.encoder.blocks[1].attn
        attention.register_forward_hook(lambda module, args, out: outs.append(out))
        with torch.no_grad(), bsa.observe(model, seen.append):
            model(*batch)
        assert [one.layer.index for one in seen] == [0, 1]
        mixed = [probabilities(one.q, one.k) @ seen[1].v for one in seen]
        first, second = (attention.proj(x.transpose(1, 2).flatten(2)) for x in mixed)
        assert relative(second, outs[0]) < 1e-5
        assert relative(first, outs[0]) > 1e-2

    def test_block_mass_is_a_sum_over_tokens(self):
        layout = TokenLayout((6, 10), num_prefix_tokens=1, order="tile", tile=(2, 4), block_size=8)
        probs = torch.rand(1, 2, 61, 61).softmax(-1)
        mass = block_mass(probs, layout)
        order = layout.permutation
        packed = probs[0, 1][order][:, order]
        assert mass.shape == (1, 2, 8, 8)
        assert mass[0, 1, 2, 5] == pytest.approx(packed[16:24, 40:48].sum().item(), rel=1e-4)
        assert mass[0, 1, 7, 7] == pytest.approx(packed[56:, 56:].sum().item(), rel=1e-4)
        assert mass.sum() == pytest.approx(2 * 61, rel=1e-4)
        fifth = block_mass(probs[:, :, ::5], layout, every=5)
        rows = torch.tensor([token % 5 == 0 for token in order[16:24].tolist()])
        assert fifth[0, 1, 2, 5] == pytest.approx(packed[16:24, 40:48][rows].sum().item(), rel=1e-4)

    def test_heads_that_are_known(self):
        """Planted: uniform attention, and attention to oneself."""
        layout = TokenLayout((16, 16), num_prefix_tokens=1, order="tile", tile=(2, 4), block_size=8)
        uniform, own = torch.full((257, 257), 1 / 257), torch.eye(257)
        alike = torch.eye(256, dtype=torch.bool)
        spread, self_ = heads._statistics(torch.stack([uniform, own]), layout, alike).tolist()
        assert spread[0] == pytest.approx(math.log(257), abs=1e-3)
        assert spread[1] == pytest.approx(0.953, abs=0.01)
        assert spread[4] == pytest.approx(1, abs=1e-3)
        assert self_[0] == pytest.approx(0, abs=1e-3)
        assert self_[1:4] == pytest.approx([1 / 257, 1 / 33, 1])
        assert self_[4] == pytest.approx(256)
        kinds = [heads.Head(0, 0, *values).kind for values in (spread, self_)]
        assert kinds == ["diffuse", "local"]


class TestEvaluation:
    def test_bootstrap(self):
        values = torch.randn(300, generator=torch.Generator().manual_seed(0)) + 3
        interval = evaluate.bootstrap(values)
        assert interval.low < interval.mean < interval.high
        assert interval.mean == pytest.approx(values.mean().item(), abs=1e-5)
        assert interval.high - interval.low == pytest.approx(
            2 * 1.96 * values.std().item() / 300**0.5, rel=0.15
        )
        assert evaluate.bootstrap(torch.ones(5)) == evaluate.Interval(1.0, 1.0, 1.0)

    def test_iou(self):
        a = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 0, 0]], [[0, 0, 0, 0]]]).bool()
        b = torch.tensor([[[0, 1, 1, 0]], [[0, 0, 0, 0]], [[1, 0, 0, 0]]]).bool()
        assert train.iou(a, b).tolist() == pytest.approx([1 / 3, 1, 0])

    def test_outline(self):
        mask = torch.zeros(1, 100, 100, dtype=torch.bool)
        mask[0, 20:60, 30:80] = True
        found = evaluate.outline(mask)[0]  # 2 % of the diagonal: 3 pixels
        expected = mask[0].clone()
        expected[23:57, 33:77] = False
        assert torch.equal(found, expected)

    def test_a_dense_plan_costs_nothing_and_a_random_one_keeps_what_it_says(self):
        model = small()
        random = bsa.uniform_plan(model, "random_blocks", sparsity=0.5, tile=(2, 4), block_size=8)
        dense, same, other = evaluate.evaluate(
            model, {"same": bsa.dense_plan(model), "random": random}, range(6)
        )
        assert (same.cost.mean, same.agreement.mean, same.kept_mass.mean, same.sparsity) == (
            0,
            1,
            1,
            0,
        )
        assert same.feature_error.mean < 1e-5
        assert other.feature_error.mean > 1e-2
        assert 0.3 < other.sparsity < 0.5  # special blocks are kept
        assert 0.3 < other.kept_mass.mean < 1
        assert len(dense.per_scene["iou"]) == 6
        assert dense.iou.mean == pytest.approx(sum(dense.per_scene["iou"]) / 6, abs=1e-4)

    def test_patterns_by_name(self):
        spec = bsa.inspect(untrained())
        for text, order in (
            ("nearest:0.5@raster", "raster"),
            ("nearest:0.5", "tile"),
            ("random_blocks:0.5", "tile"),
        ):
            plan = evaluate.pattern_plan(text, spec)
            layout, kept = plan.layout(spec), evaluate.kept_blocks(plan, spec)
            assert (layout.order, layout.num_blocks) == (order, 33)
            assert 0.40 < 1 - kept.float().mean() <= 0.5
        random = evaluate.kept_blocks(evaluate.pattern_plan("random_blocks:0.5", spec), spec)[0]
        assert not torch.equal(random[0, 0], random[0, 1])  # every head its own
        assert not torch.equal(random[0, 0], random[1, 0])

    def test_patterns_that_follow_the_click(self):
        """Each scene gets blocks of its own, and the model computes those."""
        model = small()
        plan = bsa.uniform_plan(model, "prompt_region", radius=2, near=1, tile=(2, 4), block_size=8)
        batch = scenes.make(range(3), 64, HARD)
        kept = evaluate.kept_blocks(plan, bsa.inspect(model), evaluate.prompts(batch))
        assert kept.shape[:3] == (3, 2, 2)
        assert not torch.equal(kept[0], kept[1])
        row = evaluate.evaluate(model, {"click": plan}, range(3))[1]
        assert row.sparsity == pytest.approx(1 - kept.float().mean().item(), abs=1e-6)
        assert row.feature_error.mean > 1e-3

    def test_the_command(self, tmp_path):
        """As a user types it, with a plan file and a pattern, to a table and to JSON."""
        save(small(), tmp_path / "m.safetensors", {})
        bsa.uniform_plan(small(), "local_window", radius=1, tile=(2, 4), block_size=8).save(
            tmp_path / "p.json"
        )
        out = tmp_path / "out.json"
        command = [
            sys.executable,
            "examples/testbed/evaluate.py",
            tmp_path / "m.safetensors",
            "--plan",
            tmp_path / "p.json",
        ]
        command += ["--pattern", "random:0.5", "--scenes", "3", "--shifted", "--json", out]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "random:0.5" in done.stdout
        what = json.loads(out.read_text())
        assert [row["name"] for row in what["rows"]] == ["dense", "p.json", "random:0.5"]
        assert what["shifted"] is True
        assert (
            what["rows"][1]["iou"]["low"]
            <= what["rows"][1]["iou"]["mean"]
            <= what["rows"][1]["iou"]["high"]
        )

    def test_the_command_refuses(self):
        command = [sys.executable, "examples/testbed/evaluate.py", "--pattern", "sideways"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert "--pattern 'sideways': allowed are" in done.stderr


class TestShipped:
    def test_beats_random_weights(self):
        model = load()
        size = model.size
        trained, fresh = (
            evaluate.evaluate(one, {}, scenes.held_out(20, seed=7))[0].iou.mean
            for one in (model, untrained(size))
        )
        assert trained > 0.6
        assert fresh < 0.2

    def test_says_what_made_it(self):
        assert SHIPPED.stat().st_size <= 8 * 2**20
        notes = load().notes
        assert {"command", "seed", "device", "seconds", "versions", "images"} <= set(notes)

    def test_heads(self):
        found = heads.measure(load(), scenes.held_out(1), grid=16)
        assert len(found) == load().size.depth * load().size.heads
        assert all(
            0 < head.keys <= 1 and 0 < head.blocks <= 1 and 0 <= head.near <= 1 for head in found
        )

    def test_other_grids(self):
        """Smaller images still work: positions are in normalised coordinates."""
        found = evaluate.evaluate(
            load(), {}, scenes.held_out(10), replace(HARD, clutter=0.2), grid=24
        )[0]
        assert found.iou.mean > 0.4


class TestTuned:
    def test_simpler_plans_skip_as_much_and_no_more(self):
        model = load()
        images = tuned.calibration_scenes(model, 0, 3)
        plan = bsa.tune(
            model, images, sparsity=0.6, target=tuned.encode, order="raster", **tuned.LAYOUT
        )
        spec, most = bsa.inspect(model), plan.report["sparsity"]
        for name, one in tuned.simpler_plans(model, plan, 0):
            kept = evaluate.kept_blocks(one, spec)[0]
            assert most - 0.1 < 1 - kept.float().mean() <= most + 1e-6, name
            # Everybody sees the click's token, wherever the order puts it.
            block = int(one.layout(spec).inverse[0]) // tuned.BLOCK_SIZE
            assert kept[..., block, :].all(), name
            assert kept[..., :, block].all(), name

    def test_calibration_scenes_are_nobody_elses(self):
        model = load()
        first, other = (tuned.calibration_scenes(model, seed, 2)[0][0] for seed in (0, 1))
        held_out = scenes.make(list(scenes.held_out(2)), 256, HARD).images
        assert not torch.equal(first, other)
        assert not torch.equal(first, held_out[:1])

    def test_the_commands(self, capsys, monkeypatch):
        monkeypatch.setattr(tuned, "CALIBRATION", 9)
        monkeypatch.setattr(
            sys, "argv", ["tuned.py", "--seeds", "1", "--scenes", "4", "--sparsity", "0.6"]
        )
        tuned.main()
        out = capsys.readouterr().out
        for name in (
            "tuned",
            "uniform static",
            "local windows",
            "nearest",
            "random",
            "spatial locality",
            "image to prompt",
        ):
            assert name in out
        monkeypatch.setattr(
            sys, "argv", ["tuned.py", "--max-error", "0.2", "--runs", "2", "--scenes", "4"]
        )
        tuned.main()
        assert "in 2 of 2 runs" in capsys.readouterr().out
