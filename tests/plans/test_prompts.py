"""Prompts: from image pixels to patches, as models resize and pad, and masks that follow them."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bsa_vision as bsa
from bsa_vision.masks import Pattern, TokenLayout, generate_sam_region_focused_mask, prompt_region
from bsa_vision.plans.prompts import resized_to_fit
from tests.helpers.errors import relative_error
from tests.helpers.oracles_masks import Blocks, layouts
from tests.helpers.sam_models import features, image, make

property_test = settings(max_examples=50, deadline=None)
PLAN = dict(radius=1, near=1, tile=(4, 4), block_size=16)
CLICK = bsa.Prompts(points=[(12, 12)])  # 96 x 96 pixels, patches of 8
OTHER = bsa.Prompts(points=[(84, 84)], boxes=[(56.0, 60.0, 70.0, 90.0)])


@pytest.fixture
def model():
    model = make("segment_anything")
    return bsa.sparsify_(model, bsa.uniform_plan(model, "prompt_region", **PLAN))


class TestGeometry:
    @property_test
    @given(data=st.data(), height=st.integers(1, 3000), width=st.integers(1, 3000))
    def test_resized_as_segment_anything_does_it(self, data, height, width):
        from segment_anything.utils.transforms import ResizeLongestSide

        theirs = ResizeLongestSide(1024)
        assert resized_to_fit((height, width), (1024, 1024)) == theirs.get_preprocess_shape(
            height, width, 1024
        )
        x, y = (data.draw(st.floats(0, side, exclude_max=True)) for side in (width, height))
        column, row = theirs.apply_coords(np.array([[x, y]]), (height, width))[0]
        ((top, left, bottom, right),) = bsa.Prompts(
            [(x, y)], image_size=(height, width)
        ).on_patches((64, 64), (16, 16))
        row, column = round(row, 6), round(column, 6)
        assert (
            (top, left) == (bottom, right) == (min(int(row // 16), 63), min(int(column // 16), 63))
        )

    @pytest.mark.parametrize(("height", "width"), [(480, 640), (1500, 700), (333, 1000)])
    def test_as_transformers_does_it(self, height, width):
        from transformers import SamImageProcessor, SamProcessor

        x, y = 0.7 * width, 0.4 * height
        box = (0.1 * width, 0.2 * height, 0.6 * width, 0.9 * height)
        picture = np.zeros((height, width, 3), dtype=np.uint8)
        given = SamProcessor(SamImageProcessor())(
            picture, input_points=[[[x, y]]], input_boxes=[[list(box)]], return_tensors="pt"
        )
        column, row = given["input_points"].flatten().tolist()
        x0, y0, x1, y1 = given["input_boxes"].flatten().tolist()
        click, rectangle = bsa.Prompts([(x, y)], [box], (height, width)).on_patches(
            (64, 64), (16, 16)
        )
        assert click == (row // 16, column // 16) * 2
        assert rectangle == (y0 // 16, x0 // 16, -(-y1 // 16) - 1, -(-x1 // 16) - 1)

    def test_image_pixels_are_not_input_pixels(self):
        click = [(600, 300)]
        assert bsa.Prompts(click).on_patches((64, 64), (16, 16)) == ((18, 37, 18, 37),)
        assert bsa.Prompts(click, image_size=(2048, 2048)).on_patches((64, 64), (16, 16)) == (
            (9, 18, 9, 18),
        )

    def test_borders_alone_are_not_touched(self):
        boxes = [(16, 16, 32, 48), (15.9, 16, 32.1, 48)]
        assert bsa.Prompts(boxes=boxes).on_patches((4, 4), (16, 16)) == ((1, 1, 2, 1), (1, 0, 2, 2))
        assert bsa.Prompts(boxes=[(0, 0, 64, 64)]).on_patches((4, 4), (16, 16)) == ((0, 0, 3, 3),)
        # 369 * 1024 / 492 is exactly 768, a border, but slightly more in floating point.
        scaled = bsa.Prompts(boxes=[(0, 0, 369, 5)], image_size=(247, 492))
        assert scaled.on_patches((64, 64), (16, 16))[0][3] == 47

    def test_inputs_that_are_not_square(self):
        """Images are resized to fit and padded at the bottom and the right."""
        assert resized_to_fit((100, 400), (512, 1024)) == (256, 1024)
        assert bsa.Prompts([(399, 99)], image_size=(100, 400)).on_patches((32, 64), (16, 16)) == (
            (15, 63, 15, 63),
        )

    def test_sizes_as_processors_give_them(self):
        for size in (torch.tensor([48, 64]), np.array([48, 64]), [48, 64]):
            assert bsa.Prompts([(3, 4)], image_size=size).image_size == (48, 64)

    def test_tensors_and_arrays(self):
        assert bsa.Prompts(torch.tensor([[3, 4]]), np.array([[1, 2, 3, 4]])) == bsa.Prompts(
            [(3, 4)], [(1, 2, 3, 4)]
        )

    @pytest.mark.parametrize(
        ("make_it", "message"),
        [
            (lambda: bsa.Prompts(), r"without points and boxes: .*e\.g\. points="),
            (
                lambda: bsa.Prompts([(640, 10)], image_size=(480, 640)),
                r"point \(640, 10\) lies outside the image of 640 x 480 pixels",
            ),
            (
                lambda: bsa.Prompts([(10, 500)], image_size=(480, 640)),
                r"0 <= y < 480; give \(x, y\), x first",
            ),
            (
                lambda: bsa.Prompts([(-1, 5)], image_size=(480, 640)),
                r"point \(-1, 5\) lies outside",
            ),
            (
                lambda: bsa.Prompts([(float("nan"), 5)], image_size=(480, 640)),
                r"point \(nan, 5\) lies outside",
            ),
            (
                lambda: bsa.Prompts(boxes=[(1, 2, 700, 4)], image_size=(480, 640)),
                r"box \(1, 2, 700, 4\) lies outside",
            ),
            (
                lambda: bsa.Prompts(boxes=[(5, 2, 3, 4)]),
                r"box \(5, 2, 3, 4\) is empty: .*x0 < x1 and y0 < y1",
            ),
            (
                lambda: bsa.Prompts((3, 4)),
                r"points=\(3, 4\): expected a list of \(x, y\) in pixels; put",
            ),
            (lambda: bsa.Prompts([(3, 4, 5)]), r"expected a list of \(x, y\) in pixels"),
            (lambda: bsa.Prompts([(3, 4)], image_size=640), r"image_size=640: expected a pair"),
        ],
    )
    def test_bad_input(self, make_it, message):
        with pytest.raises(ValueError, match=message):
            make_it()


class TestPattern:
    @property_test
    @given(layout=layouts(), data=st.data(), radius=st.integers(0, 6), near=st.integers(0, 4))
    def test_by_brute_force(self, layout, data, radius, near):
        boxes = []
        for _ in range(data.draw(st.integers(0, 3))):
            ends = [
                sorted(data.draw(st.tuples(*[st.integers(0, side - 1)] * 2)))
                for side in layout.grid
            ]
            boxes.append((ends[0][0], ends[1][0], ends[0][1], ends[1][1]))
        blocks = Blocks.of(layout)
        inside = [
            (r, c)
            for t, left, b, right in boxes
            for r in range(t, b + 1)
            for c in range(left, right + 1)
        ]
        focus = blocks.focus(inside, radius)
        close = blocks.token_distance("l1") <= near
        got = prompt_region(layout, radius, near, boxes)
        # Two blocks in focus attend to each other, whichever patches put them in focus.
        in_focus = np.array(
            [
                focus[i : i + layout.block_size].any()
                for i in range(0, len(focus), layout.block_size)
            ]
        )
        expected = blocks.any_rule(close) | blocks.keep_special(in_focus[:, None] & in_focus)
        assert np.array_equal(got.numpy(), expected)

    def test_clicks_are_the_generators(self):
        layout = TokenLayout((16, 16), block_size=16)
        clicks = [(2, 3), (12, 5)]
        theirs = generate_sam_region_focused_mask(256, 0, clicks, 16, 1, 1, focus_radius=3)[0, 0]
        boxes = [(row, column, row, column) for row, column in clicks]
        assert torch.equal(Pattern("prompt_region", radius=3)(layout, boxes=boxes), theirs)
        assert not torch.equal(Pattern("prompt_region", radius=3)(layout), theirs)

    def test_unions_are_dynamic_too(self):
        union = Pattern("strided", stride=3) | Pattern("prompt_region", radius=2)
        layout, boxes = TokenLayout((16, 16), block_size=16), [(3, 3, 5, 5)]
        assert union.is_dynamic
        assert not Pattern("strided").is_dynamic
        expected = Pattern("strided", stride=3)(layout) | prompt_region(layout, 2, boxes=boxes)
        assert torch.equal(union(layout, boxes=boxes), expected)
        assert Pattern.from_spec(union.spec) == union


class TestModels:
    @pytest.mark.parametrize(
        "name", ["segment_anything", "transformers sam", "timm", "create_encoder"]
    )
    def test_each_image_follows_its_own_prompts(self, name):
        """The result equals one image at a time with its mask in a static plan."""
        model = make(name)
        plan, spec = bsa.uniform_plan(model, "prompt_region", **PLAN), bsa.inspect(model)
        with torch.no_grad():
            dense = features(model, image())
            with bsa.context(bsa.sparsify_(model, plan), prompts=[CLICK, OTHER]):
                got = features(model, image())
            bsa.restore_(model)
            for index, prompts in enumerate((CLICK, OTHER)):
                mask = prompt_region(plan.layout(spec), 1, 1, prompts.on_patches((12, 12), (8, 8)))
                masks = bsa.HeadMasks(mask.expand(1, 2, -1, -1), layout=plan.layout(spec))
                static = bsa.SparsityPlan.from_head_masks(
                    spec, {key: masks for key in ("self.1", "self.3")}
                )
                expected = features(
                    bsa.sparsify_(model, static, backend="reference"), image()[index : index + 1]
                )
                bsa.restore_(model)
                assert relative_error(got[index : index + 1], expected) < 1e-5
                assert relative_error(got[index : index + 1], dense[index : index + 1]) > 1e-2

    def test_an_embedding_belongs_to_its_prompts(self, model):
        with torch.no_grad():
            outs = []
            for prompts in (CLICK, OTHER, CLICK):
                with bsa.context(model, prompts=prompts):
                    outs.append(features(model, image(batch=1)))
        assert torch.equal(outs[0], outs[2])
        assert relative_error(outs[1], outs[0]) > 1e-2

    def test_without_prompts_it_is_an_error_and_dense_needs_none(self, model):
        with pytest.raises(
            ValueError,
            match=r"layer 'blocks\.1\.attn' has a pattern that follows prompts, and there are none",
        ):
            features(model, image())
        with torch.no_grad(), bsa.dense(model):
            assert torch.equal(
                features(model, image()), features(make("segment_anything"), image())
            )

    def test_contexts_nest_and_end(self, model):
        with torch.no_grad(), bsa.context(model, prompts=CLICK):
            first = features(model, image())
            with bsa.context(model, prompts=OTHER):
                assert relative_error(features(model, image()), first) > 1e-3
                with (
                    pytest.raises(ValueError, match="outside"),
                    bsa.context(model, prompts=bsa.Prompts([(999, 1)])),
                ):
                    features(model, image())
                assert relative_error(features(model, image()), first) > 1e-3
            assert torch.equal(features(model, image()), first)
        with pytest.raises(ValueError, match="there are none"):
            features(model, image())

    def test_contexts_that_end_out_of_order(self, model):
        """Generators that hold a context may end in any order."""
        first, second = bsa.context(model, prompts=CLICK), bsa.context(model, prompts=OTHER)
        with torch.no_grad():
            first.__enter__()
            second.__enter__()
            with bsa.context(model, prompts=OTHER):
                expected = features(model, image())
            first.__exit__(None, None, None)
            assert torch.equal(features(model, image()), expected)
            second.__exit__(None, None, None)
            with pytest.raises(ValueError, match="there are none"):
                features(model, image())

    def test_threads_bring_their_own(self, model):
        """Two threads in different contexts and one without use the same model at once."""
        with torch.no_grad():
            expected = {}
            for name, prompts in (("click", CLICK), ("other", OTHER)):
                with bsa.context(model, prompts=prompts):
                    expected[name] = features(model, image())
        both, got, errors = threading.Barrier(2), {}, []

        def run(name, prompts):
            with torch.no_grad(), bsa.context(model, prompts=prompts):
                for _ in range(5):
                    both.wait()
                    got.setdefault(name, []).append(features(model, image()))

        def without():
            try:
                features(model, image())
            except ValueError as error:
                errors.append(str(error))

        threads = [
            threading.Thread(target=run, args=a) for a in (("click", CLICK), ("other", OTHER))
        ]
        with bsa.context(model, prompts=CLICK):
            threads.append(threading.Thread(target=without))
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
        assert all(torch.equal(out, expected[name]) for name, outs in got.items() for out in outs)
        assert sum(map(len, got.values())) == 10
        assert len(errors) == 1
        assert "there are none" in errors[0]

    def test_masks_that_keep_everything_are_counted_as_well(self):
        model = make("segment_anything")
        bsa.sparsify_(model, bsa.uniform_plan(model, "prompt_region", radius=100))
        with (
            bsa.context(model, prompts=[CLICK, OTHER]),
            pytest.raises(ValueError, match="prompts for 2 images, but the batch has 3"),
        ):
            features(model, image(batch=3))
        with (
            bsa.context(model, prompts=[CLICK]),
            pytest.raises(ValueError, match="prompts for 1 images, but the batch has 2"),
        ):
            features(model, image())

    def test_one_prompt_for_all_images_or_one_for_each(self, model):
        with torch.no_grad():
            with bsa.context(model, prompts=CLICK):
                one = features(model, image())
            with bsa.context(model, prompts=[CLICK, CLICK]):
                assert relative_error(features(model, image()), one) < 1e-6
            with (
                bsa.context(model, prompts=[CLICK, OTHER]),
                pytest.raises(ValueError, match="prompts for 2 images, but the batch has 3"),
            ):
                features(model, image(batch=3))

    @pytest.mark.parametrize("backend", ["auto", "sdpa", "reference", "gather"])
    def test_every_backend(self, backend):
        outs = []
        for name in (backend, "reference"):
            model = make("segment_anything")
            bsa.sparsify_(model, bsa.uniform_plan(model, "prompt_region", **PLAN), backend=name)
            with torch.no_grad(), bsa.context(model, prompts=[CLICK, OTHER]):
                outs.append(features(model, image()))
        assert relative_error(outs[0], outs[1]) < 1e-5

    def test_gradients_and_backward_outside(self, model):
        twin = make("segment_anything")
        bsa.sparsify_(twin, bsa.uniform_plan(twin, "prompt_region", **PLAN), backend="reference")
        for each in (model, twin):
            with bsa.context(each, prompts=[CLICK, OTHER]):
                out = features(each, image())
            with bsa.context(each, prompts=CLICK):
                features(each, image())
            out.square().mean().backward()
        for a, b in zip(model.parameters(), twin.parameters()):
            assert relative_error(a.grad, b.grad) < 1e-4

    def test_compiled_models_follow_the_prompts_of_the_moment(self, model):
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for prompts in (CLICK, OTHER):
            with bsa.context(model, prompts=prompts):
                with torch.no_grad():
                    assert relative_error(compiled(image()), model(image())) < 1e-5
                with pytest.raises(
                    Exception,
                    match=r"follows prompts: a compiled model would look them up again in backward",
                ):
                    compiled(image())

    def test_checkpointing_is_refused(self):
        model = make("create_encoder", gradient_checkpointing=True).train()
        bsa.sparsify_(model, bsa.uniform_plan(model, "prompt_region", **PLAN))
        with bsa.context(model, prompts=CLICK):
            out = model(image())
            with pytest.raises(
                RuntimeError, match="follows prompts, and gradient checkpointing runs it again"
            ):
                out.sum().backward()

    def test_plans_save_but_do_not_freeze(self, model, tmp_path):
        plan = bsa.uniform_plan(make("segment_anything"), "prompt_region", **PLAN)
        plan.save(tmp_path / "plan.json")
        assert bsa.SparsityPlan.load(tmp_path / "plan.json") == plan
        with pytest.raises(
            bsa.PlanError,
            match="follows prompts: only patterns that are the same for every image can be frozen",
        ):
            plan.freeze(plan.layout(bsa.inspect(make("segment_anything"))))

    def test_describe_and_copies(self, model):
        text = str(bsa.describe(model))
        assert "prompt_region(radius=1, near=1) follows the prompts of `bsa.context`" in text
        empty = bsa.describe(model).layers[1].sparsity
        with bsa.context(model, prompts=OTHER):
            assert bsa.describe(model).layers[1].sparsity < empty
            copies = [
                copy.deepcopy(model),
                *(pickle.loads(pickle.dumps(model, protocol)) for protocol in (0, 2, 5)),
            ]
        for other in copies:
            with pytest.raises(ValueError, match="there are none"):
                features(other, image())
            with (
                torch.no_grad(),
                bsa.context(other, prompts=CLICK),
                bsa.context(model, prompts=OTHER),
            ):
                assert relative_error(features(other, image()), features(model, image())) > 1e-2

    @pytest.mark.parametrize(
        ("prompts", "error", "message"),
        [
            (
                bsa.Prompts([(97, 5)]),
                ValueError,
                r"point \(97, 5\) lies outside the image of 96 x 96 pixels",
            ),
            ([(5, 5)], TypeError, r"prompts=\[\(5, 5\)\]: expected bsa\.Prompts, or a list"),
            ([], TypeError, r"expected bsa\.Prompts"),
        ],
    )
    def test_bad_prompts(self, model, prompts, error, message):
        with pytest.raises(error, match=message), bsa.context(model, prompts=prompts):
            features(model, image())

    def test_a_model_that_follows_none(self):
        model = make("segment_anything")
        for each in (model, bsa.sparsify_(copy.deepcopy(model), bsa.dense_plan(model))):
            with (
                pytest.raises(
                    ValueError,
                    match=r"no layer of this model has a pattern that follows prompts.*"
                    r"sparsify_ it",
                ),
                bsa.context(each, prompts=CLICK),
            ):
                pass
