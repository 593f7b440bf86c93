"""The testbed's procedural scenes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from examples.testbed import scenes, train
from examples.testbed.scenes import EASY, HARD, SHIFTED


class TestScenes:
    def test_scenes_depend_only_on_their_seed(self):
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
    def test_the_answer_is_every_object_of_the_same_shape_and_texture(self, difficulty):
        """Compare with a loop over objects."""
        batch = scenes.make(range(40), 64, difficulty)
        layout = batch.layout
        several = 0
        for image in range(40):
            clicked = int(layout.clicked[image])
            kind = (int(layout.shape[image, clicked]), int(layout.texture[image, clicked]))
            expected = torch.zeros(64, 64, dtype=torch.bool)
            kinds = []
            for slot in range(layout.radius.shape[1]):
                if layout.radius[image, slot] == 0:
                    assert not (batch.instance[image] == slot).any()
                    continue
                kinds.append((int(layout.shape[image, slot]), int(layout.texture[image, slot])))
                if kinds[-1] == kind:
                    expected |= batch.instance[image] == slot
            assert torch.equal(batch.mask[image], expected)
            assert batch.mask[image].any()
            assert difficulty.objects[0] <= len(kinds) <= difficulty.objects[1]
            assert any(shape == kind[0] and texture != kind[1] for shape, texture in kinds)
            assert any(shape != kind[0] and texture == kind[1] for shape, texture in kinds)
            several += kinds.count(kind) > 1
        assert 10 < several < 40

    @pytest.mark.parametrize(("size", "share"), [(scenes.LOOKS, 1.0), (96, 0.95)])
    def test_the_click_is_on_the_clicked_object(self, size, share):
        """Exact at the resolution at which clicks are chosen; others may miss a thin ring."""
        batch = scenes.make(range(100), size, HARD)
        column, row = (batch.click * size).long().unbind(1)
        on = batch.instance[torch.arange(100), row, column]
        assert (on == batch.layout.clicked).float().mean() >= share
        assert batch.mask[torch.arange(100), row, column].float().mean() >= share

    def test_matching_objects_are_far_apart(self):
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
        assert (shrunk - coarse.images.flip(0)).abs().mean() > 0.1  # other scenes differ
        share = F.avg_pool2d(fine.mask[:, None].float(), 2)[:, 0]
        assert ((share > 0.5) != coarse.mask).float().mean() < 0.01

    @pytest.mark.parametrize("name", scenes.SHAPES)
    def test_distances_have_the_right_sign(self, name):
        """The centre is inside (outside for a ring), and everything beyond REACH is outside."""
        angle = torch.linspace(0, 2 * math.pi, 721)
        x, y = angle.cos(), angle.sin()
        shape = scenes.SHAPES[name]
        assert (shape(scenes.REACH * x, scenes.REACH * y) > 0).all()
        assert (shape(0.01 * x, 0.01 * y) < 0).all() == (name != "ring")
        line = torch.linspace(-1.2, 1.2, 241)
        inside = shape(*torch.meshgrid(line, line, indexing="ij")) < 0
        area = inside.float().mean() * 2.4**2
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

    def test_shifted_scenes_differ(self):
        assert set(SHIFTED.textures) - set(HARD.textures)
        assert SHIFTED.objects[0] > HARD.objects[1]
        assert scenes.held_out(3)[0] > 2**32 * 100  # far above the seeds of training
