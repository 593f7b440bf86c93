"""The testbed: its scenes and their answers, the model, its training, and the evaluation."""

from __future__ import annotations

import cmath
import json
import math

import pytest
import torch

import bsa_vision as bsa
from bsa_vision.masks import TokenLayout
from bsa_vision.models.blocks import rotary_angles, rotate
from bsa_vision.models.encoder import create_encoder
from examples.testbed import heads, scenes, train
from examples.testbed.model import Size, Testbed, load, save, untrained
from examples.testbed.observe import block_mass, probabilities
from examples.testbed.scenes import EASY, HARD
from tests.helpers.errors import relative_error

SMALL = Size(depth=2, dim=64, heads=2, grid=8, stem=16)


def small(seed=0):
    """Return a small model with weights so large that attention is far from uniform."""
    model = untrained(SMALL, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "names" not in name:
                parameter.normal_(0, (1.5 if "qkv" in name else 0.7) * parameter.shape[-1] ** -0.5)
    return model


def small_batch(count=2, size=64):
    batch = scenes.make(range(count), size, HARD)
    return batch.images, batch.click


class TestRope:
    def test_matches_a_rotation_of_complex_numbers(self):
        grid, head_dim, start = (3, 5), 16, 2
        x = torch.randn(2, 3, start + 15, head_dim, dtype=torch.float64)
        out = rotate(x, rotary_angles(grid, head_dim, (0.5, 8.0), start, torch.device("cpu")))
        assert torch.equal(out[:, :, :start], x[:, :, :start])
        for row in range(grid[0]):
            for column in range(grid[1]):
                token = start + row * grid[1] + column
                position = (2 * row + 1) / grid[0] - 1, (2 * column + 1) / grid[1] - 1
                for channel in range(head_dim // 2):
                    axis, index = divmod(channel, head_dim // 4)
                    period = 0.5 * 16 ** (index / (head_dim // 4))
                    angle = 2 * math.pi * position[axis] / period
                    pair = slice(channel, None, head_dim // 2)
                    expected = complex(*x[0, 1, token, pair].tolist()) * cmath.rect(1, angle)
                    found = complex(*out[0, 1, token, pair].tolist())
                    assert found == pytest.approx(expected, abs=1e-5)

    def test_true_matches_dinov3(self):
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
        rotated = rotate(q, encoder._rotation((6, 8), q.device))
        assert torch.allclose(rotated, apply_rotary_pos_emb(q, q, *angles)[0], atol=1e-5)

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
        flipped = pixels.unflatten(3, (8, 8)).flip(3).flatten(3)  # columns of patches reversed
        out, other = encoder(pixels), encoder(flipped).unflatten(1, (4, 8)).flip(2).flatten(1, 2)
        assert relative_error(other, out) > 1e-3
        encoder.gradient_checkpointing = True
        assert torch.equal(encoder(pixels), out)
        state = encoder.state_dict()
        assert len(encoder.load_checkpoint(state).state_dict()) == len(state)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(rope=True), r"rope=\(1\.0, 100\.0\) with rel_pos=True.*set rel_pos=False"),
            (dict(rope=True, rel_pos=False, global_attn_indexes=(1,)), r"some windowed layers"),
            (dict(rope=True, rel_pos=False, dim=36, heads=2), r"head dim 18"),
            (dict(rope=(2, 1), rel_pos=False), r"rope=\(2, 1\): expected True, False or"),
            (dict(rope=3, rel_pos=False), r"rope=3: expected True, False or"),
        ],
    )
    def test_bad_input(self, options, message):
        with pytest.raises(ValueError, match=message):
            create_encoder(**{**dict(depth=2, dim=32, heads=2), **options})

    def test_special_tokens_of_the_caller(self):
        options = dict(image_size=64, patch_size=8, num_special=2, out_channels=None)
        encoder = create_encoder(1, 32, 2, rel_pos=False, rope=True, **options)
        pixels, special = torch.randn(3, 3, 64, 64), torch.randn(3, 2, 32)
        with torch.no_grad():
            plain = encoder(pixels)
            assert torch.equal(encoder(pixels, special=torch.zeros_like(special)), plain)
            assert relative_error(encoder(pixels, special=special)[:, :2], plain[:, :2]) > 0.1
            encoder.special_tokens.zero_()
            alone, together = (
                encoder(pixels[1:2], special=special[1:2]),
                encoder(pixels, special=special),
            )
            assert torch.allclose(alone, together[1:2], atol=1e-5)
        message = r"expected \(3, 2, 32\), \(images, num_special, dim\)"
        for wrong in (special[:, :1], special[:2]):
            with pytest.raises(ValueError, match=message):
                encoder(pixels, special=wrong)


class TestModel:
    def test_spec(self):
        spec = bsa.inspect(untrained())
        assert (spec.family, spec.grid, spec.patch_size) == ("vit", (32, 32), (8, 8))
        assert (spec.num_prefix_tokens, spec.num_suffix_tokens) == (1, 0)
        assert len(spec.layers) >= 4
        assert all(layer.heads >= 4 and layer.head_dim >= 32 for layer in spec.layers)
        assert not any(layer.window for layer in spec.layers)

    @pytest.mark.parametrize("size", [(64, 64), (48, 80)])
    def test_any_resolution(self, size):
        model = small()
        logits = model(torch.rand(2, 3, *size), torch.rand(2, 2))
        assert logits.shape == (2, size[0] // 2, size[1] // 2)

    def test_the_click_changes_the_answer(self):
        model, (images, click) = small(), small_batch()
        with torch.no_grad():
            assert relative_error(model(images, 1 - click), model(images, click)) > 1e-3

    def test_a_dense_plan_changes_nothing(self):
        model, batch = small(), small_batch()
        with torch.no_grad():
            dense = model(*batch)
            assert relative_error(bsa.sparsify_(model, bsa.dense_plan(model))(*batch), dense) < 1e-5
            assert torch.equal(bsa.restore_(model)(*batch), dense)

    def test_sparse_matches_masked_attention(self):
        model, batch = small(), small_batch()
        plan = bsa.uniform_plan(model, "random_blocks", sparsity=0.6, tile=(2, 4), block_size=8)
        with torch.no_grad():
            dense = model(*batch)
            masked = bsa.sparsify_(model, plan, backend="reference")(*batch)
            bsa.restore_(model)
            assert relative_error(bsa.sparsify_(model, plan)(*batch), masked) < 1e-5
            assert relative_error(masked, dense) > 1e-2

    def test_compiled(self):
        model, batch = small(), small_batch()
        plan = bsa.uniform_plan(model, "local_window", radius=1, tile=(2, 4), block_size=8)
        bsa.sparsify_(model, plan)
        with torch.no_grad():
            expected = model(*batch)
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            assert relative_error(compiled(*batch), expected) < 1e-5

    def test_checkpoint_round_trip(self, tmp_path):
        model, batch = small(), small_batch()
        save(model, tmp_path / "m.safetensors", {"command": "x", "seed": "3"})
        again = load(tmp_path / "m.safetensors")
        assert again.notes == {"command": "x", "seed": "3"}
        assert again.size == SMALL
        with torch.no_grad():
            assert torch.equal(again(*batch), model(*batch))

    def test_other_files_are_refused(self, tmp_path):
        from safetensors.torch import save_file

        save_file({"x": torch.ones(1)}, str(tmp_path / "x.safetensors"))
        with pytest.raises(
            ValueError, match=r"no 'size' in its metadata: expected a file saved by"
        ):
            load(tmp_path / "x.safetensors")


class TestTraining:
    RECIPE = (train.Stage(16, 8, 4, EASY), train.Stage(16, 8, 4, train.MEDIUM))

    def training(self, **settings):
        torch.manual_seed(0)
        return train.Training(Testbed(SMALL), self.RECIPE, train.Settings(warmup=8, **settings))

    def test_loss_decreases_on_a_batch(self):
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

    def test_a_resumed_run_matches_an_uninterrupted_one(self, tmp_path):
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
        pairs = zip(straight.model.parameters(), first.model.parameters())
        assert not all(torch.equal(a, b) for a, b in pairs)

    def test_a_run_writes_notes_and_resumes(self, tmp_path, monkeypatch):
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
        train.run(self.training(), tmp_path, "again")  # already finished
        assert load(tmp_path / "testbed.safetensors").notes["command"] == "python train.py"

    def test_processes_share_a_batch(self):
        """Two ranks split a batch, without overlap."""
        first, second = self.training(), self.training()
        seeds = []
        for rank, training in enumerate((first, second)):
            training.rank, training.world = rank, 2
            seeds += training.seeds(4)
        assert sorted(seeds) == [0, 1, 2, 3]

    def test_kinds_of_patches(self):
        batch = scenes.make(range(3), 64, HARD)
        shape, texture = train._patch_kinds(batch, 8)
        for image in range(3):
            seen = batch.instance[image, 20, 36]  # the centre of patch (2, 4)
            expected = (0, 0)
            if seen >= 0:
                shape_name = HARD.shapes[batch.layout.shape[image, seen]]
                texture_name = HARD.textures[batch.layout.texture[image, seen]]
                expected = (
                    list(scenes.SHAPES).index(shape_name) + 1,
                    list(scenes.TEXTURES).index(texture_name) + 1,
                )
            assert (shape[image, 2, 4], texture[image, 2, 4]) == expected


class TestObserving:
    def test_probabilities_reproduce_the_layers_output(self):
        """The output of a layer is the projection of softmax(q k) v."""
        model, batch, seen, outs = small(), small_batch(), [], []
        attention = model.encoder.blocks[1].attn
        attention.register_forward_hook(lambda module, args, out: outs.append(out))
        with torch.no_grad(), bsa.observe(model, seen.append):
            model(*batch)
        assert [layer.layer.index for layer in seen] == [0, 1]
        mixed = [probabilities(layer.q, layer.k) @ seen[1].v for layer in seen]
        first, second = (attention.proj(x.transpose(1, 2).flatten(2)) for x in mixed)
        assert relative_error(second, outs[0]) < 1e-5
        assert relative_error(first, outs[0]) > 1e-2

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

    def test_statistics_of_known_heads(self):
        """Uniform attention, and attention of every token to itself."""
        layout = TokenLayout((16, 16), num_prefix_tokens=1, order="tile", tile=(2, 4), block_size=8)
        probs = torch.stack([torch.full((257, 257), 1 / 257), torch.eye(257)])
        alike = torch.eye(256, dtype=torch.bool)
        uniform, diagonal = heads._statistics(probs, layout, alike).tolist()
        assert uniform[0] == pytest.approx(math.log(257), abs=1e-3)
        assert uniform[1] == pytest.approx(0.953, abs=0.01)
        assert uniform[4] == pytest.approx(1, abs=1e-3)
        assert diagonal[0] == pytest.approx(0, abs=1e-3)
        assert diagonal[1:4] == pytest.approx([1 / 257, 1 / 33, 1])
        assert diagonal[4] == pytest.approx(256)
        kinds = [heads.Head(0, 0, *values).kind for values in (uniform, diagonal)]
        assert kinds == ["diffuse", "local"]
